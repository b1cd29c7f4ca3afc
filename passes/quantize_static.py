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
from rewrite.ir.edit import is_operator, only_use, shape_of
from rewrite.ir.program import Program
from rewrite.quantize.observers import METHODS, Histogram, activation_parameters
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

LARGEST_BIAS = 1 << 30
"""Steps of a bias that leave room in 32 bits for the sums that it is added to."""

COMMUTING = ("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "MaxPool")
"""Operators that pick and order numbers: codes pass them as the numbers do."""


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
    if is_operator(site.reader, "Conv") and (result := _last(site.reader)).is_graph_output():
        return Breach(site.reader, f"its result {result.name} is an output of the network")
    return None


def _measured(rule: QuantizeStatic, site: WeightSite) -> Breach | None:
    for value in _values(site):
        if _known(value) is None and value.name not in (rule.statistics or {}):
            return Breach(site.reader, f"the range of {value.name} was not measured: give data to calibrate on")
    return None


def _values(site: WeightSite) -> list[ir.Value]:
    """What is quantized beside the weight."""
    return [site.operand, *([_last(site.reader)] if is_operator(site.reader, "Conv") else [])]


def _last(convolution: ir.Node) -> ir.Value:
    """The result of a convolution, or of the activation that alone reads it and that its kernel computes too."""
    reader = only_use(convolution.outputs[0])
    return reader.outputs[0] if is_operator(reader, "Relu", "Clip") else convolution.outputs[0]


def _known(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The scale and zero point of a value whose numbers are dequantized ones: rounding them again changes nothing."""
    node = value.producer()
    while node is not None and is_operator(node, *COMMUTING) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if not is_operator(node, "DequantizeLinear") or node.inputs[0] is None or is_constant(node.inputs[0]):
        return None
    scale, point = node.inputs[1:3]
    return None if scale is None or point is None else (scale, point)


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
        rounded, (scale, point) = self._codes(site.operand, change, before=site.reader)
        operands = [rounded, codes, scale, scales, point, None, bias]
        product = edit.node(
            "MatMulIntegerToFloat", operands[: 5 if bias is None else 7],
            domain="com.microsoft", before=last, name=f"{result.name}.quantized", like=result, dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        edit.take_over(result, product)

    def _convolution(self, site: WeightSite, change: Change) -> None:
        """Conv between DQ and Q."""
        node = site.reader
        operand, scale = self._rounded(site.operand, change, before=node)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        vector = None if bias is None else weight_behind(bias).numpy()
        least = None if vector is None else np.abs(vector) / (scale * LARGEST_BIAS)
        weight, scales = self._filters(site, change, least)
        if bias is not None and vector is not None:
            node.replace_input_with(2, self._bias(bias, vector, scale, scales, change, node))
        node.replace_input_with(0, operand)
        node.replace_input_with(1, weight)
        change.stamp(node)
        result = _last(node)
        read = [(use.node, use.idx) for use in result.uses()]
        rounded, _ = self._rounded(result, change, before=_next(result))
        for reader, position in read:
            reader.replace_input_with(position, rounded)

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

    def _codes(self, value: ir.Value, change: Change, *, before: ir.Node) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        """Q(value) with its scale and zero point, made once for all that read it."""
        edit, name = change.editor, value.name or ""
        made, parameters = value.producer(), _known(value)
        if parameters is not None and is_operator(made, "DequantizeLinear") and made.inputs[0] is not None:
            return made.inputs[0], parameters
        if f"{name}.quantized" not in edit.made:
            scale, point = parameters or self._parameters(name, change)
            edit.made[f"{name}.quantized"] = edit.node(
                "QuantizeLinear", [value, scale, point],
                before=before, name=f"{name}.quantized", dtype=ir.DataType.UINT8, shape=value.shape,
            )  # fmt: skip
            edit.made[f"{name}.scale"], edit.made[f"{name}.zero_point"] = scale, point
        return edit.made[f"{name}.quantized"], (edit.made[f"{name}.scale"], edit.made[f"{name}.zero_point"])

    def _rounded(self, value: ir.Value, change: Change, *, before: ir.Node) -> tuple[ir.Value, float]:
        """DQ(Q(value)), made once for all that read it, and the scale; the value itself where it is that."""
        edit, name = change.editor, value.name or ""
        codes, parameters = self._codes(value, change, before=before)
        scale = float(weight_behind(parameters[0]).numpy())
        if is_operator(value.producer(), "DequantizeLinear"):
            return value, scale
        if f"{name}.dequantized" not in edit.made:
            edit.made[f"{name}.dequantized"] = edit.node(
                "DequantizeLinear", [codes, *parameters], before=before, name=f"{name}.dequantized", like=value
            )
        return edit.made[f"{name}.dequantized"], scale

    def _parameters(self, name: str, change: Change) -> tuple[ir.Value, ir.Value]:
        histogram = (self.statistics or {})[name]
        scale, point = activation_parameters(histogram, bits=8, signed=False, symmetric=False, method=self.calibration)
        return (
            change.editor.initializer(f"{name}.scale", np.array(scale, np.float32)),
            change.editor.initializer(f"{name}.zero_point", np.array(point, np.uint8)),
        )


def _next(value: ir.Value) -> ir.Node:
    """The node that stands behind the one that makes `value`."""
    node = value.producer()
    following = iter(node.graph or ()) if node is not None else iter(())
    for each in following:
        if each is node:
            break
    found = next(following, None)
    if found is None:
        raise ValueError(f"nothing reads {value.name}")
    return found
