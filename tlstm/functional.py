"""The LSTM as a function of its weights, with several backends behind one name.

    native      torch's own implementation: oneDNN or ATen on a CPU, cuDNN on an NVIDIA GPU
    reference   the equations of `tlstm_kernels.reference`: slow, exact, any dtype up to float64
    triton      the project's own kernels
    auto        native, until the kernels have been proved on a GPU (`TRITON_BY_DEFAULT`)

Every backend takes the same arguments and gives the same results; `explain_backends()` says which can run here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from tlstm_kernels.checks import check_choice, check_reset_state, check_resets
from tlstm_kernels.layer_op import lstm_layer
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tlstm.functional_native import run_native, run_native_packed
from tlstm.functional_options import BackendUnavailableError, Call, LSTMOptions, State, Weights

BACKENDS = ("auto", "triton", "native", "reference")
# Whether `auto` means the kernels on a GPU that can run them. They pass every test that needs no GPU, but have met none
# yet: to be switched on with the first recorded run of benchmarks/gpu_check.sh. Until then ask for them by name.
TRITON_BY_DEFAULT = False
# A backend is one of these: (x, hx, weights, options, call) -> y, (h_n, c_n).
_Runner = Callable[[Tensor, State, Weights, LSTMOptions, Call], tuple[Tensor, State]]


def lstm(
    x: Tensor,  # (T, B, I)
    hx: State,  # h_0 (L*D, B, P), c_0 (L*D, B, H); P = proj_size or H, D directions
    weights: Weights,  # flat, torch's order: for each layer and direction W_ih, W_hh[, b_ih, b_hh][, W_hr]
    options: LSTMOptions,
    lengths: Tensor | None = None,  # (B,) integer, 0..T
    backend: str = "auto",
    resets: Tensor | None = None,  # (T, B) bool or integer
    reset_state: State | None = None,  # h (L*D, B, P), c (L*D, B, H)
) -> tuple[Tensor, State]:
    """Run a stacked LSTM over a padded batch, time first.

    With `lengths`, each row's state is frozen after its length, so that h_n and c_n are those of its last token, and
    the output past it is zero. A length of 0 (and T = 0, for the whole batch) passes the row's state through unchanged.

    Where `resets[t, b]` is not zero, an episode of row b begins at step t: nothing passes the boundary between t - 1
    and t, in no layer and no direction, and no gradient does. What a direction brings to it is replaced by
    `reset_state`, or zero: read forwards before step t, in reverse before step t - 1. (A reset at step 0 replaces hx
    for the first, and does nothing to the second, which ends there.) In the padding a reset does nothing. The native
    backend looks at the values, which waits for a GPU, and runs the pieces between resets as rows of one packed batch.

    Returns:
        y (T, B, D*P), (h_n (L*D, B, P), c_n (L*D, B, H)).

    Raises:
        ValueError: unknown backend; resets of another shape or dtype; a reset_state without resets.
        BackendUnavailableError: the backend cannot run on x's device; the message says why.
    """
    if resets is not None:
        check_resets(resets, tuple(x.shape[:2]), "(time, batch)")
    check_reset_state(reset_state, resets, tuple(hx[0].shape), tuple(hx[1].shape), weights[0])
    run = _RUNNERS[_pick(backend, x, options)]
    if x.size(0) == 0:
        # torch refuses an empty sequence; nothing to read leaves the state as it is.
        width = hx[0].shape[-1] * options.num_directions
        return x.new_zeros(0, x.shape[1], width), hx
    return run(x, hx, weights, options, Call(lengths, resets, reset_state))


def lstm_packed(
    data: Tensor,  # (N, I) tokens of a PackedSequence
    batch_sizes: Tensor,  # (T,) int64 on the CPU, non-increasing
    hx: State,  # h_0 (L*D, B, P), c_0 (L*D, B, H), rows in the packed (sorted) order
    weights: Weights,  # flat, as in `lstm`
    options: LSTMOptions,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """`lstm` over the data of a PackedSequence whose rows are sorted by length, longest first.

    Returns:
        data of the output (N, D*P), (h_n (L*D, B, P), c_n (L*D, B, H)), rows in the packed order.
    """
    name = _pick(backend, data, options)
    if name == "native":
        return run_native_packed(data, batch_sizes, hx, weights, options)
    return _padded_and_packed(_RUNNERS[name], data, batch_sizes, hx, weights, options)


@torch.compiler.disable  # the number of its operations depends on the lengths
def _padded_and_packed(
    run: _Runner, data: Tensor, batch_sizes: Tensor, hx: State, weights: Weights, options: LSTMOptions
) -> tuple[Tensor, State]:
    # The lengths come from batch_sizes, which is on the CPU: nothing here waits for a GPU.
    padded, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
    y, state = run(padded, hx, weights, options, Call(lengths))
    return pack_padded_sequence(y, lengths).data, state


def resolve_backend(name: str, device: torch.device | str) -> str:
    """The backend that `name` stands for on `device`: itself, or for `auto` the fastest one that is known to be right.

    Raises:
        ValueError: unknown name.
        BackendUnavailableError: the named backend cannot run there; the message says why.
    """
    if name == "auto":
        return "triton" if TRITON_BY_DEFAULT and why_unavailable("triton", device) is None else "native"
    check_choice("backend", name, BACKENDS)
    reason = why_unavailable(name, device)
    if reason is not None:
        raise BackendUnavailableError(
            f"backend {name!r} cannot run: {reason}. Use backend='auto', which picks "
            f"{resolve_backend('auto', device)!r} here."
        )
    return name


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


def _pick(backend: str, x: Tensor, options: LSTMOptions) -> str:
    """`resolve_backend`, where `auto` also leaves to torch what the kernels would only run step by step."""
    name = resolve_backend(backend, x.device)
    if backend == "auto" and name == "triton" and (x.dtype == torch.float64 or options.proj_size > 0):
        return "native"
    return name


def _run_reference(x: Tensor, hx: State, weights: Weights, options: LSTMOptions, call: Call) -> tuple[Tensor, State]:
    return _run_layers(x, hx, weights, options, call, "reference")


def _run_triton(x: Tensor, hx: State, weights: Weights, options: LSTMOptions, call: Call) -> tuple[Tensor, State]:
    return _run_layers(x, hx, weights, options, call, "triton")


def _run_layers(
    x: Tensor,  # (T, B, I)
    hx: State,
    weights: Weights,
    options: LSTMOptions,
    call: Call,
    backend: str,
) -> tuple[Tensor, State]:
    """One `lstm_layer` after another: opaque to torch.compile, cast by autocast as torch's own LSTM is."""
    lengths, resets = (None if t is None else t.to(x.device, non_blocking=True) for t in (call.lengths, call.resets))
    D, n = options.num_directions, options.weights_per_direction * options.num_directions
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for layer in range(options.num_layers):
        if layer > 0 and options.dropout > 0:
            x = torch.nn.functional.dropout(x, options.dropout, options.training)
        states = slice(layer * D, (layer + 1) * D)
        x, h, c = lstm_layer(
            x,
            hx[0][states],
            hx[1][states],
            weights[layer * n : (layer + 1) * n],
            lengths,
            resets,
            *((None, None) if call.reset_state is None else (state[states] for state in call.reset_state)),
            backend=backend,
        )
        h_n.append(h)
        c_n.append(c)
    if len(h_n) == 1:
        return x, (h_n[0], c_n[0])
    return x, (torch.cat(h_n), torch.cat(c_n))


_RUNNERS: dict[str, _Runner] = {"native": run_native, "reference": _run_reference, "triton": _run_triton}
