"""Fluid trajectories: against the plan, closed forms and the simulator; what holds on every path; what is refused."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import mode_models, pair_models, random_models

import fluidopt as fo
from fluidopt.fluid import FluidState, fluid_trajectory
from fluidopt.fluid.allocation import fill, first_come
from fluidopt.policy import Gate
from fluidopt.policy.extract import RULES
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.run import simulate
from fluidopt.simulation.system import Start

MANY = 10**6  # GPUs: whole numbers of them per role are the plan's fractions to 1e-6


def reference_policy(kind="gate-and-route", gpus=MANY, charging="bundled", **options):
    return fo.reference_model(charging).solve("highs").policy(gpus=gpus, kind=kind, **options)


def busy_policy(kind, gpus, rates=(0.5, 0.8), theta=(0.1, 0.1), **options):
    """The reference with more long prompts than it can serve, far from the critical load."""
    model = fo.reference_model()
    classes = [
        replace(each, arrival_rate=rate, abandonment_rate=patience)
        for each, rate, patience in zip(model.scenario.classes, rates, theta, strict=True)
    ]
    plan = fo.FluidModel(classes, model.gpu_types[0], prices=model.scenario.prices).solve()
    return plan.policy(gpus=gpus, kind=kind, **options)


def one_class(**changes):
    """One class on GPUs where a prefill does not slow decodes (kappa = 1), so that the fluid is piecewise linear."""
    values = {"arrival_rate": 4.0, "prompt_tokens": 200, "output_tokens": 40, "abandonment_rate": 0.3} | changes
    gpu = fo.GPU(fo.IterationTime(alpha=0.05, beta=0.0005, solo=0.1), batch_size=4, chunk_size=100)
    plan = fo.FluidModel(
        [fo.WorkloadClass("only", **values)], gpu, prices=fo.TokenPrices(prompt=0.1, output=0.2)
    ).solve()
    policy = plan.policy(gpus=100, prefill_gpus=50)
    return policy, fleet_system(policy)


def quiet_policies(model, kinds, gpus=1000):
    """A plan and its policies of these kinds, as far as the model has them and some GPU decodes."""
    plan = model.solve()
    policies = []
    for kind in kinds:
        try:
            policy = plan.policy(gpus=gpus, kind=kind)
        except fo.InvalidInput:
            continue
        policies += [policy] if policy.router.order else []
    return plan, policies


def assert_valid(policy, path, horizon):
    """Signs, capacities, the balance of requests, and no waiting beside free slots (without holds)."""
    system = fleet_system(policy)
    n = system.gpus
    for name in ("prefill_queue", "decode_queue", "prefill", "decode"):
        assert np.all(getattr(path, name) >= 0)
    assert path.time[-1] == horizon
    prefills = path.prefill.sum(axis=2)
    decodes = path.decode.sum(axis=2)
    gpus = system.role_gpus / n
    assert np.all(prefills <= np.where(system.role_prefill_mode >= 0, gpus, 0) + 1e-6)
    assert np.all(decodes <= gpus * system.role_decode_slots + 1e-6)
    assert np.all(prefills + decodes <= gpus * system.role_slots + 1e-6)
    present = path.prefill_queue + path.decode_queue.sum(axis=1) + path.prefill.sum(axis=1) + path.decode.sum(axis=1)
    net = path.arrived - path.abandoned - path.completed
    assert np.abs(present - present[0] - net).max() <= path.imbalance + 1e-9
    assert path.imbalance < 1e-6 * (1 + path.arrived.max())
    free = np.minimum(gpus * system.role_decode_slots, gpus * system.role_slots - prefills) - decodes
    for side in range(system.sides):
        waits = path.decode_queue[:, side].sum(axis=1) > 1e-5
        assert np.all(free[waits][:, system.role_side == side] < 1e-5)
    idle = np.where(
        system.role_prefill_mode >= 0, np.minimum(gpus - prefills, gpus * system.role_slots - prefills - decodes), 0
    )
    assert np.all(idle[path.prefill_queue.sum(axis=1) > 1e-5].sum(axis=1) < 1e-5)


# ---- sharing a flow --------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_fill_shares_at_one_level(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 8))
    weight, offset = rng.uniform(0.1, 2, k), rng.normal(size=k)
    most = np.where(rng.random(k) < 0.5, np.inf, rng.uniform(0, 1, k))
    total = rng.uniform(0, 3)
    share = fill(total, weight, offset, most)
    assert np.all((share >= 0) & (share <= most))
    assert share.sum() == pytest.approx(min(total, most.sum()), abs=1e-12)
    level = (share - offset) / weight
    inside = (share > 1e-12) & (share < most - 1e-12)
    if total < most.sum() and inside.any():  # those at 0 would need a higher level, those with all they want a lower
        assert np.ptp(level[inside]) < 1e-9
        assert np.all(level[share <= 1e-12] >= level[inside].min() - 1e-9)
        assert np.all(level[share >= most - 1e-12] <= level[inside].max() + 1e-9)


@given(st.integers(0, 2**32 - 1))
def test_first_come_is_exact_in_steady_state(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 6))
    arrival, theta, wait = rng.uniform(0.01, 2, k), 10 ** rng.uniform(-3, 1, k), 10 ** rng.uniform(-3, 1)
    theta[0] *= rng.integers(0, 2)  # a patient class in half of the cases
    queue = np.array(
        [a * wait if t == 0 else a * -math.expm1(-t * wait) / t for a, t in zip(arrival, theta, strict=True)]
    )
    leaving = arrival * np.exp(-theta * wait)
    np.testing.assert_allclose(first_come(leaving.sum(), queue, theta), leaving, rtol=1e-6, atol=1e-12)


def test_first_come_of_equally_patient_classes_is_in_proportion():
    np.testing.assert_allclose(first_come(3.0, np.array([1.0, 2.0]), np.array([0.4, 0.4])), [1.0, 2.0])


# ---- convergence to the plan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["empty", "crowded"])
def test_gate_and_route_converges_to_the_plan(start):
    policy = reference_policy()
    crowded = {"prefill_queue": [1.0, 2.0], "decode_queue": [3.0, 1.0]}
    path = fluid_trajectory(policy, horizon=4000.0, start=crowded if start == "crowded" else "empty")
    targets, final = policy.targets, path.final
    np.testing.assert_allclose(final.prefill.sum(axis=0), targets.prefill, atol=1e-5)
    np.testing.assert_allclose(final.prefill_queue, targets.prefill_queue, atol=1e-3)
    assert final.decode.sum() == pytest.approx(sum(targets.decode), rel=1e-5)
    assert final.decode_queue.sum() < 1e-3
    assert path.revenue_rate[-1] == pytest.approx(297.71619, rel=1e-4)
    assert policy.revenue_bound == pytest.approx(297.71619, rel=1e-7)


@pytest.mark.parametrize("kind", ["sli-aware", "sli-aware-general"])
def test_sli_aware_converges_class_by_class(kind):
    policy = reference_policy(kind)
    final = fluid_trajectory(policy, horizon=4000.0).final
    for role, decodes in zip(policy.roles, final.decode, strict=True):
        np.testing.assert_allclose(decodes, policy.targets.decode_by_role[role.name], rtol=2e-3)


def test_plain_gate_and_route_determines_only_totals():
    policy = reference_policy()
    mixed, solo = (0.99 * policy.targets.role_decode[role.name] for role in policy.roles)
    crowded = {"decode": [[mixed, 0.0], [0.0, solo]]}
    path = fluid_trajectory(policy, horizon=20.0, start=crowded)
    assert np.abs(path.decode[10] - [policy.targets.decode_by_role[role.name] for role in policy.roles]).max() > 0.1


def test_prioritize_and_route_earns_the_separate_optimum():
    policy = reference_policy("prioritize-and-route", charging="separate")
    path = fluid_trajectory(policy, horizon=4000.0)
    assert path.revenue_rate[-1] == pytest.approx(298.59798, rel=1e-4)


def test_the_equilibrium_stays():
    policy = reference_policy()
    path = fluid_trajectory(policy, horizon=50.0, start="fluid")
    assert np.abs(path.prefill - path.prefill[0]).max() < 1e-4
    assert np.abs(path.prefill_queue - path.prefill_queue[0]).max() < 1e-3
    np.testing.assert_allclose(path.revenue_rate, policy.revenue_bound, rtol=1e-4)


def test_prefill_queue_relaxes_at_the_abandonment_rate():
    """q_p' = theta (q_p* - q_p) once x = x*."""
    policy = reference_policy()
    path = fluid_trajectory(policy, horizon=60.0, points=121)
    x = path.prefill.sum(axis=1)
    at = 30
    assert np.abs(x[at:] - policy.targets.prefill).max() < 1e-6
    target = policy.targets.prefill_queue[0]
    assert abs(path.prefill_queue[at, 0] - target) > 0.01
    expected = target + (path.prefill_queue[at, 0] - target) * np.exp(-0.1 * (path.time[at:] - path.time[at]))
    np.testing.assert_allclose(path.prefill_queue[at:, 0], expected, atol=2e-4)


def test_decode_workload_identity_and_the_end_of_the_decode_queue():
    """W' = sum (mu_p/mu_m) x - (y_m + kappa y_s) - sum (theta/mu_m) q_d; q_d > 0 only while decode slots are busy."""
    policy = reference_policy()
    system = fleet_system(policy)
    path = fluid_trajectory(
        policy, horizon=40.0, start={"prefill_queue": [2.0, 2.0], "decode_queue": [1.0, 30.0]}, points=4001
    )
    tau, solo = 0.0174 + 6.2e-5 * 256, 0.022
    mu_m, kappa = 1 / (system.output_tokens * tau), tau / solo
    mu_p = system.prefill_rates()[0]
    queue, x = path.decode_queue.sum(axis=1), path.prefill.sum(axis=1)
    y_m, y_s = path.decode[:, 0].sum(axis=1), path.decode[:, 1].sum(axis=1)
    work = (queue + path.decode.sum(axis=1)) @ (1 / mu_m)
    drift = x @ (mu_p / mu_m) - (y_m + kappa * y_s) - queue @ (system.abandonment_rate / mu_m)
    busy = path.prefill.sum(axis=(1, 2)) > system.role_gpus[0] / system.gpus - 1e-6
    assert busy.all()
    step = path.time[1]
    np.testing.assert_allclose(np.diff(work), step * (drift[1:] + drift[:-1]) / 2, atol=1e-4 * abs(drift).max() * step)
    assert queue.sum(axis=1)[-1] < 0.1 * queue.sum(axis=1)[0]
    waits = queue.sum(axis=1) > 1e-6
    assert waits.sum() > 1000
    np.testing.assert_allclose(
        path.decode[waits].sum(axis=(1, 2)), (system.role_gpus @ system.role_decode_slots) / MANY, atol=1e-6
    )


def test_the_number_of_gpus_only_scales():
    few, many = (
        fluid_trajectory(busy_policy("gate-and-route", n, prefill_gpus=n // 4), horizon=80.0) for n in (100, 10**5)
    )
    np.testing.assert_allclose(few.decode, many.decode, atol=1e-5)
    np.testing.assert_allclose(few.prefill_queue, many.prefill_queue, atol=1e-5)


# ---- closed forms ----------------------------------------------------------------------------------------------------


def test_one_class_against_the_closed_form():
    policy, system = one_class()
    rate, theta, g = 4.0, 0.3, 0.5
    mu, delta = system.prefill_rates()[0, 0], 1 / (40 * 0.1)
    slots = g * 3 + g * 4
    path = fluid_trajectory(policy, horizon=20.0, points=401)
    t = path.time
    first = -math.log(1 - g * mu / rate) / mu  # all prefill slots busy
    filling = rate / delta * (1 - np.exp(-delta * t)) - rate * (np.exp(-mu * t) - np.exp(-delta * t)) / (delta - mu)
    at_first = np.interp(first, t, filling)
    y_end = g * mu / delta

    def later(t):
        return y_end + (at_first - y_end) * np.exp(-delta * (t - first))

    at_first = rate / delta * (1 - math.exp(-delta * first)) - rate * (
        math.exp(-mu * first) - math.exp(-delta * first)
    ) / (delta - mu)
    second = first - math.log((slots - y_end) / (at_first - y_end)) / delta  # all decode slots busy
    assert first < second < 15
    queue = np.where(t < first, 0, (rate - g * mu) / theta * -np.expm1(-theta * (t - first)))
    decodes = np.where(t < first, filling, np.minimum(later(t), slots))
    waiting = np.where(t < second, 0, (g * mu - delta * slots) / theta * -np.expm1(-theta * (t - second)))
    np.testing.assert_allclose(path.prefill[:, 0, 0], np.where(t < first, rate / mu * -np.expm1(-mu * t), g), atol=1e-6)
    np.testing.assert_allclose(path.prefill_queue[:, 0], queue, atol=1e-6)
    np.testing.assert_allclose(path.decode.sum(axis=(1, 2)), decodes, atol=1e-6)
    np.testing.assert_allclose(path.decode_queue[:, 0, 0], waiting, rtol=1e-6, atol=1e-6)
    times = [time for time, _ in path.regimes]
    assert np.min(np.abs(np.array(times) - first)) < 2e-3
    assert np.min(np.abs(np.array(times) - second)) < 2e-3


def test_the_gate_keeps_tied_classes_tied():
    """Both classes wait; X_i/x_i become equal and stay so while the prefill slots stay busy."""
    policy = busy_policy("gate-and-route", MANY, rates=(1.5, 1.5))
    policy = replace(policy, targets=replace(policy.targets, prefill=(0.02, 0.2)))
    path = fluid_trajectory(policy, horizon=60.0)
    ratio = path.prefill.sum(axis=1) / [0.02, 0.2]
    assert np.all(path.prefill_queue[60:] > 0.1)
    np.testing.assert_allclose(ratio[60:, 0], ratio[60:, 1], rtol=1e-5)
    assert any("tied at the gate: all" in words for _, words in path.regimes)


def test_queue_deviation_equalises_the_distances_to_the_targets():
    policy = busy_policy("gate-and-route", MANY, rates=(1.5, 1.5))
    policy = replace(
        policy, gate=Gate(rule="queue-deviation"), targets=replace(policy.targets, prefill_queue=(0.5, 0.2))
    )
    path = fluid_trajectory(policy, horizon=100.0)
    excess = path.prefill_queue - [0.5, 0.2]
    np.testing.assert_allclose(excess[100:, 0], excess[100:, 1], atol=1e-5)


def test_priority_serves_the_first_class_in_full():
    policy = busy_policy("gate-and-route", MANY, rates=(0.5, 0.8))
    policy = replace(policy, gate=Gate(rule="priority", order=("prefill-heavy", "decode-heavy")))
    path = fluid_trajectory(policy, horizon=100.0)
    mu = fleet_system(policy).prefill_rates()[0]
    busy = policy.roles[0].gpus / MANY
    expected = min(0.8 / mu[1], busy)
    assert path.final.prefill[0, 1] == pytest.approx(expected, abs=1e-5)
    left = busy - expected
    assert path.final.prefill_queue[0] == pytest.approx((0.5 - mu[0] * left) / 0.1, abs=1e-3)


def test_weights_divide_the_freed_slots_of_a_side():
    """While both classes wait, decodes start, and in time complete, by the weights of [L26] section 13."""
    policy = busy_policy("sli-aware-general", MANY, theta=(1e-3, 1e-3), prefill_gpus=MANY // 3)
    mixed, solo = (role.name for role in policy.roles)
    by_role = {mixed: (3.0, 0.4), solo: (2.0, 3.0)}
    policy = replace(policy, targets=replace(policy.targets, decode_by_role=by_role))
    final = fluid_trajectory(policy, horizon=300.0, start={"decode_queue": [300.0, 300.0]}).final
    assert final.decode_queue.min() > 10
    for at, name in enumerate((mixed, solo)):
        completions = final.decode[at] / [1000, 400]
        expected = np.array(by_role[name]) / [1000, 400]
        assert completions[0] / completions[1] == pytest.approx(expected[0] / expected[1], rel=1e-3)


def test_a_prefill_starts_on_a_uniformly_chosen_idle_gpu():
    gpus = [
        fo.GPU(
            fo.IterationTime(alpha=alpha, beta=6e-5, solo=0.022), batch_size=16, chunk_size=256, name=name, share=0.5
        )
        for name, alpha in (("fast", 0.02), ("slow", 0.1))
    ]
    model = fo.reference_model()
    classes = [replace(each, arrival_rate=0.15) for each in model.scenario.classes]
    policy = fo.FluidModel(classes, gpus, prices=model.scenario.prices).solve().policy(gpus=MANY, kind="GI-WSP")
    system = fleet_system(policy)
    path = fluid_trajectory(policy, horizon=60.0)
    assert [words for _, words in path.regimes] == ["prefill slots free"]
    starts = (system.prefill_rates() * path.final.prefill).sum(axis=1)
    idle = system.role_gpus / system.gpus - path.final.prefill.sum(axis=1)
    assert idle[0] > 1.1 * idle[1]
    assert starts[0] / starts[1] == pytest.approx(idle[0] / idle[1], rel=1e-5)


# ---- classes held back -----------------------------------------------------------------------------------------------


def held_policy(hold, gpus=10_000):
    policy = reference_policy(gpus=gpus, prefill_gpus=gpus * 24 // 100)
    gate = Gate(rule="priority", order=("prefill-heavy", "decode-heavy"), hold={"decode-heavy": hold})
    return replace(policy, kind="thresholds", gate=gate)


def test_a_held_class_slides_along_its_threshold():
    policy = held_policy(hold=500)
    system = fleet_system(policy)
    final = fluid_trajectory(policy, horizon=400.0).final
    slots = system.role_gpus @ system.role_decode_slots / system.gpus
    assert final.decode_queue.sum() + final.decode.sum() - slots == pytest.approx(-0.05, abs=1e-5)
    mu = system.prefill_rates()[0]
    x = final.prefill.sum(axis=0)
    assert x[1] == pytest.approx(0.5 / mu[1], rel=1e-5)  # never held
    assert final.prefill_queue[0] == pytest.approx((0.5 - mu[0] * x[0]) / 0.1, rel=1e-4)
    assert x.sum() < system.role_gpus[0] / system.gpus - 0.01  # though GPUs for it are idle


def test_sliding_is_near_the_average_of_the_cycle():
    policy = held_policy(hold=500)
    start = fluid_trajectory(policy, horizon=150.0).final
    slide = fluid_trajectory(policy, horizon=3.0, start=start)
    cycle = fluid_trajectory(policy, horizon=3.0, start=start, holds="cycle", points=2001)
    x, mean = cycle.prefill[:, 0, 0], slide.prefill[-1, 0, 0]
    assert x.max() > 1.5 * mean > 3 * x.min() / 2  # it does cycle
    assert cycle.mean_revenue_rate == pytest.approx(slide.mean_revenue_rate, rel=0.01)
    assert np.mean(x[1000:]) == pytest.approx(mean, rel=0.1)


# ---- against the simulator -------------------------------------------------------------------------------------------


def ends(policy, horizon, seed, count):
    """Final states of independent replications from the empty fleet, per GPU, one row each."""
    system = fleet_system(policy)
    rows = []
    for child in np.random.SeedSequence(seed).spawn(count):
        run = simulate(system, Start.empty(system), horizon=horizon, warmup=0.0, rng=np.random.default_rng(child))
        rows.append(flat(run.at_end, system.gpus))
    return np.array(rows)


def flat(state, scale=1):
    """Queues by class, requests in service by role and class, in one row."""
    queue = np.asarray(state.decode_queue)
    queue = queue.sum(axis=0) if queue.ndim == 2 else queue
    parts = (state.prefill_queue, queue, state.prefill, state.decode)
    return np.concatenate([np.ravel(part) / scale for part in parts])


@pytest.mark.parametrize("kind", ["gate-and-route", "sli-aware", "FG-SP"])
@pytest.mark.parametrize("horizon", [1.5, 25.0])
def test_transients_of_the_simulator_approach_the_fluid_like_one_over_root_n(kind, horizon):
    """The spread around the fluid falls like 1/sqrt(n), and the bias (whole prefills in service) like 1/n."""
    errors = []
    for n, count in ((1000, 24), (16_000, 8)):
        policy = busy_policy(kind, n, prefill_gpus=n // 4)
        fluid = flat(fluid_trajectory(policy, horizon=horizon, points=2).final)
        errors.append(np.sqrt(np.mean((ends(policy, horizon, 7, count) - fluid) ** 2, axis=0)))
    assert np.all(errors[1] < 6 / math.sqrt(16_000))
    assert 2.5 < errors[0].sum() / errors[1].sum() < 16


@pytest.mark.parametrize("theta", [(0.05, 0.5), (0.5, 0.05)])
def test_closure_of_a_first_come_line_of_unequal_patience(theta):
    """Exact in steady state; in the transient within some per cent, though one class is ten times as patient."""
    n = 8000
    policy = busy_policy("FG-SP", n, rates=(1.2, 0.8), theta=theta, prefill_gpus=n * 3 // 10)
    for horizon, closure in ((15.0, 0.03), (400.0, 0.003)):
        fluid = flat(fluid_trajectory(policy, horizon=horizon, points=2).final)
        rows = ends(policy, horizon, 7, 6)
        noise = 5 * rows.std(axis=0, ddof=1) / math.sqrt(6)
        assert np.all(np.abs(rows.mean(axis=0) - fluid) < noise + closure)
    assert fluid[:4].min() > 0.1  # all wait, for both


@pytest.mark.parametrize("kind", ["FI-WSP", "GI-WSP", "GF-WSP"])
def test_closure_where_prefills_take_decode_slots(kind):
    """The fluid counts every free slot as within reach; the chain's lie partly on GPUs whose prefill runs."""
    n = 2000
    policy = busy_policy(kind, n)
    fluid = fluid_trajectory(policy, horizon=40.0, points=2).final
    mean = ends(policy, 40.0, 3, 6).mean(axis=0)
    decodes = mean[-fluid.decode.size :].sum()
    assert fluid.decode.sum() == pytest.approx(decodes, rel=0.02)
    assert fluid.prefill.sum() == pytest.approx(
        mean[-fluid.decode.size - fluid.prefill.size : -fluid.decode.size].sum(), rel=0.06
    )


def test_a_gate_that_comes_first_starves_the_decodes():
    n = 1000
    policy = busy_policy("GF-WSP", n)
    later = replace(policy, gate=replace(policy.gate, before_decodes=False))
    waiting = []
    for each in (policy, later):
        fluid = fluid_trajectory(each, horizon=150.0, points=2).final
        rows = ends(each, 150.0, 3, 6)
        noise = 5 * rows.std(axis=0, ddof=1) / math.sqrt(6)
        assert np.all(np.abs(rows.mean(axis=0) - flat(fluid))[:4] < noise[:4] + 0.05 * flat(fluid)[:4].max())
        waiting.append(fluid.decode_queue.sum())
    assert waiting[0] > 0.5
    assert waiting[1] < 1e-6


def test_closure_where_prefill_slots_are_idle():
    """Half of the GPUs may prefill and a fifth of them do; the decodes beside them run slower."""
    n = 4000
    policy = busy_policy("gate-and-route", n, rates=(0.3, 0.25), prefill_gpus=n // 2)
    policy = replace(policy, router=replace(policy.router, order=("mixed", "solo")))  # decodes on the GPUs that prefill
    fluid = fluid_trajectory(policy, horizon=40.0, points=2).final
    mean = ends(policy, 40.0, 3, 12).mean(axis=0)
    assert 0.1 < fluid.prefill[0].sum() / 0.5 < 0.4
    assert fluid.decode.sum() == pytest.approx(mean[-4:].sum(), rel=0.01)


# ---- arrivals that change --------------------------------------------------------------------------------------------


def test_a_step_of_the_rates_equals_two_trajectories_glued():
    policy = busy_policy("sli-aware", MANY)
    whole = fluid_trajectory(policy, horizon=60.0, points=61, arrival_rate=([0.0, 30.0], [[0.5, 0.8], [1.0, 0.1]]))
    first = fluid_trajectory(policy, horizon=30.0, points=31)
    second = fluid_trajectory(policy, horizon=30.0, points=31, start=first.final, arrival_rate=lambda _: [1.0, 0.1])
    for name in ("prefill_queue", "decode_queue", "prefill", "decode", "revenue_rate"):
        glued = np.concatenate([getattr(first, name), getattr(second, name)[1:]])
        np.testing.assert_allclose(getattr(whole, name), glued, atol=1e-4)
    assert np.abs(whole.prefill_queue[40] - fluid_trajectory(policy, horizon=40.0).final.prefill_queue).max() > 0.1


def test_a_daily_wave_balances():
    policy = reference_policy()
    path = fluid_trajectory(
        policy, horizon=200.0, arrival_rate=lambda t: np.array([0.5, 0.5]) * (1 + 0.8 * math.sin(2 * math.pi * t / 100))
    )
    whole = 0.5 * (path.time + 0.8 * 100 / (2 * math.pi) * (1 - np.cos(2 * math.pi * path.time / 100)))
    np.testing.assert_allclose(path.arrived, whole[:, None] * [1, 1], atol=1e-5)
    assert_valid(policy, path, 200.0)
    assert np.ptp(path.prefill_queue[100:, 1]) > 0.1


# ---- every policy of every model -------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(pair_models(patient=False), st.sampled_from(sorted(RULES)), st.booleans())
def test_random_models_keep_the_invariants_and_the_bound(model, kind, crowded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ContentionWarning)
        plan, policies = quiet_policies(model, [kind])
    for policy in policies:
        count = len(policy.scenario.classes)
        start = {"prefill_queue": np.full(count, 0.7), "decode_queue": np.full(count, 0.4)} if crowded else "empty"
        path = fluid_trajectory(policy, horizon=100.0, start=start, points=401)
        assert_valid(policy, path, 100.0)
        if not crowded:  # from the empty fleet no policy earns more than the plan, kappa < (B-1)/B included
            assert path.mean_revenue_rate <= plan.revenue_rate * (1 + 1e-4) + 1e-9


@settings(max_examples=8)
@given(mode_models(), st.sampled_from(["gate-and-route", "prioritize-and-route", "sli-aware", "FG-SP"]))
def test_fleets_of_several_types_keep_the_invariants_and_the_bound(model, kind):
    plan, policies = quiet_policies(model, [kind])
    for policy in policies:
        path = fluid_trajectory(policy, horizon=60.0, points=241)
        assert_valid(policy, path, 60.0)
        assert path.mean_revenue_rate <= plan.revenue_rate * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("kind", ["gate-and-route", "sli-aware-general"])
def test_decodes_beside_prefills_may_be_faster(kind):
    """kappa < (B-1)/B: the fluid still balances and stays below the optimum."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ContentionWarning)
        for model in random_models(5, 3, below_bound=True):
            plan, (policy,) = quiet_policies(model, [kind])
            path = fluid_trajectory(policy, horizon=300.0)
            assert_valid(policy, path, 300.0)
            assert path.revenue_rate[-1] <= plan.revenue_rate * (1 + 1e-3)


# ---- what comes out and what is refused ------------------------------------------------------------------------------


def test_the_frame_and_the_texts():
    policy = reference_policy(gpus=100)
    path = fluid_trajectory(policy, horizon=10.0, points=11)
    frame = path.to_frame()
    assert list(frame.columns) == ["time", "quantity", "of", "value"]
    assert len(frame) == 11 * (1 + 4 * 2 + 2 * 2)
    row = frame[(frame.time == 10.0) & (frame.quantity == "prefill") & (frame.of == "prefill-heavy")]
    assert row.value.item() == pytest.approx(path.final.prefill[:, 1].sum())
    assert "prefill slots free" in str(path)
    assert "decode-heavy" in path._repr_html_()
    system = fluid_trajectory(fleet_system(policy), horizon=10.0, points=11)
    np.testing.assert_array_equal(system.decode, path.decode)
    assert system.classes == ("class 0", "class 1")
    assert system.revenue_bound is None


def test_starts_in_several_forms_agree():
    policy = reference_policy(gpus=1000)
    system = fleet_system(policy)
    counts = Start(
        prefill_queue=np.array([10, 20]),
        decode_queue=np.array([300, 0]),
        prefill=np.zeros((2, 2), dtype=int),
        decode=np.zeros((2, 2), dtype=int),
    )
    per_gpu = {"prefill_queue": [0.01, 0.02], "decode_queue": [0.3, 0.0]}
    first = fluid_trajectory(policy, horizon=5.0, start=counts)
    second = fluid_trajectory(policy, horizon=5.0, start=per_gpu)
    third = fluid_trajectory(policy, horizon=5.0, start=second.at(0))
    np.testing.assert_array_equal(first.decode, second.decode)
    np.testing.assert_allclose(second.decode, third.decode, atol=1e-9)
    assert second.decode[0, 1, 0] == pytest.approx(0.3)  # seated at once: solo slots are free
    assert second.prefill[0].sum() == pytest.approx(0.03)
    assert isinstance(second.final, FluidState)
    assert system.roles == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon must be a finite number of seconds above 0; got 0"),
        ({"horizon": 1.0, "points": 1}, "points must be a whole number of at least 2; got 1"),
        ({"horizon": 1.0, "rtol": 1.0}, "rtol must be between 1e-12 and 0.001; got 1.0"),
        ({"horizon": 1.0, "atol": 0.0}, "atol must be between 1e-14 and 0.0001; got 0.0"),
        ({"horizon": 1.0, "most_regimes": 0}, "most_regimes must be a whole number above 0; got 0"),
        ({"horizon": 1.0, "holds": "jump"}, "holds must be 'slide' or 'cycle'; got 'jump'"),
        ({"horizon": 1.0, "start": "full"}, "start must be 'empty', 'fluid' or a state; got 'full'"),
        ({"horizon": 1.0, "start": 3}, "start must be 'empty', 'fluid' or a state; got 3"),
        ({"horizon": 1.0, "start": {"queue": [0, 0]}}, "start has no field 'queue'; there are prefill_queue"),
        (
            {"horizon": 1.0, "start": {"prefill_queue": [1.0]}},
            r"start.prefill_queue must be finite, >= 0 and of shape \(2,\)",
        ),
        (
            {"horizon": 1.0, "start": {"prefill": [[1.0, 0.0], [0.0, 0.0]]}},
            "start.prefill must fit the GPUs that may prefill; role 0",
        ),
        (
            {"horizon": 1.0, "start": {"decode": [[0.0, 0.0], [50.0, 0.0]]}},
            "start.decode must fit the decode slots; role 1",
        ),
        ({"horizon": 1.0, "arrival_rate": 3.0}, r"a function of time or a pair \(times, rates\); got float"),
        (
            {"horizon": 1.0, "arrival_rate": ([1.0], [[1.0, 1.0]])},
            "times of arrival_rate must be increasing and begin at 0",
        ),
        (
            {"horizon": 1.0, "arrival_rate": ([0.0], [[1.0]])},
            r"shape \(times, classes\) = \(1, 2\); got shape \(1, 1\)",
        ),
        ({"horizon": 1.0, "arrival_rate": lambda _: [-1.0, 0.0]}, "arrival_rate must return 2 finite rates >= 0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fluid_trajectory(reference_policy(gpus=100), **options)


def test_what_has_no_fluid_is_refused():
    policy = held_policy(hold=5, gpus=100)
    with pytest.raises(fo.InvalidInput, match="takes a Policy or a System; got str"):
        fluid_trajectory("policy", horizon=1.0)
    with pytest.raises(fo.InvalidInput, match="start='fluid' is the plan's equilibrium and needs a Policy"):
        fluid_trajectory(fleet_system(policy), horizon=1.0, start="fluid")
    occupancy = replace(policy, gate=replace(policy.gate, rule="occupancy", order=()))
    with pytest.raises(fo.InvalidInput, match=r"only with gate\.rule 'priority'"):
        fluid_trajectory(occupancy, horizon=1.0)
    shared = replace(reference_policy("GI-WSP", gpus=100), gate=policy.gate)
    with pytest.raises(
        fo.InvalidInput, match=r"gate\.hold has no fluid trajectory where a prefill takes a decode slot"
    ):
        fluid_trajectory(shared, horizon=1.0)


def test_too_many_regimes_are_an_error():
    with pytest.raises(fo.SolverFailure, match=r"1 regimes ended before .* s of 100 s.*raise most_regimes"):
        fluid_trajectory(reference_policy(), horizon=100.0, most_regimes=1)


def test_a_broken_balance_is_an_error(monkeypatch):
    """What flows is summed apart from the state: a state that loses requests does not pass."""
    from fluidopt.fluid.dynamics import Dynamics

    velocity = Dynamics.velocity
    monkeypatch.setattr(Dynamics, "velocity", lambda self, *rest: 0.999 * velocity(self, *rest))
    with pytest.raises(fo.SolverFailure, match="arrivals that do not balance with abandonments"):
        fluid_trajectory(reference_policy(), horizon=10.0)
