"""What the decode kernel is compiled for: a model's sizes and how they are cut over programs; pure Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

MODES = ("reduce", "everyone", "owner")
MOST_FILTERED = 1 << 12  # token ids of a row of logits that one program holds in registers, to filter it
LINE = 32  # float32 in 128 bytes, what a row of logits is a multiple of: whole rows are read in whole vectors


@dataclass(frozen=True)
class DecodeShape:
    """The sizes of a language model: embedding, layers, head.

    Fields:
        widths: hidden units of each layer, first to last.
        vocab_size: token ids, V.
        dtype: of the weights, "float16", "bfloat16" or "float32".
        residual: whether a layer's input is added to its output, from the second layer on, where the widths agree.
        precision: of float32 products: "ieee", "tf32" or "tf32x3".
    """

    widths: tuple[int, ...]
    vocab_size: int
    dtype: str
    residual: bool = False
    precision: str = "ieee"

    @property
    def layers(self) -> int:
        return len(self.widths)

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Where each layer's units begin in a row that holds all layers: at multiples of 8, for whole words."""
        starts = [0]
        for width in self.widths:
            starts.append(starts[-1] + -(-width // 8) * 8)
        return tuple(starts)

    @property
    def stride(self) -> int:
        """Length of a row that holds all layers."""
        return self.columns[-1]

    @cached_property
    def sum_from(self) -> tuple[int, ...]:
        """For each layer the first of those whose h it hands upwards as a sum; itself without a residual."""
        first: list[int] = []
        for layer, width in enumerate(self.widths):
            joined = self.residual and layer > 0 and width == self.widths[layer - 1]
            first.append(first[-1] if joined else layer)
        return tuple(first)

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """Length of the contraction of each matrix: W_hh of layer 0, W_ih and W_hh of each further layer, the head."""
        return tuple(self.widths[m // 2] for m in range(2 * self.layers))


@dataclass(frozen=True)
class Choice:
    """What choosing a token asks of the kernel, beyond numbers that are arguments of a launch."""

    sample: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False

    @property
    def filters(self) -> bool:
        return self.top_k or self.top_p or self.min_p


@dataclass(frozen=True)
class DecodePlan:
    """How a decode kernel is launched; explains itself."""

    shape: DecodeShape
    choice: Choice
    streams: int  # B
    programs: int  # of one group
    rows: int  # streams of one group: a power of two
    block_k: int
    block_v: int  # vocabulary of one program at a time: a power of two, 16 or more
    num_warps: int
    keep_tile: int
    on_chip: tuple[bool, ...]  # per matrix, in the order of `DecodeShape.inputs`
    mode: str
    split_k: int = 1  # parts of a contraction that different warps add up: 1, or a power of two up to num_warps
    filter_block: int = MOST_FILTERED  # token ids of a row of logits that a program filters at a time: a power of two
    gpu: str = ""
    cost: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        assert len(self.on_chip) == 2 * self.shape.layers
        assert self.mode in MODES
        assert self.head_blocks == 1 or not self.on_chip[-1], "on the chip a program has one block of the head"
        assert self.mode == "owner" or not self.long_rows, "long rows of logits are filtered by their owners"

    @property
    def groups(self) -> int:
        return -(-self.streams // self.rows)

    @property
    def grid(self) -> tuple[int, int]:
        return self.programs, self.groups

    @cached_property
    def units(self) -> tuple[int, ...]:
        """Hidden units of one program in each layer: powers of two, 4 or more."""
        return tuple(max(4, next_power_of_two(-(-width // self.programs))) for width in self.shape.widths)

    @property
    def head_blocks(self) -> int:
        """Blocks of the vocabulary of the program that has most of them."""
        return -(-self.vocabulary_blocks // self.programs)

    @property
    def vocabulary_blocks(self) -> int:
        return -(-self.shape.vocab_size // self.block_v)

    @property
    def long_rows(self) -> bool:
        """Whether rows of logits are filtered block by block: they are longer than what a program holds at once."""
        return self.mode != "reduce" and self.shape.vocab_size > self.filter_block

    @property
    def row_stride(self) -> int:
        """Length of a row of logits in memory."""
        return -(-self.shape.vocab_size // LINE) * LINE

    @property
    def row_block(self) -> int:
        """Token ids of a row of logits that are looked at together: a power of two, 4 or more."""
        return max(4, min(self.filter_block, next_power_of_two(self.shape.vocab_size)))

    @property
    def logits_bytes(self) -> int:
        """What logits of one stream take in memory in each step."""
        return 0 if self.mode == "reduce" else 4 * self.row_stride * (1 + self.long_rows)

    @property
    def keys(self) -> int:
        """Keys that are exchanged for one stream."""
        return {"reduce": min(self.programs, self.vocabulary_blocks), "everyone": 0, "owner": 1}[self.mode]

    def padded(self, matrix: int) -> int:
        """The contraction of a packed matrix, in whole chunks."""
        return -(-self.shape.inputs[matrix] // self.block_k) * self.block_k

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each packed matrix begins, and where the last one ends."""
        starts = [0]
        for m in range(2 * self.shape.layers - 1):
            starts.append(starts[-1] + self.programs * 4 * self.units[(m + 1) // 2] * self.padded(m))
        return tuple(starts)

    @cached_property
    def bias_offsets(self) -> tuple[int, ...]:
        """Where each layer's packed bias begins (none for the first), and where the last one ends."""
        starts = [0, 0]
        for units in self.units[1:]:
            starts.append(starts[-1] + self.programs * 4 * units)
        return tuple(starts)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """For each matrix the number of its first chunk among those on the chip, or -1."""
        first, count = [], 0
        for m, here in enumerate(self.on_chip):
            first.append(count if here else -1)
            count += self.padded(m) // self.block_k if here else 0
        return tuple(first)

    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of the kernel, by name."""
        shape = self.shape
        return {
            "L": shape.layers,
            "V": shape.vocab_size,
            "WIDTHS": shape.widths,
            "UNITS": self.units,
            "COLUMNS": shape.columns,
            "STRIDE": shape.stride,
            "SUM_FROM": shape.sum_from,
            "OFFSETS": self.offsets,
            "BIAS_OFFSETS": self.bias_offsets,
            "KEPT": self.kept,
            "BLOCK_B": self.rows,
            "BLOCK_K": self.block_k,
            "BLOCK_V": self.block_v,
            "HEAD_BLOCKS": self.head_blocks,
            "KEYS": self.keys,
            "BLOCK_KEYS": next_power_of_two(max(self.keys, 1)),
            "ROW_STRIDE": self.row_stride,
            "ROW_V": 1 if self.mode == "reduce" else self.row_block,
            "KEEP_TILE": self.keep_tile,
            "SPLIT_K": self.split_k,
            "MODE": self.mode,
            "SAMPLE": int(self.choice.sample),
            "TOP_K": int(self.choice.top_k),
            "TOP_P": int(self.choice.top_p),
            "MIN_P": int(self.choice.min_p),
            "INPUT_PRECISION": shape.precision,
        }


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
