import gzip
import io
import json
import sys
import time
import tracemalloc
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import recorded
from test_trace_readers import AZURE, BENCHMARK, PLAIN, client, json_lines

from fluidopt.errors import InvalidInput, TraceFormatError
from fluidopt.traces import lines, read_trace, table


@pytest.fixture
def write(tmp_path):
    def write(content, name="trace"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else "\n".join(content).encode())
        return path

    return write


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "chunk-trace.csv"


# Pieces, packing, pipes.


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_pieces_of_any_size_give_the_same(write, monkeypatch, size, end):
    header = "label," + PLAIN
    rows = [header, "a,1.5,2,3", "", "é,2,3,4", "  ", "long label,0.5,9,9", '"b",3,1,1', "c,4,5,6"]
    path = write((end.join(rows) + end + "d,x,1,1" + end + "e,5,1,1").encode())
    whole = read_trace(path, on_bad_line="skip")
    records = write(end.join(json_lines(*({**BENCHMARK}, {**BENCHMARK})[:1])).encode(), "records")
    result = read_trace(records)
    monkeypatch.setattr(lines, "CHUNK", size)
    monkeypatch.setattr(lines, "_HEAD", size)
    assert read_trace(path, on_bad_line="skip") == whole
    assert whole.label.tolist() == ["long label", "a", "é", "b", "c", "e"]
    assert read_trace(records) == result
    with pytest.raises(TraceFormatError) as caught:
        read_trace(path)
    assert caught.value.line == 9
    path.write_bytes(path.read_bytes() + b"\n\xff")
    with pytest.raises(TraceFormatError, match="found byte 0xff"):
        read_trace(path, on_bad_line="skip")


def test_a_long_blank_start(write):
    assert len(read_trace(write(b"\n" * 100_000 + PLAIN.encode() + b"\n1,2,3"))) == 1
    with pytest.raises(TraceFormatError, match="line 100002"):
        read_trace(write(b"\n" * 100_000 + PLAIN.encode() + b"\n1,2,x"))


def test_packed_files(write, monkeypatch):
    text = "\n".join([PLAIN, *(f"{n},5,6" for n in range(5000))]).encode()
    packed = gzip.compress(text)
    plain = read_trace(write(text))
    assert read_trace(write(packed)) == plain
    assert read_trace(write(packed, "trace.csv.gz")).sources == ("trace.csv.gz",)
    with pytest.raises(TraceFormatError, match=r"the packed file cannot be unpacked to its end: .*copy it again"):
        read_trace(write(packed[:-200]))
    with pytest.raises(TraceFormatError, match="cannot be unpacked to its end"):
        read_trace(write(packed[:50] + b"xxxx" + packed[54:]))
    for content in (text, packed):
        stream = io.TextIOWrapper(io.BufferedReader(io.BytesIO(content)))
        monkeypatch.setattr(sys, "stdin", stream)
        piped = read_trace("-")
        assert piped == replace(plain, sources=("standard input",))


def exactly(path, monkeypatch, **arguments):
    """Read a file line by line: nothing passes for plain."""

    def doubt(self, name, rows, at):
        values, plain = TABLE_PLAIN(self, name, rows, at)
        return values, np.zeros_like(plain)

    with monkeypatch.context() as patch:
        patch.setattr(table._Table, "_plain", doubt)
        return read_trace(path, **arguments)


TABLE_PLAIN = table._Table._plain


@recorded
def test_both_ways_read_a_published_file_alike(monkeypatch, tmp_path):
    part = tmp_path / "part.csv"
    part.write_bytes(b"".join(AZURE.read_bytes().splitlines(keepends=True)[:3000]))
    assert exactly(part, monkeypatch) == read_trace(part)


STAMPS = st.builds(
    lambda time, digits, zone: time.isoformat(sep=" ")[: 19 + (digits + 1 if digits else 0)] + zone,
    st.datetimes(datetime(1969, 1, 1), datetime(2263, 1, 1)).map(lambda time: time.replace(microsecond=123456)),
    st.integers(0, 6),
    st.sampled_from(["", "", "", "Z", "+00:00", "+0000", "+01:00", "x"]),
)
NUMBERS = st.one_of(
    st.floats(allow_nan=True).map(repr),
    st.decimals(-(10**6), 10**13, places=3, allow_nan=False).map(str),
    st.integers(-5, 10**12).map(str),
    st.sampled_from(["", ".", "-", "-.5", "5.", "1.2.3", "1-2", " 5", "5 ", "nan", "0", "00", "007", "1e3", "9" * 30]),
)
TOKENS = st.one_of(
    st.integers(-1, 10**10).map(str), NUMBERS, st.sampled_from(["1000000000", "1000000001", "+3", "8.0"])
)
LABELS = st.one_of(st.sampled_from(["", "a", " a", "a ", "é", '"q"', "\x1c", "x" * 70]), st.text("ab,\t", max_size=3))


@settings(max_examples=400, deadline=None)
@given(
    dated=st.booleans(),
    rows=st.lists(st.tuples(NUMBERS, STAMPS, TOKENS, TOKENS, LABELS, NUMBERS, STAMPS), min_size=1, max_size=12),
)
def test_both_ways_accept_the_same(scratch, dated, rows):
    header = "label," + PLAIN + ",first_token_time"
    # The first row is one that can be read, as it tells what the times are.
    text = [header, "a,2000-01-01 00:00:00,1,1," if dated else "a,0,1,1,"]
    for number, stamp, prompt, output, label, later, later_stamp in rows:
        times = (stamp, later_stamp) if dated else (number, later)
        text.append(",".join([label, times[0], prompt, output, times[1]]))
    scratch.write_text("\n".join(text))
    with pytest.MonkeyPatch.context() as monkeypatch:
        slow = exactly(scratch, monkeypatch, on_bad_line="skip", format="csv")
    assert read_trace(scratch, on_bad_line="skip", format="csv") == slow


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.datetimes(datetime(1970, 1, 1), datetime(2261, 12, 31)), st.integers(0, 9)), max_size=30))
def test_timestamps_against_datetime(scratch, times):
    first = datetime(1970, 1, 1)
    stamps = [first.isoformat(), *(time.isoformat() + ("" if time.microsecond else ".0") for time, _ in times)]
    scratch.write_text("\n".join([PLAIN, *(f"{stamp},1,1" for stamp in stamps)]))
    expected = sorted((time - first) / timedelta(seconds=1) for time in [first, *(time for time, _ in times)])
    np.testing.assert_allclose(read_trace(scratch).arrival_time, expected, rtol=0, atol=2e-6)


def plain_rows(count):
    rng = np.random.default_rng(2)
    times, tokens = np.cumsum(rng.exponential(0.01, count)), rng.integers(1, 5000, (count, 2))
    return [PLAIN, *(f"{a!r},{p},{o}" for a, (p, o) in zip(times.tolist(), tokens.tolist(), strict=True))]


def test_memory_is_that_of_the_arrays_and_a_piece(write, monkeypatch):
    path = write(plain_rows(200_000))
    arrays = 200_000 * 3 * 8
    monkeypatch.setattr(lines, "CHUNK", 1 << 16)
    tracemalloc.start()
    try:
        trace = read_trace(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(trace) == 200_000
    # The columns, one of times more while it is put at 0, and some 60 bytes per byte of a piece.
    assert peak < 1.5 * arrays + 60 * (1 << 16)
    assert path.stat().st_size > arrays


def test_the_plain_way_is_the_faster_one(write, monkeypatch):
    path = write(plain_rows(60_000))
    read_trace(path)
    begin = time.perf_counter()
    fast = read_trace(path)
    between = time.perf_counter()
    slow = exactly(path, monkeypatch)
    end = time.perf_counter()
    assert fast == slow
    assert end - between > 2 * (between - begin)


# Nothing but documented errors, whatever a file holds.

JSON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5), st.integers(1, 9)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
JSON_KEYS = {
    "mooncake": ("timestamp", "input_length", "output_length"),
    "vllm-requests": ("arrival_time", "input_toks", "output_toks", "queued_ts", "first_token_ts", "last_token_ts"),
    "jsonl": ("arrival_time", "prompt_tokens", "output_tokens", "label", "first_token_time", "finish_time"),
    "vllm-benchmark": ("input_lens", "output_lens", "start_times", "ttfts", "itls", "errors", "request_rate"),
}


def outcome(path, **arguments):
    """What a reader makes of a file, at once and with broken lines left out: a trace, or a documented error."""
    found = []
    for on_bad_line in ("error", "skip"):
        try:
            found.append(read_trace(path, on_bad_line=on_bad_line, **arguments))
        except (TraceFormatError, InvalidInput):
            found.append(None)
    whole, kept = found
    if whole is not None:
        assert kept == whole
    return kept


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(JSON_KEYS)), tail=st.text(max_size=4))
def test_broken_json_gives_only_documented_errors(scratch, data, name, tail):
    keys = JSON_KEYS[name]
    good = st.one_of(st.integers(1, 9), JSON_VALUES)
    entry = st.lists(good, min_size=2, max_size=2) if name == "vllm-benchmark" else good
    records = data.draw(
        st.lists(st.dictionaries(st.sampled_from(keys), st.one_of(entry, good)), min_size=1, max_size=4)
    )
    scratch.write_text("\n".join(json.dumps(record) for record in records) + tail, encoding="utf-8")
    outcome(scratch, format=name)


SERVEGEN_PIECES = st.sampled_from(
    [
        "0",
        "1",
        "0.5",
        "600",
        "1e3",
        "-1",
        "nan",
        "",
        "Gamma",
        "Weibull",
        "Exponential",
        "x",
        ",",
        ",",
        ",",
        "\n",
        "1e300",
    ]
)


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(SERVEGEN_PIECES, max_size=20),
    rows=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["0.5", "1", "0.01"])), max_size=4),
    lengths=st.one_of(st.just("{5: 1}"), st.text("{}:,1590. []\"'ex-", max_size=12)),
)
def test_broken_servegen_gives_only_documented_errors(tmp_path_factory, pieces, rows, lengths):
    folder = tmp_path_factory.getbasetemp()
    slots = [f"{10 * start},{rate},1,Gamma,{rate},1" for start, rate in rows]
    path = client(folder, [*slots, "".join(pieces)], {"0": {"input_tokens": lengths, "output_tokens": "{1: 1}"}})
    outcome(path, format="servegen", period=(0, 10))
