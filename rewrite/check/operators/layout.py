"""Operators that only move, repeat or make values: shapes, slices, constants and sequences."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewrite.check.operators.registry import Call, Operand, dense, operator
from rewrite.ir import weights
from rewrite.ir.weights import Weight


@operator("Identity", lazy=True)
def identity(call: Call, x: Operand) -> Operand:
    return x


@operator("Dropout", lazy=True)
def dropout(call: Call, x: Operand, ratio: Operand = None, training: Operand = None):
    if training is not None and np.any(dense(training, call.precision)):
        raise call.unsupported("in training mode is random")
    if not call.wants(1):
        return x
    x = dense(x, call.precision)
    return x, np.ones(np.shape(x), bool)


@operator("Constant")
def constant(call: Call) -> np.ndarray:
    for name, dtype in (("value_int", np.int64), ("value_ints", np.int64)):
        if name in call.node.attributes:
            return np.asarray(call.attribute(name), dtype)
    for name in ("value_float", "value_floats"):
        if name in call.node.attributes:
            dtype = np.float64 if call.exact_attributes else np.float32
            return np.asarray(call.attribute(name), dtype).astype(call.precision)
    if "value" in call.node.attributes:
        return np.asarray(call.attribute("value").numpy())
    raise call.unsupported(f"with attributes {sorted(call.node.attributes)}")


@operator("ConstantOfShape")
def constant_of_shape(call: Call, shape: np.ndarray) -> np.ndarray:
    value = call.attribute("value")
    fill = np.zeros(1, np.float32) if value is None else np.asarray(value.numpy())
    return np.full(tuple(shape), fill.reshape(-1)[0], fill.dtype)


@operator("Shape", lazy=True)
def shape_of(call: Call, x: Operand) -> np.ndarray:
    shape = x.shape if isinstance(x, Weight) else np.shape(dense(x, call.precision))
    return np.array(shape[call.attribute("start", 0) : call.attribute("end", len(shape))], np.int64)


@operator("Size")
def size_of(call: Call, x: np.ndarray) -> np.ndarray:
    return np.array(x.size, np.int64)


@operator("Range")
def arange(call: Call, start: np.ndarray, limit: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """start + i·delta, each term rounded once."""
    start, limit, delta = start.reshape(()), limit.reshape(()), delta.reshape(())
    count = max(int(np.ceil((limit - start) / delta)), 0)
    return (start + np.arange(count) * delta).astype(start.dtype)


@operator("Reshape", lazy=True)
def reshape(call: Call, x: Operand, shape: Operand = None) -> Operand:
    target = call.attribute("shape") if shape is None else dense(shape, call.precision)
    source = x.shape if isinstance(x, Weight) else None
    if source is None:
        x = dense(x, call.precision)
        source = np.shape(x)
    sizes = [int(size) for size in target]
    if not call.attribute("allowzero", 0):
        sizes = [source[i] if size == 0 else size for i, size in enumerate(sizes)]
    if isinstance(x, Weight):
        if -1 in sizes:
            known = int(np.prod([size for size in sizes if size != -1]))
            sizes = [int(np.prod(source)) // known if size == -1 else size for size in sizes]
        return weights.Reshape(x, tuple(sizes))
    return x.reshape(sizes)


@operator("Transpose", lazy=True)
def transpose(call: Call, x: Operand) -> Operand:
    if not isinstance(x, Weight):
        return np.transpose(dense(x, call.precision), call.attribute("perm"))
    permutation = tuple(call.attribute("perm") or reversed(range(len(x.shape))))
    return weights.Transpose(x, permutation)


@operator("Flatten")
def flatten(call: Call, x: np.ndarray) -> np.ndarray:
    axis = call.attribute("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis:])))


def _axes(call: Call, axes: np.ndarray | None) -> tuple[int, ...] | None:
    """Axes come as an input since opset 13 (18 for reductions) and as an attribute before."""
    axes = call.attribute("axes") if axes is None else axes
    return None if axes is None else tuple(int(axis) for axis in np.ravel(axes))


@operator("Squeeze")
def squeeze(call: Call, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.squeeze(x, _axes(call, axes))


@operator("Unsqueeze")
def unsqueeze(call: Call, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.expand_dims(x, _axes(call, axes) or ())


@operator("Expand")
def expand(call: Call, x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(size) for size in shape)))


@operator("Tile")
def tile(call: Call, x: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    return np.tile(x, tuple(repeats))


@operator("Concat")
def concat(call: Call, *operands: np.ndarray) -> np.ndarray:
    return np.concatenate(operands, axis=call.attribute("axis"))


def _pieces(call: Call, x: np.ndarray, sizes: Operand, count: int, axis: int) -> list[np.ndarray]:
    total = x.shape[axis]
    if sizes is None:
        size = -(-total // count)
        bounds = [min(i * size, total) for i in range(1, count)]
    else:
        bounds = list(np.cumsum(np.ravel(sizes)))[:-1]
    return np.split(x, bounds, axis=axis)


@operator("Split")
def split(call: Call, x: np.ndarray, sizes: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    sizes = call.attribute("split") if sizes is None else sizes
    return tuple(_pieces(call, x, sizes, len(call.node.outputs), call.attribute("axis", 0)))


@operator("Slice")
def slice_(call: Call, x: np.ndarray, starts=None, ends=None, axes=None, steps=None) -> np.ndarray:
    starts = call.attribute("starts") if starts is None else starts
    ends = call.attribute("ends") if ends is None else ends
    axes = call.attribute("axes") if axes is None else axes
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    region = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps):
        size, step, start, end = x.shape[int(axis)], int(step), int(start), int(end)
        start, end = (value + size if value < 0 else value for value in (start, end))
        if step > 0:
            region[int(axis)] = slice(min(max(start, 0), size), min(max(end, 0), size), step)
        else:
            start, end = min(max(start, 0), size - 1), min(max(end, -1), size - 1)
            region[int(axis)] = slice(start, None if end < 0 else end, step)
    return x[tuple(region)]


@operator("Pad")
def pad(call: Call, x: np.ndarray, pads=None, value=None, axes=None) -> np.ndarray:
    pads = call.attribute("pads") if pads is None else pads
    fill = call.real("value", 0.0) if value is None else np.reshape(value, -1)[0]
    axes = range(x.ndim) if axes is None else [int(axis) for axis in axes]
    before, after = [0] * x.ndim, [0] * x.ndim
    for position, axis in enumerate(axes):
        before[axis], after[axis] = int(pads[position]), int(pads[position + len(axes)])
    kept = tuple(slice(max(-low, 0), size - max(-high, 0)) for low, high, size in zip(before, after, x.shape))
    widths = [(max(low, 0), max(high, 0)) for low, high in zip(before, after)]
    mode = call.attribute("mode", "constant")
    if mode == "constant":
        return np.pad(x[kept], widths, mode="constant", constant_values=fill)
    if mode not in ("reflect", "edge", "wrap"):
        raise call.unsupported(f"in mode {mode}")
    return np.pad(x[kept], widths, mode=mode)


@operator("Trilu")
def trilu(call: Call, x: np.ndarray, diagonal: np.ndarray | None = None) -> np.ndarray:
    k = 0 if diagonal is None else int(diagonal)
    return np.triu(x, k) if call.attribute("upper", 1) else np.tril(x, k)


@operator("EyeLike")
def eye_like(call: Call, x: np.ndarray) -> np.ndarray:
    dtype = call.attribute("dtype")
    return np.eye(*x.shape, k=call.attribute("k", 0), dtype=x.dtype if dtype is None else ir.DataType(dtype).numpy())


@operator("DepthToSpace")
def depth_to_space(call: Call, x: np.ndarray) -> np.ndarray:
    n, c, h, w = x.shape
    b = call.attribute("blocksize")
    if call.attribute("mode", "DCR") == "DCR":
        x = x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // (b * b), h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(call: Call, x: np.ndarray) -> np.ndarray:
    n, c, h, w = x.shape
    b = call.attribute("blocksize")
    x = x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * b * b, h // b, w // b)


@operator("SplitToSequence")
def split_to_sequence(call: Call, x: np.ndarray, split: np.ndarray | None = None) -> tuple[list[np.ndarray]]:
    axis = call.attribute("axis", 0)
    if split is None:
        parts = np.split(x, x.shape[axis], axis=axis)
        return ([part if call.attribute("keepdims", 1) else np.squeeze(part, axis) for part in parts],)
    if split.ndim == 0:
        return (np.split(x, range(int(split), x.shape[axis], int(split)), axis=axis),)
    return (_pieces(call, x, split, len(split), axis),)


@operator("SequenceConstruct")
def sequence_construct(call: Call, *operands: np.ndarray) -> tuple[list[np.ndarray]]:
    return (list(operands),)


@operator("SequenceEmpty")
def sequence_empty(call: Call) -> tuple[list[np.ndarray]]:
    return ([],)


@operator("SequenceAt")
def sequence_at(call: Call, sequence: list[np.ndarray], position: np.ndarray) -> np.ndarray:
    return sequence[int(position)]


@operator("SequenceInsert")
def sequence_insert(call: Call, sequence: list[np.ndarray], item: np.ndarray, position: np.ndarray | None = None):
    items = list(sequence)
    items.insert(len(items) if position is None else int(position), item)
    return (items,)


@operator("SequenceLength")
def sequence_length(call: Call, sequence: list[np.ndarray]) -> np.ndarray:
    return np.array(len(sequence), np.int64)


@operator("ConcatFromSequence")
def concat_from_sequence(call: Call, sequence: list[np.ndarray]) -> np.ndarray:
    axis = call.attribute("axis")
    return np.stack(sequence, axis) if call.attribute("new_axis", 0) else np.concatenate(sequence, axis)
