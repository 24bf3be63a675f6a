"""Inputs that once went wrong, and a short run of the fuzzer: all end well, or as documented."""

import gzip
import json
import random
import sys
from dataclasses import replace

import fuzz
import pytest
from fuzz_commands import command_case
from fuzz_inputs import Case
from fuzz_scenarios import CLASS, CURVES, EXPRESSIONS, as_toml, scenario_case
from fuzz_traces import TRACES, trace_case
from hypothesis import given, settings
from hypothesis import strategies as st

import fluidopt as fo
from fluidopt.traces import lines

BENCHMARK = {"input_lens": [1], "output_lens": [1], "start_times": [0.0]}
PLAIN = "arrival_time,prompt_tokens,output_tokens\n"
SCENARIO = {
    "classes": [CLASS],
    "gpu": {"batch_size": 16, "chunk_size": 256, "curve": CURVES[0]},
    "prices": {"prompt": 0.1, "output": 0.2},
}


@pytest.fixture(scope="module", autouse=True)
def guarded():
    """A hook cannot be taken away again; between inputs this one does nothing."""
    sys.addaudithook(fuzz.guard)


def ends(target, case):
    """What comes of a case: the kind of error, or what was done."""
    end, fault = fuzz.tried(target, case)
    assert fault is None, fault
    return end


def from_scenario(**changes):
    return Case({"scenario.toml": as_toml(SCENARIO | changes).encode()})


def from_trace(text, **options):
    return Case({"a-trace.csv": text if isinstance(text, bytes) else text.encode()}, tuple(options.items()))


def from_table(text, **options):
    return Case({"table.csv": text.encode()}, tuple(options.items()))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (from_scenario(gpu={**SCENARIO["gpu"], "curve": {**CURVES[0], "solo": 5e-324}}), "at least 1e-30"),
        (from_scenario(prices={"prompt": 1.7e308, "output": 1.0}), "at most 1e+30 in size"),
        (from_scenario(classes=[CLASS, {**CLASS, "name": "n" * 201}]), "at most 200 characters"),
        (from_scenario(classes=[0] * 50), "and 30 more"),
        (from_scenario(service_levels=[{"kind": "none"}]), "must have 'kind' among 'prefill_fairness'"),
        (from_scenario(service_levels=[3]), "must be a table of fields"),
        (from_scenario(gpus=10**400), "gpus must be at most 1000000000"),
        (Case({"s.json": b"[" * 100_000}), "not valid JSON"),
        (Case({"s.toml": b"a = " + b"[" * 5_000}), "not valid TOML"),
        (Case({"s.toml": b"classes = \xff"}), "cannot read the scenario file"),
        (Case({"s.json": json.dumps(SCENARIO).encode("utf-16")}), "cannot read the scenario file"),
    ],
)
def test_a_scenario_file_is_refused_in_a_sentence(case, message, tmp_path):
    (name,) = case.files
    (tmp_path / name).write_bytes(case.files[name])
    with pytest.raises(fo.InvalidInput) as refused:
        fo.read_scenario(tmp_path / name)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 5_000
    ends("scenario", case)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": [{"name": "own", "row": "sum(x[i, k], k) >= lambda[i]/1e-300"}]},
        {"rows": [{"name": "own", "row": "q_p[i] <= 1e200"}]},
        {"objective": "sum(1e250*q_p[i], i)"},
    ],
)
def test_numbers_that_no_solver_scales_are_refused(changes, tmp_path):
    (tmp_path / "scenario.toml").write_text(as_toml(SCENARIO | changes))
    with pytest.raises(fo.InvalidInput, match=r"keep sizes below 1e\+100"):
        fo.FluidModel.from_scenario(tmp_path / "scenario.toml")


def test_a_tangent_is_added_once():
    """With a batch this large the penalty was a difference of two huge numbers, and its tangent was added 20 times."""
    gpu = {"batch_size": 14_348_026, "chunk_size": 256, "curve": {"alpha": 0.04, "beta": 6.2e-5, "solo": 0.02}}
    level = {"kind": "slot_tpot", "at_most": 0.0, "penalty": 5000.0}
    scenario = fo.Scenario.from_dict(SCENARIO | {"gpu": gpu, "service_levels": [level]})
    plan = fo.FluidModel.from_scenario(scenario).solve()
    assert plan.shadow_prices.index.is_unique
    assert plan.certificate.holds(1e-7)


def test_sizes_far_apart_end_as_documented():
    classes = [{**CLASS, "arrival_rate": 5e-324}]
    ends("scenario", from_scenario(classes=classes, rows=[{"name": "own", "row": "q_d[i] >= max(2, mu_d[i, k])"}]))


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_no_expression_runs_or_breaks_anything(text):
    for changes in ({"rows": [{"name": "own", "row": text}]}, {"objective": text}):
        ends("scenario", from_scenario(**changes))
    ends("scenario", from_scenario(rows=[{"name": "own", "row": "q_p[i] <= 1", "where": text}]))


@pytest.mark.parametrize(
    "case",
    [
        # Seconds that span so long, or so short, that windows of them cannot be counted.
        from_trace(f"{PLAIN}0,1,5\n1,1,5\n", observation_time=1.7e308),
        from_trace(f"{PLAIN}0,1,5\n", observation_time=5e-324),
        from_trace(f"{PLAIN}0,1,5\n5e-324,1,5\n"),
        from_trace(f"{PLAIN}0,1,5\n", observation_time=10**400),
        from_trace(json.dumps({**BENCHMARK, "errors": 2})),
        from_trace(f"{PLAIN[:-1]},label\n0,1,5,{'a' * 100_000}\n"),
        from_trace(f"{PLAIN}0,1,5\n", label="a" * 100_000),
        from_trace(gzip.compress(PLAIN.encode() + b"0,1,5\n")[:-1]),
        from_trace(gzip.compress(gzip.compress(PLAIN.encode() + b"0,1,5\n"))),
        from_table("chunk,decodes,seconds\n0,1,1\n", columns="seconds"),
        from_table("chunk,decodes,seconds\n0,1,1\n", columns=3),
        from_table("chunk,decodes,seconds\n0,1,1e308\n0,8,1\n8,1,4\n2,1,2\n2,8,3\n"),
        from_table(json.dumps({"models": [{"perfParms": {"alpha": 10**400, "beta": 0, "gamma": 0}}]})),
    ],
)
def test_a_trace_or_table_ends_as_documented(case):
    ends("trace", case)


def test_a_long_text_that_is_no_number_is_refused_at_once():
    """A pattern that could match it in many ways would try them all: minutes for a line of this length."""
    digits = "1" * 200_000
    ends("trace", from_trace(f"{PLAIN}{digits}x,1,5\n"))
    ends("scenario", from_scenario(objective=digits))


def test_a_packed_file_that_grows_without_end_is_refused(tmp_path):
    path = tmp_path / "trace.csv.gz"
    rows = b"0,1,5\n" * (lines.SMALL // 6 + 1)
    path.write_bytes(gzip.compress(b"x" * lines.SMALL + rows, 1))
    with pytest.raises(fo.TraceFormatError, match="grows to more than 200 times its size"):
        fo.read_trace(path)
    fair = gzip.compress(PLAIN.encode() + b"0,1,5\n1,1,5\n" * 1000, 9)
    path.write_bytes(fair)
    assert len(fo.read_trace(path)) == 2000


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "trace.csv"
    path.write_bytes(PLAIN.encode() + b"1" * (1 << 23))
    with pytest.raises(fo.TraceFormatError, match="expected lines of at most 1,048,576 bytes"):
        fo.read_trace(path)


def test_the_guard_sees_what_it_is_there_for(tmp_path):
    """The oracle itself: code that carries the trap, and files elsewhere, are breaches."""
    code = compile("fuzz_trap = 1", "<string>", "exec")
    with fuzz.watched(tmp_path):
        fuzz.guard("open", (str(tmp_path / "x"), "w", 577))
        fuzz.guard("exec", (compile("x = 1", "<string>", "exec"),))
        for event, arguments in (
            ("exec", (code,)),
            ("exec", (compile("x = 1", "<input>", "exec"),)),
            ("open", ("/etc/passwd", "w", 577)),
            ("os.system", ("true",)),
            ("socket.connect", (None, ("localhost", 1))),
        ):
            with pytest.raises(fuzz.Breach):
                fuzz.guard(event, arguments)


RANDOM = st.integers(0, 2**32).map(random.Random)


@settings(max_examples=120)
@given(RANDOM)
def test_random_scenarios(rng):
    ends("scenario", scenario_case(rng))


@settings(max_examples=120)
@given(RANDOM)
def test_random_traces(rng):
    case = trace_case(rng)
    ends("trace", case)
    ends("trace", trace_case(rng, replace(case)))


@settings(max_examples=25)
@given(RANDOM)
def test_random_command_lines(rng):
    ends("command", command_case(rng))


@pytest.mark.parametrize("name", TRACES)
def test_what_the_fuzzer_starts_from_is_in_order(name, tmp_path):
    """Seeds that were broken themselves would never reach what lies behind the reader."""
    rng = random.Random(0)
    (tmp_path / "a-trace.csv").write_bytes(TRACES[name](rng))
    (tmp_path / "a-dataset.json").write_text('{"0": {"input_tokens": "{34: 1.0}", "output_tokens": "{7: 1.0}"}}')
    assert len(fo.read_trace(tmp_path / "a-trace.csv", format=name)) > 0
