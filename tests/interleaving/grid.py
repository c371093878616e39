"""Run a Triton kernel on a CPU with the programs of its grid interleaved by a seeded random schedule.

Triton's interpreter runs the programs one after another, so one that waits for another would wait for ever. Here each
program is a coroutine: at every volatile load or atomic it hands over to a randomly chosen one, over the weak memory of
`memory.py`. One seed is one schedule, the same at every run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import greenlet
import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder
from triton.runtime.jit import JITFunction

from .memory import WeakMemory

# A program whose load of the same elements gave the same result so often in a row is waiting for a store.
REPEATS_OF_A_WAITING_PROGRAM = 3


class DeadlockError(AssertionError):
    """No program can go on; the message says which program waits for what."""


@dataclass
class Program:
    """One program of the grid."""

    index: tuple[int, int, int]
    coroutine: greenlet.greenlet
    weight: float  # how often it is chosen, relative to the others
    loads: dict[int, tuple[bytes, int]] = field(default_factory=dict)  # first address -> result, repeats
    interval: tuple[int, int] | None = None  # of the addresses loaded since the last wake-up
    waits_for: str | None = None

    def note_load(self, addresses: np.ndarray, values: np.ndarray, describe: Callable[[int], str]) -> None:
        """A load that keeps giving the same result makes the program wait."""
        first, result = int(addresses[0]), values.tobytes()
        seen, repeats = self.loads.get(first, (b"", 0))
        repeats = repeats + 1 if seen == result else 1
        self.loads[first] = result, repeats
        low, high = self.interval or (first, first)
        self.interval = min(low, int(addresses.min())), max(high, int(addresses.max()))
        unwritten = values.view(f"u{values.itemsize}") == np.iinfo(f"u{values.itemsize}").max
        if repeats >= REPEATS_OF_A_WAITING_PROGRAM and (unwritten.any() or self.waits_for is None):
            self.waits_for = describe(int(addresses[unwritten][0]) if unwritten.any() else first)

    def note_store(self, low: int, high: int) -> None:
        """A store arrived somewhere in low..high; it may be what the program waits for."""
        if self.interval is not None and low <= self.interval[1] and high >= self.interval[0]:
            self.loads.clear()
            self.interval = self.waits_for = None


class Grid:
    """One launch under one schedule."""

    def __init__(self, kernel: JITFunction, grid: tuple[int, ...], arguments: dict[str, Any], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        grid = (*grid, 1, 1)[:3]
        indices = list(np.ndindex(*grid))
        # From lock-step to one program far ahead and another far behind, and from strong to very lazy stores.
        spread = self.rng.choice([0.0, 1.0, 3.0])
        weights = np.exp(spread * self.rng.standard_normal(len(indices)))
        tensors = {name: a for name, a in arguments.items() if isinstance(a, torch.Tensor)}
        rate = self.rng.choice([1.0, 0.3, 0.05])
        self.memory = WeakMemory(tensors, len(indices), self.rng, rate, self._store_arrived)
        self.shape = grid
        self.main = greenlet.getcurrent()
        function = _interpreted(kernel)
        constants = {p.name for p in kernel.params if p.is_constexpr}
        bound = inspect.getcallargs(function, **arguments)
        bound = {name: a if name in constants else interpreter._implicit_cvt(a) for name, a in bound.items()}
        self.programs = [
            Program(tuple(index), greenlet.greenlet(lambda: function(**bound)), weight)
            for index, weight in zip(indices, weights, strict=True)
        ]

    def run(self) -> None:
        live = list(range(len(self.programs)))
        with self._interpreting():
            while live:
                ready = [n for n in live if self.programs[n].waits_for is None]
                if ready:
                    weights = np.array([self.programs[n].weight for n in ready])
                    n = ready[self.rng.choice(len(ready), p=weights / weights.sum())]
                    self._resume(n)
                    if self.programs[n].coroutine.dead:
                        live.remove(n)
                elif not any(self.memory.pending):
                    waits = (f"program {p.index} waits for {p.waits_for}" for p in (self.programs[n] for n in live))
                    raise DeadlockError(f"no program can go on: {'; '.join(waits)}")
                self.memory.drain_some()
            self.memory.drain()

    def _resume(self, n: int) -> None:
        self.memory.now = n
        interpreter_builder.set_grid_idx(*self.programs[n].index)
        self.programs[n].coroutine.switch()

    def _store_arrived(self, low: int, high: int) -> None:
        for program in self.programs:
            program.note_store(low, high)

    @contextmanager
    def _interpreting(self) -> Iterator[None]:
        """Triton's language means its interpreter, and memory means `self.memory`."""
        scopes = [interpreter._patch_lang(f) for f in (_EXAMPLE_OF_A_KERNEL.fn, tl.standard.max.fn)]
        replaced = [
            (JITFunction, "__call__", lambda function, *args, **kwargs: _interpreted(function)(*args, **kwargs)),
            (interpreter_builder, "create_masked_load", self._load),
            (interpreter_builder, "create_masked_store", self._store),
            (interpreter_builder, "create_atomic_rmw", self._no_atomics),
            (interpreter_builder, "create_atomic_cas", self._no_atomics),
        ]
        originals = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in replaced]
        interpreter_builder.set_grid_dim(*self.shape)
        try:
            for owner, name, value in replaced:
                setattr(owner, name, value)
            with np.errstate(all="ignore"):  # infinities and NaN are part of the game
                yield
        finally:
            for owner, name, value in originals:
                setattr(owner, name, value) if value is not None else delattr(owner, name)
            for scope in reversed(scopes):
                scope.restore()

    def _load(self, pointers: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *options: Any) -> TensorHandle:
        volatile = bool(options[-1])
        element = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        data = np.zeros(pointers.data.shape, dtype) if other is None else np.broadcast_to(other.data, pointers.data.shape)
        data = data.astype(dtype)
        chosen = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
        addresses = pointers.data[chosen]
        if volatile:
            self.main.switch()
        if addresses.size == 0:
            return TensorHandle(data, element)
        if not volatile:
            data[chosen] = self.memory.load(addresses, volatile=False).view(dtype)
            return TensorHandle(data, element)
        # A tile is not read at one instant.
        early = self.rng.random(addresses.size) < self.rng.choice([0.5, 1.0])
        bits = np.zeros(addresses.size, dtype)
        for part in (early, ~early):
            if part.any():
                bits[part] = self.memory.load(addresses[part], volatile=True).view(dtype)
                if not part.all() and part is early:
                    self.main.switch()
        data[chosen] = bits
        self.programs[self.memory.now].note_load(addresses, bits, self.memory.describe)
        return TensorHandle(data, element)

    def _store(self, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *_: Any) -> None:
        shape = pointers.data.shape
        chosen = np.broadcast_to(mask.data.astype(bool), shape)
        if chosen.any():
            self.memory.store(pointers.data[chosen], np.broadcast_to(value.data, shape)[chosen])

    def _no_atomics(self, *_: Any) -> None:
        raise AssertionError("these kernels promise bit-determinism: no atomics")


def run_interleaved(kernel: JITFunction, grid: tuple[int, ...], seed: int, **arguments: Any) -> None:
    """Launch `kernel` on CPU tensors under the schedule of `seed`.

    Raises:
        DeadlockError: no program can go on.
    """
    Grid(kernel, grid, arguments, seed).run()


_rewritten: dict[Callable, Callable] = {}


def _interpreted(function: JITFunction) -> Callable:
    if function.fn not in _rewritten:
        _rewritten[function.fn] = InterpretedFunction(function.fn).rewrite()
    return _rewritten[function.fn]


@triton.jit
def _EXAMPLE_OF_A_KERNEL():  # noqa: N802  Triton finds the modules to patch through a function's globals
    tl.static_assert(True)
