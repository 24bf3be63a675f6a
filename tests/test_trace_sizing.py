"""Fleets for recorded requests: the bound against other programs and every replay, the search, the command."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
from recorded import DATA, recorded
from scipy.optimize import linprog

import fluidopt as fo
from fluidopt.cli import main
from fluidopt.curves import LinearTime, TabulatedTime
from fluidopt.errors import InfeasibleModel, InvalidInput
from fluidopt.serving.engine import EngineFleet
from fluidopt.serving.replay import replay
from fluidopt.studies.sizing.least import Outcome, least_fleet
from fluidopt.studies.sizing.trace import size_trace
from fluidopt.studies.sizing.trace_bound import Promise, iterations, trace_bound
from fluidopt.traces.trace import Trace

CONVERSATION = DATA / "azure" / "AzureLLMInferenceTrace_conv.csv"

FLAT = fo.GPU(fo.IterationTime(alpha=0.0174, beta=6.2e-5, solo=0.022), batch_size=16, chunk_size=256, name="flat")
LINEAR = fo.GPU(
    LinearTime(
        alpha=0.012, beta=4e-5, per_decode=1.5e-4, per_kv_token=6e-8, solo=0.011, solo_per_decode=1.2e-4,
        solo_per_kv_token=5e-8,
    ),
    batch_size=24, chunk_size=512, kv_tokens=800.0, name="linear",
)  # fmt: skip
TABLE = fo.GPU(
    TabulatedTime(
        chunk=(64.0, 256.0, 1024.0),
        decodes=(1.0, 8.0, 64.0),
        mixed_seconds=(
            ((0.014,), (0.015,), (0.022,)),
            ((0.021,), (0.020,), (0.030,)),  # measured noise: more decodes, less time
            ((0.055,), (0.056,), (0.070,)),
        ),
        decode_only_seconds=((0.010,), (0.0105,), (0.019,)),
    ),
    batch_size=32,
    chunk_size=448,
    name="table",
)
TYPES = (FLAT, LINEAR, TABLE)


def some_trace(count=250, rate=3.0, seed=1, prompt=6.3, output=4.2):
    rng = np.random.default_rng(seed)
    return Trace(
        np.cumsum(rng.exponential(1 / rate, count)),
        np.ceil(rng.lognormal(prompt, 0.8, count)).astype(int),
        np.ceil(rng.lognormal(output, 1.0, count)).astype(int),
    )


# ---- what a GPU can do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", TYPES, ids=lambda gpu: gpu.name)
def test_every_iteration_is_a_mixture_of_those_listed_or_worse(gpu):
    """Some mixture has as many prompt tokens and decodes, takes no longer, and no more slot-seconds per decode."""
    listed = iterations(gpu, longest=9_000.0)
    grid, rng = gpu.curve.grid(), np.random.default_rng(2)
    budget = gpu.chunk_size + gpu.batch_size - 1
    for _ in range(150):
        decodes = int(rng.integers(0, gpu.batch_size + 1))
        chunk = 0 if decodes == gpu.batch_size else int(rng.integers(0 if decodes else 1, budget - decodes + 1))
        kv = rng.uniform(0.0, 9_000.0) if decodes else 0.0
        time = float(grid.times(chunk, decodes, kv)) - listed.kv_time * decodes * kv
        columns = np.array([listed.chunk, listed.decodes, -listed.time, -listed.decodes * listed.time])
        found = linprog(
            np.zeros(len(listed.time)), A_ub=-columns, b_ub=np.array([-chunk, -decodes, time, decodes * time]) + 1e-9
        )
        assert found.status == 0, (chunk, decodes, kv)


def test_a_curve_that_does_not_know_the_batch_needs_few_iterations():
    listed = iterations(FLAT, longest=1_000.0)
    assert (0.0, 16.0) in set(zip(listed.chunk, listed.decodes, strict=True))
    assert (256.0, 15.0) in set(zip(listed.chunk, listed.decodes, strict=True))
    assert listed.kv_time == 0.0
    assert iterations(LINEAR, longest=1_000.0).kv_time == pytest.approx(5e-8)


# ---- the bound ----------------------------------------------------------------------------------------------------


def request_by_request(trace, gpu, promise, interval):
    """The bound with a variable for each request and interval, for a curve on which no batch is too slow."""
    listed = iterations(gpu, longest=1.0)
    assert listed.time.max() <= promise.tpot
    N, a, P, D = len(trace), trace.arrival_time, trace.prompt_tokens, trace.output_tokens - 1.0
    first = np.floor((a + promise.ttft) / interval).astype(int)
    last = np.floor((a + promise.ttft + promise.tpot * D) / interval).astype(int)
    M = last.max() + 1
    when = np.arange(M)
    come = when >= np.floor(a / interval)[:, None]
    kept, gpus, phi = cp.Variable(N), cp.Variable(), cp.Variable((len(listed.time), M), nonneg=True)
    prefill, decode = cp.Variable((N, M), nonneg=True), cp.Variable((N, M), nonneg=True)
    rows = [
        kept >= 0,
        kept <= 1,
        cp.sum(kept) >= math.ceil(promise.percentile / 100 * N),
        cp.sum(phi, axis=0) <= gpus,
        cp.sum(cp.multiply(prefill, come & (when <= first[:, None])), axis=1) >= cp.multiply(P, kept),
        cp.sum(cp.multiply(decode, come & (when <= last[:, None])), axis=1) >= cp.multiply(D, kept),
        cp.sum(prefill, axis=0) <= interval * (listed.chunk / listed.time) @ phi,
        cp.sum(decode, axis=0) <= interval * (listed.decodes / listed.time) @ phi,
    ]
    goal = cp.Problem(cp.Minimize(gpus), rows)
    goal.solve(solver=cp.HIGHS)
    return float(goal.value)


@pytest.mark.parametrize(("percentile", "ttft"), [(100.0, 2.0), (80.0, 2.0), (95.0, 40.0)])
def test_the_bound_agrees_with_one_request_by_request(percentile, ttft):
    trace, promise = some_trace(60, rate=1.0), Promise(ttft=ttft, tpot=0.05, percentile=percentile)
    found = trace_bound(trace, FLAT, promise=promise, interval=10.0)
    assert found.cost == pytest.approx(request_by_request(trace, FLAT, promise, 10.0), rel=1e-5)


def test_identical_requests_at_once_take_what_their_work_takes():
    """1,000 requests arrive together, and all of their prompts are due within 15 s: prompt tokens over prompt speed."""
    trace = Trace(np.zeros(1000), np.full(1000, 2710), np.full(1000, 1), observation_time=60.0)
    found = trace_bound(trace, FLAT, promise=Promise(ttft=14.0, tpot=0.05, percentile=100), interval=15.0)
    speed = 271 / FLAT.curve.mixed(271)
    assert found.cost == pytest.approx(2_710_000 / speed / 15.0, rel=1e-6)
    half = trace_bound(trace, FLAT, promise=Promise(ttft=14.0, tpot=0.05, percentile=50), interval=15.0)
    assert half.cost == pytest.approx(found.cost / 2, rel=1e-6)


def served(trace, gpu, gpus, kind):
    """What engines, or a plan's policy, make of the requests, none of which gives up."""
    if kind == "engine":
        return replay(trace, EngineFleet.like(gpu, gpus=gpus, async_scheduling=False, cuda_graph_sizes=()))
    classes = fo.classify(trace, 1)
    prices = fo.TokenPrices(prompt=0.1, output=0.2)
    plan = fo.FluidModel(classes.workload.with_abandonment(0.1).per_gpu(gpus), gpu, prices=prices).solve()
    return replay(trace, plan.policy(gpus=gpus, kind=kind), classes=classes, patience=False)


@pytest.mark.parametrize("gpu", TYPES, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("kind", ["engine", "gate-and-route", "FI-WSP"])
def test_whatever_a_replay_achieves_the_bound_allows(gpu, kind):
    """A replay keeps the promise that is made of its own times, so the bound of that is no more than its GPUs."""
    rng = np.random.default_rng(4)
    for gpus, rate in ((1, 4.0), (2, 30.0), (3, 100.0)):
        trace = some_trace(200, rate=rate, seed=gpus, prompt=6.0, output=4.5)
        seen = served(trace, gpu, gpus, kind)
        tpot = seen.tpot[np.isfinite(seen.tpot)]
        achieved = [(float(seen.ttft.mean()), float(tpot.mean()), None)]
        for share in (1.0, rng.uniform(0.5, 1.0)):
            limits = (float(np.quantile(seen.ttft, share)), float(np.quantile(tpot, share)))
            achieved.append((*limits, 100 * seen.attainment(ttft=limits[0], tpot=limits[1])))
        for ttft, tpot_limit, percentile in achieved:
            promise = Promise(ttft=ttft * (1 + 1e-9), tpot=tpot_limit * (1 + 1e-9), percentile=percentile)
            assert 0 < trace_bound(trace, gpu, promise=promise).cost <= gpus


@pytest.mark.parametrize("gpu", TYPES, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("prompt", "output"), [(1500, 1), (1, 200)], ids=["prompts", "decodes"])
def test_of_a_busy_fleet_the_bound_leaves_little_out(gpu, prompt, output):
    """Equal requests in excess keep engines at their best iteration; the bound of what they achieve is their number."""
    trace = Trace(np.linspace(0.0, 3.0, 500), np.full(500, prompt), np.full(500, output), observation_time=3.0)
    seen = served(trace, gpu, 2, "engine")
    slowest = float(seen.tpot.max()) if output > 1 else 0.05
    promise = Promise(ttft=float(seen.ttft.max()) * (1 + 1e-9), tpot=slowest * (1 + 1e-9), percentile=100)
    assert 0.9 * 2 < trace_bound(trace, gpu, promise=promise).cost <= 2


@pytest.mark.parametrize("percentile", [60.0, 99.0, None])
def test_no_replay_on_fewer_gpus_keeps_the_promise(percentile):
    trace, ttft, tpot = some_trace(400, rate=60.0, prompt=7.0, output=4.5), 0.8, 0.04
    least = trace_bound(trace, FLAT, promise=Promise(ttft=ttft, tpot=tpot, percentile=percentile)).least
    assert least > 1
    for kind in ("engine", "GF-WSP"):
        for gpus in range(1, least):
            seen = served(trace, FLAT, gpus, kind)
            if percentile is None:
                assert seen.ttft.mean() > ttft or np.nanmean(seen.tpot) > tpot
            else:
                assert seen.attainment(ttft=ttft, tpot=tpot) < percentile / 100
    given = {"ttft": 2 * ttft, "tpot": 2 * tpot, "percentile": percentile, "interval": 60.0, "classes": 2}
    policy = size_trace(trace, FLAT, policy="gate-and-route", **given)
    assert policy.best.bound.least <= policy.gpus
    assert 1 <= policy.best.answer.prefill_gpus <= policy.gpus


def test_the_bound_falls_as_promises_are_loosened():
    trace = some_trace(400, rate=30.0)
    tight = {"ttft": 0.5, "tpot": 0.03, "percentile": 99.0}
    base = trace_bound(trace, LINEAR, promise=Promise(**tight)).cost
    for looser in ({"ttft": 30.0}, {"tpot": 0.3}, {"percentile": 70.0}):
        assert trace_bound(trace, LINEAR, promise=Promise(**(tight | looser))).cost < base * (1 - 1e-6)
    means = [trace_bound(trace, LINEAR, promise=Promise(ttft=t, tpot=0.05, percentile=None)).cost for t in (0.2, 2.0)]
    assert means[0] > means[1]


def test_a_slow_batch_costs_what_its_tokens_take():
    """Where full batches are slower than promised, smaller ones must do, which takes more GPUs."""
    trace = some_trace(300, rate=30.0, prompt=4.0, output=5.0)
    bounds = [
        trace_bound(trace, LINEAR, promise=Promise(ttft=2.0, tpot=tpot, percentile=100)) for tpot in (0.03, 0.0115)
    ]
    assert bounds[1].cost > 2 * bounds[0].cost


def test_several_types_are_mixed_at_least_cost():
    trace = some_trace(400, rate=30.0)
    types = [replace(FLAT, hourly_price=1.0), replace(LINEAR, hourly_price=2.0)]
    promise = Promise(ttft=1.0, tpot=0.05, percentile=95)
    mixed, alone = trace_bound(trace, types, promise=promise), [trace_bound(trace, g, promise=promise) for g in types]
    assert mixed.cost <= min(each.cost for each in alone) * (1 + 1e-5)
    assert mixed.cost == pytest.approx(float(mixed.amounts @ [1.0, 2.0]), rel=1e-4)
    assert mixed.certificate.holds(1e-5)
    found = size_trace(trace, types, ttft=1.0, tpot=0.05, percentile=95, interval=30.0)
    assert found.unit == "money/hour"
    assert found.cost == min(each.cost for each in found.types) >= found.least_cost
    assert list(found.to_frame().index) == ["flat", "linear"]
    assert "money/hour" in found.statement


# ---- the search ---------------------------------------------------------------------------------------------------


def outcomes(kept):
    """A fake fleet that remembers what it was asked."""
    asked = []

    def serve(gpus):
        assert gpus not in asked, "the same fleet was replayed twice"
        asked.append(gpus)
        return Outcome(gpus, kept(gpus), 0.5, 1.0, 0.1)

    return serve, asked


@pytest.mark.parametrize("answer", [1, 2, 3, 7, 8, 63, 64, 65, 1000])
def test_the_search_finds_the_least_fleet(answer):
    serve, asked = outcomes(lambda gpus: gpus >= answer)
    found, seen = least_fleet(serve, start=1, most=4096)
    assert found == answer
    assert {each.gpus for each in seen} == set(asked)
    assert answer == 1 or answer - 1 in asked
    assert answer + 1 in asked
    assert len(asked) <= 2 * math.log2(answer) + 5


def test_the_search_goes_on_where_a_neighbour_breaks_the_promise():
    serve, _ = outcomes(lambda gpus: gpus in (5, 9, 10) or gpus > 12)
    assert least_fleet(serve, start=4, most=100)[0] == 9
    serve, asked = outcomes(lambda gpus: gpus >= 9)
    assert least_fleet(serve, start=9, most=100)[0] == 9
    assert sorted(asked) == [9, 10], "below the bound nothing is tried"


def test_a_promise_that_no_fleet_keeps_is_refused():
    serve, asked = outcomes(lambda _: False)
    with pytest.raises(InfeasibleModel, match=r"no fleet of up to 40 GPUs keeps the promise: with 40, 50\.00% of the"):
        least_fleet(serve, start=1, most=40)
    assert len(asked) < 8


# ---- the study ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sized():
    return size_trace(some_trace(600, rate=20.0), FLAT, ttft=1.0, tpot=0.05, percentile=95, interval=10.0, classes=3)


def test_the_table_has_the_rates_of_the_trace(sized):
    trace, table = some_trace(600, rate=20.0), sized.intervals
    assert table["requests"].sum() == 600
    assert table["seconds"].sum() == pytest.approx(trace.duration)
    assert (table["prompt_rate"] * table["seconds"]).sum() == pytest.approx(trace.prompt_tokens.sum())
    assert sized.best.answer.kept


def test_fluid_gpus_are_those_on_which_the_mean_load_just_fits(sized):
    """The number of GPUs, from the plan's side: the model is feasible on it and on no fewer."""
    gpus = float(sized.best.fluid.gpus[0])
    problem = sized.best.fluid.problem
    for factor, fits in ((1.001, True), (0.999, False)):
        model = fo.FluidModel(
            problem.workload.per_gpu(gpus * factor),
            problem.gpus[0],
            prices=fo.TokenPrices(prompt=1.0, output=1.0),
            service_levels=problem.service_levels,
        )
        if fits:
            model.solve()
        else:
            with pytest.raises(InfeasibleModel):
                model.solve()


def test_it_says_what_it_found(sized):
    assert f"needs {sized.gpus}" in sized.statement
    data = json.loads(json.dumps(sized.to_dict(), allow_nan=False))
    assert data["gpus"] == sized.gpus >= data["least_cost"]
    assert len(data["intervals"]) == len(sized.intervals)
    assert sized._repr_html_().count("<table") == 3
    assert "Fleet for a trace" in str(sized)
    labels = [line.get_label() for line in sized.plot().axes[0].lines]
    assert labels == ["perfect system, mean rates", "no policy below", "the engines' own scheduling, replayed"]


def test_the_answer_is_the_least_fleet_that_keeps_the_promise(sized):
    trace = some_trace(600, rate=20.0)
    share = {n: replay(trace, EngineFleet.like(FLAT, gpus=n)).attainment(ttft=1.0, tpot=0.05) for n in range(1, 30)}
    assert share[sized.gpus] >= 0.95 <= share[sized.gpus + 1]
    assert share[sized.gpus - 1] < 0.95
    for seen in sized.best.outcomes:
        assert seen.share == share[seen.gpus]


def test_little_memory_takes_more_gpus(sized):
    trace = some_trace(600, rate=20.0)
    given = {"ttft": 1.0, "tpot": 0.05, "percentile": 95, "interval": 10.0, "classes": 3}
    tight = size_trace(trace, FLAT, kv_tokens=8_192, **given)
    assert tight.gpus > sized.gpus
    assert tight.best.bound.cost == sized.best.bound.cost
    seen = replay(trace, EngineFleet.like(FLAT, gpus=tight.gpus, kv_blocks=513))
    assert seen.attainment(ttft=1.0, tpot=0.05) == tight.best.answer.share


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"kv_tokens": 3}, InvalidInput, "kv_tokens must be a whole number of at least 16, or None; got 3"),
        ({"ttft": 0.0}, InvalidInput, "ttft must be greater than 0"),
        ({"percentile": 101.0}, InvalidInput, "percentile.*100"),
        ({"policy": "gate"}, InvalidInput, "policy must be one of 'engine', 'gate-and-route'.*got 'gate'"),
        ({"interval": -1.0}, InvalidInput, "interval must be a number of seconds"),
        ({"max_gpus": 0}, InvalidInput, "max_gpus must be a whole number of at least 1; got 0"),
        ({"gpus": [FLAT, LINEAR]}, InvalidInput, "several types are compared by hourly_price, and 'flat' has none"),
        ({"gpus": []}, InvalidInput, "gpus must be types of different names; got"),
        ({"ttft": 0.03}, InfeasibleModel, "alone on a GPU only .* of the requests are fast enough"),
        ({"tpot": 0.01}, InfeasibleModel, "alone on a GPU only 0.00% of the requests are fast enough"),
        ({"ttft": 0.5, "max_gpus": 3}, InfeasibleModel, "no fleet of up to 3 GPUs keeps the promise"),
    ],
)
def test_what_cannot_be_sized_is_refused(given, error, message):
    trace = some_trace(300, rate=60.0, output=5.0)
    gpus = given.pop("gpus", FLAT)
    with pytest.raises(error, match=message):
        size_trace(trace, gpus, **({"ttft": 1.0, "tpot": 0.05} | given))


def test_the_bound_refuses_types_without_a_price_and_empty_intervals():
    with pytest.raises(InvalidInput, match=r"several with an hourly_price each.*none for 'flat', 'linear'"):
        trace_bound(some_trace(), [FLAT, LINEAR], promise=Promise(ttft=1.0, tpot=0.05))
    with pytest.raises(InvalidInput, match="interval must be a number of seconds above 0; got 0"):
        trace_bound(some_trace(), FLAT, promise=Promise(ttft=1.0, tpot=0.05), interval=0)


@recorded
def test_a_recorded_hour_moves_the_right_way():
    """Both numbers grow, and the bound stays below, as the promise is tightened; ten times the traffic."""
    trace = fo.read_trace(CONVERSATION).sped_up(10)
    base = {"ttft": 2.0, "tpot": 0.05, "percentile": 90.0}
    sizes = [
        size_trace(trace, FLAT, interval=60.0, classes=3, **(base | tighter))
        for tighter in ({}, {"percentile": 99.0}, {"ttft": 0.6}, {"tpot": 0.0255})
    ]
    for size in sizes:
        assert size.best.bound.cost < size.gpus
    for tighter in sizes[1:]:
        assert tighter.best.bound.cost > sizes[0].best.bound.cost
        assert tighter.gpus > sizes[0].gpus
    fluid = sizes[0].best.fluid.gpus[0]
    assert sizes[0].best.bound.cost < fluid < sizes[0].gpus, "a tenth of the requests may be given up"


# ---- the command --------------------------------------------------------------------------------------------------


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "fluidopt", "size", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command(tmp_path):
    path, csv, figure = tmp_path / "trace.csv", tmp_path / "intervals.csv", tmp_path / "size.png"
    some_trace(200, rate=20.0).to_csv(path)
    code, out, err = run(path, "--ttft", 1, "--tpot", 0.05, "--interval", 5, "--csv", csv, "--figure", figure)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert "GPUs for TTFT 1 s and TPOT 50 ms for 90 % of the requests" in out
    assert csv.read_text().startswith("interval,start,seconds,requests,request_rate")
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert err == "", "progress belongs to a terminal"


def test_the_command_on_two_types(tmp_path, monkeypatch, capsys):
    path = tmp_path / "trace.csv"
    some_trace(200, rate=20.0).to_csv(path)
    types = ("--gpu", "qwen-8b/a100-sxm-40gb=2", "--gpu", "qwen-4b/a100-sxm-40gb=3", "--batch-size", "16")
    words = ["fluidopt", "size", str(path), "--ttft", "1", "--tpot", "0.05", "--mean", *types]
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    with pytest.raises(SystemExit, match="0"):
        main()
    data = json.loads(capsys.readouterr().out)
    assert (data["promise"]["percentile"], data["unit"]) == (None, "money/hour")
    assert [each["gpu"] for each in data["types"]] == ["qwen-8b/a100-sxm-40gb", "qwen-4b/a100-sxm-40gb"]
    assert all(each["gpus"] >= each["least_gpus"] for each in data["types"])
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="0"):
        main()
    out = capsys.readouterr().out
    assert "replayed/h" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_command_refuses(monkeypatch, capsys):
    for arguments, message in (
        (("--figure", "a.txt"), "--figure must end in"),
        (("--gpu", "a=b"), "--gpu must be a name, or name=price"),
        (("--gpu", "a", "--with", "s.toml"), "both name the GPU types"),
        ((), "missing.csv"),
    ):
        monkeypatch.setattr(
            sys, "argv", ["fluidopt", "size", "missing.csv", "--ttft", "1", "--tpot", "0.05", *arguments]
        )
        with pytest.raises(SystemExit, match="2"):
            main()
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in printed.err
