"""Runs in ONNX Runtime: over files and over models in memory, leaving nothing behind."""

from __future__ import annotations

import tempfile

import numpy as np
import onnx_ir as ir
import pytest
from graphs import MLP, graph, mlp_inputs, mlp_weights

from rewrite.check.runtime import Session, is_runnable, run, run_original
from rewrite.errors import UnsupportedOperatorError
from rewrite.ir.program import save_model


def test_a_model_in_memory_and_its_file_give_the_same_bits(tmp_path):
    model, inputs = graph(MLP, mlp_weights()), mlp_inputs()
    save_model(model, tmp_path / "m.onnx")
    memory, file = run_original(model, inputs), run_original(tmp_path / "m.onnx", {**inputs, "unused": np.ones(1)})
    np.testing.assert_array_equal(memory["logits"], file["logits"])
    assert list(run(model, inputs)) == ["logits"]


def test_the_temporary_file_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Session(graph(MLP, mlp_weights())) as session:
        assert len(list(tmp_path.iterdir())) == 1
        session.run(mlp_inputs())
    assert not list(tmp_path.iterdir())
    with pytest.raises(UnsupportedOperatorError):
        Session(graph("g (float[2] x) => (float[2] y) { y = NoSuchThing(x) }"))
    assert not list(tmp_path.iterdir())


def test_running_leaves_the_model_in_memory_as_it_was():
    model = graph(MLP, mlp_weights())
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    run(model, mlp_inputs())
    assert all(model.graph.initializers[name].const_value is tensor for name, tensor in before.items())


def test_bfloat16_is_not_runnable_on_the_cpu():
    model = graph(MLP, mlp_weights())
    assert is_runnable(model)
    model.graph.inputs[0].dtype = ir.DataType.BFLOAT16
    assert not is_runnable(model)


def test_a_kernel_that_refuses_its_operands_is_an_error_with_a_message():
    model = graph("g (float[n, 3] x, float[m, 3] y) => (float[n, 3] z) { z = Add(x, y) }")
    with pytest.raises(UnsupportedOperatorError, match="Add"):
        run_original(model, {"x": np.ones((2, 3), np.float32), "y": np.ones((5, 3), np.float32)})
