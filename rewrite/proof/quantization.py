"""Operators of quantized networks: what they compute once their sites are erased.

    DequantizeLinear(q, s, z)            of constants: the numbers W_q = (q − z)·s, a weight site
    QuantizeLinear(x, s, z)              codes of x, an activation site
    DequantizeLinear(codes of x, s, z)   x, where scale, zero point and type are those of the codes; else opaque
    MatMulNBits(x, q, s, z, bias)        x·W_q + bias
    DynamicQuantizeMatMul(x, q, s, z, b) x·W_q + b, with an activation site of its own
    MatMulInteger(codes of x, q)         x·(q − z)/t, of which t·s makes x·W_q

Operators that carry all scales with them are in `quantized_products.py`.

Codes pass through operators that commute with rounding. Nothing is known of what saturates: codes of x stand for x and
not for max(x, 0), whatever their zero point. Sites exist in the rewritten network only: in the original the same
operators are what they compute, and those of the rewritten that equal them are no sites.

Source: ONNX, QuantizeLinear-25, DynamicQuantizeLinear-11, QLinearMatMul-21, MatMulInteger-10, ConvInteger-10;
ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from rewrite.proof import forms
from rewrite.proof.accumulators import LARGEST_SUM, sums
from rewrite.proof.chains import Exact
from rewrite.proof.constants import Array, Constant, Permuted, blocks, permuted, reshaped
from rewrite.proof.forms import Form, form_of
from rewrite.proof.rules import RULES, attribute, integers, matmul
from rewrite.proof.sites import Dequantized, Grid, Linear, Measure, Packed, Rounded, Site, packed, type_name
from rewrite.proof.transforms import Selection
from rewrite.proof.values import Coded, Value

if TYPE_CHECKING:
    from rewrite.proof.walk import Walk

CONTRIB = "com.microsoft"

OPERATORS: dict[tuple[str, str], Callable[..., Value | Sequence[Value] | None]] = {}


def operator(name: str, *domains: str) -> Callable[..., Any]:
    def register(function: Callable[..., Value | Sequence[Value] | None]) -> Any:
        for domain in domains or ("",):
            OPERATORS[(domain, name)] = function
        return function

    return register


LARGEST_COUNT = LARGEST_SUM // 255**2
"""Products of two codes of 8 bits of which the sum fits into 32 bits."""

COMMUTING = frozenset(
    "Identity Reshape Transpose Squeeze Unsqueeze Flatten Slice Split Gather Expand Concat MaxPool".split()
)
"""Operators that choose among numbers by place or by order, and make none: they commute with rounding."""


# ── What codes are ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Scheme:
    """How numbers become codes. Equal keys are equal schemes; `axis` is None where all entries share one scale."""

    key: tuple[Any, ...]
    text: str
    type: str
    axis: int | None = None
    scale: float | tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Codes(Coded):
    """Integers that stand for `of`, as `scheme` makes them."""

    of: Form
    scheme: Scheme

    def plain(self, walk: Walk) -> Form:
        return form_of(walk.atom(("quantized", walk.intern(self.of), self.scheme.key), self.of.shape, self.scheme.type))


@dataclass(frozen=True, eq=False)
class Part(Coded):
    """The scale or the zero point of codes whose range is taken from each input, times a constant."""

    name: str
    scheme: Scheme
    of: Form
    factor: Constant | None = None

    def plain(self, walk: Walk) -> Form:
        kind = "f" if self.name == "scale" else self.scheme.type
        atom = walk.atom(("quantized", walk.intern(self.of), (self.name, *self.scheme.key)), (), kind)
        result = form_of(atom)
        return result if self.factor is None else RULES["", "Mul"](walk, None, [result, self.factor])  # type: ignore[arg-type, return-value]


@dataclass(frozen=True, eq=False)
class Accumulated(Coded):
    """Sums of products of codes with a constant's: what `made` of that constant is, over the scale of the codes."""

    scheme: Scheme
    made: Callable[[Constant], Form]
    grid: Linear
    axis: int
    shape: forms.Shape
    fallback: Callable[[], Form]

    def plain(self, walk: Walk) -> Form:
        return self.fallback()


@dataclass(frozen=True, eq=False)
class Paired(Coded):
    """Sums of products of the codes of two values over both scales (`of` is the product), or both scales (None)."""

    schemes: frozenset[Scheme]
    of: Form | None
    fallback: Callable[[], Form]

    def plain(self, walk: Walk) -> Form:
        return self.fallback()


@dataclass(frozen=True, eq=False)
class Picked(Coded):
    """Rows of a table of codes that an input picks."""

    table: Constant
    indices: Value
    shape: forms.Shape
    fallback: Callable[[], Form]

    def plain(self, walk: Walk) -> Form:
        return self.fallback()


# ── The walk's entrance ─────────────────────────────────────────────────────────────────────────────────────────────


def results(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Sequence[Value] | None:
    """What an operator on codes makes; None where it is none, or nothing is known of it but its name."""
    domain = "" if node.domain in ("", "ai.onnx") else node.domain
    apply = OPERATORS.get((domain, node.op_type))
    if apply is not None and (domain, node.op_type) == ("", "Cast") and not _narrow(node):
        apply = cast if isinstance(operands[0], Codes) else None
    coded = any(isinstance(operand, Coded) for operand in operands)
    if apply is None and not coded:
        if (domain, node.op_type) in (("", "MatMul"), ("", "Gemm"), ("", "Conv")):
            _fused(walk, node, operands)
        return _gathered(walk, node, operands) if (domain, node.op_type) == ("", "Gather") else None
    if apply is not None:
        found = None if coded else _shared(walk, node, domain, operands)
        if found is None:
            found = apply(walk, node, operands)
        if found is not None:
            return [found] if isinstance(found, Constant | Form | Coded) else found  # type: ignore[return-value]
    return _through(walk, node, operands) if coded and domain == "" else None


def _shared(walk: Walk, node: ir.Node, domain: str, operands: Sequence[Value | None]) -> Sequence[Value] | None:
    """The results of an operator that the original has on the same operands: nothing is approximated by it."""
    constant = all(isinstance(o, Constant) for o in operands if o is not None)
    if walk.partner is None or (constant and node.op_type != "QuantizeLinear"):
        return None
    if not any(each.op_type == node.op_type for each in walk.partner.model.graph):
        return None
    constants = [operand for operand in operands if isinstance(operand, Constant)]
    names = {id(constant): walk.table.constant_name(constant) for constant in constants}
    attributes = walk.attributes(node, domain)
    if None in names.values() or attributes is None:
        return None
    keys = [names[id(o)] if isinstance(o, Constant) else walk.operand(o) for o in operands]
    while keys and keys[-1] == ("none",):
        keys.pop()
    base = walk.opaque_key(domain, node.op_type, attributes, keys)
    atoms = [walk.table.atoms.get((*base[:-1], index)) for index in range(len(node.outputs))]
    if any(atom is None or atom.side != "original" for atom in atoms):
        return None
    walk.table.pin(constants, walk.node)
    return [form_of(atom) for atom in atoms if atom is not None]


def _through(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Sequence[Value] | None:
    """Codes of f(x) for an operator f that commutes with rounding, on codes of x of one scale."""
    codes = [operand for operand in operands if isinstance(operand, Codes)]
    if node.op_type == "Cast" and len(operands) == 1 and isinstance(operands[0], Accumulated | Paired):
        return [operands[0]] if walk.kind_of_dtype(attribute(node, "to", 0)) == "f" else None
    if node.op_type == "Mul":
        return _scaled(walk, node, operands)
    first = codes[0] if codes and operands[0] is codes[0] else None
    if node.op_type not in COMMUTING or first is None or first.scheme.axis is not None:
        return None
    if any(each.scheme.key != first.scheme.key for each in codes) or (len(codes) > 1) != (node.op_type == "Concat"):
        if node.op_type != "Concat" or any(each.scheme.key != first.scheme.key for each in codes):
            return None
    if node.op_type == "Concat" and len(codes) < len(operands):
        return None
    if node.op_type == "MaxPool" and len(node.outputs) > 1:
        return None
    made = walk.applied(node, [operand.of if isinstance(operand, Codes) else operand for operand in operands])
    return [Codes(walk.form(result), first.scheme) for result in made]


# ── Sites ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def weight(walk: Walk, grid: Grid, name: str) -> Dequantized | None:
    """The numbers that codes stand for, entered in the list of sites; None where a scale is no number."""
    scaling = grid.parameters[0]
    if not all(np.isfinite(scaling.read(region)).all() for region in blocks(scaling.shape)):
        return None
    stored = grid.stored.stored  # type: ignore[attr-defined]
    tensor = stored.tensor if stored is not None else ir.tensor(np.zeros(0, np.uint8))
    constant = Dequantized(walk.side, stored.name if stored is not None else name, tensor, grid)
    if walk.side == "rewritten":
        walk.table.pin(grid.parameters, walk.node)
        walk.table.sites.setdefault(constant.key, (constant, walk.node))
    return constant


def activation(walk: Walk, node: ir.Node, scheme: Scheme, rounded: ir.Value | None = None) -> None:
    """Enter the rounding of a node's first operand, or of `rounded`, in the list of sites."""
    value = rounded or node.inputs[0]
    name = "" if value is None else value.name or ""
    walk.table.activations.append(Site(name, "activation", walk.node, scheme.text, scheme.scale))


def linear(
    walk: Walk,
    node: ir.Node,
    codes: Constant,
    scaling: Value | None,
    zero: Value | None,
    axis: int | None,
    block: int = 0,
) -> Constant | None:
    """The weight site of codes with one scale, a scale for each entry of `axis`, or for each block of them."""
    if not isinstance(scaling, Constant) or not (zero is None or isinstance(zero, Constant)):
        return None
    if isinstance(codes, Permuted) and not block:
        # Codes are named as they are stored, so that what is read in two layouts is one constant.
        rank = len(codes.shape)
        own = None if axis is None or not -rank <= axis < rank else codes.permutation[axis % rank]
        inner = linear(walk, node, codes.inner, scaling, zero, own)
        return None if inner is None else permuted(inner, codes.permutation)
    grid = _grid(codes, scaling, zero, axis, block)
    return None if grid is None else weight(walk, grid, node.outputs[0].name or "")


def _grid(codes: Constant, scaling: Constant, zero: Constant | None, axis: int | None, block: int) -> Linear | None:
    """None where the shapes do not fit, or a type is none that codes have."""
    rank = len(codes.shape)
    if scaling.kind != "f" or _bits(codes) > 32:
        return None
    if zero is not None and type_name(zero) != type_name(codes):
        return None
    if scaling.size == 1 and not block:
        if zero is not None and zero.size != 1:
            return None
        return Linear(codes, scaling, zero)
    if axis is None or not -rank <= axis < rank or (zero is not None and zero.shape != scaling.shape):
        return None
    axis %= rank
    if not block:
        return Linear(codes, scaling, zero, axis) if scaling.shape == (codes.shape[axis],) else None
    wanted = tuple(-(-n // block) if place == axis else n for place, n in enumerate(codes.shape))
    return Linear(codes, scaling, zero, axis, block) if scaling.shape == wanted else None


def _bits(constant: Constant) -> int:
    """Bits of a code; more than any code has for what is none."""
    name = type_name(constant)
    try:
        dtype = ir.DataType[name.upper()]
    except KeyError:
        return 64
    if dtype.is_floating_point() and dtype.bitwidth > 8:
        return 64
    return dtype.bitwidth if dtype not in (ir.DataType.BOOL, ir.DataType.INT64) else 64


def integer_product(
    walk: Walk, constant: Constant, *, columns_first: bool = False, bias: Constant | None = None
) -> None:
    """That an integer kernel sums products with these codes, a matrix (K, N), its transpose, or filters."""
    while isinstance(constant, Permuted) and constant.permutation == (1, 0):
        constant, columns_first = constant.inner, not columns_first
    if not isinstance(constant, Dequantized):
        walk.table.overflows.setdefault(walk.node, "which codes are summed is not known")
        return
    bounds = sums(constant.grid, columns_first=columns_first, bias=bias)
    if not bounds.fits:
        reason = f"sums of {constant.name} may reach {bounds.accumulator}, and 32 bits hold less"
        walk.table.overflows.setdefault(walk.node, reason)
    if bounds.saturates:
        walk.table.saturating.add(constant.key)


def counted_product(walk: Walk, left: Form) -> None:
    """That an integer kernel sums products of the codes of two values along the last axis of `left`."""
    count = left.shape[-1].constant
    if count is None:
        walk.table.declared.add(f"sums of at most {LARGEST_COUNT} products of codes")
    elif count > LARGEST_COUNT:
        walk.table.overflows.setdefault(walk.node, f"sums of {count} products of codes may not fit into 32 bits")


LAYOUTS = frozenset("Identity Reshape Transpose Squeeze Unsqueeze Flatten".split())
"""Operators that a runtime may move past a DequantizeLinear, to compute what reads them in integers."""


def _behind(value: ir.Value | None) -> tuple[ir.Node | None, bool]:
    """The DequantizeLinear that makes a value but for its layout, and whether a matrix is transposed on the way."""
    node, turned = None if value is None else value.producer(), False
    while node is not None and node.op_type in LAYOUTS and node.inputs[0] is not None:
        turned ^= node.op_type == "Transpose"
        node = node.inputs[0].producer()
    return (node, turned) if node is not None and node.op_type == "DequantizeLinear" else (None, False)


def _fused(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> None:
    """Note a product of dequantized codes of 8 bits on both sides, which a runtime computes in integers."""
    if walk.side != "rewritten":
        return
    (reader, _), (weights, turned) = _behind(node.inputs[0]), _behind(node.inputs[1])
    if reader is None or weights is None or reader.inputs[0] is None or weights.inputs[0] is None:
        return
    codes, others = (walk.values.get(each.inputs[0].name or "") for each in (reader, weights))  # type: ignore[union-attr]
    if not isinstance(codes, Codes) or codes.scheme.type not in ("int8", "uint8"):
        return
    if isinstance(others, Codes) and isinstance(operands[0], Form):
        counted_product(walk, operands[0])
        return
    constant: Value | None = operands[1]
    if isinstance(others, Rounded):
        constant = walk.table.rounded.get(weights.outputs[0].name or "")
        constant = permuted(constant, (1, 0)) if constant is not None and turned else constant
    stored = constant.stored if isinstance(constant, Constant) else None
    if not isinstance(constant, Constant) or not isinstance(stored, Dequantized):
        return
    if not isinstance(stored.grid, Linear) or _bits(stored.grid.stored) != 8:
        return
    bias = operands[2] if len(operands) > 2 else None
    added = bias.grid.stored if isinstance(bias, Dequantized) and isinstance(bias.grid, Linear) else None
    integer_product(walk, constant, columns_first=bool(attribute(node, "transB", 0)), bias=added)


# ── QuantizeLinear, DequantizeLinear ────────────────────────────────────────────────────────────────────────────────


def static_scheme(
    codes_type: str, scaling: Value | None, zero: Value | None, axis: int | None, block: int, rank: int
) -> Scheme | None:
    """The scheme of constants; None where a scale is not positive, or something is no constant."""
    if not isinstance(scaling, Constant) or not (zero is None or isinstance(zero, Constant)) or scaling.kind != "f":
        return None
    scales = scaling.whole()
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        return None
    points = np.zeros(scales.shape) if zero is None else packed(zero, tuple(slice(0, n) for n in zero.shape))
    points = points.astype(np.float64)
    one = scales.size == 1 and not block
    if points.size != scales.size or (not one and axis is None):
        return None
    place = None if one else (axis or 0) % max(rank, 1)
    shape = () if one else scales.shape
    key = (codes_type, place, block, Array(scales.reshape(shape)).digest, Array(points.reshape(shape)).digest)
    where = "per tensor" if one else f"per entry of axis {place}"
    where = f"per block of {block} along axis {place}" if block else where
    low, high = float(points.min()), float(points.max())
    text = f"{codes_type} {where}, zero point {low:g}"
    text += "" if low == high else f" to {high:g}"
    smallest, largest = float(scales.min()), float(scales.max())
    return Scheme(key, text, codes_type, place, smallest if smallest == largest else (smallest, largest))


def _asked(node: ir.Node, operands: Sequence[Value | None]) -> tuple[Value | None, Value | None, int | None, int]:
    """Scale, zero point, axis and block size of a QuantizeLinear or DequantizeLinear."""
    zero = operands[2] if len(operands) > 2 else None
    axis = attribute(node, "axis", None if node.domain == CONTRIB else 1)
    return operands[1], zero, axis, attribute(node, "block_size", 0)


@operator("QuantizeLinear", "", CONTRIB)
def quantize_linear(walk, node, operands):
    x = operands[0]
    scaling, zero, axis, block = _asked(node, operands)
    if walk.side != "rewritten" or isinstance(x, Coded) or not attribute(node, "saturate", 1):
        return None
    form = walk.form(x)
    if isinstance(zero, Constant):
        type_ = type_name(zero)
    else:
        wanted = attribute(node, "output_dtype", 0)
        type_ = ir.DataType(wanted).name.lower() if wanted else "uint8"
    scheme = static_scheme(type_, scaling, zero, axis, block, form.rank)
    if scheme is None or form.kind != "f":
        return None
    pinned(walk, scaling, zero)
    if isinstance(x, Constant):
        return _rounded(x, scheme, *_constants(scaling, zero))
    activation(walk, node, scheme)
    return Codes(form, scheme)


def _constants(*values: Value | None) -> list[Constant]:
    return [value for value in values if isinstance(value, Constant)]


def pinned(walk: Walk, *values: Value | None) -> None:
    """Note that scales and zero points are used as they were shipped."""
    walk.table.pin(_constants(*values), walk.node)


def _rounded(x: Constant, scheme: Scheme, scaling: Constant, zero: Constant | None = None) -> Constant | None:
    """Codes of a constant, which are constants."""
    if scheme.type not in ("int8", "uint8", "int16", "uint16") or (scheme.axis is not None and len(scaling.shape) != 1):
        return None
    return Rounded(x, Linear(x, scaling, zero, scheme.axis), np.dtype(scheme.type))


@operator("DequantizeLinear", "", CONTRIB)
def dequantize_linear(walk, node, operands):
    codes = operands[0]
    scaling, zero, axis, block = _asked(node, operands)
    if isinstance(codes, Rounded):
        return _rounded_again(walk, node, codes, scaling, zero, axis, block)
    if isinstance(codes, Constant):
        return linear(walk, node, codes, scaling, zero, axis, block)
    if isinstance(codes, Picked):
        table = codes.table
        # The table's rows may share a scale, or its columns have their own.
        rank, many = len(codes.shape), isinstance(scaling, Constant) and scaling.size > 1
        own = 1 if many and axis is not None and axis % rank == rank - 1 else None
        constant = None if block else linear(walk, node, table, scaling, zero, own)
        return None if constant is None else RULES["", "Gather"](walk, _rows_of(), [constant, codes.indices])
    if not isinstance(codes, Codes):
        return None
    if isinstance(scaling, Part):
        dynamic = scaling.factor is None and scaling.scheme == codes.scheme
        return codes.of if dynamic and isinstance(zero, Part) and zero.scheme == codes.scheme else None
    scheme = static_scheme(codes.scheme.type, scaling, zero, axis, block, codes.of.rank)
    if scheme is None or scheme.key != codes.scheme.key:
        return None
    pinned(walk, scaling, zero)
    return codes.of


def _rounded_again(
    walk: Walk,
    node: ir.Node,
    codes: Rounded,
    scaling: Value | None,
    zero: Value | None,
    axis: int | None,
    block: int,
) -> Constant | None:
    """Numbers that are stored as they are and rounded by the graph: these numbers, by at most the steps allowed."""
    if not isinstance(scaling, Constant) or not (zero is None or isinstance(zero, Constant)):
        return None
    grid = _grid(codes, scaling, zero, axis, block)
    stored = codes.stored
    if grid is None or stored is None or walk.side != "rewritten":
        return None
    measure = Measure(codes)
    for region in blocks(codes.shape):
        exact = codes.inner.read(region)
        off = np.abs(grid.values(region) - exact)
        steps, total = off / grid.steps(region), float((exact**2).sum())
        measure = measure + Measure(codes, float(steps.max(initial=0.0)), float((off**2).sum()), total)
    allowed = walk.table.comparer.steps
    if measure.steps > (1.0 if allowed is None else allowed(stored.name)):
        return None
    constant = weight(walk, grid, stored.name)
    if constant is not None:
        walk.table.measures[constant.key] = replace(measure, constant=constant)
        walk.table.rounded[node.outputs[0].name or ""] = constant
    return None if constant is None else codes.inner


def _rows_of() -> ir.Node:
    return ir.Node("", "Gather", [None, None])


def _gathered(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Sequence[Value] | None:
    """Rows of a table of codes, or some channels of a value, if that is what is gathered."""
    table, indices = operands[:2]
    if isinstance(table, Form) and isinstance(indices, Constant):
        channels = _channels(walk, node, table, indices)
        return None if channels is None else [channels]
    if not isinstance(table, Constant) or isinstance(indices, Constant) or indices is None:
        return None
    if len(table.shape) != 2 or attribute(node, "axis", 0) not in (0, -2) or table.kind == "f" or _bits(table) > 8:
        return None
    shape = (*walk.shape(indices), *walk.shape(table)[1:])
    return [Picked(table, indices, shape, lambda: walk.form(walk.applied(node, operands)[0]))]


def _selects(node: ir.Node) -> bool:
    if node.op_type != "Gather" or None in node.inputs[:2]:
        return False
    data, indices = node.inputs[:2]
    return data is not None and not data.is_initializer() and indices is not None and indices.const_value is not None


def _channels(walk: Walk, node: ir.Node, form: Form, indices: Constant) -> Form | None:
    """Channels that a product which was split reads, as a map of all of them: what it is a part of tells them apart.

    Only where the original selects nothing of the kind, of which it would have to be the same.
    """
    if walk.partner is None or form.kind != "f" or any(map(_selects, walk.partner.model.graph)):
        return None
    size, places = form.shape[-1].constant if form.rank else None, integers(indices)
    axis = attribute(node, "axis", 0)
    if size is None or not places or len(indices.shape) != 1 or axis % form.rank != form.rank - 1:
        return None
    if len(set(places)) < len(places) or not all(0 <= place < size for place in places):
        return None
    walk.table.pin([indices], walk.node)
    return walk.mapped(form, -1, Exact(Selection(size, tuple(places))))


def _narrow(node: ir.Node) -> bool:
    """Whether a Cast is to floating point of fewer than 16 bits."""
    to = ir.DataType(attribute(node, "to", 1))
    return to.is_floating_point() and to.bitwidth < 16


@operator("Cast")
def cast(walk, node, operands):
    """To fewer than 16 bits of floating point, and back."""
    value, to = operands[0], ir.DataType(attribute(node, "to", 1))
    if isinstance(value, Codes):
        return value.of if walk.kind_of_dtype(to) == "f" and value.scheme.key[0] == "cast" else None
    if walk.side != "rewritten" or not isinstance(value, Form) or value.kind != "f":
        return None
    name = to.name.lower()
    scheme = Scheme(("cast", name, attribute(node, "saturate", 1)), f"{name} per tensor", name, None, 1.0)
    activation(walk, node, scheme)
    return Codes(value, scheme)


# ── Ranges that are taken from each input ───────────────────────────────────────────────────────────────────────────

DYNAMIC = "uint8 per tensor, range of each input"


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(walk, node, operands):
    if walk.side != "rewritten" or not isinstance(operands[0], Form):
        return None
    scheme = Scheme(("dynamic", walk.node, node.outputs[0].name), DYNAMIC, "uint8")
    activation(walk, node, scheme)
    form = operands[0]
    return [Codes(form, scheme), Part("scale", scheme, form), Part("zero point", scheme, form)]


@operator("DynamicQuantizeMatMul", CONTRIB)
def dynamic_quantize_matmul(walk, node, operands):
    x, codes, scaling = operands[:3]
    zero, bias = (*operands[3:], None, None)[:2]
    if walk.side != "rewritten" or not isinstance(codes, Constant) or isinstance(x, Coded) or len(codes.shape) != 2:
        return None
    constant = linear(walk, node, codes, scaling, zero, 1)
    if constant is None:
        return None
    integer_product(walk, constant)
    activation(walk, node, Scheme((), f"{DYNAMIC}, in the kernel", "uint8"))
    return _with_bias(walk, matmul(walk, x, constant), bias)


def _with_bias(walk: Walk, result: Form | None, bias: Value | None) -> Form | None:
    return result if result is None or bias is None else forms.add(result, walk.form(bias))


@operator("MatMulInteger")
def matmul_integer(walk, node, operands):
    a, b = operands[:2]
    zero, own = (*operands[2:], None, None)[:2]
    if isinstance(a, Codes) and isinstance(b, Codes) and _own_zero(a, zero) and _own_zero(b, own):
        return _paired(walk, node, operands, a, b)
    if not isinstance(a, Codes) or not isinstance(b, Constant) or len(b.shape) != 2 or not _own_zero(a, zero):
        return None
    grid = _unscaled(b, own, 1)
    if grid is None:
        return None
    return _accumulated(walk, node, operands, a, grid, 1, lambda constant: matmul(walk, a.of, constant))


@operator("ConvInteger")
def conv_integer(walk, node, operands):
    x, w = operands[:2]
    zero, own = (*operands[2:], None, None)[:2]
    if not isinstance(x, Codes) or not isinstance(w, Constant) or not _own_zero(x, zero):
        return None
    grid = _unscaled(w, own, 0)
    if grid is None:
        return None
    return _accumulated(walk, node, operands, x, grid, 0, lambda w: RULES["", "Conv"](walk, node, [x.of, w]))


def _own_zero(codes: Codes, zero: Value | None) -> bool:
    return isinstance(zero, Part) and zero.name == "zero point" and zero.scheme == codes.scheme


def _unscaled(codes: Constant, zero: Value | None, axis: int) -> Linear | None:
    if zero is not None and not isinstance(zero, Constant):
        return None
    if zero is not None and zero.size > 1:
        return _grid(codes, Array(np.ones(zero.shape)), zero, axis, 0)
    return _grid(codes, Array(np.ones(())), zero, None, 0)


def _accumulated(walk, node, operands, codes: Codes, grid: Linear, axis: int, made) -> Accumulated:
    plain = [operand.plain(walk) if isinstance(operand, Coded) else operand for operand in operands]
    rank = codes.of.rank
    shape = (*codes.of.shape[:-1], walk.shape(grid.stored)[-1]) if axis == 1 else codes.of.shape
    assert len(shape) == rank
    return Accumulated(codes.scheme, made, grid, axis, shape, lambda: walk.form(walk.applied(node, plain)[0]))


def _paired(walk: Walk, node: ir.Node, operands: Sequence[Value | None], a: Codes, b: Codes) -> Paired | None:
    """a·b of the codes of two values."""
    product = matmul(walk, a.of, b.of)
    if product is None or a.scheme == b.scheme:
        return None
    counted_product(walk, a.of)
    plain = [operand.plain(walk) if isinstance(operand, Coded) else operand for operand in operands]
    schemes = frozenset((a.scheme, b.scheme))
    return Paired(schemes, product, lambda: walk.form(walk.applied(node, plain)[0]))


def _scaled(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Sequence[Value] | None:
    """The scale of codes times a constant, and sums of products of codes times both scales."""
    scales = [each for each in operands if isinstance(each, Part) and each.name == "scale" and each.factor is None]
    if len(scales) == 2:
        plain = [each.plain(walk) for each in scales]
        both = frozenset(each.scheme for each in scales)
        return [Paired(both, None, lambda: walk.form(walk.applied(node, plain)[0]))]
    pairs = [each for each in operands if isinstance(each, Paired)]
    if len(pairs) == 2:
        made = [each.of for each in pairs if each.of is not None]
        return list(made) if len(made) == 1 and pairs[0].schemes == pairs[1].schemes else None
    for one, other in (operands, operands[::-1]):
        if isinstance(one, Part) and one.name == "scale" and one.factor is None and isinstance(other, Constant):
            return [Part("scale", one.scheme, one.of, other)]
        if not (isinstance(one, Accumulated) and isinstance(other, Part) and other.name == "scale"):
            continue
        if other.scheme != one.scheme:
            return None
        grid, factor = one.grid, other.factor
        if factor is not None:
            rank = len(one.shape)
            channel = rank - 1 if one.axis == 1 else 1
            wide = (*[1] * (rank - len(factor.shape)), *factor.shape)
            if factor.size > 1 and (len(wide) != rank or factor.size != wide[channel]):
                return None
            vector = reshaped(factor, (factor.size,)) if factor.size > 1 else reshaped(factor, ())
            zero = grid.zero
            if zero is not None and zero.size != factor.size:
                values = np.broadcast_to(zero.whole().reshape(-1), (max(zero.size, factor.size),))
                vector = (
                    vector
                    if factor.size > 1
                    else walk.computed(np.broadcast_to(factor.whole().reshape(-1), (zero.size,)), [factor])
                )
                walk.table.pin([zero], walk.node)
                zero = Array(values.astype(zero.whole().dtype))
            found = _grid(grid.stored, vector, zero, one.axis, 0)
            if found is None:
                return None
            grid = found
        constant = weight(walk, grid, walk.node)
        result = None if constant is None else one.made(constant)
        if constant is None or result is None:
            return None
        integer_product(walk, constant)
        return [result]
    return None


# ── Products with packed weights ────────────────────────────────────────────────────────────────────────────────────


@operator("MatMulNBits", CONTRIB)
def matmul_nbits(walk, node, operands):
    x, codes, scaling = operands[:3]
    zero, order, bias = (*operands[3:], None, None, None)[:3]
    size, width, bits = (attribute(node, name, default) for name, default in (("K", 0), ("N", 0), ("bits", 4)))
    block, level = attribute(node, "block_size", 0), attribute(node, "accuracy_level", 0)
    if bits not in (2, 4, 8) or block < 16 or block & (block - 1) or order is not None or isinstance(x, Coded):
        return None
    if attribute(node, "weight_prepacked", 0) or (level == 4 and walk.side != "rewritten"):
        return None
    if not isinstance(codes, Constant) or not isinstance(scaling, Constant) or scaling.kind != "f":
        return None
    groups = -(-size // block)
    if codes.size != width * groups * (block * bits // 8) or scaling.size != width * groups:
        return None
    if zero is not None:
        if not isinstance(zero, Constant):
            return None
        count = groups if zero.kind == "f" else -(-groups * bits // 8)
        if zero.size != width * count or (zero.kind != "f" and type_name(zero) != "uint8"):
            return None
        zero = reshaped(zero, (width, count))
    grid = Packed(
        reshaped(codes, (width, groups, block * bits // 8)),
        reshaped(scaling, (width, groups)),
        zero,
        (width, size),
        bits,
        block,
    )
    constant = weight(walk, grid, node.outputs[0].name or "")
    if constant is None or type_name(codes) != "uint8":
        return None
    if level == 4:
        scheme = Scheme((), f"int8 per row and block of {block}, range of each input, in the kernel", "int8")
        activation(walk, node, scheme)
        # Blocks are summed by themselves, and their sums in floating point.
        if block > LARGEST_COUNT:
            walk.table.overflows.setdefault(walk.node, f"sums of {block} products of codes may not fit into 32 bits")
    return _with_bias(walk, matmul(walk, x, permuted(constant, (1, 0))), bias)


@operator("GatherBlockQuantized", CONTRIB)
def gather_block_quantized(walk, node, operands):
    data, indices, scaling = operands[:3]
    zero = operands[3] if len(operands) > 3 else None
    if not isinstance(data, Constant) or not isinstance(scaling, Constant) or len(data.shape) != 2:
        return None
    block, axis = attribute(node, "block_size", 128), attribute(node, "quantize_axis", 1)
    if attribute(node, "gather_axis", 0) not in (0, -2) or axis not in (1, -1) or block < 16:
        return None
    if type_name(data) != "uint8":
        constant = linear(walk, node, data, scaling, zero, 1, block)
    else:
        bits, rows = attribute(node, "bits", 4), data.shape[0]
        size = data.shape[1] * 8 // bits
        groups = -(-size // block)
        count = -(-groups * bits // 8)
        if size % block or scaling.shape != (rows, groups) or scaling.kind != "f":
            return None
        if zero is not None and (not isinstance(zero, Constant) or zero.shape != (rows, count)):
            return None
        packed_data = reshaped(data, (rows, groups, block * bits // 8))
        constant = weight(
            walk, Packed(packed_data, scaling, zero, (rows, size), bits, block), node.outputs[0].name or ""
        )
    return None if constant is None else RULES["", "Gather"](walk, _rows_of(), [constant, indices])


__all__ = [
    "COMMUTING",
    "CONTRIB",
    "OPERATORS",
    "Codes",
    "Part",
    "activation",
    "counted_product",
    "integer_product",
    "linear",
    "operator",
    "pinned",
    "results",
    "static_scheme",
]
