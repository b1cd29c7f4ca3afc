"""Multiply saved operands with ONNX Runtime and save what comes out: run by an emulated processor.

`python saturating_runtime.py FOLDER` reads `model.onnx` and `inputs.npz` there and writes `outputs.npz`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(folder: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    with np.load(folder / "inputs.npz") as inputs:
        results = session.run(None, dict(inputs))
    np.savez(folder / "outputs.npz", **dict(zip((output.name for output in session.get_outputs()), results)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
