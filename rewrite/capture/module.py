"""Capture of modules in memory, exported programs, `.pt2` archives and Python factories.

A module's initializers share its memory. Nothing is loaded that would run code: an archive is scanned first.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import onnx_ir as ir
import torch
from torch.utils import _pytree

from rewrite.capture.archive import refuse_code
from rewrite.capture.bind import aliases
from rewrite.capture.finish import (
    all_values,
    describe_inputs,
    drop_exporter_metadata,
    give_tensors,
    name_dimensions,
    quiet,
)
from rewrite.capture.fold_shapes import fold_shapes
from rewrite.capture.huggingface import OPSET, export_error, export_pretrained, in_memory, inlined
from rewrite.capture.parameters import verified_export
from rewrite.capture.signature import Signature, module_signature, pretrained_signature
from rewrite.errors import InputsError, RewriteError, SourceError, UnsupportedOperatorError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]


def capture_module(
    source: Any, example_inputs: Any = None, *, dtype: str | None = None, progress: Progress | None = None
) -> ir.Model:
    """Capture an `nn.Module` or ExportedProgram; see `rewrite.capture`.

    The module is captured as it infers: in evaluation mode, which is restored to what it was.
    """
    report = progress or (lambda name, done, total: None)
    if isinstance(source, torch.export.ExportedProgram):
        if dtype is not None:
            raise SourceError("the dtype of an exported program is part of it", remedy="export it in that dtype")
        with quiet():
            report("export", 0, 2)
            return capture_exported(source)
    if not isinstance(source, torch.nn.Module):
        raise SourceError(
            f"a {type(source).__name__} is no source",
            remedy="give an nn.Module, an ExportedProgram, an ONNX model, or the path of a checkpoint or file",
        )
    if dtype is not None and any(p.dtype != getattr(torch, dtype) for p in source.parameters()):
        # The caller's module is not changed: half the weights of a deep copy are the price of another dtype.
        source = copy.deepcopy(source).to(getattr(torch, dtype))
    with quiet(), evaluating(source):
        report("export", 0, 2)
        if _is_pretrained(source):
            given = None if example_inputs is None else _by_name(source, example_inputs)
            signature = pretrained_signature(source, given)
            with _uncached(source):
                captured = export_pretrained(source, signature, type(source).__name__)
        else:
            if example_inputs is None:
                raise InputsError(
                    f"{type(source).__name__} needs example inputs to be traced",
                    remedy="rewrite.capture(module, {'x': torch.zeros(2, 3)}), or a tuple",
                )
            signature = module_signature(_by_name(source, example_inputs))
            if dtype is not None:
                signature.cast(getattr(torch, dtype))
            captured = _export_plain(source, signature)
        report("fold", 1, 2)
        return _finished(captured, source, signature)


def _is_pretrained(module: torch.nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether transformers made it; if it is not imported, it did not."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """The module and its parts in evaluation mode inside, each as it was after."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


@contextlib.contextmanager
def _uncached(model: Any) -> Iterator[None]:
    """Without keys and values among the outputs."""
    configs = {id(part): part for part in (model.config, model.config.get_text_config())}.values()
    before = [(part, getattr(part, "use_cache", None)) for part in configs]
    for part in configs:
        part.use_cache = False
    try:
        yield
    finally:
        for part, value in before:
            part.use_cache = value


def _by_name(module: torch.nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Example inputs by the names of the forward arguments."""
    if isinstance(example_inputs, dict):
        return example_inputs
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    names = list(inspect.signature(module.forward).parameters)
    if len(example_inputs) > len(names):
        raise InputsError(
            f"{len(example_inputs)} example inputs for {type(module).__name__}, whose forward takes {len(names)}",
            remedy="give one tensor for each argument",
        )
    return dict(zip(names, example_inputs))


def _export_plain(module: torch.nn.Module, signature: Signature) -> ir.Model:
    name = type(module).__name__
    try:
        with torch.no_grad():
            exported = torch.export.export(
                module,
                args=(),
                kwargs=dict(signature.examples),
                dynamic_shapes=signature.dynamic_shapes(),
                strict=False,
            )
            return to_onnx(exported)
    except (InputsError, SourceError):
        raise
    except Exception as error:  # torch.export raises anything, and all of it means "not exportable"
        raise _parametrized(module, export_error(error, name, "")) from error


def _parametrized(module: torch.nn.Module, error: RewriteError) -> RewriteError:
    """An operator that the exporter lacks may be a parametrization's (orthogonal), which need not be in the graph."""
    found = [name for name, part in module.named_modules() if torch.nn.utils.parametrize.is_parametrized(part)]
    if not isinstance(error, UnsupportedOperatorError) or not found:
        return error
    weight = next(iter(module.get_submodule(found[0]).parametrizations))  # type: ignore[arg-type]
    remedy = f'remove_parametrizations(module.get_submodule("{found[0]}"), "{weight}") of torch.nn.utils.parametrize'
    return UnsupportedOperatorError(error.what, where=error.where, remedy=f"{remedy} leaves the weight itself")


def to_onnx(exported: torch.export.ExportedProgram) -> ir.Model:
    """The ONNX graph of an exported program, as it was traced."""
    with verified_export():
        program = torch.onnx.export(exported, args=(), optimize=False, opset_version=OPSET, dynamo=True, verbose=False)
    if program is None:
        raise SourceError("the ONNX exporter returned nothing", remedy="export with torch.onnx.export to see why")
    model = inlined(program.model)
    name_outputs(model, exported)
    return model


def name_outputs(model: ir.Model, exported: torch.export.ExportedProgram) -> None:
    """Name the outputs by the keys of a dict or output class, else `output` or `output_0`, `output_1`, …"""
    outputs = model.graph.outputs
    spec = exported.call_spec.out_spec
    paths = [path for path, _ in _pytree.tree_leaves_with_path(_places(spec))] if spec else []
    names = [str(getattr(path[-1], "key", "")) if path else "" for path in paths]
    if len(names) != len(outputs) or not all(name.isidentifier() for name in names) or len(set(names)) < len(names):
        names = ["output"] if len(outputs) == 1 else [f"output_{index}" for index in range(len(outputs))]
    taken = {value.name for value in all_values(model)}
    for value, name in zip(outputs, names):
        if not value.is_graph_input() and name not in taken:
            value.name = name


def _places(spec: Any) -> Any:
    return _pytree.tree_unflatten(list(range(spec.num_leaves)), spec)


def capture_exported(exported: torch.export.ExportedProgram) -> ir.Model:
    """Capture an ExportedProgram with the dynamic axes it was exported with; the first of an input is its batch."""
    examples = exported.example_inputs
    try:
        captured = to_onnx(exported)
    except (InputsError, SourceError):
        raise
    except Exception as error:  # as above
        raise export_error(error, "the exported program", "") from error
    tensors: dict[str, torch.Tensor] = {}
    if examples is not None:
        leaves = [leaf for leaf in _pytree.tree_leaves(examples) if isinstance(leaf, torch.Tensor)]
        tensors = dict(zip((value.name or "" for value in captured.graph.inputs), leaves))
    return _finished(captured, None, module_signature(tensors))


def capture_archive(path: Path, progress: Progress | None = None) -> ir.Model:
    """Capture a `.pt2` file, which is scanned for code before torch opens it.

    Raises:
        UnsafeSourceError: a pickle in the archive names anything but tensors and plain containers.
        SourceError: torch cannot read it.
    """
    refuse_code(path)
    with quiet(), _weights_only():
        try:
            exported = torch.export.load(path)
        except Exception as error:  # a file is arbitrary input
            raise SourceError(
                f"torch.export.load cannot read it: {str(error).splitlines()[0][:200] if str(error) else error!r}",
                where=str(path),
                remedy="save it again with torch.export.save of the installed torch",
            ) from error
    # Guards are Python text; the graph does not need them.
    exported._guards_code = []
    return capture_module(exported, progress=progress)


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """torch.load refuses every global that is not a tensor's; without this, sample inputs are unpickled."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def module_from_factory(name: str) -> tuple[torch.nn.Module, Any]:
    """Call `package.module:function` and return its module and, if it gives any, example inputs."""
    place, _, function = name.partition(":")
    # A command finds modules of the current folder as `python -m` does.
    added = os.getcwd() not in sys.path
    if added:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(place), function)
    except ImportError as error:
        raise SourceError(
            str(error), where=name, remedy="give package.module:function, importable from here"
        ) from error
    except AttributeError as error:
        raise SourceError(f"{place} has no {function}", where=name, remedy="check the name") from error
    finally:
        if added:
            sys.path.remove(os.getcwd())
    result = made()
    module, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(module, torch.nn.Module):
        raise SourceError(
            f"the factory returned a {type(module).__name__}",
            where=name,
            remedy="return an nn.Module, or (module, example inputs)",
        )
    return module, inputs


def _finished(captured: ir.Model, module: torch.nn.Module | None, signature: Signature) -> ir.Model:
    """Tensors over the module's memory, shared ones once; axes named; shapes folded."""
    names = aliases(module) if module is not None else {}
    first: dict[str, ir.Value] = {}
    tensors: dict[str, ir.TensorProtocol] = {}
    for name, value in list(captured.graph.initializers.items()):
        kept = first.setdefault(min(names.get(name, [name])), value)
        if kept is value:
            tensors[name] = in_memory(name, value.const_value)
        else:
            value.replace_all_uses_with(kept)
            del captured.graph.initializers[name]
    give_tensors(captured, tensors)
    name_dimensions(captured, signature)
    fold_shapes(captured)
    describe_inputs(captured, signature)
    drop_exporter_metadata(captured)
    return captured
