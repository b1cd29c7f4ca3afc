"""Every exception of this package: the input or the request is unusable, and here is what to do.

An answer of "no" (not equal, refused, unknown) is a value with a place, never one of these. The command line prints
one line per error, *what, where, remedy*, and exits with 2.
"""

from __future__ import annotations


class RewriteError(Exception):
    """Base of all: `what` was found, `where` it was found, and the `remedy`."""

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(": ".join(part for part in (where, what) if part) + (f" ({remedy})" if remedy else ""))


class SourceError(RewriteError):
    """A source is missing, is none of the known kinds, or names a model that cannot be built.

    Smallest example: `rewrite capture nowhere -o a.onnx`.
    """


class CheckpointError(RewriteError):
    """A checkpoint's bytes do not fit its model: missing, truncated, misshapen, not finite, or pickled.

    Smallest example: a `model.safetensors` cut after 100 bytes.
    """


class UnsafeSourceError(RewriteError):
    """Loading the source would execute code, or read outside its folder.

    Smallest example: a `.pt2` whose constants are pickled; external data at `../secret.bin`.
    """


class UnsupportedOperatorError(RewriteError):
    """The exporter or the target has no kernel or translation for an operator.

    Smallest example: bfloat16 MatMul on `ort-cpu`.
    """


class InputsError(RewriteError):
    """Given inputs do not match the program's signature.

    Smallest example: an `.npz` without `input_ids`.
    """


class OutputError(RewriteError):
    """The output folder cannot be written: it exists, lies inside the source, is read-only, or the disk is full.

    Smallest example: `rewrite convert m -o m/out`.
    """


class RequestError(RewriteError):
    """The request names a pass, target, recipe or option that does not exist or does not fit.

    Smallest example: `--pass no-such-pass`.
    """
