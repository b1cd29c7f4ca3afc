"""What the passes that quantize must leave in floating point: one case per requirement, and traps."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from networks import network
from refusals import Case, check_refusal

from rewrite.passes import APPROXIMATIONS, QuantizeDynamic, QuantizeOperators, QuantizeStatic, QuantizeWeights
from rewrite.quantize.observers import Histogram
from rewrite.rule import Applied, Refused, apply_pass

PRODUCT = """
product ({types}float[B, 5, 64] x, float[64, 96] w) => (float[B, 5, {width}] y)
{{
    {inside}
}}
"""


def product(inside: str = "y = MatMul (x, w)", types: str = "", width: int = 96) -> str:
    return PRODUCT.format(inside=inside, types=types, width=width)


TABLE = """
table (int64[B, 5] x, float[64, 96] w) => (float[B, 5, 96] y)
{
    y = Gather <axis = 0> (w, x)
}
"""

CONVOLUTION = """
convolution (float[B, 8, 6, 6] x, float[16, 8, 3, 3] w, float[16] b) => (float[B, 16, 4, 4] y)
{
    y = Conv <kernel_shape = [3, 3]> (x, w, b)
}
"""

DEEP = """
deep (float[B, 66400] x, float[66400, 2] w) => (float[B, 2] y)
{
    y = MatMul (x, w)
}
"""

CODES = """
codes (float[B, 8] x) => (float[B, 8] y)
{{
    s = Constant <value = float {{0.1}}> ()
    z = Constant <value = uint8 {{3}}> ()
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    {inside}
}}
"""


def codes(inside: str = "t = Add (d, d) y = Tanh (t)") -> str:
    return CODES.format(inside=inside)


SHARED = {
    "R1": Case(product(), "w", "MatMul", "w may be replaced by a caller", options={"overridable": ("w",)}),
    "R2": Case(TABLE, "w", "Gather", "rows of it are looked up"),
    "R4": Case(
        product("z = MatMul (x, w) y = MatMul (z, small)", "float[96, 3] small, ", 3),
        *("small", "MatMul", "288 entries, 4096 are worth it"),
    ),
}


def _cases() -> list[tuple[object, str, Case]]:
    dynamic, weights, static = QuantizeDynamic(), QuantizeWeights(), QuantizeStatic(minimum=4096)
    cases: list[tuple[object, str, Case]] = []
    for rule in (dynamic, weights, static):
        cases += [(rule, requirement, case) for requirement, case in SHARED.items()]
    operators, lacking = QuantizeOperators(statistics={"t": Histogram(), "y": Histogram()}), frozenset[str]()
    return [
        *cases,
        (dynamic, "R5", Case(DEEP, "w", "MatMul", "sums of 66400 products may not fit into 32 bits")),
        (static, "R5", Case(DEEP, "w", "MatMul", "sums of 66400 products may not fit into 32 bits")),
        (replace(dynamic, kernels=lacking), "R6", Case(product(), "w", "MatMul", "the target has no int8 kernel that")),
        (replace(weights, kernels=lacking), "R5", Case(product(), "w", "MatMul", "the target has no kernel that mult")),
        (replace(weights, bits=8), "R5", Case(product(), "w", "MatMul", "8 bits have no kernel in floating point")),
        (replace(weights, layer_bits={"w": 0}), "R5", Case(product(), "w", "MatMul", "was chosen to stay")),
        (replace(weights, method="gptq"), "R6", Case(product(), "w", "MatMul", "gptq needs calibration data")),
        (replace(static, minimum=1), "R6", Case(CONVOLUTION, "w", "Conv", "y is an output of the network")),
        (replace(static, kernels=lacking), "R7", Case(product(), "w", "MatMul", "the target has no int8 kernels for")),
        (static, "R8", Case(product(), "w", "MatMul", "the range of x was not measured")),
        (operators, "R1", Case(codes("e = Tanh (d) t = Add (e, d) y = Tanh (t)"), "t", "Add", "e is in floating")),
        (operators, "R2", Case(codes("y = Add (d, d)"), "y", "Add", "y is an output of the network")),
        (replace(operators, kernels=lacking), "R3", Case(codes(), "t", "Add", "the target has no int8 kernels for")),
        (replace(operators, statistics=None), "R4", Case(codes(), "t", "Add", "the range of t was not measured")),
    ]


CASES = _cases()


@pytest.mark.parametrize(("rule", "requirement", "case"), CASES, ids=[f"{r.name}-{i}" for r, i, _ in CASES])  # type: ignore[attr-defined]
def test_the_requirement_is_refused(rule, requirement: str, case: Case) -> None:
    check_refusal(rule, requirement, case, alone=not isinstance(rule, QuantizeStatic))


def test_every_requirement_has_a_case() -> None:
    for rule in APPROXIMATIONS:
        stated = {requirement.id for requirement in rule.requires}
        tested = {requirement for one, requirement, _ in CASES if type(one) is rule}
        assert tested | {"R3"} == stated, rule.name  # types have tests of their own


@pytest.mark.parametrize("rule", [QuantizeDynamic(), QuantizeStatic(minimum=1)], ids=lambda rule: rule.name)
def test_another_type_is_refused(rule) -> None:
    program = network(product())
    initializer = program.model.graph.initializers["w"]
    assert initializer.const_value is not None
    initializer.const_value = ir.tensor(initializer.const_value.numpy().astype(np.float64), name="w")
    initializer.dtype = ir.DataType.DOUBLE
    (outcome,) = apply_pass(program, rule)
    assert isinstance(outcome, Refused)
    assert outcome.refusal.requirement == "R3"


def test_operators_of_another_type_or_without_a_kernel_are_refused() -> None:
    # 11878 are the bits of 0.1.
    half = """half (float16[B, 8] x) => (float16[B, 8] y)
    { s = Constant <value = float16 {11878}> () z = Constant <value = uint8 {3}> ()
      q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) t = Add (d, d) y = Tanh (t) }"""
    (outcome,) = apply_pass(network(half), QuantizeOperators(statistics={"t": Histogram()}))
    assert isinstance(outcome, Refused)
    assert outcome.refusal.reason == "it computes in float16"
    with pytest.raises(TypeError, match="no integer kernel for LayerNormalization"):
        QuantizeOperators(operators=("Add", "LayerNormalization"))


@pytest.mark.parametrize("rule", [QuantizeDynamic(), QuantizeWeights()], ids=lambda rule: rule.name)
def test_what_is_no_product_on_the_right_is_named(rule) -> None:
    left = network(
        "left (float[B, 96, 5] x, float[64, 96] w) => (float[B, 64, 5] y) { y = MatMul (w, x) }",
    )
    stack = network(
        "stack (float[4, 5, 32] x, float[4, 32, 64] w) => (float[4, 5, 64] y) { y = MatMul (x, w) }",
    )
    entries = network("entries (float[B, 64, 96] x, float[64, 96] w) => (float[B, 64, 96] y) { y = Mul (x, w) }")
    said = []
    for program in (left, stack, entries):
        (outcome,) = apply_pass(program, rule)
        assert isinstance(outcome, Refused)
        said.append(outcome.refusal.reason)
    assert said[0].startswith("it is the left factor")
    assert said[1].startswith("it is a stack of matrices")
    assert said[2] == "Mul reads it, which is no matrix product"


@pytest.mark.parametrize("rule", [QuantizeDynamic(keep=("w*",)), QuantizeWeights(keep=("*",))], ids=lambda r: r.name)
def test_what_is_asked_to_stay_stays(rule) -> None:
    (outcome,) = apply_pass(network(product()), rule)
    assert isinstance(outcome, Refused)
    assert "is to stay in floating point" in outcome.refusal.reason


def test_measured_ranges_let_it_through() -> None:
    """The positive control of the requirement on data."""
    histogram = Histogram()
    histogram.observe(np.random.default_rng(0).normal(size=(20, 64)))
    (outcome,) = apply_pass(network(product()), QuantizeStatic(statistics={"x": histogram}))
    assert isinstance(outcome, Applied)
