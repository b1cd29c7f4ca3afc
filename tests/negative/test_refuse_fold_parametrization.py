"""What fold-parametrization must refuse: one case per requirement, then traps."""

from __future__ import annotations

import pytest
from networks import network
from refusals import Case, check_refusal

from rewrite.passes import FoldParametrization
from rewrite.rule import Applied, apply_pass

NORMED = """
normed (float[B, 4] x, float[4, 6] v, float[1, 6] g) => (float[B, 6] y{outputs})
{{
    axes = Constant <value_ints = [0]> ()
    size = ReduceL2 (v, axes)
    direction = Div (v, size)
    {inside}
    w = Mul (g, scaled)
    y = MatMul (x, w)
}}
"""


def normed(inside: str = "scaled = Identity (direction)", outputs: str = "") -> str:
    return NORMED.format(inside=inside, outputs=outputs)


OUTER = """
outer (float[B, 400] x, float[400, 1] column, float[1, 400] row) => (float[B, 400] y)
{ w = Mul (column, row) y = MatMul (x, w) }
"""
LOW_RANK = """
factors (float[B, 400] x, float[400, 8] a, float[8, 400] b) => (float[B, 400] y)
{ w = MatMul (a, b) y = MatMul (x, w) }
"""

CASES = {
    "R1": Case(normed(), "w", "ReduceL2", "v is an initializer that is also an input", options={"overridable": ("v",)}),
    "R2": Case(
        normed("noise = RandomNormalLike (direction) scaled = Add (direction, noise)"),
        *("w", "RandomNormalLike", "draws random numbers"),
    ),
    "R3": Case(normed(outputs=", float[4, 6] w"), "w", "Mul", "w is an output of the graph"),
    "R4": Case(OUTER, "w", "Mul", r"640,000 bytes, and what it is computed from and nothing else reads 3,200"),
    "R5": Case(normed(), "w", "Mul", "w is not finite", options={"v": [[0.0] * 6] * 4}),
}

TRAPS = {
    "an overridable gain": (
        "R1",
        Case(normed(), "w", "Mul", "g is an initializer that is also", options={"overridable": ("g",)}),
    ),
    "dropped connections": (
        "R2",
        Case(
            normed(
                "half = Constant <value_float = 0.5> () on = Constant <value = bool {1}> () "
                "scaled = Dropout (direction, half, on)"
            ),
            *("w", "Dropout", "draws random numbers"),
        ),
    ),
    "an operator that is not known": (
        "R2",
        Case(
            normed("scaled = Hardmax (direction)"),
            *("w", "Hardmax", "no operator that weights are computed by here"),
        ),
    ),
    "a table of positions": (
        "R2",
        Case(
            normed("angles = Sin (direction) scaled = Mul (angles, g)"),
            *("w", "Sin", "no operator that weights are computed by here"),
        ),
    ),
    "a weight that is rounded before it is computed with": (
        "R2",
        Case(
            normed("short = Cast <to = 10> (direction) scaled = Cast <to = 1> (short)"),
            *("w", "Cast", "rounded to fewer bits"),
        ),
    ),
    "a product that is larger than its factors": ("R4", Case(LOW_RANK, "w", "MatMul", "640,000 bytes")),
    "a matrix that is also read as it is": (
        "R4",
        Case(
            """tied (float[B, 400] x, float[400, 400] w, float[1, 400] g) => (float[B, 400] y)
            { h = MatMul (x, w) t = Tanh (h) s = Mul (w, g) y = MatMul (t, s) }""",
            *("s", "Mul", "640,000 bytes, and what it is computed from and nothing else reads 1,600"),
        ),
    ),
    "a number too large for its type": (
        "R5",
        Case(
            """large (float16[B, 4] x, float16[4, 6] v) => (float16[B, 6] y)
            { p = Cast <to = 1> (v) q = Mul (p, p) w = Cast <to = 10> (q) y = MatMul (x, w) }""",
            *("w", "Cast", "not finite"),
            options={"v": [[300.0] * 6] * 4},
        ),
    ),
}


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refusal(FoldParametrization(), requirement, CASES[requirement])


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(FoldParametrization(), *TRAPS[trap], alone=False)


def test_every_requirement_has_a_case() -> None:
    assert set(CASES) == {requirement.id for requirement in FoldParametrization.requires}


@pytest.mark.parametrize(("text", "growth"), [(normed(), 1.25), (OUTER, 200.0), (LOW_RANK, 50.0)])
def test_the_same_network_without_the_breach_is_rewritten(text: str, growth: float) -> None:
    (outcome,) = apply_pass(network(text), FoldParametrization(growth=growth))
    assert isinstance(outcome, Applied)


def test_what_depends_on_the_input_is_no_site() -> None:
    text = """gated (float[4, 6] x, float[4, 6] v, float[6, 3] w) => (float[4, 3] y)
    { s = Mul (v, x) y = MatMul (s, w) }"""
    assert apply_pass(network(text), FoldParametrization()) == []
