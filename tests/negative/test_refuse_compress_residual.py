"""What compress-residual must refuse: one case per requirement, each on a network that center-residual was tried on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from networks import digest, network

from rewrite.ir.program import Program
from rewrite.passes import CenterResidual, CompressResidual, FoldNorm, RotateResidual
from rewrite.rule import Applied, Refused, apply_pass

BLOCK = """
block ({types}float[B, 4] x, float[4, 8] w, float[8] c, float[8] even, float[8] g, float[8, 3] v)
    => (float[B, 3] y{outputs})
{{
    product = MatMul (x, w)
    s = Add (product, c)
    {inside}
    n = RMSNormalization (s, {scale})
    y = {reader}
}}
"""


def block(
    inside: str = "", scale: str = "even", reader: str = "MatMul (n, v)", types: str = "", outputs: str = ""
) -> str:
    return BLOCK.format(inside=inside, scale=scale, reader=reader, types=types, outputs=outputs)


@dataclass(frozen=True)
class Broken:
    """A network, whether its values are said to be centred, and where and why it is refused."""

    text: str
    operator: str
    reason: str
    centred: bool = True
    inputs: tuple[str, ...] = ("x",)
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    site: str = "s"


CASES = {
    "R1": Broken(block(), "Add", "s is written with a mean", centred=False),
    "R2": Broken(block(scale="g"), "RMSNormalization", "γ of RMSNormalization is not one constant"),
    "R3": Broken(block(outputs=", float[B, 8] s"), "Add", "s is an output of the graph"),
    "R4": Broken(
        block().replace("[B, 4]", "[B, 40]").replace("[4, 8]", "[40, 8]"),
        *("", "w is an initializer that is also a graph input"),
        options={"overridable": ("w",)},
    ),
    "R5": Broken(block("r = Relu (s)", outputs=", float[B, 8] r"), "Relu", "positively homogeneous"),
    "R6": Broken(
        block(reader="MatMul (n, z)", types="float[8, 3] z, "),
        *("MatMul", "something that is not a constant"),
        inputs=("x", "z"),
    ),
    "R7": Broken(
        block(
            "sizes = Shape (z) t = Reshape (s, sizes) raw = MatMul (t, v)",
            types="float[5, 1, 8] z, ",
            outputs=", float[5, 1, 3] raw",
        ).replace("float[B,", "float[5,"),
        *("Reshape", "sizes that Reshape is told are computed"),
        inputs=("x", "z"),
    ),
}

TRAPS = {
    "an RMSNorm network is not centred": ("R1", Broken(block(), "Add", "with a mean", centred=False)),
    "a LayerNorm is left": (
        "R1",
        Broken(
            block("m = LayerNormalization (s, even)", outputs=", float[B, 8] m"),
            *("LayerNormalization", "has not centred the stream"),
        ),
    ),
    "γ is shorter than the axis": (
        "R2",
        Broken(block(scale="one", types="float[1] one, "), "RMSNormalization", r"γ has shape (1,)"),
    ),
    "one number is added to all channels": (
        "R5",
        Broken(
            block().replace("s = Add (product, c)", "h = Constant <value_float = 0.5> () s = Add (product, h)"),
            *("Add", "one number to all channels"),
        ),
    ),
    "attention divides by the root of the number of channels": (
        "R6",
        Broken(
            """heads (float[B, 1, S, 4] x, float[4, 8] w, float[8] even, float[2, 1, 3, 8] k, float[2, 1, 3, 5] v)
                => (float[2, 1, S, 5] y)
            {
                s = MatMul (x, w)
                n = RMSNormalization (s, even)
                y = Attention (n, k, v)
            }""".replace("[B,", "[2,"),
            *("Attention", "depends on the number of channels"),
        ),
    ),
    "a reshape that copies the size from where it was": (
        "R7",
        Broken(
            """copies (float[5, 8, 4] x, float[4, 8] w, float[8] even, float[8, 3] v) => (float[1, 5, 8, 3] y)
            {
                s = MatMul (x, w)
                sizes = Constant <value_ints = [1, 5, 0, 8]> ()
                n = RMSNormalization (s, even)
                t = Reshape (n, sizes)
                y = MatMul (t, v)
            }""",
            *("Reshape", "copies a size from another place"),
        ),
    ),
    "one channel": (
        "R7",
        Broken(
            """thin (float[B, 4] x, float[4, 1] w, float[1] even, float[1, 3] v) => (float[B, 3] y)
            { s = MatMul (x, w) n = RMSNormalization (s, even) y = MatMul (n, v) }""",
            *("RMSNormalization", "has none to spare"),
        ),
    ),
}


def prepared(case: Broken) -> Program:
    weights = {"even": np.full(1 if "float[1] even" in case.text else 8, 0.5)}
    if "float[1] one" in case.text:
        weights["one"] = np.ones(1)
    program = network(case.text, case.inputs, **weights, **case.options)
    if case.centred:
        # As if center-residual had run: the requirement under test is another.
        for node in program.model.graph:
            for value in node.outputs:
                program.relations[value.name or ""] = {"transform": "centre", "axis": 1, "pass": "center-residual"}
    return program


def check_refused(requirement: str, case: Broken, *, alone: bool) -> None:
    program, rule = prepared(case), CompressResidual()
    before = digest(program)
    (site,) = (site for site in rule.sites(program) if site.name == case.site)
    broken = [one.id for one in rule.requires if one.check(rule, site) is not None]
    assert broken[:1] == [requirement]
    assert not alone or len(broken) == 1, broken
    outcomes = apply_pass(program, rule)
    (refused,) = (one for one in outcomes if one.site == case.site)
    assert isinstance(refused, Refused)
    assert refused.refusal.operator == case.operator
    assert case.reason in refused.refusal.reason
    assert digest(program) == before


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refused(requirement, CASES[requirement], alone=True)


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refused(*TRAPS[trap], alone=False)


def test_every_requirement_has_a_case() -> None:
    assert set(CASES) == {requirement.id for requirement in CompressResidual.requires}


def test_a_stream_that_was_rotated_is_not_compressed() -> None:
    text = block().replace("RMSNormalization (s, even)", "LayerNormalization (s, g)")
    for rules, kind in (
        ((CenterResidual(), FoldNorm()), Applied),
        ((CenterResidual(), FoldNorm(), RotateResidual()), Refused),
    ):
        program = network(text, even=np.ones(8))
        for rule in rules:
            apply_pass(program, rule)
        (outcome,) = apply_pass(program, CompressResidual())
        assert isinstance(outcome, kind)
        if isinstance(outcome, Refused):
            assert outcome.refusal.requirement == "R1"
            assert "turned since" in outcome.refusal.reason
