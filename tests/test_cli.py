"""The terminal as its user meets it: what is printed, what is JSON, how mistakes end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
