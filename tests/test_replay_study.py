"""Policies on the same recorded requests: the study against replays by hand, and its intervals against many traces."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from recorded import DATA, recorded

import fluidopt as fo
from fluidopt.simulation.statistics import Batches
from fluidopt.studies import replays as module
from fluidopt.studies.replays import ReplayStudy, at_random_times, replay_study
from fluidopt.studies.windows import measure
from fluidopt.traces import Trace, classify

GPU = fo.reference_model().gpu_types[0]
PRICES = fo.TokenPrices(prompt=0.1, output=0.2)
KINDS = ("gate-and-route", "FI-WSP", "engine")
LIMITS = {"ttft": 1.0, "tpot": 0.03}


def drawn(seed=0, *, count=900, duration=300.0, bursts=False):
    """Requests of two kinds; in bursts of 30, or one by one."""
    random = np.random.default_rng(seed)
    kind = random.integers(0, 2, count)
    prompt = np.ceil(random.exponential(np.array([300, 2500])[kind]))
    output = 1 + np.ceil(random.exponential(np.array([120, 40])[kind]))
    times = random.uniform(0, duration, count // 30).repeat(30) if bursts else random.uniform(0, duration, count)
    label = np.array(["chat", "summarise"])[kind]
    return Trace(times, prompt.astype(int), output.astype(int), label=label, observation_time=duration)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The chain beside the replays for a shorter time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MODEL_EVENTS", 1e5)
        yield


def small(trace, **change):
    asked = {"gpus": [2, 4], "kinds": KINDS, "abandonment_rate": 0.1, "seed": 3, **LIMITS}
    return replay_study(trace, GPU, prices=PRICES, **asked | change)


@pytest.fixture(scope="module")
def study():
    trace = drawn()
    return small(trace, classes=classify(trace, by="label"))


# ---- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_point_is_a_replay_by_hand(study, gpus, kind):
    trace = drawn()
    found = classify(trace, by="label", abandonment_rate=0.1)
    plan = fo.FluidModel(found.workload.per_gpu(gpus), GPU, prices=PRICES).solve()
    engine = kind == "engine"
    fleet = fo.EngineFleet.like(GPU, gpus=gpus) if engine else plan.policy(gpus=gpus, kind=kind)

    def served(requests, classes):
        return fo.replay(requests, fleet, prices=PRICES, seed=3, **({} if engine else {"classes": classes}))

    point, result = study.of(gpus, kind), served(trace, found)
    values, times = point.recorded.values, result.percentiles()
    assert point.fleet == fleet
    assert point.bound == pytest.approx(plan.revenue_rate)
    assert values["revenue_rate"] == pytest.approx(result.revenue_rate, rel=1e-12)
    assert values["in_time"] == pytest.approx(result.attainment(**LIMITS), rel=1e-12)
    assert values["completed"] == pytest.approx(result.completed.mean())
    assert values["abandoned"] == pytest.approx(result.abandoned.mean())
    for quantity in ("ttft", "tpot"):
        for statistic in ("mean", "p50", "p90", "p99"):
            assert values[f"{quantity}_{statistic}"] == pytest.approx(times.loc[(quantity, "all"), statistic])
    assert (point.recorded.utilisation, point.recorded.preemptions) == (result.utilisation, 0)
    steady = served(*at_random_times(trace, found.assignment, seed=3))
    assert point.steady.values["revenue_rate"] == pytest.approx(steady.revenue_rate, rel=1e-12)
    assert (point.model is None) == engine
    offered = PRICES.prompt * trace.prompt_tokens.sum() + PRICES.output * (trace.output_tokens - 1).sum()
    assert values["value_served"] == pytest.approx(result.revenue_rate * 300 * gpus / offered)
    assert values["value_in_time"] <= values["value_served"]


def test_random_times_keep_the_requests_and_lose_the_bursts():
    trace = drawn(bursts=True)
    kind = np.arange(len(trace))
    steady, of = at_random_times(trace, kind, seed=1)
    assert np.array_equal(steady.prompt_tokens, trace.prompt_tokens[of])
    assert np.array_equal(steady.output_tokens, trace.output_tokens[of])
    assert sorted(of) == list(kind)
    assert steady.duration == trace.duration
    before, after = (each.dispersion(windows=[10.0])["dispersion"].iloc[-1] for each in (trace, steady))
    assert after < 2 < before / 4


def test_what_bursts_take_is_told_from_what_the_policy_takes():
    """One prefill GPU is enough on average: the chain and random times agree, and only the bursts cost."""
    point = small(drawn(bursts=True, count=1500), gpus=[8], kinds=["gate-and-route"], classes=2).of(8, "gate-and-route")
    shares = {
        "model": point.model.mean / point.bound,
        "steady": point.steady.values["revenue_rate"] / point.bound,
        "recorded": point.recorded.values["revenue_rate"] / point.bound,
    }
    assert shares["model"] == pytest.approx(shares["steady"], abs=0.04)
    assert shares["recorded"] < shares["steady"] - 0.1


# ---- intervals ----------------------------------------------------------------------------------------------------


def test_the_interval_of_a_rate_is_that_of_batch_means():
    trace = drawn()
    result = fo.replay(trace, fo.EngineFleet.like(GPU, gpus=2), prices=PRICES)
    measured = measure(result, windows=20)
    paid = np.where(result.finished <= 300, PRICES.prompt * trace.prompt_tokens, 0.0)
    paid += np.where(result.finished <= 300, PRICES.output * (trace.output_tokens - 1), 0.0)
    batches = np.bincount((trace.arrival_time // 15).astype(int), weights=paid, minlength=20) / (15 * 2)
    expected = Batches(np.zeros((20, 0)), 1).estimate(batches)
    found = measured.estimate("revenue_rate")
    assert (found.mean, found.half_width) == pytest.approx((expected.mean, expected.half_width), rel=1e-9)


def test_paired_intervals_cover():
    """The difference of two policies over 100 streams: their 95 % intervals hold its mean in about 95 %."""
    classes = classify(drawn(), by="label", abandonment_rate=0.1)
    plan = fo.FluidModel(classes.workload.per_gpu(2), GPU, prices=PRICES).solve()
    policies = [plan.policy(gpus=2, kind=kind) for kind in ("FI-WSP", "gate-and-route")]
    names = ("revenue_rate", "ttft_mean", "ttft_p90", "completed")
    found = {name: [] for name in names}
    own = []
    for seed in range(100):
        trace = drawn(seed)
        kind = (trace.label == "summarise").astype(int)
        one, other = (measure(fo.replay(trace, each, classes=kind, seed=seed), windows=20) for each in policies)
        for name in names:
            found[name].append(one.less(other, name))
        own.append(one.estimate("revenue_rate").half_width)
    for name, gaps in found.items():
        means, widths = np.array([(gap.mean, gap.half_width) for gap in gaps]).T
        covered = np.mean(np.abs(means - means.mean()) <= widths)
        assert 0.87 <= covered <= 0.995, name
    # what arrives when is common to both, and drops out
    assert np.median([gap.half_width for gap in found["revenue_rate"]]) < 0.5 * np.median(own)


def test_differences_are_of_the_table(study):
    frame, gaps = study.to_frame(), study.differences("FI-WSP")
    for (gpus, kind), row in gaps.iterrows():
        for name in ("revenue_rate", "value_in_time", "ttft_p99", "tpot_mean"):
            assert row[name] == pytest.approx(frame.loc[(gpus, kind), name] - frame.loc[(gpus, "FI-WSP"), name])
            assert row[f"{name}_half_width"] >= 0
        assert -1 <= row["lag_correlation"] <= 1
    same = study.difference(2, "engine", "engine")
    assert (same.mean, same.half_width) == (0, 0)


# ---- search, checkpoint, executors --------------------------------------------------------------------------------


def test_the_refined_policy_is_searched_for_once_per_size(monkeypatch):
    searched = []

    def search(plan, *, gpus, seed):
        searched.append((gpus, seed))
        return SimpleNamespace(policy=replace(plan.policy(gpus=gpus, kind="FI-WSP"), kind="refined"))

    monkeypatch.setattr(module, "refine_policy", search)
    made = small(drawn(), kinds=["refined", "FI-WSP"])
    assert searched == [(2, 3), (4, 3)]
    for gpus in (2, 4):
        assert made.of(gpus, "refined").recorded.values == made.of(gpus, "FI-WSP").recorded.values
        assert made.of(gpus, "refined").fleet.kind == "refined"


def test_a_study_resumes_and_grows_without_repeating(tmp_path, monkeypatch, study):
    trace, path = drawn(), tmp_path / "study.jsonl"
    options = {"classes": classify(trace, by="label"), "checkpoint": path}
    small(trace, **options | {"gpus": [2]})
    path.write_text(path.read_text() + '{"gpus": 4, "ki')  # killed while writing
    made, point = [], module.replay_point

    def counted(**job):
        made.append((job["fleet"].gpus, job["kind"]))
        return point(**job)

    monkeypatch.setattr(module, "replay_point", counted)
    grown = small(trace, **options)
    assert made == [(4, kind) for kind in KINDS]
    again = small(trace, **options)
    assert len(made) == len(KINDS)
    assert grown.to_dict() == again.to_dict() == study.to_dict()


def test_a_checkpoint_of_another_study_is_refused(tmp_path):
    trace, path = drawn(), tmp_path / "study.jsonl"
    options = {"gpus": [2], "kinds": ["FI-WSP"], "checkpoint": path}
    small(trace, **options)
    with pytest.raises(fo.InvalidInput, match=r"checkpoint: .*with other seed"):
        small(trace, **options | {"seed": 4})
    with pytest.raises(fo.InvalidInput, match=r"checkpoint: .*with other .*trace"):
        small(drawn(1), **options)
    path.write_text("no JSON\n")
    with pytest.raises(fo.InvalidInput, match=r"checkpoint: .*cannot be read as lines of JSON"):
        small(trace, **options)
    with pytest.raises(fo.InvalidInput, match=r"checkpoint: .*cannot be written"):
        small(trace, **options | {"checkpoint": tmp_path / "nowhere" / "study.jsonl"})


def test_the_executor_changes_nothing_and_all_goes_through_json(study):
    trace = drawn()
    with ThreadPoolExecutor(2) as executor:
        other = small(trace, classes=classify(trace, by="label"), executor=executor)
    assert other.to_dict() == study.to_dict()
    read = ReplayStudy.from_dict(json.loads(json.dumps(study.to_dict(), allow_nan=False)))
    assert read.to_dict() == study.to_dict()
    assert read.to_frame().equals(study.to_frame())
    with pytest.raises(fo.InvalidInput, match="not a saved replay study"):
        ReplayStudy.from_dict({"points": []})
    with pytest.raises(fo.InvalidInput, match="not a saved point"):
        ReplayStudy.from_dict(study.to_dict() | {"points": [{"gpus": 2}]})


def test_a_fleet_without_room_for_anybody_is_told_without_numbers():
    """Every request is refused for memory: times are missing, not 0, and survive the way through JSON."""
    trace = Trace(np.linspace(0, 50, 60), np.full(60, 100), np.full(60, 20), observation_time=60)
    made = small(trace, gpus=[1], kinds=["FI-WSP"], kv_tokens=64, classes=1)
    values = made.of(1, "FI-WSP").recorded.values
    assert (values["refused"], values["revenue_rate"]) == (1, 0)
    assert np.isnan(values["ttft_p50"])
    again = ReplayStudy.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)))
    assert np.isnan(again.of(1, "FI-WSP").recorded.values["ttft_p50"])


# ---- words, figure, errors ----------------------------------------------------------------------------------------


def test_it_says_what_it_found(study):
    assert all(f"{gpus} GPUs: " in study.statement for gpus in (2, 4))
    assert "20 windows of the one trace" in study.caption
    assert "Nobody gives up" in study.caption
    assert "TTFT 1 s and TPOT 0.03 s" in study.caption
    assert study.statement in str(study)
    assert "gate-and-route" in study._repr_html_()
    figure = study.plot()
    labels = [text.get_text() for text in figure.axes[1].get_yticklabels()]
    assert labels == [f"{n}  {kind}" for n in (2, 4) for kind in KINDS if kind != "engine"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": []}, "gpus must be whole numbers of at least 1; got"),
        ({"gpus": [2.5]}, "gpus must be whole numbers"),
        ({"gpus": 4}, "gpus must be whole numbers"),
        ({"kinds": []}, "kinds must be at least one policy, each once"),
        ({"kinds": ["FI-WSP", "FI-WSP"]}, "kinds must be at least one policy, each once"),
        ({"kinds": ["best"]}, "kind must be one of"),
        ({"windows": 2}, "windows must be a whole number of at least 5; got 2"),
        ({"ttft": 0.0}, "ttft must be a positive number of seconds; got 0.0"),
        ({"tpot": "fast"}, "tpot must be a positive number of seconds; got 'fast'"),
        ({"kv_tokens": 3}, "kv_tokens must be a whole number of at least 16; got 3"),
        ({"seed": -1}, "seed"),
        ({"classes": classify(drawn(count=60), 1, by="prompt")}, "Classification of this trace of 900 requests"),
        ({"abandonment_rate": -1}, "abandonment_rate"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(fo.InvalidInput, match=message):
        small(drawn(), **change)


def test_wrong_subjects_are_named(study):
    with pytest.raises(fo.InvalidInput, match="trace must be a Trace; got list"):
        small([])
    with pytest.raises(fo.InvalidInput, match="gpu must be a GPU; got str"):
        replay_study(drawn(), "H100", gpus=[1], prices=PRICES)
    with pytest.raises(fo.InvalidInput, match="no 'refined' on 2 GPUs; it has 'gate-and-route', 'FI-WSP', 'engine'"):
        study.of(2, "refined")
    with pytest.raises(fo.InvalidInput, match="of must be one of 'revenue_rate'"):
        study.difference(2, "FI-WSP", "engine", of="speed")


# ---- recorded requests --------------------------------------------------------------------------------------------


@recorded
def test_on_a_bursty_hour_the_partition_for_the_mean_load_loses():
    """Azure, both services: in the chain and at random times little is lost, as recorded a seventh."""
    files = [DATA / "azure" / f"AzureLLMInferenceTrace_{name}.csv" for name in ("code", "conv")]
    made = small(fo.read_trace(files), gpus=[10], kinds=["gate-and-route", "FI-WSP"], abandonment_rate=0.05)
    frame = made.to_frame().loc[10]
    assert frame["steady_of_bound"].min() > 0.97
    assert frame["model_of_bound"].min() > 0.97
    lead = made.difference(10, "FI-WSP", "gate-and-route", of="value_served")
    assert lead.mean > 0.1
    assert lead.interval[0] > 0
