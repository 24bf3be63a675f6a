"""This module owns `Trace`: a recorded stream of requests, and what can be said about it at a glance."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime, timedelta
from html import escape
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidopt.errors import InvalidInput

if TYPE_CHECKING:
    import pandas as pd

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

    def __post_init__(self) -> None:
        time = _column("arrival_time", self.arrival_time, np.float64)
        if time.size == 0:
            raise InvalidInput("Trace: arrival_time is empty; a trace needs at least one request")
        if not np.isfinite(time).all():
            raise InvalidInput(
                f"Trace: arrival_time must be finite; got {_first(time, ~np.isfinite(time))} "
                "(drop such requests or repair their times)"
            )
        if not (self.start is None or isinstance(self.start, datetime)):
            raise InvalidInput(f"Trace: start must be a datetime.datetime or None; got {self.start!r}")
        order = None if bool((time[1:] >= time[:-1]).all()) else np.argsort(time, kind="stable")
        first = float(time.min())
        columns: dict[str, NDArray[Any]] = {
            "arrival_time": time - first,
            "prompt_tokens": _tokens("prompt_tokens", self.prompt_tokens),
            "output_tokens": _tokens("output_tokens", self.output_tokens),
        }
        if self.label is not None:
            columns["label"] = _column("label", self.label, np.str_)
            if (columns["label"] == "").any():
                raise InvalidInput("Trace: label must not be empty text; give every request a label, or none")
        for name, column in columns.items():
            if column.shape != time.shape:
                raise InvalidInput(
                    f"Trace: {name} has {column.size:,} entries and arrival_time {time.size:,}; "
                    "every column needs one entry per request"
                )
            ordered = column.copy() if order is None else column[order]
            ordered.setflags(write=False)
            object.__setattr__(self, name, ordered)
        if self.start is None:
            object.__setattr__(self, "offset", float(self.offset) + first)
        span = float(self.arrival_time[-1])
        if self.observation_time is not None:
            object.__setattr__(self, "observation_time", _observation_time(self.observation_time, span))
        object.__setattr__(self, "sources", tuple(self.sources))

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
        if span == 0.0:
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
            start=begin,
            observation_time=observation_time,
            sources=tuple(source for trace in traces for source in trace.sources),
            skipped_lines=sum(trace.skipped_lines for trace in traces),
        )

    def classify(
        self,
        classes: int | None = None,
        *,
        by: Literal["lengths", "label"] = "lengths",
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

        columns = {
            "arrival_time": self.arrival_time,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
        }
        return pd.DataFrame(columns if self.label is None else {**columns, "label": self.label})

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the requests as plain CSV; `read_trace` gives the same columns back.

        The file has no place for `start`, `offset`, `observation_time`, `sources` and `skipped_lines`.

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
        if (self.label is None) != (other.label is None):
            return False
        scalars = ("start", "offset", "observation_time", "sources", "skipped_lines")
        columns = (
            "arrival_time",
            "prompt_tokens",
            "output_tokens",
            *(() if self.label is None else ("label",)),
        )
        return all(getattr(self, name) == getattr(other, name) for name in scalars) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in columns
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Trace: {self._headline()}>"

    def _repr_html_(self) -> str:
        if not self._has_rate():
            return f"<div><b>Trace</b><div>{escape(self._headline())}</div></div>"
        from fluidopt.tables import html

        return html(self.describe(), title="Trace", note=self._headline())

    def _has_rate(self) -> bool:
        return self.observation_time is not None or float(self.arrival_time[-1]) > 0.0

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


def _column(name: str, values: ArrayLike, dtype: Any) -> NDArray[Any]:
    try:
        column = np.asarray(values, dtype=dtype)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(f"Trace: {name} must be an array of {_KINDS[dtype]}; got {values!r:.80}") from None
    if column.ndim != 1:
        raise InvalidInput(f"Trace: {name} must have one dimension; got shape {column.shape}")
    return column


_KINDS: dict[Any, str] = {np.float64: "numbers (seconds)", np.str_: "texts"}


def _tokens(name: str, values: ArrayLike) -> NDArray[np.int64]:
    try:
        given = np.asarray(values)
        tokens = given if given.dtype.kind in "iu" else given.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(f"Trace: {name} must be an array of token counts; got {values!r:.80}") from None
    if tokens.ndim != 1:
        raise InvalidInput(f"Trace: {name} must have one dimension; got shape {tokens.shape}")
    good = (tokens >= 1) & (tokens <= MOST_TOKENS)
    if tokens.dtype.kind == "f":
        good &= tokens == np.floor(tokens)
    if not good.all():
        raise InvalidInput(
            f"Trace: {name} must be whole numbers from 1 to {MOST_TOKENS:,}; got {_first(tokens, ~good)} "
            "(a request that generated nothing failed or was cancelled: leave it out)"
        )
    return tokens.astype(np.int64)


MOST_TOKENS = 1_000_000_000
"""Token counts above this are taken for faults of the file."""


def _first(values: NDArray[Any], bad: NDArray[np.bool_]) -> str:
    index = int(np.argmax(bad))
    return f"{values[index].item()!r} at index {index}"


def _observation_time(value: float, span: float) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0.0):
        raise InvalidInput(f"Trace: observation_time must be a finite number of seconds above 0; got {value!r}")
    if seconds < span:
        raise InvalidInput(
            f"Trace: observation_time is {seconds:g} s, but the requests span {span:g} s; give at least "
            "that, or leave it out"
        )
    return seconds


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


def calendar_time(nanoseconds: int, *, utc: bool) -> datetime:
    """Return the time that many nanoseconds after 1970, cut to microseconds; naive unless ``utc``."""
    epoch = datetime(1970, 1, 1, tzinfo=UTC if utc else None)
    return epoch + timedelta(microseconds=nanoseconds // 1000)
