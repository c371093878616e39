"""The training loop against plain torch, and what a finished run leaves behind."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_samples import DROPOUT, log_without_times, make_config, make_data, make_model, make_trainer

from tlstm import LSTMForCausalLM, Tokenizer, Trainer
from tlstm.training import StreamBatches, TrainingData, evaluate_stream, evaluate_windows
from tlstm.training.schedule import learning_rate


def test_loop_against_plain_torch(tmp_path: Path) -> None:
    """Two epochs of carried state, clipping, warm-up and cosine, written out by hand with torch.nn.LSTM in float64."""
    options = {"lr": 0.02, "max_steps": 30, "clip_norm": 0.5, "ema_decay": 0.0, "batch_size": 6, "window": 7}
    model = make_model(torch.float64)
    trainer = make_trainer(tmp_path, model, **options)

    embedding, head = torch.nn.Embedding(11, 13).double(), torch.nn.Linear(9, 11).double()
    layers = [torch.nn.LSTM(13, 13, batch_first=True).double(), torch.nn.LSTM(13, 9, batch_first=True).double()]
    modules = [embedding, *layers, head]
    sources = [model.model.embedding, *model.model.layers, model.lm_head]
    for module, source in zip(modules, sources, strict=True):
        module.load_state_dict(source.state_dict())
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99), foreach=False,
    )  # fmt: skip
    batches = StreamBatches(make_data().train, batch_size=6, window=7, seed=1)
    losses, states = [], None
    for step in range(30):
        batch = next(batches)
        states = [None, None] if batch.starts_epoch else states
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(trainer.config, step=step, total_steps=30, epoch=0)
        x = embedding(batch.inputs)
        for index, layer in enumerate(layers):
            x, (h, c) = layer(x, states[index])
            states[index] = (h.detach(), c.detach())
        loss = F.cross_entropy(head(x).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        losses.append(loss.item())

    trainer.train()
    logged = [r["train_loss"] for r in log_without_times(tmp_path) if r["event"] == "train"]
    assert logged == pytest.approx([sum(losses[i : i + 3]) / 3 for i in range(0, 30, 3)], rel=1e-11)
    for module, source in zip(modules, sources, strict=True):
        for mine, theirs in zip(source.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_parts_equal_one_batch(tmp_path: Path, parts: int) -> None:
    for name, accumulation in (("one", 1), ("parts", parts)):
        make_trainer(
            tmp_path / name, make_model(torch.float64), gradient_accumulation=accumulation, max_steps=25
        ).train()
    one, split = (
        [record.get("train_loss", record.get("valid_loss")) for record in log_without_times(tmp_path / name)]
        for name in ("one", "parts")
    )
    assert split == pytest.approx(one, rel=1e-11)


def test_learns_a_periodic_text_and_exports_what_it_measured(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog. " * 60
    (tmp_path / "text.txt").write_text(text)
    tokenizer = Tokenizer.train_char(text)
    model = make_model(vocab_size=tokenizer.vocab_size, layer_sizes=[33, 33], residual=True, hidden_dropout=0.1)
    config = make_config(
        data=str(tmp_path / "text.txt"), batch_size=8, window=15, max_steps=None, epochs=9.5, lr=0.02, ema_decay=0.95,
        save_dtype="bfloat16", plot=True, sample_every=50, sample_tokens=9, sample_prompt="the ", eval_every=0,
        valid_fraction=0.2,
    )  # fmt: skip
    result = Trainer(model, tokenizer, config, out_dir=tmp_path / "run", command="train it").train()
    assert (result.status, result.exit_code) == ("finished", 0)
    assert result.step == int(9.5 * (((2160 - 15) // 8) // 15))

    exported = LSTMForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    stored = LSTMForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert stored.dtype == torch.bfloat16
    ids = Tokenizer.from_pretrained(tmp_path / "run" / "model").encode(text)[2160:]
    figures = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert figures == json.loads(json.dumps(result.figures))
    # What the card will say is what anybody measures on the files.
    stream, cold = figures["valid"]
    assert stream["loss"] == pytest.approx(evaluate_stream(exported, ids).loss, rel=1e-6)
    assert cold["loss"] == pytest.approx(evaluate_windows(exported, ids).loss, rel=1e-6)
    assert stream["loss"] < 0.5 < math.log(tokenizer.vocab_size)
    assert figures["command"] == "train it"
    assert figures["tokens"] == result.step * 8 * 15
    assert figures["data"]["train_tokens"] == 2160

    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {record["event"] for record in records} == {"train", "valid", "sample"}
    samples = [record["text"] for record in records if record["event"] == "sample"]
    assert all(len(sample) == 13 and sample.startswith("the ") for sample in samples)
    with open(tmp_path / "run" / "log.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    numbers = [record for record in records if record["event"] != "sample"]
    assert len(rows) == len(numbers)
    for row, record in zip(rows, numbers, strict=True):
        assert {key: float(value) for key, value in row.items() if value} == {
            key: record[key] for key in row if record.get(key) is not None
        }
    assert (tmp_path / "run" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "run" / "loss_curve.svg").read_text()


def test_samples_and_evaluations_do_not_change_the_training(tmp_path: Path) -> None:
    """Both draw and compute beside the training: its weights and dropout masks stay the same."""
    tokenizer = Tokenizer.train_char("abcdefghijk")
    weights = []
    for name, options in (("quiet", {}), ("busy", {"sample_every": 2, "sample_prompt": "abc", "eval_every": 3})):
        model = make_model(**DROPOUT)
        config = make_config(max_steps=12, **options)
        Trainer(model, tokenizer, config, data=make_data(), out_dir=tmp_path / name).train()
        weights.append([parameter.clone() for parameter in model.parameters()])
    assert all(torch.equal(quiet, busy) for quiet, busy in zip(*weights, strict=True))


def test_exports_the_best_weights_where_asked(tmp_path: Path) -> None:
    """Training data that says nothing about the validation data: the loss there rises after a while."""
    model = make_model(layer_sizes=[33])
    data = TrainingData.from_ids([1, 2, 3, 4] * 60, [1, 2, 4, 3, 2, 1, 4, 4, 3, 1, 2] * 9)
    config = make_config(export="best", keep_last=1, max_steps=60, lr=0.03, eval_every=5, save_every=100)
    result = Trainer(model, config=config, data=data, out_dir=tmp_path).train()
    losses = {r["step"]: r["valid_loss"] for r in log_without_times(tmp_path) if r["event"] == "valid"}
    best = min(losses, key=losses.__getitem__)
    assert best < 60
    assert result.figures["exported_step"] == best
    exported = LSTMForCausalLM.from_pretrained(tmp_path / "model")
    # The same evaluation again, on the same weights.
    assert evaluate_stream(exported, data.valid, batch_streams=3, window=8).loss == pytest.approx(
        losses[best], rel=1e-6
    )
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {f"step-{best:08d}", "step-00000060"}


def test_plateau_lowers_the_rate(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, schedule="plateau", patience=1, decay_factor=0.1, lr=1.0, eval_every=2, warmup_steps=0
    )
    trainer.train()
    rates = [r["lr"] for r in log_without_times(tmp_path) if r["event"] == "train"]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(trainer.plateau.scale)
    assert rates[-1] < 1.0


def test_random_windows_scale_the_rate(tmp_path: Path) -> None:
    rates = []
    trainer = make_trainer(tmp_path, random_window=True, window=12, schedule="constant", warmup_steps=0, max_steps=8)
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: rates.append(trainer.optimizer.param_groups[0]["lr"]) or step()
    trainer.train()
    lengths = trainer.batches.plan(0)[1]
    assert rates == pytest.approx([5e-3 * length / 12 for length in lengths[:8]], rel=1e-15)
    assert len(set(lengths)) > 3


def test_tensorboard_events_are_the_logged_figures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the `train` extra (tensorboard)"
    )
    make_trainer(tmp_path, tensorboard=True, max_steps=12).train()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {r["step"]: r["train_loss"] for r in log_without_times(tmp_path) if r["event"] == "train"}
    assert {event.step: event.value for event in events.Scalars("train_loss")} == pytest.approx(logged, rel=2**-23)


def test_missing_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install tlstm\[train\]"):
        make_trainer(tmp_path, tensorboard=True)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, plot=True, max_steps=3).train()
    assert "no loss curve: matplotlib is not installed" in caplog.text
    assert not list(tmp_path.glob("loss_curve*"))


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected float32 .* weights to train, got torch.bfloat16"):
        make_trainer(tmp_path, make_model(torch.bfloat16))
    with pytest.raises(ValueError, match="autocast: 'fp16' needs a CUDA device"):
        Trainer(make_model(), config=make_config(autocast="fp16"), data=make_data(), out_dir=tmp_path, device="cpu")
    with pytest.raises(ValueError, match="vocab_size is 7"):
        make_trainer(tmp_path, make_model(vocab_size=7))
    with pytest.raises(ValueError, match="expected data to train on: set `data`"):
        Trainer(make_model(), config=make_config(), out_dir=tmp_path)
    with pytest.raises(ValueError, match="tokenizer: training on text files needs one"):
        Trainer(make_model(), config=make_config(data="x.txt"), out_dir=tmp_path)
    with pytest.raises(ValueError, match="sample_every: samples during training need a tokenizer"):
        make_trainer(tmp_path, sample_every=5)
    with pytest.raises(ValueError, match="the training text is too short"):
        make_trainer(tmp_path, window=101)
    with pytest.raises(ValueError, match="the validation text is too short: expected at least 2 tokens, got 1"):
        Trainer(make_model(), config=make_config(), data=TrainingData.from_ids([1] * 99, [1]), out_dir=tmp_path)
    with pytest.raises(ValueError, match="there is no validation data"):
        Trainer(make_model(), config=make_config(), data=TrainingData.from_ids([1] * 99), out_dir=tmp_path).evaluate()
    with pytest.raises(FloatingPointError, match=r"training loss is nan at step \d+; lower lr"):
        make_trainer(tmp_path, lr=1e38, clip_norm=0, warmup_steps=0, eval_every=100).train()
