"""From a path to sets of inputs that can be read again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from rewrite.calibration_data.files import Files, find_files
from rewrite.check.inputs import validate_inputs
from rewrite.errors import InputsError, RequestError
from rewrite.ir.program import Program

SAMPLES = 128
"""How many samples are read unless the caller says otherwise."""

Inputs = dict[str, np.ndarray]


class Reader(Protocol):
    """One kind of data: every iteration yields the same pairs of a place, for messages, and a set of inputs."""

    def __iter__(self) -> Iterator[tuple[str, Inputs]]: ...


class CalibrationSets:
    """Sets of inputs, valid for the network, that are made anew in the same order each time they are read.

    Of the sets only the one that is being made is in memory here.

    Raises InputsError, from the constructor, which reads all of them once, or from an iteration where files changed.
    """

    def __init__(
        self, reader: Reader, model: ir.Model, samples: int, progress: Callable[[str], None] | None = None
    ) -> None:
        self._reader, self._model, self._count = reader, model, 0
        for _ in self._valid():
            self._count += 1
            if progress is not None:
                progress(f"calibration data: {self._count}/{samples}")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Inputs]:
        done = 0
        for one in self._valid():
            done += 1
            yield one
        if done != self._count:
            raise InputsError(
                f"there were {self._count} sets of inputs and now there are {done}",
                where="calibration",
                remedy="leave the files as they are while they are read",
            )

    def __repr__(self) -> str:
        return f"CalibrationSets({self._count} of {type(self._reader).__name__})"

    def _valid(self) -> Iterator[Inputs]:
        for place, one in self._reader:
            validate_inputs(one, self._model, where=place)
            yield one


def calibration_sets(
    path: str | Path,
    network: Program | ir.Model,
    source: Any = None,
    *,
    samples: int = SAMPLES,
    length: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> CalibrationSets:
    """Sets of inputs for `network`, made of a file or a folder: `.npz`, text, or images.

    Args:
        path: a file, or a folder that is read with its subfolders in the order of the names, hidden entries left out.
        network: whose inputs they are, a program's `original` where it is one.
        source: what the network was captured from, in whose folder a tokenizer or image processor is looked for; of a
            program its own `source`, unless given.
        samples: how many at most, spread evenly over what there is: a row of text, an image, or a set of an `.npz`.
        length: tokens in a row of text, special ones included; min(128, the most that the network takes) if None.
        progress: told "calibration data: 12/128" as sets are read here; 128 is how many there are at most.

    All sets are read once here, so that what is wrong with them is said before anything is computed.

    Raises:
        InputsError: the path is missing, empty or mixes kinds; a file cannot be read, or does not fit the network.
        UnsafeSourceError: a link leads out of the folder, or the tokenizer beside the source is code.
        RequestError: `samples` or `length` is not positive.
    """
    for name, number in (("samples", samples), ("length", length)):
        if number is not None and number < 1:
            raise RequestError(f"{name} is {number}", where="calibration", remedy="give a number of at least 1")
    model = network.original if isinstance(network, Program) else network
    if source is None and isinstance(network, Program):
        source = network.source
    reader = _reader(find_files(Path(path)), model, _folder(source), samples, length)
    return CalibrationSets(reader, model, samples, progress)


def _reader(files: Files, model: ir.Model, folder: Path | None, samples: int, length: int | None) -> Reader:
    if files.kind == "text":
        from rewrite.calibration_data.text import TextSets

        return TextSets.of(files, model, folder, samples, length)
    if files.kind == "images":
        from rewrite.calibration_data.images import ImageSets

        return ImageSets.of(files, model, folder, samples)
    from rewrite.calibration_data.arrays import ArraySets

    return ArraySets(files, model, samples)


def _folder(source: Any) -> Path | None:
    """Where a tokenizer or image processor of `source` would be; None for what is no file or folder."""
    if not isinstance(source, str | Path) or not Path(source).exists():
        return None
    return Path(source) if Path(source).is_dir() else Path(source).parent
