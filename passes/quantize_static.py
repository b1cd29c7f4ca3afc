"""Multiply and convolve in int8, with ranges of the activations measured beforehand.

      y = x·W + b, or conv(x, W) + b      W, b constants      the range of x (and of a convolution's y) was measured
    ────────────────────────────────────────────────────────────────────────────────────────────────────────────────
      y ≈ x̂·Ŵ + b      x̂ = DQ(Q(x; t, z)),  Ŵ = DQ(q; s) with a scale s for each column or filter,  q in −127 … 127

A product of matrices is written as the integer kernel that it is. Around a convolution Q and DQ stand as ONNX has
them, and the runtime puts its integer kernel in their place: that needs the result quantized too, behind the Relu or
Clip that it runs into, and the bias as int32 with the scales t·s. A value that several read is quantized once. Sums,
norms, softmax and the network's outputs stay in floating point. Pairs of codes stay within what processors without
VNNI add exactly.

`calibration` chooses t and z from the measured histogram: its ends ("min-max"), its ends without the share of
outliers ("percentile"), the least squared error ("mse") or the least Kullback-Leibler divergence ("entropy").

Shapes    x (..., K)   W (K, N)   s, b (N,); x (N, C, …)   W (M, C/groups, …)   s, b (M,)   t, z numbers
Relation  an approximation site for each weight, each bias of a convolution, and each value that is quantized
Source    Jacob et al. 2018, arXiv:1712.05877; onnx, QuantizeLinear and DequantizeLinear
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.ir.constants import is_constant, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.quantize.observers import METHODS, Histogram
from rewrite.quantize_rule import (
    ACCUMULATES,
    CONSTANT,
    FLOAT32,
    LARGE,
    WeightSite,
    added_vector,
    int8_weight,
    kernel,
    matrix_on_the_right,
    weight_sites,
)
from rewrite.rule import Breach, Change, Pass, Requirement
from rewrite.static_rule import Ranges, result_of

LARGEST_BIAS = 1 << 30
"""Steps of a bias that leave room in 32 bits for the sums that it is added to."""


def _product(rule: QuantizeStatic, site: WeightSite) -> Breach | None:
    node = site.reader
    if not is_operator(node, "Conv"):
        return matrix_on_the_right(rule, site)
    if site.position != 1:
        return Breach(node, "it is what is convolved, not the filters")
    if len(node.inputs) > 2 and node.inputs[2] is not None and not is_constant(node.inputs[2]):
        return Breach(node, "its bias is no constant")
    return None


def _inside(rule: QuantizeStatic, site: WeightSite) -> Breach | None:
    if is_operator(site.reader, "Conv") and (result := result_of(site.reader)).is_graph_output():
        return Breach(site.reader, f"its result {result.name} is an output of the network")
    return None


def _measured(rule: QuantizeStatic, site: WeightSite) -> Breach | None:
    for value in _values(site):
        if not rule.ranges.knows(value):
            return Breach(site.reader, f"the range of {value.name} was not measured: give data to calibrate on")
    return None


def _values(site: WeightSite) -> list[ir.Value]:
    """What is quantized beside the weight."""
    return [site.operand, *([result_of(site.reader)] if is_operator(site.reader, "Conv") else [])]


@dataclass(frozen=True)
class QuantizeStatic(Pass[WeightSite]):
    """Products of matrices and convolutions become int8, with ranges of the activations that calibration measured.

    `calibration` as above; `clip`: weights' scales that clip where that errs less; `saturation_free`: keep pairs of
    codes within what processors without VNNI add exactly. `minimum` entries of a weight are worth it; `keep` are
    patterns of weights' names that stay. `kernels`: what the target has.
    `statistics`: what calibration measured.
    """

    calibration: str = "percentile"
    clip: bool = True
    saturation_free: bool = True
    minimum: int = 256
    keep: tuple[str, ...] = ()
    kernels: frozenset[str] | None = None
    statistics: Mapping[str, Histogram] | None = None

    name: ClassVar[str] = "quantize-static"
    approximates: ClassVar[bool] = True
    requires: ClassVar[tuple[Requirement, ...]] = (
        CONSTANT,
        Requirement("R2", "a product of matrices or a convolution reads it, on the right", _product),
        *(FLOAT32, LARGE, ACCUMULATES),
        Requirement("R6", "what it makes is no output of the network", _inside),
        Requirement("R7", "the target has such kernels", kernel("static")),
        Requirement("R8", "the ranges of the activations were measured", _measured),
    )

    def __post_init__(self) -> None:
        if self.calibration not in METHODS:
            raise TypeError(f"no calibration {self.calibration!r}: one of {', '.join(METHODS)}")
        object.__setattr__(self, "keep", tuple(self.keep))

    @property
    def ranges(self) -> Ranges:
        return Ranges(self.statistics, self.calibration)

    def sites(self, program: Program) -> Iterator[WeightSite]:
        yield from weight_sites(program)

    def observes(self, program: Program) -> dict[str, Histogram]:
        """Histograms of what is quantized."""
        checks = [requirement for requirement in self.requires if requirement.id != "R8"]
        wanted = [site for site in self.sites(program) if not any(each.check(self, site) for each in checks)]
        return {value.name or "": Histogram() for site in wanted for value in _values(site)}

    def rewrite(self, site: WeightSite, change: Change) -> None:
        if is_operator(site.reader, "Conv"):
            self._convolution(site, change)
        else:
            self._product(site, change)

    def _product(self, site: WeightSite, change: Change) -> None:
        """Q(x)·q in integers, with the scales and b behind."""
        edit, added = change.editor, added_vector(site.reader)
        last, bias = (site.reader, None) if added is None else added
        result = last.outputs[0]
        codes, scales = int8_weight(site, change, clip=self.clip, saturation_free=self.saturation_free)
        rounded, (scale, point) = self.ranges.codes(site.operand, edit)
        operands = [rounded, codes, scale, scales, point, None, bias]
        product = edit.node(
            "MatMulIntegerToFloat", operands[: 5 if bias is None else 7],
            domain="com.microsoft", before=last, name=f"{result.name}.quantized", like=result, dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        edit.take_over(result, product)

    def _convolution(self, site: WeightSite, change: Change) -> None:
        """Conv between DQ and Q."""
        node = site.reader
        operand, scale = self.ranges.rounded(site.operand, change.editor)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        vector = None if bias is None else weight_behind(bias).numpy()
        least = None if vector is None else np.abs(vector) / (scale * LARGEST_BIAS)
        weight, scales = self._filters(site, change, least)
        if bias is not None and vector is not None:
            node.replace_input_with(2, self._bias(bias, vector, scale, scales, change, node))
        node.replace_input_with(0, operand)
        node.replace_input_with(1, weight)
        change.stamp(node)
        self.ranges.round_result(result_of(node), change.editor)

    def _filters(self, site: WeightSite, change: Change, least: np.ndarray | None) -> tuple[ir.Value, np.ndarray]:
        """DQ(q), and its scales."""
        edit = change.editor
        codes, scales = int8_weight(site, change, clip=self.clip, saturation_free=self.saturation_free, least=least)
        points = edit.initializer(f"{codes.name}.zero_points", np.zeros(shape_of(scales) or (), np.int8))
        weight = edit.node(
            "DequantizeLinear", [codes, scales, points], {"axis": 0},
            before=site.reader, name=f"{site.name}.dequantized", dtype=ir.DataType.FLOAT, shape=codes.shape,
        )  # fmt: skip
        return weight, weight_behind(scales).numpy()

    def _bias(
        self, bias: ir.Value, vector: np.ndarray, scale: float, scales: np.ndarray, change: Change, node: ir.Node
    ) -> ir.Value:
        """DQ of the bias (M,) as int32 with the scales of the sums it is added to."""
        edit = change.editor
        steps = (np.float32(scale) * scales.astype(np.float32)).astype(np.float32)
        codes = np.rint(vector / steps.astype(np.float64)).astype(np.int32)
        parameters = [
            edit.initializer(f"{bias.name}.codes", codes),
            edit.initializer(f"{bias.name}.scales", steps),
            edit.initializer(f"{bias.name}.zero_points", np.zeros(len(codes), np.int32)),
        ]
        change.changed[parameters[0].name or ""] = bias.name or ""
        return edit.node(
            "DequantizeLinear", parameters, {"axis": 0}, before=node, name=f"{bias.name}.dequantized", like=bias
        )
