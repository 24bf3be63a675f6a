"""This module owns the way from a file, packed or not, or a pipe, to numbered chunks of lines."""

from __future__ import annotations

import gzip
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Protocol, cast

from fluidopt.errors import InvalidInput, TraceFormatError

STDIN = "-"
"""The path that stands for standard input."""
CHUNK = 1 << 22
"""Bytes read at a time: with what a parser makes of them, the memory that reading takes besides its result."""
LONGEST_LINE = 1 << 30
"""Bytes that a line may have: more than the largest document of a benchmark, which is a single line."""
MOST_GROWTH, SMALL = 200, 1 << 26
"""A packed file may grow to this many times its size, or to this many bytes: ten times what requests reach."""
_HEAD = 1 << 16
_GZIP = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """Some whole lines of a file, valid UTF-8 without NUL."""

    line: int
    """Number of the first one in the file, from 1."""
    data: bytes
    """The lines, each one, the last of the file included, ended by ``\\n``, whatever ended it in the file."""

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield number and content of each line that is not blank."""
        # str.splitlines would also split at characters that no CSV or JSON writer takes for the end of a line.
        for number, line in enumerate(self.data.decode().split("\n"), self.line):
            if line.strip():
                yield number, line


class Source:
    """A file that is read once, from front to back.

    Attributes:
        file: its name, for messages.
        path: where it lies; None for standard input.
        head_line: number of the first line that is not blank; 0 where there is none.
        head: the text from that line on, with at least one line more where there is one.
    """

    def __init__(self, file: str, path: Path | None, chunks: Iterator[Chunk]) -> None:
        self.file = file
        self.path = path
        self._first = _head(chunks)
        self._others = chunks
        self.head_line, self.head = _from_first_line(self._first)

    @property
    def first_line(self) -> str:
        """The first line that is not blank."""
        return self.head.partition("\n")[0]

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks from the first line that is not blank on. Once: they are gone then."""
        yield Chunk(self.head_line, self.head.encode())
        yield from self._others

    def chunks_below_first_line(self) -> Iterator[Chunk]:
        """Yield the chunks from the line after the first one on. Once: they are gone then."""
        if below := self.head.partition("\n")[2]:
            yield Chunk(self.head_line + 1, below.encode())
        yield from self._others


@contextmanager
def open_source(path: str | os.PathLike[str]) -> Iterator[Source]:
    """Open a file of UTF-8 text, with or without byte order mark, with any kind of line end, packed by gzip or not.

    Args:
        path: file or pipe; ``"-"`` for standard input.

    Raises:
        InvalidInput: the file does not exist or cannot be opened.
        TraceFormatError: while chunks are read: not UTF-8, a NUL, a line of more than 1 GiB, or a packed file that
            breaks off or grows to more than 200 times its size.
    """
    if os.fspath(path) == STDIN:
        yield Source("standard input", None, _chunks(_unpacked(sys.stdin.buffer, "standard input"), "standard input"))
        return
    file = str(path)
    try:
        raw = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise InvalidInput(f"read_trace: there is no file {file!r}; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"read_trace: {file!r} cannot be opened: {reason}; check the path") from None
    with raw:
        yield Source(file, Path(path), _chunks(_unpacked(raw, file), file))


def _unpacked(raw: IO[bytes], file: str) -> Stream:
    """The bytes themselves, or what gzip made them of: its first two bytes tell, a name may mislead."""
    start = getattr(raw, "peek", lambda _: b"")(2)[:2]
    return _Unpacked(raw, file) if start == _GZIP else raw


class Stream(Protocol):
    """What chunks are read from."""

    def read(self, size: int, /) -> bytes:
        """Return up to that many bytes; none at the end."""


class _Unpacked:
    """A packed file while it is unpacked; a small one that grows without end, to fill the memory, is refused."""

    def __init__(self, raw: IO[bytes], file: str) -> None:
        self._raw, self._file = raw, file
        self._packed = self._unpacked = 0
        self._reader = gzip.GzipFile(fileobj=cast(IO[bytes], SimpleNamespace(read=self._fetch)))

    def read(self, size: int) -> bytes:
        block = self._reader.read(size)
        self._unpacked += len(block)
        if self._unpacked > max(SMALL, MOST_GROWTH * self._packed):
            raise TraceFormatError(
                f"the packed file grows to more than {MOST_GROWTH} times its size, which no list of requests does. If "
                "it is one, unpack it first",
                file=self._file,
            )
        return block

    def _fetch(self, size: int) -> bytes:
        block = self._raw.read(size)
        self._packed += len(block)
        return block


def _chunks(stream: Stream, file: str) -> Iterator[Chunk]:
    """Yield whole lines: a small chunk first, as the format is told from it, then larger ones."""
    line, size, start = 1, _HEAD, True
    pending: list[bytes] = []
    while block := _read(stream, size, file):
        while block.endswith(b"\r") and (more := _read(stream, 1, file)):
            block += more  # "\r\n" is one line end and must not be parted
        if start:
            block, start = block.removeprefix(_BYTE_ORDER_MARK), False
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        cut = block.rfind(b"\n") + 1
        if cut:
            yield _checked(line, b"".join([*pending, block[:cut]]), file)
            line += sum(each.count(b"\n") for each in (*pending, block))
            pending = []
        pending.append(block[cut:])
        if sum(map(len, pending)) > LONGEST_LINE:
            raise TraceFormatError(
                f"expected lines of at most {LONGEST_LINE:,} bytes, found a longer one. Check that the file is a trace",
                file=file,
                line=line,
            )
        size = CHUNK
    if rest := b"".join(pending):
        yield _checked(line, rest + b"\n", file)


def _read(stream: Stream, size: int, file: str) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceFormatError(
            f"the packed file cannot be unpacked to its end: {error}. Pack or copy it again", file=file
        ) from None
    except OSError as error:
        raise InvalidInput(f"read_trace: {file!r} cannot be read: {error}") from None


def _checked(line: int, data: bytes, file: str) -> Chunk:
    hint = "Unpack the file, or save it as UTF-8"
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise TraceFormatError(
                f"expected UTF-8 text, found byte 0x{data[error.start]:02x}. {hint}",
                file=file,
                line=line + data.count(b"\n", 0, error.start),
            ) from None
    if (nul := data.find(b"\0")) >= 0:
        raise TraceFormatError(
            f"expected UTF-8 text, found a NUL byte. {hint}", file=file, line=line + data.count(b"\n", 0, nul)
        )
    return Chunk(line, data)


def _head(chunks: Iterator[Chunk]) -> Chunk:
    """The first chunks as one, as far as it takes to have two lines that are not blank; those before are left out."""
    head = Chunk(1, b"")
    for each in chunks:
        head = Chunk(head.line, head.data + each.data) if any(head.lines()) else each
        if sum(1 for _ in islice(head.lines(), 2)) == 2:
            break
    return head


def _from_first_line(chunk: Chunk) -> tuple[int, str]:
    """Number of the first line that is not blank, and the text from there on; 0 where there is none."""
    for number, _ in chunk.lines():
        return number, chunk.data.decode().split("\n", number - chunk.line)[-1]
    return 0, ""
