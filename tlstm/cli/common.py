"""What several commands share: which model is meant, on what it runs, and how figures are written."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tlstm
from tlstm.cli.errors import UsageError
from tlstm.config import DTYPES

if TYPE_CHECKING:
    import torch

    from tlstm.models import LSTMForCausalLM
    from tlstm.tokenizer.tokenizer import Tokenizer

DEFAULT_CHECKPOINT = "shakespeare-char"


def default_checkpoint() -> Path:
    """The folder of the checkpoint that tlstm ships: inside the installed package, or beside it in a source checkout.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    package = Path(tlstm.__file__).parent
    places = [folder / "model_cards" / DEFAULT_CHECKPOINT for folder in (package, package.parent)]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(
        f"the shipped checkpoint {DEFAULT_CHECKPOINT!r} is missing; expected it in {places[0]} or {places[1]}. Name a "
        "model with --model, or reinstall tlstm"
    )


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint's folder, or a Hub repo and its revision (branch, tag or commit; `None` is the default branch)."""

    name: str
    revision: str | None
    is_local: bool

    @classmethod
    def parse(cls, text: str | None) -> ModelSource:
        """`None` is the shipped checkpoint; then a folder that exists; then `user/name[@revision]` on the Hub."""
        if text is None:
            return cls(str(default_checkpoint()), None, True)
        path = Path(text).expanduser()
        if text and path.exists():  # "" would be the current folder
            return cls(str(path), None, True)
        repo, _, revision = text.partition("@")
        if path.is_absolute() or text.startswith((".", "~")) or repo.count("/") != 1 or not all(repo.split("/")):
            raise FileNotFoundError(
                f"--model {text}: no such folder; expected a checkpoint folder, or a Hub repo id such as user/name"
            )
        return cls(repo, revision or None, False)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    def folder(self, *, progress: bool = True) -> Path:
        """The folder itself, or the snapshot of one commit of the repo: all that a command reads comes from there."""
        if self.is_local:
            return Path(self.name)
        from tlstm.hub.locate import checkpoint_folder

        try:
            return checkpoint_folder(self.name, revision=self.revision, progress=progress)
        except Exception as error:  # a mistyped path looks like a repo id
            error.add_note(f"there is no local folder {self.name!r}, so it was looked for on the Hub")
            raise


def add_model_arguments(
    parser: argparse.ArgumentParser, *, dtype: str = "auto", threads: str = "torch's choice"
) -> argparse._ArgumentGroup:
    """`--model` and what it runs on; `dtype` is the default of `--dtype`, `threads` tells that of `--threads`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="PATH|REPO",
        help=f"checkpoint folder, or Hub repo id user/name[@revision] (default: the shipped {DEFAULT_CHECKPOINT})",
    )
    group.add_argument(
        "--dtype",
        default=dtype,
        choices=("auto", *DTYPES),
        help=f"compute in this dtype; auto: as stored, but 16 bits as float32 on a CPU, which is faster and exact "
        f"(default: {dtype})",
    )
    add_backend_arguments(group)
    group.add_argument("--threads", type=int, metavar="N", help=f"CPU threads (default: {threads})")
    return group


def add_backend_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if any)"
    )
    group.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "triton", "native", "reference"),
        help="implementation of the LSTM layers (default: triton on a GPU where it passes its trial, else native)",
    )


def load_model(source: ModelSource, args: argparse.Namespace) -> tuple[LSTMForCausalLM, Tokenizer]:
    """Model (in evaluation mode, on its device) and tokenizer, as the model arguments say."""
    import torch

    from tlstm.models import LSTMForCausalLM
    from tlstm.tokenizer.tokenizer import Tokenizer

    set_threads(args.threads)
    device = find_device(args.device)
    folder = source.folder(progress=not getattr(args, "quiet", False))
    dtype: Any = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = LSTMForCausalLM.from_pretrained(folder, dtype=dtype, device=device)
    if dtype == "auto" and device.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
        model = model.float()
    tokenizer = Tokenizer.from_pretrained(folder)
    set_backend(model, args.backend, device)
    return model.eval(), tokenizer


def set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        if threads < 1:
            raise UsageError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)


def set_backend(model: torch.nn.Module, backend: str, device: torch.device) -> None:
    """Give every LSTM layer of the model this backend; `BackendUnavailableError` where it cannot run on `device`."""
    from tlstm.functional import resolve_backend
    from tlstm.layer import LSTM

    if backend != "auto":
        resolve_backend(backend, device)
    for module in model.modules():
        if isinstance(module, LSTM):
            module.backend = backend


def find_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises `UsageError` for a device that does not exist here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"--device {name}: cannot be used here ({reason}); expected cpu, cuda or cuda:N") from None
    return device


# ---- figures ---------------------------------------------------------------------------------------------------------


def peak_memory(device: torch.device | None = None) -> dict[str, int]:
    """Bytes: the process's largest resident set, `host`, and on a GPU the most that tensors took there, `device`.

    `host` is left out on Windows, whose Python cannot tell.
    """
    import torch

    peak = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device is not None and device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def format_bytes(size: float) -> str:
    """`4.3 MB`; decimal units, as file managers and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_count(number: int) -> str:
    """`4,274,241 (4.27 M)`."""
    for limit, unit in ((10**9, "G"), (10**6, "M")):
        if number >= limit:
            return f"{number:,} ({number / limit:.2f} {unit})"
    return f"{number:,}"
