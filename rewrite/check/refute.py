"""Refuting a pair: inputs on which two networks differ, and the smallest part of them in which they do.

A difference counts where float64 shows one that neither rounding nor the last places of the constants can explain:

    |B(x) − A(x)|  >  LIMIT · max( |A₃₂ − A|, |B₃₂ − B|, |A_δ − A|, |B_δ − B|, ulp )

with A, B in float64, A₃₂, B₃₂ in float32, and A_δ, B_δ in float64 with constants and inputs moved by a few units in the
last place. A router that such a move flips, a sum that cancels, a result that depends on the order of additions: all of
them raise the right side, and nothing is refuted.

The part is found by values. A value of B agrees where A has one like it (of its name, through its relation, or of its
content); going back from a wrong output, the cut runs through the nearest values that agree.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rewrite.check.inputs import generate_inputs
from rewrite.check.localize import Step, carried
from rewrite.check.noise import comparable, ulp, unit_roundoff
from rewrite.check.reference import evaluate, inlined, storage_dtype, values_of
from rewrite.errors import RewriteError

LIMIT = 8.0
"""How far beyond what rounding explains a difference must be."""

MOVED_ULPS = 5.0
"""How far constants are moved: as far as folding them in float32 may have put them, all at once."""

MOVES = 4

UNMOVED = frozenset("Pow Resize Upsample Range OneHot Pad Equal Clip Greater Less Where Tile".split())
"""Readers whose constants are not measured numbers but part of what is computed (an exponent, a shape, a threshold)."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Counterexample:
    """Inputs on which `output` differs by `difference`, where rounding explains `explained` at most."""

    inputs: dict[str, np.ndarray]
    output: str
    difference: float
    explained: float


@dataclass(frozen=True, eq=False)
class Refutation:
    """A counterexample, and the part of both networks in which they part.

    `node` computes `value`, the first value of the rewritten network that is wrong although all that it is computed
    from agrees; `partner` is what it should be in the original. Both parts take `inputs` and give one output.
    """

    counterexample: Counterexample
    node: str
    operator: str
    value: str
    partner: str
    difference: float
    explained: float
    original: ir.Model
    rewritten: ir.Model
    inputs: dict[str, np.ndarray]
    paths: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | Path) -> dict[str, str]:
        """Write both parts, their inputs, the network's inputs and a summary into `folder`; returns the paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("original", self.original), ("rewritten", self.rewritten)):
            ir.save(part, folder / f"{name}.onnx")
            self.paths[name] = str(folder / f"{name}.onnx")
        for name, arrays in (("inputs", self.inputs), ("counterexample", self.counterexample.inputs)):
            np.savez(folder / f"{name}.npz", **arrays)  # pyright: ignore[reportArgumentType]
            self.paths[name] = str(folder / f"{name}.npz")
        summary = folder / "refutation.json"
        summary.write_text(json.dumps(self.to_json(), ensure_ascii=False, indent=1), encoding="utf-8")
        self.paths["summary"] = str(summary)
        return self.paths

    def to_json(self) -> dict[str, Any]:
        return {
            **{"node": self.node, "operator": self.operator, "value": self.value, "partner": self.partner},
            **{"difference": self.difference, "explained": self.explained},
            "nodes": {"original": len(self.original.graph), "rewritten": len(self.rewritten.graph)},
            "inputs": {name: list(array.shape) for name, array in self.inputs.items()},
            "output": {
                "name": self.counterexample.output,
                "difference": self.counterexample.difference,
                "explained": self.counterexample.explained,
            },
            **({"paths": dict(self.paths)} if self.paths else {}),
        }

    def __str__(self) -> str:
        counts = f"{len(self.original.graph)} nodes of the original, {len(self.rewritten.graph)} of the rewritten one"
        found = self.counterexample
        return (
            f"{self.value} is off by {self.difference:.2g} at {self.operator} node {self.node}, where rounding "
            f"explains {self.explained:.2g} ({counts}); output {found.output} by {found.difference:.2g}"
        )


# ── A counterexample ────────────────────────────────────────────────────────────────────────────────────────────────


def counterexample(
    original: ir.Model, rewritten: ir.Model, inputs: Sequence[Arrays] | None = None
) -> Counterexample | None:
    """Inputs on which the two differ by more than rounding explains; None where none are found.

    `inputs` are tried in order (generated ones unless given). None too where an operator has no float64 definition.
    """
    names = [value.name or "" for value in original.graph.outputs]
    if [value.name for value in rewritten.graph.outputs] != names:
        return None
    try:
        for given in generate_inputs(original) if inputs is None else inputs:
            exact, found = evaluate(original, given), evaluate(rewritten, given)
            noise = {name: _spread(exact[name], value) for name, value in _rounded(original, given).items()}
            floors = {name: _floor(exact[name], original) for name in names}
            wrong = [n for n in names if _difference(exact[n], found[n]) > LIMIT * max(noise[n], floors[n])]
            if not wrong:
                continue
            explained = _explained(original, rewritten, given, exact, found, names)
            for name in wrong:
                difference, limit = _difference(exact[name], found[name]), max(explained[name], floors[name])
                if difference > LIMIT * limit:
                    return Counterexample(dict(given), name, difference, limit)
    except RewriteError:
        # Nothing can be refuted by evaluating what has no definition.
        return None
    return None


def _rounded(model: ir.Model, inputs: Arrays) -> dict[str, np.ndarray]:
    return evaluate(model, inputs, precision=np.float32)


def _explained(
    original: ir.Model, rewritten: ir.Model, inputs: Arrays, exact: Arrays, found: Arrays, names: Sequence[str]
) -> dict[str, float]:
    """For every output the largest difference that rounding makes in either network."""
    # What float64 itself loses: (x + 1e19) − 1e19 is x over the reals, and 0 in both precisions.
    largest = max(_largest(original, inputs), _largest(rewritten, inputs))
    worst = {name: largest * unit_roundoff(np.float64) if exact[name].dtype.kind == "f" else 0.0 for name in names}
    for model, base in ((original, exact), (rewritten, found)):
        runs = [_rounded(model, inputs)]
        for seed in range(MOVES):
            runs.append(evaluate(moved(model, seed), moved_inputs(inputs, seed)))
        for run in runs:
            for name in names:
                worst[name] = max(worst[name], _spread(base[name], run[name]))
    return worst


def _largest(model: ir.Model, inputs: Arrays) -> float:
    """The largest number of the computation that is no masking value."""
    sizes = [0.0]

    def look(_: str, array: np.ndarray) -> None:
        if array.dtype.kind == "f" and array.size:
            sizes.append(float(np.abs(array[comparable(array, np.float32)]).max(initial=0.0)))

    evaluate(model, inputs, on_value=look)
    return max(sizes)


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference where `expected` is a number that means something; infinite for another shape."""
    if expected.shape != found.shape or (expected.dtype.kind == "f") != (found.dtype.kind == "f"):
        return float("inf")
    if expected.dtype.kind != "f":
        return float(np.any(expected != found))
    where = comparable(expected, np.float32)
    if not np.isfinite(found[where]).all():
        return float("inf")
    return float(np.abs(found[where] - expected[where]).max(initial=0.0))


def _spread(base: np.ndarray, run: np.ndarray) -> float:
    """How far `run` is from `base` where both are finite; a run that broke down (a shape, all of it) explains all."""
    if base.shape != run.shape:
        return float("inf")
    if base.dtype.kind != "f":
        return float("inf") if np.any(base != run) else 0.0
    where = comparable(base, np.float32)
    wide = np.asarray(run, np.float64)[where]
    # Of a number that overflows in float32 nothing is learned, of one that turns into NaN after a move neither.
    finite = np.isfinite(wide)
    if where.any() and not finite.any():
        return float("inf")
    return float(np.abs(wide[finite] - base[where][finite]).max(initial=0.0))


def _floor(exact: np.ndarray, model: ir.Model) -> float:
    """One unit in the last place at the largest entry: what storing a value costs."""
    if exact.dtype.kind != "f":
        return 0.0
    kept = np.abs(exact[comparable(exact, np.float32)])
    return float(ulp(kept.max(initial=0.0), storage_dtype(model))) if kept.size else 0.0


def moved(model: ir.Model, seed: int) -> ir.Model:
    """`model` with every floating-point constant of more than one entry moved by up to `MOVED_ULPS` of its type."""
    copy = model.clone()
    for name, value in copy.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point() or tensor.size < 2:
            continue
        if any(node.op_type in UNMOVED for node in value.consumers()):
            continue
        value.const_value = _moved_tensor(tensor, name, seed)
    return copy


def _moved_tensor(tensor: ir.TensorProtocol, name: str, seed: int) -> ir.TensorProtocol:
    def made() -> ir.TensorProtocol:
        return ir.tensor(_moved(np.asarray(tensor.numpy()), name, seed), name=name)

    return ir.LazyTensor(made, ir.DataType.DOUBLE, ir.Shape(tensor.shape.numpy()), name=name)


def _moved(values: np.ndarray, name: str, seed: int) -> np.ndarray:
    wide = values.astype(np.float64)
    step = MOVED_ULPS * ulp(np.where(np.isfinite(wide), wide, 0.0), values.dtype)
    step[~np.isfinite(wide) | (wide == 0)] = 0.0
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return wide + step * generator.uniform(-1.0, 1.0, wide.shape)


def moved_inputs(inputs: Arrays, seed: int) -> dict[str, np.ndarray]:
    """`inputs` with real numbers moved as constants are."""
    return {
        name: _moved(array, name, seed) if array.dtype.kind == "f" and array.size > 1 else array
        for name, array in inputs.items()
    }


# ── Where they part ─────────────────────────────────────────────────────────────────────────────────────────────────


def refute(
    original: ir.Model,
    rewritten: ir.Model,
    *,
    inputs: Sequence[Arrays] | None = None,
    relations: Mapping[str, Mapping] | None = None,
    transforms: Mapping[str, Step] | None = None,
) -> Refutation | None:
    """A counterexample and the smallest part in which the networks differ on it; None where there is none.

    `relations` and `transforms` are those of a certificate: what values of the rewritten network are of the original's.
    """
    first, second = inlined(original), inlined(rewritten)
    found = counterexample(first, second, inputs)
    if found is None:
        return None
    try:
        search = _Search(first, second, found, relations or {}, transforms or {})
        for value in search.suspects():
            part = search.cut(value)
            if part is not None:
                return part
    except RewriteError:
        pass
    # Nothing smaller shows it: the networks themselves.
    producer = next(v for v in second.graph.outputs if v.name == found.output).producer()
    return Refutation(
        found,
        (producer.name or found.output) if producer is not None else found.output,
        producer.op_type if producer is not None else "",
        *(found.output, found.output, found.difference, found.explained, first, second, dict(found.inputs)),
    )


class _Search:
    """Values of both networks on one counterexample, and which of them agree."""

    def __init__(
        self,
        original: ir.Model,
        rewritten: ir.Model,
        found: Counterexample,
        relations: Mapping[str, Mapping],
        transforms: Mapping[str, Step],
    ) -> None:
        self.original, self.rewritten, self.found = original, rewritten, found
        self.relations, self.transforms = relations, transforms
        self.theirs = dict(values_of(original, found.inputs))
        self.ours = dict(values_of(rewritten, found.inputs))
        self.limits = _limits(original, found.inputs, self.theirs)
        for name, limit in _limits(rewritten, found.inputs, self.ours).items():
            self.limits[name] = max(limit, self.limits.get(name, 0.0))
        self.known = {v.name or "": v for v in _values(original)}
        self.alike = _by_size(self.theirs)
        self.agreeing: dict[str, str] = {}
        for name in self.ours:
            partner = self._partner(name)
            if partner is not None:
                self.agreeing[name] = partner

    def _expected(self, name: str, partner: str) -> np.ndarray | None:
        """What the rewritten value `name` should be if it is the original's `partner`."""
        relation = self.relations.get(name, {})
        if not relation:
            return self.theirs.get(partner)
        value = self.theirs.get(str(relation.get("partner", partner)))
        try:
            return None if value is None else carried(value, relation, self.transforms)
        except (KeyError, ValueError, IndexError):
            return None

    def _agrees(self, name: str, expected: np.ndarray | None) -> bool:
        ours = self.ours[name]
        if expected is None or expected.shape != ours.shape or expected.dtype.kind != ours.dtype.kind:
            return False
        return _difference(expected, ours) <= LIMIT * self._limit(name, expected)

    def _limit(self, name: str, expected: np.ndarray) -> float:
        return max(self.limits.get(name, 0.0), _floor(expected, self.original))

    def _partner(self, name: str) -> str | None:
        """The original's value that `name` agrees with: its namesake, or one of the same content."""
        if self._agrees(name, self._expected(name, name)):
            return str(self.relations.get(name, {}).get("partner", name))
        ours = self.ours[name]
        if name in self.relations or ours.dtype.kind != "f" or ours.size < 2 or not np.ptp(ours):
            return None
        fingerprint = _fingerprint(ours)
        for other, known in self.alike.get(ours.shape, ()):
            if abs(known - fingerprint) <= 1e-3 * (1.0 + abs(fingerprint)) and self._agrees(name, self.theirs[other]):
                return other
        return None

    # ── Suspects ────────────────────────────────────────────────────────────────────────────────────────────────

    def suspects(self) -> Iterator[ir.Value]:
        """Values of the rewritten graph that differ from their namesakes and on which the wrong output rests, in order.

        One whose namesake is read by operators that the rewritten graph has no more may have changed its meaning (a
        convolution that holds the normalization behind it): it is left out, and the next one is larger.
        """
        output = next(value for value in self.rewritten.graph.outputs if value.name == self.found.output)
        reached, _ = _cone(output, self._boundary)
        for node in self.rewritten.graph:
            for value in node.outputs:
                if value is output or (value in reached and self._differs(value) and self._means_the_same(value)):
                    yield value

    def _boundary(self, value: ir.Value) -> bool:
        """Whether the cut may run through `value`: it agrees, and is no size that the prover would lose sight of."""
        name = value.name or ""
        return name in self.agreeing and (value.is_graph_input() or self.ours[name].dtype.kind in "fb")

    def _boundary_of_original(self, value: ir.Value) -> bool:
        array = self.theirs.get(value.name or "")
        return array is not None and array.dtype.kind in "fb"

    def _differs(self, value: ir.Value) -> bool:
        name = value.name or ""
        ours, expected = self.ours.get(name), self._expected(name, name)
        if ours is None or expected is None or name in self.agreeing:
            return False
        return ours.shape == expected.shape and ours.dtype.kind == expected.dtype.kind

    def _means_the_same(self, value: ir.Value) -> bool:
        namesake = self.known.get(value.name or "")
        if namesake is None:
            return False
        readers = [output.name for node in namesake.consumers() for output in node.outputs]
        return all(reader in self.ours for reader in readers if reader in self.theirs)

    # ── The cut ─────────────────────────────────────────────────────────────────────────────────────────────────

    def cut(self, value: ir.Value) -> Refutation | None:
        """The parts that compute `value` and its partner from values that agree; None where they do not differ."""
        name = value.name or ""
        partner = self.known.get(str(self.relations.get(name, {}).get("partner", name)))
        producer = value.producer()
        if partner is None or producer is None:
            return None
        _, ours = _cone(value, self._boundary)
        counterparts = {self.agreeing[v.name or ""] for v in ours if (v.name or "") in self.agreeing}
        everything = set(self.agreeing.values())
        cuts = [
            _cone(partner, lambda v, chosen=chosen: v.name in chosen and self._boundary_of_original(v))
            for chosen in (counterparts, everything)
        ]
        _, theirs = min(cuts, key=lambda cone: (len({v.producer() for v in cone[0]}), len(cone[1])))
        if any((v.name or "") not in self.theirs for v in theirs):
            return None
        feeds, named = self._feeds(ours, theirs)
        result = (partner.name or "", _typed(self.theirs[partner.name or ""], partner))
        first = _part(self.original, theirs, partner, {v: v.name or "" for v in theirs}, feeds, result)
        second = _part(self.rewritten, ours, value, named, feeds, result)
        difference, explained = self._confirmed(first, second, feeds, name)
        if not difference > LIMIT * explained:
            return None
        where = (producer.name or name, producer.op_type, name, partner.name or "")
        return Refutation(self.found, *where, difference, explained, first, second, feeds)

    def _feeds(
        self, ours: Sequence[ir.Value], theirs: Sequence[ir.Value]
    ) -> tuple[dict[str, np.ndarray], dict[ir.Value, str]]:
        """What both parts are given, by name, and the names of the rewritten part's inputs.

        A value of the rewritten part is given its partner's numbers under its partner's name; one in another basis its
        own, carried there, under a name of its own.
        """
        feeds = {v.name or "": _typed(self.theirs[v.name or ""], v) for v in theirs}
        named: dict[ir.Value, str] = {}
        for value in ours:
            name = value.name or ""
            partner = self.agreeing.get(name, name)
            expected = self._expected(name, partner)
            if self.relations.get(name, {}).get("transform", "identity") != "identity" and expected is not None:
                named[value] = f"{partner}.rewritten"
                feeds[named[value]] = _typed(expected, value)
            else:
                named[value] = partner
                array = self.theirs[partner] if partner in self.theirs else self.ours[name]
                feeds.setdefault(partner, _typed(array, value))
        return feeds, named

    def _confirmed(self, first: ir.Model, second: ir.Model, feeds: Arrays, name: str) -> tuple[float, float]:
        """The difference of the two parts on what they are given, and what rounding explains of it."""
        expected = next(iter(evaluate(first, feeds).values()))
        found = next(iter(evaluate(second, feeds).values()))
        relation = self.relations.get(name, {})
        if relation:
            expected = carried(expected, relation, self.transforms)
        limit = _floor(expected, self.original)
        for model, base in ((first, expected), (second, found)):
            run = next(iter(_rounded(model, feeds).values()))
            if relation and model is first:
                run = carried(run.astype(np.float64), relation, self.transforms)
            limit = max(limit, _spread(base, run))
        return _difference(expected, found), limit


def _limits(model: ir.Model, inputs: Arrays, exact: Arrays) -> dict[str, float]:
    """For every value how far rounding moves it: the run in float32, and one with constants moved."""
    runs = [values_of(model, inputs, precision=np.float32), values_of(moved(model, 0), moved_inputs(inputs, 0))]
    worst: dict[str, float] = {}
    for run in runs:
        for name, array in run:
            if name in exact:
                worst[name] = max(worst.get(name, 0.0), _spread(exact[name], array))
    return worst


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _fingerprint(array: np.ndarray) -> float:
    """A number that arrays of like content share: the mean size of their finite entries."""
    return float(np.mean(np.abs(array), where=np.isfinite(array), dtype=np.float64))


def _by_size(values: Arrays) -> dict[tuple[int, ...], list[tuple[str, float]]]:
    found: dict[tuple[int, ...], list[tuple[str, float]]] = {}
    for name, array in values.items():
        if array.dtype.kind == "f" and array.size > 1:
            found.setdefault(array.shape, []).append((name, _fingerprint(array)))
    return found


def _cone(value: ir.Value, stop: Any) -> tuple[set[ir.Value], list[ir.Value]]:
    """The values that `value` is computed from, itself among them, and the inputs at which `stop` or the graph ends."""
    reached, inputs, stack = {value}, [], [value]
    while stack:
        producer = stack.pop().producer()
        for used in _used(producer) if producer is not None else ():
            if used in reached or used in inputs:
                continue
            if used.is_graph_input() or stop(used):
                inputs.append(used)
            elif not used.is_initializer():
                reached.add(used)
                stack.append(used)
    return reached, inputs


def _used(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, from inside its subgraphs too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graph = attribute.as_graph()
            inside = {value for inner in graph for value in inner.outputs} | set(graph.inputs)
            for inner in graph:
                yield from (value for value in _used(inner) if value not in inside)


def _typed(array: np.ndarray, value: ir.Value) -> np.ndarray:
    """A value's numbers in the type that the graph declares for it, float32 where it says nothing."""
    if array.dtype.kind != "f":
        return array
    declared = value.dtype
    return array.astype(declared.numpy() if declared is not None and declared.is_floating_point() else np.float32)


def _part(
    model: ir.Model,
    inputs: Sequence[ir.Value],
    output: ir.Value,
    named: Mapping[ir.Value, str],
    feeds: Arrays,
    result: tuple[str, np.ndarray],
) -> ir.Model:
    """The part of `model` from `inputs` to `output`, with the inputs `feeds` (those it does not use among them).

    `result` is the output's name, and its partner's numbers.
    """
    graph = ir.convenience.extract(model.graph, list(inputs), [output])
    for mine, value in zip(graph.inputs, inputs):
        mine.name = f"\0{named[value]}"
    graph.outputs[0].name = f"\0{result[0]}"
    graph.outputs[0].dtype = graph.outputs[0].dtype or ir.DataType.from_numpy(result[1].dtype)
    graph.outputs[0].shape = ir.Shape(result[1].shape)
    taken = {*feeds, result[0]}
    for each in [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        if each.name in taken:
            each.name = f"{each.name}.inside"
    given = {}
    for mine in [*graph.inputs, *graph.outputs]:
        mine.name = (mine.name or "").removeprefix("\0")
    for mine in graph.inputs:
        given[mine.name] = mine
    ordered = []
    for name, array in feeds.items():
        mine = given.get(name) or ir.Value(name=name)
        mine.shape = ir.Shape(array.shape)
        mine.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        ordered.append(mine)
    graph.inputs.clear()
    graph.inputs.extend(ordered)
    for name, value in list(graph.initializers.items()):
        if value.const_value is not None:
            stored = value.const_value
            value.const_value = ir.tensor(np.asarray(stored.numpy()), dtype=stored.dtype, name=name)
    part = ir.Model(graph, ir_version=model.ir_version)
    part.graph.name = "part"
    return part


__all__ = ["Counterexample", "Refutation", "counterexample", "moved", "refute"]
