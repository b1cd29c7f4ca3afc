"""merge-affine: matrices and kernels in a row, what stands between them, the cost of low rank, and random pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_checks import merged, whatever_it_costs
from networks import network, operators

from rewrite.ir.constants import weight_behind
from rewrite.passes import MergeAffine
from rewrite.rule import Applied, Refused

PAIRS = {
    "linears with biases": (
        """linears (float[N, 3, 8] x, float[8, 6] w, float[6] b, float[6, 12] w2, float[12] b2, float[12, 5] w3)
            => (float[N, 3, 5] y)
        { h = MatMul (x, w) hb = Add (h, b) r = MatMul (hb, w2) rb = Add (b2, r) y = MatMul (rb, w3) }""",
        ["MatMul", "Add"],
    ),
    "arithmetic between": (
        """between (float[N, 3, 8] x, float[8, 6] w, float[6] s, float[6] t, float[6, 5] v) => (float[N, 3, 5] y)
        {
            two = Constant <value_float = 2.0> ()
            h = MatMul (x, w) a = Mul (s, h) b = Sub (t, a) c = Neg (b) d = Div (c, two) e = Sub (d, two)
            y = MatMul (e, v)
        }""",
        ["MatMul", "Add"],
    ),
    "3×3 before 1×1": (
        """wide (float[N, 3, 8, 9] x, float[6, 3, 3, 3] k, float[6] b, float[4, 6, 1, 1] l, float[4] c)
            => (float[N, 4, 4, 5] y)
        {
            h = Conv <kernel_shape = [3, 3], pads = [1, 2, 1, 0]> (x, k, b)
            y = Conv <kernel_shape = [1, 1], strides = [2, 2]> (h, l, c)
        }""",
        ["Conv"],
    ),
    "1×1 before padded 3×3": (
        """late (float[N, 3, 8, 9] x, float[6, 3, 1, 1] k, float[6] g, float[6] z, float[6] m, float[6] v,
                 float[4, 6, 3, 3] l, float[4] c) => (float[N, 4, 8, 9] y)
        {
            h = Conv <kernel_shape = [1, 1]> (x, k)
            n = BatchNormalization <epsilon = 0.0> (h, g, z, m, v)
            y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (n, l, c)
        }""",
        ["Conv"],
    ),
    "1×1 with a bias before 3×3 without padding": (
        """valid (float[N, 3, 8, 9] x, float[6, 3, 1, 1] k, float[6] b, float[4, 6, 3, 3] l, float[4] c)
            => (float[N, 4, 6, 7] y)
        { h = Conv <kernel_shape = [1, 1]> (x, k, b) y = Conv <kernel_shape = [3, 3]> (h, l, c) }""",
        ["Conv"],
    ),
    "1×1 before an average pool": (
        """pooled (float[N, 3, 8, 9] x, float[6, 3, 1, 1] k, float[6] b) => (float[N, 6, 6, 7] y)
        { h = Conv <kernel_shape = [1, 1]> (x, k, b) y = AveragePool <kernel_shape = [3, 3]> (h) }""",
        ["Conv"],
    ),
    "zero padding between": (
        """padded (float[N, 3, 8, 9] x, float[6, 3, 1, 1] k, float[4, 6, 3, 3] l) => (float[N, 4, 9, 8] y)
        {
            h = Conv <kernel_shape = [1, 1]> (x, k)
            amounts = Constant <value_ints = [2, 0, 1, 1]> ()
            axes = Constant <value_ints = [-2, 3]> ()
            p = Pad (h, amounts, , axes)
            y = Conv <kernel_shape = [3, 3]> (p, l)
        }""",
        ["Conv"],
    ),
    "a crop between": (
        """cropped (float[N, 3, 8] x, float[6, 3, 3] k, float[6] b, float[4, 6, 1] l) => (float[N, 4, 5] y)
        {
            h = Conv <kernel_shape = [3], pads = [1, 1]> (x, k, b)
            amounts = Constant <value_ints = [0, 0, -2, 0, 0, -1]> ()
            p = Pad (h, amounts)
            y = Conv <kernel_shape = [1]> (p, l)
        }""",
        ["Conv"],
    ),
    "groups": (
        """groups (float[N, 8, 20] x, float[12, 4, 1] k, float[12] b, float[12] f, float[4, 6, 3] l)
            => (float[N, 4, 18] y)
        {
            h = Conv <kernel_shape = [1], group = 2> (x, k, b)
            n = BatchNormalization (h, f, f, b, f)
            y = Conv <kernel_shape = [3], group = 2> (n, l)
        }""",
        ["Conv"],
    ),
    "fewer groups": (
        """fewer (float[N, 8, 20] x, float[12, 2, 1] k, float[12] b, float[4, 6, 3] l) => (float[N, 4, 18] y)
        { h = Conv <kernel_shape = [1], group = 4> (x, k, b) y = Conv <kernel_shape = [3], group = 2> (h, l) }""",
        ["Conv"],
    ),
    "a matrix, a Transpose and 1×1": (
        """moved (float[N, 5, 8] x, float[8, 6] w, float[6] b, float[4, 6, 1] l, float[4] c) => (float[N, 4, 5] y)
        {
            h = MatMul (x, w) hb = Add (h, b)
            t = Transpose <perm = [0, 2, 1]> (hb)
            y = Conv <kernel_shape = [1]> (t, l, c)
        }""",
        ["MatMul", "Add", "Transpose"],
    ),
    "a kernel, a Transpose and a matrix": (
        """moved (float[N, 3, 8, 9] x, float[6, 3, 3, 3] k, float[6] b, float[6] f, float[6, 5] l, float[5] c)
            => (float[N, 4, 5, 5] y)
        {
            h = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (x, k, b)
            n = BatchNormalization (h, f, f, b, f)
            t = Transpose <perm = [0, 2, 3, 1]> (n)
            m = Mul (t, f)
            p = MatMul (m, l)
            y = Add (p, c)
        }""",
        ["Conv", "Transpose"],
    ),
    "three, one through a Transpose": (
        """three (float[N, 5, 8] x, float[8, 9] u, float[9, 6] w, float[6] b, float[4, 6, 1] l) => (float[N, 4, 5] y)
        {
            a = MatMul (x, u) h = MatMul (a, w) hb = Add (h, b)
            t = Transpose <perm = [0, 2, 1]> (hb)
            y = Conv <kernel_shape = [1]> (t, l)
        }""",
        ["MatMul", "Add", "Transpose"],
    ),
}

WEIGHTS = {
    "groups": {"f": np.linspace(0.5, 2.0, 12)},
    "a kernel, a Transpose and a matrix": {"f": np.linspace(0.5, 2.0, 6)},
    # A norm that shifts nothing: β = 0 and μ = 0.
    "1×1 before padded 3×3": {"v": np.linspace(0.5, 2.0, 6), "z": np.zeros(6), "m": np.zeros(6)},
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_becomes_one_operator(name: str) -> None:
    text, expected = PAIRS[name]
    after, outcomes = merged(network(text, **WEIGHTS.get(name, {})), MergeAffine())
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
