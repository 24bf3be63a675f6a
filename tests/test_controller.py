"""The live controller: decision for decision against the compiled simulator, in law against the chain in plain Python,
what it refuses, what survives a restart, GPUs that come and go, and what an event costs."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from brute_force import BruteForceChain
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_policies import random_system, tiny_policy, tiny_system

import fluidopt as fo
from fluidopt.policy import Gate, Router
from fluidopt.policy.controller import Controller, FleetGPU, StartDecode, StartPrefill
from fluidopt.policy.dispatch import Dispatcher, Request, Stage
from fluidopt.policy.extract import RULES
from fluidopt.policy.selection import NOBODY, Pool, Tournament, WeightTree
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.recording import record
from fluidopt.simulation.run import simulate
from fluidopt.simulation.system import Start


@pytest.fixture(scope="module")
def plan():
    return fo.reference_model().solve()


def crowded_plan(classes=6, charging="bundled"):
    """Several classes at four times the load that fits, where all queues are long."""
    rng = np.random.default_rng(7)
    load = [
        fo.WorkloadClass(
            f"class {i}",
            arrival_rate=6.0 / classes,
            prompt_tokens=float(rng.uniform(200, 3000)),
            output_tokens=float(rng.uniform(100, 1000)),
            abandonment_rate=float(rng.uniform(0.02, 0.3)),
        )
        for i in range(classes)
    ]
    gpu = fo.GPU(fo.IterationTime(alpha=0.0174, beta=6.2e-5, solo=0.022), batch_size=16, chunk_size=256)
    return fo.FluidModel(load, gpu, prices=fo.TokenPrices(prompt=0.1, output=0.2), charging=charging).solve()


def thresholds(plan, prefill_gpus=16, router=None, **gate):
    policy = plan.policy(gpus=50, kind="gate-and-route", prefill_gpus=prefill_gpus)
    return replace(policy, kind="thresholds", gate=Gate(**gate), router=router or policy.router)


# ---- against the compiled simulator ---------------------------------------------------------------------------------


class Replay:
    """Answers each question as the simulator did; fails where its answer is not among the candidates."""

    def __init__(self, system):
        self.system, self.kinds = system, Counter()
        self.role = np.repeat(np.arange(system.roles), system.role_gpus)
        self.label = {}
        self.event, self.made = None, lambda: 0

    def __call__(self, kind, candidates, weights):
        self.kinds[kind] += 1
        assert len(candidates) >= 2
        assert list(candidates) == sorted(set(candidates))
        assert (weights is None) == kind.endswith("gpu")
        assert weights is None or (len(weights) == len(candidates) and min(weights) > 0)
        if kind == "side" and self.event.side >= 0:
            return candidates.index(self.event.side)
        decision = self.event.decisions[self.made()]
        answers = {"prefill-gpu": decision.gpu, "decode-gpu": decision.gpu, "class": self.label[decision.request]}
        answers["side"] = self.system.role_side[self.role[decision.gpu]]
        return candidates.index(answers[kind])


def recorded(system, least, seed=1):
    """At least so many events from the empty fleet."""
    rate = float(system.arrival_rate.sum())
    events = record(system, horizon=0.55 * least / rate, rng=np.random.default_rng(seed))
    assert len(events) >= least
    return events


def replay(policy, least=100_000):
    """The kinds of random choices met."""
    system = fleet_system(policy)
    names = [each.name for each in policy.scenario.classes]
    choose = Replay(system)
    controller = Controller(policy, choose=choose)
    choose.made = lambda: len(controller._fleet.decisions)
    for event in recorded(system, least):
        choose.event = event
        choose.label[event.request] = event.label
        tell = getattr(controller, event.kind)
        made = tell(event.request, names[event.label]) if event.kind == "arrive" else tell(event.request)
        assert made == event.decisions, event
    return choose.kinds


@pytest.mark.parametrize("kind", RULES)
def test_decides_as_the_simulator_under_every_kind(plan, kind):
    kinds = replay(plan.policy(gpus=50, kind=kind))
    assert kinds["prefill-gpu"] > 1000
    assert (kinds["decode-gpu"] > 1000) == (RULES[kind][1] != "stay")


@pytest.mark.parametrize("kind", RULES)
def test_decides_as_the_simulator_where_all_queues_are_long(kind):
    kinds = replay(crowded_plan(charging="separate").policy(gpus=20, kind=kind), 20_000)
    assert (kinds["class"] > 1000) == (kind == "sli-aware-general")


@pytest.mark.parametrize(
    "rules",
    [
        {"rule": "priority", "order": ("summarise", "code"), "hold": {"code": 2.0}},
        {"rule": "priority", "order": ("code", "summarise"), "hold": {"summarise": 3.0}, "placement": "fewest-decodes"},
        {"rule": "occupancy", "hold": {"code": 40.0, "summarise": 5.0}},
        {"rule": "queue-deviation", "hold": {"code": -4.0}, "before_decodes": True},
        {"rule": "first-come", "placement": "fewest-decodes", "before_decodes": True},
    ],
    ids=["hold", "hold-fewest", "holds", "deviation-first", "first-come"],
)
def test_decides_as_the_simulator_under_thresholds(plan, rules):
    names = dict(zip(("code", "summarise"), (each.name for each in plan.model.scenario.classes), strict=True))
    if "order" in rules:
        rules = rules | {"order": tuple(names[name] for name in rules["order"])}
    if "hold" in rules:
        rules = rules | {"hold": {names[name]: value for name, value in rules["hold"].items()}}
    assert replay(thresholds(plan, **rules))["prefill-gpu"] > 100


def test_decides_as_the_simulator_with_shares_and_holds():
    plan = crowded_plan()
    order = plan.policy(gpus=50).router.order
    hold = {"class 0": 10.0, "class 3": -20.0}
    kinds = replay(thresholds(plan, 25, Router(order=order, rule="weighted-shares"), rule="occupancy", hold=hold))
    assert kinds["prefill-gpu"] > 0


def plain_candidates(fleet, kind, request, candidates):
    """The candidates by the rules, from the state alone."""
    system = fleet.system
    gpus = fleet.gpus.values()
    if kind == "prefill-gpu":
        idle = [
            gpu
            for gpu in gpus
            if system.role_prefill_mode[gpu.role] >= 0
            and gpu.prefill is None
            and len(gpu.decodes) < system.role_slots[gpu.role]
        ]
        least = min(len(gpu.decodes) for gpu in idle) if system.placement else np.inf
        return [gpu.number for gpu in idle if len(gpu.decodes) <= least]
    if kind == "decode-gpu":
        role = fleet.gpus[candidates[0]].role
        free = [
            gpu
            for gpu in gpus
            if len(gpu.decodes) < system.role_decode_slots[gpu.role]
            and len(gpu.decodes) + (gpu.prefill is not None) < system.role_slots[gpu.role]
            and system.role_side[gpu.role] == system.role_side[role]
        ]
        first = next(r for r in system.router_order if any(gpu.role == r for gpu in free))
        return [gpu.number for gpu in free if gpu.role == first]
    return [int(s) for s in np.flatnonzero(system.side_share[:, request.label] > 0)]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_decides_as_the_simulator_under_any_mixture_of_rules(seed):
    system = random_system(seed)
    choose = Replay(system)
    requests = {}

    def checked(kind, candidates, weights):
        if kind == "class":
            answer = choose(kind, candidates, weights)
            next_one = requests[choose.event.decisions[choose.made()].request]
            waiting = {
                request.label
                for request in requests.values()
                if request.stage is Stage.DECODE_QUEUE and request.place == next_one.place
            }
            weight = system.side_weight[next_one.place]
            assert list(candidates) == sorted(i for i in waiting if weight[i] > 0)
            assert list(weights) == [weight[i] for i in candidates]
            return answer
        assert list(candidates) == plain_candidates(fleet, kind, requests[choose.event.request], candidates)
        return choose(kind, candidates, weights)

    fleet = Dispatcher(system, rng=np.random.default_rng(0), choose=checked)
    choose.made = lambda: len(fleet.decisions)
    finish = {"prefill_done": fleet.finish_prefill, "decode_done": fleet.finish_decode, "abandon": fleet.abandon}
    for event in record(system, horizon=40.0, rng=np.random.default_rng(seed)):
        choose.event = event
        choose.label[event.request] = event.label
        fleet.decisions = []
        if event.kind == "arrive":
            requests[event.request] = Request(event.request, event.label)
            fleet.arrive(requests[event.request])
        else:
            finish[event.kind](requests[event.request])
            if event.kind != "prefill_done":
                del requests[event.request]
        assert tuple(fleet.decisions) == event.decisions, event
        assert_settled(fleet)


def test_a_recording_is_the_path_that_is_simulated(plan):
    system = fleet_system(plan.policy(gpus=50, kind="sli-aware"))
    events = record(system, horizon=300.0, rng=np.random.default_rng(5))
    seen = simulate(system, Start.empty(system), horizon=300.0, warmup=0.0, rng=np.random.default_rng(5))
    counts = Counter((event.kind, event.label) for event in events)
    for kind, expected in (
        ("arrive", seen.arrivals),
        ("prefill_done", seen.prefill_completions),
        ("decode_done", seen.decode_completions),
        ("abandon", seen.abandoned_prefill + seen.abandoned_decode),
    ):
        assert [counts[kind, i] for i in range(system.classes)] == expected.tolist()
    starts = Counter(type(decision) for event in events for decision in event.decisions)
    assert starts[StartPrefill] == seen.prefill_starts.sum()
    assert starts[StartDecode] == seen.decode_starts.sum()
    assert len(events) == seen.events
    assert record(system, horizon=1e-9, rng=np.random.default_rng(5)) == []
    assert all(0 <= first.time <= second.time < 300 for first, second in pairwise(events))


# ---- its own choices, in law -----------------------------------------------------------------------------------------


class Live:
    """A fleet in plain Python that lets a controller decide; every rate is computed anew at every event."""

    def __init__(self, controller, seed):
        self.controller, self.rng = controller, np.random.default_rng(seed)
        self.system = fleet_system(controller.policy)
        self.names = [each.name for each in controller.policy.scenario.classes]
        self.label, self.count = {}, 0
        self.running, self.prefill, self.decode = {}, {}, {}
        self.role = np.repeat(np.arange(self.system.roles), self.system.role_gpus).tolist()
        self.prefill_rates = self.system.prefill_rates().tolist()
        self.decode_rates = (self.system.decode_speeds()[:, :, None] / self.system.output_tokens).tolist()
        self.theta = self.system.abandonment_rate.tolist()
        self.arrivals = list(enumerate(self.system.arrival_rate.tolist()))

    def rates(self):
        for i, rate in self.arrivals:
            yield rate, "arrive", i
        busy = set(self.prefill.values())
        for request, gpu in self.prefill.items():
            yield self.prefill_rates[self.role[gpu]][self.label[request]], "prefill_done", request
        for request, gpu in self.decode.items():
            yield self.decode_rates[self.role[gpu]][gpu in busy][self.label[request]], "decode_done", request
        for request, i in self.label.items():
            if request not in self.prefill and request not in self.decode:
                yield self.theta[i], "abandon", request

    def step(self):
        """Time spent in the present state, which then changes."""
        rates = list(self.rates())
        total = sum(rate for rate, _, _ in rates)
        u = self.rng.random() * total
        for rate, kind, what in rates:  # noqa: B007
            u -= rate
            if u < 0:
                break
        if kind == "arrive":
            decisions = self.controller.arrive(self.count, self.names[what])
            self.label[self.count] = what
            self.count += 1
        else:
            decisions = getattr(self.controller, kind)(what)
            self.prefill.pop(what, None)
            self.decode.pop(what, None)
            if kind != "prefill_done":
                del self.label[what]
        for decision in decisions:
            (self.prefill if isinstance(decision, StartPrefill) else self.decode)[decision.request] = decision.gpu
        return 1.0 / total

    def counts(self):
        """Requests in service by stage, role and class, then those that wait for a prefill, by class."""
        found = np.zeros((3, self.system.roles, self.system.classes))
        for stage, running in enumerate((self.prefill, self.decode)):
            for request, gpu in running.items():
                found[stage, self.role[gpu], self.label[request]] += 1
        for request, i in self.label.items():
            if request not in self.prefill and request not in self.decode:
                found[2, 0, i] += 1
        return found


@pytest.mark.parametrize(
    ("kind", "gate"),
    [
        ("gate-and-route", {}),
        ("gate-and-route", {"placement": "fewest-decodes", "before_decodes": True, "hold": {"a": 0.0}}),
        ("sli-aware-general", {}),
        ("FI-WSP", {}),
    ],
    ids=["uniform", "fewest", "weights", "stay"],
)
def test_its_choices_follow_the_law_of_the_chain(kind, gate):
    policy = tiny_policy(kind, 3 if kind == "gate-and-route" else 2)
    policy = replace(policy, gate=replace(policy.gate, **gate))
    queue, buffered, prefill, decode, _, cut = BruteForceChain(fleet_system(policy), 4, 4).means()
    assert cut < 1e-3
    live = Live(Controller(policy, seed=3), 4)
    batches = []
    for _ in range(40):
        spent, total = 0.0, 0.0
        for _ in range(2500):
            before = live.counts()
            time = live.step()
            total = total + time * before
            spent += time
        batches.append(total / spent)
    batches = np.array(batches[1:])
    expected = [np.reshape(prefill, batches.shape[2:]), np.reshape(decode, batches.shape[2:])]
    waiting = np.zeros_like(expected[0])
    waiting[0] = np.sum([queue, np.reshape(buffered, (-1, len(queue))).sum(axis=0)], axis=0)
    gap = np.abs(batches.mean(axis=0) - np.stack([*expected, waiting]))
    error = batches.std(axis=0, ddof=1) / np.sqrt(len(batches))
    assert np.all(gap <= stats.t.ppf(1 - 1e-6, len(batches) - 1) * error + 1e-3), (gap, error)


@pytest.mark.parametrize("weight", [(0.7, 0.1, 0.2), (0.0, 0.9, 0.1)])
def test_a_freed_slot_takes_a_class_by_weight(weight):
    """Three classes wait for the one slot again and again; one without a weight comes last."""
    ones = np.ones(3)
    system = replace(
        tiny_system(gpus=1),
        **dict.fromkeys(("arrival_rate", "prompt_tokens", "output_tokens", "abandonment_rate"), ones),
        **dict.fromkeys(("gate_slope", "gate_base", "gate_queue_target", "prefill_reward", "decode_reward"), ones),
        gate_hold=np.full(3, -np.inf),
        side_share=np.ones((1, 3)),
        side_weight=np.array([weight]),
    )
    assert system.role_decode_slots.tolist() == [1]
    fleet = Dispatcher(system, rng=np.random.default_rng(8))
    picked = np.zeros(3)
    for _ in range(4000):
        requests = [Request(name, label) for name, label in enumerate((0, 0, 1, 2))]
        for request in requests:
            fleet.arrive(request)
            fleet.finish_prefill(request)
        fleet.finish_decode(requests[0])
        (served,) = [request for request in requests[1:] if request.stage is Stage.DECODE]
        picked[served.label] += 1
        for request in requests[1:]:
            fleet.abandon(request)
    assert np.all(picked[np.array(weight) == 0] == 0)
    positive = np.array(weight) > 0
    assert stats.chisquare(picked[positive], 4000 * np.array(weight)[positive]).pvalue > 1e-5


# ---- the selections --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans())))
def test_a_pool_is_a_set(changes):
    pool, expected = Pool(), set()
    for item, add in changes:
        if add and item not in expected:
            pool.add(item)
            expected.add(item)
        elif not add and item in expected:
            pool.remove(item)
            expected.remove(item)
        assert sorted(pool.items) == sorted(expected)
        assert len(pool) == len(expected)


@given(st.integers(1, 40), st.data())
def test_a_tournament_finds_what_a_scan_finds(count, data):
    numbers = st.integers(0, 3).map(float)
    holds = data.draw(st.lists(st.one_of(st.just(-np.inf), numbers), min_size=count, max_size=count))
    tournament, ranks = Tournament(holds), [NOBODY] * count
    assert tournament.best(np.inf) == -1
    for _ in range(20):
        i = data.draw(st.integers(0, count - 1))
        ranks[i] = data.draw(st.one_of(st.just(NOBODY), st.tuples(numbers, numbers, st.just(i))))
        tournament.enter(i, ranks[i])
        slack = data.draw(numbers)
        admitted = [rank for rank, hold in zip(ranks, holds, strict=True) if hold < slack]
        assert tournament.best(slack) == min(admitted, default=NOBODY)[2]


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=40), st.data())
def test_a_weight_tree_finds_where_the_running_sum_passes(weights, data):
    tree = WeightTree(weights)
    on = data.draw(st.sets(st.integers(0, len(weights) - 1), min_size=1))
    for i in range(len(weights)):
        tree.switch(i, True)
    for i in set(range(len(weights))) - on:
        tree.switch(i, False)
    assert tree.total == pytest.approx(sum(weights[i] for i in on))
    for u in np.linspace(0, 1, 20, endpoint=False):
        found = tree.find(u * tree.total)
        below = sum(weights[i] for i in on if i < found)
        assert found in on
        assert below <= u * tree.total * (1 + 1e-9)
        assert (below + weights[found]) * (1 + 1e-9) >= u * tree.total
    assert tree.find(np.nextafter(tree.total, np.inf)) in on


# ---- the events of one request, and what is refused ------------------------------------------------------------------


def test_a_request_on_its_way(plan):
    policy = plan.policy(gpus=5)
    code = policy.scenario.classes[0].name
    controller = Controller(policy, seed=1)
    (start,) = controller.arrive("r1", code)
    assert isinstance(start, StartPrefill)
    assert start.request == "r1"
    (role,) = [each.role for each in controller.gpus if each.prefill == "r1"]
    assert next(each for each in policy.roles if each.name == role).prefill is not None
    assert controller.running["prefill"][code] == ("r1",)
    (start,) = controller.prefill_done("r1")
    assert isinstance(start, StartDecode)
    assert controller.gpus[start.gpu].decodes == ("r1",)
    assert controller.gpus[start.gpu].role == policy.router.order[0]
    assert "1 in decode" in repr(controller)
    assert controller.decode_done("r1") == ()
    assert controller.arrive("r1", code), "an id may come back"
    assert controller.abandon("r1") == ()
    assert not any(controller.running[stage][code] for stage in ("prefill", "decode"))


def test_queues_are_first_come_first_served(plan):
    controller = Controller(plan.policy(gpus=1, kind="FI-WSP"), seed=1)
    code, summarise = (each.name for each in controller.policy.scenario.classes)
    for k in range(6):
        controller.arrive(k, code if k % 2 else summarise)
    assert controller.queues["prefill"] == {code: (1, 3, 5), summarise: (2, 4)}
    assert controller.abandon(1) == ()
    assert controller.prefill_done(0) == (StartDecode(0, 0), StartPrefill(2, 0))
    assert controller.gpus == (FleetGPU(0, controller.policy.roles[0].name, 2, (0,), False),)
    assert controller.abandon(2) == (StartPrefill(3, 0),), "one that hangs up in service frees its slot"
    assert controller.queues == {"prefill": {code: (5,), summarise: (4,)}, "decode": {code: (), summarise: ()}}


def refused(controller, match, event, *arguments):
    before = controller.to_dict()
    with pytest.raises(fo.InvalidInput, match=match):
        getattr(controller, event)(*arguments)
    assert controller.to_dict() == before


def test_refuses_what_cannot_have_happened_and_stays_as_it_was(plan):
    policy = plan.policy(gpus=2, kind="FG-SP", prefill_gpus=1)
    code = policy.scenario.classes[0].name
    controller = Controller(policy, seed=1)
    for k in range(3):
        controller.arrive(f"r{k}", code)
    refused(controller, "arrive: request 'r0' is here already, in prefill on GPU 0", "arrive", "r0", code)
    refused(controller, "arrive: request 'r1' is here already, waiting for its prefill; use", "arrive", "r1", code)
    refused(controller, f"must be a class of the policy; got '{code}x'; did you mean '{code}'", "arrive", 9, code + "x")
    for bad in (7, None, []):
        refused(controller, "must be a class of the policy; got .*; there are", "arrive", 9, bad)
    for bad in (True, 1.5, None, ("a",)):
        refused(controller, "request_id must be a str or an int; got", "arrive", bad, code)
    for event in ("prefill_done", "decode_done", "abandon"):
        for unknown in ("r9", 0, None, [], True):
            refused(controller, f"{event}: request_id must be of a request present; got", event, unknown)
    refused(controller, "'r1' is waiting for its prefill; .* now is abandon$", "prefill_done", "r1")
    refused(controller, "'r1' is waiting for its prefill; .* now is abandon$", "decode_done", "r1")
    refused(controller, "'r0' is in prefill on GPU 0; .* now is prefill_done or abandon", "decode_done", "r0")
    controller.prefill_done("r0")
    refused(controller, "'r0' is in decode on GPU 1; .* now is decode_done or abandon", "prefill_done", "r0")
    controller.decode_done("r0")
    refused(controller, "got 'r0', which never arrived or has left", "decode_done", "r0")
    for gpu in (2, -1, 0.5, "0", None):
        refused(controller, "remove_gpu: gpu must be the number of a GPU of the fleet, of 2 below 2", "remove_gpu", gpu)
        refused(controller, "drain_gpu: gpu must be the number of a GPU", "drain_gpu", gpu)
    refused(controller, "add_gpu: role must be one of mixed, solo; got 'x'", "add_gpu", "x")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"seed": -1}, "seed must be None, a whole number of at least 0 or a numpy Generator; got -1"),
        ({"seed": "1"}, "seed must be None"),
        ({"choose": 3}, "choose must be a function"),
        ({"policy": "x"}, "policy must be a Policy"),
    ],
)
def test_refuses_arguments(plan, arguments, match):
    with pytest.raises(fo.InvalidInput, match=match):
        Controller(**({"policy": plan.policy(gpus=5)} | arguments))


@pytest.mark.parametrize("answer", [-1, 2, None, 0.5, "0"])
def test_refuses_an_answer_that_is_no_index(plan, answer):
    policy = plan.policy(gpus=5, prefill_gpus=2)
    controller = Controller(policy, choose=lambda *_: answer)
    with pytest.raises(fo.InvalidInput, match=r"choose\('prefill-gpu'\): must return an index into the 2 candidates"):
        controller.arrive(0, policy.scenario.classes[0].name)


# ---- restart ---------------------------------------------------------------------------------------------------------


def alive(policy, seed, events):
    live = Live(Controller(policy, seed=seed), seed)
    for _ in range(events):
        live.step()
    return live


@pytest.mark.parametrize("kind", RULES)
def test_a_restart_loses_nothing(kind):
    live = alive(crowded_plan(charging="separate").policy(gpus=3, kind=kind), 1, 1500)
    saved = json.loads(json.dumps(live.controller.to_dict()))
    again = Controller.from_dict(saved)
    assert again.to_dict() == saved
    assert again.queues == live.controller.queues
    assert again.running == live.controller.running
    assert again.gpus == live.controller.gpus
    assert sum(len(line) for queue in again.queues.values() for line in queue.values()) > 5
    other = Live(again, 1)
    other.rng.bit_generator.state = live.rng.bit_generator.state
    other.label, other.count = dict(live.label), live.count
    other.prefill, other.decode = dict(live.prefill), dict(live.decode)
    for _ in range(400):
        live.step()
        other.step()
        assert (other.prefill, other.decode) == (live.prefill, live.decode)
    assert again.to_dict() == live.controller.to_dict()


def test_a_restart_keeps_gpus_that_came_and_went():
    live = alive(crowded_plan().policy(gpus=6, prefill_gpus=3), 2, 500)
    controller = live.controller
    controller.remove_gpu(1)
    controller.drain_gpu(4)
    number, _ = controller.add_gpu("solo")
    assert number == 6
    assert [each.gpu for each in controller.gpus] == [0, 2, 3, 4, 5, 6]
    assert [each.gpu for each in controller.gpus if each.draining] == [4]
    again = Controller.from_dict(controller.to_dict())
    assert again.gpus == controller.gpus
    assert again.add_gpu("mixed") == controller.add_gpu("mixed")
    controller.remove_gpu(7)
    assert Controller.from_dict(controller.to_dict()).add_gpu("mixed")[0] == 8, "a number is never used twice"


def edited(data, path, value):
    """A deep copy with another value at the path."""
    copy = json.loads(json.dumps(data))
    place = copy
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return copy


def drained(saved, stage):
    """The saved state without the first request at a stage."""
    at = next(at for at, each in enumerate(saved["requests"]) if each["stage"] == stage)
    return saved | {"requests": saved["requests"][:at] + saved["requests"][at + 1 :]}


def test_refuses_what_is_not_a_saved_state():
    controller = alive(crowded_plan().policy(gpus=2, prefill_gpus=1), 3, 1500).controller
    saved = controller.to_dict()
    stages = [each["stage"] for each in saved["requests"]]
    waiting, prefill = stages.index("waiting for its prefill"), stages.index("in prefill")
    decodes = [at for at, stage in enumerate(stages) if stage == "in decode"]
    crowd = edited(saved, ("requests", waiting), saved["requests"][waiting] | {"stage": "in prefill", "place": 0})
    for data, match in (
        ([], "must be a"),
        ({}, "policy is required"),
        (edited(saved, ("random",), {}), "random is not the state of a PCG64 generator"),
        (edited(saved, ("random", "state", "state"), "x"), "random is not the state of a PCG64 generator"),
        (edited(saved, ("gpus", 0, "role"), "x"), "GPU 0 has the role 'x'; there are mixed, solo"),
        (edited(saved, ("gpus", 1, "number"), 0), "numbers must differ and be below next_gpu = 2; got 0"),
        (edited(saved, ("next_gpu",), 1), "numbers must differ and be below next_gpu = 1; got 1"),
        (edited(saved, ("pools", 0), [0, 1, 5]), "pools must list the GPUs"),
        (edited(saved, ("pools",), []), "pools must list the GPUs"),
        (edited(saved, ("requests", 0, "class_name"), "x"), "is of class 'x'; there are class 0"),
        (edited(saved, ("requests", 1), saved["requests"][0]), "stands there twice"),
        (edited(saved, ("requests", 0, "name"), 1.5), "name"),
        (edited(saved, ("requests", 0, "stage"), "asleep"), "stage"),
        (edited(saved, ("requests", waiting, "place"), 0), "cannot be waiting for its prefill at place 0"),
        (edited(saved, ("requests", prefill, "place"), 1), "cannot be in prefill at place 1"),
        (edited(saved, ("requests", prefill, "place"), 7), "cannot be in prefill at place 7"),
        (edited(saved, ("requests", decodes[0], "place"), 7), "cannot be in decode at place 7"),
        (edited(saved, ("requests", waiting, "stage"), "waiting for its decode"), "cannot be waiting for its decode"),
        (crowd, "cannot be in prefill at place 0"),
        (drained(saved, "in decode"), "one waits although a GPU has a slot for it"),
        (drained(saved, "in prefill"), "one waits although a GPU has a slot for it"),
    ):
        with pytest.raises(fo.InvalidInput, match=match):
            Controller.from_dict(data)
    assert len(decodes) > 16
    at_most = {0: 15, 1: 16}  # a mixed GPU with a free slot beside its decodes, a solo one
    for gpu, most in at_most.items():
        data = drained(saved, "in prefill")
        running = [each | {"place": gpu} for each in data["requests"] if each["stage"] == "in decode"]
        with pytest.raises(fo.InvalidInput, match=f"'?{running[most]['name']}'? cannot be in decode at place {gpu}"):
            Controller.from_dict(data | {"requests": running[: most + 1]})


def test_a_seed_is_a_path_of_its_own(plan):
    policy = plan.policy(gpus=20, prefill_gpus=10)
    code = policy.scenario.classes[0].name

    def starts(seed):
        controller = Controller(policy, seed=seed)
        return [controller.arrive(k, code) for k in range(10)]

    assert starts(1) == starts(1)
    assert starts(0) != starts(1)
    assert starts(np.random.default_rng(1)) == starts(np.random.default_rng(1))
    assert starts(None) != starts(None)


# ---- GPUs that come and go -------------------------------------------------------------------------------------------


def assert_settled(fleet):
    """Caps hold, what is listed is what is there, and nobody waits beside a slot that the rules would give."""
    system, waiting = fleet.system, [0] * fleet.system.sides
    assert fleet.is_settled()
    for lines, weighted, side in zip(fleet.decode_lines, fleet.weighted_lines, range(system.sides), strict=True):
        waiting[side] = len(lines) + sum(map(len, weighted.values()))
    free, idle = [0] * system.sides, []
    for gpu in fleet.gpus.values():
        r, running = gpu.role, gpu.prefill is not None
        assert len(gpu.decodes) <= system.role_decode_slots[r]
        assert len(gpu.decodes) + running <= system.role_slots[r]
        slots = min(system.role_decode_slots[r], system.role_slots[r] - running) - len(gpu.decodes)
        assert gpu.free == (slots if gpu.open else 0)
        assert (gpu.number in fleet.free[r].items) == (gpu.free > 0)
        free[system.role_side[r]] += gpu.free
        room = gpu.open and not running and len(gpu.decodes) < system.role_slots[r]
        if room and system.role_prefill_mode[r] >= 0:
            idle.append(gpu.number)
    assert sorted(number for pool in fleet.idle for number in pool.items) == idle
    assert not any(w and f for w, f in zip(waiting, free, strict=True))
    slack = sum(free) - sum(waiting)
    assert fleet._free_slots - fleet._unplaced == slack
    if idle and not system.gate_fcfs:
        assert all(not line or system.gate_hold[i] >= slack for i, line in enumerate(fleet.prefill_lines))
    assert not (idle and system.gate_fcfs and fleet.prefill_lines[0])


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from([*RULES, "held"]), seed=st.integers(0, 2**32 - 1))
def test_gpus_come_and_go_and_nobody_waits_in_vain(kind, seed):
    rng = np.random.default_rng(seed)
    plan = CROWDED
    policy = plan.policy(gpus=5, kind="gate-and-route" if kind == "held" else kind)
    if kind == "held":
        hold = {"class 1": 2.0, "class 4": -3.0}
        policy = replace(policy, gate=Gate(rule="occupancy", hold=hold, placement="fewest-decodes"))
    controller = Controller(policy, seed=int(rng.integers(100)))
    fleet, present, count = controller._fleet, {}, 0
    roles = [role.name for role in policy.roles]
    for _ in range(300):
        u, decisions = rng.random(), ()
        names = list(present)
        if u < 0.03 and fleet.gpus:
            gone = int(rng.choice(list(fleet.gpus)))
            there = [name for name, request in present.items() if request == ("on", gone)]
            lost = controller.remove_gpu(gone)
            assert sorted(lost) == sorted(there)
            for name in lost:
                del present[name]
        elif u < 0.06 and fleet.gpus:
            controller.drain_gpu(int(rng.choice(list(fleet.gpus))))
        elif u < 0.12:
            _, decisions = controller.add_gpu(str(rng.choice(roles)))
        elif u < 0.5 or not names:
            decisions = controller.arrive(count, f"class {rng.integers(6)}")
            present.setdefault(count, ("waits", 0))
            count += 1
        else:
            name = names[rng.integers(len(names))]
            stage = controller._requests[name].stage
            event = {Stage.PREFILL: "prefill_done", Stage.DECODE: "decode_done"}.get(stage, "abandon")
            if rng.random() < 0.1:
                event = "abandon"
            drained = {each.gpu for each in controller.gpus if each.draining}
            decisions = getattr(controller, event)(name)
            present[name] = ("waits", 0)
            if event != "prefill_done":
                del present[name]
            elif policy.router.rule != "stay":
                assert not any(decision.gpu in drained for decision in decisions)
        for decision in decisions:
            present[decision.request] = ("on", decision.gpu)
        assert_settled(fleet)
        on = {name: ("on", each.gpu) for each in controller.gpus for name in each.decodes}
        on |= {each.prefill: ("on", each.gpu) for each in controller.gpus if each.prefill is not None}
        assert {name: where for name, where in present.items() if where[0] == "on"} == on
    assert set(present) == set(controller._requests)
    assert Controller.from_dict(controller.to_dict()).to_dict() == controller.to_dict()


CROWDED = crowded_plan()


# ---- cost ------------------------------------------------------------------------------------------------------------


def lines_per_event(policy, events=3000):
    """Lines of Python that the controller executes per event and decision."""
    system = fleet_system(policy)
    recording = record(system, horizon=1.2 * events / float(system.arrival_rate.sum()), rng=np.random.default_rng(1))
    assert len(recording) > events
    choose = Replay(system)
    controller = Controller(policy, choose=choose)
    choose.made = lambda: len(controller._fleet.decisions)
    names = [each.name for each in policy.scenario.classes]
    executed = decided = 0

    def trace(frame, event, _):
        nonlocal executed
        if not frame.f_code.co_filename.endswith(("controller.py", "dispatch.py", "selection.py")):
            return None
        executed += event == "line"
        return trace

    for event in recording:
        choose.event = event
        choose.label[event.request] = event.label
        tell = getattr(controller, event.kind)
        sys.settrace(trace)
        try:
            made = tell(event.request, names[event.label]) if event.kind == "arrive" else tell(event.request)
        finally:
            sys.settrace(None)
        decided += len(made)
    return executed / (len(recording) + decided)


def many_classes(plan, copies):
    """The reference instance with each class split into as many."""
    scenario = plan.model.scenario
    classes = [
        replace(each, name=f"{each.name} {k}", arrival_rate=each.arrival_rate / copies)
        for each in scenario.classes
        for k in range(copies)
    ]
    return fo.FluidModel(classes, plan.model.gpu_types[0], prices=scenario.prices).solve()


def test_an_event_costs_the_logarithm_of_the_classes(plan):
    few, many = (lines_per_event(many_classes(plan, copies).policy(gpus=50)) for copies in (1, 500))
    assert many < few + 4 * np.log2(500), (few, many)


def test_an_event_costs_the_same_in_any_fleet(plan):
    small, large = (lines_per_event(plan.policy(gpus=gpus)) for gpus in (50, 2000))
    assert large < 1.3 * small, (small, large)


def test_needs_no_compiler():
    code = """
import sys
sys.modules["numba"] = None
import fluidopt as fo
from fluidopt.policy.controller import Controller
policy = fo.reference_model().solve().policy(gpus=5)
controller = Controller(policy, seed=1)
name = policy.scenario.classes[0].name
for k in range(10):
    controller.arrive(k, name)
print(controller.prefill_done(0)[0].request)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"
