"""Small networks for every pass, and the steps that rewrite them: what mutants of the passes are made from.

A case is rewritten by its steps, of which the last is the pass it stands under. The networks are written for what the
passes change: tied tables, shared and fused projections, gates, stacks of experts, depthwise kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from head_networks import NETWORKS as HEADS
from merge_networks import BLOCKS, PAIR_WEIGHTS, PAIRS
from networks import network
from normed_networks import NORMED, SPREAD
from pass_examples import LAYER_SCALE, PRE_LN

from rewrite.ir.program import Program
from rewrite.ir.statistics import ChannelRange
from rewrite.passes import (
    AffineHeads,
    CenterResidual,
    CompressResidual,
    EliminateDeadChannels,
    Equalize,
    FoldBatchnorm,
    FoldNorm,
    FoldParametrization,
    FoldScale,
    MergeAffine,
    MergeBranches,
    MergeDuplicateChannels,
    ReparameterizeNormScale,
    RotateHeads,
    RotateOnline,
    RotateResidual,
    ScaleHeads,
    ScaleQueryKey,
    Smooth,
    SplitOutliers,
    StabilizeNorm,
)
from rewrite.rule import Pass

FOLDED = (FoldScale(), CenterResidual(), FoldNorm())
"""What a rotation of the stream asks for first."""


@dataclass(frozen=True)
class Case:
    """A network (ONNX text) with its inputs and planted weights, and the passes that rewrite it."""

    name: str
    text: str
    steps: Sequence[Pass[Any]]
    inputs: tuple[str, ...] = ("x",)
    weights: Mapping[str, Any] = field(default_factory=dict)

    def program(self) -> Program:
        """The network before any pass."""
        return network(self.text, self.inputs, **self.weights)


TIED = """
tied (int64[B, S] ids, float[9, 8] table, float[8] g1, float[8, 8] w1, float[8] c1, float[8, 12] w2, float[12, 8] w3,
      float[8] g2, float[8] g3) => (float[B, S, 9] logits)
{
    x0 = Gather (table, ids)
    n1 = RMSNormalization (x0, g1)
    h1 = MatMul (n1, w1)
    a1 = Add (h1, c1)
    x1 = Add (x0, a1)
    n2 = RMSNormalization <epsilon = 0.001> (x1, g2)
    h2 = MatMul (n2, w2)
    r2 = Gelu (h2)
    o2 = MatMul (r2, w3)
    x2 = Add (o2, x1)
    n3 = RMSNormalization (x2, g3)
    head = Transpose <perm = [1, 0]> (table)
    logits = MatMul (n3, head)
}
"""

MIXTURE = """
mixture (int64[B, S] ids, float[9, 8] table, float[8] g1, float[8, 2] router, float[2, 8, 6] up, float[2, 6, 8] down,
         float[8] g2, float[8, 9] head) => (float[B, S, 9] logits)
{
    x0 = Gather (table, ids)
    n1 = RMSNormalization (x0, g1)
    votes = MatMul (n1, router)
    shares = Softmax <axis = -1> (votes)
    zero = Constant <value_ints = [0]> ()
    s1, s2 = Split <axis = -1, num_outputs = 2> (shares)
    u1, u2 = Split <axis = 0, num_outputs = 2> (up)
    v1, v2 = Split <axis = 0, num_outputs = 2> (down)
    up1 = Squeeze (u1, zero)
    down1 = Squeeze (v1, zero)
    h1 = MatMul (n1, up1)
    r1 = Relu (h1)
    o1 = MatMul (r1, down1)
    m1 = Mul (o1, s1)
    up2 = Squeeze (u2, zero)
    down2 = Squeeze (v2, zero)
    h2 = MatMul (n1, up2)
    r2 = Relu (h2)
    o2 = MatMul (r2, down2)
    m2 = Mul (o2, s2)
    mixed = Add (m1, m2)
    x1 = Add (x0, mixed)
    n2 = RMSNormalization (x1, g2)
    logits = MatMul (n2, head)
}
"""

STREAM = """
stream (int64[B, S] ids, float[9, 6] table, float[6] g1, float[6, 5] w1, float[5, 6] w2, float[6] b2, float[6] g2,
        float[6] b3, float[6, 4] head, float[6, 3] raw) => (float[B, S, 4] y, float[B, S, 3] z)
{
    x0 = Gather (table, ids)
    n1 = RMSNormalization <epsilon = 0.01> (x0, g1)
    h = MatMul (n1, w1)
    t = Tanh (h)
    m = MatMul (t, w2)
    o = Add (m, b2)
    x1 = Add (x0, o)
    n2 = LayerNormalization <epsilon = 0.001> (x1, g2, b3)
    y = MatMul (n2, head)
    z = MatMul (x1, raw)
}
"""

TOKENS = """
tokens (float[B, 3, 4, 4] x, float[8, 3, 2, 2] kernel, float[8] bias, float[1, 1, 8] token, float[1, 5, 8] places,
        float[8] g1, float[8] b1, float[8] g2, float[8, 8] w, float[8, 5] head) => (float[B, 5] y)
{
    image = Conv <kernel_shape = [2, 2], strides = [2, 2]> (x, kernel, bias)
    flatten = Constant <value_ints = [0, 8, -1]> ()
    flat = Reshape (image, flatten)
    rows = Transpose <perm = [0, 2, 1]> (flat)
    batch = Shape <start = 0, end = 1> (x)
    ends = Constant <value_ints = [1, 8]> ()
    whole = Concat <axis = 0> (batch, ends)
    first = Expand (token, whole)
    joined = Concat <axis = 1> (first, rows)
    x0 = Add (joined, places)
    n1 = LayerNormalization (x0, g1, b1)
    a1 = MatMul (n1, w)
    x1 = Add (x0, a1)
    n2 = LayerNormalization (x1, g2)
    zero = Constant <value_int = 0> ()
    one = Gather <axis = 1> (n2, zero)
    y = MatMul (one, head)
}
"""

BLOCK = """
block (float[B, S, 6] x, float[6] g, float[6] b, float[6, 6] q, float[6] qb, float[6, 4] k, float[6, 6] o)
    => (float[B, S, 6] y, float[B, S, 4] z)
{
    n = LayerNormalization (x, g, b)
    p = MatMul (n, q)
    a = Add (p, qb)
    t = Tanh (a)
    h = MatMul (t, o)
    y = Add (h, x)
    z = MatMul (n, k)
}
"""

BIASED = """
biased (float[B, S, 6] x, float[6] g, float[6] b, float[6, 6] q, float[6] qb, float[4, 6] k, float[4] kb, float[6, 6] o)
    => (float[B, S, 6] y, float[B, S, 4] z)
{
    n = LayerNormalization (x, g, b)
    p = MatMul (n, q)
    a = Add (p, qb)
    t = Tanh (a)
    h = MatMul (t, o)
    y = Add (h, x)
    kt = Transpose <perm = [1, 0]> (k)
    c = MatMul (n, kt)
    z = Add (kb, c)
}
"""

PATCHES = """
patches (float[B, 4, 4, 6] x, float[6] g, float[6] b, float[5, 6, 3, 3] kernel) => (float[B, 5, 4, 4] y)
{
    n = LayerNormalization (x, g, b)
    c = Transpose <perm = [0, 3, 1, 2]> (n)
    y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (c, kernel)
}
"""

STACK = """
stack (float[4, 6] x, float[6] g, float[6, 3] router, float[2, 6, 5] experts) => (float[4, 3] r, float[2, 4, 5] y)
{
    n = RMSNormalization (x, g)
    r = MatMul (n, router)
    y = MatMul (n, experts)
}
"""

MLP = """
mlp (float[B, S, 5] x, float[5, 8] w1, float[8] b, float[8, 4] w2, float[4] c) => (float[B, S, 4] y)
{{
    h = MatMul (x, w1)
    a = Add (h, b)
    {activation}
    p = MatMul (r, w2)
    y = Add (p, c)
}}
"""

GATED = """
gated (float[B, S, 5] x, float[5, 12] gate, float[5, 12] up, float[12, 4] down, float[4] c) => (float[B, S, 4] y)
{
    g = MatMul (x, gate)
    s = Sigmoid (g)
    a = Mul (g, s)
    u = MatMul (x, up)
    m = Mul (a, u)
    p = MatMul (m, down)
    y = Add (p, c)
}
"""

FUSED = """
fused (float[B, S, 5] x, float[5, 12] both, float[12] b, float[6, 4] down) => (float[B, S, 4] y)
{
    h = MatMul (x, both)
    c = Add (h, b)
    sizes = Constant <value_ints = [6, 6]> ()
    g, u = Split <axis = 2> (c, sizes)
    a = Gelu (g)
    m = Mul (a, u)
    y = MatMul (m, down)
}
"""

CONVOLUTIONS = """
convolutions (float[B, 3, 8, 8] x, float[6, 3, 3, 3] k1, float[6] b1, float[6, 1, 3, 3] deep, float[6] bd,
              float[4, 6, 1, 1] point, float[4] g, float[4] b, float[4] mean, float[4] var, float[4, 2, 3, 3] halves,
              float[4, 5] head) => (float[B, 5] y)
{
    c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k1, b1)
    r1 = Relu (c1)
    c2 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 6> (r1, deep, bd)
    r2 = LeakyRelu <alpha = 0.2> (c2)
    p2 = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (r2)
    c3 = Conv <kernel_shape = [1, 1]> (p2, point)
    n3 = BatchNormalization (c3, g, b, mean, var)
    r3 = Relu (n3)
    c4 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 2> (r3, halves)
    r4 = Relu (c4)
    pooled = GlobalAveragePool (r4)
    flat = Flatten (pooled)
    y = MatMul (flat, head)
}
"""

TWO_READERS = """
readers (float[B, S, 6] x, float[6, 8] w, float[8, 5] v1, float[8, 4] v2) => (float[B, S, 5] y, float[B, S, 4] z)
{
    g = MatMul (x, w)
    h = Relu (g)
    y = MatMul (h, v1)
    z = MatMul (h, v2)
}
"""

EXPERTS = """
experts (float[B, 6] x, float[6, 8] w1, float[6, 8] w2, float[2, 8, 5] down) => (float[B, 5] y)
{
    zero = Constant <value_ints = [0]> ()
    d1, d2 = Split <axis = 0, num_outputs = 2> (down)
    down1 = Squeeze (d1, zero)
    down2 = Squeeze (d2, zero)
    g1 = MatMul (x, w1)
    h1 = Relu (g1)
    g2 = MatMul (x, w2)
    h2 = Gelu (g2)
    y1 = MatMul (h1, down1)
    y2 = MatMul (h2, down2)
    y = Add (y1, y2)
}
"""

CACHED = """
cached (float[B, 2, S, 8] x, float[B, 2, 1, 8] step, float[B, 2, T, 8] past, float[B, 2, U, 8] v)
    => (float[B, 2, S, 8] y, float[B, 2, U, 8] present)
{
    present = Concat <axis = 2> (past, step)
    kt = Transpose <perm = [0, 1, 3, 2]> (present)
    scores = MatMul (x, kt)
    shares = Softmax <axis = -1> (scores)
    y = MatMul (shares, v)
}
"""

CONVOLUTION_PAIR = """
pair (float[B, 3, 6, 6] x, float[8, 3, 3, 3] k1, float[8] b1, float[4, 8, 3, 3] k2) => (float[B, 4, 4, 4] y)
{
    c = Conv <kernel_shape = [3, 3]> (x, k1, b1)
    r = Relu (c)
    y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, k2)
}
"""

EVEN = {"g1": [1.0] * 8, "g2": [0.5] * 8, "g3": [1.5] * 8}
"""Constant γ, which may stay in the norms of a tied network."""


def planted(shape: tuple[int, ...], axis: int, *copies: tuple[int, int, float], dead: Sequence[int] = ()) -> np.ndarray:
    """Numbers in which some channels are dead, and channel j is p times channel i for every copy (i, j, p)."""
    array = np.random.default_rng(3).integers(-999, 999, shape) / 256.0
    channels = np.moveaxis(array, axis, -1)
    channels[..., list(dead)] = 0.0
    for i, j, p in copies:
        channels[..., j] = p * channels[..., i]
    return array


def _dead() -> list[Case]:
    w1, b = planted((5, 8), 1, dead=(1, 6)), planted((8,), 0)
    rule = (EliminateDeadChannels(),)
    kernels = {"k1": planted((8, 3, 3, 3), 0, dead=(2, 5)), "b1": np.where(np.isin(np.arange(8), (2, 5)), -1.0, 0.5)}
    return [
        Case("gelu", MLP.format(activation="r = Gelu (a)"), rule, weights={"w1": w1, "b": b}),
        Case("silu", MLP.format(activation="s = Sigmoid (a) r = Mul (a, s)"), rule, weights={"w1": w1, "b": b}),
        Case("gate", GATED, rule, weights={"gate": planted((5, 12), 1, dead=(1, 2)), "up": planted((5, 12), 1)}),
        Case("kernels", CONVOLUTION_PAIR, rule, weights=kernels),
    ]


def _duplicates() -> list[Case]:
    twice = ((1, 6, 2.0), (2, 4, 1.0))
    rule = (MergeDuplicateChannels(),)
    relu = {"w1": planted((5, 8), 1, *twice), "b": planted((8,), 0, *twice)}
    same = {"w1": planted((5, 8), 1, (1, 6, 1.0)), "b": planted((8,), 0, (1, 6, 1.0))}
    kernels = {"k1": planted((8, 3, 3, 3), 0, *twice), "b1": planted((8,), 0, *twice)}
    return [
        Case("relu", MLP.format(activation="r = Relu (a)"), rule, weights=relu),
        Case("gelu", MLP.format(activation="r = Gelu (a)"), rule, weights=same),
        Case("kernels", CONVOLUTION_PAIR, rule, weights=kernels),
    ]


def _heads(rule: Pass[Any], *names: str) -> list[Case]:
    return [
        Case(name, HEADS[name], (rule,), ("x", "angles") if "angles" in HEADS[name] else ("x",))
        for name in names or HEADS
    ]


def _turned(rule: Pass[Any]) -> list[Case]:
    return [
        Case("tied", TIED, (rule,), ("ids",), EVEN),
        Case("tied, folded", PRE_LN, (*FOLDED, rule), ("ids",)),
        Case("mixture", MIXTURE, (*FOLDED, rule), ("ids",)),
        Case("tokens", TOKENS, (*FOLDED, rule)),
    ]


PARAMETRIZED = """
parametrized (float[B, 4] x, float[6, 4] v1, float[6, 1] g1, float[6] b1, float[6, 5] w2, float[6, 2] a2,
              float[2, 5] b2, float[6] u3, float[5] v3) => (float[B, 5] y)
{
    columns = Constant <value_ints = [1]> ()
    size = ReduceL2 (v1, columns)
    ratio = Div (g1, size)
    normed = Mul (v1, ratio)
    w1 = Transpose <perm = [1, 0]> (normed)
    p = MatMul (x, w1)
    h = Add (p, b1)
    t = Tanh (h)
    half = Constant <value_float = 0.5> ()
    update = MatMul (a2, b2)
    part = Mul (update, half)
    adapted = Add (w2, part)
    wv = MatMul (adapted, v3)
    sigma = MatMul (u3, wv)
    w = Div (adapted, sigma)
    y = MatMul (t, w)
}
"""
"""A matrix with weight normalization, and one with a low-rank update and spectral normalization."""

SPLIT = """
split (float[B, S, 24] x, float[24, 16] q, float[16] b, float[24, 12] k, float[20, 24] v, float[20, 16] o)
    => (float[B, S, 16] y, float[B, S, 12] z, float[B, S, 16] u)
{
    p = MatMul (x, q)
    y = Add (b, p)
    z = MatMul (x, k)
    vt = Transpose <perm = [1, 0]> (v)
    h = MatMul (x, vt)
    r = Relu (h)
    u = MatMul (r, o)
}
"""
"""Three products of one value and one of another, with a bias, without, transposed, and behind a Relu."""


def outliers(size: int, *channels: int) -> ChannelRange:
    """A range of 1 in all channels but those that have outliers."""
    magnitude = np.where(np.isin(np.arange(size), channels), 50.0, 1.0)
    return ChannelRange(-magnitude, magnitude)


def _split() -> list[Case]:
    statistics = {"x": outliers(24, 2, 17), "r": outliers(20, 5)}
    tall = SPLIT.replace("float[B, S, 24] x", "float[2, 3, S, 24] x").replace("=> (float[B, S", "=> (float[2, 3, S")
    tall = tall.replace(", float[B, S", ", float[2, 3, S")
    rule = SplitOutliers(minimum=256, most=0.1, statistics=statistics)
    return [
        Case("three readers", SPLIT, (rule,)),
        Case("four axes", tall, (rule,)),
        Case("one of two values", SPLIT, (replace(rule, statistics={"r": statistics["r"]}),)),
    ]


CASES: dict[str, Callable[[], list[Case]]] = {
    "fold-parametrization": lambda: [Case("normed and adapted", PARAMETRIZED, (FoldParametrization(),))],
    "fold-scale": lambda: [Case("layer scale", LAYER_SCALE, (FoldScale(),))],
    "fold-batchnorm": lambda: [Case(name, text, (FoldBatchnorm(),), weights=SPREAD) for name, text in NORMED.items()],
    "merge-affine": lambda: [
        Case(name, text, (MergeAffine(),), weights=PAIR_WEIGHTS.get(name, {})) for name, (text, _) in PAIRS.items()
    ],
    "merge-branches": lambda: [
        Case(name, text, (MergeBranches(),), ("x", "z"), weights) for name, (text, _, weights) in BLOCKS.items()
    ],
    "eliminate-dead-channels": _dead,
    "merge-duplicate-channels": _duplicates,
    "center-residual": lambda: [
        Case("tied", PRE_LN, (CenterResidual(),), ("ids",)),
        Case("tokens", TOKENS, (CenterResidual(),)),
    ],
    "fold-norm": lambda: [
        Case("tied", PRE_LN, (CenterResidual(), FoldNorm()), ("ids",)),
        Case("block", BLOCK, (FoldNorm(),)),
        Case("mixture", MIXTURE, (FoldNorm(),), ("ids",)),
    ],
    "compress-residual": lambda: [
        Case("tied", PRE_LN, (*FOLDED, CompressResidual()), ("ids",)),
        Case("tokens", TOKENS, (*FOLDED, CompressResidual())),
    ],
    "rotate-residual": lambda: [
        *_turned(RotateResidual(seed=3)),
        Case("after compressing", PRE_LN, (*FOLDED, CompressResidual(), RotateResidual(seed=4)), ("ids",)),
    ],
    "stabilize-norm": lambda: [Case("stream", STREAM, (StabilizeNorm(scale=0.25),), ("ids",))],
    "rotate-heads": lambda: _heads(RotateHeads()),
    "scale-heads": lambda: _heads(ScaleHeads()),
    "affine-heads": lambda: _heads(AffineHeads()),
    "scale-query-key": lambda: _heads(ScaleQueryKey()),
    "smooth": lambda: [
        *[Case(f"block, {rule.shift}", BLOCK, (rule,)) for rule in (Smooth(), Smooth(shift=True))],
        Case("biases", BIASED, (Smooth(shift=True),)),
        Case("patches", PATCHES, (Smooth(),)),
        Case("stack", STACK, (Smooth(),)),
    ],
    "equalize": lambda: [
        Case("relu", MLP.format(activation="r = Relu (a)"), (Equalize(),)),
        Case("gate", GATED, (Equalize(),)),
        Case("fused", FUSED, (Equalize(),)),
        Case("convolutions", CONVOLUTIONS, (Equalize(),), weights={"var": [0.5, 1.0, 1.5, 2.0]}),
    ],
    "reparameterize-norm-scale": lambda: [
        Case("block", BLOCK, (ReparameterizeNormScale(),)),
        Case("biases", BIASED, (ReparameterizeNormScale(),)),
        Case("stack", STACK, (ReparameterizeNormScale(),)),
    ],
    "rotate-online": lambda: [
        Case("gate", GATED, (RotateOnline(),)),
        Case("two readers", TWO_READERS, (RotateOnline(),)),
        Case("experts", EXPERTS, (RotateOnline(),)),
        Case("a cache", CACHED, (RotateOnline(),), ("x", "step", "past", "v")),
        *_heads(RotateOnline(min_size=4), "grouped queries, half-split rotary", "written out"),
    ],
    "split-outliers": _split,
}
"""Name of a pass → networks on which it applies."""
