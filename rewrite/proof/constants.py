"""Constants of either graph: where they are stored, how they were laid out, and what they are in float64.

A constant is never loaded whole unless it is small: `read` takes a region. Only layout changes (transpose, reshape,
slice, join) are kept symbolic, because they say which entry of which stored tensor is meant; arithmetic on small
constants is done at once in float64.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

Region = tuple[slice, ...]
BLOCK_ELEMENTS = 1 << 20


def blocks(shape: Sequence[int], elements: int = BLOCK_ELEMENTS) -> Iterator[Region]:
    """Regions that cover `shape` by leading rows, each of at most `elements` elements or one row."""
    if not shape:
        yield ()
        return
    rows = max(1, elements // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *(slice(0, n) for n in shape[1:]))


class Constant(ABC):
    """Real or integer numbers of a static `shape`. Equal `key`s are equal constants; the converse needs work."""

    shape: tuple[int, ...]

    roundings: int = 0
    """How often an entry was rounded in float64 when it was computed; 0 for stored numbers."""

    @property
    @abstractmethod
    def key(self) -> tuple[Any, ...]: ...

    @property
    @abstractmethod
    def stored(self) -> Stored | None:
        """The stored tensor whose entries these are, if they are entries of one."""

    @abstractmethod
    def raw(self, region: Region) -> np.ndarray:
        """`region` in the storage dtype."""

    def read(self, region: Region) -> np.ndarray:
        """`region` widened exactly to float64 (integers and booleans stay as they are)."""
        values = self.raw(region)
        return values if values.dtype.kind in "biu" else values.astype(np.float64)

    def ulp(self, region: Region) -> np.ndarray:
        """One unit in the last place of the storage dtype at each entry of `region`, in float64."""
        return spacing(self.raw(region))

    @property
    def plain(self) -> bool:
        """Whether an entry's ulp is that of its own number."""
        return True

    def whole(self) -> np.ndarray:
        return self.read(tuple(slice(0, n) for n in self.shape))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        """'f' for real numbers, 'i' for integers, 'b' for booleans."""
        return self.type if self.type in ("f", "b") else "i"

    @cached_property
    def type(self) -> str:
        """'f' for real numbers of any precision, else the storage type's name: integers of two types differ."""
        dtype = self.raw(tuple(slice(0, min(n, 1)) for n in self.shape)).dtype
        if dtype.kind in "OUSc":
            raise ValueError(f"constants of type {dtype} are not numbers")
        name = dtype.name
        return "b" if dtype.kind == "b" else name if name.startswith(("int", "uint")) else "f"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the shape and the values, widened: equal digests are equal constants whatever their dtype."""
        digest = hashlib.sha256(repr((self.shape, self.type)).encode())
        for region in blocks(self.shape):
            values = self.read(region)
            digest.update(np.ascontiguousarray(values if self.kind == "f" else values.astype(np.int64)).tobytes())
        return digest.hexdigest()


def spacing(values: np.ndarray) -> np.ndarray:
    """One ulp of `values`' own dtype at each of them, in float64; subnormals have the smallest normal exponent's."""
    if values.dtype == ml_dtypes.bfloat16:
        widened = np.abs(values.astype(np.float64))
        exponent = np.floor(np.log2(np.maximum(widened, 2.0**-126)))
        return np.exp2(exponent - 7)
    if values.dtype.kind != "f":
        raise ValueError(f"ulps of {values.dtype} are not known")
    return np.spacing(np.abs(values)).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Stored(Constant):
    """A tensor of a model file. `side` is 'original' or 'rewritten'; `name` is the initializer's."""

    side: str
    name: str
    tensor: ir.TensorProtocol

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.tensor.shape.numpy())

    @property
    def key(self) -> tuple[Any, ...]:
        return ("stored", self.side, self.name)

    @property
    def stored(self) -> Stored | None:
        return self

    @property
    def kind(self) -> str:
        dtype = self.tensor.dtype
        return "f" if dtype.is_floating_point() else "b" if dtype == ir.DataType.BOOL else "i"

    @cached_property
    def type(self) -> str:  # type: ignore[override]
        if self.tensor.dtype in (ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
            raise ValueError(f"constants of type {self.tensor.dtype.name} are not real numbers")
        return self.kind if self.kind in ("f", "b") else self.tensor.dtype.name.lower()

    def raw(self, region: Region) -> np.ndarray:
        tensor = self.tensor
        if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8 and self.size:
            # Mapped anew each time: pages of a mapping that is kept stay resident.
            mapped = np.memmap(tensor.path, tensor.dtype.numpy(), mode="r", offset=tensor.offset or 0, shape=self.shape)
            return np.array(mapped[region])
        # A lazily evaluated tensor that can give a region does so; one that cannot is evaluated whole.
        rounded = getattr(tensor, "rounded", None)
        return rounded(region) if rounded is not None else tensor.numpy()[region]

    @property
    def location(self) -> tuple[Any, ...]:
        """Where the bytes are: equal locations are equal bytes."""
        tensor = self.tensor
        if isinstance(tensor, ir.ExternalTensor):
            return (str(tensor.path), tensor.offset, tensor.dtype, self.shape)
        return (id(tensor),)


@dataclass(frozen=True, eq=False)
class Array(Constant):
    """A small constant that arithmetic made; no stored tensor can be adjusted for it."""

    values: np.ndarray
    roundings: int = 0

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.values.shape

    @property
    def key(self) -> tuple[Any, ...]:
        return ("array", self.digest)

    @property
    def stored(self) -> Stored | None:
        return None

    def raw(self, region: Region) -> np.ndarray:
        return self.values[region]


@dataclass(frozen=True, eq=False)
class Arranged(Constant):
    """What the entries of `inner` are made into: they stay its own, unless a subclass says otherwise."""

    inner: Constant

    @property
    def stored(self) -> Stored | None:
        return self.inner.stored

    @property
    def kind(self) -> str:
        return self.inner.kind

    @property
    def plain(self) -> bool:
        return self.inner.plain

    @property
    def roundings(self) -> int:  # type: ignore[override]
        return self.inner.roundings


@dataclass(frozen=True, eq=False)
class Permuted(Arranged):
    permutation: tuple[int, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.inner.shape[axis] for axis in self.permutation)

    @property
    def key(self) -> tuple[Any, ...]:
        return ("permuted", self.permutation, self.inner.key)

    def raw(self, region: Region) -> np.ndarray:
        return self.inner.raw(self._within(region)).transpose(self.permutation)

    def ulp(self, region: Region) -> np.ndarray:
        return self.inner.ulp(self._within(region)).transpose(self.permutation)

    def _within(self, region: Region) -> Region:
        inner = [slice(0, 0)] * len(region)
        for taken, axis in zip(region, self.permutation):
            inner[axis] = taken
        return tuple(inner)


@dataclass(frozen=True, eq=False)
class Reshaped(Arranged):
    shape: tuple[int, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return ("reshaped", self.shape, self.inner.key)

    def raw(self, region: Region) -> np.ndarray:
        return self._regrouped(region, self.inner.raw)

    def ulp(self, region: Region) -> np.ndarray:
        return self._regrouped(region, self.inner.ulp)

    def _regrouped(self, region: Region, read: Callable[[Region], np.ndarray]) -> np.ndarray:
        inner = self.inner.shape
        # Rows of the result are whole rows of the inner constant when only trailing axes are regrouped.
        if inner and self.shape and inner[0] == self.shape[0]:
            rows = read((region[0], *(slice(0, n) for n in inner[1:])))
            return rows.reshape(-1, *self.shape[1:])[(slice(None), *region[1:])]
        return read(tuple(slice(0, n) for n in inner)).reshape(self.shape)[region]


@dataclass(frozen=True, eq=False)
class Sliced(Arranged):
    region: Region

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(taken.stop - taken.start for taken in self.region)

    @property
    def key(self) -> tuple[Any, ...]:
        return ("sliced", tuple((s.start, s.stop) for s in self.region), self.inner.key)

    def raw(self, region: Region) -> np.ndarray:
        return self.inner.raw(self._within(region))

    def ulp(self, region: Region) -> np.ndarray:
        return self.inner.ulp(self._within(region))

    def _within(self, region: Region) -> Region:
        return tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(self.region, region))


@dataclass(frozen=True, eq=False)
class Reciprocal(Arranged):
    """1/c for a constant c without zeros. An ulp u of c is worth 1/c − 1/(c + u) here."""

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.shape

    @property
    def key(self) -> tuple[Any, ...]:
        return ("reciprocal", self.inner.key)

    @property
    def plain(self) -> bool:
        return False

    @property
    def roundings(self) -> int:  # type: ignore[override]
        return self.inner.roundings + 1

    def raw(self, region: Region) -> np.ndarray:
        return 1.0 / self.inner.read(region)

    def ulp(self, region: Region) -> np.ndarray:
        own, ulp = np.abs(self.inner.read(region)), self.inner.ulp(region)
        return ulp / (own * (own + ulp))


@dataclass(frozen=True, eq=False)
class Expanded(Arranged):
    """A constant repeated along axes of size 1; no entry of it can be adjusted by itself."""

    shape: tuple[int, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return ("expanded", self.shape, self.inner.key)

    @property
    def stored(self) -> Stored | None:
        return None

    def raw(self, region: Region) -> np.ndarray:
        sizes, behind = self.inner.shape, region[len(region) - len(self.inner.shape) :]
        inner = self.inner.raw(tuple(slice(0, 1) if n == 1 else taken for n, taken in zip(sizes, behind)))
        return np.broadcast_to(inner, [taken.stop - taken.start for taken in region])


@dataclass(frozen=True, eq=False)
class Joined(Constant):
    """Constants joined along `axis`; entries of several stored tensors, so none can be adjusted for it."""

    parts: tuple[Constant, ...]
    axis: int

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def key(self) -> tuple[Any, ...]:
        return ("joined", self.axis, *(part.key for part in self.parts))

    @property
    def stored(self) -> Stored | None:
        return None

    @property
    def kind(self) -> str:
        return self.parts[0].kind

    @property
    def roundings(self) -> int:  # type: ignore[override]
        return max(part.roundings for part in self.parts)

    def raw(self, region: Region) -> np.ndarray:
        pieces, offset, taken = [], 0, region[self.axis]
        for part in self.parts:
            size = part.shape[self.axis]
            start, stop = max(taken.start - offset, 0), min(taken.stop - offset, size)
            if start < stop:
                pieces.append(part.raw((*region[: self.axis], slice(start, stop), *region[self.axis + 1 :])))
            offset += size
        return np.concatenate(pieces, axis=self.axis)


@dataclass(frozen=True, eq=False)
class Grouped(Arranged):
    """The block-diagonal matrix (groups·k, out) of a grouped convolution, of its kernel's rows `inner` (out, k)."""

    groups: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.groups * self.inner.shape[1], self.inner.shape[0])

    @property
    def key(self) -> tuple[Any, ...]:
        return ("grouped", self.groups, self.inner.key)

    @property
    def plain(self) -> bool:
        return False

    def ulp(self, region: Region) -> np.ndarray:
        """Outside the blocks there is nothing to be adjusted."""
        return np.where(self._in_blocks(region), self._blocks(region, self.inner.ulp), 0.0)

    def _in_blocks(self, region: Region) -> np.ndarray:
        width, height = self.inner.shape[1], self.inner.shape[0] // self.groups
        rows, columns = (np.arange(taken.start, taken.stop) // n for taken, n in zip(region, (width, height)))
        return rows[:, None] == columns[None, :]

    def raw(self, region: Region) -> np.ndarray:
        return self._blocks(region, self.inner.raw)

    def _blocks(self, region: Region, read: Callable[[Region], np.ndarray]) -> np.ndarray:
        rows, columns = region
        width, height = self.inner.shape[1], self.inner.shape[0] // self.groups
        result: np.ndarray | None = None
        for group in range(rows.start // width, -(-rows.stop // width)):
            top, bottom = max(rows.start, group * width), min(rows.stop, (group + 1) * width)
            left, right = max(columns.start, group * height), min(columns.stop, (group + 1) * height)
            block = read((slice(left, max(left, right)), slice(top - group * width, bottom - group * width)))
            if result is None:
                result = np.zeros((rows.stop - rows.start, columns.stop - columns.start), block.dtype)
            if left < right:
                within = slice(left - columns.start, right - columns.start)
                result[top - rows.start : bottom - rows.start, within] = block.T
        return np.zeros((0, columns.stop - columns.start)) if result is None else result


def sources(constant: Constant) -> Iterator[Stored]:
    """Every stored tensor whose entries occur in `constant`."""
    if isinstance(constant, Stored):
        yield constant
    elif isinstance(constant, Joined):
        for part in constant.parts:
            yield from sources(part)
    elif isinstance(constant, Arranged):
        yield from sources(constant.inner)


def permuted(constant: Constant, permutation: tuple[int, ...]) -> Constant:
    if permutation == tuple(range(len(permutation))):
        return constant
    if isinstance(constant, Permuted):
        return permuted(constant.inner, tuple(constant.permutation[axis] for axis in permutation))
    if isinstance(constant, Reciprocal):
        return Reciprocal(permuted(constant.inner, permutation))
    return Permuted(constant, permutation)


def reshaped(constant: Constant, shape: tuple[int, ...]) -> Constant:
    if shape == constant.shape:
        return constant
    if isinstance(constant, Reshaped):
        return reshaped(constant.inner, shape)
    if isinstance(constant, Reciprocal):
        return Reciprocal(reshaped(constant.inner, shape))
    return Reshaped(constant, shape)


def sliced(constant: Constant, region: Region) -> Constant:
    if all(s.start == 0 and s.stop == n for s, n in zip(region, constant.shape)):
        return constant
    if isinstance(constant, Reciprocal):
        return Reciprocal(sliced(constant.inner, region))
    if isinstance(constant, Permuted):
        inner = [slice(0, 0)] * len(region)
        for taken, axis in zip(region, constant.permutation):
            inner[axis] = taken
        return permuted(sliced(constant.inner, tuple(inner)), constant.permutation)
    if isinstance(constant, Reshaped) and _long(constant.shape) == _long(constant.inner.shape):
        # Only axes of size 1 come and go: the slice is one of the inner constant, where two slices can be compared.
        longs = iter(taken for taken, n in zip(region, constant.shape) if n != 1)
        inner = [next(longs) if n != 1 else slice(0, 1) for n in constant.inner.shape]
        if all(taken == slice(0, 1) for taken, n in zip(region, constant.shape) if n == 1):
            return reshaped(sliced(constant.inner, tuple(inner)), tuple(s.stop - s.start for s in region))
    if isinstance(constant, Sliced):
        outer = constant.region
        return Sliced(constant.inner, tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(outer, region)))
    return Sliced(constant, region)


def _long(shape: tuple[int, ...]) -> list[int]:
    return [n for n in shape if n != 1]


def same_values(a: Constant, b: Constant) -> bool:
    """Whether two constants are the same real numbers, entry by entry; stops at the first block that differs."""
    if a.shape != b.shape:
        return False
    if a.key == b.key:
        return True
    if isinstance(a, Stored) and isinstance(b, Stored) and a.location == b.location:
        return True
    if a.size > BLOCK_ELEMENTS:
        first = (*(slice(0, 1) for _ in a.shape[:-1]), slice(0, a.shape[-1]))
        if not np.array_equal(a.read(first), b.read(first)):
            return False
    for region in blocks(a.shape):
        x, y = a.raw(region), b.raw(region)
        if not np.array_equal(*((x, y) if x.dtype == y.dtype else (a.read(region), b.read(region)))):
            return False
    return True
