"""Ways to break a rewritten model. Each is a generator of (what was done, undo-free corrupted clone).

Every corruption changes one thing, as a wrong pass or a wrong kernel would: a constant, an operand, an attribute. They
know nothing of models; whether one really computes something else is for the caller's float64 witness to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

Corruption = Callable[[ir.Model, np.random.Generator], Iterator[tuple[str, ir.Model]]]


def _weights(model: ir.Model, rank: int) -> list[str]:
    return [
        name
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and len(value.const_value.shape) == rank
        and value.const_value.size > 8
        and value.uses()
    ]


def _with(model: ir.Model, name: str, array: np.ndarray) -> ir.Model:
    clone = model.clone()
    clone.graph.initializers[name].const_value = ir.tensor(np.ascontiguousarray(array), name=name)
    return clone


def _array(model: ir.Model, name: str) -> np.ndarray:
    return np.array(model.graph.initializers[name].const_value.numpy())


def _nodes(model: ir.Model, *names: str) -> list[int]:
    return [index for index, node in enumerate(model.graph) if node.op_type in names]


def _node(model: ir.Model, index: int) -> ir.Node:
    return list(model.graph)[index]


def three_ulps(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """One entry of one matrix, three units in the last place away."""
    for name in rng.permutation(_weights(model, 2)):
        array = _array(model, name)
        index = np.unravel_index(np.argmax(np.abs(array)), array.shape)
        for _ in range(3):
            array[index] = np.nextafter(array[index], np.float32(np.inf))
        yield f"{name}{tuple(map(int, index))} + 3 ulp", _with(model, name, array)


def scaled_vector(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """A bias or γ times 1.001."""
    for name in rng.permutation(_weights(model, 1)):
        yield f"{name} × 1.001", _with(model, name, _array(model, name) * np.float32(1.001))


def transposed(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """A square matrix the other way round."""
    for name in rng.permutation(_weights(model, 2)):
        array = _array(model, name)
        if array.shape[0] == array.shape[1]:
            yield f"{name} transposed", _with(model, name, array.T)


def swapped_heads(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """Two quarters of a matrix's columns exchanged."""
    for name in rng.permutation(_weights(model, 2)):
        array = _array(model, name)
        quarter = array.shape[1] // 4
        if quarter:
            array[:, : 2 * quarter] = np.roll(array[:, : 2 * quarter], quarter, axis=1)
            yield f"columns of {name} exchanged", _with(model, name, array)


def not_centred(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """A matrix whose rows have a mean again."""
    for name in rng.permutation(_weights(model, 2)):
        array = _array(model, name)
        yield f"{name} + 0.01", _with(model, name, array + np.float32(0.01))


def dropped_bias(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """An addition of a constant left out."""
    for index in rng.permutation(_nodes(model, "Add")):
        clone = model.clone()
        node = _node(clone, index)
        constant = [value.const_value is not None for value in node.inputs]
        if sum(constant) == 1 and node.inputs[constant.index(True)].const_value.dtype == ir.DataType.FLOAT:
            kept = node.inputs[1 - constant.index(True)]
            node.outputs[0].replace_all_uses_with(kept, replace_graph_outputs=True)
            yield f"{node.name}: addition left out", clone


def dropped_skip(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """A residual addition that forgets one of its two operands."""
    for index in rng.permutation(_nodes(model, "Add")):
        clone = model.clone()
        node = _node(clone, index)
        a, b = node.inputs
        if a.const_value is None and b.const_value is None and str(a.shape) == str(b.shape):
            node.outputs[0].replace_all_uses_with(b, replace_graph_outputs=True)
            yield f"{node.name}: first operand forgotten", clone


def other_epsilon(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """A norm with half of its ε again."""
    for index in rng.permutation(
        _nodes(model, "RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization", "BatchNormalization")
    ):
        clone = model.clone()
        node = _node(clone, index)
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", node.attributes.get_float("epsilon", 1e-5) * 1.5)
        yield f"{node.name}: ε × 1.5", clone


def exchanged_norm(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """RMSNormalization where LayerNormalization stood, or the other way round."""
    for index in rng.permutation(_nodes(model, "RMSNormalization", "LayerNormalization")):
        clone = model.clone()
        node = _node(clone, index)
        if len(node.inputs) == 2:
            node.op_type = "LayerNormalization" if node.op_type == "RMSNormalization" else "RMSNormalization"
            yield f"{node.name}: now {node.op_type}", clone


def other_scale(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """Attention with another scale."""
    for index in rng.permutation(_nodes(model, "Attention")):
        clone = model.clone()
        node = _node(clone, index)
        scale = node.attributes.get("scale")
        node.attributes["scale"] = ir.AttrFloat32("scale", (scale.value if scale else 0.25) * 1.25)
        yield f"{node.name}: scale × 1.25", clone


def dropped_mask(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """Attention without its mask."""
    for index in rng.permutation(_nodes(model, "Attention")):
        clone = model.clone()
        node = _node(clone, index)
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            node.replace_input_with(3, None)
            yield f"{node.name}: mask left out", clone


def exchanged_operands(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """Key and value, or the operands of a subtraction, division, or product of two activations, the wrong way round."""
    for index in rng.permutation(_nodes(model, "Attention", "Sub", "Div", "MatMul", "Where")):
        clone = model.clone()
        node = _node(clone, index)
        first, second = (1, 2) if node.op_type in ("Attention", "Where") else (0, 1)
        a, b = node.inputs[first], node.inputs[second]
        if a is not None and b is not None and a is not b and str(a.shape) == str(b.shape):
            node.replace_input_with(first, b)
            node.replace_input_with(second, a)
            yield f"{node.name}: operands {first} and {second} exchanged", clone


def other_axis(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """Softmax over the axis before; a concatenation in the other order."""
    for index in rng.permutation(_nodes(model, "Softmax", "Concat")):
        clone = model.clone()
        node = _node(clone, index)
        if node.op_type == "Softmax":
            node.attributes["axis"] = ir.AttrInt64("axis", -2)
            yield f"{node.name}: axis −2", clone
        elif len(node.inputs) == 2 and node.inputs[0] is not node.inputs[1]:
            a, b = node.inputs
            if a.const_value is None and b.const_value is None:
                node.replace_input_with(0, b)
                node.replace_input_with(1, a)
                yield f"{node.name}: joined in the other order", clone


def other_permutation(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """A transpose left out of a reshape's way: heads and positions taken for one another."""
    for index in rng.permutation(_nodes(model, "Reshape")):
        clone = model.clone()
        node = _node(clone, index)
        source = node.inputs[0].producer()
        if source is not None and source.op_type == "Transpose" and len(source.attributes["perm"].value) == 4:
            node.replace_input_with(0, source.inputs[0])
            yield f"{node.name}: transpose left out", clone


def other_activation(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """The other GELU; a sigmoid for a tanh."""
    for index in rng.permutation(_nodes(model, "Gelu", "Tanh", "Sigmoid", "Relu", "Erf")):
        clone = model.clone()
        node = _node(clone, index)
        if node.op_type == "Gelu":
            old = node.attributes.get("approximate")
            new = "none" if old is not None and old.value == "tanh" else "tanh"
            node.attributes["approximate"] = ir.AttrString("approximate", new)
        else:
            node.op_type = {"Tanh": "Sigmoid", "Sigmoid": "Tanh", "Relu": "Softplus", "Erf": "Tanh"}[node.op_type]
        yield f"{node.name}: another activation", clone


def other_reader(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """A matrix product that reads another value of the same shape, computed earlier."""
    places = _nodes(model, "MatMul", "Gemm")
    for index in rng.permutation(places):
        clone = model.clone()
        node = _node(clone, index)
        earlier = [
            value
            for other in list(clone.graph)[:index]
            for value in other.outputs[:1]
            if value.dtype == ir.DataType.FLOAT and str(value.shape) == str(node.inputs[0].shape)
        ]
        earlier = [value for value in earlier if value is not node.inputs[0]]
        if earlier:
            node.replace_input_with(0, earlier[int(rng.integers(len(earlier)))])
            yield f"{node.name}: reads {node.inputs[0].name}", clone


def other_index(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """A shape constant with two entries exchanged, or a slice that starts one later."""
    for index in rng.permutation(_nodes(model, "Slice", "Gather")):
        clone = model.clone()
        node = _node(clone, index)
        operand = node.inputs[1]
        if operand is None or operand.const_value is None or node.inputs[0].const_value is not None:
            continue
        array = operand.const_value.numpy()
        if array.dtype == np.int64 and array.size == 1:
            moved = ir.Value(name=f"{operand.name}.moved", const_value=ir.tensor(array + 1), shape=operand.shape)
            moved.const_value.name = moved.name
            moved.type = operand.type
            clone.graph.register_initializer(moved)
            node.replace_input_with(1, moved)
            yield f"{node.name}: one later", clone


CORRUPTIONS: tuple[Corruption, ...] = (
    three_ulps,
    scaled_vector,
    transposed,
    swapped_heads,
    not_centred,
    dropped_bias,
    dropped_skip,
    other_epsilon,
    exchanged_norm,
    other_scale,
    dropped_mask,
    exchanged_operands,
    other_axis,
    other_permutation,
    other_activation,
    other_reader,
    other_index,
)
