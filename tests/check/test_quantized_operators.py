"""The quantized operators' definitions against ONNX Runtime's kernels: the same codes, sums within float32 rounding.

A kernel's sums of codes are exact, so what it may differ by is counted: one rounding of the sum to float32, of the
scales' product, of their product with the sum and of the bias; and one a term where it adds floats.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from single_node import CONTRIBUTED, both, node_model

from rewrite.check.noise import unit_roundoff
from rewrite.check.operators.contrib_quantization import INTEGER_KERNELS, rounded_by_block, rounds_activations
from rewrite.check.reference import evaluate
from rewrite.check.runtime import run, run_original
from rewrite.errors import UnsupportedOperatorError

U = unit_roundoff(np.float32)
SCALED_SUM = 4
"""Roundings behind an exact sum: to float32, the product of the scales, the product with it, the bias."""


def rng() -> np.random.Generator:
    return np.random.default_rng(20240612)


def real(*shape: int) -> np.ndarray:
    return np.asarray(rng().standard_normal(shape), np.float32)


def positive(*shape: int) -> np.ndarray:
    return (rng().random(shape) / 10 + 0.01).astype(np.float32)


def codes(dtype: type, *shape: int) -> np.ndarray:
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else ml_dtypes.iinfo(dtype)
    return rng().integers(int(limits.min), int(limits.max) + 1, shape).astype(dtype)


def scalar(value: float, dtype: type = np.float32) -> np.ndarray:
    return np.array(value, dtype)


def same_codes(operator: str, operands: list, **options) -> None:
    ours, theirs = both(operator, operands, **options)
    assert ours, "the node has outputs"
    for mine, kernel in zip(ours, theirs, strict=True):
        assert mine.shape == kernel.shape
        if kernel.dtype.kind in "iu":
            assert mine.dtype == kernel.dtype
        np.testing.assert_array_equal(mine.astype(np.float64), kernel.astype(np.float64))


X = 3 * real(4, 6, 10)
LONG = 30 * real(64, 300)
EXTREME = np.concatenate([LONG.ravel(), np.array([0, 1e-9, 500, -500, 1e9, -1e9], np.float32)])

QUANTIZE = {
    "per tensor": ([LONG, scalar(0.37), scalar(3, np.int8)], {}),
    "to uint8 without a zero point": ([LONG, scalar(0.37)], {}),
    "per axis": ([X, positive(6), codes(np.uint8, 6)], {"axis": 1}),
    "per axis from the end": ([X, positive(10), codes(np.int8, 10)], {"axis": -1}),
    "by blocks": ([X, positive(4, 6, 5), codes(np.int8, 4, 6, 5)], {"axis": 2, "block_size": 2, "opset": 21}),
    "by blocks, the last one short": ([X, positive(4, 2, 10)], {"axis": 1, "block_size": 4, "opset": 21}),
    "to int16": ([LONG, scalar(0.001), scalar(-70, np.int16)], {"opset": 21}),
    "to uint16": ([LONG, scalar(0.001), scalar(700, np.uint16)], {"opset": 21}),
    "to int8 by output_dtype": ([X, scalar(0.5)], {"output_dtype": 3, "opset": 21}),
    "contributed": ([LONG, scalar(0.37), scalar(9, np.uint8)], {"domain": CONTRIBUTED}),
    "contributed, per axis": (
        [X, positive(6), codes(np.uint16, 6)], {"axis": 1, "domain": CONTRIBUTED},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTIZE)
def test_quantize_linear(case: str) -> None:
    operands, options = QUANTIZE[case]
    same_codes("QuantizeLinear", operands, **options)


def test_a_tie_goes_to_the_even_code_on_both_sides() -> None:
    same_codes("QuantizeLinear", [np.arange(-9, 9, dtype=np.float32) / 2, scalar(1), scalar(0, np.int8)])


def test_the_quotient_is_rounded_to_float32_before_it_is_to_a_code() -> None:
    """x/s lies below a tie in float64 and on it in float32: a division in float64 would give another code."""
    steps = np.arange(1, 2000, 2, dtype=np.float64) / 2
    scale = np.float32(0.1)
    x = (steps * np.float64(scale)).astype(np.float32)
    other = np.rint(np.float64(x) / np.float64(scale)) != np.rint(x / scale)
    assert other.any(), "the example holds such a number"
    same_codes("QuantizeLinear", [x, np.array(scale), scalar(0, np.int16)], opset=21)


NARROW = {
    "int4": ([X, scalar(0.5), scalar(-1, ml_dtypes.int4)], {"opset": 21}, np.int8),
    "int4 a block": (
        [X, positive(4, 6, 5), codes(ml_dtypes.int4, 4, 6, 5)], {"block_size": 2, "axis": 2, "opset": 21}, np.int8,
    ),
    "uint4 by output_dtype": ([X, scalar(0.5)], {"output_dtype": ir.DataType.UINT4, "opset": 21}, np.uint8),
    **{
        name: ([EXTREME, scalar(0.05), np.zeros((), getattr(ml_dtypes, name))], {"opset": 19}, np.float32)
        for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", NARROW)
def test_quantize_to_a_type_that_no_session_returns(case: str) -> None:
    """The codes are cast to a type that one does return."""
    operands, options, shown = NARROW[case]
    model, inputs = node_model("QuantizeLinear", operands, constant=tuple(range(1, len(operands))), **options)
    to = ir.DataType.from_numpy(np.dtype(shown))
    cast = ir.node("Cast", model.graph.outputs[0:1], {"to": int(to)}, name="shown")
    model.graph.append(cast)
    cast.outputs[0].name = "shown"
    model.graph.outputs[0] = cast.outputs[0]
    (mine,), (kernel,) = evaluate(model, inputs).values(), run_original(model, inputs).values()
    np.testing.assert_array_equal(mine, kernel.astype(mine.dtype))
    assert len(np.unique(kernel)) > 8, "the example does not only saturate"


def test_a_lower_precision_of_the_division_is_refused() -> None:
    model, inputs = node_model("QuantizeLinear", [X, scalar(0.5)], precision=10, opset=23)
    with pytest.raises(UnsupportedOperatorError, match="in less than float32"):
        evaluate(model, inputs)


DEQUANTIZE = {
    "per tensor": ([codes(np.int8, 4, 6), scalar(0.1), scalar(3, np.int8)], {}),
    "per axis": ([codes(np.uint8, 4, 6), positive(6), codes(np.uint8, 6)], {"axis": 1}),
    "int32 without a zero point": ([codes(np.int16, 4, 6).astype(np.int32), scalar(0.1)], {}),
    "by blocks of 4 bits": (
        [codes(ml_dtypes.uint4, 8, 6), positive(2, 6), codes(ml_dtypes.uint4, 2, 6)],
        {"axis": 0, "block_size": 4, "opset": 21, "constant": (0, 1, 2)},
    ),
    "contributed": ([codes(np.uint16, 4, 6), scalar(0.1), scalar(3, np.uint16)], {"domain": CONTRIBUTED}),
}


@pytest.mark.parametrize("case", DEQUANTIZE)
def test_dequantize_linear(case: str) -> None:
    operands, options = DEQUANTIZE[case]
    (mine,), (kernel,) = both("DequantizeLinear", operands, **options)
    assert (np.abs(mine - kernel) <= U * np.abs(mine)).all(), "one product is one rounding"


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_dynamic_quantize_linear(shift: float) -> None:
    for seed in range(20):
        x = np.random.default_rng(seed).standard_normal((3, 50)).astype(np.float32) * 10 ** (seed - 10) + shift
        same_codes("DynamicQuantizeLinear", [x.astype(np.float32)], outputs=3)


def test_dynamic_quantization_of_zeros() -> None:
    same_codes("DynamicQuantizeLinear", [np.zeros((2, 3), np.float32)], outputs=3)


INTEGER_PRODUCTS = {
    "of one zero point": (
        [codes(np.uint8, 5, 40), codes(np.int8, 40, 7), scalar(9, np.uint8), scalar(-3, np.int8)], (),
    ),
    "of a zero point a column": (
        [codes(np.uint8, 5, 40), codes(np.uint8, 40, 7), scalar(9, np.uint8), codes(np.uint8, 7)], (1, 3),
    ),
    "without zero points": ([codes(np.int8, 2, 5, 40), codes(np.int8, 40, 7)], ()),
}  # fmt: skip


@pytest.mark.parametrize("case", INTEGER_PRODUCTS)
def test_matmul_integer(case: str) -> None:
    operands, constant = INTEGER_PRODUCTS[case]
    same_codes("MatMulInteger", operands, constant=constant)


@pytest.mark.parametrize("group", [1, 2])
def test_conv_integer(group: int) -> None:
    x, w = codes(np.uint8, 2, 4, 9, 8), codes(np.uint8, 6, 4 // group, 3, 2)
    zeros = [scalar(100, np.uint8), scalar(7, np.uint8)]
    same_codes("ConvInteger", [x, w, *zeros], pads=[1, 0, 2, 1], strides=[2, 1], group=group)


@pytest.mark.parametrize("per_column", [False, True])
def test_qlinear_matmul(per_column: bool) -> None:
    count = (7,) if per_column else ()
    operands = [
        codes(np.uint8, 5, 40), scalar(0.02), scalar(120, np.uint8),
        codes(np.int8, 40, 7), positive(*count), np.zeros(count, np.int8),
        scalar(0.7), scalar(110, np.uint8),
    ]  # fmt: skip
    same_codes("QLinearMatMul", operands, constant=(3, 4, 5))


def test_qlinear_conv() -> None:
    operands = [
        codes(np.uint8, 2, 4, 9, 8), scalar(0.02), scalar(120, np.uint8),
        codes(np.int8, 6, 4, 3, 2), positive(6), np.zeros(6, np.int8),
        scalar(0.9), scalar(110, np.uint8), codes(np.int16, 6).astype(np.int32),
    ]  # fmt: skip
    same_codes("QLinearConv", operands, constant=(3, 4, 5, 8), pads=[1, 0, 2, 1])


@pytest.mark.parametrize("turned", [0, 1])
def test_quantized_gemm(turned: int) -> None:
    b = codes(np.int8, 40, 7)
    operands = [
        codes(np.uint8, 5, 40), scalar(0.02), scalar(120, np.uint8),
        b.T.copy() if turned else b, positive(7), np.zeros(7, np.int8), codes(np.int16, 7).astype(np.int32),
    ]  # fmt: skip
    options = {"domain": CONTRIBUTED, "transB": turned, "alpha": 0.5}
    same_codes("QGemm", [*operands, scalar(0.7), scalar(110, np.uint8)], **options)
    (mine,), (kernel,) = both("QGemm", operands, **options)
    assert (np.abs(mine - kernel) <= (SCALED_SUM + 1) * U * np.abs(mine)).all(), "one more rounding, of α"


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_dynamic_quantize_matmul(dtype: type, per_column: bool, zero: bool) -> None:
    b, count = codes(dtype, 70, 9), (9,) if per_column else (1,)
    zeros = codes(dtype, *count) if zero else np.zeros(count, dtype)
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal((2, 5, 70)).astype(np.float32) * 3 + np.float32(seed)
        for bias in (None, real(9)):
            operands = [x, b, positive(*count), zeros, bias]
            (mine,), (kernel,) = both(
                "DynamicQuantizeMatMul", operands, domain=CONTRIBUTED, constant=(1, 2, 3, 4)[: 3 + (bias is not None)]
            )
            size = np.abs(mine if bias is None else mine - bias) + (0 if bias is None else np.abs(bias))
            assert (np.abs(mine - kernel) <= SCALED_SUM * U * size).all()


def test_matmul_integer_to_float() -> None:
    operands = [
        codes(np.uint8, 5, 70), codes(np.int8, 70, 9), scalar(0.02), positive(9), scalar(120, np.uint8),
        np.zeros(9, np.int8), real(9),
    ]  # fmt: skip
    (mine,), (kernel,) = both("MatMulIntegerToFloat", operands, domain=CONTRIBUTED)
    size = np.abs(mine - operands[6]) + np.abs(operands[6])
    assert (np.abs(mine - kernel) <= SCALED_SUM * U * size).all()


def packed(steps: np.ndarray, bits: int) -> np.ndarray:
    """Codes (..., n) as bytes, low bits first."""
    parts = steps.reshape(*steps.shape[:-1], -1, 8 // bits).astype(np.uint8)
    return np.bitwise_or.reduce(parts << (bits * np.arange(8 // bits, dtype=np.uint8)), axis=-1)


def blocked(bits: int, block: int, k: int, n: int, zero: str = "none", bias: bool = False, seed: int = 0):
    """Operands of a MatMulNBits (x left out) and Σ-ready magnitudes: |q|·s + |z|·s as (n, k)."""
    make = np.random.default_rng(seed)
    count = -(-k // block)
    steps = make.integers(0, 1 << bits, (n, count, block))
    scales = (make.random((n, count)) + 0.5).astype(np.float32)
    zeros, given = np.full((n, count), float(1 << (bits - 1))), None
    if zero == "uint8":
        per = 8 // bits
        held = make.integers(0, 1 << bits, (n, -(-count // per) * per))
        zeros, given = held[:, :count].astype(float), packed(held, bits).ravel()
    elif zero == "float":
        given = (make.random((n, count)) * (1 << bits)).astype(np.float32).reshape(-1)
        zeros = given.reshape(n, count).astype(float)
    offset = make.standard_normal(n).astype(np.float32) if bias else None
    size = ((np.abs(steps) + np.abs(zeros)[..., None]) * scales[..., None]).reshape(n, -1)[:, :k]
    return [packed(steps, bits), scales.ravel(), given, None, offset], size


def nbits(x: np.ndarray, operands: list, block: int, k: int, n: int, **options):
    while operands and operands[-1] is None:
        operands = operands[:-1]
    constant = tuple(i + 1 for i, operand in enumerate(operands) if operand is not None)
    return node_model(
        "MatMulNBits",
        [x, *operands],
        domain=CONTRIBUTED,
        **{"constant": constant, "block_size": block, "K": k, "N": n, **options},
    )


CASES = [
    (bits, block, zero)
    for bits, zeros in ((2, ("none", "uint8", "float")), (4, ("none", "uint8", "float")), (8, ("none", "uint8")))
    for block in (16, 32, 64, 128, 256)
    for zero in zeros
]


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize(("bits", "block", "zero"), CASES)
def test_matmul_of_few_bits(bits: int, block: int, zero: str, level: int) -> None:
    for k, n, rows, bias in ((256, 24, 1, False), (200, 17, 5, True)):
        operands, size = blocked(bits, block, k, n, zero, bias, seed=bits + block)
        x = np.random.default_rng(k).standard_normal((2, rows, k)).astype(np.float32)
        model, inputs = nbits(x, operands, block, k, n, bits=bits, accuracy_level=level)
        (mine,), (kernel,) = evaluate(model, inputs).values(), run_original(model, inputs).values()
        seen = x.astype(np.float64)
        terms = k + SCALED_SUM
        if rounds_activations(next(iter(model.graph))):
            seen, terms = rounded_by_block(x, block), 2 * -(-k // block) + SCALED_SUM  # exact sums within a block
            assert (level, zero != "float", block in INTEGER_KERNELS[bits]) == (4, True, True)
        bound = terms * U * (np.abs(seen) @ size.T + (0 if operands[4] is None else np.abs(operands[4])))
        assert (np.abs(mine - kernel) <= bound).all()


def test_the_other_rounding_of_the_activations_is_told_from_the_right_one() -> None:
    """The bound that accepts the definition rejects the same product with float activations, and the other way."""
    k, n, block = 512, 32, 32
    operands, size = blocked(4, block, k, n)
    x = real(8, k)
    kernels, mine = {}, {}
    for level in (0, 4):
        model, inputs = nbits(x, operands, block, k, n, bits=4, accuracy_level=level)
        (mine[level],), (kernels[level],) = evaluate(model, inputs).values(), run(model, inputs).values()
    bound = (k + SCALED_SUM) * U * (np.abs(x) @ size.T)
    for level, other in ((0, 4), (4, 0)):
        assert (np.abs(mine[level] - kernels[level]) <= bound).all()
        assert not (np.abs(mine[other] - kernels[level]) <= bound).all()


def test_a_row_of_zeros_has_no_scale() -> None:
    x = np.zeros((2, 40), np.float32)
    x[1, :3] = [1, -127, 0.4]
    seen = rounded_by_block(x, 32)
    assert np.isfinite(seen).all()
    assert seen[1, :3].tolist() == [1, -127, 0]
    operands, _ = blocked(4, 32, 40, 8)
    model, inputs = nbits(x, operands, 32, 40, 8, bits=4, accuracy_level=4)
    (mine,), (kernel,) = evaluate(model, inputs).values(), run_original(model, inputs).values()
    assert not mine[0].any()
    assert not kernel[0].any()


def test_weights_that_are_inputs_are_multiplied_in_float() -> None:
    k, n, block = 64, 16, 32
    operands, size = blocked(4, block, k, n)
    x = real(3, k)
    model, inputs = nbits(x, operands, block, k, n, bits=4, accuracy_level=4, constant=())
    assert not rounds_activations(next(iter(model.graph)))
    (mine,), (kernel,) = evaluate(model, inputs).values(), run_original(model, inputs).values()
    assert (np.abs(mine - kernel) <= (k + SCALED_SUM) * U * (np.abs(x) @ size.T)).all()


def test_rows_in_another_order_of_blocks() -> None:
    k, n, block = 64, 16, 32
    operands, size = blocked(4, block, k, n)
    operands[3] = np.random.default_rng(1).permutation(np.arange(k) // block).astype(np.int32)
    x = real(3, k)
    model, inputs = nbits(x, operands, block, k, n, bits=4, accuracy_level=0)
    (mine,), (kernel,) = evaluate(model, inputs).values(), run_original(model, inputs).values()
    largest = np.abs(x).sum(-1, keepdims=True) * size.max()
    assert (np.abs(mine - kernel) <= (k + SCALED_SUM) * U * largest).all()


@pytest.mark.parametrize("form", ["int4", "uint4", "uint8 of 4 bits", "uint8 of 8 bits"])
@pytest.mark.parametrize("zero", [False, True])
def test_gather_of_blocks(form: str, zero: bool) -> None:
    bits = 8 if form.endswith("8 bits") else 4
    rows, width, block = 9, 64, 16
    if form.startswith("uint8"):
        data = packed(rng().integers(0, 1 << bits, (rows, width)), bits)
        zeros = packed(rng().integers(0, 1 << bits, (rows, width // block)), bits)
    else:
        dtype = getattr(ml_dtypes, form)
        data, zeros = codes(dtype, rows, width), codes(dtype, rows, width // block)
    operands = [data, np.array([[3, 0], [8, 3]], np.int64), positive(rows, width // block), zeros if zero else None]
    (mine,), (kernel,) = both(
        "GatherBlockQuantized",
        operands if zero else operands[:3],
        domain=CONTRIBUTED,
        constant=(0, 2, 3) if zero else (0, 2),
        **{"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1},
    )
    assert mine.shape == kernel.shape
    assert (np.abs(mine - kernel) <= U * np.abs(mine)).all(), "one product is one rounding"
