"""Run a model in ONNX Runtime on the CPU and return its outputs; nothing is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from rewrite.errors import UnsupportedOperatorError
from rewrite.ir.program import save_model, signature

if TYPE_CHECKING:
    import onnxruntime


class Session:
    """An ONNX Runtime session over a model file, or over a model in memory by way of a temporary file.

    Use it as a context manager: the temporary file lives as long as the session.
    """

    def __init__(
        self,
        model: ir.Model | str | Path,
        options: onnxruntime.SessionOptions | None = None,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
    ) -> None:
        import onnxruntime

        self._folder: tempfile.TemporaryDirectory | None = None
        if isinstance(model, ir.Model):
            self._folder = tempfile.TemporaryDirectory(prefix="rewrite-session-")
            path = Path(self._folder.name) / "model.onnx"
            save_model(model, path)
        else:
            path = Path(model)
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's own have no other common base
            self.close()
            raise UnsupportedOperatorError(
                str(error).splitlines()[0],
                where=f"ONNX Runtime on {path.name}",
                remedy="choose another target or dtype",
            ) from error

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the session and its temporary file."""
        self._session = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name; inputs that the model does not take are left out.

        Raises UnsupportedOperatorError where a kernel does not take what the network gives it.
        """
        if self._session is None:
            raise ValueError("the session is closed")
        taken = {given.name for given in self._session.get_inputs()}
        names = [given.name for given in self._session.get_outputs()]
        try:
            arrays = self._session.run(names, {k: v for k, v in inputs.items() if k in taken})
        except Exception as error:  # as above
            raise UnsupportedOperatorError(
                str(error).splitlines()[0], where="ONNX Runtime", remedy="choose another target"
            ) from error
        return {name: np.asarray(array) for name, array in zip(names, arrays)}


def unoptimized() -> onnxruntime.SessionOptions:
    """Options that run the graph as it is written: EXTENDED optimization costs 5e-8 even in double."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return options


def run(
    model: ir.Model | str | Path, inputs: Mapping[str, np.ndarray], options: onnxruntime.SessionOptions | None = None
) -> dict[str, np.ndarray]:
    """The outputs of one run by name, with ONNX Runtime's default options unless given others."""
    with Session(model, options) as session:
        return session.run(inputs)


def run_original(model: ir.Model | str | Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of the graph as written: the run whose error is the noise."""
    return run(model, inputs, unoptimized())


def is_runnable(model: ir.Model) -> bool:
    """Whether ONNX Runtime's CPU provider takes the model's inputs and weights (it has no bfloat16 arithmetic)."""
    types = {given.dtype for given in signature(model)} | {value.dtype for value in model.graph.outputs}
    return ir.DataType.BFLOAT16 not in types
