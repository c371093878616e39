"""What a figure was measured on: device, clocks, versions, commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

_NVIDIA = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
_PACKAGES = ("triton", "numpy", "flashrnn", "haste_pytorch", "xlstm", "torchrl")


def describe_machine(device: str) -> dict[str, Any]:
    """Device, clocks and versions as JSON values; what is not installed is left out."""
    found: dict[str, Any] = {
        "device": torch.device(device).type,
        "machine": machine_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "system": platform.platform(),
    }
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)  # other work on the machine, in processes
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.device(device).type == "cuda":
        props = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_enabled": torch.backends.cudnn.enabled,
            "capability": f"{props.major}.{props.minor}",
            "multiprocessors": props.multi_processor_count,
            "memory_bytes": props.total_memory,
            "l2_bytes": props.L2_cache_size,
            **gpu_clocks(torch.device(device).index or 0),
        }
    return found


def gpu_clocks(index: int = 0) -> dict[str, str]:
    """What nvidia-smi says of clocks (MHz), power and temperature at this moment; nothing where it is not there."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(_NVIDIA)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(_NVIDIA):
        return {}
    return {name.replace(".", "_"): value for name, value in zip(_NVIDIA, values, strict=True)}


def machine_name(device: str) -> str:
    """The folder of the results: the GPU's name, or "cpu"."""
    if torch.device(device).type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit_of(root: Path) -> str:
    """The short commit of the tree at `root`, with "+" and a hash of what differs from it in measured code.

    The version of the installed package where `root` is no clone.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=10", "HEAD")
    if commit is None or not (root / ".git").exists():
        from tlstm.version import __version__

        return f"v{__version__}"
    changes = git("diff", "HEAD", "--", "tlstm", "kernels")
    return f"{commit}+{hashlib.sha256(changes.encode()).hexdigest()[:6]}" if changes else commit
