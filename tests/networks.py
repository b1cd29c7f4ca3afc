"""Small canonical networks for tests, written as ONNX text, and what tests ask of them.

In the text, weights stand among the graph's inputs with static shapes; `network` fills them with random numbers on
which a wrong rewrite shows (γ away from 1, β and biases away from 0, no mean of zero).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from rewrite.basis.operators import NORMS
from rewrite.check.reference import evaluate, values_of
from rewrite.ir.program import Program
from rewrite.ir.weights import weight_of
from rewrite.rule import steps

HEADER = '<ir_version: 11, opset_import: ["" : 23]>\n'


def network(
    text: str,
    inputs: Sequence[str] = ("x",),
    *,
    seed: int = 0,
    overridable: Sequence[str] = (),
    opset: int = 23,
    **weights: np.ndarray,
) -> Program:
    """A program from ONNX text without a header; graph inputs other than `inputs` become float32 initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : {opset}]>\n{text}')
    # checker and strict inference reject a text that does not mean what its author thought
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    generator = np.random.default_rng(seed)
    kept = []
    for value in list(model.graph.input):
        if value.name in inputs:
            kept.append(value)
            continue
        shape = [size.dim_value for size in value.type.tensor_type.shape.dim]
        array = weights.get(value.name)
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            array = np.asarray(array, np.int64).reshape(shape)
        else:
            array = generator.normal(0.4, 1.0, shape).astype(np.float32) if array is None else np.float32(array)
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array).reshape(shape), value.name))
        if value.name in overridable:
            kept.append(value)
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    onnx.checker.check_model(model, full_check=True)
    return Program.captured(ir.from_proto(model), "text")


def feed(program: Program, seed: int = 0, rows: int = 3, columns: int = 5) -> dict[str, np.ndarray]:
    """Random inputs; the first dynamic axis has `rows`, later ones `columns`; integers are below 7."""
    generator = np.random.default_rng(seed)
    made = {}
    for given in program.inputs:
        free = iter((rows, columns, columns))
        shape = [size if isinstance(size, int) else next(free) for size in given.shape]
        if given.dtype.is_floating_point():
            made[given.name] = generator.normal(size=shape).astype(np.float32)
        else:
            made[given.name] = generator.integers(0, 7, shape)
    return made


def rounding(program: Program, inputs: Mapping[str, np.ndarray]) -> float:
    """What float64 rounding may change in a value, relative to the largest number of the computation.

    Each node adds at most one unit roundoff for each term of its longest sum, and a norm of a row with hardly any
    variance multiplies what came before it by up to 1/√ε.
    """
    norms = (node for node in program.model.graph if node.op_type in NORMS)
    amplified = max((norm.attributes.get_float("epsilon", 1e-5) ** -0.5 for norm in norms), default=1.0)
    nodes = program.model.graph.num_nodes()
    longest = max((max(value.shape, default=1) for _, value in values_of(program.model, inputs)), default=1)
    stored = [value.const_value for value in program.model.graph.initializers.values()]
    longest = max(longest, *(max(tensor.shape.numpy(), default=1) for tensor in stored if tensor is not None), 1)
    return float(np.finfo(np.float64).eps) * max(nodes, 1) * longest * amplified


def difference(before: Program, after: Program, inputs: Mapping[str, np.ndarray]) -> float:
    """Largest relative difference of an output in float64 with unrounded weights, in units of `rounding`."""
    expected, found = evaluate(before.model, inputs), evaluate(after.model, inputs, unrounded=True)
    assert expected.keys() == found.keys()
    worst = 0.0
    for name, array in expected.items():
        assert array.shape == found[name].shape, name
        scale = np.abs(array).max(initial=np.finfo(np.float64).tiny)
        worst = max(worst, float(np.abs(array - found[name]).max(initial=0.0) / scale))
    return worst / rounding(before, inputs)


def values_agree(before: Program, after: Program, inputs: Mapping[str, np.ndarray]) -> int:
    """Assert that every value of both programs is related as `after.relations` says; how many were not the identity."""
    expected = dict(values_of(before.model, inputs))
    allowed, related = rounding(before, inputs), 0
    for name, found in values_of(after.model, inputs, unrounded=True):
        if name not in expected or not np.issubdtype(found.dtype, np.floating):
            continue
        array = expected[name]
        for step in steps(after.relations.get(name)):
            if step["transform"] == "centre":
                array = array - array.mean(axis=step["axis"], keepdims=True)
            else:
                array = after.transforms[step["transform"]].apply(array, step["axis"])
            related += 1
        scale = np.abs(expected[name]).max(initial=np.finfo(np.float64).tiny)
        assert array.shape == found.shape, name
        assert np.abs(array - found).max(initial=0.0) <= allowed * scale, f"{name}: {after.relations.get(name)}"
    return related


def digest(program: Program) -> str:
    """A digest of the graph and of every weight's exact value."""
    hashed = hashlib.sha256()
    for value in program.model.graph.initializers.values():
        assert value.const_value is not None
        hashed.update(f"{value.name} {value.dtype} {value.shape}".encode())
        hashed.update(weight_of(value.const_value).numpy().tobytes())
    for node in program.model.graph:
        operands = [value.name if value is not None else None for value in node.inputs]
        attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        hashed.update(f"{node.op_type} {node.name} {operands} {[v.name for v in node.outputs]} {attributes}".encode())
    hashed.update(str([value.name for value in (*program.model.graph.inputs, *program.model.graph.outputs)]).encode())
    return hashed.hexdigest()


def operators(program: Program) -> list[str]:
    """The operators of a program in order."""
    return [node.op_type for node in program.model.graph]
