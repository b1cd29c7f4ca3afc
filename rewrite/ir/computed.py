"""What operators compute of constants, as weight expressions: how a parametrized weight is written with its parameters.

`expression` makes the expression of one node. Like any weight it is read by regions in float64: a region asks for no
more of its operands than it needs, what is computed on the way lives as long as one read, and results that are as small
as a vector (norms, σ, means) are kept. Every definition is ONNX's, over the reals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from rewrite.ir.constants import VECTOR, integers
from rewrite.ir.edit import attribute_of, is_inference_dropout
from rewrite.ir.weights import Constant, Region, Weight, whole

SHORTEST_FLOAT = 16
"""Bits from which on a cast to a floating-point type rounds; one to fewer is a quantization, which is no constant."""


class Computed(Weight):
    """A function of `parts`. Subclasses say which regions of them a region needs, and what it then is."""

    parts: tuple[Weight, ...]

    def needed(self, region: Region) -> tuple[Region, ...]:
        """The region of every part that `region` of the result is computed from."""
        raise NotImplementedError

    def compute(self, operands: Sequence[np.ndarray], region: Region) -> np.ndarray:
        """`region` of the result, from what `needed` asked for."""
        raise NotImplementedError

    def read(self, region: Region) -> np.ndarray:
        with np.errstate(all="ignore"):
            return _read(self, region, {})

    @property
    def costly(self) -> bool:
        """Whether one entry may take as much as all of a large part that is computed itself."""
        return False

    @cached_property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        mixed = self.costly or any(part.mixed for part in self.parts)
        return frozenset(range(len(self.shape))) if mixed else frozenset()

    @cached_property
    def kept(self) -> np.ndarray:
        """All of it; for results that are as small as a vector."""
        return _computed(self, whole(self.shape), {})


_Read = dict[tuple[int, tuple[tuple[int, int], ...]], np.ndarray]
"""What one read has computed or read so far, by expression and region."""


def _read(weight: Weight, region: Region, known: _Read) -> np.ndarray:
    if not isinstance(weight, Computed):
        read = weight.read
    elif math.prod(weight.shape) <= VECTOR:
        return weight.kept[region]
    else:
        read = lambda taken: _computed(weight, taken, known)  # noqa: E731
    key = (id(weight), tuple((taken.start, taken.stop) for taken in region))
    if key not in known:
        known[key] = read(region)
    return known[key]


def _computed(weight: Computed, region: Region, known: _Read) -> np.ndarray:
    operands = [_read(part, taken, known) for part, taken in zip(weight.parts, weight.needed(region))]
    return weight.compute(operands, region)


def _broadcast(region: Region, shape: tuple[int, ...]) -> Region:
    """The region of an operand of `shape` that broadcasts to `region`."""
    return tuple(slice(0, 1) if size == 1 else taken for size, taken in zip(shape, region[len(region) - len(shape) :]))


@dataclass(frozen=True, eq=False)
class Elementwise(Computed):
    """`function` of the numbers that stand in one place of every part, which broadcast."""

    function: Callable[..., np.ndarray]
    parts: tuple[Weight, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return np.broadcast_shapes(*(part.shape for part in self.parts))

    def needed(self, region: Region) -> tuple[Region, ...]:
        return tuple(_broadcast(region, part.shape) for part in self.parts)

    def compute(self, operands: Sequence[np.ndarray], region: Region) -> np.ndarray:
        return np.broadcast_to(self.function(*operands), [taken.stop - taken.start for taken in region])


@dataclass(frozen=True, eq=False)
class Reduced(Computed):
    """`inner` reduced over `axes`, which stay with size 1."""

    function: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    inner: Weight
    axes: tuple[int, ...]

    @property
    def parts(self) -> tuple[Weight, ...]:  # type: ignore[override]
        return (self.inner,)

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(1 if axis in self.axes else size for axis, size in enumerate(self.inner.shape))

    def needed(self, region: Region) -> tuple[Region, ...]:
        sizes = self.inner.shape
        return (tuple(slice(0, sizes[axis]) if axis in self.axes else taken for axis, taken in enumerate(region)),)

    def compute(self, operands: Sequence[np.ndarray], region: Region) -> np.ndarray:
        return self.function(operands[0], self.axes)


@dataclass(frozen=True, eq=False)
class Contracted(Computed):
    """The product of matrices `left` (…, n, k) and `right` (…, k, m)."""

    left: Weight
    right: Weight

    @property
    def parts(self) -> tuple[Weight, ...]:  # type: ignore[override]
        return (self.left, self.right)

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        outer = np.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return (*outer, self.left.shape[-2], self.right.shape[-1])

    @property
    def costly(self) -> bool:
        return any(isinstance(part, Computed) and math.prod(part.shape) > VECTOR for part in self.parts)

    def needed(self, region: Region) -> tuple[Region, ...]:
        inner = slice(0, self.left.shape[-1])
        left = _broadcast((*region[:-2], region[-2], inner), self.left.shape)
        right = _broadcast((*region[:-2], inner, region[-1]), self.right.shape)
        # A matrix axis of size 1 is no broadcast one, and the region taken of it is all of it either way.
        return left, right

    def compute(self, operands: Sequence[np.ndarray], region: Region) -> np.ndarray:
        return operands[0] @ operands[1]


@dataclass(frozen=True, eq=False)
class Permuted(Computed):
    """`inner` with its axes permuted: axis i of the result is axis `permutation[i]` of it."""

    inner: Weight
    permutation: tuple[int, ...]

    @property
    def parts(self) -> tuple[Weight, ...]:  # type: ignore[override]
        return (self.inner,)

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.inner.shape[axis] for axis in self.permutation)

    def needed(self, region: Region) -> tuple[Region, ...]:
        taken = dict(zip(self.permutation, region))
        return (tuple(taken[axis] for axis in range(len(region))),)

    def compute(self, operands: Sequence[np.ndarray], region: Region) -> np.ndarray:
        return operands[0].transpose(self.permutation)


@dataclass(frozen=True, eq=False)
class Reshaped(Computed):
    """`inner` under another shape; rows are read as rows where the first axis stays."""

    inner: Weight
    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[Weight, ...]:  # type: ignore[override]
        return (self.inner,)

    @property
    def rows(self) -> bool:
        return bool(self.shape and self.inner.shape) and self.shape[0] == self.inner.shape[0]

    @property
    def costly(self) -> bool:
        return not self.rows and isinstance(self.inner, Computed) and math.prod(self.shape) > VECTOR

    def needed(self, region: Region) -> tuple[Region, ...]:
        every = whole(self.inner.shape)
        return ((region[0], *every[1:]) if self.rows else every,)

    def compute(self, operands: Sequence[np.ndarray], region: Region) -> np.ndarray:
        if self.rows:
            return operands[0].reshape(-1, *self.shape[1:])[(slice(None), *region[1:])]
        return operands[0].reshape(self.shape)[region]


@dataclass(frozen=True, eq=False)
class Sliced(Computed):
    """The hyper-rectangle `taken` of `inner`."""

    inner: Weight
    taken: Region

    @property
    def parts(self) -> tuple[Weight, ...]:  # type: ignore[override]
        return (self.inner,)

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(each.stop - each.start for each in self.taken)

    def needed(self, region: Region) -> tuple[Region, ...]:
        return (tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(self.taken, region)),)

    def compute(self, operands: Sequence[np.ndarray], region: Region) -> np.ndarray:
        return operands[0]


@dataclass(frozen=True, eq=False)
class Joined(Computed):
    """`parts` joined along `axis`; one that a region has nothing of is asked for no entries."""

    parts: tuple[Weight, ...]
    axis: int

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        first = self.parts[0].shape
        return (*first[: self.axis], sum(part.shape[self.axis] for part in self.parts), *first[self.axis + 1 :])

    def needed(self, region: Region) -> tuple[Region, ...]:
        taken, offset, regions = region[self.axis], 0, []
        for part in self.parts:
            size = part.shape[self.axis]
            start = min(max(taken.start - offset, 0), size)
            stop = max(min(taken.stop - offset, size), start)
            regions.append((*region[: self.axis], slice(start, stop), *region[self.axis + 1 :]))
            offset += size
        return tuple(regions)

    def compute(self, operands: Sequence[np.ndarray], region: Region) -> np.ndarray:
        return np.concatenate(operands, axis=self.axis)


@dataclass(frozen=True, eq=False)
class Gathered(Computed):
    """Entries of `inner` along `axis` by `indices` (not negative), whose axes take the place of that one."""

    inner: Weight
    indices: np.ndarray
    axis: int

    @property
    def parts(self) -> tuple[Weight, ...]:  # type: ignore[override]
        return (self.inner,)

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*self.inner.shape[: self.axis], *self.indices.shape, *self.inner.shape[self.axis + 1 :])

    def needed(self, region: Region) -> tuple[Region, ...]:
        behind = self.axis + self.indices.ndim
        return ((*region[: self.axis], slice(0, self.inner.shape[self.axis]), *region[behind:]),)

    def compute(self, operands: Sequence[np.ndarray], region: Region) -> np.ndarray:
        taken = self.indices[region[self.axis : self.axis + self.indices.ndim]]
        return np.take(operands[0], taken, axis=self.axis)


# ── The operators of weights ────────────────────────────────────────────────────────────────────────────────────────


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, 0.0)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def _total(*parts: np.ndarray) -> np.ndarray:
    return np.asarray(sum(parts[1:], parts[0]))


def _largest(*parts: np.ndarray) -> np.ndarray:
    return np.asarray(_folded(np.maximum, parts))


def _smallest(*parts: np.ndarray) -> np.ndarray:
    return np.asarray(_folded(np.minimum, parts))


def _folded(function: Callable[..., np.ndarray], parts: Iterable[np.ndarray]) -> np.ndarray:
    first, *rest = parts
    for part in rest:
        first = function(first, part)
    return first


def _chosen(condition: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    return np.where(condition != 0, yes, no)


ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    **{"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power},
    **{"Sum": _total, "Max": _largest, "Min": _smallest, "Where": _chosen},
    **{"Neg": np.negative, "Abs": np.abs, "Sqrt": np.sqrt, "Reciprocal": np.reciprocal, "Exp": np.exp, "Log": np.log},
    **{"Tanh": np.tanh, "Sigmoid": _sigmoid, "Softplus": _softplus},
}
"""No sine and no cosine: tables of positions are no weights, and stay as the rotary embeddings that read them."""

REDUCTIONS: dict[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]] = {
    "ReduceSum": lambda x, axes: x.sum(axis=axes, keepdims=True),
    "ReduceMean": lambda x, axes: x.mean(axis=axes, keepdims=True),
    "ReduceMax": lambda x, axes: x.max(axis=axes, keepdims=True),
    "ReduceMin": lambda x, axes: x.min(axis=axes, keepdims=True),
    "ReduceL1": lambda x, axes: np.abs(x).sum(axis=axes, keepdims=True),
    "ReduceL2": lambda x, axes: np.sqrt(np.square(x).sum(axis=axes, keepdims=True)),
    "ReduceSumSquare": lambda x, axes: np.square(x).sum(axis=axes, keepdims=True),
}

LAYOUTS = frozenset({"Identity", "Dropout", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators that keep every number and only say how they lie."""

MOVES = LAYOUTS | {
    *("Cast", "CastLike", "Slice", "Gather", "GatherND", "GatherElements", "Concat", "Split", "Expand", "Tile")
}
"""Operators that compute nothing: numbers are left out, copied or widened."""


def expression(node: ir.Node, operands: Sequence[Weight | None]) -> Weight | None:
    """What `node` computes of constant operands, over the reals; None where that is not known here.

    `operands` are those of the node; axes, shapes and bounds are read from constant integers. An operator is known only
    with one output in use, all others absent.
    """
    if node.domain not in ("", "ai.onnx") or not _alone(node) or not operands or operands[0] is None:
        return None
    given = tuple(operand for operand in operands if operand is not None)
    first = operands[0]
    rank = len(first.shape)
    match node.op_type:
        case kind if kind in ELEMENTWISE:
            return Elementwise(ELEMENTWISE[kind], given) if len(given) == len(operands) else None
        case kind if kind in REDUCTIONS:
            return _reduction(node, first)
        case "Identity":
            return first
        case "Dropout":
            return first if is_inference_dropout(node) else None
        case "Cast":
            to = ir.DataType(attribute_of(node, "to", 0))
            return first if to.is_floating_point() and to.bitwidth >= SHORTEST_FLOAT else None
        case "Clip":
            return _clipped(node, operands)
        case "MatMul":
            return None if operands[1] is None else _product(first, operands[1])
        case "Gemm":
            return _gemm(node, operands)
        case "BatchNormalization":
            return None if attribute_of(node, "training_mode", 0) else _normalized(node, given)
        case "Transpose":
            return Permuted(first, tuple(attribute_of(node, "perm", tuple(reversed(range(rank))))))
        case "Concat":
            return Joined(given, attribute_of(node, "axis", 0) % rank) if len(given) == len(operands) else None
        case "Slice":
            return _sliced(node, first)
        case "Gather":
            return _gathered(node, first)
        case "ConstantOfShape":
            return _filled(node)
        case "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Expand":
            return _laid_out(node, first)
        case _:
            return None


def _alone(node: ir.Node) -> bool:
    """Whether nothing but the first output is there."""
    return not any(output.name or output.uses() for output in node.outputs[1:])


def _reduction(node: ir.Node, inner: Weight) -> Weight | None:
    rank, axes = len(inner.shape), _integers(node, 1, "axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        return None
    if not axes:
        if attribute_of(node, "noop_with_empty_axes", 0):
            return None
        axes = tuple(range(rank))
    reduced = tuple(sorted({axis % rank for axis in axes})) if rank else ()
    result = Reduced(REDUCTIONS[node.op_type], inner, reduced)
    if attribute_of(node, "keepdims", 1):
        return result
    return Reshaped(result, tuple(size for axis, size in enumerate(inner.shape) if axis not in reduced))


def _integers(node: ir.Node, position: int, attribute: str) -> tuple[int, ...] | None:
    """The integers that a newer version of an operator takes as an input and an older one as an attribute."""
    if len(node.inputs) > position and node.inputs[position] is not None:
        return integers(node.inputs[position])
    written = attribute_of(node, attribute, None)
    return None if written is None else tuple(written)


def _clipped(node: ir.Node, operands: Sequence[Weight | None]) -> Weight | None:
    lower, upper = (operands[i] if len(operands) > i else None for i in (1, 2))
    lower = lower or _number(attribute_of(node, "min", None))
    upper = upper or _number(attribute_of(node, "max", None))
    result = operands[0]
    assert result is not None, "asked by the caller"
    if lower is not None:
        result = Elementwise(np.maximum, (result, lower))
    return result if upper is None else Elementwise(np.minimum, (result, upper))


def _number(value: float | None) -> Weight | None:
    return None if value is None else Constant(np.asarray(value, np.float64))


def _product(left: Weight, right: Weight) -> Weight | None:
    """MatMul: a vector on the left is a row, one on the right a column, and the axis goes again."""
    if not left.shape or not right.shape:
        return None
    row, column = len(left.shape) == 1, len(right.shape) == 1
    left = Reshaped(left, (1, *left.shape)) if row else left
    right = Reshaped(right, (*right.shape, 1)) if column else right
    if left.shape[-1] != right.shape[-2]:
        return None
    result = Contracted(left, right)
    if not (row or column):
        return result
    return Reshaped(
        result, (*result.shape[:-2], *(() if row else result.shape[-2:-1]), *(() if column else result.shape[-1:]))
    )


def _gemm(node: ir.Node, operands: Sequence[Weight | None]) -> Weight | None:
    left, right = operands[:2]
    bias = operands[2] if len(operands) > 2 else None
    if left is None or right is None:
        return None
    left = Permuted(left, (1, 0)) if attribute_of(node, "transA", 0) else left
    right = Permuted(right, (1, 0)) if attribute_of(node, "transB", 0) else right
    result: Weight = _times(Contracted(left, right), attribute_of(node, "alpha", 1.0))
    return result if bias is None else Elementwise(np.add, (result, _times(bias, attribute_of(node, "beta", 1.0))))


def _times(weight: Weight, factor: float) -> Weight:
    # The attribute is a float32 number, whatever precision it is held in here.
    number = Constant(np.asarray(np.float32(factor), np.float64))
    return weight if factor == 1.0 else Elementwise(np.multiply, (weight, number))


def _normalized(node: ir.Node, operands: Sequence[Weight]) -> Weight | None:
    """BatchNormalization of a weight: torch writes weight standardization with it."""
    if len(operands) != 5 or len(operands[0].shape) < 2:
        return None
    x, *vectors = operands
    shape = (-1, *(1,) * (len(x.shape) - 2))
    gamma, beta, mean, variance = (Reshaped(each, (each.shape[0], *shape[1:])) for each in vectors)
    epsilon = float(np.float32(attribute_of(node, "epsilon", 1e-5)))

    def normalize(x, gamma, beta, mean, variance):
        return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta

    return Elementwise(normalize, (x, gamma, beta, mean, variance))


def _sliced(node: ir.Node, inner: Weight) -> Weight | None:
    rank, region = len(inner.shape), list(whole(inner.shape))
    starts, ends, axes = (
        _integers(node, position, name) for position, name in ((1, "starts"), (2, "ends"), (3, "axes"))
    )
    steps = integers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    absent = len(node.inputs) < 4 or node.inputs[3] is None
    if starts is None or ends is None or (axes is None and not absent):
        return None
    if len(node.inputs) > 4 and node.inputs[4] is not None and (steps is None or any(step != 1 for step in steps)):
        return None
    for start, end, axis in zip(starts, ends, axes if axes is not None else range(rank)):
        first, last, _ = slice(start, end).indices(inner.shape[axis])
        region[axis % rank] = slice(first, max(first, last))
    return Sliced(inner, tuple(region))


def _filled(node: ir.Node) -> Weight | None:
    sizes, tensor = integers(node.inputs[0]), attribute_of(node, "value", None)
    if sizes is None:
        return None
    number = np.zeros(()) if tensor is None else tensor.numpy().astype(np.float64).reshape(())
    return Constant(np.broadcast_to(number, sizes))


def _gathered(node: ir.Node, inner: Weight) -> Weight | None:
    taken, axis = integers(node.inputs[1]), attribute_of(node, "axis", 0)
    shape = node.inputs[1].shape if node.inputs[1] is not None else None
    size = inner.shape[axis] if -len(inner.shape) <= axis < len(inner.shape) else 0
    if taken is None or shape is None or not all(-size <= index < size for index in taken):
        return None
    if not size:
        return None
    indices = np.asarray(taken, np.int64).reshape(tuple(shape.numpy())) % size
    return Gathered(inner, indices, axis % len(inner.shape))


def _laid_out(node: ir.Node, inner: Weight) -> Weight | None:
    shape, size = inner.shape, math.prod(inner.shape)
    match node.op_type:
        case "Flatten":
            axis = attribute_of(node, "axis", 1)
            axis = axis + len(shape) if axis < 0 else axis
            return Reshaped(inner, (math.prod(shape[:axis]), math.prod(shape[axis:])))
        case "Expand":
            sizes = integers(node.inputs[1])
            if sizes is None:
                return None
            zeros = Constant(np.broadcast_to(np.zeros(()), sizes))
            return Elementwise(lambda x, _: x, (inner, zeros))
        case "Reshape":
            sizes = integers(node.inputs[1])
            if sizes is None:
                return None
            if not attribute_of(node, "allowzero", 0):
                sizes = tuple(
                    shape[axis] if each == 0 and axis < len(shape) else each for axis, each in enumerate(sizes)
                )
            rest = math.prod(each for each in sizes if each != -1)
            sizes = tuple(size // max(rest, 1) if each == -1 else each for each in sizes)
        case "Squeeze":
            axes = _integers(node, 1, "axes")
            if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
                return None
            gone = (
                {axis % len(shape) for axis in axes} if axes is not None else {i for i, n in enumerate(shape) if n == 1}
            )
            sizes = tuple(each for axis, each in enumerate(shape) if axis not in gone)
        case _:
            axes = _integers(node, 1, "axes")
            if axes is None:
                return None
            new = {axis % (len(shape) + len(axes)) for axis in axes}
            old = iter(shape)
            sizes = tuple(1 if axis in new else next(old) for axis in range(len(shape) + len(axes)))
    return Reshaped(inner, sizes) if math.prod(sizes) == size else None


__all__ = ["LAYOUTS", "MOVES", "Computed", "expression"]
