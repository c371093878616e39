"""Builds the three kinds of tokenizer that `Tokenizer` offers out of `tokenizers` parts, and recognises them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

TokenizerKind = Literal["char", "byte", "bpe", "other"]
_ONE_CHARACTER = r"[\s\S]"
_BLOCK = 1 << 20  # characters per piece of a long text


def build_char(texts: Iterable[str], unk_token: str | None) -> tokenizers.Tokenizer:
    """One id per distinct character, in sorted order."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise ValueError("expected text to collect characters from, received none; pass texts= or files= with text")
    vocabulary = {character: i for i, character in enumerate(sorted(characters))}
    if unk_token is not None:
        vocabulary.setdefault(unk_token, len(vocabulary))
    # Where no unknown token was asked for the name is not in the vocabulary, so the library refuses unknown characters.
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unk_token or "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_ONE_CHARACTER), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def build_byte() -> tokenizers.Tokenizer:
    """One id per byte: a byte-level BPE without merges."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def build_bpe(
    texts: Iterable[str], vocab_size: int, min_frequency: int, special_tokens: Sequence[str], progress: bool
) -> tokenizers.Tokenizer:
    """Byte-level BPE, GPT-2's word pattern; special tokens first, then the 256 bytes, then the merges."""
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"expected vocab_size >= {smallest} (256 bytes and {len(special_tokens)} special tokens), "
            f"received {vocab_size}; raise it, or use the byte-level tokenizer"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    backend.train_from_iterator(split_at_line_ends(texts), trainer)
    return backend


def add_special_tokens(backend: tokenizers.Tokenizer, special_tokens: Sequence[str]) -> None:
    """Adds them (or marks them, where the vocabulary has them) and checks that they decode to themselves."""
    for token in special_tokens:
        if not token or any(character.isspace() for character in token):
            raise ValueError(f"expected a special token without spaces, received {token!r}; write it like '<eos>'")
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    for token in special_tokens:
        token_id = backend.token_to_id(token)
        assert token_id is not None
        if backend.decode([token_id], skip_special_tokens=False) != token:
            raise ValueError(
                f"the special token {token!r} would not decode to itself in a byte-level tokenizer; "
                "use ASCII characters only, like '<eos>'"
            )


def recognise(backend: tokenizers.Tokenizer) -> TokenizerKind:
    """`char` and `byte` promise that ids can be looked up symbol by symbol; any other BPE is `bpe`."""
    description = json.loads(backend.to_str())
    model, words = description["model"], description["pre_tokenizer"] or {}
    if model["type"] == "WordLevel":
        symbols = model["vocab"].keys() - {token["content"] for token in description["added_tokens"]}
        one_each = words.get("pattern") == {"Regex": _ONE_CHARACTER} and all(len(symbol) == 1 for symbol in symbols)
        return "char" if one_each and _takes_text_as_it_is(description) else "other"
    if model["type"] != "BPE":
        return "other"
    one_each = not model["merges"] and {k: v for k, v in model["vocab"].items() if v < 256} == _byte_vocabulary()
    return "byte" if one_each and _splits_as_gpt2(words) and _takes_text_as_it_is(description) else "bpe"


def cuts_at_line_ends(backend: tokenizers.Tokenizer) -> bool:
    """Whether encoding the pieces of `split_at_line_ends` is the same as encoding the whole text.

    So it is for GPT-2's word pattern: none of its words runs from a visible character into white space, and none looks
    behind itself. Other patterns (those that keep a line end with the punctuation before it) give no such promise.
    """
    description = json.loads(backend.to_str())
    words = description["pre_tokenizer"] or {}
    spaces = any(character.isspace() for token in description["added_tokens"] for character in token["content"])
    return _splits_as_gpt2(words) and words["use_regex"] and _takes_text_as_it_is(description) and not spaces


def _splits_as_gpt2(words: dict[str, Any]) -> bool:
    return words.get("type") == "ByteLevel" and not words["add_prefix_space"]


def _takes_text_as_it_is(description: dict[str, Any]) -> bool:
    strips = (token["lstrip"] or token["rstrip"] or token["single_word"] for token in description["added_tokens"])
    return not description["normalizer"] and not any(strips)


def split_at_line_ends(texts: Iterable[str], block: int = _BLOCK) -> Iterator[str]:
    """Pieces of about `block` characters, cut before a line end that follows a visible character."""
    for text in texts:
        start = 0
        while len(text) - start > block:
            cut = text.find("\n", start + block)
            while cut > 0 and text[cut - 1].isspace():
                cut = text.find("\n", cut + 1)
            if cut < 0:
                break
            yield text[start:cut]
            start = cut
        if start < len(text):
            yield text[start:]


def read_texts(
    texts: str | Iterable[str] | None, files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
) -> Iterator[str]:
    """The texts as they are, then each UTF-8 file whole; line ends are left as they are."""
    if texts is None and files is None:
        raise ValueError("expected text to train on, received neither texts= nor files=; pass one of them")
    yield from [texts] if isinstance(texts, str) else texts or ()
    for file in [files] if isinstance(files, str | os.PathLike) else files or ():
        try:
            with open(file, encoding="utf-8", newline="") as stream:
                yield stream.read()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"expected UTF-8 text in {os.fspath(file)!r}, found byte 0x{error.object[error.start]:02x} at "
                f"position {error.start}; convert it, for example with `iconv -t utf-8`"
            ) from error


def _byte_vocabulary() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 bytes stand for themselves, the rest follow from 256."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
