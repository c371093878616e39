"""`lstm`: the one function, the arguments checked, the backend chosen. The package's text tells the backends."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from tlstm_kernels.checks import check_choice, check_reset_state, check_resets
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tlstm.functional.dropout import seed_tensor
from tlstm.functional.layers import Runner, run_kernels, run_reference
from tlstm.functional.native import run_native
from tlstm.functional.options import BackendUnavailableError, Call, LSTMOptions, Result, State, Weights, zero_state
from tlstm.trials import has_passed, trial_refusal

BACKENDS = ("auto", "triton", "native", "reference")
_RUNNERS: dict[str, Runner] = {"native": run_native, "reference": run_reference, "triton": run_kernels}

Seed = int | Tensor | torch.Generator


def lstm(
    x: Tensor,  # (T, B, I)
    hx: State | None,  # h_0 (L*D, B, P), c_0 (L*D, B, H), zero if None; P = proj_size or H, D directions
    weights: Weights,  # flat, torch's order: for each layer and direction W_ih, W_hh[, b_ih, b_hh][, W_hr]
    options: LSTMOptions,
    lengths: Tensor | None = None,  # (B,) integer, 0..T
    backend: str = "auto",
    resets: Tensor | None = None,  # (T, B) bool or integer
    reset_state: State | None = None,  # h (L*D, B, P), c (L*D, B, H)
    dropout_seed: Seed | None = None,
    return_cell_states: bool = False,
) -> Any:
    """Run a stacked LSTM over a padded batch, time first.

    With `lengths`, each row's state is frozen after its length, so that h_n and c_n are those of its last token, and
    the output past it is zero. A length of 0 (and T = 0, for the whole batch) passes the row's state through unchanged.

    Where `resets[t, b]` is not zero, an episode of row b begins at step t: nothing passes the boundary between t - 1
    and t, in no layer and no direction, and no gradient does. What a direction brings to it is replaced by
    `reset_state`, or zero: read forwards before step t, in reverse before step t - 1. (A reset at step 0 replaces hx
    for the first, and does nothing to the second, which ends there.) In the padding a reset does nothing. The native
    backend looks at the values, which waits for a GPU, and runs the pieces between resets as rows of one packed batch.

    `dropout_seed` (a number below 2**64, an integer tensor of one element, or a generator that draws one) makes the
    masks between layers, and those of `options.zoneout` in training, a function of the seed alone:
    `tlstm.functional.dropout`. Without it they come from torch's own generator. Zoneout is not in the native backend
    either: the equations stand in for it, in training and in evaluation.

    `return_cell_states` asks for c after every step, differentiable like the rest. The native backend has none, so that
    the equations (`reference`) stand in for it.

    Returns:
        y (T, B, D*P), (h_n (L*D, B, P), c_n (L*D, B, H)), and with `return_cell_states` a tuple of one (T, B, D*H) for
        each layer, zero past a row's length.

    Raises:
        ValueError: unknown backend; resets of another shape or dtype; a reset_state without resets; no seed.
        BackendUnavailableError: the backend cannot run on x's device; the message says why.
    """
    from_zero = hx is None
    hx = zero_state(x, x.size(1), weights, options) if hx is None else hx
    if resets is not None:
        check_resets(resets, tuple(x.shape[:2]), "(time, batch)")
    if reset_state is not None:
        check_reset_state(reset_state, resets, tuple(hx[0].shape), tuple(hx[1].shape), weights[0])
    beyond_torch = return_cell_states or options.zones_out
    name = _pick(backend, x, x.size(1), weights, options, beyond_torch, resets is not None)
    seed = None if dropout_seed is None else seed_tensor(dropout_seed, x.device)
    if x.size(0) == 0:
        # torch refuses an empty sequence; nothing to read leaves the state as it is.
        D, cells = options.num_directions, x.new_zeros(0, x.shape[1], hx[1].shape[-1] * options.num_directions)
        result = Result(x.new_zeros(0, x.shape[1], hx[0].shape[-1] * D), hx, (cells,) * options.num_layers)
    else:
        call = Call(lengths, resets, reset_state, seed, return_cell_states, from_zero=from_zero)
        result = _RUNNERS[name](x, hx, weights, options, call)
    return tuple(result) if return_cell_states else (result.y, result.state)


def lstm_packed(
    data: Tensor,  # (N, I) tokens of a PackedSequence
    batch_sizes: Tensor,  # (T,) int64 on the CPU, non-increasing
    hx: State | None,  # h_0 (L*D, B, P), c_0 (L*D, B, H), rows in the packed (sorted) order; zero if None
    weights: Weights,  # flat, as in `lstm`
    options: LSTMOptions,
    backend: str = "auto",
    dropout_seed: Seed | None = None,
    rows: Tensor | None = None,  # (B,) sorted_indices of the PackedSequence, by which a seed's masks go
    return_cell_states: bool = False,
) -> Any:
    """`lstm` over the data of a PackedSequence whose rows are sorted by length, longest first.

    Returns:
        data of the output (N, D*P), (h_n (L*D, B, P), c_n (L*D, B, H)), rows in the packed order, and with
        `return_cell_states` a tuple of one (N, D*H) for each layer.
    """
    B, beyond_torch = int(batch_sizes[0]), return_cell_states or options.zones_out
    name = _pick(backend, data, B, weights, options, beyond_torch)
    seed = seed_tensor(dropout_seed, data.device)
    call = Call(None, None, None, seed, return_cell_states, batch_sizes, rows, from_zero=hx is None)
    hx = zero_state(data, B, weights, options) if hx is None else hx
    if name == "native":
        result = run_native(data, hx, weights, options, call)
    else:
        result = _padded_and_packed(_RUNNERS[name], data, hx, weights, options, call)
    return tuple(result) if return_cell_states else (result.y, result.state)


@torch.compiler.disable  # the number of its operations depends on the lengths
def _padded_and_packed(
    run: Runner, data: Tensor, hx: State, weights: Weights, options: LSTMOptions, call: Call
) -> Result:
    # The lengths come from batch_sizes, which is on the CPU: nothing here waits for a GPU.
    assert call.batch_sizes is not None
    padded, lengths = pad_packed_sequence(PackedSequence(data, call.batch_sizes))
    y, state, cells = run(padded, hx, weights, options, call._replace(lengths=lengths, batch_sizes=None))
    data, *packed_cells = (pack_padded_sequence(part, lengths).data for part in (y, *cells))
    return Result(data, state, tuple(packed_cells))


class LayerSize(NamedTuple):
    """What decides whether a layer's recurrent weights stay on a GPU's chip."""

    hidden_size: int
    batch_size: int
    num_directions: int = 1
    gradients: bool = False  # whether there will be a backward pass


def resolve_backend(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.float32, size: LayerSize | None = None
) -> str:
    """The backend that `name` stands for on `device`: itself, or for `auto` the fastest one that is known to be right.

    On a GPU that can run the kernels that is `triton`, once they have passed their trial there (`tlstm.trials`), but
    for a layer of a `size` whose recurrent weights would not stay on the chip.

    Raises:
        ValueError: unknown name.
        BackendUnavailableError: the named backend cannot run there; the message says why.
    """
    if name == "auto":
        return _automatic(torch.device(device), dtype, size)
    check_choice("backend", name, BACKENDS)
    reason = why_unavailable(name, device)
    if reason is not None:
        raise BackendUnavailableError(
            f"backend {name!r} cannot run: {reason}. Use backend='auto', which picks "
            f"{resolve_backend('auto', device)!r} here."
        )
    return name


def _automatic(device: torch.device, dtype: torch.dtype, size: LayerSize | None) -> str:
    kind = str(dtype).removeprefix("torch.")
    if device.type != "cuda" or dtype == torch.float64:  # which the kernels would only run step by step
        return "native"
    # What has passed can run: no call after the first one looks at driver and packages again.
    if not has_passed("layer", device.index, kind) and (
        why_unavailable("triton", device) is not None or trial_refusal("layer", device.index, kind) is not None
    ):
        return "native"
    if size is None:
        return "triton"
    from tlstm_kernels.plan_at_hand import precision_of, stays_on_chip

    index = torch.cuda.current_device() if device.index is None else device.index
    return "triton" if stays_on_chip(*size, kind, precision_of(dtype), index) else "native"


def explain_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """For each backend, None where it can run on `device`, else the reason why not."""
    return {name: why_unavailable(name, device) for name in BACKENDS if name != "auto"}


def available_backends(device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends that can run on `device`, `auto` left out."""
    return [name for name, reason in explain_backends(device).items() if reason is None]


def why_unavailable(name: str, device: torch.device | str | None = None) -> str | None:
    """Why the backend cannot run on `device` (None: on any device at all); None where it can."""
    if name != "triton":
        return None  # plain torch, on every device
    kind, index = (None, None) if device is None else (torch.device(device).type, torch.device(device).index)
    return _why_no_triton(kind, index)


@torch.compiler.assume_constant_result
def _why_no_triton(device_type: str | None, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package `triton` is not installed (pip install triton, Linux only)"
    if device_type is None:
        return None
    if device_type != "cuda":
        return f"its kernels need a GPU and the tensors are on {device_type}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return "on AMD GPUs its kernels have only been compiled: programs on different dies share no coherent L2 cache"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"its kernels need compute capability 8.0 or newer and this GPU has {capability[0]}.{capability[1]}"
    return None


def _pick(
    backend: str, x: Tensor, B: int, weights: Weights, options: LSTMOptions, beyond_torch: bool, resets: bool = False
) -> str:
    """`resolve_backend` for one call.

    What torch's own LSTM does not know (cell states, zoneout) the equations do in its place. `auto` leaves no layer to
    it that has such a thing, or resets or heads; nor a compiled function, which is one for many sizes.
    """
    size = None
    if x.is_cuda and not (beyond_torch or resets or options.num_heads > 1 or torch.compiler.is_compiling()):
        gradients = torch.is_grad_enabled() and (x.requires_grad or weights[1].requires_grad)
        size = LayerSize(weights[1].size(0) // 4, B, options.num_directions, gradients)
    name = resolve_backend(backend, x.device, _dtype_of(x), size)
    return "reference" if beyond_torch and name == "native" else name


def _dtype_of(x: Tensor) -> torch.dtype:
    """What the kernels compute in: autocast casts everything but float64."""
    autocast = x.is_cuda and x.dtype != torch.float64 and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if autocast else x.dtype
