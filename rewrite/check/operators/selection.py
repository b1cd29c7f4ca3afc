"""Operators that pick, place and order elements by index."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rewrite.check.operators.registry import Call, Operand, dense, operator
from rewrite.ir import weights
from rewrite.ir.weights import Weight

_GAP = 8


@operator("Gather", lazy=True)
def gather(call: Call, data: Operand, indices: Operand) -> np.ndarray:
    """Entries of `data` along `axis`; of a stored table only the rows asked for are read."""
    axis, indices = call.attribute("axis", 0), np.asarray(dense(indices, call.precision))
    if not isinstance(data, Weight):
        return np.take(dense(data, call.precision), indices, axis=axis)
    rank = len(data.shape)
    axis = axis + rank if axis < 0 else axis
    size = data.shape[axis]
    flat = indices.reshape(-1)
    if flat.size and (flat.min() < -size or flat.max() >= size):
        raise IndexError(f"index {int(flat.max())} is outside of {size} entries")
    found: tuple[np.ndarray, np.ndarray] = np.unique(np.where(flat < 0, flat + size, flat), return_inverse=True)
    wanted, back = found
    parts = []
    for start, stop in _runs(wanted):
        region = list(weights.whole(data.shape))
        region[axis] = slice(start, stop)
        block = data.read(tuple(region)).astype(call.precision, copy=False)
        inside = wanted[(wanted >= start) & (wanted < stop)] - start
        parts.append(np.take(block, inside, axis=axis))
    if not parts:
        return np.zeros((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]), call.precision)
    rows = np.take(np.concatenate(parts, axis=axis), back, axis=axis)
    return rows.reshape(*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])


def _runs(wanted: Iterable[int]) -> list[tuple[int, int]]:
    """Ranges that cover the sorted indices, joined where the gap between two is small."""
    runs: list[tuple[int, int]] = []
    for row in map(int, wanted):
        if runs and row - runs[-1][1] < _GAP:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


@operator("GatherElements")
def gather_elements(call: Call, data: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """output[i][j] = data[i][indices[i][j]]; the indices may be fewer than the data on every axis."""
    axis = call.attribute("axis", 0) % max(data.ndim, 1)
    grid = list(np.indices(indices.shape, sparse=True))
    grid[axis] = np.where(indices < 0, indices + data.shape[axis], indices)
    return data[tuple(grid)]


@operator("GatherND")
def gather_nd(call: Call, data: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The last axis of `indices` addresses the axes of `data` after the batch axes."""
    batch = call.attribute("batch_dims", 0)
    axes = tuple(np.indices(indices.shape[:batch])) if batch else ()
    rows = [axis.reshape(*axis.shape, *[1] * (indices.ndim - 1 - batch)) for axis in axes]
    return data[(*rows, *np.moveaxis(indices, -1, 0))]


_SCATTERS = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _scatter(call: Call, data: np.ndarray, where: tuple, updates: np.ndarray) -> np.ndarray:
    result, reduction = data.copy(), call.attribute("reduction", "none")
    if reduction == "none":
        result[where] = updates
    else:
        _SCATTERS[reduction].at(result, where, updates)
    return result


@operator("ScatterND")
def scatter_nd(call: Call, data: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
    return _scatter(call, data, tuple(np.moveaxis(indices, -1, 0)), updates)


@operator("ScatterElements", "Scatter")
def scatter_elements(call: Call, data: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
    axis = call.attribute("axis", 0) % max(data.ndim, 1)
    grid = list(np.indices(indices.shape))
    grid[axis] = np.where(indices < 0, indices + data.shape[axis], indices)
    return _scatter(call, data, tuple(grid), updates)


@operator("TopK")
def top_k(call: Call, x: np.ndarray, k: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The k largest (or smallest) entries along `axis`; of equal entries the lower index comes first."""
    count = call.attribute("k") if k is None else int(np.reshape(k, ()))
    axis = call.attribute("axis", -1)
    if call.attribute("largest", 1):
        # The stable sort of the flipped array keeps the order of equal entries once it is flipped back.
        order = np.flip(x.shape[axis] - 1 - np.argsort(np.flip(x, axis), axis=axis, kind="stable"), axis)
    else:
        order = np.argsort(x, axis=axis, kind="stable")
    order = np.take(order, np.arange(count), axis=axis)
    return np.take_along_axis(x, order, axis), order.astype(np.int64)


@operator("OneHot")
def one_hot(call: Call, indices: np.ndarray, depth: np.ndarray, values: np.ndarray) -> np.ndarray:
    size, axis = int(np.reshape(depth, ())), call.attribute("axis", -1)
    indices = indices.astype(np.int64)
    indices = np.where(indices < 0, indices + size, indices)
    hot = np.moveaxis(indices[..., None] == np.arange(size), -1, axis)
    return np.where(hot, values[1], values[0])


@operator("NonZero")
def non_zero(call: Call, x: np.ndarray) -> np.ndarray:
    return np.stack(np.nonzero(x)).astype(np.int64)


@operator("Compress")
def compress(call: Call, x: np.ndarray, condition: np.ndarray) -> np.ndarray:
    return np.compress(condition, x, axis=call.attribute("axis"))
