"""Every cell of the table in `rewrite/basis/transforms.py`, evaluated in float64: ● must commute, · must not."""

import numpy as np
import pytest

from rewrite.basis.transforms import (
    CENTRING,
    CLASSES,
    DIAGONAL,
    DIAGONAL_AND_SHIFT,
    ORTHOGONAL,
    ORTHOGONAL_FIXING_ONES,
    PERMUTATION,
    POSITIVE_DIAGONAL,
    TransformClass,
)
from rewrite.ir.axes import Role

CHANNELS, ROWS = 6, 4
GENERATOR = np.random.default_rng(0)
P = np.eye(CHANNELS) - 1 / CHANNELS


def orthogonal() -> np.ndarray:
    return np.linalg.qr(GENERATOR.normal(size=(CHANNELS, CHANNELS)))[0]


def orthogonal_fixing_ones() -> np.ndarray:
    ones = np.full((CHANNELS, 1), CHANNELS**-0.5)
    basis = np.linalg.qr(np.hstack([ones, GENERATOR.normal(size=(CHANNELS, CHANNELS - 1))]))[0]
    inner = np.eye(CHANNELS)
    inner[1:, 1:] = np.linalg.qr(GENERATOR.normal(size=(CHANNELS - 1, CHANNELS - 1)))[0]
    return basis @ inner @ basis.T


SAMPLES = {
    CENTRING: lambda: P,
    ORTHOGONAL: orthogonal,
    ORTHOGONAL_FIXING_ONES: orthogonal_fixing_ones,
    DIAGONAL: lambda: np.diag(np.array([1, -2, 0.5, 3, -1, 2])),
    POSITIVE_DIAGONAL: lambda: np.diag(np.exp(GENERATOR.normal(size=CHANNELS))),
    PERMUTATION: lambda: np.eye(CHANNELS)[np.array([2, 0, 5, 1, 3, 4])],
    DIAGONAL_AND_SHIFT: lambda: np.diag(np.array([1, -2, 0.5, 3, -1, 2])),
}

Y = GENERATOR.normal(size=(ROWS, CHANNELS))
MIX = GENERATOR.normal(size=(ROWS, ROWS))
PER_ROW = GENERATOR.normal(size=(ROWS, 1))
PER_CHANNEL = GENERATOR.normal(size=CHANNELS)


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 0.1)


REPRESENTATIVES = {
    Role.MOVE: lambda x, y: x[::-1],
    Role.SUM: lambda x, y: x + y,
    Role.LINEAR: lambda x, y: MIX @ x,
    Role.SCALE: lambda x, y: x * PER_ROW,
    Role.CHANNEL_SCALE: lambda x, y: x * PER_CHANNEL,
    Role.HOMOGENEOUS: lambda x, y: np.maximum(x, 0),
    Role.CHANNELWISE: lambda x, y: x / (1 + np.exp(-x)),
    "RMSNormalization": lambda x, y: rms(x),
    "LayerNormalization": lambda x, y: rms(x - x.mean(axis=-1, keepdims=True)),
}


def commutes(transform: TransformClass, role: object) -> bool:
    matrix = SAMPLES[transform]()
    shift = PER_CHANNEL if transform is DIAGONAL_AND_SHIFT else 0.0
    function = REPRESENTATIVES[role]
    x = GENERATOR.normal(size=(ROWS, CHANNELS))
    expected = function(x, Y) @ matrix + shift
    found = function(x @ matrix + shift, Y @ matrix + shift)
    rounding = np.finfo(float).eps * CHANNELS * ROWS * np.abs(expected).max() * 10
    return bool(np.abs(expected - found).max() <= rounding)


@pytest.mark.parametrize("role", REPRESENTATIVES, ids=str)
@pytest.mark.parametrize("transform", CLASSES, ids=repr)
def test_cell(transform: TransformClass, role: object) -> None:
    claimed = role in transform.commutes or role in transform.cores
    if transform is CENTRING and role == "LayerNormalization":
        # P passes a LayerNorm's core in a stronger sense than commuting: it is not even seen. That is a reader's rule.
        claimed = True
    assert commutes(transform, role) == claimed


def test_every_class_has_a_sample_and_every_role_a_representative() -> None:
    assert set(SAMPLES) == set(CLASSES)
    assert {role for role in Role if role in REPRESENTATIVES} == set(Role) - {Role.CONTRACT, Role.NORM, Role.OPAQUE}


def test_fixing_ones_does() -> None:
    matrix = orthogonal_fixing_ones()
    assert np.allclose(matrix @ np.ones(CHANNELS), 1, rtol=0, atol=1e-14)
    assert np.allclose(matrix @ matrix.T, np.eye(CHANNELS), rtol=0, atol=1e-14)
