"""The optimal policy against an enumeration, a linear program, every other policy, and the fluid bound."""

from dataclasses import replace

import numpy as np
import pytest
from brute_force import BruteForceControl
from small_fleets import mixture, small_policy, two_classes, two_stages

import fluidopt as fo
from fluidopt.chain import dynamic as dynamic_module
from fluidopt.chain import exact_chain, optimal_policy
from fluidopt.chain import optimal as optimal_module
from fluidopt.chain.control import PREFILL, control_layout, controlled_chain, state_count
from fluidopt.chain.decisions import coordinates, steps
from fluidopt.chain.dynamic import best_policy
from fluidopt.policy import Gate
from fluidopt.policy.extract import RULES, UNPARTITIONED
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.system import System


def one_gpu(classes, *, slots, decode_slots):
    """One GPU that prefills and decodes, and the first of the classes of `two_classes`."""
    whole = two_classes()
    names = ("arrival_rate", "prompt_tokens", "output_tokens", "abandonment_rate", "prefill_reward", "decode_reward")
    keys = ("gate_slope", "gate_base", "gate_queue_target")
    return System(
        **{name: getattr(whole, name)[:classes] for name in (*names, *keys)},
        mode_chunk=whole.mode_chunk,
        mode_time=whole.mode_time,
        role_gpus=[1],
        role_prefill_mode=[0],
        role_rest_mode=[1],
        role_decode_slots=[decode_slots],
        role_slots=[slots],
        router_order=[0],
        placement=0,
    )


def optimum(system, prefill_cap, decode_cap, tolerance=1e-9):
    return optimal_policy(system, prefill_queue_cap=prefill_cap, decode_queue_cap=decode_cap, tolerance=tolerance)


# The optimum


@pytest.mark.parametrize(
    ("classes", "slots", "caps", "policies"),
    [
        (1, 1, (0, 0), 4),
        (1, 1, (1, 0), 36),
        (1, 1, (1, 1), 1728),
        (1, 2, (0, 0), 8),
        (1, 2, (1, 0), 576),
        (2, 1, (0, 0), 16),
    ],
)
def test_no_policy_of_a_tiny_fleet_is_better(classes, slots, caps, policies):
    system = one_gpu(classes, slots=slots, decode_slots=1)
    control = BruteForceControl(system, *caps)
    assert control.policies() == policies
    found = optimum(system, *caps)
    assert found.revenue_rate == pytest.approx(control.enumerate(), rel=1e-9)
    assert found.upper_bound == pytest.approx(found.lower_bound, rel=2e-9)


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("kind", ["gate-and-route", "GF-WSP"])
@pytest.mark.parametrize("seed", range(3))
def test_the_gain_is_that_of_the_linear_program(kind, gpus, seed):
    system = fleet_system(small_policy(kind, gpus, seed))
    caps = (2, 1) if gpus == 1 else (1, 1)
    found = optimum(system, *caps)
    assert found.revenue_rate * gpus == pytest.approx(BruteForceControl(system, *caps).linear_program(), rel=1e-8)


@pytest.mark.parametrize("seed", [0, 6, 9, 11, 14, 15])
def test_any_roles_have_the_gain_of_the_linear_program(seed):
    """Roles that only prefill, only decode, differ in speed; a class may be patient."""
    system = mixture(seed)
    if seed % 2:
        system = replace(system, abandonment_rate=np.array([0.0, 1.0]))
    found = optimum(system, 1, 1)
    assert found.revenue_rate * system.gpus == pytest.approx(BruteForceControl(system, 1, 1).linear_program(), rel=1e-8)
    assert len(found.chain) <= state_count(found.chain.space.layout)


@pytest.mark.parametrize("servers", [1, 2])
def test_where_stages_do_not_disturb_each_other_the_best_is_never_to_idle(servers):
    """Prefills on GPUs of their own slow no decode down: the gate that always admits loses nothing."""
    system = two_stages(
        arrival_rate=1.5, prefill_rate=1.0, prefill_gpus=servers, decode_rate=2.0, slots=1, patience=1.5
    )
    found = optimum(system, 14, 14)
    chain = exact_chain(system, prefill_queue_cap=14, decode_queue_cap=14, tolerance=1e-3)
    assert found.revenue_rate == pytest.approx(chain.revenue_rate, rel=1e-7)
    np.testing.assert_allclose(found.means.prefill_marginal[:9], chain.means.prefill_marginal[:9], atol=1e-7)


def test_of_two_classes_that_differ_in_reward_the_dearer_goes_first():
    """A prefill-only GPU, and decode slots that never fill up."""
    one = two_stages(arrival_rate=1.0, prefill_rate=1.0, prefill_gpus=1, decode_rate=50.0, slots=4, patience=0.5)
    by_class = ("arrival_rate", "prompt_tokens", "output_tokens", "abandonment_rate", "gate_slope", "gate_base")
    twice = {name: np.tile(getattr(one, name), 2) for name in (*by_class, "gate_queue_target", "prefill_reward")}
    system = System(
        **twice,
        decode_reward=[1.0, 1.2],
        **{name: getattr(one, name) for name in vars(one) if name.startswith(("mode", "router"))},
        role_gpus=one.role_gpus,
        role_prefill_mode=one.role_prefill_mode,
        role_rest_mode=one.role_rest_mode,
        role_decode_slots=one.role_decode_slots,
        role_slots=one.role_slots,
        placement=0,
    )
    found = optimum(system, 4, 1)
    table = found.decision_map("prefill_queue[class 1]", "prefill_queue[class 0]")
    assert set(table.loc[0]) == {"–", "class 0"}
    assert set(table.loc[1:].to_numpy().ravel()) == {"–", "class 1"}


def thresholds(policy, seed):
    rng = np.random.default_rng(seed)
    order = ("a", "b") if rng.integers(2) else ("b", "a")
    hold = {name: float(rng.integers(-2, 3)) for name in order if rng.random() < 0.7}
    placement = "uniform" if rng.integers(2) else "fewest-decodes"
    gate = Gate(rule="priority", order=order, hold=hold, placement=placement, before_decodes=bool(rng.integers(2)))
    return replace(policy, kind="thresholds", gate=gate)


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("partition", [True, False])
def test_no_other_policy_of_the_same_roles_earns_more(gpus, seed, partition):
    kinds = [kind for kind in RULES if (kind not in UNPARTITIONED) == partition]
    policies = [small_policy(kind, gpus, seed) for kind in kinds]
    assert len({policy.roles for policy in policies}) == 1
    router = policies[0] if partition else small_policy("GF-WSP", gpus, seed)
    policies += [thresholds(router, 100 * seed + k) for k in range(12)]
    best = optimum(policies[0], 3, 2)
    earned = [
        exact_chain(policy, prefill_queue_cap=3, decode_queue_cap=2, tolerance=1.0).revenue_rate for policy in policies
    ]
    assert max(earned) <= best.upper_bound * (1 + 1e-9)
    assert min(earned) < best.lower_bound * (1 - 1e-4)
    assert best.upper_bound < policies[0].revenue_bound


@pytest.mark.parametrize("seed", range(6))
def test_a_fleet_whose_gpus_all_may_prefill_can_do_what_any_partition_can(seed):
    plan = small_policy("GF-WSP", 2, seed).model.solve()
    free = optimum(plan.policy(gpus=2, kind="GF-WSP"), 3, 3)
    parted = [optimum(plan.policy(gpus=2, prefill_gpus=m), 3, 3) for m in (1, 2)]
    assert free.lower_bound > max(each.upper_bound for each in parted)
    assert free.upper_bound < plan.revenue_rate


def test_larger_caps_earn_no_less_and_the_roles_are_all_that_matters():
    policy = small_policy("gate-and-route", 2, seed=3)
    gains = [optimum(policy, *caps).revenue_rate for caps in ((0, 0), (1, 0), (1, 1), (2, 2), (4, 4))]
    assert np.all(np.diff(gains) > -1e-9 * gains[0])
    other = optimum(small_policy("sli-aware-general", 2, seed=3), 2, 2)
    assert other.revenue_rate == pytest.approx(gains[3], rel=1e-9)


def test_caps_grow_until_they_matter_no_more():
    policy = small_policy("GF-WSP", 1, seed=2)
    found = optimal_policy(policy, cap_tolerance=1e-5)
    assert 0 <= found.cap_rise <= 1e-5
    assert found.lost_mass < 1e-3
    ample = optimum(policy, found.prefill_queue_cap + 4, found.decode_queue_cap + 4)
    assert found.revenue_rate == pytest.approx(ample.revenue_rate, rel=1e-5)
    half = optimal_policy(policy, decode_queue_cap=1, cap_tolerance=1e-5)
    assert half.decode_queue_cap == 1
    assert half.prefill_queue_cap > optimal_module.FIRST_CAP
    assert np.isnan(ample.cap_rise)


def test_flows_balance_under_the_optimal_policy():
    policy = small_policy("gate-and-route", 2, seed=4)
    found = optimum(policy, 5, 4)
    m, s = found.means, found.system
    assert found.law.sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose((m.prefill * s.prefill_rates()).sum(axis=0), m.admitted, atol=1e-12)
    into = s.arrival_rate - s.abandonment_rate * m.prefill_queue - m.admitted
    through = m.admitted - s.abandonment_rate * m.decode_queue - m.throughput
    for gap in (into, through):  # what is turned away
        assert np.all(gap > -1e-10)
        assert np.all(gap < found.lost_mass * found.chain.leaving.max() + 1e-10)
    money = float(found.law @ found.chain.reward) / s.gpus
    assert found.revenue_rate == pytest.approx(money, rel=1e-12)
    assert found.lower_bound * (1 - 1e-9) <= found.revenue_rate <= found.upper_bound * (1 + 1e-9)


def test_a_fleet_that_earns_nothing_is_no_trouble():
    nobody = optimum(replace(two_classes(), arrival_rate=np.zeros(2)), 1, 1)
    assert len(nobody.chain) == 1
    assert nobody.revenue_rate == nobody.upper_bound == nobody.lower_bound == 0
    free = optimum(replace(two_classes(), prefill_reward=np.zeros(2), decode_reward=np.zeros(2)), 1, 1)
    assert free.revenue_rate == free.upper_bound == free.lower_bound == 0


# The method


@pytest.mark.parametrize("tolerance", [0.5, 1e-2, 1e-4])
def test_bounds_hold_however_early_it_stops(tolerance):
    layout = control_layout(fleet_system(small_policy("GF-WSP", 2, seed=5)), 3, 3)
    chain = controlled_chain(layout)
    gain = best_policy(chain, tolerance=1e-11)
    early = best_policy(chain, tolerance=tolerance)
    assert early.lower <= gain.lower * (1 + 1e-11)
    assert early.upper >= gain.upper * (1 - 1e-11)
    assert early.upper - early.lower <= tolerance * early.upper
    assert early.policies <= gain.policies


@pytest.mark.parametrize("kind", ["gate-and-route", "GF-WSP"])
def test_policies_by_krylov_by_factors_and_by_sweeps_alone_agree(kind, monkeypatch):
    chain = controlled_chain(control_layout(fleet_system(small_policy(kind, 2, seed=6)), 3, 2))
    by_factors = best_policy(chain, tolerance=1e-10)
    monkeypatch.setattr(dynamic_module, "DIRECT_STATES", 0)
    by_krylov = best_policy(chain, tolerance=1e-10)
    by_sweeps = best_policy(chain, tolerance=1e-10, most_policies=0)
    assert by_factors.policies > 1
    assert by_sweeps.policies == 0
    assert by_sweeps.sweeps > 100
    for other in (by_krylov, by_sweeps):
        assert other.lower == pytest.approx(by_factors.lower, rel=1e-9)
        assert other.upper == pytest.approx(by_factors.upper, rel=1e-9)


@pytest.mark.parametrize("direct_states", [10**6, 0])
def test_a_policy_that_gets_stuck_has_no_values(direct_states, monkeypatch):
    """Patient requests, and a controller that never serves: nothing leads out of the full fleet."""
    patient = replace(two_classes(role_gpus=[1, 0]), abandonment_rate=np.zeros(2))
    chain = controlled_chain(control_layout(patient, 1, 1))
    turned_away = [chain.actions[[x]].indices.min() if chain.above[x] else x for x in range(len(chain))]
    settled = np.array(turned_away)
    assert not np.any(chain.above[settled])
    monkeypatch.setattr(dynamic_module, "DIRECT_STATES", direct_states)
    assert dynamic_module._policy_values(chain, settled, accuracy=1e-9, start=np.zeros(len(chain))) is None
    assert best_policy(chain, tolerance=1e-8).lower > 0


def test_sweeps_take_over_where_a_policy_has_no_values(monkeypatch):
    chain = controlled_chain(control_layout(fleet_system(small_policy("GF-WSP", 1)), 2, 2))
    expected = best_policy(chain, tolerance=1e-8)
    monkeypatch.setattr(dynamic_module, "_policy_values", lambda *_arguments, **_options: None)
    found = best_policy(chain, tolerance=1e-8)
    assert found.policies == 1
    assert found.sweeps > dynamic_module.FIRST_SWEEPS
    assert found.lower == pytest.approx(expected.lower, rel=1e-7)


def test_actions_lead_to_lower_numbers_and_above_a_cap_nobody_rests():
    chain = controlled_chain(control_layout(fleet_system(small_policy("GF-WSP", 2)), 2, 2))
    leads = chain.actions.tocoo()
    assert np.all(leads.col < leads.row)
    np.testing.assert_array_equal(np.diff(chain.events.indptr)[chain.above], 0)
    assert np.all(np.diff(chain.actions.indptr)[chain.above] > 0)
    found = best_policy(chain, tolerance=1e-9)
    assert not np.any(chain.above[found.settled])
    np.testing.assert_array_equal(found.settled[found.settled], found.settled)


def test_what_does_not_converge_is_not_returned():
    chain = controlled_chain(control_layout(fleet_system(small_policy("GF-WSP", 1)), 2, 2))
    with pytest.raises(fo.SolverFailure, match=r"after 0 policies and 6 sweeps the best gain is between .* tolerance"):
        best_policy(chain, tolerance=1e-9, most_policies=0, most_sweeps=5)


def test_a_hundred_thousand_states(reference_plan):
    """One GPU of 16 slots: rates differ a thousandfold, so value iteration alone would need many sweeps."""
    policy = reference_plan.policy(gpus=1, kind="GF-WSP")
    found = optimal_policy(policy, prefill_queue_cap=3, decode_queue_cap=3)
    assert len(found.chain) > 75_000
    assert found.solution.policies < 20
    assert found.upper_bound - found.lower_bound <= 1e-6 * found.upper_bound
    assert found.upper_bound < reference_plan.revenue_rate
    for kind in ("FI-WSP", "GI-WSP"):
        other = exact_chain(reference_plan.policy(gpus=1, kind=kind), prefill_queue_cap=3, tolerance=1.0)
        assert other.revenue_rate < found.lower_bound


# The decisions


def test_a_class_that_earns_nothing_is_never_served():
    """Its prefill would slow down the decodes that earn."""
    system = replace(
        fleet_system(small_policy("GF-WSP", 1, seed=1)), prefill_reward=np.zeros(2), decode_reward=np.array([0.0, 5.0])
    )
    found = optimum(system, 3, 2)
    assert found.means.admitted[0] < 1e-12
    table = found.decision_map("prefill_queue[class 1]", "prefill_queue[class 0]", where={"decode[class 1]": 1})
    assert set(table.loc[0]) == {"–", "hold"}
    assert table.loc[1, 0].startswith("class 1")
    worth = replace(system, decode_reward=np.array([5.0, 0.0]))
    assert optimum(worth, 3, 2).means.admitted[1] < 1e-12


def test_the_map_is_the_decisions_weighted_by_how_often_they_are_met():
    policy = small_policy("gate-and-route", 2, seed=1)
    found = optimum(policy, 3, 2)
    chain, solution = found.chain, found.solution
    flow = chain.events.T @ found.law
    numbers = np.flatnonzero(flow > 0)
    at = coordinates(chain, numbers, ["a", "b"])
    table = found.decision_map("free_decode_slots", "prefill_queue[a]", where={"prefill_queue[b]": 1})
    assert (table.index.name, table.columns.name) == ("free_decode_slots", "prefill_queue[a]")
    compared = 0
    for free in table.index:
        for queued in table.columns:
            here = (
                (at["free_decode_slots"] == free) & (at["prefill_queue[a]"] == queued) & (at["prefill_queue[b]"] == 1)
            )
            weight = {}
            for number in numbers[here & (at["idle_prefill_gpus"] > 0)]:
                started = [
                    "ab"[label]
                    for _, (kind,), (label,), _ in steps(chain, solution, np.array([number]))
                    if kind == PREFILL
                ]
                told = " + ".join(
                    f"{started.count(name)} {name}" if started.count(name) > 1 else name
                    for name in sorted(set(started))
                )
                weight[told or "hold"] = weight.get(told or "hold", 0.0) + flow[number]
            if not weight:
                assert table.loc[free, queued] == "–"
                continue
            most = max(weight, key=weight.get)
            share = weight[most] / sum(weight.values())
            assert table.loc[free, queued] == (most if share >= 0.995 else f"{most} {100 * share:.0f} %")
            compared += 1
    assert compared > 4


def test_routes_name_the_role_and_what_runs_there():
    plan = small_policy("GF-WSP", 2, seed=3).model.solve()
    found = optimum(plan.policy(gpus=2, prefill_gpus=1), 3, 3)
    table = found.decision_map("decode_queue[a]", "decode_queue[b]", of="route")
    cells = set(table.to_numpy().ravel())
    assert any(cell.startswith("a to solo") for cell in cells)
    assert all(cell == "–" or " to " in cell or cell.startswith("wait") for cell in cells)


def test_decisions_in_words():
    found = optimum(one_gpu(2, slots=2, decode_slots=1), 1, 1)
    told = {found.describe(number): found.decision(number) for number in range(len(found.chain))}
    assert told["role 0: prefill -, decodes [0, 0]; prefill queue [0, 0]; decode queue [0, 0]"] == "wait"
    both = "role 0: prefill -, decodes [0, 0]; prefill queue [0, 1]; decode queue [1, 0]"
    assert told[both] in (  # which order does not matter
        "start class 1 on role 0; seat class 0 on role 0 beside a prefill of class 1",
        "seat class 0 on role 0; start class 1 on role 0 beside 1 class 0",
    )
    assert any("turn away class 0" in each for each in told.values())


def test_it_prints_and_joins_the_frames_of_chain_and_simulation():
    policy = small_policy("gate-and-route", 2, seed=1)
    found = optimum(policy, 3, 2)
    assert "Best revenue rate" in repr(found)
    assert "below the fluid optimum" in repr(found)
    assert "roles of gate-and-route for 2 GPUs" in found._repr_html_()
    chain = exact_chain(policy, prefill_queue_cap=3, decode_queue_cap=2, tolerance=1.0)
    joined = found.to_frame().join(chain.to_frame())
    assert list(joined.columns) == ["optimal", "exact"]
    assert joined.notna().all().all()
    assert joined.loc[("revenue_rate", ""), "optimal"] > joined.loc[("revenue_rate", ""), "exact"]


# Limits


def test_what_is_too_large_is_refused_before_it_is_allocated(monkeypatch):
    def never(*_arguments, **_options):
        raise AssertionError("allocated")

    monkeypatch.setattr(optimal_module, "controlled_chain", never)
    large = two_classes(role_gpus=[1, 1], role_decode_slots=[15, 16], role_slots=[16, 16])
    with pytest.raises(
        fo.InvalidInput, match=r"has [\d,]+ states with .*max_states=3,000,000\. Give lower caps, .*plan"
    ):
        optimal_policy(large)
    with pytest.raises(fo.InvalidInput, match=r"needs about \d+\.\d+ GiB, more than memory_limit=2.00 GiB\. Give"):
        optimal_policy(large, max_states=10**9)
    with pytest.raises(fo.InvalidInput, match="does not fit into 62 bits"):
        optimal_policy(two_classes(role_gpus=[1, 40], role_decode_slots=[1, 1]), memory_limit=1e12)


@pytest.mark.parametrize(
    ("most", "why"),
    [
        (15_000, "to see whether larger caps raise"),
        (25_000, r"raising prefill_queue_cap to 5 still raised the revenue"),
    ],
)
def test_caps_that_grow_too_large_say_so(most, why):
    system = two_classes(arrival_rate=[0.9, 0.9], abandonment_rate=[0.1, 0.1])
    with pytest.raises(fo.InvalidInput, match=rf"max_states={most:,} \({why}"):
        optimal_policy(system, max_states=most)


def test_memory_is_what_was_estimated():
    """An upper bound of what the chain itself holds, and not a wild one."""
    from fluidopt.chain.control import memory

    layout = control_layout(fleet_system(small_policy("GF-WSP", 2)), 4, 4)
    chain = controlled_chain(layout)
    held = sum(
        part.nbytes for matrix in (chain.events, chain.actions) for part in (matrix.data, matrix.indices, matrix.indptr)
    )
    assert held < memory(layout) < 20 * held


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prefill_queue_cap": -1}, "prefill_queue_cap must be a whole number of at least 0; got -1"),
        ({"decode_queue_cap": 1.5}, "decode_queue_cap must be a whole number"),
        ({"max_states": 0}, "max_states must be a whole number of at least 1"),
        ({"memory_limit": 0}, "memory_limit must be above 0"),
        ({"tolerance": 0.0}, "tolerance must be between 0 and 1; got 0.0"),
        ({"cap_tolerance": 2}, "cap_tolerance must be between 0 and 1; got 2"),
    ],
)
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(fo.InvalidInput, match=f"optimal_policy: {match}"):
        optimal_policy(two_classes(), **options)


def test_other_things_are_refused():
    with pytest.raises(fo.InvalidInput, match="optimal_policy: takes a Policy or a System; got int"):
        optimal_policy(3)
    found = optimum(one_gpu(2, slots=1, decode_slots=1), 0, 0)
    with pytest.raises(fo.InvalidInput, match=r"a coordinate must be one of prefill_queue, .*; got 'queue'"):
        found.decision_map("queue")
    with pytest.raises(fo.InvalidInput, match=r"a coordinate must be one of .*; got 'decode\[c\]'"):
        found.decision_map(where={"decode[c]": 1})
    with pytest.raises(fo.InvalidInput, match="of must be one of admit, route; got 'both'"):
        found.decision_map(of="both")
