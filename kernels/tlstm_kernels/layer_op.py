"""One LSTM layer, one or both directions, as one differentiable operator: `torch.ops.tlstm.lstm_layer`.

Two ways lead to the same forward and backward functions:

    eager       a plain autograd function, which pays nothing for the dispatch of an operator
    compiled    an opaque operator with its shapes and its gradient, so that torch.compile sees one node

The functions are those of `launch` (the Triton kernels) or of `layer_reference` (the equations). Gradients of gradients
always go through the equations. Weights are flat, as torch has them: for each direction W_ih (4H, I), W_hh (4H, P),
then b_ih (4H,) and b_hh (4H,) with bias, then W_hr (P, H) with a projection. A W_hh of (4H, H / N) is that of N heads:
the units are in N blocks, and each block's gates see only the h of its own (`layer_weights.dense_recurrent`).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import layer_reference
from .checks import check_layer, check_zoneout
from .launch_options import applied, current_options
from .layer_reference import or_zeros
from .layer_weights import split_weights
from .namespace import NAMESPACE
from .positions import valid_positions, zero_padding
from .reference_function import lstm
from .zoneout import Zoneout, zoneout_of

_MODULES = {"triton": "launch", "reference": "layer_reference"}
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def lstm_layer(
    x: Tensor,  # (T, B, I)
    h_0: Tensor,  # (D, B, P)
    c_0: Tensor,  # (D, B, H)
    weights: Sequence[Tensor],  # flat
    lengths: Tensor | None = None,  # (B,) integer, 0..T
    resets: Tensor | None = None,  # (T, B) bool or integer
    h_reset: Tensor | None = None,  # (D, B, P)
    c_reset: Tensor | None = None,  # (D, B, H)
    *,
    backend: str = "triton",
    recompute: bool = False,
    with_cells: bool = False,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    zoneout_seed: Tensor | None = None,  # () int64
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run one layer in D directions; differentiable, twice through the equations.

    The number of directions is that of `h_0`; the second one reads the sequence from its end. Under autocast the
    arguments are cast to its dtype, float64 excepted.

    Where `resets[t, b]` is not zero, row b's state is replaced by `h_reset` and `c_reset` (both or none of them; zero
    if None) between the steps t - 1 and t. That is the same boundary for both directions: the first one crosses it on
    the way to step t, the second one on the way from step t to t - 1, so that nothing passes it either way. A reset at
    t = 0 means nothing to the second direction, and one past the row's length nothing to any.

    Args:
        backend: "triton" (tensors on a GPU) or "reference".
        recompute: keep only the states for the backward pass and compute the gates again there (one more product over
            all steps), instead of keeping the four gates of every step.
        with_cells: return the cell states of all steps too, differentiable like the other results.
        zoneout_h, zoneout_c: probabilities with which a unit keeps its h and its c of the step before (`zoneout`).
        zoneout_seed: decides which units do, on x's device; the same seed gives the same masks on every backend. With
            None every unit keeps that share of them, as in evaluation.

    Returns:
        y (T, B, D*P), h_n (D, B, P), c_n (D, B, H) and, if asked for, the cell states (T, B, D*H), zero past a row's
        length as y is, else None; all in the dtype of x.

    Raises:
        ValueError: tensors that do not fit one another, or a backend that cannot run on them.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            x, h_0, c_0, weights = x.to(dtype), h_0.to(dtype), c_0.to(dtype), [w.to(dtype) for w in weights]
            anew = (resets, *(None if state is None else state.to(dtype) for state in (h_reset, c_reset)))
            options: dict[str, Any] = {"backend": backend, "recompute": recompute, "with_cells": with_cells}
            options |= {"zoneout_h": zoneout_h, "zoneout_c": zoneout_c, "zoneout_seed": zoneout_seed}
            return lstm_layer(x, h_0, c_0, weights, lengths, *anew, **options)
    check_layer(x, h_0, c_0, weights, lengths, backend, resets, h_reset, c_reset)
    check_zoneout(zoneout_h, zoneout_c, zoneout_seed, x.device)

    given = () if h_reset is None or c_reset is None else (h_reset, c_reset)
    keep = "nothing"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, h_0, c_0, *given, *weights)):
        keep = "states" if recompute else "gates"
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if backend == "reference" and not (traced or recompute or with_cells):
        kept = zoneout_of(zoneout_h, zoneout_c, zoneout_seed)
        return *_reference_layer(x, h_0, c_0, weights, lengths, kept, resets, h_reset, c_reset), None
    rest = (resets, h_reset, c_reset, with_cells, float(zoneout_h), float(zoneout_c), zoneout_seed)
    if traced or type(x) not in _PLAIN_TENSORS:
        y, h_n, c_n, _, cells = lstm_layer_op(x, h_0, c_0, list(weights), lengths, backend, keep, *rest)
    else:
        y, h_n, c_n, _, cells = LayerFunction.apply(x, h_0, c_0, lengths, backend, keep, *rest, *weights)
    if not with_cells:
        return y, h_n, c_n, None
    # What the kernels keep past a row's length is anything, and in their own dtype.
    return y, h_n, c_n, zero_padding(cells.flatten(2), valid_positions(lengths, x.shape[0])).to(x.dtype)


def _reference_layer(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    zoneout: Zoneout | None,
    *resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every transform of torch.func and torch.export goes through this one; torch.compile would unroll it over time."""
    results = [
        lstm(x, h_0[k], c_0[k], *w.dense(), lengths, k == 1, *layer_reference.resets_of(k, *resets), zoneout)
        for k, w in enumerate(split_weights(weights, h_0.shape[0]))
    ]
    y, h_n, c_n = zip(*results, strict=True)
    return torch.cat(y, -1) if len(y) > 1 else y[0], torch.stack(h_n), torch.stack(c_n)


def _implementation(backend: str) -> Any:
    """The module with `forward` and `backward`; that of the kernels is imported when it is first used."""
    return importlib.import_module(f".{_MODULES[backend]}", __package__)


class LayerFunction(torch.autograd.Function):
    """The eager way."""

    @staticmethod
    def forward(x, h_0, c_0, lengths, backend, keep, *rest):
        resets, with_cells, zoneout, weights = rest[:3], rest[3], zoneout_of(*rest[4:7]), rest[7:]
        options = (_kept(keep, with_cells), *resets, zoneout)
        return _implementation(backend).forward(x, h_0, c_0, weights, lengths, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h_0, c_0, lengths, ctx.backend, _, *rest = inputs
        _save(ctx, x, h_0, c_0, rest[7:], lengths, rest[:7], output)

    @staticmethod
    def backward(ctx, d_y, d_h_n, d_c_n, _, d_cells):
        needs = ctx.needs_input_grad
        d_states, d_weights = _gradients(ctx, d_y, d_h_n, d_c_n, d_cells, needs[0], any(needs[13:]))
        d_x, d_h_0, d_c_0, *d_reset_state = d_states
        d_weights = d_weights or (None,) * (len(needs) - 13)
        return d_x, d_h_0, d_c_0, None, None, None, None, *d_reset_state, *[None] * 4, *d_weights

    @staticmethod
    def vmap(info, in_dims, *args):
        """One call for each entry of the mapped dimension: a kernel runs one layer with one set of weights."""

        def entry(n: int) -> list[Any]:
            return [a if dim is None else a.select(dim, n) for a, dim in zip(args, in_dims, strict=True)]

        results = [LayerFunction.apply(*entry(n)) for n in range(info.batch_size)]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * 5


@torch.library.custom_op(f"{NAMESPACE}::lstm_layer", mutates_args=())
def lstm_layer_op(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    backend: str,
    keep: str,
    resets: Tensor | None,
    h_reset: Tensor | None,
    c_reset: Tensor | None,
    with_cells: bool,
    zoneout_h: float,
    zoneout_c: float,
    zoneout_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The compiled way; arguments as in `layer_reference.forward`, and whether the cell states are a result too."""
    options = (_kept(keep, with_cells), resets, h_reset, c_reset, zoneout_of(zoneout_h, zoneout_c, zoneout_seed))
    return _implementation(backend).forward(x, h_0, c_0, weights, lengths, *options)


@lstm_layer_op.register_fake
def _(x, h_0, c_0, weights, lengths, backend, keep, resets, h_reset, c_reset, with_cells, *_):
    keep = _kept(keep, with_cells)
    T, B, _ = x.shape
    D, _, P = h_0.shape
    H = c_0.shape[-1]
    gates_dtype, cells_dtype = _implementation(backend).kept_dtypes(x.dtype)
    gates = x.new_empty((T, B, D, 4 * H) if keep == "gates" else (0,), dtype=gates_dtype)
    cells = x.new_empty((0,) if keep == "nothing" else (T, B, D, H), dtype=cells_dtype)
    return x.new_empty(T, B, D * P), x.new_empty(D, B, P), x.new_empty(D, B, H), gates, cells


@torch.library.custom_op(f"{NAMESPACE}::lstm_layer_backward", mutates_args=())
def lstm_layer_backward_op(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    lengths: Tensor | None,
    backend: str,
    need_x: bool,
    need_weights: bool,
    resets: Tensor | None,
    h_reset: Tensor | None,
    c_reset: Tensor | None,
    d_cells: Tensor | None,
    zoneout_h: float,
    zoneout_c: float,
    zoneout_seed: Tensor | None,
) -> list[Tensor]:
    """Arguments and results as in `layer_reference.backward`."""
    saved, needs = (y, gates, cells, lengths), (need_x, need_weights)
    options = (resets, h_reset, c_reset, d_cells, zoneout_of(zoneout_h, zoneout_c, zoneout_seed))
    gradients = _implementation(backend).backward(d_y, d_h_n, d_c_n, x, h_0, c_0, weights, *saved, *needs, *options)
    # The two biases have one gradient, and an operator may not return a tensor twice.
    first = {id(g): n for n, g in reversed(list(enumerate(gradients)))}
    return [g if first[id(g)] == n else g.clone() for n, g in enumerate(gradients)]


@lstm_layer_backward_op.register_fake
def _(
    d_y, d_h_n, d_c_n, x, h_0, c_0, weights, y, gates, cells, lengths, backend, need_x, need_weights,
    resets, h_reset, c_reset, *_,
):  # fmt: skip
    like = [h_0, c_0, *(() if h_reset is None else (h_reset, c_reset)), *(weights if need_weights else ())]
    return [x.new_empty(x.shape if need_x else (0,)), *(tensor.new_empty(tensor.shape) for tensor in like)]


def _setup_op_context(ctx, inputs, output):
    x, h_0, c_0, weights, lengths, ctx.backend, _, *rest = inputs
    _save(ctx, x, h_0, c_0, weights, lengths, rest, output)


def _op_backward(ctx, d_y, d_h_n, d_c_n, _, d_cells):
    needs = ctx.needs_input_grad
    d_states, d_weights = _gradients(ctx, d_y, d_h_n, d_c_n, d_cells, needs[0], any(needs[3]))
    d_x, d_h_0, d_c_0, *d_reset_state = d_states
    d_weights = d_weights or [None] * len(needs[3])
    return d_x, d_h_0, d_c_0, d_weights, None, None, None, None, *d_reset_state, *[None] * 4


lstm_layer_op.register_autograd(_op_backward, setup_context=_setup_op_context)


def _kept(keep: str, with_cells: bool) -> str:
    """Cell states that are a result are computed also where nothing is kept for a backward pass."""
    return "states" if with_cells and keep == "nothing" else keep


def _save(ctx, x, h_0, c_0, weights, lengths, rest, output):
    # Autograd runs the backward pass in a thread of its own, where the caller's options are not in force.
    ctx.launch_options = current_options()
    *resets, with_cells, ctx.zoneout_h, ctx.zoneout_c, seed = rest
    y, _, _, gates, cells = output
    ctx.mark_non_differentiable(gates, *(() if with_cells else (cells,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h_0, c_0, lengths, y, gates, cells, *resets, seed, *weights)


def _gradients(ctx, d_y, d_h_n, d_c_n, d_cells, need_x, need_weights):
    """Gradients of x, h_0, c_0, h_reset and c_reset, None where there are none, and of the weights if needed."""
    x, h_0, c_0, lengths, y, gates, cells, resets, h_reset, c_reset, seed, *weights = ctx.saved_tensors
    anew, kept = (resets, h_reset, c_reset), (ctx.zoneout_h, ctx.zoneout_c, seed)
    arguments = (d_y, d_h_n, d_c_n, x, h_0, c_0, weights, y, gates, cells, lengths)
    if torch.is_grad_enabled():
        # Second derivatives were asked for. What was kept is constant to autograd: compute it again from the inputs.
        outer = (or_zeros(d_y, y), or_zeros(d_h_n, h_0), or_zeros(d_c_n, c_0))
        inputs: tuple[Any, ...] = (*outer, x, h_0, c_0, weights, lengths, *anew, d_cells, zoneout_of(*kept))
        gradients = layer_reference.differentiable_backward(*inputs)
    elif torch.compiler.is_compiling() or type(x) not in _PLAIN_TENSORS:
        gradients = lstm_layer_backward_op(*arguments, ctx.backend, need_x, need_weights, *anew, d_cells, *kept)
    else:
        with applied(ctx.launch_options):
            options = (need_x, need_weights, *anew, d_cells, zoneout_of(*kept))
            gradients = _implementation(ctx.backend).backward(*arguments, *options)
    d_x, d_h_0, d_c_0, *rest = gradients
    states = 0 if h_reset is None else 2
    d_reset_state = rest[:states] if states else (None, None)
    return (d_x if need_x else None, d_h_0, d_c_0, *d_reset_state), rest[states:] if need_weights else []
