"""Clusters: operators that together multiply every channel of one value by a constant and add a constant to it.

    y = a ⊙ L(x) + t          a, t constants, one number a channel; L moves the channels and computes nothing

A frozen BatchNormalization is one such operator, and the smallest cluster. Arithmetic with constants that vary along
that axis alone is another ((x − mean)/std, a frozen norm written out), and so is the sum of two clusters of one x:

    BN(x)            a = γ/σ          t = β − γμ/σ         σ = √(v + ε)
    x∘c, −x          c a number or a vector, ∘ one of + − × ÷
    BN(x) + αx       a = γ/σ + α      t = β − γμ/σ
    L⁻¹(BN(L(x)))    Transpose, Reshape and their kin around the norm cancel

`channel_affine` finds the largest cluster that ends at a value. What lies inside is read inside only: a value that
something else reads, or that the graph returns, can only be where a cluster starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from rewrite.ir.axes import Role, Shape, Thread, follow, volume
from rewrite.ir.constants import VECTOR, is_constant, is_overridable, numbers
from rewrite.ir.edit import is_operator, shape_of

SUMS = ("Add", "Sub")
PRODUCTS = ("Mul", "Div")
ARITHMETIC = (*SUMS, *PRODUCTS, "Neg", "BatchNormalization")
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
MOVES = ("AveragePool", "Cast", "Dropout", "Gather", "GlobalAveragePool", "ReduceMean", "Slice")

# ------------------------------------------------------------------------------------- a frozen batch normalization


def unfrozen(norm: ir.Node) -> str | None:
    """Why a BatchNormalization is no map of each channel by constants; None where it is one.

    It must not be in training mode, which before opset 14 is said by a second output, and its four vectors must be
    constants of one number a channel.
    """
    if norm.attributes.get_int("training_mode", 0):
        return "BatchNormalization is in training mode: it normalizes by the statistics of the batch"
    if any(output.name for output in norm.outputs[1:]):
        return "BatchNormalization gives out its statistics, which it does in training mode"
    if _opset(norm) < 7 and not norm.attributes.get_int("is_test", 0):
        return "BatchNormalization is in training mode, the default before opset 7"
    shape = shape_of(norm.inputs[0])
    if shape is None or len(shape) < 2 or not isinstance(shape[1], int) or norm.outputs[0].dtype is None:
        return f"the type of {_name(norm.inputs[0])} or its number of channels is unknown"
    for symbol, value in zip(("γ", "β", "the mean", "the variance"), norm.inputs[1:5]):
        if value is None or not is_constant(value):
            beyond = "may be overridden by a caller" if value is not None and is_overridable(value) else "is computed"
            return f"{symbol} ({_name(value)}) {beyond}, so it is not a constant of the network"
        if shape_of(value) != (shape[1],) or shape[1] > VECTOR:
            return f"{symbol} ({value.name}) has shape {shape_of(value)}, not ({shape[1]},)"
    return None


def degenerate(norm: ir.Node) -> str | None:
    """Why the constants of a frozen BatchNormalization give no finite map; None where they do."""
    arrays = [numbers(value) for value in norm.inputs[1:5]]
    for symbol, array in zip(("γ", "β", "the mean", "the variance"), arrays):
        if array is None or not np.isfinite(array).all():
            return f"{symbol} is not finite"
    variance = arrays[3]
    if variance is not None and not (variance + _epsilon(norm) > 0).all():
        return f"variance + ε is not positive in channel {int(np.argmin(variance))}"
    return None


def _opset(node: ir.Node) -> int:
    graph = node.graph
    return graph.opset_imports.get("", 23) if isinstance(graph, ir.Graph) else 23


def _epsilon(norm: ir.Node) -> float:
    return float(np.float32(norm.attributes.get_float("epsilon", 1e-5)))


def _name(value: ir.Value | None) -> str:
    return "an operand that is left out" if value is None else value.name or ""


# ------------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Permuted:
    """Axis i is axis `axes[i]` before."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Reshaped:
    """The same elements in the same order under another shape; sizes are numbers or names, all of them known."""

    before: Shape
    after: Shape


@dataclass(frozen=True)
class Moved:
    """An operator that moves or averages channels as they are (a mean over positions, a Slice), and cancels with
    nothing."""

    node: ir.Node


LayoutStep = Permuted | Reshaped | Moved
Layout = tuple[LayoutStep, ...]


def _then(layout: Layout, step: LayoutStep) -> Layout:
    """`layout` followed by `step`, in the one form in which what cancels is gone."""
    last = layout[-1] if layout else None
    if isinstance(last, Permuted) and isinstance(step, Permuted):
        layout, step = layout[:-1], Permuted(tuple(last.axes[axis] for axis in step.axes))
    elif isinstance(last, Reshaped) and isinstance(step, Reshaped):
        layout, step = layout[:-1], Reshaped(last.before, step.after)
    if isinstance(step, Permuted) and step.axes == tuple(range(len(step.axes))):
        return layout
    if isinstance(step, Reshaped) and step.before == step.after:
        return layout
    return (*layout, step)


def _forward(step: LayoutStep, axis: int) -> int | None:
    """Where an axis is behind a step of layout; None where it does not stay whole."""
    if isinstance(step, Permuted):
        return step.axes.index(axis)
    if isinstance(step, Reshaped):
        return _same_axis(step.before, step.after, axis)
    thread = through_padding(step.node, 0, axis)
    kept = thread.role is Role.MOVE and thread.inputs == ((0, axis),) and len(thread.outputs) == 1
    return thread.outputs[0][1] if kept else None


def _backward(step: LayoutStep, axis: int) -> int | None:
    """Where an axis behind a step of layout was before it; None where it was none."""
    if isinstance(step, Permuted):
        return step.axes[axis]
    if isinstance(step, Reshaped):
        return _same_axis(step.after, step.before, axis)
    thread = through_padding(step.node, 0, axis, result=True)
    kept = thread.role is Role.MOVE and len(thread.inputs) == 1 and thread.inputs[0][0] == 0
    return thread.inputs[0][1] if kept else None


def _same_axis(before: Shape, after: Shape, axis: int) -> int | None:
    """The axis that has the size of `axis` and as many elements behind it."""
    size, behind = before[axis], volume(before[axis + 1 :])
    if size == 1 or behind is None:
        return None
    places = [place for place, other in enumerate(after) if other == size and volume(after[place + 1 :]) == behind]
    return places[0] if len(places) == 1 else None


def _step(node: ir.Node) -> LayoutStep | None:
    """What a node of layout does to its first operand; None where it does more, or its shapes are not known."""
    if len(node.outputs) != 1 or not node.inputs or node.inputs[0] is None:
        return None
    before, after = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if before is None or after is None:
        return None
    if is_operator(node, "Transpose"):
        return Permuted(tuple(node.attributes.get_ints("perm", tuple(reversed(range(len(before)))))))
    if is_operator(node, *RESHAPES):
        return None if None in before or None in after else Reshaped(before, after)
    return Moved(node) if is_operator(node, *MOVES) else None


def through_padding(node: ir.Node, position: int, axis: int, *, result: bool = False) -> Thread:
    """As `follow`; an average whose divisor counts what it sums up, and nothing else, is a MOVE as well."""
    thread = follow(node, position, axis, result=result)
    if is_operator(node, "AveragePool") and thread.role is Role.LINEAR and not averages_zeros(node):
        return Thread(Role.MOVE, thread.inputs, thread.outputs)
    return thread


def averages_zeros(node: ir.Node) -> bool:
    """Whether an AveragePool counts zeros beside its input, so that the average of a constant is not the constant."""
    beyond = node.attributes.get_int("ceil_mode", 0) or pads(node)
    return bool(node.attributes.get_int("count_include_pad", 0) and beyond)


def pads(node: ir.Node) -> bool:
    """Whether the window of a Conv or of a pooling reaches beyond its input, as far as its attributes say."""
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        stored = shape_of(node.inputs[1]) if is_operator(node, "Conv") else None
        window = tuple(node.attributes.get_ints("kernel_shape", (stored or ())[2:]))
        # A window of one element is put on elements alone, whatever the stride.
        return not window or any(size != 1 for size in window)
    return automatic != "VALID" and any(node.attributes.get_ints("pads", ()))


# --------------------------------------------------------------------------------------------- constants in arithmetic

_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
}
_UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Neg": np.negative,
    "Abs": np.abs,
    "Exp": np.exp,
    "Identity": np.asarray,
}


def computed(value: ir.Value | None) -> np.ndarray | None:
    """The float64 numbers of a small constant, or of what a few nodes compute from such ones (√(v + ε)); or None.

    Layout is followed for vectors only.
    """
    if value is None or value.dtype is None or not value.dtype.is_floating_point():
        return None
    if is_constant(value):
        return numbers(value)
    node = value.producer()
    operands = () if node is None else tuple(operand for operand in node.inputs if operand is not None)
    if node is None or len(node.outputs) != 1 or not operands or (first := computed(operands[0])) is None:
        return None
    with np.errstate(all="ignore"):
        if is_operator(node, *_UNARY):
            return _UNARY[node.op_type](first)
        if is_operator(node, *_BINARY):
            second = computed(operands[1])
            return None if second is None else _BINARY[node.op_type](first, second)
    shape = shape_of(value)
    sizes = [size for size in shape or () if isinstance(size, int)]
    if shape is None or len(sizes) != len(shape) or math.prod(sizes) > VECTOR:
        return None
    if is_operator(node, "Expand"):
        return np.broadcast_to(first, sizes)
    is_vector = max(first.shape, default=1) == first.size
    return first.reshape(sizes) if is_operator(node, *RESHAPES, "Transpose") and is_vector else None


def _along(value: ir.Value, constant: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The axis of `value` along which a constant varies, and its numbers there; a number has axis −1.

    None where it varies along several, widens the value, or is not finite.
    """
    shape = shape_of(value)
    if shape is None or constant.ndim > len(shape) or not np.isfinite(constant).all():
        return None
    varying = [axis for axis, size in enumerate(constant.shape) if size != 1]
    if not varying:
        return -1, constant.reshape(())
    axis = varying[0] + len(shape) - constant.ndim
    return (axis, constant.reshape(-1)) if len(varying) == 1 and shape[axis] == constant.size else None


# --------------------------------------------------------------------------------------------------------------- forms


@dataclass(frozen=True, eq=False)
class _Form:
    """factor ⊙ layout(root) + shift: numbers, or vectors along `axis` of the root (None where both are numbers)."""

    root: ir.Value
    layout: Layout = ()
    axis: int | None = None
    factor: np.ndarray = field(default_factory=lambda: np.ones(()))
    shift: np.ndarray = field(default_factory=lambda: np.zeros(()))

    @property
    def place(self) -> int | None:
        """The axis as one of the value itself."""
        axis = self.axis
        for step in self.layout:
            axis = None if axis is None else _forward(step, axis)
        return axis

    def plus(self, other: _Form, sign: float) -> _Form | None:
        """The sum (or difference, where `sign` is −1) of two forms of one root in one layout."""
        axes = {axis for axis in (self.axis, other.axis) if axis is not None}
        if self.root is not other.root or self.layout != other.layout or len(axes) > 1:
            return None
        factor, shift = self.factor + sign * other.factor, self.shift + sign * other.shift
        return replace(self, axis=next(iter(axes), None), factor=factor, shift=shift)

    def then(self, axis: int, factor: np.ndarray | float, shift: np.ndarray | float) -> _Form | None:
        """This form times a factor plus a shift along an axis of the value; −1 where both are numbers."""
        tied: int | None = axis
        for step in reversed(self.layout):
            tied = None if tied is None or axis < 0 else _backward(step, tied)
        if axis < 0:
            tied = self.axis
        elif tied is None or self.axis not in (None, tied):
            return None
        return replace(self, axis=tied, factor=self.factor * factor, shift=self.shift * factor + shift)


class _Forms:
    """The forms of values, each derived from those of its operands; nobody looks behind values of `roots`."""

    def __init__(self, roots: Set[ir.Value]) -> None:
        self.roots = roots
        self.beginnings: set[ir.Value] = set()
        """Values that an operator continues as they are, and not as the form that they have."""
        self.known: dict[ir.Value, _Form] = {}
        self.constants: dict[ir.Value, np.ndarray | None] = {}

    def of(self, value: ir.Value) -> _Form:
        waiting = [value]
        while waiting:
            current = waiting[-1]
            missing = [operand for operand in self.followed(current) if operand not in self.known]
            if current not in self.known and missing:
                waiting.extend(missing)
                continue
            waiting.pop()
            if current not in self.known:
                self.known[current] = self.derived(current) or _Form(current)
        return self.known[value]

    def followed(self, value: ir.Value) -> tuple[ir.Value, ...]:
        """The operands that a form of `value` may be derived from; none where it is a root."""
        node = value.producer()
        if node is None or value in self.roots or value is not node.outputs[0]:
            return ()
        if value.dtype is None or not value.dtype.is_floating_point():
            return ()
        operands = tuple(operand for operand in node.inputs if operand is not None)
        if not operands or (is_constant(operands[0]) and not is_operator(node, *SUMS, *PRODUCTS)):
            return ()
        if is_operator(node, *SUMS, *PRODUCTS):
            varying = tuple(operand for operand in operands if self.constant(operand) is None)
            divided = node.op_type != "Div" or varying[:1] == operands[:1]
            return varying if divided and (len(varying) == 1 or node.op_type in SUMS) else ()
        if is_operator(node, "BatchNormalization"):
            return operands[:1] if unfrozen(node) is None and degenerate(node) is None else ()
        return operands[:1] if is_operator(node, "Neg", "Identity") or _step(node) is not None else ()

    def constant(self, value: ir.Value) -> np.ndarray | None:
        if value not in self.constants:
            self.constants[value] = computed(value)
        return self.constants[value]

    def derived(self, value: ir.Value) -> _Form | None:
        node, operands = value.producer(), self.followed(value)
        if node is None or not operands:
            return None
        form = self.known[operands[0]]
        if len(operands) == 2:
            return form.plus(self.known[operands[1]], -1.0 if node.op_type == "Sub" else 1.0)
        continued = self.continued(form, node, operands[0])
        if continued is None and self.continued(_Form(operands[0]), node, operands[0]) is not None:
            self.beginnings.add(operands[0])
        return continued

    def continued(self, form: _Form, node: ir.Node, operand: ir.Value) -> _Form | None:
        """The form of what `node` makes of its one operand that varies; None where it is no form of the same root."""
        if is_operator(node, "Identity"):
            return form
        if is_operator(node, "Neg"):
            return form.then(-1, -1.0, 0.0)
        if is_operator(node, "BatchNormalization"):
            return _normalized(form, node)
        if is_operator(node, *SUMS, *PRODUCTS):
            return self.with_constant(form, node, operand)
        if (step := _step(node)) is None:
            return None
        moved = replace(form, layout=_then(form.layout, step))
        return moved if form.axis is None or moved.place is not None else None

    def with_constant(self, form: _Form, node: ir.Node, operand: ir.Value) -> _Form | None:
        first = node.inputs[0] is operand
        other = node.inputs[1 if first else 0]
        array = None if other is None else self.constant(other)
        placed = None if array is None else _along(operand, array)
        if placed is None:
            return None
        axis, array = placed
        match node.op_type:
            case "Add":
                return form.then(axis, 1.0, array)
            case "Sub":
                return form.then(axis, 1.0, -array) if first else form.then(axis, -1.0, array)
            case "Mul":
                return form.then(axis, array, 0.0)
            case _:
                return form.then(axis, 1.0 / array, 0.0) if array.all() else None


def _normalized(form: _Form, norm: ir.Node) -> _Form | None:
    gamma, beta, mean, variance = (numbers(operand) for operand in norm.inputs[1:5])
    if gamma is None or beta is None or mean is None or variance is None:
        return None
    factor = gamma / np.sqrt(variance + _epsilon(norm))
    return form.then(1, factor, beta - factor * mean)


# ------------------------------------------------------------------------------------------------------------ clusters


@dataclass(frozen=True, eq=False)
class Cluster:
    """`result` = factor ⊙ L(`root`) + shift.

    `root_axis` and `axis` are where the channels are in the root and in the result, `factor` and `shift` (d,) their
    constants in float64. `nodes` are all its operators, in order, `arithmetic` those that do more than layout. `path`
    are the operators of L that did not cancel; `untouched` is a value before all arithmetic from which `rest`, as few
    operators as possible, leads to L(root).
    """

    root: ir.Value
    result: ir.Value
    root_axis: int
    axis: int
    factor: np.ndarray
    shift: np.ndarray
    nodes: tuple[ir.Node, ...]
    arithmetic: tuple[ir.Node, ...]
    path: tuple[ir.Node, ...]
    untouched: ir.Value
    rest: tuple[ir.Node, ...]

    @property
    def norms(self) -> tuple[ir.Node, ...]:
        """The batch normalizations among its operators."""
        return tuple(node for node in self.arithmetic if is_operator(node, "BatchNormalization"))

    @property
    def last(self) -> ir.Node:
        """The operator that makes the result."""
        return self.nodes[-1]


def channel_affine(result: ir.Value) -> Cluster | None:
    """The largest cluster that ends at `result`; None where none does, or all its constants are single numbers.

    Where layout at the end cancels with nothing, the cluster ends before it.
    """
    roots: set[ir.Value] = set()
    while True:
        forms = _Forms(roots)
        inside = _inside(forms, result)
        if forms.beginnings - roots:
            roots |= forms.beginnings
            continue
        nodes = {node for value in inside if (node := value.producer()) is not None}
        exposed = {value for value in inside if value is not result and _is_read_outside(value, nodes)}
        if not exposed:
            break
        roots |= exposed
    while inside and (node := result.producer()) is not None and not is_operator(node, *ARITHMETIC):
        before = forms.followed(result)[0]
        if len(forms.of(result).layout) < len(forms.of(before).layout):
            break
        del inside[result]
        result = before
        if result is forms.of(result).root:
            return None
    form = forms.of(result)
    axis, size = form.place, max(form.factor.size, form.shift.size)
    if form.axis is None or axis is None or result not in inside:
        return None
    makers = [value.producer() for value in forms.known if value in inside]
    nodes = tuple(node for node in makers if node is not None)
    chain = [result]
    while chain[0] is not form.root:
        chain.insert(0, forms.followed(chain[0])[0])
    layouts = [forms.of(value).layout for value in chain]
    plain = 0
    while not is_operator(chain[plain + 1].producer(), *ARITHMETIC):
        plain += 1
    rests = [_rest(chain, layouts, start) for start in range(plain + 1)]
    start = min(range(plain + 1), key=lambda index: (len(rests[index]), -index))
    return Cluster(
        form.root,
        result,
        form.axis,
        axis,
        factor=np.broadcast_to(form.factor, (size,)),
        shift=np.broadcast_to(form.shift, (size,)),
        nodes=nodes,
        arithmetic=tuple(node for node in nodes if is_operator(node, *ARITHMETIC)),
        path=rests[0],
        untouched=chain[start],
        rest=rests[start],
    )


def _inside(forms: _Forms, result: ir.Value) -> dict[ir.Value, None]:
    """The values from `result` back to its root, which is not one of them."""
    root = forms.of(result).root
    found: dict[ir.Value, None] = {}
    waiting = [result]
    while waiting:
        value = waiting.pop()
        if value is not root and value not in found:
            found[value] = None
            waiting.extend(forms.followed(value))
    return found


def _is_read_outside(value: ir.Value, nodes: Set[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in nodes for use in value.uses())


def _rest(chain: list[ir.Value], layouts: list[Layout], start: int) -> tuple[ir.Node, ...]:
    """The operators that lead from value `start` of a chain to the layout of its last; cycles are left out."""
    found: list[ir.Node] = []
    while True:
        start = max(index for index, layout in enumerate(layouts) if layout == layouts[start])
        if start == len(chain) - 1:
            return tuple(found)
        start += 1
        if (node := chain[start].producer()) is not None:
            found.append(node)
