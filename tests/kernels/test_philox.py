"""Philox in Triton and in torch: the same words, and those that its authors published."""

from __future__ import annotations

import pytest
import torch
from tlstm_kernels.philox import key_of, philox4x32

pytest.importorskip("triton", reason="needs triton's interpreter")
import triton
import triton.language as tl
from interleaving.grid import run_interleaved
from philox_answers import KNOWN_ANSWERS


@triton.jit
def words_of_counters(seed_ptr, counter_ptr, words_ptr, N: tl.constexpr):
    """One row of four counter words, as int32, gives one row of four random words."""
    n = tl.arange(0, N)
    c0, c1, c2, c3 = (
        tl.load(counter_ptr + 4 * n),
        tl.load(counter_ptr + 4 * n + 1),
        tl.load(counter_ptr + 4 * n + 2),
        tl.load(counter_ptr + 4 * n + 3),
    )
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), c0, c1, c2, c3)
    tl.store(words_ptr + 4 * n, w0.to(tl.int32, bitcast=True))
    tl.store(words_ptr + 4 * n + 1, w1.to(tl.int32, bitcast=True))
    tl.store(words_ptr + 4 * n + 2, w2.to(tl.int32, bitcast=True))
    tl.store(words_ptr + 4 * n + 3, w3.to(tl.int32, bitcast=True))


def signed(value: int, bits: int) -> int:
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def in_triton(seed: int, counters: torch.Tensor) -> torch.Tensor:
    """(N, 4) words in 0..2**32-1 of (N, 4) counters."""
    words = torch.zeros(counters.shape, dtype=torch.int32)
    run_interleaved(
        words_of_counters,
        (1,),
        seed_ptr=torch.tensor([signed(seed, 64)]),
        counter_ptr=counters.to(torch.int32),
        words_ptr=words,
        N=len(counters),
    )
    return words.long() & 0xFFFFFFFF


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_published_answers(counter, key, words):
    seed = key[0] | key[1] << 32
    in_torch = philox4x32(tuple(map(torch.tensor, counter)), key_of(torch.tensor(signed(seed, 64))))
    assert tuple(map(int, in_torch)) == words
    counters = torch.tensor([[signed(c, 32) for c in counter]] * 2)
    assert in_triton(seed, counters).tolist() == [list(words)] * 2


@pytest.mark.parametrize("seed", [1, 2**63 + 12345, 2**64 - 1])
def test_triton_and_torch_give_the_same_words(seed):
    counters = torch.randint(-(2**31), 2**31, (64, 4))
    in_torch = philox4x32((counters & 0xFFFFFFFF).unbind(1), key_of(torch.tensor(signed(seed, 64))))
    assert torch.equal(torch.stack(in_torch, 1), in_triton(seed, counters))
