"""A sound checkpoint with everything that is read from one, to be damaged; and what may come of reading it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import causal_lm

from tlstm import GenerationState, LSTMForCausalLM, LSTMState, Tokenizer
from tlstm.training import checkpoint as training

VOCABULARY = 256
RUN = "step-00000007"


def write_sample(folder: Path, **options: Any) -> None:
    """A model in a subset of whose files each kind of reader is interested, see `READERS`."""
    model = causal_lm(vocab_size=VOCABULARY, eos_token_id=3)
    model.save_pretrained(folder, tokenizer=Tokenizer.bytes(eos_token=None), **options)
    model.zero_state(2).save(folder / "lstm.safetensors")
    model.prefill([[1, 2, 3], [4]]).save(folder / "generation.safetensors")
    groups = {"model": {"w": torch.ones(3, 5)}, "optimizer": {"0.step": torch.tensor(7.0)}}
    training.write_checkpoint(folder, 7, training.Checkpoint(groups, {"world_size": 1}))


def use_model(folder: Path) -> LSTMForCausalLM:
    """Load the model and use it: what loads must work."""
    model = LSTMForCausalLM.from_pretrained(folder)
    assert not any(parameter.is_meta for parameter in model.parameters())
    logits = model(torch.tensor([[0, 0]])).logits
    assert logits.shape == (1, 2, model.config.vocab_size)
    model.config.to_json()
    model.generation_config.to_json()
    return model


def use_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size >= 0
    assert tokenizer.kind in ("char", "byte", "bpe", "other")
    _ = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.files(), repr(tokenizer)
    return tokenizer


def use_lstm_state(folder: Path) -> LSTMState:
    state = LSTMState.load(folder / "lstm.safetensors")
    assert state.select(torch.arange(state.batch_size)).batch_size == state.batch_size
    return state


def use_generation_state(folder: Path) -> GenerationState:
    state = GenerationState.load(folder / "generation.safetensors")
    assert state.select(range(state.batch_size)).batch_size == state.batch_size
    return state


def use_run(folder: Path) -> training.Checkpoint:
    return training.read_checkpoint(folder / RUN)


READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": use_model,
    "generation_config.json": use_model,
    "model.safetensors": use_model,
    "tokenizer.json": use_tokenizer,
    "tokenizer_config.json": use_tokenizer,
    "lstm.safetensors": use_lstm_state,
    "generation.safetensors": use_generation_state,
    f"{RUN}/trainer.json": use_run,
    f"{RUN}/model.safetensors": use_run,
}
JSON_FILES = [name for name in READERS if name.endswith(".json")]
TENSOR_FILES = [name for name in READERS if name.endswith(".safetensors")]


def refusal(folder: Path, name: str, match: str | None = None) -> str:
    """The message with which the reader of `name` refuses the folder: one that names the file, and is short."""
    with pytest.raises((ValueError, OSError), match=match) as caught:
        READERS[name](folder)
    message = str(caught.value)
    assert str(folder / name) in message
    assert len(message) < 3000, "nobody reads that"
    return message


def tensor_file(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, which may be text that is no JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
