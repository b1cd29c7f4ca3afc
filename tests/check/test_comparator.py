"""The comparator first: what it must reject, and that it accepts the identity. Then its metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewrite.check.compare import ABOVE, DIFFERENT, UNSETTLED, WITHIN, compare, logit_agreement
from rewrite.check.noise import Noise

RNG = np.random.default_rng(7)
REFERENCE = RNG.standard_normal((16, 16)) + 0.25
ORIGINAL = (REFERENCE * (1 + 2.0**-22 * RNG.standard_normal((16, 16)))).astype(np.float32)
NOISE = Noise.of(ORIGINAL, REFERENCE)


def with_entry(value: float) -> np.ndarray:
    wrong = ORIGINAL.copy()
    wrong[3, 5] = value
    return wrong


REJECTED = {
    "times 1.001": ORIGINAL * np.float32(1.001),
    "times 0.5": ORIGINAL * np.float32(0.5),
    "times 1000": ORIGINAL * np.float32(1000),
    "sign flip": -ORIGINAL,
    "sign of one entry": with_entry(-ORIGINAL[3, 5]),
    "transpose": ORIGINAL.T,
    "zeros": np.zeros_like(ORIGINAL),
    "one NaN": with_entry(np.nan),
    "one infinity": with_entry(np.inf),
    "shifted index": np.roll(ORIGINAL, 1, axis=-1),
    "shifted rows": np.roll(ORIGINAL, 1, axis=0),
    "one entry off by a thousandth": with_entry(ORIGINAL[3, 5] * 1.001),
    "wider type": ORIGINAL.astype(np.float64),
    "narrower type": ORIGINAL.astype(np.float16),
    "another shape": ORIGINAL.reshape(8, 32),
    "a lost axis": ORIGINAL[0],
    "a broadcast": ORIGINAL[:1],
}


@pytest.mark.parametrize("name", REJECTED)
def test_comparator_rejects(name):
    result = compare(REJECTED[name], REFERENCE, np.float32, NOISE)
    assert not result.accepted
    assert result.verdict in (ABOVE, DIFFERENT)
    assert result.reason


def test_comparator_accepts_the_identity():
    assert compare(ORIGINAL, REFERENCE, np.float32, NOISE).accepted
    assert compare(REFERENCE.astype(np.float32), REFERENCE, np.float32, NOISE).accepted
    assert compare(REFERENCE.astype(np.float32), REFERENCE, np.float32, Noise.floor(REFERENCE, np.float32)).accepted


def test_comparator_accepts_another_rounding():
    again = (REFERENCE * (1 + 2.0**-22 * RNG.standard_normal((16, 16)))).astype(np.float32)
    result = compare(again, REFERENCE, np.float32, NOISE)
    assert result.accepted
    assert 0.5 < result.noise_ratio < 2


def test_one_wrong_entry_among_a_million_is_seen():
    """In the norm it is lost: 1e-4 of one entry against a thousand times the rounding of each."""
    reference = RNG.standard_normal(1 << 20)
    original = reference.astype(np.float32)
    wrong = original.copy()
    wrong[123] += 1e-5
    result = compare(wrong, reference, np.float32, Noise.of(original, reference))
    assert result.noise_ratio < 8
    assert result.verdict == ABOVE


def test_noise_that_is_no_rounding_settles_nothing():
    """A flipped router makes the original wrong by a tenth; "as good as that" is no evidence."""
    original = (REFERENCE * np.where(np.arange(16) < 2, 1.3, 1.0)).astype(np.float32)
    assert compare(ORIGINAL, REFERENCE, np.float32, Noise.of(original, REFERENCE)).verdict == UNSETTLED


def test_same_not_a_number_pattern_is_accepted_and_another_is_not():
    reference, original = REFERENCE.copy(), ORIGINAL.copy()
    reference[0, 0] = original[0, 0] = np.nan
    noise = Noise.of(original, reference)
    assert compare(original, reference, np.float32, noise).accepted
    assert not compare(ORIGINAL, reference, np.float32, noise).accepted


def test_masking_values_neither_hide_errors_nor_count_as_errors():
    """finfo.min + score: its ulp is 2e31, which as a norm would excuse everything else."""
    lowest = float(np.finfo(np.float32).min)
    mask = np.zeros((16, 16), bool)
    mask[:, 9:] = True
    reference = np.where(mask, lowest + REFERENCE, REFERENCE)
    original = np.where(mask, lowest, ORIGINAL).astype(np.float32)
    noise = Noise.of(original, reference)
    assert compare(original, reference, np.float32, noise).accepted
    assert compare(np.where(mask, -np.inf, ORIGINAL).astype(np.float32), reference, np.float32, noise).accepted
    assert not compare((original * np.where(mask, 1, 1.001)).astype(np.float32), reference, np.float32, noise).accepted
    assert compare(ORIGINAL, reference, np.float32, noise).verdict == DIFFERENT
    assert compare(np.where(mask, np.inf, ORIGINAL).astype(np.float32), reference, np.float32, noise).reason


def test_integers_are_compared_exactly():
    indices = np.array([3, 1, 2])
    noise = Noise.floor(indices, np.float32)
    assert compare(indices, indices, np.int64, noise).accepted
    assert compare(np.array([3, 2, 1]), indices, np.int64, noise).verdict == DIFFERENT
    assert compare(indices.astype(np.int32), indices, np.int64, noise).verdict == DIFFERENT


def test_an_empty_output_is_equal():
    empty = np.zeros((0, 3), np.float32)
    assert compare(empty, empty.astype(np.float64), np.float32, Noise.of(empty, empty.astype(np.float64))).accepted


def test_metrics_of_a_known_error():
    reference = np.array([3.0, 4.0])
    candidate = np.array([3.0, 4.5], np.float32)
    result = compare(candidate, reference, np.float32, Noise.floor(reference, np.float32))
    assert result.max_abs == 0.5
    assert result.relative == 0.1
    assert result.sqnr_db == pytest.approx(20.0, abs=1e-12)
    assert result.max_ulps == 0.5 / 2.0**-21
    assert result.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)), abs=1e-12)


def test_logits_that_flip_only_where_the_lead_is_small():
    reference = np.array([[2.0, 1.0, 0.0], [1.0, 1.0001, 0.0]])
    flipped = np.array([[2.0, 1.0, 0.0], [1.0002, 1.0001, 0.0]])
    agreement = logit_agreement(flipped, reference)
    assert agreement.top1 == 0.5
    assert agreement.topk == 1.0
    assert agreement.flip_margin == pytest.approx(0.0001)
    assert 0 <= agreement.kl_mean <= agreement.kl_max < 1e-7
    assert logit_agreement(reference, reference).kl_max == 0


def test_divergence_of_two_known_distributions():
    p, q = np.array([[0.25, 0.75]]), np.array([[0.5, 0.5]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert logit_agreement(np.log(q), np.log(p)).kl_mean == pytest.approx(expected, abs=1e-15)


@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 1e4), st.integers(1, 5))
def test_scaling_by_a_thousandth_is_rejected_at_every_size_and_magnitude(seed, magnitude, rank):
    rng = np.random.default_rng(seed)
    reference = magnitude * (rng.standard_normal(rng.integers(2, 5, rank)) + 0.1)
    original = reference.astype(np.float32)
    noise = Noise.of(original, reference)
    assert compare(original, reference, np.float32, noise).verdict == WITHIN
    assert not compare(original * np.float32(1.001), reference, np.float32, noise).accepted
    assert not compare(original * np.float32(0.999), reference, np.float32, noise).accepted
