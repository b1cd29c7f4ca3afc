"""Pass, Site, Requirement, Refusal: the shape every pass has, and the one driver that runs them all.

A pass says where it might apply (`sites`), what must hold there (`requires`) and what it then does (`rewrite`). The
driver does the rest, in one order that no pass changes:

    find a site → refuse at the first broken requirement, or rewrite → record → find the next on the graph as it is now

A refusal is a value with a place, never an exception, and leaves the graph as it was. `explain` is the same driver on a
clone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import onnx_ir as ir

from rewrite.basis.operators import bias_of
from rewrite.basis.regions import Obstruction, Use
from rewrite.ir.constants import is_constant, weight_behind
from rewrite.ir.edit import ORIGIN, TRANSFORM, Editor
from rewrite.ir.program import Program
from rewrite.ir.weights import Add, Weight
from rewrite.proof.transforms import Step

# ------------------------------------------------------------------------------------------------- what a pass declares


@dataclass(frozen=True)
class Site:
    """A place where a pass may apply. `name` is that of the value it is known by, `nodes` are what would change."""

    name: str
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class Breach:
    """Where and why a requirement does not hold. `node` is None where the place is a graph input."""

    node: ir.Node | None
    reason: str

    @classmethod
    def at(cls, met: Obstruction | None) -> Breach | None:
        """The breach that an obstruction of a region is."""
        return None if met is None else cls(met.node, met.reason)


@dataclass(frozen=True)
class Requirement:
    """One side condition. `check(pass, site)` finds where it is broken; None where it holds."""

    id: str
    text: str
    check: Callable[[Any, Any], Breach | None]

    def __repr__(self) -> str:
        return f"{self.id}  {self.text}"


SomeSite = TypeVar("SomeSite", bound=Site)


class Pass(ABC, Generic[SomeSite]):
    """One equivalence. Subclasses are frozen dataclasses; their fields are the options of the command line."""

    name: ClassVar[str]
    requires: ClassVar[tuple[Requirement, ...]]
    approximates: ClassVar[bool] = False
    """Whether what it makes is only close to what was there: it comes behind all equivalences, and is declared."""

    @abstractmethod
    def sites(self, program: Program) -> Iterator[SomeSite]:
        """Places on the graph as it is when each is asked for; one that is done is not a place any more."""

    @abstractmethod
    def rewrite(self, site: SomeSite, change: Change) -> None:
        """Apply the rule at a site where every requirement holds."""


# --------------------------------------------------------------------------------------------------- what comes of it


@dataclass(frozen=True)
class Refusal:
    """A requirement that is broken: which, at which node and operator, and why."""

    requirement: str
    text: str
    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        place = f"{self.operator} {self.node}".strip() if self.node else "the graph's inputs"
        return f"{self.requirement} ({self.text}): {self.reason}, at {place}"


@dataclass(frozen=True)
class Insertion:
    """A transform that was inserted explicitly: behind which value, under which name, and what that is worth.

    `cost` is of the operators inserted, `gain` what the operators named in `serves` save; both are estimates in
    nanoseconds, of the target's kernels at nominal sizes.
    """

    transform: str
    behind: str
    value: str
    cost: float
    gain: float
    serves: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """This insertion in plain types."""
        return {
            **{"transform": self.transform, "behind": self.behind, "value": self.value},
            **{"cost_ns": self.cost, "gain_ns": self.gain, "serves": list(self.serves)},
        }

    def __str__(self) -> str:
        served = f"{len(self.serves)} norm{'s' * (len(self.serves) != 1)}"
        cost, gain = f"{self.cost / 1000:.2g} µs", f"{self.gain / 1000:.2g} µs"
        return f"{self.transform} inserted behind {self.behind}: cost {cost}, gain {gain} in {served}"


@dataclass(frozen=True)
class Applied:
    """A rule was applied at a site. `changed` maps new initializers to the ones they were computed from."""

    pass_name: str
    site: str
    nodes: tuple[str, ...]
    changed: dict[str, str]
    untied_bytes: int = 0
    notes: tuple[str, ...] = ()
    insertions: tuple[Insertion, ...] = ()

    def to_json(self) -> dict[str, object]:
        """This record in plain types."""
        return {
            **{"pass": self.pass_name, "site": self.site, "outcome": "applied", "nodes": list(self.nodes)},
            **{"changed": dict(self.changed), "untied_bytes": self.untied_bytes, "notes": list(self.notes)},
            **({"insertions": [one.to_json() for one in self.insertions]} if self.insertions else {}),
        }

    def __str__(self) -> str:
        untied = (f"{self.untied_bytes:,} bytes untied",) if self.untied_bytes else ()
        notes = "".join(f"; {note}" for note in (*untied, *self.notes))
        return f"{self.pass_name} at {self.site}: applied, {len(self.changed)} constants changed{notes}"


@dataclass(frozen=True)
class Refused:
    """A rule was not applied at a site, and why."""

    pass_name: str
    site: str
    refusal: Refusal

    def to_json(self) -> dict[str, object]:
        """This record in plain types."""
        return {
            **{"pass": self.pass_name, "site": self.site, "outcome": "refused"},
            **{"requirement": self.refusal.requirement, "text": self.refusal.text, "node": self.refusal.node},
            **{"operator": self.refusal.operator, "reason": self.refusal.reason},
        }

    def __str__(self) -> str:
        return f"{self.pass_name} at {self.site}: refused, {self.refusal}"


Outcome = Applied | Refused

# ----------------------------------------------------------------------------------------------------------- the driver


def apply_pass(program: Program, rule: Pass[Any]) -> list[Outcome]:
    """Run one pass over a program, in place; what it did and refused is returned and appended to `program.records`."""
    outcomes: list[Outcome] = []
    editor = Editor(program.model, rule.name)
    for site in rule.sites(program):
        refusal = _first_refusal(rule, site)
        if refusal is not None:
            outcomes.append(Refused(rule.name, site.name, refusal))
            continue
        nodes = tuple(node.name or node.op_type for node in site.nodes)
        change = Change(program, rule.name, editor)
        rule.rewrite(site, change)
        editor.clean()
        notes, inserted = (*change.notes, *map(str, change.insertions)), tuple(change.insertions)
        outcomes.append(Applied(rule.name, site.name, nodes, change.changed, change.untied_bytes, notes, inserted))
    program.records.extend(outcomes)
    return outcomes


def explain(program: Program, rule: Pass[Any]) -> list[Outcome]:
    """What `apply_pass` would do; the program stays as it is."""
    return apply_pass(program.clone(), rule)


def _first_refusal(rule: Pass[Any], site: Site) -> Refusal | None:
    for requirement in rule.requires:
        breach = requirement.check(rule, site)
        if breach is not None:
            name, operator = ("", "") if breach.node is None else (breach.node.name or "", breach.node.op_type)
            return Refusal(requirement.id, requirement.text, name, operator, breach.reason)
    return None


@dataclass
class Change:
    """One application of a rule: the editor, and the record of what was done with it."""

    program: Program
    pass_name: str
    editor: Editor
    changed: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])
    insertions: list[Insertion] = field(default_factory=list[Insertion])
    _copies: list[tuple[ir.Value, ir.Value]] = field(default_factory=list[tuple[ir.Value, ir.Value]])

    def absorb(self, use: Use, weight: Weight, suffix: str, key: tuple[object, ...] | None = None) -> ir.Value:
        """Let one operand hold `weight`, which was computed from the constant it holds now.

        `key` names the computation: operands that held one constant and changed by one computation share the new one.
        """
        old = use.value
        if not is_constant(old):
            raise ValueError(f"{old.name} is not a constant, so nothing can be absorbed into it")
        if old.dtype is None:
            raise ValueError(f"{old.name} has no dtype")
        name = f"{old.name}.{suffix}"
        if key is None:
            new = self.editor.initializer(name, weight, old.dtype)
        else:
            new = self.editor.derived((old, suffix, *key), name, weight, old.dtype)
        use.node.replace_input_with(use.position, new)
        self.stamp(use.node)
        self.changed[new.name or ""] = old.name or ""
        self._copies.append((old, new))
        return new

    def shift(self, product: ir.Node, addition: Weight) -> None:
        """Add a vector to a node's result: to the bias that is there, or as a new one."""
        result, bias = product.outputs[0], bias_of(product)
        name, edit = result.name, self.editor
        if bias is not None:
            self.absorb(bias, Add((weight_behind(bias.value), addition)), "shifted")
            self.rename(result, "unshifted")
            return
        if result.dtype is None:
            raise ValueError(f"{name} has no dtype")
        vector = edit.initializer(f"{name}.bias", addition, result.dtype)
        attributes = {attribute.name: attribute.value for attribute in product.attributes.values()}
        again = edit.node(
            product.op_type, product.inputs, attributes, before=product, name=f"{name}.unshifted", like=result
        )
        total = edit.node("Add", [again, vector], before=product, name=f"{name}.shifted", like=result)
        edit.take_over(result, total)
        self.notes.append(f"{name} has a new bias of {addition.shape[0]} numbers")

    def stamp(self, node: ir.Node) -> None:
        """Write on a node that this pass changed it."""
        node.metadata_props[ORIGIN] = self.pass_name

    def computes(self, node: ir.Node, transform: Step) -> None:
        """Write on a node that it takes part in computing `transform` at run time."""
        node.metadata_props[TRANSFORM] = self.program.register(transform)

    def rename(self, value: ir.Value, suffix: str) -> None:
        """Give a value whose meaning changed a name that no value of the original has."""
        value.name = self.editor.name(f"{value.name}.{suffix}")

    def relate(self, value: ir.Value, transform: str | Step, axis: int) -> None:
        """Record that `value` is now the original's value of the same name, transformed along `axis`.

        `transform` is "centre", or a transform or shift of `rewrite.proof.transforms`, which gets an id.
        """
        name = value.name or ""
        if not isinstance(transform, str):
            transform = self.program.register(transform)
        step = {"transform": transform, "axis": axis, "pass": self.pass_name}
        earlier = steps(self.program.relations.get(name))
        self.program.relations[name] = (
            step if not earlier else {"transform": "composition", "steps": [*earlier, step], "pass": self.pass_name}
        )

    @property
    def untied_bytes(self) -> int:
        """Bytes of constants that are one more than there were: the old one is still read, or became two."""
        origin: dict[ir.Value, ir.Value] = {}
        for old, new in self._copies:
            origin[new] = origin.get(old, old)
        heirs: dict[ir.Value, list[int]] = {}
        for new, old in origin.items():
            if new.uses() and new.const_value is not None:
                heirs.setdefault(old, []).append(new.const_value.nbytes)
        kept = {old for old in heirs if old.uses() or old.is_graph_output()}
        return sum(sum(sizes) - (0 if old in kept else max(sizes)) for old, sizes in heirs.items())


def steps(relation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The transforms a relation is composed of, first to last; none for the identity."""
    if relation is None:
        return []
    return list(relation["steps"]) if relation["transform"] == "composition" else [relation]


def read_elsewhere(use: Use, within: list[Use]) -> ir.Node | None:
    """A node that reads the constant of `use` other than through `within`; None where there is none."""
    inside = {(other.node, other.position) for other in within}
    for other in use.value.uses():
        if (other.node, other.idx) not in inside:
            return other.node
    return None
