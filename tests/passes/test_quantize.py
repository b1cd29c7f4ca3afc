"""Quantizing passes on networks of one product, where the error has a bound, and on shapes that occur."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from networks import digest, feed, network, operators

from rewrite.calibrate import calibrated
from rewrite.capture.canonicalize import canonicalize
from rewrite.check.reference import evaluate
from rewrite.check.runtime import run
from rewrite.ir.program import save_model
from rewrite.passes import QuantizeDynamic, QuantizeOperators, QuantizeStatic, QuantizeWeights
from rewrite.passes.quantize_operators import INTEGER
from rewrite.quantize.observers import Histogram
from rewrite.recipes import RECIPES, passes_of
from rewrite.rule import Applied, apply_pass

PRODUCT = """
product (float[B, 5, 80] x, float[80, 96] w, float[96] b) => (float[B, 5, 96] y)
{
    p = MatMul (x, w)
    y = Add (p, b)
}
"""

CONVOLUTIONS = """
convolutions (float[B, 3, 8, 8] x, float[16, 3, 3, 3] v, float[16] a, float[24, 16, 3, 3] w, float[24] b)
    => (float[B, 24, 4, 4] y)
{
    c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, v, a)
    r = Relu (c)
    m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
    d = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (m, w, b)
    y = Sigmoid (d)
}
"""

RESIDUAL = """
residual (float[B, 16, 8, 8] x, float[16, 16, 3, 3] v, float[16] a, float[16, 16, 3, 3] w, float[16, 16, 1, 1] u)
    => (float[B, 48, 1, 1] y)
{
    c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, v, a)
    s = Conv <kernel_shape = [1, 1]> (x, u)
    t = Add (c, s)
    r = Relu (t)
    d = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, w)
    q = Add (r, d)
    m = MaxPool <kernel_shape = [1, 1]> (c)
    j = Concat <axis = 1> (q, r, m)
    p = GlobalAveragePool (j)
    y = Sigmoid (p)
}
"""

WEIGHTS = [
    QuantizeWeights(method=method, symmetric=symmetric, block=block, bits=bits, accuracy_level=level)
    for method in ("nearest", "clipped", "gptq")
    for symmetric in (True, False)
    for block, bits, level in ((32, 4, 0), (16, 4, 4), (128, 2, 4), (32, 8, 4))
]


def quantized(text: str, rule, seed: int = 0):
    """A program, the same quantized, and inputs; the rule is calibrated on them."""
    program = network(text, seed=seed)
    inputs = feed(program, rows=4, columns=8)
    work = program.clone()
    outcomes = apply_pass(work, calibrated(rule, work, [inputs]))
    assert all(isinstance(outcome, Applied) for outcome in outcomes), outcomes
    return program, work, inputs


def relative_error(program, work, inputs) -> float:
    exact, found = evaluate(program.model, inputs)["y"], evaluate(work.model, inputs)["y"]
    assert exact.shape == found.shape
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("rule", WEIGHTS, ids=repr)
def test_weights_of_few_bits_are_within_their_steps(rule: QuantizeWeights) -> None:
    """Every method may clip; none is worse than the range over its number of codes, for every entry of a product."""
    program, work, inputs = quantized(PRODUCT, rule)
    assert operators(work) == ["MatMulNBits", "Add"]
    weight = program.model.graph.initializers["w"].const_value.numpy().astype(np.float64)
    exact, found = evaluate(program.model, inputs)["y"], evaluate(work.model, inputs)["y"]
    # Half a step for the nearest code in a range of 2^bits − 1 steps; four times that is where clipping would be a bug.
    step = np.ptp(np.vstack([weight, np.zeros_like(weight)])) / (2**rule.bits - 1)
    allowed = 4 * step * np.linalg.norm(inputs["x"].astype(np.float64), axis=-1) * np.sqrt(weight.shape[0])
    if rule.accuracy_level == 4:
        allowed += np.abs(inputs["x"]).max() / 127 * np.abs(weight).sum(axis=0).max()
    assert (np.abs(found - exact).max(axis=-1) <= allowed).all()


@pytest.mark.parametrize("rule", [QuantizeDynamic(), QuantizeDynamic(per_channel=False, clip=False)], ids=repr)
def test_dynamic_is_within_half_a_step_of_both(rule: QuantizeDynamic) -> None:
    program, work, inputs = quantized(PRODUCT, replace(rule, clip=False, saturation_free=False))
    assert operators(work) == ["DynamicQuantizeMatMul"]
    x = inputs["x"].astype(np.float64)
    weight = program.model.graph.initializers["w"].const_value.numpy().astype(np.float64)
    scales = np.broadcast_to(work.model.graph.initializers["w.scales"].const_value.numpy(), weight.shape[1:])
    step = np.ptp([0.0, x.min(), x.max()]) / 255
    # |x̂·Ŵ − x·W| ≤ |x|·|Ŵ − W| + |x̂ − x|·(|W| + |Ŵ − W|), a rounded zero point adds half a step.
    allowed = (np.abs(x).sum(-1, keepdims=True) + step * len(weight)) * scales / 2 + step * np.abs(weight).sum(0)
    exact, found = evaluate(program.model, inputs)["y"], evaluate(work.model, inputs)["y"]
    assert (np.abs(found - exact) <= allowed).all()


@pytest.mark.parametrize("calibration", ["min-max", "percentile", "mse", "entropy"])
def test_static_products_and_convolutions(calibration: str) -> None:
    rule = QuantizeStatic(calibration=calibration, minimum=64)
    for text in (PRODUCT, CONVOLUTIONS):
        program, work, inputs = quantized(text, rule)
        # Seven bits of each factor are left of eight where ranges have room: 2⁻⁷ for either, times three products.
        assert relative_error(program, work, inputs) <= 3 * 2.0**-6


def test_a_value_is_quantized_once_and_passes_what_picks_numbers() -> None:
    _, work, _ = quantized(CONVOLUTIONS, QuantizeStatic(minimum=64))
    made = operators(work)
    # x, r, m (with r's scale) and d; two of weights and biases each.
    assert made.count("QuantizeLinear") == 4
    assert made.count("DequantizeLinear") == 4 + 4
    scales = [node.inputs[1].name for node in work.model.graph if node.op_type == "QuantizeLinear"]
    assert scales.count("r.scale") == 2
    two = """two (float[B, 64] x, float[64, 64] v, float[64, 64] w) => (float[B, 64] y)
    { p = MatMul (x, v) q = MatMul (x, w) y = Add (p, q) }"""
    _, work, _ = quantized(two, QuantizeStatic())
    assert operators(work).count("QuantizeLinear") == 1


@pytest.mark.parametrize(
    "rule", [QuantizeDynamic(), QuantizeStatic(minimum=64), QuantizeWeights(), QuantizeWeights(rank=4)], ids=repr
)
def test_a_second_run_changes_nothing_and_numbers_are_the_runtimes(rule) -> None:
    _, work, inputs = quantized(PRODUCT, rule)
    before = digest(work)
    assert not [one for one in apply_pass(work, calibrated(rule, work, [inputs])) if isinstance(one, Applied)]
    assert digest(work) == before
    found, ran = evaluate(work.model, inputs)["y"], run(work.model, inputs)["y"]
    # Float32 rounds each of 80 terms and what quantizes them once; codes at ties may differ by one step of 2⁻⁷.
    assert np.linalg.norm(found - ran) <= 2.0**-7 * np.linalg.norm(found)


def test_a_residual_stream_stays_in_bytes() -> None:
    """Sums, concatenations and pools between convolutions; a value that was quantized before keeps its codes."""
    program, static, inputs = quantized(RESIDUAL, QuantizeStatic(minimum=64))
    rule = calibrated(QuantizeOperators(), static, [inputs])
    assert isinstance(rule, QuantizeOperators)
    assert set(rule.statistics or ()) == {"r", "q", "j", "p"}
    work = static.clone()
    outcomes = apply_pass(work, rule)
    assert [outcome.site for outcome in outcomes if isinstance(outcome, Applied)] == ["r", "q", "j", "p"]
    assert relative_error(program, work, inputs) <= 5 * 2.0**-6
    for node in work.model.graph:
        if node.op_type in ("Add", "Concat", "GlobalAveragePool"):
            assert {value.producer().op_type for value in node.inputs} == {"DequantizeLinear"}
    twice = [node.inputs[0].name for node in work.model.graph if node.op_type == "QuantizeLinear"]
    assert len(twice) == len(set(twice))
    found, ran = evaluate(work.model, inputs)["y"], run(work.model, inputs)["y"]
    assert np.linalg.norm(found - ran) <= 2.0**-6 * np.linalg.norm(found)
    before = digest(work)
    apply_pass(work, calibrated(QuantizeOperators(), work, [inputs]))
    assert digest(work) == before


BETWEEN = {
    "Add": ("Add (c, s)", (16, 8, 8)),
    "Mul": ("Mul (c, s)", (16, 8, 8)),
    "Concat": ("Concat <axis = 1> (c, s)", (32, 8, 8)),
    "AveragePool": ("AveragePool <kernel_shape = [2, 2]> (c)", (16, 7, 7)),
    "GlobalAveragePool": ("GlobalAveragePool (c)", (16, 1, 1)),
    "LeakyRelu": ("LeakyRelu <alpha = 0.1> (c)", (16, 8, 8)),
    "Sigmoid": ("Sigmoid (c)", (16, 8, 8)),
    "Softmax": ("Softmax <axis = 1> (c)", (16, 8, 8)),
}


@pytest.mark.parametrize("operator", INTEGER)
def test_the_runtime_has_an_integer_kernel_for_every_operator(operator: str, tmp_path: Path) -> None:
    expression, shape = BETWEEN[operator]
    text = f"""between (float[B, 16, 8, 8] x, float[16, 16, 3, 3] v, float[16] a, float[16, 16, 1, 1] u)
        => (float[B, {", ".join(map(str, shape))}] y)
    {{ c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, v, a) s = Conv <kernel_shape = [1, 1]> (x, u)
       t = {expression} y = Tanh (t) }}"""
    _, work, inputs = quantized(text, QuantizeStatic(minimum=64))
    (outcome,) = apply_pass(work, calibrated(QuantizeOperators(operators=(operator,)), work, [inputs]))
    assert isinstance(outcome, Applied), outcome
    save_model(work.model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    kinds = {node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph}
    assert f"QLinear{operator}" in kinds
    assert operator not in kinds
    # At a tie a code may fall to either side; Tanh makes no step of it larger.
    found, ran = evaluate(work.model, inputs)["y"], session.run(None, dict(inputs))[0]
    (scale,) = (v.const_value.numpy() for name, v in work.model.graph.initializers.items() if name == "t.scale")
    assert np.abs(found - ran).max() <= 1.01 * scale


def test_codes_of_another_type_are_no_codes_of_ours() -> None:
    """A network may come with int8 activations, or a scale for every channel: those are rounded to uint8 once more."""
    text = """signed (float[B, 5, 80] x, float[80, 96] w) => (float[B, 5, 96] y)
    { s = Constant <value = float {0.03}> () z = Constant <value = int8 {3}> ()
      q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = MatMul (d, w) }"""
    program = network(text)
    canonicalize(program)
    inputs = feed(program, rows=4)
    work = program.clone()
    histogram = Histogram()
    histogram.observe(evaluate(program.model, inputs, watch=["d"])["d"].reshape(-1, 80))
    (outcome,) = apply_pass(work, QuantizeStatic(statistics={"d": histogram}))
    assert isinstance(outcome, Applied)
    assert operators(work) == ["QuantizeLinear", "DequantizeLinear", "QuantizeLinear", "MatMulIntegerToFloat"]
    assert relative_error(program, work, inputs) <= 2.0**-6


def test_a_correction_of_low_rank_lowers_the_error() -> None:
    errors = [
        relative_error(*quantized(PRODUCT, QuantizeWeights(bits=4, rank=rank, method="nearest"))) for rank in (0, 8, 80)
    ]
    assert errors[1] < errors[0]
    # Of full rank it is all of the error, but for the rounding of its factors to float32.
    assert errors[2] <= 80 * np.finfo(np.float32).eps


def test_a_weight_that_two_products_read_is_stored_once() -> None:
    text = """shared (float[B, 64] x, float[64, 64] w) => (float[B, 64] y)
    { p = MatMul (x, w) t = Tanh (p) y = MatMul (t, w) }"""
    for rule in (QuantizeDynamic(), QuantizeWeights(), QuantizeStatic()):
        _, work, _ = quantized(text, rule)
        assert len([name for name in work.model.graph.initializers if name.endswith("codes")]) == 1


def test_a_transposed_table_is_read_through() -> None:
    text = """tied (float[B, 64] x, float[80, 64] w) => (float[B, 80] y)
    { t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) }"""
    for rule in (QuantizeDynamic(), QuantizeWeights(bits=8, accuracy_level=4), QuantizeStatic()):
        program, work, inputs = quantized(text, rule)
        assert relative_error(program, work, inputs) < 2.0**-6
        assert "Transpose" not in operators(work)


PRESETS = ("int8-dynamic", "int8-static", "int4-weight", "int4-weight-int8-activation")


def test_recipes_are_joined_in_the_order_of_all_passes() -> None:
    for preset in PRESETS:
        plain = [each.name for each in passes_of(None, preset)]
        assert len([each for each in passes_of(None, preset) if each.approximates]) == 1
        joined = [each.name for each in passes_of(None, f"smooth+rotate+{preset}")]
        assert joined[-1] == plain[-1]
        assert set(joined) == {*plain, *map(str, RECIPES["smooth"]), *map(str, RECIPES["rotate"])}
        assert joined == [each.name for each in passes_of(None, f"{preset}+rotate+smooth")]
