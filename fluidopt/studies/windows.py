"""Figures of one replay with their intervals, from windows of the trace that are left out in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from fluidopt.program import Array
from fluidopt.serving.result import Replay
from fluidopt.simulation.statistics import LEVEL, Estimate
from fluidopt.tables import jsonable

QUANTILES = (50, 90, 99)


@dataclass(frozen=True, eq=False)
class Measured:
    """What one replay came to, with what is needed for intervals: each figure without each window of the trace.

    The duration of the trace is cut into windows of equal length, and a request belongs to the one it arrives in. The
    figures are shares of requests, sums per time, means and percentiles; each is recomputed without one window at a
    time. The standard error is that of the delete-a-group jackknife, which holds for percentiles too (Shao and Wu,
    Annals of Statistics 17, 1989). It takes the windows for independent.
    """

    values: dict[str, float]
    """By name, see `ReplayStudy.to_frame`; NaN where no request got so far."""
    without: dict[str, tuple[float, ...]]
    """The same without each window, (W,) each."""
    utilisation: float
    """Share of the makespan in which a GPU was iterating."""
    preemptions: int
    """Of requests, for memory."""

    def estimate(self, name: str) -> Estimate:
        """One figure with its 95 % interval."""
        return _jackknifed(self.values[name], np.array(self.without[name]))

    def less(self, other: Measured, name: str) -> Estimate:
        """One figure less that of another replay of the same trace, window by window."""
        return _jackknifed(
            self.values[name] - other.values[name], np.array(self.without[name]) - np.array(other.without[name])
        )

    def lag_correlation(self, other: Measured, name: str) -> float:
        """Of the difference in one window and the next; the intervals take it for 0."""
        change = np.array(self.without[name]) - np.array(other.without[name])
        centred = change - change.mean()
        spread = float((centred**2).sum())
        return float((centred[1:] * centred[:-1]).sum()) / spread if spread > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-able data; `from_dict` reads them back."""
        data: dict[str, Any] = jsonable(asdict(self))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measured:
        """Read figures back."""
        return cls(
            values={str(name): _number(each) for name, each in data["values"].items()},
            without={str(name): tuple(map(_number, each)) for name, each in data["without"].items()},
            utilisation=_number(data["utilisation"]),
            preemptions=int(data["preemptions"]),
        )


def _jackknifed(value: float, without: Array) -> Estimate:
    count = len(without)
    error = float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))
    return Estimate(value, float(stats.t.ppf(0.5 + LEVEL / 2, count - 1)) * error, error, float(count))


def measure(result: Replay, *, windows: int, ttft: float | None = None, tpot: float | None = None) -> Measured:
    """Figures of a replay, whole and without each of so many windows of its trace.

    Args:
        result: of any fleet, with prices.
        windows: equal parts of the trace's duration, at least 2.
        ttft, tpot: limits, s, that a request must meet to count as in time; without them completion is enough.
    """
    trace, duration, completed = result.trace, result.trace.duration, result.completed
    window = np.minimum((trace.arrival_time / duration * windows).astype(np.int64), windows - 1)
    in_time = completed.copy()
    for limit, value in ((ttft, result.ttft), (tpot, result.tpot)):
        if limit is not None:
            in_time &= ~(value > limit)
    assert result.prices is not None
    offered = result.prices.prompt * trace.prompt_tokens + result.prices.output * (trace.output_tokens - 1)
    earned = result.earned(duration)
    requests = np.bincount(window, minlength=windows).astype(float)
    seconds = np.full(windows, duration * result.gpu_count / windows)
    worth = np.bincount(window, weights=offered, minlength=windows)
    sums = {
        "revenue_rate": (earned, seconds),
        "value_served": (earned, worth),
        "value_in_time": (earned * in_time, worth),
        "completed": (completed, requests),
        "abandoned": (result.abandoned, requests),
        "refused": (result.refused, requests),
        "in_time": (in_time, requests),
    }
    values: dict[str, float] = {}
    without: dict[str, tuple[float, ...]] = {}
    for name, (amount, weight) in sums.items():
        part = np.bincount(window, weights=amount, minlength=windows)
        values[name] = float(part.sum() / weight.sum())
        left, others = part.sum() - part, weight.sum() - weight
        without[name] = tuple(np.divide(left, others, out=np.full(windows, np.nan), where=others > 0).tolist())
    for quantity in ("ttft", "tpot"):
        times = getattr(result, quantity)
        there = completed & np.isfinite(times)
        whole = _summary(times[there])
        rest = [_summary(times[there & (window != at)]) for at in range(windows)]
        for at, statistic in enumerate(("mean", *(f"p{q}" for q in QUANTILES))):
            values[f"{quantity}_{statistic}"] = whole[at]
            without[f"{quantity}_{statistic}"] = tuple(each[at] for each in rest)
    return Measured(values, without, result.utilisation, int(result.preemptions.sum()))


def _summary(times: Array) -> tuple[float, ...]:
    """Mean and percentiles; NaN of no request."""
    if not times.size:
        return (float("nan"),) * (1 + len(QUANTILES))
    return (float(times.mean()), *np.percentile(times, QUANTILES).tolist())


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
