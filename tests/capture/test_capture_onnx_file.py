"""ONNX files: what is safe loads, what reaches outside its folder does not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

import rewrite
from rewrite.capture.onnx_file import load_onnx
from rewrite.capture.safetensors_file import StoredTensor
from rewrite.errors import CheckpointError, RewriteError, SourceError, UnsafeSourceError

TEXT = """
<ir_version: 8, opset_import: ["" : {opset}]>
linear (float[batch, 4] x) => (float[batch, 3] y)
<float[4, 3] w, float[3] b>
{{
    product = MatMul(x, w)
    y = Add(product, b)
}}
"""


def _model(opset: int = 23) -> onnx.ModelProto:
    model = onnx.parser.parse_model(TEXT.format(opset=opset).replace("<float[4, 3] w, float[3] b>\n", ""))
    generator = np.random.default_rng(0)
    for name, shape in (("w", (4, 3)), ("b", (3,))):
        array = generator.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def _save(folder: Path, location: str = "model.onnx.data") -> Path:
    """The model with its weights at `location`, which the file's data is then moved from."""
    path = folder / "model.onnx"
    onnx.save(_model(), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    if location != "model.onnx.data":
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = location
        path.write_bytes(model.SerializeToString())
    return path


def _refused(path: Path, kind: type[RewriteError], word: str) -> None:
    with pytest.raises(kind, match=word) as caught:
        load_onnx(path)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def _run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


def test_external_data_stays_on_disk(tmp_path: Path) -> None:
    model = load_onnx(_save(tmp_path))
    weight = model.graph.initializers["w"].const_value
    assert isinstance(weight, StoredTensor)
    assert np.array_equal(weight.numpy(), onnx.numpy_helper.to_array(_model().graph.initializer[0]))
    assert np.array_equal(load_onnx(tmp_path).graph.initializers["w"].const_value.numpy(), weight.numpy())


def test_saved_capture_is_the_file_it_came_from(tmp_path: Path) -> None:
    program = rewrite.capture(_save(tmp_path))
    target = tmp_path / "out"
    target.mkdir()
    program.save(target / "model.onnx")
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    assert np.array_equal(_run(onnx.load(target / "model.onnx"), x), _run(_model(), x))
    assert repr(rewrite.capture(target)) == repr(program)


def test_location_above_the_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = _save(inner, "../secret.bin")
    (inner / "model.onnx.data").rename(tmp_path / "secret.bin")
    _refused(path, UnsafeSourceError, "outside")


def test_absolute_location(tmp_path: Path) -> None:
    _refused(_save(tmp_path, str(tmp_path / "model.onnx.data")), UnsafeSourceError, "outside")


def test_link_out_of_the_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = _save(inner)
    (inner / "model.onnx.data").rename(tmp_path / "secret.bin")
    os.symlink(tmp_path / "secret.bin", inner / "model.onnx.data")
    _refused(path, UnsafeSourceError, "link")


def test_missing_external_data(tmp_path: Path) -> None:
    path = _save(tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    _refused(path, CheckpointError, "missing")


def test_truncated_external_data(tmp_path: Path) -> None:
    path = _save(tmp_path)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:8])
    _refused(path, CheckpointError, "truncated")


@pytest.mark.parametrize("content", [b"", b"not a protobuf", b"\x00" * 64])
def test_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    _refused(path, SourceError, "not an ONNX model")


@pytest.mark.parametrize("opset", [11, 13, 18, 20, 21])
def test_older_opset_is_converted(opset: int) -> None:
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    program = rewrite.capture(_model(opset))
    assert program.model.opset_imports[""] == 23
    assert np.array_equal(_run(ir.to_proto(program.model), x), _run(_model(opset), x))


def test_opset_without_a_converter_is_kept_and_said(caplog: pytest.LogCaptureFixture) -> None:
    text = '<ir_version: 8, opset_import: ["" : 13]> g (float[2, 3] x) => (float[2, 3] y) { y = NoSuchOperator (x) }'
    program = rewrite.capture(onnx.parser.parse_model(text))
    assert program.model.opset_imports[""] == 13
    assert "kept at 13" in program.model.metadata_props["rewrite.opset"]
    assert "stays at opset 13" in caplog.text


def test_operator_that_changed_its_meaning_keeps_the_old_one() -> None:
    text = '<ir_version: 7, opset_import: ["" : 11]> g (float[2, 3, 4] x) => (float[2, 3, 4] y) { y = Softmax (x) }'
    model = onnx.parser.parse_model(text)
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    program = rewrite.capture(model)
    assert program.model.opset_imports[""] == 23
    # Up to opset 12, Softmax flattened everything from axis 1 on.
    flat = np.exp(x.reshape(2, 12).astype(np.float64))
    expected = (flat / flat.sum(1, keepdims=True)).reshape(x.shape)
    # Twelve exponentials and a sum: each rounds by at most a few ulps of one.
    assert np.abs(_run(ir.to_proto(program.model), x) - expected).max() <= 16 * np.finfo(np.float32).eps


def test_converted_model_keeps_its_descriptions_and_weights() -> None:
    model = _model(13)
    model.graph.input[0].metadata_props.add(key="rewrite.kind", value="image")
    program = rewrite.capture(model)
    assert program.inputs[0].kind == "image"
    assert np.array_equal(
        program.model.graph.initializers["w"].const_value.numpy(),
        onnx.numpy_helper.to_array(_model().graph.initializer[0]),
    )


def test_model_in_memory_is_not_changed() -> None:
    model = ir.from_proto(_model(18))
    rewrite.capture(model)
    assert model.opset_imports[""] == 18


def test_inputs_are_described_by_name_and_use() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 23]>
    lookup (int64[batch, sequence] input_ids, float[batch, 3, 8, 8] picture)
        => (float[batch, sequence, 3] y, float[batch, 3, 8, 8] z)
    {
        y = Gather <axis = 0> (table, input_ids)
        z = Relu(picture)
    }
    """
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((11, 3), np.float32), "table"))
    ids, picture = rewrite.capture(model).inputs
    assert (ids.kind, ids.low, ids.high, ids.shape) == ("token_ids", 0, 11, ("batch", "sequence"))
    assert (picture.kind, picture.low, picture.shape) == ("image", None, ("batch", 3, 8, 8))


def test_functions_are_inlined() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 23, "own" : 1]>
    g (float[2, 3] x) => (float[2, 3] y) { y = own.twice(x) }
    <domain: "own", opset_import: ["" : 23]>
    twice (a) => (b) { b = Add(a, a) }
    """
    program = rewrite.capture(onnx.parser.parse_model(text))
    assert [node.op_type for node in program.model.graph] == ["Add"]
    assert not program.model.functions
