"""The exact chain against queueing formulas, itself by a second method, a plain enumeration, and the simulator."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse, stats
from scipy.linalg import expm
from scipy.sparse import csgraph
from small_fleets import two_classes, two_stages

import fluidopt as fo
from fluidopt.chain import enumerate_chain, exact_chain, stationary_law, transient_law
from fluidopt.chain import exact as exact_module
from fluidopt.chain.states import Layout
from fluidopt.chain.stationary import certified, pinned_law, relative_residual
from fluidopt.simulation.run import simulate
from fluidopt.simulation.system import Start


def random_system(seed):
    rng = np.random.default_rng(seed)
    gpus = 1 + seed % 3
    mixed = int(rng.integers(1, gpus + 1))
    slots = int(rng.integers(1, 3)) if gpus < 3 else 1
    partition = bool(rng.integers(2))
    return two_classes(
        arrival_rate=rng.uniform(0.15, 0.35, 2) * gpus,
        prompt_tokens=rng.uniform(0.3, 0.8, 2),
        output_tokens=rng.uniform(0.5, 1.5, 2),
        abandonment_rate=rng.uniform(4.0, 8.0, 2),
        mode_time=np.array([rng.uniform(1.0, 2.0), 1.0]),
        role_gpus=[mixed, gpus - mixed],
        role_decode_slots=[slots, slots + 1],
        role_slots=[slots + partition, slots + 1],
        gate_slope=rng.integers(0, 2, 2) * rng.uniform(0.5, 2, 2),
        gate_base=rng.integers(0, 2, 2).astype(float),
        gate_queue_target=rng.integers(0, 2, 2).astype(float),
        router_order=rng.permutation(2),
        placement=int(rng.integers(2)),
        gate_hold=np.where(rng.random(2) < 0.3, rng.integers(-1, 2, 2), -np.inf),
    )


def birth_death(birth, death):
    """Stationary law from the rates up and the rates down, by detailed balance."""
    log = np.concatenate([[0.0], np.cumsum(np.log(birth) - np.log(death))])
    weight = np.exp(log - log.max())
    return weight / weight.sum()


def birth_death_generator(birth, death):
    off = np.zeros(birth.size + 1)
    off[:-1] += birth
    off[1:] += death
    return sparse.diags_array([death, -off, birth], offsets=[-1, 0, 1]).tocsr()


# Closed forms


@pytest.mark.parametrize("patience", [0.0, 0.7])
@pytest.mark.parametrize("servers", [1, 4])
def test_the_prefill_stage_is_erlangs_queue(servers, patience):
    rate, cap = 0.6 * servers, 60
    # so many decode slots that the second stage never blocks
    system = two_stages(
        arrival_rate=rate, prefill_rate=1.0, prefill_gpus=servers, decode_rate=50.0, slots=12, patience=patience
    )
    chain = exact_chain(system, prefill_queue_cap=cap, decode_queue_cap=0, tolerance=1e-6)
    k = np.arange(1, servers + cap + 1)
    law = birth_death(np.full(k.size, rate), np.minimum(k, servers) + patience * np.maximum(k - servers, 0))
    levels = np.arange(law.size)
    np.testing.assert_allclose(chain.means.prefill.sum(), law @ np.minimum(levels, servers), atol=1e-10)
    np.testing.assert_allclose(chain.means.prefill_queue.sum(), law @ np.maximum(levels - servers, 0), atol=1e-10)
    np.testing.assert_allclose(chain.means.prefill_marginal[1:], law[servers + 1 :], atol=1e-10)
    if patience == 0 and servers == 1:
        np.testing.assert_allclose(chain.values["prefill_wait"], 0.6 / (1 - 0.6), atol=1e-9)  # M/M/1, rho/(mu - lambda)


@pytest.mark.parametrize("servers", [1, 3])
def test_the_stages_are_a_tandem_in_product_form(servers):
    # patient classes, so that Burke's theorem holds: an M/M/c after an M/M/2
    system = two_stages(
        arrival_rate=0.5, prefill_rate=0.7, prefill_gpus=2, decode_rate=1.1, slots=servers, patience=0.0
    )
    chain = exact_chain(system, prefill_queue_cap=32, decode_queue_cap=34, tolerance=1e-6)
    means = chain.means
    for rate, servers_here, queue, busy, marginal in (
        (0.7, 2, means.prefill_queue, means.prefill, means.prefill_marginal),
        (1.1, servers, means.decode_queue, means.decode, means.decode_marginal),
    ):
        k = np.arange(1, 400)
        law = birth_death(np.full(k.size, 0.5), rate * np.minimum(k, servers_here))
        levels = np.arange(law.size)
        np.testing.assert_allclose(queue.sum(), law @ np.maximum(levels - servers_here, 0), atol=1e-10)
        np.testing.assert_allclose(busy.sum(), law @ np.minimum(levels, servers_here), atol=1e-10)
        np.testing.assert_allclose(marginal[1:20], law[servers_here + 1 : servers_here + 20], atol=1e-10)
    np.testing.assert_allclose(means.throughput, 0.5, atol=1e-10)
    np.testing.assert_allclose(chain.revenue_rate, 0.5 / system.gpus, atol=1e-10)


def test_the_decode_stage_with_impatience_is_erlang_a_in_the_limit_of_instant_prefills():
    rate, servers, patience = 2.4, 2, 1.5
    gaps = []
    for speed in (1e3, 1e4):
        system = two_stages(
            arrival_rate=rate, prefill_rate=speed, prefill_gpus=1, decode_rate=1.0, slots=servers, patience=patience
        )
        chain = exact_chain(system, tolerance=1e-11)
        k = np.arange(1, 80)
        law = birth_death(np.full(k.size, rate), np.minimum(k, servers) + patience * np.maximum(k - servers, 0))
        exact = law @ np.maximum(np.arange(law.size) - servers, 0)
        gaps.append(abs(chain.means.decode_queue.sum() - exact))
    assert gaps[1] < gaps[0] / 9  # first order in 1/speed
    assert gaps[1] < 1e-3


# The law


@pytest.mark.parametrize("seed", range(12))
def test_two_methods_agree_and_flows_balance(seed):
    system = random_system(seed)
    layout = Layout(system=system, prefill_queue_cap=5, decode_queue_cap=3, ordered_places=seed % 4)
    states, generator = enumerate_chain(layout)
    assert len(states) <= layout.states()
    assert np.unique(states.keys).size == len(states)
    np.testing.assert_allclose(generator.sum(axis=1), 0.0, atol=1e-12)
    off = generator - sparse.diags_array(generator.diagonal())
    assert off.data.min() >= 0
    assert csgraph.connected_components(generator, connection="strong")[0] == 1
    direct, iterative = (stationary_law(generator, method=method) for method in ("direct", "iterative"))
    assert np.abs(direct - iterative).sum() < 1e-9
    assert relative_residual(generator, direct) < 1e-13
    m = states.means(direct)
    assert abs(m.prefill_marginal.sum() - 1) < 1e-12
    patience, lost = system.abandonment_rate, direct[states.flags > 0].sum()
    served = m.prefill * system.prefill_rates()
    np.testing.assert_allclose(served.sum(axis=0), m.admitted, atol=1e-12)
    # what the caps turn away is all that is missing from the balances
    into = system.arrival_rate - patience * m.prefill_queue - m.admitted
    through = m.admitted - patience * m.decode_queue - m.throughput
    speed = system.arrival_rate.sum() + (system.prefill_rates().max(axis=1) @ system.role_gpus)
    for gap in (into, through):
        assert np.all(gap > -1e-10)
        assert np.all(gap < lost * speed + 1e-10)


def test_a_pin_that_overflows_is_moved():
    up, down = np.full(4000, 5.0), np.full(4000, 1.0)
    down[2000:] = 25.0
    generator = birth_death_generator(up, down)
    with np.errstate(all="ignore"):
        assert not np.all(np.isfinite(pinned_law(generator, 0)))
    expected = birth_death(up, down)
    for method in ("direct", "iterative"):
        np.testing.assert_allclose(stationary_law(generator, method=method), expected, atol=1e-9)


def test_what_is_no_law_is_not_returned():
    generator = birth_death_generator(np.ones(3), np.full(3, 2.0))
    with pytest.raises(fo.SolverFailure, match="not a probability law"):
        certified(generator, np.array([0.5, 0.6, -0.1, 0.0]))
    with pytest.raises(fo.SolverFailure, match="not a probability law"):
        certified(generator, np.full(4, np.nan))
    with pytest.raises(fo.SolverFailure, match="residual must be at most"):
        certified(generator, np.full(4, 0.25))
    apart = sparse.csr_array(np.array([[-1.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(fo.InvalidInput, match="irreducible; it falls into 2 parts"):
        stationary_law(apart)
    with pytest.raises(fo.InvalidInput, match="method must be one of"):
        stationary_law(generator, method="guess")
    np.testing.assert_array_equal(stationary_law(sparse.csr_array((1, 1))), [1.0])


# The dynamics, against a plain enumeration by other rules of counting


def test_a_buffer_of_equal_classes_needs_no_order():
    alike = two_classes(output_tokens=[1.0, 1.0], abandonment_rate=[2.0, 2.0], decode_reward=[4.0, 4.0])
    exact, counts = (
        exact_chain(alike, prefill_queue_cap=4, decode_queue_cap=4, ordered_places=k, tolerance=5e-2) for k in (4, 0)
    )
    assert exact.exact
    assert not counts.exact
    assert len(counts.states) < len(exact.states)
    np.testing.assert_allclose(counts.means.decode_marginal, exact.means.decode_marginal, atol=1e-10)
    np.testing.assert_allclose(counts.means.throughput.sum(), exact.means.throughput.sum(), atol=1e-10)


def test_order_in_the_buffer_matters_and_converges():
    system = two_classes(output_tokens=[3.0, 0.2], abandonment_rate=[0.5, 0.2])
    revenue = [
        exact_chain(system, prefill_queue_cap=2, decode_queue_cap=5, ordered_places=k, tolerance=0.9).revenue_rate
        for k in range(6)
    ]
    errors = np.abs(np.array(revenue) - revenue[-1])
    assert errors[0] > 1e-6
    assert errors[4] < errors[0] / 20


def test_exchangeable_gpus_are_one_state():
    one = two_classes(role_gpus=[1, 1], role_decode_slots=[2, 2], role_prefill_mode=[0, 0], role_slots=[2, 2])
    merged = replace(one, role_gpus=[2, 0])
    apart = Layout(system=one, prefill_queue_cap=1, decode_queue_cap=1, ordered_places=1)
    together = replace(apart, system=merged)
    counts = [len(enumerate_chain(layout)[0]) for layout in (apart, together)]
    assert counts[1] < 0.6 * counts[0]


def test_the_simulator_agrees():
    scores = []
    for seed in range(30):
        system = random_system(seed)
        chain = exact_chain(system, tolerance=2e-4)
        runs = [
            simulate(system, Start.empty(system), horizon=1050.0, warmup=50.0, rng=np.random.default_rng(stream))
            for stream in np.random.SeedSequence(seed).spawn(24)
        ]
        m, window = chain.means, runs[0].window
        for name, mean in (
            ("prefill_queue_time", m.prefill_queue),
            ("decode_queue_time", m.decode_queue),
            ("prefill_time", m.prefill),
            ("decode_time", m.decode),
            ("decode_completions", m.throughput),
            ("expected_reward", chain.revenue_rate * system.gpus),
        ):
            seen = np.array([getattr(run, name) for run in runs]).reshape(len(runs), -1) / window
            error = seen.std(axis=0, ddof=1) / np.sqrt(len(runs))
            t = (seen.mean(axis=0) - np.ravel(mean))[error > 1e-4] / error[error > 1e-4]
            scores += list(stats.norm.ppf(stats.t.cdf(t, len(runs) - 1)))  # to normal scores
    z = np.abs(scores)
    assert len(z) > 250
    assert z.max() < 4
    # the quantities of one system are correlated: allow for an effective sample of a third
    assert np.mean(z > 1.96) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / (len(z) / 3))


# In time


def test_the_transient_law_is_that_of_the_matrix_exponential():
    states, generator = enumerate_chain(
        Layout(system=two_classes(), prefill_queue_cap=1, decode_queue_cap=1, ordered_places=1)
    )
    start = np.random.default_rng(3).dirichlet(np.ones(len(states)))
    dense = generator.toarray()
    for time in (0.0, 0.3, 5.0):
        found = transient_law(generator, start, time)
        assert found.truncation_error <= 1e-12
        np.testing.assert_allclose(found.law, start @ expm(dense * time), atol=1e-11)
    rough = transient_law(generator, start, 5.0, tolerance=1e-2)
    gap = np.abs(rough.law - start @ expm(dense * 5.0)).sum()
    assert 1e-6 < gap <= rough.truncation_error + 1e-12
    assert rough.truncation_error <= 1e-2


def test_the_transient_law_becomes_the_stationary_one():
    chain = exact_chain(two_classes(), tolerance=1e-2, prefill_queue_cap=3, decode_queue_cap=2)
    gaps = [np.abs(chain.transient(time).law - chain.law).sum() for time in (0.0, 2.0, 8.0, 100.0)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-10
    stays = chain.transient(3.0, chain.law)
    np.testing.assert_allclose(stays.law, chain.law, atol=1e-12)
    early = chain.earnings(chain.states.means(chain.transient(0.5, 0).law))
    assert 0 < early < chain.revenue_rate
    for arguments, match in (
        ((-1.0,), "time must be finite"),
        ((1.0, 10**9), "must be a state below"),
        ((1.0, np.ones(3)), "start must be a law"),
        ((1e12,), "use the stationary law"),
    ):
        with pytest.raises(fo.InvalidInput, match=match):
            chain.transient(*arguments)
    with pytest.raises(fo.InvalidInput, match="tolerance must be between"):
        chain.transient(1.0, tolerance=0.0)


# Limits


def test_caps_grow_until_the_lost_mass_is_within_the_tolerance():
    system = two_stages(arrival_rate=0.8, prefill_rate=1.0, prefill_gpus=1, decode_rate=1.0, slots=2, patience=0.05)
    chain = exact_chain(system, tolerance=1e-9)
    assert 0 < chain.lost_mass <= 1e-9
    assert chain.states.layout.prefill_queue_cap > 8
    finer = exact_chain(system, tolerance=1e-12)
    assert finer.revenue_rate == pytest.approx(chain.revenue_rate, rel=1e-7)


def test_the_truncation_guard_raises():
    with pytest.raises(fo.InvalidInput, match=r"the caps lose mass 0\.\d+, more than tolerance=1e-08; raise prefill_"):
        exact_chain(two_classes(arrival_rate=[9.0, 9.0]), prefill_queue_cap=2, decode_queue_cap=2)
    grown = two_classes(arrival_rate=[9.0, 9.0], abandonment_rate=[0.0, 0.0])
    with pytest.raises(
        fo.InvalidInput, match=r"max_states=8,000 \(at caps of .* the lost mass is still [\d.]+\)\. Sim"
    ):
        exact_chain(grown, max_states=8_000)


def test_what_is_too_large_is_refused_before_it_is_allocated(monkeypatch):
    def never(*_arguments, **_options):
        raise AssertionError("allocated")

    monkeypatch.setattr(exact_module, "enumerate_chain", never)
    large = two_classes(role_gpus=[1, 2], role_decode_slots=[15, 16], role_slots=[16, 16])
    with pytest.raises(fo.InvalidInput, match=r"up to [\d,]+ states .*max_states=2,000,000. Simulate instead"):
        exact_chain(large)
    with pytest.raises(fo.InvalidInput, match=r"needs about \d+\.\d+ GiB, more than memory_limit=2.00 GiB. Simulate"):
        exact_chain(large, max_states=10**9)
    with pytest.raises(fo.InvalidInput, match="does not fit into 62 bits"):
        exact_chain(two_classes(role_gpus=[1, 40], role_decode_slots=[1, 1]))
    middling = two_classes(role_gpus=[1, 1], role_decode_slots=[15, 16], role_slots=[16, 16])
    with pytest.raises(fo.InvalidInput, match="method='direct' takes at most 300,000 states"):
        exact_chain(middling, max_states=10**9, memory_limit=1e14, method="direct")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prefill_queue_cap": -1}, "prefill_queue_cap must be a whole number of at least 0; got -1"),
        ({"decode_queue_cap": 1.5}, "decode_queue_cap must be a whole number"),
        ({"ordered_places": -2}, "ordered_places must be"),
        ({"max_states": 0}, "max_states must be a whole number of at least 1"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
        ({"memory_limit": 0}, "memory_limit must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(fo.InvalidInput, match=match):
        exact_chain(two_classes(), **options)


def test_other_things_are_refused():
    with pytest.raises(fo.InvalidInput, match="takes a Policy or a System; got str"):
        exact_chain("policy")


# The reference instance


def test_the_reference_instance_of_one_and_two_gpus(reference_plan):
    """Decode slots are the whole of the difficulty: the buffer's order is kept at its head only."""
    policy = reference_plan.policy(gpus=1)
    chain = exact_chain(policy, prefill_queue_cap=3, decode_queue_cap=12, ordered_places=0, tolerance=5e-2)
    assert not chain.exact
    assert chain.lost_mass < 5e-2
    result = policy.simulate(horizon=4000, warmup=400, replications=16, seed=1)
    assert chain.revenue_rate == pytest.approx(result.revenue_rate.mean, rel=0.02)
    assert chain.revenue_rate < reference_plan.revenue_rate
    joined = chain.to_frame().join(result.to_frame())
    assert len(joined) == len(chain.to_frame()) == len(result.to_frame())
    assert (chain.to_frame().index == result.to_frame().index).all()
    assert "first 0 of a line in order (approximate)" in repr(chain)
    assert "Revenue rate" in chain._repr_html_()
    with pytest.raises(fo.InvalidInput, match=r"up to \d+,\d+ states with prefill_queue_cap=4, decode_queue_cap=4"):
        exact_chain(reference_plan.policy(gpus=2), max_states=100_000)


def test_frames_of_a_bare_system_label_by_number():
    chain = exact_chain(two_classes(), tolerance=1e-2, prefill_queue_cap=4, decode_queue_cap=3)
    frame = chain.to_frame()
    assert frame.loc[("throughput", "class 1"), "exact"] == pytest.approx(chain.means.throughput[1] / 2)
    assert ("role_decode", "role 1") in frame.index
    assert frame.loc[("revenue_rate", ""), "exact"] == chain.revenue_rate
