"""Where a quantized network differs from the exact one it was made from, found by the names that both share.

A value that keeps its meaning keeps its name, so what lies between two shared values in the quantized graph is the
approximation of what lies between them in the exact one. A *place* is one shared value with the nodes that compute it,
where a quantized operator is among them; a *site* is a weight with all places that read it, or a place without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import onnx_ir as ir

from rewrite.check.operators import Call, dense
from rewrite.check.operators.contrib_quantization import codes_by_block, rounded_by_block, rounds_activations
from rewrite.check.operators.quantization import dequantize_linear, dynamic_parameters, saturated, spread, unpacked
from rewrite.check.reference import evaluate, evaluate_operator
from rewrite.errors import UnsupportedOperatorError
from rewrite.ir.edit import attribute_of, constant_of, is_operator
from rewrite.ir.weights import Source, Weight, weight_of

CONTRIBUTED = "com.microsoft"

QUANTIZED = frozenset(
    "QuantizeLinear DequantizeLinear DynamicQuantizeLinear MatMulInteger ConvInteger QLinearMatMul QLinearConv"
    " MatMulNBits DynamicQuantizeMatMul MatMulIntegerToFloat QGemm GatherBlockQuantized QMoE".split()
)
"""Operators that hold or make codes."""

_WEIGHT_OPERAND = {"MatMulNBits": 1, "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1, "MatMulInteger": 1}
_LAYOUT = ("Transpose", "Identity")
PROBED = 1 << 13
"""Rows of a matrix up to which what a place multiplies with is found by feeding it the identity."""


@dataclass(frozen=True, eq=False)
class Place:
    """The value `result` of the quantized graph, the value `partner` that it stands for, and the nodes between.

    `nodes` compute `result` from `inputs` (shared values) and constants, in order; `exact` compute `partner`.
    """

    result: ir.Value
    partner: ir.Value
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    exact: tuple[ir.Node, ...]

    @property
    def weights(self) -> tuple[ir.Value, ...]:
        """The exact graph's constants that the place holds as something else, those of two axes and more before all."""
        kept = {value.name for node in self.nodes for value in node.inputs if value is not None}
        lost = [
            value
            for value in _constants(self.exact)
            if value.name not in kept and value.const_value is not None and value.const_value.dtype.is_floating_point()
        ]
        matrices = [value for value in lost if len(value.const_value.shape) > 1]  # type: ignore[union-attr]
        return tuple(matrices or lost)

    @property
    def constants(self) -> tuple[ir.Value, ...]:
        """The constants that the place holds and the exact graph does not: codes, scales, corrections."""
        known = {value.name for value in _constants(self.exact)}
        return tuple(value for value in _constants(self.nodes) if value.name not in known)


@dataclass(frozen=True, eq=False)
class ApproximateSite:
    """A weight of the exact graph that is approximated, under its name, with all places that read it.

    Without a weight it is one place where activations are rounded, under the name of its result.
    """

    name: str
    weights: tuple[ir.Value, ...]
    places: tuple[Place, ...]

    @property
    def bytes(self) -> int:
        """Of codes, scales, zero points and corrections; shared ones count once."""
        held = {value.name: value for place in self.places for value in place.constants}
        return sum(value.const_value.nbytes for value in held.values() if value.const_value is not None)

    @property
    def elements(self) -> int:
        """Of the weights."""
        return sum(value.const_value.size for value in self.weights if value.const_value is not None)


def find_sites(exact: ir.Model, quantized: ir.Model) -> tuple[ApproximateSite, ...]:
    """Every site of `quantized`, in the order of its graph."""
    found: dict[str, tuple[tuple[ir.Value, ...], list[Place]]] = {}
    for place in find_places(exact, quantized):
        weights = place.weights
        name = " + ".join(value.name or "" for value in weights) or place.result.name or ""
        found.setdefault(name, (weights, []))[1].append(place)
    return tuple(ApproximateSite(name, weights, tuple(places)) for name, (weights, places) in found.items())


def find_places(exact: ir.Model, quantized: ir.Model) -> Iterator[Place]:
    """Every value of both graphs that the quantized one computes with quantized operators."""
    partners, anchors = _computed(exact.graph), _computed(quantized.graph)
    for node in quantized.graph:
        for value in node.outputs:
            partner = partners.get(value.name or "")
            if partner is None or partner.producer() is None:
                continue
            nodes, inputs = _between(value, partners)
            if not any(each.op_type in QUANTIZED for each in nodes):
                continue
            own, _ = _between(partner, anchors)
            if [each.op_type for each in own] != [each.op_type for each in nodes]:
                yield Place(value, partner, nodes, inputs, own)


def _computed(graph: ir.Graph) -> dict[str, ir.Value]:
    """Inputs and results of nodes by name; constants are none of them."""
    values = [value for value in graph.inputs if not value.is_initializer()]
    values += [value for node in graph for value in node.outputs if node.op_type != "Constant"]
    return {value.name: value for value in values if value.name}


def _between(value: ir.Value, stops: dict[str, ir.Value]) -> tuple[tuple[ir.Node, ...], tuple[ir.Value, ...]]:
    """The nodes that compute `value` from values of the names `stops` and constants, in order, and those values."""
    nodes: dict[ir.Node, None] = {}
    inputs: dict[ir.Value, None] = {}
    queue = [value.producer()]
    while queue:
        node = queue.pop()
        if node is None or node in nodes:
            continue
        nodes[node] = None
        for read in node.inputs:
            if read is None or read.is_initializer():
                continue
            if read.name in stops or read.producer() is None:
                inputs[read] = None
            else:
                queue.append(read.producer())
    graph = value.graph
    order = {node: index for index, node in enumerate(graph)} if graph is not None and len(nodes) > 1 else {}
    return tuple(sorted(nodes, key=lambda node: order.get(node, 0))), tuple(inputs)


def _constants(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    values = {value: None for node in nodes for value in node.inputs if value is not None and value.is_initializer()}
    return list(values)


# ------------------------------------------------------------------------------------------------------- the weights


def exact_matrix(place: Place) -> np.ndarray | None:
    """The exact weight as its operator reads it, (K, N) or (M, C, …), as it is stored; None where there is not one."""
    if len(place.weights) != 1:
        return None
    weight = place.weights[0]
    stored = None if weight.const_value is None else np.asarray(weight.const_value.numpy())
    return stored.T if stored is not None and stored.ndim == 2 and _is_turned(weight, place.exact) else stored


def original_matrix(place: Place) -> np.ndarray | None:
    """The stored tensor that the exact weight was made of by transforms; None where that is no single one."""
    if len(place.weights) != 1 or (tensor := place.weights[0].const_value) is None:
        return None
    stored = [source.tensor for source in _sources(weight_of(tensor)) if source.tensor.size == tensor.size]
    return np.asarray(stored[0].numpy()) if len(stored) == 1 else None


def _sources(weight: Weight) -> Iterator[Source]:
    """The stored tensors behind an expression."""
    if isinstance(weight, Source):
        inner = weight_of(weight.tensor)
        yield from [weight] if isinstance(inner, Source) else _sources(inner)
        return
    for each in fields(weight):  # type: ignore[arg-type]
        part = getattr(weight, each.name)
        for inner in part if isinstance(part, tuple) else (part,):
            if isinstance(inner, Weight):
                yield from _sources(inner)


def _is_turned(value: ir.Value, nodes: Sequence[ir.Node]) -> bool:
    """Whether a matrix is transposed on its way into a product."""
    for node in nodes:
        if value in node.inputs:
            if is_operator(node, "Transpose"):
                return not _is_turned(node.outputs[0], nodes)
            if is_operator(node, "Identity"):
                return _is_turned(node.outputs[0], nodes)
            return is_operator(node, "Gemm") and bool(attribute_of(node, "transB", 0))
    return False


def stored_matrix(place: Place) -> np.ndarray | None:
    """What the place multiplies with, (K, N) or (M, C, …), with every correction in it; None where that is unknown."""
    holders = [node for node in place.nodes if _holds_codes(node)]
    plain = all(is_operator(n, "Add", "QuantizeLinear", "DequantizeLinear", *_LAYOUT) or n in holders for n in
                place.nodes[:-1]) and len(holders) == 1  # fmt: skip
    if plain and not any(is_operator(node, "Transpose") for node in place.nodes):
        return decoded(holders[0])
    return _probed(place)


def _holds_codes(node: ir.Node) -> bool:
    position = 0 if is_operator(node, "DequantizeLinear") else _WEIGHT_OPERAND.get(node.op_type)
    if position is None:
        return False
    tensor = constant_of(node.inputs[position])
    return tensor is not None and len(tensor.shape) > 1


def decoded(node: ir.Node) -> np.ndarray | None:
    """The numbers that the codes of one node stand for, as (K, N) or in the codes' shape; float64."""
    arrays = [None if (tensor := constant_of(value)) is None else np.asarray(tensor.numpy()) for value in node.inputs]
    if is_operator(node, "DequantizeLinear"):
        call = Call(node, 21, np.float64, False, lambda *_: [])
        return dense(evaluate_operator(call, [a if a is None else _wide(a) for a in arrays])[0], np.float64)
    if node.op_type == "MatMulNBits":
        n, k, size = (int(attribute_of(node, name, 0)) for name in ("N", "K", "block_size"))
        bits, blocks = int(attribute_of(node, "bits", 4)), -(-k // size)
        codes, scales = arrays[1], arrays[2]
        zero = arrays[3] if len(arrays) > 3 else None
        if codes is None or scales is None or (len(node.inputs) > 4 and node.inputs[4] is not None):
            return None
        zeros = np.full((n, blocks), float(1 << (bits - 1)))
        if zero is not None:
            zeros = unpacked(zero.reshape(n, -1), bits)[:, :blocks] if zero.dtype == np.uint8 else zero
        steps = unpacked(codes.reshape(n, blocks, -1), bits)[..., :size] - zeros.reshape(n, blocks, 1).astype(float)
        return (steps * scales.reshape(n, blocks, 1).astype(float)).reshape(n, -1)[:, :k].T
    if node.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
        scale, zero = (2, 3) if node.op_type == "DynamicQuantizeMatMul" else (3, 5)
        if arrays[1] is None or arrays[scale] is None:
            return None
        centre = arrays[zero] if len(arrays) > zero and arrays[zero] is not None else np.zeros(1)
        return (arrays[1].astype(float) - np.asarray(centre, float)) * np.asarray(arrays[scale], float)
    return None


def held_format(place: Place) -> str:
    """How the place's weight is stored, in words: type, granularity, zero points, corrections."""
    words = []
    for node in place.nodes:
        if not _holds_codes(node):
            continue
        if node.op_type == "MatMulNBits":
            zero = constant_of(node.inputs[3]) if len(node.inputs) > 3 else None
            side = "symmetric" if zero is None else "asymmetric"
            bits, block = (attribute_of(node, name, default) for name, default in (("bits", 4), ("block_size", 0)))
            words.append(f"uint{bits} block {block} {side}")
            continue
        position = 0 if is_operator(node, "DequantizeLinear") else 1
        codes = constant_of(node.inputs[position])
        scale = constant_of(node.inputs[3 if node.op_type == "MatMulIntegerToFloat" else position + 1])
        block = attribute_of(node, "block_size", 0)
        spread = "tensor" if scale is None or scale.size == 1 else f"block {block}" if block else "channel"
        words.append(f"{'codes' if codes is None else codes.dtype.name.lower()} per {spread}")
    shapes = [
        value.const_value.shape.numpy()
        for value in place.constants
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and len(value.const_value.shape) == 2
        and any(is_operator(use.node, "MatMul") for use in value.uses())
    ]
    if len(shapes) > 1:
        words.append(f"rank {min(shape[-1] for shape in shapes)}")
    return " + ".join(words)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _probed(place: Place) -> np.ndarray | None:
    """The matrix of a place that multiplies with several, by what it makes of the identity; None where it has none."""
    matrix = exact_matrix(place)
    if matrix is None or matrix.ndim != 2 or len(matrix) > PROBED or len(place.inputs) != 1:
        return None
    try:
        model = without_activation_rounding(place_model(place))
        name = model.graph.inputs[0].name or ""
        rows = np.concatenate([np.zeros((1, len(matrix))), np.eye(len(matrix))])
        answer = evaluate(model, {name: rows})[model.graph.outputs[0].name or ""]
    except UnsupportedOperatorError:
        return None
    return answer[1:] - answer[:1] if answer.shape == (len(rows), matrix.shape[1]) else None


def place_model(place: Place) -> ir.Model:
    """The place alone: its inputs, nodes and constants, as a model."""
    values: dict[ir.Value, ir.Value] = {}
    inputs = [values.setdefault(value, ir.Value(name=value.name, type=value.type)) for value in place.inputs]
    stored = []
    for value in _constants(place.nodes):
        values[value] = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=value.const_value)
        stored.append(values[value])
    nodes = copied(place.nodes, values, lambda name: name)
    graph = ir.Graph(inputs, [values[place.result]], nodes=nodes, initializers=stored, name="place")
    graph.opset_imports.update(_imports(place.result.graph))
    return ir.Model(graph, ir_version=10)


def _imports(graph: ir.Graph | ir.Function | None) -> dict[str, int]:
    return {"": 21, CONTRIBUTED: 1, **(dict(graph.opset_imports) if graph is not None else {})}


def copied(nodes: Sequence[ir.Node], values: dict[ir.Value, ir.Value], renamed: Callable[[str], str]) -> list[ir.Node]:
    """`nodes` again, reading `values[v]` for v; their results are entered there under new names."""
    made = []
    for node in nodes:
        inputs = [None if value is None else values[value] for value in node.inputs]
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=renamed(node.name or node.op_type),
        )
        for old, new in zip(node.outputs, copy.outputs):
            new.name, new.type, new.shape = renamed(old.name) if old.name else "", old.type, old.shape
            values[old] = new
        made.append(copy)
    return made


# -------------------------------------------------------------------------------------------------- the activations


@dataclass(frozen=True, eq=False)
class Rounding:
    """Where activations become codes: the value `name` of the quantized graph, and the node that does it."""

    name: str
    node: ir.Node

    @property
    def format(self) -> str:
        """Type, range and granularity in words."""
        if self.node.op_type == "MatMulNBits":
            return f"int8 by row and block of {attribute_of(self.node, 'block_size', 0)}"
        if is_operator(self.node, "QuantizeLinear"):
            dtype, scale = self.node.outputs[0].dtype, constant_of(self.node.inputs[1])
            named = "codes" if dtype is None else dtype.name.lower()
            return f"{named} static{'' if scale is None or scale.size == 1 else ' by channel'}"
        return "uint8 dynamic"

    def codes(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The codes of x, and what they stand for in float64 (the shape of x)."""
        if self.node.op_type == "MatMulNBits":
            block = int(attribute_of(self.node, "block_size", 0))
            return codes_by_block(x, block)[0], rounded_by_block(x, block)
        if is_operator(self.node, "QuantizeLinear"):
            call, parameters = self._static()
            codes = dense(evaluate_operator(call, [x, *parameters])[0], np.float64)
            return codes, np.asarray(dequantize_linear(call, codes, *parameters), np.float64)
        scale, zero = dynamic_parameters(x)
        codes = saturated(np.asarray(x, np.float32) / scale, int(zero), ir.DataType.UINT8)
        return codes, (codes.astype(np.float64) - float(zero)) * float(scale)

    def step(self, x: np.ndarray) -> np.ndarray:
        """What one code is worth at every entry of x; broadcasts to its shape."""
        if self.node.op_type == "MatMulNBits":
            block = int(attribute_of(self.node, "block_size", 0))
            scale = codes_by_block(x, block)[1][..., 0]
            return np.repeat(scale, block, axis=-1)[..., : x.shape[-1]].astype(np.float64)
        if is_operator(self.node, "QuantizeLinear"):
            call, parameters = self._static()
            return np.abs(spread(call, np.asarray(parameters[0], np.float64), x.shape))
        return np.asarray(dynamic_parameters(x)[0], np.float64)

    def _static(self) -> tuple[Call, list[Any]]:
        call = Call(self.node, 21, np.float64, False, lambda *_: [])
        tensors = [constant_of(value) for value in self.node.inputs[1:]]
        return call, [None if tensor is None else _wide(np.asarray(tensor.numpy())) for tensor in tensors]


def roundings(nodes: Sequence[ir.Node]) -> tuple[Rounding, ...]:
    """Every rounding of activations among `nodes`."""
    found = []
    for node in nodes:
        value = node.inputs[0] if node.inputs else None
        if value is None or constant_of(value) is not None:
            continue
        rounds = (
            is_operator(node, "QuantizeLinear", "DynamicQuantizeLinear")
            or node.op_type == "DynamicQuantizeMatMul"
            or (node.op_type == "MatMulNBits" and rounds_activations(node))
        )
        if rounds:
            found.append(Rounding(value.name or "", node))
    return tuple(found)


def without_activation_rounding(model: ir.Model) -> ir.Model:
    """`model` with its weights as they are stored and its activations left as they come.

    Raises UnsupportedOperatorError where codes of activations are multiplied as such.
    """
    copy = model.clone()
    graph = copy.graph
    for node in list(graph):
        name = node.outputs[0].name or ""
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        elif is_operator(node, "QuantizeLinear") or (
            is_operator(node, "DequantizeLinear") and constant_of(node.inputs[0]) is None
        ):
            if constant_of(node.inputs[0]) is not None:
                continue
            _replace(node, [ir.Node("", "Identity", node.inputs[:1])])
        elif node.op_type == "DynamicQuantizeMatMul":
            matrix = decoded(node)
            if matrix is None:
                raise UnsupportedOperatorError("has codes that are no constants", where=f"node {node.name}")
            held = ir.Value(name=f"{name}.values", const_value=ir.tensor(matrix))
            graph.register_initializer(held)
            made = [ir.Node("", "MatMul", [node.inputs[0], held])]
            if len(node.inputs) > 4 and node.inputs[4] is not None:
                made[0].outputs[0].name = f"{name}.product"
                made.append(ir.Node("", "Add", [made[0].outputs[0], node.inputs[4]]))
            _replace(node, made)
        elif node.op_type in QUANTIZED and not is_operator(node, "DequantizeLinear"):
            if node.op_type != "GatherBlockQuantized":
                raise UnsupportedOperatorError("multiplies codes of activations", where=f"node {node.name}")
    return copy


def _replace(node: ir.Node, made: list[ir.Node]) -> None:
    """Put `made` in the place of `node`; the last one's result takes over."""
    graph, old, new = node.graph, node.outputs[0], made[-1].outputs[0]
    if graph is None:
        raise ValueError(f"{node.name} is in no graph")
    graph.insert_before(node, made)
    new.name, old.name = old.name, f"{old.name}.rounded"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
