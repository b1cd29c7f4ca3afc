"""Weights as expressions over tensors on disk, evaluated in float64 by regions and rounded once.

A pass never computes a weight; it builds an expression (`Scale(Transpose(Source(w)), gamma, axis=0)`). `read` gives any
hyper-rectangle of its value in float64 while holding little more than that hyper-rectangle, so a 256k × 4096 table
is folded within a few megabytes. `materialize` makes the tensor that is saved: evaluated by blocks of rows and
rounded to its storage dtype once, whatever number of passes it went through.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import onnx_ir as ir

Region = tuple[slice, ...]
"""One slice an axis, with explicit start and stop and step 1."""

BLOCK_ELEMENTS = 1 << 21
"""Elements evaluated at a time (16 MiB of float64)."""


def whole(shape: Sequence[int]) -> Region:
    """The region that is all of `shape`.

    >>> whole((2, 3))
    (slice(0, 2, None), slice(0, 3, None))
    """
    return tuple(slice(0, size) for size in shape)


def cut_blocks(shape: Sequence[int], mixed: frozenset[int], elements: int = BLOCK_ELEMENTS) -> Iterator[Region]:
    """Regions that cover `shape`, cut along the first axis that is not `mixed`; one region where all are.

    >>> list(cut_blocks((4, 6), frozenset({0}), 12))
    [(slice(0, 4, None), slice(0, 3, None)), (slice(0, 4, None), slice(3, 6, None))]
    """
    axis = next((axis for axis in range(len(shape)) if axis not in mixed), None)
    if axis is None:
        yield whole(shape)
        return
    step = max(1, elements * shape[axis] // max(1, math.prod(shape)))
    for start in range(0, shape[axis], step):
        yield (*whole(shape[:axis]), slice(start, min(start + step, shape[axis])), *whole(shape[axis + 1 :]))


def row_blocks(shape: Sequence[int], elements: int = BLOCK_ELEMENTS) -> Iterator[Region]:
    """Regions that cover `shape` in order of rows, each of at most `elements` elements (or one row)."""
    if not shape:
        yield ()
        return
    rows = max(1, elements // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *whole(shape[1:]))


class Weight(ABC):
    """A tensor of real numbers: `shape`, and `read` for any region of it in float64."""

    shape: tuple[int, ...]

    mixed: frozenset[int] = frozenset()
    """Axes along which some entries cost as much as all: whoever reads all of it does not cut it there."""

    @abstractmethod
    def read(self, region: Region) -> np.ndarray:
        """The float64 values of `region`."""

    def numpy(self) -> np.ndarray:
        """All of it in float64; for vectors and small tables."""
        return self.read(whole(self.shape))


@dataclass(frozen=True, eq=False)
class Source(Weight):
    """A stored tensor, widened exactly. Reads of an external tensor map the file only while they last."""

    tensor: ir.TensorProtocol

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.tensor.shape.numpy())

    def read(self, region: Region) -> np.ndarray:
        return read_stored(self.tensor, region)


def read_stored(tensor: ir.TensorProtocol, region: Region) -> np.ndarray:
    """`region` of a stored tensor as float64, exactly.

    An external tensor is mapped anew each time: a mapping that is kept also keeps its pages resident (RECIPES: 4.8 GB
    at 1.1 B parameters).
    """
    if isinstance(tensor, MaterializedTensor):
        return tensor.rounded(region).astype(np.float64)
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8:
        shape = tuple(tensor.shape.numpy())
        if math.prod(shape) == 0:
            return np.zeros([s.stop - s.start for s in region])
        mapped = np.memmap(tensor.path, tensor.dtype.numpy(), mode="r", offset=tensor.offset or 0, shape=shape)
        return np.asarray(mapped[region]).astype(np.float64)
    return tensor.numpy()[region].astype(np.float64)


@dataclass(frozen=True, eq=False)
class Constant(Weight):
    """A small array computed by a pass."""

    value: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.value.shape

    def read(self, region: Region) -> np.ndarray:
        return self.value[region].astype(np.float64)


@dataclass(frozen=True, eq=False)
class Transpose(Weight):
    """`inner` with its axes permuted: axis i of the result is axis `permutation[i]` of `inner`."""

    inner: Weight
    permutation: tuple[int, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.inner.shape[axis] for axis in self.permutation)

    def read(self, region: Region) -> np.ndarray:
        inner = [slice(0, 0)] * len(region)
        for taken, axis in zip(region, self.permutation):
            inner[axis] = taken
        return self.inner.read(tuple(inner)).transpose(self.permutation)

    @property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        return frozenset(place for place, axis in enumerate(self.permutation) if axis in self.inner.mixed)


@dataclass(frozen=True, eq=False)
class Reshape(Weight):
    """`inner` under another shape; where only axes of size 1 come or go, a region of it is one of `inner`."""

    inner: Weight
    shape: tuple[int, ...]

    def read(self, region: Region) -> np.ndarray:
        longer = [(size, taken) for size, taken in zip(self.shape, region) if size != 1]
        if [size for size, _ in longer] != [size for size in self.inner.shape if size != 1]:
            return self.inner.numpy().reshape(self.shape)[region]
        within = iter(taken for _, taken in longer)
        values = self.inner.read(tuple(slice(0, 1) if size == 1 else next(within) for size in self.inner.shape))
        sizes = [taken.stop - taken.start for taken in region]
        return values.reshape(sizes) if math.prod(sizes) else np.zeros(sizes)

    @property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        return frozenset(range(len(self.shape))) if self.inner.mixed else frozenset()


@dataclass(frozen=True, eq=False)
class Slice(Weight):
    """The hyper-rectangle `region` of `inner`."""

    inner: Weight
    region: Region

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(taken.stop - taken.start for taken in self.region)

    def read(self, region: Region) -> np.ndarray:
        return self.inner.read(tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(self.region, region)))

    @property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        return self.inner.mixed


@dataclass(frozen=True, eq=False)
class Concat(Weight):
    """`parts` joined along `axis`."""

    parts: tuple[Weight, ...]
    axis: int

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    def read(self, region: Region) -> np.ndarray:
        taken, pieces, offset = region[self.axis], [], 0
        for part in self.parts:
            size = part.shape[self.axis]
            start, stop = max(taken.start - offset, 0), min(taken.stop - offset, size)
            if start < stop:
                pieces.append(part.read((*region[: self.axis], slice(start, stop), *region[self.axis + 1 :])))
            offset += size
        return np.concatenate(pieces, axis=self.axis)

    @property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        return frozenset().union(*(part.mixed for part in self.parts))


@dataclass(frozen=True, eq=False)
class Stack(Weight):
    """`parts` of one shape stacked along a new leading axis (the experts of a mixture, one tensor each on disk)."""

    parts: tuple[Weight, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.parts), *self.parts[0].shape)

    def read(self, region: Region) -> np.ndarray:
        return np.stack([part.read(region[1:]) for part in self.parts[region[0]]])

    @property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        return frozenset(axis + 1 for part in self.parts for axis in part.mixed)


@dataclass(frozen=True, eq=False)
class Scale(Weight):
    """`inner` times the vector `factor` along `axis`, or times a scalar where `factor` has shape ()."""

    inner: Weight
    factor: Weight
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.shape

    def read(self, region: Region) -> np.ndarray:
        if not self.factor.shape:
            return self.inner.read(region) * self.factor.read(())
        factor = self.factor.read((region[self.axis],))
        return self.inner.read(region) * factor.reshape([-1 if i == self.axis else 1 for i in range(len(self.shape))])

    @property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        return self.inner.mixed


@dataclass(frozen=True, eq=False)
class Center(Weight):
    """`inner` minus its mean along `axis`: multiplication by P = I − 11ᵀ/d on that axis."""

    inner: Weight
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.shape

    def read(self, region: Region) -> np.ndarray:
        full = (*region[: self.axis], slice(0, self.shape[self.axis]), *region[self.axis + 1 :])
        values = self.inner.read(full)
        values = values - centred_mean(values, self.axis)
        return values[tuple(region[i] if i == self.axis else slice(None) for i in range(len(region)))]

    @property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        return self.inner.mixed | {self.axis}


class Map(Protocol):
    """A linear map of one axis, from `size` channels to `width` (`rewrite.proof.transforms`)."""

    @property
    def size(self) -> int: ...

    @property
    def width(self) -> int: ...

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Transformed(Weight):
    """`inner` with `map` applied along `axis`: W·T on the last axis, TᵀW on the first."""

    inner: Weight
    map: Map
    axis: int

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        if self.inner.shape[self.axis] != self.map.size:
            raise ValueError(
                f"{self.map} maps {self.map.size} channels, axis {self.axis} of {self.inner.shape} has not"
            )
        return (*self.inner.shape[: self.axis], self.map.width, *self.inner.shape[self.axis + 1 :])

    def read(self, region: Region) -> np.ndarray:
        full = (*region[: self.axis], slice(0, self.inner.shape[self.axis]), *region[self.axis + 1 :])
        mapped = self.map.apply(self.inner.read(full), self.axis)
        return mapped[tuple(region[i] if i == self.axis else slice(None) for i in range(len(region)))]

    @property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        return self.inner.mixed | {self.axis}


def centred_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean along `axis`, corrected once: the mean of what the first pass left is rounding, and is added back."""
    mean = values.mean(axis=axis, keepdims=True)
    return mean + (values - mean).mean(axis=axis, keepdims=True)


@dataclass(frozen=True, eq=False)
class Add(Weight):
    """The sum of `parts`, all of one shape."""

    parts: tuple[Weight, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.parts[0].shape

    def read(self, region: Region) -> np.ndarray:
        total = self.parts[0].read(region)
        for part in self.parts[1:]:
            total = total + part.read(region)
        return total

    @property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        return frozenset().union(*(part.mixed for part in self.parts))


@dataclass(frozen=True, eq=False)
class Product(Weight):
    """`vector` (k,) times `matrix` (k, n): shape (n,), summed by blocks of the matrix's rows."""

    vector: Weight
    matrix: Weight

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.matrix.shape[1:]

    def read(self, region: Region) -> np.ndarray:
        vector = self.vector.numpy()
        total = np.zeros([taken.stop - taken.start for taken in region])
        for rows, *_ in row_blocks(self.matrix.shape):
            total += np.tensordot(vector[rows], self.matrix.read((rows, *region)), axes=1)
        return total


@dataclass(frozen=True, eq=False)
class Placed(Weight):
    """`inner` amid zeros: on every axis its entry j stands at `start` + j·`step`.

    >>> Placed(Constant(np.array([1.0, 2.0])), (5,), (1,), (2,)).numpy().tolist()
    [0.0, 1.0, 0.0, 2.0, 0.0]
    """

    inner: Weight
    shape: tuple[int, ...]
    start: tuple[int, ...]
    step: tuple[int, ...]

    def read(self, region: Region) -> np.ndarray:
        result = np.zeros([taken.stop - taken.start for taken in region])
        inside: list[slice] = []
        places: list[slice] = []
        for taken, size, start, step in zip(region, self.inner.shape, self.start, self.step):
            first = max(0, -((start - taken.start) // step))
            stop = min(size, -((start - taken.stop) // step))
            if first >= stop:
                return result
            inside.append(slice(first, stop))
            places.append(slice(start + first * step - taken.start, start + (stop - 1) * step - taken.start + 1, step))
        result[tuple(places)] = self.inner.read(tuple(inside))
        return result

    @property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        return self.inner.mixed


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Weight):
    """A kernel (m, n, …) of `groups` groups of channels as one of `kept` groups: (m, n·groups/kept, …), zeros between.

    Rows are divided into `groups` runs of equal length; `kept` divides `groups`. With one group for each row it is a
    diagonal:

    >>> BlockDiagonal(Constant(np.array([[1.0], [2.0]])), 2).numpy().tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """

    inner: Weight
    groups: int
    kept: int = 1

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        rows, columns, *rest = self.inner.shape
        if self.groups % self.kept or rows % self.groups:
            raise ValueError(f"{rows} rows in {self.groups} groups are no rows in {self.kept} groups")
        return (rows, columns * (self.groups // self.kept), *rest)

    def read(self, region: Region) -> np.ndarray:
        rows, columns, *rest = region
        result = np.zeros([taken.stop - taken.start for taken in region])
        width, length = self.inner.shape[1], self.inner.shape[0] // self.groups
        values = self.inner.read((rows, slice(0, width), *rest))
        blocks = np.arange(rows.start, rows.stop) // length % (self.groups // self.kept)
        places = blocks[:, None] * width + np.arange(width) - columns.start
        row, column = np.nonzero((places >= 0) & (places < columns.stop - columns.start))
        result[row, places[row, column]] = values[row, column]
        return result

    @property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        return self.inner.mixed


@dataclass(frozen=True, eq=False)
class Composed(Weight):
    """The kernel of one convolution behind another: Σ over c, j₂, j₁ of second[o, c, j₂]·first[c, i, j₁].

    `second` (m, n₂, *k₂) and `first` (c, n₁, *k₁) both have `groups` groups of channels, so that c = n₂·groups. Tap j₂
    and tap j₁ meet in tap j₂·`second_step` + j₁·`first_step` of the result, (m, n₁, *k). Two matrices, without taps,
    are multiplied. Evaluated by blocks of c.

    >>> W = Constant(np.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> Composed(W, W).numpy().tolist()
    [[7.0, 10.0], [15.0, 22.0]]
    """

    second: Weight
    first: Weight
    second_step: tuple[int, ...] = ()
    first_step: tuple[int, ...] = ()
    groups: int = 1

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        (made, between, *later), (count, read, *earlier) = self.second.shape, self.first.shape
        if between * self.groups != count or made % self.groups:
            raise ValueError(f"{self.second.shape} reads {between * self.groups} channels, not {count}")
        steps = zip(later, self.second_step, earlier, self.first_step, strict=True)
        return (made, read, *((a - 1) * by + (b - 1) * step + 1 for a, by, b, step in steps))

    def read(self, region: Region) -> np.ndarray:
        rows, columns, *taps = region
        result = np.zeros([taken.stop - taken.start for taken in region])
        length, between = self.shape[0] // self.groups, self.second.shape[1]
        first_width = (columns.stop - columns.start, *self.first.shape[2:])
        for group in range(rows.start // length, -(-rows.stop // length)):
            part = slice(max(rows.start, group * length), min(rows.stop, (group + 1) * length))
            within = result[part.start - rows.start : part.stop - rows.start]
            widest = max(math.prod(self.second.shape[2:]) * (part.stop - part.start), math.prod(first_width), 1)
            for block in _runs(between, widest):
                second = self.second.read((part, block, *whole(self.second.shape[2:])))
                inner = slice(group * between + block.start, group * between + block.stop)
                first = self.first.read((inner, columns, *whole(self.first.shape[2:])))
                self._accumulate(within, second, first, tuple(taps))
        return result

    def _accumulate(self, result: np.ndarray, second: np.ndarray, first: np.ndarray, taps: Region) -> None:
        for later in np.ndindex(*second.shape[2:]):
            for earlier in np.ndindex(*first.shape[2:]):
                met = zip(later, self.second_step, earlier, self.first_step)
                place = [a * by + b * step for a, by, b, step in met]
                if all(taken.start <= tap < taken.stop for tap, taken in zip(place, taps)):
                    at = tuple(tap - taken.start for tap, taken in zip(place, taps))
                    result[(..., *at)] += second[(..., *later)] @ first[(..., *earlier)]

    @property
    def mixed(self) -> frozenset[int]:  # type: ignore[override]
        return (self.second.mixed & {0}) | (self.first.mixed & {1})


def _runs(size: int, elements: int) -> Iterator[slice]:
    """Slices that cover `size` entries, of at most a block where one entry has so many elements."""
    step = max(1, BLOCK_ELEMENTS // elements)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


@dataclass(frozen=True, eq=False)
class Response(Weight):
    """What a convolution makes of channels that are constant: Σ over i, j of kernel[o, i, j]·vector[i], shape (m,).

    `kernel` (m, n, *k) has `groups` groups, `vector` (n·groups,).

    >>> Response(Constant(np.array([[1.0, 2.0], [3.0, 4.0]])), Constant(np.array([1.0, 10.0]))).numpy().tolist()
    [21.0, 43.0]
    """

    kernel: Weight
    vector: Weight
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.kernel.shape[:1]

    def read(self, region: Region) -> np.ndarray:
        (rows,) = region
        size, width, *taps = self.kernel.shape
        by_group = self.vector.numpy().reshape(self.groups, width)
        total = np.empty(rows.stop - rows.start)
        for block in _runs(rows.stop - rows.start, width * math.prod(taps)):
            part = slice(rows.start + block.start, rows.start + block.stop)
            kernel = self.kernel.read((part, *whole(self.kernel.shape[1:])))
            sums = kernel.reshape(*kernel.shape[:2], -1).sum(axis=2)
            total[block] = (sums * by_group[np.arange(part.start, part.stop) // (size // self.groups)]).sum(axis=1)
        return total


class MaterializedTensor(ir.LazyTensor):
    """The tensor of a weight: evaluated in float64, rounded once to `dtype`, nothing kept between reads.

    `tofile` streams it by blocks of rows.
    """

    def __init__(self, weight: Weight, dtype: ir.DataType, name: str | None = None) -> None:
        super().__init__(lambda: ir.Tensor(self.numpy(), dtype=dtype), dtype, ir.Shape(weight.shape), name=name)
        self.weight = weight

    def rounded(self, region: Region) -> np.ndarray:
        """`region` in the storage dtype; a stored tensor is passed through bit for bit."""
        return self.weight.read(region).astype(self.dtype.numpy())

    def numpy(self) -> np.ndarray:
        shape = tuple(self.shape.numpy())
        result = np.empty(shape, self.dtype.numpy())
        for region in cut_blocks(shape, self.weight.mixed):
            result[region] = self.rounded(region)
        return result

    def tobytes(self) -> bytes:
        return self.numpy().tobytes()

    def tofile(self, file) -> None:
        if 0 in self.weight.mixed:
            # What mixes rows is evaluated by columns, which no file takes in order.
            file.write(np.ascontiguousarray(self.numpy()).data)
            return
        for region in row_blocks(tuple(self.shape.numpy())):
            file.write(np.ascontiguousarray(self.rounded(region)).tobytes())


class ConvertedTensor(MaterializedTensor):
    """A stored tensor in another type. The rounded numbers are the tensor: a pass starts from them, not its source.

    A capture as float16 is a float16 network. What it would have been unrounded is another function.
    """


def weight_of(tensor: ir.TensorProtocol) -> Weight:
    """The expression behind a tensor: its own if it is a folded one, else the tensor as it is stored or converted."""
    if isinstance(tensor, MaterializedTensor) and not isinstance(tensor, ConvertedTensor):
        return tensor.weight
    return Source(tensor)
