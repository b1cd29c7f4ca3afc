"""What folding removes, and what it must leave; every case is also evaluated before and after."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from rewrite.capture.dimensions import Monomial, dimension, product
from rewrite.capture.fold_shapes import fold_shapes

HEAD = '<ir_version: 10, opset_import: ["" : 23]>\n'

FOLDED = {
    "reshape-target-of-integers": (
        """g (float[batch, sequence, 6] x) => (float[rows, 6] y) {
            a = Constant <value_ints = [-1]> ()
            b = Constant <value_ints = [6]> ()
            s = Concat <axis = 0> (a, b)
            y = Reshape <allowzero = 1> (x, s)
        }""",
        ["Reshape"],
    ),
    "reshape-target-of-kept-axes": (
        """g (float[batch, sequence, 6] x) => (float[batch, sequence, 2, 3] y) {
            b = Shape <start = 0, end = 1> (x)
            s = Shape <start = 1, end = 2> (x)
            c = Constant <value_ints = [2]> ()
            d = Constant <value_ints = [3]> ()
            t = Concat <axis = 0> (b, s, c, d)
            y = Reshape <allowzero = 1> (x, t)
        }""",
        ["Reshape"],
    ),
    "view-of-the-same-shape": (
        """g (float[batch, 6] x) => (float[batch, 6] y) {
            t = Shape (x)
            v = Reshape (x, t)
            y = Neg (v)
        }""",
        ["Neg"],
    ),
    "slice-of-everything": (
        """g (float[batch, 6] x) => (float[batch, 6] y) {
            z = Constant <value = int64 {0}> ()
            one = Constant <value_ints = [-1]> ()
            zero = Reshape (z, one)
            end = Constant <value_ints = [9223372036854775807]> ()
            axis = Constant <value_ints = [1]> ()
            v = Slice (x, zero, end, axis)
            y = Neg (v)
        }""",
        ["Neg"],
    ),
    "sequence-of-constant-sizes": (
        """g (float[batch, 7] x) => (float[batch, 3] y, float[batch, 1] z) {
            size = Constant <value = int64 {3}> ()
            zero = Constant <value = int64 {0}> ()
            two = Constant <value = int64 {2}> ()
            parts = SplitToSequence <axis = 1> (x, size)
            first = SequenceAt (parts, zero)
            last = SequenceAt (parts, two)
            y = Neg (first)
            z = Neg (last)
        }""",
        ["Split", "Neg", "Neg"],
    ),
    "cast-like": (
        """g (float[batch, 6] x, int64[batch, 1] n) => (float[batch, 6] y) {
            f = CastLike (n, x)
            y = Add (x, f)
        }""",
        ["Cast", "Add"],
    ),
    "integer-arithmetic": (
        """g (float[batch, 6] x) => (float[batch, 6] y) {
            six = Shape <start = 1> (x)
            two = Constant <value_ints = [2]> ()
            three = Div (six, two)
            minus = Neg (three)
            r = Add (minus, six)
            parts = Concat <axis = 0> (three, r)
            a, b = Split <axis = 1> (x, parts)
            y = Concat <axis = 1> (b, a)
        }""",
        ["Split", "Concat"],
    ),
    "expansion-of-kept-axes": (
        """g (float[batch, 1, 6] x) => (float[batch, 4, 6] y) {
            b = Shape <start = 0, end = 1> (x)
            n = Constant <value_ints = [4, 6]> ()
            t = Concat <axis = 0> (b, n)
            y = Expand (x, t)
        }""",
        ["Expand"],
    ),
    "repeated-subexpression": (
        """g (float[batch, 6] x) => (float[batch, 6] y) {
            a = Neg (x)
            b = Neg (x)
            y = Mul (a, b)
        }""",
        ["Neg", "Mul"],
    ),
}

LEFT = {
    "transpose-of-a-weight": (
        """g (float[batch, 2] x) => (float[batch, 3] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul (x, t)
        }""",
        ["Transpose", "MatMul"],
    ),
    "one-plus-weight": (
        """g (float[batch, 2] x) => (float[batch, 2] y) <float[2] w = {0.25, 0.5}> {
            one = Constant <value_float = 1.0> ()
            v = Add (one, w)
            y = Mul (x, v)
        }""",
        ["Add", "Mul"],
    ),
    "arithmetic-of-literals": (
        """g (float[batch, 2] x) => (float[batch, 2] y) {
            a = Constant <value_float = 0.1> ()
            b = Constant <value_float = 0.2> ()
            c = Add (a, b)
            y = Mul (x, c)
        }""",
        ["Add", "Mul"],
    ),
    "zero-plus-float": (
        """g (float[batch, 2] x) => (float[batch, 2] y) {
            a = Constant <value_float = 0.0> ()
            y = Add (x, a)
        }""",
        ["Add"],
    ),
    "reshape-that-moves-an-axis": (
        """g (float[batch, sequence, 6] x) => (float[sequence, batch, 6] y) {
            b = Shape <start = 0, end = 1> (x)
            s = Shape <start = 1, end = 2> (x)
            c = Constant <value_ints = [6]> ()
            t = Concat <axis = 0> (s, b, c)
            y = Reshape (x, t)
        }""",
        ["Shape", "Shape", "Concat", "Reshape"],
    ),
    "slice-with-a-step": (
        """g (float[batch, 6] x) => (float[batch, 6] y) {
            s = Constant <value_ints = [-1]> ()
            e = Constant <value_ints = [-7]> ()
            a = Constant <value_ints = [1]> ()
            y = Slice (x, s, e, a, s)
        }""",
        ["Slice"],
    ),
    "slice-of-all-but-one": (
        """g (float[batch, 6] x) => (float[batch, 5] y) {
            s = Constant <value_ints = [0]> ()
            e = Constant <value_ints = [-1]> ()
            a = Constant <value_ints = [1]> ()
            y = Slice (x, s, e, a)
        }""",
        ["Slice"],
    ),
    "zero-that-broadcasts": (
        """g (int64[6] x) => (int64[1, 6] y) <int64[1, 1] z = {0}> {
            v = Add (x, z)
            y = Neg (v)
        }""",
        ["Add", "Neg"],
    ),
    "inexact-cast": (
        """g (float16[batch, 2] x) => (float16[batch, 2] y) {
            a = Constant <value_float = 0.1> ()
            b = Cast <to = 10> (a)
            y = Mul (x, b)
        }""",
        ["Cast", "Mul"],
    ),
}

INPUTS = {
    "x": lambda shape, dtype: np.random.default_rng(0).integers(-8, 8, shape).astype(dtype),
    "n": lambda shape, dtype: np.random.default_rng(1).integers(-8, 8, shape).astype(dtype),
}
SIZES = {"batch": 2, "sequence": 5}


def _evaluate(model: onnx.ModelProto) -> list[np.ndarray]:
    feeds = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value or SIZES[d.dim_param] for d in kind.shape.dim]
        feeds[value.name] = INPUTS[value.name](shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return ReferenceEvaluator(model).run(None, feeds)


@pytest.mark.parametrize("name", [*FOLDED, *LEFT])
def test_fold(name: str) -> None:
    text, expected = (FOLDED | LEFT)[name]
    before = onnx.parser.parse_model(HEAD + text)
    model = ir.from_proto(before)
    fold_shapes(model)
    assert [node.op_type for node in model.graph] == expected
    for result, wanted in zip(_evaluate(ir.to_proto(model)), _evaluate(before), strict=True):
        assert result.dtype == wanted.dtype
        assert np.array_equal(result, wanted)
    again = model.clone()
    fold_shapes(again)
    assert [str(node.op_type) for node in again.graph] == expected


def test_kept_axes_become_zeros() -> None:
    model = ir.from_proto(onnx.parser.parse_model(HEAD + FOLDED["reshape-target-of-kept-axes"][0]))
    fold_shapes(model)
    target = model.graph.node(0).inputs[1].const_value.numpy()
    assert target.tolist() == [0, 0, 2, 3]


def test_initializer_that_is_an_input_is_not_constant() -> None:
    text = """g (float[batch, 6] x, int64[2] s) => (float[rows, columns] y) <int64[2] s = {-1, 3}> {
        y = Reshape (x, s)
    }"""
    model = onnx.parser.parse_model(HEAD + text)
    folded = ir.from_proto(model)
    fold_shapes(folded)
    assert folded.graph.node(0).inputs[1].is_graph_input()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch", Monomial(1, ("batch",))),
        ("2*sequence*batch", Monomial(2, ("batch", "sequence"))),
        ("sequence + 1", Monomial(1, ("(sequence + 1)",))),
    ],
)
def test_dimension_is_a_monomial(text: str, expected: Monomial) -> None:
    assert dimension(ir.SymbolicDim(text)) == expected


def test_product_of_the_unknown_is_unknown() -> None:
    assert product([2, None]) is None
    assert product([0, None]) == 0
    assert product([2, 3]) == 6
