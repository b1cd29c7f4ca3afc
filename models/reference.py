"""The reference networks that are plain modules: what each is built of, and its shipped weights.

Each is a factory, so that `rewrite convert rewrite.models.reference:digits_repvgg -o OUT` is the same as
`rewrite convert models/checkpoints/digits-repvgg -o OUT`, which runs nothing of this file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rewrite.models.digits_convolutional import Autoencoder, Conv1dNet, Conv3dNet, DenseNet, MobileNet, RepVGG
from rewrite.models.digits_transformers import RepBatchNorm, UnifiedNorm, VisionTransformer

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


@dataclass(frozen=True)
class Network:
    """How a network is built, without its weights, and the name and shape of its input after the batch axis."""

    build: Callable[[], nn.Module]
    input: str
    shape: tuple[int, ...]

    def example(self, batch: int = 2) -> dict[str, Tensor]:
        """An input in 0…1 by its name; the same one each time."""
        return {self.input: torch.linspace(0, 1, batch * torch.Size(self.shape).numel()).reshape(batch, *self.shape)}


IMAGE = ("pixel_values", (1, 8, 8))
NETWORKS = {
    "digits-repvgg": Network(RepVGG, *IMAGE),
    "digits-densenet": Network(DenseNet, *IMAGE),
    "digits-mobilenet": Network(MobileNet, *IMAGE),
    "digits-conv1d": Network(Conv1dNet, "frames", (8, 8)),
    "digits-conv3d": Network(Conv3dNet, "clip", (1, 5, 8, 8)),
    "digits-decoder": Network(Autoencoder, *IMAGE),
    "digits-prepbn-vit": Network(partial(VisionTransformer, RepBatchNorm), *IMAGE),
    "digits-un-vit": Network(partial(VisionTransformer, UnifiedNorm), *IMAGE),
}


def load(folder: Path) -> tuple[Network, nn.Module]:
    """The network whose weights are in a folder, in eval mode.

    folder: with a model.safetensors of `rewrite.models.archive.save`, which names the network.
    Raises FileNotFoundError where there is none, ValueError where it names none of `NETWORKS`.
    """
    from safetensors import safe_open

    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; the weights are shipped with the sources, in models/checkpoints"
        )
    with safe_open(path, "pt") as file:
        name = (file.metadata() or {}).get("network", "")
        weights = {key: file.get_tensor(key) for key in sorted(file.keys())}
    if name not in NETWORKS:
        raise ValueError(f"{path}: the network {name!r} is none of {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    model = network.build()
    model.load_state_dict(weights)
    return network, model.eval()


def _shipped(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    network, model = load(CHECKPOINTS / name)
    return model, network.example()


def digits_repvgg() -> tuple[nn.Module, dict[str, Tensor]]:
    """digits-repvgg with its shipped weights, and an example input."""
    return _shipped("digits-repvgg")


def digits_densenet() -> tuple[nn.Module, dict[str, Tensor]]:
    """digits-densenet with its shipped weights, and an example input."""
    return _shipped("digits-densenet")


def digits_mobilenet() -> tuple[nn.Module, dict[str, Tensor]]:
    """digits-mobilenet with its shipped weights, and an example input."""
    return _shipped("digits-mobilenet")


def digits_conv1d() -> tuple[nn.Module, dict[str, Tensor]]:
    """digits-conv1d with its shipped weights, and an example input."""
    return _shipped("digits-conv1d")


def digits_conv3d() -> tuple[nn.Module, dict[str, Tensor]]:
    """digits-conv3d with its shipped weights, and an example input."""
    return _shipped("digits-conv3d")


def digits_decoder() -> tuple[nn.Module, dict[str, Tensor]]:
    """digits-decoder with its shipped weights, and an example input."""
    return _shipped("digits-decoder")


def digits_prepbn_vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """digits-prepbn-vit with its shipped weights, and an example input."""
    return _shipped("digits-prepbn-vit")


def digits_un_vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """digits-un-vit with its shipped weights, and an example input."""
    return _shipped("digits-un-vit")
