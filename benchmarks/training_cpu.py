"""CPU time of a training step with and without `keep_freed_memory`: each turn a fresh process, in alternation.

    python -m benchmarks.training_cpu [--turns 5] [--out benchmarks/results/cpu/training_step.csv]

The model is that of `model_cards/shakespeare-char` (3 x 448, batch 64 x 128, bfloat16 autocast, one thread). Process
CPU time is compared, not wall time, so that a busy machine disturbs both sides alike.
"""

from __future__ import annotations

import argparse
import csv
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from tlstm import LSTMConfig, LSTMForCausalLM
from tlstm.training.memory import keep_freed_memory

STEPS, WARM_UP = 8, 3
FIELDS = ("allocator", "cpu_seconds", "system_seconds", "page_faults", "peak_rss_mb")


def measure(allocator: str) -> list[str]:
    """Median CPU seconds, system seconds and page faults of one step, and the process's peak memory."""
    if allocator == "kept" and not keep_freed_memory():
        raise SystemExit("keep_freed_memory has no effect on this system (it needs glibc)")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LSTMConfig(vocab_size=65, hidden_size=448, num_layers=3, hidden_dropout=0.5, weight_dropout=0.3)
    model = LSTMForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(65, (64, 129))
    samples = []
    for _ in range(STEPS):
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        loss = model.loss_function(logits, ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after = resource.getrusage(resource.RUSAGE_SELF)
        samples.append(
            (
                time.process_time() - start,
                after.ru_stime - before.ru_stime,
                after.ru_minflt - before.ru_minflt,
            )
        )
    seconds, system, faults = (statistics.median(column) for column in zip(*samples[WARM_UP:], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [allocator, f"{seconds:.3f}", f"{system:.3f}", f"{faults:.0f}", f"{peak:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="processes per allocator setting (default: 5)")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--measure", choices=("default", "kept"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(",".join(measure(args.measure)))
        return
    rows = []
    for _ in range(args.turns):
        for allocator in ("default", "kept"):
            command = [sys.executable, "-m", "benchmarks.training_cpu", "--measure", allocator]
            rows.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split(","))
            print(dict(zip(FIELDS, rows[-1], strict=True)), flush=True)
    ratios = [float(kept[1]) / float(default[1]) for default, kept in zip(rows[::2], rows[1::2], strict=True)]
    print(f"CPU time of a step, kept / default: median {statistics.median(ratios):.3f}, {sorted(ratios)}")
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        machine = (torch.__version__, platform.python_version(), commit.stdout.strip())
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow((*FIELDS, "torch", "python", "commit"))
            writer.writerows((*row, *machine) for row in rows)


if __name__ == "__main__":
    main()
