"""Formats, stored matrices, and the layout of MatMulNBits against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from rewrite.errors import RequestError
from rewrite.quantize.format import Format, Quantized, each_row, packed, stored_scale, unpacked
from rewrite.quantize.rounding import round_to_nearest

ROWS = 70
"""Not divisible by a block of 32: the last group has 6 rows."""


def weight(rows: int = ROWS, columns: int = 5) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((rows, columns)) + 0.3


def blocked(bits: int, symmetric: bool) -> Format:
    return Format(bits, signed=False, symmetric=symmetric, block=32)


def run_matmul(x: np.ndarray, quantized: Quantized, accuracy_level: int) -> np.ndarray:
    rows, columns = quantized.codes.shape
    operands = dict(zip(("B", "scales", "zero_points"), packed(quantized), strict=True))
    operands = {name: array for name, array in operands.items() if array is not None}
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", *operands],
        ["y"],
        domain="com.microsoft",
        K=rows,
        N=columns,
        bits=quantized.format.bits,
        block_size=quantized.format.block,
        accuracy_level=accuracy_level,
    )
    graph = onnx.helper.make_graph(
        [node],
        "matmul",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (len(x), columns))],
        [onnx.numpy_helper.from_array(array, name) for name, array in operands.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rows", [64, ROWS, 20])
def test_the_runtime_reads_the_packed_codes(bits: int, symmetric: bool, rows: int) -> None:
    """Exactly: small integers, on both sides of zero, and scales that are powers of two, of both signs."""
    rng = np.random.default_rng(bits)
    form = blocked(bits, symmetric)
    groups = form.groups(rows)
    scales = np.float32(2.0) ** rng.integers(-3, 3, (groups, 16)) * rng.choice([-1, 1], (groups, 16))
    points = np.full((groups, 16), form.middle) if symmetric else rng.integers(0, 1 << bits, (groups, 16))
    codes = rng.integers(0, 1 << bits, (rows, 16)).astype(np.uint8)
    quantized = Quantized(form, codes, scales.astype(np.float32), points.astype(np.uint8))
    x = rng.integers(-4, 5, (3, rows)).astype(np.float32)
    assert np.array_equal(run_matmul(x, quantized, accuracy_level=0), x @ quantized.values())


def test_a_negative_scale_is_one_at_accuracy_level_four() -> None:
    """Rows of x are −127 … 127 in each block, which the kernel's int8 activations hold exactly up to their scale."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (64, 16)).astype(np.uint8)
    scales = np.float32(0.5) * rng.choice([-1, 1], (2, 16)).astype(np.float32)
    assert (scales < 0).any()
    quantized = Quantized(blocked(4, True), codes, scales, np.full((2, 16), 8, np.uint8))
    x = rng.integers(-127, 128, (3, 64)).astype(np.float32)
    x[:, ::32] = 127
    exact = x @ quantized.values()
    size = np.abs(x) @ np.abs(quantized.values())
    assert np.all(np.abs(run_matmul(x, quantized, accuracy_level=4) - exact) <= 64 * np.finfo(np.float32).eps * size)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unpacked_undoes_packed(bits: int, symmetric: bool) -> None:
    quantized = round_to_nearest(weight(), blocked(bits, symmetric))
    again = unpacked(*packed(quantized), quantized.format, ROWS)
    assert np.array_equal(again.codes, quantized.codes)
    assert np.array_equal(again.zero_points, quantized.zero_points)
    assert np.array_equal(again.values(), quantized.values())


def test_what_fills_the_last_block_is_zero() -> None:
    quantized = round_to_nearest(weight(), blocked(4, False))
    operands = packed(quantized)
    longer = unpacked(*operands, quantized.format, 96)
    assert not longer.values()[ROWS:].any()
    assert np.array_equal(longer.values()[:ROWS], quantized.values())


@pytest.mark.parametrize(
    "form",
    [
        Format(4, signed=True, symmetric=True, block=32),
        Format(4, signed=False, symmetric=True),
        Format(4, signed=False, symmetric=True, block=24),
        Format(4, signed=False, symmetric=True, block=8),
    ],
)
def test_what_the_operator_cannot_hold_is_not_packed(form: Format) -> None:
    with pytest.raises(RequestError, match="MatMulNBits"):
        packed(round_to_nearest(weight(), form))


def test_operands_of_another_shape_are_not_unpacked() -> None:
    form = blocked(4, False)
    codes, scales, points = packed(round_to_nearest(weight(), form))
    for wrong in ((codes[:, :2], scales, points), (codes, scales.T, points), (codes, scales, scales)):
        with pytest.raises(RequestError, match="shapes"):
            unpacked(*wrong, form, ROWS)


def test_values_are_those_of_dequantize_linear() -> None:
    form = Format(8, signed=True, symmetric=False, block=32)
    quantized = round_to_nearest(weight(), form)
    scales = each_row(quantized.scales, form, ROWS)
    points = each_row(quantized.zero_points, form, ROWS)
    one_by_one = [
        [(int(quantized.codes[k, n]) - int(points[k, n])) * float(scales[k, n]) for n in range(5)] for k in range(ROWS)
    ]
    assert np.array_equal(quantized.values(), one_by_one)


@pytest.mark.parametrize("form", [Format(8, True, True), Format(4, False, False, 32), Format(8, False, False, 0, True)])
def test_a_stored_matrix_is_checked(form: Format) -> None:
    good = round_to_nearest(weight(), form)
    codes, scales, points = good.codes, good.scales, good.zero_points
    low, high = form.codes
    wrong = [
        (codes.astype(np.int32), scales, points),
        (codes, scales.astype(np.float64), points),
        (codes, scales, points.astype(np.int32)),
        (codes[0], scales, points),
        (codes, scales[:, :0], points),
        (codes, scales, points[:, :0]),
        (codes, scales * 0, points),
        (codes, scales * np.float32(np.nan), points),
        (codes, scales * np.float32(np.inf), points),
    ]
    if form.bits < 8:
        wrong += [(codes + np.uint8(high), scales, points), (codes, scales, points + np.uint8(high + 1))]
    if form.symmetric:
        wrong += [(np.full_like(codes, low - 1), scales, points), (codes, scales, points + 1)]
    assert Quantized(form, codes, scales, points)
    for parts in wrong:
        with pytest.raises(RequestError):
            Quantized(form, *parts)


@pytest.mark.parametrize("arguments", [(3, True, True), (4, True, True, -1), (4, True, True, 32, True)])
def test_a_format_that_does_not_exist_is_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(RequestError):
        Format(*arguments)  # pyright: ignore[reportArgumentType]


def test_scales_are_rounded_up_and_never_vanish() -> None:
    scales = np.array([0.1, -0.1, 1.0, 1e-45, -1e-300, 0.0, 3e38])
    stored = stored_scale(scales)
    assert np.array_equal(stored, stored.astype(np.float32))
    assert np.all(np.abs(stored) >= np.abs(scales))
    assert np.all(np.abs(stored) >= np.finfo(np.float32).tiny)
    assert np.all(np.sign(stored[scales != 0]) == np.sign(scales[scales != 0]))
    exact = np.abs(scales[[0, 1, 2, 6]])
    assert np.all(np.abs(stored[[0, 1, 2, 6]]) <= exact * (1 + np.finfo(np.float32).eps))
    assert stored[5] == 1
