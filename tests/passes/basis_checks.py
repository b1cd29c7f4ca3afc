"""What is asked of a pass that changes a basis: the same function and values, a proof, and a file that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from networks import difference, digest, values_agree

import rewrite
from rewrite.check.reference import evaluate
from rewrite.check.runtime import run
from rewrite.ir.program import Program
from rewrite.proof import prove
from rewrite.proof.checker import Proof
from rewrite.rule import Applied, Outcome, Pass, apply_pass

Inputs = Mapping[str, np.ndarray]


def applied(program: Program, rules: Sequence[Pass]) -> list[Outcome]:
    """Run passes in place; a second run of the last one changes nothing."""
    outcomes = [outcome for rule in rules for outcome in apply_pass(program, rule)]
    once, records = digest(program), list(program.records)
    assert not any(isinstance(outcome, Applied) for outcome in apply_pass(program, rules[-1]))
    assert digest(program) == once
    program.records[:] = records
    return outcomes


def check_same(before: Program, after: Program, inputs: Inputs) -> int:
    """The function and every related value agree in float64; how many values were not the identity."""
    assert difference(before, after, inputs) <= 1.0
    return values_agree(before, after, inputs)


def check_proved(before: Program, after: Program) -> Proof:
    """The proof follows, with every relation as a claim."""
    names = {value.name for node in before.model.graph for value in node.outputs}
    claims = {name: relation for name, relation in after.relations.items() if name in names}
    proof = prove(before.model, after.model, claims=claims, transforms=after.transforms)
    assert proof.verdict.holds, proof.verdict
    assert all(proof.claims.values()), [name for name, holds in proof.claims.items() if not holds]
    return proof


def check_runs(before: Program, after: Program, inputs: Inputs) -> None:
    """The lowered file runs, and is as near to the original in float64 as a float32 run of it, give or take 8 times.

    A rotation sums d products of about the same size where there was one large one.
    """
    exact = evaluate(before.model, inputs)
    ours = run(rewrite.lower(after).model, inputs)
    theirs = run(before.model, inputs)
    for name, expected in exact.items():
        noise = max(float(np.linalg.norm(theirs[name] - expected)), np.finfo(np.float32).eps * np.linalg.norm(expected))
        assert np.linalg.norm(ours[name] - expected) <= 8 * noise, name
