"""Hardware studies: every point against other solvers and closed forms, upgrades against envelopes, chunks by force."""

import io
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog
from strategies import build, random_models

import fluidopt as fo
from fluidopt.data import known_gpu, known_gpus
from fluidopt.solvers.knapsack import solve_capacity
from fluidopt.solvers.structured import capacity_problem
from fluidopt.studies.hardware.chunk_size import optimal_chunk
from fluidopt.studies.hardware.figures import plot_hardware, plot_landscape
from fluidopt.studies.hardware.study import chunk_slope, compare_gpus, hardware_study, hardware_upgrades, user_tpot
from fluidopt.studies.hardware.values import price_bound

TPOT = fo.SlotTPOT(at_most=0.0235)


def with_numbers(model, *, levels=None, **numbers):
    """The model with other numbers of its one GPU type, built from scratch."""
    (gpu,) = model.gpu_types
    of_curve = {name: numbers.pop(name) for name in ("alpha", "beta", "solo", "physical") if name in numbers}
    changed = replace(gpu, curve=replace(gpu.curve, **of_curve), **numbers)
    scenario = model.scenario
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ContentionWarning)
        return fo.FluidModel(
            model.workload,
            changed,
            prices=scenario.prices,
            charging=scenario.charging,
            service_levels=scenario.service_levels if levels is None else levels,
        )


def busy(model, factor=3.0):
    """The model at so many times its arrivals, where capacity decides."""
    return fo.FluidModel(
        model.workload.scaled(factor),
        model.gpu_types[0],
        prices=model.scenario.prices,
        charging=model.scenario.charging,
    )


def two_row_knapsack(model):
    """R* where kappa >= (B-1)/B, by the reduction to two rows, max sum w mu_p x, and through another solver."""
    (gpu,) = model.gpu_types
    mixed, solo = gpu.modes()
    tau, batch = mixed.iteration_time, gpu.batch_size
    kappa = tau / solo.iteration_time
    load = model.workload
    rate = mixed.chunk / (load.prompt_tokens * tau)
    value = model.scenario.prices.prompt * load.prompt_tokens + model.scenario.prices.output * load.output_tokens
    work = mixed.chunk * load.output_tokens / load.prompt_tokens + kappa * batch - (batch - 1)
    found = linprog(
        -value * rate,
        A_ub=np.array([np.ones(len(load)), work]),
        b_ub=[1.0, kappa * batch],
        bounds=[(0.0, each) for each in load.arrival_rate / rate],
    )
    return -found.fun


# ---- points ---------------------------------------------------------------------------------------------------------


def test_landscape_is_the_two_row_knapsack(reference):
    model = busy(reference)
    study = hardware_study(model, batch_size=[2, 9, 16, 40], beta=[1e-5, 6.2e-5, 1e-3])
    assert study.revenue_rate.shape == (4, 3)
    for row in study.to_frame().itertuples():
        point = with_numbers(model, batch_size=int(row.batch_size), beta=row.beta)
        assert row.revenue_rate == pytest.approx(two_row_knapsack(point), rel=1e-9)
        assert row.kappa == pytest.approx(point.gpu_types[0].kappa)


@pytest.mark.parametrize("charging", ["bundled", "separate"])
@pytest.mark.parametrize("below", [False, True])
def test_points_are_optimal_plans_of_another_solver(charging, below):
    for model in random_models(5, 4, charging=charging, below_bound=below, patient=not below):
        study = hardware_study(model, alpha=[0.5 * model.gpu_types[0].curve.alpha, model.gpu_types[0].curve.alpha])
        for at, alpha in enumerate(study.axes["alpha"]):
            plan = with_numbers(model, alpha=alpha).solve("highs")
            found = study.performance
            assert found.revenue_rate[at] == pytest.approx(plan.revenue_rate, rel=1e-7)
            assert found.bound[at] == pytest.approx(found.revenue_rate[at], rel=1e-7)


def test_times_per_token_are_those_of_the_plan_and_of_the_closed_form(reference):
    for factor in (1.0, 3.0):
        model = busy(reference, factor)
        study = hardware_study(model, batch_size=[4, 16, 30])
        for at, batch in enumerate([4, 16, 30]):
            point = with_numbers(model, batch_size=batch)
            plan = point.solve()
            mixed, solo = (mode.iteration_time for mode in point.gpu_types[0].modes())
            share = plan.mode_share[0]
            tokens = point.workload.output_tokens @ plan.throughput
            # Decode-only slots fill first; the rest of the tokens comes at the pace of mixed iterations.
            fast = min(1.0, batch * (1 - share) / solo / tokens)
            assert study.performance.user_tpot[at] == pytest.approx(fast * solo + (1 - fast) * mixed)
            assert user_tpot(plan) == pytest.approx(study.performance.user_tpot[at])
            slots = np.array([(batch - 1) * share, batch * (1 - share)])
            assert study.performance.slot_average_tpot[at] == pytest.approx(slots @ [mixed, solo] / slots.sum())
            assert study.performance.prefill_share[at] == pytest.approx(share)


def test_no_price_of_capacity_bounds_below_the_optimum():
    rng = np.random.default_rng(3)
    for charging in ("bundled", "separate"):
        for model in random_models(8, 5, charging=charging, patient=True):
            problem = capacity_problem(model)
            best = solve_capacity(problem).objective
            for pi, v in zip(rng.normal(scale=0.3, size=20), rng.exponential(0.3, 20), strict=True):
                assert price_bound(problem, (pi, v)) >= best * (1 - 1e-9)


def test_better_hardware_never_earns_less():
    for model in random_models(11, 6):
        curve = model.gpu_types[0].curve
        rising = hardware_study(model, batch_size=[2, 3, 5, 9, 17, 33]).revenue_rate
        assert (np.diff(rising) >= -1e-9 * rising.max()).all()
        for name in ("alpha", "beta", "solo"):
            falling = hardware_study(
                model, **{name: getattr(curve, name) * np.array([0.3, 0.7, 1.0, 1.5])}
            ).revenue_rate
            assert (np.diff(falling) <= 1e-9 * falling.max()).all(), name


def test_gamma_is_the_inverse_of_solo(reference):
    by_speed = hardware_study(reference, gamma=[10.0, 30.0, 50.0])
    by_time = hardware_study(reference, solo=[1 / 50.0, 1 / 30.0, 1 / 10.0])
    np.testing.assert_allclose(by_speed.revenue_rate, by_time.revenue_rate[::-1])
    assert by_speed.present("gamma") == pytest.approx(1 / 0.022)


def test_promises_hold_at_every_point_or_the_point_is_missing(reference):
    model = with_numbers(reference, levels=[TPOT])
    study = hardware_study(model, batch_size=[8, 16, 24], beta=[1e-5, 6.2e-5])
    for row in study.to_frame().itertuples():
        plan = with_numbers(model, batch_size=int(row.batch_size), beta=row.beta).solve("highs")
        assert row.revenue_rate == pytest.approx(plan.revenue_rate, rel=1e-6)
        assert row.slot_average_tpot <= TPOT.at_most * (1 + 1e-6)
    slow = hardware_study(model, solo=[0.02, 0.03])  # decodes alone already take longer than promised
    assert np.isfinite(slow.revenue_rate).tolist() == [True, False]
    assert "no plan keeps the promises at 1" in slow.headline
    first = fo.FluidModel(  # a prompt of 3000 tokens takes 0.39 s at chunk 256, and 2 s at chunk 32
        reference.workload.scaled(0.1),
        reference.gpu_types[0],
        prices=reference.scenario.prices,
        service_levels=[fo.MeanTTFT(at_most=1.0, of="served")],
    )
    assert np.isfinite(hardware_study(first, chunk_size=[32, 256]).revenue_rate).tolist() == [False, True]


def test_studies_of_one_of_several_types(reference):
    (gpu,) = reference.gpu_types
    other = replace(gpu, name="other", share=0.25, curve=replace(gpu.curve, alpha=0.01))
    model = fo.FluidModel(
        reference.workload.scaled(2), [replace(gpu, share=0.75), other], prices=reference.scenario.prices
    )
    study = hardware_study(model, gpu="other", batch_size=[8, 32])
    for at, batch in enumerate([8, 32]):
        types = [model.gpu_types[0], replace(other, batch_size=batch)]
        plan = fo.FluidModel(model.workload, types, prices=model.scenario.prices).solve("highs")
        assert study.revenue_rate[at] == pytest.approx(plan.revenue_rate, rel=1e-7)
    with pytest.raises(fo.InvalidInput, match=r"gpu must be one of the model's types \['A100/Qwen-8B', 'other'\]"):
        hardware_study(model, batch_size=[8])


# ---- the paper's curves ---------------------------------------------------------------------------------------------


def test_revenue_saturates_where_the_last_arrival_fits(reference):
    mixed, solo = reference.gpu_types[0].modes()
    load = reference.workload
    share = load.prompt_tokens @ load.arrival_rate / mixed.prefill_speed
    tokens = load.output_tokens @ load.arrival_rate
    speed = share * mixed.decode_speed, (1 - share) * solo.decode_speed
    fits = math.ceil((tokens + speed[0]) / sum(speed))  # (B-1) S/tau + B (1-S) gamma = tokens
    study = hardware_study(reference, batch_size=range(1, 65))
    assert study.saturates_at(1.0) == fits
    assert study.saturates_at(0.99) <= fits
    assert abs(fits - 16) <= 2  # "near B = 16", [L26] section 6.3
    assert study.revenue_rate[-1] == pytest.approx(305.0)  # everything served: 0.5 (230 + 380)


def test_revenue_falls_steeply_in_beta_and_hardly_in_alpha(reference):
    beta = hardware_study(reference, beta=np.geomspace(1e-5, 1e-3, 15)).revenue_rate
    alpha = hardware_study(reference, alpha=np.linspace(0.015, 0.02, 5)).revenue_rate
    assert beta[-1] < 0.5 * beta[0]
    assert alpha[-1] > 0.97 * alpha[0]


# ---- upgrades -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gradient_is_the_envelope_of_the_capacity_prices(reference, factor):
    """dR*/dtau_k = -phi_k (pi C_k + v b_k)/tau_k^2, as modes matter only through (C_k, b_k)/tau_k."""
    model = busy(reference, factor)
    problem = capacity_problem(model)
    answer = solve_capacity(problem)
    pi, v = answer.prices
    slope = -answer.mode_share * (pi * problem.chunk + v * problem.decode_slots) / problem.iteration_time**2
    gradient = hardware_upgrades(model).gradient
    # The short step of 1e-4 bends the secant off the slope by about as much.
    assert gradient["alpha"] == pytest.approx(slope[0], rel=1e-3)
    assert gradient["beta"] == pytest.approx(256 * slope[0], rel=1e-3)
    assert gradient["solo"] == pytest.approx(slope[1], rel=1e-3)
    one_more = two_row_knapsack(with_numbers(model, batch_size=17)) - two_row_knapsack(model)
    assert gradient["batch_size"] == pytest.approx(one_more, rel=1e-6)


def test_upgrades_are_re_solved(reference):
    model = busy(reference)
    upgrades = hardware_upgrades(model, step=0.25)
    base = two_row_knapsack(model)
    better = {
        "memory": {"batch_size": 20},
        "compute": {"beta": 0.75 * 6.2e-5},
        "memory bandwidth": {"alpha": 0.75 * 0.0174, "solo": 0.75 * 0.022},
        "memory and compute": {"batch_size": 20, "beta": 0.75 * 6.2e-5},
    }
    for name, numbers in better.items():
        assert upgrades.gains[name] == pytest.approx(two_row_knapsack(with_numbers(model, **numbers)) - base, rel=1e-6)
    frame = upgrades.to_frame()
    assert frame.loc["memory", "elasticity"] == pytest.approx(upgrades.gains["memory"] / base / 0.25)
    assert frame.loc["compute", "hourly_gain"] == pytest.approx(3600 * upgrades.gains["compute"])
    first = max(("memory", "compute", "memory bandwidth"), key=upgrades.gains.get)
    assert upgrades.advice.startswith(f"Buy {first} first")


def test_advice_where_nothing_helps_and_where_a_promise_suffers(reference):
    assert "No upgrade by 10% earns more" in hardware_upgrades(busy(reference, 0.2)).advice
    held = hardware_upgrades(with_numbers(reference, levels=[TPOT]))
    assert held.gains["memory"] < 0 < held.gains["compute"]
    assert "More memory alone makes a promise dearer to keep" in held.advice


def test_a_tabulated_curve_has_memory_to_upgrade_only(reference):
    table = fo.GPU(read_table([[0.025], [0.04]], [0.02]), batch_size=8, chunk_size=128, name="table", kv_tokens=None)
    model = fo.FluidModel(reference.workload, table, prices=reference.scenario.prices)
    assert set(hardware_upgrades(model).better) == {"memory"}
    with pytest.raises(fo.InvalidInput, match="tabulated curve, which has no beta"):
        hardware_study(model, beta=[1e-5])


def read_table(mixed, alone):
    """A tabulated curve over chunks 128 and 512 at 8 decodes."""
    from fluidopt.curves import TabulatedTime

    return TabulatedTime(
        chunk=[128, 512],
        decodes=[8],
        kv_tokens=[0.0],
        mixed_seconds=[[row] for row in mixed],
        decode_only_seconds=[alone],
    )


# ---- types ----------------------------------------------------------------------------------------------------------


def test_at_its_break_even_price_a_type_earns_what_the_present_one_does(reference):
    (gpu,) = reference.gpu_types
    model = fo.FluidModel(
        reference.workload.scaled(3), replace(gpu, hourly_price=3.0e5), prices=reference.scenario.prices
    )
    names = ["qwen-4b/a100-sxm-40gb", "llama-3.1-8b/h100-sxm"]
    offers = [known_gpu(name, batch_size=32, chunk_size=256) for name in names]
    frame = compare_gpus(model, offers).to_frame()
    assert list(frame.index) == [gpu.name, *names]
    for offer in offers:
        plan = fo.FluidModel(model.workload, offer, prices=model.scenario.prices).solve("highs")
        assert frame.loc[offer.name, "revenue_rate"] == pytest.approx(plan.revenue_rate, rel=1e-7)
    priced = [replace(each, hourly_price=frame.loc[each.name, "break_even_price"]) for each in offers]
    profits = compare_gpus(model, priced).to_frame()["hourly_profit"]
    np.testing.assert_allclose(profits, profits.iloc[0])
    cheap = compare_gpus(model, [replace(priced[0], hourly_price=0.0), priced[1]])
    assert f"{names[0]} is the best buy" in cheap.statement
    assert "Give every GPU an hourly_price" in compare_gpus(model, offers).statement


def test_the_slope_in_the_chunk_is_that_of_the_curve():
    for name in known_gpus().index:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fo.ContentionWarning)
            gpu = known_gpu(name, batch_size=8, chunk_size=1000)
        cached = gpu.kv_tokens or 0.0
        beyond = gpu.curve.mixed(1000.5, 7, cached) - gpu.curve.mixed(999.5, 7, cached)
        assert chunk_slope(gpu) == pytest.approx(beyond, rel=1e-6)
    table = fo.GPU(read_table([[0.025], [0.04]], [0.02]), batch_size=8, chunk_size=256)
    assert chunk_slope(table) == pytest.approx(0.015 / 384)


def test_beta_moves_all_pieces_of_a_curve():
    gpu = known_gpu("llama-3.1-8b/h100-sxm", batch_size=32, chunk_size=2048)
    assert gpu.curve.chunk_kinks
    model = fo.FluidModel(fo.reference_model().workload.scaled(30), gpu, prices=fo.TokenPrices(prompt=0.1, output=0.2))
    half = 0.5 * chunk_slope(gpu)
    kinks = tuple(replace(kink, slope=0.5 * kink.slope) for kink in gpu.curve.chunk_kinks)
    faster = replace(gpu, curve=replace(gpu.curve, beta=0.5 * gpu.curve.beta, chunk_kinks=kinks))
    plan = fo.FluidModel(model.workload, faster, prices=model.scenario.prices).solve("highs")
    study = hardware_study(model, beta=[half, 2 * half])
    assert study.revenue_rate[0] == pytest.approx(plan.revenue_rate, rel=1e-7)
    assert study.revenue_rate[0] > study.revenue_rate[1] == pytest.approx(model.solve().revenue_rate)
    assert study.present("beta") == pytest.approx(2 * half)
    upgrades = hardware_upgrades(model, step=0.5)
    assert upgrades.gains["compute"] == pytest.approx(plan.revenue_rate - model.solve().revenue_rate, rel=1e-6)


# ---- chunks ---------------------------------------------------------------------------------------------------------


def force(model, chunks):
    """The best chunk's revenue by solving each with HiGHS."""
    earned = {}
    for chunk in chunks:
        try:
            earned[chunk] = with_numbers(model, chunk_size=int(chunk)).solve("highs").revenue_rate
        except fo.InfeasibleModel:
            earned[chunk] = -np.inf
    return earned


def test_chunk_against_brute_force():
    for charging in ("bundled", "separate"):
        for model in random_models(21, 3, charging=charging):
            chunks = [1, 3, 10, 30, 80, 130, 200, 400, 900]
            choice = optimal_chunk(model, chunks=chunks)
            earned = force(model, chunks)
            assert choice.revenue_rate == pytest.approx(max(earned.values()), rel=1e-7)
            assert earned[choice.chunk_size] == pytest.approx(choice.revenue_rate, rel=1e-7)
            assert choice.plan.revenue_rate == pytest.approx(choice.revenue_rate, rel=1e-7)
            assert choice.mixture >= choice.revenue_rate * (1 - 1e-9)
            assert choice.proven
            larger = with_numbers(model, chunk_size=3000).solve().revenue_rate
            assert choice.larger_bound >= larger * (1 - 1e-9)


def test_mixture_is_the_program_of_all_chunks_as_modes(reference):
    model = busy(reference)
    (gpu,) = model.gpu_types
    chunks = [16, 74, 150, 256, 1000]
    plan = fo.FluidModel(model.workload, gpu.with_modes(chunks=chunks), prices=model.scenario.prices).solve("highs")
    assert optimal_chunk(model, chunks=chunks).mixture == pytest.approx(plan.revenue_rate, rel=1e-7)


def test_chunk_under_a_promise_against_brute_force(reference):
    model = with_numbers(busy(reference, 1.5), levels=[fo.SlotTPOT(at_most=0.0245)])
    chunks = range(60, 160, 3)
    choice = optimal_chunk(model, chunks=chunks)
    earned = force(model, chunks)
    assert choice.revenue_rate == pytest.approx(max(earned.values()), rel=1e-6)
    assert choice.proven
    solved = np.isfinite(choice.performance.revenue_rate)
    assert (choice.without_promises[~solved] <= choice.revenue_rate * (1 + 1e-9)).all() or solved.all()
    assert np.isnan(choice.to_frame()["revenue_rate"]).sum() == (~solved).sum()


def test_a_promise_is_searched_only_as_far_as_it_can_matter(reference):
    model = with_numbers(busy(reference, 1.5), levels=[fo.MeanTPOT(at_most=0.1)])  # loose: it costs nothing
    choice = optimal_chunk(model, largest=300)
    assert choice.proven
    assert np.isfinite(choice.performance.revenue_rate).sum() < 150
    free = optimal_chunk(busy(reference, 1.5), largest=300)
    assert choice.revenue_rate == pytest.approx(free.revenue_rate)
    assert choice.chunk_size == free.chunk_size


def test_up_to_b0_a_chunk_costs_nothing(reference):
    choice = optimal_chunk(reference, largest=300)
    b0 = reference.gpu_types[0].curve.crossover_chunk
    assert choice.chunk_size == math.floor(b0)
    assert choice.chunk_size in choice.as_good
    assert "earn the same" in choice.statement
    assert "Up to it an iteration takes no longer than decodes alone" in choice.statement
    alone = optimal_chunk(busy(reference, 1.2), largest=300)  # some wait now, and only b0's neighbours are in question
    assert alone.chunk_size in (math.floor(b0), math.ceil(b0))


def test_where_the_line_passes_below_the_solo_point_the_largest_chunk_is_best(reference):
    """alpha > (B-1)/(B gamma): fewer, longer iterations lose fewer decode slots."""
    model = with_numbers(busy(reference), alpha=0.05)
    choice = optimal_chunk(model, largest=400)
    assert choice.chunk_size == 400
    assert "largest that was tried; none beyond it earns more" in choice.statement
    assert choice.larger_bound > choice.revenue_rate
    assert with_numbers(model, chunk_size=100_000).solve().revenue_rate <= choice.larger_bound * (1 + 1e-9)


def test_chunks_that_would_speed_decodes_up_are_no_candidates(reference):
    raw = with_numbers(reference, physical=False)
    choice = optimal_chunk(raw, largest=100)
    assert choice.chunks[0] == math.ceil(reference.gpu_types[0].curve.crossover_chunk)
    assert (choice.performance.kappa >= 1).all()
    with pytest.raises(fo.InvalidInput, match="up to 50 tokens a prefill would speed decodes up"):
        optimal_chunk(raw, largest=50)


# ---- errors and figures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: hardware_study(m), "give values of at least one of batch_size"),
        (lambda m: hardware_study(repr(m), beta=[1]), "model must be a FluidModel"),
        (lambda m: hardware_study(m, beta=[1e-4, 1e-5]), r"beta must be a list of increasing numbers; got \[0.0001"),
        (lambda m: hardware_study(m, alpha=["a"]), "alpha must be a list of increasing numbers"),
        (lambda m: hardware_study(m, batch_size=[1.5]), "batch_size must be a whole number; got 1.5"),
        (lambda m: hardware_study(m, solo=[0.0]), "solo must be greater than 0"),
        (lambda m: hardware_study(m, gamma=[0.0, 1.0]), "gamma must be above 0"),
        (lambda m: hardware_study(m, solo=[0.02], gamma=[50]), "solo and gamma are the same number"),
        (lambda m: hardware_study(m, batch_size=range(1, 2000), beta=np.linspace(0, 1, 600)), "the grid has 1199400"),
        (lambda m: hardware_study(m, beta=[1e-5, 1e-4], alpha=[0.01, 0.02]).saturates_at(), "must be of one number"),
        (lambda m: hardware_study(m, beta=[1e-5]).saturates_at(2), "share must be above 0 and at most 1"),
        (lambda m: hardware_upgrades(m, step=1.0), "step must be above 0 and below 1; got 1.0"),
        (lambda m: compare_gpus(m, []), "gpus must be a list of GPU"),
        (lambda m: compare_gpus(m, [m.gpu_types[0]]), "names must be unique"),
        (lambda m: optimal_chunk(m, largest=0), "largest must be a whole number of at least 1"),
        (lambda m: optimal_chunk(m, chunks=[0]), "chunks must be a list of whole numbers"),
        (lambda m: optimal_chunk(m.maximize("sum(sum(x[i,k], i), k)")), "objective of its own"),
        (lambda m: plot_hardware([hardware_study(m, beta=[1e-5], alpha=[0.01])]), "must be of one number; got one of"),
        (lambda _: plot_hardware({}), "studies of 1 to 5 numbers in at most 3 lists; got 0 numbers in 0"),
        (lambda m: plot_hardware([hardware_study(m, beta=[1e-5])] * 2), "two studies of beta; give them by label"),
        (lambda m: plot_landscape(hardware_study(m, beta=[1e-5])), "must be of two numbers"),
    ],
)
def test_errors_name_what_is_wrong(reference, call, match):
    with pytest.raises(fo.InvalidInput, match=match):
        call(reference)


def test_types_with_modes_of_their_own_are_refused(reference):
    (gpu,) = reference.gpu_types
    model = build(reference.workload, gpu.with_modes(chunks=[128, 256]))
    for call in (lambda: hardware_study(model, beta=[1e-5]), lambda: optimal_chunk(model)):
        with pytest.raises(fo.InvalidInput, match="has operating_modes of its own"):
            call()


def test_where_no_chunk_keeps_the_promises(reference):
    with pytest.raises(fo.InfeasibleModel, match="with no chunk of 1 to 20 tokens does a plan keep all promises"):
        optimal_chunk(with_numbers(reference, levels=[fo.CompletionFloor(share=1.0)]), largest=20)


def test_figures(reference):
    (gpu,) = reference.gpu_types
    offers = compare_gpus(reference, [replace(gpu, name="other", batch_size=24, hourly_price=2.0)])
    study = hardware_study(reference, batch_size=[8, 16, 24], beta=[1e-5, 1e-4])
    landscape = study.plot(offers=offers)
    money, time = landscape.axes[:2]
    assert money.get_xlabel() == "batch size B, requests"
    assert money.get_ylabel() == "slope beta, µs/token"
    assert time.get_title(loc="left") == "Time per token as users see it, ms"
    (point,) = [line for line in money.lines if line.get_label().startswith("A  other")]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (24, pytest.approx(62.0))
    assert "at 2 money/hour" in point.get_label()
    curves = plot_hardware(
        [hardware_study(reference, gamma=[30.0, 50.0]), hardware_study(reference, beta=[1e-5, 1e-3])]
    )
    assert [axis.get_xlabel() for axis in curves.axes[2:]] == [
        "decode-only speed gamma, 1/s",
        "slope beta, µs/token",
    ]
    (line, _) = curves.axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), hardware_study(reference, gamma=[30.0, 50.0]).revenue_rate)
    chunks = optimal_chunk(reference, chunks=[64, 128]).plot()
    for figure in (landscape, curves, chunks, hardware_study(reference, beta=[1e-5, 1e-3]).plot()):
        picture = io.BytesIO()
        figure.savefig(picture)
        assert picture.getvalue().startswith(b"\x89PNG")
    with pytest.raises(fo.InvalidInput, match="offers are points over batch_size and beta"):
        hardware_study(reference, alpha=[0.01, 0.02], beta=[1e-5, 1e-4]).plot(offers=offers)
    with pytest.raises(fo.InvalidInput, match="offers are points of a landscape"):
        hardware_study(reference, beta=[1e-5]).plot(offers=offers)


def test_a_study_without_a_plan_says_so(reference):
    patient = fo.FluidModel(
        reference.workload.with_abandonment(0.0), reference.gpu_types[0], prices=reference.scenario.prices
    )
    none = hardware_study(patient, batch_size=[2, 3])
    assert none.headline.endswith("no plan keeps the promises anywhere")
    with pytest.raises(fo.InvalidInput, match="saturates_at: no plan keeps the promises at any value"):
        none.saturates_at()
    some = hardware_study(patient, batch_size=[2, 3, 17, 20], beta=[1e-5, 1e-4])
    assert "no plan keeps the promises at 5 of them" in some.headline
    for study in (none, some, hardware_study(patient, batch_size=[2, 3], beta=[1e-5, 1e-4])):
        assert study.plot()._repr_png_().startswith(b"\x89PNG")


def test_reports(reference):
    study = hardware_study(reference, batch_size=[8, 16])
    assert repr(study).startswith("HardwareStudy: 2 points over batch_size 8 to 16")
    assert "<table" in study._repr_html_()
    assert "gain_share" in repr(hardware_upgrades(reference))
    choice = optimal_chunk(reference, chunks=[64, 128])
    assert repr(choice).startswith("ChunkChoice: Chunk 64 earns most of 64 to 128 tokens")
    assert "<table" in choice._repr_html_()
