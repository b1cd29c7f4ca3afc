"""Observers are bounded, deterministic, and blind to how rows are cut; what they yield is what brute force finds."""

from __future__ import annotations

import gc
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rewrite.errors import RequestError
from rewrite.quantize import observers as module
from rewrite.quantize.format import Format
from rewrite.quantize.observers import METHODS, Histogram, Moments, Range, activation_parameters

KINDS = [(True, True), (True, False), (False, True), (False, False)]
"""Signed, symmetric."""

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32) | st.integers(-4, 4).map(float)
tables = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=numbers)


def histogram(rows: np.ndarray, bins: int = 1 << 14) -> Histogram:
    found = Histogram(bins)
    found.observe(rows.reshape(len(rows), -1))
    return found


def state(found: Histogram) -> tuple[object, ...]:
    return found.counts.tolist(), found.zeros, found.exponent, found.low, found.high


@settings(max_examples=40)
@given(tables, st.lists(st.integers(0, 8), max_size=4), st.randoms())
def test_a_histogram_is_the_same_however_rows_are_cut_and_ordered(rows: np.ndarray, cuts: list[int], random) -> None:
    whole, parts = histogram(rows, 16), Histogram(16)
    chunks = np.split(rows, sorted(cuts))
    random.shuffle(chunks)
    for chunk in chunks:
        parts.observe(chunk)
    assert state(parts) == state(whole)


@settings(max_examples=40)
@given(tables)
def test_a_histogram_counts_what_its_bins_hold(rows: np.ndarray) -> None:
    """By exact division; and half the width would not have held them."""
    found = histogram(rows, 16)
    counts = [0] * 16
    for number in rows[rows != 0].tolist():
        counts[math.floor(math.ldexp(number, -found.exponent)) + 8] += 1
    assert found.counts.tolist() == counts
    assert found.total == rows.size
    assert found.zeros == np.sum(rows == 0)
    assert (found.low, found.high) == (rows.min(), rows.max())
    largest = np.abs(rows).max()
    assert largest < 8 * found.width
    assert largest >= 4 * found.width or found.exponent == Histogram.SMALLEST_EXPONENT


def test_a_histogram_grows_over_all_magnitudes() -> None:
    found = histogram(np.array([[5e-324, -5e-324, 0.0]]), 16)
    found.observe(np.array([[1e308, -1e308]]))
    assert found.counts.sum() == 4
    assert found.zeros == 1
    assert np.all(np.isfinite(found.centres()))


@settings(max_examples=40)
@given(tables, st.integers(0, 8))
def test_a_range_is_that_of_each_channel(rows: np.ndarray, cut: int) -> None:
    found = Range(rows.shape[1])
    for chunk in np.split(rows, [min(cut, len(rows))]):
        found.observe(chunk)
    assert np.array_equal(found.low, rows.min(axis=0))
    assert np.array_equal(found.high, rows.max(axis=0))


@pytest.mark.parametrize("memory_bytes", [1 << 26, 0])
def test_moments_are_the_product_of_the_rows(memory_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, for small integers; read in between, in stripes that do not divide it, in memory and in a file."""
    monkeypatch.setattr(module, "STRIPE_ELEMENTS", 30)
    rows = np.random.default_rng(0).integers(-9, 10, (20, 13)).astype(np.float64)
    found = Moments(13, memory_bytes)
    assert not found.matrix.any()
    found.observe(rows[:0])
    for start in range(0, 20, 7):
        found.observe(rows[start : start + 7])
        seen = rows[: start + 7]
        assert np.array_equal(found.matrix, seen.T @ seen)
    assert found.rows == 20
    assert isinstance(found.matrix, np.memmap) == (memory_bytes == 0)


def test_large_moments_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    found = Moments(64, memory_bytes=0)
    found.observe(np.ones((3, 64)))
    assert found.matrix.sum() == 3 * 64 * 64
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path) in mapped.read_text()
    del found
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert not mapped.exists() or str(tmp_path) not in mapped.read_text()


@pytest.mark.parametrize("observer", [Range(3), Moments(3)], ids=["range", "moments"])
@pytest.mark.parametrize("rows", [np.ones(3), np.ones((2, 4)), np.full((1, 3), np.nan), np.full((1, 3), np.inf)])
def test_rows_that_do_not_fit_are_refused(observer: Range | Moments, rows: np.ndarray) -> None:
    with pytest.raises(RequestError, match="rows"):
        observer.observe(rows)


def test_a_histogram_refuses_what_is_not_finite_and_stays_as_it_was() -> None:
    found = histogram(np.ones((2, 3)))
    before = state(found)
    for wrong in (np.nan, np.inf):
        with pytest.raises(RequestError, match="finite"):
            found.observe(np.array([[1.0, wrong]]))
    assert state(found) == before
    with pytest.raises(RequestError, match="bins"):
        Histogram(100)


# What activations are quantized with.


def dequantized(rows: np.ndarray, scale: np.float32, point: int, *, bits: int, signed: bool) -> np.ndarray:
    low = -(1 << (bits - 1)) if signed else 0
    return (np.clip(np.rint(rows / float(scale)) + point, low, low + (1 << bits) - 1) - point) * float(scale)


def samples(kind: str, size: int = 20000) -> np.ndarray:
    rng = np.random.default_rng(7)
    match kind:
        case "normal":
            return rng.standard_normal((size, 1))
        case "relu":
            return np.maximum(rng.standard_normal((size, 1)), 0)
        case "skewed":
            return np.exp(rng.standard_normal((size, 1))) - 1
        case "negative":
            return -np.exp(rng.standard_normal((size, 1)))
        case "heavy":
            return rng.standard_t(3, (size, 1))
        case "outlier":
            rows = rng.standard_normal((size, 1))
            rows[:2] = [[300.0], [-40.0]]
            return rows
        case _:
            raise ValueError(kind)


SAMPLES = ("normal", "relu", "skewed", "negative", "heavy", "outlier")


@settings(max_examples=40)
@given(tables.filter(lambda rows: np.abs(rows).max() < 1e38), st.sampled_from(KINDS), st.sampled_from(METHODS))
def test_zero_is_exact_and_parameters_are_usable(rows: np.ndarray, kind: tuple[bool, bool], method: str) -> None:
    signed, symmetric = kind
    scale, point = activation_parameters(histogram(rows, 256), signed=signed, symmetric=symmetric, method=method)
    assert isinstance(scale, np.float32)
    assert isinstance(point, int)
    assert np.isfinite(scale)
    assert scale >= np.finfo(np.float32).tiny
    assert (-128 if signed else 0) <= point <= (127 if signed else 255)
    if symmetric:
        assert point == (0 if signed else 128)
    assert not dequantized(np.zeros(1), scale, point, bits=8, signed=signed).any()
    if method == "min-max":
        off = np.abs(dequantized(rows, scale, point, bits=8, signed=signed) - rows) / float(scale)
        assert np.all(off <= 0.5 + 256 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("signed", "symmetric"), KINDS)
def test_constant_tensors_are_exact(signed: bool, symmetric: bool, method: str) -> None:
    """Up to the rounding of the scale to float32."""
    for constant in (3.0, -3.0, 1e-30, 0.0):
        rows = np.full((50, 2), constant)
        scale, point = activation_parameters(histogram(rows), signed=signed, symmetric=symmetric, method=method)
        found = dequantized(rows, scale, point, bits=8, signed=signed)
        assert np.all(np.abs(found - rows) <= abs(constant) * np.finfo(np.float32).eps)
        assert constant or scale == 1


def test_a_percentile_keeps_its_share_and_no_bin_more() -> None:
    for kind in SAMPLES:
        rows = samples(kind)
        found = histogram(rows)
        for percentile in (99.0, 99.99, 100.0):
            scale, point = activation_parameters(found, method="percentile", percentile=percentile)
            cut = (1 - percentile / 100) / 2
            ends = np.quantile(rows, [cut, 1 - cut], method="inverted_cdf")
            low, high = min(float(ends[0]), 0.0), max(float(ends[1]), 0.0)
            covered = (255 * float(scale), -point * float(scale))
            slack = 2 * found.width + float(scale)
            assert abs(covered[0] - (high - low)) <= slack
            assert abs(covered[1] - low) <= slack


def squared_error(rows: np.ndarray, scale: float, point: int, signed: bool) -> float:
    return float(np.sum((dequantized(rows, np.float32(scale), point, bits=8, signed=signed) - rows) ** 2))


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize(("signed", "symmetric"), KINDS)
def test_mse_is_close_to_the_best_of_all_scales(kind: str, signed: bool, symmetric: bool) -> None:
    """On the samples, not their histogram: all zero points near the middle and ends, 200 scales each; within 2 %."""
    rows = samples(kind, 4000)
    found = activation_parameters(histogram(rows), signed=signed, symmetric=symmetric, method="mse")
    widest, _ = activation_parameters(histogram(rows), signed=signed, symmetric=symmetric, method="min-max")
    low = -128 if signed else 0
    points = [128 + low] if symmetric else range(low, low + 256, 5)
    best = min(
        squared_error(rows, float(widest) * factor, point, signed)
        for point in points
        for factor in np.geomspace(1 / 64, 1, 60)
    )
    assert squared_error(rows, float(found[0]), found[1], signed) <= 1.02 * best


def divergence(counts: np.ndarray, centres: np.ndarray, scale: float, point: int) -> float:
    """Σ p log(p / q), one bin after another, for codes 0 … 255."""
    inside = [i for i in range(len(counts)) if counts[i] and -0.5 <= centres[i] / scale + point <= 255.5]
    p, q = dict.fromkeys(inside, 0.0), dict.fromkeys(inside, 0.0)
    codes = {i: min(max(round(centres[i] / scale) + point, 0), 255) for i in inside}
    for i in np.flatnonzero(counts).tolist():
        p[min(max(i, inside[0]), inside[-1])] += float(counts[i])
    for i in inside:
        same = [j for j in inside if codes[j] == codes[i]]
        q[i] = sum(float(counts[j]) for j in same) / len(same)
    sums = sum(p.values()), sum(q.values())
    return sum(p[i] / sums[0] * math.log((p[i] / sums[0]) / (q[i] / sums[1])) for i in inside)


@pytest.mark.parametrize("kind", SAMPLES)
def test_entropy_is_the_divergence_and_no_worse_than_the_ends(kind: str) -> None:
    found = histogram(samples(kind, 3000), 1 << 10)
    chosen, widest = (activation_parameters(found, method=method) for method in ("entropy", "min-max"))
    ours, theirs = (divergence(found.counts, found.centres(), float(s), z) for s, z in (chosen, widest))
    assert ours <= theirs
    stored = module._Stored(Format(8, signed=False, symmetric=False))
    seen = found.counts > 0
    for (scale, point), expected in ((chosen, ours), (widest, theirs)):
        value = module._divergence(
            found.centres()[seen], found.counts[seen].astype(np.float64), stored, float(scale), point
        )
        assert math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("kind", ["skewed", "heavy", "outlier"])
def test_mirrored_data_are_cut_as_well(kind: str) -> None:
    """Asymmetric data too: what is cut from one end is cut from the other when they change places."""
    found, mirrored = histogram(samples(kind)), histogram(-samples(kind))
    for method in METHODS:
        (scale, point), (other, opposite) = (activation_parameters(each, method=method) for each in (found, mirrored))
        if method in ("min-max", "percentile"):
            assert math.isclose(scale, other, rel_tol=1e-2)
            assert abs(point + opposite - 255) <= 1
            continue
        measure = module._squared_error if method == "mse" else module._divergence
        seen = found.counts > 0
        ours, theirs = (
            measure(
                found.centres()[seen],
                found.counts[seen].astype(np.float64),
                module._Stored(Format(8, signed=False, symmetric=False)),
                *parameters,
            )
            for parameters in ((float(scale), point), (float(other), 255 - opposite))
        )
        assert math.isclose(ours, theirs, rel_tol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_one_sided_data_use_all_codes(method: str) -> None:
    assert activation_parameters(histogram(samples("relu")), method=method)[1] == 0
    assert activation_parameters(histogram(samples("negative")), method=method)[1] == 255
    assert activation_parameters(histogram(samples("relu")), signed=True, method=method)[1] == -128


def test_methods_cut_an_outlier() -> None:
    found = histogram(samples("outlier"))
    scales = {method: float(activation_parameters(found, method=method)[0]) for method in METHODS}
    assert scales["min-max"] == max(scales.values())
    assert scales["percentile"] < scales["min-max"] / 10
    assert scales["entropy"] < scales["min-max"] / 5


def test_parameters_do_not_depend_on_how_rows_were_cut() -> None:
    rows = samples("skewed")
    parts = Histogram()
    for chunk in np.array_split(rows[::-1], 13):
        parts.observe(chunk)
    for method, (signed, symmetric) in itertools.product(METHODS, KINDS):
        options = {"signed": signed, "symmetric": symmetric, "method": method}
        assert activation_parameters(parts, **options) == activation_parameters(histogram(rows), **options)


def test_what_makes_no_sense_is_refused() -> None:
    found = histogram(np.ones((2, 2)))
    for message, arguments in (
        ("calibration", {"method": "average"}),
        ("percentile", {"method": "percentile", "percentile": 40.0}),
        ("percentile", {"method": "percentile", "percentile": math.nan}),
        ("bits", {"bits": 5}),
    ):
        with pytest.raises(RequestError, match=message):
            activation_parameters(found, **arguments)
    with pytest.raises(RequestError, match="empty"):
        activation_parameters(Histogram())
    with pytest.raises(RequestError, match="at most"):
        activation_parameters(histogram(np.full((1, 1), 1e39)))
