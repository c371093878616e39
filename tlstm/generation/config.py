"""`GenerationConfig`: every setting of `generate`, documented, checked, and saved beside the model."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tlstm.checkpoint.folder_swap import replace_files
from tlstm.checkpoint.folder_view import read_whole
from tlstm.checkpoint.json_file import parse_json
from tlstm.config import WRITTEN_BY_TRANSFORMERS
from tlstm.generation.philox import MAX_SEED
from tlstm.validation import check_int, check_number, shown
from tlstm.version import __version__

GENERATION_CONFIG_NAME = "generation_config.json"
DEFAULT_NEW_TOKENS = 256
MAX_SEQUENCES = 1 << 16  # per prompt: what a damaged or hostile file may not multiply a batch by

_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
_BEAM_FIELDS = ("length_penalty", "early_stopping")


@dataclass
class GenerationConfig:
    """Settings of `generate`. Names and meanings follow transformers; every field is checked on construction.

    Length:
        max_new_tokens: most new tokens per sequence. With neither this nor `max_length`: 256.
        max_length: most tokens in a sequence, its own prompt (without padding, with the text of a resumed state)
            included. With both limits set, the nearer one ends the sequence.
        min_new_tokens: end-of-sequence ids are forbidden until this many new tokens were made.
        max_time: seconds after which every sequence ends, measured from the call; at least one token is made.
        stop_strings: a text or list of texts; a sequence ends with the token that completes one (needs `tokenizer=`).
    Choice of the next token. The logits pass, in float32, through these in this order (that of transformers):
        repetition_penalty: logits of tokens in the sequence so far are divided (positive) or multiplied (negative)
            by it (Keskar et al. 2019); 1 is off.
        no_repeat_ngram_size: forbids a token that would complete an n-gram already in the sequence; 0 is off.
        bad_words_ids: token sequences that are never completed. suppress_tokens: ids that are never chosen.
        do_sample: draw from the distribution instead of taking the most likely token. Only then:
        temperature: divides the logits. top_k: the k most likely tokens stay, and those tied with the last of them.
        top_p: the smallest set of most likely tokens whose probability reaches p stays (Holtzman et al. 2020).
        min_p: tokens of at least p times the largest probability stay (Nguyen et al. 2024).
        typical_p: tokens of information content nearest the entropy stay, up to probability p (Meister et al. 2022).
        seed: 64-bit seed, or one per prompt. The same seed and prompt give the same text whatever the batch. `None`
            takes fresh seeds from torch's global generator, so that `torch.manual_seed` decides.
    Sequences:
        num_return_sequences: continuations per prompt (by sampling, or the best of the beams).
        num_beams: beam search over this many hypotheses; 1 is off. length_penalty: scores are divided by
            `length ** length_penalty`. early_stopping: True ends when `num_beams` hypotheses are complete; False when
            a better one is unlikely; "never" when one is impossible.
    Tokens, where `None` means the model's own:
        bos_token_id: starts an empty prompt. eos_token_id: an id or list of ids that end a sequence ([]: none does).
        pad_token_id: fills rows that end early; without it the first end-of-sequence id does.
    Output:
        return_dict_in_generate: return a `GenerateOutput`. Without beams, output_scores adds the processed logits and
        output_logits the model's own logits of every step; beams always come with their scores.
    extra: keys this version does not know, kept and written back unchanged.

    Raises:
        ValueError: a field is out of range or contradicts another one; the message names it and the remedy.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    max_time: float | None = None
    stop_strings: str | list[str] | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | list[int] | None = None
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_tokens()
        self._check_together()

    # ---- reading and writing -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The settings that differ from their defaults, the unknown ones that were read, and the library version."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        changed = {name: value for name, value in values.items() if value != _DEFAULTS[name]}
        return {**self.extra, **changed, "tlstm_version": __version__}

    def to_json(self) -> str:
        """The text of `generation_config.json`: sorted keys, two spaces, a final newline."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = GENERATION_CONFIG_NAME) -> GenerationConfig:
        """Build from a dictionary; `source` names it in errors and warnings. Null means the default.

        Keys that this version does not know are kept in `extra`, with a warning unless they are transformers' own.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{source}: expected a JSON object of settings, got {type(values).__name__}")
        values = {key: value for key, value in values.items() if key != "tlstm_version"}
        unknown = {key: value for key, value in values.items() if key not in _DEFAULTS}
        strange = sorted(str(key) for key in unknown if key not in WRITTEN_BY_TRANSFORMERS)
        if strange:
            warnings.warn(f"{source}: unknown settings {shown(strange)} are kept but have no effect", stacklevel=2)
        known = {key: value for key, value in values.items() if key in _DEFAULTS and value is not None}
        try:
            return cls(**known, extra=unknown)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = GENERATION_CONFIG_NAME) -> GenerationConfig:
        """Parse the text of a `generation_config.json`; `source` names it in errors."""
        return cls.from_dict(parse_json(text, source), source=source)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> GenerationConfig:
        """Read a `generation_config.json`. Raises `ValueError` naming the file when it is not a valid one."""
        return cls.from_json(read_whole(Path(path)), source=str(path))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> GenerationConfig:
        """Read `generation_config.json` in a model's folder. Raises `FileNotFoundError` where there is none."""
        return cls.from_json_file(Path(directory) / GENERATION_CONFIG_NAME)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `generation_config.json` into a folder (made where missing), replacing the file atomically."""
        replace_files(directory, {GENERATION_CONFIG_NAME: self.to_json().encode()})

    def replace(self, **overrides: Any) -> GenerationConfig:
        """A copy with some fields changed, checked again. Raises `TypeError` for a name that is no setting."""
        for name in overrides:
            if name not in _DEFAULTS:
                close = difflib.get_close_matches(name, _DEFAULTS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the settings are {', '.join(sorted(_DEFAULTS))}"
                raise TypeError(f"unknown generation setting {name!r}; {hint}")
        given = {name: _DEFAULTS[name] if value is None else value for name, value in overrides.items()}
        return dataclasses.replace(self, **given)

    # ---- what follows from the settings --------------------------------------------------------------------------

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a sequence, as a list."""
        ids = self.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else ids

    @property
    def stop_texts(self) -> list[str]:
        """The stop strings, as a list."""
        texts = self.stop_strings
        return [] if texts is None else [texts] if isinstance(texts, str) else texts

    def ineffective(self) -> list[str]:
        """Names of settings that were changed but do nothing here: of sampling without `do_sample`, and the like."""
        idle = [] if self.do_sample else list(_SAMPLING_FIELDS)
        idle += [] if self.num_beams > 1 else list(_BEAM_FIELDS)
        idle += [] if self.return_dict_in_generate and self.num_beams == 1 else ["output_scores", "output_logits"]
        return [name for name in idle if getattr(self, name) != _DEFAULTS[name]]

    # ---- checks --------------------------------------------------------------------------------------------------

    def _check_ranges(self) -> None:
        check_int("max_new_tokens", self.max_new_tokens, 1, optional=True)
        check_int("max_length", self.max_length, 1, optional=True)
        check_int("min_new_tokens", self.min_new_tokens, 0)
        check_int("no_repeat_ngram_size", self.no_repeat_ngram_size, 0)
        check_int("top_k", self.top_k, 0, optional=True)
        check_int("num_return_sequences", self.num_return_sequences, 1, MAX_SEQUENCES)
        check_int("num_beams", self.num_beams, 1, MAX_SEQUENCES)
        check_number("max_time", self.max_time, "(0, inf)", optional=True)
        check_number("repetition_penalty", self.repetition_penalty, "(0, inf)")
        check_number("length_penalty", self.length_penalty, "(-inf, inf)")
        if self.temperature == 0:
            raise ValueError("temperature: 0 would divide by zero; for the most likely token use do_sample=False")
        check_number("temperature", self.temperature, "(0, inf)")
        for name in ("top_p", "typical_p", "min_p"):
            value = getattr(self, name)
            if name == "min_p" and value == 0:
                continue  # off, as in transformers
            check_number(name, value, "(0, 1]", optional=True)
        for name in ("do_sample", "return_dict_in_generate", "output_scores", "output_logits"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {shown(getattr(self, name))}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f'early_stopping: expected true, false or "never", got {shown(self.early_stopping)}')
        if self.seed is not None:
            for seed in self.seed if isinstance(self.seed, list) else [self.seed]:
                check_int("seed", seed, 0, MAX_SEED)
        if self.stop_strings is not None and not isinstance(self.stop_strings, str | list):
            raise ValueError(f"stop_strings: expected a text or a list of texts, got {shown(self.stop_strings)}")
        for text in self.stop_texts:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop_strings: expected texts of at least one character, got {shown(text)}")
        if not isinstance(self.extra, dict):
            raise ValueError(f"extra: expected a dictionary of further settings, got {shown(self.extra)}")

    def _check_tokens(self) -> None:
        for name in ("bos_token_id", "pad_token_id"):
            check_int(name, getattr(self, name), 0, optional=True)
        if self.eos_token_id is not None and not isinstance(self.eos_token_id, int | list):
            raise ValueError(f"eos_token_id: expected an id or a list of ids, got {shown(self.eos_token_id)}")
        for token_id in self.eos_ids:
            check_int("eos_token_id", token_id, 0)
        words = self.bad_words_ids if self.bad_words_ids is not None else []
        if not isinstance(words, list) or not all(isinstance(word, list) and word for word in words):
            raise ValueError(f"bad_words_ids: expected a list of non-empty lists of ids, got {shown(words)}")
        if self.suppress_tokens is not None and not isinstance(self.suppress_tokens, list):
            raise ValueError(f"suppress_tokens: expected a list of ids, got {shown(self.suppress_tokens)}")
        for name, lists in (("bad_words_ids", words), ("suppress_tokens", [self.suppress_tokens or []])):
            for token_id in itertools.chain.from_iterable(lists):
                check_int(name, token_id, 0)

    def _check_together(self) -> None:
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}; change either"
            )
        if self.num_beams > 1 and self.do_sample:
            raise ValueError("num_beams and do_sample exclude each other; use num_beams=1 or do_sample=False")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} is above num_beams={self.num_beams}; "
                "a search returns at most its beams: raise num_beams"
            )
        if self.num_beams == 1 and not self.do_sample and self.num_return_sequences > 1:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} with greedy choice would repeat one text; "
                "set do_sample=True or num_beams"
            )


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(GenerationConfig) if f.name != "extra"}
