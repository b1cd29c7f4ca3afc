"""compress-residual: a centred stream in one channel less, wherever its size is written, and what must show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from basis_checks import applied, check_proved, check_runs, check_same
from networks import difference, feed, network
from pass_examples import PRE_LN

from rewrite.capture.canonicalize import canonicalize
from rewrite.check.inputs import generate_inputs
from rewrite.ir.edit import shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Constant, MaterializedTensor, Scale, Transformed
from rewrite.passes import CenterResidual, CompressResidual, FoldNorm, FoldScale, RotateResidual
from rewrite.proof import prove
from rewrite.proof.transforms import Isometry
from rewrite.rule import Applied, apply_pass, steps

RECIPE = (FoldScale(), CenterResidual(), FoldNorm(), CompressResidual())

SIZES = """
sizes (float[B, 3, 4, 4] x, float[8, 3, 2, 2] kernel, float[8] bias, float[1, 1, 8] token, float[1, 1, 8] other,
       float[1, 6, 8] places, float[8] g1, float[8] b1, float[8] g2, float[8, 8] w, float[8, 5] head)
    => (float[B, 5] y)
{
    image = Conv <kernel_shape = [2, 2], strides = [2, 2]> (x, kernel, bias)
    flatten = Constant <value_ints = [0, 8, -1]> ()
    flat = Reshape (image, flatten)
    rows = Transpose <perm = [0, 2, 1]> (flat)
    batch = Shape <start = 0, end = 1> (x)
    ends = Constant <value_ints = [1, 8]> ()
    whole = Concat <axis = 0> (batch, ends)
    tokens = Expand (token, whole)
    one = Constant <value_ints = [1]> ()
    ones = Concat <axis = 0> (batch, one, one)
    others = Expand (other, ones)
    joined = Concat <axis = 1> (tokens, others, rows)
    x0 = Add (joined, places)
    n1 = LayerNormalization (x0, g1, b1)
    many = Constant <value_ints = [-1, 8]> ()
    list = Reshape (n1, many)
    h1 = MatMul (list, w)
    six = Constant <value_ints = [6]> ()
    eight = Constant <value_ints = [8]> ()
    back = Concat <axis = 0> (batch, six, eight)
    a1 = Reshape (h1, back)
    x1 = Add (x0, a1)
    n2 = LayerNormalization (x1, g2)
    zero = Constant <value_int = 0> ()
    first = Gather <axis = 1> (n2, zero)
    y = MatMul (first, head)
}
"""
"""The number of channels stands in constants of Reshape and Expand, and in a part of sizes that are computed."""


@pytest.mark.parametrize(
    ("text", "inputs"), [pytest.param(PRE_LN, ("ids",), id="tied head"), pytest.param(SIZES, ("x",), id="sizes")]
)
def test_the_function_stays(text: str, inputs: tuple[str, ...]) -> None:
    before = network(text, inputs)
    after = before.clone()
    (outcome,) = (one for one in applied(after, RECIPE) if one.pass_name == "compress-residual")
    assert isinstance(outcome, Applied)
    assert "norms over 7 channels in place of 8" in str(outcome)
    assert check_same(before, after, feed(before)) >= 5
    check_proved(before, after)
    check_runs(before, after, feed(before))
    assert {shape_of(node.inputs[1]) for node in after.model.graph if node.op_type == "RMSNormalization"} == {(7,)}


def test_a_rotation_may_follow() -> None:
    before = network(PRE_LN, ("ids",))
    after = before.clone()
    applied(after, (*RECIPE, RotateResidual(seed=4)))
    check_same(before, after, feed(before))
    check_proved(before, after)
    kinds = [step["transform"].split("-")[0] for step in steps(after.relations["x1"])]
    assert kinds == ["centre", "isometry", "orthogonal"]


def test_a_constant_scale_stays() -> None:
    text = """
    kept (int64[B, S] ids, float[9, 8] table, float[8] even, float[8, 4] w) => (float[B, S, 4] y)
    { x = Gather (table, ids) n = LayerNormalization (x, even) y = MatMul (n, w) }"""
    before = network(text, ("ids",), even=np.full(8, 1.5))
    after = before.clone()
    apply_pass(after, CenterResidual())
    (outcome,) = apply_pass(after, CompressResidual())
    assert isinstance(outcome, Applied)
    (norm,) = (node for node in after.model.graph if node.op_type == "RMSNormalization")
    assert norm.inputs[1].const_value.numpy().tolist() == [1.5] * 7  # type: ignore[union-attr]
    check_same(before, after, feed(before))


def test_two_channels_are_enough() -> None:
    text = """
    two (int64[B, S] ids, float[9, 2] table, float[2] even, float[2, 4] w) => (float[B, S, 4] y)
    { x = Gather (table, ids) n = LayerNormalization (x, even) y = MatMul (n, w) }"""
    before = network(text, ("ids",), even=np.ones(2))
    after = before.clone()
    assert [type(one) for one in applied(after, RECIPE)] == [Applied, Applied]
    check_same(before, after, feed(before))


# ----------------------------------------------------------------------------------------------- wrong right-hand sides


def _ratio(power: float) -> Constant:
    return Constant(np.asarray((7 / 8) ** power))


MUTANTS: dict[str, tuple[str, Callable[[Transformed], object]]] = {
    "the bare isometry, ε as it was, in every reader": ("readers", lambda w: Scale(w, _ratio(0.5))),
    "Tᵀ in place of the left inverse": ("readers", lambda w: Transformed(w.inner, Isometry(8), w.axis)),
    "a writer by the left inverse's scale": ("writers", lambda w: Transformed(w.inner, Isometry(8, True), w.axis)),
    "a writer that drops its last channel": ("writers", lambda w: _dropped(w)),
}


def _dropped(weight: Transformed) -> Constant:
    return Constant(np.take(weight.inner.numpy(), range(7), axis=weight.axis))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_right_hand_side_shows_and_is_not_proved(mutant: str) -> None:
    before = network(PRE_LN, ("ids",))
    after = before.clone()
    for rule in RECIPE:
        apply_pass(after, rule)
    assert difference(before, after, feed(before)) <= 1.0, "the positive control"
    check_proved(before, after)
    which, wrong = MUTANTS[mutant]
    changed = 0
    for value in after.model.graph.initializers.values():
        weight = value.const_value.weight if isinstance(value.const_value, MaterializedTensor) else None
        if isinstance(weight, Transformed) and isinstance(weight.map, Isometry) and value.dtype is not None:
            if weight.map.reading == (which == "readers"):
                value.const_value = MaterializedTensor(wrong(weight), value.dtype, value.name)  # type: ignore[arg-type]
                changed += 1
                if which == "writers":
                    break
    assert changed
    assert difference(before, after, feed(before)) > 1e4
    assert not prove(before.model, after.model).verdict.holds


# ------------------------------------------------------------------------------------------------------------ families

FAMILIES = ("gpt2", "vit", "falcon_parallel", "opt", "stablelm", "beit", "cohere")
QUICK = ("gpt2", "vit", "falcon_parallel")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILIES])
def test_a_family_is_compressed(name: str, family_program: Callable[[str], Program]) -> None:
    after = family_program(name)
    canonicalize(after)
    before = after.clone()
    outcomes: list[Any] = applied(after, RECIPE)
    assert [type(one) for one in outcomes if one.pass_name == "compress-residual"] == [Applied]
    inputs = generate_inputs(before.model, sizes=((2, 7),))[0]
    assert check_same(before, after, inputs) >= 5
    check_proved(before, after)
    check_runs(before, after, inputs)
