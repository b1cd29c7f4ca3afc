"""Random small networks, rewritten by every pass in order and by random passes, compared with themselves in float64.

For every pass in order, networks are residual streams of blocks with random ornaments: biases or none, factors,
flattened rows, parallel branches, a tied head, and things that must be refused (a nonlinearity in the stream, an
exposed hidden state, a norm that writes). Random passes get networks of all that the rule table knows
(`random_networks`). Whatever is applied or refused, the function stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from networks import difference, digest, feed, network, operators, rounding, values_agree
from random_networks import Drawn, drawn, fed, recipes

import rewrite
from rewrite.check.reference import values_of
from rewrite.ir.program import Program
from rewrite.passes import PASSES
from rewrite.recipes import passes_of
from rewrite.rule import Applied, Pass, Refused, apply_pass, steps

VOCABULARY = 9


@dataclass
class Text:
    """ONNX text under construction."""

    draw: st.DrawFn
    width: int
    weights: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    harmless: bool = True

    def name(self, stem: str) -> str:
        return f"{stem}{len(self.weights) + len(self.lines)}"

    def weight(self, *shape: int) -> str:
        name = self.name("w")
        self.weights.append(f"float[{', '.join(map(str, shape))}] {name}")
        return name

    def add(self, stem: str, call: str) -> str:
        name = self.name(stem)
        self.lines.append(f"{name} = {call}")
        return name

    def maybe(self) -> bool:
        return self.draw(st.booleans())

    def linear(self, x: str, size_in: int, size_out: int) -> str:
        y = self.add("p", f"MatMul ({x}, {self.weight(size_in, size_out)})")
        if self.maybe():
            operands = [y, self.weight(size_out)]
            y = self.add("b", f"Add ({', '.join(operands if self.maybe() else operands[::-1])})")
        return y

    def norm(self, x: str, kind: str) -> str:
        shift = f", {self.weight(self.width)}" if kind == "LayerNormalization" and self.maybe() else ""
        epsilon = self.draw(st.sampled_from(["0.00001", "0.01"]))
        return self.add("n", f"{kind} <epsilon = {epsilon}> ({x}, {self.weight(self.width)}{shift})")

    def branch(self, n: str) -> str:
        """Two linear maps with an activation between; perhaps over flattened rows, perhaps scaled at the end."""
        hidden = self.draw(st.integers(1, 6))
        flat = self.maybe()
        if flat:
            rows = self.add("s", f"Constant <value_ints = [-1, {self.width}]> ()")
            n = self.add("f", f"Reshape ({n}, {rows})")
        h = self.linear(n, self.width, hidden)
        h = self.add("a", f"{self.draw(st.sampled_from(['Tanh', 'Relu', 'Gelu']))} ({h})")
        y = self.linear(h, hidden, self.width)
        factor = self.draw(st.sampled_from(["none", "vector", "number", "quotient"]))
        if factor != "none":
            s = self.weight(self.width) if factor == "vector" else self.add("k", "Constant <value_float = 1.7> ()")
            y = self.add("m", f"{'Div' if factor == 'quotient' else 'Mul'} ({y}, {s})")
        if flat:
            shape = self.add("s", f"Constant <value_ints = [3, 5, {self.width}]> ()")
            y = self.add("u", f"Reshape ({y}, {shape})")
        return y


@st.composite
def networks(draw: st.DrawFn) -> tuple[str, str, bool]:
    """Text of a network, the kind of its norms, and whether nothing in it needs to be refused by center-residual."""
    text = Text(draw, draw(st.integers(2, 6)))
    kind = draw(st.sampled_from(["LayerNormalization", "LayerNormalization", "RMSNormalization"]))
    table = text.weight(VOCABULARY, text.width)
    x = text.add("x", f"Gather ({table}, ids)")
    if text.maybe():
        x = text.add("x", f"Add ({x}, {text.weight(5, text.width)})")
    blocks = draw(st.integers(1, 3))
    for _ in range(blocks):
        ornament = draw(st.sampled_from(["", "", "", "relu", "exposed", "norm writes", "sandwich"]))
        if ornament:
            text.harmless = False
        if ornament == "relu":
            x = text.add("r", f"Relu ({x})")
        if ornament == "exposed":
            x = text.add("h", f"Identity ({x})")
            text.outputs.append(x)
        if ornament == "norm writes":
            x = text.norm(x, kind)
        n = text.norm(x, kind)
        y = text.branch(n)
        if text.maybe():
            y = text.add("y", f"Add ({y}, {text.branch(n)})")
        if ornament == "sandwich":
            y = text.norm(y, kind)
        x = text.add("x", f"Add ({', '.join([x, y] if text.maybe() else [y, x])})")
    n = text.norm(x, kind)
    if text.maybe():
        head = text.add("t", f"Transpose <perm = [1, 0]> ({table})")
    else:
        head = text.weight(text.width, VOCABULARY)
    logits = text.add("l", f"MatMul ({n}, {head})")
    outputs = ", ".join(f"float[3, 5, {text.width}] {name}" for name in text.outputs)
    outputs = f"float[3, 5, {VOCABULARY}] {logits}" + (f", {outputs}" if outputs else "")
    body = "\n    ".join(text.lines)
    source = f"random (int64[3, 5] ids, {', '.join(text.weights)}) => ({outputs})\n{{\n    {body}\n}}"
    return source, kind, text.harmless


@settings(max_examples=40, deadline=None, derandomize=True)
@given(networks())
def test_the_function_stays(drawn: tuple[str, str, bool]) -> None:
    text, kind, harmless = drawn
    before = network(text, ("ids",))
    after = before.clone()
    inputs = feed(before)
    for rule in PASSES:
        untouched = digest(after)
        outcomes = apply_pass(after, rule())
        assert difference(before, after, inputs) <= 1.0, (rule.name, text)
        once = digest(after)
        if all(isinstance(outcome, Refused) for outcome in outcomes):
            assert once == untouched
        assert not any(isinstance(outcome, Applied) for outcome in apply_pass(after, rule())), (rule.name, text)
        assert digest(after) == once
    values_agree(before, after, inputs)
    if harmless and kind == "LayerNormalization":
        assert "LayerNormalization" not in operators(after), text
    if kind == "RMSNormalization":
        centred = [record for record in after.records if record.pass_name == "center-residual"]
        assert not any(isinstance(record, Applied) for record in centred)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(networks())
def test_the_default_recipe_has_nothing_left_to_do(drawn: tuple[str, str, bool]) -> None:
    program = network(drawn[0], ("ids",))
    for rule in passes_of(None, None):
        apply_pass(program, rule)
    once = digest(program)
    for rule in passes_of(None, None):
        assert not any(isinstance(outcome, Applied) for outcome in apply_pass(program, rule)), (rule.name, drawn[0])
    assert digest(program) == once


# ------------------------------------------------------------------------------------------ random passes in any order

QUIET = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
"""What is drawn is small as it is; to shrink it further takes minutes."""


def check(given: Drawn, passes: Sequence[Pass[Any]]) -> None:
    """Each pass leaves the function, with constants that are not rounded; what `apply` returns is proved."""
    before = given.program()
    after, inputs = before.clone(), fed(before)
    for rule in passes:
        apply_pass(after, rule)
        assert difference(before, after, inputs) <= 1.0, (passes, rule.name, given.text)
    related(before, after, inputs)
    untouched = digest(before)
    result = rewrite.apply(before, passes)
    assert digest(before) == untouched
    assert result.certificate.verdict.kind in ("BITWISE", "EQUAL"), (passes, given.text)
    assert difference(before, result.program, inputs) <= 1.0, (passes, given.text)
    for outcome in result.outcomes:
        if isinstance(outcome, Refused):
            assert outcome.refusal.requirement
            assert outcome.refusal.reason


def related(before: Program, after: Program, inputs: dict[str, np.ndarray]) -> None:
    """Every value that keeps its name is related as recorded, up to rounding of the largest number on the way."""
    expected = {name: value for name, value in values_of(before.model, inputs) if value.dtype.kind == "f"}
    largest = max(float(np.abs(value).max(initial=0.0)) for value in expected.values())
    for name, found in values_of(after.model, inputs, unrounded=True):
        if (value := expected.get(name)) is None:
            continue
        for step in steps(after.relations.get(name)):
            if step["transform"] == "centre":
                value = value - value.mean(axis=step["axis"], keepdims=True)
            else:
                value = after.transforms[step["transform"]].apply(value, step["axis"])
        assert value.shape == found.shape, name
        allowed = rounding(before, inputs) * max(largest, float(np.abs(value).max(initial=0.0)))
        assert np.abs(value - found).max(initial=0.0) <= allowed, (name, after.relations.get(name))


@settings(QUIET, max_examples=40, derandomize=True)
@given(drawn(), recipes())
def test_random_passes_in_any_order_leave_the_function_and_are_proved_or_refused(
    given: Drawn, passes: list[Pass[Any]]
) -> None:
    check(given, passes)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(100))
def test_thousands_of_random_passes_leave_the_function(batch: int) -> None:
    seed(batch)(settings(QUIET, max_examples=30)(given(drawn(), recipes())(check)))()
