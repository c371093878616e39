"""The interleaved grid itself: what it takes for an unwritten element, and what it does not."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from .grid import DeadlockError, run_interleaved


@triton.jit
def look_often_kernel(values_ptr, out_ptr):
    """Reads the same element again and again, as a program does that streams its chunks."""
    one = tl.arange(0, 1)
    seen = tl.load(values_ptr + one, mask=one == 0, other=0, volatile=True)
    for _ in range(9):
        seen = tl.load(values_ptr + one, mask=one == 0, other=0, volatile=True)
    tl.store(out_ptr + one, seen, mask=one == 0)


# Bits of which some are an unwritten element's, in an element that is written: float32 and a key of 64 bits.
WRITTEN = [(0xBC44FFFF, torch.int32, torch.float32), (0xFFFF1234, torch.int32, torch.float32)]
WRITTEN += [(0x3C44FFFFFFFFFFFF, torch.int64, torch.int64), (0x7FFF, torch.int16, torch.float16)]


@pytest.mark.parametrize(("bits", "kind", "dtype"), WRITTEN, ids=lambda value: hex(value) if type(value) is int else "")
def test_a_part_of_an_element_is_no_sentinel(bits, kind, dtype):
    signed = bits - (1 << 8 * kind.itemsize if bits >> (8 * kind.itemsize - 1) else 0)
    values = torch.tensor([signed], dtype=kind)
    out = torch.zeros(1, dtype=kind)
    run_interleaved(look_often_kernel, (1,), values_ptr=values.view(dtype), out_ptr=out.view(dtype))
    assert torch.equal(out, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64], ids=str)
def test_an_element_that_nobody_writes_is_waited_for_until_nobody_can_go_on(dtype):
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    values = torch.full((1,), -1, dtype=kind).view(dtype)
    with pytest.raises(DeadlockError, match=r"waits for values_ptr\[0\]"):
        run_interleaved(look_often_kernel, (1,), values_ptr=values, out_ptr=torch.zeros(1, dtype=dtype))
