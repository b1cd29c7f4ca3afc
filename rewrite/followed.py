"""Which sites of an approximation the proof follows, where it does not follow all of them.

One weight that the proof cannot follow into what reads it (the input of a recurrence, a gate) is no reason to leave the
others in floating point. Sites whose names differ in numbers alone, as those of layers do, are kept or left together;
halves of what fails are tried until those that fail are alone. That is done on a draft, with codes by the nearest,
since what the proof follows depends on places and not on how well codes were chosen.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rewrite.ir.program import Program
from rewrite.proof import Proof, Verdict
from rewrite.rule import Applied, Outcome, Pass, Refusal, Refused, apply_pass

PROVED = "the rewritten network is proved equal"
_QUICK = {"method": "nearest", "clip": False, "saturation_free": False}


def followed(
    program: Program, rule: Pass[Any], proved: Callable[[Program], Proof]
) -> tuple[Program, list[Outcome], Proof] | None:
    """A copy of `program` with `rule`, calibrated and with an option `keep`, at those of its sites that are `proved`.

    The rest is refused, each with what the proof said of it. None where no site can be followed.
    """
    options: Any = rule
    if not hasattr(rule, "keep"):
        return None
    draft = replace(options, **{name: value for name, value in _QUICK.items() if hasattr(rule, name)})
    groups: dict[str, list[str]] = {}
    for outcome in apply_pass(program.clone(), draft):
        if isinstance(outcome, Applied):
            groups.setdefault(re.sub(r"\d+", "#", outcome.site), []).append(outcome.site)

    def attempt(step: Any, chosen: list[str]) -> tuple[Program, list[Outcome], Proof]:
        left = [glob.escape(site) for group, sites in groups.items() if group not in chosen for site in sites]
        trial = program.clone()
        done = apply_pass(trial, replace(step, keep=(*step.keep, *left)))
        return trial, done, proved(trial)

    accepted: list[str] = []
    verdicts: dict[str, Verdict] = {}
    pending = [list(groups)]
    while pending:
        some = pending.pop()
        verdict = attempt(draft, accepted + some)[2].verdict
        if verdict.holds:
            accepted += some
        elif len(some) > 1:
            pending += [some[len(some) // 2 :], some[: len(some) // 2]]
        elif some:
            verdicts[some[0]] = verdict
    if not accepted:
        return None
    work, outcomes, proof = attempt(rule, accepted)
    if not proof.verdict.holds:
        return None
    reasons = {site: verdict for group, verdict in verdicts.items() for site in groups[group]}
    told = [refused(rule, one.site, reasons[one.site]) if one.site in reasons else one for one in outcomes]
    return work, told, proof


def refused(rule: Pass[Any], site: str, verdict: Verdict) -> Refused:
    """That the proof does not follow a pass at a site."""
    return Refused(rule.name, site, Refusal("PROOF", PROVED, verdict.node, "", verdict.reason))


__all__ = ["followed", "refused"]
