"""The wheel holds all packages, under the right names, and works outside the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, built from a copy of the tree, was installed without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    tree, site = folder / "tree", folder / "site"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", "build", "*.egg-info", "out", "checkpoints", ".*_cache"
    )
    shutil.copytree(ROOT, tree, symlinks=True, ignore=skipped)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(tree)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.split("/")[0] in ("passes", "targets", "models", "tests", "benchmarks")]
    return site


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=installed.parent, env=environment
    )


def test_everything_imports(installed: Path) -> None:
    script = """
import importlib, pathlib, pkgutil, sys, rewrite
home = pathlib.Path(rewrite.__file__).parent
assert str(home).startswith(sys.argv[1]), home
names = [m.name for m in pkgutil.walk_packages([str(home)], "rewrite.") if "train_" not in m.name]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    done = run(installed, "-W", "ignore", "-c", script, str(installed))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60


def test_a_file_is_converted_outside_the_tree(installed: Path, tmp_path: Path) -> None:
    from test_cli import small_model

    source = small_model(tmp_path / "small.onnx")
    done = run(installed, "-m", "rewrite.cli", "convert", str(source), "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000
