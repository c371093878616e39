"""The random numbers behind sampling: Gumbel noise from the words of a counter-based generator (Philox4x32-10).

The words of a token are a pure function of the stream's seed and of where the token stands, so neither the other rows
of a batch nor a stop and resume in between can change a draw, and a GPU kernel can make the same words in any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tlstm_kernels.philox import philox4x32
from torch import Tensor

MAX_SEED = 2**64 - 1

_MASK = 0xFFFFFFFF

# Noise is drawn for several positions at once, up to this many numbers (float32: 1 MiB), because on small
# vocabularies the cost of the 130 or so tensor operations of a draw is their dispatch, not their arithmetic.
_CACHED_NUMBERS = 1 << 18
_CACHED_POSITIONS = 256
_WORKING_SET = 1 << 17


def uniform(
    words: Tensor,  # any shape, int64 in [0, 2**32)
) -> Tensor:
    """Uniform float32 numbers in (0, 1): `((w >> 9) + 0.5) * 2**-23`. Exact: 24 bits, never 0, never 1."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(
    words: Tensor,  # any shape, int64 in [0, 2**32)
) -> Tensor:
    """Standard Gumbel noise `-log(-log(u))` as float32, within [-2.82, 16.64].

    The logarithms are taken in float64 and the result rounded once, so that the value does not depend on which
    float32 logarithm a machine has.
    """
    u = uniform(words).to(torch.float64)
    return (-torch.log(-torch.log(u))).to(torch.float32)


def seed_words(
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The Philox key of each 64-bit seed: low and high word, two int64 tensors of shape (rows,)."""
    low = torch.tensor([seed & _MASK for seed in seeds], dtype=torch.int64, device=device)
    high = torch.tensor([seed >> 32 for seed in seeds], dtype=torch.int64, device=device)
    return low, high


def token_noise(
    key: tuple[Tensor, Tensor],  # two of (rows,), from `seed_words`
    positions: Tensor,  # (rows,) or (rows, P) int64: tokens before the drawn one in its stream
    return_index: Tensor,  # (rows,) int64: which of several continuations of one prompt
    vocab_size: int,
) -> Tensor:  # (rows, V) or (rows, P, V) float32
    """Gumbel noise of every token id at each position.

    Token `v` at position `p` takes word `v & 3` of `philox(key=seed, counter=(v >> 2, p, return_index, 0))`.
    """
    rows = len(positions)
    count = max(1, _WORKING_SET // (vocab_size * positions[0].numel()))
    if rows > count:  # a few rows at a time, so that the intermediate words stay in the processor's cache
        parts = (slice(start, start + count) for start in range(0, rows, count))
        return torch.cat(
            [token_noise((key[0][p], key[1][p]), positions[p], return_index[p], vocab_size) for p in parts]
        )
    shape = (-1,) + (1,) * positions.ndim
    blocks = torch.arange((vocab_size + 3) // 4, device=positions.device)
    words = philox4x32(
        (blocks, positions[..., None], return_index.view(shape), torch.zeros_like(blocks)),
        (key[0].view(shape), key[1].view(shape)),
    )
    return gumbel(torch.stack(words, dim=-1).flatten(-2)[..., :vocab_size])


def noise_of_tokens(
    key: tuple[Tensor, Tensor],  # two of (rows,)
    positions: Tensor,  # (rows,) int64
    return_index: Tensor,  # (rows,) int64
    token_ids: Tensor,  # (rows, K) int64
) -> Tensor:  # (rows, K) float32
    """The numbers `token_noise` has for these token ids, without making those of the whole vocabulary."""
    blocks = token_ids >> 2
    words = philox4x32(
        (blocks, positions[:, None], return_index[:, None], torch.zeros_like(blocks)),
        (key[0][:, None], key[1][:, None]),
    )
    return gumbel(torch.stack(words, dim=-1).gather(-1, (token_ids & 3)[..., None])[..., 0])


class GumbelNoise:
    """The noise of `rows` streams that advance together, one position a step; drawn ahead in blocks.

    Args:
        seeds: one 64-bit seed per row.
        return_index: per row, which of several continuations of one prompt it is.
        positions: per row, the position of the next token.
        vocab_size: number of token ids, `V`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        return_index: Sequence[int],
        positions: Sequence[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.vocab_size = vocab_size
        self._key = seed_words(seeds, device)
        self._return_index = torch.tensor(return_index, dtype=torch.int64, device=device)
        self._positions = torch.tensor(positions, dtype=torch.int64, device=device)
        self._block: Tensor | None = None  # (rows, P, V)
        self._parts: tuple[Tensor, ...] = ()  # the same, position by position
        self._used = 0  # positions of the block already passed

    def next(self) -> Tensor:
        """Noise (rows, V) float32 of the current position of each row; moves every row one position on."""
        if self._block is None or self._used == self._block.shape[1]:
            self._positions, self._used = self._positions + self._used, 0
            count = max(1, min(_CACHED_POSITIONS, _CACHED_NUMBERS // (len(self._positions) * self.vocab_size)))
            ahead = self._positions[:, None] + torch.arange(count, device=self._positions.device)
            self._set_block(token_noise(self._key, ahead, self._return_index, self.vocab_size))
        self._used += 1
        return self._parts[self._used - 1]

    def _set_block(self, block: Tensor) -> None:
        self._block, self._parts = block, block.unbind(1)

    def next_of(
        self,
        token_ids: Tensor,  # (rows, K) int64
    ) -> Tensor:
        """As `next`, but only the numbers of `token_ids`, (rows, K) float32: cheaper when K is far below V."""
        positions = self._positions + self._used
        self._positions, self._used, self._block = positions + 1, 0, None
        return noise_of_tokens(self._key, positions, self._return_index, token_ids)

    def extend(
        self,
        seeds: Sequence[int],
        return_index: Sequence[int],
        positions: Sequence[int],
    ) -> None:
        """Add rows, as the constructor takes them, after the present ones."""
        device, used = self._positions.device, self._used
        key, index = seed_words(seeds, device), torch.tensor(return_index, dtype=torch.int64, device=device)
        position = torch.tensor(positions, dtype=torch.int64, device=device)
        if self._block is not None:  # what is left of it stays, and the new rows get as much
            ahead = torch.arange(self._block.shape[1] - used, device=device)
            if len(self._positions) and len(ahead):
                new = token_noise(key, position[:, None] + ahead, index, self.vocab_size)
                self._set_block(torch.cat([self._block[:, used:], new]))
            else:
                self._block = None
        self._positions, self._used = torch.cat([self._positions + used, position]), 0
        self._key = (torch.cat([self._key[0], key[0]]), torch.cat([self._key[1], key[1]]))
        self._return_index = torch.cat([self._return_index, index])

    def select(
        self,
        rows: Tensor,  # (n,) int64
    ) -> None:
        """Keep only these rows, in this order."""
        self._key = (self._key[0][rows], self._key[1][rows])
        self._return_index, self._positions = self._return_index[rows], self._positions[rows]
        if self._block is not None:
            self._set_block(self._block[rows])
