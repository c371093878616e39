"""Small models, texts and trainers for the training tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlstm import LSTMConfig, LSTMForCausalLM, Trainer, TrainingConfig
from tlstm.training import TrainingData

VOCABULARY = 11
# Every source of randomness and every optional part of the model at once.
DROPOUT = {
    "embedding_dropout": 0.1, "input_dropout": 0.1, "hidden_dropout": 0.2, "output_dropout": 0.2, "weight_dropout": 0.2,
}  # fmt: skip


def make_model(dtype: torch.dtype = torch.float32, **options: Any) -> LSTMForCausalLM:
    torch.manual_seed(3)
    config = LSTMConfig(**({"vocab_size": VOCABULARY, "layer_sizes": [13, 9], "forget_bias": 1.0} | options))
    return LSTMForCausalLM(config).to(dtype)


def make_data(train: int = 700, valid: int = 90) -> TrainingData:
    """A noisy periodic sequence: there is something to learn, and no window is like another."""
    rng = np.random.default_rng(5)
    ids = (np.arange(train + valid) % 7 + rng.integers(0, 4, train + valid)).astype(np.uint16)
    return TrainingData.from_ids(ids[:train], ids[train:])


def make_config(**options: Any) -> TrainingConfig:
    defaults = {
        "batch_size": 6, "window": 7, "max_steps": 40, "lr": 5e-3, "warmup_steps": 5, "log_every": 3, "eval_every": 10,
        "eval_streams": 3, "eval_window": 8, "save_every": 10, "plot": False, "ema_decay": 0.9,
    }  # fmt: skip
    return TrainingConfig(**(defaults | options))


def make_trainer(out_dir: Path, model: LSTMForCausalLM | None = None, **options: Any) -> Trainer:
    callbacks, tokenizer = options.pop("callbacks", ()), options.pop("tokenizer", None)
    model = make_model(**DROPOUT) if model is None else model
    config, data = make_config(**options), make_data()
    return Trainer(model, tokenizer, config, data=data, out_dir=out_dir, command="a test", callbacks=callbacks)


def log_without_times(out_dir: Path) -> list[dict[str, Any]]:
    """The log's records without the two figures that no two runs share."""
    lines = (out_dir / "log.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Both runs are bit for bit the same at `step`: weights, averages, optimiser, generators, counters and log."""
    from tlstm.training.checkpoint import checkpoint_path, read_checkpoint

    a, b = (read_checkpoint(checkpoint_path(run / "checkpoints", step)) for run in (one, other))
    assert a.tensors.keys() == b.tensors.keys()
    for group, tensors in a.tensors.items():
        assert tensors.keys() == b.tensors[group].keys()
        for name, tensor in tensors.items():
            same = torch.equal(tensor.nan_to_num(), b.tensors[group][name].nan_to_num())
            assert same, f"{group}: {name} differs"
    for values in (a.values, b.values):
        values["progress"].pop("seconds")
        values.pop("log")  # its length holds the digits of the times
        values["config"] = {key: value for key, value in values["config"].items() if not key.startswith("hub_")}
    assert a.values == b.values
    assert log_without_times(one) == log_without_times(other)
