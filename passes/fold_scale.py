"""Fold a constant factor into the constants that write what it multiplies.

      h = xW + b, read only by the Mul      s a constant number, or a constant vector along h's channels
    ─────────────────────────────────────────────────────────────────────────────────────────────────────
      (xW + b)⊙s  =  x(W·diag(s)) + b⊙s

LayerScale, residual and embedding multipliers. W may be a matrix, a kernel's output channels or a table that rows are
gathered from; between W and the Mul stands what commutes with a diagonal.

Shapes    h (..., d)   W (k, d)   b (d,)   s () or (d,)
Relation  equal over the reals; the Mul's result keeps its name, values before it get new ones
Source    Touvron et al. 2021, arXiv:2103.17239, §2 (LayerScale)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.regions import Cause, Region, grow
from rewrite.basis.transforms import DIAGONAL
from rewrite.ir.constants import is_constant, is_overridable, numbers, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Constant, Scale
from rewrite.rule import Breach, Change, Pass, Requirement, Site, read_elsewhere

WRITERS = ("MatMul", "Conv", "ConvTranspose", "Gather")


@dataclass(frozen=True)
class Factor(Site):
    """A Mul (or Div) of a value by a factor, and the region of that value."""

    product: ir.Node
    value: ir.Value
    factor: ir.Value
    region: Region


def _own_factor(rule: FoldScale, site: Factor) -> Breach | None:
    array = numbers(site.factor)
    if array is None:
        return Breach(site.product, f"the factor {site.factor.name} is not a constant of the network")
    if not np.isfinite(array).all() or (site.product.op_type == "Div" and not array.all()):
        return Breach(site.product, f"the factor {site.factor.name} is not finite")
    return None


def _hidden_from_outside(rule: FoldScale, site: Factor) -> Breach | None:
    return Breach.at(site.region.met(Cause.INTERFACE))


def _own_constants(rule: FoldScale, site: Factor) -> Breach | None:
    return Breach.at(site.region.met(Cause.OVERRIDABLE))


def _only_scaled(rule: FoldScale, site: Factor) -> Breach | None:
    for use in (*site.region.readers, *site.region.norms):
        return Breach(use.node, f"{use.node.op_type} reads the value before the factor")
    for use in site.value.uses():
        if use.node is site.product and site.product.inputs[0] is site.product.inputs[1]:
            return Breach(use.node, "the value multiplies itself")
    return None


def _only_constants_write(rule: FoldScale, site: Factor) -> Breach | None:
    if (met := site.region.met(Cause.OPERATOR)) is not None:
        return Breach.at(met)
    for node in site.region.writing_norms:
        return Breach(node, f"{node.op_type} writes the value")
    return None


def _unshared(rule: FoldScale, site: Factor) -> Breach | None:
    for use in site.region.constants:
        other = read_elsewhere(use, site.region.constants)
        if other is not None and len(weight_behind(use.value).shape) > 1:
            return Breach(other, f"{use.value.name} is also read here, and would have to be copied")
    return None


@dataclass(frozen=True)
class FoldScale(Pass[Factor]):
    """A constant factor goes into the weights that write what it multiplies."""

    name: ClassVar[str] = "fold-scale"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "the factor is a finite constant", _own_factor),
        Requirement("R2", "no input or output of the graph is scaled", _hidden_from_outside),
        Requirement("R3", "the constants that write it cannot be overridden", _own_constants),
        Requirement("R4", "nothing else reads the value", _only_scaled),
        Requirement("R5", "only constants write it, through what commutes with a diagonal", _only_constants_write),
        Requirement("R6", "no matrix that writes it is read by anyone else", _unshared),
    )

    def sites(self, program: Program) -> Iterator[Factor]:
        for node in [node for node in program.model.graph if is_operator(node, "Mul", "Div")]:
            if node.graph is None or (operands := _operands(node)) is None:
                continue
            value, factor, axis = operands
            region = grow(value, axis, DIAGONAL, origin=node)
            writers = tuple(use.node for use in region.constants if is_operator(use.node, *WRITERS))
            # A number beside other arithmetic on the same value is part of an activation written out, and no site.
            activation = _is_number(factor) and region.met(Cause.OPERATOR) is not None
            if writers and not activation:
                nodes = tuple(dict.fromkeys((*writers, node)))
                yield Factor(node.outputs[0].name or "", nodes, node, value, factor, region)

    def rewrite(self, site: Factor, change: Change) -> None:
        array = numbers(site.factor)
        if array is None:
            raise ValueError(f"{site.factor.name} is not a constant")
        factor = array.reshape(-1) if array.size > 1 else array.reshape(())
        scale = Constant(1.0 / factor if site.product.op_type == "Div" else factor)
        for use in site.region.constants:
            weight = Scale(weight_behind(use.value), scale, use.axis)
            change.absorb(use, weight, "scaled", key=(site.factor, site.product.op_type, use.axis))
        for value in site.region.axes:
            if value is not site.value:
                change.rename(value, "scaled")
        change.editor.take_over(site.product.outputs[0], site.value)


def _is_number(factor: ir.Value) -> bool:
    """Whether the factor is one number, the same for every channel."""
    return all(size == 1 for size in shape_of(factor) or ())


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value, int] | None:
    """The scaled value, the constant factor and the axis along which it varies (the last, where it does not)."""
    left, right = node.inputs
    dtype = node.outputs[0].dtype
    # Integers divide with a remainder, and no network stores its factors in them.
    if left is None or right is None or dtype is None or not dtype.is_floating_point():
        return None
    pairs = ((left, right), (right, left)) if node.op_type == "Mul" else ((left, right),)
    for value, factor in pairs:
        shape, sizes = shape_of(value), shape_of(factor)
        if is_constant(value) or not (is_constant(factor) or is_overridable(factor)) or not shape or sizes is None:
            continue
        varying = [axis - len(sizes) for axis, size in enumerate(sizes) if size != 1]
        if len(varying) <= 1 and shape_of(node.outputs[0]) == shape:
            axis = len(shape) + (varying[0] if varying else -1)
            if not varying or shape[axis] == sizes[varying[0]]:
                return value, factor, axis
    return None
