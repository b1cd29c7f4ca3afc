"""What is asked of a pass that scales or leaves out channels: the same function and related values, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from networks import difference, digest, rounding, values_agree

from rewrite.capture.canonicalize import canonicalize
from rewrite.check.inputs import generate_inputs
from rewrite.check.reference import evaluate
from rewrite.ir.constants import weight_behind
from rewrite.ir.program import Program
from rewrite.ir.weights import MaterializedTensor, Weight
from rewrite.proof import prove
from rewrite.proof.checker import Proof
from rewrite.rule import Applied, Pass, Refused, apply_pass

Inputs = Mapping[str, np.ndarray]


def rewritten(before: Program, rule: Pass, inputs: Inputs) -> tuple[Program, list[Applied]]:
    """`before` after a pass that applies somewhere; values agree, and a second run changes nothing."""
    after = before.clone()
    outcomes = apply_pass(after, rule)
    found = [outcome for outcome in outcomes if isinstance(outcome, Applied)]
    assert found, outcomes
    assert difference(before, after, inputs) <= 1.0
    assert values_agree(before, after, inputs) > 0
    once = digest(after)
    assert not any(isinstance(outcome, Applied) for outcome in apply_pass(after, rule))
    assert digest(after) == once
    return after, found


def check_family(program: Program, rule: Callable[[Program], Pass], applied: int, refused: set[str]) -> Program:
    """A canonical capture after the pass: how often it applies, by what it is refused, and that the function stayed."""
    canonicalize(program)
    after = program.clone()
    outcomes = apply_pass(after, rule(after))
    assert sum(isinstance(outcome, Applied) for outcome in outcomes) == applied, [str(one) for one in outcomes]
    assert {outcome.refusal.requirement for outcome in outcomes if isinstance(outcome, Refused)} == refused
    inputs = generate_inputs(program.model)[1]
    expected = evaluate(program.model, inputs, unrounded=True)
    found = evaluate(after.model, inputs, unrounded=True)
    allowed = rounding(program, inputs)
    for name, array in expected.items():
        assert np.abs(array - found[name]).max() <= allowed * np.abs(array).max(), name
    return after


def proof_of(before: Program, after: Program) -> Proof:
    """The proof, with every relation that speaks of a value of `before` as a claim."""
    names = {value.name for node in before.model.graph for value in node.outputs}
    claims = {name: relation for name, relation in after.relations.items() if name in names}
    return prove(before.model, after.model, claims=claims, transforms=after.transforms)


def replace(program: Program, name: str, change: Callable[[Weight], Weight]) -> None:
    """Make a mutant: an initializer holds what `change` makes of it."""
    value = program.model.graph.initializers[name]
    assert value.dtype is not None
    value.const_value = MaterializedTensor(change(weight_behind(value)), value.dtype, name)


def stored(program: Program, name: str) -> np.ndarray:
    """The exact numbers behind an initializer."""
    return weight_behind(program.model.graph.initializers[name]).numpy()
