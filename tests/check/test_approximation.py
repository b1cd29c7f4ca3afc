"""What is said of an approximated network: numbers found again by other means, and runtimes that do otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from quantized_networks import (
    BLOCK,
    LAYERS,
    WIDTH,
    blocks_of_int4,
    corrected,
    dynamic,
    exact_product,
    few_bits,
    inputs,
    network,
    static,
    weights,
)

from rewrite.check.approximation import Approximation, Histogram, measure_approximation, site_sensitivities
from rewrite.check.compare import UNSETTLED, logit_agreement
from rewrite.check.faithful import AS_DECLARED, FEW_FLIPS, NOT_DECLARED, judge_runtime
from rewrite.check.places import exact_matrix, find_sites, stored_matrix
from rewrite.check.reference import evaluate
from rewrite.check.runtime import Session, run
from rewrite.errors import RequestError
from rewrite.quantize.format import Format
from rewrite.quantize.rounding import round_to_nearest

FORMS = {
    "4 bits": few_bits(4),
    "4 bits with zero points": few_bits(4, symmetric=False),
    "4 bits, int8 activations": few_bits(4, level=4),
    "8 bits, int8 activations": few_bits(8, level=4),
    "int8 dynamic": dynamic,
    "int8 static": static(),
    "blocks of int4": blocks_of_int4,
}


def decibel(error: np.ndarray, size: np.ndarray) -> float:
    return 10 * math.log10(float(np.sum(np.square(size, dtype=float))) / float(np.sum(np.square(error, dtype=float))))


def options(level: str = "0") -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 3
    made.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    return made


# ── Sites ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", FORMS)
def test_every_product_is_a_site_with_its_weight(form: str) -> None:
    found = find_sites(network(), network(FORMS[form]))
    assert [site.name for site in found] == [f"W{i}" for i in range(LAYERS + 1)]
    for site, weight in zip(found, weights()):
        (place,) = site.places
        stored, exact = stored_matrix(place), exact_matrix(place)
        assert exact is not None
        assert stored is not None
        np.testing.assert_array_equal(exact, weight)
        steps = 255 if form.startswith(("8", "int8")) else 15
        largest = np.abs(weight).max(axis=0) * 2 / steps
        assert 0 < np.abs(stored - weight).max() <= largest.max(), "no code is further off than a step"
        assert site.elements == weight.size


def test_equal_networks_have_no_site() -> None:
    assert find_sites(network(), network()) == ()
    assert find_sites(network(dynamic), network(dynamic)) == ()


def test_a_correction_belongs_to_the_weight_that_it_corrects() -> None:
    exact, quantized = network(), network(corrected)
    site, *_ = find_sites(exact, quantized)
    plain = find_sites(exact, network(few_bits(4)))[0]
    assert site.bytes > plain.bytes
    kept, held = stored_matrix(site.places[0]), stored_matrix(plain.places[0])
    assert kept is not None
    assert held is not None
    # A and B are rounded to float32, the codes are not: what is left is that rounding.
    assert np.abs(kept - weights()[0]).max() < 1e-5 * np.abs(held - weights()[0]).max()
    row = next(row for row in measure_approximation(exact, quantized, inputs()).sites if row.name == "W0")
    assert row.format.endswith(f"rank {WIDTH}")
    assert row.weight_sqnr_db > 100


def test_a_weight_that_two_products_read_is_one_site() -> None:
    def shared(make: Callable) -> Callable:
        def product(builder, x, index, weight):
            made = make(builder, x, 0, weights()[0])
            made.outputs[0].name = f"product{index}"
            return made

        return product

    forms = [{0: make, 1: shared(make)} for make in (exact_product, few_bits(4))]
    found = find_sites(network(forms[0]), network(forms[1]))
    assert [(site.name, len(site.places)) for site in found] == [("W0", 2)]


# ── Errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_local_errors_are_those_of_the_definition() -> None:
    exact, quantized, sets = network(), network(dynamic), inputs()
    found = measure_approximation(exact, quantized, sets)
    names = [f"product{i}" for i in range(LAYERS + 1)]
    for row in found.sites:
        index = int(row.name[1:])
        alone = network({index: dynamic})
        errors, ends, sizes = [], [], []
        for one in sets:
            first = evaluate(exact, one, watch=names)[f"product{index}"]
            errors.append(evaluate(alone, one, watch=names)[f"product{index}"] - first)
            ends.append(evaluate(quantized, one, watch=names)[f"product{index}"] - first)
            sizes.append(first)
        # Both are sums of squares of float32 results: a part in a thousand is 0.004 dB.
        assert row.product_sqnr_db == pytest.approx(decibel(np.array(errors), np.array(sizes)), abs=0.005)
        assert row.end_to_end_sqnr_db == pytest.approx(decibel(np.array(ends), np.array(sizes)), abs=1e-9)
        stored = round_to_nearest(weights()[index].astype(float), Format(8, signed=True, symmetric=True)).values()
        assert row.weight_sqnr_db == pytest.approx(decibel(stored - weights()[index], weights()[index]), abs=1e-9)


def test_shares_are_of_networks_with_one_site_each() -> None:
    exact, sets = network(), inputs()
    form = {0: few_bits(8), 1: few_bits(2), 2: few_bits(4), 3: few_bits(8)}
    quantized = network(form)
    errors = {}
    for index, product in form.items():
        alone = [run(network({index: product}), one)["logits"] for one in sets]
        whole = [run(exact, one)["logits"] for one in sets]
        errors[f"W{index}"] = float(np.sum(np.square(np.subtract(alone, whole)))) / float(np.sum(np.square(whole)))
    found = measure_approximation(exact, quantized, sets)
    assert [row.name for row in found.sites] == sorted(errors, key=lambda name: -errors[name]), "worst first"
    assert found.sites[0].name == "W1"
    for row in found.sites:
        assert row.error == pytest.approx(errors[row.name], rel=1e-3)
        assert row.share == pytest.approx(errors[row.name] / sum(errors.values()), rel=1e-3)
    sensitivities = site_sensitivities(exact, quantized, sets)
    assert sensitivities == pytest.approx(errors, rel=1e-3)
    assert site_sensitivities(exact, quantized, sets, ["product1", "W2.codes"]) == pytest.approx(
        {"product1": errors["W1"], "W2.codes": errors["W2"]}, rel=1e-3
    )
    with pytest.raises(RequestError, match="no site W9"):
        site_sensitivities(exact, quantized, sets, ["W9"])


def test_where_runs_are_too_many_the_rest_says_so() -> None:
    found = measure_approximation(network(), network(few_bits(4)), inputs(), max_sites=2)
    assert [row.share is None for row in found.sites] == [False, False, True, True]
    assert "not measured" in str(found)


def test_quality_is_that_of_what_runs() -> None:
    exact, quantized, sets = network(), network(few_bits(4)), inputs(3)
    (row,) = measure_approximation(exact, quantized, sets).outputs
    whole, rough = (np.concatenate([run(model, one)["logits"] for one in sets]) for model in (exact, quantized))
    assert row.sqnr_db == pytest.approx(decibel(rough - whole, whole), abs=1e-3)
    agreement = logit_agreement(rough.astype(float), whole.astype(float))
    assert agreement is not None
    assert row.kl_mean == pytest.approx(agreement.kl_mean, rel=1e-3)
    assert (row.top1, row.top5) == (pytest.approx(agreement.top1), pytest.approx(agreement.topk))
    assert (row.sets, row.rows) == (3, len(whole))


def test_sizes_and_what_stayed() -> None:
    form = {0: few_bits(4), 2: few_bits(4)}
    found = measure_approximation(network(), network(form), inputs(), reasons={"W1": "it was asked to"})
    assert [(row.name, row.reason) for row in found.kept] == [("W1", "it was asked to"), ("W3", "")]
    for row in found.sites:
        assert row.bytes == row.elements // 2 + 4 * row.elements // BLOCK
        assert row.bits_per_weight == 5
    kept = sum(row.elements for row in found.kept)
    held = sum(row.elements for row in found.sites)
    assert found.bits_per_weight == pytest.approx((32 * kept + 5 * held) / (kept + held))
    assert found.bytes_before - found.bytes_after == sum(4 * row.elements - row.bytes for row in found.sites)


def test_histograms_are_before_and_after() -> None:
    found = measure_approximation(network(), network(static()), inputs(), original=network())
    row = next(row for row in found.sites if row.name == "W1")
    assert list(row.weight) == ["original", "rewritten", "stored"]
    assert row.weight["original"] == row.weight["rewritten"] == Histogram.of(weights()[1])
    assert sum(row.weight["stored"].counts) == weights()[1].size
    assert row.activation["rewritten"] == row.activation["original"]
    assert 10 < row.activation_sqnr_db < 60


def test_a_histogram_of_what_it_can_be_made_of() -> None:
    assert Histogram.of(np.array([np.nan])) is None
    flat = Histogram.of(np.full(5, 2.0))
    assert flat is not None
    assert (flat.low, flat.high, sum(flat.counts), flat.peak) == (2, 2, 5, 1)


def test_json_holds_all() -> None:
    found = measure_approximation(network(), network(dynamic), inputs(), original=network(), max_sites=1)
    again = Approximation.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert str(again) == str(found)
    with pytest.raises(RequestError, match="is no approximation"):
        Approximation.from_json("{}")


# ── The runtime ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", FORMS)
def test_a_runtime_that_computes_what_the_graph_says_is_accepted(form: str) -> None:
    quantized = network(FORMS[form])
    with Session(quantized, options()) as session:
        found = judge_runtime(quantized, inputs(), session)
    assert found.verdict == AS_DECLARED, found


def test_an_accuracy_level_that_the_runtime_chooses_is_rejected() -> None:
    quantized = network(blocks_of_int4)
    for level, verdict in (("0", AS_DECLARED), ("4", NOT_DECLARED)):
        with Session(quantized, options(level)) as session:
            found = judge_runtime(quantized, inputs(), session)
        assert found.verdict == verdict, found
    assert 30 < found.sqnr_db < 60
    whole = measure_approximation(network(), quantized, inputs(), options=options("4"))
    assert whole.verdict == NOT_DECLARED
    assert "from what the graph says" in str(whole)


def changed(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> ir.Model:
    copy = model.clone()
    value = copy.graph.initializers[name]
    assert value.const_value is not None
    array = change(np.array(value.const_value.numpy()))
    value.const_value = ir.tensor(array, name=name)
    return copy


def one_code_off(codes: np.ndarray) -> np.ndarray:
    codes.reshape(-1)[100] ^= 1
    return codes


MUTANTS = {
    "one code of one weight": ("W1.codes", one_code_off),
    "a scale": ("W2.scales", lambda scales: scales * np.float32(1.001)),
    "one scale": ("W0.scales", lambda s: np.where(np.arange(s.size).reshape(s.shape) == 5, s * np.float32(1.1), s)),
    "the order of columns": ("W3.codes", lambda codes: codes[::-1].copy()),
    "the bias": ("bias", lambda bias: bias + np.float32(0.001)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("form", ["4 bits", "4 bits, int8 activations", "int8 dynamic", "int8 static"])
def test_a_runtime_that_computes_something_else_is_rejected(form: str, mutant: str) -> None:
    quantized = network(FORMS[form])
    name, change = MUTANTS[mutant]
    with Session(changed(quantized, name, change), options()) as session:
        found = judge_runtime(quantized, inputs(), session)
    assert found.verdict == NOT_DECLARED, found


@pytest.mark.parametrize(
    ("declared", "real"), [(few_bits(4, level=4), few_bits(4)), (few_bits(4), few_bits(4, level=4))]
)
def test_other_activations_are_rejected(declared: Callable, real: Callable) -> None:
    quantized = network(declared)
    with Session(network(real), options()) as session:
        found = judge_runtime(quantized, inputs(), session)
    assert found.verdict == NOT_DECLARED, found


def at_ties(builder, x: ir.Value, index: int, weight: np.ndarray) -> ir.Node:
    """Static int8 of x/3·3, whose float32 rounding decides every tie."""
    if index == 0:
        third = builder.constant("third", np.array(1 / 3, np.float32))
        back = builder.constant("back", np.array(1 / np.float64(np.float32(1 / 3)), np.float32))
        for factor, name in ((third, "third_of_x"), (back, "x_again")):
            x = builder.node("Mul", [x, factor], name).outputs[0]
    return static(1 / 16)(builder, x, index, weight)


def tied(count: int = 2) -> list[dict[str, np.ndarray]]:
    """Odd multiples of half a step."""
    make = np.random.default_rng(3)
    return [{"x": ((2 * make.integers(-40, 40, (32, WIDTH)) + 1) / 32).astype(np.float32)} for _ in range(count)]


def test_flipped_ties_are_no_difference_and_hide_none() -> None:
    quantized, sets = network({0: at_ties, 1: dynamic}), tied()
    with Session(quantized, options()) as session:
        found = judge_runtime(quantized, sets, session)
    assert found.flips > 100, "the example holds ties"
    assert found.distance > 1e-4, "and their flips are seen in the outputs"
    assert found.verdict == AS_DECLARED, found
    for name, change in (MUTANTS["the order of columns"], ("W0.scales", lambda scales: 2 * scales)):
        name = "W1.codes" if name == "W3.codes" else name
        with Session(changed(quantized, name, change), options()) as session:
            found = judge_runtime(quantized, sets, session)
        assert found.verdict == NOT_DECLARED, found


def test_a_few_flips_of_the_imitation_hide_nothing_in_other_rows() -> None:
    """d₃₂ is a flip here, and a bias that is off by less than that is told from it by the rows without one."""
    quantized, sets = network(few_bits(8, level=4)), inputs(2, seed=12)
    with Session(quantized, options()) as session:
        right = judge_runtime(quantized, sets, session)
    assert 0 < right.flips < FEW_FLIPS, "the example holds a few"
    assert right.verdict == AS_DECLARED
    with Session(changed(quantized, "bias", lambda bias: bias + np.float32(1e-4)), options()) as session:
        found = judge_runtime(quantized, sets, session)
    assert found.distance < 8 * right.imitated
    assert found.verdict == NOT_DECLARED, found


@pytest.mark.parametrize("form", ["8 bits, int8 activations", "int8 dynamic", "4 bits, int8 activations"])
def test_flips_that_only_what_runs_has_are_explained_on_any_inputs(form: str) -> None:
    """These seeds hold codes that the kernel's tanh flips and the reference's does not, the first of a chain too."""
    quantized = network(FORMS[form])
    with Session(quantized, options()) as session:
        for seed in (1, 6, 10, 12, 20):
            found = judge_runtime(quantized, inputs(2, seed=seed), session)
            assert found.verdict == AS_DECLARED, (seed, found)


def test_a_flip_that_no_imitation_has_is_explained_or_unsettled() -> None:
    """One activation crosses a tie in what runs, and none in the imitation; a single row settles nothing."""
    quantized = network({0: static(1 / 16)})
    for rows, verdict in ((64, AS_DECLARED), (1, UNSETTLED)):
        x = np.random.default_rng(5).standard_normal((rows, WIDTH)).astype(np.float32)
        x[0, 0] = np.float32(0.5 / 16)
        moved = network({0: static(1 / 16)})
        shift = ir.Value(name="shift", const_value=ir.tensor(np.zeros((rows, WIDTH), np.float32), name="shift"))
        moved.graph.register_initializer(shift)
        values = np.zeros((rows, WIDTH), np.float32)
        values[0, 0] = 1e-6
        shift.const_value = ir.tensor(values, name="shift")
        add = ir.Node("", "Add", [moved.graph.inputs[0], shift])
        add.outputs[0].name = "moved"
        moved.graph.inputs[0].replace_all_uses_with(add.outputs[0])
        add.replace_input_with(0, moved.graph.inputs[0])
        moved.graph.insert_before(next(iter(moved.graph)), add)
        with Session(moved, options()) as session:
            found = judge_runtime(quantized, [{"x": x}], session)
        assert (found.flips, found.verdict) == (0, verdict), found
        assert found.distance > 1e-5
