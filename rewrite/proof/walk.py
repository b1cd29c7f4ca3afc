"""One graph brought to normal form, node by node in topological order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from rewrite.proof import forms, inference, layouts, quantization, reduction, rotary, rows, symmetry
from rewrite.proof.chains import SINGLE_ULP, Centre, Chain, Diagonal, Exact, Factor, Matrix, Mean, Scalar, Spread
from rewrite.proof.constants import Array, Constant, Expanded, Stored, blocks, reshaped
from rewrite.proof.dimensions import ONE, Dim, Shape, opaque, parse
from rewrite.proof.forms import Form, Term, View, form_of, tidy
from rewrite.proof.products import Match, spacing_of_one
from rewrite.proof.rules import LARGEST_SIGNS, RULES, ends_in_constants, integers
from rewrite.proof.shapes import result_shape
from rewrite.proof.table import Table
from rewrite.proof.transforms import Hadamard, Repeated, Selection, Shift, Signs, Step, Transform
from rewrite.proof.values import Coded, Integers, Value

OLDEST_OPSET = 13
"""Before it, Softmax flattened, BatchNormalization trained by its number of outputs, and axes were attributes."""

FOLDED_ELEMENTS = 1 << 24
"""Constants up to this size may be computed with at once; larger ones only change layout."""

SMALL = 1 << 16
"""Constants up to this size are read to see whether they are zero."""

COMPUTED = 64
"""Roundings of float64 that are taken to be in a constant that arithmetic on constants made."""

CANDIDATES = 4
"""Values of the original that a value without a counterpart is compared with, in search of a change of basis."""

FOLDABLE = frozenset(
    "Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr"
    " BitwiseXor Cast Ceil Celu Clip Concat ConstantOfShape Cos Cosh CumSum DepthToSpace Div Einsum Elu Equal Erf"
    " Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool Greater"
    " GreaterOrEqual GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN"
    " LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max Mean Min Mish Mod Mul Neg NonZero"
    " Not OneHot Or Pad Pow PRelu RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp"
    " ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Round ScatterElements"
    " ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split"
    " Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor".split()
)
"""Operators whose reference implementation agrees with the standard and with ONNX Runtime (others were seen not to)."""

COMMUTATIVE = frozenset("And Or Xor Equal Max Min Add Mul BitwiseAnd BitwiseOr BitwiseXor".split())
RANDOM = frozenset(
    "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli"
    " Dropout BitmaskDropout BiasDropout BitmaskBiasDropout DropoutGrad BitmaskDropoutGrad".split()
)
"""Operators that draw numbers. A Dropout that draws none has a rule, which comes first."""


def as_in_graphs(transform: Transform) -> tuple[Transform, float]:
    """A map and a number in front of it, as a graph that holds the map as a constant is read (`rules.signs`)."""
    if isinstance(transform, Repeated):
        inner, number = as_in_graphs(transform.inner)
        return Repeated(inner, transform.left, transform.right), number
    if isinstance(transform, Hadamard) and transform.scale is not None and transform.size <= LARGEST_SIGNS:
        return Signs(np.sign(transform.matrix() / transform.scale).astype(np.int8), 1.0), transform.scale
    return transform, 1.0


@dataclass(frozen=True)
class Relation:
    """v′ = v·T + c of a value: `steps` are ("centre", or a transform or shift) and the axis it acts on, in order."""

    partner: str
    steps: tuple[tuple[Step | str, int], ...]

    def applied(self, walk: Walk, form: Form) -> Form | None:
        """The original's value after all steps; None where a step does not fit it."""
        for step, axis in self.steps:
            size = form.shape[axis].constant if -form.rank <= axis < form.rank else None
            if size is None:
                return None
            if step == "centre":
                form = walk.mapped(form, axis, Centre(size))
            elif isinstance(step, str):
                return None
            elif isinstance(step, Shift):
                after = form.rank - 1 - axis % form.rank
                if len(step.values) != size:
                    return None
                form = forms.add(form, walk.form(Array(step.values.reshape(-1, *[1] * after))))
            elif step.size != size:
                return None
            else:
                plain, number = as_in_graphs(step)
                form = forms.scaled(walk.mapped(form, axis, Exact(plain)), Scalar(number))
        return form


class Walk:
    """The values of one graph in normal form. `side` is 'original' or 'rewritten'; `table` is shared by both.

    `partner` is the original's walk when this is the rewritten graph: values of the same name are tried first when two
    values are compared, which saves comparisons and decides nothing. `relations` say of values of the rewritten graph
    what they are of the original's; each is checked where it stands, and `related` says which are true. From there on a
    value that is the original's times T is that, and not what its constants happen to round to. `reductions` name
    values of the original of which channels may depend on others (`reduction.py`).
    """

    def __init__(
        self,
        model: ir.Model,
        side: str,
        table: Table,
        partner: Walk | None = None,
        relations: Mapping[str, Relation] | None = None,
        reductions: Mapping[str, tuple[int, Selection]] | None = None,
    ) -> None:
        self.model, self.side, self.table, self.partner = model, side, table, partner
        self.relations = relations or {}
        self.related: dict[str, bool] = {}
        self.reductions = reductions or {}
        self.values: dict[str, Value] = {}
        self.node = ""
        self.epsilon_ulps = 0.0
        self._dimensions = self._input_dimensions()
        self._hint: int | None = None
        self._needed: set[ir.Node] = set()
        self._sure = True
        steps = [step for relation in self.relations.values() for step, _ in relation.steps]
        self._fewer = any(isinstance(step, Selection) and step.width < step.size for step in steps)
        self._unique = 0

    # ── The walk ────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        graph = self.model.graph
        if self._opset() < OLDEST_OPSET:
            raise ValueError(f"operators are known from opset {OLDEST_OPSET} on, this model has {self._opset()}")
        for value in graph.inputs:
            # An initializer that is also an input can be overridden: it is an input, not a constant.
            kind, shape = self.kind_of_dtype(value.dtype), self._declared(value)
            if shape is None:
                raise ValueError(f"the shape of input {value.name} is not known")
            self.values[value.name or ""] = form_of(self.atom(("input", value.name, kind), shape, kind))
        for name, value in graph.initializers.items():
            if name not in self.values and value.const_value is not None:
                self.values[name] = self._finite(Stored(self.side, name, value.const_value))
        self._needed = needed_nodes(self.model)
        for node in graph:
            self._sure = node in self._needed
            self.node = node.name or (node.outputs[0].name if node.outputs else "") or node.op_type
            self._hint = self._partner_number(node)
            self._assign(node, self._results(node))
            for output in node.outputs:
                name = output.name or ""
                if name in self.relations:
                    self.related[name] = self._relate(name, self.relations[name])
                elif isinstance(value := self.values.get(name), Form) and (
                    self._fewer or symmetry.holds_exact(value) or ends_in_constants(value)
                ):
                    # What equals its namesake is that from here on, and no product of shipped constants: of two of
                    # them in a row neither could be adjusted.
                    self._relate(name, Relation(name, ()))

    def _results(self, node: ir.Node) -> Sequence[Value]:
        if self._is_local(node):
            # A function of the model takes precedence over an operator of its name.
            return self._opaque(node, self._operands(node))
        domain = "" if node.domain in ("", "ai.onnx") else node.domain
        if domain == "" and node.op_type == "Constant":
            return [self._finite(self._constant_node(node))]
        if self.reductions and node.op_type in reduction.CHANNELWISE:
            self._reduce(node)
        operands = self._operands(node)
        quantized = quantization.results(self, node, operands)
        if quantized is not None:
            return quantized
        operands = [operand.plain(self) if isinstance(operand, Coded) else operand for operand in operands]
        apart = rows.taken_apart(self, node, operands)
        if apart is not None:
            return [apart.joined(result) for result in self.applied(node, apart.operands)]
        return self.applied(node, operands)

    def _operands(self, node: ir.Node) -> list[Value | None]:
        return [None if value is None else self.values[value.name or ""] for value in node.inputs]

    def applied(self, node: ir.Node, operands: Sequence[Value | None]) -> Sequence[Value]:
        """The results of an operator on operands that need not be its own."""
        domain = "" if node.domain in ("", "ai.onnx") else node.domain
        known = [operand for operand in operands if operand is not None]
        if domain == "" and any(isinstance(o, Integers) for o in known):
            arithmetic = layouts.integer_arithmetic(self, node, operands)
            if arithmetic is not None:
                return [arithmetic]
        apply = RULES.get((domain, node.op_type))
        if known and all(isinstance(o, Constant) for o in known) and not (apply and _keeps_constants(node)):
            folded = self._folded(node, operands)
            if folded is not None:
                return folded
        if apply is not None:
            result = apply(self, node, operands)
            if result is not None:
                return [result] if isinstance(result, Constant | Integers | Form | Coded) else result
        return self._opaque(node, operands)

    def _assign(self, node: ir.Node, results: Sequence[Value]) -> None:
        for output, result in zip(node.outputs, results):
            if output.name and result is not None:
                self.values[output.name] = result

    def _reduce(self, node: ir.Node) -> None:
        """Write operands as what their independent channels make them, where they are named for it."""
        for value in node.inputs:
            name = "" if value is None else value.name or ""
            if name in self.reductions and isinstance(form := self.values.get(name), Form):
                self.values[name] = reduction.reduced(self, form, *self.reductions[name]) or form

    def _relate(self, name: str, relation: Relation) -> bool:
        """Whether the value `name` is what its relation says; if so, it is that from now on."""
        theirs = self.partner.values.get(relation.partner) if self.partner is not None else None
        ours = self.values.get(name)
        if theirs is None or ours is None or self.partner is None:
            return False
        expected = relation.applied(self.partner, self.partner.form(theirs))
        if expected is None:
            return False
        outcome = self.table.match(self.form(ours), expected)
        if not isinstance(outcome, Match):
            return False
        self.table.commit(outcome, self.node)
        if not isinstance(ours, Constant):
            # A constant stays one: operators read it by its entries.
            self.values[name] = expected
        return True

    def aligned(self, form: Form, axis: int = -1) -> Form:
        """`form` as a value of the original times an exact transform of `axis`, where it is one but nobody said so.

        For a nonlinear operator's operand that no value of the original equals.
        """
        if self.side != "rewritten" or symmetry.ends_exactly(form) or form.kind != "f":
            return form
        if self.intern(form) not in self.table.strangers:
            return form
        last = form.rank - 1
        order = (*(i for i in range(form.rank) if i != axis % form.rank), axis % form.rank)
        for candidate in self.table.candidates(form)[:CANDIDATES]:
            original = self.table.forms[candidate]
            moved, known = (forms.transpose(each, order) for each in (form, original))
            size = known.shape[last].constant
            for transform in chain(self.table.found, inference.guesses(moved, known)):
                if transform.size == size:
                    expected = forms.mapped(original, axis, Exact(transform))
                else:
                    expected = symmetry.with_heads_mapped(self, original, transform)
                outcome = None if expected is None else self.table.match(form, expected)
                if expected is not None and isinstance(outcome, Match):
                    self.table.commit(outcome, self.node)
                    for each in (transform, transform.dual):
                        if each not in self.table.found:
                            self.table.found.append(each)
                    return expected
        return form

    def _partner_number(self, node: ir.Node) -> int | None:
        """The number of the original's value that the first operand's namesake is, if it has one."""
        if self.partner is None:
            return None
        for value in node.inputs:
            namesake = self.partner.values.get(value.name or "") if value is not None else None
            if isinstance(namesake, Form):
                return self.table.known(namesake)
        return None

    # ── What rules use ──────────────────────────────────────────────────────────────────────────────────────────

    def form(self, value: Value | None) -> Form:
        if isinstance(value, Form):
            return value
        if isinstance(value, Integers):
            shape = tuple(Dim.of(n) for n in value.shape)
            return form_of(self.atom(value.key, shape, "int64"))
        if isinstance(value, Coded):
            return value.plain(self)
        if value is None:
            raise ValueError(f"{self.node}: an operand is missing")
        return self._constant_form(value)

    def constant(self, value: float) -> Form:
        """A number that an operator's definition holds."""
        return self._constant_form(Array(np.array(value)))

    def shape(self, value: Value | None) -> Shape:
        if isinstance(value, Coded):
            value = value.plain(self)
        if isinstance(value, Form):
            return value.shape
        return tuple(Dim.of(n) for n in value.shape) if value is not None else ()

    def intern(self, form: Form) -> int:
        return self.table.intern(form, self.side, self.node, self._hint)

    def operand(self, value: Value | None) -> tuple[Any, ...]:
        """What an opaque operator's key says of an operand."""
        if value is None:
            return ("none",)
        if isinstance(value, Constant):
            return self.table.constant_number(value, self.node)
        if isinstance(value, Integers):
            return value.key
        return ("form", self.intern(self.form(value)))

    def atom(self, key: tuple[Any, ...], shape: Shape, kind: str = "f"):
        atom = self.table.atom(key, shape, kind, self.node, self.side)
        if self.side == "original" and self._sure:
            self.table.sure.add(atom.number)
        return atom

    def bilinear(self, key: tuple[Any, ...], compute: Callable[[], Form]) -> Form:
        """A product by its operands as they stand. A number that one graph has in front of a factor and the other
        inside its weight leaves two products of equal operands: the original's is known under both names.
        """
        if key not in self.table.products:
            result = compute()
            if self.side == "rewritten":
                return result
            self.table.products[key] = result
        return self.table.products[key]

    def opaque_key(self, domain: str, name: str, attributes: dict[str, Any], operands: list[Any]) -> tuple[Any, ...]:
        if domain == "" and "version" not in attributes:
            attributes = {"version": onnx.defs.get_schema(name, self._opset(), "").since_version, **attributes}
        if domain:
            attributes = {**attributes, "opset": self.model.opset_imports.get(domain)}
        return ("operator", domain, name, tuple(sorted(attributes.items())), tuple(operands), 0)

    def mapped(self, form: Form, axis: int, factor: Factor) -> Form:
        """`form` followed by `factor`; where its own maps are in the way, they are closed off into an atom first."""
        if isinstance(factor, Matrix | Diagonal) and factor.constant.size == 1:
            # One number: that of a tensor which holds others is told apart from them as a matrix.
            origin = factor.constant.stored
            if origin is None or origin.size == 1:
                return forms.scaled(form, self.number(factor.constant))
        result = forms.mapped(form, axis, factor)
        if result is not None:
            return result
        # The atom has the mapped axis last and the others cut as finely as they are made, so that a product over
        # (batch·sequence, d) and one over (batch, sequence, d) close off the same value.
        axis %= form.rank
        outer = [i for i in range(form.rank) if i != axis]
        ordered = forms.transpose(form, (*outer, axis))
        behind = symmetry.behind_heads(self, ordered)
        ordered = behind[0] if behind is not None else ordered
        fine = forms.reshape(ordered, (*_finest(ordered), ordered.shape[-1])) or ordered
        atom = self.atom(("value", self.intern(fine)), fine.shape)
        result: Form | None = form_of(atom)
        for each in (Exact(behind[1]), factor) if behind is not None else (factor,):
            result = None if result is None else forms.mapped(result, -1, each)
        if result is None:
            raise ValueError(f"axis {axis} of {tuple(map(str, form.shape))} is not static")
        back = forms.reshape(result, (*ordered.shape[:-1], result.shape[-1]))
        if back is None:
            raise ValueError(f"shape {tuple(map(str, form.shape))} cannot be taken apart")
        position = {old: new for new, old in enumerate((*outer, axis))}
        return forms.transpose(back, tuple(position[i] for i in range(form.rank)))

    def number(self, constant: Constant) -> Scalar:
        """A constant of one element as a number."""
        value = constant.whole().reshape(-1)[0]
        return Scalar(float(value), *self._written(constant, 1))

    def reciprocal(self, constant: Constant) -> Scalar:
        """One over a constant of one element."""
        return Scalar(1.0 / float(constant.whole().reshape(-1)[0]), *self._written(constant, -1))

    def _written(self, constant: Constant, power: int) -> tuple[tuple[tuple[str, int], ...], float]:
        """Who wrote a number down, and with which relative spacing; nobody, if it was computed."""
        origin = constant.stored
        if origin is None or origin.side != "rewritten" or constant.kind != "f":
            return (), 0.0
        return ((origin.name, power),), spacing_of_one(constant.raw((slice(0, 1),) * len(constant.shape)))

    def attribute(self, node: ir.Node, name: str, default: float) -> Scalar:
        """A floating-point attribute as a number: a float32 constant of the one node that has it; 1 is no factor."""
        value = float(np.float32(node.attributes[name].value if name in node.attributes else default))
        written = self.side == "rewritten" and name in node.attributes and value != 1.0
        return Scalar(value, ((f"{self.node}.{name}", 1),) if written else (), SINGLE_ULP if written else 0.0)

    def computed(self, values: np.ndarray, used: Iterable[Constant]) -> Array:
        """A constant that was computed from others, which must then be exactly as they are."""
        self.table.pin(used, self.node)
        return Array(np.asarray(values), COMPUTED)

    def pin(self, value: Value | None) -> None:
        if isinstance(value, Constant):
            self.table.pin([value], self.node)

    def small(self, constant: Constant) -> np.ndarray | None:
        return constant.whole() if constant.size <= FOLDED_ELEMENTS else None

    def note_epsilon(self, epsilon: float) -> None:
        """ε is compared as float32; one that is no float32 number is off by up to half an ulp of it."""
        nearest = float(np.float32(epsilon))
        if nearest != epsilon and epsilon > 0:
            self.table.ulps = max(self.table.ulps, abs(nearest - epsilon) / (nearest * SINGLE_ULP))

    @staticmethod
    def kind_of_dtype(dtype: ir.DataType | int | None) -> str:
        dtype = ir.DataType(dtype) if dtype is not None else ir.DataType.UNDEFINED
        # A cast to fewer than 16 bits is a quantization, not a rounding.
        if dtype.is_floating_point() and dtype.bitwidth >= 16:
            return "f"
        return "b" if dtype == ir.DataType.BOOL else dtype.name.lower()

    def elementwise(self, node: ir.Node, operands: Sequence[Value | None]) -> Callable[[np.ndarray], np.ndarray]:
        """The function of numbers that an elementwise node is of its first operand, in float64."""
        rest = [operand.whole() if isinstance(operand, Constant) else None for operand in operands[1:]]
        return lambda numbers: _evaluate(node, [numbers, *rest], self._opset())[0]

    # ── Constants ───────────────────────────────────────────────────────────────────────────────────────────────

    def _constant_form(self, constant: Constant) -> Form:
        shape = tuple(Dim.of(n) for n in constant.shape)
        if isinstance(constant, Expanded):
            return forms.widened(self._constant_form(constant.inner), shape)
        if constant.kind != "f":
            return form_of(self.atom(self.table.constant_number(constant, self.node), shape, constant.type))
        if 1 < constant.size <= SMALL and not constant.whole().any():
            # Nothing is added; it is a use all the same.
            self.table.pin([constant], self.node)
            return Form(shape, ())
        one = self.table.atom(("one",), (ONE,), "f", "", "original")
        blank: tuple[forms.Axis, ...] = ((),) * len(shape)
        if constant.size == 1:
            chain = Chain().scaled(self.number(constant))
            return Form(shape, () if chain is None else (Term(one, View(blank), None, (chain,)),))
        long = [axis for axis, n in enumerate(constant.shape) if n != 1]
        last = long[-1]
        width = constant.shape[last]
        axes: list[forms.Axis] = list(blank)
        if len(long) == 1:
            chain = Chain((Matrix(reshaped(constant, (1, width))),))
            axes[last] = (forms.Piece(0, ONE, Dim.of(width)),)
            return Form(shape, (Term(one, View(tuple(axes)), 0, (chain,)),))
        rows = constant.size // width
        eye = self.table.atom(("eye", rows), (Dim.of(rows), Dim.of(rows)), "f", "", "original")
        stride = rows
        for axis in long[:-1]:
            stride //= constant.shape[axis]
            axes[axis] = tidy([forms.Piece(0, Dim.of(stride), shape[axis])])
        axes[last] = (forms.Piece(1, ONE, Dim.of(width)),)
        chain = Chain((Matrix(reshaped(constant, (rows, width))),))
        return Form(shape, (Term(eye, View(tuple(axes)), 1, (chain,)),))

    def _finite(self, value: Value) -> Value:
        """A constant, as long as all its numbers are; one with ∞ or NaN is a value of its own and no linear map.

        A table of the original that is too large for a mask is taken to be finite: it is a weight, and if it is not
        finite the original is not either.
        """
        taken = self.side == "original" and isinstance(value, Constant) and value.size > FOLDED_ELEMENTS
        if not isinstance(value, Constant) or value.kind != "f" or taken:
            return value
        if all(np.isfinite(value.raw(region)).all() for region in blocks(value.shape)):
            return value
        shape = tuple(Dim.of(n) for n in value.shape)
        return form_of(self.atom(self.table.constant_number(value, self.node), shape))

    def _constant_node(self, node: ir.Node) -> Constant:
        # Its name is its output's, which no initializer has: it is a shipped constant like any other.
        name = node.outputs[0].name or ""
        for kind, attribute in node.attributes.items():
            if kind == "value":
                return Stored(self.side, name, attribute.value)
            if kind in ("value_float", "value_floats"):
                return Stored(self.side, name, ir.tensor(np.asarray(attribute.value, np.float32)))
            if kind in ("value_int", "value_ints"):
                return Stored(self.side, name, ir.tensor(np.asarray(attribute.value, np.int64)))
        raise ValueError("the constant is no tensor of numbers")

    def _folded(self, node: ir.Node, operands: Sequence[Value | None]) -> Sequence[Value] | None:
        """An operator on small constants, evaluated by ONNX's own reference in float64."""
        constants = [operand for operand in operands if isinstance(operand, Constant)]
        if node.op_type not in FOLDABLE:
            return None
        if (
            sum(c.size for c in constants) > FOLDED_ELEMENTS
            or node.op_type in RANDOM
            or node.domain not in ("", "ai.onnx")
        ):
            return None
        if node.op_type == "CastLike":
            # What it casts to may be a type of eight bits, in which float64 says nothing.
            return None
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            return None
        try:
            results = _evaluate(node, [o.whole() if isinstance(o, Constant) else None for o in operands], self._opset())
        except Exception:  # noqa: BLE001 - whatever the reference cannot evaluate is left to the rules
            return None
        self.table.pin(constants, self.node)
        return [self._finite(Array(_real(np.asarray(result)), COMPUTED)) for result in results]

    def _opset(self) -> int:
        imports = self.model.opset_imports
        return imports.get("", imports.get("ai.onnx", 23))

    # ── Opaque operators ────────────────────────────────────────────────────────────────────────────────────────

    def _is_local(self, node: ir.Node) -> bool:
        names = {"", "ai.onnx"} if node.domain in ("", "ai.onnx") else {node.domain}
        return any((domain, node.op_type, node.overload) in self.model.functions for domain in names)

    def _opaque(self, node: ir.Node, operands: Sequence[Value | None]) -> list[Value]:
        local = self._is_local(node)
        domain = "local" if local else "" if node.domain in ("", "ai.onnx") else node.domain
        channelwise = domain == "" and node.op_type in symmetry.ELEMENTWISE
        if channelwise and isinstance(form := operands[0], Form) and not any(isinstance(o, Form) for o in operands[1:]):
            copied = reduction.through(
                self,
                form,
                lambda x: self.form(self._opaque(node, [x, *operands[1:]])[0]),
                self.elementwise(node, operands),
                node.op_type in symmetry.HOMOGENEOUS,
            )
            if copied is not None:
                return [copied]
        moved = symmetry.through(self, node, operands) if domain == "" else None
        if moved is not None:
            inner, axis, transform = moved
            result = self._opaque(node, [inner, *operands[1:]])[0]
            return [self.mapped(self.form(result), axis, Exact(transform))]
        attributes = self.attributes(node, domain)
        keys: list[Any] = [self.operand(operand) for operand in operands]
        while keys and keys[-1] == ("none",):
            keys.pop()
        if domain == "" and node.op_type in COMMUTATIVE:
            keys.sort(key=repr)
        if attributes is None or node.op_type in RANDOM or local:
            # Equal to nothing, not even to itself in the other graph.
            self._unique += 1
            attributes = {"unique": (self.side, self._unique)}
        results: list[Value | None] = []
        base = self.opaque_key(domain, node.op_type, attributes, keys)
        for index, output in enumerate(node.outputs):
            shape = self._result_shape(node, operands, output, index, local)
            kind = self._result_kind(node, index, operands, local)
            key = (*base[:-1], index)
            known = self.table.atoms.get(key)
            if shape is None and known is None:
                if not output.uses() and not output.is_graph_output():
                    results.append(None)
                    continue
                raise ValueError(f"the shape of what {node.op_type} gives is not known")
            shape = known.shape if known is not None else shape or ()
            results.append(form_of(self.atom(key, shape, kind)))
        return results  # type: ignore[return-value]

    def attributes(self, node: ir.Node, domain: str) -> dict[str, Any] | None:
        """Attributes with the operator's defaults filled in, and the version of its meaning; None for subgraphs."""
        result: dict[str, Any] = {}
        if domain == "":
            try:
                schema = onnx.defs.get_schema(node.op_type, self._opset(), "")
            except onnx.defs.SchemaError:
                return None
            result["version"] = schema.since_version
            for name, declared in schema.attributes.items():
                if declared.default_value.type:
                    result[name] = _plain(onnx.helper.get_attribute_value(declared.default_value))
        for name, attribute in node.attributes.items():
            if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                return None
            value = attribute.value
            result[name] = Array(value.numpy()).digest if isinstance(value, ir.TensorProtocol) else _plain(value)
        # OneHot counts the axes of its result.
        counted = domain == "" and node.op_type != "OneHot" and isinstance(result.get("axis"), int)
        if counted and node.inputs and node.inputs[0] is not None:
            rank = len(self.shape(self.values.get(node.inputs[0].name or "")))
            result["axis"] = result["axis"] % rank - rank if rank else result["axis"]
        return result

    def _result_shape(
        self, node: ir.Node, operands: Sequence[Value | None], output: ir.Value, index: int, local: bool
    ) -> Shape | None:
        if not local and node.domain in ("", "ai.onnx") and (index == 0 or node.op_type == "TopK"):
            shapes = [None if operand is None else self.shape(operand) for operand in operands]
            shape = result_shape(node, operands, shapes, [integers(operand) for operand in operands])
            if shape is not None:
                return shape
        # What the rewritten model declares is never evidence.
        return self._declared(output) if self.side == "original" else None

    def _result_kind(self, node: ir.Node, index: int, operands: Sequence[Value | None], local: bool) -> str:
        """The kind of a result by the operator's signature, else as the original declares it."""
        if node.op_type == "Cast" and not local:
            return self.kind_of_dtype(node.attributes["to"].value)
        if node.op_type == "DequantizeLinear" and not local:
            # Of the type of its scale, which is a floating-point one.
            return "f"
        if not local and node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type):
            schema = onnx.defs.get_schema(node.op_type, self._opset(), "")
            wanted = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
            for position, operand in enumerate(operands):
                given = schema.inputs[min(position, len(schema.inputs) - 1)]
                if operand is not None and given.type_str == wanted and given.is_homogeneous:
                    return self.form(operand).kind
            constraints = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
            allowed = constraints.get(wanted, [wanted])
            if len(allowed) == 1 and allowed[0] in ("tensor(bool)", "tensor(int64)"):
                return "b" if allowed[0] == "tensor(bool)" else "int64"
        output = node.outputs[index]
        if self.side == "original" and output.dtype is not None:
            return self.kind_of_dtype(output.dtype)
        return "unknown"

    # ── Declared shapes ─────────────────────────────────────────────────────────────────────────────────────────

    def _input_dimensions(self) -> dict[str, str]:
        """This graph's dimension names in the original's words: axes of inputs of the same name are the same size."""
        if self.partner is None:
            return {}
        theirs = {value.name: value for value in self.partner.model.graph.inputs}
        renamed: dict[str, str] = {}
        for value in self.model.graph.inputs:
            other = theirs.get(value.name)
            if other is None or value.shape is None or other.shape is None or len(value.shape) != len(other.shape):
                continue
            for mine, known in zip(value.shape, other.shape):
                if not isinstance(mine, int) and not isinstance(known, int) and mine.value and known.value:
                    renamed.setdefault(str(mine.value), str(known.value))
        return renamed

    def _declared(self, value: ir.Value) -> Shape | None:
        if value.shape is None:
            return None
        sizes = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                sizes.append(Dim.of(size))
            elif not size.value:
                sizes.append(opaque("size", value.name, axis))
            else:
                sizes.append(parse(self._dimensions.get(str(size.value), str(size.value))))
        return tuple(sizes)


EVERYWHERE = frozenset(
    "Abs Add Attention BatchNormalization BiasGelu Cast Celu Clip Concat Cos Cosh Div Elu Erf"
    " Exp Expand FastGelu Flatten Gelu Gemm GroupNormalization GroupQueryAttention HardSigmoid HardSwish Identity"
    " InstanceNormalization LayerNormalization LeakyRelu Log LogSoftmax MatMul Mean Mish Mul MultiHeadAttention Neg Pow"
    " QuickGelu RMSNormalization Reciprocal ReduceMean ReduceSum ReduceL2 ReduceSumSquare Relu Reshape"
    " Selu Sigmoid SimplifiedLayerNormalization Sin Sinh SkipLayerNormalization"
    " SkipSimplifiedLayerNormalization Softmax Softplus Softsign Sqrt Squeeze Sub Sum Swish Tan Tanh Tile Transpose"
    " Unsqueeze".split()
)
"""Operators whose result is defined only where every entry of every operand is."""


def needed_nodes(model: ir.Model) -> set[ir.Node]:
    """Nodes on all of whose results the graph's outputs rest, whatever the input.

    Not those whose results others may be chosen in place of (Where, Slice, Gather), nor those that nobody reads.
    """
    needed: set[ir.Node] = set()
    outputs = set(model.graph.outputs)
    for node in reversed(list(model.graph)):
        read = [
            output in outputs or any(reader in needed and _rests_on(reader, index) for reader, index in output.uses())
            for output in node.outputs
        ]
        # A second result, a mean or a count, may rest on less than the first.
        if all(read) if node.op_type == "Split" else read[:1] == [True]:
            needed.add(node)
    return needed


def _rests_on(node: ir.Node, index: int) -> bool:
    """Whether a node's result is undefined where its operand `index` is anywhere."""
    if node.op_type == "Where":
        return index == 0
    if node.op_type.startswith("Gather") or node.op_type == "Slice":
        return index > 0
    if node.op_type in ("PRelu", "RotaryEmbedding"):
        # A slope is used below 0 only, and of the tables some rows.
        return index == 0
    if node.op_type == "BatchNormalization" and "training_mode" in node.attributes:
        return index < 3
    if node.op_type in ("Conv", "ConvTranspose"):
        return index > 0 or _reads_all(node)
    return node.op_type in EVERYWHERE or node.op_type == "Split"


def _reads_all(node: ir.Node) -> bool:
    """Whether a convolution's windows, or what is left of its result, leave nothing of its input out."""

    def sizes(name: str, default: int) -> list[int]:
        found = node.attributes.get(name)
        return [default] if found is None else [int(n) for n in found.value]

    if node.op_type == "ConvTranspose":
        own = not any(name in node.attributes for name in ("auto_pad", "output_shape"))
        return own and not any(sizes("pads", 0)) and min(sizes("output_padding", 0)) >= 0
    return max(sizes("strides", 1)) == max(sizes("dilations", 1)) == 1 and min(sizes("pads", 0)) >= 0


def _finest(form: Form) -> Shape:
    """The outer axes of `form`, each element of its first non-constant term an axis of its own."""
    term = next((term for term in form.terms if term.atom.key != ("one",)), None)
    if term is None:
        return form.shape[:-1]
    fine: list[Dim] = []
    for size, elements in zip(form.shape[:-1], term.view.axes):
        fine += [element.size for element in elements] or ([size] if size != ONE else [])
    return tuple(fine)


def _keeps_constants(node: ir.Node) -> bool:
    """Operators whose own rule keeps a constant's entries traceable to the stored tensor."""
    return node.op_type in (
        "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Cast",
        "Gather", "Expand", "Dropout", "Shape",
    )  # fmt: skip


def _real(array: np.ndarray) -> np.ndarray:
    """Floating-point numbers of any type as float64; other types as they are."""
    if array.dtype.kind in "OUSc":
        raise ValueError(f"values of type {array.dtype} are not real numbers")
    return array if Array(array).type != "f" else array.astype(np.float64)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | tuple):
        return tuple(_plain(entry) for entry in value)
    return value


def _evaluate(node: ir.Node, inputs: Sequence[np.ndarray | None], opset: int) -> list[np.ndarray]:
    """One node on arrays, floating-point ones in float64, by the ONNX reference implementation."""
    from onnx.reference import ReferenceEvaluator

    names = [f"x{i}" if array is not None else "" for i, array in enumerate(inputs)]
    attributes = []
    for name, attribute in node.attributes.items():
        if name == "to" and ir.DataType(attribute.value).is_floating_point():
            attributes.append(onnx.helper.make_attribute("to", onnx.TensorProto.DOUBLE))
        else:
            attributes.append(ir.to_proto(attribute))
    outputs = [f"y{i}" for i in range(len(node.outputs))]
    proto = onnx.helper.make_node(node.op_type, names, outputs)
    proto.attribute.extend(attributes)
    given = {name: array for name, array in zip(names, inputs) if array is not None}
    graph = onnx.helper.make_graph(
        [proto],
        "folded",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in given.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    results = ReferenceEvaluator(model).run(None, given)
    if not isinstance(results, list):
        raise TypeError(f"the reference gave a {type(results).__name__}")
    return results


__all__ = ["Centre", "Mean", "Spread", "Walk", "rotary"]
