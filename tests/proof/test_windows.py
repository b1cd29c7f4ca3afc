# ruff: noqa: E501 - a model a line
"""Convolutions and averages: pairs that are equal because both are sums over taps, and wrong ones beside them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from networks import network
from pairs import COARSE, ROUNDING, computed, departure, feed, model

import rewrite
from rewrite.passes import Equalize
from rewrite.proof import prove
from rewrite.proof.dimensions import Dim
from rewrite.proof.windows import Sample
from rewrite.rule import Applied

R = np.random.default_rng(5)


def normal(*shape: int) -> np.ndarray:
    return R.normal(size=shape).astype(np.float32)


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def column(vector: np.ndarray, rank: int) -> np.ndarray:
    """`vector` along the first of `rank` axes."""
    return wide(vector).reshape(-1, *[1] * (rank - 1))


def single(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


GAMMA, BETA, MEAN, VARIANCE = normal(4), normal(4), normal(4), np.abs(normal(4)) + 0.1
A = wide(GAMMA) / np.sqrt(wide(VARIANCE) + float(np.float32(1e-5)))
T = wide(BETA) - A * wide(MEAN)
NORM = {"g": GAMMA, "be": BETA, "mu": MEAN, "va": VARIANCE}

Pairs = dict[str, tuple[str, str, str, Mapping[str, np.ndarray]]]
"""Inputs, both bodies, and constants."""

RIGHT: Pairs = {}
WRONG: Pairs = {}

IMAGE = "float[B,4,6,6] x"


def folded_behind(name: str, inputs: str, operator: str, kernel: np.ndarray, out: int) -> None:
    """A norm behind an operator: output channels on axis `out` of the kernel, or in groups behind it."""
    bias = normal(4)
    before = f"c = {operator}(x, k, b) y = BatchNormalization(c, g, be, mu, va)"
    if out == 0:
        scaled = column(A, kernel.ndim) * kernel
    else:
        groups = 4 // kernel.shape[1]
        cut = wide(kernel).reshape(groups, kernel.shape[0] // groups, *kernel.shape[1:])
        scaled = (cut * A.reshape(groups, 1, -1, *[1] * (kernel.ndim - 2))).reshape(kernel.shape)
    weights = {**NORM, "k": kernel, "b": bias, "k2": single(scaled), "b2": single(A * bias + T)}
    RIGHT[f"a norm behind {name}"] = (inputs, before, f"y = {operator}(x, k2, b2)", weights)
    forgotten = {**weights, "b2": single(A * bias)}
    WRONG[f"a norm behind {name}, without its shift"] = (inputs, before, f"y = {operator}(x, k2, b2)", forgotten)
    unscaled = {**weights, "b2": single(bias + T)}
    WRONG[f"a norm behind {name}, the bias not scaled"] = (inputs, before, f"y = {operator}(x, k2, b2)", unscaled)
    turned = single(np.roll(wide(weights["k2"]), 1, axis=0))
    if turned.shape[0] > 1:
        WRONG[f"a norm behind {name}, of other channels"] = (
            inputs,
            before,
            f"y = {operator}(x, k2, b2)",
            {**weights, "k2": turned},
        )


folded_behind("a convolution", IMAGE, "Conv<pads=[1,1,1,1]>", normal(4, 4, 3, 3), 0)
folded_behind("one with strides", IMAGE, "Conv<pads=[1,0,0,1], strides=[2,2]>", normal(4, 4, 3, 3), 0)
folded_behind("one of any size", "float[B,4,H,W] x", "Conv<pads=[1,1,1,1], strides=[2,1]>", normal(4, 4, 3, 3), 0)
folded_behind("dilated one", IMAGE, "Conv<pads=[2,2,2,2], dilations=[2,2]>", normal(4, 4, 3, 3), 0)
folded_behind("one in groups", IMAGE, "Conv<pads=[1,1,1,1], group=2>", normal(4, 2, 3, 3), 0)
folded_behind("one on each channel", IMAGE, "Conv<pads=[1,1,1,1], group=4>", normal(4, 1, 3, 3), 0)
folded_behind("one that pads by itself", IMAGE, 'Conv<auto_pad="SAME_UPPER", strides=[2,2]>', normal(4, 4, 3, 3), 0)
folded_behind("one in a row", "float[B,4,9] x", "Conv<pads=[2,1]>", normal(4, 4, 4), 0)
folded_behind("one in space", "float[B,4,4,5,3] x", "Conv<pads=[1,0,1,1,0,1]>", normal(4, 4, 3, 2, 3), 0)
folded_behind(
    "a transposed one",
    IMAGE,
    "ConvTranspose<strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]>",
    normal(4, 4, 3, 3),
    1,
)
folded_behind("a transposed one in groups", IMAGE, "ConvTranspose<strides=[2,2], group=2>", normal(4, 2, 3, 3), 1)
folded_behind("a transposed one on each channel", IMAGE, "ConvTranspose<strides=[2,2], group=4>", normal(4, 1, 2, 2), 1)
folded_behind(
    "a transposed one in a row", "float[B,4,S] x", "ConvTranspose<strides=[3], dilations=[2]>", normal(4, 4, 3), 1
)

# ── A norm in front: the diagonal always, the shift where nothing is padded ─────────────────────────────────────────

K, B = normal(5, 4, 3, 3), normal(5)
SHIFT = np.einsum("oikl,i->o", wide(K), T)
FRONT = {
    **NORM,
    "k": K,
    "b": B,
    "k2": single(wide(K) * A[:, None, None]),
    "b2": single(B + SHIFT),
    "ta": single(T / A).reshape(4, 1, 1),
}
NORMED = "n = BatchNormalization(x, g, be, mu, va)"
RIGHT["a norm in front, nothing padded"] = (IMAGE, f"{NORMED} y = Conv(n, k, b)", "y = Conv(x, k2, b2)", FRONT)
RIGHT["a norm in front of one with strides"] = (
    "float[B,4,H,W] x",
    f"{NORMED} y = Conv<strides=[2,2]>(n, k, b)",
    "y = Conv<strides=[2,2]>(x, k2, b2)",
    FRONT,
)
RIGHT["a norm's diagonal in front of padding"] = (
    IMAGE,
    f"{NORMED} y = Conv<pads=[1,1,1,1]>(n, k, b)",
    "m = Add(x, ta) y = Conv<pads=[1,1,1,1]>(m, k2, b)",
    FRONT,
)
WRONG["a norm's shift through padding"] = (
    IMAGE,
    f"{NORMED} y = Conv<pads=[1,1,1,1]>(n, k, b)",
    "y = Conv<pads=[1,1,1,1]>(x, k2, b2)",
    FRONT,
)
WRONG["a norm's shift through padding at one end"] = (
    IMAGE,
    f"{NORMED} y = Conv<pads=[0,0,0,1]>(n, k, b)",
    "y = Conv<pads=[0,0,0,1]>(x, k2, b2)",
    FRONT,
)
WRONG["a norm's shift through zeros around"] = (
    IMAGE,
    f"{NORMED} p = Pad(n, w) y = Conv(p, k, b)",
    "p = Pad(x, w) y = Conv(p, k2, b2)",
    {**FRONT, "w": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
)
RIGHT["a norm in front, of windows that stay inside"] = (
    IMAGE,
    f"{NORMED} y = Conv<pads=[0,0,0,1], strides=[1,5]>(n, k, b)",
    "y = Conv<pads=[0,0,0,1], strides=[1,5]>(x, k2, b2)",
    FRONT,
)
TRANSPOSED = {**NORM, "k": normal(4, 5, 2, 2), "b": B}
TRANSPOSED["k2"] = single(wide(TRANSPOSED["k"]) * A[:, None, None, None])
TRANSPOSED["b2"] = single(B + np.einsum("iokl,i->o", wide(TRANSPOSED["k"]), T) / 4)
TRANSPOSED["ta"] = FRONT["ta"]
WRONG["a norm's shift through a transposed convolution"] = (
    IMAGE,
    f"{NORMED} y = ConvTranspose(n, k, b)",
    "y = ConvTranspose(x, k2, b2)",
    TRANSPOSED,
)
RIGHT["a norm's diagonal in front of a transposed convolution"] = (
    IMAGE,
    f"{NORMED} y = ConvTranspose<strides=[2,2]>(n, k, b)",
    "m = Add(x, ta) y = ConvTranspose<strides=[2,2]>(m, k2, b)",
    TRANSPOSED,
)

# ── Branches ────────────────────────────────────────────────────────────────────────────────────────────────────────

POINT, DELTA = normal(4, 4, 1, 1), np.zeros((4, 4, 3, 3))
DELTA[range(4), range(4), 1, 1] = 1.0
SQUARE, ROW, COLUMN = normal(4, 4, 3, 3), normal(4, 4, 1, 3), normal(4, 4, 3, 1)
REP = wide(SQUARE) + np.pad(wide(POINT), ((0, 0), (0, 0), (1, 1), (1, 1))) + A[:, None, None, None] * DELTA
BRANCHES = f"p = Conv<pads=[1,1,1,1]>(x, k, b) q = Conv(x, k1) {NORMED} s = Add(p, q) y = Add(s, n)"
MERGED = {**NORM, "k": SQUARE, "k1": POINT, "b": normal(4), "k2": single(REP)}
MERGED["b2"] = single(MERGED["b"] + T)
RIGHT["three branches of a block"] = (IMAGE, BRANCHES, "y = Conv<pads=[1,1,1,1]>(x, k2, b2)", MERGED)
RIGHT["three branches of any size"] = ("float[B,4,H,W] x", BRANCHES, "y = Conv<pads=[1,1,1,1]>(x, k2, b2)", MERGED)
for wrong, kernel in {
    "the identity left out": REP - A[:, None, None, None] * DELTA,
    "the point in a corner": wide(SQUARE)
    + np.pad(wide(POINT), ((0, 0), (0, 0), (0, 2), (0, 2)))
    + A[:, None, None, None] * DELTA,
    "the identity not scaled": REP + (1 - A)[:, None, None, None] * DELTA,
    "a turned kernel": REP[:, :, ::-1],
    "inputs for outputs": REP.transpose(1, 0, 2, 3),
}.items():
    WRONG[f"three branches, {wrong}"] = (
        IMAGE,
        BRANCHES,
        "y = Conv<pads=[1,1,1,1]>(x, k2, b2)",
        {**MERGED, "k2": single(kernel)},
    )
WRONG["three branches, a bias left out"] = (IMAGE, BRANCHES, "y = Conv<pads=[1,1,1,1]>(x, k2, b)", MERGED)
CROSS = single(
    np.pad(wide(ROW), ((0, 0), (0, 0), (1, 1), (0, 0))) + np.pad(wide(COLUMN), ((0, 0), (0, 0), (0, 0), (1, 1)))
)
CROSSED = {"r": ROW, "c": COLUMN, "k2": CROSS, "k3": single(CROSS.transpose(0, 1, 3, 2))}
RIGHT["a row and a column"] = (
    IMAGE,
    "p = Conv<pads=[0,1,0,1]>(x, r) q = Conv<pads=[1,0,1,0]>(x, c) y = Add(p, q)",
    "y = Conv<pads=[1,1,1,1]>(x, k2)",
    CROSSED,
)
WRONG["a row and a column, turned"] = (
    IMAGE,
    "p = Conv<pads=[0,1,0,1]>(x, r) q = Conv<pads=[1,0,1,0]>(x, c) y = Add(p, q)",
    "y = Conv<pads=[1,1,1,1]>(x, k3)",
    CROSSED,
)
STRIDED = "p = Conv<pads=[1,1,1,1], strides=[2,2]>(x, k, b) q = Conv<strides=[2,2]>(x, k1) y = Add(p, q)"
HALVED = {**MERGED, "k2": single(REP - A[:, None, None, None] * DELTA)}
RIGHT["two branches with strides"] = (
    "float[B,4,H,W] x",
    STRIDED,
    "y = Conv<pads=[1,1,1,1], strides=[2,2]>(x, k2, b)",
    HALVED,
)
WRONG["two branches with strides, in another phase"] = (
    IMAGE,
    STRIDED,
    "y = Conv<pads=[0,0,2,2], strides=[2,2]>(x, k2, b)",
    HALVED,
)
MEANS = np.zeros((4, 4, 3, 3))
MEANS[range(4), range(4)] = 1 / 9
POOLED = {"k": SQUARE, "k2": single(wide(SQUARE) + MEANS)}
POOL = "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad={}>(x)"
SUMMED = "p = Conv<pads=[1,1,1,1]>(x, k) q = " + POOL + " y = Add(p, q)"
RIGHT["an average beside a kernel"] = (IMAGE, SUMMED.format(1), "y = Conv<pads=[1,1,1,1]>(x, k2)", POOLED)
WRONG["an average that leaves out padding beside a kernel"] = (
    IMAGE,
    SUMMED.format(0),
    "y = Conv<pads=[1,1,1,1]>(x, k2)",
    POOLED,
)
EACH = normal(4, 1, 3, 3)
FLAT = np.zeros((4, 4, 3, 3))
FLAT[range(4), range(4)] = EACH[:, 0]
RIGHT["kernels of each channel in one of all"] = (
    IMAGE,
    "p = Conv<pads=[1,1,1,1], group=4>(x, e) q = Conv<pads=[1,1,1,1]>(x, k) y = Add(p, q)",
    "y = Conv<pads=[1,1,1,1]>(x, k2)",
    {"e": EACH, "k": SQUARE, "k2": single(wide(SQUARE) + FLAT)},
)
RIGHT["branches on each channel"] = (
    IMAGE,
    "p = Conv<pads=[1,1,1,1], group=4>(x, e) y = Add(p, x)",
    "y = Conv<pads=[1,1,1,1], group=4>(x, f)",
    {"e": EACH, "f": single(wide(EACH) + DELTA[range(4), range(4)][:, None])},
)
WRONG["branches on each channel, at another tap"] = (
    IMAGE,
    "p = Conv<pads=[1,1,1,1], group=4>(x, e) y = Add(p, x)",
    "y = Conv<pads=[1,1,1,1], group=4>(x, f)",
    {"e": EACH, "f": single(wide(EACH) + np.roll(DELTA[range(4), range(4)][:, None], 1, axis=3))},
)

# ── One behind another ──────────────────────────────────────────────────────────────────────────────────────────────

FIRST, SECOND, C1, C2 = normal(6, 4, 1, 1), normal(4, 6, 3, 3), normal(6), normal(4)
SEQUENCE = {
    "k": FIRST,
    "c": C1,
    "l": SECOND,
    "d": C2,
    "m": single(np.einsum("omkl,mi->oikl", wide(SECOND), wide(FIRST)[:, :, 0, 0])),
}
SEQUENCE["e"] = single(wide(C2) + np.einsum("omkl,m->o", wide(SECOND), wide(C1)))
RIGHT["a point, then a window"] = (
    IMAGE,
    "h = Conv(x, k) y = Conv<pads=[1,1,1,1]>(h, l, d)",
    "y = Conv<pads=[1,1,1,1]>(x, m, d)",
    SEQUENCE,
)
RIGHT["a point with a bias, then a window"] = (
    IMAGE,
    "h = Conv(x, k, c) y = Conv(h, l, d)",
    "y = Conv(x, m, e)",
    SEQUENCE,
)
WRONG["a point with a bias, then a padded window"] = (
    IMAGE,
    "h = Conv(x, k, c) y = Conv<pads=[1,1,1,1]>(h, l, d)",
    "y = Conv<pads=[1,1,1,1]>(x, m, e)",
    SEQUENCE,
)
RIGHT["a point of places that a window takes"] = (
    IMAGE,
    "h = Conv<pads=[1,1,1,1], strides=[2,2]>(x, l4) y = Conv(h, k, c)",
    "y = Conv<pads=[1,1,1,1], strides=[2,2]>(x, m4, c)",
    {
        "l4": SQUARE,
        "k": FIRST,
        "c": C1,
        "m4": single(
            np.einsum("omkl,mi->oikl", wide(FIRST)[:, :, :1, :1], wide(SQUARE).reshape(4, -1)).reshape(6, 4, 3, 3)
        ),
    },
)
RIGHT["zeros around, then a window"] = (
    "float[B,4,H,W] x",
    "p = Pad(x, w) y = Conv<strides=[2,2]>(p, k, b)",
    "y = Conv<pads=[1,2,3,1], strides=[2,2]>(x, k, b)",
    {"k": K, "b": B, "w": np.array([0, 0, 1, 2, 0, 0, 3, 1])},
)
WRONG["zeros around the other end, then a window"] = (
    IMAGE,
    "p = Pad(x, w) y = Conv(p, k, b)",
    "y = Conv<pads=[0,0,1,1]>(x, k, b)",
    {"k": K, "b": B, "w": np.array([0, 0, 1, 1, 0, 0, 0, 0])},
)
WRONG["padding of what was padded and cut"] = (
    "float[B,4,6] x",
    "h = Conv(x, k3) y = Conv<pads=[2,2]>(h, k3)",
    "h = Conv<pads=[1,1]>(x, k3) y = Conv<pads=[1,1]>(h, k3)",
    {"k3": normal(4, 4, 3)},
)
LONG = normal(4, 4, 3), normal(4, 4, 2)
LONGER = np.zeros((4, 4, 4))
for i in range(3):
    for j in range(2):
        LONGER[:, :, i + j] += wide(LONG[1])[:, :, j] @ wide(LONG[0])[:, :, i]
ROWS = {"k": LONG[0], "l": LONG[1], "m": single(LONGER)}
RIGHT["a window of a window"] = (
    "float[B,4,S] x",
    "h = Conv<pads=[1,1]>(x, k) y = Conv(h, l)",
    "y = Conv<pads=[1,1]>(x, m)",
    ROWS,
)
WRONG["a padded window of a window"] = (
    "float[B,4,S] x",
    "h = Conv(x, k) y = Conv<pads=[1,1]>(h, l)",
    "y = Conv<pads=[1,1]>(x, m)",
    ROWS,
)
RIGHT["a transposed convolution without strides"] = (
    IMAGE,
    "y = ConvTranspose<pads=[1,1,1,1]>(x, k)",
    "y = Conv<pads=[1,1,1,1]>(x, l)",
    {"k": SQUARE, "l": SQUARE.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1].copy()},
)
WRONG["a transposed convolution that is not turned"] = (
    IMAGE,
    "y = ConvTranspose<pads=[1,1,1,1]>(x, k)",
    "y = Conv<pads=[1,1,1,1]>(x, l)",
    {"k": SQUARE, "l": SQUARE.transpose(1, 0, 2, 3).copy()},
)
WRONG["a transposed convolution of another phase"] = (
    IMAGE,
    "y = ConvTranspose<strides=[2,2], pads=[1,1,0,0]>(x, k)",
    "y = ConvTranspose<strides=[2,2], pads=[0,0,1,1]>(x, k)",
    {"k": SQUARE},
)
RIGHT["a number in front of an average"] = (
    IMAGE,
    "h = Conv(x, k) p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(h) y = Mul(p, three)",
    "h = Conv(x, k2) y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(h)",
    {"k": SQUARE, "three": single(3.0), "k2": single(3.0 * wide(SQUARE))},
)
RIGHT["a norm behind an average"] = (
    IMAGE,
    "h = Conv(x, k) p = GlobalAveragePool(h) y = BatchNormalization(p, g, be, mu, va)",
    "h = Conv(x, k2, t) y = GlobalAveragePool(h)",
    {**NORM, "k": SQUARE, "k2": single(column(A, 4) * SQUARE), "t": single(T)},
)
WRONG["a norm behind an average, not shifted"] = (
    IMAGE,
    "h = Conv(x, k) p = GlobalAveragePool(h) y = BatchNormalization(p, g, be, mu, va)",
    "h = Conv(x, k2) y = GlobalAveragePool(h)",
    {**NORM, "k": SQUARE, "k2": single(column(A, 4) * SQUARE)},
)
BESIDE = "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad={}>"
RIGHT["a norm behind an average that leaves out padding"] = (
    IMAGE,
    f"h = Conv(x, k) p = {BESIDE.format(0)}(h) y = BatchNormalization(p, g, be, mu, va)",
    f"h = Conv(x, k2, t) y = {BESIDE.format(0)}(h)",
    {**NORM, "k": SQUARE, "k2": single(column(A, 4) * SQUARE), "t": single(T)},
)
WRONG["a norm behind an average over padding"] = (
    IMAGE,
    f"h = Conv(x, k) p = {BESIDE.format(1)}(h) y = BatchNormalization(p, g, be, mu, va)",
    f"h = Conv(x, k2, t) y = {BESIDE.format(1)}(h)",
    {**NORM, "k": SQUARE, "k2": single(column(A, 4) * SQUARE), "t": single(T)},
)
WRONG["an average that leaves out padding, or not"] = (
    IMAGE,
    f"y = {BESIDE.format(0)}(x)",
    f"y = {BESIDE.format(1)}(x)",
    {},
)
INVERTED = {**NORM, "k": normal(4, 8, 1, 1), "e": normal(8, 4, 1, 1), "k2": np.zeros(0, np.float32), "s": normal(8)}
INVERTED["k2"] = single(column(A, 4) * INVERTED["k"])
INVERTED["t"] = single(T)
INVERTED["e2"] = single(column(INVERTED["s"], 4) * INVERTED["e"])
INVERTED["s1"] = INVERTED["s"].reshape(8, 1, 1)
RIGHT["two changed kernels, nothing between them"] = (
    "float[B,8,6,6] x",
    "h = Conv(x, k) n = BatchNormalization(h, g, be, mu, va) e0 = Conv(n, e) f = Mul(e0, s1) y = Relu(f)",
    "n = Conv(x, k2, t) f = Conv(n, e2) y = Relu(f)",
    INVERTED,
)
WRONG["two changed kernels, one of them wrong"] = (
    "float[B,8,6,6] x",
    "h = Conv(x, k) n = BatchNormalization(h, g, be, mu, va) e0 = Conv(n, e) f = Mul(e0, s1) y = Relu(f)",
    "n = Conv(x, k2, t) f = Conv(n, e) y = Relu(f)",
    INVERTED,
)
GREY = {"k": normal(4, 1, 3, 3), "b": normal(4), **NORM, "one": normal(1, 4), "m": normal(4, 1), "v": normal(4, 1)}
GREY["k2"], GREY["b2"] = single(column(A, 4) * GREY["k"]), single(A * GREY["b"] + T)
RIGHT["a norm behind a convolution of one channel"] = (
    "float[B,1,6,6] x",
    "c = Conv(x, k, b) y = BatchNormalization(c, g, be, mu, va)",
    "y = Conv(x, k2, b2)",
    GREY,
)
WRONG["a norm behind a convolution of one channel, without its shift"] = (
    "float[B,1,6,6] x",
    "c = Conv(x, k, b) y = BatchNormalization(c, g, be, mu, va)",
    "y = Conv(x, k2, b)",
    GREY,
)
GREY["m2"] = single(wide(GREY["m"]) @ wide(GREY["one"]))
GREY["m3"] = single(wide(GREY["v"]) @ wide(GREY["one"]))
RIGHT["many channels to one to many"] = (
    "float[B,4] x",
    "h = MatMul(x, m) y = MatMul(h, one)",
    "y = MatMul(x, m2)",
    GREY,
)
WRONG["many channels to one to many, by another"] = (
    "float[B,4] x",
    "h = MatMul(x, m) y = MatMul(h, one)",
    "y = MatMul(x, m3)",
    GREY,
)
RIGHT["one channel to many"] = (
    "float[B,S,1] x",
    "t = Tanh(x) h = MatMul(t, one) d = Mul(h, g) y = Relu(d)",
    "t = Tanh(x) d = MatMul(t, o2) y = Relu(d)",
    {**GREY, "o2": single(wide(GREY["one"]) * GAMMA)},
)
SUMMED_STREAM = {"p": normal(4, 4), "a": normal(4), "l": normal(1), "w": normal(4, 5), **NORM}
SUMMED_STREAM["w2"] = single((A + wide(SUMMED_STREAM["l"]))[:, None] * SUMMED_STREAM["w"])
SUMMED_STREAM["w3"] = single((A * wide(SUMMED_STREAM["l"]))[:, None] * SUMMED_STREAM["w"])
SUMMED_STREAM["t2"] = single(T @ wide(SUMMED_STREAM["w"]))
REPBN = "z = Tanh(x) h = MatMul(z, p) c = Transpose<perm=[0,2,1]>(h) n = BatchNormalization(c, g, be, mu, va) o = Transpose<perm=[0,2,1]>(n) m = Mul(h, l) q = Add(o, m) f = MatMul(q, w) y = Softmax(f)"
REPBN_FOLDED = "z = Tanh(x) h = MatMul(z, p) k = MatMul(h, w2) f = Add(k, t2) y = Softmax(f)"
RIGHT["a norm and a share of what it reads, into a matrix"] = ("float[B,3,4] x", REPBN, REPBN_FOLDED, SUMMED_STREAM)
WRONG["a norm times a share of what it reads, into a matrix"] = (
    "float[B,3,4] x",
    REPBN,
    REPBN_FOLDED.replace("w2", "w3"),
    SUMMED_STREAM,
)
PARTS = {"p": normal(4, 3), "s": normal(1, 3), "n": np.array([4, 3])}
PARTS["w"] = single(wide(PARTS["p"]) * PARTS["s"])
RIGHT["a matrix times a vector that is repeated"] = (
    "float[B,4] x",
    "e = Expand(s, n) m = Mul(p, e) y = MatMul(x, m)",
    "y = MatMul(x, w)",
    PARTS,
)
WRONG["a matrix times a vector, forgotten"] = (
    "float[B,4] x",
    "e = Expand(s, n) m = Mul(p, e) y = MatMul(x, m)",
    "y = MatMul(x, p)",
    PARTS,
)
TOKENS = {"p": normal(4, 4), "s": normal(4), "w": normal(4, 5), "a": single(A), "t": single(T)}
TOKENS["p2"] = single(wide(TOKENS["p"]) * TOKENS["s"])
TOKENS["w2"] = single(wide(TOKENS["a"])[:, None] * TOKENS["w"])
TOKENS["t2"] = single(wide(TOKENS["t"]) @ wide(TOKENS["w"]))
STREAM = "z = Tanh(x) h = MatMul(z, p) l = Mul(h, s) r = Add(l, x) m = Mul(r, a) n = Add(m, t) f = MatMul(n, w) y = Softmax(f)"
FOLDED = "z = Tanh(x) l = MatMul(z, p2) r = Add(l, x) g = MatMul(r, w2) f = Add(g, t2) y = Softmax(f)"
RIGHT["two changed matrices on a stream without norms"] = ("float[B,S,4] x", STREAM, FOLDED, TOKENS)
WRONG["two changed matrices on a stream, the shift lost"] = (
    "float[B,S,4] x",
    STREAM,
    FOLDED.replace("Add(g, t2)", "Identity(g)"),
    TOKENS,
)


def pair(inputs: str, body: str, weights: Mapping[str, np.ndarray]):
    used = {
        name: np.asarray(value)
        for name, value in weights.items()
        if name in body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }
    return model(f"({inputs}) => (y) {{ {body} }}", used)


def both(case: tuple[str, str, str, Mapping[str, np.ndarray]]):
    inputs, original, rewritten, weights = case
    return pair(inputs, original, weights), pair(inputs, rewritten, weights)


def apart(case: tuple[str, str, str, Mapping[str, np.ndarray]]) -> float:
    first, second = both(case)
    inputs = feed(first, {"B": 2, "H": 7, "W": 6, "S": 9})
    return departure(computed(first, inputs), computed(second, inputs))


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_pair_is_equal(name: str) -> None:
    assert apart(RIGHT[name]) <= COARSE, "the identity is not true"
    verdict = prove(*both(RIGHT[name])).verdict
    assert verdict.kind in ("EQUAL", "BITWISE"), str(verdict)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pair_is_not(name: str) -> None:
    assert apart(WRONG[name]) > ROUNDING, "the witness shows no difference"
    verdict = prove(*both(WRONG[name])).verdict
    assert not verdict.holds, f"{verdict} for a pair that computes different functions"


def places(x: np.ndarray, sample: Sample) -> np.ndarray:
    size = sample.size.constant or 0
    wanted = [divmod(sample.start + sample.step * i, sample.divisor) for i in range(size)]
    return np.array([x[place] if not rest and 0 <= place < len(x) else 0.0 for place, rest in wanted])


def test_places_of_places_are_what_they_say() -> None:
    draw, composed = np.random.default_rng(0), 0
    for _ in range(4000):
        extent = int(draw.integers(1, 7))
        inner, outer = (
            Sample(int(draw.integers(-4, 5)), int(draw.integers(1, 4)), int(draw.choice([1, 1, 2, 3])), Dim.of(int(n)))
            for n in draw.integers(1, 8, 2)
        )
        x = draw.normal(size=extent)
        between = places(x, inner)
        if inner.within(Dim.of(extent)):
            assert between.all()
        joint = outer.of(inner, Dim.of(extent))
        if joint is not None:
            composed += 1
            assert np.array_equal(places(between, outer), places(x, joint))
        if outer.everything(inner.size):
            assert np.array_equal(places(between, outer), between)
    assert composed > 200


def test_a_scale_passes_a_padded_window_on_a_single_pixel() -> None:
    """All that is read beside the pixel is padding; seen where a ResNet's last stage has one pixel."""
    program = network(
        """single (float[B, 6, 1, 1] x, float[8, 6, 1, 1] v, float[8] a, float[5, 8, 3, 3] w) => (float[B, 5, 1, 1] y)
        {
            c = Conv <kernel_shape = [1, 1]> (x, v, a)
            r = Relu (c)
            y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, w)
        }"""
    )
    result = rewrite.apply(program, [Equalize()])
    assert [outcome.site for outcome in result.outcomes if isinstance(outcome, Applied)] == ["r"]
    assert result.certificate.verdict.kind == "EQUAL", result
