"""What equalize must refuse: one case per requirement, and traps."""

import pytest
from networks import network
from refusals import Case, check_refusal

from rewrite.passes import Equalize
from rewrite.rule import Applied, apply_pass

MLP = """
mlp ({types}float[B, 3, 5] x, float[5, 6] w1, float[6] b, float[6, 4] w2) => (float[B, 3, 4] y{outputs})
{{
    h = MatMul (x, w1)
    a = Add (h, b)
    {inside}
    y = MatMul (r, w2)
}}
"""


def mlp(inside: str = "r = Relu (a)", types: str = "", outputs: str = "") -> str:
    return MLP.format(inside=inside, types=types, outputs=outputs)


GATED = """
gated (float[B, 3, 5] x, float[5, 6] gate, float[5, 6] up, float[6, 4] down) => (float[B, 3, 4] y)
{{ g = MatMul (x, gate) {act} u = MatMul (x, up) m = Mul (a, {other}) y = MatMul (m, down) }}
"""

CASES = {
    "R1": Case(mlp("r = Gelu (a)"), "r", "Gelu", "acts on each channel by itself"),
    "R2": Case(mlp(outputs=", float[B, 3, 6] r"), "r", "Relu", "r is an output"),
    "R3": Case(mlp(), "r", "", "b is an initializer that is also", options={"overridable": ("b",)}),
    "R4": Case(
        mlp("r = Relu (a) z = RMSNormalization (r, g)", "float[6] g, ", ", float[B, 3, 6] z"),
        *("r", "RMSNormalization", "no layer that shares their range"),
    ),
    "R5": Case(
        mlp("r = Relu (a) z = MatMul (r, u)", "float[6, 2] u, ", ", float[B, 3, 2] z"),
        *("r", "MatMul", "not a constant"),
        inputs=("x", "u"),
    ),
    "R6": Case(
        """biases (float[2, 4] x, float[6] b, float[6, 4] w2) => (float[2, 4] y)
        {
            shape = Constant <value_ints = [2, 6]> ()
            zeros = ConstantOfShape (shape)
            a = Add (zeros, b)
            r = Relu (a)
            h = MatMul (r, w2)
            y = Add (h, x)
        }""",
        *("r", "Add", "no matrix or kernel writes"),
    ),
    "R7": Case(
        mlp("r = Relu (a) z = MatMul (x, w1)", outputs=", float[B, 3, 6] z"),
        *("r", "MatMul", "w1 is also read here, and would have to be copied"),
    ),
}

TRAPS = {
    "ReLU6 between two layers is not positively homogeneous": (
        "R1",
        Case(
            mlp("low = Constant <value_float = 0.0> () six = Constant <value_float = 6.0> () r = Clip (a, low, six)"),
            *("r", "Clip", "acts on each channel by itself"),
        ),
    ),
    "a gate between two activations": (
        "R1",
        Case(
            GATED.format(act="a = Gelu (g)", other="t").replace("m = ", "t = Tanh (u) m = "),
            *("m", "Tanh", "acts on each channel by itself"),
        ),
    ),
    "a square": ("R1", Case(GATED.format(act="a = Relu (g)", other="a"), "m", "Mul", "squares the value")),
    "both factors of a product are one branch": (
        "R1",
        Case(GATED.format(act="a = Relu (g)", other="g"), "m", "Mul", "multiplies two values of the region"),
    ),
    "a softmax over the channels": ("R1", Case(mlp("r = Softmax (a)"), "r", "Softmax", "")),
    "a number is added to all channels": (
        "R1",
        Case(mlp("one = Constant <value_float = 1.0> () s = Add (a, one) r = Relu (s)"), "r", "Add", "one number"),
    ),
    "a maximum with a number": (
        "R1",
        Case(mlp("one = Constant <value_float = 1.0> () r = Max (a, one)"), "r", "Max", ""),
    ),
    "max-pool's indices are used": (
        "R1",
        Case(
            """pooled (float[B, 3, 8] x, float[6, 3, 3] k, float[4, 6, 1] m) => (float[B, 4, 4] y, int64[B, 6, 4] i)
            {
                c = Conv <kernel_shape = [3]> (x, k)
                p, i = MaxPool <kernel_shape = [3]> (c)
                y = Conv <kernel_shape = [1]> (p, m)
            }""",
            *("p", "MaxPool", ""),
        ),
    ),
    "batch normalization in training mode": (
        "R1",
        Case(
            """training (float[4, 3, 8] x, float[6, 3, 3] k, float[6] g, float[6] b, float[6] mean, float[6] var,
                         float[4, 6, 1] m) => (float[4, 4, 6] y)
            {
                c = Conv <kernel_shape = [3]> (x, k)
                n, moved, spread = BatchNormalization <training_mode = 1> (c, g, b, mean, var)
                r = Relu (n)
                y = Conv <kernel_shape = [1]> (r, m)
            }""",
            *("r", "BatchNormalization", ""),
        ),
    ),
    "both halves of a product are read together as well": (
        "R1",
        Case(
            """fused (float[B, 3, 5] x, float[5, 12] both, float[6, 4] down, float[12, 2] beside)
                => (float[B, 3, 4] y, float[B, 3, 2] z)
            {
                h = MatMul (x, both)
                sizes = Constant <value_ints = [6, 6]> ()
                g, u = Split <axis = 2> (h, sizes)
                a = Gelu (g)
                m = Mul (a, u)
                y = MatMul (m, down)
                z = MatMul (h, beside)
            }""",
            *("m", "MatMul", "together with others"),
        ),
    ),
    "the second matrix is the first one (tied autoencoder)": (
        "R7",
        Case(
            """tied (float[B, 3, 5] x, float[5, 6] w) => (float[B, 3, 5] y)
            { h = MatMul (x, w) r = Relu (h) t = Transpose <perm = [1, 0]> (w) y = MatMul (r, t) }""",
            *("r", "Transpose", "w is also read here"),
        ),
    ),
    "the values multiply themselves": (
        "R5",
        Case(
            """gram (float[B, 3, 5] x, float[5, 6] w, float[6, 2] v) => (float[B, 3, 3] y, float[B, 3, 2] z)
            {
                h = MatMul (x, w)
                z = MatMul (h, v)
                t = Transpose <perm = [0, 2, 1]> (h)
                y = MatMul (h, t)
            }""",
            *("h", "MatMul", "not a constant"),
        ),
    ),
}


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refusal(Equalize(), requirement, CASES[requirement])


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(Equalize(), *TRAPS[trap])


def test_every_requirement_has_a_case() -> None:
    assert set(CASES) == {requirement.id for requirement in Equalize.requires}


def test_the_same_network_without_the_breach_is_rewritten() -> None:
    (outcome,) = apply_pass(network(mlp()), Equalize())
    assert isinstance(outcome, Applied)
