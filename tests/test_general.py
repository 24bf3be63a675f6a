"""The simulator for general laws: against the exact chain, the chain simulator and queueing formulas; its streams."""

import time
from dataclasses import replace

import numpy as np
import pytest
from brute_force import BruteForceChain
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_policies import KINDS, SIDES, assert_balance, assert_mean, random_system, tiny_system

import fluidopt as fo
from fluidopt.simulation.arrivals import (
    Bursty,
    Law,
    Laws,
    Poisson,
    Requests,
    RequestStream,
    Sinusoidal,
    Steady,
    Stepwise,
)
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.general import GeneralRun, simulate_general
from fluidopt.simulation.run import simulate
from fluidopt.simulation.system import Start, System

NEVER = -np.inf
LAWS = {
    "exponential": Law(),
    "deterministic": Law("deterministic"),
    "lognormal": Law("lognormal", cv=1.5),
    "erlang": Law("gamma", cv=0.5),
    "gamma": Law("gamma", cv=2.0),
}


def run(system, *, seed=1, horizon=200.0, warmup=20.0, **options):
    return simulate_general(system, horizon=horizon, warmup=warmup, rng=np.random.default_rng(seed), **options)


def replications(system, count, *, seed=1, **options):
    return [run(system, seed=child, **options) for child in np.random.SeedSequence(seed).spawn(count)]


def one_gpu(**changes):
    """A GPU that prefills at 1 token/s or decodes at 1 iteration/s, one class that never abandons."""
    arguments = {
        "arrival_rate": [0.7],
        "prompt_tokens": [1.0],
        "output_tokens": [1e-9],
        "abandonment_rate": [0.0],
        "mode_chunk": [1.0, 0.0],
        "mode_time": [1.0, 1.0],
        "role_gpus": [1, 1],
        "role_prefill_mode": [0, -1],
        "role_rest_mode": [1, 1],
        "role_decode_slots": [0, 50],
        "role_slots": [1, 50],
        "gate_slope": [0.0],
        "gate_base": [0.0],
        "gate_queue_target": [0.0],
        "router_order": [1, 0],
        "placement": 0,
        "prefill_reward": [0.0],
        "decode_reward": [1.0],
    }
    return System(**(arguments | changes))


def arriving(block, times):
    """The first requests of a block at other times."""
    return Requests(*(column[: len(times)] for column in block))._replace(times=times)


# ---- with exponential laws it is the chain --------------------------------------------------------------------------


def assert_exact(system, limit=3, most_cut=2e-3):
    queue, buffered, prefill, decode, reward, cut = BruteForceChain(system, limit, limit).means()
    assert cut < most_cut
    seen = replications(system, 40, horizon=5020.0)
    window = seen[0].window
    for name, expected in (
        ("prefill_queue", queue),
        ("decode_queue", buffered),
        ("prefill", prefill),
        ("decode", decode),
    ):
        assert_mean([getattr(each, name + "_time") / window for each in seen], expected)
    assert_mean([each.reward / window for each in seen], reward)
    assert_mean([each.expected_reward / window for each in seen], reward)


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_exponential_laws_is_its_exact_chain(kind, gpus):
    assert_exact(tiny_system(kind, gpus))


@pytest.mark.parametrize(
    "changes",
    [
        SIDES | {"side_weight": np.array([[0.9, 0.1], [0.3, 0.7]])},
        SIDES | {"side_weight": np.array([[0.5, 0.0], [0.0, 0.0]])},
        SIDES | {"gate_first": True, "gate_hold": np.array([NEVER, 0.0])},
        {"gate_hold": np.array([NEVER, 0.0]), "gate_slope": np.zeros(2), "gate_base": np.array([1.0, 0.0])},
        {"gate_hold": np.array([-1.0, 0.0])},
        {"gate_slope": np.zeros(2), "gate_queue_target": np.array([0.5, 1.0])},
        {"placement": 1},
    ],
    ids=["weights", "no-weights", "shares-gate-first", "hold", "hold-both", "queue-deviation", "fewest-decodes"],
)
def test_rules_by_hand_with_exponential_laws_are_their_exact_chain(changes):
    assert_exact(tiny_system(**changes))


@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_of_rules_with_exponential_laws_is_the_chain_simulator(seed):
    """Two simulators that share nothing but the system, by Welch's test; seven classes, five GPUs a role."""
    system = random_system(seed)
    system = replace(system, abandonment_rate=np.maximum(system.abandonment_rate, 0.2))
    ours = replications(system, 24, seed=seed, horizon=420.0)
    theirs = [
        simulate(system, Start.empty(system), horizon=420.0, warmup=20.0, rng=np.random.default_rng(child))
        for child in np.random.SeedSequence(seed + 1000).spawn(24)
    ]
    names = ("prefill_queue_time", "decode_queue_time", "prefill_time", "decode_time", "reward", "expected_tokens")
    for name in (*names, "abandoned_prefill", "abandoned_decode", "prefill_starts", "decode_starts", "expected_reward"):
        one, other = (np.array([getattr(each, name) for each in seen]).reshape(24, -1) for seen in (ours, theirs))
        error = np.sqrt((one.var(axis=0, ddof=1) + other.var(axis=0, ddof=1)) / 24)
        gap = np.abs(one.mean(axis=0) - other.mean(axis=0))
        assert np.all(gap <= stats.t.ppf(1 - 1e-6, 40) * error + 1e-9), name


# ---- with other laws it meets queueing formulas ---------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_prefill_station_waits_as_pollaczek_and_khinchine_say(law):
    """M/G/1: W = lambda E[S^2] / (2 (1 - rho)), with E[S^2] = 1 + cv^2."""
    seen = replications(one_gpu(), 60, horizon=22000.0, warmup=2000.0, laws=Laws(prompt=law))
    expected = 0.7 * (1 + law.variation**2) / (2 * (1 - 0.7))
    assert_mean([each.prefill_queue_time[0] / each.window / 0.7 for each in seen], expected)
    assert_mean([each.prefill_time.sum() / each.window for each in seen], 0.7)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_decode_slots_lose_as_erlang_says_under_any_law(law):
    """M/G/3/3: a decode that finds no slot leaves at once, and Erlang's B does not depend on the law."""
    system = one_gpu(
        arrival_rate=[2.0],
        prompt_tokens=[1e-9],
        output_tokens=[1.0],
        abandonment_rate=[1e9],
        role_decode_slots=[0, 3],
        role_slots=[1, 3],
        role_gpus=[400, 1],
    )
    seen = replications(system, 40, horizon=2100.0, warmup=100.0, laws=Laws(output=law))
    load = 2.0
    terms = np.cumprod([1.0, load, load / 2, load / 3])
    assert_mean([each.decode_time.sum() / each.window for each in seen], load * (1 - terms[3] / terms.sum()))


def test_fixed_lengths_take_exactly_their_time():
    """Deterministic all through: a lone request takes P/C iterations of prefill and D of decode, and slows beside a
    prefill."""
    system = one_gpu(
        arrival_rate=[1e-3],
        prompt_tokens=[10.0],
        output_tokens=[40.0],
        mode_time=[2.0, 1.0],
        role_gpus=[1, 0],
        role_decode_slots=[4, 4],
        role_slots=[5, 4],
        router_order=[0, 1],
    )
    fixed = Laws(prompt=Law("deterministic"), output=Law("deterministic"))
    block = next(RequestStream(system, np.random.default_rng(0), laws=fixed))
    times = np.array([5.0, 30.0, np.inf])
    requests = iter([arriving(block, times)])
    fleet = GeneralRun(system, requests, np.random.default_rng(1))
    # The first is read from 5 to 25 and decoded at full speed to 30, at half of it to 50, then at full speed; the
    # second is read from 30 to 50.
    ends = []
    for now in np.arange(1.0, 140.0):
        fleet.advance(now + 1e-6)
        if fleet.collect(now + 1e-6).decode_completions.sum():
            ends.append(now)
    assert ends == [75.0, 90.0]


def test_patience_is_for_all_the_waiting():
    """Who waited for a prefill has only the rest of its patience for the decode queue."""
    system = one_gpu(output_tokens=[100.0], abandonment_rate=[0.2], role_decode_slots=[0, 1], role_slots=[1, 1])
    fixed = Laws(prompt=Law("deterministic"), output=Law("deterministic"), patience=Law("deterministic"))
    block = next(RequestStream(system, np.random.default_rng(0), laws=fixed))
    times = np.array([0.0, 0.25, 0.5, np.inf])
    requests = iter([arriving(block, times)])
    fleet = GeneralRun(system, requests, np.random.default_rng(1))
    gone = []
    for now in np.arange(0.25, 12.0, 0.25):
        fleet.advance(now + 1e-6)
        gone += [now] * int(fleet.collect(now + 1e-6).abandoned_decode.sum())
    # arrival + 5 s + 1 s of prefill, which is no waiting
    assert gone == [6.25, 6.5]


# ---- bookkeeping ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), prompt=st.sampled_from(list(LAWS)), output=st.sampled_from(list(LAWS)))
def test_flows_balance_and_caps_hold_under_any_rules_and_laws(seed, prompt, output):
    system = random_system(seed)
    laws = Laws(prompt=LAWS[prompt], output=LAWS[output], patience=LAWS[output])
    process = [Steady(), Bursty(), Sinusoidal(amplitude=1.0, period=20.0), Stepwise(levels=(0, 1, 3), period=9.0)]
    options = {"laws": laws, "process": process[seed % 4], "horizon": 60.0, "warmup": 7.0, "seed": seed}
    seen = run(system, **options)
    assert_balance(seen)
    assert np.all(seen.most_decodes <= system.role_decode_slots)
    assert np.all(seen.most_requests <= system.role_slots)
    again = run(system, **options)
    for name in ("arrivals", "decode_completions", "decode_time", "expected_reward", "events"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(again, name))


def test_all_policies_meet_the_same_requests(reference_plan):
    systems = [fleet_system(reference_plan.policy(gpus=20, kind=kind)) for kind in ("gate-and-route", "FI-WSP")]
    seen = [run(system, laws=Laws(output=LAWS["lognormal"]), process=Bursty()) for system in systems]
    np.testing.assert_array_equal(seen[0].arrivals, seen[1].arrivals)
    assert seen[0].reward != seen[1].reward


def test_another_law_leaves_the_other_streams_alone():
    system = one_gpu()
    plain, fixed = (
        next(RequestStream(system, np.random.default_rng(3), laws=laws))
        for laws in (Laws(), Laws(output=Law("deterministic")))
    )
    np.testing.assert_array_equal(plain.times, fixed.times)
    np.testing.assert_array_equal(plain.prompt, fixed.prompt)
    assert np.all(fixed.output == system.output_tokens[0])
    assert np.all(plain.patience == np.inf)


def test_classes_may_have_laws_of_their_own():
    system = random_system(5)
    count = system.classes
    assert count > 1
    laws = [Law("deterministic"), *[Law("lognormal", cv=2.0)] * (count - 1)]
    stream = RequestStream(system, np.random.default_rng(3), laws=Laws(output=tuple(laws)))
    blocks = [next(stream) for _ in range(40)]
    for i in range(count):
        drawn = [block.output[block.classes == i] / system.output_tokens[i] for block in blocks]
        if system.arrival_rate[i] > 0.3:
            assert_mean([each.mean() for each in drawn], 1.0)
            assert (np.concatenate(drawn).std() > 0.5) == (i > 0)
    with pytest.raises(
        fo.InvalidInput, match=rf"Laws.output: give one law, or one per class .{count}.; got {count + 1}"
    ):
        RequestStream(system, np.random.default_rng(3), laws=Laws(output=(*laws, Law())))


def test_cost_of_an_event_hardly_grows_with_the_fleet(reference_plan):
    """From 50 to 800 GPUs: O(log n + B)."""
    took = {}
    for gpus in (50, 800):
        system = fleet_system(reference_plan.policy(gpus=gpus))
        per_event = []
        for seed in range(4):
            began = time.process_time()
            seen = run(system, horizon=48_000.0 / gpus, warmup=0.0, seed=seed)
            per_event.append((time.process_time() - began) / int(seen.events))
        took[gpus] = min(per_event)
    assert took[800] < 3.0 * took[50], took


def test_stopping_in_between_changes_nothing():
    system = tiny_system()
    whole, parts = (
        GeneralRun(system, RequestStream(system, np.random.default_rng(1)), np.random.default_rng(2)) for _ in range(2)
    )
    whole.advance(300.0)
    for now in np.linspace(1.0, 300.0, 150):
        parts.advance(now)
    one, other = whole.collect(300.0), parts.collect(300.0)
    for name, value in vars(one).items():
        if value is not None:
            np.testing.assert_allclose(value, getattr(other, name), rtol=1e-12, err_msg=name)


def test_queues_without_end_are_refused():
    system = one_gpu(arrival_rate=[5.0])
    stream = RequestStream(system, np.random.default_rng(1))
    fleet = GeneralRun(system, stream, np.random.default_rng(2), max_waiting=1000)
    with pytest.raises(OverflowError, match=r"more than 1000 requests wait at once.*Use more GPUs"):
        fleet.advance(1e5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"horizon": 0.0}, "'horizon' parameter of simulate_general must be finite and above 0"),
        ({"horizon": 10.0, "warmup": 10.0}, r"'warmup' .* below horizon \(10 s\)"),
    ],
)
def test_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        run(one_gpu(), **options)


# ---- laws and arrivals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_laws_have_the_mean_and_variation_they_say(law):
    drawn = law.draw(np.random.default_rng(1), 400_000).reshape(40, -1)
    assert np.all(drawn >= 0)
    assert_mean(drawn.mean(axis=1), 1.0)
    assert_mean((drawn**2).mean(axis=1), 1 + law.variation**2)


PROCESSES = {
    "steady": Steady(),
    "bursty": Bursty(ratio=4.0, share=0.3, burst=5.0),
    "sinusoidal": Sinusoidal(amplitude=0.8, period=25.0),
    "stepwise": Stepwise(levels=(1, 0, 4, 1), period=50.0),
}


def arrivals(process, rate, horizon, seed):
    times, classes = [], []
    for block, kinds in process.stream(np.array(rate), np.random.default_rng(seed)):
        times.append(block)
        classes.append(kinds)
        if block[-1] >= horizon:
            break
    times, classes = np.concatenate(times), np.concatenate(classes)
    assert np.all(np.diff(times) >= 0)
    return times[times < horizon], classes[times < horizon]


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_processes_have_the_mean_rates_they_are_given(process):
    counts = [np.bincount(arrivals(process, [3.0, 1.0], 2000.0, seed)[1], minlength=2) for seed in range(60)]
    assert_mean(np.array(counts) / 2000.0, [3.0, 1.0])


def test_bursts_disperse_counts_as_the_two_states_say():
    """Var N(T) = m T + m^2 Var(factor) 2 (T/r - (1 - exp(-r T))/r^2), r the sum of the two switching rates."""
    law = Bursty(ratio=4.0, share=0.3, burst=5.0)
    horizon, rate = 40.0, 6.0
    counts = np.array([arrivals(law, [rate], horizon, seed)[0].size for seed in range(3000)])
    calm = law.calm_factor
    variance = 0.3 * 0.7 * (4 * calm - calm) ** 2
    r = 1 / 5.0 + 1 / (5.0 * 0.7 / 0.3)
    expected = rate * horizon + rate**2 * variance * 2 * (horizon / r - (1 - np.exp(-r * horizon)) / r**2)
    assert_mean(counts, rate * horizon)
    assert_mean((counts - rate * horizon) ** 2, expected)


@pytest.mark.parametrize("name", ["sinusoidal", "stepwise"])
def test_rates_follow_the_clock(name):
    process = PROCESSES[name]
    times, _ = arrivals(process, [50.0], 5000.0, 1)
    counts, edges = np.histogram(times % process.period, bins=100, range=(0, process.period))
    middle = (edges[1:] + edges[:-1]) / 2
    expected = 50.0 * 5000.0 / 100 * process(middle)
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected) + 0.01 * expected)


def test_nobody_comes_where_all_rates_are_0():
    for process in PROCESSES.values():
        times, _ = next(iter(process.stream(np.zeros(2), np.random.default_rng(1))))
        assert times[-1] == np.inf


def test_steady_is_poisson():
    times, classes = next(Poisson(np.array([1.0, 2.0]), np.random.default_rng(4)))
    same, kinds = next(iter(Steady().stream(np.array([1.0, 2.0]), np.random.default_rng(4))))
    np.testing.assert_array_equal(times, same)
    np.testing.assert_array_equal(classes, kinds)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Law("lognormal"), "the lognormal law needs a coefficient of variation"),
        (lambda: Law("deterministic", cv=1.0), "the deterministic law has none of its own to set"),
        (lambda: Law("weibull"), "kind must be"),
        (lambda: Bursty(ratio=0.5), "ratio must be at least 1"),
        (lambda: Bursty(share=1.0), "share must be less than 1"),
        (lambda: Sinusoidal(amplitude=1.5, period=1.0), "amplitude must be at most 1"),
        (lambda: Stepwise(levels=(0, 0), period=1.0), "levels must not all be 0"),
        (lambda: Stepwise(levels=(), period=1.0), "levels must have at least 1"),
    ],
)
def test_inputs_refuse(make, match):
    with pytest.raises(fo.InvalidInput, match=match):
        make()
