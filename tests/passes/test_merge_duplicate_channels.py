"""merge-duplicate-channels: exact proportions through homogeneous functions, equal ones through any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from diagonal_checks import check_family, replace, rewritten, stored
from networks import difference, feed, network

from rewrite.capture.canonicalize import canonicalize
from rewrite.ir.constants import weight_behind
from rewrite.ir.program import Program
from rewrite.ir.weights import Constant
from rewrite.passes import EliminateDeadChannels, MergeDuplicateChannels
from rewrite.passes.eliminate_dead_channels import hidden_layers
from rewrite.rule import Pass, apply_pass

MLP = """
mlp (float[B, S, 5] x, float[5, 8] w1, float[8] b, float[8, 4] w2{types}) => (float[B, S, 4] y)
{{
    h = MatMul (x, w1)
    a = Add (h, b)
    {activation}
    y = MatMul (r, w2)
}}
"""

GATED = """
gated (float[B, S, 5] x, float[5, 8] gate, float[5, 8] up, float[8, 4] down) => (float[B, S, 4] y)
{
    g = MatMul (x, gate)
    a = Gelu (g)
    u = MatMul (x, up)
    m = Mul (a, u)
    y = MatMul (m, down)
}
"""

CONVOLUTION = """
convolution (float[B, 3, 8, 8] x, float[8, 3, 3, 3] k1, float[8] b1, float[4, 8, 3, 3] k2) => (float[B, 4, 3, 3] y)
{
    c = Conv <kernel_shape = [3, 3]> (x, k1, b1)
    r = Relu (c)
    m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
    y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (m, k2)
}
"""


W2 = np.random.default_rng(5).integers(-999, 999, (8, 4)) / 256.0


def mlp(activation: str = "r = Relu (a)", types: str = "") -> str:
    return MLP.format(activation=activation, types=types)


def copied(*copies: tuple[int, int, float], shape: tuple[int, ...] = (5, 8), axis: int = 1) -> np.ndarray:
    """Float32 numbers in which channel j is exactly p times channel i for every (i, j, p)."""
    array = np.random.default_rng(3).integers(-999, 999, shape) / 256.0
    channels = np.moveaxis(array, axis, -1)
    for i, j, p in copies:
        channels[..., j] = p * channels[..., i]
    return array


def merged(
    text: str, copies: tuple[tuple[int, int, float], ...], biases: tuple[tuple[int, int, float], ...] | None = None
) -> tuple[Program, tuple[str, ...]]:
    bias = copied(*(copies if biases is None else biases), shape=(8,), axis=0)
    before = network(text, w1=copied(*copies), b=bias, w2=W2)
    after, (applied,) = rewritten(before, MergeDuplicateChannels(), feed(before))
    return after, applied.notes


def sites(text: str, copies: tuple[tuple[int, int, float], ...], biases: tuple[tuple[int, int, float], ...]) -> int:
    program = network(text, w1=copied(*copies), b=copied(*biases, shape=(8,), axis=0))
    return len(list(MergeDuplicateChannels().sites(program)))


@pytest.mark.parametrize("p", [1.0, 2.0, 0.125, 3.0, 5.5])
def test_a_proportion_goes_through_what_is_positively_homogeneous(p: float) -> None:
    for activation in ("r = Relu (a)", "r = LeakyRelu <alpha = 0.3> (a)", "s = Relu (a) r = Relu (s)"):
        after, notes = merged(mlp(activation), ((1, 6, p), (2, 4, 1.0)))
        assert notes == ("2 of 8 channels are multiples of others: 4, 6 of 2, 1",)
        assert np.array_equal(stored(after, "w2.selected")[1], W2[1] + p * W2[6])


@pytest.mark.parametrize("activation", ["Gelu", "Tanh", "Sigmoid", "Erf", "Exp"])
def test_equal_channels_merge_through_everything_else(activation: str) -> None:
    text = mlp(f"r = {activation} (a)")
    _, notes = merged(text, ((1, 6, 1.0),))
    assert notes == ("1 of 8 channels are multiples of others: 6 of 1",)
    assert sites(text, ((1, 6, 2.0),), ((1, 6, 2.0),)) == 0


def test_a_negative_proportion_goes_through_what_is_linear_only() -> None:
    merged(mlp("r = Identity (a)"), ((1, 6, -2.0),))
    assert sites(mlp(), ((1, 6, -2.0),), ((1, 6, -2.0),)) == 0


@pytest.mark.parametrize("biases", [(), ((1, 6, 1.0),), ((1, 6, 4.0),)])
def test_the_bias_is_in_the_same_proportion(biases: tuple[tuple[int, int, float], ...]) -> None:
    assert sites(mlp(), ((1, 6, 2.0),), biases) == 0
    assert sites(mlp(), ((1, 6, 2.0),), ((1, 6, 2.0),)) == 1


def test_prelu_is_homogeneous_where_the_slopes_are_equal() -> None:
    text = mlp("r = PRelu (a, slope)", ", float[8] slope")
    copies = ((1, 6, 2.0), (2, 4, 2.0))
    slope = np.linspace(0.1, 0.8, 8)
    slope[6] = slope[1]
    before = network(text, w1=copied(*copies), b=copied(*copies, shape=(8,), axis=0), slope=slope)
    after, (applied,) = rewritten(before, MergeDuplicateChannels(), feed(before))
    assert applied.notes == ("1 of 8 channels are multiples of others: 6 of 1",)
    assert stored(after, "slope.selected").shape == (7,)


def test_an_almost_equal_column_is_another_one() -> None:
    w1 = copied((1, 6, 1.0))
    w1[4, 6] = np.nextafter(np.float32(w1[4, 1]), np.float32(9))
    program = network(mlp(), w1=w1, b=copied((1, 6, 1.0), shape=(8,), axis=0))
    assert apply_pass(program, MergeDuplicateChannels()) == []


def test_a_proportion_that_is_no_float64_number_is_not_used() -> None:
    assert sites(mlp(), ((0, 1, 3.0), (0, 2, 7.0)), ((0, 1, 3.0), (0, 2, 7.0))) == 1
    w1, b = copied((0, 1, 3.0)), copied((0, 1, 3.0), shape=(8,), axis=0)
    program = network(mlp(), w1=w1[:, [1, 0, 2, 3, 4, 5, 6, 7]], b=b[[1, 0, 2, 3, 4, 5, 6, 7]])
    assert apply_pass(program, MergeDuplicateChannels()) == [], "1/3"


def test_both_factors_of_a_gate_are_compared() -> None:
    same, double = copied((1, 6, 1.0)), copied((1, 6, 2.0), (2, 3, 1.0))
    before = network(GATED, gate=same, up=double)
    after, (applied,) = rewritten(before, MergeDuplicateChannels(), feed(before))
    assert applied.notes == ("1 of 8 channels are multiples of others: 6 of 1",)
    assert stored(after, "down.selected").shape == (7, 4)


def test_kernels_merge_through_padding() -> None:
    copies = ((1, 6, 2.0),)
    before = network(
        CONVOLUTION, k1=copied(*copies, shape=(8, 3, 3, 3), axis=0), b1=copied(*copies, shape=(8,), axis=0)
    )
    after, _ = rewritten(before, MergeDuplicateChannels(), feed(before))
    assert stored(after, "k2.selected").shape == (4, 7, 3, 3)


def test_what_is_left_may_be_kept_a_multiple() -> None:
    copies = ((1, 3, 1.0), (1, 4, 1.0), (1, 6, 1.0), (0, 5, 2.0), (0, 7, 2.0))
    before = network(mlp(), w1=copied(*copies), b=copied(*copies, shape=(8,), axis=0))
    after, (applied,) = rewritten(before, MergeDuplicateChannels(multiple=4), feed(before))
    assert stored(after, "w2.selected").shape == (4, 4)
    assert applied.notes == ("4 of 8 channels are multiples of others: 4, 5, 6, 7 of 1, 0, 1, 0",)


MUTANTS: dict[str, Callable[[Program], None]] = {
    "the row is dropped": lambda after: replace(after, "w2.selected", lambda _: Constant(np.delete(W2, 6, 0))),
    "the proportion is forgotten": lambda after: replace(after, "w2.selected", lambda _: _added(1, 1.0)),
    "the proportion is upside down": lambda after: replace(after, "w2.selected", lambda _: _added(1, 0.5)),
    "added to another row": lambda after: replace(after, "w2.selected", lambda _: _added(2, 2.0)),
}


def _added(row: int, proportion: float) -> Constant:
    rows = np.delete(W2, 6, 0)
    rows[row] += proportion * W2[6]
    return Constant(rows)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_computes_another_function(mutant: str) -> None:
    after, _ = merged(mlp(), ((1, 6, 2.0),))
    assert np.array_equal(stored(after, "w2.selected"), _added(1, 2.0).numpy())
    before = Program(after.original.clone(), after.original)
    MUTANTS[mutant](after)
    assert difference(before, after, feed(before)) > 1e4


def copy_channels(program: Program, copies: tuple[tuple[int, int, float], ...]) -> None:
    """Make channels of every hidden layer of a canonical program multiples of others, in place."""
    for site in list(hidden_layers(program)):
        for use in site.region.constants:
            array = weight_behind(use.value).numpy().copy()
            if array.shape[use.axis] == site.region.size > 8:
                channels = np.moveaxis(array, use.axis, -1)
                for i, j, p in copies:
                    channels[..., j] = p * channels[..., i]
                assert use.value.dtype is not None
                use.value.const_value = ir.tensor(array.astype(use.value.dtype.numpy()), name=use.value.name)


@pytest.mark.parametrize(("family", "left"), [("llama", 79), ("opt", 78), ("bloom", 191), ("bert", 79)])
def test_families(family: str, left: int, family_program: Callable[[str], Program]) -> None:
    program = family_program(family)
    canonicalize(program)
    copy_channels(program, ((2, 5, 1.0), (3, 6, 2.0)))
    after = check_family(program, lambda _: MergeDuplicateChannels(), 2, set())
    changed = [weight_behind(v).shape for n, v in after.model.graph.initializers.items() if n.endswith(".selected")]
    assert {left} <= {size for shape in changed for size in shape}


@pytest.mark.parametrize("rule", [MergeDuplicateChannels, EliminateDeadChannels])
def test_a_layer_that_no_contraction_reads_whole_is_no_site(rule: type[Pass[Any]]) -> None:
    program = network("""
    depthwise (float[2, 3, 5, 5] x, float[4, 3, 1, 1] w, float[4, 1, 3, 3] v) => (float[2, 4, 3, 3] y)
    { h = Conv (x, w) r = Relu (h) y = Conv <group = 4> (r, v) }""")
    assert apply_pass(program, rule()) == []
