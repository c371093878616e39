"""`LSTMForCausalLM`: the backbone under a language-model head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlstm.config import LSTMConfig
from tlstm.generation.config import GenerationConfig
from tlstm.generation.generate import GenerationMixin
from tlstm.generation.step_weights import StepWeights
from tlstm.models.backbone import LSTMModel
from tlstm.models.decoding import step_weights
from tlstm.pretrained import PreTrainedModel
from tlstm.state import LSTMState

IGNORE_INDEX = -100


@dataclass
class CausalLMOutput:
    """What `LSTMForCausalLM` returns.

    Fields:
        logits: `(B, T, V)`; position `t` scores the token at `t + 1`.
        loss: mean cross entropy in nats per token, where labels were given.
        state: the recurrent state after each row's last real token.
    """

    logits: Tensor
    loss: Tensor | None
    state: LSTMState


class LSTMForCausalLM(GenerationMixin, PreTrainedModel):
    """An LSTM language model: `LSTMModel` and a linear head over the vocabulary, tied to the embedding where asked."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.model = LSTMModel(config)
        self.lm_head = nn.Linear(config.head_width, config.vocab_size, bias=config.head_bias)
        self.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embedding.weight
            self._tied_weights = {"lm_head.weight": "model.embedding.weight"}
        self._reset_head()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights for backbone and head."""
        self.model.reset_parameters()
        self._reset_head()

    @torch.no_grad()
    def _reset_head(self) -> None:
        spread = 0.1 if self.config.initializer_range is None else self.config.initializer_range
        if not self.config.tie_word_embeddings:  # a tied head was drawn with the embedding
            nn.init.uniform_(self.lm_head.weight, -spread, spread)
        if self.lm_head.bias is not None:
            nn.init.zeros_(self.lm_head.bias)

    def zero_state(self, batch_size: int) -> LSTMState:
        """The state before any input, for `batch_size` streams."""
        return self.model.zero_state(batch_size)

    def step_weights(self) -> StepWeights | str:
        """All that a token's step in evaluation mode computes with, or why that is more than weights can tell."""
        return step_weights(self, LSTMForCausalLM.forward)

    def forward(
        self,
        input_ids: Tensor,  # (B, T) integer
        attention_mask: Tensor | None = None,  # (B, T), non-zero at real tokens
        labels: Tensor | None = None,  # (B, T) int64
        state: LSTMState | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> CausalLMOutput:
        """Score every next token, and the loss where `labels` are given.

        Args:
            input_ids, attention_mask, state: as in `LSTMModel.forward`.
            labels: `(B, T)` int64; usually `input_ids` itself: they are shifted here, so that position `t` is scored
                against `labels[:, t + 1]`. Entries equal to `ignore_index`, and padded positions, do not count.
            ignore_index: the label that does not count, -100 as in `torch.nn.functional.cross_entropy`.

        Raises:
            ValueError: see `LSTMModel.forward`; or labels of another shape or dtype, or outside the vocabulary.
        """
        output = self.model(input_ids, attention_mask, state)
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ValueError(
                    f"labels: expected the shape of input_ids {tuple(input_ids.shape)}, got {tuple(labels.shape)}; "
                    "pass the ids themselves, the shift by one is done here"
                )
            targets = labels[:, 1:]
            if attention_mask is not None:
                targets = targets.masked_fill(~attention_mask[:, 1:].bool(), ignore_index)
            loss = self.loss_function(logits[:, :-1], targets, ignore_index)
        return CausalLMOutput(logits=logits, loss=loss, state=output.state)

    def loss_function(
        self,
        logits: Tensor,  # (..., V)
        targets: Tensor,  # (...) int64
        ignore_index: int = IGNORE_INDEX,
    ) -> Tensor:
        """Mean cross entropy in nats per token between `logits` and already aligned `targets`, in float32 or wider.

        Raises:
            ValueError: shapes that do not fit, targets that are not int64, or a target outside the vocabulary (checked
                on a CPU only: on a GPU the check would stall the device).
        """
        if targets.shape != logits.shape[:-1] or targets.dtype != torch.int64:
            raise ValueError(
                f"targets: expected int64 of shape {tuple(logits.shape[:-1])}, got {targets.dtype} of shape "
                f"{tuple(targets.shape)}"
            )
        wide = logits if logits.dtype == torch.float64 else logits.float()
        try:
            return F.cross_entropy(wide.flatten(0, -2), targets.flatten(), ignore_index=ignore_index)
        except IndexError:
            wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= logits.shape[-1]))]
            raise ValueError(
                f"targets: expected ids from 0 to {logits.shape[-1] - 1} or ignore_index {ignore_index}, got "
                f"{wrong.flatten()[:5].tolist()}; encode the text with this model's own tokenizer"
            ) from None
