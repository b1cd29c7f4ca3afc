"""Where the proof does not follow all sites of an approximation, those that it follows stay and the rest is said."""

from __future__ import annotations

import pytest
from networks import network

from rewrite import pipeline
from rewrite.followed import followed
from rewrite.ir.program import Program
from rewrite.passes import FoldNorm, QuantizeDynamic, QuantizeOperators, QuantizeWeights
from rewrite.proof import Proof, Verdict, prove
from rewrite.rule import Applied, Refused

LAYERS = """
layers (float[B, 64] x, float[64, 64] layer_0_in, float[64, 64] layer_0_out, float[64, 64] layer_1_in,
        float[64, 64] layer_1_out, float[64, 64] head) => (float[B, 64] y)
{
    a = MatMul (x, layer_0_in) b = Tanh (a) c = MatMul (b, layer_0_out)
    d = MatMul (c, layer_1_in) e = Tanh (d) f = MatMul (e, layer_1_out)
    y = MatMul (f, head)
}
"""


def prepared(text: str = LAYERS) -> Program:
    program = network(text)
    program.exact = program.model.clone()
    return program


def proved(program: Program) -> Proof:
    return prove(program.original, program.model, steps=program.steps)


@pytest.mark.parametrize("bad", [set(), {"in"}, {"in", "head"}, {"in", "out"}])
def test_sites_of_layers_are_kept_or_left_together(bad: set[str]) -> None:
    """The check fails while one of the bad sites is quantized, whatever else is."""
    tried: list[int] = []

    def check(program: Program) -> Proof:
        tried.append(1)
        names = [name for name in program.model.graph.initializers if name.endswith(".codes")]
        wrong = [name for name in names if any(f"{part}.codes" in name for part in bad)]
        return Proof(Verdict("UNKNOWN", node=wrong[0], reason="it is bad")) if wrong else proved(program)

    found = followed(prepared(), QuantizeDynamic(keep=("nothing",)), check)
    assert found is not None
    work, outcomes, proof = found
    assert proof.verdict.kind == "EQUAL_MODULO"
    refused = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
    kept = {outcome.site for outcome in outcomes if isinstance(outcome, Applied)}
    assert {one.site.rpartition("_")[2] for one in refused} == bad
    assert len(kept) + len(refused) == 5
    assert {one.refusal.requirement for one in refused} <= {"PROOF"}
    assert all(one.refusal.reason == "it is bad" and one.refusal.node for one in refused)
    assert {site.name.removesuffix(".codes") for site in proof.sites if site.kind == "weight"} == kept
    # Three groups of names: every one alone, halves of halves, and the last with the true codes.
    assert len(tried) <= 2 * 3 + 1
    assert work is not None


def test_where_no_site_is_followed_there_is_none() -> None:
    def never(program: Program) -> Proof:
        return Proof(Verdict("UNKNOWN", reason="never"))

    assert followed(prepared(), QuantizeWeights(method="nearest"), never) is None
    assert followed(prepared(), QuantizeOperators(), never) is None


def test_codes_chosen_well_are_proved_again() -> None:
    """The draft is followed and the result is not: nothing is kept."""
    answers = iter([True, False])

    def once(program: Program) -> Proof:
        return proved(program) if next(answers) else Proof(Verdict("UNKNOWN", reason="the second time"))

    assert followed(prepared(), QuantizeDynamic(), once) is None


def test_a_network_whose_canonical_form_is_not_followed_is_quantized_as_it_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equivalences need that form; what is proved behind them are products and codes."""
    program, true = network(LAYERS), pipeline.prove
    canonical = [True]

    def doubtful(*arguments, **options) -> Proof:
        if canonical:
            canonical.pop()
            return Proof(Verdict("UNKNOWN", node="n", reason="not canonical"))
        return true(*arguments, **options)

    monkeypatch.setattr(pipeline, "prove", doubtful)
    _, outcomes, proof = pipeline._proved_stepwise(program, [FoldNorm(), QuantizeDynamic()], ())
    assert proof.verdict.kind == "EQUAL_MODULO"
    assert [one.refusal.reason for one in outcomes if isinstance(one, Refused)] == ["not canonical"]
    assert sum(isinstance(one, Applied) for one in outcomes) == 5


def test_a_weight_that_the_proof_cannot_follow_leaves_the_others() -> None:
    """With the real proof: what is computed of constants alone is known as numbers, and those are off."""
    text = """table (float[B, 64] x, float[64, 64] v, float[64, 64] first, float[64, 64] second, float[5, 64] t)
        => (float[B, 64] y, float[5, 64] z)
    { a = MatMul (x, v) y = Tanh (a) c = MatMul (t, first) d = Relu (c) z = MatMul (d, second) }"""
    result = pipeline.apply(network(text), [QuantizeDynamic()])
    assert result.certificate.verdict.kind == "EQUAL_MODULO"
    assert [one.site for one in result.outcomes if isinstance(one, Applied)] == ["v"]
    refused = {one.site: one.refusal for one in result.outcomes if isinstance(one, Refused)}
    assert {site for site, refusal in refused.items() if refusal.requirement == "PROOF"} == {"first", "second"}
    assert refused["first"].reason != refused["second"].reason
    assert "at  " not in str(refused["first"])
