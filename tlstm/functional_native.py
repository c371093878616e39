"""The `native` backend: torch's own LSTM, with lengths, empty rows, resets and packed data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

State = tuple[Tensor, Tensor]
Weights = list[Tensor] | tuple[Tensor, ...]


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says why."""


class LSTMOptions(NamedTuple):
    """What `torch.nn.LSTM` is built with, as far as its forward pass needs it."""

    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    proj_size: int = 0

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def weights_per_direction(self) -> int:
        """W_ih, W_hh, then b_ih, b_hh with bias, then W_hr with a projection."""
        return 2 + 2 * self.bias + (self.proj_size > 0)


def run_native(
    x: Tensor,  # (T, B, I)
    hx: State,
    weights: Weights,
    options: LSTMOptions,
    lengths: Tensor | None,
    resets: Tensor | None,  # (T, B)
) -> tuple[Tensor, State]:
    """Run torch's own LSTM over a padded batch; returns y (T, B, D*P), (h_n, c_n)."""
    if resets is None:
        return _call(_run_native, x, hx, weights, options, lengths)
    return _call(_run_native_with_resets, x, hx, weights, options, lengths, resets)


def run_native_packed(
    data: Tensor,  # (N, I)
    batch_sizes: Tensor,  # (T,) on the CPU
    hx: State,
    weights: Weights,
    options: LSTMOptions,
) -> tuple[Tensor, State]:
    """Run torch's own LSTM over packed data; returns y (N, D*P), (h_n, c_n)."""
    return _call(_native_packed, data, batch_sizes, hx, weights, options)


def _call(run: Callable[..., tuple[Tensor, State]], *args: Any) -> tuple[Tensor, State]:
    """Run torch's LSTM, under torch.compile outside the compiled graph: inside, each step would be traced apart."""
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        return _outside_graph(run, *args)
    return run(*args)


@torch.compiler.disable
def _outside_graph(run: Callable[..., tuple[Tensor, State]], *args: Any) -> tuple[Tensor, State]:
    return run(*args)


def _run_native(
    x: Tensor,  # (T, B, I)
    hx: State,
    weights: Weights,
    options: LSTMOptions,
    lengths: Tensor | None,
) -> tuple[Tensor, State]:
    if lengths is None:
        dropout, training, batch_first = options.dropout, options.training, False
        y, h_n, c_n = _VF.lstm(
            x, hx, weights, options.bias, options.num_layers, dropout, training, options.bidirectional, batch_first
        )
        return y, (h_n, c_n)
    if torch.compiler.is_exporting():
        raise BackendUnavailableError(
            "backend 'native' cannot be exported with lengths: it packs the batch by their values. "
            "Export with backend='reference', or without lengths."
        )
    lengths = lengths.cpu()
    if bool((lengths == x.shape[0]).all()):
        return _run_native(x, hx, weights, options, None)
    if bool((lengths == 0).any()):
        return _run_native_with_empty_rows(x, hx, weights, options, lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    hx = _reorder(hx, packed.sorted_indices)
    data, state = _native_packed(packed.data, packed.batch_sizes, hx, weights, options)
    output = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
    y, _ = pad_packed_sequence(output, total_length=x.shape[0])
    return y, _reorder(state, packed.unsorted_indices)


def _run_native_with_empty_rows(
    x: Tensor,  # (T, B, I)
    hx: State,
    weights: Weights,
    options: LSTMOptions,
    lengths: Tensor,  # (B,) on the CPU, at least one of them 0
) -> tuple[Tensor, State]:
    """Packing refuses empty rows, so only the others are run and put back in their places."""
    rows = lengths.nonzero().squeeze(1)
    rows_there = rows.to(x.device)
    y = x.new_zeros(x.shape[0], x.shape[1], hx[0].shape[-1] * options.num_directions)
    if rows.numel() == 0:
        return y, hx
    x_rows, hx_rows = x.index_select(1, rows_there), _reorder(hx, rows_there)
    y_rows, (h_n, c_n) = _run_native(x_rows, hx_rows, weights, options, lengths[rows])
    y = y.to(y_rows.dtype).index_copy(1, rows_there, y_rows)
    return y, (
        hx[0].to(h_n.dtype).index_copy(1, rows_there, h_n),
        hx[1].to(c_n.dtype).index_copy(1, rows_there, c_n),
    )


class _Cuts(NamedTuple):
    """A padded batch cut into sequences, packed, longest first: where each token and each state comes from."""

    tokens: Tensor  # (N,) position t * B + b of each packed token
    rows: Tensor  # the rows that have a token
    last: Tensor  # for each of these rows, its last sequence
    carrying: Tensor  # those of these rows that do not reset at once
    first: Tensor  # for each carrying row, its first sequence


def _cut(
    resets: Tensor,  # (T, B) bool on the CPU
    lengths: Tensor | None,  # (B,) on the CPU
) -> tuple[_Cuts, Tensor]:
    """Cut each row where it resets; returns the cuts and the batch sizes of the packed sequences, on the CPU."""
    T, B = resets.shape
    ends = torch.full((B,), T) if lengths is None else lengths.long()
    # Row after row from here on, without the padding.
    valid = torch.arange(T)[None, :] < ends[:, None]  # (B, T)
    row_of, t_of = valid.nonzero().unbind(1)
    starts = resets.T[valid] | (t_of == 0)  # (N,)
    sequence_of = starts.long().cumsum(0) - 1
    start_of = starts.nonzero().squeeze(1)  # (S,)
    offset = torch.arange(row_of.numel()) - start_of[sequence_of]
    place_of = sequence_of.bincount().argsort(descending=True, stable=True).argsort()  # (S,) longest first
    batch_sizes = offset.bincount()
    place = (batch_sizes.cumsum(0) - batch_sizes)[offset] + place_of[sequence_of]
    tokens = torch.empty_like(place)
    tokens[place] = t_of * B + row_of

    rows = (ends > 0).nonzero().squeeze(1)
    stop = ends[rows].cumsum(0)
    carries = ~resets[0, rows]
    first = sequence_of[(stop - ends[rows])[carries]]
    return _Cuts(tokens, rows, place_of[sequence_of[stop - 1]], rows[carries], place_of[first]), batch_sizes


def _run_native_with_resets(
    x: Tensor,  # (T, B, I)
    hx: State,
    weights: Weights,
    options: LSTMOptions,
    lengths: Tensor | None,
    resets: Tensor,  # (T, B)
) -> tuple[Tensor, State]:
    """What follows a reset depends on nothing before it: every piece is a sequence of its own in one packed batch."""
    if torch.compiler.is_exporting():
        raise BackendUnavailableError(
            "backend 'native' cannot be exported with resets: it cuts the batch by their values. "
            "Export with backend='reference', or without resets."
        )
    resets = (resets != 0).cpu()
    lengths = None if lengths is None else lengths.cpu()
    if not bool(resets.any()) or (lengths is not None and not bool(lengths.any())):
        return _run_native(x, hx, weights, options, lengths)
    cuts, batch_sizes = _cut(resets, lengths)
    cuts = _Cuts(*(part.to(x.device) for part in cuts))
    sequences = int(batch_sizes[0])
    h_0, c_0 = (
        state.new_zeros(state.shape[0], sequences, state.shape[2]).index_copy(1, cuts.first, state[:, cuts.carrying])
        for state in hx
    )
    data = x.flatten(0, 1).index_select(0, cuts.tokens)
    data, (h_n, c_n) = _native_packed(data, batch_sizes, (h_0, c_0), weights, options)
    y = data.new_zeros(x.shape[0] * x.shape[1], data.shape[1]).index_copy(0, cuts.tokens, data)
    return y.view(x.shape[0], x.shape[1], -1), (
        hx[0].to(h_n.dtype).index_copy(1, cuts.rows, h_n.index_select(1, cuts.last)),
        hx[1].to(c_n.dtype).index_copy(1, cuts.rows, c_n.index_select(1, cuts.last)),
    )


def _native_packed(
    data: Tensor, batch_sizes: Tensor, hx: State, weights: Weights, options: LSTMOptions
) -> tuple[Tensor, State]:
    y, h_n, c_n = _VF.lstm(
        data,
        batch_sizes,
        hx,
        weights,
        options.bias,
        options.num_layers,
        options.dropout,
        options.training,
        options.bidirectional,
    )
    return y, (h_n, c_n)


def _reorder(state: State, rows: Tensor | None) -> State:
    return state if rows is None else (state[0].index_select(1, rows), state[1].index_select(1, rows))
