"""The driver: the order of requirements, what a refusal leaves, how relations compose."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from networks import digest, network

from rewrite.ir.edit import Editor
from rewrite.ir.program import Program
from rewrite.rule import Applied, Breach, Change, Pass, Refused, Requirement, Site, apply_pass, explain, steps

TWO = "two (float[B, 4] x) => (float[B, 4] z) { y = Neg (x) z = Neg (y) }"


def no_double(rule: "RemoveNeg", site: Site) -> Breach | None:
    node = site.nodes[0]
    after = [use.node for use in node.outputs[0].uses()]
    return Breach(after[0], "a second Neg follows") if any(one.op_type == "Neg" for one in after) else None


def small(rule: "RemoveNeg", site: Site) -> Breach | None:
    return None if rule.allowed else Breach(site.nodes[0], "not allowed")


@dataclass(frozen=True)
class RemoveNeg(Pass[Site]):
    """Remove Neg (which is no equivalence; the driver does not prove)."""

    allowed: bool = True
    name: ClassVar[str] = "remove-neg"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "no second Neg follows", no_double),
        Requirement("R2", "it is allowed", small),
    )

    def sites(self, program: Program) -> Iterator[Site]:
        for node in list(program.model.graph):
            if node.graph is not None and node.op_type == "Neg":
                yield Site(node.outputs[0].name or "", (node,))

    def rewrite(self, site: Site, change: Change) -> None:
        change.editor.redirect(site.nodes[0].outputs[0], site.nodes[0].inputs[0])
        change.notes.append("one Neg less")


def test_a_site_is_refused_at_the_first_broken_requirement_with_its_place() -> None:
    program = network(TWO)
    first, second = apply_pass(program, RemoveNeg(allowed=False))
    assert isinstance(first, Refused)
    assert (first.refusal.requirement, first.refusal.node, first.refusal.operator) == ("R1", "Neg_1", "Neg")
    assert second.refusal.requirement == "R2"
    assert str(first) == "remove-neg at y: refused, R1 (no second Neg follows): a second Neg follows, at Neg Neg_1"
    assert first.to_json() == {
        **{"pass": "remove-neg", "site": "y", "outcome": "refused", "requirement": "R1"},
        **{"text": "no second Neg follows", "node": "Neg_1", "operator": "Neg", "reason": "a second Neg follows"},
    }


def test_a_refusal_leaves_the_digest() -> None:
    program = network(TWO)
    before = digest(program)
    apply_pass(program, RemoveNeg(allowed=False))
    assert digest(program) == before


def test_applied_sites_are_recorded_in_order() -> None:
    program = network(TWO)
    outcomes = apply_pass(program, RemoveNeg())
    assert [isinstance(outcome, Applied) for outcome in outcomes] == [False, True]
    assert program.records == outcomes
    assert outcomes[1].to_json() == {
        **{"pass": "remove-neg", "site": "z", "outcome": "applied", "nodes": ["Neg_1"]},
        **{"changed": {}, "untied_bytes": 0, "notes": ["one Neg less"]},
    }


def test_explain_touches_nothing() -> None:
    program = network(TWO)
    before = digest(program)
    assert len(explain(program, RemoveNeg())) == 2
    assert digest(program) == before
    assert program.records == []


def test_relations_compose_in_order() -> None:
    program = network(TWO)
    value = program.model.graph[0].outputs[0]
    for transform in ("centre", "rotate"):
        Change(program, transform, Editor(program.model, transform)).relate(value, transform, 1)
    assert [step["transform"] for step in steps(program.relations["y"])] == ["centre", "rotate"]
    assert steps(program.relations.get("z")) == []


def test_a_requirement_prints_its_number_and_text() -> None:
    assert repr(RemoveNeg.requires[0]) == "R1  no second Neg follows"
