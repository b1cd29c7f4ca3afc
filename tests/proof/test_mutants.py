"""Who checks the checker: rewritten models of several families, each broken in many ways, and none accepted.

A mutant counts only if a float64 evaluation shows that it computes something else; a key bias may be dropped, and a
mask that masks nothing on these inputs proves nothing either way. Beside the mutants of a family stands its positive
control: the rewritten model they were made from is proved equal.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from proof.corruptions import CORRUPTIONS

from rewrite.capture.canonicalize import canonicalize
from rewrite.check.inputs import generate_inputs
from rewrite.check.reference import evaluate
from rewrite.errors import RewriteError
from rewrite.ir.program import Program
from rewrite.proof import prove
from rewrite.recipes import passes_of
from rewrite.rule import apply_pass

FAMILIES = ("gpt2", "gpt_neox", "phi", "cohere", "llama", "qwen3", "gemma2", "mixtral", "bert", "vit", "dinov2", "swin")
EACH = 2
"""Mutants of one kind a family."""

WITNESSED = 1e-10
"""Relative: float64 evaluation of these small networks is good to 1e-13, three float32 ulps of one weight move them
by 1e-9 and more."""

COUNT: dict[str, int] = {}


def _rewritten(program: Program) -> Program:
    canonicalize(program)
    for each in passes_of(None, None):
        apply_pass(program, each)
    return program


def _differs(model: ir.Model, inputs: list[dict], expected: list[dict]) -> bool:
    """Whether float64 evaluation tells `model` from the original; one that cannot run at all is told apart too."""
    for one, wanted in zip(inputs, expected):
        try:
            found = evaluate(model, one)
        except (RewriteError, ValueError, IndexError, KeyError, TypeError):
            return True
        for name, value in wanted.items():
            if found[name].shape != value.shape:
                return True
            if np.linalg.norm(found[name] - value) > WITNESSED * np.linalg.norm(value):
                return True
    return False


@pytest.mark.parametrize("family", FAMILIES)
def test_every_witnessed_mutant_is_rejected(family: str, family_program: Callable[[str], Program]) -> None:
    program = _rewritten(family_program(family))
    assert prove(program.original, program.model).verdict.holds, "positive control"
    inputs = generate_inputs(program.original)[-4:]
    expected = [evaluate(program.model, one) for one in inputs]
    rng = np.random.default_rng(zlib.crc32(family.encode()))
    accepted, count = [], 0
    for corrupt in CORRUPTIONS:
        for what, mutant in itertools.islice(corrupt(program.model, rng), EACH):
            if not _differs(mutant, inputs, expected):
                continue
            count += 1
            if prove(program.original, mutant).verdict.holds:
                accepted.append(f"{corrupt.__name__}: {what}")
    assert not accepted
    assert count >= 12, f"only {count} mutants of {family} compute something else"
    COUNT[family] = count


def test_there_are_at_least_200_mutants() -> None:
    if set(COUNT) != set(FAMILIES):
        pytest.skip("counted when the whole file runs in one process")
    assert sum(COUNT.values()) >= 200, COUNT
