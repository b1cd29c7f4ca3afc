"""The zoo judges rightly: controls that are wrong, that crash and that refuse, on one small network."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from networks import network

from rewrite.basis.regions import Use
from rewrite.errors import RequestError
from rewrite.ir.constants import weight_behind
from rewrite.ir.program import Program
from rewrite.ir.weights import Constant, Scale
from rewrite.passes import FoldNorm
from rewrite.rule import Breach, Change, Pass, Requirement, Site

TEXT = """
network (float[batch, 6] x, float[6] scale, float[6] bias, float[6, 5] w) => (float[batch, 5] y) {
    normed = LayerNormalization <epsilon = 0.00001> (x, scale, bias)
    y = MatMul (normed, w)
}
"""


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import zoo

    yield zoo
    del sys.modules["zoo"]


@dataclass(frozen=True)
class Nudge(Pass[Site]):
    """A wrong pass: it multiplies the matrix."""

    name: ClassVar[str] = "nudge"
    requires: ClassVar[tuple[Requirement, ...]] = ()
    factor: ClassVar[float] = 1.0

    def sites(self, program: Program) -> Iterator[Site]:
        (product,) = (node for node in program.model.graph if node.op_type == "MatMul")
        yield Site(product.outputs[0].name or "", (product,))

    def rewrite(self, site: Site, change: Change) -> None:
        use = Use(site.nodes[0], 1, 0)
        weight = weight_behind(use.value)
        change.absorb(use, Scale(weight, Constant(np.full((), self.factor))), "nudged")


class TooLittleToBeSeen(Nudge):
    """Within the ulp that a proof allows each constant, and no rounding of anything."""

    name = "too-little"
    factor = 1 + 3e-8


class TooMuch(Nudge):
    name = "too-much"
    factor = 1.001


class Right(Nudge):
    name = "right"


class Crashing(Nudge):
    name = "crashing"

    def rewrite(self, site: Site, change: Change) -> None:
        raise RuntimeError("no such thing")


class Refusing(Nudge):
    name = "refusing"
    requires = (Requirement("R1", "nothing is right", lambda rule, site: Breach(site.nodes[0], "it is here")),)


CONTROLS = (Right, TooLittleToBeSeen, TooMuch, Crashing, Refusing, FoldNorm)


@pytest.fixture
def result(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("rewrite.recipes.RECIPES", {"default": ("fold-norm",)})
    monkeypatch.setattr(zoo, "_STREAM", ())
    return json.loads(json.dumps(zoo.try_family(network(TEXT), CONTROLS, together=True)))


def test_each_control_is_judged_as_what_it_is(result: dict[str, Any]) -> None:
    states = {name: each["status"] for name, each in result["passes"].items()}
    assert states == {
        "right": "proved",
        "too-little": "SILENT ERROR",
        "too-much": "wrong, not proved",
        "crashing": "crash",
        "refusing": "refused",
        "fold-norm": "proved",
    }
    assert result["passes"]["refusing"]["refused"][0]["reason"] == "it is here"
    assert result["status"] == "proved"
    assert result["default"]["status"] == "proved"
    assert result["default"]["norms"] == {"LayerNormalization": 1}
    assert result["default"]["noise"] < 8


def test_silent_errors_and_crashes_are_named(zoo: Any, result: dict[str, Any]) -> None:
    found = zoo.faults("control", result)
    assert [line.split(":")[0] for line in found] == [
        "control, too-little",
        "control, crashing",
        "control, all passes",
    ]
    assert "SILENT ERROR" in found[0]
    assert "no such thing" in found[1]
    assert [line.split(":")[0] for line in zoo.suspects("control", result)] == ["control, too-much"]


def test_the_page_shows_them(zoo: Any, result: dict[str, Any]) -> None:
    page = zoo.page({"control": {"nodes": 2, "torch": 1e-7}}, {"control": result}, {"control": "decoder"}, 1)
    assert "Silent errors: 1. Crashes: 2." in page
    assert "| control | 1 ×1.0 | **SILENT ERROR** | PROOF | **crash** | R1 | 1 ×" in page
    assert "| refusing | R1 | nothing is right | 1 | control: it is here |" in page
    assert "| too-much | … is n ulp off at (n, n) | 1 | control, at " in page


def test_the_comparison_rejects_what_is_wrong(zoo: Any) -> None:
    exact = np.linspace(1.0, 2.0, 12).reshape(3, 4)
    assert zoo.relative_error(exact, exact) == 0
    wrong: list[Callable[[np.ndarray], np.ndarray]] = [
        *(lambda a: a * 1.001, lambda a: a * 0.5, lambda a: a * 1000, np.negative, np.transpose, np.zeros_like),
        *(lambda a: np.where(a == 1, np.nan, a), lambda a: np.roll(a, 1)),
    ]
    for each in wrong:
        assert not zoo.relative_error(each(exact), exact) <= zoo.CAPTURED / 2
    assert zoo.relative_error(np.array([1, 2]), np.array([1, 3])) == np.inf


def test_a_run_above_the_noise_is_a_silent_error(zoo: Any) -> None:
    assert zoo.status("EQUAL(0.5 ulp)", 0.0, "within noise") == "proved"
    assert zoo.status("EQUAL(0.5 ulp)", 0.0, "unsettled") == "proved"
    for numerical in ("above noise", "different"):
        assert zoo.status("EQUAL(0.5 ulp)", 0.0, numerical) == "SILENT ERROR"
    assert zoo.status("UNKNOWN(y, because)", 0.0, None) == "not proved"
    assert zoo.status("EQUAL", float("nan"), None) == "SILENT ERROR"


def test_what_rewrite_says_it_cannot_do_is_no_crash(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def declining(*_: object, **__: object) -> None:
        raise RequestError("is too large", where="the network", remedy="take another")

    monkeypatch.setattr("rewrite.convert", declining)
    result = zoo.try_family(network(TEXT), ())
    assert result["default"]["status"] == "declined"
    assert not zoo.faults("control", result)


def test_only_some_passes_run_again(zoo: Any, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewrite.recipes.RECIPES", {"default": ()})
    assert zoo._again(["unproved"], result) == ["too-much"]
    assert zoo._again(["right", "unproved"], result) == ["right", "too-much"]
    assert zoo._again(["refusing"], result) == ["refusing"]
    marked = {**result, "passes": {name: {**each, "old": True} for name, each in result["passes"].items()}}
    again = zoo.try_family(network(TEXT), CONTROLS, known=marked, again=["too-much"])
    assert [name for name, each in again["passes"].items() if "old" not in each] == ["too-much"]
    assert again["passes"]["too-much"]["status"] == "wrong, not proved"


def test_the_proofs_reasons_are_grouped(zoo: Any) -> None:
    one = "model.layers.0.self_attn.q_proj.weight is 1.2 ulp off at (3, 46)"
    other = "bert.encoder.layer.1.key.weight_transposed.scaled is 6.95e+06 ulp off at (12, 0)"
    trials = {
        name: {"passes": {"smooth": {"status": "not proved", "cause": cause, "node": f"{name}/Mul"}}}
        for name, cause in {"large": one, "small": other, "else": "no value of the original is the same sum"}.items()
    }
    rows = zoo.unproved(trials, {"large": 9, "small": 4, "else": 1})
    assert rows == [
        ("smooth", "… is n ulp off at (n, n)", ["small", "large"], "small/Mul"),
        ("smooth", "no value of the original is the same sum", ["else"], "else/Mul"),
    ]


def test_a_pass_runs_after_those_it_builds_on(zoo: Any) -> None:
    assert zoo.before("fold-scale") == ()
    assert zoo.before("fold-norm") == ("fold-scale", "center-residual")
    assert zoo.before("any-other") == ("fold-scale", "center-residual", "fold-norm")
