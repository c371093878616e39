"""A call of `generate`, checked, and its prompts read."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from tlstm.generation.config import GenerationConfig
from tlstm.generation.decoders import DecoderChoice, choose_decoder
from tlstm.generation.inputs import TokenIds, resolve_config
from tlstm.generation.loop import DecodeLoop, Timings
from tlstm.generation.prefill import LanguageModel, read_texts
from tlstm.generation.state import GenerationState
from tlstm.generation.stopping import Decoder, StopStrings
from tlstm.state import LSTMState


@dataclass
class Request:
    """A call whose arguments are checked and whose prompt is read."""

    config: GenerationConfig
    prompts: Tensor  # (R, T) int64 on the CPU
    state: GenerationState
    stop: StopStrings | None
    deadline: float | None
    timings: Timings
    decoder: str

    def start(self, model: LanguageModel) -> tuple[DecodeLoop, DecoderChoice]:
        """The texts, about to grow, and the way in which they do."""
        return choose_decoder(
            model, self.state, self.config, stop=self.stop, deadline=self.deadline, wanted=self.decoder
        )


def read_request(
    model: LanguageModel,
    input_ids: TokenIds | None,
    attention_mask: Tensor | None,
    generation_config: GenerationConfig | None,
    state: GenerationState | LSTMState | None,
    tokenizer: Decoder | None,
    decoder: str,
    overrides: dict[str, Any],
) -> Request:
    """Check the arguments of `generate` (see there) and feed the prompts."""
    started = time.perf_counter()
    config = resolve_config(generation_config, model.generation_config, model.config, overrides)
    stop = StopStrings(config.stop_texts, cast(Decoder, tokenizer)) if config.stop_texts else None
    prompts, current, fed = read_texts(model, input_ids, attention_mask, state, config)
    if current.recurrent.device.type == "cuda":
        torch.cuda.synchronize(current.recurrent.device)
    seconds = time.perf_counter() - started
    if config.do_sample:
        current = replace(current, seeds=_seeds(config, current))
    padded = prompts.padded if prompts is not None else torch.zeros(current.batch_size, 0, dtype=torch.int64)
    if config.num_beams == 1 and config.num_return_sequences > 1:
        current = current.repeat_interleave(config.num_return_sequences)
    return Request(
        config=config,
        prompts=padded.repeat_interleave(config.num_return_sequences, dim=0),
        state=current,
        stop=stop,
        deadline=None if config.max_time is None else started + config.max_time,
        timings=Timings(prefill_tokens=fed, prefill_seconds=seconds),
        decoder=decoder,
    )


def _seeds(config: GenerationConfig, state: GenerationState) -> tuple[int, ...]:
    """One seed per text: the caller's, else those the texts began with, else fresh ones from torch's generator."""
    if isinstance(config.seed, int):
        return (config.seed,) * state.batch_size
    if isinstance(config.seed, list):
        if len(config.seed) != state.batch_size:
            raise ValueError(
                f"seed: expected one per prompt ({state.batch_size}), got {len(config.seed)}; one number serves all"
            )
        return tuple(config.seed)
    if state.seeds is not None:
        return state.seeds
    return tuple(torch.randint(2**63 - 1, (state.batch_size,)).tolist())
