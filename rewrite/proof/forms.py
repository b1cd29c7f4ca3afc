"""The normal form: every value is an affine expression over the results of nonlinear operators.

    value  =  Σ  view ∘ (atom · M)          M = F₁·F₂·…  on one axis of the atom,  view: a change of layout

An **atom** is a graph input or the result of an operator that is not affine, named by the operator and its operands, so
that equal atoms are one object in both graphs. A **view** says for every axis of the value which pieces of which axes
of the atom it runs over; two ways of writing the same reshape and transpose give the same view. Constants are maps
from the atom `one` (a bias is `one`·b) and, with two axes, from an identity matrix (a position table is eye·E).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from rewrite.proof.chains import Centre, Chain, Diagonal, Exact, Factor, Matrix, Mean, Scalar, Spread
from rewrite.proof.dimensions import ONE, Dim, Shape, alike, broadcast, product
from rewrite.proof.transforms import Repeated, Selection

# ── Views ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Piece:
    """Digits of one axis of the atom: entries i·stride for i < size (whole axis: stride 1, size of the axis)."""

    axis: int
    stride: Dim
    size: Dim


@dataclass(frozen=True)
class Repeat:
    """The same entry `size` times."""

    size: Dim


@dataclass(frozen=True)
class Taken:
    """Entries start, start + step, … of `inner`; or those at constant indices, of which `step` is then the digest."""

    inner: Axis
    start: Dim
    step: int | str
    size: Dim


STRETCHED = "stretched"
"""The `step` of an axis that is repeated if its size, a symbol, is 1, and stays as it is if not."""


@dataclass(frozen=True)
class Padded:
    """`inner` at `offset` of an axis of `size`, zero elsewhere."""

    inner: Axis
    offset: Dim
    size: Dim


Element = Piece | Repeat | Taken | Padded
Axis = tuple[Element, ...]
"""Elements of which an axis is the row-major product; () is an axis along which nothing changes."""


@dataclass(frozen=True)
class View:
    """One Axis for each axis of the value, and `fixed`: selected single entries of axes that are gone."""

    axes: tuple[Axis, ...]
    fixed: tuple[Element, ...] = ()

    @cached_property
    def order(self) -> str:
        return repr((self.axes, self.fixed))

    @cached_property
    def _hash(self) -> int:
        return hash((self.axes, self.fixed))

    def __hash__(self) -> int:
        return self._hash


def tidy(axis: Iterable[Element]) -> Axis:
    """Merge neighbouring digits of one axis, drop axes of size 1 of the atom, and read a plain repetition as ()."""
    merged: list[Element] = []
    for element in axis:
        if isinstance(element, Piece | Repeat) and element.size == ONE:
            continue
        last = merged[-1] if merged else None
        if isinstance(element, Piece) and isinstance(last, Piece) and last.axis == element.axis:
            if last.stride == element.stride * element.size:
                merged[-1] = Piece(element.axis, element.stride, last.size * element.size)
                continue
        if isinstance(element, Repeat) and isinstance(last, Repeat):
            merged[-1] = Repeat(last.size * element.size)
            continue
        merged.append(element)
    return () if all(isinstance(element, Repeat) for element in merged) else tuple(merged)


def regroup(elements: Sequence[Element], shape: Shape) -> tuple[list[Axis], list[Element]] | None:
    """Cut a row-major list of elements into axes of the sizes `shape`; None where a size would cut a symbol.

    Also returns the single entries (size 1 pieces of a slice) that belong to no axis.
    """
    queue = [e for e in elements if not (isinstance(e, Piece | Repeat) and e.size == ONE)]
    axes: list[Axis] = []
    fixed: list[Element] = []
    for size in shape:
        axis: list[Element] = []
        missing = size
        while missing != ONE:
            while queue and queue[0].size == ONE:
                fixed.append(queue.pop(0))
            if not queue:
                return None
            element = queue[0]
            rest = missing.quotient(element.size)
            if rest is not None:
                axis.append(queue.pop(0))
                missing = rest
                continue
            inner = element.size.quotient(missing)
            if inner is None or not isinstance(element, Piece | Repeat):
                return None
            if isinstance(element, Piece):
                axis.append(Piece(element.axis, element.stride * inner, missing))
                queue[0] = Piece(element.axis, element.stride, inner)
            else:
                axis.append(Repeat(missing))
                queue[0] = Repeat(inner)
            missing = ONE
        axes.append(tidy(axis))
    if any(element.size != ONE for element in queue):
        return None
    return axes, [*fixed, *queue]


# ── Atoms, terms, forms ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Atom:
    """A value that is not taken apart. `key` is what it is; `node` names where it was first seen, for messages."""

    number: int
    key: tuple[Any, ...]
    shape: Shape
    kind: str
    node: str
    side: str
    spare: bool = field(default=False, compare=False)
    """Whether it is the original's, but may be undefined where the original's outputs are not."""

    @property
    def sure(self) -> bool:
        """Whether it is defined wherever the original's outputs are."""
        return self.side == "original" and not self.spare

    def __repr__(self) -> str:
        return f"Atom({self.number}, {self.key[:2]})"


@dataclass(frozen=True)
class Term:
    """view ∘ (atom · Σ chains), the chains acting on `axis` of the atom (None: each is a number)."""

    atom: Atom
    view: View
    axis: int | None
    chains: tuple[Chain, ...]

    @property
    def place(self) -> tuple[int, str, int]:
        return (self.atom.number, self.view.order, -1 if self.axis is None else self.axis)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.atom.number, self.view, self.axis, tuple(chain.key for chain in self.chains))

    def axis_size(self, axis: int) -> Dim:
        """The size of `axis` of the atom after the map."""
        if axis == self.axis:
            out = self.chains[0].sizes()[1]
            if out is not None:
                return Dim.of(out)
        return self.atom.shape[axis]

    def whole(self, axis: int) -> int | None:
        """The atom's axis that the value's `axis` is, all of it; None where it is not one whole axis."""
        elements = self.view.axes[axis]
        if len(elements) == 1 and isinstance(element := elements[0], Piece):
            if element.stride == ONE and element.size == self.axis_size(element.axis):
                return element.axis
        return None

    def mapped(self, axis: int, factor: Factor, atom_axis: int, size: Dim) -> Term | None:
        """Followed by `factor` on the value's `axis`, which is the atom's `atom_axis`; None is the zero term."""
        chains = tuple(new for chain in self.chains if (new := chain.then(factor)) is not None)
        if not chains:
            return None
        axes = list(self.view.axes)
        # A mapped axis of size 1 (a mean) keeps its piece: what is added to it later spreads it again.
        axes[axis] = (Piece(atom_axis, ONE, size),)
        return Term(self.atom, View(tuple(axes), self.view.fixed), atom_axis, chains)


IDENTITY = (Chain(),)


def cancelled(atom: Atom, view: View) -> list[Term]:
    """What is left of a value whose maps cancel: nothing, as long as the original's outputs rest on that value.

    A value that only the rewritten graph computes, or that the original selects others in place of, may be undefined
    where the original is not (√x − √x below 0), so it stays, times 0.
    """
    return [] if atom.sure else [Term(atom, view, None, (Chain((Scalar(0.0),)),))]


@dataclass(frozen=True)
class Form:
    """A sum of terms of the same `shape`; no terms is zero. `kind` is 'f', 'i' or 'b'."""

    shape: Shape
    terms: tuple[Term, ...]
    kind: str = "f"

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return (self.shape, self.kind, tuple(term.key for term in self.terms))

    @cached_property
    def skeleton(self) -> tuple[Any, ...]:
        """What forms that may be equal have in common: everything but constants and additive constants."""
        return (self.shape, self.kind, tuple((t.atom.number, t.view) for t in self.terms if t.atom.key != ("one",)))

    @cached_property
    def origins(self) -> tuple[tuple[str, int], ...]:
        """The rewritten graph's shipped numbers in front of the chains, and how they make them.

        `key` does not tell them apart. The power 0 says that a number is a sum.
        """
        return tuple(
            (name, 0 if chain.scalar.fixed else power)
            for term in self.terms
            for chain in term.chains
            for name, power in chain.scalar.origins
        )

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def atom(self) -> Atom | None:
        """The atom that this form is, unchanged."""
        if len(self.terms) == 1 and self.terms[0].chains == IDENTITY:
            term = self.terms[0]
            if term.view == identity_view(term.atom) and self.shape == term.atom.shape:
                return term.atom
        return None


def identity_view(atom: Atom) -> View:
    return View(tuple(tidy([Piece(axis, ONE, size)]) for axis, size in enumerate(atom.shape)))


def form_of(atom: Atom) -> Form:
    return Form(atom.shape, (Term(atom, identity_view(atom), None, IDENTITY),), atom.kind)


def collect(shape: Shape, terms: Iterable[Term], kind: str = "f") -> Form:
    """The sum of `terms`: like terms merged, x − x·(mean) read as centring, sorted."""
    merged: dict[tuple[Any, ...], list[Term]] = {}
    for term in terms:
        merged.setdefault((term.atom.number, term.view), []).append(term)
    result: list[Term] = []
    for group in merged.values():
        axes = {term.axis for term in group} - {None}
        if len(axes) > 1:
            # Maps on different axes of one atom stay apart; numbers go with the first.
            for axis in sorted(axes):  # type: ignore[type-var]
                result += _merge([t for t in group if t.axis == axis or (t.axis is None and axis == min(axes))], axis)  # type: ignore[type-var]
        else:
            result += _merge(group, next(iter(axes), None))
    return Form(shape, tuple(sorted(result, key=lambda term: term.place)), kind)


def _merge(group: Sequence[Term], axis: int | None) -> list[Term]:
    chains: list[Chain] = []
    numbers: dict[tuple[Any, ...], Chain] = {}
    for chain in (chain for term in group for chain in term.chains):
        body = tuple(factor.key for factor in chain.body)
        if body in numbers:
            known = numbers[body].scalar
            total = known.summed(chain.scalar)
            numbers[body] = Chain((total, *chain.body))
        else:
            numbers[body] = chain
    for chain in numbers.values():
        scaled = Chain(chain.body).scaled(chain.scalar)
        if scaled is not None:
            chains.append(scaled)
    chains = _read_centring(chains)
    if not chains:
        return cancelled(group[0].atom, group[0].view)
    if all(not chain.body for chain in chains):
        axis = None
    return [Term(group[0].atom, group[0].view, axis, tuple(sorted(chains, key=lambda chain: chain.order)))]


def _read_centring(chains: list[Chain]) -> list[Chain]:
    """A − A·(mean)·1ᵀ is A·P."""
    for chain in chains:
        if len(chain.body) >= 2 and isinstance(chain.body[-1], Spread) and isinstance(chain.body[-2], Mean):
            size = chain.body[-1].size
            minus = replace(chain.scalar, value=-chain.scalar.value)
            plain = next((c for c in chains if c.body == chain.body[:-2] and c.scalar.value == minus.value), None)
            if chain.body[-2].size == size and plain is not None:
                rest = [other for other in chains if other not in (chain, plain)]
                # Only equal numbers make it a centring: both are used, and the product names both.
                both = replace(plain.scalar.summed(minus), value=plain.scalar.value)
                centred = Chain(plain.body).scaled(both)
                centre = centred.then(Centre(size)) if centred is not None else None
                return _read_centring([*rest, centre]) if centre is not None else rest
    return chains


# ── Affine operations ───────────────────────────────────────────────────────────────────────────────────────────────


def widened(form: Form, shape: Shape) -> Form:
    """`form` broadcast to `shape`. Along a new or repeated axis nothing changes, so most views stay as they are.

    An axis of symbolic size that meets another size may be 1 and be repeated, or not: its view says so and is whole no
    longer.
    """
    if form.shape == shape:
        return form
    lead = len(shape) - form.rank
    terms = []
    for term in form.terms:
        axes: list[Axis] = [()] * lead + list(term.view.axes)
        chains, fixed = term.chains, term.view.fixed
        for axis, elements in enumerate(axes):
            old = form.shape[axis - lead] if axis >= lead else ONE
            if old != ONE and not alike(old, shape[axis]) and elements:
                axes[axis] = (Taken(elements, Dim.of(0), STRETCHED, shape[axis]),)
            elif old == ONE and shape[axis] != ONE and elements:
                size = shape[axis].constant
                element = elements[0]
                if size is not None and len(elements) == 1 and isinstance(element, Piece) and element.axis == term.axis:
                    chains = tuple(new for c in chains if (new := c.then(Spread(size))) is not None)
                    axes[axis] = (Piece(element.axis, ONE, Dim.of(size)),)
                else:
                    fixed = _fixed(fixed, [e for e in elements if isinstance(e, Taken | Padded)])
                    axes[axis] = ()
        terms.append(Term(term.atom, View(tuple(axes), fixed), term.axis, chains))
    return Form(shape, tuple(terms), form.kind)


def narrowed(form: Form) -> Form:
    """`form` with size 1 along every axis on which nothing changes: what `widened` would make it of."""
    same = [all(not term.view.axes[axis] for term in form.terms) for axis in range(form.rank)]
    return Form(tuple(ONE if s else n for s, n in zip(same, form.shape)), form.terms, form.kind)


def add(*forms: Form) -> Form:
    shape = broadcast(*(form.shape for form in forms))
    return collect(shape, (term for form in forms for term in widened(form, shape).terms))


def scaled(form: Form, scalar: Scalar) -> Form:
    terms = []
    for term in form.terms:
        chains = tuple(new for chain in term.chains if (new := chain.scaled(scalar)) is not None)
        terms += [Term(term.atom, term.view, term.axis, chains)] if chains else cancelled(term.atom, term.view)
    return collect(form.shape, terms, form.kind)


def mapped(form: Form, axis: int, factor: Factor) -> Form | None:
    """`form` followed by `factor` along `axis`; None where a term's axis is cut or not the mapped one."""
    axis %= form.rank
    size_in = form.shape[axis].constant
    if size_in is None:
        return None
    if isinstance(factor, Matrix):
        size_out = factor.constant.shape[1]
    elif isinstance(factor, Mean):
        size_out = 1
    elif isinstance(factor, Exact):
        if factor.transform.size != size_in:
            return None
        size_out = factor.transform.width
    else:
        size_out = size_in
    terms = []
    for term in form.terms:
        elements = term.view.axes[axis]
        if not elements:
            # Constant along the axis: 1ᵀ·factor. Centring kills it; a number's own axis becomes the mapped one.
            if isinstance(factor, Centre):
                terms += cancelled(term.atom, term.view)
                continue
            if isinstance(factor, Mean) or (isinstance(factor, Exact) and isinstance(factor.transform, Selection)):
                terms.append(term)
                continue
            if term.atom.key != ("one",) or term.axis is not None:
                single = _single_axis(term) if size_in == 1 else None
                many = None if single is None else term.mapped(axis, factor, single, Dim.of(size_out))
                if many is None:
                    return None
                # One channel to one is seen in no view, like a number in front.
                terms.append(many if size_out != 1 else replace(many, view=term.view))
                continue
            chains = tuple(new for c in term.chains if (s := c.then(Spread(size_in))) and (new := s.then(factor)))
            axes = list(term.view.axes)
            axes[axis] = (Piece(0, ONE, Dim.of(size_out)),)
            terms.append(Term(term.atom, View(tuple(axes), term.view.fixed), 0, chains))
            continue
        atom_axis = term.whole(axis)
        if atom_axis is None and isinstance(factor, Exact):
            piece = _mapped_piece(term, axis, factor)
            if piece is None:
                return None
            terms.append(piece)
            continue
        if atom_axis is None or term.axis not in (None, atom_axis):
            return None
        new = term.mapped(axis, factor, atom_axis, Dim.of(size_out))
        if new is None and not term.atom.sure:
            return None
        if new is not None:
            terms.append(new)
    shape = (*form.shape[:axis], Dim.of(size_out), *form.shape[axis + 1 :])
    return collect(shape, terms)


def _single_axis(term: Term) -> int | None:
    """An axis of the atom that has one entry, on which a map of one channel to many acts; None where there is none."""
    if term.axis is not None:
        seen = any(isinstance(e, Piece) and e.axis == term.axis for elements in term.view.axes for e in elements)
        return None if seen or term.axis_size(term.axis) != ONE else term.axis
    return next((axis for axis, size in enumerate(term.atom.shape) if size == ONE), None)


def _last_alone(term: Term, axis: int) -> Term:
    """`term` with the innermost element of `axis` alone on it."""
    axes = list(term.view.axes)
    axes[axis] = axes[axis][-1:]
    return replace(term, view=View(tuple(axes), term.view.fixed))


def _mapped_piece(term: Term, axis: int, factor: Exact, view: View | None = None) -> Term | None:
    """A square map of some digits of an atom's axis is a map of the whole axis, repeated: I ⊗ T ⊗ I."""
    elements, transform = term.view.axes[axis], factor.transform
    if len(elements) > 1 and isinstance(transform, Repeated) and isinstance(elements[-1], Piece):
        # Heads joined with their channels, and one map for each head: it is a map of the channels.
        size = elements[-1].size.constant
        within = None if size is None else transform.within(size)
        return None if within is None else _mapped_piece(_last_alone(term, axis), axis, Exact(within), term.view)
    piece = elements[0] if len(elements) == 1 else None
    if not isinstance(piece, Piece) or term.axis not in (None, piece.axis) or transform.width != transform.size:
        return None
    extent, stride = term.axis_size(piece.axis).constant, piece.stride.constant
    if extent is None or stride is None or piece.size != Dim.of(transform.size) or extent % (stride * transform.size):
        return None
    left = extent // (stride * transform.size)
    whole = Exact(transform if left == stride == 1 else Repeated(transform, left, stride))
    chains = tuple(new for chain in term.chains if (new := chain.then(whole)) is not None)
    return Term(term.atom, view or term.view, piece.axis, chains) if chains else None


def diagonal(form: Form, axis: int, factor: Diagonal) -> Form | None:
    return mapped(form, axis, factor)


# ── Layout operations: they change views only ───────────────────────────────────────────────────────────────────────


def transpose(form: Form, permutation: Sequence[int]) -> Form:
    return collect(
        tuple(form.shape[axis] for axis in permutation),
        (
            Term(t.atom, View(tuple(t.view.axes[axis] for axis in permutation), t.view.fixed), t.axis, t.chains)
            for t in form.terms
        ),
        form.kind,
    )


def reshape(form: Form, shape: Shape) -> Form | None:
    """`form` under another shape, row-major; None where symbols do not divide."""
    if shape == form.shape:
        return form
    terms = []
    for term in form.terms:
        elements: list[Element] = []
        for size, axis in zip(form.shape, term.view.axes):
            elements += axis or ([Repeat(size)] if size != ONE else [])
        grouped = regroup(elements, shape)
        if grouped is None:
            return None
        axes, fixed = grouped
        terms.append(Term(term.atom, View(tuple(axes), _fixed(term.view.fixed, fixed)), term.axis, term.chains))
    return collect(shape, terms, form.kind)


def _fixed(old: Sequence[Element], new: Sequence[Element]) -> tuple[Element, ...]:
    return tuple(sorted((*old, *new), key=repr))


def take(form: Form, axis: int, start: Dim, size: Dim, step: int | str = 1) -> Form:
    """Entries start, start + step, … of `axis`; `step` may be the digest of constant indices instead."""
    axis %= form.rank
    if step == 1 and start == Dim.of(0) and size == form.shape[axis]:
        return form
    terms = []
    for term in form.terms:
        elements, fixed, chains, atom_axis = term.view.axes[axis], term.view.fixed, term.chains, term.axis
        if elements:
            inner = elements[0] if len(elements) == 1 else None
            selected = None
            digits = _taken_digits(term, axis, start, size) if step == 1 else None
            if digits is not None:
                terms.append(digits)
                continue
            if atom_axis is not None and step == 1 and term.whole(axis) == atom_axis:
                selected = _selected(chains, start.constant, size.constant)
            if selected is not None:
                chains, elements = selected, (Piece(atom_axis, ONE, size),)  # type: ignore[arg-type]
            elif isinstance(inner, Padded) and step == 1:
                unpadded = _unpadded(inner, start, size)
                if unpadded == ():
                    continue
                elements = unpadded if unpadded is not None else (Taken(elements, start, step, size),)
            elif isinstance(inner, Taken) and inner.step == 1 and step == 1:
                elements = (Taken(inner.inner, inner.start + start, 1, size),)
            else:
                elements = (Taken(elements, start, step, size),)
            if size == ONE and not (selected is not None):
                elements, fixed = (), _fixed(fixed, elements)
        axes = list(term.view.axes)
        axes[axis] = elements
        terms.append(Term(term.atom, View(tuple(axes), fixed), atom_axis, chains))
    return collect((*form.shape[:axis], size, *form.shape[axis + 1 :]), terms, form.kind)


def _taken_digits(term: Term, axis: int, start: Dim, size: Dim) -> Term | None:
    """Some digits of a mapped axis, taken by taking columns of the map; None where the axis is whole, or cut or padded.

    Queries, keys and values of one packed projection are three maps, and so are the halves of a rotated head.
    """
    elements = term.view.axes[axis]
    piece = elements[0] if len(elements) == 1 else None
    if term.axis is None or not isinstance(piece, Piece) or piece.axis != term.axis or term.whole(axis) is not None:
        return None
    known = (term.axis_size(term.axis), piece.stride, piece.size, start, size)
    numbers = [value.constant for value in known if value.constant is not None]
    if len(numbers) != len(known):
        return None
    extent, stride, count, first, taken = numbers
    axes: list[Axis] = []
    for place, others in enumerate(term.view.axes):
        moved: list[Element] = []
        for element in others:
            if isinstance(element, Piece) and element.axis == term.axis and place != axis:
                step, inside = element.stride.constant, (element.stride * element.size).constant
                if step is None or inside is None:
                    return None
                if step % (stride * count) == 0:
                    moved.append(Piece(element.axis, Dim.of(step // count * taken), element.size))
                elif inside <= stride:
                    moved.append(element)
                else:
                    return None
            elif isinstance(element, Piece | Repeat):
                moved.append(element)
            else:
                return None
        axes.append(tuple(moved))
    if term.view.fixed or extent % (stride * count):
        return None
    left = extent // (stride * count)
    chains = [chain.select_digits(left, count, stride, first, first + taken) for chain in term.chains]
    if any(chain is None for chain in chains):
        return None
    axes[axis] = tidy([Piece(term.axis, piece.stride, size)])
    return Term(term.atom, View(tuple(axes), term.view.fixed), term.axis, tuple(c for c in chains if c is not None))


def _selected(chains: Sequence[Chain], start: int | None, size: int | None) -> tuple[Chain, ...] | None:
    if start is None or size is None:
        return None
    selected = [chain.select(start, start + size) for chain in chains]
    return None if any(chain is None for chain in selected) else tuple(selected)  # type: ignore[arg-type]


def _unpadded(padded: Padded, start: Dim, size: Dim) -> Axis | None:
    """A slice of a padded axis: the inner axis, () where only zeros are left, or None where neither is certain."""
    inner = product(element.size for element in padded.inner)
    if padded.offset == start and inner == size:
        return padded.inner
    offset, begin, length, extent = padded.offset.constant, start.constant, size.constant, inner.constant
    before = start + size - padded.offset
    after = start - padded.offset - inner
    if before.constant is not None and before.constant <= 0:
        return ()
    if after.constant is not None and after.constant >= 0:
        return ()
    if None not in (offset, begin, length, extent) and offset <= begin and begin + length <= offset + extent:  # type: ignore[operator]
        return (Taken(padded.inner, start - padded.offset, 1, size),)
    return None


def concatenate(forms: Sequence[Form], axis: int) -> Form:
    rank = forms[0].rank
    axis %= rank
    total = Dim.of(0)
    for form in forms:
        total = total + form.shape[axis]
    rest = [broadcast(*((form.shape[i],) for form in forms))[0] if i != axis else total for i in range(rank)]
    terms, offset = [], Dim.of(0)
    for form in forms:
        size = form.shape[axis]
        for term in form.terms:
            elements = term.view.axes[axis] or (Repeat(size),)
            axes = list(term.view.axes)
            axes[axis] = (Padded(elements, offset, total),) if size != total else term.view.axes[axis]
            terms.append(Term(term.atom, View(tuple(axes), term.view.fixed), term.axis, term.chains))
        offset = offset + size
    return collect(tuple(rest), terms, forms[0].kind)


def without_scalar(form: Form) -> tuple[Form, Scalar]:
    """`form` less the number that all of its chains have in front, and that number (1 where they have none alike)."""
    scalars = {chain.scalar for term in form.terms for chain in term.chains}
    if len(scalars) != 1 or next(iter(scalars)) == Scalar(1.0):
        return form, Scalar(1.0)
    terms = (Term(t.atom, t.view, t.axis, tuple(Chain(chain.body) for chain in t.chains)) for t in form.terms)
    return collect(form.shape, terms, form.kind), next(iter(scalars))
