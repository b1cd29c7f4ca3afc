"""Networks with batch norms and other affine structure, of transformers and written by hand: what is left of it.

Every running statistic, γ and β is away from 0 and 1. After the recipe the constants are equal in float64, unrounded,
to 10⁻¹⁰; the verdict is EQUAL; and of each family it is known how many batch norms stay, and why.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from affine_modules import PRepBN, UnifiedNorm
from families import FAMILIES, perturb
from torch import nn

import rewrite
from rewrite.check.inputs import generate_inputs
from rewrite.check.reference import evaluate
from rewrite.ir.program import Program
from rewrite.passes import (
    CenterResidual,
    FoldBatchnorm,
    FoldNorm,
    FoldParametrization,
    FoldScale,
    MergeAffine,
    MergeBranches,
)
from rewrite.rule import Applied, Refused

RECIPE = (
    *(FoldParametrization(), FoldScale(), FoldBatchnorm(), MergeBranches(), MergeAffine()),
    *(CenterResidual(), FoldNorm()),
)

EXACT = 1e-10
"""Relative, in float64 with unrounded constants."""

Keep = Callable[[str, Callable[[], Program]], Program]


@dataclass(frozen=True)
class Expected:
    """Batch norms before and after, what is applied at least (how often, by pass), and why each that stays does.

    `why` counts (requirement, operator, part of the reason) of the refusals of fold-batchnorm; `absent` are operators
    of which none is left.
    """

    norms: int
    applied: dict[str, int]
    left: int = 0
    why: dict[tuple[str, str, str], int] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    quick: bool = False


def check(before: Program, expected: Expected) -> None:
    result = rewrite.apply(before, RECIPE)
    assert result.certificate.verdict.kind == "EQUAL", result.certificate.verdict
    # Nothing was undone because the proof did not follow.
    refusals = [outcome for outcome in result.outcomes if isinstance(outcome, Refused)]
    assert not [refusal for refusal in refusals if refusal.refusal.requirement == "PROOF"], refusals
    for inputs in generate_inputs(before.original)[-1:]:
        wanted = evaluate(before.original, inputs)
        found = evaluate(result.program.model, inputs, unrounded=True)
        for name, array in wanted.items():
            assert np.abs(found[name] - array).max() <= EXACT * np.abs(array).max(), name

    counted = [
        sum(node.op_type == "BatchNormalization" for node in model.graph)
        for model in (before.original, result.program.model)
    ]
    assert counted == [expected.norms, expected.left]
    assert not {node.op_type for node in result.program.model.graph} & set(expected.absent)
    applied = Counter(outcome.pass_name for outcome in result.outcomes if isinstance(outcome, Applied))
    assert {name: applied[name] for name in expected.applied} == expected.applied
    reasons = [each.refusal for each in refusals if each.pass_name == "fold-batchnorm"]
    for (requirement, operator, reason), count in expected.why.items():
        matching = [
            one
            for one in reasons
            if (one.requirement, one.operator) == (requirement, operator) and reason in one.reason
        ]
        assert len(matching) == count, [str(one) for one in reasons]
    assert len(reasons) == sum(expected.why.values()), [str(one) for one in reasons]


# ── transformers ────────────────────────────────────────────────────────────────────────────────────────────────────

NORMS = "fold-batchnorm"

TRANSFORMERS = {
    "resnet": Expected(15, {NORMS: 15}, quick=True),
    "resnet_basic": Expected(8, {NORMS: 8}),
    "regnet": Expected(17, {NORMS: 17}, quick=True),
    "mobilenet_v1": Expected(27, {NORMS: 27}),
    "mobilenet_v2": Expected(52, {NORMS: 52}),
    "efficientnet": Expected(25, {NORMS: 25}),
    "convnext": Expected(0, {"fold-scale": 3, "fold-norm": 4}, quick=True),
    "convnextv2": Expected(0, {"fold-norm": 4}),
    "levit": Expected(27, {NORMS: 27}),
    "mobilevit": Expected(32, {NORMS: 32, "fold-norm": 18}),
    "mobilevitv2": Expected(25, {NORMS: 25}),
    "poolformer": Expected(0, {"fold-scale": 4}),
    "cvt": Expected(18, {NORMS: 18}),
    # Weight standardization is a batch norm of the kernel: computed from constants, it is one.
    "bit": Expected(9, {"fold-parametrization": 9}, quick=True),
    # A weight-normed positional convolution; norms of features over channels or over time.
    "wav2vec2": Expected(0, {"fold-parametrization": 1, "fold-norm": 4}, quick=True),
    "wav2vec2_conformer": Expected(2, {NORMS: 2, "fold-norm": 6}),
    "hubert": Expected(0, {"fold-parametrization": 1, "fold-norm": 2}),
    "speech_to_text": Expected(0, {"fold-norm": 11}),
}


def build(name: str) -> Program:
    """A family of the zoo, captured from the module in memory."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    try:
        from zoo_families import ZOO
    finally:
        sys.path.pop(0)
    return rewrite.capture(*ZOO[name].build())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if each.quick else [pytest.mark.slow]) for name, each in TRANSFORMERS.items()],
)
def test_a_family_of_transformers(name: str, kept_program: Keep, family_program: Callable[[str], Program]) -> None:
    program = family_program(name) if name in FAMILIES else kept_program(f"zoo-{name}", lambda: build(name))
    check(program, TRANSFORMERS[name])


# ── By hand ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def convolution(kind: int, inside: int, out: int, size: int = 3, **options: object) -> nn.Sequential:
    """A convolution of `kind` axes and its batch norm."""
    kernel = getattr(nn, f"Conv{kind}d")(inside, out, size, bias=False, **options)
    return nn.Sequential(kernel, getattr(nn, f"BatchNorm{kind}d")(out))


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Branches(nn.Module):
    """Σ fᵢ(x)."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(branch(x) for branch in self.branches)  # type: ignore[return-value]


class Dense(nn.Module):
    """[x, f(x)] on channels."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.layers(x)], 1)


class Scaled(nn.Module):
    """LayerScale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer_scale * x


class Normalized(nn.Module):
    """(x − mean)/std of pixels, as numbers of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.pixel_mean) / self.pixel_std


def repvgg() -> tuple[nn.Module, tuple[int, ...]]:
    """Normalized pixels into an unpadded convolution; 3×3 + 1×1 + identity, each with a batch norm."""
    block = Branches(convolution(2, 4, 4, padding=1), convolution(2, 4, 4, 1), nn.BatchNorm2d(4))
    return nn.Sequential(Normalized(), convolution(2, 3, 4, stride=2), nn.ReLU(), block, nn.ReLU()), (3, 9, 9)


def preactivated() -> tuple[nn.Module, tuple[int, ...]]:
    """BN → ReLU → Conv on a residual stream, and concatenated channels: what is before a ReLU stays there."""
    block = Residual(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    dense = Dense(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    head = (nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 4, 1), block, dense, *head), (3, 6, 6)


def speech() -> tuple[nn.Module, tuple[int, ...]]:
    """A time-delay network: Conv → ReLU → BN, dilated and unpadded; then one padded, which the shift may not enter."""
    layers = [nn.Conv1d(6, 8, 5), nn.ReLU(), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 3, dilation=2), nn.ReLU()]
    layers += [nn.BatchNorm1d(8), nn.Conv1d(8, 4, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers), (6, 16)


def volume() -> tuple[nn.Module, tuple[int, ...]]:
    """3-D convolutions, depthwise and pointwise, with ReLU6, down and up again."""
    down = (convolution(3, 2, 4), nn.ReLU6(), convolution(3, 4, 4, groups=4, padding=1), nn.ReLU6())
    up = (convolution(3, 4, 2, 1), nn.ReLU(), nn.ConvTranspose3d(2, 3, 2, stride=2), nn.BatchNorm3d(3))
    return nn.Sequential(*down, *up), (2, 5, 5, 5)


def tokens() -> tuple[nn.Module, tuple[int, ...]]:
    """Blocks with PRepBN and with Unified Normalization, and a LayerScale: no norm has to stay."""
    first = Residual(PRepBN(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    second = Residual(UnifiedNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), Scaled(6))
    return nn.Sequential(nn.Linear(5, 6), first, second, UnifiedNorm(6), nn.Linear(6, 3)), (4, 5)


BY_HAND = {
    # Between a ReLU and a sum the identity's norm has no neighbour; it goes with the branches.
    "repvgg": (repvgg, Expected(4, {"merge-branches": 1}, why={("R3", "Add", "a factor and a shift do not pass"): 1})),
    "tokens": (
        tokens,
        Expected(1, {"fold-scale": 1, NORMS: 3}, absent=("BatchNormalization", "Sqrt", "Div", "Mul", "Transpose")),
    ),
    "preactivated": (
        preactivated,
        Expected(4, {NORMS: 1}, left=3, why={("R3", "Relu", ""): 3}),
    ),
    "speech": (speech, Expected(2, {NORMS: 2})),
    "volume": (volume, Expected(4, {NORMS: 4})),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_network_written_by_hand(name: str, kept_program: Keep) -> None:
    make, expected = BY_HAND[name]

    def capture() -> Program:
        torch.manual_seed(0)
        module, shape = make()
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        return rewrite.capture(perturb(module).eval(), (x,))

    check(kept_program(f"hand-{name}", capture), expected)
