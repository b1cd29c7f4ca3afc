"""What the walk keeps for a value: a constant, integers made of sizes, or a form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rewrite.proof.constants import Array, Constant
from rewrite.proof.dimensions import Dim
from rewrite.proof.forms import Form

if TYPE_CHECKING:
    from rewrite.proof.walk import Walk


@dataclass(frozen=True)
class Integers:
    """A small integer tensor whose entries are polynomials in symbolic sizes: shape arithmetic."""

    shape: tuple[int, ...]
    entries: tuple[Dim, ...]

    @staticmethod
    def vector(entries: tuple[Dim, ...]) -> Integers:
        return Integers((len(entries),), entries)

    @property
    def key(self) -> tuple[object, ...]:
        return ("integers", self.shape, self.entries)

    def array(self) -> np.ndarray:
        """The entries as an object array of `shape`."""
        result = np.empty(len(self.entries), dtype=object)
        result[:] = self.entries
        return result.reshape(self.shape)

    @staticmethod
    def of(array: np.ndarray) -> Value:
        """Integers, or a constant where no entry holds a symbol."""
        entries = tuple(array.reshape(-1))
        if all(entry.constant is not None for entry in entries):
            return Array(np.array([entry.constant for entry in entries], np.int64).reshape(array.shape))
        return Integers(tuple(array.shape), entries)

    def gathered(self, indices: Value | None, axis: int) -> Value | None:
        if not isinstance(indices, Constant):
            return None
        return Integers.of(np.asarray(np.take(self.array(), indices.whole().astype(np.int64), axis=axis), dtype=object))


@dataclass(frozen=True, eq=False)
class Coded(ABC):
    """What is known of integers that a quantized network computes with, or of their scale (`quantization.py`)."""

    @abstractmethod
    def plain(self, walk: Walk) -> Form:
        """The value as that of any operator."""


Value = Constant | Integers | Form | Coded


def sizes(value: Value | None) -> tuple[Dim, ...] | None:
    """The entries of a one-dimensional integer value."""
    if isinstance(value, Integers):
        return value.entries
    if isinstance(value, Constant) and value.kind == "i":
        return tuple(Dim.of(int(entry)) for entry in value.whole().reshape(-1))
    return None


def as_integers(value: Value | None) -> Integers | None:
    """A small integer constant, or integers, as integers."""
    if isinstance(value, Integers):
        return value
    if isinstance(value, Constant) and value.kind == "i" and value.size <= 1024:
        return Integers(value.shape, tuple(Dim.of(int(entry)) for entry in value.whole().reshape(-1)))
    return None
