"""What scale-query-key must refuse: one case per requirement, then the traps that caught released tools."""

import pytest
from head_cases import LOGIT_TRAPS, LOGITS
from head_networks import attention, program
from refusals import check_refusal

from rewrite.passes import ScaleQueryKey
from rewrite.rule import Applied, apply_pass


@pytest.mark.parametrize("requirement", LOGITS)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refusal(ScaleQueryKey(), requirement, LOGITS[requirement])


@pytest.mark.parametrize("trap", LOGIT_TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(ScaleQueryKey(), *LOGIT_TRAPS[trap], alone=False)


def test_every_requirement_has_a_case() -> None:
    assert set(LOGITS) == {requirement.id for requirement in ScaleQueryKey.requires}


def test_the_same_network_without_the_breach_is_rewritten() -> None:
    (outcome,) = apply_pass(program(attention()), ScaleQueryKey())
    assert isinstance(outcome, Applied)
