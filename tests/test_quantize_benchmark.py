"""benchmarks/quantize: variants with outliers compute the same bits, and verdicts say who is matched."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import feed, network

from rewrite.check.reference import evaluate
from rewrite.ir.constants import weight_behind
from rewrite.ir.program import Program, save_model
from rewrite.ir.weights import Constant

NORM = """
norm (float[B, S, 16] x, float[16] g, float[16] b, float[16, 16] q, float[16, 8] k)
    => (float[B, S, 16] y, float[B, S, 8] z)
{
    n = LayerNormalization (x, g, b)
    p = MatMul (n, q)
    y = Add (p, x)
    z = MatMul (n, k)
}
"""

RELU = """
relu (float[B, 3, 6, 6] x, float[16, 3, 3, 3] first, float[16] b, float[4, 16, 1, 1] second) => (float[B, 4, 4, 4] y)
{
    h = Conv <kernel_shape = [3, 3]> (x, first, b)
    f = Relu (h)
    y = Conv <kernel_shape = [1, 1]> (f, second)
}
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import quantize

    yield quantize
    for name in ("quantize", "quantize_networks", "quantize_peers"):
        del sys.modules[name]


def hardened(benchmark: Any, before: Program) -> tuple[Program, list[np.ndarray]]:
    """The program with outliers, and every constant's ratio to what it was."""
    after = before.clone()
    ratios = [new / old for old, new in benchmark.networks.hardened(after)]
    return after, ratios


@pytest.mark.parametrize(("text", "constants"), [(NORM, 4), (RELU, 3)])
def test_a_variant_computes_the_same_bits_from_channels_as_large_as_asked(
    benchmark: Any, text: str, constants: int
) -> None:
    before = network(text)
    after, ratios = hardened(benchmark, before)
    inputs = feed(before) if text is NORM else {"x": np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype("f4")}
    expected, found = evaluate(before.model, inputs), evaluate(after.model, inputs)
    assert all(np.array_equal(found[name], array) for name, array in expected.items())

    assert len(ratios) == constants
    asked = {32.0, 64.0, 256.0, 512.0}
    upward = [ratio for ratio in ratios if ratio.max() > 1]
    downward = [ratio for ratio in ratios if ratio.max() <= 1]
    assert len(upward) == 2
    assert len(downward) == constants - 2
    assert all(set(np.unique(ratio)) == {1.0, *asked} for ratio in upward)
    assert all(set(np.unique(ratio)) == {1.0, *(1 / each for each in asked)} for ratio in downward)
    assert all(np.count_nonzero(ratio != 1) == 4 * ratio.size // 16 for ratio in ratios)


def test_a_row_that_is_not_scaled_down_shows(benchmark: Any) -> None:
    before = network(NORM)
    after, _ = hardened(benchmark, before)
    inputs = feed(before)
    matrix = next(name for name in after.model.graph.initializers if name.startswith("k."))
    value = after.model.graph.initializers[matrix]
    wrong = weight_behind(value).numpy()
    row = int(np.abs(wrong).max(1).argmin())
    wrong[row] *= 2
    from rewrite.ir.weights import MaterializedTensor

    value.const_value = MaterializedTensor(Constant(wrong), value.dtype, matrix)
    assert not np.array_equal(evaluate(before.model, inputs)["z"], evaluate(after.model, inputs)["z"])


def test_the_channels_are_others_in_every_norm_and_the_same_each_time(benchmark: Any) -> None:
    first, again, other = (benchmark.networks.divisor(name, 64, 4, 32, 512) for name in ("a", "a", "b"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first != 1, other != 1)


def artifact(source: str, bits: float, ratio: float) -> dict[str, Any]:
    items = bits + np.tile([-0.01, 0.01], 50)
    return {
        **{"method": f"{source}-{bits}-{ratio}", "source": source, "format": "int8-static", "items": items.tolist()},
        **{"bits": bits, "cpu_ratio": ratio},
    }


def test_an_artifact_is_matched_by_one_of_ours_that_is_as_good_and_as_fast(benchmark: Any) -> None:
    theirs = artifact("plain", 1.0, 0.5)
    assert benchmark.unmatched([theirs, artifact("recipe", 1.0, 0.52)], "int8-static") == []
    better_but_slow, fast_but_worse = artifact("recipe", 0.9, 0.6), artifact("recipe", 1.1, 0.4)
    assert benchmark.unmatched([theirs, better_but_slow, fast_but_worse], "int8-static") == [theirs]
    assert benchmark.unmatched([theirs], "int8-static") == [theirs]
    assert benchmark.unmatched([theirs | {"failure": "none"}], "int8-static") == []


def test_fewer_bits_than_float_are_chance(benchmark: Any) -> None:
    theirs, exact = artifact("plain", 0.9, 0.5), artifact("plain", 1.0, 1.0) | {"format": "float"}
    ours, worse = artifact("recipe", 1.0, 0.5), artifact("recipe", 1.1, 0.5)
    assert benchmark.unmatched([theirs, ours], "int8-static") == [theirs]
    assert benchmark.unmatched([theirs, ours, exact], "int8-static") == []
    assert benchmark.unmatched([theirs, worse, exact], "int8-static") == [theirs]


def test_latency_is_a_ratio_within_every_turn(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process, or a turn, in which all is twice as slow changes no ratio; one slow turn of one artifact neither."""
    pace = np.array([1.0, 2.0, 1.0, 3.0, 1.0])
    slips = np.array([1.0, 1.0, 9.0, 1.0, 1.0])
    turns = {"0": 100 * pace, "1": 120 * pace, "2": 50 * pace * slips}
    found = {key: {"wall": each.tolist(), "cpu": each.tolist()} for key, each in turns.items()}
    monkeypatch.setattr(benchmark, "_in_a_process", lambda *_: found)
    monkeypatch.setattr(benchmark, "structure", str)
    running = {key: {"folder": key, "format": form} for key, form in zip(turns, ("float", "float", "int8-static"))}
    arguments = type("Arguments", (), {"processes": 3, "rounds": 5})
    measured = benchmark.latency(running, {}, arguments)
    assert [measured[key]["cpu_ratio"] for key in turns] == pytest.approx([1.0, 1.2, 0.5])


def test_artifacts_that_differ_in_numbers_alone_have_one_latency(benchmark: Any, tmp_path: Path) -> None:
    texts = [NORM, NORM, NORM.replace("float[16, 8] k", "float[16, 4] k").replace("S, 8] z", "S, 4] z"), RELU]
    for index, text in enumerate(texts):
        (tmp_path / str(index)).mkdir()
        save_model(network(text, seed=index).model, tmp_path / str(index) / "model.onnx")
    (tmp_path / "4").mkdir()
    save_model(network(NORM).model, tmp_path / "4" / "model.onnx")
    (tmp_path / "4" / "session.json").write_text("{}")
    found = [benchmark.structure(tmp_path / str(index)) for index in range(5)]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_a_difference_within_two_standard_errors_is_none(benchmark: Any) -> None:
    first, second = artifact("plain", 1.0, 0.5), artifact("recipe", 1.0, 0.5)
    noise = np.random.default_rng(0).normal(size=100)
    second["items"] = (np.array(first["items"]) + (noise - noise.mean() + 0.1)).tolist()
    mean, error = benchmark.worse_by(second, first)
    assert mean == pytest.approx(0.1)
    assert mean < 2 * error
    assert benchmark.unmatched([first, second], "int8-static") == []


def test_every_method_has_a_format_of_ours_and_a_package_that_an_option_names(benchmark: Any) -> None:
    assert {method.format for method in benchmark.METHODS.values()} == set(benchmark.FORMATS)
    assert {method.package for method in benchmark.METHODS.values()} == {"ort", "inc", "onc", "olive"}
