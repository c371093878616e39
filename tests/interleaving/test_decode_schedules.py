"""The decode kernel under random schedules over a weak memory, against generation by the loop in Python."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .decoding import DecodeCase, assert_same, clear_case, with_kernel

SMALL = DecodeCase()
SAMPLING = {"do_sample": True}
FILTERS = {"do_sample": True, "temperature": 0.8, "top_k": 6, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2}
CASES = {
    "one layer": SMALL,
    "two layers, sampled": replace(SMALL, widths=(7, 7), settings=SAMPLING),
    "residual, half precision": replace(SMALL, widths=(10, 10), model={"residual": True}, dtype=torch.float16),
    "unequal layers, chunk by chunk": replace(
        SMALL, widths=(7, 9, 9), B=2, rows=2, keep_tile=0, model={"residual": True}
    ),
    "some streamed": replace(SMALL, widths=(9, 9), on_chip=(True, False, False, False), model={"residual": True}),
    "every filter, owners": replace(SMALL, B=2, rows=2, settings=FILTERS, steps=3),
    "every filter, everyone": replace(SMALL, mode="everyone", settings=FILTERS, steps=3),
    "every filter, long rows": replace(SMALL, V=23, B=2, rows=2, settings=FILTERS, steps=2, filter_block=8),
    "ends": replace(SMALL, B=5, rows=4, settings={"eos_token_id": [2, 7]}, chunk=4, steps=6),
}
# As small as the protocol allows, so that a schedule takes a tenth of a second: two programs, two or three steps.
TINY = DecodeCase(widths=(8,), V=13, steps=3)
TINIES = {
    "one layer": TINY,
    "two layers, sampled": replace(TINY, widths=(7, 7), steps=2, settings=SAMPLING),
    "chunk by chunk": replace(TINY, keep_tile=0, steps=2, widths=(9, 9), model={"residual": True}),
    "two groups, ends": replace(TINY, B=2, rows=1, settings={"eos_token_id": [2, 7]}),
    "keys of both programs": replace(TINY, V=23, settings=SAMPLING),
    "filtered by owners": replace(TINY, B=2, rows=2, steps=2, settings={"do_sample": True, "min_p": 0.05}),
    "filtered by everyone": replace(TINY, mode="everyone", settings={"do_sample": True, "min_p": 0.05}),
    "contraction in two parts": replace(TINY, widths=(33, 7), steps=2, block_k=32, split_k=2),
}
# More of everything, one schedule each on every commit.
LARGER = {
    "five streams, 65 tokens": replace(SMALL, V=65, B=5, rows=4, widths=(7, 7), settings=SAMPLING),
    "1000 tokens": replace(SMALL, V=1000, block_v=64, programs=3, settings=SAMPLING),
    "1000 tokens, filtered by owners": replace(SMALL, V=1000, block_v=64, B=5, rows=8, settings=FILTERS, steps=2),
    "5000 tokens, filtered in long rows": replace(
        SMALL, V=5000, block_v=64, programs=3, settings=FILTERS | {"top_k": 70}, steps=2, filter_block=1024
    ),
    "65 tokens, filtered by everyone": replace(SMALL, V=65, mode="everyone", B=2, rows=2, settings=FILTERS),
    "four programs": replace(SMALL, programs=4, widths=(13, 13), settings=SAMPLING),
    "one program": replace(SMALL, programs=1, widths=(7, 5), settings=SAMPLING),
    "no biases, tied": replace(
        SMALL, model={"bias": False, "head_bias": False, "tie_word_embeddings": True, "embedding_size": 7}
    ),
    "forbidden tokens, no end before the third": replace(
        SMALL, B=3, rows=4, steps=6, settings={"eos_token_id": 7, "min_new_tokens": 3, "suppress_tokens": [0, 5]}
    ),
    "penalty on a prompt": replace(SMALL, B=3, rows=2, settings={"repetition_penalty": 1.7}),
    "half precision, sampled": replace(SMALL, dtype=torch.float16, widths=(10, 6), settings=SAMPLING, B=2, rows=2),
    "contraction in four parts, chunk by chunk": replace(
        SMALL, widths=(70, 65), block_k=64, split_k=4, keep_tile=0, steps=2, model={"residual": True}, settings=SAMPLING
    ),
    "contraction in four parts": replace(
        SMALL, widths=(65, 70), block_k=64, split_k=4, B=2, rows=2, steps=2, on_chip=(True, True, False, True)
    ),
    "fewer slots than texts": replace(
        SMALL, B=5, slots=2, rows=2, settings={"eos_token_id": [2, 7], **SAMPLING}, steps=5, chunk=2
    ),
}


def run(case: DecodeCase, seeds) -> None:
    model, expected = clear_case(case)
    for seed in seeds:
        assert_same(with_kernel(case, model, seed), expected, case.dtype)


@pytest.mark.parametrize("name", CASES)
def test_random_schedules(name):
    run(CASES[name], range(2))


@pytest.mark.parametrize("name", TINIES)
def test_many_schedules_of_the_smallest(name):
    run(TINIES[name], range(22))


@pytest.mark.parametrize("name", LARGER)
def test_larger(name):
    run(LARGER[name], [1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_many_random_schedules(name):
    run(CASES[name], range(1000, 1060))
