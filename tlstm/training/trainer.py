"""`Trainer`: the training loop of a language model."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from tlstm.training import export, report, snapshot
from tlstm.training.config import TrainingConfig
from tlstm.training.data import TrainingData, read_text
from tlstm.training.distributed import join_world, synchronising, wrap
from tlstm.training.evaluate import Evaluation, evaluate_stream
from tlstm.training.interrupt import StopRequest
from tlstm.training.log import RunLog
from tlstm.training.optimizer import AveragedWeights, make_optimizer
from tlstm.training.progress import Progress, TrainingResult
from tlstm.training.pushes import RunPushes, is_due
from tlstm.training.schedule import Plateau, learning_rate
from tlstm.training.streams import Batch, StreamBatches

if TYPE_CHECKING:
    from tlstm.models import LSTMForCausalLM
    from tlstm.state import LSTMState
    from tlstm.tokenizer.tokenizer import Tokenizer

AUTOCAST_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Several processes must agree on stopping; asking them in every step would stall the device each time.
STOP_POLL_STEPS = 8


class Trainer:
    """Trains `model` on a token stream with stateful truncated back-propagation through time.

        trainer = Trainer(model, tokenizer, TrainingConfig(data="book.txt", epochs=10), out_dir="run")
        result = trainer.train()

    `out_dir` then holds `model/` (what `from_pretrained` loads), `checkpoints/`, `log.csv`, `log.jsonl`, the loss
    curve and the tokenised text. SIGINT or SIGTERM finishes the step, saves a checkpoint and returns with status
    `"interrupted"`; `train(resume=True)` continues it and ends with bit for bit the same weights, averages and log as a
    run without the interruption (same machine, same torch, same number of threads and processes). Where the config
    names a `hub_model_id`, the model also goes to the Hugging Face Hub, beside the training and never at its cost.

    Args:
        model: trained in place, in float32 or float64; autocast gives the speed of narrower types.
        tokenizer: needed to train on text files; exported with the model.
        config: the choices. out_dir: everything is written below it.
        data: token ids, instead of the files that `config.data` names.
        device: defaults to this process's GPU where there is one, else the CPU.
        command: the command line to note in the exported `training.json`; a resumed run keeps its first one.
        hub_token: access token for the pushes that `config` asks for, instead of the one of `hf auth login`; it is
            stored nowhere.
        callbacks: each is called with every log record, a dictionary with `event` and `step`, in process 0.

    Raises:
        ValueError: no data, token ids outside the vocabulary, a text too short for the batch, a half-precision model.
    """

    def __init__(
        self,
        model: LSTMForCausalLM,
        tokenizer: Tokenizer | None = None,
        config: TrainingConfig | None = None,
        *,
        out_dir: str | os.PathLike[str],
        data: TrainingData | None = None,
        device: torch.device | str | None = None,
        command: str | None = None,
        hub_token: str | None = None,
        callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
    ) -> None:
        self.config = config if config is not None else TrainingConfig()
        self.tokenizer, self.callbacks = tokenizer, list(callbacks)
        self.command = command or shlex.join([Path(sys.executable).name, *sys.argv])
        self.hub_token = hub_token
        self.out_dir = Path(out_dir)
        self.checkpoint_dir = self.out_dir / "checkpoints"
        self.world = join_world(device)
        if model.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"model: expected float32 (or float64) weights to train, got {model.dtype}; load it with "
                "dtype=torch.float32 and set autocast='bf16' in the training config"
            )
        model.train()  # a quantised model refuses
        if self.config.autocast == "fp16" and self.world.device.type != "cuda":
            raise ValueError("autocast: 'fp16' needs a CUDA device; use 'bf16' or no autocast on this one")
        if self.config.sample_every and tokenizer is None:
            raise ValueError("sample_every: samples during training need a tokenizer; pass one, or set it to 0")
        self.model = model.to(self.world.device)
        self.data = data if data is not None else read_text(self.config, tokenizer, self.out_dir / "data", self.world)
        self.data.check_vocabulary(model.config.vocab_size)
        if self.data.valid is not None and len(self.data.valid) < 2:
            raise ValueError(
                f"the validation text is too short: expected at least 2 tokens, got {len(self.data.valid)}; raise "
                "valid_fraction, or set it to 0 for no validation"
            )
        self.batches = StreamBatches(
            self.data.train,
            batch_size=self.config.batch_size,
            window=self.config.window,
            random_window=self.config.random_window,
            seed=self.config.seed,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        parts = self.world.size * self.config.gradient_accumulation
        if self.config.batch_size % parts:
            raise ValueError(
                f"batch_size: expected a multiple of {parts} ({self.world.size} processes x "
                f"{self.config.gradient_accumulation} accumulated parts), got {self.config.batch_size}"
            )
        self.total_steps = self.config.max_steps or self.batches.steps(self.config.epochs)
        self.net = wrap(self.model, self.world)
        self.optimizer = make_optimizer(self.model, self.config)
        self.average = AveragedWeights(self.model, self.config.ema_decay) if self.config.ema_decay else None
        self.plateau = Plateau(self.config.decay_factor, self.config.patience, self.config.min_lr_ratio)
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.config.autocast == "fp16")
        self.log = RunLog(self.out_dir, tensorboard=self.config.tensorboard and self.world.is_main)
        self.progress = Progress()
        self.fingerprint = self.data.fingerprint()
        self.saved_step: int | None = None
        self.learning_rate = 0.0
        self.states: list[LSTMState] = []  # one per accumulated part
        # Running sums on the device, so that no step waits for a transfer: since the last record, and of this epoch.
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        self.grad_norm: Tensor | None = None
        self._stop = StopRequest()
        self._stop_asked = False
        self._clock = 0.0
        self.mark = (0, 0.0)

    # ---- the loop ------------------------------------------------------------------------------------------------

    def train(self, resume: bool | str | os.PathLike[str] = False) -> TrainingResult:
        """Train to the end, or until a signal or `request_stop`.

        Args:
            resume: `True` continues from the newest checkpoint in `out_dir`, a path from that checkpoint (the later
                ones, and the log after it, are then removed).

        Raises:
            ValueError: `out_dir` holds another run and `resume` is false; or the configuration, data or model differ
                from those of the run to resume. FileNotFoundError: nothing to resume from.
            FloatingPointError: the loss is no longer finite; the last checkpoint is from before.
        """
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        snapshot.begin(self, resume)
        with self._stop, closing(self.log), closing(RunPushes(self)) as self.pushes, self._bar() as bar:
            self._clock = time.monotonic() - self.progress.seconds
            self.mark = (self.progress.tokens, self.progress.seconds)
            interrupted = self._should_stop()
            while not interrupted and self.progress.step < self.total_steps:
                batch = next(self.batches)
                self._train_step(batch)
                self.progress.step += 1
                self.progress.tokens += batch.inputs.numel() * self.world.size
                self.progress.seconds = time.monotonic() - self._clock
                bar.update(batch.inputs.numel() * self.world.size)
                self._after_step(batch, bar)
                interrupted = self._should_stop()
            path = snapshot.save(self)
            self._stop_asked = False  # the same trainer may go on later
            if self.progress.step < self.total_steps:
                self.pushes.settle()
                return TrainingResult("interrupted", self.progress.step, self._stop.signal, path)
            figures = export.finish(self) if self.world.is_main else None
            hub_url = self.pushes.finish()
        model_dir = self.out_dir / export.MODEL_DIR
        return TrainingResult("finished", self.progress.step, None, path, model_dir, figures, hub_url)

    def request_stop(self) -> None:
        """Stop after the running step, as a SIGTERM would; may be called from a callback."""
        self._stop_asked = True

    def evaluate(self) -> Evaluation:
        """Validation loss of the averaged weights (of the weights, without averaging) over `eval_streams` streams."""
        if self.data.valid is None:
            raise ValueError("evaluate: there is no validation data; set valid_fraction above 0 or name valid_data")
        streams = max(1, min(self.config.eval_streams, (len(self.data.valid) - 1) // self.config.eval_window))
        with self.average.applied() if self.average is not None else nullcontext():
            return evaluate_stream(
                self.model,
                self.data.valid,
                batch_streams=streams,
                window=self.config.eval_window,
                autocast=AUTOCAST_DTYPES[self.config.autocast],
            )

    def _train_step(self, batch: Batch) -> None:
        """One optimiser step on one window of every stream."""
        config, device = self.config, self.world.device
        parts = config.gradient_accumulation
        rows = batch.inputs.shape[0] // parts
        if batch.starts_epoch:
            self.states = [self.model.zero_state(rows) for _ in range(parts)]
        rate = self._set_learning_rate(batch)
        self.model.train()
        inputs = batch.inputs.to(device, non_blocking=True).split(rows)
        targets = batch.targets.to(device, non_blocking=True).split(rows)
        dtype = AUTOCAST_DTYPES[config.autocast]
        for part in range(parts):
            with synchronising(self.net, last=part == parts - 1):
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    output = self.net(inputs[part], state=self.states[part])
                loss = self.model.loss_function(output.logits, targets[part]) / parts
                self.scaler.scale(loss).backward()
            self.states[part] = output.state.detach()
            self.sums[0::2] += loss.detach()
        self.sums[1::2] += 1
        if config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.progress.step)
        self.learning_rate = rate

    def _set_learning_rate(self, batch: Batch) -> float:
        rate = self.plateau.scale * learning_rate(
            self.config, step=self.progress.step, total_steps=self.total_steps, epoch=self.batches.epoch
        )
        # A longer window gives a gradient over more tokens: Merity et al. 2017 scale the rate with its length.
        scaled = rate * batch.inputs.shape[1] / self.config.window
        for group in self.optimizer.param_groups:
            group["lr"] = scaled
        return rate

    def _after_step(self, batch: Batch, bar: tqdm[Any]) -> None:
        """What is due after a step: records, evaluation, a sample, a checkpoint."""
        config, step, begun = self.config, self.progress.step, time.monotonic()
        last = step == self.total_steps
        if step % config.log_every == 0 or last:
            report.training(self, bar)
        if batch.ends_epoch:
            self.progress.train_loss = self.take_mean(2)
        improved = False
        if self.data.valid is not None and (_due(step, config.eval_every, batch.ends_epoch) or last):
            improved = report.evaluation(self)
        if config.sample_every and step % config.sample_every == 0:
            report.sample(self)
        saved = not last and (_due(step, config.save_every, batch.ends_epoch) or (improved and config.export == "best"))
        if saved:
            snapshot.save(self)
        if not last and is_due(self, saved):
            self.pushes.push()
        # The speed in the next record is that of training alone.
        self.mark = (self.mark[0], self.mark[1] + time.monotonic() - begun)

    # ---- small things --------------------------------------------------------------------------------------------

    def take_mean(self, first: int) -> float:
        """Mean of the pair in `sums` that starts at `first`, over all processes; the pair is emptied."""
        pair = self.sums[first : first + 2]
        mean = float(self.world.mean(pair[0] / pair[1]))
        pair.zero_()
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the training loss is {mean} at step {self.progress.step}; lower lr or clip_norm, or lengthen "
                "warmup_steps, and resume from the last checkpoint"
            )
        return mean

    @property
    def asked_to_stop(self) -> bool:
        """Whether a signal or `request_stop` has come to this process."""
        return self._stop_asked or self._stop.signal is not None

    def _should_stop(self) -> bool:
        if self.world.size > 1 and self.progress.step % STOP_POLL_STEPS:
            return False
        return self.world.any(self.asked_to_stop)

    def _bar(self) -> tqdm[Any]:
        hidden = None if self.world.is_main else True  # None: hidden where stderr is not a terminal
        done = self.progress.tokens
        total = self.total_steps * self.config.batch_size * self.config.window
        return tqdm(total=total, initial=done, unit="tok", unit_scale=True, disable=hidden, dynamic_ncols=True)


def _due(step: int, every: int, ends_epoch: bool) -> bool:
    return step % every == 0 if every else ends_epoch
