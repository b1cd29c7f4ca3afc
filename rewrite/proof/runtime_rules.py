"""Operators that ONNX Runtime's optimizer puts in place of several of ONNX's, by what its documentation says of them.

    FusedGemm(a, b, c)     =  f(α·a·b + β·c)
    FusedConv(x, w, b, z)  =  f(conv(x, w) + b + z)
    RotaryEmbedding(x, p, C, S)  =  x turned by the rows p of both caches

An operator, an activation or an input of which the documentation leaves something open stays opaque.

Source: ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from rewrite.proof import forms
from rewrite.proof.constants import Array
from rewrite.proof.dimensions import Dim
from rewrite.proof.forms import Form, form_of
from rewrite.proof.rotary import turned
from rewrite.proof.rows import taken_apart
from rewrite.proof.rules import RULES, attribute, rule, unary
from rewrite.proof.values import Value

if TYPE_CHECKING:
    from rewrite.proof.walk import Walk

DOMAIN = "com.microsoft"

PLAIN = frozenset(("Relu", "Sigmoid", "Softplus", "Softsign", "Tanh"))
"""Activations without parameters."""


def activated(walk: Walk, name: str, parameters: Sequence[float], form: Form) -> Form | None:
    """f(x) as the ONNX operator of that name makes it; None where the parameters are not all given."""
    apart = taken_apart(walk, ir.Node("", name, [None]), [form])
    if apart is not None:
        inner = activated(walk, name, parameters, walk.form(apart.operands[0]))
        return None if inner is None else walk.form(apart.joined(inner))
    if name in PLAIN:
        return unary(walk, name, form) if not parameters else None
    numbers = [float(np.float32(value)) for value in parameters]
    if name == "LeakyRelu" and len(numbers) == 1:
        key = walk.opaque_key("", name, {"alpha": numbers[0]}, [walk.operand(form)])
    elif name == "HardSigmoid" and len(numbers) == 2:
        key = walk.opaque_key("", name, {"alpha": numbers[0], "beta": numbers[1]}, [walk.operand(form)])
    elif name == "Clip" and len(numbers) == 2:
        bounds = [walk.operand(Array(np.array(number))) for number in numbers]
        key = walk.opaque_key("", name, {}, [walk.operand(form), *bounds])
    else:
        return None
    return form_of(walk.atom(key, form.shape))


def parameters(node: ir.Node) -> list[float] | None:
    """`activation_params`, or `activation_alpha`, `…_beta`, `…_gamma`; None where one of these follows a gap."""
    if "activation_params" in node.attributes:
        return list(attribute(node, "activation_params", ()))
    given = [name in node.attributes for name in ("activation_alpha", "activation_beta", "activation_gamma")]
    if given != sorted(given, reverse=True):
        return None
    names = ("activation_alpha", "activation_beta", "activation_gamma")
    return [attribute(node, name, 0.0) for name in names if name in node.attributes]


def then_activated(walk: Walk, node: ir.Node, form: Form) -> Form | None:
    """The node's activation of `form`; None where it is not documented fully."""
    name, given = attribute(node, "activation", ""), parameters(node)
    if not name:
        return form
    return None if given is None else activated(walk, name, given, form)


def _form(result: object) -> Form | None:
    return result if isinstance(result, Form) else None


@rule("FusedGemm", domain=DOMAIN)
def fused_gemm(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Form | None:
    result = _form(RULES["", "Gemm"](walk, node, operands))
    return None if result is None else then_activated(walk, node, result)


@rule("FusedConv", domain=DOMAIN)
def fused_conv(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Form | None:
    """Z, the fourth input, is added before the activation and has the result's shape."""
    result = _form(RULES["", "Conv"](walk, node, operands[:3]))
    if result is None:
        return None
    if len(operands) > 3 and operands[3] is not None:
        z = walk.form(operands[3])
        if z.shape != result.shape:
            return None
        result = forms.add(result, z)
    return then_activated(walk, node, result)


@rule("RotaryEmbedding", domain=DOMAIN)
def rotary_embedding(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Form | None:
    """Half and half over the whole head, a position for every token; other forms stay opaque."""
    if any(attribute(node, name, 0) for name in ("interleaved", "rotary_embedding_dim", "is_packed_batching")):
        return None
    if attribute(node, "scale", 1.0) != 1.0 or len(operands) != 4:
        return None
    x, cosine, sine = walk.form(operands[0]), *(_rows(walk, node, cache, operands[1]) for cache in operands[2:])
    if cosine is None or sine is None:
        return None
    if x.rank == 4:
        return turned(walk, x, cosine, sine)
    size = cosine.shape[-1] * 2
    heads = x.shape[-1].quotient(size) if x.rank == 3 else None
    if heads is None or attribute(node, "num_heads", 0) not in (0, heads.constant):
        return None
    split = forms.reshape(x, (*x.shape[:2], heads, size))
    result = None if split is None else turned(walk, forms.transpose(split, (0, 2, 1, 3)), cosine, sine)
    return None if result is None else forms.reshape(forms.transpose(result, (0, 2, 1, 3)), x.shape)


def _rows(walk: Walk, node: ir.Node, cache: Value | None, positions: Value | None) -> Form | None:
    """The rows of a cache at `positions` (batch, length); all of them in order are the cache itself, laid out anew."""
    if positions is None or len(walk.shape(positions)) != 2:
        return None
    count = walk.shape(cache)[0]
    if isinstance(positions, Form):
        flat = forms.reshape(positions, (count,))
        atom = None if flat is None else flat.atom
        if atom is not None and atom.key == ("range", Dim.of(0), count):
            return forms.reshape(walk.form(cache), (*positions.shape, walk.shape(cache)[1]))
    rows = RULES["", "Gather"](walk, node, [cache, positions])
    return walk.form(rows) if rows is not None and not isinstance(rows, Sequence) else None
