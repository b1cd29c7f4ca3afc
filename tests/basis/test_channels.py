"""Forms of channels: what they say holds for every input, and proportions are exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import feed, network

from rewrite.basis.channels import forms, grow_selected, proportional
from rewrite.check.reference import values_of
from rewrite.ir.weights import Constant

OPERATORS = (
    *("Relu ({})", "LeakyRelu <alpha = 0.3> ({})", "Gelu ({})", "Tanh ({})", "Sigmoid ({})", "Neg ({})", "Abs ({})"),
    *("Mul ({0}, {0})", "Add ({0}, {0})", "Sub ({0}, {0})", "Mul ({}, two)", "Div ({}, two)", "Add ({}, two)"),
    *("Sub (two, {})", "Div (two, {})", "Add ({}, b)", "Mul ({}, b)", "Sub (b, {})", "Mul ({}, other)"),
    *("PRelu ({}, b)", "Softplus ({})", "Exp ({})", "Max ({}, two)", "Mul ({}, row)", "Add (other, {})"),
)


@st.composite
def networks(draw: st.DrawFn) -> tuple[str, np.ndarray, np.ndarray]:
    """A chain of operators over two layers whose channels are zeros, copies and multiples of one another."""
    lines, last = [], "h"
    for index in range(draw(st.integers(1, 5))):
        lines.append(f"v{index} = {draw(st.sampled_from(OPERATORS)).format(last)}")
        last = f"v{index}"
    proportion = st.sampled_from([0.0, 1.0, 2.0, -1.0, -3.0, 0.25])
    w = np.random.default_rng(draw(st.integers(0, 9))).integers(-9, 9, (3, 8)) / 4.0
    for channel in range(1, 8):
        if draw(st.booleans()):
            w[:, channel] = draw(proportion) * w[:, draw(st.integers(0, channel - 1))]
    b = np.array([draw(st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0])) for _ in range(8)])
    text = f"""
    chain (float[4, 3] x, float[3, 8] w, float[3, 8] v, float[8] b, float[3, 1] r, float[8, 2] o) => (float[4, 2] y)
    {{
        two = Constant <value_float = 2.0> ()
        row = MatMul (x, r)
        h = MatMul (x, w)
        other = MatMul (x, v)
        {" ".join(lines)}
        y = MatMul ({last}, o)
    }}"""
    return text, w, b


@settings(max_examples=150, deadline=None, derandomize=True)
@given(networks())
def test_channels_are_what_their_forms_say(drawn: tuple[str, np.ndarray, np.ndarray]) -> None:
    text, w, b = drawn
    program = network(text, w=w, v=w[:, ::-1].copy(), b=b)
    product = [node for node in program.model.graph if node.op_type == "MatMul"][-1]
    read = product.inputs[0]
    assert read is not None
    region = grow_selected(read, 1)
    found = {value.name: each for value, each in forms(region).items()}
    for name, array in values_of(program.model, feed(program)):
        if name not in found or not np.isfinite(array).all():
            continue
        scale = max(np.abs(array).max(), 1.0)
        for channel, form in enumerate(found[name]):
            if form.constant is not None:
                assert np.abs(array[:, channel] - form.constant).max() <= 1e-12 * scale, (name, text)
                continue
            for other in range(channel):
                if found[name][other].key == form.key:
                    ratio = float(form.factor / found[name][other].factor)
                    error = np.abs(array[:, channel] - ratio * array[:, other]).max()
                    assert error <= 1e-12 * scale * max(abs(ratio), 1.0), (name, text)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_proportional_channels_are_found_along_any_axis(axis: int) -> None:
    array = np.random.default_rng(0).integers(1, 9, (5, 6, 7)).astype(np.float64)
    channels = np.moveaxis(array, axis, -1)
    channels[..., 3] = -2.5 * channels[..., 1]
    channels[..., 4] = 0.0
    groups = [group for group, _ in proportional(Constant(array), axis)]
    assert groups[1] == groups[3] >= 0
    assert groups[4] == -1
    assert proportional(Constant(array), axis)[4][1] == 0.0


def test_channels_whose_quotients_round_alike_are_told_apart() -> None:
    third = np.array([3.0, 1.0, 1.0])
    near = np.array([9.0, 3.0, np.nextafter(3.0, 4.0)])
    assert [group for group, _ in proportional(Constant(np.stack([third, near], 1)), 1)] == [-1, -1]
    assert [group for group, _ in proportional(Constant(np.stack([third, 3 * third], 1)), 1)] == [0, 0]


def test_numbers_that_are_not_finite_are_no_constants() -> None:
    array = np.array([[np.inf, 1.0, -np.inf], [1.0, 1.0, 1.0]])
    assert [group for group, _ in proportional(Constant(array), 1)] == [-1, -1, -1]
