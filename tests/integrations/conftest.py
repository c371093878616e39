"""One small model in both libraries."""

from __future__ import annotations

import pytest
import transformers
from small_models import causal_lm

import tlstm.integrations.transformers
from tlstm import LSTMForCausalLM

VOCABULARY = 65


@pytest.fixture(scope="module")
def own() -> LSTMForCausalLM:
    """tlstm's model; its logits are spread out so that no choice of a token hangs on the last bit."""
    model = causal_lm(5, vocab_size=VOCABULARY, hidden_size=23)
    model.lm_head.weight.data *= 20
    return model


@pytest.fixture
def theirs(own, tmp_path) -> tlstm.integrations.transformers.LSTMForCausalLM:
    """The same one, through a folder, in transformers."""
    own.save_pretrained(tmp_path / "own")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
