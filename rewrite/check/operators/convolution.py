"""Convolution and pooling over any number of spatial axes.

A convolution is a sum of matrix products, one per kernel offset, so that no column matrix is built.
Source: ONNX operator definitions of Conv, ConvTranspose, MaxPool, AveragePool.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from rewrite.check.operators.registry import Call, operator


@dataclass(frozen=True)
class Window:
    """A sliding window, one entry a spatial axis: kernel, stride, dilation, padding before and after, output size."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    output: tuple[int, ...]

    @classmethod
    def of(cls, call: Call, spatial: tuple[int, ...], kernel: tuple[int, ...]) -> Window:
        """The window an operator's attributes describe on an input of size `spatial`."""
        rank = len(spatial)
        stride = tuple(call.attribute("strides") or (1,) * rank)
        dilation = tuple(call.attribute("dilations") or (1,) * rank)
        pads: list[int] = list(call.attribute("pads") or [0] * (2 * rank))
        mode, ceil = call.attribute("auto_pad", "NOTSET"), bool(call.attribute("ceil_mode", 0))
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
        before, after, output = pads[:rank], pads[rank:], []
        for i in range(rank):
            if mode in ("SAME_UPPER", "SAME_LOWER"):
                size = -(-spatial[i] // stride[i])
                total = max((size - 1) * stride[i] + reach[i] - spatial[i], 0)
                small, large = total // 2, total - total // 2
                before[i], after[i] = (small, large) if mode == "SAME_UPPER" else (large, small)
            else:
                if mode == "VALID":
                    before[i] = after[i] = 0
                span = spatial[i] + before[i] + after[i] - reach[i]
                size = (-(-span // stride[i]) if ceil else span // stride[i]) + 1
                if ceil and (size - 1) * stride[i] >= spatial[i] + before[i]:
                    size -= 1  # a window that would start in the padding after the input does not count
            output.append(size)
        return cls(tuple(kernel), stride, dilation, tuple(before), tuple(after), tuple(output))

    def padded(self, x: np.ndarray, fill: float) -> np.ndarray:
        """`x` with its spatial axes padded so far that every window lies inside."""
        widths = [(0, 0)] * (x.ndim - len(self.kernel))
        for i, size in enumerate(x.shape[x.ndim - len(self.kernel) :]):
            need = (self.output[i] - 1) * self.stride[i] + self.dilation[i] * (self.kernel[i] - 1) + 1
            widths.append((self.before[i], max(self.after[i], need - size - self.before[i])))
        return np.pad(x, widths, constant_values=fill)

    def offsets(self) -> itertools.product:
        """Every position inside the kernel."""
        return itertools.product(*map(range, self.kernel))

    def at(self, padded: np.ndarray, offset: tuple[int, ...]) -> np.ndarray:
        """The element at `offset` of every window: (..., *output), a view."""
        region = [
            slice(o * d, o * d + (size - 1) * s + 1, s)
            for o, d, s, size in zip(offset, self.dilation, self.stride, self.output)
        ]
        return padded[(..., *region)]


@operator("Conv")
def conv(call: Call, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x (n, c, *s), w (o, c/groups, *k) → (n, o, *s′)."""
    groups, (n, o) = call.attribute("group", 1), (x.shape[0], w.shape[0])
    window = Window.of(call, x.shape[2:], w.shape[2:])
    padded = window.padded(x.reshape(n, groups, x.shape[1] // groups, *x.shape[2:]), 0)
    kernels = w.reshape(groups, o // groups, *w.shape[1:])
    y = np.zeros((n, groups, o // groups, math.prod(window.output)), x.dtype)
    for offset in window.offsets():
        columns = window.at(padded, offset).reshape(n, groups, padded.shape[2], -1)
        y += np.matmul(kernels[(slice(None), slice(None), slice(None), *offset)], columns)
    y = y.reshape(n, o, *window.output)
    return y if bias is None else y + bias.reshape(1, -1, *[1] * len(window.output))


@operator("ConvTranspose")
def conv_transpose(call: Call, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The adjoint of Conv: x (n, c, *s), w (c, o/groups, *k) → (n, o, *s′)."""
    rank, groups, n = x.ndim - 2, call.attribute("group", 1), x.shape[0]
    spatial, kernel, width = x.shape[2:], w.shape[2:], w.shape[1]
    stride = tuple(call.attribute("strides") or (1,) * rank)
    dilation = tuple(call.attribute("dilations") or (1,) * rank)
    extra = tuple(call.attribute("output_padding") or (0,) * rank)
    pads = list(call.attribute("pads") or (0,) * (2 * rank))
    full = [s * (i - 1) + d * (k - 1) + 1 + e for s, i, d, k, e in zip(stride, spatial, dilation, kernel, extra)]
    mode, shape = call.attribute("auto_pad", "NOTSET"), call.attribute("output_shape")
    if shape is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        shape = [i * s for i, s in zip(spatial, stride)]
    if shape is not None:
        for i in range(rank):
            total = full[i] - int(shape[i])
            large = total - total // 2
            pads[i] = total // 2 if mode != "SAME_LOWER" else large
            pads[i + rank] = total - pads[i]
    columns = x.reshape(n, groups, x.shape[1] // groups, -1)
    kernels = w.reshape(groups, x.shape[1] // groups, width, *kernel)
    y = np.zeros((n, groups * width, *full), x.dtype)
    for offset in itertools.product(*map(range, kernel)):
        matrix = np.swapaxes(kernels[(slice(None), slice(None), slice(None), *offset)], -1, -2)
        term = np.matmul(matrix, columns).reshape(n, groups * width, *spatial)
        region = [slice(o * d, o * d + (i - 1) * s + 1, s) for o, d, s, i in zip(offset, dilation, stride, spatial)]
        y[(slice(None), slice(None), *region)] += term
    y = y[(slice(None), slice(None), *(slice(pads[i], full[i] - pads[i + rank]) for i in range(rank)))]
    return y if bias is None else y + bias.reshape(1, -1, *[1] * rank)


@operator("MaxPool")
def max_pool(call: Call, x: np.ndarray) -> np.ndarray:
    if call.wants(1):
        raise call.unsupported("with its Indices output")
    window = Window.of(call, x.shape[2:], call.attribute("kernel_shape"))
    fill = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    padded = window.padded(x, fill)
    return functools.reduce(np.maximum, [window.at(padded, offset) for offset in window.offsets()])


@operator("AveragePool")
def average_pool(call: Call, x: np.ndarray) -> np.ndarray:
    """Over the input only, or over the declared padding too where `count_include_pad`."""
    window = Window.of(call, x.shape[2:], call.attribute("kernel_shape"))
    inside = np.ones((1, 1, *x.shape[2:]), x.dtype)
    if call.attribute("count_include_pad", 0):
        inside = np.pad(inside, [(0, 0), (0, 0), *zip(window.before, window.after)], constant_values=1)
        counted = _fitted(window, inside)
    else:
        counted = window.padded(inside, 0)
    padded = window.padded(x, 0)
    total, count = (
        functools.reduce(np.add, [window.at(array, offset) for offset in window.offsets()])
        for array in (padded, counted)
    )
    return total / count


def _fitted(window: Window, inside: np.ndarray) -> np.ndarray:
    """`inside`, already padded as declared, with zeros where a window of ceil_mode reaches further."""
    widths = [(0, 0), (0, 0)]
    for i, size in enumerate(inside.shape[2:]):
        need = (window.output[i] - 1) * window.stride[i] + window.dilation[i] * (window.kernel[i] - 1) + 1
        widths.append((0, max(0, need - size)))
    return np.pad(inside, widths)


@operator("GlobalAveragePool")
def global_average_pool(call: Call, x: np.ndarray) -> np.ndarray:
    return np.mean(x, axis=tuple(range(2, x.ndim)), keepdims=True)


@operator("GlobalMaxPool")
def global_max_pool(call: Call, x: np.ndarray) -> np.ndarray:
    return np.max(x, axis=tuple(range(2, x.ndim)), keepdims=True)
