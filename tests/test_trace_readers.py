import json
import math
import re
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
from recorded import DATA, recorded

from fluidopt.errors import InvalidInput, TraceFormatError
from fluidopt.traces import JsonLayout, Trace, json_format, read_trace, readers, servegen

AZURE = DATA / "azure" / "AzureLLMInferenceTrace_conv.csv"
MOONCAKE = DATA / "mooncake" / "conversation_trace.jsonl"
SERVED = DATA / "vllm-rtxpro6000" / "requests.jsonl"
CLIENTS = [DATA / "servegen" / f"chunk-{client}-trace.csv" for client in (12, 14, 17)]

PLAIN = "arrival_time,prompt_tokens,output_tokens"
BURST = [
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
    "5,ChatGPT,472,18,490,Conversation log",
    "45,GPT-4,1087,230,1317,API log",
    "118,GPT-4,417,276,693,Conversation log",
]
BENCHMARK = {
    "backend": "vllm",
    "request_rate": 4.0,
    "input_lens": [100, 200, 300],
    "output_lens": [3, 1, 2],
    "ttfts": [0.5, 0.25, 1.0],
    "itls": [[0.125, 0.125], [], [0.5]],
    "start_times": [1000.0, 1001.0, 1000.5],
    "errors": ["", "", ""],
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="trace"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else "\n".join(content).encode())
        return path

    return write


def json_lines(*records):
    return [json.dumps(record) for record in records]


# Published files.


@recorded
def test_mooncake_against_pandas():
    trace, frame = read_trace(MOONCAKE), pd.read_json(MOONCAKE, lines=True)
    assert len(trace) == 12_031
    assert np.array_equal(trace.arrival_time, np.sort(frame["timestamp"]) / 1000)
    assert trace.prompt_tokens.sum() == frame["input_length"].sum()
    assert np.array_equal(trace.output_tokens, frame["output_length"])
    assert trace.start is None


@recorded
def test_requests_served_by_vllm():
    trace = read_trace(SERVED)
    records = [json.loads(line) for line in SERVED.read_text().splitlines()]
    assert len(trace) == len(records) == 300
    assert trace.output_tokens.sum() == sum(each["output_toks"] for each in records)
    # Differences on the engine's clock do not depend on how the clocks are put together.
    generating = [each["last_token_ts"] - each["first_token_ts"] for each in records]
    np.testing.assert_allclose(trace.finish_time - trace.first_token_time, generating, atol=1e-6)
    wait = trace.first_token_time - trace.arrival_time
    since_queued = np.array([each["first_token_ts"] - each["queued_ts"] for each in records])
    assert (wait - since_queued).min() == pytest.approx(0, abs=1e-6)
    # A request waits for the iteration under way before it is queued: at most about 0.1 s here.
    assert (wait - since_queued).max() < 0.15


@recorded
def test_servegen_draws_what_is_described():
    client = CLIENTS[0]
    slots = pd.read_csv(client, header=None, names=["start", "rate", "cv", "family", "shape", "scale"])
    trace = read_trace(client, period=(0, 1800), seed=3)
    counts = np.histogram(trace.arrival_time + trace.offset, bins=[0, 600, 1200, 1800])[0]
    np.testing.assert_allclose(counts, 600 * slots["rate"][:3], rtol=1e-12)
    assert trace.observation_time == 1800
    gaps = np.diff(trace.arrival_time)
    assert gaps.std() / gaps.mean() == pytest.approx(slots["shape"][0] ** -0.5, rel=0.02)  # gamma: cv = shape^-1/2
    described = json.loads(client.with_name("chunk-12-dataset.json").read_text())["0"]
    for tokens, key in ((trace.prompt_tokens, "input_tokens"), (trace.output_tokens, "output_tokens")):
        shares = {
            int(length): float(share)
            for length, share in (pair.split(":") for pair in described[key].strip("{}").split(","))
        }
        mean = sum(length * share for length, share in shares.items()) / sum(shares.values())
        assert abs(tokens.mean() - mean) < 4 * tokens.std() / len(trace) ** 0.5
        assert set(tokens.tolist()) <= set(shares)


@recorded
def test_servegen_draws_depend_on_seed_client_and_slot_alone():
    one = read_trace(CLIENTS[1], period=(0, 1200))
    assert one == read_trace(CLIENTS[1], period=(0, 1200), seed=0)
    assert one != read_trace(CLIENTS[1], period=(0, 1200), seed=1)
    part = read_trace(CLIENTS[1], period=(300, 900))
    clock = one.arrival_time + one.offset
    inside = (clock >= 300) & (clock < 900)
    np.testing.assert_allclose(part.arrival_time + part.offset, clock[inside], rtol=1e-12)
    assert np.array_equal(part.prompt_tokens, one.prompt_tokens[inside])
    merged = read_trace(CLIENTS[1:], period=(0, 1200), label=["a", "b"])
    assert np.array_equal(merged.output_tokens[merged.label == "a"], one.output_tokens)
    assert merged.observation_time == 1200
    for seed in (np.random.SeedSequence(0), np.random.default_rng(0)):
        read_trace(CLIENTS[1], period=(0, 600), seed=seed)
    same = read_trace(CLIENTS[1], period=(0, 1200), seed=np.random.SeedSequence(0))
    assert same == one


@recorded
def test_servegen_has_empty_slots_and_says_how_much_it_describes():
    # Client 17 rests from 4,200 s on.
    with pytest.raises(InvalidInput, match="describes no request from 4200 to 4800 s; choose another period"):
        read_trace(CLIENTS[2], period=(4200, 4800))
    with pytest.raises(InvalidInput, match=r"describes 75,586,8\d\d requests .* more than 20,000,000; choose"):
        read_trace(CLIENTS[0])


# One small file per format.


def test_burstgpt(write):
    trace = read_trace(write(BURST))
    assert trace.arrival_time.tolist() == [0, 40, 113]
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([472, 1087, 417], [18, 230, 276])
    assert trace.label.tolist() == ["ChatGPT", "GPT-4", "GPT-4"]
    by_log = read_trace(write(BURST), columns={"label": "Log Type"})
    assert by_log.labels == ("API log", "Conversation log")
    failed = write([*BURST, "119,ChatGPT,20,0,20,API log"])
    with pytest.raises(TraceFormatError, match=r"line 5: expected a whole number from 1 .*Response tokens, found '0'"):
        read_trace(failed)
    assert read_trace(failed, on_bad_line="skip").skipped_lines == 1


def test_vllm_benchmark(write):
    for text in (json.dumps(BENCHMARK), json.dumps(BENCHMARK, indent=1)):
        trace = read_trace(write(text.encode()))
        assert trace.arrival_time.tolist() == [0, 0.5, 1]
        assert trace.prompt_tokens.tolist() == [100, 300, 200]
        assert trace.first_token_time.tolist() == [0.5, 1.5, 1.25]
        assert trace.finish_time.tolist() == [0.75, 2, 1.25]
    lengths_only = {key: BENCHMARK[key] for key in ("input_lens", "output_lens", "start_times")}
    assert read_trace(write(json_lines(lengths_only))).first_token_time is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_times": None}, r"no start_times, .*\(request_rate is 4.0\). Run the benchmark again with a version"),
        ({"input_lens": None}, "no input_lens: it holds totals only. Run the benchmark with .*--save-detailed"),
        ({"output_lens": 7}, "expected a list in output_lens, found 7"),
        ({"output_lens": [1, 2]}, "the lists differ in length: expected as many entries .* input_lens, 3"),
        ({"errors": ["", "timed out", ""]}, "request 1: it failed: 'timed out'"),
        ({"output_lens": [3, 1, 0]}, "request 2: expected a whole number .* in column output_lens, found 0"),
        ({"ttfts": [0.5, -1, 1]}, "request 1: expected seconds of at least 0 in ttfts, found -1"),
        ({"itls": [[], [], 3]}, "request 2: expected a list of seconds in itls, found 3"),
        ({"itls": [[math.nan], [], []]}, "request 0: expected a finite number of seconds in column itls, found nan"),
        (
            {"start_times": [0, 1, "x"]},
            "request 2: expected a finite number of seconds in column start_times, found 'x'",
        ),
    ],
)
def test_broken_benchmark_is_named(write, changes, message):
    result = {"request_throughput": 1.0, **BENCHMARK, **changes}
    path = write(json_lines({key: value for key, value in result.items() if value is not None}))
    with pytest.raises(TraceFormatError, match=f"line 1: .*{message}"):
        read_trace(path)


def test_benchmark_with_failures_and_several_results(write):
    result = {**BENCHMARK, "errors": ["", "timed out", ""]}
    trace = read_trace(write(json_lines(result)), on_bad_line="skip")
    assert (len(trace), trace.skipped_lines) == (2, 1)
    assert "request 1: it failed" in trace.skipped_reasons[0]
    with pytest.raises(TraceFormatError, match=r"expected a JSON object, .*A file to which several results"):
        read_trace(write(json_lines(BENCHMARK, BENCHMARK)))


def test_json_lines_with_all_columns(write):
    records = json_lines(
        {"label": "a", "arrival_time": 5, "prompt_tokens": 3, "output_tokens": 2.0, "first_token_time": 6, "x": {}},
        {"label": "b", "arrival_time": 4, "prompt_tokens": 1, "output_tokens": 1, "first_token_time": None},
    )
    trace = read_trace(write([records[0], "", records[1].replace("null", "NaN")]))
    assert trace.arrival_time.tolist() == [0, 1]
    assert trace.label.tolist() == ["b", "a"]
    np.testing.assert_array_equal(trace.first_token_time, [math.nan, 2])
    assert trace.finish_time is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object, found '{'"),
        ("[1]", r"expected a JSON object, found '\[1\]'"),
        ('{"arrival_time": 1}', "expected the key 'prompt_tokens', found arrival_time"),
        ("{}", "expected the key 'arrival_time', found no key"),
        ('{"arrival_time": "1", "prompt_tokens": 1, "output_tokens": 1}', "finite number of seconds .*found '1'"),
        ('{"arrival_time": 1e999, "prompt_tokens": 1, "output_tokens": 1}', "finite number of seconds .*found inf"),
        (f'{{"arrival_time": 1{"0" * 400}, "prompt_tokens": 1, "output_tokens": 1}}', "finite number of seconds"),
        ('{"arrival_time": 1, "prompt_tokens": true, "output_tokens": 1}', "prompt_tokens, found True"),
        ('{"arrival_time": 1, "prompt_tokens": 1.5, "output_tokens": 1}', "prompt_tokens, found 1.5"),
        ('{"arrival_time": 1, "prompt_tokens": 1, "output_tokens": 0}', "output_tokens, found 0"),
        ("[" * 100_000, "expected a JSON object"),
    ],
)
def test_broken_json_line_is_named(write, line, message):
    good = json_lines({"arrival_time": 0, "prompt_tokens": 1, "output_tokens": 1})
    path = write([*good, "", line])
    with pytest.raises(TraceFormatError, match=f"line 3: .*{message}") as caught:
        read_trace(path)
    assert (caught.value.file, caught.value.line) == (str(path), 3)
    assert read_trace(path, on_bad_line="skip").skipped_lines == 1


def test_times_of_the_engine_are_moved_to_the_clock_of_the_arrivals(write):
    request = {"input_toks": 9, "output_toks": 2}
    path = write(
        json_lines(
            {**request, "arrival_time": 1000.0, "queued_ts": 50.5, "first_token_ts": 51, "last_token_ts": 52},
            {**request, "arrival_time": 1002.0, "queued_ts": 52.25, "first_token_ts": 54, "last_token_ts": 55},
        )
    )
    trace = read_trace(path)
    # Least queued - arrival: 52.25 - 1002.
    assert trace.first_token_time.tolist() == [0.75, 3.75]
    assert trace.finish_time.tolist() == [1.75, 4.75]
    path = write([path.read_text().replace('"queued_ts": 52.25', '"queued_ts": 54.5')])
    with pytest.raises(TraceFormatError, match="line 2: expected a time in column first_token_ts no earlier"):
        read_trace(path)


SERVEGEN_SLOTS = ["0,0.5,1,Gamma,1,2", "10,0,0,,0,0", "20,1.5,1.2,Weibull,0.8,0.6", "30,1,1,Exponential,1,1"]


def client(folder, slots=SERVEGEN_SLOTS, dataset=None):
    """Write a small client of ServeGen."""
    if dataset is None:
        dataset = {"0": {"input_tokens": "{5: 0.5, 7: 0.5}", "output_tokens": "{2: 1}"}}
    (folder / "small-trace.csv").write_text("\n".join(slots))
    (folder / "small-dataset.json").write_text(dataset if isinstance(dataset, str) else json.dumps(dataset))
    return folder / "small-trace.csv"


def test_small_servegen_client(tmp_path):
    trace = read_trace(client(tmp_path))
    clock = trace.arrival_time + trace.offset
    assert np.histogram(clock, bins=[0, 10, 20, 30, 40])[0].tolist() == [5, 0, 15, 10]
    assert set(trace.prompt_tokens.tolist()) == {5, 7}
    assert trace.observation_time == 40
    failing = {"0": {"input_tokens": "{5: 1}", "output_tokens": "{0: 0.5, 2: 0.5}"}}
    assert 5 <= len(read_trace(client(tmp_path, dataset=failing))) <= 25
    assert len(read_trace(client(tmp_path, SERVEGEN_SLOTS[:1]))) == 300  # a slot alone is taken for one of 600 s


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("40,1,1,Gamma,1", "expected 6 fields"),
        ("40,x,1,Gamma,1,1", "expected finite numbers in all fields but the fourth"),
        ("40,1,1,Cauchy,1,1", "expected one of the families Gamma, Weibull, Exponential, found 'Cauchy'"),
        ("40,-1,1,Gamma,1,1", "expected a rate from 0 to 1e6 requests/s, found -1"),
        ("40,1,1,Gamma,0,1", "expected a shape from 0.01 to 1e6, found 0"),
        ("30,1,1,Gamma,1,1", "expected a start after 30 s, found 30"),
    ],
)
def test_broken_servegen_slot_is_named(tmp_path, line, message):
    path = client(tmp_path, [*SERVEGEN_SLOTS, line])
    with pytest.raises(TraceFormatError, match=f"small-trace.csv, line 5: {message}"):
        read_trace(path)
    assert read_trace(path, on_bad_line="skip").skipped_lines == 1


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("[", "expected JSON"),
        ({}, "expected an object with an entry per slot, found {}"),
        ({"now": {}}, "expected starts of slots in s as keys, found 'now'"),
        ({"20": {"input_tokens": "{5: 1}"}}, "expected a slot that holds 0 s, found the first one at 20 s"),
        (
            {"0": {"input_tokens": "{5: 1}"}},
            "expected shares by token count, .* in output_tokens of slot 0, found None",
        ),
        ({"0": {"input_tokens": "{-1: 1}"}}, "in input_tokens of slot 0, found -1: 1"),
        ({"0": {"input_tokens": "{5: -1}"}}, "in input_tokens of slot 0, found 5: -1"),
        ({"0": {"input_tokens": "{5: 0}"}}, "in input_tokens of slot 0, found none above 0"),
        ({"0": {"input_tokens": "__import__('os')"}}, "in input_tokens of slot 0, found .__import__"),
    ],
)
def test_broken_servegen_lengths_are_named(tmp_path, dataset, message):
    with pytest.raises(TraceFormatError, match=f"small-dataset.json: .*{message}"):
        read_trace(client(tmp_path, dataset=dataset))


def test_servegen_needs_both_files_and_a_period_inside(tmp_path):
    path = client(tmp_path)
    for period in ((-5, 10), (0, 41), (50, 60)):
        with pytest.raises(InvalidInput, match=r"period must be two times in order from 0 to 40 s, which .* describes"):
            read_trace(path, period=period)
    with pytest.raises(TraceFormatError, match=r"is read from a file named \*-trace.csv"):
        read_trace(path.rename(tmp_path / "other.csv"))
    (tmp_path / "other.csv").rename(tmp_path / "lone-trace.csv")
    with pytest.raises(InvalidInput, match=r"there is no file '.*lone-dataset.json', which a ServeGen client"):
        read_trace(tmp_path / "lone-trace.csv")


def test_a_servegen_period_is_drawn_only_where_it_can_be_held(tmp_path, monkeypatch):
    monkeypatch.setattr(servegen, "MOST_DRAWN", 20)
    path = client(tmp_path)
    assert len(read_trace(path, period=(0, 20))) == 5
    with pytest.raises(InvalidInput, match=r"describes 30 requests from 0 to 40 s, more than 20; .* as period="):
        read_trace(path)


# What the caller may say.


def test_columns_by_the_names_the_file_has(write):
    path = write(["ts,model,in,out", "1000,a,5,6", "2500,b,7,8"])
    names = {"arrival_time": "ts", "prompt_tokens": "in", "output_tokens": "out"}
    trace = read_trace(path, columns=names, time_unit="ms")
    assert trace.arrival_time.tolist() == [0, 1.5]
    assert trace.label is None
    assert read_trace(path, columns={**names, "label": "model"}).label.tolist() == ["a", "b"]
    assert read_trace(path, columns=names).arrival_time.tolist() == [0, 1500]
    records = json_lines(
        {"ts": "2024-01-01T00:00:01Z", "in": 5, "out": 6}, {"ts": "2024-01-01T00:00:03.5Z", "in": 5, "out": 6}
    )
    dated = read_trace(write(records, "dated"), columns=names)
    assert dated.start == datetime(2024, 1, 1, 0, 0, 1, tzinfo=UTC)
    assert dated.arrival_time.tolist() == [0, 2.5]
    with pytest.raises(TraceFormatError, match=r"column 'inn' is missing: .* say which one it is with columns="):
        read_trace(path, columns={**names, "prompt_tokens": "inn"})
    message = "column 'modle' is missing: columns={'label': 'modle'} says that the file has it. Its first line is 'ts,"
    with pytest.raises(TraceFormatError, match=re.escape(message)):
        read_trace(path, columns={**names, "label": "modle"})


def test_plain_csv_may_have_timestamps_and_measured_times(write):
    header = PLAIN + ",first_token_time,finish_time"
    lines_of_file = [header, "2024-01-01 00:00:01,1,2,2024-01-01 00:00:01.5,", "2024-01-01 00:00:04,1,2,,NaN"]
    trace = read_trace(write(lines_of_file))
    np.testing.assert_array_equal(trace.first_token_time, [0.5, math.nan])
    assert np.isnan(trace.finish_time).all()
    assert trace.start == datetime(2024, 1, 1, 0, 0, 1)
    early = write([header, "1,1,2,0.5,3"])
    with pytest.raises(TraceFormatError, match="line 2: expected a time in column first_token_time no earlier than in"):
        read_trace(early)
    with pytest.raises(TraceFormatError, match="line 2: expected a time in column finish_time no earlier"):
        read_trace(write([header, "1,1,2,,0.5"]))


def test_round_trip_of_measured_times(tmp_path):
    rng = np.random.default_rng(1)
    arrival = np.append(0.0, np.cumsum(rng.exponential(1, 99)))
    first = arrival + np.where(rng.random(100) < 0.1, math.nan, rng.exponential(1, 100))
    trace = Trace(arrival, np.full(100, 5), np.full(100, 6), first_token_time=first, finish_time=first + 1)
    trace.to_csv(tmp_path / "again.csv")
    assert read_trace(tmp_path / "again.csv") == replace(trace, sources=("again.csv",))


def test_reasons_of_skipped_lines_are_kept(write):
    path = write([PLAIN, *(f"{n},x,1" for n in range(20)), "20,1,1"])
    trace = read_trace(path, on_bad_line="skip")
    assert (len(trace), trace.skipped_lines, len(trace.skipped_reasons)) == (1, 20, 5)
    assert trace.skipped_reasons[0] == (
        f"{path}, line 2: expected a whole number from 1 to 1,000,000,000 in column prompt_tokens, found 'x'"
    )
    other = write([PLAIN, "0,1,1", "0,y,1"], "other")
    assert len(read_trace([path, other], on_bad_line="skip").skipped_reasons) == 6


def test_arguments(write):
    path = write([PLAIN, "1,2,3"])
    benchmark = write(json_lines(BENCHMARK), "benchmark")
    for arguments, message in [
        ({"columns": {"ttft": "x"}}, "columns has the name 'ttft'; its names are arrival_time, prompt_tokens, output_"),
        ({"columns": {"label": 3}}, r"columns\['label'\] must be the name of a column; got 3"),
        ({"columns": "ts"}, "columns must map names to columns of the file; got 'ts'"),
        ({"time_unit": "h"}, "time_unit must be one of s, ms, us, ns; got 'h'"),
        (
            {"period": (0, 1)},
            r"has them recorded \(csv\); leave it out, and take a part .* Trace.window",
        ),
        (
            {"period": (1, 0)},
            r"period must be two finite numbers of seconds in order, such as .*; got \(1, 0\)",
        ),
        ({"period": 5}, "period must be two finite numbers"),
        ({"path": benchmark, "time_unit": "ms"}, "columns and time_unit go with files that have columns"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            read_trace(**{"path": path, **arguments})


def test_a_new_json_format_takes_a_few_lines(write, monkeypatch):
    monkeypatch.setattr(readers, "_FORMATS", dict(readers._FORMATS))
    readers.register_trace_format(json_format("proxy", "a proxy's log", JsonLayout("at", "in", "out", label="user")))
    path = write(json_lines({"at": 1, "in": 2, "out": 3, "user": 77}))
    assert read_trace(path, observation_time=1).label.tolist() == ["77"]
