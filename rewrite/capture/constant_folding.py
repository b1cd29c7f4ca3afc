"""The constants of a captured graph that may be computed with: integers, booleans, and literals that are only moved."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

INTEGER_LIMIT = 1 << 20
"""The most elements an integer or boolean constant may have to be folded (the position tables of vision models)."""

LITERAL_LIMIT = 64
"""The most elements a floating-point literal may have to be moved; larger ones are weights."""

MOVES = frozenset(
    {"Cast", "Concat", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze"}
    | {"Tile", "Transpose", "Unsqueeze"}
)
"""Operators that only move elements: exact on every dtype, a Cast only where it loses nothing."""

INTEGER_OPERATORS = MOVES | frozenset(
    {"Abs", "Add", "And", "CumSum", "Div", "Equal", "GatherElements", "GatherND", "Greater", "GreaterOrEqual", "Less"}
    | {"LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd"}
    | {"ReduceSum", "ScatterElements", "ScatterND", "Sign", "Sub", "Trilu", "Where", "Xor"}
)


class Constants:
    """The literals and integer constants of a graph as initializers, one for each content."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple, ir.Value] = {}
        self.literals: set[ir.Value] = set()

    def value(self, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
        """The initializer that holds `array`."""
        key = (dtype, array.shape, array.tobytes())
        found = self.made.get(key)
        if found is None or found.name not in self.graph.initializers:
            name = self._name(array, dtype)
            tensor = ir.Tensor(array, dtype=dtype, shape=ir.Shape(array.shape), name=name)
            found = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
            self.graph.register_initializer(found)
            self.made[key] = found
            self.literals.add(found)
        return found

    def _name(self, array: np.ndarray, dtype: ir.DataType) -> str:
        kind = dtype.name.lower()
        if array.size <= 4 and not dtype.is_floating_point():
            base = "_".join([kind, *(str(int(e)).replace("-", "m") for e in array.ravel())])
            base += "" if array.ndim else "_scalar"
        else:
            base = f"{kind}_constant"
        name, count = base, 1
        while name in self.graph.initializers:
            count += 1
            name = f"{base}_{count}"
        return name

    def lift(self) -> None:
        """Constant nodes become initializers."""
        for node in list(self.graph):
            if node.op_type == "Constant" and node.domain == "":
                tensor = constant_tensor(node)
                if tensor is not None and tensor.dtype != ir.DataType.STRING:
                    array = tensor.numpy()
                    if array.size <= LITERAL_LIMIT or not tensor.dtype.is_floating_point():
                        new = self.value(array, tensor.dtype)
                    else:
                        new = self._registered(node.outputs[0].name or "constant", tensor)
                    replace(node.outputs[0], new)
                    if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                        self.graph.remove(node, safe=True)

    def _registered(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        name = f"{name}_value"
        new = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.graph.register_initializer(new)
        return new

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        """The content of a constant that may be folded: integers and booleans in memory, and literals."""
        if value is None or value.const_value is None or value.is_graph_input() or not value.is_initializer():
            return None
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor) or tensor.dtype == ir.DataType.STRING:
            return None
        if tensor.dtype.is_floating_point():
            return tensor.numpy() if value in self.literals and tensor.size <= LITERAL_LIMIT else None
        return tensor.numpy() if tensor.size <= INTEGER_LIMIT else None


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node, or None for a kind that has none (strings, sparse)."""
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor()
        if name == "value_int":
            return ir.tensor(np.array(attribute.as_int(), np.int64))
        if name == "value_ints":
            return ir.tensor(np.array(attribute.as_ints(), np.int64))
        if name == "value_float":
            return ir.tensor(np.array(attribute.as_float(), np.float32))
        if name == "value_floats":
            return ir.tensor(np.array(attribute.as_floats(), np.float32))
    return None


def replace(value: ir.Value, other: ir.Value) -> bool:
    """Let every reader of `value` read `other`; an output of the graph keeps its name. False where it must stay."""
    if value.is_graph_output():
        if other.is_graph_output() or other.is_graph_input() or other.is_initializer():
            return False
        name = value.name
        ir.convenience.replace_all_uses_with(value, other, replace_graph_outputs=True)
        value.name = f"{name}_replaced"
        other.name = name
    else:
        ir.convenience.replace_all_uses_with(value, other)
    if other.shape is None and value.shape is not None:
        other.shape = value.shape
    if other.dtype is None and value.dtype is not None:
        other.dtype = value.dtype
    return True


def evaluate(node: ir.Node, constants: Constants) -> ir.Value | None:
    """The initializer that a node of constants computes, by the operator's reference implementation, or None."""
    if node.op_type not in INTEGER_OPERATORS or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return None
    arrays = [constants.array(value) for value in node.inputs]
    if any(array is None and value is not None for array, value in zip(arrays, node.inputs)):
        return None
    if not node.inputs:
        return None
    dtypes = [value.dtype for value in node.inputs if value is not None]
    floating = any(dtype is None or dtype.is_floating_point() for dtype in dtypes)
    if floating and node.op_type not in MOVES:
        return None
    if node.op_type in ("Expand", "ConstantOfShape", "Tile", "Range") and _volume(node, arrays) > INTEGER_LIMIT:
        return None
    result = _reference(node, arrays)
    dtype = ir.DataType.from_numpy(result.dtype)
    if dtype.is_floating_point():
        if result.size > LITERAL_LIMIT:
            return None
        if node.op_type == "Cast" and not _exact(arrays[0], result):
            return None
    elif node.op_type == "Cast" and floating and not _exact(arrays[0], result):
        return None
    return constants.value(np.array(result, order="C"), dtype)


def _exact(before: np.ndarray | None, after: np.ndarray) -> bool:
    if before is None:
        return False
    with np.errstate(all="ignore"):
        return bool(np.array_equal(after.astype(before.dtype), before))


def _volume(node: ir.Node, arrays: list[np.ndarray | None]) -> int:
    if node.op_type == "Range":
        start, limit, delta = (int(array) if array is not None else 0 for array in arrays)
        return abs((limit - start) // (delta or 1))
    first = arrays[0].size if arrays[0] is not None else 1
    sizes = arrays[0] if node.op_type == "ConstantOfShape" else arrays[1]
    repeated = int(np.prod(np.maximum(sizes, 1))) if sizes is not None else 1
    return repeated * (1 if node.op_type == "ConstantOfShape" else first)


def _reference(node: ir.Node, arrays: list[np.ndarray | None]) -> np.ndarray:
    import onnx
    from onnx.reference import ReferenceEvaluator

    version = node.graph.opset_imports.get("", 23) if node.graph is not None else 23
    names = ["" if array is None else f"input_{index}" for index, array in enumerate(arrays)]
    proto = onnx.helper.make_node(node.op_type, names, ["output"])
    proto.attribute.extend(ir.to_proto(attribute) for attribute in node.attributes.values())
    graph = onnx.helper.make_graph(
        [proto],
        "constant",
        [
            onnx.helper.make_tensor_value_info(name, ir.DataType.from_numpy(array.dtype).value, array.shape)
            for name, array in zip(names, arrays)
            if array is not None
        ],
        [onnx.ValueInfoProto(name="output")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)])
    feeds = {name: array for name, array in zip(names, arrays) if array is not None}
    results = ReferenceEvaluator(model).run(None, feeds)
    if not isinstance(results, list):
        raise TypeError(f"the reference gave a {type(results).__name__}")
    return np.asarray(results[0])
