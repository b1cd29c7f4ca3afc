"""Random chains of what clusters are made of, between random affine operators: the function stays, a second run rests.

What is drawn is followed as arrays of shapes only; many a chain cannot be folded, or only in part, or has a value that
something else reads. What matters is that nothing wrong comes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diagonal_checks import proof_of
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import difference, digest, feed, network

from rewrite.passes import FoldBatchnorm
from rewrite.rule import Applied, apply_pass

CHANNELS = 4
START = (2, CHANNELS, 3, 2)


@dataclass
class Chain:
    """ONNX text that is being drawn: lines, weights with their shapes, values that can still be read."""

    draw: st.DrawFn
    lines: list[str] = field(default_factory=list)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    planted: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def weight(self, *shape: int, positive: bool = False) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = shape
        generator = np.random.default_rng(len(self.weights))
        signs = 1.0 if positive else generator.choice([-1.0, 1.0], shape)
        self.planted[name] = signs * generator.uniform(0.5, 2.0, shape)
        if not positive and self.one_of(*[False] * 9, True):
            self.planted[name].flat[0] = 0.0
        return name

    def add(self, call: str, shape: tuple[int, ...]) -> str:
        name = f"v{len(self.shapes)}"
        self.lines.append(f"{name} = {call}")
        self.shapes[name] = shape
        return name

    def numbers(self, *values: int) -> str:
        name = f"n{len(self.lines)}"
        self.lines.append(f"{name} = Constant <value_ints = [{', '.join(map(str, values))}]> ()")
        return name

    # ----------------------------------------------------------------------------------------------- parts of clusters

    def step(self, value: str) -> str:
        kind = self.one_of("norm", "norm", "vector", "number", "turn", "reshape", "negate", "branches", "moved")
        return getattr(self, kind)(value)

    def norm(self, value: str) -> str:
        shape = self.shapes[value]
        vectors = [self.weight(shape[1]) for _ in range(3)]
        return self.add(
            f"BatchNormalization ({', '.join([value, *vectors, self.weight(shape[1], positive=True)])})", shape
        )

    def vector(self, value: str) -> str:
        shape = self.shapes[value]
        axis = self.draw(st.integers(0, len(shape) - 1))
        vector = self.weight(shape[axis], *[1] * (len(shape) - 1 - axis), positive=self.one_of(True, False))
        operator = self.one_of("Mul", "Div", "Add", "Sub")
        if operator == "Div":
            self.planted[vector] = np.abs(self.planted[vector]) + 0.5
        swapped = operator != "Div" and self.one_of(False, True)
        operands = (vector, value) if swapped else (value, vector)
        return self.add(f"{operator} ({', '.join(operands)})", shape)

    def number(self, value: str) -> str:
        number = self.weight(1)
        return self.add(f"{self.one_of('Mul', 'Add', 'Sub')} ({value}, {number})", self.shapes[value])

    def negate(self, value: str) -> str:
        return self.add(f"Neg ({value})", self.shapes[value])

    def turn(self, value: str) -> str:
        shape = self.shapes[value]
        axes = self.draw(st.permutations(range(len(shape))))
        return self.add(f"Transpose <perm = {list(axes)}> ({value})", tuple(shape[axis] for axis in axes))

    def reshape(self, value: str) -> str:
        shape = self.shapes[value]
        wanted = [START, (2, CHANNELS, 6), (2 * CHANNELS, 6), (2, 6, CHANNELS), (6, CHANNELS, 2), (2, CHANNELS * 6)]
        if len(shape) == 3 and shape[-1] == CHANNELS:
            wanted += [(int(np.prod(shape[:2])), CHANNELS)] * 4
        fitting = [other for other in wanted if np.prod(other) == np.prod(shape)]
        if not fitting:
            return value
        other = self.one_of(*fitting)
        return self.add(f"Reshape ({value}, {self.numbers(*other)})", other)

    def moved(self, value: str) -> str:
        shape = self.shapes[value]
        if len(shape) == 4 and self.one_of(True, False):
            options = self.one_of("", ", count_include_pad = 1")
            pool = f"AveragePool <kernel_shape = [2, 2], pads = [0, 0, 1, 1]{options}> ({value})"
            return self.add(pool, shape)
        return self.add(f"Identity ({value})", shape)

    def branches(self, value: str) -> str:
        """The sum of two branches of one value, of which one may be the value itself."""
        left = self.same_shape(value)
        right = self.one_of(value, self.same_shape(value))
        operands = self.one_of((left, right), (right, left))
        return self.add(f"{self.one_of('Add', 'Sub')} ({', '.join(operands)})", self.shapes[value])

    def same_shape(self, value: str) -> str:
        kind = self.one_of("norm", "vector", "number", "negate", "around")
        if kind != "around":
            return getattr(self, kind)(value)
        shape = self.shapes[value]
        axes = self.draw(st.permutations(range(len(shape))))
        turned = self.add(f"Transpose <perm = {list(axes)}> ({value})", tuple(shape[axis] for axis in axes))
        normed = self.norm(turned)
        return self.add(
            f"Transpose <perm = {[list(axes).index(axis) for axis in range(len(shape))]}> ({normed})", shape
        )

    # --------------------------------------------------------------------------------------------- affine operators

    def affine(self, value: str) -> str:
        shape = self.shapes[value]
        kinds = ["matrix", "left"] + (["kernel", "kernel", "transposed"] if len(shape) > 2 else [])
        return getattr(self, self.one_of(*kinds))(value)

    def matrix(self, value: str) -> str:
        shape = self.shapes[value]
        product = self.add(f"MatMul ({value}, {self.weight(shape[-1], CHANNELS)})", (*shape[:-1], CHANNELS))
        return (
            self.add(f"Add ({product}, {self.weight(CHANNELS)})", self.shapes[product])
            if self.one_of(0, 1)
            else product
        )

    def left(self, value: str) -> str:
        shape = self.shapes[value]
        return self.add(f"MatMul ({self.weight(CHANNELS, shape[-2])}, {value})", (*shape[:-2], CHANNELS, shape[-1]))

    def kernel(self, value: str, operator: str = "Conv") -> str:
        batch, channels, *image = self.shapes[value]
        groups = self.one_of(
            *[count for count in (1, 1, 2, channels) if channels % count == 0 and CHANNELS % count == 0]
        )
        size, pads = self.one_of((1, 0), (3, 1), (2, 0)) if operator == "Conv" else self.one_of((1, 0), (2, 0))
        made = [side + (2 * pads + 1 - size if operator == "Conv" else size - 1) for side in image]
        if min(made) < 1:
            size, pads, made = 1, 0, image
        inner = (CHANNELS, channels // groups) if operator == "Conv" else (channels, CHANNELS // groups)
        operands = [value, self.weight(*inner, *[size] * len(image))]
        if self.one_of(False, True):
            operands.append(self.weight(CHANNELS))
        options = f"kernel_shape = {[size] * len(image)}, pads = {[pads] * (2 * len(image))}, group = {groups}"
        return self.add(f"{operator} <{options}> ({', '.join(operands)})", (batch, CHANNELS, *made))

    def transposed(self, value: str) -> str:
        return self.kernel(value, "ConvTranspose")

    def activation(self, value: str) -> str:
        return self.add(f"{self.one_of('Relu', 'Tanh', 'Sigmoid')} ({value})", self.shapes[value])


@st.composite
def chains(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A network as text with its weights: affine operators and activations, and between them parts of clusters."""
    chain = Chain(draw)
    chain.shapes["x"] = START
    value = "x"
    outputs: set[str] = set()
    for _ in range(draw(st.integers(1, 3))):
        for part in draw(st.lists(st.sampled_from(["affine", "activation"]), min_size=1, max_size=2)):
            value = getattr(chain, part)(value)
        for _ in range(draw(st.integers(1, 4))):
            value = chain.step(value)
            if chain.one_of(*[False] * 11, True):
                outputs.add(chain.activation(value) if chain.one_of(True, False) else value)
    if draw(st.booleans()):
        value = chain.affine(value)
    outputs.add(value)
    types = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in chain.weights.items())
    given = f"float[{', '.join(map(str, START))}] x" + (f", {types}" if types else "")
    made = ", ".join(f"float[{', '.join(map(str, chain.shapes[name]))}] {name}" for name in sorted(outputs - {"x"}))
    body = "\n    ".join(chain.lines)
    return f"chain ({given}) => ({made})\n{{\n    {body}\n}}", chain.planted


def check(text: str, planted: dict[str, Any]) -> tuple[int, bool]:
    """The function stays, a second run changes nothing; how often the pass applied, and whether it is proved."""
    before = network(text, **planted)
    after = before.clone()
    applied = sum(isinstance(outcome, Applied) for outcome in apply_pass(after, FoldBatchnorm()))
    assert difference(before, after, feed(before)) <= 1.0, text
    once = digest(after)
    assert not any(isinstance(outcome, Applied) for outcome in apply_pass(after, FoldBatchnorm())), text
    assert digest(after) == once, text
    # What is left is a site with a reason.
    spoken_of = {node for site in FoldBatchnorm().sites(after) for node in site.nodes}
    left = [node for node in after.model.graph if node.op_type == "BatchNormalization"]
    assert all(node in spoken_of for node in left), text
    if not applied:
        assert digest(after) == digest(before), text
    proof = proof_of(before, after).verdict
    assert proof.kind != "REFUTED", text
    return applied, proof.holds


@settings(max_examples=25, deadline=None, derandomize=True)
@given(chains())
def test_the_function_stays(drawn: tuple[str, dict[str, Any]]) -> None:
    check(*drawn)
