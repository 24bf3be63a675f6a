"""The structured solver: certified on the full LP, against HiGHS and scipy, its prices, ties, limits and growth."""

import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linprog
from strategies import mode_models, pair_models

import fluidopt as fo
from fluidopt.plan import Plan
from fluidopt.program import Block, LinearProgram
from fluidopt.reference import reference_model
from fluidopt.solvers import Solution, certify, solve_program
from fluidopt.solvers.knapsack import CapacityProblem, applies, solve_capacity

EXACT = 1e-12


# ---- the two ways in: from a model, and from arrays -----------------------------------------------------------------


def problem_of(model, **limits):
    """The arrays of a `FluidModel` with its built-in rows."""
    values = model.numbers().values
    return CapacityProblem(
        arrival_rate=values["lambda"],
        abandonment_rate=values["theta"],
        prompt_tokens=values["P"],
        output_tokens=values["D"],
        prompt_price=float(values["c_p"]),
        output_price=float(values["c_d"]),
        charging=model.scenario.charging,
        chunk=values["C"],
        decode_slots=values["b"],
        iteration_time=np.where(values["C"] + values["b"] > 0, values["tau"], np.inf),
        gpu_type=values["member"].argmax(axis=0),
        share=values["share"],
        **limits,
    )


def pair_problem(arrival_rate, prompt_tokens, output_tokens, *, abandonment_rate=0.1, batch=16, kappa=1.5, **changes):
    """The mixed/solo pair with chunk 256 and solo iterations of 0.02 s."""
    given = {
        "arrival_rate": arrival_rate,
        "abandonment_rate": np.broadcast_to(abandonment_rate, np.shape(arrival_rate)),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "prompt_price": 0.1,
        "output_price": 0.2,
        "charging": "bundled",
        "chunk": [256, 0],
        "decode_slots": [batch - 1, batch],
        "iteration_time": [0.02 * kappa, 0.02],
        "gpu_type": [0, 0],
        "share": [1.0],
    }
    return CapacityProblem(**given | changes)


def assemble(program, solution, **extra):
    """Values and duals in the order of the program's columns and rows."""
    names = {"phi": "mode_share", "x": "prefill", "y": "decode", "q_p": "prefill_queue", "q_d": "decode_queue"}
    values, duals = np.zeros(program.shape[1]), np.zeros(program.shape[0])
    for blocks, vector in ((program.columns, values), (program.rows, duals)):
        for block in blocks:
            grid = extra[block.name] if block.name in extra else getattr(solution, names.get(block.name, block.name))
            exists = block.numbers >= 0
            vector[block.numbers[exists]] = np.asarray(grid)[exists]
    return values, duals


def check(program, solution, **extra):
    """The pair proves its own optimality; returns the certificate."""
    certificate = certify(program, *assemble(program, solution, **extra))
    assert certificate.holds(EXACT), certificate
    assert solution.objective == pytest.approx(certificate.objective, rel=EXACT, abs=EXACT)
    return certificate


def served_share(problem, solution):
    """Completions over arrivals, shape (I,)."""
    rate = (solution.decode / problem.iteration_time).sum(axis=1) / problem.output_tokens
    return rate / problem.arrival_rate


# ---- random models of every kind ------------------------------------------------------------------------------------


def spread(rng, low, high, size=None):
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def random_gpu(rng, kind, name="gpu", share=1.0):
    batch, chunk = int(rng.integers(1, 33)), int(spread(rng, 1, 2048))
    solo = float(spread(rng, 5e-3, 1e-1))
    raw = kind == "raw pair"
    curve = fo.IterationTime(
        alpha=solo * rng.uniform(0.05, 0.7) if raw else float(spread(rng, 1e-3, 5e-2)),
        beta=float(spread(rng, 1e-6, 1e-4 if raw else 1e-3)),
        solo=solo,
        physical=not raw,
    )
    prefill_only = fo.Mode("prefill", chunk=chunk, iteration_time=curve.mixed(chunk))
    solo_mode, idle = fo.Mode("solo", decode_slots=batch, iteration_time=solo), fo.Mode("idle")
    chunks = {int(each) for each in spread(rng, 1, 2048, 4)}
    modes = {
        "chunks": (
            *(
                fo.Mode(f"mixed {each}", chunk=each, decode_slots=batch - 1, iteration_time=curve.mixed(each))
                for each in chunks
            ),
            solo_mode,
            idle,
        ),
        "disaggregated": (prefill_only, solo_mode, idle),
        "prefill": (prefill_only, idle),
        "decode": (solo_mode,),
    }.get(kind)
    return fo.GPU(curve, batch_size=batch, chunk_size=chunk, name=name, share=share, operating_modes=modes)


def random_model(rng, kind, charging, *, load=1.0):
    """Classes with ties, zero rates and, now and then, some that never abandon (then it may be infeasible)."""
    if kind in {"two types", "fixed split"}:
        share = float(rng.uniform(0.1, 0.9))
        kinds = ("prefill", "decode") if kind == "fixed split" else rng.choice(["pair", "chunks", "disaggregated"], 2)
        gpus = [random_gpu(rng, kinds[0], "a", share), random_gpu(rng, kinds[1], "b", 1 - share)]
    else:
        gpus = random_gpu(rng, kind)
    count = int(rng.integers(1, 9))
    prompt, output = spread(rng, 10, 5000, count), spread(rng, 10, 5000, count)
    if rng.random() < 0.3:
        prompt[: count // 2], output[: count // 2] = prompt[-1], output[-1]
    rate = spread(rng, 1e-3, 5, count) * spread(rng, 1e-2, 10) * (rng.random(count) > 0.15)
    theta = spread(rng, 1e-3, 2, count)
    if rng.random() < 0.3:
        theta[rng.random(count) < 0.4] = 0
        rate[theta == 0] *= 10 ** -rng.uniform(0, 3)
    rate[theta > 0] *= load
    prices = [(0.1, 0.2), (1.0, 0.0), (0.0, 1.0), tuple(spread(rng, 1e-3, 1, 2))][rng.integers(4)]
    classes = [
        fo.WorkloadClass(
            f"class {i}",
            arrival_rate=rate[i],
            prompt_tokens=prompt[i],
            output_tokens=output[i],
            abandonment_rate=theta[i],
        )
        for i in range(count)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ContentionWarning)
        return fo.FluidModel(
            classes, gpus, prices=fo.TokenPrices(prompt=prices[0], output=prices[1]), charging=charging
        )


def solve_or_none(solve):
    try:
        return solve()
    except fo.InfeasibleModel:
        return None


@pytest.mark.parametrize("charging", ["bundled", "separate"])
@pytest.mark.parametrize("kind", ["pair", "raw pair", "chunks", "disaggregated", "two types", "fixed split"])
def test_certifies_and_equals_highs_on_random_models(kind, charging):
    rng = np.random.default_rng([len(kind), len(charging)])
    solved = queues = 0
    for _ in range(90):
        model = random_model(rng, kind, charging)
        problem, program = problem_of(model), model.program()
        assert applies(problem) is None
        solution = solve_or_none(lambda problem=problem: solve_capacity(problem))
        other = solve_or_none(lambda program=program: solve_program(program, "highs"))
        assert (solution is None) == (other is None)
        if solution is not None:
            check(program, solution)
            assert solution.objective == pytest.approx(other.certificate.objective, rel=1e-9, abs=1e-9)
            solved += 1
            queues += bool(np.nansum(solution.decode_queue) > 1e-6)
    assert solved >= 70
    # Prefills that are not decoded: where mixed modes decode faster, or where prefills are paid on their own.
    assert bool(queues) == (kind == "raw pair" or charging == "separate")


def extended(program, problem):
    """The program with rows for q_d = 0, bounds on admissions and a cap on prefills in service."""
    columns = {block.name: block.numbers for block in program.columns}
    classes, width = range(problem.arrival_rate.size), program.shape[1]
    speed = np.where(problem.chunk > 0, problem.chunk / problem.iteration_time, 0.0)
    rows = {"no_decode_queue": [], "admitted": [], "cap": []}

    def row(numbers, entries):
        full = np.zeros(width)
        full[numbers] = entries
        return full

    for i in classes:
        if problem.abandonment_rate[i] > 0 and not problem.decode_queue_allowed:
            rows["no_decode_queue"].append((row(columns["q_d"][i], 1.0), -np.inf, 0.0))
        prefills = columns["x"][i] >= 0
        admitted = row(columns["x"][i][prefills], speed[prefills] / problem.prompt_tokens[i])
        rows["admitted"].append((admitted, problem.admitted_lower[i], problem.admitted_upper[i]))
    rows["cap"].append((row(columns["x"][columns["x"] >= 0], 1.0), -np.inf, problem.prefill_cap))
    blocks, start = [], program.shape[0]
    for name, members in rows.items():
        blocks.append(Block(name, (tuple(map(str, range(len(members)))),), np.arange(len(members)) + start))
        start += len(members)
    matrix, lower, upper = zip(*(each for members in rows.values() for each in members), strict=True)
    return LinearProgram(
        objective=program.objective,
        matrix=sparse.csc_array(sparse.vstack([program.matrix, np.array(matrix)])),
        row_lower=np.concatenate([program.row_lower, lower]),
        row_upper=np.concatenate([program.row_upper, upper]),
        rows=program.rows + tuple(blocks),
        columns=program.columns,
    )


def random_limits(rng, problem):
    """Some of: no decode queue, lower and upper bounds, a cap."""
    rate, patient = problem.arrival_rate, problem.patient
    limits = {"decode_queue_allowed": bool(rng.random() < 0.25)}
    if rng.random() < 0.5:
        limits["admitted_upper"] = np.where(patient, rate, rate * rng.choice([0, 0.3, 0.9, 1, 2], rate.size))
    if rng.random() < 0.5 and not limits["decode_queue_allowed"]:
        most = limits.get("admitted_upper", rate)
        limits["admitted_lower"] = np.minimum(
            most, np.where(patient, rate, rate * rng.choice([0, 1e-3, 1e-2], rate.size))
        )
    if rng.random() < 0.5 and np.count_nonzero(problem.chunk) == 1:
        limits["prefill_cap"] = float(rng.choice([0.0, 0.02, 0.2, 1.0]) * rng.uniform(0.5, 1.2))
    return limits


@pytest.mark.parametrize("charging", ["bundled", "separate"])
@pytest.mark.parametrize("kind", ["pair", "raw pair", "chunks", "two types"])
def test_bounds_cap_and_no_decode_queue_certify_with_their_duals(kind, charging):
    rng = np.random.default_rng([len(kind), len(charging), 1])
    seen = {"lower": 0, "upper": 0, "cap": 0, "solved": 0}
    for _ in range(120):
        model = random_model(rng, kind, charging, load=10.0)
        problem = problem_of(model)
        problem = replace(problem, **random_limits(rng, problem))
        program = extended(model.program(), problem)
        solution = solve_or_none(lambda problem=problem: solve_capacity(problem))
        other = solve_or_none(lambda program=program: solve_program(program, "highs"))
        assert (solution is None) == (other is None)
        if solution is None:
            continue
        eta = solution.decode_balance[~problem.patient]
        check(
            program,
            solution,
            no_decode_queue=np.maximum(-problem.abandonment_rate[~problem.patient] * eta, 0.0),
            admitted=solution.admitted_lower_dual + solution.admitted_upper_dual,
            cap=[solution.prefill_cap_dual],
        )
        assert solution.objective == pytest.approx(other.certificate.objective, rel=1e-9, abs=1e-9)
        seen["solved"] += 1
        seen["lower"] += bool((solution.admitted_lower_dual[problem.admitted_lower > 0] < 0).any())
        seen["upper"] += bool((solution.admitted_upper_dual > 0).any())
        seen["cap"] += solution.prefill_cap_dual > 0
    assert seen["solved"] >= 80
    assert seen["lower"] >= 3
    assert seen["upper"] >= 5
    assert seen["cap"] >= (5 if "pair" in kind else 0)


def test_boxes_and_cap_equal_the_two_row_knapsack():
    # [L26] eq. (40) without decode queue: max sum w a over boxes, sum x <= cap, sum (g + e) x <= kappa B.
    rng = np.random.default_rng(7)
    feasible = 0
    for _ in range(150):
        count, batch, kappa = int(rng.integers(1, 12)), int(rng.integers(1, 33)), float(rng.uniform(0.3, 3))
        rate, prompt, output = (spread(rng, low, high, count) for low, high in ((1e-2, 2), (50, 5000), (50, 5000)))
        lower, upper = rate * rng.uniform(0, 0.1, count), rate * rng.uniform(0.2, 1.3, count)
        cap = float(rng.uniform(0.05, 1.5))
        problem = pair_problem(
            rate,
            prompt,
            output,
            batch=batch,
            kappa=kappa,
            admitted_lower=lower,
            admitted_upper=upper,
            prefill_cap=cap,
            decode_queue_allowed=False,
        )
        slots = prompt * 0.02 * kappa / 256
        decode = slots * (256 * output / prompt + kappa * batch - (batch - 1))
        worth = 0.1 * prompt + 0.2 * output
        bounds = np.column_stack([lower, np.minimum(upper, rate)])
        result = linprog(-worth, A_ub=[slots, decode], b_ub=[min(cap, 1.0), kappa * batch], bounds=bounds)
        solution = solve_or_none(lambda problem=problem: solve_capacity(problem))
        assert (solution is None) == (result.status == 2)
        if solution is not None:
            assert solution.objective == pytest.approx(-result.fun, rel=1e-9)
            feasible += 1
    assert feasible >= 60


@given(model=st.one_of(pair_models(), mode_models()))
@settings(max_examples=150)
def test_any_valid_model_certifies(model):
    check(model.program(), solve_capacity(problem_of(model)))


def test_rates_over_twelve_orders_of_magnitude():
    rng = np.random.default_rng(3)
    for _ in range(60):
        count = int(rng.integers(2, 80))
        rate = 10 ** rng.uniform(-12, 0, count) * 10 ** rng.uniform(0, 12)
        prompt, output = spread(rng, 10, 5000, count), spread(rng, 10, 5000, count)
        classes = [
            fo.WorkloadClass(
                f"class {i}",
                arrival_rate=rate[i],
                prompt_tokens=prompt[i],
                output_tokens=output[i],
                abandonment_rate=0.1,
            )
            for i in range(count)
        ]
        charging = ("bundled", "separate")[int(rng.integers(2))]
        gpu = random_gpu(rng, "pair")
        model = fo.FluidModel(classes, gpu, prices=fo.TokenPrices(prompt=0.1, output=0.2), charging=charging)
        check(model.program(), solve_capacity(problem_of(model)))


# ---- known numbers and edges ----------------------------------------------------------------------------------------


def test_reference_instance_bundled():
    # [L26] sections 6.1-6.2; numbers on which HiGHS and Clarabel agree.
    problem = problem_of(reference_model())
    solution = solve_capacity(problem)
    tau = problem.iteration_time[0]
    kappa, chunk_rate = tau / 0.022, 256 / tau
    prefill_price, decode_price = solution.prices
    assert solution.objective == pytest.approx(297.71619, abs=5e-6)
    assert solution.prefill.sum(axis=1) == pytest.approx([0.018261, 0.194953], abs=5e-7)
    assert solution.prefill_queue == pytest.approx([0.316687, 0], abs=5e-7)
    assert solution.decode_queue == pytest.approx([0, 0])
    assert solution.prefill_balance == pytest.approx([0, 264.45444], abs=5e-6)
    assert solution.decode_balance == pytest.approx([2.45266, 288.98107], abs=5e-6)
    assert decode_price / tau == pytest.approx(6.8390039, abs=5e-8)
    assert prefill_price * chunk_rate - (kappa * 16 - 15) * decode_price / tau == pytest.approx(0, abs=1e-12)
    assert solution.decode_slots == pytest.approx([decode_price / tau, kappa * decode_price / tau])


def test_reference_instance_separate():
    solution = solve_capacity(problem_of(reference_model("separate")))
    assert solution.objective == pytest.approx(298.59798, abs=5e-6)
    assert solution.prefill.sum(axis=1) == pytest.approx([0.019495, 0.194953], abs=5e-7)
    assert solution.prefill_queue == pytest.approx([0, 0])


@pytest.mark.parametrize("charging", ["bundled", "separate"])
def test_the_plan_leaves_the_allocation_as_it_is(charging):
    rng = np.random.default_rng(11)
    compared = 0
    for kind in ("pair", "raw pair", "chunks", "two types", "disaggregated") * 8:
        model = random_model(rng, kind, charging)
        solution = solve_or_none(lambda model=model: solve_capacity(problem_of(model)))
        if solution is None:
            continue
        program = model.program()
        values, duals = assemble(program, solution)
        plan = Plan.from_solution(
            model, program, Solution(values, duals, certify(program, values, duals), "structured")
        )
        assert plan.solution.values == pytest.approx(values, rel=1e-9, abs=1e-9)
        compared += 1
    assert compared >= 30


def test_everything_fits_at_zero_prices():
    solution = solve_capacity(pair_problem([0.01, 0.02], [300.0, 3000.0], [1000.0, 400.0]))
    assert solution.prices == (0.0, 0.0)
    assert solution.prefill_queue == pytest.approx([0, 0], abs=1e-15)
    assert solution.prefill_balance == pytest.approx([230.0, 380.0])
    assert solution.fleet == pytest.approx([0.0])


@pytest.mark.parametrize("charging", ["bundled", "separate"])
def test_nothing_arrives(charging):
    solution = solve_capacity(pair_problem([0.0, 0.0], [300.0, 3000.0], [1000.0, 400.0], charging=charging))
    assert solution.objective == 0
    assert solution.mode_share == pytest.approx([0, 1])
    assert solution.decode_balance == pytest.approx([230.0, 380.0] if charging == "bundled" else [200.0, 80.0])


def test_one_class_one_slot():
    # B = 1: a GPU prefills (P tau/C s per request) or decodes (D/gamma s).
    solution = solve_capacity(pair_problem([5.0], [300.0], [1000.0], batch=1))
    each = 300 * 0.03 / 256 + 1000 * 0.02
    assert solution.objective == pytest.approx(230.0 / each)
    assert solution.mode_share == pytest.approx([300 * 0.03 / 256 / each, 20 / each])
    assert solution.fleet == pytest.approx([230.0 / each])


def test_kappa_at_the_bound_leaves_no_decode_queue():
    batch = 16
    solution = solve_capacity(
        pair_problem([2.0, 0.5], [300.0, 3000.0], [1000.0, 400.0], batch=batch, kappa=(batch - 1) / batch)
    )
    assert solution.decode_queue == pytest.approx([0, 0], abs=1e-12)
    # Mixed and solo decode 800 tokens/s alike, so prefill is free and decode alone limits.
    assert solution.prices[0] == pytest.approx(0, abs=1e-12)
    served = np.array([(800 - 0.5 * 400) / 1000, 0.5])
    assert solution.objective == pytest.approx(served @ [230, 380])


def test_below_the_bound_prefills_are_thrown_away():
    # kappa = 1/2: mixed GPUs decode 15/0.01, solo ones 16/0.02 tokens/s, so all are mixed as far as prefills last.
    problem = pair_problem([2.0, 2.0], [300.0, 3000.0], [1000.0, 400.0], kappa=0.5)
    queued, imposed = solve_capacity(problem), solve_capacity(replace(problem, decode_queue_allowed=False))
    work = 2 * (300 + 3000) * 0.01 / 256
    assert queued.mode_share == pytest.approx([work, 1 - work])
    assert queued.decode_queue.sum() > 0.1
    assert queued.objective > imposed.objective
    assert imposed.decode_queue == pytest.approx([0, 0], abs=1e-12)
    assert imposed.prices[0] < 0


def test_without_a_decode_queue_both_charging_schemes_agree():
    problem = pair_problem([0.5, 0.5], [300.0, 3000.0], [1000.0, 400.0], decode_queue_allowed=False)
    bundled, separate = solve_capacity(problem), solve_capacity(replace(problem, charging="separate"))
    assert bundled.objective == pytest.approx(separate.objective)
    assert bundled.prefill == pytest.approx(separate.prefill)


def test_patient_classes_may_fill_the_fleet_exactly():
    # 0.5 requests/s of 1600 output tokens take all 800 that 16 solo slots decode, prompts almost nothing.
    problem = pair_problem([0.5, 1.0], [1e-12, 100.0], [1600.0, 100.0], abandonment_rate=[0.0, 0.1])
    solution = solve_capacity(problem)
    assert served_share(problem, solution) == pytest.approx([1, 0], abs=1e-9)
    assert np.isnan(solution.prefill_queue[0])
    assert np.isnan(solution.decode_queue[0])


# ---- prices ---------------------------------------------------------------------------------------------------------


def slope(problem, change, step=1e-6):
    """d(maximum)/d(amount), by central difference, of what ``change(problem, amount)`` alters."""
    up, down = (solve_capacity(change(problem, amount)).objective for amount in (step, -step))
    return (up - down) / (2 * step)


@pytest.mark.parametrize("kappa", [0.5, 1.5])
@pytest.mark.parametrize("charging", ["bundled", "separate"])
@pytest.mark.parametrize("queue", [True, False])
def test_duals_are_derivatives(kappa, charging, queue):
    rate = np.array([0.3, 0.2, 0.05, 0.4])
    problem = pair_problem(
        rate,
        [300.0, 3000.0, 800.0, 100.0],
        [1000.0, 400.0, 700.0, 900.0],
        abandonment_rate=[0.1, 0.2, 0.0, 0.3],
        kappa=kappa,
        charging=charging,
        decode_queue_allowed=queue,
        admitted_upper=[0.3, 0.1, 0.05, 0.4],
    )
    solution = solve_capacity(problem)
    for i in (0, 3):
        unit = np.eye(4)[i]

        def arrivals(each, amount, unit=unit):
            return replace(
                each, arrival_rate=each.arrival_rate + amount * unit, admitted_upper=each.admitted_upper + amount * unit
            )

        assert slope(problem, arrivals) == pytest.approx(solution.prefill_balance[i], rel=1e-6, abs=1e-6)

    def patient(each, amount):
        more = amount * np.eye(4)[2]
        return replace(each, arrival_rate=each.arrival_rate + more, admitted_upper=each.admitted_upper + more)

    def ceiling(each, amount):
        return replace(each, admitted_upper=each.admitted_upper + amount * np.eye(4)[1])

    def fleet(each, amount):
        return replace(each, share=each.share + amount)

    def slots(each, amount):
        return replace(each, decode_slots=each.decode_slots + amount * np.array([0, 1]))

    assert slope(problem, patient) == pytest.approx(solution.prefill_balance[2], rel=1e-6, abs=1e-6)
    assert slope(problem, ceiling) == pytest.approx(solution.admitted_upper_dual[1], rel=1e-6, abs=1e-6)
    assert slope(problem, fleet) == pytest.approx(solution.fleet[0], rel=1e-6, abs=1e-6)
    assert slope(problem, slots) == pytest.approx(solution.decode_slots[1] * solution.mode_share[1], rel=1e-6, abs=1e-6)


def test_duals_of_lower_bound_and_cap_are_derivatives():
    problem = pair_problem(
        [1.0, 1.0],
        [300.0, 3000.0],
        [1000.0, 400.0],
        admitted_lower=[0.5, 0.0],
        prefill_cap=0.1,
        decode_queue_allowed=False,
    )
    solution = solve_capacity(problem)
    assert solution.prefill_cap_dual > 0
    assert slope(problem, lambda each, step: replace(each, prefill_cap=each.prefill_cap + step)) == pytest.approx(
        solution.prefill_cap_dual
    )
    crowded = replace(problem, prefill_cap=np.inf)
    solution = solve_capacity(crowded)
    assert solution.admitted_lower_dual[0] < 0
    assert slope(
        crowded, lambda each, step: replace(each, admitted_lower=each.admitted_lower + step * np.eye(2)[0])
    ) == pytest.approx(solution.admitted_lower_dual[0])


def test_margins_are_a_price_threshold_in_output_over_prompt():
    rng = np.random.default_rng(5)
    for _ in range(50):
        count = 40
        problem = pair_problem(spread(rng, 1e-3, 1, count), spread(rng, 50, 5000, count), spread(rng, 50, 2000, count))
        solution = solve_capacity(problem)
        share = served_share(problem, solution)
        assert share[solution.margin > 0] == pytest.approx(1)
        assert share[solution.margin < 0] == pytest.approx(0)
        part = (share > 1e-9) & (share < 1 - 1e-9)
        assert part.sum() <= 2
        value = 0.1 * problem.prompt_tokens + 0.2 * problem.output_tokens
        price = problem.prompt_tokens * solution.prices[0] + problem.output_tokens * solution.prices[1]
        assert solution.margin == pytest.approx(value - price, rel=1e-9, abs=1e-9 * value.max())


@pytest.mark.parametrize("charging", ["bundled", "separate"])
@pytest.mark.parametrize("load", [0.3, 1.0, 3.0, 50.0])
def test_ties_are_equalised(charging, load):
    # Two kinds of class, each split over several with different rates; the last kind is twice the second's size.
    prompt = np.array([300.0, 300.0, 300.0, 2000.0, 2000.0, 4000.0])
    output = np.array([900.0, 900.0, 900.0, 300.0, 300.0, 600.0])
    rate = load * np.array([0.1, 0.01, 0.3, 0.2, 0.05, 0.1])
    problem = pair_problem(rate, prompt, output, charging=charging)
    share = served_share(problem, solve_capacity(problem))
    assert share[:3] == pytest.approx(share[0])
    assert share[3:] == pytest.approx(share[3])


def test_impatient_classes_share_the_decodes_evenly_under_separate_charging():
    problem = pair_problem(
        [1.0, 1.0, 0.1],
        [300.0, 3000.0, 500.0],
        [1000.0, 400.0, 500.0],
        abandonment_rate=[0.1, 0.2, 0.0],
        charging="separate",
    )
    solution = solve_capacity(problem)
    admitted = (solution.prefill * problem.chunk / problem.iteration_time).sum(axis=1) / problem.prompt_tokens
    completed = served_share(problem, solution) * problem.arrival_rate
    assert completed[2] == pytest.approx(admitted[2])
    assert completed[0] / admitted[0] == pytest.approx(completed[1] / admitted[1])
    assert completed[0] < 0.9 * admitted[0]


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_patient_classes_that_do_not_fit_are_named_with_their_loads():
    rate, prompt, output = [0.5, 0.5, 0.1], [300.0, 3000.0, 10.0], [1000.0, 400.0, 10.0]
    for theta in ([0.0, 0.0, 0.1], [0.0, 0.0, 0.0]):
        with pytest.raises(fo.InfeasibleModel, match="do not fit together") as caught:
            solve_capacity(pair_problem(rate, prompt, output, abandonment_rate=np.array(theta) * 1.0, kappa=2.5))
        message = str(caught.value)
        assert "class 0 150 + 500" in message
        assert "class 1 1500 + 200" in message
        assert ("class 2" in message) == (theta[2] == 0)
        assert "of at most 5120 prompt tokens/s" in message
    # Each alone fits.
    for i in (0, 1):
        theta = np.where(np.arange(3) == i, 0.0, 0.1)
        solve_capacity(pair_problem(rate, prompt, output, abandonment_rate=theta, kappa=2.5))


def test_lower_bounds_that_do_not_fit():
    many = 12
    with pytest.raises(fo.InfeasibleModel, match=r"have a lower bound\) do not fit .*; and 6 more\)"):
        solve_capacity(
            pair_problem(
                np.ones(many),
                np.full(many, 300.0),
                np.full(many, 1000.0),
                admitted_lower=np.full(many, 0.9),
                decode_queue_allowed=False,
            )
        )
    with pytest.raises(fo.InfeasibleModel, match="of at most 0 prompt tokens/s"):
        solve_capacity(pair_problem([1.0], [300.0], [1.0], abandonment_rate=[0.0], prefill_cap=0.0))


GOOD = pair_problem([0.5, 0.5], [300.0, 3000.0], [1000.0, 400.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrival_rate": [0.5, -1.0]}, r"arrival_rate must be at least 0 and finite. Got -1.0 at 1"),
        ({"arrival_rate": [[0.5, 0.5]]}, "arrival_rate must have shape"),
        ({"arrival_rate": [0.5, np.inf]}, "Got inf at 1"),
        ({"abandonment_rate": [0.5, np.nan]}, "abandonment_rate must be at least 0 and finite. Got nan at 1"),
        ({"prompt_tokens": [300.0, 0.0]}, "prompt_tokens must be above 0"),
        ({"output_tokens": [300.0]}, r"output_tokens must have shape \(2,\). Got \(1,\)"),
        ({"iteration_time": [0.03, np.inf]}, "iteration_time must be finite in mode 1"),
        ({"share": [0.0]}, "share must be above 0"),
        ({"gpu_type": [0, 2]}, "gpu_type must number the types"),
        ({"prompt_price": -0.1}, "prompt_price must be at least 0"),
        ({"prompt_price": 0.0, "output_price": 0.0}, "both 0"),
        ({"charging": "free"}, "charging must be 'bundled' or 'separate'. Got 'free'"),
        ({"prefill_cap": np.nan}, "prefill_cap must be at least 0"),
        ({"admitted_lower": [0.6, 0.0]}, "class 0 must be admitted at 0.6/s or more and at 0.5/s or less"),
        (
            {"abandonment_rate": [0.0, 0.1], "admitted_upper": [0.4, 1.0]},
            "class that never abandons is admitted in full",
        ),
    ],
)
def test_bad_numbers_are_refused(changes, message):
    with pytest.raises(fo.InvalidInput, match=message):
        replace(GOOD, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": [256, 128]}, "GPU type 0 has no mode without prefill"),
        ({"admitted_lower": [0.1, 0.0]}, "impose decode_queue_allowed=False"),
        (
            {
                "chunk": [256, 0, 128],
                "decode_slots": [15, 16, 15],
                "iteration_time": [0.03, 0.02, 0.025],
                "gpu_type": [0, 0, 0],
                "prefill_cap": 0.5,
            },
            "only with one prefill mode, not 2",
        ),
    ],
)
def test_problems_that_it_does_not_solve_are_refused_with_the_reason(changes, message):
    problem = replace(GOOD, **changes)
    assert message in applies(problem)
    with pytest.raises(fo.InvalidInput, match=message):
        solve_capacity(problem)


# ---- many classes ---------------------------------------------------------------------------------------------------


# At these multiples of the decode capacity: all fits, a boundary of the zonogon meets F, F's vertex lies inside it.
LOADS = [0.3, 1.2, 40.0]


def many_classes(count, load, **changes):
    rng = np.random.default_rng(count)
    rate, prompt, output = 10 ** rng.uniform(-6, 0, count), spread(rng, 50, 5000, count), spread(rng, 50, 2000, count)
    return pair_problem(rate * load * 16 / 0.02 / (rate @ output), prompt, output, **changes)


@pytest.mark.parametrize("charging", ["bundled", "separate"])
@pytest.mark.parametrize("load", LOADS)
def test_many_classes_meet_their_own_dual_bound(load, charging):
    problem = many_classes(200_000, load, charging=charging)
    solution = solve_capacity(problem)
    assert (solution.prices[1] > 0) == (load > 1)
    assert bool(np.all(solution.margin == 0)) == (load == LOADS[-1])
    assert np.count_nonzero((solution.prefill_queue > 0) & (solution.prefill.sum(axis=1) > 0)) <= 2
    bound = problem.share @ solution.fleet + problem.arrival_rate @ solution.prefill_balance
    assert solution.objective == pytest.approx(bound, rel=EXACT)
    assert solution.prefill.sum(axis=0) == pytest.approx(solution.mode_share * [1, 0], rel=EXACT)
    assert np.all(solution.decode.sum(axis=0) <= solution.mode_share * problem.decode_slots * (1 + EXACT))
    admitted = solution.prefill[:, 0] * 256 / (0.03 * problem.prompt_tokens)
    completed = served_share(problem, solution) * problem.arrival_rate
    np.testing.assert_allclose(admitted + 0.1 * solution.prefill_queue, problem.arrival_rate, rtol=EXACT)
    np.testing.assert_allclose(completed + 0.1 * solution.decode_queue, admitted, rtol=EXACT, atol=1e-300)


@pytest.mark.parametrize("load", LOADS)
def test_time_grows_like_sorting(load):
    """Twice the classes, about twice the time; best of several alternating runs, as other work disturbs single ones."""
    problems = [many_classes(count, load) for count in (100_000, 200_000)]
    best = [float("inf")] * 2
    for _ in range(10):
        for at, problem in enumerate(problems):
            began = time.perf_counter()
            solve_capacity(problem)
            best[at] = min(best[at], time.perf_counter() - began)
    assert best[1] < 3.5 * best[0]
