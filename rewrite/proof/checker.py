"""The proof: both graphs in normal form, and every output the same value.

original ⟶ normal form      rewritten ⟶ normal form      output by output the same form
───────────────────────────────────────────────────────────────────────────────────────  one Ŵ per shipped constant
                     rewritten(Ŵ) = original(W)    (relation.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from rewrite.proof import forms
from rewrite.proof.constants import Stored, same_values
from rewrite.proof.demands import SHIPPED
from rewrite.proof.forms import Form
from rewrite.proof.linear import Comparer
from rewrite.proof.relation import Verdict
from rewrite.proof.sites import SATURATES, Measure, Site, as_site, combined
from rewrite.proof.table import Stranger, Table
from rewrite.proof.transforms import Selection, Step
from rewrite.proof.walk import Relation, Walk


@dataclass
class Proof:
    """The answer, and what it rests on.

    `outputs` maps every output to its own verdict; `solved` names the shipped constants whose exact value Ŵ is another
    than what was shipped; `claims` lists relation claims that were checked, with their outcome. `sites` are the places
    where the rewritten network computes with codes, weights first.
    """

    verdict: Verdict
    outputs: dict[str, Verdict] = field(default_factory=dict)
    solved: tuple[str, ...] = ()
    claims: dict[str, bool] = field(default_factory=dict)
    values: int = 0
    sites: tuple[Site, ...] = ()

    def __str__(self) -> str:
        return str(self.verdict)


Progress = Callable[[str], None]


def prove(
    original: ir.Model,
    rewritten: ir.Model,
    *,
    claims: Mapping[str, Mapping[str, object]] | None = None,
    transforms: Mapping[str, Step] | None = None,
    ulps: float = 1.0,
    block: int | None = None,
    steps: float | Mapping[str, float] = 1.0,
    approximations: Sequence[Mapping[str, object]] | None = None,
) -> Proof:
    """Prove that `rewritten` computes `original`, or say where the proof stops.

    `claims` are a certificate's relations (value name → {"transform", "axis"}) and `transforms` what they name. Each is
    checked where its value is computed, and a false one spoils the verdict, because then something that was written
    down is not true. One that names no value of the rewritten graph says nothing.

    `ulps` is how far a shipped constant may be from its exact value. More than 1 is not EQUAL but EQUAL_MODULO.
    `block` is how many channels a block has where a runtime's file keeps them in blocks; that too is declared.

    `steps` is how many steps codes may be from what they stand for, or says it by the name of the tensor that holds
    them. Rounding to nearest takes half a step, and no convention of it more than one; clipping and methods that
    compensate errors take more, which has to be said. Codes that are no closer to it than zeros are refused at any
    number of steps. With a certificate's `approximations` each is allowed what is declared of it, and the list of sites
    has to be the list that is found.
    """
    interface = _interface(original, rewritten)
    if interface is not None:
        return Proof(interface)
    table = Table(Comparer(ulps, _allowed(steps, approximations)), block=block)
    try:
        relations = {name: _relation(name, claim, transforms or {}) for name, claim in (claims or {}).items()}
        reductions = _reductions(relations)
    except (AttributeError, TypeError, ValueError) as error:
        return Proof(Verdict("UNKNOWN", reason=f"the certificate's relations cannot be read: {error}"))
    first = Walk(original, "original", table, reductions=reductions)
    second = Walk(rewritten, "rewritten", table, partner=first, relations=relations)
    for walk in (first, second):
        try:
            walk.run()
            if walk is first:
                table.tell_apart()
        except Exception as error:  # noqa: BLE001 - whatever stops the walk, of such a graph nothing is known
            cause = _cause(table) if walk is second else None
            sites = _sites(table)
            if cause is not None:
                return Proof(Verdict("UNKNOWN", cause.ulps, cause.node, cause.reason), sites=sites)
            reason = f"{walk.side}: {error or type(error).__name__}"
            return Proof(Verdict("UNKNOWN", node=walk.node, reason=reason), sites=sites)
    names = [value.name or "" for value in original.graph.outputs]
    try:
        outputs = {name: _output(first, second, name) for name in names}
        checked = dict(second.related)
    except Exception as error:  # noqa: BLE001 - as above
        reason = str(error) or type(error).__name__
        return Proof(Verdict("UNKNOWN", node=second.node, reason=reason), sites=_sites(table))
    proof = Proof(
        _holding(table),
        outputs,
        tuple(sorted({d.name for d in table.demands if d.value != ("shipped",) and d.name})),
        checked,
        len(table.atoms),
    )
    refusal = _listed(proof, table)
    failed = next((verdict for verdict in outputs.values() if not verdict.holds), None)
    conflict = table.conflict()
    false = next((name for name, holds in checked.items() if not holds), None)
    if failed is not None:
        proof.verdict = failed
    elif conflict is not None:
        name, node = conflict
        proof.verdict = Verdict("UNKNOWN", node=node, reason=f"two uses of {name} ask for different exact values of it")
    elif false is not None:
        proof.verdict = Verdict("UNKNOWN", node=false, reason="the certificate's relation of this value is not true")
    elif table.ulps > ulps:
        proof.verdict = Verdict("UNKNOWN", table.ulps, reason=f"a constant is {table.ulps:.3g} ulp off")
    elif refusal is not None:
        proof.verdict = refusal
    elif approximations is not None and (difference := _undeclared(proof.sites, approximations)) is not None:
        proof.verdict = Verdict("UNKNOWN", node=difference[0], reason=f"not as declared: {difference[1]}")
    return proof


def _allowed(
    steps: float | Mapping[str, float], approximations: Sequence[Mapping[str, object]] | None
) -> Callable[[str], float]:
    """How many steps the codes of a tensor may be off."""
    if approximations is not None:
        found = {str(each.get("name")): each.get("error_steps") for each in approximations}
        steps = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
    if isinstance(steps, Mapping):
        limits = dict(steps)
        return lambda name: limits.get(name, 1.0)
    limit = steps
    return lambda name: limit


def _sites(table: Table) -> tuple[Site, ...]:
    """The sites that were met, weights first; of a weight that was not compared no error is known."""
    parts: dict[object, list[Measure]] = {}
    for measure in table.measures.values():
        if (stored := measure.constant.stored) is not None:
            parts.setdefault(stored.key, []).append(measure)
    held = {demand.name for demand in table.demands if demand.value == SHIPPED}
    weights: list[Site] = []
    for key, (constant, node) in table.sites.items():
        known = parts.get(key, [])
        measure = combined(constant, known) if known or constant.name in held else None
        weights.append(as_site(constant, node, measure, SATURATES if key in table.saturating else "none"))
    return (*weights, *table.activations)


def _listed(proof: Proof, table: Table) -> Verdict | None:
    """Enter the sites and what they declare into a proof; or why it is none."""
    proof.sites = _sites(table)
    measured = {stored.name for each in table.measures.values() if (stored := each.constant.stored) is not None}
    for site in proof.sites:
        if site.kind == "weight" and site.error_relative is None and site.name in measured:
            return Verdict("UNKNOWN", node=site.node, reason=f"uses of {site.name} overlap: its error is not known")
        if site.error_relative is not None and site.error_relative >= 1.0:
            reason = f"codes {site.name} are off by {site.error_relative:.3g} of what they stand for, as zeros are"
            return Verdict("UNKNOWN", node=site.node, reason=reason)
    if all(each.holds for each in proof.outputs.values()):
        # What no output rests on stands for nothing.
        proof.sites = tuple(s for s in proof.sites if s.kind == "activation" or s.error_relative is not None)
    if table.overflows:
        node, reason = next(iter(table.overflows.items()))
        return Verdict("UNKNOWN", node=node, reason=reason)
    conditions = _conditions(proof.sites)
    if conditions and proof.verdict.holds:
        said = [f"{table.ulps:.2g} ulp", *conditions, *([proof.verdict.reason] if proof.verdict.reason else [])]
        proof.verdict = Verdict("EQUAL_MODULO", table.ulps, reason="; ".join(said))
        proof.outputs = {name: proof.verdict if each.holds else each for name, each in proof.outputs.items()}
    return None


def _conditions(sites: Sequence[Site]) -> list[str]:
    """What is declared of sites; nothing where codes are exactly what they stand for."""
    weights = [site for site in sites if site.kind == "weight"]
    found: list[str] = []
    worst = max((site.error_steps or 0.0 for site in weights), default=0.0)
    if worst:
        found.append(f"{_count(len(weights), 'weight site')}, error ≤ {_above(worst)} steps")
    activations = len(sites) - len(weights)
    if activations:
        found.append(_count(activations, "activation site"))
    saturating = sum(site.saturation == SATURATES for site in sites)
    if saturating:
        found.append(f"VNNI or pair sums within 16 bits at {_count(saturating, 'site')}")
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _above(value: float) -> str:
    """A number of three digits that is not below `value`, unless by what float64 loses."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit - 2.0**-20) * unit:.3g}"


def _undeclared(sites: Sequence[Site], declared: Sequence[Mapping[str, object]]) -> tuple[str, str] | None:
    """The first site that is not as declared, or is declared and not found: where, and what."""
    left = list(declared)
    for site in sites:
        known = next((e for e in left if (e.get("name"), e.get("kind"), e.get("node"))
                      == (site.name, site.kind, site.node)), None)  # fmt: skip
        if known is None:
            return site.node, f"{site.name} is a site of which nothing is said"
        difference = site.disagreement(known)
        if difference is not None:
            return site.node, difference
        left.remove(known)
    if left:
        return str(left[0].get("node")), f"{left[0].get('name')} is no site"
    return None


def _holding(table: Table) -> Verdict:
    """EQUAL, or EQUAL_MODULO what had to be declared."""
    declared = sorted(table.declared)
    if table.ulps > 1.0:
        declared.append(f"constants within {table.ulps:.3g} ulp of exact")
    return Verdict("EQUAL_MODULO" if declared else "EQUAL", table.ulps, reason="; ".join(declared))


def _cause(table: Table) -> Stranger | None:
    """The first value without a counterpart that only rests on values that have one."""
    for number in sorted(table.strangers):
        if all(term.atom.side != "rewritten" for term in table.forms[number].terms):
            return table.strangers[number]
    return None


def _interface(original: ir.Model, rewritten: ir.Model) -> Verdict | None:
    """Inputs and outputs must agree in name, order of outputs, type, and static sizes."""
    for what, ours, theirs in (
        ("input", rewritten.graph.inputs, original.graph.inputs),
        ("output", rewritten.graph.outputs, original.graph.outputs),
    ):
        mine = {value.name: value for value in ours}
        if len(mine) != len(theirs) or [v.name for v in theirs if v.name not in mine]:
            return Verdict(
                "UNKNOWN", reason=f"the {what}s are {sorted(map(str, mine))}, not {[v.name for v in theirs]}"
            )
        if what == "output" and [value.name for value in ours] != [value.name for value in theirs]:
            return Verdict("UNKNOWN", reason="the outputs stand in another order")
        for value in theirs:
            other = mine[value.name]
            if other.dtype != value.dtype:
                return Verdict(
                    "UNKNOWN", node=str(value.name), reason=f"the {what} is {other.dtype}, not {value.dtype}"
                )
            if value.shape is not None and other.shape is not None:
                if len(value.shape) != len(other.shape):
                    return Verdict("UNKNOWN", node=str(value.name), reason=f"the {what} has another rank")
                for a, b in zip(value.shape, other.shape):
                    if isinstance(a, int) and isinstance(b, int) and a != b:
                        return Verdict("UNKNOWN", node=str(value.name), reason=f"the {what} has another static size")
    return _defaults(original, rewritten)


def _defaults(original: ir.Model, rewritten: ir.Model) -> Verdict | None:
    """An input that may be left out has the same value then."""
    ours, theirs = rewritten.graph.initializers, original.graph.initializers
    for value in original.graph.inputs:
        name = value.name or ""
        mine, known = (each[name].const_value if name in each else None for each in (ours, theirs))
        if mine is None and known is None:
            continue
        if (
            mine is None
            or known is None
            or not same_values(Stored("rewritten", name, mine), Stored("original", name, known))
        ):
            return Verdict("UNKNOWN", node=name, reason="the input's default is another")
    return None


def _output(first: Walk, second: Walk, name: str) -> Verdict:
    theirs, ours = first.values[name], second.values[name]
    second.node = name
    wanted = first.intern(first.form(theirs))
    found = second.table.intern(second.form(ours), "rewritten", name, wanted)
    if found == wanted:
        return _holding(second.table)
    stranger = _first_stranger(second.table, second.form(ours), found)
    return Verdict("UNKNOWN", stranger.ulps, stranger.node, stranger.reason)


def _first_stranger(table: Table, form: Form, number: int) -> Stranger:
    """The first value, in order of computation, that has no counterpart and on which `form` rests."""
    seen: set[int] = set()
    stack, reached = [form], {number}
    while stack:
        for term in stack.pop().terms:
            if term.atom.number in seen or term.atom.side != "rewritten":
                continue
            seen.add(term.atom.number)
            for operand in _operand_numbers(term.atom.key):
                if operand < len(table.forms) and operand not in reached:
                    reached.add(operand)
                    stack.append(table.forms[operand])
    known = [n for n in sorted(reached) if n in table.strangers]
    # A value whose terms are all known fails by its own constants: that is a cause, the rest are consequences.
    causes = [n for n in known if all(term.atom.side != "rewritten" for term in table.forms[n].terms)]
    if causes:
        return table.strangers[causes[0]]
    if known:
        return table.strangers[known[0]]
    return Stranger("", "the output is another value of the original")


def _operand_numbers(key: tuple[object, ...]) -> list[int]:
    """Every form number in an atom's key."""
    kind = key[0]
    if kind in ("power", "rms", "value", "mean", "sum", "sampled", "averaged", "reshape", "quantized"):
        return [key[1]] if isinstance(key[1], int) else []
    if kind in ("gather", "gathernd"):
        return [key[2], *([key[1][1]] if key[1][0] == "form" else [])]  # type: ignore[index, list-item]
    if kind == "product":
        return list(key[1])  # type: ignore[arg-type]
    if kind in ("contraction", "guard"):
        return [n for n in key[1:] if isinstance(n, int)]
    if kind == "operator":
        return [operand[1] for operand in key[4] if operand[0] == "form"]  # type: ignore[union-attr, index]
    if kind == "onehot" and isinstance(key[1], tuple) and key[1][0] == "form":
        return [key[1][1]]
    return []


def _reductions(relations: Mapping[str, Relation]) -> dict[str, tuple[int, Selection]]:
    """Values of the original of which a relation leaves channels out."""
    found: dict[str, tuple[int, Selection]] = {}
    for relation in relations.values():
        for step, axis in relation.steps[:1]:
            if isinstance(step, Selection) and not step.permutation:
                found[relation.partner] = (axis, step)
    return found


def _relation(name: str, claim: Mapping[str, object], transforms: Mapping[str, Step]) -> Relation:
    """A claim as it is checked. An unknown transform stays a name, of which nothing is true."""
    steps: list[tuple[Step | str, int]] = []
    for step in claim.get("steps") or [claim]:  # type: ignore[union-attr]
        transform = str(step.get("transform", "identity"))  # type: ignore[union-attr]
        if transform != "identity":
            steps.append((transforms.get(transform, transform), int(str(step.get("axis", -1)))))  # type: ignore[union-attr]
    return Relation(str(claim.get("partner", name)), tuple(steps))


__all__ = ["Proof", "forms", "prove"]
