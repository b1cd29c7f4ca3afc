"""ONNX files, with the checks a file from elsewhere needs; neither torch nor ONNX Runtime is imported here.

External data is read from the model's own folder and nowhere else: a location that is absolute, climbs out with `..`,
or is a link to another folder is refused before any byte of it is read.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from rewrite.capture.fold_shapes import fold_shapes, infer_missing_shapes
from rewrite.capture.safetensors_file import StoredTensor
from rewrite.errors import CheckpointError, SourceError, UnsafeSourceError

OPSET = 23
"""What captured graphs are converted up to, where the converters know how."""

KINDS_BY_NAME = {
    "input_ids": "token_ids",
    "decoder_input_ids": "token_ids",
    "attention_mask": "attention_mask",
    "decoder_attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "token_type_ids": "token_type_ids",
    "pixel_values": "image",
}

logger = logging.getLogger("rewrite")


def load_onnx(path: str | Path) -> ir.Model:
    """The model of an `.onnx` file (or of an OUT folder) as it is; its external tensors stay on disk.

    Raises:
        SourceError: there is no such file, or it is not an ONNX model.
        UnsafeSourceError: external data is outside the model's folder.
        CheckpointError: external data is missing or cut short.
    """
    path = Path(path)
    if path.is_dir():
        path /= "model.onnx"
    if not path.is_file():
        raise SourceError("no such file", where=str(path), remedy="give an .onnx file or a folder with model.onnx")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many kinds on arbitrary bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"not an ONNX model: {reason[:200]}", where=str(path), remedy="export it again, or check the download"
        ) from error
    if not model.graph.outputs:
        raise SourceError("not an ONNX model: a graph without outputs", where=str(path), remedy="check the download")
    folder = path.parent.resolve()
    for value in _initializers(model):
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = stored(value.const_value, folder, path)
    for node in _nodes(model):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                stored(attribute.value, folder, path)
    return model


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def stored(tensor: ir.ExternalTensor, folder: Path, path: Path) -> ir.ExternalTensor:
    """`tensor` on its checked file: inside `folder`, long enough for its shape."""
    location = Path(tensor.location)
    if location.is_absolute() or ".." in location.parts:
        raise UnsafeSourceError(
            f"tensor {tensor.name} is stored at {location}, outside the model's folder",
            where=str(path),
            remedy="save the model with its external data beside it",
        )
    real = (folder / location).resolve()
    if not real.is_relative_to(folder):
        raise UnsafeSourceError(
            f"tensor {tensor.name} is stored at {location}, a link out of the model's folder",
            where=str(path),
            remedy="copy the file itself beside the model",
        )
    if not real.is_file():
        raise CheckpointError(
            f"the external data {location} is missing", where=str(path), remedy="copy it beside the model"
        )
    size, offset = real.stat().st_size, tensor.offset or 0
    shape = tuple(tensor.shape.numpy())
    needed = (math.prod(shape) * tensor.dtype.bitwidth + 7) // 8
    if tensor.length is not None and tensor.length != needed:
        raise CheckpointError(
            f"tensor {tensor.name} holds {tensor.length:,} bytes, its shape {list(shape)} needs {needed:,}",
            where=str(path),
            remedy="save the model again",
        )
    if offset + needed > size:
        raise CheckpointError(
            f"truncated: tensor {tensor.name} ends at byte {offset + needed:,} of {location}, the file at {size:,}",
            where=str(path),
            remedy="copy the external data again",
        )
    if tensor.dtype.bitwidth < 8:
        return tensor
    return StoredTensor(str(real), offset, needed, tensor.dtype, shape=ir.Shape(shape), name=tensor.name)


def capture_onnx(source: Any) -> ir.Model:
    """The graph of an ONNX file or model in memory as a capture: inlined, converted up to opset 23, shapes folded.

    A graph that no converter can bring to opset 23 keeps its own, which is logged and noted in the metadata under
    `rewrite.opset`.
    """
    if isinstance(source, str | Path):
        model, where = load_onnx(source), str(source)
    else:
        model, where = (source.clone() if isinstance(source, ir.Model) else ir.from_proto(source)), "model in memory"
    if model.functions:
        from onnx_ir.passes.common import InlinePass

        model = InlinePass()(model).model
    model = _converted(model, where)
    infer_missing_shapes(model)
    fold_shapes(model)
    _describe(model)
    return model


def _converted(model: ir.Model, where: str) -> ir.Model:
    version = model.opset_imports.get("", OPSET)
    if version >= OPSET:
        return model
    from onnxscript import version_converter

    kept = model.clone()
    with _converter_warnings() as warned:
        try:
            # Below opset 18 onnxscript has no adapters and would only write another number: without the fallback to
            # ONNX's own converter, an opset-12 Softmax silently becomes another function.
            version_converter.convert_version(model, target_version=OPSET, fallback=True)
            reason = "" if model.opset_imports.get("") == OPSET else "no converter knows all of its operators"
        except Exception as error:  # noqa: BLE001 - converters raise many kinds; the graph as it was is always usable
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    skipped = [text for text in warned if text.startswith("Skipping")]
    if not reason and skipped:
        reason = skipped[0].splitlines()[0][:200]
    if not reason:
        _keep_descriptions(kept, model)
        return model
    logger.warning("%s stays at opset %d: %s", where, version, reason)
    kept.metadata_props["rewrite.opset"] = f"kept at {version}: {reason}"
    return kept


@contextlib.contextmanager
def _converter_warnings() -> Iterator[list[str]]:
    """What the converter logs inside: it skips a node it cannot adapt with no more than a warning."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    converter, collect = logging.getLogger("onnxscript.version_converter"), Collect()
    propagate, level = converter.propagate, converter.level
    converter.addHandler(collect)
    converter.propagate = False
    converter.setLevel(logging.WARNING)
    try:
        yield messages
    finally:
        converter.removeHandler(collect)
        converter.propagate = propagate
        converter.setLevel(level)


def _keep_descriptions(before: ir.Model, after: ir.Model) -> None:
    """ONNX's converter drops metadata; inputs keep theirs."""
    after.metadata_props.update(before.metadata_props)
    described = {value.name: value.metadata_props for value in before.graph.inputs}
    for value in after.graph.inputs:
        value.metadata_props.update(described.get(value.name, {}))


def _describe(model: ir.Model) -> None:
    """Kinds and bounds of inputs that carry none: from their names, and from the table an index looks up."""
    for value in model.graph.inputs:
        if "rewrite.kind" in value.metadata_props or value.name in model.graph.initializers or value.dtype is None:
            continue
        kind = KINDS_BY_NAME.get(value.name or "", "number")
        if kind == "number" and value.dtype.is_floating_point() and value.shape is not None and len(value.shape) == 4:
            kind = "image"
        value.metadata_props["rewrite.kind"] = kind
        if value.dtype.is_floating_point() or value.dtype == ir.DataType.BOOL:
            continue
        low, high = (0, 2) if kind == "attention_mask" else (0, _table_rows(value))
        value.metadata_props["rewrite.low"] = str(low)
        if high is not None:
            value.metadata_props["rewrite.high"] = str(high)


def _table_rows(value: ir.Value) -> int | None:
    """Rows of the smallest table that `value` indexes directly."""
    rows = []
    for use in value.uses():
        if use.node.op_type == "Gather" and use.idx == 1 and use.node.attributes.get_int("axis", 0) == 0:
            table = use.node.inputs[0]
            if table is not None and table.shape is not None and isinstance(table.shape[0], int):
                rows.append(table.shape[0])
    return min(rows, default=None)
