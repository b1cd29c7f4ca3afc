"""Round to nearest covers every weight, and no error is larger than half a step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rewrite.errors import RequestError
from rewrite.quantize.format import LARGEST_WEIGHT, Format, each_row
from rewrite.quantize.rounding import round_to_nearest

FORMATS = [
    Format(bits, signed, symmetric, block)
    for bits, signed, symmetric, block in itertools.product((2, 4, 8), (True, False), (True, False), (0, 4))
] + [Format(8, signed, symmetric, 0, True) for signed, symmetric in itertools.product((True, False), repeat=2)]

SLACK = 256 * np.finfo(np.float64).eps
"""Of a quotient of up to 256 steps, in float64."""


def steps(quantized: object, rows: int) -> np.ndarray:
    return np.abs(each_row(quantized.scales.astype(np.float64), quantized.format, rows))  # pyright: ignore


weights = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-LARGEST_WEIGHT, LARGEST_WEIGHT) | st.floats(-1, 1, width=16),
)


@settings(max_examples=40)
@given(weights, st.sampled_from(FORMATS))
def test_no_error_is_larger_than_half_a_step(weight: np.ndarray, form: Format) -> None:
    quantized = round_to_nearest(weight, form)
    scales = steps(quantized, len(weight))
    assert np.all(scales >= np.finfo(np.float32).tiny)
    with np.errstate(over="raise", invalid="raise"):
        stored = quantized.values().astype(np.float32)
    assert np.all(np.isfinite(stored))
    assert np.all(np.abs(quantized.values() - weight) / scales <= 0.5 + SLACK)


@settings(max_examples=40)
@given(weights, st.sampled_from(FORMATS))
def test_zero_stays_zero_and_signs_stay(weight: np.ndarray, form: Format) -> None:
    values = round_to_nearest(weight, form).values()
    assert not values[weight == 0].any()
    assert np.all(values * np.sign(weight) >= 0)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_group_of_zeros_has_scale_one(form: Format) -> None:
    quantized = round_to_nearest(np.zeros((6, 3)), form)
    assert np.all(quantized.scales == 1)
    assert not quantized.values().any()


def test_halves_go_to_the_even_code() -> None:
    weight = np.array([[127.0], [0.5], [1.5], [2.5], [-0.5], [-1.5]])
    codes = round_to_nearest(weight, Format(8, signed=True, symmetric=True)).codes
    assert codes[:, 0].tolist() == [127, 0, 2, 2, 0, -2]


def test_halves_are_even_before_an_odd_zero_point_is_added() -> None:
    """As ONNX rounds: saturate(round(x / scale) + zero point)."""
    weight = np.array([[-1.0], [254.0], [0.5], [1.5]])
    quantized = round_to_nearest(weight, Format(8, signed=False, symmetric=False))
    assert quantized.scales == 1
    assert quantized.zero_points == 1
    assert (quantized.codes[:, 0] - 1).tolist() == [255, 254, 0, 2]  # −1 wraps in uint8


def test_codes_are_nearest_to_the_rounded_scale() -> None:
    """0.1 is no float32 number: by brute force over all codes."""
    weight = np.random.default_rng(0).standard_normal((40, 7)) * 0.1
    for form in FORMATS:
        quantized = round_to_nearest(weight, form)
        low, high = form.codes
        scales = each_row(quantized.scales.astype(np.float64), form, 40)
        points = each_row(quantized.zero_points.astype(np.float64), form, 40)
        every = (np.arange(low, high + 1) - points[..., None]) * scales[..., None]
        least = np.min(np.abs(every - weight[..., None]), axis=-1)
        assert np.all(np.abs(quantized.values() - weight) <= least * (1 + 4 * SLACK))


def test_the_longer_side_of_the_steps_goes_where_it_covers_most() -> None:
    """Largest entry above, then below; both sides equal; and a case that minus largest / 8 does not cover."""
    form = Format(4, signed=False, symmetric=True)
    weight = np.array([[8.0, -8.0, 7.0, 8.0], [-7.0, 7.0, -7.0, -8.0]])
    scales = round_to_nearest(weight, form).scales[0]
    assert scales[0] == -1
    assert scales[1] == 1
    assert abs(scales[2]) == 1
    assert abs(scales[3]) == np.float32(8 / 7) or abs(scales[3]) == np.nextafter(np.float32(8 / 7), np.float32(2))


def test_all_is_covered_where_the_peers_scale_leaves_a_whole_step_out() -> None:
    """max / −8 on a group with entries of ±max: the other end is cut to 7 steps of 8."""
    weight = np.array([[8.0], [-8.0], [1.0]])
    peers = np.clip(np.rint(weight / -1.0), -8, 7) * -1.0
    assert np.max(np.abs(peers - weight)) == 1.0
    quantized = round_to_nearest(weight, Format(4, signed=False, symmetric=True))
    assert np.max(np.abs(quantized.values() - weight)) / abs(quantized.scales[0, 0]) <= 0.5 + SLACK


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 2 * LARGEST_WEIGHT])
def test_weights_without_room_in_float32_are_refused(wrong: float) -> None:
    with pytest.raises(RequestError, match="a weight of"):
        round_to_nearest(np.array([[1.0, wrong]]), FORMATS[0])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (1, 2, 3)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="shape"):
        round_to_nearest(np.ones(shape), FORMATS[0])
