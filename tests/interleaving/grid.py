"""Run a Triton kernel on a CPU with the programs of its grid interleaved by a seeded random schedule.

Triton's interpreter runs the programs one after another, so one that waits for another would wait for ever. Here each
program is a coroutine: at every load of something that programs store to it hands over to a randomly chosen one, over
the weak memory of `memory.py`. One seed is one schedule, the same at every run. Triton itself stays as it is imported:
the kernels of a process that also compiles them are interpreted for the time of a launch only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder
from triton.runtime.jit import JITFunction

from .memory import WeakMemory

greenlet = pytest.importorskip("greenlet")


class DeadlockError(AssertionError):
    """No program can go on; the message says which program waits for what."""


@dataclass
class Program:
    """One program of the grid."""

    index: tuple[int, int, int]
    coroutine: greenlet.greenlet
    weight: float  # how often it is chosen, relative to the others
    loads: dict[int, tuple[bytes, int]] = field(default_factory=dict)  # first address -> result, repeats
    interval: tuple[int, int] | None = None  # first and last byte loaded since the last wake-up
    waits_for: str | None = None

    def note_load(
        self, addresses: np.ndarray, values: np.ndarray, itemsize: int, patience: int, describe: Callable[[int], str]
    ) -> None:
        """A load that finds the same elements unwritten (all bits one) `patience` times makes the program wait.

        A value may hold several elements of `itemsize` bytes. Half an element may well be all ones.
        """
        unwritten = (values.view(np.uint8).reshape(values.size, -1, itemsize) == 255).all(-1).any(-1)
        first, result = int(addresses[0]), values.tobytes()
        seen, repeats = self.loads.get(first, (b"", 0))
        repeats = repeats + 1 if seen == result else 1
        self.loads[first] = result, repeats
        low, high = self.interval or (first, first)
        last_byte = int(addresses.max()) + values.itemsize - 1
        self.interval = min(low, int(addresses.min())), max(high, last_byte)
        if repeats >= patience and unwritten.any():
            self.waits_for = describe(int(addresses[unwritten][0]))

    def note_store(self, low: int, high: int) -> None:
        """A store arrived somewhere in low..high; it may be what the program waits for."""
        if self.interval is not None and low <= self.interval[1] and high >= self.interval[0]:
            self.loads.clear()
            self.interval = self.waits_for = None


class Grid:
    """One launch under one schedule."""

    def __init__(
        self, kernel: JITFunction, grid: tuple[int, ...], arguments: dict[str, Any], seed: int, patience: int
    ) -> None:
        self.patience = patience
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

        def program() -> None:
            with np.errstate(all="ignore"):  # infinities and NaN are part of the game
                function(**bound)

        self.programs = [
            Program(tuple(index), greenlet.greenlet(program), weight)
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
            # For `range(T)`: Triton 3.6 converts an array of one element in a way that numpy 2.4 refuses.
            (tl.tensor, "__index__", lambda tensor: int(tensor.handle.data.item())),
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
            yield
        finally:
            for owner, name, value in originals:
                setattr(owner, name, value) if value is not None else delattr(owner, name)
            for scope in reversed(scopes):
                scope.restore()

    def _load(
        self, pointers: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *options: Any
    ) -> TensorHandle:
        volatile = bool(options[-1])
        element = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        shape = pointers.data.shape
        data = np.zeros(shape, dtype) if other is None else np.broadcast_to(other.data, shape).astype(dtype)
        chosen = np.broadcast_to(mask.data.astype(bool), shape)
        addresses = pointers.data[chosen]
        if addresses.size == 0:
            return TensorHandle(data, element)
        # A load of what no program stores to takes no part in any schedule.
        shared = volatile or self.memory.region_of(int(addresses[0])).stored_to
        early = np.ones(addresses.size, bool)
        if shared:
            self.main.switch()
            if volatile and self.rng.random() < 0.5:  # a tile is not read at one instant
                early = self.rng.random(addresses.size) < 0.5
        bits = np.zeros(addresses.size, dtype)
        for part in (early, ~early):
            if part.any():
                bits[part] = self.memory.load(addresses[part], dtype.itemsize, volatile).view(dtype)[:, 0]
            if part is early and not part.all():
                self.main.switch()
        data[chosen] = bits
        if shared:
            itemsize = self.memory.region_of(int(addresses[0])).itemsize
            self.programs[self.memory.now].note_load(addresses, bits, itemsize, self.patience, self.memory.describe)
        return TensorHandle(data, element)

    def _store(self, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *_: Any) -> None:
        shape = pointers.data.shape
        chosen = np.broadcast_to(mask.data.astype(bool), shape)
        if chosen.any():
            self.memory.store(pointers.data[chosen], np.broadcast_to(value.data, shape)[chosen])

    def _no_atomics(self, *_: Any) -> None:
        raise AssertionError("these kernels promise bit-determinism: no atomics")


def run_interleaved(
    kernel: JITFunction, grid: tuple[int, ...], seed: int = 0, patience: int = 3, **arguments: Any
) -> None:
    """Launch `kernel` on contiguous CPU tensors under the schedule of `seed`.

    A program that has found the same elements unwritten `patience` times is not run again before a store arrives among
    those that it has loaded. bfloat16 is not for this: the interpreter multiplies its bits as integers.

    Raises:
        DeadlockError: no program can go on.
    """
    Grid(kernel, grid, arguments, seed, patience).run()


_rewritten: dict[Callable, Callable] = {}


def _interpreted(function: JITFunction) -> Callable:
    if function.fn not in _rewritten:
        _rewritten[function.fn] = InterpretedFunction(function.fn).rewrite()
    return _rewritten[function.fn]


@triton.jit
def _EXAMPLE_OF_A_KERNEL():  # noqa: N802  Triton finds the modules to patch through a function's globals
    tl.static_assert(True)
