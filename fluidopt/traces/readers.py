"""This module owns the seam between trace files and `Trace`: which format a file has, and what a caller may say of it.

A format is a `TraceFormat`: a name, the description shown in messages, a test on the start of the file, and a parser
from lines to `Columns`. A format with a header or with a JSON object per line is one `CsvLayout` or `JsonLayout`, which
says what column means what; `register_trace_format` adds one.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput
from fluidopt.traces.checks import is_number
from fluidopt.traces.columns import Clock, Columns, Reading
from fluidopt.traces.fields import MISSING, MOST_LABEL, shown
from fluidopt.traces.lines import open_source
from fluidopt.traces.records import JsonLayout, VllmBenchmark
from fluidopt.traces.servegen import ServeGenClient
from fluidopt.traces.table import CsvLayout
from fluidopt.traces.trace import COLUMNS, Trace, calendar_time

TimeUnit = Literal["s", "ms", "us", "ns"]


@dataclass(frozen=True)
class TraceFormat:
    """One file format that `read_trace` knows."""

    name: str
    description: str
    """For messages: what the format is and how its first line looks."""
    recognises: Callable[[str], bool]
    """Whether a file that begins like this, from its first non-blank line on, is meant to have this format."""
    parse: Callable[[Reading], Columns]
    """From the file's lines to columns."""
    layout: CsvLayout | JsonLayout | None = None
    """Which column means what, where there are columns; ``columns=`` can then say otherwise."""
    drawn: bool = False
    """Whether the file describes requests by their laws, from which they are drawn."""


def csv_format(name: str, description: str, layout: CsvLayout) -> TraceFormat:
    """Make the `TraceFormat` of a comma-separated file."""
    return _laid_out(name, f"{description}, header", layout)


def json_format(name: str, description: str, layout: JsonLayout) -> TraceFormat:
    """Make the `TraceFormat` of a file with a JSON object per line."""
    return _laid_out(name, f"{description}, a JSON object per line with", layout)


def _laid_out(name: str, description: str, layout: CsvLayout | JsonLayout) -> TraceFormat:
    columns = ",".join(layout.required) + "".join(f"[,{column}]" for column in layout.optional.values())
    return TraceFormat(name, f"{description} {columns}", layout.recognises, layout.parse, layout)


_FORMATS: dict[str, TraceFormat] = {}


def register_trace_format(trace_format: TraceFormat) -> None:
    """Make a format known to `read_trace`; formats are tried in the order in which they were registered.

    Raises:
        InvalidInput: the name is taken.
    """
    if trace_format.name in _FORMATS:
        raise InvalidInput(f"register_trace_format: name {trace_format.name!r} is taken; choose another")
    _FORMATS[trace_format.name] = trace_format


def trace_formats() -> tuple[TraceFormat, ...]:
    """The formats that `read_trace` knows."""
    return tuple(_FORMATS.values())


for each_format in (
    csv_format(
        "azure",
        "Azure LLM inference trace",
        CsvLayout("TIMESTAMP", "ContextTokens", "GeneratedTokens", clock="calendar"),
    ),
    csv_format(
        "burstgpt",
        "BurstGPT trace, seconds",
        CsvLayout("Timestamp", "Request tokens", "Response tokens", label="Model", clock="s"),
    ),
    json_format(
        "mooncake", "Mooncake trace, milliseconds", JsonLayout("timestamp", "input_length", "output_length", clock="ms")
    ),
    json_format(
        "vllm-requests",
        "requests as served by vLLM, seconds",
        JsonLayout(
            "arrival_time",
            "input_toks",
            "output_toks",
            first_token="first_token_ts",
            finish="last_token_ts",
            clock="s",
            engine_queued="queued_ts",
        ),
    ),
    TraceFormat(
        "vllm-benchmark",
        "result of vllm bench serve --save-detailed, a JSON object with input_lens, output_lens and start_times",
        VllmBenchmark().recognises,
        VllmBenchmark().parse,
    ),
    TraceFormat(
        "servegen",
        "client of ServeGen, *-trace.csv without a header beside *-dataset.json",
        ServeGenClient().recognises,
        ServeGenClient().parse,
        drawn=True,
    ),
    csv_format(
        "csv",
        "plain CSV",
        CsvLayout(
            "arrival_time",
            "prompt_tokens",
            "output_tokens",
            label="label",
            first_token="first_token_time",
            finish="finish_time",
        ),
    ),
    json_format(
        "jsonl",
        "plain records",
        JsonLayout(
            "arrival_time",
            "prompt_tokens",
            "output_tokens",
            label="label",
            first_token="first_token_time",
            finish="finish_time",
        ),
    ),
):
    register_trace_format(each_format)


def read_trace(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    time_unit: TimeUnit | None = None,
    on_bad_line: Literal["error", "skip"] = "error",
    label: str | Sequence[str] | None = None,
    observation_time: float | None = None,
    period: tuple[float, float] | None = None,
    seed: int | np.random.SeedSequence | np.random.Generator = 0,
) -> Trace:
    """Read one trace file, or several that are then superposed by `Trace.merge`.

    The start of a file tells its format:

    ================  ==================================================================================================
    azure             Azure's LLM inference traces of 2023 and 2024
    burstgpt          BurstGPT; the model is the label (``columns={"label": "Log Type"}`` takes that column instead)
    mooncake          Mooncake's JSON lines; blocks of the prefix cache (``hash_ids``) are not read
    vllm-requests     JSON lines with the times that vLLM's engine measured for each request
    vllm-benchmark    the result of ``vllm bench serve --save-result --save-detailed``
    servegen          a client of ServeGen: laws of rates and lengths, from which requests are drawn
    csv, jsonl        ``arrival_time``, ``prompt_tokens``, ``output_tokens`` and, where the file has them, ``label``,
                      ``first_token_time`` and ``finish_time``; times are seconds, or timestamps if the first one is
    ================  ==================================================================================================

    Files may be packed by gzip. Lines are read in pieces of 4 MB, so memory is that of the arrays which a file becomes
    and of one piece; only a benchmark's result, one document, is read as a whole.

    Blank lines are ignored, requests are sorted by arrival, and further columns are not read. A line is
    broken if it has too few or too many fields, a time that cannot be read, or token counts that are not
    whole numbers of at least 1. A request that generated 0 tokens counts as broken too: it failed or was
    cancelled, and its tokens say nothing about what it would have cost. (BurstGPT has many; skip them.)

    vLLM's engine measures times on a clock of its own. They are moved to the clock of the arrivals by the least
    difference between a request's being queued and its arrival: the least delay before the queue counts as zero, and
    all measured times are early by it.

    Args:
        path: file, or sequence of files; ``"-"`` is standard input.
        format: name of a format in `trace_formats`; left out, each file's start tells.
        columns: for files with columns, what they are called here, by name in `Trace`:
            ``columns={"arrival_time": "ts", "prompt_tokens": "in"}``. Those left out keep the format's name.
        time_unit: unit of times that are numbers, if not the format's: "s", "ms", "us" or "ns".
        on_bad_line: "error" stops at the first broken line; "skip" leaves such lines out, counts them in
            `Trace.skipped_lines` and keeps the first few faults in `Trace.skipped_reasons`.
        label: label of all requests, or one per file. Left out, the file's own label column where it has one,
            and for several files what tells their names apart (``..._code.csv`` and ``..._conv.csv``: "code",
            "conv").
        observation_time: length of the observed period, s, where it is known to be longer than the span of
            the requests; see `Trace.duration`.
        period: ServeGen: from when to when requests are drawn, s on the file's clock; left out, all the time that it
            describes.
        seed: ServeGen: of the draws, which in each slot of time depend on it and on the file's name alone.

    Raises:
        TraceFormatError: a file is empty, of no known format, or has a broken line; it carries ``file`` and
            ``line``.
        InvalidInput: a file does not exist or cannot be opened, an argument breaks a rule, or a period has more
            than 20 million requests to draw.

    Costs about 0.6 s per million lines of CSV, ten times that where fields are quoted, padded or have exponents, and
    about 5 s per million lines of JSON.

    Sources: Azure/AzurePublicDataset; HPMLL/BurstGPT; kvcache-ai/Mooncake; alibaba/ServeGen; vllm-project/vllm.
    """
    paths = _paths(path)
    if format is not None and format not in _FORMATS:
        raise InvalidInput(f"read_trace: format must be one of {', '.join(_FORMATS)}; got {format!r}")
    if on_bad_line not in ("error", "skip"):
        raise InvalidInput(f"read_trace: on_bad_line must be 'error' or 'skip'; got {on_bad_line!r}")
    if time_unit is not None and time_unit not in get_args(TimeUnit):
        raise InvalidInput(f"read_trace: time_unit must be one of {', '.join(get_args(TimeUnit))}; got {time_unit!r}")
    labels = _labels(label, len(paths))
    wishes = _Wishes(format, _named(columns), time_unit, on_bad_line == "skip", _period(period), seed)
    traces = [_read_file(each, wishes, label=name) for each, name in zip(paths, labels, strict=True)]
    if len(traces) > 1:
        return Trace.merge(*traces, observation_time=observation_time)
    if observation_time is None:
        return traces[0]
    return replace(traces[0], observation_time=observation_time)


@dataclass(frozen=True)
class _Wishes:
    """What the caller says about all the files."""

    format: str | None
    columns: dict[str, str]
    time_unit: Clock | None
    skip: bool
    period: tuple[float, float] | None
    seed: int | np.random.SeedSequence | np.random.Generator


def _read_file(path: Path, wishes: _Wishes, *, label: str | None) -> Trace:
    with open_source(path) as source:
        reading = Reading(source, wishes.skip, wishes.period, wishes.seed)
        if not source.head_line:
            raise reading.fault("the file is empty: expected one line per request")
        trace_format = _format(reading, wishes)
        if wishes.period is not None and not trace_format.drawn:
            raise InvalidInput(
                f"read_trace: period says when to draw requests from their laws, and {source.file!r} has them recorded "
                f"({trace_format.name}); leave it out, and take a part of the trace with Trace.window"
            )
        columns = trace_format.parse(reading)
        _check_named(columns, reading, wishes)
    if columns.time.size == 0:
        if reading.broken_lines:
            raise reading.fault(
                f"all {reading.broken_lines:,} lines that should hold a request are broken, the first one at "
                f"{reading.reasons[0]}. Check that the file is {trace_format.description}"
            )
        raise reading.fault(
            "there is no request after the header: expected one line per request. Check that the file is complete",
            line=source.head_line,
        )
    return _trace(columns, reading, path.name if source.path else source.file, label)


def _check_named(columns: Columns, reading: Reading, wishes: _Wishes) -> None:
    """Refuse a file without a column that the caller has named: a misspelt one would go unnoticed."""
    for name, column in wishes.columns.items():
        if columns.time.size and getattr(columns, _LAYOUT_FIELDS[name], columns) is None:
            raise reading.fault(
                f"column {column!r} is missing: columns={{{name!r}: {column!r}}} says that the file has it. Its first "
                f"line is {shown(reading.source.first_line.strip())}",
                line=reading.source.head_line,
            )


def _trace(columns: Columns, reading: Reading, name: str, label: str | None) -> Trace:
    labels = np.full(columns.time.size, label) if label is not None else columns.label
    first = int(columns.time.min()) if columns.time.dtype.kind == "i" else None
    time = _relative(columns.time, first)
    for array in (time, columns.prompt_tokens, columns.output_tokens, labels):
        if array is not None:
            array.setflags(write=False)  # nobody else has it: the trace need not copy it
    return Trace(
        time,
        columns.prompt_tokens,
        columns.output_tokens,
        label=labels,
        first_token_time=None if columns.first_token is None else _relative(columns.first_token, first),
        finish_time=None if columns.finish is None else _relative(columns.finish, first),
        start=None if first is None else calendar_time(first, utc=columns.utc),
        observation_time=columns.observation_time,
        sources=(name,),
        skipped_lines=reading.broken_lines,
        skipped_reasons=tuple(reading.reasons),
    )


def _relative(time: NDArray[np.int64] | NDArray[np.float64], first: int | None) -> NDArray[np.float64]:
    """Seconds, on the file's own clock or, with a calendar, since the first request."""
    if first is None:
        return time.astype(np.float64, copy=False)
    seconds: NDArray[np.float64] = (time - first) / 1e9
    seconds[time == MISSING] = math.nan
    return seconds


def _format(reading: Reading, wishes: _Wishes) -> TraceFormat:
    """The format of a file: as the caller says, else as its start tells; with the caller's columns.

    Raises:
        TraceFormatError: none fits.
        InvalidInput: the format has no columns to be named.
    """
    head = reading.source.head
    found = _FORMATS[wishes.format] if wishes.format is not None else _recognised(head)
    if not wishes.columns and wishes.time_unit is None:
        if found is None:
            raise _unknown(reading)
        return found
    if found is None:
        found = _FORMATS["jsonl" if head.startswith("{") else "csv"]
    if found.layout is None:
        raise InvalidInput(
            f"read_trace: columns and time_unit go with files that have columns; {reading.source.file!r} is "
            f"{found.description}. Leave them out"
        )
    changes: dict[str, Any] = {_LAYOUT_FIELDS[name]: column for name, column in wishes.columns.items()}
    if wishes.time_unit is not None or "arrival_time" in wishes.columns:
        changes["clock"] = wishes.time_unit
    layout = replace(found.layout, **changes)
    return replace(found, parse=layout.parse, layout=layout)


_LAYOUT_FIELDS = dict(zip(COLUMNS, ("time", "prompt", "output", "label", "first_token", "finish"), strict=True))


def _recognised(head: str) -> TraceFormat | None:
    return next((each for each in _FORMATS.values() if each.recognises(head)), None)


def _unknown(reading: Reading) -> Exception:
    known = "; ".join(f"{each.name} ({each.description})" for each in _FORMATS.values())
    return reading.fault(
        f"the format is not known: the first line is {shown(reading.source.first_line.strip())}. Known formats: "
        f"{known}. Say what the columns are called with columns=..., or name the format with format=...",
        line=reading.source.head_line,
    )


def _paths(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    try:
        given = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        paths = [Path(each) for each in given]
    except TypeError:
        raise InvalidInput(f"read_trace: path must be a path or a sequence of paths; got {path!r}") from None
    if not paths:
        raise InvalidInput("read_trace: path is an empty sequence; give at least one file")
    for each, count in Counter(paths).items():
        if count > 1:
            raise InvalidInput(
                f"read_trace: {str(each)!r} is given {count} times, which would count its requests {count} "
                "times; give it once"
            )
    return paths


def _labels(label: str | Sequence[str] | None, files: int) -> list[str | None]:
    if label is None:
        return [None] * files
    try:
        labels = [label] * files if isinstance(label, str) else list(label)
    except TypeError:
        raise InvalidInput(f"read_trace: label must be text or a sequence of texts; got {label!r}") from None
    if len(labels) != files:
        raise InvalidInput(f"read_trace: label has {len(labels)} entries for {files} file(s); give one per file")
    for each in labels:
        if not (isinstance(each, str) and each):
            raise InvalidInput(f"read_trace: label must be non-empty text; got {each!r}")
        if len(each) > MOST_LABEL:
            raise InvalidInput(f"read_trace: label must have at most {MOST_LABEL} characters; got {shown(each)}")
    return [*labels]


def _named(columns: Mapping[str, str] | None) -> dict[str, str]:
    if columns is None:
        return {}
    try:
        named = dict(columns)
    except (TypeError, ValueError):
        raise InvalidInput(f"read_trace: columns must map names to columns of the file; got {columns!r}") from None
    for name, column in named.items():
        if name not in COLUMNS:
            raise InvalidInput(f"read_trace: columns has the name {name!r}; its names are {', '.join(COLUMNS)}")
        if not (isinstance(column, str) and column):
            raise InvalidInput(f"read_trace: columns[{name!r}] must be the name of a column; got {column!r}")
    return named


def _period(period: tuple[float, float] | None) -> tuple[float, float] | None:
    if period is None:
        return None
    pair = tuple(period) if isinstance(period, (tuple, list)) else ()
    if len(pair) != 2 or not all(is_number(each) and math.isfinite(each) for each in pair) or not pair[0] < pair[1]:
        raise InvalidInput(
            f"read_trace: period must be two finite numbers of seconds in order, such as (0, 3600); got {period!r}"
        )
    return float(pair[0]), float(pair[1])
