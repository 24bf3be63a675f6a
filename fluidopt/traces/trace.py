"""This module owns `Trace`: a recorded stream of requests, and what can be said about it at a glance."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import combinations, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput
from fluidopt.traces.checks import (
    INSTANT,
    finite_seconds,
    first_bad,
    generator_of,
    is_number,
    measured_times,
    observation_period,
    one_dimensional,
    read_only,
    token_counts,
)
from fluidopt.views import card, figures, html, paragraph

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fluidopt.traces.classify import By
    from fluidopt.workload import Workload


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """A recorded stream of N requests: when each arrived, how long its prompt was, how long its answer.

    The columns may be given in any order of time, on any clock: they are sorted by arrival (ties keep their
    order), the first request is put at 0 s, and the arrays are made read-only.

    Raises:
        InvalidInput: a column is empty, of another length, or holds a value outside its range.
    """

    arrival_time: NDArray[np.float64]
    """Seconds since the first request, sorted, shape (N,)."""
    prompt_tokens: NDArray[np.int64]
    """Prompt (prefill) tokens, at least 1, shape (N,)."""
    output_tokens: NDArray[np.int64]
    """Generated tokens, the first one (made by the prefill) included, at least 1, shape (N,)."""
    _: KW_ONLY
    label: NDArray[np.str_] | None = None
    """Where each request comes from, shape (N,): for merged files, which file; None where nothing tells."""
    first_token_time: NDArray[np.float64] | None = None
    """Measured: when the first output token came, s on the clock of `arrival_time`, shape (N,); NaN where absent."""
    finish_time: NDArray[np.float64] | None = None
    """Measured: when the last output token came, in the same way."""
    start: datetime | None = None
    """Time of the first request, cut to microseconds; None where the source has no calendar."""
    offset: float = 0.0
    """Without a calendar: the source's own clock at the first request, s; `merge` goes by it."""
    observation_time: float | None = None
    """Length of the observed period, s, where it is known; see `duration`."""
    sources: tuple[str, ...] = ()
    """Names of the files read."""
    skipped_lines: int = 0
    """Broken lines left out while reading."""
    skipped_reasons: tuple[str, ...] = ()
    """File, line and fault of the first few of them."""

    def __post_init__(self) -> None:
        time = one_dimensional("arrival_time", self.arrival_time, np.float64)
        if time.size == 0:
            raise InvalidInput("Trace: arrival_time is empty; a trace needs at least one request")
        if not np.isfinite(time).all():
            raise InvalidInput(
                f"Trace: arrival_time must be finite; got {first_bad(time, ~np.isfinite(time))} "
                "(drop such requests or repair their times)"
            )
        if not (self.start is None or isinstance(self.start, datetime)):
            raise InvalidInput(f"Trace: start must be a datetime.datetime or None; got {self.start!r}")
        order = None if bool((time[1:] >= time[:-1]).all()) else np.argsort(time, kind="stable")
        first = float(time.min())
        columns: dict[str, NDArray[Any]] = {
            "arrival_time": time - first if first else time,
            "prompt_tokens": token_counts("prompt_tokens", self.prompt_tokens),
            "output_tokens": token_counts("output_tokens", self.output_tokens),
        }
        if self.label is not None:
            columns["label"] = one_dimensional("label", self.label, np.str_)
            if (columns["label"] == "").any():
                raise InvalidInput("Trace: label must not be empty text; give every request a label, or none")
        for name in MEASURED:
            if getattr(self, name) is not None:
                columns[name] = measured_times(name, getattr(self, name)) - first
        for name, column in columns.items():
            if column.shape != time.shape:
                raise InvalidInput(
                    f"Trace: {name} has {column.size:,} entries and arrival_time {time.size:,}; "
                    "every column needs one entry per request"
                )
            object.__setattr__(self, name, read_only(column if order is None else column[order]))
        self._check_order()
        if self.start is None:
            object.__setattr__(self, "offset", float(self.offset) + first)
        span = float(self.arrival_time[-1])
        if self.observation_time is not None:
            object.__setattr__(self, "observation_time", observation_period(self.observation_time, span))
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "skipped_reasons", tuple(self.skipped_reasons))

    def _check_order(self) -> None:
        """Refuse a first token before the arrival, and a last one before the first."""
        for earlier, name in combinations(("arrival_time", *MEASURED), 2):
            before, after = getattr(self, earlier), getattr(self, name)
            if before is not None and after is not None and (wrong := after < before).any():
                raise InvalidInput(
                    f"Trace: {name} must not lie before {earlier}; got {first_bad(after, wrong)}, where {earlier} is "
                    f"{before[wrong][0]:g} (in order of arrival, s after the first request); give NaN where unknown"
                )

    @property
    def duration(self) -> float:
        """Seconds of observation that the N requests stand for; `request_rate` is N divided by it.

        `observation_time` where it is given. Otherwise only the span from the first to the last request is
        known, which N requests divide into N - 1 gaps, so the duration is span * N / (N - 1): every request
        stands for one mean gap, and the rate is exactly 1 / (mean gap). Dividing N by the span would
        overstate the rate. What is left is an upward bias of about 1/N, relative, for Poisson arrivals.

        Raises:
            InvalidInput: all requests arrive at the same instant and no `observation_time` is given.
        """
        if self.observation_time is not None:
            return self.observation_time
        span, requests = float(self.arrival_time[-1]), len(self)
        if span < INSTANT:
            raise InvalidInput(
                f"Trace: {requests:,} request(s) at a single instant tell no duration and so no rate; say "
                "how many seconds were observed with observation_time=..."
            )
        return span * requests / (requests - 1)

    @property
    def request_rate(self) -> float:
        """Requests/s of the whole stream: N / `duration`."""
        return len(self) / self.duration

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct labels, sorted; empty where requests are not labelled."""
        return () if self.label is None else tuple(str(each) for each in np.unique(self.label))

    @classmethod
    def merge(cls, *traces: Trace, observation_time: float | None = None) -> Trace:
        """Superpose traces into one stream, each request keeping its own time.

        Traces with a `start` are lined up by calendar, traces without one by their own clocks (`offset`).
        Requests without a label get one: what tells their trace's file name from the others'.

        Args:
            traces: at least one.
            observation_time: length of the observed period of the merged stream, s. Left out, it is the one
                that all the traces share, or unknown where none has any.

        Raises:
            InvalidInput: no traces; some have a `start` and some not, or only some of them a time zone; or
                their observation times differ.
        """
        if not traces:
            raise InvalidInput("Trace.merge: no traces given; give at least one")
        if observation_time is None:
            observation_time = _shared_observation_time(traces)
        begin, seconds = _common_clock(traces)
        time = np.concatenate([trace.arrival_time + at for trace, at in zip(traces, seconds, strict=True)])
        label = None
        if len(traces) > 1 or traces[0].label is not None:
            fallback = file_labels([", ".join(trace.sources) or "trace" for trace in traces])
            label = np.concatenate(
                [
                    trace.label if trace.label is not None else np.full(len(trace), name)
                    for trace, name in zip(traces, fallback, strict=True)
                ]
            )
        return cls(
            time,
            np.concatenate([trace.prompt_tokens for trace in traces]),
            np.concatenate([trace.output_tokens for trace in traces]),
            label=label,
            first_token_time=_joined(traces, seconds, "first_token_time"),
            finish_time=_joined(traces, seconds, "finish_time"),
            start=begin,
            observation_time=observation_time,
            sources=tuple(source for trace in traces for source in trace.sources),
            skipped_lines=sum(trace.skipped_lines for trace in traces),
            skipped_reasons=tuple(reason for trace in traces for reason in trace.skipped_reasons),
        )

    def window(self, start: float, stop: float) -> Trace:
        """Return the requests that arrive in [``start``, ``stop``), seconds after the first request of this trace.

        The window's first request is put at 0 s, and its `observation_time` is ``stop - start``: an empty stretch
        at either end counts. Labels and measured times go along.

        Raises:
            InvalidInput: ``start`` or ``stop`` is not finite, they are not in this order, or no request arrives
                between them.
        """
        begin, end = (finite_seconds("window", name, value) for name, value in (("start", start), ("stop", stop)))
        if not begin < end:
            raise InvalidInput(f"Trace.window: start must be below stop; got start={begin:g} and stop={end:g}")
        first, last = np.searchsorted(self.arrival_time, [begin, end], side="left")
        if first == last:
            raise InvalidInput(
                f"Trace.window: no request arrives in [{begin:g}, {end:g}) s; the trace spans 0 to "
                f"{self.arrival_time[-1]:g} s"
            )
        return self._part(slice(int(first), int(last)), observation_time=end - begin)

    def thinned(self, share: float, *, seed: int | np.random.SeedSequence | np.random.Generator = 0) -> Trace:
        """Keep each request with probability ``share``, independently of the others.

        The observed period stays, so the rate becomes ``share`` times its value on average. A Poisson stream stays
        one; a bursty one comes nearer to it, as the requests of a burst are parted (`sped_up` with a factor below 1
        lowers the rate and keeps the shape).

        Args:
            share: above 0, at most 1.
            seed: of the choice; the same seed keeps the same requests.

        Raises:
            InvalidInput: an argument breaks a rule, or no request is left.
        """
        if not (is_number(share) and 0.0 < share <= 1.0):
            raise InvalidInput(f"Trace.thinned: share must be above 0 and at most 1; got {share!r}")
        kept = np.flatnonzero(generator_of(seed, "Trace.thinned").random(len(self)) < share)
        if not kept.size:
            raise InvalidInput(
                f"Trace.thinned: share={share:g} left none of {len(self):,} requests; take a larger share, or another "
                "seed"
            )
        return self._part(kept, observation_time=self.duration if self._has_rate() else None)

    def sped_up(self, factor: float) -> Trace:
        """Divide all times by ``factor``: ``factor`` times the rate, with the same pattern of bursts and lulls.

        Measured times are left out: they belong to the load under which they were measured.

        Raises:
            InvalidInput: ``factor`` is not a finite number above 0.
        """
        if not (is_number(factor) and math.isfinite(factor) and factor > 0.0):
            raise InvalidInput(f"Trace.sped_up: factor must be a finite number above 0; got {factor!r}")
        return replace(
            self,
            arrival_time=self.arrival_time / factor,
            observation_time=None if self.observation_time is None else self.observation_time / factor,
            first_token_time=None,
            finish_time=None,
        )

    def _part(self, which: slice | NDArray[np.int64], *, observation_time: float | None) -> Trace:
        """The requests at these (increasing) indices."""
        arrival_time = self.arrival_time[which]
        return replace(
            self,
            arrival_time=arrival_time,
            prompt_tokens=self.prompt_tokens[which],
            output_tokens=self.output_tokens[which],
            label=None if self.label is None else self.label[which],
            first_token_time=None if self.first_token_time is None else self.first_token_time[which],
            finish_time=None if self.finish_time is None else self.finish_time[which],
            start=None if self.start is None else self.start + timedelta(seconds=float(arrival_time[0])),
            observation_time=observation_time,
        )

    def classify(
        self,
        classes: int | None = None,
        *,
        by: By = "lengths",
        prompt_cuts: Sequence[float] | None = None,
        output_cuts: Sequence[float] | None = None,
        abandonment_rate: float = 0.0,
        seed: int | np.random.SeedSequence | np.random.Generator = 0,
    ) -> Workload:
        """Group the requests into workload classes; see `fluidopt.traces.classify`, which tells how well.

        Returns:
            A workload whose arrival rates are those of the whole stream, requests/s; divide them with
            `Workload.per_gpu` before planning for a fleet.
        """
        from fluidopt.traces.classify import classify

        return classify(
            self,
            classes,
            by=by,
            prompt_cuts=prompt_cuts,
            output_cuts=output_cuts,
            abandonment_rate=abandonment_rate,
            seed=seed,
        ).workload

    def rates(self, *, interval: float) -> pd.DataFrame:
        """Return rates of requests and tokens in consecutive intervals; see `fluidopt.traces.statistics.rates`."""
        from fluidopt.traces.statistics import rates

        return rates(self, interval=interval)

    def dispersion(self, *, windows: Sequence[float] | None = None) -> pd.DataFrame:
        """Return how uneven counts of requests are; see `fluidopt.traces.statistics.dispersion`."""
        from fluidopt.traces.statistics import dispersion

        return dispersion(self, windows=windows)

    def by_hour(self) -> pd.DataFrame:
        """Return mean rates by the hour of the day; see `fluidopt.traces.statistics.by_hour`."""
        from fluidopt.traces.statistics import by_hour

        return by_hour(self)

    def lengths(self, *, quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)) -> pd.DataFrame:
        """Return how prompts and answers are distributed; see `fluidopt.traces.lengths.lengths`."""
        from fluidopt.traces.lengths import lengths

        return lengths(self, quantiles=quantiles)

    def exponential_fit(self, *, bins: int | Sequence[int] = 50) -> pd.DataFrame:
        """Return how far lengths are from exponential ones; see `fluidopt.traces.lengths.exponential_fit`."""
        from fluidopt.traces.lengths import exponential_fit

        return exponential_fit(self, bins=bins)

    def plot(self) -> Figure:
        """Draw rates, gaps, dispersion and lengths; see `fluidopt.plot_trace`."""
        from fluidopt.traces.figure import plot_trace

        return plot_trace(self)

    def describe(self) -> pd.DataFrame:
        """Summarise the stream: one row per label, and one named "all".

        Columns: ``requests``; ``request_rate`` (requests/s, over the whole trace's `duration`, so that labels
        add up); mean, median and 95th percentile of ``prompt_*`` and ``output_*`` tokens;
        ``interarrival_cv``, standard deviation of the gaps between arrivals over their mean (1 for a Poisson
        stream, NaN below two gaps).

        Raises:
            InvalidInput: the trace has no duration (see `duration`).
        """
        import pandas as pd

        duration = self.duration
        parts = {name: self.label == name for name in self.labels} if self.label is not None else {}
        rows = {
            **{name: self._summary(where, duration) for name, where in parts.items()},
            "all": self._summary(np.ones(len(self), dtype=bool), duration),
        }
        frame = pd.DataFrame.from_dict(rows, orient="index")
        frame.index.name = "label"
        return frame

    def _summary(self, where: NDArray[np.bool_], duration: float) -> dict[str, float]:
        count = int(where.sum())
        row: dict[str, float] = {"requests": count, "request_rate": count / duration}
        for name, tokens in (("prompt", self.prompt_tokens[where]), ("output", self.output_tokens[where])):
            row[f"{name}_mean"] = float(tokens.mean())
            row[f"{name}_median"] = float(np.median(tokens))
            row[f"{name}_p95"] = float(np.percentile(tokens, 95))
        gaps = np.diff(self.arrival_time[where])
        row["interarrival_cv"] = float(gaps.std() / gaps.mean()) if gaps.size > 1 and gaps.any() else math.nan
        return row

    def to_frame(self) -> pd.DataFrame:
        """Return the requests as a table, a row each, in order of arrival."""
        import pandas as pd

        return pd.DataFrame({name: column for name in COLUMNS if (column := getattr(self, name)) is not None})

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the requests as plain CSV; `read_trace` gives the same columns back.

        The file has no place for `start`, `offset`, `observation_time`, `sources` and what was skipped.

        Raises:
            InvalidInput: the file cannot be written.
        """
        try:
            self.to_frame().to_csv(path, index=False)
        except OSError as error:
            raise InvalidInput(f"Trace.to_csv: {os.fspath(path)!r} cannot be written: {error}") from None

    def __len__(self) -> int:
        return int(self.arrival_time.size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        scalars = ("start", "offset", "observation_time", "sources", "skipped_lines", "skipped_reasons")
        return all(getattr(self, name) == getattr(other, name) for name in scalars) and all(
            _same(getattr(self, name), getattr(other, name)) for name in COLUMNS
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Trace: {self._headline()}>"

    def _repr_html_(self) -> str:
        if not self._has_rate():
            return card("Trace", paragraph(self._headline()))
        return card(
            "Trace",
            figures(
                ("Requests", len(self), ""),
                ("Rate", self.request_rate, "requests/s"),
                ("Prompt, mean", self.prompt_tokens.mean(), "tokens"),
                ("Output, mean", self.output_tokens.mean(), "tokens"),
            ),
            html(self.describe(), title="By label", units={"requests": "", "request_rate": "requests/s"}),
            paragraph(self._headline(), muted=True),
        )

    def _has_rate(self) -> bool:
        return self.observation_time is not None or float(self.arrival_time[-1]) >= INSTANT

    def _headline(self) -> str:
        facts = [f"{len(self):,} requests"]
        if self._has_rate():
            facts.append(f"{self.request_rate:,.4g} requests/s over {self.duration:,.4g} s")
        else:
            facts.append("duration unknown")
        facts.append(f"mean prompt {self.prompt_tokens.mean():,.4g} and output {self.output_tokens.mean():,.4g} tokens")
        if self.label is not None:
            labels = self.labels
            more = f" and {len(labels) - 4} more" if len(labels) > 4 else ""
            facts.append("labels " + ", ".join(labels[:4]) + more)
        if self.start is not None:
            facts.append(f"from {self.start.isoformat(sep=' ', timespec='seconds')}")
        if self.skipped_lines:
            facts.append(f"{self.skipped_lines:,} broken line(s) skipped")
        return ", ".join(facts)


def file_labels(files: Sequence[str]) -> list[str]:
    """Return what tells each file name from the others: the stems less the words they share.

    ``AzureLLMInferenceTrace_code.csv`` and ``AzureLLMInferenceTrace_conv.csv`` become "code" and "conv".
    Where this leaves nothing, the stem; where even stems agree, a number is added.
    """
    stems = [os.path.splitext(os.path.basename(file))[0] or file for file in files]
    words = [_words(stem) for stem in stems]
    head, tail = _agreeing(words), _agreeing([each[::-1] for each in words])
    short = ["".join(each[head : len(each) - tail]).strip(_SEPARATORS) for each in words]
    labels = short if all(short) and len(set(short)) == len(short) else stems
    return unique(labels)


def unique(names: Sequence[str]) -> list[str]:
    """Return ``names`` with " (2)", " (3)" ... added to those that occurred before."""
    taken: dict[str, None] = {}
    for name in names:
        candidate, count = name, 1
        while candidate in taken:
            count += 1
            candidate = f"{name} ({count})"
        taken[candidate] = None
    return list(taken)


_SEPARATORS = "_-. "


def _agreeing(lists: Sequence[Sequence[str]]) -> int:
    """How many entries from the start all lists have in common."""
    columns = zip(*lists, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _words(stem: str) -> list[str]:
    words, word = [], ""
    for character in stem:
        word += character
        if character in _SEPARATORS:
            words.append(word)
            word = ""
    return [*words, word]


def _same(one: NDArray[Any] | None, other: NDArray[Any] | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


MEASURED = ("first_token_time", "finish_time")
"""Columns that only a trace of a served stream has, in the order in which they happen."""
COLUMNS = ("arrival_time", "prompt_tokens", "output_tokens", "label", *MEASURED)


def _shared_observation_time(traces: Sequence[Trace]) -> float | None:
    given = {trace.observation_time for trace in traces}
    if len(given) > 1:
        raise InvalidInput(
            "Trace.merge: the traces' observation times differ ("
            + ", ".join("unknown" if each is None else f"{each:g} s" for each in sorted(given, key=str))
            + "); say how many seconds the merged stream was observed with observation_time=..."
        )
    return given.pop()


def _common_clock(traces: Sequence[Trace]) -> tuple[datetime | None, list[float]]:
    """Return the earliest start, and for each trace the seconds from there to its first request."""
    starts = [trace.start for trace in traces if trace.start is not None]
    if not starts:
        return None, [trace.offset for trace in traces]
    if len(starts) < len(traces):
        raise InvalidInput(
            "Trace.merge: some traces have a start (a calendar time) and some only their own clock, so they "
            "cannot be lined up; set start on the others, e.g. dataclasses.replace(trace, start=...)"
        )
    if len({start.tzinfo is None for start in starts}) > 1:
        raise InvalidInput(
            "Trace.merge: some traces' start has a time zone and some have none, so they cannot be lined up; "
            "set the zone on the others, e.g. dataclasses.replace(trace, "
            "start=trace.start.replace(tzinfo=...))"
        )
    begin = min(starts)
    return begin, [(start - begin) / timedelta(seconds=1) for start in starts]


def _joined(traces: Sequence[Trace], seconds: Sequence[float], name: str) -> NDArray[np.float64] | None:
    """A column of measured times of all traces on their common clock; None where none of them has it."""
    columns = [getattr(trace, name) for trace in traces]
    if all(column is None for column in columns):
        return None
    return np.concatenate(
        [
            np.full(len(trace), math.nan) if column is None else column + at
            for trace, column, at in zip(traces, columns, seconds, strict=True)
        ]
    )


def calendar_time(nanoseconds: int, *, utc: bool) -> datetime:
    """Return the time that many nanoseconds after 1970, cut to microseconds; naive unless ``utc``."""
    epoch = datetime(1970, 1, 1, tzinfo=UTC if utc else None)
    return epoch + timedelta(microseconds=nanoseconds // 1000)
