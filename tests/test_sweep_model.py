"""Sweeps of a model's own numbers: what is written into arrays against models built at every point."""

import itertools
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import pytest
import strategies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fluidopt as fo
from benchmarks.frontier import SWEEPS, CvxpyLoop, numbers_of, timed
from benchmarks.resolve import random_model
from fluidopt.curves import LinearTime
from fluidopt.studies.sensitivity.parameters import parameters_of
from fluidopt.studies.sweep import sweep
from fluidopt.studies.sweep_model import Resolve, Variants

LEVELS = (
    fo.SlotTPOT(at_most=0.0243),
    fo.MeanTPOT(at_most=0.5),
    fo.AbandonmentShare(at_most=0.7),
    fo.CompletionFloor(share=0.01, classes=("prefill-heavy",)),
    fo.KVMemory(tokens=1e6),
)


def with_levels(*levels):
    model = fo.reference_model()
    return fo.FluidModel(model.workload, model.gpu_types, prices=model.scenario.prices, service_levels=levels)


def on_a_curve():
    curve = LinearTime(alpha=0.0174, beta=6.2e-5, solo=0.02, per_decode=1e-4, per_kv_token=1e-9, solo_per_decode=1e-4)
    gpus = [
        fo.GPU(curve, batch_size=16, chunk_size=256, kv_tokens=900, name="mixed type", share=0.6),
        fo.GPU(curve, batch_size=8, chunk_size=128, kv_tokens=900, name="listed", share=0.4).with_modes(
            chunks=[64, 128], batches=[4, 8]
        ),
    ]
    return fo.FluidModel(fo.reference_model().workload, gpus, prices=fo.TokenPrices(prompt=0.1, output=0.2))


def names_apart(model, factors):
    """All parameters, of the classes' either factors or single fields: both are the same numbers."""
    return [name for name, each in parameters_of(model).items() if each.factor == factors or not each.members]


def design(model, rng, count, names):
    """Random values of parameters, near the present ones."""
    known = parameters_of(model)
    columns = {}
    for name in names:
        factor = rng.uniform(0.8, 1.25, count)
        values = known[name].value * factor if known[name].value else factor * 1e-6
        columns[name] = np.maximum(np.rint(values), 1.0) if known[name].whole else values
        if known[name].field == "decode_slots":  # at most those of the GPU
            columns[name] = np.minimum(columns[name], known[name].value)
    return columns


def points_of(columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def alone(vary, point):
    """R* of one point, from a scenario of its own and solved from nothing, or its error."""
    try:
        return vary({name: float(value) for name, value in point.items()}).solve("highs").revenue_rate
    except fo.FluidoptError as error:
        return error


def assert_same_numbers(model, columns):
    vary = Variants.of(model.scenario, columns)
    vary.check(columns)
    numbers, alike = vary.numbers(columns)
    assert alike.all()
    for at, point in enumerate(points_of(columns)):
        expected = vary({name: float(value) for name, value in point.items()}).numbers().values
        for symbol, array in expected.items():
            found = numbers[symbol][at] if symbol in numbers else model.numbers().values[symbol]
            np.testing.assert_array_equal(found, array, err_msg=symbol)


@pytest.mark.parametrize("model", [with_levels(*LEVELS), on_a_curve()], ids=["service levels", "curves and modes"])
def test_numbers_are_those_of_the_models_at_the_points_whatever_moves(model):
    rng = np.random.default_rng(5)
    for name in parameters_of(model):
        assert_same_numbers(model, design(model, rng, 3, [name]))
    for factors in (True, False):
        assert_same_numbers(model, design(model, rng, 5, names_apart(model, factors)))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(strategies.pair_models(), strategies.mode_models()), st.integers(0, 2**32))
def test_random_models_at_random_points_earn_what_they_earn_alone(model, seed):
    rng = np.random.default_rng(seed)
    known = parameters_of(model)
    apart = names_apart(model, factors=bool(rng.integers(2)))
    names = rng.choice([name for name in apart if known[name].value > 0], 3, replace=False).tolist()
    columns = design(model, rng, 12, names)
    found = sweep(model, design=pd.DataFrame(columns))
    vary = Variants.of(model.scenario, columns)
    for at, point in enumerate(points_of(columns)):
        expected = alone(vary, point)
        if isinstance(expected, fo.FluidoptError):
            assert type(expected).__name__ in found["error"][at].item()
        else:
            assert float(found["revenue_rate"][at]) == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_points_with_other_rows_and_columns_are_built_one_by_one_and_equal_solves():
    model = fo.reference_model()
    columns = {
        "abandonment_rate[prefill-heavy]": np.array([0.0, 0.1, 0.0, 0.2]),
        "batch_size": np.array([16, 1, 1, 8]),
        "arrival_rate": np.array([0.1, 1.0, 0.05, 0.0]),
    }
    _, alike = Variants.of(model.scenario, columns).numbers(columns)
    assert alike.tolist() == [False, False, False, False]
    found = sweep(model, design=pd.DataFrame(columns))
    vary = Variants.of(model.scenario, columns)
    expected = [vary(point).solve("highs").revenue_rate for point in points_of(columns)]
    np.testing.assert_allclose(found["revenue_rate"], expected, rtol=1e-8, atol=1e-12)
    straight = sweep(model, design=pd.DataFrame({**columns, "batch_size": [16, 8, 9, 8], "arrival_rate": [0.1] * 4}))
    assert straight.attrs["failed"] == 0


def test_a_wait_that_follows_from_prompts_and_speeds_is_built_at_every_point():
    model = with_levels(fo.MeanTTFT(at_most=20.0, of="served", classes=("prefill-heavy",)))
    for names, straight in (
        [["output_price"], True],
        [["chunk_size"], False],
        [["prompt_tokens[decode-heavy]"], False],
    ):
        columns = design(model, np.random.default_rng(1), 4, names)
        assert (Variants.of(model.scenario, columns).numbers(columns) is not None) == straight
        found = sweep(model, design=pd.DataFrame(columns))
        vary = Variants.of(model.scenario, columns)
        expected = [vary(point).solve("highs").revenue_rate for point in points_of(columns)]
        np.testing.assert_allclose(found["revenue_rate"], expected, rtol=1e-8)


def test_revenue_is_what_is_earned_where_the_objective_is_another():
    soft = with_levels(fo.MeanWait(at_most=0.1, penalty=5.0))
    columns = {"output_price": np.array([0.1, 0.2])}
    assert Resolve._together(Variants.of(soft.scenario, columns), fo.Solver(soft), columns) == {}
    found = sweep(soft, over={"output_price": [0.1, 0.2]})
    assert float(found["revenue_rate"][1]) == pytest.approx(soft.solve().revenue_rate, rel=1e-9)


def test_a_point_without_a_plan_says_the_same_in_the_array_and_alone():
    reference = fo.reference_model()
    prices = fo.TokenPrices(prompt=1.0, output=1.0)
    patient = fo.FluidModel(reference.workload.with_abandonment(0.0), reference.gpu_types, prices=prices)
    load = {"arrival_rate": np.array([0.2, 1.0, 5.0])}
    found = Resolve(patient.scenario)(load)
    assert found[0]["revenue_rate"] == pytest.approx(0.2 * 0.5 * (1300 + 3400))
    with pytest.raises(fo.InfeasibleModel) as alone:
        fo.Solver(patient).solve({"lambda": [0.5, 0.5]})
    assert found[1:] == [f"InfeasibleModel: {alone.value}"] * 2


def test_every_value_is_checked_before_anything_is_solved():
    model = fo.reference_model()
    for over, message in [
        ({"chunk_size": [256, 300.5, 512]}, "chunk_size must be a whole number; got 300.5"),
        ({"arrival_rate": [1.0, -1.0, 2.0]}, "at least 0"),
        ({"prompt_tokens[decode-heavy]": [1.0, 0.0, 2.0]}, "above 0"),
        ({"output_price": [0.1, "free"]}, "one kind"),
    ]:
        with pytest.raises(fo.InvalidInput, match=message):
            sweep(model, over=over)
    floor = with_levels(fo.CompletionFloor(share=0.5))
    with pytest.raises(fo.InvalidInput, match="share must be at most 1"):
        sweep(floor, over={"bound[completion_floor]": [0.5, 1.5, 0.9]})


def test_blocks_give_the_same_numbers_on_every_executor_whatever_moves():
    model = fo.reference_model()
    columns = design(model, np.random.default_rng(4), 40, ["arrival_rate", "alpha", "abandonment_rate[decode-heavy]"])
    columns["abandonment_rate[decode-heavy]"][::9] = 0.0  # and some that are built one by one
    frame = pd.DataFrame(columns)
    serial = sweep(model, design=frame, block=7)
    with ProcessPoolExecutor(2) as processes:
        assert serial.identical(sweep(model, design=frame, block=7, executor=processes))
    whole = sweep(model, design=frame)
    np.testing.assert_allclose(serial["revenue_rate"], whole["revenue_rate"], rtol=1e-9)
    np.testing.assert_array_equal(serial["error"], whole["error"])


def test_ten_thousand_points_cost_a_small_part_of_a_cvxpy_loop():
    """Ratio in one run; measured about 100 (20 where all coefficients move), and asked for 30."""
    model, over = random_model(10), SWEEPS["right sides and prices"]
    times = []
    for _ in range(3):
        seconds, found = timed(lambda: sweep(model, over=over))
        times.append(seconds)
    revenue = found["revenue_rate"].values.ravel()
    places = list(range(50, len(revenue), 500))
    points = [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]
    vary = Variants.of(model.scenario, over)
    numbers = [numbers_of(vary(points[at])) for at in places]
    loop = CvxpyLoop(model, ["rate", "gain_mixed", "gain_solo"])
    loop.at(numbers[0])
    seconds, expected = timed(lambda: [loop.at(each) for each in numbers])
    np.testing.assert_allclose(revenue[places], expected, rtol=1e-5)
    assert len(revenue) * seconds / len(places) > 30 * min(times)
