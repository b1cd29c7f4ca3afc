"""Constants compared as matrices: ulps in their own storage type, cancellation, and one value for each."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import model

from rewrite.proof import prove
from rewrite.proof.chains import UNIT, Centre, Chain, Diagonal, Factor, Matrix, Mean, Scalar, Spread
from rewrite.proof.constants import Array, Expanded, Grouped, Joined, Reciprocal, Stored, permuted, reshaped, sliced
from rewrite.proof.linear import Comparer, compare_scalars
from rewrite.proof.products import Match, rows

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
ONNX = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16", "float64": "double"}


def nudged(array: np.ndarray, ulps: int, at: tuple[int, ...] = (1, 2)) -> np.ndarray:
    """`array` with one entry moved away from zero by `ulps` of its storage type."""
    result = array.copy()
    bits = result.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.itemsize])
    bits[at] += ulps
    return result


def scaled_weight(kind: str, ulps: int):
    """x·diag(γ)·W against x·W′ with W′ = diag(γ)·W exactly, but for one entry that is off by `ulps`."""
    dtype = TYPES[kind]
    w = np.random.default_rng(0).normal(size=(4, 4)).astype(dtype)
    gamma = np.array([2, 0.5, -4, 1], dtype)
    folded = (gamma.astype(np.float64)[:, None] * w.astype(np.float64)).astype(dtype)
    text = f"({ONNX[kind]}[B,4] x) => ({ONNX[kind]}[B,4] y)"
    return (
        model(text + " { a = Mul(x, g) y = MatMul(a, w) }", {"g": gamma, "w": w}),
        model(text + " { y = MatMul(x, v) }", {"v": nudged(folded, ulps)}),
    )


@pytest.mark.parametrize("kind", TYPES)
def test_the_exact_product_is_zero_ulps_off(kind: str) -> None:
    proof = prove(*scaled_weight(kind, 0))
    assert proof.verdict.holds or kind == "float64"
    assert proof.verdict.ulps < 1e-3 or kind == "float64"


@pytest.mark.parametrize("kind", TYPES)
def test_one_ulp_is_equal(kind: str) -> None:
    text = f"({ONNX[kind]}[B,4] x) => ({ONNX[kind]}[B,4] y) {{ y = MatMul(x, w) }}"
    w = np.random.default_rng(0).normal(size=(4, 4)).astype(TYPES[kind])
    verdict = prove(model(text, {"w": w}), model(text, {"w": nudged(w, 1)})).verdict
    assert verdict.holds
    assert verdict.ulps == 1.0
    assert not prove(model(text, {"w": w}), model(text, {"w": nudged(w, 2)})).verdict.holds


def test_one_ulp_is_one_ulp() -> None:
    """What float64 cannot tell from more is computed exactly, where nothing but stored numbers is multiplied."""
    verdict = prove(*scaled_weight("float32", 1)).verdict
    assert (verdict.kind, verdict.ulps) == ("EQUAL", 1.0)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("ulps", [3, 1000])
def test_three_ulps_are_not(kind: str, ulps: int) -> None:
    assert not prove(*scaled_weight(kind, ulps)).verdict.holds


def test_a_type_is_measured_in_its_own_ulps() -> None:
    """One ulp of float16 is 8192 of float32: what float16 may be off is not what float32 may."""
    original, _ = scaled_weight("float32", 0)
    _, rewritten = scaled_weight("float32", 8192)
    assert not prove(original, rewritten).verdict.holds


def centred_weight(entry: float):
    """The mean of three rows is taken out of a weight; one centred entry cancels to almost nothing."""
    w = np.float32([[1.0, 2.0], [1 + 2.0**-20, 5.0], [1 - 2.0**-20, -4.0]]).T.copy()
    centred = (w.astype(np.float64) - w.astype(np.float64).mean(1, keepdims=True)).astype(np.float32)
    centred[0, 1] = entry
    gamma = np.ones(3, np.float32)
    return (
        model(
            "(float[B,2] x) => (float[B,3] y) { a = MatMul(x, w) y = LayerNormalization(a, g) }", {"w": w, "g": gamma}
        ),
        model(
            "(float[B,2] x) => (float[B,3] y) { a = MatMul(x, w) y = RMSNormalization(a, g) }",
            {"w": centred, "g": gamma},
        ),
    )


def test_an_entry_that_cancels_is_no_hiding_place() -> None:
    """An ulp of what was subtracted is 2⁻²³; the difference 2⁻²⁰ must be met within its own ulp of 2⁻⁴³."""
    assert prove(*centred_weight(2.0**-20)).verdict.holds
    assert prove(*centred_weight(2.0**-20 + 2.0**-43)).verdict.holds
    assert not prove(*centred_weight(2.0**-20 + 2.0**-40)).verdict.holds
    assert not prove(*centred_weight(2.0**-20 + 2.0**-24)).verdict.holds


def test_a_number_is_compared_in_its_own_ulps() -> None:
    text = "(float[B] x) => (float[B] y) {{ a = Mul(x, {}) y = Exp(a) }}"

    def off(ulps: int) -> bool:
        other = nudged(np.float32([0.3]), ulps, (0,))
        return prove(
            model(text.format("c"), {"c": np.float32([0.3])}), model(text.format("d"), {"d": other})
        ).verdict.holds

    assert off(0)
    assert off(1)
    assert not off(3)


def test_a_number_that_nobody_wrote_is_exact() -> None:
    assert isinstance(compare_scalars(Scalar(2.0), Scalar(2.0)), Match)
    assert not isinstance(compare_scalars(Scalar(2.0), Scalar(2.0 + 2**-23)), Match)
    assert isinstance(compare_scalars(Scalar(2.0, (("s", 1),), 2.0**-23), Scalar(2.0 + 2**-23)), Match)
    assert not isinstance(compare_scalars(Scalar(2.0, (("s", 1), ("s", 1)), 2.0**-23), Scalar(2.0 + 2**-23)), Match)
    assert not isinstance(compare_scalars(Scalar(0.0, (("s", 1),), 2.0**-23), Scalar(1e-30)), Match)


def test_two_uses_that_ask_for_different_values_conflict() -> None:
    """Each use alone is within an ulp; together there is no tensor for both."""
    w = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    text = "(float[B,4] x, float[B,4] u) => (float[B,4] y, float[B,4] z)"
    original = model(text + " { y = MatMul(x, v) b = MatMul(u, w) z = Exp(b) }", {"v": nudged(w, 1), "w": w})
    rewritten = model(text + " { y = MatMul(x, w) b = MatMul(u, w) z = Exp(b) }", {"w": w})
    proof = prove(original, rewritten)
    assert not proof.verdict.holds
    assert "different exact values" in proof.verdict.reason
    apart = model(text + " { y = MatMul(x, v) b = MatMul(u, w) z = Exp(b) }", {"v": w, "w": w})
    assert prove(original, apart).verdict.holds


def test_a_number_used_as_shipped_and_as_another() -> None:
    text = "(float[B] x, float[B] u) => (float[B] y, float[B] z)"
    c, d = np.float32(0.3), np.nextafter(np.float32(0.3), np.float32(1))
    original = model(text + " { a = Mul(x, c) y = Exp(a) b = Mul(u, d) z = Exp(b) }", {"c": c, "d": d})
    for body in ("b = Mul(u, c) z = Exp(b)", "h = Mul(u, one) b = Mul(h, c) z = Exp(b)"):
        shared = model(f"{text} {{ a = Mul(x, c) y = Exp(a) {body} }}", {"c": c, "one": np.float32(1)})
        assert not prove(original, shared).verdict.holds
    apart = model(text + " { a = Mul(x, c) y = Exp(a) b = Mul(u, e) z = Exp(b) }", {"c": c, "e": c})
    assert prove(original, apart).verdict.holds


def test_parts_of_one_tensor_are_solved_apart() -> None:
    """Disjoint slices may ask for different expressions; slices that meet may not."""
    w = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    gamma, delta = np.float32([1.3, 0.7, 2.1, -0.4]), np.float32([0.2, 5.0, 1.1, 0.9])
    original = (
        "(float[B,4] x) => (y, z) { l, r = Split<axis=1, num_outputs=2>(w)"
        " a = Mul(x, g) b = MatMul(a, l) y = Exp(b) c = Mul(x, d) e = MatMul(c, r) z = Exp(e) }"
    )
    rewritten = (
        "(float[B,4] x) => (y, z) { l, r = Split<axis=1, num_outputs=2>(w) b = MatMul(x, l) y = Exp(b)"
        " e = MatMul(x, r) z = Exp(e) }"
    )
    folded = np.concatenate([gamma[:, None] * w[:, :4], delta[:, None] * w[:, 4:]], 1)
    first = model(original, {"w": w, "g": gamma, "d": delta})
    assert prove(first, model(rewritten, {"w": folded})).verdict.holds
    both = rewritten.replace("e = MatMul(x, r)", "e = MatMul(x, l)")
    assert not prove(first, model(both, {"w": folded})).verdict.holds


# ── Chains ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SIZE = 4


def factor(kind: str, seed: int) -> Factor:
    numbers = np.random.default_rng(seed).normal(size=(SIZE, SIZE))
    return {
        "matrix": Matrix(Array(numbers)),
        "diagonal": Diagonal(Array(numbers[0])),
        "scalar": Scalar(float(numbers[0, 0])),
        "centre": Centre(SIZE),
    }[kind]


def dense(part: Factor) -> list[list[Fraction]]:
    """The factor as a matrix of rational numbers."""
    eye = [[Fraction(int(i == j)) for j in range(SIZE)] for i in range(SIZE)]
    if isinstance(part, Matrix):
        return [[Fraction(float(v)) for v in row] for row in part.constant.whole()]
    if isinstance(part, Diagonal):
        return [[v * Fraction(float(part.constant.whole()[j])) for j, v in enumerate(row)] for row in eye]
    if isinstance(part, Scalar):
        return [[v * Fraction(part.value) for v in row] for row in eye]
    return [[v - Fraction(1, SIZE) for v in row] for row in eye]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["matrix", "diagonal", "scalar", "centre"]), max_size=5), st.integers(0, 1000))
def test_a_product_is_within_its_bound(kinds: list[str], seed: int) -> None:
    """The float64 value of a product of factors is no further from the rational one than the bound says."""
    factors = [factor(kind, seed + index) for index, kind in enumerate(kinds)]
    block = rows(factors, slice(0, SIZE), SIZE)
    wanted = dense(Scalar(1.0))
    for part in factors:
        right = dense(part)
        wanted = [
            [sum((a * right[k][j] for k, a in enumerate(row)), Fraction(0)) for j in range(SIZE)] for row in wanted
        ]
    for i in range(SIZE):
        for j in range(SIZE):
            # The bound is itself computed in float64, a few roundings of its own.
            assert (
                abs(Fraction(float(block.value[i, j])) - wanted[i][j])
                <= Fraction(float(block.error[i, j])) * Fraction(UNIT) * 2
            )


def test_chains_simplify_by_what_is_certain_only() -> None:
    assert Chain().then(Centre(4)).then(Centre(4)).factors == (Centre(4),)
    assert Chain().then(Spread(4)).then(Mean(4)).factors == ()
    assert Chain().then(Spread(4)).then(Centre(4)) is None
    assert Chain().then(Centre(4)).then(Mean(4)) is None
    diagonal = Diagonal(Array(np.arange(4.0)))
    assert Chain().then(Centre(4)).then(diagonal).then(Centre(4)).factors == (Centre(4), diagonal, Centre(4))
    assert Chain().then(Centre(4)).select(0, 2) is None


def test_a_shipped_one_or_zero_stays_a_use() -> None:
    one = Scalar(1.0, (("s", 1),), 2.0**-23)
    assert Chain().then(one).scalar.names == ("s",)
    assert Chain().then(Scalar(0.0, (("s", 1),), 2.0**-23)) is not None
    assert Chain().then(Scalar(0.0)) is None


def test_a_remembered_answer_names_the_constant_at_hand() -> None:
    """Two shipped numbers of one value, compared with the same number: each gets its own demand."""
    comparer = Comparer()
    original = [Chain((Scalar(0.5 + 2**-24),))]
    for name in "st":
        outcome = comparer.compare([Chain((Scalar(0.5, ((name, 1),), 2.0**-23),))], original, None)
        assert isinstance(outcome, Match)
        assert {demand.name for demand in outcome.demands} == {name}


def test_constants_that_differ_in_one_place_of_the_layout() -> None:
    import onnx_ir as ir

    comparer = Comparer()
    tensors = [ir.tensor(np.arange(6, dtype=np.float32).reshape(shape)) for shape in ((2, 3), (3, 2))]
    a, b = (Stored("original", str(i), tensor) for i, tensor in enumerate(tensors))
    assert not comparer.same_constant(a, b)
    assert comparer.same_constant(a, a)


def test_arranging_computed_numbers_leaves_them_computed() -> None:
    """Entries of a constant that arithmetic made are not exact, however they lie."""
    computed, exact = Array(np.ones((4, 6)), 64), Array(np.ones((4, 6)))
    whole = (slice(0, 2), slice(0, 6))
    arranged = [
        permuted(computed, (1, 0)),
        reshaped(computed, (8, 3)),
        sliced(computed, whole),
        reshaped(sliced(permuted(computed, (1, 0)), (slice(0, 3), slice(0, 4))), (12,)),
        Grouped(computed, 2),
        Expanded(reshaped(computed, (1, 24)), (2, 24)),
        Joined((exact, computed), 0),
    ]
    assert [each.roundings for each in arranged] == [64] * len(arranged)
    assert Reciprocal(computed).roundings == 65
    assert permuted(exact, (1, 0)).roundings == 0
