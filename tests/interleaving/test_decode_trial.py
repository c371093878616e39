"""The trial of the decode kernel, in the interpreter: the kernel passes, broken ones do not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from tlstm_kernels import decode, decode_trial, exchange
from tlstm_kernels.decode_shape import Choice, DecodePlan, DecodeShape

from .grid import run_interleaved


def tried(dtype=torch.float32, seed=0, steps=5, **options):
    shape = DecodeShape((13, 13), 23, str(dtype).removeprefix("torch."))
    plan = DecodePlan(shape, Choice(), 3, 2, 4, 16, 16, 4, 1, (True,) * 4, "reduce")
    launcher = partial(run_interleaved, seed=seed, **options)
    return decode_trial.decode_trial(torch.device("cpu"), dtype, plan, launcher, steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernel_passes(dtype):
    assert tried(dtype) is None


@triton.jit
def never_unwritten(words, DTYPE: tl.constexpr):
    return tl.zeros(words.shape, tl.int32)


def test_a_missing_check_is_found(monkeypatch):
    monkeypatch.setattr(exchange, "sentinel_bits", never_unwritten)
    assert {tried(seed=seed) is None for seed in range(3)} != {True}


@triton.jit
def publish_nothing(pointers, values, mask):
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask & (tl.program_id(0) != 1))


def test_a_program_that_sends_nothing_is_an_end_with_a_reason(monkeypatch):
    monkeypatch.setattr(decode, "publish", publish_nothing)
    monkeypatch.setattr(decode_trial, "MAX_SPINS", 3)
    assert tried(patience=100) is not None


def test_a_wrong_choice_is_found(monkeypatch):
    """Tokens, not states: the kernel with another bias on the head."""
    pack = decode_trial.pack_weights

    def other_bias(weights, plan):
        packed = pack(weights, plan)
        return type(packed)(packed.w, packed.bias, packed.table, packed.head, packed.head_bias.flip(0))

    monkeypatch.setattr(decode_trial, "pack_weights", other_bias)
    assert tried().startswith("a token misses the best score by")
