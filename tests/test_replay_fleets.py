"""The replay of policies: against a fleet that walks through every iteration of every GPU."""

import sys

import numpy as np
import pytest
from fleet_by_steps import BLOCK, FleetBySteps

import fluidopt as fo
from fluidopt.contention import Mode
from fluidopt.curves import LinearTime, TabulatedTime
from fluidopt.policy.rules import Gate, Policy, Role, Router, Targets
from fluidopt.serving import Engine, EngineFleet, events, replay
from fluidopt.traces import Trace

CASES = 200


def random_curve(rng):
    alpha, beta, solo = rng.uniform(0.005, 0.02), rng.uniform(1e-4, 1e-3), rng.uniform(0.01, 0.02)
    form = rng.integers(4)
    if form == 0:
        return fo.IterationTime(alpha=alpha, beta=beta, solo=solo, physical=bool(rng.integers(2)))
    if form == 1:
        rates = dict(zip(("per_decode", "per_kv_token", "solo_per_kv_token"), rng.uniform(0, 1e-4, 3), strict=True))
        return LinearTime(alpha=alpha, beta=beta, solo=solo, solo_per_decode=1e-3, **rates)
    shape = (2, 1, 1) if form == 2 else (3, 2, 3)
    axes = [tuple(np.cumsum(rng.integers(1, 30, size)).tolist()) for size in shape]
    table = np.sort(rng.uniform(0.01, 0.02, np.prod(shape))).reshape(shape)
    return TabulatedTime(
        chunk=axes[0],
        decodes=axes[1],
        kv_tokens=axes[2],
        mixed_seconds=(table + 0.005).tolist(),
        decode_only_seconds=table[0].tolist(),
    )


def random_policy(rng, *, most_gpus=2):
    """Up to three roles on up to three types of GPU, under any gate and any router."""
    classes = [
        fo.WorkloadClass(name, arrival_rate=1.0, prompt_tokens=40, output_tokens=20, abandonment_rate=rate)
        for name, rate in zip("abc"[: rng.integers(1, 4)], rng.choice([0.0, 0.5, 3.0], 3), strict=False)
    ]
    names = [each.name for each in classes]
    count = int(rng.integers(1, 4))
    types = tuple(
        fo.GPU(
            random_curve(rng),
            batch_size=8,
            chunk_size=int(rng.integers(1, 40)),
            name=f"type {k}",
            kv_tokens=50,
            share=1 / count,
        )
        for k in range(count)
    )
    rule = str(rng.choice(["preference", "shares", "weighted-shares", "stay"]))
    prefills = rng.random(int(rng.integers(1, 4))) < (2.0 if rule == "stay" else 0.5)
    prefills[rng.integers(prefills.size)] = True
    roles = []
    for k, prefill in enumerate(prefills):
        gpu, decode_slots = types[rng.integers(len(types))], int(rng.integers(1, 5))
        roles.append(
            Role(
                f"role {k}",
                gpu=gpu.name,
                gpus=int(rng.integers(1, most_gpus + 1)),
                prefill=Mode("p", chunk=int(rng.integers(1, 60)), decode_slots=1, iteration_time=1.0)
                if prefill
                else None,
                rest=Mode("d", decode_slots=1, iteration_time=1.0),
                decode_slots=decode_slots,
                slots=decode_slots + int(rule != "stay" and rng.integers(2)),
            )
        )
    rows = rng.uniform(0.1, 1.0, (2, len(classes)))
    by_role = {role.name: tuple(rng.uniform(0, 1, len(classes)) * rng.integers(0, 2, len(classes))) for role in roles}
    gate = str(rng.choice(["occupancy", "queue-deviation", "priority", "first-come"]))
    held = {name: float(rng.integers(-3, 3)) for name in names if rng.random() < 0.4}
    return Policy(
        kind="thresholds",
        gpus=sum(role.gpus for role in roles),
        scenario=fo.Scenario(classes=tuple(classes), gpu=types, prices=fo.TokenPrices(prompt=0.1, output=0.2)),
        roles=tuple(roles),
        targets=Targets(
            prefill=tuple(rows[0] * rng.integers(0, 2, len(classes))),
            decode=tuple(rows[1]),
            prefill_queue=tuple(rows[1] * rng.integers(0, 2)),
            decode_queue=tuple(rows[1]),
            admitted=tuple(rows[0]),
            throughput=tuple(rows[0]),
            role_prefill=dict.fromkeys(by_role, 0.0),
            role_decode=dict.fromkeys(by_role, 0.0),
            decode_by_role=by_role,
        ),
        gate=Gate(
            rule=gate,
            placement=str(rng.choice(["uniform", "fewest-decodes"])),
            order=tuple(rng.permutation(names).tolist()) if gate == "priority" else (),
            hold=held if gate != "first-come" else {},
            before_decodes=bool(rule != "stay" and rng.integers(2)),
        ),
        router=Router(order=tuple(rng.permutation([role.name for role in roles]).tolist()), rule=rule),
        revenue_bound=1.0,
    )


def random_case(seed):
    rng = np.random.default_rng(seed)
    policy = random_policy(rng)
    count = int(rng.integers(5, 30))
    prompt, output = rng.integers(1, 90, count), rng.integers(1, 30, count)
    trace = Trace(np.sort(rng.uniform(0, rng.choice([0.3, 3.0]), count)), prompt, output, observation_time=9.0)
    kind = rng.integers(0, len(policy.scenario.classes), count)
    kv_tokens = {gpu.name: int(rng.integers(96, 200)) for gpu in policy.scenario.gpu_types if rng.random() < 0.7}
    return trace, policy, kind, kv_tokens


def least_draws():
    """A generator that draws 0 for ever, so that it does not matter how often one asks it."""
    bits = np.random.MT19937()
    bits.state = {"bit_generator": "MT19937", "state": {"key": np.zeros(624, dtype=np.uint32), "pos": 624}}
    return np.random.Generator(bits)


@pytest.fixture
def draws_alike(monkeypatch):
    module = sys.modules[replay.__module__]

    def advance(fleet, state, curves, rng, most):  # noqa: ARG001
        return events.advance(fleet, state, curves, least_draws(), most)

    monkeypatch.setattr(module, "advance", advance)


def patience(policy, kind, seed):
    """What the replay draws for the requests: the second of the streams of the seed."""
    rate = policy.scenario.workload.abandonment_rate[kind]
    drawn = np.random.default_rng(seed).spawn(2)[1].exponential(size=kind.size)
    return np.divide(drawn, rate, out=np.full(kind.size, np.inf), where=rate > 0)


def by_steps(trace, policy, kind, kv_tokens, seed):
    limits = {gpu.name: kv_tokens.get(gpu.name, 0) for gpu in policy.scenario.gpu_types}
    refused = np.zeros(len(trace), dtype=bool)
    for role in policy.roles:
        if role.gpus and limits[role.gpu]:
            held = trace.prompt_tokens + (trace.output_tokens - 1 if role.decode_slots else 0)
            refused |= held > limits[role.gpu] // BLOCK * BLOCK
    return FleetBySteps(
        trace,
        policy,
        kind,
        kv_tokens=limits,
        patience=patience(policy, kind, seed),
        refused=refused,
        rng=least_draws(),
    )


@pytest.mark.usefixtures("draws_alike")
def test_a_fleet_does_what_one_does_that_walks_through_every_iteration():
    compared = preempted = abandoned = refused = 0
    for seed in range(CASES):
        trace, policy, kind, kv_tokens = random_case(seed)
        steps = by_steps(trace, policy, kind, kv_tokens, seed)
        if steps.tied:
            continue
        result = replay(trace, policy, classes=kind, kv_tokens=kv_tokens, seed=seed)
        for name in ("started", "first_token", "finished"):
            np.testing.assert_allclose(getattr(result, name), getattr(steps, name), rtol=1e-9)
        for name in ("preemptions", "refused", "gpu"):
            np.testing.assert_array_equal(getattr(result, name), getattr(steps, name))
        np.testing.assert_array_equal(result.recomputed_tokens, steps.worked - steps.computed)
        for name in ("iterations", "prefill_tokens", "decode_tokens"):
            np.testing.assert_array_equal(result.gpu_columns[name], [getattr(gpu, name) for gpu in steps.gpus])
        np.testing.assert_allclose(result.gpu_columns["busy"], [gpu.busy for gpu in steps.gpus], rtol=1e-9)
        compared += 1
        preempted += steps.preemptions.sum()
        abandoned += steps.abandoned.sum()
        refused += steps.refused.sum()
    assert compared > 0.85 * CASES
    assert min(preempted, abandoned, refused) > CASES / 8  # or nothing was tight


def extremes(rng):
    """Requests of one token and of very many, all at once or in groups, and limits that hardly hold one of them."""
    count = int(rng.choice([1, 3, 300]))
    arrival = np.sort(rng.choice([np.zeros(count), rng.integers(0, 4, count), rng.uniform(0, 1, count)]))
    prompt, output = (
        (np.ones(count, dtype=int), np.ones(count, dtype=int)),
        (rng.integers(1, 10**6, count), rng.integers(1, 3, count)),
        (rng.integers(1, 40, count), rng.integers(1, 2000, count)),
        (rng.integers(14, 18, count), rng.integers(1, 35, count)),  # about a block
    )[rng.integers(4)]
    longest = int((prompt + output).max())
    kv_tokens = max(16, int(rng.choice([17, 40, longest // 2, longest + 15, 3 * longest])))
    return Trace(arrival - arrival[0], prompt, output, observation_time=9.0), kv_tokens


def assert_accounted_for(trace, result):
    """Every request has one outcome, its times are in order, and every token that was computed is somebody's."""
    outcomes = result.completed.astype(int) + result.abandoned + result.refused
    held = isinstance(result.fleet, Policy) and bool(result.fleet.gate.hold)
    assert np.all((outcomes == 1) | (held & (outcomes == 0) & np.isnan(result.started)))
    started, first, done = np.isfinite(result.started), np.isfinite(result.first_token), result.completed
    assert np.all(done <= first)
    assert np.all(first <= started)
    assert not np.any(started & result.refused)
    assert np.all(result.started[started] >= trace.arrival_time[started])
    assert np.all(result.first_token[first] > result.started[first])
    longer = done & (trace.output_tokens > 1)
    assert np.all(result.finished[longer] > result.first_token[longer])
    np.testing.assert_array_equal(result.finished[done & ~longer], result.first_token[done & ~longer])
    needed = trace.prompt_tokens[first].sum() + (trace.output_tokens - 1)[done].sum()
    worked = result.gpu_columns["prefill_tokens"].sum() + result.gpu_columns["decode_tokens"].sum()
    assert worked == needed + result.recomputed_tokens.sum()
    assert np.all(result.recomputed_tokens >= 0)
    # Arrivals, and boundaries at which a request starts, gets a token, ends or loses its place: few for each.
    assert result.events <= 8 * (len(trace) + result.preemptions.sum()) + 40


def test_extreme_requests_are_accounted_for_under_any_policy():
    for seed in range(300):
        rng = np.random.default_rng([1, seed])
        trace, kv_tokens = extremes(rng)
        policy = random_policy(rng, most_gpus=int(rng.choice([1, 2, 20])))
        kind = rng.integers(0, len(policy.scenario.classes), len(trace))
        result = replay(trace, policy, classes=kind, kv_tokens=kv_tokens, seed=seed)
        assert_accounted_for(trace, result)
        assert result.gpu_columns["most_kv_blocks"].max() <= kv_tokens // BLOCK
        assert result.gpu_columns["most_kv_tokens"].max() <= kv_tokens


def test_extreme_requests_are_accounted_for_by_any_engine():
    for seed in range(300):
        rng = np.random.default_rng([2, seed])
        trace, kv_tokens = extremes(rng)
        block, most = int(rng.choice([1, 3, 16])), int(rng.choice([1, 2, 64]))
        engine = Engine(
            max_num_seqs=most,
            max_num_batched_tokens=most + int(rng.choice([0, 1, 5000])),
            kv_blocks=1 + -(-kv_tokens // block),
            block_size=block,
            enable_prefix_caching=bool(rng.integers(2)),
            reserve_full_prompt=bool(rng.integers(2)),
            async_scheduling=bool(rng.integers(2)),
        )
        dispatch = str(rng.choice(["least-requests", "round-robin"]))
        fleet = EngineFleet(engine, random_curve(rng), gpus=int(rng.choice([1, 3, 100])), dispatch=dispatch)
        result = replay(trace, fleet)
        assert_accounted_for(trace, result)
        assert not result.abandoned.any()
        assert result.gpu_columns["most_kv_blocks"].max() <= engine.usable_blocks


def test_the_cost_follows_requests_where_a_prompt_just_fits():
    trace = Trace(np.zeros(1), np.array([10**6]), np.array([5]), observation_time=1.0)
    engine = Engine(max_num_seqs=32, max_num_batched_tokens=256, kv_blocks=1 + -(-(10**6 + 5) // 16))
    result = replay(trace, EngineFleet(engine, fo.IterationTime(alpha=0.0174, beta=6.2e-5, solo=0.022)))
    assert result.completed.all()
    assert result.events < 20


def test_a_prompt_that_starts_over_ten_thousand_times_is_counted_in_full():
    trace = Trace(np.zeros(2), np.array([50_000, 1_100_000]), np.array([20_000, 2]), observation_time=1.0)
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 1_000_000, "reserve_full_prompt": False}
    engine = Engine(**settings, kv_blocks=1_100_011, block_size=1, enable_prefix_caching=False)
    result = replay(trace, EngineFleet(engine, fo.IterationTime(alpha=0.0174, beta=6.2e-5, solo=0.022)))
    assert_accounted_for(trace, result)
    assert result.recomputed_tokens.max() > 2**32  # its first chunk fits beside the other request, its second does not
