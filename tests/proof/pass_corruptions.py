"""Ways to get a pass wrong. Each is a generator of (what was done, the wrong program).

`corruptions.py` breaks a model as such. Here the wrong is what a wrong *pass* would do, or write down:

* `wrong_constants`: one constant is computed wrongly: left as it was, transformed twice, by the inverse, along the
  other axis, with another seed, one head of several otherwise, by a map of which a row has the other sign, two rows
  change places, an entry is off;
* `wrong_transforms`: everything is transformed as it should be, and the relations say so, but by a map that the
  operators between do not commute with: not orthogonal, not positive, not equal in a rotary pair, another in one head;
* `stale_constants`: of several readers of a constant one still reads what it was before the pass;
* `wrong_relations`: the model is right, and the certificate lies about a value of it.

They know nothing of models; whether one really computes something else is for the caller's float64 witness to say.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from rewrite.ir.computed import REDUCTIONS, Contracted, Elementwise, Permuted, Reduced
from rewrite.ir.edit import Editor
from rewrite.ir.program import Program
from rewrite.ir.weights import (
    Add,
    BlockDiagonal,
    Center,
    Composed,
    Concat,
    Constant,
    MaterializedTensor,
    Placed,
    Response,
    Scale,
    Slice,
    Transformed,
    Transpose,
    Weight,
    weight_of,
)
from rewrite.proof.transforms import (
    Hadamard,
    Invertible,
    Isometry,
    Orthogonal,
    Reciprocal,
    Repeated,
    Scaling,
    Selection,
    Shift,
    Step,
    Transform,
    along,
)
from rewrite.rule import Applied, steps

Wrong = Iterator[tuple[str, Program]]


@dataclass(frozen=True, eq=False)
class Matrix:
    """Any linear map of channels, also one that no pass would use."""

    values: np.ndarray

    @property
    def size(self) -> int:
        return self.values.shape[0]

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return along(axis, x, lambda rows: rows @ self.values)


# --------------------------------------------------------------------------------------------------------- expressions


def changed_constants(program: Program, pass_name: str) -> list[ir.Value]:
    """Initializers that the pass computed and that are still used, by name."""
    names = {
        new
        for record in program.records
        if isinstance(record, Applied) and record.pass_name == pass_name
        for new in record.changed
    }
    made = {
        name
        for name, value in program.model.graph.initializers.items()
        if isinstance(value.const_value, MaterializedTensor) and isinstance(value.const_value.weight, Constant)
    }
    known = program.model.graph.initializers
    return [known[name] for name in sorted(names | made) if name in known and known[name].uses()]


def expression(value: ir.Value) -> Weight:
    """What an initializer that a pass computed is computed from."""
    assert isinstance(value.const_value, MaterializedTensor)
    return value.const_value.weight


def parts_of(weight: Weight) -> Iterator[Weight]:
    """An expression and all it is computed from."""
    yield weight
    for field in dataclasses.fields(weight):  # type: ignore[arg-type]
        content = getattr(weight, field.name)
        for inner in content if isinstance(content, tuple) else (content,):
            if isinstance(inner, Weight):
                yield from parts_of(inner)


def with_part(weight: Weight, old: Weight, new: Weight) -> Weight:
    """The expression with `new` where `old` (by identity) stood."""
    if weight is old:
        return new
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(weight):  # type: ignore[arg-type]
        content = getattr(weight, field.name)
        if isinstance(content, Weight):
            changes[field.name] = with_part(content, old, new)
        elif isinstance(content, tuple) and content and all(isinstance(inner, Weight) for inner in content):
            changes[field.name] = tuple(with_part(inner, old, new) for inner in content)
    return dataclasses.replace(weight, **changes) if changes else weight  # type: ignore[type-var]


def with_constant(program: Program, name: str, weight: Weight) -> Program:
    """A clone in which an initializer holds another expression."""
    mutant = program.clone()
    value = mutant.model.graph.initializers[name]
    assert value.dtype is not None
    value.const_value = MaterializedTensor(weight, value.dtype, name)
    return mutant


# ------------------------------------------------------------------------------------------------------ one constant


def wrong_constants(program: Program, pass_name: str, rng: np.random.Generator) -> Wrong:
    """One constant of the pass computed wrongly."""
    for value in changed_constants(program, pass_name):
        name, whole = value.name or "", expression(value)
        shape = tuple(whole.shape)
        for part in parts_of(whole):
            for what, wrong in _wrong_parts(part, rng):
                try:
                    weight = with_part(whole, part, wrong)
                    fits = tuple(weight.shape) == shape
                except ValueError:
                    continue
                if fits:
                    yield f"{name}: {what}", with_constant(program, name, weight)


def _wrong_parts(part: Weight, rng: np.random.Generator) -> Iterator[tuple[str, Weight]]:
    if isinstance(part, Transformed):
        yield "not transformed", part.inner
        if part.map.size == part.map.width:
            yield "transformed twice", Transformed(part, part.map, part.axis)
        if isinstance(part.map, Transform):
            yield "by the dual", Transformed(part.inner, part.map.dual, part.axis)
            if part.map.size == part.map.width:
                yield "by the inverse", Transformed(part.inner, part.map.inverse, part.axis)
        for axis, size in enumerate(part.inner.shape):
            if axis != part.axis and size == part.map.size:
                yield f"along axis {axis}", Transformed(part.inner, part.map, axis)
        if (other := _with_another_seed(part.map)) is not None:
            yield "with another seed", Transformed(part.inner, other, part.axis)
        matrix = part.map.apply(np.eye(part.map.size))
        for what, wrong in _wrong_blocks(matrix, rng):
            yield what, Transformed(part.inner, Matrix(wrong), part.axis)
        for what, wrong in _wrong_matrices(matrix, rng):
            yield what, Transformed(part.inner, Matrix(wrong), part.axis)
    if isinstance(part, Scale):
        yield "not scaled", part.inner
        yield "scaled twice", Scale(part, part.factor, part.axis)
        if part.factor.numpy().all():
            yield "divided", Scale(part.inner, Constant(1.0 / part.factor.numpy()), part.axis)
        for axis, size in enumerate(part.inner.shape):
            if part.factor.shape == (size,) and axis != part.axis:
                yield f"scaled along axis {axis}", Scale(part.inner, part.factor, axis)
        if part.factor.shape:
            i = int(rng.integers(part.factor.shape[0]))
            factor = part.factor.numpy().copy()
            factor[i] = 1.0 / factor[i] if factor[i] else 1.0
            yield f"channel {i} divided", Scale(part.inner, Constant(factor), part.axis)
    if isinstance(part, Concat):
        if len(part.parts) > 1:
            yield "parts in the other order", Concat(part.parts[::-1], part.axis)
        for i, each in enumerate(part.parts):
            others = (Scale(each, Constant(np.array(0.0))), Scale(each, Constant(np.array(1.001))))
            for what, wrong in zip(("left out", "a little larger"), others):
                yield f"part {i} {what}", Concat((*part.parts[:i], wrong, *part.parts[i + 1 :]), part.axis)
    if isinstance(part, Slice):
        for axis, (taken, size) in enumerate(zip(part.region, part.inner.shape)):
            for by in (-1, 1):
                if taken.start + by >= 0 and taken.stop + by <= size:
                    moved = slice(taken.start + by, taken.stop + by)
                    yield (
                        f"{by} off on axis {axis}",
                        Slice(part.inner, (*part.region[:axis], moved, *part.region[axis + 1 :])),
                    )
    if isinstance(part, Center):
        yield "not centred", part.inner
        for axis in range(len(part.shape)):
            if axis != part.axis:
                yield f"centred along axis {axis}", Center(part.inner, axis)
    if isinstance(part, Add):
        for i in range(len(part.parts)):
            rest = tuple(each for j, each in enumerate(part.parts) if j != i)
            yield f"summand {i} left out", rest[0] if len(rest) == 1 else Add(rest)
            yield f"summand {i} taken off", Add((*rest, Scale(part.parts[i], Constant(np.array(-1.0)))))
    if isinstance(part, Elementwise):
        for i, each in enumerate(part.parts):
            yield f"operand {i} alone", each
        if len(part.parts) == 2:
            yield "operands exchanged", Elementwise(part.function, part.parts[::-1])
            for other in (np.add, np.subtract, np.multiply, np.divide):
                if other is not part.function:
                    yield f"{other.__name__} for {part.function.__name__}", Elementwise(other, part.parts)
    if isinstance(part, Reduced):
        for name, other in REDUCTIONS.items():
            if other is not part.function:
                yield f"{name} over {part.axes}", Reduced(other, part.inner, part.axes)
        for axis in range(len(part.inner.shape)):
            if part.axes != (axis,):
                yield f"reduced over axis {axis}", Reduced(part.function, part.inner, (axis,))
    if isinstance(part, Contracted):
        for what, wrong in (("left", part.left), ("right", part.right)):
            yield f"the {what} factor transposed", with_part(part, wrong, Permuted(wrong, (1, 0)))
    if isinstance(part, Placed):
        for axis in range(2, len(part.shape)):
            reach = part.start[axis] + (part.inner.shape[axis] - 1) * part.step[axis]
            for by in (-1, 1):
                if part.start[axis] + by >= 0 and reach + by < part.shape[axis]:
                    start = (*part.start[:axis], part.start[axis] + by, *part.start[axis + 1 :])
                    yield f"{by} off on axis {axis}", dataclasses.replace(part, start=start)
            if part.step[axis] > 1:
                step = (*part.step[:axis], 1, *part.step[axis + 1 :])
                yield f"without dilation on axis {axis}", dataclasses.replace(part, step=step)
    if isinstance(part, BlockDiagonal):
        width = part.shape[1]
        yield "in every group", Concat((part.inner,) * (width // part.inner.shape[1]), 1)
    if isinstance(part, Composed):
        yield "the second alone", part.second
        yield "the first alone", part.first
        for what in ("second_step", "first_step"):
            if any(step > 1 for step in getattr(part, what)):
                yield f"{what} 1", dataclasses.replace(part, **{what: tuple(1 for _ in part.second_step)})
        if part.second.shape == part.first.shape and part.groups == 1:
            yield "the other way round", dataclasses.replace(part, second=part.first, first=part.second)
    if isinstance(part, Response):
        yield "a shift as it was", part.vector
        yield "the shift without the kernel", Scale(part, Constant(np.array(0.0)))
    if isinstance(part, Constant) and part.value.ndim > 2:
        wrong = part.value.astype(np.float64).copy()
        wrong.flat[int(rng.integers(wrong.size))] *= -1.0
        yield "one number with the other sign", Constant(wrong)
    if isinstance(part, Constant) and part.value.ndim == 2:
        yield "transposed", Transpose(part, (1, 0))
        for what, wrong in _wrong_matrices(part.value, rng):
            yield what, Constant(wrong)
    if isinstance(part, Constant) and part.value.ndim == 1 and part.value.size > 1:
        i = int(rng.integers(part.value.size))
        other = part.value.astype(np.float64).copy()
        other[i] = -other[i] if other[i] else 1.0
        yield f"number {i} with the other sign", Constant(other)
        yield "in the other order", Constant(part.value[::-1].copy())


def _with_another_seed(map: Any) -> Transform | None:
    if isinstance(map, Repeated):
        inner = _with_another_seed(map.inner)
        return None if inner is None else dataclasses.replace(map, inner=inner)
    return dataclasses.replace(map, seed=(map.seed or 0) + 1) if isinstance(map, Hadamard) else None


def _wrong_blocks(matrix: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """One head of several left as it was, turned the other way, or with the map of another."""
    n = len(matrix)
    if matrix.shape != (n, n):
        return
    for size in range(2, n):
        groups = np.arange(n) // size
        if n % size == 0 and not matrix[groups[:, None] != groups].any():
            break
    else:
        return
    i, j = (slice(size * int(k), size * (int(k) + 1)) for k in rng.choice(n // size, 2, replace=False))
    for what, block in (
        ("left as it was", np.eye(size)),
        ("the other way", np.linalg.inv(matrix[i, i])),
        ("mapped as another", matrix[j, j]),
    ):
        wrong = matrix.copy()
        wrong[i, i] = block
        if not np.array_equal(wrong, matrix):
            yield f"channels {i.start} to {i.stop - 1} {what}", wrong


def _wrong_matrices(matrix: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """One row with the other sign, two rows exchanged, an entry off, a row inverted in size."""
    i, j = (int(each) for each in rng.choice(len(matrix), 2, replace=False)) if len(matrix) > 1 else (0, 0)
    wrong = matrix.copy()
    wrong[i] *= -1.0
    yield f"row {i} with the other sign", wrong
    wrong = matrix.copy()
    wrong[[i, j]] = wrong[[j, i]]
    yield f"rows {i} and {j} exchanged", wrong
    wrong = matrix.copy()
    k = int(np.abs(wrong[i]).argmax())
    wrong[i, k] *= 1.001
    yield f"entry ({i}, {k}) × 1.001", wrong
    if matrix[i].any():
        wrong = matrix.copy()
        wrong[i] /= (wrong[i] ** 2).sum()
        yield f"row {i} inverted", wrong


def stale_constants(program: Program, before: Program, pass_name: str) -> Wrong:
    """A constant with several readers, of which one reads what stood there before the pass."""
    origin = {
        new: old
        for record in program.records
        if isinstance(record, Applied) and record.pass_name == pass_name
        for new, old in record.changed.items()
    }
    for name, old in sorted(origin.items()):
        value, earlier = program.model.graph.initializers.get(name), before.model.graph.initializers.get(old)
        if value is None or earlier is None or earlier.const_value is None or value.shape != earlier.shape:
            continue
        for index in range(len(value.uses())):
            mutant = program.clone()
            kept = mutant.model.graph.initializers[name]
            if (again := mutant.model.graph.initializers.get(old)) is None:
                again = Editor(mutant.model, "mutant").initializer(old, weight_of(earlier.const_value), earlier.dtype)
            use = list(kept.uses())[index]
            use.node.replace_input_with(use.idx, again)
            yield f"{name}: {use.node.name} still reads {old}", mutant


# --------------------------------------------------------------------------------------------------- all constants


def wrong_transforms(program: Program, pass_name: str, rng: np.random.Generator) -> Wrong:
    """The pass done consistently with another map, which the relations name truthfully."""
    mine = {
        step["transform"]
        for relation in program.relations.values()
        for step in steps(relation)
        if step["pass"] == pass_name
    }
    innermost: dict[object, Transform] = {}
    for name in sorted(mine & set(program.transforms)):
        base = _base(program.transforms[name])
        if base is not None and base.dual.key not in innermost:
            innermost[base.key] = base
    for base in innermost.values():
        for what, other in _wrong_maps(base, rng):
            yield f"{base.kind} of {base.size}: {what}", _substituted(program, base, other)


def _base(step: Step) -> Transform | None:
    while isinstance(step, Repeated):
        step = step.inner
    return None if isinstance(step, Shift | Isometry) else step


def _wrong_maps(base: Transform, rng: np.random.Generator) -> Iterator[tuple[str, Transform]]:
    n = base.size
    if isinstance(base, Selection):
        left_out = sorted(set(range(n)) - set(base.indices))
        for j in left_out[:2]:
            place = int(rng.integers(base.width))
            indices = (*base.indices[:place], j, *base.indices[place + 1 :])
            yield f"channel {j} instead of {base.indices[place]}", Selection(n, indices)
        return
    if isinstance(base, Scaling | Reciprocal):
        values = (base if isinstance(base, Scaling) else base.scaling).values.copy()
        i = int(rng.integers(n))
        for what, factor in (("negative", -1.0), ("3 times as large", 3.0), ("times 1.001", 1.001)):
            other = values.copy()
            other[i] *= factor
            scaling = Scaling(other)
            yield f"channel {i} {what}", scaling if isinstance(base, Scaling) else scaling.dual
        scaling = Scaling(rng.uniform(0.5, 2.0, n))
        yield "any other", scaling if isinstance(base, Scaling) else scaling.dual
        scaling = Scaling(-values)
        yield "negative", scaling if isinstance(base, Scaling) else scaling.dual
    if n > 1:
        random, _ = np.linalg.qr(rng.normal(size=(n, n)))
        sheared = np.linalg.qr(rng.normal(size=(n, n)))[0] @ np.diag(rng.uniform(0.8, 1.25, n))
        yield "any rotation", Orthogonal(random)
        yield "a rotation that also stretches", Invertible(sheared)
        stretched = np.eye(n)
        stretched[0, 0] = 1.001
        yield "turned, with one channel a thousandth larger", Invertible(random @ stretched)


def _substituted(program: Program, old: Transform, new: Transform) -> Program:
    """A clone in which `new` stands wherever `old` stood, in constants and in transforms, and its dual for the dual."""
    mutant = program.clone()
    for name, value in mutant.model.graph.initializers.items():
        if isinstance(value.const_value, MaterializedTensor) and value.dtype is not None:
            weight = _weight_with(value.const_value.weight, old, new, _reads(value))
            value.const_value = MaterializedTensor(weight, value.dtype, name)
    mutant.transforms = {
        name: step if isinstance(step, Shift) else _map_with(step, old, new, False)
        for name, step in mutant.transforms.items()
    }
    return mutant


def _weight_with(weight: Weight, old: Transform, new: Transform, reads: Callable[[int], bool]) -> Weight:
    for part in list(parts_of(weight)):
        if isinstance(part, Transformed) and isinstance(part.map, Transform):
            inner = with_part(part.inner, part.inner, _weight_with(part.inner, old, new, reads))
            changed = Transformed(inner, _map_with(part.map, old, new, reads(part.axis)), part.axis)
            return with_part(weight, part, changed)
    return weight


def _map_with(each: Transform, old: Transform, new: Transform, reads: bool) -> Transform:
    if isinstance(each, Repeated):
        return dataclasses.replace(each, inner=_map_with(each.inner, old, new, reads))
    if each.key == old.key == old.dual.key:
        return new.dual if reads else new
    if each.key == old.key:
        return new
    return new.dual if each.key == old.dual.key else each


def _reads(value: ir.Value) -> Callable[[int], bool]:
    """Whether what reads a constant contracts an axis of it."""

    def contracted(axis: int) -> bool:
        assert value.shape is not None
        current, place = value, axis
        while True:
            use = next(iter(current.uses()))
            if use.node.op_type == "Transpose":
                place = list(use.node.attributes["perm"].as_ints()).index(place)
                current = use.node.outputs[0]
            elif use.node.op_type in ("Split", "Identity", "Cast"):
                current = use.node.outputs[0]
            elif use.node.op_type == "Squeeze":
                current, place = use.node.outputs[0], place - 1
            else:
                break
        if use.node.op_type == "MatMul" and use.idx == 1:
            return place == len(current.shape or ()) - 2
        return use.node.op_type == "Conv" and use.idx == 1 and place == 1

    return contracted


# ------------------------------------------------------------------------------------------------------ what is claimed


def wrong_relations(
    claims: Mapping[str, Mapping[str, Any]], transforms: Mapping[str, Step], rng: np.random.Generator
) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Step]]]:
    """(what was done, which value's relation, what it says now, transforms) for every relation of a certificate."""
    names = sorted(claims)
    for name in names:
        said = steps(dict(claims[name]))
        last = said[-1]
        before = {"transform": "composition", "steps": said[:-1]} if len(said) > 1 else {"transform": "identity"}
        yield f"{name}: a step is left out", name, before, dict(transforms)
        twice = {"transform": "composition", "steps": [*said, last]}
        yield f"{name}: a step is taken twice", name, twice, dict(transforms)
        axis = int(last["axis"])
        if axis > 0:
            moved = {"transform": "composition", "steps": [*said[:-1], {**last, "axis": axis - 1}]}
            yield f"{name}: along axis {axis - 1}", name, moved, dict(transforms)
        step = transforms.get(last["transform"])
        if step is not None:
            for what, other in _other_steps(step, rng):
                changed = {"transform": "composition", "steps": [*said[:-1], {**last, "transform": "other"}]}
                yield f"{name}: {what}", name, changed, {**transforms, "other": other}
    for one, other in itertools.pairwise(names):
        if claims[one] != claims[other]:
            yield f"{one}: what is said of {other}", one, dict(claims[other]), dict(transforms)


def _other_steps(step: Step, rng: np.random.Generator) -> Iterator[tuple[str, Step]]:
    if isinstance(step, Shift):
        yield "the shift the other way", Shift(-step.values)
        return
    if step.width == step.size:
        yield "by the inverse", step.inverse
        yield "by another rotation", Orthogonal(np.linalg.qr(rng.normal(size=(step.size, step.size)))[0])
    yield "by the dual", step.dual
    if isinstance(step, Scaling):
        values = step.values.copy()
        values[int(rng.integers(len(values)))] *= 1.001
        yield "by a slightly other diagonal", Scaling(values)
