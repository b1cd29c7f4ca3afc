"""Sizes of axes: polynomials with integer coefficients in symbolic dimensions.

A reshape that swaps batch and sequence has the right number of elements and the wrong meaning; it does not pass here,
because `batch` and `sequence` are different symbols, whatever sizes they take.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Monomial = tuple[str, ...]


@dataclass(frozen=True)
class Dim:
    """A polynomial: `terms` maps sorted symbol tuples to non-zero integers, itself sorted.

    >>> batch, sequence = Dim.symbol("batch"), Dim.symbol("sequence")
    >>> (batch * sequence * 4).quotient(sequence * 2)
    Dim('2*batch')
    >>> batch * sequence == sequence * sequence
    False
    >>> (batch + 1).quotient(batch) is None
    True
    """

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def of(value: int | Dim) -> Dim:
        return value if isinstance(value, Dim) else Dim._collected([((), int(value))])

    @staticmethod
    def symbol(name: str) -> Dim:
        return Dim((((name,), 1),))

    @staticmethod
    def _collected(terms: Iterable[tuple[Monomial, int]]) -> Dim:
        total: dict[Monomial, int] = {}
        for monomial, coefficient in terms:
            total[monomial] = total.get(monomial, 0) + coefficient
        return Dim(tuple(sorted((m, c) for m, c in total.items() if c)))

    @property
    def constant(self) -> int | None:
        """The integer this is, or None where a symbol occurs."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    @property
    def least(self) -> int | None:
        """The least value this is sure to have, or None: a dimension of an input is at least 1, other sizes at least 0.

        >>> (Dim.symbol("batch") - 1).least, (Dim.symbol("batch") - 2).least, (-Dim.symbol("batch")).least
        (0, -1, None)
        """
        total = 0
        for monomial, coefficient in self.terms:
            if monomial and (coefficient < 0 or any(name.startswith(SIGNED) for name in monomial)):
                return None
            total += coefficient if not any("(" in name for name in monomial) else 0
        return total

    def __add__(self, other: int | Dim) -> Dim:
        return Dim._collected((*self.terms, *Dim.of(other).terms))

    def __neg__(self) -> Dim:
        return Dim(tuple((m, -c) for m, c in self.terms))

    def __sub__(self, other: int | Dim) -> Dim:
        return self + -Dim.of(other)

    def __mul__(self, other: int | Dim) -> Dim:
        return Dim._collected(
            (tuple(sorted(m1 + m2)), c1 * c2) for m1, c1 in self.terms for m2, c2 in Dim.of(other).terms
        )

    def quotient(self, divisor: Dim) -> Dim | None:
        """`self / divisor` where it is a polynomial with integer coefficients, else None.

        Exact for a divisor of one term; for others only a constant multiple is found, which is all that layouts need.
        """
        if len(divisor.terms) == 1:
            (under, by), result = divisor.terms[0], []
            for monomial, coefficient in self.terms:
                rest = _without(monomial, under)
                if rest is None or coefficient % by:
                    return None
                result.append((rest, coefficient // by))
            return Dim._collected(result)
        if not divisor.terms or not self.terms:
            return None
        lead, by = self.terms[0][1], divisor.terms[0][1]
        if lead % by == 0 and divisor * (lead // by) == self:
            return Dim.of(lead // by)
        return None

    def __str__(self) -> str:
        parts = []
        for monomial, coefficient in self.terms:
            factors = ([str(coefficient)] if coefficient != 1 or not monomial else []) + list(monomial)
            parts.append("*".join(factors))
        return " + ".join(parts) or "0"

    def __repr__(self) -> str:
        return f"Dim({str(self)!r})"


def _without(monomial: Monomial, factor: Monomial) -> Monomial | None:
    rest = list(monomial)
    for symbol in factor:
        if symbol not in rest:
            return None
        rest.remove(symbol)
    return tuple(rest)


SIGNED = "signed "
"""How names of integers begin that are functions of sizes, but no sizes: they may be negative."""

ONE = Dim.of(1)
Shape = tuple[Dim, ...]


def product(sizes: Iterable[Dim]) -> Dim:
    """The product of `sizes`; 1 for none."""
    result = ONE
    for size in sizes:
        result = result * size
    return result


def opaque(kind: str, *arguments: object) -> Dim:
    """A size that is some function of others, known only by name: equal names are equal sizes."""
    return Dim.symbol(f"{kind}({','.join(map(str, arguments))})")


def broadcast(*shapes: Shape) -> Shape:
    """The shape of an elementwise operator's result.

    Two symbols that differ are equal or one of them is 1 whenever the operator runs at all; which one is not known, so
    the result is a size of its own name. One case is known: n against min(n, c) for a number c > 1. They are equal, or
    min(n, c) is 1 and with it n.
    """
    rank = max(len(shape) for shape in shapes)
    result = []
    for axis in range(-rank, 0):
        sizes = {part for shape in shapes if len(shape) >= -axis for part in _MEMBERS.get(shape[axis], (shape[axis],))}
        sizes -= {ONE}
        sizes -= {size for size in sizes if _MINIMA.get(size) in sizes}
        if not sizes:
            result.append(ONE)
        elif len(sizes) == 1:
            result.append(next(iter(sizes)))
        else:
            static = [size for size in sizes if size.constant is not None]
            if len(static) > 1:
                raise ValueError(f"sizes {sorted(map(str, sizes))} do not broadcast")
            if not static:
                static = [opaque("broadcast", *sorted(map(str, sizes)))]
                _MEMBERS[static[0]] = frozenset(sizes)
            result.append(static[0])
    return tuple(result)


_MEMBERS: dict[Dim, frozenset[Dim]] = {}
"""The sizes that a broadcast of several symbols was made from."""

_MINIMA: dict[Dim, Dim] = {}
"""The n of every min(n, c) with a number c > 1."""


def alike(a: Dim, b: Dim) -> bool:
    """Whether two sizes that may meet in a broadcast are then sure to be equal."""
    return a == b or _MINIMA.get(a) == b or _MINIMA.get(b) == a


def minimum(size: Dim, bound: Dim) -> Dim:
    """The smaller of two sizes of which one holds a symbol."""
    result = opaque("min", *sorted(map(str, (size, bound))))
    for n, c in ((size, bound), (bound, size)):
        if c.constant is not None and c.constant > 1 and n.constant is None:
            _MINIMA[result] = n
    return result


def parse(text: str) -> Dim:
    """A dimension name as a size: products and sums of names and integers are read, anything else is one symbol.

    >>> parse("batch*sequence")
    Dim('batch*sequence')
    >>> parse("floor(s0/2)")
    Dim('named(floor(s0/2))')
    """
    if not re.fullmatch(r"[\w .]+([*+][\w .]+)*", text) or text.strip().isdigit():
        # A name that is a number is a name; and none is that of a size that is made up here.
        return Dim.symbol(f"named({text})")
    total = Dim.of(0)
    for summand in text.split("+"):
        total = total + product(
            Dim.of(int(part)) if part.strip().isdigit() else Dim.symbol(part.strip()) for part in summand.split("*")
        )
    return total
