"""What fold-scale must refuse: one case per requirement, then traps."""

import pytest
from networks import network
from refusals import Case, check_refusal

from rewrite.passes import FoldScale
from rewrite.rule import Applied, apply_pass

BLOCK = """
block ({types}float[B, 4] x, float[4, 6] w, float[6] c, float[6] s) => (float[B, 6] y{outputs})
{{
    p = MatMul (x, w)
    a = Add (p, c)
    {inside}
    y = Mul (h, s)
}}
"""


def block(inside: str = "h = Identity (a)", types: str = "", outputs: str = "") -> str:
    return BLOCK.format(inside=inside, types=types, outputs=outputs)


CASES = {
    "R1": Case(block(), "y", "Mul", "s is not a constant", options={"overridable": ("s",)}),
    "R2": Case(block(outputs=", float[B, 6] a"), "y", "Add", "a is an output of the graph"),
    "R3": Case(block(), "y", "", "c is an initializer that is also", options={"overridable": ("c",)}),
    "R4": Case(
        block("h = Identity (a) z = MatMul (a, v)", types="float[6, 2] v, ", outputs=", float[B, 2] z"),
        *("y", "MatMul", "reads the value before the factor"),
    ),
    "R5": Case(
        block("u = MatMul (x, w2) h = Add (a, u) z = Sigmoid (u)", types="float[4, 6] w2, ", outputs=", float[B, 6] z"),
        *("y", "Sigmoid", "acts on each channel by itself"),
    ),
    "R6": Case(
        block("h = Identity (a) z = MatMul (x, w)", outputs=", float[B, 6] z"),
        *("y", "MatMul", "w is also read here, and would have to be copied"),
    ),
}

TRAPS = {
    "a quotient by zero": (
        "R1",
        Case(block().replace("Mul (h, s)", "Div (h, s)"), "y", "Div", "not finite", options={"s": [1, 1, 0, 1, 1, 1]}),
    ),
    "a norm reads the value too": (
        "R4",
        Case(
            block("h = Identity (a) z = RMSNormalization (a, c)", outputs=", float[B, 6] z"),
            *("y", "RMSNormalization", "reads the value before the factor"),
        ),
    ),
    "a norm writes part of the value": (
        "R5",
        Case(
            block("q = MatMul (x, w2) n = LayerNormalization (q, c) h = Add (a, n)", types="float[4, 6] w2, "),
            *("y", "LayerNormalization", "writes the value"),
        ),
    ),
    "an embedding multiplier over a tied table": (
        "R6",
        Case(
            """tied (int64[B, S] ids, float[7, 6] table) => (float[B, S, 7] y)
            {
                e = Gather (table, ids)
                root = Constant <value_float = 2.5> ()
                x = Mul (e, root)
                t = Tanh (x)
                head = Transpose <perm = [1, 0]> (table)
                y = MatMul (t, head)
            }""",
            *("x", "Transpose", "table is also read here"),
            inputs=("ids",),
        ),
    ),
}


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refusal(FoldScale(), requirement, CASES[requirement])


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(FoldScale(), *TRAPS[trap], alone=False)


def test_every_requirement_has_a_case() -> None:
    assert set(CASES) == {requirement.id for requirement in FoldScale.requires}


def test_the_same_network_without_the_breach_is_rewritten() -> None:
    (outcome,) = apply_pass(network(block()), FoldScale())
    assert isinstance(outcome, Applied)


def test_a_factor_that_widens_the_value_is_no_site() -> None:
    text = """wide (float[B, 4] x, float[4, 1] w, float[6] s) => (float[B, 6] y) { p = MatMul (x, w) y = Mul (p, s) }"""
    assert apply_pass(network(text), FoldScale()) == []


def test_a_product_of_two_activations_is_no_site() -> None:
    text = """gate (float[B, 4] x, float[4, 6] w, float[4, 6] v) => (float[B, 6] y)
    { p = MatMul (x, w) q = MatMul (x, v) y = Mul (p, q) }"""
    assert apply_pass(network(text), FoldScale()) == []


def test_a_quotient_of_integers_is_no_site() -> None:
    text = """whole (int64[B] i, int64[7, 3] table) => (int64[B, 3] y)
    { two = Constant <value_int = 2> () r = Gather (table, i) y = Div (r, two) }"""
    assert apply_pass(network(text, ("i",), table=range(21)), FoldScale()) == []
