"""Fold what computes a weight from its parameters into that weight.

      w = f(θ₁, …, θₙ) by operators on constants only        θᵢ constants of the network
    ──────────────────────────────────────────────────────────────────────────────────────
      w  is a constant, the number f(θ₁, …, θₙ)

WeightNorm g·v/‖v‖, spectral normalization W/σ with σ = uᵀWv, weight standardization (W − mean)/std, W ⊙ mask, W₀ + B·A
(low rank), √(v + ε) of Unified Normalization's running variance, weights stored transposed or in another shape. What
is folded is the maximal such subgraph; it is evaluated in float64 and rounded once. A weight that is smaller as its
factors stays as them.

Shapes    θᵢ and w any
Relation  equal over the reals; w keeps its name
Source    Salimans & Kingma 2016, arXiv:1602.07868, §2; Miyato et al. 2018, arXiv:1802.05957, §2; Qiao et al. 2019,
          arXiv:1903.10520, §3
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.ir.computed import LAYOUTS, MOVES, expression
from rewrite.ir.constants import VECTOR, is_constant, is_overridable, weight_behind
from rewrite.ir.edit import attribute_of, constant_of, is_inference_dropout
from rewrite.ir.program import Program
from rewrite.ir.weights import MaterializedTensor, Weight, row_blocks
from rewrite.rule import Breach, Change, Pass, Requirement, Site

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
QUANTIZATION = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
"""What ends a subgraph of constants: a weight that is stored in eight bits is meant to be."""


@dataclass(frozen=True)
class Parametrization(Site):
    """The subgraph of constants that ends in `result`, its leaves, and the weight it is, if that is known."""

    result: ir.Value
    leaves: tuple[ir.Value, ...]
    readers: tuple[ir.Node, ...]
    weight: Weight | None
    unknown: ir.Node | None
    replaced: float
    """Bytes of the leaves that nothing else reads; of those that several weights are made from, this one's share."""


def _own_leaves(rule: FoldParametrization, site: Parametrization) -> Breach | None:
    for leaf in site.leaves:
        if is_overridable(leaf):
            reader = next(use.node for use in leaf.uses() if use.node in site.nodes)
            return Breach(reader, f"{leaf.name} is an initializer that is also an input of the graph")
    return None


def _known_operators(rule: FoldParametrization, site: Parametrization) -> Breach | None:
    for node in site.nodes:
        if node.op_type in RANDOM or (node.op_type == "Dropout" and not is_inference_dropout(node)):
            return Breach(node, f"{node.op_type} draws random numbers")
        if node is not site.nodes[-1] and _narrows(node):
            return Breach(node, "the weight is rounded to fewer bits before it is computed with")
    if site.unknown is not None:
        return Breach(site.unknown, f"{site.unknown.op_type} is no operator that weights are computed by here")
    return None


def _hidden(rule: FoldParametrization, site: Parametrization) -> Breach | None:
    if site.result.is_graph_output():
        return Breach(site.nodes[-1], f"{site.result.name} is an output of the graph")
    return None


def _no_larger(rule: FoldParametrization, site: Parametrization) -> Breach | None:
    if site.weight is None or site.result.dtype is None:
        return None
    size = MaterializedTensor(site.weight, site.result.dtype).nbytes
    if math.prod(site.weight.shape) <= VECTOR or size <= rule.growth * site.replaced:
        return None
    return Breach(
        site.nodes[-1],
        f"{site.result.name} takes {size:,} bytes, and what it is computed from and nothing else reads "
        f"{round(site.replaced):,}",
    )


def _finite(rule: FoldParametrization, site: Parametrization) -> Breach | None:
    if site.weight is None or site.result.dtype is None:
        return None
    rounded = MaterializedTensor(site.weight, site.result.dtype)
    with np.errstate(over="ignore"):
        whole = (rounded.numpy(),) if site.weight.mixed else map(rounded.rounded, row_blocks(site.weight.shape))
        if all(np.isfinite(block.astype(np.float64)).all() for block in whole):
            return None
    return Breach(site.nodes[-1], f"{site.result.name} is not finite")


@dataclass(frozen=True)
class FoldParametrization(Pass[Parametrization]):
    """A weight that is computed from constants becomes a constant.

    Args:
        growth: bytes of the weight for each byte it is computed from, above which it stays computed; weights that are
            as small as a vector are always folded.
    """

    growth: float = 1.25

    name: ClassVar[str] = "fold-parametrization"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "no parameter of the weight can be overridden", _own_leaves),
        Requirement("R2", "every operator is a known function of its operands, none random", _known_operators),
        Requirement("R3", "the weight is no output of the graph", _hidden),
        Requirement("R4", "the network does not grow by it", _no_larger),
        Requirement("R5", "every number of the weight is finite", _finite),
    )

    def sites(self, program: Program) -> Iterator[Parametrization]:
        graph = program.model.graph
        computing = _computing(graph)
        for node in [node for node in graph if node in computing]:
            result = node.outputs[0] if node.outputs else None
            # An earlier site may have left nothing of this one.
            if node.graph is None or result is None or not _is_float(result):
                continue
            readers = tuple(dict.fromkeys(use.node for use in result.uses() if use.node not in computing))
            nodes = _behind(node)
            if readers and _parametrized(nodes):
                yield _site(result, nodes, readers, computing)

    def rewrite(self, site: Parametrization, change: Change) -> None:
        name, result = site.result.name or "", site.result
        if site.weight is None or result.dtype is None:
            raise ValueError(f"{name} is not known as a constant")
        result.name = change.editor.name(f"{name}.computed")
        new = change.editor.register(name, MaterializedTensor(site.weight, result.dtype, name))
        result.replace_all_uses_with(new)
        for reader in site.readers:
            change.stamp(reader)
        sizes = {leaf: math.prod(weight_behind(leaf).shape) for leaf in site.leaves if is_constant(leaf)}
        change.changed[name] = max(sizes, key=lambda leaf: sizes[leaf]).name or ""


def _computing(graph: ir.Graph) -> set[ir.Node]:
    """The nodes whose results are the same in every run (or would be, were the operator not random)."""
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type in ("Constant", *QUANTIZATION) or any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            continue
        given = [value for value in node.inputs if value is not None]
        if not given and node.op_type not in RANDOM:
            continue
        if all(is_constant(value) or is_overridable(value) or value.producer() in found for value in given):
            found.add(node)
    return found


def _behind(node: ir.Node) -> tuple[ir.Node, ...]:
    """The nodes that `node` is computed by, itself last, in an order of computation."""
    order: dict[ir.Node, None] = {}
    pending = [(node, False)]
    while pending:
        current, ready = pending.pop()
        if ready:
            order[current] = None
        elif current not in order:
            pending.append((current, True))
            producers = [value.producer() for value in current.inputs if value is not None]
            pending += [(one, False) for one in reversed(producers) if one is not None and one.op_type != "Constant"]
    return tuple(order)


def _leaves(nodes: tuple[ir.Node, ...]) -> tuple[ir.Value, ...]:
    used = [value for node in nodes for value in node.inputs if value is not None]
    return tuple(dict.fromkeys(value for value in used if is_constant(value) or is_overridable(value)))


def _parametrized(nodes: tuple[ir.Node, ...]) -> bool:
    """Whether something is computed; of a weight that only lies in another way, whether it is nobody else's.

    A tied table that is also read as it is, a slice, a widened copy: the network stores these once, and means to. What
    a pass has changed behind its transpose stays there too, so that a second run finds nothing.
    """
    if any(node.op_type not in MOVES for node in nodes):
        return True
    floats = [leaf for leaf in _leaves(nodes) if _is_float(leaf)]
    chain = set(nodes)
    return all(node.op_type in LAYOUTS for node in nodes) and all(
        is_constant(leaf)
        and not isinstance(constant_of(leaf), MaterializedTensor)
        and not leaf.is_graph_output()
        and all(use.node in chain for use in leaf.uses())
        for leaf in floats
    )


def _site(
    result: ir.Value, nodes: tuple[ir.Node, ...], readers: tuple[ir.Node, ...], computing: set[ir.Node]
) -> Parametrization:
    weights: dict[ir.Value, Weight | None] = {}
    unknown: ir.Node | None = None
    for node in nodes:
        operands = [None if value is None else _weight(value, weights) for value in node.inputs]
        missing = any(value is not None and weight is None for value, weight in zip(node.inputs, operands))
        known = None if missing else expression(node, operands)
        if known is None and not missing and unknown is None and not _whole_numbers(node):
            unknown = node
        weights[node.outputs[0]] = known
    leaves = _leaves(nodes)
    weight = weights[result]
    if weight is None and unknown is None and all(map(is_constant, leaves)):
        unknown = next((node for node in nodes if weights[node.outputs[0]] is None), nodes[-1])
    replaced = sum(_bytes(leaf) / _shares(leaf, computing) for leaf in leaves if _freed(leaf, computing))
    return Parametrization(result.name or "", nodes, result, leaves, readers, weight, unknown, replaced)


def _whole_numbers(node: ir.Node) -> bool:
    """Whether a node computes sizes, axes and the like, which an operator reads as integers or not at all."""
    return not _is_float(node.outputs[0])


def _weight(value: ir.Value, known: dict[ir.Value, Weight | None]) -> Weight | None:
    return weight_behind(value) if is_constant(value) else known.get(value)


def _freed(leaf: ir.Value, computing: set[ir.Node]) -> bool:
    """Whether nothing reads a leaf but what computes with constants."""
    return is_constant(leaf) and not leaf.is_graph_output() and all(use.node in computing for use in leaf.uses())


def _shares(leaf: ir.Value, computing: set[ir.Node]) -> int:
    """How many weights are made from a leaf."""
    made, seen, pending = 0, {leaf}, [leaf]
    while pending:
        value = pending.pop()
        made += value is not leaf and any(use.node not in computing for use in value.uses())
        for use in value.uses():
            for output in use.node.outputs if use.node in computing else ():
                if output not in seen:
                    seen.add(output)
                    pending.append(output)
    return max(made, 1)


def _bytes(leaf: ir.Value) -> int:
    tensor = constant_of(leaf)
    return 0 if tensor is None else tensor.nbytes


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point() and value.dtype.bitwidth >= 16


def _narrows(node: ir.Node) -> bool:
    """Whether a node rounds floating-point numbers to fewer bits."""
    if node.op_type != "Cast" or node.inputs[0] is None or not _is_float(node.inputs[0]):
        return False
    held, to = node.inputs[0].dtype, ir.DataType(attribute_of(node, "to", 0))
    wider = held is not None and to.is_floating_point() and to.bitwidth > held.bitwidth
    return to != held and not wider
