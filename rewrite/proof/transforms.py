"""Changes of basis as exact objects: what T is over the reals, how it is applied in float64, and how well.

A transform acts on row vectors from the right, x ↦ x·T, along one axis. It is not a stored weight that may be off by an
ulp: it is the exact map that a proof speaks of. `Hadamard` is ±1/√n with a real square root; `Scaling` is the float64
numbers it holds; `Orthogonal` is the orthogonal matrix nearest to the one it holds.

    writers   W ↦ W·T          apply(W, axis of the channels written)
    readers   W ↦ T⁻¹·W        dual.apply(W, axis of the channels read)      the dual is T⁻ᵀ

Every transform says how its float64 evaluation may be off: |fl(x·T) − x·T| ≤ roundings · 2⁻⁵³ · absolute(|x|).
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from rewrite.proof.hadamard import hadamard, parts, signs

Reader = Callable[[str], np.ndarray]
"""A tensor of a certificate by its name."""


class Transform(ABC):
    """x ↦ x·T from `size` channels to `width`."""

    kind: ClassVar[str]
    size: int

    @property
    def width(self) -> int:
        return self.size

    @property
    @abstractmethod
    def key(self) -> tuple[Any, ...]:
        """Equal keys are equal transforms."""

    @abstractmethod
    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        """x·T along `axis`, in float64."""

    @property
    @abstractmethod
    def dual(self) -> Transform:
        """T⁻ᵀ: what rows of a matrix that reads x·T are transformed by. For an isometry that of its left inverse."""

    @property
    @abstractmethod
    def inverse(self) -> Transform:
        """T⁻¹ where T has one. Raises ValueError for an isometry and a selection."""

    @abstractmethod
    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        """A bound on x·|T| for x ≥ 0, of a shape that broadcasts to that of x·T."""

    def terms(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        """x·|T| for x ≥ 0, or less: what is summed, without what bounds its rounding."""
        return self.absolute(x, axis)

    def terms_left(self, x: np.ndarray) -> np.ndarray:
        """|T|·x for x ≥ 0, or less."""
        return self.absolute_left(x)

    @property
    def summed(self) -> int:
        """How many terms a channel is the sum of, at most."""
        return self.size

    @property
    @abstractmethod
    def roundings(self) -> int:
        """How many units of 2⁻⁵³ of `absolute(|x|)` an evaluation may be off."""

    orthogonal: ClassVar[bool] = False
    """T·Tᵀ = I exactly."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What it is, in plain types; a float64 array stands there under the name of a tensor of `tensors`."""

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Float64 arrays that do not belong into JSON, by the names that `to_json` gives them."""
        return {}

    def matrix(self) -> np.ndarray:
        """T in float64, (size, width)."""
        return self.apply(np.eye(self.size))

    def from_left(self, x: np.ndarray) -> np.ndarray:
        """T·x for x (width, …), in float64."""
        return self.inverse.dual.apply(x, 0)

    def absolute_left(self, x: np.ndarray) -> np.ndarray:
        """A bound on |T|·x for x ≥ 0."""
        return self.inverse.dual.absolute(x, 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transform) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def along(axis: int, x: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`function` of rows (…, n) applied along `axis`."""
    return np.moveaxis(function(np.moveaxis(x, axis, -1)), -1, axis)


@dataclass(frozen=True, eq=False)
class Scaling(Transform):
    """diag(values), none of them 0: exactly these float64 numbers."""

    kind: ClassVar[str] = "diagonal"
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or not np.isfinite(self.values).all() or not self.values.all():
            raise ValueError("a diagonal needs a vector of finite numbers other than 0")

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(self.values)

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.kind, _digest(self.values))

    @property
    def positive(self) -> bool:
        return bool((self.values > 0).all())

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: rows * self.values)

    @cached_property
    def dual(self) -> Transform:  # type: ignore[override]
        return Reciprocal(self)

    @property
    def inverse(self) -> Transform:
        return self.dual

    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: rows * np.abs(self.values))

    @property
    def roundings(self) -> int:
        return 1

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "values": f"values.{_name(self.values)}"}

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return {f"values.{_name(self.values)}": self.values}


@dataclass(frozen=True, eq=False)
class Reciprocal(Transform):
    """diag(1/values): exact quotients, so that it undoes `Scaling(values)` without a rounding."""

    kind: ClassVar[str] = "reciprocal"
    scaling: Scaling

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.scaling.size

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.kind, *self.scaling.key)

    @property
    def positive(self) -> bool:
        return self.scaling.positive

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: rows / self.scaling.values)

    @property
    def dual(self) -> Transform:
        return self.scaling

    @property
    def inverse(self) -> Transform:
        return self.scaling

    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: rows / np.abs(self.scaling.values))

    @property
    def roundings(self) -> int:
        return 1

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "of": self.scaling.to_json()}

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return self.scaling.tensors


LARGEST_HADAMARD = 1 << 24


@dataclass(frozen=True, eq=False)
class Hadamard(Transform):
    """diag(σ)·S·scale with S a Hadamard matrix and σ random signs (none where `seed` is None).

    `scale` None is the real number 1/√n, which makes it orthogonal; else it is the number given (a power of two, for a
    transform that is computed online in any format without rounding it). S is the Kronecker product of two Hadamard
    matrices of orders `parts(size)`, so a product costs n·(a + b) and not n².
    """

    kind: ClassVar[str] = "hadamard"
    size: int
    seed: int | None = None
    scale: float | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.size <= LARGEST_HADAMARD or parts(self.size) is None:
            raise ValueError(f"no Hadamard matrix of order {self.size} is constructed here")
        _check_scale(self.scale)

    @property
    def orthogonal(self) -> bool:  # type: ignore[override]
        return self.scale is None

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.kind, self.size, self.seed, self.scale, self.transposed)

    @property
    def factor(self) -> float:
        return 1.0 / math.sqrt(self.size) if self.scale is None else self.scale

    @cached_property
    def signs(self) -> np.ndarray | None:
        return None if self.seed is None else signs(self.size, self.seed).astype(np.float64)

    @cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """A and B in float64, S = A ⊗ B."""
        found = parts(self.size) or (1, 1)
        a, b = (np.asarray(hadamard(order), np.float64) for order in found)
        return (a.T, b.T) if self.transposed else (a, b)

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, self._rows)

    def _rows(self, x: np.ndarray) -> np.ndarray:
        a, b = self.factors
        if self.signs is not None and not self.transposed:
            x = x * self.signs
        cut = np.ascontiguousarray(x).reshape(-1, len(a), len(b))
        mixed = np.matmul(a.T, np.matmul(cut, b)).reshape(x.shape) * self.factor
        return mixed * self.signs if self.signs is not None and self.transposed else mixed

    @property
    def dual(self) -> Transform:
        if self.scale is None:
            return self
        # T = c·diag(σ)·S: T⁻ᵀ = diag(σ)·S/(c·n).
        return Hadamard(self.size, self.seed, 1.0 / (self.scale * self.size), self.transposed)

    @property
    def inverse(self) -> Transform:
        scale = None if self.scale is None else 1.0 / (self.scale * self.size)
        return Hadamard(self.size, self.seed, scale, not self.transposed)

    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return x.sum(axis=axis, keepdims=True) * abs(self.factor)

    @property
    def roundings(self) -> int:
        # Two dot products, the real √n in float64, its quotient, and the product with it.
        return sum(len(part) for part in self.factors) + 4

    def to_json(self) -> dict[str, Any]:
        plain = {"kind": self.kind, "size": self.size, "seed": self.seed, "scale": self.scale}
        return {**plain, "transposed": self.transposed}


@dataclass(frozen=True, eq=False)
class Orthogonal(Transform):
    """The orthogonal matrix nearest to `values` (n, n): its polar factor, from which `values` may differ by rounding.

    Raises ValueError where ‖values·valuesᵀ − I‖ is more than rounding explains.
    """

    kind: ClassVar[str] = "orthogonal"
    values: np.ndarray
    fitted: bool = False
    """Whether it was found from rounded weights, and so is one of many that explain them."""

    orthogonal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        n = len(self.values)
        if self.values.shape != (n, n) or not np.isfinite(self.values).all():
            raise ValueError("an orthogonal matrix is square and finite")
        if not self.distance <= 1e-9:
            raise ValueError(f"the matrix is not orthogonal: ‖Q·Qᵀ − I‖ = {self.distance:.2g}")

    @cached_property
    def distance(self) -> float:
        """‖values − Q‖₂ is at most this: |σ − 1| ≤ |σ² − 1| for every singular value σ, and ‖·‖₂ ≤ ‖·‖_F."""
        gram = self.values @ self.values.T
        gram[np.diag_indices(len(gram))] -= 1.0
        n = len(gram)
        return float(np.linalg.norm(gram)) + n * n * 2.0**-53

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(self.values)

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.kind, _digest(self.values))

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: rows @ self.values)

    @property
    def dual(self) -> Transform:
        return self

    @cached_property
    def inverse(self) -> Transform:  # type: ignore[override]
        return Orthogonal(np.ascontiguousarray(self.values.T), self.fitted)

    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        # |x|·|Q| ≤ ‖x‖₂ by Cauchy and Schwarz, since Q's columns have length 1.
        return np.sqrt((x * x).sum(axis=axis, keepdims=True)) * (1 + 2.0**-20)

    def terms(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: rows @ np.abs(self.values))

    def terms_left(self, x: np.ndarray) -> np.ndarray:
        return self.inverse.dual.terms(x, 0)

    @property
    def roundings(self) -> int:
        return self.size + 1 + math.ceil(self.distance * 2.0**53)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "values": f"values.{_name(self.values)}"}

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return {f"values.{_name(self.values)}": self.values}


def nearest_orthogonal(matrix: np.ndarray) -> np.ndarray:
    """The polar factor of a matrix near to an orthogonal one, to float64 rounding (two Newton–Schulz steps)."""
    left, _, right = np.linalg.svd(matrix)
    values = left @ right
    for _ in range(2):
        values = 1.5 * values - 0.5 * values @ values.T @ values
    return values


@dataclass(frozen=True, eq=False)
class Invertible(Transform):
    """A general invertible matrix (n, n), or k of them on the diagonal (k, n, n): exactly these float64 numbers.

    Raises ValueError where float64 cannot bound the inverse.
    """

    kind: ClassVar[str] = "invertible"
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim not in (2, 3) or self.values.shape[-1] != self.values.shape[-2]:
            raise ValueError("an invertible map is a square matrix or a stack of them")
        if not np.isfinite(self.values).all() or not self.slack < 1e-10:
            raise ValueError("the matrix is singular to working precision")

    @cached_property
    def stack(self) -> np.ndarray:
        return self.values if self.values.ndim == 3 else self.values[None]

    @cached_property
    def inverted(self) -> np.ndarray:
        """Approximate inverses (k, n, n), refined once."""
        first = np.linalg.inv(self.stack)
        return first + first @ (np.eye(self.stack.shape[-1]) - self.stack @ first)

    @cached_property
    def slack(self) -> float:
        """‖I − M·X‖_∞ of the approximate inverse X, its own rounding counted."""
        n = self.stack.shape[-1]
        try:
            residual = np.abs(np.eye(n) - self.stack @ self.inverted)
        except np.linalg.LinAlgError:
            return math.inf
        rounding = (n + 1) * 2.0**-53 * (np.abs(self.stack) @ np.abs(self.inverted))
        return float((residual + rounding).sum(-1).max())

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.stack.shape[0] * self.stack.shape[-1]

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.kind, self.stack.shape, _digest(self.values))

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: _blockwise(rows, self.stack))

    @property
    def dual(self) -> Transform:
        return Inverse(self, transposed=True)

    @property
    def inverse(self) -> Transform:
        return Inverse(self)

    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: _blockwise(rows, np.abs(self.stack)))

    @property
    def summed(self) -> int:
        return self.stack.shape[-1]

    @property
    def roundings(self) -> int:
        return self.stack.shape[-1] + 1

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "values": f"values.{_name(self.values)}"}

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return {f"values.{_name(self.values)}": self.values}


@dataclass(frozen=True, eq=False)
class Inverse(Transform):
    """The exact inverse of an `Invertible`, or that transposed."""

    kind: ClassVar[str] = "inverse"
    of: Invertible
    transposed: bool = False

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.of.size

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.kind, self.transposed, *self.of.key)

    @cached_property
    def stack(self) -> np.ndarray:
        return self.of.inverted.transpose(0, 2, 1) if self.transposed else self.of.inverted

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: _blockwise(rows, self.stack))

    @property
    def dual(self) -> Transform:
        if self.transposed:
            return self.of
        return Invertible(np.ascontiguousarray(np.swapaxes(self.of.values, -1, -2)))

    @property
    def inverse(self) -> Transform:
        return self.of if not self.transposed else Invertible(np.ascontiguousarray(np.swapaxes(self.of.values, -1, -2)))

    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        # X·(I − R)⁻¹ with R = I − M·X: every entry is off by at most slack/(1 − slack) times its row's sum.
        magnitude = np.abs(self.stack)
        bound = magnitude + magnitude.sum(axis=-2 if self.transposed else -1, keepdims=True)
        return along(axis, x, lambda rows: _blockwise(rows, bound))

    def terms(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: _blockwise(rows, np.abs(self.stack)))

    def terms_left(self, x: np.ndarray) -> np.ndarray:
        return self.inverse.dual.terms(x, 0)

    @property
    def summed(self) -> int:
        return self.of.summed

    @property
    def roundings(self) -> int:
        slack = self.of.slack
        return self.of.stack.shape[-1] + 1 + math.ceil(slack / (1.0 - slack) * 2.0**53)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "of": self.of.to_json(), "transposed": self.transposed}

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return self.of.tensors


def _blockwise(rows: np.ndarray, stack: np.ndarray) -> np.ndarray:
    """Rows (…, k·n) times the block diagonal of a stack (k, n, n)."""
    cut = rows.reshape(*rows.shape[:-1], stack.shape[0], 1, stack.shape[1])
    return (cut @ stack).reshape(*rows.shape[:-1], -1)


@dataclass(frozen=True, eq=False)
class Isometry(Transform):
    """√((d−1)/d)·U from d channels to d−1, U the first d−1 columns of the reflection that sends 1/√d to e_d.

    U·Uᵀ = I − 11ᵀ/d: on centred vectors nothing is lost, and a norm over d−1 channels with the same ε is the norm over
    d. Source: Jiang et al. 2023, arXiv:2305.14858 (CRMSNorm); the scale is ours.

    With v = 1/√d − e_d the reflection is I − 2vvᵀ/(vᵀv), and x·U is O(d).
    """

    kind: ClassVar[str] = "isometry"
    size: int
    reading: bool = False
    """Whether this is the dual, √(d/(d−1))·U, by which readers are transformed."""

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError("an isometry onto one channel less needs two")

    @property
    def width(self) -> int:
        return self.size - 1

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.kind, self.size, self.reading)

    @property
    def factor(self) -> float:
        ratio = (self.size - 1) / self.size
        return math.sqrt(1.0 / ratio if self.reading else ratio)

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, self._rows)

    def _rows(self, x: np.ndarray) -> np.ndarray:
        # v = (a, …, a, a − 1) with a = 1/√d, so vᵀv = 2(1 − a), and 2(x·v)/(vᵀv) is taken off in steps of a.
        a = 1.0 / math.sqrt(self.size)
        along_v = (a * x.sum(-1, keepdims=True) - x[..., -1:]) / (1.0 - a)
        return (x[..., :-1] - a * along_v) * self.factor

    def from_left(self, x: np.ndarray) -> np.ndarray:
        a = 1.0 / math.sqrt(self.size)
        taken_off = a * x.sum(0, keepdims=True) / (1.0 - a)
        return np.concatenate([x - a * taken_off, (1.0 - a) * taken_off]) * self.factor

    def absolute_left(self, x: np.ndarray) -> np.ndarray:
        a = 1.0 / math.sqrt(self.size)
        taken_off = a * x.sum(0, keepdims=True) / (1.0 - a)
        return np.concatenate([x + a * taken_off, (1.0 - a) * taken_off]) * self.factor

    @property
    def dual(self) -> Transform:
        return Isometry(self.size, not self.reading)

    @property
    def inverse(self) -> Transform:
        raise ValueError("an isometry onto fewer channels has a left inverse on centred vectors only")

    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        def rows(values: np.ndarray) -> np.ndarray:
            a = 1.0 / math.sqrt(self.size)
            along_v = (a * values.sum(-1, keepdims=True) + values[..., -1:]) / (1.0 - a)
            return (values[..., :-1] + a * along_v) * self.factor

        return along(axis, x, rows)

    @property
    def roundings(self) -> int:
        return self.size + 12

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": self.size, "reading": self.reading}


@dataclass(frozen=True, eq=False)
class LeftInverse(Transform):
    """T⁺ of an isometry T: from d−1 channels back to d, T·T⁺ = I − 11ᵀ/d."""

    kind: ClassVar[str] = "left inverse"
    of: Isometry

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.of.width

    @property
    def width(self) -> int:
        return self.of.size

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.kind, *self.of.key)

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: rows @ self.of.dual.matrix().T)

    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: rows @ np.abs(self.of.dual.matrix().T))

    def from_left(self, x: np.ndarray) -> np.ndarray:
        return self.of.dual.apply(x, 0)

    def absolute_left(self, x: np.ndarray) -> np.ndarray:
        return self.of.dual.absolute(x, 0)

    @property
    def dual(self) -> Transform:
        raise ValueError("the left inverse of an isometry has no inverse")

    @property
    def inverse(self) -> Transform:
        raise ValueError("the left inverse of an isometry has no inverse")

    @property
    def roundings(self) -> int:
        return self.of.roundings

    def to_json(self) -> dict[str, Any]:
        raise ValueError("a left inverse is the proof's own")


@dataclass(frozen=True, eq=False)
class Signs(Transform):
    """A matrix ±scale with scale⁻²·T·Tᵀ = n·I, exactly: a Hadamard matrix as it stands in a graph.

    `scale` None is the real number 1/√n, which makes it orthogonal. Raises ValueError where the signs are no Hadamard
    matrix.
    """

    kind: ClassVar[str] = "signs"
    values: np.ndarray
    scale: float | None = None

    def __post_init__(self) -> None:
        n = len(self.values)
        # Entries of the product are integers of at most n, which float32 holds exactly.
        wide = self.values.astype(np.float32)
        if self.values.shape != (n, n) or not np.array_equal(wide @ wide.T, n * np.eye(n, dtype=np.float32)):
            raise ValueError("the signs are no Hadamard matrix")
        _check_scale(self.scale)

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(self.values)

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.kind, self.scale, _digest(self.values))

    @property
    def orthogonal(self) -> bool:  # type: ignore[override]
        if self.scale is None:
            return True
        return math.frexp(self.scale)[0] == 0.5 and self.scale * self.scale * self.size == 1.0

    @property
    def factor(self) -> float:
        return 1.0 / math.sqrt(self.size) if self.scale is None else self.scale

    @property
    def _inverse_scale(self) -> float | None:
        return None if self.scale is None else 1.0 / (self.scale * self.size)

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: rows @ (self.values * self.factor))

    @property
    def dual(self) -> Transform:
        return Signs(self.values, self._inverse_scale)

    @property
    def inverse(self) -> Transform:
        return Signs(np.ascontiguousarray(self.values.T), self._inverse_scale)

    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return x.sum(axis=axis, keepdims=True) * abs(self.factor)

    @property
    def roundings(self) -> int:
        return self.size + 4

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "values": f"values.{_name(self.values)}", "scale": self.scale}

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return {f"values.{_name(self.values)}": self.values.astype(np.float64)}


@dataclass(frozen=True, eq=False)
class Selection(Transform):
    """x ↦ x[indices]: a permutation where every channel is taken once, else some channels are dropped or repeated."""

    kind: ClassVar[str] = "selection"
    size: int
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(0 <= index < self.size for index in self.indices):
            raise ValueError(f"indices are outside {self.size} channels")

    @property
    def width(self) -> int:
        return len(self.indices)

    @property
    def permutation(self) -> bool:
        return sorted(self.indices) == list(range(self.size))

    @property
    def orthogonal(self) -> bool:  # type: ignore[override]
        return self.permutation

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.kind, self.size, self.indices)

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.take(x, self.indices, axis=axis)

    def from_left(self, x: np.ndarray) -> np.ndarray:
        result = np.zeros((self.size, *x.shape[1:]))
        np.add.at(result, list(self.indices), x)
        return result

    def absolute_left(self, x: np.ndarray) -> np.ndarray:
        return self.from_left(x)

    @property
    def dual(self) -> Transform:
        return self

    @property
    def inverse(self) -> Transform:
        if not self.permutation:
            raise ValueError("only a permutation has an inverse")
        return Selection(self.size, tuple(int(i) for i in np.argsort(self.indices)))

    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return self.apply(x, axis)

    @property
    def roundings(self) -> int:
        return 0

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": self.size, "indices": list(self.indices)}


@dataclass(frozen=True, eq=False)
class Copied(Transform):
    """x ↦ y with y_j = x[sources_j]·factors_j: channels restored from the one they are proportional to; factor 0: none.

    The way back from a `Selection` of channels on which the others depend.
    """

    kind: ClassVar[str] = "copied"
    size: int
    sources: tuple[int, ...]
    factors: np.ndarray

    @property
    def width(self) -> int:
        return len(self.sources)

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.kind, self.size, self.sources, _digest(self.factors))

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: np.take(rows, self.sources, axis=-1) * self.factors)

    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: np.take(rows, self.sources, axis=-1) * np.abs(self.factors))

    def from_left(self, x: np.ndarray) -> np.ndarray:
        result = np.zeros((self.size, *x.shape[1:]))
        np.add.at(result, list(self.sources), x * self.factors.reshape(-1, *[1] * (x.ndim - 1)))
        return result

    def absolute_left(self, x: np.ndarray) -> np.ndarray:
        return Copied(self.size, self.sources, np.abs(self.factors)).from_left(x)

    @property
    def dual(self) -> Transform:
        raise ValueError("copied channels have no inverse")

    @property
    def inverse(self) -> Transform:
        raise ValueError("copied channels have no inverse")

    @property
    def roundings(self) -> int:
        return self.width + 1

    def to_json(self) -> dict[str, Any]:
        raise ValueError("copied channels are the proof's own")


@dataclass(frozen=True, eq=False)
class Embedded(Copied):
    """The channels of a selection where they were, and zeros at all others: nothing is rounded."""

    kind: ClassVar[str] = "embedded"

    @classmethod
    def of(cls, selection: Selection) -> Embedded:
        sources, factors = np.zeros(selection.size, int), np.zeros(selection.size)
        sources[list(selection.indices)] = np.arange(selection.width)
        factors[list(selection.indices)] = 1.0
        return cls(selection.width, tuple(int(source) for source in sources), factors)

    @property
    def roundings(self) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class Repeated(Transform):
    """I_left ⊗ T ⊗ I_right for a square T: the same map of every group of channels (of every head)."""

    kind: ClassVar[str] = "repeated"
    inner: Transform
    left: int = 1
    right: int = 1

    def __post_init__(self) -> None:
        if self.inner.width != self.inner.size or self.left < 1 or self.right < 1:
            raise ValueError("only a square map is repeated along an axis, once or more")
        if isinstance(inner := self.inner, Repeated):
            # I ⊗ (I ⊗ T ⊗ I) ⊗ I has one form.
            object.__setattr__(self, "left", self.left * inner.left)
            object.__setattr__(self, "right", inner.right * self.right)
            object.__setattr__(self, "inner", inner.inner)

    def within(self, size: int, stride: int = 1) -> Transform | None:
        """The map of a group of `size` channels that are `stride` apart; None where it mixes them with others."""
        if self.right % stride or (size * stride) % (self.inner.size * self.right):
            return None
        left, right = size * stride // (self.inner.size * self.right), self.right // stride
        return self.inner if left == right == 1 else Repeated(self.inner, left, right)

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.left * self.inner.size * self.right

    @property
    def orthogonal(self) -> bool:  # type: ignore[override]
        return self.inner.orthogonal

    @cached_property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.kind, self.left, self.right, *self.inner.key)

    def _inside(self, x: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        shape = (*x.shape[:-1], self.left, self.inner.size, self.right)
        return np.broadcast_to(function(x.reshape(shape)), shape).reshape(x.shape)

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: self._inside(rows, lambda cut: self.inner.apply(cut, -2)))

    @property
    def dual(self) -> Transform:
        return Repeated(self.inner.dual, self.left, self.right)

    @property
    def inverse(self) -> Transform:
        return Repeated(self.inner.inverse, self.left, self.right)

    def absolute(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: self._inside(rows, lambda cut: self.inner.absolute(cut, -2)))

    def terms(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: self._inside(rows, lambda cut: self.inner.terms(cut, -2)))

    def terms_left(self, x: np.ndarray) -> np.ndarray:
        return self.inverse.dual.terms(x, 0)

    @property
    def summed(self) -> int:
        return self.inner.summed

    @property
    def roundings(self) -> int:
        return self.inner.roundings

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "inner": self.inner.to_json(), "left": self.left, "right": self.right}

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return self.inner.tensors


LARGEST_JOINED = 1 << 9
"""Sign matrices are multiplied out to this size: that of a head, for which there is one name in both graphs."""


def kronecker(first: Transform, second: Transform) -> Transform | None:
    """`first`·`second` for two sign matrices that act on neighbouring digits of a channel's index; None for others."""
    if first.size != second.size:
        return None
    for outer, inner in ((first, second), (second, first)):
        a = outer if isinstance(outer, Repeated) else Repeated(outer)
        b = inner if isinstance(inner, Repeated) else Repeated(inner)
        s, t = a.inner, b.inner
        if not (isinstance(s, Signs) and isinstance(t, Signs) and s.scale is not None and t.scale is not None):
            return None
        if a.right == t.size * b.right and s.size * t.size <= LARGEST_JOINED:
            both = Signs(np.kron(s.values, t.values), s.scale * t.scale)
            return both if a.left == b.right == 1 else Repeated(both, a.left, b.right)
    return None


@dataclass(frozen=True, eq=False)
class Shift:
    """v ↦ v + values along an axis: exactly these float64 numbers. A step of a relation, and no linear map."""

    kind: ClassVar[str] = "shift"
    values: np.ndarray

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return (self.kind, _digest(self.values))

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: rows + self.values)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "values": f"values.{_name(self.values)}"}

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return {f"values.{_name(self.values)}": self.values}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shift) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


Step = Transform | Shift
"""What one step of a relation does to a value."""


def read_step(content: Mapping[str, Any], tensor: Reader) -> Step:
    """The transform or shift that `to_json` wrote. Raises ValueError for what is neither."""
    if content.get("kind") == Shift.kind:
        return Shift(np.asarray(tensor(str(content.get("values"))), np.float64))
    return from_json(content, tensor)


def from_json(content: Mapping[str, Any], tensor: Reader) -> Transform:
    """The transform that `to_json` wrote; `tensor` gives the arrays. Raises ValueError for what is none."""
    kind = content.get("kind")
    try:
        if kind == Hadamard.kind:
            seed = None if content["seed"] is None else _integer(content["seed"])
            return Hadamard(_integer(content["size"]), seed, content["scale"], bool(content.get("transposed")))
        if kind == Isometry.kind:
            return Isometry(_integer(content["size"]), bool(content.get("reading")))
        if kind == Selection.kind:
            return Selection(_integer(content["size"]), tuple(map(_integer, content["indices"])))
        if kind in (Scaling.kind, Orthogonal.kind, Invertible.kind):
            values = np.asarray(tensor(content["values"]), np.float64)
            return {Scaling.kind: Scaling, Orthogonal.kind: Orthogonal, Invertible.kind: Invertible}[kind](values)
        if kind == Signs.kind:
            return Signs(np.asarray(tensor(content["values"])).astype(np.int8), content["scale"])
        if kind == Repeated.kind:
            inner = from_json(content["inner"], tensor)
            return Repeated(inner, _integer(content["left"]), _integer(content["right"]))
        if kind in (Reciprocal.kind, Inverse.kind):
            inner = from_json(content["of"], tensor)
            if kind == Reciprocal.kind and isinstance(inner, Scaling):
                return Reciprocal(inner)
            if kind == Inverse.kind and isinstance(inner, Invertible):
                return Inverse(inner, bool(content.get("transposed")))
    except (KeyError, TypeError) as error:
        raise ValueError(f"a transform of kind {kind!r} lacks {error}") from error
    raise ValueError(f"no transform is of kind {kind!r}")


def _check_scale(scale: float | None) -> None:
    if scale is not None and not (math.isfinite(scale) and scale != 0.0):
        raise ValueError(f"a transform is not scaled by {scale}")


def _integer(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no integer")
    return value


def tensors_of(transforms: Sequence[Step]) -> dict[str, np.ndarray]:
    """All arrays of some transforms, by name."""
    return {name: array for transform in transforms for name, array in transform.tensors.items()}


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(repr(values.shape).encode() + np.ascontiguousarray(values).tobytes()).hexdigest()


def _name(values: np.ndarray) -> str:
    return _digest(values)[:16]
