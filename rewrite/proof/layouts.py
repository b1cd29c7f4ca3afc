"""Rules of operators that move entries and compute none, and of integers that are sizes."""

from __future__ import annotations

import numpy as np

from rewrite.proof import forms
from rewrite.proof.constants import Array, Constant, Expanded, Joined, permuted, reshaped, sliced
from rewrite.proof.dimensions import ONE, SIGNED, Dim, Shape, broadcast, minimum, opaque, product
from rewrite.proof.forms import Form, form_of
from rewrite.proof.masks import guarded
from rewrite.proof.rules import attribute, integers, rule
from rewrite.proof.values import Integers, as_integers, sizes


@rule("Identity", "Dropout")
def identity(walk, node, operands):
    if node.op_type == "Dropout" and len(operands) > 2 and operands[2] is not None:
        training = operands[2]
        if not isinstance(training, Constant) or training.whole().any():
            return None
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return None
    return [operands[0]]


@rule("Cast")
def cast(walk, node, operands):
    """Between floating-point types nothing changes over the reals; between equal types nothing changes at all."""
    value, to = operands[0], walk.kind_of_dtype(attribute(node, "to", 0))
    if isinstance(value, Integers):
        # int32 wraps around where sizes multiply; what comes of it is another function of them.
        return value if to == "int64" else None
    if isinstance(value, Constant):
        if value.kind == "f" and to == "f":
            return value
        whole = walk.small(value)
        if whole is None:
            return None
        if to == value.type:
            return value
        if to == "f":
            return walk.computed(whole.astype(np.float64), [value])
        if to == "b":
            return walk.computed(whole != 0, [value])
        return walk.computed(np.trunc(whole).astype(to), [value]) if to in ("int64", "int32") else None
    return value if to == value.kind else None


@rule("CastLike")
def cast_like(walk, node, operands):
    like = operands[1]
    if isinstance(like, Constant) and ((stored := like.stored) is None or stored.tensor.dtype.bitwidth < 16):
        # Of what was computed from constants it is not known in how many bits.
        return None
    terms = walk.form(like).terms
    if not isinstance(like, Constant) and (not terms or any(term.atom.key[0] in ("one", "eye") for term in terms)):
        return None
    kind = walk.form(like).kind
    return operands[0] if walk.form(operands[0]).kind == kind != "unknown" else None


@rule("Shape")
def shape_of(walk, node, operands):
    shape = walk.shape(operands[0])
    start, end = attribute(node, "start", 0), attribute(node, "end", len(shape))
    return Integers.of(np.array([*shape[start:end], None], dtype=object)[:-1])


@rule("Size")
def size_of(walk, node, operands):
    return Integers.of(np.array(product(walk.shape(operands[0])), dtype=object))


@rule("Transpose")
def transpose(walk, node, operands):
    rank = len(walk.shape(operands[0]))
    permutation = tuple(attribute(node, "perm", tuple(reversed(range(rank)))))
    if isinstance(operands[0], Constant):
        return permuted(operands[0], permutation)
    return forms.transpose(walk.form(operands[0]), permutation)


def reshaped_to(walk, value, shape: Shape):
    """`value` under `shape`; a view where its axes divide, an opaque reshape where they do not."""
    static = tuple(n.constant for n in shape if n.constant is not None)
    if isinstance(value, Integers | Constant) and len(static) == len(shape):
        if isinstance(value, Integers):
            return Integers(static, value.entries)
        return reshaped(value, static)
    form = walk.form(value)
    result = forms.reshape(form, shape)
    if result is None:
        result = form_of(walk.atom(("reshape", walk.intern(form), shape), shape, form.kind))
    return result


@rule("Reshape")
def reshape(walk, node, operands):
    target = sizes(operands[1])
    if target is None:
        return None
    walk.pin(operands[1])
    old = walk.shape(operands[0])
    shape: list[Dim] = []
    for axis, size in enumerate(target):
        if size == Dim.of(0) and not attribute(node, "allowzero", 0):
            size = old[axis]
        shape.append(size)
    unknown = [axis for axis, size in enumerate(shape) if size == Dim.of(-1)]
    if unknown:
        known = product(size for axis, size in enumerate(shape) if axis != unknown[0])
        rest = product(old).quotient(known)
        shape[unknown[0]] = rest if rest is not None else opaque("quotient", product(old), known)
    return reshaped_to(walk, operands[0], tuple(shape))


@rule("Flatten")
def flatten(walk, node, operands):
    shape = walk.shape(operands[0])
    axis = attribute(node, "axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return reshaped_to(walk, operands[0], (product(shape[:axis]), product(shape[axis:])))


@rule("Squeeze")
def squeeze(walk, node, operands):
    shape = walk.shape(operands[0])
    axes = integers(operands[1]) if len(operands) > 1 and operands[1] is not None else attribute(node, "axes", None)
    if axes is None:
        if any(size.constant is None for size in shape):
            # A symbol may be 1, and then its axis goes too.
            return None
        axes = [axis for axis, size in enumerate(shape) if size == ONE]
    elif len(operands) > 1:
        walk.pin(operands[1])
    gone = {axis % len(shape) for axis in axes}
    if any(shape[axis] != ONE for axis in gone):
        return None
    return reshaped_to(walk, operands[0], tuple(n for axis, n in enumerate(shape) if axis not in gone))


@rule("Unsqueeze")
def unsqueeze(walk, node, operands):
    shape = list(walk.shape(operands[0]))
    axes = integers(operands[1]) if len(operands) > 1 else attribute(node, "axes", None)
    if axes is None:
        return None
    if len(operands) > 1:
        walk.pin(operands[1])
    rank = len(shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, ONE)
    return reshaped_to(walk, operands[0], tuple(shape))


@rule("Expand")
def expand(walk, node, operands):
    target = sizes(operands[1])
    if target is None:
        return None
    walk.pin(operands[1])
    shape = broadcast(walk.shape(operands[0]), target)
    known = tuple(n.constant for n in shape if n.constant is not None)
    if isinstance(operands[0], Constant) and operands[0].kind == "f" and len(known) == len(shape):
        return Expanded(operands[0], known)
    return forms.widened(walk.form(operands[0]), shape)


@rule("ConstantOfShape")
def constant_of_shape(walk, node, operands):
    target = sizes(operands[0])
    if target is None:
        return None
    walk.pin(operands[0])
    filled = attribute(node, "value", None)
    value = np.zeros((1,), np.float32) if filled is None else filled.numpy()
    single = forms.reshape(walk.form(walk.computed(value, [])), ())
    if single is None:
        raise ValueError("what a constant of a shape is filled with is not one number")
    return forms.widened(single, target)


@rule("Concat")
def concatenate(walk, node, operands):
    axis = attribute(node, "axis", 0)
    if any(isinstance(o, Integers) for o in operands):
        parts = [as_integers(o) for o in operands]
        if all(part is not None for part in parts):
            return Integers.of(np.concatenate([part.array() for part in parts], axis=axis))  # type: ignore[union-attr]
    if all(isinstance(o, Constant) for o in operands):
        return Joined(tuple(operands), axis % len(operands[0].shape))
    return forms.concatenate([walk.form(o) for o in operands], axis)


def _clamped(size: Dim, bound: Dim) -> Dim | None:
    """A slice's start or end inside an axis of size `bound`: from the end where negative, at most the whole.

    None where the sign of a symbolic start or end is not known.
    """
    if size.constant is not None:
        if size.constant < 0:
            size = bound + size.constant
            if size.constant is None and (size.least is None or size.least < 0):
                # The axis may be shorter than that: the slice then starts or ends at 0.
                return opaque("positive", size)
        elif size.constant > 2**30:
            return bound
    if size == bound:
        return bound
    if size.constant is not None and bound.constant is not None:
        return Dim.of(max(0, min(size.constant, bound.constant)))
    if size.least is None or size.least < 0:
        return None
    rest = bound - size
    if rest.constant is not None:
        return size if rest.constant >= 0 else bound
    # Every symbol is a size, so a polynomial without negative coefficients is not negative.
    if all(coefficient > 0 for _, coefficient in rest.terms):
        return size
    return Dim.of(0) if size == Dim.of(0) else minimum(size, bound)


def _extent(begin: Dim, stop: Dim, *, inside: bool = False) -> Dim:
    """How many integers there are from `begin` on and below `stop`; `inside`: begin is known not to lie behind stop."""
    length = stop - begin
    if length.constant is not None:
        return Dim.of(max(0, length.constant))
    return length if inside or (length.least is not None and length.least >= 0) else opaque("positive", length)


@rule("Slice")
def slicing(walk, node, operands):
    shape = walk.shape(operands[0])
    if len(operands) > 1:
        starts, ends = sizes(operands[1]), sizes(operands[2])
        axes = integers(operands[3]) if len(operands) > 3 and operands[3] is not None else None
        steps = integers(operands[4]) if len(operands) > 4 and operands[4] is not None else None
        if len(operands) > 3 and operands[3] is not None and axes is None:
            return None
        if len(operands) > 4 and operands[4] is not None and steps is None:
            return None
        for operand in operands[1:]:
            walk.pin(operand)
    else:
        starts = tuple(Dim.of(n) for n in attribute(node, "starts", ()))
        ends = tuple(Dim.of(n) for n in attribute(node, "ends", ()))
        axes, steps = attribute(node, "axes", None), None
    if starts is None or ends is None:
        return None
    axes = list(range(len(starts))) if axes is None else [axis % len(shape) for axis in axes]
    steps = [1] * len(starts) if steps is None else steps
    value = operands[0]
    for axis, start, end, step in zip(axes, starts, ends, steps):
        if isinstance(value, Integers):
            if len(value.shape) != 1 or start.constant is None or end.constant is None:
                return None
            value = Integers.of(value.array()[start.constant : end.constant : step])
            continue
        bound = walk.shape(value)[axis]
        if step != 1:
            if step < 0 or bound.constant is None or start.constant is None or end.constant is None:
                return None
            taken = range(bound.constant)[start.constant : end.constant : step]
            value = forms.take(walk.form(value), axis, Dim.of(taken.start), Dim.of(len(taken)), step)
            continue
        begin, stop = _clamped(start, bound), _clamped(end, bound)
        if begin is None or stop is None:
            return None
        length = _extent(begin, stop, inside=stop == bound)
        if isinstance(value, Constant) and begin.constant is not None and length.constant is not None:
            region = [slice(0, n) for n in value.shape]
            region[axis] = slice(begin.constant, begin.constant + length.constant)
            value = sliced(value, tuple(region))
        else:
            value = forms.take(walk.form(value), axis, begin, length)
    return value


@rule("Split")
def split(walk, node, operands):
    shape = walk.shape(operands[0])
    axis = attribute(node, "axis", 0) % len(shape)
    if len(operands) > 1 and operands[1] is not None:
        lengths = sizes(operands[1])
        walk.pin(operands[1])
    else:
        parts, size = attribute(node, "num_outputs", len(node.outputs)), shape[axis]
        if size.constant is None:
            each = size.quotient(Dim.of(parts))
            lengths = None if each is None else (each,) * parts
        else:
            chunk = -(-size.constant // parts)
            lengths = tuple(Dim.of(min(chunk, size.constant - chunk * i)) for i in range(parts))
    if lengths is None:
        return None
    results, start = [], Dim.of(0)
    for length in lengths:
        value = operands[0]
        if isinstance(value, Constant) and start.constant is not None and length.constant is not None:
            region = [slice(0, n) for n in value.shape]
            region[axis] = slice(start.constant, start.constant + length.constant)
            results.append(sliced(value, tuple(region)))
        else:
            results.append(forms.take(walk.form(value), axis, start, length))
        start = start + length
    return results


@rule("Pad")
def padding(walk, node, operands):
    """Zeros around: a view, as long as what is put around is zero."""
    pads = integers(operands[1]) if len(operands) > 1 else None
    if pads is None or attribute(node, "mode", "constant") != "constant":
        return None
    form = walk.form(operands[0])
    if form.kind != "f":
        return None
    if len(operands) > 2 and operands[2] is not None:
        filler = operands[2]
        if not isinstance(filler, Constant) or filler.whole().any():
            return None
        walk.pin(filler)
    axes = list(range(form.rank))
    if len(operands) > 3 and operands[3] is not None:
        chosen = integers(operands[3])
        if chosen is None:
            return None
        axes = [axis % form.rank for axis in chosen]
    walk.pin(operands[1])
    for index, axis in enumerate(axes):
        before, after = pads[index], pads[index + len(axes)]
        if not before and not after:
            continue
        if before < 0 or after < 0:
            # Less than nothing is cut off.
            kept = form.shape[axis] + min(before, 0) + min(after, 0)
            if kept.least is None or kept.least < 0:
                return None
            form = forms.take(form, axis, Dim.of(max(-before, 0)), kept)
        before, after = max(before, 0), max(after, 0)
        zero = lambda n: Form((*form.shape[:axis], Dim.of(n), *form.shape[axis + 1 :]), ())  # noqa: E731, B023
        form = forms.concatenate([zero(before), form, zero(after)], axis)
    return form


@rule("Range")
def integer_range(walk, node, operands):
    start, limit, delta = (as_integers(operand) for operand in operands)
    if start is None or limit is None or delta is None:
        return None
    step = delta.entries[0].constant
    if step != 1:
        return None
    size = _extent(start.entries[0], limit.entries[0])
    if any(isinstance(o, Constant) and o.type != "int64" for o in operands):
        return None
    return form_of(walk.atom(("range", start.entries[0], limit.entries[0]), (size,), "int64"))


# ── Integers made of sizes ──────────────────────────────────────────────────────────────────────────────────────────


def integer_arithmetic(walk, node, operands):
    """Elementwise arithmetic on sizes; None where the result is not a polynomial."""
    if node.op_type not in ("Add", "Sub", "Mul", "Div", "Neg", "Min", "Max"):
        return None
    parts = [as_integers(operand) for operand in operands]
    if any(part is None for part in parts):
        return None
    arrays = np.broadcast_arrays(*(part.array() for part in parts))  # type: ignore[union-attr]
    entries = [_entry(node.op_type, list(column)) for column in zip(*(a.reshape(-1) for a in arrays))]
    if any(entry is None or not _fits(entry) for entry in entries):
        return None
    for operand in operands:
        walk.pin(operand)
    result = np.empty(len(entries), dtype=object)
    result[:] = entries
    return Integers.of(result.reshape(arrays[0].shape))


def _fits(entry: Dim) -> bool:
    """Whether no size that fits a machine makes an int64 of it overflow."""
    return all(abs(coefficient) < 1 << 31 for _, coefficient in entry.terms)


def _entry(operator: str, column: list[Dim]) -> Dim | None:
    a = column[0]
    if operator == "Neg":
        return -a
    b = column[1] if len(column) == 2 else None
    if b is None:
        return None
    if operator == "Add":
        return a + b
    if operator == "Sub":
        return a - b
    if operator == "Mul":
        return a * b
    if operator == "Div":
        # Integers are divided toward zero, which is the floor for what is not negative.
        floor = a.least is not None and a.least >= 0 and b.least is not None and b.least > 0
        return a.quotient(b) or (opaque("floor", a, b) if floor else Dim.symbol(f"{SIGNED}{opaque('divided', a, b)}"))
    if operator in ("Min", "Max") and (a - b).constant is not None:
        return a if ((a - b).constant <= 0) == (operator == "Min") else b  # type: ignore[operator]
    return None


def decided(operands) -> np.ndarray | None:
    """Whether two integer values are equal, entry by entry, where sizes alone decide it."""
    parts = [as_integers(operand) for operand in operands]
    if any(part is None for part in parts):
        return None
    left, right = np.broadcast_arrays(*(part.array() for part in parts))  # type: ignore[union-attr]
    answers = []
    for a, b in zip(left.reshape(-1), right.reshape(-1)):
        difference = a - b
        if difference.constant is not None:
            answers.append(difference.constant == 0)
        elif difference.least is not None and dict(difference.terms).get((), 0) > 0:
            # A sum of sizes plus a positive number: a size is not negative, so it is not zero.
            answers.append(False)
        else:
            return None
    return np.array(answers).reshape(left.shape)


@rule("Equal")
def equality(walk, node, operands):
    answer = decided(operands)
    if answer is None:
        return None
    for operand in operands:
        walk.pin(operand)
    return Array(answer)


@rule("Where")
def where(walk, node, operands):
    condition, a, b = operands
    if not isinstance(condition, Constant):
        if isinstance(a, Constant) and a.size == 1 and a.kind == "f" and not a.whole().any():
            walk.pin(a)
            if len(a.shape) > max(walk.form(condition).rank, walk.form(b).rank):
                return None
            return guarded(walk, walk.form(condition), walk.form(b))
        return None
    chosen = walk.small(condition)
    if chosen is None:
        return None
    left, right = as_integers(a), as_integers(b)
    if left is not None and right is not None:
        walk.pin(condition)
        mask, x, y = np.broadcast_arrays(chosen, left.array(), right.array())
        picked = np.empty(mask.size, dtype=object)
        picked[:] = [p if m else q for m, p, q in zip(mask.reshape(-1), x.reshape(-1), y.reshape(-1))]
        return Integers.of(picked.reshape(mask.shape))
    if chosen.all() or not chosen.any():
        walk.pin(condition)
        picked = walk.form(a if chosen.all() else b)
        shape = broadcast(picked.shape, walk.shape(condition), walk.shape(b if chosen.all() else a))
        return forms.widened(picked, shape)
    return None


@rule("ReduceProd")
def reduce_product(walk, node, operands):
    value = operands[0]
    if not isinstance(value, Integers) or len(value.shape) != 1 or attribute(node, "noop_with_empty_axes", 0):
        return None
    whole = product(value.entries)
    if not _fits(whole):
        return None
    result = np.array(whole, dtype=object)
    return Integers.of(result.reshape((1,)) if attribute(node, "keepdims", 1) else result)
