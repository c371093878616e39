"""One small model in both libraries."""

from __future__ import annotations

import importlib.util

import pytest
from small_models import causal_lm

from tlstm import LSTMForCausalLM

VOCABULARY = 65

# Every file here imports transformers, which the library itself does not need.
collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("transformers") is None else []


@pytest.fixture(scope="module")
def own() -> LSTMForCausalLM:
    """tlstm's model; its logits are spread out so that no choice of a token hangs on the last bit."""
    model = causal_lm(5, vocab_size=VOCABULARY, hidden_size=23)
    model.lm_head.weight.data *= 20
    return model


@pytest.fixture
def theirs(own, tmp_path):
    """The same one, through a folder, in transformers."""
    import transformers

    import tlstm.integrations.transformers  # noqa: F401 - registers the model

    own.save_pretrained(tmp_path / "own")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
