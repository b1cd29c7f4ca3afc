"""Hadamard matrices: ±1 matrices S with S·Sᵀ = n·I, exactly, in integers.

Sylvester doubles an order, S ↦ [[S, S], [S, −S]]. Paley gives q + 1 for a prime power q ≡ 3 and 2(q + 1) for one
q ≡ 1 (mod 4). Four symmetric circulants with A² + B² + C² + D² = 4w·I give 4tw for t = 1 and t = 3; they are written
out here for the two orders that are needed beyond Paley's, 156 = 4·3·13 and 172 = 4·43.

Sources: Sylvester 1867; Paley 1933, "On orthogonal matrices", J. Math. Phys. 12; Williamson 1944, "Hadamard's
determinant theorem and the sum of four squares", Duke Math. J. 11; Goethals and Seidel 1967, Canad. J. Math. 19; Cooper
and Wallis 1972, Bull. Austral. Math. Soc. 7.
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
    if not is_constructed(order):
        return None
    if order == 1:
        return np.ones((1, 1), np.int8)
    half = hadamard(order // 2) if order % 8 == 0 or order in (2, 4) else None
    if half is not None:
        return np.kron(np.array([[1, 1], [1, -1]], np.int8), half)
    if _is_prime_power(order - 1):
        return _paley_first(order - 1)
    if _is_second_paley(order):
        return _paley_second(order // 2 - 1)
    return _goethals_seidel(*_WILLIAMSON[order])


@lru_cache(maxsize=1024)
def is_constructed(order: int) -> bool:
    """Whether `hadamard` gives a matrix of `order`; nothing is built.

    >>> [order for order in range(1, 100) if is_constructed(order) and order % 8 == 4]
    [4, 12, 20, 28, 36, 44, 52, 60, 68, 76, 84]
    """
    if order in (1, 2):
        return True
    if order < 1 or order % 4:
        return False
    doubled = order == 4 or (order % 8 == 0 and is_constructed(order // 2))
    return doubled or _is_prime_power(order - 1) or _is_second_paley(order) or order in _WILLIAMSON


def parts(order: int) -> tuple[int, int] | None:
    """(a, b) with Hadamard matrices of both orders, a ≤ b and a·b = `order`, a + b least; None where there is none.

    >>> parts(5632), parts(2048), parts(18944), parts(7)
    ((64, 88), (32, 64), (128, 148), None)
    """
    for a in range(int(order**0.5), 0, -1):
        # The nearer a comes to √order, the less a + b is.
        if order % a == 0 and is_constructed(a) and is_constructed(order // a):
            return a, order // a
    return None


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


# ── Finite fields ───────────────────────────────────────────────────────────────────────────────────────────────────


def _prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) with p prime and p^k = `number`, or None."""
    if number < 2:
        return None
    p = next((divisor for divisor in range(2, int(number**0.5) + 1) if number % divisor == 0), number)
    k = 0
    while number % p == 0:
        number, k = number // p, k + 1
    return (p, k) if number == 1 else None


def _is_prime_power(number: int) -> bool:
    """Of an odd prime; `number` + 1 is a multiple of 4 wherever this is asked, so `number` ≡ 3 (mod 4)."""
    return number % 2 == 1 and _prime_power(number) is not None


def _is_second_paley(order: int) -> bool:
    return order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime_power(order // 2 - 1)


def _jacobsthal(q: int) -> np.ndarray:
    """The matrix χ(x − y) over the field of `q` elements: 1 on squares, −1 on the others, 0 on 0; int8 (q, q).

    The element Σ cᵢtⁱ has the number Σ cᵢpⁱ.
    """
    p, k = _prime_power(q) or (q, 1)
    digits = np.arange(q)[:, None] // p ** np.arange(k) % p
    modulus = _irreducible(p, k)
    weights = p ** np.arange(k)
    character = -np.ones(q, np.int8)
    character[[int(_times(x, x, modulus, p) @ weights) for x in digits]] = 1
    character[0] = 0
    differences = np.zeros((q, q), np.int64)
    for place in range(k):
        column = digits[:, place]
        differences += (column[:, None] - column[None, :]) % p * weights[place]
    return character[differences]


def _times(x: np.ndarray, y: np.ndarray, modulus: np.ndarray, p: int) -> np.ndarray:
    """x·y of polynomials modulo tᵏ − Σ modulusᵢtⁱ, coefficients from the lowest."""
    k = len(modulus)
    product = np.convolve(x, y)
    for place in range(len(product) - 1, k - 1, -1):
        product[place - k : place] += product[place] * modulus
    return product[:k] % p


def _irreducible(p: int, k: int) -> np.ndarray:
    """Coefficients m with tᵏ = Σ mᵢtⁱ modulo an irreducible polynomial over p elements: no product of two is 0."""
    if k == 1:
        return np.zeros(1, np.int64)
    powers = p ** np.arange(k)
    for number in range(p**k):
        modulus = number // powers % p
        # t generates a field of p^k elements if and only if some power 1 < n < p^k has it return: test t's order.
        if _order_of_t(modulus, p) == p**k - 1:
            return modulus
    raise ValueError(f"no primitive polynomial of degree {k} over {p} elements")


def _order_of_t(modulus: np.ndarray, p: int) -> int:
    """The multiplicative order of t, or 0 where a power of it is 0; p^k − 1 makes the polynomial primitive."""
    k = len(modulus)
    one, t = np.eye(k, dtype=np.int64)[:2]
    power = t
    for exponent in range(1, p**k):
        if np.array_equal(power, one):
            return exponent
        if not power.any():
            return 0
        power = _times(power, t, modulus, p)
    return 0


# ── Constructions ───────────────────────────────────────────────────────────────────────────────────────────────────


def _paley_first(q: int) -> np.ndarray:
    n = q + 1
    skew = np.zeros((n, n), np.int8)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
    return (skew + np.eye(n, dtype=np.int8)).astype(np.int8)


def _paley_second(q: int) -> np.ndarray:
    n = q + 1
    conference = np.zeros((n, n), np.int8)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(q)
    eye = np.eye(n, dtype=np.int8)
    return (np.kron(conference, [[1, 1], [1, -1]]) + np.kron(eye, [[1, -1], [-1, -1]])).astype(np.int8)


_WILLIAMSON: dict[int, tuple[int, int, int, tuple[tuple[int, ...], ...]]] = {
    156: (3, 13, 1, ((1, 2), (3, 5), (1, 4, 5), (1, 5, 6))),
    172: (1, 43, 36, ((1, 2, 3), (2, 3, 4, 9), (3, 5, 9), (2, 9, 10))),
}
"""Order → (t, w, g, where A, B, C and D are −1): at ±x·gⁱ (mod w) for the x that are listed."""


def _goethals_seidel(t: int, w: int, multiplier: int, negative: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Order 4tw from circulants of order w, and t ≤ 3 shifts of order t in place of the T-matrices.

    With X₁…X₄ the Cooper-Wallis combinations of Tᵢ ⊗ (A, B, C, D) and R the reversal of the t blocks, the array's rows
    are orthogonal because the Xᵢ commute and ΣXᵢXᵢᵀ = 4tw·I.
    """
    a, b, c, d = (_symmetric_circulant(w, multiplier, places) for places in negative)
    shift = [np.roll(np.eye(t, dtype=np.int8), place, axis=1) for place in range(t)]
    shift += [np.zeros((t, t), np.int8)] * (4 - t)
    x = [
        np.sum([np.kron(turned, block) for turned, block in zip(shift, blocks)], axis=0)
        for blocks in ((a, b, c, d), (-b, a, d, -c), (-c, -d, a, b), (-d, c, -b, a))
    ]
    reverse = np.kron(np.eye(t, dtype=np.int8)[::-1], np.eye(w, dtype=np.int8))
    one = x[0]
    two, three, four = (each @ reverse for each in x[1:])
    two_t, three_t, four_t = (each.T @ reverse for each in x[1:])
    rows = [
        [one, two, three, four],
        [-two, one, four_t, -three_t],
        [-three, -four_t, one, two_t],
        [-four, three_t, -two_t, one],
    ]
    return np.block(rows).astype(np.int8)


def _symmetric_circulant(w: int, multiplier: int, negative: tuple[int, ...]) -> np.ndarray:
    """The circulant of order w whose first row is −1 at ±x·multiplierⁱ for x in `negative`, and 1 elsewhere."""
    powers = {pow(multiplier, exponent, w) for exponent in range(w)}
    row = np.ones(w, np.int8)
    row[[sign * x * power % w for x in negative for power in powers for sign in (1, -1)]] = -1
    index = np.arange(w)
    return row[(index[None, :] - index[:, None]) % w]
