"""What the host does for each token of the decode kernel, without a GPU: everything but the kernel.

    PYTHONPATH=.:kernels python -m benchmarks.decode_host [--turns N] [--out FILE.csv]

The kernel's launch is replaced by one that writes tokens at once, so that what is left is Python and torch: slots,
texts, chunks, endings. On a GPU the host works beside the kernel; it must not be slower. Two ways to read, in turns:
`step` takes one token of every text at a time, as a streamer needs them, `advance` all of a chunk, as `generate` does.
Times are the process's CPU time, one thread, without the filling of buffers, which on a GPU is not the host's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from tlstm_kernels.decode_plan import choose_decode_plan
from tlstm_kernels.decode_shape import DecodePlan
from tlstm_kernels.gpu import KNOWN_GPUS

from benchmarks.compiled_table import Row
from benchmarks.host_figures import run, times_of
from tlstm import LSTMConfig, LSTMForCausalLM
from tlstm.generation.gpu_model import choice_of, shape_of
from tlstm.generation.inputs import resolve_config
from tlstm.generation.kernel_rows import KernelRows

STEPS = 2000
BATCHES = (1, 8, 64)
WAYS = ("step", "advance")
COLUMNS = ("way", "B", "us", "p20", "p80")  # microseconds of one step of all texts
KEY = (1 << 32) | (0x7FFFFFFF - 5)  # a score, and token 5


def empty_kernel(kernel: Any, grid: Any, *, results_ptr: Any, streams_in_ptr: Any, streams_out_ptr: Any, **_: Any):
    """Takes a launch and writes its tokens."""
    results_ptr.fill_(KEY)
    streams_out_ptr.copy_(streams_in_ptr)


def seconds_of(model: LSTMForCausalLM, B: int, way: str) -> float:
    """CPU time of all steps of B texts."""
    asked = {"max_new_tokens": STEPS, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    config = resolve_config(None, model.generation_config, model.config, asked)
    plan = choose_decode_plan(shape_of(model), choice_of(config), B, KNOWN_GPUS["H100"])
    rows = KernelRows(model, config, B, plan=plan, launcher=empty_kernel)
    texts = rows.add(model.prefill([[1]] * B))
    step = rows.step if way == "step" else rows.advance
    started = time.process_time()
    with torch.inference_mode():
        while rows.texts:
            step()
    seconds = time.process_time() - started
    assert all(len(text.new_tokens) == STEPS for text in texts)
    return seconds - filling(plan)


def filling(plan: DecodePlan) -> float:
    """CPU time to fill the buffers that all launches of a plan filled."""
    started = time.process_time()
    torch.full((STEPS, plan.streams, plan.shape.stride), -1.0)
    torch.full((STEPS, plan.streams, plan.keys), -1)
    return time.process_time() - started


def measure(turns: int) -> Iterator[Row]:
    model = LSTMForCausalLM(LSTMConfig(65, hidden_size=64, num_layers=2)).eval()
    for B in BATCHES:
        taken = [{way: seconds_of(model, B, way) for way in WAYS} for _ in range(turns + 1)][1:]
        for way in WAYS:
            yield {"way": way, "B": str(B), **times_of([turn[way] / STEPS * 1e6 for turn in taken], 2)}


if __name__ == "__main__":
    run(__doc__, COLUMNS, measure)
