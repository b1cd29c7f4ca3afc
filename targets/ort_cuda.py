"""ONNX Runtime on an NVIDIA GPU.

The canonical form runs as it is: its operators have CUDA kernels in float32, float16 and bfloat16. No fused operator is
emitted: GroupQueryAttention exists for float16 and bfloat16 only, and in float32 falls back to the CPU without a word.
TF32 is off, since it computes float32 products with ten bits of mantissa.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from rewrite.targets.gelu import raise_gelu
from rewrite.targets.target import Target


class OrtCuda(Target):
    """ONNX Runtime's CUDA execution provider, the CPU beside it for shape arithmetic."""

    name = "ort-cuda"
    device = "cuda"
    dtypes = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
    steps = (raise_gelu,)
    kernels = frozenset(("weights",))

    def lacks(self, dtype: ir.DataType, node: ir.Node) -> bool:
        return dtype not in self.dtypes

    def session(self) -> dict[str, Any]:
        return {
            "target": self.name,
            "providers": [["CUDAExecutionProvider", {"use_tf32": "0"}], ["CPUExecutionProvider", {}]],
            "graph_optimization_level": "all",
            "config": {"session.qdq_matmulnbits_accuracy_level": "0"},
            "numerics": "",
        }
