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
    """Check the lengths of a padded batch: one integer in 0..T for each row."""
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
    if batch_size == 0 or torch.compiler.is_exporting():
        return  # no values, or values that an exported program will only see when it runs
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > max_length:
        raise ArgumentError(
            f"lengths: expected values from 0 to {max_length}, the padded length of this input; "
            f"received values from {low} to {high}."
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
