"""What a call of `generate` gives back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tlstm.generation.decoders import DecoderChoice
from tlstm.generation.loop import Timings
from tlstm.generation.prefill import fill_id
from tlstm.generation.request import Request
from tlstm.generation.state import GenerationState
from tlstm.generation.texts import FinishReason


@dataclass
class GenerateOutput:
    """What `generate(return_dict_in_generate=True)` returns, for `R = B * num_return_sequences` sequences.

    Fields:
        sequences: `(R, T + N)` int64: the prompts as they were given, then the new tokens, padded on the right.
        new_tokens: the new ids of each sequence, without padding, as lists.
        finish_reasons: "eos", "stop_string", "length" or "time" for each sequence.
        state: where each text stands; `generate(state=...)` continues it.
        timings: tokens and seconds of prefill and decoding.
        scores: per step the processed logits `(R, V)` (-inf for a sequence that has ended), with `output_scores`.
        logits: per step the model's own logits `(R, V)`, with `output_logits`.
        sequences_scores: `(R,)`, with beams: sum of log-probabilities / length ** length_penalty.
        decoder: which way the tokens were made, and why not a faster one; None for a beam search.
    """

    sequences: Tensor
    new_tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    state: GenerationState
    timings: Timings
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    sequences_scores: Tensor | None = None
    decoder: DecoderChoice | None = None


def sequences(request: Request, new_tokens: Sequence[Sequence[int]]) -> Tensor:
    """Prompts and new tokens as one rectangle, on the model's device."""
    width = max(map(len, new_tokens))
    config = request.config
    filled = config.pad_token_id is None and not config.eos_ids and any(len(ids) < width for ids in new_tokens)
    if filled and not config.return_dict_in_generate:  # `new_tokens` tells where each one ends
        warnings.warn(
            "the sequences differ in length and there is no pad_token_id, so the shorter ones are filled with id 0; "
            "set pad_token_id, or read new_tokens with return_dict_in_generate=True",
            stacklevel=5,
        )
    new = torch.full((len(new_tokens), width), fill_id(config), dtype=torch.int64)
    for row, ids in enumerate(new_tokens):
        new[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return torch.cat([request.prompts, new], dim=1).to(request.state.recurrent.device)


def with_decode(prefill: Timings, new_tokens: Sequence[Sequence[int]], seconds: float) -> Timings:
    """`prefill` with the figures of the steps."""
    return replace(prefill, decode_tokens=sum(map(len, new_tokens)), decode_seconds=seconds)
