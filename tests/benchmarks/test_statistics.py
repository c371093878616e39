"""Percentiles, ratios, means and slopes against closed forms; turns that are really taken in turns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlstm.benchmark.statistics import geometric_mean, slope, speedup, spread
from tlstm.benchmark.timing import MIN_TURNS, Call, Clock, interleave

positive = st.floats(1e-3, 1e3)


@given(st.lists(positive, min_size=1, max_size=30))
def test_spread_and_geometric_mean(values):
    found = spread(values)
    assert found == tuple(np.quantile(values, (0.2, 0.5, 0.8)))
    assert geometric_mean(values) == pytest.approx(scipy.stats.gmean(values))


def test_a_speedup_is_taken_turn_by_turn():
    """A machine that slows down in the middle hits both alike: the ratio does not see it."""
    drift = np.array([1.0, 1.0, 5.0, 9.0, 9.0])
    assert speedup(2.0 * drift, drift) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match=r"expected times of the same turns; received \(3,\) and \(5,\)"):
        speedup(drift[:3], drift)


def test_no_ratio_has_no_mean():
    assert math.isnan(geometric_mean([]))


def test_slopes_of_a_line_and_of_a_power():
    x = [64, 128, 256, 512]
    line = slope(x, [3.0 + 0.5 * value for value in x])
    assert line.per_unit == pytest.approx(0.5)
    assert line.intercept == pytest.approx(3.0)
    power = slope(x, [0.01 * value**1.7 for value in x])
    assert power.exponent == pytest.approx(1.7)
    assert slope([5, 5], [1.0, 2.0]) is None


class FakeClock:
    """Every call takes what its script says; no time passes."""

    shortest_turn = 0.002

    def __init__(self, script: dict[str, float]) -> None:
        self.script, self.log = script, []

    def time(self, call: Call, inputs) -> float:
        for n in inputs:
            call.run(n)
        self.log.append((call.name, tuple(inputs)))
        return self.script[call.name]


class Named(Call):
    def __init__(self, name: str) -> None:
        super().__init__(lambda n: None)
        object.__setattr__(self, "name", name)


def test_turns_are_interleaved_shuffled_and_rotate_the_inputs():
    clock = FakeClock({"a": 0.001, "b": 0.01, "c": 0.0005})
    times = interleave({name: Named(name) for name in "abc"}, clock, 1e9, input_sets=3, max_turns=20)
    assert {name: len(values) for name, values in times.items()} == {"a": 20, "b": 20, "c": 20}
    assert all((values == clock.script[name]).all() for name, values in times.items())
    turns = clock.log[9:]  # after warming up
    rounds = [turns[n : n + 3] for n in range(0, 60, 3)]
    assert all({name for name, _ in each} == set("abc") for each in rounds)  # each once in every round
    assert len({tuple(name for name, _ in each) for each in rounds}) > 2  # in changing order
    repeats = {name: {len(inputs) for of, inputs in turns if of == name} for name in "abc"}
    assert repeats == {"a": {2}, "b": {1}, "c": {4}}  # short calls are repeated up to a measurable time
    assert {n for _, inputs in turns for n in inputs} == {0, 1, 2}
    assert all(inputs == tuple((inputs[0] + k) % 3 for k in range(len(inputs))) for _, inputs in turns)


def test_a_turn_ends_with_its_time_but_not_before_a_few_rounds():
    clock = FakeClock({"a": 0.001})
    assert len(interleave({"a": Named("a")}, clock, seconds=0)["a"]) == MIN_TURNS
    assert interleave({}, clock, 1.0) == {}


def test_what_comes_before_is_not_timed():
    order = []
    call = Call(lambda n: order.append(f"run {n}"), lambda n: order.append(f"before {n}"))
    assert Clock("cpu").time(call, [0, 1]) >= 0
    assert order == ["before 0", "before 1", "run 0", "run 1"]
    assert Clock("cpu").name == ("process_time" if torch.get_num_threads() == 1 else "perf_counter")
