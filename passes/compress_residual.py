"""Keep a centred stream in one channel less: a vector without a mean has only d − 1 free numbers.

      x = xP on all of S      every writer of S is affine with W, b      every reader of S is x·V with a constant V
    ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
      x′ = x·T is what W·T and b·T write,   rms_ε(x′) = rms_ε(x)·T,   x·V = x′·(T⁺V)         T = √((d − 1)/d)·U

U (d, d − 1) are the first columns of the reflection that sends 1/√d to e_d: UᵀU = I and UUᵀ = P = I − 11ᵀ/d. The scale
makes the mean square over d − 1 channels what it was over d, so that the ordinary RMSNormalization serves with the ε it
has; a constant γ stays. Readers absorb T⁺ = √(d/(d − 1))·Uᵀ. It runs after center-residual and before any rotation.
d − 1 channels suit matrix kernels less than d do: no recipe runs it by default.

Shapes    x (..., d)   x′ (..., d − 1)   T (d, d − 1)   W (k, d)   b (d,)   V (d, n)
Relation  equal over the reals; every value of S is the original's times P·T
Source    Jiang et al. 2023, arXiv:2305.14858, §4 (CRMSNorm, by a dropped channel); the scaled isometry is ours
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.factors import factors, unabsorbed
from rewrite.basis.operators import NORMS
from rewrite.basis.regions import Cause, Region, Use, grow
from rewrite.basis.transforms import CENTRING, ORTHOGONAL
from rewrite.ir.axes import follow, operand
from rewrite.ir.constants import integers, uniform, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Add, Center, Product, Scale, Slice, Transpose, Weight
from rewrite.passes.rotate_residual import absorb, is_done
from rewrite.proof.transforms import Isometry
from rewrite.rule import Breach, Change, Pass, Requirement, Site, steps

SIZED = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}
"""Operators that are told the sizes of their result, and the operand that tells them."""

CONTRACTIONS = ("MatMul", "Conv", "ConvTranspose")
"""Contractions that mean the same for any number of channels (attention divides by the root of theirs)."""


@dataclass(frozen=True)
class Stream(Site):
    """A residual stream with its norms' results; `centred` are names of values that were centred last."""

    region: Region
    factors: list[Region]
    centred: frozenset[str]


def _is_centred(rule: CompressResidual, stream: Stream) -> Breach | None:
    region = stream.region
    for node in (*(use.node for use in region.norms), *region.writing_norms):
        if node.op_type != "RMSNormalization":
            return Breach(node, f"{node.op_type} is left, so center-residual has not centred the stream")
    for use in region.constants:
        for value in use.node.outputs:
            related = value not in region.axes or value.name in stream.centred
            if not related and not _without_mean(weight_behind(use.value), use.axis):
                return Breach(use.node, f"{value.name} is written with a mean, or turned since it was centred")
    return None


def _scales_folded(rule: CompressResidual, stream: Stream) -> Breach | None:
    for node in (*(use.node for use in stream.region.norms), *stream.region.writing_norms):
        return Breach(node, f"the γ of {node.op_type} is not one constant, and fold-norm left it")
    for node in _norms(stream.region):
        scale = operand(node, 1)
        if shape_of(scale) != (stream.region.size,) or uniform(scale) is None:
            return Breach(node, f"γ has shape {shape_of(scale)}, not ({stream.region.size},)")
    return None


def _hidden_from_outside(rule: CompressResidual, stream: Stream) -> Breach | None:
    return Breach.at(stream.region.met(Cause.INTERFACE))


def _own_constants(rule: CompressResidual, stream: Stream) -> Breach | None:
    return Breach.at(stream.region.met(Cause.OVERRIDABLE))


def _all_commute(rule: CompressResidual, stream: Stream) -> Breach | None:
    return Breach.at(stream.region.met(Cause.OPERATOR))


def _constant_readers(rule: CompressResidual, stream: Stream) -> Breach | None:
    for use in stream.region.readers:
        if not is_operator(use.node, *CONTRACTIONS):
            return Breach(use.node, f"what {use.node.op_type} computes depends on the number of channels")
    return Breach.at(unabsorbed(stream.region, stream.factors))


def _sizes_change(rule: CompressResidual, stream: Stream) -> Breach | None:
    if stream.region.size < 2:
        return Breach(stream.nodes[0], f"a stream of {stream.region.size} channel has none to spare")
    for region in (stream.region, *stream.factors):
        for node in _sized(region):
            if (reason := _fixed(region, node)) is not None:
                return Breach(node, reason)
    return None


def _without_mean(weight: Weight, axis: int) -> bool:
    """Whether an expression is centred along `axis` by the way it is made (a folded β times a centred matrix)."""
    if isinstance(weight, Center):
        return weight.axis == axis or _without_mean(weight.inner, axis)
    if isinstance(weight, Scale):
        return (not weight.factor.shape or weight.axis != axis) and _without_mean(weight.inner, axis)
    if isinstance(weight, Add):
        return all(_without_mean(part, axis) for part in weight.parts)
    if isinstance(weight, Product):
        return _without_mean(weight.matrix, axis + 1)
    if isinstance(weight, Transpose):
        return _without_mean(weight.inner, weight.permutation[axis])
    return False


def _norms(region: Region) -> list[ir.Node]:
    """The norms inside the region."""
    return [node for node in region.nodes if is_operator(node, *NORMS)]


def _sized(region: Region) -> list[ir.Node]:
    return [node for node in region.nodes if is_operator(node, *SIZED)]


def _fixed(region: Region, node: ir.Node) -> str | None:
    """Why the size of the region's axis cannot be changed in what `node` is told; None where it can."""
    axis, told = region.axes[node.outputs[0]], _told(node)
    place = axis - len(shape_of(node.outputs[0]) or ())
    if told is None or told[place] is None:
        return f"the sizes that {node.op_type} is told are computed"
    before = [port for port in follow(node, 0, axis, result=True).inputs if port[0] == 0]
    if node.op_type == "Reshape" and before and (source := before[0][1]) != axis:
        # A 0 copies the size at its own place, and here that is not the place of the axis.
        result = shape_of(node.outputs[0]) or ()
        copied = source < len(told) and result[source] == region.size and told[source] in (0, None)
        if told[axis] == 0 or copied:
            return "Reshape copies a size from another place"
    return None


def _told(node: ir.Node) -> list[int | None] | None:
    """The sizes that `node` is told, None for one that is computed; None where not even their number is known."""
    sizes: list[int | None] = []
    for piece in _pieces(node):
        known = integers(piece)
        if known is None:
            length = shape_of(piece)
            if length is None or len(length) != 1 or not isinstance(length[0], int):
                return None
            known = (None,) * length[0]
        sizes += known
    return sizes


def _pieces(node: ir.Node) -> list[ir.Value | None]:
    """What the sizes that `node` is told are joined from."""
    told = operand(node, SIZED[node.op_type])
    maker = None if told is None else told.producer()
    return list(maker.inputs) if maker is not None and is_operator(maker, "Concat") else [told]


@dataclass(frozen=True)
class CompressResidual(Pass[Stream]):
    """A centred stream in d − 1 channels: writers absorb an isometry, readers its left inverse."""

    name: ClassVar[str] = "compress-residual"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "center-residual has centred all that is written, and nothing turned it since", _is_centred),
        Requirement("R2", "every γ is one constant a channel, and there is no β", _scales_folded),
        Requirement("R3", "no input or output of the graph is in the stream", _hidden_from_outside),
        Requirement("R4", "the stream's constants cannot be overridden", _own_constants),
        Requirement("R5", "every other operator in it commutes with T", _all_commute),
        Requirement("R6", "every reader multiplies it with constants, and no one else reads those", _constant_readers),
        Requirement("R7", "the number of channels is written where it can be changed", _sizes_change),
    )

    def sites(self, program: Program) -> Iterator[Stream]:
        seen: set[ir.Value] = set()
        for norm in [node for node in program.model.graph if is_operator(node, *NORMS)]:
            if norm.graph is None or not norm.inputs or (value := norm.inputs[0]) is None or value in seen:
                continue
            region = grow(value, len(shape_of(value) or ()) - 1, ORTHOGONAL)
            seen.update(region.axes)
            if is_done(region, program, self.name):
                continue
            last = {name: steps(relation)[-1] for name, relation in program.relations.items()}
            centred = frozenset(name for name, step in last.items() if step["transform"] == "centre")
            nodes = tuple(dict.fromkeys((*_norms(region), *(use.node for use in region.norms)))) or (norm,)
            yield Stream(value.name or "", nodes, region, factors(region, CENTRING), centred)

    def rewrite(self, site: Stream, change: Change) -> None:
        region, isometry = site.region, Isometry(site.region.size)
        for each in (region, *site.factors):
            _tell(each, change)
        for node in _norms(region):
            scale = Use(node, 1, 0)
            shorter = Slice(weight_behind(scale.value), (slice(0, isometry.width),))
            change.absorb(scale, shorter, "compressed", key=())
        absorb(change, region.constants, isometry, "compressed")
        absorb(change, [use for factor in site.factors for use in factor.constants], isometry.dual, "compressed")
        for each in (region, *site.factors):
            for value, axis in each.axes.items():
                value.shape = ir.Shape(_with(shape_of(value) or (), axis, isometry.width))
        for value, axis in region.axes.items():
            change.relate(value, isometry, axis)
        for value in dict.fromkeys(value for factor in site.factors for value in factor.axes):
            change.rename(value, "compressed")
        change.notes.append(f"{len(site.nodes)} norms over {isometry.width} channels in place of {isometry.size}")


def _tell(region: Region, change: Change) -> None:
    """Let operators that are told sizes make one channel less."""
    for node in _sized(region):
        place = region.axes[node.outputs[0]] - len(shape_of(node.outputs[0]) or ())
        if (_told(node) or ())[place] != region.size:
            continue
        pieces, left = _pieces(node), -place
        for index in range(len(pieces) - 1, -1, -1):
            known = integers(pieces[index])
            length = len(known) if known is not None else int((shape_of(pieces[index]) or (0,))[0])
            if left <= length and known is not None:
                pieces[index] = _shorter(known, length - left, change)
                break
            left -= length
        told = node.inputs[SIZED[node.op_type]]
        if len(pieces) > 1:
            name = f"{node.outputs[0].name}.sizes"
            made = change.editor.node("Concat", pieces, {"axis": 0}, before=node, name=name, like=told)
        else:
            made = pieces[0]
        node.replace_input_with(SIZED[node.op_type], made)
        change.stamp(node)


def _shorter(sizes: tuple[int, ...], place: int, change: Change) -> ir.Value:
    """The constant `sizes` with one less at `place`."""
    less = tuple(size - (index == place) for index, size in enumerate(sizes))
    name = "sizes." + "_".join(str(size).replace("-", "m") for size in less)
    if name not in change.editor.made:
        change.editor.made[name] = change.editor.initializer(name, np.asarray(less, np.int64))
    return change.editor.made[name]


def _with(shape: tuple[int | str | None, ...], axis: int, size: int) -> list[int | str | None]:
    return [size if place == axis else each for place, each in enumerate(shape)]
