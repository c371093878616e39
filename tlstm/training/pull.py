"""A training run that was pushed with its training state, from the Hugging Face Hub back into a run folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tlstm.checkpoint.files import read_json
from tlstm.hub.download import download_snapshot
from tlstm.training import checkpoint as files
from tlstm.training.log import CSV_NAME, JSONL_NAME
from tlstm.training.snapshot import CONFIG_NAME

TRAINING_DIR = "training"  # of the repo: a run folder
CHECKPOINT_DIR = "checkpoints"
LOG_NAMES = (JSONL_NAME, CSV_NAME)


def pull_run(
    repo_id: str, out_dir: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """Make `out_dir` the run folder that was pushed with `hub_strategy="checkpoint"`; `train(resume=True)` goes on.

    Where the run pushes to is not taken over: a pull never makes the machine push anywhere.

    Args:
        revision: branch, tag or commit of the repo; the main branch by default. token: as in `huggingface_hub`.

    Returns:
        The newest checkpoint in `out_dir`.

    Raises:
        ValueError: `out_dir` holds a run already. FileNotFoundError: the repo holds no training state.
        huggingface_hub's errors pass unchanged; the folder then holds no checkpoint.
    """
    out = Path(out_dir)
    existing = files.list_checkpoints(out / CHECKPOINT_DIR)
    if existing:
        raise ValueError(
            f"{out} holds a run already, up to {existing[-1].name}; resume that one, or choose another output folder"
        )
    steps = f"{TRAINING_DIR}/{CHECKPOINT_DIR}/step-*"
    names = [f"{TRAINING_DIR}/{name}" for name in ("*.json", *LOG_NAMES)]
    patterns = [*names, f"{steps}/{files.VALUES_NAME}", f"{steps}/*.safetensors"]
    source = download_snapshot(repo_id, revision=revision, token=token, allow_patterns=patterns) / TRAINING_DIR
    found = files.list_checkpoints(source / CHECKPOINT_DIR)
    if not found:
        raise FileNotFoundError(
            f"{repo_id}: holds no training checkpoint; push one with hub_strategy 'checkpoint', or fine-tune its model "
            f"(--init-from {repo_id})"
        )
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    _forget_hub(out / CONFIG_NAME)
    for path in found:  # last, each under another name until it is whole: what a kill leaves is no run
        target, staged = out / CHECKPOINT_DIR / path.name, out / CHECKPOINT_DIR / f".staged-{path.name}"
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(path, staged)
        os.replace(staged, target)
    return out / CHECKPOINT_DIR / found[-1].name


def _forget_hub(path: Path) -> None:
    if path.is_file():
        kept = {name: value for name, value in read_json(path).items() if not name.startswith("hub_")}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
