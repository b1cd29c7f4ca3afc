"""Pairs that saturate on processors without VNNI: reproduced, and avoided at the least error."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rewrite.errors import RequestError
from rewrite.quantize.clipping import clip_by_error
from rewrite.quantize.format import Format
from rewrite.quantize.rounding import round_to_nearest
from rewrite.quantize.saturation import (
    SAFE_PAIR,
    accumulator_bound,
    multiply_add_pairs,
    pair_excess,
    saturating_product,
    unsaturated,
)

INT8 = Format(8, signed=True, symmetric=True)
PER_TENSOR = Format(8, signed=True, symmetric=True, per_tensor=True)


def exact(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return x.astype(np.int64) @ codes.astype(np.int64)


def bright(rows: int, inputs: int) -> np.ndarray:
    """Activations near 255."""
    return np.random.default_rng(0).integers(230, 256, (rows, inputs)).astype(np.uint8)


def weight(rows: int, columns: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns))


def test_pairs_saturate_as_the_instruction_does() -> None:
    """By the manual's formula, one number at a time, at all corners."""
    for (x0, x1), (w0, w1) in itertools.product(
        itertools.product((0, 1, 128, 255), repeat=2), itertools.product((-128, -127, -1, 0, 1, 64, 65, 127), repeat=2)
    ):
        expected = max(-32768, min(32767, x0 * w0 + x1 * w1))
        found = multiply_add_pairs(np.array([x0, x1], np.uint8), np.array([[w0], [w1]], np.int8))
        assert found.dtype == np.int16
        assert found.tolist() == [[expected]]


def test_a_last_row_without_a_partner_is_alone() -> None:
    x, codes = bright(2, 3), np.array([[127], [1], [127]], np.int8)
    assert np.array_equal(saturating_product(x, codes), exact(x, codes))
    assert pair_excess(codes).tolist() == [128]


def test_a_pair_is_safe_exactly_when_its_excess_says_so() -> None:
    """All pairs of codes, with the activations that make most of them."""
    codes = np.array(list(itertools.product(range(-128, 128), repeat=2)), np.int8).T
    corners = np.array(list(itertools.product((0, 255), repeat=2)), np.uint8)
    wrong = np.any(saturating_product(corners, codes) != exact(corners, codes), axis=0)
    assert np.array_equal(wrong, pair_excess(codes) > SAFE_PAIR)


def test_plain_int8_weights_saturate_and_unsaturated_ones_do_not() -> None:
    w, x = weight(64, 40), bright(16, 64)
    plain, safe = round_to_nearest(w, INT8), unsaturated(w, INT8)
    off = saturating_product(x, plain.codes) != exact(x, plain.codes)
    assert off.any()
    assert np.array_equal(saturating_product(x, safe.codes), exact(x, safe.codes))
    by_kernel = saturating_product(x, plain.codes) * plain.scales
    lost = np.max(np.abs(by_kernel - x @ w), axis=0)
    kept = np.max(np.abs(saturating_product(x, safe.codes) * safe.scales - x @ w), axis=0)
    assert kept.max() < lost.max() / 5


@given(
    arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(-1, 1, width=16)),
    st.sampled_from([INT8, PER_TENSOR]),
    st.integers(0, 2**31),
)
def test_no_pair_saturates_whatever_the_weights(w: np.ndarray, form: Format, seed: int) -> None:
    codes = unsaturated(w, form).codes
    x = np.random.default_rng(seed).choice(np.array([0, 1, 127, 254, 255], np.uint8), (20, len(w)))
    assert pair_excess(codes).max() <= SAFE_PAIR
    assert np.array_equal(saturating_product(x, codes), exact(x, codes))


def test_columns_that_are_safe_stay() -> None:
    w = weight(32, 30)
    w[1::2] *= -np.sign(w[1::2]) * np.sign(w[::2])  # no pair of one sign
    w[:, 7] = np.abs(w[:, 7])
    plain, safe = round_to_nearest(w, INT8), unsaturated(w, INT8)
    same = np.all(plain.codes == safe.codes, axis=0) & (plain.scales == safe.scales)[0]
    assert np.flatnonzero(~same).tolist() == [7]


def test_chosen_scales_are_kept_where_they_are_safe() -> None:
    w = weight(32, 30)
    w[1::2] *= -np.sign(w[1::2]) * np.sign(w[::2])
    clipped = clip_by_error(w, INT8)
    assert np.any(clipped.scales != round_to_nearest(w, INT8).scales)
    assert np.array_equal(unsaturated(w, INT8, clipped).scales, clipped.scales)


def squares(values: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.sum((values - w) ** 2, axis=0)


def test_no_worse_than_growing_the_scale_or_changing_codes_alone() -> None:
    """By brute force over all scales at which a code changes, and over all pairs of codes."""
    w = weight(10, 6)
    error = squares(unsaturated(w, INT8).values(), w)
    plain = round_to_nearest(w, INT8).scales[0]
    every = np.array(list(itertools.product(range(-127, 128), repeat=2)), np.int8)
    safe_pairs = every[pair_excess(every.T) <= SAFE_PAIR].astype(np.float64)
    for column, scale in enumerate(plain.astype(np.float64)):
        one = w[:, [column]]
        changes = np.nextafter((np.abs(one) / (np.arange(127) + 0.5)).astype(np.float32), np.float32(np.inf)).ravel()
        for grown in sorted({scale, *changes[changes > scale].astype(np.float64)}):
            codes = np.rint(one / grown)
            if pair_excess(codes.astype(np.int8)) <= SAFE_PAIR:
                # `grown` may be two float32 numbers too large.
                slack = 4 * np.finfo(np.float32).eps * np.sum(np.abs(codes * grown * (codes * grown - one)))
                assert error[column] <= squares(codes * grown, one) + slack
                break
        else:
            raise AssertionError("no scale is safe")
        best = sum(np.min(np.sum((safe_pairs * scale - one[at : at + 2, 0]) ** 2, axis=1)) for at in range(0, 10, 2))
        assert error[column] <= best * (1 + 1e-12)


def test_much_less_is_lost_than_by_seven_bits() -> None:
    """The peers' way (`reduce_range`) halves all codes: 6 dB; here on normal weights less than 3."""
    w = weight(256, 64)
    plain, safe = (squares(each.values(), w).sum() for each in (round_to_nearest(w, INT8), unsaturated(w, INT8)))
    scales = np.abs(w).max(axis=0) / 63
    halved = squares(np.rint(w / scales) * scales, w).sum()
    assert safe < 2 * plain
    assert halved > 3.5 * plain


def test_one_scale_for_all_columns() -> None:
    w = weight(32, 12)
    safe = unsaturated(w, PER_TENSOR)
    assert safe.scales.shape == (1, 1)
    assert pair_excess(safe.codes).max() <= SAFE_PAIR
    grown = np.abs(w).max() / 64
    assert squares(safe.values(), w).sum() <= squares(np.rint(w / grown) * grown, w).sum()


@pytest.mark.parametrize(
    "form", [Format(8, False, True), Format(8, True, False), Format(4, True, True), Format(8, True, True, 32)]
)
def test_other_formats_are_refused(form: Format) -> None:
    with pytest.raises(RequestError, match="pairs"):
        unsaturated(weight(4, 4), form)


def test_a_start_of_another_format_is_refused() -> None:
    with pytest.raises(RequestError, match="start"):
        unsaturated(weight(4, 4), INT8, round_to_nearest(weight(4, 4), PER_TENSOR))


def test_operands_of_other_dtypes_are_refused() -> None:
    with pytest.raises(RequestError, match="pairs"):
        saturating_product(np.ones((1, 2), np.int8), np.ones((2, 1), np.int8))
    with pytest.raises(RequestError, match="pairs"):
        pair_excess(np.ones((2, 1), np.uint8))


def test_the_accumulator_bound_holds_and_is_reached() -> None:
    codes = np.random.default_rng(2).integers(-128, 128, (9, 5)).astype(np.int8)
    bias = np.arange(-2, 3)
    bound = accumulator_bound(codes, bias=bias)
    most = np.where(codes > 0, 255, 0), np.where(codes < 0, 255, 0)
    sums = [np.abs(np.sum(x * codes.astype(np.int64), axis=0) + bias) for x in most]
    assert np.all(bound >= np.maximum(*sums))
    assert accumulator_bound(np.full((4, 1), -128, np.int8)).tolist() == [4 * 128 * 255]
    assert accumulator_bound(np.full((4, 1), 255, np.uint8), np.uint8(128), activation=128).tolist() == [4 * 127 * 128]


def test_the_accumulator_bound_does_not_overflow_itself() -> None:
    codes = np.broadcast_to(np.int8(-128), (1 << 20, 1))
    assert accumulator_bound(codes).tolist() == [255 * 128 << 20]
