"""Every policy of the chain simulator: against a chain in plain Python, by its own rules, and what it earns."""

import importlib
import time
from dataclasses import replace

import numpy as np
import pytest
from brute_force import BruteForceChain
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import fluidopt as fo
from fluidopt.policy import Gate, Router
from fluidopt.policy.extract import RULES
from fluidopt.policy.rules import decode_shares, decode_weights
from fluidopt.reference import QWEN_8B_A100
from fluidopt.simulation.fleet import fleet_system, fluid_start
from fluidopt.simulation.run import simulate
from fluidopt.simulation.system import Start, System

KINDS = tuple(RULES)
PARTITIONED = tuple(kind for kind in KINDS if not kind.endswith("WSP"))
NEVER = -np.inf


def tiny_plan():
    """Two classes on GPUs of two slots, where every rate is near 1/s."""
    gpu = fo.GPU(fo.IterationTime(alpha=1.0, beta=0.6, solo=1.0), batch_size=2, chunk_size=1)
    classes = [
        fo.WorkloadClass("a", arrival_rate=0.3, prompt_tokens=0.5, output_tokens=3.0, abandonment_rate=4.0),
        fo.WorkloadClass("b", arrival_rate=0.25, prompt_tokens=1.4, output_tokens=1.5, abandonment_rate=6.0),
    ]
    return fo.FluidModel(classes, gpu, prices=fo.TokenPrices(prompt=0.7, output=1.0)).solve()


def tiny_policy(kind, gpus):
    partition = {"prefill_gpus": 1} if kind in PARTITIONED else {}
    return tiny_plan().policy(gpus=gpus, kind=kind, **partition)


def tiny_system(kind="gate-and-route", gpus=2, **changes):
    return replace(fleet_system(tiny_policy(kind, gpus)), **changes)


def run(system, *, seed=1, start=None, horizon=200.0, warmup=20.0, **options):
    rng = np.random.default_rng(seed)
    return simulate(system, start or Start.empty(system), horizon=horizon, warmup=warmup, rng=rng, **options)


def replications(system, count, *, seed=1, **options):
    return [run(system, seed=child, **options) for child in np.random.SeedSequence(seed).spawn(count)]


def assert_mean(values, expected, confidence=1 - 1e-5):
    """Every column's mean lies within its confidence interval around the expected value."""
    values = np.asarray(values, dtype=float).reshape(len(values), -1)
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    allowed = stats.t.ppf(0.5 + confidence / 2, len(values) - 1) * error + 1e-12
    gap = np.abs(values.mean(axis=0) - np.ravel(expected))
    assert np.all(gap <= allowed), f"mean {values.mean(axis=0)}, expected {expected}, standard error {error}"


# ---- against the chain in plain Python -----------------------------------------------------------------------------


def assert_exact(system, limit=3, most_cut=2e-3):
    queue, buffered, prefill, decode, reward, cut = BruteForceChain(system, limit, limit).means()
    assert cut < most_cut
    seen = replications(system, 40, horizon=5020.0, warmup=20.0)
    window = seen[0].window
    for name, expected in (
        ("prefill_queue", queue),
        ("decode_queue", buffered),
        ("prefill", prefill),
        ("decode", decode),
    ):
        assert_mean([getattr(each, name + "_time") / window for each in seen], expected)
    assert_mean([each.reward / window for each in seen], reward)
    assert_mean([each.expected_reward / window for each in seen], reward)


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_exact_chain(kind, gpus):
    assert_exact(tiny_system(kind, gpus))


# One GPU that prefills beside a decode, one that decodes; other targets, weights and holds than the plan's.
SIDES = {
    "role_side": np.array([1, 0]),
    "side_share": np.array([[0.2, 0.7], [0.8, 0.3]]),
    "side_weight": np.zeros((2, 2)),
}


@pytest.mark.parametrize(
    "changes",
    [
        SIDES | {"side_weight": np.array([[0.9, 0.1], [0.3, 0.7]])},
        SIDES | {"side_weight": np.array([[0.5, 0.0], [0.0, 0.0]])},
        SIDES | {"gate_first": True, "gate_hold": np.array([NEVER, 0.0])},
        {"gate_hold": np.array([NEVER, 0.0]), "gate_slope": np.zeros(2), "gate_base": np.array([1.0, 0.0])},
        {"gate_hold": np.array([1.0, NEVER])},
        {"gate_hold": np.array([-1.0, 0.0])},
        {"gate_slope": np.zeros(2), "gate_queue_target": np.array([0.5, 1.0])},
    ],
    ids=["weights", "no-weights", "shares-gate-first", "hold", "hold-other", "hold-both", "queue-deviation"],
)
def test_rules_by_hand_are_their_exact_chain(changes):
    assert_exact(tiny_system(**changes))


@pytest.mark.parametrize("hold", [[NEVER, 0.0], [1.0, NEVER]])
def test_holds_without_a_partition_are_their_exact_chain(hold):
    assert_exact(tiny_system("GF-WSP", gate_hold=np.array(hold)))


# ---- bookkeeping on random systems ----------------------------------------------------------------------------------


def random_system(seed):
    """Any mixture of the rules."""
    rng = np.random.default_rng(seed)
    classes, roles, sides = int(rng.integers(1, 8)), int(rng.integers(1, 5)), int(rng.integers(1, 4))
    decode_slots = rng.integers(1, 5, roles)
    prefills = rng.random(roles) < 0.6
    prefills[rng.integers(roles)] = True
    stays = prefills & (rng.random(roles) < 0.2)
    side = rng.integers(0, sides, roles)
    share = rng.dirichlet(np.ones(sides), classes).T * np.isin(np.arange(sides), side)[:, None]
    share /= share.sum(axis=0)
    fcfs = bool(rng.random() < 0.3)
    hold = np.where(rng.random(classes) < 0.5, NEVER, rng.integers(-4, 8, classes))
    return System(
        arrival_rate=rng.uniform(0.0, 3.0, classes),
        prompt_tokens=np.exp(rng.uniform(-3, 1, classes)),
        output_tokens=np.exp(rng.uniform(-3, 1, classes)),
        abandonment_rate=np.where(rng.random(classes) < 0.3, 0.0, np.exp(rng.uniform(-3, 1, classes))),
        mode_chunk=np.array([1.0, 2.0, 0.0]),
        mode_time=np.array([1.3, 0.7, 1.0]),
        role_gpus=rng.integers(1, 6, roles),
        role_prefill_mode=np.where(prefills, rng.integers(0, 2, roles), -1),
        role_rest_mode=np.full(roles, 2),
        role_decode_slots=decode_slots,
        role_slots=decode_slots + np.where(stays, 0, rng.integers(0, 2, roles)),
        gate_slope=rng.uniform(0, 2, classes) * rng.integers(0, 2, classes),
        gate_base=rng.integers(0, 2, classes).astype(float),
        gate_queue_target=rng.uniform(0, 2, classes),
        gate_hold=np.full(classes, NEVER) if fcfs else hold,
        gate_fcfs=fcfs,
        gate_first=bool(rng.random() < 0.3) and not np.any(stays),
        role_stays=stays.astype(int),
        role_side=side,
        side_share=share,
        side_weight=np.exp(rng.uniform(-5, 0, (sides, classes))) * rng.integers(0, 2, (sides, classes)),
        router_order=rng.permutation(roles),
        placement=int(rng.integers(2)),
        prefill_reward=rng.uniform(0, 1, classes),
        decode_reward=rng.uniform(0, 1, classes),
    )


def assert_balance(seen):
    first, last = seen.at_start, seen.at_end
    change = {name: getattr(last, name) - getattr(first, name) for name in vars(first)}
    prefill_starts, decode_starts = seen.prefill_starts.sum(axis=0), seen.decode_starts.sum(axis=0)
    np.testing.assert_array_equal(seen.arrivals, prefill_starts + seen.abandoned_prefill + change["prefill_queue"])
    np.testing.assert_array_equal(prefill_starts, seen.prefill_completions + change["prefill"].sum(axis=0))
    np.testing.assert_array_equal(
        seen.prefill_completions, decode_starts + seen.abandoned_decode + change["decode_queue"]
    )
    np.testing.assert_array_equal(decode_starts, seen.decode_completions + change["decode"].sum(axis=0))


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_flows_balance_and_caps_hold_under_any_rules(seed):
    system = random_system(seed)
    queues = np.random.default_rng(seed).integers(0, 30, (2, system.classes))
    start = replace(Start.empty(system), prefill_queue=queues[0], decode_queue=queues[1])
    seen = run(system, seed=seed, start=start, horizon=60.0, warmup=7.0, samples=50)
    assert_balance(seen)
    assert np.all(seen.most_decodes <= system.role_decode_slots)
    assert np.all(seen.most_requests <= system.role_slots)
    path = seen.trajectory
    assert all(np.all(value >= 0) for value in vars(path).values())
    np.testing.assert_array_equal(path.decode_queue[0] + path.decode[0].sum(axis=0), queues[1])
    again = run(system, seed=seed, start=start, horizon=60.0, warmup=7.0)
    for name in ("arrivals", "decode_completions", "decode_time", "expected_reward", "events"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(again, name))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_gate_with_holds_admits_as_a_plain_scan_would(seed):
    rng = np.random.default_rng(seed)
    classes, gpus = int(rng.integers(1, 40)), int(rng.integers(1, 60))
    ones = np.ones(classes)
    slope, base = rng.integers(0, 3, classes).astype(float), rng.integers(0, 3, classes).astype(float)
    target, queue = rng.integers(0, 3, classes).astype(float), rng.integers(0, 6, classes)
    hold = np.where(rng.random(classes) < 0.4, NEVER, rng.integers(0, gpus + 3, classes))
    system = System(
        arrival_rate=ones,
        prompt_tokens=ones,
        output_tokens=ones,
        abandonment_rate=ones,
        mode_chunk=[1.0, 0.0],
        mode_time=[1.0, 1.0],
        role_gpus=[gpus],
        role_prefill_mode=[0],
        role_rest_mode=[1],
        role_decode_slots=[1],
        role_slots=[1],
        gate_slope=slope,
        gate_base=base,
        gate_queue_target=target,
        gate_hold=hold,
        router_order=[0],
        placement=int(rng.integers(2)),
        prefill_reward=ones,
        decode_reward=ones,
    )
    start = replace(Start.empty(system), prefill_queue=queue)
    seen = run(system, start=start, horizon=1e-12, warmup=0.0)
    waiting, running = queue.copy(), np.zeros(classes, dtype=int)
    for free in range(gpus, 0, -1):  # each prefill takes a decode slot
        keys = [
            (base[i] + slope[i] * running[i], -(waiting[i] - target[i]), i)
            for i in range(classes)
            if waiting[i] > 0 and hold[i] < free
        ]
        if not keys:
            break
        i = min(keys)[-1]
        waiting[i] -= 1
        running[i] += 1
    np.testing.assert_array_equal(seen.at_start.prefill[0], running)
    np.testing.assert_array_equal(seen.at_start.prefill_queue, waiting)


def test_a_slot_draws_among_many_classes_by_weight_whatever_their_number():
    """Decodes of 200 classes wait for one slot each time: the first pick has the law of the weights."""
    classes = 200
    rng = np.random.default_rng(1)
    weight = np.exp(rng.uniform(-6, 0, classes)) * (rng.random(classes) < 0.8)
    ones = np.ones(classes)
    system = System(
        arrival_rate=0 * ones,
        prompt_tokens=ones,
        output_tokens=ones,
        abandonment_rate=0 * ones,
        mode_chunk=[1.0, 0.0],
        mode_time=[1.0, 1.0],
        role_gpus=[1],
        role_prefill_mode=[0],
        role_rest_mode=[1],
        role_decode_slots=[1],
        role_slots=[2],
        gate_slope=ones,
        gate_base=0 * ones,
        gate_queue_target=0 * ones,
        side_weight=weight[None],
        router_order=[0],
        placement=0,
        prefill_reward=ones,
        decode_reward=ones,
    )
    start = replace(Start.empty(system), decode_queue=np.full(classes, 2))
    picks = np.zeros(classes)
    for seed in range(2000):
        picks += run(system, seed=seed, start=start, horizon=1e-12, warmup=0.0).at_start.decode[0]
    expected = 2000 * weight / weight.sum()
    assert np.all(picks[weight == 0] == 0)
    chosen = expected > 0
    chi = np.sum((picks[chosen] - expected[chosen]) ** 2 / expected[chosen])
    assert stats.chi2.sf(chi, chosen.sum() - 1) > 1e-4
    emptied = run(system, start=start, horizon=1e4, warmup=0.0)
    assert emptied.decode_completions.sum() == 2 * classes
    late = run(system, start=start, horizon=float(2 * np.sum(weight > 0)) * 0.5, warmup=0.0)
    assert late.decode_starts[:, weight == 0].sum() == 0, "classes without a weight come last"


# ---- invariants of each policy --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    return fo.reference_model().solve()


@pytest.mark.parametrize("kind", ["FI-WSP", "GI-WSP", "GF-WSP"])
def test_without_a_partition_a_gpu_holds_a_full_batch_of_either_kind(plan, kind):
    policy = plan.policy(gpus=10, kind=kind)
    (role,) = policy.roles
    assert (role.gpus, role.decode_slots, role.slots) == (10, 16, 16)
    seen = run(fleet_system(policy), horizon=300.0)
    assert seen.most_requests[0] == 16
    assert seen.most_decodes[0] == 16
    assert seen.prefilling_gpu_time[0] <= 10 * seen.window


@pytest.mark.parametrize("kind", ["FI-WSP", "GI-WSP"])
def test_a_request_that_keeps_its_slot_never_waits_for_a_decode(plan, kind):
    policy = plan.policy(gpus=10, kind=kind)
    seen = run(fleet_system(policy), horizon=300.0)
    assert seen.decode_queue_time.sum() == 0
    np.testing.assert_array_equal(seen.decode_starts.sum(axis=0), seen.prefill_completions)


def test_a_request_that_keeps_its_slot_does_not_migrate():
    """Two roles, all prefills in the first: nobody ever decodes in the second, free as it is."""
    system = tiny_system("GI-WSP", role_gpus=np.array([2]))
    two = {
        name: np.repeat(getattr(system, name), 2) for name in ("role_gpus", "role_rest_mode", "role_decode_slots")
    } | {"role_slots": np.repeat(system.role_slots, 2), "role_side": np.zeros(2, int), "router_order": np.array([1, 0])}
    two["role_prefill_mode"] = np.array([system.role_prefill_mode[0], -1])
    stays = replace(system, **two, role_stays=np.array([1, 0]))
    seen = run(stays, horizon=500.0)
    assert seen.decode_time[1].sum() == 0
    assert seen.decode_time[0].sum() > 0
    moves = run(replace(stays, role_stays=np.array([0, 0])), horizon=500.0)
    assert moves.decode_time[1].sum() > 0


def test_gate_first_gives_a_slot_to_a_prefill_and_decode_first_to_a_decode():
    """One GPU of two slots, full of decodes, a request waiting at each stage."""
    start = Start(prefill_queue=[1, 0], decode_queue=[0, 1], prefill=[[0, 0]], decode=[[2, 0]])
    for kind, started in (("GF-WSP", 1), ("GI-WSP", 0)):
        system = tiny_system(kind, 1, role_stays=np.array([0]), abandonment_rate=np.zeros(2), arrival_rate=np.zeros(2))
        for seed in range(10):
            path = run(system, seed=seed, start=start, horizon=20.0, warmup=0.0, samples=1001).trajectory
            after = np.flatnonzero(path.decode[:, 0, 0] != 2)[0]
            assert path.prefill[after].sum() == started
            assert path.decode_queue[after].sum() == started


def test_a_side_serves_only_its_own_buffer():
    system = tiny_system(**(SIDES | {"side_share": np.array([[0.0, 1.0], [1.0, 0.0]])}))
    seen = run(system, horizon=2000.0, samples=4001)
    assert np.all(seen.decode_time[[0, 1], [1, 0]] == 0)
    assert np.all(seen.decode_time[[0, 1], [0, 1]] > 0)
    path = seen.trajectory
    waits = path.decode_queue[:, 0] > 0
    assert np.any(waits & (path.decode[:, 1].sum(axis=1) == 0)), "class a waits beside an empty GPU of the other side"
    assert np.all(path.decode[waits, 0, 0] == 1)


def test_a_hold_idles_a_slot_until_the_backlog_falls():
    """Class b is admitted while more than one decode slot is free; class a always."""
    system = tiny_system(gate_hold=np.array([NEVER, 1.0]), abandonment_rate=np.zeros(2), arrival_rate=np.zeros(2))
    start = Start(prefill_queue=[0, 3], decode_queue=[0, 0], prefill=[[0, 0], [0, 0]], decode=[[0, 0], [2, 0]])
    path = run(system, start=start, horizon=60.0, warmup=0.0, samples=6001).trajectory
    free = 3 - path.decode.sum(axis=(1, 2))
    started = np.flatnonzero(np.diff(path.prefill[:, 0, 1]) > 0) + 1
    assert path.prefill[0].sum() == 0
    assert started.size > 0
    assert np.all(free[started] > 1)
    assert path.prefill_queue[-1].sum() == 0


# ---- read off a plan ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpus", [1, 7, 50])
def test_every_kind_can_be_saved_explained_and_started(plan, kind, gpus):
    policy = plan.policy(gpus=gpus, kind=kind)
    assert fo.Policy.from_json(policy.to_json()) == policy
    assert len(policy.rules()) == len(policy.roles) + 2
    system = fleet_system(policy)
    start = fluid_start(policy, system)
    seen = run(system, start=start, horizon=5.0, warmup=1.0)
    assert_balance(seen)
    total = start.prefill.sum() + start.decode.sum() + start.prefill_queue.sum() + start.decode_queue.sum()
    assert total == pytest.approx(gpus * (0.2132137 + 15.7867863 + 0.316687), abs=4)


def test_the_shares_are_the_papers(plan):
    targets = plan.policy(gpus=20).targets
    uneven = replace(targets, decode_by_role={"mixed": (2.0, 1.0), "solo": (5.0, 0.5)})
    policy = replace(plan.policy(gpus=20, kind="sli-aware-general"), targets=uneven)
    mixed, solo = 1 / 0.033272, 1 / 0.022
    assert policy.router.order == ("solo", "mixed")
    expected = np.array([5 * solo / (2 * mixed + 5 * solo), 0.5 * solo / (mixed + 0.5 * solo)])
    np.testing.assert_allclose(decode_shares(policy), [expected, 1 - expected], rtol=1e-6)
    solo_weight = np.array([5 / 1000, 0.5 / 400])
    np.testing.assert_allclose(decode_weights(policy)[0], solo_weight / solo_weight.sum(), rtol=1e-9)
    nothing = replace(targets, decode_by_role={"mixed": (0.0, 1.0), "solo": (0.0, 0.0)})
    np.testing.assert_array_equal(decode_shares(replace(policy, targets=nothing)), [[1, 0], [0, 1]])
    np.testing.assert_array_equal(decode_weights(replace(policy, targets=nothing)), [[0, 0], [0, 1]])


def test_a_role_without_gpus_passes_its_decodes_on(plan):
    policy = plan.policy(gpus=5, kind="sli-aware", prefill_gpus=5)
    assert [role.name for role in policy.roles] == ["mixed"]
    np.testing.assert_array_equal(decode_shares(policy), [[1, 1]])


def test_rules_say_what_each_kind_does(plan):
    def sentences(kind):
        return " ".join(plan.policy(gpus=20, kind=kind).rules())

    assert "the request that came first, of whatever class" in sentences("FG-SP")
    assert "decoded on the same GPU, in the same slot" in sentences("GI-WSP")
    assert "at most 16 requests, of them one prefill at a time" in sentences("FI-WSP")
    assert "to a new prefill before it goes to a decode that waits" in sentences("GF-WSP")
    assert "solo 85.6 % of decode-heavy, 85.6 % of prefill-heavy" in sentences("sli-aware")
    assert "drawn at random by weight (solo decode-heavy: 0.484" in sentences("sli-aware-general")
    assert sentences("GG-SP") == sentences("gate-and-route")
    held = threshold_policy(plan, 20, 7, 2.0)
    assert "in the order prefill-heavy > decode-heavy." in held.rules()[2]
    assert "are below its limit (decode-heavy: -2; none for the others)" in held.rules()[2]
    queues = replace(held, gate=Gate(rule="queue-deviation"))
    assert "whose queue is furthest above its target (decode-heavy: 6.33; 0 for the others)" in queues.rules()[2]


@pytest.mark.parametrize("kind", ["FI-WSP", "GI-WSP", "GF-WSP"])
def test_kinds_without_a_partition_need_gpus_that_do_both(kind):
    modes = (
        fo.Mode("prefill", chunk=512, iteration_time=0.05),
        fo.Mode("idle"),
        fo.Mode("decode", decode_slots=16, iteration_time=0.022),
    )
    gpu = fo.GPU(QWEN_8B_A100, batch_size=16, chunk_size=256, operating_modes=modes)
    apart = fo.FluidModel(fo.reference_model().workload, gpu, prices=fo.TokenPrices(prompt=0.1, output=0.2)).solve()
    with pytest.raises(
        fo.InvalidInput, match=rf"'{kind}' has no partition.* GPU type 'gpu' has no mode that does both"
    ):
        apart.policy(gpus=10, kind=kind)
    assert apart.policy(gpus=10, kind="sli-aware").router.order == ("decode",)


def test_a_batch_of_one_prefills_and_then_decodes_in_its_slot():
    gpu = fo.GPU(QWEN_8B_A100, batch_size=1, chunk_size=256)
    plan = fo.FluidModel(fo.reference_model().workload, gpu, prices=fo.TokenPrices(prompt=0.1, output=0.2)).solve()
    policy = plan.policy(gpus=3, kind="FI-WSP")
    assert [(role.decode_slots, role.slots) for role in policy.roles] == [(1, 1)]
    assert run(fleet_system(policy), horizon=500.0).most_requests[0] == 1


def test_prefill_gpus_needs_a_partition(plan):
    with pytest.raises(fo.InvalidInput, match="prefill_gpus goes with a partition, and 'GF-WSP' has none"):
        plan.policy(gpus=10, kind="GF-WSP", prefill_gpus=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": Gate(rule="occupancy", order=("decode-heavy", "prefill-heavy"))}, "gate.order goes with gate.rule"),
        ({"gate": Gate(rule="priority", order=("decode-heavy",))}, "gate.order must name every class once"),
        ({"gate": Gate(rule="priority", hold={"other": 1.0})}, "gate.hold: there is no class 'other'"),
        ({"gate": Gate(rule="first-come", hold={"decode-heavy": 1.0})}, "gate.hold needs a gate that tells classes"),
        ({"router": Router(order=("solo", "mixed"), rule="stay")}, "router.rule 'stay' needs roles .* role 'mixed'"),
    ],
)
def test_policies_that_make_no_sense_are_refused(plan, change, message):
    with pytest.raises(fo.InvalidInput, match=message):
        replace(plan.policy(gpus=20), **change)


def test_a_gate_that_comes_first_cannot_keep_the_slot(plan):
    policy = plan.policy(gpus=20, kind="GI-WSP")
    with pytest.raises(fo.InvalidInput, match=r"gate.before_decodes must be false where router.rule is 'stay'"):
        replace(policy, gate=replace(policy.gate, before_decodes=True))


def test_targets_by_role_must_fit(plan):
    policy = plan.policy(gpus=20)
    for by_role, message in (
        ({"mixed": (1.0, 1.0)}, "targets.decode_by_role must have one entry per role"),
        ({"mixed": (1.0, 1.0), "solo": (1.0,)}, r"targets.decode_by_role.solo must have one entry per class \(2\)"),
    ):
        with pytest.raises(fo.InvalidInput, match=message):
            replace(policy, targets=replace(policy.targets, decode_by_role=by_role))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"gate_hold": np.array([0.0, np.nan])}, "'gate_hold' parameter of System must be numbers or -inf"),
        ({"gate_hold": np.zeros(2), "gate_fcfs": True}, "'gate_hold' .* -inf where gate_fcfs is true"),
        ({"gate_fcfs": 1}, "'gate_fcfs' .* true or false"),
        ({"role_stays": np.array([2, 0])}, r"'role_stays\[0\]' .* 0 or 1"),
        ({"role_stays": np.array([1, 0])}, "'role_slots' .* at most role_decode_slots where role_stays is 1"),
        ({"role_stays": np.array([0, 1]), "gate_first": True}, "'gate_first' .* false where role_stays is 1"),
        ({"role_side": np.array([0, 1])}, r"'role_side\[1\]' .* a side, 0 to 0"),
        ({"side_share": np.ones(2)}, r"'side_share' .* an array of shape \(sides, classes\)"),
        ({"side_share": np.full((1, 2), 0.5)}, "'side_share' .* shares that add up to 1"),
        ({"side_weight": np.full((1, 2), -1.0)}, r"'side_weight\[\(0, 0\)\]' .* >= 0"),
        (
            {"side_share": np.full((2, 2), 0.5), "side_weight": np.zeros((2, 2))},
            "'side_share' .* 0 for side 1, which has no decode slot",
        ),
    ],
)
def test_system_refuses(changes, match):
    with pytest.raises(ValueError, match=match):
        tiny_system(**changes)


# ---- what they do to a large fleet, and earn in a small one ---------------------------------------------------------


def test_sli_aware_routing_meets_the_plan_class_by_class_and_the_plain_router_only_in_total(plan):
    """[L26] Theorem 5.1: with targets that split the classes unevenly over the modes, 2,000 GPUs."""
    targets = plan.policy(gpus=2000).targets
    kappa = 0.033272 / 0.022
    # the same totals per mode and the same flow per class, but the first class decodes almost only on solo GPUs
    work = [kappa * s + m for s, m in zip(targets.decode_by_role["solo"], targets.decode_by_role["mixed"], strict=True)]
    solo = np.array([0.97 * work[0] / kappa, targets.role_decode["solo"] - 0.97 * work[0] / kappa])
    mixed = np.array(work) - kappa * solo
    assert np.all(mixed > 0)
    assert mixed.sum() == pytest.approx(targets.role_decode["mixed"], rel=1e-6)
    uneven = replace(targets, decode_by_role={"mixed": tuple(mixed), "solo": tuple(solo)}, decode=tuple(mixed + solo))
    gap = {}
    for kind in ("gate-and-route", "sli-aware", "sli-aware-general"):
        policy = replace(plan.policy(gpus=2000, kind=kind), targets=uneven)
        system = fleet_system(policy)
        seen = run(system, start=fluid_start(policy, system), horizon=130.0, warmup=30.0, seed=4)
        found = seen.decode_time / seen.window / 2000
        wanted = np.array([mixed, solo])
        gap[kind] = np.abs(found - wanted).max() / wanted.sum()
        assert found.sum() == pytest.approx(wanted.sum(), rel=0.02)
        assert found.sum(axis=1) == pytest.approx(wanted.sum(axis=1), rel=0.1)
    assert gap["sli-aware"] < 0.02
    assert gap["sli-aware-general"] < 0.02
    assert gap["gate-and-route"] > 0.04


def threshold_policy(plan, gpus, prefill_gpus, hold):
    """Strict priority to the class that the plan serves fully; the other one only while slots are free."""
    policy = plan.policy(gpus=gpus, prefill_gpus=prefill_gpus)
    gate = Gate(rule="priority", order=("prefill-heavy", "decode-heavy"), hold={"decode-heavy": hold})
    return replace(policy, kind="thresholds", gate=gate)


@pytest.mark.parametrize(
    ("gpus", "prefill_gpus", "hold", "expected"), [(5, 2, 1, 286.7), (20, 7, 1, 293.6), (50, 16, 3, 295.6)]
)
def test_thresholds_earn_what_was_measured(plan, gpus, prefill_gpus, hold, expected):
    policy = threshold_policy(plan, gpus, prefill_gpus, hold)
    assert fo.Policy.from_json(policy.to_json()) == policy
    found = policy.simulate(horizon=2000, warmup=200, replications=2400 // gpus // 6, seed=2, start="fluid")
    assert abs(found.revenue_rate.mean - expected) < 1.0 + 2 * found.revenue_rate.standard_error


def test_thresholds_earn_what_was_measured_on_200_gpus(plan):
    found = threshold_policy(plan, 200, 48, 10).simulate(horizon=700, warmup=100, replications=4, seed=2, start="fluid")
    assert abs(found.revenue_rate.mean - 297.0) < 1.0


def test_revenue_of_all_kinds_on_the_reference(plan, capsys):
    """None beats the fluid bound, and holding back the class that the plan serves in part beats all that never idle."""
    earned = {}
    policies = [plan.policy(gpus=50, kind=kind) for kind in KINDS] + [threshold_policy(plan, 50, 16, 3)]
    for policy in policies:
        earned[policy.kind] = policy.simulate(
            horizon=1000, warmup=200, replications=4, seed=3, start="fluid"
        ).revenue_rate
    with capsys.disabled():
        print()
        for kind, estimate in sorted(earned.items(), key=lambda item: -item[1].mean):
            print(f"  {kind:22s} {estimate.mean:8.2f} +- {estimate.standard_error:.2f}")
    bound = plan.revenue_rate
    assert all(240 < estimate.mean < bound + 3 * estimate.standard_error for estimate in earned.values())
    assert earned["GG-SP"] == earned["gate-and-route"]
    assert earned["thresholds"].mean > max(each.mean for kind, each in earned.items() if kind != "thresholds") - 1.0


def test_the_extra_rules_cost_little(plan):
    """Events/s of every policy against the plain direct method's in the same run, on 200 GPUs."""
    baseline = importlib.import_module("benchmarks.plain_gillespie")

    def rate(simulated):
        best = 0.0
        for seed in range(3):
            began = time.process_time()
            events = simulated(np.random.default_rng(seed)).events
            best = max(best, events / (time.process_time() - began))
        return best

    systems = {kind: fleet_system(plan.policy(gpus=200, kind=kind)) for kind in KINDS}
    systems["thresholds"] = fleet_system(threshold_policy(plan, 200, 48, 10))
    plain = systems["gate-and-route"]
    baseline.plain_simulate(plain, horizon=0.1, warmup=0.0, rng=np.random.default_rng(0))
    slow = rate(lambda rng: baseline.plain_simulate(plain, horizon=15.0, warmup=0.0, rng=rng))
    rates = {
        kind: rate(lambda rng, system=system: simulate(system, Start.empty(system), horizon=60.0, warmup=0.0, rng=rng))
        for kind, system in systems.items()
    }
    assert all(each > 2 * slow for each in rates.values()), (slow, rates)
    assert min(rates.values()) > 0.4 * rates["gate-and-route"], rates
