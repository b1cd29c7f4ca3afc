"""The cut against every placement there is, on hand-made streams and on random ones; then on regions of networks."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
from networks import network

from rewrite.basis.placement import NOMINAL, Copy, Costs, Prices, Problem, Tie, place, problem_of
from rewrite.basis.regions import grow
from rewrite.basis.transforms import CENTRING

Small = Problem[str, str]


def subsets(values):
    return chain.from_iterable(combinations(values, count) for count in range(len(values) + 1))


def is_sound(problem: Small, transformed: set[str]) -> bool:
    """Whether there are insertions with which exactly these values are transformed."""
    if transformed & problem.raw:
        return False
    for tie in problem.ties:
        inside = transformed.intersection(tie.outputs)
        if inside and inside != set(tie.outputs):
            return False
        if not inside and transformed.intersection(tie.inputs):
            return False
    return True


def net_of(problem: Small, transformed: set[str], inserted: set[str]) -> int | None:
    """Cost minus gain, spelled out once more; None where an operator would lack a transformed operand."""
    available = transformed | inserted
    for tie in problem.ties:
        if transformed.intersection(tie.outputs) and not available.issuperset(tie.inputs):
            return None
    cost = sum(problem.insertion[value] for value in inserted)
    for copy in problem.copies:
        inside = transformed.intersection(copy.users)
        if inside and (copy.kept or inside != set(copy.users)):
            cost += copy.cost
    return cost - sum(max(gain, 0) for value, gain in problem.gains.values() if value in available)


def cheapest(problem: Small) -> int:
    """The best net of all placements, one by one."""
    found = []
    for transformed in map(set, subsets(problem.insertion)):
        if is_sound(problem, transformed):
            raw = [value for value in problem.insertion if value not in transformed]
            nets = (net_of(problem, transformed, set(inserted)) for inserted in subsets(raw))
            found += [net for net in nets if net is not None]
    return min(found)


def check(problem: Small) -> None:
    placement = place(problem)
    transformed, inserted = set(placement.transformed), set(placement.inserted)
    assert is_sound(problem, transformed)
    assert not transformed & inserted
    net = net_of(problem, transformed, inserted)
    assert net == placement.cost - placement.gain == cheapest(problem)
    if net == 0:
        assert not transformed
        assert not inserted
    for tie in problem.ties:
        assert (tie in placement.ties) == transformed.issuperset(tie.outputs)


def stream(norms: int, insertion: int, *, raw: str = "", gain: int = 4) -> Small:
    """x0 → x1 → … by adding branches that absorb; a norm reads each; the values named in `raw` stay raw."""
    problem: Small = Problem({f"x{i}": insertion for i in range(norms)} | {f"b{i}": insertion for i in range(1, norms)})
    problem.ties.append(Tie((), ("x0",), "table"))
    for index in range(1, norms):
        problem.ties.append(Tie((), (f"b{index}",), f"writer{index}"))
        problem.ties.append(Tie((f"x{index - 1}", f"b{index}"), (f"x{index}",), f"add{index}"))
    problem.gains.update({f"n{i}": (f"x{i}", gain) for i in range(norms)})
    problem.raw.update(raw.split())
    return problem


def test_a_stream_that_absorbs_needs_no_insertion() -> None:
    placement = place(stream(3, 7))
    assert placement.transformed == {"x0", "x1", "x2", "b1", "b2"}
    assert not placement.inserted
    assert (placement.cost, placement.gain, set(placement.readers)) == (0, 12, {"n0", "n1", "n2"})


def test_an_embedding_norm_is_left_raw_and_centred_behind_once() -> None:
    placement = place(stream(4, 7, raw="x0"))
    assert placement.inserted == ("x0",)
    assert "x0" not in placement.transformed
    assert (placement.cost, placement.gain) == (7, 16)
    assert placement.served_by("x0") == ("n0", "n1", "n2", "n3")
    check(stream(4, 7, raw="x0"))


def test_a_value_that_is_read_raw_at_the_end_holds_everything_before_it() -> None:
    """A projection has no inverse: no centred value may come before a raw one."""
    assert not place(stream(4, 7, raw="x3")).readers
    check(stream(4, 7, raw="x3"))
    check(stream(4, 3, raw="x3"))


def test_one_norm_for_one_insertion_is_no_gain() -> None:
    assert not place(stream(1, 4, raw="x0")).inserted
    assert place(stream(1, 3, raw="x0")).inserted == ("x0",)


def test_an_insertion_serves_all_readers_of_a_value() -> None:
    problem = stream(1, 7, raw="x0")
    assert not place(problem).readers
    problem.gains["again"] = ("x0", 4)
    placement = place(problem)
    assert placement.inserted == ("x0",)
    assert (placement.cost, placement.gain) == (7, 8)


def test_two_raw_operands_are_centred_behind_their_sum() -> None:
    problem = stream(3, 5, raw="x0 b1")
    assert place(problem).inserted == ("x1",)
    check(problem)


def test_a_cheap_operand_is_centred_in_front_of_the_sum() -> None:
    """A raw row that is added to every token costs less to centre than the sum."""
    problem = stream(3, 50, raw="b1", gain=40)
    problem.insertion["b1"] = 1
    assert place(problem).inserted == ("b1",)
    check(problem)


def test_results_of_one_operator_are_centred_together() -> None:
    problem: Small = Problem(dict.fromkeys(("x", "left", "right"), 9))
    problem.ties += [Tie((), ("x",), "writer"), Tie(("x",), ("left", "right"), "split")]
    problem.gains["n"] = ("left", 5)
    assert place(problem).transformed == {"x", "left", "right"}
    problem.raw.add("right")
    assert not place(problem).transformed
    check(problem)


@pytest.mark.parametrize(("kept", "norms", "copied"), [(True, 1, False), (True, 2, True), (False, 1, True)])
def test_a_constant_that_others_read_is_copied_for_enough_norms(kept: bool, norms: int, copied: bool) -> None:
    problem = stream(norms, 90)
    problem.copies.append(Copy(("x0",), 4, kept))
    placement = place(problem)
    assert bool(placement.transformed) == copied
    assert placement.cost == (4 if copied and kept else 0)
    check(problem)


def test_a_constant_that_two_operators_read_is_copied_where_one_stays_raw() -> None:
    problem = stream(2, 90, raw="b1")
    problem.raw.add("x1")
    problem.ties.append(Tie((), ("y",), "other"))
    problem.insertion["y"] = 90
    problem.gains["m"] = ("y", 6)
    problem.copies.append(Copy(("x0", "y"), 5, kept=False))
    assert place(problem).transformed == {"y"}
    assert place(problem).cost == 5
    problem.copies[0] = Copy(("x0", "y"), 6, kept=False)
    assert not place(problem).transformed


def random_problem(generator: np.random.Generator) -> Small:
    """Values in a random order, each made by an operator from earlier ones; costs that tie now and then."""
    count = int(generator.integers(2, 7))
    names = [f"v{index}" for index in range(count)]
    problem: Small = Problem({name: int(generator.integers(0, 6)) for name in names})
    made = 0
    while made < count:
        results = names[made : made + int(generator.choice([1, 1, 1, 2]))]
        if generator.random() < 0.15:
            problem.raw.update(results)
        else:
            operands = [name for name in names[:made] if generator.random() < 0.4]
            problem.ties.append(Tie(tuple(operands), tuple(results), f"o{made}"))
        made += len(results)
    problem.raw.update(name for name in names if generator.random() < 0.15)
    for index in range(int(generator.integers(0, 5))):
        problem.gains[f"n{index}"] = (str(generator.choice(names)), int(generator.integers(-1, 6)))
    made_by_ties = [tie.outputs[0] for tie in problem.ties]
    for _ in range(int(generator.integers(0, 3)) if made_by_ties else 0):
        users = dict.fromkeys(map(str, generator.choice(made_by_ties, 2)))
        problem.copies.append(Copy(tuple(users), int(generator.integers(0, 6)), bool(generator.integers(2))))
    return problem


def test_the_cut_is_the_best_of_all_placements() -> None:
    generator = np.random.default_rng(0)
    paid = 0
    for _ in range(300):
        problem = random_problem(generator)
        check(problem)
        paid += bool(place(problem).inserted)
    assert paid >= 30, "hardly a case inserts anything"


# ------------------------------------------------------------------------------------------------ of a network's region

TEXT = """
two (float[B, 4] x, float[4, 6] w, float[B, 6] z, float[6] g, float[6] b, float[6, 6] v, float[6, 3] u)
    => (float[B, 6] y, float[B, 3] raw)
{
    s = MatMul (x, w)
    t = Add (s, z)
    n = LayerNormalization (t, g, b)
    h = MatMul (n, v)
    r = Add (h, t)
    y = LayerNormalization (r, g, b)
    raw = MatMul (t, u)
}
"""


def problem_in(text: str, inputs: tuple[str, ...]) -> tuple[Problem, dict]:
    program = network(text, inputs)
    region = grow(program.model.graph.node("LayerNormalization_2").inputs[0], 1, CENTRING)
    savings = {use.node: 5 for use in region.norms}
    return problem_of(region, Prices(savings, (), lambda value: 7, lambda use: 0)), {v.name: v for v in region.axes}


def test_inputs_and_raw_readers_hold_values_raw() -> None:
    problem, values = problem_in(TEXT, ("x", "z"))
    assert set(values) == {"s", "t", "z", "h", "r"}
    assert {value.name for value in problem.raw} == {"z", "t"}
    assert sorted(tie.name[0].op_type for tie in problem.ties) == ["Add", "Add", "MatMul", "MatMul"]
    assert sorted(value.name for value, _ in problem.gains.values()) == ["r", "t"]
    placement = place(problem)
    assert placement.inserted == (values["t"],)
    assert {value.name for value in placement.transformed} == {"h", "r"}
    assert {norm.op_type for norm in placement.served_by(values["t"])} == {"LayerNormalization"}


def test_every_slice_that_is_joined_holds_its_value_raw() -> None:
    """All operands of one Concat, not only the first that growth meets."""
    text = """
    merge (float[B, 2, 4] x, float[4, 6] w, float[6] g, float[12] g2) => (float[B, 2, 6] n, float[B, 12] y)
    {
        s = MatMul (x, w)
        n = LayerNormalization (s, g)
        zero = Constant <value_int = 0> () one = Constant <value_int = 1> ()
        left = Gather <axis = 1> (s, zero) right = Gather <axis = 1> (s, one)
        m = Concat <axis = 1> (left, right)
        y = LayerNormalization (m, g2)
    }"""
    program = network(text)
    region = grow(program.model.graph.node("LayerNormalization_1").inputs[0], 2, CENTRING)
    problem = problem_of(region, Prices({use.node: 5 for use in region.norms}, (), lambda value: 7, lambda use: 0))
    assert {value.name for value in problem.raw} == {"left", "right"}
    assert not place(problem).readers


def test_a_dimension_without_a_size_counts_as_the_nominal_one() -> None:
    problem, values = problem_in(TEXT, ("x", "z"))
    assert Costs().of(1.0, values["t"]) == 1000 * NOMINAL * 6
    assert len(problem.insertion) == 5
