"""A layer of one or two directions through the equations of `reference`, with what its backward pass needs in tensors.

The counterpart of `launch`: the same arguments and results, on any device and in any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import reference
from .layer_weights import diagonal_blocks, split_weights
from .positions import valid_positions
from .zoneout import Zoneout


def kept_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes in which a layer of `dtype` keeps its gates and its cell states for the backward pass."""
    return reference.compute_dtype(dtype), reference.compute_dtype(dtype)


def forward(
    x: Tensor,  # (T, B, I)
    h_0: Tensor,  # (D, B, P)
    c_0: Tensor,  # (D, B, H)
    weights: Sequence[Tensor],  # flat
    lengths: Tensor | None,  # (B,)
    keep: str,  # "gates", "states" or "nothing": what the backward pass will be given
    resets: Tensor | None = None,  # (T, B) bool or integer
    h_reset: Tensor | None = None,  # (D, B, P)
    c_reset: Tensor | None = None,  # (D, B, H)
    zoneout: Zoneout | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y (T, B, D*P), h_n, c_n, gates (T, B, D, 4H) and cells (T, B, D, H); empty where not kept."""
    with torch.no_grad():
        split = split_weights(weights, h_0.shape[0])
        results = [
            reference.lstm_forward(
                x, h_0[k], c_0[k], *w.dense(), lengths, k == 1, *resets_of(k, resets, h_reset, c_reset), zoneout
            )
            for k, w in enumerate(split)
        ]
        y, h_n, c_n, steps = zip(*results, strict=True)
        gates, cells = (x.new_empty(0, dtype=dtype) for dtype in kept_dtypes(x.dtype))
        if keep == "gates":
            gates = torch.stack([torch.cat((s.i, s.f, s.g, s.o), -1) for s in steps], 2)
        if keep != "nothing":
            cells = torch.stack([s.c for s in steps], 2)
        return torch.cat(y, -1), torch.stack(h_n), torch.stack(c_n), gates, cells


def backward(
    d_y: Tensor | None,  # (T, B, D*P); None, as for the next two, is zero
    d_h_n: Tensor | None,  # (D, B, P)
    d_c_n: Tensor | None,  # (D, B, H)
    x: Tensor,  # (T, B, I)
    h_0: Tensor,  # (D, B, P)
    c_0: Tensor,  # (D, B, H)
    weights: Sequence[Tensor],  # flat
    y: Tensor,  # (T, B, D*P)
    gates: Tensor,  # (T, B, D, 4H), or empty: computed again
    cells: Tensor,  # (T, B, D, H)
    lengths: Tensor | None,  # (B,)
    need_x: bool,
    need_weights: bool,
    resets: Tensor | None = None,  # (T, B) bool or integer
    h_reset: Tensor | None = None,  # (D, B, P)
    c_reset: Tensor | None = None,  # (D, B, H)
    d_cells: Tensor | None = None,  # (T, B, D, H); None is zero
    zoneout: Zoneout | None = None,
) -> list[Tensor]:
    """Gradients of x (empty if not needed), h_0, c_0, h_reset and c_reset (none if not given), and of the flat weights
    (none if not needed).
    """
    P = h_0.shape[-1]
    with torch.no_grad():
        steps = None
        if gates.numel():
            steps = []
            for k in range(h_0.shape[0]):
                # Past a row's end the state is frozen; of that only the initial one, in reverse, is ever read.
                h = _frozen_at(h_0[k], y[..., k * P : (k + 1) * P], lengths)
                i, f, g, o = gates[:, :, k].to(cells.dtype).chunk(4, -1)
                steps.append(reference.LSTMSteps(i, f, g, o, cells[:, :, k], h.to(cells.dtype)))
        d_y, d_h_n, d_c_n = or_zeros(d_y, y), or_zeros(d_h_n, h_0), or_zeros(d_c_n, c_0)
        gradients = differentiable_backward(
            d_y, d_h_n, d_c_n, x, h_0, c_0, weights, lengths, resets, h_reset, c_reset, d_cells, zoneout, steps
        )
    if not need_x:
        gradients[0] = x.new_empty(0)
    return gradients if need_weights else gradients[: len(gradients) - len(weights)]


def differentiable_backward(
    d_y: Tensor,  # (T, B, D*P)
    d_h_n: Tensor,  # (D, B, P)
    d_c_n: Tensor,  # (D, B, H)
    x: Tensor,  # (T, B, I)
    h_0: Tensor,  # (D, B, P)
    c_0: Tensor,  # (D, B, H)
    weights: Sequence[Tensor],  # flat
    lengths: Tensor | None,  # (B,)
    resets: Tensor | None = None,  # (T, B) bool or integer
    h_reset: Tensor | None = None,  # (D, B, P)
    c_reset: Tensor | None = None,  # (D, B, H)
    d_cells: Tensor | None = None,  # (T, B, D, H)
    zoneout: Zoneout | None = None,
    steps: Sequence[reference.LSTMSteps] | None = None,  # one for each direction; None: computed again, differentiably
) -> list[Tensor]:
    """`backward` with every gradient, through operations that autograd can differentiate again."""
    P = h_0.shape[-1]
    gradients = []
    for k, w in enumerate(split_weights(weights, h_0.shape[0])):
        inputs = (x, h_0[k], c_0[k], *w.dense())
        options = (lengths, k == 1, *resets_of(k, resets, h_reset, c_reset), zoneout)
        own = steps[k] if steps is not None else reference.lstm_forward(*inputs, *options)[3]
        d_cells_own = None if d_cells is None else d_cells[:, :, k]
        d_y_own = d_y[..., k * P : (k + 1) * P]
        d = reference.lstm_backward(d_y_own, d_h_n[k], d_c_n[k], *inputs, own, *options, d_cells=d_cells_own)
        gradients.append(d if w.heads == 1 else replace(d, w_hh=diagonal_blocks(d.w_hh, w.heads)))
    d_x = gradients[0].x if len(gradients) == 1 else gradients[0].x + gradients[1].x
    d_weights = [g for d in gradients for g in (d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr) if g is not None]
    states = [[d.h_0 for d in gradients], [d.c_0 for d in gradients]]
    for d_given in ([d.h_reset for d in gradients], [d.c_reset for d in gradients]):
        states += [[d for d in d_given if d is not None]]
    return [d_x, *(torch.stack(d_state) for d_state in states if d_state), *d_weights]


def resets_of(
    direction: int,
    resets: Tensor | None,  # (T, B)
    h_reset: Tensor | None,  # (D, B, P)
    c_reset: Tensor | None,  # (D, B, H)
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The resets of one direction: the same steps for both, a state of its own for each."""
    h, c = (None if state is None else state[direction] for state in (h_reset, c_reset))
    return resets, h, c


def or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A gradient that autograd left out is zero."""
    return torch.zeros_like(like) if gradient is None else gradient


def _frozen_at(
    first: Tensor,  # (B, P)
    y: Tensor,  # (T, B, P)
    lengths: Tensor | None,  # (B,)
) -> Tensor:
    valid = valid_positions(lengths, y.shape[0])
    return y if valid is None else torch.where(valid, y, first)
