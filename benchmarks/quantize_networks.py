"""The networks that `quantize.py` measures: shipped checkpoints, variants of them with outliers, and their data.

A variant computes the same function from weights that are hard to quantize: some channels of every norm (γ, β) are
scaled up and the rows that read them down, by our own equivalences (`smooth` backwards, and `equalize` for convolutions
around a ReLU). The factors are powers of two, so that nothing is rounded: the variant's outputs are bit by bit those of
the original, which is checked.

The name of a variant is that of its checkpoint and `OUTLIERS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rewrite.ir.program import Program
from rewrite.models import byte_data, digits_data
from rewrite.models.reference import CHECKPOINTS
from rewrite.passes.equalize import Between, Equalize, spread
from rewrite.passes.smooth import REQUIREMENTS, NormOutput, move, norm_outputs
from rewrite.proof.transforms import Scaling
from rewrite.rule import Applied, Change, Pass, Requirement, apply_pass

OUTLIERS = "+outliers"
GPT2 = "gpt2-small"
"""A network in the shape of GPT-2 small with random weights, which only latency is measured of."""
LOW, HIGH = 32, 512
"""Between which powers of two a channel is scaled up."""


def divisor(name: str, size: int, channels: int, low: int, high: int) -> np.ndarray:
    """1 but for `channels` entries, which are 1/high … 1/low, spread evenly over the powers of two: (size,) float64.

    The entries are drawn by `name`, so that every norm has others, the same ones each time.
    """
    random = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    exponents = np.rint(np.linspace(np.log2(low), np.log2(high), channels))
    values = np.ones(size)
    values[random.choice(size, channels, replace=False)] = np.exp2(-exponents)
    return values


@dataclass(frozen=True)
class NormOutliers(Pass[NormOutput]):
    """`channels` channels of every norm's result become `low` to `high` times as large."""

    channels: int = 4
    low: int = LOW
    high: int = HIGH
    max_bias_growth: float = 0.0

    name: ClassVar[str] = "norm-outliers"
    requires: ClassVar[tuple[Requirement, ...]] = REQUIREMENTS

    def sites(self, program: Program) -> Iterator[NormOutput]:
        yield from norm_outputs(program, self.name, lambda shift: False)

    def rewrite(self, site: NormOutput, change: Change) -> None:
        values = divisor(site.name, site.region.size, self.channels, self.low, self.high)
        move(site, change, Scaling(values), None)


@dataclass(frozen=True)
class ReluOutliers(Equalize):
    """`channels` channels between two layers become `low` to `high` times as large."""

    channels: int = 4
    low: int = LOW
    high: int = HIGH

    name: ClassVar[str] = "relu-outliers"

    def rewrite(self, site: Between, change: Change) -> None:
        spread(site, change, divisor(site.name, site.region.size, self.channels, self.low, self.high))


def is_language(name: str) -> bool:
    """Whether a network predicts bytes; the others classify digits."""
    return name.startswith("byte")


def checkpoint(name: str, folder: Path) -> Path:
    """The checkpoint of a network; that of a variant, or of GPT-2, is written under `folder` first."""
    if name == GPT2:
        return _gpt2(folder / "checkpoint")
    shipped = CHECKPOINTS / name.removesuffix(OUTLIERS)
    if name == shipped.name:
        return shipped
    made = folder / "checkpoint"
    if not made.exists():
        _hardened(shipped, made)
    return made


def module(source: Path) -> tuple[Any, dict[str, Any]]:
    """The torch module of a checkpoint, in eval mode, and an example of its inputs."""
    import torch

    if not (source / "config.json").is_file():
        from rewrite.models.reference import load

        network, model = load(source)
        return model, network.example()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

    language = "n_ctx" in (config := AutoConfig.from_pretrained(source)).to_dict() or hasattr(config, "vocab_size")
    kind = AutoModelForCausalLM if language else AutoModelForImageClassification
    model = kind.from_pretrained(source, local_files_only=True).eval()
    model.config.use_cache = False
    if not language:
        return model, {"pixel_values": torch.linspace(0, 1, 128).reshape(2, 1, 8, 8)}
    tokens = torch.arange(32).reshape(2, 16)
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def program(source: Path) -> Program:
    """The capture of a checkpoint."""
    from rewrite import capture

    if (source / "config.json").is_file() or (source / "model.pt2").is_file():
        return capture(source)
    return capture(*module(source))


def _hardened(shipped: Path, made: Path) -> None:
    """Write the variant of a checkpoint, and check that it computes the same.

    Raises ValueError where it does not.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from rewrite import capture

    (before, inputs), (after, _) = module(shipped), module(shipped)
    weights = dict(after.named_parameters())
    with torch.no_grad():
        for old, new in hardened(capture(shipped)):
            place, flipped = _place(old, weights)
            weights[place].copy_(torch.from_numpy(new.T if flipped else new))
    if not _same(before, after, inputs):
        raise ValueError(f"{shipped.name}: the variant's outputs are not the original's")
    if (shipped / "config.json").is_file():
        after.save_pretrained(made)
        return
    with safe_open(shipped / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    made.mkdir(parents=True)
    save_file(after.state_dict(), made / "model.safetensors", metadata)


def hardened(program: Program) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Put outliers into a program, in canonical form then; yields every constant before and after, in float64."""
    from rewrite.capture.canonicalize import canonicalize
    from rewrite.ir.constants import weight_behind

    canonicalize(program)
    before = {name: weight_behind(value).numpy() for name, value in program.model.graph.initializers.items()}
    names: dict[str, str] = {}
    for each in (NormOutliers(), ReluOutliers()):
        for outcome in apply_pass(program, each):
            if isinstance(outcome, Applied):
                names |= {new: names.pop(old, old) for new, old in outcome.changed.items()}
    for new, old in names.items():
        yield before[old], weight_behind(program.model.graph.initializers[new]).numpy()


def _place(held: np.ndarray, weights: dict[str, Any]) -> tuple[str, bool]:
    """Which parameter of a module a constant of its graph is, and whether it lies transposed there."""
    for name, tensor in weights.items():
        stored = tensor.detach().numpy()
        if stored.shape == held.shape and np.array_equal(stored, held):
            return name, False
        if stored.shape == held.shape[::-1] and np.array_equal(stored, held.T):
            return name, True
    raise ValueError("a constant of the graph is no parameter of the module")


def _same(first: Any, second: Any, inputs: dict[str, Any]) -> bool:
    """Whether two modules give the same bits."""
    import torch

    with torch.inference_mode():
        answers = [module(**inputs) for module in (first, second)]
    return torch.equal(*(getattr(answer, "logits", answer) for answer in answers))


# --------------------------------------------------------------------------------------------------------------- data


def calibration(name: str, count: int) -> list[dict[str, np.ndarray]]:
    """`count` sets of inputs made of training data: windows of 256 bytes, or eight images each.

    Of GPT-2, which was trained on nothing: random tokens.
    """
    if name == GPT2:
        return [_tokens(128, seed) for seed in range(1, count + 1)]
    if is_language(name):
        data = byte_data.corpus("train")
        starts = np.linspace(0, len(data) - byte_data.CONTEXT - 1, count).astype(int)
        tokens = byte_data.windows(data, starts, byte_data.CONTEXT)[0]
        return [{"input_ids": each[None], "attention_mask": np.ones_like(each[None])} for each in tokens]
    images, _ = digits_data.digits("train")
    chosen = np.linspace(0, len(images) - 1, 8 * count).astype(int).reshape(count, 8)
    return [{"pixel_values": images[each]} for each in chosen]


def held_out(name: str, count: int) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Inputs and labels that are trained on by no one: `count` windows side by side by eights, or all images."""
    if is_language(name):
        data = byte_data.corpus("held-out")
        starts = np.arange(0, len(data) - byte_data.CONTEXT, byte_data.CONTEXT)
        starts = starts[np.linspace(0, len(starts) - 1, count).astype(int)]
        cut = [byte_data.windows(data, starts[i : i + 8], byte_data.CONTEXT) for i in range(0, count, 8)]
        return [({"input_ids": ids, "attention_mask": np.ones_like(ids)}, labels) for ids, labels in cut]
    images, labels = digits_data.digits("held-out")
    return [({"pixel_values": images[i : i + 40]}, labels[i : i + 40]) for i in range(0, len(images), 40)]


def one_input(name: str, length: int = 128) -> dict[str, np.ndarray]:
    """What latency is measured on: one sequence or one image of the held-out data."""
    if name == GPT2:
        return _tokens(length, 0)
    inputs = held_out(name, 1)[0][0]
    return {key: array[:1, :length] if array.ndim == 2 else array[:1] for key, array in inputs.items()}


def _tokens(length: int, seed: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, 50257, (1, length))
    return {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}


def _gpt2(made: Path) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    if not made.exists():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(use_cache=False)).save_pretrained(made)
    return made
