"""Editing an ONNX graph: every change a pass makes goes through an `Editor`, so that names stay and origins show.

Two rules hold everywhere. A value that keeps its meaning keeps its name, since proofs, comparisons and reports pair
values by name: `take_over` gives a new node's output the name of what it replaces. And a node a pass creates says so,
in `metadata_props["rewrite.pass"]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir

from rewrite.ir.weights import MaterializedTensor, Weight

ORIGIN = "rewrite.pass"
"""The metadata key that names the pass a node comes from."""

TRANSFORM = "rewrite.transform"
"""The metadata key of a node that computes a transform at run time: the transform's id."""

FOLDABLE_ELEMENTS = 1024
"""Constants up to this size are compared by content; larger ones only by identity, so that no weight is read."""

_NOT_REPEATABLE = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
"""Standard operators whose outputs are more than a function of their inputs (Dropout is judged by its mode)."""


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor a value always holds, or None.

    An initializer that is also a graph input is a default a caller may override, not a constant.
    """
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.domain != "" or node.op_type != "Constant":
        return None
    return _constant_attribute(node)


def _constant_attribute(node: ir.Node) -> ir.TensorProtocol | None:
    name, attribute = next(iter(node.attributes.items()))
    if attribute.is_ref():
        return None
    if name == "value":
        return attribute.as_tensor()
    if name in ("value_int", "value_ints"):
        return ir.tensor(np.asarray(attribute.value, np.int64))
    if name in ("value_float", "value_floats"):
        return ir.tensor(np.asarray(attribute.value, np.float32))
    return None


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """A small constant (at most `FOLDABLE_ELEMENTS`) as an array in its own dtype, or None."""
    tensor = constant_of(value)
    return tensor.numpy() if tensor is not None and tensor.size <= FOLDABLE_ELEMENTS else None


def scalar_of(value: ir.Value | None) -> float | int | bool | None:
    """The exact value of a constant that holds one element, whatever its rank, or None.

    >>> scalar_of(None) is None
    True
    """
    array = array_of(value)
    return array.reshape(()).item() if array is not None and array.size == 1 else None


def shape_of(value: ir.Value | None) -> tuple[Any, ...] | None:
    """The shape with an int for a static axis, a name for a dynamic one and None for an unknown one."""
    if value is None or value.shape is None:
        return None
    return tuple(axis if isinstance(axis, int) else axis.value for axis in value.shape)


def same_shape(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether both shapes are known and equal, dynamic axes by name; unknown is no."""
    a, b = shape_of(one), shape_of(other)
    return a is not None and a == b and None not in a


def is_operator(node: ir.Node | None, *op_types: str, domain: str = "") -> TypeGuard[ir.Node]:
    """Whether `node` exists and is one of `op_types` of `domain`."""
    return node is not None and node.domain == domain and node.op_type in op_types


def attribute_of(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, or the default that the operator's definition gives."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def is_inference_dropout(node: ir.Node) -> bool:
    """Whether a Dropout (opset 12 or later) is known to pass its input through: training_mode absent or constant false.

    At a ratio of zero it also does, but training draws the mask from a generator, so the mode is what is asked.
    """
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    return mode is None or scalar_of(mode) is False


def only_use(value: ir.Value) -> ir.Node | None:
    """The node that reads `value`, if exactly one does, once, and no graph returns it."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


class Editor:
    """Edits one graph on behalf of one pass.

    `origin` is the pass's name; it is written on every node made here.
    """

    def __init__(self, model: ir.Model, origin: str) -> None:
        self.model = model
        self.graph = model.graph
        self.origin = origin
        self._names = {value.name for value in _all_values(model.graph)}
        self.made: dict[str, ir.Value] = {}
        """For a pass that makes one value for many places: what it made, by a name of its choosing."""
        self._folded: dict[tuple, ir.Value] = {}

    @property
    def opset(self) -> int:
        """The version of the ONNX operators in use."""
        return self.model.opset_imports.get("", 0)

    def name(self, wanted: str) -> str:
        """`wanted`, or the first of `wanted_1`, `wanted_2`, … that is free; taken from then on."""
        name, count = wanted, 0
        while name in self._names:
            count += 1
            name = f"{wanted}_{count}"
        self._names.add(name)
        return name

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        *,
        before: ir.Node,
        name: str,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | Sequence[int | str | None] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Insert a node of one output in front of `before`; returns that output.

        Dtype and shape are those of `like` where they are not given.
        """
        (output,) = self.nodes(op_type, inputs, attributes, before=before, names=(name,), domain=domain)
        describe(output, like=like, dtype=dtype, shape=shape)
        return output

    def nodes(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        *,
        before: ir.Node,
        names: Sequence[str],
        domain: str = "",
    ) -> tuple[ir.Value, ...]:
        """Insert a node with one output a name; an empty name is an output left out."""
        made = ir.node(op_type, inputs, _as_stored(attributes or {}), domain=domain, num_outputs=len(names))
        made.metadata_props[ORIGIN] = self.origin
        for output, wanted in zip(made.outputs, names):
            output.name = self.name(wanted) if wanted else ""
        made.name = f"{op_type}_{made.outputs[0].name}"
        if domain:
            self.model.opset_imports.setdefault(domain, 1)
        graph = before.graph
        if graph is None:
            raise ValueError(f"{before.name}: a node is inserted in front of one that no graph holds")
        graph.insert_before(before, made)
        return tuple(made.outputs)

    def initializer(
        self,
        name: str,
        content: np.ndarray | ir.TensorProtocol | Weight,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """A new initializer under a free name.

        A `Weight` stays an expression, rounded to `dtype` when it is saved.
        """
        name = self.name(name)
        if isinstance(content, Weight):
            if dtype is None:
                raise ValueError(f"{name}: a weight expression needs the dtype it is stored in")
            tensor: ir.TensorProtocol = MaterializedTensor(content, dtype, name)
        elif isinstance(content, np.ndarray):
            tensor = ir.tensor(content, dtype=dtype, name=name)
        else:
            tensor = content
        return self.register(name, tensor)

    def register(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """The initializer `name`, which the caller knows to be free."""
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def derived(self, key: tuple, name: str, weight: Weight, dtype: ir.DataType) -> ir.Value:
        """The initializer made for `key`, made once: two readers of one folded weight share its bytes."""
        if key not in self._folded:
            self._folded[key] = self.initializer(name, weight, dtype)
        return self._folded[key]

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """`new`, the output of a node made here, means what `old` meant: it gets its uses, its name and its type."""
        was_output = old.is_graph_output()
        old.name, new.name = self.name(f"{old.name}_before"), old.name
        describe(new, like=old)
        new.metadata_props.update(old.metadata_props)
        old.replace_all_uses_with(new, replace_graph_outputs=was_output)

    def redirect(self, old: ir.Value, new: ir.Value) -> None:
        """Readers of `old` read `new`, a value that exists already and is equal to it.

        A graph output keeps its name: an Identity stands there if `new` cannot carry it.
        """
        if not old.is_graph_output():
            old.replace_all_uses_with(new)
        elif new.producer() is None or new.is_graph_output() or new.graph is not old.graph:
            node = old.producer()
            if node is None:
                raise ValueError(f"{old.name}: a graph input that is returned as it is cannot be redirected")
            if is_operator(node, "Identity") and node.inputs[0] is new:
                return
            copy = self.node("Identity", [new], before=node, name=f"{old.name}_copy")
            self.take_over(old, copy)
        else:
            self.take_over(old, new)

    def clean(self) -> None:
        """Remove nodes and initializers that nothing reads."""
        remove_dead(self.graph)

    def dedupe(self) -> None:
        """Merge equal small constants and nodes that compute the same from the same."""
        _merge_constants(self)
        _merge_nodes(self)


def _as_stored(attributes: Mapping[str, object]) -> dict[str, Any]:
    """Floats as the file will hold them, in float32: a graph in memory must mean what is saved."""
    return {
        name: float(np.float32(content)) if isinstance(content, float) else content
        for name, content in attributes.items()
    }


def describe(
    value: ir.Value,
    *,
    like: ir.Value | None = None,
    dtype: ir.DataType | None = None,
    shape: ir.Shape | Sequence[int | str | None] | None = None,
) -> None:
    """Set dtype and shape of a value; what is given wins over `like`, what is already known is kept."""
    dtype = dtype or (like.dtype if like is not None and value.dtype is None else None)
    if dtype is not None:
        value.dtype = dtype
    if shape is None and like is not None and value.shape is None:
        shape = like.shape
    if shape is not None:
        value.shape = ir.Shape(shape)


def remove_dead(graph: ir.Graph) -> None:
    """Remove nodes whose outputs nobody reads, then initializers nobody reads (overridable inputs stay)."""
    for node in reversed(graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                remove_dead(attribute.as_graph())
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            graph.initializers.pop(name)


def _all_values(graph: ir.Graph):
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs
    for inner in graph.subgraphs():
        yield from inner.inputs
        yield from inner.initializers.values()


def _merge_constants(editor: Editor) -> None:
    """Integers, booleans and single numbers of equal content; parameters stay apart, equal or not, since a pass that
    rewrites one of two equal norms must not find that it has rewritten both.
    """
    seen: dict[tuple, ir.Value] = {}
    for name, value in list(editor.graph.initializers.items()):
        tensor = constant_of(value)
        if tensor is None or value.is_graph_output() or tensor.size > FOLDABLE_ELEMENTS:
            continue
        if tensor.dtype.is_floating_point() and tensor.size != 1:
            continue
        key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        first = seen.setdefault(key, value)
        if first is not value:
            value.replace_all_uses_with(first)
            editor.graph.initializers.pop(name)


def _merge_nodes(editor: Editor) -> None:
    seen: dict[tuple, ir.Node] = {}
    for node in list(editor.graph):
        key = _identity_of(node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is node:
            continue
        for output, kept in zip(node.outputs, first.outputs):
            editor.redirect(output, kept)
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            editor.graph.remove(node, safe=True)


def _identity_of(node: ir.Node) -> tuple | None:
    """What decides a node's outputs, or None where that is more than its inputs and attributes."""
    if node.domain != "" or node.op_type in _NOT_REPEATABLE:
        return None
    if node.op_type == "Dropout" and not is_inference_dropout(node):
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref() or attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            return None
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.size > FOLDABLE_ELEMENTS:
                return None
            attributes.append((name, tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()))
        else:
            attributes.append((name, attribute.type, str(attribute.value)))
    inputs = tuple(id(value) if value is not None else None for value in node.inputs)
    return (node.domain, node.op_type, node.overload, inputs, len(node.outputs), tuple(attributes))
