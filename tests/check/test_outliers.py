"""Outlier measures: formulas on numbers that are known, and what a rotation does to a channel that sticks out."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from graphs import graph

from rewrite.check.outliers import _Spread, log_determinant, measure_outliers
from rewrite.ir import weights as lazy
from rewrite.proof import transforms as t

RNG = np.random.default_rng(0)
TEXT = """g (float[n,16] x) => (float[n,4] y) {
    h = MatMul(x, w) n = RMSNormalization(h, g) y = MatMul(n, v) }"""


def pair(step: t.Transform, exponent: float = 2.5):
    """h′ = h·T with a channel 10^exponent times as large as others, its relations and inputs."""
    rng = np.random.default_rng(1)
    w, v = rng.standard_normal((16, 16)), rng.standard_normal((16, 4))
    w[:, 3] *= 10**exponent
    stored = {"w": lazy.Transformed(lazy.Constant(w), step, 1), "v": lazy.Transformed(lazy.Constant(v), step.dual, 0)}
    made = {name: lazy.MaterializedTensor(weight, ir.DataType.DOUBLE, name=name) for name, weight in stored.items()}
    model = graph(TEXT.replace("float[", "double["), {**made, "g": np.ones(16)})
    relations = {name: {"transform": "t", "axis": -1} for name in ("h", "n")}
    return model, relations, [{"x": rng.standard_normal((200, 16))}]


def test_the_measures_of_known_numbers():
    spread = _Spread()
    rows = RNG.standard_normal((100_000, 3)) * np.array([1.0, 2.0, 4.0]) + 5
    spread.add(rows[:60_000])
    spread.add(rows[60_000:])
    assert spread.kurtosis == pytest.approx(((rows - rows.mean()) ** 4).mean() / rows.var() ** 2, rel=1e-9)
    assert spread.peak == pytest.approx(np.abs(rows).max() / np.median(np.abs(rows)), rel=1e-2)
    np.testing.assert_allclose(spread.variances, rows.var(0), rtol=1e-9)
    covariance = np.cov(rows.T, bias=True)
    ball = math.pi**1.5 / math.gamma(2.5)
    qsur = ball * math.sqrt(np.linalg.det(covariance)) / (2**3 * rows.var(0).max() ** 1.5)
    assert spread.log_qsur == pytest.approx(math.log(qsur) / 3, rel=1e-9)


def test_the_best_utilization_of_a_cube_is_that_of_the_ball():
    spread = _Spread()
    angles = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    spread.add(np.stack([np.cos(angles), np.sin(angles)], 1))
    assert spread.log_qsur == pytest.approx(math.log(math.pi / 4) / 2, abs=1e-12)


def test_too_few_rows_have_no_qsur_and_constants_no_kurtosis():
    few, flat = _Spread(), _Spread()
    few.add(RNG.standard_normal((5, 8)))
    flat.add(np.zeros((5, 2)))
    assert math.isnan(few.log_qsur)
    assert math.isnan(flat.kurtosis)
    assert math.isnan(flat.peak)
    assert math.isnan(flat.log_qsur)


@pytest.mark.parametrize(
    "step",
    [
        t.Hadamard(16, seed=0),
        t.Hadamard(16, scale=0.5),
        t.Scaling(np.arange(1.0, 17.0)),
        t.Reciprocal(t.Scaling(np.arange(1.0, 17.0))),
        t.Repeated(t.Scaling(np.array([2.0, 3.0])), 4, 2),
        t.Invertible(np.random.default_rng(3).standard_normal((2, 8, 8))),
    ],
    ids=lambda step: step.kind,
)
def test_the_gain_is_the_change_of_qsur(step):
    model, relations, inputs = pair(step, exponent=0.0)
    rows = measure_outliers(model, inputs, relations, {"t": step})
    assert log_determinant(step) == pytest.approx(np.linalg.slogdet(step.matrix())[1], abs=1e-9)
    (row,) = [row for row in rows if row.name == "h"]
    assert row.kind == "activation"
    assert row.transform == "t"
    assert (row.channels, row.rows) == (16, 200)
    exact = _Spread()
    h = inputs[0]["x"] @ model.graph.initializers["w"].const_value.weight.numpy()
    exact.add(h)
    assert row.qsur_after == pytest.approx(exact.log_qsur, abs=1e-9)
    assert row.kurtosis_after == pytest.approx(exact.kurtosis, rel=1e-9)
    before = _Spread()
    before.add(inputs[0]["x"] @ model.graph.initializers["w"].const_value.weight.inner.numpy())
    assert row.kurtosis_before == pytest.approx(before.kurtosis, rel=1e-6)
    assert row.qsur_before == pytest.approx(before.log_qsur, abs=1e-9)


def test_a_rotation_spreads_the_channel_that_sticks_out():
    step = t.Hadamard(16, seed=0)
    model, relations, inputs = pair(step)
    rows = {row.name: row for row in measure_outliers(model, inputs, relations, {"t": step})}
    assert rows.keys() == {"h", "n", "w", "v"}
    h = rows["h"]
    assert h.kurtosis_before > 10 > 4 > h.kurtosis_after
    assert h.peak_before > 20 * h.peak_after
    assert 1 < h.qsur_gain <= h.qsur_possible + 1e-12
    assert rows["w"].kind == "weight"
    assert rows["w"].qsur_gain > 1


def test_without_a_rotation_or_a_scaling_there_is_nothing_to_tell():
    step = t.Selection(16, tuple(reversed(range(16))))
    model, relations, inputs = pair(step)
    assert measure_outliers(model, inputs, relations, {"t": step}) == ()
    assert measure_outliers(model, inputs, {}, {}) == ()
    centred = {"h": {"transform": "centre", "axis": -1}}
    assert measure_outliers(model, inputs, centred, {}) == ()


def test_what_came_before_a_centring_is_not_undone():
    step = t.Hadamard(16, seed=0)
    model, _, inputs = pair(step)
    steps = [{"transform": "centre", "axis": -1}, {"transform": "t", "axis": -1}]
    rows = measure_outliers(model, inputs, {"h": {"transform": "composition", "steps": steps}}, {"t": step})
    assert [row.name for row in rows if row.kind == "activation"] == ["h"]
    assert rows[0].transform == "centre · t"
