"""Losses of a language model over a text, under two protocols that name themselves in their results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tlstm.training.data import as_ids

if TYPE_CHECKING:
    from tlstm.models import LSTMForCausalLM
    from tlstm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Fields:
        protocol: how it was measured, in words.
        loss: mean cross entropy in nats per token. tokens: number of predicted tokens it is the mean of.
        characters, bytes: length of the predicted tokens' text, where a tokenizer was given.
    """

    protocol: str
    loss: float
    tokens: int
    characters: int | None = None
    bytes: int | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_token(self) -> float:
        return self.loss / math.log(2)

    @property
    def bits_per_character(self) -> float | None:
        return self.bits_per_token * self.tokens / self.characters if self.characters else None

    @property
    def bits_per_byte(self) -> float | None:
        return self.bits_per_token * self.tokens / self.bytes if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Fields and derived figures as JSON values; what is not known is left out."""
        derived = {
            "perplexity": self.perplexity,
            "bits_per_token": self.bits_per_token,
            "bits_per_character": self.bits_per_character,
            "bits_per_byte": self.bits_per_byte,
        }
        return {key: value for key, value in (asdict(self) | derived).items() if value is not None}


def evaluate_stream(
    model: LSTMForCausalLM,
    ids: Sequence[int] | np.ndarray | Tensor,  # (N,)
    *,
    batch_streams: int = 1,
    window: int = 256,
    autocast: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
) -> Evaluation:
    """Mean loss over the whole text with the recurrent state carried from its first token to its last.

    With one stream every token but the first is predicted from all tokens before it; `window` then only sets how many
    tokens go through the model at a time and does not change the result. With `batch_streams = S > 1` the text is cut
    into `S` equal parts that run side by side, each from an empty state; up to `S - 1` tokens at the end are left out.

    Args:
        ids: `N >= 2` token ids. autocast: run the forward pass under autocast to this dtype.
        tokenizer: to count characters and bytes for bits per character and per byte.

    Raises:
        ValueError: fewer than two tokens per stream, or ids that are not a one-dimensional integer sequence.
    """
    _check_positive(batch_streams=batch_streams, window=window)
    array = as_ids(ids, "ids")
    length = (len(array) - 1) // batch_streams
    if length < 1:
        raise ValueError(
            f"expected at least {batch_streams + 1} tokens to evaluate {batch_streams} stream(s), got {len(array)}"
        )
    count = batch_streams * length
    inputs = array[:count].reshape(batch_streams, length)
    targets = array[1 : count + 1].reshape(batch_streams, length)
    meter = _Meter(model, autocast)
    with _evaluating(model):
        state = model.zero_state(batch_streams)
        for start in range(0, length, window):
            state = meter.add(inputs[:, start : start + window], targets[:, start : start + window], state)
    streams = "one stream" if batch_streams == 1 else f"{batch_streams} parallel streams"
    return meter.result(f"state carried, {streams}", array[1 : count + 1], tokenizer)


def evaluate_windows(
    model: LSTMForCausalLM,
    ids: Sequence[int] | np.ndarray | Tensor,  # (N,)
    window: int = 256,
    *,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
) -> Evaluation:
    """Mean loss over consecutive, non-overlapping windows, each from an empty state: cold windows.

    Window `i` reads `ids[i * window : (i + 1) * window]` and predicts the id after each; the last window may be
    shorter. All `N - 1` predictions count, those near a window's start with hardly any context: the protocol of
    models with a bounded context, over all windows instead of a random draw of them.

    Args and errors: as for `evaluate_stream`; `batch_size` windows run side by side, which changes nothing.
    """
    _check_positive(window=window, batch_size=batch_size)
    array = as_ids(ids, "ids")
    if len(array) < 2:
        raise ValueError(f"expected at least 2 tokens to evaluate, got {len(array)}")
    whole = (len(array) - 1) // window
    meter = _Meter(model, autocast)
    with _evaluating(model):
        inputs = array[: whole * window].reshape(whole, window)
        targets = array[1 : whole * window + 1].reshape(whole, window)
        for start in range(0, whole, batch_size):
            meter.add(inputs[start : start + batch_size], targets[start : start + batch_size], None)
        if whole * window < len(array) - 1:
            meter.add(array[None, whole * window : -1], array[None, whole * window + 1 :], None)
    return meter.result(f"cold windows of {window} tokens", array[1:], tokenizer)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


class _Meter:
    """Sums the loss in float64 on the model's device: one transfer at the end."""

    def __init__(self, model: LSTMForCausalLM, autocast: torch.dtype | None) -> None:
        self.model, self.autocast = model, autocast
        self.device = model.device
        self.total: Tensor | float = 0.0
        self.tokens = 0

    def add(self, inputs: np.ndarray, targets: np.ndarray, state: Any) -> Any:
        """Run one block, `(B, T)` each, and return the state after it."""
        x, y = (torch.from_numpy(block.astype(np.int64)).to(self.device) for block in (inputs, targets))
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            output = self.model(x, state=state)
        self.total = self.total + self.model.loss_function(output.logits, y).double() * y.numel()
        self.tokens += y.numel()
        return output.state

    def result(self, protocol: str, predicted: np.ndarray, tokenizer: Tokenizer | None) -> Evaluation:
        text = None if tokenizer is None else tokenizer.decode(predicted)
        return Evaluation(
            protocol=protocol,
            loss=float(self.total) / self.tokens,
            tokens=self.tokens,
            characters=None if text is None else len(text),
            bytes=None if text is None else len(text.encode("utf-8", errors="replace")),
        )


@contextmanager
def _evaluating(model: LSTMForCausalLM) -> Iterator[None]:
    """Evaluation mode without gradients; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
