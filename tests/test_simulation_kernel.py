"""The compiled chain simulator against exact chains, queueing formulas, the plain direct method, and itself."""

import importlib
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from small_fleets import two_classes

from fluidopt.simulation.run import EventLimitExceeded, WaitingLimitExceeded, simulate
from fluidopt.simulation.system import Start, System


@pytest.fixture(scope="module")
def baseline():
    return importlib.import_module("benchmarks.plain_gillespie")


def small_system(**changes):
    """A mixed GPU with two slots and a decode-only GPU with two, under a heavier load."""
    load = {"arrival_rate": [0.9, 0.7], "prompt_tokens": [0.5, 1.4], "output_tokens": [1.5, 0.6]}
    return two_classes(**(load | changes))


def unpartitioned(**changes):
    """Two identical GPUs with two slots for anything."""
    one_role = {
        "role_gpus": [2],
        "role_prefill_mode": [0],
        "role_rest_mode": [1],
        "role_decode_slots": [2],
        "role_slots": [2],
        "router_order": [0],
    }
    return small_system(**(one_role | changes))


def three_roles(**changes):
    """A mixed GPU without partition, a prefill-only GPU that rests idle, a decode-only GPU."""
    roles = {
        "mode_chunk": [1.0, 0.0, 2.0, 0.0],
        "mode_time": [1.6, 1.0, 2.5, np.nan],
        "role_gpus": [1, 1, 1],
        "role_prefill_mode": [0, 2, -1],
        "role_rest_mode": [1, 3, 1],
        "role_decode_slots": [2, 0, 1],
        "role_slots": [2, 1, 1],
        "router_order": [2, 0, 1],
    }
    return small_system(**(roles | changes))


def run(system, *, seed=1, start=None, horizon=200.0, warmup=20.0, **options):
    rng = np.random.default_rng(seed)
    return simulate(system, start or Start.empty(system), horizon=horizon, warmup=warmup, rng=rng, **options)


def replications(system, count, *, seed=1, **options):
    return [run(system, seed=child, **options) for child in np.random.SeedSequence(seed).spawn(count)]


def assert_mean(values, expected, confidence=0.999):
    """Every column's mean lies within its confidence interval around the expected value."""
    values = np.asarray(values, dtype=float).reshape(len(values), -1)
    expected = np.ravel(expected)
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    allowed = stats.t.ppf(0.5 + confidence / 2, len(values) - 1) * error + 1e-12
    gap = np.abs(values.mean(axis=0) - expected)
    assert np.all(gap <= allowed), f"mean {values.mean(axis=0)}, expected {expected}, standard error {error}"


# What is refused


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"arrival_rate": [-1.0, 1.0]}, r"'arrival_rate\[0\]' parameter of System must be >= 0. Got -1.0"),
        ({"arrival_rate": [np.nan, 1.0]}, "'arrival_rate' parameter of System must be finite"),
        ({"prompt_tokens": [1.0]}, r"'prompt_tokens' parameter of System must be an array of shape \(2,\)"),
        ({"prompt_tokens": ["a", "b"]}, "'prompt_tokens' .* an array of numbers"),
        ({"output_tokens": [1.0, 0.0]}, r"'output_tokens\[1\]' .* > 0"),
        ({"abandonment_rate": [0.0, -0.1]}, r"'abandonment_rate\[1\]' .* >= 0"),
        ({"mode_time": [0.0, 1.0]}, r"'mode_time\[0\]' .* > 0, or nan"),
        ({"role_gpus": [0, 0]}, "'role_gpus' .* between 1"),
        ({"role_gpus": [1, -1]}, r"'role_gpus\[1\]' .* >= 0"),
        ({"role_gpus": [1.5, 1.0]}, "'role_gpus' .* an array of integers"),
        ({"role_prefill_mode": [2, -1]}, r"'role_prefill_mode\[0\]' .* a mode or -1"),
        ({"role_prefill_mode": [1, -1]}, "'role_prefill_mode' .* a chunk and an iteration time"),
        ({"role_rest_mode": [1, 2]}, r"'role_rest_mode\[1\]' .* a mode"),
        ({"role_rest_mode": [1, 0]}, "'role_rest_mode' .* without a prefill chunk"),
        ({"mode_time": [1.0, np.nan]}, "'role_rest_mode' .* iteration time where role_decode_slots > 0"),
        ({"role_decode_slots": [-1, 2]}, r"'role_decode_slots\[0\]' .* >= 0"),
        ({"role_slots": [2, 1]}, r"'role_slots\[1\]' .* at least role_decode_slots"),
        ({"router_order": [1, 1]}, "'router_order' .* each role once"),
        ({"placement": 2}, "'placement' .* 0 .uniform. or 1"),
        ({"arrival_rate": [], "gate_slope": []}, "at least one class"),
    ],
)
def test_system_refuses(changes, match):
    if changes.get("arrival_rate") == []:
        empty = ("arrival_rate", "prompt_tokens", "output_tokens", "abandonment_rate", "gate_slope", "gate_base")
        changes = {name: np.zeros(0) for name in (*empty, "gate_queue_target", "prefill_reward", "decode_reward")}
    with pytest.raises(ValueError, match=match):
        small_system(**changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prefill": [1, 2]}, r"'prefill' parameter of Start must be an array of shape \(roles, classes\)"),
        ({"decode": [[1, 0]]}, r"'decode' parameter of Start must be an array of shape \(2, 2\)"),
        ({"decode_queue": [-1, 0]}, r"'decode_queue\[0\]' parameter of Start must be >= 0"),
        ({"prefill": [[1, 1], [0, 0]]}, "'prefill' .* at most 1 prefills in service in role 0. Got 2"),
        ({"prefill": [[0, 0], [1, 0]]}, "'prefill' .* at most 0 prefills in service in role 1. Got 1"),
        ({"decode": [[0, 0], [2, 1]]}, "'decode' .* at most 2 decodes in service in role 1, .* Got 3"),
    ],
)
def test_start_refuses(changes, match):
    empty = {"prefill_queue": [0, 0], "decode_queue": [0, 0], "prefill": np.zeros((2, 2), int)}
    empty["decode"] = empty["prefill"]
    with pytest.raises(ValueError, match=match):
        run(small_system(), start=Start(**(empty | changes)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"horizon": np.inf}, "'horizon' parameter of simulate must be finite"),
        ({"horizon": 0.0}, "'horizon' .* > 0"),
        ({"warmup": 200.0}, r"'warmup' .* in \[0, horizon=200.0\)"),
        ({"max_events": 0}, "'max_events' .* >= 1"),
        ({"max_waiting": 0}, "'max_waiting' .* between 1"),
        ({"samples": 1}, "'samples' .* 0, or at least 2"),
    ],
)
def test_simulate_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        run(small_system(), **options)


def test_simulate_refuses_what_is_not_a_generator_or_does_not_fit():
    system = small_system()
    with pytest.raises(ValueError, match=r"'rng' .* a numpy Generator"):
        simulate(system, Start.empty(system), horizon=1.0, warmup=0.0, rng=np.random.RandomState(1))
    with pytest.raises(ValueError, match=r"'start.prefill' .* of shape \(roles, classes\) = \(1, 2\)"):
        run(unpartitioned(), start=Start.empty(system))
    crowd = Start(**(vars(Start.empty(system)) | {"prefill_queue": [9, 9]}))
    with pytest.raises(ValueError, match=r"'max_waiting' .* at least the 18 requests waiting at the start"):
        run(system, start=crowd, max_waiting=10)


def test_unbounded_queues_stop_with_the_limit_named():
    overloaded = small_system(abandonment_rate=[0.0, 0.0], arrival_rate=[50.0, 0.1])
    with pytest.raises(WaitingLimitExceeded, match=r"max_waiting=1000 .* of class 0 .*abandonment_rate 0.0"):
        run(overloaded, horizon=1e4, max_waiting=1000)
    with pytest.raises(WaitingLimitExceeded, match=r"max_waiting=3 "):
        run(overloaded, horizon=1e4, max_waiting=3)
    with pytest.raises(EventLimitExceeded, match=r"max_events at time .* Raise max_events"):
        run(small_system(), horizon=1e6, warmup=1e3, max_events=10_000)


# Bookkeeping


def random_system(seed):
    rng = np.random.default_rng(seed)
    classes, roles = int(rng.integers(1, 8)), int(rng.integers(1, 5))
    decode_slots = rng.integers(0, 5, roles)
    prefills = rng.random(roles) < 0.6
    prefills[rng.integers(roles)] = True
    idle = (decode_slots == 0) & (rng.random(roles) < 0.7)
    slots = np.maximum(decode_slots + rng.integers(0, 2, roles), prefills)
    patient = rng.random(classes) < 0.3
    return System(
        arrival_rate=rng.uniform(0.0, 3.0, classes),
        prompt_tokens=np.exp(rng.uniform(-3, 1, classes)),
        output_tokens=np.exp(rng.uniform(-3, 1, classes)),
        abandonment_rate=np.where(patient, 0.0, np.exp(rng.uniform(-3, 1, classes))),
        mode_chunk=np.array([1.0, 2.0, 0.0, 0.0]),
        mode_time=np.array([1.3, 0.7, 1.0, np.nan]),
        role_gpus=rng.integers(0, 5, roles) + (prefills | (decode_slots > 0)),
        role_prefill_mode=np.where(prefills, rng.integers(0, 2, roles), -1),
        role_rest_mode=np.where(idle, 3, 2),
        role_decode_slots=decode_slots,
        role_slots=slots,
        gate_slope=rng.uniform(0, 2, classes) * rng.integers(0, 2, classes),
        gate_base=rng.integers(0, 2, classes).astype(float),
        gate_queue_target=rng.uniform(0, 2, classes),
        router_order=rng.permutation(roles),
        placement=int(rng.integers(2)),
        prefill_reward=rng.uniform(0, 1, classes),
        decode_reward=rng.uniform(0, 1, classes),
    )


def random_start(system, seed):
    rng = np.random.default_rng(seed)
    prefill = np.zeros((system.roles, system.classes), dtype=int)
    decode = np.zeros_like(prefill)
    even = np.full(system.classes, 1.0 / system.classes)
    for r in range(system.roles):
        gpus, slots = system.role_gpus[r], system.role_slots[r]
        running = int(rng.integers(0, gpus + 1)) if system.role_prefill_mode[r] >= 0 else 0
        beside, alone = min(system.role_decode_slots[r], slots - 1), system.role_decode_slots[r]
        prefill[r] = rng.multinomial(running, even)
        decode[r] = rng.multinomial(rng.integers(0, running * beside + (gpus - running) * alone + 1), even)
    queues = rng.integers(0, 30, (2, system.classes))
    return Start(prefill_queue=queues[0], decode_queue=queues[1], prefill=prefill, decode=decode)


def assert_balance(seen):
    first, last = seen.at_start, seen.at_end
    change = {name: getattr(last, name) - getattr(first, name) for name in vars(first)}
    prefill_starts, decode_starts = seen.prefill_starts.sum(axis=0), seen.decode_starts.sum(axis=0)
    np.testing.assert_array_equal(seen.arrivals, prefill_starts + seen.abandoned_prefill + change["prefill_queue"])
    np.testing.assert_array_equal(prefill_starts, seen.prefill_completions + change["prefill"].sum(axis=0))
    np.testing.assert_array_equal(
        seen.prefill_completions, decode_starts + seen.abandoned_decode + change["decode_queue"]
    )
    np.testing.assert_array_equal(decode_starts, seen.decode_completions + change["decode"].sum(axis=0))
    left = seen.prefill_completions + seen.decode_completions + seen.abandoned_prefill + seen.abandoned_decode
    assert seen.events == seen.arrivals.sum() + left.sum()


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_flows_balance_and_caps_hold_on_random_systems(seed):
    system = random_system(seed)
    seen = run(system, seed=seed, start=random_start(system, seed), horizon=60.0, warmup=7.0, samples=50)
    assert_balance(seen)
    assert np.all(seen.most_decodes <= system.role_decode_slots)
    assert np.all(seen.most_requests <= system.role_slots)
    path = seen.trajectory
    for name, value in vars(path).items():
        assert np.all(value >= 0), name
    assert np.all(path.prefill.sum(axis=2) <= np.where(system.role_prefill_mode >= 0, system.role_gpus, 0))
    assert np.all(path.decode.sum(axis=2) <= system.role_gpus * system.role_decode_slots)
    busy = path.prefill.sum(axis=2) + path.decode.sum(axis=2)
    assert np.all(busy <= system.role_gpus * system.role_slots)
    for name in ("prefill_queue_time", "decode_queue_time", "prefill_time", "decode_time"):
        assert np.all(getattr(seen, name) >= -1e-9), name
    assert np.all(seen.prefilling_gpu_time <= seen.window * system.role_gpus + 1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_nobody_waits_beside_a_free_slot(seed):
    system = random_system(seed)
    # with a slot for the prefill apart from those for decodes, totals per role tell which slots are free
    slots = system.role_decode_slots + (system.role_prefill_mode >= 0)
    system = replace(system, role_slots=slots)
    path = run(system, seed=seed, start=random_start(system, seed), horizon=60.0, warmup=0.0, samples=300).trajectory
    room = np.sum(system.role_gpus * system.role_decode_slots) - path.decode.sum(axis=(1, 2))
    assert not np.any((room > 0) & (path.decode_queue.sum(axis=1) > 0))
    idle = np.sum(system.role_gpus[system.role_prefill_mode >= 0]) - path.prefill.sum(axis=(1, 2))
    assert not np.any((idle > 0) & (path.prefill_queue.sum(axis=1) > 0))


@pytest.mark.parametrize("build", [small_system, unpartitioned, three_roles])
def test_a_path_depends_on_the_seed_alone(build):
    system = build()
    first, again, other = run(system, seed=5), run(system, seed=5), run(system, seed=6)
    for name in ("arrivals", "decode_completions", "prefill_time", "decode_time", "expected_reward", "events"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert first.expected_reward != other.expected_reward
    watched = run(system, seed=5, samples=1001)
    np.testing.assert_array_equal(first.decode_time, watched.decode_time)
    early = run(system, seed=5, warmup=0.0)
    np.testing.assert_array_equal(early.at_end.decode, first.at_end.decode)
    assert np.all(early.arrivals >= first.arrivals)


def test_integrals_are_those_of_the_path():
    system = three_roles()
    seen = run(system, horizon=50.0, warmup=0.0, samples=20_001)
    path = seen.trajectory
    np.testing.assert_array_equal(path.time, np.linspace(0.0, 50.0, 20_001))
    for name in ("prefill_queue", "decode_queue", "prefill", "decode"):
        integral = getattr(path, name)[:-1].mean(axis=0) * 50.0
        np.testing.assert_allclose(getattr(seen, name + "_time"), integral, atol=0.15)
        np.testing.assert_array_equal(getattr(path, name)[0], getattr(seen.at_start, name))
        np.testing.assert_array_equal(getattr(path, name)[-1], getattr(seen.at_end, name))


def test_windows_of_one_path_add_up():
    system = unpartitioned()
    whole, late = run(system, warmup=0.0, horizon=100.0), run(system, warmup=60.0, horizon=100.0)
    early = run(system, warmup=0.0, horizon=60.0)
    for name in ("arrivals", "decode_starts", "abandoned_decode", "prefill_time", "decode_queue_time", "reward"):
        both = getattr(early, name) + getattr(late, name)
        np.testing.assert_allclose(getattr(whole, name), both, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.expected_reward, early.expected_reward + late.expected_reward, rtol=1e-9)


def test_a_start_is_spread_and_settled():
    system = small_system(role_gpus=[3, 4], role_decode_slots=[15, 16], role_slots=[16, 16])
    start = Start(prefill_queue=[5, 0], decode_queue=[0, 0], prefill=[[1, 0], [0, 0]], decode=[[4, 3], [9, 6]])
    seen = run(system, start=start, horizon=1e-9, warmup=0.0)
    np.testing.assert_array_equal(seen.at_start.decode, start.decode)
    np.testing.assert_array_equal(seen.most_decodes, [3, 4])
    np.testing.assert_array_equal(seen.at_start.prefill, [[3, 0], [0, 0]])
    np.testing.assert_array_equal(seen.at_start.prefill_queue, [3, 0])
    waiting = replace(start, prefill_queue=[0, 0], decode_queue=[40, 60])
    settled = run(system, start=waiting, horizon=1e-9, warmup=0.0).at_start
    assert settled.decode[1].sum() == 64
    assert settled.decode[0].sum() == 45
    assert settled.decode_queue.sum() == 100 + 22 - 64 - 45


def test_the_head_of_the_buffer_takes_a_slot():
    full = Start(prefill_queue=[0, 0], decode_queue=[1, 1], prefill=[[0, 0], [0, 0]], decode=[[0, 1], [0, 1]])
    seen = run(small_system(), start=full, horizon=1e-9, warmup=0.0)
    np.testing.assert_array_equal(seen.at_start.decode, [[0, 1], [1, 1]])
    np.testing.assert_array_equal(seen.at_start.decode_queue, [0, 1])


def test_a_full_unpartitioned_start_fits():
    system = unpartitioned(role_gpus=[4])
    start = Start(prefill_queue=[0, 0], decode_queue=[0, 0], prefill=[[1, 1]], decode=[[3, 3]])
    seen = run(system, start=start, horizon=5.0, warmup=0.0)
    assert_balance(seen)
    assert seen.most_requests[0] == 2
    with pytest.raises(ValueError, match="at most 6 decodes in service in role 0, where 2 prefills run"):
        run(system, start=replace(start, decode=[[4, 3]]))


# The policy


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_gate_admits_as_a_plain_scan_would(seed):
    rng = np.random.default_rng(seed)
    classes, gpus = int(rng.integers(1, 40)), int(rng.integers(1, 60))
    slope, base = rng.integers(0, 3, classes).astype(float), rng.integers(0, 3, classes).astype(float)
    target, queue = rng.integers(0, 3, classes).astype(float), rng.integers(0, 6, classes)
    ones = np.ones(classes)
    system = System(
        arrival_rate=ones,
        prompt_tokens=ones,
        output_tokens=ones,
        abandonment_rate=ones,
        mode_chunk=[1.0, 0.0],
        mode_time=[1.0, 1.0],
        role_gpus=[gpus],
        role_prefill_mode=[0],
        role_rest_mode=[1],
        role_decode_slots=[1],
        role_slots=[2],
        gate_slope=slope,
        gate_base=base,
        gate_queue_target=target,
        router_order=[0],
        placement=int(rng.integers(2)),
        prefill_reward=ones,
        decode_reward=ones,
    )
    start = replace(Start.empty(system), prefill_queue=queue)
    seen = run(system, start=start, horizon=1e-12, warmup=0.0)
    waiting, running = queue.copy(), np.zeros(classes, dtype=int)
    for _ in range(min(gpus, queue.sum())):
        keys = [
            (base[i] + slope[i] * running[i], -(waiting[i] - target[i]), i) for i in range(classes) if waiting[i] > 0
        ]
        i = min(keys)[-1]
        waiting[i] -= 1
        running[i] += 1
    np.testing.assert_array_equal(seen.at_start.prefill[0], running)
    np.testing.assert_array_equal(seen.at_start.prefill_queue, waiting)


def test_a_class_outside_the_plan_waits_for_all_others():
    system = small_system(gate_slope=[1.0, 0.0], gate_base=[0.0, 1e300], abandonment_rate=[0.0, 0.0])
    crowd = replace(Start.empty(system), prefill_queue=[5000, 50])
    seen = run(system, start=crowd, horizon=500.0, warmup=0.0)
    assert seen.at_end.prefill_queue[0] > 0
    assert seen.prefill_starts[:, 0].sum() > 100
    assert seen.prefill_starts[:, 1].sum() == 0
    assert run(system, horizon=500.0, warmup=0.0).prefill_starts[:, 1].sum() > 0


@pytest.mark.parametrize("levels", [3, 100])
def test_fewest_decodes_levels_the_fleet(levels):
    # decodes never end; two of three GPUs hold none, so the first two prefills go there
    system = unpartitioned(role_gpus=[3], role_decode_slots=[levels], role_slots=[levels + 1], placement=1)
    loaded = Start(prefill_queue=[2, 0], decode_queue=[0, 0], prefill=[[0, 0]], decode=[[1, 0]])
    for seed in range(20):
        seen = run(system, seed=seed, start=loaded, horizon=1e-12, warmup=0.0)
        assert seen.most_requests[0] == 1
    uniform = replace(system, placement=0)
    most = [run(uniform, seed=seed, start=loaded, horizon=1e-12, warmup=0.0).most_requests[0] for seed in range(60)]
    assert 20 <= most.count(2) <= 55  # probability 2/3 each


def test_no_draw_is_rejected_when_speeds_do_not_vary():
    system = small_system(mode_time=[1.0, 1.0], prompt_tokens=[1.0, 4.0], output_tokens=[1.0, 4.0])
    seen = run(replace(system, abandonment_rate=[1.0, 1.0]), horizon=1e4)
    assert seen.null_draws <= 1e-6 * seen.events
    assert run(small_system(), horizon=1e4).null_draws > 0


# Theory: queueing formulas


def birth_death(birth, death, size=4000):
    """Stationary law of a birth-death chain on 0..size."""
    k = np.arange(size)
    log = np.concatenate([[0.0], np.cumsum(np.log(birth(k)) - np.log(death(k + 1)))])
    weight = np.exp(log - log.max())
    return weight / weight.sum()


def one_class(*, arrival_rate, abandonment_rate, prefill_gpus, prompt, decode_gpus, slots, output):
    """A prefill-only role with an idle rest mode and a decode-only role; iterations take 1 s."""
    return System(
        arrival_rate=[arrival_rate],
        prompt_tokens=[prompt],
        output_tokens=[output],
        abandonment_rate=[abandonment_rate],
        mode_chunk=[1.0, 0.0, 0.0],
        mode_time=[1.0, np.nan, 1.0],
        role_gpus=[prefill_gpus, decode_gpus],
        role_prefill_mode=[0, -1],
        role_rest_mode=[1, 2],
        role_decode_slots=[0, slots],
        role_slots=[1, slots],
        gate_slope=[1.0],
        gate_base=[0.0],
        gate_queue_target=[0.0],
        router_order=[0, 1],
        placement=0,
        prefill_reward=[0.0],
        decode_reward=[1.0],
    )


@pytest.mark.parametrize("patience", [0.0, 0.25])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_single_stage_is_erlangs_queue(stage, patience):
    servers, rate = 6, 5.1 if patience == 0 else 6.6
    negligible = 1e-9
    if stage == "decode":
        sizes = {"prefill_gpus": 1, "prompt": negligible, "decode_gpus": 3, "slots": 2, "output": 1.0}
    else:
        sizes = {"prefill_gpus": servers, "prompt": 1.0, "decode_gpus": 1, "slots": 50, "output": negligible}
    system = one_class(arrival_rate=rate, abandonment_rate=patience, **sizes)
    law = birth_death(
        lambda k: np.full(k.size, rate), lambda k: np.minimum(k, servers) + patience * np.maximum(k - servers, 0)
    )
    queue = law @ np.maximum(np.arange(law.size) - servers, 0)
    busy = law @ np.minimum(np.arange(law.size), servers)
    seen = replications(system, 40, horizon=11_000.0, warmup=1000.0)
    window = seen[0].window
    assert_mean([getattr(s, f"{stage}_queue_time") / window for s in seen], queue)
    assert_mean([getattr(s, f"{stage}_time").sum() / window for s in seen], busy)
    assert_mean([s.decode_completions / window for s in seen], busy)
    assert_mean([getattr(s, f"abandoned_{stage}") / window for s in seen], patience * queue)
    if patience == 0:  # Erlang C in closed form
        load = rate / servers
        erlang_b = 1.0
        for k in range(1, servers + 1):
            erlang_b = rate * erlang_b / (k + rate * erlang_b)
        np.testing.assert_allclose(queue, erlang_b / (1 - load * (1 - erlang_b)) * load / (1 - load), rtol=1e-9)


# Theory: the exact chain, built here in plain Python from the rules alone


class ExactChain:
    """States (queues, GPUs as (role, prefill, decodes), buffer), GPUs sorted; queue and buffer lengths truncated."""

    def __init__(self, system, limit):
        self.s, self.limit = system, limit
        gpus = [(r, -1, (0,) * system.classes) for r in range(system.roles) for _ in range(system.role_gpus[r])]
        first = ((0,) * system.classes, tuple(gpus), ())
        self.index = {first: 0}
        rows, columns, rates = [], [], []
        frontier, self.reward, self.truncated = [first], {}, {}
        while frontier:
            state = frontier.pop()
            source = self.index[state]
            for rate, law in self.transitions(state):
                for target, probability in law.items():
                    if target not in self.index:
                        self.index[target] = len(self.index)
                        frontier.append(target)
                    rows.append(source)
                    columns.append(self.index[target])
                    rates.append(rate * probability)
        size = len(self.index)
        jumps = sparse.coo_matrix((rates, (columns, rows)), shape=(size, size)).tocsr()
        leaving = np.asarray(jumps.sum(axis=0)).ravel()
        clock = 1.02 * leaving.max()
        self.law, residual = np.full(size, 1.0 / size), np.inf
        while residual > 1e-13:  # power iteration of the uniformised chain
            drift = (jumps @ self.law - leaving * self.law) / clock
            self.law, residual = self.law + drift, np.abs(drift).sum()
        self.law /= self.law.sum()

    def free(self, gpu):
        role, prefill, decodes = gpu
        load = sum(decodes)
        return load < self.s.role_decode_slots[role] and load + (prefill >= 0) < self.s.role_slots[role]

    def idle(self, gpu):
        role, prefill, decodes = gpu
        return self.s.role_prefill_mode[role] >= 0 and prefill < 0 and sum(decodes) < self.s.role_slots[role]

    @staticmethod
    def seat(gpus, k, i, change=1):
        role, prefill, decodes = gpus[k]
        decodes = tuple(d + change * (j == i) for j, d in enumerate(decodes))
        return (*gpus[:k], (role, prefill, decodes), *gpus[k + 1 :])

    def rates(self, gpu):
        """Prefill rate per class and decode rate per class on this GPU."""
        s, (role, prefill, _) = self.s, gpu
        mode = s.role_prefill_mode[role]
        now = mode if prefill >= 0 else s.role_rest_mode[role]
        return s.mode_chunk[mode] / s.mode_time[mode] / s.prompt_tokens, 1 / (s.mode_time[now] * s.output_tokens)

    def transitions(self, state):
        queues, gpus, buffer = state
        s = self.s
        reward, cut = 0.0, False
        moves = []
        for i in range(s.classes):
            if queues[i] < self.limit:
                longer = tuple(q + (j == i) for j, q in enumerate(queues))
                moves.append((s.arrival_rate[i], self.gate(longer, gpus, buffer)))
            else:
                cut = True
            if queues[i]:
                shorter = tuple(q - (j == i) for j, q in enumerate(queues))
                moves.append((s.abandonment_rate[i] * queues[i], {(shorter, gpus, buffer): 1.0}))
        for k, i in enumerate(buffer):
            moves.append((s.abandonment_rate[i], {(queues, gpus, buffer[:k] + buffer[k + 1 :]): 1.0}))
        for k, gpu in enumerate(gpus):
            role, prefill, decodes = gpu
            prefill_rate, decode_rate = self.rates(gpu)
            if prefill >= 0:
                reward += prefill_rate[prefill] * s.prefill_reward[prefill]
                ended = (*gpus[:k], (role, -1, decodes), *gpus[k + 1 :])
                law = defaultdict(float)
                for probability, seated, waiting in self.route(ended, buffer, prefill):
                    cut |= len(waiting) > self.limit
                    after = self.fill(queues, seated, waiting[: self.limit], k)
                    for target, q in after.items():
                        law[target] += probability * q
                moves.append((prefill_rate[prefill], law))
            for i, count in enumerate(decodes):
                if count:
                    reward += count * decode_rate[i] * s.decode_reward[i]
                    moves.append((count * decode_rate[i], self.fill(queues, self.seat(gpus, k, i, -1), buffer, k)))
        self.reward[state], self.truncated[state] = reward, cut
        return moves

    def route(self, gpus, buffer, i):
        for role in self.s.router_order:
            open_gpus = [k for k, gpu in enumerate(gpus) if gpu[0] == role and self.free(gpu)]
            if open_gpus:
                return [(1 / len(open_gpus), self.seat(gpus, k, i), buffer) for k in open_gpus]
        return [(1.0, gpus, (*buffer, i))]

    def fill(self, queues, gpus, buffer, k):
        while buffer and self.free(gpus[k]):
            gpus, buffer = self.seat(gpus, k, buffer[0]), buffer[1:]
        return self.gate(queues, gpus, buffer)

    def gate(self, queues, gpus, buffer):
        s = self.s
        idle = [k for k, gpu in enumerate(gpus) if self.idle(gpu)]
        waiting = [i for i in range(s.classes) if queues[i]]
        if not idle or not waiting:
            return {(queues, tuple(sorted(gpus)), buffer): 1.0}
        running = [sum(gpu[1] == i for gpu in gpus) for i in range(s.classes)]
        i = min(
            waiting,
            key=lambda j: (
                s.gate_base[j] + s.gate_slope[j] * running[j],
                s.gate_queue_target[j] - queues[j],
                j,
            ),
        )
        if s.placement == 1:
            fewest = min(sum(gpus[k][2]) for k in idle)
            idle = [k for k in idle if sum(gpus[k][2]) == fewest]
        shorter = tuple(q - (j == i) for j, q in enumerate(queues))
        law = defaultdict(float)
        for k in idle:
            started = (*gpus[:k], (gpus[k][0], i, gpus[k][2]), *gpus[k + 1 :])
            for target, probability in self.gate(shorter, started, buffer).items():
                law[target] += probability / len(idle)
        return law

    def means(self):
        s = self.s
        states = sorted(self.index, key=self.index.get)
        prefill = np.zeros((len(states), s.roles, s.classes))
        decode = np.zeros_like(prefill)
        for row, (_, gpus, _) in enumerate(states):
            for role, running, decodes in gpus:
                decode[row, role] += decodes
                if running >= 0:
                    prefill[row, role, running] += 1
        queue = np.array([queues for queues, _, _ in states])
        buffer = np.array([[b.count(i) for i in range(s.classes)] for _, _, b in states])
        average = [np.tensordot(self.law, values, axes=1) for values in (queue, buffer, prefill, decode)]
        reward, truncated = (self.law @ np.array([of[x] for x in states]) for of in (self.reward, self.truncated))
        return *average, reward, truncated


@pytest.mark.parametrize(
    ("system", "limit"),
    [
        (small_system(), 5),
        (small_system(router_order=[0, 1], gate_slope=[0.0, 0.0], gate_base=[0.0, 0.0]), 5),
        (unpartitioned(gate_queue_target=[0.0, 0.5], gate_base=[0.0, 0.0]), 5),
        (unpartitioned(placement=1, role_decode_slots=[1]), 5),
        (three_roles(arrival_rate=[0.8, 0.6]), 4),
        (three_roles(arrival_rate=[0.8, 0.6], placement=1, router_order=[0, 2, 1]), 4),
    ],
    ids=["partition", "ties", "unpartitioned", "fewest-decodes", "three-roles", "three-roles-fewest"],
)
def test_stationary_means_are_those_of_the_exact_chain(system, limit):
    queue, buffer, prefill, decode, reward, truncated = ExactChain(system, limit).means()
    assert truncated < 1e-4
    seen = replications(system, 50, horizon=12_020.0, warmup=20.0)
    window = seen[0].window
    assert_mean([s.prefill_queue_time / window for s in seen], queue, confidence=1 - 1e-5)
    assert_mean([s.decode_queue_time / window for s in seen], buffer, confidence=1 - 1e-5)
    assert_mean([s.prefill_time / window for s in seen], prefill, confidence=1 - 1e-5)
    assert_mean([s.decode_time / window for s in seen], decode, confidence=1 - 1e-5)
    assert_mean([s.reward / window for s in seen], reward, confidence=1 - 1e-5)
    assert_mean([s.expected_reward / window for s in seen], reward, confidence=1 - 1e-5)


# Two routes to one number


@pytest.mark.parametrize("build", [small_system, unpartitioned, three_roles])
def test_expected_reward_agrees_with_reward(build):
    seen = replications(build(), 60, horizon=2000.0)
    assert_mean([s.expected_reward - s.reward for s in seen], 0.0)


def test_expected_reward_varies_less_only_when_slots_are_scarce():
    scarce = one_class(
        arrival_rate=20.0, abandonment_rate=1.0, prefill_gpus=1, prompt=1e-9, decode_gpus=5, slots=2, output=1.0
    )
    ample = one_class(
        arrival_rate=20.0, abandonment_rate=1.0, prefill_gpus=1, prompt=1e-9, decode_gpus=50, slots=2, output=1.0
    )
    ratio = []
    for system in (scarce, ample):
        seen = replications(system, 100, horizon=320.0)
        ratio.append(np.var([s.expected_reward for s in seen]) / np.var([s.reward for s in seen]))
    assert ratio[0] < 0.1
    assert 1.2 < ratio[1] < 3.2  # M/M/infinity: 2, busy time is a sum of random service times


@pytest.mark.parametrize("name", ["reference", "unpartitioned", "three roles"])
def test_plain_direct_method_agrees(baseline, name):
    system = {
        "reference": baseline.reference_system(5),
        "unpartitioned": unpartitioned(role_gpus=[3], abandonment_rate=[0.2, 0.3], arrival_rate=[1.5, 1.0]),
        "three roles": three_roles(role_gpus=[2, 1, 3], abandonment_rate=[0.1, 0.2], arrival_rate=[2.0, 1.2]),
    }[name]
    ours = replications(system, 30, horizon=2000.0, warmup=200.0)
    seeds = np.random.SeedSequence(99).spawn(30)
    theirs = [
        baseline.plain_simulate(system, horizon=2000.0, warmup=200.0, rng=np.random.default_rng(seed)) for seed in seeds
    ]
    for field in theirs[0]._fields:
        by_role = field in ("prefill_starts", "decode_starts")
        values = [getattr(s, field).sum(axis=0) if by_role else getattr(s, field) for s in ours]
        difference = np.stack([np.ravel(value) for value in values]).astype(float)
        difference -= np.stack([np.ravel(getattr(s, field)) for s in theirs])
        assert_mean(difference, np.zeros(difference.shape[1]), confidence=1 - 1e-5)
    with pytest.raises(ValueError, match="places prefills uniformly"):
        baseline.plain_simulate(replace(system, placement=1), horizon=1.0, warmup=0.0, rng=np.random.default_rng(1))


@pytest.mark.parametrize(
    ("gpus", "found", "count"), [(5, 277.9, 200), (20, 285.7, 60), (50, 288.7, 24), (200, 290.4, 12)]
)
def test_reference_instance_earns_what_other_simulators_found(baseline, gpus, found, count):
    seen = replications(baseline.reference_system(gpus), count, horizon=2000.0, warmup=200.0)
    revenue = [s.expected_reward / s.window / gpus for s in seen]
    assert np.mean(revenue) == pytest.approx(found, abs=1.0)


def test_many_classes_balance_and_reject_few_draws(baseline):
    system = baseline.many_class_system(300, 400)
    seen = run(system, horizon=120.0, warmup=60.0)
    assert_balance(seen)
    assert seen.null_draws < 0.6 * seen.events


def test_one_event_can_start_hundreds_of_prefills(baseline):
    """A class held back is let in all at once when slots get free; the counts stay those of the requests."""
    system = replace(
        baseline.reference_system(20_000),
        role_gpus=[7000, 13_000],
        gate_slope=[0.0, 0.0],
        gate_base=[1.0, 0.0],
        gate_hold=[1000.0, -np.inf],
    )
    seen = run(system, horizon=100.0, warmup=0.0, samples=1001)
    assert_balance(seen)
    path = seen.trajectory.prefill.sum(axis=1)
    assert np.all(path >= 0)
    assert np.abs(np.diff(path[:, 0])).max() > 20, "the held class comes in bursts"
