"""Measure the held-out quality of a folder: bits per byte of a language model, accuracy of a classifier, squared error
of an autoencoder.

`python -m rewrite.models.evaluate models/checkpoints/bytegpt` prints the number of that folder's card, and of an OUT
folder of `rewrite convert` the number of the converted network, computed by ONNX Runtime.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from rewrite.models import byte_data, digits_data

Predict = Callable[[np.ndarray], np.ndarray]
"""A network: its inputs to its logits, or to what else it gives."""


def logits_of(output: Any) -> torch.Tensor:
    """The logits of a network that returns an object with them, or them alone."""
    return getattr(output, "logits", output)


def predictor(model: torch.nn.Module) -> Predict:
    """A module, in the mode it is in, on arrays."""

    @torch.inference_mode()
    def predict(inputs: np.ndarray) -> np.ndarray:
        return logits_of(model(torch.from_numpy(inputs))).numpy()

    return predict


def bits_per_byte(predict: Predict, data: np.ndarray, context: int, count: int | None = None, batch: int = 16) -> float:
    """The mean of −log2 p(byte | the bytes before it in its window), windows side by side.

    data: (n,) uint8.  count: how many of its windows, evenly spaced; all of them if None.
    The first prediction of a window sees one byte, the last sees `context` bytes.
    """
    starts = np.arange(0, len(data) - context, context)
    if count is not None:
        starts = starts[np.linspace(0, len(starts) - 1, count).astype(int)]
    nats = 0.0
    for first in range(0, len(starts), batch):
        inputs, targets = byte_data.windows(data, starts[first : first + batch], context)
        logits = torch.from_numpy(predict(inputs)).double()
        nats += functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(targets).flatten(), reduction="sum"
        ).item()
    return nats / (len(starts) * context * math.log(2))


def accuracy(predict: Predict, inputs: np.ndarray, labels: np.ndarray) -> float:
    """The fraction, in 0…1, whose largest logit is at their label.

    inputs: (n, ...) float32.  labels: (n,) int64.
    """
    return float((predict(inputs).argmax(-1) == labels).mean())


def squared_error(predict: Predict, inputs: np.ndarray) -> float:
    """The mean of (output − input)², of a network that is to give back its input: (n, ...) float32 in 0…1."""
    return float(np.square(predict(inputs).astype(np.float64) - inputs).mean())


def held_out_quality(folder: Path, count: int | None = None) -> tuple[str, float]:
    """Load a network without a connection and measure it on held-out data.

    folder: as written by a training script, or an OUT folder of `rewrite convert`.  count: limits a language model to
    so many windows (see `bits_per_byte`).
    Returns the name of the measure, "bits per byte", "accuracy" or "squared error", and its value.
    """
    folder = Path(folder)
    if (folder / "model.onnx").is_file():
        return _measured(*_onnx_network(folder / "model.onnx"), count)
    if (folder / "config.json").is_file():
        return _measured(*_pretrained(folder), count)
    from rewrite.models.reference import load

    network, model = load(folder)
    return _measured(network.input, predictor(model), count)


def _measured(name: str, predict: Predict, count: int | None) -> tuple[str, float]:
    """The quality of a network whose input has this name, which says what it was trained on."""
    if name == "input_ids":
        return "bits per byte", bits_per_byte(predict, byte_data.corpus("held-out"), byte_data.CONTEXT, count)
    images, labels = digits_data.digits("held-out")
    inputs = digits_data.INPUTS[name](images)
    if predict(inputs[:2]).shape == inputs[:2].shape:
        return "squared error", squared_error(predict, inputs)
    return "accuracy", accuracy(predict, inputs, labels)


def _pretrained(folder: Path) -> tuple[str, Predict]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

    (architecture,) = AutoConfig.from_pretrained(folder, local_files_only=True).architectures
    language = architecture.endswith("ForCausalLM") or architecture.endswith("LMHeadModel")
    kind = AutoModelForCausalLM if language else AutoModelForImageClassification
    model = kind.from_pretrained(folder, local_files_only=True).eval()
    return model.main_input_name, predictor(model)


def _onnx_network(path: Path) -> tuple[str, Predict]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    known = ("input_ids", *digits_data.INPUTS)
    main = next((name for name in names if name in known), None)
    if main is None:
        raise ValueError(f"{path}: takes {', '.join(names)}, and none of {', '.join(known)} to measure it on")

    def predict(inputs: np.ndarray) -> np.ndarray:
        # Beside the main input there is at most a mask, and nothing is masked.
        return session.run(None, {name: inputs if name == main else np.ones_like(inputs) for name in names})[0]

    return main, predict


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", type=Path, nargs="+", help="folder of a checkpoint, or OUT of `rewrite convert`")
    for folder in parser.parse_args().folder:
        measure, value = held_out_quality(folder)
        print(f"{folder.name}: held-out {measure} {value:.4f}")
