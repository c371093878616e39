"""Dropout whose masks are a function of a seed: the same on every device, in every backend and for every batch size.

The generator is counter-based (`tlstm_kernels.philox`): the number for one entry depends on the seed and on what the
entry is, and on nothing else. Word `n % 4` of the four that a counter gives is that of column n:

    between layers      column // 4, time step, row of the batch, 4 + 2 * layer (of which it is the output)
    recurrent weights   column // 4, row of the weight, direction, 5 + 2 * layer

An entry is dropped where its word is below p * 2^32. Drawing costs some 150 integer operations an entry, done by
torch, one after another: much more than torch's own dropout, less than the layer itself.
"""

from __future__ import annotations

from typing import Any

import torch
from tlstm_kernels.checks import ArgumentError
from tlstm_kernels.philox import key_of, philox4x32
from torch import Tensor

MAX_SEED = 2**64 - 1


def seed_tensor(
    seed: Any,  # int, integer Tensor of one element, torch.Generator, or None
    device: torch.device,
) -> Tensor | None:
    """The seed as () int64 on `device`, whose 64 bits it is; a generator is asked for one. Waits for no GPU."""
    if seed is None:
        return None
    if isinstance(seed, torch.Generator):
        limits = torch.iinfo(torch.int64)
        drawn = torch.randint(limits.min, limits.max, (), generator=seed, device=seed.device)
        return drawn.to(device, non_blocking=True)
    if isinstance(seed, Tensor) and seed.numel() == 1 and not (seed.is_floating_point() or seed.is_complex()):
        return seed.reshape(()).to(device, torch.int64, non_blocking=True)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        received = f"a tensor of {seed.dtype}, shape {tuple(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
        raise ArgumentError(
            f"dropout_seed: expected a whole number from 0 to 2**64 - 1, an integer tensor of one element or a "
            f"torch.Generator; received {received}."
        )
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)


def layer_seed(
    seed: Tensor | None,  # () int64
    layer: int,
    device: torch.device,
) -> Tensor:
    """The seed of one layer's zoneout, () int64: a function of the call's, or drawn by the device's generator."""
    if seed is None:
        limits = torch.iinfo(torch.int64)
        return torch.randint(limits.min, limits.max, (), device=device)
    nothing = torch.zeros_like(seed)
    low, high, _, _ = philox4x32((nothing + layer, nothing, nothing, nothing + 3), key_of(seed))
    return low | high << 32


def dropout_between_layers(
    x: Tensor,  # (T, B, N), or packed (n, N)
    p: float,
    seed: Tensor,  # () int64
    layer: int,
    batch_sizes: Tensor | None,  # (T,) of packed x, on the CPU
    rows: Tensor | None,  # (B,) numbers of the rows, None for 0..B-1
) -> Tensor:
    """x with entries dropped and the others scaled by 1 / (1 - p); `layer` is the one that x comes from."""
    if batch_sizes is None:
        time = torch.arange(x.shape[0], device=x.device)[:, None]
        row = torch.arange(x.shape[1], device=x.device) if rows is None else rows.to(x.device)
    else:
        time = torch.arange(len(batch_sizes)).repeat_interleave(batch_sizes)
        row = torch.arange(len(time)) - (batch_sizes.cumsum(0) - batch_sizes)[time]
        time, row = time.to(x.device), row.to(x.device)
        row = row if rows is None else rows.to(x.device)[row]
    return _dropped(x, p, seed, time, row, 4 + 2 * layer)


def weight_dropout(
    weight: Tensor,  # (4H, N)
    p: float,
    seed: Tensor,  # () int64
    layer: int,
    direction: int,
) -> Tensor:
    """A recurrent weight with entries dropped (DropConnect) and the others scaled by 1 / (1 - p)."""
    rows = torch.arange(weight.shape[0], device=weight.device)
    return _dropped(weight, p, seed, rows, torch.full_like(rows, direction), 5 + 2 * layer)


def _dropped(x: Tensor, p: float, seed: Tensor, second: Tensor, third: Tensor, stream: int) -> Tensor:
    """x (..., N), of whose counters these are the other words, shaped to broadcast over (...)."""
    if p == 1:
        return torch.zeros_like(x) * x  # as torch has it, with a gradient, which is zero
    blocks = torch.arange((x.shape[-1] + 3) // 4, device=x.device)
    counter = (blocks, second[..., None], third[..., None], torch.full_like(blocks, stream))
    words = torch.stack(philox4x32(counter, key_of(seed)), -1).flatten(-2)[..., : x.shape[-1]]
    return torch.where(words < round(p * 2**32), 0, x * (1 / (1 - p)))
