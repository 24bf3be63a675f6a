"""Every policy on the exact chain: against a chain in plain Python with the same caps, and against the simulator."""

from dataclasses import replace

import numpy as np
import pytest
from brute_force import BruteForceChain
from scipy import stats
from scipy.sparse import csgraph
from small_fleets import NEVER, mixture, small_policy

from fluidopt.chain import enumerate_chain, exact_chain
from fluidopt.chain import generator as generator_module
from fluidopt.chain.states import Layout, Line
from fluidopt.policy.extract import RULES
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.run import simulate
from fluidopt.simulation.system import Start

KINDS = tuple(RULES)


def assert_brute_force(system, prefill_cap, decode_cap):
    plain = BruteForceChain(system, prefill_cap, decode_cap)
    queue, buffered, prefill, decode, reward, cut = plain.means()
    chain = exact_chain(system, prefill_queue_cap=prefill_cap, decode_queue_cap=decode_cap, tolerance=1.0)
    means = chain.means
    assert chain.exact
    assert len(chain.states) == len(plain.index) <= chain.states.layout.states()
    np.testing.assert_allclose(means.prefill_queue, queue, atol=1e-10)
    np.testing.assert_allclose(means.decode_queue, buffered, atol=1e-10)
    np.testing.assert_allclose(means.prefill, prefill, atol=1e-10)
    np.testing.assert_allclose(means.decode, decode, atol=1e-10)
    np.testing.assert_allclose(chain.revenue_rate * system.gpus, reward, atol=1e-10)
    np.testing.assert_allclose(chain.lost_mass, cut, atol=1e-10)


# Against a chain in plain Python


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, "thresholds"])
def test_every_kind_is_the_chain_in_plain_python(kind, gpus):
    assert_brute_force(fleet_system(small_policy(kind, gpus, seed=gpus)), 3, 2)


@pytest.mark.parametrize("seed", range(40))
def test_any_mixture_of_rules_is_the_chain_in_plain_python(seed):
    system = mixture(seed)
    cap = 2 if system.gpus < 3 else 1
    assert_brute_force(system, cap, cap)


def test_the_mixtures_hold_every_rule():
    systems = [mixture(seed) for seed in range(40)]
    for has in (
        lambda s: s.gate_fcfs,
        lambda s: s.gate_first,
        lambda s: np.any(s.role_stays == 1) and np.any(s.role_stays == 0),
        lambda s: s.sides > 1 and np.any(s.side_weight > 0),
        lambda s: np.any((s.side_weight > 0).sum(axis=1) == 1),
        lambda s: s.sides > 1 and np.all(s.side_weight == 0),
        lambda s: np.any(s.gate_hold > NEVER) and s.gate_first,
        lambda s: s.gate_fcfs and s.sides > 1,
    ):
        assert sum(map(bool, map(has, systems))) >= 2


# Against the simulator


def cases():
    """Thirty small fleets: each kind three times, on one to three GPUs, and thresholds."""
    for at, kind in enumerate((*KINDS, "thresholds")):
        for gpus in (1, 2, 3):
            yield kind, gpus, 3 * at + gpus


def test_the_simulator_agrees_under_every_kind():
    scores = []
    for kind, gpus, seed in cases():
        chain = exact_chain(small_policy(kind, gpus, seed), tolerance=2e-4)
        system, means = chain.system, chain.means
        runs = [
            simulate(system, Start.empty(system), horizon=2050.0, warmup=50.0, rng=np.random.default_rng(stream))
            for stream in np.random.SeedSequence(seed).spawn(24)
        ]
        for name, mean in (
            ("prefill_queue_time", means.prefill_queue),
            ("decode_queue_time", means.decode_queue),
            ("prefill_time", means.prefill),
            ("decode_time", means.decode),
            ("decode_completions", means.throughput),
            ("expected_reward", chain.revenue_rate * gpus),
        ):
            seen = np.array([getattr(run, name) for run in runs], dtype=float).reshape(24, -1) / runs[0].window
            error = seen.std(axis=0, ddof=1) / np.sqrt(24)
            gap, varies = seen.mean(axis=0) - np.ravel(mean), error > 1e-5
            assert np.all(np.abs(gap[~varies]) < 1e-4)
            scores += list(stats.norm.ppf(stats.t.cdf(gap[varies] / error[varies], 23)))  # to normal scores
    z = np.abs(scores)
    assert len(z) > 300
    assert z.max() < 4
    # the quantities of one fleet are correlated: allow for an effective sample of a third
    assert np.mean(z > 1.96) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / (len(z) / 3))


# The layout


def test_a_request_that_keeps_its_slot_needs_no_buffer():
    system = fleet_system(small_policy("FI-WSP", 2))
    layouts = [Layout(system=system, prefill_queue_cap=3, decode_queue_cap=cap, ordered_places=3) for cap in (0, 5, 20)]
    spaces = [enumerate_chain(layout)[0] for layout in layouts]
    assert len({len(space) for space in spaces}) == 1
    assert len({layout.states() for layout in layouts}) == 1
    assert all(layout.lines[1] == Line(cap=0, places=0, ordered=(), unordered=()) for layout in layouts)


@pytest.mark.parametrize("kind", ["gate-and-route", "GF-WSP", "prioritize-and-route"])
def test_one_side_without_weights_packs_as_counts_and_one_word(kind):
    layout = Layout(
        system=fleet_system(small_policy(kind, 2)), prefill_queue_cap=5, decode_queue_cap=6, ordered_places=4
    )
    assert layout.radices()[2:] == [6, 6, 3, 3, 3, 3, 3, 3]
    assert layout.starts.tolist() == [[2, 2], [4, 8]]


def test_classes_with_a_weight_and_classes_that_never_come_need_no_order():
    system = replace(
        fleet_system(small_policy("sli-aware-general", 2, seed=2)),
        side_share=np.array([[1.0, 0.5], [0.0, 0.5]]),
        side_weight=np.array([[0.4, 0.0], [0.0, 0.0]]),
    )
    layout = Layout(system=system, prefill_queue_cap=2, decode_queue_cap=3, ordered_places=3)
    assert layout.lines[1:] == (
        Line(cap=3, places=0, ordered=(1,), unordered=(0,)),
        Line(cap=3, places=0, ordered=(1,), unordered=()),
    )
    assert layout.exact
    assert_brute_force(system, 2, 3)


def test_first_come_first_served_in_order_matters_and_converges():
    """Equal abandonment rates: counts already give the exact totals, the word the classes."""
    system = replace(
        fleet_system(small_policy("FG-SP", 1, seed=4)),
        arrival_rate=np.array([0.6, 0.6]),
        abandonment_rate=np.array([0.4, 1.5]),
    )
    revenue, exact = [], []
    for places in range(5):
        chain = exact_chain(
            system, prefill_queue_cap=4, decode_queue_cap=2, ordered_places=places, tolerance=1.0, method="direct"
        )
        revenue.append(chain.revenue_rate)
        exact.append(chain.exact)
    assert exact == [False] * 4 + [True]
    errors = np.abs(np.array(revenue) - revenue[-1])
    assert errors[0] > 1e-6
    assert errors[3] < errors[0] / 5


def test_counts_in_place_of_order_keep_the_totals_of_classes_that_differ_only_in_name():
    alike = replace(
        fleet_system(small_policy("FG-SP", 1, seed=4)),
        prompt_tokens=np.array([1.0, 1.0]),
        output_tokens=np.array([1.2, 1.2]),
        abandonment_rate=np.array([2.0, 2.0]),
        decode_reward=np.array([4.0, 4.0]),
    )
    exact, counts = (
        exact_chain(alike, prefill_queue_cap=4, decode_queue_cap=3, ordered_places=places, tolerance=1.0).means
        for places in (4, 0)
    )
    np.testing.assert_allclose(counts.prefill_marginal, exact.prefill_marginal, atol=1e-10)
    np.testing.assert_allclose(counts.decode_marginal, exact.decode_marginal, atol=1e-10)
    np.testing.assert_allclose(counts.throughput, exact.throughput, atol=1e-10)


@pytest.mark.parametrize("seed", range(40))
def test_the_generator_of_any_mixture_is_one(seed):
    system = mixture(seed)
    layout = Layout(system=system, prefill_queue_cap=3, decode_queue_cap=2, ordered_places=seed % 4)
    states, generator = enumerate_chain(layout)
    assert len(states) <= layout.states()
    assert np.unique(states.keys).size == len(states)
    np.testing.assert_allclose(generator.sum(axis=1), 0.0, atol=1e-12)
    assert csgraph.connected_components(generator, connection="strong")[0] == 1
    assert "prefill queue" in states.describe(len(states) - 1)


def test_a_row_without_room_is_built_again_in_a_larger_one(monkeypatch):
    system = fleet_system(small_policy("sli-aware", 2, seed=2))
    layout = Layout(system=system, prefill_queue_cap=2, decode_queue_cap=2, ordered_places=2)
    expected, generator = enumerate_chain(layout)
    ample = generator_module.work
    monkeypatch.setattr(generator_module, "work", lambda layout, row=2: ample(layout, row))
    states, again = enumerate_chain(layout)
    # states are numbered in the order in which they are found, which a row begun twice may change
    order = np.argsort(states.keys)[np.argsort(np.argsort(expected.keys))]
    np.testing.assert_array_equal(states.keys[order], expected.keys)
    assert abs(again[order][:, order] - generator).max() < 1e-14


def test_a_state_is_told_in_words():
    chain = exact_chain(small_policy("FG-SP", 1, seed=1), prefill_queue_cap=1, decode_queue_cap=1, tolerance=1.0)
    told = [chain.states.describe(number) for number in range(len(chain.states))]
    assert len(set(told)) == len(told)
    assert told[0] == ("role 0: prefill -, decodes [0, 0]; prefill queue [] then [0, 0]; decode queue [] then [0, 0]")
    assert any(
        "prefill 1, decodes [1, 0]; prefill queue [1] then [0, 0]; decode queue [0] then" in each for each in told
    )
