"""What every pass over heads owes, on text networks and on captured families."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from head_networks import fed, program
from networks import difference, digest, rounding, values_agree

from rewrite.capture.canonicalize import canonicalize
from rewrite.check.inputs import generate_inputs
from rewrite.check.reference import evaluate
from rewrite.ir.constants import weight_behind
from rewrite.ir.edit import Editor
from rewrite.ir.program import Program
from rewrite.rule import Applied, Pass, apply_pass

QUICK = ("gpt2", "vit", "llama")
VALUE_FAMILIES: Mapping[str, int] = {
    **dict.fromkeys(("gpt2", "vit", "llama", "qwen2", "qwen3", "gpt_neox", "bloom", "falcon", "falcon_parallel"), 2),
    **dict.fromkeys(("falcon_sequential", "phi", "opt", "mixtral", "gemma2", "starcoder2", "stablelm", "cohere"), 2),
    **dict.fromkeys(("bert", "deit", "beit", "dinov2", "clip_vision", "modernbert", "olmo2"), 2),
    **{"siglip_vision": 3, "swin": 4},
}
"""How many attentions a family has, to whose values a map may be applied."""


def check_applies(rule: Pass, text: str) -> int:
    """The pass applies at the one attention, exactly and not trivially; how many values it relates."""
    before = program(text)
    after = before.clone()
    outcomes = apply_pass(after, rule)
    assert [type(outcome) for outcome in outcomes] == [Applied], [str(outcome) for outcome in outcomes]
    assert digest(before) != digest(after)
    inputs = fed(before)
    assert difference(before, after, inputs) <= 1.0
    return values_agree(before, after, inputs)


def check_second_run(rule: Pass, text: str) -> None:
    """Once is enough."""
    after = program(text)
    apply_pass(after, rule)
    once = digest(after)
    assert not apply_pass(after, rule)
    assert digest(after) == once


def check_mutants(rule: Pass, text: str, blind: tuple[str, ...] = ()) -> None:
    """Whatever constant is left as it was, another function comes out; so does a changed constant times 1.01 or −1.

    `blind` are constants that the network does not depend on.
    """
    before = program(text)
    after = before.clone()
    (outcome,) = apply_pass(after, rule)
    assert isinstance(outcome, Applied)
    inputs = fed(before)
    assert difference(before, after, inputs) <= 1.0, "the positive control"
    for new, old in outcome.changed.items():
        if old in blind:
            continue
        for factor in (None, 1.01, -1.0):
            mutant = after.clone()
            value = mutant.model.graph.initializers[new]
            content = numbers(before, old) if factor is None else numbers(after, new) * factor
            wrong = Editor(mutant.model, "mutant").initializer(f"{new}.wrong", content)
            value.replace_all_uses_with(wrong)
            assert difference(before, mutant, inputs) > 1e4, (new, factor)


def check_family(rule: Pass, after: Program, *, sites: int, refused: str = "") -> None:
    """The pass applies at so many attentions of a captured family (or is refused there), and its function stays."""
    canonicalize(after)
    before = after.clone()
    outcomes = apply_pass(after, rule)
    assert len(outcomes) == sites
    if refused:
        found = {None if isinstance(outcome, Applied) else outcome.refusal.requirement for outcome in outcomes}
        assert found == {refused}
        assert digest(before) == digest(after)
        return
    assert all(isinstance(outcome, Applied) for outcome in outcomes), [str(outcome) for outcome in outcomes]
    assert digest(before) != digest(after)
    inputs = generate_inputs(before.model, sizes=((2, 7),))[0]
    wanted = evaluate(before.model, inputs, unrounded=True)
    found = evaluate(after.model, inputs, unrounded=True)
    allowed = min(rounding(before, inputs), 1e-10)
    for output, array in wanted.items():
        assert np.abs(array - found[output]).max() <= allowed * np.abs(array).max(), output
    assert not apply_pass(after, rule)


def numbers(program: Program, name: str) -> np.ndarray:
    """The exact numbers of a constant in float64, before any rounding."""
    return weight_behind(program.model.graph.initializers[name]).numpy()
