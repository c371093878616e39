"""Tokens a second of the decode kernel on a GPU, beside a loop over torch.nn.LSTM and the same loop as a CUDA graph.

    PYTHONPATH=.:kernels python benchmarks/decode_gpu.py --out DIR [--seconds S]

Each row samples from the plain distribution of a model of that size with random weights: the kernel through
`GpuDecoder`, host included; the loop as embedding, nn.LSTM, linear, and Gumbel-max with torch's own random numbers,
with no host in it either once it is a graph. In turns in one process; median and percentiles over the turns.
Rows are written as they come, those with a target first, until the time is up.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tlstm_kernels.decode_plan import choose_decode_plan
from tlstm_kernels.kernel_calls import gpu_of

from tlstm import LSTMConfig, LSTMForCausalLM
from tlstm.generation.gpu_decoder import GpuDecoder
from tlstm.generation.gpu_model import choice_of, shape_of
from tlstm.generation.inputs import resolve_config

# (layers, width, vocabulary, streams) -> tokens a second to reach on an H100 or H200.
TARGETS = {(2, 1024, 65, 1): 120_000, (2, 1024, 65, 64): 4_000_000}
NEW = 1024
COLUMNS = [
    *("layers", "width", "vocabulary", "streams", "turns", "kernel_us_p20", "kernel_us_p50", "kernel_us_p80"),
    *("graph_us_p50", "loop_us_p50", "kernel_tokens_per_s", "graph_ratio_p50", "target", "model_us", "plan", "error"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=570)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with open(arguments.out / "decode.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for sizes in table():
            if time.monotonic() > end:
                break
            row: dict[str, Any] = dict(zip(COLUMNS, sizes, strict=False)) | {"target": TARGETS.get(sizes, "")}
            try:
                row |= measure(*sizes)
            except (RuntimeError, ValueError) as error:
                row["error"], failed = f"{type(error).__name__}: {error}".splitlines()[0][:300], failed + 1
            writer.writerow(row)
            file.flush()
            print(" ".join(f"{name}={row[name]}" for name in COLUMNS if name in row and name != "plan"), flush=True)
    raise SystemExit(failed > 0)


def table() -> Iterator[tuple[int, int, int, int]]:
    yield from TARGETS
    for sizes in product((1, 2), (256, 512, 1024), (65, 256, 10_000, 50_000), (1, 8, 64)):
        if sizes not in TARGETS:
            yield sizes


def measure(layers: int, width: int, vocabulary: int, streams: int) -> dict[str, Any]:
    """One row, in microseconds per step of all streams."""
    torch.manual_seed(0)
    config = LSTMConfig(vocabulary, hidden_size=width, num_layers=layers)
    model = LSTMForCausalLM(config).eval().to("cuda", torch.bfloat16)
    graph, loop = baseline(model, streams)
    times = in_turns([kernel_call(model, streams), graph, loop])
    kernel, graphed, plain = 1e6 * times
    shape, gpu = shape_of(model), gpu_of(torch.cuda.current_device())
    plan = choose_decode_plan(shape, choice_of(request(model)), streams, gpu)
    figures = {f"kernel_us_p{p}": f"{np.percentile(kernel, p):.3f}" for p in (20, 50, 80)}
    return {
        "turns": times.shape[1],
        **figures,
        "graph_us_p50": f"{np.median(graphed):.3f}",
        "loop_us_p50": f"{np.median(plain):.3f}",
        "kernel_tokens_per_s": f"{streams / np.median(kernel) * 1e6:.0f}",
        "graph_ratio_p50": f"{np.median(graphed / kernel):.2f}",
        "model_us": "" if plan is None else f"{plan.cost.total:.2f}",
        "plan": "" if plan is None else str(plan),
    }


def request(model: LSTMForCausalLM) -> Any:
    given = {"max_new_tokens": NEW, "do_sample": True, "pad_token_id": 0}
    return resolve_config(None, model.generation_config, model.config, given)


def kernel_call(model: LSTMForCausalLM, streams: int) -> Callable[[], float]:
    config = request(model)
    reason = GpuDecoder.refusal(model, config)
    if reason is not None:
        raise ValueError(reason)
    start = replace(model.prefill([[1]] * streams), seeds=tuple(range(streams)))

    def call() -> float:
        decoder = GpuDecoder(model, start, config)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        while not decoder.finished:
            decoder.step()
        return (time.perf_counter() - begin) / NEW

    return call


def baseline(model: LSTMForCausalLM, streams: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """A step of torch.nn.LSTM with sampling, as a CUDA graph and as plain calls: seconds per step."""
    config = model.config
    lstm = torch.nn.LSTM(config.embedding_width, config.hidden_size, config.num_layers).to("cuda", torch.bfloat16)
    tokens = torch.ones(1, streams, dtype=torch.int64, device="cuda")
    h, c = (torch.zeros(config.num_layers, streams, config.hidden_size).to("cuda", torch.bfloat16) for _ in range(2))

    @torch.no_grad()
    def step() -> None:
        y, (h_n, c_n) = lstm(model.model.embedding(tokens), (h, c))
        logits = model.lm_head(y[0]).float()
        noise = -torch.log(-torch.log(torch.rand_like(logits)))
        tokens[0] = (logits + noise).argmax(-1)
        h.copy_(h_n)
        c.copy_(c_n)

    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return timed(graph.replay, NEW), timed(step, NEW // 4)


def timed(call: Callable[[], Any], repeats: int) -> Callable[[], float]:
    def run() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / repeats

    return run


def in_turns(calls: list[Callable[[], float]], seconds: float = 3.0) -> np.ndarray:
    """Seconds per step, (calls, turns); the first turn compiles and is left out."""
    for call in calls:
        call()
    turns: list[list[float]] = []
    end = time.monotonic() + seconds
    while len(turns) < 5 or (time.monotonic() < end and len(turns) < 30):
        turns.append([call() for call in calls])
    return np.array(turns).T


if __name__ == "__main__":
    main()
