"""Round to nearest: scales that cover every weight, and the nearest code for each.

    symmetric     s = ± the smallest magnitude with  low·s, high·s  around all weights of the group
    asymmetric    s = (max(w, 0) − min(w, 0)) / (codes − 1)        z = lowest code + ⌊−min(w, 0) / s⌉

Scales are rounded up to float32 before anything is measured with them, so that no weight lies outside, and every
error is at most half a step: also at the ends of an asymmetric range, where a rounded zero point moves the range by
at most half a step and the weights that fall out keep its end.

Steps of two and four bits reach one further below zero than above (−8 … 7). The peers map the entry of largest
magnitude, whatever its sign, to −8 by s = max / −8; the opposite end may then lie up to a whole step outside. Here the
longer side goes to where the smaller step covers all, m = max(w), l = −min(w): s = max(m/7, l/8) or s = −max(m/8, l/7).
"""

from __future__ import annotations

import numpy as np

from rewrite.quantize.format import Format, Quantized, checked, grouped, stored_scale, ungrouped


def round_to_nearest(weight: np.ndarray, format: Format) -> Quantized:
    """A matrix (K, N), stored in `format` with no weight outside its group's range, halves to the even code.

    A group of zeros has scale 1. Raises RequestError for a weight that is empty, not finite or huge.
    """
    weight = checked(weight)
    groups = grouped(weight, format)
    scales, zero_points = covering(groups, format)
    return coded(weight, scales, zero_points, format)


def covering(groups: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points (G, N) that cover the weights (G, rows, N) of each group: stored numbers, as float64."""
    above = np.maximum(groups.max(axis=1), 0.0)
    below = np.maximum(-groups.min(axis=1), 0.0)
    if not format.symmetric:
        return asymmetric(below, above, format)
    scales, *others = symmetric(below, above, format)
    for other in others:
        scales = np.where(np.abs(other) < np.abs(scales), other, scales)
    return scales, np.full_like(scales, format.middle)


def symmetric(below: np.ndarray, above: np.ndarray, format: Format) -> tuple[np.ndarray, ...]:
    """The scales whose steps cover −below … above: the positive one, and the negative one of two and four bits, whose
    steps reach further to one side (the 127 and 128 of eight bits are not worth a negative scale)."""
    low, high = format.steps
    upright = stored_scale(np.maximum(below / -low, above / high))
    if format.bits == 8:
        return (upright,)
    return upright, stored_scale(-np.maximum(below / high, above / -low))


def asymmetric(below: np.ndarray, above: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point whose codes cover −below … above, up to half a step."""
    low, high = format.codes
    scales = stored_scale((below + above) / (high - low))
    return scales, np.clip(low + np.rint(below / scales), low, high)


def nearest(groups: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, format: Format) -> np.ndarray:
    """The nearest codes, as float64, of weights (G, rows, N) for scales and zero points (G, N)."""
    codes = groups / scales[:, None, :]
    np.rint(codes, out=codes)
    codes += zero_points[:, None, :]
    return np.clip(codes, *format.codes, out=codes)


def coded(weight: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, format: Format) -> Quantized:
    """The nearest codes of a matrix (K, N) for scales (float32 numbers) and zero points (G, N)."""
    codes = ungrouped(nearest(grouped(weight, format), scales, zero_points, format), format, weight.shape)
    shape = format.scale_shape(weight.shape)
    return Quantized(
        format,
        codes.astype(format.dtype),
        scales.astype(np.float32).reshape(shape),
        zero_points.astype(format.dtype).reshape(shape),
    )
