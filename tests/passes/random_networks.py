"""Random small networks of the operators in the rule table, and random passes over them.

Two kinds: streams of tokens (norms of both kinds, plain and gated MLPs, experts, attention with shared heads, rotary
positions, fused projections, tied heads) and images (convolutions, depthwise and grouped, batch norms, pools). Some of
what is drawn must be refused: what matters is that nothing wrong comes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from networks import network

from rewrite.ir.program import Program
from rewrite.passes import (
    PASSES,
    AffineHeads,
    CenterResidual,
    EliminateDeadChannels,
    Equalize,
    FoldBatchnorm,
    FoldNorm,
    MergeAffine,
    MergeBranches,
    MergeDuplicateChannels,
    ReparameterizeNormScale,
    RotateHeads,
    RotateOnline,
    RotateResidual,
    ScaleHeads,
    ScaleQueryKey,
    Smooth,
    StabilizeNorm,
)
from rewrite.rule import Pass

VOCABULARY = 9
SIZES = {"B": 3, "S": 5}
"""What symbolic dimensions are when a network is evaluated."""


@dataclass(frozen=True)
class Drawn:
    """A network as ONNX text, the names of its inputs, and weights that are not just random."""

    text: str
    inputs: tuple[str, ...]
    weights: dict[str, Any]

    def program(self) -> Program:
        """The network with its weights."""
        return network(self.text, self.inputs, **self.weights)


def fed(program: Program, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs, whose symbolic dimensions agree."""
    generator, made = np.random.default_rng(seed), {}
    for given in program.inputs:
        shape = [size if isinstance(size, int) else SIZES[size] for size in given.shape]
        floats = given.dtype.is_floating_point()
        made[given.name] = (
            generator.normal(size=shape).astype(np.float32) if floats else generator.integers(0, VOCABULARY, shape)
        )
    return made


@dataclass
class Text:
    """ONNX text under construction."""

    draw: st.DrawFn
    rows: str
    inputs: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    planted: dict[str, np.ndarray] = field(default_factory=dict)
    width: int = 4

    def maybe(self) -> bool:
        return self.draw(st.booleans())

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(f"float[{', '.join(map(str, shape))}] {name}")
        return name

    def given(self, kind: str) -> str:
        name = f"in{len(self.inputs)}"
        self.inputs.append(f"{kind} {name}")
        return name

    def add(self, call: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {call}")
        return name

    def several(self, count: int, call: str) -> list[str]:
        names = [f"v{len(self.lines)}_{i}" for i in range(count)]
        self.lines.append(f"{', '.join(names)} = {call}")
        return names

    def numbers(self, *values: int) -> str:
        return self.add(f"Constant <value_ints = [{', '.join(map(str, values))}]> ()")

    def linear(self, x: str, size_in: int, size_out: int, *, plain: bool = False) -> str:
        matrix = self.weight(size_in, size_out)
        if self.one_of(False, False, True):
            self.plant(matrix, (size_in, size_out))
        if not plain and self.one_of(False, False, False, True):
            turned = self.weight(size_out, size_in)
            matrix = self.add(f"Transpose <perm = [1, 0]> ({turned})")
        y = self.add(f"MatMul ({x}, {matrix})")
        if self.maybe():
            operands = [y, self.weight(size_out)]
            y = self.add(f"Add ({', '.join(operands if self.maybe() else operands[::-1])})")
        return y

    def plant(self, name: str, shape: tuple[int, ...], axis: int = -1) -> None:
        """Dead channels, and channels in a proportion; numbers are short, so that no proportion is rounded."""
        array = np.random.default_rng(len(self.weights)).integers(-999, 999, shape) / 256.0
        channels = np.moveaxis(array, axis, -1)
        if channels.shape[-1] > 2:
            channels[..., 0] = 0.0
            channels[..., 2] = self.one_of(1.0, 2.0, -1.0) * channels[..., 1]
        self.planted[name] = array

    def activation(self, h: str) -> str:
        kind = self.one_of("Relu", "Gelu", "Tanh", "silu", "LeakyRelu <alpha = 0.2>", "clip")
        if kind == "silu":
            return self.add(f"Mul ({h}, {self.add(f'Sigmoid ({h})')})")
        if kind == "clip":
            low = self.add("Constant <value_float = 0.0> ()")
            return self.add(f"Clip ({h}, {low}, {self.add('Constant <value_float = 6.0> ()')})")
        return self.add(f"{kind} ({h})")

    def norm(self, x: str, kind: str, size: int | None = None) -> str:
        size = self.width if size is None else size
        shift = f", {self.weight(size)}" if kind == "LayerNormalization" and self.maybe() else ""
        gamma = self.weight(size)
        if self.one_of(False, False, True):
            self.planted[gamma] = np.full(size, 1.5)
        return self.add(f"{kind} <epsilon = {self.one_of('0.00001', '0.01')}> ({x}, {gamma}{shift})")

    # ------------------------------------------------------------------------------------------------------ branches

    def mlp(self, n: str) -> str:
        hidden = self.draw(st.integers(2, 8))
        flat = self.rows == "3, 5" and self.one_of(False, False, True)
        if flat:
            n = self.add(f"Reshape ({n}, {self.numbers(-1, self.width)})")
        h = self.activation(self.linear(n, self.width, hidden))
        y = self.linear(h, hidden, self.width)
        return self.add(f"Reshape ({y}, {self.numbers(3, 5, self.width)})") if flat else y

    def gated(self, n: str) -> str:
        hidden = self.draw(st.integers(2, 8))
        if self.maybe():
            both = self.linear(n, self.width, 2 * hidden)
            g, u = self.several(2, f"Split <axis = -1> ({both}, {self.numbers(hidden, hidden)})")
        else:
            g, u = self.linear(n, self.width, hidden), self.linear(n, self.width, hidden)
        a = self.activation(g)
        m = self.add(f"Mul ({', '.join([a, u] if self.maybe() else [u, a])})")
        return self.linear(m, hidden, self.width)

    def experts(self, n: str) -> str:
        votes = self.add(f"Softmax <axis = -1> ({self.linear(n, self.width, 2)})")
        shares = self.several(2, f"Split <axis = -1, num_outputs = 2> ({votes})")
        made = [self.add(f"Mul ({self.mlp(n)}, {share})") for share in shares]
        return self.add(f"Add ({', '.join(made)})")

    def rotary(self) -> Callable[[str, int], str]:
        """Rotary positions for queries and keys of 4 channels a head (and how many heads)."""
        kind = self.one_of("none", "half", "pairs", "operator", "partial")
        if kind == "none":
            return lambda x, heads: x
        if kind == "operator":
            cos, sin = (self.given(f"float[{self.rows}, 2]") for _ in range(2))
            interleaved = self.one_of(0, 1)
            return lambda x, heads: self.add(f"RotaryEmbedding <interleaved = {interleaved}> ({x}, {cos}, {sin})")
        sequence = self.rows.split(", ")[1]
        angles = self.given(f"float[1, 1, {sequence}, {1 if kind == 'partial' else 2}]")
        last, zero, one, two, three = (self.numbers(i) for i in (-1, 0, 1, 2, 3))
        end = self.numbers(4)
        if kind == "pairs":
            before = self.numbers(0, 0, 0, 4)
            more = self.add(f"Unsqueeze ({angles}, {last})")
            twice = self.add(f"Reshape ({self.add(f'Concat <axis = -1> ({more}, {more})')}, {before})")
        else:
            twice = self.add(f"Concat <axis = -1> ({angles}, {angles})")
        cos, sin = self.add(f"Cos ({twice})"), self.add(f"Sin ({twice})")

        def turned(x: str, heads: int) -> str:
            whole, kept = x, ""
            if kind == "partial":
                whole = self.add(f"Slice ({x}, {zero}, {two}, {three})")
                kept = self.add(f"Slice ({x}, {two}, {end}, {three})")
            if kind == "pairs":
                a = self.add(f"Slice ({whole}, {zero}, {end}, {three}, {two})")
                b = self.add(f"Slice ({whole}, {one}, {end}, {three}, {two})")
                n = self.add(f"Unsqueeze ({self.add(f'Neg ({b})')}, {last})")
                a = self.add(f"Unsqueeze ({a}, {last})")
                t = self.add(f"Reshape ({self.add(f'Concat <axis = -1> ({n}, {a})')}, {self.numbers(0, 0, 0, 4)})")
            else:
                half, stop = (one, two) if kind == "partial" else (two, end)
                a = self.add(f"Slice ({whole}, {zero}, {half}, {three})")
                b = self.add(f"Slice ({whole}, {half}, {stop}, {three})")
                t = self.add(f"Concat <axis = -1> ({self.add(f'Neg ({b})')}, {a})")
            c, s = self.add(f"Mul ({whole}, {cos})"), self.add(f"Mul ({t}, {sin})")
            r = self.add(f"Add ({c}, {s})")
            return self.add(f"Concat <axis = -1> ({r}, {kept})") if kept else r

        return turned

    def attention(self, n: str) -> str:
        groups, shared, channels = self.one_of(1, 2), self.one_of(1, 2), 4
        heads = groups * shared
        sizes = (heads * channels, groups * channels, groups * channels)
        if self.one_of(False, False, True):
            joint = self.linear(n, self.width, sum(sizes))
            parts = self.several(3, f"Split <axis = 2> ({joint}, {self.numbers(*sizes)})")
        else:
            parts = [self.linear(n, self.width, size) for size in sizes]
        q, k, v = (
            self.add(f"Reshape ({part}, {self.numbers(0, 0, size // channels, channels)})")
            for part, size in zip(parts, sizes)
        )
        normed = self.one_of("", "", "", "queries and keys", "values")
        if normed == "queries and keys":
            q, k = self.norm(q, "RMSNormalization", channels), self.norm(k, "RMSNormalization", channels)
        if normed == "values":
            v = self.norm(v, "RMSNormalization", channels)
        q, k, v = (self.add(f"Transpose <perm = [0, 2, 1, 3]> ({x})") for x in (q, k, v))
        turned = self.rotary()
        q, k = turned(q, heads), turned(k, groups)
        if shared == 1 and self.maybe():
            flipped = self.add(f"Transpose <perm = [0, 1, 3, 2]> ({k})")
            logits = self.add(f"MatMul ({q}, {flipped})")
            if self.maybe():
                logits = self.add(f"Mul ({logits}, {self.add('Constant <value_float = 0.5> ()')})")
            o = self.add(f"MatMul ({self.add(f'Softmax <axis = -1> ({logits})')}, {v})")
        else:
            o = self.add(f"Attention{self.one_of('', ' <scale = 0.3>', ' <is_causal = 1>')} ({q}, {k}, {v})")
        o = self.add(f"Transpose <perm = [0, 2, 1, 3]> ({o})")
        o = self.add(f"Reshape ({o}, {self.numbers(0, 0, sizes[0])})")
        if self.one_of(False, False, False, True):
            gate = self.add(f"Sigmoid ({self.linear(n, self.width, sizes[0])})")
            o = self.add(f"Mul ({o}, {gate})")
        return self.linear(o, sizes[0], self.width)

    def branch(self, n: str) -> str:
        y = self.one_of(self.mlp, self.gated, self.attention, self.attention, self.experts)(n)
        factor = self.one_of("", "", "vector", "number", "quotient")
        if factor:
            s = self.weight(self.width) if factor == "vector" else self.add("Constant <value_float = 1.7> ()")
            y = self.add(f"{'Div' if factor == 'quotient' else 'Mul'} ({y}, {s})")
        return y

    def finished(self, outputs: str) -> Drawn:
        body = "\n    ".join(self.lines)
        declared = ", ".join([*self.inputs, *self.weights])
        names = tuple(each.split()[-1] for each in self.inputs)
        weights = {
            name: array for name, array in self.planted.items() if any(w.endswith(f" {name}") for w in self.weights)
        }
        return Drawn(f"random ({declared}) => ({outputs})\n{{\n    {body}\n}}", names, weights)


@st.composite
def streams(draw: st.DrawFn) -> Drawn:
    """A residual stream of tokens."""
    text = Text(draw, draw(st.sampled_from(["B, S", "3, 5"])))
    text.width = text.one_of(2, 4, 6, 8)
    kind = text.one_of("LayerNormalization", "RMSNormalization", "both")

    def norm(x: str) -> str:
        chosen = text.one_of("LayerNormalization", "RMSNormalization") if kind == "both" else kind
        return text.norm(x, chosen)

    table = ""
    if text.one_of(True, True, False):
        ids = text.given(f"int64[{text.rows}]")
        table = text.weight(VOCABULARY, text.width)
        x = text.add(f"Gather ({table}, {ids})")
        if text.maybe():
            x = text.add(f"Add ({x}, {text.weight(5, text.width)})")
    else:
        x = text.linear(text.given(f"float[{text.rows}, 3]"), 3, text.width)
    for _ in range(text.one_of(1, 1, 2)):
        ornament = text.one_of("", "", "", "", "relu", "exposed", "norm writes", "sandwich", "parallel")
        if ornament == "relu":
            x = text.add(f"Relu ({x})")
        if ornament == "exposed":
            x = text.add(f"Identity ({x})")
            text.outputs.append(f"float[{text.rows}, {text.width}] {x}")
        if ornament == "norm writes":
            x = norm(x)
        n = norm(x)
        y = text.branch(n)
        if ornament == "parallel":
            y = text.add(f"Add ({y}, {text.branch(n)})")
        if ornament == "sandwich":
            y = norm(y)
        x = text.add(f"Add ({', '.join([x, y] if text.maybe() else [y, x])})")
    if text.one_of(True, True, False):
        x = norm(x)
    if table and text.maybe():
        logits = text.add(f"MatMul ({x}, {text.add(f'Transpose <perm = [1, 0]> ({table})')})")
    else:
        logits = text.linear(x, text.width, VOCABULARY, plain=True)
    return text.finished(", ".join([f"float[{text.rows}, {VOCABULARY}] {logits}", *text.outputs]))


@st.composite
def images(draw: st.DrawFn) -> Drawn:
    """Convolutions with all that stands between them."""
    text = Text(draw, "B, S")
    channels, size = 3, 6
    x = text.given("float[B, 3, 6, 6]")
    for _ in range(text.one_of(1, 2, 3)):
        kind = text.one_of("plain", "plain", "point", "depthwise", "grouped")
        if kind == "grouped" and channels % 2:
            kind = "point"
        out = channels if kind == "depthwise" else text.one_of(2, 4, 6)
        groups = {"depthwise": channels, "grouped": 2}.get(kind, 1)
        reach = 1 if kind == "point" else 3
        padded = reach == 3 and (size < 3 or text.maybe())
        kernel = text.weight(out, channels // groups, reach, reach)
        if text.one_of(False, False, True):
            text.plant(kernel, (out, channels // groups, reach, reach), 0)
        bias = f", {text.weight(out)}" if text.maybe() else ""
        pads = f", pads = [{', '.join(['1' if padded else '0'] * 4)}]" if padded or text.maybe() else ""
        shape = f"kernel_shape = [{reach}, {reach}], group = {groups}{pads}"
        y = text.add(f"Conv <{shape}> ({x}, {kernel}{bias})")
        size = size if padded or reach == 1 else size - 2
        if text.maybe():
            variance = text.weight(out)
            text.planted[variance] = np.linspace(0.5, 2.0, out)
            y = text.add(
                f"BatchNormalization ({y}, {text.weight(out)}, {text.weight(out)}, {text.weight(out)}, {variance})"
            )
        if text.one_of(True, True, False):
            y = text.activation(y)
        if out == channels and padded and text.maybe():
            y = text.add(f"Add ({x}, {y})")
        if text.one_of(False, False, True):
            y = text.add(f"MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({y})")
        x, channels = y, out
    if text.maybe():
        tokens = text.add(f"Reshape ({x}, {text.numbers(0, channels, size * size)})")
        x, text.width = text.add(f"Transpose <perm = [0, 2, 1]> ({tokens})"), channels
        x = text.norm(x, text.one_of("LayerNormalization", "RMSNormalization"))
        y = text.linear(x, channels, 5)
        return text.finished(f"float[B, {size * size}, 5] {y}")
    pooled = text.add(f"Flatten ({text.add(f'GlobalAveragePool ({x})')})")
    return text.finished(f"float[B, 5] {text.linear(pooled, channels, 5)}")


def drawn() -> st.SearchStrategy[Drawn]:
    """Any of the networks; there is more to get wrong in streams."""
    return st.one_of(streams(), streams(), images())


SEEDS = st.integers(0, 3)
OPTIONS: dict[type, st.SearchStrategy[Pass[Any]]] = {
    RotateResidual: st.builds(
        RotateResidual, seed=SEEDS, kind=st.sampled_from(["hadamard", "random"]), untie=st.booleans()
    ),
    RotateHeads: st.builds(RotateHeads, seed=SEEDS),
    ScaleHeads: st.builds(ScaleHeads, per_head=st.booleans(), power_of_two=st.booleans()),
    AffineHeads: st.builds(AffineHeads, condition=st.sampled_from([2.0, 100.0]), per_head=st.booleans()),
    ScaleQueryKey: st.builds(ScaleQueryKey, per_head=st.booleans(), power_of_two=st.booleans()),
    Smooth: st.builds(Smooth, alpha=st.sampled_from([0.0, 0.5, 1.0]), shift=st.booleans()),
    Equalize: st.builds(Equalize, powers_of_two=st.booleans()),
    StabilizeNorm: st.builds(StabilizeNorm, scale=st.sampled_from([None, 0.25, 2.0**-7]), untie=st.booleans()),
    EliminateDeadChannels: st.builds(EliminateDeadChannels, multiple=st.sampled_from([1, 2])),
    MergeAffine: st.builds(MergeAffine, untie=st.booleans()),
    MergeBranches: st.builds(MergeBranches, untie=st.booleans()),
    MergeDuplicateChannels: st.builds(MergeDuplicateChannels, multiple=st.sampled_from([1, 2])),
    CenterResidual: st.builds(
        CenterResidual, norms_per_copy=st.sampled_from([0, 2]), centring_ns=st.sampled_from([0.01, 1000.0, 1e6])
    ),
    FoldBatchnorm: st.builds(FoldBatchnorm, max_bias_growth=st.sampled_from([0.0, 8.0, 1e9])),
    FoldNorm: st.builds(FoldNorm, max_bias_growth=st.sampled_from([1.0, 8.0, 1e9])),
    ReparameterizeNormScale: st.builds(ReparameterizeNormScale, bits=st.sampled_from([4, 8])),
    RotateOnline: st.builds(
        RotateOnline, down=st.booleans(), query_key=st.booleans(), min_size=st.sampled_from([2, 4, 8])
    ),
}
"""Passes with options, as they are drawn."""


@st.composite
def recipes(draw: st.DrawFn) -> list[Pass[Any]]:
    """Some passes in some order, perhaps behind the default recipe, without which little rotates."""
    chosen = draw(st.lists(st.sampled_from(PASSES), min_size=1, max_size=5))
    rules = [draw(OPTIONS[rule]) if rule in OPTIONS else rule() for rule in chosen]
    return [CenterResidual(norms_per_copy=0), FoldNorm(), *rules] if draw(st.booleans()) else rules
