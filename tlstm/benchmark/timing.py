"""Interleaved timing: every call takes its turn in every round, in random order, on the next of several inputs.

Whatever the machine does besides, and however its clocks drift, hits all calls alike; a round's ratios are between
times of the same moment. On a GPU times are those of CUDA events. On one CPU thread they are the process's CPU time,
which leaves out the time for which other programs had the core; on several threads they are the wall clock's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

MIN_TURNS, MAX_TURNS = 5, 60
WARM_UP = 3


@dataclass(frozen=True)
class Call:
    """What is timed: `run(n)` on input set n. `before(n)`, if any, is its preparation, which is not timed."""

    run: Callable[[int], object]
    before: Callable[[int], object] | None = None


class Clock:
    """Seconds of calls on one device."""

    def __init__(self, device: str | torch.device) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        single = torch.get_num_threads() == 1
        self._now = time.process_time if single else time.perf_counter
        self.name = "cuda_event" if self.on_gpu else self._now.__name__
        self.shortest_turn = 0.01 if self.on_gpu else 0.002  # well above the resolution

    def time(self, call: Call, inputs: Sequence[int]) -> float:
        """Seconds of one call on average, over these inputs."""
        if call.before is not None:
            for n in inputs:
                call.before(n)
        if not self.on_gpu:
            start = self._now()
            for n in inputs:
                call.run(n)
            return (self._now() - start) / len(inputs)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for n in inputs:
            call.run(n)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / len(inputs)


def warm_up(call: Call, clock: Clock, input_sets: int = 1) -> float:
    """Run a few times and return the fastest; compilation and caches are behind us then."""
    return min(clock.time(call, [n % input_sets]) for n in range(WARM_UP))


def interleave(
    calls: Mapping[str, Call],
    clock: Clock,
    seconds: float,
    input_sets: int = 1,
    seed: int = 0,
    max_turns: int = MAX_TURNS,
) -> dict[str, np.ndarray]:
    """Seconds per call, one entry for each turn: entry n of all results is of the same turn.

    Args:
        seconds: wall time after which no further turn begins; MIN_TURNS are always taken.
        input_sets: the calls are given 0 .. input_sets - 1 in rotation.
    """
    if not calls:
        return {}
    rng = random.Random(seed)
    repeats = {}
    for name, call in calls.items():
        wanted = max(1, int(clock.shortest_turn / max(warm_up(call, clock, input_sets), 1e-9)))
        repeats[name] = wanted if call.before is None else min(wanted, input_sets)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, turn = list(calls), 0
    end = time.monotonic() + seconds
    while turn < MIN_TURNS or (turn < max_turns and time.monotonic() < end):
        rng.shuffle(order)
        for name in order:
            inputs = [(turn + n) % input_sets for n in range(repeats[name])]
            times[name].append(clock.time(calls[name], inputs))
        turn += 1
    return {name: np.array(values) for name, values in times.items()}
