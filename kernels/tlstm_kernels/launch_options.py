"""How kernels are to be launched, where a caller knows better than the plan or looks for an error.

The options hold in a context (`with launch_options(...)`) and, for the gradients, in whatever was computed inside it:
each thread and each task has its own, and nothing is switched for anybody else. Where no context says otherwise the
environment variables TLSTM_PLAN and TLSTM_MAX_SPINS do, as they were at the first launch:

    TLSTM_PLAN="forward: units=8 rows=16; backward: regime=streamed"    fields of `launch_plan.LaunchPlan`
    TLSTM_MAX_SPINS=1000000    give a wait up after so many loads, and report which program waited for what

(TLSTM_PLAN_TABLE names a file of measured plans: see `plan_table`.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache

from .checks import ArgumentError

Pins = Mapping[str, int | str]


@dataclass(frozen=True)
class LaunchOptions:
    """Fields of the two plans that must have the given values, and the bound on waiting (0: none)."""

    forward: Pins = field(default_factory=dict)
    backward: Pins = field(default_factory=dict)
    max_spins: int = 0

    def pins(self, kernel: str) -> Pins:
        return self.forward if kernel == "forward" else self.backward


_current: ContextVar[LaunchOptions | None] = ContextVar("tlstm_launch_options", default=None)


def current_options() -> LaunchOptions:
    """The options of the innermost context, or those of the environment."""
    return _current.get() or _from_environment()


@contextmanager
def launch_options(
    forward: Pins | None = None, backward: Pins | None = None, max_spins: int | None = None
) -> Iterator[LaunchOptions]:
    """Launch kernels with these options inside the context; what is None stays as it is outside.

    Args:
        forward, backward: fields of the plan to pin: regime, units, rows, block_k, num_warps, groups. A plan that
            cannot run with them is refused with a ValueError when a kernel is launched.
        max_spins: bound every wait for another program. Each launch then waits for the GPU, and a wait that was given
            up raises `launch.ExchangeError`.
    """
    outer = current_options()
    options = LaunchOptions(
        outer.forward if forward is None else forward,
        outer.backward if backward is None else backward,
        outer.max_spins if max_spins is None else max_spins,
    )
    with applied(options):
        yield options


@contextmanager
def applied(options: LaunchOptions) -> Iterator[None]:
    """Put options in force that were taken earlier, perhaps by another thread: autograd runs backward in its own."""
    token = _current.set(options)
    try:
        yield
    finally:
        _current.reset(token)


def parse_pins(text: str) -> dict[str, dict[str, int | str]]:
    """The value of TLSTM_PLAN as pins for each kernel."""
    pins: dict[str, dict[str, int | str]] = {"forward": {}, "backward": {}}
    for part in filter(str.strip, text.split(";")):
        kernel, colon, fields = part.partition(":")
        pairs = [pair.partition("=") for pair in fields.split()]
        if kernel.strip() not in pins or not colon or not all(equals for _, equals, _ in pairs):
            raise ArgumentError(
                f"TLSTM_PLAN: expected 'forward: name=value ...; backward: name=value ...'; received {text!r}."
            )
        pins[kernel.strip()] |= {name: int(value) if value.isdecimal() else value for name, _, value in pairs}
    return pins


@cache
def _from_environment() -> LaunchOptions:
    spins = os.environ.get("TLSTM_MAX_SPINS", "0")
    if not spins.isdecimal():
        raise ArgumentError(f"TLSTM_MAX_SPINS: expected a whole number, 0 for no bound; received {spins!r}.")
    return LaunchOptions(**parse_pins(os.environ.get("TLSTM_PLAN", "")), max_spins=int(spins))
