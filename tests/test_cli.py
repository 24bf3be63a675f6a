"""The terminal as its user meets it: what is printed, what is JSON, how mistakes end."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import fluidopt as fo
from fluidopt.cli import app, example, options
from fluidopt.data import azure_2023_summary
from fluidopt.data.example import drawn_requests

SCENARIO = """
[prices]
prompt = 0.1
output = 0.2
[gpu]
batch_size = 16
chunk_size = 256
curve = { alpha = 0.0174, beta = 6.2e-5, solo = 0.022 }
[[classes]]
name = "code"
arrival_rate = 0.5
prompt_tokens = 300
output_tokens = 1000
abandonment_rate = 0.1
[[classes]]
name = "summarise"
arrival_rate = 0.5
prompt_tokens = 3000
output_tokens = 400
abandonment_rate = 0.1
"""
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:17:{at % 60:02d}.{at:07d},{200 + 37 * at % 4000},{10 + 13 * at % 700}\n" for at in range(60)
)


def run(*words: str, cwd: Path, columns: int = 80) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fluidopt", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env={"COLUMNS": str(columns), "PATH": "/usr/bin:/bin"},
    )


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO)
    return path


def test_the_demo_runs_the_whole_line_and_fits_80_columns(tmp_path):
    done = run("demo", cwd=tmp_path, columns=200)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for part in ("Classes", "Plan", "Price thresholds", "Held back by", "Policy", "Simulated check", "fluid optimum"):
        assert part in done.stdout
    assert (tmp_path / "fluidopt-demo.png").stat().st_size > 10_000


def test_an_idle_fleet_is_no_accident(tmp_path):
    done = run("demo", "--load", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fluid optimum" not in done.stdout


@pytest.mark.usefixtures("scenario")
def test_json_is_all_there_is(tmp_path):
    done = run("simulate", "scenario.toml", "--gpus", "5", "--horizon", "200", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["policy"]["gpus"] == 5
    assert data["simulation"]["comparison"][0]["quantity"] == "revenue_rate"
    plan = json.loads(run("plan", "scenario.toml", "--json", cwd=tmp_path).stdout)["plan"]
    assert plan["revenue_rate"] == pytest.approx(297.71619)
    assert plan["objective"] == plan["revenue_rate"]


@pytest.mark.usefixtures("scenario")
def test_policies_are_compared_on_the_same_arrivals(tmp_path):
    words = ("simulate", "scenario.toml", "--gpus", "20", "--horizon", "800", "--policy", "GG-SP", "--policy", "FI-WSP")
    shown = run(*words, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "Common arrivals" in shown.stdout
    data = json.loads(run(*words, "--json", cwd=tmp_path).stdout)
    assert data["baseline"] == data["policies"][0]["policy"]
    assert {row["policy"] for row in data["policies"]} == {"GG-SP", "FI-WSP"}
    refused = run(*words, "--precision", "0.01", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--precision goes with one --policy; got 2" in refused.stderr


@pytest.mark.usefixtures("scenario")
def test_it_runs_until_it_is_precise(tmp_path):
    done = run("simulate", "scenario.toml", "--gpus", "20", "--precision", "0.002", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    revenue = json.loads(done.stdout)["simulation"]["comparison"][0]
    assert revenue["half_width"] <= 0.002 * revenue["simulated"]


def test_a_trace_with_the_promises_of_a_scenario(scenario, tmp_path):
    (tmp_path / "requests.csv").write_text(TRACE)
    free = run("plan", "requests.csv", "--gpus", "1", "--abandonment-rate", "0.05", "--json", cwd=tmp_path)
    assert free.returncode == 0, free.stderr
    scenario.write_text('service_levels = [{ kind = "completion_floor", share = 0.0, penalty = 1.0 }]\n' + SCENARIO)
    bound = run(
        "plan",
        "requests.csv",
        "--gpus",
        "1",
        "--abandonment-rate",
        "0.05",
        "--with",
        "scenario.toml",
        "--json",
        cwd=tmp_path,
    )
    assert bound.returncode == 0, bound.stderr
    assert json.loads(bound.stdout)["plan"]["model"]["service_levels"]


def test_another_objective_is_said(scenario, tmp_path):
    scenario.write_text('objective = "sum(log(sum(mu_d[i, k]*y[i, k], k)), i)"\n' + SCENARIO)
    done = run("plan", "scenario.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "objective -1.45" in done.stdout
    assert "units of the objective per decode slot" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["plan", "missing.toml"], 2, "cannot read the scenario file"),
        (["plan", "missing.csv", "--gpus", "3"], 2, "there is no file 'missing.csv'"),
        (["plan", "scenario.toml", "--solver", "magic"], 2, "solver must be one of"),
        (["plan", "scenario.toml", "--classes", "3"], 2, "go with a trace"),
        (["plan", "scenario.toml", "--figure", "out"], 2, "--figure must end in .png, .svg or .pdf"),
        (["simulate", "scenario.toml"], 2, "--gpus is required"),
        (["simulate", "scenario.toml", "--gpus", "0"], 2, "gpus must be at least 1; got 0"),
        (["simulate", "scenario.toml", "--gpus", "5", "--replications", "1"], 2, "replications must be"),
        (["plan"], 2, "Missing argument"),
    ],
)
@pytest.mark.usefixtures("scenario")
def test_mistakes_end_in_one_line_and_a_code(tmp_path, words, code, message):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_what_is_infeasible_ends_in_3(scenario, tmp_path):
    scenario.write_text(SCENARIO.replace("abandonment_rate = 0.1\n", ""))
    done = run("plan", "scenario.toml", cwd=tmp_path)
    assert done.returncode == 3
    assert "must be served in full" in done.stderr


def test_rows_with_mistakes_are_found(scenario, tmp_path):
    scenario.write_text(SCENARIO + '\n[[rows]]\nname = "square"\nrow = "q_p[i]*q_p[i] <= 1"\n')
    done = run("plan", "scenario.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert "rows[0] 'square'" in done.stderr


def test_the_schema_is_json_schema(tmp_path):
    assert json.loads(run("schema", cwd=tmp_path).stdout)["title"] == "fluidopt scenario"


def test_replay_prints_latencies_by_policy_and_writes_every_request(tmp_path):
    (tmp_path / "trace.csv").write_text(TRACE)
    limits = ["--gpus", "2", "--ttft", "2", "--tpot", "0.05"]
    done = run("replay", "trace.csv", *limits, "--policy", "engine", "--policy", "FI-WSP", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("TTFT, s", "TPOT, s", "end to end, s", "met", "FI-WSP for 2 GPUs", "60 requests on 2 engines"):
        assert part in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    done = run("replay", "trace.csv", *limits, "--csv", "times.csv", "--json", cwd=tmp_path)
    data = json.loads(done.stdout)["engine"]
    assert data["summary"]["completed"] == 60
    assert 0 <= data["attainment"]["share"] <= 1
    assert len((tmp_path / "times.csv").read_text().splitlines()) == 61


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kv-tokens", "3"], "--kv-tokens must be at least 16"),
        (["--policy", "engine", "--policy", "FI-WSP", "--csv", "t.csv"], "--csv goes with one --policy"),
        (["--ttft", "-1"], "ttft must be a positive number"),
        (["--policy", "best"], "kind must be one of"),
        (["--gpu", "abacus"], "name must be one of"),
    ],
)
def test_replay_names_what_is_wrong(tmp_path, words, message):
    (tmp_path / "trace.csv").write_text(TRACE)
    done = run("replay", "trace.csv", "--gpus", "2", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


COMMANDS = typer.main.get_command(app).commands
EXAMPLES = [
    (name, line.strip())
    for name, command in COMMANDS.items()
    for line in command.epilog.splitlines()
    if line.startswith("  fluidopt ")
]


@pytest.fixture(scope="session")
def tried(tmp_path_factory):
    """A directory in which nothing has happened but ``fluidopt example``."""
    folder = tmp_path_factory.mktemp("example")
    done = run("example", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "drawn and not recorded" in done.stdout
    return folder


def test_every_command_has_an_example():
    assert {name for name, _ in EXAMPLES} == set(COMMANDS)


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=lambda value: value)
def test_examples_work_when_pasted(name, line, tried, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path if name == "example" else tried)
    line, _, output = line.partition(" > ")
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, done.stderr or repr(done.exception)
    assert done.stdout or output is None
    if output:
        json.loads(done.stdout)


@pytest.mark.parametrize("line", [line for line in example.NEXT if line not in {each for _, each in EXAMPLES}])
def test_what_example_says_next_works(line, tried, monkeypatch):
    monkeypatch.chdir(tried)
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, done.stderr or repr(done.exception)


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_and_keeps_examples_whole(name, columns):
    done = CliRunner().invoke(app, [name, "--help"], terminal_width=columns)
    lines = done.stdout.splitlines()
    examples = [line for line in lines if line.startswith("    fluidopt ")]
    assert [line.strip() for line in examples] == [line for each, line in EXAMPLES if each == name]
    assert lines[-1] == examples[-1]
    assert max(len(line) for line in lines if line not in examples) <= columns


def test_drawn_requests_have_the_recorded_means():
    frame = drawn_requests(seconds=7200.0, seed=1)
    assert frame["arrival_time"].between(0, 7200).all()
    assert frame["arrival_time"].is_monotonic_increasing
    for service in azure_2023_summary()["label"]["classes"]:
        mine = frame[frame["label"] == service["name"]]
        mean = service["arrival_rate"] * 7200
        assert abs(len(mine) - mean) < 5 * np.sqrt(mean)
        for name, more in (("prompt", 0), ("output", 1)):
            spread = service[f"{name}_cv"] * service[f"{name}_tokens"]
            error = mine[f"{name}_tokens"].mean() - more - service[f"{name}_tokens"]
            assert abs(error) < 5 * spread / np.sqrt(len(mine)) + 0.5
    assert set(frame["origin"]) == {"drawn"}


def test_example_says_how_to_get_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["example", "a trial"]).stdout
    assert "Next:\n  cd 'a trial'\n  fluidopt plan" in said


def test_example_overwrites_nothing(tried):
    before = {path: path.read_bytes() for path in tried.glob("*.csv")}
    done = run("example", cwd=tried)
    assert done.returncode == 2
    assert "nothing is overwritten" in done.stderr
    assert {path: path.read_bytes() for path in before} == before
    refused = run("example", "requests.csv/in", cwd=tried)
    assert refused.returncode == 2
    assert "name a directory that you may write to" in refused.stderr


def test_a_trace_with_names_of_its_own(tried, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header, _, rows = (tried / "requests.csv").read_text().partition("\n")
    own = header.replace("arrival_time", "ts").replace("prompt_tokens", "in").replace("output_tokens", "out")
    Path("own.csv").write_text(f"{own}\n{rows}")
    refused = run("plan", "own.csv", "--gpus", "4", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--column arrival_time=COLUMN" in refused.stderr
    names = ["--column", "arrival_time=ts", "--column", "prompt_tokens=in", "--column", "output_tokens=out"]
    rest = ["--gpus", "4", "--abandonment-rate", "0.05", "--json"]
    mine = CliRunner().invoke(app, ["plan", "own.csv", *names, *rest])
    theirs = CliRunner().invoke(app, ["plan", str(tried / "requests.csv"), *rest])
    assert mine.exit_code == 0, mine.stderr
    assert json.loads(mine.stdout)["plan"]["revenue_rate"] == json.loads(theirs.stdout)["plan"]["revenue_rate"]
    wrong = CliRunner().invoke(app, ["plan", "own.csv", "--column", "arrival_time", "--gpus", "4"])
    assert "--column must be NAME=COLUMN" in str(wrong.exception)


def test_the_drawn_requests_are_a_trace(tried):
    trace = fo.read_trace(tried / "requests.csv")
    assert len(trace) == len(drawn_requests())
    assert set(trace.labels) == {"code", "conv"}


def test_kinds_are_those_of_the_policies():
    from fluidopt.policy.extract import RULES

    assert (*RULES, "refined") == options.KINDS


def completed(line, shell="bash"):
    """What a shell would offer at the end of a line, asked as its completion script asks."""
    words = line.split(" ")
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = CliRunner().invoke(app, [], prog_name="fluidopt", env={"_FLUIDOPT_COMPLETE": f"complete_{shell}", **asked})
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "offers", "not_offered"),
    [
        ("fluidopt si", ["simulate", "size"], "schema"),
        ("fluidopt plan --so", ["--solver"], "--gpus"),
        ("fluidopt plan scenario.toml --solver ", ["auto", "knapsack", "highs", "cvxpy"], "simplex"),
        ("fluidopt simulate --policy G", ["GI-WSP", "GF-WSP", "GG-SP"], "FG-SP"),
        ("fluidopt replay --policy e", ["engine"], "sli-aware"),
        ("fluidopt size --gpu llama-3.1-8b/", ["llama-3.1-8b/h100-sxm"], "llama-3.1-70b"),
        ("fluidopt fit --form p", ["piecewise"], "table"),
    ],
)
def test_shells_complete_commands_options_and_values(line, offers, not_offered, shell):
    found = completed(line, shell)
    assert all(offer in found for offer in offers)
    assert not_offered not in found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_installed(shell):
    done = CliRunner().invoke(app, [], prog_name="fluidopt", env={"_FLUIDOPT_COMPLETE": f"source_{shell}"})
    assert "_FLUIDOPT_COMPLETE" in done.stdout


def test_completion_loads_nothing_slow():
    code = "import sys, fluidopt.cli; print({'numpy', 'pydantic', 'sympy', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_version():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"fluidopt {fo.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], ""),
        (["plna"], "No such command 'plna'"),
        (["plan", "--solvr", "highs"], "No such option: --solvr"),
        (["plan", "."], "--gpus is required with a trace"),
        (["plan", ".", "--gpus", "2"], "cannot be opened: Is a directory; check the path"),
        (["plan", "empty.csv", "--gpus", "2"], "the file is empty"),
        (["plan", "empty.toml"], "classes is required"),
        (["plan", "empty.json"], "not valid JSON"),
        (["plan", "scenario.toml", "--figure", "no/out.png"], "name a file in a directory that you may write to"),
        (["fit", "."], "cannot be read: Is a directory; check the path"),
        (["fit", "iteration_times.csv"], "seconds missing in the header"),
        (["fit", "iteration_times.csv", "--column", "seconds"], "--column must be NAME=COLUMN"),
        (["simulate", "scenario.toml", "--horizon", "1e300"], "take at most"),
        (["simulate", "scenario.toml", "--gpus", "100000000"], "--gpus must be at most 1,000,000"),
        (["replay", "requests.csv", "--gpus", "1", "--csv", "."], "cannot write .: Is a directory"),
        (["size", "requests.csv", "--ttft=2", "--tpot=1", "--mean", "--percentile=95"], "give one of them"),
    ],
)
def test_each_mistake_is_one_line(words, message, tried, capfd, monkeypatch):
    """Also those that typer finds."""
    from fluidopt.cli import main

    for name in ("empty.csv", "empty.toml", "empty.json"):
        (tried / name).touch()
    monkeypatch.chdir(tried)
    monkeypatch.setattr(sys, "argv", ["fluidopt", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capfd.readouterr()
    if not words:
        assert "Start with" in out
        assert not stopped.value.code
        return
    assert stopped.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_closed_pipe_and_a_full_disk_end_quietly(tried):
    program = f"{shlex.quote(sys.executable)} -m fluidopt"
    done = subprocess.run(
        ["bash", "-c", f"for at in 1 2; do {program} schema; done | head -1"],
        capture_output=True,
        text=True,
        cwd=tried,
        check=False,
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "fluidopt", "schema"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 2
        assert done.stderr == "error: cannot write to standard output: No space left on device\n"


def test_a_terminal_without_the_signs_gets_them_in_writing(tried):
    words = [sys.executable, "-m", "fluidopt", "simulate", "scenario.toml", "--horizon", "200"]
    done = subprocess.run(
        words, capture_output=True, cwd=tried, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    assert b"\\xb1 95 %" in done.stdout
