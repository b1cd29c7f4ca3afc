"""Interpolation along axes: each axis is one product with a small matrix of weights.

Source: ONNX operator definition of Resize, since opset 11.
"""

from __future__ import annotations

import numpy as np

from rewrite.check.operators.registry import Call, operator


@operator("Resize")
def resize(
    call: Call,
    x: np.ndarray,
    roi: np.ndarray | None = None,
    scales: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
) -> np.ndarray:
    """`x` with the axes in `axes` (all by default) resampled to `sizes`, or to their lengths times `scales`."""
    axes = [axis % x.ndim for axis in call.attribute("axes") or range(x.ndim)]
    if call.version < 11:
        raise call.unsupported("before opset 11 has another meaning")
    if call.attribute("antialias", 0):
        raise call.unsupported("with antialiasing has no definition here")
    if call.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise call.unsupported("that keeps the aspect ratio has no definition here")
    result = x
    for index, axis in enumerate(axes):
        before = x.shape[axis]
        if sizes is not None and sizes.size:
            after = int(sizes[index])
            scale = after / before
        elif scales is not None and scales.size:
            scale = float(scales[index])
            after = int(np.floor(before * scale))
        else:
            raise call.unsupported("needs scales or sizes")
        if (before, scale) != (after, 1.0):
            result = _resampled(result, axis, _weights(call, before, after, scale))
    return result


def _resampled(x: np.ndarray, axis: int, weights: np.ndarray) -> np.ndarray:
    """`x` times `weights` (after, before) along `axis`."""
    moved = np.moveaxis(x, axis, -1) @ weights.T.astype(x.dtype, copy=False)
    return np.moveaxis(moved, -1, axis)


def _weights(call: Call, before: int, after: int, scale: float) -> np.ndarray:
    """The share of each of `before` entries in each of `after` ones: (after, before)."""
    places = _coordinates(call, before, after, scale)
    mode = call.attribute("mode", "nearest")
    if mode == "nearest":
        taps = {0: np.ones(after)}
        first = _nearest(call, places)
    else:
        first = np.floor(places)
        away = places - first
        if mode == "linear":
            taps = {0: 1 - away, 1: away}
        else:
            sharpness = call.real("cubic_coeff_a", -0.75)
            taps = {offset: _cubic(np.abs(away - offset), sharpness) for offset in (-1, 0, 1, 2)}
    weights = np.zeros((after, before))
    for offset, share in taps.items():
        column = first.astype(np.int64) + offset
        inside = (column >= 0) & (column < before)
        counted = np.where(inside, share, 0.0) if call.attribute("exclude_outside", 0) else share
        np.add.at(weights, (np.arange(after), np.clip(column, 0, before - 1)), counted)
    if call.attribute("exclude_outside", 0):
        weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _coordinates(call: Call, before: int, after: int, scale: float) -> np.ndarray:
    """Where each entry of the result lies among those of the input."""
    mode = call.attribute("coordinate_transformation_mode", "half_pixel")
    place = np.arange(after, dtype=np.float64)
    if mode == "asymmetric":
        return place / scale
    if mode == "align_corners":
        return place * ((before - 1) / (after - 1)) if after > 1 else np.zeros(after)
    if mode == "pytorch_half_pixel" and after == 1:
        return np.zeros(after)
    if mode == "half_pixel_symmetric":
        adjusted = (after / (scale * before)) if before else 1.0
        middle = before / 2
        return middle * (1 - adjusted) + (place + 0.5) / scale - 0.5
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return (place + 0.5) / scale - 0.5
    raise call.unsupported(f"with coordinates {mode} has no definition here")


def _nearest(call: Call, places: np.ndarray) -> np.ndarray:
    mode = call.attribute("nearest_mode", "round_prefer_floor")
    rounding = {
        "round_prefer_floor": lambda p: np.ceil(p - 0.5),
        "round_prefer_ceil": lambda p: np.floor(p + 0.5),
        "floor": np.floor,
        "ceil": np.ceil,
    }
    return rounding[mode](places)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel of sharpness `a`, zero from a distance of 2."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
