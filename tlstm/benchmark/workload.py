"""What is measured: the sizes and options of one LSTM."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

MODES = ("forward", "backward", "train", "decode")
DTYPES = ("float16", "bfloat16", "tf32", "float32")
# How far `small` shrinks each size, and what it leaves at least.
_SHRINK = {"T": (16, 2), "B": (4, 1), "I": (8, 4), "H": (8, 8), "vocab": (8, 16)}


@dataclass(frozen=True, order=True)
class Workload:
    """One LSTM and its input. Dims: T time, B batch, I input, H hidden units.

    `resets` is the share of steps at which a row's state is set to zero (episodes of reinforcement learning). In decode
    mode T tokens are generated after a prompt of one, over a vocabulary of `vocab`, and I is the embedding's width.
    """

    T: int
    B: int
    H: int
    I: int
    layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    resets: float = 0.0
    vocab: int = 0

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Width of the output: that of all directions."""
        return (self.proj_size or self.H) * self.directions

    @property
    def input_sizes(self) -> list[int]:
        """Width of each layer's input."""
        return [self.I] + [self.output_size] * (self.layers - 1)

    @property
    def multiply_adds(self) -> int:
        """Of the forward pass, without the vocabulary's product."""
        width = self.proj_size or self.H
        per_direction = sum(4 * self.H * (size + width) + self.proj_size * self.H for size in self.input_sizes)
        return self.T * self.B * self.directions * per_direction

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `torch.nn.LSTM`, besides its sizes."""
        return {"num_layers": self.layers, "bidirectional": self.bidirectional, "proj_size": self.proj_size}

    def small(self) -> Workload:
        """The workload shrunk to what a CPU does in milliseconds: T by 16, B by 4, widths by 8."""
        shrunk = {
            name: max(least, getattr(self, name) // by) for name, (by, least) in _SHRINK.items() if getattr(self, name)
        }
        return replace(self, proj_size=self.proj_size and max(4, self.proj_size // 8), **shrunk)

    def label(self) -> str:
        """The sizes in one line; options only where they are not the usual ones."""
        parts = [f"T={self.T} B={self.B} H={self.H}"]
        parts += [f"I={self.I}"] if self.I != self.H else []
        parts += [f"{self.layers} layers"] if self.layers > 1 else []
        parts += ["both directions"] if self.bidirectional else []
        parts += [f"projection {self.proj_size}"] if self.proj_size else []
        parts += [f"{100 * self.resets:g} % resets"] if self.resets else []
        parts += [f"V={self.vocab}"] if self.vocab else []
        return " ".join(parts)

    def to_row(self) -> dict[str, Any]:
        """The fields as columns of a table."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Workload:
        """The inverse of `to_row`, also from the text of a CSV file."""
        kinds: dict[str, Any] = {"resets": float, "bidirectional": lambda value: bool(int(value))}
        return cls(**{field.name: kinds.get(field.name, int)(row[field.name]) for field in fields(cls)})


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value
