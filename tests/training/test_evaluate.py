"""Evaluation against one naive pass, token by token, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_samples import DROPOUT, make_model

from tlstm import LSTMForCausalLM, Tokenizer
from tlstm.training import evaluate_stream, evaluate_windows

# The sums below have at most 131 terms of order 1.
EXACT = {"rel": 131 * 2**-52}


@pytest.fixture
def model() -> LSTMForCausalLM:
    return make_model(torch.float64, **DROPOUT).train()


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 11, 131).astype(np.uint16)


def naive_losses(model: LSTMForCausalLM, ids: np.ndarray) -> torch.Tensor:
    """Loss of each token but the first, one token at a time from an empty state."""
    model.eval()
    losses, state = [], None
    with torch.no_grad():
        for token, following in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
            output = model(torch.tensor([[token]]), state=state)
            state = output.state
            losses.append(F.cross_entropy(output.logits[0], torch.tensor([following])))
    model.train()
    return torch.stack(losses)


@pytest.mark.parametrize("window", [1, 7, 130, 500])
def test_one_stream_is_the_whole_text_whatever_the_window(model, ids, window) -> None:
    result = evaluate_stream(model, ids, window=window)
    assert result.loss == pytest.approx(naive_losses(model, ids).mean().item(), **EXACT)
    assert result.tokens == 130
    assert result.protocol == "state carried, one stream"
    assert model.training


def test_parallel_streams_start_empty_and_say_so(model, ids) -> None:
    result = evaluate_stream(model, ids, batch_streams=4, window=9)
    parts = [naive_losses(model, ids[32 * part : 32 * part + 33]) for part in range(4)]
    assert result.loss == pytest.approx(torch.cat(parts).mean().item(), **EXACT)
    assert result.tokens == 128
    assert result.protocol == "state carried, 4 parallel streams"


@pytest.mark.parametrize(("window", "batch_size"), [(13, 4), (13, 64), (130, 3), (256, 2), (26, 1)])
def test_cold_windows_predict_every_token_once(model, ids, window, batch_size) -> None:
    result = evaluate_windows(model, torch.from_numpy(ids.astype(np.int64)), window, batch_size=batch_size)
    parts = [naive_losses(model, ids[start : start + window + 1]) for start in range(0, 130, window)]
    assert result.loss == pytest.approx(torch.cat(parts).mean().item(), **EXACT)
    assert result.tokens == 130
    assert result.protocol == f"cold windows of {window} tokens"


def test_derived_figures() -> None:
    text = "aé—aa" * 9  # 1, 2 and 3 bytes
    tokenizer = Tokenizer.bytes()
    ids = tokenizer.encode(text)
    model = make_model(vocab_size=256)
    for result in (evaluate_stream(model, ids, tokenizer=tokenizer), evaluate_windows(model, ids, tokenizer=tokenizer)):
        nats = result.loss * result.tokens
        assert result.bytes == len(text.encode()) - 1
        assert result.characters == len(text) - 1
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / (len(text.encode()) - 1), rel=1e-14)
        assert result.bits_per_character == pytest.approx(nats / math.log(2) / (len(text) - 1), rel=1e-14)
        assert result.perplexity == pytest.approx(math.exp(result.loss), rel=1e-14)
        assert result.to_dict()["bits_per_token"] == pytest.approx(math.log2(result.perplexity), rel=1e-13)
    assert "bits_per_byte" not in evaluate_stream(model, ids).to_dict()


def test_autocast_is_close_but_not_the_same() -> None:
    model, ids = make_model(layer_sizes=[65, 65]), np.arange(131) % 11
    exact, rounded = evaluate_stream(model, ids), evaluate_stream(model, ids, autocast=torch.bfloat16)
    assert exact.loss != rounded.loss
    # Logits of order 1 carry an error of a few bfloat16 roundings (2^-9 each), and the mean averages most of it out.
    assert rounded.loss == pytest.approx(exact.loss, rel=4 * 2**-9)


def test_errors(model) -> None:
    with pytest.raises(ValueError, match=r"at least 4 tokens to evaluate 3 stream\(s\), got 3"):
        evaluate_stream(model, [1, 2, 3], batch_streams=3)
    with pytest.raises(ValueError, match="at least 2 tokens to evaluate, got 1"):
        evaluate_windows(model, [1])
    with pytest.raises(ValueError, match="ids: expected a one-dimensional sequence of token ids"):
        evaluate_stream(model, [[1, 2, 3]])
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        evaluate_windows(model, [1, 2], 0)
    with pytest.raises(ValueError, match="batch_streams: expected at least 1, got 0"):
        evaluate_stream(model, [1, 2], batch_streams=0)
