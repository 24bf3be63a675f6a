"""This module owns what a single field may hold: the exact parsers, with the messages for what they refuse."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Any

from fluidopt.traces.checks import MOST_TOKENS

MOST_SECONDS = 1e12
"""Times beyond this are taken for faults of the file, or for another unit."""
MOST_LABEL = 200
"""Characters of a label: a column is as wide as its longest one."""
MISSING = -(2**63)
"""Stands for a missing calendar time, as in numpy's NaT."""


class Fault(Exception):
    """Why one line cannot be read."""


def token_count(text: str, column: str) -> int:
    """Read a number of tokens."""
    match = _WHOLE.fullmatch(text)
    if match and 1 <= int(match[1]) <= MOST_TOKENS:
        return int(match[1])
    raise _token_fault(column, shown(text))


def label(text: str, column: str) -> str:
    """Read a label, without the blanks around it."""
    stripped = text.strip()
    if not stripped:
        raise Fault(f"expected a label in column {column}, found nothing")
    if len(stripped) > MOST_LABEL:
        raise Fault(f"expected a label of at most {MOST_LABEL} characters in column {column}, found {shown(stripped)}")
    return stripped


def seconds(text: str, column: str, *, per_second: float = 1.0) -> float:
    """Read a time in units of which ``per_second`` make a second, as seconds."""
    if _NUMBER.fullmatch(text):
        return _scaled(float(text), column, per_second, shown(text))
    raise _time_fault(column, per_second, shown(text))


def nanoseconds(text: str, column: str, zoned: bool | None) -> tuple[int, bool]:
    """Read a timestamp as nanoseconds since 1970, and whether it has a time zone, which must be ``zoned``."""
    expected = f"expected a timestamp such as 2023-11-16 18:17:03.9799600 in column {column}"
    match = STAMP.fullmatch(text)
    if match is None:
        raise Fault(f"{expected}, found {shown(text)}")
    moment, fraction, zone = match.groups()
    if zoned is not None and zoned != (zone is not None):
        raise Fault(f"{expected}, {'with' if zoned else 'without'} a zone as before, found {shown(text)}")
    try:
        if zone is None:
            since = datetime.fromisoformat(moment) - _EPOCH
        else:
            since = datetime.fromisoformat(moment + zone) - _EPOCH_UTC
    except ValueError as error:
        raise Fault(f"{expected}, found {shown(text)} ({error})") from None
    if not 0 <= since.days < _LAST_DAY:
        raise Fault(f"{expected}, from 1970 to 2261, found {shown(text)}")
    part = int(fraction.ljust(9, "0")) if fraction else 0
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + part, zone is not None


def json_token_count(value: Any, key: str) -> int:
    """Read a number of tokens from a JSON value."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= MOST_TOKENS:
        whole = int(value)
        if whole == value:
            return whole
    raise _token_fault(key, shown(repr(value), quoted=False))


def json_seconds(value: Any, key: str, *, per_second: float = 1.0) -> float:
    """Read a time from a JSON value, in units of which ``per_second`` make a second, as seconds."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return _scaled(float(value), key, per_second, repr(value)[:80])
        except OverflowError:  # an integer beyond the range of float
            pass
    raise _time_fault(key, per_second, shown(repr(value), quoted=False))


def shown(text: str, *, quoted: bool = True) -> str:
    """Return what a message shows of a text from a file: its beginning."""
    cut = text if len(text) <= 80 else text[:77] + "..."
    return repr(cut) if quoted else cut


STAMP = re.compile(
    r"[ \t]*([0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?"
    r"(Z|[+-][0-9]{2}:?[0-9]{2})?[ \t]*"
)
_WHOLE = re.compile(r"[ \t]*\+?([0-9]{1,18})(?:\.0*)?[ \t]*")
# One way only to match any text, so that a long one that is no number is refused in linear time.
_NUMBER = re.compile(r"[ \t]*[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[ \t]*")
_EPOCH, _EPOCH_UTC = datetime(1970, 1, 1), datetime(1970, 1, 1, tzinfo=UTC)
_LAST_DAY = (datetime(2262, 1, 1) - _EPOCH).days
_UNITS = {1.0: "seconds", 1e3: "milliseconds", 1e6: "microseconds", 1e9: "nanoseconds"}


def _scaled(value: float, column: str, per_second: float, found: str) -> float:
    # Division by a power of ten rounds once; multiplication by 1e-3 would round twice.
    if math.isfinite(value) and abs(value / per_second) <= MOST_SECONDS:
        return value / per_second
    raise _time_fault(column, per_second, found)


def _token_fault(column: str, found: str) -> Fault:
    return Fault(f"expected a whole number from 1 to {MOST_TOKENS:,} in column {column}, found {found}")


def _time_fault(column: str, per_second: float, found: str) -> Fault:
    unit = _UNITS.get(per_second, f"1/{per_second:g} s")
    return Fault(f"expected a finite number of {unit} in column {column}, found {found}")
