"""A layer of one or two directions through the Triton kernels: allocate, fill, launch, and the products around them.

The counterpart of `layer_reference`: the same arguments and results, for tensors on a GPU. Nothing here waits for the
GPU or looks at a value, all work goes to the current stream, and every allocation depends on shapes only, so that a
call can be captured in a CUDA graph. What no kernel covers is computed step by step by `layer_reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import layer_reference
from .kernel_calls import backward_kernel, forward_kernel
from .launch_plan import LaunchPlan
from .layer_weights import DirectionWeights, split_weights
from .layouts import is_batch_first, joined, laid_out, new_sequence, rows_of, sequence_of
from .plan_at_hand import with_plan
from .positions import replaced, reset_positions, valid_positions, zero_padding
from .zoneout import Zoneout


def kept_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes in which a layer of `dtype` keeps its gates and its cell states for the backward pass."""
    return dtype, torch.float64 if dtype == torch.float64 else torch.float32


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
    """Returns y (T, B, D*P), h_n, c_n, gates (T, B, D, 4H) and cells (T, B, D, H); empty where not kept.

    The sequences lie in memory as x does (`layouts`).
    """
    split, batch_first = split_weights(weights, h_0.shape[0]), is_batch_first(x)

    def run(plan: LaunchPlan) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if plan.regime == "per_step":
            results = layer_reference.forward(x, h_0, c_0, weights, lengths, keep, resets, h_reset, c_reset, zoneout)
            y, h_n, c_n, *kept = results
            gates, cells = (part.to(dtype) for part, dtype in zip(kept, kept_dtypes(x.dtype), strict=True))
            y, gates, cells = (laid_out(s, batch_first) if s.dim() > 1 else s for s in (y, gates, cells))
            return y, h_n, c_n, gates, cells
        ends, mask = _clamped(lengths, x.shape[0]), _mask(resets)
        apart = [
            forward_kernel(
                plan,
                [_input_projection(x, split[k : k + 1]) for k in range(ks.start, ks.stop)],
                [w.w_hh.contiguous() for w in split[ks]],
                h_0[ks].contiguous(),
                c_0[ks].contiguous(),
                ends,
                keep,
                reverse=ks.start == 1,
                resets=mask,
                h_reset=None if h_reset is None else h_reset[ks].contiguous(),
                c_reset=None if c_reset is None else c_reset[ks].contiguous(),
                zoneout=zoneout,
            )
            for ks in _direction_sets(plan)
        ]
        if len(apart) == 1:
            return apart[0]
        # Directions are the last dimension of y, the first of the states and the third of what is kept.
        ys, h_ns, c_ns, *kept_apart = zip(*apart, strict=True)
        kept = [parts[0] if parts[0].dim() == 1 else joined(parts, 2, batch_first) for parts in kept_apart]
        return joined(ys, 2, batch_first), torch.cat(h_ns), torch.cat(c_ns), kept[0], kept[1]

    with torch.no_grad(), torch.cuda.device_of(x):
        return with_plan("forward", x, c_0, split[0], run)


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
    split, batch_first = split_weights(weights, h_0.shape[0]), is_batch_first(cells)

    def run(plan: LaunchPlan) -> list[Tensor]:
        if plan.regime == "per_step":
            inputs = (x, h_0, c_0, weights, y, gates, cells, lengths)
            options = (need_x, need_weights, resets, h_reset, c_reset, d_cells, zoneout)
            return layer_reference.backward(d_y, d_h_n, d_c_n, *inputs, *options)
        ends, mask, H = _clamped(lengths, x.shape[0]), _mask(resets), c_0.shape[-1]
        h_before = []
        if need_weights or not gates.numel():
            h_before = [_h_before(h_0, y, ends, k, resets, h_reset, batch_first) for k in range(len(split))]
        pre_activations = partial(_pre_activations, laid_out(x, batch_first), h_before, split)
        apart = [
            backward_kernel(
                plan,
                None if d_y is None else laid_out(d_y[..., ks.start * H : ks.stop * H], batch_first),
                None if d_h_n is None else d_h_n[ks].contiguous(),
                None if d_c_n is None else d_c_n[ks].contiguous(),
                None if d_cells is None else laid_out(d_cells[:, :, ks], batch_first),
                [w.w_hh.contiguous() for w in split[ks]],
                laid_out(gates[:, :, ks], batch_first) if gates.numel() else pre_activations(ks),
                laid_out(cells[:, :, ks], batch_first),
                c_0[ks].contiguous(),
                ends,
                pre_activation=not gates.numel(),
                reverse=ks.start == 1,
                resets=mask,
                c_reset=None if c_reset is None else c_reset[ks].contiguous(),
                zoneout=zoneout,
            )
            for ks in _direction_sets(plan)
        ]
        d_gates, *d_states = apart[0]
        if len(apart) > 1:
            d_gates_apart, *states_apart = zip(*apart, strict=True)
            d_gates, d_states = joined(d_gates_apart, 2, batch_first), [torch.cat(parts) for parts in states_apart]
        d_x = _input_gradient(d_gates, split) if need_x else x.new_empty(0)
        d_weights = _weight_gradients(d_gates, x, h_before, split, ends) if need_weights else []
        return [d_x, *d_states, *d_weights]

    with torch.no_grad(), torch.cuda.device_of(x):
        return with_plan("backward", x, c_0, split[0], run)


def _direction_sets(plan: LaunchPlan) -> list[slice]:
    """The directions of each launch."""
    return [slice(ks.start, ks.stop) for ks in plan.direction_slices()]


def _input_projection(x: Tensor, split: Sequence[DirectionWeights]) -> Tensor:
    """(T, B, n*4H): x W_ih^T + b_ih + b_hh of n directions, one product."""
    bias = None
    if split[0].b_ih is not None:
        bias = _joined([w.b_ih for w in split]) + _joined([w.b_hh for w in split])
    batch_first = is_batch_first(x)
    rows = torch.nn.functional.linear(rows_of(x, batch_first), _joined([w.w_ih for w in split]), bias)
    return sequence_of(rows, x.shape[0], batch_first)


def _pre_activations(
    x: Tensor,  # (T, B, I)
    h_before: Sequence[Tensor],  # (T, B, H) of each direction
    split: Sequence[DirectionWeights],
    directions: slice,
) -> Tensor:
    """(T, B, n, 4H): all gates of all steps before their activation, which need no recurrence once y is known."""
    own = split[directions]
    gates, batch_first = _input_projection(x, own), is_batch_first(x)
    all_rows = rows_of(gates, batch_first)
    width = gates.shape[-1] // len(own)
    for n, k in enumerate(range(directions.start, directions.stop)):
        rows, w_hh = all_rows[:, n * width : (n + 1) * width], own[n].w_hh
        h = rows_of(h_before[k], batch_first)
        if own[n].heads == 1:
            rows.addmm_(h, w_hh.T)
        else:
            by_head, h = _by_head(w_hh), h.view(len(h), own[n].heads, -1)
            rows.add_(torch.einsum("rnk,qnuk->rqnu", h, by_head).flatten(1))
    return sequence_of(all_rows.unflatten(1, (len(own), width)), x.shape[0], batch_first)


def _input_gradient(
    d_gates: Tensor,  # (T, B, D*4H)
    split: Sequence[DirectionWeights],
) -> Tensor:
    """(T, B, I): the sum over the directions."""
    batch_first = is_batch_first(d_gates)
    first, *second = rows_of(d_gates, batch_first).chunk(len(split), dim=1)
    d_x = first @ split[0].w_ih
    for d in second:
        d_x.addmm_(d, split[1].w_ih)
    return sequence_of(d_x, d_gates.shape[0], batch_first)


def _weight_gradients(
    d_gates: Tensor,  # (T, B, D*4H)
    x: Tensor,  # (T, B, I)
    h_before: Sequence[Tensor],  # (T, B, H) of each direction
    split: Sequence[DirectionWeights],
    lengths: Tensor | None,
) -> list[Tensor]:
    batch_first = is_batch_first(d_gates)
    if lengths is not None:
        # d_gates is zero past a row's length, but zero times what x may hold there need not be.
        x = zero_padding(x, valid_positions(lengths, x.shape[0]))
    gradients: list[Tensor] = []
    x_rows = rows_of(x, batch_first)
    for k, own in enumerate(rows_of(d_gates, batch_first).chunk(len(split), dim=1)):
        h_rows = rows_of(h_before[k], batch_first)
        gradients += [own.T @ x_rows, _recurrent_gradient(own, h_rows, split[k].heads)]
        if split[k].b_ih is not None:
            gradients += [own.sum(0)] * 2
    return gradients


def _recurrent_gradient(
    d_gates: Tensor,  # (T * B, 4H)
    h_before: Tensor,  # (T * B, H)
    N: int,
) -> Tensor:
    """(4H, H / N): the gradient of W_hh."""
    if N == 1:
        return d_gates.T @ h_before
    d_by_head, h = d_gates.unflatten(1, (4, N, -1)), h_before.view(len(h_before), N, -1)
    return torch.einsum("rqnu,rnk->qnuk", d_by_head, h).flatten(0, 2)


def _by_head(w_hh: Tensor) -> Tensor:
    """W_hh (4H, H / N) as (4, N, H / N, H / N): gate, head, unit, what it multiplies."""
    width = w_hh.shape[1]
    return w_hh.reshape(4, -1, width, width)


def _h_before(
    h_0: Tensor,  # (D, B, H)
    y: Tensor,  # (T, B, D*H)
    lengths: Tensor | None,  # (B,)
    direction: int,
    resets: Tensor | None,  # (T, B)
    h_reset: Tensor | None,  # (D, B, H)
    batch_first: bool,
) -> Tensor:
    """(T, B, H): the h that each step of one direction started from."""
    H, first = h_0.shape[-1], h_0[direction]
    h = y[..., direction * H : (direction + 1) * H]
    before = new_sequence(h, h.shape, batch_first)
    if direction == 0:
        before[0], before[1:] = first, h[:-1]
    else:
        before[-1], before[:-1] = first, h[1:]
    if direction == 1 and lengths is not None:
        # Read from its end, a row starts at its own last step. (A row without steps has no gradient to spoil.)
        before[(lengths - 1).clamp(min=0), torch.arange(h.shape[1], device=h.device)] = first
    reset = reset_positions(resets, valid_positions(lengths, h.shape[0]), direction == 1)
    if reset is None:
        return before
    return laid_out(replaced(before, reset, None if h_reset is None else h_reset[direction]), batch_first)


def _joined(tensors: Sequence[Tensor | None]) -> Tensor:
    present = [tensor for tensor in tensors if tensor is not None]
    return present[0] if len(present) == 1 else torch.cat(present)


def _mask(resets: Tensor | None) -> Tensor | None:
    """As the kernels read it: int8, whatever the dtype given."""
    return None if resets is None else resets.bool().contiguous().view(torch.int8)


def _clamped(lengths: Tensor | None, T: int) -> Tensor | None:
    return None if lengths is None else lengths.clamp(0, T).contiguous()
