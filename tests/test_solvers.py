"""Solvers: certified answers on random models, agreement with each other, and honest failure."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import sparse
from strategies import build, log_floats, mode_models, pair_models, patient_classes, random_models

import fluidopt as fo
from fluidopt.program import Block, LinearProgram
from fluidopt.reference import reference_model
from fluidopt.solvers import Certificate, certify, solve_program

SOLVERS = ("highs", "cvxpy")


def linear_program(objective, matrix, lower, upper):
    """A program of its own, with rows r[0], r[1], ... and columns x[0], ..."""

    def block(name, count):
        return Block(name, (tuple(map(str, range(count))),), np.arange(count))

    matrix = sparse.csc_array(np.array(matrix, dtype=float))
    return LinearProgram(
        objective=np.array(objective, dtype=float),
        matrix=matrix,
        row_lower=np.array(lower, dtype=float),
        row_upper=np.array(upper, dtype=float),
        rows=(block("r", matrix.shape[0]),),
        columns=(block("x", matrix.shape[1]),),
    )


# max 3 x0 + 2 x1, x0 + x1 <= 4, x0 + 3 x1 <= 6, x0 >= 1: optimum 12 at (4, 0), dual (3, 0, 0).
SMALL = linear_program([3, 2], [[1, 1], [1, 3], [1, 0]], [-np.inf, -np.inf, 1], [4, 6, np.inf])


# ---- (a) certificates ---------------------------------------------------------------------------------------------


def check_optimality(program, values, duals, tolerance):
    """Primal and dual feasibility and complementary slackness, written out from the arrays."""
    matrix = program.matrix.toarray()
    activity, reduced = matrix @ values, program.objective - duals @ matrix
    size = 1 + np.abs(matrix) @ np.abs(values)
    cost = 1 + np.abs(program.objective) + np.abs(duals) @ np.abs(matrix)
    assert np.all(values >= -tolerance)
    assert np.all(activity <= program.row_upper + tolerance * size)
    assert np.all(activity >= program.row_lower - tolerance * size)
    assert np.all(reduced <= tolerance * cost)
    assert np.all(duals[np.isinf(program.row_lower)] >= -tolerance * (1 + np.abs(duals).max()))
    assert np.all(duals[np.isinf(program.row_upper)] <= tolerance * (1 + np.abs(duals).max()))
    scale = 1 + np.abs(program.objective) @ np.abs(values)
    slack = np.minimum(program.row_upper - activity, activity - program.row_lower)
    assert np.abs(duals * slack).max() <= 10 * tolerance * scale
    assert np.abs(reduced * values).max() <= 10 * tolerance * scale


@settings(max_examples=250)
@given(pair_models())
def test_solvers_certify_and_agree_on_the_pair(model):
    check_both(model)


@settings(max_examples=250)
@given(mode_models())
def test_solvers_certify_and_agree_on_operating_modes(model):
    check_both(model)


def check_both(model):
    program = model.program()
    highs = model.solve("highs")
    assert highs.certificate.holds(1e-7)
    check_optimality(program, highs.solution.values, highs.solution.duals, 1e-7)
    try:
        cvxpy = model.solve("cvxpy")
    except fo.SolverFailure:
        # Interior point alone does not reach 1e-7 on every wide-ranged program; it has to say so.
        return
    assert cvxpy.certificate.holds(1e-6)
    assert cvxpy.revenue_rate == pytest.approx(highs.revenue_rate, rel=1e-6, abs=1e-6)


def test_cvxpy_answers_ordinary_models():
    """The second opinion is worth something only where it is given."""
    models = random_models(11, 30) + random_models(12, 30, charging="separate", patient=True)
    failed = 0
    for model in models:
        try:
            assert model.solve("cvxpy").revenue_rate == pytest.approx(model.solve("highs").revenue_rate, rel=1e-6)
        except fo.SolverFailure:
            failed += 1
    assert failed <= len(models) // 20


@settings(max_examples=40)
@given(mode_models())
def test_simplex_and_interior_point_agree(model):
    simplex, interior = (model.solve(options=fo.SolverOptions(method=method)) for method in ("simplex", "ipm"))
    assert simplex.solution.method == "HiGHS simplex"
    assert interior.solution.method == "HiGHS ipm"
    assert interior.revenue_rate == pytest.approx(simplex.revenue_rate, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_small_program_by_hand(solver):
    solution = solve_program(SMALL, solver)
    assert solution.values == pytest.approx([4, 0], abs=1e-8)
    assert solution.duals == pytest.approx([3, 0, 0], abs=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_duals_of_every_kind_of_row_have_the_sign_of_a_maximum(solver):
    """max -x0 + 2 x1 - x2: x0 >= 1 (dual -1), x1 <= 3 (dual 2), x2 == 2 (dual -1), 0 <= x0 + x1 <= 10 (slack)."""
    program = linear_program(
        [-1, 2, -1], [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], [1, -np.inf, 2, 0], [np.inf, 3, 2, 10]
    )
    assert solve_program(program, solver).duals == pytest.approx([-1, 2, -1, 0], abs=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_row_with_two_sides_can_bind_at_either(solver):
    for objective, price in ((1, 1), (-1, -1)):
        program = linear_program([objective], [[1]], [1], [2])
        solution = solve_program(program, solver)
        assert solution.values == pytest.approx([2 if objective > 0 else 1])
        assert solution.duals == pytest.approx([price])


@pytest.mark.parametrize(
    ("values", "duals", "wrong"),
    [
        ([4, 0], [3, 0, 0], None),
        ([4.1, 0], [3, 0, 0], "primal_residual"),
        ([0.9, 0], [3, 0, 0], "primal_residual"),
        ([4.2, -0.2], [3, 0, 0], "primal_residual"),
        ([4, 0], [2.9, 0, 0], "dual_residual"),
        ([4, 0], [3.1, 0, -0.1], "gap"),
        ([4, 0], [3.2, -0.2, 0], "dual_residual"),
        ([4, 0], [2, 0, 1], "dual_residual"),
        ([3, 0], [3, 0, 0], "gap"),
        ([np.nan, 0], [3, 0, 0], "primal_residual"),
        ([4, 0], [np.nan, 0, 0], "dual_residual"),
    ],
)
def test_the_certificate_sees_what_is_wrong(values, duals, wrong):
    certificate = certify(SMALL, np.array(values, dtype=float), np.array(duals, dtype=float))
    if wrong is None:
        assert certificate.holds(1e-12)
    else:
        assert not certificate.holds(1e-3)
        assert not getattr(certificate, wrong) <= 1e-3


def test_the_certificate_does_not_depend_on_units():
    """Half the optimum is no optimum, in whatever unit the money or the requests are counted."""
    for money in (1e-12, 1e-6, 1, 1e6):
        for amount in (1e-12, 1e-6, 1, 1e6):
            program = replace(
                SMALL,
                objective=SMALL.objective * money,
                row_lower=SMALL.row_lower * amount,
                row_upper=SMALL.row_upper * amount,
            )
            right = certify(program, np.array([4.0, 0]) * amount, np.array([3.0, 0, 0]) * money)
            wrong = certify(program, np.array([2.0, 0]) * amount, np.array([0.0, 0, 0]) * money)
            assert right.holds(1e-7)
            assert not wrong.holds(1e-7), (money, amount)


# ---- ill-scaled input: a certified right answer or a failure, never a wrong one ------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("factor", [1e-12, 1e-9, 1e-7, 1e-5])
def test_a_fleet_with_next_to_no_load_earns_all_of_it(solver, factor):
    """All requests are served: R* = sum w lambda, however small lambda is."""
    model = build(reference_model().workload.scaled(factor), reference_model().gpu_types)
    try:
        plan = model.solve(solver)
    except fo.SolverFailure:
        return
    assert plan.revenue_rate == pytest.approx(305 * factor, rel=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("money", [1e-12, 1e-9, 1e-6, 1e6, 1e9])
def test_tiny_and_huge_prices(solver, money):
    model = build(
        reference_model().workload,
        reference_model().gpu_types,
        prices=fo.TokenPrices(prompt=0.1 * money, output=0.2 * money),
    )
    try:
        plan = model.solve(solver)
    except fo.SolverFailure:
        return
    assert plan.revenue_rate == pytest.approx(297.71619 * money, rel=1e-6)


@st.composite
def wide_models(draw):
    """Arrival and abandonment rates over twelve orders of magnitude, token counts over six."""
    classes = [
        fo.WorkloadClass(
            f"class {at}",
            arrival_rate=draw(log_floats(1e-6, 1e6)),
            prompt_tokens=draw(log_floats(1, 1e6)),
            output_tokens=draw(log_floats(1, 1e6)),
            abandonment_rate=draw(log_floats(1e-6, 1e6)),
        )
        for at in range(draw(st.integers(1, 4)))
    ]
    return build(classes, reference_model().gpu_types)


def lagrangian_bound(model):
    """The least Lagrangian bound of the two-row reduction, in exact arithmetic: floats cancel at this range."""
    (gpu,) = model.gpu_types
    mixed, solo = gpu.modes()
    tau, batch, chunk = Fraction(mixed.iteration_time), gpu.batch_size, gpu.chunk_size
    slots = tau / Fraction(solo.iteration_time) * batch
    classes = []
    for each in model.workload:
        prompt, output, arrivals = map(Fraction, (each.prompt_tokens, each.output_tokens, each.arrival_rate))
        rate = chunk / (prompt * tau)
        value = Fraction(model.scenario.prices.prompt) * prompt + Fraction(model.scenario.prices.output) * output
        classes.append((chunk * output / prompt + slots - (batch - 1), value * rate, arrivals / rate))

    def bound(u, v):
        return u + v * slots + sum(max(0, gain - u - v * needed) * load for needed, gain, load in classes)

    # It is piecewise linear in (u, v): its minimum is where two of these lines cross.
    lines = [(1, needed, gain) for needed, gain, _ in classes] + [(1, 0, 0), (0, 1, 0)]
    crossings = []
    for (a, b, c), (d, e, f) in itertools.combinations(lines, 2):
        determinant = a * e - b * d
        if determinant != 0:
            crossings.append(((c * e - b * f) / Fraction(determinant), (a * f - c * d) / Fraction(determinant)))
    return min(bound(u, v) for u, v in crossings if u >= 0 and v >= 0)


@settings(max_examples=60)
@given(wide_models())
def test_ill_scaled_models_are_solved_or_refused(model):
    """Against the Lagrangian bound of the two-row reduction, which needs no solver."""
    try:
        plan = model.solve("highs")
    except fo.SolverFailure:
        return
    assert plan.revenue_rate == pytest.approx(float(lagrangian_bound(model)), rel=1e-5)


# ---- duals are derivatives ----------------------------------------------------------------------------------------


def optimum(program):
    try:
        return solve_program(program).certificate.objective
    except fo.InfeasibleModel:
        return -np.inf
    except fo.SolverFailure:
        return np.nan  # infeasible by about the solver's tolerance: neither answer can be certified


@settings(max_examples=25)
@given(st.one_of(pair_models(), mode_models()))
def test_every_dual_lies_between_the_two_slopes_of_the_optimum(model):
    """The optimum is concave in each right side, so its slopes to the left and right bracket the dual."""
    program = model.program()
    solution = solve_program(program)
    middle = solution.certificate.objective
    noise = 1e-8 * (1 + abs(middle))
    for row, price in enumerate(solution.duals):
        right = program.row_upper[row] if np.isfinite(program.row_upper[row]) else program.row_lower[row]
        step = 1e-4 * max(1e-2, abs(right))
        shift = np.zeros(len(solution.duals))
        shift[row] = step
        above = optimum(replace(program, row_lower=program.row_lower + shift, row_upper=program.row_upper + shift))
        below = optimum(replace(program, row_lower=program.row_lower - shift, row_upper=program.row_upper - shift))
        assert not above - middle - noise > price * step, program.row_names[row]
        assert not price * step > middle - below + noise, program.row_names[row]


def test_central_differences_of_the_reference_give_its_arrival_prices(reference, reference_plan):
    step = 1e-4
    for at, each in enumerate(reference.workload):

        def revenue(rate, at=at, each=each):
            classes = list(reference.workload)
            classes[at] = fo.WorkloadClass(
                each.name,
                arrival_rate=rate,
                prompt_tokens=each.prompt_tokens,
                output_tokens=each.output_tokens,
                abandonment_rate=each.abandonment_rate,
            )
            return build(classes, reference.gpu_types).solve().revenue_rate

        slope = (revenue(0.5 + step) - revenue(0.5 - step)) / (2 * step)
        assert slope == pytest.approx(reference_plan.shadow_prices[f"prefill_balance[{each.name}]"], abs=1e-6)


@settings(max_examples=30)
@given(st.data())
def test_arrival_prices_of_patient_classes_have_either_sign_and_are_slopes(data):
    gpu = reference_model().scenario.gpu
    patient = data.draw(patient_classes(gpu, fraction=0.7))
    assume(patient)
    base = build((*reference_model().workload, *patient), gpu)
    plan = base.solve()
    step = 1e-4 * patient[0].arrival_rate
    assume(step > 1e-7)
    moved = []
    for change in (step, -step):
        first = fo.WorkloadClass(
            patient[0].name,
            arrival_rate=patient[0].arrival_rate + change,
            prompt_tokens=patient[0].prompt_tokens,
            output_tokens=patient[0].output_tokens,
        )
        moved.append(build((*reference_model().workload, first, *patient[1:]), gpu).solve().revenue_rate)
    price = plan.shadow_prices[f"prefill_balance[{patient[0].name}]"]
    noise = 1e-9 * plan.revenue_rate
    assert moved[0] - plan.revenue_rate - noise <= price * step <= plan.revenue_rate - moved[1] + noise


# ---- (c) failure is reported --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_infeasible_program(solver):
    program = linear_program([1], [[1], [1]], [-np.inf, 2], [1, np.inf])
    with pytest.raises(fo.InfeasibleModel) as caught:
        solve_program(program, solver)
    assert caught.value.kind == "infeasible"


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_unbounded_program(solver):
    """No FluidModel is unbounded (its rows bound every variable), so the program is written by hand."""
    program = linear_program([1, 0], [[1, -1]], [-np.inf], [1])
    with pytest.raises(fo.InfeasibleModel, match="no finite maximum") as caught:
        solve_program(program, solver)
    assert caught.value.kind == "unbounded"


def test_infeasible_and_dual_infeasible_is_called_infeasible():
    program = linear_program([1, 0], [[1, -1], [0, 1], [0, 1]], [-np.inf, -np.inf, 2], [1, 1, np.inf])
    with pytest.raises(fo.InfeasibleModel) as caught:
        solve_program(program, "highs")
    assert caught.value.kind == "infeasible"


def large_model(count=400):
    rng = np.random.default_rng(7)
    workload = fo.Workload.from_frame(
        {
            "name": [f"class {at}" for at in range(count)],
            "arrival_rate": rng.uniform(0.5, 1.5, count) / count,
            "prompt_tokens": rng.uniform(100, 3000, count),
            "output_tokens": rng.uniform(100, 1000, count),
            "abandonment_rate": rng.uniform(0.01, 1, count),
        }
    )
    return build(workload, reference_model().gpu_types)


@pytest.fixture(scope="module")
def large():
    model = large_model()
    return model, model.solve("highs").revenue_rate


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_time_limit_gives_a_failure_or_a_certified_answer(large, solver):
    model, right = large
    try:
        plan = model.solve(solver, options=fo.SolverOptions(time_limit=1e-6))
    except fo.SolverFailure:
        return
    assert plan.revenue_rate == pytest.approx(right, rel=1e-6)


def test_a_tolerance_that_nothing_meets_is_a_failure(reference):
    with pytest.raises(fo.SolverFailure, match=r"fails its certificate.*1e-30 is asked"):
        reference.solve(options=fo.SolverOptions(tolerance=1e-30))


def test_a_looser_tolerance_is_the_plans_own(reference):
    """What the user asked of the certificate holds for the whole plan, its canonical split included."""
    assert reference.solve(options=fo.SolverOptions(tolerance=1e-4)).solution.tolerance == 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "gurobi"}, "solver must be one of 'auto', .*; got 'gurobi'"),
        ({"solver": None}, "solver must be one of"),
        ({"solver": ["highs"]}, "solver must be one of"),
        ({"options": fo.SolverOptions(method="barrier")}, "method must be 'auto', 'simplex' or 'ipm'; got 'barrier'"),
        ({"options": fo.SolverOptions(method=["ipm"])}, "method must be"),
        ({"options": fo.SolverOptions(time_limit=0)}, "time_limit must be above 0 s"),
        ({"options": fo.SolverOptions(time_limit=-1)}, "time_limit must be above 0 s"),
        ({"options": fo.SolverOptions(time_limit=float("nan"))}, "time_limit must be above 0 s"),
        ({"options": fo.SolverOptions(time_limit="10")}, "time_limit"),
        ({"options": fo.SolverOptions(tolerance=0)}, "tolerance between 0 and 1"),
        ({"options": fo.SolverOptions(tolerance=float("nan"))}, "tolerance between 0 and 1"),
        ({"options": {"time_limit": 10}}, "options must be"),
        ({"options": {}}, "options must be"),
    ],
    ids=str,
)
def test_unknown_solver_or_options(reference, arguments, message):
    with pytest.raises(fo.InvalidInput, match=message):
        reference.solve(**arguments)


def test_coefficients_that_highs_refuses_are_a_failure():
    gpu = fo.GPU(fo.IterationTime(alpha=1e-30, beta=0, solo=1e-30), batch_size=2, chunk_size=1)
    model = build(reference_model().workload, gpu)
    with pytest.raises(fo.SolverFailure):
        model.solve("highs")


def test_nothing_is_printed_while_solving():
    code = (
        "from fluidopt.reference import reference_model\n"
        "import fluidopt as fo\n"
        "for solver in ('highs', 'cvxpy'): reference_model().solve(solver)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_solving_works_without_standard_output():
    """As in a service whose file descriptor 1 is closed."""
    code = (
        "import os\nos.close(1)\nfrom fluidopt.reference import reference_model\n"
        "assert abs(reference_model().solve().revenue_rate - 297.716) < 1e-2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr


def test_the_certificate_prints_its_three_figures():
    shown = str(Certificate(primal_residual=1e-9, dual_residual=2e-9, gap=3e-9, objective=1.0, bound=1.0))
    assert shown == "primal residual 1.0e-09, dual residual 2.0e-09, gap 3.0e-09 (relative)"
