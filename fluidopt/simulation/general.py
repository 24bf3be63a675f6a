"""Replications of the fleet under any laws of lengths and patience and any arrivals, on common requests."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fluidopt.simulation.arrivals import ArrivalProcess, Laws, Requests, RequestStream
from fluidopt.simulation.choices import NOBODY, list_gpu
from fluidopt.simulation.general_events import (
    CLASS,
    COUNTERS,
    GPU,
    LINE,
    NO_ARRIVALS,
    REACHED,
    REQUEST,
    ROLE,
    SCALARS,
    SERVICE,
    STARTS,
    TALLY,
    WAITING,
    Fleet,
    State,
    advance,
    settle,
)
from fluidopt.simulation.system import FEWEST_DECODES, Replication, Start, System, Totals, reject

WAITING_LIMIT = 20_000_000
"""Default cap on requests waiting at once; one takes 60 bytes."""


def _build_fleet(system: System) -> Fleet:
    classes = np.zeros(system.classes, dtype=CLASS)
    for name in ("slope", "base", "queue_target", "hold"):
        classes[name] = getattr(system, f"gate_{name}")
    classes["token_reward"] = system.prefill_reward / system.prompt_tokens
    classes["iteration_reward"] = system.decode_reward / system.output_tokens
    roles = np.zeros(system.roles, dtype=ROLE)
    mode, prefills = system.role_prefill_mode, system.role_prefill_mode >= 0
    roles["prefill_speed"] = np.where(prefills, system.mode_chunk[mode] / system.mode_time[mode], 0.0)
    roles["rest_speed"], roles["mixed_speed"] = system.decode_speeds().T
    roles["first_gpu"] = np.cumsum(system.role_gpus) - system.role_gpus
    for name in ("decode_slots", "slots", "stays", "side"):
        roles[name] = getattr(system, f"role_{name}")
    roles["prefills"] = prefills
    roles["takes"] = prefills & (system.role_decode_slots == system.role_slots)
    order, first_role, cumulative = system.routing()
    return Fleet(classes, roles, order, first_role, cumulative, system.side_weight.copy())


def _build_state(system: System, room: int) -> State:
    """The empty fleet, with room for so many waiting requests."""
    count, n, sides = system.classes, system.gpus, system.sides
    gpus = np.zeros(n, dtype=GPU)
    gpus["role"] = np.repeat(np.arange(system.roles), system.role_gpus)
    gpus["free_position"] = gpus["idle_level"] = gpus["idle_position"] = NOBODY
    scalars = np.zeros(1, dtype=SCALARS)
    scalars["slack"] = system.role_gpus @ system.role_decode_slots
    scalars["pool_free"] = NOBODY
    scalars["fcfs"], scalars["gate_first"] = system.gate_fcfs, system.gate_first
    slots = max(1, int(system.role_decode_slots.max()))
    levels = slots + 1 if system.placement == FEWEST_DECODES else 1
    numbers = np.arange(n)
    return State(
        scalars=scalars,
        gpus=gpus,
        ticks=np.zeros((n, slots)),
        kinds=np.zeros((n, slots), dtype=np.int64),
        due=np.full(n, np.inf),
        due_order=numbers.copy(),
        due_place=numbers.copy(),
        changed=np.zeros(n, dtype=np.int64),
        free_members=np.zeros(n, dtype=np.int64),
        free_size=np.zeros(system.roles, dtype=np.int64),
        idle_members=np.zeros((levels, n), dtype=np.int64),
        idle_size=np.zeros(levels, dtype=np.int64),
        tallies=np.zeros(count, dtype=TALLY),
        service=np.zeros(system.roles * count, dtype=SERVICE),
        waiting=np.zeros((1 + sides) * count, dtype=WAITING),
        most=np.zeros((system.roles, 2), dtype=np.int64),
        lines=np.full(count + sides + sides * count, NOBODY, dtype=LINE),
        pool=np.zeros(room, dtype=REQUEST),
        deadline=np.zeros(room),
        deadline_order=np.zeros(room, dtype=np.int64),
        deadline_place=np.zeros(room, dtype=np.int64),
    )


class GeneralRun:
    """A replication under way, from the empty fleet: advanced to any times and asked in between for what it saw.

    Args:
        system: the fleet and its policy; of the laws of lengths and patience it has the means.
        requests: who comes, in blocks.
        rng: for the draws of the policy alone.
        max_waiting: more requests waiting at once are refused.
    """

    def __init__(
        self,
        system: System,
        requests: Iterator[Requests],
        rng: np.random.Generator,
        *,
        max_waiting: int = WAITING_LIMIT,
    ) -> None:
        self.system, self.requests, self.rng, self.max_waiting = system, requests, rng, max_waiting
        self.fleet, self.state = _build_fleet(system), _build_state(system, 64)
        self.block = Requests(*(np.zeros(0, dtype=kind) for kind in (float, np.int64, float, float, float)))
        for g in range(system.gpus):
            list_gpu(self.fleet, self.state, g)

    def advance(self, until: float) -> None:
        """Run to time ``until``, s.

        Raises:
            OverflowError: more than ``max_waiting`` requests wait.
        """
        while True:
            status = advance(self.fleet, self.state, self.block, self.rng, until)
            if status == REACHED:
                return
            if status == NO_ARRIVALS:
                self.block = next(self.requests)
                self.state.scalars["arrival"] = 0
            else:
                self._make_room()

    def _make_room(self) -> None:
        """Room for twice as many waiting requests."""
        old = self.state.pool.size
        if old >= self.max_waiting:
            raise OverflowError(
                f"more than {self.max_waiting} requests wait at once: the fleet cannot keep up, its queues grow. Use "
                "more GPUs, or give every class an abandonment rate"
            )
        names = ("pool", "deadline", "deadline_order", "deadline_place")
        self.state = self.state._replace(**{name: np.resize(getattr(self.state, name), 2 * old) for name in names})

    def counts(self) -> Start:
        """The present state."""
        shape = (self.system.roles, self.system.classes)
        waiting = self.state.waiting["count"].reshape(-1, self.system.classes)
        return Start(
            prefill_queue=waiting[0],
            decode_queue=waiting[1:].sum(axis=0),
            prefill=self.state.service["prefill"].reshape(shape),
            decode=self.state.service["decode"].reshape(shape),
        )

    def collect(self, now: float) -> Totals:
        """What was seen since the last call, or since time 0, up to time ``now``, to which the run was advanced.

        Here ``expected_reward`` is the reward that the tokens made in the window are worth, and ``expected_tokens``
        counts the decode iterations done: both follow the work, not a rate given the state.
        """
        settle(self.fleet, self.state, now)
        system, state = self.system, self.state
        scalars, service, waiting = state.scalars, state.service, state.waiting
        window = now - float(scalars["origin"][0])
        shape = (system.roles, system.classes)
        queue_time = (waiting["count"] * window - waiting["moment"]).reshape(-1, system.classes)
        abandoned = waiting["abandoned"].reshape(-1, system.classes)
        counters = {name: state.tallies[name].copy() for name in COUNTERS.split()}
        reward = counters["prefill_completions"] @ system.prefill_reward
        reward += counters["decode_completions"] @ system.decode_reward
        totals = Totals(
            window=np.array(window),
            **counters,
            **{name: service[name].reshape(shape).copy() for name in STARTS.split()},
            abandoned_prefill=abandoned[0].copy(),
            abandoned_decode=abandoned[1:].sum(axis=0),
            prefill_queue_time=queue_time[0],
            decode_queue_time=queue_time[1:].sum(axis=0),
            prefill_time=(service["prefill"] * window - service["prefill_moment"]).reshape(shape),
            decode_time=(service["decode"] * window - service["decode_moment"]).reshape(shape),
            expected_tokens=scalars["tokens"][0].copy(),
            reward=np.array(reward),
            expected_reward=scalars["earned"][0].copy(),
            events=scalars["events"][0].copy(),
            null_draws=np.array(0),
            waits=None,
        )
        scalars["origin"] = now
        for name in ("tokens", "earned", "events"):
            scalars[name] = 0
        for name in COUNTERS.split():
            state.tallies[name] = 0
        for name in (*STARTS.split(), "prefill_moment", "decode_moment"):
            service[name] = 0
        for name in ("abandoned", "moment"):
            waiting[name] = 0
        return totals


def simulate_general(
    system: System,
    *,
    horizon: float,
    warmup: float = 0.0,
    rng: np.random.Generator,
    laws: Laws | None = None,
    process: ArrivalProcess | None = None,
) -> Replication:
    """One replication from the empty fleet under any laws of lengths and patience and any process of arrivals.

    Arrivals and lengths are drawn from one stream and the policy's choices from another, so two policies run from equal
    generators meet the same requests: the same times, lengths and patience.

    Args:
        system: the fleet, its policy, and the means.
        horizon: simulated seconds, warm-up included.
        warmup: seconds at the beginning that are not measured.
        rng: source of randomness; its state alone determines the replication.
        laws: shapes of the laws, by default exponential as in the model.
        process: of the arrivals, by default Poisson.

    Raises:
        ValueError: a time out of range.
        OverflowError: more than `WAITING_LIMIT` requests wait at once.
    """
    if not (np.isfinite(horizon) and horizon > 0):
        raise reject("horizon", "simulate_general", "finite and above 0", horizon)
    if not 0 <= warmup < horizon:
        raise reject("warmup", "simulate_general", f"at least 0 and below horizon ({horizon:g} s)", warmup)
    ours, theirs = rng.spawn(2)
    run = GeneralRun(system, RequestStream(system, theirs, laws=laws, process=process), ours)
    run.advance(warmup)
    run.collect(warmup)
    at_start = run.counts()
    run.advance(horizon)
    totals = run.collect(horizon)
    most = run.state.most
    return Replication(
        **vars(totals),
        at_start=at_start,
        at_end=run.counts(),
        most_decodes=most[:, 0].copy(),
        most_requests=most[:, 1].copy(),
        trajectory=None,
    )
