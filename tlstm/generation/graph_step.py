"""The graphed step: on an NVIDIA GPU, the model's step recorded once as a CUDA graph and replayed for every token.

A replay is one launch in place of several for each layer. The rows live in buffers of fixed size: rows that have left
are computed along until new ones take their places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tlstm.generation.model_step import model_step
from tlstm.generation.prefill import LanguageModel
from tlstm.state import LSTMState

Capture = Callable[[Callable[[], None]], Callable[[], None]]

_WARM_UP_CALLS = 3  # cuDNN and cuBLAS set up their workspaces in the first ones, which a graph must not record
# Replay and call run the same kernels; a batch size may still choose others than it did before.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class GraphError(RuntimeError):
    """The step cannot be recorded here, or its replay is not the step; the message says which."""


def capture_cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Record what `function` launches and return the replay; the function runs a few times before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_CALLS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class GraphStep:
    """A `Step` that replays a recording of the model's, which is compared with a call of the model first.

    Args:
        places: most rows at once.
        capture: records a function on fixed tensors and returns its replay.

    Raises:
        GraphError: the recording fails or gives other results.
    """

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, places: int, capture: Capture = capture_cuda_graph) -> None:
        self._model, self._rows = model, 0
        start = model.zero_state(places).map(_spread)
        self._state, self._tokens = start.clone(), torch.arange(places, device=start.device) % model.config.vocab_size
        try:
            expected, after = model_step(model, self._tokens, start)
            self._logits = torch.empty_like(expected)
            self._replay = capture(self._one_step)
        except RuntimeError as error:
            raise GraphError(f"recording the step failed ({str(error).splitlines()[0]})") from error
        self._set(start)
        self._replay()
        tolerance = _TOLERANCE[start.dtype]
        pairs = [(self._logits, expected), *zip(_tensors(self._state), _tensors(after), strict=True)]
        for got, wanted in pairs:
            if not torch.allclose(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())):
                raise GraphError("the recorded step gives other results than the model")

    @property
    def recurrent(self) -> LSTMState:
        return self._state.map(lambda tensor: tensor[: self._rows])

    @torch.inference_mode()
    def extend(self, more: LSTMState) -> None:
        first, self._rows = self._rows, self._rows + more.batch_size
        assert self._rows <= self._state.batch_size, "more rows than places"
        for place, value in zip(_tensors(self._state), _tensors(more), strict=True):
            place[first : self._rows] = value

    def select(self, rows: Tensor) -> None:
        kept = self.recurrent.select(rows)
        self._rows = len(rows)
        for place, value in zip(_tensors(self._state), _tensors(kept), strict=True):
            place[: self._rows] = value

    def __call__(self, tokens: Tensor) -> Tensor:
        self._tokens[: self._rows] = tokens
        self._replay()
        return self._logits[: self._rows]

    def _one_step(self) -> None:
        logits, after = model_step(self._model, self._tokens, self._state)
        self._logits.copy_(logits)
        self._set(after)

    def _set(self, state: LSTMState) -> None:
        for place, value in zip(_tensors(self._state), _tensors(state), strict=True):
            place.copy_(value)


def _spread(tensor: Tensor) -> Tensor:
    """Other values of this shape for a trial: from -1 to 1, none of which leaves out a weight."""
    return torch.linspace(-1, 1, tensor.numel(), dtype=tensor.dtype, device=tensor.device).view_as(tensor)


def _tensors(state: LSTMState) -> tuple[Tensor, ...]:
    return (*state.h, *state.c)
