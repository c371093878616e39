"""Text to ids and back: exact inverses, whole corpora, streams, and what is refused."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_samples import CORPUS, KINDS, TOKENIZERS

from tlstm.tokenizer.building import split_at_line_ends
from tlstm.tokenizer.tokenizer import Tokenizer

any_text = st.text(st.characters(exclude_categories=["Cs"]))
corpus_text = st.text(st.sampled_from(sorted(set(CORPUS))))


# ---- ids -------------------------------------------------------------------------------------------------------------


def test_char_ids_are_the_sorted_characters():
    text = "hello\n world!"
    tokenizer = Tokenizer.train_char([text[:5], text[5:]], eos_token="<eos>")
    expected = {character: i for i, character in enumerate(sorted(set(text)))}
    assert tokenizer.encode(text) == [expected[character] for character in text]
    assert tokenizer.eos_token_id == len(expected)
    assert tokenizer.kind == "char"


def test_byte_ids_are_the_bytes():
    text = "".join(map(chr, range(0x250))) + "東👩‍👧"
    assert TOKENIZERS["byte"].encode(text) == list(text.encode())
    assert (TOKENIZERS["byte"].bos_token_id, TOKENIZERS["byte"].eos_token_id) == (256, 257)
    assert TOKENIZERS["byte"].kind == "byte"


def test_bpe_keeps_to_its_size_and_compresses():
    tokenizer = TOKENIZERS["bpe"]
    assert tokenizer.vocab_size == 300
    assert tokenizer.kind == "bpe"
    assert len(tokenizer.encode(CORPUS)) < 0.9 * len(CORPUS.encode())
    assert tokenizer.encode("<|user|>speak<eos>")[0] == tokenizer.backend.token_to_id("<|user|>")
    assert tokenizer.encode("speak<eos>")[-1] == tokenizer.eos_token_id


@settings(max_examples=150)
@given(any_text)
@example(CORPUS)
@example("<eos> a<eos>\r\n<s>")
def test_any_text_round_trips_at_byte_level(text):
    for kind in ("byte", "bpe"):
        assert TOKENIZERS[kind].decode(TOKENIZERS[kind].encode(text)) == text


@settings(max_examples=100)
@given(corpus_text)
def test_known_characters_round_trip_at_character_level(text):
    ids = TOKENIZERS["char"].encode(text)
    assert len(ids) == len(text)
    assert TOKENIZERS["char"].decode(np.array(ids, np.uint16)) == text
    assert TOKENIZERS["char"].decode(torch.tensor(ids, dtype=torch.int64)) == text


def test_files_and_texts_train_the_same(tmp_path):
    halves = [CORPUS[:77], CORPUS[77:]]
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, half in zip(paths, halves, strict=True):
        path.write_bytes(half.encode())
    assert Tokenizer.train_char(files=paths).files() == Tokenizer.train_char(halves).files()
    from_files = Tokenizer.train_bpe(files=paths, vocab_size=290, progress=False)
    assert from_files.files() == Tokenizer.train_bpe(halves, 290, progress=False).files()


# ---- whole corpora ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_encode_array_gives_the_ids_of_encode(kind, monkeypatch):
    monkeypatch.setattr("tlstm.tokenizer.bulk._BLOCK", 63)
    monkeypatch.setattr("tlstm.tokenizer.bulk._PIECE", 13)
    monkeypatch.setattr("tlstm.tokenizer.bulk._BATCH", 3)
    tokenizer = TOKENIZERS[kind]
    marks = ["<eos>"] if tokenizer.eos_token_id is not None else ["<unk>"]
    draw = random.Random(7)
    alphabet = [*sorted(set(CORPUS)), *"\n\n\n\n    ", *marks]
    for length in (0, 1, 7, 65, 650):
        text = "".join(draw.choices(alphabet, k=length))
        array = tokenizer.encode_array(text)
        assert array.dtype == np.uint16
        assert array.tolist() == tokenizer.encode(text)


def test_encode_array_of_a_large_vocabulary_and_high_code_points():
    characters = "".join(chr(i) for i in [*range(0x4E00, 0x9FFF), *range(0x20000, 0x2CEA0)])
    tokenizer = Tokenizer.train_char(characters, unk_token="<unk>")
    assert tokenizer.vocab_size > 65536
    array = tokenizer.encode_array(characters[::-1] + "\U0010ffffa")
    assert array.dtype == np.uint32
    assert array.tolist() == [*range(len(characters) - 1, -1, -1), tokenizer.unk_token_id, tokenizer.unk_token_id]


def test_pieces_make_up_the_text_and_begin_at_line_ends():
    text = CORPUS * 5
    pieces = list(split_at_line_ends([text], 13))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(piece[0] == "\n" and not before[-1].isspace() for before, piece in itertools.pairwise(pieces))


# ---- streaming -------------------------------------------------------------------------------------------------------


def stream(tokenizer: Tokenizer, ids: list[int], **options: bool) -> tuple[list[str | None], str]:
    decoder = tokenizer.decode_stream(**options)
    return [decoder.step(i) for i in ids], decoder.flush()


@settings(max_examples=200)
@given(st.binary(max_size=40))
@example("€👩‍👩‍👧é".encode())
@example(b"\xe2\x82A\xff\xff \xf0\x90\x80")
def test_streamed_bytes_make_up_the_decoded_text(data):
    tokenizer = TOKENIZERS["byte"]
    pieces, rest = stream(tokenizer, list(data))
    assert "".join(filter(None, pieces)) + rest == tokenizer.decode(list(data)) == data.decode(errors="replace")
    assert all(piece is None or not piece.endswith("\ufffd") for piece in pieces)


@settings(max_examples=100)
@given(any_text)
def test_streamed_text_has_no_broken_character(text):
    for kind in ("byte", "bpe"):
        tokenizer = TOKENIZERS[kind]
        pieces, rest = stream(tokenizer, tokenizer.encode(text))
        assert "".join(filter(None, pieces)) + rest == text
        position = 0
        for piece in filter(None, pieces):  # every piece is a run of whole characters of the text
            assert text.startswith(piece, position)
            position += len(piece)


def test_a_character_comes_with_its_last_byte_and_a_flushed_stream_starts_anew():
    tokenizer = TOKENIZERS["byte"]
    decoder = tokenizer.decode_stream()
    assert [decoder.step(byte) for byte in "a€b".encode()] == ["a", None, None, "€", "b"]
    assert decoder.step(0xE2) is None
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert decoder.step(ord("z")) == "z"


def test_a_stream_can_skip_special_tokens():
    tokenizer = TOKENIZERS["char"]
    ids = tokenizer.encode("me<eos>me")
    assert "".join(filter(None, stream(tokenizer, ids, skip_special_tokens=True)[0])) == "meme"
    assert "".join(filter(None, stream(tokenizer, ids)[0])) == "me<eos>me"


# ---- what a user may get wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["encode", "encode_array", "__call__"])
def test_unknown_characters_are_named(method):
    tokenizer = TOKENIZERS["char"]
    with pytest.raises(ValueError, match=r"'ß' \(U\+00DF\), '€' \(U\+20AC\); .*unk_token"):
        getattr(tokenizer, method)("speak <eos>€ßß")


def test_an_unknown_token_takes_their_place():
    tokenizer = TOKENIZERS["char-unk"]
    assert tokenizer.decode(tokenizer.encode("speak €ß")) == "speak <unk><unk>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["encode", "encode_array"])
def test_halves_of_a_surrogate_pair_are_refused(kind, method):
    with pytest.raises(ValueError, match=r"U\+D83D.*decode the input as UTF-8"):
        getattr(TOKENIZERS[kind], method)("speak \ud83d")


@pytest.mark.parametrize("ids", [[65536], [-1], torch.tensor([0, 10**6]), np.array([-7])])
def test_ids_outside_the_vocabulary_are_refused(ids, tmp_path):
    TOKENIZERS["byte"].save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"0\.\.257.*{tmp_path.name}.*saved with the model"):
        tokenizer.decode(ids)
    with pytest.raises(ValueError, match=r"0\.\.257"):
        tokenizer.decode_stream().step(int(ids[-1]))


def test_wrong_arguments_are_explained():
    tokenizer = TOKENIZERS["char"]
    with pytest.raises(ValueError, match="expected a text"):
        tokenizer.encode(["speak"])
    with pytest.raises(ValueError, match="at least one text"):
        tokenizer([])
    with pytest.raises(ValueError, match="padding_side"):
        tokenizer("a", padding_side="top")
    with pytest.raises(ValueError, match="return_tensors='pt'"):
        tokenizer("a", return_tensors="tf")
    with pytest.raises(ValueError, match=r"vocab_size >= 257"):
        Tokenizer.train_bpe("a", 256, eos_token="<eos>")
    with pytest.raises(ValueError, match="neither texts= nor files="):
        Tokenizer.train_bpe(vocab_size=300)
    with pytest.raises(ValueError, match="received none"):
        Tokenizer.train_char([])
    with pytest.raises(ValueError, match="without spaces"):
        Tokenizer.bytes(eos_token="the end")
    with pytest.raises(ValueError, match="ASCII"):
        Tokenizer.bytes(eos_token="é")


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt.*0xe9 at position 3.*iconv"):
        Tokenizer.train_char(files=path)
