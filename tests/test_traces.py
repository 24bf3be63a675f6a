import json
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import DATA, recorded

from fluidopt import data
from fluidopt.errors import FluidoptError, InvalidInput, TraceFormatError
from fluidopt.traces import Trace, classify, csv_format, read_trace, readers, trace_formats
from fluidopt.traces.readers import CsvLayout
from fluidopt.traces.trace import file_labels, unique

AZURE = DATA / "azure"
CODE = AZURE / "AzureLLMInferenceTrace_code.csv"
CONVERSATION = AZURE / "AzureLLMInferenceTrace_conv.csv"

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
AZURE_LINES = [
    AZURE_HEADER,
    "2023-11-16 18:17:03.9799600,4808,10",
    "2023-11-16 18:17:04.0319600,3180,8",
    "2023-11-16 18:17:06.2300000,110,27",
]


@pytest.fixture(scope="module")
def azure():
    return read_trace([CODE, CONVERSATION])


@pytest.fixture
def write(tmp_path):
    def write(text, name="trace.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else "\n".join(text).encode())
        return path

    return write


def some_trace(count=400, seed=1, **changes):
    rng = np.random.default_rng(seed)
    columns = {
        "arrival_time": np.cumsum(rng.exponential(0.5, count)),
        "prompt_tokens": np.ceil(rng.lognormal(6, 1, count)).astype(int),
        "output_tokens": 1 + np.ceil(rng.lognormal(4, 1, count)).astype(int),
    }
    return Trace(**{**columns, **changes})


# The published traces.


@recorded
def test_azure_counts_times_and_labels(azure):
    code, conversation = read_trace(CODE), read_trace(CONVERSATION)
    assert (len(code), len(conversation), len(azure)) == (8819, 19366, 28185)
    assert azure.labels == ("code", "conv")
    assert (azure.label == "code").sum() == 8819
    assert azure.sources == (CODE.name, CONVERSATION.name)
    assert code.start == datetime(2023, 11, 16, 18, 17, 3, 979960)
    assert azure.start == conversation.start == datetime(2023, 11, 16, 18, 15, 46, 680590)
    assert code.label is None
    # The last line of a file, by hand.
    last = datetime(2023, 11, 16, 19, 14, 19, 928016)
    assert code.arrival_time[-1] == pytest.approx((last - code.start) / timedelta(seconds=1), abs=1e-9)
    assert (code.prompt_tokens[-1], code.output_tokens[-1]) == (549, 173)
    assert azure.arrival_time[-1] == pytest.approx((last - azure.start) / timedelta(seconds=1), abs=1e-9)


@recorded
def test_azure_against_pandas():
    for path in (CODE, CONVERSATION):
        frame, trace = pd.read_csv(path), read_trace(path)
        time = pd.to_datetime(frame["TIMESTAMP"]).sort_values()
        assert np.array_equal(trace.prompt_tokens, frame["ContextTokens"])
        assert np.array_equal(trace.output_tokens, frame["GeneratedTokens"])
        np.testing.assert_allclose(trace.arrival_time, (time - time[0]).dt.total_seconds(), atol=1e-6)


@recorded
def test_azure_description(azure):
    table = azure.describe()
    assert list(table.index) == ["code", "conv", "all"]
    assert table.loc["code", "interarrival_cv"] == pytest.approx(13.15, abs=0.01)
    assert table.loc["conv", "interarrival_cv"] == pytest.approx(1.094, abs=0.001)
    rates = table["request_rate"]
    assert rates["code"] + rates["conv"] == pytest.approx(rates["all"])
    assert table.loc["code", "prompt_median"] == 1469


@recorded
def test_embedded_summary_is_what_the_files_give():
    again, embedded = data.summarise_azure_2023(CODE, CONVERSATION), data.azure_2023_summary()
    assert {key: embedded[key] for key in embedded if key not in ("lengths", "label")} == {
        key: again[key] for key in again if key not in ("lengths", "label")
    }
    assert again["label"] == embedded["label"]
    # A request on the border of two classes may fall either way on another machine.
    for new, old in zip(again["lengths"]["classes"], embedded["lengths"]["classes"], strict=True):
        assert new["requests"] == pytest.approx(old["requests"], rel=1e-2)
        for field in ("arrival_rate", "prompt_tokens", "output_tokens", "prompt_cv", "output_cv"):
            assert new[field] == pytest.approx(old[field], rel=1e-2)


@recorded
def test_count_of_classes_follows_its_rule(azure):
    chosen = classify(azure)
    fewer = classify(azure, len(chosen.workload) - 1)
    assert fewer.explained < 0.8 <= chosen.explained


# The embedded summary, without the files.


@pytest.mark.parametrize("by", ["lengths", "label"])
def test_embedded_workload(by):
    workload, summary = data.azure_2023(by=by, abandonment_rate=0.1), data.azure_2023_summary()
    classes = summary[by]["classes"]
    assert sum(each["requests"] for each in classes) == summary["requests"] == 28185
    assert sum(workload.arrival_rate) * summary["duration"] == pytest.approx(28185)
    # Totals of the two files: 18,059,974 + 22,361,870 prompt and 245,896 + 4,088,665 output tokens.
    assert sum(each["requests"] * each["prompt_tokens"] for each in classes) == pytest.approx(40_421_844)
    assert sum(each["requests"] * each["output_tokens"] for each in classes) == pytest.approx(4_334_561 - 28185)
    assert set(workload.abandonment_rate) == {0.1}
    assert "CC-BY-4.0" in workload.source


def test_embedded_summary_is_small_and_private():
    assert len(json.dumps(data.azure_2023_summary())) < 5000
    data.azure_2023_summary()["lengths"]["classes"].clear()
    assert len(data.azure_2023()) == 5


def test_embedded_workload_refuses_an_unknown_grouping():
    with pytest.raises(InvalidInput, match=r"by must be 'lengths' or 'label'; got 'size'"):
        data.azure_2023(by="size")


# Reading.


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", ["", "\n\n"])
def test_line_ends_and_byte_order_mark(write, end, mark, last):
    trace = read_trace(write(mark + (end.join(AZURE_LINES) + last).encode()))
    assert trace.prompt_tokens.tolist() == [4808, 3180, 110]
    assert trace.output_tokens.tolist() == [10, 8, 27]
    np.testing.assert_allclose(trace.arrival_time, [0, 0.052, 2.25004], rtol=1e-12)
    assert trace.arrival_time.dtype == np.float64
    assert trace.prompt_tokens.dtype == np.int64


def test_requests_out_of_order_are_sorted_and_ties_keep_their_order(write):
    lines = ["arrival_time,prompt_tokens,output_tokens", "7.5,1,1", "2.5,2,1", "7.5,3,1", "0.5,4,1"]
    trace = read_trace(write(lines))
    assert trace.arrival_time.tolist() == [0, 2, 7, 7]
    assert trace.prompt_tokens.tolist() == [4, 2, 1, 3]
    assert trace.offset == 0.5


def test_plain_csv_with_labels_other_columns_quotes_and_blank_lines(write):
    lines = [
        "",
        "model,output_tokens,label, arrival_time ,prompt_tokens",
        "a, 5 ,chat,1e1, +7",
        "  ",
        'b,"6",NA,12.25,8.0',
    ]
    with pytest.raises(TraceFormatError, match="line 6: expected 5 fields"):
        read_trace(write([*lines[:5], "c,d,7,x,13,9"]))
    trace = read_trace(write([*lines[:5], '"c,d",7,"big, blue",13,9']))
    assert trace.label.tolist() == ["chat", "NA", "big, blue"]
    assert trace.arrival_time.tolist() == [0, 2.25, 3]
    assert trace.prompt_tokens.tolist() == [7, 8, 9]
    assert trace.start is None


def test_time_zones_are_turned_into_utc(write):
    lines = [
        AZURE_HEADER,
        "2024-05-10 00:00:00.009930+00:00,2162,5",
        "2024-05-10 00:00:01+00:00,10,5",
        "2024-05-10T03:00:02.5+0300,11,5",
    ]
    trace = read_trace(write(lines))
    assert trace.start == datetime(2024, 5, 10, 0, 0, 0, 9930, tzinfo=UTC)
    np.testing.assert_allclose(trace.arrival_time, [0, 0.99007, 2.49007], rtol=1e-12)


@pytest.mark.parametrize("label", [None, ["code", "conv", "code"]])
@pytest.mark.parametrize("start", [None, datetime(2024, 1, 2, 3, 4, 5, 6)])
def test_round_trip_through_plain_csv(tmp_path, label, start):
    trace = some_trace(3, label=label, start=start)
    trace.to_csv(tmp_path / "again.csv")
    again = read_trace(tmp_path / "again.csv")
    assert again == replace(trace, start=None, offset=0.0, sources=("again.csv",))
    assert again != trace


def test_round_trip_keeps_every_digit(tmp_path):
    trace = some_trace(2000)
    trace.to_csv(tmp_path / "again.csv")
    assert np.array_equal(read_trace(tmp_path / "again.csv").arrival_time, trace.arrival_time)


def test_files_on_one_clock_stay_on_it(write):
    header = "arrival_time,prompt_tokens,output_tokens"
    first = write([header, "100,1,2", "103,1,2"], "run_small.csv")
    second = write([header, "101.5,1,2"], "run_large.csv")
    trace = read_trace([first, second], observation_time=10)
    assert trace.arrival_time.tolist() == [0, 1.5, 3]
    assert trace.label.tolist() == ["small", "large", "small"]
    assert trace.offset == 100
    assert trace.request_rate == 0.3
    assert read_trace([first, second], label=["x", "y"]).labels == ("x", "y")
    assert read_trace(first, label="x", observation_time=10).labels == ("x",)
    assert read_trace(str(first), observation_time=10).label is None


def test_skipping_counts_lines_and_keeps_the_others(write):
    path = write([*AZURE_LINES, "2023-11-16 18:17:07,x,1", "", "nonsense", "2023-11-16 18:17:08.5,1,1"])
    trace = read_trace(path, on_bad_line="skip")
    assert trace.skipped_lines == 2
    assert trace.prompt_tokens.tolist() == [4808, 3180, 110, 1]
    assert "2 broken line(s) skipped" in repr(trace)
    assert read_trace([path, write(AZURE_LINES, "other.csv")], on_bad_line="skip").skipped_lines == 2


# What cannot be read, by message.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2023-11-16 18:17:07,many,5", "whole number from 1 to 1,000,000,000 in column Con.*, found 'many'"),
        ("2023-11-16 18:17:07,5", r"expected 3 fields \(TIMESTAMP, .*\), found 2: '2023-11-16 18:17:07,5'"),
        ("2023-11-16 18:17:07,5,6,7", "expected 3 fields .* found 4"),
        ("2023-11-16 18:17:07,-5,6", "column ContextTokens, found '-5'"),
        ("2023-11-16 18:17:07,0,6", "column ContextTokens, found '0'"),
        ("2023-11-16 18:17:07,5,0", "column GeneratedTokens, found '0'"),
        ("2023-11-16 18:17:07,5,NaN", "column GeneratedTokens, found 'NaN'"),
        ("2023-11-16 18:17:07,5,", "column GeneratedTokens, found ''"),
        ("2023-11-16 18:17:07,5.5,6", "column ContextTokens, found '5.5'"),
        ("2023-11-16 18:17:07,1_000,6", "column ContextTokens, found '1_000'"),
        ("2023-11-16 18:17:07,5,1000000001", "column GeneratedTokens, found '1000000001'"),
        ("2023-11-16 18:17:07,5,99999999999999999999999", "column GeneratedTokens, found '9+'"),
        ("yesterday,5,6", "timestamp such as 2023-11-16 18:17:03.* in column TIMESTAMP, found 'yesterday'"),
        ("now,5,6", "expected a timestamp .*found 'now'"),
        (",5,6", "expected a timestamp .*found ''"),
        ("2023-11-31 18:17:07,5,6", "expected a timestamp .*found '2023-11-31 18:17:07' .day is out"),
        ("0001-01-01 18:17:07,5,6", "expected a timestamp .*from 1970 to 2261.*found '0001"),
        ("9999-01-01 18:17:07,5,6", "expected a timestamp .*from 1970 to 2261.*found '9999"),
        ("2023-11-16 18:17:07Z,5,6", "expected a timestamp .*without a zone as before, found"),
        ('"2023-11-16 18:17:07,5,6', "expected 3 fields, found quotes that do not pair up"),
        (f"2023-11-16 18:17:07,5,{'x' * 200}", r"found 'x{77}\.\.\.'"),
    ],
)  # fmt: skip
def test_broken_line_is_named(write, line, message):
    path = write([*AZURE_LINES[:3], line, AZURE_LINES[3], "broken too"])
    place = re.escape(f"{path}, line 4: ")
    step = r"Repair the line, or leave such lines out with on_bad_line='skip'"
    with pytest.raises(TraceFormatError, match=f"{place}.*{message}.*{step}") as caught:
        read_trace(path)
    assert (caught.value.file, caught.value.line) == (str(path), 4)
    assert len(read_trace(path, on_bad_line="skip")) == 3


@pytest.mark.parametrize("time", ["nan", "inf", "1e400", "soon", "", "1 2", "1_0", "2e12"])
def test_broken_seconds_are_named(write, time):
    path = write(["arrival_time,prompt_tokens,output_tokens", "1,2,3", f"{time},2,3"])
    with pytest.raises(
        TraceFormatError, match=r"line 3: expected a finite number of seconds in column arrival_time, found"
    ):
        read_trace(path)


def test_empty_label_is_broken(write):
    path = write(["arrival_time,prompt_tokens,output_tokens,label", "1,2,3,a", "2,2,3, "])
    with pytest.raises(TraceFormatError, match="line 3: expected a label in column label, found nothing"):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (b"", None, "the file is empty: expected one line per request"),
        (b"\xef\xbb\xbf\r\n \r\n", None, "the file is empty"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n\r\n", 1, "there is no request after the header"),
        (
            b"\nTIMESTAMP,ContextTokens\n2023-11-16 18:17:07,5\n",
            2,
            "column 'GeneratedTokens' is missing: expected a header with TIMESTAMP, ContextTokens, "
            "GeneratedTokens, found TIMESTAMP, ContextTokens. Rename or add the column",
        ),
        (b"arrival_time,prompt_tokens,tokens\n1,2,3\n", 1, "column 'output_tokens' is missing"),
        (
            b"arrival_time,prompt_tokens,output_tokens,prompt_tokens\n1,2,3,4\n",
            1,
            "column 'prompt_tokens' occurs 2 times: expected it once",
        ),
        (
            b"when,who\n1,2\n",
            1,
            r"the format is not known: the first line is 'when,who'. Known formats: azure \(.*TIMESTAMP,"
            r"ContextTokens,GeneratedTokens\); .* csv \(.*arrival_time,prompt_tokens,output_tokens\[,label\].*\). "
            r"Say what the columns are called with columns=..., or name the format with format=...",
        ),
        (b'"when,who\n1,2\n', 1, "the format is not known"),
        (b"TIMESTAMP,Conte\n\x80\n", 2, "expected UTF-8 text, found byte 0x80. Unpack the file, or save it"),
        (b"TIMESTAMP,Conte\na\0\n", 2, "expected UTF-8 text, found a NUL byte"),
    ],
)
def test_broken_file_is_named(write, text, line, message):
    path = write(text)
    with pytest.raises(TraceFormatError, match=f"{re.escape(str(path))}.*{message}") as caught:
        read_trace(path)
    assert (caught.value.file, caught.value.line) == (str(path), line)
    with pytest.raises(TraceFormatError):
        read_trace(path, on_bad_line="skip")


def test_nothing_left_after_skipping(write):
    path = write([AZURE_HEADER, "a,b,c", "d"])
    with pytest.raises(TraceFormatError, match=r"all 2 lines that should hold a request are broken, .* at .*line 2"):
        read_trace(path, on_bad_line="skip")


def test_arguments_of_read_trace(write, tmp_path):
    path = write(AZURE_LINES)
    for arguments, message in [
        ({"path": tmp_path / "no.csv"}, r"there is no file '.*no.csv'; check the path"),
        ({"path": tmp_path}, "cannot be opened"),
        ({"path": "a\0b"}, "cannot be opened"),
        ({"path": []}, "path is an empty sequence; give at least one file"),
        ({"path": 3}, "path must be a path or a sequence of paths; got 3"),
        ({"path": [path, path]}, "is given 2 times"),
        ({"path": path, "format": "parquet"}, "format must be one of azure, .*csv, jsonl; got 'parquet'"),
        ({"path": path, "on_bad_line": "warn"}, "on_bad_line must be 'error' or 'skip'; got 'warn'"),
        ({"path": path, "label": ["a", "b"]}, r"label has 2 entries for 1 file\(s\); give one per file"),
        ({"path": path, "label": 3}, "label must be text or a sequence of texts; got 3"),
        ({"path": path, "label": ""}, "label must be non-empty text; got ''"),
        ({"path": path, "observation_time": 1}, "observation_time is 1 s, but the requests span 2.25004 s"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            read_trace(**arguments)
    with pytest.raises(TraceFormatError, match="column 'arrival_time' is missing"):
        read_trace(path, format="csv")


def test_a_new_format_takes_a_few_lines(write, monkeypatch):
    monkeypatch.setattr(readers, "_FORMATS", dict(readers._FORMATS))
    layout = CsvLayout("at", "tokens in", "tokens out", label="tenant")
    readers.register_trace_format(csv_format("gateway", "a gateway's log", layout))
    path = write(["at,tenant,tokens in,tokens out", "5,small,472,18", "45,large,1087,230"])
    assert read_trace(path).label.tolist() == ["small", "large"]
    with pytest.raises(InvalidInput, match="name 'gateway' is taken; choose another"):
        readers.register_trace_format(csv_format("gateway", "again", layout))
    assert [each.name for each in trace_formats()][-3:] == ["csv", "jsonl", "gateway"]


PIECES = st.sampled_from(
    [
        *("\n", "\n", ",", ",", ",", "\r", '"', " ", "\t", "\x1c", "\u2028", "\0", "\ufeff", "#", "'"),
        *("1", "23", "0", "-", "+", ".", "e", "_", ":", "T", "Z", "9" * 19, "٣", "é"),
        *("nan", "inf", "1e5", "NA", "true", "0x1", "18:17", "2023"),
        *("2023-11-16 18:17:07", "2023-11-16T18:17:08.1234567", "2023-11-16 18:17:07+01:00"),
        *("1.5,20,3\n", "2023-11-16 18:17:07.25,20,3\n"),
    ]
)
HEADERS = st.sampled_from(
    [
        AZURE_HEADER,
        "arrival_time,prompt_tokens,output_tokens",
        "label,arrival_time,prompt_tokens,output_tokens",
        "",
    ]
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "trace.csv"


@settings(max_examples=500, deadline=None)
@given(header=HEADERS, pieces=st.lists(PIECES, max_size=25), tail=st.binary(max_size=2))
def test_broken_text_gives_only_documented_errors(scratch, header, pieces, tail):
    scratch.write_bytes((header + "\n" + "".join(pieces)).encode() + tail)
    try:
        trace = read_trace(scratch)
    except TraceFormatError:
        trace = None
    try:
        kept = read_trace(scratch, on_bad_line="skip")
    except TraceFormatError:
        assert trace is None
        return
    assert kept == trace if kept.skipped_lines == 0 else trace is None


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.floats(-1e12, 1e12),
            st.integers(1, 10**9),
            st.integers(1, 10**9),
            st.text('ab," é', min_size=1),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_what_pandas_writes_is_read_back(scratch, rows):
    rows = [(*row[:3], row[3].strip() or "x") for row in rows]
    frame = pd.DataFrame(rows, columns=["arrival_time", "prompt_tokens", "output_tokens", "label"])
    frame.to_csv(scratch, index=False)
    trace = read_trace(scratch)
    frame = frame.sort_values("arrival_time", kind="stable")
    assert trace.offset == frame["arrival_time"].min()
    assert trace.arrival_time.tolist() == (frame["arrival_time"] - trace.offset).tolist()
    assert (
        trace.to_frame()
        .drop(columns="arrival_time")
        .astype(object)
        .equals(frame.drop(columns="arrival_time").reset_index(drop=True).astype(object))
    )


def test_csv_that_cannot_be_written(tmp_path):
    with pytest.raises(InvalidInput, match=r"Trace.to_csv: '.*' cannot be written"):
        some_trace(3).to_csv(tmp_path / "no folder" / "trace.csv")


# The trace itself.


def test_trace_is_frozen_and_independent_of_its_arguments():
    time = np.array([3.0, 4.0, 6.0])
    trace = Trace(time, [1, 2, 3], [4.0, 5.0, 6.0])
    time[0] = 99
    assert trace.arrival_time.tolist() == [0, 1, 3]
    assert trace.offset == 3
    with pytest.raises(ValueError, match="read-only"):
        trace.arrival_time[0] = 1
    with pytest.raises(AttributeError):
        trace.offset = 0.0
    assert replace(trace) == trace
    assert trace != replace(trace, label=["a", "b", "c"])
    assert trace != "trace"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrival_time": [], "prompt_tokens": [], "output_tokens": []}, "arrival_time is empty"),
        ({"arrival_time": [0, np.nan, 1]}, "arrival_time must be finite; got nan at index 1"),
        ({"arrival_time": ["a", "b", "c"]}, r"arrival_time must be an array of numbers \(seconds\)"),
        ({"arrival_time": [[0, 1, 2]]}, r"arrival_time must have one dimension; got shape \(1, 3\)"),
        ({"prompt_tokens": [1, 2]}, "prompt_tokens has 2 entries and arrival_time 3"),
        ({"prompt_tokens": [[1], [2], [3]]}, "prompt_tokens must have one dimension"),
        ({"prompt_tokens": ["a", "b", "c"]}, "prompt_tokens must be an array of token counts"),
        ({"prompt_tokens": [1, 0, 3]}, "prompt_tokens must be whole numbers from 1 .*got 0 at index 1"),
        ({"output_tokens": [1, 2.5, 3]}, "output_tokens must be whole numbers .*got 2.5 at index 1"),
        ({"output_tokens": [1, 2, np.nan]}, "output_tokens must be whole numbers .*got nan at index 2"),
        ({"label": ["a", "", "b"]}, "label must not be empty text"),
        ({"start": "2024-01-01"}, "start must be a datetime.datetime or None; got '2024-01-01'"),
        ({"label": ["a"]}, "label has 1 entries and arrival_time 3"),
        ({"observation_time": 1.0}, "observation_time is 1 s, but the requests span 2 s"),
        (
            {"observation_time": np.inf},
            "observation_time must be a finite number of seconds above 0; got inf",
        ),
        (
            {"observation_time": "long"},
            "observation_time must be a finite number of seconds above 0; got 'long'",
        ),
    ],
)
def test_trace_refuses(changes, message):
    columns = {"arrival_time": [0, 1, 2], "prompt_tokens": [1, 2, 3], "output_tokens": [1, 2, 3]}
    with pytest.raises(InvalidInput, match=f"Trace: {message}"):
        Trace(**{**columns, **changes})


def test_rate_is_one_over_the_mean_gap_unless_the_period_is_known():
    trace = Trace([10, 11, 14, 16], [5] * 4, [5] * 4)
    assert trace.duration == 8
    assert trace.request_rate == 0.5 == 1 / np.diff(trace.arrival_time).mean()
    assert replace(trace, observation_time=10).request_rate == 0.4


def test_rate_has_next_to_no_bias():
    rng = np.random.default_rng(5)
    window, rate, runs = 20.0, 3.0, 4000
    rates = []
    for _ in range(runs):
        count = rng.poisson(rate * window)
        rates.append(Trace(rng.uniform(0, window, count), np.ones(count), np.ones(count)).request_rate)
    # The documented upward bias is 1/N, N = 60; N over the span would have 2/N.
    error = np.std(rates) / np.sqrt(runs)
    assert abs(np.mean(rates) - rate * (1 + 1 / 60)) < 4 * error


@pytest.mark.parametrize("count", [1, 3])
def test_a_single_instant_has_no_rate(count):
    trace = Trace([7.0] * count, [5] * count, [5] * count)
    message = rf"{count} request\(s\) at a single instant tell no duration .*observation_time="
    for ask in (lambda: trace.duration, lambda: trace.request_rate, trace.describe, trace.classify):
        with pytest.raises(InvalidInput, match=message):
            ask()
    assert "duration unknown" in repr(trace)
    assert "duration unknown" in trace._repr_html_()
    known = replace(trace, observation_time=2.0)
    assert known.request_rate == count / 2
    assert np.isnan(known.describe().loc["all", "interarrival_cv"])


def test_prints_well():
    trace = some_trace(200, label=np.repeat(["a", "<b>"], 100), start=datetime(2024, 1, 2), sources=("x.csv",))
    assert re.fullmatch(
        r"<Trace: 200 requests, [\d.]+ requests/s over [\d.]+ s, mean prompt [\d.]+ and output [\d.]+ "
        r"tokens, labels <b>, a, from 2024-01-02 00:00:00>",
        repr(trace),
    )
    html = trace._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>," not in html
    assert list(trace.describe().index) == ["<b>", "a", "all"]
    assert "labels 0, 1, 2, 3 and 2 more" in repr(some_trace(6, label=np.arange(6)))
    found = classify(trace, 3)
    assert re.fullmatch(r"<Classification: 200 requests in 3 classes, which explain [\d.]+% of .*>", repr(found))
    assert "<table" in found._repr_html_()


def test_merge_lines_up_calendars():
    start = datetime(2024, 1, 1, 12)
    early = Trace([0, 5], [1, 1], [2, 2], start=start, sources=("trace_a.csv",), skipped_lines=1)
    late = Trace([0, 1], [3, 3], [4, 4], start=start + timedelta(seconds=2), sources=("trace_b.csv",))
    merged = Trace.merge(late, early)
    assert merged.arrival_time.tolist() == [0, 2, 3, 5]
    assert merged.prompt_tokens.tolist() == [1, 3, 3, 1]
    assert merged.label.tolist() == ["a", "b", "b", "a"]
    assert (merged.start, merged.sources, merged.skipped_lines) == (start, ("trace_b.csv", "trace_a.csv"), 1)
    assert Trace.merge(replace(late, label=["x", "y"]), early).label.tolist() == ["a", "x", "y", "a"]
    assert Trace.merge(early) == early


def test_merge_refuses_clocks_that_do_not_line_up():
    start = datetime(2024, 1, 1, 12)
    dated, undated = some_trace(3, start=start), some_trace(3)
    zoned = some_trace(3, start=start.replace(tzinfo=UTC))
    for traces, message in [
        ((), "no traces given"),
        ((dated, undated), "some traces have a start .* and some only their own clock"),
        ((dated, zoned), "some traces' start has a time zone and some have none"),
        ((replace(undated, observation_time=50), undated), "observation times differ .*50 s, unknown"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            Trace.merge(*traces)
    merged = Trace.merge(replace(undated, observation_time=50), undated, observation_time=60)
    assert merged.duration == 60
    assert merged.labels == ("trace", "trace (2)")


def test_labels_from_file_names():
    assert file_labels(["d/AzureTrace_code.csv", "AzureTrace_conv.csv"]) == ["code", "conv"]
    assert file_labels(["code-hour.csv", "chat-hour.csv"]) == ["code", "chat"]
    assert file_labels(["a/x.csv", "b/x.csv", "x (2).csv"]) == ["x", "x (2)", "x (2) (2)"]
    assert file_labels(["run.csv", "run_2.csv"]) == ["run", "run_2"]
    assert file_labels(["one.csv"]) == ["one"]
    assert unique(["a", "a", "b", "a"]) == ["a", "a (2)", "b", "a (3)"]


# Classes.


tokens = st.integers(1, 5000)
lengths = st.lists(st.tuples(tokens, tokens, st.sampled_from("abc")), min_size=3, max_size=60)
ways = st.one_of(
    st.just({}),
    st.builds(lambda k: {"classes": k}, st.integers(1, 4)),
    st.just({"by": "label"}),
    st.just({"prompt_cuts": [100, 1000], "output_cuts": [50]}),
    st.just({"output_cuts": [2, 1000]}),
)


@settings(max_examples=150, deadline=None)
@given(lengths=lengths, way=ways, seed=st.integers(0, 5))
def test_classes_keep_rates_and_token_totals(lengths, way, seed):
    prompt, output, label = zip(*lengths, strict=True)
    trace = Trace(np.arange(len(lengths)) * 0.7, prompt, output, label=label)
    try:
        found = classify(trace, **way, seed=seed)
    except InvalidInput as error:
        if re.search("distinct pair|each has one output token", str(error)):
            return
        raise
    workload = found.workload
    rate, duration = workload.arrival_rate, trace.duration
    assert rate.sum() == pytest.approx(trace.request_rate, rel=1e-12)
    assert rate @ workload.prompt_tokens == pytest.approx(sum(prompt) / duration, rel=1e-12)
    assert rate @ workload.output_tokens == pytest.approx((sum(output) - len(output)) / duration, rel=1e-12)
    assert found.requests.min() >= 1
    assert found.requests.sum() == len(trace)
    assert 0 <= found.explained <= 1
    assert len(workload) == way.get("classes", len(workload))
    order = list(zip(workload.prompt_tokens, workload.output_tokens, strict=True))
    assert order == sorted(order)
    for index, each in enumerate(workload):
        members = found.assignment == index
        assert each.prompt_tokens == pytest.approx(trace.prompt_tokens[members].mean())
        assert each.output_tokens == pytest.approx(trace.output_tokens[members].mean() - 1)
        assert found.prompt_cv[index] == pytest.approx(
            trace.prompt_tokens[members].std() / each.prompt_tokens, abs=1e-9
        )
        assert found.output_cv[index] == pytest.approx(
            trace.output_tokens[members].std() / each.output_tokens, abs=1e-9
        )


def test_well_separated_classes_are_found():
    rng = np.random.default_rng(3)
    truth = rng.integers(4, size=2000)
    prompt = np.array([100, 100, 4000, 4000])[truth] * rng.lognormal(0, 0.1, 2000)
    output = np.array([20, 800, 20, 800])[truth] * rng.lognormal(0, 0.1, 2000)
    trace = Trace(np.arange(2000), prompt.round(), output.round())
    found = classify(trace, 4)
    pairs = set(zip(truth.tolist(), found.assignment.tolist(), strict=True))
    assert len(pairs) == 4
    assert found.explained > 0.98


def test_k_means_finds_the_best_partition_of_a_few_requests():
    rng = np.random.default_rng(11)
    for _ in range(10):
        trace = Trace(np.arange(9), rng.integers(1, 5000, 9), rng.integers(2, 5000, 9))
        points = np.log(np.stack([trace.prompt_tokens, trace.output_tokens], axis=1))
        total = ((points - points.mean(axis=0)) ** 2).sum()
        best = np.inf
        for code in range(1, 2**8):
            half = np.array([(code >> bit) & 1 for bit in range(9)], dtype=bool)
            within = sum(((points[part] - points[part].mean(axis=0)) ** 2).sum() for part in (half, ~half))
            best = min(best, within)
        assert classify(trace, 2).explained == pytest.approx(1 - best / total, rel=1e-9)


def test_same_seed_same_classes():
    trace = some_trace(12_000)
    first, again = classify(trace, 5, seed=3), classify(trace, 5, seed=3)
    assert np.array_equal(first.assignment, again.assignment)
    assert first.workload == again.workload == trace.classify(5, seed=np.random.default_rng(3))
    assert first.workload == trace.classify(5, seed=np.random.SeedSequence(3))
    other = classify(trace, 5, seed=4)
    assert other.explained == pytest.approx(first.explained, abs=0.02)


def test_names_and_source():
    trace = Trace([0, 1, 2, 3], [100, 100, 1250, 34_000], [2, 3, 181, 1000], sources=("x.csv",))
    workload = trace.classify(4, abandonment_rate=0.2)
    assert workload.names == (
        "prompt 100, output 2",
        "prompt 100, output 3",
        "prompt 1.2k, output 181",
        "prompt 34k, output 1.0k",
    )
    assert workload.source == "x.csv: 4 requests, classes by log lengths"
    assert set(workload.abandonment_rate) == {0.2}
    twins = Trace([0, 1], [100_001, 100_002], [50, 50]).classify(2)
    assert twins.names == ("prompt 100k, output 50", "prompt 100k, output 50 (2)")


def test_cuts_name_cells_and_say_which_are_empty():
    trace = Trace([0, 1, 2, 3], [511, 512, 2048, 9000], [10, 200, 20, 30])
    found = classify(trace, prompt_cuts=[512, 2048], output_cuts=[200])
    assert found.workload.names == (
        "prompt < 512, output < 200",
        "512 <= prompt < 2048, output >= 200",
        "prompt >= 2048, output < 200",
    )
    assert found.assignment.tolist() == [0, 1, 2, 2]
    assert found.dropped == (
        "prompt < 512, output >= 200",
        "512 <= prompt < 2048, output < 200",
        "prompt >= 2048, output >= 200",
    )
    assert "3 empty cell(s) dropped: prompt < 512, output >= 200;" in found.workload.source
    assert "empty and dropped: prompt < 512, output >= 200" in repr(found)
    assert classify(trace, output_cuts=(20,)).workload.names == ("output < 20", "output >= 20")


def test_classes_by_label():
    trace = some_trace(4, prompt_tokens=[9, 9, 1, 1], label=["long", "long", "short", "short"])
    assert trace.classify(by="label").names == ("short", "long")
    with pytest.raises(InvalidInput, match=r"by='label' needs labels and this trace has none; read the files with"):
        some_trace(4).classify(by="label")


def test_classes_in_which_nothing_decodes():
    trace = Trace(np.arange(6), [10, 11, 12, 5000, 5001, 5002], [1, 1, 1, 300, 301, 302])
    for way in ({"classes": 2}, {"output_cuts": [2]}, {"prompt_cuts": [100]}):
        with pytest.raises(InvalidInput, match=r"no request of class '.*' \(3 requests\) decodes.*fewer classes"):
            trace.classify(**way)
    assert len(trace.classify()) == 1
    with pytest.raises(InvalidInput, match="decodes"):
        Trace([0, 1], [5, 5], [1, 1]).classify()


def test_one_length_is_one_class():
    trace = Trace([0, 1, 2], [5, 5, 5], [7, 7, 7])
    found = classify(trace)
    assert (len(found.workload), found.explained) == (1, 1.0)
    with pytest.raises(InvalidInput, match=r"classes=2, but the 3 requests have only 1 distinct pair"):
        trace.classify(2)


def test_more_classes_explain_more():
    trace = some_trace(3000)
    explained = [classify(trace, count).explained for count in range(1, 9)]
    assert explained[0] == pytest.approx(0, abs=1e-12)
    assert all(b > a for a, b in pairwise(explained))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 0}, "classes must be a whole number of at least 1, or None; got 0"),
        ({"classes": 2.5}, "classes must be a whole number of at least 1, or None; got 2.5"),
        ({"classes": True}, "classes must be a whole number of at least 1, or None; got True"),
        ({"by": "size"}, "by must be 'lengths'.* or 'label'; got 'size'"),
        ({"classes": 2, "by": "label"}, "classes=2 and by='label' exclude each other"),
        ({"classes": 2, "prompt_cuts": [5]}, "classes=2 and prompt_cuts and output_cuts exclude each other"),
        ({"by": "label", "prompt_cuts": [5]}, "cuts and by='label' exclude each other"),
        (
            {"prompt_cuts": []},
            r"prompt_cuts must be increasing token counts above 0, such as \[512, 2048\]; got",
        ),
        ({"prompt_cuts": [5, 5]}, "prompt_cuts must be increasing"),
        ({"output_cuts": [-1]}, "output_cuts must be increasing"),
        ({"output_cuts": ["x"]}, "output_cuts must be increasing"),
        ({"output_cuts": [[1, 2]]}, "output_cuts must be increasing"),
        ({"seed": -1}, "seed must be a whole number of at least 0, a SeedSequence or a Generator; got -1"),
        ({"seed": None}, "seed must be .* got None"),
        ({"abandonment_rate": -1}, "abandonment_rate must be at least 0"),
    ],
)
def test_arguments_of_classify(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        some_trace(20).classify(**arguments)


def test_importing_loads_nothing_slow():
    code = (
        "import sys, fluidopt.traces, fluidopt.data; fluidopt.data.azure_2023(); "
        "print([name for name in ('pandas', 'scipy', 'matplotlib', 'sympy') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.stdout.strip() == "[]"


def test_every_error_is_a_fluidopt_error():
    assert issubclass(TraceFormatError, FluidoptError)
    assert issubclass(InvalidInput, ValueError)
