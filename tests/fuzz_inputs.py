"""What every fuzzed input is made of: odd numbers and texts, changes of bytes, and the case of files and options.

Everything is drawn from one `random.Random`, so that a seed brings an input back.
"""

from __future__ import annotations

import gzip
import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

TRAP = "fuzz_trap"
"""Stands in every expression that must not run; `fuzz.guard` refuses code that has it."""
NUMBERS: list[Any] = [
    *(0, -0.0, 1, -1, 2, 0.5, 1e-9, 1e-30, 1e-300, 5e-324, 1e6, 1e9, 10**9 + 1, 1e12, 1e15, 1e30, 1e300, 1.7e308),
    *(2**31, 2**63, 2**64, 10**30, 10**400, math.inf, -math.inf, math.nan, True, False, "1", "1e999", "0x10", "1_0"),
]
TEXTS = [
    *("", " ", "\0", "é", "\u202e", "\U0001f600", "[bold]x[/]", "[/]", "{class}", "{0.__class__}", "%s", "x,y", '"'),
    *("$x$", "_", "^", "\\", "\n", "\r\n", "../../etc/passwd", "nan", "null", "lambda", "<script>alert(1)</script>"),
    *("a" * 300, "a" * 70_000, "chat", "-", "--gpus", "\x1b[31m", "'", "é" * 200, "code", "A100", "mixed", "solo"),
]


@dataclass(frozen=True)
class Case:
    """One input: files, and what is done with them."""

    files: dict[str, bytes] = field(default_factory=dict)
    words: tuple[Any, ...] = ()
    """Options: the words of a command line, or pairs of names and values of a function."""


def mangled(content: bytes, rng: Random, other: bytes = b"") -> bytes:
    """The content after some changes of its bytes."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        content = rng.choice(_CHANGES)(content, rng, other or content)
    return content


def _flip(content: bytes, rng: Random, _: bytes) -> bytes:
    made = bytearray(content)
    for _ in range(rng.choice([1, 2, 8])):
        if made:
            made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def _cut(content: bytes, rng: Random, _: bytes) -> bytes:
    start, stop = sorted(rng.randint(0, len(content)) for _ in range(2))
    return content[:start] + content[stop:] if rng.random() < 0.5 else content[:start]


def _splice(content: bytes, rng: Random, other: bytes) -> bytes:
    at, start, stop = rng.randint(0, len(content)), *sorted(rng.randint(0, len(other)) for _ in range(2))
    return content[:at] + other[start:stop] + content[at:]


def _insert(content: bytes, rng: Random, _: bytes) -> bytes:
    at = rng.randint(0, len(content))
    return content[:at] + rng.choice(_PIECES) * rng.choice([1, 1, 1, 20]) + content[at:]


def _number(content: bytes, rng: Random, _: bytes) -> bytes:
    """Another number in place of one."""
    places = [at for at in range(len(content)) if content[at : at + 1].isdigit()]
    if not places:
        return content
    start = stop = rng.choice(places)
    while content[stop : stop + 1].isdigit():
        stop += 1
    return content[:start] + rng.choice(_FIELDS) + content[stop:]


def _repeat_line(content: bytes, rng: Random, _: bytes) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    return b"\n".join(lines[:at] + lines[at : at + 1] * rng.choice([2, 3, 300]) + lines[at + 1 :])


def _other_line(content: bytes, rng: Random, _: bytes) -> bytes:
    lines = content.split(b"\n")
    rng.shuffle(lines) if rng.random() < 0.3 else lines.pop(rng.randrange(len(lines)))
    return b"\n".join(lines)


def _recode(content: bytes, rng: Random, _: bytes) -> bytes:
    text = content.decode("utf-8", "replace")
    return rng.choice(
        [
            b"\xef\xbb\xbf" + content,
            text.encode("utf-16"),
            text.encode("utf-16-le"),
            text.encode("utf-32"),
            content.replace(b"\n", b"\r\n"),
            content.replace(b"\n", b"\r"),
            content.replace(b"\n", "\u2028".encode()),
            content.replace(b",", b";"),
            content.replace(b",", b"\t"),
            content.upper(),
            content.rstrip(b"\n"),
            content.replace(b" ", "\u00a0".encode()),
            text.translate({ord(str(digit)): 0x660 + digit for digit in range(10)}).encode(),
        ]
    )


def _pack(content: bytes, rng: Random, _: bytes) -> bytes:
    packed = gzip.compress(content, 1, mtime=0)
    kind = rng.randrange(8)
    if kind == 0:
        return gzip.compress(packed, 1, mtime=0)
    if kind == 1:
        return packed[: rng.randint(0, len(packed))]
    if kind == 2:
        return packed[:-4] + rng.randbytes(4)
    if kind == 3:
        return packed + rng.choice([b"\0" * 9, b"rest", packed])
    if kind == 4:
        return gzip.compress(content + rng.choice([b"0", b"a", b"1,", b"\n", b" ", b"1,2,3\n"]) * 2**18, 1, mtime=0)
    if kind == 5:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("trace.csv", packed)
        return archive.getvalue()
    return packed


_CHANGES: list[Callable[[bytes, Random, bytes], bytes]] = [
    *(_flip, _cut, _splice, _insert, _insert, _number, _number, _repeat_line, _other_line, _recode, _pack)
]
_FIELDS = [
    *(b"0", b"-1", b"1e5", b"1e308", b"1e309", b"-1e-320", b"9" * 18, b"9" * 19, b"9" * 400, b"nan", b"inf", b"-inf"),
    *(b"1.0", b"1.5", b"1.", b".1", b"0x10", b"1_0", b" 7 ", b"+7", b"--7", b"1e", b"1 2", b"", b"1e12", b"2147483648"),
    *(b"1000000000", b"1000000001", b"true", b"null", b'"7"', b"[]", b"{}", b"1" * 70_000, b"0" * 30 + b"7", b"1e-9"),
    *(
        b"0001-01-01 00:00:00",
        b"9999-12-31 23:59:59",
        b"2023-02-30 00:00:00",
        b"2023-11-16T18:17:03Z",
        b"1969-12-31 23:59:59",
    ),
    *(
        b"2023-11-16 18:17:03+99:99",
        b"2261-12-31 23:59:59.999999999",
        b"2023-11-16 18:17:60",
        b"2023-11-16 18:17:03.+07:00",
    ),
]
_PIECES = [
    *(b"\0", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\n", b"\r", b"\r\n", b"\n\n\n", b",", b'"', b"'", b"\t", b" "),
    *(
        b"\x1a",
        b"\x0b",
        b"\x0c",
        b"\x1c",
        b"\x85",
        b"\xe2\x80\xa8",
        b"{",
        b"}",
        b"[",
        b"]",
        b"[" * 3000,
        b'{"a":' * 3000,
    ),
    *(b"a" * 100_000, b"-" * 50, b"(" * 3000, b"e", b"E999999999", b".", b"NaN", b"Infinity", b"-Infinity", b"\\u0000"),
    *(
        b"#",
        b"=",
        b"[[",
        b'"""',
        b"1" * 5000,
        b"\\",
        b"\\ud800",
        b"\x1f\x8b",
        b"\x1f\x8b\x08",
        b"PK\x03\x04",
        b"%",
        b"$",
    ),
]
