"""Softmax and the norms.

x (..., d): LayerNorm(x) = γ⊙(x − μ)/√(σ² + ε) + β with the biased variance; RMSNorm(x) = γ⊙x/√(mean x² + ε).
Source: ONNX operator definitions; `SimplifiedLayerNormalization` is ONNX Runtime's name for RMSNormalization.
"""

from __future__ import annotations

import numpy as np

from rewrite.check.operators.registry import Call, operator


def softmax(x: np.ndarray, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    """exp(x)/Σexp(x), shifted by the row's maximum. A row of −∞ only gives NaN, as the definition does."""
    shifted = x - np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    powers = np.exp(shifted)
    return powers / np.sum(powers, axis=axis, keepdims=True)


def _softmax_axes(call: Call, rank: int) -> tuple[int, ...]:
    """One axis; before opset 13 all axes from `axis` on, taken together."""
    if call.version >= 13:
        return (call.attribute("axis", -1),)
    axis = call.attribute("axis", 1)
    return tuple(range(axis + rank if axis < 0 else axis, rank))


@operator("Softmax")
def softmax_operator(call: Call, x: np.ndarray) -> np.ndarray:
    return softmax(x, _softmax_axes(call, x.ndim))


@operator("LogSoftmax")
def log_softmax(call: Call, x: np.ndarray) -> np.ndarray:
    axes = _softmax_axes(call, x.ndim)
    shifted = x - np.max(x, axis=axes, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=axes, keepdims=True))


def layer_norm(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x − μ)/√(σ² + ε) over `axes`, with μ and 1/√(σ² + ε), both with the axes kept."""
    mean = np.mean(x, axis=axes, keepdims=True)
    centred = x - mean
    inverse = 1 / np.sqrt(np.mean(centred * centred, axis=axes, keepdims=True) + epsilon)
    return centred * inverse, mean, inverse


def rms_norm(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """x/√(mean x² + ε) over `axes`, with 1/√(mean x² + ε), its axes kept."""
    inverse = 1 / np.sqrt(np.mean(x * x, axis=axes, keepdims=True) + epsilon)
    return x * inverse, inverse


def _suffix(call: Call, rank: int) -> tuple[int, ...]:
    """The axes from attribute `axis` to the last."""
    axis = call.attribute("axis", -1)
    return tuple(range(axis + rank if axis < 0 else axis, rank))


@operator("LayerNormalization")
def layer_normalization(call: Call, x: np.ndarray, scale: np.ndarray, bias: np.ndarray | None = None):
    core, mean, inverse = layer_norm(x, _suffix(call, x.ndim), call.real("epsilon", 1e-5))
    return core * scale if bias is None else core * scale + bias, mean, inverse


@operator("RMSNormalization")
@operator("SimplifiedLayerNormalization")
@operator("SimplifiedLayerNormalization", domain="com.microsoft")
def rms_normalization(call: Call, x: np.ndarray, scale: np.ndarray):
    core, inverse = rms_norm(x, _suffix(call, x.ndim), call.real("epsilon", 1e-5))
    return core * scale, inverse


def _per_channel(vector: np.ndarray, rank: int) -> np.ndarray:
    return vector.reshape(1, -1, *[1] * (rank - 2))


@operator("BatchNormalization")
def batch_normalization(call: Call, x: np.ndarray, scale, bias, mean, variance) -> tuple[np.ndarray, ...]:
    """γ(x − μ)/√(σ² + ε) + β with the stored μ and σ², or with those of the batch in training mode."""
    if call.attribute("training_mode", 0):
        axes = (0, *range(2, x.ndim))
        momentum, current = call.real("momentum", 0.9), (x.mean(axes), x.var(axes))
        kept = [momentum * old + (1 - momentum) * new for old, new in zip((mean, variance), current)]
        mean, variance = current
    else:
        kept = []
    inverse = 1 / np.sqrt(variance + call.real("epsilon", 1e-5))
    scaled = (x - _per_channel(mean, x.ndim)) * _per_channel(scale * inverse, x.ndim)
    return (scaled + _per_channel(bias, x.ndim), *kept)


@operator("InstanceNormalization")
def instance_normalization(call: Call, x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    core, _, _ = layer_norm(x, tuple(range(2, x.ndim)), call.real("epsilon", 1e-5))
    return core * _per_channel(scale, x.ndim) + _per_channel(bias, x.ndim)


@operator("GroupNormalization")
def group_normalization(call: Call, x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Per group of channels; γ and β are per channel since opset 21, per group before."""
    groups = call.attribute("num_groups")
    grouped = x.reshape(x.shape[0], groups, -1)
    core = layer_norm(grouped, (2,), call.real("epsilon", 1e-5))[0].reshape(x.shape)
    if call.version < 21:
        scale, bias = (np.repeat(vector, x.shape[1] // groups) for vector in (scale, bias))
    return core * _per_channel(scale, x.ndim) + _per_channel(bias, x.ndim)


@operator("LpNormalization")
def lp_normalization(call: Call, x: np.ndarray) -> np.ndarray:
    axis, p = call.attribute("axis", -1), call.attribute("p", 2)
    norm = np.linalg.norm(x, ord=p, axis=axis, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm != 0)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(call: Call, x: np.ndarray) -> np.ndarray:
    """(x − μ)/(σ + 1e-9) over `axes`."""
    axes = tuple(call.attribute("axes", (0, 2, 3)))
    centred = x - np.mean(x, axis=axes, keepdims=True)
    return centred / (np.sqrt(np.mean(centred * centred, axis=axes, keepdims=True)) + 1e-9)
