"""From times to figures: percentiles, ratios of turns, means of ratios, slopes of curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """The 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


class Slope(NamedTuple):
    """A curve `y` over `x` in two readings, each by least squares."""

    per_unit: float  # of the straight line: y gained for one more of x
    intercept: float  # of the straight line: y at x = 0
    exponent: float  # of the power law: y ~ x ** exponent


def spread(values: Sequence[float] | np.ndarray) -> Spread:
    return Spread(*(float(p) for p in np.percentile(np.asarray(values, dtype=np.float64), (20, 50, 80))))


def speedup(base: np.ndarray, other: np.ndarray) -> Spread:
    """How many times as fast `other` is as `base`: the ratio within each turn, which drifts of the machine cancel in.

    Args:
        base, other: seconds, (turns,) each; entry n of both is of the same turn.
    """
    if base.shape != other.shape:
        raise ValueError(f"speedup: expected times of the same turns; received {base.shape} and {other.shape} of them.")
    return spread(base / other)


def geometric_mean(ratios: Sequence[float]) -> float:
    """The mean by which one may average ratios; NaN of none."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def slope(x: Sequence[float], y: Sequence[float]) -> Slope | None:
    """None for fewer than two different x."""
    if len(set(x)) < 2:
        return None
    line = np.polyfit(x, y, 1)
    power = np.polyfit(np.log(x), np.log(y), 1)
    return Slope(float(line[0]), float(line[1]), float(power[0]))
