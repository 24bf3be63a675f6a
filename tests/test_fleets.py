"""Fleets: sets of operating modes, several GPU types, disaggregation, and the size of the cheapest fleet."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from strategies import CHARGING, build, gpus, impatient_workloads, log_floats, log_integers, prices

import fluidopt as fo
from fluidopt.reference import QWEN_4B_A100, QWEN_8B_A100, reference_model, reference_workload
from fluidopt.solvers import solve_program
from fluidopt.studies.sizing.fleet import FleetSize, size_fleet
from fluidopt.studies.sizing.problem import formulate

PRICES = fo.TokenPrices(prompt=0.1, output=0.2)
A100 = fo.GPU(QWEN_8B_A100, batch_size=16, chunk_size=256, name="a100", hourly_price=2.0)
FAST = fo.GPU(
    fo.IterationTime(alpha=0.01, beta=2e-5, solo=0.012), batch_size=24, chunk_size=512, name="h100", hourly_price=4.5
)
STREAM = reference_workload().scaled(40)
PHYSICAL = st.just(True)


class Crowded(fo.IterationTime):
    """A curve on which every decode slows the others."""

    def mixed(self, chunk, decodes=0):
        return super().mixed(chunk) + 4e-4 * decodes

    def decode_only(self, decodes=0):
        return 0.012 + 4e-4 * decodes


CROWDED = Crowded(alpha=0.016, beta=6e-5, solo=0.012)


def contents(modes):
    return [(mode.name, mode.chunk, mode.decode_slots, mode.iteration_time, mode.after_prefill) for mode in modes]


def optimum(classes, *types, charging="bundled", prices=PRICES):
    return build(classes, types, prices=prices, charging=charging).solve().revenue_rate


# ---- sets of modes ------------------------------------------------------------------------------------------------


def test_without_arguments_the_modes_are_those_the_gpu_has():
    tau, solo = 0.0174 + 6.2e-5 * 256, 0.022
    pair = [("mixed", 256, 15, pytest.approx(tau), "solo"), ("solo", 0, 16, solo, None)]
    assert contents(A100.modes()) == pair
    assert contents(A100.modes(chunks=[256])) == contents(A100.modes(batches=[16])) == pair
    other = A100.with_modes(disaggregated=True)
    assert other.modes() == other.operating_modes == A100.modes(disaggregated=True)
    assert contents(other.modes(chunks=[256])) == pair
    assert other.with_modes() == other
    assert A100.with_modes().operating_modes == A100.modes()


def test_several_chunks_have_a_mixed_mode_each():
    assert contents(A100.modes(chunks=[32, 512])) == [
        ("mixed C=32", 32, 15, 0.022, "solo"),
        ("mixed C=512", 512, 15, pytest.approx(0.0174 + 6.2e-5 * 512), "solo"),
        ("solo", 0, 16, 0.022, None),
    ]


def test_several_batches_have_a_mode_with_and_one_without_prefill_each():
    gpu = fo.GPU(CROWDED, batch_size=16, chunk_size=256)
    mixed = 0.016 + 6e-5 * 256
    assert contents(gpu.modes(batches=[1, 16])) == [
        ("mixed B=1", 256, 0, pytest.approx(mixed), "solo B=1"),
        ("mixed B=16", 256, 15, pytest.approx(mixed + 4e-4 * 15), "solo B=16"),
        ("solo B=1", 0, 1, pytest.approx(0.0124), None),
        ("solo B=16", 0, 16, pytest.approx(0.0184), None),
    ]
    both = gpu.modes(chunks=(64, 256), batches=np.array([4, 8]))
    assert [mode.name for mode in both] == [
        "mixed C=64 B=4",
        "mixed C=64 B=8",
        "mixed C=256 B=4",
        "mixed C=256 B=8",
        "solo B=4",
        "solo B=8",
    ]
    assert all(type(mode.chunk) is int and type(mode.decode_slots) is int for mode in both)
    assert [gpu.with_modes(chunks=(64, 256), batches=[4, 8]).rest_mode(mode).decode_slots for mode in both[:4]] == [
        *(4, 8, 4, 8)
    ]


def test_a_disaggregated_gpu_prefills_or_decodes():
    gpu = fo.GPU(CROWDED, batch_size=16, chunk_size=256)
    assert contents(gpu.modes(disaggregated=True)) == [
        ("prefill", 256, 0, pytest.approx(0.016 + 6e-5 * 256), "idle"),
        ("idle", 0, 0, None, None),
        ("decode", 0, 16, pytest.approx(0.0184), None),
    ]
    names = [mode.name for mode in gpu.modes(chunks=[128, 256], batches=[8, 16], disaggregated=True)]
    assert names == ["prefill C=128", "prefill C=256", "idle", "decode B=8", "decode B=16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"chunks": []},
            r"GPU 'a100': modes: chunks is empty; give at least one, or leave it out for chunk_size = 256",
        ),
        ({"chunks": 512}, r"chunks must be a list of whole numbers; got 512; write \[512\]"),
        ({"chunks": [0]}, r"chunks must hold whole numbers from 1 to 1000000000; got 0"),
        ({"chunks": [1.5]}, r"chunks must hold whole numbers .* got 1\.5"),
        ({"chunks": [True]}, r"got True"),
        ({"chunks": ["256"]}, r"got '256'"),
        ({"chunks": [64, 64]}, r"chunks must not repeat an entry; 64 occurs more than once; list it once"),
        ({"batches": []}, r"batches is empty; .* batch_size = 16"),
        ({"batches": [17]}, r"batches must hold whole numbers from 1 to 16, the GPU's batch_size; got 17"),
        ({"batches": [8, 8.0]}, r"batches must not repeat"),
        ({"disaggregated": 1}, r"disaggregated must be True or False; got 1"),
    ],
)
def test_what_makes_no_modes_is_refused(arguments, message):
    for call in (A100.modes, A100.with_modes):
        with pytest.raises(fo.InvalidInput, match=message):
            call(**arguments)


def test_a_gpu_with_modes_and_a_price_goes_through_a_scenario():
    gpu = A100.with_modes(chunks=[64, 256], batches=[8, 16])
    scenario = build(STREAM, gpu).scenario
    assert fo.Scenario.from_dict(json.loads(json.dumps(scenario.to_dict()))) == scenario
    assert scenario.to_dict()["gpu"]["hourly_price"] == 2.0
    assert "hourly_price" not in build(STREAM, replace(A100, hourly_price=None)).scenario.to_dict()["gpu"]
    with pytest.raises(fo.InvalidInput, match=r"hourly_price must be at least 0; got -1"):
        replace(A100, hourly_price=-1)


# ---- what modes and types are worth -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(impatient_workloads(max_classes=3), gpus(min_batch=2), prices(), CHARGING, st.data())
def test_more_modes_never_lower_the_optimum(classes, gpu, paid, charging, data):
    disaggregated = data.draw(st.booleans())
    chunks = data.draw(st.lists(log_integers(1, 2048), min_size=1, max_size=3, unique=True))
    batches = data.draw(st.lists(st.integers(1, gpu.batch_size), min_size=1, max_size=3, unique=True))
    few = gpu.with_modes(chunks=chunks[:1], batches=batches[:1], disaggregated=disaggregated)
    many = gpu.with_modes(chunks=chunks, batches=batches, disaggregated=disaggregated)
    less, more = (optimum(classes, each, charging=charging, prices=paid) for each in (few, many))
    assert more >= less * (1 - 1e-7) - 1e-9


@settings(max_examples=25)
@given(impatient_workloads(max_classes=3), gpus(min_batch=2), CHARGING, st.floats(0.05, 0.95), st.data())
def test_a_type_split_in_two_is_the_same_fleet(classes, gpu, charging, share, data):
    if data.draw(st.booleans()):
        gpu = gpu.with_modes(chunks=[32, 400], batches=[1, gpu.batch_size])
    whole = build(classes, gpu, charging=charging).solve()
    halves = [replace(gpu, name="one", share=share), replace(gpu, name="two", share=1 - share)]
    split = build(classes, halves, charging=charging).solve()
    assert split.revenue_rate == pytest.approx(whole.revenue_rate, rel=1e-7, abs=1e-9)
    # Where the class at the threshold is not unique, several class totals earn the same.
    assume("either" not in set(whole.thresholds["decision"]))
    assume((whole.thresholds["decision"] == "serve part").sum() <= 1)
    if charging == "bundled":
        np.testing.assert_allclose(split.throughput, whole.throughput, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("load", [0.3, 1.0, 3.0])
def test_a_disaggregated_type_finds_the_best_fixed_split(load):
    classes = reference_workload().scaled(load)
    free = build(classes, A100.with_modes(disaggregated=True)).solve()
    prefill, idle, decode = A100.modes(disaggregated=True)

    def fixed(share):
        return optimum(
            classes,
            replace(A100, name="p", share=share, operating_modes=(prefill, idle)),
            replace(A100, name="d", share=1 - share, operating_modes=(decode,)),
        )

    grid = np.linspace(0.02, 0.98, 49)
    values = np.array([fixed(share) for share in grid])
    assert values.max() <= free.revenue_rate * (1 + 1e-9)
    assert values.max() >= free.revenue_rate * 0.97
    best = float(grid[values.argmax()])
    around = [fixed(share) for share in np.linspace(best - 0.02, best + 0.02, 41) if 0 < share < 1]
    assert max(around) == pytest.approx(free.revenue_rate, rel=2e-3)
    assert fixed(float(free.mode_share[0])) == pytest.approx(free.revenue_rate, rel=1e-8)


def test_a_limit_on_kv_transfer_binds_and_its_price_is_the_slope():
    gpu = A100.with_modes(disaggregated=True)

    def plan(limit):
        levels = [] if limit is None else [fo.KVTransfer(at_most=limit)]
        return fo.FluidModel(reference_workload(), gpu, prices=PRICES, service_levels=levels).solve()

    def moved(plan):
        return plan.model.workload.prompt_tokens @ plan.admitted

    free = moved(plan(None))
    limited = plan(0.6 * free)
    assert moved(limited) == pytest.approx(0.6 * free)
    slope = (plan(0.61 * free).revenue_rate - plan(0.59 * free).revenue_rate) / (0.02 * free)
    assert slope > 0
    assert limited.shadow_prices["kv_transfer"] == pytest.approx(slope, rel=1e-6)
    assert plan(1.1 * free).shadow_prices["kv_transfer"] == pytest.approx(0, abs=1e-9)
    # Mixed GPUs keep their prompts, so the limit is not theirs.
    both = replace(gpu, operating_modes=(*gpu.modes(), *A100.modes()))
    free_of_it = fo.FluidModel(reference_workload(), both, prices=PRICES, service_levels=[fo.KVTransfer(at_most=0)])
    assert free_of_it.solve().revenue_rate == pytest.approx(optimum(reference_workload(), A100), rel=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_two_types_against_brute_force_over_their_mixed_shares(share):
    """Given mode fractions, max sum w z over z <= a <= lambda, sum P a = p, sum D z <= d is a small LP of its own."""
    classes = reference_workload().scaled(2)
    types = [replace(A100, share=share), replace(FAST, share=1 - share)]
    P, D, lam = classes.prompt_tokens, classes.output_tokens, classes.arrival_rate
    w = PRICES.prompt * P + PRICES.output * D
    size = len(lam)
    order = np.block([np.eye(size), -np.eye(size)])  # z - a <= 0

    def value(mixed):
        p = d = 0.0
        for gpu, fraction in zip(types, mixed, strict=True):
            at, alone = gpu.modes()
            p += gpu.share * fraction * at.prefill_speed
            d += gpu.share * (fraction * at.decode_slots * at.decode_speed)
            d += gpu.share * (1 - fraction) * alone.decode_slots * alone.decode_speed
        answer = linprog(
            np.r_[-w, np.zeros(size)],
            A_ub=np.vstack([order, np.r_[D, np.zeros(size)]]),
            b_ub=np.r_[np.zeros(size), d],
            A_eq=[np.r_[np.zeros(size), P]],
            b_eq=[p],
            bounds=[*[(0, None)] * size, *((0, rate) for rate in lam)],
        )
        return -answer.fun if answer.success else -math.inf

    plan = build(classes, types).solve()
    at = np.array([0.5, 0.5])
    width = 0.5
    best = -math.inf
    for _ in range(5):
        sides = [np.clip(np.linspace(middle - width, middle + width, 9), 0, 1) for middle in at]
        points = [(a, b) for a in sides[0] for b in sides[1]]
        values = [value(point) for point in points]
        at, best, width = np.array(points[int(np.argmax(values))]), max(best, *values), width / 2.5
    assert best <= plan.revenue_rate * (1 + 1e-8)
    assert best >= plan.revenue_rate * (1 - 5e-3)
    own = plan.mode_share[[0, 2]] / [gpu.share for gpu in types]
    assert value(own) == pytest.approx(plan.revenue_rate, rel=1e-7)


def test_a_prefill_alone_is_worth_listing_where_decodes_slow_each_other():
    """With the curve of `Crowded`, (C, 0) lies outside what (C, B-1) and (0, B) span."""
    gpu = fo.GPU(CROWDED, batch_size=16, chunk_size=256)
    summaries = [
        fo.WorkloadClass("s", arrival_rate=5, prompt_tokens=3000, output_tokens=20, abandonment_rate=0.1),
    ]
    pair, full = optimum(summaries, gpu), optimum(summaries, gpu.with_modes(batches=[1, 4, 8, 16]))
    assert full > pair * 1.01
    assert optimum(summaries, gpu.with_modes(batches=[1, 16])) <= full * (1 + 1e-9)


FLEETS = {
    "chunks": ([A100.with_modes(chunks=[64, 256, 1024])], {"mixed C=64", "mixed C=256", "mixed C=1024", "solo"}),
    "batches": (
        [fo.GPU(CROWDED, batch_size=16, chunk_size=256).with_modes(batches=[1, 8, 16])],
        {f"{kind} B={b}" for kind in ("mixed", "solo") for b in (1, 8, 16)},
    ),
    "disaggregated": ([A100.with_modes(disaggregated=True)], {"prefill", "idle", "decode"}),
    "two types": (
        [replace(A100, share=0.5), replace(FAST, share=0.5).with_modes(disaggregated=True)],
        {"a100/mixed", "a100/solo", "h100/prefill", "h100/idle", "h100/decode"},
    ),
}


@pytest.mark.parametrize("fleet", FLEETS)
def test_policies_of_such_fleets_have_their_roles_and_run(fleet):
    types, names = FLEETS[fleet]
    plan = build(reference_workload(), types).solve()
    policy = plan.policy(gpus=20)
    assert sum(role.gpus for role in policy.roles) == 20
    assert {role.name for role in policy.roles} <= names
    for role in policy.roles:
        gpu = next(each for each in types if each.name == role.gpu)
        mode = next(mode for mode in gpu.modes() if mode.name == role.name.rpartition("/")[2])
        assert role.decode_slots == mode.decode_slots
        assert role.slots == mode.decode_slots + mode.prefills
        assert role.rest == (gpu.rest_mode(mode) if mode.prefills else mode)
    share = dict(zip(plan.model.labels["mode"], plan.mode_share, strict=True))
    counts = {role.name: role.gpus for role in policy.roles}
    assert all(abs(counts.get(name, 0) - 20 * part) < 2 for name, part in share.items() if not name.endswith("idle"))
    result = policy.simulate(horizon=60, warmup=20, replications=2, seed=1, start="fluid")
    assert 0.3 * plan.revenue_rate < result.revenue_rate.mean < 1.2 * plan.revenue_rate


# ---- sizing: by hand and by another route -------------------------------------------------------------------------


def pair_by_hand(gpu, rate, prompt, output):
    """GPUs that one class needs: phi_m = prefill work, the decodes that do not fit beside it go to solo GPUs."""
    mixed, solo = gpu.modes()
    prefill = rate * prompt / mixed.prefill_speed
    left = rate * output - prefill * mixed.decode_slots * mixed.decode_speed
    return prefill, max(0.0, left) / (solo.decode_slots * solo.decode_speed)


@settings(max_examples=25)
@given(gpus(PHYSICAL, 2), log_floats(0.1, 50), log_floats(20, 4000), log_floats(2, 2000))
def test_one_type_and_one_class_by_hand(gpu, rate, prompt, output):
    one = fo.WorkloadClass("one", arrival_rate=rate, prompt_tokens=prompt, output_tokens=output, abandonment_rate=0.05)
    mixed, solo = pair_by_hand(gpu, rate, prompt, output)
    size = size_fleet([one], gpu)
    assert size.gpus == pytest.approx([mixed + solo], rel=1e-6)
    assert size.modes["gpus"].to_list() == pytest.approx([mixed, solo], rel=1e-6, abs=1e-6 * (mixed + solo))
    assert size.cost == pytest.approx(mixed + solo, rel=1e-6)
    assert size.lower_bound == pytest.approx(size.cost, rel=1e-6)
    assert size.marginal_cost == pytest.approx([(mixed + solo) / rate], rel=1e-6)
    # A mean wait W lets theta W of the arrivals abandon, and a price turns GPUs into money.
    waiting = size_fleet([one], replace(gpu, hourly_price=3.0), service_levels=[fo.MeanWait(at_most=4.0)])
    assert waiting.cost == pytest.approx(3.0 * 0.8 * (mixed + solo), rel=1e-6)
    assert waiting.classes.loc["one", "mean_wait"] == pytest.approx(4.0)
    assert waiting.promises["marginal_cost"].to_list() == pytest.approx([-3.0 * 0.05 * (mixed + solo)], rel=1e-6)


def bisect(enough, high):
    low = 0.0
    while high - low > 1e-7 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def feasible(levels, gpu=A100, classes=STREAM):
    """Whether a `FluidModel` of n GPUs keeps the promises."""

    def enough(n):
        model = fo.FluidModel(classes.per_gpu(n), gpu, prices=PRICES, service_levels=levels)
        try:
            solve_program(model.program())
        except fo.InfeasibleModel:
            return False
        return True

    return enough


PROMISES = {
    "floor": [fo.CompletionFloor(share=0.8)],
    "wait": [fo.MeanWait(at_most=2.0)],
    "served wait": [fo.MeanWait(at_most=2.0, of="served")],
    "first token": [fo.MeanTTFT(at_most=3.0)],
    "served first token": [fo.MeanTTFT(at_most=3.0, of="served"), fo.MeanTPOT(at_most=0.0225)],
    "token": [fo.CompletionFloor(share=0.9), fo.MeanTPOT(at_most=0.0225)],
    "slots": [fo.CompletionFloor(share=0.9), fo.SlotTPOT(at_most=0.0225)],
    "abandonment": [fo.AbandonmentShare(at_most=0.15)],
    "memory": [fo.CompletionFloor(share=0.9), fo.KVMemory(tokens=20_000)],
    "prefill fairness": [fo.CompletionFloor(share=0.3), fo.PrefillFairness(at_most=0.05)],
    "decode fairness": [fo.CompletionFloor(share=0.4), fo.DecodeFairness(at_most=1.0)],
    "transfer": [fo.CompletionFloor(share=0.9), fo.KVTransfer(at_most=900.0)],
}


def gpu_for(promise):
    return A100.with_modes(disaggregated=True) if promise == "transfer" else A100


@pytest.mark.parametrize("promise", PROMISES)
def test_the_size_is_where_models_of_that_many_gpus_begin_to_be_feasible(promise):
    levels, gpu = PROMISES[promise], gpu_for(promise)
    size = size_fleet(STREAM, gpu, service_levels=levels)
    n = float(size.gpus[0])
    enough = feasible(levels, gpu)
    assert enough(n * (1 + 1e-6))
    assert not enough(n * (1 - 1e-6))
    if promise in ("wait", "token"):
        assert bisect(enough, 10 * n) == pytest.approx(n, rel=1e-5)


def test_the_size_is_where_revenue_reaches_that_of_serving_all():
    w = PRICES.prompt * STREAM.prompt_tokens + PRICES.output * STREAM.output_tokens
    target = float(w @ STREAM.arrival_rate) * (1 - 1e-9)
    n = bisect(lambda n: n * optimum(STREAM.per_gpu(n), A100) >= target, 100.0)
    assert size_fleet(STREAM, A100).gpus == pytest.approx([n], rel=1e-5)


@pytest.mark.parametrize("charging", ["bundled", "separate"])
def test_a_revenue_floor_is_where_the_optimal_plan_earns_it(charging):
    floor = 9000.0
    size = size_fleet(STREAM, A100, prices=PRICES, charging=charging, service_levels=(), revenue_floor=floor)
    n = bisect(lambda n: n * optimum(STREAM.per_gpu(n), A100, charging=charging) >= floor, 100.0)
    assert size.gpus == pytest.approx([n], rel=1e-5)
    assert size.revenue_rate == pytest.approx(floor, rel=1e-6)
    more = size_fleet(STREAM, A100, prices=PRICES, charging=charging, service_levels=(), revenue_floor=floor + 1)
    assert size.shadow_prices["revenue_floor"] == pytest.approx(more.cost - size.cost, rel=1e-5)


def test_the_mix_of_types_against_the_token_rates_of_their_modes():
    """Bundled, all served: min cost over mode times with enough prompt and output tokens/s (another program, scipy)."""
    types = [
        A100,
        replace(FAST, hourly_price=5.2),
        fo.GPU(QWEN_4B_A100, batch_size=8, chunk_size=1024, name="l4", hourly_price=1.1).with_modes(disaggregated=True),
    ]
    modes = [(gpu, mode) for gpu in types for mode in gpu.modes()]
    needed = [STREAM.prompt_tokens @ STREAM.arrival_rate, STREAM.output_tokens @ STREAM.arrival_rate]
    speeds = [
        [mode.prefill_speed for _, mode in modes],
        [mode.decode_slots * mode.decode_speed for _, mode in modes],
    ]
    answer = linprog([gpu.hourly_price for gpu, _ in modes], A_ub=-np.array(speeds), b_ub=-np.array(needed))
    size = size_fleet(STREAM, types)
    assert size.cost == pytest.approx(answer.fun, rel=1e-8)
    assert size.cost <= min(size_fleet(STREAM, gpu).cost for gpu in types) * (1 + 1e-9)
    assert size.cost == pytest.approx(float(size.to_frame()["cost"].sum()))


# ---- sizing: what its numbers obey --------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    impatient_workloads(max_classes=3), gpus(PHYSICAL, 2), st.floats(0.1, 0.95), log_floats(0.1, 5), log_floats(0.1, 10)
)
def test_cost_is_homogeneous_and_is_that_of_the_requests(classes, gpu, share, wait, factor):
    assume(classes.arrival_rate.sum() > 0)
    levels = [fo.CompletionFloor(share=share), fo.MeanWait(at_most=wait)]
    types = [replace(gpu, hourly_price=2.0), replace(gpu, name="b", hourly_price=3.0).with_modes(chunks=[64, 800])]
    size, scaled = (size_fleet(each, types, service_levels=levels) for each in (classes, classes.scaled(factor)))
    assert scaled.cost == pytest.approx(factor * size.cost, rel=1e-6)
    assert float(size.marginal_cost @ classes.arrival_rate) == pytest.approx(size.cost, rel=1e-6)
    assert size.lower_bound == pytest.approx(size.cost, rel=1e-6)
    assert size.certificate.holds(1e-7)


@settings(max_examples=25)
@given(impatient_workloads(max_classes=3), gpus(PHYSICAL, 2), st.floats(0.05, 0.9), st.floats(0, 1), st.data())
def test_a_tighter_promise_needs_no_fewer_gpus(classes, gpu, loose, step, data):
    assume(classes.arrival_rate.sum() > 0)
    tight = loose + step * (1 - loose)
    make = data.draw(
        st.sampled_from(
            [
                lambda much: fo.CompletionFloor(share=much),
                lambda much: fo.AbandonmentShare(at_most=1 - much),
                lambda much: fo.MeanWait(at_most=2 / much - 2),
                lambda much: fo.MeanTTFT(at_most=2 / much),
            ]
        )
    )

    def cost(much, gpu):
        try:
            return size_fleet(classes, gpu, service_levels=[fo.CompletionFloor(share=0.05), make(much)]).cost
        except fo.InfeasibleModel:
            return math.inf

    assert cost(tight, gpu) >= cost(loose, gpu) * (1 - 1e-6)
    wider = gpu.with_modes(chunks=sorted({gpu.chunk_size, 100}))
    assert cost(tight, wider) <= cost(tight, gpu) * (1 + 1e-6)


@pytest.mark.parametrize("promise", PROMISES)
def test_the_prices_of_requests_and_promises_are_slopes(promise):
    levels, gpu = PROMISES[promise], gpu_for(promise)
    size = size_fleet(STREAM, gpu, service_levels=levels)
    for at, each in enumerate(STREAM):
        step = 1e-4 * each.arrival_rate
        ends = []
        for rate in (each.arrival_rate - step, each.arrival_rate + step):
            classes = list(STREAM)
            classes[at] = replace(each, arrival_rate=rate)
            ends.append(size_fleet(classes, gpu, service_levels=levels).cost)
        assert size.marginal_cost[at] == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-5, abs=1e-7)
    for at, level in enumerate(levels):
        field = next(name for name in ("at_most", "share", "tokens") if getattr(level, name, None) is not None)
        bound = getattr(level, field)
        step = 1e-4 * bound
        ends = []
        for value in (bound - step, bound + step):
            changed = [*levels]
            changed[at] = replace(level, **{field: value})
            ends.append(size_fleet(STREAM, gpu, service_levels=changed).cost)
        total = size.promises["marginal_cost"].xs(level.kind, level="promise").sum()
        assert total == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-4, abs=1e-6 * size.cost / bound)


def test_every_promise_tested_for_its_price_has_one():
    """Else the test above compares 0 with 0."""
    for promise, levels in PROMISES.items():
        size = size_fleet(STREAM, gpu_for(promise), service_levels=levels)
        prices = size.promises["marginal_cost"].groupby(level="promise").sum()
        assert (prices.abs() > 1e-6).all(), (promise, prices)


def test_a_promise_may_be_broken_for_a_penalty_where_that_is_cheaper():
    hard = size_fleet(STREAM, A100)
    # Serving a request costs this much (money/request); below it, the penalty is paid.
    cost = hard.marginal_cost / 3600
    dear, cheap = (
        size_fleet(
            STREAM,
            A100,
            service_levels=[
                fo.CompletionFloor(share=1.0, penalty=penalty, classes=("decode-heavy",)),
                fo.CompletionFloor(share=1.0, classes=("prefill-heavy",)),
            ],
        )
        for penalty in (1.05 * cost[0], 0.95 * cost[0])
    )
    assert dear.cost == pytest.approx(hard.cost)
    assert dear.penalty == pytest.approx(0, abs=1e-9)
    assert cheap.classes["completed"].to_list() == pytest.approx([0, 20], abs=1e-6)
    assert cheap.penalty == pytest.approx(0.95 * cost[0] * 20 * 3600)
    assert cheap.cost + cheap.penalty < hard.cost
    assert cheap.lower_bound == pytest.approx(cheap.cost + cheap.penalty, rel=1e-6)
    assert cheap.promises["marginal_cost"].to_list()[0] == pytest.approx(0.95 * cost[0] * 20 * 3600)
    assert "penalties" in repr(cheap)
    assert "penalties" not in repr(hard)


def test_limits_move_the_mix_and_have_a_price():
    free = size_fleet(STREAM, [A100, FAST])
    scarce = size_fleet(STREAM, [A100, FAST], max_gpus={"h100": 5})
    assert free.gpus[0] == pytest.approx(0, abs=1e-7)
    assert scarce.gpus[1] == pytest.approx(5)
    more = size_fleet(STREAM, [A100, FAST], max_gpus={"h100": 6})
    assert scarce.shadow_prices["max_gpus[h100]"] == pytest.approx(more.cost - scarce.cost)
    both = size_fleet(STREAM, [A100, FAST], max_gpus=16)
    assert both.cost == pytest.approx(free.cost)
    owned = size_fleet(STREAM, [replace(A100, hourly_price=0), FAST], max_gpus={"a100": 10})
    assert owned.gpus[0] == pytest.approx(10)
    assert owned.cost < free.cost


def test_the_rounded_fleet_keeps_its_promises_and_runs():
    levels = [fo.CompletionFloor(share=0.95), fo.MeanTPOT(at_most=0.024)]
    size = size_fleet(STREAM, [A100, FAST], prices=PRICES, max_gpus={"h100": 8}, service_levels=levels)
    assert (size.whole_gpus >= size.gpus - 1e-6).all()
    assert (size.whole_gpus < size.gpus + 1).all()
    assert size.whole_cost == pytest.approx(size.whole_gpus @ [2.0, 4.5])
    model = size.model()
    assert [gpu.share for gpu in model.gpu_types] == pytest.approx(size.whole_gpus / size.whole_gpus.sum())
    plan = model.solve()
    assert (plan.throughput >= 0.95 * model.workload.arrival_rate * (1 - 1e-6)).all()
    policy = plan.policy()
    by_type = {gpu.name: sum(role.gpus for role in policy.roles if role.gpu == gpu.name) for gpu in model.gpu_types}
    assert list(by_type.values()) == size.whole_gpus.tolist()
    assert policy.simulate(horizon=20, warmup=5, replications=2, seed=0).revenue_rate.mean > 0


def test_a_whole_number_of_gpus_is_not_rounded_up():
    mixed, solo = pair_by_hand(A100, 1.0, 300, 1000)
    one = fo.WorkloadClass("one", arrival_rate=7 / (mixed + solo), prompt_tokens=300, output_tokens=1000)
    assert size_fleet([one], A100).whole_gpus.tolist() == [7]


def test_types_the_fleet_does_without_are_no_part_of_its_model():
    size = size_fleet(STREAM, [replace(A100, hourly_price=50.0), FAST])
    assert [gpu.name for gpu in size.model(prices=PRICES).gpu_types] == ["h100"]
    assert math.isnan(size.revenue_rate)


# ---- sizing: forms ------------------------------------------------------------------------------------------------


def test_a_fleet_goes_to_json_and_back():
    levels = [fo.MeanWait(at_most=1.0), fo.KVMemory(tokens=40_000), fo.PrefillFairness(at_most=0.1, penalty=1e-3)]
    size = size_fleet(STREAM, [A100, FAST], prices=PRICES, max_gpus={"h100": 8}, service_levels=levels)
    again = FleetSize.from_dict(json.loads(size.to_json()))
    assert again == size
    assert repr(again) == repr(size)
    assert again != size_fleet(STREAM, A100)
    assert size != "fleet"
    data = size.to_dict()
    with pytest.raises(fo.InvalidInput, match=r"the saved fleet does not solve its problem: primal residual"):
        FleetSize.from_dict(data | {"values": [0.5 * value for value in data["values"]]})
    with pytest.raises(fo.InvalidInput, match=r"not a saved fleet of this problem: 0 values"):
        FleetSize.from_dict(data | {"values": []})
    with pytest.raises(fo.InvalidInput, match=r"not a saved fleet: KeyError\('problem'\)"):
        FleetSize.from_dict({})


def test_tables_and_texts_of_a_fleet():
    size = size_fleet(STREAM, [A100, FAST], max_gpus={"h100": 5}, prices=PRICES)
    frame = size.to_frame()
    assert list(frame.index) == ["a100", "h100"]
    assert list(frame.columns) == ["gpus", "whole_gpus", "hourly_price", "cost", "whole_cost"]
    by_type = size.modes["gpus"].groupby(size.modes.index.str.partition("/").get_level_values(0)).sum()
    np.testing.assert_allclose(by_type, size.gpus)
    np.testing.assert_allclose(size.modes["share_of_type"].to_numpy().reshape(2, 2).sum(axis=1), 1)
    assert size.classes["completed_share"].to_list() == pytest.approx([1, 1])
    assert list(size.promises.index) == [("completion_floor", name) for name in STREAM.names]
    assert size.unit == "money/hour"
    text, page = repr(size), size._repr_html_()
    for part in (
        "money/hour",
        "h100/mixed",
        "decode-heavy",
        "completion_floor",
        "lower bound for every policy",
        "peak",
    ):
        assert part in text
        assert part in page
    assert re.search(r"N_{g}", size.symbolic.latex())
    count = size_fleet(STREAM, replace(A100, hourly_price=None), service_levels=[fo.MeanWait(at_most=1)])
    assert count.unit == "GPUs"
    assert count.cost == pytest.approx(count.gpus.sum())
    assert "every policy that keeps no decode queue" in repr(count)
    assert "money" not in repr(count)
    assert "rounding each type up adds" in repr(count)


def test_notes_on_rounding_and_on_a_fleet_of_nothing():
    assert "nothing asks for a GPU" in repr(size_fleet(STREAM, A100, service_levels=()))
    with pytest.raises(fo.InvalidInput, match="the fleet has no GPUs, so there is nothing to plan"):
        size_fleet(STREAM, A100, service_levels=()).model(prices=PRICES)
    with pytest.raises(fo.InvalidInput, match=r"prices \(TokenPrices\) is required, as a plan maximises revenue"):
        size_fleet(STREAM, A100).model()
    notes = size_fleet(STREAM, A100, service_levels=PROMISES["slots"]).notes
    assert any("slot-average TPOT depends on the mix" in note for note in notes)
    # Two types that share a limit are both rounded up, and so are one more than it.
    size = size_fleet(STREAM, [A100, replace(FAST, hourly_price=20)], max_gpus=30)
    assert size.gpus.sum() == pytest.approx(30)
    assert size.whole_gpus.sum() == 31
    assert "the types add up to more than max_gpus = 30" in repr(size)
    assert "another mix of whole GPUs can be cheaper" in repr(size)


def test_classes_that_never_abandon_are_served_without_a_promise():
    patient = STREAM.with_abandonment(0.0)
    size = size_fleet(patient, A100, service_levels=())
    assert size.cost == pytest.approx(size_fleet(STREAM, A100).cost)
    assert np.isnan(size.classes["mean_wait"]).all()


# ---- sizing: what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpus": []}, r"gpus is empty; give at least one GPU"),
        ({"gpus": "a100"}, r"gpus must be a list; got 'a100'"),
        ({"gpus": [A100, A100]}, r"type names must be unique; got \['a100', 'a100'\]"),
        (
            {"gpus": [A100, replace(FAST, hourly_price=None)]},
            r"type 'h100' has no hourly_price, .* give every type one",
        ),
        ({"gpus": replace(A100, hourly_price=0)}, r"type 'a100' has hourly_price 0, .*max_gpus=\{'a100': ...\}"),
        ({"max_gpus": {"h100": 3}}, r"max_gpus: there is no GPU type 'h100'; types are a100"),
        ({"max_gpus": 2.5}, r"max_gpus must be a whole number of at least 0, .* got 2\.5"),
        ({"max_gpus": {"a100": -1}}, r"max_gpus must be a whole number of at least 0, .* got \{'a100': -1\}"),
        ({"max_gpus": True}, r"max_gpus must be a whole number"),
        ({"revenue_floor": 5.0}, r"prices \(TokenPrices\) is required where revenue_floor is given"),
        ({"revenue_floor": -1.0, "prices": PRICES}, r"revenue_floor must be at least 0; got -1"),
        ({"charging": "free"}, r"charging must be 'bundled' or 'separate'; got 'free'"),
        ({"service_levels": [fo.CompletionFloor(rate=1.0)]}, r"rate 1 requests/s per GPU, .* give the share"),
        ({"service_levels": [fo.SlotTPOT(at_most=0.03, penalty=1)]}, r"penalty on slot_tpot .* give a hard bound"),
        (
            {"gpus": replace(A100, hourly_price=None), "service_levels": [fo.MeanWait(at_most=1, penalty=1)]},
            r"mean_wait has a penalty in money, but the GPU has no hourly_price .* give the GPU a price",
        ),
        ({"service_levels": [fo.MeanWait(at_most=1, classes=("x",))]}, r"mean_wait: there is no class 'x'"),
        ({"workload": []}, r"classes is empty"),
    ],
)
def test_what_cannot_be_sized_is_refused(arguments, message):
    with pytest.raises(fo.InvalidInput, match=message):
        size_fleet(**({"workload": STREAM, "gpus": A100} | arguments))


def test_too_few_gpus_are_told_how_many_would_do():
    needed = size_fleet(STREAM, A100).gpus[0]
    with pytest.raises(fo.InfeasibleModel, match=r"no fleet within max_gpus keeps all promises") as caught:
        size_fleet(STREAM, A100, max_gpus=30)
    message = str(caught.value)
    assert f"{needed:.2f} GPUs would do" in message
    assert "there are only so many GPUs" in message
    assert "max_gpus_in_all" in caught.value.rows
    share = float(re.search(r"A fleet exists if completion_floor has share ([\d.]+) in place of 1", message)[1])
    fits = size_fleet(STREAM, A100, max_gpus=30, service_levels=[fo.CompletionFloor(share=share - 1e-5)])
    assert fits.gpus == pytest.approx([30], rel=1e-3)
    with pytest.raises(fo.InfeasibleModel, match=r"GPUs \(0 of 'a100', .* of 'h100'\) would do"):
        size_fleet(STREAM, [A100, FAST], max_gpus={"h100": 5, "a100": 3})


def test_promises_that_no_fleet_keeps_are_named():
    levels = [fo.CompletionFloor(share=1.0), fo.MeanTPOT(at_most=0.02)]
    for limit in (None, 10):
        with pytest.raises(fo.InfeasibleModel, match=r"no fleet, however large, keeps all promises") as caught:
            size_fleet(STREAM, A100, service_levels=levels, max_gpus=limit)
        assert "A fleet exists if mean_tpot has at_most 0.022 in place of 0.02" in str(caught.value)
        assert any(row.startswith("mean_tpot") for row in caught.value.rows)
    _, idle, decode = A100.modes(disaggregated=True)
    with pytest.raises(fo.InfeasibleModel, match=r"are completed"):
        size_fleet(STREAM, replace(A100, operating_modes=(idle, decode)))


def test_bounds_per_gpu_grow_with_the_fleet():
    """In the program for totals a bound that is per GPU multiplies the number of GPUs, others do not."""
    problem = size_fleet(STREAM, A100.with_modes(disaggregated=True), service_levels=PROMISES["transfer"]).problem
    symbolic = formulate(problem).symbolic
    right = {row.name: str(row.right) for row in symbolic.constraints}
    assert "N[g]" in right["kv_transfer"]
    assert "N[g]" not in right["completion_floor"]
    assert reference_model().symbolic.constraints[1] in symbolic.constraints
