"""Attention and rotary position embedding.

Source: ONNX operator definitions of Attention (opset 23 to 25) and RotaryEmbedding (opset 23). A query whose every key
is masked gives a zero row (the standard's erratum, and what runtimes do), not NaN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rewrite.check.operators.registry import Call, operator


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool, dimension: int = 0) -> np.ndarray:
    """x (b, s, heads, h) with its first `dimension` channels (0: all) rotated; cos and sin (b or 1, s, dimension/2).

    Pairs are (i, i + dimension/2), or (2i, 2i + 1) where `interleaved`.
    """
    dimension = dimension or x.shape[-1]
    turning, resting = x[..., :dimension], x[..., dimension:]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    if interleaved:
        even, odd = turning[..., 0::2], turning[..., 1::2]
    else:
        even, odd = turning[..., : dimension // 2], turning[..., dimension // 2 :]
    real, imaginary = cos * even - sin * odd, sin * even + cos * odd
    if interleaved:
        turned = np.stack((real, imaginary), axis=-1).reshape(turning.shape)
    else:
        turned = np.concatenate((real, imaginary), axis=-1)
    return np.concatenate((turned, resting), axis=-1)


@operator("RotaryEmbedding")
def rotary_embedding(call: Call, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, position_ids=None) -> np.ndarray:
    """x (b, heads, s, h), or (b, s, heads·h) with `num_heads`."""
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    flat = x.ndim == 3
    heads = call.attribute("num_heads", 0)
    y = x.reshape(*x.shape[:2], heads, -1) if flat else x.transpose(0, 2, 1, 3)
    dimension = call.attribute("rotary_embedding_dim", 0)
    y = rotated(y, cos, sin, bool(call.attribute("interleaved", 0)), dimension)
    return y.reshape(x.shape) if flat else y.transpose(0, 2, 1, 3)


def split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """(b, s, heads·h) → (b, heads, s, h)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def merge_heads(x: np.ndarray) -> np.ndarray:
    """(b, heads, s, h) → (b, s, heads·h)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def masked_softmax(scores: np.ndarray, bias: np.ndarray, sink: np.ndarray | None = None) -> np.ndarray:
    """softmax(scores + bias) over keys, a zero row where the bias is −∞ for every key.

    `sink` (broadcast over rows) is one more logit per row that takes probability but has no value.
    """
    total = scores + bias.astype(scores.dtype)
    top = np.max(total, axis=-1, keepdims=True, initial=-np.inf)
    top = top if sink is None else np.maximum(top, sink)
    blocked = np.broadcast_to(np.isneginf(np.max(bias, axis=-1, keepdims=True, initial=-np.inf)), top.shape)
    powers = np.exp(total - np.where(np.isneginf(top), 0, top))
    norm = np.sum(powers, axis=-1, keepdims=True)
    norm = norm if sink is None else norm + np.exp(sink - top)
    return np.where(blocked, 0, powers / np.where(blocked, 1, norm))


def causal_bias(queries: int, keys: int, offset: np.ndarray | int, left: int = -1, right: int = -1) -> np.ndarray:
    """0 where query i may see key j, −∞ elsewhere: i + offset − left ≤ j ≤ i + offset + right, −1 for no bound.

    Shape (queries, keys), or (b, 1, queries, keys) for an offset per sequence (b,).
    """
    shift = np.reshape(offset, (-1, 1, 1, 1)) if np.ndim(offset) else offset
    distance = np.arange(keys)[None, :] - np.arange(queries)[:, None] - shift
    seen = np.ones(distance.shape, bool)
    if right >= 0:
        seen &= distance <= right
    if left >= 0:
        seen &= distance >= -left
    return np.where(seen, 0.0, -np.inf)


@operator("Attention")
def attention(
    call: Call,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    past_key: np.ndarray | None = None,
    past_value: Any = None,
    valid_keys: np.ndarray | None = None,
):
    """softmax(softcap(s·q·kᵀ) + bias)·v; q (b, heads, s, h) or (b, s, heads·h), k and v with their own head count."""
    flat = q.ndim == 3
    if flat:
        q = split_heads(q, call.attribute("q_num_heads"))
        k, v = (split_heads(x, call.attribute("kv_num_heads")) for x in (k, v))
    past = 0
    if past_key is not None:
        past = past_key.shape[2]
        k, v = np.concatenate((past_key, k), axis=2), np.concatenate((past_value, v), axis=2)
    present = (k, v)
    queries, keys = q.shape[2], k.shape[2]

    bias = _bias_of(mask, keys)
    offset = past if valid_keys is None else np.reshape(valid_keys, -1) - queries
    left, right = call.attribute("left_window_size", -1), call.attribute("right_window_size", -1)
    if call.attribute("is_causal", 0):
        bias = bias + causal_bias(queries, keys, offset, right=0)
    if left >= 0 or right >= 0:
        bias = bias + causal_bias(queries, keys, offset, left, right)
    if valid_keys is not None:
        inside = np.arange(keys) < np.reshape(valid_keys, (-1, 1, 1, 1))
        bias = bias + np.where(inside, 0.0, -np.inf)

    repeats = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, repeats, axis=1) if repeats > 1 else x for x in (k, v))
    scale = call.real("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    raw = np.matmul(q * scale, np.swapaxes(k, -1, -2))
    cap = call.real("softcap", 0.0)
    capped = cap * np.tanh(raw / cap) if cap else raw
    probabilities = masked_softmax(capped, bias)
    output = np.matmul(probabilities, v)
    output = merge_heads(output) if flat else output
    if not call.wants(3):
        return output, *present
    shown = (raw, capped, capped + bias, probabilities)[_shown_stage(call)]
    return output, *present, shown


def _bias_of(mask: np.ndarray | None, keys: int) -> np.ndarray:
    """The additive form of a mask, padded with −∞ to the number of keys."""
    if mask is None:
        return np.zeros((1, 1))
    bias = np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask
    missing = keys - bias.shape[-1]
    if missing > 0 and bias.shape[-1] > 1:
        bias = np.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(0, missing)], constant_values=-np.inf)
    return bias


def _shown_stage(call: Call) -> int:
    """Which stage the fourth output shows: raw, capped, biased, probabilities.

    Opset 23 first numbered "biased" 1 and "capped" 2; the current text, which this follows, has them the other way.
    """
    return call.attribute("qk_matmul_output_mode", 0)
