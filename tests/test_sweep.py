"""Sweeps: the same numbers on every executor, failed points beside the others, resumption after a kill."""

import itertools
import os
import signal
import subprocess
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from distributed import Client, LocalCluster

import fluidopt as fo
from fluidopt.studies.sweep import sweep

GRID = {"arrival_rate[decode-heavy]": [0.1, 0.5, 0.9], "output_price": np.linspace(0.05, 0.5, 4)}


def ratio(above, below):
    """A function that some points refuse."""
    if below == 0:
        raise ZeroDivisionError("below is 0")
    return {"ratio": above / below, "rest": above % below}


def dies_once(seed, flag):
    """A number of a random stream; the process that comes to point 9 first is killed there."""
    if seed == 9 and not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return float(np.random.default_rng(seed).normal())


def tpot(model):
    return model.solve().slot_average_tpot


def alone(model, point):
    """R* of a point by the structured solver, from nothing: the other route."""
    scenario = model.to_dict()
    scenario["classes"][0]["arrival_rate"] = point["arrival_rate[decode-heavy]"]
    scenario["prices"]["output"] = point["output_price"]
    return fo.FluidModel.from_dict(scenario).solve("knapsack").revenue_rate


# ---- numbers ------------------------------------------------------------------------------------------------------


def test_re_solves_of_a_model_equal_solves_from_nothing():
    model = fo.reference_model()
    found = sweep(model, over=GRID)
    assert found["revenue_rate"].dims == tuple(GRID)
    assert found["revenue_rate"].attrs["units"] == "money/s per GPU"
    assert found["output_price"].attrs["units"] == "money/token"
    for rate, price in itertools.product(*GRID.values()):
        point = dict(zip(GRID, (rate, float(price)), strict=True))
        assert float(found["revenue_rate"].sel(point)) == pytest.approx(alone(model, point), rel=1e-9)
    assert found.attrs["failed"] == 0
    assert (found["error"] == "").all()


def test_coefficients_and_structure_may_change_along_the_grid():
    reference = fo.reference_model()
    model = fo.FluidModel(reference.workload.scaled(3.0), reference.gpu_types, prices=reference.scenario.prices)
    grid = {"chunk_size": [64, 256, 1024], "abandonment_rate[prefill-heavy]": [0.0, 0.1]}
    found = sweep(model, over=grid)
    for chunk, theta in itertools.product(*grid.values()):
        scenario = model.to_dict()
        scenario["gpu"][0]["chunk_size"] = chunk
        scenario["classes"][1]["abandonment_rate"] = theta
        try:
            expected = fo.FluidModel.from_dict(scenario).solve("highs").revenue_rate
        except fo.InfeasibleModel:
            expected = np.nan
        point = found.sel(dict(zip(grid, (chunk, theta), strict=True)))
        assert float(point["revenue_rate"]) == pytest.approx(expected, rel=1e-8, nan_ok=True)
        assert np.isnan(expected) == ("InfeasibleModel" in point["error"].item())
    assert found.attrs["failed"] == 3  # a class that never gives up is too much, however long the chunk


def test_penalties_and_measures_of_one_s_own():
    model = fo.reference_model()
    soft = fo.FluidModel(
        model.workload,
        model.gpu_types,
        prices=model.scenario.prices,
        service_levels=[fo.SlotTPOT(at_most=0.02, penalty=1e4)],
    )
    load = {"arrival_rate": [0.5, 1.0]}
    assert float(sweep(soft, over=load)["revenue_rate"][1]) == pytest.approx(soft.solve().revenue_rate, rel=1e-9)
    row = model.copy().subject_to("q_p[i] <= 0.5", name="short")
    assert float(sweep(row, over=load)["revenue_rate"][1]) == pytest.approx(row.solve().revenue_rate, rel=1e-9)
    measured = sweep(model, over=load, measure=tpot, units={"value": "s/token"})
    assert measured["value"].attrs["units"] == "s/token"
    assert float(measured["value"][1]) == tpot(model)


def test_a_design_has_a_point_per_row_and_estimates_bring_their_half_width():
    def noisy(mean, spread):
        return fo.Estimate(mean=mean, half_width=spread, standard_error=spread / 2, effective_size=10.0)

    design = pd.DataFrame({"mean": [1.0, 2.0, 2.0], "spread": [0.1, 0.2, 0.3]})
    found = sweep(noisy, design=design)
    assert found["value"].dims == ("point",)
    np.testing.assert_array_equal(found["value_half_width"], design["spread"])
    np.testing.assert_array_equal(found["mean"], design["mean"])


def test_a_failed_point_keeps_its_error_and_loses_no_other():
    found = sweep(ratio, over={"above": [5, 6], "below": [0, 4]})
    np.testing.assert_array_equal(found["ratio"], [[np.nan, 1.25], [np.nan, 1.5]])
    assert found["error"].sel(above=5, below=0).item() == "ZeroDivisionError: below is 0"
    assert found.attrs["failed"] == 2


# ---- executors ----------------------------------------------------------------------------------------------------


def test_threads_and_processes_give_the_same_numbers_bit_for_bit():
    model = fo.reference_model()
    serial = sweep(model, over=GRID)
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2) as processes:
        assert serial.identical(sweep(model, over=GRID, executor=threads))
        assert serial.identical(sweep(model, over=GRID, executor=processes))
        with pytest.raises(fo.InvalidInput, match="cannot be sent to another process"):
            sweep(lambda x: x, over={"x": [1]}, executor=processes)


def test_a_broken_pool_is_an_error_at_its_points_which_a_checkpoint_does_not_keep(tmp_path):
    work = partial(dies_once, flag=str(tmp_path / "flag"))
    with ProcessPoolExecutor(1) as pool:
        broken = sweep(work, over={"seed": range(12)}, executor=pool, checkpoint=tmp_path / "kept")
    assert "BrokenProcessPool" in broken["error"][9].item()
    again = sweep(work, over={"seed": range(12)}, checkpoint=tmp_path / "kept")
    assert again.attrs["failed"] == 0


class BreaksAfterTwo(ThreadPoolExecutor):
    """A pool that takes two blocks, and then nothing more."""

    taken = 0

    def submit(self, *args, **kwargs):
        self.taken += 1
        if self.taken > 2:
            raise BrokenExecutor("a process died")
        return super().submit(*args, **kwargs)


def test_a_pool_that_breaks_before_it_takes_all_points_keeps_what_it_took(tmp_path):
    grid = {"above": [4.0, 5.0, 6.0, 7.0], "below": [4.0]}
    with BreaksAfterTwo(1) as pool:
        broken = sweep(ratio, over=grid, executor=pool, checkpoint=tmp_path / "kept")
    np.testing.assert_array_equal(broken["ratio"][:, 0], [1.0, 1.25, np.nan, np.nan])
    assert broken["error"][2, 0].item() == "lost by the executor: BrokenExecutor: a process died"
    assert sweep(ratio, over=grid, checkpoint=tmp_path / "kept").attrs["failed"] == 0


def test_a_dask_cluster_that_loses_a_worker_ends_with_every_point(tmp_path):
    work = partial(dies_once, flag=str(tmp_path / "flag"))
    with (
        LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        found = sweep(work, over={"seed": range(24)}, executor=client)
        assert (tmp_path / "flag").exists()  # a worker was killed
        model = fo.reference_model()
        assert sweep(model, over=GRID).identical(sweep(model, over=GRID, executor=client))
    assert found.attrs["failed"] == 0
    assert found.identical(sweep(work, over={"seed": range(24)}))


# ---- checkpoints --------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
from fluidopt.studies.sweep import sweep

def work(point):
    with open(sys.argv[2], "a") as log:
        log.write(f"{point}\\n")
    if point == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return point / 7

print(sweep(work, over={"point": range(20)}, checkpoint=sys.argv[1])["value"].values.tolist())
"""


def test_a_killed_process_goes_on_where_it_was(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(dies_at):
        arguments = [str(tmp_path / "kept"), str(tmp_path / "log"), str(dies_at)]
        return subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONPATH": str(Path(fo.__file__).parents[1])},
            check=False,
        )

    assert run(dies_at=10).returncode == -signal.SIGKILL
    with xr.open_zarr(tmp_path / "kept", consolidated=False) as partial_results:
        assert int((partial_results["status"] == 1).sum()) == 10
    finished = run(dies_at=-1)
    assert finished.stdout.strip() == str([point / 7 for point in range(20)])
    assert finished.stderr == ""  # no bar where nobody watches
    log = list(map(int, (tmp_path / "log").read_text().split()))
    assert log == [*range(11), *range(10, 20)]


def test_what_failed_is_tried_again_on_request_only(tmp_path):
    calls = []

    def flaky(x):
        calls.append(x)
        if len(calls) == 1:
            raise ValueError("first time")
        return x

    options = {"over": {"x": [1.0, 2.0]}, "checkpoint": tmp_path / "kept"}
    assert sweep(flaky, **options).attrs["failed"] == 1
    assert sweep(flaky, **options)["error"][0].item() == "ValueError: first time"
    assert calls == [1.0, 2.0]
    np.testing.assert_array_equal(sweep(flaky, **options, retry_failed=True)["value"], [1.0, 2.0])
    assert calls == [1.0, 2.0, 1.0]


def test_a_checkpoint_of_a_model_is_bit_for_bit_what_was_computed(tmp_path):
    model = fo.reference_model()
    first = sweep(model, over=GRID, checkpoint=tmp_path / "kept", block=5)
    assert first.identical(sweep(model, over=GRID, checkpoint=tmp_path / "kept", block=5))
    with pytest.raises(fo.InvalidInput, match="is of a sweep with another points"):
        sweep(model, over={"output_price": [0.1]}, checkpoint=tmp_path / "kept", block=5)
    with pytest.raises(fo.InvalidInput, match="is of a sweep with another subject"):
        sweep(fo.reference_model("separate"), over=GRID, checkpoint=tmp_path / "kept", block=5)
    (tmp_path / "other").mkdir()
    with pytest.raises(fo.InvalidInput, match="cannot be used"):
        sweep(ratio, over={"above": [1], "below": [1]}, checkpoint=tmp_path / "other")


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of over"),
        ({"over": {"above": [1]}, "design": pd.DataFrame({"above": [1]})}, "exactly one of over"),
        ({"over": 3}, "must map names to values"),
        ({"over": {}}, "there are no points"),
        ({"over": {"above": [], "below": [1]}}, "there are no points"),
        ({"over": {1: [1]}}, "names must be text"),
        ({"over": {"above": 1, "below": [1]}}, r"write \[1\]"),
        ({"over": {"above": [1, 1], "below": [1]}}, "must not repeat"),
        ({"over": {"above": [1, "a"], "below": [1]}}, "one kind"),
        ({"over": {"above": [np.nan], "below": [1]}}, "finite"),
        ({"over": {"above": [1]}}, "cannot be called with above"),
        ({"over": {"above": [1], "below": [1]}, "measure": tpot}, "measure goes with a model"),
        ({"over": {"above": [1], "below": [1]}, "block": 0}, "block must be a whole number"),
        ({"over": {"above": [1], "below": [1]}, "units": {"ratio": 1}}, "units must map"),
        ({"over": {"above": [1], "below": [1]}, "executor": 3}, "executor must be"),
    ],
)
def test_what_makes_no_sweep_is_refused(arguments, message):
    with pytest.raises(fo.InvalidInput, match=message):
        sweep(ratio, **arguments)


def test_parameters_and_values_that_a_model_refuses_are_refused_at_once():
    model = fo.reference_model()
    with pytest.raises(fo.InvalidInput, match="no parameter 'beam_width'"):
        sweep(model, over={"beam_width": [1]})
    with pytest.raises(fo.InvalidInput, match="chunk_size"):
        sweep(model, over={"chunk_size": [256, 0]})
    with pytest.raises(fo.InvalidInput, match=r"arrival_rate\[decode-heavy\] and arrival_rate move the same number"):
        sweep(model, over={"arrival_rate[decode-heavy]": [0.1], "arrival_rate": [1.0, 2.0]})
    with pytest.raises(fo.InvalidInput, match="measure must be a function"):
        sweep(model, over={"alpha": [0.01]}, measure=3)
    with pytest.raises(fo.InvalidInput, match="expected a FluidModel or a function"):
        sweep(3, over={"alpha": [0.01]})


@pytest.mark.parametrize(("result", "message"), [("text", "must return numbers"), ({"x": 1.0}, "cannot be named 'x'")])
def test_results_that_cannot_be_kept_are_errors_of_their_points(result, message):
    found = sweep(lambda x: result, over={"x": [1]})  # noqa: ARG005
    assert message in found["error"][0].item()
