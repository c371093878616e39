"""The kernel's sampling, run by the interpreter over a wide grid: against the distribution, and draw for draw."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from scipy import stats
from tlstm_kernels.decode_long_rows import choose_long_row
from tlstm_kernels.decode_sampling import (
    gumbel_noise,
    has_finite_score,
    ordered_bits,
    pack_keys,
    processed_logits,
    sample_rows,
    token_of_key,
)

from tlstm.generation.config import GenerationConfig
from tlstm.generation.gpu_model import choice_of, flags_of, settings_of
from tlstm.generation.philox import seed_words, token_noise
from tlstm.generation.sampling import LogitsProcessor

from .grid import run_interleaved

V, ROWS, PROGRAMS = 13, 8192, 13  # 106,496 draws
SEED = 2**64 - 5


@triton.jit
def draw_kernel(
    logits_ptr, seeds_ptr, flags_ptr, seen_ptr, tokens_ptr,
    newest, penalty, temperature, top_k, tail, log_min_p,
    V: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, FILTERED: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    """One draw in each row, all from the same logits, row r at position r; as one of the two modes makes it."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ids = tl.arange(0, N)
    every = tl.full((ROWS,), 1, tl.int1)
    logits = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf"))[:, None] + tl.zeros((N, ROWS), tl.float32)
    token = tl.zeros((ROWS,), tl.int32) + newest
    logits = processed_logits(
        logits, ids, token, every, every, rows, flags_ptr, seen_ptr, penalty, temperature, V, True
    )
    seeds = tl.load(seeds_ptr + rows * 0)
    zero = tl.zeros((ROWS,), tl.int32)
    if FILTERED:
        keys = sample_rows(tl.trans(logits), rows, zero, seeds, top_k, tail, log_min_p, TOP_K, TOP_P, MIN_P)
    else:
        keys = tl.max(pack_keys(logits + gumbel_noise(0, N, rows, zero, seeds), ids[:, None]), axis=0)
    tl.store(tokens_ptr + rows, token_of_key(keys))


OPTIONS = {
    "nothing": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.75},
    "min-p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.8},
    "forbidden": {"suppress_tokens": [0, 6]},
    "all": {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_hundred_thousand_draws(name):
    config = GenerationConfig(do_sample=True, **OPTIONS[name])
    torch.manual_seed(0)
    logits = 1.5 * torch.randn(V)
    logits[7] = logits[3]  # a tie, which the cut of top-k runs through
    history = torch.tensor([[1, 3, 5, 5]])
    seen = torch.zeros(1, V, dtype=torch.bool)
    seen[0, history[0]] = True
    processed = LogitsProcessor(config)(logits[None], history, seen, 0)[0]

    choice, settings = choice_of(config), settings_of(config)
    tokens = torch.empty(ROWS * PROGRAMS, dtype=torch.int32)
    run_interleaved(
        draw_kernel,
        (PROGRAMS,),
        logits_ptr=logits,
        seeds_ptr=torch.tensor([SEED - 2**64]),
        flags_ptr=flags_of(config, V, torch.device("cpu")),
        seen_ptr=seen.to(torch.int8).repeat(len(tokens), 1) if config.repetition_penalty != 1 else None,
        tokens_ptr=tokens,
        newest=5,
        penalty=settings.repetition_penalty,
        temperature=settings.temperature,
        top_k=settings.top_k,
        tail=1 - settings.top_p,
        log_min_p=settings.log_min_p,
        V=V,
        N=16,
        ROWS=ROWS,
        FILTERED=choice.filters,
        TOP_K=choice.top_k,
        TOP_P=choice.top_p,
        MIN_P=choice.min_p,
    )
    positions = torch.arange(len(tokens))
    noise = token_noise(seed_words([SEED]), positions[None], torch.zeros(1, dtype=torch.int64), V)[0]
    assert torch.equal(tokens.long(), (processed + noise).argmax(-1))  # the same draws as Python's

    counts, probabilities = torch.bincount(tokens, minlength=V).double(), processed.double().softmax(-1)
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible] * len(tokens)
    assert stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-3


@triton.jit
def long_rows_kernel(
    logits_ptr, scores_ptr, tokens_ptr, top_k, tail, log_min_p,
    V: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0) * STRIDE + tl.arange(0, 1)
    key = choose_long_row(
        logits_ptr + row, scores_ptr + row, None, 0, top_k, tail, log_min_p, V, BLOCK, TOP_K, TOP_P, MIN_P, 0
    )
    tl.store(tokens_ptr + tl.program_id(0) + tl.arange(0, 1), token_of_key(key))


@pytest.mark.parametrize("name", ["top-k", "top-p", "min-p", "all"])
def test_long_rows_are_filtered_as_in_python(name):
    """Rows of 23 tokens in blocks of 8: ties, forbidden tokens, flat rows and steep ones. Scores that fall with the
    logits make the choice the last token that a filter keeps.
    """
    config, V, rows = GenerationConfig(do_sample=True, **OPTIONS[name]), 23, 12
    torch.manual_seed(1)
    logits = torch.randn(rows, V) * torch.logspace(-1, 1.5, rows)[:, None]
    logits[:, 7] = logits[:, 3]
    logits[::2, 11] = -torch.inf
    logits[1::4] = logits[1::4].round()  # many ties, 0 and -0 among them
    logits[5] = 2.5
    kept = LogitsProcessor(config.replace(temperature=1.0, repetition_penalty=1.0))(logits, None, None, 0)
    padded = [torch.nn.functional.pad(t, (0, 32 - V), value=torch.nan) for t in (logits, -logits)]
    choice, settings = choice_of(config), settings_of(config)
    tokens = torch.empty(rows, dtype=torch.int32)
    run_interleaved(
        long_rows_kernel,
        (rows,),
        logits_ptr=padded[0],
        scores_ptr=padded[1],
        tokens_ptr=tokens,
        top_k=settings.top_k,
        tail=1 - settings.top_p,
        log_min_p=settings.log_min_p,
        V=V,
        STRIDE=32,
        BLOCK=8,
        TOP_K=choice.top_k,
        TOP_P=choice.top_p,
        MIN_P=choice.min_p,
    )
    assert (kept == -torch.inf).any()
    assert torch.equal(tokens.long(), torch.where(kept == -torch.inf, -torch.inf, -logits).argmax(-1))


@triton.jit
def noise_kernel(positions_ptr, return_index_ptr, seeds_ptr, noise_ptr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    rows = tl.arange(0, 4)
    noise = gumbel_noise(
        FIRST, COUNT, tl.load(positions_ptr + rows), tl.load(return_index_ptr + rows), tl.load(seeds_ptr + rows)
    )
    tl.store(noise_ptr + rows[None, :] * COUNT + tl.arange(0, COUNT)[:, None], noise)


@pytest.mark.parametrize("first", [0, 64, 50_000])
def test_noise_is_that_of_python_bit_for_bit(first):
    seeds = [0, 1, 2**63 + 7, 2**64 - 1]
    positions, copies = torch.tensor([0, 1, 2**31 - 1, 65]), torch.tensor([0, 3, 1, 2**31 - 1])
    found = torch.empty(4, 64)
    run_interleaved(
        noise_kernel,
        (1,),
        positions_ptr=positions.int(),
        return_index_ptr=copies.int(),
        seeds_ptr=torch.tensor([seed - (seed >> 63 << 64) for seed in seeds]),
        noise_ptr=found,
        FIRST=first,
        COUNT=64,
    )
    assert torch.equal(found, token_noise(seed_words(seeds), positions, copies, first + 64)[:, first:])


@triton.jit
def keys_kernel(scores_ptr, ids_ptr, bits_ptr, keys_ptr, tokens_ptr, finite_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    scores, ids = tl.load(scores_ptr + n), tl.load(ids_ptr + n)
    keys = pack_keys(scores, ids)
    tl.store(bits_ptr + n, ordered_bits(scores))
    tl.store(keys_ptr + n, keys)
    tl.store(tokens_ptr + n, token_of_key(keys))
    tl.store(finite_ptr + n, has_finite_score(keys).to(tl.int32))


def test_keys_order_scores_and_then_ids():
    """In rising order: scores, and for equal ones falling ids. NaN of either sign is above all."""
    inf, tiny, largest = torch.inf, 1e-45, torch.finfo(torch.float32).max
    scores = torch.tensor([-inf, -largest, -1.5, -tiny, 0.0, -0.0, tiny, 1.5, 1.5, largest, inf, torch.nan, -torch.nan])
    ids = torch.tensor([0, 1, 2, 3, 5, 4, 6, 8, 7, 9, 10, 12, 11])
    scores, ids = torch.cat([scores, scores[-1:].repeat(3)]), torch.cat([ids, torch.tensor([3, 2, 1])]).int()
    bits, tokens, finite = (torch.empty(16, dtype=torch.int32) for _ in range(3))
    keys = torch.empty(16, dtype=torch.int64)
    run_interleaved(
        keys_kernel, (1,), scores_ptr=scores, ids_ptr=ids, bits_ptr=bits, keys_ptr=keys, tokens_ptr=tokens,
        finite_ptr=finite, N=16,
    )  # fmt: skip
    assert (keys.diff() > 0).all()
    assert (bits.diff() >= 0).all()
    assert bits[4] == bits[5]
    assert torch.equal(tokens, ids)
    assert torch.equal(finite.bool(), scores.isfinite())
    assert (keys != -1).all()
