"""One network in which every approximated site can be switched between the exact computation and the quantized one.

    y′ = If(site i, the quantized nodes on x′, else y)          x′, y′: what x and y are, as others are switched

A run with all switches off is the exact network; with one on, that site alone is quantized. With `MEASURE` on, each
place also says how far its quantized nodes are from the exact value when they read what the exact network computes.
One session holds it all, so that a run for every site costs one evaluation each and nothing is loaded twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from rewrite.check.places import ApproximateSite, Place, copied
from rewrite.check.runtime import Session

SWITCH, MEASURE, ERROR, SIZE = "rewrite.switch.{}", "rewrite.measure", "rewrite.error.{}", "rewrite.size.{}"

Inputs = Mapping[str, np.ndarray]


class Switched:
    """A session over the switched network; a context manager."""

    def __init__(self, exact: ir.Model, sites: Sequence[ApproximateSite]) -> None:
        import onnxruntime

        self.count = len(sites)
        self._outputs = [value.name or "" for value in exact.graph.outputs]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Q and DQ are computed as they stand: what is measured is the graph, not the kernels that may replace them.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._session = Session(switched_model(exact, sites), options)

    def __enter__(self) -> Switched:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def run(self, inputs: Inputs, on: Sequence[int] = ()) -> dict[str, np.ndarray]:
        """The network's outputs with the sites `on` quantized."""
        found = self._session.run(self._switches(inputs, on, measure=False))
        return {name: found[name] for name in self._outputs}

    def measure(self, inputs: Inputs) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """The exact outputs, and per site the squared error and the squared size of its values, inputs exact."""
        found = self._session.run(self._switches(inputs, (), measure=True))
        outputs = {name: found[name] for name in self._outputs}
        sums = [[float(found[kind.format(i)]) for i in range(self.count)] for kind in (ERROR, SIZE)]
        return outputs, np.array(sums[0]), np.array(sums[1])

    def _switches(self, inputs: Inputs, on: Sequence[int], *, measure: bool) -> dict[str, np.ndarray]:
        switches = {SWITCH.format(i): np.array(i in on) for i in range(self.count)}
        return {**inputs, **switches, MEASURE: np.array(measure)}


def switched_model(exact: ir.Model, sites: Sequence[ApproximateSite]) -> ir.Model:
    """The network as above: inputs of `exact` and the switches, its outputs and the sums per site."""
    model = exact.clone()
    graph = model.graph
    values = {value.name or "": value for value in _named(graph)}
    stored: dict[str, ir.Value] = {}
    measure = _switch(graph, MEASURE)
    for index, site in enumerate(sites):
        switch, sums = _switch(graph, SWITCH.format(index)), list[tuple[ir.Value, ir.Value]]()
        for number, place in enumerate(site.places):
            name, label = place.result.name or "", f"site{index}.place{number}"
            exact_value = values[name]
            chosen = _chosen(place, label, switch, exact_value, values, stored, graph)
            sums.append(_measured(place, label, measure, exact_value, values, stored, graph))
            values[name] = chosen
        for kind, parts in zip((ERROR, SIZE), zip(*sums)):
            total = ir.Node("", "Sum", parts, name=kind.format(index))
            total.outputs[0].name = kind.format(index)
            total.outputs[0].dtype, total.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
            graph.append(total)
            graph.outputs.append(total.outputs[0])
    graph.sort()
    for domain, version in (("", 21), ("com.microsoft", 1)):
        graph.opset_imports.setdefault(domain, version)
    return model


def _named(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _switch(graph: ir.Graph, name: str) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    graph.inputs.append(value)
    return value


def _quantized_nodes(
    place: Place, label: str, values: Mapping[str, ir.Value], stored: dict[str, ir.Value], graph: ir.Graph
) -> tuple[list[ir.Node], ir.Value]:
    """The place's nodes on the values of the switched graph, and their result."""
    known: dict[ir.Value, ir.Value] = {value: values[value.name or ""] for value in place.inputs}
    for node in place.nodes:
        for value in node.inputs:
            if value is not None and value.is_initializer():
                known[value] = _constant(value, stored, graph)
    nodes = copied(place.nodes, known, lambda name: f"{label}.{name}")
    return nodes, known[place.result]


def _constant(value: ir.Value, stored: dict[str, ir.Value], graph: ir.Graph) -> ir.Value:
    name = f"quantized.{value.name}"
    if name not in stored:
        stored[name] = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
        graph.register_initializer(stored[name])
    return stored[name]


def _chosen(
    place: Place,
    label: str,
    switch: ir.Value,
    exact_value: ir.Value,
    values: Mapping[str, ir.Value],
    stored: dict[str, ir.Value],
    graph: ir.Graph,
) -> ir.Value:
    """If(switch, quantized, exact), which takes over the name and all readers of `exact_value`."""
    nodes, result = _quantized_nodes(place, f"{label}.on", values, stored, graph)
    same = ir.Node("", "Identity", [exact_value], name=f"{label}.off")
    same.outputs[0].name, same.outputs[0].type = f"{label}.off.{exact_value.name}", exact_value.type
    result.type = exact_value.type
    branches = {
        "then_branch": ir.Graph((), [result], nodes=nodes, name=f"{label}.then"),
        "else_branch": ir.Graph((), [same.outputs[0]], nodes=[same], name=f"{label}.else"),
    }
    chosen = _if(switch, branches, label, 1)
    value = chosen.outputs[0]
    value.type, value.shape = exact_value.type, exact_value.shape
    readers = [(use.node, use.idx) for use in exact_value.uses() if use.node is not same]
    was_output = [i for i, output in enumerate(graph.outputs) if output is exact_value]
    value.name, exact_value.name = exact_value.name, f"{exact_value.name}.exact"
    for reader, position in readers:
        reader.replace_input_with(position, value)
    for position in was_output:
        graph.outputs[position] = value
    graph.append(chosen)
    return value


def _measured(
    place: Place,
    label: str,
    measure: ir.Value,
    exact_value: ir.Value,
    values: Mapping[str, ir.Value],
    stored: dict[str, ir.Value],
    graph: ir.Graph,
) -> tuple[ir.Value, ir.Value]:
    """If(measure, (Σ(quantized − exact)², Σ exact²), (0, 0))."""
    label = f"{label}.measured"
    nodes, result = _quantized_nodes(place, label, values, stored, graph)
    wide = [_node("Cast", [value], f"{label}.wide{i}", to=1) for i, value in enumerate((result, exact_value))]
    error = _node("Sub", [node.outputs[0] for node in wide], f"{label}.difference")
    sums = [
        _node("ReduceSumSquare", [node.outputs[0]], f"{label}.sum{i}", keepdims=0)
        for i, node in enumerate((error, wide[1]))
    ]
    nothing = [_zero(f"{label}.nothing{i}") for i in range(2)]
    branches = {
        "then_branch": ir.Graph(
            (), [node.outputs[0] for node in sums], nodes=[*nodes, *wide, error, *sums], name=f"{label}.then"
        ),
        "else_branch": ir.Graph((), [node.outputs[0] for node in nothing], nodes=nothing, name=f"{label}.else"),
    }
    node = _if(measure, branches, label, 2)
    graph.append(node)
    return node.outputs[0], node.outputs[1]


def _node(kind: str, inputs: Sequence[ir.Value], name: str, **attributes: int) -> ir.Node:
    node = ir.Node("", kind, inputs, [ir.AttrInt64(key, value) for key, value in attributes.items()], name=name)
    node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
    return node


def _zero(name: str) -> ir.Node:
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.zeros((), np.float32)))], name=name)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, ir.DataType.FLOAT, ir.Shape([])
    return node


def _if(condition: ir.Value, branches: Mapping[str, ir.Graph], label: str, outputs: int) -> ir.Node:
    attributes = [ir.AttrGraph(name, graph) for name, graph in branches.items()]
    node = ir.Node("", "If", [condition], attributes, num_outputs=outputs, name=f"{label}.if")
    for index, value in enumerate(node.outputs):
        value.name, value.dtype = f"{label}.if{index}", ir.DataType.FLOAT
    return node
