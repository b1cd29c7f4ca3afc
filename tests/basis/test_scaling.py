"""A diagonal through grouped kernels and gates: identities, and what does not let it pass."""

from __future__ import annotations

import numpy as np
import pytest
from networks import network

from rewrite.basis.regions import Use
from rewrite.basis.scaling import channel_maxima, factor_of, grow_scaled, part_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Constant
from rewrite.proof.transforms import Scaling

RANDOM = np.random.default_rng(0)


def value_named(program: Program, name: str):
    return next(value for node in program.model.graph for value in (*node.inputs, *node.outputs) if value.name == name)


@pytest.mark.parametrize(("groups", "channels", "made"), [(1, 6, 4), (2, 6, 4), (3, 6, 9), (6, 6, 12)])
def test_a_grouped_kernel_absorbs_a_diagonal_of_its_input(groups: int, channels: int, made: int) -> None:
    program = network(f"""
    conv (float[2, {channels}, 5] x, float[{made}, {channels // groups}, 3] k) => (float[2, {made}, 5] y)
    {{ y = Conv <kernel_shape = [3], pads = [1, 1], group = {groups}> (x, k) }}""")
    (node,) = program.model.graph
    factor = factor_of(Use(node, 0, 1))
    assert factor is not None
    scaling = Scaling(RANDOM.uniform(0.5, 2.0, channels))
    (use,) = factor.constants
    kernel, scaled = factor.behind(use, Scaling(np.ones(channels))).numpy(), factor.behind(use, scaling).numpy()
    each = made // groups
    for out in range(made):
        for inside in range(channels // groups):
            channel = out // each * (channels // groups) + inside
            assert np.allclose(scaled[out, inside], kernel[out, inside] * scaling.values[channel], rtol=1e-15)
    largest = factor.maxima(channels)
    found = np.zeros(channels)
    for out in range(made):
        for inside in range(channels // groups):
            channel = out // each * (channels // groups) + inside
            found[channel] = max(found[channel], np.abs(kernel[out, inside]).max())
    assert np.array_equal(largest, found)


def test_a_transposed_convolution_has_its_input_on_the_first_axis() -> None:
    program = network("""
    conv (float[2, 6, 5] x, float[6, 2, 3] k) => (float[2, 4, 7] y)
    { y = ConvTranspose <kernel_shape = [3], group = 2> (x, k) }""")
    (node,) = program.model.graph
    factor = factor_of(Use(node, 0, 1))
    assert factor is not None
    assert [use.axis for use in factor.constants] == [0]


def test_largest_weights_are_read_by_blocks() -> None:
    array = RANDOM.normal(size=(7, 5, 3))
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        assert np.array_equal(channel_maxima(Constant(array), axis), np.abs(array).max(others))


def test_a_gate_passes_one_factor() -> None:
    program = network("""
    gate (float[2, 5] x, float[5, 6] w, float[5, 6] v, float[6, 4] d) => (float[2, 4] y)
    { g = MatMul (x, w) a = Gelu (g) u = MatMul (x, v) m = Mul (a, u) y = MatMul (m, d) }""")
    region = grow_scaled(value_named(program, "m"), 1)
    assert not region.obstructions
    assert {value.name for value in region.axes} == {"m", "u"}
    assert {use.value.name for use in region.constants} == {"v"}


@pytest.mark.parametrize("product", ["m = Mul (u, u)", "a = Relu (u) m = Mul (a, u)", "m = Mul (a, b)"])
def test_a_product_of_two_values_of_the_region_does_not(product: str) -> None:
    inside = product if "Mul (a, b)" not in product else f"a = Relu (u) b = Neg (u) {product}"
    program = network(f"""
    gate (float[2, 5] x, float[5, 6] v, float[6, 4] d) => (float[2, 4] y)
    {{ u = MatMul (x, v) {inside} y = MatMul (m, d) }}""")
    assert grow_scaled(value_named(program, "m"), 1).obstructions


def test_products_that_share_their_factors_do_not_ask_each_other_for_ever() -> None:
    program = network("""
    rotary (float[2, 5] x, float[5, 6] p, float[5, 6] r, float[5, 6] w, float[6, 4] d)
        => (float[2, 4] y, float[2, 4] z)
    {
        c = MatMul (x, p) s = MatMul (x, r) q = MatMul (x, w) k = Neg (q)
        qc = Mul (c, q) qs = Mul (s, k) kc = Mul (c, k) ks = Mul (s, q)
        a = Add (qc, qs) b = Add (kc, ks) y = MatMul (a, d) z = MatMul (b, d)
    }""")
    region = grow_scaled(value_named(program, "a"), 1)
    assert not region.obstructions
    assert {use.value.name for use in region.constants} == {"w"}


def test_a_part_of_a_wider_value_is_found_with_its_place() -> None:
    program = network("""
    part (float[2, 5] x, float[5, 10] w, float[6, 4] d) => (float[2, 4] y, float[2, 4] z)
    {
        h = MatMul (x, w) sizes = Constant <value_ints = [4, 6]> () g, u = Split <axis = 1> (h, sizes)
        z = Tanh (g) y = MatMul (u, d)
    }""")
    region = grow_scaled(value_named(program, "u"), 1)
    part = part_of(region)
    assert part is not None
    assert part.offset == 4
    assert not region.obstructions
    assert part.widened(np.full(6, 2.0)).tolist() == [1.0] * 4 + [2.0] * 6
    assert part_of(region) is None
