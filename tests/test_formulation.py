"""The fluid LP: the mode form against [L26] as printed, against its reductions, and its symbols against its numbers."""

import itertools
import re

import numpy as np
import pytest
import sympy
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from matplotlib.mathtext import MathTextParser
from scipy.optimize import linprog
from strategies import build, decode_bound_margin, log_floats, mode_models, pair_models, random_models

import fluidopt as fo
from fluidopt.reference import reference_model

CHARGING = ("bundled", "separate")
# Without shrinking, where one example costs several solves.
QUICK = (Phase.explicit, Phase.reuse, Phase.generate)


# ---- [L26] written down a second time, densely, and solved by another caller --------------------------------------


class Paper:
    """Quantities of [L26] for a model with one mixed/solo GPU, from the inputs alone."""

    def __init__(self, model):
        gpu, workload, prices = model.scenario.gpu, model.workload, model.scenario.prices
        curve = gpu.curve
        line = curve.alpha + curve.beta * gpu.chunk_size
        self.tau = max(line, curve.solo) if curve.physical else line
        self.gamma = 1 / curve.solo
        self.kappa = self.gamma * self.tau
        self.B, self.C = gpu.batch_size, gpu.chunk_size
        self.c_p, self.c_d = prices.prompt, prices.output
        self.lam, self.theta = workload.arrival_rate, workload.abandonment_rate
        self.P, self.D = workload.prompt_tokens, workload.output_tokens
        self.w = self.c_p * self.P + self.c_d * self.D
        self.mu_p, self.mu_m, self.mu_s = self.C / (self.P * self.tau), 1 / (self.D * self.tau), self.gamma / self.D
        self.charging = model.scenario.charging

    def solve(self, *, decode_queue=True):
        """Eq. (40) or (42) over (x, y_m, y_s, q_p, q_d): value, x, S, completed requests per class, marginals."""
        count = len(self.lam)
        one, zero, eye, none = np.ones(count), np.zeros(count), np.eye(count), np.zeros((count, count))
        inequality = np.array(
            [
                np.concatenate([one, zero, zero, zero, zero]),
                np.concatenate([-(self.B - 1) * one, one, zero, zero, zero]),
                np.concatenate([self.B * one, zero, one, zero, zero]),
            ]
        )
        equality = np.block(
            [
                [np.diag(self.mu_p), none, none, np.diag(self.theta), none],
                [np.diag(self.mu_p), -np.diag(self.mu_m), -np.diag(self.mu_s), none, -np.diag(self.theta) @ eye],
            ]
        )
        if self.charging == "bundled":
            gain = np.concatenate([zero, self.w * self.mu_m, self.w * self.mu_s, zero, zero])
        else:
            decode = self.c_d * one
            gain = np.concatenate(
                [self.c_p * self.C / self.tau * one, decode / self.tau, decode * self.gamma, zero, zero]
            )
        bounds = [(0, None)] * (4 * count) + [(0, None if decode_queue else 0)] * count
        found = linprog(
            -gain,
            A_ub=inequality,
            b_ub=[1, 0, self.B],
            A_eq=equality,
            b_eq=np.concatenate([self.lam, zero]),
            bounds=bounds,
            method="highs",
        )
        assert found.status == 0, found.message
        x, y_m, y_s, _, _ = found.x.reshape(5, count)
        return {
            "value": -found.fun,
            "x": x,
            "S": x.sum(),
            "completed": self.mu_m * y_m + self.mu_s * y_s,
            "duals": -found.ineqlin.marginals,
            "phi": -found.eqlin.marginals[:count],
        }

    def knapsack(self):
        """The value of bundled charging by the two-row reduction, both cases of kappa."""
        load, work = self.lam / self.mu_p, self.C * self.D / self.P
        spare = self.kappa * self.B - (self.B - 1)
        least = np.where(self.theta == 0, load, 0.0)
        gain = self.w * self.mu_p
        if self.kappa >= (self.B - 1) / self.B:
            rows, right = np.array([np.ones_like(work), work + spare]), [1, self.kappa * self.B]
        else:
            busy = min(1.0, load.sum())
            rows, right = np.array([np.ones_like(work), work]), [busy, self.kappa * self.B - spare * busy]
        found = linprog(-gain, A_ub=rows, b_ub=right, bounds=np.stack([least, load], axis=1), method="highs")
        assert found.status == 0, found.message
        return -found.fun


REGIMES = [
    pytest.param({}, id="kappa at least 1"),
    pytest.param({"below_bound": True}, id="kappa < (B-1)/B"),
    pytest.param({"patient": True}, id="a class never abandons"),
    pytest.param({"patient": True, "below_bound": True}, id="never abandons, kappa < (B-1)/B"),
]


@pytest.mark.parametrize("charging", CHARGING)
@pytest.mark.parametrize("regime", REGIMES)
def test_the_mode_form_equals_the_paper(charging, regime):
    for model in random_models(1, 75, charging=charging, **regime):
        paper = Paper(model).solve()
        plan = model.solve()
        assert plan.revenue_rate == pytest.approx(paper["value"], rel=1e-8)
        # Class totals and S are unique where decode slots are scarce and prefill capacity is not: with both scarce only
        # the total tokens count, since w is linear in P and D, and every class is at the threshold.
        if plan.shadow_prices["decode_slots[mixed]"] > 1e-6 * plan.revenue_rate and paper["S"] < 1 - 1e-6:
            assert np.nansum(plan.prefill) == pytest.approx(paper["S"], abs=1e-7)
            if charging == "bundled":
                np.testing.assert_allclose(plan.throughput, paper["completed"], rtol=1e-6, atol=1e-8)
                if not regime.get("below_bound"):
                    np.testing.assert_allclose(np.nansum(plan.prefill, axis=1), paper["x"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_knapsack_has_the_same_value(regime):
    for model in random_models(2, 75, **regime):
        assert model.solve().revenue_rate == pytest.approx(Paper(model).knapsack(), rel=1e-8)


def test_separate_charging_is_concave_fill_over_the_prefill_share():
    """max over S of c_p (C/tau) S + (c_d/tau) min(G(S), room(S)), G filling by decreasing D/P (all classes abandon)."""
    for model in random_models(3, 40, charging="separate") + random_models(
        4, 40, charging="separate", below_bound=True
    ):
        paper = Paper(model)
        load, work = paper.lam / paper.mu_p, paper.C * paper.D / paper.P
        order = np.argsort(-work)
        filled, gained = np.cumsum(load[order]), np.cumsum((work * load)[order])
        top = min(1.0, filled[-1])
        share = np.unique(np.clip(np.concatenate([[0], filled, np.linspace(0, top, 20_001)]), 0, top))
        decodes = np.interp(share, np.concatenate([[0], filled]), np.concatenate([[0], gained]))
        room = (paper.B - 1) * share + paper.kappa * paper.B * (1 - share)
        value = paper.c_p * paper.C / paper.tau * share + paper.c_d / paper.tau * np.minimum(decodes, room)
        assert model.solve().revenue_rate == pytest.approx(value.max(), rel=2e-4)
        assert model.solve().revenue_rate >= value.max() * (1 - 1e-9)


def test_duals_of_the_paper_map_to_those_of_the_mode_form(reference, reference_plan):
    paper = Paper(reference)
    alpha, beta, delta = paper.solve()["duals"]
    prices = reference_plan.shadow_prices
    assert prices["fleet[A100/Qwen-8B]"] == pytest.approx(alpha + paper.B * delta, rel=1e-8)
    assert prices["decode_slots[mixed]"] == pytest.approx(beta, rel=1e-8)
    assert prices["decode_slots[solo]"] == pytest.approx(delta, rel=1e-8)
    assert delta == pytest.approx(paper.kappa * beta, rel=1e-8)


# ---- the reference instance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["highs", "cvxpy"])
@pytest.mark.parametrize(("charging", "value"), [("bundled", 297.71619), ("separate", 298.59798)])
def test_reference_value(charging, value, solver):
    plan = reference_model(charging).solve(solver)
    assert plan.revenue_rate == pytest.approx(value, rel=1e-6 / 10)
    assert max(plan.certificate.primal_residual, plan.certificate.dual_residual, plan.certificate.gap) < 1e-7


@pytest.mark.parametrize("solver", ["highs", "cvxpy"])
def test_reference_allocation_and_prices(solver):
    plan = reference_model().solve(solver)
    assert plan.allocation["prefill"].to_numpy() == pytest.approx([0.018261, 0.194953], abs=1e-6)
    assert plan.prefill_queue == pytest.approx([0.316687, 0], abs=1e-6)
    assert plan.decode_queue == pytest.approx([0, 0], abs=1e-6)
    prices = plan.shadow_prices
    kappa = plan.model.scenario.gpu.kappa
    v = prices["decode_slots[mixed]"]
    assert v == pytest.approx(6.8390039, rel=1e-7)
    assert prices["decode_slots[solo]"] == pytest.approx(kappa * v, rel=1e-7)
    assert prices["fleet[A100/Qwen-8B]"] == pytest.approx(16 * kappa * v, rel=1e-7), "u = 0"
    phi = prices[["prefill_balance[decode-heavy]", "prefill_balance[prefill-heavy]"]].to_numpy()
    assert phi == pytest.approx([0, 264.45444], rel=1e-7, abs=1e-6)
    eta = prices[["decode_balance[decode-heavy]", "decode_balance[prefill-heavy]"]].to_numpy()
    assert eta == pytest.approx([2.45266, 288.98107], rel=2e-6)
    assert plan.slot_average_tpot == pytest.approx(24.28e-3, abs=5e-6)


def test_reference_separate_allocation():
    plan = reference_model("separate").solve()
    assert plan.allocation["prefill"].to_numpy() == pytest.approx([0.019495, 0.194953], abs=1e-6)
    assert plan.prefill_queue == pytest.approx([0, 0], abs=1e-6)
    assert np.nansum(plan.decode_queue) > 0.01


@pytest.mark.parametrize("charging", CHARGING)
def test_the_optimum_is_the_price_of_the_fleet_and_of_the_arrivals(charging):
    plan = reference_model(charging).solve()
    prices = plan.shadow_prices
    phi = plan.program.row_grids(plan.solution.duals)["prefill_balance"]
    expected = prices["fleet[A100/Qwen-8B]"] + phi @ plan.model.workload.arrival_rate
    assert plan.revenue_rate == pytest.approx(expected, rel=1e-9)


# ---- invariance ---------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(pair_models(), log_floats(1e-2, 1e2))
def test_scaling_the_abandonment_rates_changes_no_revenue(model, factor):
    slower = fo.Workload(
        tuple(
            fo.WorkloadClass(
                each.name,
                arrival_rate=each.arrival_rate,
                prompt_tokens=each.prompt_tokens,
                output_tokens=each.output_tokens,
                abandonment_rate=each.abandonment_rate * factor,
            )
            for each in model.workload
        )
    )
    scenario = model.scenario
    other = build(slower, scenario.gpu, prices=scenario.prices, charging=scenario.charging)
    assert other.solve().revenue_rate == pytest.approx(model.solve().revenue_rate, rel=1e-7, abs=1e-9)


@settings(max_examples=30, phases=QUICK)
@given(mode_models(), st.sampled_from([1e-9, 1e-6, 1e-3, 1e3, 1e6]))
def test_the_currency_does_not_matter(model, factor):
    scenario = model.scenario
    prices = fo.TokenPrices(prompt=scenario.prices.prompt * factor, output=scenario.prices.output * factor)
    other = build(scenario.classes, scenario.gpu, prices=prices, charging=scenario.charging)
    assert other.solve().revenue_rate == pytest.approx(factor * model.solve().revenue_rate, rel=1e-6)


# ---- operating modes ----------------------------------------------------------------------------------------------

CURVE = fo.IterationTime(alpha=0.0174, beta=6.2e-5, solo=0.022)
PREFILL = fo.Mode("prefill", chunk=512, iteration_time=0.05)
DECODE = fo.Mode("decode", decode_slots=16, iteration_time=0.022)
IDLE = fo.Mode("idle")


def gpu_of(*modes, name="gpu", share=1.0):
    return fo.GPU(CURVE, batch_size=16, chunk_size=256, name=name, share=share, operating_modes=modes or None)


def value(*gpus, charging="bundled"):
    return build(reference_model().workload, gpus, charging=charging).solve().revenue_rate


@pytest.mark.parametrize("charging", CHARGING)
def test_the_pair_written_as_modes_is_the_default(charging):
    (gpu,) = reference_model().gpu_types
    modes = (
        fo.Mode("m", chunk=256, decode_slots=15, iteration_time=gpu.curve.mixed(256)),
        fo.Mode("s", decode_slots=16, iteration_time=gpu.curve.decode_only(16)),
    )
    expected = reference_model(charging).solve().revenue_rate
    assert value(gpu_of(*modes), charging=charging) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("charging", CHARGING)
def test_a_free_split_is_the_best_fixed_split(charging):
    together = build(reference_model().workload, gpu_of(PREFILL, IDLE, DECODE), charging=charging).solve()
    best = together.mode_share[0]

    def fixed(share):
        return value(
            gpu_of(PREFILL, IDLE, name="p", share=share), gpu_of(DECODE, name="d", share=1 - share), charging=charging
        )

    assert 0 < best < 1
    assert fixed(best) == pytest.approx(together.revenue_rate, rel=1e-9)
    assert all(fixed(share) <= together.revenue_rate * (1 + 1e-9) for share in np.linspace(0.02, 0.98, 13))
    assert fixed(best / 2) < together.revenue_rate * (1 - 1e-3)


@pytest.mark.parametrize("charging", CHARGING)
def test_two_identical_half_types_are_one_type(charging):
    halves = value(gpu_of(name="a", share=0.5), gpu_of(name="b", share=0.5), charging=charging)
    assert halves == pytest.approx(value(gpu_of(), charging=charging), rel=1e-9)


@settings(max_examples=40)
@given(mode_models(), st.integers(1, 2048), log_floats(5e-3, 1e-1))
def test_another_mode_never_lowers_the_optimum(model, chunk, time):
    first, *others = model.gpu_types
    extra = fo.Mode("extra rest", decode_slots=1, iteration_time=time)
    more = fo.Mode("extra", chunk=chunk, decode_slots=1, iteration_time=time, after_prefill="extra rest")
    wider = fo.GPU(
        first.curve,
        batch_size=first.batch_size,
        chunk_size=first.chunk_size,
        name=first.name,
        share=first.share,
        operating_modes=(*first.modes(), extra, more),
    )
    scenario = model.scenario
    bigger = build(scenario.classes, (wider, *others), prices=scenario.prices, charging=scenario.charging)
    before = model.solve().revenue_rate
    assert bigger.solve().revenue_rate >= before - 1e-7 * (1 + before)


@settings(max_examples=60)
@given(mode_models(charging=st.just("bundled")))
def test_bundled_value_depends_on_modes_through_token_rates_only(model):
    """max sum w z, z <= a <= lambda, sum P a = p, sum D z <= d, (p, d) in sum_g share_g conv{(C/tau, b/tau)}."""
    workload, modes = model.workload, model.modes
    count, number = len(workload), len(modes)
    prefill = np.array([mode.prefill_speed for _, mode in modes])
    decode = np.array([mode.decode_slots * mode.decode_speed for _, mode in modes])
    prices = model.scenario.prices
    w = prices.prompt * workload.prompt_tokens + prices.output * workload.output_tokens
    zero, eye = np.zeros(count), np.eye(count)
    member = np.array([[float(of.name == gpu.name) for of, _ in modes] for gpu in model.gpu_types])
    found = linprog(
        -np.concatenate([w, zero, np.zeros(number)]),
        A_ub=np.vstack(
            [
                np.hstack([eye, -eye, np.zeros((count, number))]),
                np.concatenate([workload.output_tokens, zero, -decode])[None],
            ]
        ),
        b_ub=np.zeros(count + 1),
        A_eq=np.vstack(
            [
                np.concatenate([zero, workload.prompt_tokens, -prefill])[None],
                np.hstack([np.zeros((len(member), 2 * count)), member]),
            ]
        ),
        b_eq=np.concatenate([[0], [gpu.share for gpu in model.gpu_types]]),
        bounds=[(0, None)] * count + [(0, rate) for rate in workload.arrival_rate] + [(0, None)] * number,
        method="highs",
    )
    assert found.status == 0
    assert model.solve().revenue_rate == pytest.approx(-found.fun, rel=1e-6, abs=1e-7)


# ---- user rows and objectives -------------------------------------------------------------------------------------


def last_rows(model, count):
    return model.program().matrix.toarray()[-count:]


def column(model, name):
    return model.program().column_names.index(name)


def test_a_row_with_a_free_index_is_one_row_per_member(reference):
    s = reference.symbols
    reference.subject_to(s.q_p[s.i] <= 0.1 * s.lambda_[s.i], name="wait")
    assert reference.program().row_names[-2:] == ["wait[decode-heavy]", "wait[prefill-heavy]"]
    assert reference.program().row_upper[-2:] == pytest.approx([0.05, 0.05])
    plan = reference.solve()
    assert plan.prefill_queue[0] == pytest.approx(0.05)
    assert plan.revenue_rate < 297.7


def test_a_row_with_a_label_is_one_row(reference):
    s = reference.symbols
    reference.subject_to(s.q_p["decode-heavy"] <= 0.05, name="wait")
    expected = np.zeros(12)
    expected[column(reference, "q_p[decode-heavy]")] = 1
    assert reference.program().row_names[-1] == "wait"
    assert last_rows(reference, 1)[0] == pytest.approx(expected)


def test_a_row_can_sum_over_a_set(reference):
    s = reference.symbols
    reference.subject_to(s.sum(s.theta[s.i] * s.q_p[s.i], over=s.i) <= 0.02, name="lost")
    plan = reference.solve()
    assert 0.1 * plan.prefill_queue.sum() == pytest.approx(0.02)


def test_a_row_can_double_sum(reference):
    s = reference.symbols
    reference.subject_to(s.sum(s.sum(s.x[s.i, s.k], over=s.k), over=s.i) <= 0.2, name="prefills")
    assert np.nansum(reference.solve().prefill) == pytest.approx(0.2)


def test_where_selects_members(reference):
    s = reference.symbols
    reference.subject_to(s.q_p[s.i] <= 0.1, name="wait", where=s.P[s.i] < 1000)
    assert [name for name in reference.program().row_names if name.startswith("wait")] == ["wait[decode-heavy]"]
    assert reference.solve().shadow_prices["wait[decode-heavy]"] > 0


def test_where_can_leave_out_a_row_without_free_index(reference):
    s = reference.symbols
    reference.subject_to(s.q_p["decode-heavy"] <= 0.1, name="wait", where=s.P["decode-heavy"] > 1000)
    plan = reference.solve()
    assert plan.revenue_rate == pytest.approx(297.71619, rel=1e-7)
    assert not any(name.startswith("wait") for name in plan.shadow_prices.index)


@pytest.mark.parametrize("where", [True, "wait", 3], ids=repr)
def test_where_must_be_a_condition_in_symbols(reference, where):
    s = reference.symbols
    if where is True:
        reference.subject_to(s.q_p[s.i] <= 0.1, name="wait", where=where)
        assert len([name for name in reference.program().row_names if name.startswith("wait")]) == 2
    else:
        with pytest.raises(fo.InvalidInput, match=r"where|wait"):
            reference.subject_to(s.q_p[s.i] <= 0.1, name="wait", where=where)


def test_a_sum_may_use_the_letter_of_a_free_index(reference):
    """q_p[i] <= (q_p summed over all classes)/2: the i under the sum is not the i of the row."""
    s = reference.symbols
    reference.subject_to(2 * s.q_p[s.i] <= s.sum(s.q_p[s.i], over=s.i), name="half")
    at = [column(reference, f"q_p[{name}]") for name in reference.workload.names]
    assert last_rows(reference, 2)[:, at] == pytest.approx(np.array([[1, -1], [-1, 1]]))


@pytest.mark.parametrize(
    ("relation", "upper"),
    [
        pytest.param(lambda s: s.q_p[s.i] <= s.sum(s.lambda_[s.i], over=s.i), [1.5, 1.5], id="alone"),
        pytest.param(lambda s: s.q_p[s.i] <= s.lambda_[s.i] * s.sum(s.lambda_[s.i], over=s.i), [0.75, 1.5], id="times"),
        pytest.param(lambda s: s.q_p[s.i] / s.sum(s.lambda_[s.i], over=s.i) <= 1, [1.5, 1.5], id="divided"),
    ],
)
def test_a_sum_of_parameters_may_use_the_letter_of_a_free_index(relation, upper):
    one, two = reference_model().workload
    two = fo.WorkloadClass("two", arrival_rate=1.0, prompt_tokens=3000, output_tokens=400, abandonment_rate=0.1)
    model = build((one, two), reference_model().gpu_types)
    model.subject_to(relation(model.symbols), name="r")
    scale = last_rows(model, 2).max(axis=1)
    assert model.program().row_upper[-2:] / scale == pytest.approx(upper)


def test_a_sum_in_an_objective_may_nest_the_same_letter(reference):
    s = reference.symbols
    reference.maximize(s.sum(s.q_p[s.i] * s.sum(s.theta[s.i], over=s.i), over=s.i))
    assert reference.program().objective[column(reference, "q_p[decode-heavy]")] == pytest.approx(0.2)


def test_a_sum_over_part_of_a_set_is_not_taken_for_the_whole(reference):
    s = reference.symbols
    with pytest.raises(fo.InvalidInput, match="sum"):
        reference.subject_to(sympy.Sum(s.q_p[s.i], (s.i, 1, 1)) <= 0.1, name="r")


@pytest.mark.parametrize("swap", [lambda s: s.x[s.k, s.i], lambda s: s.q_p[s.k], lambda s: s.C[s.i] * s.q_p[s.i]])
def test_an_index_of_another_set_is_refused(reference, swap):
    """Two classes and two modes: a swapped index would otherwise fit and pose another row."""
    with pytest.raises(fo.InvalidInput, match=r"class|mode"):
        reference.subject_to(swap(reference.symbols) <= 0.1, name="r")


NOT_LINEAR = [
    pytest.param(lambda s: s.q_p[s.i] ** 2 <= 1, "not linear", id="square"),
    pytest.param(lambda s: abs(s.q_p[s.i]) <= 1, "not linear", id="absolute value"),
    pytest.param(lambda s: s.q_p[s.i] * s.q_d[s.i] <= 1, "multiplies variables", id="product"),
    pytest.param(lambda s: s.q_p[s.i] / s.q_d[s.i] <= 1, "multiplies variables", id="quotient"),
    pytest.param(lambda s: 1 / s.q_p[s.i] <= 1, "not linear", id="reciprocal"),
    pytest.param(lambda s: sympy.Max(s.q_p[s.i], 1) <= 1, "not linear", id="maximum"),
    pytest.param(lambda s: s.sum(s.q_p[s.i], over=s.i) ** 2 <= 1, "not linear", id="square of a sum"),
    pytest.param(lambda s: s.q_p[s.i] < 1, "strict", id="strict"),
    pytest.param(lambda s: sympy.Ne(s.q_p[s.i], 1), "strict or an inequation", id="inequation"),
    pytest.param(lambda s: s.q_p[s.i] - 1, "expected a relation", id="no relation"),
    pytest.param(lambda _: "q_p <= 1", r"found q_p without subscripts; write q_p\[i\]", id="text"),
    pytest.param(lambda _: None, "expected a relation", id="none"),
    pytest.param(lambda s: s.q_p[s.i] - s.q_p[s.i] <= 1, "holds no variable", id="tautology"),
    pytest.param(lambda s: s.q_p[s.i] - s.q_p[s.i] >= 1, "holds no variable", id="contradiction"),
    pytest.param(lambda s: s.lambda_[s.i] <= 1, "holds no variable", id="parameters only"),
    pytest.param(lambda s: s.q_p[s.i] * sympy.Symbol("z") <= 1, "z is not a symbol of this model", id="alien symbol"),
    pytest.param(
        lambda s: s.q_p[s.i] <= sympy.IndexedBase("z")[s.i], "z is not a symbol of this model", id="alien family"
    ),
    pytest.param(lambda s: s.q_p[sympy.Symbol("j")] <= 1, r"q_p\[j\]: there is no class", id="alien index"),
    pytest.param(lambda s: s.x[s.i, s.i] <= 1, "twice|class|mode", id="index twice"),
    pytest.param(lambda s: sympy.I * s.q_p[s.i] <= s.q_d[s.i], "real|number|complex", id="complex"),
]


@pytest.mark.parametrize(("relation", "message"), NOT_LINEAR)
def test_a_row_that_is_not_linear_is_refused(reference, relation, message):
    before = reference.symbolic
    with pytest.raises(fo.InvalidInput, match=message):
        reference.subject_to(relation(reference.symbols), name="r")
    assert reference.symbolic == before, "a refused row leaves the model as it was"


def test_subscripts_are_checked(reference):
    s = reference.symbols
    with pytest.raises(fo.InvalidInput, match=r"no class of that name.*'decode-heavy', 'prefill-heavy'"):
        s.q_p["chat"]
    with pytest.raises(fo.InvalidInput, match="no mode of that name"):
        s.x["decode-heavy", "prefill"]
    with pytest.raises(fo.InvalidInput, match=r"x takes 2 subscript\(s\) \(class, mode\); got 1"):
        s.x[s.i]
    with pytest.raises(fo.InvalidInput, match="over must be one of the index symbols"):
        s.sum(s.q_p[s.i], over=sympy.Symbol("j"))


@pytest.mark.parametrize("name", ["fleet", "mine"])
def test_a_second_row_of_the_same_name_is_refused(reference, name):
    s = reference.symbols
    reference.subject_to(s.q_p[s.i] <= 1, name="mine")
    with pytest.raises(fo.InvalidInput, match=f"row named {name!r} exists already"):
        reference.subject_to(s.q_p[s.i] <= 1, name=name)


def test_a_queue_that_is_not_determined_is_refused():
    one, two = reference_model().workload.scaled(0.2)
    patient = fo.WorkloadClass("patient", arrival_rate=0.05, prompt_tokens=300, output_tokens=100)
    model = build((one, two, patient), reference_model().gpu_types)
    s = model.symbols
    with pytest.raises(fo.InvalidInput, match=r"q_p\[patient\], which the model does not determine.*abandonment rate"):
        model.subject_to(s.q_p[s.i] <= 1, name="wait")
    with pytest.raises(fo.InvalidInput, match=r"q_d\[patient\]"):
        model.subject_to(s.q_d["patient"] <= 1, name="wait")
    model.subject_to(s.q_p[s.i] <= 1, name="wait", where=s.theta[s.i] > 0)
    assert model.solve().certificate.holds(1e-9)


def test_an_objective_in_a_queue_that_is_not_determined_is_refused():
    patient = fo.WorkloadClass("patient", arrival_rate=0.05, prompt_tokens=300, output_tokens=100)
    model = build([patient], reference_model().gpu_types)
    s = model.symbols
    with pytest.raises(fo.InvalidInput, match="does not determine"):
        model.maximize(-s.sum(s.q_p[s.i], over=s.i))


@pytest.mark.parametrize("meaning", ["{class} waits", "{", "{0}", "a short queue"])
def test_a_row_in_words_may_hold_braces(reference, meaning):
    s = reference.symbols
    reference.subject_to(s.q_p["decode-heavy"] <= 0.1, name="wait", meaning=meaning)
    assert any(line.startswith(f"{meaning}: ") for line in reference.solve().binding)


def test_a_row_in_words_is_listed_as_binding(reference):
    s = reference.symbols
    reference.subject_to(s.q_p[s.i] <= 0.1, name="wait", meaning="{class} waits in a short queue")
    assert any(line.startswith("decode-heavy waits in a short queue: ") for line in reference.solve().binding)


@settings(max_examples=40)
@given(pair_models(charging=st.just("bundled"), patient=False), st.floats(0.2, 0.9), st.data())
def test_shadow_prices_of_user_rows_bound_the_change_of_the_optimum(model, fraction, data):
    """R* is concave in a right side: its dual lies between the slope to the right and the slope to the left."""
    at = data.draw(st.integers(0, len(model.workload) - 1))
    free = model.solve()
    assume(free.prefill_queue[at] > 1e-3)
    limit = fraction * free.prefill_queue[at]

    def posed(right):
        other = model.copy()
        return other.subject_to(other.symbols.q_p[model.workload.names[at]] <= right, name="wait")

    try:
        plan = posed(limit).solve()
    except fo.InfeasibleModel:
        assume(False)
    step = 1e-4 * limit
    above = posed(limit + step).solve().revenue_rate - plan.revenue_rate
    try:
        below = plan.revenue_rate - posed(limit - step).solve().revenue_rate
    except fo.InfeasibleModel:
        below = np.inf
    price = plan.shadow_prices["wait"]
    noise = 1e-9 * (1 + plan.revenue_rate)
    assert above - noise <= price * step <= below + noise


def test_another_objective_is_maximised_and_the_revenue_still_reported(reference, reference_plan):
    s = reference.symbols
    reference.maximize(s.sum(s.sum(s.mu_d[s.i, s.k] * s.y[s.i, s.k], over=s.k), over=s.i))
    plan = reference.solve()
    assert plan.objective == pytest.approx(plan.throughput.sum())
    assert plan.throughput.sum() >= reference_plan.throughput.sum() - 1e-9
    assert plan.revenue_rate <= reference_plan.revenue_rate * (1 + 1e-9)
    assert plan.revenue_rate == pytest.approx(plan.throughput @ [230, 380])


@pytest.mark.parametrize("charging", CHARGING)
def test_the_built_in_objective_written_by_hand_changes_nothing(charging):
    model = reference_model(charging)
    s = model.symbols
    tokens = s.sum(s.sum(s.y[s.i, s.k] / s.tau[s.k], over=s.i), over=s.k)
    if charging == "bundled":
        hand = s.sum(s.sum(s.w[s.i] / s.D[s.i] * s.y[s.i, s.k] / s.tau[s.k], over=s.k), over=s.i)
    else:
        hand = s.c_p * s.sum(s.C[s.k] / s.tau[s.k] * s.phi[s.k], over=s.k) + s.c_d * tokens
    expected = model.solve().revenue_rate
    plan = model.maximize(hand).solve()
    assert plan.objective == pytest.approx(expected, rel=1e-9)
    assert plan.revenue_rate == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda _: 3, "expected an expression in the model's symbols; got 3"),
        (lambda s: s.c_p, "constant c_p changes no decision"),
        (lambda s: s.q_p[s.i], "index i is neither"),
        (lambda _: None, "maximize"),
        (lambda _: "q_p", "found q_p without subscripts"),
        (lambda s: s.sum(s.q_p[s.i], over=s.i) <= 1, "maximize|not linear"),
    ],
)
def test_an_objective_must_be_linear(reference, objective, message):
    with pytest.raises(fo.InvalidInput, match=message):
        reference.maximize(objective(reference.symbols))


def test_an_objective_that_is_not_concave_is_refused(reference):
    s = reference.symbols
    with pytest.raises(fo.InvalidInput, match=r"concave|convex"):
        reference.maximize(s.sum(s.q_p[s.i] ** 2, over=s.i)).solve()


def test_text_is_never_evaluated(reference, capsys):
    for attempt in (
        lambda: reference.maximize("print('evaluated')"),
        lambda: reference.symbols.sum("print('evaluated')", over=reference.symbols.i),
        lambda: reference.subject_to("print('evaluated')", name="r"),
    ):
        with pytest.raises(fo.InvalidInput):
            attempt()
    assert capsys.readouterr().out == ""


# ---- infeasible and unbounded -------------------------------------------------------------------------------------


def test_rows_that_cannot_hold_together_are_named(reference):
    s = reference.symbols
    reference.subject_to(s.q_p["decode-heavy"] <= 0.1, name="short")
    reference.subject_to(s.q_p["decode-heavy"] >= 0.2, name="long")
    with pytest.raises(
        fo.InfeasibleModel,
        match=r"but not all: (short: .*long: .*|long: .*short: .*) \(rows (short, long|long, short)\)",
    ) as caught:
        reference.solve()
    assert set(caught.value.rows) == {"short", "long"}
    assert caught.value.kind == "infeasible"


@pytest.mark.parametrize("solver", ["highs", "cvxpy"])
def test_an_infeasible_row_names_the_rows_it_contradicts(reference, solver):
    s = reference.symbols
    reference.subject_to(s.sum(s.phi[s.k], over=s.k) >= 2, name="twice the fleet")
    with pytest.raises(fo.InfeasibleModel) as caught:
        reference.solve(solver)
    assert set(caught.value.rows) == {"twice the fleet", "fleet[A100/Qwen-8B]"}


def test_a_row_on_a_variable_that_is_always_zero_is_named(reference):
    """There is no prefill in the solo mode, so the row says 0 >= 0.1."""
    s = reference.symbols
    with pytest.raises((fo.InfeasibleModel, fo.InvalidInput), match="impossible"):
        reference.subject_to(s.x["decode-heavy", "solo"] >= 0.1, name="impossible").solve()


def test_patient_classes_that_do_not_fit_together_are_named_with_their_loads(reference):
    """theta = 0 for both reference classes: jointly infeasible, though each alone fits."""
    patient = reference.workload.with_abandonment(0.0)
    gpu = reference.scenario.gpu
    for each in patient:
        assert build([each], gpu).solve().allocation["throughput"].iloc[0] == pytest.approx(0.5)
    with pytest.raises(fo.InfeasibleModel) as caught:
        build(patient, gpu).solve()
    paper = Paper(build(patient, gpu))
    load, work = paper.lam / paper.mu_p, paper.C * paper.D / paper.P
    spare = paper.kappa * paper.B - (paper.B - 1)
    message = str(caught.value)
    assert "decode-heavy" in message
    assert "prefill-heavy" in message
    assert f"{load.sum():.4g} of 1 prefill" in message
    assert f"{(work * load).sum():.4g} of {paper.kappa * paper.B - spare * load.sum():.4g} decode slots" in message
    assert {"prefill_balance[decode-heavy]", "prefill_balance[prefill-heavy]"} <= set(caught.value.rows)


# ---- dual and KKT in symbols, evaluated here ----------------------------------------------------------------------


def evaluate(expression, at, given):
    """The number of an expression; members count from 0, ``given`` maps base names to arrays, absent members are 0."""
    if isinstance(expression, sympy.Sum):
        (index, _, size), *others = expression.limits
        assert not others
        return sum(evaluate(expression.function, at | {index: member}, given) for member in range(given[str(size)]))
    if isinstance(expression, sympy.Indexed):
        return given[str(expression.base)][tuple(int(evaluate(index, at, given)) for index in expression.indices)]
    if isinstance(expression, sympy.Symbol):
        return at[expression] if expression in at else given[expression.name]
    if isinstance(expression, sympy.Piecewise):
        for inner, condition in expression.args:
            if evaluate(condition, at, given):
                return evaluate(inner, at, given)
        return 0.0
    if expression in (sympy.true, sympy.false):
        return bool(expression)
    if not expression.args:
        return float(expression)
    parts = [evaluate(part, at, given) for part in expression.args]
    if isinstance(expression, sympy.Mul):
        return np.prod(parts)
    if isinstance(expression, sympy.Add):
        return sum(parts)
    if isinstance(expression, sympy.Pow):
        return parts[0] ** parts[1]
    if isinstance(expression, sympy.Eq):
        return parts[0] == parts[1]
    if isinstance(expression, sympy.And):
        return all(parts)
    if isinstance(expression, sympy.core.relational.StrictGreaterThan):
        return parts[0] > parts[1]
    raise AssertionError(f"no rule for {type(expression)}")


def given_numbers(model, plan):
    """Parameters, sizes, primal values and duals (by the symbols of the duals), 0 where a member does not exist."""
    workload, modes, prices = model.workload, [mode for _, mode in model.modes], model.scenario.prices
    tau = np.array([mode.iteration_time or np.inf for mode in modes])
    chunk = np.array([mode.chunk for mode in modes], dtype=float)
    values = {
        "lambda": workload.arrival_rate,
        "theta": workload.abandonment_rate,
        "P": workload.prompt_tokens,
        "D": workload.output_tokens,
        "C": chunk,
        "b": np.array([mode.decode_slots for mode in modes], dtype=float),
        "tau": tau,
        "share": np.array([gpu.share for gpu in model.gpu_types]),
        "member": np.array([[float(of.name == gpu.name) for of, _ in model.modes] for gpu in model.gpu_types]),
        "mu_p": chunk / (workload.prompt_tokens[:, None] * tau),
        "mu_d": 1 / (workload.output_tokens[:, None] * tau),
        "w": prices.prompt * workload.prompt_tokens + prices.output * workload.output_tokens,
        "c_p": prices.prompt,
        "c_d": prices.output,
        "I": len(workload),
        "K": len(modes),
        "G": len(model.gpu_types),
    }
    values |= {name: np.nan_to_num(grid) for name, grid in plan.program.column_grids(plan.solution.values).items()}
    duals = {name: np.nan_to_num(grid) for name, grid in plan.program.row_grids(plan.solution.duals).items()}
    for row in model.symbolic.constraints:
        symbol = row.dual_symbol
        values[str(symbol.base) if row.over else symbol.name] = duals[row.name] if row.over else float(duals[row.name])
    return values


def members(expression_symbols, model):
    """All assignments of the free index symbols."""
    s = model.symbols
    sizes = {s.i: len(model.workload), s.k: len(model.modes), s.g: len(model.gpu_types)}
    free = [symbol for symbol in sizes if symbol in expression_symbols]
    for places in itertools.product(*(range(sizes[symbol]) for symbol in free)):
        yield dict(zip(free, places, strict=True))


@st.composite
def models_with_rows(draw):
    """Random models, half of them with user rows: over a free index, of one member, of sums, of selected members."""
    model = draw(mode_models())
    if draw(st.booleans()):
        s = model.symbols
        shares = st.floats(0.3, 1)
        model.subject_to(s.q_p[s.i] <= draw(shares) * s.lambda_[s.i] / s.theta[s.i], name="each")
        model.subject_to(s.q_d["class 0"] + s.q_p["class 0"] >= 0, name="one")
        lost = s.sum(s.theta[s.i] * (s.q_p[s.i] + s.q_d[s.i]), over=s.i)
        model.subject_to(lost <= draw(shares) * s.sum(s.lambda_[s.i], over=s.i), name="all")
        model.subject_to(sympy.Eq(s.q_d[s.i], 0), name="none", where=s.P[s.i] > s.D[s.i])
    return model


def solve_or_skip(model):
    try:
        return model.solve()
    except fo.InfeasibleModel:
        return assume(False)


@settings(max_examples=25)
@given(models_with_rows())
def test_the_symbolic_dual_is_feasible_and_as_good(model):
    plan = solve_or_skip(model)
    dual = model.symbolic.dual()
    given_values = given_numbers(model, plan)
    scale = 1 + abs(plan.objective)
    assert evaluate(dual.objective, {}, given_values) == pytest.approx(plan.objective, rel=1e-7, abs=1e-7)
    for row in dual.constraints:
        for at in members({index.symbol for index in row.over}, model):
            if evaluate(row.where, at, given_values):
                short = evaluate(row.right, at, given_values) - evaluate(row.left, at, given_values)
                assert short <= 1e-7 * scale, row.name


@settings(max_examples=25)
@given(models_with_rows())
def test_the_symbolic_kkt_conditions_hold(model):
    plan = solve_or_skip(model)
    given_values = given_numbers(model, plan)
    conditions = [each for each in model.symbolic.kkt() if each != sympy.true]
    assert len(conditions) >= 5
    for condition in conditions:
        for at in members(condition.free_symbols, model):
            assert evaluate(condition.lhs, at, given_values) == pytest.approx(0, abs=1e-6 * (1 + plan.objective))


def test_the_dual_says_which_sign_its_variables_have(reference):
    s = reference.symbols
    reference.subject_to(s.q_p[s.i] >= 0.01, name="floor")
    meanings = {str(each.symbol): each.meaning for each in reference.symbolic.dual().variables}
    assert meanings["nu"] == "shadow price of decode_slots (>= 0)"
    assert meanings["sigma"] == "shadow price of fleet (free)"
    assert meanings["dual_floor"] == "shadow price of floor (<= 0)"


# ---- LaTeX --------------------------------------------------------------------------------------------------------


def mathtext_lines(latex):
    """The formulas of an ``aligned`` block, without what matplotlib's mathtext does not know."""
    latex = re.sub(r"\\begin{cases}.*?\\end{cases}", "0", latex)
    body = latex.removeprefix("\\begin{aligned}\n").removesuffix("\n\\end{aligned}")
    for line in re.split(r"\\\\(?:\n|$)", body):
        for cell in line.split("&"):
            if cell.strip():
                yield "$" + cell.strip() + "$"


@pytest.mark.parametrize("charging", CHARGING)
@pytest.mark.parametrize("form", ["primal", "dual"])
def test_latex_renders(charging, form):
    model = reference_model(charging)
    s = model.symbols
    model.subject_to(s.q_p[s.i] <= 2 * s.lambda_[s.i], name="wait", where=s.theta[s.i] > 0)
    model.subject_to(s.q_d["decode-heavy"] <= 0.1, name="one")
    program = model.symbolic if form == "primal" else model.symbolic.dual()
    parser = MathTextParser("path")
    latex = program.latex()
    assert latex.count("{") == latex.count("}")
    assert latex.count(r"\left") == latex.count(r"\right")
    lines = list(mathtext_lines(latex))
    assert len(lines) > 10
    for line in lines:
        parser.parse(line.replace(r"\le ", r"\leq ").replace(r"\ge ", r"\geq "))


def test_latex_reads_like_the_formulation():
    latex = reference_model("bundled").symbolic.latex()
    for fragment in (
        r"\max",
        r"\sum_{k \in g} \phi_{k} = \mathrm{share}_{g}",
        r"\sum_{i} x_{i,k} = \phi_{k}",
        r"\forall k: C_{k} > 0",
        r"\sum_{i} y_{i,k} \le b_{k} \phi_{k}",
        r"\theta_{i} q_{p,i} + \sum_{k} \mu_{p,i,k} x_{i,k} = \lambda_{i}",
        r"\theta_{i} q_{d,i} + \sum_{k} \mu_{d,i,k} y_{i,k} = \sum_{k} \mu_{p,i,k} x_{i,k}",
        r"\phi,\ x,\ y,\ q_{p},\ q_{d} \ge 0",
    ):
        assert fragment in latex
    assert re.search(r"\\max\\quad & \\sum_\{.*\}.*w_\{i\}.*y_\{i,k\}", latex)
    separate = reference_model("separate").symbolic.latex()
    assert "c_{p}" in separate
    assert "c_{d}" in separate
    assert "w_{i}" not in separate


def test_latex_escapes_the_names_of_classes():
    model = build(
        [fo.WorkloadClass("a_b & 5% {x}", arrival_rate=1, prompt_tokens=9, output_tokens=9, abandonment_rate=1)],
        reference_model().gpu_types,
    )
    s = model.symbols
    latex = model.subject_to(s.q_p["a_b & 5% {x}"] <= 1, name="n_1").symbolic.latex()
    assert r"a\_b \& 5\% \{x\}" in latex


def test_latex_has_no_coefficient_minus_one(reference):
    assert "-1 " not in reference.symbolic.dual().latex()


def test_the_plain_text_names_every_row(reference):
    shown = str(reference.symbolic)
    assert all(f"{row.name}: " in shown for row in reference.symbolic.constraints)


# ---- Proposition 3.2 ----------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(pair_models(charging=st.just("bundled")))
def test_no_decode_queue_where_the_proposition_holds(model):
    plan = model.solve()
    margin = decode_bound_margin(model)
    assume(abs(margin) > 1e-6)
    assert plan.decode_buffer_vanishes == (margin > 0)
    note = any("decode-buffer elimination" in each for each in plan.notes)
    assert note == (margin < 0)
    if margin > 0:
        theta = model.workload.abandonment_rate
        given_up = np.where(theta > 0, theta * np.nan_to_num(plan.decode_queue), 0)
        assert given_up.max() <= 1e-7 * (1 + plan.admitted.max())


def test_a_decode_queue_can_pay_below_the_bound():
    """Mixed decodes 18 times as fast as solo ones: prefills are worth running for their speed, and then thrown away."""
    curve = fo.IterationTime(alpha=1e-3, beta=1e-6, solo=0.022, physical=False)
    with pytest.warns(fo.ContentionWarning, match=r"Proposition 3.2 of \[L26\] does not apply"):
        model = fo.FluidModel(
            reference_model().workload.scaled(40),
            fo.GPU(curve, batch_size=16, chunk_size=256),
            prices=fo.TokenPrices(prompt=0.1, output=0.2),
        )
    plan = model.solve()
    assert np.nansum(plan.decode_queue) > 1
    assert not plan.decode_buffer_vanishes
    assert any("Proposition 3.2 does not apply" in note for note in plan.notes)
    without = Paper(model).solve(decode_queue=False)["value"]
    assert without < plan.revenue_rate * (1 - 1e-3)


def test_no_decode_queue_when_forbidden_costs_nothing_above_the_bound():
    for model in random_models(5, 30):
        paper = Paper(model)
        assert paper.solve(decode_queue=False)["value"] == pytest.approx(model.solve().revenue_rate, rel=1e-8)


def test_terms_that_cancel_leave_no_trace(reference):
    """All classes but one, written as a sum less a member."""
    s = reference.symbols
    reference.subject_to(s.sum(s.q_p[s.i], over=s.i) - s.q_p["prefill-heavy"] <= 0.1, name="others")
    assert np.count_nonzero(reference.program().matrix.data) == reference.program().matrix.nnz
    assert reference.solve().prefill_queue[0] == pytest.approx(0.1)
