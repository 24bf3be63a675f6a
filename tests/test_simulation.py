"""Simulated policies: intervals that cover, the paper's revenue at finite n, comparison, errors, round trips."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest

import fluidopt as fo
from fluidopt.simulation.experiment import Replications
from fluidopt.simulation.fleet import fleet_system, fluid_start
from fluidopt.simulation.system import System


def _processes() -> Executor:
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


@pytest.fixture(scope="module")
def policy() -> fo.Policy:
    return fo.reference_model().solve().policy(gpus=20)


@pytest.fixture(scope="module")
def result(policy: fo.Policy) -> fo.SimulationResult:
    return policy.simulate(horizon=600, replications=6, seed=3)


def erlang_a(arrival_rate: float, service_rate: float, servers: int, patience_rate: float) -> tuple[float, float]:
    """Mean busy servers and mean queue of M/M/c+M, from the birth-death chain's stationary law."""
    states = np.arange(600)
    death = np.minimum(states, servers) * service_rate + np.maximum(states - servers, 0) * patience_rate
    weights = np.concatenate([[0.0], np.cumsum(np.log(arrival_rate) - np.log(death[1:]))])
    law = np.exp(weights - weights.max())
    law /= law.sum()
    assert law[-1] < 1e-12
    return float(law @ np.minimum(states, servers)), float(law @ np.maximum(states - servers, 0))


def decode_only_fleet() -> fo.Policy:
    """Two GPUs whose prefill takes next to nothing: the decodes are an M/M/c+M queue."""
    gpu = fo.GPU(fo.IterationTime(alpha=0.0, beta=2e-5, solo=0.02), batch_size=3, chunk_size=1000)
    only = fo.WorkloadClass("only", arrival_rate=2.0, prompt_tokens=1e-3, output_tokens=50.0, abandonment_rate=0.5)
    return fo.FluidModel([only], gpu, prices=fo.TokenPrices(prompt=0.0, output=1.0)).solve().policy(gpus=2)


def test_decode_queue_is_erlang_a() -> None:
    policy = decode_only_fleet()
    slots = sum(role.gpus * role.decode_slots for role in policy.roles)
    busy, queue = erlang_a(4.0, 1.0, slots, 0.5)
    found = policy.simulate(horizon=4000, replications=16, seed=11)
    for quantity, truth in (("decode", busy), ("decode_queue", queue)):
        estimate = found.estimate(quantity, "only")
        assert abs(2 * estimate.mean - truth) < 4 * 2 * estimate.standard_error


def test_95_percent_intervals_cover_the_truth() -> None:
    policy = decode_only_fleet()
    slots = sum(role.gpus * role.decode_slots for role in policy.roles)
    _, queue = erlang_a(4.0, 1.0, slots, 0.5)
    covered = 0
    for seed in range(300):
        low, high = (
            policy.simulate(horizon=330, warmup=30, replications=8, seed=seed).estimate("decode_queue", "only").interval
        )
        covered += low <= queue / 2 <= high
    assert 0.92 <= covered / 300 <= 0.98


@pytest.mark.parametrize(("gpus", "expected"), [(20, 285.7), (200, 290.4)])
def test_paper_policy_earns_what_was_measured(gpus: int, expected: float) -> None:
    """Per-GPU revenue of gate-and-route on the reference instance, measured with two other simulators."""
    found = fo.reference_model().solve().policy(gpus=gpus).simulate(horizon=3000, replications=8, seed=5)
    assert found.revenue_rate.half_width < 0.8
    assert abs(found.revenue_rate.mean - expected) < 1.0


def test_revenue_stays_below_the_fluid_bound(result: fo.SimulationResult) -> None:
    assert result.revenue_rate.mean < result.policy.revenue_bound + result.revenue_rate.half_width


def test_same_seed_same_numbers(policy: fo.Policy, result: fo.SimulationResult) -> None:
    assert policy.simulate(horizon=600, replications=6, seed=3) == result
    assert policy.simulate(horizon=600, replications=6, seed=4) != result


def test_first_replications_do_not_depend_on_how_many_follow(policy: fo.Policy) -> None:
    few, many = (Replications(policy, replications=replications, seed=3, start="empty") for replications in (3, 6))
    for one in (few, many):
        one.extend(np.array([300.0, 600.0]))
    assert few.totals is not None
    assert many.totals is not None
    np.testing.assert_array_equal(few.totals.expected_reward, many.totals.expected_reward[:3])


@pytest.mark.parametrize("executor", [partial(ThreadPoolExecutor, 1), partial(ThreadPoolExecutor, 5), _processes])
def test_same_numbers_in_any_executor(
    policy: fo.Policy, result: fo.SimulationResult, executor: Callable[[], Executor]
) -> None:
    with executor() as pool:
        assert policy.simulate(horizon=600, replications=6, seed=3, executor=pool) == result


def test_json_round_trip(result: fo.SimulationResult) -> None:
    assert fo.SimulationResult.from_dict(json.loads(result.to_json())) == result


def test_comparison_holds_every_quantity_with_its_interval(result: fo.SimulationResult) -> None:
    frame = result.to_frame()
    revenue = frame.loc[("revenue_rate", "")]
    assert revenue["simulated"] == result.revenue_rate.mean
    assert revenue["half_width"] == result.revenue_rate.half_width
    assert revenue["difference"] == pytest.approx(revenue["simulated"] - revenue["fluid"])
    assert revenue["z"] == pytest.approx(revenue["difference"] / result.revenue_rate.standard_error)
    percentiles = {name for name in result.values if name.rpartition("_")[2] in ("p50", "p90", "p99")}
    assert set(frame.index.get_level_values("quantity")) == set(result.values) - percentiles
    assert len(percentiles) == 9


def test_waiting_time_is_littles_law(result: fo.SimulationResult) -> None:
    queue, wait = (result.estimate(name, "decode-heavy").mean for name in ("prefill_queue", "prefill_wait"))
    assert wait == pytest.approx(queue / 0.5)


def test_gap_to_the_plan_closes_like_the_square_root_of_the_fleet() -> None:
    """Where the plan serves both classes in full, the prefill GPUs are critically loaded: the loss is O(1/sqrt(n))."""
    reference = fo.reference_model()
    model = fo.FluidModel(reference.workload.scaled(0.8), reference.gpu_types, prices=reference.scenario.prices)
    plan = model.solve()

    def gap(gpus: int, horizon: float) -> float:
        found = plan.policy(gpus=gpus).simulate(horizon=horizon, replications=4, seed=1, start="fluid")
        return 1 - found.revenue_rate.mean / plan.revenue_rate

    sizes = np.array([100, 1000, 10_000])
    gaps = np.array([gap(int(gpus), 8e5 / gpus + 600) for gpus in sizes])
    scaled = gaps * np.sqrt(sizes)
    assert np.all((scaled > 0.08) & (scaled < 0.4)), "a factor 100 in size, a factor 10 in the gap"


@pytest.mark.parametrize("gpus", [1, 2, 7, 50])
@pytest.mark.parametrize("charging", ["bundled", "separate"])
def test_fluid_start_fits_the_fleet(gpus: int, charging: str) -> None:
    policy = fo.reference_model(charging).solve().policy(gpus=gpus)  # type: ignore[arg-type]
    system = fleet_system(policy)
    start = fluid_start(policy, system)
    assert np.all(start.decode.sum(axis=1) <= system.role_gpus * system.role_decode_slots)
    assert np.all(start.prefill.sum(axis=1) <= np.where(system.role_prefill_mode >= 0, system.role_gpus, 0))
    present = start.prefill.sum(axis=0) + start.decode.sum(axis=0) + start.prefill_queue + start.decode_queue
    expected = gpus * np.array(
        [
            x + y + (q or 0) + (d or 0)
            for x, y, q, d in zip(
                policy.targets.prefill,
                policy.targets.decode,
                policy.targets.prefill_queue,
                policy.targets.decode_queue,
                strict=True,
            )
        ]
    )
    assert np.all(np.abs(present - expected) <= 2.0)


def test_gate_keys_order_classes_as_the_paper_does(policy: fo.Policy) -> None:
    """The gate's key is a positive multiple of (X - n x)/x up to one constant, so it has the same order."""
    system: System = fleet_system(policy)
    x = np.array(policy.targets.prefill)
    for counts in ([0, 3], [1, 4], [2, 2], [5, 0]):
        key = system.gate_base + system.gate_slope * np.array(counts)
        xi = (np.array(counts) - policy.gpus * x) / x
        assert np.argmin(key) == np.argmin(xi)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 0}, "horizon must be a finite number of seconds above 0; got 0"),
        ({"horizon": float("nan")}, "horizon must be a finite number"),
        ({"horizon": 10, "warmup": 10}, "warmup must be at least 0 and below horizon"),
        ({"horizon": 10, "replications": 1}, "replications must be a whole number of at least 2"),
        ({"horizon": 10, "seed": -1}, "seed must be a whole number of at least 0"),
        ({"horizon": 10, "start": "full"}, "start must be 'empty' or 'fluid'"),
        ({}, "give horizon .seconds per replication., or precision"),
        ({"precision": 0.0}, "precision must be between 0 and 1, .* got 0.0"),
        ({"horizon": 10, "path": 1}, "path must be 0, or the number of states to keep, at least 2; got 1"),
        ({"precision": 0.1, "path": 5}, "path goes with a fixed horizon"),
    ],
)
def test_bad_arguments_are_named(policy: fo.Policy, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(fo.InvalidInput, match=message):
        policy.simulate(**arguments)  # type: ignore[arg-type]


def test_estimate_names_what_it_knows(result: fo.SimulationResult) -> None:
    with pytest.raises(fo.InvalidInput, match="quantity must be one of revenue_rate"):
        result.estimate("profit")
    with pytest.raises(fo.InvalidInput, match="throughput needs of= one of 'decode-heavy', 'prefill-heavy'; got 'x'"):
        result.estimate("throughput", "x")


def test_saved_result_that_is_not_one_is_refused() -> None:
    with pytest.raises(fo.InvalidInput, match="not a saved simulation result"):
        fo.SimulationResult.from_dict({"values": {}})


def test_unstable_patient_fleet_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fleet made for half the traffic of patient requests: the queue outgrows any memory, and that is an error."""
    patient = fo.reference_model().workload.scaled(0.5).with_abandonment(0.0)
    model = fo.FluidModel(patient, fo.reference_model().gpu_types, prices=fo.TokenPrices(prompt=0.1, output=0.2))
    policy = model.solve().policy(gpus=2)
    busy = replace(policy, scenario=replace(policy.scenario, classes=patient.scaled(40.0).classes))
    from fluidopt.simulation import experiment

    monkeypatch.setattr(experiment, "Run", partial(experiment.Run, max_waiting=20_000))
    with pytest.raises(fo.InvalidInput, match="the queues grow without end"):
        busy.simulate(horizon=20_000, replications=2, seed=1)
