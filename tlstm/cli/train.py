"""`tlstm train`: from text files to a checkpoint folder."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tlstm.cli import arguments
from tlstm.cli.common import add_backend_arguments, find_device, format_count, set_backend
from tlstm.cli.train_setup import (
    DERIVED_FIELDS,
    END_OF_TEXT,
    check_folder,
    fetch_run,
    new_run,
    read_settings,
    resumed_run,
)
from tlstm.config import LSTMConfig

if TYPE_CHECKING:
    from tlstm.tokenizer.tokenizer import Tokenizer
    from tlstm.training import Trainer, TrainingResult

DESCRIPTION = """Train a language model on a text file, or on a folder of *.txt files.

--out then holds model/ (what `tlstm generate --model` takes), checkpoints/, log.csv, log.jsonl and the loss curve.
Ctrl-C or SIGTERM saves a checkpoint and ends the run; `tlstm train --out DIR --resume` goes on as if nothing had been.
Under torchrun every process takes its share of the batch.

With --hub-model-id the model is pushed to the Hugging Face Hub beside the training and at its end; with --hub-strategy
checkpoint also what `tlstm train --out DIR --resume user/name` needs to go on elsewhere, bit for bit. A push that fails
never costs the run.
"""
EPILOG = """examples:
  tlstm train --data input.txt --out runs/first
  tlstm train --data input.txt --out runs/wide --layer-sizes 1150,1150,400 --embedding-size 400 --tie \\
      --weight-dropout 0.5 --hidden-dropout 0.25 --output-dropout 0.4 --epochs 30
  tlstm train --data books/ --out runs/bpe --tokenizer bpe --vocab-size 8192 --autocast bf16
  tlstm train --data mine.txt --out runs/tuned --init-from user/name --lr 2e-4 --epochs 2
  tlstm train --config recipe.json --data input.txt --out runs/second --seed 2
  tlstm train --out runs/first --resume
  tlstm train --data input.txt --out runs/shared --hub-model-id user/name --hub-private --hub-strategy checkpoint
  tlstm train --data input.txt --out runs/elsewhere --resume user/name --hub-model-id user/name
  torchrun --nproc-per-node 8 -m tlstm train --data input.txt --out runs/eight --batch-size 512
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tlstm.training.config import TrainingConfig

    run = parser.add_argument_group("run")
    run.add_argument("--out", required=True, metavar="DIR", help="folder for the run; everything is written below it")
    run.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT|REPO",
        help="continue the run in --out, from its newest checkpoint or from this one, or the one that was pushed to a "
        "Hub repo, user/name[@revision], in a new --out; other flags are not needed (but --data, where it has moved)",
    )
    run.add_argument(
        "--config",
        metavar="FILE.json",
        help='read settings from a JSON object; keys are the flags with underscores ({"hidden_size": 512}). Flags win',
    )
    run.add_argument(
        "--hub-token", metavar="TOKEN", help="access token for the Hub, instead of that of `hf auth login` or HF_TOKEN"
    )
    add_backend_arguments(run)
    start = parser.add_argument_group("tokens and start")
    suppress = argparse.SUPPRESS
    start.add_argument(
        "--tokenizer",
        default=suppress,
        metavar="KIND|PATH",
        help="char, byte, bpe (made from the data), or a folder or Hub repo with a tokenizer (default: char)",
    )
    start.add_argument(
        "--vocab-size", type=int, default=suppress, metavar="N", help="of a bpe tokenizer (default: 8192)"
    )
    start.add_argument(
        "--eos-token",
        default=suppress,
        metavar="TEXT",
        help=f"token between files, for a tokenizer made here (default: {END_OF_TEXT} for several files, else none)",
    )
    start.add_argument(
        "--init-from",
        "--init",
        dest="init_from",
        default=suppress,
        metavar="PATH|REPO",
        help="fine-tune this checkpoint, a folder or a Hub repo user/name[@revision]; its tokenizer and sizes are "
        "kept, dropouts may be set anew",
    )
    arguments.add_dataclass_arguments(
        parser,
        TrainingConfig,
        aliases={"valid_data": ("--valid",)},
        escaped=("sample_prompt",),
        texts={
            "data": "text file, or folder of *.txt files, to train on",
            "plot": "write the loss curve; needs matplotlib (default: on)",
            "tensorboard": "also write TensorBoard events; needs tensorboard (default: off)",
            "sample_prompt": "text that samples continue; \\n is a line end (the default)",
            "sample_tokens": "length of a sample (default: 200)",
        },
    )
    arguments.add_dataclass_arguments(
        parser,
        LSTMConfig,
        exclude=DERIVED_FIELDS,
        aliases={"tie_word_embeddings": ("--tie",)},
        prefix="model: ",
    )


def run(args: argparse.Namespace) -> int:
    from tlstm.training import Trainer
    from tlstm.training.distributed import join_world
    from tlstm.training.memory import keep_freed_memory

    keep_freed_memory()
    out = Path(args.out)
    device = find_device(args.device)
    # Without a number each process takes its own GPU.
    world = join_world(None if args.device == "auto" or str(device) == "cuda" else device)
    pulled = fetch_run(args.resume, out, token=args.hub_token, world=world)
    args.resume = args.resume if pulled is None else True
    settings, config = read_settings(args, out)
    check_folder(out, resume=args.resume is not False)
    model, tokenizer = resumed_run(out, settings) if args.resume else new_run(out, settings, config, world)
    set_backend(model, args.backend, world.device)
    with _log_to_stderr(world.is_main):
        trainer = Trainer(
            model, tokenizer, config, out_dir=out, device=world.device, command=args.command_line,
            hub_token=args.hub_token,
        )  # fmt: skip
        if world.is_main:
            print("" if pulled is None else f"pulled  {pulled}\n", _summary(trainer, tokenizer), sep="", flush=True)
        result = trainer.train(resume=args.resume)
    if world.is_main:
        _report(result, out, world.size)
    world.leave()
    return result.exit_code


# ---- what the user sees ----------------------------------------------------------------------------------------------


def _summary(trainer: Trainer, tokenizer: Tokenizer) -> str:
    model, data, config = trainer.model.config, trainer.data, trainer.config
    widths = "-".join(map(str, model.widths))
    tied = ", head tied to the embedding" if model.tie_word_embeddings else ""
    valid = 0 if data.valid is None else len(data.valid)
    rows = [
        (
            f"model   {format_count(trainer.model.num_parameters())} parameters: {len(model.widths)} LSTM layers, "
            f"{widths} wide, embedding {model.embedding_width}{tied}"
        ),
        f"tokens  {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}",
        f"data    {config.data}: {len(data.train):,} tokens to train on, {valid:,} to validate",
        (
            f"run     {trainer.total_steps:,} steps of {config.batch_size} x {config.window} tokens "
            f"on {trainer.world.size} x {trainer.world.device}, into {trainer.out_dir}"
        ),
    ]
    if config.hub_model_id is not None:
        branch = f", branch {config.hub_revision}" if config.hub_revision is not None else ""
        often = f"every {config.hub_every_steps:,} steps" if config.hub_every_steps else "with every checkpoint"
        times = "at the end" if config.hub_strategy == "end" else f"{often} and at the end"
        rows.append(f"hub     {config.hub_model_id}{branch}, {times}")
    return "\n".join(rows)


def _report(result: TrainingResult, out: Path, processes: int) -> None:
    if result.status == "interrupted":
        launcher = f"torchrun --nproc-per-node {processes} -m tlstm" if processes > 1 else "tlstm"
        command = f"{launcher} train --out {shlex.quote(str(out))} --resume"
        print(f"tlstm: stopped at step {result.step} and saved; go on with: {command}", file=sys.stderr)
        return
    print(f"model   {result.model_dir}; try: tlstm generate --model {shlex.quote(str(result.model_dir))}")
    if result.hub_url is not None:
        print(f"hub     {result.hub_url}")


@contextlib.contextmanager
def _log_to_stderr(is_main: bool) -> Iterator[None]:
    """What the trainer reports, above its progress bar; from process 0 only."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    logger, handler = logging.getLogger("tlstm"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        with logging_redirect_tqdm(loggers=[logger]):
            yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
