"""Fixtures shared by all tests."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from rewrite.ir.program import Program

ROOT = Path(__file__).parent.parent
BUILDERS = ("tests/families.py", "benchmarks/zoo_families.py")
"""Where the captured networks are built."""


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`family_checkpoint(name)`: the checkpoint folder of a family, written once per session."""
    from families import save_checkpoint

    folders: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in folders:
            folders[name] = save_checkpoint(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return checkpoint


@pytest.fixture(scope="session")
def kept_program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Callable[[], Program]], Program]:
    """`kept_program(name, capture)`: what `capture()` returns, captured once for as long as it stays the same.

    Every call returns a fresh clone, so that a test may rewrite it; tensors are shared. torch.export takes seconds a
    network, so captures are kept between sessions, as ONNX files in pytest's cache under a digest of everything they
    depend on. tests/capture captures anew.
    """
    from rewrite.capture.onnx_file import load_onnx

    programs: dict[str, Program] = {}
    cache = getattr(request.config, "cache", None)
    store = (cache.mkdir("families") if cache else tmp_path_factory.mktemp("families")) / _digest()

    def program(name: str, capture: Callable[[], Program]) -> Program:
        if name not in programs:
            kept = store / name
            if not (kept / "model.onnx").is_file():
                making = tmp_path_factory.mktemp(f"{name}-capture")
                capture().save(making / "model.onnx")
                store.mkdir(exist_ok=True)
                # Another session may have put it there meanwhile; either copy will do.
                shutil.rmtree(kept, ignore_errors=True)
                shutil.move(making, kept)
            programs[name] = Program.captured(load_onnx(kept / "model.onnx"), name)
        return programs[name].clone()

    return program


@pytest.fixture(scope="session")
def family_program(
    family_checkpoint: Callable[[str], Path], kept_program: Callable[[str, Callable[[], Program]], Program]
) -> Callable[[str], Program]:
    """`family_program(name)`: the program captured from a family's checkpoint, a fresh clone with every call."""
    import rewrite

    return lambda name: kept_program(name, lambda: rewrite.capture(family_checkpoint(name)))


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(
        [*ROOT.glob("rewrite/capture/*.py"), *ROOT.glob("rewrite/ir/*.py"), *(ROOT / name for name in BUILDERS)]
    ):
        if not path.name.startswith("canonicalize"):
            digest.update(path.read_bytes())
    for package in ("torch", "transformers", "onnx-ir", "onnxscript"):
        digest.update(version(package).encode())
    return digest.hexdigest()[:16]
