"""Clipped scales: never worse than those that cover all or the peers', and close to the best there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rewrite.errors import RequestError
from rewrite.quantize.clipping import CHUNK_ELEMENTS, clip_by_error
from rewrite.quantize.format import Format, Quantized, stored_scale
from rewrite.quantize.rounding import round_to_nearest

FORMATS = [
    Format(bits, False, symmetric, block)
    for bits, symmetric, block in itertools.product((2, 4, 8), (True, False), (0, 4))
] + [Format(8, True, True), Format(8, True, False, 0, True)]


def errors(quantized: Quantized, weight: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Σ h·(w − ŵ)² of each group (groups, N), or (1, 1) per tensor."""
    squares = (quantized.values() - weight) ** 2
    if importance is not None:
        squares *= importance[:, None]
    if quantized.format.per_tensor:
        return squares.sum().reshape(1, 1)
    starts = np.arange(0, len(weight), quantized.format.block or len(weight))
    return np.add.reduceat(squares, starts, axis=0)


@settings(max_examples=40)
@given(
    arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(-9, 9, width=32)),
    st.sampled_from(FORMATS),
    st.booleans(),
)
def test_never_worse_than_nearest_in_any_group(weight: np.ndarray, form: Format, important: bool) -> None:
    importance = np.arange(len(weight), dtype=np.float64) if important else None
    clipped = errors(clip_by_error(weight, form, importance), weight, importance)
    nearest = errors(round_to_nearest(weight, form), weight, importance)
    assert np.all(clipped <= nearest * (1 + len(weight) * weight.shape[1] * np.finfo(np.float64).eps))


def test_never_worse_than_the_peers_scale() -> None:
    """The entry of largest magnitude on step −8, as ONNX Runtime's own quantizer has it."""
    weight = np.random.default_rng(1).standard_normal((32, 400))
    form = Format(4, signed=False, symmetric=True, block=32)
    largest = np.take_along_axis(weight, np.abs(weight).argmax(axis=0)[None], axis=0)
    scales = stored_scale(largest / -8)
    theirs = np.sum((np.clip(np.rint(weight / scales), -8, 7) * scales - weight) ** 2, axis=0)
    ours = errors(clip_by_error(weight, form), weight)[0]
    assert np.all(ours <= theirs * (1 + 32 * np.finfo(np.float64).eps))
    assert ours.sum() < theirs.sum()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_close_to_the_best_scale_and_zero_point(bits: int, symmetric: bool) -> None:
    """Against all zero points and 200 scales a sign: three quarters of what these save over nearest are saved."""
    weight = np.random.default_rng(2).standard_normal((32, 60))
    form = Format(bits, signed=False, symmetric=symmetric, block=32)
    low, high = form.codes
    largest = np.abs(weight).max(axis=0)
    best = np.full(60, np.inf)
    for point in [form.middle] if symmetric else range(low, high + 1):
        for factor in np.linspace(0.2, 2.5, 200):
            for sign in (1, -1) if symmetric else (1,):
                scale = sign * factor * largest / (1 << (bits - 1))
                codes = np.clip(np.rint(weight / scale) + point, low, high)
                best = np.minimum(best, np.sum(((codes - point) * scale - weight) ** 2, axis=0))
    ours = errors(clip_by_error(weight, form), weight).sum()
    nearest = errors(round_to_nearest(weight, form), weight).sum()
    assert nearest - ours >= 0.75 * (nearest - best.sum())


def test_an_outlier_is_cut_where_that_costs_less() -> None:
    """Two bits, 63 entries of ±1 and one of 3: the scale of the many is exact for all but the outlier."""
    weight = np.ones((64, 1))
    weight[::2] = -1
    weight[0] = 3
    quantized = clip_by_error(weight, Format(2, signed=False, symmetric=True))
    assert errors(round_to_nearest(weight, quantized.format), weight) > 2 * errors(quantized, weight)


def test_importance_decides_whose_error_counts() -> None:
    weight = np.random.default_rng(3).standard_normal((64, 9))
    form = Format(4, signed=False, symmetric=True)
    importance = np.where(np.arange(64) < 8, 1.0, 1e-3)
    weighted, plain = clip_by_error(weight, form, importance), clip_by_error(weight, form)
    assert errors(weighted, weight, importance).sum() < errors(plain, weight, importance).sum()
    assert errors(weighted, weight).sum() > errors(plain, weight).sum()


def test_importance_counts_only_by_ratio() -> None:
    weight = np.random.default_rng(4).standard_normal((16, 9))
    form = Format(4, signed=False, symmetric=False, block=8)
    importance = np.arange(1.0, 17)
    small, large = (clip_by_error(weight, form, importance * factor) for factor in (2.0**-900, 2.0**900))
    assert np.array_equal(small.codes, large.codes)
    assert np.array_equal(small.scales, large.scales)


def test_without_importance_a_group_is_rounded_to_nearest() -> None:
    weight = np.random.default_rng(5).standard_normal((16, 9))
    form = Format(4, signed=False, symmetric=True, block=8)
    importance = np.where(np.arange(16) < 8, 0.0, 1.0)
    clipped, nearest = clip_by_error(weight, form, importance), round_to_nearest(weight, form)
    assert np.array_equal(clipped.scales[0], nearest.scales[0])
    assert np.array_equal(clip_by_error(weight, form, np.zeros(16)).codes, nearest.codes)


def test_columns_are_searched_alone() -> None:
    """A matrix longer than a chunk gives what its columns give."""
    weight = np.random.default_rng(6).standard_normal((CHUNK_ELEMENTS // 3, 7))
    form = Format(8, signed=True, symmetric=True)
    whole = clip_by_error(weight, form)
    for column in (0, 3, 6):
        assert np.array_equal(whole.codes[:, column], clip_by_error(weight[:, column, None], form).codes[:, 0])


def test_eight_bits_keep_positive_scales() -> None:
    weight = np.abs(np.random.default_rng(7).standard_normal((16, 20)))
    for signed in (True, False):
        assert np.all(clip_by_error(weight, Format(8, signed, symmetric=True)).scales > 0)


@pytest.mark.parametrize("wrong", [np.ones(3), np.ones((4, 1)), -np.ones(4), np.full(4, np.nan)])
def test_importances_that_do_not_fit_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(RequestError, match="importances"):
        clip_by_error(np.ones((4, 2)), FORMATS[0], wrong)
