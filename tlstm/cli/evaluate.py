"""`tlstm eval`: loss and perplexity of a model on a text, under two protocols."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tlstm.cli.common import ModelSource, add_model_arguments, load_model
from tlstm.cli.errors import UsageError

DESCRIPTION = """Measure how well a model predicts a text.

Two protocols, both over every token of the text but the first:
  stream   the recurrent state is carried from the first token to the last
  windows  the text is cut into windows of --window tokens, each from an empty state: cold windows,
           as models with a bounded context are measured
"""
EPILOG = """examples:
  tlstm eval --data test.txt
  tlstm eval --model runs/first/model --data input.txt --fraction-last 0.1
  tlstm eval --model user/name --data test.txt --protocol stream --batch-streams 16 --json
"""
_COLUMNS = (
    ("loss", "nats/token", "{:.4f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("bits_per_token", "bits/token", "{:.4f}"),
    ("bits_per_character", "bits/char", "{:.4f}"),
    ("bits_per_byte", "bits/byte", "{:.4f}"),
    ("tokens", "tokens", "{:,}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Narrow weights are measured in float32: the figure is the checkpoint's, not that of the arithmetic at hand.
    add_model_arguments(parser, dtype="float32")
    text = parser.add_argument_group("text")
    text.add_argument("--data", required=True, metavar="PATH", help="UTF-8 text file, or folder of *.txt files")
    part = text.add_mutually_exclusive_group()
    part.add_argument(
        "--fraction-last", type=float, metavar="X", help="only the last part, as training holds it out (e.g. 0.1)"
    )
    part.add_argument("--fraction-first", type=float, metavar="X", help="only the first part (e.g. 0.9)")
    measure = parser.add_argument_group("measurement")
    measure.add_argument("--protocol", default="both", choices=("both", "stream", "windows"), help="(default: both)")
    measure.add_argument(
        "--window", type=int, default=256, metavar="N", help="tokens per window, and per forward pass (default: 256)"
    )
    measure.add_argument(
        "--batch-streams",
        type=int,
        default=1,
        metavar="N",
        help="stream: cut the text into N parts run side by side, each from an empty state; faster (default: 1)",
    )
    measure.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="windows: so many side by side (default: 64)"
    )
    parser.add_argument_group("output").add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    for name in ("window", "batch_streams", "batch_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    for name in ("fraction_last", "fraction_first"):
        fraction = getattr(args, name)
        if fraction is not None and not 0 < fraction <= 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected a number in (0, 1], got {fraction}")

    from tlstm.training.data import text_files, tokenize
    from tlstm.training.evaluate import evaluate_stream, evaluate_windows

    text_files(args.data)  # a wrong path is told before a model is loaded
    source = ModelSource.parse(args.model)
    model, tokenizer = load_model(source, args)
    results = {}
    with tempfile.TemporaryDirectory(prefix="tlstm-eval-") as cache:
        ids, _ = tokenize(args.data, tokenizer, Path(cache), "text")
        ids = _part(ids, args)
        if args.protocol != "windows":
            results["stream"] = _timed(
                lambda: evaluate_stream(
                    model, ids, batch_streams=args.batch_streams, window=args.window, tokenizer=tokenizer
                )
            )
        if args.protocol != "stream":
            results["windows"] = _timed(
                lambda: evaluate_windows(model, ids, args.window, batch_size=args.batch_size, tokenizer=tokenizer)
            )
        tokens = len(ids)
    report = {
        "model": str(source),
        "data": args.data,
        "part": _part_name(args),
        "tokens": tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "results": results,
    }
    print(json.dumps(report, indent=2) if args.json else _table(report))
    return 0


def _part(ids: Any, args: argparse.Namespace) -> Any:
    """The same boundary as the trainer's: both parts of a split fit together."""
    if args.fraction_last is not None:
        return ids[int((1.0 - args.fraction_last) * len(ids)) :]
    if args.fraction_first is not None:
        return ids[: int(args.fraction_first * len(ids))]
    return ids


def _part_name(args: argparse.Namespace) -> str:
    if args.fraction_last is not None:
        return f"last {args.fraction_last:g}"
    return "all" if args.fraction_first is None else f"first {args.fraction_first:g}"


def _timed(measure: Callable[[], Any]) -> dict[str, Any]:
    start = time.perf_counter()
    result = measure().to_dict()
    return result | {"tokens_per_second": result["tokens"] / (time.perf_counter() - start)}


def _table(report: dict[str, Any]) -> str:
    columns = [column for column in _COLUMNS if any(column[0] in row for row in report["results"].values())]
    rows = [["", *(title for _, title, _ in columns)]]
    for row in report["results"].values():
        rows.append([row["protocol"], *(form.format(row[key]) if key in row else "" for key, _, form in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head = (
        f"{report['model']} on {report['data']} ({report['part']}, {report['tokens']:,} tokens, in {report['dtype']})"
    )
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([head, "", *(line.rstrip() for line in lines)])
