"""Measure the held-out quality of a checkpoint folder: bits per byte of a language model, accuracy of a classifier.

`python -m rewrite.models.evaluate models/checkpoints/bytegpt` prints the number of that folder's card.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from rewrite.models import byte_data, digits_data


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, data: np.ndarray, count: int | None = None, batch: int = 16) -> float:
    """The mean of −log2 p(byte | the bytes before it in its window), windows side by side.

    data: (n,) uint8.  count: how many of its windows, evenly spaced; all of them if None.
    The first prediction of a window sees one byte, the last sees `max_position_embeddings` bytes.
    """
    context = model.config.max_position_embeddings
    starts = np.arange(0, len(data) - context, context)
    if count is not None:
        starts = starts[np.linspace(0, len(starts) - 1, count).astype(int)]
    nats = 0.0
    for first in range(0, len(starts), batch):
        inputs, targets = map(torch.from_numpy, byte_data.windows(data, starts[first : first + batch], context))
        logits = model(inputs).logits.double()
        nats += functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return nats / (len(starts) * context * math.log(2))


@torch.inference_mode()
def accuracy(model: PreTrainedModel, images: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of images, in 0…1, whose largest logit is at their label.

    images: (n, channels, height, width) float32.  labels: (n,) int64.
    """
    predicted = model(torch.from_numpy(images)).logits.argmax(-1)
    return (predicted == torch.from_numpy(labels)).double().mean().item()


def held_out_quality(folder: Path, count: int | None = None) -> tuple[str, float]:
    """Load a checkpoint without a network and measure it on held-out data.

    folder: as written by a training script.  count: limits a language model to so many windows (see `bits_per_byte`).
    Returns the name of the measure, "bits per byte" or "accuracy", and its value.
    """
    (architecture,) = AutoConfig.from_pretrained(folder, local_files_only=True).architectures
    if architecture.endswith("ForCausalLM") or architecture.endswith("LMHeadModel"):
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        return "bits per byte", bits_per_byte(model, byte_data.corpus("held-out"), count)
    model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True).eval()
    return "accuracy", accuracy(model, *digits_data.digits("held-out"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="+", help="folder with config.json and model.safetensors")
    for folder in parser.parse_args().folder:
        measure, value = held_out_quality(folder)
        print(f"{folder.name}: held-out {measure} {value:.4f}")
