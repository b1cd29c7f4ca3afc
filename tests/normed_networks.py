"""Small trained-looking networks with frozen batch norms and what is like them, for the passes that fold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VECTORS = "float[6] g, float[6] b, float[6] mean, float[6] var"
SPREAD: Mapping[str, Any] = {"var": [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]}
"""Variances that are positive, whatever is drawn for the rest."""

PLAIN = f"""
plain (float[B, 4, 6, 6] x, float[6, 2, 3, 3] k1, {VECTORS}, float[6, 6, 1, 1] k2, float[6] b2, float[6, 1, 2, 2] up)
    => (float[B, 6, 7, 7] y)
{{
    c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 2> (x, k1)
    n1 = BatchNormalization (c1, g, b, mean, var)
    r1 = Relu (n1)
    c2 = Conv <kernel_shape = [1, 1]> (r1, k2, b2)
    n2 = BatchNormalization (c2, b, g, mean, var)
    r2 = Tanh (n2)
    c3 = ConvTranspose <kernel_shape = [2, 2], group = 6> (r2, up)
    n3 = BatchNormalization (c3, g, mean, b, var)
    y = Sigmoid (n3)
}}
"""
"""Kernels with their norms behind them: grouped, with a bias, transposed and depthwise."""

IN_FRONT = f"""
in_front (float[B, 6, 6, 6] x, {VECTORS}, float[4, 3, 2, 2] k1, float[4] b1, float[6, 6, 3, 3] k2)
    => (float[B, 4, 5, 5] y, float[B, 6, 6, 6] z)
{{
    n1 = BatchNormalization (x, g, b, mean, var)
    c1 = Conv <kernel_shape = [2, 2], group = 2> (n1, k1, b1)
    y = Tanh (c1)
    h = Relu (x)
    n2 = BatchNormalization (h, b, g, mean, var)
    c2 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (n2, k2)
    z = Sigmoid (c2)
}}
"""
"""Norms in front of kernels, of which the second pads."""

TOKENS = f"""
tokens (float[B, 5, 4] x, float[4, 6] w, float[6] c, {VECTORS}, float[1] alpha, float[6, 6] q, float[6] qc,
        float[6, 6] k, float[6] s, float e, float[6, 3] head) => (float[B, 5, 3] y)
{{
    p = MatMul (x, w)
    a = Add (p, c)
    t = Transpose <perm = [0, 2, 1]> (a)
    n = BatchNormalization (t, g, b, mean, var)
    m = Mul (t, alpha)
    u = Add (n, m)
    h = Transpose <perm = [0, 2, 1]> (u)
    r = Gelu (h)
    t2 = Transpose <perm = [0, 2, 1]> (r)
    n2 = BatchNormalization <epsilon = 0.001> (t2, b, g, mean, var)
    m2 = Mul (alpha, t2)
    u2 = Add (m2, n2)
    h2 = Transpose <perm = [0, 2, 1]> (u2)
    query = MatMul (h2, q)
    queries = Add (query, qc)
    keys = MatMul (h2, k)
    product = Mul (queries, keys)
    f = Add (var, e)
    sigma = Sqrt (f)
    d = Div (product, sigma)
    o = Add (d, s)
    y = MatMul (o, head)
}}
"""
"""BN(x) + αx behind a matrix and in front of two, and a norm written out in front of a head."""

NORMED: Mapping[str, str] = {"plain": PLAIN, "in front": IN_FRONT, "tokens": TOKENS}
