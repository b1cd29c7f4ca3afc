"""What every pass owes: the same function, related values, idempotence, a record, a name, and mutants that show."""

import json
from pathlib import Path

import pytest
from mutants import MUTANTS
from networks import difference, digest, feed, network, operators, values_agree
from pass_examples import EXAMPLES, PRE_LN

import rewrite.passes
from rewrite.ir.program import Program
from rewrite.passes import (
    APPROXIMATIONS,
    PASSES,
    CenterResidual,
    FoldBatchnorm,
    FoldNorm,
    FoldParametrization,
    FoldScale,
    MergeAffine,
    MergeBranches,
)
from rewrite.proof import prove
from rewrite.recipes import RECIPES, passes_of
from rewrite.rule import Applied, apply_pass, explain

BY_NAME = {rule.name: rule for rule in PASSES}


def rewritten(name: str) -> tuple[Program, Program]:
    """The example of a pass before and after it."""
    text, inputs = EXAMPLES[name]
    before = network(text, inputs)
    after = before.clone()
    apply_pass(after, BY_NAME[name]())
    return before, after


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_computes_the_same_function(name: str) -> None:
    before, after = rewritten(name)
    assert digest(before) != digest(after)
    assert difference(before, after, feed(before)) <= 1.0


@pytest.mark.parametrize("name", EXAMPLES)
def test_values_of_one_name_are_related_as_recorded(name: str) -> None:
    before, after = rewritten(name)
    related = values_agree(before, after, feed(before))
    assert bool(related) == (name == "center-residual")


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_second_run_changes_nothing(name: str) -> None:
    _, after = rewritten(name)
    once = digest(after)
    assert not [outcome for outcome in apply_pass(after, BY_NAME[name]()) if isinstance(outcome, Applied)]
    assert digest(after) == once


@pytest.mark.parametrize("name", EXAMPLES)
def test_explain_is_the_driver_on_a_clone(name: str) -> None:
    text, inputs = EXAMPLES[name]
    program = network(text, inputs)
    untouched = digest(program)
    said = explain(program, BY_NAME[name]())
    assert digest(program) == untouched
    assert not program.records
    assert said == apply_pass(program, BY_NAME[name]())
    assert program.records == said


@pytest.mark.parametrize("name", EXAMPLES)
def test_records_are_printable_plain_and_stamped(name: str) -> None:
    _, after = rewritten(name)
    assert any(isinstance(record, Applied) for record in after.records)
    replaced_again = {old for record in after.records if isinstance(record, Applied) for old in record.changed.values()}
    for record in after.records:
        assert str(record).startswith(f"{name} at ")
        plain = json.loads(json.dumps(record.to_json()))
        assert (plain["pass"], plain["outcome"] == "applied") == (name, isinstance(record, Applied))
        if isinstance(record, Applied):
            assert record.changed
            assert set(record.changed) <= {*after.model.graph.initializers, *replaced_again}
    assert name in {node.metadata_props.get("rewrite.pass") for node in after.model.graph}


def test_the_three_together_strip_a_network_of_layernorms_scales_and_shifts() -> None:
    before = network(PRE_LN, ("ids",))
    after = before.clone()
    for rule in passes_of(None, None):
        apply_pass(after, rule)
    assert difference(before, after, feed(before)) <= 1.0
    assert operators(after).count("RMSNormalization") == 3
    assert "LayerNormalization" not in operators(after)
    scales = [node.inputs[1] for node in after.model.graph if node.op_type == "RMSNormalization"]
    assert {scale.name for scale in scales} == {"ones.8"}


def test_saving_rounds_once_and_loads_back(tmp_path: Path) -> None:
    import numpy as np
    import onnx_ir as ir

    from rewrite.check.reference import evaluate

    before, after = rewritten("center-residual")
    after.save(tmp_path / "model.onnx")
    loaded = ir.load(tmp_path / "model.onnx")
    inputs = feed(before)
    assert np.array_equal(evaluate(loaded, inputs)["logits"], evaluate(after.model, inputs)["logits"])


@pytest.mark.parametrize("rule", [*PASSES, *APPROXIMATIONS])
def test_file_class_and_command_agree(rule: type) -> None:
    module = rule.__module__.rpartition(".")[2]
    assert rule.name == module.replace("_", "-")
    assert rule.__name__ == "".join(part.capitalize() for part in module.split("_"))


def test_every_file_is_a_pass_in_the_tuple() -> None:
    folder = Path(rewrite.passes.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == {rule.__module__.rpartition(".")[2] for rule in (*PASSES, *APPROXIMATIONS)}
    affine = (FoldParametrization, FoldBatchnorm, FoldScale, MergeAffine, MergeBranches)
    assert RECIPES["default"] == tuple(rule.name for rule in (*affine, CenterResidual, FoldNorm))
    order = [rule.name for rule in PASSES]
    assert sorted(RECIPES["default"], key=order.index) == list(RECIPES["default"])


@pytest.mark.parametrize("rule", [*PASSES, *APPROXIMATIONS])
def test_requirements_are_numbered_and_said_once(rule: type) -> None:
    assert [requirement.id for requirement in rule.requires] == [f"R{i + 1}" for i in range(len(rule.requires))]
    assert len({requirement.text for requirement in rule.requires}) == len(rule.requires)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [pytest.param(name, mutant, id=f"{name}-{mutant.__name__}") for name in EXAMPLES for mutant in MUTANTS[name]],
)
def test_a_mutant_computes_another_function(name: str, mutant) -> None:
    before, after = rewritten(name)
    inputs = feed(before)
    assert difference(before, after, inputs) <= 1.0, "the positive control"
    assert difference(before, mutant(after), inputs) > 1e4
    assert difference(before, after, inputs) <= 1.0, "a mutant is a clone"
    assert prove(before.model, after.model).verdict.holds, "the positive control of the proof"
    assert not prove(before.model, mutant(after).model).verdict.holds


def test_an_untied_head_costs_what_the_record_says() -> None:
    _, after = rewritten("center-residual")
    (record,) = after.records
    assert record.untied_bytes == 11 * 8 * 4
    assert record.changed["table.centred"] == "table"
    assert "352 bytes untied" in str(record)


def test_the_bare_name_is_not_claimed() -> None:
    source = Path(rewrite.passes.__file__).read_text()
    with pytest.raises(ImportError, match=r"expected 'rewrite\.passes'"):
        exec(compile(source, "passes/__init__.py", "exec"), {"__name__": "passes"})


def test_centring_an_rmsnorm_network_is_refused_and_would_be_wrong() -> None:
    text = """
    rms (int64[B, S] ids, float[7, 6] table, float[6] g, float[6, 5] w) => (float[B, S, 5] y)
    { x = Gather (table, ids) n = RMSNormalization (x, g) y = MatMul (n, w) }"""
    before = network(text, ("ids",))
    (outcome,) = explain(before, CenterResidual())
    assert outcome.refusal.requirement == "R2"
    (mutant,) = MUTANTS["a network that must be refused"]
    assert difference(before, mutant(before), feed(before)) > 1e4
    assert not prove(before.model, mutant(before).model).verdict.holds
