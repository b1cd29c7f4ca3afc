"""equalize: through what is positively homogeneous, gates and kernels; the formula, and families."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from diagonal_checks import check_family, proof_of, replace, rewritten, stored
from networks import difference, feed, network, operators

from rewrite.calibrate import calibrated
from rewrite.check.reference import evaluate
from rewrite.ir.program import Program
from rewrite.ir.weights import Constant, Scale
from rewrite.passes import Equalize
from rewrite.rule import Applied, apply_pass

MLP = """
mlp (float[B, S, 5] x, float[5, 6] w1, float[6] b, float[6, 4] w2) => (float[B, S, 4] y)
{{
    h = MatMul (x, w1)
    a = Add (h, b)
    r = {activation} (a{operands})
    y = MatMul (r, w2)
}}
"""


def mlp(activation: str = "Relu", operands: str = "", types: str = "") -> str:
    return MLP.format(activation=activation, operands=operands).replace("float[6] b,", f"float[6] b, {types}")


GATED = """
gated (float[B, S, 5] x, float[5, 6] gate, float[5, 6] up, float[6, 4] down) => (float[B, S, 4] y)
{{
    g = MatMul (x, gate)
    s = Sigmoid (g)
    a = Mul (g, s)
    u = MatMul (x, up)
    m = Mul ({order})
    y = MatMul (m, down)
}}
"""

FUSED = """
fused (float[B, S, 5] x, float[5, 12] both, float[12] b, float[6, 4] down) => (float[B, S, 4] y)
{{
    h = MatMul (x, both)
    c = Add (h, b)
    sizes = Constant <value_ints = [6, 6]> ()
    {parts} = Split <axis = 2> (c, sizes)
    a = Gelu (g)
    m = Mul (a, u)
    y = MatMul (m, down)
}}
"""

RELU_CONVOLUTIONS = """
convolutions (float[B, 3, 8, 8] x, float[6, 3, 3, 3] first, float[4, 6, 1, 1] second) => (float[B, 4, 6, 6] y)
{
    h = Conv (x, first)
    r = Relu (h)
    y = Conv (r, second)
}
"""

CONVOLUTIONS = """
convolutions (float[B, 3, 8, 8] x, float[6, 3, 3, 3] k1, float[6] b1, float[6, 1, 3, 3] deep, float[6] bd,
              float[4, 6, 1, 1] point, float[4] g, float[4] b, float[4] mean, float[4] var, float[4, 2, 3, 3] halves,
              float[4, 2, 2, 2] up, float[2, 5] head) => (float[B, 5] y)
{
    c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k1, b1)
    r1 = Relu (c1)
    c2 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 6> (r1, deep, bd)
    r2 = LeakyRelu <alpha = 0.2> (c2)
    p2 = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (r2)
    c3 = Conv <kernel_shape = [1, 1]> (p2, point)
    n3 = BatchNormalization (c3, g, b, mean, var)
    r3 = Relu (n3)
    a3 = AveragePool <kernel_shape = [2, 2], pads = [1, 1, 1, 1], count_include_pad = 1> (r3)
    c4 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 2> (a3, halves)
    r4 = Relu (c4)
    c5 = ConvTranspose <kernel_shape = [2, 2]> (r4, up)
    r5 = Relu (c5)
    pooled = GlobalAveragePool (r5)
    flat = Flatten (pooled)
    y = MatMul (flat, head)
}
"""


@pytest.mark.parametrize(
    "text",
    [
        mlp(),
        mlp("Identity"),
        mlp("LeakyRelu <alpha = 0.3>"),
        mlp("PRelu", ", slope", "float[6] slope, "),
        mlp("PRelu", ", slope", "float[1] slope, "),
        GATED.format(order="a, u"),
        GATED.format(order="u, a"),
        FUSED.format(parts="g, u"),
        FUSED.format(parts="u, g"),
    ],
)
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_the_function_and_every_value_agree(text: str, powers_of_two: bool) -> None:
    before = network(text)
    after, (applied,) = rewritten(before, Equalize(powers_of_two), feed(before))
    assert applied.site in ("r", "m")
    assert operators(after) == operators(before)


def test_both_sides_have_one_range_afterwards() -> None:
    before = network(mlp())
    after, _ = rewritten(before, Equalize(), feed(before))
    s = np.sqrt(np.abs(stored(before, "w1")).max(0) / np.abs(stored(before, "w2")).max(1))
    assert np.allclose(np.abs(stored(after, "w1.equalized")).max(0), np.abs(stored(after, "w2.equalized")).max(1))
    assert np.allclose(stored(after, "b.equalized"), stored(before, "b") / s, rtol=1e-15)
    assert np.array_equal(stored(after, "w2.equalized"), stored(before, "w2") * s[:, None])


def test_what_was_measured_stands_for_the_weights_that_write_it() -> None:
    """Products of two branches have outliers that no weight shows; afterwards both sides have one range again."""
    before = network(GATED.format(order="a, u"))
    inputs = [feed(before, seed=seed, rows=4) for seed in range(3)]
    inputs[0]["x"] *= 9
    rule = calibrated(Equalize(), before, inputs)
    assert isinstance(rule, Equalize)
    assert set(rule.statistics or ()) == {"m"}
    after = before.clone()
    (outcome,) = apply_pass(after, rule)
    assert isinstance(outcome, Applied)
    assert difference(before, after, inputs[1]) <= 1
    assert proof_of(before, after).verdict.holds
    values = np.concatenate(
        [evaluate(after.model, one, watch=["m"], unrounded=True)["m"].reshape(-1, 6) for one in inputs]
    )
    down = next(stored(after, name) for name in after.model.graph.initializers if name.startswith("down"))
    assert np.abs(values).max(0) == pytest.approx(np.abs(down).max(1))
    by_weights = before.clone()
    apply_pass(by_weights, Equalize())
    other = next(stored(by_weights, name) for name in by_weights.model.graph.initializers if name.startswith("down"))
    assert not np.allclose(other, down)


def test_kernels_are_equalized_by_weights_alone() -> None:
    """What a convolution reads has its channels in the middle, which is not what is measured."""
    before = network(RELU_CONVOLUTIONS)
    assert not list(Equalize().calibrates(before))
    assert len(list(Equalize().sites(before))) == 1


def test_powers_of_two_round_nothing() -> None:
    before = network(mlp())
    after, _ = rewritten(before, Equalize(powers_of_two=True), feed(before))
    for name in ("w1.equalized", "b.equalized", "w2.equalized"):
        tensor = after.model.graph.initializers[name].const_value
        assert tensor is not None
        assert np.array_equal(tensor.numpy().astype(np.float64), stored(after, name))


def test_the_gate_stays() -> None:
    before = network(GATED.format(order="a, u"))
    after, (applied,) = rewritten(before, Equalize(), feed(before))
    assert set(applied.changed.values()) == {"up", "down"}
    assert set(after.relations) == {"u", "m"}


def test_the_gate_stays_where_one_matrix_writes_both() -> None:
    before = network(FUSED.format(parts="g, u"))
    after, (applied,) = rewritten(before, Equalize(), feed(before))
    assert set(applied.changed.values()) == {"both", "b", "down"}
    assert np.array_equal(stored(after, "both.equalized")[:, :6], stored(before, "both")[:, :6])
    assert not np.array_equal(stored(after, "both.equalized")[:, 6:], stored(before, "both")[:, 6:])


def test_a_relu_gate_leaves_the_linear_branch_to_carry_the_scale() -> None:
    text = GATED.replace("s = Sigmoid (g)", "").replace("a = Mul (g, s)", "a = Relu (g)")
    before = network(text.format(order="a, u"))
    _, (applied,) = rewritten(before, Equalize(), feed(before))
    assert set(applied.changed.values()) == {"up", "down"}


def test_kernels_of_every_kind() -> None:
    before = network(CONVOLUTIONS, var=[0.5, 1.0, 1.5, 2.0])
    after, applied = rewritten(before, Equalize(), feed(before))
    assert [one.site for one in applied] == ["r1", "p2", "a3", "r4", "flat"]
    assert {"g.equalized", "b.equalized"} <= set(after.model.graph.initializers)
    assert len(after.relations) == 14


def test_a_residual_sum_is_one_region() -> None:
    text = """
    residual (float[B, 5] x, float[5, 6] w0, float[6, 6] w1, float[6, 6] w2, float[6, 3] w3) => (float[B, 3] y)
    {
        s0 = MatMul (x, w0) h = MatMul (s0, w1) r = Relu (h) o = MatMul (r, w2) s1 = Add (s0, o) y = MatMul (s1, w3)
    }"""
    before = network(text)
    after, applied = rewritten(before, Equalize(), feed(before))
    assert len(applied) == 2
    assert {"s0", "h", "r", "o", "s1"} == set(after.relations)


def test_channels_without_weights_stay_as_they_are() -> None:
    w1 = np.ones((5, 6))
    w1[:, 2] = 0.0
    before = network(mlp(), w1=w1)
    after, _ = rewritten(before, Equalize(), feed(before))
    assert np.array_equal(stored(after, "w2.equalized")[2], stored(before, "w2")[2])


MUTANTS: dict[str, Callable[[Program], None]] = {
    "the bias is left out": lambda after: replace(
        after, "b.equalized", lambda _: Constant(stored(network(mlp()), "b"))
    ),
    "scaled on one side": lambda after: replace(
        after, "w2.equalized", lambda _: Constant(stored(network(mlp()), "w2"))
    ),
    "scaled the wrong way round": lambda after: replace(
        after,
        "w2.equalized",
        lambda w: Scale(w, Constant((stored(after, "b.equalized") / stored(network(mlp()), "b")) ** 2)),
    ),
    "a sign": lambda after: replace(after, "w1.equalized", lambda w: Scale(w, Constant(np.array(-1.0)))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_computes_another_function(mutant: str) -> None:
    before = network(mlp())
    after, _ = rewritten(before, Equalize(), feed(before))
    proof = proof_of(before, after)
    assert proof.verdict.holds
    assert all(proof.claims.values())
    MUTANTS[mutant](after)
    assert difference(before, after, feed(before)) > 1e4
    assert not proof_of(before, after).verdict.holds


@pytest.mark.parametrize(
    ("family", "applied"),
    [
        ("llama", 2),
        ("gemma2", 2),
        ("opt", 2),
        ("resnet", 11),
        ("mixtral", 2),  # the experts' gates and up branches are one stack of matrices
        ("modernbert", 2),
        ("gpt2", 0),  # GELU
    ],
)
def test_families(family: str, applied: int, family_program: Callable[[str], Program]) -> None:
    refused = {"resnet": set(), "modernbert": {"R1", "R4"}}.get(family, {"R1"})
    check_family(family_program(family), lambda _: Equalize(), applied, refused)


def test_an_equalized_network_has_no_site_left_in_another_program() -> None:
    program = network(mlp())
    apply_pass(program, Equalize())
    assert not any(isinstance(outcome, Applied) for outcome in apply_pass(program.clone(), Equalize()))
