"""This module owns traces in JSON: a record per line, or the one document that a benchmark of vLLM writes."""

from __future__ import annotations

import json
import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluidopt.traces import fields
from fluidopt.traces.columns import PER_SECOND, Clock, Columns, Growing, Layout, Reading, check_order, clock_of
from fluidopt.traces.fields import Fault, shown
from fluidopt.traces.lines import Chunk


@dataclass(frozen=True)
class JsonLayout(Layout):
    """Which keys of a file with a JSON object per line hold the times, the token counts and the label.

    Which of the optional keys a file has, its first line tells.
    """

    _: KW_ONLY
    engine_queued: str | None = None
    """Key of the time at which the engine queued a request, where ``first_token`` and ``finish`` are on the engine's
    own clock, as it is; they are then moved to the clock of ``time``."""

    def recognises(self, head: str) -> bool:
        """Whether the first line is a JSON object with at least two of the three required keys."""
        return len(set(self.required) & set(first_record(head))) >= 2

    def parse(self, reading: Reading) -> Columns:
        """Read all lines, one by one: about 5 s per million short ones."""
        records = _Records(self, reading)
        grown = Growing()
        for chunk in reading.source.chunks():
            grown.add(records.read(chunk))
        if self.engine_queued is None:
            return grown.columns(utc=bool(records.zoned))
        queued = grown.take("queued")
        return _aligned(grown.columns(), queued)


class _Records:
    """The lines of one file.

    Attributes:
        zoned: whether times carry a zone; None before the first one, and where they are no timestamps.
    """

    def __init__(self, layout: JsonLayout, reading: Reading) -> None:
        self._layout = layout
        self._reading = reading
        first = first_record(reading.source.head)
        self._clock: Clock = layout.clock or clock_of(first.get(layout.time))
        self._key = {
            "time": layout.time,
            "prompt_tokens": layout.prompt,
            "output_tokens": layout.output,
            **{name: key for name, key in layout.optional.items() if key in first},
        }
        self.zoned: bool | None = None

    def read(self, chunk: Chunk) -> dict[str, NDArray[Any]]:
        """Read the lines of a chunk."""
        lists: dict[str, list[Any]] = {name: [] for name in self._names()}
        for number, line in chunk.lines():
            try:
                row = self._row(line)
            except Fault as fault:
                self._reading.broken(number, fault)
                continue
            for name, value in row.items():
                lists[name].append(value)
        return {name: np.array(values, dtype=self._dtype(name)) for name, values in lists.items()}

    def _names(self) -> tuple[str, ...]:
        return (*self._key, *(("queued",) if self._layout.engine_queued is not None else ()))

    def _dtype(self, name: str) -> type:
        if name.endswith("tokens"):
            return np.int64
        if name == "label":
            return np.str_
        return np.int64 if self._clock == "calendar" else np.float64

    def _row(self, line: str) -> dict[str, Any]:
        """Read one line.

        Raises:
            Fault: it is broken.
        """
        record = _object(line)
        row: dict[str, Any] = {}
        for name, key in self._key.items():
            if key not in record:
                raise Fault(f"expected the key {key!r}, found {shown(', '.join(record), quoted=False) or 'no key'}")
            value = record[key]
            if name.endswith("tokens"):
                row[name] = fields.json_token_count(value, key)
            elif name == "label":
                row[name] = fields.label(str(value) if isinstance(value, (str, int)) else "", key)
            else:
                row[name] = self._time(value, key, optional=name != "time")
        if (queued := self._layout.engine_queued) is None:
            check_order(row, self._key)
        else:
            row["queued"] = fields.json_seconds(record.get(queued), queued)
            check_order({**row, "time": row["queued"]}, {**self._key, "time": queued})
        return row

    def _time(self, value: Any, key: str, *, optional: bool) -> float:
        calendar = self._clock == "calendar"
        if optional and (value is None or (isinstance(value, float) and math.isnan(value))):
            return fields.MISSING if calendar else math.nan
        if not calendar:
            return fields.json_seconds(value, key, per_second=PER_SECOND[self._clock])
        time, self.zoned = fields.nanoseconds(value if isinstance(value, str) else repr(value), key, self.zoned)
        return time


def _aligned(columns: Columns, queued: NDArray[np.float64]) -> Columns:
    """Move measured times from the engine's clock to the arrivals': the clocks differ by the least queued - arrival.

    This takes the least delay between arriving and being queued for zero. The times are so much too early, all of
    them by the same.
    """
    if columns.first_token is None or columns.finish is None or not queued.size:
        return columns
    apart = float((queued - columns.time).min())
    first_token = np.maximum(columns.first_token - apart, columns.time)  # equal but for rounding
    return replace(columns, first_token=first_token, finish=np.maximum(columns.finish - apart, first_token))


@dataclass(frozen=True)
class VllmBenchmark:
    """The document that ``vllm bench serve --save-result --save-detailed`` writes (before: benchmark_serving.py).

    Lists with an entry per request: ``input_lens``, ``output_lens`` (tokens), ``start_times`` (s, on the client's
    clock), ``ttfts`` (s from start to first token), ``itls`` (lists of the gaps between what came then, s), ``errors``.
    """

    def recognises(self, head: str) -> bool:
        """Whether the text is an object with the lists of lengths, or with a benchmark's totals."""
        return head.lstrip().startswith("{") and ('"input_lens"' in head or '"request_throughput"' in head)

    def parse(self, reading: Reading) -> Columns:
        """Read the document as a whole: it is in memory at once, unlike files with a line per request."""
        result = self._document(reading)
        line = reading.source.head_line
        prompt, output = (self._list(reading, result, key) for key in ("input_lens", "output_lens"))
        if "start_times" not in result:
            raise reading.fault(
                "the result has no start_times, so it does not tell when requests arrived (request_rate is "
                f"{shown(repr(result.get('request_rate')), quoted=False)}). Run the benchmark again with a version of "
                "vLLM that records them, or make a Trace of its input_lens and output_lens and arrival times known "
                "otherwise",
                line=line,
            )
        start = self._list(reading, result, "start_times")
        wait = self._list(reading, result, "ttfts") if "ttfts" in result else [None] * len(start)
        gaps = self._list(reading, result, "itls") if "itls" in result else [None] * len(start)
        errors = self._list(reading, result, "errors") if result.get("errors") else [""] * len(start)
        if len({len(each) for each in (prompt, output, start, wait, gaps, errors)}) > 1:
            raise reading.fault(
                f"the lists differ in length: expected as many entries as there are input_lens, {len(prompt):,}, in "
                "output_lens, start_times, ttfts, itls and errors. Check that the file is complete",
                line=line,
            )
        rows = []
        for index, entries in enumerate(zip(prompt, output, start, wait, gaps, errors, strict=True)):
            try:
                rows.append(_benchmark_row(*entries))
            except Fault as fault:
                reading.broken(line, f"request {index}: {fault}")
        table = np.array(rows, dtype=np.float64).reshape(-1, 5)
        return Columns(
            table[:, 0],
            table[:, 1].astype(np.int64),
            table[:, 2].astype(np.int64),
            first_token=None if "ttfts" not in result else table[:, 3],
            finish=None if "ttfts" not in result or "itls" not in result else table[:, 4],
        )

    def _document(self, reading: Reading) -> dict[str, Any]:
        text = b"".join(chunk.data for chunk in reading.source.chunks()).decode()
        try:
            return _object(text)
        except Fault as fault:
            raise reading.fault(
                f"{fault}. A file to which several results were appended has to be split",
                line=reading.source.head_line,
            ) from None

    def _list(self, reading: Reading, result: dict[str, Any], key: str) -> list[Any]:
        if key not in result:
            raise reading.fault(
                f"the result has no {key}: it holds totals only. Run the benchmark with --save-result --save-detailed",
                line=reading.source.head_line,
            )
        if not isinstance(result[key], list):
            raise reading.fault(
                f"expected a list in {key}, found {shown(repr(result[key]), quoted=False)}",
                line=reading.source.head_line,
            )
        entries: list[Any] = result[key]
        return entries


def first_record(head: str) -> dict[str, Any]:
    """Return the JSON object in the first line; an empty one where there is none."""
    try:
        return _object(head.partition("\n")[0])
    except Fault:
        return {}


def _benchmark_row(
    prompt: Any, output: Any, start: Any, wait: Any, gaps: Any, error: Any
) -> tuple[float, float, float, float, float]:
    """Arrival, prompt and output tokens, first and last token of one request.

    Raises:
        Fault: it failed, or an entry is out of range.
    """
    if error:
        raise Fault(f"it failed: {shown(str(error))}")
    arrival = fields.json_seconds(start, "start_times")
    tokens = fields.json_token_count(prompt, "input_lens"), fields.json_token_count(output, "output_lens")
    first = finish = math.nan
    if wait is not None:
        first = arrival + _span(wait, "ttfts")
        if gaps is not None:
            if not isinstance(gaps, list):
                raise Fault(f"expected a list of seconds in itls, found {shown(repr(gaps), quoted=False)}")
            finish = first + math.fsum(_span(gap, "itls") for gap in gaps)
    return arrival, *tokens, first, finish


def _span(value: Any, key: str) -> float:
    span = fields.json_seconds(value, key)
    if span < 0.0:
        raise Fault(f"expected seconds of at least 0 in {key}, found {span:g}")
    return span


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Fault(f"expected a JSON object, found {shown(text.strip())} ({error})") from None
    if not isinstance(value, dict):
        raise Fault(f"expected a JSON object, found {shown(text.strip())}")
    return value
