"""Operators that ONNX Runtime's optimizer makes of a linear one and the activation behind it.

Source: ONNX Runtime, docs/ContribOperators.md, com.microsoft.FusedGemm and com.microsoft.FusedConv.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rewrite.check.operators.convolution import conv
from rewrite.check.operators.elementwise import sigmoid
from rewrite.check.operators.linear import gemm
from rewrite.check.operators.registry import Call, Operand, operator

DOMAIN = "com.microsoft"

ACTIVATIONS: dict[str, tuple[int, Callable[..., np.ndarray]]] = {
    "Relu": (0, lambda x: np.maximum(x, 0)),
    "Sigmoid": (0, sigmoid),
    "Softplus": (0, lambda x: np.logaddexp(x, 0)),
    "Softsign": (0, lambda x: x / (1 + np.abs(x))),
    "Tanh": (0, np.tanh),
    "LeakyRelu": (1, lambda x, alpha: np.where(x < 0, alpha * x, x)),
    "HardSigmoid": (2, lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1)),
    "Clip": (2, lambda x, low, high: np.minimum(np.maximum(x, low), high)),
}
"""Each activation's number of parameters, and the function."""


def activated(call: Call, x: np.ndarray) -> np.ndarray:
    """`x` after the node's activation. Raises `UnsupportedOperatorError` for one that is not documented fully."""
    name = call.attribute("activation", "")
    if not name:
        return x
    given = call.attribute("activation_params")
    if given is None:
        each = [call.real(f"activation_{which}") for which in ("alpha", "beta", "gamma")]
        given = [value for value in each if value is not None]
    count, function = ACTIVATIONS.get(name, (-1, np.tanh))
    if len(given) != count:
        raise call.unsupported(f"with activation {name} and {len(given)} parameters")
    return function(x, *(float(np.float32(value)) for value in given)).astype(x.dtype)


@operator("FusedGemm", domain=DOMAIN, lazy=True)
def fused_gemm(call: Call, a: Operand, b: Operand, c: Operand = None) -> np.ndarray:
    return activated(call, np.asarray(gemm(call, a, b, c)))


@operator("FusedConv", domain=DOMAIN)
def fused_conv(
    call: Call, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None, z: np.ndarray | None = None
) -> np.ndarray:
    """f(conv(x, w) + bias + z); z has the result's shape."""
    y = np.asarray(conv(call, x, w, bias))
    return activated(call, y if z is None else y + z)
