"""`tlstm.LSTM`: a drop-in for `torch.nn.LSTM` with a choice of backends, padded batches and weight dropout."""

from __future__ import annotations

from typing import Any

import torch
from tlstm_kernels.checks import (
    ArgumentError,
    check_choice,
    check_input,
    check_lengths,
    check_probability,
    check_reset_state,
    check_resets,
    check_state,
)
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tlstm.functional import (
    BACKENDS,
    lstm,
    lstm_packed,
    why_unavailable,
)
from tlstm.functional_options import BackendUnavailableError, LSTMOptions


class LSTM(torch.nn.LSTM):
    """A (stacked, bidirectional, projected) LSTM with the parameters, defaults and results of `torch.nn.LSTM`.

    Arguments up to `dtype` are those of `torch.nn.LSTM`, with the same parameter names, initial values and
    `state_dict`. Copying, pickling, `torch.export`, `torch.jit.trace` and parametrizations work as there;
    `torch.jit.script` does not. With the triton and reference backends a layer is one node of a graph of torch.compile,
    which however leaves out every torch.nn.LSTM, and so this class: for fullgraph=True set
    `torch._dynamo.config.allow_rnn = True`, or call `tlstm.functional.lstm`.

    Args:
        backend: "auto" (the fastest that is proved on the device: native, so far), "native" (torch's own), "reference"
            (the equations, slow) or "triton". Assigning to the attribute `backend` changes it later.
        weight_dropout: probability with which, in training mode, each forward pass drops single entries of every
            `weight_hh` (DropConnect; Merity, Keskar & Socher 2017), scaling the rest by 1 / (1 - weight_dropout). One
            mask holds for all time steps of the call. On a GPU the native backend then copies the weights into one
            buffer at each call.

    Raises:
        ValueError: a wrong argument, with what was expected, what came and the remedy (TypeError where torch.nn.LSTM
            raises that). Wrong shapes are RuntimeErrors too, as torch.nn.LSTM has them.
        BackendUnavailableError: a backend asked for by name that cannot run, with the reason.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        weight_dropout: float = 0.0,
    ) -> None:
        check_probability("weight_dropout", weight_dropout)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        )
        self.backend = backend
        self.weight_dropout = float(weight_dropout)

    @property
    def backend(self) -> str:
        """The name of the backend asked for, one of `tlstm.functional.BACKENDS`."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        check_choice("backend", name, BACKENDS)
        # A reason that holds on every device is told at once; the others when the tensors' device is known.
        reason = why_unavailable(name)
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot run: {reason}. Use backend='auto'.")
        self._backend = name

    def extra_repr(self) -> str:
        """The base class's description and the options of this class that differ from their defaults."""
        text = super().extra_repr()
        if self.backend != "auto":
            text += f", backend={self.backend}"
        if self.weight_dropout != 0:
            text += f", weight_dropout={self.weight_dropout}"
        return text

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,  # (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or packed
        hx: tuple[Tensor, Tensor] | None = None,  # h_0 (L*D, B, P), c_0 (L*D, B, H); without B for unbatched input
        *,
        lengths: Tensor | None = None,  # (B,) integer, 0..T
        resets: Tensor | None = None,  # (T, B), or (B, T) with batch_first; bool or integer
        reset_state: tuple[Tensor, Tensor] | None = None,  # h (L*D, B, P), c (L*D, B, H), or both without B
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the layer; arguments and results as in `torch.nn.LSTM`, with P = proj_size or H, D directions, L layers.

        Args:
            input: the batch, in the layer's dtype (any floating dtype under autocast).
            hx: initial state; zeros if None.
            lengths: for a padded batch, how many steps of each row count: the state is frozen after them and the
                output past them is zero, as with a PackedSequence, but rows may be empty (their state passes through
                unchanged) and in any order. For the native backend a tensor on the CPU avoids a synchronisation with
                the GPU; the triton backend takes it from either, and clamps values on a GPU to 0..T unchecked.
            resets: for a batch of streams in which episodes end and begin (reinforcement learning), not zero at the
                first step of each new episode: nothing passes the boundary before that step, in no layer, no direction
                and no gradient, so that each episode gives what it gives alone. Each direction starts anew on the far
                side of it, from zero or `reset_state`. hx is the state before the first step, unless that resets too
                (and, of a direction that reads in reverse, before the last one). Past a row's length it has no
                effect. The native backend waits for the GPU if the tensor is there, and runs each piece between resets
                as a row of its own, in one packed batch.
            reset_state: what the state is after a reset; zero if None. One for each row, shaped as hx, or one for all
                rows, without the batch dimension: a learned initial state, for instance. Its gradient is summed over
                the resets.

        An empty sequence (T = 0), which torch.nn.LSTM refuses, gives an empty output and the unchanged state.

        Returns:
            output in the input's form, of width D*P, and (h_n, c_n) shaped like hx.
        """
        self._update_flat_weights()
        weights = self._weights()
        if isinstance(input, PackedSequence):
            if resets is not None or reset_state is not None:
                raise ArgumentError(
                    "resets: expected None with a PackedSequence, which has no (time, batch) to mark; received both. "
                    "Pass a padded batch (torch.nn.utils.rnn.pad_packed_sequence) with lengths and resets."
                )
            if lengths is not None:
                raise ArgumentError(
                    "lengths: expected None with a PackedSequence, which has its own; received both. Pass only one."
                )
            return self._forward_packed(input, hx, weights)

        check_input(input, (2, 3), self.input_size, weights[0])
        batched = input.dim() == 3
        if not batched:
            if lengths is not None:
                raise ArgumentError(
                    "lengths: expected None for an unbatched input; received lengths and an input of shape "
                    f"{tuple(input.shape)}. Cut the input instead, or add a batch dimension."
                )
            if resets is not None:
                raise ArgumentError(
                    "resets: expected None for an unbatched input; received resets and an input of shape "
                    f"{tuple(input.shape)}. Add a batch dimension to both: input.unsqueeze(1), resets.unsqueeze(1)."
                )
            x = input.unsqueeze(1)
        else:
            x = input.transpose(0, 1) if self.batch_first else input
        B = x.size(1)
        if lengths is not None:
            check_lengths(lengths, B, x.size(0))
        if resets is not None:
            check_resets(resets, tuple(input.shape[:2]), "(batch, time)" if self.batch_first else "(time, batch)")
            resets = resets.transpose(0, 1) if self.batch_first else resets
        reset_state = self._state_after_resets(reset_state, resets, B, weights[0])

        if hx is None:
            state = self._zero_state(x, B)
        else:
            check_state(hx, *self._state_shapes(B if batched else None), weights[0])
            state = (hx[0], hx[1]) if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        y, (h_n, c_n) = lstm(x, state, weights, self._options(), lengths, self._backend, resets, reset_state)
        if not batched:
            return y.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return (y.transpose(0, 1) if self.batch_first else y), (h_n, c_n)

    def _forward_packed(
        self, packed: PackedSequence, hx: tuple[Tensor, Tensor] | None, weights: list[Tensor]
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        check_input(packed.data, (2,), self.input_size, weights[0])
        B = int(packed.batch_sizes[0])
        if hx is None:
            state = self._zero_state(packed.data, B)
        else:
            check_state(hx, *self._state_shapes(B), weights[0])
            state = self.permute_hidden((hx[0], hx[1]), packed.sorted_indices)
        data, state = lstm_packed(packed.data, packed.batch_sizes, state, weights, self._options(), self._backend)
        output = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return output, self.permute_hidden(state, packed.unsorted_indices)

    def _weights(self) -> list[Tensor]:
        """The flat weights in torch's order, with this call's weight dropout."""
        weights: list[Any] = self._flat_weights
        if not self.training or self.weight_dropout == 0:
            return weights
        return [
            torch.nn.functional.dropout(w, self.weight_dropout) if name.startswith("weight_hh_") else w
            for name, w in zip(self._flat_weights_names, weights, strict=True)
        ]

    def _options(self) -> LSTMOptions:
        return LSTMOptions(self.num_layers, self.bias, self.dropout, self.training, self.bidirectional, self.proj_size)

    def _state_shapes(self, batch_size: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of h and c; without the batch dimension for None."""
        rows = self.num_layers * (2 if self.bidirectional else 1)
        leading = (rows,) if batch_size is None else (rows, batch_size)
        return (*leading, self.proj_size or self.hidden_size), (*leading, self.hidden_size)

    def _state_after_resets(
        self, reset_state: Any, resets: Tensor | None, batch_size: int, weight: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """The checked reset state, with a batch dimension where it has none."""
        if isinstance(reset_state, (tuple, list)):
            reset_state = tuple(
                s.unsqueeze(1).expand(-1, batch_size, -1) if isinstance(s, Tensor) and s.dim() == 2 else s
                for s in reset_state
            )
        check_reset_state(reset_state, resets, *self._state_shapes(batch_size), weight)
        return reset_state

    def _zero_state(self, x: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        h_shape, c_shape = self._state_shapes(batch_size)
        return x.new_zeros(h_shape), x.new_zeros(c_shape)
