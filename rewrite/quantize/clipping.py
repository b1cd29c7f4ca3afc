"""Scales that make the squared error of a group smallest: its range shrunk, then fitted to its codes.

    minimize  Σ_k h_k · (w_k − (q_k − z)·s)²      over s, z, with q_k the nearest code

A range that covers every weight pays for the largest with a coarse step for all. The range is shrunk by factors on a
grid, 1 down to 0.4 (both signs of the scale where steps reach further to one side), the best kept, and then the scale
is fitted to the codes, s = Σ h w c / Σ h c² with c = q − z, and the codes to the scale, as long as the error falls;
so are zero points next to it. Tried as well: the scale that covers all, and the peers' (the entry of largest magnitude
on the outermost step), so that the error is never larger than theirs.

Source    Banner et al. 2019, arXiv:1810.05723, §2 (clipping by mean squared error); the fit in turns is Lloyd's method.
"""

from __future__ import annotations

import numpy as np

from rewrite.errors import RequestError
from rewrite.quantize.format import Format, Quantized, checked, grouped, stored_scale
from rewrite.quantize.rounding import asymmetric, coded, covering, nearest, symmetric

SHRINKS = tuple(1.0 - 0.025 * step for step in range(25))
"""Factors of the range that are tried, 1 … 0.4."""

SHRINKS_EIGHT = tuple(1.0 - 0.6 * (step / 24) ** 2 for step in range(25))
"""The same for eight bits, whose best range lies close to the whole."""

FITS = 4
"""Turns of fitting the scale to the codes and the codes to the scale; they end earlier where nothing falls."""

CHUNK_ELEMENTS = 1 << 17
"""Weights searched at a time (1 MiB of float64), so that the candidates stay in the cache."""


def clip_by_error(weight: np.ndarray, format: Format, importance: np.ndarray | None = None) -> Quantized:
    """A matrix (K, N) in `format`, scales and zero points chosen for the least squared error of each group.

    importance  (K,) not negative, the weight h of each row's error (the diagonal of the Hessian); all equal if None.
                A group whose rows all have importance 0 is rounded to nearest.

    Raises RequestError for a weight that is empty, not finite or huge, and for importances that do not fit it.
    """
    weight = checked(weight)
    scales, zero_points = clipped(weight, format, importance)
    return coded(weight, scales, zero_points, format)


def clipped(weight: np.ndarray, format: Format, importance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The scales and zero points (G, N) of `clip_by_error`, float64 holding stored numbers."""
    shares = np.ones(len(weight)) if importance is None else np.asarray(importance, np.float64)
    if shares.shape != (len(weight),) or not np.all(np.isfinite(shares)) or np.any(shares < 0):
        raise RequestError(f"importances of shape {shares.shape}", remedy="(K,), finite and not negative")
    largest = float(shares.max())
    shares = shares / largest if largest else shares
    groups = grouped(weight, format)
    each = grouped(np.broadcast_to(shares[:, None], (len(shares), weight.shape[1] if format.per_tensor else 1)), format)
    scales = np.empty((len(groups), groups.shape[2]))
    zero_points = np.empty_like(scales)
    step = max(1, CHUNK_ELEMENTS // groups[..., 0].size)
    for start in range(0, groups.shape[2], step):
        columns = slice(start, start + step)
        scales[:, columns], zero_points[:, columns] = _searched(groups[..., columns], each, format)
    return scales, zero_points


def _searched(groups: np.ndarray, shares: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray]:
    """The best scales and zero points (G, N) of weights (G, rows, N), errors weighted by (G, rows, 1)."""
    scales, zero_points = covering(groups, format)
    errors = _errors(groups, scales, zero_points, shares, format)
    above = np.maximum(groups.max(axis=1), 0.0)
    below = np.maximum(-groups.min(axis=1), 0.0)

    def tried(candidate: np.ndarray, points: np.ndarray) -> bool:
        found = _errors(groups, candidate, points, shares, format)
        better = found < errors
        np.copyto(errors, found, where=better)
        np.copyto(scales, candidate, where=better)
        np.copyto(zero_points, points, where=better)
        return bool(better.any())

    for factor in SHRINKS_EIGHT if format.bits == 8 else SHRINKS:
        if format.symmetric:
            for candidate in symmetric(below * factor, above * factor, format):
                tried(candidate, zero_points)
        else:
            tried(*asymmetric(below * factor, above * factor, format))
    if format.symmetric and format.bits < 8:
        largest = np.where(below > above, below, -above)
        tried(stored_scale(largest / -format.steps[0]), zero_points)
    for _ in range(FITS):
        fell = False
        for shift in (0,) if format.symmetric else (0, -1, 1):
            points = np.clip(zero_points + shift, *format.codes)
            steps = nearest(groups, scales, points, format) - points[:, None, :]
            squares = np.sum(shares * steps * steps, axis=1)
            fitted = np.sum(shares * steps * groups, axis=1) / np.where(squares > 0, squares, 1.0)
            fell |= tried(np.where(fitted != 0, stored_scale(fitted), scales), points)
        if not fell:
            break
    return scales, zero_points


def _errors(
    groups: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, shares: np.ndarray, format: Format
) -> np.ndarray:
    """Σ h·(w − ŵ)² of each group and column, (G, N)."""
    steps = nearest(groups, scales, zero_points, format)
    steps -= zero_points[:, None, :]
    steps *= scales[:, None, :]
    steps -= groups
    return np.einsum("gkn,gkn,gkn->gn", np.broadcast_to(shares, steps.shape), steps, steps)
