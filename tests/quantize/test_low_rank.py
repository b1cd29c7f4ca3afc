"""Low-rank corrections are minimal in their norm."""

from __future__ import annotations

import numpy as np
import pytest

from rewrite.errors import RequestError
from rewrite.quantize.low_rank import correction


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns))


def slack(*matrices: np.ndarray) -> float:
    """Squares that float64 loses in products of these."""
    sizes = [np.sum(each**2) * len(each) for each in matrices]
    return 100 * np.finfo(np.float64).eps * float(np.prod(sizes))


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_what_is_left_is_the_smaller_singular_values(rows: int, columns: int, rank: int) -> None:
    e = matrix(rows, columns)
    a, b = correction(e, rank)
    assert a.shape == (rows, rank)
    assert b.shape == (rank, columns)
    smaller = np.sum(np.linalg.svd(e)[1][rank:] ** 2)
    assert abs(np.sum((e - a @ b) ** 2) - smaller) <= slack(e)


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("samples", [100, 6, 1])
def test_what_is_left_is_minimal_for_the_inputs(rows: int, columns: int, samples: int) -> None:
    """X·E has rank-r approximations no better than its own, and X·A·B is one; with fewer rows than inputs, too."""
    e, x = matrix(rows, columns), matrix(samples, rows, 1) * np.logspace(0, -2, rows)
    a, b = correction(e, 3, x.T @ x)
    smaller = np.sum(np.linalg.svd(x @ e)[1][3:] ** 2)
    assert np.sum((x @ (e - a @ b)) ** 2) <= smaller + slack(x, e)


def test_without_the_inputs_it_would_not_be() -> None:
    e, x = matrix(12, 20), matrix(100, 12, 1) * np.logspace(0, -2, 12)
    (a, b), (c, d) = correction(e, 3), correction(e, 3, x.T @ x)
    assert np.sum((x @ (e - a @ b)) ** 2) > 1.5 * np.sum((x @ (e - c @ d)) ** 2)
    assert np.sum((e - a @ b) ** 2) < np.sum((e - c @ d) ** 2)


@pytest.mark.parametrize("size", [1e-150, 1.0, 1e150])
@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12)])
def test_an_error_of_low_rank_is_made_good_whole(rows: int, columns: int, size: float) -> None:
    e = matrix(rows, 2) @ matrix(2, columns, 1) * size
    a, b = correction(e, 5)
    assert np.max(np.abs(e - a @ b)) <= 1e-12 * np.max(np.abs(e))
    assert not a[:, 2:].any()
    assert not b[2:].any()


def test_no_error_needs_no_correction() -> None:
    a, b = correction(np.zeros((4, 6)), 2, np.eye(4))
    assert not a.any()
    assert not b.any()


def test_both_factors_have_numbers_of_one_size() -> None:
    a, b = correction(matrix(12, 20) * 1e-6, 3)
    assert np.allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1))


@pytest.mark.parametrize(
    ("error", "rank", "hessian"),
    [
        (np.ones((3, 4)), 0, None),
        (np.ones(3), 1, None),
        (np.ones((0, 4)), 1, None),
        (np.full((3, 4), np.nan), 1, None),
        (np.ones((3, 4)), 1, np.eye(4)),
        (np.ones((3, 4)), 1, np.full((3, 3), np.inf)),
    ],
)
def test_what_does_not_fit_is_refused(error: np.ndarray, rank: int, hessian: np.ndarray | None) -> None:
    with pytest.raises(RequestError):
        correction(error, rank, hessian)
