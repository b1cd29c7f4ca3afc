"""reparameterize-norm-scale: one scale and zero point give the same integer codes, and the function stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from diagonal_checks import check_family, replace, rewritten, stored
from networks import difference, feed, network

from rewrite.calibrate import calibrated
from rewrite.check.inputs import generate_inputs
from rewrite.check.reference import evaluate
from rewrite.ir.program import Program
from rewrite.ir.statistics import ChannelRange
from rewrite.ir.weights import Constant, Scale
from rewrite.passes import ReparameterizeNormScale
from rewrite.passes.reparameterize_norm_scale import grid

BLOCK = """
block (float[B, S, 6] x, float[6] g, float[6] b, float[6, 6] q, float[6] qb, float[6, 4] k, float[6, 6] o)
    => (float[B, S, 6] y, float[B, S, 4] z)
{
    n = LayerNormalization (x, g, b)
    p = MatMul (n, q)
    a = Add (p, qb)
    t = Tanh (a)
    h = MatMul (t, o)
    y = Add (h, x)
    z = MatMul (n, k)
}
"""

WITHOUT_SHIFT = BLOCK.replace("LayerNormalization (x, g, b)", "RMSNormalization (x, g)").replace("float[6] b, ", "")


def calibrated_rule(program: Program, bits: int = 8) -> ReparameterizeNormScale:
    rule = calibrated(ReparameterizeNormScale(bits=bits), program, [feed(program, seed) for seed in range(3)])
    assert isinstance(rule, ReparameterizeNormScale)
    return rule


@pytest.mark.parametrize("text", [BLOCK, WITHOUT_SHIFT])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_function_and_every_value_agree(text: str, bits: int) -> None:
    before = network(text)
    rewritten(before, calibrated_rule(before, bits), feed(before))
    rewritten(before, ReparameterizeNormScale(bits=bits), feed(before))


@pytest.mark.parametrize("text", [BLOCK, WITHOUT_SHIFT])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_one_scale_and_zero_point_give_the_codes_of_one_of_each_a_channel(text: str, bits: int) -> None:
    before = network(text)
    rule = calibrated_rule(before, bits)
    after, (applied,) = rewritten(before, rule, feed(before))
    assert rule.statistics is not None
    chosen = grid(rule.statistics["n"], bits, symmetric=text is WITHOUT_SHIFT)
    inputs = feed(before, seed=9, rows=40, columns=25)
    y = evaluate(before.model, inputs, watch=["n"])["n"]
    moved = evaluate(after.model, inputs, watch=["n"], unrounded=True)["n"]
    each = np.rint(y / chosen.scales) + chosen.zero_points
    one = np.rint(moved / chosen.scale) + chosen.zero_point
    assert np.array_equal(each, one)
    assert len(np.unique(each)) > bits
    assert applied.notes[-1].startswith(f"one scale {chosen.scale:.9g} and zero point {chosen.zero_point} serve 6")


def test_a_tie_is_rounded_to_even_and_may_differ_where_the_zero_points_differ_by_an_odd_number() -> None:
    half = np.array([0.5, 1.5])
    assert np.array_equal(np.rint(half) + 2, np.rint(half + 2))
    assert not np.array_equal(np.rint(half) + 1, np.rint(half + 1))


def test_the_parameters_are_those_of_the_paper() -> None:
    before = network(BLOCK)
    seen = ChannelRange(-np.arange(1.0, 7.0), np.arange(6.0, 0.0, -1.0))
    after, _ = rewritten(before, ReparameterizeNormScale(statistics={"n": seen}), feed(before))
    s, z = np.full(6, 7.0) / 255, np.rint(np.arange(1.0, 7.0) * 255 / 7)
    r1, r2 = s / s.mean(), z - np.rint(z.mean())
    assert np.allclose(stored(after, "g.smoothed"), stored(before, "g") / r1, rtol=1e-14)
    assert np.allclose(stored(after, "b.smoothed"), (stored(before, "b") + s * r2) / r1, rtol=1e-13)
    assert np.allclose(stored(after, "q.smoothed"), r1[:, None] * stored(before, "q"), rtol=1e-14)
    assert np.allclose(stored(after, "qb.shifted"), stored(before, "qb") - (s * r2) @ stored(before, "q"), rtol=1e-13)


def test_a_channel_that_is_always_zero_is_left_alone() -> None:
    chosen = grid(ChannelRange(np.array([0.0, -1.0]), np.array([0.0, 2.0])), 8, symmetric=False)
    assert chosen.scales[0] == chosen.scale
    assert chosen.zero_points[0] == chosen.zero_point


def test_without_data_the_choice_is_made_from_the_weights_and_said() -> None:
    before = network(BLOCK)
    _, (applied,) = rewritten(before, ReparameterizeNormScale(), feed(before))
    assert applied.notes[0] == "chosen from γ and β, without data"


MUTANTS: dict[str, Callable[[Program], None]] = {
    "the old bias": lambda after: replace(after, "qb.shifted", lambda _: Constant(stored(network(BLOCK), "qb"))),
    "the old β": lambda after: replace(after, "b.smoothed", lambda _: Constant(stored(network(BLOCK), "b"))),
    "r₁ the wrong way round": lambda after: replace(
        after,
        "k.smoothed",
        lambda w: Scale(w, Constant((stored(after, "g.smoothed") / stored(network(BLOCK), "g")) ** 2)),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_computes_another_function(mutant: str) -> None:
    before = network(BLOCK)
    after, _ = rewritten(before, calibrated_rule(before), feed(before))
    MUTANTS[mutant](after)
    assert difference(before, after, feed(before)) > 1e4


@pytest.mark.parametrize(
    ("family", "applied", "refused"),
    [
        ("llama", 5, set()),
        ("falcon_parallel", 2, {"R5"}),
        ("vit", 5, set()),
        ("convnext", 4, {"R3", "R6"}),  # a shift would meet the padding of a Conv
    ],
)
def test_families(family: str, applied: int, refused: set[str], family_program: Callable[[str], Program]) -> None:
    def rule(program: Program) -> ReparameterizeNormScale:
        inputs = generate_inputs(program.model)[:1]
        return calibrated(ReparameterizeNormScale(), program, inputs)  # type: ignore[return-value]

    check_family(family_program(family), rule, applied, refused)
