"""The revenue bound: proved on exact chains of any policy and start, and shown to fail where it says that it fails."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_fleets import small_policy
from strategies import mode_models, pair_models

import fluidopt as fo
from fluidopt.chain.optimal import optimal_policy
from fluidopt.policy import Gate, Role
from fluidopt.policy.bound import Condition, revenue_bound
from fluidopt.policy.extract import RULES
from fluidopt.reference import QWEN_8B_A100
from fluidopt.simulation.arrivals import Law, Laws
from fluidopt.simulation.fleet import fleet_system, fluid_start
from fluidopt.simulation.general import simulate_general
from fluidopt.simulation.run import simulate
from fluidopt.simulation.system import Start

KINDS = (*RULES, "thresholds")
SAFE = 1e-9


def chain(policy):
    """With small caps: who is turned away is never served, as some policy could do on purpose."""
    return fo.exact_chain(policy, prefill_queue_cap=3, decode_queue_cap=3, tolerance=1.0)


# ---- it holds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_no_exact_chain_earns_more(kind, seed):
    policy = small_policy(kind, gpus=1 + seed % 2, seed=seed)
    bound = revenue_bound(policy)
    assert bound.holds
    assert chain(policy).revenue_rate <= bound.rate * (1 + SAFE)


@pytest.mark.parametrize("seed", range(4))
def test_no_transient_from_the_empty_fleet_earns_more(seed):
    policy = small_policy("gate-and-route", gpus=2, seed=seed)
    result, bound = chain(policy), revenue_bound(policy)
    for t in (0.1, 1.0, 3.0, 10.0):
        earned = result.earnings(result.states.means(_average_law(result, t)))
        assert earned <= bound.rate * (1 + SAFE)


def _average_law(result, horizon, points=40):
    """The law averaged over [0, horizon], by the midpoint rule."""
    times = (np.arange(points) + 0.5) * horizon / points
    return np.mean([result.transient(t).law for t in times], axis=0)


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_at_all_earns_more(seed):
    """The dynamic program's optimum over all policies of the roles."""
    policy = small_policy("gate-and-route", gpus=1 + seed % 2, seed=seed)
    best = optimal_policy(policy, prefill_queue_cap=2, decode_queue_cap=2)
    assert chain(policy).revenue_rate <= revenue_bound(policy).rate * (1 + SAFE)
    assert best.lower_bound <= revenue_bound(policy).rate * (1 + SAFE)


@pytest.mark.parametrize("kappa", [0.6, 1.0, 1.6])
def test_holds_whatever_kappa(kappa):
    """Also where Proposition 3.2 fails and the optimum has a decode queue."""
    gpu = fo.GPU(
        fo.IterationTime(alpha=1.0, beta=0.5, solo=1.0),
        batch_size=2,
        chunk_size=1,
        operating_modes=(
            fo.Mode("mixed", chunk=1, decode_slots=1, iteration_time=kappa, after_prefill="solo"),
            fo.Mode("solo", decode_slots=2, iteration_time=1.0),
        ),
    )
    classes = [
        fo.WorkloadClass("a", arrival_rate=0.4, prompt_tokens=1.0, output_tokens=1.0, abandonment_rate=4.0),
        fo.WorkloadClass("b", arrival_rate=0.6, prompt_tokens=2.0, output_tokens=0.4, abandonment_rate=6.0),
    ]
    plan = fo.FluidModel(classes, gpu, prices=fo.TokenPrices(prompt=0.5, output=1.0)).solve()
    for kind in ("gate-and-route", "GF-WSP", "FI-WSP"):
        policy = plan.policy(gpus=2, kind=kind)
        assert chain(policy).revenue_rate <= revenue_bound(policy).rate * (1 + SAFE)


@settings(max_examples=30, deadline=None)
@given(model=st.one_of(pair_models(), mode_models()))
def test_bound_of_any_plan_is_at_least_its_revenue(model):
    try:
        plan = model.solve()
    except fo.InfeasibleModel:
        return
    bound = revenue_bound(plan)
    assert bound.holds
    assert bound.rate >= plan.revenue_rate * (1 - SAFE) - 1e-12
    assert bound.plan.certificate.holds(1e-7)
    again = bound.plan.model.solve("highs")
    assert bound.rate == pytest.approx(again.revenue_rate, rel=1e-6, abs=1e-9)


# ---- windows that open with requests in the fleet -------------------------------------------------------------------


def loaded(policy):
    """The fleet full of requests."""
    system = fleet_system(policy)
    full = replace(Start.empty(system), decode_queue=np.array([40, 60]), prefill_queue=np.array([5, 5]))
    return system, full


def test_a_window_that_opens_full_earns_more_and_its_own_bound_holds():
    """What a discarded warm-up does: here the fleet opens with a hundred requests that are paid for afterwards."""
    policy = fo.reference_model().solve().policy(gpus=5)
    bound = revenue_bound(policy)
    system, full = loaded(policy)
    horizon = 10.0
    runs = [simulate(system, full, horizon=horizon, warmup=0.0, rng=np.random.default_rng(seed)) for seed in range(200)]
    earned = np.array([run.reward for run in runs]) / (5 * horizon)
    error = earned.std(ddof=1) / np.sqrt(len(earned))
    assert earned.mean() - 5 * error > bound.rate  # the plain bound fails
    assert earned.mean() + 5 * error < bound.over(horizon, start=full, gpus=5)


@pytest.mark.parametrize("seed", range(5))
def test_windows_from_a_stationary_start_stay_below_their_own_bound(seed, reference_plan):
    policy = reference_plan.policy(gpus=20, kind=("gate-and-route", "FI-WSP")[seed % 2])
    system, bound = fleet_system(policy), revenue_bound(policy)
    start = fluid_start(policy, system)
    runs = [simulate(system, start, horizon=30.0, warmup=0.0, rng=np.random.default_rng((seed, k))) for k in range(40)]
    earned = np.array([run.reward for run in runs]) / (20 * 30.0)
    error = earned.std(ddof=1) / np.sqrt(40)
    assert earned.mean() - 5 * error <= bound.over(30.0, start=start, gpus=20)


def test_what_a_request_in_the_fleet_is_worth_is_the_price_of_its_row(reference_plan):
    bound = revenue_bound(reference_plan)
    prices = reference_plan.shadow_prices
    for at, name in enumerate(reference_plan.model.workload.names):
        assert bound.prefill_value[at] == pytest.approx(max(prices[f"prefill_balance[{name}]"], 0.0))
        assert bound.decode_value[at] == pytest.approx(max(prices[f"decode_balance[{name}]"], 0.0))
    system = fleet_system(reference_plan.policy(gpus=4))
    one = replace(Start.empty(system), prefill_queue=np.array([0, 3]))
    assert bound.over(7.0, start=one, gpus=4) - bound.rate == pytest.approx(3 * bound.prefill_value[1] / 28)
    assert bound.over(7.0, start=Start.empty(system), gpus=4) == bound.rate


@pytest.mark.parametrize("horizon", [0.0, -1.0, np.inf, "long"])
def test_over_refuses(horizon, reference_plan):
    bound = revenue_bound(reference_plan)
    start = Start.empty(fleet_system(reference_plan.policy(gpus=2)))
    with pytest.raises(fo.InvalidInput, match="horizon must be a finite number of seconds above 0"):
        bound.over(horizon, start=start, gpus=2)


# ---- lengths of other laws -------------------------------------------------------------------------------------------

LAWS = [Law("deterministic"), Law("gamma", cv=0.5), Law("gamma", cv=2.0), Law("lognormal", cv=1.5)]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("kind", ["gate-and-route", "FI-WSP", "thresholds"])
def test_no_law_of_lengths_earns_more_in_the_long_run(kind, law):
    for seed in range(3):
        policy = small_policy(kind, gpus=2, seed=seed)
        laws, system = Laws(prompt=law, output=law, patience=law), fleet_system(policy)
        rng = np.random.default_rng(seed)
        runs = [simulate_general(system, horizon=5000.0, warmup=50.0, rng=rng.spawn(1)[0], laws=laws) for _ in range(8)]
        earned = np.array([run.reward / run.window for run in runs]) / 2
        assert earned.mean() - 5 * earned.std(ddof=1) / np.sqrt(8) <= revenue_bound(policy).rate


def overloaded():
    """One class, far more than the GPU can decode; a decode occupies it for a second on average."""
    gpu = fo.GPU(fo.IterationTime(alpha=1.0, beta=0.0, solo=1.0), batch_size=1, chunk_size=1000)
    one = fo.WorkloadClass("one", arrival_rate=4.0, prompt_tokens=1.0, output_tokens=1.0, abandonment_rate=0.1)
    plan = fo.FluidModel([one], gpu, prices=fo.TokenPrices(prompt=0.0, output=1.0)).solve()
    policy = plan.policy(gpus=20)  # of which one prefills
    return policy, fleet_system(policy)


@pytest.mark.parametrize(("law", "holds"), [(Law("gamma", cv=0.5), True), (Law(), True), (Law("gamma", cv=4.0), False)])
def test_over_a_short_horizon_from_the_empty_fleet_only_heavy_tails_earn_more(law, holds):
    """By (cv^2 - 1)/2 requests per slot, which the long ones in service repay later (renewal theory)."""
    policy, system = overloaded()
    horizon, bound = 10.0, revenue_bound(policy).rate
    runs = [
        simulate_general(system, horizon=horizon, rng=np.random.default_rng(seed), laws=Laws(output=law))
        for seed in range(100)
    ]
    earned = np.array([run.reward for run in runs]) / (20 * horizon)
    error = earned.std(ddof=1) / np.sqrt(len(earned))
    assert (earned.mean() - 5 * error <= bound) == holds
    long = simulate_general(system, horizon=4000.0, rng=np.random.default_rng(0), laws=Laws(output=law))
    assert long.reward / (20 * 4000.0) <= bound * 1.02


# ---- what lowers a plan's revenue is left out -----------------------------------------------------------------------


def test_promises_lower_the_plan_and_not_the_bound(reference_plan):
    model = fo.reference_model()
    promised = fo.FluidModel(
        model.workload,
        model.scenario.gpu,
        prices=model.scenario.prices,
        service_levels=(fo.PrefillFairness(at_most=0.1),),
    ).solve()
    bound = revenue_bound(promised)
    assert promised.revenue_rate < reference_plan.revenue_rate - 1.0
    assert bound.rate == pytest.approx(reference_plan.revenue_rate, rel=1e-9)
    assert "prefill_fairness" in str(bound)


def test_rows_and_objectives_lower_the_plan_and_not_the_bound(reference, reference_plan):
    row = reference.copy().subject_to("x['prefill-heavy', 'mixed'] <= 0.1", name="cap").solve()
    other = reference.copy().maximize("sum(mu_d['decode-heavy',k]*y['decode-heavy',k], k)").solve()
    for plan, word in ((row, "row 'cap'"), (other, "another objective")):
        assert plan.revenue_rate < reference_plan.revenue_rate - 1.0
        for each in (plan, plan.policy(gpus=30)):
            bound = revenue_bound(each)
            assert bound.rate == pytest.approx(reference_plan.revenue_rate, rel=1e-9)
            assert word in str(bound)


def test_a_forbidden_decode_queue_lowers_the_plan_where_proposition_32_fails(reference):
    """q_d = 0 imposed with kappa < (B-1)/B: the plan's revenue is no bound, and the bound is above it."""
    gpu = fo.GPU(
        QWEN_8B_A100,
        batch_size=4,
        chunk_size=64,
        operating_modes=(
            fo.Mode("mixed", chunk=64, decode_slots=3, iteration_time=0.011),
            fo.Mode("solo", decode_slots=4, iteration_time=0.022),
        ),
    )
    model = fo.FluidModel(reference.workload.scaled(3.0), gpu, prices=reference.scenario.prices)
    free = model.solve()
    imposed = model.copy().subject_to("q_d[i] <= 0", name="no_decode_queue").solve()
    assert not free.decode_buffer_vanishes
    assert imposed.revenue_rate < free.revenue_rate * 0.99
    assert revenue_bound(imposed).rate == pytest.approx(free.revenue_rate, rel=1e-9)


def test_classes_that_never_abandon_may_be_left_waiting_by_a_policy(reference):
    """The LP must serve them; a policy that neglects them earns more than the LP, and not more than the bound."""
    classes = [
        fo.WorkloadClass("poor", arrival_rate=0.28, prompt_tokens=10.0, output_tokens=2000.0),
        fo.WorkloadClass("rich", arrival_rate=2.0, prompt_tokens=4000.0, output_tokens=100.0, abandonment_rate=0.05),
    ]
    model = fo.FluidModel(classes, reference.scenario.gpu, prices=fo.TokenPrices(prompt=1.0, output=0.01))
    plan = model.solve()
    bound = revenue_bound(plan)
    assert "poor never abandon" in str(bound)
    policy = plan.policy(gpus=10)
    gate = Gate(rule="priority", order=("rich", "poor"), hold={"poor": 1e9})
    neglect = replace(policy, kind="thresholds", gate=gate, roles=_all_prefill(policy))
    system = fleet_system(neglect)
    runs = [
        simulate(system, Start.empty(system), horizon=500.0, warmup=0.0, rng=np.random.default_rng(k)) for k in range(8)
    ]
    earned = np.array([run.reward for run in runs]) / (10 * 500.0)
    error = earned.std(ddof=1) / np.sqrt(8)
    assert earned.mean() - 5 * error > plan.revenue_rate
    assert earned.mean() - 5 * error <= bound.rate


def _all_prefill(policy):
    mixed = next(role for role in policy.roles if role.prefill)
    rest = [replace(role, gpus=0) for role in policy.roles if not role.prefill]
    return (replace(mixed, gpus=policy.gpus), *rest)


def test_gpu_types_count_in_the_proportions_of_the_fleet():
    """Three GPUs of two types that the model has half and half: two of the good ones earn more than the plan says."""
    reference = fo.reference_model()
    good = replace(reference.scenario.gpu, name="good", share=0.5)
    slow = fo.GPU(
        fo.IterationTime(alpha=0.1, beta=1e-3, solo=0.12), batch_size=4, chunk_size=64, name="slow", share=0.5
    )
    model = fo.FluidModel(reference.workload.scaled(2), [good, slow], prices=reference.scenario.prices)
    plan = model.solve()
    bound = revenue_bound(plan.policy(gpus=3))
    counts = {role.gpu: 0 for role in plan.policy(gpus=3).roles}
    for role in plan.policy(gpus=3).roles:
        counts[role.gpu] += role.gpus
    assert counts == {"good": 2, "slow": 1}
    alike = [replace(good, share=2 / 3), replace(slow, share=1 / 3)]
    own = fo.FluidModel(reference.workload.scaled(2), alike, prices=reference.scenario.prices).solve()
    assert bound.rate == pytest.approx(own.revenue_rate, rel=1e-9)
    assert bound.rate > plan.revenue_rate * 1.05


# ---- conditions that fail -------------------------------------------------------------------------------------------


def test_roles_beyond_the_model_are_not_bounded(reference_plan):
    policy = reference_plan.policy(gpus=10)
    mixed = next(role for role in policy.roles if role.prefill)
    others = tuple(role for role in policy.roles if role is not mixed)
    wider = replace(policy, roles=(replace(mixed, decode_slots=40, slots=41), *others))
    bound = revenue_bound(wider)
    assert not bound.holds
    assert "NOT a bound" in bound.statement
    assert "runs up to 40 decodes in mode 'mixed', which has slots for 15" in str(bound)
    faster = replace(mixed, prefill=replace(mixed.prefill, chunk=512))
    assert "which the model does not have" in str(revenue_bound(replace(policy, roles=(faster, *others))))
    system = fleet_system(wider)
    seen = simulate(system, Start.empty(system), horizon=600.0, warmup=100.0, rng=np.random.default_rng(1))
    assert seen.reward / seen.window / 10 > bound.rate  # and indeed it earns more


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_every_kind_keeps_to_the_modes_of_the_model(kind, reference_plan):
    assert revenue_bound(reference_plan.policy(gpus=7, kind=kind)).holds


def test_a_role_of_an_unknown_type_is_named(reference_plan):
    policy = reference_plan.policy(gpus=3)
    roles = tuple(Role(**(vars_of(role) | {"gpu": "H100"})) for role in policy.roles)
    bound = revenue_bound(replace(policy, roles=roles))
    assert not bound.holds
    assert "GPU type 'H100', which the model does not have" in str(bound)


def vars_of(role):
    names = ("name", "gpu", "gpus", "prefill", "rest", "decode_slots", "slots")
    return {name: getattr(role, name) for name in names}


def test_says_how_far_a_revenue_is_from_it(reference_plan):
    bound = revenue_bound(reference_plan)
    assert bound.against(0.9 * bound.rate) == "10.0% below the fluid optimum 297.716, which no policy beats"
    assert bound.against(1.01 * bound.rate).startswith("1.0% above")
    broken = replace(bound, conditions=(Condition("it rains", False, "it does not"),))
    assert broken.against(0.9 * bound.rate) == "10.0% below the fluid optimum 297.716 (no bound for this policy)"
    assert broken.statement.endswith("it is not so that it rains.")
    nothing = fo.FluidModel(
        [replace(each, arrival_rate=0.0) for each in reference_plan.model.workload],
        reference_plan.model.scenario.gpu,
        prices=reference_plan.model.scenario.prices,
    )
    assert revenue_bound(nothing.solve()).against(0.0) == ""


def test_takes_a_policy_or_a_plan():
    with pytest.raises(fo.InvalidInput, match="revenue_bound: takes a Policy or a Plan; got int"):
        revenue_bound(3)


def test_shows_itself(reference_plan):
    bound = revenue_bound(reference_plan)
    assert bound.statement.startswith("No policy earns more than 297.716")
    assert list(bound.to_frame().columns) == ["holds", "why"]
    assert "certified" in bound._repr_html_()
