"""Places where a network computes with codes: what they stand for, and how far they are from it.

    weight site       Ŵ  ≈  W_q = (q − z)·s           codes q, zero points z, scales s; Ŵ is solved from the original
    activation site   x  ≈  (u − z)·s,  u = x/s + z   rounded and clipped to the type; erased: x itself

A *step* is what one code is worth: the scale of the entry, of a floating-point format the distance to its neighbour
times the scale. `relation.py` says what is claimed of sites. Codes are read by regions and never held whole.

Source: ONNX, DequantizeLinear-25, QuantizeLinear-25; ONNX Runtime, docs/ContribOperators.md, MatMulNBits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from rewrite.proof.constants import (
    Arranged,
    Array,
    Constant,
    Joined,
    Permuted,
    Reciprocal,
    Region,
    Reshaped,
    Stored,
    blocks,
    spacing,
)

SATURATES = "possible without VNNI"
"""That two products of neighbours may leave the 16 bits in which processors without VNNI add them."""


@dataclass(frozen=True)
class Site:
    """A declared approximation of the rewritten network.

    `name` is the tensor of codes, or the value that is rounded; `node` reads or rounds it. `scale` is one number, or
    the smallest and the largest magnitude of several; None where it is taken from each input as it comes. Of a weight,
    `error_steps` is the largest distance from Ŵ in steps, and `error_relative` is ‖W_q − Ŵ‖_F/‖Ŵ‖_F over all entries
    that are used. `saturation` is "none" where the kernel's sums are exact on every processor.
    """

    name: str
    kind: Literal["weight", "activation"]
    node: str
    format: str
    scale: float | tuple[float, float] | None
    error_steps: float | None = None
    error_relative: float | None = None
    saturation: str = "none"
    slack: tuple[float, float] = field(default=(0.0, 0.0), compare=False)
    """What float64 may have lost of both errors; not part of what is declared."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "node": self.node,
            "format": self.format,
            "scale": list(self.scale) if isinstance(self.scale, tuple) else self.scale,
            "error_steps": self.error_steps,
            "error_relative": self.error_relative,
            "saturation": self.saturation,
        }

    def disagreement(self, declared: Mapping[str, Any]) -> str | None:
        """What a certificate says of this site and is not so; None where all is. Errors agree to what float64 holds."""
        for part, mine in self.to_json().items():
            said = declared.get(part)
            if part in ("error_steps", "error_relative") and mine is not None:
                # Two runs may sum in another order: each is off by at most the slack.
                room = 2 * self.slack[part == "error_relative"]
                if isinstance(said, int | float) and abs(said - mine) <= room:
                    continue
            elif said == mine:
                continue
            return f"{self.name}: the {part} is {_shown(mine)}, declared is {_shown(said)}"
        return None


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ── Codes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Grid(ABC):
    """Codes with their scales and zero points; all three are read by regions of `shape`."""

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def key(self) -> tuple[Any, ...]: ...

    @property
    @abstractmethod
    def text(self) -> str:
        """The format in words."""

    @abstractmethod
    def codes(self, region: Region) -> np.ndarray:
        """As float64, which holds every code exactly."""

    @abstractmethod
    def scales(self, region: Region) -> np.ndarray:
        """Broadcasts to the region."""

    @abstractmethod
    def zeros(self, region: Region) -> np.ndarray:
        """Broadcasts to the region."""

    @property
    @abstractmethod
    def parameters(self) -> tuple[Constant, ...]:
        """Scales and zero points: they are as they were shipped."""

    def values(self, region: Region) -> np.ndarray:
        return (self.codes(region) - self.zeros(region)) * self.scales(region)

    def steps(self, region: Region) -> np.ndarray:
        sizes = tuple(taken.stop - taken.start for taken in region)
        return np.broadcast_to(np.abs(self.scales(region)), sizes)

    @cached_property
    def scale(self) -> float | tuple[float, float]:
        """The smallest and the largest magnitude of a scale; one number where they are equal."""
        constant, low, high = self.parameters[0], math.inf, 0.0
        for region in blocks(constant.shape):
            found = np.abs(constant.read(region))
            low, high = min(low, float(found.min(initial=math.inf))), max(high, float(found.max(initial=0.0)))
        return low if low == high else (low, high)


@dataclass(frozen=True, eq=False)
class Linear(Grid):
    """DequantizeLinear: one scale, or one for each entry of `axis`, or for each `block` of them."""

    stored: Constant
    scaling: Constant
    zero: Constant | None = None
    axis: int | None = None
    block: int = 0

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.stored.shape

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        zero = None if self.zero is None else self.zero.key
        return ("linear", self.stored.key, self.scaling.key, zero, self.axis, self.block)

    @property
    def text(self) -> str:
        place = "per tensor" if self.axis is None else f"per entry of axis {self.axis}"
        if self.block:
            place = f"per block of {self.block} along axis {self.axis}"
        return f"{type_name(self.stored)} {place}{_zero_text(self.zero)}"

    @property
    def parameters(self) -> tuple[Constant, ...]:
        return (self.scaling,) if self.zero is None else (self.scaling, self.zero)

    def codes(self, region: Region) -> np.ndarray:
        return _widened(packed(self.stored, region))

    def scales(self, region: Region) -> np.ndarray:
        return self._spread(self.scaling, region)

    def zeros(self, region: Region) -> np.ndarray:
        return np.zeros(()) if self.zero is None else self._spread(self.zero, region)

    def steps(self, region: Region) -> np.ndarray:
        steps = super().steps(region)
        dtype = self.stored.raw(tuple(slice(0, min(n, 1)) for n in self.shape)).dtype
        return steps if dtype.name.startswith(("int", "uint")) else steps * neighbours(self.codes(region), dtype)

    def _spread(self, constant: Constant, region: Region) -> np.ndarray:
        if self.axis is None:
            return _widened(constant.whole()).reshape(())
        taken = region[self.axis]
        if not self.block:
            along = [1] * len(region)
            along[self.axis] = taken.stop - taken.start
            return _widened(packed(constant, (taken,))).reshape(along)
        first = taken.start // self.block
        inner = list(region)
        inner[self.axis] = slice(first, -(-taken.stop // self.block))
        wide = np.repeat(_widened(packed(constant, tuple(inner))), self.block, axis=self.axis)
        cut = [slice(None)] * len(region)
        cut[self.axis] = slice(taken.start - first * self.block, taken.stop - first * self.block)
        return wide[tuple(cut)]


@dataclass(frozen=True, eq=False)
class Packed(Grid):
    """MatMulNBits: a matrix (N, K) in bytes (N, K/block, block·bits/8), low bits first, a scale for every block."""

    stored: Constant
    scaling: Constant
    zero: Constant | None
    shape: tuple[int, int]  # type: ignore[assignment]
    bits: int
    block: int

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.block)

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        zero = None if self.zero is None else self.zero.key
        return ("packed", self.stored.key, self.scaling.key, zero, self.shape, self.bits, self.block)

    @property
    def text(self) -> str:
        return f"uint{self.bits} per block of {self.block} along K, {'no ' * (self.zero is None)}zero points"

    @property
    def parameters(self) -> tuple[Constant, ...]:
        return (self.scaling,) if self.zero is None else (self.scaling, self.zero)

    def codes(self, region: Region) -> np.ndarray:
        rows, columns = region
        first, last = columns.start // self.block, -(-columns.stop // self.block)
        blob = self.block * self.bits // 8
        stored = self.stored.raw((rows, slice(first, last), slice(0, blob)))
        codes = unpacked(stored, self.bits).reshape(len(stored), -1)
        return codes[:, columns.start - first * self.block : columns.stop - first * self.block].astype(np.float64)

    def scales(self, region: Region) -> np.ndarray:
        return self._repeated(self.scaling.read, region)

    def zeros(self, region: Region) -> np.ndarray:
        zero = self.zero
        if zero is None:
            return np.full((), float(1 << (self.bits - 1)))
        if zero.kind == "f":
            return self._repeated(zero.read, region)
        width = -(-self.groups * self.bits // 8)

        def read(taken: Region) -> np.ndarray:
            points = unpacked(zero.raw((taken[0], slice(0, width))), self.bits)
            return points[:, taken[1]].astype(np.float64)

        return self._repeated(read, region)

    def _repeated(self, read: Any, region: Region) -> np.ndarray:
        rows, columns = region
        first, last = columns.start // self.block, -(-columns.stop // self.block)
        wide = np.repeat(read((rows, slice(first, last))), self.block, axis=1)
        return wide[:, columns.start - first * self.block : columns.stop - first * self.block]


def unpacked(stored: np.ndarray, bits: int) -> np.ndarray:
    """Codes of bytes along the last axis, the low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (stored[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*stored.shape[:-1], -1)


def packed(constant: Constant, region: Region) -> np.ndarray:
    """`region` of a constant whose entries may be of fewer than eight bits, of which a file is read in part only."""
    tensor = constant.tensor if isinstance(constant, Stored) else None
    bits = 8 if tensor is None else tensor.dtype.bitwidth
    if not isinstance(tensor, ir.ExternalTensor) or bits not in (2, 4) or not region:
        return constant.raw(region)
    row = math.prod(constant.shape[1:])
    first, last = region[0].start * row * bits // 8, -(-region[0].stop * row * bits // 8)
    mapped = np.memmap(tensor.path, np.uint8, mode="r", offset=(tensor.offset or 0) + first, shape=(last - first,))
    codes = unpacked(np.array(mapped), bits)
    start = region[0].start * row - first * 8 // bits
    codes = codes[start : start + (region[0].stop - region[0].start) * row].view(np.int8)
    if tensor.dtype.name.startswith("INT"):
        codes = np.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
    codes = codes.astype(tensor.dtype.numpy()) if tensor.dtype.name.startswith("FLOAT") else codes
    return codes.reshape(-1, *constant.shape[1:])[(slice(None), *region[1:])]


def _widened(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


def type_name(constant: Constant) -> str:
    """The storage type of a constant's entries."""
    stored = constant.stored
    if stored is not None and not isinstance(constant, Rounded):
        return stored.tensor.dtype.name.lower()
    return constant.raw(tuple(slice(0, min(n, 1)) for n in constant.shape)).dtype.name


def _zero_text(zero: Constant | None) -> str:
    if zero is None:
        return ""
    low, high = math.inf, -math.inf
    for region in blocks(zero.shape):
        found = _widened(packed(zero, region))
        low, high = min(low, float(found.min(initial=math.inf))), max(high, float(found.max(initial=-math.inf)))
    if low == high:
        return f", zero point {low:g}" if low else ""
    return f", zero points {low:g} to {high:g}"


def neighbours(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The distance of numbers of a floating-point type of few bits to the next larger one of the same exponent."""
    form = ml_dtypes.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(values), float(form.smallest_normal))))
    return np.exp2(exponent - form.nmant)


@dataclass(frozen=True, eq=False)
class Rounded(Arranged):
    """The codes that QuantizeLinear makes of a constant, per tensor or per entry of an axis, saturated."""

    grid: Linear
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.shape

    @property
    def key(self) -> tuple[Any, ...]:
        return ("rounded", self.dtype.name, self.grid.key, self.inner.key)

    @property
    def kind(self) -> str:
        return "i"

    def raw(self, region: Region) -> np.ndarray:
        limits = np.iinfo(self.dtype)
        # The operator divides in the type of the scale and rounds halves to even.
        type_ = self.grid.scaling.raw(tuple(slice(0, min(n, 1)) for n in self.grid.scaling.shape)).dtype
        divided = (self.inner.read(region).astype(type_) / self.grid.scales(region).astype(type_)).astype(np.float64)
        return np.clip(np.rint(divided) + self.grid.zeros(region), limits.min, limits.max).astype(self.dtype)


# ── What codes are as a constant ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Dequantized(Stored):
    """The numbers that codes stand for, exactly. What may be adjusted of an entry is a number of steps, not an ulp."""

    grid: Grid

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.grid.shape

    @property
    def key(self) -> tuple[Any, ...]:
        return ("stored", self.side, self.name, self.grid.key)

    @property
    def kind(self) -> str:
        return "f"

    @property
    def type(self) -> str:  # type: ignore[override]
        return "f"

    @property
    def plain(self) -> bool:
        return False

    @property
    def location(self) -> tuple[Any, ...]:
        return (self.side, self.name, self.grid.key)

    def raw(self, region: Region) -> np.ndarray:
        return self.grid.values(region)

    def ulp(self, region: Region) -> np.ndarray:
        return self.grid.steps(region)


@dataclass(frozen=True, eq=False)
class _Positions(Constant):
    """The place of every entry among all, in row-major order, from 1: a layout puts zeros where it has no entry."""

    shape: tuple[int, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return ("positions", self.shape)

    @property
    def stored(self) -> Stored | None:
        return None

    def raw(self, region: Region) -> np.ndarray:
        places = np.arange(1, 1 + math.prod(self.shape)).reshape(self.shape)
        return places[region]


def _is_whole(constant: Constant) -> bool:
    """Whether every stored number is an entry exactly once, as far as the layouts say."""
    while isinstance(constant, Permuted | Reshaped | Reciprocal):
        constant = constant.inner
    return isinstance(constant, Stored)


def _laid_out(constant: Constant, like: Dequantized) -> Constant:
    """Where the entries of `constant`, a layout of `like`, stand in that; 0 for those that are none of its."""
    if constant is like or isinstance(constant, Stored):
        return _Positions(constant.shape)
    assert isinstance(constant, Arranged)
    if isinstance(constant, Reciprocal):
        return _laid_out(constant.inner, like)
    from dataclasses import replace

    return replace(constant, inner=_laid_out(constant.inner, like))


# ── Errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Measure:
    """How far some entries of a dequantized constant are from what the original asks of them.

    `steps` is the largest distance, `error` and `total` the sums of squares of W_q − Ŵ and Ŵ; what float64 may have
    lost is `slack`, in steps, and `lost`, of the root of `error`. `ulps` is how far a constant is off that is stored as
    numbers and stands where the codes have no part.
    """

    constant: Constant
    steps: float = 0.0
    error: float = 0.0
    total: float = 0.0
    slack: float = 0.0
    lost: float = 0.0
    ulps: float = 0.0

    def __add__(self, other: Measure) -> Measure:
        return Measure(
            self.constant,
            max(self.steps, other.steps),
            self.error + other.error,
            self.total + other.total,
            max(self.slack, other.slack),
            math.hypot(self.lost, other.lost),
            max(self.ulps, other.ulps),
        )

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.total) if self.total else 0.0


def combined(site: Dequantized, parts: list[Measure]) -> Measure | None:
    """The error of a whole constant, by those of its parts; None where parts overlap without one holding the other."""
    parts = sorted(parts, key=lambda each: -each.constant.size)
    total = Measure(site)
    if not parts or _is_whole(parts[0].constant):
        return total + parts[0] if parts else total
    seen = np.zeros(site.size, bool)
    for part in parts:
        places = _laid_out(part.constant, site).whole().reshape(-1)
        places = places[places > 0] - 1
        known = int(np.count_nonzero(seen[places]))
        if known == len(places):
            continue
        if known:
            return None
        seen[places] = True
        total = total + part
    return total


def as_site(site: Dequantized, node: str, measure: Measure | None, saturation: str = "none") -> Site:
    """A weight site with its errors, where these are known. A sum of n squares in any order is off by n·2⁻⁵³."""
    if measure is None:
        return Site(site.name, "weight", node, site.grid.text, site.grid.scale, saturation=saturation)
    relative = measure.relative
    unit = site.size * 2.0**-53
    lost = (measure.lost / math.sqrt(measure.total) if measure.total else 0.0) + 2 * unit * relative
    slack = measure.slack + 4 * 2.0**-53 * measure.steps
    return Site(
        site.name, "weight", node, site.grid.text, site.grid.scale, measure.steps, relative, saturation, (slack, lost)
    )


__all__ = [
    "SATURATES",
    "Array",
    "Dequantized",
    "Grid",
    "Joined",
    "Linear",
    "Measure",
    "Packed",
    "Rounded",
    "Site",
    "as_site",
    "combined",
    "packed",
    "spacing",
    "unpacked",
]
