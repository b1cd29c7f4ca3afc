"""Convolutions on channels in blocks: filters reordered here by hand, and by ONNX Runtime on the machine at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pairs import model

from rewrite.proof import prove
from rewrite.proof.rules import RULES

BLOCK = 4


def numbers(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1.0, shape).astype(np.float32)


def reordered(filters: np.ndarray, *, both: bool, inner_first: bool = True) -> np.ndarray:
    """Filters (O, I, h, w), filled up with zeros, entry by entry where blocks of 4 channels put them."""
    out, inner, height, width = filters.shape
    outs, ins = -(-out // BLOCK) * BLOCK, -(-inner // BLOCK) * BLOCK if both else inner
    stored = np.zeros(outs * ins * height * width, np.float32)
    for o, i, y, x in np.ndindex(out, inner, height, width):
        if both:
            within = (i % BLOCK, o % BLOCK) if inner_first else (o % BLOCK, i % BLOCK)
            place = ((((o // BLOCK) * (ins // BLOCK) + i // BLOCK) * height + y) * width + x) * BLOCK * BLOCK
            stored[place + within[0] * BLOCK + within[1]] = filters[o, i, y, x]
        else:
            stored[((((o // BLOCK) * inner + i) * height + y) * width + x) * BLOCK + o % BLOCK] = filters[o, i, y, x]
    return stored.reshape(outs, ins, height, width)


def filled(bias: np.ndarray) -> np.ndarray:
    return np.pad(bias, (0, -len(bias) % BLOCK))


K1, B1, K2, K3, B3, K4 = (
    numbers(6, 3, 3, 3), numbers(6, seed=4), numbers(6, 1, 3, 3, seed=5), numbers(8, 6, 1, 1, seed=6),
    numbers(8, seed=7), numbers(8, 8, 3, 3, seed=8),
)  # fmt: skip
PLAIN = {"k1": K1, "b1": B1, "k2": K2, "k3": K3, "b3": B3, "k4": K4}
BLOCKED = {
    **{"k1": reordered(K1, both=False), "b1": filled(B1), "k2": reordered(K2, both=False)},
    **{"k3": reordered(K3, both=True), "b3": B3, "k4": reordered(K4, both=True)},
}
POOL = "kernel_shape=[2,2], strides=[2,2], pads=[0,0,0,0], dilations=[1,1], ceil_mode=0"
ORIGINAL = (
    "(float[N,3,8,8] x) => (float[N,8,4,4] y) { a0 = Conv<pads=[1,1,1,1]>(x, k1, b1) a = Relu(a0)"
    " b = Conv<group=6, pads=[1,1,1,1]>(a, k2)"
    f" p = MaxPool<{POOL}>(b) c = Conv(p, k3, b3) d0 = Conv<pads=[1,1,1,1]>(c, k4) d1 = Add(d0, c) d = Sigmoid(d1)"
    " y = Identity(d) }"
)
NCHWC = "com.microsoft.nchwc."
REWRITTEN = (
    "(float[N,3,8,8] x) => (float[N,8,4,4] y) {{ "
    f'a = {NCHWC}Conv<pads=[1,1,1,1], activation="Relu">(x, k1, b1) b = {NCHWC}Conv<group=8, pads=[1,1,1,1]>(a, k2)'
    f" p = {NCHWC}MaxPool<{POOL}>(b) c = {NCHWC}Conv(p, k3, b3)"
    f' d = {NCHWC}Conv<pads=[1,1,1,1], activation="Sigmoid">(c, k4, {{none}}, {{total}}) '
    f"y = {NCHWC}ReorderOutput<channels={{channels}}>(d) }}}}"
)


def original() -> ir.Model:
    return model(ORIGINAL, PLAIN, declared=True)


def rewritten(total: str = "c", channels: int = 8, **changed: np.ndarray) -> ir.Model:
    return model(REWRITTEN.format(none='""', total=total, channels=channels), {**BLOCKED, **changed})


def test_blocks_are_undone() -> None:
    verdict = prove(original(), rewritten(), block=BLOCK).verdict
    assert verdict.kind == "EQUAL_MODULO", str(verdict)
    assert "blocks of 4" in verdict.reason


def test_the_size_of_blocks_is_never_guessed() -> None:
    assert not prove(original(), rewritten()).verdict.holds
    for other in (2, 8, 16):
        assert not prove(original(), rewritten(), block=other).verdict.holds, other


WRONG = {
    "channels within a block swapped": {"k4": reordered(K4, both=True, inner_first=False)},
    "a filter that was not reordered": {"k4": K4},
    "a bias moved by one": {"b1": np.roll(filled(B1), 1)},
    "a kernel changed": {"k2": reordered(K2 * np.float32(1.001), both=False)},
    "what is added is the wrong value": {"total": "d_"},
    "fewer channels": {"channels": 7},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_layout_is_not_equal(case: str) -> None:
    changed = dict(WRONG[case])
    if changed.get("total") == "d_":
        changed["total"] = "p"
    assert not prove(original(), rewritten(**changed), block=BLOCK).verdict.holds


def test_a_filter_that_reads_what_fills_a_block_up_is_not_equal() -> None:
    wide = np.pad(K3, ((0, 0), (0, 2), (0, 0), (0, 0)))
    wide[:, 6:] = 0.5
    assert not prove(original(), rewritten(k3=reordered(wide, both=True)), block=BLOCK).verdict.holds


@pytest.mark.parametrize(
    "body", ["r = Relu(c) y = {0}ReorderOutput<channels=8>(r)", "y = Relu(c)", "d = {0}ReorderInput(c) y = Relu(d)"]
)
def test_blocks_are_read_by_no_other_operator(body: str) -> None:
    """The first would be right; that the operator takes every entry by itself is not what is asked of it here."""
    head = "(float[N,4,8,8] x) => (float[N,8,8,8] y) {{ "
    text = f"{head}b = {{0}}ReorderInput(x) c = {{0}}Conv(b, k) {body} }}}}".format(NCHWC)
    given = {"k": reordered(numbers(8, 4, 1, 1), both=True)}
    plain = model(f"{head}c = Conv(x, k) y = Relu(c) }}}}".format(), {"k": numbers(8, 4, 1, 1)})
    assert not prove(plain, model(text, given), block=BLOCK).verdict.holds
    fused = 'c = {0}Conv<activation="Relu">(b, k) y = {0}ReorderOutput<channels=8>(c) }}'
    control = f"{head}b = {{0}}ReorderInput(x) {fused}"
    assert prove(plain, model(control.format(NCHWC), given), block=BLOCK).verdict.holds


POOLS = {
    "MaxPool": ("AveragePool", "<kernel_shape=[2,2], strides=[1,1], pads=[0,0,0,0]>", 7),
    "AveragePool": ("MaxPool", "<kernel_shape=[2,2], strides=[1,1], pads=[0,0,0,0]>", 7),
    "GlobalMaxPool": ("GlobalAveragePool", "", 1),
    "GlobalAveragePool": ("GlobalMaxPool", "", 1),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_keeps_channels_apart(name: str) -> None:
    other, settings, size = POOLS[name]
    head = f"(float[N,4,8,8] x) => (float[N,4,{size},{size}] y) {{"
    plain = model(f"{head} y = {name}{settings}(x) }}", declared=True)

    def blocked(operator: str) -> ir.Model:
        pooled = f"b = {NCHWC}ReorderInput(x) c = {NCHWC}{operator}{settings}(b)"
        return model(f"{head} {pooled} y = {NCHWC}ReorderOutput<channels=4>(c) }}")

    assert prove(plain, blocked(name), block=BLOCK).verdict.holds
    assert not prove(plain, blocked(other), block=BLOCK).verdict.holds


def test_channels_last() -> None:
    head = "(float[N,4,4,4] x) => (float[N,4,4,4] y) {"
    identity = model(f"{head} y = Identity(x) }}")

    def turned(last: int) -> ir.Model:
        out = f"y = {NCHWC}ReorderOutput<channels=4, channels_last={last}>(b)"
        return model(f"{head} b = {NCHWC}ReorderInput<channels_last=1>(x) {out} }}")

    assert prove(identity, turned(1), block=BLOCK).verdict.holds
    assert not prove(identity, turned(0), block=BLOCK).verdict.holds


def test_every_blocked_rule_occurs_here() -> None:
    assert {name for domain, name in RULES if domain == "com.microsoft.nchwc"} == {
        *("Conv", "ReorderInput", "ReorderOutput"),
        *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
    }


def test_what_this_machine_writes(tmp_path: Path) -> None:
    """ONNX Runtime's own blocks: one size holds, and it is the machine's."""
    import onnxruntime as ort

    shapes = {
        "k1": (32, 3, 3, 3),
        "b1": (32,),
        "k2": (32, 1, 3, 3),
        "k3": (24, 32, 1, 1),
        "b3": (24,),
        "k4": (24, 24, 3, 3),
    }
    weights = {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    plain = model(
        ORIGINAL.replace("float[N,8,4,4] y", "float[N,24,4,4] y").replace("group=6", "group=32"), weights, declared=True
    )
    source, result = tmp_path / "plain.onnx", tmp_path / "blocked.onnx"
    ir.save(plain, source)
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(result), 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    blocked = onnx.load(result)
    if not any(node.domain == "com.microsoft.nchwc" for node in blocked.graph.node):
        pytest.skip("ONNX Runtime keeps channels together on this machine")
    holding = [n for n in (4, 8, 16) if prove(plain, ir.from_proto(blocked), block=n).verdict.holds]
    assert len(holding) == 1
    assert session.get_outputs()[0].name == "y"
