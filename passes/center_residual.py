"""Centre the residual stream, so that its LayerNorms become RMSNorms.

      every writer of S is affine with constants W, b    every reader of S is a LayerNorm over its axis
    ────────────────────────────────────────────────────────────────────────────────────────────────────  P = I − 11ᵀ/d
      LN(x; γ, β, ε)  =  rms_ε(xP)⊙γ + β,    where xP is what writers with W·P and b·P write

Between writers and readers everything commutes with P: residual additions, a number per row, layout. Where something
else writes the stream, or reads it raw, an explicit x − mean(x) is inserted behind a value, if the norms that it serves
save more than it costs; which values are centred, and where, is a minimum cut (`rewrite.basis.placement`). P cannot be
undone, so the raw value stays beside the centred one for those who read it raw.

Shapes    x (..., d)   W (k, d)   b, γ, β (d,)
Relation  equal over the reals; every value of S that is centred is the original's times P
Source    Jiang et al. 2023, arXiv:2305.14858, §3
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.operators import NORMS, norm_attributes, right_factor, used_statistic
from rewrite.basis.placement import PICOSECONDS, Costs, Operator, Placement, Prices, place, problem_of
from rewrite.basis.regions import Cause, Obstruction, Region, Use, grow
from rewrite.basis.transforms import CENTRING, DIAGONAL_AND_SHIFT
from rewrite.ir.axes import operand
from rewrite.ir.constants import integers, is_constant, uniform, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Center, Constant, row_blocks
from rewrite.rule import Breach, Change, Insertion, Pass, Requirement, Site, read_elsewhere, steps

FIRST_OPSET_WITH_RMSNORM = 23


Placed = Placement[ir.Value, Operator | ir.Node]


@dataclass(frozen=True)
class Stream(Site):
    """A residual stream: all values that one change of basis reaches from a norm's input.

    `centred` are names of values that an earlier site of this pass has centred; `placement` is what is worth centring.
    """

    region: Region
    opset: int
    centred: frozenset[str]
    placement: Placed
    costs: Costs


Check = Callable[["CenterResidual", Stream], Breach | None]


def _in_the_way(check: Check) -> Check:
    """What is in the way counts only where no placement goes around it."""

    def checked(rule: CenterResidual, stream: Stream) -> Breach | None:
        if stream.placement.readers or (breach := check(rule, stream)) is None:
            return None
        if (why := _no_way_around(rule, stream)) is None:
            return breach
        return Breach(breach.node, f"{breach.reason}; an explicit centring would not pay, since {why}")

    return checked


def _no_way_around(rule: CenterResidual, stream: Stream) -> str | None:
    """Why explicit centrings save nothing in a stream that LayerNorms read; None where none reads it."""
    norms = [use for use in stream.region.norms if _is_blind(use.node, stream.region.size)]
    if not norms:
        return None
    if len({use.value for use in norms}) > 1:
        for met in stream.region.obstructions:
            written = met.node is not None and met.value in met.node.outputs
            if met.value.is_graph_output() or (met.node is not None and not written):
                return f"all that {met.value.name} is computed from has to stay raw: {met.reason}"
        for use in stream.region.readers:
            return f"all that {use.value.name} is computed from has to stay raw: {use.node.op_type} reads it"
    return f"a norm saves {rule.norm_ns:.2f} ns where it takes {rule.centring_ns:.2f}, for each number"


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
        if (reason := _other_than_plain(use.node, stream.region.size)) is not None:
            return Breach(use.node, reason)
    return None


def _other_than_plain(norm: ir.Node, size: int) -> str | None:
    """What a norm over an axis of `size` channels has that RMSNormalization and an Add have not."""
    for position, symbol in ((1, "γ"), (2, "β")):
        parameter = operand(norm, position)
        if parameter is not None and shape_of(parameter) != (size,):
            return f"{symbol} has shape {shape_of(parameter)}, not ({size},)"
    statistic = used_statistic(norm)
    return None if statistic is None else f"its statistic {statistic.name} is used"


def _is_blind(norm: ir.Node, size: int) -> bool:
    """Whether a norm does not see the mean, and can become RMSNormalization."""
    return norm.op_type == "LayerNormalization" and _other_than_plain(norm, size) is None


def _no_norm_writes(rule: CenterResidual, stream: Stream) -> Breach | None:
    for node in stream.region.writing_norms:
        if (reason := _written_mean(node, stream.centred)) is not None:
            return Breach(node, f"{node.op_type} writes the stream{reason}")
    return None


def _written_mean(norm: ir.Node, centred: frozenset[str]) -> str | None:
    """Why a norm's result cannot be centred by centring its β; None where it can."""
    value, shift = operand(norm, 0), operand(norm, 2)
    if norm.op_type != "LayerNormalization" and (value is None or not _has_no_mean(value, centred)):
        return ", and its result has a mean"
    if uniform(operand(norm, 1)) is None:
        return " with a γ that is not one constant"
    if shift is not None and not is_constant(shift):
        return " with a β that is not a constant"
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
    if not stream.placement.readers and len(stream.region.norms) < rule.norms_per_copy:
        for use in _copied(stream.region):
            reader, count = read_elsewhere(use, stream.region.constants), len(stream.region.norms)
            norms = f"{count} norm{'s' * (count != 1)}"
            return Breach(reader, f"{use.value.name} would be copied for {norms}, {rule.norms_per_copy} asked for")
    return None


def _worth_it(rule: CenterResidual, stream: Stream) -> Breach | None:
    if stream.placement.readers or any(one.check(rule, stream) for one in rule.requires if one.check is not _worth_it):
        return None
    reason = "RMSNormalization, with an Add for each β that stays, would save less than a copied table takes"
    return Breach(stream.nodes[0], reason if next(_copied(stream.region), None) else "nothing would be saved")


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
    """LayerNorm(x) → RMSNorm(xP), with P absorbed by all that writes x, or inserted where that pays.

    `norms_per_copy`: a table that others read too (a tied head) is copied only where so many norms get cheaper.
    `norm_ns`, `shift_ns`, `centring_ns`: what an RMSNorm saves, what an Add of β takes that no reader of the norm can
    absorb, and what an explicit centring takes, for each number of a value on the target; their ratios decide.
    """

    norms_per_copy: int = 2
    norm_ns: float = Costs.norm
    shift_ns: float = Costs.shift
    centring_ns: float = Costs.centring

    name: ClassVar[str] = "center-residual"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "the graph's opset has RMSNormalization", _has_rmsnorm),
        Requirement("R2", "every norm that reads the stream is blind to its mean", _in_the_way(_blind_to_the_mean)),
        Requirement(
            "R3", "it normalizes exactly the stream's axis, and only its result is used", _in_the_way(_over_the_axis)
        ),
        Requirement("R4", "no norm writes the stream, unless with a constant γ", _in_the_way(_no_norm_writes)),
        Requirement("R5", "no input or output of the graph is in the stream", _in_the_way(_hidden_from_outside)),
        Requirement("R6", "the stream's constants cannot be overridden", _in_the_way(_own_constants)),
        Requirement("R7", "nothing affine reads the raw stream", _in_the_way(_no_raw_reader)),
        Requirement("R8", "every other operator in it commutes with P", _in_the_way(_all_commute)),
        Requirement("R9", "a copied table serves enough norms", _worth_a_copy),
        Requirement("R10", "what the norms save is more than what stays", _worth_it),
    )

    @property
    def costs(self) -> Costs:
        """The costs that a placement is decided by."""
        return Costs(self.norm_ns, self.shift_ns, self.centring_ns)

    def sites(self, program: Program) -> Iterator[Stream]:
        seen: set[ir.Node] = set()
        for norm in [node for node in program.model.graph if is_operator(node, *NORMS)]:
            if norm.graph is None or norm in seen or not norm.inputs or (value := norm.inputs[0]) is None:
                continue
            if _has_no_mean(value, centred := _centred(program)):
                continue
            region = grow(value, len(shape_of(value) or ()) - 1, CENTRING)
            seen.update(use.node for use in region.norms)
            opset = program.model.opset_imports.get("", 0)
            nodes = tuple(use.node for use in region.norms) or (norm,)
            placement = self.placement(region, centred) if opset >= FIRST_OPSET_WITH_RMSNORM else Placement()
            yield Stream(value.name or "", nodes, region, opset, centred, placement, self.costs)

    def placement(self, region: Region, centred: frozenset[str] = frozenset()) -> Placed:
        """What of a region is worth centring; `centred` are names of values without a mean."""
        costs = self.costs
        savings = {
            use.node: costs.of(costs.norm, use.value)
            - (costs.of(costs.shift, use.value) if _keeps_shift(use.node) else 0)
            for use in region.norms
            if _is_blind(use.node, region.size)
        }
        writers = {node for node in region.writing_norms if _written_mean(node, centred) is None}
        saved = max((costs.of(costs.norm, use.value) for use in region.norms), default=0)

        def insertion(value: ir.Value) -> int:
            return costs.of(costs.centring, value)

        def copy(use: Use) -> int:
            tensor = use.value.const_value
            matrix = tensor is not None and len(tensor.shape) > 1
            return (self.norms_per_copy - 1) * saved if matrix and not _is_centred(use) else 0

        return place(problem_of(region, Prices(savings, writers, insertion, copy)))

    def rewrite(self, site: Stream, change: Change) -> None:
        placement, region = site.placement, site.region
        inserted = {value: _insert_centring(value, site, change) for value in placement.inserted}
        uses = [
            *(Use(node, position, axis) for node, thread in _operators(placement) for position, axis in thread.inputs),
            *(Use(node, 2, 0) for node in _writers(placement) if operand(node, 2) is not None),
        ]
        constants = [use for use in uses if is_constant(operand(use.node, use.position))]
        for use in constants:
            if not (read_elsewhere(use, constants) and _is_centred(use)):
                change.absorb(use, Center(weight_behind(use.value), use.axis), "centred", key=(use.axis,))
        for use in (*uses, *(norm for norm in region.norms if norm.node in placement.readers)):
            if (value := operand(use.node, use.position)) is not None and value in inserted:
                use.node.replace_input_with(use.position, inserted[value])
                change.stamp(use.node)
        for use in region.norms:
            if use.node in placement.readers:
                _to_rmsnorm(use.node, change)
        for value, axis in region.axes.items():
            if value in placement.transformed:
                change.relate(value, "centre", axis)
        change.notes.append(f"{len(placement.readers)} LayerNormalization became RMSNormalization")
        if left := len(region.norms) - len(placement.readers):
            change.notes.append(f"{left} norms of this stream read it raw")


def _operators(placement: Placed) -> list[Operator]:
    return [tie.name for tie in placement.ties if isinstance(tie.name, tuple)]


def _writers(placement: Placed) -> list[ir.Node]:
    return [tie.name for tie in placement.ties if isinstance(tie.name, ir.Node)]


def _keeps_shift(norm: ir.Node) -> bool:
    """Whether β stays behind as an Add, since something other than a product with a constant reads the norm."""
    result, shift = norm.outputs[0], operand(norm, 2)
    if shift is None or uniform(shift) == 0.0:
        return False
    region = grow(result, len(shape_of(result) or ()) - 1, DIAGONAL_AND_SHIFT, origin=norm)
    if region.obstructions or region.norms or region.writing_norms or region.constants:
        return True
    return not all(
        is_operator(use.node, "MatMul") and use.position == 0 and right_factor(use.node, DIAGONAL_AND_SHIFT).constants
        for use in region.readers
    )


def _insert_centring(value: ir.Value, site: Stream, change: Change) -> ir.Value:
    """x − mean(x) behind a value, in front of the first node that reads it."""
    edit, axis, placement = change.editor, site.region.axes[value], site.placement
    readers = {use.node for use in value.uses()}
    first = next(node for node in edit.graph if node in readers)
    axes = edit.derived(("axes", axis), f"axes.{axis}", Constant(np.array([axis])), ir.DataType.INT64)
    shape = [1 if place == axis else size for place, size in enumerate(shape_of(value) or ())]
    mean = edit.node(
        *("ReduceMean", (value, axes), {"keepdims": 1}),
        before=first,
        name=f"{value.name}.mean",
        dtype=value.dtype,
        shape=shape,
    )
    centred = edit.node("Sub", (value, mean), before=first, name=f"{value.name}.centred", like=value)
    served = [name for name in placement.served_by(value) if isinstance(name, ir.Node)]
    gain = sum(placement.readers[norm][1] for norm in served)
    change.insertions.append(
        Insertion(
            transform="centring",
            behind=value.name or "",
            value=centred.name or "",
            cost=site.costs.of(site.costs.centring, value) / PICOSECONDS,
            gain=gain / PICOSECONDS,
            serves=tuple(norm.outputs[0].name or "" for norm in served),
        )
    )
    return centred


def _centred(program: Program) -> frozenset[str]:
    centred = (name for name, relation in program.relations.items() if steps(relation)[-1]["transform"] == "centre")
    return frozenset(centred)


def _has_no_mean(value: ir.Value, centred: frozenset[str]) -> bool:
    """Whether the mean of `value` along its last axis is zero: an earlier site centred it, or it is x − mean(x)."""
    return value.name in centred or _is_explicitly_centred(value)


def _is_explicitly_centred(value: ir.Value) -> bool:
    difference = value.producer()
    if not is_operator(difference, "Sub") or (whole := operand(difference, 0)) is None:
        return False
    mean = operand(difference, 1)
    reduction = None if mean is None else mean.producer()
    rank = len(shape_of(whole) or ())
    return (
        is_operator(reduction, "ReduceMean")
        and reduction.inputs[0] is whole
        and rank > 0
        and [axis % rank for axis in integers(operand(reduction, 1)) or ()] == [rank - 1]
        and reduction.attributes.get_int("keepdims", 1) == 1
    )


def _to_rmsnorm(norm: ir.Node, change: Change) -> None:
    edit, result, shift = change.editor, norm.outputs[0], operand(norm, 2)
    name, attributes = result.name, norm_attributes(norm)
    made = edit.node("RMSNormalization", norm.inputs[:2], attributes, before=norm, name=f"{name}.scaled", like=result)
    if shift is not None:
        made = edit.node("Add", [made, shift], before=norm, name=f"{name}.shifted", like=result)
    edit.take_over(result, made)
