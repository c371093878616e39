"""Small models for tests that save and load them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tlstm import LSTMConfig, LSTMForCausalLM

SMALL = {"vocab_size": 13, "hidden_size": 7, "num_layers": 2}


def causal_lm(seed: int = 0, **overrides) -> LSTMForCausalLM:
    torch.manual_seed(seed)
    return LSTMForCausalLM(LSTMConfig(**{**SMALL, **overrides})).eval()


def assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    found_state, expected_state = found.state_dict(), expected.state_dict()
    assert list(found_state) == list(expected_state)
    for name, tensor in expected_state.items():
        assert found_state[name].dtype == tensor.dtype
        assert torch.equal(found_state[name], tensor), name


def rewrite(path: Path, **changes: object) -> None:
    """Change settings in a JSON file; a value of `...` removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Copies of a safetensors file's tensors, which stay what they are when the file is overwritten in place."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}
