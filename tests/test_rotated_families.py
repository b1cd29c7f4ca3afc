"""Every rotation on whole families, down to the file that runs; and hidden channels that are gone, of whole families.

LayerNorm models are what no released tool rotates: GPT-2, OPT and ViT here, beside a Llama.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import rewrite
from rewrite.capture.canonicalize import canonicalize
from rewrite.check.inputs import generate_inputs
from rewrite.check.noise import noise_ratio
from rewrite.check.reference import evaluate
from rewrite.check.runtime import Session, unoptimized
from rewrite.ir.constants import weight_behind
from rewrite.ir.program import Program
from rewrite.passes import EliminateDeadChannels, MergeDuplicateChannels
from rewrite.passes.eliminate_dead_channels import hidden_layers
from rewrite.proof import prove
from rewrite.recipes import passes_of

EXACT = 1e-10


@pytest.mark.parametrize("family", ["gpt2", "opt", "vit", "llama"])
def test_rotated_proved_and_run(family: str, family_program: Callable[[str], Program], tmp_path: Path) -> None:
    program = family_program(family)
    result = rewrite.apply(program, passes_of(None, "rotate"))
    assert result.certificate.verdict.kind == "EQUAL", result
    applied = {outcome.pass_name for outcome in result.outcomes if type(outcome).__name__ == "Applied"}
    assert {"rotate-residual", "rotate-heads", "rotate-online"} <= applied, result

    path = rewrite.lower(result.program).save(tmp_path)
    work = result.program
    named = {value.name for node in work.original.graph for value in node.outputs}
    claims = {name: relation for name, relation in work.relations.items() if name in named}
    proof = prove(program.original, ir.load(path), claims=claims, transforms=work.transforms)
    assert proof.verdict.kind == "EQUAL", proof
    assert proof.claims
    assert all(proof.claims.values())

    one = generate_inputs(program.original)[-1]
    expected, found = evaluate(program.original, one), evaluate(work.model, one, unrounded=True)
    with Session(program.original, unoptimized()) as original, Session(path) as artifact:
        before, after = original.run(one), artifact.run(one)
    for name, reference in expected.items():
        assert np.linalg.norm(found[name] - reference) <= EXACT * np.linalg.norm(reference), name
        assert noise_ratio(after[name], before[name], reference) < 8, name


def with_channels_to_spare(program: Program, dead: bool) -> Program:
    """`program` with two hidden units of every layer dead (their weights are 0), or copies of two others."""
    canonicalize(program)
    for site in list(hidden_layers(program)):
        for use in site.region.constants:
            array = weight_behind(use.value).numpy().copy()
            view = np.moveaxis(array, use.axis, -1)
            if not dead:
                view[..., 7], view[..., 9] = view[..., 2], view[..., 3]
            elif array.ndim > 1:
                view[..., [1, 7]] = 0.0
            assert use.value.dtype is not None
            use.value.const_value = ir.tensor(array.astype(use.value.dtype.numpy()), name=use.value.name)
    return Program.captured(program.model)


@pytest.mark.parametrize("rule", [EliminateDeadChannels(), MergeDuplicateChannels()], ids=["dead", "copies"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "llama", "convnext"])
def test_channels_that_are_gone(
    family: str, rule: EliminateDeadChannels | MergeDuplicateChannels, family_program: Callable[[str], Program]
) -> None:
    program = with_channels_to_spare(family_program(family), isinstance(rule, EliminateDeadChannels))
    result = rewrite.apply(program, [rule])
    assert result.certificate.verdict.kind == "EQUAL", result
    assert any(type(outcome).__name__ == "Applied" for outcome in result.outcomes), result
    one = generate_inputs(program.original)[-1]
    expected, found = evaluate(program.original, one), evaluate(result.program.model, one, unrounded=True)
    for name, reference in expected.items():
        assert np.linalg.norm(found[name] - reference) <= EXACT * np.linalg.norm(reference), name
