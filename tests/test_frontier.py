"""Frontiers: against solves of the model at single bounds, against re-solves along the range, and by hand."""

import itertools
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import strategies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import fluidopt as fo
from benchmarks.frontier import CvxpyLoop, timed
from benchmarks.resolve import random_model
from fluidopt.solvers.along import Bound, ProgramsAlong
from fluidopt.studies.frontier import Frontier, frontier
from fluidopt.studies.frontier_figure import plot_frontiers
from fluidopt.studies.sensitivity.parameters import in_symbols

MODEL = fo.reference_model()
LEVELS = [
    fo.PrefillFairness(at_most=0.0),
    fo.DecodeFairness(at_most=0.0),
    fo.SlotTPOT(at_most=0.0),
    fo.MeanWait(at_most=1.0),
    fo.MeanWait(at_most=1.0, of="served", classes=("decode-heavy",)),
    fo.MeanTTFT(at_most=1.0),
    fo.MeanTTFT(at_most=100.0, of="served"),
    fo.MeanTPOT(at_most=1.0),
    fo.AbandonmentShare(at_most=0.1),
    fo.CompletionFloor(share=0.5),
    fo.CompletionFloor(rate=0.1),
    fo.KVMemory(tokens=1e4),
]


def field_of(level):
    return next(each for each in ("at_most", "tokens", "share", "rate") if getattr(level, each, None) is not None)


def promising(model, *levels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ContentionWarning)
        return fo.FluidModel(
            model.workload,
            model.gpu_types,
            prices=model.scenario.prices,
            charging=model.scenario.charging,
            service_levels=levels,
        )


def earned(model, *levels, solver="auto"):
    """R* of the model with these promises, solved by itself; NaN where there is no plan."""
    try:
        return promising(model, *levels).solve(solver).revenue_rate
    except fo.InfeasibleModel:
        return np.nan


# ---- one promise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: f"{level.kind}-{field_of(level)}")
def test_points_equal_solves_and_prices_central_differences(level):
    found = frontier(MODEL, level, points=40)
    bounds, field = np.asarray(found.points[found.promises[0].name]), field_of(level)
    step = 1e-5 * (bounds[-1] - bounds[0])
    kinks = np.array([each.bound for each in found.kinks])
    for at in (7, 16, 25, 38):
        expected = earned(MODEL, replace(level, **{field: float(bounds[at])}), solver="highs")
        assert found.revenue_rate[at] == pytest.approx(expected, rel=1e-8, abs=1e-6)
        if kinks.size == 0 or np.abs(kinks - bounds[at]).min() > 2 * step:
            ends = [earned(MODEL, replace(level, **{field: float(bounds[at]) + side * step})) for side in (-1, 1)]
            slope = (ends[1] - ends[0]) / (2 * step)
            scale = np.nanmax(np.abs(found.points["shadow_price"]))
            assert float(found.points["shadow_price"][at]) == pytest.approx(slope, rel=1e-4, abs=1e-5 * scale)


def test_the_ends_of_free_and_of_feasible_on_the_reference_instance_by_hand():
    plan = MODEL.solve()
    prefills = frontier(MODEL, LEVELS[0])
    assert prefills.free_from == pytest.approx(np.ptp(np.nansum(plan.prefill, axis=1)), rel=1e-8)
    # with equal x the class of short prompts is served in full, if the decode slots carry that
    mixed, solo = MODEL.gpu_types[0].modes()
    work = MODEL.workload.output_tokens / MODEL.workload.prompt_tokens
    even = (MODEL.workload.arrival_rate * MODEL.workload.prompt_tokens / mixed.prefill_speed).min()
    kappa = mixed.iteration_time / solo.iteration_time
    assert even * (256 * work + 16 * kappa - 15).sum() <= 16 * kappa
    assert prefills.revenue_rate[0] == pytest.approx(even * mixed.prefill_speed * (0.1 + 0.2 * work).sum(), rel=1e-8)
    speed = frontier(MODEL, LEVELS[2])
    assert speed.free_from == pytest.approx(plan.slot_average_tpot, rel=1e-8)
    assert speed.promises[0].least_feasible == pytest.approx(solo.iteration_time, rel=1e-9)
    assert "No plan keeps slot_tpot below 0.022" in speed.statement
    assert "below" not in prefills.statement  # nobody asks for a negative difference


@pytest.mark.parametrize("at", [0, 3])
def test_straight_pieces_equal_a_thousand_re_solves(at):
    found = frontier(MODEL, LEVELS[at], points=1000)
    assert found.piecewise_linear
    name = found.promises[0].name
    solver = fo.Solver(promising(MODEL, LEVELS[at]))
    bounds = np.asarray(found.points[name])
    numbers = bounds if LEVELS[at].kind == "prefill_fairness" else np.tile(bounds[:, None], 2)
    # the tightest bound itself is left out: a hair below it there is no plan
    again = solver.solve_many({f"bound_{name}": numbers[1:]})
    np.testing.assert_allclose(found.revenue_rate[1:], again.objective, rtol=1e-9)
    knots = np.array([bounds[0], *found.breakpoints["bound"], bounds[-1]])
    bends = np.abs(np.diff(again.objective, 2)) > 1e-7
    middles = bounds[2:-1][bends]  # wherever the re-solves bend there is a kink within a step
    assert all(np.abs(knots - middle).min() <= bounds[1] - bounds[0] for middle in middles)
    assert bends.any()


def test_a_frontier_may_jump_and_says_so():
    found = frontier(MODEL, fo.MeanTPOT(at_most=1.0), bounds=(0.02, 0.025))
    first = found.breakpoints.iloc[0]
    solo = MODEL.gpu_types[0].modes()[1].iteration_time
    assert first["bound"] == pytest.approx(solo, rel=1e-8)  # below, no decode is fast enough
    assert first["jump"] == pytest.approx(earned(MODEL, fo.MeanTPOT(at_most=solo * (1 + 1e-9))), rel=1e-6)
    assert not found.piecewise_linear


def test_a_range_without_a_plan_is_shown_as_such_with_the_least_feasible_bound():
    found = frontier(MODEL, fo.SlotTPOT(at_most=1.0), bounds=(0.020, 0.0245), points=46)
    bounds = np.asarray(found.points["slot_tpot"])
    np.testing.assert_array_equal(np.isnan(found.revenue_rate), bounds < 0.022 - 1e-9)
    assert np.isnan(found.points["shadow_price"]).sum() == np.isnan(found.revenue_rate).sum()
    nothing = frontier(MODEL, fo.CompletionFloor(share=0.5), bounds=(0.97, 1.0))
    assert np.isnan(nothing.revenue_rate).all()
    least = nothing.promises[0].least_feasible
    assert np.isnan(earned(MODEL, fo.CompletionFloor(share=least + 1e-6)))
    assert earned(MODEL, fo.CompletionFloor(share=least - 1e-6)) > 0
    assert nothing.statement.startswith("No plan keeps these bounds. No plan keeps completion_floor above 0.9578")
    assert str(nothing)


@pytest.mark.parametrize(
    ("level", "bounds"),
    [(LEVELS[9], (0.97, 1.0)), (LEVELS[2], (0.001, 0.002)), ((LEVELS[2], LEVELS[0]), ((0.001, 0.002), (0.0, 0.1)))],
    ids=["right side", "coefficient", "pair"],
)
def test_a_range_with_no_plan_at_all_is_told_shown_and_saved(level, bounds):
    found = frontier(MODEL, level, bounds=bounds, points=3)
    assert np.isnan(found.revenue_rate).all()
    assert found.kinks == ()
    assert found.statement.startswith("No plan keeps these bounds. No plan keeps ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found.plot().axes
        assert found.statement in found._repr_html_()
    assert Frontier.from_dict(found.to_dict()).points.identical(found.points)


@pytest.mark.parametrize("at", [3, 5, 8, 9, 10])
def test_the_tightest_bound_is_that_of_a_program_that_minimises_it(at):
    """Of a right side, rows are linear in plan and bound together."""
    level, field = LEVELS[at], field_of(LEVELS[at])
    sides = [promising(MODEL, replace(level, **{field: bound})).program() for bound in (0.25, 0.75)]
    program, rows, bounds = sides[0], [], []
    for sign, ends in ((1.0, [each.row_upper for each in sides]), (-1.0, [each.row_lower for each in sides])):
        there = np.isfinite(ends[0])
        slope = (ends[1][there] - ends[0][there]) / 0.5
        rows.append(sign * np.column_stack([program.matrix.toarray()[there], -slope]))
        bounds.append(sign * (ends[0][there] - 0.25 * slope))
    found = frontier(MODEL, level, points=2).promises[0]
    cost = np.append(np.zeros(program.shape[1]), float(found.loosens))
    expected = linprog(cost, np.concatenate(rows), np.concatenate(bounds))
    assert found.least_feasible == pytest.approx(expected.x[-1], rel=1e-8)


def test_the_tightest_bound_where_rows_ask_nothing_of_classes_that_are_not_served():
    floor = fo.CompletionFloor(share=0.5, classes=("decode-heavy",))
    model = promising(MODEL, floor)
    found = frontier(model, fo.MeanTPOT(at_most=1.0), points=3).promises[0]
    for step in (-1e-6, 1e-6):
        there = earned(MODEL, floor, fo.MeanTPOT(at_most=found.least_feasible * (1 + step)), solver="highs")
        assert np.isnan(there) == (step < 0)


def test_a_level_that_never_binds_costs_nothing():
    found = frontier(MODEL, fo.KVTransfer(at_most=1.0))  # no GPU prefills only
    np.testing.assert_allclose(found.revenue_rate, MODEL.solve().revenue_rate)
    assert found.kinks == ()


def test_levels_by_name_other_promises_and_penalties_stay():
    wait = fo.MeanWait(at_most=2.0, penalty=5.0, classes=("decode-heavy",))
    model = promising(MODEL, fo.SlotTPOT(at_most=0.0235), wait)
    found = frontier(model, "slot_tpot", bounds=(0.0225, 0.0245), points=5)
    for bound, revenue in zip(np.asarray(found.points["slot_tpot"]), found.revenue_rate, strict=True):
        assert revenue == pytest.approx(
            earned(MODEL, fo.SlotTPOT(at_most=float(bound)), wait, solver="highs"), rel=1e-7
        )
    added = frontier(model, fo.SlotTPOT(at_most=1.0), bounds=(0.0225, 0.0245), points=5)
    assert added.promises[0].name == "slot_tpot_2"
    assert added.revenue_rate[-1] == pytest.approx(model.solve().revenue_rate, rel=1e-7)


@st.composite
def models(draw):
    classes = [draw(strategies.impatient(f"class {at}")) for at in range(draw(st.integers(2, 4)))]
    return strategies.build(
        classes,
        draw(strategies.gpus(min_batch=2)),
        prices=draw(strategies.prices()),
        charging=draw(strategies.CHARGING),
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models(), st.sampled_from([LEVELS[0], LEVELS[2], LEVELS[8]]))
def test_random_models_solves_concavity_and_prices_that_bound(model, level):
    found = frontier(model, level, points=7)
    bounds, revenue = np.asarray(found.points[level.kind]), found.revenue_rate
    size = max(float(np.nanmax(revenue)), 1e-9)
    for at in (2, 4):
        expected = earned(model, replace(level, at_most=float(bounds[at])), solver="highs")
        assert revenue[at] == pytest.approx(expected, rel=1e-6, abs=1e-6 * size)
    assert (np.diff(revenue) >= -1e-7 * size).all()  # looser promises earn no less
    if found.piecewise_linear:  # each price is a tangent from above
        prices = np.asarray(found.points["shadow_price"])
        tangents = revenue[:, None] + prices[:, None] * (bounds - bounds[:, None])
        assert (tangents >= revenue - 1e-6 * size).all()


def test_kinks_of_a_smooth_curve_are_where_central_differences_jump():
    model = random_model(10)
    found = frontier(model, LEVELS[2], points=60)
    assert not found.piecewise_linear
    assert len(found.kinks) >= 4
    step = 1e-6 * (found.kinks[-1].bound - found.kinks[0].bound)
    for kink in found.kinks:
        below, at, above = (
            earned(model, replace(LEVELS[2], at_most=kink.bound + side * step), solver="highs") for side in (-1, 0, 1)
        )
        assert (at - below) / step == pytest.approx(kink.price_below, rel=1e-3)
        assert (above - at) / step == pytest.approx(kink.price_above, rel=1e-3, abs=1e-3 * kink.price_below)
        assert kink.price_above < kink.price_below * (1 - 1e-3)
    # between kinks there is no other: the price changes no faster than the curve bends at the ends of each piece
    bounds, price = np.asarray(found.points["slot_tpot"]), np.asarray(found.points["shadow_price"])
    piece = np.searchsorted([kink.bound for kink in found.kinks], bounds)
    inside = np.diff(piece) == 0
    assert np.abs(np.diff(price)[inside]).max() < 0.05 * min(
        each.price_below - each.price_above for each in found.kinks
    )


def test_a_basis_reaches_to_where_another_one_takes_over():
    model = promising(MODEL, LEVELS[2])
    name = "bound_slot_tpot"
    bound = next(each for each in model.symbolic.parameters if each.name == name)
    programs = ProgramsAlong(*in_symbols(model), [Bound(name, bound)])
    start, end = np.array([0.0243]), np.array([0.0221])
    number = int(programs.solve(start[None]).basis[0])
    last, first = programs.reach(number, start, end, fine=1e-9)
    assert 0 < last < first < 1
    assert first - last <= 1e-9
    assert programs.with_basis(number, (start + last * (end - start))[None]) is not None
    assert programs.with_basis(number, (start + first * (end - start))[None]) is None
    kinks = [each.bound for each in frontier(MODEL, LEVELS[2], bounds=(0.0221, 0.0243)).kinks]
    assert np.abs(np.array(kinks) - (start + last * (end - start))).min() < 1e-8
    assert programs.reach(number, start, start - 1e-6, fine=1e-9) == (1.0, 1.0)


@pytest.mark.parametrize("level", [LEVELS[0], LEVELS[2]], ids=["right side", "coefficient"])
def test_ten_thousand_points_cost_a_small_part_of_a_cvxpy_loop(level):
    """Ratio in one run; measured 60 to 300, and asked for 30."""
    model = random_model(10)
    times = []
    for _ in range(3):
        seconds, found = timed(lambda: frontier(model, level, points=10_000))
        times.append(seconds)
    loop = CvxpyLoop(model, [], level)
    bounds = np.asarray(found.points[level.kind])[100::500].tolist()
    loop.at_bound(bounds[0])
    seconds, expected = timed(lambda: [loop.at_bound(at) for at in bounds])
    np.testing.assert_allclose(found.revenue_rate[100::500], expected, rtol=1e-5, atol=1e-5 * max(expected))
    assert 10_000 * seconds / len(bounds) > 30 * min(times)


# ---- two promises -------------------------------------------------------------------------------------------------


def test_a_pair_equals_solves_and_its_edges_are_the_single_frontiers():
    levels = (fo.SlotTPOT(at_most=1.0), fo.PrefillFairness(at_most=1.0))
    found = frontier(MODEL, levels, bounds=((0.0215, 0.0246), (0.0, 0.2)), points=13)
    tpot, spread = (np.asarray(found.points[each.name]) for each in found.promises)
    for at in itertools.product((1, 5, 9), (0, 6, 12)):
        promise = [
            replace(level, at_most=float(axis[k])) for level, axis, k in zip(levels, (tpot, spread), at, strict=True)
        ]
        assert found.revenue_rate[at] == pytest.approx(earned(MODEL, *promise), rel=1e-8, nan_ok=True)
    single = frontier(MODEL, levels[0], bounds=(0.0215, 0.0246), points=13)
    np.testing.assert_allclose(found.revenue_rate[:, -1], single.revenue_rate, rtol=1e-8)
    at, step = (8, 6), 1e-7
    for k, name in enumerate(("slot_tpot", "prefill_fairness")):
        ends = []
        for side in (-1, 1):
            places = [float(tpot[at[0]]), float(spread[at[1]])]
            places[k] += side * step
            ends.append(
                earned(MODEL, *(replace(each, at_most=place) for each, place in zip(levels, places, strict=True)))
            )
        price = float(found.points[f"shadow_price[{name}]"][at])
        assert price == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-4, abs=1e-2)
    assert found.kinks == ()
    assert len(found.to_frame()) == 13 * 13


def test_frontiers_go_to_json_and_back():
    for level in (LEVELS[2], (LEVELS[0], LEVELS[2])):
        found = frontier(MODEL, level, bounds=None if isinstance(level, tuple) else (0.02, 0.025), points=6)
        again = Frontier.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
        assert again.points.identical(found.points)
        assert (again.kinks, again.promises, again.model) == (found.kinks, found.promises, found.model)
        assert str(again) == str(found)
    with pytest.raises(fo.InvalidInput, match="not a saved frontier"):
        Frontier.from_dict({"model": {}})


# ---- figures and refusals -----------------------------------------------------------------------------------------


def test_figures_show_the_curves_and_hatch_what_has_no_plan():
    speed = frontier(MODEL, LEVELS[2], bounds=(0.0215, 0.0246), points=40)
    both = frontier(MODEL, (LEVELS[0], LEVELS[2]), points=5)
    figure = plot_frontiers([speed, both])
    shown = [axis for axis in figure.axes if axis.get_visible()]
    curve = shown[0].lines[0]
    np.testing.assert_allclose(np.nanmax(curve.get_ydata()), 297.716, rtol=1e-5)
    assert any(patch.get_hatch() for patch in shown[0].patches)
    assert {"slot TPOT at most, s/token"} <= {axis.get_xlabel() for axis in shown}
    assert len(speed.plot().axes) == 2
    assert "<table" in speed._repr_html_()
    with pytest.raises(fo.InvalidInput, match="one to four frontiers"):
        plot_frontiers([])


@pytest.mark.parametrize(
    ("level", "options", "message"),
    [
        ((LEVELS[0], LEVELS[2], LEVELS[3]), {}, "one service level or a pair; got 3"),
        ("slot_tpot", {}, "the model has no service level 'slot_tpot'; it has none"),
        (3, {}, "a service level or the name of one"),
        (fo.SlotTPOT(at_most=0.02, penalty=1.0), {}, "penalty"),
        (fo.MeanWait(at_most=1.0, penalty=1.0), {}, "mean_wait has a penalty, so it is no bound"),
        (LEVELS[0], {"points": 1}, "points must be a whole number of at least 2"),
        (LEVELS[0], {"bounds": (1.0,)}, r"bounds must be \(from, to\)"),
        (LEVELS[0], {"bounds": (0.2, 0.1)}, "from a smaller to a larger"),
        (LEVELS[0], {"bounds": (-0.2, 0.1)}, "of at least 0"),
        (LEVELS[9], {"bounds": (0.5, 2.0)}, "share must be at most 1"),
    ],
)
def test_what_makes_no_frontier_is_refused(level, options, message):
    with pytest.raises(fo.InvalidInput, match=message):
        frontier(MODEL, level, **options)


def test_models_that_are_not_linear_too_large_or_hopeless_are_refused():
    with pytest.raises(fo.InvalidInput, match="concave objective or a convex penalty"):
        frontier(promising(MODEL, fo.SlotTPOT(at_most=0.02, penalty=1.0)), LEVELS[0])
    many = [replace(MODEL.workload[0], name=f"class {at}") for at in range(700)]
    with pytest.raises(fo.InvalidInput, match="kept dense up to 4,000,000 entries"):
        frontier(fo.FluidModel(many, MODEL.gpu_types, prices=MODEL.scenario.prices), LEVELS[0])
    patient = fo.FluidModel(MODEL.workload.with_abandonment(0.0), MODEL.gpu_types, prices=MODEL.scenario.prices)
    with pytest.raises(fo.InfeasibleModel, match="whatever the bound of slot_tpot"):
        frontier(patient, LEVELS[2])
    with pytest.raises(fo.InvalidInput, match="the two service levels must be different"):
        frontier(promising(MODEL, LEVELS[0]), ("prefill_fairness", "prefill_fairness"))
