"""This module owns comma-separated traces: which column means what, and the two ways to read their rows.

`CsvLayout` reads a chunk of lines by array operations on its bytes. Whatever is not plainly a row of digits, points and
dashes (quotes, blanks, exponents, another alphabet, a fault) is read line by line by the exact parsers of `fields`,
which alone decide what is broken. So both ways accept the same files, and the fast one is only faster.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from fluidopt.traces import fields
from fluidopt.traces.checks import MOST_TOKENS
from fluidopt.traces.columns import PER_SECOND, Clock, Columns, Growing, Layout, Reading, check_order, clock_of
from fluidopt.traces.fields import Fault, shown
from fluidopt.traces.lines import Chunk


@dataclass(frozen=True)
class CsvLayout(Layout):
    """Which columns of a comma-separated file with a header hold the times, the token counts and the label."""

    def recognises(self, head: str) -> bool:
        """Whether a header has at least two of the three required columns (a missing one is then named)."""
        return len(set(self.required) & set(_header(head.partition("\n")[0]))) >= 2

    def parse(self, reading: Reading) -> Columns:
        """Read all rows: about 0.6 s per million that are plain, ten times that where they are not."""
        source = reading.source
        names = _header(source.first_line)
        self._check_header(names, reading)
        table = _Table(self, names, self.clock or _clock_of(source.head, names.index(self.time)))
        grown = Growing()
        for chunk in source.chunks_below_first_line():
            grown.add(table.read(chunk, reading))
        return grown.columns(utc=bool(table.zoned))

    def _check_header(self, names: Sequence[str], reading: Reading) -> None:
        line, found = reading.source.head_line, ", ".join(names)
        for name in self.required:
            if name not in names:
                raise reading.fault(
                    f"column {name!r} is missing: expected a header with {', '.join(self.required)}, found "
                    f"{found}. Rename or add the column, or say which one it is with columns=...",
                    line=line,
                )
        wanted = {*self.required, *self.optional.values()}
        for name, count in Counter(names).items():
            if count > 1 and name in wanted:
                raise reading.fault(
                    f"column {name!r} occurs {count} times: expected it once, found {found}. "
                    "Remove or rename the others",
                    line=line,
                )


class _Table:
    """The rows of one file.

    Attributes:
        at: place of each column that is read, by its name in `Columns`.
        zoned: whether times carry a zone; None before the first one, and where they are no timestamps.
    """

    def __init__(self, layout: CsvLayout, names: Sequence[str], clock: Clock) -> None:
        self._clock: Clock = clock
        self._names = names
        self._column = {
            "time": layout.time,
            "prompt_tokens": layout.prompt,
            "output_tokens": layout.output,
            **{name: column for name, column in layout.optional.items() if column in names},
        }
        self.at = {name: names.index(column) for name, column in self._column.items()}
        self.zoned: bool | None = None

    def read(self, chunk: Chunk, reading: Reading) -> dict[str, NDArray[Any]]:
        """Read the rows of a chunk."""
        rows = _Rows(chunk.data, len(self._names))
        columns: dict[str, NDArray[Any]] = {}
        sure = rows.regular.copy()
        for name, at in self.at.items():
            columns[name], plain = self._plain(name, rows, at)
            sure &= plain
        sure &= _in_order(columns)
        for index in np.flatnonzero(~sure):
            text = rows.text(int(index))
            if not text.strip():
                continue
            try:
                row = self._exact(text)
            except Fault as fault:
                reading.broken(chunk.line + int(index), fault)
                continue
            sure[index] = True
            for name, value in row.items():
                if name == "label":
                    columns[name] = columns[name].astype(f"U{max(len(value), columns[name].itemsize // 4)}", copy=False)
                columns[name][index] = value
        return {name: column[sure] for name, column in columns.items()}

    def _plain(self, name: str, rows: _Rows, at: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read a column where it is plain: values, and which of them are."""
        if name.endswith("tokens"):
            return rows.token_counts(at)
        if name == "label":
            return rows.labels(at)
        if self._clock == "calendar":
            return rows.timestamps(at, zoned=self.zoned, optional=name != "time")
        return rows.seconds(at, PER_SECOND[self._clock], optional=name != "time")

    def _exact(self, line: str) -> dict[str, Any]:
        """Read one line.

        Raises:
            Fault: it is broken.
        """
        fields_of_line = _split(line, self._names)
        row: dict[str, Any] = {}
        for name, at in self.at.items():
            text, column = fields_of_line[at], self._column[name]
            if name.endswith("tokens"):
                row[name] = fields.token_count(text, column)
            elif name == "label":
                row[name] = fields.label(text, column)
            else:
                row[name] = self._time(text, column, optional=name != "time")
        check_order(row, self._column)
        return row

    def _time(self, text: str, column: str, *, optional: bool) -> float:
        calendar = self._clock == "calendar"
        if optional and text.strip().lower() in ("", "nan"):
            return fields.MISSING if calendar else math.nan
        if not calendar:
            return fields.seconds(text, column, per_second=PER_SECOND[self._clock])
        time, self.zoned = fields.nanoseconds(text, column, self.zoned)
        return time


def _in_order(columns: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Which rows surely have their times in order."""
    order = np.ones(columns["time"].size, dtype=bool)
    earlier = columns["time"]
    for name in ("first_token", "finish"):
        if name in columns:
            absent = np.isnan(columns[name]) | (columns[name] == fields.MISSING)
            order &= (columns[name] >= earlier) | absent
            earlier = np.where(absent, earlier, columns[name])
    return order


class _Rows:
    """The lines of a chunk as ranges of bytes, and their fields where the commas tell them.

    Attributes:
        regular: which lines have the right number of commas, and neither quotes nor characters beyond ASCII.
    """

    def __init__(self, data: bytes, columns: int) -> None:
        self._data = data
        self._bytes = np.frombuffer(data, dtype=np.uint8)
        self._end = np.flatnonzero(self._bytes == ord("\n"))
        self._start = np.concatenate([[0], self._end[:-1] + 1])[: self._end.size]
        commas = np.flatnonzero(self._bytes == ord(","))
        first = np.searchsorted(commas, self._start)
        self.regular = np.diff(first, append=commas.size) == columns - 1
        if b'"' in data:
            self.regular[np.searchsorted(self._end, np.flatnonzero(self._bytes == ord('"')))] = False
        if not data.isascii():
            self.regular[np.searchsorted(self._end, np.flatnonzero(self._bytes > 127))] = False
        # Column k lies between marks k and k + 1; lines that are not regular get empty fields.
        self._mark = np.empty((columns + 1, self._end.size), dtype=np.int64)
        self._mark[0], self._mark[-1] = self._start - 1, self._end
        for k in range(1, columns):
            self._mark[k] = self._mark[0]
            self._mark[k, self.regular] = commas[first[self.regular] + k - 1]

    def text(self, index: int) -> str:
        """One line."""
        return self._data[self._start[index] : self._end[index]].decode()

    def token_counts(self, at: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Whole numbers from 1 to `MOST_TOKENS` written in digits alone."""
        field = self._field(at, most=10)
        value = field.whole(0, field.text.shape[1])
        return value, field.fits & (field.digit | field.beyond).all(axis=1) & (value >= 1) & (value <= MOST_TOKENS)

    def seconds(self, at: int, per_second: float, *, optional: bool) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Numbers written in digits with at most one point and one minus sign, and nothing where that may be."""
        field = self._field(at, most=24)
        point, minus = field.text == ord("."), field.text == ord("-")
        minus[:, 1:] = False
        points = point.sum(axis=1)
        plain = field.fits & (field.digit | point | minus | field.beyond).all(axis=1) & (points <= 1)
        plain &= field.digit.any(axis=1)
        value = np.full(plain.size, math.nan)
        # numpy reads digits as float() does, rounding to the nearest.
        value[plain] = np.ascontiguousarray(field.text[plain]).view(f"S{field.text.shape[1]}")[:, 0].astype(np.float64)
        value /= per_second
        plain &= np.abs(value) <= fields.MOST_SECONDS
        return value, plain | (self.regular & (field.width == 0)) if optional else plain

    def timestamps(self, at: int, *, zoned: bool | None, optional: bool) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Timestamps without a zone, or with +00:00 or Z, whichever the file has shown before."""
        if zoned is None:
            return np.zeros(self._end.size, dtype=np.int64), np.zeros(self._end.size, dtype=bool)
        field = self._field(at, most=35)
        if zoned:
            field = field.without_zone()
        text, digit = field.text, field.digit
        if text.shape[1] < 19:
            plain = np.zeros(self._end.size, dtype=bool)
            return np.full(self._end.size, fields.MISSING), plain | (self.regular & (field.width == 0) & optional)
        plain = field.fits & (field.width >= 19) & (field.width <= 29) & (field.width != 20)
        for place, allowed in ((4, b"-"), (7, b"-"), (10, b" T"), (13, b":"), (16, b":"), (19, b".")):
            if place < text.shape[1]:
                plain &= np.isin(text[:, place], np.frombuffer(allowed + b"\0", dtype=np.uint8))
        digits = np.ones(text.shape[1], dtype=bool)
        digits[[place for place in (4, 7, 10, 13, 16, 19) if place < digits.size]] = False
        plain &= (digit | field.beyond)[:, digits].all(axis=1)
        year, month, day = field.whole(0, 4), field.whole(5, 7), field.whole(8, 10)
        hour, minute, second = field.whole(11, 13), field.whole(14, 16), field.whole(17, 19)
        plain &= (year >= 1970) & (year < 2262) & (month >= 1) & (month <= 12) & (day >= 1)
        months = np.where(plain, (year - 1970) * 12 + month - 1, 0).astype("datetime64[M]")
        before = months.astype("datetime64[D]").astype(np.int64)
        after = (months + 1).astype("datetime64[D]").astype(np.int64)
        plain &= (day <= after - before) & (hour < 24) & (minute < 60) & (second < 60)
        whole = ((before + day - 1) * 24 + hour) * 3600 + minute * 60 + second
        part = field.whole(20, 29) * 10 ** np.clip(29 - np.maximum(field.width, 20), 0, 9)
        value = np.where(plain, whole * 1_000_000_000 + part, fields.MISSING)
        return value, plain | (self.regular & (field.width == 0)) if optional else plain

    def labels(self, at: int) -> tuple[NDArray[np.str_], NDArray[np.bool_]]:
        """Labels without blanks around them, of at most 64 characters."""
        field = self._field(at, most=64)
        last = np.take_along_axis(field.text, np.maximum(field.width - 1, 0).clip(max=63)[:, None], axis=1)[:, 0]
        plain = field.fits & (field.text[:, 0] > 32) & (last > 32)
        text = field.text.copy()
        text[~plain] = 0
        return text.view(f"S{text.shape[1]}")[:, 0].astype(np.str_), plain

    def _field(self, at: int, *, most: int) -> _Field:
        left, right = self._mark[at] + 1, self._mark[at + 1]
        width = np.where(self.regular, right - left, 0)
        across = int(min(max(width.max(initial=0), 1), most))
        windows = sliding_window_view(np.pad(self._bytes, (0, across)), across)
        text = windows[left]
        text[np.arange(across) >= width[:, None]] = 0
        return _Field(text, width, (width >= 1) & (width <= across))


@dataclass(frozen=True)
class _Field:
    """One field of every line, as a table of bytes: a row per line, padded with zeros."""

    text: NDArray[np.uint8]
    width: NDArray[np.int64]
    fits: NDArray[np.bool_]
    """Whether the field holds anything, and is not cut."""

    @cached_property
    def digit(self) -> NDArray[np.bool_]:
        """Which characters are digits."""
        digit: NDArray[np.bool_] = self._value <= 9
        return digit

    @cached_property
    def beyond(self) -> NDArray[np.bool_]:
        """Which characters are padding."""
        beyond: NDArray[np.bool_] = self.text == 0
        return beyond

    @cached_property
    def _value(self) -> NDArray[np.uint8]:
        value: NDArray[np.uint8] = self.text - np.uint8(ord("0"))
        return value  # what is below "0" wraps round to above 9

    def whole(self, start: int, stop: int) -> NDArray[np.int64]:
        """The number that the digits in these places make; those of a shorter field end earlier."""
        value = np.zeros(self.width.size, dtype=np.int64)
        for place in range(start, min(stop, self.text.shape[1])):
            value = np.where(place < self.width, value * 10 + self._value[:, place], value)
        return value

    def without_zone(self) -> _Field:
        """The field less the +00:00, +0000 or Z at its end; one that has none of them does not fit."""
        size = np.zeros_like(self.width)
        for zone in (b"Z", b"+0000", b"+00:00"):
            found = self.width >= len(zone)
            for back, character in enumerate(reversed(zone), 1):
                place = np.maximum(self.width - back, 0).clip(max=self.text.shape[1] - 1)
                found &= np.take_along_axis(self.text, place[:, None], axis=1)[:, 0] == character
            size[found] = len(zone)
        width = self.width - size
        text = np.where(np.arange(self.text.shape[1]) < width[:, None], self.text, np.uint8(0))
        return _Field(text, width, self.fits & (size > 0))


def _clock_of(head: str, at: int) -> Clock:
    """What the times of a file are, by this field of its second line."""
    rows = [line for line in head.split("\n", 100) if line.strip()]
    fields_of_line = _csv_row(rows[1]) if len(rows) > 1 else []
    return clock_of(fields_of_line[at] if at < len(fields_of_line) else None)


def _header(line: str) -> list[str]:
    """The column names of a header line; none where it is not even CSV."""
    return [name.strip() for name in _csv_row(line)]


def _csv_row(line: str) -> list[str]:
    with suppress(csv.Error, StopIteration):
        return next(csv.reader([line], strict=True))
    return []


def _split(line: str, names: Sequence[str]) -> list[str]:
    if '"' in line:
        try:
            row = next(csv.reader([line], strict=True))
        except (csv.Error, StopIteration) as error:
            raise Fault(f"expected {len(names)} fields, found quotes that do not pair up ({error})") from None
    else:
        row = line.split(",")
    if len(row) != len(names):
        raise Fault(
            f"expected {len(names)} fields ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''}), "
            f"found {len(row)}: {shown(line)}"
        )
    return row
