"""A layer with a recurrent projection as one without: what lets the persistent kernels run it.

The projection h_t = m_t W_hr^T would be a second product, and a second exchange, in every step. But only the gates read
h_{t-1}, and

    h_{t-1} W_hh^T = m_{t-1} (W_hh W_hr)^T

so that the recurrence over m_t = o_t * tanh(c_t) with the recurrent weight W_hh W_hr (4H, H) is that of a layer without
projection, after which all h_t are one product. Gradients come from autograd through these products.

What a step starts from is not always an m: h_0, and a given state after a reset, need not be in the image of W_hr. They
enter as input of the steps that start from them: these steps' rows of z (T, B, P) hold the state, all others zero, and
[x z] [W_ih W_hh]^T adds W_hh h_0 to the first step's gates, wherever in time that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layer_weights import DirectionWeights, split_weights
from .layouts import is_batch_first, joined, rows_of, sequence_of
from .positions import replaced, reset_positions, valid_positions

# (x, h_0, c_0, weights, lengths, resets, h_reset, c_reset) -> y, h_n, c_n, cells: a layer of P = H.
PlainLayer = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]


def projected_layer(
    run: PlainLayer,
    x: Tensor,  # (T, B, I)
    h_0: Tensor,  # (D, B, P)
    c_0: Tensor,  # (D, B, H)
    weights: Sequence[Tensor],  # flat, with W_hr
    lengths: Tensor | None,  # (B,)
    resets: Tensor | None,  # (T, B)
    h_reset: Tensor | None,  # (D, B, P)
    c_reset: Tensor | None,  # (D, B, H)
    zero_h_0: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`run`, which knows no projection, for a layer that has one; arguments and results as of `layer_op.lstm_layer`.

    Args:
        zero_h_0: h_0 is known to be zero. That and no `h_reset` save the D * P columns of z.
    """
    T, D = x.shape[0], h_0.shape[0]
    split = split_weights(weights, D)
    starts: list[Tensor] = []
    if not (zero_h_0 and h_reset is None):
        valid = valid_positions(lengths, T)
        for k in range(D):
            given = None if h_reset is None else h_reset[k]
            starts.append(_start_states(h_0[k], lengths, reset_positions(resets, valid, k == 1), given, T, k == 1))
    nothing = torch.zeros_like(c_0)
    plain = [tensor for k, w in enumerate(split) for tensor in _without_projection(w, k, len(starts)).flat()]
    given_m = None if h_reset is None else nothing
    x = joined([x, *starts], 2, is_batch_first(x)) if starts else x
    m, m_n, c_n, cells = run(x, nothing, c_0, plain, lengths, resets, given_m, c_reset)

    if T == 0:
        return x.new_zeros(0, x.shape[1], D * h_0.shape[-1]), h_0.clone(), c_n, cells
    w_hr, batch_first = [w.w_hr for w in split if w.w_hr is not None], is_batch_first(m)
    ys = [rows_of(own, batch_first) @ w.T for own, w in zip(m.chunk(D, -1), w_hr, strict=True)]
    y = sequence_of(ys[0] if D == 1 else torch.cat(ys, 1), T, batch_first)
    h_n = torch.stack([own @ w.T for own, w in zip(m_n, w_hr, strict=True)])
    if lengths is not None:
        h_n = torch.where((lengths > 0)[:, None], h_n, h_0)
    return y, h_n, c_n, cells


def _without_projection(w: DirectionWeights, k: int, n: int) -> DirectionWeights:
    """The weights of direction k over [x z_0 .. z_{n-1}] and m."""
    assert w.w_hr is not None
    columns = [w.w_hh if k == other else torch.zeros_like(w.w_hh) for other in range(n)]
    w_ih = torch.cat((w.w_ih, *columns), 1) if columns else w.w_ih
    return DirectionWeights(w_ih, w.w_hh @ w.w_hr, w.b_ih, w.b_hh, None)


def _start_states(
    h_0: Tensor,  # (B, P)
    lengths: Tensor | None,  # (B,)
    reset: Tensor | None,  # (T, B, 1) bool, in the order of reading
    h_reset: Tensor | None,  # (B, P)
    T: int,
    reverse: bool,
) -> Tensor:
    """z (T, B, P): the given state that a step starts from, zero where it starts from the step before."""
    time = torch.arange(T, device=h_0.device)[:, None, None]
    first: Tensor | int = 0
    if reverse:
        first = T - 1 if lengths is None else (lengths - 1)[:, None]
    z = torch.where(time == first, h_0, 0)
    return z if reset is None else replaced(z, reset, h_reset)
