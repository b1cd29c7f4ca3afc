"""Write a reference network as model.safetensors, its weights, and model.pt2, the same as an exported program.

`python -m rewrite.models.archive models/checkpoints/digits-repvgg` makes model.pt2 again of model.safetensors, with the
installed torch. `rewrite convert` reads model.pt2, which holds a graph of operators and no code.
"""

import argparse
import warnings
from pathlib import Path

import torch
from torch import nn

from rewrite.models.reference import NETWORKS, Network, load

WEIGHTS, ARCHIVE = "model.safetensors", "model.pt2"


def save(model: nn.Module, name: str, folder: Path) -> None:
    """Write both files for a trained network, which is left in eval mode.

    name: of `NETWORKS`; it is kept in the metadata of model.safetensors.  folder: made where it does not exist.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"network": name})
    save_archive(model, NETWORKS[name], folder / ARCHIVE)


def save_archive(model: nn.Module, network: Network, path: Path) -> None:
    """Export a network, in eval mode and for any batch, to a `.pt2` file."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            model.eval(),
            args=(),
            kwargs=network.example(),
            dynamic_shapes={network.input: {0: torch.export.Dim("batch")}},
        )
        for node in exported.graph.nodes:
            # Where on which disk the source lies is nothing of the network.
            node.meta.pop("stack_trace", None)
        torch.export.save(exported, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="+", help="folder with model.safetensors of a reference network")
    for folder in parser.parse_args().folder:
        network, model = load(folder)
        save_archive(model, network, folder / ARCHIVE)
        print(folder / ARCHIVE)
