"""Weights as expressions: one rounding at the end, and none that belongs to the network itself forgotten."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewrite.ir.weights import (
    BlockDiagonal,
    Center,
    Composed,
    Concat,
    Constant,
    ConvertedTensor,
    MaterializedTensor,
    Placed,
    Product,
    Reshape,
    Response,
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
V6 = RANDOM.standard_normal(6)
K, L = RANDOM.standard_normal((4, 3, 2, 3)), RANDOM.standard_normal((6, 2, 3, 1))


def placed(array: np.ndarray, shape: tuple[int, ...], start: tuple[int, ...], step: tuple[int, ...]) -> np.ndarray:
    """`array` amid zeros, entry by entry."""
    result = np.zeros(shape)
    for index in np.ndindex(*array.shape):
        result[tuple(s + i * by for s, i, by in zip(start, index, step))] = array[index]
    return result


def in_groups(kernel: np.ndarray, groups: int, kept: int) -> np.ndarray:
    """The kernel of `kept` groups of channels that one of `groups` groups is, row by row."""
    (rows, width, *taps), merged = kernel.shape, groups // kept
    result = np.zeros((rows, width * merged, *taps))
    for row in range(rows):
        place = row // (rows // groups) % merged * width
        result[row, place : place + width] = kernel[row]
    return result


def composed(second: np.ndarray, first: np.ndarray, steps: tuple[tuple[int, int], ...], groups: int) -> np.ndarray:
    """One kernel behind another, term by term."""
    taps = [(a - 1) * s + (b - 1) * t + 1 for a, b, (s, t) in zip(second.shape[2:], first.shape[2:], steps)]
    result = np.zeros((second.shape[0], first.shape[1], *taps))
    for row, between, *later in np.ndindex(*second.shape):
        channel = row // (second.shape[0] // groups) * second.shape[1] + between
        for column, *earlier in np.ndindex(*first.shape[1:]):
            place = tuple(a * s + b * t for a, b, (s, t) in zip(later, earlier, steps))
            result[(row, column, *place)] += second[(row, between, *later)] * first[(channel, column, *earlier)]
    return result


EXPRESSIONS: dict[str, tuple[Weight, np.ndarray]] = {
    "transpose": (Transpose(Constant(W), (1, 0)), W.T),
    "scale": (Scale(Constant(W), Constant(V), 0), V[:, None] * W),
    "center": (Center(Constant(W), 1), W - W.mean(axis=1, keepdims=True)),
    "slice": (Slice(Constant(W), (slice(1, 4), slice(2, 7))), W[1:4, 2:7]),
    "concat": (Concat((Constant(W), Constant(2 * W)), 0), np.concatenate([W, 2 * W])),
    "stack": (Stack((Constant(W), Constant(2 * W))), np.stack([W, 2 * W])),
    "product": (Product(Constant(V), Constant(W)), V @ W),
    "reshape": (Reshape(Constant(W), (7, 5)), W.reshape(7, 5)),
    "reshape to more axes": (Reshape(Constant(W[:, :1]), (1, 5, 1, 1)), W[:, :1].reshape(1, 5, 1, 1)),
    "placed": (
        Placed(Constant(K), (9, 3, 7, 5), (1, 0, 2, 1), (2, 1, 3, 1)),
        placed(K, (9, 3, 7, 5), (1, 0, 2, 1), (2, 1, 3, 1)),
    ),
    "block diagonal": (BlockDiagonal(Constant(K), 4, 2), in_groups(K, 4, 2)),
    "diagonal": (BlockDiagonal(Constant(V[:, None]), 5), np.diag(V)),
    "two matrices": (Composed(Constant(W[:, :5]), Constant(W)), W[:, :5] @ W),
    "two kernels": (
        Composed(Constant(K), Constant(L[:3]), (2, 1), (1, 3)),
        composed(K, L[:3], ((2, 1), (1, 3)), 1),
    ),
    "two kernels in groups": (
        Composed(Constant(K), Constant(L), (1, 1), (1, 1), 2),
        composed(K, L, ((1, 1), (1, 1)), 2),
    ),
    "response": (Response(Constant(K), Constant(V[:3])), np.einsum("oiyx,i->o", K, V[:3])),
    "response in groups": (
        Response(Constant(K), Constant(V6), 2),
        np.einsum("oiyx,i->o", in_groups(K, 2, 1), V6),
    ),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_region_is_the_region_of_the_whole(name: str, data: st.DataObject) -> None:
    weight, expected = EXPRESSIONS[name]
    assert weight.shape == expected.shape
    ends = [st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True) for n in weight.shape]
    region = tuple(slice(*sorted(data.draw(each))) for each in ends)
    # Two orders of at most 18 additions of numbers of size 3 (a kernel of 6 taps on 3 channels).
    assert np.abs(weight.read(region) - expected[region]).max(initial=0.0) <= 18 * 3 * np.finfo(float).eps


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


def test_a_product_is_read_by_blocks_of_its_inner_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewrite.ir.weights.BLOCK_ELEMENTS", 8)
    for name in ("two matrices", "two kernels", "two kernels in groups", "response", "response in groups"):
        weight, expected = EXPRESSIONS[name]
        assert np.abs(weight.numpy() - expected).max() <= 18 * 3 * np.finfo(float).eps


def test_kernels_that_do_not_meet_have_no_shape() -> None:
    with pytest.raises(ValueError, match="reads 3 channels, not 6"):
        _ = Composed(Constant(K), Constant(L), (1, 1), (1, 1)).shape
    with pytest.raises(ValueError, match="4 rows in 3 groups"):
        _ = BlockDiagonal(Constant(K), 3).shape


class Counted(Weight):
    """A weight that counts how many of its numbers were read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.count = array, array.shape, 0

    def read(self, region: tuple[slice, ...]) -> np.ndarray:
        self.count += self.array[region].size
        return self.array[region]


@pytest.mark.parametrize(
    ("made", "region", "read"),
    [
        (lambda w: Placed(w, (8, 9, 5, 5), (0, 0, 1, 1), (1, 1, 1, 1)), np.s_[2:4, 0:9, 0:2, 0:2], 2 * 9),
        (lambda w: Placed(w, (8, 9, 5, 5), (0, 0, 1, 1), (1, 1, 1, 1)), np.s_[0:8, 0:9, 0:1, 0:5], 0),
        (lambda w: BlockDiagonal(w, 4), np.s_[2:4, 0:4, 0:3, 0:3], 2 * 9 * 9),
        (lambda w: Composed(w, Constant(np.ones((9, 2, 1, 1))), (1, 1), (1, 1)), np.s_[2:4, 0:1, 0:3, 0:3], 2 * 9 * 9),
        (lambda w: Composed(Constant(np.ones((5, 8, 1, 1))), w, (1, 1), (1, 1)), np.s_[0:5, 3:5, 0:3, 0:3], 8 * 2 * 9),
        (lambda w: Response(w, Constant(np.ones(9))), np.s_[2:4], 2 * 9 * 9),
        (lambda w: Reshape(w, (1, 8, 9, 3, 1, 3)), np.s_[0:1, 2:4, 0:1, 0:3, 0:1, 0:3], 2 * 9),
    ],
)
def test_a_region_is_read_from_little_more_than_it_needs(made, region: tuple[slice, ...] | slice, read: int) -> None:
    inner = Counted(np.ones((8, 9, 3, 3)))
    made(inner).read(region if isinstance(region, tuple) else (region,))
    assert inner.count == read
