"""What fold-norm must refuse: one case per requirement, then the traps that caught released tools."""

import pytest
from networks import network
from refusals import Case, check_refusal

from rewrite.passes import FoldNorm
from rewrite.rule import Applied, apply_pass

BLOCK = """
block ({types}float[B, 3, 6] x, float[6] g, float[6] b, float[6, 4] w, float[4] c, float[6, 5] v)
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


CASES = {
    "R1": Case(
        block(norm="LayerNormalization (x, one, b)", types="float[1] one, "),
        *("n", "LayerNormalization", r"γ has shape \(1,\), not \(6,\)"),
    ),
    "R2": Case(block("r = Identity (n)", outputs=", float[B, 3, 6] n"), "n", "LayerNormalization", "n is an output"),
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
    "R6": Case(
        block("r = Identity (n) z = MatMul (n, stack)", types="float[3, 6, 2] stack, ", outputs=", float[B, 3, 2] z")
        .replace("float[B, 3, 6] x", "float[3, 3, 6] x")
        .replace("float[B, 3", "float[3, 3"),
        *("n", "MatMul", "a stack of matrices"),
    ),
    "R7": Case(
        block("r = Identity (n) z = MatMul (n, v2)", types="float[6, 49] v2, ", outputs=", float[B, 3, 49] z"),
        *("n", "MatMul", "new biases of 49 numbers, 8 × 6 allowed"),
    ),
}

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
        Case(block("r = Identity (n) z = Add (n, x)", outputs=", float[B, 3, 6] z"), "n", "Add", ""),
    ),
    "the norm's result is padded with zeros, which have no β": (
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
    "another value is concatenated to it": (
        "R3",
        Case(
            """join (float[B, 3, 6] x, float[1, 1, 6] token, float[6] g, float[6] b, float[6, 4] w)
                => (float[1, 4, 4] y)
            {
                n = LayerNormalization (x, g, b)
                r = Concat <axis = 1> (token, n)
                y = MatMul (r, w)
            }""".replace("float[B", "float[1"),
            *("n", "Concat", "touches the norm's result as well"),
        ),
    ),
    "the router of a mixture is no matrix product": (
        "R3",
        Case(
            block("r = Identity (n) z = Softmax (n)", outputs=", float[B, 3, 6] z"),
            *("n", "Softmax", "acts on each channel by itself"),
        ),
    ),
    "per-head norms of queries and keys": (
        "R4",
        Case(
            """heads (float[B, 2, 5, 6] q, float[B, 2, 5, 6] k, float[6] g, float[6] h) => (float[B, 2, 5, 5] y)
            {
                a = RMSNormalization (q, g)
                b = RMSNormalization (k, h)
                t = Transpose <perm = [0, 1, 3, 2]> (b)
                y = MatMul (a, t)
            }""",
            *("a", "MatMul", "something that is not a constant"),
            inputs=("q", "k"),
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
    "one Linear reads two norms": (
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
    "β meets rows of a table, which the input chooses": (
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
    "the matrix may be given by the caller": (
        "R4",
        Case(block(), "n", "MatMul", "not a constant", options={"overridable": ("w",)}),
    ),
}


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refusal(FoldNorm(), requirement, CASES[requirement])


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(FoldNorm(), *TRAPS[trap])


def test_every_requirement_has_a_case() -> None:
    assert set(CASES) == {requirement.id for requirement in FoldNorm.requires}


def test_the_same_network_without_the_breach_is_rewritten() -> None:
    (outcome,) = apply_pass(network(block()), FoldNorm())
    assert isinstance(outcome, Applied)


def test_a_norm_without_scale_and_shift_is_no_site() -> None:
    text = block(norm="LayerNormalization (x, g, b)")
    assert apply_pass(network(text, g=[1.0] * 6, b=[0.0] * 6), FoldNorm()) == []


def test_new_biases_may_be_allowed() -> None:
    (outcome,) = apply_pass(network(CASES["R7"].text), FoldNorm(max_bias_growth=10.0))
    assert isinstance(outcome, Applied)
    assert outcome.notes == ("z has a new bias of 49 numbers",)
