"""Networks of one attention, written as ONNX text: every way in which heads are projected, shared, turned and joined.

4 query heads and 2 key-value heads of 4 channels on a stream of 8, unless said otherwise. Batch and sequence are
dynamic where the text can say so.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from networks import network

from rewrite.ir.program import Program

SEPARATE = """
    q0 = MatMul (x, wq)
    q1 = Add (q0, bq)
    q2 = Reshape (q1, by4)
    q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k0 = MatMul (x, wk)
    k1 = Add (k0, bk)
    k2 = Reshape (k1, by2)
    k = Transpose <perm = [0, 2, 1, 3]> (k2)
    v0 = MatMul (x, wv)
    v1 = Add (v0, bv)
    v2 = Reshape (v1, by2)
    v = Transpose <perm = [0, 2, 1, 3]> (v2)
"""
"""Three projections with biases; two query heads share a key-value head."""

FUSED = """
    a0 = MatMul (x, w)
    a1 = Add (a0, b)
    q1, k1, v1 = Split <axis = 2> (a1, thirds)
    q2 = Reshape (q1, by4)
    q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k2 = Reshape (k1, by2)
    k = Transpose <perm = [0, 2, 1, 3]> (k2)
    v2 = Reshape (v1, by2)
    v = Transpose <perm = [0, 2, 1, 3]> (v2)
"""
"""One matrix of three parts."""

INTERLEAVED = """
    a0 = MatMul (x, w)
    a1 = Add (a0, b)
    a2 = Reshape (a1, by12)
    a3 = Transpose <perm = [0, 2, 1, 3]> (a2)
    q, k, v = Split <axis = 3> (a3, fours)
"""
"""One matrix that holds query, key and value of one head after another (every query head has a key-value head)."""

GROUPED = """
    a0 = MatMul (x, w)
    a1 = Add (a0, b)
    a2 = Reshape (a1, groups)
    q2 = Slice (a2, zero, minus2, three)
    v3 = Gather <axis = 3> (a2, last)
    v2 = Squeeze (v3, three)
    q3 = Reshape (q2, by4)
    q = Transpose <perm = [0, 2, 1, 3]> (q3)
    k2 = Gather <axis = 3> (a2, key_place)
    k = Transpose <perm = [0, 2, 1, 3]> (k2)
    v = Transpose <perm = [0, 2, 1, 3]> (v2)
"""
"""One matrix that holds, group by group, two query heads, their key head and their value head."""

ATTENTION = "    o = Attention (qr, kr, v)\n"

HALF = """
    {0}a = Slice ({0}, zero, half, three)
    {0}b = Slice ({0}, half, end, three)
    {0}n = Neg ({0}b)
    {0}t = Concat <axis = -1> ({0}n, {0}a)
    {0}c = Mul ({0}, cos)
    {0}s = Mul ({0}t, sin)
    {0}r = Add ({0}c, {0}s)
"""
"""Rotary positions of pairs (i, i + 2)."""

PAIRS = """
    {0}a = Slice ({0}, zero, end, three, two)
    {0}b = Slice ({0}, one, end, three, two)
    {0}n = Neg ({0}b)
    {0}e = Unsqueeze ({0}n, last)
    {0}f = Unsqueeze ({0}a, last)
    {0}g = Concat <axis = -1> ({0}e, {0}f)
    {0}t = Reshape ({0}g, as_before)
    {0}c = Mul ({0}, cos)
    {0}s = Mul ({0}t, sin)
    {0}r = Add ({0}c, {0}s)
"""
"""Rotary positions of pairs (2i, 2i + 1)."""

PARTIAL = """
    {0}p = Slice ({0}, zero, half, three)
    {0}f = Slice ({0}, half, end, three)
    {0}a = Slice ({0}p, zero, one, three)
    {0}b = Slice ({0}p, one, end, three)
    {0}n = Neg ({0}b)
    {0}t = Concat <axis = -1> ({0}n, {0}a)
    {0}c = Mul ({0}p, cos2)
    {0}s = Mul ({0}t, sin2)
    {0}g = Add ({0}c, {0}s)
    {0}r = Concat <axis = -1> ({0}g, {0}f)
"""
"""Rotary positions of the first two channels, (0, 1); the other two are not rotated."""

PLAIN = "    {0}r = Identity ({0})\n"
"""No rotary positions."""

ANGLES = {
    HALF: """    twice = Concat <axis = -1> (angles, angles)
    cos = Cos (twice)
    sin = Sin (twice)
""",
    PAIRS: """    more = Unsqueeze (angles, last)
    twin = Concat <axis = -1> (more, more)
    twice = Reshape (twin, as_before)
    cos = Cos (twice)
    sin = Sin (twice)
""",
    PARTIAL: """    twice = Concat <axis = -1> (angles, angles)
    cos2 = Cos (twice)
    sin2 = Sin (twice)
""",
    PLAIN: "",
}
"""What rotary positions are computed from."""

JOIN = """
    o2 = Transpose <perm = [0, 2, 1, 3]> (o)
    o3 = Reshape (o2, joined)
    y0 = MatMul (o3, wo)
    y = Add (y0, bo)
"""
"""Heads side by side into the output projection."""

WEIGHTS = {
    **{"wq": "float[8, 16]", "bq": "float[16]", "wk": "float[8, 8]", "bk": "float[8]", "wv": "float[8, 8]"},
    **{"bv": "float[8]", "w": "float[8, 32]", "b": "float[32]", "wo": "float[16, 8]", "bo": "float[8]"},
}

NUMBERS = {
    **{
        "by4": "0, 0, 4, 4",
        "by2": "0, 0, 2, 4",
        "by12": "0, 0, 4, 12",
        "groups": "0, 0, 2, 4, 4",
        "joined": "0, 0, 16",
    },
    **{"thirds": "16, 8, 8", "fours": "4, 4, 4", "zero": "0", "one": "1", "two": "2", "three": "3", "half": "2"},
    **{"minus2": "-2", "last": "-1", "end": "9223372036854775807", "as_before": "0, 0, 0, 4"},
}


def attention(
    projection: str = SEPARATE,
    rotary: str = HALF,
    core: str = ATTENTION,
    join: str = JOIN,
    *,
    inputs: str = "",
    outputs: str = "",
    weights: dict[str, str] | None = None,
    numbers: dict[str, str] | None = None,
    shape: str = "B, S",
) -> str:
    """The text of a network; only the weights that its lines read are declared."""
    body = projection + rotary.format("q") + rotary.format("k") + core + join
    words = set(re.findall(r"\w+", body))
    fused = {"w": "float[8, 48]", "b": "float[48]"} if projection is INTERLEAVED else {}
    kinds = {**WEIGHTS, **fused, **(weights or {})}
    declared = ", ".join(f"{kind} {name}" for name, kind in kinds.items() if name in words)
    constants = "".join(
        f"    {name} = Constant <value_ints = [{content}]> ()\n"
        for name, content in {**NUMBERS, **(numbers or {})}.items()
        if name in words or name in ANGLES[rotary]
    )
    if "key_place" in words:
        constants += "    key_place = Constant <value_int = 2> ()\n"
    if ANGLES[rotary]:
        inputs += f", float[1, 1, {shape.split(', ')[1]}, {1 if rotary is PARTIAL else 2}] angles"
    return f"""
heads (float[{shape}, 8] x{inputs}, {declared}) => (float[{shape}, 8] y{outputs})
{{
{constants}{ANGLES[rotary]}{body}
}}
"""


def program(text: str, **options: Any) -> Program:
    """The network of a text with random weights."""
    names = ("x", "angles", "gate", "past")
    return network(text, [name for name in names if re.search(rf"\] {name}[,)]", text)], **options)


def fed(program: Program, rows: int = 2, columns: int = 5) -> dict[str, np.ndarray]:
    """Random inputs of one batch and one sequence length."""
    generator, sizes = np.random.default_rng(0), {"B": rows, "S": columns}
    shapes = {
        one.name: [sizes[size] if isinstance(size, str) else size for size in one.shape] for one in program.inputs
    }
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


EAGER = """
    flipped = Transpose <perm = [0, 1, 3, 2]> (kr)
    ku = Unsqueeze (flipped, two)
    ke = Expand (ku, twice_k)
    kk = Reshape (ke, heads_k)
    vu = Unsqueeze (v, two)
    ve = Expand (vu, twice_v)
    vv = Reshape (ve, heads_v)
    l = MatMul (qr, kk)
    p = Softmax (l)
    o = MatMul (p, vv)
"""
"""Attention written out, keys and values repeated for the query heads that share them (batch 2, sequence 5)."""

EAGER_NUMBERS = {
    **{"twice_k": "1, 1, 2, 1, 1", "heads_k": "2, 4, 4, 5", "twice_v": "1, 1, 2, 1, 1", "heads_v": "2, 4, 5, 4"},
}

NETWORKS = {
    "grouped queries, half-split rotary": attention(),
    "no rotary": attention(rotary=PLAIN),
    "pairs side by side": attention(rotary=PAIRS),
    "partial rotary": attention(rotary=PARTIAL),
    "one matrix of three parts": attention(FUSED),
    "one matrix, head by head": attention(INTERLEAVED),
    "one matrix, group by group": attention(GROUPED),
    "written out": attention(core=EAGER, shape="2, 5", numbers=EAGER_NUMBERS),
}
"""Where every pass over heads applies."""
