"""What a region is contracted with: the constants of its readers, which absorb T⁻ᵀ where the region holds x·T.

    Σ_c x_c·w_c  =  Σ_c (xT)_c·(wT⁻ᵀ)_c

A factor is a region of its own: a head reads the embedding through a Transpose, the experts of a mixture read parts of
one stack, three projections read parts of one matrix.
"""

from __future__ import annotations

from rewrite.basis.regions import Cause, Obstruction, Region, Use, grow
from rewrite.basis.transforms import TransformClass
from rewrite.ir.axes import follow
from rewrite.ir.constants import is_constant
from rewrite.ir.edit import shape_of


def factors(region: Region, transform: TransformClass) -> list[Region]:
    """The region of every operand that a reader of `region` contracts its axis with, each once."""
    found: list[Region] = []
    for reader in region.readers:
        other = partner(reader)
        if other is not None and not any(_same(other, use) for factor in found for use in factor.readers):
            found.append(_factor(other, transform))
    return found


def partner(reader: Use) -> Use | None:
    """The other operand of a contraction, with its contracted axis."""
    thread = follow(reader.node, reader.position, reader.axis)
    others = [port for port in thread.inputs if port[0] != reader.position]
    return Use(reader.node, *others[0]) if len(others) == 1 else None


def unabsorbed(region: Region, found: list[Region]) -> Obstruction | None:
    """Why `found`, the factors of `region`, cannot absorb its transform; None where they can."""
    inside = {(use.node, use.position) for reader in region.readers if (use := partner(reader)) is not None}
    for reader in region.readers:
        if partner(reader) is None:
            return _obstruction(reader, f"{reader.node.op_type} reads it in a way that is not understood")
    for factor in found:
        reader = factor.readers[0] if factor.readers else region.readers[0]
        if any(value in region.axes for value in factor.axes):
            return _obstruction(reader, f"{reader.node.op_type} multiplies it with itself")
        if (met := factor.met(*Cause)) is not None:
            reason = f"{reader.node.op_type} multiplies it with something that is not a constant ({met.reason})"
            return _obstruction(reader, reason)
        for node in (*factor.writing_norms, *(use.node for use in factor.norms)):
            return _obstruction(reader, f"{reader.node.op_type} multiplies it with what {node.op_type} normalizes")
        for use in factor.readers:
            if (use.node, use.position) not in inside:
                return _obstruction(use, f"{factor.seed.name} is also read here, where nothing else changes")
    return None


def _factor(use: Use, transform: TransformClass) -> Region:
    """Of a constant that is its operand alone; else all that is tied to it."""
    if not is_constant(use.value):
        return grow(use.value, use.axis, transform)
    size = (shape_of(use.value) or ())[use.axis]
    return Region(transform, use.value, size if isinstance(size, int) else 0, constants=[use], readers=[use])


def _same(one: Use, other: Use) -> bool:
    return one.node is other.node and one.position == other.position


def _obstruction(use: Use, reason: str) -> Obstruction:
    return Obstruction(Cause.OPERATOR, use.value, use.node, reason)
