"""Write data that a shipped network can be calibrated on, from the files and images that it was trained on.

    python -m rewrite.models.calibration models/checkpoints/bytegpt text/
    rewrite convert models/checkpoints/bytegpt -o out --recipe int8-static --calibrate text/

What is held out stays for the evaluation.
"""

import argparse
from pathlib import Path

import numpy as np

from rewrite.models import byte_data, digits_data


def write_calibration(folder: Path, name: str, count: int = 128, split: byte_data.Split = "train") -> None:
    """Write data for the network whose main input has this name into `folder`, which must be empty or missing.

    input_ids: `count` source files, evenly spaced.  pixel_values: the first `count` digits as 8-bit PNG files, 0…255
    for 0…1.  frames, clip: the first `count` digits in one data.npz with an axis of sets in front.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; give a new folder")
    if name == "input_ids":
        write_text(folder, count, split)
        return
    images = digits_data.digits(split)[0][:count]
    if name == "pixel_values":
        from PIL import Image

        for index, image in enumerate(images):
            Image.fromarray((image[0] * 255).round().astype(np.uint8)).save(folder / f"{index:04}.png")
    else:
        np.savez(folder / "data.npz", **{name: digits_data.INPUTS[name](images)[:, None]})


def main_input(network: str) -> str:
    """The name of the main input of a shipped network.

    >>> main_input("bytegpt"), main_input("digits-vit")
    ('input_ids', 'pixel_values')
    """
    from rewrite.models.reference import NETWORKS

    if network in NETWORKS:
        return NETWORKS[network].input
    return "input_ids" if network.startswith("byte") else "pixel_values"


def write_text(folder: Path, count: int, split: byte_data.Split) -> None:
    """Write `count` source files of one split, evenly spaced, under their own names; those in UTF-8, as nearly all."""
    known = [path for path, _ in byte_data.sources() if byte_data.is_held_out(path) == (split == "held-out")]
    chosen = {known[index * len(known) // count] for index in range(count)}
    for path, content in byte_data.sources():
        if path in chosen and is_utf_8(content):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)


def is_utf_8(content: bytes) -> bool:
    """
    >>> is_utf_8("é".encode()), is_utf_8("é".encode("latin-1"))
    (True, False)
    """
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a shipped network")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--count", type=int, default=128, help="files or images")
    given = parser.parse_args()
    write_calibration(given.folder, main_input(given.checkpoint.resolve().name), given.count)
