"""The LSTM as a function of its weights, with several backends behind one name.

    native      torch's own implementation: oneDNN or ATen on a CPU, cuDNN on an NVIDIA GPU
    reference   the equations of `tlstm_kernels.reference`: slow, exact, any dtype up to float64
    triton      the project's own kernels
    auto        the fastest of those that can run

Every backend takes the same arguments and gives the same results; `explain_backends()` says which can run here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tlstm_kernels import reference
from tlstm_kernels.checks import check_choice
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

BACKENDS = ("auto", "triton", "native", "reference")

State = tuple[Tensor, Tensor]
Weights = list[Tensor] | tuple[Tensor, ...]


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says why."""


class LSTMOptions(NamedTuple):
    """What `torch.nn.LSTM` is built with, as far as its forward pass needs it."""

    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    proj_size: int = 0

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def weights_per_direction(self) -> int:
        """W_ih, W_hh, then b_ih, b_hh with bias, then W_hr with a projection."""
        return 2 + 2 * self.bias + (self.proj_size > 0)


def lstm(
    x: Tensor,  # (T, B, I)
    hx: State,  # h_0 (L*D, B, P), c_0 (L*D, B, H); P = proj_size or H, D directions
    weights: Weights,  # flat, torch's order: for each layer and direction W_ih, W_hh[, b_ih, b_hh][, W_hr]
    options: LSTMOptions,
    lengths: Tensor | None = None,  # (B,) integer, 0..T
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """Run a stacked LSTM over a padded batch, time first.

    With `lengths`, each row's state is frozen after its length, so that h_n and c_n are those of its last token, and
    the output past it is zero. A length of 0 (and T = 0, for the whole batch) passes the row's state through unchanged.

    Returns:
        y (T, B, D*P), (h_n (L*D, B, P), c_n (L*D, B, H)).

    Raises:
        ValueError: unknown backend.
        BackendUnavailableError: the backend cannot run on x's device; the message says why.
    """
    run = _RUNNERS[resolve_backend(backend, x.device)]
    if x.size(0) == 0:
        # torch refuses an empty sequence; nothing to read leaves the state as it is.
        width = hx[0].shape[-1] * options.num_directions
        return x.new_zeros(0, x.shape[1], width), hx
    return _call(run, x, hx, weights, options, lengths)


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
    name = resolve_backend(backend, data.device)
    if name == "native":
        return _call(_native_packed, data, batch_sizes, hx, weights, options)
    padded, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
    y, state = _call(_RUNNERS[name], padded, hx, weights, options, lengths)
    return pack_padded_sequence(y, lengths).data, state


def resolve_backend(name: str, device: torch.device | str) -> str:
    """The backend that `name` stands for on `device`: itself, or for `auto` the fastest one that can run.

    Raises:
        ValueError: unknown name.
        BackendUnavailableError: the named backend cannot run there; the message says why.
    """
    if name == "auto":
        return "triton" if why_unavailable("triton", device) is None else "native"
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
    if name not in _RUNNERS:
        return "this version of tlstm has no Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "the package `triton` is not installed (pip install triton, Linux only)"
    if device is not None and torch.device(device).type != "cuda":
        return f"its kernels need a GPU and the tensors are on {torch.device(device)}"
    return None


def _call(run: Callable[..., tuple[Tensor, State]], *args: Any) -> tuple[Tensor, State]:
    """Run a backend, under torch.compile outside the compiled graph: inside, each time step would be traced apart."""
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        return _outside_graph(run, *args)
    return run(*args)


@torch.compiler.disable
def _outside_graph(run: Callable[..., tuple[Tensor, State]], *args: Any) -> tuple[Tensor, State]:
    return run(*args)


def _run_native(
    x: Tensor,  # (T, B, I)
    hx: State,
    weights: Weights,
    options: LSTMOptions,
    lengths: Tensor | None,
) -> tuple[Tensor, State]:
    if lengths is None:
        dropout, training, batch_first = options.dropout, options.training, False
        y, h_n, c_n = _VF.lstm(
            x, hx, weights, options.bias, options.num_layers, dropout, training, options.bidirectional, batch_first
        )
        return y, (h_n, c_n)
    if torch.compiler.is_exporting():
        raise BackendUnavailableError(
            "backend 'native' cannot be exported with lengths: it packs the batch by their values. "
            "Export with backend='reference', or without lengths."
        )
    lengths = lengths.cpu()
    if bool((lengths == x.shape[0]).all()):
        return _run_native(x, hx, weights, options, None)
    if bool((lengths == 0).any()):
        return _run_native_with_empty_rows(x, hx, weights, options, lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    hx = _reorder(hx, packed.sorted_indices)
    data, state = _native_packed(packed.data, packed.batch_sizes, hx, weights, options)
    output = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
    y, _ = pad_packed_sequence(output, total_length=x.shape[0])
    return y, _reorder(state, packed.unsorted_indices)


def _run_native_with_empty_rows(
    x: Tensor,  # (T, B, I)
    hx: State,
    weights: Weights,
    options: LSTMOptions,
    lengths: Tensor,  # (B,) on the CPU, at least one of them 0
) -> tuple[Tensor, State]:
    """Packing refuses empty rows, so only the others are run and put back in their places."""
    rows = lengths.nonzero().squeeze(1)
    rows_there = rows.to(x.device)
    y = x.new_zeros(x.shape[0], x.shape[1], hx[0].shape[-1] * options.num_directions)
    if rows.numel() == 0:
        return y, hx
    x_rows, hx_rows = x.index_select(1, rows_there), _reorder(hx, rows_there)
    y_rows, (h_n, c_n) = _run_native(x_rows, hx_rows, weights, options, lengths[rows])
    y = y.to(y_rows.dtype).index_copy(1, rows_there, y_rows)
    return y, (
        hx[0].to(h_n.dtype).index_copy(1, rows_there, h_n),
        hx[1].to(c_n.dtype).index_copy(1, rows_there, c_n),
    )


def _native_packed(
    data: Tensor, batch_sizes: Tensor, hx: State, weights: Weights, options: LSTMOptions
) -> tuple[Tensor, State]:
    y, h_n, c_n = _VF.lstm(
        data,
        batch_sizes,
        hx,
        weights,
        options.bias,
        options.num_layers,
        options.dropout,
        options.training,
        options.bidirectional,
    )
    return y, (h_n, c_n)


def _reorder(state: State, rows: Tensor | None) -> State:
    return state if rows is None else (state[0].index_select(1, rows), state[1].index_select(1, rows))


def _run_reference(
    x: Tensor,  # (T, B, I)
    hx: State,
    weights: Weights,
    options: LSTMOptions,
    lengths: Tensor | None,
) -> tuple[Tensor, State]:
    device = x.device.type
    h_0, c_0 = hx
    if torch.is_autocast_enabled(device):
        # What autocast does to torch's own LSTM: run it in the low precision dtype (float64 stays as it is).
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            hx, weights = (h_0.to(dtype), c_0.to(dtype)), [w.to(dtype) for w in weights]
            return _run_reference(x.to(dtype), hx, weights, options, lengths)
    if lengths is not None:
        lengths = lengths.to(x.device)
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    n = options.weights_per_direction
    for layer in range(options.num_layers):
        if layer > 0 and options.dropout > 0:
            x = torch.nn.functional.dropout(x, options.dropout, options.training)
        outputs = []
        for direction in range(options.num_directions):
            k = layer * options.num_directions + direction
            own = weights[k * n : (k + 1) * n]
            b_ih, b_hh = (own[2], own[3]) if options.bias else (None, None)
            w_hr = own[-1] if options.proj_size > 0 else None
            y, h, c = reference.lstm(x, h_0[k], c_0[k], own[0], own[1], b_ih, b_hh, w_hr, lengths, direction == 1)
            outputs.append(y)
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(outputs, dim=-1) if options.bidirectional else outputs[0]
    return x, (torch.stack(h_n), torch.stack(c_n))


# A backend is one entry here: (x, hx, weights, options, lengths) -> y, (h_n, c_n).
_Runner = Callable[[Tensor, State, Weights, LSTMOptions, Tensor | None], tuple[Tensor, State]]
_RUNNERS: dict[str, _Runner] = {"native": _run_native, "reference": _run_reference}
