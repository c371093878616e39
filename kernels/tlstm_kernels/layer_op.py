"""One LSTM layer, one or both directions, as a differentiable function of its tensors, on the kernels or the equations.

Weights are flat, as torch has them: for each direction W_ih (4H, I), W_hh (4H, P), then b_ih (4H,) and b_hh (4H,) with
bias, then W_hr (P, H) with a projection. A W_hh of (4H, H / N) is that of N heads: the units are in N blocks, and each
block's gates see only the h of its own (`layer_weights.dense_recurrent`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import layer_reference
from .checks import check_layer, check_zoneout
from .layer_autograd import PLAIN_TENSORS, lstm_layer_op, run_eagerly
from .layer_weights import split_weights, weight_kinds
from .positions import valid_positions, zero_padding
from .projection import projected_layer
from .reference_function import lstm
from .tracing import is_exporting
from .zoneout import Zoneout, zoneout_of


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
    zero_h_0: bool = False,
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
        zero_h_0: h_0 is known to be zero, which saves work where the layer has a projection (`projection`).

    Returns:
        y (T, B, D*P), h_n (D, B, P), c_n (D, B, H) and, if asked for, the cell states (T, B, D*H), zero past a row's
        length as y is, else None; all in the dtype of x.

    Raises:
        ValueError: tensors that do not fit one another, or a backend that cannot run on them.
    """
    device, anew = x.device.type, (resets, h_reset, c_reset)
    modes: dict[str, Any] = {"backend": backend, "recompute": recompute, "with_cells": with_cells}
    modes |= {"zoneout_h": zoneout_h, "zoneout_c": zoneout_c, "zoneout_seed": zoneout_seed}
    if torch.is_autocast_enabled(device):
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            x, h_0, c_0, weights = x.to(dtype), h_0.to(dtype), c_0.to(dtype), [w.to(dtype) for w in weights]
            h_reset, c_reset = (None if state is None else state.to(dtype) for state in (h_reset, c_reset))
            return lstm_layer(x, h_0, c_0, weights, lengths, resets, h_reset, c_reset, zero_h_0=zero_h_0, **modes)
    check_layer(x, h_0, c_0, weights, lengths, backend, *anew)
    check_zoneout(zoneout_h, zoneout_c, zoneout_seed, x.device)
    # Zoneout of h mixes two projected states, which no state before the projection stands for.
    if backend == "triton" and weight_kinds(weights, h_0.shape[0])[1] and x.dtype != torch.float64 and not zoneout_h:
        run = partial(lstm_layer, **modes)
        return projected_layer(run, x, h_0, c_0, weights, lengths, *anew, zero_h_0)

    given = () if h_reset is None or c_reset is None else (h_reset, c_reset)
    keep = "nothing"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, h_0, c_0, *given, *weights)):
        keep = "states" if recompute else "gates"
    traced = torch.compiler.is_compiling() and not is_exporting()
    if backend == "reference" and not (traced or recompute or with_cells):
        kept = zoneout_of(zoneout_h, zoneout_c, zoneout_seed)
        return *_reference_layer(x, h_0, c_0, weights, lengths, kept, *anew), None
    rest = (*anew, with_cells, float(zoneout_h), float(zoneout_c), zoneout_seed)
    if traced or type(x) not in PLAIN_TENSORS:
        y, h_n, c_n, _, cells = lstm_layer_op(x, h_0, c_0, list(weights), lengths, backend, keep, *rest)
    else:
        y, h_n, c_n, _, cells = run_eagerly(x, h_0, c_0, lengths, backend, keep, *rest, *weights)
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
