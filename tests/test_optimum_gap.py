"""Threshold rules against the optimum of small fleets: bounds, the search against an enumeration, and simulation."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest

import fluidopt as fo
from fluidopt.chain import exact_chain, optimal_policy
from fluidopt.plots import plot_decisions
from fluidopt.policy import Gate
from fluidopt.policy.family import NEVER_HELD, Family, Rule
from fluidopt.studies.optimum import (
    SmallFleetRanges,
    capacity,
    gate_differences,
    gate_map,
    optimum_gap,
    optimum_study,
)

CAPS = {"prefill_queue_cap": 4, "decode_queue_cap": 1}
FLEETS = {5: (1, 2), 11: (2, 2), 13: (1, 2), 23: (1, 3)}
"""Numbers of instances of a study with seed 0, with GPUs and batch: the smallest among the first 24."""

ONE_GPU = SmallFleetRanges(gpus=1, batch_size=3)


@cache
def instance(number):
    """Plan and GPUs of an instance of the study with seed 0."""
    scenario, gpus = SmallFleetRanges().draw(np.random.SeedSequence(0).spawn(24)[number])
    return fo.FluidModel.from_scenario(scenario).solve(), gpus


@cache
def gap(number):
    plan, gpus = instance(number)
    return optimum_gap(plan, gpus=gpus, **CAPS)


def earned(policy):
    return exact_chain(policy, **CAPS, tolerance=1.0).revenue_rate


@pytest.mark.parametrize("number", FLEETS)
def test_no_rule_beats_the_optimum(number):
    plan, gpus = instance(number)
    assert (gpus, plan.model.gpu_types[0].batch_size) == FLEETS[number]
    found = gap(number)
    assert found.lower <= found.upper <= found.lower * (1 + 1e-5)
    assert found.upper < plan.revenue_rate
    family = Family(plan, gpus)
    tried = [earned(policy) for _, policy in family.possible(family.start())]
    assert len(tried) > 15
    assert max(tried) <= found.upper
    assert max(tried) <= found.revenue_rate * (1 + 1e-9)
    near = [earned(policy) for _, policy in family.possible(family.neighbours(found.rule, 1))]
    assert max(near) <= found.revenue_rate * (1 + 1e-9)
    assert 0 <= found.loss < 0.01
    assert found.revenue_rate == pytest.approx(earned(found.policy), rel=1e-9)
    assert found.baseline_revenue_rate == pytest.approx(earned(plan.policy(gpus=gpus)), rel=1e-9)
    assert found.revenue_rate > found.baseline_revenue_rate
    assert 0 < found.partition_loss < found.baseline_loss
    assert f"{found.loss:.2%}" in str(found)


@pytest.mark.parametrize("number", [5, 23])
def test_the_search_finds_the_best_of_all_rules_without_a_partition(number):
    plan, gpus = instance(number)
    batch = plan.model.gpu_types[0].batch_size
    holds = [NEVER_HELD, *(float(h) for h in range(batch + 1))]
    rules = [
        Rule("priority", order, hold, None, stays=True) for order in ((0, 1), (1, 0)) for hold in product(holds, holds)
    ]
    best = max(earned(rule.policy(plan, gpus)) for rule in rules)
    assert gap(number).revenue_rate >= best * (1 - 1e-9)


def test_the_simulated_revenue_of_the_best_rule_is_the_exact_one():
    found = gap(23)
    exact = exact_chain(found.policy, tolerance=1e-6).revenue_rate
    simulated = found.policy.simulate(horizon=40_000, replications=8, seed=3).revenue_rate
    assert simulated.half_width < 0.01 * exact
    assert abs(simulated.mean - exact) < 2 * simulated.half_width
    assert exact == pytest.approx(found.revenue_rate, rel=0.01)


@pytest.mark.parametrize("seed", range(6))
def test_the_capacity_is_what_the_plan_can_serve(seed):
    rng = np.random.default_rng(seed)
    curve = fo.IterationTime(alpha=0.017, beta=rng.uniform(2e-5, 2e-4), solo=0.022)
    gpu = fo.GPU(curve, batch_size=int(rng.integers(2, 17)), chunk_size=int(rng.integers(64, 513)))
    prompt, output, mix = rng.uniform(200, 3000, 2), rng.uniform(2, 3000, 2), rng.dirichlet([2, 2])
    most = capacity(gpu, prompt, output, mix)
    for load, served in ((0.999, True), (1.001, False)):
        classes = [
            fo.WorkloadClass(
                f"{i}",
                arrival_rate=load * most * mix[i],
                prompt_tokens=prompt[i],
                output_tokens=output[i],
                abandonment_rate=0.1,
            )
            for i in range(2)
        ]
        plan = fo.FluidModel(classes, gpu, prices=fo.TokenPrices(prompt=0.1, output=0.2)).solve()
        rate = plan.model.workload.arrival_rate
        assert np.allclose(plan.throughput, rate, rtol=1e-6) is served


@pytest.fixture(scope="module")
def study():
    with ThreadPoolExecutor(2) as pool:
        return optimum_study(instances=2, seed=3, ranges=ONE_GPU, executor=pool)


def test_a_study_says_the_median_and_the_worst(study):
    losses = study.to_frame()["rule_loss"]
    assert f"{losses.median():.2f}%" in study.statement
    assert f"{losses.max():.2f}%" in study.statement
    assert study.statement in str(study)
    assert "<table" in study._repr_html_()
    frame = study.to_frame()
    assert np.all(frame["rule_revenue"] <= frame["optimum_upper"])
    assert np.all(frame["optimum_upper"] <= frame["bound"])
    assert np.all(frame["gate_and_route_loss"] >= frame["partition_loss"])


def test_the_first_instances_do_not_depend_on_how_many_follow_nor_on_where_they_run(study):
    alone = optimum_study(instances=1, seed=3, ranges=ONE_GPU)
    assert alone.to_frame().iloc[0].to_dict() == study.to_frame().iloc[0].to_dict()


@pytest.fixture(scope="module")
def one_gpu():
    """The optimum of one GPU of four slots, and a rule that holds class b back."""
    plan, gpus = instance(10)
    optimum = optimal_policy(plan.policy(gpus=gpus, kind="GF-WSP"), **CAPS)
    gate = Gate(rule="priority", order=("a", "b"), hold={"b": 1.0})
    return optimum, replace(plan.policy(gpus=gpus, kind="GI-WSP"), kind="thresholds", gate=gate)


def test_the_map_of_a_rule_is_what_the_rule_says(one_gpu):
    optimum, rule = one_gpu
    where = {"prefill_queue[b]": 1, "decode_queue": 1}
    table = gate_map(optimum, rule, columns="prefill_queue[a]", where=where)
    best = optimum.decision_map(columns="prefill_queue[a]", where=where)
    assert list(table.index) == list(best.index)
    assert list(table.columns) == list(best.columns)
    met = 0
    for free, waiting in product(table.index, table.columns):
        if table.loc[free, waiting] == "–":
            assert best.loc[free, waiting] == "–"
            continue
        left = free - 1  # the prefill that has just ended keeps its slot
        expected = "hold" if left == 0 else "a" if waiting else "b" if left > 1 else "hold"
        assert table.loc[free, waiting] == expected
        met += 1
    assert met > 10


def test_the_differences_add_up(one_gpu):
    optimum, rule = one_gpu
    table = gate_differences(optimum, rule)
    assert table.to_numpy().sum() == pytest.approx(1)
    assert table.to_numpy().min() >= 0
    always = replace(rule, gate=Gate(rule="priority", order=("a", "b")))
    unheld = gate_differences(optimum, always)
    np.testing.assert_allclose(unheld.sum(axis=1), table.sum(axis=1))
    assert unheld["hold"].sum() < table["hold"].sum()


def test_the_figure_of_maps_has_a_cell_for_every_decision(one_gpu):
    optimum, rule = one_gpu
    maps = {"optimum": optimum.decision_map(), "rule": gate_map(optimum, rule)}
    figure = plot_decisions(maps)
    for axis, table in zip(figure.axes, maps.values(), strict=True):
        assert len(axis.patches) == (table != "–").to_numpy().sum()
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"a", "b", "hold"}
    with pytest.raises(fo.InvalidInput, match="plot_decisions: maps must have a decision"):
        plot_decisions({"never": optimum.decision_map(where={"free_decode_slots": 99})})


def test_invalid_input(one_gpu):
    optimum, rule = one_gpu
    plan, _ = instance(5)
    with pytest.raises(fo.InvalidInput, match="optimum_gap: starts must be a whole number of at least 1; got 0"):
        optimum_gap(plan, gpus=1, starts=0)
    with pytest.raises(fo.InvalidInput, match="optimum_study: instances must be a whole number"):
        optimum_study(instances=0)
    with pytest.raises(fo.InvalidInput, match="more than max_states=10"):
        optimum_gap(plan, gpus=1, max_states=10)
    with pytest.raises(fo.InvalidInput, match=r"gate_map: policy must be for 1 GPU.*'stay'"):
        gate_map(optimum, rule.model.solve().policy(gpus=1))
    other = replace(plan.policy(gpus=1, kind="GI-WSP"), gate=Gate(rule="priority"))
    with pytest.raises(fo.InvalidInput, match="gate_map: policy must be for the fleet of the optimum"):
        gate_map(optimum, other)
