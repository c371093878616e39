"""The reference as one differentiable function: `reference.lstm_forward`, with `lstm_backward` as its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import LSTMSteps, lstm_backward, lstm_forward
from .zoneout import Zoneout, zoneout_of


def lstm(
    x: Tensor,  # (T, B, I)
    h_0: Tensor,  # (B, P)
    c_0: Tensor,  # (B, H)
    w_ih: Tensor,  # (4H, I)
    w_hh: Tensor,  # (4H, P)
    b_ih: Tensor | None = None,  # (4H,)
    b_hh: Tensor | None = None,  # (4H,)
    w_hr: Tensor | None = None,  # (P, H)
    lengths: Tensor | None = None,  # (B,) integer, 0..T
    reverse: bool = False,
    resets: Tensor | None = None,  # (T, B) bool or integer
    h_reset: Tensor | None = None,  # (B, P)
    c_reset: Tensor | None = None,  # (B, H)
    zoneout: Zoneout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm_forward` with `lstm_backward` as its gradient; twice differentiable.

    Returns:
        y (T, B, P), h_n (B, P), c_n (B, H), in x's dtype.
    """
    weights, anew = (w_ih, w_hh, b_ih, b_hh, w_hr), (resets, h_reset, c_reset)
    # Flat, as the transforms of torch.func see into no tuple.
    kept = (0.0, 0.0, None) if zoneout is None else tuple(zoneout)
    y, h_n, c_n, *_ = _ReferenceLSTM.apply(x, h_0, c_0, *weights, lengths, reverse, *anew, *kept)
    return y, h_n, c_n


class _ReferenceLSTM(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        arguments = (*arguments[:-3], zoneout_of(*arguments[-3:]))
        y, h_n, c_n, steps = lstm_forward(*arguments)
        # Autograd marks outputs by identity, so none may be another one (y and steps.h) or an input (h_n with T = 0).
        y, h_n, c_n = y.view_as(y), h_n.view_as(h_n), c_n.view_as(c_n)
        return y, h_n, c_n, steps.i, steps.f, steps.g, steps.o, steps.c, steps.h

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reverse, resets, h_reset, c_reset, ctx.zoneout_h, ctx.zoneout_c, seed = inputs
        steps = output[3:]
        ctx.mark_non_differentiable(*steps)
        ctx.save_for_backward(*tensors, resets, h_reset, c_reset, seed, *steps)

    @staticmethod
    def backward(ctx, d_y, d_h_n, d_c_n, *_):
        x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, resets, h_reset, c_reset, seed, *rest = ctx.saved_tensors
        steps = LSTMSteps(*rest)
        inputs = (x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr)
        zoneout = zoneout_of(ctx.zoneout_h, ctx.zoneout_c, seed)
        options = (lengths, ctx.reverse, resets, h_reset, c_reset, zoneout)
        if torch.is_grad_enabled():
            # Second derivatives were asked for: the saved steps are constants to autograd, so compute them again from
            # the inputs, which are not.
            steps = lstm_forward(*inputs, *options)[3]
        d = lstm_backward(d_y, d_h_n, d_c_n, *inputs, steps, *options)
        weights = (d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr)
        return d.x, d.h_0, d.c_0, *weights, None, None, None, d.h_reset, d.c_reset, None, None, None
