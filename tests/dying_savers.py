"""Checkpoints that show a mix at once, and processes that save them and die at a chosen moment.

Each checkpoint carries one number, its generation, in every tensor and every file: a reader that sees two numbers has
seen a mix. Savers are forked, so that a real SIGKILL can end them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tlstm.checkpoint import folder_swap, tensor_file
from tlstm.checkpoint.files import FolderView, open_checkpoint, read_consistently, save_checkpoint

FORMS = {"single": 10**9, "shards": 120, "more shards": 40}  # max_shard_size: 1, 2 and 5 files
TENSORS = 5


@contextmanager
def in_memory(otherwise: Path) -> Iterator[Path]:
    """A folder in memory where the system offers that: what a killed process wrote stays, and saves do not wait."""
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(prefix="tlstm-test-", dir="/dev/shm") as folder:
            yield Path(folder)
    else:
        yield otherwise


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

    fsync, save_file = os.fsync, tensor_file.save_file

    def counted_fsync(descriptor: int) -> None:
        tick()
        fsync(descriptor)

    def counted_save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        tick()  # here the file is half written
        path.write_bytes(whole)

    os.fsync, tensor_file.save_file = counted_fsync, counted_save_file
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
