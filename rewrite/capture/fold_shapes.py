"""Fold the integer and shape arithmetic of a captured graph; leave every floating-point operation as it is.

What remains is the network as it was written: a Transpose of a weight stays a node, `1 + w` stays, a
BatchNormalization stays. Folded are constants of integers and booleans, reshape targets, no-op views, sequences of
constant sizes, casts to the dtype a value has, and repeated subexpressions. Literals (a scalar 0.5) may be moved and
cast exactly, never computed with.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    RemoveUnusedNodesPass,
)

from rewrite.capture.constant_folding import Constants, evaluate, replace
from rewrite.capture.dimensions import Contents, Element, Monomial, dimension, product

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


def _pass(graph: ir.Graph, constants: Constants) -> bool:
    contents = Contents()
    changed = False
    for node in list(graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        rule = RULES.get(node.op_type)
        changed |= rule is not None and rule(node, contents, constants)
        if node.graph is not None:
            changed |= _fold_known(node, contents, constants) or _fold_constants(node, constants)
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


def _fold_constants(node: ir.Node, constants: Constants) -> bool:
    """A node of constants becomes one."""
    new = evaluate(node, constants)
    return new is not None and replace(node.outputs[0], new)


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
    """Give values without dtype or shape what ONNX shape inference finds; what is recorded is never replaced."""
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
    if not isinstance(dim, int) and (dim.value or "").startswith("unk__"):
        return ir.SymbolicDim(None)
    return dim
