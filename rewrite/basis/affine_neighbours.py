"""What stands before and behind a cluster and could take its constants: y = a ⊙ L(x) + t.

    before    x = W∗u + b      →   L(x′) = y     with W′ = a⊙W, b′ = a⊙b + t on the channels that W writes
    behind    W∗y + b          →   W∗(a⊙x′ + t) + b = (W⊙a)∗x′ + (b + W∗t)     x′ = L(x)

∗ is MatMul, Conv or ConvTranspose. Before, all of it goes in, whatever the padding, for b is added behind it. Behind,
the diagonal always goes in; t would have to be where zeros are put beside y, so that padding stops it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewrite.basis.channel_affine import Cluster, computed
from rewrite.basis.channel_layouts import averages_zeros, layout_step, pads, through_padding
from rewrite.basis.operators import bias_of, width
from rewrite.basis.regions import Cause, Obstruction, Region, Use, grow
from rewrite.basis.scaling import Factor, factors_of, read_besides
from rewrite.basis.transforms import DIAGONAL_AND_SHIFT
from rewrite.ir.axes import Role, Thread, operand
from rewrite.ir.constants import integers, is_constant, is_overridable, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.weights import Constant, Product, Reshape, Response, Scale, Transpose, Weight

CONVOLUTIONS = ("Conv", "ConvTranspose")
AFFINE = ("MatMul", *CONVOLUTIONS)

# -------------------------------------------------------------------------------------------------------------- before


@dataclass(frozen=True)
class Writer:
    """An affine operator that writes channels: its kernel, of which `kernel.axis` holds them, and a kernel's bias."""

    node: ir.Node
    kernel: Use
    bias: Use | None
    groups: int

    def scaled(self, factor: np.ndarray) -> Weight:
        """The kernel with every channel it writes times its factor (d,)."""
        weight = weight_behind(self.kernel.value)
        if is_operator(self.node, "ConvTranspose"):
            return scaled_inside(weight, factor, self.groups)
        return Scale(weight, Constant(factor), self.kernel.axis)


def writer_of(cluster: Cluster) -> Writer | Obstruction:
    """The affine operator that writes a cluster's root, which only the cluster reads; or what is in the way."""
    root = cluster.root
    node = root.producer()

    def met(place: ir.Node | None, reason: str) -> Obstruction:
        return Obstruction(Cause.OPERATOR, root, place, reason)

    if node is None:
        return met(None, f"{root.name} is an input of the graph")
    if root.dtype is None:
        return met(node, f"the type of {root.name} is unknown")
    outside = [use.node for use in root.uses() if use.node not in cluster.nodes]
    if not is_operator(node, *AFFINE):
        if outside and layout_step(node) is not None:
            return met(outside[0], f"{outside[0].op_type} reads {root.name} as it is before")
        return met(node, f"{node.op_type} writes it, which is not affine with constants")
    position, axis = _written_by(node, cluster.root_axis)
    kernel, bias = operand(node, position), operand(node, 2)
    if axis is None or kernel is None:
        return met(node, f"axis {cluster.root_axis} of {root.name} is none that {node.op_type}'s constants write")
    for value in (kernel, bias) if is_operator(node, *CONVOLUTIONS) else (kernel,):
        if value is not None and not is_constant(value) and (value is kernel or computed(value) is None):
            text = "is an initializer that is also a graph input" if is_overridable(value) else "is not a constant"
            return met(node, f"{node.op_type} writes it with {value.name}, which {text}")
    if root.is_graph_output():
        return met(node, f"{root.name} is an output of the graph")
    if outside:
        return met(outside[0], f"{outside[0].op_type} reads {root.name} as it is before")
    for use in kernel.uses():
        if use.node is not node:
            return met(use.node, f"{kernel.name} is also read here, and would have to be copied")
    biased = Use(node, 2, 0) if bias is not None and is_operator(node, *CONVOLUTIONS) else None
    return Writer(node, Use(node, position, axis), biased, node.attributes.get_int("group", 1))


def bias_behind(bias: Use) -> Weight:
    """A convolution's bias as an expression: a constant's own, or the numbers that a few nodes compute of constants."""
    if is_constant(bias.value):
        return weight_behind(bias.value)
    if (array := computed(bias.value)) is None:
        raise ValueError(f"{bias.value.name} is not a constant")
    return Constant(array)


def _written_by(node: ir.Node, axis: int) -> tuple[int, int | None]:
    """The operand and its axis that write axis `axis` of an affine operator's result; None where they do not."""
    if is_operator(node, *CONVOLUTIONS):
        return 1, ((1 if node.op_type == "ConvTranspose" else 0) if axis == 1 else None)
    left, right, result = (len(shape_of(value) or ()) for value in (*node.inputs[:2], node.outputs[0]))
    if left < 2 or right < 2 or axis not in (result - 1, result - 2):
        return 1, None
    return (1, right - 1) if axis == result - 1 else (0, left - 2)


# -------------------------------------------------------------------------------------------------------------- behind


@dataclass(frozen=True)
class Readers:
    """All that read a cluster's result, each with its constants: what takes the diagonal, and the shift where it can.

    `region` are the values from the result to them. `stopped` is what is in the way of the shift, which then stays as
    an addition; None where all of it goes in.
    """

    region: Region
    factors: dict[ir.Node, Factor]
    stopped: Obstruction | None


def readers_of(cluster: Cluster, growth: float) -> Readers | Obstruction:
    """What reads a cluster's result and can take it; or what is in the way.

    Matrix products that have no bias get new ones of at most `growth` numbers a channel.
    """
    shifted = bool(cluster.shift.any())
    readers = _readers(cluster)
    if isinstance(readers, Obstruction) or not shifted:
        return readers
    stopped = _stops_shift(_region(cluster, shifted=True), readers.factors, growth)
    if stopped is None:
        return readers
    if (cluster.factor == 1.0).all():
        return stopped
    if not _fits(cluster):
        channel = int(np.argmin(np.abs(cluster.factor)))
        least = f"the factor {cluster.factor[channel]:g} of channel {channel}"
        reason = f"{stopped.reason}, and {least} allows no shift in front"
        return Obstruction(stopped.cause, stopped.value, stopped.node, reason)
    return Readers(readers.region, readers.factors, stopped)


def _fits(cluster: Cluster) -> bool:
    """Whether t/a is a vector of finite numbers of the result's type."""
    dtype = cluster.result.dtype
    if dtype is None or not cluster.factor.all():
        return False
    with np.errstate(all="ignore"):
        return bool(np.isfinite((cluster.shift / cluster.factor).astype(dtype.numpy())).all())


def contracts(cluster: Cluster) -> bool:
    """Whether any that reads the result, through layout or padding, contracts it with constants."""
    return bool(factors_of(_region(cluster, shifted=False)))


def _readers(cluster: Cluster) -> Readers | Obstruction:
    """The readers for the diagonal alone."""
    region = _region(cluster, shifted=False)
    value = cluster.result

    def met(place: ir.Node | None, reason: str) -> Obstruction:
        return Obstruction(Cause.OPERATOR, value, place, reason)

    for known in (cluster.root, *(use.node.outputs[0] for use in region.readers)):
        if known.dtype is None:
            return met(known.producer(), f"the type of {known.name} is unknown")
    for one in region.obstructions:
        passing = "" if one.cause is not Cause.OPERATOR else "; a factor and a shift do not pass it together"
        return Obstruction(one.cause, one.value, one.node, one.reason + passing)
    for node in (*(use.node for use in (*region.norms, *region.constants)), *region.writing_norms):
        return met(node, f"{node.op_type} touches it as well")
    if not region.readers:
        return met(cluster.last, "nothing reads it")
    factors = factors_of(region)
    for use in region.readers:
        if use.node not in factors or use.position != 0:
            return met(use.node, f"{use.node.op_type} multiplies it with something that is not a constant")
    if (besides := read_besides(factors)) is not None:
        return met(besides[0], f"{besides[1].name} is also read here, and would have to be copied")
    return Readers(region, factors, None)


def _region(cluster: Cluster, *, shifted: bool) -> Region:
    """The values behind the result, through what moves channels, and zeros that are put beside them if not shifted."""

    def through(node: ir.Node, position: int, axis: int, *, result: bool = False) -> Thread:
        thread = through_padding(node, position, axis, result=result)
        if is_operator(node, *CONVOLUTIONS) and position == 0 and axis == 1 and not result:
            # Of any number of groups: each has its own part of the diagonal.
            return Thread(Role.CONTRACT, ((0, 1), (1, int(node.op_type == "Conv"))), ())
        if not is_operator(node, "Pad", "AveragePool") or thread.role is not Role.LINEAR:
            return thread
        if shifted and (reason := _puts_zeros(node)):
            return Thread(Role.OPAQUE, thread.inputs, thread.outputs, reason)
        return Thread(Role.MOVE, thread.inputs, thread.outputs)

    return grow(cluster.result, cluster.axis, DIAGONAL_AND_SHIFT, cluster.last, through)


def _puts_zeros(node: ir.Node) -> str | None:
    """Why a shift does not pass a Pad or an AveragePool."""
    if is_operator(node, "AveragePool"):
        return "AveragePool counts the zeros of its padding, which are no shift" if averages_zeros(node) else None
    constant = node.attributes.get_string("mode", "constant") == "constant"
    filled = constant and any(integers(operand(node, 1)) or (1,))
    return "Pad puts zeros beside it, which are no shift" if filled else None


def _stops_shift(region: Region, factors: dict[ir.Node, Factor], growth: float) -> Obstruction | None:
    """What the shift does not pass, of values and readers that the diagonal passes."""
    if region.obstructions:
        return region.obstructions[0]
    value = region.seed
    for node, factor in factors.items():
        reason = None
        if is_operator(node, "ConvTranspose"):
            reason = "ConvTranspose adds up fewer of its taps at the border"
        elif is_operator(node, "Conv"):
            bias = operand(node, 2)
            if pads(node):
                reason = "Conv pads it with zeros, which are no shift"
            elif bias is not None and not is_constant(bias) and computed(bias) is None:
                reason = f"its bias {bias.name} is not a constant of the network"
        elif not _is_one_matrix(factor):
            reason = "the shift meets a stack of matrices, whose biases differ"
        if reason is not None:
            return Obstruction(Cause.OPERATOR, value, node, reason)
    new = {node: width(node) for node in factors if is_operator(node, "MatMul") and bias_of(node) is None}
    if sum(new.values()) > growth * region.size:
        reason = f"the shift needs new biases of {sum(new.values())} numbers, {growth:g} × {region.size} allowed"
        return Obstruction(Cause.OPERATOR, value, max(new, key=lambda node: new[node]), reason)
    return None


def _is_one_matrix(factor: Factor) -> bool:
    """Whether the stored matrix is the one that is multiplied with; a Gather of its rows takes others."""
    stored = [len(weight_behind(one.value).shape) for one in factor.constants]
    return stored == [2] and factor.is_laid_out_by("Transpose", "Identity", "Cast")


def diagonal_in(use: Use, groups: int, factor: np.ndarray) -> Weight:
    """A constant that a reader multiplies the channels with, times their factors (d,)."""
    weight = weight_behind(use.value)
    if is_operator(use.node, "Conv") and use.position == 1:
        return scaled_inside(weight, factor, groups)
    return Scale(weight, Constant(factor), use.axis)


def shift_out(reader: ir.Node, factor: Factor, shift: np.ndarray) -> Weight:
    """What a reader makes of the shift (d,) that is the same everywhere: the vector W∗t (n,)."""
    (use,) = factor.constants
    weight = weight_behind(use.value)
    if is_operator(reader, "MatMul"):
        return Product(Constant(shift), weight if use.axis == 0 else Transpose(weight, (1, 0)))
    return Response(weight, Constant(shift), factor.groups)


# ------------------------------------------------------------------------------------------------------------- kernels


def scaled_inside(weight: Weight, factor: np.ndarray, groups: int) -> Weight:
    """A kernel (n, d/groups, …) times factors (d,), of which every group of its first axis meets its own part.

    These are the channels that a Conv reads, and those that a ConvTranspose writes.
    """
    if groups == 1:
        return Scale(weight, Constant(factor), 1)
    made, inside, *window = weight.shape
    each, rest = made // groups, tuple(range(3, 3 + len(window)))
    if inside == 1:
        return Scale(weight, Constant(np.repeat(factor, each)), 0)
    parted = Transpose(Reshape(weight, (groups, each, inside, *window)), (0, 2, 1, *rest))
    scaled = Scale(Reshape(parted, (groups * inside, each, *window)), Constant(factor), 0)
    back = Transpose(Reshape(scaled, (groups, inside, each, *window)), (0, 2, 1, *rest))
    return Reshape(back, weight.shape)
