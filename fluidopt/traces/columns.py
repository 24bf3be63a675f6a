"""This module owns what a parser is given and what it returns, whatever the format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import TraceFormatError
from fluidopt.traces.fields import MISSING, STAMP, Fault
from fluidopt.traces.lines import Source

Clock = Literal["calendar", "s", "ms", "us", "ns"]
"""What times are: ISO 8601 timestamps, or numbers of some unit."""
PER_SECOND: dict[Clock, float] = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
REASONS_KEPT = 5
"""Of the lines left out, the faults of this many are kept."""


@dataclass(frozen=True)
class Layout:
    """Where a file has the times, the token counts and the label: in which columns, or under which keys."""

    time: str
    prompt: str
    output: str
    _: KW_ONLY
    label: str | None = None
    """Of labels, which a file may lack, as it may lack the next two."""
    first_token: str | None = None
    """Of the times at which first tokens came; empty, null or NaN where unknown."""
    finish: str | None = None
    """Of the times at which last tokens came, in the same way."""
    clock: Clock | None = None
    """What the times are; None: timestamps if the first one is, else seconds."""

    @property
    def required(self) -> tuple[str, str, str]:
        """What a file must have."""
        return self.time, self.prompt, self.output

    @property
    def optional(self) -> dict[str, str]:
        """What a file may have, by the names in `Columns`."""
        named = {"label": self.label, "first_token": self.first_token, "finish": self.finish}
        return {name: where for name, where in named.items() if where is not None}


@dataclass(frozen=True)
class Columns:
    """What a parser returns: one entry per request, in the order of the file."""

    time: NDArray[np.int64] | NDArray[np.float64]
    """Nanoseconds since 1970 (int64) for calendar times, else seconds on the file's own clock (float64)."""
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    label: NDArray[np.str_] | None = None
    first_token: NDArray[np.int64] | NDArray[np.float64] | None = None
    """Time of the first output token, of the same kind as ``time``; `fields.MISSING` or NaN where absent."""
    finish: NDArray[np.int64] | NDArray[np.float64] | None = None
    """Time of the last output token, in the same way."""
    utc: bool = False
    """Whether calendar times carry a time zone (and are given here in UTC)."""
    observation_time: float | None = None
    """Length of the observed period, s, where the file tells."""


@dataclass
class Reading:
    """One file being read: its lines, the caller's wishes, and the lines that turned out broken."""

    source: Source
    skip: bool = False
    """Whether broken lines are left out and counted."""
    period: tuple[float, float] | None = None
    """For a format that describes requests by their laws: from when to when they are drawn, s on its clock."""
    seed: int | np.random.SeedSequence | np.random.Generator = 0
    """For such a format: of the draws."""
    broken_lines: int = 0
    reasons: list[str] = field(default_factory=list)

    def broken(self, line: int, fault: Fault | str) -> None:
        """Report a broken line.

        Raises:
            TraceFormatError: unless broken lines are skipped.
        """
        if not self.skip:
            hint = "Repair the line, or leave such lines out with on_bad_line='skip'"
            raise TraceFormatError(f"{fault}. {hint}", file=self.source.file, line=line)
        self.broken_lines += 1
        if len(self.reasons) < REASONS_KEPT:
            self.reasons.append(str(TraceFormatError(str(fault), file=self.source.file, line=line)))

    def fault(self, message: str, *, line: int | None = None) -> TraceFormatError:
        """Return the error of a file that cannot be read at all."""
        return TraceFormatError(message, file=self.source.file, line=line)


class Growing:
    """The columns of a file as they grow, chunk by chunk."""

    def __init__(self) -> None:
        self._columns: dict[str, NDArray[Any]] = {}

    def add(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Append one chunk's columns, which must have the same names every time."""
        for name, part in columns.items():
            known = self._columns.get(name)
            if known is None:
                self._columns[name] = part.copy()
                continue
            if part.dtype.itemsize > known.itemsize:
                self._columns[name] = known = known.astype(part.dtype)  # longer labels than before
            size = known.size
            # In place, so that a column never exists twice: nobody else has seen this array.
            known.resize(size + part.size, refcheck=False)
            known[size:] = part

    def take(self, name: str) -> NDArray[Any]:
        """Return one whole column."""
        return self._columns.pop(name, np.empty(0))

    def columns(self, *, utc: bool = False) -> Columns:
        """Return the whole columns."""
        return Columns(
            self.take("time"),
            self.take("prompt_tokens"),
            self.take("output_tokens"),
            label=self._columns.get("label"),
            first_token=self._columns.get("first_token"),
            finish=self._columns.get("finish"),
            utc=utc,
        )


def clock_of(time: object) -> Clock:
    """Return what a file's times are, by the first of them: timestamps, or else seconds."""
    return "calendar" if isinstance(time, str) and STAMP.fullmatch(time) else "s"


def check_order(row: dict[str, Any], column: dict[str, str]) -> None:
    """Refuse a first token before the arrival, and a last one before the first.

    Raises:
        Fault: naming the columns.
    """
    earlier = "time"
    for name in ("first_token", "finish"):
        if name in row and not _absent(row[name]):
            if row[name] < row[earlier]:
                raise Fault(f"expected a time in column {column[name]} no earlier than in column {column[earlier]}")
            earlier = name


def _absent(time: float) -> bool:
    return math.isnan(time) or time == MISSING
