"""Fold the integer and shape arithmetic of a captured graph; leave every floating-point operation as it is.

What remains is the network as it was written: a Transpose of a weight stays a node, `1 + w` stays, a BatchNormalization
stays. Folded are constants of integers and booleans, reshape targets, no-op views, sequences of constant sizes, casts to
the dtype a value has, and repeated subexpressions. Literals (a scalar 0.5) may be moved and cast exactly, never computed
with.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    RemoveUnusedNodesPass,
)

from rewrite.capture.dimensions import Contents, Element, Monomial, dimension, product

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

INT_MAX = np.iinfo(np.int32).max


def fold_shapes(model: ir.Model) -> None:
    """Fold `model` in place until nothing changes, then give every value the dtype and shape that can be inferred."""
    constants = Constants(model.graph)
    for _ in range(8):
        constants.lift()
        changed = _pass(model.graph, constants)
        changed |= CommonSubexpressionEliminationPass()(model).modified
        RemoveUnusedNodesPass()(model)
        if not changed:
            break
    infer_missing_shapes(model)


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
                if tensor is not None:
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
        new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
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


def _pass(graph: ir.Graph, constants: Constants) -> bool:
    contents = Contents()
    changed = False
    for node in list(graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        rule = RULES.get(node.op_type)
        changed |= rule is not None and rule(node, contents, constants)
        if node.graph is not None:
            changed |= _fold_known(node, contents, constants) or _evaluate(node, constants)
    return changed


def _drop(node: ir.Node, index: int = 0) -> bool:
    """Replace the only output of `node` by its input."""
    source = node.inputs[index]
    if source is None or not replace(node.outputs[0], source):
        return False
    if node.graph is not None:
        node.graph.remove(node, safe=True)
    return True


def _fold_known(node: ir.Node, contents: Contents, constants: Constants) -> bool:
    """An integer vector or scalar whose elements are all known becomes a constant."""
    if len(node.outputs) != 1 or node.op_type == "Constant" or node.outputs[0].is_graph_output():
        return False
    elements = contents.of(node.outputs[0])
    if elements is None or not all(isinstance(element, int) for element in elements):
        return False
    output = node.outputs[0]
    if node.op_type in ("Shape", "Concat"):
        shape: tuple[int, ...] = (len(elements),)
    elif output.shape is not None and output.shape.is_static():
        shape = tuple(output.shape.numpy())
    else:
        return False
    dtype = output.dtype or ir.DataType.INT64
    new = constants.value(np.array(elements, dtype.numpy()).reshape(shape), dtype)
    return replace(output, new)


def _evaluate(node: ir.Node, constants: Constants) -> bool:
    """Compute a node of constants with the operator's reference implementation."""
    if node.op_type not in INTEGER_OPERATORS or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return False
    arrays = [constants.array(value) for value in node.inputs]
    if any(array is None and value is not None for array, value in zip(arrays, node.inputs)):
        return False
    if not node.inputs:
        return False
    floating = any(value is not None and value.dtype.is_floating_point() for value in node.inputs)
    if floating and node.op_type not in MOVES:
        return False
    if node.op_type in ("Expand", "ConstantOfShape", "Tile", "Range") and _volume(node, arrays) > INTEGER_LIMIT:
        return False
    result = _reference(node, arrays)
    dtype = ir.DataType.from_numpy(result.dtype)
    if dtype.is_floating_point():
        if result.size > LITERAL_LIMIT:
            return False
        if node.op_type == "Cast" and not _exact(arrays[0], result):
            return False
    elif node.op_type == "Cast" and floating and not _exact(arrays[0], result):
        return False
    new = constants.value(np.array(result, order="C"), dtype)
    return replace(node.outputs[0], new)


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
    return np.asarray(ReferenceEvaluator(model).run(None, feeds)[0])


# Rules for one operator: change the node or its readers and say whether anything changed.


def _identity(node: ir.Node, _: Contents, __: Constants) -> bool:
    return _drop(node)


def _cast(node: ir.Node, _: Contents, __: Constants) -> bool:
    source = node.inputs[0]
    return source is not None and source.dtype == ir.DataType(node.attributes.get_int("to")) and _drop(node)


def _cast_like(node: ir.Node, _: Contents, __: Constants) -> bool:
    like = node.inputs[1]
    if like is None or like.dtype is None:
        return False
    new = ir.node("Cast", [node.inputs[0]], {"to": like.dtype.value}, name=node.name)
    new.outputs[0].name = node.outputs[0].name
    return _splice(node, new, ir.TensorType(like.dtype))


def _splice(node: ir.Node, new: ir.Node, kind: ir.TypeProtocol | None = None) -> bool:
    graph = node.graph
    if graph is None:
        return False
    old, output = node.outputs[0], new.outputs[0]
    output.type, output.shape = kind or old.type, old.shape
    graph.insert_before(node, new)
    name = old.name
    ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    output.name = name
    return True


def _transpose(node: ir.Node, _: Contents, __: Constants) -> bool:
    permutation = node.attributes.get_ints("perm")
    return permutation is not None and list(permutation) == list(range(len(permutation))) and _drop(node)


def _concat(node: ir.Node, _: Contents, __: Constants) -> bool:
    return len(node.inputs) == 1 and _drop(node)


def _slice(node: ir.Node, contents: Contents, _: Constants) -> bool:
    """A slice of everything."""
    source, starts, ends, axes, steps = [*node.inputs, None, None][:5]
    if source is None or source.shape is None:
        return False
    begin, stop = contents.of(starts), contents.of(ends)
    along = contents.of(axes) if axes is not None else tuple(range(len(begin or ())))
    step = contents.of(steps) if steps is not None else (1,) * len(begin or ())
    if begin is None or stop is None or along is None or step is None:
        return False
    for first, last, axis, stride in zip(begin, stop, along, step):
        if first != 0 or stride != 1 or not isinstance(axis, int):
            return False
        size = dimension(source.shape[axis])
        whole = isinstance(last, int) and (last >= INT_MAX or (isinstance(size, int) and last >= size))
        if not whole and (last is None or last != size):
            return False
    return _drop(node)


def _expand(node: ir.Node, contents: Contents, constants: Constants) -> bool:
    """An expansion to the shape the value has goes; a computed shape becomes constant where axes are kept."""
    source, target = node.inputs[0], contents.of(node.inputs[1])
    if source is None or source.shape is None or target is None or len(target) > len(source.shape):
        return False
    sizes = [dimension(dim) for dim in source.shape][len(source.shape) - len(target) :]
    kept = [wanted == 1 or (wanted is not None and wanted == size) for wanted, size in zip(target, sizes)]
    if all(kept):
        return _drop(node)
    if node.inputs[1] is None or node.inputs[1].is_initializer():
        return False
    # Expanding an axis to 1 keeps it, so an axis that provably keeps its size needs no shape arithmetic.
    fixed = [1 if keeps else wanted for keeps, wanted in zip(kept, target)]
    if not all(isinstance(wanted, int) for wanted in fixed):
        return False
    node.replace_input_with(1, constants.value(np.array(fixed, np.int64), ir.DataType.INT64))
    return True


def _add(node: ir.Node, _: Contents, constants: Constants) -> bool:
    """An integer plus a zero that does not broadcast it."""
    for index, other in ((0, 1), (1, 0)):
        zero, source = constants.array(node.inputs[other]), node.inputs[index]
        if zero is None or source is None or zero.dtype.kind not in "iu" or zero.any() or zero.size != 1:
            continue
        if source.shape is not None and len(source.shape) >= zero.ndim:
            return _drop(node, index)
    return False


def _and(node: ir.Node, _: Contents, constants: Constants) -> bool:
    """A condition and a True that does not broadcast it."""
    for index, other in ((0, 1), (1, 0)):
        true, source = constants.array(node.inputs[other]), node.inputs[index]
        if true is None or source is None or not true.all() or true.size != 1:
            continue
        if source.shape is not None and len(source.shape) >= true.ndim:
            return _drop(node, index)
    return False


def _reshape(node: ir.Node, contents: Contents, constants: Constants) -> bool:
    """A view of the same shape goes; a computed target becomes constant where 0 and -1 provably mean the same."""
    source, target = node.inputs[0], contents.of(node.inputs[1])
    if source is None or source.shape is None or target is None:
        return False
    sizes = [dimension(dim) for dim in source.shape]
    literal_zero = bool(node.attributes.get_int("allowzero", 0))
    if 0 in target and literal_zero:
        return False
    asked = [sizes[i] if element == 0 and i < len(sizes) else element for i, element in enumerate(target)]
    asked = _resolved(asked, sizes)
    if len(asked) == len(sizes) and all(a is not None and a == b for a, b in zip(asked, sizes)) and _drop(node):
        return True
    if node.inputs[1] is not None and node.inputs[1].is_initializer():
        if literal_zero:
            del node.attributes["allowzero"]
        return False
    fixed: list[int | None] = [
        element
        if isinstance(element, int)
        else 0
        if i < len(sizes) and element is not None and element == sizes[i]
        else None
        for i, element in enumerate(target)
    ]
    if fixed.count(None) == 1 and -1 not in fixed:
        fixed[fixed.index(None)] = -1
    if None in fixed:
        return False
    node.replace_input_with(1, constants.value(np.array(fixed, np.int64), ir.DataType.INT64))
    node.attributes.pop("allowzero", None)
    return True


def _resolved(target: list[Element], sizes: list[Element]) -> list[Element]:
    """`target` with its -1 worked out, where the sizes are known."""
    if target.count(-1) != 1:
        return target
    place = target.index(-1)
    rest, total = [element for i, element in enumerate(target) if i != place], list(sizes)
    for element in list(rest):
        if element is not None and element in total:
            total.remove(element)
            rest.remove(element)
    size, divisor = product(total), product(rest)
    if divisor == 1:
        return [*target[:place], size, *target[place + 1 :]]
    if isinstance(divisor, int) and divisor > 0:
        if isinstance(size, int) and size % divisor == 0:
            return [*target[:place], size // divisor, *target[place + 1 :]]
        if isinstance(size, Monomial) and size.coefficient % divisor == 0:
            quotient = product([size.coefficient // divisor, Monomial(1, size.names)])
            return [*target[:place], quotient, *target[place + 1 :]]
    return target


def _split_to_sequence(node: ir.Node, contents: Contents, constants: Constants) -> bool:
    """SplitToSequence read by SequenceAt at constant places is a Split."""
    source, graph = node.inputs[0], node.graph
    readers = [use.node for use in node.outputs[0].uses()]
    if source is None or graph is None or source.shape is None or node.attributes.get_int("keepdims", 1) != 1:
        return False
    places = [contents.of(reader.inputs[1]) if reader.op_type == "SequenceAt" else None for reader in readers]
    if any(place is None or not isinstance(place[0], int) for place in places):
        return False
    axis = node.attributes.get_int("axis", 0)
    size = source.shape[axis]
    parts = contents.of(node.inputs[1]) if len(node.inputs) > 1 else (1,)
    if not isinstance(size, int) or parts is None or not all(isinstance(part, int) for part in parts):
        return False
    sizes = [int(part) for part in parts if isinstance(part, int)]
    scalar = len(node.inputs) < 2 or node.inputs[1] is None or len(node.inputs[1].shape or ()) == 0
    if scalar:
        sizes = [min(sizes[0], size - start) for start in range(0, size, sizes[0])]
    split = ir.node(
        "Split",
        [source, constants.value(np.array(sizes, np.int64), ir.DataType.INT64)],
        {"axis": axis},
        num_outputs=len(sizes),
        name=node.name,
    )
    graph.insert_before(node, split)
    for index, output in enumerate(split.outputs):
        output.name = f"{node.outputs[0].name}_{index}"
        output.type = source.type
        output.shape = ir.Shape(
            [sizes[index] if i == axis % len(source.shape) else d for i, d in enumerate(source.shape)]
        )
    for reader, place in zip(readers, places):
        if place is not None and isinstance(place[0], int):
            output, old = split.outputs[place[0]], reader.outputs[0]
            if old.is_graph_output() and output.is_graph_output():
                continue
            name = old.name
            replace(old, output)
            if reader.graph is not None and not old.uses():
                graph.remove(reader, safe=True)
                old.name, output.name = None, name
    return True


Rule = Callable[[ir.Node, Contents, Constants], bool]

RULES: dict[str, Rule] = {
    "Add": _add,
    "And": _and,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _concat,
    "Expand": _expand,
    "Identity": _identity,
    "Reshape": _reshape,
    "Slice": _slice,
    "SplitToSequence": _split_to_sequence,
    "Transpose": _transpose,
}


def infer_missing_shapes(model: ir.Model) -> None:
    """Give values without dtype or shape what ONNX shape inference finds; what the exporter recorded is never replaced."""
    from onnx_ir.passes.common import ShapeInferencePass

    inferred = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model.clone()).model
    found = {value.name: value for node in inferred.graph for value in node.outputs}
    for node in model.graph:
        for value in node.outputs:
            other = found.get(value.name)
            if other is None:
                continue
            if value.type is None and other.type is not None:
                value.type = other.type
            if value.shape is None and other.shape is not None:
                value.shape = ir.Shape([_named(dim) for dim in other.shape])


def _named(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """A dimension that inference invented a name for is unknown."""
    unnamed = isinstance(dim, ir.SymbolicDim) and (dim.value or "").startswith("unk__")
    return ir.SymbolicDim(None) if unnamed else dim
