"""Who checks the checker, pass by pass: rewritten networks, got wrong in every way we know, and none accepted.

A mutant counts only if a float64 evaluation shows that it computes something else (or, where the model is right and the
certificate lies, that the value is not what is said of it). Beside the mutants of a network stands its positive
control: the rewritten network that they were made from is proved, with every relation.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from networks import feed
from proof.corruptions import CORRUPTIONS
from proof.pass_cases import CASES, Case
from proof.pass_corruptions import wrong_constants, wrong_relations, wrong_transforms

from rewrite.check.reference import evaluate, values_of
from rewrite.ir.program import Program
from rewrite.pipeline import _claims as claims_of
from rewrite.proof import prove
from rewrite.rule import Applied, apply_pass, steps

WITNESSED = 1e-10
"""Relative: float64 evaluation of these networks is good to 1e-13, three float32 ulps of one weight move them more."""

FALSE = 1e-6
"""Relative: how far from the truth a relation must be that counts as false; constants are not rounded there."""

EACH = 2
"""Mutants of one generic kind a network."""

FLOORS = {name: 0 for name in CASES}
"""How many mutants of a pass there are at least."""

Inputs = dict[str, np.ndarray]


def fed(case: Case, program: Program) -> list[Inputs]:
    """Two sets of inputs; angles of rotary positions are as long as the sequence."""
    made = []
    for seed in (0, 1):
        inputs = feed(program, seed, 2)
        if "past" in inputs:
            shapes = {"x": (2, 2, 1, 8), "step": (2, 2, 1, 8), "past": (2, 2, 4, 8), "v": (2, 2, 5, 8)}
            generator = np.random.default_rng(seed)
            inputs = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        elif "angles" in inputs:
            shape = (*inputs["angles"].shape[:2], 5, inputs["angles"].shape[3])
            inputs["angles"] = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        made.append(inputs)
    return made


class Rewritten:
    """A case after its passes, with what float64 evaluation makes of it."""

    def __init__(self, case: Case, pass_name: str) -> None:
        self.case, self.pass_name = case, pass_name
        self.before = case.program()
        self.after = self.before.clone()
        outcomes = [outcome for step in case.steps for outcome in apply_pass(self.after, step)]
        assert any(isinstance(one, Applied) and one.pass_name == pass_name for one in outcomes), outcomes
        self.inputs = fed(case, self.before)
        self.expected = [evaluate(self.after.model, one, unrounded=True) for one in self.inputs]
        self.rng = np.random.default_rng(zlib.crc32(f"{pass_name} {case.name}".encode()))

    def control(self) -> None:
        """The rewritten network is proved, with its relations."""
        proof = prove(
            self.before.model, self.after.model, claims=claims_of(self.after), transforms=self.after.transforms
        )
        assert proof.verdict.holds, f"positive control {self.case.name}: {proof.verdict}"

    def models(self) -> Iterator[tuple[str, Program]]:
        """Wrong models, witnessed."""
        for corrupt in CORRUPTIONS:
            for what, model in itertools.islice(corrupt(self.after.model, self.rng), EACH):
                mutant = self.after.clone()
                mutant.model = model
                if self.differs(model):
                    yield f"{corrupt.__name__}: {what}", mutant
        for generate in (wrong_constants, wrong_transforms):
            for what, mutant in generate(self.after, self.pass_name, self.rng):
                if self.differs(mutant.model):
                    yield f"{generate.__name__}: {what}", mutant

    def differs(self, model: ir.Model) -> bool:
        """Whether float64 evaluation tells `model` from the rewritten one; one that cannot run is no mutant.

        Constants are not rounded: LayerNorm for RMSNorm is right where the stream is centred exactly.
        """
        told = False
        for one, wanted in zip(self.inputs, self.expected):
            try:
                found = evaluate(model, one, unrounded=True)
            except Exception:  # noqa: BLE001 - whatever a corruption breaks, such a model needs no proof to be rejected
                return False
            if found.keys() != wanted.keys():
                return False
            for name, value in wanted.items():
                if found[name].shape != value.shape or not np.isfinite(found[name]).all():
                    return False
                told = told or bool(np.linalg.norm(found[name] - value) > WITNESSED * np.linalg.norm(value))
        return told

    def lies(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """(what, claims, transforms) with one false relation, witnessed."""
        claims = claims_of(self.after)
        originals = [dict(values_of(self.before.model, one)) for one in self.inputs]
        rewritten = [dict(values_of(self.after.model, one, unrounded=True)) for one in self.inputs]
        for what, name, relation, transforms in wrong_relations(claims, self.after.transforms, self.rng):
            if any(self.false(a[name], b[name], relation, transforms) for a, b in zip(originals, rewritten)):
                yield f"wrong_relations: {what}", {**claims, name: relation}, transforms

    def false(self, value: np.ndarray, found: np.ndarray, relation: dict[str, Any], transforms: dict[str, Any]) -> bool:
        """Whether `found` is not what the relation makes of `value`."""
        expected = value
        try:
            for step in steps(relation) if relation["transform"] != "identity" else []:
                if step["transform"] == "centre":
                    expected = expected - expected.mean(axis=step["axis"], keepdims=True)
                else:
                    expected = transforms[step["transform"]].apply(expected, step["axis"])
        except ValueError:
            return True
        if expected.shape != found.shape:
            return True
        return bool(np.linalg.norm(expected - found) > FALSE * np.linalg.norm(value))


def check_pass(pass_name: str) -> int:
    """Every mutant of every network of a pass is rejected; how many there were."""
    accepted, count = [], 0
    for case in CASES[pass_name]():
        rewritten = Rewritten(case, pass_name)
        rewritten.control()
        original = rewritten.before.model
        for what, mutant in rewritten.models():
            count += 1
            claims = claims_of(mutant)
            if prove(original, mutant.model, claims=claims, transforms=mutant.transforms).verdict.holds:
                accepted.append(f"{case.name}: {what}, with relations")
            if prove(original, mutant.model).verdict.holds:
                accepted.append(f"{case.name}: {what}")
        for what, claims, transforms in rewritten.lies():
            count += 1
            if prove(original, rewritten.after.model, claims=claims, transforms=transforms).verdict.holds:
                accepted.append(f"{case.name}: {what}")
    assert not accepted, "\n".join(accepted)
    assert count >= FLOORS[pass_name], f"only {count} mutants of {pass_name} compute something else"
    return count
