"""Checkpoint folders: whole or absent, however their writing ends."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from training_samples import make_model

from tlstm.training import checkpoint
from tlstm.training.checkpoint import Checkpoint, list_checkpoints, prune, read_checkpoint, write_checkpoint
from tlstm.training.distributed import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


class Killed(BaseException):
    """The process ends here."""


def content(step: int) -> Checkpoint:
    tensors = {"model": {"w": torch.full((3, 5), float(step))}, "processes": {"h": torch.arange(step % 7)}}
    return Checkpoint(tensors, {"number": step})


def assert_whole(path: Path, step: int) -> None:
    read = read_checkpoint(path)
    assert read.values["number"] == read.values["step"] == step
    for group, tensors in content(step).tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(read.tensors[group][name], tensor)


def test_killed_at_every_write_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever operation on the file system is the last one, the newest checkpoint is whole: the old or the new one."""
    calls = {"left": 10**9}

    def mortal(function):
        def call(*args, **kwargs):
            if calls["left"] == 0:
                raise Killed
            calls["left"] -= 1
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (checkpoint, "write_tensors"), (os, "replace"), (os, "fsync"), (Path, "mkdir"), (Path, "write_text"),
        (checkpoint.shutil, "rmtree"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, mortal(getattr(owner, name)))
    outcomes = []
    for survived in range(40):
        folder = tmp_path / str(survived)
        write_checkpoint(folder, 10, content(10))
        write_checkpoint(folder, 20, content(20))
        calls["left"] = survived
        try:
            write_checkpoint(folder, 30, content(30))
            prune(folder, 1, set())
            outcomes.append("done")
        except Killed:
            outcomes.append(list_checkpoints(folder)[-1].name)
        calls["left"] = 10**9
        for path in list_checkpoints(folder):
            assert_whole(path, checkpoint.step_of(path))
        # The next run goes on as if nothing had happened.
        if outcomes[-1] == "step-00000020":
            write_checkpoint(folder, 30, content(30))
        prune(folder, 1, set())
        assert [path.name for path in folder.iterdir()] == ["step-00000030"]
        if outcomes[-1] == "done":
            break
    assert outcomes[0] == "step-00000020"
    assert "step-00000030" in outcomes
    assert outcomes[-1] == "done"
    assert len(outcomes) > 10


def test_prune_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    for step in (2, 10, 100, 100_000_000):
        write_checkpoint(tmp_path, step, content(step))
    (tmp_path / "step-notes").mkdir()
    prune(tmp_path, 2, {2})
    assert [checkpoint.step_of(path) for path in list_checkpoints(tmp_path)] == [2, 100, 100_000_000]
    assert (tmp_path / "step-notes").exists()


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a training checkpoint with trainer.json"):
        read_checkpoint(tmp_path)
    path = write_checkpoint(tmp_path, 3, content(3))
    for damage in (b"", b"\x00" * 50, (path / "model.safetensors").read_bytes()[:-4]):
        (path / "model.safetensors").write_bytes(damage)
        with pytest.raises(ValueError, match=r"model.safetensors: damaged or missing .* resume from an earlier"):
            read_checkpoint(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: damaged or missing"):
        read_checkpoint(path)
    (path / "trainer.json").write_text("{")
    with pytest.raises(ValueError, match=r"trainer.json: not valid JSON"):
        read_checkpoint(path)
    (path / "trainer.json").write_text('{"format": "tlstm-training-9"}')
    with pytest.raises(ValueError, match=r"trainer.json: expected a checkpoint of format 'tlstm-training-1'"):
        read_checkpoint(path)


def test_parameters_of_another_model_are_refused() -> None:
    model = make_model()
    tensors = {name: torch.zeros_like(p) for name, p in make_model(layer_sizes=[13, 7]).named_parameters()}
    with pytest.raises(ValueError, match=r"here: the checkpoint is of another model; they differ in .*lm_head.weight"):
        checkpoint.fill_parameters(model, tensors, Path("here"))


def test_random_generators_continue() -> None:
    def draw() -> list[float]:
        return [
            torch.randn(()).item(), torch.rand(3).sum().item(), random.random(), random.gauss(0, 1), np.random.rand(),
            np.random.standard_normal(),
        ]  # fmt: skip

    for _ in range(2):  # the second time, the Gaussian generators hold a spare value
        saved = checkpoint.random_state(ALONE)
        shapes = {name: tensor.shape for name, tensor in saved.items()}
        expected = draw()
        checkpoint.set_random_state(saved, ALONE)
        assert draw() == expected
        random.gauss(0, 1)
        np.random.standard_normal()
        assert {name: tensor.shape for name, tensor in checkpoint.random_state(ALONE).items()} == shapes
