"""How many bits each weight gets, under a budget: those that together move the outputs least.

      minimize Σ_w e(w, b_w)      subject to Σ_w c(w, b_w) ≤ budget      b_w one of the widths that have a kernel

e(w, b) is measured: what the outputs are off (`output_error`) with w alone at b bits, on the first sets of the
calibration data. Errors of several weights are taken to add, as independent ones do. c counts bits, bytes, or
nanoseconds of the target's kernels. The minimum is exact: all choices that no other beats in both are kept, site by
site, as long as they are at most `KEPT` (more are thinned to the best of each of `KEPT` equal parts of the cost). They
are found for all budgets at once, so that a larger budget never chooses worse.

Source    Dumitru et al. 2024, arXiv:2406.17415 (bits by layer); Kellerer et al. 2004, Knapsack Problems, §11
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import onnx_ir as ir

from rewrite.errors import RequestError
from rewrite.ir.program import Program
from rewrite.passes.quantize_weights import BUDGETS, QuantizeWeights
from rewrite.quantize.format import Format
from rewrite.quantize_rule import WeightSite
from rewrite.rule import apply_pass

KEPT = 1 << 14
"""Undominated choices that are kept from one weight to the next."""

SETS, RUNS = 4, 1000
"""Sets of inputs that effects are measured on, and runs of the network that this may take (or one set)."""

LOGITS = "logits"
"""The output whose rows are read by a softmax."""

WIDTHS = {0: (0, 4), 4: (0, 2, 4, 8)}
"""By accuracy level the numbers of bits that have a kernel; 0 is floating point."""

Effects = Mapping[str, Mapping[int, float]]
"""By weight and number of bits what the outputs are off, or a cost."""


def with_chosen_bits(
    rule: QuantizeWeights,
    program: Program,
    inputs: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[str], None] | None = None,
) -> QuantizeWeights:
    """`rule` with the bits of every weight of `program` that it takes, chosen under its budget; itself without one.

    Raises RequestError for a budget that the fewest bits exceed, and for one of time where the target has no table.
    """
    name = rule.budget
    sites = _taken(rule, program) if name else {}
    if not sites:
        return rule
    effects = measured_effects(rule, program, sites, inputs, progress)
    costs = {
        weight: {bits: _cost(rule, name, site, bits) for bits in effects[weight]} for weight, site in sites.items()
    }
    budget = float(getattr(rule, name))
    if name == "budget_bits":
        budget *= sum(int(np.prod(site.shape)) for site in sites.values())
    return replace(rule, layer_bits=chosen_bits(effects, costs, budget, name), effects=effects)


def _taken(rule: QuantizeWeights, program: Program) -> dict[str, WeightSite]:
    """The weights that the rule would quantize, by name."""
    free = replace(rule, bits=4, layer_bits={}, **dict.fromkeys(BUDGETS))
    sites = [site for site in rule.sites(program) if not any(each.check(free, site) for each in rule.requires)]
    return {site.name: site for site in sites}


def measured_effects(
    rule: QuantizeWeights,
    program: Program,
    sites: Mapping[str, WeightSite],
    inputs: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[int, float]]:
    """What each weight alone does to the outputs at every number of bits that it may have, on the first sets."""
    from rewrite.check.places import find_sites
    from rewrite.check.switched import Switched

    widths = {name: _widths(rule, name) for name in sites}
    tried = sorted({bits for each in widths.values() for bits in each if bits})
    sets = list(islice(inputs, max(1, min(SETS, RUNS // max(1, len(sites) * len(tried))))))
    effects: dict[str, dict[int, float]] = {name: {0: 0.0} if 0 in each else {} for name, each in widths.items()}
    for bits in tried:
        trial = program.clone()
        only = {name: bits if bits in each else 0 for name, each in widths.items()}
        apply_pass(trial, replace(rule, layer_bits=only, **dict.fromkeys(BUDGETS)))
        found = find_sites(program.model, trial.model)
        with Switched(program.model, found) as switched:
            references = [switched.run(one) for one in sets]
            for index, site in enumerate(found):
                if progress is not None:
                    progress(f"effect of {bits} bits: {index + 1}/{len(found)}")
                given = [switched.run(one, [index]) for one in sets]
                error = float(np.mean([output_error(*pair) for pair in zip(given, references)]))
                for weight in site.weights:
                    if weight.name in effects:
                        effects[weight.name][bits] = error
    return effects


def output_error(given: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray]) -> float:
    """How far the outputs of one set are off: of logits the divergence, of others the squared relative error.

    Of logits z with p = softmax(z), and errors δ, it is Var_p(δ)/2, the Kullback-Leibler divergence up to δ³, averaged
    over rows: unlike the divergence it does not drown in rounding, and unlike δ² it ignores what softmax ignores.
    """
    parts = []
    for name, array in exact.items():
        if array.dtype.kind != "f" or not array.size:
            continue
        wanted, found = array.astype(np.float64), given[name].astype(np.float64)
        where = np.isfinite(wanted)
        error = np.where(where, found, 0.0) - np.where(where, wanted, 0.0)
        if name == LOGITS and wanted.ndim:
            shares = np.exp(wanted - wanted.max(axis=-1, keepdims=True))
            shares /= shares.sum(axis=-1, keepdims=True)
            mean = (shares * error).sum(axis=-1, keepdims=True)
            return float((shares * (error - mean) ** 2).sum(axis=-1).mean() / 2)
        size = float((wanted[where] ** 2).sum())
        parts.append(float((error**2).sum()) / size if size else 0.0)
    return float(np.mean(parts)) if parts else 0.0


def _widths(rule: QuantizeWeights, name: str) -> tuple[int, ...]:
    return (rule.layer_bits[name],) if name in rule.layer_bits else WIDTHS[rule.accuracy_level]


def _cost(rule: QuantizeWeights, budget: str, site: WeightSite, bits: int) -> float:
    """Of one weight, in bits, bytes or nanoseconds a row."""
    rows, columns = site.shape
    count, size = rows * columns, (site.constant.dtype or ir.DataType.FLOAT).bitwidth // 8
    if budget == "budget_bits":
        return float(count * (bits or 8 * size))
    if budget == "budget_ns":
        return count * _nanoseconds(rule, bits)
    if not bits:
        return float(count * size)
    form = Format(bits, signed=False, symmetric=rule.symmetric, block=rule.block)
    groups = form.groups(rows)
    points = 0 if rule.symmetric else -(-groups * bits // 8)
    return float(columns * (groups * (form.block * bits // 8 + size) + points) + rule.rank * (rows + columns) * size)


def _nanoseconds(rule: QuantizeWeights, bits: int) -> float:
    table = rule.multiply_ns or {}
    key = (bits, rule.accuracy_level if bits else 0)
    if key not in table:
        raise RequestError(
            f"budget_ns: what a product with weights of {bits or 'all'} bits takes is not known of the target",
            remedy="give budget_bits or budget_bytes",
        )
    return table[key]


def chosen_bits(effects: Effects, costs: Effects, budget: float, name: str = "budget") -> dict[str, int]:
    """The bits of every weight with the least sum of effects whose costs are within the budget.

    Among equals the cheapest. Raises RequestError where even the cheapest costs more.

    >>> effects = {"a": {2: 9.0, 4: 1.0}, "b": {2: 2.0, 4: 1.0}}
    >>> costs = {"a": {2: 2.0, 4: 4.0}, "b": {2: 2.0, 4: 4.0}}
    >>> chosen_bits(effects, costs, 6.0), chosen_bits(effects, costs, 5.0)
    ({'a': 4, 'b': 2}, {'a': 2, 'b': 2})
    """
    total, errors = np.zeros(1), np.zeros(1)
    behind: list[tuple[np.ndarray, np.ndarray]] = []
    widest = sum(max(each.values()) for each in costs.values())
    for weight, options in effects.items():
        bits = sorted(options)
        cost = (total[:, None] + [costs[weight][each] for each in bits]).ravel()
        error = (errors[:, None] + [options[each] for each in bits]).ravel()
        kept = _undominated(cost, error, widest / KEPT)
        total, errors = cost[kept], error[kept]
        behind.append((kept // len(bits), np.array(bits)[kept % len(bits)]))
    within = np.flatnonzero(total <= budget)
    if not len(within):
        raise RequestError(f"{name}: {budget:g} is less than the {total[0]:g} of the fewest bits", remedy="allow more")
    place, found = int(within[-1]), list[int]()
    for before, bits in reversed(behind):
        found.append(int(bits[place]))
        place = int(before[place])
    return dict(zip(effects, reversed(found)))


def _undominated(cost: np.ndarray, error: np.ndarray, part: float) -> np.ndarray:
    """Places of what nothing cheaper or as cheap beats, the cheapest first; of more than `KEPT` the best of each part
    of the cost."""
    order = np.lexsort((error, cost))
    best = np.minimum.accumulate(error[order])
    better = np.concatenate([[True], error[order][1:] < best[:-1]])
    kept = order[better]
    if len(kept) <= KEPT:
        return kept
    # Errors fall along `kept`: the last of a part is the best of it. The cheapest stays, so that a budget that can be
    # kept is kept.
    parts = np.floor(cost[kept] / part)
    last = np.concatenate([parts[1:] != parts[:-1], [True]])
    last[0] = True
    return kept[last]


def average_bits(rule: QuantizeWeights, sites: Sequence[WeightSite]) -> float:
    """Bits of a weight's codes on average over `sites`, those of floating point counted as they are stored."""
    named = {site.name: site for site in sites}
    bits = sum(_cost(rule, "budget_bits", site, rule.bits_of(site)) for site in named.values())
    return bits / max(1, sum(int(np.prod(site.shape)) for site in named.values()))


__all__ = ["average_bits", "chosen_bits", "measured_effects", "with_chosen_bits"]
