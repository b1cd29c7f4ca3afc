"""Weights as expressions: one rounding at the end, and none that belongs to the network itself forgotten."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewrite.ir.weights import (
    Center,
    Concat,
    Constant,
    ConvertedTensor,
    MaterializedTensor,
    Product,
    Scale,
    Slice,
    Stack,
    Transpose,
    Weight,
    row_blocks,
    weight_of,
    whole,
)

RANDOM = np.random.default_rng(0)
W, V = RANDOM.standard_normal((5, 7)), RANDOM.standard_normal(5)

EXPRESSIONS: dict[str, tuple[Weight, np.ndarray]] = {
    "transpose": (Transpose(Constant(W), (1, 0)), W.T),
    "scale": (Scale(Constant(W), Constant(V), 0), V[:, None] * W),
    "center": (Center(Constant(W), 1), W - W.mean(axis=1, keepdims=True)),
    "slice": (Slice(Constant(W), (slice(1, 4), slice(2, 7))), W[1:4, 2:7]),
    "concat": (Concat((Constant(W), Constant(2 * W)), 0), np.concatenate([W, 2 * W])),
    "stack": (Stack((Constant(W), Constant(2 * W))), np.stack([W, 2 * W])),
    "product": (Product(Constant(V), Constant(W)), V @ W),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_region_is_the_region_of_the_whole(name: str, data: st.DataObject) -> None:
    weight, expected = EXPRESSIONS[name]
    assert weight.shape == expected.shape
    ends = [st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True) for n in weight.shape]
    region = tuple(slice(*sorted(data.draw(each))) for each in ends)
    # Two orders of at most 7 additions of numbers of size 3.
    assert np.abs(weight.read(region) - expected[region]).max(initial=0.0) <= 7 * 3 * np.finfo(float).eps


@pytest.mark.parametrize("elements", [1, 6, 7, 13, 10**6])
def test_blocks_cover_every_row_once(elements: int) -> None:
    rows = [row for region in row_blocks((5, 7), elements) for row in range(region[0].start, region[0].stop)]
    assert rows == list(range(5))


def test_a_folded_tensor_is_rounded_once() -> None:
    tensor = MaterializedTensor(Constant(W), ir.DataType.FLOAT16, "w")
    assert weight_of(tensor).numpy().tolist() == W.tolist()
    assert tensor.numpy().tolist() == W.astype(np.float16).tolist()


def test_a_converted_tensor_is_its_rounded_numbers() -> None:
    tensor = ConvertedTensor(Constant(W), ir.DataType.FLOAT16, "w")
    assert weight_of(tensor).read(whole(W.shape)).tolist() == W.astype(np.float16).astype(float).tolist()
