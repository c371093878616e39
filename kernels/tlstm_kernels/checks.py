"""What a user may get wrong when calling an LSTM: each error says what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ArgumentError(ValueError, RuntimeError):
    """A wrong argument. Both a ValueError and a RuntimeError: torch.nn.LSTM raises one or the other for these cases."""


def check_choice(what: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a `value` that is not one of `choices`."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ArgumentError(f"{what}: expected one of {listed}; received {value!r}.")


def check_probability(what: str, value: Any) -> None:
    """Refuse what is not a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ArgumentError(f"{what}: expected a number in [0, 1]; received {value!r}.")


def check_heads(
    num_heads: Any,
    hidden_size: int,
    proj_size: int,
) -> None:
    """Refuse a number of recurrent heads that does not divide the units, or heads beside a projection."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1 or hidden_size % num_heads:
        raise ArgumentError(
            f"num_heads: expected a whole number that divides hidden_size = {hidden_size}; received {num_heads!r}."
        )
    if num_heads > 1 and proj_size > 0:
        raise ArgumentError(
            f"num_heads: expected 1 with a projection, which mixes the units of all heads at every step; received "
            f"{num_heads} and proj_size = {proj_size}. Use one of the two."
        )


def check_zoneout_pair(zoneout: Any) -> None:
    """Refuse what is not a pair of probabilities, of h and of c."""
    if not isinstance(zoneout, (tuple, list)) or len(zoneout) != 2:
        raise ArgumentError(f"zoneout: expected a pair of probabilities (p_h, p_c); received {zoneout!r}.")
    for name, p in zip(("zoneout of h", "zoneout of c"), zoneout, strict=True):
        check_probability(name, p)


def check_zoneout(h: Any, c: Any, seed: Any, device: torch.device) -> None:
    """Check the probabilities of zoneout and its seed."""
    check_probability("zoneout_h", h)
    check_probability("zoneout_c", c)
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.shape != () or seed.device != device:
        raise ArgumentError(
            f"zoneout_seed: expected an int64 tensor of shape () on {device}, or None; received "
            f"{f'{seed.dtype} on {seed.device}, ' if isinstance(seed, Tensor) else ''}{_describe(seed)}. "
            "Make one: torch.tensor(seed, device=x.device)."
        )


def check_input(
    x: Any,  # (T, B, I), (T, I), or (N, I) for the data of a PackedSequence
    dims: Sequence[int],
    input_size: int,
    weight: Tensor,
) -> None:
    """Check the input's kind, number of dimensions, width, dtype and device against the layer's weights."""
    if not isinstance(x, Tensor):
        raise ArgumentError(f"input: expected a tensor or a PackedSequence; received {type(x).__name__}.")
    if x.dim() not in dims:
        expected = " or ".join(f"{n}-D" for n in dims)
        raise ArgumentError(
            f"input: expected {expected}: (time, batch, input_size), (batch, time, input_size) with batch_first, or "
            f"(time, input_size) unbatched; received shape {tuple(x.shape)}."
        )
    if x.shape[-1] != input_size:
        raise ArgumentError(
            f"input: expected a last dimension of input_size = {input_size}; received shape {tuple(x.shape)}. "
            "Build the layer with the width of your features, or project them first."
        )
    if x.dtype not in _FLOATING:
        raise ArgumentError(
            f"input: expected a floating point tensor ({weight.dtype}); received {x.dtype}. "
            "Token ids go through an embedding first."
        )
    _check_same_kind("input", x, weight)


def check_state(
    hx: Any,  # (h_0 (L*D, B, P), c_0 (L*D, B, H)), or without B for an unbatched input
    expected_h: tuple[int, ...],
    expected_c: tuple[int, ...],
    weight: Tensor,
) -> None:
    """Check an initial state's kind, shapes, dtype and device."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise ArgumentError(f"hx: expected a tuple of two tensors (h_0, c_0); received {_describe(hx)}.")
    _check_one_state("h_0", hx[0], expected_h, weight)
    _check_one_state("c_0", hx[1], expected_c, weight)


def check_lengths(
    lengths: Any,  # (B,) integer
    batch_size: int,
    max_length: int,
) -> None:
    """Check the lengths of a padded batch: one integer in 0..T for each row. Values on a GPU are not looked at."""
    if not isinstance(lengths, Tensor):
        raise ArgumentError(
            f"lengths: expected an integer tensor of shape ({batch_size},); received {_describe(lengths)}."
        )
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise ArgumentError(
            f"lengths: expected an integer tensor; received {lengths.dtype}. Convert it: lengths.long()."
        )
    if tuple(lengths.shape) != (batch_size,):
        raise ArgumentError(
            f"lengths: expected shape ({batch_size},), one length for each row of the batch; "
            f"received {tuple(lengths.shape)}."
        )
    if batch_size == 0 or torch.compiler.is_compiling():
        return  # no values, or values that a compiled or exported program will only see when it runs
    if lengths.is_cuda:
        return  # looking at them would wait for the GPU; the kernels take what is past the end for the end
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > max_length:
        raise ArgumentError(
            f"lengths: expected values from 0 to {max_length}, the padded length of this input; "
            f"received values from {low} to {high}."
        )


def check_resets(
    resets: Any,  # (T, B) bool or integer, or (B, T)
    expected: tuple[int, ...],
    order: str,
) -> None:
    """Check the kind, dtype and shape of a reset mask. Looks at no values."""
    if not isinstance(resets, Tensor):
        raise ArgumentError(
            f"resets: expected a bool or integer tensor of shape {expected}; received {_describe(resets)}."
        )
    if resets.dtype.is_floating_point or resets.dtype.is_complex:
        raise ArgumentError(
            f"resets: expected a bool or integer tensor; received {resets.dtype}. Convert it: resets != 0."
        )
    if tuple(resets.shape) != expected:
        raise ArgumentError(
            f"resets: expected shape {expected}, {order} as the input's, one entry for each step of each row; "
            f"received {tuple(resets.shape)}."
        )


def check_reset_state(
    reset_state: Any,  # (h (L*D, B, P), c (L*D, B, H)), or None
    resets: Tensor | None,
    expected_h: tuple[int, ...],
    expected_c: tuple[int, ...],
    weight: Tensor,
) -> None:
    """Check the state that resets put in place: kind, shapes, dtype and device, and that there are resets."""
    if reset_state is None:
        return
    if resets is None:
        raise ArgumentError(
            "reset_state: expected resets that put it in place; received none. Pass resets too, or hx for the state "
            "before the first step."
        )
    if not isinstance(reset_state, (tuple, list)) or len(reset_state) != 2:
        raise ArgumentError(f"reset_state: expected a tuple of two tensors (h, c); received {_describe(reset_state)}.")
    for name, state, expected in zip(("h", "c"), reset_state, (expected_h, expected_c), strict=True):
        _check_one_state(f"reset_state {name}", state, expected, weight)


def check_layer(
    x: Tensor,  # (T, B, I)
    h_0: Tensor,  # (D, B, P)
    c_0: Tensor,  # (D, B, H)
    weights: Sequence[Tensor],  # flat
    lengths: Tensor | None,  # (B,)
    backend: str,
    resets: Tensor | None = None,  # (T, B)
    h_reset: Tensor | None = None,  # (D, B, P)
    c_reset: Tensor | None = None,  # (D, B, H)
) -> None:
    """Check what one layer is called with: the kernels read memory by these shapes. Looks at no values."""
    check_choice("backend", backend, ("triton", "reference"))
    if backend == "triton" and x.device.type != "cuda":
        raise ArgumentError(
            f"backend 'triton': expected tensors on a GPU; received them on {x.device}. Use backend='reference' there."
        )
    if backend == "triton" and torch.version.hip is not None:
        raise ArgumentError(
            "backend 'triton': expected an NVIDIA GPU; received one of AMD, where the kernels have only been "
            "compiled: programs on different dies share no coherent L2 cache. Use backend='reference' there."
        )
    D = h_0.shape[0]
    n = len(weights) // max(D, 1)  # W_ih, W_hh[, b_ih, b_hh][, W_hr]
    if (
        x.dim() != 3
        or h_0.dim() != 3
        or c_0.dim() != 3
        or D not in (1, 2)
        or len(weights) != D * n
        or n not in (2, 3, 4, 5)
    ):
        raise ArgumentError(
            "lstm_layer: expected x (T, B, I), h_0 (D, B, P), c_0 (D, B, H) and 2 to 5 weights for each of D = 1 or 2 "
            f"directions; received shapes {tuple(x.shape)}, {tuple(h_0.shape)}, {tuple(c_0.shape)} and {len(weights)} "
            "weights. Give them flat, as torch.nn.LSTM has them: W_ih, W_hh[, b_ih, b_hh][, W_hr] for each direction."
        )
    has_bias, has_projection = n >= 4, n % 2 == 1
    (B, I), H = x.shape[1:], c_0.shape[2]
    P = h_0.shape[2] if has_projection else H
    recurrent = weights[1].shape[-1]
    if has_projection or recurrent == 0 or H % recurrent:  # else heads, of as many units as W_hh has columns
        recurrent = P
    shapes: list[tuple[int, ...]] = [(4 * H, I), (4 * H, recurrent)]
    shapes += [(4 * H,)] * (2 * has_bias) + [(P, H)] * has_projection
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "h_0": (h_0, (D, B, P if has_projection else H)),
        "c_0": (c_0, (D, B, H)),
        **{f"weights[{k}]": (w, shapes[k % n]) for k, w in enumerate(weights)},
    }
    if (h_reset is None) != (c_reset is None) or (h_reset is not None and resets is None):
        received = [
            name for name, t in (("resets", resets), ("h_reset", h_reset), ("c_reset", c_reset)) if t is not None
        ]
        raise ArgumentError(
            "h_reset and c_reset: expected both or none of them, and the resets that put them in place; received "
            f"{' and '.join(received)} only. Leave both out to reset to zero."
        )
    if h_reset is not None and c_reset is not None:
        expected |= {"h_reset": (h_reset, expected["h_0"][1]), "c_reset": (c_reset, expected["c_0"][1])}
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ArgumentError(
                f"{name}: expected {x.dtype} of shape {shape} on {x.device}, as x has it; received {tensor.dtype} of "
                f"shape {tuple(tensor.shape)} on {tensor.device}."
            )
    if lengths is not None and (lengths.shape != (B,) or lengths.device != x.device):
        raise ArgumentError(
            f"lengths: expected shape ({B},) on {x.device}, one length for each row; received shape "
            f"{tuple(lengths.shape)} on {lengths.device}."
        )
    if resets is not None:
        check_resets(resets, tuple(x.shape[:2]), "(time, batch)")
        if resets.device != x.device:
            raise ArgumentError(
                f"resets: expected a tensor on {x.device}, as x is; received one on {resets.device}. "
                f"Move it: resets.to({str(x.device)!r})."
            )


def _check_one_state(name: str, state: Any, expected: tuple[int, ...], weight: Tensor) -> None:
    if not isinstance(state, Tensor):
        raise ArgumentError(f"{name}: expected a tensor of shape {expected}; received {_describe(state)}.")
    if state.shape != expected:
        batched = len(expected) == 3
        raise ArgumentError(
            f"{name}: expected shape {expected}, (layers * directions, {'batch, ' if batched else ''}size), for this "
            f"{'batched' if batched else 'unbatched'} input; received {tuple(state.shape)}. "
            "The order of the state's dimensions is the same with batch_first."
        )
    _check_same_kind(name, state, weight)


def _check_same_kind(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.device != weight.device:
        raise ArgumentError(
            f"{name}: expected a tensor on {weight.device}, where the layer's weights are; received one on "
            f"{tensor.device}. Move one: {name}.to({str(weight.device)!r}) or layer.to({str(tensor.device)!r})."
        )
    # Autocast casts the arguments itself, so there they may differ.
    if tensor.dtype != weight.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise ArgumentError(
            f"{name}: expected {weight.dtype}, the dtype of the layer's weights; received {tensor.dtype}. "
            f"Convert one: {name}.to({weight.dtype}) or layer.to({tensor.dtype})."
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
