"""A save that fails while the process lives on: the old checkpoint stays, the error says why, nothing is left lying."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from dying_savers import files_of, in_child, in_memory, load, save, save_and_die_after_commit, status_of

from tlstm.checkpoint import folder_swap, tensor_file
from tlstm.checkpoint.files import save_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="these tests fork and kill processes; POSIX only")


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path) as folder:
        yield folder


def test_every_operation_failing_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            caught = None
            try:
                save(folder, 2, "shards")
            except OSError as error:
                caught = error
        if count < fail_at:
            break
        found = load(folder)
        if caught is None:
            assert found == 2  # what failed was the removal of something that may as well stay
        else:
            assert caught.errno == errno.EIO
            assert str(folder) in str(caught)
            assert found == (2 if "committed" in str(caught) else 1)
        outcomes.append(found)
        save(folder, 3, "single")
        assert load(folder) == 3
    assert {1, 2} == set(outcomes)
    assert len(outcomes) > 25


@pytest.mark.parametrize("broken", ["weights", "config"])
def test_a_full_disk_keeps_the_old_model_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    save(tmp_path, 1, "shards")
    before = files_of(tmp_path)
    with monkeypatch.context() as patch:
        if broken == "weights":  # in safetensors' own words
            error: Exception = tensor_file.safetensors.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
            patch.setattr(tensor_file, "save_file", _raiser(error))
        else:
            patch.setattr(Path, "write_bytes", _raiser(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match=r"No space left.*unchanged.*free some space") as caught:
            save(tmp_path, 2, "single")
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert load(tmp_path) == 1
    assert files_of(tmp_path) == before
    assert not list(tmp_path.glob(".tlstm*"))


def test_the_operating_system_refuses_to_write_more(tmp_path: Path) -> None:
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


def test_an_interrupt_right_after_the_commit_keeps_the_new_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_lock_on_a_file_that_its_last_holder_removed_guards_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the lock file and locking it, the writer before us finished and removed it."""
    import fcntl

    flock, removed = fcntl.flock, []

    def flock_after_removal(descriptor: int, operation: int) -> None:
        if not removed:
            (tmp_path / folder_swap.LOCK).unlink()
            removed.append(True)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with folder_swap._folder_lock(tmp_path):
        second = os.open(tmp_path / folder_swap.LOCK, os.O_RDWR)  # as the next writer would: the name must be locked
        with pytest.raises(BlockingIOError):
            flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(second)
    assert not list(tmp_path.iterdir())


def test_waiting_for_another_writer_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(folder_swap, "_LOCK_TIMEOUT", 0.05)
    with folder_swap._folder_lock(tmp_path), pytest.raises(TimeoutError, match=r"another process.*unchanged"):
        save(tmp_path, 2)
    assert load(tmp_path) == 1


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
    for parent in (tmp_path, *tmp_path.parents):  # the other user must get this far
        mode = stat.S_IMODE(parent.stat().st_mode)
        if not mode & stat.S_IXOTH:
            parent.chmod(mode | stat.S_IXOTH)
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
