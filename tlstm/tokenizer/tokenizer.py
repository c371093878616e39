"""Text to token ids and back: a thin layer over the `tokenizers` library.

Three kinds can be made here, and any other fast tokenizer can be loaded:

- **char**: one id per character, in sorted order. Knows only the characters it was built from.
- **byte**: one id per UTF-8 byte, id = byte value. Any text, nothing to train.
- **bpe**: byte-level BPE (Sennrich et al. 2016; over bytes as in GPT-2), trained. Any text.

Saved as `tokenizer.json` and `tokenizer_config.json`, the files that `tokenizers.Tokenizer.from_file` and
`transformers.AutoTokenizer.from_pretrained` read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from torch import Tensor

from tlstm.hub.locate import checkpoint_folder
from tlstm.hub.pushable import Pushable
from tlstm.tokenizer import building
from tlstm.tokenizer import files as tokenizer_files
from tlstm.tokenizer.bulk import BulkEncoder, UnknownCharacters
from tlstm.tokenizer.files import CONFIG_FILE, ROLES, TOKENIZER_FILE
from tlstm.tokenizer.output import TextStream, TokenizedText, pad
from tlstm.validation import shown

Ids = Sequence[int] | Tensor | NDArray[Any]
FileContents = dict[str, bytes]  # named here because `Tokenizer.bytes` hides the builtin inside the class
PathLike = str | os.PathLike[str]


class Tokenizer(Pushable):
    """Text <-> ids. Make one with `train_char`, `bytes`, `train_bpe` or `from_pretrained`.

    `backend` is the `tokenizers.Tokenizer` underneath, for everything this class does not wrap; `config` is the content
    of `tokenizer_config.json`, where keys written by others are kept.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None, *, name_or_path: str = ""
    ) -> None:
        backend.no_truncation()  # both may stand in a foreign tokenizer.json and would change what encode returns
        backend.no_padding()
        self.backend = backend
        self.name_or_path = name_or_path
        # The one class name that every transformers release takes to mean "read tokenizer.json as it is".
        self.config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
        } | (config or {})
        for role in ROLES:
            token = self._special_token(role)
            if token is not None and backend.token_to_id(token) is None:
                raise ValueError(
                    f"{os.path.join(name_or_path, CONFIG_FILE)}: names {shown(token)} as {role}, but {TOKENIZER_FILE} "
                    "has no such token; take both files from the same save"
                )

    # ---- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def train_char(
        cls,
        texts: str | Iterable[str] | None = None,
        *,
        files: PathLike | Sequence[PathLike] | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        unk_token: str | None = None,
    ) -> Tokenizer:
        """One id per distinct character of the texts or UTF-8 files, in sorted order; special tokens follow.

        Without an `unk_token`, encoding a character that was not seen is a `ValueError` that names it.
        """
        backend = building.build_char(building.read_texts(texts, files), unk_token)
        return cls._finish(backend, (bos_token, eos_token, pad_token, unk_token))

    @classmethod
    def bytes(
        cls, *, bos_token: str | None = None, eos_token: str | None = None, pad_token: str | None = None
    ) -> Tokenizer:
        """One id per UTF-8 byte (id = byte value, 0..255); special tokens follow from 256."""
        return cls._finish(building.build_byte(), (bos_token, eos_token, pad_token, None))

    @classmethod
    def train_bpe(
        cls,
        texts: str | Iterable[str] | None = None,
        vocab_size: int = 8192,
        *,
        files: PathLike | Sequence[PathLike] | None = None,
        min_frequency: int = 2,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        special_tokens: Sequence[str] = (),
        progress: bool = True,
    ) -> Tokenizer:
        """Byte-level BPE trained on the texts or UTF-8 files; every text round-trips, unseen characters as bytes.

        `vocab_size` counts the special tokens (first in the vocabulary) and the 256 bytes. A small text that runs out
        of pairs seen `min_frequency` times gives fewer.
        """
        roles = (bos_token, eos_token, pad_token, None)
        special = list(dict.fromkeys([*filter(None, roles), *special_tokens]))
        backend = building.build_bpe(building.read_texts(texts, files), vocab_size, min_frequency, special, progress)
        return cls._finish(backend, roles, special_tokens)

    @classmethod
    def _finish(
        cls, backend: tokenizers.Tokenizer, roles: Sequence[str | None], extra: Sequence[str] = ()
    ) -> Tokenizer:
        config: dict[str, Any] = {role: token for role, token in zip(ROLES, roles, strict=True) if token is not None}
        building.add_special_tokens(backend, list(dict.fromkeys([*config.values(), *extra])))
        return cls(backend, config | ({"additional_special_tokens": list(extra)} if extra else {}))

    # ---- what it is ---------------------------------------------------------------------------------------------

    @cached_property
    def kind(self) -> building.TokenizerKind:
        """`char`, `byte`, `bpe`, or `other` for a loaded tokenizer of another family."""
        return building.recognise(self.backend)

    @cached_property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: the highest id plus one, special tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}){self._origin()}"

    def _origin(self) -> str:
        return f" (of {self.name_or_path!r})" if self.name_or_path else ""

    def _special_token(self, role: str) -> str | None:
        token = self.config.get(role)
        return token["content"] if isinstance(token, dict) else token  # transformers may write {"content": ...}

    def _special_token_id(self, role: str) -> int | None:
        token = self._special_token(role)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, or None."""
        return self._special_token_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, or None."""
        return self._special_token_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, or None (padding is then id 0 under a mask of 0)."""
        return self._special_token_id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """Id of the token that stands for what the vocabulary lacks, or None."""
        return self._special_token_id("unk_token")

    # ---- text to ids --------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. A special token written in the text becomes its id, as in `transformers`.

        `add_special_tokens` matters only for a loaded tokenizer whose file says to frame the text; those made here
        never add anything.
        """
        self._check_text(text)
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library raises bare `Exception`s; the cause is found in the text
            raise self._refusal(text, error) from error

    def encode_array(self, text: str) -> NDArray[Any]:
        """`encode(text, add_special_tokens=False)` as a numpy array: fast and lean, for texts of any size.

        `uint16` for a vocabulary of up to 65,536 ids, otherwise `uint32`.
        """
        self._check_text(text)
        try:
            return self._bulk.encode(text)
        except (UnknownCharacters, UnicodeEncodeError, TypeError) as error:  # TypeError: the library's for bad Unicode
            raise self._refusal(text, error) from error

    @cached_property
    def _bulk(self) -> BulkEncoder:
        return BulkEncoder(self.backend, self.unk_token_id)

    def _check_text(self, text: str) -> None:
        if not isinstance(text, str):
            raise ValueError(f"expected a text (str), received {type(text).__name__}; for several call the tokenizer")

    def _refusal(self, text: str, error: Exception) -> ValueError:
        """The error that names the characters, where characters are the reason."""
        halves = {character for character in text if "\ud800" <= character <= "\udfff"}
        characters = sorted(halves or self._bulk.unknown_characters(text))
        if not characters:
            return ValueError(f"this tokenizer{self._origin()} cannot encode the text: {error}")
        named = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in characters[:10])
        more = f" and {len(characters) - 10} more" if len(characters) > 10 else ""
        remedy = (
            "these are halves of a UTF-16 pair, no characters: decode the input as UTF-8"
            if halves
            else "remove or replace them, or train the tokenizer with an unk_token (or at byte level)"
        )
        return ValueError(f"the text has characters that this tokenizer{self._origin()} lacks: {named}{more}; {remedy}")

    def __call__(
        self, text: str | Sequence[str], *, padding_side: str | None = None, return_tensors: str = "pt"
    ) -> TokenizedText:
        """Ids and mask of one text or several, padded to the longest (on the left unless the config says otherwise)."""
        side = padding_side or self.config["padding_side"]
        if side not in ("left", "right"):
            raise ValueError(f"expected padding_side 'left' or 'right', received {side!r}")
        if return_tensors != "pt":
            raise ValueError(f"expected return_tensors='pt', received {return_tensors!r}; for plain lists use encode()")
        rows = [self.encode(row) for row in ([text] if isinstance(text, str) else text)]
        if not rows:
            raise ValueError("expected at least one text, received an empty list")
        return pad(rows, self.pad_token_id or 0, side)

    # ---- ids to text --------------------------------------------------------------------------------------------

    def decode(self, ids: Ids, *, skip_special_tokens: bool = False) -> str:
        """The text of ids (T,); for those made here `decode(encode(text)) == text`, white space included."""
        values = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else [int(i) for i in ids]
        self.check_ids(values)
        return self.backend.decode(values, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, ids: Sequence[Ids] | Tensor, *, skip_special_tokens: bool = False) -> list[str]:
        """The texts of several rows of ids, for example (B, T)."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in ids]

    def decode_stream(self, *, skip_special_tokens: bool = False) -> TextStream:
        """For text as it is generated: `step(id)` gives the piece it completes, `flush()` what is left."""
        return TextStream(self, skip_special_tokens)

    def check_ids(self, ids: Sequence[int]) -> None:
        """`ValueError` where an id is outside the vocabulary (the library would skip it silently)."""
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(
                f"expected ids in 0..{self.vocab_size - 1}, the vocabulary of this tokenizer{self._origin()}, received "
                f"{wrong}; decode with the tokenizer that was saved with the model"
            )

    # ---- files --------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: PathLike,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Tokenizer:
        """From a folder, or from a Hub repo (both files of one commit).

        A missing file is a `FileNotFoundError`, a damaged one a `CheckpointError` (a `ValueError`), each naming the
        file; errors of the Hub (repo or revision not found, gated) are those of `huggingface_hub`.
        """
        folder = checkpoint_folder(
            path_or_repo,
            files=(TOKENIZER_FILE, CONFIG_FILE),
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        return cls(*tokenizer_files.read(folder), name_or_path=os.fspath(path_or_repo))

    def files(self) -> FileContents:
        """Name -> content of the files that hold this tokenizer, for those who write them together with a model."""
        config = json.dumps(self.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        return {TOKENIZER_FILE: (self.backend.to_str(pretty=True) + "\n").encode(), CONFIG_FILE: config.encode()}

    def save_pretrained(self, save_directory: PathLike) -> None:
        """Replaces the two files as one set, safe against a crash; other files in the folder are left alone."""
        tokenizer_files.write(save_directory, self.files())
