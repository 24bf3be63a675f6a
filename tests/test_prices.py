"""Prices: the exact curve against a grid, convexity and scale, both charging schemes, demand that answers by force."""

import io
import warnings
from dataclasses import replace

import numpy as np
import pytest
from strategies import random_models

import fluidopt as fo
from fluidopt.reference import reference_model
from fluidopt.studies.prices.curves import PriceLine, price_curve, price_study
from fluidopt.studies.prices.search import elastic_demand, optimal_prices

CHARGING = ["bundled", "separate"]


def at_prices(model, prices, rates=None):
    """The model at other prices, and with other arrival rates, built from scratch."""
    classes = [
        replace(each, arrival_rate=float(rate))
        for each, rate in zip(model.workload, model.workload.arrival_rate if rates is None else rates, strict=True)
    ]
    scenario = model.scenario
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ContentionWarning)
        return fo.FluidModel(
            classes, scenario.gpu, prices=prices, charging=scenario.charging, service_levels=scenario.service_levels
        )


def one_class(rate, *, theta=0.1):
    """A class of short requests on the reference GPU."""
    return fo.FluidModel(
        [fo.WorkloadClass("one", arrival_rate=rate, prompt_tokens=100, output_tokens=50, abandonment_rate=theta)],
        reference_model().gpu_types[0],
        prices=fo.TokenPrices(prompt=0.1, output=0.2),
    )


# ---- fixed demand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("charging", CHARGING)
@pytest.mark.parametrize("below", [False, True])
def test_curve_is_exact(charging, below):
    """Against one solve per price, by another solver."""
    for model in random_models(31, 3, charging=charging, below_bound=below):
        curve = price_curve(model, budget=0.7)
        shares = np.linspace(0.0, 1.0, 41)
        for share in shares[::4]:
            plan = at_prices(model, curve.line.prices(share)).solve("highs")
            assert curve.revenue_at(share) == pytest.approx(plan.revenue_rate, rel=1e-7)
        prices = [curve.line.prices(share) for share in shares]
        many = fo.Solver(model).solve_many({"c_p": [p.prompt for p in prices], "c_d": [p.output for p in prices]})
        np.testing.assert_allclose([curve.revenue_at(share) for share in shares], many.objective, rtol=1e-8)


def test_curve_is_convex_with_one_plan_between_kinks():
    kinks = 0
    for model in random_models(32, 30):
        curve = price_curve(model)
        slopes = np.diff(curve.revenue) / np.diff(curve.kinks)
        assert (np.diff(slopes) > 0).all()
        assert (curve.kinks[0], curve.kinks[-1]) == (0.0, 1.0)
        kinks += len(curve.pieces) - 1
        for piece in curve.pieces:
            # the plan of the middle, paid at the ends, is worth what the line says
            tokens = [
                getattr(piece.plan.model.workload, name) @ piece.plan.throughput
                for name in ("prompt_tokens", "output_tokens")
            ]
            for share, earned in zip((piece.first, piece.last), piece.earned, strict=True):
                prices = curve.line.prices(share)
                assert prices.prompt * tokens[0] + prices.output * tokens[1] == pytest.approx(earned, rel=1e-7)
    assert kinks >= 5  # some of these have plans that change


def test_only_the_ratio_of_prices_matters(reference):
    model = random_models(33, 1)[0]
    small, large = price_curve(model, budget=0.3), price_curve(model, budget=30.0)
    np.testing.assert_allclose(large.kinks, small.kinks, atol=1e-9)
    np.testing.assert_allclose(large.revenue, 100 * small.revenue)
    for one, other in zip(small.pieces, large.pieces, strict=True):
        np.testing.assert_allclose(one.plan.throughput, other.plan.throughput, atol=1e-9)
    assert [optimal_prices(reference, budget=k).share for k in (0.1, 0.3, 30.0)] == [1.0, 1.0, 1.0]


def test_weights_make_the_budget_a_bill(reference):
    line = PriceLine(220.0, (1650.0, 700.0))
    prices = line.prices(0.25)
    assert 1650 * prices.prompt + 700 * prices.output == pytest.approx(220.0)
    assert line.share(prices) == pytest.approx(0.25)
    curve = price_curve(reference, weights=(1650.0, 700.0))
    share = curve.line.share(reference.scenario.prices)
    assert curve.line.budget == pytest.approx(1650 * 0.1 + 700 * 0.2)
    assert curve.revenue_at(share) == pytest.approx(reference.solve("highs").revenue_rate)


@pytest.mark.parametrize("charging", CHARGING)
def test_with_fixed_demand_an_end_is_best(charging):
    for model in random_models(34, 4, charging=charging):
        found = optimal_prices(model)
        line = found.line
        ends = [at_prices(model, line.prices(share)).solve("highs").revenue_rate for share in (0.0, 1.0)]
        assert found.revenue_rate == pytest.approx(max(ends), rel=1e-7)
        assert found.share == float(np.argmax(ends))
        for share in np.linspace(0.0, 1.0, 11):
            assert at_prices(model, line.prices(share)).solve().revenue_rate <= found.bound * (1 + 1e-9)
        assert "revenue is convex in the prices, so an end is best" in found.statement


def test_promises_stay_on_the_curve(reference):
    level = fo.SlotTPOT(at_most=0.0235)
    model = fo.FluidModel(
        reference.workload, reference.gpu_types[0], prices=reference.scenario.prices, service_levels=[level]
    )
    curve = price_curve(model)
    for share in (0.0, 0.02, 0.5, 1.0):
        plan = at_prices(model, curve.line.prices(share)).solve("highs")
        assert curve.revenue_at(share) == pytest.approx(plan.revenue_rate, rel=1e-6)
    assert (curve.revenue <= np.interp(curve.kinks, *price_points(reference)) * (1 + 1e-9)).all()


def price_points(model):
    curve = price_curve(model)
    return curve.kinks, curve.revenue


def test_a_penalty_does_not_move_with_prices(reference):
    """Revenue less the penalty is what is maximised: convex still, but not in proportion to the budget."""
    level = fo.AbandonmentShare(at_most=0.0, penalty=300.0)
    model = fo.FluidModel(
        reference.workload.scaled(1.2), reference.gpu_types[0], prices=reference.scenario.prices, service_levels=[level]
    )
    for budget in (0.1, 1.0):
        curve = price_curve(model, budget=budget)
        for share in (0.0, 0.3, 1.0):
            plan = at_prices(model, curve.line.prices(share)).solve("highs")
            assert curve.revenue_at(share) == pytest.approx(plan.objective, rel=1e-6)


# ---- both charging schemes ------------------------------------------------------------------------------------------


def test_reference_under_both_schemes(reference):
    study = price_study(reference)
    frame = study.charging()
    assert frame.loc["bundled", "revenue_rate"] == pytest.approx(297.71619, abs=5e-6)
    assert frame.loc["separate", "revenue_rate"] == pytest.approx(298.59798, abs=5e-6)
    assert frame.loc["bundled", "decode_queue"] == 0 < frame.loc["separate", "decode_queue"]
    plan = at_prices(reference_model("separate"), reference.scenario.prices).solve()
    assert frame.loc["separate", "decode_queue"] == pytest.approx(plan.decode_queue.sum())
    # abandonment empties the decode queue, at the same rate for both classes
    assert frame.loc["separate", "wasted"] == pytest.approx(0.1 * frame.loc["separate", "decode_queue"])


def test_schemes_part_where_a_prefill_alone_pays(reference):
    """c_p C > c_d e with e = kappa B - (B-1): below, prefilling what is not decoded is worth nothing."""
    study = price_study(reference)
    extra = reference.gpu_types[0].kappa * 16 - 15
    assert study.parts_from == pytest.approx(extra / (256 + extra), rel=1e-6)
    below, above = study.charging(0.9 * study.parts_from), study.charging(1.5 * study.parts_from)
    assert (below["decode_queue"] == 0).all()
    assert below.loc["separate", "revenue_rate"] == pytest.approx(below.loc["bundled", "revenue_rate"])
    assert above.loc["separate", "decode_queue"] > 0
    assert above.loc["separate", "revenue_rate"] > above.loc["bundled", "revenue_rate"]
    idle = fo.FluidModel(reference.workload.scaled(0.2), reference.gpu_types[0], prices=reference.scenario.prices)
    assert price_study(idle).parts_from == 1.0  # everyone is served: nothing to prefill beyond that


def test_separate_charging_never_earns_less():
    for model in random_models(35, 6):
        study = price_study(model)
        for share in np.linspace(0.0, 1.0, 9):
            bundled, separate = study.bundled.revenue_at(share), study.separate.revenue_at(share)
            assert separate >= bundled * (1 - 1e-9)
            assert study.charging(share).loc["bundled", "decode_queue"] == 0  # Proposition 3.2


# ---- demand that answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("charging", CHARGING)
@pytest.mark.parametrize("elasticity", [0.5, 1.2, (0.4, 2.0)])
def test_search_against_brute_force(charging, elasticity):
    model = reference_model(charging)
    demand = elastic_demand(model, np.array(elasticity))
    found = optimal_prices(model, demand=demand)
    assert 0 <= found.gap <= 1e-3
    line, shares = found.line, np.linspace(0.005, 0.995, 400)
    prices = [line.prices(share) for share in shares]
    grid = fo.Solver(model).solve_many(
        {
            "c_p": [each.prompt for each in prices],
            "c_d": [each.output for each in prices],
            "lambda": [demand(each.prompt, each.output) for each in prices],
        }
    )
    assert grid.objective.max() <= found.bound * (1 + 1e-9)
    assert found.revenue_rate >= grid.objective.max() * (1 - 1e-3)
    best = found.prices
    plan = at_prices(model, best, demand(best.prompt, best.output)).solve("highs")
    assert plan.revenue_rate == pytest.approx(found.revenue_rate, rel=1e-6)
    np.testing.assert_allclose(found.plan.model.workload.arrival_rate, demand(best.prompt, best.output))


def test_linear_demand_has_its_textbook_price():
    """lambda = A - s w with room for all: w (A - s w) is largest at w = A/(2 s), and earns A^2/(4 s)."""
    model = one_class(1.0)
    value = 100 * 0.1 + 50 * 0.2  # 20; along c_p + c_d = 0.3 a request costs 15 to 30
    found = optimal_prices(model, demand=lambda c_p, c_d: [max(0.0, 2.0 - (100 * c_p + 50 * c_d) / value)])
    assert found.revenue_rate == pytest.approx(2.0**2 / (4 / value), rel=1e-3)
    assert found.bound >= 2.0**2 / (4 / value)
    assert 100 * found.prices.prompt + 50 * found.prices.output == pytest.approx(value, rel=0.04)  # flat: sqrt(1e-3)


def test_where_capacity_binds_the_price_clears_the_market():
    """Demand of elasticity 0 < epsilon < 1 pays for higher prices, which an end of the line has; of epsilon > 1 for
    lower ones, until the fleet is full: the best price is the one at which the last arrival fits."""
    model = one_class(40.0)
    found = optimal_prices(model, demand=elastic_demand(model, 3.0), tolerance=1e-4)
    full = at_prices(model, found.prices, [1e4]).solve()
    arrivals = found.plan.model.workload.arrival_rate[0]
    assert arrivals == pytest.approx(full.throughput[0], rel=1e-2)
    assert 0 < found.share < 1
    dear = optimal_prices(model, demand=elastic_demand(model, 0.5))
    assert dear.share == 1.0  # the dearest request on this line: P > D


def test_a_free_class_is_bounded_by_the_fleet(reference):
    """At share 0 or 1 a request is never free here, but on the whole line both lowest prices are 0: lambda' = inf."""
    found = optimal_prices(reference, demand=elastic_demand(reference, 4.0), tolerance=0.05)
    assert np.isfinite(found.bound)
    assert found.gap <= 0.05


def test_the_best_ratio_keeps_with_scale_only_while_there_is_room():
    """With room for all and one elasticity, R = sum w_i lambda_i is k^(1-epsilon) times a function of the ratio; where
    capacity binds, a higher budget also frees the fleet, and the best ratio moves."""
    tight = reference_model()
    roomy = fo.FluidModel(tight.workload.scaled(0.05), tight.gpu_types[0], prices=tight.scenario.prices)
    bill = (1650.0, 700.0)  # mean tokens of a request: there the best ratio is inside
    shares = {}
    for name, model in (("roomy", roomy), ("tight", tight)):
        demand = elastic_demand(model, 0.6)
        small, large = (optimal_prices(model, budget=k, weights=bill, demand=demand) for k in (150.0, 300.0))
        shares[name] = (small.share, large.share)
        if model is roomy:
            assert large.revenue_rate == pytest.approx(small.revenue_rate * 2**0.4, rel=2e-3)
    assert shares["roomy"][0] == pytest.approx(shares["roomy"][1], abs=0.02)
    assert 0.3 < shares["roomy"][0] < 0.7
    assert abs(shares["tight"][0] - shares["tight"][1]) > 0.1


def test_a_tpot_promise_may_stay_with_demand(reference):
    level = fo.SlotTPOT(at_most=0.0235)
    model = fo.FluidModel(
        reference.workload, reference.gpu_types[0], prices=reference.scenario.prices, service_levels=[level]
    )
    demand = elastic_demand(model, 1.2)
    found = optimal_prices(model, demand=demand, tolerance=0.01)
    for share in np.linspace(0.05, 0.95, 10):
        prices = found.line.prices(share)
        plan = at_prices(model, prices, demand(prices.prompt, prices.output)).solve("highs")
        assert plan.revenue_rate <= found.bound * (1 + 1e-6)
    assert found.plan.slot_average_tpot <= level.at_most * (1 + 1e-6)


def test_a_search_that_is_cut_short_says_what_it_knows(reference):
    demand = elastic_demand(reference, 1.5)
    short = optimal_prices(reference, demand=demand, most_solves=20)
    full = optimal_prices(reference, demand=demand)
    assert short.gap > full.gap
    assert short.bound >= full.revenue_rate
    assert short.solves < 30 < full.solves


# ---- errors and figures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: price_curve(m, budget=0), "price_curve: budget must be a finite number above 0; got 0"),
        (lambda m: price_curve(m, weights=(1, 0)), r"weights must be two numbers above 0; got \(1, 0\)"),
        (lambda m: price_study(repr(m)), "model must be a FluidModel"),
        (lambda m: price_study(m).charging(2.0), "share must be between 0 and 1; got 2.0"),
        (lambda m: optimal_prices(m, demand=3), "demand must be a function of two prices; got 3"),
        (lambda m: optimal_prices(m, demand=lambda *_: [1.0]), r"demand must return 2 rates of at least 0; got array"),
        (lambda m: optimal_prices(m, demand=lambda p, _: [p, 1.0]), "demand rises with a price"),
        (lambda m: optimal_prices(m, demand=elastic_demand(m, 1), tolerance=0), "tolerance must be above 0"),
        (lambda m: optimal_prices(m, demand=elastic_demand(m, 1), most_solves=1), "most_solves must be a number"),
        (lambda m: elastic_demand(m, -1.0), "elasticity must be a number of at least 0, or 2 of them; got -1.0"),
        (lambda m: elastic_demand(m, [1, 2, 3]), "or 2 of them"),
        (lambda m: price_curve(m.maximize("sum(sum(x[i,k], i), k)")), "objective of its own"),
    ],
)
def test_errors_name_what_is_wrong(reference, call, match):
    with pytest.raises(fo.InvalidInput, match=match):
        call(reference)


def test_demand_needs_revenue_to_rise_with_arrivals(reference):
    patient = one_class(1.0, theta=0.0)
    with pytest.raises(fo.InvalidInput, match="class 'one' never abandons"):
        optimal_prices(patient, demand=elastic_demand(patient, 1.0))
    promised = fo.FluidModel(
        reference.workload.scaled(0.3),
        reference.gpu_types[0],
        prices=reference.scenario.prices,
        service_levels=[fo.CompletionFloor(share=0.5)],
    )
    with pytest.raises(fo.InvalidInput, match="only bounds on time per token and KV memory"):
        optimal_prices(promised, demand=elastic_demand(promised, 1.0))


def test_without_arrivals_there_is_nothing_to_earn(reference):
    idle = fo.FluidModel(reference.workload.scaled(0), reference.gpu_types[0], prices=reference.scenario.prices)
    assert price_study(idle).bundled.revenue.tolist() == [0.0, 0.0]
    for demand in (None, elastic_demand(idle, 1.0)):
        found = optimal_prices(idle, demand=demand)
        assert (found.revenue_rate, found.bound, found.gap) == (0.0, 0.0, 0.0)


def test_figures_and_reports(reference):
    study = price_study(reference)
    figure = study.plot()
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "Revenue, money/s per GPU",
        "Waiting for decode, requests per GPU",
        "Prefills never decoded, 1/s per GPU",
    ]
    assert "c_p/(c_p + c_d), sum 0.3" in figure.axes[0].get_xlabel()
    separate = figure.axes[0].lines[0]
    np.testing.assert_allclose(separate.get_ydata(), study.separate.revenue)
    found = optimal_prices(reference, demand=elastic_demand(reference, 1.5), tolerance=0.01)
    for each in (figure, found.plot(), optimal_prices(reference).plot()):
        picture = io.BytesIO()
        each.savefig(picture)
        assert picture.getvalue().startswith(b"\x89PNG")
    assert len(study.to_frame()) == len(study.bundled.pieces) + len(study.separate.pieces)
    assert "bundled 297.7 money/s per GPU, separate 298.6" in repr(study)
    assert "<table" in study._repr_html_()
    assert f"no other ratio of this budget earns over {found.gap:.2%} more" in repr(found)
