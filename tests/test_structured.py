"""The structured solver behind a model: chosen where exact, with service levels as bounds, else HiGHS."""

import numpy as np
import pytest

import fluidopt as fo
from fluidopt.reference import reference_model
from fluidopt.service_levels import AbandonmentShare, CompletionFloor, KVMemory, MeanWait, SlotTPOT


def random_model(rng, levels):
    classes = int(rng.integers(1, 6))
    frame = {
        "name": [f"class {at}" for at in range(classes)],
        "arrival_rate": rng.uniform(0.05, 0.6, classes),
        "prompt_tokens": np.exp(rng.uniform(4, 8, classes)),
        "output_tokens": np.exp(rng.uniform(4, 7, classes)),
        "abandonment_rate": rng.uniform(0.01, 0.3, classes),
    }
    reference = reference_model()
    return fo.FluidModel(
        fo.Workload.from_frame(frame),
        reference.gpu_types,
        prices=reference.scenario.prices,
        charging=str(rng.choice(["bundled", "separate"])),  # type: ignore[arg-type]
        service_levels=levels,
    )


def random_levels(rng):
    levels = []
    if rng.random() < 0.5:
        levels.append(MeanWait(at_most=rng.uniform(0, 10), of=str(rng.choice(["arrivals", "served"]))))
    if rng.random() < 0.4:
        levels.append(AbandonmentShare(at_most=rng.uniform(0, 1)))
    if rng.random() < 0.4:
        levels.append(CompletionFloor(share=rng.uniform(0, 1)))
    if rng.random() < 0.4:
        levels.append(SlotTPOT(at_most=rng.uniform(0.022, 0.034)))
    return levels


@pytest.mark.parametrize("seed", range(8))
def test_service_levels_that_are_bounds_are_solved_exactly(seed):
    """Against HiGHS on the full program, certified there too; where no queue is forbidden a few need HiGHS."""
    rng = np.random.default_rng(seed)
    structured = 0
    for _ in range(40):
        model = random_model(rng, random_levels(rng))
        try:
            expected = model.solve("highs").objective
        except fo.InfeasibleModel:
            with pytest.raises(fo.InfeasibleModel):
                model.solve()
            continue
        plan = model.solve()
        structured += plan.solution.method == "knapsack"
        assert plan.objective == pytest.approx(expected, rel=1e-9)
        assert plan.certificate.holds(1e-9)
    assert structured >= 30


def test_the_plan_says_which_solver_was_used():
    model = reference_model()
    assert model.solve().solution.method == "knapsack"
    assert model.solve("highs").solution.method == "HiGHS simplex"
    assert model.solve(options=fo.SolverOptions(method="ipm")).solution.method == "HiGHS ipm"
    s = model.symbols
    model.subject_to(s.sum(s.phi[s.k], over=s.k) <= 2, name="never binds")
    assert model.solve().solution.method == "HiGHS simplex"


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([KVMemory(tokens=1e4)], "service level kv_memory is no bound on admissions"),
        ([MeanWait(at_most=1.0, penalty=2.0)], "service level mean_wait is no bound on admissions"),
        ([CompletionFloor(rate=3.0)], "a completion floor asks for more than arrives"),
    ],
)
def test_what_does_not_reduce_is_named(levels, message):
    reference = reference_model()
    model = fo.FluidModel(
        reference.workload, reference.gpu_types, prices=reference.scenario.prices, service_levels=levels
    )
    with pytest.raises(fo.InvalidInput, match=f"solver 'knapsack' does not apply: {message}"):
        model.solve("knapsack")


def test_added_rows_do_not_reduce():
    model = reference_model()
    s = model.symbols
    model.subject_to(s.q_p[s.i] <= 2, name="short")
    with pytest.raises(fo.InvalidInput, match="rows or another objective were added"):
        model.solve("knapsack")
