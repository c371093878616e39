"""Checks of single settings, shared by the configurations: each raises `ValueError` with the setting's name."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_SHOWN = 200  # characters of a wrong value in a message


def shown(value: object) -> str:
    """A value as a message shows it: a file may hold one of a million characters."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def is_int(value: object) -> bool:
    """Whether `value` is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether `value` is a number that a float can hold, and finite; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_int(name: str, value: object, low: int, high: int | None = None, *, optional: bool = False) -> None:
    """A whole number of at least `low`, at most `high`; None too where `optional`."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limits = (f"from {low} to {high}" if high is not None else f"of at least {low}") + " or null" * optional
        raise ValueError(f"{name}: expected a whole number {limits}, got {shown(value)}")


def check_number(name: str, value: object, interval: str, *, optional: bool = False) -> None:
    """A finite number in an `interval` such as "(0, 1]" or "[0, inf)"; None too where `optional`."""
    if optional and value is None:
        return
    low, high = map(float, interval[1:-1].split(","))
    if isinstance(value, int | float) and is_number(value):
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if above and below:
            return
    limits = "a finite number" if interval == "(-inf, inf)" else f"a number in {interval}"
    raise ValueError(f"{name}: expected {limits}{' or null' if optional else ''}, got {shown(value)}")


def check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    """One of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {shown(value)}")
