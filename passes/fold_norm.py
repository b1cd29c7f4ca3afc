"""Fold a norm's scale and shift into everything that reads it.

      all readers of y are x·W with constants W, b      no W is read by anyone else
    ───────────────────────────────────────────────────────────────────────────────  y = core(x)⊙γ + β
      yW + b  =  core(x)·(diag(γ)W) + (b + βW)

core is rms_ε(x) or (x − mean x)/√(var x + ε); layout operators may stand between it and its readers, all or none
are folded. The norm itself stays, with γ = 1 and no β.

Shapes    x, y (..., d)   γ, β (d,)   W (d, n)   b (n,)
Relation  equal over the reals; y becomes core(x), a value the original does not have
Source    Ashkboos et al. 2024, arXiv:2404.00456, §3.1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.operators import NORMS, bias_of, norm_attributes, right_factor, used_statistic, width
from rewrite.basis.regions import Cause, Region, Use, grow
from rewrite.basis.transforms import DIAGONAL_AND_SHIFT
from rewrite.ir.axes import operand
from rewrite.ir.constants import is_constant, uniform, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Constant, Product, Scale, Transpose, Weight
from rewrite.rule import Breach, Change, Pass, Requirement, Site, read_elsewhere


@dataclass(frozen=True)
class Affine(Site):
    """A norm with its scale γ and shift β, the value y they make, and the region of y."""

    norm: ir.Node
    scale: ir.Value
    shift: ir.Value | None
    result: ir.Value
    region: Region

    @property
    def shifts(self) -> bool:
        """Whether there is a β to fold."""
        return self.shift is not None and uniform(self.shift) != 0.0


def _own_vectors(rule: FoldNorm, site: Affine) -> Breach | None:
    for symbol, value in (("γ", site.scale), ("β", site.shift)):
        if value is None:
            continue
        if not is_constant(value):
            return Breach(site.norm, f"{symbol} ({value.name}) is not a constant of the network")
        if shape_of(value) != (site.region.size,):
            return Breach(site.norm, f"{symbol} has shape {shape_of(value)}, not ({site.region.size},)")
    statistic = used_statistic(site.norm)
    return None if statistic is None else Breach(site.norm, f"its statistic {statistic.name} is used")


def _hidden_from_outside(rule: FoldNorm, site: Affine) -> Breach | None:
    return Breach.at(site.region.met(Cause.INTERFACE, Cause.OVERRIDABLE))


def _only_contracted(rule: FoldNorm, site: Affine) -> Breach | None:
    region = site.region
    if (met := region.met(Cause.OPERATOR)) is not None:
        return Breach.at(met)
    for node in (*(use.node for use in region.norms), *region.writing_norms, *(use.node for use in region.constants)):
        return Breach(node, f"{node.op_type} touches the norm's result as well")
    return None


def _constant_readers(rule: FoldNorm, site: Affine) -> Breach | None:
    for use in site.region.readers:
        if not is_operator(use.node, "MatMul") or use.position != 0:
            return Breach(use.node, f"{use.node.op_type} reads it, and not as the left factor of a matrix product")
        factor = right_factor(use.node, DIAGONAL_AND_SHIFT)
        if factor.obstructions or factor.writing_norms or not factor.constants:
            return Breach(use.node, "MatMul multiplies it with something that is not a constant")
    return None


def _unshared(rule: FoldNorm, site: Affine) -> Breach | None:
    products = {use.node for use in site.region.readers}
    factors = [right_factor(use.node, DIAGONAL_AND_SHIFT) for use in site.region.readers]
    constants = [constant for factor in factors for constant in factor.constants]
    for factor in factors:
        others = [use.node for use in (*factor.readers, *factor.norms) if use.node not in products or use.position != 1]
        others += [node for constant in factor.constants if (node := read_elsewhere(constant, constants)) is not None]
        for node in others:
            return Breach(node, f"{factor.constants[0].value.name} is also read here, and would have to be copied")
    return None


def _one_row(rule: FoldNorm, site: Affine) -> Breach | None:
    for use in site.region.readers if site.shifts else ():
        factor = right_factor(use.node, DIAGONAL_AND_SHIFT)
        if factor.constants and not _is_one_matrix(factor):
            return Breach(use.node, "β meets a stack of matrices, whose biases differ")
    return None


def _is_one_matrix(factor: Region) -> bool:
    """Whether the stored matrix is the one that is multiplied with; a Gather of its rows takes others."""
    stored = [len(weight_behind(one.value).shape) for one in factor.constants]
    return stored == [2] and all(
        is_operator(value.producer(), "Transpose", "Identity", "Cast") for value in factor.axes
    )


def _worth_new_biases(rule: FoldNorm, site: Affine) -> Breach | None:
    widths = {use.node: width(use.node) for use in site.region.readers if bias_of(use.node) is None}
    allowed = rule.max_bias_growth * site.region.size
    if site.shifts and sum(widths.values()) > allowed:
        widest = max(widths, key=lambda node: widths[node])
        numbers = f"{sum(widths.values())} numbers, {rule.max_bias_growth:g} × {site.region.size} allowed"
        return Breach(widest, f"β needs new biases of {numbers}")
    return None


@dataclass(frozen=True)
class FoldNorm(Pass[Affine]):
    """γ and β of a norm go into the matrices and biases that read it.

    `max_bias_growth`: new biases may hold at most so many numbers a channel (queries, keys, values and the
    first matrix of a parallel MLP take 7; a vocabulary head would take a bias as long as the vocabulary).
    """

    max_bias_growth: float = 8.0

    name: ClassVar[str] = "fold-norm"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "γ and β are constants along exactly the normalized axis", _own_vectors),
        Requirement("R2", "the norm's result is no input or output of the graph", _hidden_from_outside),
        Requirement("R3", "nothing but layout stands between the norm and its readers", _only_contracted),
        Requirement("R4", "every reader is a product with a constant matrix", _constant_readers),
        Requirement("R5", "no such matrix is read by anyone else", _unshared),
        Requirement("R6", "where there is a β, every reader takes one bias", _one_row),
        Requirement("R7", "new biases stay small", _worth_new_biases),
    )

    def sites(self, program: Program) -> Iterator[Affine]:
        for norm in [node for node in program.model.graph if is_operator(node, *NORMS)]:
            if norm.graph is None or (scale := operand(norm, 1)) is None:
                continue
            last, shift = _shift_of(norm)
            if uniform(scale) == 1.0 and (shift is None or uniform(shift) == 0.0):
                continue
            result = last.outputs[0]
            region = grow(result, len(shape_of(result) or ()) - 1, DIAGONAL_AND_SHIFT, origin=last)
            nodes = tuple(dict.fromkeys((norm, last, *(use.node for use in region.readers))))
            yield Affine(result.name or "", nodes, norm, scale, shift, result, region)

    def rewrite(self, site: Affine, change: Change) -> None:
        factors = {use.node: right_factor(use.node, DIAGONAL_AND_SHIFT) for use in site.region.readers}
        biases: dict[ir.Node, Weight] = {}
        if site.shift is not None and site.shifts:
            biases = {product: _times(site.shift, factor.constants[0]) for product, factor in factors.items()}
        for constant in dict.fromkeys(constant for factor in factors.values() for constant in factor.constants):
            weight = Scale(weight_behind(constant.value), weight_behind(site.scale), constant.axis)
            change.absorb(constant, weight, "scaled", key=(site.scale, constant.axis))
        for value in dict.fromkeys(value for factor in factors.values() for value in factor.axes):
            change.rename(value, "scaled")
        for product, addition in biases.items():
            change.shift(product, addition)
        _strip(site, change)


def _shift_of(norm: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The node that makes y, and β: the norm's own third operand, or a constant vector that alone is added to it."""
    shift = operand(norm, 2)
    if shift is not None:
        return norm, shift
    bias = bias_of(norm)
    return (norm, None) if bias is None else (bias.node, bias.value)


def _times(shift: ir.Value, matrix: Use) -> Weight:
    """βW, of W as it is before γ goes into it."""
    rows = weight_behind(matrix.value)
    return Product(weight_behind(shift), rows if matrix.axis == 0 else Transpose(rows, (1, 0)))


def _strip(site: Affine, change: Change) -> None:
    """The norm with γ = 1 and no β, read under new names: its result is a value the original does not have."""
    edit, norm, result = change.editor, site.norm, site.result
    for value in site.region.axes:
        if value is not result:
            change.rename(value, "core")
    dtype, size = site.scale.dtype or ir.DataType.FLOAT, site.region.size
    ones = edit.derived(("ones", size, dtype), f"ones.{size}", Constant(np.ones(size)), dtype)
    operands, attributes = (norm.inputs[0], ones), norm_attributes(norm)
    core = edit.node(norm.op_type, operands, attributes, before=norm, name=f"{result.name}.core", like=result)
    result.replace_all_uses_with(core)
