"""Codes of activations whose ranges are known: what the passes share that place QuantizeLinear and DequantizeLinear.

      x  ≈  x̂ = DQ(Q(x; t, z))        one scale t and one zero point z, codes in uint8

A value is quantized once, behind what makes it, and all that take codes read those. Numbers that were dequantized are
given their own scale and zero point: rounding them again changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewrite.ir.constants import is_constant, weight_behind
from rewrite.ir.edit import Editor, constant_of, is_operator, only_use
from rewrite.quantize.observers import Histogram, activation_parameters

Parameters = tuple[ir.Value, ir.Value]
"""A scale and a zero point."""

COMMUTING = ("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "MaxPool")
"""Operators that pick and order numbers: codes pass them as the numbers do."""


def known_parameters(value: ir.Value) -> Parameters | None:
    """The scale and zero point of a value that is dequantized codes, or that was quantized before."""
    node = value.producer()
    while node is not None and is_operator(node, *COMMUTING) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if (found := _dequantized(node)) is not None:
        return found
    return None if (quantizer := _quantizer(value)) is None else _parameters_at(quantizer)


def result_of(node: ir.Node) -> ir.Value:
    """What a node computes, behind the Relu or Clip that alone reads it and that integer kernels compute too."""
    reader = only_use(node.outputs[0])
    return reader.outputs[0] if is_operator(reader, "Relu", "Clip") else node.outputs[0]


@dataclass(frozen=True)
class Ranges:
    """What calibration measured, and the method that chooses scales by it (`rewrite.quantize.observers`)."""

    statistics: Mapping[str, Histogram] | None
    calibration: str

    def knows(self, value: ir.Value) -> bool:
        """Whether a scale can be chosen for a value, or is chosen already."""
        return value.name in (self.statistics or {}) or known_parameters(value) is not None

    def codes(self, value: ir.Value, edit: Editor) -> tuple[ir.Value, Parameters]:
        """Q(x) with its scale and zero point."""
        made = value.producer()
        if (found := _dequantized(made)) is not None and made is not None and made.inputs[0] is not None:
            return made.inputs[0], found
        if (quantizer := _quantizer(value)) is not None and (found := _parameters_at(quantizer)) is not None:
            return quantizer.outputs[0], found
        parameters, name = known_parameters(value) or self._chosen(value, edit), f"{value.name}.quantized"
        codes = edit.node(
            "QuantizeLinear", [value, *parameters],
            before=_following(value), name=name, dtype=ir.DataType.UINT8, shape=value.shape,
        )  # fmt: skip
        return codes, parameters

    def rounded(self, value: ir.Value, edit: Editor) -> tuple[ir.Value, float]:
        """x̂ and its scale; the value itself where it is dequantized codes."""
        codes, parameters = self.codes(value, edit)
        scale = float(weight_behind(parameters[0]).numpy())
        made = value.producer()
        if made is not None and codes is made.inputs[0]:
            return value, scale
        for use in codes.uses():
            if is_operator(use.node, "DequantizeLinear") and tuple(use.node.inputs[1:3]) == parameters:
                return use.node.outputs[0], scale
        name = f"{value.name}.dequantized"
        return edit.node(
            "DequantizeLinear", [codes, *parameters], before=_following(codes), name=name, like=value
        ), scale

    def round_result(self, value: ir.Value, edit: Editor) -> None:
        """Let all that reads a value read x̂."""
        readers = [(use.node, use.idx) for use in value.uses() if use.node is not _quantizer(value)]
        rounded, _ = self.rounded(value, edit)
        for reader, position in readers:
            reader.replace_input_with(position, rounded)

    def _chosen(self, value: ir.Value, edit: Editor) -> Parameters:
        histogram = (self.statistics or {})[value.name or ""]
        scale, point = activation_parameters(histogram, bits=8, signed=False, symmetric=False, method=self.calibration)
        return (
            edit.initializer(f"{value.name}.scale", np.array(scale, np.float32)),
            edit.initializer(f"{value.name}.zero_point", np.array(point, np.uint8)),
        )


def _dequantized(node: ir.Node | None) -> Parameters | None:
    """The parameters of a node that dequantizes codes that are no constant."""
    if not is_operator(node, "DequantizeLinear") or node.inputs[0] is None or is_constant(node.inputs[0]):
        return None
    return _parameters_at(node)


def _parameters_at(node: ir.Node) -> Parameters | None:
    """The scale and zero point that a node reads, where they are one of each, constants, and those of uint8."""
    scale, point = (*node.inputs[1:3], None, None)[:2]
    tensors = constant_of(scale), constant_of(point)
    if scale is None or point is None or any(tensor is None or tensor.size != 1 for tensor in tensors):
        return None
    return (scale, point) if point.dtype == ir.DataType.UINT8 else None


def _quantizer(value: ir.Value) -> ir.Node | None:
    """The node that quantizes a value already."""
    found = (use.node for use in value.uses() if is_operator(use.node, "QuantizeLinear") and use.idx == 0)
    return next((node for node in found if _parameters_at(node) is not None), None)


def _following(value: ir.Value) -> ir.Node:
    """The node that stands behind the one that makes `value`; the first one for a graph input."""
    node, graph = value.producer(), value.graph
    nodes = iter(graph or ())
    if node is not None:
        next(each for each in nodes if each is node)
    found = next(nodes, None)
    if found is None:
        raise ValueError(f"nothing reads {value.name}")
    return found


__all__ = ["COMMUTING", "Ranges", "known_parameters", "result_of"]
