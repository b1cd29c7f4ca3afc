"""T without a certificate: found from the first writer by least squares, and then checked everywhere.

A value of the rewritten graph that equals no value of the original, but is the same sum of the same nonlinear
results, may be one of them in another basis. Each of its terms says xM′ = xM·T for constants M and M′, so T solves
M·T = M′. What comes out is a guess made of rounded numbers: it is taken to the structure it is near (a permutation,
signs/√n, a diagonal, an orthogonal matrix, one map a head), and nothing rests on it before both values match with it
exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rewrite.proof.chains import Chain
from rewrite.proof.forms import Form, Term
from rewrite.proof.products import rows
from rewrite.proof.transforms import (
    Invertible,
    Orthogonal,
    Repeated,
    Scaling,
    Selection,
    Signs,
    Transform,
    nearest_orthogonal,
)  # fmt: skip

LARGEST = 1 << 13
"""Channels up to which a dense T is sought: least squares is cubic in them."""

ROWS_PER_CHANNEL = 16
"""Equations taken for each unknown of a column of T; rounding averages out over them."""

SHARP = 1e-5
"""How near to a number of few digits one is taken to it."""

NEAR = 1e-3
"""How near to a structure a guess is taken to it; the match that follows decides."""


def guesses(rewritten: Form, original: Form) -> Iterator[Transform]:
    """Transforms T of the last axis that `rewritten` = `original`·T suggests, the most structured first."""
    equations = _equations(rewritten, original)
    if equations is None:
        return
    known, wanted = equations
    width = known.shape[1]
    if wanted.shape[1] != width or not (np.isfinite(known).all() and np.isfinite(wanted).all()):
        return
    scale = np.abs(known).max(initial=0.0)
    if not scale or np.linalg.matrix_rank(known) < width:
        ratio = _diagonal(known, wanted)
        if ratio is not None:
            yield Scaling(_rounded(ratio))
        return
    yield from _structured(np.linalg.lstsq(known, wanted, rcond=None)[0])


def _equations(rewritten: Form, original: Form) -> tuple[np.ndarray, np.ndarray] | None:
    """M and M′ of the terms that hold one map each, stacked until they determine T."""
    theirs = {(term.atom.number, term.view.order): term for term in original.terms}
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    total = 0
    for term in sorted(rewritten.terms, key=_height, reverse=True):
        other = theirs.get((term.atom.number, term.view.order))
        if other is None or len(term.chains) != 1 or len(other.chains) != 1 or term.axis is None:
            continue
        mine, known = term.chains[0], other.chains[0]
        width = mine.sizes()[1]
        if other.axis != term.axis or width is None or width > LARGEST or known.sizes()[1] != width:
            continue
        height = mine.sizes()[0] or width
        taken = slice(0, min(height, ROWS_PER_CHANNEL * width))
        parts.append((_matrix(known, taken, height), _matrix(mine, taken, height)))
        total += taken.stop
        if total >= ROWS_PER_CHANNEL * width:
            break
    if not parts or len({part[0].shape[1] for part in parts}) != 1:
        return None
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _height(term: Term) -> int:
    return term.chains[0].sizes()[0] or 0


def _matrix(chain: Chain, taken: slice, height: int) -> np.ndarray:
    return rows(chain.factors, taken, height).value


def _structured(guess: np.ndarray) -> Iterator[Transform]:
    """The structures that a dense guess is near."""
    n = len(guess)
    size = np.abs(guess).max()
    diagonal = np.diagonal(guess)
    if np.abs(guess - np.diag(diagonal)).max() < NEAR * size and (np.abs(diagonal) > NEAR * size).all():
        if (np.abs(diagonal - 1.0) > NEAR).any():
            yield Scaling(_rounded(diagonal))
        return
    if np.abs(guess @ guess.T - np.eye(n)).max() < NEAR:
        rounded = np.rint(guess)
        if np.abs(guess - rounded).max() < NEAR and (rounded.sum(0) == 1).all() and (rounded >= 0).all():
            yield Selection(n, tuple(int(i) for i in rounded.argmax(0)))
            return
        yield from _signs(guess)
        yield Orthogonal(nearest_orthogonal(guess), fitted=True)
        return
    blocks = _blocks(guess)
    try:
        yield Invertible(guess if blocks is None else blocks)
    except ValueError:
        return


def _rounded(diagonal: np.ndarray) -> np.ndarray:
    """A diagonal near to one number as that number, and numbers near to powers of two as those."""
    even = np.full_like(diagonal, np.median(diagonal))
    values = even if np.abs(diagonal / even - 1.0).max() < SHARP else diagonal
    powers = np.sign(values) * np.exp2(np.rint(np.log2(np.abs(values))))
    return np.where(np.abs(values / powers - 1.0) < SHARP, powers, values)


def _signs(guess: np.ndarray) -> Iterator[Transform]:
    """Signs/√n on all channels, or on every block of the diagonal alike."""
    blocks = _blocks(guess)
    one = guess if blocks is None else blocks[0]
    if np.abs(np.abs(one) * np.sqrt(len(one)) - 1.0).max() > NEAR:
        return
    try:
        if blocks is None:
            yield Signs(np.sign(one).astype(np.int8))
        elif np.abs(blocks - one).max() < NEAR:
            yield Repeated(Signs(np.sign(one).astype(np.int8)), len(blocks))
    except ValueError:
        return


def _blocks(guess: np.ndarray) -> np.ndarray | None:
    """The blocks (k, n/k, n/k) of a block-diagonal matrix with the most blocks; None where there is one."""
    n = len(guess)
    small = np.abs(guess) < NEAR * np.abs(guess).max()
    for count in range(n // 2, 1, -1):
        if n % count:
            continue
        size = n // count
        index = np.arange(n) // size
        if small[index[:, None] != index[None, :]].all():
            return np.stack([guess[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])
    return None


def _diagonal(known: np.ndarray, wanted: np.ndarray) -> np.ndarray | None:
    """The diagonal that takes the columns of `known` to those of `wanted`; None where they are not proportional."""
    square = (known * known).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(square > 0, (known * wanted).sum(0) / square, 1.0)
    if (ratio == 0).any() or np.abs(known * ratio - wanted).max() > NEAR * np.abs(wanted).max():
        return None
    return None if np.abs(ratio - 1.0).max() < NEAR else ratio
