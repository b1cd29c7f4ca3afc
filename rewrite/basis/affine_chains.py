"""Chains: operators in a row that are affine in one value, with constants.

    v ──▶ MatMul W₁ ──▶ Add b₁ ──▶ Mul s ──▶ MatMul W₂ ──▶ y            y = A₄(A₃(A₂(A₁(v))))

`link_of` says what one operator is, if it is affine: a convolution, an average pool, zero padding, a matrix, a frozen
BatchNormalization, arithmetic with a number or with one number a channel. `chain_behind` follows them from a value
towards the inputs, and `stencil_of` makes a run of them one `Stencil`. What looks like such an operator and is not one
(statistics of the batch, a default that a caller may override, a pool that does not count its padding) is a link with a
fault, so that whoever asked can say why not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import onnx_ir as ir

from rewrite.basis.channel_affine import degenerate, unfrozen
from rewrite.basis.placement import NOMINAL
from rewrite.basis.regions import Use
from rewrite.basis.stencils import PASS, Stencil, behind, diagonal, lost_outside, transposed
from rewrite.ir.axes import operand
from rewrite.ir.constants import integers, is_constant, is_overridable, numbers, uniform, weight_behind
from rewrite.ir.edit import TRANSFORM, is_inference_dropout, is_operator, only_use, shape_of
from rewrite.ir.weights import Constant, Weight


class Kind(Enum):
    """Where an operator's channels are."""

    KERNEL = "on axis 1, with spatial axes behind it"
    MATRIX = "on the last axis"


class Cause(Enum):
    """Why an operator, or a run of them, is not affine with constants."""

    OVERRIDABLE = "a constant may be overridden by a caller"
    NOT_AFFINE = "it computes something else"
    READ = "its result is read by others"
    SHARED = "a matrix or kernel is read by others"


@dataclass(frozen=True)
class Fault:
    """What is wrong, where."""

    cause: Cause
    node: ir.Node
    reason: str


@dataclass(frozen=True, eq=False)
class Diagonal:
    """A factor and a shift for each channel of `axis`, or the same for all where they are single numbers.

    None is 1, or 0.
    """

    factor: np.ndarray | None = None
    shift: np.ndarray | None = None
    axis: int | None = None


@dataclass(frozen=True, eq=False)
class Link:
    """One operator of a chain: the operand it is affine in, its constants, and what it does with them."""

    node: ir.Node
    position: int
    constants: tuple[Use, ...]
    form: Stencil | Diagonal | None
    kind: Kind | None = None
    fault: Fault | None = None

    @property
    def source(self) -> ir.Value:
        """The value it is applied to."""
        value = self.node.inputs[self.position]
        if value is None:
            raise ValueError(f"operand {self.position} of {self.node.name} is left out")
        return value

    @property
    def result(self) -> ir.Value:
        """The value it makes."""
        return self.node.outputs[0]

    @property
    def weights(self) -> bool:
        """Whether it holds a matrix or a kernel."""
        return is_operator(self.node, "MatMul", "Conv")

    @property
    def cost(self) -> int:
        """What it costs, in multiply–adds: its own, and a pass over its result."""
        if is_operator(self.node, "Identity", "Dropout"):
            return 0
        own = self.form.multiplications if isinstance(self.form, Stencil) and self.node.op_type != "Pad" else 0
        return elements(self.result) * (own + PASS)


def elements(value: ir.Value) -> int:
    """How many numbers a value has; a size that is not static counts as `NOMINAL`."""
    return math.prod(size if isinstance(size, int) else NOMINAL for size in shape_of(value) or ())


def link_of(node: ir.Node | None) -> Link | None:
    """What `node` is in a chain; None where it is nothing of the kind.

    A transform that a pass inserted to be computed at run time is none: it stands where it is meant to.
    """
    if node is None or node.domain != "" or node.outputs[0].dtype is None or TRANSFORM in node.metadata_props:
        return None
    describe = _LINKS.get(node.op_type)
    return describe(node) if describe is not None and node.outputs[0].dtype.is_floating_point() else None


def chain_behind(value: ir.Value) -> list[Link]:
    """The links that make `value`, last first, as far as they have their channels on one axis."""
    links: list[Link] = []
    kind: Kind | None = None
    axis: int | None = None
    while (link := link_of(value.producer())) is not None:
        # A later output (BatchNormalization's statistics) is no affine function of the operand.
        if link.result is not value:
            break
        if link.kind is not None:
            rank = len(shape_of(link.result) or ())
            here = 1 if link.kind is Kind.KERNEL else rank - 1
        else:
            here = link.form.axis if isinstance(link.form, Diagonal) else None
        if (kind is not None and link.kind not in (None, kind)) or (None not in (axis, here) and axis != here):
            break
        kind, axis = kind or link.kind, here if axis is None else axis
        links.append(link)
        value = link.source
    return links


def kind_of(links: Sequence[Link]) -> Kind | None:
    """The kind that a run of links has, or None where all act on each channel by itself."""
    return next((link.kind for link in links if link.kind is not None), None)


def axis_of(links: Sequence[Link]) -> int | None:
    """The axis on which a run of links that act on each channel by itself has its channels; None: any."""
    axes = (link.form.axis for link in links if isinstance(link.form, Diagonal))
    return next((axis for axis in axes if axis is not None), None)


def fault_of(links: Sequence[Link], reader: ir.Node | None) -> Fault | None:
    """The first fault of a run of links, last first: their own, or that something else than the next one reads.

    `reader` is who is to read the last one's result.
    """
    for link in links:
        if link.fault is not None:
            return link.fault
    for link in links:
        value = link.result
        if value.is_graph_output():
            return Fault(Cause.READ, link.node, f"{value.name} is an output of the graph")
        others = [use.node for use in value.uses() if use.node is not reader]
        if others:
            return Fault(Cause.READ, others[0], f"{value.name} is also read here")
        if only_use(value) is None:
            return Fault(Cause.READ, link.node, f"{value.name} is read more than once")
        reader = link.node
    return None


def shared(links: Sequence[Link], gone: Collection[ir.Node] = ()) -> Fault | None:
    """Another reader of a matrix or kernel among the constants of a run of links, but for nodes that will be `gone`."""
    for link in links:
        for use in link.constants if link.weights else ():
            if len(shape_of(use.value) or ()) < 2:
                continue
            if use.value.is_graph_output():
                return Fault(Cause.SHARED, link.node, f"{use.value.name} is an output of the graph")
            for other in use.value.uses():
                if other.node is not link.node and other.node not in gone:
                    reason = f"{use.value.name} is also read here, and would have to be copied"
                    return Fault(Cause.SHARED, other.node, reason)
    return None


def stencil_of(links: Sequence[Link], kind: Kind, rank: int, channels: int) -> Stencil | Fault:
    """A run of links, last first, as one stencil on a value of `rank` axes and `channels` channels."""
    made = _as_stencil(Diagonal(), kind, rank, channels)
    for link in reversed(links):
        if link.fault is not None:
            return link.fault
        if link.form is None or (isinstance(link.form, Stencil) and link.form.size != made.width):
            return Fault(Cause.NOT_AFFINE, link.node, f"{link.node.op_type} does not read {made.width} channels")
        form = link.form if isinstance(link.form, Stencil) else _as_stencil(link.form, kind, rank, made.width)
        if link is links[-1]:
            made = form
            continue
        reason = lost_outside(form, made)
        if reason is not None:
            return Fault(Cause.NOT_AFFINE, link.node, reason)
        made = behind(form, made)
    return made


def _as_stencil(form: Diagonal, kind: Kind, rank: int, channels: int) -> Stencil:
    factor = np.ones(channels) if form.factor is None else np.broadcast_to(form.factor, (channels,))
    shift = None if form.shift is None else np.broadcast_to(form.shift, (channels,))
    axis, spatial = (1, rank - 2) if kind is Kind.KERNEL else (rank - 1, 0)
    return diagonal(axis, spatial, factor, shift)


# ---------------------------------------------------------------------------------------------- one operator, as a link


def _faulty(node: ir.Node, kind: Kind | None, cause: Cause, reason: str, form: Diagonal | None = None) -> Link:
    return Link(node, 0, (), form, kind, Fault(cause, node, reason))


def _overridable(node: ir.Node, positions: Sequence[int]) -> str | None:
    for position in positions:
        value = operand(node, position)
        if value is not None and is_overridable(value):
            return f"{value.name} is an initializer that is also a graph input"
    return None


def _matrix(node: ir.Node) -> Link | None:
    value, matrix = node.inputs
    shape, stored = shape_of(value), shape_of(matrix)
    if value is None or matrix is None or is_constant(value) or not shape or len(shape) < 2:
        return None
    if stored is None or len(stored) != 2:
        return None
    if (reason := _overridable(node, (1,))) is not None:
        return _faulty(node, Kind.MATRIX, Cause.OVERRIDABLE, reason)
    if not is_constant(matrix):
        return None
    form = Stencil(len(shape) - 1, transposed(weight_behind(matrix)), 1)
    return Link(node, 0, (Use(node, 1, 0),), form, Kind.MATRIX)


def _convolution(node: ir.Node) -> Link | None:
    value, kernel, bias = node.inputs[0], node.inputs[1], operand(node, 2)
    if value is None or is_constant(value):
        return None
    if (reason := _overridable(node, (1, 2))) is not None:
        return _faulty(node, Kind.KERNEL, Cause.OVERRIDABLE, reason)
    if not is_constant(kernel) or kernel is None or (bias is not None and not is_constant(bias)):
        return None
    weight = weight_behind(kernel)
    window = _window(node, weight.shape[2:])
    if isinstance(window, str):
        return _faulty(node, Kind.KERNEL, Cause.NOT_AFFINE, window)
    group, constants = node.attributes.get_int("group", 1), [Use(node, 1, 0)]
    made = weight.shape[0]
    if made % group or (bias is not None and shape_of(bias) != (made,)):
        reason = f"its kernel {weight.shape}, bias {shape_of(bias)} and {group} groups do not fit each other"
        return _faulty(node, Kind.KERNEL, Cause.NOT_AFFINE, reason)
    shift: Weight | None = None
    if bias is not None:
        constants.append(Use(node, 2, 0))
        shift = None if uniform(bias) == 0.0 else weight_behind(bias)
    form = Stencil(1, weight, group, window.strides, window.offsets, window.dilations, window.slack, shift)
    return Link(node, 0, tuple(constants), form, Kind.KERNEL)


def _average(node: ir.Node) -> Link | None:
    value = node.inputs[0]
    shape = shape_of(value)
    if value is None or not shape or is_constant(value):
        return None
    size = tuple(node.attributes.get_ints("kernel_shape", ()))
    window = _window(node, size)
    if not isinstance(window, str):
        if node.attributes.get_int("ceil_mode", 0):
            window = "AveragePool rounds its size up, where windows reach beyond the padding"
        elif window.padded and not node.attributes.get_int("count_include_pad", 0):
            window = "AveragePool does not count its padding, so that windows at the border divide by less"
    if isinstance(window, str) or not isinstance(channels := shape[1], int):
        reason = window if isinstance(window, str) else "the number of channels is not static"
        return _faulty(node, Kind.KERNEL, Cause.NOT_AFFINE, reason)
    kernel = Constant(np.broadcast_to(1.0 / math.prod(size), (channels, 1, *size)))
    form = Stencil(1, kernel, channels, window.strides, window.offsets, window.dilations, window.slack)
    return Link(node, 0, (), form, Kind.KERNEL)


def _padding(node: ir.Node) -> Link | None:
    """Zeros around the spatial axes (or fewer rows than before)."""
    shape, amounts, filling = shape_of(node.inputs[0]), integers(operand(node, 1)), operand(node, 2)
    if not shape or len(shape) < 3 or amounts is None or is_constant(node.inputs[0]):
        return None
    rank, axes = len(shape), integers(operand(node, 3))
    if operand(node, 3) is not None and axes is None:
        return None
    begins, ends = [0] * rank, [0] * rank
    for place, axis in enumerate(range(rank) if axes is None else axes):
        begins[axis] = amounts[place]
        ends[axis] = amounts[place + len(amounts) // 2]
    zeros = filling is None or uniform(filling) == 0.0
    spatial = not any((*begins[:2], *ends[:2]))
    if node.attributes.get_string("mode", "constant") != "constant" or not zeros or not spatial:
        return None
    if not isinstance(channels := shape[1], int):
        return None
    ones = (1,) * (rank - 2)
    slack = tuple(begin + end for begin, end in zip(begins[2:], ends[2:]))
    offsets = tuple(-begin for begin in begins[2:])
    form = Stencil(1, Constant(np.ones((channels, 1, *ones))), channels, ones, offsets, ones, slack)
    return Link(node, 0, (), form, Kind.KERNEL)


@dataclass(frozen=True)
class _Window:
    """How a kernel is moved over its operand, with its padding resolved."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    offsets: tuple[int, ...]
    slack: tuple[int, ...]
    padded: bool


def _window(node: ir.Node, taps: tuple[int, ...]) -> _Window | str:
    ones, spatial = (1,) * len(taps), len(taps)
    strides = tuple(node.attributes.get_ints("strides", ones))
    dilations = tuple(node.attributes.get_ints("dilations", ones))
    reach = tuple((k - 1) * d for k, d in zip(taps, dilations))
    given = tuple(node.attributes.get_ints("pads", (0,) * (2 * spatial)))
    begins, ends = given[:spatial], given[spatial:]
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic == "VALID":
        begins = ends = (0,) * spatial
    elif automatic in ("SAME_UPPER", "SAME_LOWER"):
        shape: tuple[object, ...] = shape_of(node.inputs[0]) or ()
        missing: list[int] = []
        for size, stride, far in zip(shape[2:], strides, reach):
            if stride == 1:
                missing.append(far)
            elif isinstance(size, int):
                missing.append(max((-(-size // stride) - 1) * stride + far + 1 - size, 0))
            else:
                return f"{node.op_type} pads by a size that is not static"
        if len(missing) != spatial:
            return f"the shape of what {node.op_type} reads is unknown"
        smaller, larger = tuple(n // 2 for n in missing), tuple(n - n // 2 for n in missing)
        begins, ends = (smaller, larger) if automatic == "SAME_UPPER" else (larger, smaller)
    slack = tuple(b + e - far for b, e, far in zip(begins, ends, reach))
    return _Window(strides, dilations, tuple(-begin for begin in begins), slack, any((*begins, *ends)))


def _normalization(node: ir.Node) -> Link | None:
    """A BatchNormalization: γ·x/√(v + ε) + β − γμ/√(v + ε)."""
    form = Diagonal(axis=1)
    if (reason := _overridable(node, range(1, 5))) is not None:
        return _faulty(node, None, Cause.OVERRIDABLE, reason, form)
    if (reason := unfrozen(node) or degenerate(node)) is not None:
        return _faulty(node, None, Cause.NOT_AFFINE, reason, form)
    scale, shift, mean, variance = (numbers(value) for value in node.inputs[1:5])
    if scale is None or shift is None or mean is None or variance is None:
        raise ValueError(f"{node.name} was found to be frozen, but its vectors are no constants")
    factor = scale / np.sqrt(variance + float(np.float32(node.attributes.get_float("epsilon", 1e-5))))
    uses = tuple(Use(node, position, 0) for position in range(1, 5))
    return Link(node, 0, uses, Diagonal(factor, shift - factor * mean, 1))


def _arithmetic(node: ir.Node) -> Link | None:
    """A value ∘ a constant that is one number, or varies along one axis of the value."""
    for position, other in ((0, 1), (1, 0)):
        value, constant = node.inputs[position], node.inputs[other]
        if value is None or constant is None or is_constant(value) or is_overridable(value):
            continue
        if position == 1 and node.op_type == "Div":
            continue
        along = vector_axis(constant, shape_of(value))
        if along is None:
            continue
        axis = along if along >= 0 else None
        fault: Fault | None = None
        if (reason := _overridable(node, (other,))) is not None:
            fault = Fault(Cause.OVERRIDABLE, node, reason)
            return Link(node, position, (), Diagonal(axis=axis), None, fault)
        array = numbers(constant)
        if array is None:
            continue
        array = array.reshape(-1) if axis is not None else array.reshape(())
        form = _form(node.op_type, array, position, axis)
        if form is None:
            fault = Fault(Cause.NOT_AFFINE, node, f"{constant.name} is not finite, or divides by zero")
        return Link(node, position, (Use(node, other, 0),), form or Diagonal(axis=axis), None, fault)
    return None


def vector_axis(constant: ir.Value, shape: tuple[object, ...] | None) -> int | None:
    """The axis of a value of `shape` along which a constant operand varies, −1 for a single number; None: no such.

    The constant must not make the value larger, which a symbolic size of 1 might hide.

    >>> vector_axis(ir.Value(name="c", shape=ir.Shape([4, 1, 1])), (2, 4, 8, 8))
    1
    >>> vector_axis(ir.Value(name="c", shape=ir.Shape([4, 1, 1])), (2, 1, 8, 8)) is None
    True
    """
    sizes = shape_of(constant)
    if sizes is None or shape is None or len(sizes) > len(shape):
        return None
    varying = [axis - len(sizes) for axis, size in enumerate(sizes) if size != 1]
    if not varying:
        return -1
    axis = varying[0] + len(shape)
    return axis if len(varying) == 1 and isinstance(shape[axis], int) and shape[axis] == sizes[varying[0]] else None


def _form(operator: str, array: np.ndarray, position: int, axis: int | None) -> Diagonal | None:
    """What the arithmetic does to the value at `position`; None where that is not finite."""
    if not np.isfinite(array).all() or (operator == "Div" and not array.all()):
        return None
    if operator == "Mul":
        return Diagonal(array, None, axis)
    if operator == "Div":
        return Diagonal(1.0 / array, None, axis)
    if operator == "Add":
        return Diagonal(None, array, axis)
    return Diagonal(None, -array, axis) if position == 0 else Diagonal(np.array(-1.0), array, axis)


def _negation(node: ir.Node) -> Link:
    return Link(node, 0, (), Diagonal(np.array(-1.0)))


def _identity(node: ir.Node) -> Link | None:
    # `is_inference_dropout` speaks of the operator since opset 12, where the mode is an operand.
    plain = node.op_type == "Identity" or (is_inference_dropout(node) and "ratio" not in node.attributes)
    return Link(node, 0, (), Diagonal()) if plain and not is_constant(node.inputs[0]) else None


_LINKS: dict[str, Callable[[ir.Node], Link | None]] = {
    "MatMul": _matrix,
    "Conv": _convolution,
    "AveragePool": _average,
    "Pad": _padding,
    "BatchNormalization": _normalization,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    "Neg": _negation,
    **dict.fromkeys(("Identity", "Dropout"), _identity),
}
