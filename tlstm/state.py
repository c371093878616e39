"""`LSTMState`: the recurrent state of a stack of LSTM layers as one object that users carry, reorder and save."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlstm.checkpoint.tensor_file import read_tensors, save_tensors
from tlstm.validation import shown

FORMAT = "tlstm-state-1"


@dataclass(frozen=True, eq=False)
class LSTMState:
    """Hidden and cell state of `L` stacked layers for `B` streams.

    Fields:
        h: one tensor per layer, `(B, H_l)`, or `(B, P_l)` where the layer has a recurrent projection.
        c: one tensor per layer, `(B, H_l)`.

    The object is immutable: every method returns a new state and leaves this one usable, so that a state can be kept
    as a cached prompt and continued many times.
    """

    h: tuple[Tensor, ...]
    c: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not self.h or len(self.h) != len(self.c):
            raise ValueError(f"an LSTM state needs one h and one c per layer, got {len(self.h)} h and {len(self.c)} c")
        batch = self.h[0].shape[0] if self.h[0].ndim == 2 else None
        for name, tensors in (("h", self.h), ("c", self.c)):
            for layer, tensor in enumerate(tensors):
                if tensor.ndim != 2 or tensor.shape[0] != batch:
                    raise ValueError(
                        f"{name}[{layer}]: expected shape (B, width) with the same B in every layer "
                        f"(h[0] is {tuple(self.h[0].shape)}), got {tuple(tensor.shape)}"
                    )

    @classmethod
    def zeros(
        cls,
        output_sizes: Sequence[int],
        widths: Sequence[int],
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LSTMState:
        """The state before any input: layer `l` gets `h` `(B, output_sizes[l])` and `c` `(B, widths[l])`, all zero."""

        def make(sizes: Sequence[int]) -> tuple[Tensor, ...]:
            return tuple(torch.zeros(batch_size, size, dtype=dtype, device=device) for size in sizes)

        return cls(h=make(output_sizes), c=make(widths))

    # ---- what it is ----------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Number of streams, `B`."""
        return self.h[0].shape[0]

    @property
    def num_layers(self) -> int:
        """Number of layers, `L`."""
        return len(self.h)

    @property
    def dtype(self) -> torch.dtype:
        return self.h[0].dtype

    @property
    def device(self) -> torch.device:
        return self.h[0].device

    def check_widths(self, output_sizes: Sequence[int], widths: Sequence[int]) -> None:
        """Raise `ValueError` unless layer `l` holds `h` of width `output_sizes[l]` and `c` of width `widths[l]`."""
        h, c = [tensor.shape[1] for tensor in self.h], [tensor.shape[1] for tensor in self.c]
        if h != list(output_sizes) or c != list(widths):
            raise ValueError(
                f"state: expected h of widths {list(output_sizes)} and c of widths {list(widths)}, got {h} and {c}; "
                "it was made by another model: load that one, or read the text with this one"
            )

    def __repr__(self) -> str:
        widths = [tensor.shape[1] for tensor in self.c]
        return f"LSTMState(batch_size={self.batch_size}, widths={widths}, dtype={self.dtype}, device='{self.device}')"

    # ---- new states from old -------------------------------------------------------------------------------------

    def map(self, function: Callable[[Tensor], Tensor]) -> LSTMState:
        """Apply `function` to every tensor."""
        return LSTMState(h=tuple(map(function, self.h)), c=tuple(map(function, self.c)))

    def detach(self) -> LSTMState:
        """Cut the gradient history: the boundary of truncated back-propagation through time."""
        return self.map(Tensor.detach)

    def clone(self) -> LSTMState:
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LSTMState:
        return self.map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def select(self, rows: Tensor) -> LSTMState:
        """Streams `rows` (int64, any order, repeats allowed): reorder for beam search, or drop finished streams."""
        return self.map(lambda tensor: tensor.index_select(0, rows))

    def row(self, n: int) -> LSTMState:
        """Stream `n` alone, without a copy."""
        return self.map(lambda tensor: tensor[n : n + 1])

    def repeat_interleave(self, repeats: int) -> LSTMState:
        """Each stream `repeats` times in a row: one prompt, several continuations."""
        return self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    @staticmethod
    def cat(states: Sequence[LSTMState]) -> LSTMState:
        """Put the streams of several states of one model side by side."""
        if not states:
            raise ValueError("LSTMState.cat: expected at least one state, got none")
        layers = {state.num_layers for state in states}
        if len(layers) != 1:
            raise ValueError(f"LSTMState.cat: expected states of one model, got states of {sorted(layers)} layers")
        return LSTMState(
            h=tuple(torch.cat(tensors) for tensors in zip(*(state.h for state in states), strict=True)),
            c=tuple(torch.cat(tensors) for tensors in zip(*(state.c for state in states), strict=True)),
        )

    # ---- storage -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The state under flat names, `h.0`, `c.0`, `h.1`, ..., as `save` stores it."""
        named = {f"h.{layer}": tensor for layer, tensor in enumerate(self.h)}
        return named | {f"c.{layer}": tensor for layer, tensor in enumerate(self.c)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> LSTMState:
        """The inverse of `tensors`; raises `ValueError` when a layer is missing."""
        layers = sum(name.startswith("h.") for name in tensors)
        expected = {f"{kind}.{layer}" for kind in "hc" for layer in range(layers)}
        if not layers or set(tensors) != expected:
            raise ValueError(f"expected tensors h.0, c.0, ... of one LSTM state, got {shown(sorted(tensors))}")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{name}: expected floating-point numbers, got {tensor.dtype}")
        return cls(
            h=tuple(tensors[f"h.{layer}"] for layer in range(layers)),
            c=tuple(tensors[f"c.{layer}"] for layer in range(layers)),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to one safetensors file, replacing `path` atomically."""
        save_tensors(path, self.tensors(), {"format": FORMAT})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> LSTMState:
        """Read a state written by `save`. Raises `ValueError` naming the file when it is not one."""
        tensors, _ = read_tensors(path, expected_format=FORMAT, writer="LSTMState.save")
        try:
            return cls.from_tensors(tensors).to(device=device)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
