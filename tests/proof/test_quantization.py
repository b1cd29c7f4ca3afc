# ruff: noqa: E501 - a model a line
"""Quantized networks: the erasure theorem on small pairs, and what must not be proved, each beside what must be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from pairs import model

from rewrite.proof import Proof, prove
from rewrite.proof.accumulators import LARGEST_PAIR, sums
from rewrite.proof.constants import Array
from rewrite.proof.sites import SATURATES, Linear

Weights = dict[str, np.ndarray]
ROWS, COLUMNS = 64, 48
FLOAT = "(float[B,64] x) => (float[B,48] y) { a = MatMul(x, w) y = Add(a, b) }"
DYNAMIC = "(float[B,64] x) => (float[B,48] y) { y = com.microsoft.DynamicQuantizeMatMul(x, q, s, , b) }"
STATIC = (
    "(float[B,64] x) => (float[B,48] y) { u = QuantizeLinear(x, xs, xz) v = DequantizeLinear(u, xs, xz)"
    " d = DequantizeLinear<axis=1>(q, s, z) a = MatMul(v, d) y = Add(a, b) }"
)
INTEGER = (
    "(float[B,64] x) => (float[B,48] y) { u, t, p = DynamicQuantizeLinear(x) i = MatMulInteger(u, q, p, z)"
    " f = Cast<to=1>(i) ts = Mul(t, s) a = Mul(f, ts) y = Add(a, b) }"
)
WEIGHT_ONLY = (
    "(float[B,64] x) => (float[B,48] y) { d = DequantizeLinear<axis=1>(q, s, z) a = MatMul(x, d) y = Add(a, b) }"
)
OPERATOR = (
    "(float[B,64] x) => (float[B,48] y) { u = QuantizeLinear(x, xs, xz) r = QLinearMatMul(u, xs, xz, q, s, z, ys, yz)"
    " a = DequantizeLinear(r, ys, yz) y = Add(a, b) }"
)
TO_FLOAT = (
    "(float[B,64] x) => (float[B,48] y) { u, t, p = DynamicQuantizeLinear(x)"
    " y = com.microsoft.MatMulIntegerToFloat(u, q, t, s, p, z, b) }"
)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W, BIAS = numbers(ROWS, COLUMNS), numbers(COLUMNS, seed=1)
ORIGINAL = model(FLOAT, {"w": W, "b": BIAS})


def by_column(weight: np.ndarray, largest: int = 127) -> Weights:
    scales = (np.abs(weight).max(0) / largest).astype(np.float32)
    codes = np.clip(np.rint(weight / scales), -largest, largest).astype(np.int8)
    return {"q": codes, "s": scales, "z": np.zeros(weight.shape[1], np.int8)}


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (N, groups, block) as MatMulNBits has them, the low bits first."""
    each = 8 // bits
    parts = [codes[..., index::each].astype(np.uint8) << (bits * index) for index in range(each)]
    return np.bitwise_or.reduce(parts).astype(np.uint8)


def blocked(weight: np.ndarray, bits: int, block: int, zero: int | None = None) -> Weights:
    rows, columns = weight.shape
    groups, half = -(-rows // block), 1 << (bits - 1)
    wide = np.zeros((groups * block, columns))
    wide[:rows] = weight
    wide = wide.reshape(groups, block, columns)
    scales = (np.abs(wide).max(1) / max(half - 1, 1)).astype(np.float32)
    middle = half if zero is None else zero
    codes = np.clip(np.rint(wide / scales[:, None]) + middle, 0, 2 * half - 1)
    found = {"q": packed(codes.transpose(2, 0, 1), bits), "s": np.ascontiguousarray(scales.T)}
    if zero is not None:
        width = -(-groups * bits // 8) * 8 // bits
        found["z"] = packed(np.full((columns, width), zero), bits)
    return found


def nbits(bits: int = 4, block: int = 16, level: int = 0, zero: bool = False, inner: int = ROWS) -> str:
    operands = f"x, q, s, {'z' if zero else ''}, , b"
    return (
        f"(float[B,{inner}] x) => (float[B,48] y) {{ y = com.microsoft.MatMulNBits<K={inner}, N=48, bits={bits},"
        f" block_size={block}, accuracy_level={level}>({operands}) }}"
    )


COLUMN = {**by_column(W), "b": BIAS}
ACTIVATIONS = {"xs": np.float32(0.02), "xz": np.uint8(120), "ys": np.float32(0.3), "yz": np.uint8(128)}
BLOCKED = {**blocked(W, 4, 16), "b": BIAS}


def proof_of(text: str, weights: Mapping[str, np.ndarray], **options: object) -> Proof:
    known = {
        name: array
        for name, array in weights.items()
        if name in text.replace(",", " ").replace(")", " ").split() or name in text
    }
    return prove(ORIGINAL, model(text, known), **options)  # type: ignore[arg-type]


def declared(proof: Proof) -> list[dict[str, object]]:
    """The list of sites as a certificate holds it."""
    return json.loads(json.dumps([site.to_json() for site in proof.sites]))


PROVED = {
    "dynamic": (DYNAMIC, COLUMN, 1),
    "static": (STATIC, {**COLUMN, **ACTIVATIONS}, 1),
    "integer": (INTEGER, COLUMN, 1),
    "operators": (OPERATOR, {**COLUMN, **ACTIVATIONS}, 2),
    "to float": (TO_FLOAT, COLUMN, 1),
    "weights": (WEIGHT_ONLY, COLUMN, 0),
    "nbits 4": (nbits(), BLOCKED, 0),
    "nbits 4 int8": (nbits(level=4), BLOCKED, 1),
    "nbits 4 zero points": (nbits(zero=True), {**blocked(W, 4, 16, zero=7), "b": BIAS}, 0),
    "nbits 2": (nbits(bits=2), {**blocked(W, 2, 16), "b": BIAS}, 0),
    "nbits 8": (nbits(bits=8, block=32), {**blocked(W, 8, 32), "b": BIAS}, 0),
}


@pytest.mark.parametrize("name", PROVED)
def test_sites_are_declared_and_measured(name):
    text, weights, activations = PROVED[name]
    proof = proof_of(text, weights)
    assert proof.verdict.kind == "EQUAL_MODULO", proof
    weight, *others = proof.sites
    assert weight.kind == "weight"
    assert weight.name == "q"
    assert len(others) == activations
    assert all(site.kind == "activation" for site in others)
    assert 0.4 < weight.error_steps <= 0.5 + 2.0**-16
    # Half a step at most, uniformly: the root of a twelfth of a step, over the root mean square of the weights.
    assert 0.0 < weight.error_relative < 1.0
    assert proof.verdict.ulps == 0.0
    assert f"error ≤ {0.5 if weight.error_steps <= 0.5 else 0.501} steps" in str(proof)
    assert prove(
        ORIGINAL, model(text, {n: a for n, a in weights.items() if n in _names(text)}), approximations=declared(proof)
    ).verdict.holds


def _names(text: str) -> set[str]:
    return set(text.translate(str.maketrans("(),{}=", "      ")).split())


def test_relative_error_is_that_of_the_whole_tensor():
    site = proof_of(WEIGHT_ONLY, COLUMN).sites[0]
    values = COLUMN["q"].astype(np.float64) * COLUMN["s"]
    exact = W.astype(np.float64)
    relative = np.linalg.norm(values - exact) / np.linalg.norm(exact)
    room = 4 * W.size * 2.0**-53
    assert abs(site.error_relative - relative) <= room * relative
    assert abs(site.error_steps - np.abs((values - exact) / COLUMN["s"]).max()) <= room


# ── What is rejected ────────────────────────────────────────────────────────────────────────────────────────────────


def changed(weights: Weights, **changes: Callable[[np.ndarray], np.ndarray]) -> Weights:
    return {name: changes[name](array.copy()) if name in changes else array for name, array in weights.items()}


def one_scale(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(scales: np.ndarray) -> np.ndarray:
        scales.reshape(-1)[5] *= np.float32(factor)
        return scales

    return change


def beyond(codes: np.ndarray) -> np.ndarray:
    """One code a step further from what it stands for."""
    off = codes[3, 4] * COLUMN["s"][4] - W[3, 4]
    codes[3, 4] += 2 if off > 0 else -2
    return codes


def swapped(scales: np.ndarray) -> np.ndarray:
    scales[[0, 9]] = scales[[9, 0]]
    return scales


def nibbles(codes: np.ndarray) -> np.ndarray:
    return (codes >> 4) | (codes << 4)


STATICS = {**COLUMN, **ACTIVATIONS}
REJECTED = {
    "scales × 1.05": (WEIGHT_ONLY, changed(COLUMN, s=lambda s: s * np.float32(1.05))),
    "scales × 2": (WEIGHT_ONLY, changed(COLUMN, s=lambda s: 2 * s)),
    "one scale": (WEIGHT_ONLY, changed(COLUMN, s=one_scale(1.05))),
    "two columns' scales swapped": (WEIGHT_ONLY, changed(COLUMN, s=swapped)),
    "zero points + 1": (WEIGHT_ONLY, changed(COLUMN, z=lambda z: z + np.int8(1))),
    "one code beyond its step": (WEIGHT_ONLY, changed(COLUMN, q=beyond)),
    "two heads swapped": (WEIGHT_ONLY, changed(COLUMN, q=lambda q: np.roll(q, 16, axis=1))),
    "rows shuffled": (WEIGHT_ONLY, changed(COLUMN, q=lambda q: q[::-1])),
    "int8 read as uint8": (WEIGHT_ONLY, changed(COLUMN, q=lambda q: q.view(np.uint8), z=lambda z: z.view(np.uint8))),
    "bias dropped": (WEIGHT_ONLY.replace("y = Add(a, b)", "y = Identity(a)"), COLUMN),
    "dynamic bias dropped": (DYNAMIC.replace("q, s, , b", "q, s"), COLUMN),
    "dynamic scale": (DYNAMIC, changed(COLUMN, s=one_scale(2.0))),
    "dynamic zero points": (INTEGER, changed(COLUMN, z=lambda z: z + np.int8(1))),
    "integer scale": (INTEGER, changed(COLUMN, s=one_scale(1.05))),
    "integer: another value's scale": (INTEGER.replace("ts = Mul(t, s)", "ts = Mul(s, s)"), COLUMN),
    "integer: no scale of the input": (INTEGER.replace("a = Mul(f, ts)", "a = Mul(f, s)"), COLUMN),
    "another scale in the pair": (STATIC.replace("v = DequantizeLinear(u, xs", "v = DequantizeLinear(u, ys"), STATICS),
    "another zero point in the pair": (STATIC.replace("(u, xs, xz)", "(u, xs, yz)"), STATICS),
    "codes used as numbers": (STATIC.replace("v = DequantizeLinear(u, xs, xz)", "v = Cast<to=1>(u)"), STATICS),
    "a product's codes read at another scale": (OPERATOR.replace("DequantizeLinear(r, ys, yz)", "DequantizeLinear(r, xs, yz)"), STATICS),
    "a product told another scale": (OPERATOR.replace("(u, xs, xz, q", "(u, ys, xz, q"), STATICS),
    "to float: another zero point": (TO_FLOAT.replace("t, s, p, z", "t, s, z0, z"), {**COLUMN, "z0": np.uint8(3)}),
    "nibbles swapped": (nbits(), changed(BLOCKED, q=nibbles)),
    "nbits scales": (nbits(), changed(BLOCKED, s=one_scale(1.3))),
    "nbits scales transposed": (nbits(), changed(BLOCKED, s=lambda s: s.reshape(4, 48).T.copy())),
    "nbits codes of another column": (nbits(), changed(BLOCKED, q=lambda q: np.roll(q, 1, axis=0))),
    "nbits blocks shuffled": (nbits(), changed(BLOCKED, q=lambda q: q[:, ::-1])),
    "nbits zero point": (nbits(zero=True), {**BLOCKED, "z": packed(np.full((48, 4), 9), 4)}),
    "nbits bias dropped": (nbits().replace(", , b)", ")"), BLOCKED),
    "nbits order of groups": (nbits().replace("s, , , b", "s, , g, b"), {**BLOCKED, "g": (np.arange(64) // 16).astype(np.int32)}),
    "codes of another axis": (
        "(float[B,64] x) => (float[B,64] y) { d = DequantizeLinear<axis=0>(q, s, z) y = MatMul(x, d) }",
        {**by_column(numbers(64, 64))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_wrong_codes_are_not_proved(name):
    """Without a certificate; the same text with the right codes is proved above."""
    text, weights = REJECTED[name]
    original = ORIGINAL
    if name == "codes of another axis":
        original = model("(float[B,64] x) => (float[B,64] y) { y = MatMul(x, w) }", {"w": numbers(64, 64)})
        right = model(text.replace("axis=0", "axis=1"), weights)
        assert prove(original, right).verdict.holds
    found = prove(original, model(text, {n: a for n, a in weights.items() if n in _names(text)}))
    assert not found.verdict.holds, found


def test_a_block_of_half_the_size_is_not_proved():
    weights = {**blocked(W, 4, 32), "b": BIAS}
    assert proof_of(nbits(block=32), weights).verdict.holds
    halved = {**weights, "q": weights["q"].reshape(48, 4, 8), "s": np.tile(weights["s"], (1, 2))}
    assert not proof_of(nbits(block=16), halved).verdict.holds
    # Every scale twice, in its place, is another way to write the same.
    assert proof_of(nbits(block=16), {**halved, "s": np.repeat(weights["s"], 2, axis=1)}).verdict.holds


ACCEPTED = {
    "scales × 1.05 of 4 bits": (nbits(), BLOCKED, nbits(), changed(BLOCKED, s=lambda s: s * np.float32(1.05))),
    "one code to the other side": (WEIGHT_ONLY, COLUMN, WEIGHT_ONLY, None),
    "another accuracy level": (nbits(), BLOCKED, nbits(level=4), BLOCKED),
    "another scale of the activations": (STATIC, STATICS, STATIC, {**STATICS, "xs": np.float32(0.021)}),
    "another zero point of the activations": (STATIC, STATICS, STATIC, {**STATICS, "xz": np.uint8(121)}),
    "no activation site": (STATIC, STATICS, WEIGHT_ONLY, COLUMN),
    "the range of each input": (STATIC, STATICS, DYNAMIC, COLUMN),
}


def other_side(codes: np.ndarray) -> np.ndarray:
    """The code that is nearly half a step away on the one side, on the other: less than a step."""
    off = codes * COLUMN["s"].astype(np.float64) - W
    place = np.unravel_index(np.argmax(np.abs(off / COLUMN["s"])), off.shape)
    codes[place] -= int(np.sign(off[place]))
    return codes


@pytest.mark.parametrize("name", ACCEPTED)
def test_within_a_step_is_a_network_of_its_own_and_not_the_certified_one(name):
    """Each is rightly proved by itself: its codes are within a step, and its sites are declared as they are."""
    text, weights, other, changes = ACCEPTED[name]
    changes = changed(COLUMN, q=other_side) if changes is None else changes
    right, wrong = (
        model(t, {n: a for n, a in ws.items() if n in _names(t)}) for t, ws in ((text, weights), (other, changes))
    )
    proof = prove(ORIGINAL, right)
    assert prove(ORIGINAL, right, approximations=declared(proof)).verdict.holds
    assert prove(ORIGINAL, wrong).verdict.holds
    found = prove(ORIGINAL, wrong, approximations=declared(proof))
    assert found.verdict.kind == "UNKNOWN"
    assert found.verdict.reason


@pytest.mark.parametrize("part", ["error_steps", "error_relative", "format", "scale", "name", "node", "saturation"])
def test_a_certificate_that_says_anything_else_is_false(part):
    right = model(WEIGHT_ONLY, COLUMN)
    said = declared(prove(ORIGINAL, right))
    assert prove(ORIGINAL, right, approximations=said).verdict.holds
    value = said[0][part]
    said[0][part] = value * (1 + 2.0**-30) if isinstance(value, float) else "other"
    assert not prove(ORIGINAL, right, approximations=said).verdict.holds
    assert not prove(ORIGINAL, right, approximations=[]).verdict.holds
    twice = declared(prove(ORIGINAL, right)) * 2
    assert not prove(ORIGINAL, right, approximations=twice).verdict.holds


def test_larger_errors_have_to_be_asked_for():
    narrow = changed(COLUMN, q=lambda q: np.clip(q, -100, 100))
    right = model(WEIGHT_ONLY, narrow)
    assert not prove(ORIGINAL, right).verdict.holds
    assert not prove(ORIGINAL, right, steps=20.0).verdict.holds
    for steps in (30.0, {"q": 30.0}):
        found = prove(ORIGINAL, right, steps=steps)
        assert found.verdict.kind == "EQUAL_MODULO"
        assert 26.5 < found.sites[0].error_steps <= 27.1
        assert "error ≤ 27.1 steps" in str(found)
    assert not prove(ORIGINAL, right, steps={"other": 30.0}).verdict.holds
    assert prove(ORIGINAL, right, approximations=declared(found)).verdict.holds


def test_codes_that_are_no_better_than_zeros_are_refused_at_any_number_of_steps():
    shuffled = changed(COLUMN, q=lambda q: q[::-1])
    found = prove(ORIGINAL, model(WEIGHT_ONLY, shuffled), steps=1000.0)
    assert found.verdict.kind == "UNKNOWN"
    assert "q" in found.verdict.reason


def test_exact_codes_are_equal_and_declare_nothing():
    scale = np.float32(0.25)
    codes = np.random.default_rng(3).integers(-8, 8, (64, 48)).astype(np.int8)
    original = model("(float[B,64] x) => (float[B,48] y) { y = MatMul(x, w) }", {"w": codes * scale})
    text = "(float[B,64] x) => (float[B,48] y) { d = DequantizeLinear(q, s) y = MatMul(x, d) }"
    found = prove(original, model(text, {"q": codes, "s": scale}))
    assert found.verdict.kind == "EQUAL"
    assert found.sites[0].error_steps == 0.0


# ── Relu, layouts, other formats ────────────────────────────────────────────────────────────────────────────────────

PAIR = " u = QuantizeLinear({0}, xs, xz) {1} y = DequantizeLinear({2}, xs, xz) }}"
HEAD = "(float[B,4,8] x) => (float[B,4,8] y) {"


def test_no_relu_hides_in_a_saturation():
    original = model(HEAD + " y = Relu(x) }")
    zero = {"xs": np.float32(0.1), "xz": np.uint8(0)}
    kept = model(HEAD + " r = Relu(x)" + PAIR.format("r", "", "u"), zero)
    dropped = model(HEAD + PAIR.format("x", "", "u"), zero)
    assert prove(original, kept).verdict.kind == "EQUAL_MODULO"
    assert not prove(original, dropped).verdict.holds


COMMUTES = {
    "Transpose": ("Transpose<perm=[0,2,1]>({0})", "(float[B,4,8] x) => (float[B,8,4] y) {", {}),
    "Reshape": ("Reshape({0}, shape)", "(float[B,4,8] x) => (float[B,32] y) {", {"shape": np.array([0, 32])}),
    "Slice": ("Slice({0}, one, three, one)", "(float[B,4,8] x) => (float[B,2,8] y) {", {"one": np.array([1]), "three": np.array([3])}),
    "Concat": ("Concat<axis=1>({0}, {0})", "(float[B,4,8] x) => (float[B,8,8] y) {", {}),
    "Gather": ("Gather<axis=1>({0}, index)", "(float[B,4,8] x) => (float[B,2,8] y) {", {"index": np.array([2, 0])}),
    "MaxPool": ("MaxPool<kernel_shape=[2], strides=[2]>({0})", "(float[B,4,8] x) => (float[B,4,4] y) {", {}),
}  # fmt: skip
NOT_ROUNDED = {"Relu": "Relu({0})", "Abs": "Abs({0})", "Neg": "Neg({0})"}


@pytest.mark.parametrize("name", COMMUTES)
def test_codes_pass_through_what_commutes_with_rounding(name):
    operator, head, weights = COMMUTES[name]
    scheme = {"xs": np.float32(0.1), "xz": np.uint8(100)}
    original = model(head + f" y = {operator.format('x')} }}", weights)
    right = model(head + PAIR.format("x", f"p = {operator.format('u')}", "p"), {**weights, **scheme})
    assert prove(original, right).verdict.kind == "EQUAL_MODULO"
    wrong = PAIR.format("x", f"p = {operator.format('u')}", "p").replace(
        "DequantizeLinear(p, xs", "DequantizeLinear(p, ys"
    )
    assert not prove(original, model(head + wrong, {**weights, **scheme, "ys": np.float32(0.2)})).verdict.holds


def test_codes_of_two_scales_are_not_joined():
    head = "(float[B,4] x, float[B,4] v) => (float[B,8] y) {"
    original = model(head + " y = Concat<axis=1>(x, v) }")
    text = (
        head
        + " a = QuantizeLinear(x, s, z) b = QuantizeLinear(v, {0}, z) c = Concat<axis=1>(a, b) y = DequantizeLinear(c, s, z) }"
    )
    weights = {"s": np.float32(0.1), "z": np.uint8(3)}
    assert prove(original, model(text.replace("{0}", "s"), weights)).verdict.holds
    assert not prove(original, model(text.replace("{0}", "t"), {**weights, "t": np.float32(0.2)})).verdict.holds


def test_the_originals_own_sites_are_no_sites():
    weights = {**COLUMN, **ACTIVATIONS}
    right = model(STATIC, weights)
    found = prove(right, model(STATIC, weights))
    assert found.verdict.kind == "EQUAL"
    assert not [site for site in found.sites if site.kind == "activation"]
    # What the original rounds is not what it would be without rounding.
    assert not prove(right, ORIGINAL).verdict.holds
    other = model(STATIC, {**weights, "xs": np.float32(0.03)})
    assert not prove(right, other).verdict.holds


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4, ml_dtypes.uint4])
def test_formats_of_few_bits(dtype):
    # Four bits have seven codes on each side, e5m2 two digits; the largest codes of both floats lie beyond 64.
    small = np.dtype(dtype).name.endswith("int4")
    middle = 8 if np.dtype(dtype).name == "uint4" else 0
    scale = (np.abs(W).max(0) / (7 if small else 64)).astype(np.float32)
    wanted = W / scale
    codes = (np.rint(wanted) + middle if small else wanted).astype(dtype)
    text = "(float[B,64] x) => (float[B,48] y) { d = DequantizeLinear<axis=1>(q, s, z) a = MatMul(x, d) y = Add(a, b) }"
    built = model(text.replace("(q, s, z)", "(q, s, z)"), {"s": scale, "b": BIAS})
    for name, array in (("q", codes), ("z", np.full(48, middle).astype(dtype))):
        tensor = ir.tensor(array, name=name)
        built.graph.initializers[name] = ir.Value(
            name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    for node in built.graph:
        if node.op_type == "DequantizeLinear":
            for place, name in ((0, "q"), (2, "z")):
                node.replace_input_with(place, built.graph.initializers[name])
    found = prove(ORIGINAL, built)
    assert found.verdict.kind == "EQUAL_MODULO", found
    assert found.sites[0].error_steps <= 0.5 + 2.0**-16
    assert found.sites[0].format.startswith(ir.tensor(codes).dtype.name.lower())


def test_convolutions_and_their_biases():
    kernel, bias = numbers(6, 4, 3, 3, seed=5), numbers(6, seed=6)
    head = "(float[N,4,H,8] x) => (float[N,6,H,8] y) {"
    original = model(head + " y = Conv<pads=[1,1,1,1]>(x, w, b) }", {"w": kernel, "b": bias})
    scale = (np.abs(kernel).reshape(6, -1).max(1) / 127).astype(np.float32)
    weights = {
        "q": np.rint(kernel / scale[:, None, None, None]).astype(np.int8),
        **{"s": scale, "xs": np.float32(0.05), "xz": np.uint8(128), "z": np.zeros(6, np.int8)},
        **{"ys": np.float32(0.1), "yz": np.uint8(130)},
    }
    weights["bs"] = weights["xs"] * scale
    weights["bq"] = np.rint(bias / weights["bs"]).astype(np.int32)
    pair = head + (
        " u = QuantizeLinear(x, xs, xz) v = DequantizeLinear(u, xs, xz) d = DequantizeLinear<axis=0>(q, s)"
        " c = DequantizeLinear<axis=0>(bq, bs) y = Conv<pads=[1,1,1,1]>(v, d, c) }"
    )
    fused = head + (
        " u = QuantizeLinear(x, xs, xz) r = QLinearConv<pads=[1,1,1,1]>(u, xs, xz, q, s, z, ys, yz, bq)"
        " y = DequantizeLinear(r, ys, yz) }"
    )
    for text, activations in ((pair, 1), (fused, 2)):
        known = {n: a for n, a in weights.items() if n in _names(text)}
        found = prove(original, model(text, known))
        assert found.verdict.kind == "EQUAL_MODULO", found
        assert {site.name for site in found.sites if site.kind == "weight"} == {"q", "bq"}
        assert sum(site.kind == "activation" for site in found.sites) == activations
        for name in ("q", "bq"):
            wrong = {**known, name: np.roll(known[name], 1, axis=0)}
            assert not prove(original, model(text, wrong)).verdict.holds
        wrong = {**known, "q": known["q"][:, :, ::-1].copy()}
        assert not prove(original, model(text, wrong)).verdict.holds


@pytest.mark.parametrize("taps", [(1, 1), (1, 2), (3, 3)])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_the_error_of_a_grouped_convolution_is_that_of_all_its_taps(groups, taps):
    """Its matrices have zeros beside the blocks, which are nobody's codes; each tap has a matrix of its own."""
    kernel = numbers(8, 8 // groups, *taps)
    scales = np.full(8, 2.0**-5, np.float32)
    codes = np.clip(np.rint(kernel / scales[:, None, None, None]), -127, 127).astype(np.int8)
    head, shape = f"(float[B,8,5,5] x) => (float[B,8,{6 - taps[0]},{6 - taps[1]}] y)", f"<group={groups}>"
    original = model(f"{head} {{ y = Conv{shape}(x, w) }}", {"w": kernel})
    text = f"{head} {{ d = DequantizeLinear<axis=0>(q, s) y = Conv{shape}(x, d) }}"
    for place in ((0, 0, 0, 0), (-1, -1, -1, -1)):
        wrong = codes.copy()
        wrong[place] += 5 if codes[place] < 0 else -5
        for stored, steps in ((codes, 64.0), (wrong, 64.0)):
            (site,) = prove(original, model(text, {"q": stored, "s": scales}), steps=steps).sites
            off = stored * scales[:, None, None, None].astype(float) - kernel
            assert site.error_steps == pytest.approx(np.abs(off).max() / scales[0])
            assert site.error_relative == pytest.approx(np.linalg.norm(off) / np.linalg.norm(kernel))
        assert not prove(original, model(text, {"q": wrong, "s": scales}), steps=1.0).verdict.holds


@pytest.mark.parametrize("shape", [(48,), (5, 48), (1, 48)])
def test_codes_that_are_divided_by(shape):
    """What is known of the quotient is known of the codes: their layout is the same."""
    weight = np.abs(numbers(*shape)) + 1
    scale = np.float32(2.0**-4)
    codes = np.rint(weight / scale).astype(np.int8)
    head = "(float[5,48] x) => (float[5,48] y)"
    original = model(f"{head} {{ y = Div(x, w) }}", {"w": weight})
    text = f"{head} {{ d = DequantizeLinear(q, s) y = Div(x, d) }}"
    found = prove(original, model(text, {"q": codes, "s": scale}))
    assert found.verdict.kind == "EQUAL_MODULO", found.verdict
    (site,) = found.sites
    assert site.error_steps == pytest.approx(np.abs(codes - weight / scale).max(), rel=0.1)
    assert not prove(original, model(text, {"q": codes + np.int8(3), "s": scale})).verdict.holds


def test_tables_of_codes():
    table = numbers(40, 48, seed=8)
    head = "(int64[B,S] i) => (float[B,S,48] y) {"
    original = model(head + " y = Gather(w, i) }", {"w": table})
    scale = np.float32(np.abs(table).max() / 127)
    codes = np.rint(table / scale).astype(np.int8)
    after = head + " g = Gather(q, i) y = DequantizeLinear(g, s, z) }"
    weights = {"q": codes, "s": scale, "z": np.int8(0)}
    assert prove(original, model(after, weights)).verdict.kind == "EQUAL_MODULO"
    assert not prove(original, model(after, {**weights, "q": np.roll(codes, 1, axis=0)})).verdict.holds
    blocks = blocked(table.T, 4, 16)
    gathered = head + " y = com.microsoft.GatherBlockQuantized<bits=4, block_size=16>(q, i, s) }"
    weights = {"q": blocks["q"].reshape(40, 24), "s": blocks["s"]}
    assert prove(original, model(gathered, weights)).verdict.kind == "EQUAL_MODULO"
    assert not prove(original, model(gathered, {**weights, "s": weights["s"][::-1].copy()})).verdict.holds


# ── Sums of several products ────────────────────────────────────────────────────────────────────────────────────────


def test_a_correction_of_low_rank_is_part_of_the_site():
    error = W - COLUMN["q"] * COLUMN["s"]
    u, values, v = np.linalg.svd(error.astype(np.float64))
    a, b = (u[:, :6] * values[:6]).astype(np.float32), v[:6].astype(np.float32)
    text = "(float[B,64] x) => (float[B,48] y) { p = com.microsoft.DynamicQuantizeMatMul(x, q, s, , b) t = MatMul(x, l) m = MatMul(t, r) y = Add(p, m) }"
    weights = {**{n: COLUMN[n] for n in ("q", "s", "b")}, "l": a, "r": b}
    found = prove(ORIGINAL, model(text, weights))
    assert found.verdict.kind == "EQUAL_MODULO"
    assert found.sites[0].error_relative < proof_of(DYNAMIC, COLUMN).sites[0].error_relative
    assert not prove(ORIGINAL, model(text, {**weights, "l": -30 * a})).verdict.holds
    said = declared(found)
    assert not prove(ORIGINAL, model(text, {**weights, "l": -a}), approximations=said).verdict.holds
    assert not prove(ORIGINAL, model(text, {**weights, "r": np.zeros_like(b)}), approximations=said).verdict.holds


def test_channels_that_are_multiplied_apart():
    channels = np.array([3, 17, 40])
    mask = np.ones(64, np.float32)
    mask[channels] = 0
    scaled = (numbers(64, seed=9)[:, None].astype(np.float64) * W).astype(np.float32)
    head = "(float[B,64] x) => (float[B,48] y) {"
    original = model(head + " n = LayerNormalization(x, g) y = MatMul(n, w) }", {"g": numbers(64, seed=9), "w": W})
    text = head + (
        " n = LayerNormalization(x, one) r = Mul(n, m) o = Gather<axis=-1>(n, i)"
        " p = com.microsoft.DynamicQuantizeMatMul(r, q, s) t = MatMul(o, w) y = Add(p, t) }"
    )
    rest = by_column(scaled * mask[:, None])
    weights = {
        "one": np.ones(64, np.float32),
        "m": mask,
        "i": channels,
        "q": rest["q"],
        "s": rest["s"],
        "w": scaled[channels],
    }
    found = prove(original, model(text, weights))
    assert found.verdict.kind == "EQUAL_MODULO"
    assert found.verdict.ulps <= 0.5 + 2.0**-16
    off = scaled[channels].copy()
    off[1, 2] *= np.float32(1.00001)
    assert not prove(original, model(text, {**weights, "w": off})).verdict.holds
    assert not prove(original, model(text, {**weights, "i": channels[::-1].copy()})).verdict.holds
    assert not prove(original, model(text, {**weights, "i": channels + 1})).verdict.holds


def test_one_tensor_of_codes_stands_for_one_matrix():
    head = "(float[B,64] x, float[B,64] v) => (float[B,48] y, float[B,48] w) {"
    other = W + np.float32(0.2) * COLUMN["s"]
    text = head + " y = com.microsoft.DynamicQuantizeMatMul(x, q, s) w = com.microsoft.DynamicQuantizeMatMul(v, q, s) }"
    right = model(text, {n: COLUMN[n] for n in ("q", "s")})
    both = head + " y = MatMul(x, a) w = MatMul(v, b) }"
    assert prove(model(both.replace("(v, b)", "(v, a)"), {"a": W}), right).verdict.holds
    assert not prove(model(both, {"a": W, "b": other.astype(np.float32)}), right).verdict.holds


# ── What integer kernels add ────────────────────────────────────────────────────────────────────────────────────────


def test_accumulators_hold_their_sums():
    # 2³¹ / (255·127) rows of the largest code are just too many.
    rows = 2**31 // (255 * 127)
    for count, fits in ((rows, True), (rows + 1, False)):
        grid = Linear(Array(np.full((count, 2), 127, np.int8)), Array(np.ones(())))
        found = sums(grid)
        assert found.fits is fits
        assert found.accumulator == 255 * 127 * count
    bias = Array(np.array([2**31 - 1, 0], np.int32))
    assert not sums(Linear(Array(np.ones((4, 2), np.int8)), Array(np.ones(()))), bias=bias).fits


def test_a_sum_that_may_leave_32_bits_is_no_proof():
    rows = 2**31 // (255 * 127) + 1
    weight = np.full((rows, 1), 0.5, np.float32)
    head = f"(float[B,{rows}] x) => (float[B,1] y) {{"
    original = model(head + " y = MatMul(x, w) }", {"w": weight})
    text = head + " y = com.microsoft.DynamicQuantizeMatMul(x, q, s) }"
    scale = np.array([0.5 / 127], np.float32)
    found = prove(original, model(text, {"q": np.full((rows, 1), 127, np.int8), "s": scale}))
    assert not found.verdict.holds
    assert "32 bits" in found.verdict.reason
    half = {"q": np.full((rows, 1), 63, np.int8), "s": np.array([0.5 / 63], np.float32)}
    assert prove(original, model(text, half)).verdict.holds


@pytest.mark.parametrize(
    ("codes", "largest"),
    [
        ([64, 64, 0, 0], 128),
        ([65, 64, 0, 0], 129),
        ([0, 65, 64, 0], 65),
        ([127, -128, 0, 0], 128),
        ([-64, -65, 0], 129),
    ],
)
def test_pairs_of_neighbours(codes, largest):
    grid = Linear(Array(np.array(codes, np.int8)[:, None]), Array(np.ones(())))
    assert sums(grid).pair == largest
    # By definition: two products with 255 in 16 bits.
    pairs = np.append(np.array(codes), 0)[: len(codes) // 2 * 2 + 2 * (len(codes) % 2)].reshape(-1, 2)
    worst = max((255 * abs(int(p[p * sign > 0].sum())) - (sign < 0) for p in pairs for sign in (1, -1)), default=0)
    assert (worst <= 2**15 - 1) is (largest <= LARGEST_PAIR)


def test_saturation_is_a_condition_only_where_it_is_possible():
    free = {**by_column(W, largest=64), "b": BIAS}
    for text in (DYNAMIC, STATIC, INTEGER, OPERATOR, TO_FLOAT):
        for weights, possible in ((COLUMN, True), (free, False)):
            found = proof_of(text, {**weights, **ACTIVATIONS})
            assert (found.sites[0].saturation == SATURATES) is possible
            assert ("VNNI" in str(found)) is possible
    # Kernels for blocks of few bits do not add pairs in 16 bits, and floating point does not at all.
    assert "VNNI" not in str(proof_of(nbits(bits=8, block=32, level=4), {**blocked(W, 8, 32), "b": BIAS}))
    assert "VNNI" not in str(proof_of(WEIGHT_ONLY, COLUMN))
    unsigned = {**COLUMN, "q": (COLUMN["q"].astype(int) + 128).astype(np.uint8), "z": np.full(48, 128, np.uint8)}
    assert "VNNI" not in str(proof_of(INTEGER, unsigned))


def test_large_tensors_in_files_are_read_by_regions(tmp_path):
    """Codes of four bits in a file of their own."""
    codes = np.random.default_rng(2).integers(-8, 8, (64, 48)).astype(ml_dtypes.int4)
    scale = np.float32(0.1)
    original = model("(float[B,64] x) => (float[B,48] y) { y = MatMul(x, w) }", {"w": codes.astype(np.float32) * scale})
    built = model("(float[B,64] x) => (float[B,48] y) { d = DequantizeLinear(q, s) y = MatMul(x, d) }", {"s": scale})
    tensor = ir.tensor(codes, name="q")
    value = ir.Value(name="q", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    built.graph.initializers["q"] = value
    built.graph[0].replace_input_with(0, value)
    ir.save(built, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    loaded = ir.load(tmp_path / "m.onnx")
    assert isinstance(loaded.graph.initializers["q"].const_value, ir.ExternalTensor)
    assert prove(original, loaded).verdict.holds


def test_transposed_codes_are_summed_along_their_own_axis():
    """Neighbours in a row of 64 + 64 are a pair only where rows are summed."""
    codes = np.tile(np.array([[100, 1], [1, 100]], np.int8), (32, 24))
    scale = np.float32(0.01)
    original = model("(float[B,64] x) => (float[B,48] y) { y = MatMul(x, w) }", {"w": codes * scale})
    text = (
        "(float[B,64] x) => (float[B,48] y) { u = QuantizeLinear(x, xs, xz) v = DequantizeLinear(u, xs, xz)"
        " d = DequantizeLinear(q, s) t = Transpose(d) y = MatMul(v, t) }"
    )
    pairs = np.tile(np.array([[100, 100], [1, 1]], np.int8), (32, 24))
    along = model("(float[B,64] x) => (float[B,48] y) { y = MatMul(x, w) }", {"w": pairs * scale})
    down = model("(float[B,64] x) => (float[B,48] y) { y = MatMul(x, w) }", {"w": pairs.reshape(48, 64).T * scale})
    weights = {"s": scale, "xs": np.float32(0.1), "xz": np.uint8(3)}
    for before, stored, possible in (
        (original, codes.T, False),
        (along, pairs.T, False),
        (down, pairs.reshape(48, 64), True),
    ):
        found = prove(before, model(text, {**weights, "q": np.ascontiguousarray(stored)}))
        assert found.verdict.kind == "EQUAL_MODULO"
        assert ("VNNI" in str(found)) is possible
