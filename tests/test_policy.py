"""Policies read off plans: roles in whole GPUs, gate, router, sentences, JSON, and the arrays of the chain."""

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import build, mode_models, pair_models

import fluidopt as fo
from fluidopt.policy.extract import largest_remainder
from fluidopt.reference import QWEN_8B_A100, reference_model
from fluidopt.simulation.fleet import fleet_system, fluid_start
from fluidopt.simulation.system import FEWEST_DECODES, UNIFORM

SIZES = [1, 2, 5, 20, 50, 200, 500, 100_000]

PREFILL = fo.Mode("prefill", chunk=512, iteration_time=0.05)
DECODE = fo.Mode("decode", decode_slots=16, iteration_time=0.022)
IDLE = fo.Mode("idle")
SMALL = fo.Mode("small", chunk=128, decode_slots=15, iteration_time=0.0254)
LARGE = fo.Mode("large", chunk=1024, decode_slots=8, iteration_time=0.081)
SLOW = fo.Mode("slow", decode_slots=8, iteration_time=0.015)


def gpu_with(*modes, name="gpu", share=1.0):
    return fo.GPU(QWEN_8B_A100, batch_size=16, chunk_size=256, name=name, share=share, operating_modes=modes or None)


def plan_of(*gpus, load=1.0, charging="bundled"):
    return build(reference_model().workload.scaled(load), gpus, charging=charging).solve()


# ---- whole numbers ------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 10**6))
def test_largest_remainder_splits_everything_within_one(weights, total):
    weights = np.array(weights)
    assume(weights.sum() > 1e-3)
    exact = weights / weights.sum() * total
    counts = largest_remainder(weights / weights.sum(), total)
    assert counts.sum() == total
    assert np.all(np.abs(counts - exact) < 1 + 1e-6)
    assert np.all(counts[weights == 0] <= 0)


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
        ([0.1] * 10, 10, [1] * 10),
        ([0.45, 0.35, 0.2], 2, [1, 1, 0]),
        ([1 / 3, 1 / 3, 1 / 3], 1, [1, 0, 0]),
        ([1.0], 0, [0]),
    ],
)
def test_largest_remainder_by_hand(weights, total, expected):
    assert largest_remainder(np.array(weights), total).tolist() == expected


@pytest.mark.parametrize("n", SIZES)
def test_the_reference_has_ceil_of_n_phi_gpus_that_prefill(reference_plan, n):
    policy = reference_plan.policy(gpus=n)
    count = {role.name: role.gpus for role in policy.roles}
    mixed = math.ceil(n * 0.213213653594 - 1e-9)
    assert count == {name: number for name, number in (("mixed", mixed), ("solo", n - mixed)) if number}


def test_a_share_that_is_a_whole_number_is_not_rounded_up():
    """A mixed share of 0.25 up to solver noise: 10 of 40 GPUs, not 11."""
    gpu = reference_model().scenario.gpu
    mixed, _ = gpu.modes()
    rate = 0.25 * mixed.prefill_speed / 300
    one = fo.WorkloadClass("one", arrival_rate=rate, prompt_tokens=300, output_tokens=1, abandonment_rate=0.1)
    plan = build([one], gpu).solve()
    assert plan.mode_share[0] == pytest.approx(0.25, rel=1e-12)
    assert [role.gpus for role in plan.policy(gpus=40).roles] == [10, 30]


@settings(max_examples=80)
@given(st.one_of(pair_models(), mode_models()), st.integers(1, 2000))
def test_roles_cover_the_fleet_and_follow_the_plan(model, n):
    plan = model.solve()
    try:
        policy = plan.policy(gpus=n)
    except fo.InvalidInput:
        assume(False)
    assert sum(role.gpus for role in policy.roles) == n
    assert all(role.gpus > 0 for role in policy.roles)
    first = 0
    for gpu in model.gpu_types:
        modes = gpu.modes()
        share = plan.mode_share[first : first + len(modes)]
        first += len(modes)
        of_type = [role for role in policy.roles if role.gpu == gpu.name]
        number = sum(role.gpus for role in of_type)
        assert abs(number - n * gpu.share) < 1
        decode_only = any(not mode.prefills and mode.decode_slots for mode in modes)
        if any(mode.prefills for mode in modes) and decode_only:
            prefills = share[[mode.prefills for mode in modes]].sum()
            wanted = min(number, math.ceil(n * prefills - 1e-9))
            assert sum(role.gpus for role in of_type if role.prefill) == wanted
    for role in policy.roles:
        assert role.slots == role.decode_slots + (role.prefill is not None)
        assert role.rest.chunk == 0


def test_several_prefill_and_decode_modes_are_split_by_largest_remainder():
    """A tight slot-average TPOT and two chunks: whatever the plan mixes, the fleet follows within one GPU per mode."""
    model = build(reference_model().workload.scaled(3), [gpu_with(SMALL, LARGE, DECODE, SLOW)])
    s = model.symbols
    model.subject_to(s.phi["small"] >= 0.2, name="small")
    model.subject_to(s.phi["large"] >= 0.13, name="large")
    model.subject_to(s.phi["slow"] >= 0.11, name="slow")
    plan = model.solve()
    share = dict(zip(plan.model.labels["mode"], plan.mode_share, strict=True))
    policy = plan.policy(gpus=37)
    count = {role.name: role.gpus for role in policy.roles}
    prefills = math.ceil(37 * (share["small"] + share["large"]) - 1e-9)
    assert count["small"] + count["large"] == prefills
    assert abs(count["small"] - prefills * share["small"] / (share["small"] + share["large"])) < 1
    assert abs(count["slow"] - (37 - prefills) * share["slow"] / (share["slow"] + share["decode"])) < 1


# ---- fleets too small ---------------------------------------------------------------------------------------------


def test_one_gpu_of_a_disaggregated_fleet_is_too_few():
    plan = plan_of(gpu_with(PREFILL, IDLE, DECODE))
    with pytest.raises(fo.InvalidInput, match=r"with 1 GPU\(s\) every GPU prefills and none has a decode slot"):
        plan.policy(gpus=1)
    assert [role.name for role in plan.policy(gpus=2).roles] == ["prefill", "decode"]


def test_two_types_need_two_gpus():
    plan = plan_of(gpu_with(PREFILL, IDLE, name="p", share=0.3), gpu_with(DECODE, name="d", share=0.7))
    with pytest.raises(fo.InvalidInput, match=r"1 GPU\(s\) are too few for 2 GPU types .*type 'p' gets none"):
        plan.policy(gpus=1)
    assert [(role.name, role.gpus) for role in plan.policy(gpus=10).roles] == [("p/prefill", 3), ("d/decode", 7)]


def test_one_gpu_of_the_pair_prefills_beside_its_decodes(reference_plan):
    (role,) = reference_plan.policy(gpus=1).roles
    assert (role.name, role.gpus, role.decode_slots, role.slots) == ("mixed", 1, 15, 16)
    assert role.rest.name == "solo"


@pytest.mark.parametrize("gpus", [0, -1, 2.5, True, "five", float("nan"), float("inf"), [3]], ids=repr)
def test_the_number_of_gpus_is_a_whole_number(reference_plan, gpus):
    with pytest.raises(fo.InvalidInput, match="gpus must be a whole number of at least 1"):
        reference_plan.policy(gpus=gpus)


def test_a_whole_number_of_any_type_will_do(reference_plan):
    assert (
        reference_plan.policy(gpus=np.int64(20)) == reference_plan.policy(gpus=20.0) == reference_plan.policy(gpus=20)
    )


# ---- kinds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("charging", "kind", "rule"),
    [
        ("bundled", "gate-and-route", "occupancy"),
        ("separate", "prioritize-and-route", "priority"),
    ],
)
def test_each_charging_scheme_has_its_policy(charging, kind, rule):
    plan = reference_model(charging).solve()
    policy = plan.policy(gpus=20)
    assert (policy.kind, policy.gate.rule) == (kind, rule)
    assert policy == plan.policy(gpus=20, kind=kind)


def test_a_kind_can_be_asked_for(reference_plan):
    assert reference_plan.policy(gpus=20, kind="prioritize-and-route").gate.rule == "priority"


@pytest.mark.parametrize("kind", ["best", "", 3])
def test_an_unknown_kind_is_refused(reference_plan, kind):
    with pytest.raises(fo.InvalidInput, match="kind must be one of 'gate-and-route', 'prioritize-and-route'"):
        reference_plan.policy(gpus=20, kind=kind)


def test_the_router_prefers_decode_only_roles_then_faster_ones(reference_plan):
    assert reference_plan.policy(gpus=20).router.order == ("solo", "mixed")
    model = build(reference_model().workload.scaled(3), [gpu_with(SMALL, LARGE, DECODE, SLOW)])
    s = model.symbols
    for name in ("small", "large", "decode", "slow"):
        model.subject_to(s.phi[name] >= 0.1, name=name)
    assert model.solve().policy(gpus=50).router.order == ("slow", "decode", "small", "large")


def test_roles_without_decode_slots_are_not_in_the_router():
    policy = plan_of(gpu_with(PREFILL, IDLE, DECODE)).policy(gpus=10)
    assert policy.router.order == ("decode",)


# ---- targets and sentences ----------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.one_of(pair_models(), mode_models()))
def test_targets_are_the_plan(model):
    plan = model.solve()
    try:
        policy = plan.policy(gpus=100)
    except fo.InvalidInput:
        assume(False)
    targets = policy.targets
    assert targets.prefill == pytest.approx(np.nansum(plan.prefill, axis=1), abs=2e-9)
    assert targets.decode == pytest.approx(np.nansum(plan.decode, axis=1), abs=2e-9)
    assert targets.throughput == pytest.approx(plan.throughput, abs=2e-9)
    for given_targets, queue in (
        (targets.prefill_queue, plan.prefill_queue),
        (targets.decode_queue, plan.decode_queue),
    ):
        for target, length in zip(given_targets, queue, strict=True):
            assert (target is None) == bool(np.isnan(length))
            assert target is None or target == pytest.approx(length, abs=2e-9)
    assert policy.revenue_bound == plan.revenue_rate
    roles = [role.name for role in policy.roles]
    assert list(targets.role_prefill) == roles
    assert list(targets.role_decode) == roles
    for role in policy.roles:
        by_class = targets.decode_by_role[role.name]
        mode = plan.model.labels["mode"].index(role.name)
        assert by_class == pytest.approx(np.nan_to_num(plan.decode[:, mode]), abs=2e-9)
        assert sum(by_class) == pytest.approx(targets.role_decode[role.name], abs=1e-6)


def test_the_rules_of_the_reference_contain_its_numbers(reference_plan):
    mixed, solo, gate, router = reference_plan.policy(gpus=20).rules()
    assert mixed == "5 GPUs (mixed): one prefill at a time in chunks of 256 tokens, beside at most 15 decodes."
    assert solo == "15 GPUs (solo): at most 16 decodes, never a prefill."
    assert "decode-heavy: 0.365; prefill-heavy: 3.9" in gate
    assert "decode-heavy: 6.33; 0 for the others" in gate
    assert "goes to a random solo, else mixed GPU with a free decode slot" in router
    assert "first-come first-served" in router


def test_the_priority_rule_lists_the_classes_by_decodes_per_prompt_token():
    gate = reference_model("separate").solve().policy(gpus=20).rules()[2]
    assert "in the order decode-heavy > prefill-heavy." in gate


def test_a_class_without_target_waits_for_the_others():
    poor = fo.WorkloadClass("poor", arrival_rate=0.5, prompt_tokens=10, output_tokens=3000, abandonment_rate=0.1)
    plan = build(
        (*reference_model().workload, poor),
        reference_model().gpu_types,
        prices=fo.TokenPrices(prompt=1, output=0.001),
    ).solve()
    policy = plan.policy(gpus=20)
    assert policy.targets.prefill[2] == 0
    assert "Only when none of these waits: poor." in policy.rules()[2]
    system = fleet_system(policy)
    assert system.gate_slope[2] == 0
    assert system.gate_base[2] > 1e300


def test_one_gpu_is_singular():
    policy = plan_of(gpu_with(PREFILL, IDLE, DECODE)).policy(gpus=2)
    assert policy.rules()[0] == "1 GPU (prefill): one prefill at a time in chunks of 512 tokens, beside no decodes."


def test_a_policy_prints_its_rules(reference_plan):
    policy = reference_plan.policy(gpus=20)
    assert str(policy).splitlines()[0] == "Policy gate-and-route for 20 GPUs (5 mixed, 15 solo)"
    assert len(str(policy).splitlines()) == 1 + len(policy.rules())
    assert policy._repr_html_().count("<li") == len(policy.rules())


# ---- (d) JSON -----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.one_of(pair_models(physical=st.just(True)), mode_models()), st.integers(1, 500))
def test_a_policy_goes_to_json_and_back(model, n):
    try:
        policy = model.solve().policy(gpus=n)
    except fo.InvalidInput:
        assume(False)
    again = fo.Policy.from_json(policy.to_json())
    assert again == policy
    assert again.rules() == policy.rules()
    assert again.model == policy.model


def damaged(policy, *path, value):
    data = json.loads(policy.to_json())
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("gpus",), 21, "GPUs of the roles must add up to gpus = 21"),
        (("roles", 1, "name"), "mixed", "roles: names must be unique"),
        (("router", "order"), ["solo", "none"], "router.order: there is no role 'none'"),
        (("router", "order"), ["solo", "solo"], "router.order"),
        (("targets", "prefill"), [0.1], r"targets.prefill must have one entry per class \(2\)"),
        (("targets", "decode_queue"), [], r"targets.decode_queue must have one entry per class \(2\)"),
        (("targets", "role_prefill"), {"mixed": 0.2}, "targets.role_prefill"),
        (("targets", "role_decode"), {}, "targets.role_decode"),
        (("targets", "decode_by_role"), {"mixed": [1, 1]}, "targets.decode_by_role must have one entry per role"),
        (("gate", "hold"), {"other": 1}, "gate.hold: there is no class 'other'"),
        (("targets", "prefill", 0), -1, r"targets.prefill\[0\] must be at least 0"),
        (("kind",), "best", "kind must be 'gate-and-route', 'prioritize-and-route', .* or 'thresholds'; got 'best'"),
        (("gate", "rule"), "random", "gate.rule must be"),
        (("gate", "placement"), "first", "gate.placement must be"),
        (("scenario", "prices", "prompt"), -1, "scenario.prices.prompt must be at least 0"),
        (("roles",), [], "roles"),
        (("colour",), "red", "colour is not a field"),
        (("revenue_bound",), float("nan"), "revenue_bound"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_a_damaged_policy_is_refused(reference_plan, path, value, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.Policy.from_dict(damaged(reference_plan.policy(gpus=20), *path, value=value))


@pytest.mark.parametrize("text", ["{", "[]", "3", "null", '"policy"', "[" * 100_000], ids=lambda each: each[:10])
def test_what_is_no_policy_is_refused(text):
    with pytest.raises(fo.InvalidInput, match=r"not a saved policy|must be (a )?Policy"):
        fo.Policy.from_json(text)


# ---- the chain's arrays -------------------------------------------------------------------------------------------


def test_the_chain_of_the_reference(reference_plan):
    system = fleet_system(reference_plan.policy(gpus=20))
    assert system.arrival_rate == pytest.approx([10, 10])
    assert system.prompt_tokens == pytest.approx([300, 3000])
    assert system.output_tokens == pytest.approx([1000, 400])
    assert system.abandonment_rate == pytest.approx([0.1, 0.1])
    mixed, solo = 0, 1
    assert system.role_gpus.tolist() == [5, 15]
    assert system.role_decode_slots.tolist() == [15, 16]
    assert system.role_slots.tolist() == [16, 16]
    assert system.mode_chunk[system.role_prefill_mode[mixed]] == 256
    assert system.mode_time[system.role_prefill_mode[mixed]] == pytest.approx(0.033272)
    assert system.role_prefill_mode[solo] == -1
    assert system.mode_time[system.role_rest_mode].tolist() == [0.022, 0.022]
    assert system.mode_chunk[system.role_rest_mode].tolist() == [0, 0]
    assert system.router_order.tolist() == [solo, mixed]
    assert system.placement == UNIFORM
    assert system.gate_slope == pytest.approx([1 / 0.0182605, 1 / 0.1949531], rel=1e-5)
    assert system.gate_base.tolist() == [0, 0]
    assert system.gate_queue_target == pytest.approx([20 * 0.316687, 0], abs=1e-4)
    assert system.prefill_reward.tolist() == [0, 0]
    assert system.decode_reward == pytest.approx([230, 380])


def test_the_chain_of_separate_charging_pays_phase_by_phase():
    system = fleet_system(reference_model("separate").solve().policy(gpus=20))
    assert system.prefill_reward == pytest.approx([30, 300])
    assert system.decode_reward == pytest.approx([200, 80])
    assert system.gate_slope.tolist() == [0, 0]
    assert system.gate_base == pytest.approx([-1000 / 300, -400 / 3000])


def test_the_chain_of_a_disaggregated_fleet_has_an_idle_mode():
    policy = plan_of(gpu_with(PREFILL, IDLE, DECODE)).policy(gpus=10)
    system = fleet_system(policy)
    prefill, decode = 0, 1
    assert np.isnan(system.mode_time[system.role_rest_mode[prefill]])
    assert system.role_decode_slots.tolist() == [0, 16]
    assert system.role_slots.tolist() == [1, 16]
    assert system.role_prefill_mode[decode] == -1
    assert sorted(system.router_order.tolist()) == [prefill, decode], "every role once, for the kernel"
    assert system.router_order[0] == decode


def test_the_placement_variant_reaches_the_chain(reference_plan):
    policy = reference_plan.policy(gpus=20)
    other = fo.Policy.from_dict(damaged(policy, "gate", "placement", value="fewest-decodes"))
    assert fleet_system(other).placement == FEWEST_DECODES
    assert "on the idle one with fewest decodes" in other.rules()[2]


def test_total_rates_of_a_scenario_reach_the_chain_once():
    data = reference_model().to_dict() | {"rates": "total", "gpus": 20}
    policy = fo.FluidModel.from_scenario(fo.Scenario.from_dict(data)).solve().policy()
    assert fleet_system(policy).arrival_rate == pytest.approx([0.5, 0.5])


@settings(max_examples=80)
@given(st.one_of(pair_models(), mode_models()), st.integers(1, 300))
def test_the_fluid_start_fits_into_the_fleet(model, n):
    plan = model.solve()
    try:
        policy = plan.policy(gpus=n)
    except fo.InvalidInput:
        assume(False)
    assume(max(q or 0 for q in (*policy.targets.prefill_queue, *policy.targets.decode_queue)) < 1e6)
    system = fleet_system(policy)
    start = fluid_start(policy, system)
    able = np.where(system.role_prefill_mode >= 0, system.role_gpus, 0)
    assert np.all(start.prefill >= 0)
    assert np.all(start.decode >= 0)
    assert np.all(start.prefill_queue >= 0)
    assert np.all(start.decode_queue >= 0)
    assert np.all(start.prefill.sum(axis=1) <= able)
    assert np.all(start.decode.sum(axis=1) <= system.role_gpus * system.role_decode_slots)
    assert np.all((start.prefill + start.decode).sum(axis=1) <= system.role_gpus * system.role_slots)
    known = [
        np.array([q or 0.0 for q in queue]) for queue in (policy.targets.prefill_queue, policy.targets.decode_queue)
    ]
    everyone = start.prefill.sum(axis=0) + start.decode.sum(axis=0) + start.prefill_queue + start.decode_queue
    expected = n * (np.array(policy.targets.prefill) + np.array(policy.targets.decode) + sum(known))
    assert np.all(np.abs(everyone - expected) <= 2 + 1e-6), "each of four numbers is rounded"


def test_the_fluid_start_of_the_reference(reference_plan):
    policy = reference_plan.policy(gpus=500)
    start = fluid_start(policy, fleet_system(policy))
    assert start.prefill.sum(axis=0).tolist() == [9, 97]
    assert start.prefill_queue.tolist() == [158, 0]
    assert start.prefill[1].tolist() == [0, 0]
    assert start.decode.sum() + start.decode_queue.sum() == pytest.approx(500 * 15.78679, abs=2)


@pytest.mark.parametrize("n", [5, 20, 50, 500])
def test_no_decode_waits_at_the_start_while_a_slot_is_free(reference_plan, n):
    """The chain's invariant; rounding the partition up takes slots from the solo role that the mixed role has."""
    policy = reference_plan.policy(gpus=n)
    system = fleet_system(policy)
    start = fluid_start(policy, system)
    free = (system.role_gpus * system.role_decode_slots).sum() - start.decode.sum()
    assert free == 0 or start.decode_queue.sum() == 0
