"""Did the exporter keep what the author wrote? Every export is asked, before a weight is read.

Two things went wrong in released exporters without a word, and each ends a capture here:

* a weight is changed and keeps its name, or takes another's (a batch norm folded into a convolution under a name that
  was taken): every initializer under the name of a parameter must hold that parameter's memory, and every parameter
  that the traced outputs depend on must be among those that the graph's outputs depend on;
* a batch norm that is traced with the statistics of its batch is written as a frozen one.

Nothing is copied: a tensor is compared by its storage first, and by its content only where that differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from rewrite.errors import SourceError

PARAMETERS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@contextlib.contextmanager
def verified_export(where: str = "") -> Iterator[None]:
    """Inside, what `torch.onnx.export` makes of an exported program is compared with that program.

    Raises, from that call:
        SourceError: a batch norm uses the statistics of its batch; a parameter was changed or left out.
    """
    original = torch.onnx.export

    def export(source: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(source, ExportedProgram):
            return original(source, *args, **options)
        refuse_batch_statistics(source, where)
        written = original(source, *args, **options)
        if written is not None:
            check_parameters(written.model, source, where)
        return written

    torch.onnx.export = export
    try:
        yield
    finally:
        torch.onnx.export = original


def refuse_batch_statistics(exported: ExportedProgram, where: str = "") -> None:
    """Raise where a batch norm that has running statistics was traced with those of its batch.

    The exporter writes it as a frozen one: 1.5 off on a range of 5 for one convolution.
    """
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if _uses_batch_statistics(node):
                raise SourceError(
                    f"{_place(node)} normalizes by the statistics of the batch: it was traced in training mode",
                    where=where,
                    remedy="call module.eval() before torch.export.export, or take away its running statistics",
                )


def _uses_batch_statistics(node: torch.fx.Node) -> bool:
    given = _named_arguments(node)
    if "batch_norm" not in str(node.target) or given.get("running_mean") is None:
        return False
    return bool(given.get("training", "with_update" in str(node.target)))


def _named_arguments(node: torch.fx.Node) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return {}
    return dict(zip((argument.name for argument in schema.arguments), node.args)) | dict(node.kwargs)


def _place(node: torch.fx.Node) -> str:
    """The module that a node was traced in, or its own name."""
    scopes = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
    return str(scopes[-1]).removeprefix("L['self'].") if scopes else node.name


def check_parameters(model: ir.Model, exported: ExportedProgram, where: str = "") -> None:
    """Raise unless `model` holds the parameters of `exported` under their names, and depends on all that it does."""
    known = _tensors(exported)
    for name, value in model.graph.initializers.items():
        tensor = known.get(name)
        if tensor is not None and not _holds(value.const_value, tensor):
            raise SourceError(
                f"the exporter wrote another tensor under the name of the parameter {name}",
                where=where,
                remedy="report it to the exporter with this module; another version of torch may not do it",
            )
    lost = sorted(_used(exported) - _live(model))
    if lost:
        others = f" (and {len(lost) - 1} more)" if lost[1:] else ""
        raise SourceError(
            f"the outputs depend on the parameter {lost[0]}{others}, and what the exporter wrote does not",
            where=where,
            remedy="report it to the exporter with this module; another version of torch may not do it",
        )


def _tensors(exported: ExportedProgram) -> dict[str, torch.Tensor]:
    """Parameters, buffers and tensor constants by the names that the exporter gives them."""
    found: dict[str, torch.Tensor] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in PARAMETERS and spec.target is not None:
            tensor = exported.state_dict.get(spec.target, exported.constants.get(spec.target))
            if isinstance(tensor, torch.Tensor):
                found[spec.target] = tensor
    return found


def _holds(stored: Any, tensor: torch.Tensor) -> bool:
    raw = getattr(stored, "raw", None)
    if not isinstance(raw, torch.Tensor) or raw.shape != tensor.shape or raw.dtype != tensor.dtype:
        return False
    if raw is tensor or is_without_data(raw) or is_without_data(tensor):
        # A parameter without data is known by its identity alone; copies of it are the exporter's aliases.
        return raw is tensor or raw.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    if raw.data_ptr() == tensor.data_ptr() and raw.stride() == tensor.stride():
        return True
    # No tolerance: the same numbers, and NaN where NaN is.
    return bool(torch.equal(raw, tensor)) or bool(torch.allclose(raw, tensor, rtol=0.0, atol=0.0, equal_nan=True))


def is_without_data(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _used(exported: ExportedProgram) -> set[str]:
    """Names of the tensors that an output of the caller is computed from."""
    by_node = {
        spec.arg.name: spec.target
        for spec in exported.graph_signature.input_specs
        if spec.kind in PARAMETERS and hasattr(spec.arg, "name")
    }
    wanted = {
        spec.arg.name
        for spec in exported.graph_signature.output_specs
        if spec.kind == OutputKind.USER_OUTPUT and hasattr(spec.arg, "name")
    }
    used: set[torch.fx.Node] = set()
    pending = [node for node in exported.graph.nodes if node.name in wanted]
    while pending:
        node = pending.pop()
        if node not in used:
            used.add(node)
            pending += _operands(node)
    return {target for node in used if (target := by_node.get(node.name)) is not None}


def _operands(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes that a node's result depends on: an instance norm over its input only updates its statistics."""
    given = _named_arguments(node)
    if not given.get("use_input_stats"):
        return node.all_input_nodes
    return [each for name, each in given.items() if isinstance(each, torch.fx.Node) and "running" not in name]


def _live(model: ir.Model) -> set[str]:
    """Names of the initializers that an output of the graph is computed from."""
    pending, seen = list(model.graph.outputs), set(model.graph.outputs)
    while pending:
        node = pending.pop().producer()
        for value in () if node is None else _read(node):
            if value not in seen:
                seen.add(value)
                pending.append(value)
    return {value.name or "" for value in seen if value.is_initializer()}


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, itself and within its subgraphs."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().outputs
            for inner in attribute.as_graph():
                yield from _read(inner)
