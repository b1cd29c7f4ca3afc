"""Hadamard matrices: ±1 matrices S with S·Sᵀ = n·I, exactly, in integers.

Sylvester doubles an order, S ↦ [[S, S], [S, −S]]; Paley gives q + 1 for a prime q ≡ 3 and 2(q + 1) for q ≡ 1 (mod 4).

Source: Paley 1933, "On orthogonal matrices", J. Math. Phys. 12; Sylvester 1867.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=64)
def hadamard(order: int) -> np.ndarray | None:
    """A Hadamard matrix of `order` as int8 (order, order), or None where no construction here gives one.

    >>> bool((hadamard(12).astype(int) @ hadamard(12).T.astype(int) == 12 * np.eye(12)).all())
    True
    >>> hadamard(6) is None
    True
    """
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order == 2:
        return np.array([[1, 1], [1, -1]], np.int8)
    if order < 1 or order % 4:
        return None
    half = hadamard(order // 2) if order % 8 == 0 or order == 4 else None
    if half is not None:
        return np.kron(np.array([[1, 1], [1, -1]], np.int8), half)
    if _is_prime(order - 1) and order % 4 == 0:
        return _paley_first(order - 1)
    if order % 2 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return _paley_second(order // 2 - 1)
    return None


def parts(order: int) -> tuple[int, int] | None:
    """(a, b) with Hadamard matrices of both orders and a·b = `order`, a + b least; None where there is none.

    >>> parts(5632), parts(2048), parts(7)
    ((64, 88), (32, 64), None)
    """
    found = [
        (a, order // a)
        for a in range(1, int(order**0.5) + 1)
        if order % a == 0 and hadamard(a) is not None and hadamard(order // a) is not None
    ]
    return min(found, key=sum, default=None)


def signs(size: int, seed: int) -> np.ndarray:
    """`size` signs ±1 in int8: the bits of SHA-256(seed ‖ counter), most significant first, a set bit being −1.

    Written out so that any tool can make the same signs: seed and counter are 8 bytes each, little endian.
    """
    count = -(-size // 256)
    stream = b"".join(
        hashlib.sha256(seed.to_bytes(8, "little") + index.to_bytes(8, "little")).digest() for index in range(count)
    )
    bits = np.unpackbits(np.frombuffer(stream, np.uint8))[:size]
    return (1 - 2 * bits.astype(np.int8)).astype(np.int8)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _residues(prime: int) -> np.ndarray:
    """The Jacobsthal matrix χ(i − j) of the field of `prime` elements."""
    character = -np.ones(prime, np.int8)
    character[[i * i % prime for i in range(1, prime)]] = 1
    character[0] = 0
    index = np.arange(prime)
    return character[(index[:, None] - index[None, :]) % prime]


def _paley_first(prime: int) -> np.ndarray:
    n = prime + 1
    skew = np.zeros((n, n), np.int8)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _residues(prime)
    return (skew + np.eye(n, dtype=np.int8)).astype(np.int8)


def _paley_second(prime: int) -> np.ndarray:
    n = prime + 1
    conference = np.zeros((n, n), np.int8)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _residues(prime)
    eye = np.eye(n, dtype=np.int8)
    return (np.kron(conference, [[1, 1], [1, -1]]) + np.kron(eye, [[1, -1], [-1, -1]])).astype(np.int8)
