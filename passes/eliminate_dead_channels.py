"""Leave out hidden units that are constant.

      h = xW₁ + b     column j of W₁ is 0     f acts on each channel by itself     all readers of f(h) are f(h)·W₂ + c
    ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────
      f(h)·W₂ + c  =  f(h′)·W₂′ + (c + f(b_j)·W₂[j, :]),      h′, W₁′, b′ without channel j, W₂′ without row j

Between the layers may stand whatever acts on each channel by itself, gates too: a product is constant where both
factors are, or where one is 0. Every constant along the channels loses the same ones. Where f(b_j) is 0 nothing is
added, and W₂ may be a kernel or a stack of matrices.

Shapes    x (..., k)   W₁ (k, d)   b, h (d,)   W₂ (d, n)   c (n,)
Relation  equal over the reals; every value between W₁ and W₂ is a selection of the original's channels
Source    Courbariaux et al. 2016, arXiv:1602.02830, is where units die; the rule is arithmetic
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.channels import Form, forms, grow_selected
from rewrite.basis.regions import Cause, Region, Use
from rewrite.basis.scaling import Factor, factor_of, factors_of, read_besides
from rewrite.ir.constants import is_constant, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Constant, Map, Product, Transformed, Transpose, Weight
from rewrite.proof.transforms import Selection
from rewrite.rule import Breach, Change, Pass, Requirement, Site, read_elsewhere

CONTRACTIONS = ("MatMul", "Conv", "ConvTranspose")
LAYOUT = ("Transpose", "Identity", "Cast", "Squeeze", "Unsqueeze", "Split")
LISTED = 12
"""How many channels a note names."""


@dataclass(frozen=True)
class Hidden(Site):
    """The values of a hidden layer, as one region, and the form of every channel at every reader."""

    region: Region
    read: tuple[tuple[Form, ...], ...]

    @property
    def factors(self) -> dict[ir.Node, Factor]:
        """What every reader multiplies the channels with."""
        return factors_of(self.region)

    def constants(self, channel: int) -> tuple[float | None, ...]:
        """For every reader the number that it always reads in a channel, or None."""
        return tuple(read[channel].constant for read in self.read)

    @property
    def dead(self) -> tuple[int, ...]:
        """The channels that are constant wherever they are read."""
        return tuple(channel for channel in range(self.region.size) if None not in self.constants(channel))


def hidden_layers(program: Program) -> Iterator[Hidden]:
    """Values that constants write and that contractions with constants read, each region once."""
    seen: set[ir.Value] = set()
    for node in [node for node in program.model.graph if is_operator(node, *CONTRACTIONS)]:
        value = node.inputs[0] if node.graph is not None else None
        if value is None or value in seen or is_constant(value) or value.is_graph_input():
            continue
        axis = len(shape_of(value) or ()) - 1 if node.op_type == "MatMul" else 1
        if factor_of(Use(node, 0, axis)) is None:
            continue
        region = grow_selected(value, axis)
        seen.update(region.axes)
        if region.constants and region.readers and not region.norms and not region.writing_norms:
            known = forms(region)
            nodes = tuple(dict.fromkeys(use.node for use in (*region.constants, *region.readers)))
            yield Hidden(value.name or "", nodes, region, tuple(known[use.value] for use in region.readers))


# --------------------------------------------------------------------------------------------------- side conditions


def _channels_apart(rule: Any, site: Hidden) -> Breach | None:
    return Breach.at(site.region.met(Cause.OPERATOR))


def _hidden_from_outside(rule: Any, site: Hidden) -> Breach | None:
    return Breach.at(site.region.met(Cause.INTERFACE))


def _own_constants(rule: Any, site: Hidden) -> Breach | None:
    return Breach.at(site.region.met(Cause.OVERRIDABLE))


def _constant_readers(rule: Any, site: Hidden) -> Breach | None:
    for use in site.region.readers:
        factor = factor_of(use)
        if factor is None or factor.groups != 1:
            return Breach(use.node, f"{use.node.op_type} multiplies the channels with something that is not a constant")
        if not factor.is_laid_out_by(*LAYOUT):
            return Breach(use.node, f"{use.node.op_type} reads its constant through more than a change of layout")
    return None


def _unshared(rule: Any, site: Hidden) -> Breach | None:
    for use in site.region.constants:
        matrix = len(weight_behind(use.value).shape) > 1
        if matrix and (other := read_elsewhere(use, site.region.constants)) is not None:
            return Breach(other, f"{use.value.name} is also read here, and would have to be copied")
    met = read_besides(site.factors)
    return None if met is None else Breach(met[0], f"{met[1].name} is also read here, and would have to be copied")


def _one_bias(rule: EliminateDeadChannels, site: Hidden) -> Breach | None:
    for node, numbers in _folded(site, rule.removed(site)).items():
        if (factor := site.factors.get(node)) is None:
            continue
        stored = [len(weight_behind(use.value).shape) for use in factor.constants]
        plain = stored == [2] and factor.is_laid_out_by("Transpose", "Identity", "Cast")
        if numbers.any() and not (is_operator(node, "MatMul") and plain):
            return Breach(node, f"{node.op_type} reads a constant that is not 0, and takes no one bias for it")
    return None


COMMON = (
    Requirement("R1", "all that stands between the layers acts on each channel by itself", _channels_apart),
    Requirement("R2", "no input or output of the graph is among the values", _hidden_from_outside),
    Requirement("R3", "the constants that write them cannot be overridden", _own_constants),
    Requirement("R4", "every reader contracts them with a constant", _constant_readers),
    Requirement("R5", "no matrix or kernel is read by anyone else", _unshared),
)

# ------------------------------------------------------------------------------------------------------- the rewrite


def _folded(site: Hidden, removed: tuple[int, ...]) -> dict[ir.Node, np.ndarray]:
    """For every reader the constants it reads in the channels that are left out, 0 in the others (d,)."""
    found: dict[ir.Node, np.ndarray] = {}
    for use, read in zip(site.region.readers, site.read):
        numbers = found.setdefault(use.node, np.zeros(site.region.size))
        numbers[list(removed)] = [read[channel].constant or 0.0 for channel in removed]
    return found


def leave_out(site: Hidden, change: Change, removed: tuple[int, ...], rows: Map) -> None:
    """Every value and constant of the layer without channels `removed`; `rows` is what happens to its readers' rows."""
    gone = frozenset(removed)
    selection = Selection(site.region.size, tuple(j for j in range(site.region.size) if j not in gone))
    factors = site.factors.values()
    for use in site.region.constants:
        weight = Transformed(weight_behind(use.value), selection, use.axis)
        change.absorb(use, weight, "selected", key=(selection.key, use.axis))
    holding = {use: factor for factor in factors for use in factor.constants}
    for use, factor in holding.items():
        change.absorb(use, factor.behind(use, rows), "selected", key=(selection.key, "rows", use.axis))
    for value, axis in {value: axis for factor in factors for value, axis in factor.values.items()}.items():
        _resize(value, axis, selection.width)
        change.rename(value, "selected")
    for value, axis in site.region.axes.items():
        _resize(value, axis, selection.width)
        change.relate(value, selection, axis)


def _resize(value: ir.Value, axis: int, size: int) -> None:
    shape = shape_of(value) or ()
    value.shape = ir.Shape([size if place == axis else each for place, each in enumerate(shape)])


def listed(channels: tuple[int, ...]) -> str:
    """The numbers of some channels, the first ones where they are many."""
    shown = ", ".join(str(channel) for channel in channels[:LISTED])
    return f"{shown}, …" if len(channels) > LISTED else shown


def _times(numbers: np.ndarray, matrix: Use) -> Weight:
    rows = weight_behind(matrix.value)
    return Product(Constant(numbers), rows if matrix.axis == 0 else Transpose(rows, (1, 0)))


@dataclass(frozen=True)
class EliminateDeadChannels(Pass[Hidden]):
    """Hidden units that are constant fold into the next bias.

    `multiple`: what is left is a multiple of so many channels, as kernels like it; dead ones stay to fill it up.
    """

    multiple: int = 1

    name: ClassVar[str] = "eliminate-dead-channels"
    requires: ClassVar[tuple[Requirement, ...]] = (
        *COMMON,
        Requirement("R6", "a constant that is not 0 meets one matrix with one bias", _one_bias),
    )

    def removed(self, site: Hidden) -> tuple[int, ...]:
        """The dead channels that go; at least `multiple` stay."""
        return keeping_multiple(site.dead, site.region.size, self.multiple)

    def sites(self, program: Program) -> Iterator[Hidden]:
        yield from (site for site in hidden_layers(program) if self.removed(site))

    def rewrite(self, site: Hidden, change: Change) -> None:
        removed, factors = self.removed(site), site.factors
        additions = {
            node: _times(numbers, factors[node].constants[0])
            for node, numbers in _folded(site, removed).items()
            if numbers.any()
        }
        kept = Selection(site.region.size, tuple(j for j in range(site.region.size) if j not in set(removed)))
        leave_out(site, change, removed, kept)
        for node, addition in additions.items():
            change.shift(node, addition)
        change.notes.append(f"{len(removed)} of {site.region.size} channels are constant: {listed(removed)}")


def keeping_multiple(channels: tuple[int, ...], size: int, multiple: int) -> tuple[int, ...]:
    """As many of `channels` as may go so that a positive multiple of `multiple` is left of `size`, the last ones first.

    >>> keeping_multiple((1, 2, 5), 8, 4), keeping_multiple((0, 1, 2, 3, 5), 8, 4), keeping_multiple((0, 1), 2, 1)
    ((), (1, 2, 3, 5), (1,))
    """
    left = max(-(-(size - len(channels)) // multiple), 1) * multiple
    going = max(size - left, 0)
    return channels[len(channels) - going :]
