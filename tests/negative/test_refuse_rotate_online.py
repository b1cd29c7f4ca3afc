"""What rotate-online must refuse, and what is no place for it at all."""

from __future__ import annotations

import numpy as np
import pytest
from networks import difference, feed, network
from refusals import Case, check_refusal

from rewrite.passes import RotateOnline
from rewrite.rule import Applied, apply_pass

HIDDEN = """
hidden ({types}float[B, 6] x, float[6, 8] w, float[8, 5] v) => (float[B, 5] y{outputs})
{{
    g = MatMul (x, w)
    h = Relu (g)
    {inside}
    y = MatMul (h, {matrix})
}}
"""


def hidden(inside: str = "", matrix: str = "v", types: str = "", outputs: str = "") -> str:
    return HIDDEN.format(inside=inside, matrix=matrix, types=types, outputs=outputs)


CASES = {
    "R1": Case(
        hidden().replace("[6, 8]", "[6, 14]").replace("[8, 5]", "[14, 5]"),
        "h",
        "MatMul",
        "no Hadamard matrix divides 14",
    ),
    "R2": Case(
        hidden(
            "t = Transpose <perm = [1, 0]> (u) other = MatMul (g, t)",
            matrix="t",
            types="float[5, 8] u, ",
            outputs=", float[B, 5] other",
        ),
        *("h", "MatMul", "no nonlinear operator's result"),
    ),
    "R3": Case(
        hidden(
            "t = Transpose <perm = [1, 0]> (u) other = Relu (t)",
            matrix="t",
            types="float[5, 8] u, ",
            outputs=", float[8, 5] other",
        ),
        *("h", "MatMul", "not a constant .*Relu"),
    ),
    "R4": Case(
        """cached (float[B, 2, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v, float[B, 2, T, 8] pk,
                   float[B, 2, T, 8] pv) => (float[B, 2, S, 8] y, float[B, 2, U, 8] nk, float[B, 2, U, 8] nv)
        { y, nk, nv = Attention (q, k, v, , pk, pv) }""",
        *("y", "Attention", "keeps the keys in a cache"),
        inputs=("q", "k", "v", "pk", "pv"),
    ),
    "R5": Case(
        """columns (float[B, S, 8] q, float[B, 8, T] k, float[B, T, 4] v) => (float[B, S, 4] y)
        { scores = MatMul (q, k) shares = Softmax <axis = -1> (scores) y = MatMul (shares, v) }""",
        *("scores", "MatMul", "channels of k are never a last axis"),
        inputs=("q", "k", "v"),
    ),
}

TRAPS = {
    "fewer channels than asked for": (
        "R1",
        Case(
            hidden().replace("[6, 8]", "[6, 4]").replace("[8, 5]", "[4, 5]"), "h", "MatMul", "4 channels, 8 asked for"
        ),
    ),
    "heads of no static size": (
        "R1",
        Case(
            """free (float[B, S, D] q, float[B, D, T] k, float[B, T, 4] v) => (float[B, S, 4] y)
            { scores = MatMul (q, k) shares = Softmax <axis = -1> (scores) y = MatMul (shares, v) }""",
            *("scores", "MatMul", "is not static"),
            inputs=("q", "k", "v"),
        ),
    ),
    "the matrix is made of one that may be overridden": (
        "R3",
        Case(
            """loose (float[B, 6] x, float[6, 8] w, float[5, 8] u, float[8, 5] v) => (float[B, 5] y)
            { g = MatMul (x, w) h = Relu (g) t = Transpose <perm = [1, 0]> (u) z = Add (t, v) y = MatMul (h, z) }""",
            *("h", "MatMul", "may|overrid|also a graph input"),
            options={"overridable": ("u",)},
        ),
    ),
}


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refusal(RotateOnline(), requirement, CASES[requirement])


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(RotateOnline(), *TRAPS[trap], alone=False)


def test_every_requirement_has_a_case() -> None:
    assert set(CASES) == {requirement.id for requirement in RotateOnline.requires}


NO_PLACES = {
    "a linear value, which the matrix before it could turn": hidden("l = Identity (g)").replace(
        "MatMul (h", "MatMul (l"
    ),
    "a norm's result": hidden()
    .replace("h = Relu (g)", "h = RMSNormalization (g, s)")
    .replace("{types}", "")
    .replace("hidden (", "hidden (float[8] s, "),
    "a product of two inputs": "p (float[B, 8] x, float[8, 5] z) => (float[B, 5] y) { h = Relu (x) y = MatMul (h, z) }",
    "probabilities": hidden().replace("h = Relu (g)", "h = Softmax <axis = -1> (g)"),
    "a product that no softmax reads": """
        p (float[B, S, 8] x, float[B, 8, T] z) => (float[B, S, T] y) { m = MatMul (x, z) y = Relu (m) }""",
}


@pytest.mark.parametrize("place", NO_PLACES)
def test_no_place(place: str) -> None:
    inputs = ("x", "z") if "float[8, 5] z" in NO_PLACES[place] or "float[B, 8, T] z" in NO_PLACES[place] else ("x",)
    assert not apply_pass(network(NO_PLACES[place], inputs), RotateOnline())


def test_a_tied_matrix_is_copied_and_says_so() -> None:
    text = hidden("other = MatMul (z, v)", types="float[B, 8] z, ", outputs=", float[B, 5] other")
    before = network(text, ("x", "z"))
    after = before.clone()
    (outcome,) = apply_pass(after, RotateOnline())
    assert isinstance(outcome, Applied)
    assert outcome.untied_bytes == 8 * 5 * np.dtype(np.float32).itemsize
    assert difference(before, after, feed(before)) <= 1.0
