"""A small network of products and its quantized forms, by hand: the names are shared as passes share them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir

from rewrite.quantize.format import Format, packed
from rewrite.quantize.rounding import round_to_nearest

WIDTH, CLASSES, LAYERS, ROWS, BLOCK = 64, 32, 3, 32, 32

Product = Callable[["Builder", ir.Value, int, np.ndarray], ir.Node]


@dataclass
class Builder:
    """The graph as far as it is built."""

    nodes: list[ir.Node] = field(default_factory=list)
    stored: dict[str, ir.Value] = field(default_factory=dict)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self.stored:
            kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            tensor = ir.tensor(array, name=name)
            self.stored[name] = ir.Value(name=name, type=kind, shape=ir.Shape(array.shape), const_value=tensor)
        return self.stored[name]

    def node(self, kind: str, inputs: list, name: str, *, domain: str = "", dtype=ir.DataType.FLOAT, **attributes: int):
        made = ir.Node(domain, kind, inputs, [ir.AttrInt64(k, v) for k, v in attributes.items()], name=f"{name}.node")
        made.outputs[0].name, made.outputs[0].dtype = name, dtype
        self.nodes.append(made)
        return made


def exact_product(builder: Builder, x: ir.Value, index: int, weight: np.ndarray) -> ir.Node:
    return builder.node("MatMul", [x, builder.constant(f"W{index}", weight)], f"product{index}")


def few_bits(bits: int, level: int = 0, symmetric: bool = True) -> Product:
    def product(builder: Builder, x: ir.Value, index: int, weight: np.ndarray) -> ir.Node:
        form = Format(bits, signed=False, symmetric=symmetric, block=BLOCK)
        codes, scales, zeros = packed(round_to_nearest(weight.astype(np.float64), form))
        operands = [x, builder.constant(f"W{index}.codes", codes), builder.constant(f"W{index}.scales", scales)]
        if zeros is not None:
            operands.append(builder.constant(f"W{index}.zero_points", zeros))
        sizes = {"K": weight.shape[0], "N": weight.shape[1], "bits": bits, "block_size": BLOCK}
        return builder.node(
            "MatMulNBits", operands, f"product{index}", domain="com.microsoft", accuracy_level=level, **sizes
        )

    return product


def dynamic(builder: Builder, x: ir.Value, index: int, weight: np.ndarray) -> ir.Node:
    held = round_to_nearest(weight.astype(np.float64), Format(8, signed=True, symmetric=True))
    codes = builder.constant(f"W{index}.codes", held.codes)
    scales = builder.constant(f"W{index}.scales", held.scales.reshape(-1))
    return builder.node("DynamicQuantizeMatMul", [x, codes, scales], f"product{index}", domain="com.microsoft")


def static(scale: float = 0.04) -> Product:
    def product(builder: Builder, x: ir.Value, index: int, weight: np.ndarray) -> ir.Node:
        held = round_to_nearest(weight.astype(np.float64), Format(8, signed=True, symmetric=True))
        parameters = [
            builder.constant(f"{x.name}.scale", np.array(scale, np.float32)),
            builder.constant(f"{x.name}.zero_point", np.array(128, np.uint8)),
        ]
        codes = builder.node("QuantizeLinear", [x, *parameters], f"{x.name}.quantized", dtype=ir.DataType.UINT8)
        rounded = builder.node("DequantizeLinear", [codes.outputs[0], *parameters], f"{x.name}.dequantized")
        stored = [
            builder.constant(f"W{index}.codes", held.codes),
            builder.constant(f"W{index}.scales", held.scales.reshape(-1)),
        ]
        matrix = builder.node("DequantizeLinear", stored, f"W{index}.dequantized", axis=1)
        return builder.node("MatMul", [rounded.outputs[0], matrix.outputs[0]], f"product{index}")

    return product


def blocks_of_int4(builder: Builder, x: ir.Value, index: int, weight: np.ndarray) -> ir.Node:
    """DQ → MatMul, which a runtime may replace by MatMulNBits."""
    held = round_to_nearest(weight.astype(np.float64), Format(4, signed=True, symmetric=True, block=BLOCK))
    stored = [
        builder.constant(f"W{index}.codes", held.codes.astype(ml_dtypes.int4)),
        builder.constant(f"W{index}.scales", held.scales),
    ]
    matrix = builder.node("DequantizeLinear", stored, f"W{index}.dequantized", axis=0, block_size=BLOCK)
    return builder.node("MatMul", [x, matrix.outputs[0]], f"product{index}")


def corrected(builder: Builder, x: ir.Value, index: int, weight: np.ndarray) -> ir.Node:
    """Four bits, and the exact error as a correction of full rank."""
    product = few_bits(4)(builder, x, index, weight)
    product.outputs[0].name = product.name = f"product{index}.quantized"
    held = round_to_nearest(weight.astype(np.float64), Format(4, signed=False, symmetric=True, block=BLOCK)).values()
    left, sizes, right = np.linalg.svd(weight - held, full_matrices=False)
    inner = builder.node(
        "MatMul", [x, builder.constant(f"W{index}.A", (left * sizes).astype(np.float32))], f"inner{index}"
    )
    outer = [inner.outputs[0], builder.constant(f"W{index}.B", right.astype(np.float32))]
    low = builder.node("MatMul", outer, f"low{index}")
    return builder.node("Add", [product.outputs[0], low.outputs[0]], f"product{index}")


def weights(seed: int = 0) -> list[np.ndarray]:
    """With one large row each, so that activations have an outlier."""
    make = np.random.default_rng(seed)
    found = []
    for index in range(LAYERS + 1):
        weight = make.standard_normal((WIDTH, WIDTH if index < LAYERS else CLASSES)) / np.sqrt(WIDTH)
        weight[3] *= 1 + index
        found.append(weight.astype(np.float32))
    return found


def network(product: Product | Mapping[int, Product] = exact_product, seed: int = 0) -> ir.Model:
    """tanh(x·W₀) and so on, the last product plus a bias are logits; `product` may say which product is how."""
    builder = Builder()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", WIDTH]))
    value = x
    for index, weight in enumerate(weights(seed)):
        made = product.get(index, exact_product) if isinstance(product, Mapping) else product
        result = made(builder, value, index, weight).outputs[0]
        if index < LAYERS:
            value = builder.node("Tanh", [result], f"hidden{index}").outputs[0]
        else:
            bias = builder.constant("bias", np.linspace(-1, 1, CLASSES, dtype=np.float32))
            value = builder.node("Add", [result, bias], "logits").outputs[0]
    value.shape = ir.Shape(["rows", CLASSES])
    opsets = {"": 21, "com.microsoft": 1}
    stored = list(builder.stored.values())
    graph = ir.Graph([x], [value], nodes=builder.nodes, initializers=stored, name="network", opset_imports=opsets)
    return ir.Model(graph, ir_version=10)


def inputs(count: int = 2, seed: int = 1) -> list[dict[str, np.ndarray]]:
    make = np.random.default_rng(seed)
    return [{"x": make.standard_normal((ROWS, WIDTH)).astype(np.float32)} for _ in range(count)]
