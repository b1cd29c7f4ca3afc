"""ONNX Runtime's convolutions on channels in blocks: what its optimizer makes at its highest level, for one machine.

    channels in blocks of n        (N, C, H, W)  is stored as  (N, C/n, H, W, n)
    filters of blocked channels    (O, I, h, w)  is stored as  (O/n, I/n, h, w, n, n),   inner channels of I, then of O
    filters of plain channels      (O, I, h, w)  is stored as  (O/n, I, h, w, n)         I < n, or a kernel a channel

Channels are filled up with zeros to a multiple of n. The file does not say what n is: it is what the processor has that
wrote it, and on another the file computes something else. A proof therefore names it, and holds modulo that.

A value in blocks is kept as what it is without them, and apart from all others: an operator that does not know blocks
is not given it.

Source: ONNX Runtime, core/optimizer/nchwc_transformer.cc, core/graph/contrib_ops/nchwc_schema_defs.cc.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from rewrite.proof import forms
from rewrite.proof.constants import Constant, permuted, reshaped, sliced
from rewrite.proof.dimensions import Dim, Shape
from rewrite.proof.forms import Form
from rewrite.proof.rules import RULES, attribute, rule
from rewrite.proof.runtime_rules import then_activated
from rewrite.proof.values import Value

if TYPE_CHECKING:
    from rewrite.proof.walk import Walk

DOMAIN = "com.microsoft.nchwc"


@dataclass(frozen=True)
class Blocked:
    """A value whose channels are in blocks, as the value (N, C, H, W) that it holds, without what fills it up."""

    form: Form

    @property
    def shape(self) -> Shape:
        raise ValueError("channels in blocks are read by an operator that does not know blocks")


def _block(walk: Walk) -> int:
    size = walk.table.block
    if size is None:
        raise ValueError("channels are in blocks of a size that the file does not say")
    walk.table.declared.add(f"channels in blocks of {size}, as the machine that wrote the file has them")
    return size


def _opened(value: object) -> Form:
    if not isinstance(value, Blocked):
        raise ValueError("channels that are not in blocks are read by an operator on blocks")
    return value.form


def unblocked_filter(constant: Constant, block: int, *, both: bool) -> Constant:
    """A filter (O, I, h, w) as it was before it was reordered: in blocks of O, and of I if `both` are."""
    out, inner, *kernel = constant.shape
    if both:
        stored = reshaped(constant, (out // block, inner // block, *kernel, block, block))
        return reshaped(permuted(stored, (0, 5, 1, 4, 2, 3)), constant.shape)
    stored = reshaped(constant, (out // block, inner, *kernel, block))
    return reshaped(permuted(stored, (0, 4, 1, 2, 3)), constant.shape)


@rule("Conv", domain=DOMAIN)
def blocked_convolution(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Any:
    block, (x, weight, bias, total) = _block(walk), (*operands, None, None)[:4]
    if not isinstance(weight, Constant) or len(weight.shape) != 4 or weight.shape[0] % block:
        raise ValueError("a filter in blocks is no constant of whole blocks")
    group, inner = attribute(node, "group", 1), weight.shape[1]
    depthwise = group > 1 and inner == 1 and group == weight.shape[0]
    plain = group == 1 and inner < block
    if not (depthwise or plain or (group == 1 and inner % block == 0)):
        raise ValueError("a convolution in groups on channels in blocks")
    form = walk.form(x) if plain else _opened(x)
    weight = unblocked_filter(weight, block, both=not (depthwise or plain))
    channels, values = form.shape[1].constant, walk.small(weight)
    if channels is None or values is None or not (bias is None or isinstance(bias, Constant)):
        raise ValueError("a convolution in blocks of an unknown number of channels")
    if depthwise:
        # A kernel for each channel: those of what fills the input up give what fills the result up.
        if channels > group:
            raise ValueError("kernels for fewer channels than there are")
        weight, bias = _first(weight, channels), None if bias is None else _first(bias, channels)
    else:
        # What fills up the input must meet zeros, whatever it is.
        if channels > inner or values[:, channels:].any():
            raise ValueError("a filter reads what only fills a block up")
        weight = sliced(weight, tuple(slice(0, n) for n in (weight.shape[0], channels, *weight.shape[2:])))
        busy: np.ndarray = np.asarray(values.reshape(len(values), -1).any(axis=1))
        if bias is not None:
            busy = busy | bias.whole().astype(bool)
        # The last channels that are zero: nobody reads what they give.
        count = int(np.flatnonzero(busy)[-1]) + 1 if busy.any() else len(busy)
        weight, bias = _first(weight, count), None if bias is None else _first(bias, count)
    settings = {name: each for name, each in node.attributes.items() if name not in ("group", "activation")}
    settings["group"] = ir.AttrInt64("group", channels if depthwise else 1)
    convolution = ir.Node("", "Conv", list(node.inputs[:3]), list(settings.values()), name=node.name)
    result = RULES["", "Conv"](walk, convolution, [form, weight, bias])
    if not isinstance(result, Form):
        raise ValueError("a convolution in blocks that is not understood")
    if total is not None:
        added = _opened(total)
        if added.shape != result.shape:
            raise ValueError("what is added to a convolution has another shape")
        result = forms.add(result, added)
    result = then_activated(walk, node, result)
    if result is None:
        raise ValueError("a convolution in blocks with an activation that is not documented")
    return [Blocked(result)]


def _first(constant: Constant, count: int) -> Constant:
    """The first `count` entries on the first axis."""
    return sliced(constant, (slice(0, count), *(slice(0, n) for n in constant.shape[1:])))


@rule("ReorderInput", domain=DOMAIN)
def reordered_input(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Any:
    _block(walk)
    form = walk.form(operands[0])
    return [Blocked(forms.transpose(form, (0, 3, 1, 2)) if attribute(node, "channels_last", 0) else form)]


@rule("ReorderOutput", domain=DOMAIN)
def reordered_output(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Any:
    _block(walk)
    form, channels = _opened(operands[0]), attribute(node, "channels", 0)
    known = form.shape[1].constant
    if known is None or not 0 < channels <= known:
        raise ValueError(f"{channels} channels are taken out of blocks that hold {known}")
    form = forms.take(form, 1, Dim.of(0), Dim.of(channels))
    return forms.transpose(form, (0, 2, 3, 1)) if attribute(node, "channels_last", 0) else form


@rule("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", domain=DOMAIN)
def blocked_pooling(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Any:
    """Channel by channel: the operator of that name on the value without blocks."""
    _block(walk)
    plain = ir.Node("", node.op_type, list(node.inputs), list(node.attributes.values()), name=node.name)
    result = walk.applied(plain, [_opened(operands[0])])[0]
    return [Blocked(walk.form(result))]
