"""From the names of a model to the bytes of its checkpoint.

transformers renames, stacks and concatenates when it loads (ViT, DeiT, DINOv2, BEiT, Swin, GPT-NeoX, Mixtral, …). The
same mapping is applied here to tensors without data, so that each parameter ends up with a tensor on disk or with an
expression over several.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from rewrite.capture.expression_tensor import ExpressionTensor
from rewrite.errors import CheckpointError
from rewrite.ir.weights import ConvertedTensor, Source, Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rewrite.capture.safetensors_file import StoredTensor

TORCH_DTYPES = {
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
}
ONNX_DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()}


@dataclass
class Binding:
    """Which expression over the checkpoint each parameter or buffer is, by its name in the model.

    `missing` are names of the model that the checkpoint lacks; `unused` are names of the checkpoint that the model
    lacks.
    """

    weights: dict[str, Weight] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)

    def tensor(self, name: str, dtype: torch.dtype) -> ir.TensorProtocol:
        """The tensor of `name`: the stored one where it is stored as it is, else an expression rounded to `dtype`."""
        weight, wanted = self.weights[name], ONNX_DTYPES[dtype]
        if isinstance(weight, Source) and weight.tensor.dtype == wanted:
            return weight.tensor
        return ConvertedTensor(weight, wanted, name)


def bind(model: PreTrainedModel, stored: dict[str, StoredTensor]) -> Binding:
    """Resolve every parameter and persistent buffer of `model` (on the meta device) to the tensors in `stored`.

    Mirrors the naming loop of `transformers.core_model_loading.convert_and_load_state_dict_in_model`.

    Raises:
        CheckpointError: a tensor has another shape than the model's.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}

    binding = Binding()
    conversions: dict[str, WeightConverter] = {}
    for original in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(original, renamings, converters, model.base_model_prefix, state)
        if name not in state and original in state:
            name, pattern = rename_source_key(original, [], [], model.base_model_prefix, state)
        tensor = stored[original]
        if name not in state:
            binding.unused.add(original)
        elif pattern is None:
            binding.weights[name] = Source(tensor)
        else:
            conversion = conversions.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            symbolic = ExpressionTensor(Source(tensor), TORCH_DTYPES[tensor.dtype])
            conversion.add_tensor(name, original, pattern, symbolic)  # type: ignore[arg-type]
    for name, conversion in conversions.items():
        for target, converted in _converted(conversion, name, model).items():
            result = converted[0] if isinstance(converted, list) else converted
            if target in state:
                binding.weights[target] = result.weight

    for name, weight in binding.weights.items():
        if tuple(weight.shape) != tuple(state[name].shape):
            raise CheckpointError(
                f"tensor {name} has shape {list(weight.shape)}, the configuration says {list(state[name].shape)}",
                where=_place(weight),
                remedy="use the config.json that this checkpoint was saved with",
            )
    binding.missing = set(state) - set(binding.weights)
    return binding


def _converted(
    conversion: WeightConverter, name: str, model: PreTrainedModel
) -> dict[str, ExpressionTensor | list[ExpressionTensor]]:
    try:
        return conversion.convert(name, model=model, config=model.config)  # type: ignore[return-value]
    except (NotImplementedError, RuntimeError, ValueError, StopIteration) as error:
        raise CheckpointError(
            f"the conversion of {name} failed: {error}".splitlines()[0],
            remedy="load the model and save it again with the installed transformers",
        ) from error


def _place(weight: Weight) -> str:
    return str(getattr(getattr(weight, "tensor", None), "path", ""))


def tie(model: PreTrainedModel, binding: Binding) -> None:
    """Give tied names one expression, as loading would: a tie is kept only where the checkpoint does not contradict it.

    A checkpoint may hold both names of a tied pair. Equal bytes are one weight; different bytes mean that the
    configuration is wrong and the weights are two.
    """
    for target, source in list(model.all_tied_weights_keys.items()):
        both = target in binding.weights and source in binding.weights
        if both and not _same_bytes(binding.weights[target], binding.weights[source]):
            model.all_tied_weights_keys.pop(target)
            _separate(model, target)


def _separate(model: PreTrainedModel, name: str) -> None:
    parent, _, leaf = name.rpartition(".")
    parameter = model.get_parameter(name)
    fresh = torch.nn.Parameter(torch.empty_like(parameter), requires_grad=False)
    setattr(model.get_submodule(parent), leaf, fresh)


def _same_bytes(first: Weight, second: Weight) -> bool:
    from rewrite.ir.weights import row_blocks

    if first.shape != second.shape:
        return False
    return all(bool((first.read(r) == second.read(r)).all()) for r in row_blocks(first.shape))


def aliases(model: torch.nn.Module) -> dict[str, list[str]]:
    """For every name of a parameter or buffer, all names of the same tensor (itself first)."""
    names: dict[int, list[str]] = {}
    own: dict[str, int] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            names.setdefault(id(tensor), []).append(name)
            own[name] = id(tensor)
    return {name: [name, *(other for other in names[key] if other != name)] for name, key in own.items()}


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """The names that loading keeps in float32 under a half precision (routers, some norms), by transformers' plan."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return None
    return re.compile("|".join(pattern.replace("*", ".*") for pattern in plan))
