"""Plans over a horizon: against interval by interval, a formulation by hand, brute force, and finite differences."""

from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
from recorded import DATA, recorded

import fluidopt as fo
from fluidopt.errors import InfeasibleModel, InvalidInput
from fluidopt.studies.schedule import Schedule, plan_schedule
from fluidopt.studies.schedule_problem import schedule_program

CONVERSATION = DATA / "azure" / "AzureLLMInferenceTrace_conv.csv"
PRICES = fo.TokenPrices(prompt=0.1, output=0.2)
PAIR = fo.GPU(fo.IterationTime(alpha=0.0174, beta=6.2e-5, solo=0.022), batch_size=16, chunk_size=256)
APART = PAIR.with_modes(disaggregated=True)
GPUS = 8
SECONDS = 60.0


def loads(rates, patience=(0.05, 0.02)):
    """A workload per interval: chat that decodes, documents that prefill; ``rates`` (T, 2), requests/s."""
    return [
        fo.Workload(
            (
                fo.WorkloadClass(
                    "chat", arrival_rate=chat, prompt_tokens=300, output_tokens=400, abandonment_rate=patience[0]
                ),
                fo.WorkloadClass(
                    "documents",
                    arrival_rate=documents,
                    prompt_tokens=4000,
                    output_tokens=100,
                    abandonment_rate=patience[1],
                ),
            )
        )
        for chat, documents in rates
    ]


RATES = np.array([[8.0, 2.0], [3.0, 9.0], [9.0, 4.0], [2.0, 8.0], [7.0, 1.0]])


def schedule(rates=RATES, gpu=APART, patience=(0.05, 0.02), **given):
    settings = {"gpus": GPUS, "interval": SECONDS, "switching_cost": 500.0, "prices": PRICES} | given
    return plan_schedule(loads(rates, patience), gpu, **settings)


def by_hand(found: Schedule):
    """The same optimum from a formulation written out for prefill-only and decode-only GPUs, in cvxpy."""
    problem, gpu = found.problem, found.problem.model.gpu_types[0]
    workload = problem.model.workload
    P, D, theta = workload.prompt_tokens, workload.output_tokens, workload.abandonment_rate
    T, classes = len(problem.seconds), len(P)
    prefill_speed = gpu.chunk_size / gpu.curve.mixed(gpu.chunk_size, 0)
    decode_speed = 1.0 / gpu.curve.decode_only(gpu.batch_size)
    x, y, q_p, q_d = (cp.Variable((classes, T), nonneg=True) for _ in range(4))
    r = cp.Variable(T, nonneg=True)
    rows = [cp.sum(x, axis=0) <= r, cp.sum(y, axis=0) <= gpu.batch_size * (1 - r)]
    earned = 0
    for t, seconds in enumerate(problem.seconds):
        started = cp.multiply(prefill_speed / P, x[:, t])
        done = cp.multiply(decode_speed / D, y[:, t])
        before = (q_p[:, t - 1], q_d[:, t - 1]) if t else (np.zeros(classes), np.zeros(classes))
        carried = seconds if problem.carry_over else np.inf
        rows += [
            problem.rates[:, t] - cp.multiply(theta, q_p[:, t]) - started == (q_p[:, t] - before[0]) / carried,
            started - cp.multiply(theta, q_d[:, t]) - done == (q_d[:, t] - before[1]) / carried,
        ]
        value = PRICES.prompt * P + PRICES.output * D
        earned += seconds * (value @ done - problem.waiting_cost * cp.sum(q_p[:, t] + q_d[:, t]))
    if np.isfinite(problem.switching_cost):
        earned -= problem.switching_cost * cp.norm1(cp.diff(r))
    else:
        rows.append(cp.diff(r) == 0)
    goal = cp.Problem(cp.Maximize(earned), rows)
    goal.solve(solver=cp.HIGHS)
    return problem.gpus * goal.value


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"switching_cost": 0.0},
        {"switching_cost": np.inf},
        {"switching_cost": 20_000.0, "waiting_cost": 0.3},
        {"carry_over": False},
        {"patience": (0.0, 0.02), "waiting_cost": 0.01},
        {"gpus": 3, "interval": 7.0},
    ],
)
def test_the_horizon_agrees_with_a_formulation_by_hand(given):
    found = schedule(**given)
    assert found.certificate.holds(1e-7)
    assert found.value == pytest.approx(by_hand(found), rel=1e-6)


@pytest.mark.parametrize("cost", [0.0, 300.0, 5_000.0, 100_000.0])
@pytest.mark.parametrize("waiting", [0.0, 0.2])
def test_no_other_way_of_planning_is_worth_more(cost, waiting):
    rng = np.random.default_rng(7)
    for _ in range(3):
        found = schedule(rng.uniform(0.0, 10.0, (6, 2)), switching_cost=cost, waiting_cost=waiting)
        table = found.to_frame()
        assert found.value == pytest.approx(table.loc["horizon", "value"], rel=1e-9)
        assert (table["saved"] >= 0).all()
        assert table.loc["static", "switched"] == 0
        assert set(table.index) == {"horizon", "greedy", "re-planned", "static"}


def test_each_step_by_step_path_satisfies_the_horizon():
    """What re-planning does, put into the horizon's roles, earns what it said: the same accounting."""
    found = schedule(switching_cost=2_000.0, waiting_cost=0.1)
    for name in ("greedy", "re-planned"):
        path = found.paths[name]
        program = found.problem.program(switching=0.0)
        (block,) = (each for each in program.columns if each.name == "r")
        # the horizon with these roles and everything else free can only do better
        matrix, column = program.matrix.tolil(), block.numbers[0]
        fixed = np.zeros((len(column), program.shape[1]))
        fixed[np.arange(len(column)), column] = 1.0
        x = cp.Variable(program.shape[1], nonneg=True)
        rows = [fixed @ x == path.roles[0]]
        activity = matrix.tocsr() @ x
        for side, sign in ((program.row_upper, 1), (program.row_lower, -1)):
            finite = np.isfinite(side)
            rows.append(sign * activity[finite] <= sign * side[finite])
        goal = cp.Problem(cp.Maximize(program.objective @ x), rows)
        goal.solve(solver=cp.HIGHS)
        own = path.revenue.sum() - found.problem.waiting_cost * path.waited.sum()
        assert goal.status == "optimal"
        assert own <= goal.value * (1 + 1e-7)


def test_without_a_cost_each_interval_is_its_own_optimum():
    found = schedule(switching_cost=0.0, carry_over=False)
    alone = [fo.FluidModel(each.per_gpu(GPUS), APART, prices=PRICES).solve().revenue_rate for each in loads(RATES)]
    assert found.value == pytest.approx(GPUS * SECONDS * sum(alone), rel=1e-8)
    assert found.to_frame().loc["re-planned", "saved"] == 0
    assert found.to_frame().loc["static", "saved"] > 0


def given_roles(load, prefill_gpus):
    """Revenue, money/s of the fleet, with that many GPUs for prefill."""
    model = fo.FluidModel(load.per_gpu(GPUS), APART, prices=PRICES)
    s = model.symbols
    model.subject_to(s.phi["prefill"] <= prefill_gpus / GPUS, name="prefill_gpus")
    model.subject_to(s.phi["decode"] <= 1 - prefill_gpus / GPUS, name="decode_gpus")
    return GPUS * model.solve().revenue_rate


def test_brute_force_over_whole_gpus_comes_close_from_below():
    """Dynamic programming over a grid of roles; the finer grid is nearer, and neither beats the program."""
    cost, rates = 3_000.0, RATES[:4]
    found = schedule(rates, switching_cost=cost, carry_over=False)
    shortfall = []
    for steps in (GPUS, 4 * GPUS):
        roles = np.linspace(0, GPUS, steps + 1)
        earned = np.array([[SECONDS * given_roles(load, r) for r in roles] for load in loads(rates)])
        best = earned[0]
        for row in earned[1:]:
            best = row + (best - cost * np.abs(roles[:, None] - roles)).max(axis=1)
        shortfall.append(1 - best.max() / found.value)
    assert -1e-9 <= shortfall[1] <= shortfall[0]
    assert shortfall[1] < 0.005
    best_static = earned.sum(axis=0).max()
    never = schedule(rates, switching_cost=np.inf, carry_over=False)
    assert best_static <= never.value * (1 + 1e-9)
    assert best_static == pytest.approx(never.value, rel=0.01)
    assert never.value == pytest.approx(found.value - found.to_frame().loc["static", "saved"], rel=1e-9)


def test_dearer_switches_are_fewer_and_the_value_falls_to_the_static_one():
    costs = [0.0, 500.0, 5_000.0, 50_000.0, np.inf]
    found = [schedule(switching_cost=cost) for cost in costs]
    values = [each.value for each in found]
    switched = [each.to_frame().loc["horizon", "switched"] for each in found]
    assert all(np.diff(values) <= 1e-6)
    assert all(np.diff(switched) <= 1e-6)
    assert switched[0] > 5
    assert switched[-1] == 0
    # where switching is dear enough, never is best
    assert schedule(switching_cost=1e7).value == pytest.approx(values[-1], rel=1e-9)


def test_a_gpu_more_is_worth_its_shadow_price():
    found = schedule(gpus=1000, rates=RATES * 125, switching_cost=2_000.0)
    more, less = (schedule(gpus=n, rates=RATES * 125, switching_cost=2_000.0).value for n in (1001, 999))
    predicted = float((found.gpu_values.iloc[:, 0] * found.problem.seconds).sum())
    assert predicted == pytest.approx((more - less) / 2, rel=0.02)
    assert (found.gpu_values.to_numpy() >= -1e-9).all()


def test_what_waits_is_carried_over_and_served():
    """A patient burst that does not fit in its interval is completed in the next ones; it cannot be in its own."""
    rates = np.array([[0.0, 30.0], [0.0, 0.0], [0.0, 0.0]])
    found = schedule(rates, patience=(0.0, 0.0), waiting_cost=0.01)
    table = found.intervals
    assert table["waiting"].iloc[0] > 100
    assert table["waiting"].iloc[-1] == pytest.approx(0.0, abs=1e-6)
    completed = 30.0 * SECONDS * (PRICES.prompt * 4000 + PRICES.output * 100)
    assert table["revenue"].sum() == pytest.approx(completed, rel=1e-9)
    with pytest.raises(InfeasibleModel):
        schedule(rates, patience=(0.0, 0.0), carry_over=False)


def test_gpus_that_do_both_never_switch():
    found = schedule(gpu=PAIR, switching_cost=1.0)
    assert (found.to_frame()["switched"] == 0).all()
    assert "nothing is ever switched" in found.notes[0]
    # and contention alone follows the load: as good as the fluid model of each interval
    free = schedule(gpu=PAIR, switching_cost=1.0, carry_over=False)
    alone = [fo.FluidModel(each.per_gpu(GPUS), PAIR, prices=PRICES).solve().revenue_rate for each in loads(RATES)]
    assert free.value == pytest.approx(GPUS * SECONDS * sum(alone), rel=1e-8)


def test_two_types_keep_their_shares_and_separate_charging_is_planned_too():
    types = [replace(APART, name="one", share=0.5), replace(APART, name="two", share=0.5)]
    apart, together = schedule(gpu=types), schedule()
    assert apart.value == pytest.approx(together.value, rel=1e-8)
    assert (apart.roles.to_numpy() <= 0.5 * GPUS + 1e-9).all()
    assert schedule(charging="separate").value >= together.value


def test_it_says_what_it_found():
    found = schedule()
    assert str(found).startswith("Schedule\nThe plan over the horizon is worth")
    assert "Delta" in found.symbolic.latex()
    assert found.symbolic == schedule_program("bundled")
    assert list(found.fleet.columns) == ["prefill", "idle", "decode"]
    np.testing.assert_allclose(found.fleet.sum(axis=1), GPUS)
    assert found.to_dict()["plans"]["static"]["switched"] == 0
    assert found.shadow_prices.filter(like="roles[").abs().max() <= 500.0 * (1 + 1e-9)
    assert found._repr_html_().count("<table") == 2
    figure = found.plot()
    assert figure.axes[0].get_ylabel() == "GPUs that may prefill"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus": 0}, "gpus must be a whole number of at least 1; got 0"),
        ({"switching_cost": -1.0}, "switching_cost must be money per GPU of at least 0.*got -1.0"),
        ({"switching_cost": np.nan}, "switching_cost must be"),
        ({"waiting_cost": -0.1}, "waiting_cost must be money per request and second of at least 0; got -0.1"),
        ({"interval": 0}, "interval must be a number of seconds above 0; got 0"),
    ],
)
def test_bad_arguments_are_named(given, message):
    with pytest.raises(InvalidInput, match=message):
        schedule(**given)


def test_loads_must_be_of_the_same_classes():
    one, two = loads(RATES[:2])
    with pytest.raises(InvalidInput, match="every interval must have the same classes"):
        plan_schedule([one, two.with_abandonment(0.3)], APART, gpus=2, switching_cost=1.0, prices=PRICES)
    with pytest.raises(InvalidInput, match="load must be a Trace or a list of Workload"):
        plan_schedule([], APART, gpus=2, switching_cost=1.0, prices=PRICES)


@recorded
def test_a_recorded_hour():
    trace = fo.read_trace(CONVERSATION)
    found = plan_schedule(
        fo.Trace.merge(*[trace] * 10), APART, gpus=21, switching_cost=30_000.0, prices=PRICES, waiting_cost=0.01
    )
    table = found.to_frame()
    assert len(found.intervals) == 12
    assert found.intervals["request_rate"].iloc[5] == pytest.approx(74.63, rel=1e-3)
    assert (found.problem.rates.sum(axis=0) * found.problem.seconds).sum() * 21 == pytest.approx(193_660)
    assert table.loc["static", "saved"] > 0
    assert table.loc["re-planned", "saved"] > 0
    assert table.loc["horizon", "switched"] < table.loc["re-planned", "switched"]
