"""Capture of a Hugging Face checkpoint folder, without reading a weight.

The model is built with its parameters on the meta device and its computed buffers (rotary frequencies) real. Fake
tensors take the place of the parameters, transformers' ONNX exporter traces the graph, and the initializers are bound
to the checkpoint's own bytes. Any class that transformers builds from the configuration is taken; there is no table of
models.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from rewrite.capture.finish import describe_inputs, drop_exporter_metadata, give_tensors, name_dimensions, quiet
from rewrite.capture.fold_shapes import fold_shapes
from rewrite.capture.parameters import verified_export
from rewrite.capture.safetensors_file import StoredTensor, read_checkpoint
from rewrite.capture.signature import Signature, pretrained_signature
from rewrite.errors import CheckpointError, RewriteError, SourceError, UnsafeSourceError, UnsupportedOperatorError

OPSET = 23
"""The exporter raises attention and norms to single operators at exactly this opset."""

Progress = Callable[[str, int, int], None]

TASKS = {
    "features": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "sequence-to-sequence": "AutoModelForSeq2SeqLM",
}


def capture_checkpoint(
    folder: Path,
    example_inputs: dict[str, Any] | None = None,
    *,
    dtype: str | None = None,
    task: str | None = None,
    progress: Progress | None = None,
) -> ir.Model:
    """Capture the model of a checkpoint folder; see `rewrite.capture`.

    Raises:
        SourceError: the configuration names no model that can be built.
        CheckpointError: the weights do not fit it.
        UnsafeSourceError: the model is code in the folder, or weights are outside of it.
        UnsupportedOperatorError: the exporter has no translation for an operator.
    """
    report = progress or (lambda name, done, total: None)
    report("checkpoint", 0, 4)
    stored = read_checkpoint(folder)
    with quiet():
        report("model", 1, 4)
        config, cls = read_config(folder, task, stored)
        model = build_on_meta(cls, config, _dtype(dtype, config, stored), folder)
        signature = pretrained_signature(model, example_inputs, folder)
        return capture_pretrained(model, signature, stored, where=str(folder), report=report)


def read_config(folder: Path, task: str | None, stored: dict[str, StoredTensor]) -> tuple[Any, type]:
    """The configuration and the model class it stands for."""
    import transformers

    path = folder / "config.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError("config.json cannot be read", where=str(path), remedy="it must be JSON") from error
    known = written.get("model_type") in transformers.CONFIG_MAPPING
    if "auto_map" in written and not known:
        raise UnsafeSourceError(
            "the model is Python code in the checkpoint (auto_map), which is not executed",
            where=str(path),
            remedy="build the module yourself and capture it with example_inputs",
        )
    if not known:
        raise SourceError(
            f"unknown model_type {written.get('model_type')!r}",
            where=str(path),
            remedy=f"transformers {transformers.__version__} does not have it; install a version that does, or capture "
            "the module from Python",
        )
    if written.get("quantization_config"):
        method = written["quantization_config"].get("quant_method", "unknown method")
        raise SourceError(
            f"the checkpoint is quantized already ({method})",
            where=str(path),
            remedy="capture the unquantized checkpoint it was made from",
        )
    config = transformers.CONFIG_MAPPING[written["model_type"]].from_dict(written)
    return config, _model_class(config, task, path, stored)


def _model_class(config: Any, task: str | None, path: Path, stored: dict[str, StoredTensor]) -> type:
    import transformers

    if task is not None:
        if task not in TASKS:
            raise SourceError(f"unknown task {task!r}", where=str(path), remedy=f"one of {', '.join(TASKS)}")
        return _automatic(getattr(transformers, TASKS[task]), config, path)
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls
    if config.architectures:
        raise SourceError(
            f"transformers {transformers.__version__} has no class {config.architectures[0]}",
            where=str(path),
            remedy="install a version that has it, or choose with a task",
        )
    headed = any(name.startswith(("lm_head.", "embed_out.", "cls.", "output.")) for name in stored)
    if headed and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return _automatic(transformers.AutoModelForCausalLM, config, path)
    return _automatic(transformers.AutoModel, config, path)


def _automatic(auto: Any, config: Any, path: Path) -> type:
    if type(config) not in auto._model_mapping:
        raise SourceError(
            f"{type(config).__name__} has no {auto.__name__}",
            where=str(path),
            remedy='set "architectures" in config.json to the class of the checkpoint',
        )
    found = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _dtype(wanted: str | None, config: Any, stored: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype asked for, else the checkpoint's: its configuration's, else that of most of its elements."""
    from rewrite.capture.bind import TORCH_DTYPES

    if wanted is not None:
        return getattr(torch, wanted)
    sizes: dict[torch.dtype, int] = {}
    for tensor in stored.values():
        if tensor.dtype.is_floating_point():
            key = TORCH_DTYPES[tensor.dtype]
            sizes[key] = sizes.get(key, 0) + tensor.size
    written = getattr(config, "dtype", None)
    if isinstance(written, str):
        written = getattr(torch, written)
    if written in sizes or not sizes:
        return written or torch.float32
    return max(sizes, key=lambda key: sizes[key])


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Every parameter registered inside goes to the meta device; buffers stay as they are computed.

    `torch.device("meta")` would take the buffers too, and the rotary frequencies are in no checkpoint.
    """

    def to_meta(_module: torch.nn.Module, _name: str, parameter: torch.nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    registered = torch.nn.modules.module.register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        registered.remove()


def build_on_meta(cls: type, config: Any, dtype: torch.dtype, folder: Path) -> Any:
    """The model in evaluation mode, without a weight."""
    for part in (config, config.get_text_config()):
        part.use_cache = False
        part.output_hidden_states = False
    try:
        with parameters_on_meta(), torch.no_grad():
            return cls._from_config(config, dtype=dtype).eval()  # type: ignore[attr-defined]
    except RewriteError:
        raise
    except Exception as error:  # a configuration is arbitrary input to some 400 constructors
        raise SourceError(
            f"{cls.__name__} cannot be built from the configuration: {_first_line(error)}",
            where=str(folder / "config.json"),
            remedy="compare it with a configuration that transformers wrote",
        ) from error


def capture_pretrained(
    model: Any, signature: Signature, stored: dict[str, StoredTensor], *, where: str, report: Progress
) -> ir.Model:
    """Export `model`, whose parameters are on the meta device, with the tensors of `stored` as its weights."""
    from rewrite.capture.bind import aliases, bind, kept_in_float32, tie

    binding = bind(model, stored)
    tie(model, binding)
    model.tie_weights(missing_keys=set(binding.missing), recompute_mapping=False)
    replace_by_fakes(model, kept_in_float32(model, model.dtype))
    names = aliases(model)
    report("export", 2, 4)
    captured = export_pretrained(model, signature, where)
    report("weights", 3, 4)

    tensors: dict[str, ir.TensorProtocol] = {}
    unbound: set[str] = set()
    canonical: dict[str, ir.Value] = {}
    for name, value in list(captured.graph.initializers.items()):
        known = names.get(name)
        if known is None:
            if is_fake(value.const_value):
                raise SourceError(
                    f"{type(model).__name__} computes the constant {name} from its weights while it is traced",
                    where=where,
                    remedy="load the model and capture the module in memory",
                )
            tensors[name] = in_memory(name, value.const_value)
            continue
        chosen = next((alias for alias in known if alias in binding.weights), None)
        first = canonical.setdefault(min(known), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del captured.graph.initializers[name]
        elif chosen is not None:
            # A tied weight goes by the name the checkpoint has it under.
            value.name = chosen
            tensors[chosen] = binding.tensor(chosen, _parameter(model, name).dtype)
        elif is_fake(value.const_value) or (
            name in binding.missing and (value.dtype is None or value.dtype.is_floating_point())
        ):
            value.const_value = None
            unbound.add(name)
        else:
            tensors[name] = in_memory(name, value.const_value)
    give_tensors(captured, tensors)
    name_dimensions(captured, signature)
    fold_shapes(captured)
    # What no output depends on (a pooler, a mask token) may be missing; folding has removed it.
    lost = sorted(unbound & set(captured.graph.initializers))
    if lost:
        raise CheckpointError(
            f"tensor {lost[0]} is missing" + (f" (and {len(lost) - 1} more)" if lost[1:] else ""),
            where=where,
            remedy="the configuration describes another model, or a shard was left out of the index",
        )
    describe_inputs(captured, signature)
    drop_exporter_metadata(captured)
    report("done", 4, 4)
    return captured


def replace_by_fakes(model: torch.nn.Module, in_float32: Any) -> None:
    """Swap every meta parameter for a fake tensor of the CPU, one fake for one parameter however often it is shared."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fakes: dict[int, torch.nn.Parameter] = {}
    originals = list(model.named_parameters(remove_duplicate=False))
    with mode:
        for name, parameter in originals:
            if id(parameter) not in fakes:
                half = parameter.dtype in (torch.float16, torch.bfloat16)
                dtype = torch.float32 if half and in_float32 and in_float32.search(name) else parameter.dtype
                fakes[id(parameter)] = torch.nn.Parameter(
                    torch.empty(parameter.shape, dtype=dtype, device="cpu"), requires_grad=False
                )
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._parameters[leaf] = fakes[id(parameter)]


def export_pretrained(model: Any, signature: Signature, where: str) -> ir.Model:
    """The graph that transformers' exporter makes of `model`, functions inlined, nothing optimized."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    config = OnnxConfig(dynamic_shapes=signature.dynamic_shapes(), opset_version=OPSET, optimize=False)
    # The exporter casts and extends the inputs it is given.
    examples = {name: tensor.clone() for name, tensor in signature.examples.items()}
    flags: dict[str, Any] = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
    try:
        with broadcast_heads(), verified_export(where):
            exported = OnnxExporter().export(model, {**examples, **flags}, config)
    except RewriteError:
        raise
    except Exception as error:  # torch.export raises anything, and all of it means "not exportable"
        raise export_error(error, type(model).__name__, where) from error
    return inlined(exported.program)


@contextlib.contextmanager
def broadcast_heads() -> Iterator[None]:
    """Multi-query attention that relies on broadcasting one key head (Falcon), spelled out: ONNX needs equal heads."""
    original = torch.nn.functional.scaled_dot_product_attention

    def expanded(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        if not options.get("enable_gqa") and query.ndim == 4 and key.shape[1] == 1 != query.shape[1]:
            key = key.expand(-1, query.shape[1], -1, -1)
            value = value.expand(-1, query.shape[1], -1, -1)
        return original(query, key, value, *args, **options)

    torch.nn.functional.scaled_dot_product_attention = expanded
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


def export_error(error: Exception, name: str, where: str) -> RewriteError:
    """The one line that says why torch or its ONNX exporter gave up."""
    chain: list[BaseException] = [error]
    while (following := chain[-1].__cause__ or chain[-1].__context__) is not None and following not in chain:
        chain.append(following)
    texts = "\n".join(map(str, chain))
    unknown = re.search(r"No ONNX function found for (?:<OpOverload\(op='([^']+)'|(\S+))", texts)
    if unknown is not None:
        return UnsupportedOperatorError(
            f"{name} uses {unknown[1] or unknown[2]}, which the ONNX exporter does not know",
            where=where,
            remedy="replace that operator in the module, or register a translation with onnxscript",
        )
    return SourceError(
        f"{name} cannot be exported: {_first_line(chain[-1])}",
        where=where,
        remedy="run torch.export.export on it to see the full trace",
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def inlined(model: ir.Model) -> ir.Model:
    """An exporter's graph without functions, and without what the exporter is known to get wrong."""
    from rewrite.capture.exporter_repairs import repair

    if not model.functions:
        return repair(model)
    from onnx_ir.passes.common import InlinePass

    return repair(InlinePass()(model).model)


def is_fake(tensor: Any) -> bool:
    """Whether a tensor of the exporter has no data."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(getattr(tensor, "raw", None), FakeTensor)


def in_memory(name: str, tensor: Any) -> ir.TensorProtocol:
    """The exporter's tensor as one of onnx_ir over the same memory."""
    from rewrite.capture.finish import tensor_of

    return tensor_of(name, tensor.numpy(), tensor.dtype)


def _parameter(model: Any, name: str) -> torch.Tensor:
    return model.get_parameter_or_buffer(name)
