"""Centre the residual stream, so that its LayerNorms become RMSNorms.

      every writer of S is affine with constants W, b    every reader of S is a LayerNorm over its axis
    ────────────────────────────────────────────────────────────────────────────────────────────────────  P = I − 11ᵀ/d
      LN(x; γ, β, ε)  =  rms_ε(xP)⊙γ + β,    where xP is what writers with W·P and b·P write

Between writers and readers everything commutes with P: residual additions, a number per row, layout.

Shapes    x (..., d)   W (k, d)   b, γ, β (d,)
Relation  equal over the reals; every value of S is the original's times P
Source    Jiang et al. 2023, arXiv:2305.14858, §3
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.operators import NORMS, norm_attributes, used_statistic
from rewrite.basis.regions import Cause, Obstruction, Region, Use, grow
from rewrite.basis.transforms import CENTRING
from rewrite.ir.axes import operand
from rewrite.ir.constants import is_constant, uniform, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Center, row_blocks
from rewrite.rule import Breach, Change, Pass, Requirement, Site, read_elsewhere, steps

FIRST_OPSET_WITH_RMSNORM = 23


@dataclass(frozen=True)
class Stream(Site):
    """A residual stream: all values that one change of basis reaches from a norm's input.

    `centred` are names of values that an earlier site of this pass has centred.
    """

    region: Region
    opset: int
    centred: frozenset[str]


def _has_rmsnorm(rule: CenterResidual, stream: Stream) -> Breach | None:
    if stream.opset < FIRST_OPSET_WITH_RMSNORM:
        return Breach(stream.nodes[0], f"the graph is written in opset {stream.opset}")
    return None


def _blind_to_the_mean(rule: CenterResidual, stream: Stream) -> Breach | None:
    for use in stream.region.norms:
        if use.node.op_type != "LayerNormalization":
            return Breach(use.node, f"{use.node.op_type} reads the stream and sees its mean")
    return None


def _over_the_axis(rule: CenterResidual, stream: Stream) -> Breach | None:
    for met in stream.region.obstructions:
        if _read_by_norm(met):
            return Breach.at(met)
    for use in stream.region.norms:
        for position, symbol in ((1, "γ"), (2, "β")):
            parameter = operand(use.node, position)
            if parameter is not None and shape_of(parameter) != (stream.region.size,):
                return Breach(use.node, f"{symbol} has shape {shape_of(parameter)}, not ({stream.region.size},)")
        if (statistic := used_statistic(use.node)) is not None:
            return Breach(use.node, f"its statistic {statistic.name} is used")
    return None


def _no_norm_writes(rule: CenterResidual, stream: Stream) -> Breach | None:
    for node in stream.region.writing_norms:
        value, shift = operand(node, 0), operand(node, 2)
        without_mean = node.op_type == "LayerNormalization" or (value is not None and value.name in stream.centred)
        if not without_mean:
            return Breach(node, f"{node.op_type} writes the stream, and its result has a mean")
        if uniform(operand(node, 1)) is None:
            return Breach(node, f"{node.op_type} writes the stream with a γ that is not one constant")
        if shift is not None and not is_constant(shift):
            return Breach(node, f"{node.op_type} writes the stream with a β that is not a constant")
    return None


def _hidden_from_outside(rule: CenterResidual, stream: Stream) -> Breach | None:
    return Breach.at(stream.region.met(Cause.INTERFACE))


def _own_constants(rule: CenterResidual, stream: Stream) -> Breach | None:
    return Breach.at(stream.region.met(Cause.OVERRIDABLE))


def _no_raw_reader(rule: CenterResidual, stream: Stream) -> Breach | None:
    for use in stream.region.readers:
        return Breach(use.node, f"{use.node.op_type} reads the raw stream, and P cannot be undone")
    return None


def _all_commute(rule: CenterResidual, stream: Stream) -> Breach | None:
    for met in stream.region.obstructions:
        if met.cause is Cause.OPERATOR and not _read_by_norm(met):
            return Breach.at(met)
    return None


def _read_by_norm(met: Obstruction) -> bool:
    """Whether a norm reads the stream in a way that growth could not follow."""
    return met.node is not None and met.node.op_type in NORMS and met.value in met.node.inputs


def _worth_a_copy(rule: CenterResidual, stream: Stream) -> Breach | None:
    if len(stream.region.norms) < rule.norms_per_copy:
        for use in _copied(stream.region):
            reader, norms = read_elsewhere(use, stream.region.constants), len(stream.region.norms)
            return Breach(reader, f"{use.value.name} would be copied for {norms} norm, {rule.norms_per_copy} asked for")
    return None


def _copied(region: Region) -> Iterator[Use]:
    """Matrices that would be copied, because others read them too and they are not centred as they are."""
    for use in region.constants:
        tensor = use.value.const_value
        matrix = tensor is not None and len(tensor.shape) > 1
        if matrix and read_elsewhere(use, region.constants) and not _is_centred(use):
            yield use


def _is_centred(use: Use) -> bool:
    """Whether centring would leave every stored number as it is, so that a tied weight may stay tied."""
    weight = weight_behind(use.value)
    centred = Center(weight, use.axis)
    dtype = use.value.dtype.numpy() if use.value.dtype is not None else np.float64
    return all(
        np.array_equal(weight.read(block).astype(dtype), centred.read(block).astype(dtype))
        for block in row_blocks(weight.shape)
    )


@dataclass(frozen=True)
class CenterResidual(Pass[Stream]):
    """LayerNorm(x) → RMSNorm(xP), with P absorbed by all that writes x.

    `norms_per_copy`: a table that others read too (a tied head) is copied only where so many norms get cheaper.
    """

    norms_per_copy: int = 2

    name: ClassVar[str] = "center-residual"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "the graph's opset has RMSNormalization", _has_rmsnorm),
        Requirement("R2", "every norm that reads the stream is blind to its mean", _blind_to_the_mean),
        Requirement("R3", "it normalizes exactly the stream's axis, and only its result is used", _over_the_axis),
        Requirement("R4", "no norm writes the stream, unless with a constant γ", _no_norm_writes),
        Requirement("R5", "no input or output of the graph is in the stream", _hidden_from_outside),
        Requirement("R6", "the stream's constants cannot be overridden", _own_constants),
        Requirement("R7", "nothing affine reads the raw stream", _no_raw_reader),
        Requirement("R8", "every other operator in it commutes with P", _all_commute),
        Requirement("R9", "a copied table serves enough norms", _worth_a_copy),
    )

    def sites(self, program: Program) -> Iterator[Stream]:
        seen: set[ir.Node] = set()
        for norm in [node for node in program.model.graph if is_operator(node, *NORMS)]:
            if norm.graph is None or norm in seen or not norm.inputs or (value := norm.inputs[0]) is None:
                continue
            if (value.name or "") in (centred := _centred(program)):
                continue
            region = grow(value, len(shape_of(value) or ()) - 1, CENTRING)
            seen.update(use.node for use in region.norms)
            opset = program.model.opset_imports.get("", 0)
            nodes = tuple(use.node for use in region.norms) or (norm,)
            yield Stream(value.name or "", nodes, region, opset, centred)

    def rewrite(self, site: Stream, change: Change) -> None:
        region = site.region
        for use in region.constants:
            if not (read_elsewhere(use, region.constants) and _is_centred(use)):
                change.absorb(use, Center(weight_behind(use.value), use.axis), "centred", key=(use.axis,))
        for node in region.writing_norms:
            if operand(node, 2) is not None:
                shift = Use(node, 2, 0)
                change.absorb(shift, Center(weight_behind(shift.value), 0), "centred")
        for use in region.norms:
            _to_rmsnorm(use.node, change)
        for value, axis in region.axes.items():
            change.relate(value, "centre", axis)
        change.notes.append(f"{len(region.norms)} LayerNormalization became RMSNormalization")


def _centred(program: Program) -> frozenset[str]:
    centred = (name for name, relation in program.relations.items() if steps(relation)[-1]["transform"] == "centre")
    return frozenset(centred)


def _to_rmsnorm(norm: ir.Node, change: Change) -> None:
    edit, result, shift = change.editor, norm.outputs[0], operand(norm, 2)
    name, attributes = result.name, norm_attributes(norm)
    made = edit.node("RMSNormalization", norm.inputs[:2], attributes, before=norm, name=f"{name}.scaled", like=result)
    if shift is not None:
        made = edit.node("Add", [made, shift], before=norm, name=f"{name}.shifted", like=result)
    edit.take_over(result, made)
