"""Where a positive diagonal goes: through gates and grouped kernels, and into what contracts with a constant.

`follow_scaled` adds to the threads of `rewrite.ir.axes` what holds for a diagonal D > 0 and for no other transform:

    gate        g ⊙ (u·D)       = (g ⊙ u)·D          one factor carries it, the other stays as it is
    PRelu       prelu(x·D; a)   = prelu(x; a)·D      the slopes stay
    BatchNorm   γ·D, β·D        = BN(x)·D            as a writer; frozen
    Conv, any number of groups: a channel of the result is written by its own kernel, K·D and b·D

`factor_of` finds the constants that a contraction multiplies the channels with, and `Factor.behind` what they become.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from rewrite.basis.operators import right_factor
from rewrite.basis.regions import Cause, Obstruction, Region, Use, grow
from rewrite.basis.transforms import DIAGONAL_AND_SHIFT, POSITIVE_DIAGONAL
from rewrite.ir.axes import Role, Thread, follow, operand
from rewrite.ir.constants import is_constant, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.weights import Map, Reshape, Transformed, Transpose, Weight, row_blocks

# -------------------------------------------------------------------------------------------- what a contraction reads


@dataclass(frozen=True)
class Factor:
    """The constants a contraction multiplies a region's channels with: each operand, and its axis of channels.

    `values` are what lies between the constants and the contraction (a transposed table), each with its axis of
    channels; `readers` all that contract with them. `groups` is not 1 for a grouped Conv, whose kernel
    (n, d/groups, …) has its d channels on two axes.
    """

    constants: tuple[Use, ...]
    values: Mapping[ir.Value, int] = field(default_factory=dict[ir.Value, int])
    readers: tuple[Use, ...] = ()
    groups: int = 1

    def behind(self, use: Use, transform: Map) -> Weight:
        """The expression of one of `constants` with `transform`, a diagonal, on its channels."""
        weight = weight_behind(use.value)
        if self.groups == 1:
            return Transformed(weight, transform, use.axis)
        made, inside, *window = weight.shape
        each, groups, rest = made // self.groups, self.groups, tuple(range(3, 3 + len(window)))
        cut = Transpose(Reshape(weight, (groups, each, inside, *window)), (0, 2, 1, *rest))
        rows = Transformed(Reshape(cut, (groups * inside, each, *window)), transform, 0)
        back = Transpose(Reshape(rows, (groups, inside, each, *window)), (0, 2, 1, *rest))
        return Reshape(back, weight.shape)

    def is_laid_out_by(self, *op_types: str) -> bool:
        """Whether only operators of these types stand between the constants and the contraction."""
        return all(is_operator(value.producer(), *op_types) for value in self.values)

    def maxima(self, size: int) -> np.ndarray:
        """max|W| of every channel (d,), over all constants."""
        found = np.zeros(size)
        for use in self.constants:
            weight = weight_behind(use.value)
            if self.groups == 1:
                found = np.maximum(found, channel_maxima(weight, use.axis))
            else:
                kernels = np.abs(weight.numpy()).reshape(self.groups, -1, *weight.shape[1:])
                found = np.maximum(found, kernels.max(axis=(1, *range(3, kernels.ndim))).reshape(-1))
        return found


def factor_of(reader: Use) -> Factor | None:
    """The constant factor of a contraction that reads channels as its first operand; None where there is none."""
    node = reader.node
    if reader.position != 0:
        return None
    if is_operator(node, "MatMul"):
        region = right_factor(node, DIAGONAL_AND_SHIFT)
        if region.obstructions or region.writing_norms or region.norms or not region.constants:
            return None
        return Factor(tuple(region.constants), dict(region.axes), tuple(region.readers))
    if is_operator(node, "Conv", "ConvTranspose") and is_constant(node.inputs[1]):
        axis, groups = (0, 1) if node.op_type == "ConvTranspose" else (1, node.attributes.get_int("group", 1))
        return Factor((Use(node, 1, axis),), readers=(Use(node, 1, axis),), groups=groups)
    return None


def factors_of(region: Region) -> dict[ir.Node, Factor]:
    """What every reader of a region multiplies it with; readers without a constant factor are left out."""
    found = {use.node: factor_of(use) for use in region.readers}
    return {node: factor for node, factor in found.items() if factor is not None}


def read_besides(factors: Mapping[ir.Node, Factor]) -> tuple[ir.Node, ir.Value] | None:
    """A node that reads a constant of `factors` other than to contract, and what it reads."""
    constants = {(use.node, use.position) for factor in factors.values() for use in factor.constants}
    for factor in factors.values():
        for use in factor.readers:
            if use.node not in factors or use.position != 1:
                return use.node, use.value
        for use in factor.constants:
            for other in use.value.uses():
                if (other.node, other.idx) not in constants:
                    return other.node, use.value
    return None


def channel_maxima(weight: Weight, axis: int) -> np.ndarray:
    """max|W| along every axis but `axis`, read by blocks of rows."""
    others = tuple(other for other in range(len(weight.shape)) if other != axis)
    found = np.zeros(weight.shape[axis])
    for block in row_blocks(weight.shape):
        place = block[axis]
        found[place] = np.maximum(found[place], np.abs(weight.read(block)).max(axis=others, initial=0.0))
    return found


# ------------------------------------------------------------------------------------------------ where a diagonal goes


@dataclass
class _Gates:
    """Which factor of each product of two values carries the diagonal; chosen once a growth.

    To choose one, the factors' own regions are grown, in which there are products again: all these growths share what
    is known of a product whose result is reached. One that is still being chosen is an obstruction to the others, for
    cosines that many products share lead from each to all.
    """

    linear: dict[tuple[ir.Node, int], int | None] = field(default_factory=dict[tuple[ir.Node, int], "int | None"])
    chosen: dict[ir.Node, int] = field(default_factory=dict[ir.Node, int])

    def follow(self, node: ir.Node, position: int, axis: int, *, result: bool = False) -> Thread:
        thread = follow(node, position, axis, result=result)
        if is_operator(node, "Mul") and thread.role is Role.CHANNELWISE:
            return self.gate(node, position, thread, result)
        if is_operator(node, "PRelu") and (result or position == 0):
            return Thread(Role.HOMOGENEOUS, ((0, axis),), ((0, axis),))
        if result and axis == 1 and is_operator(node, "Conv"):
            bias = ((2, 0),) if operand(node, 2) is not None else ()
            return Thread(Role.CHANNEL_SCALE, ((1, 0), *bias), ((0, 1),))
        if result and axis == 1 and is_operator(node, "BatchNormalization"):
            if not node.attributes.get_int("training_mode", 0):
                return Thread(Role.CHANNEL_SCALE, ((1, 0), (2, 0)), ((0, 1),))
        if not result and position == 0 and axis == 1 and is_operator(node, "Conv"):
            return Thread(Role.CONTRACT, ((0, 1), (1, 1)), ())
        return thread

    def gate(self, node: ir.Node, position: int, thread: Thread, result: bool) -> Thread:
        ports = {port[0]: port for port in thread.inputs}
        if node.inputs[0] is node.inputs[1]:
            return Thread(Role.OPAQUE, thread.inputs, thread.outputs, "Mul squares the value")
        if node not in self.chosen:
            carries = self.linear_factor(node, ports, thread.outputs[0][1]) if result else position
            if carries is None:
                return Thread(Role.OPAQUE, thread.inputs, thread.outputs, "Mul multiplies two values of a cycle")
            self.chosen[node] = carries
        kept = self.chosen[node]
        if not result and position != kept:
            return Thread(Role.OPAQUE, thread.inputs, thread.outputs, "Mul multiplies two values of the region")
        return Thread(Role.SCALE, (ports[kept],), thread.outputs)

    def linear_factor(self, product: ir.Node, ports: dict[int, tuple[int, int]], axis: int) -> int | None:
        """The operand of g ⊙ u that a diagonal reaches constants through: before one behind an activation, a linear
        one. None while that is being asked."""
        key = (product, axis)
        if key not in self.linear:
            self.linear[key] = None
            self.linear[key] = self.reaching(product, ports)
        return self.linear[key]

    def reaching(self, product: ir.Node, ports: dict[int, tuple[int, int]]) -> int:
        passed: list[int] = []
        for position, (_, axis) in ports.items():
            value = product.inputs[position]
            if value is None or is_constant(value):
                continue
            region = _grown(value, axis, product, _Gates(self.linear))
            parted = _parted(region)
            if all(met is parted for met in region.obstructions) and not region.writing_norms and not region.norms:
                if not any(is_operator(node, "Relu", "LeakyRelu", "PRelu") for node in region.nodes):
                    return position
                passed.append(position)
        return passed[0] if passed else max(ports)


def grow_scaled(seed: ir.Value, axis: int, origin: ir.Node | None = None) -> Region:
    """The region of `seed` for a positive diagonal, gates and grouped kernels included.

    A factor that a gate keeps as it is must not lie in the region: where it does, that is an obstruction.
    """
    return _grown(seed, axis, origin, _Gates())


def _grown(seed: ir.Value, axis: int, origin: ir.Node | None, gates: _Gates) -> Region:
    region = grow(seed, axis, POSITIVE_DIAGONAL, origin, gates.follow)
    for product, kept in gates.chosen.items():
        other = product.inputs[1 - kept]
        if other is not None and other in region.axes:
            reason = "Mul multiplies two values of the region"
            region.obstructions.append(Obstruction(Cause.OPERATOR, other, product, reason))
    return region


@dataclass(frozen=True)
class Part:
    """A region that is written as channels `offset` … of a wider value, which a Split parts; and that value's region.

    A gate and the up branch beside it are often one product.
    """

    split: ir.Node
    offset: int
    whole: Region

    def widened(self, values: np.ndarray) -> np.ndarray:
        """A diagonal of the part as one of the whole: 1 in the channels beside it."""
        wide = np.ones(self.whole.size)
        wide[self.offset : self.offset + len(values)] = values
        return wide


def part_of(region: Region) -> Part | None:
    """What writes `region` where that is one Split alone, which is then no obstruction of `region` any more."""
    parted = _parted(region)
    if parted is None or (split := parted.node) is None or (whole := split.inputs[0]) is None:
        return None
    region.obstructions.remove(parted)
    sizes = [(shape_of(value) or ())[region.axes[parted.value]] for value in split.outputs]
    offset = sum(size for size in sizes[: split.outputs.index(parted.value)] if isinstance(size, int))
    return Part(split, offset, grow_scaled(whole, region.axes[parted.value], origin=split))


def _parted(region: Region) -> Obstruction | None:
    """Where one Split alone, into parts of known sizes, writes `region`."""
    written = [met for met in region.obstructions if is_operator(met.node, "Split") and met.value in met.node.outputs]
    if len(written) != 1 or (split := written[0].node) is None:
        return None
    sizes = [(shape_of(value) or ())[region.axes[written[0].value]] for value in split.outputs]
    return written[0] if all(isinstance(size, int) for size in sizes) else None
