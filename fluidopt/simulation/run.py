"""One replication of the chain: builds the compiled state, runs it to the asked times, collects what it saw."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fluidopt.simulation.arrivals import Arrivals, Poisson
from fluidopt.simulation.compilation import AnyArray
from fluidopt.simulation.kernel import EXHAUSTED, NO_ARRIVALS, REACHED, advance, load
from fluidopt.simulation.state import (
    BUCKET,
    CHOICE,
    CLASS,
    COUNTERS,
    ENTRANT,
    FLEET,
    GPU,
    LINE,
    LOG,
    MARGIN,
    MEMBER,
    NONE,
    PLACE,
    REQUEST,
    ROLE,
    ROLE_TALLY,
    SCALARS,
    SERVICE,
    SIDE,
    STARTS,
    TALLY,
    WAITING,
    State,
    Tables,
)
from fluidopt.simulation.system import (
    FEWEST_DECODES,
    FloatArray,
    IntArray,
    Replication,
    Start,
    System,
    Totals,
    Trajectory,
    reject,
)
from fluidopt.simulation.waits import BINS

WAITING_LIMIT = 20_000_000
"""Default cap on requests waiting at once; a waiting request takes 24 bytes, so the default is 0.5 GB."""


class WaitingLimitExceeded(RuntimeError):
    """More requests were waiting at once than `max_waiting` allows."""


class EventLimitExceeded(RuntimeError):
    """A replication needed more events than `max_events` allows."""


def _group(rates: FloatArray) -> tuple[IntArray, FloatArray]:
    """Fewest groups of classes whose positive rates differ by less than a factor 2: group of each class, bounds."""
    group = np.full(rates.size, NONE, dtype=np.int64)
    bounds: list[float] = []
    for i in np.argsort(-rates, kind="stable"):
        if rates[i] <= 0:
            break
        if not bounds or rates[i] <= bounds[-1] / 2:
            bounds.append(float(rates[i]))
        group[i] = len(bounds) - 1
    return group, np.array(bounds)


def _quantum(system: System) -> float:
    """Unit in which the earnings of decodes are kept as integers, so that their sum over the fleet is exact."""
    largest = float(np.max(np.abs(system.decode_reward / system.output_tokens)))
    seats = float(np.dot(system.role_gpus, system.role_decode_slots))
    bits = min(40, 61 - int(np.ceil(np.log2(seats + 2))))
    return largest / 2.0**bits if largest > 0 else 1.0


class _Lines(NamedTuple):
    """The lines before the decode: those common to a side come first, then those with a weight."""

    of_class: IntArray  # (S, I) line of a class that waits on a side
    weight: FloatArray  # of each line with a weight, by side
    side: IntArray  # of each line with a weight
    choice: IntArray  # of each line with a weight
    bounds: FloatArray  # of each choice
    first_choice: IntArray  # (S + 1,)


def _decode_lines(system: System) -> _Lines:
    count, sides = system.classes, system.sides
    side, label = np.nonzero(system.side_weight)
    of_class = np.repeat(count + np.arange(sides)[:, None], count, axis=1)
    of_class[side, label] = count + sides + np.arange(side.size)
    choices, bounds = [], [np.zeros(0)]
    for s in range(sides):
        group, bound = _group(system.side_weight[s])
        choices.append(group[label[side == s]] + sum(map(len, bounds)))
        bounds.append(bound)
    first_choice = np.cumsum([len(bound) for bound in bounds])
    weight = system.side_weight[side, label]
    return _Lines(of_class, weight, side, np.concatenate(choices), np.concatenate(bounds), first_choice)


def _places(system: System, of_class: IntArray, waiting_bucket: IntArray) -> AnyArray:
    """The table of PLACE, (1 + S) * I."""
    places = np.zeros((1 + system.sides, system.classes), dtype=PLACE)
    places["abandonment"] = system.abandonment_rate
    places["bucket"] = waiting_bucket
    places["line"][0] = 0 if system.gate_fcfs else np.arange(system.classes)
    places["line"][1:] = of_class
    places["cumulative"][1:] = np.cumsum(system.side_share, axis=0)
    last = system.sides - 1 - np.argmax(system.side_share[::-1] > 0, axis=0)  # rounding must not reach beyond it
    places["cumulative"][1:][np.arange(system.sides)[:, None] >= last] = 2.0
    return places.ravel()


def _build_tables(system: System, waits: bool) -> tuple[Tables, FloatArray]:
    """The tables, and the bounds of the buckets."""
    speeds = system.decode_speeds()
    prefills = system.role_prefill_mode >= 0
    present = system.role_gpus > 0
    fastest = speeds[present & (system.role_decode_slots > 0)].max(initial=0.0)
    decode_group, decode_bounds = _group(fastest / system.output_tokens)
    prefill_group, prefill_bounds = _group(system.prefill_rates()[present].max(axis=0))
    waiting_group, waiting_bounds = _group(system.abandonment_rate)

    fleet = np.zeros(1, dtype=FLEET)
    fleet["first_prefill_bucket"] = first_prefill = decode_bounds.size
    fleet["first_waiting_bucket"] = first_waiting = first_prefill + prefill_bounds.size
    fleet["by_level"] = system.placement == FEWEST_DECODES
    fleet["idle_stride"] = system.role_gpus[prefills].sum()
    fleet["holds"] = np.any(system.gate_hold > -np.inf)
    fleet["fcfs"] = system.gate_fcfs
    fleet["gate_first"] = system.gate_first
    fleet["timed"] = waits

    classes = np.zeros(system.classes, dtype=CLASS)
    classes["per_prompt"] = 1.0 / system.prompt_tokens
    classes["per_output"] = 1.0 / system.output_tokens
    classes["earning"] = np.rint(system.decode_reward / system.output_tokens / _quantum(system))
    for name in ("gate_base", "gate_slope", "gate_queue_target", "gate_hold"):
        classes[name] = getattr(system, name)
    by_hold = np.argsort(system.gate_hold, kind="stable")
    classes["leaf"][by_hold] = np.arange(system.classes)
    classes["decode_bucket"] = decode_group
    classes["prefill_bucket"] = first_prefill + prefill_group
    waiting_bucket = np.where(waiting_group >= 0, first_waiting + waiting_group, NONE)

    roles = np.zeros(system.roles, dtype=ROLE)
    mode = system.role_prefill_mode
    roles["prefill_speed"] = np.where(prefills, system.mode_chunk[mode] / system.mode_time[mode], 0.0)
    roles["rest_speed"], roles["mixed_speed"] = speeds.T
    roles["first_gpu"] = np.cumsum(system.role_gpus) - system.role_gpus
    roles["decode_slots"] = system.role_decode_slots
    roles["slots"] = system.role_slots
    roles["prefills"] = prefills
    roles["takes"] = prefills & (system.role_decode_slots == system.role_slots)
    roles["stays"] = system.role_stays
    roles["side"] = system.role_side

    lines = _decode_lines(system)
    router_order = system.router_order[np.argsort(system.role_side[system.router_order], kind="stable")]
    sides = np.zeros(system.sides, dtype=SIDE)
    last_role = np.cumsum(np.bincount(system.role_side, minlength=system.sides))
    sides["first_role"][1:], sides["last_role"] = last_role[:-1], last_role
    sides["first_choice"], sides["last_choice"] = lines.first_choice[:-1], lines.first_choice[1:]
    places = _places(system, lines.of_class, waiting_bucket)
    bounds = np.concatenate([decode_bounds, prefill_bounds, waiting_bounds])
    return Tables(fleet, classes, roles, router_order, sides, places, system.gate_hold[by_hold]), bounds


def _build_state(system: System, tables: Tables, bounds: FloatArray) -> State:
    """The empty fleet, without room for a request."""
    count = system.classes
    gpus = np.zeros(system.gpus, dtype=GPU)
    gpus["role"] = np.repeat(np.arange(system.roles), system.role_gpus)
    gpus["free_position"] = gpus["idle_position"] = gpus["idle_level"] = NONE
    buckets = np.zeros(bounds.size, dtype=BUCKET)
    buckets["bound"] = bounds
    buckets["per_bound"] = 1.0 / bounds
    scalars = np.zeros(1, dtype=SCALARS)
    scalars["next_time"] = np.nan
    scalars["pool_free"] = NONE
    scalars["slack"] = system.role_gpus @ system.role_decode_slots
    choosing = _decode_lines(system)
    lines = np.full(count + system.sides + choosing.weight.size, NONE, dtype=LINE)
    lines["weight"] = lines["open_lines"] = 0
    chosen = lines[count + system.sides :]
    chosen["weight"], chosen["choice"], chosen["common"] = choosing.weight, choosing.choice, count + choosing.side
    choices = np.zeros(choosing.bounds.size, dtype=CHOICE)
    choices["bound"] = choosing.bounds
    capacity = np.bincount(choosing.choice, minlength=choosing.bounds.size)
    choices["start"] = np.cumsum(capacity) - capacity
    levels = int(system.role_decode_slots.max()) + 1 if system.placement == FEWEST_DECODES else 1
    leaves = max(2, 1 << (count - 1).bit_length())
    number = np.zeros(1)
    return State(
        scalars=scalars,
        arrival_times=np.empty(0),
        arrival_classes=np.empty(0, dtype=np.int64),
        gpus=gpus,
        free_members=np.zeros(system.gpus, dtype=np.int32),
        free_size=np.zeros(system.roles, dtype=np.int64),
        idle_members=np.empty(levels * int(tables.fleet["idle_stride"][0]), dtype=np.int32),
        idle_size=np.zeros(levels, dtype=np.int64),
        idle_words=np.zeros((levels + 63) // 64, dtype=np.uint64),
        tallies=np.zeros(count, dtype=TALLY),
        roles=np.zeros(system.roles, dtype=ROLE_TALLY),
        service=np.zeros(system.roles * count, dtype=SERVICE),
        waiting=np.zeros((1 + system.sides) * count, dtype=WAITING),
        lines=lines,
        choices=choices,
        choice_members=np.zeros(choosing.weight.size, dtype=np.int32),
        pool=np.empty(0, dtype=REQUEST),
        weights=np.zeros(bounds.size),
        buckets=buckets,
        members=np.empty(0, dtype=MEMBER),
        entrants=np.array([(np.inf, -np.inf)] * (count + 1), dtype=ENTRANT),
        winners=np.full(2 * leaves, count, dtype=np.int32),
        waits=np.zeros(2 * system.roles * count * BINS * int(tables.fleet["timed"][0]), dtype=np.int32),
        number=number,
        bits=number.view(np.int64),
        log=None,
    )


def _make_room(state: State, members: IntArray | int, waiting: int, max_waiting: int) -> State:
    """Room for so many more members per bucket and records in the pool; what is short of room is at least doubled."""
    old = state.buckets.copy()
    short = old["size"] + members + 2 * MARGIN > old["capacity"]
    capacity = np.where(short, 2 * old["capacity"] + members + 64, old["capacity"])
    state.buckets["capacity"] = capacity
    state.buckets["start"] = np.cumsum(capacity) - capacity
    entries = np.empty(capacity.sum(), dtype=MEMBER)
    for before, after in zip(old, state.buckets, strict=True):
        kept = state.members[before["start"] : before["start"] + before["size"]]
        entries[after["start"] : after["start"] + before["size"]] = kept
    pool = state.pool
    if int(state.scalars["pool_used"][0]) + waiting + 2 * MARGIN > pool.size:
        pool = np.empty(min(2 * pool.size + waiting + 64, max_waiting + 4 * MARGIN), dtype=REQUEST)
        pool[: state.pool.size] = state.pool
    log = state.log
    if log is not None and 2 * int(state.scalars["logged"][0]) >= log.size:
        log = np.concatenate([log, np.empty_like(log)])
    state.scalars["full"] = 0
    return state._replace(members=entries, pool=pool, log=log)


def _spread(system: System, start: Start) -> tuple[IntArray, IntArray]:
    """Seats for a start: (GPU, class) per prefill and per decode, as level over a role's GPUs as the caps allow."""
    prefills, decodes = [], []
    first = np.cumsum(system.role_gpus) - system.role_gpus
    labels = np.arange(system.classes)
    for r in range(system.roles):
        count, slots = int(system.role_gpus[r]), int(system.role_slots[r])
        running, seated = int(start.prefill[r].sum()), int(start.decode[r].sum())
        most = count if system.role_prefill_mode[r] >= 0 else 0
        if running > most:
            raise reject("prefill", "Start", f"at most {most} prefills in service in role {r}", running)
        cap = np.full(count, system.role_decode_slots[r])
        cap[count - running :] = min(int(system.role_decode_slots[r]), slots - 1)
        if seated > cap.sum():
            rule = f"at most {cap.sum()} decodes in service in role {r}, where {running} prefills run"
            raise reject("decode", "Start", rule, seated)
        level = np.zeros(count, dtype=np.int64)
        while seated > 0:
            open_gpus = np.flatnonzero(level < cap)[:seated]
            step = max(1, min(seated // open_gpus.size, int((cap - level)[open_gpus].min())))
            level[open_gpus] += step
            seated -= step * open_gpus.size
        order = [np.flatnonzero(level > k) for k in range(level.max(initial=0))]
        gpu = np.concatenate([labels[:0], *order])
        decodes.append(np.stack([first[r] + gpu, np.repeat(labels, start.decode[r])], axis=1))
        gpu = np.arange(count - running, count)
        prefills.append(np.stack([first[r] + gpu, np.repeat(labels, start.prefill[r])], axis=1))
    return np.concatenate(prefills), np.concatenate(decodes)


def _queue_up(system: System, start: Start) -> IntArray:
    """The waiting requests as tags in the order of the queues."""
    shares = start.decode_queue * system.side_share
    by_side = np.floor(shares).astype(np.int64)
    rest = start.decode_queue - by_side.sum(axis=0)
    order = np.argsort(by_side - shares, axis=0, kind="stable")  # largest remainders first
    np.put_along_axis(
        by_side, order, np.take_along_axis(by_side, order, 0) + (np.arange(len(order))[:, None] < rest), 0
    )
    if system.gate_fcfs:
        queue = _interleave(start.prefill_queue)
    else:
        queue = np.repeat(np.arange(system.classes), start.prefill_queue)
    buffers = [(1 + s) * system.classes + _interleave(counts) for s, counts in enumerate(by_side)]
    return np.concatenate([queue, *buffers])


def _interleave(counts: IntArray) -> IntArray:
    """Class of each place in a queue of `counts` requests, the classes evenly mixed."""
    labels = np.repeat(np.arange(counts.size), counts)
    rank = np.arange(labels.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return labels[np.argsort((rank + 0.5) / counts[labels], kind="stable")]


def _by_stage(values: AnyArray, classes: int) -> tuple[AnyArray, AnyArray]:
    """Per class before the prefill, and before the decode over all sides, from values by tag."""
    by_place = values.reshape(-1, classes)
    return by_place[0].copy(), by_place[1:].sum(axis=0)


_FORGOTTEN = {
    "tallies": tuple(COUNTERS.split()),
    "roles": ("mixed_decodes_moment", "mixed_earning_moment"),
    "service": (*STARTS.split(), "prefill_moment", "decode_moment"),
    "waiting": ("abandoned", "moment"),
}
"""What begins anew with each window."""


class Run:
    """A replication under way: the compiled state, advanced to any times and asked in between for what it saw.

    The path depends on the state of `rng` alone, not on where it is stopped; `arrivals` is the stream of requests, by
    default Poisson at the system's rates. Arrivals and what happens to them are drawn from two streams, so two systems
    run from equal generators meet the same arrivals.
    """

    def __init__(
        self,
        system: System,
        start: Start,
        rng: np.random.Generator,
        *,
        arrivals: Arrivals | None = None,
        waits: bool = False,
        log: bool = False,
        max_events: int = 10**11,
        max_waiting: int = WAITING_LIMIT,
    ) -> None:
        ours, theirs = rng.spawn(2)
        self.system, self.rng, self.max_waiting = system, ours, max_waiting
        self.arrivals: Arrivals = Poisson(system.arrival_rate, theirs) if arrivals is None else arrivals
        self.timed, self.events_left = waits, max_events
        self.rest_speed, mixed_speed = system.decode_speeds().T
        self.gain = np.where(system.role_prefill_mode >= 0, mixed_speed - self.rest_speed, 0.0)
        self.prefill_worth = system.prefill_rates() * system.prefill_reward
        self.decode_worth, self.quantum = system.decode_reward / system.output_tokens, _quantum(system)
        prefills, decodes = _spread(system, start)
        waiting = _queue_up(system, start)
        if waiting.size > max_waiting:
            rule = f"at least the {waiting.size} requests waiting at the start"
            raise reject("max_waiting", "simulate", rule, max_waiting)
        self.tables, bounds = _build_tables(system, waits)
        classes = self.tables.classes
        label = waiting % system.classes  # a waiting request may be seated at once: room for it there too
        needed = [
            classes["decode_bucket"][np.concatenate([decodes[:, 1], label])],
            classes["prefill_bucket"][np.concatenate([prefills[:, 1], label])],
            self.tables.places["bucket"][waiting],
        ]
        used = np.concatenate(needed)
        members = np.bincount(used[used >= 0], minlength=bounds.size)
        # where classes are held back one event can start any number of prefills, so these get room for all there can be
        first, last = (
            int(self.tables.fleet["first_prefill_bucket"][0]),
            int(self.tables.fleet["first_waiting_bucket"][0]),
        )
        members[first:last] = system.role_gpus[system.role_prefill_mode >= 0].sum()
        empty = _build_state(system, self.tables, bounds)
        self.state = _make_room(empty, members, waiting.size, max_waiting)
        load(self.tables, self.state, self.rng, prefills, decodes, waiting)
        if log:
            at_once = 2 * (2 * system.gpus + 2 * int(system.role_slots.max()) + 8)  # rows of one event, twice
            self.state = self.state._replace(log=np.empty(at_once + 2**15, dtype=LOG))
        self._forget()

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        """A copy from another process: the two views of one number were copied apart."""
        self.__dict__.update(attributes)
        self.state = self.state._replace(bits=self.state.number.view(np.int64))

    @property
    def origin(self) -> float:
        """When what `collect` reports next began, s."""
        return float(self.state.scalars["origin"][0])

    def advance(self, until: float) -> None:
        """Run to time `until`."""
        while True:
            status = advance(self.tables, self.state, self.rng, until, self.events_left)
            if status == REACHED:
                return
            if status == NO_ARRIVALS:
                times, classes = next(self.arrivals)
                self.state = self.state._replace(arrival_times=times, arrival_classes=classes)
                self.state.scalars["arrival"] = 0
                continue
            time = float(self.state.scalars["next_time"][0])
            if status == EXHAUSTED:
                raise EventLimitExceeded(
                    f"The replication reached max_events at time {time:.6g} s, before {until:.6g} s. "
                    "Raise max_events or shorten the horizon."
                )
            self._check_waiting(time)
            self.state = _make_room(self.state, 0, 0, self.max_waiting)

    def logged(self) -> AnyArray:
        """The rows of the log (`fluidopt.simulation.state.LOG`), from time 0 on; needs ``log=True``."""
        assert self.state.log is not None
        return self.state.log[: int(self.state.scalars["logged"][0])]

    def visit(self, times: FloatArray) -> list[Start]:
        """Run to each of the increasing `times`; returns the states."""
        states = []
        for time in times:
            self.advance(time)
            states.append(self.counts())
        return states

    def _check_waiting(self, time: float) -> None:
        count = self.system.classes
        queued, buffered = _by_stage(self.state.waiting["count"], count)
        if int(queued.sum() + buffered.sum()) <= self.max_waiting:
            return
        i = int(np.argmax(queued + buffered))
        raise WaitingLimitExceeded(
            f"More than max_waiting={self.max_waiting} requests were waiting at time {time:.6g} s, of class {i} "
            f"{queued[i]} for prefill and {buffered[i]} for decode (abandonment_rate {self.system.abandonment_rate[i]}"
            "). The fleet cannot keep up and its queues grow: add GPUs, give the class an abandonment_rate, or raise "
            "max_waiting."
        )

    def counts(self) -> Start:
        """The present state."""
        shape = (self.system.roles, self.system.classes)
        prefill_queue, decode_queue = _by_stage(self.state.waiting["count"], self.system.classes)
        return Start(
            prefill_queue=prefill_queue,
            decode_queue=decode_queue,
            prefill=self.state.service["prefill"].reshape(shape),
            decode=self.state.service["decode"].reshape(shape),
        )

    def most(self) -> tuple[IntArray, IntArray]:
        """Most decodes, and most decodes plus prefill, ever on one GPU of each role, (R,)."""
        roles = self.state.roles
        return roles["most_decodes"].astype(np.int64), roles["most_requests"].astype(np.int64)

    def collect(self, now: float) -> Totals:
        """What was seen since the last call, or since time 0, up to time `now`, to which the run was advanced."""
        system, state = self.system, self.state
        window = now - self.origin
        shape = (system.roles, system.classes)
        service = state.service
        abandoned_prefill, abandoned_decode = _by_stage(state.waiting["abandoned"], system.classes)
        queue_time = _by_stage(state.waiting["count"] * window - state.waiting["moment"], system.classes)
        prefill_time = (service["prefill"] * window - service["prefill_moment"]).reshape(shape)
        decode_time = (service["decode"] * window - service["decode_moment"]).reshape(shape)
        rest_speed, gain = self.rest_speed, self.gain
        mixed_earning = state.roles["mixed_earning"] * window - state.roles["mixed_earning_moment"]
        mixed_decodes = state.roles["mixed_decodes"] * window - state.roles["mixed_decodes_moment"]
        expected = (
            np.sum(prefill_time * self.prefill_worth)
            + rest_speed @ (decode_time @ self.decode_worth)
            + (gain @ mixed_earning) * self.quantum
        )
        counters = {name: state.tallies[name].copy() for name in COUNTERS.split()}
        starts = {name: service[name].reshape(shape).copy() for name in STARTS.split()}
        reward = counters["prefill_completions"] @ system.prefill_reward
        reward += counters["decode_completions"] @ system.decode_reward
        totals = Totals(
            window=np.array(window),
            **counters,
            **starts,
            abandoned_prefill=abandoned_prefill,
            abandoned_decode=abandoned_decode,
            prefill_queue_time=queue_time[0],
            decode_queue_time=queue_time[1],
            prefill_time=prefill_time,
            decode_time=decode_time,
            expected_tokens=np.array(rest_speed @ decode_time.sum(axis=1) + gain @ mixed_decodes),
            reward=np.array(reward),
            expected_reward=np.array(expected),
            events=state.scalars["events"].sum(),
            null_draws=state.scalars["null_draws"].sum(),
            waits=state.waits.reshape(2, *shape, BINS).copy() if state.waits.size else None,
        )
        self._forget()
        state.scalars["origin"] = now
        return totals

    def _forget(self) -> None:
        state = self.state
        for table, names in _FORGOTTEN.items():
            for name in names:
                getattr(state, table)[name] = 0
        state.waits[:] = 0
        self.events_left -= int(state.scalars["events"][0])
        state.scalars["events"] = state.scalars["null_draws"] = 0


def simulate(
    system: System,
    start: Start,
    *,
    horizon: float,
    warmup: float,
    rng: np.random.Generator,
    max_events: int = 10**11,
    arrivals: Arrivals | None = None,
    waits: bool = False,
    max_waiting: int = WAITING_LIMIT,
    samples: int = 0,
) -> Replication:
    """Simulate one replication of the fleet from time 0 to `horizon` and report what happened in [warmup, horizon].

    The start is settled by the policy's rules at time 0 (waiting requests take free slots), which is no event. The
    same rng state gives the same path, whatever `warmup` and `samples`. About 0.1 us per event; the GIL is released.

    Args:
        system: the chain.
        start: the state at time 0; `Start.empty(system)` is the empty fleet.
        horizon: simulated time, s.
        warmup: where the measurement window opens, s, in [0, horizon).
        rng: source of randomness; each call with the same generator spawns new streams of it.
        arrivals: the requests, by default Poisson at the system's rates.
        waits: count waits by their length.
        samples: report the state at this many equally spaced times, 0 and horizon included.
        max_events: stop with an error after this many events.
        max_waiting: stop with an error when more requests than this wait at once.

    Raises:
        ValueError: an argument is out of range, or the start does not fit the system's caps.
        WaitingLimitExceeded: the queues outgrew `max_waiting`; without abandonment, the fleet is overloaded.
        EventLimitExceeded: `max_events` was reached before `horizon`.
    """
    if not (np.isfinite(horizon) and horizon > 0):
        raise reject("horizon", "simulate", "finite and > 0", horizon)
    if not 0 <= warmup < horizon:
        raise reject("warmup", "simulate", f"in [0, horizon={horizon})", warmup)
    if not isinstance(rng, np.random.Generator):
        raise reject("rng", "simulate", "a numpy Generator, for instance numpy.random.default_rng(seed)", rng)
    if max_events < 1:
        raise reject("max_events", "simulate", ">= 1", max_events)
    if not 1 <= max_waiting <= 2**30:
        raise reject("max_waiting", "simulate", "between 1 and 2**30", max_waiting)
    if samples < 0 or samples == 1:
        raise reject("samples", "simulate", "0, or at least 2", samples)
    if start.prefill.shape != (system.roles, system.classes):
        rule = f"of shape (roles, classes) = {(system.roles, system.classes)}"
        raise reject("start.prefill", "simulate", rule, start.prefill.shape)

    run = Run(
        system, start, rng, arrivals=arrivals, waits=waits, max_events=int(max_events), max_waiting=int(max_waiting)
    )
    times = np.linspace(0.0, horizon, samples)
    seen = run.visit(times[times < warmup])
    run.advance(warmup)
    run.collect(warmup)
    at_start = run.counts()
    seen += run.visit(times[times >= warmup])
    run.advance(horizon)
    at_end = run.counts()
    most_decodes, most_requests = run.most()
    return Replication(
        **vars(run.collect(horizon)),
        at_start=at_start,
        at_end=at_end,
        most_decodes=most_decodes,
        most_requests=most_requests,
        trajectory=Trajectory.of(times, seen) if samples else None,
    )
