"""Each canonicalization, evaluated in float64 before and after, and the cases that must stay as they are."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from rewrite.capture.canonicalize import canonicalize
from rewrite.check.reference import evaluate
from rewrite.ir.edit import ORIGIN
from rewrite.ir.program import Program
from rewrite.ir.weights import MaterializedTensor

D = 8
RANDOM = np.random.default_rng(7)


def number(value: float, *shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.full(shape, value, dtype)


def program(text: str, opset: int = 23, **weights: np.ndarray) -> Program:
    """The program of a graph in ONNX text; weights are the initializers it names."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    loose = {
        value.name: value
        for node in model.graph
        for value in node.inputs
        if value is not None and value.producer() is None and not value.is_graph_input()
    }
    for name, value in loose.items():
        array = weights[name]
        value.const_value = ir.tensor(array, name=name)
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)
        model.graph.register_initializer(value)
    return Program.captured(model)


def operators(made: Program) -> Counter:
    return Counter(node.op_type for node in made.model.graph)


def canonical(made: Program, **inputs: np.ndarray) -> Counter:
    """Canonicalize, check in float64 that nothing but rounded constants changed, and give the operators that remain."""
    before = evaluate(made.original, inputs)
    canonicalize(made)
    after = evaluate(made.model, inputs, unrounded=True)
    assert list(before) == list(after)
    for name, expected in before.items():
        # The rounding of float64 sums, of at most 100 terms a layer, in another order.
        perturbed = 100 * np.finfo(np.float64).eps
        scale = np.abs(expected).max() or 1.0
        assert np.abs(after[name] - expected).max() <= 4 * perturbed * scale, name
    once = operators(made)
    canonicalize(made)
    assert operators(made) == once, "canonical form is canonical"
    return once


def x(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape or (2, 3, D)).astype(np.float32)


# ── Norms ───────────────────────────────────────────────────────────────────────────────────────────────────────────

W = RANDOM.standard_normal(D).astype(np.float32)
B = RANDOM.standard_normal(D).astype(np.float32)
RMS = """g (float[b,s,8] x) => (float[b,s,8] y) {{
    square = {square}
    mean = ReduceMean <keepdims = {keepdims}> (square, axes)
    shifted = Add(mean, epsilon)
    {inverse}
    normal = {product}
    y = Mul({operands})
}}"""
ROOT = "root = Sqrt(shifted)\n inverse = Reciprocal(root)"


def rms(
    square="Pow(x, two)", keepdims=1, inverse=ROOT, product="Mul(x, inverse)", operands="normal, w", **weights
) -> Program:
    text = RMS.format(square=square, keepdims=keepdims, inverse=inverse, product=product, operands=operands)
    given = {
        "two": number(2), "axes": np.array([-1]), "epsilon": number(1e-6), "w": W, "one": number(1),
        "half": number(-0.5), **weights,
    }  # fmt: skip
    made = program(text, **given)
    described = {"mean": [*"bs", 1], "shifted": [*"bs", 1], "square": [*"bs", D], "normal": [*"bs", D]}
    for node in made.model.graph:
        for output in node.outputs:
            if output.name in described and keepdims:
                output.shape = ir.Shape(described[output.name])
    return made


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"square": "Mul(x, x)"},
        {"operands": "w, normal"},
        {"product": "Mul(inverse, x)"},
        {"inverse": "inverse = Pow(shifted, half)"},
        {"inverse": "root = Sqrt(shifted)\n inverse = Div(one, root)"},
        {"inverse": "root = Sqrt(shifted)", "product": "Div(x, root)"},
        {"inverse": "turned = Reciprocal(shifted)\n inverse = Sqrt(turned)"},
        {"axes": np.array([2])},
        {"two": np.array(2, np.int64)},
    ],
    ids=str,
)
def test_every_spelling_of_rms_is_raised(form: dict) -> None:
    made = rms(**form)
    assert canonical(made, x=x()) == {"RMSNormalization": 1}
    (node,) = made.model.graph
    assert node.inputs[1].name == "w"
    assert node.outputs[0].name == "y"
    assert node.metadata_props[ORIGIN] == "canonicalize"
    assert node.attributes["epsilon"].value == float(np.float32(1e-6))
    assert node.outputs[0].dtype == ir.DataType.FLOAT


NOT_RMS = {
    "exponent a little under 2": {"two": number(1.9999999)},
    "exponent 3": {"two": number(3)},
    "mean over another axis": {"axes": np.array([1])},
    "mean over two axes": {"axes": np.array([1, 2])},
    "epsilon is a vector": {"epsilon": number(1e-6, D)},
    "square of something else": {"square": "Mul(x, w)", "w": np.abs(W)},
    "root is not inverted": {"product": "Mul(x, shifted)"},
    "third root": {"inverse": "inverse = Pow(shifted, half)", "half": number(-1 / 3)},
    "two over the root": {"inverse": "root = Sqrt(shifted)\n inverse = Div(one, root)", "one": number(2)},
}


@pytest.mark.parametrize("form", NOT_RMS.values(), ids=NOT_RMS.keys())
def test_what_is_not_quite_rms_stays(form: dict) -> None:
    assert "RMSNormalization" not in canonical(rms(**form), x=np.abs(x()) + 0.1)


def test_a_mean_without_its_axis_stays() -> None:
    made = rms(keepdims=0, axes=np.array([-1]))
    inputs = {"x": x(1, D, D)}
    assert "RMSNormalization" not in canonical(made, **inputs)


def test_an_epsilon_that_is_no_float32_stays() -> None:
    text = RMS.replace("float", "double").format(
        square="Mul(x, x)", keepdims=1, inverse=ROOT, product="Mul(x, inverse)", operands="normal, w"
    )
    made = program(text, axes=np.array([-1]), epsilon=np.array(1e-6), w=W.astype(np.float64))
    assert "RMSNormalization" not in canonical(made, x=x().astype(np.float64))


def test_an_overridable_weight_stays_outside() -> None:
    text = RMS.replace("float[b,s,8] x)", "float[b,s,8] x, float[8] w)")
    made = program(
        text.format(square="Mul(x, x)", keepdims=1, inverse=ROOT, product="Mul(x, inverse)", operands="normal, w"),
        axes=np.array([-1]), epsilon=number(1e-6),
    )  # fmt: skip
    value = made.model.graph.inputs[1]
    value.const_value = ir.tensor(W, name="w")
    made.model.graph.register_initializer(value)
    assert canonical(made, x=x(), w=2 * W) == {"RMSNormalization": 1, "Mul": 1}


def test_a_weight_of_another_rank_stays_outside() -> None:
    made = rms(w=RANDOM.standard_normal((3, D)).astype(np.float32))
    assert canonical(made, x=x()) == {"RMSNormalization": 1, "Mul": 1}


def test_an_old_opset_has_no_rms_normalization() -> None:
    text = RMS.format(square="Mul(x, x)", keepdims=1, inverse=ROOT, product="Mul(x, inverse)", operands="normal, w")
    made = program(text, opset=20, axes=np.array([-1]), epsilon=number(1e-6), w=W)
    assert "RMSNormalization" not in canonical(made, x=x())


def test_one_plus_weight_becomes_an_expression() -> None:
    text = RMS.replace("    square", "    scale = Add(w, one)\n    square")
    text = text.format(
        square="Mul(x, x)", keepdims=1, inverse=ROOT, product="Mul(x, inverse)", operands="normal, scale"
    )
    made = program(text, axes=np.array([-1]), epsilon=number(1e-6), w=W, one=number(1))
    made.model.graph[0].outputs[0].dtype = ir.DataType.FLOAT
    assert canonical(made, x=x()) == {"RMSNormalization": 1}
    scale = made.model.graph[0].inputs[1].const_value
    assert isinstance(scale, MaterializedTensor)
    np.testing.assert_array_equal(scale.numpy(), (W.astype(np.float64) + 1).astype(np.float32))


def test_half_precision_norms_lose_their_casts() -> None:
    text = """g (float16[b,s,8] x) => (float16[b,s,8] y) {
        wide = Cast <to = 1> (x)
        square = Mul(wide, wide)
        mean = ReduceMean (square, axes)
        shifted = Add(mean, epsilon)
        root = Sqrt(shifted)
        normal = Div(wide, root)
        narrow = Cast <to = 10> (normal)
        y = Mul(w, narrow)
    }"""
    made = program(text, axes=np.array([-1]), epsilon=number(1e-6), w=W.astype(np.float16))
    for node in made.model.graph:
        wide = node.op_type not in ("Mul", "Cast") or node.outputs[0].name in ("wide", "square")
        node.outputs[0].dtype = ir.DataType.FLOAT if wide else ir.DataType.FLOAT16
        last = 1 if node.outputs[0].name in ("mean", "shifted", "root") else D
        node.outputs[0].shape = ir.Shape(["b", "s", last])
    assert canonical(made, x=x().astype(np.float16)) == {"RMSNormalization": 1}


LAYER = """g (float[b,s,8] x) => (float[b,s,8] y) {
    mean = ReduceMean (x, axes)
    centred = Sub(x, mean)
    square = Mul(centred, centred)
    variance = ReduceMean (square, axes)
    shifted = Add(variance, epsilon)
    root = Sqrt(shifted)
    normal = Div(centred, root)
    TAIL
}"""


@pytest.mark.parametrize(
    ("tail", "inputs"),
    [
        ("scaled = Mul(normal, w)\n y = Add(scaled, b)", 3),
        ("y = Mul(w, normal)", 2),
        ("y = Identity(normal)", 2),
    ],
)
@pytest.mark.parametrize("opset", [23, 18])
def test_layer_norms_are_raised(tail: str, inputs: int, opset: int) -> None:
    made = program(LAYER.replace("TAIL", tail), opset, axes=np.array([-1]), epsilon=number(1e-5), w=W, b=B)
    assert canonical(made, x=x()) == {"LayerNormalization": 1}
    assert len(made.model.graph[0].inputs) == inputs


def test_centring_over_another_axis_is_no_layer_norm() -> None:
    made = program(
        LAYER.replace("(x, axes)", "(x, rows)").replace("TAIL", "y = Mul(normal, w)"),
        axes=np.array([-1]), rows=np.array([1]), epsilon=number(1e-5), w=W,
    )  # fmt: skip
    assert "LayerNormalization" not in canonical(made, x=x())


# ── Linear maps ─────────────────────────────────────────────────────────────────────────────────────────────────────

MATRIX = RANDOM.standard_normal((D, 5)).astype(np.float32)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("beta", [1.0, 3.0])
@pytest.mark.parametrize("trans", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm_is_a_product_and_a_sum(alpha: float, beta: float, trans: tuple[int, int]) -> None:
    shape = "8,n" if trans[0] else "n,8"
    made = program(
        f"""g (float[{shape}] x) => (float[n,5] y) {{
            y = Gemm <alpha = {alpha}, beta = {beta}, transA = {trans[0]}, transB = {trans[1]}> (x, w, b)
        }}""",
        w=MATRIX.T.copy() if trans[1] else MATRIX, b=B[:5],
    )  # fmt: skip
    expected = {"MatMul": 1, "Add": 1, **({"Transpose": 1} if trans[0] else {})}
    assert canonical(made, x=x(*((D, 4) if trans[0] else (4, D)))) == expected


def test_a_gemm_that_scales_what_is_not_constant_stays() -> None:
    made = program("g (float[n,8] x, float[8,5] w) => (float[n,5] y) { y = Gemm <alpha = 2.0> (x, w) }")
    assert canonical(made, x=x(4, D), w=MATRIX) == {"Gemm": 1}


FLAT = """g (float[b,s,8] x) => (float[b,s,5] y) {
    rows = Reshape(x, flat)
    linear = Gemm(rows, w, b)
    y = Reshape(linear, restored)
}"""


def flat(restored: list[int], output: tuple, last: int = D) -> Program:
    made = program(FLAT, flat=np.array([-1, last]), w=MATRIX[:last], b=B[:5], restored=np.array(restored))
    for node, shape in zip(made.model.graph, (("n", last), ("n", 5), output)):
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(shape)
    return made


def test_flattening_around_a_linear_map_is_undone() -> None:
    made = flat([2, 3, 5], ("b", "s", 5))
    assert canonical(made, x=x()) == {"MatMul": 1, "Add": 1}
    assert [str(d) for d in made.model.graph.outputs[0].shape] == ["b", "s", "5"]


def test_flattening_that_swaps_axes_stays() -> None:
    made = flat([3, 2, 5], ("s", "b", 5))
    assert canonical(made, x=x())["Reshape"] == 2


def test_flattening_that_splits_the_last_axis_stays() -> None:
    made = flat([2, 6, 5], ("b", "s", 5), last=4)
    assert canonical(made, x=x())["Reshape"] == 2


def test_transposed_weights_are_stored_transposed_once() -> None:
    made = program(
        """g (float[n,8] x) => (float[n,5] y, float[n,5] z) {
            t = Transpose <perm = [1, 0]> (w)
            u = Transpose <perm = [1, 0]> (w)
            y = MatMul(x, t)
            other = Neg(x)
            z = MatMul(other, u)
        }""",
        w=MATRIX.T.copy(),
    )
    assert canonical(made, x=x(4, D)) == {"MatMul": 2, "Neg": 1}
    assert list(made.model.graph.initializers) == ["w_transposed"]


def test_a_large_tied_table_is_stored_once() -> None:
    made = program(
        """g (int64[n] ids) => (float[n,300] y) {
            x = Gather(table, ids)
            t = Transpose <perm = [1, 0]> (table)
            y = MatMul(x, t)
        }""",
        table=RANDOM.standard_normal((300, D)).astype(np.float32),
    )
    assert canonical(made, ids=np.array([1, 299])) == {"Gather": 1, "Transpose": 1, "MatMul": 1}
    assert list(made.model.graph.initializers) == ["table"]


# ── Activations ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_relu_is_raised_and_a_clip_above_zero_is_not() -> None:
    made = program(
        "g (float[n,8] x) => (float[n,8] y, float[n,8] z) { y = Max(x, zero)\n z = Clip(x, one) }",
        zero=number(0),
        one=number(1),
    )
    assert canonical(made, x=x(4, D)) == {"Relu": 1, "Clip": 1}


# ── Attention and structure ─────────────────────────────────────────────────────────────────────────────────────────

GROUPED = """
g (float[b,4,s,8] q, float[b,2,s,8] k, float[b,2,s,8] v, int64[5] wide, int64[4] long) => (float[b,4,s,8] y) {
    k5 = Unsqueeze(k, two)
    ke = Expand(k5, wide)
    kr = Reshape(ke, long)
    v5 = Unsqueeze(v, two)
    ve = Expand(v5, wide)
    vr = Reshape(ve, long)
    y = Attention(q, kr, VALUES)
}"""


def grouped(values: str, axis: int = 2) -> Program:
    made = program(GROUPED.replace("VALUES", values), two=np.array([axis]))
    inserted, widened = ["b", 2, "s", D], ["b", 2, "s", D]
    inserted.insert(axis, 1)
    widened.insert(axis, 2)
    shapes = {"k5": inserted, "v5": inserted, "ke": widened, "ve": widened}
    for node in made.model.graph:
        output = node.outputs[0]
        if not output.is_graph_output():
            output.shape = ir.Shape(shapes.get(output.name, ["b", 4, "s", D]))
            output.dtype = ir.DataType.FLOAT
    return made


def attention_inputs(axis: int = 2) -> dict[str, np.ndarray]:
    wide = [3, 2, 5, D]
    wide.insert(axis, 2)
    return {
        "q": x(3, 4, 5, D), "k": x(3, 2, 5, D), "v": x(3, 2, 5, D)[::-1].copy(), "wide": np.array(wide),
        "long": np.array([3, 4, 5, D]),
    }  # fmt: skip


def test_repeated_heads_become_groups() -> None:
    assert canonical(grouped("vr"), **attention_inputs()) == {"Attention": 1}


def test_heads_repeated_in_another_order_stay() -> None:
    assert canonical(grouped("vr", axis=1), **attention_inputs(axis=1))["Expand"] == 2


def test_keys_repeated_alone_stay() -> None:
    text = GROUPED.replace("float[b,2,s,8] v", "float[b,4,s,8] v").replace("VALUES", "v")
    text = "\n".join(line for line in text.splitlines() if not line.strip().startswith("v"))
    made = program(text, two=np.array([2]))
    assert canonical(made, **{**attention_inputs(), "v": x(3, 4, 5, D)})["Expand"] == 1


def test_what_computes_nothing_goes() -> None:
    made = program(
        """g (float[n,8] x) => (float[n,8] y) {
            a = Identity(x)
            b = Cast <to = 1> (a)
            c = Dropout(b)
            d = Slice(c, start, end, axis)
            e = Mul(d, one)
            f = Add(zero, e)
            y = Neg(f)
        }""",
        start=np.array([0]), end=np.array([2**62]), axis=np.array([1]), one=number(1), zero=number(0),
    )  # fmt: skip
    for node in made.model.graph:
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(["n", D]), ir.DataType.FLOAT
    assert canonical(made, x=x(4, D)) == {"Neg": 1}


def test_a_reversing_slice_a_training_dropout_and_a_narrowing_cast_stay() -> None:
    made = program(
        """g (float[n,8] x) => (float[n,8] y, float16[n,8] z, float[n,8] d) {
            y = Slice(x, start, end, axis, step)
            z = Cast <to = 10> (x)
            d = Dropout(x, ratio, training)
        }""",
        start=np.array([-1]), end=np.array([-(2**62)]), axis=np.array([1]), step=np.array([-1]),
        ratio=number(0.5), training=np.array(True),
    )  # fmt: skip
    canonicalize(made)
    assert operators(made) == {"Slice": 1, "Cast": 1, "Dropout": 1}


def test_widening_by_a_neutral_element_stays() -> None:
    made = program("g (float[8] x) => (float[2,8] y) { y = Mul(x, ones) }", ones=number(1, 2, 1))
    assert canonical(made, x=x(D)) == {"Mul": 1}


def test_sequences_of_pieces_become_a_split() -> None:
    made = program(
        """g (float[n,8] x) => (float[n,3] y, float[n,5] z) {
            pieces = SplitToSequence <axis = 1, keepdims = 1> (x, sizes)
            y = SequenceAt(pieces, first)
            z = SequenceAt(pieces, last)
        }""",
        sizes=np.array([3, 5]), first=np.array(0), last=np.array(-1),
    )  # fmt: skip
    before = x(4, D)
    canonicalize(made)
    after = evaluate(made.model, {"x": before})
    assert operators(made) == {"Split": 1}
    np.testing.assert_array_equal(after["y"], before[:, :3])
    np.testing.assert_array_equal(after["z"], before[:, 3:])


# ── Whole networks ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("family", "present", "absent"),
    [
        (
            "gpt2",
            {"LayerNormalization", "MatMul", "Tanh", "Attention"},
            {"Gemm", "Identity", "SplitToSequence"},
        ),
        ("llama", {"RMSNormalization", "MatMul", "Attention"}, {"Pow", "Sqrt", "ReduceMean"}),
        ("vit", {"LayerNormalization", "MatMul", "Gelu", "Conv"}, {"Gemm", "Identity"}),
    ],
)
def test_a_captured_family(family: str, present: set, absent: set, family_program) -> None:
    made = family_program(family)
    images = made.inputs[0].kind == "image"
    tokens = np.random.default_rng(0).integers(3, 90, (3, 7))
    mask = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1] * 7])
    inputs = (
        {"pixel_values": x(2, *made.inputs[0].shape[1:])} if images else {"input_ids": tokens, "attention_mask": mask}
    )
    found = canonical(made, **inputs)
    assert present <= set(found)
    assert not absent & set(found)
