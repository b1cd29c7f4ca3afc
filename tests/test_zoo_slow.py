"""The zoo from end to end: families are captured, tried and put on the page, and nothing is silently wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAMILIES = ("llama_mqa", "roberta_prelayernorm", "t5_gated", "convnextv2", "whisper_encoder", "paligemma")


@pytest.mark.slow
def test_a_handful_of_families(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks/zoo.py")]
    options = ["--cache", str(tmp_path), "--docs", str(tmp_path / "zoo.md")]
    done = subprocess.run([*script, *FAMILIES, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "zoo.md").read_text(encoding="utf-8")
    assert "Silent errors: 0. Crashes: 0." in page
    for name in FAMILIES:
        assert json.loads((tmp_path / name / "capture.json").read_text(encoding="utf-8"))["torch"] < 1e-5
        result = json.loads((tmp_path / name / "result.json").read_text(encoding="utf-8"))
        assert result["default"]["status"] == "proved"
        assert result["default"]["noise"] < 8
        assert f"| {name} |" in page

    again = subprocess.run([*script, *FAMILIES, *options], capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert (tmp_path / "zoo.md").read_text(encoding="utf-8") == page, "a second run takes what is there"


@pytest.mark.slow
def test_the_whole_zoo() -> None:
    """An hour or two; a rerun goes on where it was stopped, and takes what did not change."""
    script = [sys.executable, str(ROOT / "benchmarks/zoo.py")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
