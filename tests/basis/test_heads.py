"""Regions of heads: what is tied, what is on which side, and what cannot be followed."""

from __future__ import annotations

import numpy as np
from head_networks import NETWORKS, PAIRS, PLAIN, attention, program

from rewrite.basis.heads import HeadRegion, grow_heads
from rewrite.ir.edit import is_operator
from rewrite.ir.program import Program


def grown(text: str, operand: int, heads: int, *, mixing: bool) -> tuple[Program, HeadRegion]:
    made = program(text)
    node = next(node for node in made.model.graph if is_operator(node, "Attention"))
    seed = node.inputs[operand]
    assert seed is not None
    return made, grow_heads(seed, np.arange(heads * 4).reshape(1, heads, 1, 4), 4, mixing=mixing)


def constants(region: HeadRegion) -> dict[str, np.ndarray]:
    return {str(node.inputs[place].name): labels for (node, place), labels in region.constants.items()}  # type: ignore[union-attr]


def test_values_are_written_on_the_left_and_read_on_the_right() -> None:
    _, region = grown(attention(), 2, 2, mixing=True)
    assert not region.obstructions
    found = constants(region)
    assert set(found) == {"wv", "bv", "wo"}
    assert found["wv"].tolist() == [list(range(8))]
    assert (found["wo"][:, 0] - region.channels).reshape(4, 4).tolist() == [
        *([0, 1, 2, 3], [0, 1, 2, 3]),
        *([4, 5, 6, 7], [4, 5, 6, 7]),
    ]


def test_a_fused_matrix_holds_both_sides_of_logits_and_nothing_of_values() -> None:
    _, region = grown(NETWORKS["one matrix, head by head"], 0, 4, mixing=False)
    assert not region.obstructions
    labels = constants(region)["w"].reshape(4, 3, 4)
    assert (labels[:, 0] // region.channels == 0).all()
    assert (labels[:, 1] // region.channels == 1).all()
    assert (labels[:, 2] == -1).all()


def test_query_heads_of_a_group_are_tied_through_their_key_head() -> None:
    _, region = grown(attention(rotary=PLAIN), 0, 4, mixing=False)
    first = region.partner.reshape(4, 4)
    assert np.array_equal(first[0], first[1])
    assert np.array_equal(first[2], first[3])
    assert not set(first[0]) & set(first[2])


def test_rotary_positions_tie_pairs_and_stop_what_mixes() -> None:
    _, region = grown(attention(rotary=PAIRS), 0, 4, mixing=False)
    assert not region.obstructions
    assert region.partner[:4].tolist() == [0, 0, 2, 2]
    _, mixing = grown(attention(rotary=PAIRS), 0, 4, mixing=True)
    assert mixing.obstructions


def test_heads_that_share_a_map_are_tied_channel_by_channel() -> None:
    _, region = grown(attention(), 2, 2, mixing=True)
    region.share()
    assert region.partner.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    found = constants(region)["wo"]
    lies = region.lies(found, (16, 8))
    assert lies is not None
    assert lies[0] == 0
    assert region.blocks(lies[1] - region.channels) == [(0, 4)] * 4
