"""From a rewritten graph back to the tensors of the checkpoint it was captured from.

A checkpoint can hold a rewritten network where the graph is the one that the architecture makes, with other numbers in
it. So the two graphs are walked side by side from their outputs; wherever the architecture reads a constant, the
rewritten graph must read one too, and that is its *image*. A capture knows every constant as an expression over stored
tensors (`bind.py`), which is then solved for the tensor:

    constant = f(tensor),   image = f(tensor′)   ⟹   tensor′ = f⁻¹(image)

What a pass dropped because it did nothing any more has an image too: a bias or β that is gone was 0, a scale that is
gone was 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from rewrite.errors import RequestError
from rewrite.ir.constants import is_constant
from rewrite.ir.edit import attribute_of, constant_of, is_operator
from rewrite.ir.weights import (
    Add,
    Concat,
    Constant,
    MaterializedTensor,
    Region,
    Reshape,
    Scale,
    Slice,
    Source,
    Stack,
    Transpose,
    Weight,
    row_blocks,
    weight_of,
    whole,
)

Name = Callable[[ir.TensorProtocol], str | None]
"""The name under which a checkpoint holds a stored tensor; None for a tensor that is in no checkpoint."""


def images(original: ir.Model, rewritten: ir.Model, name: Name) -> dict[str, Weight]:
    """The new content of every tensor of the checkpoint that `rewritten` changes, by its name there.

    `original` is the architecture's graph in canonical form, bound to the checkpoint.

    Raises:
        RequestError: the architecture has no place for something; `what` says for what, `where` at which node.
        Untied: one tensor would have to be two, since the network has tied what the rewritten one keeps apart.
    """
    pairing = _Pairing(name)
    pairs = [(a, b) for a, b in zip(original.graph.outputs, rewritten.graph.outputs)]
    seen: set[tuple[int, int]] = set()
    while pairs:
        a, b = pairs.pop()
        if (id(a), id(b)) not in seen:
            seen.add((id(a), id(b)))
            pairs += pairing.operands(a, b)
    return {tensor: kept[0].weight for tensor, kept in pairing.kept.items() if kept and not kept[0].same}


class Untied(Exception):
    """`tensor` has two images."""

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        super().__init__(tensor)


def refused(reason: str, node: ir.Node | None, graph: str = "") -> RequestError:
    """The one line that says why there is no such checkpoint."""
    where = f"{graph}{node.op_type} {node.name or node.outputs[0].name}" if node is not None else graph
    return RequestError(
        f"the rewritten network is no checkpoint of the same architecture: {reason}",
        where=where.strip(),
        remedy="convert with --to onnx, or with --pass choose passes that only change weights",
    )


@dataclass(frozen=True)
class _Image:
    weight: Weight
    same: bool
    """Whether it is the tensor as it is stored."""


@dataclass
class _Pairing:
    name: Name
    kept: dict[str, list[_Image]] = field(default_factory=dict)

    def operands(self, a: ir.Value, b: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
        """The pairs that must mean the same so that `b` is `a` with other constants; constants are recorded."""
        if (held := expression(a)) is not None:
            found = expression(b)
            if found is None:
                raise refused(f"{a.name} is a constant there, and is computed here", b.producer())
            self.record(held, found, a)
            return []
        here, there = a.producer(), b.producer()
        if here is None or there is None:
            if here is there and a.name == b.name:
                return []
            return self.without(a, here, b, there)
        if not alike(here, there):
            return self.without(a, here, b, there)
        if here.outputs.index(a) != there.outputs.index(b):
            raise refused(f"it reads another output of {here.op_type}", there)
        return self.aligned(here, there)

    def aligned(self, here: ir.Node, there: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
        """Operand by operand of two nodes that do the same."""
        ours, theirs = list(here.inputs), list(there.inputs)
        if here.op_type in _COMMUTATIVE and len(theirs) == 2:
            if [expression(value) is None for value in ours] == [expression(value) is not None for value in theirs]:
                theirs.reverse()
        pairs: list[tuple[ir.Value, ir.Value]] = []
        for place in range(max(len(ours), len(theirs))):
            one = ours[place] if place < len(ours) else None
            other = theirs[place] if place < len(theirs) else None
            if one is not None and other is not None:
                pairs.append((one, other))
            elif one is not None:
                if (held := expression(one)) is None or (here.op_type, place) not in _ADDED:
                    raise refused(f"its operand {one.name} is gone", there)
                self.record(held, Constant(np.zeros(held.shape)), one)
            elif other is not None:
                raise refused("it needs a bias that the architecture has not", there)
        return pairs

    def without(
        self, a: ir.Value, here: ir.Node | None, b: ir.Value, there: ir.Node | None
    ) -> list[tuple[ir.Value, ir.Value]]:
        """`here` has no partner: it must do nothing, with the right constant in it."""
        neutral = _neutral(here)
        if here is None or neutral is None:
            raise refused(*_unfit(here, there, a))
        constant, number = neutral
        held, rest = expression(here.inputs[constant]), here.inputs[1 - constant]
        if held is None or rest is None or not _is_stored(held):
            raise refused(f"{here.op_type} by {here.inputs[constant].name} is no weight of it, and is gone", here)  # type: ignore[union-attr]
        self.record(held, Constant(np.full(held.shape, number)), here.inputs[constant])
        return [(rest, b)]

    def record(self, held: Weight, image: Weight, value: ir.Value | None) -> None:
        """Solve `held`(tensors) = `image` for the tensors."""
        label = value.name if value is not None else ""
        if same(held, image):
            for tensor in stored_in(held):
                self.keep(tensor, Source(tensor))
            return
        if held.shape != image.shape:
            shape = f"{list(held.shape)} there and {list(image.shape)} here"
            raise refused(f"{label} has the shape {shape}", None)
        if not _is_stored(held):
            if not _equal(held, image, None):
                raise refused(f"{label} is a number of the architecture, and another one here", None)
            return
        try:
            for tensor, solved in solve(held, image):
                self.keep(tensor, solved)
        except NotImplementedError as error:
            if not _equal(held, image, None):
                raise refused(
                    f"{label} is made from the checkpoint by {error}, which is not undone here", None
                ) from error
            for tensor in stored_in(held):
                self.keep(tensor, Source(tensor))

    def keep(self, tensor: ir.TensorProtocol, solved: Weight) -> None:
        name = self.name(tensor)
        if name is None:
            raise refused(f"{tensor.name} is no tensor of the checkpoint", None)
        same = isinstance(solved, Source) and _same_place(solved.tensor, tensor)
        known = self.kept.setdefault(name, [])
        if not known:
            known.append(_Image(solved, same or _equal(Source(tensor), solved, tensor.dtype)))
        elif not (same and known[0].same) and not _equal(known[0].weight, solved, tensor.dtype):
            raise Untied(name)


_COMMUTATIVE = ("Add", "Mul")
_ADDED = {("LayerNormalization", 2), ("Conv", 2), ("ConvTranspose", 2), ("Gemm", 2), ("GroupNormalization", 2)}
"""Operands that are added and may be left out."""


def expression(value: ir.Value | None) -> Weight | None:
    """What a value always holds, through transposes of it; None where it is computed."""
    node = value.producer() if value is not None else None
    if is_operator(node, "Transpose") and (inner := expression(node.inputs[0])) is not None:
        backwards = tuple(reversed(range(len(inner.shape))))
        return transposed(inner, tuple(attribute_of(node, "perm", backwards)))
    tensor = constant_of(value) if is_constant(value) else None
    return None if tensor is None else weight_of(tensor)


# ── Nodes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def alike(here: ir.Node, there: ir.Node) -> bool:
    """Whether two nodes do the same with their operands (and both, or neither, with a constant one)."""
    if (here.op_type, here.domain, here.overload) != (there.op_type, there.domain, there.overload):
        return False
    if here.op_type in _COMMUTATIVE and any(map(expression, here.inputs)) != any(map(expression, there.inputs)):
        return False
    return len(here.outputs) == len(there.outputs) and _attributes(here) == _attributes(there)


def _attributes(node: ir.Node) -> dict[str, object]:
    """All attributes in comparable form, those that are left out with their defaults."""
    found: dict[str, object] = {}
    if node.domain == "" and onnx.defs.has(node.op_type):
        schema = onnx.defs.get_schema(node.op_type)
        for name, declared in schema.attributes.items():
            if declared.default_value.type:
                found[name] = _plain(ir.from_proto(declared.default_value))
    return found | {name: _plain(attribute) for name, attribute in node.attributes.items()}


def _plain(attribute: ir.Attr) -> object:
    if attribute.type == ir.AttributeType.FLOAT:
        return float(np.float32(attribute.as_float()))
    if attribute.type in (ir.AttributeType.INT, ir.AttributeType.STRING):
        return attribute.value
    if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
        return tuple(attribute.value)
    return ir.to_proto(attribute).SerializeToString(deterministic=True)


def _neutral(node: ir.Node | None) -> tuple[int, float] | None:
    """The place of a constant operand, and the number in it with which `node` does nothing; None for other nodes."""
    if node is None or not is_operator(node, "Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
        return None
    number = 0.0 if node.op_type in ("Add", "Sub") else 1.0
    for place in (1, 0) if node.op_type in _COMMUTATIVE else (1,):
        held, other = expression(node.inputs[place]), node.inputs[1 - place]
        if held is not None and other is not None and expression(other) is None:
            return place, number
    return None


def _unfit(here: ir.Node | None, there: ir.Node | None, value: ir.Value) -> tuple[str, ir.Node | None]:
    """What the rewritten graph has in another way than the architecture."""
    if there is None:
        return f"{value.name} is gone", None
    for kind, operators in (("bias", ("Add", "Sub")), ("scale", ("Mul", "Div"))):
        if is_operator(there, *operators) and any(map(expression, there.inputs)):
            has = "" if here is None else f"; the architecture has {here.op_type} {here.name or ''}".rstrip() + " there"
            return f"it needs a {kind} that the architecture has not{has}", there
    wanted = f"has {here.op_type} {here.name or ''}".rstrip() if here is not None else f"reads {value.name}"
    same = here is not None and here.op_type == there.op_type
    return (f"{there.op_type} has other attributes" if same else f"the architecture {wanted} there"), there


# ── Expressions over the checkpoint ─────────────────────────────────────────────────────────────────────────────────


def stored_in(weight: Weight) -> Iterator[ir.TensorProtocol]:
    """The tensors on disk that an expression reads."""
    if isinstance(weight, Source):
        if isinstance(weight.tensor, MaterializedTensor):
            yield from stored_in(weight.tensor.weight)
        elif isinstance(weight.tensor, ir.ExternalTensor):
            yield weight.tensor
        return
    for part in _parts(weight):
        yield from stored_in(part)


def _is_stored(weight: Weight) -> bool:
    return next(stored_in(weight), None) is not None


def _parts(weight: Weight) -> Iterator[Weight]:
    for content in vars(weight).values():
        for part in content if isinstance(content, tuple) else (content,):
            if isinstance(part, Weight):
                yield part


def solve(held: Weight, image: Weight) -> Iterator[tuple[ir.TensorProtocol, Weight]]:
    """Every stored tensor t of `held` with the t′ for which held(t′) = `image`.

    Raises NotImplementedError, with the name of the step, for an expression that is not undone.
    """
    if isinstance(held, Source):
        if isinstance(held.tensor, MaterializedTensor):
            yield from solve(held.tensor.weight, image)
        else:
            yield held.tensor, image
    elif isinstance(held, Transpose):
        back = tuple(int(axis) for axis in np.argsort(held.permutation))
        yield from solve(held.inner, transposed(image, back))
    elif isinstance(held, Reshape):
        yield from solve(held.inner, _reshaped(image, held.inner.shape))
    elif isinstance(held, Concat):
        start = 0
        for part in held.parts:
            region = list(whole(held.shape))
            region[held.axis] = slice(start, start := start + part.shape[held.axis])
            yield from solve(part, _sliced(image, tuple(region)))
    elif isinstance(held, Stack):
        for place, part in enumerate(held.parts):
            region = (slice(place, place + 1), *whole(part.shape))
            yield from solve(part, _reshaped(_sliced(image, region), part.shape))
    elif isinstance(held, Add) and len(own := [part for part in held.parts if _is_stored(part)]) == 1:
        others = [Scale(part, Constant(np.array(-1.0))) for part in held.parts if part is not own[0]]
        yield from solve(own[0], Add((image, *others)))
    elif isinstance(held, Scale) and not _is_stored(held.factor) and held.factor.numpy().all():
        yield from solve(held.inner, Scale(image, Constant(1.0 / held.factor.numpy()), held.axis))
    else:
        raise NotImplementedError(type(held).__name__)


def transposed(inner: Weight, permutation: tuple[int, ...]) -> Weight:
    """A transpose, of which two that undo each other are none."""
    if isinstance(inner, Transpose):
        permutation = tuple(inner.permutation[axis] for axis in permutation)
        inner = inner.inner
    return inner if permutation == tuple(range(len(permutation))) else Transpose(inner, permutation)


def _sliced(inner: Weight, region: Region) -> Weight:
    """A slice; one that is a part of a concatenation is that part."""
    if region == whole(inner.shape):
        return inner
    if isinstance(inner, Concat):
        start, wanted = 0, region[inner.axis]
        for part in inner.parts:
            stop = start + part.shape[inner.axis]
            if start <= wanted.start and wanted.stop <= stop:
                moved = slice(wanted.start - start, wanted.stop - start)
                return _sliced(part, (*region[: inner.axis], moved, *region[inner.axis + 1 :]))
            start = stop
    if isinstance(inner, Stack) and region[0].stop - region[0].start == 1:
        return _reshaped(_sliced(inner.parts[region[0].start], region[1:]), tuple(r.stop - r.start for r in region))
    return Slice(inner, region)


def _reshaped(inner: Weight, shape: tuple[int, ...]) -> Weight:
    if isinstance(inner, Reshape):
        inner = inner.inner
    return inner if inner.shape == shape else Reshape(inner, shape)


def same(a: object, b: object) -> bool:
    """Whether two expressions are the same one over the same bytes."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Source) and isinstance(b, Source):
        one, other = a.tensor, b.tensor
        if isinstance(one, MaterializedTensor) and isinstance(other, MaterializedTensor):
            return one.dtype == other.dtype and same(one.weight, other.weight)
        return one is other or _same_place(one, other)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and bool((a == b).all())
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Weight) and isinstance(b, Weight):
        return all(same(value, vars(b).get(key)) for key, value in vars(a).items() if key != "shape")
    return a == b


def _same_place(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    if a is b:
        return True
    if not isinstance(a, ir.ExternalTensor) or not isinstance(b, ir.ExternalTensor):
        return False
    return (a.path, a.offset, a.dtype, a.shape) == (b.path, b.offset, b.dtype, b.shape)


def same_bytes(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Whether two stored tensors have one type, one shape and the same numbers."""
    return a.dtype == b.dtype and _equal(Source(a), Source(b), None)


def _equal(a: Weight, b: Weight, dtype: ir.DataType | None) -> bool:
    """Whether two expressions have the same numbers, in `dtype` where one is given."""
    if same(a, b):
        return True
    if a.shape != b.shape:
        return False
    for region in row_blocks(a.shape):
        one, other = a.read(region), b.read(region)
        if dtype is not None:
            one, other = one.astype(dtype.numpy()), other.astype(dtype.numpy())
        if not np.array_equal(one, other):
            return False
    return True
