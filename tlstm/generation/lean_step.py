"""The lean step: on a CPU, the equations of one token written out over buffers that are made once.

A library call per layer costs more than its arithmetic when there is one token to feed: torch's LSTM packs its weights
anew at every call. Here a step is its matrix products and, for each layer, seven small operations that allocate
nothing. The first layer's input product is looked up: row `v` of `embedding @ W_ih^T + b` is what token `v` adds to the
gates. The weights are the model's own tensors, so that nothing is stale after they change, and no memory is doubled.

A product of 4 MB streams everything else out of the processor's caches, code included, so that what follows runs cold:
an operation costs several times what it costs in a tight loop, and much less where the one before was of its kind.
Hence few kinds, always with `out=`, bound to their tensors beforehand: a step is a flat list of calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tlstm.generation.step_weights import LayerWeights, StepWeights
from tlstm.state import LSTMState

DTYPES = (torch.float32, torch.float64)
Calls = list[Callable[[], object]]


class LeanStep:
    """A `Step` on the CPU, in float32 or float64.

    Args:
        weights: of the model.
        tokens: about how many tokens will be fed, all rows together: looking up the first layer's gates pays only where
            they outnumber the vocabulary, for each of whose ids a row has to be computed first.
    """

    def __init__(self, weights: StepWeights, tokens: int) -> None:
        self._weights = weights
        first = weights.layers[0]
        entries = len(weights.embedding) * len(first.w_ih)
        # What the newest tokens are looked up in: (V, 4H) gates, or (V, E) embeddings.
        self._table, self._has_gates = weights.embedding, False
        if len(weights.embedding) <= tokens and entries <= sum(matrix.numel() for matrix in weights.products):
            with torch.no_grad():
                self._table, self._has_gates = F.linear(weights.embedding, first.w_ih, first.bias), True
        self._recurrent: LSTMState | None = None
        self._looked_up = self._logits = torch.empty(0)
        self._calls: Calls = []
        self._is_float32 = True

    @property
    def recurrent(self) -> LSTMState:
        assert self._recurrent is not None
        return self._recurrent

    def extend(self, more: LSTMState) -> None:
        self._load(more.clone() if self._recurrent is None else LSTMState.cat([self._recurrent, more]))

    def select(self, rows: Tensor) -> None:
        if len(rows):
            self._load(self.recurrent.select(rows))
        else:
            self._recurrent = None

    def __call__(
        self,
        tokens: Tensor,  # (B,) int64
    ) -> Tensor:  # (B, V) float32
        torch.index_select(self._table, 0, tokens, out=self._looked_up)
        for call in self._calls:
            call()
        return self._logits if self._is_float32 else self._logits.float()

    def _load(self, recurrent: LSTMState) -> None:
        """Make buffers for as many rows as `recurrent` holds, and the calls upon them; they change its tensors."""
        weights, B, dtype = self._weights, recurrent.batch_size, recurrent.dtype
        layers = weights.layers[1:] if self._has_gates else weights.layers
        biases = [(layer.bias, len(layer.w_ih)) for layer in layers]
        if weights.projection is not None:
            biases.append((weights.projection[1], len(weights.projection[0])))
        biases.append((weights.head_bias, len(weights.head)))
        # All that products are added to lies in one block, so that one call puts the biases there, while code and data
        # are warm: right after a product it would cost several times as much for each of them.
        filled = [torch.zeros(B, size, dtype=dtype) if b is None else b.expand(B, size) for b, size in biases]
        start = torch.cat([part.flatten() for part in filled])
        block = torch.empty_like(start)
        sums = [part.view(B, -1) for part in block.split([part.numel() for part in filled])]

        self._recurrent, self._is_float32 = recurrent, dtype == torch.float32
        self._calls = [partial(block.copy_, start)]
        self._looked_up = x = torch.empty(B, self._table.shape[1], dtype=dtype)
        for index, (layer, h, c) in enumerate(zip(weights.layers, recurrent.h, recurrent.c, strict=True)):
            gates = x
            if index > 0 or not self._has_gates:
                gates = sums.pop(0)
                self._calls.append(partial(gates.addmm_, x, layer.w_ih.t()))
            self._calls.append(partial(gates.addmm_, h, layer.w_hh.t()))
            self._calls += _cell(gates, layer, h, c)
            if layer.residual:
                output = torch.empty_like(h)
                self._calls.append(partial(torch.add, x, h, out=output))
                x = output
            else:
                x = h
        for matrix in [weights.projection[0], weights.head] if weights.projection is not None else [weights.head]:
            self._calls.append(partial(sums[0].addmm_, x, matrix.t()))
            x = sums.pop(0)
        self._logits = x


def _cell(
    gates: Tensor,  # (B, 4H): i, f, g, o before their nonlinearities
    layer: LayerWeights,
    h: Tensor,  # (B, P)
    c: Tensor,  # (B, H)
) -> Calls:
    """The calls that turn `h` and `c` into those after one token."""
    i, f, g, o = gates.chunk(4, dim=1)
    candidate, cell = torch.empty_like(c), torch.empty_like(c)
    calls: Calls = [
        partial(torch.tanh, g, out=candidate),
        partial(torch.sigmoid, gates, out=gates),  # g's too, which is cheaper than to leave it out
        partial(torch.mul, i, candidate, out=candidate),
        partial(torch.mul, f, c, out=c),
        partial(torch.add, c, candidate, out=c),
        partial(torch.tanh, c, out=cell),
    ]
    if layer.w_hr is None:
        return [*calls, partial(torch.mul, o, cell, out=h)]
    return [*calls, partial(torch.mul, o, cell, out=cell), partial(torch.mm, cell, layer.w_hr.t(), out=h)]


def lean_refusal(weights: StepWeights) -> str | None:
    """Why a model of these weights cannot take the lean step, or None."""
    device, dtype = weights.embedding.device, weights.embedding.dtype
    if device.type != "cpu":
        return f"it is for the CPU, and the model is on {device}"
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return (
            f"the model is in {name}, in which two ways of computing differ by more than a tie between tokens; load it "
            'with dtype="float32"'
        )
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return None
