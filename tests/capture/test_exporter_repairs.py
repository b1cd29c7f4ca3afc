"""What the exporters write that is not what the module says is put right when it is captured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import rewrite
from rewrite.capture.exporter_repairs import repair


class Collision(torch.nn.Module):
    """A buffer and a result of the same name: the exporter calls the result of `mean` so."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([[0.5], [2.0], [-1.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean).mean(2) * x.mean(2)


def _outputs(program: rewrite.Program, place: Path, **inputs: np.ndarray) -> np.ndarray:
    """What the program computes once it was written to a file and read back."""
    onnx.checker.check_model(ir.to_proto(program.model))
    ir.save(program.model, place)
    return ReferenceEvaluator(str(place)).run(None, inputs)[0]


def test_result_with_the_name_of_a_buffer(tmp_path: Path) -> None:
    module, x = Collision(), torch.rand(2, 3, 5)
    program = rewrite.capture(module, {"x": x})
    names = [value.name for node in program.model.graph for value in node.outputs]
    names += [*program.model.graph.initializers, *(value.name for value in program.model.graph.inputs)]
    assert len(set(names)) == len(names)
    assert np.allclose(_outputs(program, tmp_path / "m.onnx", x=x.numpy()), module(x).numpy(), atol=1e-6)


def test_convolution_in_space_and_time_without_bias(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3, padding=1, bias=False)).eval()
    x = torch.rand(2, 2, 4, 5, 6)
    program = rewrite.capture(module, {"input": x})
    (node,) = program.model.graph
    assert [value.name for value in node.inputs] == ["input", "0.weight"]
    expected = module(x).detach().numpy()
    assert np.allclose(_outputs(program, tmp_path / "m.onnx", input=x.numpy()), expected, atol=1e-5)


TEXT = """<ir_version: 10, opset_import: ["" : 23]> f
(float[2, 1, 3, 3, 3] x, float[4, 1, 3, 3, 3] w) => (float[2, 4, 1, 1, 1] y)
<int64[2] shape = {4, 2}> {
    zero = Constant <value = float {NUMBER}> ()
    cast = CastLike (zero, x)
    size = Concat <axis = 0> (shape)
    bias = Expand (cast, size)
    y = Conv (x, w, bias)
}"""


@pytest.mark.parametrize(("number", "inputs"), [("0.0", 2), ("1.0", 3)])
def test_only_zeros_are_taken_for_no_bias(number: str, inputs: int) -> None:
    model = ir.from_onnx_text(TEXT.replace("NUMBER", number))
    node = repair(model).graph.node(-1)
    assert len(node.inputs) == inputs
