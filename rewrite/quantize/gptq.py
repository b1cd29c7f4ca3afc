"""Codes that make up for each other's errors on calibration data.

    minimize  ‖X(W − Ŵ)‖² = tr EᵀHE      E = W − Ŵ,  H = XᵀX + λI
    H = M·D·Mᵀ, M upper triangular with ones       tr EᵀHE = Σ_k d_k·‖e_k + Σ_{j<k} M[j, k]·e_j‖²

So row after row, each is rounded to nearest after the sum over earlier rows' errors is added to it: the step that
Frantar et al. write with the Cholesky factor of H⁻¹, without an inverse (Chee et al. prove them equal). Rows come in
the order of falling diag H, scales are chosen beforehand by `clip_by_error` with diag H as importance, for groups in
the order of storage, which needs no index of groups.

Then descent: each code in turn moves to where the error is least with all others as they are, and each scale is fitted
to its codes. Neither makes the error larger. At last each column keeps the best of this, clipping, and rounding to
nearest, measured with XᵀX itself.

Shapes    X (n, K)   W, Ŵ, E (K, N)   H, M (K, K)   D diagonal
Source    Frantar et al. 2023, arXiv:2210.17323, algorithm 1 and §3.3 (act-order); Chee et al. 2023, arXiv:2307.13304,
          theorem 6 (no inverse); Behdin et al. 2023, arXiv:2309.01885, §3 (descent by coordinates)
"""

from __future__ import annotations

import numpy as np

from rewrite.errors import RequestError
from rewrite.quantize.clipping import clipped
from rewrite.quantize.format import SMALLEST_SCALE, Format, Quantized, checked, each_row
from rewrite.quantize.rounding import coded, round_to_nearest

ROWS = 128
"""Rows whose errors are made up for among themselves before the rest hear of them by one product of matrices."""

CHUNK_ELEMENTS = 1 << 22
"""Weights worked on at a time (32 MiB of float64 for each array); columns do not depend on each other."""

SWEEPS = 2
"""Turns of descent."""


def gptq(
    weight: np.ndarray, hessian: np.ndarray, format: Format, *, act_order: bool = True, damping: float = 0.01
) -> Quantized:
    """A matrix (K, N) in `format`, its codes chosen for the least ‖X(W − Ŵ)‖; no larger than rounding to nearest has.

    hessian    XᵀX (K, K), or a multiple of it; inputs whose diagonal is 0 are rounded as if alone, λ deciding
    act_order  rows in the order of falling diag H; as stored otherwise
    damping    λ as a share of the mean of diag H; more where H is singular without

    Raises RequestError for a weight that is empty, not finite or huge, and for a Hessian that does not fit it.
    """
    weight = checked(weight)
    hessian = np.asarray(hessian, np.float64)
    if hessian.shape != (len(weight), len(weight)) or not np.all(np.isfinite(hessian)):
        raise RequestError(f"a Hessian of shape {hessian.shape}", remedy=f"({len(weight)}, {len(weight)}), finite")
    diagonal = np.diagonal(hessian).copy()
    if np.any(diagonal < 0):
        raise RequestError("a Hessian with a negative diagonal", remedy="XᵀX")
    if diagonal.any():
        hessian = hessian / float(np.max(diagonal))
    scales, points = clipped(weight, format, diagonal)
    candidates = [round_to_nearest(weight, format), coded(weight, scales, points, format)]
    if diagonal.any():
        order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(weight))
        damped, feedback = _factored(hessian, order, damping)
        shape = format.scale_shape(weight.shape)
        codes, scales, points = np.empty(weight.shape, format.dtype), scales.reshape(shape), points.reshape(shape)
        for columns in _chunks(weight):
            own = slice(None) if format.per_tensor else columns
            steps, fitted = _solved(weight[:, columns], scales[:, own], points[:, own], damped, feedback, order, format)
            codes[:, columns] = steps + each_row(points[:, own], format, len(weight))
            scales[:, own] = fitted
        candidates.append(Quantized(format, codes, scales.astype(np.float32), points.astype(format.dtype)))
    return _least(weight, candidates, hessian)


def weighted_errors(weight: np.ndarray, quantized: Quantized, hessian: np.ndarray) -> np.ndarray:
    """‖X(w − ŵ)‖² of each column (N,), for XᵀX (K, K)."""
    error = weight - quantized.values()
    found = [np.einsum("kn,kn->n", error[:, columns], hessian @ error[:, columns]) for columns in _chunks(weight)]
    return np.concatenate(found)


def _chunks(weight: np.ndarray) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // len(weight))
    return [slice(start, start + step) for start in range(0, weight.shape[1], step)]


def _factored(hessian: np.ndarray, order: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """H + λI, and Mᵀ (K, K) of H + λI in `order`."""
    mean = float(np.mean(np.diagonal(hessian)))
    while True:
        damped = hessian + damping * mean * np.eye(len(hessian))
        try:
            lower = np.linalg.cholesky(damped[np.ix_(order[::-1], order[::-1])])
        except np.linalg.LinAlgError:
            damping = max(10 * damping, len(hessian) * np.finfo(np.float64).eps)
            continue
        upper = lower[::-1, ::-1]
        return damped, np.ascontiguousarray((upper / np.diagonal(upper)).T)


def _solved(
    weight: np.ndarray,
    scales: np.ndarray,
    points: np.ndarray,
    hessian: np.ndarray,
    feedback: np.ndarray,
    order: np.ndarray,
    format: Format,
) -> tuple[np.ndarray, np.ndarray]:
    """Steps (codes less zero points) and scales of columns, as float64."""
    rows = len(weight)
    group = np.arange(rows) // format.block if format.block else np.zeros(rows, np.int64)
    low, high = format.codes[0] - points, format.codes[1] - points
    steps, error = np.empty_like(weight), np.empty_like(weight)  # the error in the order of rounding
    for start in range(0, rows, ROWS):
        some = order[start : start + ROWS]
        targets = weight[some] + feedback[start : start + ROWS, :start] @ error[:start]
        for index, row in enumerate(some):
            place = start + index
            target = targets[index] + feedback[place, start:place] @ error[start:place]
            scale = scales[group[row]]
            steps[row] = np.clip(np.rint(target / scale), low[group[row]], high[group[row]])
            error[place] = weight[row] - steps[row] * scale
    scales = scales.copy()
    for _ in range(SWEEPS):
        _descend(weight, steps, scales, (low, high), hessian, format)
    return steps, scales


def _descend(
    weight: np.ndarray,
    steps: np.ndarray,
    scales: np.ndarray,
    limits: tuple[np.ndarray, np.ndarray],
    hessian: np.ndarray,
    format: Format,
) -> None:
    """One turn of descent, in place: codes row by row, then the scale of their group.

    `slope` (K, N) is H·E as it was when rows from `since` on had not `moved`.
    """
    rows, since = len(weight), 0
    slope = hessian @ (weight - steps * each_row(scales, format, rows))
    moved = np.zeros_like(weight)
    diagonal = np.diagonal(hessian)
    for start, stop, group in _spans(rows, format):
        if start - since >= ROWS:
            slope += hessian[:, since:start] @ moved[since:start]
            moved[since:start] = 0.0
            since = start
        scale, low, high = scales[group], limits[0][group], limits[1][group]
        pulls = slope[start:stop] + hessian[start:stop, since:start] @ moved[since:start]
        for row in range(start, stop):
            pull = pulls[row - start] + hessian[row, start:row] @ moved[start:row]
            pull /= diagonal[row] * scale
            pull += steps[row]
            new = np.clip(np.rint(pull, out=pull), low, high, out=pull)
            moved[row] = (steps[row] - new) * scale
            steps[row] = new
        first = group * format.block
        if format.per_tensor or stop < min(first + (format.block or rows), rows):
            continue
        own = steps[first:stop]
        current = slope[first:stop] + hessian[first:stop, since:stop] @ moved[since:stop]
        curvature = np.einsum("kn,kn->n", own, hessian[first:stop, first:stop] @ own)
        gain = np.einsum("kn,kn->n", own, current) / np.where(curvature > 0, curvature, np.inf)
        fitted = (scale + gain).astype(np.float32).astype(np.float64)
        fitted = np.where(fitted * np.sign(scale) >= SMALLEST_SCALE, fitted, scale)
        moved[first:stop] += own * (scale - fitted)
        scales[group] = fitted
        since = min(since, first)


def _spans(rows: int, format: Format) -> list[tuple[int, int, int]]:
    """All rows cut at groups' ends and every `ROWS` inside them: first row, row behind the last, group."""
    spans, size = [], format.block or rows
    for group, first in enumerate(range(0, rows, size)):
        last = min(first + size, rows)
        spans += [(start, min(start + ROWS, last), group) for start in range(first, last, ROWS)]
    return spans


def _least(weight: np.ndarray, candidates: list[Quantized], hessian: np.ndarray) -> Quantized:
    """The best for each column, the earlier of equals; for the matrix where its columns share a scale."""
    best, *others = candidates
    least = weighted_errors(weight, best, hessian)
    for other in others:
        errors = weighted_errors(weight, other, hessian)
        if best.format.per_tensor:
            better = np.full(errors.shape, errors.sum() < least.sum())
        else:
            better = errors < least
        least = np.where(better, errors, least)
        own = better[:1] if best.format.per_tensor else better
        best = Quantized(
            best.format,
            np.where(better, other.codes, best.codes),
            np.where(own, other.scales, best.scales),
            np.where(own, other.zero_points, best.zero_points),
        )
    return best
