"""Labels move as numbers move: whatever a layout operator does to an array, it does to labels."""

from __future__ import annotations

import numpy as np
import pytest
from networks import network

from rewrite.basis.labels import OUTSIDE, Blocked, backward, combine, compress, forward, pull, reduce, reshape, spread
from rewrite.check.reference import evaluate
from rewrite.ir.edit import is_operator

OPERATORS = {
    "Transpose": "y = Transpose <perm = [0, 2, 1, 3]> (x)",
    "Reshape that joins": "s = Constant <value_ints = [0, 0, -1]> () y = Reshape (x, s)",
    "Reshape that divides": "s = Constant <value_ints = [0, 0, 2, 2, 6]> () y = Reshape (x, s)",
    "Reshape that does both": "s = Constant <value_ints = [2, 3, 3, 8]> () y = Reshape (x, s)",
    "Unsqueeze": "s = Constant <value_ints = [2]> () y = Unsqueeze (x, s)",
    "Slice": (
        "s = Constant <value_ints = [1]> () e = Constant <value_ints = [9]> () a = Constant <value_ints = [3]> () "
        "t = Constant <value_ints = [2]> () y = Slice (x, s, e, a, t)"
    ),
    "Slice from the end": (
        "s = Constant <value_ints = [-2]> () e = Constant <value_ints = [99]> () a = Constant <value_ints = [-2]> () "
        "y = Slice (x, s, e, a)"
    ),
    "Split": "y, z = Split <axis = 3, num_outputs = 2> (x)",
    "Gather of one": "i = Constant <value_int = 2> () y = Gather <axis = 2> (x, i)",
    "Gather of some": "i = Constant <value_ints = [3, 0]> () y = Gather <axis = 2> (x, i)",
    "GatherND": "i = Constant <value_ints = [1]> () y = GatherND (x, i)",
    "Neg": "y = Neg (x)",
}
RANKS = {
    "Reshape that joins": "2, 3, 24",
    "Reshape that divides": "2, 3, 2, 2, 6",
    "Reshape that does both": "2, 3, 3, 8",
}


def layout(name: str):
    """The node, its operand's labels (every element its own), and where each element of its result comes from."""
    shapes = {"Transpose": "2, 4, 3, 6", "Unsqueeze": "2, 3, 1, 4, 6", "Neg": "2, 3, 4, 6", "Slice": "2, 3, 4, 3"}
    shapes |= {"Slice from the end": "2, 3, 2, 6", "Split": "2, 3, 4, 3", "Gather of one": "2, 3, 6"}
    shapes |= {"Gather of some": "2, 3, 2, 6", "GatherND": "3, 4, 6", **RANKS}
    more = ", float[2, 3, 4, 3] z" if name == "Split" else ""
    program = network(f"one (float[2, 3, 4, 6] x) => (float[{shapes[name]}] y{more}) {{ {OPERATORS[name]} }}")
    node = next(node for node in program.model.graph if not is_operator(node, "Constant"))
    places = np.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    result = evaluate(program.model, {"x": places.astype(np.float32)})["y"]
    return node, places, np.abs(result).astype(np.int64)


@pytest.mark.parametrize("name", OPERATORS)
def test_labels_go_forward_as_numbers_do(name: str) -> None:
    node, places, expected = layout(name)
    found = dict(forward(node, places))[0]
    assert np.array_equal(np.broadcast_to(found, expected.shape), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_labels_go_back_to_where_numbers_came_from(name: str) -> None:
    node, places, taken = layout(name)
    found = backward(node, 0, taken, lambda some, others: None)
    expected = np.where(np.isin(places, taken), places, OUTSIDE)
    assert np.array_equal(np.broadcast_to(found, places.shape), expected)


def test_an_axis_that_is_not_static_may_lead_a_group() -> None:
    labels = np.arange(8).reshape(1, 4, 1, 2)
    joined = reshape(labels, ("batch", 4, "rows", 2), ("4*batch", "rows", 2))
    assert joined.shape == (4, 1, 2)
    assert np.array_equal(reshape(joined, ("4*batch", "rows", 2), ("batch", 4, "rows", 2)), labels)


def test_an_axis_that_is_not_static_may_not_stand_behind_labels() -> None:
    with pytest.raises(Blocked, match="not static"):
        reshape(np.arange(4).reshape(4, 1), (4, "batch"), ("4*batch",))
    with pytest.raises(Blocked, match="not static"):
        reshape(np.arange(4).reshape(4, 1), ("4*batch", 1), (4, "batch"))


def test_labels_that_repeat_are_tiled() -> None:
    assert reshape(np.array([[0, 1, 2]]), (2, 3), (6,)).tolist() == [0, 1, 2]
    assert spread(np.array([0, 1, 2]), 0, 6).tolist() == [0, 1, 2, 0, 1, 2]
    assert compress(np.array([[5, 5], [5, 5]])).tolist() == [[5]]


def test_two_accounts_of_one_value_are_tied_where_they_differ() -> None:
    ties: list[tuple[int, int]] = []

    def tie(some: np.ndarray, others: np.ndarray) -> None:
        ties.extend((int(a), int(b)) for a, b in zip(some, others) if a != b)

    found = combine(np.array([0, OUTSIDE, 2]), np.array([0, 1, 5]), tie)
    assert found.tolist() == [0, 1, 2]
    assert ties == [(2, 5)]


def test_one_number_for_channels_inside_and_outside_is_blocked() -> None:
    with pytest.raises(Blocked, match="inside and outside"):
        reduce(np.array([0, OUTSIDE]), 0, lambda some, others: None)


def test_a_broadcast_operand_ties_what_it_stands_for() -> None:
    ties: list[tuple[int, int]] = []
    found = pull(
        np.array([[0, 1], [2, 3]]),
        (2, 2),
        (1, 2),
        lambda some, others: ties.extend(zip(some.tolist(), others.tolist())),
    )
    assert found.tolist() == [[0, 1]]
    assert (2, 0) in ties
    assert (3, 1) in ties


def test_a_slice_of_no_channels_has_no_labels() -> None:
    program = network("""
    none (float[2, 6] x) => (float[2, 0] y)
    {
        s = Constant <value_ints = [6]> () e = Constant <value_ints = [9]> () a = Constant <value_ints = [1]> ()
        y = Slice (x, s, e, a)
    }""")
    node = next(node for node in program.model.graph if is_operator(node, "Slice"))
    ((_, labels),) = forward(node, np.arange(6).reshape(1, 6))
    assert labels.shape[1] == 0
