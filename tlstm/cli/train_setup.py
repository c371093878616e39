"""The start of `tlstm train`: settings from file and flags, the tokenizer, a new model or that of a run to resume."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlstm.cli.arguments import flag_name
from tlstm.cli.common import ModelSource
from tlstm.cli.errors import UsageError
from tlstm.config import CONFIG_NAME, LSTMConfig

if TYPE_CHECKING:
    from tlstm.models import LSTMForCausalLM
    from tlstm.tokenizer.tokenizer import Tokenizer
    from tlstm.training import TrainingConfig
    from tlstm.training.distributed import World

TOKENIZER_KINDS = ("char", "byte", "bpe")
END_OF_TEXT = "<eos>"
# Fields that are no flags: they follow from the tokenizer or from the weights.
DERIVED_FIELDS = (
    "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "quantization", "architectures",
    "model_type", "config_version", "tlstm_version", "extra",
)  # fmt: skip
_SOURCE_SETTINGS = ("tokenizer", "vocab_size", "eos_token", "init_from")


# ---- settings --------------------------------------------------------------------------------------------------------


def read_settings(args: argparse.Namespace, out: Path) -> tuple[dict[str, Any], TrainingConfig]:
    """All settings by name, and the training's as a config: those of the run to resume, of `--config`, of the flags.

    Raises:
        UsageError: a setting that does not exist, or no data. FileNotFoundError: no run to resume.
    """
    from tlstm.training.config import TrainingConfig
    from tlstm.training.snapshot import CONFIG_NAME as TRAINING_CONFIG_NAME

    training_names = {field.name for field in fields(TrainingConfig)}
    model_names = {field.name for field in fields(LSTMConfig)} - set(DERIVED_FIELDS)
    known = training_names | model_names | set(_SOURCE_SETTINGS)
    settings: dict[str, Any] = {}
    if args.resume is not False:
        stored = out / TRAINING_CONFIG_NAME
        if not stored.is_file():
            raise FileNotFoundError(f"--resume: no run in {out} (expected {stored}); start one without --resume")
        settings |= _read_json(stored)
    if args.config is not None:
        settings |= _read_json(Path(args.config))
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
            raise UsageError(f"{args.config}: unknown setting {name!r}; {hint}")
    settings |= {name: getattr(args, name) for name in known if hasattr(args, name)}
    if settings.get("data") is None:
        raise UsageError("--data is missing; name a text file, or a folder of *.txt files (see `tlstm train --help`)")
    config = TrainingConfig.from_dict(
        {name: value for name, value in settings.items() if name in training_names}, source="tlstm train"
    )
    return settings, config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object of settings, got {type(values).__name__}")
    return values


def _model_settings(settings: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(LSTMConfig)} - set(DERIVED_FIELDS)
    return {name: value for name, value in settings.items() if name in names}


def check_folder(out: Path, *, resume: bool) -> None:
    """Before anything is written: a run that is there already is not to be touched."""
    from tlstm.training.checkpoint import list_checkpoints

    existing = list_checkpoints(out / "checkpoints")
    if existing and not resume:
        raise UsageError(f"{out} holds a run already, up to {existing[-1].name}; add --resume, or choose another --out")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out}: expected a folder, found a file")


def fetch_run(resume: bool | str, out: Path, *, token: str | None, world: World) -> str | None:
    """Where `--resume` names a Hub repo, make `out` its run (process 0 does); the repo and step in words.

    Raises:
        ValueError: `out` holds a run. FileNotFoundError: no training state in the repo, or neither path nor repo.
    """
    from tlstm.training.pull import pull_run

    if not isinstance(resume, str) or Path(resume).exists() or resume.count("/") != 1 or resume[0] in "./~":
        return None
    source = ModelSource.parse(resume)
    if world.is_main:
        try:
            pull_run(source.name, out, revision=source.revision, token=token)
        except Exception as error:  # a mistyped path looks like a repo id
            error.add_note(f"there is no checkpoint {resume!r} here, so it was looked for on the Hub")
            raise
    world.barrier()
    return str(source)


# ---- model and tokenizer ---------------------------------------------------------------------------------------------


def new_run(
    out: Path, settings: dict[str, Any], config: TrainingConfig, world: World
) -> tuple[LSTMForCausalLM, Tokenizer]:
    """A new run's model and tokenizer. Process 0 makes them and notes them in `out`; the others read them there."""
    import torch

    from tlstm.models import LSTMForCausalLM
    from tlstm.tokenizer.tokenizer import Tokenizer
    from tlstm.training.data import text_files

    torch.manual_seed(config.seed)
    start = ModelSource.parse(settings["init_from"]).folder() if settings.get("init_from") else None
    if start is not None and "tokenizer" in settings:
        raise UsageError("--tokenizer and --init-from exclude each other: a checkpoint comes with its own tokenizer")
    assert config.data is not None
    for path in filter(None, (config.data, config.valid_data)):
        text_files(path)
    if world.is_main:
        tokenizer = make_tokenizer(settings, config) if start is None else Tokenizer.from_pretrained(start)
        if start is None:
            stored = LSTMConfig(**_token_settings(tokenizer), **_model_settings(settings))
        else:
            stored = LSTMConfig.from_json_file(start / CONFIG_NAME)
            stored = LSTMConfig.from_dict(stored.to_dict() | _model_settings(settings), source="--init-from")
        stored.save_pretrained(out)
        tokenizer.save_pretrained(out)
    world.barrier()
    if not world.is_main:
        stored, tokenizer = LSTMConfig.from_json_file(out / CONFIG_NAME), Tokenizer.from_pretrained(out)
    if start is None:
        return LSTMForCausalLM(stored), tokenizer
    return LSTMForCausalLM.from_pretrained(start, config=stored, dtype=torch.float32), tokenizer


def resumed_run(out: Path, settings: dict[str, Any]) -> tuple[LSTMForCausalLM, Tokenizer]:
    """The model (its weights come from the checkpoint) and tokenizer that `new_run` noted."""
    from tlstm.models import LSTMForCausalLM
    from tlstm.tokenizer.tokenizer import Tokenizer

    given = sorted(set(settings) & set(_SOURCE_SETTINGS))
    if given:
        raise UsageError(f"{flag_name(given[0])} cannot be changed when a run is resumed; leave it out")
    stored = LSTMConfig.from_json_file(out / CONFIG_NAME)
    for name, value in _model_settings(settings).items():
        if value != getattr(stored, name):
            raise UsageError(
                f"{flag_name(name)} cannot be changed when a run is resumed (it is {getattr(stored, name)!r}); "
                "leave it out, or start another run with --init-from"
            )
    return LSTMForCausalLM(stored), Tokenizer.from_pretrained(out)


def make_tokenizer(settings: dict[str, Any], config: TrainingConfig) -> Tokenizer:
    """The tokenizer that `--tokenizer` names: made from the data, or loaded."""
    from tlstm.tokenizer.tokenizer import Tokenizer
    from tlstm.training.data import text_files

    assert config.data is not None
    kind = settings.get("tokenizer", "char")
    if "vocab_size" in settings and kind != "bpe":
        raise UsageError(f"--vocab-size is for --tokenizer bpe; the size of {kind!r} follows from the tokenizer itself")
    if kind not in TOKENIZER_KINDS:
        if "eos_token" in settings:
            raise UsageError("--eos-token is for a tokenizer made here (char, byte, bpe); a loaded one has its own")
        return Tokenizer.from_pretrained(kind)
    files = text_files(config.data)
    eos = settings.get("eos_token", END_OF_TEXT if len(files) > 1 else None)
    if kind == "byte":
        return Tokenizer.bytes(eos_token=eos)
    if kind == "char":  # validation text must be writable, so its characters count as well
        files = files + (text_files(config.valid_data) if config.valid_data is not None else [])
        return Tokenizer.train_char(files=files, eos_token=eos)
    texts = [file.read_bytes().decode("utf-8") for file in files]
    if config.valid_data is None:  # merges are learnt from the training part alone
        texts = _first(texts, int((1 - config.valid_fraction) * sum(map(len, texts))))
    progress = sys.stderr.isatty()
    return Tokenizer.train_bpe(texts, settings.get("vocab_size", 8192), eos_token=eos, progress=progress)


def _first(texts: list[str], length: int) -> list[str]:
    """The first `length` characters of the texts."""
    kept = []
    for text in texts:
        kept.append(text[:length])
        length -= len(kept[-1])
    return kept


def _token_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
