"""Concave objectives: optima against closed forms and scipy, certificates that mean something, honest refusals."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from strategies import build, pair_models

import fluidopt as fo
from fluidopt.algebra import Variable
from fluidopt.expressions import parse_expression
from fluidopt.program import lower
from fluidopt.reference import reference_model
from fluidopt.solvers import SolverOptions, solve_program
from fluidopt.solvers.concave import certify_concave, lower_rows, solve_concave
from fluidopt.solvers.graph import is_linear

Z = "sum(mu_d[i, k]*y[i, k], k)"
REVENUE = f"sum(w[i]*{Z}, i)"
PROPORTIONAL = f"sum(log({Z}), i)"


def with_objective(model, text):
    objective = parse_expression(text, model.symbols) if isinstance(text, str) else text
    return replace(model.symbolic, objective=objective)


def solved(model, text, options=None):
    return solve_concave(with_objective(model, text), model.numbers(), options)


def throughput(model, values):
    """z, requests/s per class."""
    decodes = model.program().column_grids(values)["y"]
    speed = np.array([mode.decode_speed for _, mode in model.modes])
    return np.nansum(decodes * speed, axis=1) / model.workload.output_tokens


def by_scipy(model, objective, gradient, start):
    """An independent optimum: SLSQP on the dense rows."""
    program = model.program()
    matrix = program.matrix.toarray()
    equal = program.row_lower == program.row_upper
    upper, lower_ = ~equal & np.isfinite(program.row_upper), ~equal & np.isfinite(program.row_lower)
    rows = [
        {"type": "eq", "fun": lambda x: matrix[equal] @ x - program.row_upper[equal], "jac": lambda _: matrix[equal]},
        {
            "type": "ineq",
            "fun": lambda x: program.row_upper[upper] - matrix[upper] @ x,
            "jac": lambda _: -matrix[upper],
        },
        {
            "type": "ineq",
            "fun": lambda x: matrix[lower_] @ x - program.row_lower[lower_],
            "jac": lambda _: matrix[lower_],
        },
    ]
    unit = 1 + abs(objective(start))
    answer = minimize(
        lambda x: -objective(x) / unit,
        start,
        jac=lambda x: -gradient(x) / unit,
        bounds=[(0, None)] * len(start),
        constraints=[row for row in rows if len(row["fun"](start))],
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    assert answer.success, answer.message
    return -answer.fun * unit


@pytest.fixture(scope="module")
def model():
    return reference_model()


@pytest.fixture(scope="module")
def crowded():
    """The reference classes with far more arrivals than can be served, so that only decode capacity binds."""
    reference = reference_model()
    classes = [replace(each, arrival_rate=50.0) for each in reference.workload.classes]
    return build(classes, reference.gpu_types[0])


def knapsack_weights(model):
    """Decode work that one completed request/s of each class takes, a_i/mu_p,i, and what there is, kappa B."""
    (gpu,) = model.gpu_types
    mixed, solo = gpu.modes()
    tau, work, batch = mixed.iteration_time, model.workload, gpu.batch_size
    kappa = tau / solo.iteration_time
    rate = gpu.chunk_size / (work.prompt_tokens * tau)
    a = gpu.chunk_size * work.output_tokens / work.prompt_tokens + kappa * batch - (batch - 1)
    return a / rate, kappa * batch


# ---- optima -----------------------------------------------------------------------------------------------------


def test_proportional_fairness_splits_the_bottleneck_evenly(crowded):
    # max sum log z_i over sum b_i z_i <= kappa B (MODEL: the knapsack row): z_i = kappa B/(I b_i).
    weights, room = knapsack_weights(crowded)
    solution = solved(crowded, PROPORTIONAL)
    assert throughput(crowded, solution.values) == pytest.approx(room / (2 * weights), rel=1e-5)
    assert solution.certificate.objective == pytest.approx(np.log(room / (2 * weights)).sum(), abs=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 2, 3, 0.3])
def test_alpha_fairness_is_its_closed_form(crowded, alpha):
    # max sum z^(1-alpha)/(1-alpha) over sum b_i z_i <= kappa B: z_i proportional to b_i^(-1/alpha).
    weights, room = knapsack_weights(crowded)
    expected = weights ** (-1 / alpha)
    expected *= room / (weights @ expected)
    solution = solved(crowded, f"sum(({Z})**(1 - {alpha}), i)/(1 - {alpha})")
    assert throughput(crowded, solution.values) == pytest.approx(expected, rel=1e-4)
    assert solution.certificate.objective == pytest.approx((expected ** (1 - alpha)).sum() / (1 - alpha), rel=1e-6)


def test_alpha_fairness_ends_at_the_linear_optimum(model):
    linear = solve_program(lower(with_objective(model, f"sum({Z}, i)"), model.numbers())).certificate.objective
    values = [solved(model, f"sum(({Z})**(1 - {alpha}), i)").certificate.objective for alpha in (0.1, 0.01, 0.001)]
    distance = np.abs(np.array(values) - linear)
    assert np.all(np.diff(distance) < 0)
    assert distance[-1] < 2e-3


@pytest.mark.parametrize(
    ("text", "utility", "slope"),
    [
        (PROPORTIONAL, np.log, lambda z: 1 / z),
        (f"sum(lambda[i]*sqrt({Z}), i)", lambda z: 0.5 * np.sqrt(z), lambda z: 0.25 / np.sqrt(z)),
        (f"-sum(1/(0.1 + {Z}), i)", lambda z: -1 / (0.1 + z), lambda z: 1 / (0.1 + z) ** 2),
        (f"sum({Z}, i) - sum(exp(3*{Z}), i)", lambda z: z - np.exp(3 * z), lambda z: 1 - 3 * np.exp(3 * z)),
    ],
)
def test_utilities_of_throughput_agree_with_scipy(model, text, utility, slope):
    speed = np.array([mode.decode_speed for _, mode in model.modes]) / model.workload.output_tokens[:, None]
    block = next(block for block in model.program().columns if block.name == "y")

    def gradient(x):
        full = np.zeros_like(x)
        full[block.numbers] = slope(throughput(model, x))[:, None] * speed
        return full

    start = model.solve("highs").solution.values
    expected = by_scipy(model, lambda x: float(utility(throughput(model, x)).sum()), gradient, start)
    assert solved(model, text).certificate.objective == pytest.approx(expected, abs=2e-6)


def test_linear_less_convex_agrees_with_scipy(model):
    program = model.program()
    block = next(block for block in program.columns if block.name == "q_p")

    def objective(x):
        return float(program.objective @ x - 300 * (x[block.numbers] ** 2).sum())

    def gradient(x):
        full = program.objective.copy()
        full[block.numbers] -= 600 * x[block.numbers]
        return full

    expected = by_scipy(model, objective, gradient, model.solve("highs").solution.values)
    solution = solved(model, f"{REVENUE} - 300*sum(q_p[i]**2, i)")
    assert solution.certificate.objective == pytest.approx(expected, rel=1e-6)


def test_max_min_fairness_is_the_linear_program_with_a_level(model):
    program = model.program()
    speed = np.array([mode.decode_speed for _, mode in model.modes]) / model.workload.output_tokens[:, None]
    block = next(block for block in program.columns if block.name == "y")
    above = np.zeros((2, program.shape[1] + 1))
    for each in range(2):
        above[each, block.numbers[each]] = -speed[each]
    above[:, -1] = 1.0
    matrix = np.hstack([program.matrix.toarray(), np.zeros((program.shape[0], 1))])
    equal, upper = program.row_lower == program.row_upper, np.isinf(program.row_lower)
    answer = linprog(
        -np.eye(program.shape[1] + 1)[-1],
        A_ub=np.vstack([matrix[upper], above]),
        b_ub=np.concatenate([program.row_upper[upper], np.zeros(2)]),
        A_eq=matrix[equal],
        b_eq=program.row_upper[equal],
    )
    names = model.workload.names
    least = "min(" + ", ".join(Z.replace("[i, k]", f'["{name}", k]') for name in names) + ")"
    solution = solved(model, least)
    assert solution.certificate.objective == pytest.approx(-answer.fun, rel=1e-6)
    assert throughput(model, solution.values).min() == pytest.approx(-answer.fun, rel=1e-6)


def test_absolute_values_and_maxima_agree_with_rows_of_their_own(model):
    # |q - 0.2| and max(0, .) as linear rows over added variables, against the same as functions.
    text = f"{REVENUE} - 400*sum(abs(q_p[i] - 0.2), i) - 50*max(phi['mixed'] - 0.2, 0)"
    s = model.symbols
    distance = Variable(sympy.IndexedBase("distance"), model.symbolic.index_sets[:1], "1", "distance")
    excess = Variable(sympy.Symbol("excess"), (), "1", "excess")
    rows = reference_model()
    rows.symbolic = replace(
        rows.symbolic,
        variables=(*rows.symbolic.variables, distance, excess),
        objective=rows.symbolic.objective - 400 * s.sum(distance.symbol[s.i], over=s.i) - 50 * excess.symbol,
    )
    rows.subject_to(distance.symbol[s.i] >= s.q_p[s.i] - 0.2, name="above")
    rows.subject_to(distance.symbol[s.i] >= 0.2 - s.q_p[s.i], name="below")
    rows.subject_to(excess.symbol >= s.phi["mixed"] - 0.2, name="excess")
    expected = solve_program(rows.program()).certificate.objective
    assert solved(model, text).certificate.objective == pytest.approx(expected, rel=1e-6)


def test_a_linear_objective_comes_out_as_the_linear_program_has_it(model):
    program = with_objective(model, REVENUE)
    assert is_linear(program)
    assert not is_linear(with_objective(model, PROPORTIONAL))
    assert is_linear(with_objective(model, "3 + sum(q_p[i], i)"))
    assert solve_concave(program, model.numbers()).certificate.objective == pytest.approx(297.71619, rel=1e-6)


def test_rows_are_lowered_whatever_the_objective(model):
    rows = lower_rows(with_objective(model, PROPORTIONAL), model.numbers())
    assert (rows.matrix != model.program().matrix).nnz == 0
    assert not rows.objective.any()


def test_telling_linear_from_concave_does_not_load_cvxpy():
    code = (
        "import sys; from fluidopt.reference import reference_model as m\n"
        "from fluidopt.solvers.graph import is_linear\n"
        "assert is_linear(m().symbolic); assert 'cvxpy.atoms' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_units_do_not_matter(model):
    small = solved(model, PROPORTIONAL)
    large = solved(model, f"1000000*sum(log(1000000*{Z}), i)")
    assert throughput(model, large.values) == pytest.approx(throughput(model, small.values), rel=1e-4)
    shift = 1e6 * (small.certificate.objective + 2 * np.log(1e6))
    assert large.certificate.objective == pytest.approx(shift, rel=1e-6)


def test_optima_at_0_and_inside_are_certified_too(model):
    # Objective, gradient and duals all vanish there, so nothing can be relative to them.
    for text in ("-q_p['decode-heavy']**2", "-(q_p['decode-heavy'] - 0.2)**2", "-sum(abs(q_p[i] - 0.1), i)"):
        solution = solved(model, text)
        assert solution.certificate.objective == pytest.approx(0.0, abs=1e-7)
        assert solution.certificate.bound == pytest.approx(0.0, abs=1e-6)


def test_a_term_without_weight_asks_for_nothing():
    reference = reference_model()
    idle = fo.WorkloadClass("idle", arrival_rate=0, prompt_tokens=10, output_tokens=10, abandonment_rate=0.1)
    more = build((*reference.workload.classes, idle), reference.gpu_types[0])
    expected = solved(reference, f"sum(lambda[i]*log({Z}), i)").certificate.objective
    assert solved(more, f"sum(lambda[i]*log({Z}), i)").certificate.objective == pytest.approx(expected, abs=1e-6)
    with pytest.raises(fo.InvalidInput, match=r"is not above 0 in any plan for class 'idle'.*weight 0"):
        solved(more, PROPORTIONAL)
    roots = solved(more, f"sum(sqrt({Z}), i)")  # the slope of a root is infinite at 0
    assert roots.certificate.objective == pytest.approx(
        solved(reference, f"sum(sqrt({Z}), i)").certificate.objective, abs=1e-5
    )


# ---- certificates -----------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(pair_models(patient=False), st.integers(0, 10**6), st.sampled_from(["log", "sqrt"]))
def test_the_bound_holds_at_every_feasible_point(model, seed, utility):
    assume(any(each.arrival_rate > 0 for each in model.workload))
    solution = solved(model, f"sum(lambda[i]*{utility}({Z}), i)")
    certificate = solution.certificate
    assert certificate.holds(1e-6)
    size = model.workload.arrival_rate.sum() + abs(certificate.objective)
    assert -1e-6 * size <= certificate.bound - certificate.objective <= 1e-5 * size
    rng, rows = np.random.default_rng(seed), model.program()
    corners = [
        solve_program(
            replace(rows, objective=rng.normal(size=rows.shape[1]) * rng.integers(0, 2, rows.shape[1]))
        ).values
        for _ in range(4)
    ]
    for _ in range(10):
        # Mixed with the optimum, so that every class that can be served is.
        point = np.append(rng.dirichlet(np.ones(4)) * 0.9, 0.1) @ np.array([*corners, solution.values])
        served = (rate := model.workload.arrival_rate) > 0
        value = float(rate[served] @ getattr(np, utility)(throughput(model, point)[served]))
        assert value <= certificate.bound + 1e-9 * (1 + abs(value))


@pytest.mark.parametrize("text", [PROPORTIONAL, f"{REVENUE} - 300*sum(q_p[i]**2, i)", f"sum(w[i]*({Z})**0.3, i)"])
def test_a_perturbed_answer_fails_its_certificate(model, text):
    program, numbers = with_objective(model, text), model.numbers()
    solution = solve_concave(program, numbers)
    other = solve_program(replace(solution.program, objective=-solution.program.objective)).values
    certify = certify_concave
    assert certify(program, numbers, solution.values, solution.duals)[1].holds(1e-6)
    # A feasible point that is not optimal, an infeasible one, and wrong duals.
    assert certify(program, numbers, 0.99 * solution.values + 0.01 * other, solution.duals)[1].gap > 1e-5
    assert certify(program, numbers, 1.001 * solution.values, solution.duals)[1].primal_residual > 1e-5
    assert not certify(program, numbers, solution.values, 1.01 * solution.duals)[1].holds(1e-5)
    assert not certify(program, numbers, solution.values, -solution.duals)[1].holds(1e-3)
    assert not certify(program, numbers, np.full_like(solution.values, np.nan), solution.duals)[1].holds(1e-3)


def test_a_minimum_is_certified_again_from_the_pair_alone(model):
    text = f"sum(min({Z}, 0.3), i) + 0.01*sqrt(phi['solo'])"
    program, numbers = with_objective(model, text), model.numbers()
    solution = solve_concave(program, numbers)
    _, certificate = certify_concave(program, numbers, solution.values, solution.duals)
    assert certificate.holds(1e-5)
    assert certificate.objective == solution.certificate.objective


@pytest.mark.parametrize(
    "text",
    [PROPORTIONAL, f"{REVENUE} - sum(exp(q_p[i]), i) - 5*phi['mixed']**2", f"sum(w[i]*log(1 + sqrt({Z})), i)"],
)
def test_the_gradient_is_that_of_finite_differences(model, text):
    program, numbers = with_objective(model, text), model.numbers()
    solution = solve_concave(program, numbers)

    def value(x):
        return certify_concave(program, numbers, x, solution.duals)[1].objective

    for column in range(len(solution.values)):
        step = np.zeros_like(solution.values)
        step[column] = 1e-5 * max(solution.values[column], 1e-2)
        slope = (value(solution.values + step) - value(solution.values - step)) / (2 * step[column])
        assert slope == pytest.approx(solution.program.objective[column], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("text", [PROPORTIONAL, f"{REVENUE} - 300*sum(q_p[i]**2, i)"])
def test_a_dual_is_the_slope_of_the_optimum(text):
    def optimum(rate):
        reference = reference_model()
        first, second = reference.workload.classes
        changed = build([first, replace(second, arrival_rate=rate)], reference.gpu_types[0])
        return changed, solved(changed, text)

    h = 1e-3
    changed, solution = optimum(0.5)
    at = changed.program().row_names.index("prefill_balance[prefill-heavy]")
    slope = (optimum(0.5 + h)[1].certificate.objective - optimum(0.5 - h)[1].certificate.objective) / (2 * h)
    assert solution.duals[at] == pytest.approx(slope, rel=1e-3)


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"sum(({Z})**2, i)", r"Sum\(mu_d\[i, k\]\*y\[i, k\], \(k, 1, K\)\)\*\*2 is convex where a concave"),
        (f"{REVENUE} + sum(q_p[i]**2, i)", r"q_p\[i\]\*\*2 is convex where a concave or linear part is needed"),
        ("phi['mixed']*phi['solo']", r"phi\[mixed\]\*phi\[solo\] multiplies or divides variables by each other"),
        ("sum(q_p[i]/(1 + q_p[i]), i)", r"a ratio x/\(1 \+ x\) is 1 - 1/\(1 \+ x\)"),
        ("sqrt(phi['mixed']*phi['solo'])", "the log of a product is a sum of logs"),
        ("sum(log(-q_p[i]), i)", r"-q_p\[i\] is not above 0 in any plan for class 'decode-heavy'"),
        ("log(phi['mixed'] - 1)", r"phi\[mixed\] - 1.* is not above 0 in any plan, as log"),
        ("log(phi['mixed'] - 0.15) + log(0.1 - phi['mixed'])", "in no plan are all of these at least 0"),
        ("log(phi['mixed'] - 0.15) + log(0.15 - phi['mixed'])", r"0.15 is not above 0 in any plan|0.15 - phi"),
        (
            "sqrt(phi['mixed'] - 1) + 1",
            r"in no plan are all of these at least 0, as the objective needs: phi\[mixed\] - 1",
        ),
        (
            "sum(log(q_p[i]**2), i)",
            r"log\(q_p\[i\]\*\*2\) is neither concave nor convex.*q_p\[i\]\*\*2 inside it is convex",
        ),
        (f"-{PROPORTIONAL}", r"log\(.*\) is concave where a convex or linear part is needed \(it is subtracted"),
        ("sum((P[i] - 1000)*log(q_p[i]), i)", r"log\(q_p\[i\]\) has coefficients of both signs"),
        ("sum(max(q_p[i], q_d[i]), i)", r"Max\(q_d\[i\], q_p\[i\]\) is convex where"),
        ("-sum(min(q_p[i], 1), i)", r"Min\(1, q_p\[i\]\) is concave where a convex"),
        ("sum(exp(q_p[i]), i)", r"exp\(q_p\[i\]\) is convex"),
        ("sum(abs(q_p[i] - 1), i)", r"Abs\(q_p\[i\] - 1\) is convex"),
        ("-sum((q_p[i] - 1)**3, i)", r"q_p\[i\] - 1 may be negative, where \(q_p\[i\] - 1\)\*\*3 bends the other way"),
        ("-sum(1/(q_p[i] - 1), i)", r"q_p\[i\] - 1 may be negative"),
        ("-abs(max(phi['mixed'] - 0.5, 0) - 0.2)", r"Max\(0, phi\[mixed\] - 0.5\) - 0.2 inside it is convex"),
        ("log(q_p[i])", "index i is neither an index of the row nor summed over"),
        ("sum(log(q_p[i]/(theta[i] - 0.1)), i)", "is not a finite number everywhere"),
        ("sum(sqrt(q_p[i])/(theta[i] - 0.1), i)", "is not a finite number everywhere"),
    ],
)
def test_an_objective_that_is_not_concave_is_refused_with_the_part_and_the_reason(model, text, message):
    with pytest.raises(fo.InvalidInput, match=message):
        solved(model, text)


def test_what_only_symbols_can_write_is_refused_too(model):
    s = model.symbols
    i, total = s.i, lambda part: s.sum(part, over=s.i)
    for objective, message in [
        (total(sympy.sin(s.q_p[i])), "is not one of the functions understood here"),
        (total(2 ** s.q_p[i]), "has a variable in its exponent"),
        (total(s.q_p[i] ** s.P[i]), "the exponent in .* differs between members"),
        (sympy.nan * s.c_p, "every number must be real"),
    ]:
        with pytest.raises(fo.InvalidInput, match=message):
            solved(model, objective)


def test_exponents_may_be_parameters_that_are_one_number(model):
    s = model.symbols
    by_parameter = solved(model, s.sum(s.q_d[s.i] ** (10 * s.theta[s.i] / 2), over=s.i)).certificate.objective
    assert by_parameter == pytest.approx(solved(model, "sum(sqrt(q_d[i]), i)").certificate.objective, rel=1e-6)
    linear = solved(model, s.sum(s.q_d[s.i] ** (10 * s.theta[s.i]), over=s.i)).certificate.objective
    assert linear == pytest.approx(solved(model, "sum(q_d[i], i)").certificate.objective, rel=1e-6)


def test_a_queue_that_the_model_does_not_determine_is_refused():
    reference = reference_model()
    patient = fo.WorkloadClass("patient", arrival_rate=0.01, prompt_tokens=100, output_tokens=100)
    more = build((*reference.workload.classes, patient), reference.gpu_types[0])
    with pytest.raises(fo.InvalidInput, match=r"the objective uses q_p\[patient\], which the model does not determine"):
        solved(more, "sum(log(1 + q_p[i]), i)")


def test_rows_that_conflict_and_objectives_without_limit_are_told_apart(reference):
    free = Variable(sympy.Symbol("free"), (), "1", "in no row but one that does not bind it")
    endless = replace(
        reference.symbolic,
        variables=(*reference.symbolic.variables, free),
        objective=free.symbol,
    )
    for objective in (sympy.sqrt(free.symbol), free.symbol + sympy.log(free.symbol), -sympy.exp(-free.symbol)):
        with pytest.raises(fo.InfeasibleModel, match="no finite maximum") as caught:
            solve_concave(replace(endless, objective=objective + 1), reference.numbers())
        assert caught.value.kind == "unbounded"
    reference.subject_to(reference.symbols.phi["mixed"] >= 2, name="impossible")
    with pytest.raises(fo.InfeasibleModel, match="no point satisfies all rows"):
        solved(reference, PROPORTIONAL)


def test_options_are_kept(model):
    with pytest.raises(fo.SolverFailure, match="fails its certificate"):
        solved(model, PROPORTIONAL, SolverOptions(tolerance=1e-15))
    assert solved(model, PROPORTIONAL, SolverOptions(tolerance=1e-5)).tolerance == 1e-5
    with pytest.raises(fo.SolverFailure, match=r"stopped with|failed"):
        solved(model, PROPORTIONAL, SolverOptions(time_limit=1e-9))
    with pytest.raises(fo.InvalidInput, match="SolverOptions"):
        solved(model, PROPORTIONAL, options={"tolerance": 1})
