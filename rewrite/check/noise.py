"""How much a float run may differ from the exact result: as much as the original's own rounding, and not much more.

    noise ratio = ‖rewritten − r‖ / max(‖original − r‖, ‖ulp(r)‖)          r: the original in float64

About 1 is perfect. The floor is the vector of one ulp of the storage type at every entry of r: an original that happens
to be exact has no noise of its own, and nothing stored in that type can be asked to be better than its spacing.

Entries are left out where the statement to be checked says nothing: where r or the original is not finite, and where r
is a masking value (at least half the largest finite value of the storage type: finfo.min plus a score), whose ulp would
drown every other entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

NOISE_LIMIT = 8.0
"""The largest accepted ratio: three bits over the original's own noise.

A rewrite changes the order and the number of roundings, not their size; measured ratios of equal rewrites lie between
0.3 and 4 (a Hadamard on a stream with a 1000× outlier channel: 3.5). The smallest error worth the name, 0.1 % in
float32, gives a ratio above 1000.
"""

BUG_FACTOR = 100.0
"""How far an error in float64 may exceed what the float32 error predicts by the ratio of the two roundoffs."""


def unit_roundoff(dtype: np.dtype | type) -> float:
    """Half the spacing of `dtype` at 1.

    >>> unit_roundoff(np.float32) == 2.0**-24
    True
    """
    return 2.0 ** -(_format(dtype).nmant + 1)


def _format(dtype: np.dtype | type):
    dtype = np.dtype(dtype)
    return np.finfo(dtype) if dtype.kind == "f" else ml_dtypes.finfo(dtype)


def ulp(values: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """The spacing of `dtype` at each of `values` (float64): the distance to the next number away from zero.

    >>> ulp(np.array([1.0, 3.0]), np.float32).tolist() == [2.0**-23, 2.0**-22]
    True
    """
    limits = _format(dtype)
    _, exponent = np.frexp(np.abs(np.asarray(values, np.float64)))  # |x| = m·2^e, m in [1/2, 1)
    smallest = limits.minexp - limits.nmant  # zero and subnormal numbers are evenly spaced
    return np.ldexp(1.0, np.where(values == 0, smallest, np.maximum(exponent - 1 - limits.nmant, smallest)))


def norm(values: np.ndarray) -> float:
    """The 2-norm of all entries, scaled so that squares neither overflow nor vanish."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(np.linalg.norm(np.ravel(values) / largest))


def comparable(reference: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """Where `reference` is finite and no masking value of `dtype`: a boolean array of its shape."""
    with np.errstate(invalid="ignore"):
        return np.abs(reference) < float(_format(dtype).max) / 2


@dataclass(frozen=True)
class Noise:
    """The rounding error of the original run on one output, floored at one ulp.

    `norm` and `peak` are the 2-norm and the largest entry of the error; `relative` and `peak_relative` the same over
    the reference's; `dtype` the storage type; `where` the entries that count (None: all finite ones).
    """

    norm: float
    peak: float
    relative: float
    peak_relative: float
    dtype: np.dtype
    where: np.ndarray | None = None

    @classmethod
    def of(cls, original: np.ndarray, reference: np.ndarray, dtype: np.dtype | type | None = None) -> Noise:
        """The noise of `original` (a float run) about `reference` (float64, same shape).

        `dtype` is the storage type, that of `original` unless given.
        """
        dtype = np.dtype(original.dtype if dtype is None else dtype)
        if original.shape != reference.shape:
            raise ValueError(f"the original's shape {original.shape} is not the reference's {reference.shape}")
        wide = np.asarray(original, np.float64)
        where = comparable(reference, dtype) & np.isfinite(wide)
        return cls._from_error(np.where(where, wide - np.where(where, reference, 0), 0), reference, dtype, where)

    @classmethod
    def floor(cls, reference: np.ndarray, dtype: np.dtype | type) -> Noise:
        """One ulp at every entry: for an original that was not run."""
        return cls._from_error(np.zeros(reference.shape), reference, np.dtype(dtype), comparable(reference, dtype))

    @classmethod
    def _from_error(cls, error: np.ndarray, reference: np.ndarray, dtype: np.dtype, where: np.ndarray) -> Noise:
        kept = reference[where]
        spacing = ulp(kept, dtype)
        size, top = norm(kept), float(np.max(np.abs(kept), initial=0.0))
        total = max(norm(error[where]), norm(spacing))
        peak = max(float(np.max(np.abs(error[where]), initial=0.0)), float(np.max(spacing, initial=0.0)))
        return cls(total, peak, total / size if size else math.inf, peak / top if top else math.inf, dtype, where)

    def at_least(self, relative: float, peak_relative: float, reference: np.ndarray) -> Noise:
        """This noise, raised to a given share of the reference where it is below it.

        On an output of few entries the original's error may be small by luck; the typical share over several inputs
        (`typical`) is what it could as well have been.
        """
        kept = reference if self.where is None else reference[self.where]
        return replace(
            self,
            norm=max(self.norm, relative * norm(kept)),
            peak=max(self.peak, peak_relative * float(np.max(np.abs(kept), initial=0.0))),
        )

    @property
    def is_rounding(self) -> bool:
        """Whether this is rounding at all: an original that lost more than half its digits settles nothing.

        A flipped router or a masked row that a runtime treats otherwise makes an "error" that would hide any bug.
        """
        return not math.isfinite(self.relative) or self.relative <= math.sqrt(unit_roundoff(self.dtype))


def typical(noises: Sequence[Noise]) -> tuple[float, float]:
    """The medians of the finite relative noises: (of the norm, of the peak)."""

    def middle(values: list[float]) -> float:
        finite = [value for value in values if math.isfinite(value)]
        return float(np.median(finite)) if finite else 0.0

    return middle([n.relative for n in noises]), middle([n.peak_relative for n in noises])


def noise_ratio(
    rewritten: np.ndarray, original: np.ndarray, reference: np.ndarray, dtype: np.dtype | type | None = None
) -> float:
    """‖rewritten − r‖ / max(‖original − r‖, ‖ulp(r)‖); infinite where `rewritten` is not finite and the original is.

    All three have one shape; `reference` is float64; `dtype` is the storage type, that of `original` unless given.
    """
    noise = Noise.of(original, reference, dtype)
    wide = np.asarray(rewritten, np.float64)[noise.where]
    if not np.isfinite(wide).all():
        return math.inf
    error = norm(wide - reference[noise.where])
    return error / noise.norm if error else 0.0


@dataclass(frozen=True)
class TwoPrecisions:
    """Rounding shrinks by u64/u32 from float32 to float64; a bug stays. `limit` bounds the float64 error."""

    error_f64: float
    error_f32: float
    limit: float

    @property
    def is_bug(self) -> bool:
        """Whether the float64 error is too large to be rounding; a NaN is."""
        return not self.error_f64 <= self.limit

    def __str__(self) -> str:
        sign, word = (">", "a bug") if self.is_bug else ("≤", "rounding")
        return f"{self.error_f64:.1e} in float64 {sign} {self.limit:.1e}: {word}"


def two_precisions(error_f64: float, error_f32: float, dtype: np.dtype | type = np.float32) -> TwoPrecisions:
    """Judge relative errors of one rewrite: with unrounded constants in float64, and as run in `dtype`.

    The run's error counts as at least one rounding, since a run may be exact by luck.

    >>> two_precisions(1e-15, 1e-7).is_bug, two_precisions(1e-9, 1e-7).is_bug
    (False, True)
    """
    unit = unit_roundoff(dtype)
    limit = BUG_FACTOR * max(error_f32, unit) * unit_roundoff(np.float64) / unit
    return TwoPrecisions(error_f64, error_f32, limit)
