"""A torch tensor without data that records, operation by operation, the weight expression it stands for.

Checkpoint conversions (stack the experts, concatenate gate and up, permute for RoPE) are transformers' own code. They
run here on these tensors and leave a `rewrite.ir.weights` expression instead of an array: nothing is re-implemented,
and nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rewrite.ir import weights

aten = torch.ops.aten


class ExpressionTensor(torch.Tensor):
    """A contiguous tensor of `weight.shape` and a dtype; its storage does not exist."""

    weight: weights.Weight

    @staticmethod
    def __new__(cls, weight: weights.Weight, dtype: torch.dtype) -> ExpressionTensor:
        tensor = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=dtype, device=torch.device("cpu"))
        tensor.weight = weight
        return tensor

    def __init__(self, weight: weights.Weight, dtype: torch.dtype) -> None:
        """State is set in `__new__`."""

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ExpressionTensor({self.weight!r}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        rule = RULES.get(func)
        if rule is None:
            raise NotImplementedError(f"a checkpoint conversion uses {func}, which has no weight expression")
        return rule(*args, **(kwargs or {}))


def _new(weight: weights.Weight, like: ExpressionTensor) -> ExpressionTensor:
    return ExpressionTensor(weight, like.dtype)


def _same(tensor: ExpressionTensor, *_: object, **__: object) -> ExpressionTensor:
    return tensor


def _reshaped(tensor: ExpressionTensor, shape: list[int]) -> ExpressionTensor:
    sizes = list(shape)
    if -1 in sizes:
        known = -1
        for size in sizes:
            known *= size
        sizes[sizes.index(-1)] = tensor.numel() // known if known else 0
    if tuple(sizes) == tensor.weight.shape:
        return tensor
    return _new(weights.Reshape(tensor.weight, tuple(sizes)), tensor)


def _permuted(tensor: ExpressionTensor, permutation: list[int]) -> ExpressionTensor:
    return _new(weights.Transpose(tensor.weight, tuple(axis % tensor.ndim for axis in permutation)), tensor)


def _transposed(tensor: ExpressionTensor, first: int = 0, second: int = 1) -> ExpressionTensor:
    permutation = list(range(tensor.ndim))
    permutation[first], permutation[second] = permutation[second], permutation[first]
    return _permuted(tensor, permutation)


def _sliced(
    tensor: ExpressionTensor, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> ExpressionTensor:
    if step != 1:
        raise NotImplementedError("a checkpoint conversion slices with a step")
    axis %= tensor.ndim
    first, last, _ = slice(start, stop).indices(tensor.shape[axis])
    region = list(weights.whole(tensor.weight.shape))
    region[axis] = slice(first, max(first, last))
    return _new(weights.Slice(tensor.weight, tuple(region)), tensor)


def _split_with_sizes(tensor: ExpressionTensor, sizes: list[int], axis: int = 0) -> list[ExpressionTensor]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(_sliced(tensor, axis, start, start + size))
        start += size
    return pieces


def _split(tensor: ExpressionTensor, size: int, axis: int = 0) -> list[ExpressionTensor]:
    length = tensor.shape[axis]
    return _split_with_sizes(tensor, [min(size, length - start) for start in range(0, length, size)], axis)


def _selected(tensor: ExpressionTensor, axis: int, index: int) -> ExpressionTensor:
    index %= tensor.shape[axis]
    return _squeezed(_sliced(tensor, axis, index, index + 1), axis)


def _squeezed(tensor: ExpressionTensor, axes: int | list[int] | None = None) -> ExpressionTensor:
    if axes is None:
        axes = list(range(tensor.ndim))
    dropped = {axis % tensor.ndim for axis in ([axes] if isinstance(axes, int) else axes)}
    return _reshaped(tensor, [size for axis, size in enumerate(tensor.shape) if axis not in dropped or size != 1])


def _unsqueezed(tensor: ExpressionTensor, axis: int) -> ExpressionTensor:
    shape = list(tensor.shape)
    shape.insert(axis % (tensor.ndim + 1), 1)
    return _reshaped(tensor, shape)


def _concatenated(tensors: list[ExpressionTensor], axis: int = 0) -> ExpressionTensor:
    if len(tensors) == 1:
        return tensors[0]
    return _new(weights.Concat(tuple(t.weight for t in tensors), axis % tensors[0].ndim), tensors[0])


def _stacked(tensors: list[ExpressionTensor], axis: int = 0) -> ExpressionTensor:
    leading = _new(weights.Stack(tuple(t.weight for t in tensors)), tensors[0])
    axis %= leading.ndim
    if axis == 0:
        return leading
    return _permuted(leading, [*range(1, axis + 1), 0, *range(axis + 1, leading.ndim)])


RULES: dict[object, Callable] = {
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.contiguous.default: _same,
    aten.lift_fresh.default: _same,
    aten.view.default: _reshaped,
    aten._unsafe_view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten.permute.default: _permuted,
    aten.transpose.int: _transposed,
    aten.t.default: _transposed,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.squeeze.default: _squeezed,
    aten.squeeze.dim: _squeezed,
    aten.squeeze.dims: _squeezed,
    aten.unsqueeze.default: _unsqueezed,
    aten.cat.default: _concatenated,
    aten.stack.default: _stacked,
}
