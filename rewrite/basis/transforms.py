"""The classes of transforms T of an axis, and what each commutes with.

x′ = xT for every value of a region. T passes an operator f without a trace where f(xT) = f(x)T:

    role of f along the axis          P   Q   Q₁  D   D⁺  Π   D·+c
    MOVE           layout, means      ●   ●   ●   ●   ●   ●   ●
    SUM            add, select        ●   ●   ●   ●   ●   ●   ·
    LINEAR         matrix product     ●   ●   ●   ●   ●   ●   ·
    SCALE          a number per row   ●   ●   ●   ●   ●   ●   ·
    CHANNEL_SCALE  constant vector    ·   ·   ·   ●   ●   ·   ·
    HOMOGENEOUS    relu, max          ·   ·   ·   ·   ●   ●   ·
    CHANNELWISE    gelu, x·y          ·   ·   ·   ·   ·   ●   ·
    RMS core       x/√(mean x² + ε)   ·   ●   ●   ·   ·   ●   ·
    LayerNorm core                    *   ·   ●   ·   ·   ●   ·     * P is not even seen: a reader, no passage

P centring, Q orthogonal, Q₁ orthogonal with Q·1 = ±1, D diagonal, D⁺ positive diagonal, Π permutation, D·+c diagonal
and a shift. CONTRACT and OPAQUE commute with none: a contraction is where a region is read, and an opaque operator is
where it ends badly. `tests/basis/test_transforms.py` evaluates every cell of this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rewrite.ir.axes import Role


@dataclass(frozen=True)
class TransformClass:
    """A class of transforms of one axis.

    `commutes` are the roles it passes; `cores` the norms whose core (γ = 1, β = 0) it passes; `invertible` whether a
    reader can undo it.
    """

    name: str
    commutes: frozenset[Role]
    cores: frozenset[str] = frozenset()
    invertible: bool = True

    def __repr__(self) -> str:
        return self.name


_LINEAR: Final = frozenset({Role.MOVE, Role.SUM, Role.LINEAR, Role.SCALE})
_LAYER, _RMS = "LayerNormalization", "RMSNormalization"

CENTRING: Final = TransformClass("centring", _LINEAR, invertible=False)
ORTHOGONAL: Final = TransformClass("orthogonal", _LINEAR, frozenset({_RMS}))
ORTHOGONAL_FIXING_ONES: Final = TransformClass("orthogonal fixing 1", _LINEAR, frozenset({_RMS, _LAYER}))
DIAGONAL: Final = TransformClass("diagonal", _LINEAR | {Role.CHANNEL_SCALE})
POSITIVE_DIAGONAL: Final = TransformClass("positive diagonal", DIAGONAL.commutes | {Role.HOMOGENEOUS})
PERMUTATION: Final = TransformClass(
    "permutation", _LINEAR | {Role.HOMOGENEOUS, Role.CHANNELWISE}, frozenset({_RMS, _LAYER})
)
DIAGONAL_AND_SHIFT: Final = TransformClass("diagonal and shift", frozenset({Role.MOVE}))

CLASSES: Final = (
    *(CENTRING, ORTHOGONAL, ORTHOGONAL_FIXING_ONES, DIAGONAL, POSITIVE_DIAGONAL, PERMUTATION, DIAGONAL_AND_SHIFT),
)
