"""Multiply in int8, with the range of the activations taken from each of them as it comes.

      y = x·W + b      W a constant (K, N), b a constant (N,) or nothing
    ──────────────────────────────────────────────────────────────────────  Ŵ[k, n] = q[k, n]·s[n],  q in −127 … 127
      y ≈ x̂·Ŵ + b      x̂ = (u − z)·t,  u uint8, t and z from min x and max x

An approximation, declared twice: the matrix, and what is multiplied with it. Weights are signed, since the kernel for
unsigned ones takes twice as long. Processors without VNNI add the products of two neighbours along K in 16 bits, which
saturate beyond |q₀| + |q₁| = 128 of one sign: scales grow by as little as keeps every such pair within.

Shapes    x (..., K)   W, Ŵ (K, N)   s, b (N,)   t, z one number for all of x
Relation  two approximation sites for each product
Source    onnxruntime, docs/ContribOperators.md, com.microsoft.DynamicQuantizeMatMul; onnx, DynamicQuantizeLinear
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from rewrite.ir.program import Program
from rewrite.quantize_rule import (
    ACCUMULATES,
    CONSTANT,
    FLOAT32,
    LARGE,
    MATRIX,
    WeightSite,
    added_vector,
    int8_weight,
    kernel,
    weight_sites,
)
from rewrite.rule import Change, Pass, Requirement


@dataclass(frozen=True)
class QuantizeDynamic(Pass[WeightSite]):
    """Products of matrices become int8, with dynamic ranges of the activations.

    `per_channel`: a scale for every column of the weight, else one for all. `clip`: scales that clip where that errs
    less. `saturation_free`: keep pairs of codes within what processors without VNNI add exactly. `minimum` entries of a
    weight are worth it; `keep` are patterns of weights' names that stay. `kernels`: what the target has.
    """

    per_channel: bool = True
    clip: bool = True
    saturation_free: bool = True
    minimum: int = 4096
    keep: tuple[str, ...] = ()
    kernels: frozenset[str] | None = None

    name: ClassVar[str] = "quantize-dynamic"
    approximates: ClassVar[bool] = True
    requires: ClassVar[tuple[Requirement, ...]] = (
        *(CONSTANT, MATRIX, FLOAT32, LARGE, ACCUMULATES),
        Requirement("R6", "the target has such a kernel", kernel("dynamic")),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))

    def sites(self, program: Program) -> Iterator[WeightSite]:
        yield from weight_sites(program)

    def rewrite(self, site: WeightSite, change: Change) -> None:
        codes, scales = int8_weight(
            site, change, per_channel=self.per_channel, clip=self.clip, saturation_free=self.saturation_free
        )
        edit, added = change.editor, added_vector(site.reader)
        last, bias = (site.reader, None) if added is None else added
        result = last.outputs[0]
        product = edit.node(
            "DynamicQuantizeMatMul", [site.operand, codes, scales, None, bias][: 3 if bias is None else 5],
            domain="com.microsoft", before=last, name=f"{result.name}.quantized", like=result, dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        edit.take_over(result, product)
