"""What smooth must refuse: one case per requirement, and traps."""

import pytest
from networks import network
from refusals import Case, check_refusal

from rewrite.passes import ReparameterizeNormScale, Smooth
from rewrite.rule import Applied, apply_pass

BLOCK = """
block ({types}float[B, 3, 6] x, float[6] g, float[6] b, float[6, 4] w, float[4] c)
    => (float[B, 3, 4] y{outputs})
{{
    n = {norm}
    {inside}
    p = MatMul (r, w)
    y = Add (p, c)
}}
"""


def block(
    inside: str = "r = Identity (n)", norm: str = "LayerNormalization (x, g, b)", types: str = "", outputs: str = ""
) -> str:
    return BLOCK.format(inside=inside, norm=norm, types=types, outputs=outputs)


PADDED = """
padded (float[B, 6, 4, 4] x, float[6] g, float[6] b, float[5, 6, 3, 3] kernel) => (float[B, 5, 4, 4] y)
{
    t = Transpose <perm = [0, 2, 3, 1]> (x)
    n = LayerNormalization (t, g, b)
    c = Transpose <perm = [0, 3, 1, 2]> (n)
    y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (c, kernel)
}
"""

WITHOUT = {
    "R1": Case(
        block(norm="LayerNormalization (x, one, b)", types="float[1] one, "),
        *("n", "LayerNormalization", r"γ has shape \(1,\), not \(6,\)"),
    ),
    "R2": Case(block(outputs=", float[B, 3, 6] n"), "n", "LayerNormalization", "n is an output"),
    "R3": Case(block("r = Relu (n)"), "n", "Relu", "positively homogeneous"),
    "R4": Case(
        block("r = Identity (n) z = MatMul (n, u)", types="float[6, 2] u, ", outputs=", float[B, 3, 2] z"),
        *("n", "MatMul", "something that is not a constant"),
        inputs=("x", "u"),
    ),
    "R5": Case(
        block("r = Identity (n) z = MatMul (x, w)", outputs=", float[B, 3, 4] z"),
        *("n", "MatMul", "w is also read here, and would have to be copied"),
    ),
}
"""Broken whether or not a shift is asked for."""

SHIFTED = {
    "R6": Case(PADDED, "n", "Conv", "a shift would meet the padding of Conv"),
    "R7": Case(
        block("r = Identity (n) z = MatMul (n, v2)", types="float[6, 49] v2, ", outputs=", float[B, 3, 49] z"),
        *("n", "MatMul", "new biases of 49 numbers, 8 × 6 allowed"),
    ),
}
"""Broken by a shift alone."""

TRAPS = {
    "γ is given by the caller": (
        "R1",
        Case(block(), "n", "LayerNormalization", "not a constant of the network", options={"overridable": ("g",)}),
    ),
    "a statistic of the norm is used": (
        "R1",
        Case(
            block(outputs=", float[B, 3, 1] mean").replace("    n = ", "    n, mean = "),
            *("n", "LayerNormalization", "its statistic mean is used"),
        ),
    ),
    "the residual stream is the norm's result (post-LN)": (
        "R3",
        Case(
            block(
                "r = Identity (n) s = MatMul (x, v) z = Add (n, s) m = RMSNormalization (z, g)",
                types="float[6, 6] v, ",
                outputs=", float[B, 3, 6] m",
            ),
            *("n", "RMSNormalization", "touches the norm's result"),
        ),
    ),
    "one table is used for two norms": (
        "R5",
        Case(
            """two (float[B, 6] x, float[6] g, float[6] h, float[6, 4] w) => (float[B, 4] y, float[B, 4] z)
            {
                n = RMSNormalization (x, g)
                m = RMSNormalization (x, h)
                y = MatMul (n, w)
                z = MatMul (m, w)
            }""",
            *("n", "MatMul", "w is also read here"),
        ),
    ),
    "a tied head": (
        "R5",
        Case(
            """tied (int64[B, S] ids, float[7, 6] table, float[6] g) => (float[B, S, 7] y)
            {
                x = Gather (table, ids)
                n = RMSNormalization (x, g)
                head = Transpose <perm = [1, 0]> (table)
                y = MatMul (n, head)
            }""",
            *("n", "Gather", "table is also read here"),
            inputs=("ids",),
        ),
    ),
    "a router is left out": (
        "R3",
        Case(block("r = Identity (n) z = Softmax (n)", outputs=", float[B, 3, 6] z"), "n", "Softmax", "by itself"),
    ),
    "the matrix may be given by the caller": (
        "R4",
        Case(block(), "n", "MatMul", "not a constant", options={"overridable": ("w",)}),
    ),
    "the other factor depends on the input": (
        "R4",
        Case(
            """gram (float[B, 3, 6] x, float[6] g, float[6, 6] w) => (float[B, 3, 3] y)
            {
                n = RMSNormalization (x, g)
                k = MatMul (x, w)
                t = Transpose <perm = [0, 2, 1]> (k)
                y = MatMul (n, t)
            }""",
            *("n", "MatMul", "something that is not a constant"),
        ),
    ),
}

SHIFT_TRAPS = {
    "padding with zeros": (
        "R3",
        Case(
            """pad (float[B, 3, 6] x, float[6] g, float[6] b, float[6, 4] w) => (float[B, 5, 4] y)
            {
                n = LayerNormalization (x, g, b)
                amounts = Constant <value_ints = [0, 1, 0, 0, 1, 0]> ()
                r = Pad (n, amounts)
                y = MatMul (r, w)
            }""",
            *("n", "Pad", ""),
        ),
    ),
    "a stack of matrices": (
        "R6",
        Case(
            """experts (float[3, 3, 6] x, float[6] g, float[6] b, float[3, 6, 2] stack) => (float[3, 3, 2] y)
            { n = LayerNormalization (x, g, b) y = MatMul (n, stack) }""",
            *("n", "MatMul", "a stack of matrices"),
        ),
    ),
    "rows of a table, which the input chooses": (
        "R6",
        Case(
            """chosen (float[5, 6] x, int64[4] ids, float[6] g, float[6] b, float[7, 6] table) => (float[5, 4] y)
            {
                n = LayerNormalization (x, g, b)
                rows = Gather (table, ids)
                t = Transpose <perm = [1, 0]> (rows)
                y = MatMul (n, t)
            }""",
            *("n", "MatMul", "a stack of matrices"),
            inputs=("x", "ids"),
        ),
    ),
}


@pytest.mark.parametrize("requirement", WITHOUT)
@pytest.mark.parametrize("rule", [Smooth(), Smooth(shift=True), ReparameterizeNormScale()])
def test_a_broken_requirement_is_refused(requirement: str, rule: Smooth | ReparameterizeNormScale) -> None:
    check_refusal(rule, requirement, WITHOUT[requirement])


@pytest.mark.parametrize("requirement", SHIFTED)
@pytest.mark.parametrize("rule", [Smooth(shift=True), ReparameterizeNormScale()])
def test_a_broken_requirement_of_shifts_is_refused(requirement: str, rule: Smooth | ReparameterizeNormScale) -> None:
    check_refusal(rule, requirement, SHIFTED[requirement])
    (outcome,) = apply_pass(network(SHIFTED[requirement].text), Smooth())
    assert isinstance(outcome, Applied), "a diagonal passes"


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(Smooth(), *TRAPS[trap])


@pytest.mark.parametrize("trap", SHIFT_TRAPS)
def test_a_trap_of_shifts_is_refused(trap: str) -> None:
    requirement, case = SHIFT_TRAPS[trap]
    check_refusal(Smooth(shift=True), requirement, case)
    check_refusal(ReparameterizeNormScale(), requirement, case)
    (outcome,) = apply_pass(network(case.text, case.inputs), Smooth())
    assert isinstance(outcome, Applied), "a diagonal passes"


@pytest.mark.parametrize("rule", [Smooth, ReparameterizeNormScale])
def test_every_requirement_has_a_case(rule: type[Smooth] | type[ReparameterizeNormScale]) -> None:
    assert {*WITHOUT, *SHIFTED} == {requirement.id for requirement in rule.requires}


def test_the_same_network_without_the_breach_is_rewritten() -> None:
    for rule in (Smooth(), Smooth(shift=True), ReparameterizeNormScale()):
        (outcome,) = apply_pass(network(block()), rule)
        assert isinstance(outcome, Applied)


def test_new_biases_may_be_allowed() -> None:
    (outcome,) = apply_pass(network(SHIFTED["R7"].text), Smooth(shift=True, max_bias_growth=10.0))
    assert isinstance(outcome, Applied)
