"""The rule table: for every operator, what its result is in normal form.

Each rule is a function (walk, node, operands) -> results, registered under the operator's name. An operator without a
rule is opaque: a function, known by name and attributes only, of its operands' normal forms. Rules are the ONNX
definitions (and, for ONNX Runtime's fused operators, those of its operator documentation) read over the real numbers:
casts between floating-point types change nothing, everything else is exact.

Adding a rule: write the function, register it, and give it an identity and a negative control in
tests/proof/test_rules.py; the test fails for a rule that has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from rewrite.proof import forms, reduction, symmetry
from rewrite.proof.chains import SINGLE_ULP, Centre, Chain, Diagonal, Exact, Matrix, Mean, Scalar, diagonal_of
from rewrite.proof.constants import Array, Constant, Reciprocal, permuted, reshaped, sliced
from rewrite.proof.dimensions import ONE, Dim, Shape, broadcast, product
from rewrite.proof.forms import Form, form_of
from rewrite.proof.transforms import Isometry, Signs
from rewrite.proof.values import Integers, Value

if TYPE_CHECKING:
    from rewrite.proof.walk import Walk

Rule = Callable[["Walk", ir.Node, Sequence[Value | None]], "Value | Sequence[Value] | None"]
"""Results, one value or one for each output; None leaves the operator opaque."""

RULES: dict[tuple[str, str], Rule] = {}


def rule(*names: str, domain: str = "") -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[(domain, name)] = function
        return function

    return register


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or its default; a floating-point attribute is a float32 number, as ONNX stores it."""
    found = node.attributes.get(name)
    value = default if found is None else found.value
    return float(np.float32(value)) if isinstance(value, float) else value


def integers(value: Value | None) -> list[int] | None:
    """The entries of a constant integer operand."""
    if isinstance(value, Constant) and value.kind == "i":
        return [int(entry) for entry in value.whole().reshape(-1)]
    return None


# ── Arithmetic ──────────────────────────────────────────────────────────────────────────────────────────────────────


@rule("Add", "Sub")
def addition(walk, node, operands):
    a, b = (walk.form(operand) for operand in operands)
    if a.kind != "f":
        return _integer_identity(walk, operands, neutral=0, orders=1 if node.op_type == "Sub" else 2)
    return forms.add(a, forms.scaled(b, Scalar(-1.0)) if node.op_type == "Sub" else b)


@rule("Sum")
def summation(walk, node, operands):
    return forms.add(*(walk.form(operand) for operand in operands))


@rule("Neg")
def negation(walk, node, operands):
    form = walk.form(operands[0])
    return forms.scaled(form, Scalar(-1.0)) if form.kind == "f" else None


@rule("Mul")
def multiplication(walk, node, operands):
    a, b = operands
    if walk.form(a).kind != "f":
        return _integer_identity(walk, operands, neutral=1, orders=2)
    if isinstance(a, Constant):
        a, b = b, a
    return times_constant(walk, walk.form(a), b) if isinstance(b, Constant) else times(walk, walk.form(a), walk.form(b))


LARGEST_DIVISOR = 1 << 20
"""Entries of a constant that is read to see whether it may be divided by."""


@rule("Div")
def division(walk, node, operands):
    a, b = operands
    if walk.form(a).kind != "f":
        return None
    if isinstance(b, Constant):
        if b.size == 1:
            a, shape = walk.form(a), tuple(Dim.of(n) for n in b.shape)
            return forms.scaled(forms.widened(a, broadcast(a.shape, shape)), walk.reciprocal(b))
        if b.size > LARGEST_DIVISOR or not b.whole().all():
            return times(walk, walk.form(a), power(walk, walk.form(b), -1.0))
        return times_constant(walk, walk.form(a), Reciprocal(b))
    return times(walk, walk.form(a), power(walk, walk.form(b), -1.0))


def _integer_identity(walk, operands, neutral, orders):
    """x + 0 and x · 1 over the integers are x, in both `orders` or in one (x − 0); all else is opaque."""
    for value, other in (operands, operands[::-1])[:orders]:
        if isinstance(other, Constant) and other.size == 1 and int(other.whole().reshape(-1)[0]) == neutral:
            form = walk.form(value)
            if len(other.shape) <= form.rank:
                walk.table.pin([other], walk.node)
                return form
    return None


def times_constant(walk: Walk, form: Form, constant: Constant) -> Form:
    """x ⊙ c: a number, a diagonal along c's one axis, or else a product like any other."""
    shape = broadcast(form.shape, tuple(Dim.of(n) for n in constant.shape))
    wide = forms.widened(form, shape)
    if constant.size == 1:
        return forms.scaled(wide, walk.number(constant))
    long = [axis for axis, n in enumerate(constant.shape) if n != 1]
    if len(long) == 1:
        axis = long[0] - len(constant.shape)
        vector = Diagonal(reshaped(constant, (constant.size,)))
        return walk.mapped(wide, axis, vector)
    return times(walk, form, walk.form(constant))


def times(walk: Walk, a: Form, b: Form) -> Form:
    """The product of two values: numbers in front are taken out, x·(mean(x²) + ε)^-½ is read as the RMS core."""
    shape = broadcast(a.shape, b.shape)
    for x, y in ((a, b), (b, a)):
        number = _plain_number(y)
        if number is not None:
            return forms.scaled(forms.widened(x, shape), number)
        core = _rms_core(walk, x, y)
        if core is None:
            core = _polynomial(walk, x, y)
        if core is not None:
            return core
    copied = reduction.product(walk, a, b, lambda x, y: times(walk, x, y))
    if copied is not None:
        return copied
    peeled = symmetry.product(walk, a, b)
    if peeled is not None:
        result = times(walk, *peeled[:2])
        for transform in peeled[3]:
            result = walk.mapped(result, peeled[2], Exact(transform))
        return result
    scaled = symmetry.scaled_heads(walk, a, b)
    if scaled is not None:
        inner, other, axis, diagonal = scaled
        result = symmetry.map_heads(walk, times(walk, inner, other), axis, diagonal)
        if result is not None:
            return result
    # What only repeats along an axis is the same factor as before it was repeated.
    a, b = forms.narrowed(a), forms.narrowed(b)
    narrow = broadcast(a.shape, b.shape)
    key = ("product", *sorted(map(walk.intern, (a, b))))
    return forms.widened(walk.bilinear(key, lambda: _product(walk, a, b, narrow)), shape)


def _product(walk: Walk, a: Form, b: Form, shape: Shape) -> Form:
    a, b, out = _without_scalars(a, b)
    factors: list[int] = []
    for operand in (a, b):
        number = walk.intern(operand)
        known = walk.table.forms[number].atom
        if known is not None and known.key[0] == "product" and known.shape == shape:
            factors += known.key[1]
        else:
            factors.append(number)
    if len(set(factors)) == 1:
        atom = walk.atom(("power", factors[0], float(len(factors))), shape)
    else:
        atom = walk.atom(("product", tuple(sorted(factors))), shape)
    return forms.scaled(form_of(atom), out)


def _polynomial(walk: Walk, x: Form, y: Form) -> Form | None:
    """x · (c₀ + c₁·x² + …) as c₀·x + c₁·x³ + …: how some write the cubic inside tanh-GELU."""
    powers = [term.atom.key for term in y.terms if term.atom.key != ("one",)]
    if not powers or any(key[0] != "power" for key in powers) or x.shape != y.shape:
        return None
    bare, scalar = forms.without_scalar(x)
    number = walk.intern(bare)
    if any(key[1] != number for key in powers) or any(chain.body for term in y.terms for chain in term.chains):
        return None
    # The powers must lie as x does, and be defined wherever x is.
    if any(term.atom.key != ("one",) and term.view != forms.identity_view(term.atom) for term in y.terms):
        return None
    if any(key[2] <= 0 for key in powers):
        return None
    parts = []
    for term in y.terms:
        exponent = 1.0 if term.atom.key == ("one",) else term.atom.key[2] + 1.0
        part = power(walk, bare, exponent)
        parts += [forms.scaled(part, chain.scalar) for chain in term.chains]
    return forms.scaled(forms.add(*parts), scalar)


def _plain_number(form: Form) -> Scalar | None:
    if len(form.terms) == 1 and form.terms[0].atom.key == ("one",) and form.terms[0].axis is None:
        return form.terms[0].chains[0].scalar if form.shape == () or all(n == ONE for n in form.shape) else None
    return None


@rule("Pow")
def exponentiation(walk, node, operands):
    base, exponent = operands
    if not (isinstance(exponent, Constant) and exponent.size == 1) or walk.form(base).kind != "f":
        return None
    walk.table.pin([exponent], walk.node)
    base = walk.form(base)
    wide = forms.widened(base, broadcast(base.shape, walk.shape(exponent)))
    return power(walk, wide, float(exponent.whole().reshape(-1)[0]))


@rule("Sqrt")
def square_root(walk, node, operands):
    return power(walk, walk.form(operands[0]), 0.5)


@rule("Reciprocal")
def reciprocal(walk, node, operands):
    return power(walk, walk.form(operands[0]), -1.0)


def power(walk: Walk, form: Form, exponent: float) -> Form:
    """xᵖ. Exponents multiply where the product of powers is defined on as many numbers: (√x)² is not x below 0."""
    if exponent == 1.0:
        return form
    copied = reduction.through(walk, form, lambda x: power(walk, x, exponent), lambda c: c**exponent, False)
    if copied is not None:
        return copied
    peeled = symmetry.through_elementwise(walk, "Pow", form)
    if peeled is not None:
        return walk.mapped(power(walk, peeled[0], exponent), peeled[1], Exact(peeled[2]))
    number = walk.intern(form)
    known = walk.table.forms[number].atom
    if known is not None and known.key[0] == "power":
        inner = known.key[2]
        if inner == -1.0 or (inner in (0.5, -0.5) and exponent * inner != round(exponent * inner)):
            number, exponent = known.key[1], exponent * inner
            if exponent == 1.0:
                return walk.table.forms[number]
    return form_of(walk.atom(("power", number, exponent), form.shape))


# ── Norms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def rms(walk: Walk, form: Form, epsilon: float) -> Form:
    """x / √(mean(x²) + ε) over the last axis. ε is compared as a float32 number, in which it is always written."""
    form = walk.aligned(form)
    peeled = symmetry.peel(walk, form, -1)
    if peeled is not None:
        inner, transform = peeled
        values = diagonal_of(transform)
        if transform.orthogonal and transform.width == transform.size:
            return walk.mapped(rms(walk, inner, epsilon), -1, Exact(transform))
        if isinstance(transform, Isometry) and not transform.reading:
            # d − 1 channels of a·U: ‖x·a·U‖²/(d − 1) = ‖x·P‖²/d.
            core = rms(walk, walk.mapped(inner, -1, Centre(transform.size)), epsilon)
            return walk.mapped(core, -1, Exact(transform))
        if values is not None and (values == values[0]).all() and values[0] > 0:
            return rms(walk, inner, epsilon / float(values[0]) ** 2)
    walk.note_epsilon(epsilon)
    number, size = walk.intern(form), form.shape[-1].constant
    core = form_of(walk.atom(("rms", number, float(np.float32(epsilon))), form.shape))
    # Of centred values it is centred, and whoever reads it may know.
    centred = size is not None and _ends_centred(walk.table.forms[number])
    return walk.mapped(core, -1, Centre(size or 0)) if centred else core


def _ends_centred(form: Form) -> bool:
    """Whether every term is centred on the last axis."""
    axis = form.rank - 1
    return bool(form.terms) and all(
        term.axis is not None
        and term.whole(axis) == term.axis
        and all(chain.body and isinstance(chain.body[-1], Centre) for chain in term.chains)
        for term in form.terms
    )


def _rms_core(walk: Walk, x: Form, y: Form) -> Form | None:
    """x · (Σx²/d + ε)^-½ where the square is that of x itself."""
    root = walk.table.forms[walk.intern(y)].atom if len(y.terms) == 1 else None
    if root is None or root.key[0] != "power" or root.key[2] != -0.5:
        return None
    inside = walk.table.forms[root.key[1]]
    epsilon, square = None, None
    for term in inside.terms:
        if term.atom.key == ("one",) and term.axis is None:
            epsilon = term.chains[0].scalar
        elif term.atom.key[0] == "power" and term.atom.key[2] == 2.0:
            size = x.shape[-1].constant
            axis = len(term.atom.shape) - 1
            lies = (*forms.identity_view(term.atom).axes[:-1], (forms.Piece(axis, ONE, ONE),))
            if size is not None and term.chains == (Chain((Mean(size),)),) and term.axis == axis:
                square = term.atom if term.view == forms.View(lies) else None
    if epsilon is None or square is None or len(inside.terms) != 2 or not math.isfinite(epsilon.value):
        return None
    if square.key[1] != walk.intern(x) or inside.shape != (*x.shape[:-1], ONE):
        return None
    walk.table.held(epsilon.names, walk.node)
    return rms(walk, x, epsilon.value)


def _normalized_last(node: ir.Node, form: Form) -> bool:
    axis = attribute(node, "axis", -1)
    return axis in (-1, form.rank - 1) and form.shape[-1].constant is not None


def _scaled_and_shifted(walk, core: Form, scale, bias) -> Form:
    result = times_constant(walk, core, scale) if isinstance(scale, Constant) else times(walk, core, walk.form(scale))
    return result if bias is None else forms.add(result, walk.form(bias))


def layer_norm(walk, node, form, scale, bias, epsilon):
    size = form.shape[-1].constant
    return _scaled_and_shifted(walk, rms(walk, walk.mapped(form, -1, Centre(size)), epsilon), scale, bias)


def _unused(node: ir.Node, index: int) -> bool:
    return len(node.outputs) <= index or not (node.outputs[index].uses() or node.outputs[index].is_graph_output())


@rule("LayerNormalization")
def layer_normalization(walk, node, operands):
    form = walk.form(operands[0])
    if not _normalized_last(node, form) or not (_unused(node, 1) and _unused(node, 2)):
        return None
    bias = operands[2] if len(operands) > 2 else None
    return layer_norm(walk, node, form, operands[1], bias, attribute(node, "epsilon", 1e-5))


@rule("RMSNormalization")
@rule("SimplifiedLayerNormalization")
@rule("SimplifiedLayerNormalization", domain="com.microsoft")
def rms_normalization(walk, node, operands):
    form = walk.form(operands[0])
    if not _normalized_last(node, form) or not _unused(node, 1):
        return None
    return _scaled_and_shifted(walk, rms(walk, form, attribute(node, "epsilon", 1e-5)), operands[1], None)


def _skip_sum(walk, operands, bias_index):
    parts = [operands[0], operands[1]]
    if len(operands) > bias_index and operands[bias_index] is not None:
        parts.append(operands[bias_index])
    return forms.add(*(walk.form(part) for part in parts))


@rule("SkipSimplifiedLayerNormalization", domain="com.microsoft")
def skip_rms_normalization(walk, node, operands):
    total = _skip_sum(walk, operands, 3)
    if not (_unused(node, 1) and _unused(node, 2)) or total.shape[-1].constant is None:
        return None
    core = rms(walk, total, attribute(node, "epsilon", 1e-12))
    return [_scaled_and_shifted(walk, core, operands[2], None), total, total, total]


@rule("SkipLayerNormalization", domain="com.microsoft")
def skip_layer_normalization(walk, node, operands):
    total = _skip_sum(walk, operands, 4)
    if not (_unused(node, 1) and _unused(node, 2)) or total.shape[-1].constant is None:
        return None
    bias = operands[3] if len(operands) > 3 else None
    result = layer_norm(walk, node, total, operands[2], bias, attribute(node, "epsilon", 1e-12))
    return [result, total, total, total]


@rule("BatchNormalization")
def batch_normalization(walk, node, operands):
    """Frozen statistics only: (x − μ)·γ/√(σ² + ε) + β on axis 1."""
    # Before opset 14 more than one output means training.
    if attribute(node, "training_mode", 0) or any(output.name for output in node.outputs[1:]):
        return None
    if not all(isinstance(o, Constant) for o in operands[1:]):
        return None
    gamma, beta, mean, variance = operands[1:5]
    form = walk.form(operands[0])
    if form.rank < 2:
        return None

    def channels(constant: Constant) -> Form:
        return walk.form(reshaped(constant, (constant.size, *[1] * (form.rank - 2))))

    spread = variance.whole() + float(attribute(node, "epsilon", 1e-5))
    if not (np.isfinite(spread) & (spread > 0)).all():
        return None
    deviation = np.sqrt(spread)
    if isinstance(operands[0], Constant):
        values = operands[0].whole()
        along = (-1, *[1] * (values.ndim - 2))
        scale, shift = gamma.whole() / deviation, beta.whole()
        whole = (values - mean.whole().reshape(along)) * scale.reshape(along) + shift.reshape(along)
        return walk.computed(whole, [*operands[:5]])
    centred = forms.add(form, forms.scaled(channels(mean), Scalar(-1.0)))
    normalized = walk.mapped(centred, 1, Diagonal(walk.computed(1.0 / deviation, [variance])))
    return forms.add(walk.mapped(normalized, 1, Diagonal(gamma)), channels(beta))


# ── Linear operators ────────────────────────────────────────────────────────────────────────────────────────────────


@rule("MatMul")
def matrix_product(walk, node, operands):
    return matmul(walk, operands[0], operands[1])


def matmul(walk, a, b):
    left = walk.form(a)
    if left.kind != "f":
        return None
    if isinstance(b, Constant) and len(b.shape) == 2:
        return multiplied(walk, left, -1, b)
    if isinstance(a, Constant) and len(a.shape) == 2 and walk.form(b).rank >= 2:
        # A·X maps the rows of X: X is read along its last axis but one.
        return multiplied(walk, walk.form(b), -2, permuted(a, (1, 0)))
    return contraction(walk, left, walk.form(b))


def multiplied(walk: Walk, form: Form, axis: int, matrix: Constant) -> Form:
    form = settled(walk, form)
    hadamard = signs(walk, matrix)
    if hadamard is None:
        return walk.mapped(form, axis, Matrix(matrix))
    corner = (slice(0, 1), slice(0, 1))
    first = sliced(matrix, corner) if matrix.stored is not None else Array(matrix.raw(corner))
    return forms.scaled(walk.mapped(form, axis, Exact(hadamard)), walk.number(first))


def settled(walk: Walk, form: Form) -> Form:
    """`form` as the value of the original that it equals, where it ends in constants and there is one.

    Of a product of two shipped matrices neither could be adjusted; here the first is settled.
    """
    return walk.table.forms[walk.intern(form)] if ends_in_constants(form) else form


def ends_in_constants(form: Form) -> bool:
    """Whether a matrix or a diagonal is the last that was done to some of it."""
    terms = (term for term in form.terms if term.atom.key != ("one",))
    ends = (chain.body[-1] for term in terms for chain in term.chains if chain.body)
    return any(isinstance(end, Matrix | Diagonal) for end in ends)


LARGEST_SIGNS = 1 << 12


def signs(walk: Walk, constant: Constant) -> Signs | None:
    """The exact map x ↦ x·S of a constant c·S with a Hadamard matrix S; the number c is its first entry."""
    n = constant.shape[0]
    if constant.shape != (n, n) or not 2 <= n <= LARGEST_SIGNS:
        return None
    first = constant.read((slice(0, 1), slice(0, n)))
    scale = float(first.flat[0])
    if not scale or (np.abs(first) != abs(scale)).any():
        return None
    values = constant.whole()
    if (np.abs(values) != abs(scale)).any():
        return None
    try:
        return Signs(np.sign(values / scale).astype(np.int8), 1.0)
    except ValueError:
        return None


def contraction(walk: Walk, a: Form, b: Form) -> Form | None:
    """A·B of two values; numbers in front are taken out."""
    if a.rank < 2 or b.rank < 2 or a.kind != "f":
        return None
    shape = (*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    paired = symmetry.pairing(walk, a, b)
    if paired is not None:
        inner = contraction(walk, *paired[:2])
        return None if inner is None else forms.scaled(inner, Scalar(paired[2]))
    b = walk.aligned(b)
    behind = symmetry.peel(walk, b, -1)
    if behind is not None:
        inner = contraction(walk, a, behind[0])
        return None if inner is None else walk.mapped(inner, -1, Exact(behind[1]))

    headed = symmetry.heads(walk, b)
    if headed is not None:
        states, axis, transform = headed
        inner = contraction(walk, a, states)
        if inner is not None and inner.rank == b.rank and inner.shape[axis] == b.shape[axis]:
            result = symmetry.map_heads(walk, inner, axis, transform)
            if result is not None:
                return result

    def contracted() -> Form:
        left, right, out = _without_scalars(a, b)
        atom = walk.atom(("contraction", walk.intern(left), walk.intern(right)), shape)
        return forms.scaled(form_of(atom), out)

    return walk.bilinear(("contraction", walk.intern(a), walk.intern(b)), contracted)


def _without_scalars(a: Form, b: Form) -> tuple[Form, Form, Scalar]:
    """Both factors of a product less the numbers in front of them, and the product of those."""
    a, left = forms.without_scalar(a)
    b, right = forms.without_scalar(b)
    return a, b, left.times(right)


def _transposed(walk, value):
    if isinstance(value, Constant):
        order = (*range(len(value.shape) - 2), len(value.shape) - 1, len(value.shape) - 2)
        return permuted(value, order)
    form = walk.form(value)
    return forms.transpose(form, (*range(form.rank - 2), form.rank - 1, form.rank - 2))


@rule("Gemm")
def general_matrix_product(walk, node, operands):
    a = _transposed(walk, operands[0]) if attribute(node, "transA", 0) else operands[0]
    b = _transposed(walk, operands[1]) if attribute(node, "transB", 0) else operands[1]
    result = matmul(walk, a, b)
    if result is None:
        return None
    result = forms.scaled(result, walk.attribute(node, "alpha", 1.0))
    if len(operands) > 2 and operands[2] is not None:
        beta = walk.attribute(node, "beta", 1.0)
        result = forms.add(result, forms.scaled(walk.form(operands[2]), beta))
    return result


@rule("FusedMatMul", domain="com.microsoft")
def fused_matrix_product(walk, node, operands):
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return None
    a = _transposed(walk, operands[0]) if attribute(node, "transA", 0) else operands[0]
    b = _transposed(walk, operands[1]) if attribute(node, "transB", 0) else operands[1]
    result = matmul(walk, a, b)
    return None if result is None else forms.scaled(result, walk.attribute(node, "alpha", 1.0))


@rule("Gather")
def gathering(walk, node, operands):
    data, indices = operands
    axis = attribute(node, "axis", 0)
    if isinstance(data, Integers):
        return data.gathered(indices, axis)
    if isinstance(data, Constant):
        if data.kind != "f" or len(data.shape) != 2 or axis not in (0, -2):
            return None
        if isinstance(indices, Constant):
            return _constant_rows(walk, data, indices)
        shape = (*walk.shape(indices), Dim.of(data.shape[0]))
        rows = walk.atom(("onehot", walk.operand(indices), data.shape[0]), shape)
        return walk.mapped(form_of(rows), -1, Matrix(data))
    form = walk.form(data)
    positions = integers(indices)
    axis %= form.rank
    if positions is not None and (extent := form.shape[axis].constant) is not None:
        if any(not -extent <= p < extent for p in positions):
            raise ValueError(f"indices are outside an axis of {extent}")
    if positions is None:
        return selected(walk, form, ("gather", walk.operand(indices)), axis, axis + 1, walk.shape(indices))
    walk.table.pin([indices], walk.node)
    size = form.shape[axis].constant
    if any(p < 0 for p in positions):
        if size is None:
            # An index from the end of an axis of unknown size.
            if len(positions) != 1 or len(indices.shape) > 1:
                return None
            start = form.shape[axis] + positions[0]
        else:
            positions = [p % size for p in positions]
            start = Dim.of(positions[0])
    else:
        start = Dim.of(positions[0])
    if indices.shape == ():
        single = forms.take(form, axis, start, ONE)
        return forms.reshape(single, (*single.shape[:axis], *single.shape[axis + 1 :]))
    if len(indices.shape) != 1:
        return None
    if positions == list(range(positions[0], positions[0] + len(positions))):
        return forms.take(form, axis, start, Dim.of(len(positions)))
    digest = Array(np.array(positions)).digest
    return forms.take(form, axis, Dim.of(0), Dim.of(len(positions)), digest)


def _constant_rows(walk: Walk, data: Constant, indices: Constant) -> Constant | None:
    """Rows of a constant that constant indices pick: a slice of it where they follow each other."""
    rows, size, shape = integers(indices), data.shape[0], (*indices.shape, data.shape[1])
    if not rows or any(not -size <= row < size for row in rows):
        return None
    walk.table.pin([indices], walk.node)
    rows = [row % size for row in rows]
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return reshaped(sliced(data, (slice(rows[0], rows[0] + len(rows)), slice(0, data.shape[1]))), shape)
    values = walk.small(data)
    return None if values is None else walk.computed(values[rows].reshape(shape), [data])


@rule("GatherND")
def gathering_of_rows(walk, node, operands):
    if isinstance(operands[0], Constant) or attribute(node, "batch_dims", 0):
        return None
    form, indices = walk.form(operands[0]), walk.shape(operands[1])
    depth = indices[-1].constant
    if depth is None or depth >= form.rank:
        return None
    return selected(walk, form, ("gathernd", walk.operand(operands[1])), 0, depth, indices[:-1])


def selected(walk: Walk, form: Form, key: tuple, start: int, stop: int, sizes: Shape) -> Form | None:
    """Entries picked along axes start:stop, which become axes of `sizes`: maps on other axes stay outside.

    None where a map acts on an axis that is picked from; the operator is then opaque.
    """
    if form.kind != "f":
        return None
    shape = (*form.shape[:start], *sizes, *form.shape[stop:])
    moved = len(sizes) - (stop - start)
    terms: list[forms.Term] = []
    for term in form.terms:
        if not any(term.view.axes[axis] for axis in range(start, stop)):
            axes = (*term.view.axes[:start], *[()] * len(sizes), *term.view.axes[stop:])
            terms.append(forms.Term(term.atom, forms.View(axes, term.view.fixed), term.axis, term.chains))
            continue
        found = unmapped(form, term, range(start, stop))
        if found is None:
            return None
        inner, position = found
        atom = walk.atom((*key, walk.intern(inner), start), (*inner.shape[:start], *sizes, *inner.shape[stop:]))
        terms.append(
            mapped_again(atom, term, None if position is None else position + (moved if position >= stop else 0), shape)
        )
    return forms.collect(shape, terms)


def unmapped(form: Form, term: forms.Term, busy: range | list[int]) -> tuple[Form, int | None] | None:
    """`term` without its map, as a form, and the axis on which the map acts; None where that axis is `busy` or cut."""
    if term.axis is None:
        inner = forms.Term(term.atom, term.view, None, forms.IDENTITY)
        return Form(form.shape, (inner,)), None
    places = [axis for axis in range(form.rank) if term.whole(axis) == term.axis]
    if len(places) != 1 or places[0] in busy:
        return None
    position, size = places[0], term.atom.shape[term.axis]
    axes = list(term.view.axes)
    axes[position] = (forms.Piece(term.axis, ONE, size),)
    inner = forms.Term(term.atom, forms.View(tuple(axes), term.view.fixed), None, forms.IDENTITY)
    return Form((*form.shape[:position], size, *form.shape[position + 1 :]), (inner,)), position


def mapped_again(atom: forms.Atom, term: forms.Term, position: int | None, shape: Shape) -> forms.Term:
    """`atom` with the map of `term` on its axis `position`."""
    axes = list(forms.identity_view(atom).axes)
    if position is not None:
        axes[position] = (forms.Piece(position, ONE, shape[position]),)
    return forms.Term(atom, forms.View(tuple(axes)), position, term.chains)


@rule("ReduceMean", "ReduceSum")
def reduce(walk, node, operands):
    form = walk.form(operands[0])
    if form.kind != "f":
        return None
    axes = attribute(node, "axes", None)
    if len(operands) > 1 and operands[1] is not None:
        axes = integers(operands[1])
        if axes is None:
            return None
        walk.table.pin([operands[1]], walk.node)
    if not axes:
        if attribute(node, "noop_with_empty_axes", 0):
            return form
        axes = range(form.rank)
    axes = sorted(axis % form.rank for axis in axes)
    keep = bool(attribute(node, "keepdims", 1))
    mean = node.op_type == "ReduceMean"
    size = form.shape[-1].constant
    if axes == [form.rank - 1] and size is not None:
        result = walk.mapped(form, -1, Mean(size))
        result = result if mean else forms.scaled(result, Scalar(float(size)))
    else:
        result = reduced_elsewhere(walk, form, axes, mean)
        if result is None:
            return None
    if keep:
        return result
    return forms.reshape(result, tuple(n for axis, n in enumerate(result.shape) if axis not in axes))


def reduced_elsewhere(walk: Walk, form: Form, axes: list[int], mean: bool) -> Form | None:
    """A mean or sum over axes on which no map acts: it goes inside, to the atoms, and the maps stay outside."""
    shape = tuple(ONE if axis in axes else n for axis, n in enumerate(form.shape))
    count = product(form.shape[axis] for axis in axes)
    parts: list[Form] = []
    for term in form.terms:
        if not any(term.view.axes[axis] for axis in axes):
            if not mean and count.constant is None:
                return None
            part = Form(shape, (term,))
            parts.append(part if mean else forms.scaled(part, Scalar(float(count.constant or 0))))
            continue
        found = unmapped(form, term, axes)
        if found is None:
            return None
        inner, position = found
        reduced = tuple(ONE if axis in axes else n for axis, n in enumerate(inner.shape))
        atom = walk.atom(("mean" if mean else "sum", walk.intern(inner), tuple(axes)), reduced)
        parts.append(Form(shape, (mapped_again(atom, term, position, shape),)))
    return forms.collect(shape, (term for part in parts for term in part.terms))


# ── Activations written out, and their fused forms ──────────────────────────────────────────────────────────────────


def unary(walk: Walk, name: str, form: Form) -> Form:
    """An elementwise function by its ONNX name; the same atom that the operator itself makes."""
    numbers = walk.elementwise(ir.node(name, [None]), [None])
    copied = reduction.through(walk, form, lambda x: unary(walk, name, x), numbers, name in symmetry.HOMOGENEOUS)
    if copied is not None:
        return copied
    peeled = symmetry.through_elementwise(walk, name, form)
    if peeled is not None:
        return walk.mapped(unary(walk, name, peeled[0]), peeled[1], Exact(peeled[2]))
    return form_of(walk.atom(walk.opaque_key("", name, {}, [walk.operand(form)]), form.shape))


def defined(value: float) -> Scalar:
    """A real number of an operator's definition, which is a float32 number wherever it is written out."""
    return Scalar(value, defined=SINGLE_ULP)


def gelu_exact(walk: Walk, x: Form) -> Form:
    inner = unary(walk, "Erf", forms.scaled(x, defined(1.0 / math.sqrt(2.0))))
    return times(walk, forms.scaled(x, Scalar(0.5)), forms.add(inner, walk.constant(1.0)))


def gelu_tanh(walk: Walk, x: Form) -> Form:
    cubic = forms.add(x, forms.scaled(power(walk, x, 3.0), defined(0.044715)))
    inner = unary(walk, "Tanh", forms.scaled(cubic, defined(math.sqrt(2.0 / math.pi))))
    return times(walk, forms.scaled(x, Scalar(0.5)), forms.add(inner, walk.constant(1.0)))


@rule("Gelu")
@rule("Gelu", domain="com.microsoft")
def gelu(walk, node, operands):
    x = walk.form(operands[0])
    return gelu_tanh(walk, x) if attribute(node, "approximate", "none") == "tanh" else gelu_exact(walk, x)


@rule("BiasGelu", domain="com.microsoft")
def bias_gelu(walk, node, operands):
    return gelu_exact(walk, forms.add(walk.form(operands[0]), walk.form(operands[1])))


@rule("FastGelu", domain="com.microsoft")
def fast_gelu(walk, node, operands):
    x = walk.form(operands[0])
    if len(operands) > 1 and operands[1] is not None:
        x = forms.add(x, walk.form(operands[1]))
    return gelu_tanh(walk, x)


@rule("QuickGelu", domain="com.microsoft")
def quick_gelu(walk, node, operands):
    x = walk.form(operands[0])
    inner = forms.scaled(x, walk.attribute(node, "alpha", 1.702))
    return times(walk, x, unary(walk, "Sigmoid", inner))


@rule("Swish")
def swish(walk, node, operands):
    x = walk.form(operands[0])
    return times(walk, x, unary(walk, "Sigmoid", forms.scaled(x, walk.attribute(node, "alpha", 1.0))))


# ── Attention ───────────────────────────────────────────────────────────────────────────────────────────────────────


def softmax(walk: Walk, form: Form, axis: int) -> Form:
    key = walk.opaque_key("", "Softmax", {"axis": axis % form.rank - form.rank}, [walk.operand(form)])
    return form_of(walk.atom(key, form.shape))


@rule("Softmax")
def softmax_operator(walk, node, operands):
    return softmax(walk, walk.form(operands[0]), attribute(node, "axis", -1))


def attend(walk: Walk, query: Form, key: Form, value: Form, bias: Form | None, scale: Scalar) -> Form | None:
    """softmax(scale·q·kᵀ + bias)·v for (batch, heads, length, head size); heads of k and v are repeated to q's."""
    repeated = []
    for states in (key, value):
        heads = states.shape[1].quotient(query.shape[1])
        groups = query.shape[1].quotient(states.shape[1])
        if groups is None:
            return None
        if heads != ONE:
            batch, kv, length, size = states.shape
            split = forms.reshape(states, (batch, kv, ONE, length, size))
            if split is None:
                return None
            wide = forms.widened(split, (batch, kv, groups, length, size))
            states = forms.reshape(wide, (batch, kv * groups, length, size))
            if states is None:
                return None
        repeated.append(states)
    scores = contraction(walk, query, forms.transpose(repeated[0], (0, 1, 3, 2)))
    if scores is None:
        return None
    scores = forms.scaled(scores, scale)
    if bias is not None:
        scores = forms.add(scores, bias)
    return contraction(walk, softmax(walk, scores, -1), repeated[1])


@rule("Attention")
def attention(walk, node, operands):
    """The ONNX operator (opset 23), without past, softcap or causal flag: those stay opaque."""
    query, key, value = (walk.form(operand) for operand in operands[:3])
    extra = [operand for operand in operands[4:] if operand is not None]
    if extra or len([o for o in node.outputs if o.uses() or o.is_graph_output()]) > 1:
        return None
    if attribute(node, "softcap", 0.0) or attribute(node, "is_causal", 0):
        return None
    mask = operands[3] if len(operands) > 3 else None
    bias = walk.form(mask) if mask is not None else None
    if bias is not None and bias.kind != "f":
        return None
    if bias is not None and bias.shape[-1:] != key.shape[1 if key.rank == 3 else 2 :][:1]:
        # A mask that is shorter than the keys is padded, not repeated.
        return None
    packed = query.rank == 3
    if packed:
        split = [
            _heads(states, attribute(node, "kv_num_heads" if index else "q_num_heads", 0))
            for index, states in enumerate((query, key, value))
        ]
        parts = [part for part in split if part is not None]
        if len(parts) != 3:
            return None
        query, key, value = parts
    size = query.shape[-1].constant
    if "scale" in node.attributes:
        scale = walk.attribute(node, "scale", 1.0)
    elif size is not None:
        scale = defined(1.0 / math.sqrt(size))
    else:
        return None
    result = attend(walk, query, key, value, bias, scale)
    return _joined_heads(result) if packed and result is not None else result


def _heads(form: Form, heads: int) -> Form | None:
    """(batch, length, heads·size) → (batch, heads, length, size)."""
    size = form.shape[2].quotient(Dim.of(heads)) if heads else None
    if size is None:
        return None
    split = forms.reshape(form, (form.shape[0], form.shape[1], Dim.of(heads), size))
    return None if split is None else forms.transpose(split, (0, 2, 1, 3))


def _joined_heads(form: Form) -> Form | None:
    """(batch, heads, length, size) → (batch, length, heads·size)."""
    batch, heads, length, size = form.shape
    return forms.reshape(forms.transpose(form, (0, 2, 1, 3)), (batch, length, heads * size))


@rule("MultiHeadAttention", domain="com.microsoft")
def multi_head_attention(walk, node, operands):
    """Packed (batch, length, heads·size) queries, keys and values, with an additive attention bias (input 5)."""
    if any(o is not None for index, o in enumerate(operands) if index not in (0, 1, 2, 5)):
        return None
    if attribute(node, "unidirectional", 0) or len(node.outputs) > 1:
        return None
    heads = attribute(node, "num_heads", 0)
    query, key, value = (walk.form(operand) for operand in operands[:3])
    if query.rank != 3:
        return None
    split = [_heads(query, heads)]
    split += [_heads(states, heads) if states.rank == 3 else states for states in (key, value)]
    parts = [part for part in split if part is not None]
    if len(parts) != 3:
        return None
    query, key, value = parts
    size = query.shape[-1].constant
    if attribute(node, "scale", 0.0):
        scale = walk.attribute(node, "scale", 0.0)
    elif size is not None:
        scale = defined(1.0 / math.sqrt(size))
    else:
        return None
    bias = walk.form(operands[5]) if len(operands) > 5 and operands[5] is not None else None
    result = attend(walk, query, key, value, bias, scale)
    return None if result is None else _joined_heads(result)
