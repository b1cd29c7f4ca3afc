"""The OUT folder: what it holds, and how it comes to be whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rewrite.errors import OutputError

MODEL, CERTIFICATE, REPORT, PAGE = "model.onnx", "certificate.json", "report.json", "report.html"
TRANSFORMS = "certificate.safetensors"
"""The arrays of the certificate's transforms, where they have any."""


@contextmanager
def new_folder(out: Path, source: Any, force: bool) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` when the block ends without an exception.

    It is named `.<out>.<process>.partial`: what a killed run left is removed by the next. Raises OutputError where
    `out` exists and `force` is not given, lies inside the source, or cannot be written.
    """
    out = out.absolute()
    _refuse(out, source, force)
    _remove_leftovers(out)
    partial = out.parent / f".{out.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        yield partial
        _replace(partial, out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse(out: Path, source: Any, force: bool) -> None:
    if isinstance(source, str | Path) and Path(source).exists():
        inside = Path(source).resolve()
        resolved = out.resolve()
        if inside.is_dir() and (resolved == inside or inside in resolved.parents):
            raise OutputError("lies inside the source", where=str(out), remedy="choose a folder outside of it")
        if inside == resolved or resolved in inside.parents:
            raise OutputError("holds the source", where=str(out), remedy="choose another folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError("is not a folder", where=str(out), remedy="choose another name")
    if out.exists():
        if not force and any(out.iterdir()):
            raise OutputError("exists", where=str(out), remedy="give --force to replace it")
        ours = _OURS | _listed(out / CERTIFICATE)
        strange = [p.name for p in out.iterdir() if p.name not in ours]
        if strange:
            found = ", ".join(sorted(strange)[:3])
            raise OutputError(f"holds files that are not ours: {found}", where=str(out), remedy="choose another folder")


_OURS = {MODEL, f"{MODEL}.data", CERTIFICATE, TRANSFORMS, REPORT, PAGE, "session.json"}


def _listed(certificate: Path) -> set[str]:
    """The files that a certificate lists: those of a checkpoint that was written with it."""
    try:
        listed = json.loads(certificate.read_text(encoding="utf-8"))["files"]
        return {str(name) for name in listed}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _remove_leftovers(out: Path) -> None:
    """Partial folders of runs that are gone."""
    for leftover in out.parent.glob(f".{out.name}.*.partial"):
        process = leftover.name.removeprefix(f".{out.name}.").split("-")[0]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _replace(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    aside = out.parent / f".{out.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
    out.rename(aside)
    try:
        partial.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _unwritable(out: Path, error: OSError) -> OutputError:
    if error.errno == errno.ENOSPC:
        return OutputError("the disk is full", where=str(out), remedy="free some space or choose another folder")
    return OutputError(error.strerror or str(error), where=str(out), remedy="choose a folder that can be written")


@contextmanager
def new_file(path: Path, force: bool) -> Iterator[Path]:
    """A file (with `.data` beside it) to write, which becomes `path` when the block ends without an exception.

    The weights' file keeps the name the model refers to, so both are written in a folder of their own and moved.
    """
    path = path.absolute()
    if path.exists() and not force:
        raise OutputError("exists", where=str(path), remedy="give --force to replace it")
    partial = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
    _remove_leftovers(path)
    try:
        partial.mkdir(parents=True)
        yield partial / path.name
        for made in sorted(partial.iterdir(), key=lambda file: file.name == path.name):
            os.replace(made, path.parent / made.name)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
