"""Modules, exported programs and factories."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import onnx_ir as ir
import pytest
import torch
from families import FAMILIES

import rewrite
from rewrite.errors import InputsError, SourceError, UnsupportedOperatorError


class Tied(torch.nn.Module):
    """A table read as an embedding and as a head, a norm with statistics, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(11, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.dropout = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.dropout(self.norm(self.table(ids).mean(1)))
        return hidden, self.head(hidden)


def make() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    return Tied(), {"ids": torch.arange(6).reshape(2, 3)}


def make_nothing() -> int:
    return 3


def test_module_shares_its_memory_and_its_ties() -> None:
    module, inputs = make()
    program = rewrite.capture(module, inputs)
    tables = [v.const_value for v in program.model.graph.initializers.values() if v.shape == ir.Shape([11, 6])]
    assert len(tables) == 1
    assert np.shares_memory(tables[0].numpy(), module.table.weight.detach().numpy())
    assert [value.name for value in program.model.graph.outputs] == ["output_0", "output_1"]


def test_module_is_captured_as_it_infers_and_left_as_it_was() -> None:
    module, inputs = make()
    module.dropout.eval()
    program = rewrite.capture(module, inputs)
    assert module.training
    assert module.norm.training
    assert not module.dropout.training
    operators = {node.op_type for node in program.model.graph}
    assert "Dropout" not in operators
    norm = next(node for node in program.model.graph if node.op_type == "BatchNormalization")
    assert norm.attributes.get_int("training_mode", 0) == 0


def test_batch_of_one_stays_dynamic() -> None:
    program = rewrite.capture(torch.nn.Linear(4, 3), (torch.zeros(1, 4),))
    assert program.inputs[0].shape == ("batch", 4)
    assert [value.name for value in program.model.graph.outputs] == ["output"]
    assert program.model.graph.outputs[0].shape == ir.Shape(["batch", 3])


def test_axis_that_the_model_fixes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.arange(3.0)[:, None] if x.shape[0] == 3 else x

    program = rewrite.capture(Fixed(), (torch.zeros(3, 4),))
    assert program.inputs[0].shape == (3, 4)
    assert program.model.metadata_props["rewrite.fixed.batch"] == "3"
    assert "the model fixes its batch at 3" in caplog.text


def test_dtype_of_choice_leaves_the_module_alone() -> None:
    module = torch.nn.Linear(4, 3)
    program = rewrite.capture(module, (torch.zeros(2, 4),), dtype=torch.float64)
    assert module.weight.dtype == torch.float32
    assert program.inputs[0].dtype == ir.DataType.DOUBLE


def test_pretrained_module_in_memory() -> None:
    model, inputs = FAMILIES["gpt2"]()
    program = rewrite.capture(model, inputs)
    assert [i.shape for i in program.inputs] == [("batch", "sequence")] * 2
    assert program.inputs[0].high == 101
    weight = program.model.graph.initializers["transformer.h.0.mlp.c_fc.weight"].const_value
    assert np.shares_memory(weight.numpy(), model.transformer.h[0].mlp.c_fc.weight.detach().numpy())


def test_exported_program() -> None:
    module, inputs = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            module.eval(), (), dict(inputs), dynamic_shapes={"ids": {0: torch.export.Dim.AUTO}}
        )
    program = rewrite.capture(exported)
    assert program.inputs[0].shape == ("batch", 3)


def test_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    program = rewrite.capture("test_capture_module:make")
    assert program.source == "test_capture_module:make"
    with pytest.raises(SourceError, match="returned a int"):
        rewrite.capture("test_capture_module:make_nothing")
    with pytest.raises(SourceError, match="has no absent"):
        rewrite.capture("test_capture_module:absent")
    with pytest.raises(SourceError, match="no_such_package"):
        rewrite.capture("no_such_package:make")


def test_module_without_inputs() -> None:
    with pytest.raises(InputsError, match="example inputs"):
        rewrite.capture(torch.nn.Linear(2, 2))


def test_source_of_no_kind() -> None:
    with pytest.raises(SourceError, match="a int is no source"):
        rewrite.capture(3)


def test_module_that_cannot_be_traced() -> None:
    class Branches(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(SourceError, match="cannot be exported") as caught:
        rewrite.capture(Branches(), (torch.ones(2, 3),))
    assert "\n" not in str(caught.value)


def test_operator_without_a_translation() -> None:
    class Unknown(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.airy_ai(x)

    with pytest.raises(UnsupportedOperatorError, match="airy_ai") as caught:
        rewrite.capture(Unknown(), (torch.ones(2, 3),))
    assert "\n" not in str(caught.value)


def test_capture_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    rewrite.capture(torch.nn.Linear(2, 2), (torch.zeros(3, 2),))
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


@pytest.mark.parametrize("statement", ["import rewrite.capture", "from rewrite.capture.onnx_file import load_onnx"])
def test_import_is_light(statement: str) -> None:
    code = f"{statement}; import sys; print({{'torch', 'onnxruntime', 'transformers'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_capture_is_the_function_whichever_import_came_first() -> None:
    code = "import rewrite.capture, rewrite; import rewrite.capture.finite; print(callable(rewrite.capture))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"
