"""ONNX Runtime on a CPU: the forms its kernels run fastest, and nothing fused that they do not need.

What is emitted beyond canonical form (all of ai.onnx 23; no com.microsoft operator at all):

* `Attention` on three axes: q (B, S, H·h), k and v (B, L, G·h) → (B, S, H·v), attributes `q_num_heads` and
  `kv_num_heads` always written, all others (`scale`, `is_causal`, `softcap`, `qk_matmul_output_mode`) and the optional
  fourth operand, the mask, as captured; one output. A guard after it becomes `Where(Squeeze(condition, [1]), zero, ·)`,
  also on three axes.
* `RotaryEmbedding` (x, cos, sin) on three axes: x (B, S, H·h), cos and sin (B, S, r/2) without position ids, attributes
  `num_heads`, `interleaved` = 0, `rotary_embedding_dim` = 0. Its caches are the first halves of the captured ones,
  computed before the concatenation that repeats them, and `Expand`ed over the batch: the runtime refuses a batch of 1.
* `Gelu` (x), `approximate` "none" or "tanh", where it was written out with the standard constants (`gelu.py`).
* a packed projection (one MatMul, then Split) as one MatMul + Add for each part, on slices of its weight; before
  anything is quantized, since codes of it are one matrix.

Why, measured with onnxruntime 1.31.1 on one x86-64 core with AVX-512, median µs:

    norms, 64 rows           d = 64    256    768   2048   4096
      LayerNormalization        5.8   17.1   34.1    104    231
      RMSNormalization          4.2    9.4   15.8     51    122     SimplifiedLayerNormalization is the same
      Add + LayerNorm…          7.2   21.9   46.2    156    353     SkipLayerNormalization   30  124  336  891  1730
      Add + RMSNorm…            5.7   11.9   26.9    103    257     SkipSimplified…         7.2   33   80  223   438
      ReduceMean + Sub, in LayerNormalizations of that size     0.70   0.76   0.68   0.78   0.76
    attention (S, H, h)     16,8,32   64,8,32   256,8,32   64,12,64   197,3,64
      on four axes, guarded    62       264       2981        492        509
      on three axes, guarded   45       207       2734        387        429
      MultiHeadAttention       59       257       2869        474        544
      MatMul, Softmax, MatMul  63       267       3167        492        586
    q, k, v of x (S, d)     16,256    64,256    256,256     64,768     197,192
      three MatMul + Add       74       235        974       2232        379
      one, and Split           76       250       1133       2349        445
    MatMul + Add + Gelu (erf) 105      379       1606       3150        634     MatMul + BiasGelu 109 391 1673 3133 686

So norms and residual sums stay apart, Gelu and bias stay apart, and the runtime's own fusions of both are switched off.
x·sigmoid(x) stays: the runtime makes it QuickGelu by itself. Gemm with its reshapes gains nothing over MatMul + Add.
An explicit centring pays where it makes two norms cheaper (`costs`, from the column of 768).

Masked attention spends most of its time on numbers below 1e-38, which exp gives where the mask is: flushing them to
zero takes 64,8,32 from 193 µs to 85. That is a session option, and the one thing here that is not exact.

Threads do not spin while they wait. On two cores that other processes also want, the whole of a 6-layer network of
width 256 takes 11.0 ms so, and 25.9 ms with spinning; a machine of its own may gain from turning it on
(`open_session(folder, config={"session.intra_op.allow_spinning": "1"})`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from rewrite.targets.attention_layout import lay_out_attention
from rewrite.targets.gelu import raise_gelu
from rewrite.targets.projections import unpack_projections
from rewrite.targets.target import MOVES, Target

_NO_FLOAT64 = frozenset(
    {"Conv", "ConvTranspose", "Gelu", "Erf", "InstanceNormalization", "RotaryEmbedding", "GlobalAveragePool"}
    | {"AveragePool", "LeakyRelu", "Softplus", "HardSigmoid", "HardSwish", "Mish", "PRelu", "Elu", "Resize"}
)


class OrtCpu(Target):
    """ONNX Runtime's CPU execution provider."""

    name = "ort-cpu"
    device = "cpu"
    dtypes = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
    steps = (raise_gelu, unpack_projections, lay_out_attention)
    divisions = (unpack_projections,)
    kernels = frozenset(("weights", "weights-int8", "dynamic", "static"))
    # 768 × 3072, one row, blocks of 32, one core with AVX-512 and VNNI
    multiply_ns: Mapping[tuple[int, int], float] = {(0, 0): 0.47, (4, 0): 0.19, (2, 4): 0.13, (4, 4): 0.14, (8, 4): 0.2}
    costs: Mapping[str, float] = {"norm_ns": 0.38, "shift_ns": 0.26, "centring_ns": 0.47}

    def lacks(self, dtype: ir.DataType, node: ir.Node) -> bool:
        if dtype == ir.DataType.BFLOAT16:
            return node.op_type not in MOVES
        return dtype == ir.DataType.DOUBLE and node.op_type in _NO_FLOAT64

    def session(self) -> dict[str, Any]:
        return {
            "target": self.name,
            "providers": [["CPUExecutionProvider", {}]],
            "graph_optimization_level": "all",
            "config": {
                # Both fusions are slower than what they fuse, by up to 8 times (above).
                "optimization.disable_specified_optimizers": "SkipLayerNormFusion;BiasGeluFusion",
                "session.set_denormal_as_zero": "1",
                # Where codes of four bits are dequantized in front of a product, activations stay as they are.
                "session.qdq_matmulnbits_accuracy_level": "0",
                "session.intra_op.allow_spinning": "0",
            },
            "numerics": "results below 1.2e-38 in magnitude are flushed to zero",
        }
