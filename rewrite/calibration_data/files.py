"""Which files a path holds, of which kind, in the order of their names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rewrite.errors import InputsError, UnsafeSourceError

Kind = Literal["npz", "text", "images"]

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"})
PICKLES = frozenset({".pkl", ".pickle", ".joblib", ".pt", ".pth", ".ckpt"})
OTHERS = frozenset(
    ".npy .bin .h5 .hdf5 .parquet .arrow .feather .safetensors .onnx .pt2 .zip .gz .bz2 .xz .zst .tar .tgz .7z .pdf "
    ".pyc .so .wav .mp3 .flac .mp4".split()
)
"""Kinds that are none of ours. What is left is taken for text, and must be UTF-8."""
UNREAD = frozenset({"__pycache__"})

REMEDY = "give .npz files, text or images"


@dataclass(frozen=True)
class Files:
    """The files of one path: all of one kind. They are looked up anew by every iteration, a folder at a time."""

    root: Path
    kind: Kind
    count: int
    size: int

    def __iter__(self) -> Iterator[Path]:
        return (path for path, _ in self.sized())

    def sized(self) -> Iterator[tuple[Path, int]]:
        """Every file and its bytes."""
        return _walk(self.root)


def find_files(path: Path) -> Files:
    """What `path`, a file or a folder with all its subfolders, holds.

    Entries whose name begins with a dot and `__pycache__` are left out. A link to a file inside of the folder is
    followed.

    Raises InputsError where the path is missing or empty, or files are of several kinds or of none; UnsafeSourceError
    for a link that leads out of the folder, or to a folder.
    """
    kind, first, count, size = None, path, 0, 0
    for file, file_size in _walk(path):
        found = _kind(file)
        if kind is not None and found != kind:
            named = f"{first.relative_to(path)} ({kind}) and {file.relative_to(path)} ({found})"
            raise InputsError(f"mixes {named}", where=str(path), remedy="give a folder with one kind of file")
        if kind is None:
            kind, first = found, file
        count, size = count + 1, size + file_size
    if kind is None:
        raise InputsError("holds no files", where=str(path), remedy=REMEDY)
    return Files(path, kind, count, size)


def _walk(root: Path) -> Iterator[tuple[Path, int]]:
    try:
        if root.is_dir():
            yield from _folder(root, root.resolve())
        elif root.is_file():
            yield root, root.stat().st_size
        elif root.exists():
            raise InputsError("is neither a file nor a folder", where=str(root), remedy=REMEDY)
        else:
            raise InputsError("does not exist", where=str(root), remedy=REMEDY)
    except RecursionError as error:
        raise InputsError("its folders are nested too deeply", where=str(root), remedy=REMEDY) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputsError(f"cannot be read: {reason}", where=str(error.filename or root), remedy=REMEDY) from error


def _folder(folder: Path, root: Path) -> Iterator[tuple[Path, int]]:
    """One folder's files, then through its subfolders, all by name, which the file system's own order is not."""
    with os.scandir(folder) as entries:
        named = sorted(entries, key=lambda entry: entry.name)
    for entry in named:
        if entry.name.startswith(".") or entry.name in UNREAD:
            continue
        path = folder / entry.name
        if entry.is_symlink():
            _refuse_link(path, root)
        if entry.is_dir():
            yield from _folder(path, root)
        elif entry.is_file():
            yield path, entry.stat().st_size
        else:
            raise InputsError("is neither a file nor a folder", where=str(path), remedy="remove it from the folder")


def _refuse_link(path: Path, root: Path) -> None:
    target = path.resolve()
    if target != root and root not in target.parents:
        raise UnsafeSourceError(
            f"is a link that leads out of the folder, to {target}",
            where=str(path),
            remedy="copy the file into the folder, or give what it leads to",
        )
    if path.is_dir():
        raise UnsafeSourceError(
            "is a link to a folder", where=str(path), remedy="remove it: the folder that it leads to is read anyway"
        )
    if not path.exists():
        raise InputsError("is a link that leads nowhere", where=str(path), remedy="remove it")


def _kind(path: Path) -> Kind:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return "npz"
    if suffix in IMAGES:
        return "images"
    if suffix in PICKLES:
        raise InputsError("may be a pickle, and opening one executes code", where=str(path), remedy=REMEDY)
    if suffix in OTHERS:
        raise InputsError(f"files of the kind {suffix} are not read", where=str(path), remedy=REMEDY)
    return "text"
