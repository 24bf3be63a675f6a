"""Sensitivities: derivatives against differences of plans, kinks from both sides, exact curves, global indices."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import build, mode_models, pair_models
from typer.testing import CliRunner

import fluidopt as fo
from fluidopt.cli.sensitivity import sensitivity as command
from fluidopt.reference import reference_model
from fluidopt.studies.sensitivity.curve import SensitivityCurve, sensitivity_curve
from fluidopt.studies.sensitivity.local import Sensitivity, sensitivity
from fluidopt.studies.sensitivity.parameters import parameters_of
from fluidopt.studies.sensitivity.variance import GlobalSensitivity, global_sensitivity

pytestmark = pytest.mark.filterwarnings("ignore::fluidopt.errors.ContentionWarning")

LEVELS = (
    fo.MeanTTFT(at_most=15.0, of="served"),
    fo.MeanWait(at_most=4.0, classes=("prefill-heavy",)),
    fo.AbandonmentShare(at_most=0.6),
    fo.SlotTPOT(at_most=0.0242),
    fo.KVMemory(tokens=18_000.0),
)


def resolved(parameter, value):
    """R* with one parameter elsewhere, by building and solving that model: nothing of the derivatives is used."""
    return fo.FluidModel.from_scenario(parameter.moved(parameter.model.scenario, value)).solve().objective


def one_sided(parameter, side, present):
    """The derivative to one side by a second-order difference of plans, at two steps; ``present``: R* itself."""
    rates = []
    for share in (1e-4, 1e-5):
        step = side * share * parameter.scale
        near, next_ = (resolved(parameter, parameter.value + times * step) for times in (1, 2))
        rates.append((4 * near - next_ - 3 * present) / (2 * step))
    return rates


def assert_matches(got, rates, parameter, objective):
    """A derivative is what a difference says; near a kink the shorter step counts."""
    room = 1e-6 * (abs(objective) / parameter.scale + abs(got)) + 1e-12
    assert min(abs(got - rate) for rate in rates) < room, (parameter.name, got, rates)


# ---- local --------------------------------------------------------------------------------------------------------


@settings(max_examples=5)
@given(st.one_of(pair_models(), mode_models()))
def test_every_derivative_is_what_a_difference_of_plans_says_on_both_sides(model):
    found, parameters = sensitivity(model), parameters_of(model)
    assert {each.parameter for each in found.entries} == set(parameters)
    for each in found.entries:
        parameter = parameters[each.parameter]
        if parameter.whole or "never gives up" in each.note:
            continue
        for side, got in ((1, each.right), (-1, each.left)):
            if math.isnan(got):
                assert each.note
                continue
            try:
                rates = one_sided(parameter, side, found.objective)
            except fo.InfeasibleModel:
                continue
            assert_matches(got, rates, parameter, found.objective)


def test_the_reference_by_its_closed_forms():
    model, plan = reference_model(), reference_model().solve("knapsack")
    found = sensitivity(model)
    phi = plan.shadow_prices.filter(like="prefill_balance").to_numpy()
    for name, price in zip(model.workload.names, phi, strict=True):
        assert found[f"arrival_rate[{name}]"].derivative == pytest.approx(price, abs=1e-9)
        theta = found[f"abandonment_rate[{name}]"]
        assert (theta.left, theta.derivative, theta.right) == (0.0, 0.0, 0.0)
    assert found["arrival_rate"].derivative == pytest.approx(phi @ model.workload.arrival_rate)
    tokens = plan.throughput @ np.array([model.workload.prompt_tokens, model.workload.output_tokens]).T
    assert [found["prompt_price"].derivative, found["output_price"].derivative] == pytest.approx(tokens)
    # Every rate of the model is of one unit of time, so R* is homogeneous: faster GPUs and arrivals earn as much more.
    time = ("alpha", "beta", "solo")
    assert sum(found.elasticity(name) for name in ("arrival_rate", "abandonment_rate")) - sum(
        found.elasticity(name) for name in time
    ) == pytest.approx(1)
    assert found.elasticity("prompt_price") + found.elasticity("output_price") == pytest.approx(1)


def test_derivatives_of_the_paper_beside_its_gamma():
    """dR*/d gamma = -solo^2 dR*/d solo: the elasticities are opposite."""
    model = reference_model()
    gpu = model.gpu_types[0]

    def at(gamma):
        curve = replace(gpu.curve, solo=1 / gamma)
        return fo.FluidModel(model.workload, replace(gpu, curve=curve), prices=model.scenario.prices).solve().objective

    gamma, step = 1 / gpu.curve.solo, 1e-4
    found = sensitivity(model, "solo")
    by_difference = (at(gamma + step) - at(gamma - step)) / (2 * step) * gamma / found.objective
    assert -found.elasticity("solo") == pytest.approx(by_difference, rel=1e-6)


@pytest.mark.parametrize(
    ("charging", "levels", "binding"),
    [("bundled", LEVELS[:4], {"slot_tpot"}), ("separate", LEVELS, {"abandonment_share", "kv_memory"})],
)
def test_service_levels_carry_derivatives_through_their_bounds(charging, levels, binding):
    base = reference_model(charging)
    model = fo.FluidModel(
        base.workload, base.gpu_types, prices=base.scenario.prices, charging=charging, service_levels=levels
    )
    found, parameters = sensitivity(model), parameters_of(model)
    assert binding == {level.kind for level in levels if found[f"bound[{level.kind}]"].derivative > 0}
    for each in found.entries:
        parameter = parameters[each.parameter]
        if parameter.whole:
            for got, other in ((each.step_up, 1), (each.step_down, -1)):
                change = other * (resolved(parameter, each.value + other) - found.objective)
                assert got == pytest.approx(change, abs=1e-6)
            continue
        assert_matches(each.right, one_sided(parameter, 1, found.objective), parameter, found.objective)
        assert_matches(each.left, one_sided(parameter, -1, found.objective), parameter, found.objective)


@pytest.mark.parametrize(
    "level",
    [fo.MeanTTFT(at_most=3.0, of="served"), fo.MeanWait(at_most=3.0, of="served"), fo.MeanTPOT(at_most=0.0228)],
)
def test_a_binding_promise_is_worth_what_solving_again_says(level):
    model = fo.FluidModel(
        [fo.WorkloadClass("a", arrival_rate=0.6, prompt_tokens=500, output_tokens=600, abandonment_rate=0.1),
         fo.WorkloadClass("b", arrival_rate=0.6, prompt_tokens=2500, output_tokens=700, abandonment_rate=0.2)],
        reference_model().gpu_types[0],
        prices=fo.TokenPrices(prompt=0.1, output=0.2),
        service_levels=(level,),
    )  # fmt: skip
    found, parameters = sensitivity(model), parameters_of(model)
    assert found[f"bound[{level.kind}]"].derivative > 0
    for name in (f"bound[{level.kind}]", "prompt_tokens[b]", "alpha", "solo", "abandonment_rate[b]"):
        assert_matches(
            found[name].derivative, one_sided(parameters[name], 1, found.objective), parameters[name], found.objective
        )


def test_rows_of_ones_own_are_differentiated_too(reference):
    s = reference.symbols
    reference.subject_to(s.sum(s.P[s.i] * s.q_p[s.i], over=s.i) <= 50 * s.sum(s.lambda_[s.i], over=s.i), name="held")
    found, parameters = sensitivity(reference), parameters_of(reference)
    for name in ("prompt_tokens[decode-heavy]", "arrival_rate[decode-heavy]", "abandonment_rate[decode-heavy]"):
        parameter = parameters[name]
        assert_matches(found[name].derivative, one_sided(parameter, 1, found.objective), parameter, found.objective)
        assert abs(found[name].derivative) > 0


@settings(max_examples=8)
@given(pair_models(charging=st.just("bundled"), patient=False), st.data())
def test_at_a_kink_both_sides_are_those_of_the_curve_and_of_differences(model, data):
    """A model is put exactly on a kink of a curve: its optimum is degenerate there, and there are two derivatives."""
    names = [name for name, each in parameters_of(model).items() if each.value > 0 and not each.whole]
    name = data.draw(st.sampled_from(names))
    parameter = parameters_of(model)[name]
    curve = sensitivity_curve(model, name, lower=0.5 * parameter.value, upper=2 * parameter.value)
    sharp = [each for each in curve.kinks if abs(each.right - each.left) > 1e-3 * (abs(each.left) + abs(each.right))]
    for kink in sharp[:1]:
        there = build_at(model, parameter, kink.at)
        each = sensitivity(there, name)[name]
        scale = kink.at if parameter.factor else 1.0
        assert (each.left, each.right) == pytest.approx((kink.left * scale, kink.right * scale), rel=1e-5, abs=1e-7)
        assert each.kink
        assert math.isnan(each.derivative)
        assert "kink" in each.note


def build_at(model, parameter, value):
    scenario = parameter.moved(model.scenario, value)
    return build(scenario.classes, scenario.gpu, prices=scenario.prices, charging=scenario.charging)


def test_a_kink_is_proven_by_the_range_of_its_price():
    """The range of a class's price ends where the curve bends; there the price holds to one side only."""
    model, name = reference_model(), "arrival_rate[decode-heavy]"
    (kink,) = sensitivity_curve(model, name, lower=0.0, upper=2.0).kinks
    plan = model.solve()
    assert kink.at == pytest.approx(plan.admitted[0])  # what the plan admits of the class that it serves in part
    assert sensitivity(model).price_ranges(["prefill_balance[decode-heavy]"])["lower"].iloc[0] == pytest.approx(kink.at)
    there = sensitivity(build_at(model, parameters_of(model)[name], kink.at))
    assert there[name].left > there[name].right == 0
    assert there.price_ranges(["prefill_balance[decode-heavy]"])["note"].iloc[0]
    assert name in there.statement


def test_the_bend_of_a_physical_curve_is_a_kink():
    """tau = max(solo, alpha + beta C): where both are equal, a lower alpha brings nothing."""
    model = reference_model()
    gpu = model.gpu_types[0]
    curve = replace(gpu.curve, solo=gpu.curve.alpha + gpu.curve.beta * gpu.chunk_size)
    tied = sensitivity(fo.FluidModel(model.workload, replace(gpu, curve=curve), prices=model.scenario.prices))
    for name in ("alpha", "beta"):
        assert tied[name].left == 0.0
        assert tied[name].right < 0
        assert tied[name].kink


def test_ends_of_what_a_parameter_can_be():
    base = reference_model()
    gpu = base.gpu_types[0]
    # A class that never gives up, exactly as often as it can be served: x = kappa B/(g + e), or 1.
    kappa, D, P = gpu.kappa, 900.0, 400.0
    x = min(1.0, kappa * 16 / (256 * D / P + kappa * 16 - 15))
    rate = x * gpu.modes()[0].prefill_speed / P * (1 - 1e-10)
    patient = fo.WorkloadClass("patient", arrival_rate=rate, prompt_tokens=P, output_tokens=D)
    none = fo.WorkloadClass("none", arrival_rate=0.0, prompt_tokens=P, output_tokens=D, abandonment_rate=1.0)
    full = sensitivity(fo.FluidModel([patient, none], gpu, prices=base.scenario.prices))
    most = full["arrival_rate[patient]"]
    assert math.isnan(most.right)
    assert most.derivative == most.left == pytest.approx(0.1 * P + 0.2 * D)
    assert "no plan to the right" in most.note
    assert math.isnan(full["abandonment_rate[patient]"].derivative)
    assert "another model" in full["abandonment_rate[patient]"].note
    assert math.isnan(full["arrival_rate[none]"].left)
    assert "least value" in full["arrival_rate[none]"].note
    steepest = replace(gpu, curve=fo.IterationTime(alpha=0.0, beta=1e-4, solo=0.022))
    assert math.isnan(sensitivity(fo.FluidModel(base.workload, steepest, prices=base.scenario.prices))["alpha"].left)
    alone = replace(gpu, batch_size=1)
    single = sensitivity(fo.FluidModel(base.workload, alone, prices=base.scenario.prices), ["batch_size"])["batch_size"]
    assert math.isnan(single.derivative)
    assert math.isnan(single.step_down)
    assert single.step_up > 0


def test_large_models_have_one_derivative_per_parameter_and_say_so(reference):
    both, one = sensitivity(reference), sensitivity(reference, sides=False)
    for each in one.entries:
        assert each.derivative == pytest.approx(both[each.parameter].derivative, abs=1e-9)
        assert math.isnan(each.left)
        assert "sides not looked at" in each.note
    many = [replace(reference.workload[at % 2], name=f"class {at}", arrival_rate=0.02) for at in range(40)]
    large = sensitivity(fo.FluidModel(many, reference.gpu_types, prices=reference.scenario.prices))
    assert "arrival_rate" in large.to_frame().index
    assert not large.to_frame().index.str.startswith("arrival_rate[").any()
    price = sensitivity(large.model, "arrival_rate[class 1]")["arrival_rate[class 1]"]
    assert price.derivative == pytest.approx(large.plan.shadow_prices["prefill_balance[class 1]"], abs=1e-6)


def test_swings_are_plans_and_the_table_comes_back_from_json(reference):
    found = sensitivity(reference)
    table, parameters = found.swings(0.2), parameters_of(reference)
    for name in ("alpha", "batch_size", "arrival_rate", "output_tokens[prefill-heavy]"):
        for end in ("low", "high"):
            assert table.loc[name, f"revenue_at_{end}"] == pytest.approx(
                resolved(parameters[name], table.loc[name, end])
            )
    assert list(table.loc["batch_size", ["low", "high"]]) == [13, 19]
    width = (table[["revenue_at_low", "revenue_at_high"]] - found.objective).abs().max(axis=1)
    assert width.is_monotonic_decreasing
    again = Sensitivity.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_frame().equals(found.to_frame())
    assert "batch_size" in str(found)
    assert "batch_size" in found._repr_html_()


# ---- curves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("charging", ["bundled", "separate"])
@pytest.mark.parametrize(
    ("name", "symbol", "lower", "upper", "shape"),
    [
        ("arrival_rate[decode-heavy]", "lambda", 0.0, 3.0, "concave, piecewise linear"),
        ("arrival_rate", "lambda", 0.05, 5.0, "concave, piecewise linear"),
        ("prompt_price", "c_p", 0.0, 1.0, "convex, piecewise linear"),
    ],
)
def test_a_linear_curve_is_a_thousand_solutions(name, symbol, lower, upper, shape, charging):
    model = reference_model(charging)
    curve = sensitivity_curve(model, name, lower=lower, upper=upper)
    places = np.linspace(lower, upper, 1000)
    parameter = parameters_of(model)[name]
    changes = {symbol: np.array([parameter.numbers(float(at))[symbol] for at in places])}
    solved = fo.Solver(model).solve_many(changes).objective
    np.testing.assert_allclose(curve.revenue_rate(places), solved, rtol=1e-10)
    slopes = curve.to_frame()["derivative_at_lower"].to_numpy()
    assert curve.shape == shape
    assert np.all(np.diff(slopes) < 0 if shape.startswith("concave") else np.diff(slopes) > 0)
    assert all(piece.linear for piece in curve.pieces)
    assert curve.solves <= 4 * len(curve.pieces)


@pytest.mark.parametrize(("name", "lower", "upper"), [("beta", 1e-5, 1e-3), ("chunk_size", 1, 1000)])
def test_a_smooth_curve_is_a_thousand_solutions_and_its_kinks_are_found(name, lower, upper):
    model = reference_model()
    curve = sensitivity_curve(model, name, lower=lower, upper=upper)
    places = np.linspace(lower, upper, 1000)
    parameter, solver = parameters_of(model)[name], fo.Solver(model)
    solved = np.array([solver.solve(parameter.numbers(float(at))).objective for at in places])
    np.testing.assert_allclose(curve.revenue_rate(places), solved, rtol=1e-8)
    assert curve.shape == "piecewise smooth"
    assert all(before.upper == after.lower for before, after in pairwise(curve.pieces))
    jumps = np.array([abs(kink.right - kink.left) for kink in curve.kinks])
    for kink in curve.kinks:
        step = 1e-6 * kink.at
        value, right, left = (resolved_relaxed(solver, parameter, kink.at + by) for by in (0.0, step, -step))
        assert kink.value == pytest.approx(value, rel=1e-9)
        assert (right - value) / step == pytest.approx(kink.right, abs=1e-3 * jumps.max())
        assert (value - left) / step == pytest.approx(kink.left, abs=1e-3 * jumps.max())
    # Everyone is served while 700 tau + (16 tau/solo - 15) 1650 tau/C <= 16 tau/solo.
    if name == "chunk_size":  # here tau = solo
        full = 1650 * 0.022 / (16 - 15.4)
    else:
        tau = ((16 / 0.022 - 700) * 256 / 1650 + 15) * 0.022 / 16
        full = (tau - 0.0174) / 256
    assert min(abs(kink.at - full) for kink in curve.kinks) < 1e-9 * full


def resolved_relaxed(solver, parameter, value):
    return solver.solve(parameter.numbers(value)).objective


@settings(max_examples=12)
@given(st.one_of(pair_models(), mode_models()), st.data())
def test_the_curve_of_any_parameter_is_what_solving_again_says(model, data):
    parameters = parameters_of(model)
    parameter = parameters[data.draw(st.sampled_from(sorted(parameters)))]
    lower, upper = (parameter.value * data.draw(st.floats(*ends)) for ends in ((0.3, 0.95), (1.05, 3.0)))
    if parameter.whole:
        lower, upper = max(1.0, math.floor(lower)), math.ceil(upper) + 1.0
    if not lower < upper:
        return
    places = np.linspace(lower, upper, 20)
    if parameter.whole:
        places = np.unique(np.round(places))
    patient = any(each.abandonment_rate == 0 for each in model.workload)
    refused: tuple[type[Exception], ...] = (fo.InfeasibleModel,) if patient else ()
    if parameter.whole or parameter.field == "abandonment_rate":  # more slots than B, or patience of 0
        refused = (*refused, fo.InvalidInput)
    try:
        curve = sensitivity_curve(model, parameter.name, lower=lower, upper=upper)
        solved = np.array([resolved(parameter, float(at)) for at in places])
    except refused:
        return
    np.testing.assert_allclose(curve.revenue_rate(places), solved, rtol=1e-8, atol=1e-8 * np.abs(solved).max() + 1e-12)


def test_bounds_and_patience_have_curves_of_the_shape_that_theory_says():
    base = reference_model()
    levels = (fo.MeanWait(at_most=5.0), fo.SlotTPOT(at_most=0.0243))
    model = fo.FluidModel(base.workload, base.gpu_types, prices=base.scenario.prices, service_levels=levels)
    curve = sensitivity_curve(model, "bound[mean_wait]", lower=4.0, upper=9.0)
    assert curve.shape == "concave, piecewise linear"
    parameter = parameters_of(model)["bound[mean_wait]"]
    for at in np.linspace(4.0, 9.0, 7):
        assert curve.revenue_rate(at) == pytest.approx(resolved(parameter, float(at)), rel=1e-10)
    ratio = sensitivity_curve(model, "bound[slot_tpot]", lower=0.0242, upper=0.026)
    assert ratio.shape == "piecewise smooth"  # it multiplies variables
    assert sensitivity_curve(base, "abandonment_rate", lower=0.01, upper=10.0).derivative(1.0) == pytest.approx(
        0, abs=1e-9
    )


def test_a_curve_comes_back_from_json_and_answers_only_where_it_was_made():
    curve = sensitivity_curve(reference_model(), "solo", lower=0.015, upper=0.03)
    again = SensitivityCurve.from_dict(json.loads(json.dumps(curve.to_dict())))
    assert again == curve
    places = np.linspace(0.015, 0.03, 50)
    step = 1e-7
    inner = places[(places > 0.0151) & (np.abs(places[:, None] - [k.at for k in curve.kinks]).min(axis=1) > 2 * step)][
        :-1
    ]
    slopes = (curve.revenue_rate(inner + step) - curve.revenue_rate(inner - step)) / (2 * step)
    np.testing.assert_allclose(curve.derivative(inner), slopes, rtol=1e-4, atol=1e-3)
    with pytest.raises(fo.InvalidInput, match=r"values of solo must be numbers from 0\.015 to 0\.03"):
        curve.revenue_rate(0.04)
    assert "piecewise smooth" in str(curve)
    assert "16 places" in curve.caption


# ---- global -------------------------------------------------------------------------------------------------------

RANGES = {"arrival_rate[decode-heavy]": (0.1, 0.5), "alpha": (0.01, 0.03), "batch_size": (8, 24), "solo": (0.02, 0.03)}
WEIGHTS = np.array([5.0, 100.0, 0.25])


def weighted(model):
    """Linear in three parameters and blind to the fourth, so that all indices are known."""
    gpu = model.gpu_types[0]
    return float(WEIGHTS @ [model.workload.arrival_rate[0], gpu.curve.alpha, gpu.batch_size])


def spread():
    """By how much each parameter moves `weighted` over its range, and its variance (of B: 15 whole numbers and two
    halves at the ends, which rounding leaves half as likely)."""
    width = WEIGHTS * [high - low for low, high in list(RANGES.values())[:3]]
    variance = width**2 / 12
    values, weights = np.arange(8, 25), np.array([0.5, *[1.0] * 15, 0.5]) / 16
    variance[2] = WEIGHTS[2] ** 2 * weights @ (values - 16) ** 2
    return width, variance


def test_sobol_indices_of_a_known_function():
    found = global_sensitivity(reference_model(), RANGES, samples=256, response=weighted)
    frame = found.to_frame().loc[list(RANGES)]
    shares = np.append(spread()[1], 0.0) / spread()[1].sum()
    for column in ("first_order", "total"):
        assert np.all(np.abs(frame[column] - shares) <= 2 * frame[f"{column}_half_width"] + 1e-9)
        assert frame[f"{column}_half_width"].max() < 0.2
    assert frame["total"].to_numpy() == pytest.approx(shares, abs=0.05)
    assert found.standard_deviation == pytest.approx(math.sqrt(spread()[1].sum()), rel=0.05)
    assert found.evaluations == 256 * 6
    assert "solo" in found.statement.partition("Next to nothing")[2]


def test_morris_effects_of_a_known_function():
    found = global_sensitivity(reference_model(), RANGES, method="morris", samples=20, response=weighted)
    frame = found.to_frame().loc[list(RANGES)]
    assert frame["mean_effect"].to_numpy()[[0, 1, 3]] == pytest.approx([*spread()[0][:2], 0.0], abs=1e-9)
    # Of a whole number, rounding moves single effects by up to a half at each end.
    assert frame["mean_effect"].to_numpy()[2] == pytest.approx(spread()[0][2], rel=0.1)
    assert frame["effect_deviation"].to_numpy()[[0, 1, 3]] == pytest.approx(0.0, abs=1e-9)
    assert found.evaluations == 100


def optimum(model):
    return model.solve().objective


def test_the_default_response_is_the_optimum_and_the_executor_does_not_matter():
    """The warm re-solver against plans made one by one; threads against none; seed 0 is a seed."""
    model = reference_model()
    warm = global_sensitivity(model, RANGES, samples=32)
    slow = global_sensitivity(model, RANGES, samples=32, response=optimum)
    assert (warm.mean, warm.standard_deviation) == pytest.approx((slow.mean, slow.standard_deviation), rel=1e-9)
    np.testing.assert_allclose(warm.to_frame()["total"], slow.to_frame()["total"], rtol=1e-7, atol=1e-12)
    with ThreadPoolExecutor(2) as pool:
        assert global_sensitivity(model, RANGES, samples=32, executor=pool) == warm
    assert global_sensitivity(model, RANGES, samples=32, seed=0) == warm
    assert global_sensitivity(model, RANGES, samples=32, seed=1).mean != warm.mean
    assert GlobalSensitivity.from_dict(json.loads(json.dumps(warm.to_dict()))) == warm
    rates = {"arrival_rate": (0.5, 2.0), "output_price": (0.1, 0.3)}
    quick = global_sensitivity(model, rates, samples=32)
    assert quick.mean == pytest.approx(global_sensitivity(model, rates, samples=32, response=optimum).mean, rel=1e-9)
    nothing = {"abandonment_rate[decode-heavy]": (0.1, 1), "arrival_rate[decode-heavy]": (0.48, 0.6)}
    idle = global_sensitivity(model, nothing, samples=4)
    assert idle.to_frame()["total"].tolist() == [0.0, 0.0]


# ---- figures and terminal -----------------------------------------------------------------------------------------


def test_figures_name_parameters_with_their_units(reference, tmp_path):
    found = sensitivity(reference, ["alpha", "batch_size", "arrival_rate", "abandonment_rate"])
    tornado, spider = found.tornado(0.2), found.spider(0.3)
    labels = [each.get_text() for each in tornado.axes[0].get_yticklabels()]
    assert labels == ["arrival_rate, times present", "batch_size, requests", "alpha, s"]
    assert "1 more change nothing" in tornado.get_suptitle()
    bars = [patch for patch in tornado.axes[0].patches if patch.get_width()]
    ends = {round(patch.get_x() + patch.get_width(), 6) for patch in bars}
    table = found.swings(0.2).iloc[:3][["revenue_at_low", "revenue_at_high"]].to_numpy().ravel()
    assert ends == {round(value, 6) for value in table}
    names = " ".join(each.get_text() for each in spider.axes[0].texts)
    assert "alpha (0.0174 s)" in names
    assert "abandonment_rate" not in names
    curve = sensitivity_curve(reference, "chunk_size", lower=16, upper=512).plot()
    assert curve.axes[0].get_xlabel() == "chunk_size, tokens"
    study = {"alpha": (0.01, 0.03), "solo": (0.02, 0.03)}
    for method in ("sobol", "morris"):
        drawn = global_sensitivity(reference, study, method=method, samples=4).plot()
        assert "0.02 to 0.03 s" in " ".join(each.get_text() for each in drawn.axes[0].get_yticklabels())
        drawn.savefig(tmp_path / f"{method}.png")
        assert (tmp_path / f"{method}.png").stat().st_size > 10_000


def test_the_command_prints_tables_json_and_figures(tmp_path):
    app = typer.Typer()
    app.command()(command)
    path = tmp_path / "scenario.json"
    path.write_text(json.dumps(reference_model().to_dict()))

    def run(*words):
        return CliRunner().invoke(app, [str(path), *words], env={"COLUMNS": "80"})

    table = run("--figure", str(tmp_path / "tornado.png"))
    assert table.exit_code == 0, table.exception
    for part in ("prompt_price", "batch_size", "one more brings", "R* is 297.7", "times present"):
        assert part in table.stdout
    assert max(map(len, table.stdout.splitlines())) <= 80
    assert (tmp_path / "tornado.png").stat().st_size > 10_000
    data = json.loads(run("--parameter", "alpha", "--json").stdout)
    assert data["entries"][0]["derivative"] == pytest.approx(
        sensitivity(reference_model(), "alpha")["alpha"].derivative
    )
    curve = run("--parameter", "chunk_size", "--lower", "16", "--upper", "512")
    assert "82.12" in curve.stdout
    kinks = json.loads(run("--parameter", "chunk_size", "--lower", "16", "--upper", "512", "--json").stdout)["kinks"]
    assert [round(each["at"], 2) for each in kinks] == [33.3, 36.18, 60.5, 82.12]
    for words in (["--lower", "1"], ["--parameter", "alpha", "--upper", "1"], ["--figure", "no.gif"]):
        assert isinstance(run(*words).exception, fo.InvalidInput)


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_what_has_no_sensitivity_is_refused(reference):
    with pytest.raises(fo.InvalidInput, match="sensitivity: model must be a FluidModel"):
        sensitivity("model")
    with pytest.raises(fo.InvalidInput, match="there is no parameter 'gamma'; there are arrival_rate"):
        sensitivity(reference, ["gamma"])
    with pytest.raises(fo.InvalidInput, match="sides must be True, False or None"):
        sensitivity(reference, sides="both")
    soft = fo.FluidModel(
        reference.workload,
        reference.gpu_types,
        prices=reference.scenario.prices,
        service_levels=[fo.SlotTPOT(at_most=0.023, penalty=100.0)],
    )
    for run in (sensitivity, lambda model: sensitivity_curve(model, "alpha", lower=0.01, upper=0.02)):
        with pytest.raises(fo.InvalidInput, match=r"concave objective or a convex penalty.*use a hard bound"):
            run(soft)
    found = sensitivity(reference, "alpha")
    with pytest.raises(fo.InvalidInput, match="has no parameter 'beta'; it has alpha"):
        found["beta"]
    for change in (0, 1.5, "much"):
        with pytest.raises(fo.InvalidInput, match="change must be a share between 0 and 1"):
            found.swings(change)
        with pytest.raises(fo.InvalidInput, match="change must be a share between 0 and 1"):
            found.spider(change)
    for read in (Sensitivity.from_dict, SensitivityCurve.from_dict, GlobalSensitivity.from_dict):
        with pytest.raises(fo.InvalidInput, match=r"not (a )?saved"):
            read({"entries": 3})


def test_intervals_and_ranges_are_checked(reference):
    def curve(name, lower, upper, model=reference):
        return sensitivity_curve(model, name, lower=lower, upper=upper)

    with pytest.raises(fo.InvalidInput, match="lower must be below upper; got 2 and 1"):
        curve("arrival_rate", 2, 1)
    with pytest.raises(fo.InvalidInput, match="chunk_size must be a finite number of at least 1; got 0"):
        curve("chunk_size", 0, 10)
    with pytest.raises(fo.InvalidInput, match="solo must be a finite number above 0; got 0"):
        curve("solo", 0, 10)
    with pytest.raises(fo.InvalidInput, match=r"alpha must be a finite number of at least 0; got nan"):
        curve("alpha", math.nan, 1.0)
    with pytest.raises(fo.InvalidInput, match="abandonment rates must stay above 0"):
        curve("abandonment_rate[decode-heavy]", 0, 1)
    patient = build(reference.workload.with_abandonment(0.0).scaled(0.1), reference.gpu_types)
    with pytest.raises(fo.InfeasibleModel, match="there is no plan at arrival_rate = 10"):
        curve("arrival_rate", 1, 10, patient)

    def study(ranges=None, **arguments):
        return global_sensitivity(reference, RANGES if ranges is None else ranges, **arguments)

    with pytest.raises(fo.InvalidInput, match="samples must be a power of 2 of at least 4; got 100"):
        study(samples=100)
    with pytest.raises(fo.InvalidInput, match="samples must be a whole number of at least 4"):
        study(method="morris", samples=1.5)
    with pytest.raises(fo.InvalidInput, match="method must be 'sobol' or 'morris'"):
        study(method="fast")
    with pytest.raises(fo.InvalidInput, match="response must be a function"):
        study(response="R*")
    with pytest.raises(fo.InvalidInput, match="response must return a number; got 'much'"):
        study(samples=4, response=lambda model: "much")  # noqa: ARG005
    with pytest.raises(fo.InvalidInput, match="at least two parameters"):
        study({"alpha": (0.01, 0.02)})
    with pytest.raises(fo.InvalidInput, match="low below high"):
        study({"alpha": (0.02, 0.01), "solo": (0.02, 0.03)})
    with pytest.raises(fo.InvalidInput, match=r"range of alpha must be \(low, high\); got 0\.01"):
        study({"alpha": 0.01, "solo": (0.02, 0.03)})
    with pytest.raises(fo.InvalidInput, match="move the same number"):
        study({"arrival_rate": (0.5, 2), "arrival_rate[decode-heavy]": (0.1, 0.2)})
    with pytest.raises(fo.InvalidInput, match=r"no value at arrival_rate = .* narrow the ranges"):
        global_sensitivity(patient, {"arrival_rate": (1, 50), "alpha": (0.01, 0.02)}, samples=4)
    with pytest.raises(fo.InvalidInput, match="batch_size must be a whole number"):
        parameters_of(reference)["batch_size"].moved(reference.scenario, 2.5)
