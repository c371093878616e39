"""Pushes beside a training run: one at a time, the newest only, and never at the run's cost. Knows no trainer."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)

_TERMINATE_SECONDS = 5.0  # for the pushing process to end by itself, before it is killed


class PushError(RuntimeError):
    """A push that did not go through; the message is the reason."""


@dataclass(frozen=True)
class Snapshot:
    """What a push is to send: `folder`, once `write` has completed it. Nobody else touches the folder."""

    step: int
    folder: Path
    write: Callable[[], None]

    def discard(self) -> None:
        """Remove it from the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Push(Protocol):
    """Sends one snapshot."""

    def __call__(self, snapshot: Snapshot) -> str:
        """Send the snapshot's folder; the commit's address. Runs in the background's thread. Raises `PushError`."""

    def abort(self) -> None:
        """Make a running call, and every later one, raise at once; called from another thread."""


class BackgroundPush:
    """Pushes snapshots in a thread: at most one is in flight, and a newer one replaces one that still waits.

    A push that fails is a warning; the next snapshot is the next attempt. All methods are for one thread, the run's.

    Fields:
        commit_url: of the latest push that went through. failure: why the latest one has not, `None` if it has.
        kept: the folder that stays when its push fails.
    """

    def __init__(self, push: Push) -> None:
        self._push = push
        self._changed = threading.Condition()
        self._waiting: Snapshot | None = None
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self.commit_url: str | None = None
        self.failure: str | None = None
        self.kept: Path | None = None

    def submit(self, snapshot: Snapshot, *, keep: bool = False) -> None:
        """Push the snapshot as soon as no other push is in flight. `keep`: its folder stays if that fails."""
        with self._changed:
            replaced, self._waiting = self._waiting, snapshot
            self.kept = snapshot.folder if keep else None
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tlstm-push", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if replaced is not None:
            logger.info("step %d is not pushed: the push before it still runs, and step %d is newer",
                        replaced.step, snapshot.step)  # fmt: skip
            replaced.discard()

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is in flight or waiting, at most so long; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and self._waiting is None, seconds)

    def close(self) -> None:
        """Abandon what is in flight or waits. The Hub then holds what the last completed push has left."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, None
            busy, thread = self._busy, self._thread
            self._changed.notify_all()
        if waiting is not None and waiting.folder != self.kept:
            waiting.discard()
        if busy:
            logger.warning("a push to the Hub was abandoned; the repo holds the model from before it, or the new one")
        self._push.abort()
        if thread is not None:
            thread.join(2 * _TERMINATE_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting is not None)
                snapshot, self._waiting = self._waiting, None
                if self._closed or snapshot is None:
                    return
                self._busy = True
            self._attempt(snapshot)
            del snapshot  # it holds a copy of the model
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _attempt(self, snapshot: Snapshot) -> None:
        url, failure = None, None
        try:
            snapshot.write()
            url = self._push(snapshot)
        except Exception as error:  # whatever it is, the run goes on, and its user is told
            failure = " ".join(str(error).split()) or type(error).__name__
        with self._changed:
            self.commit_url, self.failure = url or self.commit_url, failure
            kept, closed = self.kept, self._closed
        if failure is None:
            logger.info("pushed step %d: %s", snapshot.step, url)
        elif not closed:
            logger.warning("step %d could not be pushed: %s", snapshot.step, failure)
        if failure is None or snapshot.folder != kept:
            snapshot.discard()


class PushCommand:
    """`tlstm push` in a process of its own: it costs the run nothing, and can be ended at any moment.

    Args:
        repo_id, private, revision: as for `tlstm push`. token: passed on in the environment, never on a command line.
    """

    def __init__(self, repo_id: str, *, private: bool, revision: str | None, token: str | None) -> None:
        self.repo_id, self.token = repo_id, token
        self.flags = [*(["--private"] if private else []), *(["--revision", revision] if revision is not None else [])]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._aborted = False

    def by_hand(self, folder: Path) -> str:
        """The command that does the same, for people."""
        return shlex.join(["tlstm", "push", str(folder), self.repo_id, *self.flags])

    def __call__(self, snapshot: Snapshot) -> str:
        command = [sys.executable, "-m", "tlstm", "push", str(snapshot.folder.resolve()), self.repo_id, *self.flags]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TMPDIR": str(snapshot.folder.resolve().parent),  # on the run's disk, and tidied up with it
        }
        if self.token is not None:
            environment["HF_TOKEN"] = self.token
        with self._lock:
            if self._aborted:
                raise PushError("abandoned")
            # In a session of its own: a Ctrl-C for the run is not for the push, which `abort` ends.
            self._process = process = subprocess.Popen(
                [*command, "--message", f"Step {snapshot.step}"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment, start_new_session=True,
            )  # fmt: skip
        output, errors = process.communicate()
        if process.returncode:
            lines = errors.strip().splitlines() or [f"it ended with status {process.returncode}"]
            raise PushError(lines[-1].removeprefix("tlstm: error: "))
        return output.strip()

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(_TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
