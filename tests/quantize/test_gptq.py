"""GPTQ against the algorithm as published, and never worse than rounding to nearest whatever the data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewrite.errors import RequestError
from rewrite.quantize import gptq as module
from rewrite.quantize.clipping import clip_by_error, clipped
from rewrite.quantize.format import Format, Quantized, each_row
from rewrite.quantize.gptq import gptq, weighted_errors
from rewrite.quantize.rounding import round_to_nearest

FORMATS = [
    Format(4, signed=False, symmetric=True, block=16),
    Format(4, signed=False, symmetric=False, block=16),
    Format(2, signed=False, symmetric=True, block=32),
    Format(8, signed=True, symmetric=True),
    Format(8, signed=False, symmetric=False, per_tensor=True),
]


def weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns))


def correlated(rows: int, inputs: int, seed: int = 1) -> np.ndarray:
    """Inputs (rows, inputs) that mix few causes, of sizes that differ."""
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((rows, inputs)) * np.arange(1, inputs + 1) ** -0.7
    return causes @ rng.standard_normal((inputs, inputs)) * np.exp(rng.standard_normal(inputs))


def hessian(x: np.ndarray) -> np.ndarray:
    return x.T @ x


def brain_surgeon(weight: np.ndarray, x: np.ndarray, form: Format, *, act_order: bool, damping: float) -> np.ndarray:
    """Values by the definition: round a row, give the others the least-squares answer to its error, and go on with an
    inverse of what is left of H, computed anew each time."""
    h = hessian(x)
    order = list(np.argsort(-np.diagonal(h), kind="stable") if act_order else range(len(h)))
    scales, points = clipped(weight, form, np.diagonal(h))
    scales, points = (each_row(part, form, len(weight)) for part in (scales, points))
    h = h + damping * np.mean(np.diagonal(h)) * np.eye(len(h))
    left, values = weight.copy(), np.empty_like(weight)
    while order:
        row, *order_left = order
        inverse = np.linalg.inv(h[np.ix_(order, order)])
        codes = np.clip(np.rint(left[row] / scales[row]) + points[row], *form.codes)
        values[row] = (codes - points[row]) * scales[row]
        left[order] -= np.outer(inverse[:, 0] / inverse[0, 0], left[row] - values[row])
        order = order_left
    return values


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("form", FORMATS[:3], ids=str)
def test_codes_are_those_of_the_published_algorithm(
    form: Format, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEPS", 0)
    monkeypatch.setattr(module, "ROWS", 8)
    w, x = weight(40, 6), correlated(300, 40)
    expected = brain_surgeon(w, x, form, act_order=act_order, damping=0.01)
    found = gptq(w, hessian(x), form, act_order=act_order, damping=0.01)
    ahead = weighted_errors(w, clip_by_error(w, form, np.diagonal(hessian(x))), hessian(x))
    kept = ahead > np.sum((x @ (w - expected)) ** 2, axis=0)
    assert kept.sum() >= 5  # a column that clipping alone does better keeps that
    assert np.array_equal(found.values()[:, kept], expected[:, kept])


def inputs(kind: str, size: int) -> np.ndarray:
    rng = np.random.default_rng(size)
    match kind:
        case "random":
            return rng.standard_normal((5 * size, size))
        case "correlated":
            return correlated(5 * size, size)
        case "ill-conditioned":
            return rng.standard_normal((5 * size, size)) * np.logspace(0, -12, size)
        case "fewer rows than inputs":
            return rng.standard_normal((size // 4, size))
        case "one row":
            return rng.standard_normal((1, size))
        case "twins":
            return np.repeat(rng.standard_normal((5 * size, size // 2)), 2, axis=1)
        case "dead":
            return rng.standard_normal((5 * size, size)) * (np.arange(size) % 3 > 0)
        case "all dead":
            return np.zeros((5, size))
        case "outlier":
            return rng.standard_normal((5 * size, size)) * np.where(np.arange(size) == 3, 1000.0, 1.0)
        case _:
            raise ValueError(kind)


KINDS = (
    *("random", "correlated", "ill-conditioned", "fewer rows than inputs", "one row"),
    *("twins", "dead", "all dead", "outlier"),
)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_never_worse_than_nearest_on_the_calibration_data(kind: str, form: Format, damping: float) -> None:
    w, x = weight(40, 12), inputs(kind, 40)
    found = gptq(w, hessian(x), form, damping=damping)
    ours = np.sum((x @ (w - found.values())) ** 2, axis=0)
    theirs = np.sum((x @ (w - round_to_nearest(w, form).values())) ** 2, axis=0)
    # What XᵀX has lost of X, in the units of the errors that are compared.
    lost = np.finfo(np.float64).eps * len(x) * 40 * np.sum(x**2) * np.max(w**2)
    assert ours.sum() <= theirs.sum() + lost
    if not form.per_tensor:
        assert np.all(ours <= theirs + lost)


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from(FORMATS))
def test_never_worse_on_small_matrices(rows: int, columns: int, samples: int, seed: int, form: Format) -> None:
    rng = np.random.default_rng(seed)
    w, x = rng.standard_normal((rows, columns)), rng.integers(-3, 4, (samples, rows)).astype(np.float64)
    ours = weighted_errors(w, gptq(w, hessian(x), form), hessian(x)).sum()
    theirs = weighted_errors(w, round_to_nearest(w, form), hessian(x)).sum()
    assert ours <= theirs + 100 * np.finfo(np.float64).eps * np.sum(x**2) * np.sum(w**2)


def test_correlated_inputs_are_made_up_for() -> None:
    """On rows that were not calibrated on, too: less than half of the error is left, for every format in blocks."""
    w, x, unseen = weight(64, 32), correlated(600, 128)[:, :64], correlated(600, 128)[300:, :64]
    for form in FORMATS[:3]:
        found, nearest = gptq(w, hessian(x[:300]), form), round_to_nearest(w, form)
        ours, theirs = (np.sum((unseen @ (w - each.values())) ** 2) for each in (found, nearest))
        assert ours < theirs / 2


def test_descent_never_climbs_and_ends_where_no_code_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every column, all changes of one code by brute force."""
    monkeypatch.setattr(module, "ROWS", 8)
    w, h = weight(24, 5), hessian(correlated(200, 24))
    form = Format(4, signed=False, symmetric=True, block=16)
    scales, points = clipped(w, form, np.diagonal(h))
    limits = form.codes[0] - points, form.codes[1] - points
    steps = np.clip(np.rint(w / each_row(scales, form, 24)), -8, 7)

    def errors() -> np.ndarray:
        e = w - steps * each_row(scales, form, 24)
        return np.einsum("kn,kl,ln->n", e, h, e)

    before, first = errors(), errors()
    for _ in range(60):
        module._descend(w, steps, scales, limits, h, form)
        after = errors()
        assert np.all(after <= before * (1 + 1e3 * np.finfo(np.float64).eps) + np.finfo(np.float32).eps ** 2 * first)
        if np.array_equal(after, before):
            break
        before = after
    assert np.all(after < first)
    for row in range(24):
        for change in (-1, 1):
            steps[row] += change
            outside = (steps[row] < -8) | (steps[row] > 7)
            assert np.all((errors() >= after * (1 - 1e3 * np.finfo(np.float64).eps)) | outside)
            steps[row] -= change


def test_uncorrelated_inputs_leave_nothing_to_make_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWEEPS", 0)
    w, importance = weight(32, 6), np.exp(weight(32, 1)[:, 0])
    for form in FORMATS:
        found = gptq(w, np.diag(importance), form)
        # In another unit of importance a tie of scales may fall otherwise: the error is the same.
        expected = weighted_errors(w, clip_by_error(w, form, importance), np.diag(importance))
        assert np.allclose(weighted_errors(w, found, np.diag(importance)), expected, rtol=1e-12, atol=0)


def test_only_ratios_of_the_hessian_count() -> None:
    w, h = weight(32, 6), hessian(correlated(100, 32))
    first = gptq(w, h, FORMATS[0])
    for factor in (2.0**-800, 2.0**800):
        assert same(gptq(w, h * factor, FORMATS[0]), first)


def test_columns_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = weight(32, 10), hessian(correlated(100, 32))
    whole = [gptq(w, h, form) for form in FORMATS]
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 32 * 3)
    for form, expected in zip(FORMATS, whole, strict=True):
        assert np.allclose(gptq(w, h, form).values(), expected.values(), rtol=1e-6)


def test_dead_inputs_are_rounded_as_if_alone() -> None:
    """A whole group of them: no worse than nearest, and whatever they are, the others get the same codes."""
    w, x = weight(48, 6), correlated(200, 48)
    x[:, 16:32] = 0
    found, nearest = (each.values() for each in (gptq(w, hessian(x), FORMATS[0]), round_to_nearest(w, FORMATS[0])))
    assert np.all(np.sum((w - found)[16:32] ** 2, axis=0) <= np.sum((w - nearest)[16:32] ** 2, axis=0))
    other = w.copy()
    other[16:32] = weight(16, 6, seed=9)
    rest = np.r_[:16, 32:48]
    assert np.array_equal(gptq(other, hessian(x), FORMATS[0]).codes[rest], gptq(w, hessian(x), FORMATS[0]).codes[rest])


def test_twice_the_same() -> None:
    w, h = weight(32, 6), hessian(correlated(100, 32))
    assert same(gptq(w, h, FORMATS[0]), gptq(w, h, FORMATS[0]))


def same(a: Quantized, b: Quantized) -> bool:
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in ("codes", "scales", "zero_points"))


@pytest.mark.parametrize(
    "wrong", [np.eye(3), np.eye(4)[:3], np.full((4, 4), np.nan), np.diag([1.0, -1, 1, 1]), np.ones(4)]
)
def test_a_hessian_that_does_not_fit_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(RequestError, match="Hessian"):
        gptq(np.ones((4, 2)), wrong, FORMATS[0])
