"""A run that was stopped, by request, by a signal or by SIGKILL in a save, ends as if it never had been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_samples import (
    DROPOUT,
    assert_same_run,
    log_without_times,
    make_config,
    make_data,
    make_model,
    make_trainer,
)

from tlstm import LSTMForCausalLM, Trainer
from tlstm.training import TrainingData, checkpoint

STEPS = 40
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from training_samples import make_trainer
from tlstm.training import checkpoint

how, out_dir, resume = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "resume"
trainer = make_trainer(out_dir)
train_step = trainer._train_step
def step_and_signal(batch):
    train_step(batch)
    if trainer.progress.step + 1 == 17:
        os.kill(os.getpid(), signal.Signals[how])
if how in ("SIGTERM", "SIGINT"):
    trainer._train_step = step_and_signal
if how == "SIGKILL":
    write_tensors = checkpoint.write_tensors
    def half_a_file(tensors, metadata, path):
        write_tensors(tensors, metadata, path)
        if path.parent.name == ".staged-00000020":
            with open(path, "r+b") as file:
                file.truncate(100)
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.write_tensors = half_a_file
sys.exit(trainer.train(resume=resume).exit_code)
"""


def in_subprocess(how: str, out_dir: Path, *, resume: bool = False) -> int:
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
    command = [sys.executable, "-c", SCRIPT, how, str(out_dir), "resume" if resume else "fresh"]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=False).returncode


@pytest.mark.parametrize("stops", [(1,), (17,), (10, 11), (22, 39)])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, uninterrupted: Path, stops: tuple[int, ...]) -> None:
    """Stopped at any step: first of all, in the middle of an epoch, between two records, at a checkpoint."""
    for index, stop in enumerate(stops):
        trainer = make_trainer(tmp_path)
        stop_at(trainer, stop)
        result = trainer.train(resume=index > 0)
        assert (result.status, result.step, result.exit_code) == ("interrupted", stop, 0)
    torch.manual_seed(99)  # the new process would have other generators
    result = make_trainer(tmp_path).train(resume=True)
    assert result.status == "finished"
    assert_same_run(tmp_path, uninterrupted, STEPS)
    exported, expected = (LSTMForCausalLM.from_pretrained(run / "model") for run in (tmp_path, uninterrupted))
    for mine, theirs in zip(exported.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_resumed_run_keeps_its_first_command(tmp_path: Path) -> None:
    first = make_trainer(tmp_path)
    first.command = "tlstm train --data tiny.txt"
    stop_at(first, 3)
    first.train()
    figures = make_trainer(tmp_path).train(resume=True).figures
    assert figures is not None
    assert figures["command"] == "tlstm train --data tiny.txt"


def stop_at(trainer: Trainer, step: int) -> None:
    train_step = trainer._train_step

    def step_and_stop(batch: object) -> None:
        train_step(batch)
        if trainer.progress.step + 1 == step:
            trainer.request_stop()

    trainer._train_step = step_and_stop


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "momentum": 0.5, "schedule": "plateau", "patience": 1, "random_window": True},
        {"autocast": "bf16", "gradient_accumulation": 3, "ema_decay": 0.0, "schedule": "step", "decay_after": 1},
    ],
    ids=["sgd-plateau-random", "bf16-accumulated-step"],
)
def test_other_recipes_resume_exactly(tmp_path: Path, options: dict) -> None:
    make_trainer(tmp_path / "whole", **options).train()
    trainer = make_trainer(tmp_path / "cut", **options)
    stop_at(trainer, 23)
    trainer.train()
    make_trainer(tmp_path / "cut", **options).train(resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole", STEPS)


def test_loss_scaling_resumes_exactly(tmp_path: Path) -> None:
    """The scaler of float16 runs, here in float32 with gradients that overflow in two steps: it falls and grows."""

    def scaled(out_dir: Path) -> Trainer:
        trainer = make_trainer(out_dir)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        overflow = lambda gradient: gradient / (trainer.progress.step not in (2, 21))  # noqa: E731
        trainer.model.lm_head.weight.register_hook(overflow)
        return trainer

    scaled(tmp_path / "whole").train()
    trainer = scaled(tmp_path / "cut")
    stop_at(trainer, 23)
    trainer.train()
    stopped = checkpoint.read_checkpoint(tmp_path / "cut" / "checkpoints" / "step-00000023").values["scaler"]
    assert stopped["scale"] == 2.0 ** (10 - 1 + 4 - 1)  # steps 3 to 20 double it four times
    assert stopped["_growth_tracker"] == 1
    trainer = scaled(tmp_path / "cut")
    trainer.train(resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole", STEPS)
    norms = [record["grad_norm"] for record in log_without_times(tmp_path / "cut") if record["event"] == "train"]
    assert norms[0] is None  # skipped, and still valid JSON
    assert norms[-1] > 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_save_and_exit(tmp_path: Path, uninterrupted: Path, name: str) -> None:
    assert in_subprocess(name, tmp_path) == 128 + signal.Signals[name]
    assert checkpoint.list_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000017"
    make_trainer(tmp_path).train(resume=True)
    assert_same_run(tmp_path, uninterrupted, STEPS)


def test_a_process_killed_in_the_middle_of_a_save(tmp_path: Path, uninterrupted: Path) -> None:
    assert in_subprocess("SIGKILL", tmp_path) == -signal.SIGKILL
    folder = tmp_path / "checkpoints"
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["step-00000010"]
    assert (folder / ".staged-00000020").exists()
    make_trainer(tmp_path).train(resume=True)
    assert_same_run(tmp_path, uninterrupted, STEPS)
    assert not list(folder.glob(".*"))


def test_a_second_sigint_aborts_at_once(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    train_step = trainer._train_step

    def step_and_signal(batch: object) -> None:
        train_step(batch)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer._train_step = step_and_signal
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "checkpoints").exists()


def test_resume_from_an_earlier_checkpoint_discards_what_came_after(tmp_path: Path, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    trainer = make_trainer(tmp_path)
    stop_at(trainer, 33)
    trainer.train(resume=folder / "step-00000030")
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["step-00000030", "step-00000033"]
    assert max(record["step"] for record in log_without_times(tmp_path)) == 33
    make_trainer(tmp_path).train(resume=True)
    assert_same_run(tmp_path, uninterrupted, STEPS)


def test_finished_run_resumes_to_its_export(tmp_path: Path) -> None:
    """Killed between the last checkpoint and the export: resuming writes the model."""
    first = make_trainer(tmp_path, max_steps=4).train()
    before = (first.model_dir / "model.safetensors").read_bytes()
    (first.model_dir / "model.safetensors").unlink()
    again = make_trainer(tmp_path, max_steps=4).train(resume=True)
    assert again.status == "finished"
    assert (again.model_dir / "model.safetensors").read_bytes() == before


def test_what_may_and_may_not_change(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=6).train()
    with pytest.raises(ValueError, match=r"holds a run already, up to step-00000006; resume it"):
        make_trainer(tmp_path, max_steps=6).train()
    with pytest.raises(ValueError, match=r"had other settings \(max_steps: 6 -> 9; lr: 0.005 -> 0.1\)"):
        make_trainer(tmp_path, max_steps=9, lr=0.1).train(resume=True)
    with pytest.raises(ValueError, match=r"a model with other settings: hidden_dropout"):
        make_trainer(tmp_path, make_model(**(DROPOUT | {"hidden_dropout": 0.3})), max_steps=6).train(resume=True)
    ids = make_data()
    other = TrainingData.from_ids(ids.train[::-1], ids.valid)
    with pytest.raises(ValueError, match="tokens are not those of the run to resume"):
        Trainer(make_model(**DROPOUT), config=make_config(max_steps=6), data=other, out_dir=tmp_path).train(resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        make_trainer(tmp_path / "new").train(resume=True)
    with pytest.raises(ValueError, match="not one of the checkpoints in"):
        make_trainer(tmp_path, max_steps=6).train(resume=tmp_path)
    assert make_trainer(tmp_path, max_steps=6, keep_last=5, log_every=1).train(resume=True).status == "finished"


def test_a_run_without_an_end_in_its_schedule_may_be_lengthened(tmp_path: Path) -> None:
    make_trainer(tmp_path / "whole", max_steps=30, schedule="constant").train()
    make_trainer(tmp_path / "longer", max_steps=15, schedule="constant").train()
    result = make_trainer(tmp_path / "longer", max_steps=30, schedule="constant").train(resume=True)
    assert result.step == 30
    one, other = (
        checkpoint.read_checkpoint(tmp_path / run / "checkpoints" / "step-00000030") for run in ("whole", "longer")
    )
    for name, tensor in one.tensors["model"].items():
        assert torch.equal(tensor, other.tensors["model"][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": ["../../model"]}, "expected a list of names as `groups`"),
        ({"groups": 3}, "expected a list of names as `groups`"),
        ({"groups": ["model"]}, "damaged, or written by something else"),
        ({"progress": {"step": 6, "magic": 1}}, "damaged, or written by something else"),
        ({"progress": None}, "damaged, or written by something else"),
        ({"config": []}, "damaged, or written by something else"),
    ],
)
def test_values_of_another_make_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    """A checkpoint may come from a repo of somebody else's."""
    values = make_trainer(tmp_path, max_steps=6).train().checkpoint / "trainer.json"
    values.write_text(json.dumps(json.loads(values.read_text()) | change))
    with pytest.raises(ValueError, match=message) as failure:
        make_trainer(tmp_path, max_steps=6).train(resume=True)
    assert str(values.parent) in str(failure.value)
