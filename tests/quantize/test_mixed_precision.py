"""Bits under a budget: the choice against all choices, what it is chosen by, and what the pass makes of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from networks import feed, network

import rewrite.mixed_precision
from rewrite.calibrate import calibrated
from rewrite.check.compare import logit_agreement
from rewrite.errors import RequestError
from rewrite.ir.program import Program
from rewrite.mixed_precision import WIDTHS, average_bits, chosen_bits, output_error, with_chosen_bits
from rewrite.passes import QuantizeWeights
from rewrite.proof import prove
from rewrite.recipes import passes_of
from rewrite.rule import Applied, Refused, apply_pass
from rewrite.targets import TARGETS

Table = dict[str, dict[int, float]]


def tables(seed: int, weights: int, whole: bool = True) -> tuple[Table, Table]:
    """Random effects, which fall with the bits for most weights, and costs of matrices of several sizes."""
    generator = np.random.default_rng(seed)
    effects: Table = {}
    costs: Table = {}
    for index in range(weights):
        size = float(generator.integers(1, 5)) if whole else float(generator.uniform(1, 5))
        falling = np.sort(generator.lognormal(0.0, 2.0, 4))[::-1]
        falling = generator.permutation(falling) if index % 3 == 2 else falling
        effects[f"w{index}"] = {bits: float(error) for bits, error in zip((2, 4, 8, 0), falling)}
        costs[f"w{index}"] = {bits: size * (bits or 32) for bits in (2, 4, 8, 0)}
    return effects, costs


def total(table: Table, bits: Mapping[str, int]) -> float:
    return sum(table[name][each] for name, each in bits.items())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("whole", [True, False])
def test_no_other_choice_within_the_budget_is_better(seed: int, whole: bool) -> None:
    effects, costs = tables(seed, 5, whole)
    choices = [dict(zip(effects, bits)) for bits in itertools.product((2, 4, 8, 0), repeat=5)]
    least = total(costs, dict.fromkeys(effects, 2))
    for budget in least * np.array([1.0, 1.3, 2.0, 3.1, 8.0, 20.0]):
        found = chosen_bits(effects, costs, budget)
        assert list(found) == list(effects)
        # Sums in another order round otherwise.
        rounding = 8 * np.finfo(np.float64).eps
        assert total(costs, found) <= budget * (1 + rounding)
        best = min(total(effects, each) for each in choices if total(costs, each) <= budget)
        assert total(effects, found) <= best * (1 + rounding)


@pytest.mark.parametrize("kept", [1 << 14, 16])
def test_a_larger_budget_is_never_worse_and_the_smallest_is_enough(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite.mixed_precision, "KEPT", kept)
    effects, costs = tables(1, 24, whole=False)
    least = total(costs, dict.fromkeys(effects, 2))
    found = [chosen_bits(effects, costs, least * factor) for factor in np.linspace(1.0 + 1e-12, 16.0, 60)]
    errors = [total(effects, each) for each in found]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert set(found[0].values()) == {2}
    assert errors[-1] == pytest.approx(sum(min(each.values()) for each in effects.values()))


def test_thinning_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    effects, costs = tables(2, 24, whole=False)
    budget = total(costs, dict.fromkeys(effects, 8))
    exact = total(effects, chosen_bits(effects, costs, budget))
    monkeypatch.setattr(rewrite.mixed_precision, "KEPT", 4096)
    thinned = total(effects, chosen_bits(effects, costs, budget))
    # Each of 24 steps may lose one of 4096 parts of all costs: what is chosen is no worse than exact for so much less.
    monkeypatch.undo()
    lost = 24 / 4096 * sum(max(each.values()) for each in costs.values())
    assert exact <= thinned <= total(effects, chosen_bits(effects, costs, budget - lost))


def test_a_budget_below_the_fewest_bits_is_an_error() -> None:
    effects, costs = tables(0, 3)
    with pytest.raises(RequestError, match="is less than the"):
        chosen_bits(effects, costs, total(costs, dict.fromkeys(effects, 2)) - 1.0)


def test_of_logits_the_divergence_counts() -> None:
    generator = np.random.default_rng(0)
    exact = generator.normal(size=(3, 5, 11))
    assert output_error({"logits": exact}, {"logits": exact}) == 0.0
    shifted = exact + generator.normal(size=(3, 5, 1))
    assert output_error({"logits": shifted}, {"logits": exact}) < 1e-28
    assert output_error({"y": shifted}, {"y": exact}) > 0.1
    direction = generator.normal(size=exact.shape)
    for size in (1e-2, 1e-3):
        agreement = logit_agreement(exact + size * direction, exact)
        assert agreement is not None
        # The next term is of third order in the error.
        assert output_error({"logits": exact + size * direction}, {"logits": exact}) == pytest.approx(
            agreement.kl_mean, rel=10 * size
        )


def test_masks_and_integers_do_not_count() -> None:
    exact = {"y": np.array([1.0, -np.inf]), "n": np.array([3])}
    assert output_error({"y": np.array([1.5, -np.inf]), "n": np.array([4])}, exact) == 0.25
    assert output_error({"n": np.array([4])}, {"n": np.array([3])}) == 0.0


NETWORK = """
layers (float[B, 5, 64] x, float[64, 96] a, float[96, 64] b, float[64, 160] c, float[64] small)
    => (float[B, 5, 160] y)
{
    h = MatMul (x, a)
    r = Relu (h)
    o = MatMul (r, b)
    s = Mul (o, small)
    z = Add (x, s)
    y = MatMul (z, c)
}
"""


def program() -> Program:
    """What the middle layers add is small: c matters most."""
    return network(NETWORK, small=np.full(64, 1e-4))


def sets(given: Program) -> list[dict[str, np.ndarray]]:
    return [feed(given, seed, rows=4) for seed in range(2)]


RULE = QuantizeWeights(accuracy_level=4, method="nearest")


@pytest.mark.parametrize(("budget", "expected"), [(2.0, {2}), (4.0, {2, 4, 8}), (8.0, {8}), (32.0, {0})])
def test_the_average_is_within_the_budget(budget: float, expected: set[int]) -> None:
    given = program()
    rule = calibrated(replace(RULE, budget_bits=budget), given, sets(given))
    assert isinstance(rule, QuantizeWeights)
    assert set(rule.layer_bits) == {"a", "b", "c"}
    assert set(rule.layer_bits.values()) <= expected
    assert average_bits(rule, list(rule.sites(given))) <= budget
    assert rule.layer_bits["c"] >= max(rule.layer_bits["a"], rule.layer_bits["b"])
    assert all(set(each) == set(WIDTHS[4]) for each in rule.effects.values())


def test_mixed_bits_are_better_than_the_same_for_all() -> None:
    given = program()
    inputs = sets(given)
    rule = calibrated(replace(RULE, budget_bits=5.0), given, inputs)
    assert isinstance(rule, QuantizeWeights)
    assert rule.layer_bits == {"a": 2, "b": 2, "c": 8}
    mixed = sum(rule.effects[name][bits] for name, bits in rule.layer_bits.items())
    assert mixed < sum(each[4] for each in rule.effects.values()) / 2
    work = given.clone()
    outcomes = apply_pass(work, rule)
    notes = {outcome.site: outcome.notes for outcome in outcomes if isinstance(outcome, Applied)}
    assert all("chosen under budget_bits 5" in notes[name][1] for name in rule.layer_bits)
    held = {node.attributes["bits"].as_int() for node in work.model.graph if node.op_type == "MatMulNBits"}
    assert held == set(rule.layer_bits.values())
    verdict = prove(given.model, work.model, steps=2.0).verdict
    assert verdict.kind == "EQUAL_MODULO", verdict


def test_bytes_count_what_is_stored() -> None:
    given = program()
    for symmetric, rank in ((True, 0), (False, 4)):
        rule = replace(RULE, budget_bytes=24_000.0, symmetric=symmetric, rank=rank)
        chosen = calibrated(rule, given, sets(given))
        work = given.clone()
        outcomes = apply_pass(work, chosen)
        made = {new for outcome in outcomes if isinstance(outcome, Applied) for new in outcome.changed}
        tensors = [work.model.graph.initializers[name].const_value for name in made]
        stored = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        kept = [outcome.site for outcome in outcomes if isinstance(outcome, Refused)]
        assert not kept
        assert 16_000 < stored <= 24_000


def test_time_goes_by_the_target_s_table() -> None:
    given = program()
    with pytest.raises(RequestError, match="is not known of the target"):
        calibrated(replace(RULE, budget_ns=1e4), given, sets(given))
    table = next(target for target in TARGETS if target.name == "ort-cpu").multiply_ns
    entries = 64 * 96 + 96 * 64 + 64 * 160
    budget = entries * table[4, 4]
    rule = calibrated(replace(RULE, budget_ns=budget, multiply_ns=table), given, sets(given))
    assert isinstance(rule, QuantizeWeights)
    sizes = {"a": 64 * 96, "b": 96 * 64, "c": 64 * 160}
    assert sum(sizes[name] * table[bits, 4 if bits else 0] for name, bits in rule.layer_bits.items()) <= budget


def test_without_integer_kernels_four_bits_and_floating_point_are_all() -> None:
    given = program()
    rule = calibrated(replace(RULE, accuracy_level=0, budget_bits=20.0), given, sets(given))
    assert isinstance(rule, QuantizeWeights)
    assert set(rule.layer_bits.values()) == {0, 4}
    outcomes = apply_pass(given, rule)
    assert {outcome.refusal.reason for outcome in outcomes if isinstance(outcome, Refused)} >= {
        "it was chosen to stay in floating point"
    }


def test_bits_that_are_given_stay() -> None:
    given = program()
    rule = calibrated(replace(RULE, budget_bits=4.0, layer_bits={"a": 8}), given, sets(given))
    assert isinstance(rule, QuantizeWeights)
    assert rule.layer_bits["a"] == 8
    assert average_bits(rule, list(rule.sites(given))) <= 4.0


def test_without_data_nothing_is_chosen() -> None:
    given = program()
    outcomes = apply_pass(given, replace(RULE, budget_bits=4.0))
    refused = [outcome.refusal for outcome in outcomes if isinstance(outcome, Refused)]
    assert [refusal.requirement for refusal in refused if "which budget_bits goes by" in refusal.reason] == ["R6"] * 3


def test_a_recipe_file_gives_a_budget(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps([{"pass": "quantize-weights", "budget_bits": 4.5, "accuracy_level": 4}]))
    assert passes_of(None, str(path)) == [QuantizeWeights(budget_bits=4.5, accuracy_level=4)]


def test_one_budget_at_a_time() -> None:
    with pytest.raises(TypeError, match="one budget of"):
        QuantizeWeights(budget_bits=4.0, budget_bytes=1e6)


def test_the_same_data_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = program()
    told: list[str] = []
    first = with_chosen_bits(replace(RULE, budget_bits=4.0), given, sets(given), told.append)
    second = with_chosen_bits(replace(RULE, budget_bits=4.0), given, sets(given))
    assert first == second
    assert told[0] == "effect of 2 bits: 1/3"
    assert len(told) == 9
    monkeypatch.setattr(rewrite.mixed_precision, "RUNS", 1)
    assert with_chosen_bits(replace(RULE, budget_bits=4.0), given, sets(given)).effects
