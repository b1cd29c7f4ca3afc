# ruff: noqa: E501 - a model a line
"""Pairs that compute different functions, each close to one that does not: the proof must not say EQUAL.

Every pair is evaluated in float64 first; a pair without a witness fails as a test.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pairs import model, parsed, refused

from rewrite.proof import prove

W = np.random.default_rng(7).normal(size=(4, 4)).astype(np.float32)
V = np.array([0.5, -1.5, 2.0, 0.25], np.float32)
UP = np.float32(1 + 2.0**-23)


def constants(**given: object) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in given.items()}


PAIRS = {
    "squares averaged elsewhere are no RMS": (
        "(float[3,3,4] x) => (float[3,3,4] y) {"
        " s = Mul(x, x) m = ReduceMean<keepdims=1>(s, last) t = Transpose<perm=[1,0,2]>(m) e = Add(t, eps)"
        " r = Sqrt(e) i = Reciprocal(r) y = Mul(x, i) }",
        "(float[3,3,4] x) => (float[3,3,4] y) { y = RMSNormalization<epsilon=0.5>(x, one) }",
        constants(last=[-1], eps=np.float32(0.5), one=np.ones(4, np.float32)),
    ),
    "a square laid out otherwise is no cubic": (
        "(float[4,4] x) => (float[4,4] y) { s = Mul(x, x) t = Transpose<perm=[1,0]>(s) u = Add(t, one) y = Mul(x, u) }",
        "(float[4,4] x) => (float[4,4] y) { c = Pow(x, three) y = Add(x, c) }",
        constants(one=np.float32(1), three=np.float32(3)),
    ),
    "the square of a root is not defined below zero": (
        "(float[B] x) => (float[B] y) { y = Identity(x) }",
        "(float[B] x) => (float[B] y) { r = Sqrt(x) y = Pow(r, two) }",
        constants(two=np.float32(2)),
    ),
    "a value that cancels must be defined": (
        "(float[B] x) => (float[B] y) { y = Identity(x) }",
        "(float[B] x) => (float[B] y) { r = Sqrt(x) d = Sub(r, r) y = Add(x, d) }",
        {},
    ),
    "a value times zero must be defined": (
        "(float[B] x) => (float[B] y) { y = Identity(x) }",
        "(float[B] x) => (float[B] y) { r = Log(x) d = Mul(r, zero) y = Add(x, d) }",
        constants(zero=np.float32(0)),
    ),
    "a value that centring removes must be defined": (
        "(float[B,4] x) => (float[B,4] y) { y = LayerNormalization(x, g) }",
        "(float[B,4] x) => (float[B,4] y) { m = ReduceMean(x, last) r = Log(m) a = Add(x, r) y = LayerNormalization(a, g) }",
        constants(last=[-1], g=np.ones(4, np.float32)),
    ),
    "the root of a square loses the sign": (
        "(float[B] x) => (float[B] y) { y = Identity(x) }",
        "(float[B] x) => (float[B] y) { s = Pow(x, two) y = Sqrt(s) }",
        constants(two=np.float32(2)),
    ),
    "an exponent of higher rank adds axes": (
        "(float[4] x) => (y) { y = Pow(x, e) }",
        "(float[4] x) => (y) { z = Squeeze(e) y = Pow(x, z) }",
        constants(e=np.full((1, 1), 2, np.float32)),
    ),
    "zero minus an integer is not that integer": (
        "(int32[B] x) => (int32[B] y) { y = Sub(zero, x) }",
        "(int32[B] x) => (int32[B] y) { y = Identity(x) }",
        constants(zero=np.int32(0)),
    ),
    "a product of integers is divided as one": (
        "(int32[B,4] x) => (int32[B,4] y) { p = MatMul(x, w) h = Div(p, two) y = Mul(h, two) }",
        "(int32[B,4] x) => (int32[B,4] y) { y = MatMul(x, w) }",
        constants(w=np.arange(1, 17, dtype=np.int32).reshape(4, 4), two=np.int32(2)),
    ),
    "integers of two types with equal values": (
        "(int64[1] n, float[2] z) => (float[2] y) { o = Div(n, n) a = Expand(u, o) b = BitwiseNot(a) f = Cast<to=1>(b) y = Add(z, f) }",
        "(int64[1] n, float[2] z) => (float[2] y) { o = Div(n, n) a = Expand(i, o) b = BitwiseNot(a) f = Cast<to=1>(b) y = Add(z, f) }",
        constants(u=np.array([5, 6], np.uint8), i=np.array([5, 6], np.int8)),
    ),
    "the zero point's type bounds the quantized values": (
        "(float[B] x) => (float[B] y) { q = QuantizeLinear(x, s, zu) y = DequantizeLinear(q, s, zu) }",
        "(float[B] x) => (float[B] y) { q = QuantizeLinear(x, s, zi) y = DequantizeLinear(q, s, zi) }",
        constants(s=np.float32(0.25), zu=np.uint8(0), zi=np.int8(0)),
    ),
    "OneHot counts the axes of its result": (
        "(int64[2,2] i) => (float[40] y) { h = OneHot<axis=0>(i, n, v) y = Reshape(h, all) }",
        "(int64[2,2] i) => (float[40] y) { h = OneHot<axis=2>(i, n, v) y = Reshape(h, all) }",
        constants(n=np.int64(10), v=np.array([0, 1], np.float32), all=[40]),
    ),
    "an index is an integer where no type is declared": (
        "(float[B,4] x) => (int64[B,1] y) { i = ArgMax<axis=1>(x) h = Div(i, two) y = Mul(h, two) }",
        "(float[B,4] x) => (int64[B,1] y) { y = ArgMax<axis=1>(x) }",
        constants(two=np.int64(2)),
    ),
    "a cast to eight bits is a quantization": (
        "(float[B] x) => (float[B] y) { q = Cast<to=17>(x) y = Cast<to=1>(q) }",
        "(float[B] x) => (float[B] y) { y = Identity(x) }",
        {},
    ),
    "a slice from the end of a short axis": (
        "(float[K] x) => (int64[1] y) { z = Slice(x, s, e) y = Shape(z) }",
        "(float[K] x) => (int64[1] y) { y = Identity(n) }",
        constants(s=[-3], e=[2**62], n=[3]),
    ),
    "a slice whose end is before its start": (
        "(float[S] a, float[B] b, float[8] x) => (int64[1] y)"
        " { s = Shape(a) e = Shape(b) z = Slice(x, s, e) y = Shape(z) }",
        "(float[S] a, float[B] b, float[8] x) => (int64[1] y) { s = Shape(a) e = Shape(b)"
        " u = Slice(x, zero, s) v = Slice(x, zero, e) m = Shape(u) n = Shape(v) y = Sub(n, m) }",
        constants(zero=[0]),
    ),
    "a symbolic start that is negative": (
        "(float[B] a, float[S] x) => (int64[1] y) { n = Shape(a) s = Neg(n) z = Slice(x, s, e) y = Shape(z) }",
        "(float[B] a, float[S] x) => (int64[1] y) { n = Shape(a) m = Shape(x) y = Add(n, m) }",
        constants(e=[2**62]),
    ),
    "a range that is empty": (
        "(float[S] a, float[B] b) => (int64[1] y)"
        " { m = Shape(a) n = Shape(b) s = Squeeze(m) e = Squeeze(n) r = Range(s, e, one) y = Shape(r) }",
        "(float[S] a, float[B] b) => (int64[1] y) { m = Shape(a) n = Shape(b) y = Sub(n, m) }",
        constants(one=np.int64(1)),
    ),
    "half of a negative size is rounded toward zero": (
        "(float[B] a) => (bool[1] y) { n = Shape(a) m = Sub(n, five) h = Div(m, two) p = Add(h, one) y = Equal(p, zero) }",
        "(float[B] a) => (bool[1] y) { y = Identity(no) }",
        constants(five=[6], two=[2], one=[1], zero=[0], no=[False]),
    ),
    "a squeeze of a symbol that is 1": (
        "(float[B,1,4] x) => (y) { y = Squeeze(x) }",
        "(float[B,1,4] x) => (y) { y = Squeeze(x, axes) }",
        constants(axes=[1]),
        {"B": 1},
    ),
    "a product over no axes is none": (
        "(float[B,S] x) => (y) { n = Shape(x) y = ReduceProd<noop_with_empty_axes=1>(n) }",
        "(float[B,S] x) => (y) { n = Shape(x) y = ReduceProd<noop_with_empty_axes=0>(n) }",
        {},
    ),
    "a zero of higher rank adds axes": (
        "(bool[4] c, float[4] x) => (y) { y = Where(c, z, x) }",
        "(bool[4] c, float[4] x) => (y) { o = Squeeze(z) y = Where(c, o, x) }",
        constants(z=np.zeros((1, 1), np.float32)),
    ),
    "a batch norm in training": (
        "(float[3,2,4] x) => (float[3,2,4] y) { y, a, b = BatchNormalization<training_mode=1>(x, g, h, m, v) }",
        "(float[3,2,4] x) => (float[3,2,4] y) { y = BatchNormalization(x, g, h, m, v) }",
        constants(**{k: np.array([0.5, 1.5], np.float32) for k in "ghmv"}),
    ),
    "nobody wrote the number that would have to change": (
        "(float[B] x) => (float[B] y) { y = Mul(x, c) }",
        "(float[B] x) => (float[B] y) { y = Identity(x) }",
        constants(c=UP),
    ),
    "a negation has no number to change": (
        "(float[B] x) => (float[B] y) { y = Mul(x, c) }",
        "(float[B] x) => (float[B] y) { y = Neg(x) }",
        constants(c=-UP),
    ),
    "an ulp of float32 is many of float64": (
        "(double[B] x) => (double[B] y) { y = Mul(x, c) }",
        "(double[B] x) => (double[B] y) { y = Mul(x, d) }",
        constants(c=np.float64(0.1), d=np.float64(0.1 + 1e-9)),
    ),
    "one shipped number for two": (
        "(float[B] x, float[B] u) => (float[B] y, float[B] z) { a = Mul(x, c) y = Tanh(a) b = Mul(u, d) z = Exp(b) }",
        "(float[B] x, float[B] u) => (float[B] y, float[B] z) { a = Mul(x, c) y = Tanh(a) b = Mul(u, c) z = Exp(b) }",
        constants(c=np.float32(1.5), d=np.nextafter(np.float32(1.5), np.float32(2))),
    ),
    "a row repeated for columns that differ by an ulp": (
        "(float[B,4] x) => (float[B,3] y) { y = MatMul(x, w) }",
        "(float[B,4] x) => (float[B,3] y) { p = MatMul(x, v) y = Expand(p, n) }",
        constants(w=np.stack([V, np.nextafter(V, np.float32(9)), V], 1), v=V[:, None], n=[1, 3]),
    ),
    "the mean of a column is not the mean of a row": (
        "(float[4,4] x) => (float[4,4] y) { m = ReduceMean(x, last) y = Sub(x, m) }",
        "(float[4,4] x) => (float[4,4] y) { m = ReduceMean(x, first) y = Sub(x, m) }",
        constants(last=[-1], first=[0]),
    ),
    "a transposed weight": (
        "(float[B,4] x) => (float[B,4] y) { y = MatMul(x, w) }",
        "(float[B,4] x) => (float[B,4] y) { t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }",
        constants(w=W),
    ),
    "maps on different axes": (
        "(float[4,4] x) => (float[4,4] y) { y = MatMul(x, w) }",
        "(float[4,4] x) => (float[4,4] y) { t = Transpose<perm=[1,0]>(x) p = MatMul(t, w) y = Transpose<perm=[1,0]>(p) }",
        constants(w=W),
    ),
    "two maps in the other order": (
        "(float[B,4] x) => (float[B,4] y) { p = MatMul(x, w) y = Mul(p, v) }",
        "(float[B,4] x) => (float[B,4] y) { p = Mul(x, v) y = MatMul(p, w) }",
        constants(w=W, v=V),
    ),
    "a bias before the product": (
        "(float[B,4] x) => (float[B,4] y) { p = MatMul(x, w) y = Add(p, v) }",
        "(float[B,4] x) => (float[B,4] y) { p = Add(x, v) y = MatMul(p, w) }",
        constants(w=W, v=V),
    ),
    "batch and sequence swapped by a reshape": (
        "(float[B,S,4] x, float[S,B] t) => (float[S,B,4] y) { n = Shape(t) m = Concat<axis=0>(n, f) y = Reshape(x, m) }",
        "(float[B,S,4] x, float[S,B] t) => (float[S,B,4] y) { y = Transpose<perm=[1,0,2]>(x) }",
        constants(f=[4]),
    ),
    "heads before their size": (
        "(float[B,4] x) => (float[B,4] y) { p = Reshape(x, n) t = Transpose<perm=[0,2,1]>(p) y = Reshape(t, f) }",
        "(float[B,4] x) => (float[B,4] y) { y = Identity(x) }",
        constants(n=[0, 2, 2], f=[0, 4]),
    ),
    "parts joined in the other order": (
        "(float[B,4] x) => (float[B,4] y) { y = Identity(x) }",
        "(float[B,4] x) => (float[B,4] y) { a, b = Split<axis=1, num_outputs=2>(x) y = Concat<axis=1>(b, a) }",
        {},
    ),
    "the second value of a split": (
        "(float[B,4] x) => (float[B,2] y) { y, b = Split<axis=1, num_outputs=2>(x) }",
        "(float[B,4] x) => (float[B,2] y) { a, y = Split<axis=1, num_outputs=2>(x) }",
        {},
    ),
    "a gather of reversed entries": (
        "(float[B,4] x) => (float[B,4] y) { y = Gather<axis=1>(x, i) }",
        "(float[B,4] x) => (float[B,4] y) { y = Identity(x) }",
        constants(i=[3, 2, 1, 0]),
    ),
    "an index from the other end": (
        "(float[B,4] x) => (float[4] y) { y = Gather<axis=0>(x, i) }",
        "(float[B,4] x) => (float[4] y) { y = Gather<axis=0>(x, j) }",
        constants(i=np.int64(0), j=np.int64(-1)),
    ),
    "every other entry": (
        "(float[B,4] x) => (float[B,2] y) { y = Slice(x, s, e, a, two) }",
        "(float[B,4] x) => (float[B,2] y) { y = Slice(x, s, two, a) }",
        constants(s=[0], e=[4], a=[1], two=[2]),
    ),
    "heads repeated or tiled": (
        "(float[B,2,4] x) => (float[B,4,4] y) { u = Unsqueeze(x, two) e = Expand(u, n) y = Reshape(e, m) }",
        "(float[B,2,4] x) => (float[B,4,4] y) { u = Unsqueeze(x, one) e = Expand(u, k) y = Reshape(e, m) }",
        constants(two=[2], one=[1], n=[1, 1, 2, 1], k=[1, 2, 1, 1], m=[0, 4, 4]),
    ),
    "an added zero row is not a kept one": (
        "(float[3,4] x) => (float[4,4] y) { y = Pad(x, p) }",
        "(float[3,4] x) => (float[4,4] y) { y = Pad(x, q) }",
        constants(p=[1, 0, 0, 0], q=[0, 0, 1, 0]),
    ),
    "centring before a scale": (
        "(float[B,4] x) => (float[B,4] y) { s = Mul(x, v) y = LayerNormalization(s, g) }",
        "(float[B,4] x) => (float[B,4] y) { n = LayerNormalization(x, g) y = Mul(n, v) }",
        constants(v=V, g=np.ones(4, np.float32)),
    ),
    "RMS does not see a mean removed": (
        "(float[B,4] x) => (float[B,4] y) { y = RMSNormalization(x, g) }",
        "(float[B,4] x) => (float[B,4] y) { y = LayerNormalization(x, g) }",
        constants(g=V),
    ),
    "an activation between the products": (
        "(float[B,4] x) => (float[B,4] y) { a = MatMul(x, w) r = Relu(a) y = MatMul(r, w) }",
        "(float[B,4] x) => (float[B,4] y) { a = MatMul(x, w) b = MatMul(a, w) y = Relu(b) }",
        constants(w=W),
    ),
    "a positive scale through a bounded activation": (
        "(float[B,4] x) => (float[B,4] y) { c = Clip(x, lo, hi) y = Mul(c, two) }",
        "(float[B,4] x) => (float[B,4] y) { c = Mul(x, two) y = Clip(c, lo, hi) }",
        constants(lo=np.float32(0), hi=np.float32(1), two=np.float32(2)),
    ),
    "a factor of a product left out": (
        "(float[B,4] x, float[B,4] u) => (float[B,4] y) { a = Mul(x, u) y = Mul(a, u) }",
        "(float[B,4] x, float[B,4] u) => (float[B,4] y) { y = Mul(x, u) }",
        {},
    ),
    "a random operator": (
        "(float[4] x) => (float[4] y) { r = RandomNormalLike<seed=1.0>(x) y = Add(x, r) }",
        "(float[4] x) => (float[4] y) { r = RandomNormalLike<seed=2.0>(x) y = Add(x, r) }",
        {},
    ),
    "branches of a condition": (
        "(bool c, float[4] x) => (float[4] y) {"
        " y = If(c)<then_branch = t () => (float[4] a) { a = Exp(x) }, else_branch = e () => (float[4] b) { b = Tanh(x) }> }",
        "(bool c, float[4] x) => (float[4] y) {"
        " y = If(c)<then_branch = t () => (float[4] a) { a = Tanh(x) }, else_branch = e () => (float[4] b) { b = Exp(x) }> }",
        {},
    ),
}
"""Name: what it guards; original, rewritten, constants of both, and sizes of dimensions where those matter."""


@pytest.mark.parametrize("declared", [False, True], ids=["", "declared"])
@pytest.mark.parametrize("name", PAIRS)
def test_different_functions_are_not_equal(name: str, declared: bool) -> None:
    """With and without the types and shapes of values between, which ONNX infers."""
    original, rewritten, weights, *sizes = PAIRS[name]
    pair = [model(text, weights, declared=declared) for text in (original, rewritten)]
    refused(*pair, sizes=sizes[0] if sizes else None)


ATTRIBUTES = {
    "LeakyRelu": ("float[B,4] x", "LeakyRelu<alpha=0.1>(x)", "LeakyRelu<alpha=0.2>(x)"),
    "Elu": ("float[B,4] x", "Elu<alpha=1.0>(x)", "Elu<alpha=0.5>(x)"),
    "HardSigmoid": ("float[B,4] x", "HardSigmoid<alpha=0.2>(x)", "HardSigmoid<alpha=0.1>(x)"),
    "Softmax axis": ("float[B,4] x", "Softmax<axis=0>(x)", "Softmax<axis=1>(x)"),
    "LogSoftmax": ("float[B,4] x", "LogSoftmax<axis=0>(x)", "LogSoftmax(x)"),
    "Gelu": ("float[B,4] x", 'Gelu<approximate="tanh">(x)', "Gelu(x)"),
    "LayerNormalization epsilon": (
        "float[B,4] x",
        "LayerNormalization(x, v)",
        "LayerNormalization<epsilon=0.001>(x, v)",
    ),
    "LayerNormalization axis": ("float[4,4] x", "LayerNormalization<axis=0>(x, w)", "LayerNormalization<axis=1>(x, w)"),
    "RMSNormalization epsilon": ("float[B,4] x", "RMSNormalization(x, v)", "RMSNormalization<epsilon=0.001>(x, v)"),
    "ReduceMax axes": ("float[4,4] x", "ReduceMax<keepdims=0>(x, i0)", "ReduceMax<keepdims=0>(x, i1)"),
    "ReduceMax keepdims": ("float[4,4] x", "ReduceMax<keepdims=0>(x, i0)", "ReduceMax<keepdims=1>(x, i0)"),
    "ReduceSum axes": ("float[4,4] x", "ReduceSum<keepdims=0>(x, i0)", "ReduceSum<keepdims=0>(x, i1)"),
    "ReduceMean and ReduceSum": ("float[4,4] x", "ReduceMean(x, i1)", "ReduceSum(x, i1)"),
    "ArgMax ties": ("int32[B,4] x", "ArgMax<axis=0>(x)", "ArgMin<axis=0>(x)"),
    "CumSum": ("float[B,4] x", "CumSum<reverse=1>(x, one)", "CumSum<exclusive=1>(x, one)"),
    "Trilu": ("float[4,4] x", "Trilu<upper=0>(x)", "Trilu<upper=1>(x)"),
    "Trilu diagonal": ("float[4,4] x", "Trilu(x)", "Trilu(x, one)"),
    "Transpose": ("float[4,4] x", "Transpose<perm=[1,0]>(x)", "Transpose<perm=[0,1]>(x)"),
    "Concat axis": ("float[4,4] x", "Concat<axis=0>(x, x)", "Concat<axis=1>(x, x)"),
    "Gather axis": ("float[4,4] x", "Gather<axis=0>(x, i1)", "Gather<axis=1>(x, i1)"),
    "GatherElements": ("float[4,4] x", "GatherElements<axis=0>(x, ii)", "GatherElements<axis=1>(x, ii)"),
    "Pad mode": ("float[4,4] x", 'Pad<mode="edge">(x, p)', "Pad(x, p)"),
    "Pad value": ("float[4,4] x", "Pad(x, p, half)", "Pad(x, p)"),
    "Clip limits": ("float[B,4] x", "Clip(x, half)", 'Clip(x, "", half)'),
    "Mod": ("int32[B,4] x", "Mod<fmod=1>(x, three)", "Mod<fmod=0>(x, three)"),
    "Division of integers": ("int32[B,4] x", "Div(x, three)", "Mod(x, three)"),
    "Conv pads": ("float[1,1,5,5] x", "Conv<pads=[1,1,0,0]>(x, k)", "Conv<pads=[0,0,1,1]>(x, k)"),
    "Conv strides": ("float[1,1,5,5] x", "Conv<strides=[2,2]>(x, k)", "Conv<strides=[3,3]>(x, k)"),
    "Conv dilations": (
        "float[1,1,5,5] x",
        "Conv<dilations=[2,1], strides=[1,2]>(x, k)",
        "Conv<dilations=[1,2], strides=[2,1]>(x, k)",
    ),
    "Conv padding rule": ("float[1,1,4,4] x", 'Conv<auto_pad="SAME_UPPER">(x, k)', 'Conv<auto_pad="SAME_LOWER">(x, k)'),
    "MaxPool": ("float[1,1,5,5] x", "MaxPool<kernel_shape=[2,1]>(x)", "MaxPool<kernel_shape=[1,2]>(x)"),
    "AveragePool": (
        "float[1,1,4,4] x",
        "AveragePool<kernel_shape=[2,2], pads=[1,1,1,1], count_include_pad=1>(x)",
        "AveragePool<kernel_shape=[2,2], pads=[1,1,1,1]>(x)",
    ),
    "DepthToSpace": (
        "float[1,8,2,2] x",
        'DepthToSpace<blocksize=2, mode="CRD">(x)',
        'DepthToSpace<blocksize=2, mode="DCR">(x)',
    ),
    "GroupNormalization": (
        "float[2,4,3] x",
        "GroupNormalization<num_groups=2>(x, v, v)",
        "GroupNormalization<num_groups=4>(x, v, v)",
    ),
    "Einsum": ("float[4,4] x", 'Einsum<equation="ij->ji">(x)', 'Einsum<equation="ij->ij">(x)'),
    "IsInf": ("float[4] x", "IsInf<detect_negative=0>(inf)", "IsInf<detect_positive=0>(inf)"),
    "Gemm": ("float[4,4] x", "Gemm<transA=1>(x, w)", "Gemm<transB=1>(x, w)"),
    "Gemm scalars": ("float[4,4] x", "Gemm<alpha=2.0>(x, w, w)", "Gemm<beta=2.0>(x, w, w)"),
    "TopK": ("float[B,4] x", "TopK<largest=0>(x, one1)", "TopK<largest=1>(x, one1)"),
    "ScatterElements": ("float[4,4] x", 'ScatterElements<reduction="add">(x, ii, w)', "ScatterElements(x, ii, w)"),
    "Attention scale": ("float[1,2,3,4] x", "Attention<scale=0.25>(x, x, x)", "Attention(x, x, x)"),
    "Attention cause": ("float[1,2,3,4] x", "Attention<is_causal=1>(x, x, x)", "Attention(x, x, x)"),
    "Attention cap": ("float[1,2,3,4] x", "Attention<softcap=0.5>(x, x, x)", "Attention(x, x, x)"),
    "Attention mask": ("float[1,2,4,4] x", "Attention(x, x, x, w)", "Attention(x, x, x)"),
    "Attention operands": ("float[1,2,4,4] x, float[1,2,4,4] u", "Attention(x, u, x)", "Attention(x, x, u)"),
    "Attention heads": (
        "float[1,3,8] x",
        "Attention<q_num_heads=2, kv_num_heads=2>(x, x, x)",
        "Attention<q_num_heads=4, kv_num_heads=4, scale=0.5>(x, x, x)",
    ),
    "RotaryEmbedding": ("float[1,2,4,8] x", "RotaryEmbedding(x, c, s)", "RotaryEmbedding<interleaved=1>(x, c, s)"),
    "RotaryEmbedding caches": ("float[1,2,4,8] x", "RotaryEmbedding(x, c, s)", "RotaryEmbedding(x, s, c)"),
    "QuickGelu": ("float[B,4] x", "com.microsoft.QuickGelu<alpha=1.702>(x)", "com.microsoft.QuickGelu<alpha=1.0>(x)"),
    "Cast of a real number": ("float[B,4] x", "Cast<to=7>(x)", "Round(x)"),
}
"""Operator and what differs: inputs, and the two right-hand sides."""

OPERANDS = constants(
    v=V, w=W, i0=[0], i1=[1], one=np.int64(1), one1=[1], ii=[[0, 1, 2, 3]] * 4, p=[1, 1, 0, 0], half=np.float32(0.5),
    three=np.int32(3), k=np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2), inf=np.float32([1, np.inf, -np.inf, 0]),
    c=np.linspace(0, 1, 16, dtype=np.float32).reshape(1, 4, 4), s=np.linspace(1, 3, 16, dtype=np.float32).reshape(1, 4, 4),
)  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_or_operand_that_differs_is_seen(name: str) -> None:
    inputs, ours, theirs = ATTRIBUTES[name]
    outputs = "y, i" if name == "TopK" else "y"
    pair = [model(f"({inputs}) => (y) {{ {outputs} = {side} }}", OPERANDS) for side in (ours, theirs)]
    refused(*pair)


def test_functions_of_one_name_are_not_one_function() -> None:
    body = '(float[4] x) => (float[4] y) {{ y = local.act(x) }}\n<domain: "local", opset_import: ["" : 23]> act (a) => (b) {{ b = {}(a) }}'
    refused(model(body.format("Tanh")), model(body.format("Exp")))


def test_an_input_of_unknown_shape_is_not_a_number() -> None:
    def without_shape(text: str) -> ir.Model:
        proto = parsed(text)
        proto.graph.input[0].type.tensor_type.ClearField("shape")
        return ir.from_proto(proto)

    pair = [without_shape(f"(float[4,4] x) => (y) {{ y = {name}(x) }}") for name in ("Transpose", "Identity")]
    refused(*pair, inputs={"x": np.arange(16, dtype=np.float32).reshape(4, 4)})


def test_empty_dimension_names_are_different_sizes() -> None:
    def nameless(text: str) -> ir.Model:
        proto = parsed(text)
        for size in proto.graph.input[0].type.tensor_type.shape.dim:
            size.dim_param = ""
        return ir.from_proto(proto)

    pair = [
        nameless("(float[A,B] x) => (y) { y = Shape<start=0, end=1>(x) }"),
        nameless("(float[A,B] x) => (y) { y = Shape<start=1, end=2>(x) }"),
    ]
    refused(*pair, inputs={"x": np.zeros((2, 3), np.float32)})


def test_a_default_of_an_input_is_part_of_the_model() -> None:
    text = "(float[4] x, float[4] w) => (float[4] y) { y = Mul(x, w) }"
    pair = model(text, {"w": V}), model(text, {"w": 2 * V})
    refused(*pair, inputs={"x": np.ones(4, np.float32)})
    assert prove(model(text, {"w": V}), model(text, {"w": V})).verdict.holds
    assert not prove(model(text, {"w": V}), model(text)).verdict.holds


def test_softmax_flattened_before_opset_13() -> None:
    pair = [model(f"(float[2,3,4] x) => (y) {{ y = Softmax{axis}(x) }}", opset=11) for axis in ("", "<axis=2>")]
    inputs = {"x": np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)}
    flat = np.exp(inputs["x"]).reshape(2, -1)
    assert not np.allclose(flat / flat.sum(1, keepdims=True), np.exp(inputs["x"])[..., :1].reshape(2, -1).sum())
    assert not prove(*pair).verdict.holds


def test_outputs_of_an_operator_are_not_shifted_by_one_without_shape() -> None:
    weights = constants(
        w=np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32), r=np.ones((1, 8, 2), np.float32)
    )

    def lstm(outputs: str) -> ir.Model:
        text = f"(float[3,1,4] x) => (float[1,1,2] y) {{ {outputs} = LSTM<hidden_size=2>(x, w, r) }}"
        built = model(text, weights)
        for value in built.graph.node(0).outputs:
            if value.name == "c":
                value.shape, value.dtype = ir.Shape([1, 1, 2]), ir.DataType.FLOAT
            if value.name == "all":
                value.shape, value.dtype = ir.Shape([3, 1, 1, 2]), ir.DataType.FLOAT
        return built

    original, rewritten = lstm("none, y, c"), lstm("all, h, y")
    assert not prove(original, rewritten).verdict.holds


def test_what_the_rewritten_model_declares_is_no_evidence() -> None:
    rewritten = model("(float[4] x) => (int64[2] y) { n = NonZero(x) y = Shape(n) }")
    rewritten.graph.node(0).outputs[0].shape = ir.Shape([1, 4])
    refused(
        model("(float[4] x) => (int64[2] y) { y = Identity(c) }", constants(c=[1, 4])),
        rewritten,
        inputs={"x": np.float32([0, 1, 0, 2])},
    )


def test_the_axis_of_an_unknown_operator_is_not_counted() -> None:
    pair = [
        model(f"(float[2,3] x) => (float[2,3] y) {{ y = com.microsoft.Unknown<axis={axis}>(x) }}") for axis in (0, 2)
    ]
    for each in pair:
        each.graph.node(0).outputs[0].dtype = ir.DataType.FLOAT
    assert not prove(*pair).verdict.holds


def test_strings_are_not_numbers() -> None:
    def text(value: str) -> ir.Model:
        proto = parsed("(float[1] x) => (string[1] y) { y = Identity(c) }")
        proto.graph.initializer.append(onnx.helper.make_tensor("c", onnx.TensorProto.STRING, [1], [value.encode()]))
        return ir.from_proto(proto)

    assert not prove(text("1"), text("01")).verdict.holds


def test_order_of_outputs_matters() -> None:
    original = model("(float[4] x) => (float[4] y, float[4] z) { y = Exp(x) z = Tanh(x) }")
    assert not prove(
        original, model("(float[4] x) => (float[4] z, float[4] y) { y = Exp(x) z = Tanh(x) }")
    ).verdict.holds
    refused(original, model("(float[4] x) => (float[4] y, float[4] z) { z = Exp(x) y = Tanh(x) }"))


def test_a_tied_weight_changed_on_one_side() -> None:
    original = (
        "(int64[B] i) => (float[B,5] y)"
        " { e = Gather(t, i) h = Mul(e, v) n = Tanh(h) u = Transpose<perm=[1,0]>(t) y = MatMul(n, u) }"
    )
    rewritten = (
        "(int64[B] i) => (float[B,5] y) { h = Gather(t, i) n = Tanh(h) u = Transpose<perm=[1,0]>(t) y = MatMul(n, u) }"
    )
    table = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    inputs = {"i": np.array([0, 3, 1])}
    refused(model(original, {"t": table, "v": V}), model(rewritten, {"t": table * V}), inputs=inputs)
    # Within an ulp on both sides, and still two values for one tensor.
    nudge = np.full(4, UP)
    refused(model(original, {"t": table, "v": nudge}), model(rewritten, {"t": table}), inputs=inputs)


def test_an_overridable_initializer_is_not_a_constant() -> None:
    original = model("(float[B,4] x, float[4,4] w) => (float[B,4] y) { y = MatMul(x, w) }", {"w": W})
    folded = model("(float[B,4] x, float[4,4] w) => (float[B,4] y) { y = MatMul(x, c) }", {"w": W, "c": W})
    inputs = {"x": np.ones((2, 4), np.float32), "w": W.T.copy()}
    refused(original, folded, inputs=inputs)


def test_nan_in_a_constant_is_not_equal_to_a_number() -> None:
    text = "(float[4] x) => (float[4] y) { y = Add(x, c) }"
    assert not prove(model(text, {"c": V}), model(text, {"c": np.float32([np.nan, *V[1:]])})).verdict.holds
    assert not prove(model(text, {"c": V}), model(text, {"c": np.float32([np.inf, *V[1:]])})).verdict.holds


def test_eight_bit_constants_are_compared_by_value() -> None:
    text = "(float[4] x) => (float[4] y) { d = Cast<to=1>(c) y = Mul(x, d) }"
    a, b = (np.array(v, ml_dtypes.float8_e4m3fn) for v in ([1, 2, 3, 4], [1, 2, 3, 5]))
    assert prove(model(text, {"c": a}), model(text, {"c": a})).verdict.holds
    assert not prove(model(text, {"c": a}), model(text, {"c": b})).verdict.holds
