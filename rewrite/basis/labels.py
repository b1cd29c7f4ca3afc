"""Labels: which channel of which head every element of a value holds, carried through layout operators.

A value's labels are integers, one array axis for each of its axes. An array axis is a *period* of the value's axis: it
divides its size, and the labels repeat. So an axis along which nothing changes has length 1, whatever its size, and an
axis `4*batch` that was made of (batch, 4 heads) has length 4. Label −1 is a channel outside the region.

    Split, Slice, Gather, Reshape, Transpose, Expand, …    move labels exactly as they move numbers

`forward` gives the labels of a node's results, `backward` those of its operand; where two channels turn out to be one
number they are tied. What cannot be followed raises `Blocked`; it is never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rewrite.ir.axes import Shape, operand, volume
from rewrite.ir.constants import integers
from rewrite.ir.edit import constant_of, is_inference_dropout, shape_of

Labels = NDArray[np.int64]
Tie = Callable[[Labels, Labels], None]
"""Makes channels one: two arrays of labels that broadcast, element by element."""

OUTSIDE = -1


class Blocked(Exception):
    """Labels cannot be carried further; the message says why."""


def sizes(value: ir.Value | None) -> Shape:
    """The shape written on a value. Raises Blocked where there is none."""
    shape = shape_of(value)
    if shape is None:
        raise Blocked(f"the shape of {value.name if value is not None else 'an operand'} is unknown")
    return shape


def compress(labels: Labels) -> Labels:
    """The same labels with an axis of length 1 wherever nothing changes along it.

    >>> compress(np.array([[3, 4], [3, 4]]))
    array([[3, 4]])
    """
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1 and bool((labels == (first := labels.take([0], axis))).all()):
            labels = first
    return labels


def varying(labels: Labels) -> list[int]:
    """The axes along which labels change."""
    return [axis for axis, length in enumerate(labels.shape) if length > 1]


def spread(labels: Labels, axis: int, size: object) -> Labels:
    """Labels with one axis written out in full. Raises Blocked where its size is not static."""
    if labels.shape[axis] == size:
        return labels
    if not isinstance(size, int) or size % labels.shape[axis]:
        raise Blocked(f"the size of axis {axis} is not static")
    return _tiled(labels, axis, size // labels.shape[axis])


def combine(one: Labels, other: Labels, tie: Tie) -> Labels:
    """What both say of one value: channels that both label are tied, channels that one labels are labelled."""
    for axis in range(one.ndim):
        length = math.lcm(one.shape[axis], other.shape[axis])
        one, other = (_tiled(labels, axis, length // labels.shape[axis]) for labels in (one, other))
    both = (one != OUTSIDE) & (other != OUTSIDE)
    tie(one[both], other[both])
    return compress(np.where(one == OUTSIDE, other, one))


def reduce(labels: Labels, axis: int, tie: Tie) -> Labels:
    """Labels of a number that is repeated along `axis`: what it is repeated to is one channel."""
    if bool((labels == OUTSIDE).any() & (labels != OUTSIDE).any()):
        inside = labels != OUTSIDE
        if bool((inside.any(axis=axis) != inside.all(axis=axis)).any()):
            raise Blocked("one number stands for channels inside and outside of the region")
    first = labels.take([0], axis)
    tie(*(np.ascontiguousarray(part).reshape(-1) for part in np.broadcast_arrays(labels, first)))
    return first


def pull(labels: Labels, result: Shape, wanted: Shape, tie: Tie) -> Labels:
    """Labels of an operand of shape `wanted` that broadcasts to `result`, from those of the result."""
    missing = len(result) - len(wanted)
    for axis in range(len(result)):
        size = 1 if axis < missing else wanted[axis - missing]
        if size == result[axis] or labels.shape[axis] == 1:
            continue
        if size != 1:
            raise Blocked(f"the size of axis {axis} is not static")
        labels = reduce(labels, axis, tie)
    return compress(labels.reshape(labels.shape[missing:]))


def push(labels: Labels, rank: int) -> Labels:
    """Labels of a result of `rank` axes, from those of an operand that broadcasts to it."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def _tiled(labels: Labels, axis: int, times: int) -> Labels:
    return labels if times == 1 else np.concatenate([labels] * times, axis=axis)


# -------------------------------------------------------------------------------------------------------------- layout


def is_layout(node: ir.Node) -> bool:
    """Whether a node only moves what its first operand holds."""
    if node.domain != "":
        return False
    if node.op_type in ("Cast", "CastLike"):
        kinds = [value.dtype for value in (node.inputs[0], node.outputs[0]) if value is not None]
        return len(kinds) == 2 and all(kind is not None and kind.is_floating_point() for kind in kinds)
    if node.op_type == "Dropout":
        return is_inference_dropout(node)
    return node.op_type in _LAYOUT


def forward(node: ir.Node, labels: Labels) -> Iterator[tuple[int, Labels]]:
    """Labels of a layout operator's results, by position, from those of its first operand."""
    before = sizes(node.inputs[0])
    for position, result in enumerate(node.outputs if node.op_type == "Split" else node.outputs[:1]):
        yield position, compress(_LAYOUT[node.op_type](node, position, labels, before, sizes(result)))


def backward(node: ir.Node, position: int, labels: Labels, tie: Tie) -> Labels:
    """Labels of a layout operator's first operand, from those of result `position`."""
    before, after = sizes(node.inputs[0]), sizes(node.outputs[position])
    match node.op_type:
        case "Identity" | "Cast" | "CastLike" | "Dropout" | "Neg":
            return labels
        case "Transpose":
            return labels.transpose([int(axis) for axis in np.argsort(_permutation(node, len(before)))])
        case "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze":
            return compress(reshape(labels, after, before))
        case "Expand":
            return pull(labels, after, before, tie)
        case _:
            return _undo_choice(node, position, labels, before, after)


def _undo_choice(node: ir.Node, position: int, labels: Labels, before: Shape, after: Shape) -> Labels:
    """Slice, Split, Gather and GatherND take some elements: sent through the node, places say where each came from.

    Along an axis that is not static, or by indices not known beforehand, whatever was taken must be labelled alike.
    """
    axes = _chosen_axes(node, len(before))
    known = node.op_type in ("Slice", "Split") or constant_of(operand(node, 1)) is not None
    shift = len(after) - len(before)
    shape: list[int] = []
    for axis, size in enumerate(before):
        if axis not in axes:
            behind = node.op_type in ("Gather", "GatherND") and axis > axes[0]
            shape.append(labels.shape[axis + shift if behind else axis])
        else:
            shape.append(size if known and isinstance(size, int) else 1)
    places = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    taken = _LAYOUT[node.op_type](node, position, places, before, after)
    if any(length > there for length, there in zip(labels.shape, taken.shape)):
        raise Blocked(f"{node.op_type} takes channels that are not known beforehand")
    labels = np.broadcast_to(labels, taken.shape)
    flat = np.full(math.prod(shape), OUTSIDE, np.int64)
    flat[taken] = labels
    if bool((flat[taken] != labels).any()):
        raise Blocked(f"{node.op_type} takes a channel twice")
    return compress(flat.reshape(shape))


def _chosen_axes(node: ir.Node, rank: int) -> list[int]:
    match node.op_type:
        case "Split" | "Gather":
            return [node.attributes.get_int("axis", 0) % rank]
        case "GatherND":
            indices = sizes(operand(node, 1))
            if node.attributes.get_int("batch_dims", 0) or not indices or not isinstance(indices[-1], int):
                raise Blocked("GatherND picks rows of each batch")
            return list(range(indices[-1]))
        case _:
            return sorted(axis for axis, _ in _ranges(node, rank))


def _ranges(node: ir.Node, rank: int) -> list[tuple[int, slice]]:
    starts, ends = integers(operand(node, 1)), integers(operand(node, 2))
    if starts is None or ends is None:
        raise Blocked("Slice takes a part that is not known beforehand")
    axes = integers(operand(node, 3)) if operand(node, 3) is not None else tuple(range(len(starts)))
    steps = integers(operand(node, 4)) if operand(node, 4) is not None else (1,) * len(starts)
    if axes is None or steps is None or any(step < 1 for step in steps):
        raise Blocked("Slice takes a part that is not known beforehand")
    return [(axis % rank, slice(*part)) for axis, *part in zip(axes, starts, ends, steps)]


def _permutation(node: ir.Node, rank: int) -> list[int]:
    return list(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))


def _same(node: ir.Node, position: int, labels: Labels, before: Shape, after: Shape) -> Labels:
    return labels


def _transpose(node: ir.Node, position: int, labels: Labels, before: Shape, after: Shape) -> Labels:
    return labels.transpose(_permutation(node, len(before)))


def _reshape(node: ir.Node, position: int, labels: Labels, before: Shape, after: Shape) -> Labels:
    return reshape(labels, before, after)


def _expand(node: ir.Node, position: int, labels: Labels, before: Shape, after: Shape) -> Labels:
    return push(labels, len(after))


def _slice(node: ir.Node, position: int, labels: Labels, before: Shape, after: Shape) -> Labels:
    for axis, part in _ranges(node, len(before)):
        if labels.shape[axis] > 1:
            labels = spread(labels, axis, before[axis])[(slice(None),) * axis + (part,)]
    return labels


def _split(node: ir.Node, position: int, labels: Labels, before: Shape, after: Shape) -> Labels:
    (axis,) = _chosen_axes(node, len(before))
    if labels.shape[axis] == 1:
        return labels
    lengths = [sizes(result)[axis] for result in node.outputs]
    if any(not isinstance(length, int) for length in lengths):
        raise Blocked("Split parts an axis whose size is not static")
    start = sum(int(length or 0) for length in lengths[:position])
    stop = start + int(lengths[position] or 0)
    return spread(labels, axis, before[axis])[(slice(None),) * axis + (slice(start, stop),)]


def _gather(node: ir.Node, position: int, labels: Labels, before: Shape, after: Shape) -> Labels:
    (axis,) = _chosen_axes(node, len(before))
    rank = len(after) - len(before) + 1
    if labels.shape[axis] == 1:
        return labels.reshape(*labels.shape[:axis], *(1,) * rank, *labels.shape[axis + 1 :])
    return spread(labels, axis, before[axis]).take(_indices(node), axis)


def _gather_nd(node: ir.Node, position: int, labels: Labels, before: Shape, after: Shape) -> Labels:
    axes = _chosen_axes(node, len(before))
    rank = len(sizes(operand(node, 1))) - 1
    if all(labels.shape[axis] == 1 for axis in axes):
        return labels.reshape(*(1,) * rank, *labels.shape[len(axes) :])
    for axis in axes:
        labels = spread(labels, axis, before[axis])
    indices = _indices(node)
    return labels[tuple(indices[..., axis] for axis in axes)]


def _indices(node: ir.Node) -> NDArray[np.int64]:
    tensor, given = constant_of(operand(node, 1)), integers(operand(node, 1))
    if tensor is None or given is None:
        raise Blocked(f"{node.op_type} takes channels that are not known beforehand")
    return np.array(given, np.int64).reshape(tuple(tensor.shape.numpy()))


def reshape(labels: Labels, before: Shape, after: Shape) -> Labels:
    """Labels under another shape: axes are joined and divided in groups that have one number of elements.

    Only the first axis of a group may have a size that is not static, since labels repeat along it.

    >>> reshape(np.array([[[0, 1], [2, 3]]]), ("batch", 2, 2), ("2*batch", 2))
    array([[0, 1],
           [2, 3]])
    """
    place = 0
    for joined, divided in _groups(before, after):
        front, rest = labels.shape[:place], labels.shape[place + len(joined) :]
        new = [1] * len(divided)
        if any(length > 1 for length in labels.shape[place : place + len(joined)]):
            flat = _joined(labels, place, joined)
            inner = [_static(size) for size in _behind_first(divided)]
            length = math.lcm(flat.shape[place], math.prod(inner))
            labels = _tiled(flat, place, length // flat.shape[place])
            new = [1] * (len(divided) - len(inner) - 1) + [length // math.prod(inner), *inner]
        labels = labels.reshape(*front, *new, *rest)
        place += len(divided)
    return labels


def _groups(before: Shape, after: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Runs of axes that hold the same elements before and after, cut wherever as many elements lie behind."""
    ends = [(volume(before[axis:]), axis) for axis in range(len(before) + 1)]
    first = second = 0
    for behind, axis in ends[1:]:
        places = [place for place in range(second, len(after) + 1) if volume(after[place:]) == behind]
        if behind is None or not places or (axis < len(before) and before[axis] == 1):
            continue
        # Axes of size 1 go with what stands in front of them.
        stop = len(after) if axis == len(before) else places[-1]
        yield before[first:axis], after[second:stop]
        first, second = axis, stop
    if first < len(before) or second < len(after):
        yield before[first:], after[second:]


def _behind_first(group: Shape) -> Shape:
    """What stands behind the first axis that is longer than 1."""
    long = next((place for place, size in enumerate(group) if size != 1), len(group) - 1)
    return group[long + 1 :]


def _joined(labels: Labels, place: int, group: Shape) -> Labels:
    """The axes of a group made one, all but the first written out in full."""
    inner = _behind_first(group)
    for offset, size in enumerate(group[len(group) - len(inner) :], start=len(group) - len(inner)):
        labels = spread(labels, place + offset, size)
    return labels.reshape(*labels.shape[:place], -1, *labels.shape[place + len(group) :])


def _static(size: object) -> int:
    if not isinstance(size, int):
        raise Blocked("an axis that is not static is divided off behind channels")
    return size


_LAYOUT: dict[str, Callable[[ir.Node, int, Labels, Shape, Shape], Labels]] = {
    **dict.fromkeys(("Identity", "Cast", "CastLike", "Dropout", "Neg"), _same),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    "Expand": _expand,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "GatherND": _gather_nd,
}
