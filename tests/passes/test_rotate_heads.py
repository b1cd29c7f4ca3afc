"""rotate-heads: W_v(I⊗M), W_o ← (I⊗Mᵀ)W_o, in every way in which heads are projected, shared and joined."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from head_networks import NETWORKS, attention, program
from head_passes import QUICK, VALUE_FAMILIES, check_applies, check_family, check_mutants, check_second_run, numbers

from rewrite.ir.program import Program
from rewrite.passes import RotateHeads
from rewrite.proof.transforms import Hadamard, Orthogonal, Repeated
from rewrite.rule import apply_pass


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_the_same_function(name: str) -> None:
    assert check_applies(RotateHeads(), NETWORKS[name]) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_a_second_run_changes_nothing(name: str) -> None:
    check_second_run(RotateHeads(), NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_changed_constant_is_needed(name: str) -> None:
    check_mutants(RotateHeads(), NETWORKS[name])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in VALUE_FAMILIES]
)
def test_family(name: str, family_program: Callable[[str], Program]) -> None:
    check_family(RotateHeads(), family_program(name), sites=VALUE_FAMILIES[name])


def test_the_constants_are_the_ones_of_the_rule() -> None:
    before = program(attention())
    after = before.clone()
    apply_pass(after, RotateHeads(seed=3))
    m = Hadamard(4, 3).matrix()
    two, four = np.kron(np.eye(2), m), np.kron(np.eye(4), m)
    assert np.allclose(numbers(after, "wv.rotated"), numbers(before, "wv") @ two, rtol=0, atol=1e-14)
    assert np.allclose(numbers(after, "bv.rotated"), numbers(before, "bv") @ two, rtol=0, atol=1e-14)
    assert np.allclose(numbers(after, "wo.rotated"), four.T @ numbers(before, "wo"), rtol=0, atol=1e-14)


def test_only_the_part_of_a_fused_matrix_that_holds_values_is_rotated() -> None:
    before = program(NETWORKS["one matrix, head by head"])
    after = before.clone()
    apply_pass(after, RotateHeads())
    old, new = numbers(before, "w").reshape(8, 4, 12), numbers(after, "w.rotated").reshape(8, 4, 12)
    assert np.array_equal(old[:, :, :8], new[:, :, :8])
    assert np.abs(old[:, :, 8:] - new[:, :, 8:]).min() > 0


def test_values_are_related_head_by_head_and_joined() -> None:
    after = program(attention())
    apply_pass(after, RotateHeads())
    found = {name: (after.transforms[step["transform"]], step["axis"]) for name, step in after.relations.items()}
    m = Hadamard(4, 0)
    assert found["v1"] == (Repeated(m, 2), 2)
    assert found["v"] == found["o"] == (m, 3)
    assert found["o3"] == (Repeated(m, 4), 2)


def test_the_seed_decides() -> None:
    results = []
    for seed in (0, 0, 1):
        after = program(attention())
        apply_pass(after, RotateHeads(seed=seed))
        results.append(numbers(after, "wv.rotated"))
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_where_no_hadamard_matrix_exists_a_random_rotation_serves() -> None:
    text = attention().replace("0, 0, 4, 4", "0, 0, 2, 8").replace("0, 0, 2, 4", "0, 0, 1, 8")
    text = text.replace("float[8, 8] wv", "float[8, 7] wv").replace("float[8] bv", "float[7] bv")
    text = text.replace("float[16, 8] wo", "float[14, 8] wo").replace("0, 0, 16", "0, 0, 14")
    text = text.replace("v2 = Reshape (v1, by2)", "v2 = Reshape (v1, by7)")
    text = text.replace("    by4 =", "    by7 = Constant <value_ints = [0, 0, 1, 7]> ()\n    by4 =")
    text = text.replace("S, 2] angles", "S, 4] angles").replace(
        "half = Constant <value_ints = [2]>", "half = Constant <value_ints = [4]>"
    )
    assert check_applies(RotateHeads(), text) > 0
    after = program(text)
    apply_pass(after, RotateHeads())
    assert isinstance(after.transforms[after.relations["o"]["transform"]], Orthogonal)


GUARD = """
    raw = Attention (qr, kr, v)
    none = Constant <value_float = 0.0> ()
    masked = Less (level, none)
    o = Where (masked, none, raw)
"""


def test_rows_where_everything_is_masked_are_zero_in_every_basis() -> None:
    assert check_applies(RotateHeads(), attention(core=GUARD, weights={"level": "float[1, 1, 1, 1]"})) > 0
