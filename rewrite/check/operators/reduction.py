"""Reductions over axes."""

from __future__ import annotations

import numpy as np

from rewrite.check.operators.registry import Call, operator


def reduced_axes(call: Call, rank: int, axes: np.ndarray | None) -> tuple[int, ...] | None:
    """The axes a reduction runs over: input since opset 18 (13 for ReduceSum), attribute before.

    None means that nothing is reduced (`noop_with_empty_axes`); absent axes otherwise mean all of them.
    """
    given = call.attribute("axes") if axes is None else axes
    chosen = () if given is None else tuple(int(axis) % max(rank, 1) for axis in np.ravel(given))
    if chosen:
        return chosen
    return None if call.attribute("noop_with_empty_axes", 0) else tuple(range(rank))


def log_sum_exp(x: np.ndarray, axes: tuple[int, ...], keepdims: bool) -> np.ndarray:
    """log Σ exp(x), shifted by the maximum so that nothing overflows."""
    top = np.max(x, axis=axes, keepdims=True, initial=-np.inf)
    shift = np.where(np.isfinite(top), top, 0)
    total = np.log(np.sum(np.exp(x - shift), axis=axes, keepdims=True)) + shift
    return total if keepdims else np.squeeze(total, axes)


def _extreme(function, x: np.ndarray, axes: tuple[int, ...], keepdims: bool, largest: bool) -> np.ndarray:
    """The maximum or minimum; over no elements, the identity of the operation."""
    if x.size:
        return function(x, axis=axes, keepdims=keepdims)
    if x.dtype.kind == "f":
        initial = -np.inf if largest else np.inf
    else:
        limits = np.iinfo(x.dtype)
        initial = limits.min if largest else limits.max
    return function(x, axis=axes, keepdims=keepdims, initial=initial)


_REDUCTIONS = {
    "ReduceSum": lambda x, axes, keep: np.sum(x, axis=axes, keepdims=keep, dtype=x.dtype),
    "ReduceMean": lambda x, axes, keep: np.mean(x, axis=axes, keepdims=keep).astype(x.dtype),
    "ReduceMax": lambda x, axes, keep: _extreme(np.max, x, axes, keep, True),
    "ReduceMin": lambda x, axes, keep: _extreme(np.min, x, axes, keep, False),
    "ReduceProd": lambda x, axes, keep: np.prod(x, axis=axes, keepdims=keep, dtype=x.dtype),
    "ReduceL1": lambda x, axes, keep: np.sum(np.abs(x), axis=axes, keepdims=keep, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keep: np.sqrt(np.sum(x * x, axis=axes, keepdims=keep)).astype(x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: np.sum(x * x, axis=axes, keepdims=keep, dtype=x.dtype),
    "ReduceLogSum": lambda x, axes, keep: np.log(np.sum(x, axis=axes, keepdims=keep)),
    "ReduceLogSumExp": log_sum_exp,
}


def _reduction(function):
    def definition(call: Call, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
        chosen = reduced_axes(call, x.ndim, axes)
        return x if chosen is None else function(x, chosen, bool(call.attribute("keepdims", 1)))

    return definition


for _name, _function in _REDUCTIONS.items():
    operator(_name)(_reduction(_function))


def _position(function):
    def definition(call: Call, x: np.ndarray) -> np.ndarray:
        axis, last = call.attribute("axis", 0), call.attribute("select_last_index", 0)
        if last:
            found = x.shape[axis] - 1 - function(np.flip(x, axis), axis=axis)
        else:
            found = function(x, axis=axis)
        return np.expand_dims(found, axis) if call.attribute("keepdims", 1) else found

    return definition


for _name, _function in {"ArgMax": np.argmax, "ArgMin": np.argmin}.items():
    operator(_name)(_position(_function))


@operator("CumSum")
def cumulative_sum(call: Call, x: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """The running sum along `axis`, without its own term where `exclusive`, from the end where `reverse`."""
    along = int(np.reshape(axis, ())) % x.ndim
    x = np.flip(x, along) if call.attribute("reverse", 0) else x
    total = np.cumsum(x, axis=along, dtype=x.dtype)
    if call.attribute("exclusive", 0):
        total = np.roll(total, 1, along)  # shifted, for subtracting the own term would cancel
        total[tuple(slice(0, 1) if i == along else slice(None) for i in range(x.ndim))] = 0
    return np.flip(total, along) if call.attribute("reverse", 0) else total
