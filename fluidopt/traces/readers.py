"""This module owns the seam between trace files and `Trace`: which format a file has, what a line must hold.

A format is a `TraceFormat`: a name, the description shown in messages, a test on the first line, and a parser
from text to `Columns`. A CSV format is one `CsvLayout` saying which column means what;
`register_trace_format` adds one.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput, TraceFormatError
from fluidopt.traces.trace import MOST_TOKENS, Trace, calendar_time

Clock = Literal["calendar", "seconds"]


@dataclass(frozen=True)
class Columns:
    """What a parser returns: one entry per request, in the order of the file."""

    time: NDArray[np.int64] | NDArray[np.float64]
    """Nanoseconds since 1970 (int64) for calendar times, else seconds on the file's own clock (float64)."""
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    label: NDArray[np.str_] | None = None
    utc: bool = False
    """Whether calendar times carry a time zone (and are given here in UTC)."""


@dataclass
class BrokenLines:
    """Where a parser reports what it cannot read: an error at once, or a count of lines left out."""

    file: str
    skip: bool = False
    count: int = 0
    first: TraceFormatError | None = None

    def add(self, line: int, message: str) -> None:
        """Report a broken line.

        Raises:
            TraceFormatError: unless broken lines are skipped.
        """
        hint = "" if self.skip else ". Repair the line, or leave such lines out with on_bad_line='skip'"
        error = TraceFormatError(message + hint, file=self.file, line=line)
        if not self.skip:
            raise error
        self.count += 1
        self.first = self.first or error


@dataclass(frozen=True)
class TraceFormat:
    """One file format that `read_trace` knows."""

    name: str
    description: str
    """For messages: what the format is and how its first line looks."""
    recognises: Callable[[str], bool]
    """Whether a file whose first non-blank line is this one is meant to have this format."""
    parse: Callable[[str, BrokenLines], Columns]
    """From the file's text (newlines already ``\\n``) to columns."""


@dataclass(frozen=True)
class CsvLayout:
    """Which columns of a comma-separated file with a header hold the time, the token counts and the label."""

    time: str
    prompt: str
    output: str
    _: KW_ONLY
    label: str | None = None
    """Column of labels, which a file may lack."""
    clock: Clock = "seconds"
    """Whether ``time`` holds ISO 8601 timestamps ("calendar") or seconds."""

    @property
    def required(self) -> tuple[str, str, str]:
        """The columns that a file must have."""
        return self.time, self.prompt, self.output

    def recognises(self, head: str) -> bool:
        """Whether a header has at least two of the three required columns (a missing one is then named)."""
        return len(set(self.required) & set(_header(head))) >= 2

    def parse(self, text: str, broken: BrokenLines) -> Columns:
        """Read all lines, one by one: about 2 s per million requests.

        pandas would be twice as fast, but takes "1e2" for a token count and long rows for indexed ones.
        """
        header, head = next(_lines(text))
        names = _header(head)
        self._check_header(names, header, broken.file)
        time_at, prompt_at, output_at = (names.index(name) for name in self.required)
        label_at = names.index(self.label) if self.label in names else None
        zoned: bool | None = None
        time: list[float] = []
        prompt: list[int] = []
        output: list[int] = []
        label: list[str] = []
        for line, content in _lines(text, after=header):
            try:
                row = _split(content, names)
                each_prompt = _tokens(row[prompt_at], self.prompt)
                each_output = _tokens(row[output_at], self.output)
                each_label = _label(row[label_at], self.label) if label_at is not None else ""
                each_time: float
                if self.clock == "calendar":
                    each_time, zoned = _nanoseconds(row[time_at], self.time, zoned)
                else:
                    each_time = _seconds(row[time_at], self.time)
            except _Fault as fault:
                broken.add(line, str(fault))
                continue
            time.append(each_time)
            prompt.append(each_prompt)
            output.append(each_output)
            label.append(each_label)
        clock = np.array(time, dtype=np.int64) if self.clock == "calendar" else np.array(time, dtype=np.float64)
        return Columns(
            clock,
            np.array(prompt, dtype=np.int64),
            np.array(output, dtype=np.int64),
            np.array(label, dtype=np.str_) if label_at is not None else None,
            utc=bool(zoned),
        )

    def _check_header(self, names: Sequence[str], line: int, file: str) -> None:
        wanted = [*self.required, *((self.label,) if self.label else ())]
        found = ", ".join(names)
        for name in self.required:
            if name not in names:
                raise TraceFormatError(
                    f"column {name!r} is missing: expected a header with {', '.join(self.required)}, found "
                    f"{found}. Rename or add the column",
                    file=file,
                    line=line,
                )
        for name, count in Counter(names).items():
            if count > 1 and name in wanted:
                raise TraceFormatError(
                    f"column {name!r} occurs {count} times: expected it once, found {found}. "
                    "Remove or rename the others",
                    file=file,
                    line=line,
                )


def csv_format(name: str, description: str, layout: CsvLayout) -> TraceFormat:
    """Make the `TraceFormat` of a comma-separated file."""
    columns = ",".join(layout.required) + (f"[,{layout.label}]" if layout.label else "")
    return TraceFormat(name, f"{description}, header {columns}", layout.recognises, layout.parse)


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


register_trace_format(
    csv_format(
        "azure",
        "Azure LLM inference trace",
        CsvLayout("TIMESTAMP", "ContextTokens", "GeneratedTokens", clock="calendar"),
    )
)
register_trace_format(
    csv_format(
        "csv",
        "plain CSV, arrival_time in seconds",
        CsvLayout("arrival_time", "prompt_tokens", "output_tokens", label="label"),
    )
)


def read_trace(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    format: str | None = None,
    on_bad_line: Literal["error", "skip"] = "error",
    label: str | Sequence[str] | None = None,
    observation_time: float | None = None,
) -> Trace:
    """Read one trace file, or several that are then superposed by `Trace.merge`.

    Blank lines are ignored, requests are sorted by arrival, and further columns are not read. A line is
    broken if it has too few or too many fields, a time that cannot be read, or token counts that are not
    whole numbers of at least 1. A request that generated 0 tokens counts as broken too: it failed or was
    cancelled, and its tokens say nothing about what it would have cost.

    Args:
        path: file, or sequence of files.
        format: name of a format in `trace_formats`; left out, each file's first line tells.
        on_bad_line: "error" stops at the first broken line; "skip" leaves such lines out and counts them in
            `Trace.skipped_lines`.
        label: label of all requests, or one per file. Left out, the file's own label column where it has one,
            and for several files what tells their names apart (``..._code.csv`` and ``..._conv.csv``: "code",
            "conv").
        observation_time: length of the observed period, s, where it is known to be longer than the span of
            the requests; see `Trace.duration`.

    Raises:
        TraceFormatError: a file is empty, of no known format, or has a broken line; it carries ``file`` and
            ``line``.
        InvalidInput: a file does not exist or cannot be opened, or an argument breaks a rule.

    Sources: Azure/AzurePublicDataset, AzureLLMInferenceTrace_*.csv (2023; those of 2024 have the same
    columns).
    """
    paths = _paths(path)
    if format is not None and format not in _FORMATS:
        raise InvalidInput(f"read_trace: format must be one of {', '.join(_FORMATS)}; got {format!r}")
    if on_bad_line not in ("error", "skip"):
        raise InvalidInput(f"read_trace: on_bad_line must be 'error' or 'skip'; got {on_bad_line!r}")
    labels = _labels(label, len(paths))
    traces = [
        _read_file(each, format=format, skip=on_bad_line == "skip", label=name)
        for each, name in zip(paths, labels, strict=True)
    ]
    if len(traces) > 1:
        return Trace.merge(*traces, observation_time=observation_time)
    if observation_time is None:
        return traces[0]
    return Trace.merge(traces[0], observation_time=observation_time)


def _read_file(path: Path, *, format: str | None, skip: bool, label: str | None) -> Trace:
    file = str(path)
    text = _text(path)
    line, head = next(_lines(text), (0, ""))
    if not line:
        raise TraceFormatError("the file is empty: expected a header line and one line per request", file=file)
    trace_format = _FORMATS[format] if format is not None else _recognise(head, line, file)
    broken = BrokenLines(file, skip)
    columns = trace_format.parse(text, broken)
    if columns.time.size == 0:
        if broken.first is not None:
            raise TraceFormatError(
                f"all {broken.count:,} lines after the header are broken, the first one at {broken.first}. "
                f"Check that the file is {trace_format.description}",
                file=file,
            )
        raise TraceFormatError(
            "there is no request after the header: expected one line per request. Check that the file is complete",
            file=file,
            line=line,
        )
    tokens = columns.prompt_tokens, columns.output_tokens
    count = columns.time.size
    labels = np.full(count, label) if label is not None else columns.label
    if columns.time.dtype.kind == "f":
        seconds = columns.time.astype(np.float64)
        return Trace(seconds, *tokens, label=labels, sources=(path.name,), skipped_lines=broken.count)
    first = int(columns.time.min())
    return Trace(
        (columns.time - first) / 1e9,
        *tokens,
        label=labels,
        start=calendar_time(first, utc=columns.utc),
        sources=(path.name,),
        skipped_lines=broken.count,
    )


def _recognise(head: str, line: int, file: str) -> TraceFormat:
    for trace_format in _FORMATS.values():
        if trace_format.recognises(head):
            return trace_format
    known = "; ".join(f"{each.name} ({each.description})" for each in _FORMATS.values())
    raise TraceFormatError(
        f"the format is not known: the first line is {_shown(head.strip())}. Known formats: {known}. "
        "Rename the columns, or name the format with format=...",
        file=file,
        line=line,
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
    return [*labels]


def _text(path: Path) -> str:
    """Read a file as UTF-8, with or without a byte order mark, every kind of line end as a newline."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InvalidInput(f"read_trace: there is no file {str(path)!r}; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InvalidInput(f"read_trace: {str(path)!r} cannot be opened: {error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise TraceFormatError(
            f"expected UTF-8 text, found byte 0x{raw[error.start]:02x}. Unpack the file, or save it as UTF-8",
            file=str(path),
            line=line,
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if (nul := text.find("\0")) >= 0:
        raise TraceFormatError(
            "expected UTF-8 text, found a NUL byte. Unpack the file, or save it as UTF-8",
            file=str(path),
            line=text.count("\n", 0, nul) + 1,
        )
    return text


def _lines(text: str, *, after: int = 0) -> Iterator[tuple[int, str]]:
    """Yield number and content of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        if number > after and line.strip():
            yield number, line


def _header(line: str) -> list[str]:
    """The column names of a header line; none where it is not even CSV."""
    with suppress(csv.Error, StopIteration):
        return [name.strip() for name in next(csv.reader([line], strict=True))]
    return []


class _Fault(Exception):
    """Why one line cannot be read."""


def _split(line: str, names: Sequence[str]) -> list[str]:
    if '"' in line:
        try:
            row = next(csv.reader([line], strict=True))
        except (csv.Error, StopIteration) as error:
            raise _Fault(f"expected {len(names)} fields, found quotes that do not pair up ({error})") from None
    else:
        row = line.split(",")
    if len(row) != len(names):
        raise _Fault(
            f"expected {len(names)} fields ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''}), "
            f"found {len(row)}: {_shown(line)}"
        )
    return row


_WHOLE = re.compile(r"[ \t]*\+?([0-9]{1,18})(?:\.0*)?[ \t]*")


def _tokens(text: str, column: str) -> int:
    match = _WHOLE.fullmatch(text)
    if match and 1 <= int(match[1]) <= MOST_TOKENS:
        return int(match[1])
    raise _Fault(f"expected a whole number from 1 to {MOST_TOKENS:,} in column {column}, found {_shown(text)}")


def _label(text: str, column: str | None) -> str:
    if label := text.strip():
        return label
    raise _Fault(f"expected a label in column {column}, found nothing")


_NUMBER = re.compile(r"[ \t]*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[ \t]*")
_MOST_SECONDS = 1e12


def _seconds(text: str, column: str) -> float:
    if _NUMBER.fullmatch(text) and abs(seconds := float(text)) <= _MOST_SECONDS:
        return seconds
    raise _Fault(f"expected a finite number of seconds in column {column}, found {_shown(text)}")


_STAMP = re.compile(
    r"[ \t]*([0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?"
    r"(Z|[+-][0-9]{2}:?[0-9]{2})?[ \t]*"
)
_EPOCH, _EPOCH_UTC = datetime(1970, 1, 1), datetime(1970, 1, 1, tzinfo=UTC)
_LAST_DAY = (datetime(2262, 1, 1) - _EPOCH).days


def _nanoseconds(text: str, column: str, zoned: bool | None) -> tuple[int, bool]:
    """Read a timestamp as nanoseconds since 1970, and whether it has a time zone, which must be ``zoned``."""
    expected = f"expected a timestamp such as 2023-11-16 18:17:03.9799600 in column {column}"
    match = _STAMP.fullmatch(text)
    if match is None:
        raise _Fault(f"{expected}, found {_shown(text)}")
    moment, fraction, zone = match.groups()
    if zoned is not None and zoned != (zone is not None):
        raise _Fault(f"{expected}, {'with' if zoned else 'without'} a zone as before, found {_shown(text)}")
    try:
        if zone is None:
            since = datetime.fromisoformat(moment) - _EPOCH
        else:
            since = datetime.fromisoformat(moment + zone) - _EPOCH_UTC
    except ValueError as error:
        raise _Fault(f"{expected}, found {_shown(text)} ({error})") from None
    if not 0 <= since.days < _LAST_DAY:
        raise _Fault(f"{expected}, from 1970 to 2261, found {_shown(text)}")
    nanoseconds = int(fraction.ljust(9, "0")) if fraction else 0
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + nanoseconds, zone is not None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
