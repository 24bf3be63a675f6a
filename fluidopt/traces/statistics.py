"""This module owns what the times of a trace tell: rates over time, how uneven they are, and their daily course."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput
from fluidopt.traces.checks import finite_seconds
from fluidopt.traces.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"
"""Name of the rows that stand for the whole stream."""
MOST_ROWS = 5_000_000
"""Tables of more rows are refused."""
USUAL_WINDOWS = (1.0, 10.0, 60.0, 600.0, 3600.0)
"""Windows in s by which `dispersion` goes unless told otherwise, as far as from `FEWEST_WINDOWS` to `MOST_ROWS` fit."""
FEWEST_WINDOWS = 10


def rates(trace: Trace, *, interval: float) -> pd.DataFrame:
    """Return the rates of the stream in consecutive intervals from its first request on.

    One row per interval and label, and one per interval named "all" for the whole stream. Columns: ``label``;
    ``start``, s after the first request; ``seconds``, the part of the interval that was observed, which differs from
    ``interval`` in the last one; ``requests``, a count; ``request_rate``, requests/s; ``prompt_rate`` and
    ``output_rate``, tokens/s of the requests that arrive then, whenever they are served.

    Args:
        trace: the requests.
        interval: its length, s.

    Raises:
        InvalidInput: ``interval`` is not a finite number above 0 or makes more than 5 million rows, or the trace has
            no duration.

    Costs one pass over the requests per label.
    """
    import pandas as pd

    length = finite_seconds("rates", "interval", interval, positive=True)
    duration = trace.duration
    parts = members(trace)
    if duration / length * len(parts) > MOST_ROWS:
        raise InvalidInput(
            f"Trace.rates: interval={length:g} s makes {duration / length:,.0f} intervals of each of {len(parts):,} "
            f"streams, more than {MOST_ROWS:,} rows; take at least {duration * len(parts) / MOST_ROWS:.3g} s"
        )
    # Less a little, lest rounding add an interval of no length; the last request may lie on the very end. Where the
    # duration is the requests' own, the gap after the last one belongs to its interval and begins none.
    observed = trace.observation_time if trace.observation_time is not None else float(trace.arrival_time[-1])
    count = max(1, math.ceil(observed / length - 1e-9))
    place = np.minimum((trace.arrival_time / length).astype(np.int64), count - 1)
    start = length * np.arange(count)
    seconds = np.append(np.full(count - 1, length), duration - start[-1])
    return pd.concat(
        [
            pd.DataFrame(
                {"label": name, "start": start, "seconds": seconds, **_sums(trace, where, place[where], seconds)}
            )
            for name, where in parts.items()
        ],
        ignore_index=True,
    )


def dispersion(trace: Trace, *, windows: Sequence[float] | None = None) -> pd.DataFrame:
    """Return the index of dispersion of counts: how uneven the stream is at different lengths of time.

    The observed period is cut into windows of one length, and the requests in each are counted: the index is the
    variance of the counts over their mean. A Poisson stream has 1 at every length of window. Above 1 the stream is
    burstier; where the index grows with the window, the rate itself wanders (a renewal stream levels out at the
    squared variation of its gaps); below 1 it is more even, as paced clients are.

    One row per label and window, and per window one named "all". Columns: ``label``; ``window``, s; ``windows``, how
    many whole ones fit; ``mean``, requests in a window; ``dispersion``; ``poisson_low`` and ``poisson_high``, between
    which a Poisson stream of as many windows falls with 95 % probability: quantiles of chi-square over its degrees
    of freedom, ``windows`` - 1, close where ``mean`` is a few requests or more.

    Args:
        trace: the requests.
        windows: their lengths, s; left out, those of 1, 10, 60, 600 and 3,600 s that fit from ten to 5 million
            times, or a tenth of the duration where none does.

    Raises:
        InvalidInput: a window is not a finite number above 0, fits less than twice or more than 5 million times, or
            the trace has no duration.
    """
    import pandas as pd
    from scipy.stats import chi2

    duration = trace.duration
    rows = []
    for name, where in members(trace).items():
        time = trace.arrival_time[where]
        for window in _windows(windows, duration):
            count = int(duration / window)
            counts = np.bincount((time / window).astype(np.int64), minlength=count)[:count]
            low, high = (float(chi2.ppf(level, count - 1)) / (count - 1) for level in (0.025, 0.975))
            mean = float(counts.mean())
            rows.append((name, window, count, mean, counts.var(ddof=1) / mean if mean else math.nan, low, high))
    return pd.DataFrame(
        rows, columns=["label", "window", "windows", "mean", "dispersion", "poisson_low", "poisson_high"]
    )


def by_hour(trace: Trace) -> pd.DataFrame:
    """Return the mean rates in each hour of the day that was observed.

    One row per label and hour, and per hour one named "all". Columns: ``label``; ``hour``, 0 to 23 on the calendar of
    `Trace.start` (in UTC where it is; a change to summer time is not followed); ``days``, how often the hour was
    observed, with parts of it; ``requests``; ``request_rate``, requests/s; ``prompt_rate`` and ``output_rate``,
    tokens/s. A rate over few days is an observation, not a profile.

    Raises:
        InvalidInput: the trace has no `start` or no duration, or lasts for more than 5 million hours.
    """
    import pandas as pd

    if trace.start is None:
        raise InvalidInput(
            "Trace.by_hour: the trace has no start (a calendar time), so hours of the day are unknown; set it, e.g. "
            "dataclasses.replace(trace, start=datetime(2024, 1, 31, 8))"
        )
    midnight = trace.start.replace(hour=0, minute=0, second=0, microsecond=0)
    begin = (trace.start - midnight).total_seconds()
    end = begin + trace.duration
    first, last = int(begin // 3600), math.ceil(end / 3600)
    if last - first > MOST_ROWS:
        raise InvalidInput(f"Trace.by_hour: the trace lasts for more than {MOST_ROWS:,} hours; take a window of it")
    edges = 3600.0 * np.arange(first, last + 1)
    overlap = np.diff(np.clip(edges, begin, end))
    observed = np.bincount(np.arange(first, last) % 24, overlap, 24)
    place = np.minimum((begin + trace.arrival_time) // 3600, last - 1).astype(np.int64) % 24
    seen = observed > 0.0
    seconds = np.where(seen, observed, 1.0)
    frames = [
        pd.DataFrame(
            {
                "label": name,
                "hour": np.arange(24),
                "days": observed / 3600,
                **_sums(trace, where, place[where], seconds),
            }
        )[seen]
        for name, where in members(trace).items()
    ]
    return pd.concat(frames, ignore_index=True)


def members(trace: Trace) -> dict[str, NDArray[np.bool_] | slice]:
    """Return which requests are in each stream: one per label, and "all" of them.

    Raises:
        InvalidInput: a label is "all" itself.
    """
    parts: dict[str, NDArray[np.bool_] | slice] = {}
    if trace.label is not None:
        parts = {name: trace.label == name for name in trace.labels}
    if ALL in parts:
        raise InvalidInput(f"Trace: a label is {ALL!r}, which names the whole stream in tables; call it otherwise")
    return {**parts, ALL: slice(None)}


def _sums(
    trace: Trace, where: NDArray[np.bool_] | slice, place: NDArray[np.int64], seconds: NDArray[np.float64]
) -> dict[str, NDArray[np.int64] | NDArray[np.float64]]:
    """Requests and rates by place, of the requests that are meant."""
    requests = np.bincount(place, minlength=seconds.size)
    return {
        "requests": requests,
        "request_rate": requests / seconds,
        "prompt_rate": np.bincount(place, trace.prompt_tokens[where], seconds.size) / seconds,
        "output_rate": np.bincount(place, trace.output_tokens[where], seconds.size) / seconds,
    }


def _windows(windows: Sequence[float] | None, duration: float) -> list[float]:
    if windows is None:
        usual = [each for each in USUAL_WINDOWS if FEWEST_WINDOWS <= duration / each <= MOST_ROWS]
        return usual or [duration / FEWEST_WINDOWS]
    try:
        given = list(windows)
    except TypeError:
        given = [windows]  # type: ignore[list-item]
    lengths = [finite_seconds("dispersion", "windows", each, positive=True) for each in given]
    for each in lengths:
        if not 2 <= duration / each <= MOST_ROWS:
            raise InvalidInput(
                f"Trace.dispersion: windows must fit into the {duration:g} s of the trace from 2 to {MOST_ROWS:,} "
                f"times; got {each:g} s"
            )
    return lengths
