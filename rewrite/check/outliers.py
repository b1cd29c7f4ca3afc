"""How far a change of basis spreads outliers, for activations and weights, before and after it.

Three measures. With x all entries of a tensor, Σ the covariance of its d channels:

* kurtosis         E[(x − E x)⁴] / E[(x − E x)²]²; 3 for a normal distribution
* peak             max |x| / median |x|
* QSUR             V / Vₘ, V the volume of a normal distribution's ellipsoid, Vₘ that of the cube around it:
                   π^{d/2} / Γ(d/2 + 1) · √det Σ / (2^d · (maxⱼ Σⱼⱼ)^{d/2})

QSUR is what a uniform quantization grid can use of its range. It is kept as ln QSUR / d. Its change under x ↦ x·T needs
no determinant of a covariance, which is singular where there are fewer rows than channels:

    (ln QSUR′ − ln QSUR) / d  =  ln |det T| / d − ½ ln (maxⱼ Σ′ⱼⱼ / maxⱼ Σⱼⱼ)

Source: QSUR is Hu et al. 2025, arXiv:2501.13987 (OSTQuant), §3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from rewrite.check.localize import steps_of
from rewrite.check.reference import values_of
from rewrite.ir.edit import constant_of, is_operator
from rewrite.ir.weights import MaterializedTensor, Scale, Transformed, Weight, cut_blocks
from rewrite.proof.transforms import Reciprocal, Repeated, Scaling, Selection, Shift, Step, Transform

SETS = 8
"""How many sets of inputs are looked at."""
SAMPLE = 1 << 21
"""Numbers of a weight that are looked at: whole rows of its transformed axis."""
WIDEST = 1024
"""Channels up to which a covariance is kept."""

_READERS = ("MatMul", "Gemm", "Conv", "LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class OutlierRow:
    """The measures of one tensor before and after the transforms that it is in now.

    `kind` is "activation" or "weight"; `transform` names them; `qsur_*` is ln QSUR / d, NaN where rows are too few;
    `qsur_gain` is its change, which is always known; `qsur_possible` what the best rotation would gain.
    """

    name: str
    kind: str
    transform: str
    channels: int
    rows: int
    kurtosis_before: float
    kurtosis_after: float
    peak_before: float
    peak_after: float
    qsur_before: float
    qsur_after: float
    qsur_gain: float
    qsur_possible: float


def measure_outliers(
    model: ir.Model,
    inputs: Sequence[Mapping[str, np.ndarray]],
    relations: Mapping[str, Mapping],
    transforms: Mapping[str, Step],
) -> tuple[OutlierRow, ...]:
    """Measure what is in another basis: related values that a norm or a linear map reads or that a norm writes, and
    weights that have absorbed a transform. In float64, on the first sets of inputs; "before" is with the transforms
    undone.

    Empty where no relation names a rotation or a scaling.
    """
    paths = {name: path for name, relation in relations.items() if (path := _path(relation, transforms))}
    if not paths:
        return ()
    wanted = {name for name in _linear_inputs(model) if name in paths}
    spreads: dict[str, tuple[_Spread, _Spread]] = {}
    for one in inputs[:SETS]:
        for name, value in values_of(model, one):
            if name not in wanted or value.dtype.kind != "f" or not np.isfinite(value).all():
                continue
            axis = paths[name][0][1]
            after = np.moveaxis(value, axis, -1).astype(np.float64)
            before = after
            for step, _ in reversed(paths[name]):
                before = _undone(step, before)
            known = spreads.setdefault(name, (_Spread(), _Spread()))
            for spread, array in zip(known, (before, after)):
                spread.add(array.reshape(-1, array.shape[-1]))
    rows = [
        _row(name, "activation", relations[name], [step for step, _ in paths[name]], *spreads[name])
        for name in paths
        if name in spreads
    ]
    return (*rows, *_weights(model, transforms))


def _path(relation: Mapping, transforms: Mapping[str, Step]) -> list[tuple[Step, int]]:
    """The invertible steps at the end of a relation, which can be undone; none where nothing is turned or scaled.

    Steps on another axis than the last one's are left: they are another space.
    """
    path: list[tuple[Step, int]] = []
    for step in reversed(steps_of(relation)):
        known = transforms.get(step["transform"])
        if known is None or (path and step["axis"] != path[0][1]) or not _is_invertible(known):
            break
        path.insert(0, (known, step["axis"]))
    return path if any(not isinstance(step, Shift | Selection) for step, _ in path) else []


def _is_invertible(step: Step) -> bool:
    if isinstance(step, Shift):
        return True
    try:
        return step.inverse is not None
    except ValueError:
        return False


def _undone(step: Step, rows: np.ndarray) -> np.ndarray:
    return rows - step.values if isinstance(step, Shift) else step.inverse.apply(rows, -1)


def _linear_inputs(model: ir.Model) -> Iterator[str]:
    """Values that norms and maps with constant weights read, and results of norms."""
    for node in model.graph:
        if is_operator(node, *_READERS):
            norm = node.op_type.endswith("Normalization")
            if norm or any(constant_of(value) is not None for value in node.inputs[1:2]):
                yield node.inputs[0].name or "" if node.inputs[0] is not None else ""
            if norm:
                yield node.outputs[0].name or ""


def _weights(model: ir.Model, transforms: Mapping[str, Step]) -> Iterator[OutlierRow]:
    names = {step.key: name for name, step in transforms.items()}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, MaterializedTensor) or len(tensor.shape) < 2:
            continue
        inner, steps, axis = tensor.weight, list[Transform](), None
        while isinstance(inner, Transformed | Scale):
            if isinstance(inner, Transformed):
                if axis is not None and inner.axis != axis:
                    break
                axis = inner.axis
                steps.insert(0, inner.map)  # type: ignore[arg-type]
            elif axis is None or inner.axis != axis:
                break
            inner = inner.inner
        known = [step for step in steps if step.key in names or step.dual.key in names]
        if axis is None or not known or not all(map(_is_invertible, steps)):
            continue
        held, absorbed = _Spread(), _Spread()
        for spread, weight in ((held, inner), (absorbed, tensor.weight)):
            spread.add(_sample(weight, axis))
        labels = [names.get(step.key) or names[step.dual.key] for step in known]
        relation = {"transform": "composition", "steps": [{"transform": label} for label in labels]}
        yield _row(name, "weight", relation, steps, held, absorbed)


def _sample(weight: Weight, axis: int) -> np.ndarray:
    """Some vectors of a weight along `axis`, as rows."""
    other = next((place for place in range(len(weight.shape)) if place != axis), axis)
    mixed = frozenset(range(len(weight.shape))) - {other}
    block = weight.read(next(cut_blocks(weight.shape, mixed, SAMPLE)))
    return np.moveaxis(block, axis, -1).reshape(-1, weight.shape[axis])


@dataclass
class _Spread:
    """Sums over rows (n, d), from which the measures follow."""

    rows: int = 0
    powers: np.ndarray = field(default_factory=lambda: np.zeros(4))
    largest: float = 0.0
    medians: list[float] = field(default_factory=list)
    sums: np.ndarray | None = None
    squares: np.ndarray | None = None
    products: np.ndarray | None = None

    def add(self, rows: np.ndarray) -> None:
        if rows.size == 0:
            return
        magnitudes = np.abs(rows)
        self.rows += len(rows)
        self.powers += [float((rows**power).sum()) for power in (1, 2, 3, 4)]
        self.largest = max(self.largest, float(magnitudes.max()))
        self.medians.append(float(np.median(magnitudes)))
        self.sums = rows.sum(0) + (0 if self.sums is None else self.sums)
        self.squares = (rows * rows).sum(0) + (0 if self.squares is None else self.squares)
        if rows.shape[1] <= WIDEST:
            self.products = rows.T @ rows + (0 if self.products is None else self.products)

    @property
    def kurtosis(self) -> float:
        """Pooled over all entries."""
        first, second, third, fourth = self.powers / max(self.rows * self._channels, 1)
        variance = second - first**2
        if variance <= 0:
            return math.nan
        return float((fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4) / variance**2)

    @property
    def peak(self) -> float:
        """The median is that of the sets' medians."""
        middle = float(np.median(self.medians)) if self.medians else 0.0
        return self.largest / middle if middle else math.nan

    @property
    def _channels(self) -> int:
        return 0 if self.sums is None else len(self.sums)

    @property
    def variances(self) -> np.ndarray:
        """Σⱼⱼ (d,)."""
        if self.sums is None or self.squares is None:
            return np.zeros(0)
        return np.maximum(self.squares / self.rows - (self.sums / self.rows) ** 2, 0.0)

    @property
    def log_qsur(self) -> float:
        """ln QSUR / d; NaN where Σ is singular or was not kept."""
        size = self._channels
        if self.products is None or self.sums is None or self.rows <= size:
            return math.nan
        mean = self.sums / self.rows
        sign, determinant = np.linalg.slogdet(self.products / self.rows - np.outer(mean, mean))
        widest = self.variances.max(initial=0.0)
        if sign <= 0 or widest <= 0:
            return math.nan
        ball = 0.5 * size * math.log(math.pi) - math.lgamma(size / 2 + 1)
        return (ball + 0.5 * float(determinant)) / size - math.log(2.0) - 0.5 * math.log(widest)


def _row(name: str, kind: str, relation: Mapping, steps: Sequence[Step], before: _Spread, after: _Spread) -> OutlierRow:
    own, others = before.variances, after.variances
    gain = possible = math.nan
    if own.max(initial=0.0) > 0 and others.max(initial=0.0) > 0:
        volume = sum(log_determinant(step) for step in steps if not isinstance(step, Shift)) / len(own)
        gain = volume - 0.5 * math.log(others.max() / own.max())
        possible = 0.5 * math.log(own.max() / own.mean())
    qsur = before.log_qsur
    return OutlierRow(
        name=name,
        kind=kind,
        transform=" · ".join(dict.fromkeys(step["transform"] for step in steps_of(relation))),
        channels=len(others),
        rows=after.rows,
        kurtosis_before=before.kurtosis,
        kurtosis_after=after.kurtosis,
        peak_before=before.peak,
        peak_after=after.peak,
        qsur_before=qsur,
        qsur_after=qsur + gain,
        qsur_gain=gain,
        qsur_possible=possible,
    )


def log_determinant(transform: Transform) -> float:
    """ln |det T| of a square transform."""
    if transform.orthogonal:
        return 0.0
    if isinstance(transform, Scaling):
        return float(np.log(np.abs(transform.values)).sum())
    if isinstance(transform, Reciprocal):
        return -log_determinant(transform.scaling)
    if isinstance(transform, Repeated):
        return transform.left * transform.right * log_determinant(transform.inner)
    return float(np.linalg.slogdet(transform.matrix())[1])


__all__ = ["OutlierRow", "log_determinant", "measure_outliers"]
