"""Layout around a cluster: what moves channels and computes nothing, in a form in which what is undone is gone.

A layout is a tuple of steps. Transposes that follow each other are one, and so are reshapes, which keep the order of
the elements; both cancel where nothing is left of them. What does more (a mean over positions, a Slice) stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from rewrite.ir.axes import Role, Shape, Thread, follow, volume
from rewrite.ir.edit import is_operator, shape_of

RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
MOVES = ("AveragePool", "Cast", "Dropout", "Gather", "GlobalAveragePool", "ReduceMean", "Slice")


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


def then(layout: Layout, step: LayoutStep) -> Layout:
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


def forward(step: LayoutStep, axis: int) -> int | None:
    """Where an axis is behind a step of layout; None where it does not stay whole."""
    if isinstance(step, Permuted):
        return step.axes.index(axis)
    if isinstance(step, Reshaped):
        return _same_axis(step.before, step.after, axis)
    thread = through_padding(step.node, 0, axis)
    kept = thread.role is Role.MOVE and thread.inputs == ((0, axis),) and len(thread.outputs) == 1
    return thread.outputs[0][1] if kept else None


def backward(step: LayoutStep, axis: int) -> int | None:
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


def layout_step(node: ir.Node) -> LayoutStep | None:
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
