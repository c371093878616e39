"""`LSTMModel`: embedding and a stack of LSTM layers, without a head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlstm.config import LSTMConfig
from tlstm.layer import LSTM
from tlstm.models.padding import Padding
from tlstm.pretrained import PreTrainedModel
from tlstm.state import LSTMState


@dataclass
class BackboneOutput:
    """What `LSTMModel` returns.

    Fields:
        last_hidden_state: `(B, T, D)`, the features of every position; zero at padded positions.
        state: the recurrent state after each row's last real token.
    """

    last_hidden_state: Tensor
    state: LSTMState


class LSTMModel(PreTrainedModel):
    """Embedding, locked dropout, stacked LSTM layers (of different widths where asked), optional projection.

    Regularisation follows AWD-LSTM (Merity, Keskar & Socher 2017) and is active in training mode only. The state is
    returned in the dtype of the weights; it is not detached, so truncated back-propagation is the caller's choice.
    """

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_width)
        inputs = [config.embedding_width, *config.output_sizes[:-1]]
        self.layers = nn.ModuleList(
            LSTM(
                input_size,
                width,
                bias=config.bias,
                proj_size=config.proj_size,
                num_heads=config.num_heads,
                recompute=config.recompute,
                weight_dropout=config.weight_dropout,
                zoneout=(config.zoneout_h, config.zoneout_c),
            )
            for input_size, width in zip(inputs, config.widths, strict=True)
        )
        self.projection = (
            nn.Linear(config.output_sizes[-1], config.embedding_width) if config.output_projection else nn.Identity()
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights as `config.initializer`, `initializer_range` and `forget_bias` say."""
        config = self.config
        spread = 0.1 if config.initializer_range is None else config.initializer_range
        nn.init.uniform_(self.embedding.weight, -spread, spread)
        for layer in self.layers:
            assert isinstance(layer, LSTM)
            self._reset_layer(layer)
        if isinstance(self.projection, nn.Linear):
            bound = 1 / math.sqrt(self.projection.in_features)
            nn.init.uniform_(self.projection.weight, -bound, bound)
            nn.init.zeros_(self.projection.bias)

    def _reset_layer(self, layer: LSTM) -> None:
        layer.reset_parameters()
        weights = dict(layer.named_parameters())
        biases = [weight for name, weight in weights.items() if name.startswith("bias")]
        if self.config.initializer == "orthogonal":
            for block in weights["weight_hh_l0"].chunk(4 * self.config.num_heads):  # of one gate and head
                nn.init.orthogonal_(block)
            for bias in biases:
                nn.init.zeros_(bias)
        if biases:
            forget_gate = slice(layer.hidden_size, 2 * layer.hidden_size)
            weights["bias_ih_l0"][forget_gate] += self.config.forget_bias

    def zero_state(self, batch_size: int) -> LSTMState:
        """The state before any input, for `batch_size` streams, in the model's dtype and on its device."""
        config = self.config
        weight = self.embedding.weight
        return LSTMState.zeros(config.output_sizes, config.widths, batch_size, dtype=weight.dtype, device=weight.device)

    def forward(
        self,
        input_ids: Tensor,  # (B, T) integer
        attention_mask: Tensor | None = None,  # (B, T), non-zero at real tokens
        state: LSTMState | None = None,
    ) -> BackboneOutput:
        """Run the stack over `input_ids` from `state` (zero where none is given).

        Args:
            input_ids: token ids, `(B, T)`, int32 or int64, below `vocab_size`.
            attention_mask: `(B, T)`, non-zero at real tokens. Each row's real tokens must be one contiguous run, padded
                on the left, the right or both; padding leaves the state untouched.
            state: the state to start from, of batch size `B`.

        Raises:
            ValueError: wrong dtype or shape, a token id outside the vocabulary, a mask with a hole, or the state of
                another model or batch size.
        """
        self._check_input(input_ids)
        batch_size = input_ids.shape[0]
        if state is None:
            state = self.zero_state(batch_size)
        else:
            self._check_state(state, batch_size)
        padding = Padding.from_mask(attention_mask, input_ids)
        if padding is not None:
            input_ids = padding.align_left(input_ids)

        config = self.config
        x = self._embed(input_ids.t())  # (T, B, E): time first all the way, as the recurrence reads it
        x = self._locked_dropout(x, config.input_dropout)
        h, c = [], []
        for index, layer in enumerate(self.layers):
            y, (h_n, c_n) = layer(
                x,
                (state.h[index].unsqueeze(0), state.c[index].unsqueeze(0)),
                lengths=None if padding is None else padding.lengths,
            )
            h.append(h_n.squeeze(0).to(state.dtype))
            c.append(c_n.squeeze(0).to(state.dtype))
            is_last = index == len(self.layers) - 1
            y = self._locked_dropout(y, config.output_dropout if is_last else config.hidden_dropout)
            x = x + y if config.residual and index > 0 and x.shape == y.shape else y

        features = self.projection(x).transpose(0, 1)  # (B, T, D)
        if padding is not None:
            features = padding.restore(features)
        return BackboneOutput(last_hidden_state=features, state=LSTMState(h=tuple(h), c=tuple(c)))

    # ---- regularisation ------------------------------------------------------------------------------------------

    def _embed(self, input_ids: Tensor) -> Tensor:
        weight = self.embedding.weight
        p = self.config.embedding_dropout
        if self.training and p > 0:
            keep = torch.empty(weight.shape[0], 1, dtype=weight.dtype, device=weight.device).bernoulli_(1 - p)
            weight = weight * (keep / (1 - p))
        try:
            return F.embedding(input_ids, weight)
        except IndexError:
            wrong = input_ids[(input_ids < 0) | (input_ids >= self.config.vocab_size)]
            raise ValueError(
                f"input_ids: expected ids from 0 to {self.config.vocab_size - 1}, the vocabulary of this model, got "
                f"{wrong.flatten()[:5].tolist()}; encode the text with this model's own tokenizer"
            ) from None

    def _locked_dropout(self, x: Tensor, p: float) -> Tensor:
        """One mask per sequence, the same at every step (Gal & Ghahramani 2016). `x` is `(T, B, D)`."""
        if not self.training or p == 0:
            return x
        keep = torch.empty(1, *x.shape[1:], dtype=x.dtype, device=x.device).bernoulli_(1 - p)
        return x * keep.div_(1 - p)

    # ---- checks --------------------------------------------------------------------------------------------------

    def _check_input(self, input_ids: Tensor) -> None:
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise ValueError(f"input_ids: expected an int64 tensor of token ids, got {got}; use torch.tensor(ids)")
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids: expected shape (B, T), got {tuple(input_ids.shape)}; add a batch dimension with ids[None]"
            )

    def _check_state(self, state: LSTMState, batch_size: int) -> None:
        if not isinstance(state, LSTMState):
            raise ValueError(
                f"state: expected an LSTMState, got {type(state).__name__}; "
                "use a model output's `state` or zero_state(batch_size)"
            )
        state.check_widths(self.config.output_sizes, self.config.widths)
        if state.batch_size != batch_size:
            raise ValueError(
                f"state: expected {batch_size} streams as in input_ids, got {state.batch_size}; "
                "use state.select(rows) or state.repeat_interleave(n)"
            )
