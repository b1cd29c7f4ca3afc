"""scale-heads: W_v·D, D⁻¹W_o, with which both are equally large in every channel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from head_networks import JOIN, NETWORKS, attention, program
from head_passes import QUICK, VALUE_FAMILIES, check_applies, check_family, check_mutants, check_second_run, numbers

from rewrite.ir.program import Program
from rewrite.passes import ScaleHeads
from rewrite.rule import apply_pass

OPTIONS = (ScaleHeads(), ScaleHeads(per_head=False), ScaleHeads(power_of_two=True))


@pytest.mark.parametrize("rule", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_the_same_function(name: str, rule: ScaleHeads) -> None:
    assert check_applies(rule, NETWORKS[name]) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_a_second_run_changes_nothing(name: str) -> None:
    check_second_run(ScaleHeads(), NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_changed_constant_is_needed(name: str) -> None:
    check_mutants(ScaleHeads(), NETWORKS[name])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in VALUE_FAMILIES]
)
def test_family(name: str, family_program: Callable[[str], Program]) -> None:
    check_family(ScaleHeads(), family_program(name), sites=VALUE_FAMILIES[name])


def test_both_projections_are_equally_large_in_every_channel() -> None:
    after = program(attention())
    apply_pass(after, ScaleHeads())
    written = np.abs(numbers(after, "wv.scaled")).max(axis=0)
    # Query heads 0 and 1 read key-value head 0, query heads 2 and 3 read 1.
    read = np.abs(numbers(after, "wo.scaled")).max(axis=1).reshape(2, 2, 4).max(axis=1).reshape(8)
    assert np.allclose(written, read, rtol=1e-14)


def test_heads_may_have_one_scale_together() -> None:
    before = program(attention())
    after = before.clone()
    apply_pass(after, ScaleHeads(per_head=False))
    factors = (numbers(after, "bv.scaled") / numbers(before, "bv")).reshape(2, 4)
    assert np.allclose(factors[0], factors[1], rtol=1e-15)
    assert after.relations["o"]["axis"] == 3, "one scale for all heads is a transform of the channels alone"


def test_powers_of_two_round_nothing() -> None:
    before = program(attention())
    after = before.clone()
    apply_pass(after, ScaleHeads(power_of_two=True))
    for name in ("wv", "bv", "wo"):
        quotients = numbers(after, f"{name}.scaled") / numbers(before, name)
        assert np.array_equal(np.exp2(np.round(np.log2(quotients))), quotients), name


def test_dead_channels_keep_their_scale_and_factors_their_limit() -> None:
    wv = np.random.default_rng(0).normal(size=(8, 8))
    wv[:, 1] = 0.0
    wv[:, 2] *= 1e-9
    before = program(attention(), wv=wv)
    after = before.clone()
    apply_pass(after, ScaleHeads(limit=16.0))
    factors = numbers(after, "bv.scaled") / numbers(before, "bv")
    assert factors[1] == 1.0
    assert factors[2] == 16.0


def test_an_output_gate_lets_a_diagonal_pass() -> None:
    gate = """
    o2 = Transpose <perm = [0, 2, 1, 3]> (o)
    o4 = Reshape (o2, joined)
    g0 = MatMul (x, wg)
    g = Sigmoid (g0)
    o3 = Mul (o4, g)
"""
    text = attention(join=gate + JOIN.split("\n", 3)[3], weights={"wg": "float[8, 16]"})
    assert check_applies(ScaleHeads(), text) > 0
