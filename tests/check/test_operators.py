"""Every float64 definition against ONNX Runtime's kernel, within the kernel's own rounding."""

from __future__ import annotations

import numpy as np
import pytest
from single_node import CONTRIBUTED, both, node_model

from rewrite.check.noise import unit_roundoff
from rewrite.check.reference import evaluate
from rewrite.errors import UnsupportedOperatorError

RNG = np.random.default_rng(20240601)
LIBRARY_ULPS = 8
"""Roundings that a vectorised float32 exp, tanh or erf may be off by."""


def real(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return (np.abs(RNG.standard_normal(shape)) + 0.5).astype(np.float32)


def integers(low: int, high: int, *shape: int, dtype=np.int64) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(dtype)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def check(operator: str, operands: list, *, terms: int = 1, growth: float = 1.0, **options) -> None:
    """|kernel − definition| ≤ (terms + LIBRARY_ULPS)·u·M: `terms` roundings of numbers up to M.

    M is `growth` times the largest of 1, the operands and the results: what a sum of `terms` passes through.
    """
    ours, theirs = both(operator, operands, **options)
    floats = [x for x in operands if x is not None and x.dtype.kind == "f"]
    for mine, kernel in zip(ours, theirs):
        assert mine.shape == kernel.shape
        if kernel.dtype.kind != "f":
            assert mine.dtype == kernel.dtype
            np.testing.assert_array_equal(mine, kernel)
            continue
        assert mine.dtype == np.float64
        finite = [np.abs(x[np.isfinite(x)]).max(initial=0) for x in (*floats, mine)]
        bound = (terms + LIBRARY_ULPS) * unit_roundoff(kernel.dtype) * growth * max(1.0, *finite)
        np.testing.assert_array_equal(np.isfinite(mine), np.isfinite(kernel))
        where = np.isfinite(mine)
        assert np.abs(mine[where] - kernel[where]).max(initial=0) <= bound


X = real(2, 3, 4)

ELEMENTWISE = [
    "Neg", "Abs", "Exp", "Erf", "Sigmoid", "Tanh", "Relu", "Softplus", "Softsign", "Sin", "Cos", "Tan", "Atan",
    "Sinh", "Cosh", "Asinh", "Floor", "Ceil", "Round", "Sign", "IsNaN", "IsInf", "Elu", "Celu", "Selu", "LeakyRelu",
    "ThresholdedRelu", "HardSigmoid", "HardSwish", "Mish", "Shrink", "Gelu", "Softmax", "LogSoftmax",
]  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_function_of_one_operand(name):
    check(name, [3 * X], terms=8, growth=4)


@pytest.mark.parametrize("name", ["Sqrt", "Reciprocal", "Log"])
def test_function_of_a_positive_operand(name):
    check(name, [positive(2, 5)], terms=4)


@pytest.mark.parametrize("name", ["Asin", "Acos", "Atanh"])
def test_function_of_the_unit_interval(name):
    check(name, [(real(3, 4) / 8).astype(np.float32)], terms=4)


@pytest.mark.parametrize("name", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean"])
def test_arithmetic_broadcasts(name):
    check(name, [X, positive(3, 1)], terms=2)


@pytest.mark.parametrize("name", ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"])
def test_comparison(name):
    check(name, [integers(0, 3, 4, 5), integers(0, 3, 5)])


@pytest.mark.parametrize("name", ["And", "Or", "Xor"])
def test_logic(name):
    check(name, [integers(0, 2, 4, 5, dtype=bool), integers(0, 2, 5, dtype=bool)])


def test_integer_division_truncates():
    check("Div", [i64(-7, 7, -7, 7, -6), i64(2, 2, -2, -2, 3)])


@pytest.mark.parametrize("fmod", [0, 1])
def test_mod(fmod):
    check("Mod", [i64(-7, 7, -7, 7), i64(3, 3, -3, -3)], fmod=fmod)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, 0.5, -1.0, 1.9999999])
def test_pow(exponent):
    check("Pow", [positive(3, 4), np.array(exponent, np.float32)], terms=4, growth=4)


def test_pow_broadcasts_a_small_exponent():
    check("Pow", [positive(3), np.array([[2.0]], np.float32)], terms=4)


CASES = {
    "clip": ("Clip", [X, np.array(-0.5, np.float32), np.array(0.7, np.float32)], {}),
    "clip above only": ("Clip", [X, None, np.array(0.1, np.float32)], {}),
    "clip by attributes": ("Clip", [X], {"min": -0.5, "max": 0.5, "opset": 6}),
    "prelu": ("PRelu", [X, real(3, 1)], {}),
    "where": ("Where", [integers(0, 2, 3, 1, dtype=bool), X, real(4)], {}),
    "cast to integer": ("Cast", [10 * X], {"to": 7}),
    "cast to boolean": ("Cast", [np.array([0.0, 0.3, -2.0], np.float32)], {"to": 9}),
    "cast from integer": ("Cast", [integers(-5, 5, 4)], {"to": 1}),
    "cast from boolean": ("Cast", [integers(0, 2, 4, dtype=bool)], {"to": 1}),
    "gelu tanh": ("Gelu", [3 * X], {"approximate": "tanh", "terms": 8}),
    "bit shift": ("BitShift", [integers(0, 9, 4, dtype=np.uint8), np.array([1], np.uint8)], {"direction": "LEFT"}),
    "reshape with zero and minus one": ("Reshape", [X, i64(0, -1)], {}),
    "transpose": ("Transpose", [X], {"perm": [2, 0, 1]}),
    "flatten": ("Flatten", [X], {"axis": -1}),
    "squeeze": ("Squeeze", [real(1, 3, 1), i64(-1)], {}),
    "unsqueeze": ("Unsqueeze", [X, i64(0, -1)], {}),
    "unsqueeze by attribute": ("Unsqueeze", [X], {"axes": [1], "opset": 11}),
    "expand": ("Expand", [real(3, 1), i64(2, 1, 4)], {}),
    "tile": ("Tile", [X, i64(1, 2, 3)], {}),
    "concat": ("Concat", [X, real(2, 5, 4)], {"axis": 1}),
    "split evenly": ("Split", [real(2, 7)], {"axis": 1, "num_outputs": 3, "outputs": 3}),
    "split by sizes": ("Split", [real(2, 7), i64(1, 4, 2)], {"axis": 1, "outputs": 3}),
    "slice": ("Slice", [real(9, 7), i64(1, -3), i64(100, -1), i64(0, 1), i64(2, 1)], {}),
    "slice backwards": ("Slice", [real(9), i64(-1), i64(-100), i64(0), i64(-2)], {}),
    "slice to the end": ("Slice", [real(9), i64(3), i64(np.iinfo(np.int64).max)], {}),
    "pad": ("Pad", [X, i64(1, 0, 2, 0, 1, 0), np.array(0.5, np.float32)], {}),
    "pad by reflection": ("Pad", [real(4, 5), i64(1, 2, 0, 1)], {"mode": "reflect"}),
    "pad an axis": ("Pad", [real(4, 5), i64(2, 1), None, i64(-1)], {"mode": "edge"}),
    "pad negatively": ("Pad", [real(4, 5), i64(-1, 2, 0, -1)], {}),
    "trilu": ("Trilu", [real(4, 5), np.array(1, np.int64)], {"upper": 0}),
    "shape": ("Shape", [X], {"start": 1}),
    "size": ("Size", [X], {}),
    "range": ("Range", [np.array(3, np.int64), np.array(-4, np.int64), np.array(-2, np.int64)], {}),
    "constant of shape": ("ConstantOfShape", [i64(2, 3)], {}),
    "eye": ("EyeLike", [real(3, 4)], {"k": 1}),
    "depth to space": ("DepthToSpace", [real(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    "depth to space by depth": ("DepthToSpace", [real(1, 8, 2, 3)], {"blocksize": 2}),
    "space to depth": ("SpaceToDepth", [real(1, 2, 4, 6)], {"blocksize": 2}),
    "gather": ("Gather", [real(5, 4), integers(-5, 5, 2, 3)], {"axis": 0}),
    "gather on the last axis": ("Gather", [real(5, 4), i64(3, 0)], {"axis": -1}),
    "gather elements": ("GatherElements", [real(3, 4), integers(-3, 3, 2, 3)], {"axis": 0}),
    "gather elements as BERT does": ("GatherElements", [integers(0, 9, 1, 8), integers(0, 8, 1, 5)], {"axis": 1}),
    "gather nd": ("GatherND", [real(3, 4, 2), i64(0, 1, 2, -1).reshape(2, 2)], {}),
    "gather nd in batches": ("GatherND", [real(2, 4, 3), i64(1, 3).reshape(2, 1)], {"batch_dims": 1}),
    "scatter nd": ("ScatterND", [real(5, 2), i64(1, 4).reshape(2, 1), real(2, 2)], {}),
    "scatter nd adding": ("ScatterND", [real(5), i64(1, 1).reshape(2, 1), real(2)], {"reduction": "add"}),
    "scatter elements": ("ScatterElements", [real(3, 3), i64(1, 0, 2).reshape(1, 3), real(1, 3)], {"axis": 0}),
    "largest": ("TopK", [real(3, 7), i64(3)], {"outputs": 2}),
    "largest of equal": ("TopK", [integers(0, 3, 3, 9).astype(np.float32), i64(5)], {"outputs": 2}),
    "smallest": ("TopK", [real(7, 3), i64(2)], {"outputs": 2, "axis": 0, "largest": 0}),
    "arg max": ("ArgMax", [real(3, 7)], {"axis": -1, "keepdims": 0}),
    "last arg min": ("ArgMin", [integers(0, 2, 3, 7).astype(np.float32)], {"axis": 1, "select_last_index": 1}),
    "one hot": ("OneHot", [i64(0, 2, -1), i64(4), np.array([0, 1], np.float32)], {}),
    "non zero": ("NonZero", [integers(0, 2, 3, 4).astype(np.float32)], {}),
    "compress": ("Compress", [real(3, 4), np.array([True, False, True])], {"axis": 0}),
    "running sum": ("CumSum", [real(3, 6), np.array(1, np.int64)], {"terms": 6, "growth": 4}),
    "running sum from the end": (
        "CumSum", [integers(0, 9, 3, 6), np.array(0, np.int64)], {"reverse": 1, "exclusive": 1},
    ),
    "matmul": ("MatMul", [real(2, 3, 5), real(5, 4)], {"terms": 5, "growth": 5}),
    "matmul of vectors": ("MatMul", [real(5), real(5, 4)], {"terms": 5, "growth": 5}),
    "gemm": (
        "Gemm", [real(5, 3), real(4, 5), real(4)],
        {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0, "terms": 5, "growth": 5},
    ),
    "einsum": ("Einsum", [real(2, 3, 5), real(2, 4, 5)], {"equation": "bid,bjd->bij", "terms": 5, "growth": 5}),
    "integer matmul": (
        "MatMulInteger", [integers(0, 9, 2, 3, dtype=np.uint8), integers(-9, 9, 3, 4, dtype=np.int8),
                          np.array(2, np.uint8), np.array(1, np.int8)], {},
    ),
    "quantize": ("QuantizeLinear", [X, np.array(0.1, np.float32), np.array(3, np.int8)], {}),
    "quantize an axis": ("QuantizeLinear", [X, positive(3), integers(0, 9, 3, dtype=np.uint8)], {"axis": 1}),
    "dequantize": ("DequantizeLinear", [integers(-9, 9, 3, 4, dtype=np.int8), np.array(0.1, np.float32)], {}),
    "dequantize blocks": (
        "DequantizeLinear", [integers(-9, 9, 3, 4, dtype=np.int8), positive(3, 2), integers(0, 2, 3, 2, dtype=np.int8)],
        {"axis": 1, "block_size": 2},
    ),
    "layer norm": ("LayerNormalization", [real(2, 3, 16), real(16), real(16)], {"terms": 24, "growth": 2}),
    "layer norm of two axes": (
        "LayerNormalization", [real(2, 3, 4), real(3, 4)], {"axis": 1, "terms": 24, "growth": 2},
    ),
    "rms norm": ("RMSNormalization", [real(2, 3, 16), real(16)], {"terms": 24, "growth": 2, "epsilon": 1e-3}),
    "rms norm of ONNX Runtime": (
        "SimplifiedLayerNormalization", [real(2, 3, 16), real(16)], {"terms": 24, "growth": 2},
    ),
    "batch norm": (
        "BatchNormalization", [real(2, 3, 4, 5), real(3), real(3), real(3), positive(3)], {"terms": 8, "growth": 4},
    ),
    "instance norm": ("InstanceNormalization", [real(2, 3, 4, 5), real(3), real(3)], {"terms": 24, "growth": 2}),
    "group norm": (
        "GroupNormalization", [real(2, 4, 3, 3), real(4), real(4)],
        {"num_groups": 2, "terms": 24, "growth": 2, "opset": 21},
    ),
    "lp norm": ("LpNormalization", [real(3, 5)], {"terms": 8}),
    "softmax on axis 1": ("Softmax", [X], {"axis": 1, "terms": 8}),
    "softmax before opset 13": ("Softmax", [X], {"opset": 11, "terms": 16}),
    "conv": ("Conv", [real(2, 3, 7, 6), real(4, 3, 3, 2), real(4)], {"pads": [1, 0, 2, 1], "terms": 18, "growth": 18}),
    "strided conv": (
        "Conv", [real(1, 3, 9, 9), real(4, 3, 3, 3)],
        {"strides": [2, 3], "dilations": [2, 1], "terms": 27, "growth": 27},
    ),
    "grouped conv": ("Conv", [real(1, 4, 9), real(6, 2, 3)], {"group": 2, "terms": 6, "growth": 6}),
    "conv of three axes": ("Conv", [real(1, 2, 4, 4, 4), real(3, 2, 2, 2, 2)], {"terms": 16, "growth": 16}),
    "conv padded to the same size": (
        "Conv", [real(1, 2, 7, 7), real(3, 2, 4, 4)],
        {"auto_pad": "SAME_LOWER", "strides": [2, 2], "terms": 32, "growth": 32},
    ),
    "transposed conv": (
        "ConvTranspose", [real(1, 4, 5, 4), real(4, 3, 3, 2), real(6)],
        {"strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 0], "group": 2, "terms": 18, "growth": 18},
    ),
    "max pool": ("MaxPool", [real(1, 2, 7, 8)], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    "max pool reaching over": ("MaxPool", [real(1, 2, 8)], {"kernel_shape": [3], "strides": [2], "ceil_mode": 1}),
    "average pool": (
        "AveragePool", [real(1, 2, 7, 8)],
        {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1], "terms": 6},
    ),
    "average pool with its padding": (
        "AveragePool", [real(1, 2, 7, 8)],
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1, "terms": 9},
    ),
    "average pool reaching over": (
        "AveragePool", [real(1, 2, 8)],
        {"kernel_shape": [3], "strides": [2], "pads": [1, 1], "ceil_mode": 1, "count_include_pad": 1, "terms": 3},
    ),
    "global average pool": ("GlobalAveragePool", [real(2, 3, 4, 5)], {"terms": 20}),
    "global max pool": ("GlobalMaxPool", [real(2, 3, 4, 5)], {}),
    "resize by neighbours": (
        "Resize", [real(1, 2, 3, 3), None, None, i64(1, 2, 6, 5)],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "constant": (3,)},
    ),
    "resize linearly": (
        "Resize", [real(1, 2, 3, 3), None, None, i64(1, 2, 6, 5)],
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel", "terms": 8, "constant": (3,)},
    ),
    "resize linearly by a scale": (
        "Resize", [real(1, 2, 5, 3), None, np.array([1, 1, 0.6, 2.5], np.float32)],
        {"mode": "linear", "terms": 8, "constant": (2,)},
    ),
    "resize with aligned corners": (
        "Resize", [real(1, 2, 4, 5), None, None, i64(1, 2, 7, 3)],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners", "terms": 8, "constant": (3,)},
    ),
    "resize to one pixel": (
        "Resize", [real(1, 2, 4, 5), None, None, i64(1, 2, 1, 1)],
        {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel", "terms": 8, "constant": (3,)},
    ),
    "resize by cubics": (
        "Resize", [real(1, 2, 5, 6), None, None, i64(1, 2, 8, 9)],
        {"mode": "cubic", "cubic_coeff_a": -0.5, "terms": 32, "constant": (3,)},
    ),
    "resize by cubics inside only": (
        "Resize", [real(1, 2, 5, 6), None, None, i64(1, 2, 8, 4)],
        {"mode": "cubic", "exclude_outside": 1, "terms": 32, "constant": (3,)},
    ),
    "resize by rounded neighbours": (
        "Resize", [real(1, 2, 4, 5), None, None, i64(1, 2, 7, 3)],
        {"mode": "nearest", "nearest_mode": "round_prefer_ceil", "constant": (3,)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operator(case):
    name, operands, options = CASES[case]
    check(name, operands, **options)


@pytest.mark.parametrize(
    "name",
    ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
     "ReduceLogSumExp"],
)  # fmt: skip
@pytest.mark.parametrize("axes", [None, i64(-1), i64(0, 2)])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reduction(name, axes, keepdims):
    check(name, [X] if axes is None else [X, axes], keepdims=keepdims, terms=24, growth=24, constant=(1,))


def test_reduction_axes_by_attribute():
    check("ReduceMean", [X], axes=[1], opset=13, terms=4)


def test_reduction_of_no_axis_on_request():
    check("ReduceSum", [X, np.zeros(0, np.int64)], noop_with_empty_axes=1, constant=(1,))


def mask_of(*shape: int) -> np.ndarray:
    """A boolean mask with at least one key for every query."""
    mask = integers(0, 2, *shape, dtype=bool)
    mask[..., 0] = True
    return mask


Q, K, V = real(2, 4, 5, 8), real(2, 2, 6, 8), real(2, 2, 6, 3)
SQUARE = [real(2, 4, 5, 8), real(2, 4, 5, 8), real(2, 4, 5, 8)]
ATTENTION = {
    "grouped heads": ([Q, K, V], {}),
    "flat heads": ([real(2, 5, 32), real(2, 6, 16), real(2, 6, 16)], {"q_num_heads": 4, "kv_num_heads": 2}),
    "causal": (SQUARE, {"is_causal": 1}),
    "boolean mask": ([Q, K, V, mask_of(5, 6)], {}),
    "additive mask": ([Q, K, V, real(2, 1, 5, 6)], {}),
    "lowest finite mask": ([Q, K, V, np.where(mask_of(5, 6), 0, np.finfo(np.float32).min).astype(np.float32)], {}),
    "scale and softcap": ([Q, K, V], {"scale": 0.3, "softcap": 2.0}),
    "softcap under a mask": ([Q, K, V, mask_of(5, 6)], {"softcap": 2.0}),
    "cache": ([real(1, 2, 1, 8), real(1, 2, 1, 8), real(1, 2, 1, 8), None, real(1, 2, 4, 8), real(1, 2, 4, 8)],
              {"outputs": 3}),
    "causal with cache": (
        [real(1, 2, 3, 8), real(1, 2, 3, 8), real(1, 2, 3, 8), None, real(1, 2, 4, 8), real(1, 2, 4, 8)],
        {"outputs": 3, "is_causal": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case):
    operands, options = ATTENTION[case]
    check("Attention", operands, terms=32, growth=8, **options)


def test_attention_of_a_fully_masked_query_is_zero():
    mask = mask_of(5, 6)
    mask[2] = False
    model, inputs = node_model("Attention", [Q, K, V, mask])
    output = evaluate(model, inputs)["y0"]
    assert np.all(output[:, :, 2] == 0)
    assert np.isfinite(output).all()


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("dimension", [0, 4])
def test_rotary_embedding(interleaved, dimension):
    half = (dimension or 8) // 2
    cos, sin = (np.cos(real(10, half)), np.sin(real(10, half)))
    options = {"interleaved": interleaved, "rotary_embedding_dim": dimension, "terms": 3, "num_heads": 3}
    positions = integers(0, 10, 2, 5)
    check("RotaryEmbedding", [real(2, 3, 5, 8), cos, sin, positions], **options)
    check("RotaryEmbedding", [real(2, 5, 24), cos, sin, positions], **options)
    check("RotaryEmbedding", [real(2, 3, 5, 8), cos[positions], sin[positions]], **options)


GAMMA, BETA, BIAS = real(16), real(16), real(16)
CONTRIB = {
    "gelu": ("Gelu", [3 * X], {}),
    "bias gelu": ("BiasGelu", [real(2, 5, 16), BIAS], {}),
    "fast gelu": ("FastGelu", [3 * X], {}),
    "fast gelu with bias": ("FastGelu", [real(2, 5, 16), BIAS], {}),
    "quick gelu": ("QuickGelu", [3 * X], {}),
    "skip layer norm": ("SkipLayerNormalization", [real(2, 3, 16), real(2, 3, 16), GAMMA, BETA], {}),
    "skip layer norm with bias": (
        "SkipLayerNormalization", [real(2, 3, 16), real(2, 3, 16), GAMMA, BETA, BIAS], {"epsilon": 1e-5},
    ),
    "skip rms norm": ("SkipSimplifiedLayerNormalization", [real(2, 3, 16), real(2, 3, 16), GAMMA], {}),
    "skip rms norm with bias": (
        "SkipSimplifiedLayerNormalization", [real(2, 3, 16), real(2, 3, 16), GAMMA, BIAS], {"epsilon": 1e-5},
    ),
    "fused matmul": ("FusedMatMul", [real(2, 5, 3), real(2, 4, 5)], {"transA": 1, "transB": 1, "alpha": 0.3}),
    "fused matmul of transposed batches": ("FusedMatMul", [real(3, 2, 5), real(2, 5, 4)], {"transBatchA": 1}),
    "rotary": (
        "RotaryEmbedding", [real(2, 5, 24), integers(0, 5, 2, 5), np.cos(real(10, 4)), np.sin(real(10, 4))], {},
    ),
    "rotary from one position": (
        "RotaryEmbedding", [real(2, 3, 5, 8), i64(2), np.cos(real(10, 4)), np.sin(real(10, 4))], {"interleaved": 1},
    ),
    "multi head attention": (
        "MultiHeadAttention", [real(2, 5, 16), real(2, 6, 16), real(2, 6, 16), real(48)], {"num_heads": 2},
    ),
    "multi head attention with bias": (
        "MultiHeadAttention",
        [real(2, 5, 16), real(2, 6, 16), real(2, 6, 16), None, None, real(2, 2, 5, 6)], {"num_heads": 2, "scale": 0.2},
    ),
    "multi head attention, causal": (
        "MultiHeadAttention", [real(2, 5, 16), real(2, 5, 16), real(2, 5, 16)], {"num_heads": 2, "unidirectional": 1},
    ),
    "multi head attention with padding": (
        "MultiHeadAttention",
        [real(2, 5, 16), real(2, 6, 16), real(2, 6, 16), None, np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)],
        {"num_heads": 2},
    ),
    "grouped query attention": (
        "GroupQueryAttention",
        [real(2, 5, 32), real(2, 5, 16), real(2, 5, 16), None, None, np.array([4, 4], np.int32), np.array(5, np.int32)],
        {"num_heads": 4, "kv_num_heads": 2},
    ),
    "grouped query attention with rotary": (
        "GroupQueryAttention",
        [real(2, 5, 64), real(2, 5, 32), real(2, 5, 32), None, None, np.array([4, 4], np.int32), np.array(5, np.int32),
         np.cos(real(10, 8)), np.sin(real(10, 8))],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "outputs": 3},
    ),
    "grouped query attention, packed, capped, local": (
        "GroupQueryAttention",
        [real(2, 5, 64), None, None, None, None, np.array([4, 4], np.int32), np.array(5, np.int32)],
        {"num_heads": 4, "kv_num_heads": 2, "softcap": 3.0, "local_window_size": 2},
    ),
    "grouped query attention with cache": (
        "GroupQueryAttention",
        [real(1, 1, 64), real(1, 1, 32), real(1, 1, 32), real(1, 2, 4, 16), real(1, 2, 4, 16),
         np.array([4], np.int32), np.array(5, np.int32), np.cos(real(10, 8)), np.sin(real(10, 8))],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "outputs": 3},
    ),
    "weights of four bits": (
        "MatMulNBits",
        [real(3, 32), integers(0, 256, 5, 2, 8, dtype=np.uint8), positive(10)],
        {"N": 5, "K": 32, "bits": 4, "block_size": 16, "growth": 32 * 16, "constant": (1, 2)},
    ),
    "weights of four bits with zero points": (
        "MatMulNBits",
        [real(3, 32), integers(0, 256, 5, 2, 8, dtype=np.uint8), positive(10), integers(0, 256, 5, dtype=np.uint8)],
        {"N": 5, "K": 32, "bits": 4, "block_size": 16, "growth": 32 * 16, "constant": (1, 2, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRIB)
def test_contributed_operator(case):
    name, operands, options = CONTRIB[case]
    check(name, operands, domain=CONTRIBUTED, **{"terms": 32, "growth": 8, **options})


@pytest.mark.parametrize("name", ["LSTM", "RandomNormalLike", "NoSuchOperator"])
def test_unknown_operator_names_node_and_operator(name):
    model, inputs = node_model(name, [real(3, 4)])
    with pytest.raises(UnsupportedOperatorError, match=rf"node.*{name}"):
        evaluate(model, inputs)


def test_the_check_rejects_another_operator():
    """The comparison above tells a Sigmoid from a HardSigmoid, and a softmax over the wrong axis."""
    ours, _ = both("Sigmoid", [X])
    _, theirs = both("HardSigmoid", [X])
    assert np.abs(ours[0] - theirs[0]).max() > 1e-3


def test_resize_imitates_float32():
    model, inputs = node_model("Resize", [real(1, 2, 3, 3), None, None, i64(1, 2, 6, 5)], mode="linear", constant=(3,))
    narrow, exact = evaluate(model, inputs, precision=np.float32)["y0"], evaluate(model, inputs)["y0"]
    assert narrow.dtype == np.float32
    assert 0 < np.abs(narrow - exact).max() < 1e-6
