"""Channels that are constant, and channels that are multiples of one another, whatever the network is given.

Every channel of every value of a region gets a *form*: v_j = factor · key. Two channels of one key are proportional;
a channel whose key is `ONE` is a constant. Forms follow from the constants alone:

    column j of W is p times column i        same key, factors in the proportion p; column j is 0: the constant 0
    x + y                                    key (x, y, f_y/f_x), factor f_x
    x ⊙ y                                    key (x, y), factor f_x·f_y
    f positively homogeneous                 key (f, x, sign of f_x), factor |f_x|
    f linear, channel by channel             key (f, x), factor f_x
    any other f, channel by channel          key (f, x, f_x), factor 1; of a constant the constant f(x)

Factors are rational numbers, so a proportion is exact or is not seen. `grow_selected` is the region through which
channels may be left out: all that acts on each of them by itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from rewrite.basis.regions import Region, grow
from rewrite.basis.transforms import TransformClass
from rewrite.ir.axes import Port, Role, Thread, follow, operand
from rewrite.ir.constants import integers, is_constant, uniform, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.weights import Weight, cut_blocks

# ------------------------------------------------------------------------------------------- where channels stay apart

SELECTION = TransformClass(
    "selection", frozenset({Role.MOVE, Role.SUM, Role.LINEAR, Role.SCALE, Role.HOMOGENEOUS, Role.CHANNELWISE})
)
"""x′ = x[indices]: it commutes with what a permutation commutes with, except for what looks at all channels."""


def grow_selected(seed: ir.Value, axis: int) -> Region:
    """The region of `seed` through which channels may be left out; its `axes` are where they are."""
    return grow(seed, axis, SELECTION, through=follow_selected)


def follow_selected(node: ir.Node, position: int, axis: int, *, result: bool = False) -> Thread:
    """The thread through an operator for a selection of channels.

    Constants that run along the axis lose channels as well, and what writes the axis's size does not let it change.
    """
    thread = follow(node, position, axis, result=result)
    place = axis if result else thread.outputs[0][1] if thread.outputs else axis
    if is_operator(node, "Softmax") and axis % _rank(node) == node.attributes.get_int("axis", -1) % _rank(node):
        return Thread(Role.OPAQUE, thread.inputs, thread.outputs, "Softmax looks at all channels")
    if is_operator(node, "Add", "Sub", "Mul", "Div", "PRelu"):
        along = _along(node, place if thread.outputs or result else axis)
        if along and (result or (position, axis) in along):
            return Thread(Role.CHANNELWISE, along, ((0, place),))
    if is_operator(node, "Reshape") and thread.role is Role.MOVE and not _copies_size(node, thread):
        return Thread(Role.OPAQUE, thread.inputs, thread.outputs, "Reshape writes the number of channels")
    if is_operator(node, "Expand", "ConstantOfShape") and thread.role in SELECTION.commutes:
        return Thread(Role.OPAQUE, thread.inputs, thread.outputs, f"{node.op_type} writes the number of channels")
    return thread


def _rank(node: ir.Node) -> int:
    return max(len(shape_of(node.outputs[0]) or ()), 1)


def _along(node: ir.Node, place: int) -> tuple[Port, ...]:
    """The operands that run along axis `place` of the result; none where a size is not static."""
    after = shape_of(node.outputs[0]) or ()
    if place >= len(after) or not isinstance(after[place], int):
        return ()
    found: list[Port] = []
    for position, value in enumerate(node.inputs):
        before = shape_of(value)
        if before is None:
            return ()
        axis = place - (len(after) - len(before))
        size = before[axis] if axis >= 0 else 1
        if not isinstance(size, int):
            return ()
        if size == after[place]:
            found.append((position, axis))
    return tuple(found)


def _copies_size(node: ir.Node, thread: Thread) -> bool:
    """Whether a Reshape takes the size of the axis from its operand."""
    written = integers(operand(node, 1))
    (_, before), (_, after) = thread.inputs[0], thread.outputs[0]
    if written is None or after >= len(written):
        return False
    copied = written[after] == 0 and before == after and not node.attributes.get_int("allowzero", 0)
    return copied or written[after] == -1


# --------------------------------------------------------------------------------------------------------------- forms

ONE = ("one",)
"""The key of constants."""


@dataclass(frozen=True)
class Form:
    """A channel: `factor` times the values that `key` stands for, the same key for the same values."""

    key: Hashable
    factor: Fraction

    @property
    def constant(self) -> float | None:
        """The number it always is, or None."""
        return float(self.factor) if self.key == ONE else None


def _constant(number: float) -> Form | None:
    return Form(ONE, Fraction(number)) if math.isfinite(number) else None


def _number(value: ir.Value | None) -> float | None:
    """The finite number that all elements of a constant are, or None."""
    found = uniform(value)
    return found if found is not None and math.isfinite(found) else None


def forms(region: Region) -> dict[ir.Value, tuple[Form, ...]]:
    """The form of every channel of every value of a region of `grow_selected`."""
    return _Forms(region).of_all()


class _Forms:
    def __init__(self, region: Region) -> None:
        self.region = region
        self.known: dict[ir.Value, tuple[Form, ...]] = {}
        self.columns: dict[tuple[ir.Value, int], tuple[Form, ...]] = {}
        self.numbers: dict[Hashable, int] = {}

    def of_all(self) -> dict[ir.Value, tuple[Form, ...]]:
        for value in self.region.axes:
            if value.producer() is None:
                self.known[value] = self.unknown(value)
        made = set(self.region.nodes)
        for node in self.region.seed.graph or ():
            if node in made:
                for position, value in enumerate(node.outputs):
                    if value in self.region.axes:
                        self.known[value] = self.of(node, position, value)
        return self.known

    def unknown(self, value: ir.Value) -> tuple[Form, ...]:
        return tuple(Form(self.key("?", id(value), channel), Fraction(1)) for channel in range(self.region.size))

    def key(self, *parts: Hashable) -> Hashable:
        """A number for a compound key, so that keys do not grow."""
        return self.numbers.setdefault(parts, len(self.numbers))

    def of(self, node: ir.Node, position: int, value: ir.Value) -> tuple[Form, ...]:
        thread = follow_selected(node, position, self.region.axes[value], result=True)
        ports = [(place, self.operand(node, place, axis)) for place, axis in thread.inputs]
        if thread.role not in SELECTION.commutes or any(found is None for _, found in ports) or not ports:
            return self.unknown(value)
        channels = list(zip(*(found for _, found in ports if found is not None)))
        rule = self.rule(node, thread, [place for place, _ in ports], position)
        found = [rule(list(channel)) for channel in channels]
        fallback = self.unknown(value)
        return tuple(one or other for one, other in zip(found, fallback))

    def operand(self, node: ir.Node, position: int, axis: int) -> tuple[Form, ...] | None:
        value = operand(node, position)
        if value is None or not is_constant(value):
            return None if value is None else self.known.get(value)
        if (value, axis) not in self.columns:
            self.columns[value, axis] = tuple(self.of_columns(value, axis))
        return self.columns[value, axis]

    def of_columns(self, value: ir.Value, axis: int) -> Iterator[Form]:
        weight = weight_behind(value)
        single = all(size == 1 for place, size in enumerate(weight.shape) if place != axis)
        for channel, (group, pivot) in enumerate(proportional(weight, axis)):
            if not math.isfinite(pivot):
                yield Form(self.key("column", id(value), axis, ~channel), Fraction(1))
            elif pivot == 0.0 or single:
                yield Form(ONE, Fraction(pivot))
            else:
                yield Form(self.key("column", id(value), axis, group if group >= 0 else ~channel), Fraction(pivot))

    def rule(
        self, node: ir.Node, thread: Thread, places: Sequence[int], position: int
    ) -> Callable[[list[Form]], Form | None]:
        """What a node makes of the forms of one channel of its operands `places`."""
        tag = (id(node), position)

        def linear(parts: list[Form]) -> Form | None:
            return self.linear(tag, parts[0])

        if is_operator(node, "Add", "Sub") and len(places) == 2:
            sign = -1 if node.op_type == "Sub" else 1
            return lambda parts: self.sum(parts[0], Form(parts[1].key, sign * parts[1].factor))
        if is_operator(node, "Mul") and len(places) == 2:
            return lambda parts: self.product(parts[0], parts[1])
        if is_operator(node, "Mul", "Div") and len(places) == 1:
            number = _number(node.inputs[1 - places[0]])
            if number is None and (node.op_type == "Mul" or places[0] == 0):
                return linear
            if number is not None and node.op_type == "Mul":
                return lambda parts: self.product(parts[0], Form(ONE, Fraction(number)))
            if number and places[0] == 0:
                return lambda parts: Form(parts[0].key, parts[0].factor / Fraction(number))
        if is_operator(node, "Neg"):
            return lambda parts: Form(parts[0].key, -parts[0].factor)
        if is_operator(node, "Conv", "ConvTranspose") and len(places) == 2:
            return lambda parts: self.sum(self.linear(tag, parts[0]), parts[1])
        if thread.role is Role.MOVE and len(places) == 1:
            return lambda parts: parts[0] if parts[0].constant is not None else self.linear(tag, parts[0])
        if thread.role in (Role.LINEAR, Role.SCALE) and len(places) == 1:
            return linear
        if thread.role is Role.HOMOGENEOUS and len(places) == 1:
            return lambda parts: self.homogeneous(tag, node, parts[0])
        if is_operator(node, "PRelu") and len(places) == 2:
            return lambda parts: self.homogeneous(tag, node, *parts)
        numbers_beside = [_number(value) for place, value in enumerate(node.inputs) if place not in places]
        return lambda parts: self.other(tag, node, self.arranged(node, places, parts, numbers_beside))

    def arranged(
        self, node: ir.Node, places: Sequence[int], parts: list[Form], beside: Sequence[float | None]
    ) -> list[Form]:
        """The forms of all operands in order, where the others are one constant number each."""
        numbers, along = iter(beside), dict(zip(places, parts))
        found: list[Form] = []
        for place, value in enumerate(node.inputs):
            number = None if place in along else next(numbers)
            if place in along:
                found.append(along[place])
            elif number is not None:
                found.append(Form(ONE, Fraction(number)))
            else:
                found.append(Form(self.key("beside", id(value)), Fraction(1)))
        return found

    def linear(self, tag: Hashable, part: Form) -> Form:
        if part.factor == 0:
            return Form(ONE, Fraction(0))
        return Form(self.key("linear", tag, part.key), part.factor)

    def sum(self, left: Form, right: Form) -> Form:
        if left.key == right.key:
            total = left.factor + right.factor
            return Form(left.key, total) if total else Form(ONE, Fraction(0))
        if left.factor == 0 or right.factor == 0:
            return right if left.factor == 0 else left
        if left.key == ONE:
            left, right = right, left
        return Form(self.key("sum", left.key, right.key, right.factor / left.factor), left.factor)

    def product(self, left: Form, right: Form) -> Form:
        factor = left.factor * right.factor
        if factor == 0:
            return Form(ONE, Fraction(0))
        if ONE in (left.key, right.key):
            return Form(right.key if left.key == ONE else left.key, factor)
        return Form(self.key("product", left.key, right.key), factor)

    def homogeneous(self, tag: Hashable, node: ir.Node, part: Form, *slope: Form) -> Form | None:
        if part.constant is not None:
            return self.other(tag, node, [part, *slope])
        beside = tuple((one.key, one.factor) for one in slope)
        return Form(self.key("homogeneous", tag, part.key, part.factor > 0, beside), abs(part.factor))

    def other(self, tag: Hashable, node: ir.Node, parts: list[Form]) -> Form | None:
        constants = [number for part in parts if (number := part.constant) is not None]
        function = FUNCTIONS.get(node.op_type) if node.domain == "" else None
        if function is not None and len(constants) == len(parts):
            try:
                return _constant(function(node, tuple(constants)))
            except (ValueError, OverflowError, ZeroDivisionError):
                return None
        return Form(self.key("other", tag, tuple((part.key, part.factor) for part in parts)), Fraction(1))


def proportional(weight: Weight, axis: int) -> list[tuple[int, float]]:
    """For every channel along `axis` a group, and the first number of the channel that is not 0 (0 where all are).

    Channels of one group ≥ 0 are exactly proportional to their first numbers; −1 is a channel alone in its group.

    >>> from rewrite.ir.weights import Constant
    >>> proportional(Constant(np.array([[1.0, 2.0, 3.0, 0.0], [3.0, 6.0, 5.0, 0.0]])), 1)
    [(0, 1.0), (0, 2.0), (-1, 3.0), (-1, 0.0)]
    """
    size = weight.shape[axis]
    pivots = np.zeros(size)
    for rows in _rows(weight, axis):
        unseen = pivots == 0
        first = (rows != 0).argmax(axis=0)
        pivots[unseen] = rows[first, np.arange(size)][unseen]
    generator, prints = np.random.default_rng(0), np.zeros(size)
    divisors = np.where(pivots == 0, 1.0, pivots)
    for rows in _rows(weight, axis):
        # Equal quotients are rounded equally, and summed in one order: exactly proportional channels agree in this.
        with np.errstate(all="ignore"):
            prints += (rows / divisors * generator.normal(size=(len(rows), 1))).sum(axis=0)
    candidates: dict[float, list[int]] = defaultdict(list)
    for channel in np.flatnonzero((pivots != 0) & np.isfinite(prints)):
        candidates[float(prints[channel])].append(int(channel))
    groups, count = [-1] * size, 0
    for channels in candidates.values():
        for group in _verified(weight, axis, channels, pivots) if len(channels) > 1 else ():
            for channel in group:
                groups[channel] = count
            count += 1
    return [(group, float(pivot)) for group, pivot in zip(groups, pivots)]


def _rows(weight: Weight, axis: int) -> Iterator[np.ndarray]:
    """Blocks (rows, channels) of all that stands at the channels."""
    for block in cut_blocks(weight.shape, weight.mixed | {axis}):
        yield np.moveaxis(weight.read(block), axis, -1).reshape(-1, weight.shape[axis])


def _verified(weight: Weight, axis: int, channels: Sequence[int], pivots: np.ndarray) -> Iterator[list[int]]:
    """`channels` parted into groups of two and more that are exactly proportional."""
    columns = {channel: _column(weight, axis, channel) for channel in channels}
    left = list(channels)
    while left:
        root = left[0]
        group = [root]
        for channel in left[1:]:
            if _are_proportional(columns[root], columns[channel], pivots[root], pivots[channel]):
                group.append(channel)
        left = [channel for channel in left if channel not in group]
        if len(group) > 1:
            yield group


def _column(weight: Weight, axis: int, channel: int) -> np.ndarray:
    whole = [slice(0, size) for size in weight.shape]
    whole[axis] = slice(channel, channel + 1)
    return weight.read(tuple(whole)).reshape(-1)


def _are_proportional(one: np.ndarray, other: np.ndarray, pivot: float, other_pivot: float) -> bool:
    ratio = other_pivot / pivot
    if abs(math.frexp(ratio)[0]) == 0.5:
        return bool(np.array_equal(one * ratio, other))
    p, q = Fraction(float(pivot)), Fraction(float(other_pivot))
    return all(Fraction(float(a)) * q == Fraction(float(b)) * p for a, b in zip(one, other))


# ----------------------------------------------------------------------------------------------- functions of constants

Function = Callable[[ir.Node, tuple[float, ...]], float]


def _gelu(node: ir.Node, operands: tuple[float, ...]) -> float:
    (x,) = operands
    if node.attributes.get_string("approximate", "none") == "tanh":
        return 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * math.erfc(-x / math.sqrt(2.0))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _of_one(function: Callable[[float], float]) -> Function:
    return lambda _, operands: function(operands[0])


FUNCTIONS: dict[str, Function] = {
    "Relu": _of_one(lambda x: max(x, 0.0)),
    "LeakyRelu": lambda node, x: x[0] if x[0] >= 0 else x[0] * node.attributes.get_float("alpha", 0.01),
    "PRelu": lambda _, x: x[0] if x[0] >= 0 else x[0] * x[1],
    "Gelu": _gelu,
    "Sigmoid": _of_one(_sigmoid),
    "Swish": lambda node, x: x[0] * _sigmoid(node.attributes.get_float("alpha", 1.0) * x[0]),
    "Tanh": _of_one(math.tanh),
    "Erf": _of_one(math.erf),
    "Exp": _of_one(math.exp),
    "Abs": _of_one(abs),
    "Sqrt": _of_one(math.sqrt),
    "Softplus": _of_one(lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x)))),
    "Add": lambda _, x: x[0] + x[1],
    "Sub": lambda _, x: x[0] - x[1],
    "Div": lambda _, x: x[0] / x[1],
    "Pow": lambda _, x: math.pow(x[0], x[1]),
    "MaxPool": _of_one(lambda x: x),
    "GlobalMaxPool": _of_one(lambda x: x),
    "ReduceMax": _of_one(lambda x: x),
    "ReduceMin": _of_one(lambda x: x),
}
"""Operators whose value at constants is known here; of all others a constant becomes unknown."""
