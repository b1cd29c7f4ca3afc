"""What scale-heads must refuse: one case per requirement, then the traps that caught released tools."""

import pytest
from head_cases import VALUE_TRAPS, VALUES
from head_networks import attention, program
from refusals import check_refusal

from rewrite.passes import ScaleHeads
from rewrite.rule import Applied, apply_pass


@pytest.mark.parametrize("requirement", VALUES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refusal(ScaleHeads(), requirement, VALUES[requirement])


@pytest.mark.parametrize("trap", VALUE_TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(ScaleHeads(), *VALUE_TRAPS[trap], alone=False)


def test_every_requirement_has_a_case() -> None:
    assert set(VALUES) == {requirement.id for requirement in ScaleHeads.requires}


def test_the_same_network_without_the_breach_is_rewritten() -> None:
    (outcome,) = apply_pass(program(attention()), ScaleHeads())
    assert isinstance(outcome, Applied)
