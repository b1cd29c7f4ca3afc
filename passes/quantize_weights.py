"""Store the matrices that activations are multiplied with in few bits, each block of rows with a scale of its own.

      y = x·W      W a constant (K, N)
    ────────────────────────────────────────────────────────────  Ŵ[k, n] = (q[k, n] − z[g, n])·s[g, n],  g = ⌊k/block⌋
      y ≈ x·Ŵ, or x·Ŵ + (x·A)·B with a correction of low rank

An approximation, declared: erasing the codes leaves the network it was made from. By `method` the codes are the nearest
ones ("nearest"), the nearest for scales that clip where that errs less ("clipped"), or chosen one row after another so
that what earlier rows err is made up for on the calibration data ("gptq": min ‖X(W − Ŵ)‖). "best" is gptq with data
and clipped without.

`accuracy_level` 0 multiplies in float32; 4 lets the kernel round the activations too, to int8 by row and block, which
is declared like the rest. Without it 8 and 2 bits have no kernel worth having.

Shapes    x (..., K)   W, Ŵ (K, N)   s, z (⌈K/block⌉, N)   A (K, r)   B (r, N)
Relation  an approximation site for each matrix
Source    Frantar et al. 2022, arXiv:2210.17323 (gptq); Yao et al. 2023, arXiv:2307.09782, §4.3 (low rank);
          onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.ir.edit import shape_of
from rewrite.ir.program import Program
from rewrite.quantize.clipping import clip_by_error
from rewrite.quantize.format import Format, packed
from rewrite.quantize.gptq import gptq
from rewrite.quantize.low_rank import correction
from rewrite.quantize.observers import Moments
from rewrite.quantize.rounding import round_to_nearest
from rewrite.quantize_rule import (
    CONSTANT,
    FLOAT,
    LARGE,
    MATRIX,
    Spread,
    WeightSite,
    column_blocks,
    held,
    kernel,
    weight_sites,
)
from rewrite.rule import Breach, Change, Pass, Requirement

METHODS = ("best", "nearest", "clipped", "gptq")

BUDGETS = ("budget_bits", "budget_bytes", "budget_ns")
"""Options of which one may bound what all weights cost together."""


def _has_kernel(rule: QuantizeWeights, site: WeightSite) -> Breach | None:
    lacking = kernel("weights-int8" if rule.accuracy_level == 4 else "weights")(rule, site)
    if lacking is not None:
        return lacking
    bits = rule.bits_of(site)
    if bits == 0:
        return Breach(site.reader, "it was chosen to stay in floating point")
    if bits != 4 and rule.accuracy_level != 4:
        return Breach(site.reader, f"{bits} bits have no kernel in floating point that is faster than float32")
    return None


def _has_data(rule: QuantizeWeights, site: WeightSite) -> Breach | None:
    if rule.budget and not rule.effects:
        return Breach(
            site.reader,
            f"what it does to the outputs was not measured, which {rule.budget} goes by: give calibration data",
        )
    if rule.method == "gptq" and _moments(rule, site) is None:
        return Breach(
            site.reader, "gptq needs calibration data, and nothing was measured of what is multiplied with it"
        )
    return None


def _moments(rule: QuantizeWeights, site: WeightSite) -> Moments | None:
    return (rule.statistics or {}).get(site.operand.name or "")


@dataclass(frozen=True)
class QuantizeWeights(Pass[WeightSite]):
    """Matrices become codes of few bits, with a scale for every block of rows.

    `bits` 2, 4 or 8 (`layer_bits` says otherwise for the weights it names; 0 keeps one in floating point), `block` rows
    share a scale (a power of two from 16), `symmetric` leaves out zero points, `method` and `accuracy_level` as above.
    `rank` of the correction, 0 for none. `minimum` entries are worth it; `keep` are patterns of weights' names that
    stay. `kernels`: what the target has. `statistics`: what calibration measured.

    Under a budget the bits of each weight are chosen by what each does to the outputs (`rewrite.mixed_precision`):
    `budget_bits` on average, `budget_bytes` in all, scales and corrections counted, or `budget_ns` for one row, by the
    target's `multiply_ns` for an entry (by bits and accuracy level, 0 bits for floating point). `effects`: what was
    measured.
    """

    bits: int = 4
    block: int = 32
    symmetric: bool = True
    method: str = "best"
    accuracy_level: int = 0
    rank: int = 0
    minimum: int = 4096
    keep: tuple[str, ...] = ()
    layer_bits: Mapping[str, int] = field(default_factory=dict[str, int])
    budget_bits: float | None = None
    budget_bytes: float | None = None
    budget_ns: float | None = None
    multiply_ns: Mapping[tuple[int, int], float] | None = None
    effects: Mapping[str, Mapping[int, float]] = field(default_factory=dict[str, Mapping[int, float]])
    kernels: frozenset[str] | None = None
    statistics: Mapping[str, Moments] | None = None

    name: ClassVar[str] = "quantize-weights"
    approximates: ClassVar[bool] = True
    requires: ClassVar[tuple[Requirement, ...]] = (
        *(CONSTANT, MATRIX, FLOAT, LARGE),
        Requirement("R5", "the target has a kernel for so many bits", _has_kernel),
        Requirement("R6", "what the method needs was measured", _has_data),
    )

    def __post_init__(self) -> None:
        Format(self.bits, signed=False, symmetric=self.symmetric, block=self.block)
        if self.method not in METHODS:
            raise TypeError(f"no method {self.method!r}: one of {', '.join(METHODS)}")
        if self.accuracy_level not in (0, 4):
            raise TypeError(f"accuracy_level {self.accuracy_level}: 0 (float32) or 4 (int8)")
        if sum(getattr(self, name) is not None for name in BUDGETS) > 1:
            raise TypeError(f"one budget of {', '.join(BUDGETS)}")
        object.__setattr__(self, "keep", tuple(self.keep))

    @property
    def budget(self) -> str:
        """The name of the budget that is given, or nothing."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), "")

    def bits_of(self, site: WeightSite) -> int:
        return self.layer_bits.get(site.name, self.bits)

    def sites(self, program: Program) -> Iterator[WeightSite]:
        yield from weight_sites(program)

    def observes(self, program: Program) -> dict[str, Moments]:
        """What gptq needs: second moments of what the matrices are multiplied with."""
        if self.method not in ("best", "gptq"):
            return {}
        checks = [requirement for requirement in self.requires if requirement.id != "R6"]
        wanted = [site for site in self.sites(program) if not any(each.check(self, site) for each in checks)]
        return {site.operand.name or "": Moments(site.shape[0]) for site in wanted}

    def rewrite(self, site: WeightSite, change: Change) -> None:
        edit, node, result = change.editor, site.reader, site.reader.outputs[0]
        stored, (rows, columns), bits = self._stored(site, change), site.shape, self.bits_of(site)
        operands = [site.operand, *(stored[part] for part in ("codes", "scales", "zero_points") if part in stored)]
        attributes = {
            **{"K": rows, "N": columns, "bits": bits, "block_size": self.block},
            "accuracy_level": self.accuracy_level,
        }
        names = {"before": node, "name": f"{result.name}.quantized", "like": result, "domain": "com.microsoft"}
        product = edit.node("MatMulNBits", operands, attributes, **names)
        if self.rank:
            value, leading = site.operand, (shape_of(result) or ())[:-1]
            for letter, size in (("A", self.rank), ("B", columns)):
                name = f"{result.name}.low_rank_{letter}"
                value = edit.node(
                    "MatMul",
                    [value, stored[letter]],
                    before=node,
                    name=name,
                    dtype=result.dtype,
                    shape=(*leading, size),
                )
            product = edit.node("Add", [product, value], before=node, name=f"{result.name}.corrected", like=result)
        edit.take_over(result, product)

    def _stored(self, site: WeightSite, change: Change) -> dict[str, ir.Value]:
        """The initializers that hold a weight; several products with one weight share them."""
        edit, label = change.editor, f"{site.name}{'.transposed' * site.transposed}"
        parts = ("codes", "scales", "zero_points", "A", "B")
        if f"{label}.codes" not in edit.made:
            dtype = (site.constant.dtype or ir.DataType.FLOAT).numpy()
            arrays, spread = self._quantized(site)
            for part, array in arrays.items():
                array = array if array.dtype == np.uint8 else array.astype(dtype, copy=False)
                edit.made[f"{label}.{part}"] = edit.initializer(f"{label}.{part}", array)
            change.program.steps[edit.made[f"{label}.codes"].name or ""] = spread.declared
            change.notes.append(f"{self.bits_of(site)} bits, blocks of {self.block}: {spread}")
            if site.name in self.effects:
                alone = ", ".join(f"{bits} bits {error:.2g}" for bits, error in self.effects[site.name].items() if bits)
                budget = f"{self.budget} {getattr(self, self.budget):g}" if self.budget else "a budget"
                change.notes.append(f"chosen under {budget}; outputs off by itself at {alone}")
        stored = {part: edit.made[f"{label}.{part}"] for part in parts if f"{label}.{part}" in edit.made}
        change.changed.update({value.name or "": site.name for value in stored.values()})
        return stored

    def _quantized(self, site: WeightSite) -> tuple[dict[str, np.ndarray], Spread]:
        """The operands of MatMulNBits and the factors of the correction, by name; and how far the codes are off."""
        form = Format(self.bits_of(site), signed=False, symmetric=self.symmetric, block=self.block)
        (rows, columns), groups = site.shape, form.groups(site.shape[0])
        moments, spread = _moments(self, site), Spread()
        arrays = {
            "codes": held((columns, groups, form.block * form.bits // 8), np.uint8),
            "scales": held((columns, groups), np.float32),
        }
        if not form.symmetric:
            arrays["zero_points"] = held((columns, -(-groups * form.bits // 8)), np.uint8)
        compensates = self.method in ("best", "gptq") and moments is not None
        # What rests on the moments of all rows is computed once, for all columns.
        for taken in [slice(0, columns)] if compensates or self.rank else column_blocks(site.weight):
            exact = site.weight.read((slice(0, rows), taken))
            if compensates and moments is not None:
                quantized = gptq(exact, moments.matrix, form)
            else:
                quantized = round_to_nearest(exact, form) if self.method == "nearest" else clip_by_error(exact, form)
            for part, array in zip(("codes", "scales", "zero_points"), packed(quantized)):
                if array is not None:
                    arrays[part][taken] = array
            if self.rank:
                error = exact - quantized.values()
                arrays["A"], arrays["B"] = correction(error, self.rank, None if moments is None else moments.matrix)
                dtype = (site.constant.dtype or ir.DataType.FLOAT).numpy()
                exact = exact - np.matmul(*(arrays[letter].astype(dtype).astype(np.float64) for letter in "AB"))
            spread.add(exact, quantized)
        return arrays, spread
