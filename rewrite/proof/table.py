"""Names for values that are equal: the table that both graphs share.

`intern` gives a form its number. A form of the rewritten graph gets the number of the original's form that it equals,
if there is one, and with it the demands on shipped constants under which it does; otherwise a number of its own, and
whatever is computed from it has no counterpart either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewrite.proof.chains import Chain, shipped
from rewrite.proof.constants import Constant, sources
from rewrite.proof.demands import SHIPPED, Demand, conflict
from rewrite.proof.dimensions import Shape
from rewrite.proof.forms import IDENTITY, Atom, Form, Term
from rewrite.proof.linear import LOST, Comparer, substituted
from rewrite.proof.products import Match, Mismatch, Outcome
from rewrite.proof.sites import Dequantized, Measure, Site
from rewrite.proof.transforms import Transform

TOTAL = frozenset(
    "Abs Cos Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Mish Relu Selu Sigmoid Sin Softplus Softsign Tanh"
    " ThresholdedRelu".split()
)
"""Functions that have a value at every number."""


@dataclass
class Stranger:
    """A value of the rewritten graph that equals none of the original's: where, and why not."""

    node: str
    reason: str
    ulps: float = 0.0


@dataclass
class Table:
    comparer: Comparer = field(default_factory=Comparer)
    atoms: dict[tuple[Any, ...], Atom] = field(default_factory=dict)
    forms: list[Form] = field(default_factory=list)
    strangers: dict[int, Stranger] = field(default_factory=dict)
    demands: dict[Demand, str] = field(default_factory=dict)
    ulps: float = 0.0
    measures: dict[tuple[Any, ...], Measure] = field(default_factory=dict)
    sites: dict[tuple[Any, ...], tuple[Dequantized, str]] = field(default_factory=dict)
    rounded: dict[str, Dequantized] = field(default_factory=dict)
    activations: list[Site] = field(default_factory=list)
    saturating: set[tuple[Any, ...]] = field(default_factory=set)
    overflows: dict[str, str] = field(default_factory=dict)
    declared: set[str] = field(default_factory=set)
    block: int | None = None
    found: list[Transform] = field(default_factory=list)
    sure: set[int] = field(default_factory=set)
    products: dict[tuple[Any, ...], Form] = field(default_factory=dict)
    _defined: dict[int, bool] = field(default_factory=dict)
    _numbers: dict[tuple[Any, ...], int] = field(default_factory=dict)
    _alike: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)
    _constants: dict[tuple[Any, ...], list[Constant]] = field(default_factory=dict)

    def atom(self, key: tuple[Any, ...], shape: Shape, kind: str, node: str, side: str) -> Atom:
        """The one atom of this key. Its shape is the first seen, which is the original's where it occurs there."""
        if key not in self.atoms:
            self.atoms[key] = Atom(len(self.atoms), key, shape, kind, node, side)
        return self.atoms[key]

    def tell_apart(self) -> None:
        """The original is known: its values that are not `sure` are spare for the other graph."""
        for atom in self.atoms.values():
            given = atom.key[0] in ("one", "eye", "input")
            object.__setattr__(atom, "spare", not given and atom.number not in self.sure)
        self._defined.clear()

    def defined(self, atom: Atom) -> bool:
        """Whether it is a number wherever the original's outputs are: they rest on it, or it is one for all inputs."""
        if atom.sure:
            return True
        if atom.number not in self._defined:
            self._defined[atom.number] = self._is_total(atom.key)
        return self._defined[atom.number]

    def _is_total(self, key: tuple[Any, ...]) -> bool:
        kind = key[0]
        if kind in ("one", "eye", "input"):
            return True
        operands: tuple[Any, ...] = ()
        positive = kind == "rms" and key[2] > 0
        whole = kind == "power" and key[2] > 0 and key[2] == round(key[2])
        filled = kind == "averaged" and (key[3] or all(window.filled for window in key[2]))
        if filled or kind in ("sampled", "mean", "sum", "value", "reshape") or positive or whole:
            operands = key[1:2]
        elif kind == "product":
            operands = key[1]
        elif kind == "contraction":
            operands = key[1:3]
        elif kind == "operator" and key[1] == "" and key[2] in TOTAL and all(one[0] == "form" for one in key[4]):
            operands = tuple(one[1] for one in key[4])
        return bool(operands) and all(self.defined(term.atom) for n in operands for term in self.forms[n].terms)

    def intern(self, form: Form, side: str, node: str, hint: int | None = None) -> int:
        """The number of `form`; `hint` is the number of the original's value of the same name, tried first."""
        number = self._numbers.get((form.key, form.origins))
        if number is not None:
            return number
        number = self._numbers.get((form.key, ()))
        if number is not None and self.forms[number].key == form.key:
            # The same numbers, written down elsewhere: equal as long as these are what was shipped.
            self.held((name for name, _ in form.origins), node)
            self._numbers[form.key, form.origins] = number
            return number
        alike = self._alike.setdefault(form.skeleton, [])
        nearest: Mismatch | None = None
        close: tuple[float, int, Match] | None = None
        for candidate in sorted(alike, key=lambda n: n != hint):
            outcome = self.match(form, self.forms[candidate])
            own = candidate in self.strangers
            if isinstance(outcome, Match) and not outcome.exact and outcome.measures and candidate != hint:
                # Codes are close to more than they stand for: what they are closest to is asked of them.
                apart = max(each.relative for each in outcome.measures)
                if side == "rewritten" and not own and (close is None or apart < close[0]):
                    close = (apart, candidate, outcome)
                continue
            if isinstance(outcome, Match) and (outcome.exact or (side == "rewritten" and not own)):
                self.commit(outcome, node)
                if own:
                    # Two values of the rewritten graph alone: nothing else says what their constants ought to be.
                    self.hold(self.forms[candidate], node)
                    self.hold(form, node)
                self._numbers[form.key, form.origins] = candidate
                return candidate
            if isinstance(outcome, Mismatch) and (nearest is None or candidate == hint or outcome.ulps < nearest.ulps):
                nearest = nearest if nearest is not None and candidate != hint and hint in alike else outcome
        if close is not None:
            self.commit(close[2], node)
            self._numbers[form.key, form.origins] = close[1]
            return close[1]
        number = len(self.forms)
        self.forms.append(form)
        self._numbers[form.key, form.origins] = number
        alike.append(number)
        if side == "rewritten":
            self.strangers[number] = self._stranger(form, node, nearest)
        return number

    def candidates(self, form: Form) -> list[int]:
        """Values of the original that are the same sum of the same nonlinear results as `form`, the latest first."""
        return [n for n in reversed(self._alike.get(form.skeleton, [])) if n not in self.strangers]

    def known(self, form: Form) -> int | None:
        """The number of `form`, if it has one."""
        return self._numbers.get((form.key, form.origins))

    def _stranger(self, form: Form, node: str, nearest: Mismatch | None) -> Stranger:
        for term in form.terms:
            if term.atom.side == "rewritten":
                return Stranger(term.atom.node, f"no value of the original equals the result of {term.atom.node}")
        if nearest is not None:
            return Stranger(node, nearest.reason, nearest.ulps)
        return Stranger(node, "no value of the original is the same sum of the same nonlinear results")

    def match(self, rewritten: Form, original: Form) -> Outcome:
        """Whether two forms of one skeleton are equal."""
        if rewritten.skeleton != original.skeleton:
            return Mismatch("values are sums of different nonlinear results")
        total = Match()
        left: list[tuple[Sequence[Chain], Sequence[Chain], int | None]] = []
        for ours, theirs in _pairs(rewritten, original):
            term = ours or theirs
            if term is None:
                continue
            axes = {t.axis for t in (ours, theirs) if t is not None} - {None}
            if len(axes) > 1:
                return Mismatch("maps act on different axes")
            axis = next(iter(axes), None)
            size = term.atom.shape[axis].constant if axis is not None else None
            mine, known = ours.chains if ours else (), theirs.chains if theirs else ()
            if self.is_constant(term.atom):
                left.append((mine, known, size))
                continue
            outcome = self.comparer.compare(mine, known, size)
            if isinstance(outcome, Mismatch):
                return outcome
            total = total + outcome
        solutions = dict(total.solutions)
        for mine, known, size in left:
            # A shift that a solved matrix carries on is carried on by its exact value.
            carried = substituted(mine, solutions) if solutions else mine
            outcome = self.comparer.compare(carried, known, size)
            if isinstance(outcome, Mismatch) and solutions:
                outcome = self.comparer.compare(mine, known, size)
            if isinstance(outcome, Mismatch):
                return outcome
            total = total + outcome
            solutions.update(outcome.solutions)
        return total

    def is_constant(self, atom: Atom) -> bool:
        """Whether it is the same for all inputs: 1, or that at some places and 0 at others."""
        if atom.key[0] != "sampled":
            return atom.key == ("one",)
        known = self.forms[atom.key[1]].terms
        return bool(known) and all(self.is_constant(term.atom) for term in known)

    def commit(self, match: Match, node: str) -> None:
        self.ulps = max(self.ulps, match.ulps if match.ulps > LOST else 0.0)
        for measure in match.measures:
            known = self.measures.get(measure.constant.key)
            if known is None or known.steps < measure.steps:
                self.measures[measure.constant.key] = measure
        for demand in match.demands:
            self.demands.setdefault(demand, node)

    def pin(self, constants: Iterable[Constant], node: str) -> None:
        """Constants that were used as they are."""
        for constant in constants:
            for stored in sources(constant):
                if stored.side == "rewritten":
                    self.demands.setdefault(Demand(stored.name, (), SHIPPED), node)

    def held(self, names: Iterable[str], node: str) -> None:
        """Numbers that must be what was shipped."""
        for name in names:
            self.demands.setdefault(Demand(name, (), SHIPPED), node)

    def hold(self, form: Form, node: str) -> None:
        """Constants and numbers in `form` must be what was shipped."""
        for term in form.terms:
            for chain in term.chains:
                for demand in shipped(chain.factors):
                    self.demands.setdefault(demand, node)

    def constant_name(self, constant: Constant) -> tuple[Any, ...] | None:
        """The name that `constant_number` gave to an equal constant before."""
        for index, known in enumerate(self._constants.get((constant.shape, constant.type), [])):
            if self.comparer.same_constant(constant, known):
                return ("constant", constant.shape, constant.type, index)
        return None

    def constant_number(self, constant: Constant, node: str) -> tuple[Any, ...]:
        """A name for a constant operand of an opaque operator: equal values of one integer type, equal names."""
        self.pin([constant], node)
        alike = self._constants.setdefault((constant.shape, constant.type), [])
        for index, known in enumerate(alike):
            if self.comparer.same_constant(constant, known):
                return ("constant", constant.shape, constant.type, index)
        alike.append(constant)
        return ("constant", constant.shape, constant.type, len(alike) - 1)

    def conflict(self) -> tuple[str, str] | None:
        """A shipped constant of which two uses demand different values: its name, and the second use's node."""
        return conflict(self.demands.items())


def _pairs(rewritten: Form, original: Form) -> list[tuple[Term | None, Term | None]]:
    """Terms of equal atom and view, in order; additive constants may stand on one side only."""
    pairs: list[tuple[Term | None, Term | None]] = []
    ours = [t for t in rewritten.terms if t.atom.key != ("one",)]
    theirs = [t for t in original.terms if t.atom.key != ("one",)]
    pairs += list(zip(ours, theirs))
    constants: dict[Any, list[Term | None]] = {}
    for side, form in enumerate((rewritten, original)):
        for term in form.terms:
            if term.atom.key == ("one",):
                # Numbers and vectors constant along the same axes are told apart by their views.
                constants.setdefault(term.view, [None, None])[side] = term
    return pairs + [(a, b) for a, b in constants.values()]


__all__ = ["IDENTITY", "Stranger", "Table"]
