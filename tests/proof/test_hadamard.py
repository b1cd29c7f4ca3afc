"""Hadamard matrices of every order that passes ask for, checked in integers, and how sizes are cut into factors."""

from __future__ import annotations

import time

import numpy as np
import pytest

from rewrite.proof.hadamard import hadamard, is_constructed, parts

ODD_PARTS = (1, 12, 20, 28, 36, 44, 52, 60, 76, 100, 108, 140, 148, 156, 172, 180, 244)
"""Among them 52, 100 and 244, of the fields of 25, 49 and 243 elements, and 156 and 172, which Paley does not give."""


@pytest.mark.parametrize("order", sorted({odd * 2**m for odd in ODD_PARTS for m in (0, 1, 3)} | {2, 4, 16, 512}))
def test_rows_are_orthogonal_in_integers(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert matrix.dtype == np.int8
    assert (np.abs(matrix) == 1).all()
    exact = matrix.astype(np.int64)
    assert np.array_equal(exact @ exact.T, order * np.eye(order, dtype=np.int64))


@pytest.mark.parametrize("order", [*range(-4, 1), 3, 6, 10, 46, 92, 116])
def test_what_is_not_constructed_is_none(order: int) -> None:
    assert not is_constructed(order)
    assert hadamard(order) is None


def test_saying_so_and_building_agree() -> None:
    for order in range(1, 260):
        assert is_constructed(order) == (hadamard(order) is not None)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *((64, (8, 8)), (128, (8, 16)), (4096, (64, 64)), (11008, (64, 172)), (14336, (112, 128)), (5632, (64, 88))),
        *((4864, (64, 76)), (9728, (76, 128)), (18944, (128, 148)), (2880, (48, 60)), (12, (1, 12)), (7, None)),
        *((3072, (48, 64)), (13696, None), (8960, (80, 112)), (6912, (72, 96))),
    ],
)
def test_a_size_is_cut_where_the_sum_of_factors_is_least(size: int, expected: tuple[int, int] | None) -> None:
    assert parts(size) == expected


def test_asking_builds_nothing() -> None:
    begin = time.perf_counter()
    for size in range(4, 20000, 4):
        parts(size)
    assert time.perf_counter() - begin < 20
