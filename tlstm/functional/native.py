"""The `native` backend: torch's own LSTM, with lengths, empty rows, resets and packed data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tlstm_kernels.layer_weights import dense_recurrent
from tlstm_kernels.tracing import is_exporting
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from tlstm.functional.layers import run_layers
from tlstm.functional.native_resets import Cuts, cut
from tlstm.functional.options import BackendUnavailableError, Call, LSTMOptions, Result, State, Weights


def run_native(
    x: Tensor,  # (T, B, I), or packed (N, I)
    hx: State,
    weights: Weights,
    options: LSTMOptions,
    call: Call,
) -> Result:
    """Run torch's own LSTM; returns y (T, B, D*P), or (N, D*P), and (h_n, c_n)."""
    if options.drops and call.dropout_seed is not None:
        return run_layers(run_native, x, hx, weights, options, call)  # torch's stack draws its masks itself
    weights = _dense(weights, options)
    run = _recomputed if options.recompute and not is_exporting() else _run
    y, state = _outside_graph(run, x, hx, weights, options, call)
    return Result(y, state)


def _run(x: Tensor, hx: State, weights: Weights, options: LSTMOptions, call: Call) -> tuple[Tensor, State]:
    if call.batch_sizes is not None:
        return _native_packed(x, call.batch_sizes, hx, weights, options)
    if call.resets is not None:
        return _run_native_with_resets(x, hx, weights, options, call)
    return _run_native(x, hx, weights, options, call.lengths)


def _recomputed(x: Tensor, hx: State, weights: Weights, options: LSTMOptions, call: Call) -> tuple[Tensor, State]:
    """Only the inputs are kept; the backward pass runs the layers again first, with the same dropout."""
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *hx, *(call.reset_state or ()), *weights))):
        return _run(x, hx, weights, options, call)
    drops = options.drops
    return checkpoint(_run, x, hx, weights, options, call, use_reentrant=False, preserve_rng_state=drops)


def _dense(weights: Weights, options: LSTMOptions) -> Weights:
    """The flat weights with those of recurrent heads written out, which torch does not know: 1 - 1/N of it zeros."""
    if options.num_heads == 1:
        return weights
    n = options.weights_per_direction
    return [dense_recurrent(w) if k % n == 1 else w for k, w in enumerate(weights)]


def _outside_graph(run: Callable[..., tuple[Tensor, State]], *args: Any) -> tuple[Tensor, State]:
    """Run torch's LSTM, under torch.compile outside the compiled graph: inside, each step would be traced apart."""
    if torch.compiler.is_dynamo_compiling() and not is_exporting():
        return _disabled(run, *args)
    return run(*args)


@torch.compiler.disable
def _disabled(run: Callable[..., tuple[Tensor, State]], *args: Any) -> tuple[Tensor, State]:
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
    if is_exporting():
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


def _run_native_with_resets(
    x: Tensor,  # (T, B, I)
    hx: State,
    weights: Weights,
    options: LSTMOptions,
    call: Call,
) -> tuple[Tensor, State]:
    """What follows a reset depends on nothing before it: every piece is a sequence of its own in one packed batch."""
    assert call.resets is not None
    if is_exporting():
        raise BackendUnavailableError(
            "backend 'native' cannot be exported with resets: it cuts the batch by their values. "
            "Export with backend='reference', or without resets."
        )
    resets = (call.resets != 0).cpu()
    lengths = None if call.lengths is None else call.lengths.cpu()
    if not bool(resets.any()) or (lengths is not None and not bool(lengths.any())):
        return _run_native(x, hx, weights, options, lengths)
    cuts, batch_sizes = cut(resets, lengths)
    cuts = Cuts(*(part.to(x.device) for part in cuts))
    D = options.num_directions
    h_reset, c_reset = call.reset_state or (None, None)
    first = cuts.initial(hx[0], h_reset, D), cuts.initial(hx[1], c_reset, D)
    data = x.flatten(0, 1).index_select(0, cuts.tokens)
    data, (h_n, c_n) = _native_packed(data, batch_sizes, first, weights, options)
    y = data.new_zeros(x.shape[0] * x.shape[1], data.shape[1]).index_copy(0, cuts.tokens, data)
    return y.view(x.shape[0], x.shape[1], -1), (cuts.final_state(hx[0], h_n, D), cuts.final_state(hx[1], c_n, D))


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
