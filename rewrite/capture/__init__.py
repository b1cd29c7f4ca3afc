"""From any source to a `Program`: a checkpoint folder, a module, an exported program, a factory, an ONNX file.

ORIGINAL is what a capture returns: the exporter's graph with only integer and shape arithmetic folded
(`fold_shapes.py`). Everything that touches a floating-point number belongs to canonicalization and the passes, where it
is proved.

Weights are not read. A checkpoint's initializers are its own bytes on disk (`safetensors_file.py`), through
transformers' renaming and stacking where names differ (`bind.py`); a module's share its memory. No source is
unpickled, and no code in a checkpoint is run (`archive.py`, `onnx_file.py`).
"""

from __future__ import annotations

import sys
import types
from typing import Any

from rewrite.capture.finite import check_finite
from rewrite.capture.source import capture
from rewrite.ir.program import Program

__all__ = ["capture", "check_finite"]


class _CallableModule(types.ModuleType):
    """`rewrite.capture` is the function to its users and this package to the import system, which sets it last."""

    def __call__(self, source: Any, example_inputs: Any = None, **options: Any) -> Program:
        return capture(source, example_inputs, **options)


sys.modules[__name__].__class__ = _CallableModule
