"""Add, join and pool in int8 what is int8 already.

      y = f(x₁, …, xₙ)      every xₖ is dequantized codes, the range of y was measured
    ────────────────────────────────────────────────────────────────────────────────────
      y ≈ DQ(Q(f(x₁, …, xₙ); t, z))

f is one of `operators`: a sum, a concatenation or a pool, and if asked for, a product, LeakyRelu, Sigmoid or Softmax.
The runtime puts its integer kernel in the place of DQ, f and Q, so that a residual stream between convolutions stays in
bytes. That rounds every sum once more, so `int8-static` leaves it and `integer` does it. Whatever has an operand in
floating point stays, since quantizing that one would cost more than it saves; norms have no integer kernel.

Shapes    those of f; t, z numbers
Relation  an approximation site for each y
Source    Jacob et al. 2018, arXiv:1712.05877, appendix A.2; onnx, QuantizeLinear and DequantizeLinear
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from rewrite.ir.edit import is_operator
from rewrite.ir.program import Program
from rewrite.quantize.observers import METHODS, Histogram
from rewrite.quantize_rule import kernel
from rewrite.rule import Breach, Change, Pass, Requirement, Site
from rewrite.static_rule import COMMUTING, Ranges, known_parameters, result_of

DEFAULT = ("Add", "Concat", "AveragePool", "GlobalAveragePool")
INTEGER = (*DEFAULT, "Mul", "LeakyRelu", "Sigmoid", "Softmax")
"""Operators that have an integer kernel for codes with scales."""


@dataclass(frozen=True)
class OperatorSite(Site):
    """An operator between codes."""

    node: ir.Node

    @property
    def operands(self) -> list[ir.Value]:
        return [value for value in self.node.inputs if value is not None]


def _in_codes(rule: QuantizeOperators, site: OperatorSite) -> Breach | None:
    if (held := site.node.outputs[0].dtype) != ir.DataType.FLOAT:
        return Breach(site.node, f"it computes in {str(held).lower()}")
    plain = next((value for value in site.operands if known_parameters(value) is None), None)
    return None if plain is None else Breach(site.node, f"{plain.name} is in floating point")


def _inside(rule: QuantizeOperators, site: OperatorSite) -> Breach | None:
    for value in (site.node.outputs[0], result_of(site.node)):
        if value.is_graph_output():
            return Breach(site.node, f"its result {value.name} is an output of the network")
    return None


def _measured(rule: QuantizeOperators, site: OperatorSite) -> Breach | None:
    if not rule.ranges.knows(result := result_of(site.node)):
        return Breach(site.node, f"the range of {result.name} was not measured: give data to calibrate on")
    return None


@dataclass(frozen=True)
class QuantizeOperators(Pass[OperatorSite]):
    """Sums, concatenations and pools between int8 convolutions become int8 too.

    `operators` of `INTEGER`; `calibration`: "min-max", "percentile", "mse" or "entropy". `kernels`: what the target
    has. `statistics`: what calibration measured.
    """

    operators: tuple[str, ...] = DEFAULT
    calibration: str = "percentile"
    kernels: frozenset[str] | None = None
    statistics: Mapping[str, Histogram] | None = None

    name: ClassVar[str] = "quantize-operators"
    approximates: ClassVar[bool] = True
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "it is float32, and all its operands are dequantized codes", _in_codes),
        Requirement("R2", "what it makes is no output of the network", _inside),
        Requirement("R3", "the target has such kernels", kernel("static")),
        Requirement("R4", "the range of its result was measured", _measured),
    )

    def __post_init__(self) -> None:
        if self.calibration not in METHODS:
            raise TypeError(f"no calibration {self.calibration!r}: one of {', '.join(METHODS)}")
        if unknown := [name for name in self.operators if name not in INTEGER]:
            raise TypeError(f"no integer kernel for {unknown[0]}: operators are {', '.join(INTEGER)}")
        object.__setattr__(self, "operators", tuple(self.operators))

    @property
    def ranges(self) -> Ranges:
        return Ranges(self.statistics, self.calibration)

    def sites(self, program: Program) -> Iterator[OperatorSite]:
        """Operators with codes among their operands; the result of one makes a site of the next."""
        for node in list(program.model.graph):
            if is_operator(node, *self.operators):
                site = OperatorSite(result_of(node).name or "", (node,), node)
                if any(known_parameters(value) is not None for value in site.operands):
                    yield site

    def observes(self, program: Program) -> dict[str, Histogram]:
        """Histograms of the results of what will have nothing but codes for operands."""
        coded: set[ir.Value] = set()
        for node in program.model.graph:
            operands = [value for value in node.inputs if value is not None]
            if is_operator(node, *COMMUTING):
                operands = operands[:1]
            elif not is_operator(node, *self.operators):
                continue
            if operands and all(value in coded or known_parameters(value) is not None for value in operands):
                coded.add(result_of(node))
        return {value.name or "": Histogram() for value in coded if not is_operator(value.producer(), *COMMUTING)}

    def rewrite(self, site: OperatorSite, change: Change) -> None:
        for position, value in enumerate(site.node.inputs):
            if value is not None:
                site.node.replace_input_with(position, self.ranges.rounded(value, change.editor)[0])
        change.stamp(site.node)
        result = result_of(site.node)
        self.ranges.round_result(result, change.editor)
        change.notes.append(f"{site.node.op_type} in int8")
