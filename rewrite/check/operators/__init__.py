"""Definitions of the operators in float64, one small function each, in numpy.

They follow the text of the ONNX standard (and, in `contrib`, of ONNX Runtime's contributed operators), not a runtime's
kernels; only which code a number is rounded to is decided as kernels decide it (`quantization`). Importing this package
fills `TABLE`; what is not in it goes to `onnx.reference`, one node at a time.
"""

from rewrite.check.operators import (
    attention,
    contrib,
    contrib_quantization,
    control,
    convolution,
    elementwise,
    fused,
    layout,
    linear,
    normalization,
    quantization,
    reduction,
    resize,
    selection,
)
from rewrite.check.operators.registry import TABLE, Call, Operand, StoredIntegers, dense, normalized, operator_name

__all__ = ["TABLE", "Call", "Operand", "StoredIntegers", "dense", "normalized", "operator_name"]

_ = (
    attention,
    contrib,
    contrib_quantization,
    control,
    convolution,
    elementwise,
    fused,
    layout,
    linear,
    normalization,
    quantization,
    reduction,
    resize,
    selection,
)
