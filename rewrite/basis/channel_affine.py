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

from rewrite.basis.channel_layouts import RESHAPES, Layout, backward, forward, layout_step, then
from rewrite.ir.constants import VECTOR, is_constant, is_overridable, numbers
from rewrite.ir.edit import is_operator, shape_of

SUMS = ("Add", "Sub")
PRODUCTS = ("Mul", "Div")
ARITHMETIC = (*SUMS, *PRODUCTS, "Neg", "BatchNormalization")

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


DEEPEST = 16
"""How many nodes behind each other may compute a constant: a few steps of arithmetic, and no network."""


def computed(value: ir.Value | None, depth: int = DEEPEST) -> np.ndarray | None:
    """The float64 numbers of a small constant, or of what a few nodes compute from such ones (√(v + ε)); or None.

    Layout is followed for vectors only.
    """
    if value is None or value.dtype is None or not value.dtype.is_floating_point():
        return None
    if is_constant(value):
        return numbers(value)
    node = value.producer()
    operands = () if node is None else tuple(operand for operand in node.inputs if operand is not None)
    if node is None or len(node.outputs) != 1 or not operands or not depth:
        return None
    if not is_operator(node, *_UNARY, *_BINARY, *RESHAPES, "Transpose", "Expand"):
        return None
    if (first := computed(operands[0], depth - 1)) is None:
        return None
    with np.errstate(all="ignore"):
        if is_operator(node, *_UNARY):
            return _UNARY[node.op_type](first)
        if is_operator(node, *_BINARY):
            second = computed(operands[1], depth - 1)
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
            axis = None if axis is None else forward(step, axis)
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
            tied = None if tied is None or axis < 0 else backward(step, tied)
        if axis < 0:
            tied = self.axis
        elif tied is None or self.axis not in (None, tied):
            return None
        return replace(self, axis=tied, factor=self.factor * factor, shift=self.shift * factor + shift)


class Facts:
    """What is known of the operators of a graph, wherever a cluster starts; for as long as the graph is not changed."""

    def __init__(self) -> None:
        self._constants: dict[ir.Value, np.ndarray | None] = {}
        self._operands: dict[ir.Value, tuple[ir.Value, ...]] = {}

    def constant(self, value: ir.Value) -> np.ndarray | None:
        """The numbers of a constant, read once."""
        if value not in self._constants:
            self._constants[value] = computed(value)
        return self._constants[value]

    def operands(self, value: ir.Value) -> tuple[ir.Value, ...]:
        """The operands that a form of `value` may be derived from; none where it is a root."""
        if value not in self._operands:
            self._operands[value] = self._varying(value)
        return self._operands[value]

    def _varying(self, value: ir.Value) -> tuple[ir.Value, ...]:
        node = value.producer()
        if node is None or value is not node.outputs[0] or value.dtype is None or not value.dtype.is_floating_point():
            return ()
        operands = tuple(operand for operand in node.inputs if operand is not None)
        if is_operator(node, *SUMS, *PRODUCTS):
            varying = tuple(operand for operand in operands if self.constant(operand) is None)
            divided = node.op_type != "Div" or varying[:1] == operands[:1]
            return varying if divided and (len(varying) == 1 or node.op_type in SUMS) else ()
        if not operands or is_constant(operands[0]):
            return ()
        if is_operator(node, "BatchNormalization"):
            return operands[:1] if unfrozen(node) is None and degenerate(node) is None else ()
        return operands[:1] if is_operator(node, "Neg", "Identity") or layout_step(node) is not None else ()


class _Forms:
    """The forms of values, each derived from those of its operands; nobody looks behind values of `roots`."""

    def __init__(self, roots: Set[ir.Value], facts: Facts) -> None:
        self.roots, self.facts = roots, facts
        self.beginnings: set[ir.Value] = set()
        """Values that an operator continues as they are, and not as the form that they have."""
        self.known: dict[ir.Value, _Form] = {}

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
        return () if value in self.roots else self.facts.operands(value)

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
        if (step := layout_step(node)) is None:
            return None
        moved = replace(form, layout=then(form.layout, step))
        return moved if form.axis is None or moved.place is not None else None

    def with_constant(self, form: _Form, node: ir.Node, operand: ir.Value) -> _Form | None:
        first = node.inputs[0] is operand
        other = node.inputs[1 if first else 0]
        array = None if other is None else self.facts.constant(other)
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


def cluster_ends(graph: ir.Graph) -> list[ir.Value]:
    """Where the clusters of a graph end, first to last, each as large as can be."""
    facts, roots = Facts(), set[ir.Value]()
    makers = [node for node in graph if is_operator(node, *ARITHMETIC, *RESHAPES, "Transpose")]
    channelled: set[ir.Node] = set()
    while True:
        forms = _Forms(roots, facts)
        for node in makers:
            if _channelled(forms.of(node.outputs[0]), node.outputs[0]) is not None:
                channelled.add(node)
        if forms.beginnings <= roots:
            break
        # What begins anew behind a value may end at it before.
        roots |= forms.beginnings
    found: list[ir.Value] = []
    covered: set[ir.Node] = set()
    for node in reversed(makers):
        cluster = channel_affine(node.outputs[0], facts) if node in channelled - covered else None
        if cluster is not None and covered.isdisjoint(cluster.nodes):
            covered.update(cluster.nodes)
            found.append(cluster.result)
    return found[::-1]


def channel_affine(result: ir.Value, facts: Facts | None = None) -> Cluster | None:
    """The largest cluster that ends at `result`; None where none does.

    Where layout at the end cancels with nothing, the cluster ends before it. Single numbers are a vector where one is
    added, and what reads the result contracts it (an image whose mean and deviation are numbers).
    """
    facts, roots = facts or Facts(), set[ir.Value]()
    while True:
        forms = _Forms(roots, facts)
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
    form = _channelled(forms.of(result), result) if result in inside else None
    if form is None or form.axis is None or (axis := form.place) is None:
        return None
    size = max(form.factor.size, form.shift.size)
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


def _channelled(form: _Form, value: ir.Value) -> _Form | None:
    """`form` with an axis: its own, or that in which all that read the value contract it, if there is a shift."""
    shape = shape_of(value)
    if form.axis is not None or not form.shift.any() or shape is None:
        return None if form.axis is None else form
    axes: set[int] = set()
    for use in value.uses():
        kernel = is_operator(use.node, "Conv", "ConvTranspose")
        if use.idx != 0 or not (kernel or is_operator(use.node, "MatMul")):
            return None
        axes.add(1 if kernel else len(shape) - 1)
    size = shape[min(axes)] if len(axes) == 1 else None
    if not isinstance(size, int) or size > VECTOR:
        return None
    return form.then(min(axes), np.ones(size), np.zeros(size))


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
