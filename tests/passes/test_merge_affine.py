"""merge-affine: matrices and kernels in a row, what stands between them, the cost of low rank, and random pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_checks import merged, whatever_it_costs
from merge_networks import PAIR_WEIGHTS, PAIRS
from networks import network, operators

from rewrite.ir.constants import weight_behind
from rewrite.passes import MergeAffine
from rewrite.rule import Applied, Refused


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_becomes_one_operator(name: str) -> None:
    text, expected = PAIRS[name]
    after, outcomes = merged(network(text, **PAIR_WEIGHTS.get(name, {})), MergeAffine())
    assert all(isinstance(outcome, Applied) for outcome in outcomes)
    assert [operator for operator in operators(after) if operator != "Constant"] == expected


def test_the_product_of_two_linear_layers() -> None:
    text = """
    product (float[N, 8] x, float[8, 6] w, float[6] b, float[6, 4] v, float[4] c) => (float[N, 4] y)
    { h = MatMul (x, w) a = Add (h, b) p = MatMul (a, v) y = Add (p, c) }"""
    before = network(text)
    w, b, v, c = (weight_behind(before.model.graph.initializers[name]).numpy() for name in ("w", "b", "v", "c"))
    after, (applied,) = merged(before, MergeAffine())
    found = {value.name: weight_behind(value).numpy() for value in after.model.graph.initializers.values()}
    assert np.abs(found["w.merged"] - w @ v).max() <= 1e-13
    assert np.abs(found["c.merged"] - (b @ v + c)).max() <= 1e-13
    assert isinstance(applied, Applied)
    assert applied.changed == {"w.merged": "w", "c.merged": "c"}
    (note,) = applied.notes
    assert note == "MatMul · Add · MatMul · Add became one: 1,280 multiply–adds and passes instead of 3,136"


@pytest.mark.parametrize(("rank", "stays"), [(4, True), (20, True), (64, False)])
def test_a_low_rank_pair_stays_factored_where_that_is_cheaper(rank: int, stays: bool) -> None:
    text = f"""
    low (float[N, 3, 64] x, float[64, {rank}] a, float[{rank}, 64] b) => (float[N, 3, 64] y)
    {{ h = MatMul (x, a) y = MatMul (h, b) }}"""
    _, (outcome,) = merged(network(text), MergeAffine())
    assert isinstance(outcome, Refused if stays else Applied), outcome


def test_a_shared_matrix_is_copied_if_asked_to() -> None:
    text = """
    tied (float[N, 3, 8] x, float[8, 8] w, float[8, 8] v) => (float[N, 3, 8] y, float[N, 3, 8] z)
    { h = MatMul (x, w) y = MatMul (h, v) r = Relu (x) p = MatMul (r, w) q = Tanh (p) z = MatMul (q, v) }"""
    before = network(text)
    _, (refused,) = merged(before, MergeAffine())
    assert isinstance(refused, Refused)
    _, (applied,) = merged(before, MergeAffine(untie=True))
    assert isinstance(applied, Applied)
    assert applied.untied_bytes == 8 * 8 * 4


# ------------------------------------------------------------------------------------------------------- random pairs


@st.composite
def pairs(draw: st.DrawFn) -> tuple[str, bool]:
    """Two convolutions with something between, and whether they can become one."""
    spatial, weights, lines = draw(st.integers(1, 2)), list[str](), list[str]()
    sizes = [draw(st.integers(9, 12)) for _ in range(spatial)]

    def weight(*shape: int) -> str:
        weights.append(f"float[{', '.join(map(str, shape))}] w{len(weights)}")
        return f"w{len(weights) - 1}"

    def add(call: str) -> str:
        lines.append(f"v{len(lines)} = {call}")
        return f"v{len(lines) - 1}"

    def convolution(value: str, channels: int, made: int, point: bool, padded: bool) -> tuple[str, bool]:
        axes, group = range(spatial), draw(st.sampled_from([1, 2]))
        taps = [1 if point else draw(st.integers(1, 3)) for _ in axes]
        dilations = [draw(st.integers(1, 2)) for _ in axes]
        strides = [draw(st.integers(1, 2)) for _ in axes]
        pads = [draw(st.integers(0, 2)) if padded else 0 for _ in range(2 * spatial)]
        for axis in axes:
            reach, added = (taps[axis] - 1) * dilations[axis], pads[axis] + pads[axis + spatial]
            sizes[axis] = (sizes[axis] + added - reach - 1) // strides[axis] + 1
        kernel = weight(made, channels // group, *taps)
        bias = draw(st.booleans())
        operands = f"{value}, {kernel}, {weight(made)}" if bias else f"{value}, {kernel}"
        attributes = f"kernel_shape = {taps}, dilations = {dilations}, strides = {strides}, pads = {pads}"
        return add(f"Conv <{attributes}, group = {group}> ({operands})"), bias

    given, padded = ", ".join(["N", "4", *map(str, sizes)]), draw(st.booleans())
    point = draw(st.booleans())
    value, shifted = convolution("x", 4, 6, point, not point)
    if draw(st.booleans()):
        value = add(f"Mul ({value}, {weight(6, *[1] * spatial)})")
    if draw(st.booleans()):
        value, shifted = add(f"Add ({value}, {weight(6, *[1] * spatial)})"), True
    value, _ = convolution(value, 6, 4, False, padded)
    if draw(st.booleans()):
        value = add(f"Add ({value}, {weight(4, *[1] * spatial)})")
    shape, body = ", ".join(["N", "4", *map(str, sizes)]), "\n    ".join(lines)
    text = f"random (float[{given}] x, {', '.join(weights)}) => (float[{shape}] {value})\n{{\n    {body}\n}}"
    return text, not padded or (point and not shifted)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pairs())
def test_random_pairs_become_one_operator(drawn: tuple[str, bool]) -> None:
    text, possible = drawn
    with whatever_it_costs():
        after, (outcome,) = merged(network(text), MergeAffine())
    if possible:
        assert isinstance(outcome, Applied), (outcome, text)
        assert operators(after) == ["Conv"], text
    if isinstance(outcome, Refused):
        assert outcome.refusal.requirement == "R2"
