"""A run that pushes to a loopback Hub as it goes, and one that is taken up from there."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hub.loopback import LoopbackHub
from hub.store import Repo
from huggingface_hub import ModelCard
from safetensors.torch import load
from training_samples import VOCABULARY, assert_same_run, make_trainer

from tlstm import Tokenizer
from tlstm.training import background_push, pushes
from tlstm.training.checkpoint import checkpoint_path, read_checkpoint

LIMIT = 120.0  # seconds; only a hang takes so long
MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors", "training.json"}
COMMIT = "POST /api/models/.*/commit/"


@pytest.fixture
def hub(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The pushing processes take their settings from this one's environment; weights travel by Git LFS."""
    for variable in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    for variable, value in {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_owner", "HF_HUB_DISABLE_XET": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(variable, value)
    hub.lfs_suffixes = (".safetensors",)
    return hub


class HeldRepo:
    """A repo whose commits wait until they are let go; the first does `at_reached` when it comes."""

    def __init__(self, hub: LoopbackHub, name: str, at_reached=lambda: None) -> None:
        self.repo = hub.repos[name] = Repo(name)
        self.reached, self.let_go = threading.Event(), threading.Event()
        commit = self.repo.commit

        def commit_when_let_go(*args):
            if not self.reached.is_set():
                self.reached.set()
                at_reached()
            assert self.let_go.wait(LIMIT)
            return commit(*args)

        self.repo.commit = commit_when_let_go


def titles(hub: LoopbackHub, name: str, revision: str = "main") -> list[str]:
    """Of all commits but the first, oldest first."""
    return [commit.title for commit in hub.repos[name].history(revision)][-2::-1]


def at_step(step: int, do) -> list:
    """Callbacks that call `do` once, at the first record from `step` on."""
    pending = [do]
    return [lambda record: record["step"] >= step and pending and pending.pop()()]


def wait_for(event: threading.Event) -> None:
    assert event.wait(LIMIT)


def test_the_run_goes_on_and_the_newest_is_pushed(hub, name: str, tmp_path: Path, monkeypatch, caplog) -> None:
    """The push of step 10 hangs until the run has ended; those of 20 and 30 are given up for newer ones."""
    caplog.set_level("INFO")
    held = HeldRepo(hub, name)
    submit = background_push.BackgroundPush.submit

    def submit_and_let_go(self, snapshot, *, keep=False):
        submit(self, snapshot, keep=keep)
        if keep:  # the last one
            held.let_go.set()

    monkeypatch.setattr(background_push.BackgroundPush, "submit", submit_and_let_go)
    tokenizer = Tokenizer.train_char("abcdefghijk")
    assert tokenizer.vocab_size == VOCABULARY
    callbacks = at_step(11, lambda: wait_for(held.reached))
    options = {"tokenizer": tokenizer, "keep_last": 9, "plot": True, "save_dtype": "float16"}
    result = make_trainer(tmp_path / "run", callbacks=callbacks, hub_model_id=name, **options).train()
    repo = held.repo
    assert result.status == "finished"
    assert result.hub_url == f"{hub.url}/{name}/commit/{repo.head}"
    assert titles(hub, name) == ["Step 10", "Step 40"]
    for step, newer in ((20, 30), (30, 40)):
        assert f"step {step} is not pushed: the push before it still runs, and step {newer} is newer" in caplog.text
    files = MODEL | {"tokenizer.json", "tokenizer_config.json"}
    finished, first = (commit.files for commit in repo.history("main")[:2])
    assert set(first) == files | {".gitattributes"}
    assert set(finished) == files | {".gitattributes", "loss.png"}
    for file in files - {"README.md"} | {"loss.png"}:
        assert finished[file].content == (tmp_path / "run" / "model" / file).read_bytes()
    # What was pushed in between are the averages of that step, as they would have been exported.
    average = read_checkpoint(checkpoint_path(tmp_path / "run" / "checkpoints", 10)).tensors["average"]
    pushed = load(first["model.safetensors"].content)
    assert pushed.keys() == average.keys()
    assert all(torch.equal(pushed[key], tensor.half()) for key, tensor in average.items())
    cards = [ModelCard(files["README.md"].content.decode()) for files in (first, finished)]
    assert ["Training is not finished: step 10 of 40" in card.text for card in cards] == [True, False]
    losses = {entry.metric_type: entry.metric_value for entry in cards[1].data.eval_results}
    assert losses["loss"] == round(result.figures["valid"][0]["loss"], 4)
    assert "(loss.png)" in cards[1].text
    assert not (tmp_path / "run" / "hub").exists()
    make_trainer(tmp_path / "alone", **options).train()
    assert_same_run(tmp_path / "run", tmp_path / "alone", 40)


def test_a_failed_push_costs_nothing_and_can_be_made_by_hand(
    hub, lfs_client, name: str, tmp_path: Path, caplog
) -> None:
    fault = hub.fault("status", COMMIT, status=403, times=None)
    result = make_trainer(tmp_path, hub_model_id=name, hub_strategy="end").train()
    assert (result.status, result.exit_code, result.hub_url) == ("finished", 0, None)
    assert fault.hits == 1
    assert "step 40 could not be pushed: " in caplog.text
    assert "403" in caplog.text
    command = shlex.split(caplog.text.split("push it by hand: ")[1].splitlines()[0])
    assert command == ["tlstm", "push", str(tmp_path / "hub" / "step-00000040"), name]
    hub.faults.clear()
    assert lfs_client.run("result = tlstm_command(*arguments)", arguments=command[1:])[0] == 0
    exported = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert hub.repos[name].find("main").files["model.safetensors"].content == exported


def test_the_next_push_is_the_next_attempt(hub, name: str, tmp_path: Path, caplog) -> None:
    told = threading.Event()
    failed = background_push.logger.warning

    def warn(*args):
        failed(*args)
        told.set()

    hub.fault("status", COMMIT, status=403)
    options = {"hub_model_id": name, "hub_private": True, "hub_revision": "dev", "save_every": 20}
    trainer = make_trainer(tmp_path, callbacks=at_step(21, lambda: wait_for(told)), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background_push.logger, "warning", warn)
        result = trainer.train()
    assert result.hub_url is not None
    assert "step 20 could not be pushed" in caplog.text
    assert hub.repos[name].private
    assert (titles(hub, name), titles(hub, name, "dev")) == ([], ["Step 40"])
    assert not (tmp_path / "hub").exists()


def test_a_snapshot_that_cannot_be_taken_costs_nothing(hub, name: str, tmp_path: Path, monkeypatch, caplog) -> None:
    def no_memory(trainer):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(pushes.export, "host_copy", no_memory)
    result = make_trainer(tmp_path, hub_model_id=name).train()
    assert result.hub_url is not None
    assert "step 10 could not be pushed: not enough memory" in caplog.text
    assert titles(hub, name) == ["Step 40"]


def test_an_interrupted_run_does_not_wait_for_a_push_that_hangs(hub, name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pushes, "GRACE_SECONDS", 0.1)
    held = HeldRepo(hub, name)
    trainer = make_trainer(tmp_path, hub_model_id=name)

    def stop() -> None:
        wait_for(held.reached)
        trainer.request_stop()

    trainer.callbacks += at_step(11, stop)
    try:
        result = trainer.train()
        assert (result.status, result.step, result.hub_url) == ("interrupted", 12, None)
        process = trainer.pushes._command._process
        assert process.wait(LIMIT) != 0
        assert titles(hub, name) == []
        assert not (tmp_path / "hub").exists()
    finally:
        held.let_go.set()


def test_an_interrupted_run_lets_a_push_end(hub, name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pushes, "GRACE_SECONDS", LIMIT)
    held = HeldRepo(hub, name)
    trainer = make_trainer(tmp_path, hub_model_id=name)

    def stop() -> None:
        wait_for(held.reached)
        trainer.request_stop()
        held.let_go.set()

    trainer.callbacks += at_step(11, stop)
    assert trainer.train().status == "interrupted"
    assert titles(hub, name) == ["Step 10"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of its own")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_wait_for_the_last_push(
    hub, name: str, tmp_path: Path, monkeypatch, caplog, number: int
) -> None:
    monkeypatch.setattr(pushes, "GRACE_SECONDS", 0.1)
    held = HeldRepo(hub, name, at_reached=lambda: os.kill(os.getpid(), number))
    trainer = make_trainer(tmp_path, hub_model_id=name, hub_strategy="end", max_steps=7)
    try:
        result = trainer.train()
        assert (result.status, result.step, result.hub_url) == ("finished", 7, None)
        assert trainer.pushes._command._process.wait(LIMIT) != 0
        staged = tmp_path / "hub" / "step-00000007"
        assert f"push it by hand: tlstm push {staged} {name}" in caplog.text
        assert {path.name for path in staged.iterdir()} == MODEL
    finally:
        held.let_go.set()


@pytest.mark.parametrize("export", ["last", "best"])
def test_a_run_is_taken_up_elsewhere(hub, lfs_client, name: str, tmp_path: Path, export: str) -> None:
    """Half of a run pushed, pulled into another folder, resumed: bit for bit the run that was never moved."""
    held = HeldRepo(hub, name)
    held.let_go.set()
    committed = lambda: wait_for(held.reached)  # noqa: E731
    whole = tmp_path / "whole"
    options = {"hub_model_id": name, "hub_strategy": "checkpoint", "hub_every_steps": 20, "export": export}
    make_trainer(whole, callbacks=at_step(21, committed), **options).train()
    assert titles(hub, name) == ["Step 20", "Step 40"]
    (finished, half) = hub.repos[name].history("main")[:2]
    steps = {file.split("/")[2] for file in half.files if file.startswith("training/checkpoints/")}
    assert "step-00000020" in steps
    former = any("step-00000020" in file for file in finished.files)
    assert export == "best" or not former, "the former training state goes in the same commit"
    pulled = lfs_client.run(
        """
        from training_samples import make_trainer
        from tlstm.training.pull import pull_run
        path = pull_run(name, folder, revision=revision)
        hub_settings = [key for key in json.loads((Path(folder) / "training_config.json").read_text()) if "hub" in key]
        make_trainer(Path(folder), export=export).train(resume=True)
        result = [path.name, hub_settings]
        """,
        name=name,
        folder=str(tmp_path / "moved"),
        revision=half.oid,
        export=export,
    )
    assert pulled == ["step-00000020", []]
    assert_same_run(tmp_path / "moved", whole, 40)
    assert torch.equal(*(exported(folder)["lm_head.weight"] for folder in (whole, tmp_path / "moved")))


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load((folder / "model" / "model.safetensors").read_bytes())


def test_command_line(hub, lfs_client, name: str, tmp_path: Path) -> None:
    """Train with a token on the command line, go on elsewhere, fine-tune: the token is nowhere to be found."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    hub.faults.clear()
    small = ("--hidden-size", "9", "--num-layers", "1", "--batch-size", "4", "--window", "7", "--schedule", "constant")

    def tlstm(*arguments: object) -> str:
        code, out, err = lfs_client.run(
            "result = tlstm_command(*arguments)", arguments=[str(argument) for argument in arguments]
        )
        assert code == 0, err
        return out

    data = ("--data", tmp_path / "text.txt")
    out = tlstm(
        "train", "--out", tmp_path / "first", *data, *small, "--max-steps", 4, "--hub-model-id", name, "--hub-token",
        "hf_owner", "--hub-strategy", "checkpoint", "--hub-every-steps", 9,
    )  # fmt: skip
    repo = hub.repos[name]
    assert f"hub     {name}, every 9 steps and at the end" in out
    assert f"hub     {hub.url}/{name}/commit/{repo.head}" in out
    for file, stored in repo.find("main").files.items():
        assert b"hf_owner" not in stored.content, file
    assert b"--hub-strategy checkpoint" in repo.find("main").files["README.md"].content
    for path in (tmp_path / "first").rglob("*"):
        assert path.is_dir() or b"hf_owner" not in path.read_bytes()

    out = tlstm("train", "--out", tmp_path / "second", *data, "--resume", f"{name}@main", "--max-steps", 8, "--no-plot")
    assert f"pulled  {name}@main\n" in out
    assert "hub  " not in out, "a pulled run pushes nowhere unless it is told to"
    tlstm("train", "--out", tmp_path / "first", "--resume", "--max-steps", 8, "--hub-model-id", "none", "--no-plot")
    assert torch.equal(*(exported(tmp_path / run)["lm_head.weight"] for run in ("first", "second")))

    out = tlstm("train", "--out", tmp_path / "third", *data, *small[4:], "--init", f"{name}@main", "--max-steps", 1)
    assert "1 LSTM layers, 9 wide" in out
    for out_dir, repo_id, message in (
        ("second", name, "holds a run already, up to step-00000008"),
        ("fourth", f"{name}-not", "so it was looked for on the Hub"),
    ):
        code, _, err = lfs_client.run(
            "result = tlstm_command('train', '--out', out, '--resume', repo_id)",
            out=str(tmp_path / out_dir),
            repo_id=repo_id,
        )
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_a_repo_without_a_training_state_is_told(hub, lfs_client, name: str, tmp_path: Path) -> None:
    lfs_client.run("causal_lm().push_to_hub(name); causal_lm().from_pretrained(name)", name=name)
    code, _, err = lfs_client.run(
        "result = tlstm_command('train', '--out', out, '--resume', name)", out=str(tmp_path / "run"), name=name
    )
    assert code == 2
    assert f"{name}: " in err
    assert "training" in err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_one_process_of_several_pushes(hub, name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tlstm", "train",
        "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--hidden-size", "9", "--num-layers", "1",
        "--batch-size", "4", "--window", "7", "--max-steps", "4", "--device", "cpu", "--no-plot",
        "--hub-model-id", name, "--hub-strategy", "checkpoint",
    ]  # fmt: skip
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, env=environment, check=True)
    assert titles(hub, name) == ["Step 4"]
    values = json.loads(hub.repos[name].find("main").files["training/checkpoints/step-00000004/trainer.json"].content)
    assert values["world_size"] == 2
