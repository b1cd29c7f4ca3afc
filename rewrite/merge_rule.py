"""How passes that merge operators write the one that is left."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rewrite.basis.affine_chains import Kind, elements
from rewrite.basis.branches import SUMS
from rewrite.basis.regions import Use
from rewrite.basis.stencils import Stencil, pads, transposed
from rewrite.ir.constants import uniform
from rewrite.ir.edit import is_operator
from rewrite.rule import Change


def write(
    change: Change,
    kind: Kind,
    stencil: Stencil,
    uses: Sequence[Use],
    value: ir.Value,
    before: ir.Node,
    like: ir.Value,
    name: str,
) -> ir.Value:
    """Write a stencil as the operator of a kind on `value`: a Conv, or a MatMul and an Add where it shifts.

    Its constants are recorded as made from those in `uses`: the largest kernel or matrix, and its bias or the first.
    `like` has the result's shape and type.
    """
    edit = change.editor
    # Of two of one size the one that is replaced, where the other stays for somebody else.
    main = max((use for use in uses if _is_weight(use)), key=lambda use: (elements(use.value), -len(use.value.uses())))
    shifts = sorted((use for use in uses if _is_bias(use)), key=lambda use: use.node is not main.node)
    old = shifts[0].value if shifts else None
    bias: ir.Value | None = None
    if like.dtype is None:
        raise ValueError(f"{like.name} has no dtype")
    if stencil.bias is not None:
        bias = old if old is not None else edit.initializer(f"{name}.bias", stencil.bias, like.dtype)
    if kind is Kind.KERNEL:
        attributes = {
            **{"kernel_shape": list(stencil.taps), "strides": list(stencil.strides)},
            **{"dilations": list(stencil.dilations), "pads": list(pads(stencil)), "group": stencil.groups},
        }
        operands = [value, main.value] if bias is None else [value, main.value, bias]
        result = edit.node("Conv", operands, attributes, before=before, name=name, like=like)
        change.absorb(Use(_maker(result), 1, 0), stencil.kernel, "merged")
        place = Use(_maker(result), 2, 0)
    else:
        result = edit.node("MatMul", [value, main.value], before=before, name=name, like=like)
        change.absorb(Use(_maker(result), 1, 0), transposed(stencil.kernel), "merged")
        if bias is not None:
            result = edit.node("Add", [result, bias], before=before, name=f"{name}.shifted", like=like)
        place = Use(_maker(result), 1, 0)
    if stencil.bias is not None and old is not None:
        change.absorb(place, stencil.bias, "merged")
    elif bias is not None:
        change.notes.append(f"{name} has a new bias of {stencil.width} numbers")
    return result


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise ValueError(f"{value.name} has no producer")
    return node


def _is_weight(use: Use) -> bool:
    """Whether a constant is a matrix or a kernel."""
    return is_operator(use.node, "MatMul", "Conv") and use.position == 1


def _is_bias(use: Use) -> bool:
    """Whether a constant is added, and is not the zeros that an exporter gives to all who have no bias."""
    if uniform(use.value) == 0.0:
        return False
    return is_operator(use.node, *SUMS) or (is_operator(use.node, "Conv", "BatchNormalization") and use.position == 2)
