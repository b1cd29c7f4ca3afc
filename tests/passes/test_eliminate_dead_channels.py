"""eliminate-dead-channels: what is constant folds into the next bias, whatever stands between."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from diagonal_checks import check_family, replace, rewritten, stored
from networks import difference, feed, network, operators

from rewrite.capture.canonicalize import canonicalize
from rewrite.ir.constants import weight_behind
from rewrite.ir.edit import shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Constant
from rewrite.passes import EliminateDeadChannels
from rewrite.passes.eliminate_dead_channels import hidden_layers
from rewrite.rule import apply_pass

MLP = """
mlp (float[B, S, 5] x, float[5, 8] w1, float[8] b, float[8, 4] w2, float[4] c) => (float[B, S, 4] y)
{{
    h = MatMul (x, w1)
    a = Add (h, b)
    {activation}
    p = MatMul (r, w2)
    y = Add (p, c)
}}
"""

ACTIVATIONS = {
    "relu": "r = Relu (a)",
    "gelu": "r = Gelu (a)",
    "gelu by tanh": 'r = Gelu <approximate = "tanh"> (a)',
    "silu": "s = Sigmoid (a) r = Mul (a, s)",
    "tanh": "r = Tanh (a)",
    "softplus": "r = Softplus (a)",
    "leaky relu": "r = LeakyRelu <alpha = 0.3> (a)",
    "none": "r = Identity (a)",
    "gelu written out": """half = Constant <value_float = 0.5> () one = Constant <value_float = 1.0> ()
        k = Constant <value_float = 0.7071> () q = Mul (a, k) e = Erf (q) f = Add (e, one) g = Mul (a, f)
        r = Mul (g, half)""",
    "a square": "r = Mul (a, a)",
    "a quotient": "two = Constant <value_float = 2.0> () d = Div (a, two) r = Exp (d)",
}

GATED = """
gated (float[B, S, 5] x, float[5, 8] gate, float[5, 8] up, float[8, 4] down) => (float[B, S, 4] y)
{
    g = MatMul (x, gate)
    s = Sigmoid (g)
    a = Mul (g, s)
    u = MatMul (x, up)
    m = Mul (a, u)
    y = MatMul (m, down)
}
"""

CONVOLUTION = """
convolution (float[B, 3, 8, 8] x, float[8, 3, 3, 3] k1, float[8] b1, float[4, 8, 3, 3] k2) => (float[B, 4, 6, 6] y)
{
    c = Conv <kernel_shape = [3, 3]> (x, k1, b1)
    r = Relu (c)
    y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, k2)
}
"""


def columns(*dead: int, shape: tuple[int, ...] = (5, 8), axis: int = 1) -> np.ndarray:
    array = np.random.default_rng(3).normal(size=shape)
    np.moveaxis(array, axis, -1)[..., list(dead)] = 0.0
    return array


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_function_and_every_value_agree(activation: str) -> None:
    before = network(MLP.format(activation=ACTIVATIONS[activation]), w1=columns(1, 6))
    after, (applied,) = rewritten(before, EliminateDeadChannels(), feed(before))
    assert applied.notes == ("2 of 8 channels are constant: 1, 6",)
    assert operators(after) == operators(before)
    assert stored(after, "w1.selected").shape == (5, 6)
    assert stored(after, "w2.selected").shape == (6, 4)
    assert {(shape_of(node.outputs[0]) or ())[-1] for node in after.model.graph if node.outputs[0].name == "r"} == {6}


def test_the_constant_goes_into_the_bias() -> None:
    before = network(MLP.format(activation=ACTIVATIONS["gelu"]), w1=columns(1), b=[-2, 3, 1, 1, 1, 1, 1, 1])
    after, _ = rewritten(before, EliminateDeadChannels(), feed(before))
    gelu = 3 * 0.9986501019683699
    expected = stored(before, "c") + gelu * stored(before, "w2")[1]
    assert np.allclose(stored(after, "c.shifted"), expected, rtol=1e-14)


def test_a_bias_is_made_where_there_is_none() -> None:
    text = MLP.format(activation="r = Relu (a)").replace("p = MatMul (r, w2)", "y = MatMul (r, w2)")
    text = text.replace("y = Add (p, c)", "").replace(", float[4] c", "")
    before = network(text, w1=columns(1), b=[1.0] * 8)
    after, (applied,) = rewritten(before, EliminateDeadChannels(), feed(before))
    assert applied.notes[0] == "y has a new bias of 4 numbers"
    assert operators(after)[-1] == "Add"


def test_nothing_is_added_where_the_constant_is_zero() -> None:
    before = network(MLP.format(activation="r = Relu (a)"), w1=columns(1), b=[-1.0] * 8)
    after, _ = rewritten(before, EliminateDeadChannels(), feed(before))
    assert "c.shifted" not in after.model.graph.initializers


@pytest.mark.parametrize(
    ("gate", "up", "left"),
    [
        ((1, 2), (), 6),  # silu(0)·u = 0
        ((), (3,), 7),
        ((1,), (3,), 6),
    ],
)
def test_a_gate_is_dead_where_one_factor_is_zero(gate: tuple[int, ...], up: tuple[int, ...], left: int) -> None:
    before = network(GATED, gate=columns(*gate), up=columns(*up))
    after, _ = rewritten(before, EliminateDeadChannels(), feed(before))
    assert stored(after, "down.selected").shape == (left, 4)


def test_kernels_lose_channels_where_the_constant_is_zero() -> None:
    before = network(CONVOLUTION, k1=columns(0, 5, shape=(8, 3, 3, 3), axis=0), b1=[-1.0] * 8)
    after, _ = rewritten(before, EliminateDeadChannels(), feed(before))
    assert stored(after, "k2.selected").shape == (4, 6, 3, 3)


def test_all_but_one_may_go() -> None:
    before = network(MLP.format(activation="r = Relu (a)"), w1=np.zeros((5, 8)))
    after, _ = rewritten(before, EliminateDeadChannels(), feed(before))
    assert stored(after, "w2.selected").shape == (1, 4)


def test_what_is_left_may_be_kept_a_multiple() -> None:
    before = network(MLP.format(activation="r = Relu (a)"), w1=columns(0, 1, 2, 3, 4))
    after, (applied,) = rewritten(before, EliminateDeadChannels(multiple=4), feed(before))
    assert stored(after, "w2.selected").shape == (4, 4)
    assert applied.notes == ("4 of 8 channels are constant: 1, 2, 3, 4",)


@pytest.mark.parametrize("text", [MLP.format(activation="r = Relu (a)"), GATED, CONVOLUTION])
def test_a_network_without_dead_channels_has_no_site(text: str) -> None:
    assert apply_pass(network(text), EliminateDeadChannels()) == []


def test_a_column_that_is_almost_zero_is_alive() -> None:
    w1 = columns(1)
    w1[4, 1] = 1e-30
    assert apply_pass(network(MLP.format(activation="r = Relu (a)"), w1=w1), EliminateDeadChannels()) == []


MUTANTS: dict[str, Callable[[Program, Program], None]] = {
    "the constant is dropped": lambda before, after: replace(
        after, "c.shifted", lambda _: Constant(stored(before, "c"))
    ),
    "the activation is left out": lambda before, after: replace(
        after, "c.shifted", lambda _: Constant(stored(before, "c") - 2 * stored(before, "w2")[1])
    ),
    "another row of the matrix went": lambda before, after: replace(
        after, "w2.selected", lambda _: Constant(np.delete(stored(before, "w2"), 2, 0))
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_computes_another_function(mutant: str) -> None:
    before = network(MLP.format(activation="r = LeakyRelu <alpha = 0.5> (a)"), w1=columns(1), b=[-2.0] * 8)
    after, _ = rewritten(before, EliminateDeadChannels(), feed(before))
    expected = stored(before, "c") - stored(before, "w2")[1]
    assert np.allclose(stored(after, "c.shifted"), expected)
    MUTANTS[mutant](before, after)
    assert difference(before, after, feed(before)) > 1e4


def kill(program: Program, channels: tuple[int, ...]) -> None:
    """Make channels of every hidden layer of a canonical program constant, in place."""
    for site in list(hidden_layers(program)):
        for use in site.region.constants:
            array = weight_behind(use.value).numpy().copy()
            if array.ndim > 1 and array.shape[use.axis] == site.region.size > max(channels):
                np.moveaxis(array, use.axis, -1)[..., list(channels)] = 0.0
                assert use.value.dtype is not None
                use.value.const_value = ir.tensor(array.astype(use.value.dtype.numpy()), name=use.value.name)


@pytest.mark.parametrize(("family", "applied"), [("llama", 2), ("opt", 2), ("bloom", 2), ("convnext", 3), ("bert", 2)])
def test_families(family: str, applied: int, family_program: Callable[[str], Program]) -> None:
    program = family_program(family)
    canonicalize(program)
    kill(program, (1, 7))
    check_family(program, lambda _: EliminateDeadChannels(), applied, set())
