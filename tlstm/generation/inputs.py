"""What the caller of `generate` passes, checked and brought to one form."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlstm.config import LSTMConfig
from tlstm.generation.config import GenerationConfig

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)

TokenIds = Tensor | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Prompts:
    """The texts that a call adds.

    Fields:
        rows: one 1-D int64 tensor on the CPU per text, padding removed; empty ones only where a state is continued.
        padded: `(B, T)` int64 on the CPU, what the returned sequences begin with: the ids as given, padding and all;
            lists of unequal length padded on the left.
    """

    rows: list[Tensor]
    padded: Tensor


def resolve_config(
    config: GenerationConfig | None, default: GenerationConfig, model: LSTMConfig, overrides: dict[str, Any]
) -> GenerationConfig:
    """The settings of one call: `config` (or the model's `default`) with `overrides`, ids filled in from `model`.

    Warns of settings that do nothing; raises `ValueError` for ids outside the vocabulary.
    """
    if config is not None and not isinstance(config, GenerationConfig):
        raise ValueError(
            f"generation_config: expected a GenerationConfig, got {type(config).__name__}; use "
            "GenerationConfig.from_dict(...), or pass settings by name"
        )
    config = (config if config is not None else default).replace(**overrides)
    ids = {
        name: getattr(model, name) if getattr(config, name) is None else getattr(config, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = config.replace(**ids)

    idle = config.ineffective()
    if overrides.get("do_sample") is False:  # switched off on purpose: what then does nothing is no surprise
        idle = [name for name in idle if name in overrides]
    if idle:
        needed = dict.fromkeys(("output_scores", "output_logits"), "return_dict_in_generate=True and num_beams=1")
        needed |= dict.fromkeys(("length_penalty", "early_stopping"), "num_beams")
        details = ", ".join(f"{name} (needs {needed.get(name, 'do_sample=True')})" for name in idle)
        warnings.warn(f"generation settings without effect: {details}", stacklevel=4)
    _check_vocabulary(config, model.vocab_size)
    return config


def _check_vocabulary(config: GenerationConfig, vocab_size: int) -> None:
    named = {
        "bos_token_id": [] if config.bos_token_id is None else [config.bos_token_id],
        "eos_token_id": config.eos_ids,
        "pad_token_id": [] if config.pad_token_id is None else [config.pad_token_id],
        "suppress_tokens": config.suppress_tokens or [],
        "bad_words_ids": list(itertools.chain.from_iterable(config.bad_words_ids or [])),
    }
    for name, ids in named.items():
        wrong = [token_id for token_id in ids if token_id >= vocab_size]
        if wrong:
            raise ValueError(
                f"{name}: expected ids below the model's vocab_size {vocab_size}, got {wrong}; the setting belongs to "
                "another model or tokenizer"
            )
    for word in config.bad_words_ids or []:
        if len(word) == 1 and word[0] in config.eos_ids:
            raise ValueError(
                f"bad_words_ids forbids the end-of-sequence id {word[0]}; to go on to the full length use "
                "eos_token_id=[] with suppress_tokens, or min_new_tokens"
            )


def read_prompts(
    input_ids: TokenIds | None,
    attention_mask: Tensor | Sequence | None,
    *,
    vocab_size: int,
    bos_token_id: int | None,
    fill: int,
    continued: bool,
) -> Prompts | None:
    """Check prompts and take their padding off; `None` where there are none and a state is `continued`.

    Args:
        input_ids: `(B, T)` or `(T,)` integers, or lists of ids of any length.
        attention_mask: like a tensor `input_ids`, non-zero at real tokens, each row's in one run.
        fill: what pads lists of unequal length.

    Raises:
        ValueError: wrong type, dtype, shape or id; a mask with a hole; an empty prompt without a bos token.
    """
    if not isinstance(input_ids, Tensor) and hasattr(input_ids, "__array__"):
        input_ids = torch.as_tensor(input_ids)  # numpy
    if input_ids is None:
        if attention_mask is not None:
            raise ValueError("attention_mask: given without input_ids; pass both, as tokenizer(texts) returns them")
        if continued:
            return None
        padded, given = torch.zeros(1, 0, dtype=torch.int64), [torch.zeros(0, dtype=torch.int64)]
    elif isinstance(input_ids, Tensor):
        padded, given = _read_tensor(input_ids, attention_mask)
    else:
        padded, given = _read_lists(input_ids, attention_mask, fill)
    rows = given
    if not continued and any(not len(row) for row in given):
        if bos_token_id is None:
            empty = next(i for i, row in enumerate(given) if not len(row))
            raise ValueError(
                f"input_ids: prompt {empty} is empty and the model has no bos_token_id to begin with; give at least "
                "one token (for a character model a newline will do), or set bos_token_id"
            )
        rows = [row if len(row) else torch.tensor([bos_token_id]) for row in given]
        if isinstance(input_ids, Tensor) and padded.shape[1]:  # rows that are all padding: put it at their end
            padded = padded.clone()
            padded[[i for i, row in enumerate(given) if not len(row)], -1] = bos_token_id
        else:
            padded = _pad_left(rows, fill)
    for index, row in enumerate(rows):
        wrong = row[(row < 0) | (row >= vocab_size)]
        if len(wrong):
            raise ValueError(
                f"input_ids: expected ids from 0 to {vocab_size - 1} (the model's vocab_size is {vocab_size}), got "
                f"{wrong[:5].tolist()} in prompt {index}; encode the text with this model's own tokenizer, and pass "
                "the attention_mask if this is padding"
            )
    return Prompts(rows=rows, padded=padded)


def _read_tensor(input_ids: Tensor, attention_mask: Any) -> tuple[Tensor, list[Tensor]]:
    if input_ids.dtype not in _INTEGERS:
        raise ValueError(f"input_ids: expected whole numbers (int64), got {input_ids.dtype}; pass token ids")
    if input_ids.ndim not in (1, 2) or (input_ids.ndim == 2 and not len(input_ids)):
        raise ValueError(f"input_ids: expected shape (B, T) or (T,), got {tuple(input_ids.shape)}; stack the prompts")
    padded = input_ids.to("cpu", torch.int64)
    padded = padded[None] if padded.ndim == 1 else padded
    if attention_mask is None:
        return padded, list(padded)
    mask = torch.as_tensor(attention_mask)
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids {tuple(input_ids.shape)}, got {tuple(mask.shape)}"
        )
    mask = mask.to("cpu").view(padded.shape) != 0
    rows = [ids[real] for ids, real in zip(padded, mask, strict=True)]
    for index, real in enumerate(mask):
        places = real.nonzero()[:, 0]
        if len(places) and int(places[-1] - places[0]) + 1 != len(places):
            raise ValueError(
                f"attention_mask: row {index} has padding between real tokens; each row's ones must be one run: pad on "
                "the left or on the right only"
            )
    return padded, rows


def _read_lists(input_ids: Any, attention_mask: Any, fill: int) -> tuple[Tensor, list[Tensor]]:
    if isinstance(input_ids, str) or (
        isinstance(input_ids, Sequence) and any(isinstance(item, str) for item in input_ids)
    ):
        raise ValueError("input_ids: expected token ids, got text; encode it first: tokenizer(text).input_ids")
    if attention_mask is not None:
        raise ValueError("attention_mask: needless with lists of ids, whose lengths are known; leave it out")
    lists = list(input_ids) if isinstance(input_ids, Sequence) else None
    if lists is not None and all(isinstance(item, int) for item in lists):
        lists = [lists]  # also the empty list: one empty prompt
    try:
        rows = [torch.as_tensor(item) for item in lists or [None]]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"input_ids: expected a tensor, a list of ids or a list of such lists, got {type(input_ids).__name__}"
        ) from None
    rows = [row.to(torch.int64) if not row.numel() else row for row in rows]
    for index, row in enumerate(rows):
        if row.ndim != 1 or row.dtype not in _INTEGERS:
            raise ValueError(
                f"input_ids: expected whole numbers in prompt {index}, got {row.dtype} of shape {tuple(row.shape)}"
            )
    rows = [row.to("cpu", torch.int64) for row in rows]
    return _pad_left(rows, fill), rows


def _pad_left(rows: list[Tensor], fill: int) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, padded.shape[1] - len(row) :] = row
    return padded
