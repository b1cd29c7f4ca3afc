"""The float64 reference: a graph evaluated operator by operator, over the reals up to float64 rounding.

The reference is the captured graph itself, not the framework's model in double precision, which casts to float32
inside. Weights are widened exactly, read when an operator uses them and dropped after; large ones are read by blocks.
A value is freed after its last use, so peak memory is a few activations and one block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from rewrite.check.operators import TABLE, Call, Operand, StoredIntegers, dense, normalized
from rewrite.errors import InputsError, UnsupportedOperatorError
from rewrite.ir.weights import Source, Weight, weight_of

_DEFAULT_DOMAINS = ("", "ai.onnx")
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


def evaluate(
    model: ir.Model,
    inputs: Mapping[str, np.ndarray],
    *,
    watch: Iterable[str] = (),
    on_value: Callable[[str, np.ndarray], None] | None = None,
    unrounded: bool = False,
    precision: type = np.float64,
) -> dict[str, np.ndarray]:
    """The graph's outputs, and the values named in `watch`, by name.

    `on_value(name, array)` is called for every value as it is computed, and none is kept for it. With `unrounded`, a
    rewritten weight is its exact expression in float64 instead of what its storage type rounds it to.

    Raises `InputsError` for a missing input, `UnsupportedOperatorError` for an operator without a definition.
    """
    outputs = [value.name or "" for value in model.graph.outputs]
    wanted, kept = set(outputs) | set(watch), {}
    for name, operand in _Evaluation(inlined(model), unrounded, precision).run(inputs):
        if name in wanted:
            kept[name] = dense(operand, precision)
        if on_value is not None and isinstance(operand, np.ndarray):
            on_value(name, operand)
    return {name: kept[name] for name in (*outputs, *sorted(wanted - set(outputs))) if name in kept}


def values_of(
    model: ir.Model,
    inputs: Mapping[str, np.ndarray],
    *,
    unrounded: bool = False,
    precision: type = np.float64,
) -> Iterator[tuple[str, np.ndarray]]:
    """Every value of the main graph in the order it is computed: inputs, then node outputs.

    Sequences are left out, and so are stored weights that are only transposed or renamed: they are still on disk.
    `precision` np.float32 computes with float32 rounding instead: the noise of a float32 run, seen at every value.
    What is changed of an array in place, before the next value is asked for, is what later operators read.
    """
    for name, operand in _Evaluation(inlined(model), unrounded, precision).run(inputs):
        if isinstance(operand, np.ndarray):
            yield name, operand


def storage_dtype(model: ir.Model) -> np.dtype:
    """The float type that most of a model's weights are stored in, by bytes; float32 where it has none."""
    stored: Counter[ir.DataType] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype.is_floating_point():
            stored[value.const_value.dtype] += value.const_value.nbytes
    return np.dtype(stored.most_common(1)[0][0].numpy() if stored else np.float32)


def inlined(model: ir.Model) -> ir.Model:
    """`model` without model-local functions; value names of the main graph stay."""
    if not model.functions:
        return model
    from onnx_ir.passes.common import InlinePass

    copy = model.clone()
    InlinePass()(copy)
    return copy


class _Evaluation:
    """One walk over one graph: operands by value, freed when the last reader has run."""

    def __init__(self, model: ir.Model, unrounded: bool, precision: type) -> None:
        self.model, self.unrounded, self.precision = model, unrounded, precision
        self.operands: dict[ir.Value, Operand] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Operand]]:
        graph = self.model.graph
        yield from self._bind_inputs(inputs)
        self._bind_initializers(graph)
        for value in graph.outputs:  # an input or initializer that is itself an output has no node to yield it
            if value.producer() is None and not value.is_graph_input():
                yield value.name or "", self.operands[value]
        left = Counter(used for node in graph for used in _uses(node))
        left.update(graph.outputs)
        for node in graph:
            for value, result in self._apply(node):
                yield value.name or "", result
            left.subtract(_uses(node))
            for value in {*_uses(node), *node.outputs}:
                if left[value] <= 0:
                    self.operands.pop(value, None)

    def _bind_inputs(self, inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Operand]]:
        for value in self.model.graph.inputs:
            name = value.name or ""
            if name in inputs:
                self.operands[value] = normalized(inputs[name], self.precision)
                yield name, self.operands[value]
            elif name not in self.model.graph.initializers:
                raise InputsError(f"input {name} is missing", remedy="give every input of the graph")

    def _bind_initializers(self, graph: ir.Graph) -> None:
        for value in graph.initializers.values():
            if value not in self.operands:
                self.operands[value] = self._stored(value)

    def _stored(self, value: ir.Value) -> Operand:
        tensor = value.const_value
        if tensor is None:
            raise UnsupportedOperatorError("has no data", where=f"initializer {value.name}")
        if not tensor.dtype.is_floating_point():
            return StoredIntegers(tensor)
        return weight_of(tensor) if self.unrounded else Source(tensor)

    def _apply(self, node: ir.Node) -> Iterator[tuple[ir.Value, Operand]]:
        operands = [None if value is None else self.operands[value] for value in node.inputs]
        call = Call(node, self._version(node.domain), self.precision, self.unrounded, self._run_subgraph)
        results = evaluate_operator(call, operands)
        for value, result in zip(node.outputs, results):
            if not value.name:
                continue
            self.operands[value] = result
            yield value, result

    def _run_subgraph(self, graph: ir.Graph, arguments: Sequence[Operand]) -> list[Operand]:
        self._bind_initializers(graph)
        self.operands.update(zip(graph.inputs, arguments))
        for node in graph:
            for _ in self._apply(node):
                pass
        results = [self.operands[value] for value in graph.outputs]
        for node in graph:
            for value in node.outputs:
                self.operands.pop(value, None)
        return results

    def _version(self, domain: str) -> int:
        imports = {**self.model.opset_imports, **self.model.graph.opset_imports}
        return imports.get(domain, imports.get("", 1))


def _uses(node: ir.Node) -> set[ir.Value]:
    """The values a node reads, itself or from inside its subgraphs."""
    used = {value for value in node.inputs if value is not None}
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                used |= _uses(inner)
            used |= set(attribute.as_graph().outputs)
    return used


def evaluate_operator(call: Call, operands: Sequence[Operand]) -> list[Operand]:
    """The results of one operator; floats in them have the call's precision.

    Raises `UnsupportedOperatorError` where neither this package nor `onnx.reference` defines it in float64, and where
    its operands do not fit it.
    """
    domain = "" if call.node.domain in _DEFAULT_DOMAINS else call.node.domain
    entry = TABLE.get((domain, call.node.op_type))
    try:
        with np.errstate(all="ignore"):
            if entry is None:
                results = _by_standard_reference(call, [dense(operand, call.precision) for operand in operands])
            elif entry.lazy:
                results = entry.definition(call, *operands)
            else:
                results = entry.definition(call, *(dense(operand, call.precision) for operand in operands))
    except (ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
        raise call.unsupported(f"cannot be evaluated on {_shapes(operands)}: {error}") from error
    results = results if isinstance(results, tuple) else (results,)
    return [
        result if isinstance(result, Weight | StoredIntegers | list) else normalized(result, call.precision)
        for result in results
    ]


def _shapes(operands: Sequence[Operand]) -> str:
    """The operands' types and shapes, for a message."""
    shown = []
    for operand in operands:
        if isinstance(operand, StoredIntegers):
            operand = operand.numpy()
        if isinstance(operand, np.ndarray):
            shown.append(f"{operand.dtype}{list(operand.shape)}")
        else:
            shown.append(f"weight{list(operand.shape)}" if isinstance(operand, Weight) else type(operand).__name__)
    return ", ".join(shown) or "no operands"


def _by_standard_reference(call: Call, operands: Sequence[Operand]) -> tuple:
    """`onnx.reference` for a node that the table lacks.

    It is refused where it answers in a narrower float than asked: some of its definitions cast to float32 inside.
    """
    from onnx.reference import ReferenceEvaluator

    if call.node.op_type in _RANDOM:
        raise call.unsupported("is random")
    proto = ir.to_proto(call.node)
    try:
        evaluator = ReferenceEvaluator(proto, opsets={call.node.domain: call.version})
    except Exception as error:  # it has no one class for an operator it lacks
        raise call.unsupported("has no float64 definition") from error
    results = evaluator.run(None, {name: array for name, array in zip(proto.input, operands) if name})
    wanted = np.dtype(call.precision).itemsize
    for result in results:
        if isinstance(result, np.ndarray) and result.dtype.kind == "f" and result.dtype.itemsize < wanted:
            raise call.unsupported(f"is defined by onnx.reference in {result.dtype} only")
    return tuple(results)
