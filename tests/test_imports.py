"""Imports go one way, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALLOWED = {
    "errors": set(),
    "ir": {"errors"},
    "proof": set(),
    "quantize": {"errors"},
    "basis": {"ir", "errors", "proof"},
    "rule": {"basis", "ir", "errors", "proof"},
    "passes": {"rule", "basis", "ir", "errors", "proof", "quantize"},
    "targets": {"ir", "errors", "capture"},
    "capture": {"ir", "errors"},
    "check": {"ir", "errors", "proof"},
    "calibration_data": {"capture", "check", "ir", "errors"},
    "report": {"check", "errors"},
    "models": set(),
}
"""What each part may import of ours, besides itself. `targets` uses the matchers of capture's canonical form, and
passes and checks speak of the transforms that proofs are about (`proof.transforms`)."""

TORCH = {"capture", "models"}


def _files(part: str) -> list[Path]:
    folder = ROOT / part if part in ("passes", "targets", "models") else ROOT / "rewrite" / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_one_way(part: str) -> None:
    wrong = []
    for path in _files(part):
        for name in _imported(path):
            words = name.split(".")
            if words[0] != "rewrite" or len(words) < 2 or words[1] == part:
                continue
            if words[1] in ALLOWED and words[1] not in ALLOWED[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_torch_is_imported_only_by_capture_and_models() -> None:
    wrong = []
    for path in sorted((ROOT / "rewrite").glob("*.py")) + [f for part in ALLOWED for f in _files(part)]:
        part = path.relative_to(ROOT).parts[0 if path.parts[len(ROOT.parts)] != "rewrite" else 1].removesuffix(".py")
        if part in TORCH:
            continue
        wrong += [
            f"{path.relative_to(ROOT)} imports {n}"
            for n in _imported(path)
            if n.split(".")[0] in ("torch", "transformers")
        ]
    assert not wrong


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import rewrite", ("torch", "onnxruntime", "onnx_ir", "transformers")),
        ("import rewrite.cli", ("torch", "onnxruntime", "onnx_ir", "transformers")),
        ("import rewrite.pipeline", ("torch", "onnxruntime", "transformers")),
        ("import rewrite.proof", ("torch", "onnxruntime", "transformers")),
    ],
)
def test_imports_stay_light(statement: str, absent: tuple[str, ...]) -> None:
    check = f"{statement}; import sys; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["passes", "targets", "models"])
def test_mapped_packages_refuse_the_bare_name(name: str) -> None:
    result = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode != 0
    assert f"rewrite.{name}" in result.stderr
