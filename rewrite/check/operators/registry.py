"""What an operator's float64 definition looks like, and the table of all of them.

An operand is a numpy array, a weight that is read when used (`Weight`, `StoredIntegers`), a list (an ONNX sequence) or
None (an optional input left out). Floating arrays have the evaluation's precision whatever type the graph declares:
a cast between floats is then the identity, and the result is a function over the reals up to float64 rounding.
Integers and booleans keep their type and wrap as the standard says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from rewrite.errors import UnsupportedOperatorError
from rewrite.ir.weights import Weight


@dataclass(frozen=True, eq=False)
class StoredIntegers:
    """An integer or boolean initializer, read when used."""

    tensor: ir.TensorProtocol

    def numpy(self) -> np.ndarray:
        """The stored values."""
        return np.asarray(self.tensor.numpy())


Operand = Any
"""np.ndarray | Weight | StoredIntegers | list | None; a definition knows from its entry which it gets."""


@dataclass(frozen=True, eq=False)
class Call:
    """One application of an operator.

    `version` is the opset the model imports for the node's domain; `precision` is np.float64, or np.float32 where the
    rounding of a float32 run is imitated; `exact_attributes` keeps float attributes as held in memory, where a saved
    model would hold them in float32; `run_graph(graph, arguments)` evaluates a subgraph in the node's scope.
    """

    node: ir.Node
    version: int
    precision: type
    exact_attributes: bool
    run_graph: Callable[[ir.Graph, Sequence[Operand]], list[Operand]]

    def attribute(self, name: str, default: Any = None) -> Any:
        """The attribute's value, or `default` where it is absent."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def real(self, name: str, default: float | None = None) -> Any:
        """A float attribute, rounded to float32 as the file format does; a default is a float32 number in any case."""
        value = self.attribute(name)
        if value is None:
            return default if default is None else float(np.float32(default))
        return value if self.exact_attributes else float(np.float32(value))

    def wants(self, index: int) -> bool:
        """Whether output `index` is named, so that somebody may read it."""
        return index < len(self.node.outputs) and bool(self.node.outputs[index].name)

    def unsupported(self, reason: str) -> UnsupportedOperatorError:
        """The error for a use of the operator that has no float64 definition here."""
        return UnsupportedOperatorError(
            f"{operator_name(self.node)} {reason}",
            where=f"node {self.node.name or self.node.outputs[0].name}",
            remedy="the float64 reference has no definition for it; use --no-check",
        )


def operator_name(node: ir.Node) -> str:
    """`domain::OpType`, or `OpType` in the default domain."""
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


Definition = Callable[..., object]


@dataclass(frozen=True)
class Entry:
    """A definition; `lazy` ones take weights as they are, all others get arrays."""

    definition: Definition
    lazy: bool


TABLE: dict[tuple[str, str], Entry] = {}


def operator(*names: str, domain: str = "", lazy: bool = False) -> Callable[[Definition], Definition]:
    """Enter a definition `f(call, *operands) -> array | tuple of arrays` under `names`."""

    def enter(definition: Definition) -> Definition:
        for name in names:
            if (domain, name) in TABLE:
                raise ValueError(f"{domain}::{name} is defined twice")
            TABLE[domain, name] = Entry(definition, lazy)
        return definition

    return enter


def dense(operand: Operand, precision: type) -> Any:
    """`operand` as an array of the evaluation's precision; lists and None pass."""
    if isinstance(operand, Weight | StoredIntegers):
        operand = operand.numpy()
    return operand if operand is None or isinstance(operand, list) else normalized(operand, precision)


def is_floating(dtype: np.dtype) -> bool:
    """Whether `dtype` is a float of any width, those of ml_dtypes included."""
    return dtype.kind == "f" or (dtype.kind == "V" and ir.DataType.from_numpy(dtype).is_floating_point())


def normalized(array: object, precision: type) -> np.ndarray:
    """An array whose floats have type `precision`; other types are left alone."""
    array = np.asarray(array)
    if array.dtype != precision and is_floating(array.dtype):
        return array.astype(precision)
    return array
