"""Small random language models whose distributions are peaked enough to be interesting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tlstm import LSTMConfig, LSTMForCausalLM


def build_model(seed: int = 1, dtype: torch.dtype = torch.float64, sharpness: float = 2.0, **settings: Any):
    """A model in evaluation mode with weights of such a size that its predictions depend on the text.

    In float64 unless asked otherwise: such weights multiply rounding errors, and texts must not depend on them.
    """
    config = LSTMConfig(**{"vocab_size": 13, "hidden_size": 7, "num_layers": 2, **settings})
    generator = torch.Generator().manual_seed(seed)
    model = LSTMForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if "bias" in name else sharpness
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.to(dtype).eval()


@pytest.fixture(name="build_model")
def _build_model() -> Callable[..., LSTMForCausalLM]:
    return build_model


@pytest.fixture(scope="module")
def model() -> LSTMForCausalLM:
    """13 tokens, two layers of width 7, no special tokens."""
    return build_model()


@pytest.fixture
def prompts() -> list[list[int]]:
    """Prompts of odd and unequal lengths, one of a single token."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(13, (length,), generator=generator).tolist() for length in (7, 1, 13, 4, 9)]
