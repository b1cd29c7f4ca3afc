"""Rewrites a trained network into the fastest one that computes the same function, and proves it.

The names below load on first use: `import rewrite` costs no torch, no ONNX Runtime.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewrite.capture import capture
    from rewrite.ir.program import Program
    from rewrite.pipeline import apply, convert, diff, explain, lower, verify

_HOMES = {
    "Program": "rewrite.ir.program",
    "capture": "rewrite.capture",
    "apply": "rewrite.pipeline",
    "convert": "rewrite.pipeline",
    "verify": "rewrite.pipeline",
    "lower": "rewrite.pipeline",
    "diff": "rewrite.pipeline",
    "explain": "rewrite.pipeline",
}

__all__ = ["Program", "apply", "capture", "convert", "diff", "explain", "lower", "verify"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'rewrite' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
