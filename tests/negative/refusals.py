"""How negative cases are written and checked: a network per requirement, which breaks that one and keeps the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from networks import digest, network

from rewrite.rule import Applied, Pass, Refused, apply_pass


@dataclass(frozen=True)
class Case:
    """A network (ONNX text), where the refusal must point, and what it must say."""

    text: str
    site: str
    operator: str
    reason: str
    inputs: tuple[str, ...] = ("x",)
    options: Mapping[str, Any] = field(default_factory=dict)


def check_refusal(rule: Pass, requirement: str, case: Case, *, alone: bool = True) -> None:
    """The site is refused for that requirement (`alone`: and no other), at that operator; the network is left alone."""
    program = network(case.text, case.inputs, **case.options)
    before = digest(program)
    sites = {site.name: site for site in rule.sites(program)}
    assert case.site in sites, f"{case.site} is no site; {sorted(sites)} are"
    broken = [one.id for one in rule.requires if one.check(rule, sites[case.site]) is not None]
    assert broken[:1] == [requirement]
    assert not alone or len(broken) == 1, broken
    outcomes = {outcome.site: outcome for outcome in apply_pass(program, rule)}
    refused = outcomes[case.site]
    assert isinstance(refused, Refused), refused
    assert refused.refusal.requirement == requirement
    assert refused.refusal.operator == case.operator
    assert re.search(case.reason, refused.refusal.reason), refused.refusal.reason
    if not any(isinstance(outcome, Applied) for outcome in outcomes.values()):
        assert digest(program) == before
