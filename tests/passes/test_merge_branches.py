"""merge-branches: re-parameterized blocks, sums of every shape, the formula, and blocks captured from torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_checks import merged, whatever_it_costs
from merge_networks import BLOCKS
from networks import difference, network, operators
from torch import nn

import rewrite
from rewrite.capture.canonicalize import canonicalize
from rewrite.check.inputs import generate_inputs
from rewrite.ir.constants import weight_behind
from rewrite.ir.program import Program
from rewrite.passes import FoldBatchnorm, FoldScale, MergeAffine, MergeBranches
from rewrite.proof import prove
from rewrite.rule import Applied, Refused, apply_pass


def block(name: str) -> Program:
    text, _, weights = BLOCKS[name]
    return network(text, ("x", "z"), **{key: np.asarray(value) for key, value in weights.items()})


def stored(program: Program, name: str) -> np.ndarray:
    """The exact numbers behind an initializer."""
    return weight_behind(program.model.graph.initializers[name]).numpy()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_becomes_one_operator(name: str) -> None:
    after, (outcome,) = merged(block(name), MergeBranches())
    assert isinstance(outcome, Applied)
    assert operators(after) == BLOCKS[name][1]


def test_the_kernel_of_a_repvgg_block() -> None:
    before = block("repvgg")
    after, (applied,) = merged(before, MergeBranches())
    k3, k1, g1, v1, m1, c1, g, v, m, c, b3 = (
        stored(before, name) for name in ("k3", "k1", "g1", "v1", "m1", "c1", "g", "v", "m", "c", "b3")
    )
    epsilon = float(np.float32(1e-5))
    a1, a = g1 / np.sqrt(v1 + epsilon), g / np.sqrt(v + epsilon)
    expected = k3.copy()
    expected[:, :, 1, 1] += a1[:, None] * k1[:, :, 0, 0] + np.diag(a)
    assert np.abs(stored(after, "k3.merged") - expected).max() <= 1e-14
    assert np.abs(stored(after, "b3.merged") - (b3 + c1 - a1 * m1 + c - a * m)).max() <= 1e-14
    assert isinstance(applied, Applied)
    assert applied.changed == {"k3.merged": "k3", "b3.merged": "b3"}
    assert applied.notes == (
        "BatchNormalization + Conv + Conv·BatchNormalization became 3×3",
        "69,888 multiply–adds and passes instead of 182,784",
    )


def test_what_is_no_branch_stays_in_the_sum() -> None:
    after, _ = merged(block("parallel linears"), MergeBranches())
    (added,) = (node for node in after.model.graph if "z" in [value.name for value in node.inputs if value])
    assert added.op_type == "Add"
    assert added.outputs[0].name == "u"


def test_two_values_in_one_sum() -> None:
    text = """
    two (float[N, 3, 8] x, float[N, 3, 8] z, float[8, 8] a, float[8, 8] b, float[8, 8] c, float[8, 8] d)
        => (float[N, 3, 8] y)
    {
        p = MatMul (x, a) q = MatMul (z, b) r = MatMul (x, c) s = MatMul (z, d)
        t = Add (p, q) u = Sub (r, s) y = Add (t, u)
    }"""
    after, outcomes = merged(network(text, ("x", "z")), MergeBranches())
    assert [isinstance(outcome, Applied) for outcome in outcomes] == [True, True]
    assert sorted(operators(after)) == ["Add", "MatMul", "MatMul"]


def test_those_branches_are_merged_that_make_it_cheaper() -> None:
    text = """
    some (float[N, 8, 9, 9] x, float[8, 1, 5, 5] d5, float[8, 1, 3, 3] d3, float[8, 8, 1, 1] p)
        => (float[N, 8, 9, 9] y)
    {
        a = Conv <kernel_shape = [5, 5], pads = [2, 2, 2, 2], group = 8> (x, d5)
        b = Conv <kernel_shape = [1, 1]> (x, p)
        c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 8> (x, d3)
        s = Add (a, b)
        y = Add (s, c)
    }"""
    after, _ = merged(network(text), MergeBranches())
    assert operators(after) == ["Conv", "Conv", "Add"]
    assert {value.name for value in after.model.graph.initializers.values()} == {"d5.merged", "p"}


def test_a_vector_of_more_channels_than_the_branches_have_stays() -> None:
    text = """
    wider (float[N, 4, 6, 6] x, float[N, 4, 6, 6] z, float[1, 4, 3, 3] k, float[1, 4, 1, 1] p, float[4, 1, 1] b,
           float[1] one) => (float[N, 4, 6, 6] y)
    {
        a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k)
        c = Conv (x, p)
        y = Sum (b, z, a, one, c)
    }"""
    after, (outcome,) = merged(network(text, ("x", "z")), MergeBranches())
    assert isinstance(outcome, Applied)
    assert operators(after) == ["Conv", "Add", "Add"]
    assert outcome.changed == {"k.merged": "k", "one.merged": "one"}


def test_the_value_keeps_its_other_readers() -> None:
    text = """
    residual (float[N, 3, 8] x, float[8, 8] w) => (float[N, 3, 8] y, float[N, 3, 8] z)
    { h = MatMul (x, w) y = Add (x, h) z = Relu (x) }"""
    before = network(text)
    after, (outcome,) = merged(before, MergeBranches())
    assert sorted(operators(after)) == ["MatMul", "Relu"]
    assert np.array_equal(stored(after, "w.merged"), stored(before, "w") + np.eye(8))
    assert isinstance(outcome, Applied)


def test_sizes_that_are_not_static() -> None:
    text = """
    dynamic (float[N, 4, H, W] x, float[4, 4, 3, 3] k, float[4, 4, 1, 1] p) => (float[N, 4, H2, W2] y)
    {
        c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k)
        q = Conv (x, p)
        s = Add (c, q)
        y = Add (s, x)
    }"""
    after, _ = merged(network(text), MergeBranches())
    assert operators(after) == ["Conv"]


def test_a_shared_matrix_is_copied_if_asked_to() -> None:
    text = """
    tied (float[N, 3, 8] x, float[8, 8] w, float[8, 8] v) => (float[N, 3, 8] y, float[N, 3, 8] z)
    {
        h = MatMul (x, w) p = MatMul (x, v) y = Add (h, p)
        r = Relu (x) s = MatMul (r, w) t = Tanh (s) z = MatMul (t, v)
    }"""
    before = network(text)
    _, (refused,) = merged(before, MergeBranches())
    assert isinstance(refused, Refused)
    _, (applied,) = merged(before, MergeBranches(untie=True))
    assert isinstance(applied, Applied)
    assert applied.untied_bytes == 8 * 8 * 4


def test_a_matrix_in_two_branches_is_not_shared_with_anyone() -> None:
    text = """
    twice (float[N, 3, 8] x, float[8, 8] w, float[8] s) => (float[N, 3, 8] y)
    { h = MatMul (x, w) p = MatMul (x, w) q = Mul (p, s) y = Add (h, q) }"""
    _, (applied,) = merged(network(text), MergeBranches())
    assert isinstance(applied, Applied)
    assert not applied.untied_bytes


# ------------------------------------------------------------------------------------------------- random convolutions


@st.composite
def sums(draw: st.DrawFn) -> str:
    """Branches on one value, of one stride and one size, with every kind of operator that a branch may have."""
    spatial, stride = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 2, 4]))
    weights: list[str] = []
    lines: list[str] = []
    sizes = [draw(st.integers(5, 8)) for _ in range(spatial)]

    def weight(*shape: int) -> str:
        weights.append(f"float[{', '.join(map(str, shape))}] w{len(weights)}")
        return f"w{len(weights) - 1}"

    def add(call: str) -> str:
        lines.append(f"v{len(lines)} = {call}")
        return f"v{len(lines) - 1}"

    def windows(reach: int) -> str:
        taps = [draw(st.integers(1, reach)) for _ in range(spatial)]
        dilations = [draw(st.integers(1, 2)) for _ in range(spatial)]
        begins = [draw(st.integers(0, (k - 1) * d)) for k, d in zip(taps, dilations)]
        ends = [(k - 1) * d - begin for k, d, begin in zip(taps, dilations, begins)]
        return f"kernel_shape = {taps}, dilations = {dilations}, pads = {begins + ends}, strides = {[stride] * spatial}"

    def convolution(value: str, channels: int, count: int) -> str:
        window = windows(3)
        taps = [int(k) for k in window[window.index("[") + 1 : window.index("]")].split(",")]
        bias = f", {weight(4)}" if draw(st.booleans()) else ""
        return add(f"Conv <{window}, group = {count}> ({value}, {weight(4, channels // count, *taps)}{bias})")

    def branch() -> str:
        kind = draw(st.sampled_from(["kernel", "kernel", "grouped", "pool", "two", "value"]))
        if kind == "value" and stride == 1:
            value = "x"
        elif kind == "pool":
            value = add(f"AveragePool <{windows(3)}, count_include_pad = 1> (x)")
        elif kind == "two":
            first = add(f"Conv <kernel_shape = {[1] * spatial}> (x, {weight(3, 4, *[1] * spatial)})")
            value = convolution(first, 3, 1)
        else:
            value = convolution("x", 4, 1 if kind == "kernel" else groups)
        if draw(st.booleans()):
            value = add(f"Mul ({value}, {weight(4, *[1] * spatial)})")
        if draw(st.booleans()):
            value = add(f"Add ({weight(1, 4, *[1] * spatial)}, {value})")
        return value

    total = convolution("x", 4, groups)
    for _ in range(draw(st.integers(1, 3))):
        total = add(f"{draw(st.sampled_from(['Add', 'Sub']))} ({', '.join(draw(st.permutations([total, branch()])))})")
    shape = ", ".join(["N", "4", *(str(-(-size // stride)) for size in sizes)])
    given = ", ".join(["N", "4", *map(str, sizes)])
    body = "\n    ".join(lines)
    return f"random (float[{given}] x, {', '.join(weights)}) => (float[{shape}] {total})\n{{\n    {body}\n}}"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sums())
def test_random_branches_become_one_operator(text: str) -> None:
    with whatever_it_costs():
        after, outcomes = merged(network(text), MergeBranches())
    assert isinstance(outcomes[0], Applied), (outcomes[0], text)
    assert operators(after) == ["Conv"], text


@settings(max_examples=20, deadline=None, derandomize=True)
@given(sums())
def test_random_branches_are_merged_where_it_pays(text: str) -> None:
    merged(network(text), MergeBranches())


# -------------------------------------------------------------------------------------------------- blocks from torch


def normed(*layers: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(*layers, nn.BatchNorm2d(channels))


class Parallel(nn.Module):
    """The sum of branches."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((branch(x) for branch in self.branches[1:]), start=self.branches[0](x))


class LowRank(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.base, self.down = nn.Linear(size, size), nn.Linear(size, 2, bias=False)
        self.up = nn.Linear(2, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 0.7 * self.up(self.down(x))


def blocks(size: int = 6) -> nn.Module:
    """RepVGG, ACNet, DBB and MobileOne blocks, and a linear layer with an adapter, with activations between."""

    def conv(high: int, wide: int, groups: int = 1) -> nn.Module:
        pads = (high // 2, wide // 2)
        return nn.Conv2d(size, size, (high, wide), padding=pads, groups=groups, bias=False)

    def depthwise(kernel: int) -> nn.Module:
        return normed(conv(kernel, kernel, size), channels=size)

    return nn.Sequential(
        Parallel(normed(conv(3, 3), channels=size), normed(conv(1, 1), channels=size), normed(channels=size)),
        nn.ReLU(),
        Parallel(*(normed(conv(*kernel), channels=size) for kernel in ((3, 3), (1, 3), (3, 1)))),
        nn.ReLU(),
        Parallel(
            normed(conv(3, 3), channels=size),
            normed(conv(1, 1), channels=size),
            normed(conv(1, 1), conv(3, 3), channels=size),
            normed(conv(1, 1), nn.AvgPool2d(3, 1, 1), channels=size),
        ),
        nn.ReLU(),
        Parallel(depthwise(3), depthwise(3), depthwise(3), depthwise(1), normed(channels=size)),
        nn.ReLU(),
        nn.Flatten(2),
        LowRank(72),
        nn.Tanh(),
    )


@pytest.fixture(scope="module")
def captured() -> Program:
    module = perturb(blocks()).eval()
    program = rewrite.capture(module, {"input": torch.randn(2, 6, 8, 9)})
    canonicalize(program)
    return program


@pytest.mark.parametrize(
    "passes",
    [
        (MergeBranches(),),
        (MergeAffine(), MergeBranches()),
        (FoldScale(), FoldBatchnorm(), MergeAffine(), MergeBranches()),
    ],
)
def test_captured_blocks_become_one_operator_each(captured: Program, passes: tuple) -> None:
    after = captured.clone()
    for rule in passes:
        apply_pass(after, rule)
    inputs = generate_inputs(captured.model)[1]
    assert difference(captured, after, inputs) <= 1.0
    assert prove(captured.model, after.model).verdict.holds
    found = [operator for operator in operators(after) if operator not in ("Relu", "Reshape", "Flatten", "Tanh")]
    assert found == ["Conv"] * 4 + ["MatMul", "Add"]
    applied = [record for record in after.records if isinstance(record, Applied)]
    assert sum(record.pass_name == "merge-branches" for record in applied) == 5
