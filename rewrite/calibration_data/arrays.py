"""Sets of inputs from `.npz` files, of which one set at a time is read.

A file holds an array for each input. Where every array has the axes of its input, it is one set; where every array has
one axis more, in front, that axis counts sets: `input_ids` (512, 1, 128) is 512 sets of (1, 128).

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, in a zip archive. The headers are read,
then of each array only the bytes of the set: `numpy.load` would read all of it.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx_ir as ir
from numpy.lib import format as npy

from rewrite.calibration_data.files import Files
from rewrite.check.inputs import check_names
from rewrite.errors import InputsError
from rewrite.ir.program import signature

BLOCK = 1 << 20
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
DAMAGE = (ValueError, EOFError, OSError, RuntimeError, NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error)
"""What zipfile, zlib and numpy raise for an archive that is cut, damaged, encrypted or lies about its sizes."""


@dataclass
class Member:
    """An open array of an archive: `stream` stands at its first byte."""

    stream: IO[bytes]
    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype


@dataclass
class ArraySets:
    """The sets of all files; `samples` of them, spread evenly, where there are more."""

    files: Files
    model: ir.Model
    samples: int

    def __post_init__(self) -> None:
        self.total = 0
        for path in self.files:
            with _opened(path, self.model) as (_, count):
                self.total += 1 if count is None else count

    def __iter__(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        chosen = min(self.samples, self.total)
        wanted = (index * self.total // chosen for index in range(chosen))
        index, first = next(wanted, None), 0
        for path in self.files:
            with _opened(path, self.model) as (members, count):
                if count is None and index == first:
                    yield str(path), {name: _whole(member) for name, member in members.items()}
                    index = next(wanted, None)
                read = 0
                while count is not None and index is not None and index < first + count:
                    skipped, read = index - first - read, index - first + 1
                    yield f"{path}: set {read}", {n: _row(each, skipped) for n, each in members.items()}
                    index = next(wanted, None)
            first += 1 if count is None else count


@contextlib.contextmanager
def _opened(path: Path, model: ir.Model) -> Iterator[tuple[dict[str, Member], int | None]]:
    """The arrays of a file, and how many sets they hold: None where they are one set without an axis for it."""
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            check_names(names, model, str(path))
            if len(set(names)) < len(names):
                raise ValueError("two arrays have one name")
            members = {}
            for name, info in zip(names, archive.infolist()):
                members[name] = _member(stack.enter_context(archive.open(info)), info.file_size, f"{path}: {name}")
            yield members, _count(members, model, path)
        except (*DAMAGE, struct.error) as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise InputsError(
                f"cannot be read without unpickling: {reason}",
                where=str(path),
                remedy="save plain numeric arrays with numpy.savez",
            ) from error


def _member(stream: IO[bytes], size: int, place: str) -> Member:
    version = npy.read_magic(stream)
    if version not in HEADERS:
        raise ValueError(f"{place} has the format version {version}")
    shape, by_columns, dtype = HEADERS[version](stream)
    if dtype.hasobject:
        raise ValueError(f"{place} holds Python objects")
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"{place} is cut: {size} bytes do not hold the shape {list(shape)}")
    return Member(stream, shape, by_columns, dtype)


def _count(members: dict[str, Member], model: ir.Model, path: Path) -> int | None:
    ranks = {given.name: len(given.shape) for given in signature(model)}
    extra = [name for name, member in members.items() if len(member.shape) == ranks[name] + 1]
    if not extra:
        return None
    if others := [name for name in members if name not in extra]:
        raise InputsError(
            f"{extra[0]} has an axis of sets in front and {others[0]} has none",
            where=str(path),
            remedy="save all inputs with that axis, or none",
        )
    counts = {name: members[name].shape[0] for name in members}
    for name, count in counts.items():
        if count != counts[extra[0]] or count == 0:
            what = f"{name} holds {count} sets" + (f", {extra[0]} {counts[extra[0]]}" if count else "")
            raise InputsError(what, where=str(path), remedy="save as many sets of each input")
        if members[name].by_columns:
            raise InputsError(
                f"{name} is stored by columns, so that no set of it lies in one place",
                where=str(path),
                remedy="save numpy.ascontiguousarray of it",
            )
    return counts[extra[0]]


def _whole(member: Member) -> np.ndarray:
    array = _read(member, member.shape[::-1] if member.by_columns else member.shape)
    return np.ascontiguousarray(array.T) if member.by_columns else array


def _row(member: Member, skipped: int) -> np.ndarray:
    """The next entry along the first axis after `skipped` ones."""
    shape = member.shape[1:]
    if skipped:
        member.stream.seek(skipped * math.prod(shape) * member.dtype.itemsize, 1)
    return _read(member, shape)


def _read(member: Member, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, member.dtype)
    if array.nbytes == 0:
        return array
    view, done = array.reshape(-1).view(np.uint8), 0
    while done < len(view):
        block = member.stream.read(min(BLOCK, len(view) - done))
        if not block:
            raise EOFError("it ends in the middle of an array")
        view[done : done + len(block)] = np.frombuffer(block, np.uint8)
        done += len(block)
    return array
