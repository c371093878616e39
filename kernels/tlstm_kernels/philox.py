"""Philox4x32-10, the counter-based random number generator behind everything random here, in plain torch.

A counter-based generator has no state to carry: its words are a pure function of a key (a seed) and of a counter that
says what they are for, so neither the other rows of a batch nor the order of the work can change a draw. In a Triton
kernel the same words, bit for bit, come from `triton.language.philox(seed, c0, c1, c2, c3)` with counters of 32 bits.

The key is a 64-bit seed, low word first. Counters in use, word by word:

    sampling    token id // 4, position in the stream, which continuation of the prompt, 0
    zoneout     unit of the layer, time step, row of the batch, 1 for a direction that reads forwards and 2 in reverse
    a layer     number of the layer, 0, 0, 3: the first two words are the seed of its zoneout

Source: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # round multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments: golden ratio, sqrt(3) - 1
_ROUNDS = 10


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],  # four words, int64 in [0, 2**32), shapes that broadcast
    key: tuple[Tensor, Tensor],  # two words, int64 in [0, 2**32), shapes that broadcast
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32: four random 32-bit words per counter and key, as int64 in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 32x32-bit product may pass 2**63; int64 wraps modulo 2**64, so its bits are still the right ones.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def key_of(
    seeds: Tensor,  # any shape, int64 whose 64 bits are the seeds
) -> tuple[Tensor, Tensor]:
    """The Philox key of each seed: its low and its high word, int64 in [0, 2**32), shaped as the seeds."""
    return seeds & _MASK, (seeds >> 32) & _MASK
