"""Streams of arrivals: who comes to the fleet and when, block after block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fluidopt.simulation.kernel import compiled
from fluidopt.simulation.system import FloatArray, IntArray

BLOCK = 8192

Arrivals = Iterator[tuple[FloatArray, IntArray]]
"""Blocks of arrivals: increasing times, s, and classes, equally long; an arrival at infinity ends the stream."""


class Poisson:
    """Independent Poisson processes.

    Args:
        rate: (I,) arrival rates, 1/s.
        rng: source of randomness; its state alone determines the stream.
    """

    def __init__(self, rate: FloatArray, rng: np.random.Generator) -> None:
        self.total, self.rng, self.time = float(rate.sum()), rng, 0.0
        self.threshold, self.alias = alias_table(rate)

    def __iter__(self) -> Poisson:
        return self

    def __next__(self) -> tuple[FloatArray, IntArray]:
        if self.total == 0:
            return np.array([np.inf]), np.zeros(1, dtype=np.int64)
        times, classes = np.empty(BLOCK), np.empty(BLOCK, dtype=np.int64)
        self.time = _fill(times, classes, self.rng, self.time, self.total, self.threshold, self.alias)
        return times, classes


@compiled
def _fill(
    times: FloatArray,
    classes: IntArray,
    rng: np.random.Generator,
    time: float,
    total: float,
    threshold: FloatArray,
    alias: IntArray,
) -> float:
    """A block of arrivals after `time`; returns the time of the last."""
    for k in range(times.size):
        time += rng.standard_exponential() / total
        scaled = rng.random() * alias.size
        i = min(int(scaled), alias.size - 1)
        times[k] = time
        classes[k] = i if scaled - i < threshold[i] else alias[i]
    return time


def alias_table(rates: FloatArray) -> tuple[FloatArray, IntArray]:
    """Walker's alias table, built as by Vose (1991): cell i stands for class i below its threshold, else its alias."""
    threshold = np.ones(rates.size)
    alias = np.arange(rates.size)
    if rates.sum() > 0:
        share = rates / rates.sum() * rates.size
        small = list(np.flatnonzero(share < 1))
        large = list(np.flatnonzero(share >= 1))
        while small and large:
            i, j = small.pop(), large[-1]
            threshold[i], alias[i] = share[i], j
            share[j] -= 1 - share[i]
            if share[j] < 1:
                small.append(large.pop())
    return threshold, alias
