"""Multiply the few channels that hold outliers apart, so that what quantizes the rest need not reach as far as they do.

      y = x·W + b      W a constant (K, N), b a constant (N,) or nothing      O: the channels of x with max|x_j| > t
    ────────────────────────────────────────────────────────────────────────────────────────────────────────────────
      y = (x⊙m)·W_R + b + x_O·W_O      m_j = 0 in O and 1 elsewhere,  W_R = diag(m)·W,  W_O the rows O of W

t is `ratio` times the median of the channels' magnitudes, or a number. It needs data: which channels hold outliers does
not show in the weights. W_O stays in floating point whatever quantizes W_R. All products of x share m and x_O. The mask
keeps every channel in its place: Gather of the rest took 1.2 times as long at 128 rows of 768 channels, and 0.98 times
at one.

Shapes    x (..., K)   m (K,)   W, W_R (K, N)   W_O (|O|, N)   x_O (..., |O|)   b, y (..., N)
Relation  equal over the reals, and of the numbers of W each is stored as it was
Source    Dettmers et al. 2022, arXiv:2208.07339, §3.2
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.ir.edit import ORIGIN, shape_of
from rewrite.ir.program import Program
from rewrite.ir.statistics import ChannelRange, Statistics
from rewrite.ir.weights import Concat, Constant, Scale, Slice
from rewrite.quantize_rule import CONSTANT, FLOAT, KEPT, LARGE, MATRIX, WeightSite, added_vector, weight_sites
from rewrite.rule import Breach, Change, Pass, Requirement


def _unshared(rule: SplitOutliers, site: WeightSite) -> Breach | None:
    value = site.reader.inputs[site.position]
    while value is not None:
        for use in value.uses():
            if len(value.uses()) > 1 and use.node is not site.reader:
                return Breach(use.node, f"{value.name} is also read here, and would have to be copied")
        if value is site.constant:
            return None
        made = value.producer()
        value = None if made is None else made.inputs[0]
    return None


def _measured(rule: SplitOutliers, site: WeightSite) -> Breach | None:
    if rule.seen(site) is None:
        return Breach(
            site.reader, f"the magnitudes of {site.operand.name} were not measured: give data to calibrate on"
        )
    return None


def _has_outliers(rule: SplitOutliers, site: WeightSite) -> Breach | None:
    seen = rule.seen(site)
    if seen is None or len(rule.outliers(seen)):
        return None
    limit, largest = rule.limit(seen), seen.magnitude.max(initial=0.0)
    return Breach(site.reader, f"no channel of {site.operand.name} exceeds {limit:.3g}, the largest is {largest:.3g}")


def _few_outliers(rule: SplitOutliers, site: WeightSite) -> Breach | None:
    seen = rule.seen(site)
    count, size = 0 if seen is None else len(rule.outliers(seen)), site.shape[0]
    if seen is None or count <= rule.most * size:
        return None
    return Breach(site.reader, f"{count} of {size} channels exceed {rule.limit(seen):.3g}, {int(rule.most * size)} may")


@dataclass(frozen=True)
class SplitOutliers(Pass[WeightSite]):
    """Channels that hold outliers are multiplied apart, in floating point.

    A channel is an outlier if its magnitude exceeds `ratio` times the median of all channels', or `threshold` where one
    is given. `most`: the share of the channels that may be. `minimum` entries of a weight are worth it; `keep` are
    patterns of weights' names that stay whole. `statistics`: the ranges measured of what is multiplied.
    """

    ratio: float = 6.0
    threshold: float | None = None
    most: float = 0.0625
    minimum: int = 4096
    keep: tuple[str, ...] = ()
    statistics: Statistics | None = None

    name: ClassVar[str] = "split-outliers"
    requires: ClassVar[tuple[Requirement, ...]] = (
        *(CONSTANT, MATRIX, FLOAT, LARGE),
        Requirement("R5", "nobody else reads it", _unshared),
        Requirement("R6", "the magnitudes of what is multiplied were measured", _measured),
        Requirement("R7", "some channels hold outliers", _has_outliers),
        Requirement("R8", "few channels hold outliers", _few_outliers),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))

    def sites(self, program: Program) -> Iterator[WeightSite]:
        yield from (site for site in weight_sites(program) if not _is_part(site))

    def calibrates(self, program: Program) -> Iterator[str]:
        """What is multiplied with the weights."""
        wanted = (site for site in self.sites(program) if not any(each.check(self, site) for each in self.requires[:5]))
        yield from dict.fromkeys(site.operand.name or "" for site in wanted)

    def seen(self, site: WeightSite) -> ChannelRange | None:
        """What was measured of the operand."""
        return (self.statistics or {}).get(site.operand.name or "")

    def limit(self, seen: ChannelRange) -> float:
        """The magnitude beyond which a channel holds outliers."""
        return self.ratio * float(np.median(seen.magnitude)) if self.threshold is None else self.threshold

    def outliers(self, seen: ChannelRange) -> np.ndarray:
        """The channels that hold outliers, in order."""
        return np.flatnonzero(seen.magnitude > self.limit(seen))

    def rewrite(self, site: WeightSite, change: Change) -> None:
        edit, node, seen = change.editor, site.reader, self.seen(site)
        if seen is None:
            raise ValueError(f"{site.operand.name} was not measured")
        channels = self.outliers(seen)
        dtype, columns = site.constant.dtype or ir.DataType.FLOAT, slice(0, site.shape[1])
        rest, apart = self._operands(site, change, channels)
        kept = np.ones(site.shape[0])
        kept[channels] = 0.0
        weight = site.weight
        rows = tuple(Slice(weight, (slice(int(j), int(j) + 1), columns)) for j in channels)
        large = edit.initializer(f"{site.name}.rest", Scale(weight, Constant(kept), 0), dtype)
        small = edit.initializer(f"{site.name}.outliers", Concat(rows, 0), dtype)
        change.changed.update({value.name or "": site.name for value in (large, small)})

        added = added_vector(node)
        last, vector = (node, None) if added is None else added
        result = last.outputs[0]
        most = edit.node("MatMul", [rest, large], before=last, name=f"{result.name}.rest", like=node.outputs[0])
        few = edit.node("MatMul", [apart, small], before=last, name=f"{result.name}.outliers", like=node.outputs[0])
        product = few.producer()
        if product is not None:
            product.metadata_props[KEPT] = "it multiplies the channels that hold outliers"
        if vector is not None:
            most = edit.node("Add", [most, vector], before=last, name=f"{result.name}.rest_biased", like=result)
        edit.take_over(result, edit.node("Add", [most, few], before=last, name=f"{result.name}.joined", like=result))
        change.notes.append(
            f"{len(channels)} of {site.shape[0]} channels exceed {self.limit(seen):.3g} and are multiplied apart"
        )

    def _operands(self, site: WeightSite, change: Change, channels: np.ndarray) -> tuple[ir.Value, ir.Value]:
        """x⊙m and x_O, made once for all that multiply x."""
        edit, x, node = change.editor, site.operand, site.reader
        parts = f"{x.name}.rest", f"{x.name}.outliers"
        if parts[0] not in edit.made:
            kept = np.ones(site.shape[0], (x.dtype or ir.DataType.FLOAT).numpy())
            kept[channels] = 0.0
            mask = edit.initializer(f"{x.name}.kept", kept)
            edit.made[parts[0]] = edit.node("Mul", [x, mask], before=node, name=parts[0], like=x)
            places = edit.initializer(f"{x.name}.outlier_channels", channels.astype(np.int64))
            shape = (*(shape_of(x) or ())[:-1], len(channels))
            edit.made[parts[1]] = edit.node(
                *("Gather", [x, places], {"axis": -1}), before=node, name=parts[1], dtype=x.dtype, shape=shape
            )
        return edit.made[parts[0]], edit.made[parts[1]]


def _is_part(site: WeightSite) -> bool:
    """Whether a product is one that this pass has made."""
    return site.reader.metadata_props.get(ORIGIN) == SplitOutliers.name
