"""Move the spread of a norm's channels into the matrices that read it, where it is quantized more easily.

      y = core(x)⊙γ + β      all readers of y are x·W with constants W, b      no W is read by anyone else
    ────────────────────────────────────────────────────────────────────────────────────────────────────────  s > 0
      y′ = (y − δ)⊘s  =  core(x)⊙(γ⊘s) + (β − δ)⊘s,      yW + b  =  y′·(diag(s)W) + (b + δW)

s_j = max|y_j − δ_j|^α / max|W_j|^(1 − α), and 1 where a channel or its weights are all zero; δ is the middle of every
channel's range, and 0 unless a shift is asked for. s is moved by less than a rounding, so that γ⊘s needs none. A Conv
may read y too, but no shift passes its padding. It runs after fold-norm, which would move s back; a norm that is
smoothed is not smoothed again.

Shapes    x, y (..., d)   γ, β, s, δ (d,)   W (d, n)   b (n,)
Relation  equal over the reals; y, and y under other layouts, is the original's minus δ, times diag(1/s)
Source    Xiao et al. 2022, arXiv:2211.10438, eq. 4; Shao et al. 2023, arXiv:2308.13137, eq. 3 (shift)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.operators import NORMS, bias_of, used_statistic, width
from rewrite.basis.regions import Cause, Region, Use, grow
from rewrite.basis.scaling import Factor, factor_of, factors_of, read_besides
from rewrite.basis.transforms import DIAGONAL, DIAGONAL_AND_SHIFT
from rewrite.ir.axes import operand
from rewrite.ir.constants import is_constant, numbers, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.ir.statistics import ChannelRange, Statistics
from rewrite.ir.weights import Add, Constant, Product, Transformed, Transpose, Weight
from rewrite.proof.transforms import Scaling, Shift
from rewrite.rule import Breach, Change, Pass, Requirement, Site, steps

DEVIATIONS = 4.0
"""How many standard deviations of a normalized channel are taken for its range where nothing was measured."""


@dataclass(frozen=True)
class NormOutput(Site):
    """A norm with its scale γ and shift β, the value y they make, and the region of y.

    `shifts` says whether δ is to be moved too.
    """

    norm: ir.Node
    scale: Use
    shift: Use | None
    result: ir.Value
    region: Region
    shifts: bool

    @property
    def factors(self) -> dict[ir.Node, Factor]:
        """What every reader multiplies y with."""
        return factors_of(self.region)


def norm_outputs(program: Program, name: str, shifting: Callable[[Use | None], bool]) -> Iterator[NormOutput]:
    """The norms that the pass `name` has not moved yet; `shifting(β)` says whether a norm's δ is to be moved."""
    for norm in [node for node in program.model.graph if is_operator(node, *NORMS)]:
        if norm.graph is None or operand(norm, 1) is None:
            continue
        shift = Use(norm, 2, 0) if operand(norm, 2) is not None else bias_of(norm)
        last = norm if shift is None else shift.node
        result, shifts = last.outputs[0], shifting(shift)
        if any(step["pass"] == name for step in steps(program.relations.get(result.name or ""))):
            continue
        transform = DIAGONAL_AND_SHIFT if shifts else DIAGONAL
        region = grow(result, len(shape_of(result) or ()) - 1, transform, origin=last)
        nodes = tuple(dict.fromkeys((norm, last, *(use.node for use in region.readers))))
        yield NormOutput(result.name or "", nodes, norm, Use(norm, 1, 0), shift, result, region, shifts)


# --------------------------------------------------------------------------------------------------- side conditions


def _own_vectors(rule: Any, site: NormOutput) -> Breach | None:
    for symbol, use in (("γ", site.scale), ("β", site.shift)):
        if use is None:
            continue
        if not is_constant(use.value):
            return Breach(site.norm, f"{symbol} ({use.value.name}) is not a constant of the network")
        if shape_of(use.value) != (site.region.size,):
            return Breach(site.norm, f"{symbol} has shape {shape_of(use.value)}, not ({site.region.size},)")
    statistic = used_statistic(site.norm)
    return None if statistic is None else Breach(site.norm, f"its statistic {statistic.name} is used")


def _hidden_from_outside(rule: Any, site: NormOutput) -> Breach | None:
    return Breach.at(site.region.met(Cause.INTERFACE, Cause.OVERRIDABLE))


def _only_contracted(rule: Any, site: NormOutput) -> Breach | None:
    region = site.region
    if (met := region.met(Cause.OPERATOR)) is not None:
        return Breach.at(met)
    for node in (*(use.node for use in region.norms), *region.writing_norms, *(use.node for use in region.constants)):
        return Breach(node, f"{node.op_type} touches the norm's result as well")
    return None if region.readers else Breach(site.norm, "nothing reads it that could absorb a scale")


def _constant_readers(rule: Any, site: NormOutput) -> Breach | None:
    for use in site.region.readers:
        if factor_of(use) is None:
            return Breach(use.node, f"{use.node.op_type} multiplies it with something that is not a constant")
    return None


def _unshared(rule: Any, site: NormOutput) -> Breach | None:
    met = read_besides(site.factors)
    return None if met is None else Breach(met[0], f"{met[1].name} is also read here, and would have to be copied")


def _one_row(rule: Any, site: NormOutput) -> Breach | None:
    for node, factor in site.factors.items() if site.shifts else ():
        if not is_operator(node, "MatMul"):
            return Breach(node, f"a shift would meet the padding of {node.op_type}")
        if not _is_one_matrix(factor):
            return Breach(node, "the shift meets a stack of matrices, whose biases differ")
    return None


def _is_one_matrix(factor: Factor) -> bool:
    stored = [len(weight_behind(use.value).shape) for use in factor.constants]
    return stored == [2] and factor.is_laid_out_by("Transpose", "Identity", "Cast")


def _worth_new_biases(rule: Any, site: NormOutput) -> Breach | None:
    widths = {node: width(node) for node in site.factors if bias_of(node) is None}
    allowed = rule.max_bias_growth * site.region.size
    if site.shifts and sum(widths.values()) > allowed:
        widest = max(widths, key=lambda node: widths[node])
        numbers_allowed = f"{sum(widths.values())} numbers, {rule.max_bias_growth:g} × {site.region.size} allowed"
        return Breach(widest, f"the shift needs new biases of {numbers_allowed}")
    return None


REQUIREMENTS = (
    Requirement("R1", "γ and β are constants along exactly the normalized axis", _own_vectors),
    Requirement("R2", "the norm's result is no input or output of the graph", _hidden_from_outside),
    Requirement("R3", "nothing but what commutes stands between the norm and its readers", _only_contracted),
    Requirement("R4", "every reader contracts it with a constant", _constant_readers),
    Requirement("R5", "no such constant is read by anyone else", _unshared),
    Requirement("R6", "a shift meets only matrices, each with one bias", _one_row),
    Requirement("R7", "new biases stay small", _worth_new_biases),
)

# ------------------------------------------------------------------------------------------------------- the rewrite


def move(site: NormOutput, change: Change, divisor: Scaling, offset: np.ndarray | None) -> None:
    """y′ = (y − offset)⊘divisor, undone by everything that reads it; no offset is 0."""
    factors, shift = site.factors, site.shift
    additions: dict[ir.Node, Weight] = {}
    if offset is not None:
        additions = {node: _times(offset, factor.constants[0]) for node, factor in factors.items()}
    holding = {use: factor for factor in factors.values() for use in factor.constants}
    for use, factor in holding.items():
        change.absorb(use, factor.behind(use, divisor), "smoothed", key=(divisor.key, use.axis))
    for value in dict.fromkeys(value for factor in factors.values() for value in factor.values):
        change.rename(value, "smoothed")
    steps_taken = () if offset is None else (Shift(-offset),)
    change.absorb(site.scale, Transformed(weight_behind(site.scale.value), divisor.dual, 0), "smoothed")
    if shift is not None:
        rest = weight_behind(shift.value)
        rest = rest if offset is None else Add((rest, Constant(-offset)))
        change.absorb(shift, Transformed(rest, divisor.dual, 0), "smoothed")
    if site.result is not site.norm.outputs[0]:
        scaled = site.norm.outputs[0]
        change.relate(scaled, divisor.dual, len(shape_of(scaled) or ()) - 1)
    for value, axis in site.region.axes.items():
        for step in (*steps_taken, divisor.dual):
            change.relate(value, step, axis)
    for node, addition in additions.items():
        change.shift(node, addition)


def _times(offset: np.ndarray, matrix: Use) -> Weight:
    """δW, of W as it is before s goes into it."""
    rows = weight_behind(matrix.value)
    return Product(Constant(offset), rows if matrix.axis == 0 else Transpose(rows, (1, 0)))


def storable(site: NormOutput, divisor: np.ndarray) -> np.ndarray:
    """`divisor` (d,) moved, by less than a rounding, to where γ⊘divisor needs none: only the matrices are rounded then.

    A channel whose γ would vanish or overflow keeps its γ.
    """
    scale = _vector(site.scale)
    dtype = (site.scale.value.dtype or ir.DataType.FLOAT).numpy()
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        stored = (scale / divisor).astype(dtype).astype(np.float64)
        moved = scale / stored
    return np.where(scale == 0, divisor, np.where(np.isfinite(moved) & (moved > 0), moved, 1.0))


def expected_range(site: NormOutput) -> ChannelRange:
    """β ± `DEVIATIONS`·|γ|: what a channel of y holds if the normalized x is about standard normal."""
    spread = DEVIATIONS * np.abs(_vector(site.scale))
    middle = np.zeros_like(spread) if site.shift is None else _vector(site.shift)
    return ChannelRange(middle - spread, middle + spread)


def _vector(use: Use) -> np.ndarray:
    found = numbers(use.value)
    if found is None:
        raise ValueError(f"{use.value.name} is no constant vector")
    return found


@dataclass(frozen=True)
class Smooth(Pass[NormOutput]):
    """The spread of a norm's channels goes into the matrices that read it.

    `alpha`: how much of it, from 0 (none) to 1 (all). `shift`: move the middle of every channel as well, where the norm
    has a β; norms refused with a shift may be smoothed without it by a second run. `max_bias_growth`: as in fold-norm.
    `statistics`: the ranges measured of the norms' results; without them γ and β say what to expect.
    """

    alpha: float = 0.5
    shift: bool = False
    max_bias_growth: float = 8.0
    statistics: Statistics | None = None

    name: ClassVar[str] = "smooth"
    requires: ClassVar[tuple[Requirement, ...]] = REQUIREMENTS

    def sites(self, program: Program) -> Iterator[NormOutput]:
        yield from norm_outputs(program, self.name, lambda shift: self.shift and shift is not None)

    def calibrates(self, program: Program) -> Iterator[str]:
        """The norms' results."""
        yield from (site.name for site in self.sites(program))

    def rewrite(self, site: NormOutput, change: Change) -> None:
        measured = (self.statistics or {}).get(site.name)
        seen = measured or expected_range(site)
        if measured is None:
            change.notes.append("chosen from γ and β, without data")
        offset = (seen.low + seen.high) / 2 if site.shifts else None
        magnitude = seen.magnitude if offset is None else (seen.high - seen.low) / 2
        weights = np.zeros(site.region.size)
        for factor in site.factors.values():
            weights = np.maximum(weights, factor.maxima(site.region.size))
        alive = (magnitude > 0) & (weights > 0)
        divisor = np.ones(site.region.size)
        divisor[alive] = magnitude[alive] ** self.alpha / weights[alive] ** (1.0 - self.alpha)
        if not alive.all():
            change.notes.append(f"{int((~alive).sum())} dead channels stay as they are")
        move(site, change, Scaling(storable(site, divisor)), offset)
