"""What the inputs of a model are: their kind, bounds and dynamic axes, and one example of each.

Only batch and sequence are dynamic (batch alone for images): a model with every axis dynamic takes fifty times as long
to export. Example sizes are primes that no hidden size equals, so that two axes never share a symbol by accident.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rewrite.errors import InputsError, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH, SEQUENCE, DECODER_SEQUENCE = 2, 7, 5
DEFAULT_IMAGE_SIZE = 224
DEFAULT_AUDIO_SAMPLES = 16_000


@dataclass(frozen=True)
class Described:
    """Kind of an input (`rewrite.ir.program.KINDS`) and, for integers, its half-open range."""

    kind: str = "number"
    low: int | None = None
    high: int | None = None


@dataclass
class Signature:
    """Example inputs by name, with what is known of each.

    `axes` holds the name of each dynamic axis, `maxima` the largest size of a named one.
    """

    examples: dict[str, torch.Tensor]
    inputs: dict[str, Described] = field(default_factory=dict)
    axes: dict[str, dict[int, str]] = field(default_factory=dict)
    maxima: dict[str, int] = field(default_factory=dict)

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Per input, the axes torch.export may keep symbolic: `Dim.AUTO` never fails where a model fixes one."""
        return {
            name: dict.fromkeys(self.axes.get(name, {}), torch.export.Dim.AUTO) for name, _ in self.examples.items()
        }

    def cast(self, dtype: torch.dtype) -> None:
        """Give floating-point examples another dtype."""
        for name, example in self.examples.items():
            if example.is_floating_point():
                self.examples[name] = example.to(dtype)

    def add(self, name: str, example: torch.Tensor, axes: dict[int, str], described: Described) -> None:
        """Add an input."""
        self.examples[name], self.axes[name], self.inputs[name] = example, axes, described


TEXT_AXES = {0: "batch", 1: "sequence"}
KIND_BY_NAME = {
    "input_ids": "token_ids",
    "decoder_input_ids": "token_ids",
    "attention_mask": "attention_mask",
    "decoder_attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "token_type_ids": "token_type_ids",
    "pixel_values": "image",
}


def pretrained_signature(
    model: PreTrainedModel, given: dict[str, torch.Tensor] | None = None, folder: Path | None = None
) -> Signature:
    """The default signature of a transformers model, or that of the inputs `given` for it."""
    if given is not None:
        return _given_signature(model, given)
    signature = Signature({})
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    if main == "input_ids":
        _add_text(signature, model, accepted)
        if "pixel_values" in accepted and getattr(model.config, "vision_config", None) is not None:
            _add_image(signature, model, folder)
    elif main == "pixel_values":
        _add_image(signature, model, folder)
    elif main == "input_values":
        example = torch.rand(BATCH, DEFAULT_AUDIO_SAMPLES) - 0.5
        signature.add("input_values", example, {0: "batch"}, Described())
    elif main == "input_features":
        _add_features(signature, model)
    else:
        raise SourceError(
            f"no default inputs for {type(model).__name__} (its main input is {main})",
            remedy="capture it from Python with example_inputs, a dict of its forward arguments",
        )
    if model.config.is_encoder_decoder:
        _add_decoder(signature, model)
    return signature


def _add_text(signature: Signature, model: PreTrainedModel, accepted: Any) -> None:
    vocabulary = _vocabulary(model)
    ids = torch.arange(BATCH * SEQUENCE).reshape(BATCH, SEQUENCE) % vocabulary
    signature.add("input_ids", ids, TEXT_AXES, Described("token_ids", 0, vocabulary))
    if "attention_mask" in accepted:
        mask = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
        signature.add("attention_mask", mask, TEXT_AXES, Described("attention_mask", 0, 2))
    maximum = maximum_sequence(model)
    if maximum is not None:
        signature.maxima["sequence"] = maximum


def _add_decoder(signature: Signature, model: PreTrainedModel) -> None:
    vocabulary = _vocabulary(model)
    ids = torch.arange(BATCH * DECODER_SEQUENCE).reshape(BATCH, DECODER_SEQUENCE) % vocabulary
    axes = {0: "batch", 1: "decoder_sequence"}
    signature.add("decoder_input_ids", ids, axes, Described("token_ids", 0, vocabulary))


def _add_image(signature: Signature, model: PreTrainedModel, folder: Path | None) -> None:
    height, width = image_size(model.config, folder)
    channels = getattr(getattr(model.config, "vision_config", model.config), "num_channels", 3)
    example = torch.rand(BATCH, channels, height, width) - 0.5
    signature.add("pixel_values", example, {0: "batch"}, Described("image"))


def _add_features(signature: Signature, model: PreTrainedModel) -> None:
    bins = getattr(model.config, "num_mel_bins", 80)
    frames = 2 * getattr(model.config, "max_source_positions", 1500)
    signature.add("input_features", torch.rand(BATCH, bins, frames) - 0.5, {0: "batch"}, Described())


def _vocabulary(model: PreTrainedModel) -> int:
    """Rows of the embedding: the ids it can look up, which is not always `vocab_size`."""
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # a model of two towers has no one embedding
        rows = None
    return rows if rows is not None else model.config.get_text_config().vocab_size


def maximum_sequence(model: PreTrainedModel) -> int | None:
    """The longest sequence the model has positions for, or None where positions have no table and no bound.

    RoBERTa counts positions from its padding index, so its table of 514 rows holds 512; OPT's `max_position_embeddings`
    leaves its two extra rows out already.
    """
    config = model.config.get_text_config()
    maximum = getattr(config, "max_position_embeddings", None)
    if maximum is None or maximum <= 0:
        return None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None and hasattr(module, "num_embeddings"):
            return module.num_embeddings - padding - 1
    return maximum


def image_size(config: Any, folder: Path | None) -> tuple[int, int]:
    """Height and width: of the configuration, else of the preprocessor beside it, else 224 × 224."""
    vision = getattr(config, "vision_config", config)
    sizes = [getattr(vision, "image_size", None)]
    preprocessor = folder / "preprocessor_config.json" if folder else None
    if preprocessor is not None and preprocessor.is_file():
        written = json.loads(preprocessor.read_text(encoding="utf-8"))
        sizes += [written.get("crop_size"), written.get("size")]
    for size in sizes:
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return int(size[0]), int(size[1])
        if isinstance(size, dict) and "height" in size:
            return int(size["height"]), int(size["width"])
        if isinstance(size, dict) and "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    return DEFAULT_IMAGE_SIZE, DEFAULT_IMAGE_SIZE


def _given_signature(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> Signature:
    accepted = inspect.signature(model.forward).parameters
    unknown = sorted(set(given) - set(accepted))
    if unknown:
        raise InputsError(
            f"{type(model).__name__} takes no input {unknown[0]}", remedy=f"it takes {', '.join(list(accepted)[:8])}, …"
        )
    signature = module_signature(given)
    for name, described in signature.inputs.items():
        if described.kind == "token_ids":
            signature.inputs[name] = Described("token_ids", 0, _vocabulary(model))
        elif described.kind == "token_type_ids":
            types = getattr(model.config.get_text_config(), "type_vocab_size", 2)  # without a table: prefix and suffix
            signature.inputs[name] = Described("token_type_ids", 0, types)
    maximum = maximum_sequence(model)
    if maximum is not None and any("sequence" in axes.values() for axes in signature.axes.values()):
        signature.maxima["sequence"] = maximum
    return signature


def module_signature(given: dict[str, torch.Tensor]) -> Signature:
    """The signature of inputs given for any module: the first axis is the batch where all agree on it.

    torch.export fixes an axis of size 1, so examples with a batch of one are doubled first.
    """
    tensors = {name: tensor for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
    batches = {tensor.shape[0] for tensor in tensors.values() if tensor.ndim}
    batched = len(batches) == 1
    double = batched and batches == {1}
    sequences = {t.shape[1] for n, t in tensors.items() if n in KIND_BY_NAME and n != "pixel_values" and t.ndim == 2}
    signature = Signature({})
    for name, tensor in tensors.items():
        axes: dict[int, str] = {}
        if batched and tensor.ndim:
            axes[0] = "batch"
        if name in KIND_BY_NAME and name != "pixel_values" and tensor.ndim == 2 and tensor.shape[1] > 1:
            decoder = name.startswith("decoder_") and len(sequences) > 1
            axes[1] = "decoder_sequence" if decoder else "sequence"
        example = torch.cat([tensor, tensor]) if double and tensor.ndim else tensor
        signature.add(name, example, axes, _described(name, tensor))
    return signature


def _described(name: str, tensor: torch.Tensor) -> Described:
    kind = KIND_BY_NAME.get(name, "number")
    if kind == "attention_mask":
        return Described(kind, 0, 2)
    if kind in ("number", "image") and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        return Described(kind)
    if kind == "number" and tensor.numel():
        # Nothing bounds an integer of unknown meaning; its own range is what the caller showed to be safe.
        return Described(kind, int(tensor.min()), int(tensor.max()) + 1)
    return Described(kind, 0)
