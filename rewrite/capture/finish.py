"""What every capture ends with: named axes, a signature in the metadata, tensors free of torch.

The exporter names symbolic dimensions s43 or s17+1. Here they become `batch` and `sequence`, in every shape of the
graph.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from rewrite.capture.example_inputs import Signature

SYMBOL = re.compile(r"\b[su]\d+\b")
EXPORTER_METADATA = ("pkg.torch", "pkg.onnxscript", "namespace")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or progress prints of the exporters: a user of the command line sees our messages only."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def name_dimensions(model: ir.Model, signature: Signature) -> None:
    """Replace the exporter's symbols by the names of the axes they stand for, everywhere.

    An axis that the model itself fixes (Mamba unrolls its sequence) is noted in the metadata as `rewrite.fixed.<name>`.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        axes = signature.axes.get(value.name or "", {})
        for axis, dimension in enumerate(value.shape or ()):
            if axis not in axes:
                continue
            if isinstance(dimension, int) or (dimension.value or "").isdigit():
                model.metadata_props[f"rewrite.fixed.{axes[axis]}"] = str(dimension)
            elif dimension.value:
                names.setdefault(dimension.value, axes[axis])

    def renamed(dimension: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dimension, int) or not dimension.value:
            return dimension
        if dimension.value.isdigit():
            return int(dimension.value)
        return ir.SymbolicDim(SYMBOL.sub(lambda match: names.get(match[0], match[0]), dimension.value))

    for value in all_values(model):
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape([renamed(dimension) for dimension in value.shape])


def all_values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of the graph and its subgraphs."""
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def describe_inputs(model: ir.Model, signature: Signature) -> None:
    """Write kind and bounds of each input, and the maxima of named dimensions, into the model's metadata."""
    for value in model.graph.inputs:
        described = signature.inputs.get(value.name or "")
        if described is None:
            continue
        value.metadata_props["rewrite.kind"] = described.kind
        if described.low is not None:
            value.metadata_props["rewrite.low"] = str(described.low)
        if described.high is not None:
            value.metadata_props["rewrite.high"] = str(described.high)
    for dimension, maximum in signature.maxima.items():
        model.metadata_props[f"rewrite.maximum.{dimension}"] = str(maximum)


def name_nodes(model: ir.Model) -> None:
    """Name each node for its module (`model.layers.0.mlp.up_proj/MatMul`), which is how a report places it."""
    taken: set[str] = set()
    for node in model.graph.all_nodes():
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        module = next((scope for scope in reversed(scopes[:-1]) if scope), "")
        base = f"{module}/{node.op_type}" if module else node.op_type if scopes else node.name or node.op_type
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        node.name = name


def drop_exporter_metadata(model: ir.Model) -> None:
    """Name the nodes, then drop the exporter's own metadata: stack traces, with paths of the machine it ran on."""
    name_nodes(model)
    for value in all_values(model):
        _drop(value.metadata_props)
    for node in model.graph.all_nodes():
        _drop(node.metadata_props)
    for graph in model.graphs():
        _drop(graph.metadata_props)
    _drop(model.metadata_props)


def _drop(properties: dict[str, str]) -> None:
    for key in [key for key in properties if key.startswith(EXPORTER_METADATA)]:
        del properties[key]


def tensor_of(name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Tensor:
    """An in-memory tensor over `array`, which is not copied."""
    return ir.Tensor(array, dtype=dtype, shape=ir.Shape(array.shape), name=name)


def give_tensors(model: ir.Model, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    """Set the tensors of the initializers named in `tensors`."""
    for name, tensor in tensors.items():
        value = model.graph.initializers[name]
        value.const_value = tensor
        value.dtype = tensor.dtype
        value.shape = ir.Shape(tensor.shape.numpy())
