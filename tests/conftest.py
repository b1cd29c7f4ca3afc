"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rewrite.ir.program import Program


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
def family_program(family_checkpoint: Callable[[str], Path]) -> Callable[[str], Program]:
    """`family_program(name)`: the program captured from a family's checkpoint, captured once per session.

    Every call returns a fresh clone, so that a test may rewrite it; tensors are shared.
    """
    import rewrite

    programs: dict[str, Program] = {}

    def program(name: str) -> Program:
        if name not in programs:
            programs[name] = rewrite.capture(family_checkpoint(name))
        return programs[name].clone()

    return program
