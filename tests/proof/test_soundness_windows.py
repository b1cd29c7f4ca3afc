"""Wrong pairs around convolutions, averages and batch norms: what an adversary made of sums over taps.

Every wrong pair is evaluated in float64 first, and most stand beside one that is true. `OPEN` marks what the proof does
not refuse yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import pytest
from pairs import COARSE, by_standard, computed, departure, feed, model

from rewrite.proof import Proof, prove
from rewrite.proof import transforms as t

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
"""A warning turned into an error would stop the proof, and look like a refusal."""

APART = 1e-9
"""Relative; these pairs round nothing in float64 beyond 1e-13."""

R = np.random.default_rng(17)


def normal(*shape: int) -> np.ndarray:
    return R.normal(size=shape).astype(np.float32)


def single(array: object) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


def wide(array: object) -> np.ndarray:
    return np.asarray(array, np.float64)


@dataclass(frozen=True)
class Pair:
    """Two bodies over the same inputs; each takes the constants that it names. The output is y."""

    inputs: str
    original: str
    rewritten: str
    weights: Mapping[str, object] = field(default_factory=dict)
    fed: Mapping[str, np.ndarray] | None = None
    claims: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    transforms: Mapping[str, t.Step] = field(default_factory=dict)
    opsets: tuple[int, int] = (23, 23)
    declared: bool = False

    def models(self) -> tuple[ir.Model, ir.Model]:
        first, second = (
            model(
                f"({self.inputs}) => (y) {{ {body} }}", _used(body, self.weights), opset=opset, declared=self.declared
            )
            for body, opset in zip((self.original, self.rewritten), self.opsets)
        )
        return first, second

    def proof(self) -> Proof:
        claims = {name: {"transform": step, "axis": axis} for name, (step, axis) in self.claims.items()}
        return prove(*self.models(), claims=claims, transforms=self.transforms)

    def apart(self, *, standard: bool = False) -> float:
        first, second = self.models()
        inputs = self.fed if self.fed is not None else feed(first, {"B": 2, "H": 7, "W": 6, "S": 9})
        evaluate = by_standard if standard else computed
        return departure(evaluate(first, inputs), evaluate(second, inputs))


def _used(body: str, weights: Mapping[str, object]) -> dict[str, np.ndarray]:
    names = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return {name: np.asarray(value) for name, value in weights.items() if name in names}


RIGHT: dict[str, Pair] = {}
WRONG: dict[str, Pair] = {}
OPEN: dict[str, str] = {}
"""What the proof does not refuse yet, or refuses though it is true, and why."""

IMAGE = "float[B,4,6,6] x"

# ── A sum of which one term is mapped along a spatial axis ──────────────────────────────────────────────────────────

POINT = normal(5, 4, 1, 1)
SIDEWAYS = {"m": normal(6, 6), "k": POINT, "kt": np.ascontiguousarray(POINT[:, :, 0, 0].T), "r": normal(1, 1, 6, 1)}
TWO = "float[B,4,6,6] x, float[B,4,6,6] z"
TURNED = "u = Transpose<perm=[0,2,3,1]>(s) v = MatMul(u, kt) y = Transpose<perm=[0,3,1,2]>(v)"
BESIDE = "t = MatMul(z, m) s = Add(x, t)"
TWICE = "t = MatMul(z, m) x2 = Add(x, x) s = Add(x2, t)"
RIGHT["a point of a sum, one term mapped sideways"] = Pair(
    TWO, f"{BESIDE} y = Conv(s, k)", f"{BESIDE} {TURNED}", SIDEWAYS
)
WRONG["a point of a sum, the other term twice"] = Pair(TWO, f"{BESIDE} y = Conv(s, k)", f"{TWICE} {TURNED}", SIDEWAYS)
RIGHT["an average of a sum, one term mapped sideways"] = Pair(
    TWO, f"{BESIDE} y = AveragePool<kernel_shape=[1,1]>(s)", f"{BESIDE} y = Identity(s)", SIDEWAYS
)
WRONG["an average of a sum, the other term twice"] = Pair(
    TWO, f"{BESIDE} y = AveragePool<kernel_shape=[1,1]>(s)", f"{TWICE} y = Identity(s)", SIDEWAYS
)
WRONG["a number for each row, and the other term twice"] = Pair(
    IMAGE,
    "s = Add(x, r) y = AveragePool<kernel_shape=[1,1]>(s)",
    "x2 = Add(x, x) y = Add(x2, r)",
    SIDEWAYS,
)

# ── Values that windows leave out need not be defined ───────────────────────────────────────────────────────────────


def left_out(name: str, shape: tuple[int, ...], operator: str, kernel: np.ndarray, read: object) -> None:
    """√x under `operator`, x negative where it does not read; √x − √x is no zero there."""
    x = -np.abs(normal(*shape))
    x[(slice(None), slice(None), *read)] *= -1  # type: ignore[misc]
    spread = np.ones((kernel.shape[1] if "Transpose" in operator else kernel.shape[0], shape[1], 1, 1), np.float32)
    size = ",".join(map(str, shape))
    WRONG[f"nothing, of what {name} leaves out"] = Pair(
        f"float[{size}] x",
        f"s = Sqrt(x) y = {operator}(s, k)",
        f"s = Sqrt(x) d = Sub(s, s) g = GlobalAveragePool(d) c = Conv(g, o) p = {operator}(s, k) y = Add(p, c)",
        {"k": kernel, "o": spread},
        {"x": x},
    )


EVEN, INNER, ALL = slice(None, None, 2), slice(1, -1), slice(None)
left_out("a strided convolution", (2, 4, 6, 6), "Conv<strides=[2,2]>", POINT, (EVEN, EVEN))
left_out("a window that does not fit", (2, 4, 6, 5), "Conv<strides=[1,2]>", normal(5, 4, 1, 2), (ALL, slice(0, 4)))
left_out("one dilated window", (2, 4, 6, 3), "Conv<dilations=[1,2]>", normal(5, 4, 1, 2), (ALL, EVEN))
left_out(
    "a transposed convolution, cropped",
    (2, 4, 6, 6),
    "ConvTranspose<pads=[1,1,1,1]>",
    normal(4, 5, 1, 1),
    (INNER, INNER),
)
WRONG["nothing, of a slope that is not used"] = Pair(
    "float[2,4] x, float[2,4] z",
    "r = Relu(x) s = Sqrt(z) y = PRelu(r, s)",
    "r = Relu(x) s = Sqrt(z) d = Sub(s, s) p = PRelu(r, s) y = Add(p, d)",
    fed={"x": normal(2, 4), "z": -np.abs(normal(2, 4))},
)
RIGHT["nothing, of what a convolution reads"] = Pair(
    "float[2,4,6,6] x",
    "s = Sqrt(x) y = Conv<pads=[1,1,1,1]>(s, k)",
    "s = Sqrt(x) d = Sub(s, s) g = GlobalAveragePool(d) c = Conv(g, o) p = Conv<pads=[1,1,1,1]>(s, k) y = Add(p, c)",
    {"k": normal(5, 4, 3, 3), "o": POINT},
    {"x": np.abs(normal(2, 4, 6, 6))},
)

# ── Ulps where there is nothing to adjust, and where numbers cancel ─────────────────────────────────────────────────

BLOCKS = single(normal(4, 2, 3, 3) * 1e-39)
DENSE = np.zeros((4, 4, 3, 3), np.float32)
DENSE[:2, :2], DENSE[2:, 2:] = BLOCKS[:2], BLOCKS[2:]
LEAKING = DENSE.copy()
LEAKING[:2, 2:] = np.float32(1.4e-45)
TINY = {"k": DENSE, "l": LEAKING, "g": BLOCKS, "s": single(1e20)}
SCALED = "a = Mul(c, s) y = Mul(a, s)"
RIGHT["groups of the smallest numbers"] = Pair(
    IMAGE, f"c = Conv(x, k) {SCALED}", f"c = Conv<group=2>(x, g) {SCALED}", TINY
)
WRONG["groups, an ulp of 0 between them"] = Pair(
    IMAGE, f"c = Conv(x, l) {SCALED}", f"c = Conv<group=2>(x, g) {SCALED}", TINY
)

THREE = "p = Conv(x, k1) q = Conv(x, k3) r = Conv(x, k2) s = Add(p, q) y = Add(s, r)"
for power in (30, 40, 66):
    large, small = np.full((4, 4, 1, 1), 2.0**power, np.float32), normal(4, 4, 1, 1)
    hidden = {"k1": large, "k2": small, "k3": -large, "k": single(wide(small) + 0.9 * 2.0 ** (power - 53))}
    WRONG[f"behind what cancels, 2^{power}"] = Pair(IMAGE, THREE, "y = Conv(x, k)", hidden)
RIGHT["what cancels"] = Pair(IMAGE, THREE, "y = Conv(x, k)", {**hidden, "k": small})
NEAR = "a = Mul(x, c1) b = Mul(x, c2) r = Relu(a) t = Relu(b) d = Sub(r, t) y = Mul(d, c3)"
WRONG["two numbers of the original that are nearly one"] = Pair(
    "double[B,4] x",
    NEAR,
    "a = Mul(x, c1) r = Relu(a) t = Relu(a) d = Sub(r, t) y = Mul(d, c3)",
    {"c1": np.float64(1 + 2.0**-52), "c2": np.float64(1 + 2.0**-51), "c3": np.float64(2.0**52)},
    {"x": np.array([[1.0, 2.0, 4.0, 8.0]])},
)

# ── Float64's own range and rounding ────────────────────────────────────────────────────────────────────────────────

SMALL = {f"d{i}": single((np.abs(normal(4)) + 0.5) * 1e-38) for i in range(9)}
SMALL |= {"e0": 2 * SMALL["d0"], "s": single(1e38)}


def in_turn(vectors: list[str], number: str) -> str:
    """x times each of `vectors`, and the number between them."""
    steps, last = [], "x"
    for i, name in enumerate(vectors):
        steps.append(f"a{i} = Mul({last}, {name})")
        last = f"a{i}"
        if i + 1 < len(vectors):
            steps.append(f"b{i} = Mul({last}, {number})")
            last = f"b{i}"
    return " ".join((*steps, f"r = Relu({last})"))


NINE = [f"d{i}" for i in range(9)]
RIGHT["products beyond float64"] = Pair(
    "float[B,4] x", in_turn(NINE, "s") + " y = Mul(r, s)", in_turn(NINE, "s") + " t = Mul(s, r) y = Identity(t)", SMALL
)
WRONG["products beyond float64"] = Pair(
    "float[B,4] x", in_turn(NINE, "s") + " y = Mul(r, s)", in_turn(["e0", *NINE[1:]], "s") + " y = Mul(r, s)", SMALL
)
LARGE = {f"n{i}": single((np.abs(normal(4)) + 0.5) * 1e38) for i in range(9)} | {"t": single(1e-38)}
ALTERNATING = " ".join(
    f"a{i} = Mul({'x' if not i else f'b{i - 1}'}, t)" + (f" b{i} = Mul(a{i}, n{i})" if i < 8 else "") for i in range(9)
)
WRONG["numbers whose product is beyond float64"] = Pair(
    "float[B,4] x",
    f"{ALTERNATING} r = Relu(a8) y = Mul(r, n8)",
    "o = Sub(x, x) r = Relu(o) y = Mul(r, n8)",
    LARGE,
)
UNITS = np.ones((3, 4), np.float32)
WRONG["the smallest number there is as a divisor"] = Pair(
    "float[B,3,4] x", "y = Div(x, c)", "y = Div(x, e)", {"c": UNITS, "e": np.full_like(UNITS, 1.4e-45)}
)
DIVISOR = {"c": normal(4)}
DIVISOR["e"] = single(wide(DIVISOR["c"]) / 3)
RIGHT["a divisor that was rounded"] = Pair(
    "float[B,3,4] x", "z = Mul(x, n) y = Div(z, c)", "y = Div(x, e)", {**DIVISOR, "n": single(3.0)}
)
FEW = normal(4, 1, 1)
CANCELLING = np.array([[1, -1, 1]] * 4, np.float32).reshape(4, 3, 1, 1)
IDENTICAL = {"g": single(np.ones(4)), "be": single(np.zeros(4)), "mu": single(np.zeros(4)), "va": single(np.ones(4))}
for power in (40, 60):
    large, rows = np.full((4, 4, 1, 1), 2.0**power, np.float32), np.full((3, 4, 1, 1), 2.0**power, np.float32)
    rows[2] = FEW
    summed, off = np.repeat(wide(FEW)[None], 4, 0), 2.0 ** (power - 52)
    WRONG[f"what cancels inside a product, 2^{power}"] = Pair(
        IMAGE,
        "h = Conv(x, b) y = Conv(h, a)",
        "y = Conv(x, k)",
        {"a": CANCELLING, "b": rows, "k": single(summed + off)},
    )
    scale = 1 / np.sqrt(1 + float(np.float32(1e-5)))
    weights = {**IDENTICAL, "k1": large, "k3": -large, "k2": FEW.reshape(4, 1, 1, 1) * UNITS[:1].reshape(1, 4, 1, 1)}
    WRONG[f"what cancels in front of a norm, 2^{power}"] = Pair(
        IMAGE,
        THREE.replace("y =", "z =") + " y = BatchNormalization(z, g, be, mu, va)",
        "y = Conv(x, k)",
        {**weights, "k": single(scale * wide(weights["k2"]) + off)},
    )

LOUD = np.zeros((256, 66), np.float32)
LOUD[:, :2], LOUD[:, 2:] = 2.0**40, normal(256, 64)
QUIET = np.zeros((66, 128), np.float32)
QUIET[0], QUIET[1], QUIET[2:] = 1, -1, 0.1 * normal(64, 128)
HEARD = wide(LOUD)[:, 2:] @ wide(QUIET)[2:]
WRONG["what cancels everywhere"] = Pair(
    "float[B,256] x",
    "h = MatMul(x, a) y = MatMul(h, b)",
    "y = MatMul(x, k)",
    {"a": LOUD, "b": QUIET, "k": single(HEARD + 1e-3)},
)
BETWEEN = np.eye(4, dtype=np.float32)
BETWEEN[3, 2] = 0.5
FOUR = {"a": LOUD[:4, :4], "e": BETWEEN, "b": QUIET[:4, :4]}
HEARD = wide(FOUR["a"])[:, 2:] @ wide(BETWEEN)[2:, 2:] @ wide(FOUR["b"])[2:]
WRONG["what cancels inside three matrices"] = Pair(
    "float[B,4] x",
    "h = MatMul(x, a) g = MatMul(h, e) y = MatMul(g, b)",
    "y = MatMul(x, k)",
    {**FOUR, "k": single(HEARD + 1e-3)},
)
OFF = normal(4, 4)
WRONG["what cancels in front of a mean"] = Pair(
    "float[B,4] x",
    "p = MatMul(x, k1) q = MatMul(x, k3) r = MatMul(x, k2) s = Add(p, q) z = Add(s, r)"
    " m = ReduceMean(z, n) y = Sub(z, m)",
    "y = MatMul(x, k)",
    {
        "k1": np.full((4, 4), 2.0**40, np.float32),
        "k3": np.full((4, 4), -(2.0**40), np.float32),
        "k2": OFF,
        "n": np.array([-1]),
        "k": single(wide(OFF) - wide(OFF).mean(1, keepdims=True) + 1e-4),
    },
)

CLAIMED, READER = normal(4, 4), normal(4, 3)
ADDED = "p = MatMul(x, k1) q = MatMul(x, k3) r = MatMul(x, k2) s = Add(p, q) h = Add(s, r)"
for name, function, transform in (
    ("a permutation", "Tanh", t.Selection(4, (2, 0, 3, 1))),
    ("a scaling", "Relu", t.Scaling(np.array([2.0, 0.5, 3.0, 1.25]))),
):
    large = np.full((4, 4), 2.0**60, np.float32)
    for off in (0.0, 100.0):
        pair = Pair(
            "float[B,4] x",
            f"{ADDED} f = {function}(h) y = MatMul(f, l)",
            f"h = MatMul(x, k) f = {function}(h) y = MatMul(f, m)",
            {
                "k1": large,
                "k3": -large,
                "k2": CLAIMED,
                "l": READER,
                "k": single(transform.apply(wide(CLAIMED) + off)),
                "m": single(transform.dual.apply(wide(READER), 0)),
            },
            claims={"h": ("m", -1)},
            transforms={"m": transform},
        )
        if off:
            WRONG[f"what cancels behind the claim of {name}"] = pair
        elif function == "Tanh":
            RIGHT[f"a sum that cancels, and the claim of {name}"] = pair

# ── Shifts that are not the same for every image ────────────────────────────────────────────────────────────────────

BATCH = {
    "b": normal(4, 1, 1),
    "p": np.array([0, 0, 0, 0, 1, 0, 0, 0]),
    "k": normal(4, 4, 3, 3),
    "l": normal(5, 4, 1, 2),
}
for name, operator in {
    "a transposed convolution": "ConvTranspose<strides=[2,2]>(q, k)",
    "a convolution whose taps all meet padding": "Conv<pads=[0,1,0,1]>(q, l)",
    "an average with padding": "AveragePool<kernel_shape=[1,2], pads=[0,1,0,1], count_include_pad=1>(q)",
}.items():
    WRONG[f"a shift for images that were added, through {name}"] = Pair(
        "float[1,4,6,6] x",
        f"c = Add(x, b) q = Pad(c, p) y = {operator}",
        f"d = Pad(x, p) q = Add(d, b) y = {operator}",
        BATCH,
    )
    WRONG[f"a shift for one of two images, through {name}"] = Pair(
        "float[1,4,6,6] x, float[1,4,6,6] z",
        f"c = Add(x, b) q = Concat<axis=0>(c, z) y = {operator}",
        f"d = Concat<axis=0>(x, z) q = Add(d, b) y = {operator}",
        BATCH,
    )
WRONG["nothing, of an average of no value"] = Pair(
    "float[B,4,1,1] x",
    "y = Relu(x)",
    "a = AveragePool<kernel_shape=[2,2], dilations=[2,2], pads=[1,1,1,1]>(x) c = Conv(a, o) r = Relu(x) y = Add(r, c)",
    {"o": np.zeros((4, 4, 1, 1), np.float32)},
)

for name, attributes in {
    "dilated": "kernel_shape=[2], dilations=[2], pads=[1,1]",
    "of one place beside it": "kernel_shape=[1], pads=[1,0], strides=[2]",
    "of two places beside it": "kernel_shape=[2], pads=[2,0], strides=[2]",
}.items():
    WRONG[f"a window of one value, {name}"] = Pair(
        "float[B,4,1] x", "y = Relu(x)", f"r = Relu(x) y = AveragePool<{attributes}>(r)"
    )
WRONG["a window of one number, dilated"] = Pair(
    "float[B,4,3] x",
    "y = Add(x, b)",
    "e = Expand(b, n) a = AveragePool<kernel_shape=[2], dilations=[4], pads=[2,2]>(e) y = Add(x, a)",
    {"b": normal(1, 4, 1), "n": np.array([1, 4, 3])},
)
RIGHT["a window of one value"] = Pair(
    "float[B,4,1] x", "y = Relu(x)", "r = Relu(x) y = AveragePool<kernel_shape=[3], pads=[1,1]>(r)"
)

# ── Constants that operators make of constants ──────────────────────────────────────────────────────────────────────


def by_reference(name: str, body: str, weights: Mapping[str, object], opset: int = 23) -> None:
    """c made of constants, and what ONNX's own implementation, which is wrong there, says that it is."""
    text = f"(float[1] x) => (c) {{ {body} }}"
    used = {name: wide(value) for name, value in _used(body, weights).items()}
    said = single(by_standard(model(text, used, opset=opset), {"x": np.zeros(1, np.float32)})[0])
    size = ",".join(map(str, said.shape))
    WRONG[f"what is said of {name}"] = Pair(
        f"float[{size}] x", f"{body} y = Add(x, c)", "y = Add(x, d)", {**weights, "d": said}, opsets=(opset, opset)
    )


MADE = {"g": normal(2), "be": normal(2), "mu": normal(2), "va": np.abs(normal(2)), "z": normal(2, 2, 2, 3)}
by_reference("a norm of old", "c = BatchNormalization(z, g, be, mu, va)", MADE, opset=13)
by_reference(
    "a transposed convolution in groups",
    "c = ConvTranspose<group=2, strides=[2,2]>(z, k)",
    {"z": MADE["z"], "k": normal(2, 1, 2, 2)},
)
by_reference(
    "a dilated average",
    'c = AveragePool<kernel_shape=[2,2], auto_pad="SAME_LOWER", dilations=[2,2]>(z)',
    MADE,
)
by_reference("a norm of magnitudes", "c = LpNormalization<axis=2, p=1>(z)", MADE)

# ── Constants that are no numbers ───────────────────────────────────────────────────────────────────────────────────

UNREAL = {
    "g": np.array([np.inf, 1, 1, 1], np.float32).reshape(4, 1, 1),
    "n": np.full((4, 1, 1), np.nan, np.float32),
    "k": normal(4, 4, 1, 1),
    "o": np.zeros((4, 4, 1, 1), np.float32),
    "v": -np.ones(4, np.float32),
    "u": np.ones(4, np.float32),
    "z": single(0.0),
}
for name, body in {
    "an infinite factor, less itself": "a = Mul(x, g) b = Sub(a, a) c = Conv(x, k) y = Add(c, b)",
    "an infinite shift, less itself": "a = Add(x, g) b = Sub(a, g) y = Conv(b, k)",
    "an infinite factor, times 0": "a = Mul(x, g) b = Mul(a, z) d = Add(b, x) y = Conv(d, k)",
    "no number, less itself": "a = Add(x, n) b = Sub(a, n) y = Conv(b, k)",
    "no number under a kernel of zeros": "a = Mul(x, n) b = Conv(a, o) c = Conv(x, k) y = Add(c, b)",
    "a norm of no deviation under zeros": "a = BatchNormalization(x, u, u, u, v) b = Conv(a, o) c = Conv(x, k)"
    " y = Add(c, b)",
}.items():
    WRONG[name] = Pair(IMAGE, "y = Conv(x, k)", body, UNREAL)
WRONG["nothing, of a scale that a mean does not read"] = Pair(
    "float[2,4] x, float[4] z",
    "s = Sqrt(z) o, y = LayerNormalization(x, s)",
    "s = Sqrt(z) d = Sub(s, s) o, m = LayerNormalization(x, s) r = ReduceSum(d, n) y = Add(m, r)",
    {"n": np.array([0])},
    {"x": normal(2, 4), "z": -np.abs(normal(4))},
    declared=True,
)
WRONG["nothing, of a mean that training does not use"] = Pair(
    "float[2,4,3] x, float[4] z",
    "s = Sqrt(z) y, m, w = BatchNormalization<training_mode=1>(x, u, u, s, u)",
    "s = Sqrt(z) d = Sub(s, s) a, m, w = BatchNormalization<training_mode=1>(x, u, u, s, u) e = Reshape(d, n)"
    " y = Add(a, e)",
    {"u": UNREAL["u"], "n": np.array([4, 1])},
    {"x": normal(2, 4, 3), "z": -np.abs(normal(4))},
    declared=True,
)
for size in (30, 300):
    RIGHT[f"{size} positions and a mask without end"] = Pair(
        f"float[B,{size},{size}] x",
        "a = Add(x, m) y = Softmax(a)",
        "a = Add(m, x) y = Softmax(a)",
        {"m": np.triu(np.full((size, size), -np.inf, np.float32), 1)},
    )
WRONG["nothing, of a function of no number"] = Pair(
    IMAGE, "y = Relu(x)", "c = Celu<alpha=0.0>(x) d = Conv(c, o) r = Relu(x) y = Add(r, d)", UNREAL
)


def marked(pairs: Mapping[str, Pair]) -> list[object]:
    return [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=OPEN[name])) if name in OPEN else name
        for name in pairs
    ]


@pytest.mark.parametrize("name", marked(WRONG))
def test_a_wrong_pair_is_not_equal(name: str) -> None:
    pair = WRONG[name]
    assert pair.apart() > APART, "the witness shows no difference"
    verdict = pair.proof().verdict
    assert not verdict.holds, f"{verdict} for a pair that computes different functions"


@pytest.mark.parametrize("name", marked(RIGHT))
def test_the_pair_beside_it_is_equal(name: str) -> None:
    pair = RIGHT[name]
    assert pair.apart() <= COARSE, "the identity is not true"
    verdict = pair.proof().verdict
    assert verdict.kind == "EQUAL", str(verdict)
