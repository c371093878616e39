"""Microseconds per token of the ways to generate on a CPU, beside the bare matrix products that none can do without.

    PYTHONPATH=.:kernels nice -n -15 python -m benchmarks.decode_cpu [--turns N] [--out FILE.csv]

Contestants, all in float32 with temperature 0.8, taking turns of about a tenth of a second each in one process:

    naive     what is commonly written: nn.Embedding, nn.LSTM, nn.Linear, softmax, torch.multinomial
    loop      `decoder="loop"`: the model called for every token
    lean      `decoder="lean"`, which "auto" means on a CPU
    products  the matrix products of the lean step alone: `torch.mm(..., out=...)` on its matrices, in its order

The clock is the process's CPU time (on several threads the wall clock), which leaves out the time for which other
programs had the core, but not what they do to caches and memory: hence the turns, and medians of ratios within a turn.
`share` is products / lean: the part of the lean loop's time that is spent in matrix products, torch's overhead per call
included in both.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from tlstm import LSTMConfig, LSTMForCausalLM
from tlstm.benchmark.environment import commit_of, cpu_name
from tlstm.generation.decoders import choose_decoder
from tlstm.generation.state import GenerationState

ROOT = Path(__file__).parents[1]
# name, settings of the model, rows
CASES = [
    ("2x512 characters", {"vocab_size": 65, "hidden_size": 512, "num_layers": 2}, 1),
    ("2x512 characters", {"vocab_size": 65, "hidden_size": 512, "num_layers": 2}, 8),
    ("2x512 characters", {"vocab_size": 65, "hidden_size": 512, "num_layers": 2}, 64),
    ("shakespeare-char shape", {"vocab_size": 65, "hidden_size": 448, "num_layers": 3, "residual": True}, 1),
    ("2x1024 bytes", {"vocab_size": 256, "hidden_size": 1024, "num_layers": 2}, 1),
    ("1x256 characters", {"vocab_size": 65, "hidden_size": 256, "num_layers": 1}, 1),
    ("2x512, 10k words", {"vocab_size": 10_000, "hidden_size": 512, "num_layers": 2}, 1),
]
TEMPERATURE = 0.8
TURN_SECONDS = 0.1
COLUMNS = [
    *("model", "B", "naive_us", "loop_us", "lean_us", "products_us", "tokens_per_second"),
    *("naive_over_lean", "loop_over_lean", "share", "share_p20", "share_p80", "turns"),
    *("clock", "threads", "load", "cpu", "torch", "python", "commit"),
]


def naive_steps(model: LSTMForCausalLM, rows: int) -> Iterator[None]:
    """A loop over torch's own modules, with the model's sizes."""
    config = model.config
    embedding, head = (
        nn.Embedding(config.vocab_size, config.hidden_size),
        nn.Linear(config.hidden_size, config.vocab_size),
    )
    lstm = nn.LSTM(config.hidden_size, config.hidden_size, config.num_layers)
    ids, state = torch.zeros(1, rows, dtype=torch.int64), None
    while True:
        output, state = lstm(embedding(ids), state)
        ids = torch.multinomial(torch.softmax(head(output[0]) / TEMPERATURE, -1), 1).t()
        ids.tolist()
        yield


def decoder_steps(model: LSTMForCausalLM, rows: int, name: str) -> Iterator[None]:
    """Steps of one of the library's decoders."""
    generator = torch.Generator().manual_seed(0)
    start = model.prefill(torch.randint(model.config.vocab_size, (rows, 2), generator=generator))
    state = GenerationState(start.recurrent, start.tokens, start.vocab_size, tuple(range(rows)))
    config = model.generation_config.replace(do_sample=True, temperature=TEMPERATURE, max_new_tokens=10**9)
    decoder, _ = choose_decoder(model, state, config, wanted=name)
    while True:
        decoder.step()
        yield


def product_steps(model: LSTMForCausalLM, rows: int) -> Iterator[None]:
    """The products of a lean step, which looks up the first layer's input product, or does it in a large vocabulary."""
    weights = model.step_weights()
    assert not isinstance(weights, str)
    matrices = weights.products
    if len(weights.embedding) * len(weights.layers[0].w_ih) <= sum(matrix.numel() for matrix in matrices):
        matrices = matrices[1:]
    jobs = []
    for matrix in matrices:
        x = torch.randn(rows, matrix.shape[1])
        jobs.append((x, matrix.t(), torch.empty(rows, matrix.shape[0])))
    while True:
        for x, matrix, out in jobs:
            torch.mm(x, matrix, out=out)
        yield


def main() -> None:
    """Run every case, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=25, help="of every contestant (default: 25)")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    parser.add_argument("--only", help="run only the models whose name contains this")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock, clock_name = (time.process_time, "cpu") if args.threads == 1 else (time.perf_counter, "wall")
    rows = []
    for name, settings, batch in CASES:
        if args.only and args.only not in name:
            continue
        row = {"model": name, "B": batch, **measure(settings, batch, args.turns, clock)}
        row |= {"turns": args.turns, "clock": clock_name, "threads": args.threads, "load": load(), "cpu": cpu_name()}
        row |= {"torch": torch.__version__, "python": platform.python_version(), "commit": commit_of(ROOT)}
        rows.append(row)
        print(" ".join(f"{key}={row[key]}" for key in COLUMNS[:11]), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def measure(settings: dict, batch: int, turns: int, clock: Callable[[], float]) -> dict[str, str]:
    """Medians over the turns of one case."""
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(**settings)).eval()
    contestants = {
        "naive": naive_steps(model, batch),
        "loop": decoder_steps(model, batch, "loop"),
        "lean": decoder_steps(model, batch, "lean"),
        "products": product_steps(model, batch),
    }
    counts = {name: steps_per_turn(steps, clock) for name, steps in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, steps in contestants.items():
            seconds_of(steps, 1, clock)  # the caches are another's
            times[name].append(seconds_of(steps, counts[name], clock) / counts[name] / batch * 1e6)
    median = {name: statistics.median(values) for name, values in times.items()}

    def ratio(of: str, to: str) -> list[float]:
        return sorted(a / b for a, b in zip(times[of], times[to], strict=True))

    share = ratio("products", "lean")
    return {
        **{f"{name}_us": f"{value:.1f}" for name, value in median.items()},
        "tokens_per_second": f"{1e6 / median['lean']:.0f}",
        "naive_over_lean": f"{statistics.median(ratio('naive', 'lean')):.2f}",
        "loop_over_lean": f"{statistics.median(ratio('loop', 'lean')):.2f}",
        "share": f"{statistics.median(share):.3f}",
        "share_p20": f"{share[len(share) // 5]:.3f}",
        "share_p80": f"{share[-1 - len(share) // 5]:.3f}",
    }


def steps_per_turn(steps: Iterator[None], clock: Callable[[], float]) -> int:
    """How many steps fill a turn; at least 2."""
    seconds_of(steps, 3, clock)
    return max(2, int(TURN_SECONDS / (seconds_of(steps, 5, clock) / 5)))


def seconds_of(steps: Iterator[None], count: int, clock: Callable[[], float]) -> float:
    with torch.inference_mode():
        start = clock()
        for _ in range(count):
            next(steps)
        return clock() - start


def load() -> str:
    """The machine's load average over the last minute."""
    return Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else ""


if __name__ == "__main__":
    main()
