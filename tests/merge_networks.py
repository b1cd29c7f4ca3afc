"""Networks of affine operators in a row and side by side, each with the operators that are left of it."""

from __future__ import annotations

import numpy as np

REPVGG = """
repvgg (float[N, 4, 6, 7] x, float[4, 4, 3, 3] k3, float[4] b3, float[4, 4, 1, 1] k1, float[4] g1, float[4] c1,
        float[4] m1, float[4] v1, float[4] g, float[4] c, float[4] m, float[4] v) => (float[N, 4, 6, 7] y)
{
    d = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k3, b3)
    p = Conv <kernel_shape = [1, 1]> (x, k1)
    pn = BatchNormalization (p, g1, c1, m1, v1)
    n = BatchNormalization (x, g, c, m, v)
    s = Add (d, pn)
    t = Add (n, s)
    y = Relu (t)
}
"""

ACNET = """
acnet (float[N, 3, 6, 7] x, float[5, 3, 3, 3] k3, float[5] b3, float[5, 3, 1, 3] kh, float[5, 3, 3, 1] kv, float[5] bv)
    => (float[N, 5, 3, 4] y)
{
    d = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (x, k3, b3)
    h = Conv <kernel_shape = [1, 3], pads = [0, 1, 0, 1], strides = [2, 2]> (x, kh)
    v = Conv <kernel_shape = [3, 1], auto_pad = "SAME_LOWER", strides = [2, 2]> (x, kv, bv)
    s = Sub (d, h)
    y = Sum (s, v)
}
"""

DBB = """
dbb (float[N, 4, 8, 8] x, float[6, 4, 3, 3] k, float[6] kb, float[6, 4, 1, 1] o, float[6] ob, float[6, 6, 3, 3] l,
     float[6, 4, 1, 1] q, float[3, 4, 1, 1] narrow, float[6, 3, 3, 3] wide, float[6] wb, float[6] g)
    => (float[N, 6, 6, 6] y)
{
    a = Conv <kernel_shape = [3, 3]> (x, k, kb)
    b1 = Conv <kernel_shape = [1, 1]> (x, o, ob)
    b2 = BatchNormalization (b1, g, ob, kb, g)
    b = Conv <kernel_shape = [3, 3]> (b2, l)
    c1 = Conv <kernel_shape = [1, 1]> (x, q, wb)
    c = AveragePool <kernel_shape = [3, 3]> (c1)
    d1 = Conv <kernel_shape = [1, 1]> (x, narrow)
    d = Conv <kernel_shape = [3, 3]> (d1, wide, wb)
    y = Sum (a, b, c, d)
}
"""

MOBILEONE = """
mobileone (float[N, 4, 9] x, float[4, 1, 3] k, float[4, 1, 3] l, float[4] bl, float[4, 1, 1] o, float[4] g, float[4] c,
           float[4] m, float[4] v, float[4, 2, 3] halves, float[4, 1] f) => (float[N, 4, 9] y)
{
    a = Conv <kernel_shape = [3], pads = [1, 1], group = 4> (x, k)
    b = Conv <kernel_shape = [3], pads = [2, 2], dilations = [2], group = 4> (x, l, bl)
    e = Conv <kernel_shape = [1], group = 4> (x, o)
    n = BatchNormalization (x, g, c, m, v)
    i = AveragePool <kernel_shape = [3], pads = [1, 1], count_include_pad = 1> (x)
    j = Mul (i, f)
    h = Conv <kernel_shape = [3], pads = [1, 1], group = 2> (x, halves)
    y = Sum (a, b, e, n, j, f, h)
}
"""

CUBES = """
cubes (float[N, 2, 5, 4, 6] x, float[2, 2, 3, 3, 3] k, float[2, 2, 1, 1, 1] p, float[2, 2, 3, 1, 1] t)
    => (float[N, 2, 5, 4, 6] y)
{
    a = Conv <kernel_shape = [3, 3, 3], pads = [1, 1, 1, 1, 1, 1]> (x, k)
    b = Conv (x, p)
    c = Conv <auto_pad = "SAME_UPPER"> (x, t)
    s = Add (a, x)
    u = Add (b, c)
    y = Sub (s, u)
}
"""

LORA = """
lora (float[N, 3, 16] x, float[16, 12] w, float[12] b, float[16, 2] a, float[2, 12] u, float[1] s)
    => (float[N, 3, 12] y)
{
    h = MatMul (x, w)
    hb = Add (h, b)
    r = MatMul (x, a)
    o = MatMul (r, u)
    q = Mul (o, s)
    y = Add (hb, q)
}
"""

PARALLEL = """
parallel (float[N, 3, 8] x, float[N, 3, 8] z, float[8, 8] w, float[8] b, float[8, 8] w2, float[8] b2)
    => (float[N, 3, 8] y)
{
    h = MatMul (x, w)
    hb = Add (h, b)
    r = MatMul (x, w2)
    rb = Add (b2, r)
    q = Sub (z, hb)
    t = Add (q, rb)
    u = Sub (t, x)
    y = Tanh (u)
}
"""

BLOCKS = {
    "repvgg": (REPVGG, ["Conv", "Relu"], {"v": [0.5, 1.0, 2.0, 3.0], "v1": [0.3, 1.0, 2.0, 0.7]}),
    "acnet": (ACNET, ["Conv"], {}),
    "dbb": (DBB, ["Conv"], {"g": [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]}),
    "mobileone": (MOBILEONE, ["Conv"], {"v": [0.5, 1.0, 2.0, 3.0]}),
    "cubes": (CUBES, ["Conv"], {}),
    "lora": (LORA, ["MatMul", "Add"], {}),
    "parallel linears": (PARALLEL, ["MatMul", "Add", "Add", "Tanh"], {}),
}
"""Name → text, operators afterwards, weights that are not random."""

PAIRS = {
    "linears with biases": (
        """linears (float[N, 3, 8] x, float[8, 6] w, float[6] b, float[6, 12] w2, float[12] b2, float[12, 5] w3)
            => (float[N, 3, 5] y)
        { h = MatMul (x, w) hb = Add (h, b) r = MatMul (hb, w2) rb = Add (b2, r) y = MatMul (rb, w3) }""",
        ["MatMul", "Add"],
    ),
    "arithmetic between": (
        """between (float[N, 3, 8] x, float[8, 6] w, float[6] s, float[6] t, float[6, 5] v) => (float[N, 3, 5] y)
        {
            two = Constant <value_float = 2.0> ()
            h = MatMul (x, w) a = Mul (s, h) b = Sub (t, a) c = Neg (b) d = Div (c, two) e = Sub (d, two)
            y = MatMul (e, v)
        }""",
        ["MatMul", "Add"],
    ),
    "3×3 before 1×1": (
        """wide (float[N, 3, 8, 9] x, float[6, 3, 3, 3] k, float[6] b, float[4, 6, 1, 1] l, float[4] c)
            => (float[N, 4, 4, 5] y)
        {
            h = Conv <kernel_shape = [3, 3], pads = [1, 2, 1, 0]> (x, k, b)
            y = Conv <kernel_shape = [1, 1], strides = [2, 2]> (h, l, c)
        }""",
        ["Conv"],
    ),
    "1×1 before padded 3×3": (
        """late (float[N, 3, 8, 9] x, float[6, 3, 1, 1] k, float[6] g, float[6] z, float[6] m, float[6] v,
                 float[4, 6, 3, 3] l, float[4] c) => (float[N, 4, 8, 9] y)
        {
            h = Conv <kernel_shape = [1, 1]> (x, k)
            n = BatchNormalization <epsilon = 0.0> (h, g, z, m, v)
            y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (n, l, c)
        }""",
        ["Conv"],
    ),
    "1×1 with a bias before 3×3 without padding": (
        """valid (float[N, 3, 8, 9] x, float[6, 3, 1, 1] k, float[6] b, float[4, 6, 3, 3] l, float[4] c)
            => (float[N, 4, 6, 7] y)
        { h = Conv <kernel_shape = [1, 1]> (x, k, b) y = Conv <kernel_shape = [3, 3]> (h, l, c) }""",
        ["Conv"],
    ),
    "1×1 before an average pool": (
        """pooled (float[N, 3, 8, 9] x, float[6, 3, 1, 1] k, float[6] b) => (float[N, 6, 6, 7] y)
        { h = Conv <kernel_shape = [1, 1]> (x, k, b) y = AveragePool <kernel_shape = [3, 3]> (h) }""",
        ["Conv"],
    ),
    "zero padding between": (
        """padded (float[N, 3, 8, 9] x, float[6, 3, 1, 1] k, float[4, 6, 3, 3] l) => (float[N, 4, 9, 8] y)
        {
            h = Conv <kernel_shape = [1, 1]> (x, k)
            amounts = Constant <value_ints = [2, 0, 1, 1]> ()
            axes = Constant <value_ints = [-2, 3]> ()
            p = Pad (h, amounts, , axes)
            y = Conv <kernel_shape = [3, 3]> (p, l)
        }""",
        ["Conv"],
    ),
    "a crop between": (
        """cropped (float[N, 3, 8] x, float[6, 3, 3] k, float[6] b, float[4, 6, 1] l) => (float[N, 4, 5] y)
        {
            h = Conv <kernel_shape = [3], pads = [1, 1]> (x, k, b)
            amounts = Constant <value_ints = [0, 0, -2, 0, 0, -1]> ()
            p = Pad (h, amounts)
            y = Conv <kernel_shape = [1]> (p, l)
        }""",
        ["Conv"],
    ),
    "groups": (
        """groups (float[N, 8, 20] x, float[12, 4, 1] k, float[12] b, float[12] f, float[4, 6, 3] l)
            => (float[N, 4, 18] y)
        {
            h = Conv <kernel_shape = [1], group = 2> (x, k, b)
            n = BatchNormalization (h, f, f, b, f)
            y = Conv <kernel_shape = [3], group = 2> (n, l)
        }""",
        ["Conv"],
    ),
    "fewer groups": (
        """fewer (float[N, 8, 20] x, float[12, 2, 1] k, float[12] b, float[4, 6, 3] l) => (float[N, 4, 18] y)
        { h = Conv <kernel_shape = [1], group = 4> (x, k, b) y = Conv <kernel_shape = [3], group = 2> (h, l) }""",
        ["Conv"],
    ),
    "a matrix, a Transpose and 1×1": (
        """moved (float[N, 5, 8] x, float[8, 6] w, float[6] b, float[4, 6, 1] l, float[4] c) => (float[N, 4, 5] y)
        {
            h = MatMul (x, w) hb = Add (h, b)
            t = Transpose <perm = [0, 2, 1]> (hb)
            y = Conv <kernel_shape = [1]> (t, l, c)
        }""",
        ["MatMul", "Add", "Transpose"],
    ),
    "a kernel, a Transpose and a matrix": (
        """moved (float[N, 3, 8, 9] x, float[6, 3, 3, 3] k, float[6] b, float[6] f, float[6, 5] l, float[5] c)
            => (float[N, 4, 5, 5] y)
        {
            h = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (x, k, b)
            n = BatchNormalization (h, f, f, b, f)
            t = Transpose <perm = [0, 2, 3, 1]> (n)
            m = Mul (t, f)
            p = MatMul (m, l)
            y = Add (p, c)
        }""",
        ["Conv", "Transpose"],
    ),
    "three, one through a Transpose": (
        """three (float[N, 5, 8] x, float[8, 9] u, float[9, 6] w, float[6] b, float[4, 6, 1] l) => (float[N, 4, 5] y)
        {
            a = MatMul (x, u) h = MatMul (a, w) hb = Add (h, b)
            t = Transpose <perm = [0, 2, 1]> (hb)
            y = Conv <kernel_shape = [1]> (t, l)
        }""",
        ["MatMul", "Add", "Transpose"],
    ),
}

PAIR_WEIGHTS = {
    "groups": {"f": np.linspace(0.5, 2.0, 12)},
    "a kernel, a Transpose and a matrix": {"f": np.linspace(0.5, 2.0, 6)},
    # A norm that shifts nothing: β = 0 and μ = 0.
    "1×1 before padded 3×3": {"v": np.linspace(0.5, 2.0, 6), "z": np.zeros(6), "m": np.zeros(6)},
}
