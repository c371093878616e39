"""`GenerationState`: everything that a text needs to go on exactly as if it had never stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tlstm.checkpoint.json_file import parse_json
from tlstm.checkpoint.tensor_file import read_tensors, save_tensors
from tlstm.config import MAX_VOCABULARY, LSTMConfig
from tlstm.generation.philox import MAX_SEED
from tlstm.state import LSTMState
from tlstm.validation import check_int, shown

FORMAT = "tlstm-generation-state-1"


@dataclass(frozen=True, eq=False)
class GenerationState:
    """`B` texts in the making: returned by `prefill` and `generate`, taken by `generate(state=...)`.

    The object is immutable and small (the recurrent state does not grow with the text), so a prompt that was read once
    can be continued many times, now or, through `save` and `load`, later and elsewhere.

    Fields:
        recurrent: the model's state after all tokens of each text but the last one, which is fed first on continuing.
        tokens: the whole history of each text, prompt and generated, 1-D int64 on the CPU, at least one token:
            penalties look at it, and its length is the position that the random numbers of the next token belong to.
        vocab_size: number of token ids of the model, `V`.
        seeds: each text's seed; `None` before anything was sampled.
        return_index: which of several continuations of one prompt each text is; part of its random numbers.
    """

    recurrent: LSTMState
    tokens: tuple[Tensor, ...]
    vocab_size: int
    seeds: tuple[int, ...] | None = None
    return_index: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.return_index:
            object.__setattr__(self, "return_index", (0,) * len(self.tokens))
        counts = {
            "tokens": len(self.tokens),
            "seeds": len(self.tokens if self.seeds is None else self.seeds),
            "return_index": len(self.return_index),
        }
        for name, count in counts.items():
            if count != self.recurrent.batch_size:
                raise ValueError(
                    f"{name}: expected one entry per stream of the recurrent state ({self.recurrent.batch_size}), "
                    f"got {count}"
                )
        for row, ids in enumerate(self.tokens):
            if ids.ndim != 1 or ids.dtype != torch.int64 or not len(ids):
                raise ValueError(
                    f"tokens[{row}]: expected a 1-D int64 tensor of at least one id, got {ids.dtype} of shape "
                    f"{tuple(ids.shape)}"
                )
            if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
                raise ValueError(
                    f"tokens[{row}]: expected ids from 0 to {self.vocab_size - 1}, got {int(ids.min())} to "
                    f"{int(ids.max())}"
                )

    @property
    def batch_size(self) -> int:
        """Number of texts, `B`."""
        return len(self.tokens)

    def __repr__(self) -> str:
        lengths = [len(ids) for ids in self.tokens]
        return f"GenerationState(batch_size={self.batch_size}, lengths={lengths}, recurrent={self.recurrent!r})"

    # ---- new states from old -------------------------------------------------------------------------------------

    def select(self, rows: Sequence[int]) -> GenerationState:
        """The texts `rows`, in any order, repeats allowed."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.recurrent.device)
        return replace(
            self,
            recurrent=self.recurrent.select(index),
            tokens=tuple(self.tokens[row] for row in rows),
            seeds=None if self.seeds is None else tuple(self.seeds[row] for row in rows),
            return_index=tuple(self.return_index[row] for row in rows),
        )

    def repeat_interleave(self, repeats: int) -> GenerationState:
        """Each text `repeats` times in a row, each copy with a return index, and so with random numbers, of its own."""
        copies = self.select([row for row in range(self.batch_size) for _ in range(repeats)])
        index = tuple(old * repeats + copy for old in self.return_index for copy in range(repeats))
        return replace(copies, return_index=index)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GenerationState:
        """Move the recurrent state (the tokens stay on the CPU)."""
        return replace(self, recurrent=self.recurrent.to(device=device, dtype=dtype))

    # ---- fitting a model -----------------------------------------------------------------------------------------

    def check_model(self, config: LSTMConfig) -> None:
        """Raise `ValueError` unless a model of this `config` can continue the texts."""
        self.recurrent.check_widths(config.output_sizes, config.widths)
        if self.vocab_size != config.vocab_size:
            raise ValueError(
                f"state: expected one of a model with vocab_size {config.vocab_size}, got one of vocab_size "
                f"{self.vocab_size}; load the model that made the state, or prefill its text with this one"
            )

    # ---- storage -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, replacing `path` atomically."""
        tensors = {f"recurrent.{name}": tensor for name, tensor in self.recurrent.tensors().items()}
        tensors |= {f"tokens.{row}": ids for row, ids in enumerate(self.tokens)}
        about = {"vocab_size": self.vocab_size, "seeds": self.seeds, "return_index": self.return_index}
        save_tensors(path, tensors, {"format": FORMAT, "generation": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> GenerationState:
        """Read a state written by `save`. Raises `ValueError` naming the file when it is not one."""
        tensors, metadata = read_tensors(path, expected_format=FORMAT, writer="GenerationState.save")
        try:
            about = parse_json(metadata["generation"], "metadata")
            return cls._from_parts(tensors, about).to(device=device)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: damaged generation state ({error}); save the state again") from None

    @classmethod
    def _from_parts(cls, tensors: dict[str, Tensor], about: dict) -> GenerationState:
        prefix = "recurrent."
        recurrent = LSTMState.from_tensors(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        )
        names = [f"tokens.{row}" for row in range(recurrent.batch_size)]
        others = {name for name in tensors if not name.startswith(prefix)} - set(names)
        if others:
            raise ValueError(f"expected tensors recurrent.* and tokens.*, got {shown(sorted(others))}")
        check_int("vocab_size", about["vocab_size"], 1, MAX_VOCABULARY)
        for name, highest in (("seeds", MAX_SEED), ("return_index", 2**32 - 1)):
            values = about[name]
            if not isinstance(values, list) and not (name == "seeds" and values is None):
                raise ValueError(f"{name}: expected a list of whole numbers, got {shown(values)}")
            for value in values or []:
                check_int(name, value, 0, highest)
        return cls(
            recurrent=recurrent,
            tokens=tuple(tensors[name] for name in names),
            vocab_size=about["vocab_size"],
            seeds=None if about["seeds"] is None else tuple(about["seeds"]),
            return_index=tuple(about["return_index"]),
        )
