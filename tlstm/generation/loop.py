"""The decode loop: a fixed set of texts, one token for every unfinished one a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tlstm.generation.config import GenerationConfig
from tlstm.generation.state import GenerationState
from tlstm.generation.texts import FinishReason, TextRows, state_of


@dataclass
class Timings:
    """Where the time of a call went; tokens of all rows together.

    Fields:
        prefill_tokens, prefill_seconds: prompt tokens fed before the first step (all but each prompt's last one).
        decode_tokens, decode_seconds: tokens made, and the time that the steps took.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens made a second, 0 where none were."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class DecodeLoop:
    """Texts that grow together, by greedy choice or sampling, until each has ended.

    Args:
        rows: where they grow, empty so far.
        state: where the texts stand; with seeds, if the config samples.
    """

    def __init__(self, rows: TextRows, state: GenerationState, config: GenerationConfig) -> None:
        self._rows, self._config, self._vocab_size = rows, config, state.vocab_size
        self._texts = rows.add(state)
        self._number = {id(text): number for number, text in enumerate(self._texts)}
        self.new_tokens: list[list[int]] = [text.new_tokens for text in self._texts]
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    @property
    def finished(self) -> bool:
        """Whether every text has ended."""
        return not self._rows.texts

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Why each text ended, None where it has not."""
        return [text.finish_reason for text in self._texts]

    @property
    def seconds(self) -> float:
        """Time that the steps took."""
        return self._rows.seconds

    def step(self) -> list[int | None]:
        """The next token of every unfinished text that has a place; one entry per text, `None` for the others."""
        rows = self._rows
        rows.step()
        if self._config.output_scores:
            self.scores.append(self._of_all_texts(rows.scores))
        if self._config.output_logits:
            self.logits.append(self._of_all_texts(rows.logits))
        new: list[int | None] = [None] * len(self._texts)
        for text in rows.stepped:
            new[self._number[id(text)]] = text.new_tokens[-1]
        return new

    def run(self) -> None:
        """Every text to its end."""
        keeps_each = self._config.output_scores or self._config.output_logits
        go_on = self.step if keeps_each else self._rows.advance
        with torch.inference_mode():
            while not self.finished:
                go_on()

    def _of_all_texts(self, values: Tensor | None) -> Tensor:
        """A copy of the last step's `values` `(rows, V)` as `(texts, V)`, -inf where a text had ended."""
        assert values is not None
        full = values.new_full((len(self._texts), values.shape[1]), -torch.inf)
        full[[self._number[id(text)] for text in self._rows.stepped]] = values
        return full

    def state(self) -> GenerationState:
        """Where all texts stand now, ended ones included; may be asked between any two steps."""
        return state_of(self._texts, self._rows, self._vocab_size)
