"""Who checks the checker, pass by pass: rewritten networks, got wrong in every way we know, and none accepted.

A mutant counts only if a float64 evaluation shows that it computes something else (or, where the model is right and the
certificate lies, that the value is not what is said of it). Beside the mutants of a network stands its positive
control: the rewritten network that they were made from is proved, with every relation.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from networks import feed
from proof.corruptions import CORRUPTIONS
from proof.pass_cases import CASES, Case
from proof.pass_corruptions import stale_constants, wrong_constants, wrong_relations, wrong_transforms

from rewrite.capture.canonicalize import canonicalize
from rewrite.check.inputs import generate_inputs
from rewrite.check.reference import evaluate, values_of
from rewrite.ir.program import Program
from rewrite.pipeline import _claims as claims_of
from rewrite.proof import Verdict, prove
from rewrite.rule import Applied, Pass, apply_pass, steps

WITNESSED = 1e-10
"""Relative: float64 evaluation of these networks is good to 1e-13, three float32 ulps of one weight move them more."""

FALSE = 1e-6
"""Relative: how far from the truth a relation must be that counts as false; constants are not rounded there."""

EACH = 2
"""Mutants of one generic kind a network."""

FUSED_HEADS = ("one matrix of three parts", "one matrix, head by head", "one matrix, group by group")
UNPROVED = frozenset(
    [
        *itertools.product(("affine-heads", "scale-query-key"), FUSED_HEADS[1:]),
        *itertools.product(("scale-query-key",), ("pairs side by side", "partial rotary")),
        *itertools.product(("eliminate-dead-channels",), ("gate", "kernels")),
        *itertools.product(("merge-duplicate-channels",), ("kernels",)),
        *itertools.product(("smooth",), ("block, True", "biases", "stack")),
        *itertools.product(("reparameterize-norm-scale",), ("stack",)),
        *itertools.product(("merge-affine",), ("a crop between",)),
    ]
)
"""Networks whose positive control the proof does not follow: that their mutants are rejected says nothing."""

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Captured:
    """A captured family in canonical form, and the passes that rewrite it."""

    name: str
    captured: Program
    steps: Sequence[Pass[Any]]

    def program(self) -> Program:
        """The network before any pass."""
        canonical = self.captured.clone()
        canonicalize(canonical)
        return canonical


def fed(case: Case | Captured, program: Program) -> list[Inputs]:
    """Two sets of inputs; angles of rotary positions are as long as the sequence."""
    if isinstance(case, Captured):
        return generate_inputs(program.model)[-2:]
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


@dataclass(frozen=True)
class Mutant:
    """What was done and what came of it; `false` is the value whose relation is not true, if the model is right."""

    what: str
    program: Program
    false: str = ""


class Rewritten:
    """A case after its passes, with what float64 evaluation makes of it."""

    def __init__(self, case: Case | Captured, pass_name: str) -> None:
        self.case, self.pass_name = case, pass_name
        self.before = case.program()
        self.after = self.before.clone()
        outcomes = [outcome for step in case.steps for outcome in apply_pass(self.after, step)]
        assert any(isinstance(one, Applied) and one.pass_name == pass_name for one in outcomes), outcomes
        self.inputs = fed(case, self.before)
        self.expected = {
            exact: [evaluate(self.after.model, one, unrounded=exact) for one in self.inputs] for exact in (True, False)
        }
        self.rng = np.random.default_rng(zlib.crc32(f"{pass_name} {case.name}".encode()))

    def proof(self) -> Verdict:
        """The positive control: what is said of the rewritten network, with its relations."""
        claims = claims_of(self.after)
        return prove(self.before.model, self.after.model, claims=claims, transforms=self.after.transforms).verdict

    def mutants(self) -> Iterator[Mutant]:
        """Wrong models, and right ones with a false relation; none is witnessed yet."""
        for corrupt in CORRUPTIONS:
            for what, model in itertools.islice(corrupt(self.after.model, self.rng), EACH):
                mutant = self.after.clone()
                mutant.model = model
                yield Mutant(f"{corrupt.__name__}: {what}", mutant)
        for generate in (wrong_constants, wrong_transforms):
            for what, mutant in generate(self.after, self.pass_name, self.rng):
                yield Mutant(f"{generate.__name__}: {what}", mutant)
        for what, mutant in stale_constants(self.after, self.before, self.pass_name):
            yield Mutant(f"stale_constants: {what}", mutant)
        claims = claims_of(self.after)
        for what, name, relation, transforms in wrong_relations(claims, self.after.transforms, self.rng):
            mutant = self.after.clone()
            mutant.relations = {**claims, name: relation}
            mutant.transforms = dict(transforms)
            yield Mutant(f"wrong_relations: {what}", mutant, name)

    def witnessed(self, mutant: Mutant) -> bool:
        """Whether float64 evaluation shows that the mutant computes something else, or says what is not true."""
        if mutant.false:
            name, relation = mutant.false, mutant.program.relations[mutant.false]
            transforms = mutant.program.transforms
            return any(self.false(a[name], b[name], relation, transforms) for a, b in self.values)
        return self.differs(mutant.program.model)

    @cached_property
    def values(self) -> list[tuple[Inputs, Inputs]]:
        """All values of the original and of the rewritten network."""
        return [
            (dict(values_of(self.before.model, one)), dict(values_of(self.after.model, one, unrounded=True)))
            for one in self.inputs
        ]

    def accepted(self, mutant: Mutant) -> list[str]:
        """How a mutant is accepted: with what is claimed of it, or, if it computes something else, without."""
        original, program, found = self.before.model, mutant.program, []
        if prove(original, program.model, claims=claims_of(program), transforms=program.transforms).verdict.holds:
            found.append(f"{self.case.name}: {mutant.what}, with relations")
        if not mutant.false and prove(original, program.model).verdict.holds:
            found.append(f"{self.case.name}: {mutant.what}")
        return found

    def differs(self, model: ir.Model) -> bool:
        """Whether float64 evaluation tells `model` from the rewritten one; one that cannot run is no mutant.

        It does so with constants that are not rounded (LayerNorm for RMSNorm is right where the stream is centred
        exactly) and with those that are (a corruption also rounds what it does not change).
        """
        return all(self.departs(model, exact) for exact in (True, False))

    def departs(self, model: ir.Model, exact: bool) -> bool:
        """Whether another function comes out, with constants as they were computed or as they are stored."""
        told = False
        for one, wanted in zip(self.inputs, self.expected[exact]):
            try:
                found = evaluate(model, one, unrounded=exact)
            except Exception:  # noqa: BLE001 - whatever a corruption breaks, such a model needs no proof to be rejected
                return False
            if found.keys() != wanted.keys():
                return False
            for name, value in wanted.items():
                if found[name].shape != value.shape or not np.isfinite(found[name]).all():
                    return False
                told = told or bool(np.linalg.norm(found[name] - value) > WITNESSED * np.linalg.norm(value))
        return told

    def false(self, value: np.ndarray, found: np.ndarray, relation: dict[str, Any], transforms: dict[str, Any]) -> bool:
        """Whether `found` is not what the relation makes of `value`."""
        expected = value
        try:
            for step in steps(relation) if relation["transform"] != "identity" else []:
                if step["transform"] == "centre":
                    expected = expected - expected.mean(axis=step["axis"], keepdims=True)
                else:
                    expected = transforms[step["transform"]].apply(expected, step["axis"])
        except (IndexError, ValueError):
            return True
        if expected.shape != found.shape:
            return True
        return bool(np.linalg.norm(expected - found) > FALSE * np.linalg.norm(value))


def check_pass(pass_name: str, stride: int = 1) -> int:
    """Every mutant (every `stride`th) of every network of a pass is rejected; how many there were."""
    place = itertools.count()
    return sum(check_case(case, pass_name, place, stride) for case in CASES[pass_name]())


def check_case(case: Case | Captured, pass_name: str, place: Iterator[int], stride: int = 1) -> int:
    """The rewritten network is proved and every mutant (every `stride`th) rejected; how many there were."""
    accepted, count = [], 0
    rewritten = Rewritten(case, pass_name)
    verdict = rewritten.proof()
    if (pass_name, case.name) in UNPROVED and not verdict.holds:
        return 0
    assert verdict.holds, f"positive control {case.name}: {verdict}"
    for mutant in rewritten.mutants():
        if next(place) % stride == 0 and rewritten.witnessed(mutant):
            count += 1
            accepted += rewritten.accepted(mutant)
    assert not accepted, "\n".join(accepted)
    return count
