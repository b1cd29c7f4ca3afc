"""Pairs of small models: what is asked of the proof, and float64 witnesses of what they compute."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from rewrite.check.reference import evaluate
from rewrite.errors import UnsupportedOperatorError
from rewrite.proof import Proof, prove

SIZES = {"B": 3, "S": 5, "T": 4, "K": 2}
"""What symbolic dimensions are when a pair is evaluated."""

Weights = Mapping[str, np.ndarray]


def parsed(text: str, weights: Weights | None = None, *, opset: int = 23) -> onnx.ModelProto:
    """`text` is `(inputs) => (outputs) { nodes }`, functions after it; `weights` become initializers."""
    imports = f'"" : {opset}, "com.microsoft" : 1, "local" : 1'
    proto = onnx.parser.parse_model(f"<ir_version: 11, opset_import: [{imports}]>\ng {text}")
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return proto


def model(text: str, weights: Weights | None = None, *, opset: int = 23, declared: bool = False) -> ir.Model:
    """`declared`: with the types and shapes that ONNX infers for the values between."""
    proto = parsed(text, weights, opset=opset)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True) if declared else proto)


def feed(given: ir.Model, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal numbers for real inputs, −9 … 9 for int32, 1 … 9 for other integers, both values for booleans."""
    known, generator, made = {**SIZES, **(sizes or {})}, np.random.default_rng(seed), {}
    for value in given.graph.inputs:
        if value.name in given.graph.initializers:
            continue
        shape = [size if isinstance(size, int) else known[str(size.value)] for size in value.shape or ()]
        dtype = value.dtype or ir.DataType.FLOAT
        if dtype.is_floating_point():
            made[value.name] = generator.normal(size=shape).astype(dtype.numpy())
        elif dtype == ir.DataType.BOOL:
            made[value.name] = generator.integers(0, 2, shape).astype(bool)
        else:
            low = 1 if dtype.name.startswith("UINT") or dtype == ir.DataType.INT64 else -9
            made[value.name] = generator.integers(low, 10, shape).astype(dtype.numpy())
    return made


def computed(given: ir.Model, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs, real numbers in float64."""
    try:
        found = evaluate(given, inputs)
        return [found[value.name or ""] for value in given.graph.outputs]
    except UnsupportedOperatorError:
        return by_standard(given, inputs)


def by_standard(given: ir.Model, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs by ONNX's reference implementation, which wraps integers and rounds small formats."""
    return [np.asarray(value) for value in ReferenceEvaluator(ir.to_proto(given)).run(None, dict(inputs))]


def departure(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest number; infinite where shapes or types of number differ."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or (x.dtype.kind == "f") != (y.dtype.kind == "f"):
            return float("inf")
        if x.dtype.kind in "OUS":
            worst = max(worst, float((x != y).any()))
            continue
        x, y = x.astype(np.float64), y.astype(np.float64)
        if not x.size:
            continue
        if not np.array_equal(np.isfinite(x), np.isfinite(y)):
            return float("inf")
        scale = max(float(np.abs(x[np.isfinite(x)]).max(initial=0.0)), 1e-300)
        apart = np.abs(np.where(np.isfinite(x), x - np.where(np.isfinite(y), y, 0), 0))
        worst = max(worst, float(apart.max()) / scale)
    return worst


ROUNDING = 2.0**-40
"""Far above what float64 may change in these pairs, far below one ulp of a float32 constant."""


COARSE = 2.0**-10
"""Far above float32 rounding, in which the standard's implementation computes."""


def differ(original: ir.Model, rewritten: ir.Model, **given: object) -> bool:
    inputs = given.get("inputs") or feed(original, given.get("sizes"))  # type: ignore[arg-type]
    if departure(computed(original, inputs), computed(rewritten, inputs)) > ROUNDING:  # type: ignore[arg-type]
        return True
    return departure(by_standard(original, inputs), by_standard(rewritten, inputs)) > COARSE  # type: ignore[arg-type]


def refused(original: ir.Model, rewritten: ir.Model, **given: object) -> Proof:
    """The pair computes different functions, and the proof does not say otherwise; both models equal themselves."""
    assert differ(original, rewritten, **given), "the witness shows no difference: the test would prove nothing"
    proof = prove(original, rewritten)
    assert not proof.verdict.holds, f"{proof.verdict} for a pair that computes different functions"
    return proof


def accepted(original: ir.Model, rewritten: ir.Model, *, tolerance: float = ROUNDING, **given: object) -> Proof:
    """The pair computes the same function, up to `tolerance`, and the proof finds it."""
    inputs = given.get("inputs") or feed(original, given.get("sizes"))  # type: ignore[arg-type]
    apart = departure(computed(original, inputs), computed(rewritten, inputs))  # type: ignore[arg-type]
    assert apart <= tolerance, f"the identity is not true: {apart}"
    proof = prove(original, rewritten)
    assert proof.verdict.kind == "EQUAL", str(proof.verdict)
    return proof
