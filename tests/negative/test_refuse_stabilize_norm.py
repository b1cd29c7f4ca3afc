"""What stabilize-norm must refuse: one case per requirement, and traps."""

from dataclasses import replace

import pytest
from networks import network
from refusals import Case, check_refusal

from rewrite.passes import StabilizeNorm
from rewrite.rule import Applied, apply_pass

RULE = StabilizeNorm(scale=2.0**-4)

STREAM = """
stream ({types}int64[B, 3] ids, float[9, 6] table, float[6] g, float[6, 5] w, float[5, 6] v, float[6, 4] head)
    => (float[B, 3, 4] y{outputs})
{{
    x0 = Gather (table, ids)
    {inside}
    n = {norm} (s, g)
    y = MatMul (n, head)
}}
"""


def stream(
    inside: str = "s = Identity (x0)", types: str = "", outputs: str = "", norm: str = "n = RMSNormalization"
) -> str:
    return STREAM.format(inside=inside, types=types, outputs=outputs, norm=norm.removeprefix("n = "))


IDS = ("ids",)

CASES = {
    "R1": Case(
        stream(outputs=", float[B, 3, 1] mean", norm="LayerNormalization").replace("    n = ", "    n, mean = "),
        *("s", "LayerNormalization", "its statistic mean is used", IDS),
    ),
    "R2": Case(stream("s = Gelu (x0)"), "s", "Gelu", "acts on each channel by itself", IDS),
    "R3": Case(stream(outputs=", float[B, 3, 6] s"), "s", "Identity", "s is an output", IDS),
    "R4": Case(
        stream("e = MatMul (x0, w) f = MatMul (e, v) s = LayerNormalization (f, shape)", "float[6] shape, "),
        *("s", "LayerNormalization", "shape writes the stream and is not a constant", IDS),
        options={"overridable": ("shape",)},
    ),
    "R5": Case(
        stream("s = Identity (x0) z = MatMul (s, u)", "float[6, 2] u, ", ", float[B, 3, 2] z"),
        *("s", "MatMul", "not a constant", ("ids", "u")),
    ),
    "R6": Case(
        stream(
            "s = Identity (x0) t = Transpose <perm = [1, 0]> (table) z = MatMul (p, t)",
            "float[B, 3, 6] p, ",
            ", float[B, 3, 9] z",
        ),
        *("s", "Transpose", "table is also read here, and would have to be copied", ("ids", "p")),
    ),
    "R7": Case(
        stream(
            "s = Identity (x0) z = MatMul (s, u) o = MatMul (p, u)",
            "float[6, 2] u, float[B, 3, 6] p, ",
            ", float[B, 3, 2] z, float[B, 3, 2] o",
        ),
        *("s", "MatMul", "u is also read here", ("ids", "p")),
    ),
    "R8": Case(
        stream(norm="RMSNormalization <epsilon = 1e-37>"),
        *("s", "RMSNormalization", "is no number of float, in which it computes", IDS),
    ),
}

TRAPS = {
    "ε vanishes where a norm computes in float16": (
        "R8",
        Case(
            stream(norm="RMSNormalization <epsilon = 1e-5, stash_type = 10>"),
            *("s", "RMSNormalization", "is no number of float16", IDS),
        ),
    ),
    "a graph input joins the stream": (
        "R3",
        Case(stream("s = Add (x0, p)", "float[B, 3, 6] p, "), "s", "", "p is an input", ("ids", "p")),
    ),
    "a number is added to the stream": (
        "R2",
        Case(stream("one = Constant <value_float = 1.0> () s = Add (x0, one)"), "s", "Add", "one number", IDS),
    ),
    "the stream multiplies itself": ("R2", Case(stream("s = Mul (x0, x0)"), "s", "Mul", "squares the value", IDS)),
    "a table may be given by the caller": (
        "R4",
        Case(stream(), "s", "", "", IDS, {"overridable": ("table",)}),
    ),
}


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refusal(RULE, requirement, CASES[requirement])


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(RULE, *TRAPS[trap])


def test_every_requirement_has_a_case() -> None:
    assert set(CASES) == {requirement.id for requirement in StabilizeNorm.requires}


def test_the_same_network_without_the_breach_is_rewritten() -> None:
    (outcome,) = apply_pass(network(stream(), IDS), RULE)
    assert isinstance(outcome, Applied)


def test_an_epsilon_of_zero_stays_zero() -> None:
    (outcome,) = apply_pass(network(stream(norm="RMSNormalization <epsilon = 0.0>"), IDS), RULE)
    assert isinstance(outcome, Applied)


def test_copies_may_be_asked_for() -> None:
    case = CASES["R6"]
    (outcome,) = apply_pass(network(case.text, case.inputs), replace(RULE, untie=True))
    assert isinstance(outcome, Applied)
