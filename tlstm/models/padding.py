"""Padded batches: an attention mask turned into lengths, so that padding never reaches a recurrence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """Where each row's real tokens lie.

    Fields:
        first: `(B,)` int64, position of the row's first real token.
        lengths: `(B,)` int64, number of real tokens in the row, 0 allowed.
        width: padded length of the batch, `T`.
    """

    first: Tensor
    lengths: Tensor
    width: int

    @classmethod
    def from_mask(cls, attention_mask: Tensor | None, input_ids: Tensor) -> Padding | None:
        """Read a mask `(B, T)`; `None` where nothing is padded.

        Raises:
            ValueError: the mask's shape differs from that of `input_ids`, or a row's real tokens have a hole.
        """
        if attention_mask is None:
            return None
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_ids {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        real = attention_mask.to(device=input_ids.device, dtype=torch.bool)
        if real.all():
            return None
        width = real.shape[1]
        lengths = real.sum(dim=1)
        first = real.to(torch.int8).argmax(dim=1)
        positions = torch.arange(width, device=real.device)
        run = (positions >= first[:, None]) & (positions < (first + lengths)[:, None])
        if not torch.equal(run, real):
            row = int((run != real).any(dim=1).to(torch.int8).argmax())
            raise ValueError(
                f"attention_mask: row {row} has padding between real tokens ({real[row].long().tolist()}); each row's "
                "ones must be one contiguous run: pad on the left or on the right only"
            )
        return cls(first=first, lengths=lengths, width=width)

    def align_left(self, tokens: Tensor) -> Tensor:
        """Move each row's real tokens of `tokens` `(B, T)` to the front; what follows them is arbitrary but valid."""
        positions = torch.arange(self.width, device=tokens.device)
        source = (positions + self.first[:, None]).clamp_(max=self.width - 1)
        return tokens.gather(1, source).where(positions < self.lengths[:, None], 0)

    def restore(self, features: Tensor) -> Tensor:
        """Put `features` `(B, T, D)` of left-aligned rows back where their tokens were; zero at padding."""
        positions = torch.arange(self.width, device=features.device)
        offset = positions - self.first[:, None]
        real = (offset >= 0) & (offset < self.lengths[:, None])
        source = offset.clamp(min=0, max=self.width - 1)
        moved = features.gather(1, source[..., None].expand_as(features))
        return moved.where(real[..., None], 0)
