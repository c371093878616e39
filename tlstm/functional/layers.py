"""A stack of layers, one call after another: for the backends that know one layer, and for what torch's own lacks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tlstm_kernels.layer_op import lstm_layer
from torch import Tensor

from tlstm.functional.dropout import dropout_between_layers, layer_seed
from tlstm.functional.options import Call, LSTMOptions, Result, State, Weights

# A backend is one of these: it runs the layers whose weights it is given, one or all.
Runner = Callable[[Tensor, State, Weights, LSTMOptions, Call], Result]


def run_layers(
    run: Runner,
    x: Tensor,  # (T, B, I), or packed (N, I)
    hx: State,
    weights: Weights,
    options: LSTMOptions,
    call: Call,
) -> Result:
    """`run` for each layer, with dropout between them."""
    D, n = options.num_directions, options.weights_per_direction * options.num_directions
    results: list[Result] = []
    for layer in range(options.num_layers):
        if layer > 0 and options.drops:
            if call.dropout_seed is None:
                x = torch.nn.functional.dropout(x, options.dropout)
            else:
                where = (layer - 1, call.batch_sizes, call.rows)
                x = dropout_between_layers(x, options.dropout, call.dropout_seed, *where)
        states = slice(layer * D, (layer + 1) * D)
        own, one = (hx[0][states], hx[1][states]), call.of_layer(states)
        if options.zones_out and options.training:
            one = one._replace(zoneout_seed=layer_seed(call.dropout_seed, layer, x.device))
        results.append(run(x, own, weights[layer * n : (layer + 1) * n], options.one_layer(), one))
        x = results[-1].y
    cells = tuple(part for result in results for part in result.cells)
    if len(results) == 1:
        return Result(x, results[0].state, cells)
    return Result(x, (torch.cat([r.state[0] for r in results]), torch.cat([r.state[1] for r in results])), cells)


def run_kernels(x: Tensor, hx: State, weights: Weights, options: LSTMOptions, call: Call) -> Result:
    """The `triton` backend."""
    return _run_operator("triton", x, hx, weights, options, call)


def run_reference(x: Tensor, hx: State, weights: Weights, options: LSTMOptions, call: Call) -> Result:
    """The `reference` backend."""
    return _run_operator("reference", x, hx, weights, options, call)


def _run_operator(backend: str, x: Tensor, hx: State, weights: Weights, options: LSTMOptions, call: Call) -> Result:
    """One `lstm_layer` after another: opaque to torch.compile, cast by autocast as torch's own LSTM is."""
    lengths, resets = (None if t is None else t.to(x.device, non_blocking=True) for t in (call.lengths, call.resets))

    def run(x: Tensor, hx: State, weights: Weights, options: LSTMOptions, call: Call) -> Result:
        y, h_n, c_n, cells = lstm_layer(
            x,
            *hx,
            weights,
            call.lengths,
            call.resets,
            *(call.reset_state or (None, None)),
            backend=backend,
            recompute=options.recompute,
            with_cells=call.with_cells,
            zoneout_h=options.zoneout[0],
            zoneout_c=options.zoneout[1],
            zoneout_seed=call.zoneout_seed,
            zero_h_0=call.from_zero,
        )
        return Result(y, (h_n, c_n), () if cells is None else (cells,))

    return run_layers(run, x, hx, weights, options, call._replace(lengths=lengths, resets=resets))
