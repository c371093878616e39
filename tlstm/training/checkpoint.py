"""Trainer checkpoints: one folder per step, whole or not there at all; safetensors and JSON, never pickle."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tlstm.checkpoint.folder_swap import fsync
from tlstm.checkpoint.json_file import read_json
from tlstm.checkpoint.tensor_file import write_tensors
from tlstm.checkpoint.tensor_header import check_header
from tlstm.training.distributed import World

FORMAT = "tlstm-training-1"
VALUES_NAME = "trainer.json"
_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds: groups of named tensors (one file each) and plain JSON values."""

    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest step first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, from its name."""
    return int(path.name.removeprefix("step-"))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, or will be."""
    return folder / f"step-{step:08d}"


def write_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-<step>`, atomically: everything is on disk under a hidden name before it gets its own.

    A process killed at any point leaves the earlier checkpoints untouched, and at most a hidden folder that the next
    `prune` removes.
    """
    target = checkpoint_path(folder, step)
    staged = folder / f".staged-{step:08d}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for group, tensors in checkpoint.tensors.items():
        own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        write_tensors(own, {"format": "pt"}, staged / f"{group}.safetensors")
    values = {"format": FORMAT, "step": step, "groups": sorted(checkpoint.tensors)} | checkpoint.values
    (staged / VALUES_NAME).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for path in [*staged.iterdir(), staged]:
        fsync(path)
    os.replace(staged, target)
    fsync(folder)
    return target


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder onto the CPU.

    Raises:
        FileNotFoundError: no checkpoint there. ValueError: a damaged file, or a folder of another kind; names it.
    """
    values_file = path / VALUES_NAME
    if not values_file.exists():
        raise FileNotFoundError(f"{values_file}: expected a training checkpoint with {VALUES_NAME}, found none")
    values = read_json(values_file, nan=True)  # a loss may be one
    if values.get("format") != FORMAT:
        raise ValueError(f"{values_file}: expected a checkpoint of format {FORMAT!r}; another version wrote this one")
    groups = values.get("groups")
    if not isinstance(groups, list) or not all(isinstance(name, str) and name.isidentifier() for name in groups):
        raise ValueError(f"{values_file}: expected a list of names as `groups`; resume from an earlier checkpoint")
    tensors = {}
    for group in groups:
        file = path / f"{group}.safetensors"
        try:
            check_header(file)
            tensors[group] = load_file(file)
        except (SafetensorError, OSError, MemoryError) as error:
            raise ValueError(f"{file}: damaged or missing ({error}); resume from an earlier checkpoint") from None
    return Checkpoint(tensors, values)


def prune(folder: Path, keep_last: int, keep_steps: set[int]) -> None:
    """Remove all but the newest `keep_last` checkpoints and those of `keep_steps`, and leftovers of killed saves."""
    checkpoints = list_checkpoints(folder)
    for path in checkpoints[:-keep_last]:
        if step_of(path) not in keep_steps:
            remove_checkpoint(path)
    for pattern in (".staged-*", ".removed-*"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint folder; it loses its name first, so that half of one never looks like a whole one."""
    doomed = path.with_name(f".removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


# ---- the parts of a checkpoint ---------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state under flat names, `<parameter index>.<key>`."""
    state = optimizer.state_dict()["state"]
    flat = {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}
    return {name: value for name, value in flat.items() if value is not None}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], stepped: bool) -> None:
    """The inverse of `optimizer_tensors`; hyper-parameters stay as the optimiser was made.

    Args:
        stepped: whether a step was made, so that there must be a state; before the first one there is none.
    """
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        if tensor.ndim and tensor.shape != parameters[int(index)].shape:
            raise ValueError(f"optimizer: {name} has shape {tuple(tensor.shape)}, which is not that of its parameter")
        state.setdefault(int(index), {})[key] = tensor
    kinds = {frozenset(entry) for entry in state.values()} or {frozenset[str]()}
    needs_averages = "betas" in optimizer.defaults and (stepped or bool(state))
    if len(kinds) > 1 or (needs_averages and "exp_avg" not in next(iter(kinds))):
        raise ValueError(f"optimizer: its state is incomplete; found {sorted(map(sorted, kinds))}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def fill_parameters(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy the tensors into the model's parameters in place; all names and shapes must agree."""
    parameters = dict(model.named_parameters())
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != got:
        different = sorted(set(expected.items()) ^ set(got.items()))
        raise ValueError(f"{path}: the checkpoint is of another model; they differ in {different[:6]}")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def seed_everything(seed: int) -> None:
    """Seed the generators of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state(world: World) -> dict[str, Tensor]:
    """The state of every random generator of this process, as tensors of fixed shapes."""
    _, words, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    tensors = {
        "rng.torch": torch.get_rng_state(),
        "rng.numpy": torch.tensor([*(int(word) for word in words), position, has_gauss], dtype=torch.int64),
        "rng.numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "rng.python": torch.tensor([version, *internal], dtype=torch.int64),
        "rng.python_gauss": torch.tensor(float("nan") if gauss_next is None else gauss_next, dtype=torch.float64),
    }
    if world.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(world.device)
    return tensors


def set_random_state(tensors: dict[str, Tensor], world: World) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(tensors["rng.torch"])
    *words, position, has_gauss = tensors["rng.numpy"].tolist()
    gauss = tensors["rng.numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(words, np.uint32), position, has_gauss, gauss))
    version, *internal = tensors["rng.python"].tolist()
    python_gauss = tensors["rng.python_gauss"].item()
    random.setstate((version, tuple(internal), None if python_gauss != python_gauss else python_gauss))
    if world.device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], world.device)
