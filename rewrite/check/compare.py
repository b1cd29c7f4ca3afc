"""Compare one output of a rewritten network with the float64 reference; the noise decides.

The metrics are for the reader. The verdict looks at shape, type, finiteness and two noise ratios: of norms, and of
largest entries, since one wrong entry among a million is invisible in a norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rewrite.check.noise import NOISE_LIMIT, Noise, comparable, norm, ulp

WITHIN, ABOVE, DIFFERENT, UNSETTLED = "within noise", "above noise", "different", "unsettled"
"""Verdicts. `UNSETTLED`: the original itself is so far from float64 that its noise decides nothing."""

SEVERITY = (WITHIN, UNSETTLED, ABOVE, DIFFERENT)
TOP_K = 5


@dataclass(frozen=True)
class LogitAgreement:
    """How far two sets of logits (rows, classes) choose alike.

    `kl_mean` and `kl_max` are KL(reference ‖ candidate) over rows in nats; `top1` and `topk` the shares of rows with
    the same first class and of common classes among the first `TOP_K`; `margin` the smallest lead of the reference's
    first class; `flip_margin` the largest lead at which the first class changed (0: none changed).
    """

    kl_mean: float
    kl_max: float
    top1: float
    topk: float
    margin: float
    flip_margin: float


@dataclass(frozen=True)
class Comparison:
    """One output against the reference. Errors are absolute in `max_abs`, over norms in `relative`.

    `ulps` is ‖error‖/‖ulp(r)‖ and `max_ulps` the largest entry's count, in the storage type; `cosine` the cosine
    between the two; `sqnr_db` 20·log10(‖r‖/‖error‖).
    """

    verdict: str
    reason: str = ""
    noise_ratio: float = math.nan
    peak_ratio: float = math.nan
    max_abs: float = math.nan
    relative: float = math.nan
    ulps: float = math.nan
    max_ulps: float = math.nan
    cosine: float = math.nan
    sqnr_db: float = math.nan
    logits: LogitAgreement | None = None

    @property
    def accepted(self) -> bool:
        """Whether the candidate is as good as the original; unsettled is not."""
        return self.verdict == WITHIN

    def __str__(self) -> str:
        if self.verdict == DIFFERENT:
            return f"{self.verdict}: {self.reason}"
        text = f"{self.verdict}: noise ratio {self.noise_ratio:.2f}, relative error {self.relative:.1e}"
        return f"{text} ({self.reason})" if self.reason else text


def compare(
    candidate: np.ndarray,
    reference: np.ndarray,
    dtype: np.dtype | type,
    noise: Noise,
    *,
    classes: bool = False,
    limit: float = NOISE_LIMIT,
) -> Comparison:
    """Judge `candidate` (of type `dtype`) against `reference` (float64, or the exact integers or booleans).

    `noise` is the original's own error on this output; `classes` asks for the logit metrics over the last axis.
    """
    if np.dtype(candidate.dtype) != np.dtype(dtype):
        return Comparison(DIFFERENT, f"type {candidate.dtype}, expected {np.dtype(dtype)}")
    if candidate.shape != reference.shape:
        return Comparison(DIFFERENT, f"shape {candidate.shape}, expected {reference.shape}")
    if np.asarray(reference).dtype.kind in "biu":
        return _compare_exactly(candidate, reference)
    reference = np.asarray(reference, np.float64)
    wide = np.asarray(candidate, np.float64)
    where = np.isfinite(reference) if noise.where is None else noise.where
    broken = _pattern_fault(wide, reference, where, noise)
    if broken:
        return Comparison(DIFFERENT, broken)
    given, exact = wide[where], reference[where]
    error, size = given - exact, norm(exact)
    distance, peak, spacing = norm(error), float(np.max(np.abs(error), initial=0.0)), ulp(exact, noise.dtype)
    ratio, peak_ratio = _share(distance, noise.norm), _share(peak, noise.peak)
    verdict, reason = _verdict(ratio, peak_ratio, noise, limit)
    return Comparison(
        verdict,
        reason,
        noise_ratio=ratio,
        peak_ratio=peak_ratio,
        max_abs=peak,
        relative=_share(distance, size),
        ulps=_share(distance, norm(spacing)),
        max_ulps=float(np.max(np.abs(error) / spacing, initial=0.0)),
        cosine=_cosine(given, exact),
        sqnr_db=20 * math.log10(size / distance) if distance and size else math.inf if not distance else -math.inf,
        logits=logit_agreement(wide, reference) if classes and wide.ndim and wide.shape[-1] > 1 else None,
    )


def _verdict(ratio: float, peak_ratio: float, noise: Noise, limit: float) -> tuple[str, str]:
    if not (ratio <= limit and peak_ratio <= limit):
        if ratio <= limit:
            return ABOVE, f"the largest error is {peak_ratio:.3g} times the original's"
        return ABOVE, f"the error is {ratio:.3g} times the original's"
    if not noise.is_rounding:
        return UNSETTLED, f"the original itself is {noise.relative:.1e} away from its float64 value"
    return WITHIN, ""


def _share(part: float, whole: float) -> float:
    return 0.0 if part == 0 else part / whole if whole else math.inf


def _compare_exactly(candidate: np.ndarray, reference: np.ndarray) -> Comparison:
    wrong = int(np.count_nonzero(candidate != reference))
    if wrong:
        return Comparison(DIFFERENT, f"{wrong} of {reference.size} integers differ")
    return Comparison(WITHIN, noise_ratio=0.0, peak_ratio=0.0, max_abs=0.0, relative=0.0, ulps=0.0, max_ulps=0.0)


def _pattern_fault(wide: np.ndarray, reference: np.ndarray, where: np.ndarray, noise: Noise) -> str:
    """What is wrong with non-finite and masking entries, or nothing.

    Where the reference is NaN the candidate must be too; where it is infinite or a masking value, the candidate must
    be at least a masking value of the same sign; where the original alone overflowed, nothing is asked.
    """
    lost = int(np.count_nonzero(~np.isfinite(wide[where])))
    if lost:
        return f"{lost} of {wide.size} entries are not finite where the original's are"
    unknown = np.isnan(reference)
    if not np.isnan(wide[unknown]).all():
        return "finite where the reference is NaN"
    large = ~where & ~unknown & ~comparable(reference, noise.dtype)
    if np.isnan(wide[large]).any() or comparable(wide[large], noise.dtype).any():
        return "a masking or infinite entry became an ordinary one"
    if np.any(np.sign(wide[large]) != np.sign(reference[large])):
        return "a masking or infinite entry changed its sign"
    return ""


def _cosine(given: np.ndarray, exact: np.ndarray) -> float:
    sizes = norm(given), norm(exact)
    if 0 in sizes:
        return 1.0 if sizes[0] == sizes[1] else 0.0
    return float(np.dot(given / sizes[0], exact / sizes[1]))


def logit_agreement(candidate: np.ndarray, reference: np.ndarray) -> LogitAgreement | None:
    """The agreement of two arrays of logits (..., classes) in float64; None where no row is finite.

    >>> logit_agreement(np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]])).top1
    1.0
    """
    rows, exact = (x.reshape(-1, x.shape[-1]) for x in (candidate, reference))
    finite = np.isfinite(rows).all(axis=-1) & np.isfinite(exact).all(axis=-1)
    rows, exact = rows[finite], exact[finite]
    if not rows.size:
        return None
    log_p, log_q = _log_softmax(exact), _log_softmax(rows)
    divergence = np.maximum(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1), 0.0)
    k = min(TOP_K, rows.shape[-1])
    first, best = (np.argpartition(-x, k - 1, axis=-1)[:, :k] for x in (rows, exact))
    common = [len(set(a) & set(b)) / k for a, b in zip(first.tolist(), best.tolist())]
    two = -np.partition(-exact, 1, axis=-1)[:, :2]
    lead = np.abs(two[:, 0] - two[:, 1])
    same = np.argmax(rows, axis=-1) == np.argmax(exact, axis=-1)
    return LogitAgreement(
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        top1=float(same.mean()),
        topk=float(np.mean(common)),
        margin=float(lead.min()),
        flip_margin=float(np.max(lead[~same], initial=0.0)),
    )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - np.max(x, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
