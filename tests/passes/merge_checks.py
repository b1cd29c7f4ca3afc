"""What is asked of a pass that merges operators: the same function and values, once, and as often as it is said to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from networks import difference, digest, feed, values_agree

from rewrite.ir.program import Program
from rewrite.rule import Applied, Outcome, Pass, apply_pass


def merged(before: Program, rule: Pass) -> tuple[Program, list[Outcome]]:
    """`before` after a pass: its function and its values are the same, and a second run changes nothing."""
    after, inputs = before.clone(), feed(before)
    outcomes = apply_pass(after, rule)
    assert difference(before, after, inputs) <= 1.0
    values_agree(before, after, inputs)
    once = digest(after)
    assert not any(isinstance(outcome, Applied) for outcome in apply_pass(after, rule))
    assert digest(after) == once
    return after, outcomes


@contextmanager
def whatever_it_costs() -> Iterator[None]:
    """Every operator less is worth it, however large the kernel gets."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("basis.affine_chains", "basis.branches", "passes.merge_affine"):
            patch.setattr(f"rewrite.{module}.PASS", 10**9)
        yield
