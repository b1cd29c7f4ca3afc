"""What passes over heads must refuse: networks that break one requirement each, and the traps that caught others.

`VALUES` and `VALUE_TRAPS` are about values and the output projection, `LOGITS` and `LOGIT_TRAPS` about queries and
keys. What a diagonal passes and a rotation does not stands in the tests of those passes.
"""

from __future__ import annotations

from head_networks import HALF, JOIN, PLAIN, SEPARATE, attention
from refusals import Case

ANGLED = ("x", "angles")

ONE_CHANNEL = attention(
    rotary=PLAIN,
    weights={
        **{"wq": "float[8, 4]", "bq": "float[4]", "wk": "float[8, 2]", "bk": "float[2]"},
        **{"wv": "float[8, 2]", "bv": "float[2]", "wo": "float[4, 8]"},
    },
    numbers={"by4": "0, 0, 4, 1", "by2": "0, 0, 2, 1", "joined": "0, 0, 4"},
)

STACKED = attention(
    """
    first = Constant <value_int = 0> ()
    second = Constant <value_int = 1> ()
    third = Constant <value_int = 2> ()
    x1 = Unsqueeze (x, zero)
    a0 = MatMul (x1, stack)
    q1 = Gather <axis = 0> (a0, first)
    k1 = Gather <axis = 0> (a0, second)
    v1 = Gather <axis = 0> (a0, third)
    q2 = Reshape (q1, by2)
    q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k2 = Reshape (k1, by2)
    k = Transpose <perm = [0, 2, 1, 3]> (k2)
    v2 = Reshape (v1, by2)
    v = Transpose <perm = [0, 2, 1, 3]> (v2)
""",
    PLAIN,
    weights={"stack": "float[3, 1, 8, 8]", "wo": "float[8, 8]"},
    numbers={"joined": "0, 0, 8"},
)
"""A stack of three matrices: heads lie along its columns, and whose they are along its first axis."""


def after(name: str, line: str) -> str:
    """The projections with a line between the heads of `name` (…, heads, channels) and their transposition."""
    there = f"{name} = Transpose <perm = [0, 2, 1, 3]> ({name}2)"
    assert there in SEPARATE
    return SEPARATE.replace(there, f"{line}\n    {name} = Transpose <perm = [0, 2, 1, 3]> ({name}3)")


VALUES = {
    "R1": Case(ONE_CHANNEL, "o", "Attention", "a head has one channel"),
    "R2": Case(attention(outputs=", float[B, S, 8] v1"), "o", "Add", "v1 is an output of the graph", ANGLED),
    "R3": Case(
        attention(), "o", "", "bv is an initializer that is also a graph input", ANGLED, {"overridable": ("bv",)}
    ),
    "R4": Case(
        attention(after("v", "v3 = RMSNormalization (v2, gv)"), weights={"gv": "float[4]"}),
        *("o", "RMSNormalization", "normalizes over the axis", ANGLED),
    ),
    "R5": Case(attention(after("v", "v3 = Gelu (v2)")), "o", "Gelu", "acts on each channel by itself", ANGLED),
    "R6": Case(STACKED, "o", "MatMul", "stack holds heads along several axes"),
    "R7": Case(
        attention(outputs=", float[B, S, 8] z", join=JOIN + "    z = MatMul (x, wv)\n"),
        *("o", "MatMul", "wv is also read here, and would have to be copied", ANGLED),
    ),
}

LOGITS = {
    "R1": Case(ONE_CHANNEL, "o", "Attention", "a head has one channel"),
    "R2": Case(attention(outputs=", float[B, S, 8] k1"), "o", "Add", "k1 is an output of the graph", ANGLED),
    "R3": Case(
        attention(), "o", "", "bk is an initializer that is also a graph input", ANGLED, {"overridable": ("bk",)}
    ),
    "R4": Case(
        attention(after("k", "k3 = RMSNormalization (k2, gk)"), weights={"gk": "float[4]"}),
        *("o", "RMSNormalization", "normalizes over the axis", ANGLED),
    ),
    "R5": Case(attention(after("q", "q3 = Tanh (q2)"), PLAIN), "o", "Tanh", "acts on each channel by itself"),
    "R6": Case(STACKED, "o", "MatMul", "stack holds heads along several axes"),
    "R7": Case(
        attention(outputs=", float[B, S, 8] z", join=JOIN + "    z = MatMul (x, wk)\n"),
        *("o", "MatMul", "wk is also read here, and would have to be copied", ANGLED),
    ),
}

PAST = ", float[B, 2, S, 4] past"

VALUE_TRAPS = {
    "earlier values come from the caller": (
        "R2",
        Case(
            attention(
                core="    all_k = Concat <axis = 2> (kr, kr)\n    all = Concat <axis = 2> (past, v)\n"
                "    o = Attention (qr, all_k, all)\n",
                inputs=PAST,
            ),
            *("o", "", "past is an input of the graph", ("x", "angles", "past")),
        ),
    ),
    "Attention keeps a cache": (
        "R5",
        Case(
            attention(
                core="    o, new_k, new_v = Attention (qr, kr, v, , past, past)\n",
                inputs=PAST,
                outputs=", float[B, 2, T, 4] new_v",
            ),
            *("o", "Attention", "keeps keys and values in a cache", ("x", "angles", "past")),
        ),
    ),
    "a norm of the joined heads": (
        "R4",
        Case(
            attention(
                join="    o2 = Transpose <perm = [0, 2, 1, 3]> (o)\n    o4 = Reshape (o2, joined)\n"
                "    o3 = LayerNormalization (o4, go)\n    y = MatMul (o3, wo)\n",
                weights={"go": "float[16]"},
            ),
            *("o", "LayerNormalization", "normalizes over the axis", ANGLED),
        ),
    ),
    "values are also added to the result": (
        "R2",
        Case(
            attention(
                rotary=PLAIN,
                join="    o2 = Transpose <perm = [0, 2, 1, 3]> (o)\n    o3 = Reshape (o2, joined)\n"
                "    y0 = MatMul (o3, wo)\n    y = Add (y0, v1)\n",
            ),
            *("o", "Add", "y is an output of the graph", ("x",)),
        ),
    ),
    "one number is added to all channels": (
        "R5",
        Case(
            attention(after("v", "one_half = Constant <value_float = 0.5> ()\n    v3 = Add (v2, one_half)")),
            *("o", "Add", "channels . and . of a head one|one number for all channels", ANGLED),
        ),
    ),
    "rows are set to a number that is not zero": (
        "R5",
        Case(
            attention(
                core="    raw = Attention (qr, kr, v)\n    some = Constant <value_float = 0.5> ()\n"
                "    masked = Less (level, some)\n    o = Where (masked, some, raw)\n",
                weights={"level": "float[1, 1, 1, 1]"},
            ),
            *("raw", "Where", "channels . and . of a head one|one number for all channels", ANGLED),
        ),
    ),
    "dropout in training mode": (
        "R5",
        Case(
            attention(
                after(
                    "v",
                    "on = Constant <value = bool {1}> ()\n    r = Constant <value_float = 0.1> ()\n"
                    "    v3 = Dropout (v2, r, on)",
                )
            ),
            *("o", "Dropout", "training mode", ANGLED),
        ),
    ),
}
"""For every pass over values."""

GATED = attention(
    join="""
    g0 = MatMul (x, wg)
    g = Sigmoid (g0)
    o2 = Transpose <perm = [0, 2, 1, 3]> (o)
    o4 = Reshape (o2, joined)
    o3 = Mul (o4, g)
    y = MatMul (o3, wo)
""",
    weights={"wg": "float[8, 16]"},
)
"""An output gate, one number a channel."""

MIXING_TRAPS = VALUE_TRAPS | {
    "an output gate": ("R5", Case(GATED, "o", "Mul", "acts on each channel by itself", ANGLED)),
    "a factor a channel": (
        "R5",
        Case(
            attention(after("v", "v3 = Mul (v2, s)"), weights={"s": "float[4]"}),
            *("o", "Mul", "acts on each channel by itself", ANGLED),
        ),
    ),
    "an output projection for each half of a head": (
        "R5",
        Case(
            attention(
                join="""
    o2 = Transpose <perm = [0, 2, 1, 3]> (o)
    oa = Slice (o2, zero, half, three)
    ob = Slice (o2, half, end, three)
    oc = Reshape (oa, halves)
    od = Reshape (ob, halves)
    ya = MatMul (oc, wo1)
    yb = MatMul (od, wo2)
    y = Add (ya, yb)
""",
                weights={"wo1": "float[8, 8]", "wo2": "float[8, 8]"},
                numbers={"halves": "0, 0, 8"},
            ),
            *("o", "Slice", "holds a part of a head", ANGLED),
        ),
    ),
}
"""For passes over values whose blocks mix channels."""

LOGIT_TRAPS = {
    "an activation of queries before they are turned": (
        "R5",
        Case(
            attention(after("q", "q3 = Tanh (q2)")),
            *("o", "Mul", "neither is linear in a projection", ANGLED),
        ),
    ),
    "earlier keys come from the caller": (
        "R2",
        Case(
            attention(
                core="    all = Concat <axis = 2> (past, kr)\n    all_v = Concat <axis = 2> (v, v)\n"
                "    o = Attention (qr, all, all_v)\n",
                inputs=PAST,
            ),
            *("o", "", "past is an input of the graph", ("x", "angles", "past")),
        ),
    ),
    "queries and keys are one value": (
        "R5",
        Case(
            attention(core="    o = Attention (qr, qr, qr)\n", rotary=HALF),
            *("o", "Attention", "T and its inverse at once", ANGLED),
        ),
    ),
    "a norm of all queries before heads are divided": (
        "R4",
        Case(
            attention(
                SEPARATE.replace(
                    "q2 = Reshape (q1, by4)", "q3 = RMSNormalization (q1, gq)\n    q2 = Reshape (q3, by4)"
                ),
                weights={"gq": "float[16]"},
            ),
            *("o", "RMSNormalization", "normalizes over the axis", ANGLED),
        ),
    ),
    "keys are divided by a computed value": (
        "R5",
        Case(
            attention(
                after("k", "e = Exp (x)\n    ek = MatMul (e, wk3)\n    e4 = Reshape (ek, by2)\n    k3 = Div (e4, k2)"),
                weights={"wk3": "float[8, 8]"},
            ),
            *("o", "Div", "may both carry the transform", ANGLED),
        ),
    ),
}
"""For passes over queries and keys."""
