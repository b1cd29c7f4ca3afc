"""What the passes that quantize share: which weights there are, which of them a kernel can take, and what stays.

Quantizing is no equivalence. A pass that does it is `approximates`: its product is proved to be the original's once the
places it declares are erased, and what they cost is measured. It sees every matrix and kernel of the network, and each
that it leaves as it was is a refusal with a reason, so that nothing is skipped in silence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from rewrite.ir.constants import is_overridable, weight_behind
from rewrite.ir.edit import TRANSFORM, attribute_of, constant_of, is_operator, only_use, shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Transpose, Weight, whole
from rewrite.quantize.clipping import clip_by_error
from rewrite.quantize.format import Format, Quantized, each_row, stored_scale
from rewrite.quantize.rounding import coded, round_to_nearest
from rewrite.quantize.saturation import SAFE_PAIR, pair_excess, unsaturated
from rewrite.rule import Breach, Change, Requirement, Site

LEAST_ELEMENTS = 256
"""Constants of fewer entries are no weights: masks, tables of positions, windows."""

READ_ELEMENTS = 1 << 22
"""Entries of a matrix that are quantized at a time (32 MiB of float64)."""

KEPT = "rewrite.kept"
"""The metadata key of a product whose weight stays in floating point: why."""

HELD_BYTES = 1 << 20
"""Codes of more bytes than this lie in a temporary file until they are saved."""

KERNELS = {
    "weights": "kernel that multiplies floating point with weights of few bits",
    "weights-int8": "kernel that multiplies int8 by row and block with weights of few bits",
    "dynamic": "int8 kernel that takes the range of activations as they come",
    "static": "int8 kernels for ranges of activations that are known",
}
"""What a target may have."""

QUANTIZED = frozenset(
    "MatMulNBits DynamicQuantizeMatMul QuantizeLinear DequantizeLinear QLinearMatMul QLinearConv MatMulInteger"
    " ConvInteger MatMulIntegerToFloat GatherBlockQuantized QMoE".split()
)


@dataclass(frozen=True)
class WeightSite(Site):
    """A constant of two axes or more, and the operator that reads it as operand `position`.

    `transposed` says that the operator reads its transpose; `weight` is what the operator reads.
    """

    constant: ir.Value
    reader: ir.Node
    position: int
    transposed: bool

    @property
    def weight(self) -> Weight:
        stored = weight_behind(self.constant)
        return Transpose(stored, (1, 0)) if self.transposed else stored

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = tuple(int(n) for n in shape_of(self.constant) or ())
        return sizes[::-1] if self.transposed else sizes

    @property
    def operand(self) -> ir.Value:
        """What is multiplied with the weight."""
        value = self.reader.inputs[0]
        if value is None:
            raise ValueError(f"{self.reader.name} has no operand")
        return value


def weight_sites(program: Program) -> Iterator[WeightSite]:
    """Every operator that reads a weight in floating point, in the order of the graph."""
    for node in list(program.model.graph):
        if node.graph is None or node.op_type in QUANTIZED or _is_layout(node):
            continue
        for position, value in enumerate(node.inputs):
            constant, transposed = _behind(value)
            if constant is None or not _is_weight(constant):
                continue
            yield WeightSite(constant.name or "", (node,), constant, node, position, transposed)


def _is_layout(node: ir.Node) -> bool:
    """Whether a node only lays a weight out anew, and its reader is what counts."""
    return is_operator(node, "Transpose", "Identity") and _behind(node.outputs[0])[0] is not None


def _behind(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The initializer that a value is, or is the transpose of, and which of both."""
    transposed = False
    while value is not None and (node := value.producer()) is not None:
        if is_operator(node, "Transpose"):
            if tuple(attribute_of(node, "perm", (1, 0))) != (1, 0) or len(shape_of(node.inputs[0]) or ()) != 2:
                return None, False
            transposed = not transposed
        elif not is_operator(node, "Identity"):
            return None, False
        value = node.inputs[0]
    return (value, transposed) if value is not None and value.is_initializer() else (None, False)


def _is_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    return (
        tensor is not None
        and tensor.dtype.is_floating_point()
        and len(tensor.shape) >= 2
        and tensor.size >= LEAST_ELEMENTS
        and sum(n > 1 for n in tensor.shape.numpy()) >= 2
    )


# --------------------------------------------------------------------------------------------------- side conditions


def _constant(rule: object, site: WeightSite) -> Breach | None:
    if is_overridable(site.constant):
        return Breach(site.reader, f"{site.constant.name} may be replaced by a caller")
    return None


def _not_kept(rule: object, site: WeightSite) -> Breach | None:
    if (why := site.reader.metadata_props.get(KEPT)) is not None:
        return Breach(site.reader, why)
    for pattern in getattr(rule, "keep", ()):
        if fnmatchcase(site.name, pattern):
            return Breach(site.reader, f"{pattern} is to stay in floating point")
    return None


def matrix_on_the_right(rule: object, site: WeightSite) -> Breach | None:
    node, rank = site.reader, len(site.shape)
    if TRANSFORM in node.metadata_props:
        return Breach(node, f"it computes {node.metadata_props[TRANSFORM]}, so that what follows is easier to quantize")
    if is_operator(node, "Gather", "GatherND"):
        return Breach(node, "rows of it are looked up, and nothing is multiplied")
    if is_operator(node, "Conv", "ConvTranspose"):
        return Breach(node, f"{node.op_type} has no kernel of this kind that is faster than floating point")
    if not is_operator(node, "MatMul"):
        return Breach(node, f"{node.op_type} reads it, which is no matrix product")
    if site.position != 1:
        return Breach(node, "it is the left factor, and kernels take the right one")
    return (
        None if rank == 2 else Breach(node, f"it is a stack of matrices of shape {site.shape}, which no kernel takes")
    )


def _dtype(*allowed: ir.DataType) -> Callable[[object, WeightSite], Breach | None]:
    def check(rule: object, site: WeightSite) -> Breach | None:
        held = site.constant.dtype
        return None if held in allowed else Breach(site.reader, f"it is {str(held).lower()}")

    return check


def _large_enough(rule: object, site: WeightSite) -> Breach | None:
    least = getattr(rule, "minimum", 0)
    count = int(np.prod(site.shape))
    return Breach(site.reader, f"it has {count} entries, {least} are worth it") if count < least else None


def kernel(name: str) -> Callable[[object, Site], Breach | None]:
    """That the target has the kernel `name`, one of `KERNELS`, where the pass was told what it has."""

    def check(rule: object, site: Site) -> Breach | None:
        known = getattr(rule, "kernels", None)
        return (
            Breach(site.nodes[0], f"the target has no {KERNELS[name]}")
            if known is not None and name not in known
            else None
        )

    return check


CONSTANT = Requirement("R1", "it is a constant, and not asked to stay", lambda r, s: _constant(r, s) or _not_kept(r, s))
MATRIX = Requirement("R2", "a product of matrices reads it, on the right", matrix_on_the_right)
FLOAT32 = Requirement("R3", "it is float32", _dtype(ir.DataType.FLOAT))
FLOAT = Requirement("R3", "it is float32 or float16", _dtype(ir.DataType.FLOAT, ir.DataType.FLOAT16))
LARGE = Requirement("R4", "it is large enough to be worth it", _large_enough)

LARGEST_ROWS = (2**31 - 1) // (255 * 127)
"""Rows of an int8 matrix up to which no sum of products with uint8 leaves 32 bits."""


def _accumulates(rule: object, site: WeightSite) -> Breach | None:
    rows = site.shape[-2] if is_operator(site.reader, "MatMul") else int(np.prod(site.shape[1:]))
    if rows > LARGEST_ROWS:
        return Breach(site.reader, f"sums of {rows} products may not fit into 32 bits")
    return None


ACCUMULATES = Requirement("R5", "its sums fit into 32 bits", _accumulates)


# ------------------------------------------------------------------------------------------------------- what is built


def held(shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
    """Zeros to be filled: in memory, or mapped to a temporary file that goes with them where they are large."""
    if int(np.prod(shape)) * np.dtype(dtype).itemsize <= HELD_BYTES:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, mode="w+", shape=shape)


def column_blocks(weight: Weight) -> Iterator[slice]:
    """Columns of a matrix (K, N) to be read at a time; all of them where each rests on all."""
    rows, columns = weight.shape
    step = columns if 1 in weight.mixed else max(1, READ_ELEMENTS // max(rows, 1))
    for start in range(0, columns, step):
        yield slice(start, min(start + step, columns))


@dataclass
class Spread:
    """How far codes are from what they stand for: the largest distance in steps, and ‖W_q − W‖/‖W‖ over all."""

    steps: float = 0.0
    error: float = 0.0
    total: float = 0.0

    def add(self, exact: np.ndarray, quantized: Quantized) -> None:
        difference = quantized.values() - exact
        scales = each_row(quantized.scales.astype(np.float64), quantized.format, len(exact))
        self.steps = max(self.steps, float(np.abs(difference / scales).max(initial=0.0)))
        self.error += float((difference**2).sum())
        self.total += float((exact**2).sum())

    @property
    def declared(self) -> float:
        """The steps that the proof is told to allow; it says itself how many there are.

        What it solves for differs a little from what was quantized: numbers beside the codes were rounded.
        """
        return self.steps + 2.0**-6

    def __str__(self) -> str:
        relative = (self.error / self.total) ** 0.5 if self.total else 0.0
        return f"off by at most {self.steps:.3g} steps, {100 * relative:.2g} % of its size"


def int8_weight(
    site: WeightSite,
    change: Change,
    *,
    per_channel: bool = True,
    clip: bool,
    saturation_free: bool,
    least: np.ndarray | None = None,
) -> tuple[ir.Value, ir.Value]:
    """Initializers with the int8 codes of a matrix (K, N) or of filters (M, C, …), in that layout, and their scales:
    one for each column or filter, or one for all, of shape (1,). Several products with one weight share them.

    `least` are scales (N,) or (M,) that are not to be undercut.
    """
    edit, label = change.editor, f"{site.name}{'.transposed' * site.transposed}"
    if f"{label}.codes" not in edit.made:
        form, spread = Format(8, signed=True, symmetric=True, per_tensor=not per_channel), Spread()
        filters = is_operator(site.reader, "Conv")
        count = site.shape[0] if filters else site.shape[1]
        codes, scales = held(site.shape, np.int8), np.ones(count if per_channel else 1, np.float32)
        blocks = _filter_blocks(site.shape) if filters else column_blocks(site.weight)
        for taken in blocks if per_channel else [slice(0, count)]:
            exact = _matrix(site, taken, filters)
            quantized = clip_by_error(exact, form) if clip else round_to_nearest(exact, form)
            if least is not None and np.any(quantized.scales[0] < least[taken]):
                grown = np.maximum(quantized.scales[0].astype(np.float64), least[taken])[None]
                quantized = coded(exact, stored_scale(grown), np.zeros_like(grown), form)
            if saturation_free and int(pair_excess(quantized.codes).max(initial=0)) > SAFE_PAIR:
                quantized = unsaturated(exact, form, quantized)
            if filters:
                codes[taken] = _as_filters(quantized.codes, (quantized.codes.shape[1], *site.shape[1:]))
            else:
                codes[:, taken] = quantized.codes
            scales[taken if per_channel else slice(0, 1)] = quantized.scales[0]
            spread.add(exact, quantized)
        edit.made[f"{label}.codes"] = edit.initializer(f"{label}.codes", codes)
        edit.made[f"{label}.scales"] = edit.initializer(f"{label}.scales", scales)
        each = "filter" if filters else "column"
        change.program.steps[edit.made[f"{label}.codes"].name or ""] = spread.declared
        change.notes.append(f"int8, a scale for {f'every {each}' if per_channel else f'all {each}s'}: {spread}")
    stored = edit.made[f"{label}.codes"], edit.made[f"{label}.scales"]
    change.changed.update({value.name or "": site.name for value in stored})
    return stored


def _filter_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, READ_ELEMENTS // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _matrix(site: WeightSite, taken: slice, filters: bool) -> np.ndarray:
    """Columns of a weight (K, N), or filters as columns: their taps in the order in which kernels sum them, channels
    fastest."""
    if not filters:
        return site.weight.read((slice(0, site.shape[0]), taken))
    some = site.weight.read((taken, *whole(site.shape[1:])))
    return np.moveaxis(some, 1, -1).reshape(len(some), -1).T


def _as_filters(codes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo the order of `_matrix` for filters of `shape` (M, C, …)."""
    return np.moveaxis(codes.T.reshape(shape[0], *shape[2:], shape[1]), -1, 1)


def added_vector(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Add behind a product that alone reads it, and the constant vector that it adds."""
    result = node.outputs[0]
    added = only_use(result)
    if not is_operator(added, "Add"):
        return None
    vector = added.inputs[1] if added.inputs[0] is result else added.inputs[0]
    shape = shape_of(result)
    if vector is None or constant_of(vector) is None or not shape or shape_of(vector) != shape[-1:]:
        return None
    return added, vector


__all__ = [
    "ACCUMULATES",
    "CONSTANT",
    "FLOAT",
    "FLOAT32",
    "KEPT",
    "LARGE",
    "MATRIX",
    "Spread",
    "WeightSite",
    "added_vector",
    "column_blocks",
    "held",
    "int8_weight",
    "kernel",
    "matrix_on_the_right",
    "weight_sites",
]
