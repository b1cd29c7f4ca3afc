"""The stages of a run: their times, the words a person sees meanwhile, and the files that hold the outcome."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from rewrite.artifact import PAGE, REPORT

if TYPE_CHECKING:
    from rewrite.report import Report

LIBRARIES = ("rewrite", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "torch", "transformers", "numpy")


class Stages:
    """Times named stages; `progress` is told the name of each as it begins."""

    def __init__(self, progress: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._progress is not None:
            self._progress(name)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def write(self, report: Report, folder: Path) -> Report:
        """The report with times and versions, written into `folder` as JSON and HTML."""
        from rewrite.report import to_html

        report = replace(report, timings_s=dict(self.seconds), environment=environment())
        (folder / REPORT).write_text(report.to_json(), encoding="utf-8")
        (folder / PAGE).write_text(to_html(report), encoding="utf-8")
        return report


def environment() -> dict[str, str]:
    """Versions of what took part, and the kind of machine; no host name, no path."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
