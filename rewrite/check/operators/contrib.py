"""ONNX Runtime's contributed operators, by their documented definitions.

Source: ONNX Runtime, docs/ContribOperators.md. Uses beyond what lowering emits (shared cache buffers, quantized caches,
packed batches) are refused rather than guessed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rewrite.check.operators.attention import causal_bias, masked_softmax, merge_heads, rotated, split_heads
from rewrite.check.operators.elementwise import gelu, gelu_tanh, sigmoid
from rewrite.check.operators.normalization import layer_norm, rms_norm
from rewrite.check.operators.registry import Call, operator

DOMAIN = "com.microsoft"
_SKIP_EPSILON = 1e-12


@operator("Gelu", domain=DOMAIN)
def gelu_operator(call: Call, x: np.ndarray) -> np.ndarray:
    return gelu(x)


@operator("BiasGelu", domain=DOMAIN)
def bias_gelu(call: Call, x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return gelu(x + bias)


@operator("FastGelu", domain=DOMAIN)
def fast_gelu(call: Call, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    return gelu_tanh(x if bias is None else x + bias)


@operator("QuickGelu", domain=DOMAIN)
def quick_gelu(call: Call, x: np.ndarray) -> np.ndarray:
    return x * sigmoid(call.real("alpha", 1.702) * x)


@operator("SkipLayerNormalization", domain=DOMAIN)
def skip_layer_normalization(call: Call, x, skip, gamma, beta: Any = None, bias: Any = None):
    total = x + skip if bias is None else x + skip + bias
    core, mean, inverse = layer_norm(total, (-1,), call.real("epsilon", _SKIP_EPSILON))
    return core * gamma if beta is None else core * gamma + beta, mean, inverse, total


@operator("SkipSimplifiedLayerNormalization", domain=DOMAIN)
def skip_simplified_layer_normalization(call: Call, x, skip, gamma, bias: Any = None):
    total = x + skip if bias is None else x + skip + bias
    core, inverse = rms_norm(total, (-1,), call.real("epsilon", _SKIP_EPSILON))
    return core * gamma, np.zeros_like(inverse), inverse, total


def _turned(call: Call, x, position_ids, cos, sin, interleaved: bool, dimension: int) -> np.ndarray:
    """x (b, s, heads, h) rotated at `position_ids`: (b, s), or (1,) for the position of the first token."""
    if position_ids.size == 1 and x.shape[1] != 1:
        position_ids = position_ids.reshape(1, 1) + np.arange(x.shape[1])[None, :]
    position_ids = position_ids.reshape(-1, x.shape[1])
    return rotated(x, cos[position_ids], sin[position_ids], interleaved, dimension)


@operator("RotaryEmbedding", domain=DOMAIN)
def rotary_embedding(call: Call, x: np.ndarray, position_ids: np.ndarray, cos: np.ndarray, sin: np.ndarray):
    """x (b, s, heads·h) or (b, heads, s, h); caches (positions, rotary/2)."""
    if call.attribute("is_packed_batching", 0):
        raise call.unsupported("with packed batches")
    dimension, heads = call.attribute("rotary_embedding_dim", 0), call.attribute("num_heads", 0)
    if x.ndim == 4:
        y = x.transpose(0, 2, 1, 3)
    else:
        head_size = x.shape[-1] // heads if heads else 2 * cos.shape[-1]
        y = x.reshape(*x.shape[:2], -1, head_size)
    y = _turned(call, y, position_ids, cos, sin, bool(call.attribute("interleaved", 0)), dimension)
    y = y * call.real("scale", 1.0)
    return y.transpose(0, 2, 1, 3) if x.ndim == 4 else y.reshape(x.shape)


@operator("MultiHeadAttention", domain=DOMAIN)
def multi_head_attention(
    call: Call,
    query,
    key: Any = None,
    value: Any = None,
    bias: Any = None,
    padding: Any = None,
    attention_bias: Any = None,
    past_key: Any = None,
    past_value: Any = None,
    past_length: Any = None,
    indirection: Any = None,
):
    """query (b, s, heads·h); key and value alike, or (b, heads, s, h) already split (cross attention)."""
    if query.ndim != 3 or key is None or key.ndim == 5 or past_length is not None or indirection is not None:
        raise call.unsupported("with packed projections or a shared cache")
    heads = call.attribute("num_heads")
    if bias is not None:
        hidden = query.shape[-1]
        query, key, value = (
            query + bias[:hidden],
            key + bias[hidden : 2 * hidden] if key.ndim == 3 else key,
            value + bias[2 * hidden :] if value.ndim == 3 else value,
        )
    q = split_heads(query, heads)
    k, v = (split_heads(x, heads) if x.ndim == 3 else x for x in (key, value))
    past = 0
    if past_key is not None:
        past = past_key.shape[2]
        k, v = np.concatenate((past_key, k), axis=2), np.concatenate((past_value, v), axis=2)
    total = np.zeros((1, 1)) if attention_bias is None else attention_bias
    if padding is not None:
        if padding.ndim == 1:
            padding = np.arange(k.shape[2])[None, :] < padding[:, None]
        filler = call.real("mask_filter_value", -10000.0)
        keep = padding.reshape(padding.shape[0], 1, -1, k.shape[2]) != 0
        total = total + np.where(keep, 0.0, filler)
    if call.attribute("unidirectional", 0):
        total = total + causal_bias(q.shape[2], k.shape[2], past, right=0)
    scale = call.real("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    scores = np.matmul(q, np.swapaxes(k, -1, -2)) * scale
    return merge_heads(np.matmul(masked_softmax(scores, total), v)), k, v, scores


@operator("GroupQueryAttention", domain=DOMAIN)
def group_query_attention(
    call: Call,
    query,
    key: Any,
    value: Any,
    past_key: Any,
    past_value: Any,
    seqlens_k,
    total_length,
    cos: Any = None,
    sin: Any = None,
    position_ids: Any = None,
    attention_bias: Any = None,
    head_sink: Any = None,
    *more,
):
    """Causal attention of grouped heads; `seqlens_k` (b,) is the number of keys of each sequence minus one.

    query (b, s, heads·h), or with key and value packed after it. Keys follow the past ones directly; a first prompt
    that is shorter than s is padded on the right.
    """
    if any(item is not None for item in more) or call.attribute("sliding_window_cache", 0):
        raise call.unsupported("with a quantized or sliding cache, or per-head norms")
    heads, groups = call.attribute("num_heads"), call.attribute("kv_num_heads")
    if key is None:
        size = query.shape[-1] // (heads + 2 * groups)
        query, key, value = np.split(query, [heads * size, (heads + groups) * size], axis=-1)
    b, s = query.shape[:2]
    q, k, v = (x.reshape(b, s, n, -1) for x, n in ((query, heads), (key, groups), (value, groups)))
    past = 0 if past_key is None else past_key.shape[2]
    lengths = np.reshape(seqlens_k, -1).astype(np.int64) + 1
    if past and np.any(lengths != past + s):
        raise call.unsupported("with sequences of different lengths after a cache")
    if call.attribute("do_rotary", 0):
        positions = past + np.arange(s)[None, :] + np.zeros((b, 1), np.int64) if position_ids is None else position_ids
        interleaved = bool(call.attribute("rotary_interleaved", 0))
        q, k = (_turned(call, x, positions, cos, sin, interleaved, 2 * cos.shape[-1]) for x in (q, k))
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    if past_key is not None and past_value is not None:
        k, v = np.concatenate((past_key, k), axis=2), np.concatenate((past_value, v), axis=2)
    present, keys = (k, v), k.shape[2]
    k, v = (np.repeat(x, heads // groups, axis=1) for x in (k, v))
    total = np.zeros((1, 1)) if attention_bias is None else attention_bias[..., :keys]
    window = call.attribute("local_window_size", -1)
    if call.attribute("causal", 1):
        total = total + causal_bias(s, keys, past, window - 1 if window > 0 else -1, 0)
    total = total + np.where(np.arange(keys) < lengths.reshape(-1, 1, 1, 1), 0.0, -np.inf)
    scale = call.real("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    scores = np.matmul(q, np.swapaxes(k, -1, -2)) * scale
    cap = call.real("softcap", 0.0)
    scores = cap * np.tanh(scores / cap) if cap else scores
    sink = None if head_sink is None else head_sink.reshape(1, -1, 1, 1)
    if call.attribute("smooth_softmax", 0) == 1 and sink is None:
        sink = np.zeros((1, 1, 1, 1))
    return merge_heads(np.matmul(masked_softmax(scores, total, sink), v)), *present
