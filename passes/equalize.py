"""Give the channels between two layers ranges that both layers' weights share evenly.

      h = xW₁ + b      f positively homogeneous: f(hD) = f(h)D for D > 0      all readers of f(h) are f(h)·W₂
    ────────────────────────────────────────────────────────────────────────────────────────────────────────────
      f(xW₁ + b)·W₂  =  f(x(W₁·diag(1/s)) + b⊘s)·(diag(s)W₂)                       s_j = √(max|W₁_j| / max|W₂_j|)

f is ReLU, LeakyReLU, PReLU, pooling, a sum with other such values, layout, or nothing; and act(g)⊙u for u alone, so
that the up branch of a gated MLP is equalized with the down projection and the gate stays, also where one matrix writes
both and a Split parts them. Kernels of Conv (grouped and depthwise too), ConvTranspose and a frozen BatchNorm's γ and β
are such constants as well: a diagonal passes zero padding. Where a channel of W₁ or W₂ is all zero, s is 1. A value
that is equalized is not equalized again. Where the value in front of a matrix W₂ was measured, max|f(h)_j| stands for
max|W₁_j|: outliers of a gated MLP come of products, and no weight shows them.

Shapes    x (..., k)   W₁ (k, d)   b, s (d,)   W₂ (d, n)
Relation  equal over the reals; every value between W₁ and W₂ is the original's times diag(1/s)
Source    Nagel et al. 2019, arXiv:1906.04721, §4.1; measured, Xiao et al. 2022, arXiv:2211.10438, eq. 4, α = ½
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.regions import Cause, Region, Use
from rewrite.basis.scaling import (
    Factor,
    Part,
    channel_maxima,
    factor_of,
    factors_of,
    grow_scaled,
    part_of,
    read_besides,
)
from rewrite.ir.constants import is_constant, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.ir.statistics import Statistics
from rewrite.ir.weights import Transformed
from rewrite.proof.transforms import Scaling
from rewrite.rule import Breach, Change, Pass, Requirement, Site, read_elsewhere, steps

CONTRACTIONS = ("MatMul", "Conv", "ConvTranspose")


@dataclass(frozen=True)
class Between(Site):
    """The values between what writes and what reads them, as one region; and what they are a part of, if they are."""

    region: Region
    part: Part | None

    @property
    def regions(self) -> tuple[Region, ...]:
        """The values, and the wider ones that they are a part of."""
        return (self.region,) if self.part is None else (self.region, self.part.whole)

    @property
    def factors(self) -> dict[ir.Node, Factor]:
        """What every reader multiplies the values with."""
        return factors_of(self.region)

    @property
    def constants(self) -> list[Use]:
        """All constants that absorb 1/s."""
        return [use for region in self.regions for use in region.constants]

    @property
    def writers(self) -> tuple[Use, ...]:
        """The constants whose ranges count: matrices, kernels, tables and a BatchNorm's γ; no biases."""
        found: list[Use] = []
        for use in self.constants:
            scales = use.node.op_type == "BatchNormalization" and use.position == 1
            if scales or len(weight_behind(use.value).shape) > 1:
                found.append(use)
        return tuple(found)


def _met(site: Between, cause: Cause) -> Breach | None:
    return next((Breach.at(met) for region in site.regions if (met := region.met(cause)) is not None), None)


def _all_homogeneous(rule: Equalize, site: Between) -> Breach | None:
    for use in () if site.part is None else site.part.whole.readers:
        return Breach(use.node, f"{use.node.op_type} reads the values together with others")
    return _met(site, Cause.OPERATOR)


def _hidden_from_outside(rule: Equalize, site: Between) -> Breach | None:
    return _met(site, Cause.INTERFACE)


def _own_constants(rule: Equalize, site: Between) -> Breach | None:
    return _met(site, Cause.OVERRIDABLE)


def _no_norm(rule: Equalize, site: Between) -> Breach | None:
    for region in site.regions:
        for node in (*(use.node for use in region.norms), *region.writing_norms):
            return Breach(node, f"{node.op_type} is tied to the values, and no layer that shares their range")
    return None


def _constant_readers(rule: Equalize, site: Between) -> Breach | None:
    for use in site.region.readers:
        if factor_of(use) is None:
            return Breach(use.node, f"{use.node.op_type} multiplies the values with something that is not a constant")
    return None


def _two_layers(rule: Equalize, site: Between) -> Breach | None:
    # Where growth was stopped, what writes the values was not looked for.
    stopped = any(region.obstructions or region.writing_norms for region in site.regions)
    if not site.writers and not stopped:
        return Breach(site.nodes[0], "no matrix or kernel writes the values that it reads")
    return None


def _unshared(rule: Equalize, site: Between) -> Breach | None:
    for use in site.writers:
        if (other := read_elsewhere(use, site.constants)) is not None:
            return Breach(other, f"{use.value.name} is also read here, and would have to be copied")
    met = read_besides(site.factors)
    return None if met is None else Breach(met[0], f"{met[1].name} is also read here, and would have to be copied")


@dataclass(frozen=True)
class Equalize(Pass[Between]):
    """Weights on both sides of a positively homogeneous function get the same range, channel by channel.

    `powers_of_two`: choose s among powers of two, so that nothing is rounded. `statistics`: the ranges measured of what
    matrices read; without them the weights on both sides say what to expect.
    """

    powers_of_two: bool = False
    statistics: Statistics | None = None

    name: ClassVar[str] = "equalize"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "all that stands between the layers is positively homogeneous", _all_homogeneous),
        Requirement("R2", "no input or output of the graph is among the values", _hidden_from_outside),
        Requirement("R3", "the constants that write them cannot be overridden", _own_constants),
        Requirement("R4", "no norm reads or writes the values", _no_norm),
        Requirement("R5", "every reader contracts them with a constant", _constant_readers),
        Requirement("R6", "a matrix or a kernel writes them", _two_layers),
        Requirement("R7", "no matrix or kernel is read by anyone else", _unshared),
    )

    def sites(self, program: Program) -> Iterator[Between]:
        seen: set[str] = set()
        for node in [node for node in program.model.graph if is_operator(node, *CONTRACTIONS)]:
            value = node.inputs[0] if node.graph is not None else None
            if value is None or is_constant(value) or value.is_graph_input() or (name := value.name or "") in seen:
                continue
            rank = len(shape_of(value) or ())
            axis = rank - 1 if node.op_type == "MatMul" else 1
            if factor_of(Use(node, 0, axis)) is None:
                continue
            region = grow_scaled(value, axis)
            part = part_of(region)
            seen.update(value.name or "" for value in region.axes)
            by_norms = bool(region.writing_norms) and not region.constants and part is None
            done = any(step["pass"] == self.name for step in steps(program.relations.get(name)))
            if not by_norms and not done:
                wider = [] if part is None else part.whole.constants
                uses = (*region.constants, *wider, *region.readers)
                nodes = tuple(dict.fromkeys((*(use.node for use in uses), node)))
                yield Between(name, nodes, region, part)

    def calibrates(self, program: Program) -> Iterator[str]:
        """What is to be measured: values whose channels are their last axis."""
        for site in self.sites(program):
            axes = {value.name: (axis, len(shape_of(value) or ())) for value, axis in site.region.axes.items()}
            axis, rank = axes.get(site.name, (0, 0))
            if axis == rank - 1:
                yield site.name

    def rewrite(self, site: Between, change: Change) -> None:
        region, written, read = site.region, np.zeros(site.region.size), np.zeros(site.region.size)
        measured = (self.statistics or {}).get(site.name)
        for use in site.writers if measured is None else ():
            found = channel_maxima(weight_behind(use.value), use.axis)
            if site.part is not None and use in site.part.whole.constants:
                found = found[site.part.offset : site.part.offset + region.size]
            written = np.maximum(written, found)
        if measured is not None:
            written = measured.magnitude
        for factor in site.factors.values():
            read = np.maximum(read, factor.maxima(region.size))
        alive = (written > 0) & (read > 0)
        divisor = np.ones(region.size)
        divisor[alive] = np.sqrt(written[alive] / read[alive])
        if self.powers_of_two:
            divisor = np.exp2(np.rint(np.log2(divisor)))
        spread(site, change, divisor)
        change.notes.append(f"{region.size} channels, scales up to {float(divisor.max() / divisor.min()):.3g} apart")


def spread(site: Between, change: Change, divisor: np.ndarray) -> None:
    """f(h)′ = f(h)⊘divisor (d,), undone by everything that reads it."""
    scaling = Scaling(divisor)
    for within in site.regions:
        inner = scaling if within is site.region else Scaling(site.part.widened(divisor) if site.part else divisor)
        for use in within.constants:
            weight = Transformed(weight_behind(use.value), inner.dual, use.axis)
            change.absorb(use, weight, "equalized", key=(inner.dual.key, use.axis))
        for value, axis in within.axes.items():
            change.relate(value, inner.dual, axis)
    holding = {use: factor for factor in site.factors.values() for use in factor.constants}
    for use, factor in holding.items():
        change.absorb(use, factor.behind(use, scaling), "equalized", key=(scaling.key, use.axis))
    for value in dict.fromkeys(value for factor in site.factors.values() for value in factor.values):
        change.rename(value, "equalized")
