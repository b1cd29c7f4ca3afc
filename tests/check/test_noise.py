"""The measure of noise: ulps, norms, the ratio and the two-precisions test."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rewrite.check.noise import Noise, noise_ratio, norm, two_precisions, typical, ulp, unit_roundoff

FLOATS = st.floats(-(2.0**100), 2.0**100, allow_nan=False, width=32)
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=FLOATS)
TYPES = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)


@given(ARRAYS)
def test_ulp_is_numpy_spacing(values):
    np.testing.assert_array_equal(ulp(values, np.float32), np.spacing(np.abs(values)).astype(np.float64))


@pytest.mark.parametrize("dtype", TYPES)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    values = np.array([0.0, 1.0, 1.5, 3.0, 100.0, 1e-3]).astype(dtype)
    following = np.nextafter(values, np.array(np.inf).astype(dtype)).astype(np.float64)
    np.testing.assert_array_equal(ulp(values, dtype), following - values.astype(np.float64))


@pytest.mark.parametrize("dtype", TYPES)
def test_unit_roundoff_is_the_largest_relative_rounding(dtype):
    unit = unit_roundoff(dtype)
    one = np.array(1.0)
    assert (one + unit).astype(dtype).astype(np.float64) == 1.0
    assert (one + 1.5 * unit).astype(dtype).astype(np.float64) != 1.0


@given(ARRAYS)
def test_rounding_is_within_half_an_ulp_in_norm(values):
    exact = values.astype(np.float64) * (1 + 2.0**-30)
    rounded = exact.astype(np.float32)
    assert noise_ratio(rounded, rounded, exact) <= 0.5 + 1e-6


@given(ARRAYS, st.floats(0.125, 64))
def test_ratio_is_the_error_over_the_originals(exact, factor):
    exact = exact.astype(np.float64)
    step = 64 * ulp(exact, np.float32)
    ratio = noise_ratio(exact + factor * step, exact + step, exact, np.float32)
    assert ratio == pytest.approx(factor, rel=2.0**-20)


@given(ARRAYS)
def test_an_exact_original_has_one_ulp_of_noise(exact):
    exact = exact.astype(np.float64)
    original = exact.astype(np.float32)
    assert noise_ratio(original, original, exact) == 0
    assert noise_ratio(exact + ulp(exact, np.float32), original, exact) == pytest.approx(1, rel=2.0**-20)


@given(ARRAYS, st.sampled_from([2.0**-20, 2.0**20]))
def test_ratio_does_not_see_a_common_power_of_two(exact, factor):
    exact = exact.astype(np.float64)
    exact = np.where(np.abs(exact) > 1e-20, exact, 1.0)  # away from subnormal numbers, which are evenly spaced
    error = 5 * ulp(exact, np.float32)
    assert noise_ratio(exact + error, exact, exact, np.float32) == pytest.approx(
        noise_ratio(factor * (exact + error), factor * exact, factor * exact, np.float32), rel=2.0**-20
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losing_a_finite_entry_is_infinitely_bad(bad):
    exact = np.ones(3)
    assert noise_ratio(np.array([1, bad, 1]), np.ones(3, np.float32), exact) == math.inf


def test_nothing_is_asked_where_the_original_is_not_finite():
    exact = np.array([1.0, 1e39])  # overflows float32 in the original
    original = np.array([1.0, np.inf], np.float32)
    assert noise_ratio(np.array([1.0, -5.0], np.float32), original, exact) == 0


def test_norm_of_huge_and_tiny_values():
    assert norm(np.array([3e200, 4e200])) == pytest.approx(5e200)
    assert norm(np.array([3e-200, 4e-200])) == pytest.approx(5e-200)
    assert norm(np.zeros(3)) == 0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        Noise.of(np.zeros(3, np.float32), np.zeros(4))


def test_luck_of_a_single_entry_is_raised_to_the_typical_share():
    exact = np.array([1.0])
    noises = [Noise.of(np.array([1 + step], np.float32), exact) for step in (0, 2.0**-18, 2.0**-18)]
    raised = noises[0].at_least(*typical(noises), exact)
    assert raised.norm == pytest.approx(2.0**-18)
    assert noises[1].at_least(*typical(noises), exact).norm == noises[1].norm


def test_noise_is_rounding_up_to_half_of_the_digits():
    exact = np.ones(4)
    assert Noise.of(np.full(4, 1 + 1e-4, np.float32), exact).is_rounding
    assert not Noise.of(np.full(4, 1 + 1e-3, np.float32), exact).is_rounding
    assert Noise.of(np.full(4, 1 + 1e-3, np.float16), exact).is_rounding


def test_two_precisions_tell_a_bug_from_rounding():
    assert not two_precisions(1e-15, 1e-7).is_bug
    assert two_precisions(1e-8, 1e-7).is_bug
    assert two_precisions(1e-7, 1e-7).is_bug
    assert two_precisions(math.nan, 1e-7).is_bug
    assert two_precisions(math.inf, 1e-7).is_bug
    assert not two_precisions(2.0**-52, 0.0).is_bug
    assert "bug" in str(two_precisions(1e-3, 1e-7))


@given(st.floats(2.0**-24, 1e-2))
def test_two_precisions_limit_is_a_hundred_times_the_scaled_error(error):
    limit = two_precisions(0.0, error).limit
    assert limit == pytest.approx(100 * error * 2.0**-29, rel=1e-12)
    assert not two_precisions(limit, error).is_bug
    assert two_precisions(limit * 1.01, error).is_bug
