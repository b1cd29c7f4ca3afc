"""fold-parametrization: weights that are computed from parameters become what they denote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from families import perturb
from networks import difference, digest, feed, network, operators, values_agree
from torch import nn
from torch.nn.utils import parametrizations

import rewrite
from rewrite.capture.canonicalize import canonicalize
from rewrite.check.reference import evaluate
from rewrite.ir.computed import Computed
from rewrite.ir.program import Program
from rewrite.ir.weights import cut_blocks, weight_of
from rewrite.passes import FoldParametrization, FoldScale
from rewrite.proof import prove
from rewrite.rule import Applied, Refused, apply_pass


@dataclass(frozen=True)
class Case:
    """A network (ONNX text), and the operators that are left of it."""

    text: str
    left: tuple[str, ...]
    weights: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "weight normalization": Case(
        """normalized (float[B, 4] x, float[4, 6] v, float[1, 6] g, float[6] b) => (float[B, 6] y)
        {
            axes = Constant <value_ints = [0]> ()
            size = ReduceL2 (v, axes)
            direction = Div (v, size)
            w = Mul (g, direction)
            p = MatMul (x, w)
            y = Add (p, b)
        }""",
        ("MatMul", "Add"),
    ),
    "spectral normalization of a kernel": Case(
        """spectral (float[B, 3, 5, 5] x, float[4, 3, 3, 3] k, float[4] u, float[27] v) => (float[B, 4, 3, 3] y)
        {
            shape = Constant <value_ints = [4, -1]> ()
            rows = Reshape (k, shape)
            kv = MatMul (rows, v)
            sigma = MatMul (u, kv)
            w = Div (k, sigma)
            y = Conv <kernel_shape = [3, 3]> (x, w)
        }""",
        ("Conv",),
    ),
    "a standardized kernel": Case(
        """standardized (float[B, 3, 5] x, float[4, 3, 3] k, float[4, 1, 1] gain) => (float[B, 4, 3] y)
        {
            axes = Constant <value_ints = [1, 2]> ()
            epsilon = Constant <value_float = 0.00001> ()
            mean = ReduceMean (k, axes)
            centred = Sub (k, mean)
            square = Mul (centred, centred)
            variance = ReduceMean (square, axes)
            padded = Add (variance, epsilon)
            deviation = Sqrt (padded)
            unit = Div (centred, deviation)
            w = Mul (unit, gain)
            y = Conv <kernel_shape = [3]> (x, w)
        }""",
        ("Conv",),
    ),
    "a kernel standardized by a batch norm": Case(
        """standardized (float[B, 3, 5] x, float[4, 3, 3] k, float[4] gain, float[4] zero) => (float[B, 4, 3] y)
        {
            rows_shape = Constant <value_ints = [1, 4, 9]> ()
            axes = Constant <value_ints = [0, 2]> ()
            rows = Reshape (k, rows_shape)
            mean = ReduceMean <keepdims = 0> (rows, axes)
            wide_mean = ReduceMean (rows, axes)
            centred = Sub (rows, wide_mean)
            square = Mul (centred, centred)
            variance = ReduceMean <keepdims = 0> (square, axes)
            unit = BatchNormalization <epsilon = 0.001> (rows, gain, zero, mean, variance)
            shape = Constant <value_ints = [4, 3, 3]> ()
            w = Reshape (unit, shape)
            y = Conv <kernel_shape = [3]> (x, w)
        }""",
        ("Conv",),
    ),
    "a masked matrix with a low-rank update": Case(
        """adapted (float[B, 4] x, float[4, 6] w0, float[4, 2] a, float[2, 6] b, float[4, 6] mask) => (float[B, 6] y)
        {
            factor = Constant <value_float = 0.5> ()
            ab = MatMul (a, b)
            update = Mul (ab, factor)
            sum = Add (w0, update)
            w = Mul (sum, mask)
            y = MatMul (x, w)
        }""",
        ("MatMul",),
        {"mask": np.arange(24).reshape(4, 6) % 3 > 0},
    ),
    "a product with its transpose, one matrix for two readers": Case(
        """symmetric (float[B, 4] x, float[3, 4] r) => (float[B, 4] y)
        {
            t = Transpose <perm = [1, 0]> (r)
            w = MatMul (t, r)
            a = MatMul (x, w)
            h = Tanh (a)
            y = MatMul (h, w)
        }""",
        ("MatMul", "Tanh", "MatMul"),
    ),
    "Unified Normalization": Case(
        """unified (float[B, S, 4] x, float[4] g, float[4] b, float[4] v, float[4, 3] w) => (float[B, S, 3] y)
        {
            epsilon = Constant <value_float = 0.00001> ()
            padded = Add (v, epsilon)
            deviation = Sqrt (padded)
            gx = Mul (g, x)
            unit = Div (gx, deviation)
            n = Add (unit, b)
            y = MatMul (n, w)
        }""",
        ("Mul", "Div", "Add", "MatMul"),
        {"v": [0.5, 1.0, 1.5, 2.0]},
    ),
    "parts of weights, laid out anew": Case(
        """parts (float[B, 4] x, float[2, 3] p, float[2, 3] q, float[1, 1] s) => (float[B, 3] y)
        {
            t = Tanh (p)
            all = Concat <axis = 0> (t, q)
            first = Constant <value_ints = [0]> ()
            last = Constant <value_ints = [9]> ()
            scaled = Mul (all, s)
            part = Slice (scaled, first, last)
            axes = Constant <value_ints = [0]> ()
            more = Unsqueeze (part, axes)
            less = Squeeze (more, axes)
            lower = Constant <value_float = -0.5> ()
            w = Clip (less, lower)
            y = MatMul (x, w)
        }""",
        ("MatMul",),
    ),
    "rows of a table, in another order": Case(
        """rows (float[B, 4] x, float[6, 3] table, int64[2, 2] order) => (float[B, 2, 3] y)
        {
            t = Tanh (table)
            cube = Gather (t, order)
            axes = Constant <value_ints = [0]> ()
            sizes = Constant <value_ints = [4, 3]> ()
            w = Reshape (cube, sizes)
            p = MatMul (x, w)
            last = Constant <value_ints = [-2]> ()
            sum = ReduceSum <keepdims = 0> (cube, axes)
            q = Unsqueeze (p, last)
            y = Add (q, sum)
        }""",
        ("MatMul", "Unsqueeze", "Add"),
        {"order": [[5, -6], [2, 2]]},
    ),
    "zeros that are filled in": Case(
        """filled (float[B, 4] x, float[3, 5] w) => (float[B, 5] y)
        {
            sizes = Constant <value_ints = [1, 5]> ()
            half = ConstantOfShape <value = float[1] {0.5}> (sizes)
            t = Exp (w)
            rows = Concat <axis = 0> (t, half)
            y = MatMul (x, rows)
        }""",
        ("MatMul",),
    ),
    "a Gemm of weights": Case(
        """bilinear (float[B, 4] x, float[3, 4] a, float[3, 5] b, float[5] c) => (float[B, 5] y)
        {
            w = Gemm <transA = 1, alpha = 0.25, beta = 2.0> (a, b, c)
            y = MatMul (x, w)
        }""",
        ("MatMul",),
    ),
    "a scale spread out first": Case(
        """spread (float[B, 4] x, float[4, 3] p, float[1, 3] s) => (float[B, 3] y)
        { sizes = Constant <value_ints = [4, 3]> () wide = Expand (s, sizes) w = Mul (p, wide) y = MatMul (x, w) }""",
        ("MatMul",),
    ),
    "a weight stored transposed": Case(
        """transposed (float[B, 4] x, float[6, 4] w) => (float[B, 6] y)
        { t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) }""",
        ("MatMul",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_weight_is_what_its_parameters_denote(name: str) -> None:
    case = CASES[name]
    before = network(case.text, **case.weights)
    after = before.clone()
    outcomes = apply_pass(after, FoldParametrization())
    assert outcomes
    assert all(isinstance(outcome, Applied) for outcome in outcomes), outcomes
    assert tuple(kind for kind in operators(after) if kind != "Constant") == case.left
    inputs = feed(before)
    assert difference(before, after, inputs) <= 1.0
    assert values_agree(before, after, inputs) == 0
    assert prove(before.model, after.model).verdict.kind == "EQUAL"
    once = digest(after)
    assert apply_pass(after, FoldParametrization()) == []
    assert digest(after) == once
    # A value that keeps its meaning keeps its name.
    names = {value.name for node in before.model.graph for value in node.outputs}
    assert {outcome.site for outcome in outcomes} <= names & set(after.model.graph.initializers)


@pytest.mark.parametrize("name", CASES)
def test_regions_are_what_all_of_it_is(name: str) -> None:
    """A weight is read by blocks of rows and of columns, and a region asks for no more than it needs."""
    case = CASES[name]
    after = network(case.text, **case.weights)
    apply_pass(after, FoldParametrization())
    for value in after.model.graph.initializers.values():
        weight = weight_of(value.const_value)
        if not isinstance(weight, Computed):
            continue
        whole = weight.numpy()
        for axis in range(len(weight.shape)):
            joined = np.full(weight.shape, np.nan)
            # Without what is kept of small results, which hides how a region is computed.
            for region in cut_blocks(weight.shape, frozenset(range(axis)), 2):
                operands = [part.read(taken) for part, taken in zip(weight.parts, weight.needed(region))]
                joined[region] = weight.compute(operands, region)
            np.testing.assert_allclose(joined, whole, rtol=1e-12, atol=1e-14)


def test_it_is_rounded_once(tmp_path) -> None:
    case = CASES["weight normalization"]
    before = network(case.text)
    exact = {name: value.const_value.numpy() for name, value in before.model.graph.initializers.items()}
    v, g = exact["v"].astype(np.float64), exact["g"].astype(np.float64)
    after = before.clone()
    apply_pass(after, FoldParametrization())
    after.save(tmp_path / "model.onnx")
    saved = ir.load(tmp_path / "model.onnx").graph.initializers["w"].const_value.numpy()
    assert np.array_equal(saved, (g * v / np.linalg.norm(v, axis=0)).astype(np.float32))


def test_several_weights_of_one_parameter_may_not_make_the_network_larger() -> None:
    """Two matrices made of one are twice as much; its two halves are not."""
    text = """
    shared (float[B, 300] x, float[300, 300] v, float[1, 300] g, float[1, 300] h) => (float[B, 300] y)
    {
        w1 = Mul (v, g)
        w2 = Mul (v, h)
        p = MatMul (x, w1)
        t = Tanh (p)
        y = MatMul (t, w2)
    }"""
    twice = network(text)
    outcomes = apply_pass(twice, FoldParametrization())
    assert [type(outcome) for outcome in outcomes] == [Refused, Refused]
    assert outcomes[0].refusal.requirement == "R4"
    halves = """
    halves (float[B, 300] x, float[300, 600] v, float[1, 600] g) => (float[B, 300] y)
    {
        s = Mul (v, g)
        zero = Constant <value_ints = [0]> ()
        half = Constant <value_ints = [300]> ()
        end = Constant <value_ints = [600]> ()
        column = Constant <value_ints = [1]> ()
        w1 = Slice (s, zero, half, column)
        w2 = Slice (s, half, end, column)
        p = MatMul (x, w1)
        t = Tanh (p)
        y = MatMul (t, w2)
    }"""
    before = network(halves)
    after = before.clone()
    assert [type(outcome) for outcome in apply_pass(after, FoldParametrization())] == [Applied, Applied]
    assert [kind for kind in operators(after) if kind != "Constant"] == ["MatMul", "Tanh", "MatMul"]
    assert difference(before, after, feed(before)) <= 1.0


def test_unified_normalization_is_gone_where_its_scale_is_a_constant() -> None:
    """x·g/√(v + ε) + b behind a matrix: with the root folded, fold-scale takes the rest of the factor."""
    text = """
    unified (float[B, S, 5] x, float[5, 4] w0, float[4] g, float[4] b, float[4] v) => (float[B, S, 4] y)
    {
        h = MatMul (x, w0)
        epsilon = Constant <value_float = 0.00001> ()
        padded = Add (v, epsilon)
        deviation = Sqrt (padded)
        gx = Mul (g, h)
        unit = Div (gx, deviation)
        y = Add (unit, b)
    }"""
    before = network(text, v=[0.5, 1.0, 1.5, 2.0])
    after = before.clone()
    for rule in (FoldParametrization(), FoldScale()):
        apply_pass(after, rule)
    assert [kind for kind in operators(after) if kind != "Constant"] == ["MatMul", "Add"]
    assert difference(before, after, feed(before)) <= 1.0
    assert prove(before.model, after.model).verdict.kind == "EQUAL"


def test_what_the_network_stores_once_stays_stored_once() -> None:
    tied = """tied (int64[B, S] ids, float[7, 6] table) => (float[B, S, 7] y)
    { e = Gather (table, ids) t = Tanh (e) head = Transpose <perm = [1, 0]> (table) y = MatMul (t, head) }"""
    assert apply_pass(network(tied, ("ids",)), FoldParametrization()) == []
    sliced = """sliced (float[B, 3] x, float[6, 5] w) => (float[B, 5] y)
    { first = Constant <value_ints = [0]> () last = Constant <value_ints = [3]> () p = Slice (w, first, last)
      y = MatMul (x, p) }"""
    assert apply_pass(network(sliced), FoldParametrization()) == []
    widened = (
        """widened (float[B, 3] x, float16[3, 5] w) => (float[B, 5] y) { v = Cast <to = 1> (w) y = MatMul (x, v) }"""
    )
    assert apply_pass(network(widened), FoldParametrization()) == []


def test_a_quantized_weight_is_meant_to_be_one() -> None:
    text = """quantized (float[B, 3] x, float[3, 5] w, float s) => (float[B, 5] y)
    {
        zero = Constant <value_float = 0.0> ()
        q = QuantizeLinear (w, s)
        d = DequantizeLinear (q, s)
        g = Neg (d)
        y = MatMul (x, g)
    }"""
    assert apply_pass(network(text, s=0.01), FoldParametrization()) == []


# ── Captured modules ────────────────────────────────────────────────────────────────────────────────────────────────


class Standardized(nn.Conv2d):
    """Weight standardization as BiT's convolutions have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias)


MODULES: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "weight_norm": lambda: (parametrizations.weight_norm(nn.Linear(3, 4)), torch.randn(2, 5, 3)),
    "weight_norm of a kernel's taps": lambda: (
        parametrizations.weight_norm(nn.Conv1d(3, 4, 3), dim=2),
        torch.randn(2, 3, 8),
    ),
    "the old weight_norm": lambda: (_old(torch.nn.utils.weight_norm, nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 6, 6)),
    "the old weight_norm, one norm": lambda: (
        _old(torch.nn.utils.weight_norm, nn.Linear(3, 4), dim=None),
        torch.randn(2, 3),
    ),
    "spectral_norm": lambda: (parametrizations.spectral_norm(nn.Linear(3, 4)), torch.randn(2, 5, 3)),
    "the old spectral_norm": lambda: (
        _old(torch.nn.utils.spectral_norm, nn.ConvTranspose2d(3, 4, 3)),
        torch.randn(2, 3, 6, 6),
    ),
    "weight standardization": lambda: (Standardized(3, 4, 3), torch.randn(2, 3, 6, 6)),
}
QUICK = ("weight_norm", "the old spectral_norm", "weight standardization")


def _old(function: Callable[..., nn.Module], module: nn.Module, **options: Any) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(module, **options)


def captured(name: str) -> tuple[Program, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    module, x = MODULES[name]()
    whole = perturb(nn.Sequential(module))
    return rewrite.capture(whole, (x,)), whole, x


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MODULES]
)
def test_a_captured_parametrization_is_its_weight(name: str) -> None:
    before, module, x = captured(name)
    after = before.clone()
    canonicalize(after)
    outcomes = apply_pass(after, FoldParametrization())
    assert any(isinstance(outcome, Applied) for outcome in outcomes), outcomes
    kept = [kind for kind in operators(after) if kind != "Constant"]
    assert set(kept) <= {"MatMul", "Add", "Conv", "ConvTranspose"}, kept
    assert difference(before, after, feed(before)) <= 1.0
    assert prove(before.original, after.model).verdict.kind == "EQUAL"
    # The function is torch's own.
    module.double().eval()
    with torch.no_grad():
        wanted = module(x.double()).numpy()
    (found,) = evaluate(after.model, {after.inputs[0].name: x.numpy()}, unrounded=True).values()
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10 * np.abs(wanted).max())
