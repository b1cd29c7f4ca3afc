"""The float64 evaluation: exact widening, streaming, freeing, control flow, refusals."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest
from graphs import MLP, graph, mlp_inputs, mlp_weights

from rewrite.check.reference import evaluate, values_of
from rewrite.check.runtime import run_original
from rewrite.errors import InputsError, UnsupportedOperatorError
from rewrite.ir import weights as lazy

U32, U64 = 2.0**-24, 2.0**-53


def test_a_small_network_is_the_formula_in_float64():
    stored, inputs = mlp_weights(), mlp_inputs()
    result = evaluate(graph(MLP, stored), inputs)["logits"]
    x = inputs["x"].astype(np.float64)
    wide = {name: array.astype(np.float64) for name, array in stored.items()}
    centred = x - x.mean(-1, keepdims=True)
    epsilon = float(np.float32(1e-5))
    norm = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * wide["gamma"]
    up = norm @ wide["w_up"]
    from math import erf, sqrt

    act = 0.5 * up * (1 + np.vectorize(erf)(up / sqrt(2)))
    expected = (act @ wide["w_down"] + x) @ wide["w_head"]
    assert result.dtype == np.float64
    magnitude = np.abs(act) @ np.abs(wide["w_down"]) @ np.abs(wide["w_head"]) + np.abs(x) @ np.abs(wide["w_head"])
    assert np.all(np.abs(result - expected) <= 64 * U64 * magnitude)


def test_the_float32_run_lies_within_its_own_rounding():
    model, inputs = graph(MLP, mlp_weights()), mlp_inputs()
    exact = evaluate(model, inputs)["logits"]
    narrow = evaluate(model, inputs, precision=np.float32)["logits"]
    run = run_original(model, inputs)["logits"]
    assert narrow.dtype == np.float32
    scale = 64 * U32 * 16 * np.abs(exact).max()
    assert 0 < np.abs(narrow - exact).max() <= scale
    assert 0 < np.abs(run - exact).max() <= scale


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16"])
def test_narrow_weights_widen_exactly_and_casts_between_floats_do_nothing(dtype):
    kind = ir.DataType[dtype]
    w = np.array([[1 / 3, 2.7], [-1.1, 0.2]]).astype(kind.numpy())
    model = graph(
        "g (float[n,2] x) => (float[n,2] y)"
        f" {{ c = Cast <to = {kind.value}> (x) m = MatMul(c, w) y = Cast <to = 1> (m) }}",
        {"w": ir.Tensor(w, dtype=kind)},
    )
    x = np.array([[1 + 2.0**-20, 3.0]], np.float32)  # the cast would lose 2⁻²⁰
    np.testing.assert_array_equal(evaluate(model, {"x": x})["y"], x.astype(np.float64) @ w.astype(np.float64))


def test_masks_of_the_lowest_float_do_not_overflow():
    lowest = float(np.finfo(np.float32).min)
    model = graph(
        "g (float[n,3] x, float[n,3] mask) => (float[n,3] y) { a = Add(x, mask) b = Add(a, mask) y = Softmax(b) }"
    )
    mask = np.array([[0, 0, lowest]], np.float32)
    result = evaluate(model, {"x": np.array([[1.0, 1.0, 5.0]], np.float32), "mask": mask})["y"]
    np.testing.assert_array_equal(result, [[0.5, 0.5, 0.0]])


def test_integer_arithmetic_is_exact_beyond_float64():
    model = graph("g (int64[n] x) => (int64[n] y) { y = Add(x, x) }")
    x = np.array([2**60 + 1])
    assert evaluate(model, {"x": x})["y"].tolist() == [2**61 + 2]


def test_unrounded_weights_keep_what_the_storage_type_drops():
    third = lazy.Scale(lazy.Constant(np.ones((2, 2))), lazy.Constant(np.array(1 / 3)))
    tensor = lazy.MaterializedTensor(third, ir.DataType.FLOAT, name="w")
    model = graph("g (float[n,2] x) => (float[n,2] y) { y = MatMul(x, w) }", {"w": tensor})
    x = {"x": np.array([[1.0, 0.0]], np.float32)}
    assert evaluate(model, x)["y"][0, 0] == float(np.float32(1 / 3))
    assert evaluate(model, x, unrounded=True)["y"][0, 0] == 1 / 3


def test_watched_values_and_the_callback():
    model, inputs = graph(MLP, mlp_weights()), mlp_inputs()
    seen: list[str] = []
    result = evaluate(model, inputs, watch={"up", "norm", "absent"}, on_value=lambda name, _: seen.append(name))
    assert list(result) == ["logits", "norm", "up"]
    assert seen == ["x", "norm", "up", "act", "down", "sum", "logits"]
    np.testing.assert_array_equal(result["up"], dict(values_of(model, inputs))["up"])


def test_outputs_that_are_inputs_or_initializers():
    model = graph("g (float[2] x) => (float[2] x, float[2] y) { y = Add(x, b) }", {"b": np.ones(2, np.float32)})
    model.graph.outputs.append(model.graph.initializers["b"])
    result = evaluate(model, {"x": np.zeros(2, np.float32)})
    assert {name: array.tolist() for name, array in result.items()} == {"x": [0, 0], "y": [1, 1], "b": [1, 1]}


def external(path, shape: tuple[int, ...], array: np.ndarray | None = None) -> ir.ExternalTensor:
    """A float32 tensor on disk: `array`, or a hole of zeros."""
    if array is None:
        with open(path, "wb") as file:
            file.truncate(4 * int(np.prod(shape)))
    else:
        array.astype(np.float32).tofile(path)
    return ir.ExternalTensor(
        path.name, 0, 4 * int(np.prod(shape)), ir.DataType.FLOAT, shape=ir.Shape(shape), name="w", base_dir=path.parent
    )


PRODUCTS = {
    "MatMul": ("y = MatMul(x, w)", lambda x, w: x @ w, (3000, 900)),
    "Gemm": ("y = Gemm <transB = 1> (x, w)", lambda x, w: x @ w.T, (900, 3000)),
    "transposed": ("t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t)", lambda x, w: x @ w.T, (900, 3000)),
    "left": ("t = Transpose <perm = [1, 0]> (x) y = MatMul(w, t)", lambda x, w: w @ x.T, (900, 3000)),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_large_matrix_is_multiplied_in_blocks(case, tmp_path):
    body, formula, shape = PRODUCTS[case]
    w = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    assert w.size > lazy.BLOCK_ELEMENTS
    model = graph(f"g (float[n,3000] x) => (float[m,k] y) {{ {body} }}", {"w": external(tmp_path / "w", shape, w)})
    x = np.random.default_rng(4).standard_normal((2, 3000)).astype(np.float32)
    wide, result = formula(x.astype(np.float64), w.astype(np.float64)), evaluate(model, {"x": x})["y"]
    magnitude = formula(np.abs(x.astype(np.float64)), np.abs(w.astype(np.float64)))
    assert np.all(np.abs(result - wide) <= 2 * 3000 * U64 * magnitude)


@pytest.mark.parametrize(
    "body",
    ["y = MatMul(x, w)", "t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t)", "r = Gather(w, i) y = MatMul(x, r)"],
)
def test_a_large_weight_is_never_whole_in_memory(body, tmp_path):
    """4096 × 8192 is 268 MB in float64; a block and its float32 copy are 25 MB."""
    shape = (8192, 4096) if "Transpose" in body else (4096, 8192)
    if "Gather" in body:
        shape = (1 << 17, 256)
    model = graph(
        f"g (float[n,{shape[1] if 'Transpose' in body else 4096}] x, int64[k] i) => (float[m,k] y) {{ {body} }}",
        {"w": external(tmp_path / "w", shape)},
    )
    x = np.ones((2, 4096), np.float32)
    tracemalloc.start()
    try:
        evaluate(model, {"x": x, "i": np.arange(0, 1 << 17, 32)})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * lazy.BLOCK_ELEMENTS * 8


def test_values_are_freed_after_their_last_use():
    """Sixty additions of 1 MiB in a row hold a few of them, not sixty."""
    chain = " ".join(f"v{i + 1} = Add(v{i}, v{i})" for i in range(60))
    model = graph(f"g (float[131072] v0) => (float[131072] v60) {{ {chain} }}")
    tracemalloc.start()
    try:
        evaluate(model, {"v0": np.zeros(131072, np.float32)})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("choice", [True, False])
def test_if_evaluates_one_branch_in_the_outer_scope(choice):
    model = graph(
        """g (bool c, float[2] x) => (float[2] y) {
            big = Add(x, x)
            y = If (c) <
                then_branch = a () => (float[2] t) { t = Mul(big, x) },
                else_branch = b () => (float[2] e) { e = Sub(big, x) }
            >
        }"""
    )
    x = np.array([3.0, 5.0], np.float32)
    result = evaluate(model, {"c": np.array(choice), "x": x})["y"]
    assert result.tolist() == ([18, 50] if choice else [3, 5])


def test_loop_carries_values_and_stacks_scans():
    model = graph(
        """g (int64 n, bool c, float[2] x) => (float[2] last, float[k,2] all) {
            last, all = Loop (n, c, x) <
                body = b (int64 i, bool go, float[2] v) => (bool more, float[2] next, float[2] scan) {
                    more = Identity(go) next = Add(v, x) scan = Identity(next)
                }
            >
        }"""
    )
    result = evaluate(model, {"n": np.array(3), "c": np.array(True), "x": np.array([1.0, 2.0], np.float32)})
    assert result["last"].tolist() == [4, 8]
    assert result["all"].tolist() == [[2, 4], [3, 6], [4, 8]]


def test_model_local_functions_are_evaluated():
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23, "own" : 1]>
        g (float[2] x) => (float[2] y) { y = own.twice(x) }
        <domain: "own", opset_import: ["" : 23]>
        twice (a) => (b) { b = Add(a, a) }"""
    )
    assert evaluate(model, {"x": np.array([1.0, 2.0], np.float32)})["y"].tolist() == [2, 4]


def test_sequences_pass():
    model = graph(
        """g (float[4] x) => (float[2] y, float[4] z) {
            k = Constant <value_int = 2> () s = SplitToSequence <axis = 0> (x, k)
            one = Constant <value_int = 1> () y = SequenceAt(s, one) z = ConcatFromSequence <axis = 0> (s)
        }"""
    )
    result = evaluate(model, {"x": np.arange(4, dtype=np.float32)})
    assert result["y"].tolist() == [2, 3]
    assert result["z"].tolist() == [0, 1, 2, 3]


def test_an_operator_outside_the_table_goes_to_the_standard_reference():
    model = graph("g (float[2,2] x) => (float y) { y = Det(x) }")
    assert evaluate(model, {"x": np.array([[2.0, 1.0], [1.0, 3.0]], np.float32)})["y"] == pytest.approx(5)


REFUSED = {
    "unknown operator": ("y = NoSuchThing(x)", "NoSuchThing"),
    "unknown domain": ("y = com.microsoft.NoSuchThing(x)", "com.microsoft::NoSuchThing"),
    "random": ("y = RandomNormalLike(x)", "random"),
    "operands that do not fit": ("y = MatMul(x, x)", r"MatMul.*float64\[2, 3\]"),
    "index out of range": ("i = Constant <value_ints = [7]> () y = Gather(x, i)", "Gather"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_the_node_and_the_operator(case):
    body, pattern = REFUSED[case]
    model = graph(f"g (float[2,3] x) => (float[n,3] y) {{ {body} }}")
    with pytest.raises(UnsupportedOperatorError, match=pattern) as caught:
        evaluate(model, {"x": np.ones((2, 3), np.float32)})
    assert caught.value.where.startswith("node ")


def test_a_missing_input_is_named():
    with pytest.raises(InputsError, match="x is missing"):
        evaluate(graph(MLP, mlp_weights()), {})


@pytest.mark.parametrize("name", ["Dropout"])
def test_dropout_in_training_is_refused(name):
    model = graph(
        "g (float[2] x) => (float[2] y) { r = Constant <value_float = 0.5> () t = Constant <value = bool {1}> ()"
        f" y = {name}(x, r, t) }}"
    )
    with pytest.raises(UnsupportedOperatorError, match="training"):
        evaluate(model, {"x": np.ones(2, np.float32)})


def test_a_float32_run_may_take_the_standards_answer_in_float32():
    model = graph("""
    g (float[1, 4, 1] x) => (float[1, 4, 2] y) { axis = Constant <value_int = 1> () y = DFT (x, , axis) }""")
    x = {"x": np.arange(4, dtype=np.float32).reshape(1, 4, 1)}
    assert evaluate(model, x, precision=np.float32)["y"].dtype == np.float32
    assert evaluate(model, x)["y"].dtype == np.float64
