"""Random small networks, rewritten by every pass in order, compared with themselves in float64.

Networks are residual streams of blocks with random ornaments: biases or none, factors, flattened rows, parallel
branches, a tied head, and things that must be refused (a nonlinearity in the stream, an exposed hidden state, a norm
that writes). Whatever is applied or refused, the function stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from networks import difference, digest, feed, network, operators, values_agree

from rewrite.passes import PASSES
from rewrite.recipes import passes_of
from rewrite.rule import Applied, Refused, apply_pass

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


@settings(max_examples=60, deadline=None, derandomize=True)
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
