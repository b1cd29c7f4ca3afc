"""The training loop that the reference networks share: AdamW, cosine schedule with warm-up, gradient clipping."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from rewrite.models import digits_data
from rewrite.models.evaluate import accuracy, logits_of, predictor


def arguments(description: str | None, steps: int) -> argparse.Namespace:
    """Parse the command line of a training script (--out, --seed, --steps) and seed torch.

    description: the script's docstring.  steps: the default of --steps.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the network to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the data")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    chosen = parser.parse_args()
    torch.manual_seed(chosen.seed)
    torch.set_num_threads(1)  # the order of float32 sums, hence the weights, depends on the number of threads
    return chosen


def rate(step: int, steps: int, warmup_steps: int) -> float:
    """The factor on the learning rate, in 0…1: linear warm-up, then half a cosine down to a tenth.

    >>> [round(rate(step, 100, 10), 3) for step in (0, 9, 10, 55, 100)]
    [0.1, 1.0, 1.0, 0.55, 0.1]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.55 + 0.45 * math.cos(math.pi * progress)


def train(
    model: nn.Module,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    evaluate: Callable[[], float],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.1,
    label_smoothing: float = 0.0,
    report_every: int = 250,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Minimize a loss, the cross-entropy by default, of a model in place; leave it in eval mode.

    model: returns logits, or an object with `logits`.
    batches: inputs as the model takes them, and targets (...) int64 where the logits are (..., classes).
    evaluate: a held-out measure, printed to standard error each `report_every` steps; nothing is chosen by it.
    learning_rate: the peak, after a warm-up of a twentieth of the steps.
    weight_decay: of matrices and kernels; biases and the scales of norms are not decayed.
    loss: of logits and targets, as torch.nn.functional.cross_entropy, which `label_smoothing` is for.
    before_step: called with the number of each step, 0 first, before the model computes.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, steps // 20))
    for step, (inputs, targets) in enumerate(islice(batches, steps), start=1):
        model.train()
        before_step(step - 1)
        logits = logits_of(model(torch.from_numpy(inputs)))
        if loss is None:
            value = functional.cross_entropy(
                logits.flatten(0, -2), torch.from_numpy(targets).flatten(), label_smoothing=label_smoothing
            )
        else:
            value = loss(logits, torch.from_numpy(targets))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % report_every == 0 or step == steps:
            model.eval()
            print(f"step {step}: loss {value.item():.4f}, held-out {evaluate():.4f}", file=sys.stderr, flush=True)


def train_on_digits(
    model: nn.Module,
    chosen: argparse.Namespace,
    *,
    learning_rate: float,
    batch: int = 64,
    inputs: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """`train` a classifier of digits by the arguments of its script.

    inputs: what the model is given for images (batch, 1, 8, 8) float32.
    """
    images, labels = digits_data.digits("held-out")
    train(
        model,
        ((inputs(each), targets) for each, targets in digits_data.training_batches(batch=batch, seed=chosen.seed)),
        lambda: accuracy(predictor(model), inputs(images), labels),
        steps=chosen.steps,
        learning_rate=learning_rate,
        label_smoothing=0.1,
        before_step=before_step,
    )
