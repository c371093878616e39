"""A save killed at any point, or read or repeated meanwhile, leaves the old checkpoint or the new one, whole."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dying_savers import FORMS, die_at, files_of, in_child, in_memory, load, save, save_and_die_after_commit, status_of
from torch import nn

from tlstm.checkpoint.files import CheckpointError
from tlstm.config import LSTMConfig
from tlstm.pretrained import PreTrainedModel

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="these tests fork and kill processes; POSIX only")


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path) as folder:
        yield folder


@pytest.mark.parametrize(("old", "new"), [("single", "shards"), ("shards", "single"), ("shards", "more shards")])
def test_a_save_killed_before_every_single_operation_leaves_old_or_new(tmp_path: Path, old: str, new: str) -> None:
    before, clean = tmp_path / "before", tmp_path / "clean"
    save(before, 1, old)
    (before / "notes.txt").write_text("not ours")
    save(clean, 3, old)
    seen: list[int] = []
    for step in range(1, 1000):
        folder = Path(shutil.copytree(before, tmp_path / str(step)))

        def dying_save(folder: Path = folder, step: int = step) -> None:
            die_at(step)
            save(folder, 2, new)

        status = status_of(in_child(dying_save))
        if status == 0:  # there were fewer operations than `step`: all of them have been tried
            assert load(folder) == 2
            break
        assert status == -signal.SIGKILL
        seen.append(load(folder))
        # What the dead process left behind is neither in the way of the next save nor there after it.
        save(folder, 3, old)
        assert load(folder) == 3
        assert files_of(folder) == files_of(clean) | {"notes.txt"}
    assert len(seen) > 30
    assert seen == sorted(seen), "once committed, a save stays committed"
    assert set(seen) == {1, 2}


def test_a_first_save_killed_leaves_nothing_or_the_whole(tmp_path: Path) -> None:
    outcomes = set()
    for step in range(1, 1000):
        folder = tmp_path / str(step) / "new"

        def dying_save(folder: Path = folder, step: int = step) -> None:
            die_at(step)
            save(folder, 2, "shards")

        if status_of(in_child(dying_save)) == 0:
            break
        try:
            outcomes.add(load(folder))
        except CheckpointError:
            outcomes.add(None)
    assert outcomes == {None, 2}


def test_the_next_save_finishes_a_dead_one_and_may_die_too(tmp_path: Path) -> None:
    """Killed after the commit, then the repair killed at every step: the new set stays, and later saves go through."""
    save(tmp_path / "dead", 1, "single")
    save_and_die_after_commit(tmp_path / "dead", 2, "shards")
    step, dead_repairs = 1, 0
    while True:
        folder = Path(shutil.copytree(tmp_path / "dead", tmp_path / str(step)))

        def dying_repair(folder: Path = folder, step: int = step) -> None:
            die_at(step)
            save(folder, 3, "single")

        assert load(folder) == 2
        status = status_of(in_child(dying_repair))
        if status == 0:
            break
        assert load(folder) in (2, 3)
        dead_repairs += load(folder) == 2
        save(folder, 4, "single")
        assert load(folder) == 4
        assert not any(name.startswith(".tlstm") for name in files_of(folder))
        step += 1
    assert dead_repairs > 10


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """A process that saves without pause is killed: what it reported as saved is there, and everything is whole."""
    rng = random.Random(7)
    save(tmp_path, 0)
    generation = 0
    for _ in range(30):
        reader, writer = os.pipe()

        def saves_forever(start: int = generation, writer: int = writer) -> None:
            for number in range(start + 1, start + 10**6):
                save(tmp_path, number, random.choice(list(FORMS)))
                os.write(writer, number.to_bytes(8, "little"))

        pid = in_child(saves_forever)
        os.close(writer)
        with open(reader, "rb") as pipe:
            reported = pipe.read(8)  # however slow the machine, it has saved once: the kill falls in a later save
            time.sleep(rng.uniform(0.0, 0.04))
            os.kill(pid, signal.SIGKILL)
            assert status_of(pid) == -signal.SIGKILL
            reported += pipe.read()
        acknowledged = int.from_bytes(reported[-8:], "little")
        assert acknowledged > generation
        generation = load(tmp_path)
        assert acknowledged <= generation <= acknowledged + 1


@pytest.mark.parametrize("writers", [1, 2])
def test_readers_racing_writers_see_whole_checkpoints(tmp_path: Path, writers: int) -> None:
    folder, enough = tmp_path / "model", tmp_path / "enough"
    save(folder, 0)

    def saves(start: int) -> None:
        """Save until the reader has seen enough, at rest for about half of the time, on machines of any speed."""
        rng = random.Random(start)
        for number in itertools.count(start):
            began = time.monotonic()
            save(folder, number, list(FORMS)[number % len(FORMS)])
            if enough.exists():
                (tmp_path / f"last-{start}").write_text(str(number))
                return
            time.sleep((time.monotonic() - began) * rng.uniform(0.0, 2.0))

    pids = [in_child(lambda start=10**6 * (i + 1): saves(start)) for i in range(writers)]
    seen: list[int] = []
    while len(set(seen)) < 8:
        seen.append(load(folder))
        assert all(os.waitpid(pid, os.WNOHANG) == (0, 0) for pid in pids), "a writer died"
    enough.touch()
    assert [status_of(pid) for pid in pids] == [0] * writers
    if writers == 1:
        assert seen == sorted(seen)
    assert load(folder) in {int(path.read_text()) for path in tmp_path.glob("last-*")}
    assert not any(name.startswith(".tlstm") for name in files_of(folder))


class TwoLayers(PreTrainedModel):
    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rnn = nn.LSTM(config.hidden_size, config.hidden_size, config.num_layers)


def test_a_model_killed_at_every_tenth_operation_loads_old_or_new(tmp_path: Path) -> None:
    """The same through `save_pretrained`, with a config and weights of other shapes after the commit."""
    old, new = TwoLayers(LSTMConfig(vocab_size=13, hidden_size=7)), TwoLayers(LSTMConfig(vocab_size=17, hidden_size=5))
    loaded = set()
    for step in range(3, 1000, 10):
        folder = tmp_path / str(step)
        old.save_pretrained(folder, max_shard_size=1000)

        def dying_save(folder: Path = folder, step: int = step) -> None:
            die_at(step)
            new.save_pretrained(folder)

        finished = status_of(in_child(dying_save)) == 0
        model = TwoLayers.from_pretrained(folder)
        loaded.add(model.config.vocab_size)
        expected = {13: old, 17: new}[model.config.vocab_size].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        if finished:
            break
    assert loaded == {13, 17}
