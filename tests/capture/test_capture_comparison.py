"""The comparator itself, before anything is compared with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from capture_comparison import agrees

GENERATOR = np.random.default_rng(0)
LEFT, RIGHT = GENERATOR.standard_normal((24, 64)), GENERATOR.standard_normal((64, 24))
REFERENCE = LEFT.astype(np.float32).astype(np.float64) @ RIGHT.astype(np.float32).astype(np.float64)
EAGER = LEFT.astype(np.float32) @ RIGHT.astype(np.float32)


def _in_another_order() -> np.ndarray:
    order = GENERATOR.permutation(64)
    return LEFT.astype(np.float32)[:, order] @ RIGHT.astype(np.float32)[order]


def _sequential() -> np.ndarray:
    total = np.zeros_like(EAGER)
    for k in range(64):
        total += LEFT.astype(np.float32)[:, k : k + 1] * RIGHT.astype(np.float32)[k : k + 1]
    return total


def _one_nan() -> np.ndarray:
    wrong = EAGER.copy()
    wrong[3, 5] = np.nan
    return wrong


def test_identity_and_other_orders_of_summation_agree() -> None:
    for same in (EAGER, _in_another_order(), _sequential(), REFERENCE.astype(np.float32)):
        assert agrees(same, EAGER, REFERENCE, 64)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: EAGER * np.float32(1.001),
        lambda: EAGER * np.float32(0.5),
        lambda: EAGER * np.float32(1000),
        lambda: -EAGER,
        lambda: EAGER.T,
        lambda: np.zeros_like(EAGER),
        _one_nan,
        lambda: np.roll(EAGER, 1, axis=0),
        lambda: EAGER.astype(np.float64),
        lambda: EAGER[:, :-1],
    ],
    ids=["x1.001", "x0.5", "x1000", "sign", "transpose", "zeros", "nan", "shifted", "dtype", "shape"],
)
def test_wrong_results_do_not_agree(wrong: Callable[[], np.ndarray]) -> None:
    assert not agrees(wrong(), EAGER, REFERENCE, 64)
