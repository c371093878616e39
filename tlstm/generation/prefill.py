"""Prefill: from prompts, and the state they may continue, to where the texts stand before their first new token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tlstm.config import LSTMConfig
from tlstm.generation.config import GenerationConfig
from tlstm.generation.inputs import Prompts, TokenIds, read_prompts
from tlstm.generation.state import GenerationState
from tlstm.state import LSTMState

# A prompt is read in one call of the model up to this many tokens (batch x time), which bounds the memory it takes.
_PREFILL_TOKENS = 1 << 16


class LanguageModel(Protocol):
    """What generation asks of a model: `LSTMForCausalLM`, or anything that behaves like it."""

    config: LSTMConfig
    generation_config: GenerationConfig
    model: Any  # the backbone: (input_ids, attention_mask, state) -> object with `state`

    @property
    def device(self) -> torch.device: ...

    def modules(self) -> Iterator[torch.nn.Module]: ...

    def zero_state(self, batch_size: int) -> LSTMState: ...

    def __call__(self, input_ids: Tensor, /, *, state: LSTMState) -> Any: ...


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Dropout off in every part of the model, and afterwards on again exactly where it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def feed(
    model: LanguageModel,
    texts: Sequence[Tensor],  # one 1-D int64 per row, any length, 0 included
    recurrent: LSTMState,
) -> LSTMState:
    """The recurrent state after each row's text, from one call of the backbone over all rows."""
    lengths = torch.tensor([len(ids) for ids in texts])
    width = int(lengths.max())
    ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True).to(recurrent.device)
    mask = torch.arange(width) < lengths[:, None]
    columns = max(1, _PREFILL_TOKENS // len(texts))
    with torch.inference_mode():
        for start in range(0, width, columns):
            part = slice(start, start + columns)
            real = mask[:, part]
            recurrent = model.model(
                ids[:, part], attention_mask=None if real.all() else real.to(ids.device), state=recurrent
            ).state
    return recurrent.clone()  # made outside inference mode: an ordinary state, which autograd accepts


def read_texts(
    model: LanguageModel,
    input_ids: TokenIds | None,
    attention_mask: Tensor | None,
    state: GenerationState | LSTMState | None,
    config: GenerationConfig,
) -> tuple[Prompts | None, GenerationState, int]:
    """Check prompts and state, and feed the prompts.

    Returns:
        the prompts (None where only `state` is continued), where the texts stand after them, and how many tokens of
        real text were fed: all but the last of each text, which the first step feeds.

    Raises:
        ValueError: see `read_prompts`; or a state of another model or another number of texts.
    """
    if state is not None and not isinstance(state, GenerationState | LSTMState):
        raise ValueError(
            f"state: expected a GenerationState or an LSTMState, got {type(state).__name__}; use prefill(...), or the "
            "state of an earlier output"
        )
    if isinstance(state, LSTMState) and input_ids is None:
        raise ValueError(
            "input_ids: a bare LSTMState has consumed all its text, so it needs at least one more token to go on from; "
            "pass input_ids, or a GenerationState, which remembers its last token"
        )
    prompts = read_prompts(
        input_ids,
        attention_mask,
        vocab_size=model.config.vocab_size,
        bos_token_id=config.bos_token_id,
        fill=fill_id(config),
        continued=isinstance(state, GenerationState),
    )
    like = model.zero_state(1)  # the model's dtype and device
    if isinstance(state, GenerationState):
        state.check_model(model.config)
        earlier = state.to(device=like.device, dtype=like.dtype)
        if prompts is None:
            return None, earlier, 0
        earlier = earlier.select(_stream_of_each(prompts, earlier.batch_size))
        texts = [torch.cat(parts) for parts in zip(earlier.tokens, prompts.rows, strict=True)]
        unfed = [ids[len(old) - 1 : -1] for ids, old in zip(texts, earlier.tokens, strict=True)]
        current = replace(earlier, recurrent=feed(model, unfed, earlier.recurrent), tokens=tuple(texts))
    else:
        assert prompts is not None
        if state is None:
            recurrent = model.zero_state(len(prompts.rows))
        else:
            state.check_widths(model.config.output_sizes, model.config.widths)
            rows = _stream_of_each(prompts, state.batch_size)
            recurrent = state.to(device=like.device, dtype=like.dtype).select(torch.tensor(rows, device=like.device))
        unfed = [ids[:-1] for ids in prompts.rows]
        current = GenerationState(
            recurrent=feed(model, unfed, recurrent), tokens=tuple(prompts.rows), vocab_size=model.config.vocab_size
        )
    return prompts, current, sum(map(len, unfed))


def _stream_of_each(prompts: Prompts, streams: int) -> list[int]:
    """Which of a state's `streams` each prompt continues: its own, or the only one."""
    count = len(prompts.rows)
    if streams == count:
        return list(range(count))
    if streams == 1:
        return [0] * count
    raise ValueError(
        f"state: it holds {streams} texts and input_ids {count}; give one prompt per text, or one text "
        "(state.select) for all prompts"
    )


def fill_id(config: GenerationConfig) -> int:
    """What fills rows up to the longest one: the padding id, else the first end-of-sequence id, else 0."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_ids[0] if config.eos_ids else 0
