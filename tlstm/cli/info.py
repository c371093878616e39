"""`tlstm info`: what a checkpoint is, from its headers and JSON files; no weight is read."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlstm.cli.common import DEFAULT_CHECKPOINT, ModelSource, format_bytes, format_count

if TYPE_CHECKING:
    from tlstm.checkpoint.stored_weights import TensorHeader

DESCRIPTION = """Say what a checkpoint is: parameters, layers, vocabulary, dtype, size on disk, how it was trained,
and with which settings it generates. Only headers and JSON files are read, so it is quick for any size.
"""
EPILOG = """examples:
  tlstm info
  tlstm info --model runs/first/model
  tlstm info --model user/name@v1.0 --json | jq .parameters.total
"""
TRAINING_NAME = "training.json"
_PARTS = (("embedding", "model.embedding."), ("lstm", "model.layers."), ("projection", "model.projection."))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="PATH|REPO",
        help=f"checkpoint folder, or Hub repo id user/name[@revision] (default: the shipped {DEFAULT_CHECKPOINT})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    source = ModelSource.parse(args.model)
    report = {"model": str(source)} | describe_checkpoint(source.folder())
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def describe_checkpoint(folder: Path, *, variant: str | None = None) -> dict[str, Any]:
    """Everything `info` tells, as JSON values; of the weights `model.<variant>.safetensors`, where one is named.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one. ValueError: a damaged JSON file; the message names it.
    """
    from tlstm.checkpoint.folder_view import FolderView, read_consistently
    from tlstm.checkpoint.json_file import read_json
    from tlstm.checkpoint.stored_weights import open_checkpoint
    from tlstm.config import LSTMConfig
    from tlstm.generation.config import GENERATION_CONFIG_NAME, GenerationConfig
    from tlstm.tokenizer.tokenizer import Tokenizer

    def read(view: FolderView) -> dict[str, Any]:
        config = LSTMConfig.from_json(view.read_bytes("config.json"), source=str(view.folder / "config.json"))
        with open_checkpoint(view, variant) as weights:
            headers = dict(weights.headers)
        sizes = {name: path.stat().st_size for name in view.names() if (path := view.path(name)) is not None}
        generation = None
        if view.path(GENERATION_CONFIG_NAME) is not None:
            settings = GenerationConfig.from_json(
                view.read_bytes(GENERATION_CONFIG_NAME), source=str(view.folder / GENERATION_CONFIG_NAME)
            )
            generation = {name: value for name, value in settings.to_dict().items() if name != "tlstm_version"}
        training = view.path(TRAINING_NAME)
        shards = sorted({header.file.name for header in headers.values()})
        return {
            "architectures": config.architectures,
            "parameters": count_parameters(headers),
            "layers": [
                {"width": width, "output": output}
                for width, output in zip(config.widths, config.output_sizes, strict=True)
            ],
            "embedding_size": config.embedding_width,
            "tied": config.tie_word_embeddings,
            "vocab_size": config.vocab_size,
            "tokenizer": _tokenizer_kind(view, Tokenizer),
            "dtype": "+".join(sorted({str(header.dtype).removeprefix("torch.") for header in headers.values()})),
            "weight_files": shards,
            "files": sizes,
            "size_on_disk": sum(sizes.values()),
            "config": config.to_dict(),
            "generation": generation,
            "training": None if training is None else read_json(training),
        }

    return read_consistently(folder, read)


def count_parameters(headers: Mapping[str, TensorHeader]) -> dict[str, int]:
    """Stored parameters: in all, and of embedding, LSTM layers, output projection and head.

    `recurrent` counts the part of the LSTM layers that every step reads: `weight_hh` (and `weight_hr`). A tied head has
    its bias only; its matrix is the embedding's.
    """
    from tlstm.quantization import is_scale

    sizes = {name: math.prod(header.shape) for name, header in headers.items() if not is_scale(name, headers)}
    counts = {"total": sum(sizes.values())}
    for part, prefix in _PARTS:
        counts[part] = sum(size for name, size in sizes.items() if name.startswith(prefix))
    counts["recurrent"] = sum(size for name, size in sizes.items() if ".weight_hh_" in name or ".weight_hr_" in name)
    counts["head"] = sum(size for name, size in sizes.items() if name.startswith("lm_head."))
    return counts


def _tokenizer_kind(view: Any, tokenizer_class: Any) -> str | None:
    path = view.path("tokenizer.json")
    return None if path is None else tokenizer_class.from_pretrained(path.parent).kind


# ---- as text ---------------------------------------------------------------------------------------------------------


def _text(report: dict[str, Any]) -> str:
    counts = report["parameters"]
    parts = [f"{part} {counts[part]:,}" for part in ("embedding", "lstm", "projection", "head") if counts[part]]
    widths = [str(layer["width"]) for layer in report["layers"]]
    projected = f", projected to {report['layers'][0]['output']}" if _is_projected(report) else ""
    rows = [
        ("model", report["model"]),
        ("class", ", ".join(report["architectures"] or ["not stated"])),
        ("parameters", format_count(counts["total"])),
        ("", ", ".join(parts) + (" (head tied to the embedding)" if report["tied"] else "")),
        ("layers", f"{len(widths)} LSTM, {'-'.join(widths)} wide{projected}; embedding {report['embedding_size']}"),
        ("vocabulary", f"{report['vocab_size']:,} ({report['tokenizer'] or 'no'} tokenizer)"),
        ("dtype", report["dtype"]),
        ("size on disk", _size(report)),
        *(("", f"{name}  {format_bytes(size)}") for name, size in report["files"].items()),
        ("generation", _settings(report["generation"]) if report["generation"] is not None else "library defaults"),
        *_training_rows(report["training"]),
    ]
    return "\n".join(f"{label:<13} {value}".rstrip() for label, value in rows)


def _is_projected(report: dict[str, Any]) -> bool:
    return any(layer["width"] != layer["output"] for layer in report["layers"])


def _size(report: dict[str, Any]) -> str:
    shards = len(report["weight_files"])
    return format_bytes(report["size_on_disk"]) + (f", weights in {shards} shards" if shards > 1 else "")


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in sorted(settings.items())) or "library defaults"


def _training_rows(training: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What is known of the training, most telling first; whatever is not in `training.json` is left out."""
    if training is None:
        return [("training", "not stated")]
    try:
        return _training_rows_of(training)
    except (LookupError, TypeError, ValueError):
        return [("training", f"{TRAINING_NAME} does not have the form that `tlstm train` gives it")]


def _training_rows_of(training: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        f"validation {result['loss']:.4f} nats/token, perplexity {result['perplexity']:.3f} ({result['protocol']})"
        for result in training.get("valid", ())
    ]
    for key in ("epochs", "steps", "tokens", "seconds", "tokens_per_second", "weights", "hardware", "command"):
        value = training.get(key)
        if value is not None:
            rows.append(f"{key.replace('_', ' ')} {value:,}" if isinstance(value, int | float) else f"{key} {value}")
    return [("training" if index == 0 else "", row) for index, row in enumerate(rows)] or [("training", "not stated")]
