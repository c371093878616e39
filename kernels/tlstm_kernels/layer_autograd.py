"""One LSTM layer with its gradients as PyTorch knows them: an autograd function, and an operator beside it.

Two ways lead to the same forward and backward functions:

    eager       a plain autograd function, which pays nothing for the dispatch of an operator
    compiled    an opaque operator with its shapes and its gradient, so that torch.compile sees one node:
                `torch.ops.tlstm.lstm_layer`

The functions are those of `launch` (the Triton kernels) or of `layer_reference` (the equations). Gradients of gradients
always go through the equations.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import layer_reference
from .launch_options import applied, current_options
from .layer_reference import or_zeros
from .layouts import is_batch_first, new_sequence
from .namespace import NAMESPACE
from .zoneout import zoneout_of

_MODULES = {"triton": "launch", "reference": "layer_reference"}
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


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


def run_eagerly(
    x: Tensor, h_0: Tensor, c_0: Tensor, lengths: Tensor | None, backend: str, keep: str, *rest: Any
) -> Any:
    """`LayerFunction` as cheaply as the moment allows: a call of a few hundred microseconds is not to wait for Python.

    Without gradients there is nothing for autograd to know. And `Function.apply` looks up the signature of `forward`
    at every call, 40 us, for defaults that it has not; only the transforms of torch.func need what else it does.
    """
    if torch._C._are_functorch_transforms_active():
        return LayerFunction.apply(x, h_0, c_0, lengths, backend, keep, *rest)
    if keep == "nothing" and torch.autograd.forward_ad._current_level < 0:
        return LayerFunction.forward(x, h_0, c_0, lengths, backend, keep, *rest)
    return super(torch.autograd.Function, LayerFunction).apply(x, h_0, c_0, lengths, backend, keep, *rest)


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
    batch_first = backend == "triton" and is_batch_first(x)
    gates, cells = x.new_empty(0, dtype=gates_dtype), x.new_empty(0, dtype=cells_dtype)
    if keep == "gates":
        gates = new_sequence(x, (T, B, D, 4 * H), batch_first, gates_dtype)
    if keep != "nothing":
        cells = new_sequence(x, (T, B, D, H), batch_first, cells_dtype)
    y = new_sequence(x, (T, B, D * P), batch_first)
    return y, x.new_empty(D, B, P), x.new_empty(D, B, H), gates, cells


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
        inputs = (x, h_0, c_0, weights, lengths, *anew, d_cells)
        gradients = layer_reference.differentiable_backward(*outer, *inputs, zoneout=zoneout_of(*kept))
    elif torch.compiler.is_compiling() or type(x) not in PLAIN_TENSORS:
        gradients = lstm_layer_backward_op(*arguments, ctx.backend, need_x, need_weights, *anew, d_cells, *kept)
    else:
        with applied(ctx.launch_options):
            options = (need_x, need_weights, *anew, d_cells, zoneout_of(*kept))
            gradients = _implementation(ctx.backend).backward(*arguments, *options)
    d_x, d_h_0, d_c_0, *rest = gradients
    states = 0 if h_reset is None else 2
    d_reset_state = rest[:states] if states else (None, None)
    return (d_x if need_x else None, d_h_0, d_c_0, *d_reset_state), rest[states:] if need_weights else []
