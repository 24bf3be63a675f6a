"""The statistics of simulations: warm-up, batches, control variates, precision on request, percentiles, pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

import fluidopt as fo
from fluidopt.simulation.experiment import Replications, control_variates, quantities
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.run import simulate
from fluidopt.simulation.statistics import Batches, batching, drifts, jackknife, merge, warmup_cut
from fluidopt.simulation.system import Start
from fluidopt.simulation.waits import EDGES, first_token_quantiles, wait_quantiles

LEVELS = (0.5, 0.9, 0.99)


@pytest.fixture(scope="module")
def plan() -> fo.Plan:
    return fo.reference_model().solve()


def binned(waits: np.ndarray) -> np.ndarray:
    return np.histogram(waits[waits > 0], EDGES)[0]


def test_quantiles_of_binned_waits_are_those_of_the_sample() -> None:
    rng = np.random.default_rng(1)
    waits = rng.gamma(0.7, 3.0, 200_000) * (rng.random(200_000) < 0.8)
    found = wait_quantiles(binned(waits), np.array(np.sum(waits == 0)), (0.1, *LEVELS))
    np.testing.assert_allclose(found, np.quantile(waits, (0.1, *LEVELS)), rtol=0.01)
    assert found[0] == 0.0


def test_first_token_is_the_wait_and_an_exponential_prefill() -> None:
    """Two roles with prefills of different speed: against a sample of sums."""
    rng = np.random.default_rng(2)
    rate = np.array([0.5, 4.0])
    waits = [rng.exponential(2.0, 400_000), rng.exponential(0.3, 100_000) * (rng.random(100_000) < 0.5)]
    sums = np.concatenate([wait + rng.exponential(1 / mu, wait.size) for wait, mu in zip(waits, rate, strict=True)])
    found = first_token_quantiles(
        np.stack([binned(wait) for wait in waits]), np.array([np.sum(wait == 0) for wait in waits]), rate, LEVELS
    )
    np.testing.assert_allclose(found, np.quantile(sums, LEVELS), rtol=0.01)


def test_no_service_no_percentile() -> None:
    nobody = np.zeros((2, EDGES.size - 1), dtype=int)
    assert np.all(np.isnan(wait_quantiles(nobody, np.zeros(2, dtype=int), LEVELS)))
    assert np.all(np.isnan(first_token_quantiles(nobody[None], np.zeros((1, 2), dtype=int), np.ones((1, 2)), LEVELS)))


def test_percentiles_of_the_wait_are_those_of_the_queue() -> None:
    """M/M/c without abandonment: the wait of those who wait is exponential with the rate c mu - lambda (Erlang C)."""
    servers, mu, rate = 3, 1.0, 2.4
    gpu = fo.GPU(fo.IterationTime(alpha=0.0, beta=2e-5, solo=0.02), batch_size=servers, chunk_size=1000)
    only = fo.WorkloadClass("only", arrival_rate=rate, prompt_tokens=1e-3, output_tokens=50.0)
    light = fo.FluidModel([replace(only, arrival_rate=1.0)], gpu, prices=fo.TokenPrices(prompt=0.0, output=1.0))
    policy = light.solve().policy(gpus=2, prefill_gpus=1)
    assert [role.decode_slots for role in policy.roles] == [2, 3]
    slots = 5
    busy = replace(policy, scenario=replace(policy.scenario, classes=(replace(only, arrival_rate=4.2 / 2),)))
    found = busy.simulate(horizon=30_000, replications=8, seed=4)
    load = 4.2 / mu
    below = np.cumprod([1.0, *(load / k for k in range(1, slots))]).sum()
    erlang_c = (top := np.prod(load / np.arange(1, slots + 1)) * slots / (slots - load)) / (below + top)
    for name, level in zip(("p50", "p90", "p99"), LEVELS, strict=True):
        truth = max(0.0, np.log(erlang_c / (1 - level)) / (slots * mu - 4.2))
        estimate = found.estimate(f"decode_wait_{name}", "only")
        assert abs(estimate.mean - truth) < 4 * estimate.standard_error + 0.01 * truth, name


def test_percentiles_of_time_to_first_token_are_those_of_the_queue() -> None:
    """Prefill as M/M/1 without abandonment: the time to first token is exponential with the rate mu - lambda."""
    gpu = fo.GPU(fo.IterationTime(alpha=0.0, beta=1e-3, solo=1e-3), batch_size=50, chunk_size=1000)
    only = fo.WorkloadClass("only", arrival_rate=0.35, prompt_tokens=1000.0, output_tokens=1e-2)
    model = fo.FluidModel([only], gpu, prices=fo.TokenPrices(prompt=1.0, output=0.0))
    policy = model.solve().policy(gpus=2, prefill_gpus=1)
    found = policy.simulate(horizon=40_000, replications=8, seed=4)
    for name, level in zip(("p50", "p90", "p99"), LEVELS, strict=True):
        truth = -np.log(1 - level) / (1.0 - 0.7)
        estimate = found.estimate(f"time_to_first_token_{name}", "only")
        assert abs(estimate.mean - truth) < 4 * estimate.standard_error, name


def test_percentiles_of_those_served_where_some_leave() -> None:
    """M/M/1+M: of those served, the wait has the density of the virtual wait times the chance to still be there."""
    rate, mu, theta = 1.2, 1.0, 0.5
    gpu = fo.GPU(fo.IterationTime(alpha=0.0, beta=1e-3, solo=1e-3), batch_size=50, chunk_size=1000)
    only = fo.WorkloadClass("only", arrival_rate=rate, prompt_tokens=1000.0, output_tokens=1e-2, abandonment_rate=theta)
    model = fo.FluidModel([only], gpu, prices=fo.TokenPrices(prompt=1.0, output=0.0))
    policy = model.solve().policy(gpus=2, prefill_gpus=1)
    found = policy.simulate(horizon=20_000, replications=8, seed=8)
    # The stationary density f of the virtual wait v obeys f' = f (rate exp(-theta v) - mu), with f(0+) = rate times the
    # atom at 0.
    grid = np.linspace(0.0, 60.0, 600_001)
    density = np.exp(2 * rate / theta * (1 - np.exp(-theta * grid)) - mu * grid) * 2 * rate
    served = density * np.exp(-theta * grid)
    step = grid[1]
    cdf = 1.0 + np.concatenate([[0.0], np.cumsum((served[1:] + served[:-1]) / 2) * step])
    for name, level in zip(("p50", "p90", "p99"), LEVELS, strict=True):
        truth = np.interp(level * cdf[-1], cdf, grid)
        estimate = found.estimate(f"prefill_wait_{name}", "only")
        assert abs(estimate.mean - truth) < 4 * estimate.standard_error + 0.01 * truth, name


def test_control_variates_have_mean_zero(plan: fo.Plan) -> None:
    for policy in (plan.policy(gpus=4), plan.policy(gpus=4, kind="FI-WSP"), plan.policy(gpus=4, kind="sli-aware")):
        going = Replications(policy, replications=16, seed=1, start="empty")
        going.extend(np.linspace(0, 4000, 41)[1:])
        assert going.totals is not None
        controls = control_variates(going.system, going.totals).reshape(-1, 18)[:, [*range(8), 16, 17]]
        controls = controls[:, np.any(controls != 0, axis=0)]
        z = controls.mean(axis=0) / (controls.std(axis=0, ddof=1) / np.sqrt(len(controls)))
        assert np.all(np.abs(z) < 4.5), policy.kind
        assert np.sum(np.abs(z) > 1.96) <= 3


def test_estimates_with_controls_are_the_intercept_of_the_regression() -> None:
    rng = np.random.default_rng(3)
    controls = rng.normal(size=(60, 4)) @ rng.normal(size=(4, 6))  # of rank 4
    values = 2.0 + controls @ rng.normal(size=6) + rng.normal(size=60)
    batches = Batches(controls, 3)
    design = np.column_stack([np.ones(60), controls])
    slopes = np.linalg.pinv(design) @ values
    rank = np.linalg.matrix_rank(design) - 1
    without = [
        (
            np.linalg.pinv(np.delete(design, np.s_[first : first + 3], axis=0))
            @ np.delete(values, np.s_[first : first + 3])
        )[0]
        for first in range(0, 60, 3)
    ]
    error = np.sqrt(19 / 20 * np.sum((np.array(without) - slopes[0]) ** 2))
    found = batches.estimate(values)
    assert found.mean == pytest.approx(20 * slopes[0] - 19 * np.mean(without))
    assert found.standard_error == pytest.approx(error)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 19 - rank) * error)
    assert batches.weights.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(batches.weights @ controls, 0.0, atol=1e-12)
    plain = Batches(np.zeros((60, 0)), 3).estimate(values)
    assert plain.mean == pytest.approx(values.mean())
    assert plain.standard_error == pytest.approx(stats.sem(values.reshape(20, 3).mean(axis=1)))
    assert plain.effective_size == pytest.approx(20)
    assert found.effective_size > 20


def test_useless_controls_are_left_out() -> None:
    values = np.random.default_rng(4).normal(size=40)
    constant = Batches(np.full((40, 2), 0.0), 1).estimate(values)
    assert constant.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(40))


def test_warmup_is_cut_where_the_transient_ends() -> None:
    rng = np.random.default_rng(5)
    for end in (4, 10, 16):
        series = rng.normal(size=(8, 64, 2))
        series[:, :, 0] += 20 * np.exp(-np.arange(64) / (end / 5))
        cut, stationary = warmup_cut(series)
        assert end / 2 <= cut <= 2 * end
        assert stationary
    cuts = [warmup_cut(rng.normal(size=(8, 64, 4)))[0] for _ in range(200)]
    assert np.mean(cuts) < 4, "a stationary series loses next to nothing"
    trend = rng.normal(size=(8, 64, 1)) + np.arange(64)[:, None]
    assert not warmup_cut(trend)[1]
    assert drifts(trend)
    assert sum(drifts(rng.normal(size=(8, 64, 4))) for _ in range(1000)) < 8


def test_batches_grow_with_the_correlation_time() -> None:
    rng = np.random.default_rng(6)

    def autoregression(memory: float) -> np.ndarray:
        noise = rng.normal(size=(8, 1088, 1))
        for k in range(1, noise.shape[1]):
            noise[:, k] += memory * noise[:, k - 1]
        return noise[:, 64:]

    sizes = {
        memory: np.median([batching(each := autoregression(memory), each[..., :0])[0] for _ in range(20)])
        for memory in (0.0, 0.5, 0.95)
    }
    assert sizes[0.0] <= 2
    assert 4 <= sizes[0.5] <= 32
    assert sizes[0.95] > sizes[0.5]
    trend = np.linspace(0, 100, 64)[None, :, None] + rng.normal(size=(8, 64, 1))
    assert batching(trend, trend[..., :0])[0] >= 16


def test_merging_keeps_what_fills_a_batch() -> None:
    values = np.arange(2 * 7).reshape(2, 7)
    np.testing.assert_array_equal(merge(values, 3), [[1 + 2 + 3, 4 + 5 + 6], [8 + 9 + 10, 11 + 12 + 13]])


def test_pseudo_values_are_batch_means_and_unbias_ratios(plan: fo.Plan) -> None:
    policy = plan.policy(gpus=5)
    system = fleet_system(policy)
    going = Replications(policy, replications=4, seed=2, start="fluid")
    going.extend(np.linspace(0, 800, 9)[1:])
    assert going.totals is not None
    batches = going.totals.map(np.concatenate)
    values = jackknife(lambda totals: quantities(system, totals), batches)
    direct = quantities(system, batches)
    for name in ("revenue_rate", "throughput", "role_decode", "prefill_wait"):
        np.testing.assert_allclose(values[name], direct[name], rtol=1e-9, atol=1e-9)
    whole = quantities(system, batches.map(lambda array: array.sum(axis=0)))
    np.testing.assert_allclose(values["decode_wait"].mean(axis=0), whole["decode_wait"], rtol=0.02)


def test_intervals_cover_with_warmup_and_batches_chosen() -> None:
    """300 simulations of one GPU from empty, all rules on, against the exact chain."""
    small = fo.GPU(fo.IterationTime(alpha=0.0174, beta=6.2e-5, solo=0.022), batch_size=2, chunk_size=256)
    only = fo.WorkloadClass("only", arrival_rate=0.8, prompt_tokens=900, output_tokens=60, abandonment_rate=0.4)
    model = fo.FluidModel([only], small, prices=fo.TokenPrices(prompt=0.1, output=0.2))
    policy = model.solve().policy(gpus=2, prefill_gpus=1)
    truth = fo.exact_chain(policy)
    assert truth.exact
    covered = dict.fromkeys(("revenue_rate", "prefill_queue", "decode", "abandonment_share", "decode_wait"), 0)
    for seed in range(300):
        found = policy.simulate(horizon=600, replications=4, seed=seed)
        for name in covered:
            low, high = found.estimate(name, None if name == "revenue_rate" else "only").interval
            covered[name] += low <= float(np.ravel(truth.values[name])[0]) <= high
    assert all(0.92 <= count / 300 <= 0.98 for count in covered.values()), covered


def test_precision_costs_a_third_of_plain_replications(plan: fo.Plan) -> None:
    """0.1 % on 50 GPUs: against replications of 2,000 s with 200 s of warm-up, averaged until precise enough."""
    policy = plan.policy(gpus=50)
    system = fleet_system(policy)
    ours = plain = 0.0
    for seed in range(4):
        found = policy.simulate(precision=0.001, seed=seed)
        assert found.revenue_rate.half_width <= 0.001 * found.revenue_rate.mean
        assert abs(found.revenue_rate.mean - 288.64) < 0.6
        ours += found.events
        rng, revenue = np.random.default_rng(seed), []
        while len(revenue) < 8 or stats.sem(revenue) * stats.t.ppf(0.975, len(revenue) - 1) > 0.001 * np.mean(revenue):
            seen = simulate(system, Start.empty(system), horizon=2000.0, warmup=200.0, rng=rng)
            revenue.append(float(seen.reward) / 1800.0 / 50)
            plain += int(seen.events) / 0.9
    assert ours < plain / 3


def test_precise_intervals_cover(plan: fo.Plan) -> None:
    """Stopping when precise enough must not stop too early."""
    policy = plan.policy(gpus=5)
    reference = policy.simulate(precision=0.0004, seed=10**6, start="fluid").revenue_rate
    hits = 0
    for seed in range(150):
        found = policy.simulate(precision=0.006, seed=seed, start="fluid").revenue_rate
        hits += abs(found.mean - reference.mean) <= found.half_width
    assert 0.91 <= hits / 150 <= 0.99


def test_precision_that_the_horizon_does_not_allow_is_said(plan: fo.Plan) -> None:
    found = plan.policy(gpus=5).simulate(precision=1e-5, horizon=500.0, seed=1)
    assert found.horizon == pytest.approx(500.0)
    assert "NOT REACHED" in str(found)


def test_a_fleet_that_never_settles_is_said() -> None:
    gpu = fo.GPU(fo.IterationTime(alpha=0.0, beta=1e-3, solo=1e-3), batch_size=50, chunk_size=1000)
    only = fo.WorkloadClass("only", arrival_rate=0.35, prompt_tokens=1000.0, output_tokens=1e-2)
    policy = (
        fo.FluidModel([only], gpu, prices=fo.TokenPrices(prompt=1.0, output=0.0)).solve().policy(gpus=2, prefill_gpus=1)
    )
    overloaded = replace(policy, scenario=replace(policy.scenario, classes=(replace(only, arrival_rate=0.7),)))
    found = overloaded.simulate(horizon=5000, seed=1, replications=4)
    assert not found.stationary
    assert "NOT STATIONARY" in str(found)


def test_path_is_that_of_the_replication(plan: fo.Plan) -> None:
    policy = plan.policy(gpus=20)
    found = policy.simulate(horizon=200, seed=1, replications=2, path=201)
    assert found == policy.simulate(horizon=200, seed=1, replications=2), "looking changes nothing"
    path = found.path(1)
    np.testing.assert_allclose(path.index, np.linspace(0, 200, 201))
    assert path.iloc[0].sum() == 0
    counts = path.to_numpy() * 20
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-9)
    late = path.iloc[100:]["decode"].sum(axis=1).mean()
    assert late == pytest.approx(found.values["decode"].sum(axis=1).mean(), rel=0.1)
    with pytest.raises(fo.InvalidInput, match=r"replication must be below 2, .* got 2"):
        found.path(2)


def test_policies_meet_the_same_arrivals(plan: fo.Plan) -> None:
    streams = []
    for kind in ("GG-SP", "FI-WSP"):
        going = Replications(plan.policy(gpus=20, kind=kind), replications=2, seed=7, start="empty")
        going.extend(np.linspace(0, 100, 11)[1:])
        assert going.totals is not None
        streams.append(going.totals.arrivals)
    np.testing.assert_array_equal(*streams)


def test_pairs_are_narrower_and_right(plan: fo.Plan) -> None:
    policies = {"base": plan.policy(gpus=20), "fewest": None}
    policies["fewest"] = replace(policies["base"], gate=replace(policies["base"].gate, placement="fewest-decodes"))
    compared = fo.compare_policies(policies, horizon=3000, seed=1)
    gap = compared.difference("fewest", "base")
    apart = [policies[name].simulate(precision=0.0008, seed=99 + k).revenue_rate for k, name in enumerate(policies)]
    assert abs(gap.mean - (apart[1].mean - apart[0].mean)) < 4 * np.hypot(
        gap.standard_error, np.hypot(apart[0].standard_error, apart[1].standard_error)
    )
    frame = compared.to_frame("base")
    assert frame.loc["fewest", "difference"] == pytest.approx(gap.mean)
    assert frame.loc["fewest", "difference_half_width"] < frame.loc["fewest", "unpaired_half_width"]
    assert fo.PolicyComparison.from_dict(compared.to_dict()) == compared
    assert compared.best in str(compared)
    throughput = compared.difference("fewest", "base", "throughput", "decode-heavy")
    assert abs(throughput.mean) < 0.1


def test_paired_intervals_cover(plan: fo.Plan) -> None:
    policies = [plan.policy(gpus=5, kind=kind) for kind in ("GG-SP", "FI-WSP")]
    one, other = (policy.simulate(precision=0.0004, seed=10**6, start="fluid").revenue_rate for policy in policies)
    hits = 0
    for seed in range(120):
        gap = fo.compare_policies(policies, horizon=600, seed=seed, replications=4, start="fluid").difference(
            "FI-WSP", "GG-SP"
        )
        hits += abs(gap.mean - (other.mean - one.mean)) <= gap.half_width
    assert 0.9 <= hits / 120 <= 0.995


def test_comparisons_that_make_no_sense_are_refused(plan: fo.Plan) -> None:
    policy = plan.policy(gpus=5)
    with pytest.raises(fo.InvalidInput, match="at least two policies; got 1"):
        fo.compare_policies([policy], horizon=10)
    with pytest.raises(fo.InvalidInput, match="2 policies of the kind 'gate-and-route'; name them"):
        fo.compare_policies([policy, policy], horizon=10)
    with pytest.raises(fo.InvalidInput, match="same GPUs and classes"):
        fo.compare_policies({"a": policy, "b": plan.policy(gpus=6)}, horizon=10)
    with pytest.raises(fo.InvalidInput, match="'b' must be a Policy; got int"):
        fo.compare_policies({"a": policy, "b": 3}, horizon=10)  # type: ignore[dict-item]
    compared = fo.compare_policies({"a": policy, "b": plan.policy(gpus=5, kind="FI-WSP")}, horizon=50, seed=1)
    with pytest.raises(fo.InvalidInput, match="to must be one of 'a', 'b'; got 'c'"):
        compared.to_frame("c")
    with pytest.raises(fo.InvalidInput, match="no 'results'"):
        fo.PolicyComparison.from_dict({})
