"""GELU written out becomes the operator: exactly where its constants are the standard ones, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rewrite.check.reference import evaluate
from rewrite.ir.edit import Editor
from rewrite.ir.program import Program
from rewrite.proof import prove
from rewrite.targets.gelu import raise_gelu

D = 8


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def raised(text: str, constants: dict[str, np.ndarray]) -> ir.Model:
    """The graph after the step; evaluated and proved equal to the graph before it."""
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 23]>' + text)
    for name, array in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    program = Program.captured(ir.from_proto(model))
    for node in program.model.graph:
        for value in node.outputs:
            value.dtype, value.shape = ir.DataType.FLOAT, program.model.graph.inputs[0].shape
    editor = Editor(program.model, "test")
    raise_gelu(editor)
    editor.clean()
    x = np.random.default_rng(0).standard_normal((4, D)).astype(np.float32)
    (before,), (after,) = (evaluate(each, {"x": x}).values() for each in (program.original, program.model))
    # The constants of the definition are within an ulp of float32 of the source's, and so is what they scale.
    assert np.abs(after - before).max() <= 4 * np.finfo(np.float32).eps * np.abs(before).max()
    assert prove(program.original, program.model).verdict.holds
    return program.model


TANH = """g (float[n,8] x) => (float[n,8] y) {
    cube = Pow(x, three)
    small = Mul(cube, k)
    sum = Add(x, small)
    argument = Mul(sum, a)
    t = Tanh(argument)
    gate = Add(t, one)
    half_x = Mul(x, half)
    y = Mul(half_x, gate)
}"""
FAST = """g (float[n,8] x) => (float[n,8] y) {
    ax = Mul(x, a)
    kx = Mul(x, k)
    kxx = Mul(kx, x)
    inner = Add(one, kxx)
    argument = Mul(ax, inner)
    t = Tanh(argument)
    gate = Add(one, t)
    half_x = Mul(half, x)
    y = Mul(half_x, gate)
}"""
ERF = """g (float[n,8] x) => (float[n,8] y) {
    argument = Div(x, r)
    e = Erf(argument)
    gate = Add(e, one)
    product = Mul(x, gate)
    y = Mul(product, half)
}"""
GELU = {
    "a": number(np.sqrt(2 / np.pi)), "k": number(0.044715), "three": number(3), "one": number(1), "half": number(0.5),
    "r": number(np.sqrt(2)),
}  # fmt: skip


@pytest.mark.parametrize(("text", "kind"), [(TANH, "tanh"), (FAST, "tanh"), (ERF, "none")])
def test_gelu_is_raised(text: str, kind: str) -> None:
    lowered = raised(text, GELU)
    assert [node.op_type for node in lowered.graph] == ["Gelu"]
    assert lowered.graph[0].attributes["approximate"].value == kind


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (TANH, {"a": number(0.79788)}),
        (TANH, {"k": number(0.0447)}),
        (TANH, {"three": number(2)}),
        (TANH, {"one": number(1.001)}),
        (FAST, {"half": number(0.25)}),
        (ERF, {"r": number(1.4142)}),
        (ERF, {"half": number(1)}),
    ],
)
def test_what_is_not_quite_gelu_stays(text: str, changed: dict) -> None:
    assert "Gelu" not in [node.op_type for node in raised(text, {**GELU, **changed}).graph]
