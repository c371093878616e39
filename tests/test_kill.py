"""A save that dies at any point, or that others read or write meanwhile, leaves the old checkpoint or the new one, whole.

Each checkpoint here carries one number, its generation, in every tensor and every file; a reader that sees two numbers
has seen a mix. Savers are forked, so that a real SIGKILL can end them.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tlstm import checkpoint_files, folder_swap
from tlstm.checkpoint_files import CheckpointError, FolderView, open_checkpoint, read_consistently, save_checkpoint
from tlstm.config import LSTMConfig
from tlstm.pretrained import PreTrainedModel

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="these tests kill forked processes; POSIX only")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process wrote stays in the page cache, so fsync decides nothing here; its order has its own test."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


FORMS = {"single": 10**9, "shards": 120, "more shards": 40}  # max_shard_size: 1, 2 and 5 files
TENSORS = 5


def save(folder: Path, generation: int, form: str = "single") -> None:
    tensors = {f"t{i}": torch.full((7,), float(generation)) for i in range(TENSORS)}
    files = {
        name: json.dumps({"generation": generation}).encode()
        for name in ("config.json", "tokenizer.json", "figures/loss.json")
    }
    save_checkpoint(folder, tensors, files, max_shard_size=FORMS[form])


def load(folder: Path) -> int:
    """The one generation that every part of the checkpoint shows."""

    def read(view: FolderView) -> set[float]:
        seen = {json.loads(view.read_bytes(n))["generation"] for n in ("tokenizer.json", "figures/loss.json")}
        with open_checkpoint(view) as stored:
            assert sorted(stored.headers) == [f"t{i}" for i in range(TENSORS)]
            seen |= {value for name in stored.headers for value in stored.tensor(name).tolist()}
        return seen | {json.loads(view.read_bytes("config.json"))["generation"]}

    (generation,) = read_consistently(folder, read)
    return int(generation)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def in_child(work: Callable[[], None]) -> int:
    """Fork a process that does `work`; its pid. Its exit status is 0, 1 for an exception, or the signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def status_of(pid: int) -> int:
    """0, the exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(step: int) -> None:
    """Kill this process just before its `step`-th operation on files: opening, renaming, removing, syncing, writing."""
    operations = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "os.chmod"}
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync, save_file = os.fsync, checkpoint_files.save_file

    def counted_fsync(descriptor: int) -> None:
        tick()
        fsync(descriptor)

    def counted_save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        tick()  # here the file is half written
        path.write_bytes(whole)

    os.fsync, checkpoint_files.save_file = counted_fsync, counted_save_file
    sys.addaudithook(lambda event, args: tick() if event in operations else None)


def save_and_die_after_commit(folder: Path, generation: int, form: str) -> None:
    """Leave the folder as a process killed between the commit and the first move leaves it."""

    def dying_save() -> None:
        def die(folder: Path) -> None:
            if (folder / ".tlstm-commit.json").exists():
                os.kill(os.getpid(), signal.SIGKILL)

        folder_swap._roll_forward = die
        save(folder, generation, form)

    assert status_of(in_child(dying_save)) == -signal.SIGKILL


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
    generation, progressed = 0, 0
    for _ in range(30):
        reader, writer = os.pipe()

        def saves_forever(start: int = generation, writer: int = writer) -> None:
            for number in range(start + 1, start + 10**6):
                save(tmp_path, number, random.choice(list(FORMS)))
                os.write(writer, number.to_bytes(8, "little"))

        pid = in_child(saves_forever)
        os.close(writer)
        time.sleep(rng.uniform(0.005, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert status_of(pid) == -signal.SIGKILL
        with open(reader, "rb") as pipe:
            reported = pipe.read()
        acknowledged = int.from_bytes(reported[-8:], "little") if reported else generation
        found = load(tmp_path)
        assert acknowledged <= found <= acknowledged + 1
        progressed += found > generation
        generation = found
    assert progressed > 3


@pytest.mark.parametrize("writers", [1, 2])
def test_readers_racing_writers_see_whole_checkpoints(tmp_path: Path, writers: int) -> None:
    save(tmp_path, 0)

    def saves(start: int) -> None:
        for number in range(start, start + 40):
            save(tmp_path, number, list(FORMS)[number % len(FORMS)])

    pids = {in_child(lambda start=100 * (i + 1): saves(start)) for i in range(writers)}
    seen = []
    while pids:
        seen.append(load(tmp_path))
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            assert status == 0
            pids.remove(done)
    assert len(set(seen)) > 5
    if writers == 1:
        assert seen == sorted(seen)
    assert load(tmp_path) in (139, 239)
    assert not any(name.startswith(".tlstm") for name in files_of(tmp_path))


class TestErrors:
    """Operations that fail while the process lives on: cleaned up, reported with a remedy, nothing lost."""

    def test_every_operation_failing_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        count, fail_at = 0, 0

        def failing(real: Callable) -> Callable:
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == fail_at:
                    raise OSError(errno.EIO, "Input/output error")
                return real(*args, **kwargs)

            return call

        outcomes = []
        while True:
            fail_at += 1
            folder = tmp_path / str(fail_at)
            save(folder, 1, "single")
            count = 0
            with monkeypatch.context() as patch:
                for name in ("replace", "fsync", "open", "mkdir", "listdir", "unlink"):
                    patch.setattr(os, name, failing(getattr(os, name)))
                patch.setattr(io, "open", failing(io.open))
                try:
                    save(folder, 2, "shards")
                    failed = False
                except OSError as error:
                    failed = True
                    assert error.errno == errno.EIO
                    assert str(folder) in str(error)
                    message = str(error)
            if count < fail_at:
                break
            found = load(folder)
            if failed:
                assert found == (2 if "committed" in message else 1)
                if found == 1:
                    assert not [path for path in folder.iterdir() if path.name.startswith(".tlstm-save-0")]
            else:
                assert found == 2  # only the lock file could not be removed
            outcomes.append(found)
            save(folder, 3, "single")
            assert load(folder) == 3
        assert {1, 2} == set(outcomes)
        assert len(outcomes) > 25

    @pytest.mark.parametrize("broken", ["weights", "config"])
    def test_a_full_disk_keeps_the_old_model_and_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
    ) -> None:
        save(tmp_path, 1, "shards")
        before = files_of(tmp_path)
        with monkeypatch.context() as patch:
            if broken == "weights":  # in safetensors' own words
                error: Exception = checkpoint_files.safetensors.SafetensorError(
                    "Error while serializing: I/O error: No space left on device (os error 28)"
                )
                patch.setattr(checkpoint_files, "save_file", _raiser(error))
            else:
                patch.setattr(Path, "write_bytes", _raiser(OSError(errno.ENOSPC, "No space left on device")))
            with pytest.raises(OSError, match="No space left.*unchanged.*free some space") as caught:
                save(tmp_path, 2, "single")
        assert caught.value.errno == errno.ENOSPC
        assert str(tmp_path) in str(caught.value)
        assert load(tmp_path) == 1
        assert files_of(tmp_path) == before
        assert not list(tmp_path.glob(".tlstm*"))

    def test_the_operating_system_refuses_to_write_more(self, tmp_path: Path) -> None:
        """The same without any patch: the kernel's file size limit stops the writer in the middle of a file."""
        save(tmp_path, 1)

        def limited() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            with pytest.raises(OSError, match="unchanged") as caught:
                save_checkpoint(tmp_path, {"t0": torch.zeros(5000)})
            assert caught.value.errno == errno.EFBIG

        assert status_of(in_child(limited)) == 0
        assert load(tmp_path) == 1
        assert not list(tmp_path.glob(".tlstm*"))

    def test_an_interrupt_right_after_the_commit_keeps_the_new_set(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 1, "single")
        replace = os.replace

        def interrupted(source: Path, target: Path) -> None:
            replace(source, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, 2, "shards")
        assert load(tmp_path) == 2
        save(tmp_path, 3, "single")
        assert load(tmp_path) == 3


def _raiser(error: Exception) -> Callable:
    def call(*args, **kwargs):
        raise error

    return call


def as_ordinary_user(work: Callable[[], None]) -> int:
    """Do `work` in a child without root's power to ignore permissions."""

    def child() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        work()

    return status_of(in_child(child))


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_read_only_folder_loads_and_refuses_to_be_saved_into(tmp_path: Path, interrupted: bool) -> None:
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if parent.stat().st_uid == os.geteuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    folder = tmp_path / "model"
    save(folder, 1, "shards")
    if interrupted:  # a committed save that nobody has finished, and in this folder nobody can
        save_and_die_after_commit(folder, 2, "single")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def use() -> None:
        assert load(folder) == (2 if interrupted else 1)
        with pytest.raises(PermissionError, match="make the folder writable or choose another"):
            save(folder, 3)

    try:
        assert as_ordinary_user(use) == 0
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


class TwoLayers(PreTrainedModel):
    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rnn = nn.LSTM(config.hidden_size, config.hidden_size, config.num_layers)


def test_a_model_killed_at_every_tenth_operation_loads_old_or_new(tmp_path: Path) -> None:
    """The same through `save_pretrained`, with config and weights of different shapes on the two sides of the commit."""
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
