"""Where one axis of a value goes through an operator, and what the operator does along it.

Every operator is described by its *threads*. A thread ties an axis of some operands to an axis of some results: the
two are one axis, seen before and after. Its `Role` says how the operator acts along that axis, which is all a change
of basis needs to know (`rewrite.basis.transforms` says which class of transform commutes with which role):

    Y = MatMul(A, W)    rows         A[..., i, :]  ~  Y[..., i, :]         LINEAR
                        columns      W[:, j]       ~  Y[..., j]            LINEAR
                        contracted   A[..., k]     ~  W[k, :]              CONTRACT
    Y = Add(x, b)       channels     x[..., c]     ~  b[c]  ~  Y[..., c]   SUM

An axis that no thread passes through is OPAQUE there, and so is every axis of an operator that is not listed. Shapes
are those written on the values; where a missing or symbolic size leaves a thread undecided it is OPAQUE too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import onnx_ir as ir

from rewrite.ir.constants import integers, is_constant, uniform
from rewrite.ir.edit import shape_of

Port = tuple[int, int]
"""Which operand (or result) of a node, and which of its axes, counted from 0."""

Size = int | str | None
"""A static size, a symbolic one (a product of names is written `a*b`), or unknown."""

Shape = tuple[Size, ...]


class Role(Enum):
    """How an operator f acts along a thread; x and y have their channels there, T acts on the channels."""

    MOVE = "moves or averages the channels as they are"  # f(xT + c) = f(x)T + c
    SUM = "adds channel by channel"  # f(xT, yT) = f(x, y)T
    LINEAR = "is one linear map on every channel"  # f(xT) = f(x)T
    SCALE = "multiplies all channels of a row by one number"  # f(xT) = f(x)T; the number is outside the thread
    CHANNEL_SCALE = "multiplies every channel by its own constant"  # f(x) = xD; the constants are outside the thread
    HOMOGENEOUS = "is positively homogeneous, channel by channel"  # f(ax) = a·f(x) for a > 0
    CHANNELWISE = "acts on each channel by itself"  # f(xΠ) = f(x)Π for a permutation Π
    CONTRACT = "sums over the axis"
    NORM = "normalizes over the axis"
    OPAQUE = "does not keep the axis"


@dataclass(frozen=True)
class Thread:
    """One axis through one operator: its role, the ports it connects, and a reason where the role needs one."""

    role: Role
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    reason: str = ""


def follow(node: ir.Node, position: int, axis: int, *, result: bool = False) -> Thread:
    """The thread through axis `axis` of operand `position` of `node`, or of result `position`."""
    describe = OPERATORS.get(node.op_type) if node.domain == "" else None
    if describe is None:
        return Thread(Role.OPAQUE, (), (), f"nothing is known of {node.op_type} along an axis")
    try:
        for thread in describe(node):
            if (position, axis) in (thread.outputs if result else thread.inputs):
                return thread
    except _UnknownShape as unknown:
        return Thread(Role.OPAQUE, (), (), f"the shape of {unknown} is unknown")
    return Thread(Role.OPAQUE, (), (), f"{node.op_type} does not keep the axis")


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Operand `index` of a node, or None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


class _UnknownShape(Exception):
    """A description needs the shape of the value named, and it is not written there."""


def _shape(value: ir.Value | None) -> Shape:
    shape = shape_of(value)
    if shape is None:
        raise _UnknownShape("an operand that is left out" if value is None else value.name)
    return shape


def _axis(node: ir.Node, default: int, rank: int) -> int:
    axis = node.attributes.get_int("axis", default)
    return axis + rank if axis < 0 else axis


def _others(rank: int, *excluded: int) -> Iterator[int]:
    return (axis for axis in range(rank) if axis not in excluded)


def _results(node: ir.Node, axis: int) -> tuple[Port, ...]:
    return tuple((position, axis) for position in range(len(node.outputs)))


# ------------------------------------------------------------------------------------------------------------- layout


def _identity(node: ir.Node) -> Iterator[Thread]:
    for axis in range(len(_shape(node.inputs[0]))):
        yield Thread(Role.MOVE, ((0, axis),), ((0, axis),))


def _cast(node: ir.Node) -> Iterator[Thread]:
    """A cast between floating-point types is the identity over the reals."""
    values = (node.inputs[0], node.outputs[0])
    if all(value is not None and value.dtype is not None and value.dtype.is_floating_point() for value in values):
        yield from _identity(node)


def _dropout(node: ir.Node) -> Iterator[Thread]:
    training = operand(node, 2)
    if training is not None and uniform(training) != 0.0:
        for axis in range(len(_shape(node.inputs[0]))):
            yield Thread(Role.OPAQUE, ((0, axis),), ((0, axis),), "Dropout may be in training mode")
    else:
        yield from _identity(node)


def _transpose(node: ir.Node) -> Iterator[Thread]:
    rank = len(_shape(node.inputs[0]))
    permutation = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
    for after, before in enumerate(permutation):
        yield Thread(Role.MOVE, ((0, before),), ((0, after),))


def _reshape(node: ir.Node) -> Iterator[Thread]:
    """An axis survives where it has the same size and the same number of elements behind it, before and after."""
    before, after = _shape(node.inputs[0]), _shape(node.outputs[0])
    places: dict[tuple[Size, object], int] = {
        (size, volume(after[axis + 1 :])): axis for axis, size in enumerate(after) if size not in (1, None)
    }
    surviving: set[int] = set()
    for axis, size in enumerate(before):
        behind = volume(before[axis + 1 :])
        place = places.get((size, behind)) if behind is not None else None
        if place is not None:
            surviving.add(place)
            yield Thread(Role.MOVE, ((0, axis),), ((0, place),))
        else:
            reason = f"axis {axis} of {_text(before)} does not survive {node.op_type} to {_text(after)}"
            yield Thread(Role.OPAQUE, ((0, axis),), (), reason)
    for axis in _others(len(after), *surviving):
        reason = f"axis {axis} of {_text(after)} is no axis of {_text(before)} before {node.op_type}"
        yield Thread(Role.OPAQUE, (), ((0, axis),), reason)


def volume(sizes: Shape) -> tuple[int, frozenset[tuple[str, int]]] | None:
    """The product of `sizes`: an integer and a multiset of names; None where a size is unknown.

    >>> volume((2, "batch", 3)) == volume(("batch", 6))
    True
    """
    number, names = 1, Counter[str]()
    for size in sizes:
        if size is None:
            return None
        # `a*b + 1` is one unknown number, not a product.
        for factor in str(size).split("*") if _PRODUCT.fullmatch(str(size)) else (str(size),):
            if factor.strip().isdigit():
                number *= int(factor)
            else:
                names[factor.strip()] += 1
    return number, frozenset(names.items())


_PRODUCT = re.compile(r"\w+( *\* *\w+)*")


def _text(shape: Shape) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _squeeze(node: ir.Node) -> Iterator[Thread]:
    before, after = _shape(node.inputs[0]), _shape(node.outputs[0])
    given = integers(operand(node, 1))
    if given is not None:
        removed = {axis % len(before) for axis in given}
        kept = [axis for axis in range(len(before)) if axis not in removed]
        if len(kept) == len(after):
            for place, axis in enumerate(kept):
                yield Thread(Role.MOVE, ((0, axis),), ((0, place),))


def _unsqueeze(node: ir.Node) -> Iterator[Thread]:
    before, after = _shape(node.inputs[0]), _shape(node.outputs[0])
    given = integers(operand(node, 1))
    if given is not None:
        added = {axis % len(after) for axis in given}
        kept = [axis for axis in range(len(after)) if axis not in added]
        if len(kept) == len(before):
            for axis, place in enumerate(kept):
                yield Thread(Role.MOVE, ((0, axis),), ((0, place),))


def _expand(node: ir.Node) -> Iterator[Thread]:
    before, after = _shape(node.inputs[0]), _shape(node.outputs[0])
    shift = len(after) - len(before)
    for axis, size in enumerate(before):
        if size == after[axis + shift] and size is not None:
            yield Thread(Role.MOVE, ((0, axis),), ((0, axis + shift),))
        else:
            yield Thread(Role.OPAQUE, ((0, axis),), ((0, axis + shift),), "Expand repeats one number over the axis")


def _slice(node: ir.Node) -> Iterator[Thread]:
    rank = len(_shape(node.inputs[0]))
    starts, given = integers(operand(node, 1)), integers(operand(node, 3))
    if operand(node, 3) is None and starts is not None:
        given = tuple(range(len(starts)))
    if given is None:
        return
    cut = {axis % rank for axis in given}
    for axis in range(rank):
        if axis in cut and _shape(node.inputs[0])[axis] != _shape(node.outputs[0])[axis]:
            yield Thread(Role.OPAQUE, ((0, axis),), ((0, axis),), "Slice takes some channels")
        elif axis not in cut:
            yield Thread(Role.MOVE, ((0, axis),), ((0, axis),))


def _split(node: ir.Node) -> Iterator[Thread]:
    rank = len(_shape(node.inputs[0]))
    divided = _axis(node, 0, rank)
    yield Thread(Role.OPAQUE, ((0, divided),), _results(node, divided), "Split parts the channels")
    for axis in _others(rank, divided):
        yield Thread(Role.MOVE, ((0, axis),), _results(node, axis))


def _concat(node: ir.Node) -> Iterator[Thread]:
    rank = len(_shape(node.outputs[0]))
    joined = _axis(node, 0, rank)
    for axis in range(rank):
        inputs = tuple((position, axis) for position in range(len(node.inputs)))
        if axis == joined:
            yield Thread(Role.OPAQUE, inputs, ((0, axis),), "Concat joins channels of several values")
        else:
            yield Thread(Role.MOVE, inputs, ((0, axis),))


def _gather(node: ir.Node) -> Iterator[Thread]:
    data, indices = _shape(node.inputs[0]), _shape(operand(node, 1))
    chosen = _axis(node, 0, len(data))
    yield Thread(Role.OPAQUE, ((0, chosen),), (), "Gather picks some channels")
    for axis in _others(len(data), chosen):
        place = axis if axis < chosen else axis - 1 + len(indices)
        yield Thread(Role.MOVE, ((0, axis),), ((0, place),))


def _gather_nd(node: ir.Node) -> Iterator[Thread]:
    """Whole rows are picked where the last axes of the data are not indexed."""
    data, indices = _shape(node.inputs[0]), _shape(operand(node, 1))
    if not indices or not isinstance(indices[-1], int):
        return
    first = node.attributes.get_int("batch_dims", 0) + indices[-1]
    for axis in range(len(data)):
        if axis < first:
            yield Thread(Role.OPAQUE, ((0, axis),), (), "GatherND picks single channels")
        else:
            yield Thread(Role.MOVE, ((0, axis),), ((0, axis - first + len(indices) - 1),))


def _pad(node: ir.Node) -> Iterator[Thread]:
    """Zeros in new rows are zero in every basis; reflected rows are rows. A shift meets zeros, so it is no MOVE."""
    rank = len(_shape(node.inputs[0]))
    amounts, given, filling = integers(operand(node, 1)), integers(operand(node, 3)), operand(node, 2)
    if amounts is None or (operand(node, 3) is not None and given is None):
        return
    axes = range(rank) if given is None else [axis % rank for axis in given]
    padded = {axis for place, axis in enumerate(axes) if amounts[place] or amounts[place + len(amounts) // 2]}
    constant = node.attributes.get_string("mode", "constant") == "constant"
    for axis in range(rank):
        if axis in padded:
            yield Thread(Role.OPAQUE, ((0, axis),), ((0, axis),), "Pad adds channels")
        elif not constant or filling is None or uniform(filling) == 0.0:
            yield Thread(Role.LINEAR, ((0, axis),), ((0, axis),))
        else:
            yield Thread(Role.OPAQUE, ((0, axis),), ((0, axis),), "Pad fills rows with a number that is not zero")


def _zeros(node: ir.Node) -> Iterator[Thread]:
    """ConstantOfShape of zeros, which are zero in every basis."""
    value = node.attributes.get("value")
    if value is None or not value.as_tensor().numpy().any():
        for axis in range(len(_shape(node.outputs[0]))):
            yield Thread(Role.LINEAR, (), ((0, axis),))


# --------------------------------------------------------------------------------------------------------- arithmetic


def _aligned(node: ir.Node, axis: int, positions: range | None = None) -> tuple[list[Port], list[int]] | None:
    """Operands that run along the result's axis `axis`, and positions of those that are constant along it.

    None where a size is not static: a symbolic 1 may broadcast.
    """
    after = _shape(node.outputs[0])
    along: list[Port] = []
    broadcast: list[int] = []
    for position in positions or range(len(node.inputs)):
        before = _shape(node.inputs[position])
        place = axis - (len(after) - len(before))
        size = before[place] if place >= 0 else 1
        if not isinstance(size, int) or not isinstance(after[axis], int):
            return None
        if size == after[axis]:
            along.append((position, place))
        else:
            broadcast.append(position)
    return along, broadcast


def _sum(node: ir.Node) -> Iterator[Thread]:
    for axis in range(len(_shape(node.outputs[0]))):
        aligned = _aligned(node, axis)
        if aligned is None:
            continue
        along, broadcast = aligned
        if all(uniform(node.inputs[position]) == 0.0 for position in broadcast):
            yield Thread(Role.SUM, tuple(along), ((0, axis),))
        else:
            reason = f"{node.op_type} adds one number to all channels of a row"
            yield Thread(Role.OPAQUE, tuple(along), ((0, axis),), reason)


def _product(node: ir.Node) -> Iterator[Thread]:
    """Mul and Div; a quotient's denominator never carries a transform."""
    for axis in range(len(_shape(node.outputs[0]))):
        aligned = _aligned(node, axis)
        if aligned is None:
            continue
        along, _ = aligned
        changing = [port for port in along if not is_constant(node.inputs[port[0]])]
        inverted = node.op_type == "Div" and any(position == 1 for position, _ in changing)
        if len(along) == 1 and not inverted:
            yield Thread(Role.SCALE, tuple(along), ((0, axis),))
        elif len(changing) == 1 and not inverted:
            yield Thread(Role.CHANNEL_SCALE, tuple(changing), ((0, axis),))
        else:
            yield Thread(Role.CHANNELWISE, tuple(along), ((0, axis),))


def _negation(node: ir.Node) -> Iterator[Thread]:
    for axis in range(len(_shape(node.inputs[0]))):
        yield Thread(Role.SCALE, ((0, axis),), ((0, axis),))


def _where(node: ir.Node) -> Iterator[Thread]:
    for axis in range(len(_shape(node.outputs[0]))):
        aligned, choosing = _aligned(node, axis, range(1, 3)), _aligned(node, axis, range(0, 1))
        if aligned is None or choosing is None:
            continue
        along, broadcast = aligned
        if choosing[0]:
            yield Thread(Role.OPAQUE, tuple(along), ((0, axis),), "Where chooses channel by channel")
        elif all(uniform(node.inputs[position]) == 0.0 for position in broadcast):
            yield Thread(Role.SUM, tuple(along), ((0, axis),))
        else:
            yield Thread(Role.OPAQUE, tuple(along), ((0, axis),), "Where sets all channels of a row to one number")


def _pointwise(role: Role) -> Callable[[ir.Node], Iterator[Thread]]:
    def describe(node: ir.Node) -> Iterator[Thread]:
        for axis in range(len(_shape(node.outputs[0]))):
            aligned = _aligned(node, axis)
            if aligned is not None:
                yield Thread(role, tuple(aligned[0]), ((0, axis),), f"{node.op_type} {role.value}")

    return describe


def _matmul(node: ir.Node) -> Iterator[Thread]:
    left, right = len(_shape(node.inputs[0])), len(_shape(node.inputs[1]))
    rank = len(_shape(node.outputs[0]))
    if left < 2 or right < 2:
        return
    yield Thread(Role.LINEAR, ((0, left - 2),), ((0, rank - 2),))
    yield Thread(Role.LINEAR, ((1, right - 1),), ((0, rank - 1),))
    yield Thread(Role.CONTRACT, ((0, left - 1), (1, right - 2)), ())


def _convolution(node: ir.Node) -> Iterator[Thread]:
    """Channels only; a kernel or a bias that is shared by all batches lets no transform of the batch axis through."""
    group = node.attributes.get_int("group", 1)
    made = 1 if node.op_type == "ConvTranspose" else 0
    bias = ((2, 0),) if operand(node, 2) is not None else ()
    if group == 1:
        yield Thread(Role.LINEAR, ((1, made), *bias), ((0, 1),))
        yield Thread(Role.CONTRACT, ((0, 1), (1, 1 - made)), ())
    else:
        yield Thread(Role.OPAQUE, ((0, 1),), ((0, 1),), f"{node.op_type} has {group} groups of channels")


def _reduction(role: Role) -> Callable[[ir.Node], Iterator[Thread]]:
    """A reduction keeps the axes it does not reduce; `role` is how it acts on them."""

    def describe(node: ir.Node) -> Iterator[Thread]:
        rank = len(_shape(node.inputs[0]))
        given = integers(operand(node, 1))
        if operand(node, 1) is not None and given is None:
            return
        reduced = {axis % rank for axis in given or range(rank)}
        if not given and node.attributes.get_int("noop_with_empty_axes", 0):
            reduced.clear()
        keep = bool(node.attributes.get_int("keepdims", 1))
        for axis in range(rank):
            if axis in reduced:
                yield Thread(Role.OPAQUE, ((0, axis),), ((0, axis),) if keep else (), f"{node.op_type} sums it up")
            else:
                place = axis if keep else axis - sum(other < axis for other in reduced)
                yield Thread(role, ((0, axis),), ((0, place),))

    return describe


def _pooling(role: Role) -> Callable[[ir.Node], Iterator[Thread]]:
    def describe(node: ir.Node) -> Iterator[Thread]:
        if len(node.outputs) == 1:
            yield Thread(role, ((0, 1),), ((0, 1),))

    return describe


def _norm(node: ir.Node) -> Iterator[Thread]:
    """A norm over the last axis alone. Over several axes it is another operator, and its axes are OPAQUE."""
    rank = len(_shape(node.inputs[0]))
    first = _axis(node, -1, rank)
    parameters = tuple((position, 0) for position in range(1, len(node.inputs)) if node.inputs[position] is not None)
    if first == rank - 1:
        yield Thread(Role.NORM, ((0, first), *parameters), ((0, first),))
    else:
        for axis in range(first, rank):
            reason = f"{node.op_type} normalizes over the {rank - first} last axes together"
            yield Thread(Role.OPAQUE, ((0, axis),), ((0, axis),), reason)
    for axis in range(first):
        yield Thread(Role.CHANNELWISE, ((0, axis),), ((0, axis),))


def _softmax(node: ir.Node) -> Iterator[Thread]:
    rank = len(_shape(node.inputs[0]))
    for axis in range(rank):
        yield Thread(Role.CHANNELWISE, ((0, axis),), ((0, axis),))


def _attention(node: ir.Node) -> Iterator[Thread]:
    """Attention over four axes: the channels of V are the channels of the result; Q and K are contracted.

    With a cache, keys and values are results as well.
    """
    cached = len(node.outputs) > 1 or operand(node, 4) is not None or operand(node, 5) is not None
    if len(_shape(node.inputs[0])) == 4 and not cached:
        yield Thread(Role.LINEAR, ((2, 3),), ((0, 3),))
        yield Thread(Role.CONTRACT, ((0, 3), (1, 3)), ())


OPERATORS: dict[str, Callable[[ir.Node], Iterator[Thread]]] = {
    "Identity": _identity,
    "Cast": _cast,
    "CastLike": _cast,
    "Dropout": _dropout,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "ConstantOfShape": _zeros,
    "Add": _sum,
    "Sub": _sum,
    "Sum": _sum,
    "Mul": _product,
    "Div": _product,
    "Neg": _negation,
    "Where": _where,
    "MatMul": _matmul,
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "ReduceSum": _reduction(Role.LINEAR),
    "ReduceMean": _reduction(Role.MOVE),
    "ReduceMax": _reduction(Role.HOMOGENEOUS),
    "ReduceMin": _reduction(Role.HOMOGENEOUS),
    "AveragePool": _pooling(Role.LINEAR),
    "GlobalAveragePool": _pooling(Role.MOVE),
    "MaxPool": _pooling(Role.HOMOGENEOUS),
    "GlobalMaxPool": _pooling(Role.HOMOGENEOUS),
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
    "Softmax": _softmax,
    "Attention": _attention,
    **{name: _pointwise(Role.HOMOGENEOUS) for name in ("Relu", "LeakyRelu")},
    **{
        name: _pointwise(Role.CHANNELWISE)
        for name in (
            *("Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Log", "Max", "Min"),
            *("Mish", "Pow", "Reciprocal", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh"),
        )
    },
}
