# ruff: noqa: E501 - a model a line
"""Every rule has an identity that it must prove and a wrong one that it must not; both are evaluated in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from pairs import ROUNDING, Weights, accepted, model, refused

from rewrite.proof import prove
from rewrite.proof.rules import RULES

FLOAT32 = 2.0**-18
"""What constants of a definition, rounded to float32, may change in a result."""


@dataclass(frozen=True)
class Case:
    """`original` holds the operator; `right` computes the same over `inputs`, `wrong` nearly the same."""

    inputs: str
    original: str
    right: str
    wrong: str
    weights: Weights = field(default_factory=dict)
    tolerance: float = ROUNDING


def numbers(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1.0, shape).astype(np.float32)


def single(value: float) -> np.ndarray:
    return np.float32(value)


W, W2, V, U = numbers(4, 4), numbers(4, 4, seed=4), numbers(4, seed=5), numbers(4, seed=6)
ERF = {"half": single(0.5), "one": single(1), "root": single(2**-0.5)}
TANH = {**ERF, "three": single(3), "c": single(0.044715), "k": single((2 / np.pi) ** 0.5)}
ERF_GELU = "a = Mul({x}, root) e = Erf(a) s = Add(e, one) h = Mul({x}, half) y = Mul(h, s)"
TANH_GELU = (
    "p = Pow({x}, three) q = Mul(p, c) r = Add({x}, q) a = Mul(r, k) e = Tanh(a) s = Add(e, one) h = Mul({x}, half)"
    " y = Mul(h, s)"
)
ATTEND = "t = Transpose<perm=[0,1,3,2]>({k}) s0 = MatMul({q}, t) s = Mul(s0, scale) p = Softmax(s) o = MatMul(p, {v})"
HEADS = "{0}r = Reshape({0}, {1}) {0}h = Transpose<perm=[0,2,1,3]>({0}r) "
JOIN = " ot = Transpose<perm=[0,2,1,3]>(o) y = Reshape(ot, flat)"
CENTRED_NORM = (
    "m = ReduceMean({x}, last) d = Sub({x}, m) q = Mul(d, d) v = ReduceMean(q, last) e = Add(v, eps) r = Sqrt(e)"
    " n = Div(d, r) g = Mul(n, gamma)"
)
RMS = "q = Mul({x}, {x}) v = ReduceMean({axes}) e = Add(v, eps) r = Sqrt(e) i = Reciprocal(r) n = Mul({x}, i) y = Mul(n, gamma)"
NORM = {"last": np.array([-1]), "eps": single(1e-5), "gamma": V, "beta": U}
LARGE_EPS = {**NORM, "eps": single(0.5)}
ROTARY = {"one": np.array([1])}
TURNED = (
    "cc = Concat<axis=2>(c, c) ss = Concat<axis=2>(s, s) c4 = Unsqueeze(cc, one) s4 = Unsqueeze(ss, one)"
    " a, b = Split<axis=3, num_outputs=2>(x) n = Neg({0}) t = Concat<axis=3>({1}) p = Mul(x, c4) q = Mul(t, s4) y = Add(p, q)"
)

CASES: dict[tuple[str, str], Case] = {
    ("", "Add"): Case(
        "float[B,4] x, float[B,4] u", "a = MatMul(x, w) b = MatMul(u, w) y = Add(a, b)", "s = Add(u, x) y = MatMul(s, w)",
        "s = Sub(x, u) y = MatMul(s, w)", {"w": W},
    ),
    ("", "Sub"): Case(
        "float[B,4] x, float[B,4] u", "y = Sub(x, u)", "n = Neg(u) y = Add(n, x)", "y = Sub(u, x)"
    ),
    ("", "Sum"): Case(
        "float[B,4] x, float[B,4] u", "y = Sum(x, u, x)", "d = Add(x, x) y = Add(u, d)", "y = Sum(x, u, u)"
    ),
    ("", "Neg"): Case("float[B,4] x", "y = Neg(x)", "y = Mul(x, m)", "y = Mul(x, k)", {"m": single(-1), "k": single(-2)}),
    ("", "Mul"): Case(
        "float[B,4] x, float[B,4] u", "a = Mul(x, v) b = Mul(a, two) y = Mul(b, u)", "a = Mul(x, w) y = Mul(u, a)",
        "a = Mul(x, v) y = Mul(u, a)", {"v": V, "two": single(2), "w": 2 * V},
    ),
    ("", "Div"): Case(
        "float[B,4] x, float[B,4] u", "a = Div(x, two) y = Div(a, u)", "a = Mul(x, half) r = Reciprocal(u) y = Mul(a, r)",
        "a = Mul(u, half) y = Div(a, x)", {"two": single(2), "half": single(0.5)},
    ),
    ("", "Pow"): Case("float[B,4] x", "y = Pow(x, two)", "y = Mul(x, x)", "y = Pow(x, three)", {"two": single(2), "three": single(3)}),
    ("", "Sqrt"): Case(
        "float[B,4] x", "e = Exp(x) y = Sqrt(e)", "e = Exp(x) y = Pow(e, half)", "e = Exp(x) y = Pow(e, third)",
        {"half": single(0.5), "third": single(1 / 3)},
    ),
    ("", "Reciprocal"): Case(
        "float[B,4] x", "s = Exp(x) r = Sqrt(s) y = Reciprocal(r)", "s = Exp(x) y = Pow(s, p)", "s = Exp(x) y = Reciprocal(s)",
        {"p": single(-0.5)},
    ),
    ("", "LayerNormalization"): Case(
        "float[B,4] x", "y = LayerNormalization<epsilon=0.5>(x, gamma, beta)",
        CENTRED_NORM.format(x="x") + " y = Add(g, beta)", CENTRED_NORM.format(x="x") + " y = Sub(g, beta)", LARGE_EPS,
    ),
    ("", "RMSNormalization"): Case(
        "float[B,4] x", "y = RMSNormalization<epsilon=0.5>(x, gamma)", RMS.format(x="x", axes="q, last"),
        RMS.format(x="x", axes="q, first"), {**LARGE_EPS, "first": np.array([0])},
    ),
    ("", "SimplifiedLayerNormalization"): Case(
        "float[B,4] x", "y = SimplifiedLayerNormalization<epsilon=0.5>(x, gamma)", "y = RMSNormalization<epsilon=0.5>(x, gamma)",
        "y = LayerNormalization<epsilon=0.5>(x, gamma)", NORM,
    ),
    ("com.microsoft", "SimplifiedLayerNormalization"): Case(
        "float[B,4] x", "y = com.microsoft.SimplifiedLayerNormalization<epsilon=0.5>(x, gamma)",
        "y = RMSNormalization<epsilon=0.5>(x, gamma)", "y = RMSNormalization<epsilon=0.25>(x, gamma)", NORM,
    ),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): Case(
        "float[B,4,4] x, float[B,4,4] u", "y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.5>(x, u, gamma, beta)",
        "a = Add(x, u) b = Add(a, beta) y = RMSNormalization<epsilon=0.5>(b, gamma)",
        "a = Add(x, u) b = RMSNormalization<epsilon=0.5>(a, gamma) y = Add(b, beta)", NORM,
    ),
    ("com.microsoft", "SkipLayerNormalization"): Case(
        "float[B,4,4] x, float[B,4,4] u", "y = com.microsoft.SkipLayerNormalization<epsilon=0.5>(x, u, gamma, beta)",
        "a = Add(x, u) y = LayerNormalization<epsilon=0.5>(a, gamma, beta)",
        "y = LayerNormalization<epsilon=0.5>(x, gamma, beta)", NORM,
    ),
    ("", "BatchNormalization"): Case(
        "float[B,4,3] x", "y = BatchNormalization<epsilon=0.5>(x, g, b, m, v)", "a = Mul(x, f) y = Add(a, h)",
        "a = Add(x, h) y = Mul(a, f)",
        {
            "g": V, "b": U, "m": W[0], "v": np.float32([0.5, 3.5, 1.75, 8.5]),
            "f": (V / np.sqrt(np.array([1.0, 4.0, 2.25, 9.0])))[:, None].astype(np.float32),
            "h": (U - W[0].astype(np.float64) * V / np.sqrt(np.array([1.0, 4.0, 2.25, 9.0])))[:, None].astype(np.float32),
        },
        FLOAT32,
    ),
    ("", "MatMul"): Case(
        "float[B,4] x", "a = MatMul(x, w) y = MatMul(a, v)", "y = MatMul(x, p)", "y = MatMul(x, q)",
        {"w": W, "v": W2, "p": (W.astype(np.float64) @ W2).astype(np.float32), "q": (W2.astype(np.float64) @ W).astype(np.float32)},
        FLOAT32,
    ),
    ("", "Gemm"): Case(
        "float[B,4] x", "y = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, v)",
        "t = Transpose<perm=[1,0]>(w) a = MatMul(x, t) b = Mul(a, half) y = Add(b, c)",
        "a = MatMul(x, w) b = Mul(a, half) y = Add(b, c)", {"w": W, "v": V, "half": single(0.5), "c": 2 * V},
    ),
    ("com.microsoft", "FusedMatMul"): Case(
        "float[2,B,4] x, float[2,B,4] u", "y = com.microsoft.FusedMatMul<alpha=0.5, transB=1>(x, u)",
        "h = Mul(x, half) t = Transpose<perm=[0,2,1]>(u) y = MatMul(h, t)", "t = Transpose<perm=[0,2,1]>(u) y = MatMul(x, t)",
        {"half": single(0.5)},
    ),
    ("com.microsoft", "FusedGemm"): Case(
        "float[B,4] x", "y = com.microsoft.FusedGemm<alpha=0.5, transB=1, activation=\"Tanh\">(x, w, v)",
        "g = Gemm<alpha=0.5, transB=1>(x, w, v) y = Tanh(g)", "g = Gemm<alpha=0.5, transB=1>(x, w, v) y = Sigmoid(g)",
        {"w": W, "v": V},
    ),
    ("com.microsoft", "FusedConv"): Case(
        "float[B,2,4,4] x, float[B,3,5,5] z",
        "y = com.microsoft.FusedConv<pads=[1,1,1,1], activation=\"LeakyRelu\", activation_params=[0.25]>(x, k, b, z)",
        "c = Conv<pads=[1,1,1,1]>(x, k, b) a = Add(z, c) y = LeakyRelu<alpha=0.25>(a)",
        "c = Conv<pads=[1,1,1,1]>(x, k, b) a = LeakyRelu<alpha=0.25>(c) y = Add(z, a)",
        {"k": numbers(3, 2, 2, 2), "b": V[:3]},
    ),
    ("", "Conv"): Case(
        "float[B,2,4,4] x", "a = Conv<pads=[1,1,1,1]>(x, k, b) y = Mul(a, s)", "y = Conv<pads=[1,1,1,1]>(x, k2, b2)",
        "y = Conv<pads=[1,1,1,1]>(x, k2, b)",
        {
            "k": numbers(3, 2, 2, 2), "b": V[:3], "s": np.float32([2, 0.5, 4]).reshape(3, 1, 1), "b2": V[:3] * np.float32([2, 0.5, 4]),
            "k2": numbers(3, 2, 2, 2) * np.float32([2, 0.5, 4]).reshape(3, 1, 1, 1),
        },
    ),
    ("", "ConvTranspose"): Case(
        "float[B,2,4,4] x", "a = ConvTranspose<strides=[2,2]>(x, k, b) y = Mul(a, s)", "y = ConvTranspose<strides=[2,2]>(x, k2, b2)",
        "y = ConvTranspose<strides=[2,2]>(x, k2, b)",
        {
            "k": numbers(2, 3, 2, 2), "b": V[:3], "s": np.float32([2, 0.5, 4]).reshape(3, 1, 1), "b2": V[:3] * np.float32([2, 0.5, 4]),
            "k2": numbers(2, 3, 2, 2) * np.float32([2, 0.5, 4]).reshape(1, 3, 1, 1),
        },
    ),
    ("", "AveragePool"): Case(
        "float[B,2,4,4] x", "y = AveragePool<kernel_shape=[2,2]>(x)", "y = Conv<group=2>(x, k)", "y = Conv<group=2, pads=[0,0,0,0]>(x, k3)",
        {"k": np.full((2, 1, 2, 2), 0.25, np.float32), "k3": np.full((2, 1, 2, 2), 0.5, np.float32)},
    ),
    ("", "GlobalAveragePool"): Case(
        "float[B,2,4,4] x", "y = GlobalAveragePool(x)", "y = ReduceMean(x, a)", "y = ReduceMean(x, c)",
        {"a": np.array([2, 3]), "c": np.array([1, 3])},
    ),
    ("", "Gather"): Case(
        "int64[B] i", "e = Gather(t, i) y = MatMul(e, w)", "y = Gather(p, i)", "y = Gather(t, i)",
        {"t": numbers(12, 4), "w": W, "p": (numbers(12, 4).astype(np.float64) @ W).astype(np.float32)}, FLOAT32,
    ),
    ("", "GatherND"): Case(
        "float[16,16,4] x, int64[B,2] i", "a = MatMul(x, w) y = GatherND(a, i)", "a = GatherND(x, i) y = MatMul(a, w)",
        "f = Transpose<perm=[1,0,2]>(x) a = GatherND(f, i) y = MatMul(a, w)", {"w": W},
    ),
    ("", "ReduceMean"): Case(
        "float[B,5,4] x", "a = MatMul(x, w) y = ReduceMean<keepdims=0>(a, one)", "a = ReduceMean<keepdims=0>(x, one) y = MatMul(a, w)",
        "a = ReduceSum<keepdims=0>(x, one) y = MatMul(a, w)", {"w": W, "one": np.array([1])},
    ),
    ("", "ReduceSum"): Case(
        "float[B,5,4] x", "y = ReduceSum(x, last)", "m = ReduceMean(x, last) y = Mul(m, four)", "m = ReduceMean(x, last) y = Mul(m, five)",
        {"last": np.array([-1]), "four": single(4), "five": single(5)},
    ),
    ("", "Gelu"): Case("float[B,4] x", "y = Gelu(x)", ERF_GELU.format(x="x"), TANH_GELU.format(x="x"), TANH, FLOAT32),
    ("com.microsoft", "Gelu"): Case(
        "float[B,4] x", "y = com.microsoft.Gelu(x)", ERF_GELU.format(x="x"), "y = com.microsoft.QuickGelu(x)", ERF, FLOAT32
    ),
    ("com.microsoft", "BiasGelu"): Case(
        "float[B,4] x", "y = com.microsoft.BiasGelu(x, v)", "b = Add(x, v) " + ERF_GELU.format(x="b"),
        "b = Sub(x, v) " + ERF_GELU.format(x="b"), {**ERF, "v": V}, FLOAT32,
    ),
    ("com.microsoft", "FastGelu"): Case(
        "float[B,4] x", "y = com.microsoft.FastGelu(x, v)", "b = Add(x, v) y = Gelu<approximate=\"tanh\">(b)",
        "b = Add(x, v) " + ERF_GELU.format(x="b"), {**TANH, "v": V},
    ),
    ("com.microsoft", "QuickGelu"): Case(
        "float[B,4] x", "y = com.microsoft.QuickGelu<alpha=1.5>(x)", "a = Mul(x, c) s = Sigmoid(a) y = Mul(x, s)",
        "a = Mul(x, c) s = Sigmoid(a) y = Mul(a, s)", {"c": single(1.5)},
    ),
    ("", "Swish"): Case("float[B,4] x", "y = Swish(x)", "s = Sigmoid(x) y = Mul(s, x)", "s = Sigmoid(x) y = Mul(s, s)"),
    ("", "Softmax"): Case(
        "float[2,3,4] x", "y = Softmax<axis=1>(x)", "t = Transpose<perm=[0,1,2]>(x) y = Softmax<axis=-2>(t)", "y = Softmax(x)"
    ),
    ("", "Attention"): Case(
        "float[B,4,3,4] q, float[B,2,5,4] k, float[B,2,5,4] v", "y = Attention(q, k, v)",
        "ku = Unsqueeze(k, two) ke = Expand(ku, n) kk = Reshape(ke, m) vu = Unsqueeze(v, two) ve = Expand(vu, n) vv = Reshape(ve, m) "
        + ATTEND.format(q="q", k="kk", v="vv") + " y = Identity(o)",
        "ku = Unsqueeze(k, one) ke = Expand(ku, n2) kk = Reshape(ke, m) vu = Unsqueeze(v, one) ve = Expand(vu, n2) vv = Reshape(ve, m) "
        + ATTEND.format(q="q", k="kk", v="vv") + " y = Identity(o)",
        {
            "two": np.array([2]), "one": np.array([1]), "n": np.array([1, 1, 2, 1, 1]), "n2": np.array([1, 2, 1, 1, 1]),
            "m": np.array([0, 4, 5, 4]), "scale": single(0.5),
        },
    ),
    ("com.microsoft", "MultiHeadAttention"): Case(
        "float[B,3,8] q, float[B,5,8] k, float[B,5,8] v", "y = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v)",
        "".join(HEADS.format(name, "split") for name in "qkv") + ATTEND.format(q="qh", k="kh", v="vh") + JOIN,
        "".join(HEADS.format(name, "split") for name in "qkv") + ATTEND.format(q="qh", k="vh", v="kh") + JOIN,
        {"split": np.array([0, 0, 2, 4]), "flat": np.array([0, 0, 8]), "scale": single(0.5)},
    ),
    ("", "RotaryEmbedding"): Case(
        "float[2,3,4,8] x, float[2,4,4] c, float[2,4,4] s", "y = RotaryEmbedding(x, c, s)", TURNED.format("b", "n, a"), TURNED.format("a", "b, n"), ROTARY
    ),
    ("com.microsoft", "RotaryEmbedding"): Case(
        "float[2,3,4,8] x, int64[2,4] i", "y = com.microsoft.RotaryEmbedding(x, i, cs, sn)",
        "c = Gather(cs, i) s = Gather(sn, i) " + TURNED.format("b", "n, a"),
        "c = Gather(sn, i) s = Gather(cs, i) " + TURNED.format("b", "n, a"), {**ROTARY, "cs": numbers(16, 4), "sn": numbers(16, 4, seed=8)},
    ),
    ("", "Cos"): Case(
        "float[B,4] x", "j = Concat<axis=1>(x, x) y = Cos(j)", "c = Cos(x) y = Concat<axis=1>(c, c)",
        "c = Cos(x) y = Concat<axis=1>(c, x)",
    ),
    ("", "Sin"): Case(
        "float[B,4] x", "j = Concat<axis=1>(x, x) y = Sin(j)", "c = Sin(x) y = Concat<axis=1>(c, c)",
        "c = Sin(x) d = Cos(x) y = Concat<axis=1>(c, d)",
    ),
    ("", "Identity"): Case("float[B,4] x", "y = Identity(x)", "t = Transpose<perm=[1,0]>(x) y = Transpose<perm=[1,0]>(t)", "y = Neg(x)"),
    ("", "Dropout"): Case(
        "float[B,4] x", "y = Dropout(x, half, no)", "y = Identity(x)", "y = Mul(x, half)",
        {"half": single(0.5), "no": np.array(False)},
    ),
    ("", "Cast"): Case(
        "float[B,4] x", "d = Cast<to=11>(x) e = Exp(d) y = Cast<to=1>(e)", "y = Exp(x)", "i = Cast<to=7>(x) f = Cast<to=1>(i) y = Exp(f)"
    ),
    ("", "CastLike"): Case(
        "float[B,4] x, double[1] z", "d = CastLike(x, z) y = Cast<to=1>(d)", "y = Identity(x)", "i = CastLike(x, one) y = Cast<to=1>(i)",
        {"one": np.int64(1)},
    ),
    ("", "Shape"): Case(
        "float[B,S,4] x", "n = Shape<start=1>(x) y = Concat<axis=0>(n, n)", "n = Shape(x) m = Gather(n, i) y = Concat<axis=0>(m, m)",
        "n = Shape(x) m = Gather(n, j) y = Concat<axis=0>(m, m)", {"i": np.array([1, 2]), "j": np.array([0, 2])},
    ),
    ("", "Size"): Case(
        "float[B,S] x", "y = Size(x)", "n = Shape(x) y = ReduceProd<keepdims=0>(n)", "n = Shape<start=1>(x) y = ReduceProd<keepdims=0>(n)"
    ),
    ("", "ReduceProd"): Case(
        "float[B,S,2] x", "n = Shape(x) y = ReduceProd(n)", "s = Size(x) y = Unsqueeze(s, zero)", "n = Shape<end=2>(x) y = ReduceProd(n)",
        {"zero": np.array([0])},
    ),
    ("", "Transpose"): Case(
        "float[B,S,4] x", "y = Transpose<perm=[2,0,1]>(x)", "a = Transpose<perm=[0,2,1]>(x) y = Transpose<perm=[1,0,2]>(a)",
        "y = Transpose<perm=[2,1,0]>(x)",
    ),
    ("", "Reshape"): Case(
        "float[B,S,4] x", "n = Shape(x) a = Reshape(x, rows) b = MatMul(a, w) y = Reshape(b, n)", "y = MatMul(x, w)",
        "n = Shape(x) m = Gather(n, swap) a = Reshape(x, m) b = MatMul(a, w) y = Transpose<perm=[1,0,2]>(b)",
        {"rows": np.array([-1, 4]), "w": W, "swap": np.array([1, 0, 2])},
    ),
    ("", "Flatten"): Case(
        "float[2,3,4] x", "y = Flatten<axis=2>(x)", "y = Reshape(x, n)",
        "t = Transpose<perm=[1,0,2]>(x) y = Reshape(t, n)", {"n": np.array([6, 4])},
    ),
    ("", "Squeeze"): Case(
        "float[B,1,4] x", "y = Squeeze(x, one)", "y = Reshape(x, n)", "y = Transpose<perm=[1,0,2]>(x)",
        {"one": np.array([-2]), "n": np.array([-1, 4])},
    ),
    ("", "Unsqueeze"): Case(
        "float[B,4] x", "y = Unsqueeze(x, one)", "y = Reshape(x, n)", "y = Unsqueeze(x, two)",
        {"one": np.array([1]), "two": np.array([0]), "n": np.array([-1, 1, 4])},
    ),
    ("", "Expand"): Case(
        "float[B,1] x", "e = Expand(x, n) y = Mul(e, v)", "y = Mul(x, v)", "e = Expand(x, n) y = Mul(e, e)", {"n": np.array([1, 4]), "v": V}
    ),
    ("", "ConstantOfShape"): Case(
        "float[B,4] x", "n = Shape(x) c = ConstantOfShape<value = float[1] {2.0}>(n) y = Add(x, c)", "y = Add(x, two)",
        "n = Shape(x) c = ConstantOfShape<value = float[1] {3.0}>(n) y = Add(x, c)",
        {"two": single(2)},
    ),
    ("", "Concat"): Case(
        "float[B,4] x, float[B,2] u", "c = Concat<axis=1>(x, u) y = Slice(c, s, e, a)", "y = Identity(u)", "y = Slice(x, zero, two, a)",
        {"s": np.array([4]), "e": np.array([6]), "a": np.array([1]), "zero": np.array([0]), "two": np.array([2])},
    ),
    ("", "Slice"): Case(
        "float[B,4] x", "a = MatMul(x, w) y = Slice(a, s, e, i)", "y = MatMul(x, v)", "y = MatMul(x, u)",
        {"w": W, "s": np.array([1]), "e": np.array([-1]), "i": np.array([1]), "v": W[:, 1:3], "u": W[:, 2:4]},
    ),
    ("", "Split"): Case(
        "float[B,4] x", "a, b = Split<axis=1>(x, n) y = Mul(b, three)", "s = Slice(x, one, four, i) y = Mul(s, three)",
        "s = Slice(x, zero, t, i) y = Mul(s, three)",
        {
            "n": np.array([1, 3]), "one": np.array([1]), "four": np.array([4]), "zero": np.array([0]), "t": np.array([3]),
            "i": np.array([1]), "three": single(3),
        },
    ),
    ("", "Pad"): Case(
        "float[B,4] x", "p = Pad(x, n) y = MatMul(p, v)", "p = Pad(x, n, zero) y = MatMul(p, v)", "p = Pad(x, m) y = MatMul(p, v)",
        {"n": np.array([0, 1, 0, 0]), "m": np.array([0, 0, 0, 1]), "zero": single(0), "v": numbers(5, 4)},
    ),
    ("", "Range"): Case(
        "float[B,4] x", "n = Shape<end=1>(x) l = Squeeze(n) y = Range(zero, l, one)",
        "s = Size(x) l = Div(s, four) y = Range(zero, l, one)", "n = Shape<end=1>(x) l = Squeeze(n) m = Add(l, one) y = Range(one, m, one)",
        {"zero": np.int64(0), "one": np.int64(1), "four": np.int64(4)},
    ),
    ("", "Equal"): Case(
        "float[B,S,4] x", "n = Shape(x) e = Equal(n, n) y = Where(e, n, m)", "y = Shape(x)", "n = Shape(x) e = Equal(n, n) y = Where(e, m, n)",
        {"m": np.array([7, 8, 9])},
    ),
    ("", "Where"): Case(
        "float[B,4] x, bool[4] c", "t = Or(c, yes) a = Where(c, zero, x) b = Where(yes, a, x) y = Mul(b, two)",
        "a = Where(c, zero, x) y = Add(a, a)", "a = Where(c, x, zero) y = Add(a, a)",
        {"yes": np.ones(4, bool), "zero": single(0), "two": single(2)},
    ),
}  # fmt: skip
"""For each rule an identity and a negative control."""


def built(case: Case, body: str):
    opset = 24 if "Swish" in case.original else 23
    return model(f"({case.inputs}) => (y) {{ {body} }}", case.weights, opset=opset)


def test_every_rule_has_a_case() -> None:
    # Blocked channels are tested in test_blocked_rules.py: what they are depends on a machine.
    assert set(CASES) == {name for name in RULES if name[0] != "com.microsoft.nchwc"}


@pytest.mark.parametrize("rule", CASES, ids=".".join)
def test_the_operator_occurs_in_its_case(rule: tuple[str, str]) -> None:
    nodes = {(node.domain, node.op_type) for node in built(CASES[rule], CASES[rule].original).graph}
    assert rule in nodes


@pytest.mark.parametrize("rule", CASES, ids=".".join)
def test_an_identity_is_proved(rule: tuple[str, str]) -> None:
    case = CASES[rule]
    accepted(built(case, case.original), built(case, case.right), tolerance=case.tolerance)


@pytest.mark.parametrize("rule", CASES, ids=".".join)
def test_an_identity_is_proved_from_the_other_side(rule: tuple[str, str]) -> None:
    """Constants that cannot be solved for in the operator's own form leave it unknown, never wrong."""
    case = CASES[rule]
    verdict = prove(built(case, case.right), built(case, case.original)).verdict
    one_way = {("", "Mul"), ("", "MatMul"), ("", "BatchNormalization"), ("", "Gather"), ("", "Conv")}
    one_way |= {("", "ConvTranspose"), ("", "AveragePool")}
    assert verdict.holds or rule in one_way, str(verdict)


@pytest.mark.parametrize("rule", CASES, ids=".".join)
def test_a_negative_control_is_not_proved(rule: tuple[str, str]) -> None:
    case = CASES[rule]
    original, wrong = built(case, case.original), built(case, case.wrong)
    refused(original, wrong)
    assert not prove(wrong, original).verdict.holds
