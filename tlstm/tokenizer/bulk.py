"""Whole corpora to ids: the same ids as `Tokenizer.encode`, without an object per token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from tlstm.tokenizer.building import cuts_at_line_ends, recognise, split_at_line_ends

_BLOCK = 1 << 22  # symbols looked up at once: bounds the memory
_PIECE, _BATCH = 1 << 16, 64  # characters per BPE piece, and pieces encoded at once over all cores


class UnknownCharacters(ValueError):  # noqa: N818
    """The text has characters without an id."""


class BulkEncoder:
    """Encodes texts of any size with `backend`; `unk_id` is the id for unknown characters, None refuses them."""

    def __init__(self, backend: tokenizers.Tokenizer, unk_id: int | None) -> None:
        self._backend = backend
        self._kind = recognise(backend)
        self._special = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        if self._kind == "char":
            symbols = {ord(token): i for token, i in backend.get_vocab().items() if len(token) == 1}
            # The last entry stands for all higher code points.
            self._id_of_code_point = np.full(max(symbols) + 2, -1 if unk_id is None else unk_id, np.int64)
            self._id_of_code_point[list(symbols)] = list(symbols.values())

    def encode(self, text: str) -> NDArray[Any]:
        """Ids (tokens,), `uint16` where the vocabulary allows it, otherwise `uint32`."""
        size = max(self._backend.get_vocab().values()) + 1
        dtype = np.uint16 if size <= 1 << 16 else np.uint32
        parts = self._look_up(text) if self._kind in ("char", "byte") else self._by_pieces(text)
        return np.concatenate([np.empty(0, dtype), *(part.astype(dtype) for part in parts)])

    def split_special(self, text: str) -> list[str]:
        """The text cut around the special tokens written in it, which are kept as pieces of their own."""
        return self._special_pattern.split(text) if self._special else [text]

    def unknown_characters(self, text: str) -> set[str]:
        """Those that the vocabulary lacks; only a character-level one can lack any."""
        if self._kind != "char":
            return set()
        pieces = (piece for piece in self.split_special(text) if piece not in self._special)
        return set().union(*pieces) - self._backend.get_vocab().keys()

    def _look_up(self, text: str) -> Iterator[NDArray[Any]]:
        for piece in self.split_special(text):
            if piece in self._special:
                yield np.array([self._special[piece]])
                continue
            for start in range(0, len(piece), _BLOCK):
                block = piece[start : start + _BLOCK]
                if self._kind == "byte":
                    yield np.frombuffer(block.encode(), np.uint8)
                    continue
                codes = np.frombuffer(block.encode("utf-32-le"), np.uint32)
                ids = self._id_of_code_point[np.minimum(codes, len(self._id_of_code_point) - 1)]
                if ids.min() < 0:
                    raise UnknownCharacters
                yield ids

    def _by_pieces(self, text: str) -> Iterator[NDArray[Any]]:
        """In pieces where that gives the ids of the whole text, otherwise in one go."""
        block = _PIECE if cuts_at_line_ends(self._backend) else max(len(text), 1)
        pieces = list(split_at_line_ends([text], block))
        for start in range(0, len(pieces), _BATCH):
            for encoding in self._backend.encode_batch_fast(pieces[start : start + _BATCH], add_special_tokens=False):
                yield np.asarray(encoding.ids, np.uint32)
