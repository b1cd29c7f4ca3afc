"""Counterexamples: found where networks differ, never where only rounding does; and the part that shows it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import MLP, graph, mlp_inputs, mlp_weights

from rewrite.check.reference import evaluate
from rewrite.check.refute import counterexample, moved, refute
from rewrite.proof import transforms

INPUTS = [mlp_inputs()]
ORIGINAL = graph(MLP, mlp_weights())


def altered(name: str, change: float) -> ir.Model:
    stored = mlp_weights()
    stored[name].flat[3] += np.float32(change)
    return graph(MLP, stored)


def moved_by_ulps(count: float, seed: int = 7) -> ir.Model:
    """The network with every weight up to `count` units in the last place away, as float32 numbers."""
    generator, stored = np.random.default_rng(seed), mlp_weights()
    for name, values in stored.items():
        away = np.round(count * generator.uniform(-1, 1, values.shape))
        stored[name] = (values + away * np.spacing(np.abs(values))).astype(np.float32)
    return graph(MLP, stored)


@pytest.mark.parametrize("name", ["gamma", "w_up", "w_down", "w_head"])
def test_a_changed_weight_is_refuted(name: str) -> None:
    found = counterexample(ORIGINAL, altered(name, 0.01), INPUTS)
    assert found is not None
    assert found.output == "logits"
    exact, wrong = (evaluate(m, found.inputs)["logits"] for m in (ORIGINAL, altered(name, 0.01)))
    assert np.abs(exact - wrong).max() == pytest.approx(found.difference)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ulps", [0.0, 1.0, 4.0])
def test_rounded_constants_are_not_refuted(ulps: float, seed: int) -> None:
    assert counterexample(ORIGINAL, moved_by_ulps(ulps, seed), INPUTS) is None


def test_the_control_of_the_above_is_refuted() -> None:
    """The same change, a thousand times as large."""
    assert counterexample(ORIGINAL, moved_by_ulps(4000.0), INPUTS) is not None


CANCELLING = "g (float[n,4] x) => (float[n,4] y) {{ a = Add(x, {first}) y = Sub(a, {second}) }}"
LARGE = {"large": np.full(4, 1e19, np.float32)}


def test_a_sum_that_loses_all_digits_is_not_refuted() -> None:
    """(x + 1e19) − 1e19 is x over the reals, and 0 in any float."""
    plain = graph("g (float[n,4] x) => (float[n,4] y) { y = Identity(x) }")
    unstable = graph(CANCELLING.format(first="large", second="large"), LARGE)
    inputs = [{"x": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}]
    assert counterexample(plain, unstable, inputs) is None


ROUTER = """g (float[n,2] x) => (float[n,1] y) {
    scores = MatMul(x, w)
    best = ArgMax <axis = -1> (scores)
    y = Cast <to = 1> (best)
}"""


def test_a_near_tie_is_not_refuted() -> None:
    """The two experts' scores agree to the last place: which one wins is rounding."""
    tie, other = np.float32([[1.0, 1.0], [0.5, 0.5]]), np.float32([[1.0, 1.0], [0.5, 0.5]])
    other[0, 1] = np.nextafter(np.float32(1.0), np.float32(2.0))
    inputs = [{"x": np.float32([[3.0, 1.0], [2.0, 5.0]])}]
    first, second = graph(ROUTER, {"w": tie}), graph(ROUTER, {"w": other})
    assert not np.array_equal(evaluate(first, inputs[0])["y"], evaluate(second, inputs[0])["y"])
    assert counterexample(first, second, inputs) is None
    swapped = graph(ROUTER, {"w": np.float32([[1.0, 0.0], [0.5, 0.0]])[:, ::-1].copy()})
    clear = graph(ROUTER, {"w": np.float32([[1.0, 0.0], [0.5, 0.0]])})
    assert counterexample(clear, swapped, inputs) is not None


def test_what_has_no_definition_is_not_refuted() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { y = com.microsoft.Unheard(x) }"
    assert counterexample(graph(text), graph(text), [{"x": np.ones((1, 4), np.float32)}]) is None


def test_thresholds_and_exponents_are_not_moved() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { p = Pow(x, e) y = Mul(p, w) }"
    both = {"e": np.full(4, 2.0, np.float32), "w": np.full(4, 2.0, np.float32)}
    copy = moved(graph(text, both), 0)
    values = {name: np.asarray(value.const_value.numpy()) for name, value in copy.graph.initializers.items()}
    assert (values["e"] == 2.0).all()
    assert (values["w"] != 2.0).any()
    assert np.abs(values["w"] - 2.0).max() <= 5 * 2.0**-22


# ── Where ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("weight", "value", "operator"),
    [("gamma", "norm", "LayerNormalization"), ("w_up", "up", "MatMul"), ("w_down", "down", "MatMul")],
)
def test_the_part_is_the_one_operator_that_is_wrong(weight: str, value: str, operator: str) -> None:
    found = refute(ORIGINAL, altered(weight, 0.01), inputs=INPUTS)
    assert found is not None
    assert (found.value, found.operator) == (value, operator)
    assert [node.op_type for node in found.rewritten.graph] == [operator]
    assert [node.op_type for node in found.original.graph] == [operator]


def test_parts_show_the_difference_on_their_own(tmp_path) -> None:
    found = refute(ORIGINAL, altered("w_up", 0.01), inputs=INPUTS)
    assert found is not None
    paths = found.save(tmp_path / "part")
    assert set(paths) == {"original", "rewritten", "inputs", "counterexample", "summary"}
    with np.load(paths["inputs"]) as archive:
        given = {name: archive[name] for name in archive.files}
    results = []
    for name in ("original", "rewritten"):
        onnx.checker.check_model(paths[name], full_check=True)
        model = ir.load(paths[name])
        assert [value.name for value in model.graph.inputs] == list(given)
        assert [value.name for value in model.graph.outputs] == ["up"]
        results.append(evaluate(model, given)["up"])
    assert np.abs(results[0] - results[1]).max() == pytest.approx(found.difference)
    assert refute(ORIGINAL, ORIGINAL.clone(), inputs=INPUTS) is None


def test_names_may_differ() -> None:
    """Values pair by content where no name helps: only the interface is called the same."""
    renamed = altered("w_down", 0.01)
    for index, node in enumerate(renamed.graph):
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"v{index}"
    found = refute(ORIGINAL, renamed, inputs=INPUTS)
    assert found is not None
    assert found.value == "logits"
    # From the hidden values on, which agree, to the output: the wrong product is among them, what is before is not.
    assert "MatMul" in [node.op_type for node in found.rewritten.graph]
    assert "LayerNormalization" not in [node.op_type for node in found.rewritten.graph]


FOLDED = "g (float[n,2,3] x) => (float[n,2,3] y) { c = Conv(x, w, b) y = Relu(c) }"
NORMED = """g (float[n,2,3] x) => (float[n,2,3] y) {
    c = Conv(x, w) n = BatchNormalization <epsilon = 0.5> (c, gamma, beta, mean, variance) y = Relu(n) }"""


def test_a_value_that_changed_its_meaning_is_no_suspect() -> None:
    """After a fold, `c` is what `n` was. That it differs from the old `c` is no fault; that `y` does is."""
    generator = np.random.default_rng(3)
    w = generator.normal(size=(2, 2, 1)).astype(np.float32)
    stored = {"w": w, "gamma": np.float32([2, 3]), "beta": np.float32([1, -1]), "mean": np.float32([0.5, 0.25])}
    original = graph(NORMED, {**stored, "variance": np.float32([3.5, 8.5])})
    factor = np.float32([2 / 2, 3 / 3])
    right = {"w": w * factor[:, None, None], "b": np.float32([1 - 0.5, -1 - 0.25])}
    wrong = {**right, "b": np.float32([1, -1])}
    inputs = [{"x": generator.normal(size=(2, 2, 3)).astype(np.float32)}]
    assert refute(original, graph(FOLDED, right), inputs=inputs) is None
    found = refute(original, graph(FOLDED, wrong), inputs=inputs)
    assert found is not None
    assert found.value == "y"
    assert [node.op_type for node in found.original.graph] == ["Conv", "BatchNormalization", "Relu"]
    assert [node.op_type for node in found.rewritten.graph] == ["Conv", "Relu"]


TWO = "g (float[n,8] x) => (float[n,8] y) { h = MatMul(x, w1) y = MatMul(h, w2) }"


def test_a_value_in_another_basis_is_carried_there() -> None:
    """h′ = h·H: the wrong operator is the one behind it, and its part is given h′."""
    generator = np.random.default_rng(5)
    w1, w2 = (generator.normal(size=(8, 8)) for _ in range(2))
    turn = transforms.Hadamard(8)
    original = graph(TWO, {"w1": w1.astype(np.float32), "w2": w2.astype(np.float32)})
    turned = {"w1": turn.apply(w1, -1).astype(np.float32), "w2": turn.dual.apply(w2, 0).astype(np.float32)}
    relations, known = {"h": {"transform": "t", "axis": -1}}, {"t": turn}
    inputs = [{"x": generator.normal(size=(3, 8)).astype(np.float32)}]
    given = {"inputs": inputs, "relations": relations, "transforms": known}
    assert refute(original, graph(TWO, turned), **given) is None
    turned["w2"][0, 0] += np.float32(0.5)
    found = refute(original, graph(TWO, turned), **given)
    assert found is not None
    assert found.value == "y"
    assert [node.op_type for node in found.rewritten.graph] == ["MatMul"]
    assert set(found.inputs) == {"h", "h.rewritten"}
