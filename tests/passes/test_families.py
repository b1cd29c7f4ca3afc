"""What the passes do on real families: LayerNorms left, what is refused and why, and that the function stayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from networks import rounding

from rewrite.capture.canonicalize import canonicalize
from rewrite.check.inputs import generate_inputs
from rewrite.check.reference import evaluate
from rewrite.ir.program import Program
from rewrite.recipes import passes_of
from rewrite.rule import Applied, apply_pass


@dataclass(frozen=True)
class Expected:
    """LayerNorms before and after; requirements of center-residual and fold-norm that refuse somewhere."""

    before: int
    after: int
    centring: frozenset[str] = frozenset()
    folding: frozenset[str] = frozenset()


def norms(before: int, after: int, centring: str = "", folding: str = "") -> Expected:
    return Expected(before, after, frozenset(centring.split()), frozenset(folding.split()))


EXPECTED = {
    # Pre-LN: the whole stream, the final norm included.
    "gpt2": norms(5, 0),
    "opt": norms(5, 0),
    "gpt_neox": norms(5, 0),
    "phi": norms(3, 0),
    "falcon": norms(5, 0),
    "falcon_parallel": norms(3, 0),
    "falcon_sequential": norms(5, 0),
    "stablelm": norms(5, 0),
    "starcoder2": norms(5, 0),
    "cohere": norms(3, 0),
    "vit": norms(5, 0),
    "deit": norms(5, 0),
    "beit": norms(5, 0),
    "dinov2": norms(5, 0, folding="R2"),
    # The pooler's own norm reads a stream that is also an output.
    "siglip_vision": norms(6, 1, "R5", "R2"),
    # A norm writes the stream; the norm of the embedding alone is a stream of its own.
    "bert": norms(5, 4, "R4", "R2 R3"),
    "clip_vision": norms(6, 5, "R4", "R2 R3"),
    # So it does here, and an explicit centring behind it serves the whole stream; the tied table is not worth a copy.
    "bloom": norms(6, 1, "R9", "R3 R5"),
    # The embedding's norm is the first attention's input as well; the head's norm reads a GELU.
    "modernbert": norms(6, 2, "R8 R9", "R3 R5"),
    # The convolutional positions add a GELU to the stream; another GELU is what the projection's norm reads.
    "wav2vec2": norms(8, 1, "R8", "R2 R3"),
    # Patch merging joins tokens along the channels; the last stage is Pre-LN. Windows are padded with zeros.
    "swin": norms(11, 5, "R4 R8", "R3"),
    # A depthwise convolution reads the stream.
    "convnext": norms(6, 5, "R4 R8", "R3 R4"),
    # RMSNorm sees the mean. Query and key norms feed rotary positions; sandwich norms feed the residual sum.
    "llama": norms(0, 0, "R2"),
    "qwen2": norms(0, 0, "R2", "R5"),
    "qwen3": norms(0, 0, "R2", "R3"),
    "gemma2": norms(0, 0, "R2", "R3 R5"),
    "olmo2": norms(0, 0, "R2", "R3"),
    "mixtral": norms(0, 0, "R2"),
    "resnet": norms(0, 0),
}
QUICK = ("gpt2", "vit", "bert", "llama")


def layernorms(program: Program) -> int:
    return sum(node.op_type == "LayerNormalization" for node in program.model.graph)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXPECTED]
)
def test_family(name: str, family_program: Callable[[str], Program]) -> None:
    import numpy as np

    after, expected = family_program(name), EXPECTED[name]
    canonicalize(after)
    before = after.clone()
    for rule in passes_of(None, None):
        apply_pass(after, rule)
    assert (layernorms(before), layernorms(after)) == (expected.before, expected.after)
    refused = {(one.pass_name, one.refusal.requirement) for one in after.records if not isinstance(one, Applied)}
    assert {requirement for rule, requirement in refused if rule == "center-residual"} == expected.centring
    assert {requirement for rule, requirement in refused if rule == "fold-norm"} == expected.folding

    inputs = generate_inputs(before.model, sizes=((2, 7),))[0]
    wanted = evaluate(before.model, inputs, unrounded=True)
    found = evaluate(after.model, inputs, unrounded=True)
    allowed = rounding(before, inputs)
    for output, array in wanted.items():
        assert np.abs(array - found[output]).max() <= allowed * np.abs(array).max(), output

    for rule in passes_of(None, None):
        assert not any(isinstance(outcome, Applied) for outcome in apply_pass(after, rule))


def test_every_family_has_an_expectation() -> None:
    from families import FAMILIES

    assert set(EXPECTED) == set(FAMILIES)
