"""This module owns ServeGen's descriptions of clients: drawing the requests that they describe.

A client of ServeGen (Xiang and others 2025, github.com/alibaba/ServeGen) is two files: ``*-trace.csv``, without a
header, has a line per slot of time (start in s, requests/s, coefficient of variation of the gaps between requests, the
family fitted to the gaps and its two parameters); ``*-dataset.json`` has, per longer slot, the shares of prompt and
of output lengths.
"""

from __future__ import annotations

import ast
import json
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput, TraceFormatError
from fluidopt.inputs import read_text
from fluidopt.traces import fields
from fluidopt.traces.checks import MOST_TOKENS, generator_of, is_number
from fluidopt.traces.columns import Columns, Growing, Reading
from fluidopt.traces.fields import Fault, shown

MOST_DRAWN = 20_000_000
"""Descriptions of more requests than this are refused: a period has to be chosen."""
MOST_CHARACTERS = 4_000_000
"""Of a law of lengths: more than one with a share for each of 100,000 lengths."""
_FAMILIES = ("Gamma", "Weibull", "Exponential")
_ENDS = "-trace.csv", "-dataset.json"
_SLOT = 600.0


@dataclass(frozen=True)
class _Slot:
    """One line of a client's trace file."""

    start: float
    """s on the description's clock."""
    rate: float
    """requests/s; 0 in an empty slot."""
    family: str
    shape: float

    def count(self, width: float) -> int:
        """Requests in the slot."""
        return round(self.rate * width)

    def gaps(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Draw gaps between requests; their scale does not matter."""
        if self.family == "Gamma":
            return rng.gamma(self.shape, size=count)
        if self.family == "Weibull":
            return rng.weibull(self.shape, size=count)
        return rng.exponential(size=count)


@dataclass(frozen=True)
class _Lengths:
    """Shares of token counts."""

    tokens: NDArray[np.int64]
    cumulative: NDArray[np.float64]

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw that many lengths."""
        place = np.searchsorted(self.cumulative, rng.random(count) * self.cumulative[-1], side="right")
        drawn: NDArray[np.int64] = self.tokens[np.minimum(place, self.tokens.size - 1)]
        return drawn


class ServeGenClient:
    """The format of a client's trace file, whose requests are drawn as it is read."""

    def recognises(self, head: str) -> bool:
        """Whether the first line has six fields, a family of gaps or nothing the fourth of them."""
        row = head.partition("\n")[0].split(",")
        return len(row) == 6 and row[3].strip() in ("", *_FAMILIES) and _numbers(row) is not None

    def parse(self, reading: Reading) -> Columns:
        """Draw the client's requests of the reading's period.

        Each slot gets as many requests as were recorded in it, rate times length. Its gaps are drawn from its
        family, with the fitted shape, and then scaled to fill the slot, as the fitted scale does not give the
        recorded rate back. Prompt and output lengths are drawn independently, as no more than their shares is
        described; a request drawn with a length of 0 failed, and is left out as in every trace. The draws of a slot
        depend on the seed, the file's name and the slot: another period, or other clients beside it, leave them as
        they are.
        """
        path = reading.source.path
        if path is None or not path.name.endswith(_ENDS[0]):
            raise reading.fault(
                f"a ServeGen client is read from a file named *{_ENDS[0]}, which has its *{_ENDS[1]} beside it. "
                "Rename the files, or unpack them"
            )
        slots = _slots(reading)
        if not slots:
            return Growing().columns()
        width = min(np.diff([slot.start for slot in slots]), default=_SLOT)
        begin, end = _period(reading, slots, width)
        lengths = _LengthSlots(path.with_name(path.name.removesuffix(_ENDS[0]) + _ENDS[1]))
        root, client = _root(reading.seed), crc32(path.name.encode())
        grown = Growing()
        for index, slot in enumerate(slots):
            count = slot.count(width)
            if not count or slot.start + width <= begin or slot.start >= end:
                continue
            stream = np.random.SeedSequence(root.entropy, spawn_key=(*root.spawn_key, client, index))
            rng = np.random.default_rng(stream)
            # One gap more than requests: the one from the last of them to the end of the slot.
            passed = np.cumsum(slot.gaps(count + 1, rng))
            time = slot.start + width * passed[:-1] / passed[-1]
            prompt, output = (law.draw(count, rng) for law in lengths.at(slot.start))
            kept = (time >= begin) & (time < end) & (prompt > 0) & (output > 0)
            grown.add({"time": time[kept], "prompt_tokens": prompt[kept], "output_tokens": output[kept]})
        drawn = replace(grown.columns(), observation_time=end - begin)
        if not drawn.time.size:
            raise InvalidInput(
                f"read_trace: {reading.source.file!r} describes no request from {begin:g} to {end:g} s; choose another "
                "period"
            )
        return drawn


def _slots(reading: Reading) -> list[_Slot]:
    slots: list[_Slot] = []
    for chunk in reading.source.chunks():
        for number, line in chunk.lines():
            try:
                slot = _slot(line)
                if slots and slot.start <= slots[-1].start:
                    raise Fault(f"expected a start after {slots[-1].start:g} s, found {slot.start:g}")
            except Fault as fault:
                reading.broken(number, fault)
            else:
                slots.append(slot)
    return slots


def _slot(line: str) -> _Slot:
    row = line.split(",")
    if len(row) != 6:
        raise Fault(f"expected 6 fields (start, rate, CV, family, 2 parameters), found {len(row)}: {shown(line)}")
    numbers = _numbers(row)
    if numbers is None:
        raise Fault(f"expected finite numbers in all fields but the fourth, found {shown(line)}")
    start, rate, _, shape, _ = numbers
    family = row[3].strip()
    if not 0.0 <= rate <= 1e6:
        raise Fault(f"expected a rate from 0 to 1e6 requests/s, found {rate:g}")
    if rate == 0.0:
        return _Slot(start, 0.0, family, 1.0)
    if family not in _FAMILIES:
        raise Fault(f"expected one of the families {', '.join(_FAMILIES)}, found {shown(family)}")
    if family != "Exponential" and not 0.01 <= shape <= 1e6:
        raise Fault(f"expected a shape from 0.01 to 1e6, found {shape:g}")
    return _Slot(start, rate, family, shape)


def _numbers(row: list[str]) -> list[float] | None:
    """The fields but the fourth, where they are finite numbers."""
    try:
        return [fields.seconds(text, "") for index, text in enumerate(row) if index != 3]
    except Fault:
        return None


def _period(reading: Reading, slots: list[_Slot], width: float) -> tuple[float, float]:
    """From when to when requests are drawn.

    Raises:
        InvalidInput: the period is none, lies outside the description, or has too many requests.
    """
    first, last = slots[0].start, slots[-1].start + width
    begin, end = (first, last) if reading.period is None else reading.period
    if not first <= begin < end <= last:
        raise InvalidInput(
            f"read_trace: period must be two times in order from {first:g} to {last:g} s, which "
            f"{reading.source.file!r} describes; got {reading.period!r}"
        )
    count = sum(slot.count(width) for slot in slots if slot.start + width > begin and slot.start < end)
    if count > MOST_DRAWN:
        raise InvalidInput(
            f"read_trace: {reading.source.file!r} describes {count:,} requests from {begin:g} to {end:g} s, more than "
            f"{MOST_DRAWN:,}; choose a shorter period, such as period=({begin:g}, {begin + width:g})"
        )
    return begin, end


class _LengthSlots:
    """A client's dataset file: the laws of its lengths, read where they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            found = json.loads(read_text(path))
        except FileNotFoundError:
            raise InvalidInput(
                f"read_trace: there is no file {str(path)!r}, which a ServeGen client's lengths are read from; put it "
                "beside the trace file"
            ) from None
        except OSError as error:
            raise InvalidInput(f"read_trace: {str(path)!r} cannot be opened: {error}") from None
        except (ValueError, RecursionError) as error:
            raise self._fault(f"expected JSON ({error})") from None
        if not (isinstance(found, dict) and found):
            raise self._fault(f"expected an object with an entry per slot, found {shown(repr(found), quoted=False)}")
        try:
            self._slots = sorted((fields.seconds(start, "start"), start) for start in found)
        except Fault:
            raise self._fault(f"expected starts of slots in s as keys, found {shown(', '.join(found))}") from None
        self._found = found
        self._known: dict[str, tuple[_Lengths, _Lengths]] = {}

    def at(self, time: float) -> tuple[_Lengths, _Lengths]:
        """The laws of prompt and output tokens in the slot that has this time."""
        place = bisect_right(self._slots, (time, chr(0x10FFFF))) - 1
        if place < 0:
            raise self._fault(f"expected a slot that holds {time:g} s, found the first one at {self._slots[0][0]:g} s")
        key = self._slots[place][1]
        if key not in self._known:
            entry = self._found[key]
            self._known[key] = self._law(entry, key, "input_tokens"), self._law(entry, key, "output_tokens")
        return self._known[key]

    def _law(self, entry: Any, slot: str, key: str) -> _Lengths:
        text = entry.get(key) if isinstance(entry, dict) else None
        expected = f"expected shares by token count, such as '{{34: 0.25, 35: 0.75}}', in {key} of slot {slot}"
        try:
            # Python's notation, as JSON has no whole numbers for keys.
            shares = ast.literal_eval(text) if isinstance(text, str) and len(text) <= MOST_CHARACTERS else None
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            shares = None
        if not (isinstance(shares, dict) and shares):
            raise self._fault(f"{expected}, found {shown(repr(text), quoted=False)}")
        for tokens, share in shares.items():
            whole = isinstance(tokens, int) and not isinstance(tokens, bool) and 0 <= tokens <= MOST_TOKENS
            if not (whole and is_number(share) and 0.0 <= share <= 1e9):
                raise self._fault(f"{expected}, found {shown(f'{tokens!r}: {share!r}', quoted=False)}")
        cumulative = np.cumsum([float(share) for share in shares.values()])
        if not cumulative[-1] > 0.0:
            raise self._fault(f"{expected}, found none above 0")
        return _Lengths(np.array([*shares], dtype=np.int64), cumulative)

    def _fault(self, message: str) -> TraceFormatError:
        return TraceFormatError(message, file=self._path)


def _root(seed: int | np.random.SeedSequence | np.random.Generator) -> np.random.SeedSequence:
    if isinstance(seed, np.random.SeedSequence):
        return seed
    if isinstance(seed, np.random.Generator):
        return np.random.SeedSequence(int(seed.integers(2**63)))
    generator_of(seed, "read_trace")
    return np.random.SeedSequence(seed)
