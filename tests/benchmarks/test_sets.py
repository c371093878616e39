"""The named sets are what they say, and a workload survives a table."""

from __future__ import annotations

from itertools import product

import pytest

from tlstm.benchmark.results import _text
from tlstm.benchmark.sets import SETS, workloads_of
from tlstm.benchmark.workload import Workload


def sizes(name: str) -> set[tuple[int, int, int]]:
    return {(w.H, w.B, w.T) for w in SETS[name].workloads}


def test_the_sets_have_the_sizes_that_were_asked_for():
    assert sizes("headline") == {(768, B, 1024) for B in (1, 2, 4, 8, 16, 32, 64, 128, 256)}
    assert SETS["headline"].workloads[0] == Workload(T=1024, B=16, H=768, I=768)
    assert sizes("cliffs") == {(*hb, 512) for hb in product((128, 192, 256, 512, 1024), (8, 12, 16, 64, 128, 136))}
    train = {(*hb, 25) for hb in product((512, 1024, 2048, 4096), (16, 32, 64, 128))}
    assert sizes("deepbench-train") == train | {(1536, B, 50) for B in (8, 16, 32)} | {
        (256, B, 150) for B in (16, 32, 64)
    }
    infer = {(*hb, 25) for hb in product((512, 1024, 2048), (1, 2, 4))}
    assert sizes("deepbench-infer") == infer | {(1536, B, 50) for B in (1, 2, 4)} | {(256, B, 150) for B in (1, 2, 4)}
    assert {(w.B, w.T, w.H, w.layers) for w in SETS["lm"].workloads} == {
        (20, 70, 1150, 3),
        (80, 70, 1150, 3),
        (20, 35, 650, 2),
    }
    (speech,) = SETS["speech"].workloads
    assert (speech.B, speech.T, speech.H, speech.layers, speech.directions) == (32, 1000, 512, 4, 2)
    rl = {(w.B, w.T, w.H, w.resets) for w in SETS["rl"].workloads}
    assert rl == {(*s, r) for s in ((128, 128, 256), (256, 128, 512), (4096, 32, 256)) for r in (0.0, 0.001, 0.03)}
    assert {(w.H, w.B) for w in SETS["odd"].workloads} == set(product((650, 1150, 1500), (1, 7, 20)))
    assert {(w.H, w.B) for w in SETS["capacity"].workloads} == {(H, 16) for H in (1280, 1536, 1792, 2048)}
    assert {(w.H, w.B) for w in SETS["small"].workloads} == set(product((32, 64, 128), (1, 64, 1024)))
    decode = {(w.layers, w.H, w.vocab, w.B) for w in SETS["decode"].workloads}
    assert decode == set(product((1, 2), (256, 512, 1024), (65, 256, 10_000, 50_257), (1, 8, 64)))


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_documented_and_small_on_a_cpu(name):
    assert len(SETS[name].source) > 30
    small = workloads_of(name, small=True)
    assert small
    assert len(set(small)) == len(small)
    # Without the vocabulary's product: what one CPU core does in some milliseconds.
    assert all(w.multiply_adds < 3e9 for w in small)
    assert workloads_of(name, small=False) == list(SETS[name].workloads)


def test_multiply_adds_of_a_stack():
    w = Workload(T=5, B=3, H=7, I=4, layers=2, bidirectional=True, proj_size=2)
    first, second = (4 * 7 * (size + 2) + 2 * 7 for size in (4, 2 * 2))
    assert w.multiply_adds == 5 * 3 * 2 * (first + second)


@pytest.mark.parametrize("name", SETS)
def test_a_workload_survives_the_text_of_a_table(name):
    for workload in SETS[name].workloads:
        row = {key: _text(value) for key, value in workload.to_row().items()}
        assert Workload.from_row(row) == workload


def test_a_workload_says_what_it_is():
    assert Workload(T=5, B=3, H=7, I=7).label() == "T=5 B=3 H=7"
    w = Workload(T=5, B=3, H=7, I=4, layers=2, bidirectional=True, proj_size=2, resets=0.03, vocab=65)
    assert w.label() == "T=5 B=3 H=7 I=4 2 layers both directions projection 2 3 % resets V=65"


def test_an_unknown_set_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"expected one of headline, cliffs.*received 'nonsense'"):
        workloads_of("nonsense", small=True)
