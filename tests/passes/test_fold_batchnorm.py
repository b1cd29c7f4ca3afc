"""fold-batchnorm: into every kind of kernel before and behind, what clusters it finds, real captures, and mutants."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diagonal_checks import check_family, proof_of, replace, stored
from families import perturb
from networks import difference, digest, feed, network, operators, values_agree

import rewrite
from rewrite.capture.canonicalize import canonicalize
from rewrite.ir.program import Program
from rewrite.ir.weights import Add, Constant, Scale
from rewrite.passes import FoldBatchnorm
from rewrite.rule import Applied, apply_pass

VECTORS = "float[6] g, float[6] b, float[6] mean, float[6] var"
SPREAD = {"var": [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]}
NORM = "BatchNormalization <epsilon = 0.01>"

UNPROVED = frozenset(
    {"an average that leaves its padding out", "two norms and arithmetic", "pads on one side", "flattened features"}
)
"""Right in float64, and not followed by the proof."""


def folded(text: str, *, proved: bool = True, **options: Any) -> tuple[Program, Program, list[Applied]]:
    """A network before and after: one function, proved so, related values, and nothing left for a second run."""
    before = network(text, **{**SPREAD, **options})
    after = before.clone()
    outcomes = apply_pass(after, FoldBatchnorm())
    applied = [outcome for outcome in outcomes if isinstance(outcome, Applied)]
    assert applied, [str(outcome) for outcome in outcomes]
    inputs = feed(before)
    assert difference(before, after, inputs) <= 1.0
    values_agree(before, after, inputs)
    once = digest(after)
    assert not any(isinstance(outcome, Applied) for outcome in apply_pass(after, FoldBatchnorm()))
    assert digest(after) == once
    if proved:
        assert proof_of(before, after).verdict.holds, proof_of(before, after).verdict
    return before, after, applied


def computing(program: Program) -> list[str]:
    """The operators, constants left out."""
    return [operator for operator in operators(program) if operator != "Constant"]


# -------------------------------------------------------------------------------------------------------------- before

KERNELS = {
    "Conv of one axis": ("float[B, 4, 8]", "float[6, 4, 3]", "Conv", "float[B, 6, 6]"),
    "Conv of two, padded": (
        *("float[B, 4, 5, 5]", "float[6, 4, 3, 3]", "Conv <pads = [1, 1, 1, 1]>", "float[B, 6, 5, 5]"),
    ),
    "Conv of three": ("float[B, 4, 4, 4, 4]", "float[6, 4, 2, 2, 2]", "Conv", "float[B, 6, 3, 3, 3]"),
    "Conv in groups": ("float[B, 4, 5, 5]", "float[6, 2, 3, 3]", "Conv <group = 2>", "float[B, 6, 3, 3]"),
    "Conv, depthwise": ("float[B, 6, 5, 5]", "float[6, 1, 3, 3]", "Conv <group = 6>", "float[B, 6, 3, 3]"),
    "Conv, two a channel": ("float[B, 3, 5, 5]", "float[6, 1, 3, 3]", "Conv <group = 3>", "float[B, 6, 3, 3]"),
    "ConvTranspose": ("float[B, 4, 5]", "float[4, 6, 3]", "ConvTranspose <strides = [2]>", "float[B, 6, 11]"),
    "ConvTranspose in groups": (
        *("float[B, 4, 5, 5]", "float[4, 3, 2, 2]", "ConvTranspose <group = 2>", "float[B, 6, 6, 6]"),
    ),
    "ConvTranspose, depthwise": (
        *("float[B, 6, 5, 5]", "float[6, 1, 2, 2]", "ConvTranspose <group = 6>", "float[B, 6, 6, 6]"),
    ),
    "MatMul": ("float[B, 4]", "float[4, 6]", "MatMul", "float[B, 6]"),
    "MatMul from the left": ("float[B, 4, S]", "float[6, 4]", "MatMul, left", "float[B, 6, S]"),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_into_the_kernel_before(name: str, biased: bool) -> None:
    given, kernel, operator, made = KERNELS[name]
    convolves = operator.startswith("Conv")
    operands = "k, x" if "left" in operator else "x, k, kb" if convolves and biased else "x, k"
    product = f"{operator.replace(', left', '')} ({operands})"
    shape = "float[6, 1] kb" if "left" in operator else "float[6] kb"
    added = "h = Add (c, kb)" if biased and not convolves else "h = Identity (c)"
    text = f"""before ({given} x, {kernel} k, {shape if biased else "float[6] kb"}, {VECTORS}) => ({made} y)
    {{ c = {product} {added} n = {NORM} (h, g, b, mean, var) y = Relu (n) }}"""
    before, after, (applied,) = folded(text)
    assert computing(after) == ([operator.split()[0]] if convolves else ["MatMul", "Add"]) + ["Relu"]
    assert applied.site == "n"
    assert bool(applied.notes) == (convolves and not biased)
    factor = stored(before, "g") / np.sqrt(stored(before, "var") + float(np.float32(0.01)))
    bias = (stored(before, "kb").reshape(-1) if biased else 0.0) * factor
    shift = stored(before, "b") - factor * stored(before, "mean") + bias
    vectors = [
        name for name, value in after.model.graph.initializers.items() if max(value.shape) == value.const_value.size
    ]
    assert any(np.allclose(stored(after, name).reshape(-1), shift, rtol=1e-12) for name in vectors)


LINEAR = "(float[2, 7, 4] x, float[4, 6] w, float[6] wb, {vectors}) => (float[2, {made}] y)"

LAYOUTS = {
    "transposed and back": (
        "7, 6",
        f"""t = Transpose <perm = [0, 2, 1]> (a) n = {NORM} (t, g, b, mean, var)
        r = Transpose <perm = [0, 2, 1]> (n) y = Relu (r)""",
        ["MatMul", "Add", "Relu"],
    ),
    "rows and back": (
        "7, 6",
        f"""rows = Constant <value_ints = [14, 6]> () back = Constant <value_ints = [2, 7, 6]> ()
        f = Reshape (a, rows) n = {NORM} (f, g, b, mean, var) r = Reshape (n, back) y = Relu (r)""",
        ["MatMul", "Add", "Relu"],
    ),
    "transposed and cut into an image": (
        "6, 7, 1",
        f"""t = Transpose <perm = [0, 2, 1]> (a) shape = Constant <value_ints = [2, 6, 7, 1]> () i = Reshape (t, shape)
        n = {NORM} (i, g, b, mean, var) y = Relu (n)""",
        ["MatMul", "Add", "Transpose", "Reshape", "Relu"],
    ),
    "its mean over positions": (
        "6",
        f"one = Constant <value_ints = [1]> () m = ReduceMean <keepdims = 0> (a, one) "
        f"n = {NORM} (m, g, b, mean, var) y = Relu (n)",
        ["MatMul", "Add", "ReduceMean", "Relu"],
    ),
    "an average that leaves its padding out": (
        "6, 7",
        f"""t = Transpose <perm = [0, 2, 1]> (a) m = AveragePool <kernel_shape = [3], pads = [1, 1]> (t)
        n = {NORM} (m, g, b, mean, var) y = Relu (n)""",
        ["MatMul", "Add", "Transpose", "AveragePool", "Relu"],
    ),
    "two norms and arithmetic": (
        "6, 7",
        f"""t = Transpose <perm = [0, 2, 1]> (a) n = {NORM} (t, g, b, mean, var) s = Neg (n) two = Constant
        <value_float = 2.0> () d = Div (s, two) m = {NORM} (d, b, g, var, mean2) e = Sub (two, m) y = Relu (e)""",
        ["MatMul", "Add", "Transpose", "Relu"],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_through_layout(name: str) -> None:
    made, inside, left = LAYOUTS[name]
    vectors = f"{VECTORS}, float[6] mean2"
    text = f"layout {LINEAR.format(vectors=vectors, made=made)} {{ c = MatMul (x, w) a = Add (c, wb) {inside} }}"
    _, after, (applied,) = folded(text, proved=name not in UNPROVED, mean2=[1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    assert computing(after) == left
    assert applied.site in ("r", "n", "e")


def test_a_norm_of_flattened_features_is_read_by_its_matrix() -> None:
    text = f"""flat (float[B, 2, 3, 1] x, float[2, 2, 1, 1] k, {VECTORS}, float[6, 3] w) => (float[B, 3] y)
    {{ c = Conv (x, k) r = Flatten (c) n = {NORM} (r, g, b, mean, var) y = MatMul (n, w) }}"""
    _, after, _ = folded(text, proved="flattened features" not in UNPROVED)
    assert computing(after) == ["Conv", "Flatten", "MatMul", "Add"]


PREPBN = f"""
prepbn (float[B, 7, 4] x, float[4, 6] w, float[6] wb, {VECTORS}, float[1] alpha, float[6, 3] v)
    => (float[B, 7, {{made}}] y)
{{{{
    c = MatMul (x, w)
    a = Add (c, wb)
    {{between}}
    t = Transpose <perm = [0, 2, 1]> (h)
    n = {NORM} (t, g, b, mean, var)
    m = Mul ({{operands}}, alpha)
    s = Add (m, n)
    r = Transpose <perm = [0, 2, 1]> (s)
    {{behind}}
}}}}
"""


@pytest.mark.parametrize("operands", ["t", "alpha, t"])
def test_prepbn_into_the_matrix_before_scales_its_bias_by_gamma_and_alpha(operands: str) -> None:
    text = PREPBN.format(between="h = Identity (a)", operands=operands, behind="y = Relu (r)", made=6)
    text = text.replace("alpha, t, alpha", "alpha, t")
    before, after, _ = folded(text)
    assert computing(after) == ["MatMul", "Add", "Relu"]
    sigma = np.sqrt(stored(before, "var") + float(np.float32(0.01)))
    factor = stored(before, "g") / sigma + stored(before, "alpha")
    shift = stored(before, "b") - stored(before, "g") * stored(before, "mean") / sigma
    assert np.allclose(stored(after, "r.biased.shift"), factor * stored(before, "wb") + shift, rtol=1e-12)
    assert np.allclose(stored(after, "w.normalized"), stored(before, "w") * factor, rtol=1e-12)


def test_prepbn_into_the_matrix_behind() -> None:
    text = PREPBN.format(between="h = Tanh (a)", operands="t", behind="y = MatMul (r, v)", made=3)
    _, after, _ = folded(text)
    assert computing(after) == ["MatMul", "Add", "Tanh", "MatMul", "Add"]


def test_the_identity_is_a_branch_of_factor_one() -> None:
    text = f"""identity (float[B, 4] x, float[4, 6] w, {VECTORS}, float[6, 3] v) => (float[B, 3] y)
    {{ c = MatMul (x, w) h = Tanh (c) n = {NORM} (h, g, b, mean, var) s = Sub (n, h) y = MatMul (s, v) }}"""
    before, after, _ = folded(text)
    assert computing(after) == ["MatMul", "Tanh", "MatMul", "Add"]
    factor = stored(before, "g") / np.sqrt(stored(before, "var") + float(np.float32(0.01))) - 1.0
    assert np.allclose(stored(after, "v.scaled"), stored(before, "v") * factor[:, None], rtol=1e-12)


# -------------------------------------------------------------------------------------------------------------- behind

READERS = {
    "Conv of one axis": ("6, 8", "float[4, 6, 3]", "Conv", "4, 6"),
    "Conv of two, with a bias": ("6, 5, 5", "float[4, 6, 2, 2]", "Conv, biased", "4, 4, 4"),
    "Conv of three, strided and dilated": (
        *("6, 5, 5, 5", "float[4, 6, 2, 2, 2]", "Conv <strides = [2, 1, 1], dilations = [1, 2, 1]>", "4, 2, 3, 4"),
    ),
    "Conv in groups": ("6, 5, 5", "float[4, 3, 3, 3]", "Conv <group = 2>", "4, 3, 3"),
    "Conv, depthwise": ("6, 5, 5", "float[6, 1, 3, 3]", "Conv <group = 6>", "6, 3, 3"),
    "Conv, two a channel, with a bias": ("6, 5, 5", "float[12, 1, 3, 3]", "Conv <group = 6>, biased", "12, 3, 3"),
    "Conv 1×1 that pads nothing": ("6, 5, 5", "float[4, 6, 1, 1]", 'Conv <auto_pad = "SAME_UPPER">', "4, 5, 5"),
}


@pytest.mark.parametrize("name", READERS)
def test_into_the_kernel_behind(name: str) -> None:
    given, kernel, operator, made = READERS[name]
    operator, comma, _ = operator.partition(", biased")
    count = made.split(",")[0]
    text = f"""behind (float[B, {given}] x, {kernel} k, float[{count}] kb, {VECTORS}) => (float[B, {made}] y)
    {{ h = Tanh (x) n = {NORM} (h, g, b, mean, var) y = {operator} (n, k{", kb" if comma else ""}) }}"""
    _, after, (applied,) = folded(text)
    assert computing(after) == ["Tanh", "Conv"]
    assert bool(applied.notes) == (not comma)


PADDED = {
    "pads": ("Conv <pads = [1, 1]>", "float[4, 6, 3]", 8),
    "pads on one side": ("Conv <pads = [0, 1]>", "float[4, 6, 3]", 7),
    "groups": ("Conv <pads = [1, 1], group = 2>", "float[4, 3, 3]", 8),
    "ConvTranspose": ("ConvTranspose", "float[6, 4, 3]", 10),
    "ConvTranspose in groups": ("ConvTranspose <group = 2>", "float[6, 2, 3]", 10),
}


@pytest.mark.parametrize("name", PADDED)
def test_the_diagonal_goes_in_where_the_shift_meets_zeros(name: str) -> None:
    operator, kernel, size = PADDED[name]
    text = f"""padded (float[B, 6, 8] x, {kernel} k, float[4] kb, {VECTORS}) => (float[B, 4, {size}] y)
    {{ h = Tanh (x) n = {NORM} (h, g, b, mean, var) y = {operator} (n, k, kb) }}"""
    before, after, (applied,) = folded(text, proved=name not in UNPROVED)
    assert computing(after) == ["Tanh", "Add", operator.split()[0]]
    assert "the shift stays as an addition" in str(applied)
    factor = stored(before, "g") / np.sqrt(stored(before, "var") + float(np.float32(0.01)))
    shift = stored(before, "b") - factor * stored(before, "mean")
    assert np.allclose(stored(after, "n.shifted.shift").reshape(-1), shift / factor, rtol=1e-12)


def test_queries_keys_and_values_take_it_together() -> None:
    text = f"""attention (float[B, 7, 6] x, {VECTORS}, float[6, 4] q, float[4] qb, float[6, 4] k, float[6, 5] v)
        => (float[B, 7, 4] qs, float[B, 7, 4] ks, float[B, 7, 5] vs, float[B, 7, 6] stream)
    {{
        h = Tanh (x) t = Transpose <perm = [0, 2, 1]> (h) n = {NORM} (t, g, b, mean, var)
        r = Transpose <perm = [0, 2, 1]> (n) q0 = MatMul (r, q) qs = Add (qb, q0) ks = MatMul (r, k) vs = MatMul (r, v)
        stream = Relu (h)
    }}"""
    _, after, (applied,) = folded(text)
    assert "BatchNormalization" not in operators(after)
    assert "Transpose" not in operators(after)
    assert set(applied.changed.values()) == {"q", "k", "v", "qb"}


def test_one_matrix_that_two_products_share_stays_one() -> None:
    text = f"""shared (float[B, 6] x, {VECTORS}, float[6, 4] w, float[4] c) => (float[B, 4] y, float[B, 4] z)
    {{ h = Tanh (x) n = {NORM} (h, g, b, mean, var) y = MatMul (n, w) m = MatMul (n, w) z = Add (m, c) }}"""
    _, after, (applied,) = folded(text)
    assert [name for name in after.model.graph.initializers if name.startswith("w")] == ["w.scaled"]
    assert applied.untied_bytes == 0


def test_through_pooling_padding_and_flattening_behind() -> None:
    text = f"""heads (float[B, 6, 4, 4] x, {VECTORS}, float[4, 6, 2, 2] k, float[6, 3] w, float[2, 6, 3, 3] e)
        => (float[B, 4, 3, 3] y, float[B, 3] z, float[B, 2, 4, 4] u)
    {{
        h = Tanh (x) n = {NORM} (h, g, b, mean, var)
        a = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (n) y = Conv (a, k)
        p = GlobalAveragePool (n) f = Flatten (p) z = MatMul (f, w)
        ends = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> () r = Pad <mode = "edge"> (n, ends) u = Conv (r, e)
    }}"""
    _, after, _ = folded(text, proved=False)  # the proof pads with zeros only
    assert "BatchNormalization" not in operators(after)
    assert "Add" in operators(after)


def test_a_shift_that_needs_a_bias_as_long_as_a_vocabulary_stays() -> None:
    text = f"""head (float[B, 6] x, {VECTORS}, float[6, 50] w) => (float[B, 50] y)
    {{ h = Tanh (x) n = {NORM} (h, g, b, mean, var) y = MatMul (n, w) }}"""
    _, after, (applied,) = folded(text)
    assert computing(after) == ["Tanh", "Add", "MatMul"]
    assert "new biases of 50 numbers, 8 × 6 allowed" in str(applied)


UNIFIED = """
unified (float[B, S, 6] x, float[6] g, float[6] v, float[6] b, float e, float[6, 4] w) => (float[B, S, 4] y)
{ h = Tanh (x) f = Add (v, e) s = Sqrt (f) d = Div (h, s) m = Mul (g, d) n = Add (m, b) y = MatMul (n, w) }
"""
POWER = """
power (float[B, S, 6] x, float[6] g, float[1, 1, 6] v, float[6] b, float[6, 4] w) => (float[B, S, 4] y)
{ h = Tanh (x) f = Sqrt (v) r = Reciprocal (f) d = Mul (h, r) m = Mul (d, g) n = Add (b, m) y = MatMul (n, w) }
"""
STANDARDIZED = """
standardized (float[B, 3, 5, 5] x, float[3, 1, 1] m, float[1, 3, 1, 1] s, float[4, 3, 2, 2] k) => (float[B, 4, 4, 4] y)
{ a = Sub (x, m) n = Div (a, s) y = Conv (n, k) }
"""


GREY = """
grey (float[B, 1, 5, 5] x, float[1] m, float s, float[4, 1, 2, 2] k, float[4] kb) => (float[B, 4, 4, 4] y)
{ a = Sub (x, m) n = Div (a, s) y = Conv (n, k, kb) }
"""
COLOURED = """
coloured (float[B, 3, 5] x, float[1] m, float[1] s, float[5, 4] w) => (float[B, 3, 4] y)
{ a = Mul (s, x) n = Sub (a, m) y = MatMul (n, w) }
"""


@pytest.mark.parametrize("text", [UNIFIED, POWER, STANDARDIZED, GREY, COLOURED])
def test_norms_written_out_go_into_what_reads_them(text: str) -> None:
    positive = {"v": [0.5, 1.0, 1.5, 2.0, 2.5, 3.0], "e": 0.01}
    if "float[1, 3, 1, 1] s" in text:
        positive["s"] = [0.5, 1.0, 2.0]
    _, after, (applied,) = folded(text, **positive)
    assert applied.site == "n"
    assert not {"Div", "Mul", "Sub", "Sqrt"} & set(operators(after))


def test_what_stood_in_the_way_of_another_is_tried_again() -> None:
    text = f"""pair (float[B, 6, 4] x, {VECTORS}, float[5, 6, 1] k, float[3, 6, 1] l)
        => (float[B, 5, 4] y, float[B, 3, 4] z)
    {{
        h = Tanh (x) n = {NORM} (h, g, b, mean, var) y = Conv (n, k) m = {NORM} (n, b, g, mean, var) z = Conv (m, l)
    }}"""
    _, after, applied = folded(text)
    assert "BatchNormalization" not in operators(after)
    assert [one.site for one in applied] == ["m", "n"]


def test_a_cluster_ends_where_something_else_reads_it() -> None:
    text = f"""exposed (float[B, 4] x, float[4, 6] w, float[6] s, {VECTORS}, float[6, 3] v)
        => (float[B, 3] y, float[B, 6] z)
    {{ c = MatMul (x, w) m = Mul (c, s) z = Relu (m) n = {NORM} (m, g, b, mean, var) y = MatMul (n, v) }}"""
    _, after, applied = folded(text)
    assert [one.site for one in applied] == ["m", "n"]
    assert computing(after) == ["MatMul", "Relu", "MatMul", "Add"]


# ------------------------------------------------------------------------------------------------------------- mutants

TRAINED = f"""
trained (float[B, 4] x, float[4, 6] w, float[6] wb, {VECTORS}, float[1] alpha, float[6, 3] v, float[3] vb)
    => (float[B, 3] y)
{{
    c = MatMul (x, w) a = Add (c, wb) n = {NORM} (a, g, b, mean, var) m = Mul (a, alpha) s = Add (n, m) r = Relu (s)
    k = {NORM} (r, b, g, mean, var) p = MatMul (k, v) y = Add (p, vb)
}}
"""

MUTANTS: dict[str, Callable[[Program, Program], None]] = {
    "the shift without its own bias times the factor": lambda before, after: replace(
        after, "s.biased.shift", lambda _: Constant(stored(before, "b"))
    ),
    "α left out of the bias": lambda before, after: replace(
        after,
        "s.biased.shift",
        lambda t: Add((t, Constant(-stored(before, "alpha") * stored(before, "wb")))),
    ),
    "the variance without ε": lambda before, after: replace(
        after, "w.normalized", lambda w: Scale(w, Constant(np.sqrt(1 + 0.01 / stored(before, "var"))), 1)
    ),
    "the matrix scaled on its other side": lambda before, after: replace(
        after, "v.scaled", lambda _: Scale(Constant(stored(before, "v")), Constant(stored(before, "g")[:3]), 1)
    ),
    "the matrix as it was": lambda before, after: replace(after, "v.scaled", lambda _: Constant(stored(before, "v"))),
    "the shift through the scaled matrix": lambda before, after: replace(
        after,
        "vb.shifted",
        lambda _: Constant(stored(before, "vb") + stored(before, "b") @ stored(after, "v.scaled")),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_computes_another_function(mutant: str) -> None:
    before, after, applied = folded(TRAINED)
    assert len(applied) == 2
    MUTANTS[mutant](before, after)
    assert difference(before, after, feed(before)) > 1e4
    assert not proof_of(before, after).verdict.holds


# ------------------------------------------------------------------------------------------------------ real captures


def of_module(module: torch.nn.Module, *inputs: torch.Tensor) -> Program:
    """A module with non-trivial statistics, captured and in canonical form."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = rewrite.capture(perturb(module.eval()), inputs)
    canonicalize(program)
    return program


class RepBN(torch.nn.Module):
    """BN(x) + αx along the channels of tokens (SLAB)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.ones(1))
        self.bn = torch.nn.BatchNorm1d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        return (self.bn(x) + self.alpha * x).transpose(1, 2)


class UnifiedNorm(torch.nn.Module):
    """γ·x/√(v + ε) + β with the running quadratic mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.ones(channels)) for _ in range(2))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / torch.sqrt(self.running_var + 1e-5) + self.bias


class Transformer(torch.nn.Module):
    """A block of attention and one of an MLP, each behind a norm of tokens."""

    def __init__(self, first: type[torch.nn.Module], second: type[torch.nn.Module]) -> None:
        super().__init__()
        self.first, self.second = first(8), second(8)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8, bias=index % 2 == 0) for index in range(4))
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        x = x + self.o(torch.softmax(self.q(h) @ self.k(h).transpose(1, 2), -1) @ self.v(h))
        return x + self.down(torch.nn.functional.gelu(self.up(self.second(x))))


class Decoder(torch.nn.Module):
    """One axis: a front end of a kernel, its norm in front of a padded kernel, and a transposed kernel with one."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.norm = torch.nn.Conv1d(2, 4, 5, stride=2, bias=False), torch.nn.BatchNorm1d(4)
        self.middle = torch.nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.before = torch.nn.BatchNorm1d(4)
        self.up, self.last = torch.nn.ConvTranspose1d(4, 3, 4, stride=2, bias=False), torch.nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.front(x)))
        h = torch.tanh(self.middle(self.before(h)))
        return torch.sigmoid(self.last(self.up(h)))


def keeps_no_norm(first: type[torch.nn.Module], second: type[torch.nn.Module]) -> tuple[Program, Program]:
    """A transformer with these norms, before and after."""
    program = of_module(Transformer(first, second), torch.randn(2, 5, 8))
    after = check_family(program, lambda _: FoldBatchnorm(), 2, set())
    assert computing(after).count("MatMul") == 8
    assert set(computing(after)) == {"MatMul", "Add", "Transpose", "Softmax", "Gelu"}
    return program, after


def test_a_transformer_keeps_no_norm() -> None:
    program, after = keeps_no_norm(RepBN, UnifiedNorm)
    assert proof_of(program, after).verdict.holds


@pytest.mark.slow
def test_a_transformer_keeps_no_norm_of_the_other_order() -> None:
    keeps_no_norm(UnifiedNorm, RepBN)


def test_a_decoder_of_one_axis_keeps_one_addition() -> None:
    program = of_module(Decoder(), torch.randn(2, 2, 21))
    after = check_family(program, lambda _: FoldBatchnorm(), 3, set())
    assert computing(after) == ["Conv", "Relu", "Add", "Conv", "Tanh", "ConvTranspose", "Sigmoid"]
    assert proof_of(program, after).verdict.holds
