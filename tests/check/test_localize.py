"""The first departing value, its node and its pass; relations; the whole difference of two models."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
from graphs import MLP, graph, mlp_inputs, mlp_weights

from rewrite.check.compare import DIFFERENT
from rewrite.check.diff import diff_models
from rewrite.check.localize import carried, localize
from rewrite.check.noise import unit_roundoff
from rewrite.ir import weights as lazy
from rewrite.ir.program import save_model
from rewrite.proof import transforms

ORIGINAL = graph(MLP, mlp_weights())
INPUTS = mlp_inputs()


def corrupted(name: str, change: float = 1e-3) -> ir.Model:
    stored = mlp_weights()
    stored[name].flat[3] += np.float32(change)
    return graph(MLP, stored)


def test_an_equal_graph_departs_nowhere():
    found = localize(ORIGINAL, ORIGINAL.clone(), INPUTS)
    assert found.first is None
    assert [row.name for row in found.rows] == ["norm", "up", "act", "down", "sum", "logits"]
    assert "all 6" in str(found)


@pytest.mark.parametrize(
    ("weight", "value"), [("gamma", "norm"), ("w_up", "up"), ("w_down", "down"), ("w_head", "logits")]
)
def test_a_corrupted_weight_is_found_where_it_enters(weight, value):
    found = localize(ORIGINAL, corrupted(weight), INPUTS)
    assert found.first.name == value
    assert found.first.operator in ("MatMul", "LayerNormalization")


def test_the_pass_is_named_by_the_node_by_its_constant_or_by_the_new_node_before_it():
    marked = corrupted("w_down")
    marked.graph[3].metadata_props["rewrite.pass"] = "fold-norm"
    assert localize(ORIGINAL, marked, INPUTS).first.made_by == "fold-norm"

    constant = corrupted("w_down")
    constant.graph.initializers["w_down"].metadata_props["rewrite.pass"] = "smooth"
    assert localize(ORIGINAL, constant, INPUTS).first.made_by == "smooth"

    text = MLP.replace("down = MatMul(act, w_down)", "scaled = Mul(act, wrong) down = MatMul(scaled, w_down)")
    inserted = graph(text, {**mlp_weights(), "wrong": np.array(1.01, np.float32)})
    inserted.graph[3].metadata_props["rewrite.pass"] = "scale-hidden"
    found = localize(ORIGINAL, inserted, INPUTS)
    assert (found.first.name, found.first.made_by) == ("down", "scale-hidden")
    assert found.skipped == {"new": 1}
    assert "scale-hidden" in str(found)


def centred_pair() -> tuple[ir.Model, ir.Model, dict]:
    """A residual stream h = xW, read by a LayerNorm; rewritten, W is centred and the norm is an RMSNorm."""
    body = (
        "g (float[n,8] x) => (float[n,4] y)"
        " {{ h = MatMul(x, w) z = {norm} <epsilon = 1.0e-5> (h, gamma) y = MatMul(z, v) }}"
    )
    rng = np.random.default_rng(5)
    stored = {"w": rng.standard_normal((8, 8)) + 1, "gamma": rng.standard_normal(8), "v": rng.standard_normal((8, 4))}
    stored = {name: array.astype(np.float32) for name, array in stored.items()}
    original = graph(body.format(norm="LayerNormalization"), stored)
    centred = lazy.MaterializedTensor(lazy.Center(lazy.Constant(stored["w"]), 1), ir.DataType.FLOAT, name="w")
    return (
        original,
        graph(body.format(norm="RMSNormalization"), {**stored, "w": centred}),
        {"h": {"transform": "centre", "axis": -1}},
    )


@pytest.mark.parametrize("unrounded", [False, True])
def test_a_centred_stream_is_compared_through_its_relation(unrounded):
    original, rewritten, relations = centred_pair()
    assert localize(original, rewritten, INPUTS, relations=relations, unrounded=unrounded).first is None
    assert localize(original, rewritten, INPUTS, unrounded=unrounded).first.name == "h"


def test_unrounded_constants_show_a_bug_that_rounding_would_hide():
    """An error of 2⁻²⁴ is one rounding of the stored weight, and no rounding at all in float64."""
    original, rewritten, relations = centred_pair()
    right = rewritten.graph.initializers["w"].const_value.weight
    wrong = lazy.Scale(right, lazy.Constant(np.array(1 + 2.0**-24)))
    rewritten.graph.initializers["w"].const_value = lazy.MaterializedTensor(wrong, ir.DataType.FLOAT, name="w")
    assert localize(original, rewritten, INPUTS, relations=relations).first is None
    assert localize(original, rewritten, INPUTS, relations=relations, unrounded=True).first.name == "h"


def test_a_relation_is_its_formula():
    rng = np.random.default_rng(2)
    v, vector = rng.standard_normal((2, 3, 4)), rng.standard_normal(3) + 3
    turned, block = np.linalg.qr(rng.standard_normal((4, 4)))[0], rng.standard_normal((2, 2))
    steps = {
        "scale": transforms.Scaling(vector),
        "shift": transforms.Shift(vector),
        "order": transforms.Selection(3, (2, 0, 1)),
        "turn": transforms.Orthogonal(turned),
        "heads": transforms.Repeated(transforms.Invertible(block), 2),
        "mix": transforms.Hadamard(4, seed=1),
        "less": transforms.Isometry(4),
    }

    def apply(name, axis=-1):
        return carried(v, {"transform": name, "axis": axis}, steps)

    assert apply("identity") is v
    assert carried(v, {}, steps) is v
    np.testing.assert_allclose(apply("centre", 1), v - v.mean(1, keepdims=True), atol=2.0**-50)
    np.testing.assert_array_equal(apply("scale", 1), v * vector[:, None])
    np.testing.assert_array_equal(apply("shift", -2), v + vector[:, None])
    np.testing.assert_array_equal(apply("order", 1), v[:, [2, 0, 1]])
    np.testing.assert_array_equal(apply("turn"), v @ turned)
    np.testing.assert_allclose(apply("heads", 2), v @ np.kron(np.eye(2), block), atol=2.0**-48)
    np.testing.assert_allclose(apply("mix"), v @ steps["mix"].matrix(), atol=2.0**-48)
    assert apply("less").shape == (2, 3, 3)
    both = {"transform": "composition", "steps": [{"transform": "scale", "axis": 1}, {"transform": "turn", "axis": -1}]}
    np.testing.assert_array_equal(carried(v, both, steps), (v * vector[:, None]) @ turned)
    with pytest.raises(KeyError, match="gone"):
        apply("gone")


def rotated_pair(step) -> tuple[ir.Model, ir.Model, dict]:
    """h = xW, y = hV; rewritten, W absorbs a transform and V its dual."""
    text = "g (float[n,8] x) => (float[n,4] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    rng = np.random.default_rng(5)
    stored = {"w": rng.standard_normal((8, 8)), "v": rng.standard_normal((8, 4))}
    stored = {name: array.astype(np.float32) for name, array in stored.items()}
    wide = {"w": lazy.Transformed(lazy.Constant(stored["w"]), step, 1)}
    wide["v"] = lazy.Transformed(lazy.Constant(stored["v"]), step.dual, 0)
    made = {name: lazy.MaterializedTensor(weight, ir.DataType.FLOAT, name=name) for name, weight in wide.items()}
    return graph(text, stored), graph(text, made), {"h": {"transform": "t", "axis": -1, "pass": "rotate"}}


@pytest.mark.parametrize("unrounded", [False, True])
@pytest.mark.parametrize(
    "step",
    [
        transforms.Hadamard(8, seed=3),
        transforms.Hadamard(8, scale=0.25),
        transforms.Scaling(2.0 ** np.arange(-4, 4) * 1.1),
        transforms.Orthogonal(np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]),
        transforms.Repeated(transforms.Invertible(np.random.default_rng(1).standard_normal((4, 4))), 2),
        transforms.Selection(8, (3, 1, 0, 2, 7, 6, 5, 4)),
    ],
    ids=lambda step: step.kind,
)
def test_a_changed_basis_stays_comparable(step, unrounded):
    original, rewritten, relations = rotated_pair(step)
    found = localize(original, rewritten, INPUTS, relations=relations, transforms={"t": step}, unrounded=unrounded)
    assert found.first is None
    assert [row.relation for row in found.rows] == ["t", "identity"]
    assert localize(original, rewritten, INPUTS, unrounded=unrounded).first.name == "h"
    wrong = transforms.Hadamard(8, seed=4)
    departs = localize(original, rewritten, INPUTS, relations=relations, transforms={"t": wrong}, unrounded=unrounded)
    assert departs.first.name == "h"
    assert (
        diff_models(
            original, rewritten, [INPUTS], relations=relations, transforms={"t": step}, layers=True
        ).layers.first
        is None
    )


def test_values_of_another_shape_or_relation_are_skipped_and_counted():
    text = "g (float[n,8] x) => (float[n,k] y) { h = MatMul(x, w) s = Shape(h) y = Relu(h) }"
    rng = np.random.default_rng(0)
    narrow, wide = (graph(text, {"w": rng.standard_normal((8, k)).astype(np.float32)}) for k in (3, 5))
    assert localize(narrow, wide, INPUTS).skipped == {"of another shape": 2, "of integers": 1}
    relations = {"h": {"transform": "unheard of"}}
    assert "with unknown relation unheard of" in localize(narrow, narrow, INPUTS, relations=relations).skipped


def test_diff_of_equal_models():
    found = diff_models(ORIGINAL, ORIGINAL.clone(), [INPUTS, mlp_inputs(2, 1)], layers=True)
    assert found.equal
    assert len(found.rows) == 2
    assert found.layers.first is None
    assert found.plot().startswith("<svg")
    assert found.to_dict()["equal"] is True
    assert "within noise" in str(found)


@pytest.mark.parametrize("change", [1e-3, np.inf])
@pytest.mark.parametrize("run", [True, False])
def test_diff_finds_a_corrupted_weight(change, run):
    found = diff_models(ORIGINAL, corrupted("w_down", change), [INPUTS], layers=True, run=run)
    assert not found.equal
    assert found.layers.first.name == "down"
    assert found.rows[0].reason
    assert "down departs first" in str(found)


def test_diff_of_a_lazily_rewritten_model_passes_and_a_wrong_one_fails_by_two_precisions():
    original, rewritten, relations = centred_pair()
    found = diff_models(original, rewritten, [INPUTS], relations=relations, layers=True)
    assert found.equal
    assert found.rows[0].precisions is not None
    right = rewritten.graph.initializers["w"].const_value.weight
    bent = lazy.Scale(right, lazy.Constant(1 + 2.0**-23 * np.arange(8.0)), axis=1)
    rewritten.graph.initializers["w"].const_value = lazy.MaterializedTensor(bent, ir.DataType.FLOAT, name="w")
    wrong = diff_models(original, rewritten, [INPUTS], run=False)
    assert wrong.verdict == DIFFERENT
    assert "bug" in wrong.rows[0].reason


def test_what_is_deployed_is_what_is_judged(tmp_path):
    """The file given as the artifact runs, whatever the model in memory says."""
    save_model(corrupted("w_down"), tmp_path / "bad.onnx")
    save_model(ORIGINAL.clone(), tmp_path / "good.onnx")
    import onnxruntime

    for name, equal in (("good", True), ("bad", False)):
        found = diff_models(
            ORIGINAL, ORIGINAL, [INPUTS], artifact=tmp_path / f"{name}.onnx", options=onnxruntime.SessionOptions()
        )
        assert found.rows[0].exact.accepted
        assert found.equal is equal


def test_diff_pairs_outputs_by_position_where_names_differ_and_reports_a_missing_one():
    renamed = graph(MLP.replace("logits", "scores"), mlp_weights())
    assert diff_models(ORIGINAL, renamed, [INPUTS]).equal
    two = graph(MLP.replace("=> (float[n,4] logits)", "=> (float[n,4] logits, float[n,8] sum)"), mlp_weights())
    assert diff_models(two, ORIGINAL, [INPUTS]).rows[1].reason == "missing"


def narrow_mlp(kind: ir.DataType, change: float = 0.0) -> ir.Model:
    """`MLP` with everything in another float type."""
    stored = {name: array.astype(kind.numpy()) for name, array in mlp_weights().items()}
    stored["w_down"][1, 3] += np.array(change).astype(kind.numpy())
    name = {"FLOAT16": "float16", "BFLOAT16": "bfloat16"}[kind.name]
    text = MLP.replace("float[", f"{name}[")
    return graph(text, {key: ir.Tensor(array, dtype=kind) for key, array in stored.items()})


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_noise_is_that_of_the_storage_type(kind):
    """A change of four ulps is noise in a narrow type; one of four is not, in any."""
    inputs = {"x": INPUTS["x"].astype(kind.numpy())}
    little = 4 * float(np.asarray(unit_roundoff(kind.numpy())))
    found = diff_models(narrow_mlp(kind), narrow_mlp(kind, little), [inputs], layers=True)
    assert found.equal
    assert (found.rows[0].run is None) == (kind == ir.DataType.BFLOAT16)
    assert found.layers.first is None
    assert not diff_models(narrow_mlp(kind), narrow_mlp(kind, 4.0), [inputs]).equal


def test_importing_the_check_and_the_report_is_light():
    code = "import sys, rewrite.check, rewrite.report; print(sorted({'torch', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
