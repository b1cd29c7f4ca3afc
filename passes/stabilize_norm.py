"""Scale a stream by a power of two, so that the squares which its norms sum stay in the range of float16.

      every writer of S is affine with constants W, b      every norm that reads S has its own ε
    ──────────────────────────────────────────────────────────────────────────────────────────────  s = 2^(−k)
      rms_ε(x) = rms_{s²ε}(s·x),      LN_ε(x) = LN_{s²ε}(s·x),      and s·x is written by s·W, s·b

What reads S otherwise is a contraction, and absorbs 1/s. s is the largest power of two for which Σ_j (s·max|x_j|)² is
in range, where x was measured. Norms that write S absorb s in γ and β. A power of two rounds nothing until numbers get
subnormal; so that ε is not lost, s²ε must be exactly a number of the type in which a norm computes.

Shapes    x (..., d)   W (k, d)   b (d,)   s, ε ()
Relation  equal over the reals; every value of S is the original's times s
Source    Li et al. 2023, arXiv:2312.10359, §3.2 (scaling in front of a norm in low precision)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.operators import NORMS, norm_attributes, used_statistic
from rewrite.basis.regions import Cause, Region, Use
from rewrite.basis.scaling import Factor, factor_of, factors_of, grow_scaled, read_besides
from rewrite.ir.axes import operand
from rewrite.ir.constants import is_constant, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.ir.statistics import Statistics
from rewrite.ir.weights import Transformed
from rewrite.proof.transforms import Scaling
from rewrite.rule import Breach, Change, Pass, Requirement, Site, read_elsewhere, steps

LARGEST_FLOAT16 = 65504.0

SMALLEST_NORMAL = 2.0**-126
"""Of float32, in which an attribute is held: kernels may take smaller numbers for 0."""

UNMEASURED = 2.0**-4
"""s where nothing was measured: squares get 256 times smaller, and s²ε of a usual ε = 10⁻⁵ is 4·10⁻⁸."""


@dataclass(frozen=True)
class Stream(Site):
    """All values that one number multiplies, from a norm's input on; and the number."""

    region: Region
    factor: float
    measured: bool

    @property
    def norms(self) -> tuple[ir.Node, ...]:
        """The norms that read the stream."""
        return tuple(dict.fromkeys(use.node for use in self.region.norms))

    @property
    def writers(self) -> tuple[Use, ...]:
        """The constants that write the stream, γ and β of norms among them."""
        parameters = (Use(node, position, 0) for node in self.region.writing_norms for position in (1, 2))
        return (*self.region.constants, *(use for use in parameters if operand(use.node, use.position) is not None))

    @property
    def factors(self) -> dict[ir.Node, Factor]:
        """What every contraction multiplies the stream with."""
        return factors_of(self.region)


def _only_results(rule: StabilizeNorm, stream: Stream) -> Breach | None:
    for norm in (*stream.norms, *stream.region.writing_norms):
        if (statistic := used_statistic(norm)) is not None:
            return Breach(norm, f"its statistic {statistic.name} is used")
    return None


def _all_commute(rule: StabilizeNorm, stream: Stream) -> Breach | None:
    return Breach.at(stream.region.met(Cause.OPERATOR))


def _hidden_from_outside(rule: StabilizeNorm, stream: Stream) -> Breach | None:
    return Breach.at(stream.region.met(Cause.INTERFACE))


def _own_constants(rule: StabilizeNorm, stream: Stream) -> Breach | None:
    for use in stream.writers:
        if not is_constant(use.value):
            return Breach(use.node, f"{use.value.name} writes the stream and is not a constant of the network")
    return Breach.at(stream.region.met(Cause.OVERRIDABLE))


def _constant_readers(rule: StabilizeNorm, stream: Stream) -> Breach | None:
    for use in stream.region.readers:
        if factor_of(use) is None:
            return Breach(use.node, f"{use.node.op_type} multiplies the stream with something that is not a constant")
    return None


def _unshared(rule: StabilizeNorm, stream: Stream) -> Breach | None:
    if rule.untie:
        return None
    for use in stream.region.constants:
        matrix = len(weight_behind(use.value).shape) > 1
        if matrix and (other := read_elsewhere(use, stream.region.constants)) is not None:
            return Breach(other, f"{use.value.name} is also read here, and would have to be copied")
    return None


def _readers_to_themselves(rule: StabilizeNorm, stream: Stream) -> Breach | None:
    met = read_besides(stream.factors)
    return None if met is None else Breach(met[0], f"{met[1].name} is also read here, and would change")


def _kept_epsilon(rule: StabilizeNorm, stream: Stream) -> Breach | None:
    for norm in stream.norms:
        attributes = norm_attributes(norm)
        dtype = ir.DataType(int(attributes["stash_type"]))
        epsilon = float(attributes["epsilon"])
        held = float(dtype.numpy().type(epsilon))
        scaled = held * stream.factor**2
        lost = scaled < SMALLEST_NORMAL and epsilon != 0.0
        if lost or float(dtype.numpy().type(scaled)) != scaled:
            reason = f"s²ε = {scaled:.3g} is no number of {dtype.name.lower()}, in which it computes"
            return Breach(norm, reason)
    return None


@dataclass(frozen=True)
class StabilizeNorm(Pass[Stream]):
    """A stream is held s times as large, s a power of two, and its norms get s²ε.

    `scale`: s; where None it is chosen from what was measured. `largest`: what the sum of squares may reach. `untie`: a
    table that others read too (a tied head) may be copied. `statistics`: the ranges measured of the norms' inputs.
    Raises ValueError for a scale that is no positive power of two.
    """

    scale: float | None = None
    largest: float = LARGEST_FLOAT16
    untie: bool = False
    statistics: Statistics | None = None

    name: ClassVar[str] = "stabilize-norm"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "of its norms only the results are used", _only_results),
        Requirement("R2", "every operator in the stream commutes with a number", _all_commute),
        Requirement("R3", "no input or output of the graph is in the stream", _hidden_from_outside),
        Requirement("R4", "what writes the stream is constant, and cannot be overridden", _own_constants),
        Requirement("R5", "what reads it besides norms contracts it with a constant", _constant_readers),
        Requirement("R6", "no matrix that writes it is read by anyone else, unless copies are asked for", _unshared),
        Requirement("R7", "no matrix that reads it is read by anyone else", _readers_to_themselves),
        Requirement("R8", "s²ε is exactly a number of the type in which the norm computes", _kept_epsilon),
    )

    def __post_init__(self) -> None:
        if self.scale is not None and (self.scale <= 0 or math.frexp(self.scale)[0] != 0.5):
            raise ValueError(f"the scale {self.scale} is no power of two")

    def sites(self, program: Program) -> Iterator[Stream]:
        for region in self._streams(program):
            factor, measured = self._factor(region)
            if factor != 1.0:
                nodes = tuple(dict.fromkeys(use.node for use in region.norms))
                yield Stream(region.seed.name or "", nodes, region, factor, measured)

    def calibrates(self, program: Program) -> Iterator[str]:
        """The norms' inputs."""
        if self.scale is None:
            for region in self._streams(program):
                yield from dict.fromkeys(use.value.name or "" for use in region.norms)

    def _streams(self, program: Program) -> Iterator[Region]:
        seen: set[ir.Node] = set()
        for norm in [node for node in program.model.graph if is_operator(node, *NORMS)]:
            value = norm.inputs[0] if norm.graph is not None and norm.inputs else None
            if value is None or norm in seen:
                continue
            region = grow_scaled(value, len(shape_of(value) or ()) - 1)
            seen.update(use.node for use in region.norms)
            done = any(step["pass"] == self.name for step in steps(program.relations.get(value.name or "")))
            if not done and region.norms:
                yield region

    def _factor(self, region: Region) -> tuple[float, bool]:
        """s, and whether it was chosen from what was measured; at most 1."""
        seen = [(self.statistics or {}).get(use.value.name or "") for use in region.norms]
        squares = [float(np.square(one.magnitude).sum()) for one in seen if one is not None]
        if self.scale is not None or not squares:
            return self.scale or UNMEASURED, False
        largest = max(squares)
        if largest <= self.largest:
            return 1.0, True
        return 2.0 ** math.floor(0.5 * math.log2(self.largest / largest)), True

    def rewrite(self, site: Stream, change: Change) -> None:
        scaling = Scaling(np.full(site.region.size, site.factor))
        for use in site.writers:
            change.absorb(
                use, Transformed(weight_behind(use.value), scaling, use.axis), "scaled", key=(scaling.key, use.axis)
            )
        holding = {use: factor for factor in site.factors.values() for use in factor.constants}
        for use, factor in holding.items():
            change.absorb(use, factor.behind(use, scaling.dual), "unscaled", key=(scaling.dual.key, use.axis))
        for value in dict.fromkeys(value for factor in site.factors.values() for value in factor.values):
            change.rename(value, "unscaled")
        for norm in site.norms:
            epsilon = float(norm_attributes(norm)["epsilon"]) * site.factor**2
            norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
            change.stamp(norm)
        for value, axis in site.region.axes.items():
            change.relate(value, scaling, axis)
        chosen = "" if site.measured or self.scale is not None else ", chosen without data"
        change.notes.append(f"{len(site.norms)} norms read it {site.factor:g} times as large{chosen}")
