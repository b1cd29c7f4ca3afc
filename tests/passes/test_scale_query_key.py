"""scale-query-key: W_q·D, W_k·D⁻¹, with one factor for the two channels of a rotary pair."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from head_networks import HALF, NETWORKS, PAIRS, PARTIAL, PLAIN, attention, fed, program
from head_passes import QUICK, VALUE_FAMILIES, check_applies, check_family, check_mutants, check_second_run, numbers
from networks import difference

from rewrite.ir.edit import Editor
from rewrite.ir.program import Program
from rewrite.passes import ScaleQueryKey
from rewrite.rule import apply_pass

OPTIONS = (ScaleQueryKey(), ScaleQueryKey(per_head=False), ScaleQueryKey(power_of_two=True))
NORMED = ("qwen3", "olmo2")
"""Families with norms of queries and keys."""


@pytest.mark.parametrize("rule", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_the_same_function(name: str, rule: ScaleQueryKey) -> None:
    check_applies(rule, NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_second_run_changes_nothing(name: str) -> None:
    check_second_run(ScaleQueryKey(), NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_changed_constant_is_needed(name: str) -> None:
    # Without rotary positions a bias of keys adds one number to all logits of a row, which a softmax does not see.
    check_mutants(ScaleQueryKey(), NETWORKS[name], blind=("bk",) if name == "no rotary" else ())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in VALUE_FAMILIES]
)
def test_family(name: str, family_program: Callable[[str], Program]) -> None:
    refused = "R4" if name in NORMED else ""
    check_family(ScaleQueryKey(), family_program(name), sites=VALUE_FAMILIES[name], refused=refused)


def factors(rotary: str, **options: bool) -> np.ndarray:
    """The factors of queries (4 heads, 4 channels) that the pass chose."""
    before = program(attention(rotary=rotary))
    after = before.clone()
    apply_pass(after, ScaleQueryKey(**options))
    found = numbers(after, "bq.scaled") / numbers(before, "bq")
    keys = numbers(after, "bk.scaled") / numbers(before, "bk")
    assert np.allclose(found.reshape(2, 2, 4) * keys.reshape(2, 1, 4), 1.0, rtol=1e-14), "keys get the inverse"
    return found.reshape(4, 4)


@pytest.mark.parametrize(
    ("rotary", "pairs"),
    [
        pytest.param("half", [(0, 2), (1, 3)], id="half-split"),
        pytest.param("pairs", [(0, 1), (2, 3)], id="side by side"),
        pytest.param("partial", [(0, 1)], id="partial"),
        pytest.param("none", [], id="none"),
    ],
)
def test_the_channels_of_a_rotary_pair_have_one_factor(rotary: str, pairs: list[tuple[int, int]]) -> None:
    found = factors({"half": HALF, "pairs": PAIRS, "partial": PARTIAL, "none": PLAIN}[rotary])
    assert np.allclose(found[0], found[1], rtol=1e-14), "query heads of one group"
    assert not np.allclose(found[0], found[2])
    for i in range(4):
        for j in range(i):
            together = bool(np.isclose(found[0, i], found[0, j], rtol=1e-14))
            assert together == ((j, i) in pairs), (i, j)


def test_both_projections_are_equally_large_in_every_pair() -> None:
    after = program(attention())
    apply_pass(after, ScaleQueryKey())
    queries = np.abs(numbers(after, "wq.scaled")).max(axis=0).reshape(2, 2, 2, 2).max(axis=(1, 2))
    keys = np.abs(numbers(after, "wk.scaled")).max(axis=0).reshape(2, 2, 2).max(axis=1)
    assert np.allclose(queries, keys, rtol=1e-14)


def test_free_factors_under_rotary_positions_would_be_wrong() -> None:
    before = program(attention())
    after = before.clone()
    apply_pass(after, ScaleQueryKey())
    assert difference(before, after, fed(before)) <= 1.0, "the positive control"
    free = np.random.default_rng(0).uniform(0.5, 2.0, 4)
    edit = Editor(after.model, "mutant")
    for name, factor in {"wq": free, "bq": free, "wk": 1 / free, "bk": 1 / free}.items():
        content = numbers(before, name)
        wrong = edit.initializer(f"{name}.free", content * np.tile(factor, content.shape[-1] // 4))
        after.model.graph.initializers[f"{name}.scaled"].replace_all_uses_with(wrong)
    assert difference(before, after, fed(before)) > 1e4


ROTARY_OPERATOR = """
    {0}r = RotaryEmbedding <interleaved = INTERLEAVED, rotary_embedding_dim = TURNED> ({0}, cosines, sines)
"""


@pytest.mark.parametrize(("interleaved", "turned", "pairs"), [(0, 0, 2), (1, 0, 2), (0, 2, 3)])
def test_the_rotary_operator_is_followed_too(interleaved: int, turned: int, pairs: int) -> None:
    rotary = ROTARY_OPERATOR.replace("INTERLEAVED", str(interleaved)).replace("TURNED", str(turned))
    size = (turned or 4) // 2
    core = rotary.format("q") + rotary.format("k") + "    o = Attention (qr, kr, v)\n"
    tables = {"cosines": f"float[2, 5, {size}]", "sines": f"float[2, 5, {size}]"}
    text = attention(rotary=PLAIN, core=core, weights=tables, shape="2, 5")
    text = text.replace("    qr = Identity (q)\n", "").replace("    kr = Identity (k)\n", "")
    check_applies(ScaleQueryKey(), text)
    before = program(text)
    after = before.clone()
    apply_pass(after, ScaleQueryKey())
    found = numbers(after, "bq.scaled") / numbers(before, "bq")
    assert len(np.unique(np.round(found[:4], 12))) == pairs
