"""Text to token ids to batches: exact splits, exact windows, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlstm import Tokenizer
from tlstm.training import StreamBatches, TrainingData
from tlstm.training.data import tokenize

TEXT = "To be, or not to be:\nthat is the question — whether 'tis nobler\n" * 5


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.train_char(TEXT)


def test_text_is_tokenised_once_and_split_exactly(tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    read = lambda: TrainingData.from_text(tmp_path / "text.txt", tokenizer, tmp_path / "cache", valid_fraction=0.1)  # noqa: E731
    data = read()
    ids = tokenizer.encode(TEXT)
    boundary = int(0.9 * len(TEXT))
    assert data.train.tolist() == ids[:boundary]
    assert data.valid.tolist() == ids[boundary:]
    assert isinstance(data.train, np.memmap)
    assert data.train.dtype == np.uint16
    assert data.description["text"]["characters"] == len(TEXT)
    assert data.description["text"]["bytes"] == len(TEXT.encode())

    encoded = []
    monkeypatch.setattr(Tokenizer, "encode_array", lambda self, text: encoded.append(text) or np.array(ids))
    assert read().train.tolist() == ids[:boundary]
    assert encoded == []  # from the cache
    (tmp_path / "text.txt").write_text(TEXT + "!", encoding="utf-8")
    read()
    assert encoded == [TEXT + "!"]  # another text of the same name


def test_cache_notices_another_tokenizer_and_a_damaged_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    first, _ = tokenize(tmp_path / "text.txt", tokenizer, tmp_path, "ids")
    assert tokenize(tmp_path / "text.txt", Tokenizer.bytes(), tmp_path, "ids")[0].tolist() == list(TEXT.encode())
    for damage in (b"{", b"[]", json.dumps({"tokens": 3}).encode()):
        (tmp_path / "ids.json").write_bytes(damage)
        assert tokenize(tmp_path / "text.txt", tokenizer, tmp_path, "ids")[0].tolist() == first.tolist()
    with open(tmp_path / "ids.bin", "r+b") as file:
        file.truncate(20)
    assert len(tokenize(tmp_path / "text.txt", tokenizer, tmp_path, "ids")[0]) == len(TEXT)


def test_folder_joins_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for name, text in (("b.txt", "zweite"), ("a.txt", "erste"), ("deep/c.txt", "dritte"), ("note.md", "no")):
        (tmp_path / "texts" / name).write_text(text)
    plain, _ = tokenize(tmp_path / "texts", Tokenizer.bytes(), tmp_path / "cache", "plain")
    assert bytes(plain.tolist()) == b"erstezweitedritte"
    ending = Tokenizer.bytes(eos_token="<eos>")
    ids, source = tokenize(tmp_path / "texts", ending, tmp_path / "cache", "ending")
    expected = [*b"erste", 256, *b"zweite", 256, *b"dritte", 256]
    assert ids.tolist() == expected
    assert source["files"] == 3


def test_text_errors(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def read(name: str) -> None:
        tokenize(tmp_path / name, tokenizer, tmp_path / "cache", "x")

    with pytest.raises(FileNotFoundError, match=r"missing.txt: no such file"):
        read("missing.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected a folder with \*.txt files, found none"):
        read("empty")
    (tmp_path / "nothing.txt").touch()
    with pytest.raises(ValueError, match=r"nothing.txt: expected text"):
        read("nothing.txt")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt: expected UTF-8 text, byte 2"):
        read("latin.txt")
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-written stays
    with pytest.raises(ValueError, match=r"token ids from 1 to 12, but the model's vocab_size is 12"):
        TrainingData.from_ids([1, 12]).check_vocabulary(12)
    with pytest.raises(ValueError, match=r"validation data holds token ids from -1"):
        TrainingData.from_ids([1], [-1]).check_vocabulary(12)
    with pytest.raises(ValueError, match=r"train: expected a one-dimensional sequence of token ids, got float"):
        TrainingData.from_ids(torch.ones(3))


@given(
    batch_size=st.integers(1, 7), window=st.integers(1, 9), extra=st.integers(0, 200), random_window=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_windows_follow_each_other_in_every_stream(
    batch_size: int, window: int, extra: int, random_window: bool, seed: int
) -> None:
    """With ids = positions, each stream must count upwards by one across all windows of an epoch, targets one ahead."""
    ids = np.arange((batch_size + 1) * window + extra)
    batches = StreamBatches(ids, batch_size=batch_size, window=window, random_window=random_window, seed=seed)
    total = batches.steps(2)
    epochs: list[list] = []
    for _ in range(total):
        batch = next(batches)
        if batch.starts_epoch:
            epochs.append([])
        epochs[-1].append(batch)
        assert torch.equal(batch.targets, batch.inputs + 1)
    assert len(epochs) == 2
    assert batch.ends_epoch
    for epoch in epochs:
        walked = torch.cat([batch.inputs for batch in epoch], dim=1)
        assert (walked.diff(dim=1) == 1).all()
        assert 0 <= walked[0, 0] < window
        assert (walked[:, 0].diff() == batches.length).all()  # the streams lie end to end
        assert walked.shape[1] > batches.length - max(window, 5)  # less than one window is left over
        if not random_window:
            assert {batch.inputs.shape[1] for batch in epoch} == {window}


def test_epochs_have_their_own_offsets_and_position_is_restored() -> None:
    ids = np.arange(3000)
    make = lambda: StreamBatches(ids, batch_size=3, window=35, random_window=True, seed=4)  # noqa: E731
    batches, copy = make(), make()
    starts = {batches.plan(epoch)[0] for epoch in range(20)}
    assert len(starts) > 10
    for _ in range(41):
        next(batches)
    copy.load_state_dict(json.loads(json.dumps(batches.state_dict())))
    assert copy.epochs_done == batches.epochs_done
    for _ in range(40):
        assert torch.equal(next(copy).inputs, next(batches).inputs)


def test_random_windows_have_the_lengths_of_awd_lstm() -> None:
    batches = StreamBatches(np.zeros(2_000_000, np.uint8), batch_size=2, window=70, random_window=True)
    lengths = np.array(batches.plan(0)[1][:-1])
    short = lengths[lengths < 52]
    assert len(short) / len(lengths) == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / len(lengths)) ** 0.5)
    # `int` cuts half a token off on average.
    assert lengths[lengths >= 52].mean() == pytest.approx(69.5, abs=4 * 5 / len(lengths) ** 0.5)
    assert short.mean() == pytest.approx(34.5, abs=4 * 5 / len(short) ** 0.5)


def test_processes_take_blocks_of_the_global_batch() -> None:
    ids = np.arange(500)
    whole = StreamBatches(ids, batch_size=6, window=7, seed=2)
    parts = [StreamBatches(ids, batch_size=6, window=7, seed=2, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(25):
        assert torch.equal(next(whole).inputs, torch.cat([next(part).inputs for part in parts]))
    with pytest.raises(ValueError, match="expected a multiple of the 4 processes, got 6"):
        StreamBatches(ids, batch_size=6, window=7, world_size=4)


def test_shortest_text() -> None:
    assert StreamBatches(np.arange(28), batch_size=3, window=7).steps(1) == 1
    with pytest.raises(ValueError, match=r"at least 28 tokens, got 27; use a smaller batch_size"):
        StreamBatches(np.arange(27), batch_size=3, window=7)
