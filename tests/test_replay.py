"""The replay: against an engine that walks through every iteration, the exact chain, and a real engine."""

import json
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from engine_by_steps import serve
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import DATA, recorded
from small_fleets import small_policy

import fluidopt as fo
from fluidopt.chain import exact_chain
from fluidopt.curves import CurveGrid, TabulatedTime
from fluidopt.policy import Gate
from fluidopt.policy.extract import RULES
from fluidopt.serving import Engine, EngineFleet, fit_step_overhead, read_engine, replay
from fluidopt.serving.clock import endurance, flatten, growth, walk
from fluidopt.traces import Trace, classify

AFFINE = fo.IterationTime(alpha=0.0174, beta=6.2e-5, solo=0.022)


# The clock -------------------------------------------------------------------------------------------------------


def random_grid(rng, chunks, decodes, points):
    def axis(count, top):
        return np.sort(rng.choice(np.arange(top), count, replace=False)).astype(float)

    def rising(count):
        return np.sort(rng.uniform(0.01, 0.05, count))

    return CurveGrid(
        axis(chunks, 500),
        axis(decodes, 60),
        axis(points, 900),
        rising(chunks)[:, None, None] + rising(decodes)[:, None] * rising(points),
        rising(decodes)[:, None] + rising(points),
    )


@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 1, 1), (2, 4, 2), (3, 1, 6), (2, 2, 1)])
def test_many_iterations_at_once_take_what_they_take_one_by_one(shape):
    rng = np.random.default_rng(0)
    grids = [random_grid(rng, *shape) for _ in range(3)]
    curves = flatten(grids)
    for _ in range(200):
        which = int(rng.integers(3))
        chunk, decodes = float(rng.integers(0, 600) * rng.integers(0, 2)), float(rng.integers(0, 80))
        kv = float(rng.uniform(0, 1000)) if decodes else 0.0
        overhead, most = rng.uniform(0, 0.01), int(rng.integers(1, 400))
        each = grids[which].times(chunk, decodes, kv + np.arange(most) * (decodes > 0)) + overhead
        ends = np.cumsum(each)
        steps, taken = walk(curves, which, chunk, decodes, kv, overhead, most, np.inf)
        assert (steps, taken) == (most, pytest.approx(ends[-1], rel=1e-12))
        until = float(rng.uniform(0, 1.1 * ends[-1]))
        steps, taken = walk(curves, which, chunk, decodes, kv, overhead, most, until)
        assert steps == min(np.searchsorted(ends, until) + 1, most)
        assert taken == pytest.approx(ends[steps - 1], rel=1e-12)


@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=12),
    st.integers(1, 16),
    st.integers(0, 50),
    st.integers(0, 60),
    st.integers(0, 40),
)
@settings(max_examples=200, deadline=None)
def test_blocks_are_counted_as_one_by_one(tokens, block, steps, count, free):
    tokens = np.array(tokens)
    residues = np.bincount((tokens - steps) % block, minlength=block)
    taken = np.cumsum([(-(-(tokens + k + 1) // block) - -(-(tokens + k) // block)).sum() for k in range(2000)])
    assert growth(residues, block, tokens.size, steps, count) == (taken[count - 1] if count else 0)
    assert endurance(residues, block, tokens.size, steps, free) == np.searchsorted(taken, free, side="right")


# An engine -------------------------------------------------------------------------------------------------------


def random_case(rng):
    count = int(rng.integers(3, 25))
    prompt, output = rng.integers(1, 60, count), rng.integers(1, 40, count)
    trace = Trace(np.sort(rng.uniform(0, rng.choice([0.1, 2.0]), count)), prompt, output, observation_time=9.0)
    block, seqs = int(rng.choice([1, 2, 4, 8])), int(rng.integers(1, 8))
    least = 1 + -(-int((prompt + output).max()) // block)
    engine = Engine(
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + int(rng.integers(0, 50)),
        kv_blocks=least + int(rng.integers(0, 2 * least)) if rng.random() < 0.8 else None,
        block_size=block,
        enable_prefix_caching=bool(rng.integers(2)),
        reserve_full_prompt=bool(rng.integers(2)),
        async_scheduling=bool(rng.integers(2)),
        cuda_graph_sizes=None if rng.integers(2) else (),
        step_overhead=float(rng.choice([0.0, 0.001])),
    )
    times = np.sort(rng.uniform(0.01, 0.02, 27)).reshape(3, 3, 3)
    curve = TabulatedTime(
        chunk=(1, 10, 40),
        decodes=(0, 3, 6),
        kv_tokens=(5, 30, 90),
        mixed_seconds=(times + 0.01).tolist(),
        decode_only_seconds=times[0].tolist(),
    )
    return trace, EngineFleet(engine, curve)


def test_an_engine_does_what_one_does_that_walks_through_every_iteration():
    rng = np.random.default_rng(1)
    preempted = 0
    for _ in range(250):
        trace, fleet = random_case(rng)
        first, finished, preemptions = serve(trace, fleet.engine, fleet.curve.grid())
        result = replay(trace, fleet)
        assert result.completed.all()
        np.testing.assert_allclose(result.first_token, first, rtol=1e-9)
        np.testing.assert_allclose(result.finished, finished, rtol=1e-9)
        np.testing.assert_array_equal(result.preemptions, preemptions)
        preempted += preemptions.sum()
        tokens = result.gpus().iloc[0]
        assert tokens["prefill_tokens"] + tokens["decode_tokens"] == (
            (trace.prompt_tokens + trace.output_tokens - 1).sum() + result.recomputed_tokens.sum()
        )
        if fleet.engine.kv_blocks:
            assert tokens["most_kv_blocks"] <= fleet.engine.usable_blocks
    assert preempted > 500  # or memory never bound


def burst(count=60, prompt=200, output=100):
    return Trace(np.linspace(0, 1, count), np.full(count, prompt), np.full(count, output), observation_time=2.0)


def test_a_tighter_engine_is_slower_in_the_way_that_it_is_tighter():
    trace, settings_ = burst(), {"max_num_seqs": 32, "max_num_batched_tokens": 512}
    results = {
        name: replay(trace, EngineFleet(Engine(**(settings_ | change)), AFFINE))
        for name, change in {
            "plain": {},
            "little memory": {"kv_blocks": 250},
            "few requests": {"max_num_seqs": 8},
            "small budget": {"max_num_batched_tokens": 64},
            "no caching": {"kv_blocks": 250, "enable_prefix_caching": False},
        }.items()
    }
    ttft = {name: result.ttft.mean() for name, result in results.items()}
    assert ttft["plain"] < min(ttft[name] for name in ttft if name != "plain")
    assert results["little memory"].preemptions.sum() > 0 == results["plain"].preemptions.sum()
    assert results["no caching"].recomputed_tokens.sum() > results["little memory"].recomputed_tokens.sum()
    assert np.nanmean(results["few requests"].tpot) < np.nanmean(results["plain"].tpot)


def test_requests_that_fit_nowhere_are_refused_and_the_others_served():
    trace = Trace(np.arange(3.0), np.array([100, 400, 100]), np.array([10, 10, 10]))
    result = replay(trace, EngineFleet(Engine(max_num_seqs=4, max_num_batched_tokens=64, kv_blocks=20), AFFINE))
    assert result.refused.tolist() == [False, True, False]
    assert result.completed.tolist() == [True, False, True]
    assert result.summary()["refused"] == 1
    assert "1 refused for memory" in result.caption


def test_the_cost_follows_requests_not_tokens():
    few, many = burst(40), burst(40, prompt=2000, output=1000)
    engines = [EngineFleet(Engine(max_num_seqs=64, max_num_batched_tokens=size), AFFINE) for size in (256, 2560)]
    assert replay(many, engines[1]).events < 1.5 * replay(few, engines[0]).events


@pytest.mark.parametrize("dispatch", ["least-requests", "round-robin"])
def test_a_dispatcher_spreads_requests_and_more_engines_are_faster(dispatch):
    trace = burst(400)
    small, large = (replay(trace, EngineFleet.like(reference_gpu(), gpus=n, dispatch=dispatch)) for n in (2, 8))
    assert large.e2e.mean() < small.e2e.mean()
    per_gpu = np.bincount(large.gpu, minlength=8)
    assert per_gpu.max() - per_gpu.min() <= (0 if dispatch == "round-robin" else 20)


def reference_gpu():
    return fo.reference_model().scenario.gpu_types[0]


# A policy's fleet ------------------------------------------------------------------------------------------------


def in_finer_iterations(policy, factor):
    """The same fleet, for the chain, with `factor` times as many tokens in iterations that are so much shorter."""
    scenario, (gpu,) = policy.scenario, policy.scenario.gpu_types
    shorter = {name: getattr(gpu.curve, name) / factor for name in ("alpha", "beta", "solo")}
    scenario = replace(
        scenario,
        gpu=replace(gpu, curve=replace(gpu.curve, **shorter)),
        classes=tuple(
            replace(each, prompt_tokens=each.prompt_tokens * factor, output_tokens=each.output_tokens * factor)
            for each in scenario.classes
        ),
    )

    def mode(given):
        return None if given is None else replace(given, iteration_time=given.iteration_time / factor)

    roles = tuple(replace(role, prefill=mode(role.prefill), rest=mode(role.rest)) for role in policy.roles)
    return replace(policy, scenario=scenario, roles=roles)


def markovian(policy, horizon, rng):
    """Poisson arrivals with geometric tokens, the exponential law in whole tokens, and their classes."""
    workload = policy.scenario.workload
    rate = workload.arrival_rate * policy.gpus
    count = rng.poisson(rate.sum() * horizon)
    kind = rng.choice(rate.size, count, p=rate / rate.sum())
    prompt = rng.geometric(1 / workload.prompt_tokens[kind])
    output = rng.geometric(1 / (workload.output_tokens[kind] + 1))
    return Trace(np.sort(rng.uniform(0, horizon, count)), prompt, output, observation_time=horizon), kind


def test_markovian_requests_meet_the_exact_chain_under_every_policy():
    horizon, warmup, scores = 20_000.0, 30.0, []
    for number, kind in enumerate([*RULES, "thresholds"]):
        policy = small_policy(kind, 2, number)
        exact = exact_chain(policy).values
        fine = in_finer_iterations(policy, 1000.0)
        seen = []
        for replication in range(10):
            trace, of = markovian(fine, horizon, np.random.default_rng([number, replication]))
            result = replay(trace, fine, classes=of, seed=replication)
            row = []
            for i in range(2):
                started, first, finished = (
                    np.clip(getattr(result, name)[of == i], warmup, horizon)
                    for name in ("started", "first_token", "finished")
                )
                counts = [np.sum((times > warmup) & (times < horizon)) for times in (first, finished)]
                row.append([*counts, np.nansum(first - started)])
            seen.append(np.array(row) / ((horizon - warmup) * policy.gpus))
        expected = np.stack([exact[name] for name in ("admitted", "throughput", "prefill")], axis=1)
        error = np.std(seen, axis=0, ddof=1) / np.sqrt(len(seen))
        scores.append((np.mean(seen, axis=0) - expected) / error)
    # 60 scores of a t law with 9 degrees of freedom, those of a fleet correlated: 8 % beyond 1.96, 0.1 % beyond 4.8
    scores = np.abs(scores)
    assert scores.max() < 5.5
    assert np.mean(scores > 1.96) < 0.2


def azure_like(count=4000, seed=3):
    rng = np.random.default_rng(seed)
    prompt = np.maximum(1, rng.exponential([300, 3000], (count, 2)).astype(int))
    output = np.maximum(1, rng.exponential([600, 150], (count, 2)).astype(int))
    kind = rng.integers(0, 2, count)
    rows = np.arange(count)
    trace = Trace(np.sort(rng.uniform(0, 800, count)), prompt[rows, kind], output[rows, kind], observation_time=800.0)
    return trace, kind


def planned(trace, kind, gpus, *, patience=0.1, name="gate-and-route"):
    classes = [
        fo.WorkloadClass(
            f"class {i}",
            arrival_rate=float((kind == i).sum() / trace.duration / gpus),
            prompt_tokens=float(trace.prompt_tokens[kind == i].mean()),
            output_tokens=float(trace.output_tokens[kind == i].mean() - 1),
            abandonment_rate=patience,
        )
        for i in range(2)
    ]
    model = fo.FluidModel(classes, reference_gpu(), prices=fo.TokenPrices(prompt=0.1, output=0.2))
    return model.solve().policy(gpus=gpus, kind=name)


@pytest.mark.parametrize("kind", [*RULES])
@pytest.mark.parametrize("kv_tokens", [None, 8_000])
def test_every_request_is_accounted_for(kind, kv_tokens):
    trace, of = azure_like()
    trace, of = trace.window(0.0, 150.0), of[trace.arrival_time < 150.0]
    policy = planned(trace, of, 6, name=kind)
    result = replay(trace, policy, classes=of, kv_tokens=kv_tokens, seed=2)
    outcomes = result.completed.astype(int) + result.abandoned + result.refused
    assert np.all(outcomes == 1)
    assert result.completed.sum() > 0.5 * len(trace)
    done = result.completed
    assert np.all(result.started[done] >= trace.arrival_time[done])
    assert np.all(result.first_token[done] > result.started[done])
    assert np.all(result.finished[done] >= result.first_token[done])
    assert np.all(result.tpot[done & (trace.output_tokens > 1)] >= AFFINE.solo * (1 - 1e-9))
    prefilled = np.isfinite(result.first_token)
    tokens = result.gpus()[["prefill_tokens", "decode_tokens"]].to_numpy().sum()
    needed = trace.prompt_tokens[prefilled].sum() + (trace.output_tokens - 1)[done].sum()
    assert tokens == needed + result.recomputed_tokens.sum()
    if kv_tokens:
        assert result.gpus()["most_kv_blocks"].max() <= kv_tokens // 16
        assert result.gpus()["most_kv_tokens"].max() <= kv_tokens
    else:
        assert result.preemptions.sum() == 0


def test_the_seed_alone_decides():
    trace, of = azure_like(1500)
    policy = planned(trace, of, 4)
    one, same, other = (replay(trace, policy, classes=of, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.finished, same.finished)
    assert not np.array_equal(one.finished, other.finished)


def test_patience_is_the_classes_and_can_be_switched_off():
    trace, of = azure_like(3000)
    policy = planned(trace, of, 2)
    assert replay(trace, policy, classes=of).abandoned.sum() > 100
    assert replay(trace, policy, classes=of, patience=False).completed.all()


def test_labels_that_are_class_names_tell_the_classes():
    trace, of = azure_like(500)
    policy = planned(trace, of, 4)
    labelled = replace(trace, label=np.array(["class 0", "class 1"])[of])
    np.testing.assert_array_equal(replay(labelled, policy).finished, replay(trace, policy, classes=of).finished)
    found = classify(trace, 2, abandonment_rate=0.1)
    model = fo.FluidModel(found.workload.per_gpu(4), reference_gpu(), prices=fo.TokenPrices(prompt=0.1, output=0.2))
    result = replay(trace, model.solve().policy(gpus=4), classes=found)
    assert set(result.percentiles().loc["ttft"].index) == {"all", *found.workload.names}


# What is read off --------------------------------------------------------------------------------------------------


def test_latencies_attainment_and_revenue_by_hand():
    trace = Trace(np.array([0.0, 10.0]), np.array([256, 100]), np.array([11, 1]), observation_time=20.0)
    policy = planned(*azure_like(200), 1)
    result = replay(trace, policy, classes=np.array([0, 1]), patience=False)
    mixed = AFFINE.alpha + AFFINE.beta * 256
    np.testing.assert_allclose(result.ttft, [mixed, AFFINE.alpha + AFFINE.beta * 100])
    np.testing.assert_allclose(result.tpot, [AFFINE.solo, np.nan])
    np.testing.assert_allclose(result.e2e, [mixed + 10 * AFFINE.solo, AFFINE.alpha + AFFINE.beta * 100])
    assert result.attainment(ttft=0.03) == 0.5
    assert result.attainment(tpot=0.021) == 0.5
    assert result.attainment(ttft=1.0, tpot=0.023) == 1.0
    assert result.revenue == pytest.approx(0.1 * 356 + 0.2 * 10)
    assert result.revenue_rate == pytest.approx(result.revenue / 20.0)
    assert result.summary()["utilisation"] == pytest.approx(result.e2e.sum() / result.makespan)
    for text in (repr(result), result._repr_html_()):
        assert "2 requests" in text
    assert result.to_frame()["class"].tolist() == ["class 0", "class 1"]


def test_separate_charging_pays_a_prompt_when_it_is_done():
    trace, of = azure_like(3000)
    bundled = planned(trace, of, 2)
    separate = replace(bundled, scenario=replace(bundled.scenario, charging="separate"))
    one, other = (replay(trace, policy, classes=of) for policy in (bundled, separate))
    np.testing.assert_array_equal(one.finished, other.finished)
    until = trace.duration
    prompts = 0.1 * trace.prompt_tokens[other.first_token <= until].sum()
    outputs = 0.2 * (trace.output_tokens - 1)[other.finished <= until].sum()
    assert other.revenue_rate == pytest.approx((prompts + outputs) / until / 2)
    assert other.revenue_rate > one.revenue_rate
    assert other.revenue > one.revenue


def test_a_class_held_back_for_ever_did_not_give_up():
    trace, of = azure_like(200)
    policy = planned(trace, of, 2)
    held = replace(policy, kind="thresholds", gate=Gate(rule="priority", hold={"class 0": 1e9}))
    result = replay(trace, held, classes=of, patience=False)
    np.testing.assert_array_equal(result.unserved, of == 0)
    assert not result.abandoned.any()
    assert f"{(of == 0).sum()} never taken up" in result.caption


def test_a_request_is_refused_only_where_it_may_not_fit():
    trace, of = azure_like(300)
    policy = planned(trace, of, 4)
    alone = Trace(np.zeros(2), np.array([32, 32]), np.array([1, 2]))
    result = replay(alone, policy, classes=np.zeros(2, dtype=int), kv_tokens=32)
    assert result.refused.tolist() == [False, True]
    assert np.isnan(result.summary()["revenue_rate"])  # at one instant there is no rate


@cache
def two_class_case():
    trace, of = azure_like(50)
    return trace, planned(trace, of, 1)


def replay_policy(**changes):
    trace, policy = two_class_case()
    return replay(trace, policy, **({"classes": np.zeros(len(trace), dtype=int)} | changes))


def replay_engine(*, engine=None, **changes):
    fleet = EngineFleet.like(reference_gpu())
    return replay(two_class_case()[0], fleet if engine is None else replace(fleet, engine=engine), **changes)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: replay("trace.csv", None), "trace must be a Trace; got str"),
        (lambda: replay(two_class_case()[0], "GG-SP"), "fleet must be a Policy or an EngineFleet; got str"),
        (lambda: replay_policy(classes=None), "give classes="),
        (lambda: replay_policy(classes=np.zeros(3, dtype=int)), "class numbers from 0 to 1; got shape"),
        (lambda: replay_policy(classes=np.full(50, 2)), "class numbers from 0 to 1"),
        (lambda: replay_policy(seed=-1), "seed must be a whole number"),
        (lambda: replay_policy(kv_tokens=15), "kv_tokens must be a whole number of at least 16"),
        (lambda: replay_policy(patience="no"), "patience must be True or False"),
        (lambda: replay_policy(prices=3.0), "prices must be TokenPrices"),
        (lambda: replay_policy(classes=classify(two_class_case()[0], 3)), "the Classification that the policy's"),
        (lambda: replay_engine(engine=Engine(max_num_seqs=10**9, max_num_batched_tokens=10**9)), "GiB of memory"),
        (lambda: replay_policy(kv_tokens={"a": 5}), "not a GPU type"),
        (lambda: replay_engine(kv_tokens=5), "go with a policy"),
        (lambda: replay_engine().attainment(), "give ttft, tpot or both"),
        (lambda: replay_engine().attainment(ttft=-1), "positive number of seconds"),
        (lambda: replay_engine().against_measured(), "no measured times"),
        (lambda: Engine(max_num_seqs=9, max_num_batched_tokens=8), "at least max_num_seqs"),
        (lambda: Engine(max_num_seqs=9, max_num_batched_tokens=9, kv_blocks=1), "at least 2"),
        (lambda: read_engine("nowhere.json"), "cannot read 'nowhere.json'"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(fo.InvalidInput, match=match):
        call()


def test_an_engine_is_read_from_the_settings_it_was_started_with(tmp_path):
    path = tmp_path / "meta.json"
    settings_ = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "enable_prefix_caching": False, "dtype": "auto"}
    path.write_text(json.dumps({"engine_kwargs": settings_, "kv_cache": {"num_gpu_blocks": 99, "block_size": 32}}))
    engine = read_engine(path)
    assert engine == Engine(
        max_num_seqs=8, max_num_batched_tokens=512, kv_blocks=99, block_size=32, enable_prefix_caching=False
    )
    for text, match in (("[]", "must hold a JSON object"), ("{}", "no max_num_seqs"), ("{", "cannot read")):
        path.write_text(text)
        with pytest.raises(fo.InvalidInput, match=match):
            read_engine(path)


# A real engine ---------------------------------------------------------------------------------------------------


def served_by_vllm():
    from fluidopt.calibration import fit_iteration_time, read_iteration_times

    folder = DATA / "vllm-rtxpro6000"
    curve = fit_iteration_time(read_iteration_times(folder / "iteration_times.csv"), form="table").curve
    return fo.read_trace(folder / "requests.jsonl"), EngineFleet(read_engine(folder / "meta.json"), curve)


@recorded
def test_a_table_of_iteration_times_alone_predicts_what_vllm_really_did():
    trace, fleet = served_by_vllm()
    assert fleet.engine.step_overhead == 0.0
    result = replay(trace, fleet)
    error = result.against_measured()["error"].abs()
    limits = {
        ("ttft", "mean"): 0.08,
        ("ttft", "p50"): 0.13,
        ("ttft", "p90"): 0.13,
        ("tpot", "mean"): 0.035,
        ("tpot", "p50"): 0.035,
        ("tpot", "p90"): 0.035,
        ("e2e", "mean"): 0.05,
        ("makespan", "last"): 0.04,
        ("each e2e", "median"): 0.04,
    }
    assert all(error[key] < limit for key, limit in limits.items()), error
    # a second route to the same prediction: the engine that walks through every iteration
    first, finished, _ = serve(trace, fleet.engine, fleet.curve.grid())
    np.testing.assert_allclose(result.first_token, first, rtol=1e-9)
    np.testing.assert_allclose(result.finished, finished, rtol=1e-9)


@recorded
def test_one_constant_fitted_on_every_other_request_predicts_the_rest():
    trace, fleet = served_by_vllm()
    even = np.arange(len(trace)) % 2 == 0
    fitted = fit_step_overhead(trace, fleet, which=even)
    assert 0.0002 < fitted.engine.step_overhead < 0.002
    error = replay(trace, fitted).against_measured(~even)["error"].abs()
    limits = {("ttft", "mean"): 0.02, ("tpot", "mean"): 0.01, ("e2e", "mean"): 0.01, ("makespan", "last"): 0.01}
    assert all(error[key] < limit for key, limit in limits.items()), error


@recorded
def test_the_azure_requests_on_fifty_gpus_are_replayed_faster_than_50_000_a_second():
    folder = DATA / "azure"
    trace = fo.read_trace([folder / f"AzureLLMInferenceTrace_{name}.csv" for name in ("code", "conv")])
    found = classify(trace, 5, abandonment_rate=0.05)
    model = fo.FluidModel(found.workload.per_gpu(50), reference_gpu(), prices=fo.TokenPrices(prompt=0.1, output=0.2))
    policy = model.solve().policy(gpus=50)
    replay(trace.window(0, 10), policy, classes=found.assignment[trace.arrival_time < 10])  # compiles
    begin = time.perf_counter()
    result = replay(trace, policy, classes=found)
    assert len(trace) / (time.perf_counter() - begin) > 50_000
    assert result.events < 8 * len(trace)
