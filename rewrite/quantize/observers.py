"""What calibration keeps of a value's rows, in memory that does not grow with them, and what formats make of it.

An observer takes in rows (n, C), as often as there are any. Ranges and histograms are the same however the same rows
are cut into calls; moments are sums in float64, in the order of the calls.

`activation_parameters` chooses what a histogram's tensor is quantized with:

    min-max      its ends
    percentile   its ends less a share of the numbers, half of it at each
    mse          least Σ (x − x̂)²
    entropy      least Kullback-Leibler divergence Σ p log(p / q) of the histogram p, numbers outside moved to its ends,
                 from q, in which the bins of a code share its count

Source    Migacz 2017, "8-bit Inference with TensorRT" (entropy; there a threshold on magnitudes, here two ends)
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable
from typing import Protocol

import numpy as np

from rewrite.errors import RequestError
from rewrite.quantize.format import LARGEST_WEIGHT, Format
from rewrite.quantize.rounding import asymmetric, symmetric

METHODS = ("min-max", "percentile", "mse", "entropy")

MEMORY_BYTES = 1 << 26
"""Moments larger than this (64 MiB) are kept in a temporary file."""

STRIPE_ELEMENTS = 1 << 21
"""Entries of moments computed at a time (16 MiB)."""


class Observer(Protocol):
    """What gathers numbers of one value."""

    def observe(self, rows: np.ndarray) -> None:
        """Take in rows (n, C), float64. Raises RequestError where they are not finite or of another width."""


def _checked(rows: np.ndarray, channels: int | None = None) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2 or (channels is not None and rows.shape[1] != channels):
        raise RequestError(f"rows of shape {rows.shape}", remedy=f"(n, {'C' if channels is None else channels})")
    if not np.all(np.isfinite(rows)):
        raise RequestError("rows that are not finite", remedy="calibrate on inputs that the network is defined on")
    return rows


class Range:
    """The least and largest number of each channel: `low` and `high` (C,), +∞ and −∞ before any row."""

    def __init__(self, channels: int) -> None:
        self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)

    def observe(self, rows: np.ndarray) -> None:
        rows = _checked(rows, len(self.low))
        np.minimum(self.low, rows.min(axis=0, initial=np.inf), out=self.low)
        np.maximum(self.high, rows.max(axis=0, initial=-np.inf), out=self.high)


class Histogram:
    """Counts of all numbers of a tensor, in `bins` bins whose width is a power of two.

    Bin i holds i·width ≤ x < (i + 1)·width for −bins/2 ≤ i < bins/2, `counts[i + bins/2]`, without zeros, which
    `zeros` counts. The width is the least that holds all numbers so far; as it grows bins merge, so that counts are
    what they were had it been known from the start. `low` and `high` are the ends, +∞ and −∞ before any number.
    """

    SMALLEST_EXPONENT = -149
    """Of the width, that of the smallest float32 number."""

    def __init__(self, bins: int = 1 << 14) -> None:
        if bins < 2 or bins & (bins - 1):
            raise RequestError(f"{bins} bins", remedy="a power of two")
        self.counts = np.zeros(bins, np.int64)
        self.zeros = 0
        self.exponent = self.SMALLEST_EXPONENT
        self.low, self.high = math.inf, -math.inf

    @property
    def width(self) -> float:
        return math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        """How many numbers were seen."""
        return int(self.counts.sum()) + self.zeros

    def centres(self) -> np.ndarray:
        """Of the bins, float64 (bins,)."""
        half = len(self.counts) // 2
        return (np.arange(-half, half) + 0.5) * self.width

    def observe(self, rows: np.ndarray) -> None:
        numbers = _checked(rows).ravel()
        if not numbers.size:
            return
        self.low, self.high = min(self.low, float(numbers.min())), max(self.high, float(numbers.max()))
        half = len(self.counts) // 2
        largest = max(abs(self.low), abs(self.high))
        needed = math.frexp(largest)[1] - half.bit_length() + 1 if largest else self.SMALLEST_EXPONENT
        if needed > self.exponent:
            merged = (np.arange(-half, half) >> min(needed - self.exponent, 62)) + half
            counts = np.zeros_like(self.counts)
            np.add.at(counts, merged, self.counts)
            self.counts, self.exponent = counts, needed
        numbers = numbers[numbers != 0]
        places = np.floor(np.ldexp(numbers, -self.exponent)).astype(np.int64) + half
        self.counts += np.bincount(places, minlength=2 * half)
        self.zeros += rows.size - numbers.size


class Moments:
    """Second moments XᵀX of rows X (n, C): `matrix` (C, C) in float64, and their number `rows`.

    Larger ones than `MEMORY_BYTES` lie in a temporary file without a name, which goes when the object does.
    """

    def __init__(self, channels: int, memory_bytes: int = MEMORY_BYTES) -> None:
        self.rows = 0
        self._mirrored = True
        shape = (channels, channels)
        if channels * channels * 8 <= memory_bytes:
            self._upper = np.zeros(shape)
        else:
            with tempfile.TemporaryFile() as file:
                self._upper = np.memmap(file, np.float64, "w+", shape=shape)

    @property
    def matrix(self) -> np.ndarray:
        """XᵀX; symmetric to the last bit."""
        if not self._mirrored:
            for start, stop in self._stripes():
                self._upper[start:, start:stop] = self._upper[start:stop, start:].T
            self._mirrored = True
        return self._upper

    def observe(self, rows: np.ndarray) -> None:
        rows = _checked(rows, len(self._upper))
        self._mirrored = self._mirrored and not len(rows)
        self.rows += len(rows)
        for start, stop in self._stripes() if len(rows) else ():
            self._upper[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]

    def _stripes(self) -> list[tuple[int, int]]:
        channels = len(self._upper)
        step = max(1, STRIPE_ELEMENTS // max(1, channels))
        return [(start, min(start + step, channels)) for start in range(0, channels, step)]


def activation_parameters(
    histogram: Histogram,
    *,
    bits: int = 8,
    signed: bool = False,
    symmetric: bool = False,
    method: str = "mse",
    percentile: float = 99.99,
) -> tuple[np.float32, int]:
    """Scale (positive) and zero point with which QuantizeLinear stores a tensor in `bits` bits; zero is exact.

    `symmetric`: the zero point is in the middle. `percentile`: the share of the numbers, in %, that "percentile" keeps.
    A tensor of zeros has scale 1. "mse" and "entropy" are never worse than "min-max" in what they make small, measured
    on the histogram's bins.

    Raises RequestError for another method or format, an empty histogram, and numbers that float32 has no room for.
    """
    if method not in METHODS:
        raise RequestError(f"no calibration {method!r}", remedy=f"one of {', '.join(METHODS)}")
    if not 50 < percentile <= 100:
        raise RequestError(f"a percentile of {percentile}", remedy="more than 50, at most 100")
    if not histogram.total:
        raise RequestError("an empty histogram", remedy="calibrate on inputs that reach this value")
    below, above = max(-histogram.low, 0.0), max(histogram.high, 0.0)
    if max(below, above) > LARGEST_WEIGHT:
        raise RequestError(f"numbers up to {max(below, above):.3g}", remedy=f"at most {LARGEST_WEIGHT:.3g}")
    stored = _Stored(Format(bits, signed, symmetric))
    if method == "percentile":
        below, above = _inner(histogram, (1 - percentile / 100) / 2, below, above)
    elif method != "min-max":
        measure = _squared_error if method == "mse" else _divergence
        below, above = _searched(histogram, stored, measure, below, above)
    scale, point = stored.parameters(below, above)
    return np.float32(scale), int(point)


class _Stored:
    """How QuantizeLinear stores numbers: all codes of the dtype are reached, −128 too."""

    def __init__(self, format: Format) -> None:
        self.format = format
        half = 1 << (format.bits - 1)
        self.low, self.high = (-half, half - 1) if format.signed else (0, 2 * half - 1)

    def parameters(self, below: float, above: float) -> tuple[float, int]:
        """Scale and zero point whose codes cover −below … above."""
        ends = np.array([[below]]), np.array([[above]])
        if not self.format.symmetric:
            scale, point = asymmetric(*ends, self.format)
            return float(scale[0, 0]), int(point[0, 0])
        return float(symmetric(*ends, self.format)[0][0, 0]), self.format.middle

    def codes(self, numbers: np.ndarray, scale: float, point: int) -> np.ndarray:
        return np.clip(np.rint(numbers / scale) + point, self.low, self.high)


_Measure = Callable[[np.ndarray, np.ndarray, _Stored, float, int], float]
"""Of numbers and how often they occur, the loss of a format, scale and zero point."""


def _inner(histogram: Histogram, cut: float, below: float, above: float) -> tuple[float, float]:
    """The ends without a share `cut` of all numbers at each: the outer edges of the bins it ends in."""
    half = len(histogram.counts) // 2
    counts = histogram.counts.astype(np.float64)
    counts[half] += histogram.zeros
    limit = cut * histogram.total
    first = int(np.argmax(np.cumsum(counts) > limit))
    last = len(counts) - 1 - int(np.argmax(np.cumsum(counts[::-1]) > limit))
    low, high = (first - half) * histogram.width, (last - half + 1) * histogram.width
    return min(below, max(-low, 0.0)), min(above, max(high, 0.0))


def _searched(
    histogram: Histogram, stored: _Stored, measure: _Measure, below: float, above: float
) -> tuple[float, float]:
    """The ends of least loss: both moved by one factor, or one of them alone, ever finer."""
    seen = histogram.counts > 0
    numbers, counts = histogram.centres()[seen], histogram.counts[seen].astype(np.float64)
    if not len(numbers):
        return below, above

    def loss(ends: tuple[float, float]) -> float:
        return measure(numbers, counts, stored, *stored.parameters(*ends))

    best, least = (below, above), loss((below, above))
    coarse = 2.0 ** -(np.arange(1, 41) / 4)
    for factors in (coarse, coarse, *(2.0 ** np.linspace(-spread, spread, 17) for spread in (1.0, 0.25, 0.0625))):
        start = best
        for factor, (lower, upper) in itertools.product(factors, ((True, True), (True, False), (False, True))):
            candidate = (
                min(start[0] * factor, below) if lower else start[0],
                min(start[1] * factor, above) if upper else start[1],
            )
            # A code needs some bins, or a histogram says nothing of what it loses.
            if stored.parameters(*candidate)[0] >= 2 * histogram.width and (found := loss(candidate)) < least:
                best, least = candidate, found
    return best


def _squared_error(numbers: np.ndarray, counts: np.ndarray, stored: _Stored, scale: float, point: int) -> float:
    steps = stored.codes(numbers, scale, point) - point
    return float(np.dot(counts, np.square(steps * scale - numbers)))


def _divergence(numbers: np.ndarray, counts: np.ndarray, stored: _Stored, scale: float, point: int) -> float:
    """Σ p log(p / q) over the bins inside; p has what lies outside in its outermost bins, q shares a code's own out."""
    low, high = (stored.low - point - 0.5) * scale, (stored.high - point + 0.5) * scale
    first, last = np.searchsorted(numbers, low), np.searchsorted(numbers, high, side="right")
    if last <= first:
        return math.inf
    own = counts[first:last]
    p = own.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    codes = stored.codes(numbers[first:last], scale, point).astype(np.int64) - stored.low
    masses = np.bincount(codes, weights=own)
    q = (masses / np.maximum(np.bincount(codes), 1))[codes]
    return float(np.sum(p * np.log((p / p.sum()) / (q / q.sum()))) / p.sum())
