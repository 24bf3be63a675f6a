"""Waits counted by length, and from the counts to percentiles of the wait and of the time to first token."""

from __future__ import annotations

import numpy as np

from fluidopt.simulation.compilation import compiled
from fluidopt.simulation.state import State
from fluidopt.simulation.system import FloatArray, IntArray

# Waits are counted in bins, 2**FRACTION_BITS of equal width to an octave, the first at FIRST_OCTAVE: bin k of them is
# the float's leading bits, bin 0 what is below. A wait of exactly 0 is not counted: it is a start without a wait.
FRACTION_BITS, FIRST_OCTAVE, OCTAVES = 3, -13, 33
BINS = (OCTAVES << FRACTION_BITS) + 1
_SHIFT = 52 - FRACTION_BITS
_BASE = ((1023 + FIRST_OCTAVE) << FRACTION_BITS) - 1

_step = np.arange(BINS)
EDGES = np.concatenate(
    [
        [0.0],
        np.ldexp(1.0 + (_step % 2**FRACTION_BITS) / 2**FRACTION_BITS, FIRST_OCTAVE + (_step >> FRACTION_BITS)),
    ]
)
"""(BINS + 1,) edges of the bins, s: eight to an octave from 0.1 ms to 12 days; longer waits count in the last."""


@compiled
def time_wait(state: State, wait: float, index: int) -> None:
    """Count a wait under `index`, role * I + class before prefill, R * I more before decode."""
    if wait > 0.0:
        state.number[0] = wait
        k = min(max((state.bits[0] >> _SHIFT) - _BASE, 0), BINS - 1)
        state.waits[index * BINS + k] += 1


def wait_quantiles(waits: IntArray, at_once: IntArray, levels: tuple[float, ...]) -> FloatArray:
    """Quantiles of the wait of those who were served, (..., levels), s; NaN where nobody was.

    Within a bin the waits are taken as uniform, which is off by at most an eighth of the wait and in practice by
    less than a hundredth.

    Args:
        waits: (..., BINS) number of waits by length.
        at_once: (...) number of those who did not wait.
        levels: between 0 and 1.
    """
    below = np.concatenate([at_once[..., None], at_once[..., None] + np.cumsum(waits, axis=-1)], axis=-1)
    wanted = below[..., -1:] * np.array(levels)
    k = np.minimum((below[..., None] < wanted[..., None, :]).sum(axis=-2) - 1, BINS - 1)
    bin_of = np.maximum(k, 0)
    inside = np.take_along_axis(waits, bin_of, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (wanted - np.take_along_axis(below, bin_of, -1)) / inside
        quantile = EDGES[bin_of] + part * np.diff(EDGES)[bin_of]
    quantile = np.where(k < 0, 0.0, quantile)
    return np.where(below[..., -1:] > 0, quantile, np.nan)


def first_token_quantiles(
    waits: IntArray, at_once: IntArray, rate: FloatArray, levels: tuple[float, ...]
) -> FloatArray:
    """Quantiles of the time to first token of those who were served, (..., levels), s; NaN where nobody was.

    A prefill's time is exponential and independent of the wait before it, so its law is put in exactly instead of being
    sampled: with F the law of the sum and W that of the wait, F' = rate (W - F), solved bin by bin.

    Args:
        waits: (..., R, BINS) number of waits by role and length.
        at_once: (..., R) number of those who did not wait.
        rate: (..., R) completion rate of a prefill, 1/s; 0 in roles where none starts.
        levels: between 0 and 1.
    """
    rate = np.where(rate > 0, rate, 1.0)
    width = np.diff(EDGES)
    level = np.concatenate([at_once[..., None], at_once[..., None] + np.cumsum(waits, axis=-1)], axis=-1)
    slope = waits / width
    sums = np.zeros((*level.shape[:-1], BINS + 1))
    for k in range(BINS):
        sums[..., k + 1] = _within(sums[..., k], level[..., k], slope[..., k], rate, width[k])
    below = sums.sum(axis=-2)
    wanted = level[..., -1].sum(axis=-1)[..., None] * np.array(levels)
    k = np.clip((below[..., None] < wanted[..., None, :]).sum(axis=-2) - 1, 0, BINS - 1)

    def pick(values: FloatArray) -> FloatArray:  # (..., R, levels): the values in bin k of every role
        return np.take_along_axis(values, np.broadcast_to(k[..., None, :], (*values.shape[:-1], k.shape[-1])), -1)

    start, wait, rise, speed = pick(sums), pick(level), pick(slope), rate[..., None]
    low, high = np.zeros(k.shape), width[k]
    for _ in range(40):
        middle = (low + high) / 2
        less = _within(start, wait, rise, speed, middle[..., None, :]).sum(axis=-2) < wanted
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    return np.where(wanted > 0, EDGES[k] + high, np.nan)


def _within(start: FloatArray, wait: FloatArray, rise: FloatArray, rate: FloatArray, time: FloatArray) -> FloatArray:
    """F after `time` in a bin where it began at `start` and W grows from `wait` at the rate `rise`."""
    settled = wait - rise / rate
    return settled + rise * time + (start - settled) * np.exp(-rate * time)
