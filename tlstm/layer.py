"""`tlstm.LSTM`: a drop-in for `torch.nn.LSTM` with a choice of backends, padded batches, resets, heads and dropouts."""

from __future__ import annotations

from typing import Any

import torch
from tlstm_kernels.checks import (
    check_choice,
    check_heads,
    check_input,
    check_probability,
    check_state,
    check_zoneout_pair,
)
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tlstm.functional import BACKENDS, Seed, lstm, lstm_packed, why_unavailable
from tlstm.functional.dropout import seed_tensor, weight_dropout
from tlstm.functional.options import BackendUnavailableError, LSTMOptions
from tlstm.layer_arguments import StateShapes, padded_arguments, refuse_padding_options


class LSTM(torch.nn.LSTM):
    """A (stacked, bidirectional, projected) LSTM with the parameters, defaults and results of `torch.nn.LSTM`.

    Arguments up to `dtype` are those of `torch.nn.LSTM`, with the same parameter names, initial values and
    `state_dict`. Copying, pickling, `torch.export`, `torch.jit.trace` and parametrizations work as there;
    `torch.jit.script` does not. With the triton and reference backends each layer is one node of torch.compile's graph.
    That leaves out every torch.nn.LSTM, and so this class, unless told not to: `layer.compile(fullgraph=True)` does so,
    and a model that contains layers is compiled whole by

        torch._dynamo.config.patch(allow_rnn=True)(torch.compile(model, fullgraph=True))

    Args:
        proj_size: as in torch.nn.LSTM. The triton backend runs it with W_hh W_hr in the loop and W_hr after it, which
            rounds a little more in half types (kernels/README.md).
        backend: "auto" (triton on a GPU where the kernels have passed their trial, `tlstm.trials`, and keep the
            layer's recurrent weights on the chip; else native), "native" (torch's own), "reference" (the equations,
            slow) or "triton". Assigning to the attribute `backend` changes it later.
        num_heads: blocks N of the recurrent weights, a divisor of hidden_size. With more than one, the units are in N
            heads of H / N units, each of which sees only its own h: `weight_hh_l{k}` is (4H, H / N), row
            q * H + n * H / N + u that of gate q of unit u of head n, and multiplies the h of head n. That is the LSTM
            with a block-diagonal W_hh, with 1 / N of its recurrent weights and work. Not with proj_size.
        recompute: keep only the states of all steps for the backward pass, not the gates, and compute those again
            there: less memory (on the triton backend 4 bytes for each unit and step, instead of 12 in half and 20 in
            single precision) for one more product over all steps. The native backend keeps its inputs only, and runs
            the layers a second time.
        weight_dropout: probability with which, in training mode, each forward pass drops single entries of every
            `weight_hh` (DropConnect; Merity, Keskar & Socher 2017), scaling the rest by 1 / (1 - weight_dropout). One
            mask holds for all time steps of the call. On a GPU the native backend then copies the weights into one
            buffer at each call.

        zoneout: probabilities (p_h, p_c) with which a unit keeps its h, or its c, of the step before instead of taking
            the step's (Krueger et al. 2016): in training at random for each step, row and unit, in evaluation in
            expectation. The masks are drawn in the kernels and never stored; those of a batch's row do not depend on
            the others. torch's own LSTM has no zoneout, so that the native backend runs the equations step by step
            (`reference`) in its place, in evaluation too: several times slower on a CPU, far more on a GPU.

    Raises:
        ValueError: a wrong argument, with what was expected, what came and the remedy (TypeError where torch.nn.LSTM
            raises that). Wrong shapes are RuntimeErrors too, as torch.nn.LSTM has them.
        BackendUnavailableError: a backend asked for by name that cannot run, with the reason.
    """

    num_heads = 1  # while torch.nn.LSTM makes its parameters

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
        num_heads: int = 1,
        recompute: bool = False,
        weight_dropout: float = 0.0,
        zoneout: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        check_probability("weight_dropout", weight_dropout)
        check_zoneout_pair(zoneout)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        )
        check_heads(num_heads, hidden_size, proj_size)
        self.backend = backend
        self.recompute = bool(recompute)
        self.weight_dropout = float(weight_dropout)
        self.zoneout = (float(zoneout[0]), float(zoneout[1]))
        if num_heads > 1:
            self._take_heads(num_heads)

    def _take_heads(self, num_heads: int) -> None:
        self.num_heads = num_heads
        for name in self._flat_weights_names:
            if name.startswith("weight_hh_"):
                dense = self.get_parameter(name)
                setattr(self, name, torch.nn.Parameter(dense.new_empty(len(dense), self.hidden_size // num_heads)))
        self._init_flat_weights()
        self.reset_parameters()

    def flatten_parameters(self) -> None:
        """As torch.nn.LSTM's; nothing with several heads, which cuDNN does not know."""
        if self.num_heads == 1:
            super().flatten_parameters()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As torch.nn.Module's, with the arguments of torch.compile, and with LSTMs allowed into the graph."""
        super().compile(*args, **kwargs)
        self._compiled_call_impl = torch._dynamo.config.patch(allow_rnn=True)(self._compiled_call_impl)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are not compiled, as those of other modules."""
        state: Any = super().__getstate__()
        state.pop("_compiled_call_impl", None)
        return state

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
        defaults = {"backend": "auto", "num_heads": 1, "recompute": False, "weight_dropout": 0, "zoneout": (0, 0)}
        return text + "".join(f", {k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v)

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,  # (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or packed
        hx: tuple[Tensor, Tensor] | None = None,  # h_0 (L*D, B, P), c_0 (L*D, B, H); without B for unbatched input
        *,
        lengths: Tensor | None = None,  # (B,) integer, 0..T
        resets: Tensor | None = None,  # (T, B), or (B, T) with batch_first; bool or integer
        reset_state: tuple[Tensor, Tensor] | None = None,  # h (L*D, B, P), c (L*D, B, H), or both without B
        dropout_seed: Seed | None = None,
        return_cell_states: bool = False,
    ) -> Any:
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
            dropout_seed: a number below 2**64, an integer tensor of one element (on a GPU, say, to be changed between
                replays of a CUDA graph) or a torch.Generator that draws one. In training mode the masks of `dropout`,
                `weight_dropout` and `zoneout` are then a function of it alone: the same on every device, in every
                backend and, row by row, in every batch (for zoneout, the rows of a PackedSequence count in its own
                order). Give each call another one. By default torch's own generator draws them.
            return_cell_states: return c after every step, too, as a third result: a tuple of one tensor for each layer,
                in the output's form, of width D*H, zero past a row's length; differentiable. The native backend, which
                has none, computes them with the equations (`reference`), slowly.

        An empty sequence (T = 0), which torch.nn.LSTM refuses, gives an empty output and the unchanged state.

        Returns:
            output in the input's form, of width D*P, (h_n, c_n) shaped like hx, and the cell states if asked for.
        """
        self._update_flat_weights()
        seed = None
        if dropout_seed is not None:
            seed = seed_tensor(dropout_seed, self._flat_weights[0].device)  # type: ignore[union-attr]
        weights = self._weights(seed)
        if isinstance(input, PackedSequence):
            refuse_padding_options(lengths, resets, reset_state)
            return self._forward_packed(input, hx, weights, seed, return_cell_states)

        shapes, size, first = self._state_shapes(), self.input_size, self.batch_first
        x, state, resets, reset_state = padded_arguments(
            input, hx, lengths, resets, reset_state, shapes, size, first, weights[0]
        )
        own = (self._options(), lengths, self._backend, resets, reset_state, seed, return_cell_states)
        result = lstm(x, state, weights, *own)
        if return_cell_states:
            cells = tuple(self._as_given(part, input) for part in result[2])
            return self._as_given(result[0], input), self._unbatched(result[1], input), cells
        return self._as_given(result[0], input), self._unbatched(result[1], input)

    def _as_given(self, sequence: Tensor, input: Tensor) -> Tensor:
        """(T, B, N) in the form of the input."""
        if input.dim() == 2:
            return sequence.squeeze(1)
        return sequence.transpose(0, 1) if self.batch_first else sequence

    def _unbatched(self, state: tuple[Tensor, Tensor], input: Tensor) -> tuple[Tensor, Tensor]:
        return state if input.dim() == 3 else (state[0].squeeze(1), state[1].squeeze(1))

    def _forward_packed(
        self,
        packed: PackedSequence,
        hx: tuple[Tensor, Tensor] | None,
        weights: list[Tensor],
        seed: Tensor | None,
        return_cell_states: bool,
    ) -> Any:
        check_input(packed.data, (2,), self.input_size, weights[0])
        state = None
        if hx is not None:
            check_state(hx, *self._state_shapes().of(int(packed.batch_sizes[0])), weights[0])
            state = self.permute_hidden((hx[0], hx[1]), packed.sorted_indices)
        own = (self._options(), self._backend, seed, packed.sorted_indices, return_cell_states)
        data, state, *cells = lstm_packed(packed.data, packed.batch_sizes, state, weights, *own)
        output, *layers = (packed._replace(data=part) for part in (data, *(cells[0] if cells else ())))
        state = self.permute_hidden(state, packed.unsorted_indices)
        return (output, state, tuple(layers)) if return_cell_states else (output, state)

    def _weights(self, seed: Tensor | None) -> list[Tensor]:
        """The flat weights in torch's order, with this call's weight dropout."""
        weights: list[Any] = self._flat_weights
        p = self.weight_dropout
        if not self.training or p == 0:
            return weights
        options, dropped = self._options(), list(weights)
        for start in range(0, len(weights), options.weights_per_direction):
            w_hh = weights[start + 1]
            layer, direction = divmod(start // options.weights_per_direction, options.num_directions)
            if seed is None:
                dropped[start + 1] = torch.nn.functional.dropout(w_hh, p)
            else:
                dropped[start + 1] = weight_dropout(w_hh, p, seed, layer, direction)
        return dropped

    def _options(self) -> LSTMOptions:
        form = (self.bidirectional, self.proj_size, self.num_heads, self.recompute, self.zoneout)
        return LSTMOptions(self.num_layers, self.bias, self.dropout, self.training, *form)

    def _state_shapes(self) -> StateShapes:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        return StateShapes(rows, self.proj_size or self.hidden_size, self.hidden_size)
