"""Sets of inputs from images: through the image processor beside the source, else by a plain rule.

The plain rule, for an input of static height and width: the first frame, turned upright, in the network's channels (1
grey, 3 RGB, 4 RGBA), scaled to its size (bilinear, averaging what is made smaller), and 0…1; 0…255 where the input is
uint8. A network that was trained on anything else needs its processor, or `.npz`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rewrite.calibration_data.files import Files
from rewrite.capture.preprocessors import load_image_processor
from rewrite.errors import InputsError
from rewrite.ir.program import Input, signature

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for a number of channels."""
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""What is decoded; others that Pillow knows start programs (EPS) or are rarely tested."""
NPZ = "give its inputs as .npz"


@dataclass(frozen=True)
class Picture:
    """The input that images go into: (…, channels, height, width), or with the channels last. Sizes may be dynamic."""

    given: Input
    batch: int
    channels: int
    size: tuple[int | str, int | str]
    channels_last: bool

    @classmethod
    def of(cls, model: ir.Model) -> Picture:
        """Raises InputsError for a network that takes no image."""
        inputs = signature(model)
        four = [given for given in inputs if len(given.shape) == 4]
        images = [given for given in four if given.kind == "image"]
        images = images or [given for given in four if given.kind == "number" and given.dtype.is_floating_point()]
        images = images or [given for given in four if given.dtype == ir.DataType.UINT8]
        if len(images) != 1:
            takes = ", ".join(f"{given.name} [{', '.join(map(str, given.shape))}]" for given in inputs)
            raise InputsError(f"the network takes {takes}, not one image", where="calibration", remedy=NPZ)
        given = images[0]
        batch, *inner = given.shape
        last = inner[0] not in MODES and inner[2] in MODES
        channels = inner[2] if last else inner[0]
        if not isinstance(channels, int) or channels not in MODES:
            what = f"{given.name} has {channels} channels, and images have 1, 3 or 4"
            raise InputsError(what, where="calibration", remedy=NPZ)
        size = (inner[0], inner[1]) if last else (inner[1], inner[2])
        return cls(given, batch if isinstance(batch, int) else 1, channels, size, last)


@dataclass(frozen=True)
class ImageSets:
    """The sets of a folder of images, a batch in each; `samples` images, spread evenly, where there are more."""

    files: Files
    picture: Picture
    names: tuple[str, ...]
    made: Callable[[np.ndarray], dict[str, np.ndarray]] | None
    samples: int

    @classmethod
    def of(cls, files: Files, model: ir.Model, folder: Path | None, samples: int) -> ImageSets:
        """Raises InputsError where the network takes no images, or sizes are not known."""
        picture, names = Picture.of(model), tuple(given.name for given in signature(model))
        made = None if folder is None else load_image_processor(folder)
        if made is None and not all(isinstance(size, int) for size in picture.size):
            raise InputsError(
                f"{picture.given.name} has any size, and no preprocessor_config.json lies beside the source",
                where=str(files.root),
                remedy="put the one that the network was trained with there, or give .npz",
            )
        if made is None and len(names) > 1:
            other = next(name for name in names if name != picture.given.name)
            raise InputsError(f"the network takes {other} beside the image", where="calibration", remedy=NPZ)
        return cls(files, picture, names, made, samples)

    def __iter__(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        batch = self.picture.batch
        total = min(self.samples * batch, self.files.count)
        if total < batch:
            what = f"holds {total} images, and the network takes {batch} at a time"
            raise InputsError(what, where=str(self.files.root), remedy="give more images")
        wanted = (index * self.files.count // total for index in range(total))
        index, rows = next(wanted, None), list[dict[str, np.ndarray]]()
        for position, path in enumerate(self.files):
            if index is None:
                break
            if position != index:
                continue
            index = next(wanted, None)
            rows.append(self._inputs(path))
            if len(rows) == batch:
                yield str(path), rows[0] if batch == 1 else _stacked(rows, path)
                rows = []

    def _inputs(self, path: Path) -> dict[str, np.ndarray]:
        """What one image becomes, with a batch of one."""
        if self.made is None:
            return {self.picture.given.name: self._plain(path)}
        image = np.array(_image(path, MODES[self.picture.channels]))
        try:
            made = self.made(image if image.ndim == 3 else image[:, :, None])
        except InputsError as error:
            raise InputsError(error.what, where=str(path), remedy=error.remedy) from error
        if missing := [name for name in self.names if name not in made]:
            what = f"the image processor makes {', '.join(made)}, and the network takes {missing[0]} too"
            raise InputsError(what, where=str(path), remedy=NPZ)
        picture = made[self.picture.given.name].astype(self.picture.given.dtype.numpy())
        return {name: picture if name == self.picture.given.name else made[name] for name in self.names}

    def _plain(self, path: Path) -> np.ndarray:
        height, width = self.picture.size
        image = _image(path, MODES[self.picture.channels], (int(width), int(height)))
        pixels = np.array(image).reshape(1, int(height), int(width), self.picture.channels)
        if self.picture.given.dtype.is_floating_point():
            pixels = (pixels / np.float64(255)).astype(self.picture.given.dtype.numpy())
        return pixels if self.picture.channels_last else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _stacked(rows: list[dict[str, np.ndarray]], path: Path) -> dict[str, np.ndarray]:
    for name in rows[0]:
        if len({row[name].shape for row in rows}) > 1:
            what = f"{name} differs in size from the images before it, and they are one batch"
            raise InputsError(what, where=str(path), remedy="give images of one size")
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _image(path: Path, mode: str, size: tuple[int, int] | None = None) -> Any:
    """The first frame of an image in Pillow's `mode`, upright, at `size` (width, height) where one is given."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise InputsError(
            "Pillow is needed to read images", where=str(path), remedy="pip install rewrite[images]"
        ) from error
    try:
        with warnings.catch_warnings():
            # A few kilobytes can claim gigapixels: what Pillow warns of is refused.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                if file.mode in ("I", "F"):
                    raise ValueError("its samples have 32 bits")
                upright = ImageOps.exif_transpose(file)
                if upright.mode.startswith("I;16"):
                    # Pillow cuts 16 bits off at 255 instead of scaling them.
                    upright = Image.fromarray((np.asarray(upright, np.float64) / 257).round().astype(np.uint8))
                upright = upright.convert(mode)
                return upright if size in (None, upright.size) else upright.resize(size, Image.Resampling.BILINEAR)
    except Exception as error:  # decoders raise many kinds for damaged files
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputsError(
            f"cannot be read as an image: {reason}", where=str(path), remedy="save it again, or leave it out"
        ) from error
