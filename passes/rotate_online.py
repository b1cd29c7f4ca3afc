"""Turn hidden values by a Hadamard matrix while the network runs, where no constant could take the turn in.

      h is the result of a nonlinear operator, W a constant
    ─────────────────────────────────────────────────────────   H = c·S,  SSᵀ = n·I       (down projection, R4)
      h·W  =  (h·H)·(H⁻¹W)

      q and k are contracted over n channels
    ─────────────────────────────────────────────────────────   H = c·S,  G = S/(c·n)     (query and key, R3)
      q·kᵀ  =  (q·H)·(k·G)ᵀ,      since H·Gᵀ = I

S is a ±1 Hadamard matrix, kept as the Kronecker product of two, so that a row costs n·(a + b) products and not n²:
x as (a, b) becomes Aᵀ·x·B. c is the power of two nearest to 1/√n, which no number format rounds. Where n has no such
matrix, equal blocks of n are turned; a size that is odd, or twice an odd number, is refused. For queries and keys
1/(c·n) must be a power of two as well, or a rounded G would scale all logits: there blocks have a power of two of rows.

Queries and keys are turned where they stand last before they are repeated for several heads, behind rotary positions.
It costs time, and pays where what is turned is quantized: no recipe runs it by default.

Shapes    h (..., n)   q, k (..., n)   S (n, n) = A (a, a) ⊗ B (b, b)   W (n, d)
Relation  equal over the reals; h stays, queries and keys behind the turn are the original's times H and G
Source    Ashkboos et al. 2024, arXiv:2404.00456, §4.1 and §4.2; Liu et al. 2024, arXiv:2405.16406 (R3, R4)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.factors import factors, unabsorbed
from rewrite.basis.regions import Region, Use
from rewrite.basis.transforms import CENTRING
from rewrite.ir.axes import Role, follow, operand
from rewrite.ir.constants import is_constant
from rewrite.ir.edit import ORIGIN, describe, is_operator, only_use, shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Constant
from rewrite.passes.rotate_residual import absorb
from rewrite.proof.hadamard import parts
from rewrite.proof.transforms import Hadamard, Repeated, Transform
from rewrite.rule import Breach, Change, Pass, Requirement, Site

SMALLEST_BLOCK = 4
"""A turn of fewer channels spreads nothing."""

BETWEEN_LOGITS_AND_SOFTMAX = (
    *("Add", "Sub", "Mul", "Div", "Where", "Cast", "Tanh", "Identity", "Reshape", "Transpose", "Concat", "Clip"),
)
"""Scale, mask, cap, layout, sinks."""


@dataclass(frozen=True)
class Down(Site):
    """Products h·W with one constant W (or parts of one), and what W is."""

    size: int
    readers: tuple[Use, ...]
    factors: list[Region]


@dataclass(frozen=True)
class Logits(Site):
    """A product of queries and keys over `size` channels, `heads` times in a row for each of the two operands."""

    size: int
    product: ir.Node
    operands: tuple[Use, Use]
    heads: tuple[int, int]


def _has_matrix(rule: RotateOnline, site: Down | Logits) -> Breach | None:
    if site.size == 0:
        return Breach(site.nodes[0], "the number of its channels is not static")
    if site.size < rule.min_size:
        return Breach(site.nodes[0], f"{site.size} channels, {rule.min_size} asked for")
    if turn(site.size, doubled=isinstance(site, Logits)) is None:
        return Breach(site.nodes[0], f"no Hadamard matrix divides {site.size} channels")
    return None


def _all_hidden(rule: RotateOnline, site: Down | Logits) -> Breach | None:
    for use in site.readers if isinstance(site, Down) else ():
        if not _is_hidden(use):
            return Breach(use.node, "the same matrix multiplies a value that is no nonlinear operator's result")
    return None


def _absorbs(rule: RotateOnline, site: Down | Logits) -> Breach | None:
    return Breach.at(unabsorbed(_read(site.readers), site.factors)) if isinstance(site, Down) else None


def _no_cache(rule: RotateOnline, site: Down | Logits) -> Breach | None:
    if isinstance(site, Logits) and is_operator(site.product, "Attention"):
        node = site.product
        if operand(node, 4) is not None or any(value.uses() or value.is_graph_output() for value in node.outputs[1:2]):
            return Breach(node, "it keeps the keys in a cache, which others see")
    return None


def _last_axis(rule: RotateOnline, site: Down | Logits) -> Breach | None:
    if isinstance(site, Logits):
        for use in site.operands:
            if _place(use) is None:
                return Breach(use.node, f"the channels of {use.value.name} are never a last axis")
    return None


@dataclass(frozen=True)
class RotateOnline(Pass[Down | Logits]):
    """Hadamard products in the graph: in front of down projections, and on queries and keys.

    `down` and `query_key` choose the places, `min_size` how many channels are worth it.
    """

    down: bool = True
    query_key: bool = True
    min_size: int = 8

    name: ClassVar[str] = "rotate-online"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "the channels are as many as a Hadamard matrix has rows, or blocks of them", _has_matrix),
        Requirement("R2", "every product with the matrix reads a nonlinear operator's result", _all_hidden),
        Requirement("R3", "the matrix is constant, and nothing else reads what it is made into", _absorbs),
        Requirement("R4", "the keys are in no cache of the operator", _no_cache),
        Requirement("R5", "queries and keys have their channels on a last axis", _last_axis),
    )

    def sites(self, program: Program) -> Iterator[Down | Logits]:
        seen: set[ir.Node] = set()
        for node in list(program.model.graph):
            if node.graph is None or node in seen or node.metadata_props.get(ORIGIN) == self.name:
                continue
            if self.query_key and (logits := _logits(node)) is not None:
                if not all(_is_turned(use, self.name) for use in logits.operands):
                    yield logits
            elif self.down and (down := _down(node)) is not None:
                seen.update(use.node for use in down.readers)
                if not all(_is_turned(use, self.name) for use in down.readers):
                    yield down

    def rewrite(self, site: Down | Logits, change: Change) -> None:
        one = turn(site.size, doubled=isinstance(site, Logits))
        if one is None:
            raise ValueError(f"no Hadamard matrix divides {site.size} channels")
        if isinstance(site, Down):
            for use in site.readers:
                use.node.replace_input_with(use.position, _turned(use, one, change))
            absorb(change, [use for factor in site.factors for use in factor.constants], one.dual, "turned")
            for value in dict.fromkeys(value for factor in site.factors for value in factor.axes):
                change.rename(value, "turned")
            change.notes.append(f"{site.size} channels are turned in front of {len(site.readers)} products")
            return
        for use, heads, transform in zip(site.operands, site.heads, (one, one.dual)):
            whole = transform if heads == 1 else _repeated(transform, heads)
            place, passed = _place(use) or (use, [])
            place.node.replace_input_with(place.position, _turned(place, whole, change))
            change.stamp(place.node)
            for value, axis in passed:
                change.relate(value, whole, axis)
        change.notes.append(f"queries and keys of {site.size} channels are turned")


def turn(size: int, doubled: bool = False) -> Transform | None:
    """c·S for `size` channels, or for equal blocks of them; None where blocks would be too small.

    With `doubled` the order is a power of two, so that the scale of the inverse is one too.

    >>> turn(4096).scale, turn(92).left, turn(6)
    (0.015625, 23, None)
    >>> turn(96).size, turn(96, doubled=True).left
    (96, 3)
    """
    divisors = (divisor for divisor in range(size, SMALLEST_BLOCK - 1, -1) if size % divisor == 0)
    orders = (divisor for divisor in divisors if parts(divisor) is not None)
    order = next((order for order in orders if not doubled or order & (order - 1) == 0), None)
    if order is None:
        return None
    hadamard = Hadamard(order, scale=2.0 ** -round(math.log2(order) / 2))
    return hadamard if order == size else Repeated(hadamard, left=size // order)


def _repeated(transform: Transform, times: int) -> Transform:
    if isinstance(transform, Repeated):
        return Repeated(transform.inner, left=times * transform.left)
    return Repeated(transform, left=times)


# --------------------------------------------------------------------------------------------------------------- sites


def _down(node: ir.Node) -> Down | None:
    """The product of a hidden value with a constant, and all products with the same constant."""
    if not is_operator(node, "MatMul") or is_constant(node.inputs[0]):
        return None
    shape = shape_of(node.inputs[0])
    if shape is None or len(shape) < 2 or not _is_hidden(Use(node, 0, len(shape) - 1)):
        return None
    use = Use(node, 0, len(shape) - 1)
    found = factors(_read((use,)), CENTRING)
    if not any(factor.constants for factor in found):
        return None
    readers = [use]
    for other in (other for factor in found for other in factor.readers):
        rank = len(shape_of(other.node.inputs[0]) or ())
        if other.node is not node and other.position == 1 and is_operator(other.node, "MatMul"):
            readers.append(Use(other.node, 0, rank - 1))
    size, nodes = shape[-1], tuple(dict.fromkeys(reader.node for reader in readers))
    name = node.inputs[0].name if node.inputs[0] is not None else None
    return Down(name or "", nodes, size if isinstance(size, int) else 0, tuple(readers), found)


def _read(readers: Sequence[Use]) -> Region:
    """A region that is only read: what `factors` and `unabsorbed` ask of one."""
    return Region(CENTRING, readers[0].value, 0, readers=list(readers))


def _is_hidden(use: Use) -> bool:
    """Whether an operand is what a nonlinear operator makes of each channel, or a product of two values."""
    value, axis = use.value, use.axis
    while (node := value.producer()) is not None:
        thread = follow(node, value.index() or 0, axis, result=True)
        if thread.role in (Role.CHANNELWISE, Role.HOMOGENEOUS):
            return not is_operator(node, "Softmax", "LayerNormalization", "RMSNormalization")
        step = _step(node, value, axis)
        if step is None:
            return False
        value, axis = step.value, step.axis
    return False


def _step(node: ir.Node, value: ir.Value, axis: int) -> Use | None:
    """The one operand behind a layout operator, or behind a product with one number a row."""
    thread = follow(node, value.index() or 0, axis, result=True)
    if thread.role not in (Role.MOVE, Role.SCALE) or len(thread.inputs) != 1:
        return None
    position, before = thread.inputs[0]
    behind = operand(node, position)
    return None if behind is None or is_constant(behind) else Use(node, position, before)


def _logits(node: ir.Node) -> Logits | None:
    """The product of queries and keys, of which at least one is computed."""
    query, key = operand(node, 0), operand(node, 1)
    before, shape = shape_of(query), shape_of(key)
    if query is None or key is None or before is None or shape is None or is_constant(query) or is_constant(key):
        return None
    heads = (1, 1)
    if is_operator(node, "Attention"):
        uses = (Use(node, 0, len(before) - 1), Use(node, 1, len(shape) - 1))
        if len(before) == 3:
            heads = (node.attributes.get_int("q_num_heads", 1), node.attributes.get_int("kv_num_heads", 1))
    elif is_operator(node, "MatMul") and len(before) > 1 and len(shape) > 1 and _feeds_softmax(node):
        uses = (Use(node, 0, len(before) - 1), Use(node, 1, len(shape) - 2))
    else:
        return None
    sizes = [each[use.axis] for each, use in zip((before, shape), uses)]
    channels = [size // count if isinstance(size, int) else 0 for size, count in zip(sizes, heads)]
    same = channels[0] if channels[0] == channels[1] else 0
    return Logits(node.outputs[0].name or "", (node,), same, node, uses, heads)


def _feeds_softmax(product: ir.Node) -> bool:
    queue, seen = [product], {product}
    while queue:
        for use in [use for value in queue.pop().outputs for use in value.uses()]:
            if is_operator(use.node, "Softmax"):
                return True
            if use.node not in seen and is_operator(use.node, *BETWEEN_LOGITS_AND_SOFTMAX):
                seen.add(use.node)
                queue.append(use.node)
    return False


def _place(use: Use) -> tuple[Use, list[tuple[ir.Value, int]]] | None:
    """Where an operand is to be turned, and the values between there and the product, with their axes of channels.

    It is the farthest place in front of layout operators at which the channels are the last axis, and from which the
    value goes nowhere else.
    """
    found: tuple[Use, list[tuple[ir.Value, int]]] | None = None
    passed: list[tuple[ir.Value, int]] = []
    while True:
        value = use.value
        if use.axis == len(shape_of(value) or ()) - 1:
            found = use, list(passed)
        node = value.producer()
        step = _step(node, value, use.axis) if node is not None and only_use(value) is not None else None
        if step is None:
            return found
        passed.append((value, use.axis))
        use = step


def _is_turned(use: Use, name: str) -> bool:
    """Whether the pass `name` has turned this operand, here or behind layout operators."""
    value, axis = use.value, use.axis
    while (node := value.producer()) is not None:
        if node.metadata_props.get(ORIGIN) == name and _is_product(node):
            return True
        step = _step(node, value, axis)
        if step is None:
            return False
        value, axis = step.value, step.axis
    return False


def _is_product(node: ir.Node) -> bool:
    return is_operator(node, "Reshape", "MatMul")


# ------------------------------------------------------------------------------------------------------------- products


def _turned(use: Use, transform: Transform, change: Change) -> ir.Value:
    """x·T on the last axis of an operand, made once for all that read it."""
    value = use.value
    known = f"{value.name}·{transform.key}"
    if known not in change.editor.made:
        readers = {reader.node for reader in value.uses()}
        first = next(node for node in change.editor.graph if node in readers)
        made = change.editor.made[known] = _product(value, transform, first, change)
        while made is not value and (node := made.producer()) is not None:
            change.computes(node, transform)
            made = next(operand for operand in node.inputs if operand is not None and not is_constant(operand))
    return change.editor.made[known]


def _product(value: ir.Value, transform: Transform, before: ir.Node, change: Change) -> ir.Value:
    """x·T: Aᵀ·x·(cB) with the last axis as (a, b), in every block and head."""
    left = 1
    while isinstance(transform, Repeated):
        left, transform = left * transform.left, transform.inner
    if not isinstance(transform, Hadamard) or value.dtype is None:
        raise ValueError(f"{value.name} cannot be turned by {transform}")
    edit, name = change.editor, f"{value.name}.turned"
    shape = list(shape_of(value) or ())
    outer, (a, b) = shape[:-1], (len(part) for part in transform.factors)
    inner = [size for size in (left, a) if size > 1] + [b]
    turned = value
    if len(inner) > 1:
        turned = edit.node(
            "Reshape", [value, _sizes([0] * len(outer) + inner, change)], before=before, name=f"{name}.cut"
        )
        _describe(turned, value, [*outer, *inner])
    right = transform.factors[1] * transform.factor
    turned = edit.node("MatMul", [turned, _matrix(right, value.dtype, change)], before=before, name=f"{name}.right")
    _describe(turned, value, [*outer, *inner])
    if a > 1:
        first = _matrix(transform.factors[0].T, value.dtype, change)
        turned = edit.node("MatMul", [first, turned], before=before, name=f"{name}.left")
        _describe(turned, value, [*outer, *inner])
    if len(inner) > 1:
        turned = edit.node(
            "Reshape", [turned, _sizes([0] * len(outer) + [shape[-1]], change)], before=before, name=name
        )
        _describe(turned, value, shape)
    return turned


def _describe(made: ir.Value, like: ir.Value, shape: Sequence[int | str | None]) -> None:
    describe(made, like=like, shape=shape)


def _sizes(sizes: list[int], change: Change) -> ir.Value:
    name = "sizes." + "_".join(map(str, sizes))
    if name not in change.editor.made:
        change.editor.made[name] = change.editor.initializer(name, np.asarray(sizes, np.int64))
    return change.editor.made[name]


def _matrix(matrix: np.ndarray, dtype: ir.DataType, change: Change) -> ir.Value:
    key = ("turn", matrix.shape, matrix.tobytes(), dtype)
    return change.editor.derived(key, f"turn.{len(matrix)}", Constant(np.ascontiguousarray(matrix)), dtype)
