"""Pushes beside a run, with stand-ins for the push itself: which are made, and what becomes of their folders."""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tlstm.training import background_push
from tlstm.training.background_push import BackgroundPush, PushCommand, PushError, Snapshot

LIMIT = 120.0  # seconds; only a hang takes so long


class HeldPush:
    """Says when it begins, ends when it is let go, and fails for the steps in `failing`."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.failing, self.sent = failing, []
        self.begun, self.let_go = threading.Semaphore(0), threading.Semaphore(0)
        self.aborted = threading.Event()
        self.in_flight = 0

    def __call__(self, snapshot: Snapshot) -> str:
        self.in_flight += 1
        assert self.in_flight == 1, "one at a time"
        self.begun.release()
        assert self.let_go.acquire(timeout=LIMIT)
        self.in_flight -= 1
        if self.aborted.is_set() or snapshot.step in self.failing:
            raise PushError(f"no luck with step {snapshot.step}")
        assert (snapshot.folder / "model").read_text() == str(snapshot.step)
        self.sent.append(snapshot.step)
        return f"commit of step {snapshot.step}"

    def abort(self) -> None:
        self.aborted.set()
        self.let_go.release()


@pytest.fixture
def snapshot(tmp_path: Path):
    def make(step: int) -> Snapshot:
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        return Snapshot(step, folder, lambda: (folder / "model").write_text(str(step)) and None)

    return make


@pytest.fixture
def background() -> Iterator:
    made: list[BackgroundPush] = []

    def make(push: HeldPush) -> BackgroundPush:
        made.append(BackgroundPush(push))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_the_newest_replaces_the_one_that_waits(snapshot, background, tmp_path: Path) -> None:
    push = HeldPush()
    pushes = background(push)
    pushes.submit(snapshot(1))
    assert push.begun.acquire(timeout=LIMIT)
    for step in (2, 3, 4):  # none of these waits for the first
        pushes.submit(snapshot(step))
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-4"}
    assert not pushes.wait(0)
    push.let_go.release(2)
    assert pushes.wait(LIMIT)
    assert push.sent == [1, 4]
    assert (pushes.commit_url, pushes.failure) == ("commit of step 4", None)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_told_and_the_next_is_tried(snapshot, background, tmp_path: Path, caplog) -> None:
    push = HeldPush(failing=(1,))
    pushes = background(push)
    push.let_go.release(2)
    pushes.submit(snapshot(1))
    assert pushes.wait(LIMIT)
    assert (pushes.commit_url, pushes.failure) == (None, "no luck with step 1")
    assert "step 1 could not be pushed: no luck with step 1" in caplog.text
    pushes.submit(snapshot(2))
    assert pushes.wait(LIMIT)
    assert (push.sent, pushes.failure) == ([2], None)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_a_failure(background, tmp_path: Path) -> None:
    def write() -> None:
        raise OSError("disk full")

    pushes = background(HeldPush())
    pushes.submit(Snapshot(1, tmp_path / "step-1", write))
    assert pushes.wait(LIMIT)
    assert pushes.failure == "disk full"


@pytest.mark.parametrize("keep", [True, False])
def test_the_last_one_is_kept_where_asked(snapshot, background, tmp_path: Path, keep: bool) -> None:
    push = HeldPush(failing=(1,))
    pushes = background(push)
    push.let_go.release()
    pushes.submit(snapshot(1), keep=keep)
    assert pushes.wait(LIMIT)
    assert (tmp_path / "step-1").exists() == keep


def test_closing_ends_what_is_in_flight_and_forgets_what_waits(snapshot, background, tmp_path: Path, caplog) -> None:
    push = HeldPush()
    pushes = background(push)
    pushes.submit(snapshot(1))
    assert push.begun.acquire(timeout=LIMIT)
    pushes.submit(snapshot(2))
    pushes.close()
    pushes._thread.join(LIMIT)
    assert push.sent == []
    assert "a push to the Hub was abandoned" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for Python")
@pytest.mark.parametrize("ending", ["", "trap '' TERM"], ids=["willing", "stubborn"])
def test_a_process_that_does_not_end_is_ended(snapshot, background, tmp_path: Path, monkeypatch, ending: str) -> None:
    monkeypatch.setattr(background_push, "_TERMINATE_SECONDS", 0.05)
    script, ready = tmp_path / "python", tmp_path / "ready"
    # It tells that it runs through a pipe: opening that blocks until both ends are there.
    script.write_text(f"#!/bin/sh\n{ending}\necho > {ready}\nwhile :; do read line < {ready}; done\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    os.mkfifo(ready)
    monkeypatch.setattr(background_push.sys, "executable", str(script))
    command = PushCommand("user/name", private=True, revision="dev", token="secret")
    pushes = BackgroundPush(command)
    pushes.submit(snapshot(1))
    with open(ready) as pipe:
        pipe.readline()
    pushes.close()
    pushes._thread.join(LIMIT)
    assert command._process is not None
    assert command._process.wait(LIMIT) != 0
    assert not (tmp_path / "step-1").exists()
    with pytest.raises(PushError, match="abandoned"):
        command(snapshot(2))
    assert command.by_hand(Path("run/hub/step-2")) == "tlstm push run/hub/step-2 user/name --private --revision dev"


def test_a_process_that_fails_says_why(snapshot, tmp_path: Path, monkeypatch) -> None:
    """The real command, on a folder that holds no checkpoint: refused before anything would be sent."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    one = snapshot(1)
    with pytest.raises(PushError, match=r"config\.json"):
        PushCommand("user/name", private=False, revision=None, token=None)(one)
