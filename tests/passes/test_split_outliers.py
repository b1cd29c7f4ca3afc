"""split-outliers: which channels go apart, what is stored of them, what quantizes the rest, and mutants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from diagonal_checks import proof_of, replace, stored
from networks import difference, digest, feed, network, operators, values_agree

from rewrite.calibrate import calibrated
from rewrite.check.reference import evaluate
from rewrite.check.statistics import channel_statistics
from rewrite.ir.program import Program
from rewrite.ir.statistics import ChannelRange
from rewrite.ir.weights import Constant, Scale
from rewrite.passes import APPROXIMATIONS, QuantizeDynamic, QuantizeStatic, QuantizeWeights, SplitOutliers
from rewrite.proof import prove
from rewrite.rule import Applied, Refused, apply_pass

BLOCK = """
block (float[B, S, 64] x, float[64, 144] q, float[144] b, float[130, 64] k)
    => (float[B, S, 144] y, float[B, S, 130] z)
{
    p = MatMul (x, q)
    y = Add (b, p)
    kt = Transpose <perm = [1, 0]> (k)
    z = MatMul (x, kt)
}
"""

OUTLIERS = [2, 17]
RULE = SplitOutliers(minimum=256)


def inputs_of(program: Program, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of which two channels are fifty times as large."""
    inputs = feed(program, seed, 4, 8)
    inputs["x"][..., OUTLIERS] *= 50.0
    return inputs


def split(program: Program, rule: SplitOutliers = RULE) -> tuple[Program, list[Applied]]:
    """The program behind the pass, which applies wherever it may."""
    after = program.clone()
    outcomes = apply_pass(after, calibrated(rule, after, [inputs_of(program)]))
    applied = [outcome for outcome in outcomes if isinstance(outcome, Applied)]
    assert len(applied) == len(outcomes), outcomes
    return after, applied


def test_the_function_stays_and_a_second_run_changes_nothing() -> None:
    before = network(BLOCK)
    after, applied = split(before)
    assert [one.site for one in applied] == ["q", "k"]
    inputs = inputs_of(before)
    assert difference(before, after, inputs) <= 1.0
    values_agree(before, after, inputs)
    once = digest(after)
    assert not apply_pass(after, calibrated(RULE, after, [inputs]))
    assert digest(after) == once
    assert proof_of(before, after).verdict.kind == "EQUAL"


def test_products_of_one_value_share_the_mask_and_the_channels() -> None:
    after, _ = split(network(BLOCK))
    assert sorted(operators(after)) == sorted("Mul Gather MatMul MatMul Add Add MatMul MatMul Add".split())


def test_what_is_stored_is_stored_as_it_was() -> None:
    before = network(BLOCK)
    after, _ = split(before)
    q, k = stored(before, "q"), stored(before, "k").T
    kept = np.ones(64)
    kept[OUTLIERS] = 0.0
    for name, weight in (("q", q), ("k", k)):
        assert np.array_equal(stored(after, f"{name}.outliers"), weight[OUTLIERS])
        assert np.array_equal(stored(after, f"{name}.rest"), weight * kept[:, None])


def test_what_is_multiplied_with_the_rest_has_no_outliers() -> None:
    before = network(BLOCK)
    after, _ = split(before)
    seen = channel_statistics(after.model, [inputs_of(before)], ["x", "x.rest", "x.outliers"])
    assert not seen["x.rest"].magnitude[OUTLIERS].any()
    assert np.array_equal(seen["x.outliers"].magnitude, seen["x"].magnitude[OUTLIERS])


def test_the_limit_is_relative_to_the_median_or_a_number() -> None:
    magnitude = np.concatenate([[50.0, 30.0, 7.0, 6.0], np.ones(60)])
    seen = ChannelRange(-magnitude, np.zeros(64))
    assert SplitOutliers().outliers(seen).tolist() == [0, 1, 2]
    assert SplitOutliers(ratio=30.0).outliers(seen).tolist() == [0]
    assert SplitOutliers(threshold=29.5).outliers(seen).tolist() == [0, 1]
    assert SplitOutliers(threshold=1e9).outliers(seen).tolist() == []


def test_half_precision_stays_half_precision() -> None:
    before = network("half (float[B, S, 64] x, float[64, 48] w) => (float[B, S, 48] y) { y = MatMul (x, w) }")
    graph = before.model.graph
    graph.initializers["w"].const_value = ir.tensor(stored(before, "w").astype(np.float16), name="w")
    for value in (graph.initializers["w"], *graph.inputs, *graph.outputs):
        value.dtype = ir.DataType.FLOAT16
    after, _ = split(before)
    made = after.model.graph.initializers
    assert {made[name].dtype for name in ("w.rest", "w.outliers", "x.kept")} == {ir.DataType.FLOAT16}


STEPS = 1e3
"""So many are allowed that none of the methods is refused for its errors."""

QUANTIZING = [
    QuantizeDynamic(minimum=64),
    QuantizeStatic(minimum=64),
    QuantizeWeights(minimum=64, accuracy_level=4),
]


def test_every_pass_that_quantizes_matrices_is_among_these() -> None:
    assert {type(rule) for rule in QUANTIZING} <= set(APPROXIMATIONS)


@pytest.mark.parametrize("rule", QUANTIZING, ids=lambda rule: rule.name)
def test_the_rest_is_quantized_and_the_outliers_stay(rule) -> None:
    before = network(BLOCK)
    inputs = inputs_of(before)
    errors = []
    for prepared in (before.clone(), split(before)[0]):
        outcomes = apply_pass(prepared, calibrated(rule, prepared, [inputs]))
        exact, found = evaluate(before.model, inputs), evaluate(prepared.model, inputs)
        errors.append(max(np.linalg.norm(found[name] - exact[name]) for name in exact))
        assert prove(before.model, prepared.model, steps=STEPS).verdict.kind == "EQUAL_MODULO"
    refused = {outcome.site: outcome.refusal for outcome in outcomes if isinstance(outcome, Refused)}
    assert sorted(refused) == ["k.outliers", "q.outliers"]
    assert all("the channels that hold outliers" in refusal.reason for refusal in refused.values())
    assert [outcome.site for outcome in outcomes if isinstance(outcome, Applied)] == ["q.rest", "k.rest"]
    # The outliers are fifty times as large, and set the steps of what they share a scale with.
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("rule", QUANTIZING, ids=lambda rule: rule.name)
def test_mutants_of_what_is_quantized_are_rejected(rule) -> None:
    before = network(BLOCK)
    work, _ = split(before)
    apply_pass(work, calibrated(rule, work, [inputs_of(before)]))
    assert prove(before.model, work.model, steps=STEPS).verdict.holds
    rows = stored(work, "q.outliers")
    for wrong in (rows[::-1], rows * 1.001, np.zeros_like(rows)):
        mutant = work.clone()
        replace(mutant, "q.outliers", lambda _, wrong=wrong: Constant(wrong))
        assert not prove(before.model, mutant.model, steps=STEPS).verdict.holds
    for change in (other_channels, MUTANTS["the mask lets one channel less pass"]):
        mutant = work.clone()
        change(mutant)
        assert not prove(before.model, mutant.model, steps=STEPS).verdict.holds


def exchanged(after: Program) -> None:
    rows = stored(after, "q.outliers")
    replace(after, "q.outliers", lambda _: Constant(rows[::-1]))


def not_masked(after: Program) -> None:
    before = network(BLOCK)
    replace(after, "x.kept", lambda _: Constant(np.ones(64)))
    replace(after, "q.rest", lambda _: Constant(stored(before, "q")))


def other_channels(after: Program) -> None:
    value = after.model.graph.initializers["x.outlier_channels"]
    value.const_value = ir.tensor(np.array([2, 18]), name=value.name)


MUTANTS: dict[str, Callable[[Program], None]] = {
    "the rows of the outliers are exchanged": exchanged,
    "the outliers are multiplied twice": not_masked,
    "a neighbour's channel goes apart": other_channels,
    "the rest is a little larger": lambda after: replace(
        after, "k.rest", lambda weight: Scale(weight, Constant(np.array(1.001)))
    ),
    "the mask lets one channel less pass": lambda after: replace(
        after, "x.kept", lambda _: Constant(np.where(np.isin(np.arange(64), [*OUTLIERS, 5]), 0.0, 1.0))
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_computes_another_function(mutant: str) -> None:
    before = network(BLOCK)
    after, _ = split(before)
    assert proof_of(before, after).verdict.holds
    MUTANTS[mutant](after)
    assert difference(before, after, inputs_of(before)) > 1e4
    assert not proof_of(before, after).verdict.holds
