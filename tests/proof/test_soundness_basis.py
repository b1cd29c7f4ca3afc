# ruff: noqa: E501 - a model a line
"""Wrong pairs around changes of basis: certificates that lie, and what the proof knows of maps, numbers and sizes.

Claims and transforms come from a file, so whatever they say must not make two different functions EQUAL. Every pair is
evaluated in float64 first, and stands beside one that is true. `xfail` marks what the proof does not refuse yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from pairs import COARSE, ROUNDING, by_standard, computed, departure, feed, model

from rewrite.proof import Proof, prove
from rewrite.proof import transforms as t

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
"""A warning turned into an error would stop the proof, and look like a refusal."""

Steps = Sequence[tuple[str, int]]
R = np.random.default_rng(11)


def normal(*shape: int) -> np.ndarray:
    return R.normal(size=shape).astype(np.float32)


def single(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


def wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float64)


@dataclass(frozen=True)
class Pair:
    """Two models of ONNX text, or one text for both; `claims` give the steps of a value's relation."""

    original: str
    rewritten: str
    weights: Mapping[str, object] = field(default_factory=dict)
    others: Mapping[str, object] | None = None
    claims: Mapping[str, Steps] = field(default_factory=dict)
    transforms: Mapping[str, t.Step] = field(default_factory=dict)
    inputs: Mapping[str, np.ndarray] | None = None
    opset: int = 23
    ulps: float = 1.0
    declared: bool = False

    def models(self) -> tuple[ir.Model, ir.Model]:
        ours = self.weights if self.others is None else self.others
        both = ((self.original, self.weights), (self.rewritten, ours))
        first, second = (
            model(
                text,
                {name: np.asarray(value) for name, value in weights.items()},
                opset=self.opset,
                declared=self.declared,
            )
            for text, weights in both
        )
        return first, second

    def fed(self, original: ir.Model) -> Mapping[str, np.ndarray]:
        return self.inputs if self.inputs is not None else feed(original, {"B": 16})

    def proof(self) -> Proof:
        original, rewritten = self.models()
        claims = {
            name: {"steps": [{"transform": step, "axis": axis} for step, axis in steps]}
            for name, steps in self.claims.items()
        }
        return prove(original, rewritten, claims=claims, transforms=self.transforms, ulps=self.ulps)

    def apart(self, *, standard: bool = False) -> float:
        first, second = self.models()
        evaluate = by_standard if standard else computed
        inputs = self.fed(first)
        return departure(evaluate(first, inputs), evaluate(second, inputs))


def alike(text: str, weights: Mapping[str, object], others: Mapping[str, object], **more: object) -> Pair:
    return Pair(text, text, weights, {**weights, **others}, **more)  # type: ignore[arg-type]


WRONG: dict[str, Pair] = {}
RIGHT: dict[str, Pair] = {}

# ── Pairings ────────────────────────────────────────────────────────────────────────────────────────────────────────

SCORES = "(float[3,4] x) => (float[3,3] y) { q = MatMul(x, wq) k = MatMul(x, wk) kt = Transpose<perm=[1,0]>(k) y = MatMul(q, kt) }"
WQ, WK = normal(4, 4), normal(4, 4)


def scores(mine: t.Transform, theirs: t.Transform) -> Pair:
    """Queries times `mine`, keys times `theirs`, as the certificate says."""
    turned = {"wq": single(mine.apply(wide(WQ))), "wk": single(theirs.apply(wide(WK)))}
    given = {"wq": WQ, "wk": WK}
    return alike(
        SCORES, given, turned, claims={"q": [("m", -1)], "k": [("n", -1)]}, transforms={"m": mine, "n": theirs}
    )


DIAGONAL = t.Scaling(np.array([2.0, -0.5, 3.0, 1.25]))
GENERAL = t.Invertible(wide(normal(4, 4)) + 3 * np.eye(4))
TURN = t.Orthogonal(np.linalg.qr(wide(normal(4, 4)))[0])
for name, transform in {
    "a scaling": DIAGONAL,
    "a general map": GENERAL,
    "an orthogonal map": TURN,
    "a Hadamard matrix": t.Hadamard(4, seed=3),
    "a permutation": t.Selection(4, (2, 0, 3, 1)),
}.items():
    RIGHT[f"{name} and its dual on queries and keys"] = scores(transform, transform.dual)
WRONG["a scaling on queries and keys alike"] = scores(DIAGONAL, DIAGONAL)
WRONG["a general map and its inverse on queries and keys"] = scores(GENERAL, GENERAL.inverse)
WRONG["two orthogonal maps on queries and keys"] = scores(TURN, TURN.inverse)
WRONG["two permutations on queries and keys"] = scores(t.Selection(4, (2, 0, 3, 1)), t.Selection(4, (1, 3, 0, 2)))
WRONG["two seeds on queries and keys"] = scores(t.Hadamard(4, seed=3), t.Hadamard(4, seed=5))
WRONG["a selection has no inverse"] = scores(t.Selection(4, (0, 2)), t.Selection(4, (0, 2)))
WRONG["a square selection has no inverse"] = scores(t.Selection(4, (0, 0, 1, 1)), t.Selection(4, (0, 0, 1, 1)))
WRONG["a repeated selection has no inverse"] = scores(
    t.Repeated(t.Selection(2, (0, 0)), 2), t.Repeated(t.Selection(2, (0, 0)), 2)
)
WRONG["an isometry has no inverse"] = scores(t.Isometry(4), t.Isometry(4).dual)

# Heads. T acts on heads and channels jointly, another block for every head.
HEADS = t.Scaling(np.exp(R.normal(size=8)))
PROJECTED = {"wq": normal(5, 8), "wk": normal(5, 8), "s": [1, 3, 2, 4]}


def headed(text: str, mine: t.Transform, theirs: t.Transform, given: Mapping[str, object]) -> Pair:
    turned = {
        "wq": single(mine.apply(wide(np.asarray(given["wq"])))),
        "wk": single(theirs.apply(wide(np.asarray(given["wk"])))),
    }
    return alike(text, given, turned, claims={"q": [("m", -1)], "k": [("n", -1)]}, transforms={"m": mine, "n": theirs})


BOTH = "(float[1,3,5] x) => (y) { q = MatMul(x, wq) k = MatMul(x, wk) qr = Reshape(q, s) kr = Reshape(k, s) "
SAME = BOTH + "qt = Transpose<perm=[0,2,1,3]>(qr) kt = Transpose<perm=[0,2,3,1]>(kr) y = MatMul(qt, kt) }"
RIGHT["one map for each head"] = headed(SAME, HEADS, HEADS.dual, PROJECTED)
WRONG["maps of heads in another order"] = headed(SAME, HEADS, t.Scaling(np.roll(HEADS.values, 4)).dual, PROJECTED)
WRONG["heads that meet other heads"] = headed(
    BOTH + "qt = Transpose<perm=[0,2,1,3]>(qr) kt = Transpose<perm=[0,2,3,1]>(kr) ku = Unsqueeze(kt, two) y = MatMul(qt, ku) }",
    HEADS, HEADS.dual, {**PROJECTED, "two": [2]},
)  # fmt: skip
WRONG["heads that meet other heads, unclaimed"] = Pair(
    **{**WRONG["heads that meet other heads"].__dict__, "claims": {}, "transforms": {}}
)
SPLIT = t.Scaling(np.exp(R.normal(size=16)))
APART = {"wq": normal(5, 16), "wk": normal(5, 16), "s": [2, 3, 2, 2, 4]}
PARTS = "(float[2,3,5] x) => (float[2,2,2,3,3] y) { q = MatMul(x, wq) k = MatMul(x, wk) qr = Reshape(q, s) kr = Reshape(k, s) "
WRONG["heads of which a part is the batch of others"] = headed(
    PARTS + "qt = Transpose<perm=[3,2,0,1,4]>(qr) kt = Transpose<perm=[3,0,2,4,1]>(kr) y = MatMul(qt, kt) }",
    SPLIT, SPLIT.dual, APART,
)  # fmt: skip
GROUPED = {
    "wq": normal(5, 16),
    "wk": normal(5, 8),
    "s": [1, 3, 4, 4],
    "r": [1, 3, 2, 4],
    "n": [1, 2, 2, 3, 4],
    "m": [1, 4, 3, 4],
    "two": [2],
    "one": [1],
}
GQA = (
    "(float[1,3,5] x) => (y) {{ q = MatMul(x, wq) k = MatMul(x, wk) qr = Reshape(q, s) kr = Reshape(k, r)"
    " qt = Transpose<perm=[0,2,1,3]>(qr) kt = Transpose<perm=[0,2,1,3]>(kr) ku = Unsqueeze(kt, {}) ke = Expand(ku, n)"
    " kf = Reshape(ke, m) ks = Transpose<perm=[0,1,3,2]>(kf) y = MatMul(qt, ks) }}"
)
GROUPS = t.Scaling(np.repeat(HEADS.values.reshape(2, 4), 2, 0).reshape(-1))
RIGHT["one map for each group of heads"] = headed(GQA.format("two"), GROUPS, HEADS.dual, GROUPED)
WRONG["one map for each group, heads tiled"] = headed(GQA.format("one"), GROUPS, HEADS.dual, GROUPED)
WRONG["queries of a group mapped differently"] = headed(
    GQA.format("two"), t.Scaling(np.exp(R.normal(size=16))), HEADS.dual, GROUPED
)

# ── Nonlinear operators ─────────────────────────────────────────────────────────────────────────────────────────────

A, B, C = normal(5, 4), normal(4, 3), normal(4)
POSITIVE = t.Scaling(np.array([2.0, 0.5, 4.0, 1.25]))


def between(function: str, transform: t.Transform, *, behind: t.Transform | None = None, **more: object) -> Pair:
    """f between two products, the writer times T and the reader T⁻¹·W; `h` is claimed to be h·T."""
    text = f"(float[B,5] x) => (float[B,3] y) {{ h = MatMul(x, a) f = {function} y = MatMul(f, b) }}"
    others = {"a": single(transform.apply(wide(A))), "b": single((behind or transform).dual.apply(wide(B), 0))}
    given = {
        "a": A,
        "b": B,
        "g": np.ones(4),
        "gamma": C,
        "lo": np.float32(-0.5),
        "hi": np.float32(0.5),
        "u": single(np.abs(C) + 0.1),
    }
    given = {k: single(v) for k, v in given.items()}
    return alike(text, given, others, claims={"h": [("m", -1)]}, transforms={"m": transform}, **more)


SHUFFLE = t.Selection(4, (2, 0, 3, 1))
RIGHT["Relu and a positive scaling"] = between("Relu(h)", POSITIVE)
RIGHT["LeakyRelu and a positive scaling"] = between("LeakyRelu<alpha=-0.5>(h)", POSITIVE)
RIGHT["Gelu and a permutation"] = between("Gelu(h)", SHUFFLE)
RIGHT["Clip and a permutation"] = between("Clip(h, lo, hi)", SHUFFLE)
RIGHT["RMS and an orthogonal map"] = between("RMSNormalization<epsilon=0.1>(h, g)", TURN)
RIGHT["RMS and a permutation"] = between("RMSNormalization<epsilon=0.1>(h, g)", SHUFFLE)
for function, transform in {
    "Relu(h)": DIAGONAL,
    "LeakyRelu<alpha=0.1>(h)": DIAGONAL,
    "Abs(h)": DIAGONAL,
    "Gelu(h)": POSITIVE,
    "Tanh(h)": DIAGONAL,
    "Sigmoid(h)": POSITIVE,
    "Elu(h)": POSITIVE,
    "Softplus(h)": POSITIVE,
    "HardSwish(h)": POSITIVE,
    "ThresholdedRelu(h)": POSITIVE,
    "Clip(h, lo, hi)": POSITIVE,
    "PRelu(h, u)": SHUFFLE,
    "Softmax(h)": POSITIVE,
    "LogSoftmax(h)": TURN,
    "RMSNormalization<epsilon=0.1>(h, gamma)": SHUFFLE,
    "LayerNormalization<epsilon=0.1>(h, g)": TURN,
    "LayerNormalization<epsilon=0.1>(h, gamma)": SHUFFLE,
    "Mul(h, u)": SHUFFLE,
    "Mul(h, h)": TURN,
    "CumSum(h, axis)": SHUFFLE,
}.items():
    pair = between(function, transform)
    WRONG[f"{function} and {transform.kind}"] = Pair(
        **{**pair.__dict__, **{side: {**getattr(pair, side), "axis": np.int64(1)} for side in ("weights", "others")}}
    )  # type: ignore[dict-item]
WRONG["RMS and a general map"] = between("RMSNormalization<epsilon=0.1>(h, g)", GENERAL)
WRONG["RMS and a scaling"] = between("RMSNormalization<epsilon=0.1>(h, g)", DIAGONAL)
WRONG["RMS and a Hadamard matrix that is not orthogonal"] = between(
    "RMSNormalization<epsilon=0.1>(h, g)", t.Hadamard(4, 3, 0.25)
)
WRONG["RMS and a number, with the same epsilon"] = between(
    "RMSNormalization<epsilon=0.1>(h, g)", t.Scaling(np.full(4, 2.0)), behind=t.Scaling(np.ones(4))
)
WRONG["RMS and a square selection"] = between("RMSNormalization<epsilon=0.1>(h, g)", t.Selection(4, (0, 0, 1, 1)))
WRONG["RMS and a number that is negative"] = between(
    "RMSNormalization<epsilon=0.1>(h, g)", t.Scaling(np.full(4, -1.0)), behind=t.Scaling(np.ones(4))
)
WRONG["an isometry onto what is not centred"] = between("RMSNormalization<epsilon=0.1>(h, g)", t.Isometry(4))
for name in ("an isometry onto what is not centred",):
    pair = WRONG[name]
    WRONG[name] = Pair(**{**pair.__dict__, "others": {**pair.others, "g": np.ones(3, np.float32)}})  # type: ignore[dict-item]

POOL = "(float[1,4,4,4] x) => (y) {{ h = Conv(x, k) f = {} y = Conv(f, m) }}"


def pooled(function: str, transform: t.Transform) -> Pair:
    k, m = normal(4, 4, 1, 1), normal(3, 4, 1, 1)
    others = {"k": single(transform.apply(wide(k), 0)), "m": single(transform.dual.apply(wide(m), 1))}
    text = POOL.format(function)
    return alike(text, {"k": k, "m": m}, others, claims={"h": [("t", 1)]}, transforms={"t": transform}, declared=True)


PADDED = "AveragePool<kernel_shape=[2,2], pads=[1,1,1,1]>(h)"
RIGHT["an average of any map of channels"] = pooled(PADDED, TURN)
RIGHT["a maximum of a positive scaling"] = pooled("MaxPool<kernel_shape=[2,2], pads=[1,1,1,1]>(h)", POSITIVE)
WRONG["a maximum of a signed scaling"] = pooled("MaxPool<kernel_shape=[2,2]>(h)", DIAGONAL)
WRONG["a maximum of a turn"] = pooled("GlobalMaxPool(h)", TURN)

# ── Rotary pairs ────────────────────────────────────────────────────────────────────────────────────────────────────

TURNED = BOTH + (
    "qt = Transpose<perm=[0,2,1,3]>(qr) kt = Transpose<perm=[0,2,1,3]>(kr) qo = RotaryEmbedding(qt, c, e)"
    " ko = RotaryEmbedding(kt, c, e) kv = Transpose<perm=[0,1,3,2]>(ko) y = MatMul(qo, kv) }"
)
ANGLES = np.outer(np.arange(3), [1.0, 0.3])[None]
ROTARY = {**PROJECTED, "c": single(np.cos(ANGLES)), "e": single(np.sin(ANGLES))}
PAIRED = t.Scaling(np.array([2.0, 0.5, 2.0, 0.5, 4.0, 1.0, 4.0, 1.0]))
RIGHT["scales alike inside each rotary pair"] = headed(TURNED, PAIRED, PAIRED.dual, ROTARY)
WRONG["scales that differ inside a rotary pair"] = headed(TURNED, HEADS, HEADS.dual, ROTARY)
INTERLEAVED = t.Scaling(np.array([2.0, 2.0, 0.5, 0.5, 4.0, 4.0, 1.0, 1.0]))
WRONG["scales of interleaved pairs on halves"] = headed(TURNED, INTERLEAVED, INTERLEAVED.dual, ROTARY)
WRONG["a rotation of channels before rotary angles"] = headed(
    TURNED, t.Repeated(t.Hadamard(4), 2), t.Repeated(t.Hadamard(4), 2), ROTARY
)

# ── Widths ──────────────────────────────────────────────────────────────────────────────────────────────────────────

WRONG["one channel times a value that is wider"] = Pair(
    "(float[B,4] x, float[B,1] s) => (float[B,4] y) { v = MatMul(x, w) y = Identity(x) }",
    "(float[B,4] x, float[B,1] s) => (float[B,4] y) { v = MatMul(x, w) e = Expand(s, n) p = Mul(v, e) k = Shape<start=1>(p) f = Cast<to=1>(k) y = Mul(x, f) }",
    {"w": WQ, "n": [1, 4]}, {"w": WQ[:, :1].copy(), "n": [1, 4]},
    {"v": [("m", -1)]}, {"m": t.Selection(4, (0,))},
)  # fmt: skip

# ── Channels that depend on others ──────────────────────────────────────────────────────────────────────────────────


def reduced(function: str, still: float, first: np.ndarray, kept: tuple[int, ...], bias: np.ndarray) -> Pair:
    """Channel 2 of three is left out; `bias` is what the reader adds for it."""
    shift, reader = np.array([0.1, 0.2, still], np.float32), normal(3, 4)
    text = f"(float[B,4] x) => (float[B,4] y) {{ p = MatMul(x, a) h = Add(p, s) f = {function} u = MatMul(f, b) y = Add(u, z) }}"
    given = {"a": first, "s": shift, "b": reader, "z": normal(4), "lo": np.float32(0), "hi": np.float32(1)}
    mine = {
        "a": first[:, kept].copy(),
        "s": shift[list(kept)],
        "b": reader[list(kept)],
        "z": given["z"] + single(bias @ reader),
    }
    return alike(text, given, mine, claims={"h": [("m", -1)]}, transforms={"m": t.Selection(3, kept)})


FIRST = normal(4, 3)
FIRST[:, 2] = 0
for function, value in {"Relu(h)": 5.0, "Tanh(h)": np.tanh(5.0), "Clip(h, lo, hi)": 1.0}.items():
    RIGHT[f"a constant channel of {function}"] = reduced(function, 5.0, FIRST, (0, 1), np.array([0, 0, value]))
    WRONG[f"a constant channel of {function} is not nothing"] = reduced(function, 5.0, FIRST, (0, 1), np.zeros(3))
WRONG["a constant channel of Tanh is not itself"] = reduced("Tanh(h)", 5.0, FIRST, (0, 1), np.array([0, 0, 5.0]))
WRONG["a constant channel of Clip is not itself"] = reduced(
    "Clip(h, lo, hi)", 5.0, FIRST, (0, 1), np.array([0, 0, 5.0])
)
WRONG["a channel that is not constant is left out"] = reduced("Relu(h)", 0.0, normal(4, 3), (0, 1), np.zeros(3))

TWIN = "(float[B,4] x) => (float[B,4] y) {{ h = MatMul(x, a) f = {} y = MatMul(f, b) }}"


def twins(function: str, ratio: float, counted: float) -> Pair:
    """h₂ = ratio·h₀; the reader counts f(h₀) `counted` times for it."""
    first, reader = normal(4, 3), normal(3, 4)
    first[:, 2] = np.float32(ratio) * first[:, 0]
    mine = reader[:2].copy()
    mine[0] += np.float32(counted) * reader[2]
    return alike(
        TWIN.format(function),
        {"a": first, "b": reader},
        {"a": first[:, :2].copy(), "b": mine},
        claims={"h": [("m", -1)]},
        transforms={"m": t.Selection(3, (0, 1))},
    )


RIGHT["a channel in proportion to another, of Relu"] = twins("Relu(h)", 2.0, 2.0)
RIGHT["a channel twice, of Tanh"] = twins("Tanh(h)", 1.0, 1.0)
WRONG["a channel in proportion to another, of Tanh"] = twins("Tanh(h)", 2.0, 2.0)
WRONG["a channel that is another's negative, of Relu"] = twins("Relu(h)", -1.0, -1.0)
WRONG["a channel in proportion to another, counted once"] = twins("Relu(h)", 2.0, 1.0)

# ── Certificates ────────────────────────────────────────────────────────────────────────────────────────────────────


def claimed(steps: Steps, transforms: Mapping[str, t.Step], a: np.ndarray, b: np.ndarray) -> Pair:
    text = "(float[B,5] x) => (float[B,3] y) { h = MatMul(x, a) y = MatMul(h, b) }"
    return alike(text, {"a": A, "b": B}, {"a": single(a), "b": single(b)}, claims={"h": steps}, transforms=transforms)


RIGHT["two steps one after the other"] = claimed(
    [("p", -1), ("q", -1)], {"p": DIAGONAL, "q": TURN},
    TURN.apply(DIAGONAL.apply(wide(A))), TURN.dual.apply(DIAGONAL.dual.apply(wide(B), 0), 0),
)  # fmt: skip
WRONG["two steps in the other order"] = claimed(
    [("q", -1), ("p", -1)], {"p": DIAGONAL, "q": TURN},
    DIAGONAL.apply(TURN.apply(wide(A))), TURN.dual.apply(DIAGONAL.dual.apply(wide(B), 0), 0),
)  # fmt: skip
WRONG["a writer that is mapped and a reader that is not"] = claimed([("q", -1)], {"q": TURN}, TURN.apply(wide(A)), B)
WRONG["an inverse on the reader in place of a dual"] = claimed(
    [("g", -1)], {"g": GENERAL}, GENERAL.apply(wide(A)), GENERAL.apply(wide(B), 0)
)


RIGHT["a map that is well conditioned"] = claimed(
    [("g", -1)], {"g": GENERAL}, GENERAL.apply(wide(A)), GENERAL.dual.apply(wide(B), 0)
)

# ── Numbers and their ulps ──────────────────────────────────────────────────────────────────────────────────────────

PRODUCT = "(float[B,4] x) => (float[B,4] y) { y = MatMul(x, w) }"
WRONG["huge matrices that cancel"] = Pair(
    PRODUCT, "(float[B,4] x) => (float[B,4] y) { a = MatMul(x, p) b = MatMul(x, q) y = Add(a, b) }",
    {"w": WQ}, {"p": np.full((4, 4), 1e8, np.float32), "q": np.full((4, 4), -1e8, np.float32)},
)  # fmt: skip
RIGHT["two matrices that are one"] = Pair(
    PRODUCT, "(float[B,4] x) => (float[B,4] y) { a = MatMul(x, p) b = MatMul(x, q) y = Add(a, b) }",
    {"w": WQ}, {"p": WQ * 2, "q": -WQ},
)  # fmt: skip
WRONG["huge biases that cancel"] = Pair(
    "(float[B,4] x) => (float[B,4] y) { y = Add(x, b) }",
    "(float[B,4] x) => (float[B,4] y) { a = Add(x, p) y = Sub(a, q) }",
    {"b": C}, {"p": np.full(4, 1e8, np.float32), "q": np.full(4, 1e8, np.float32)},
)  # fmt: skip
WRONG["zeros of float16 times a large number"] = Pair(
    PRODUCT, "(float[B,4] x) => (float[B,4] y) { f = Cast<to=1>(h) a = MatMul(x, f) y = Mul(a, c) }",
    {"w": WQ}, {"h": np.zeros((4, 4), np.float16), "c": np.float32(1e8)},
)  # fmt: skip
WRONG["zeros of float32 times two large numbers"] = Pair(
    PRODUCT, "(float[B,4] x) => (float[B,4] y) { a = MatMul(x, h) b = Mul(a, c) y = Mul(b, d) }",
    {"w": WQ}, {"h": np.zeros((4, 4), np.float32), "c": np.float32(1e38), "d": np.float32(1e8)},
)  # fmt: skip

TWO = "(double[B] x) => (double[B] y, double[B] z) {{ {} y = Tanh(a) {} z = Exp(b) }}"
WRONG["a number of few digits lends its ulp to another"] = Pair(
    TWO.format("a = Mul(x, c)", "b = Mul(x, d)"),
    TWO.format("h = Cast<to=11>(a16) u = Mul(x, h) a = Mul(u, z64)", "b = Mul(x, h)"),
    {"c": 1.25 * 1.5 * (1 + 3e-4), "d": 1.25}, {"a16": np.float16(1.25), "z64": 1.5},
)  # fmt: skip
RIGHT["a number of few digits and another"] = Pair(
    TWO.format("a = Mul(x, c)", "b = Mul(x, d)"),
    TWO.format("h = Cast<to=11>(a16) u = Mul(x, h) a = Mul(u, z64)", "b = Mul(x, h)"),
    {"c": 1.25 * 1.5, "d": 1.25}, {"a16": np.float16(1.25), "z64": 1.5},
)  # fmt: skip
WRONG["a zero of few digits lends its ulp to another number"] = Pair(
    "(double[B] x) => (double[B] y) { a = Mul(x, c) y = Tanh(a) }",
    "(double[B] x) => (double[B] y) { h = Cast<to=11>(z) u = Mul(x, c) v = Mul(x, h) a = Add(u, v) y = Tanh(a) }",
    {"c": 1.5}, {"c": 1.5 * (1 + 3e-4), "z": np.float16(0)},
)  # fmt: skip
WRONG["a number and one over it are one number"] = Pair(
    TWO.format("a = Mul(x, c)", "b = Mul(x, c)"), TWO.format("h = Cast<to=11>(c) a = Mul(x, h)", "b = Div(x, h)"),
    {"c": 1.0004}, {"c": np.float16(1)},
)  # fmt: skip
ATTENDED = "(double[1,2,3,4] x) => (double[1,2,3,4] y) { q = Mul(x, c) y = Attention(q, x, x) }"
WRONG["an operator's own number lends its ulp to a double"] = Pair(
    ATTENDED, ATTENDED, {"c": 1.5}, {"c": 1.5 * (1 + 4e-8)}
)

# ── What is defined ─────────────────────────────────────────────────────────────────────────────────────────────────

WRONG["a value that nobody reads need not be defined"] = Pair(
    "(float[B] x) => (float[B] y) { r = Log(x) y = Identity(x) }",
    "(float[B] x) => (float[B] y) { r = Log(x) d = Sub(r, r) y = Add(x, d) }",
)
WRONG["a value that is masked need not be defined"] = Pair(
    "(float[B] x) => (float[B] y) { c = Less(x, z) r = Log(x) y = Where(c, z, r) }",
    "(float[B] x) => (float[B] y) { c = Less(x, z) r = Log(x) u = Where(c, z, r) d = Sub(r, r) y = Add(u, d) }",
    {"z": np.float32(0)},
)
RIGHT["a value that cancels and is read"] = Pair(
    "(float[B] x) => (float[B] y) { r = Exp(x) y = Add(x, r) }",
    "(float[B] x) => (float[B] y) { r = Exp(x) d = Sub(r, r) u = Add(x, r) y = Add(u, d) }",
)
LOCAL = '(float[B,4] x) => (float[B,4] y) {{ y = com.microsoft.Gelu(x) }}\n<domain: "com.microsoft", opset_import: ["" : 23]> Gelu (a) => (b) {{ b = {}(a) }}'
WRONG["a function by the name of a known operator"] = Pair(LOCAL.format("Sigmoid"), LOCAL.format("Tanh"))
DROPPED = "(float[B,99] x) => (float[B,99] y, float[B,99] z) {{ y = Dropout(x, r, on) z = {} }}"
WRONG["dropout in training is random"] = Pair(
    DROPPED.format("Dropout(x, r, on)"), DROPPED.format("Identity(y)"), {"r": np.float32(0.5), "on": True}
)
WRONG["sizes that overflow"] = Pair(
    "(float[B] x) => (int64[1] y) { n = Shape(x) m = Mul(n, c) y = Div(m, c) }",
    "(float[B] x) => (int64[1] y) { y = Shape(x) }", {"c": [2**62]},
)  # fmt: skip
RIGHT["sizes that do not overflow"] = Pair(
    "(float[B] x) => (int64[1] y) { n = Shape(x) m = Mul(n, c) y = Div(m, c) }",
    "(float[B] x) => (int64[1] y) { y = Shape(x) }", {"c": [3]},
)  # fmt: skip
WRONG["a dimension whose name is a number"] = Pair(
    '(float["4"] x) => (int64[1] y) { y = Shape(x) }', '(float["4"] x) => (int64[1] y) { y = Identity(c) }',
    {"c": [4]}, inputs={"x": np.ones(3, np.float32)},
)  # fmt: skip
WRITTEN = (
    "(float[1,2,3,4] x, float[3,{0}] m) => (float[1,2,3,4] y) {{ k = Transpose<perm=[0,1,3,2]>(x) p = MatMul(x, k)"
    " s = Mul(p, half) b = Add(s, m) a = Softmax(b) y = MatMul(a, x) }}"
)
FUSED = "(float[1,2,3,4] x, float[3,{0}] m) => (float[1,2,3,4] y) {{ y = Attention(x, x, x, m) }}"
WRONG["a mask for fewer keys than there are"] = Pair(
    FUSED.format(1), WRITTEN.format(1), {"half": np.float32(0.5)}, opset=24
)
RIGHT["a mask for all keys"] = Pair(FUSED.format(3), WRITTEN.format(3), {"half": np.float32(0.5)}, opset=24)
LIKE = "(float[B] x) => (float[B] y) { q = CastLike(x, z) y = Cast<to=1>(q) }"
WRONG["a cast to what eight bits hold"] = Pair(
    LIKE, "(float[B] x) => (float[B] y) { y = Identity(x) }", {"z": np.zeros(1, ml_dtypes.float8_e4m3fn)}
)
RIGHT["a cast to what sixteen bits hold"] = Pair(
    LIKE, "(float[B] x) => (float[B] y) { y = Identity(x) }", {"z": np.zeros(1, np.float16)}
)

NOT_A_NUMBER = {"c": np.float32(np.nan)}
for operator in ("Mul", "Add", "Div"):
    text = f"(float[B,4] x) => (float[B,4] y) {{ y = {operator}(x, c) }}"
    WRONG[f"no number in place of one, {operator}"] = alike(text, {"c": np.float32(2)}, NOT_A_NUMBER)
WRONG["infinities that cancel"] = Pair(
    "(float[B,4] x) => (float[B,4] y) { y = Identity(x) }",
    "(float[B,4] x) => (float[B,4] y) { a = Mul(x, p) b = Mul(x, q) y = Add(a, b) }",
    {}, {"p": np.float32(np.inf), "q": np.float32(-np.inf)},
)  # fmt: skip
WRONG["an infinity in place of a number"] = alike(text, {"c": np.float32(2)}, {"c": np.float32(np.inf)})
WRONG["a bound that is no number"] = alike(
    "(float[B,4] x) => (float[B,4] y) { y = Clip(x, c) }", {"c": np.float32(-9)}, NOT_A_NUMBER
)
ROOT = (
    "(float[B,4] x) => (float[B,4] y) { s = Mul(x, x) m = ReduceMean(s, last) e = Add(m, c) r = Sqrt(e) y = Div(x, r) }"
)
WRONG["an epsilon that is no number"] = alike(ROOT, {"c": np.float32(1e-3), "last": [-1]}, NOT_A_NUMBER)
RIGHT["an epsilon as an attribute"] = Pair(
    ROOT, "(float[B,4] x) => (float[B,4] y) { y = RMSNormalization<epsilon=0.001>(x, g) }",
    {"c": np.float32(1e-3), "last": [-1]}, {"g": np.ones(4, np.float32)},
)  # fmt: skip
WRONG["an epsilon scaled with the channels"] = Pair(
    ROOT, "(float[B,4] x) => (float[B,4] y) { d = Mul(x, two) y = RMSNormalization<epsilon=0.001>(d, g) }",
    {"c": np.float32(1e-3), "last": [-1]}, {"g": np.ones(4, np.float32), "two": np.float32(2)},
)  # fmt: skip

# Names of dimensions are those of the proof's own sizes.
WRONG["a dimension that is named like a broadcast"] = Pair(
    '(float["broadcast(B,S)"] x, float[B] z, float[S] w) => (int64[1] y) { d = Add(z, w) u = Add(x, z) y = Shape(u) }',
    '(float["broadcast(B,S)"] x, float[B] z, float[S] w) => (int64[1] y) { y = Shape(x) }',
    inputs={"x": np.ones(1, np.float32), "z": np.ones(3, np.float32), "w": np.ones(3, np.float32)},
)

# ── A declared tolerance ────────────────────────────────────────────────────────────────────────────────────────────

NEARLY = WQ.copy()
NEARLY[1, 2] *= 1.001
WRONG["a tolerance of 64 ulps does not hide 8,000"] = Pair(PRODUCT, PRODUCT, {"w": WQ}, {"w": NEARLY}, ulps=64.0)
SUMMED = "(float[B,4] x) => (float[B,4] y) { a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b) }"
WRONG["a tolerance is counted at the terms of the original"] = Pair(
    PRODUCT,
    SUMMED,
    {"w": WQ},
    {"w": np.full((4, 4), 1e6, np.float32), "v": np.full((4, 4), -1e6, np.float32)},
    ulps=64.0,
)


@pytest.mark.parametrize(("ulps", "kind"), [(1.0, "UNKNOWN"), (64.0, "EQUAL_MODULO")])
def test_a_declared_tolerance_is_named(ulps: float, kind: str) -> None:
    off = WQ * np.float32(1 + 2.0**-20)
    assert Pair(PRODUCT, PRODUCT, {"w": WQ}, {"w": off}, ulps=ulps).proof().verdict.kind == kind


# ── Closer to the limits ────────────────────────────────────────────────────────────────────────────────────────────

OUTLIER = np.concatenate([np.full((1, 4), 1e6), 0.01 * normal(3, 4)]).astype(np.float32)
WITHOUT = {"x": np.concatenate([np.zeros((3, 1)), normal(3, 3)], 1).astype(np.float32)}
CANCELLED = np.full((4, 4), -1e6, np.float32)
CANCELLED[0] = 0
WRONG["huge matrices that cancel beside a large row"] = Pair(
    PRODUCT, SUMMED, {"w": OUTLIER}, {"w": np.full((4, 4), 1e6, np.float32), "v": CANCELLED}, inputs=WITHOUT
)
FEW = (wide(OUTLIER) / 1e8).astype(np.float16)
FEW[1:] = 0
WRONG["zeros of float16 beside a large row"] = Pair(
    PRODUCT, "(float[B,4] x) => (float[B,4] y) { f = Cast<to=1>(h) a = MatMul(x, f) y = Mul(a, c) }",
    {"w": OUTLIER}, {"h": FEW, "c": np.float32(1e8)}, inputs=WITHOUT,
)  # fmt: skip
WRONG["a product of sizes that overflows"] = Pair(
    "(float[B] x) => (int64[1] y) { n = Shape(x) m = Concat<axis=0>(n, c) p = ReduceProd(m) d = Div(p, e) y = Div(d, four) }",
    "(float[B] x) => (int64[1] y) { y = Shape(x) }", {"c": [2**32, 2**30, 4], "e": [2**62], "four": [4]},
)  # fmt: skip
EIGHT = {"z": np.zeros(1, ml_dtypes.float8_e4m3fn), "n": [2], "on": np.array([True])}
for like in ("Concat<axis=0>(z, z)", "Expand(z, n)", "Where(on, z, z)"):
    WRONG[f"a cast to what eight bits hold, {like}"] = Pair(
        f"(float[B] x) => (float[B] y) {{ j = {like} q = CastLike(x, j) y = Cast<to=1>(q) }}",
        "(float[B] x) => (float[B] y) { y = Identity(x) }", EIGHT,
    )  # fmt: skip
WRONG["a sum and a product of the same numbers"] = Pair(
    TWO.format("a = Mul(x, c)", "b = Mul(x, c)"),
    TWO.format("p = Cast<to=11>(c) q = Cast<to=11>(d) u = Mul(x, p) a = Mul(u, q)", "v = Mul(x, p) w = Mul(x, q) b = Add(v, w)"),
    {"c": 4.001}, {"c": np.float16(2), "d": np.float16(2)},
)  # fmt: skip
WRONG["a function by the name of an operator that keeps shapes"] = Pair(
    "(float[B,4] x) => (int64[2] y) { y = Shape(x) }",
    '(float[B,4] x) => (int64[2] y) { r = Relu(x) y = Shape(r) }\n<domain: "", opset_import: ["" : 23]> Relu (a) => (b) { b = Concat<axis=0>(a, a) }',
)
OF_SYMBOLS = "(float[1,2,L,4] x, float[3,M] m) => (y) {{ {} }}"
WRONG["a mask of another length than the keys"] = Pair(
    OF_SYMBOLS.format("y = Attention(x, x, x, m)"),
    OF_SYMBOLS.format("k = Transpose<perm=[0,1,3,2]>(x) p = MatMul(x, k) s = Mul(p, half) b = Add(s, m) a = Softmax(b) y = MatMul(a, x)"),
    {"half": np.float32(0.5)}, inputs={"x": normal(1, 2, 3, 4), "m": normal(3, 1)}, opset=24,
)  # fmt: skip
# Refused from the start.
WRONG["columns of one tensor that are two things"] = Pair(
    "(float[B,4] x) => (float[B,4] y, float[B,2] z) { a = MatMul(x, w) y = Tanh(a) b = MatMul(x, v) z = Exp(b) }",
    "(float[B,4] x) => (float[B,4] y, float[B,2] z) { a = MatMul(x, w) y = Tanh(a) u = Slice(w, from, to, axis) b = MatMul(x, u) z = Exp(b) }",
    {"w": WQ, "v": np.nextafter(WQ[:, :2], np.float32(9))}, {"w": WQ, "from": [0], "to": [2], "axis": [1]},
)  # fmt: skip
TWICE = {"m": t.Scaling(np.full(4, 2.0))}
WRONG["a claim on an output"] = Pair(
    "(float[B,4] x) => (float[B,4] y) { y = Tanh(x) }", "(float[B,4] x) => (float[B,4] y) { h = Tanh(x) y = Mul(h, two) }",
    {"two": np.float32(2)}, claims={"y": [("m", -1)]}, transforms=TWICE,
)  # fmt: skip
WRONG["a claim on integers"] = alike(
    "(int64[B,4] x) => (int64[B,4] y) { h = Mul(x, n) y = Identity(h) }", {"n": np.int64(2)}, {"n": np.int64(4)},
    claims={"h": [("m", -1)]}, transforms=TWICE,
)  # fmt: skip
POINTWISE, TAPS, MOVED = normal(2, 2, 1, 1), normal(3, 2, 3, 3), normal(2)
WRONG["a shift through zero padding"] = Pair(
    "(float[1,2,5,5] x) => (y) { h = Conv(x, k) y = Conv<pads=[1,1,1,1]>(h, m) }",
    "(float[1,2,5,5] x) => (y) { h = Conv(x, k, b) g = Conv<pads=[1,1,1,1]>(h, m) y = Sub(g, c) }",
    {"k": POINTWISE, "m": TAPS},
    {"k": POINTWISE, "m": TAPS, "b": MOVED, "c": single(wide(TAPS).sum((2, 3)) @ MOVED).reshape(3, 1, 1)},
    {"h": [("s", 1)]}, {"s": t.Shift(wide(MOVED))},
)  # fmt: skip
WRONG["channels of two groups exchanged"] = Pair(
    "(float[1,4,5,5] x) => (y) { y = Conv<group=2>(x, k) }",
    "(float[1,4,5,5] x) => (y) { s = Gather<axis=1>(x, p) y = Conv<group=2>(s, k) }",
    {"k": normal(4, 2, 3, 3), "p": [2, 1, 0, 3]},
)  # fmt: skip
WRONG["keys tiled for groups of queries"] = Pair(
    "(float[1,4,3,4] q, float[1,2,3,4] k) => (y) { y = Attention(q, k, k) }",
    "(float[1,4,3,4] q, float[1,2,3,4] k) => (y) { c = Concat<axis=1>(k, k) t = Transpose<perm=[0,1,3,2]>(c) p = MatMul(q, t) s = Mul(p, h) a = Softmax(s) y = MatMul(a, c) }",
    {"h": np.float32(0.5)},
)  # fmt: skip
WRONG["a repeated value summed, of a symbolic size"] = Pair(
    "(float[B,1] x, float[S] s) => (float[B,1] y) { n = Shape(s) o = Concat<axis=0>(one, n) e = Expand(x, o) y = ReduceSum(e, last) }",
    "(float[B,1] x, float[S] s) => (float[B,1] y) { y = Identity(x) }", {"one": [1], "last": [-1]},
)  # fmt: skip
WRONG["rows of a value that another repeats"] = Pair(
    "(float[B,4] x, float[S,1] s) => (float[1,4] y) { a = Add(x, s) b = Sub(a, s) y = ReduceSum(b, first) }",
    "(float[B,4] x, float[S,1] s) => (float[1,4] y) { y = ReduceSum(x, first) }", {"first": [0]},
    inputs={"x": np.ones((1, 4), np.float32), "s": np.ones((3, 1), np.float32)},
)  # fmt: skip
WRONG["a product of int32 that wraps"] = Pair(
    "(int32[4] x) => (int32[4] y) { a = Mul(x, c) y = Div(a, c) }", "(int32[4] x) => (int32[4] y) { y = Identity(x) }",
    {"c": np.int32(2**30)}, inputs={"x": np.array([1, 2, 3, 4], np.int32)},
)  # fmt: skip


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "make",
    [
        lambda: t.Scaling(np.array([1.0, 0.0])),
        lambda: t.Scaling(np.array([1.0, np.nan])),
        lambda: t.Scaling(np.array([[1.0]])),
        lambda: t.Orthogonal(np.eye(3) * (1 + 1e-8)),
        lambda: t.Orthogonal(np.ones((2, 3))),
        lambda: t.Orthogonal(np.full((2, 2), np.inf)),
        lambda: t.Orthogonal(np.array([[1e200, 1e200], [1e200, -1e200]])),
        lambda: t.Invertible(np.ones((3, 3))),
        lambda: t.Invertible(np.diag([1.0, 1e-320])),
        lambda: t.Invertible(np.array([[1.0, 1.0], [1.0, 1.0 + 1e-12]])),
        lambda: t.Signs(np.ones((4, 4), np.int8)),
        lambda: t.Signs(np.array([[1, 1], [1, 1]], np.int8)),
        lambda: t.Hadamard(4, None, 0.0),
        lambda: t.Hadamard(4, None, float("nan")),
        lambda: t.Signs(np.array([[1, 1], [1, -1]], np.int8), float("inf")),
        lambda: t.Repeated(t.Hadamard(4), -1, -1),
        lambda: t.Hadamard(6),
        lambda: t.Selection(3, (0, 3)),
        lambda: t.Selection(3, (-1,)),
        lambda: t.Repeated(t.Selection(3, (0, 1)), 2),
        lambda: t.Isometry(1),
        lambda: t.Isometry(4).inverse,
        lambda: t.Selection(4, (0, 1)).inverse,
        lambda: t.Selection(2, (0, 0)).inverse,
    ],
)
def test_what_is_no_transform_is_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        make()  # type: ignore[operator]


def ill_conditioned(largest: float, off: float, dtype: type) -> Pair:
    """A map whose inverse has one huge column, which meets a row of nearly zeros; the reader is `off`."""
    inverse = np.eye(4)
    inverse[1:, 0] = largest
    transform = t.Invertible(np.linalg.inv(inverse))
    reader = wide(B).copy()
    reader[0] /= largest
    wrong = inverse @ reader
    wrong[1:] += off
    text = (
        "(double[B,5] x) => (double[B,3] y) { c = Cast<to=11>(a) h = MatMul(x, c) d = Cast<to=11>(b) y = MatMul(h, d) }"
    )
    return alike(
        text,
        {"a": wide(A), "b": reader},
        {"a": single(wide(A) @ transform.values), "b": wrong.astype(dtype)},
        claims={"h": [("m", -1)]},
        transforms={"m": transform},
    )


def cancelling(largest: float, off: float, dtype: type) -> Pair:
    """A map whose inverse has two huge columns, which cancel where rows of the reader are equal; the reader is `off`."""
    inverse = np.eye(4)
    inverse[2:, 0], inverse[2:, 1] = largest, -largest
    transform = t.Invertible(np.linalg.inv(inverse))
    reader = wide(B).copy()
    reader[1] = reader[0]
    wrong = inverse @ reader
    wrong[2:] += off
    text = (
        "(double[B,5] x) => (double[B,3] y) { c = Cast<to=11>(a) h = MatMul(x, c) d = Cast<to=11>(b) y = MatMul(h, d) }"
    )
    mine = {"a": single(wide(A) @ transform.values), "b": wrong.astype(dtype)}
    return alike(text, {"a": wide(A), "b": reader}, mine, claims={"h": [("m", -1)]}, transforms={"m": transform})


@pytest.mark.parametrize(
    ("make", "largest", "off", "dtype"),
    [
        (ill_conditioned, 1e7, 0.02, np.float32),
        (ill_conditioned, 8e8, 100.0, ml_dtypes.bfloat16),
        (cancelling, 1e8, 10.0, ml_dtypes.bfloat16),
    ],
)
def test_a_map_that_is_badly_conditioned(make: Callable[..., Pair], largest: float, off: float, dtype: type) -> None:
    """Such a map is none, or what float64 cannot tell of its inverse is not taken for rounding."""
    try:
        pair = make(largest, off, dtype)
    except ValueError:
        return
    assert pair.apart() > COARSE
    assert not pair.proof().verdict.holds


@pytest.mark.parametrize(
    "make",
    [
        lambda: t.Hadamard(4, None, 0.0),
        lambda: t.Hadamard(4, None, float("nan")),
        lambda: t.Signs(np.array([[1, 1], [1, -1]], np.int8), float("inf")),
        lambda: t.Shift(np.full(4, np.nan)),
        lambda: t.Shift(np.zeros((4, 2))),
        lambda: t.Selection(4, ()),
        lambda: t.Repeated(t.Hadamard(4), -1, -1),
        lambda: t.Isometry(5),
    ],
)
def test_a_step_that_fits_nothing_is_not_true(make: Callable[[], t.Step]) -> None:
    """Of equal models; the claim alone is wrong, and a certificate that says what is not true is none."""
    try:
        step = make()
    except ValueError:
        return
    text = "(float[B,4] x) => (float[B,4] y) { h = MatMul(x, w) y = Tanh(h) }"
    pair = alike(text, {"w": WQ}, {}, claims={"h": [("m", -1)]}, transforms={"m": step})
    assert not pair.proof().verdict.holds


@pytest.mark.parametrize("axis", [-3, 2, 99, 0])
def test_an_axis_that_a_value_does_not_have(axis: int) -> None:
    text = "(float[B,4] x) => (float[B,4] y) { h = MatMul(x, w) y = Tanh(h) }"
    pair = alike(text, {"w": WQ}, {}, claims={"h": [("m", axis)]}, transforms={"m": t.Selection(4, (0, 1, 2, 3))})
    assert not pair.proof().verdict.holds


OPEN: dict[str, str] = {}
"""What the proof does not refuse yet, or refuses though it is true, and why."""


def marked(pairs: Mapping[str, Pair]) -> list[object]:
    return [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=OPEN[name])) if name in OPEN else name
        for name in pairs
    ]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pair_computes_different_functions(name: str) -> None:
    pair = WRONG[name]
    assert pair.apart() > ROUNDING or pair.apart(standard=True) > COARSE, "the witness shows no difference"


@pytest.mark.parametrize("name", marked(WRONG))
def test_a_wrong_pair_is_not_equal(name: str) -> None:
    verdict = WRONG[name].proof().verdict
    assert not verdict.holds, f"{verdict} for a pair that computes different functions"


@pytest.mark.parametrize("name", marked(RIGHT))
def test_the_pair_beside_it_is_equal(name: str) -> None:
    pair = RIGHT[name]
    assert pair.apart() <= COARSE, "the identity is not true"
    verdict = pair.proof().verdict
    assert verdict.kind == "EQUAL", str(verdict)
