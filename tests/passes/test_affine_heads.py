"""affine-heads: W_v·M, M⁻¹W_o, with M the balanced basis of every head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from head_networks import NETWORKS, attention, program
from head_passes import QUICK, VALUE_FAMILIES, check_applies, check_family, check_mutants, check_second_run, numbers

from rewrite.ir.program import Program
from rewrite.passes import AffineHeads
from rewrite.proof.transforms import Invertible
from rewrite.rule import apply_pass

OPTIONS = (AffineHeads(), AffineHeads(per_head=False), AffineHeads(condition=2.0))


@pytest.mark.parametrize("rule", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_the_same_function(name: str, rule: AffineHeads) -> None:
    assert check_applies(rule, NETWORKS[name]) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_a_second_run_changes_nothing(name: str) -> None:
    check_second_run(AffineHeads(), NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_changed_constant_is_needed(name: str) -> None:
    check_mutants(AffineHeads(), NETWORKS[name])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in VALUE_FAMILIES]
)
def test_family(name: str, family_program: Callable[[str], Program]) -> None:
    check_family(AffineHeads(), family_program(name), sites=VALUE_FAMILIES[name])


def test_both_gram_matrices_are_one_diagonal() -> None:
    after = program(attention())
    apply_pass(after, AffineHeads(condition=1e6))
    written = numbers(after, "wv.mapped").reshape(8, 2, 4)
    read = numbers(after, "wo.mapped").reshape(2, 2, 4, 8)
    ratios = []
    for head in range(2):
        gram = written[:, head].T @ written[:, head]
        other = sum(read[head, query] @ read[head, query].T for query in range(2))
        assert np.allclose(gram, np.diag(np.diagonal(gram)), atol=1e-10 * gram.max())
        # Balanced up to the number by which M was normalized.
        ratios.append(np.diagonal(gram) / np.diagonal(other))
        assert np.allclose(ratios[-1], ratios[-1][0], rtol=1e-9)


@pytest.mark.parametrize("condition", [1.5, 4.0, 100.0])
def test_the_condition_number_is_bounded(condition: float) -> None:
    wv = np.random.default_rng(0).normal(size=(8, 8)) * np.geomspace(1e-6, 1e3, 8)
    after = program(attention(), wv=wv)
    apply_pass(after, AffineHeads(condition=condition))
    maps = [t for t in after.transforms.values() if isinstance(t, Invertible)]
    assert maps
    for each in maps:
        assert (np.linalg.cond(each.stack) <= condition * (1 + 1e-9)).all()


def test_a_head_of_zeros_has_a_basis_too() -> None:
    before = program(attention(), wv=np.zeros((8, 8)))
    after = before.clone()
    apply_pass(after, AffineHeads())
    assert np.isfinite(numbers(after, "wo.mapped")).all()


def test_all_heads_may_have_one_map() -> None:
    after = program(attention())
    apply_pass(after, AffineHeads(per_head=False))
    assert after.relations["o"]["axis"] == 3
    assert after.transforms[after.relations["o"]["transform"]].size == 4
