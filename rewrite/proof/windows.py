"""Convolution and average pooling: sums over the taps of a window, each a linear map of shifted values.

      conv(x)   =  Σ_t  x[… i·stride + t·dilation − pad …]·K_t        K_t (in, out): what the kernel holds at tap t
      convᵀ(x)  =  Σ_t  x[… (i + pad − t·dilation)/stride …]·K_t      0 where the quotient is no place of x

A value at shifted places is an atom (a `Sample` for every spatial axis), or x itself where nothing is shifted: the
centre of a 3 × 3 kernel, a 1 × 1 kernel and a shortcut are then maps of one value, whatever operators they came from.
Both sums are linear, so that maps of the channels go through to K_t: a norm in front of a convolution, two convolutions
in a row. What does not go through is a constant that meets padding: it is 0 outside.

Source: ONNX operators Conv-22, ConvTranspose-22, AveragePool-22.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product as combinations
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from rewrite.proof import forms
from rewrite.proof.chains import Chain, Diagonal, Factor, Matrix, Scalar, shipped
from rewrite.proof.constants import Constant, Grouped, blocks, permuted, reshaped, sliced
from rewrite.proof.dimensions import ONE, Dim, Shape, opaque
from rewrite.proof.forms import Form, Padded, Piece, Taken, Term, View
from rewrite.proof.rules import attribute, mapped_again, multiplied, reduced_elsewhere, rule, settled, unmapped

if TYPE_CHECKING:
    from rewrite.proof.walk import Walk

LARGEST_SUM, LARGEST_NEST = 1024, 96
"""Terms that a window of a sum, and of windows, may come to; of more, the sum is taken as one value."""

LARGEST_POOL = 64
"""Taps of an average that is taken apart; of larger ones only the linearity is known."""


@dataclass(frozen=True)
class Sample:
    """Places along one axis: entry i is x[(start + step·i)/divisor] for i < size, 0 where that is no place of x.

    `inside` is whether all are known to be places of x.
    """

    start: int
    step: int
    divisor: int
    size: Dim
    inside: bool = field(default=False, compare=False)

    def everything(self, extent: Dim) -> bool:
        """Whether this is x[0], x[1], … to its end."""
        return (self.start, self.step, self.divisor) == (0, 1, 1) and self.size == extent

    def within(self, extent: Dim) -> bool:
        """Whether all are places of an axis of `extent`."""
        if self.inside:
            return True
        behind = (extent - 1 - self.start - (self.size - 1) * self.step).least
        return self.divisor == 1 and self.start >= 0 and behind is not None and behind >= 0

    def of(self, inner: Sample, extent: Dim) -> Sample | None:
        """This of `inner`, of an axis of `extent`, as one; None where it would read what `inner` left out."""
        if self.divisor != 1:
            return None
        # Beyond an inner axis that goes as far as x does, and farther, there is nothing either.
        after = (inner.size * inner.step + inner.start - extent).least
        around = inner.divisor == 1 and inner.start < inner.step and after is not None and after >= 0
        if not around and not self.within(inner.size):
            return None
        start = inner.start + inner.step * self.start
        inside = self.within(inner.size) and inner.within(extent)
        return Sample(start, inner.step * self.step, inner.divisor, self.size, inside)


Samples = tuple[Sample, ...]
"""One `Sample` for every spatial axis, axes 2 and up."""


# ── Values at shifted places ────────────────────────────────────────────────────────────────────────────────────────


def sampled(walk: Walk, form: Form, taps: Sequence[Samples]) -> list[Form]:
    """`form` (batch, channels, …spatial) at the places of each of `taps`; maps of its channels stay outside."""
    simple = all(not term.view.axes[1] or term.whole(1) is not None for term in form.terms)
    shifted = sum(t.atom.key[0] == "sampled" and not walk.table.is_constant(t.atom) for t in form.terms)
    simple = simple and shifted * len(taps) <= LARGEST_NEST and len(form.terms) * len(taps) <= LARGEST_SUM
    terms = form.terms if simple else (None,)
    parts: list[list[Term]] = [[] for _ in taps]
    for term in terms:
        for part, found in zip(parts, _sampled_term(walk, form, term, taps)):
            part += found.terms
    return [forms.collect(_shape(form, tap), part) for tap, part in zip(taps, parts)]


def _shape(form: Form, samples: Samples) -> Shape:
    return (*form.shape[:2], *(sample.size for sample in samples))


def _sampled_term(walk: Walk, form: Form, term: Term | None, taps: Sequence[Samples]) -> list[Form]:
    """One term of `form`, or all of it (None), at the places of each of `taps`."""
    extents = form.shape[2:]
    if term is not None:
        unpadded = _unpadded(form, term)
        if unpadded is not None:
            inner, before = unpadded
            joint = [[s.of(b, n) for s, b, n in zip(tap, before, inner.shape[2:])] for tap in taps]
            known = [tuple(s for s in tap if s is not None) for tap in joint]
            if all(len(tap) == len(extents) for tap in known):
                return _sampled_term(walk, inner, inner.terms[0], known)
        if not any(term.view.axes[2:]):
            return [_constant(walk, form, term, tap) for tap in taps]
    own = form if term is None else Form(form.shape, (term,))
    found = None if term is None else unmapped(form, term, range(2, form.rank))
    inner, position = found or (own, None)
    number = walk.intern(inner)
    results: list[Form] = []
    for tap in taps:
        if _is_all(tap, extents):
            results.append(own)
            continue
        source, places = _joint(walk, number, tap)
        if _is_all(places, walk.table.forms[source].shape[2:]):
            result = walk.table.forms[source]
            if found is not None and term is not None:
                result = _mapped_by(walk, result, position, term.chains)
        else:
            shape = _shape(form, tap)
            atom = walk.atom(("sampled", source, places), (*inner.shape[:2], *shape[2:]))
            result = forms.form_of(atom)
            if found is not None and term is not None:
                result = Form(shape, (mapped_again(atom, term, position, shape),))
        results.append(result)
    return results


def _is_all(tap: Samples, extents: Shape) -> bool:
    """Whether `tap` takes a value as it is."""
    return all(sample.everything(extent) for sample, extent in zip(tap, extents))


def _mapped_by(walk: Walk, form: Form, position: int | None, chains: Sequence[Chain]) -> Form:
    """`form` followed by a sum of `chains` on axis `position` (None: they are numbers)."""
    parts: list[Form] = []
    for chain in chains:
        part = form
        for factor in chain.factors:
            if isinstance(factor, Scalar) or position is None:
                part = forms.scaled(part, chain.scalar)
            else:
                part = walk.mapped(part, position, factor)
        parts.append(part)
    return forms.add(*parts)


def _joint(walk: Walk, number: int, tap: Samples) -> tuple[int, Samples]:
    """The value that `tap` of a value is taken of, and where: places of places are places."""
    known = walk.table.forms[number].atom
    if known is None or known.key[0] != "sampled":
        return number, tap
    extents = walk.table.forms[known.key[1]].shape[2:]
    joint = [outer.of(inner, extent) for outer, inner, extent in zip(tap, known.key[2], extents)]
    together = tuple(sample for sample in joint if sample is not None)
    return (number, tap) if len(together) < len(tap) else (known.key[1], together)


def _unpadded(form: Form, term: Term) -> tuple[Form, Samples] | None:
    """`term` without what its view puts around spatial axes or cuts off, and where the value lies in what is left."""
    axes, before, shape = list(term.view.axes), [], list(form.shape)
    for axis in range(2, form.rank):
        element = axes[axis][0] if len(axes[axis]) == 1 else None
        if isinstance(element, Padded) and (offset := element.offset.constant) is not None:
            before.append(Sample(-offset, 1, 1, element.size))
        elif isinstance(element, Taken) and (first := element.start.constant) is not None and element.step == 1:
            before.append(Sample(first, 1, 1, element.size, True))
        else:
            before.append(Sample(0, 1, 1, form.shape[axis], True))
            continue
        axes[axis], shape[axis] = forms.tidy(element.inner), forms.product(each.size for each in element.inner)
    if axes == list(term.view.axes):
        return None
    bare_term = Term(term.atom, View(tuple(axes), term.view.fixed), term.axis, term.chains)
    return Form(tuple(shape), (bare_term,)), tuple(before)


def _constant(walk: Walk, form: Form, term: Term, tap: Samples) -> Form:
    """What is the same everywhere, at the places of `tap`: itself, but 0 at places that are none."""
    extents, shape = form.shape[2:], _shape(form, tap)
    if all(sample.within(extent) for sample, extent in zip(tap, extents)):
        return Form(shape, (term,))
    blank: tuple[forms.Axis, ...] = ((), ())
    alone = not term.view.axes[0] and not term.view.fixed
    if term.atom.key == ("one",) and alone and (term.axis is None or term.whole(1) == term.axis):
        one = Form((ONE, ONE, *extents), (Term(term.atom, View(((),) * form.rank), None, forms.IDENTITY),))
        atom = walk.atom(("sampled", walk.intern(one), tap), (ONE, ONE, *shape[2:]))
        axes = (*blank, *forms.identity_view(atom).axes[2:])
        if term.axis is not None:
            axes = (axes[0], (Piece(1, ONE, shape[1]),), *axes[2:])
        return Form(shape, (Term(atom, View(axes), None if term.axis is None else 1, term.chains),))
    own = Form(form.shape, (term,))
    # A map of channels stays outside, as where the value differs from place to place.
    inner, position = unmapped(form, term, range(2, form.rank)) or (own, None)
    atom = walk.atom(("sampled", walk.intern(inner), tap), (*inner.shape[:2], *shape[2:]))
    return forms.form_of(atom) if inner is own else Form(shape, (mapped_again(atom, term, position, shape),))


# ── Kernels ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@rule("Conv")
def convolution(walk, node, operands):
    kernel = operands[1]
    if not isinstance(kernel, Constant) or len(kernel.shape) < 3:
        return None
    x, groups = settled(walk, walk.form(operands[0])), attribute(node, "group", 1)
    windows = _windows(node, x, kernel.shape[2:])
    taps = None if windows is None else _taps(windows, x)
    if taps is None or x.shape[1] != Dim.of(kernel.shape[1] * groups) or kernel.shape[0] % groups:
        return None
    return _with_bias(walk, _summed(walk, x, kernel, taps, groups, transposed=False), operands)


@rule("ConvTranspose")
def transposed_convolution(walk, node, operands):
    kernel = operands[1]
    if not isinstance(kernel, Constant) or len(kernel.shape) < 3:
        return None
    x, groups = settled(walk, walk.form(operands[0])), attribute(node, "group", 1)
    taps = _transposed_taps(node, x, kernel.shape[2:])
    if taps is None or x.shape[1] != Dim.of(kernel.shape[0]) or kernel.shape[0] % groups:
        return None
    return _with_bias(walk, _summed(walk, x, kernel, taps, groups, transposed=True), operands)


def _with_bias(walk: Walk, result: Form, operands) -> Form | None:
    if len(operands) < 3 or operands[2] is None:
        return result
    bias = forms.reshape(walk.form(operands[2]), (result.shape[1], *[ONE] * (result.rank - 2)))
    return None if bias is None else forms.add(result, bias)


Taps = dict[tuple[int, ...], Samples]
"""Where each entry of a kernel's window reads."""


def _summed(walk: Walk, x: Form, kernel: Constant, taps: Taps, groups: int, *, transposed: bool) -> Form:
    """Σ_t x[places of t]·K_t. Entries at which a kernel is zero are left out where what they read is read anyway."""
    busy, extents = _busy(kernel), x.shape[2:]
    read = all(walk.table.defined(term.atom) for term in x.terms) or any(
        busy[tap] and _is_all(places, extents) for tap, places in taps.items()
    )
    parts: list[Form] = []
    for tap, shifted in zip(taps, sampled(walk, x, list(taps.values()))):
        factor = _at(kernel, tap, groups, transposed=transposed)
        if not busy[tap]:
            for demand in shipped([factor]):
                walk.table.demands.setdefault(demand, walk.node)
            outer = Dim.of(kernel.shape[1] * groups if transposed else kernel.shape[0])
            left = () if read else forms.scaled(shifted, Scalar(0.0)).terms
            part = Form((shifted.shape[0], outer, *shifted.shape[2:]), ())
            if left:
                part = walk.mapped(Form(shifted.shape, left), 1, factor)
        elif isinstance(factor, Matrix) and len(taps) == 1:
            part = multiplied(walk, shifted, 1, factor.constant)
        else:
            part = walk.mapped(shifted, 1, factor)
        parts.append(part)
    return forms.add(*parts)


def _busy(kernel: Constant) -> np.ndarray:
    """Whether a kernel holds anything but zeros, at each of its taps."""
    busy = np.zeros(kernel.shape[2:], bool)
    for region in blocks(kernel.shape):
        busy |= (kernel.raw(region) != 0).any(axis=(0, 1))
    return busy


def _at(kernel: Constant, tap: tuple[int, ...], groups: int, *, transposed: bool) -> Factor:
    """The map of channels that a kernel holds at one of its taps; block diagonal in groups."""
    first, second = kernel.shape[:2]
    whole = (slice(0, first), slice(0, second))
    entry = reshaped(sliced(kernel, (*whole, *(slice(t, t + 1) for t in tap))), (first, second))
    if groups == first and second == 1:
        return Diagonal(reshaped(entry, (first,)))
    if not transposed:
        return Matrix(permuted(entry, (1, 0)) if groups == 1 else Grouped(entry, groups))
    if groups == 1:
        return Matrix(entry)
    cut = permuted(reshaped(entry, (groups, first // groups, second)), (0, 2, 1))
    return Matrix(Grouped(reshaped(cut, (groups * second, first // groups)), groups))


@dataclass(frozen=True)
class Window:
    """A window's attributes along one axis."""

    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def filled(self) -> bool:
        """Whether every place of the window holds some of the value, wherever it lies."""
        return self.dilation == 1 and max(self.before, self.after) < self.kernel


def _windows(node: ir.Node, x: Form, kernel: Sequence[int]) -> list[Window] | None:
    """Attributes of a window written out; None where the padding is chosen by sizes that are not static."""
    rank = len(kernel)
    mode = attribute(node, "auto_pad", "NOTSET")
    strides = attribute(node, "strides", None) or (1,) * rank
    dilations = attribute(node, "dilations", None) or (1,) * rank
    pads = (attribute(node, "pads", None) if mode == "NOTSET" else None) or (0,) * (2 * rank)
    found = [
        Window(k, s, d, before, after)
        for k, s, d, before, after in zip(kernel, strides, dilations, pads[:rank], pads[rank:])
    ]
    if x.rank != rank + 2 or not len(found) == rank == len(strides) == len(dilations) == len(pads) // 2:
        return None
    if mode in ("NOTSET", "VALID"):
        return found
    chosen = []
    for window, extent in zip(found, x.shape[2:]):
        size = extent.constant
        if size is None or mode not in ("SAME_UPPER", "SAME_LOWER") or node.op_type == "ConvTranspose":
            return None
        reach = (-(-size // window.stride) - 1) * window.stride + window.dilation * (window.kernel - 1) + 1
        missing = max(reach - size, 0)
        less, more = missing // 2, missing - missing // 2
        before, after = (less, more) if mode == "SAME_UPPER" else (more, less)
        chosen.append(Window(window.kernel, window.stride, window.dilation, before, after))
    return chosen


def _taps(windows: Sequence[Window], x: Form) -> Taps | None:
    """Where every tap of a convolution reads; None where there is no result."""
    axes: list[list[Sample]] = []
    for window, extent in zip(windows, x.shape[2:]):
        reach = window.dilation * (window.kernel - 1)
        room = extent + window.before + window.after - reach - 1
        if room.constant is not None:
            size = Dim.of(room.constant // window.stride + 1)
        else:
            size = room + 1 if window.stride == 1 else opaque("floor", room, window.stride) + 1
        if size.constant is not None and size.constant < 1:
            return None
        samples: list[Sample] = []
        for tap in range(window.kernel):
            place = tap * window.dilation
            # The last window ends within the padding, and what follows this tap in it may be all of that.
            inside = place >= window.before and reach - place >= window.after
            samples.append(Sample(place - window.before, window.stride, 1, size, inside))
        axes.append(samples)
    return _combined(axes)


def _transposed_taps(node: ir.Node, x: Form, kernel: Sequence[int]) -> Taps | None:
    """Where every tap of a transposed convolution reads."""
    windows = _windows(node, x, kernel)
    rank = len(kernel)
    extra = attribute(node, "output_padding", None) or (0,) * rank
    if windows is None or attribute(node, "output_shape", None):
        return None
    axes: list[list[Sample]] = []
    for window, extent, more in zip(windows, x.shape[2:], extra):
        reach = window.dilation * (window.kernel - 1)
        size = (extent - 1) * window.stride + reach + 1 + more - window.before - window.after
        starts = [window.before - tap * window.dilation for tap in range(window.kernel)]
        axes.append([Sample(start, 1, window.stride, size) for start in starts])
    return _combined(axes)


def _combined(axes: Sequence[Sequence[Sample]]) -> Taps:
    """Taps of all axes from those of each."""
    places = combinations(*(range(len(samples)) for samples in axes))
    return {tap: tuple(samples[t] for samples, t in zip(axes, tap)) for tap in places}


# ── Averages ────────────────────────────────────────────────────────────────────────────────────────────────────────


@rule("GlobalAveragePool")
def global_average(walk, node, operands):
    form = walk.form(operands[0])
    return reduced_elsewhere(walk, form, list(range(2, form.rank)), mean=True) if form.kind == "f" else None


@rule("AveragePool")
def average(walk, node, operands):
    """A kernel of equal numbers, as long as every window holds as many values as any other; else only linear."""
    x = walk.form(operands[0])
    kernel = attribute(node, "kernel_shape", ())
    windows = _windows(node, x, kernel) if x.kind == "f" else None
    taps = None if windows is None else _taps(windows, x)
    if windows is None or taps is None or attribute(node, "ceil_mode", 0):
        return None
    padded = any(window.before or window.after for window in windows)
    counted = bool(attribute(node, "count_include_pad", 0))
    if (counted or not padded) and len(taps) <= LARGEST_POOL:
        return forms.scaled(forms.add(*sampled(walk, x, list(taps.values()))), Scalar(1.0 / len(taps)))
    shape = _shape(x, next(iter(taps.values())))
    parts: list[Form] = []
    for term in x.terms:
        if not any(term.view.axes[2:]) and not (padded and counted) and all(window.filled for window in windows):
            parts.append(Form(shape, (term,)))
            continue
        found = unmapped(x, term, range(2, x.rank))
        inner, position = found or (Form(x.shape, (term,)), None)
        key = ("averaged", walk.intern(inner), tuple(windows), padded and counted)
        atom = walk.atom(key, (*inner.shape[:2], *shape[2:]))
        part = forms.form_of(atom) if found is None else Form(shape, (mapped_again(atom, term, position, shape),))
        parts.append(part)
    return forms.add(*parts)
