"""smooth: the formula, what it is calibrated from, shifts, and families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from diagonal_checks import check_family, proof_of, replace, rewritten, stored
from networks import difference, feed, network, operators

from rewrite.calibrate import calibrated
from rewrite.check.inputs import generate_inputs
from rewrite.check.statistics import channel_statistics
from rewrite.ir.constants import weight_behind
from rewrite.ir.program import Program
from rewrite.ir.statistics import ChannelRange
from rewrite.ir.weights import Center, Constant, Scale
from rewrite.passes import FoldNorm, ReparameterizeNormScale, Smooth
from rewrite.passes.smooth import storable
from rewrite.rule import Applied, Pass, apply_pass

ROUNDING = 2.0**-24
"""How far s may be moved for γ⊘s to be a float32."""

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

PATCHES = """
patches (float[B, 4, 4, 6] x, float[6] g, float[6] b, float[5, 6, 3, 3] kernel)
    => (float[B, 5, 4, 4] y)
{
    n = LayerNormalization (x, g, b)
    c = Transpose <perm = [0, 3, 1, 2]> (n)
    y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (c, kernel)
}
"""

EXPERTS = """
experts (float[4, 6] x, float[6] g, float[6, 3] router, float[2, 6, 5] stack) => (float[4, 3] r, float[2, 4, 5] y)
{
    n = RMSNormalization (x, g)
    r = MatMul (n, router)
    y = MatMul (n, stack)
}
"""


@pytest.mark.parametrize("text", [BLOCK, PATCHES, EXPERTS])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_function_and_every_value_agree(text: str, alpha: float) -> None:
    before = network(text)
    after, applied = rewritten(before, Smooth(alpha=alpha), feed(before))
    assert [one.site for one in applied] == ["n"]
    assert operators(after) == operators(before)


def test_the_scale_is_that_of_the_paper() -> None:
    before = network(BLOCK)
    seen = ChannelRange(-np.arange(1.0, 7.0), np.full(6, 3.0))
    after, (applied,) = rewritten(before, Smooth(alpha=0.7, statistics={"n": seen}), feed(before))
    largest = np.maximum(np.abs(stored(before, "q")).max(1), np.abs(stored(before, "k")).max(1))
    expected = np.maximum(np.arange(1.0, 7.0), 3.0) ** 0.7 / largest**0.3
    moved = stored(before, "g") / stored(after, "g.smoothed")
    assert np.allclose(moved, expected, rtol=ROUNDING, atol=0)
    assert np.allclose(stored(after, "k.smoothed"), stored(before, "k") * moved[:, None], rtol=1e-15, atol=0)
    assert applied.notes == ()


@pytest.mark.parametrize("rule", [Smooth(), Smooth(shift=True), ReparameterizeNormScale()])
def test_only_the_matrices_are_rounded_so_that_a_folded_norm_is_followed(rule: Pass[Any]) -> None:
    before = network(BLOCK)
    after = before.clone()
    apply_pass(after, FoldNorm())
    apply_pass(after, rule)
    scale = next(node for node in after.model.graph if node.op_type == "LayerNormalization").inputs[1]
    assert scale is not None
    exact = weight_behind(scale).numpy()
    assert np.allclose(exact.astype(np.float32), exact, rtol=1e-15, atol=0)
    verdict = proof_of(before, after).verdict
    assert verdict.holds, verdict


def test_a_scale_of_zero_stays_and_one_that_would_vanish_is_not_divided() -> None:
    before = network(BLOCK, g=np.array([0.0, 1.0, 1e-30, 1.0, 1.0, 1.0]))
    site = next(iter(Smooth().sites(before)))
    divisor = np.array([3.0, 3.0, 1e30, 1.0, 0.7, 2.0])
    moved = storable(site, divisor)
    assert moved[0] == 3.0
    assert moved[2] == 1.0
    assert np.allclose(moved[3:], divisor[3:], rtol=ROUNDING, atol=0)


def test_calibration_measures_what_the_pass_asks_for() -> None:
    program = network(BLOCK)
    inputs = [feed(program, seed) for seed in range(3)]
    rule = calibrated(Smooth(), program, inputs)
    assert isinstance(rule, Smooth)
    assert rule.statistics is not None
    assert set(rule.statistics) == {"n"}
    measured = channel_statistics(program.model, inputs, ["n"])["n"]
    assert np.array_equal(rule.statistics["n"].magnitude, measured.magnitude)
    assert calibrated(rule, program, []) is rule
    after, (applied,) = rewritten(program, rule, inputs[0])
    assert applied.notes == ()
    largest = np.abs(channel_statistics(after.model, inputs, ["n"])["n"].magnitude)
    weights = np.maximum(np.abs(stored(after, "q.smoothed")).max(1), np.abs(stored(after, "k.smoothed")).max(1))
    assert np.allclose(largest, weights, rtol=4 * ROUNDING, atol=0), "at α = 0.5 both sides have one range"


def test_without_data_the_choice_is_made_from_the_weights_and_said() -> None:
    program = network(BLOCK)
    (applied,) = apply_pass(program, Smooth())
    assert isinstance(applied, Applied)
    assert applied.notes == ("chosen from γ and β, without data",)


def test_dead_channels_stay_as_they_are() -> None:
    g = np.array([1.0, 0.0, 2.0, 1.0, 1.0, 1.0])
    b = np.array([1.0, 0.0, 2.0, 1.0, 1.0, 1.0])
    program = network(BLOCK, g=g, b=b)
    after, (applied,) = rewritten(program, Smooth(), feed(program))
    assert "1 dead channels stay as they are" in applied.notes
    assert np.array_equal(stored(after, "q.smoothed")[1], stored(program, "q")[1])


def test_a_zero_in_gamma_is_no_obstacle() -> None:
    program = network(BLOCK, g=[1.0, 0.0, 2.0, 0.5, 1.0, 1.0])
    rewritten(program, Smooth(), feed(program))


def test_the_middle_of_the_range_moves_into_the_biases() -> None:
    before = network(BLOCK)
    inputs = [feed(before)]
    rule = calibrated(Smooth(shift=True), before, inputs)
    after, (applied,) = rewritten(before, rule, inputs[0])
    assert applied.notes == ("z has a new bias of 4 numbers",)
    moved = channel_statistics(after.model, inputs, ["n"])["n"]
    assert np.allclose(moved.low, -moved.high, rtol=1e-12)
    transforms = [step["transform"] for step in after.relations["n"]["steps"]]
    assert [after.transforms[name].kind for name in transforms] == ["shift", "reciprocal"]


def test_a_shift_uses_the_old_matrix() -> None:
    before = network(BLOCK)
    after, _ = rewritten(before, Smooth(shift=True), feed(before))
    assert np.allclose(stored(after, "z.bias"), stored(before, "b") @ stored(before, "k"), rtol=1e-14)
    assert not stored(after, "b.smoothed").any(), "without data β is the middle"


def test_a_norm_without_shift_is_scaled_where_a_shift_is_asked_for() -> None:
    before = network(EXPERTS)
    rewritten(before, Smooth(shift=True), feed(before))


def test_a_scale_and_shift_that_stand_behind_the_norm_are_its_own() -> None:
    text = BLOCK.replace("n = LayerNormalization (x, g, b)", "m = RMSNormalization (x, g) n = Add (m, b)")
    before = network(text)
    for shift in (False, True):
        after, _ = rewritten(before, Smooth(shift=shift), feed(before))
        assert after.relations["m"]["transform"] == "reciprocal-0" or shift


def test_the_order_with_fold_norm() -> None:
    before = network(BLOCK)
    after = before.clone()
    apply_pass(after, FoldNorm())
    (applied,) = apply_pass(after, Smooth())
    assert isinstance(applied, Applied)
    assert applied.site == "n.core"
    assert difference(before, after, feed(before)) <= 1.0
    both = before.clone()
    for rule in (Smooth(), FoldNorm()):
        apply_pass(both, rule)
    assert difference(before, both, feed(before)) <= 1.0
    assert operators(both).count("LayerNormalization") == 1


MUTANTS: dict[str, Callable[[Program], None]] = {
    "γ is a little larger": lambda after: replace(after, "g.smoothed", lambda w: Scale(w, Constant(np.array(1.01)))),
    "a matrix is centred": lambda after: replace(after, "q.smoothed", lambda w: Center(w, 0)),
    "one reader is forgotten": lambda after: replace(
        after, "k.smoothed", lambda _: Constant(stored(network(BLOCK), "k"))
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_computes_another_function(mutant: str) -> None:
    before = network(BLOCK)
    after, _ = rewritten(before, Smooth(), feed(before))
    proof = proof_of(before, after)
    assert proof.verdict.holds
    assert all(proof.claims.values())
    MUTANTS[mutant](after)
    assert difference(before, after, feed(before)) > 1e4
    assert not proof_of(before, after).verdict.holds


@pytest.mark.parametrize(
    ("family", "applied", "refused"),
    [
        ("llama", 5, set()),  # GQA
        ("falcon_parallel", 2, {"R5"}),  # MQA, biases, a norm with two readers, a tied head
        ("qwen2", 4, {"R5"}),
        ("mixtral", 5, set()),  # a router and stacked experts
        ("convnext", 5, {"R3"}),  # a Conv reads a norm; a depthwise one does too
        ("bert", 0, {"R2", "R3"}),
    ],
)
def test_families(family: str, applied: int, refused: set[str], family_program: Callable[[str], Program]) -> None:
    def rule(program: Program) -> Smooth:
        return calibrated(Smooth(), program, generate_inputs(program.model)[:1])  # type: ignore[return-value]

    check_family(family_program(family), rule, applied, refused)
