"""The LSTM equations in plain torch: forward and hand-written backward (`reference_function` makes them one function).

This is what every kernel is compared with, and the layer's `reference` backend. One layer, one direction. Dims: B
batch, T time, I input, H hidden units, P width of h (the projection's size, or H). Gates are stacked in `torch.nn.LSTM`
order i, f, g, o:

    [i f g o]_t = act( x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh )      act: sigmoid, sigmoid, tanh, sigmoid
    c_t = f_t * c_{t-1} + i_t * g_t
    m_t = o_t * tanh(c_t)
    h_t = m_t, or m_t W_hr^T with a recurrent projection

(Hochreiter & Schmidhuber 1997; forget gate Gers et al. 2000; projection Sak et al. 2014; `zoneout` has the equations of
states that keep part of what they were.) float32 and float64 are computed in their own dtype. In float16 and bfloat16
the gates, the cell state and every sum are float32 and only h, which the next step and the next layer read, is rounded
to the storage dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .positions import replaced, reset_positions, state_before, valid_positions, zero_padding
from .zoneout import Zoneout, at_step, kept_units, split_gradient, zoned_out


@dataclass(frozen=True, eq=False)
class LSTMSteps:
    """Everything a layer computed, step by step, in the computation dtype (float32 for half types).

    At positions past a sequence's length `h` and `c` hold the frozen state, and the gates are those of a zero input,
    computed but not used. Positions are those of the input, also where the sequence is read in reverse.
    """

    i: Tensor  # (T, B, H) input gate, after the sigmoid
    f: Tensor  # (T, B, H) forget gate, after the sigmoid
    g: Tensor  # (T, B, H) candidate, after the tanh
    o: Tensor  # (T, B, H) output gate, after the sigmoid
    c: Tensor  # (T, B, H) cell state after the step
    h: Tensor  # (T, B, P) hidden state after the step


@dataclass(frozen=True, eq=False)
class LSTMGradients:
    """Gradients of one layer's inputs and weights; None for what the layer does not have."""

    x: Tensor  # (T, B, I)
    h_0: Tensor  # (B, P)
    c_0: Tensor  # (B, H)
    w_ih: Tensor  # (4H, I)
    w_hh: Tensor  # (4H, P)
    b_ih: Tensor | None  # (4H,)
    b_hh: Tensor | None  # (4H,)
    w_hr: Tensor | None  # (P, H)
    h_reset: Tensor | None  # (B, P)
    c_reset: Tensor | None  # (B, H)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of gates, cell state and sums for a layer stored in `dtype`: float32 for half types, else itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def lstm_forward(
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
) -> tuple[Tensor, Tensor, Tensor, LSTMSteps]:
    """Run one layer in one direction; differentiable by autograd, op by op.

    `lengths` freezes each row's state past its length and makes the output zero there; what `x` holds there is never
    read. With `reverse` a row is read from its last valid position to its first. T = 0 returns the initial state.

    Where `resets[t, b]` is not zero, row b's state is replaced by `h_reset` and `c_reset` (both or none of them; zero
    if None) between the steps t - 1 and t: before step t, or in reverse before step t - 1; not past a row's length.

    Returns:
        y (T, B, P), h_n (B, P), c_n (B, H), all in x's dtype, and the `LSTMSteps`.
    """
    T, B, _ = x.shape
    H = w_hh.shape[0] // 4
    dtype = compute_dtype(x.dtype)
    valid = valid_positions(lengths, T)
    reset = reset_positions(resets, valid, reverse)
    x_proj = zero_padding(x, valid).to(dtype) @ w_ih.to(dtype).T  # (T, B, 4H)
    if b_ih is not None:
        x_proj = x_proj + b_ih.to(dtype)
    if b_hh is not None:
        x_proj = x_proj + b_hh.to(dtype)
    w_hh_t = w_hh.to(dtype).T
    kept = None if zoneout is None else kept_units(zoneout, (T, B, H), h_0.shape[-1], reverse)

    h, c = h_0.to(dtype), c_0.to(dtype)
    gates_of: list[Tensor] = [x_proj] * T
    c_of: list[Tensor] = [c] * T
    h_of: list[Tensor] = [h] * T
    for t in _order(T, reverse):
        if reset is not None:
            h, c = replaced(h, reset[t], h_reset), replaced(c, reset[t], c_reset)
        i, f, g, o = (x_proj[t] + h @ w_hh_t).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_t = f * c + i * g
        h_t = o * c_t.tanh()
        if w_hr is not None:
            h_t = h_t @ w_hr.to(dtype).T
        if kept is not None:
            h_t, c_t = zoned_out(at_step(kept[0], t), h, h_t), zoned_out(at_step(kept[1], t), c, c_t)
        h_t = h_t.to(x.dtype).to(dtype)
        if valid is not None:
            c_t, h_t = torch.where(valid[t], c_t, c), torch.where(valid[t], h_t, h)
        h, c = h_t, c_t
        gates_of[t], c_of[t], h_of[t] = torch.cat((i, f, g, o), dim=-1), c, h

    gates = torch.stack(gates_of) if T else x_proj.new_zeros(0, B, 4 * H)
    cells = torch.stack(c_of) if T else c.new_zeros(0, B, H)
    hidden = torch.stack(h_of) if T else h.new_zeros(0, B, h_0.shape[-1])
    i_all, f_all, g_all, o_all = gates.chunk(4, dim=-1)
    steps = LSTMSteps(i_all, f_all, g_all, o_all, cells, hidden)
    y = zero_padding(hidden, valid).to(x.dtype)
    return y, h.to(x.dtype), c.to(x.dtype), steps


def lstm_backward(
    d_y: Tensor,  # (T, B, P)
    d_h_n: Tensor,  # (B, P)
    d_c_n: Tensor,  # (B, H)
    x: Tensor,  # (T, B, I)
    h_0: Tensor,  # (B, P)
    c_0: Tensor,  # (B, H)
    w_ih: Tensor,  # (4H, I)
    w_hh: Tensor,  # (4H, P)
    b_ih: Tensor | None,  # (4H,)
    b_hh: Tensor | None,  # (4H,)
    w_hr: Tensor | None,  # (P, H)
    steps: LSTMSteps,
    lengths: Tensor | None = None,  # (B,) integer, 0..T
    reverse: bool = False,
    resets: Tensor | None = None,  # (T, B) bool or integer
    h_reset: Tensor | None = None,  # (B, P)
    c_reset: Tensor | None = None,  # (B, H)
    zoneout: Zoneout | None = None,
    d_cells: Tensor | None = None,  # (T, B, H)
) -> LSTMGradients:
    """The gradients of `lstm_forward`, equation by equation; arguments as there, `steps` as it returned them.

    `d_cells` is the gradient of the cell states `steps.c`, where they are an output too; past a row's length it is not
    read.
    Each gradient comes back in the dtype of the tensor that it belongs to.
    """
    T = x.shape[0]
    dtype = compute_dtype(x.dtype)
    valid = valid_positions(lengths, T)
    reset = reset_positions(resets, valid, reverse)
    h_prev_all = state_before(h_0, steps.h, reverse)  # (T, B, P)
    c_prev_all = state_before(c_0, steps.c, reverse)  # (T, B, H)
    if reset is not None:
        h_prev_all, c_prev_all = replaced(h_prev_all, reset, h_reset), replaced(c_prev_all, reset, c_reset)
    w_hh_, w_hr_ = w_hh.to(dtype), None if w_hr is None else w_hr.to(dtype)
    kept, cells = None, steps.c
    if zoneout is not None:
        kept = kept_units(zoneout, (T, *c_0.shape), h_0.shape[-1], reverse)
        cells = steps.f * c_prev_all + steps.i * steps.g  # c~: what h was computed from

    d_h, d_c = d_h_n.to(dtype), d_c_n.to(dtype)
    d_h_reset, d_c_reset = torch.zeros_like(d_h), torch.zeros_like(d_c)
    d_gates_of: list[Tensor] = [d_c] * T
    d_h_of: list[Tensor] = [d_h] * T
    for t in _order(T, not reverse):
        i, f, g, o, c_prev = steps.i[t], steps.f[t], steps.g[t], steps.o[t], c_prev_all[t]
        tanh_c = cells[t].tanh()
        # A frozen step hands its incoming gradient on and takes none for itself.
        d_h_frozen = d_c_frozen = None
        if valid is not None:
            d_h_frozen, d_c_frozen = d_h.masked_fill(valid[t], 0), d_c.masked_fill(valid[t], 0)
            d_h, d_c = d_h.masked_fill(~valid[t], 0), d_c.masked_fill(~valid[t], 0)
            d_h = d_h + d_y[t].to(dtype).masked_fill(~valid[t], 0)
        else:
            d_h = d_h + d_y[t].to(dtype)
        if d_cells is not None:
            own = d_cells[t].to(dtype)
            d_c = d_c + (own if valid is None else own.masked_fill(~valid[t], 0))
        d_h_kept = d_c_kept = None
        if kept is not None:
            d_h_kept, d_h = split_gradient(at_step(kept[0], t), d_h)
            d_c_kept, d_c = split_gradient(at_step(kept[1], t), d_c)

        d_m = d_h if w_hr_ is None else d_h @ w_hr_
        d_c = d_c + d_m * o * (1 - tanh_c * tanh_c)
        d_o = d_m * tanh_c * o * (1 - o)
        d_i = d_c * g * i * (1 - i)
        d_f = d_c * c_prev * f * (1 - f)
        d_g = d_c * i * (1 - g * g)
        d_gates_of[t], d_h_of[t] = torch.cat((d_i, d_f, d_g, d_o), dim=-1), d_h
        d_c = d_c * f
        d_h = d_gates_of[t] @ w_hh_
        if d_h_kept is not None and d_c_kept is not None:
            d_h, d_c = d_h + d_h_kept, d_c + d_c_kept
        if d_h_frozen is not None and d_c_frozen is not None:
            d_h, d_c = d_h + d_h_frozen, d_c + d_c_frozen
        if reset is not None:
            # Before this step stood another state: it takes the gradient, the step before takes none.
            d_h_reset = d_h_reset + d_h.masked_fill(~reset[t], 0)
            d_c_reset = d_c_reset + d_c.masked_fill(~reset[t], 0)
            d_h, d_c = d_h.masked_fill(reset[t], 0), d_c.masked_fill(reset[t], 0)

    # Everything below does not depend on the previous step: one product over all T * B rows each.
    d_gates = torch.stack(d_gates_of) if T else steps.c.new_zeros(0, x.shape[1], w_hh.shape[0])
    rows = d_gates.flatten(0, 1)
    d_b = rows.sum(dim=0)
    d_w_hr = None
    if w_hr is not None:
        d_h_all = torch.stack(d_h_of) if T else steps.h
        d_w_hr = (d_h_all.flatten(0, 1).T @ (steps.o * cells.tanh()).flatten(0, 1)).to(w_hr.dtype)
    return LSTMGradients(
        x=(d_gates @ w_ih.to(dtype)).to(x.dtype),
        h_0=d_h.to(h_0.dtype),
        c_0=d_c.to(c_0.dtype),
        w_ih=(rows.T @ zero_padding(x, valid).to(dtype).flatten(0, 1)).to(w_ih.dtype),
        w_hh=(rows.T @ h_prev_all.flatten(0, 1)).to(w_hh.dtype),
        b_ih=None if b_ih is None else d_b.to(b_ih.dtype),
        b_hh=None if b_hh is None else d_b.to(b_hh.dtype),
        w_hr=d_w_hr,
        h_reset=None if h_reset is None else d_h_reset.to(h_reset.dtype),
        c_reset=None if c_reset is None else d_c_reset.to(c_reset.dtype),
    )


def _order(T: int, reverse: bool) -> range:
    return range(T - 1, -1, -1) if reverse else range(T)
