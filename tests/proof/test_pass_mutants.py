"""Every pass of a change of basis, got wrong in every way we know: a sample with every run, the whole behind `slow`.

The counts are floors a pass, so that they hold in whichever process a test runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from proof.pass_cases import CASES
from proof.pass_mutants import Captured, check_case, check_pass

from rewrite.ir.program import Program
from rewrite.passes import (
    PASSES,
    AffineHeads,
    CenterResidual,
    CompressResidual,
    Equalize,
    FoldNorm,
    FoldScale,
    RotateHeads,
    RotateOnline,
    RotateResidual,
    ScaleHeads,
    ScaleQueryKey,
    Smooth,
    StabilizeNorm,
)
from rewrite.rule import Pass

STRIDE = 12
"""One mutant in so many is in the sample."""

SAMPLE = {
    "fold-parametrization": 6,
    "fold-scale": 3,
    "fold-batchnorm": 11,
    "merge-affine": 13,
    "merge-branches": 20,
    "eliminate-dead-channels": 4,
    "merge-duplicate-channels": 4,
    "center-residual": 7,
    "fold-norm": 8,
    "compress-residual": 15,
    "rotate-residual": 48,
    "stabilize-norm": 6,
    "rotate-heads": 32,
    "scale-heads": 46,
    "affine-heads": 27,
    "scale-query-key": 21,
    "smooth": 8,
    "equalize": 18,
    "reparameterize-norm-scale": 7,
    "rotate-online": 13,
    "split-outliers": 10,
}
"""How many mutants of a pass the sample has at least."""

WHOLE = {
    "fold-parametrization": 52,
    "fold-scale": 33,
    "fold-batchnorm": 121,
    "merge-affine": 174,
    "merge-branches": 221,
    "eliminate-dead-channels": 63,
    "merge-duplicate-channels": 49,
    "center-residual": 87,
    "fold-norm": 112,
    "compress-residual": 191,
    "rotate-residual": 633,
    "stabilize-norm": 84,
    "rotate-heads": 407,
    "scale-heads": 644,
    "affine-heads": 355,
    "scale-query-key": 280,
    "smooth": 111,
    "equalize": 218,
    "reparameterize-norm-scale": 81,
    "rotate-online": 159,
    "split-outliers": 118,
}
"""How many mutants of a pass there are at least."""


FAMILY_STRIDE = 16
"""One mutant in so many of a family is tried."""

CAPTURED: dict[str, tuple[Pass[Any], ...]] = {
    "gpt2": (CenterResidual(), RotateResidual(), RotateHeads(), AffineHeads(), ScaleHeads(), Smooth()),
    "llama": (FoldNorm(), RotateResidual(), RotateHeads(), ScaleQueryKey(), Equalize(), RotateOnline()),
    "qwen2": (RotateResidual(), RotateHeads(), AffineHeads(), ScaleHeads()),
    "vit": (CenterResidual(), CompressResidual(), RotateResidual(), RotateHeads(), Smooth()),
    "opt": (CompressResidual(), RotateResidual(), Equalize(), StabilizeNorm()),
    "resnet": (Equalize(),),
}
"""Captured families, and passes whose result the proof follows there."""


@pytest.mark.parametrize("name", CASES)
def test_a_sample_of_the_mutants_is_rejected(name: str) -> None:
    count = check_pass(name, STRIDE)
    assert count >= SAMPLE[name], f"only {count} of the sampled mutants are told apart in float64"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_mutant_is_rejected(name: str) -> None:
    count = check_pass(name)
    assert count >= WHOLE[name], f"only {count} mutants are told apart in float64"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "rule"), [(name, rule) for name, rules in CAPTURED.items() for rule in rules])
def test_mutants_of_captured_families_are_rejected(
    family: str, rule: Pass[Any], family_program: Callable[[str], Program]
) -> None:
    first = () if isinstance(rule, CenterResidual | FoldNorm) else (FoldScale(), CenterResidual(), FoldNorm())
    if isinstance(rule, Smooth):
        first = (FoldScale(), CenterResidual())
    case = Captured(family, family_program(family), (*first, rule))
    assert check_case(case, rule.name, itertools.count(), FAMILY_STRIDE) >= 3


def test_every_pass_has_mutants_and_there_are_at_least_a_thousand() -> None:
    assert set(CASES) == set(SAMPLE) == set(WHOLE) == {rule.name for rule in PASSES}
    assert sum(SAMPLE.values()) >= 250
    assert sum(WHOLE.values()) >= 1000
