"""`TrainingConfig`: every choice of a training run, checked when it is made and stored beside the run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tlstm.validation import check_choice, check_int, check_number

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "step", "plateau")
AUTOCAST = (None, "bf16", "fp16")
SAVE_DTYPES = ("float32", "bfloat16", "float16", "float64")
EXPORTS = ("last", "best")
HUB_STRATEGIES = ("end", "every_save", "checkpoint")


@dataclass
class TrainingConfig:
    """What `Trainer` does. Every field is checked on construction; `ValueError` names the field.

    Data:
        data: text file, or folder of `*.txt` files, to train on; not needed where `Trainer` is given token ids.
        valid_data: the same for validation; `None` splits off the last `valid_fraction` of `data`.
        valid_fraction: in [0, 1); 0 means no validation.
    Batches (stateful truncated back-propagation through time):
        batch_size: parallel streams, over all processes together.
        window: tokens between two truncations of the gradient, `T`.
        random_window: draw each window's length around `window` and scale the learning rate with it (Merity et al.
            2017, section 5): 95 % of the time N(window, 5), else N(window / 2, 5).
        gradient_accumulation: a batch is run in this many parts, whose gradients add up; same result, less memory.
        epochs: passes over the data, may be a fraction. max_steps: stop after so many steps instead.
    Optimisation:
        optimizer: `"adamw"` (`betas`, `eps`) or `"sgd"` (`momentum`).
        weight_decay: applied to matrices only, never to biases; decoupled in AdamW, an L2 gradient in SGD.
        lr: peak learning rate, reached after `warmup_steps` of linear warm-up.
        schedule: `"cosine"` or `"linear"` fall to `min_lr_ratio * lr` at the last step; `"constant"`; `"step"`
            multiplies by `decay_factor` at the start of every epoch after the first `decay_after` (Zaremba et al.
            2014); `"plateau"` multiplies by `decay_factor` after `patience` evaluations without a new best.
        clip_norm: largest norm of the whole gradient; 0 turns clipping off.
        autocast: `"bf16"`, `"fp16"` (CUDA only, with loss scaling) or `None`; weights and optimiser stay as they are.
        ema_decay: exponential moving average of the weights, 0 for none; the decay warms up as
            `min(ema_decay, (step + 1) / (step + 10))`. Evaluation, samples and the exported model use the average.
    Reports:
        eval_every: steps between evaluations; 0 means once an epoch. save_every: steps between checkpoints; 0 means
            once an epoch. sample_every: steps between samples of text; 0 means never. log_every: steps between log
            lines.
        eval_window: tokens per forward pass in evaluation. eval_streams: parallel streams of the evaluations during
            training (each starts with an empty state: a little pessimistic, much faster); the final one uses one.
        keep_last: checkpoints kept; the one with the best validation loss is kept as well.
        export: `"last"` or `"best"`: whose weights the finished run writes to `model/`.
        sample_prompt: what samples continue. sample_tokens: how many tokens they add.
        save_dtype: storage dtype of the exported weights; the final figures are measured on the weights as stored.
        tensorboard: also write TensorBoard events (`train` extra). plot: write the loss curve (`plot` extra).
    Hub:
        hub_model_id: repo "user/name" of the Hugging Face Hub to push the model to, made if missing; `None` pushes
            nothing. Pushes run beside the training; one that fails is a warning, and costs the run nothing.
        hub_strategy: `"end"` pushes the finished model; `"every_save"` also the model as it stands, in between;
            `"checkpoint"` the same together with the training state, with which `tlstm train --resume user/name` goes
            on elsewhere, bit for bit.
        hub_every_steps: steps between two pushes; 0 means with every checkpoint. hub_private: make a missing repo a
            private one. hub_revision: branch to push to, made if missing; `None` is the main branch.
    Machine:
        seed: of initial draws, dropout and offsets. threads: CPU threads of torch, 0 leaves them as they are.
    """

    data: str | None = None
    valid_data: str | None = None
    valid_fraction: float = 0.1
    batch_size: int = 64
    window: int = 128
    random_window: bool = False
    gradient_accumulation: int = 1
    epochs: float = 10.0
    max_steps: int | None = None
    optimizer: str = "adamw"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup_steps: int = 100
    min_lr_ratio: float = 0.03
    decay_factor: float = 0.5
    decay_after: int = 4
    patience: int = 2
    clip_norm: float = 1.0
    autocast: str | None = None
    ema_decay: float = 0.0
    eval_every: int = 0
    eval_window: int = 256
    eval_streams: int = 16
    save_every: int = 0
    keep_last: int = 2
    export: str = "last"
    sample_every: int = 0
    sample_prompt: str = "\n"
    sample_tokens: int = 200
    log_every: int = 20
    save_dtype: str = "float32"
    tensorboard: bool = False
    plot: bool = True
    hub_model_id: str | None = None
    hub_strategy: str = "every_save"
    hub_every_steps: int = 0
    hub_private: bool = False
    hub_revision: str | None = None
    seed: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "window", "gradient_accumulation", "patience", "eval_window", "eval_streams"):
            check_int(name, getattr(self, name), 1)
        for name in ("keep_last", "log_every", "sample_tokens"):
            check_int(name, getattr(self, name), 1)
        for name in ("warmup_steps", "decay_after", "eval_every", "save_every", "sample_every", "seed", "threads"):
            check_int(name, getattr(self, name), 0)
        check_int("hub_every_steps", self.hub_every_steps, 0)
        if self.max_steps is not None:
            check_int("max_steps", self.max_steps, 1)
        for name in ("random_window", "tensorboard", "plot", "hub_private"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        check_number("epochs", self.epochs, "(0, inf)")
        check_number("lr", self.lr, "(0, inf)")
        check_number("eps", self.eps, "(0, inf)")
        check_number("valid_fraction", self.valid_fraction, "[0, 1)")
        check_number("ema_decay", self.ema_decay, "[0, 1)")
        check_number("momentum", self.momentum, "[0, 1)")
        check_number("weight_decay", self.weight_decay, "[0, inf)")
        check_number("clip_norm", self.clip_norm, "[0, inf)")
        check_number("min_lr_ratio", self.min_lr_ratio, "[0, 1]")
        check_number("decay_factor", self.decay_factor, "(0, 1)")
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {self.betas!r}")
        for beta in self.betas:
            check_number("betas", beta, "[0, 1)")
        self.betas = (float(self.betas[0]), float(self.betas[1]))
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("autocast", self.autocast, AUTOCAST)
        check_choice("save_dtype", self.save_dtype, SAVE_DTYPES)
        check_choice("export", self.export, EXPORTS)
        check_choice("hub_strategy", self.hub_strategy, HUB_STRATEGIES)
        self._check_hub()
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"gradient_accumulation: expected a divisor of batch_size {self.batch_size}, "
                f"got {self.gradient_accumulation}"
            )

    def _check_hub(self) -> None:
        if self.hub_model_id is None:
            return
        try:
            validate_repo_id(self.hub_model_id)
        except HFValidationError as error:
            raise ValueError(f"hub_model_id: expected a repo of the Hub such as 'user/name' ({error})") from None
        if self.hub_strategy == "end" and self.hub_every_steps:
            raise ValueError(
                f"hub_every_steps: hub_strategy 'end' pushes once, at the end, and not every {self.hub_every_steps} "
                "steps; leave one of the two out"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self) | {"betas": list(self.betas)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "the training configuration") -> TrainingConfig:
        """Build a config from JSON values; an unknown key is an error, because it would silently do nothing."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{source}: unknown settings {unknown}; known are {sorted(known)}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
