"""Re-solves from a kept basis, ranges of shadow prices, and the constructive decode-buffer elimination."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from strategies import pair_models

import fluidopt as fo
from benchmarks.resolve import highs_alone
from fluidopt.reference import reference_model
from fluidopt.service_levels import MeanWait, SlotTPOT
from fluidopt.solvers import certify, solve_program


@pytest.fixture
def random():
    return np.random.default_rng(11)


def rebuilt(model: fo.FluidModel, **columns: np.ndarray) -> fo.FluidModel:
    """The same model with other columns of its workload."""
    frame = model.workload.to_frame().assign(**columns).reset_index(names="name")
    return fo.FluidModel(
        fo.Workload.from_frame(frame),
        model.gpu_types,
        prices=model.scenario.prices,
        charging=model.scenario.charging,
        service_levels=model.scenario.service_levels,
    )


# ---- Solver -----------------------------------------------------------------------------------------------------


def test_changed_rates_start_warm_and_equal_a_fresh_solve(random):
    model = reference_model()
    solver = fo.Solver(model)
    assert solver.solve().start.startswith("cold: first solve")
    for _ in range(50):
        rates = model.workload.arrival_rate * random.uniform(0.2, 2.0, 2)
        found = solver.solve({"lambda": rates})
        assert found.start == "warm"
        fresh = rebuilt(model, arrival_rate=rates).solve()
        assert found.objective == pytest.approx(fresh.revenue_rate, rel=1e-9)
        assert found.certificate.holds(1e-9)


def test_arrivals_that_stop_leave_nothing_to_earn():
    """The optimum is then 0, against which all that rounding leaves of a warm start is large."""
    curve = fo.IterationTime(alpha=0.02, beta=1e-5, solo=0.02)

    def gpu(name, share, batch, slots):
        modes = (
            fo.Mode("decode 1", decode_slots=slots[0], iteration_time=0.09294180390325003),
            fo.Mode("prefill 0", chunk=53, iteration_time=0.06898165158315453),
            fo.Mode("prefill 1", chunk=1, decode_slots=10, iteration_time=0.01771207556031101),
            fo.Mode("decode 0", decode_slots=slots[1], iteration_time=0.023229950328583982),
            fo.Mode("idle"),
        )
        return fo.GPU(curve, batch_size=batch, chunk_size=256, name=name, share=share, operating_modes=modes)

    shapes = [
        (0.0, 3019.4945680241676, 2754.579202559029, 0.008049327531550706),
        (1.0, 54.598150033144236, 2791.0498777674006, 1.0),
        (1.0, 3302.5942618559407, 2492.2821815003495, 0.03025235410127297),
        (1.0, 25.919092620921482, 327.07373118822295, 1.0),
        (0.0, 54.598150033144236, 430.3755141502376, 0.03138675634312844),
    ]
    names = ("arrival_rate", "prompt_tokens", "output_tokens", "abandonment_rate")
    model = fo.FluidModel(
        [fo.WorkloadClass(f"class {at}", **dict(zip(names, shape, strict=True))) for at, shape in enumerate(shapes)],
        [gpu("small", 0.33241867115643786, 11, (1, 1)), gpu("large", 0.6675813288435621, 24, (21, 16))],
        prices=fo.TokenPrices(prompt=0.8876280794949614, output=0.0017555031790829536),
        charging="separate",
    )
    solver = fo.Solver(model)
    solver.solve()
    stopped = solver.solve({"lambda": 0.0})
    assert stopped.objective == pytest.approx(0.0, abs=1e-9)
    assert stopped.certificate.holds(1e-7)


def test_changes_add_up():
    solver = fo.Solver(reference_model())
    rates = np.array([0.4, 0.6])
    solver.solve({"lambda": rates})
    found = solver.solve({"c_d": 0.3})
    model = fo.FluidModel(
        rebuilt(reference_model(), arrival_rate=rates).workload,
        reference_model().gpu_types,
        prices=fo.TokenPrices(prompt=0.1, output=0.3),
    )
    assert found.objective == pytest.approx(model.solve().revenue_rate, rel=1e-9)
    assert solver.solve().objective == found.objective


def test_changed_token_counts_keep_the_basis():
    solver = fo.Solver(reference_model())
    solver.solve()
    found = solver.solve({"D": np.array([900.0, 450.0])})
    assert found.start == "warm"
    fresh = rebuilt(reference_model(), output_tokens=np.array([900.0, 450.0])).solve()
    assert found.objective == pytest.approx(fresh.revenue_rate, rel=1e-9)


def test_other_rows_and_columns_are_rebuilt_and_it_says_why():
    solver = fo.Solver(rebuilt(reference_model(), arrival_rate=np.array([0.1, 0.1])))
    solver.solve()
    found = solver.solve({"theta": np.array([0.0, 0.1])})
    assert found.start == "cold: theta changed which rows and columns exist"
    assert np.isnan(found.values["q_p"][0])


def test_bounds_of_service_levels_can_be_changed():
    model = rebuilt(reference_model(), arrival_rate=np.array([0.45, 0.45]))
    model = fo.FluidModel(
        model.workload, model.gpu_types, prices=model.scenario.prices, service_levels=[MeanWait(at_most=5.0)]
    )
    solver = fo.Solver(model)
    for bound in (2.0, 1.0, 0.5):
        found = solver.solve({"bound_mean_wait": bound})
        tight = replace(model.scenario, service_levels=(MeanWait(at_most=bound),))
        assert found.objective == pytest.approx(fo.FluidModel.from_scenario(tight).solve().objective, rel=1e-9)


def test_large_programs_start_warm_for_small_changes_and_stay_certified(random):
    classes = 3_000
    frame = {
        "name": [f"class {at}" for at in range(classes)],
        "arrival_rate": random.uniform(0.5, 1.5, classes) / classes,
        "prompt_tokens": random.uniform(200, 3000, classes),
        "output_tokens": random.uniform(200, 3000, classes),
        "abandonment_rate": random.uniform(0.05, 0.2, classes),
    }
    model = fo.FluidModel(
        fo.Workload.from_frame(frame), reference_model().gpu_types, prices=reference_model().scenario.prices
    )
    solver = fo.Solver(model)
    solver.solve()
    rates = model.workload.arrival_rate * random.uniform(0.99, 1.01, classes)
    near = solver.solve({"lambda": rates})
    assert near.start == "warm"
    far = solver.solve({"lambda": model.workload.arrival_rate[::-1] * random.uniform(0.0, 3.0, classes)})
    for found in (near, far):
        assert found.certificate.holds(1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu_p": 1.0}, "there is no parameter 'mu_p'; there are"),
        ({"lambda": [1.0, 2.0, 3.0]}, r"lambda must be a number or an array of shape \(2,\)"),
        ({"lambda": "many"}, "lambda must be a number or an array"),
        ({"lambda": [np.nan, 1.0]}, "lambda must be finite and at least 0"),
        ({"theta": -1.0}, "theta must be finite and at least 0"),
    ],
)
def test_bad_changes_are_named(changes, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.Solver(reference_model()).solve(changes)


def test_a_convex_penalty_is_refused():
    model = fo.FluidModel(
        reference_model().workload,
        reference_model().gpu_types,
        prices=reference_model().scenario.prices,
        service_levels=[SlotTPOT(at_most=0.0, penalty=1000.0)],
    )
    with pytest.raises(fo.InvalidInput, match="convex penalty"):
        fo.Solver(model)


def test_infeasible_changes_raise_and_the_solver_goes_on():
    solver = fo.Solver(rebuilt(reference_model(), arrival_rate=np.array([0.1, 0.1]), abandonment_rate=np.zeros(2)))
    first = solver.solve().objective
    with pytest.raises(fo.InfeasibleModel):
        solver.solve({"lambda": 5.0})
    assert solver.solve({"lambda": 0.1}).objective == pytest.approx(first, rel=1e-9)


def test_many_re_solves_equal_single_ones(random):
    model = reference_model()
    solver = fo.Solver(model)
    changes = {
        "lambda": model.workload.arrival_rate * random.uniform(0.1, 3.0, (200, 2)),
        "c_d": random.uniform(0.0, 1.0, 200),
    }
    many = solver.solve_many(changes)
    assert many.bases < 40  # of 200: the rest have the basis of one of these
    single = [fo.Solver(model).solve({name: value[at] for name, value in changes.items()}) for at in range(0, 200, 10)]
    np.testing.assert_allclose(many.objective[::10], [each.objective for each in single], rtol=1e-9)
    for at, each in zip(range(0, 200, 10), single, strict=True):
        program = replace(each.program)
        assert certify(program, many.solution_values[at], many.solution_duals[at]).holds(1e-9)
    assert solver.solve().objective == pytest.approx(model.solve().revenue_rate, rel=1e-12)
    assert many.values("q_p").shape == (200, 2)
    assert many.shadow_prices("decode_slots").shape == (200, 2)


def test_many_re_solves_with_other_coefficients():
    tokens = np.array([[900.0, 450.0], [1000.0, 400.0], [1100.0, 350.0]])
    many = fo.Solver(reference_model()).solve_many({"D": tokens})
    fresh = [rebuilt(reference_model(), output_tokens=each).solve().revenue_rate for each in tokens]
    np.testing.assert_allclose(many.objective, fresh, rtol=1e-9)


def test_entries_without_a_solution_are_missing():
    solver = fo.Solver(rebuilt(reference_model(), arrival_rate=np.array([0.1, 0.1]), abandonment_rate=np.zeros(2)))
    many = solver.solve_many({"lambda": np.array([[0.1, 0.1], [5.0, 5.0], [0.2, 0.2]])})
    assert list(np.isnan(many.objective)) == [False, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "every change needs the same first axis"),
        ({"c_d": 0.3}, "every change needs the same first axis"),
        ({"c_d": [0.1, 0.2], "c_p": [0.1]}, "every change needs the same first axis"),
        ({"lambda": np.ones((4, 3))}, r"lambda must be a number or an array of shape \(4, 2\)"),
    ],
)
def test_bad_batches_are_named(changes, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.Solver(reference_model()).solve_many(changes)


def test_a_re_solve_costs_little_more_than_highs_alone(random):
    """Ratio in one run, ten classes: certificate and bookkeeping against a bare warm re-solve of the same arrays."""
    rates = random.uniform(0.05, 0.15, 10)
    frame = {
        "name": [f"class {at}" for at in range(10)],
        "arrival_rate": rates,
        "prompt_tokens": random.uniform(200, 3000, 10),
        "output_tokens": random.uniform(200, 3000, 10),
        "abandonment_rate": np.full(10, 0.1),
    }
    model = fo.FluidModel(
        fo.Workload.from_frame(frame), reference_model().gpu_types, prices=reference_model().scenario.prices
    )
    solver = fo.Solver(model)
    solver.solve()
    changed = rates * random.uniform(0.8, 1.2, (300, 10))
    by_highs = highs_alone(model)

    def median_time(solve):
        times = []
        for each in changed:
            start = time.perf_counter()
            solve(each)
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    ratios = [median_time(lambda each: solver.solve({"lambda": each})) / median_time(by_highs) for _ in range(3)]
    assert min(ratios) < 2.0  # about 1.05 on an idle machine; the bound only catches a change of kind


# ---- ranges -----------------------------------------------------------------------------------------------------


def at_right_side(program, row, value):
    lower, upper = program.row_lower.copy(), program.row_upper.copy()
    lower[row] = value if np.isfinite(lower[row]) else lower[row]
    upper[row] = value if np.isfinite(upper[row]) else upper[row]
    try:
        return solve_program(replace(program, row_lower=lower, row_upper=upper)).certificate.objective
    except (fo.InfeasibleModel, fo.SolverFailure):
        return float("nan")


@settings(max_examples=12)
@given(pair_models(patient=False))
def test_the_optimum_is_linear_inside_a_range_and_bends_at_its_ends(model):
    plan = model.solve("highs")
    table = plan.price_ranges()
    program, base = plan.program, plan.objective
    for row, (_, found) in enumerate(table.iterrows()):
        if found["note"] or abs(found["shadow_price"]) < 1e-6:
            continue
        for end, beyond in ((found["lower"], found["price_below"]), (found["upper"], found["price_above"])):
            reach = end - found["right_side"]
            if not np.isfinite(reach) or abs(reach) < 1e-5:
                continue
            inside = at_right_side(program, row, found["right_side"] + 0.98 * reach)
            assert inside == pytest.approx(base + found["shadow_price"] * 0.98 * reach, rel=1e-6, abs=1e-8)
            outside = at_right_side(program, row, found["right_side"] + 1.05 * reach)
            if np.isnan(beyond):
                assert np.isnan(outside)
            elif not np.isnan(outside):  # concave: beyond the end the straight line overstates
                assert outside < base + found["shadow_price"] * 1.05 * reach + 1e-9 * abs(base)


def test_ranges_of_the_reference():
    table = reference_model().solve().price_ranges()
    served = table.loc["prefill_balance[prefill-heavy]"]
    assert served["shadow_price"] == pytest.approx(264.45444, rel=1e-6)
    assert served["price_below"] == pytest.approx(380.0)  # with less of it, the other class is served in full
    part = table.loc["prefill_balance[decode-heavy]"]
    assert (part["lower"], part["upper"]) == (pytest.approx(0.46833126), float("inf"))
    assert part["price_below"] == pytest.approx(230.0)


def test_a_price_at_a_kink_is_labelled():
    """Capacity exactly used up: one more GPU earns nothing, one fewer loses."""
    model = reference_model()
    at_capacity = rebuilt(model, arrival_rate=model.workload.arrival_rate * np.array([0.9366625, 1.0]))
    solved = at_capacity.solve()
    exact = rebuilt(model, arrival_rate=solved.throughput)
    table = exact.solve("highs").price_ranges(["fleet[A100/Qwen-8B]"])
    assert table["note"].iloc[0] == "degenerate: holds to one side only" or table["upper"].iloc[0] > 1


def test_unknown_rows_have_no_range():
    with pytest.raises(fo.InvalidInput, match=r"there is no constraint 'fleet'; see plan\.shadow_prices\.index"):
        reference_model().solve().price_ranges(["fleet"])


def test_reduced_costs_are_zero_where_used_and_never_negative():
    plan = reference_model().solve()
    used = plan.solution.values > 1e-9
    assert np.all(plan.reduced_costs.to_numpy()[used] == 0)
    assert np.all(plan.reduced_costs.to_numpy() >= 0)


# ---- Proposition 3.2 --------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(pair_models(patient=False))
def test_a_decode_queue_can_be_constructed_away(model):
    """From any feasible plan that prefills more than it decodes: same completions, same revenue, no decode queue."""
    assume(model.scenario.charging == "bundled")
    plan = model.solve()
    assume(plan.decode_buffer_vanishes)
    found = plan.without_decode_queue()
    np.testing.assert_allclose(found.throughput, plan.throughput, rtol=1e-9, atol=1e-12)
    assert np.all(found.decode_queue == 0)
    assert found.revenue_rate == pytest.approx(plan.revenue_rate, rel=1e-12)
    assert found.certificate.holds(1e-7)


def test_a_plan_that_wastes_prefills_is_mended():
    """One tenth of the prefills thrown away on purpose, and the construction takes them back."""
    model = rebuilt(reference_model(), arrival_rate=np.array([0.1, 0.1]))
    plan = model.solve()
    grids = plan.program.column_grids(plan.solution.values)
    values = plan.solution.values.copy()
    wasted = 0.1 * plan.throughput
    blocks = {block.name: block.numbers for block in plan.program.columns}
    # Completions fall by a tenth, the prefills stay: those requests wait for decode and give up.
    values[blocks["y"]] = 0.9 * grids["y"]
    values[blocks["q_d"]] = wasted / model.workload.abandonment_rate
    certificate = certify(plan.program, values, plan.solution.duals)
    assert certificate.primal_residual < 1e-12
    poor = replace(plan, solution=replace(plan.solution, values=values, certificate=certificate, tolerance=1.0))
    found = poor.without_decode_queue()
    assert np.all(found.decode_queue == 0)
    np.testing.assert_allclose(found.prefill_queue, plan.prefill_queue + wasted / model.workload.abandonment_rate)
    assert found.objective == pytest.approx(poor.objective)
    assert found.certificate.primal_residual < 1e-12


def test_the_construction_says_when_its_condition_fails():
    with pytest.raises(fo.InvalidInput, match="separate charging pays for the prefills"):
        reference_model("separate").solve().without_decode_queue()
    curve = fo.IterationTime(alpha=0.005, beta=1e-5, solo=0.05, physical=False)
    with pytest.warns(fo.ContentionWarning):
        model = fo.FluidModel(
            reference_model().workload,
            fo.GPU(curve, batch_size=16, chunk_size=256),
            prices=reference_model().scenario.prices,
        )
    with pytest.raises(fo.InvalidInput, match=r"kappa < \(B-1\)/B"):
        model.solve().without_decode_queue()


def test_a_refused_change_leaves_the_solver_as_it_was():
    model = reference_model()
    solver = fo.Solver(model)
    solver.solve()
    for changes in ({"P": [0.0, 3000.0]}, {"D": 0.0}, {"tau": 0.0}):
        with pytest.raises(fo.InvalidInput, match="must be above 0"):
            solver.solve(changes)
    with pytest.raises(fo.SolverFailure):
        solver.solve({"P": [1e-200, 3000.0]})
    dearer = fo.FluidModel(model.workload, model.gpu_types, prices=fo.TokenPrices(prompt=0.1, output=0.3))
    assert solver.solve({"c_d": 0.3}).objective == pytest.approx(dearer.solve().revenue_rate, rel=1e-9)


def test_many_re_solves_need_no_solution_at_the_numbers_held():
    crowded = rebuilt(reference_model(), abandonment_rate=np.zeros(2))
    many = fo.Solver(crowded).solve_many({"lambda": [[0.1, 0.1], [0.2, 0.2]]})
    np.testing.assert_allclose(many.objective, [61.0, 122.0], rtol=1e-9)


@pytest.mark.parametrize("changes", [[1], "lambda", {"lambda": "x"}, {"lambda": [[1.0], [1.0, 2.0]]}])
def test_changes_that_are_no_numbers_are_named(changes):
    with pytest.raises(fo.InvalidInput, match="changes must"):
        fo.Solver(reference_model()).solve_many(changes)


def test_only_models_are_held():
    with pytest.raises(fo.InvalidInput, match="model must be a FluidModel; got 3"):
        fo.Solver(3)  # type: ignore[arg-type]
