"""The compiled events of the fleet under general laws: requests carry their own lengths and patience.

The rules are those of `fluidopt.simulation.kernel`, from the same `System`, in the same order inside an event; only the
clock differs. There the laws are exponential and an event is drawn from the rates; here each request knows its prompt
tokens, its decode iterations and how long it will wait, none of which the policy sees, and the next event is found:

- All decodes of a GPU advance at its present speed, so each GPU has a clock that counts iterations, and a decode ends
  when the clock reaches its tick. Ticks are kept sorted; a change of speed moves none of them.
- A heap orders the GPUs by their next event, another the waiting requests by the time at which they give up. One event
  costs O(log n + B) for the heap and the ticks, O(I) for the gate and O(roles) for the router.

A request's patience is for its waiting in all: what is left of it when its prefill starts is for the decode queue.
With exponential patience that is the model's memoryless wait in either queue.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fluidopt.simulation.arrivals import Requests
from fluidopt.simulation.kernel import AnyArray, compiled
from fluidopt.simulation.system import FloatArray, IntArray

NOBODY = -1
REACHED, NO_ARRIVALS, FULL = 0, 1, 2  # why advance returned


def _record(**columns: str) -> np.dtype[np.void]:
    return np.dtype([(name, kind) for kind, names in columns.items() for name in names.split()], align=True)


CLASS = _record(f8="slope base queue_target hold token_reward iteration_reward")
# prefill_speed in tokens/s, the others in iterations/s; takes is 1 where a prefill takes a decode slot
ROLE = _record(f8="prefill_speed rest_speed mixed_speed", i4="first_gpu decode_slots slots prefills takes stays side")
# clock: iterations done at time `since`; earning: money per iteration of the decodes; the request in prefill: class,
# end, decode iterations and patience left; positions in the lists of free and of idle GPUs, -1 in none
GPU = _record(
    f8="clock since earning prefill_end output patience",
    i4="role decodes prefilling kind free_position idle_level idle_position changed",
)
REQUEST = _record(f8="prompt output", i4="previous next tag")
LINE = _record(i4="head tail")
COUNTERS = "arrivals prefill_completions decode_completions"
TALLY = _record(i8="prefilling " + COUNTERS)
STARTS = "prefill_starts decode_starts"
SERVICE = _record(i8="prefill decode " + STARTS, f8="prefill_moment decode_moment")
WAITING = _record(i8="count abandoned", f8="moment")
# origin: when the window began; slack: free decode slots less waiting decodes; queued: requests waiting for a prefill
SCALARS = _record(
    f8="origin tokens earned", i8="arrival events idle slack queued waiting changes pool_used pool_free fcfs gate_first"
)


class Fleet(NamedTuple):
    """What does not change."""

    classes: AnyArray  # (I,) CLASS
    roles: AnyArray  # (R,) ROLE
    router_order: IntArray  # (R,) by side
    first_role: IntArray  # (S + 1,)
    cumulative: FloatArray  # (S, I) probability that a decode goes to this side or one before
    weight: FloatArray  # (S, I)


class State(NamedTuple):
    """What does. Heaps are three arrays: keys by item, items in heap order, and the place of each item in it."""

    scalars: AnyArray  # (1,) SCALARS
    gpus: AnyArray  # (n,) GPU
    ticks: FloatArray  # (n, slots) at which the decodes end, the next one last
    kinds: IntArray  # (n, slots) their classes
    due: FloatArray  # (n,) next event of each GPU
    due_order: IntArray
    due_place: IntArray
    changed: IntArray  # (n,) GPUs whose next event must be found anew
    free_members: IntArray  # (n,) GPUs with a free decode slot, a segment per role
    free_size: IntArray  # (R,)
    idle_members: IntArray  # (levels, n) GPUs on which a prefill may start
    idle_size: IntArray  # (levels,)
    tallies: AnyArray  # (I,) TALLY
    service: AnyArray  # (R * I,) SERVICE
    waiting: AnyArray  # ((1 + S) * I,) WAITING, by tag
    most: IntArray  # (R, 2) most decodes, and most requests, on one GPU
    lines: AnyArray  # LINE: I before prefill, S common ones before decode, then one per side and class
    pool: AnyArray  # REQUEST, the waiting ones
    deadline: FloatArray  # when each gives up
    deadline_order: IntArray
    deadline_place: IntArray


@compiled
def _sift(keys: FloatArray, order: IntArray, place: IntArray, size: int, at: int) -> None:
    """Restore the heap after a change of the key of the item at place `at`."""
    item = order[at]
    key = keys[item]
    while at > 0 and keys[order[(at - 1) >> 1]] > key:
        up = (at - 1) >> 1
        order[at] = order[up]
        place[order[at]] = at
        at = up
    while True:
        child = 2 * at + 1
        if child + 1 < size and keys[order[child + 1]] < keys[order[child]]:
            child += 1
        if child >= size or keys[order[child]] >= key:
            break
        order[at] = order[child]
        place[order[at]] = at
        at = child
    order[at] = item
    place[item] = at


# Queues ----------------------------------------------------------------------------------------------------------


@compiled
def _line(fleet: Fleet, state: State, tag: int) -> int:
    """The line in which a request with this tag, (0 before prefill, 1 + side before decode) * I + class, waits."""
    sides: int = fleet.weight.shape[0]
    count: int = fleet.weight.shape[1]
    if tag < count:
        return 0 if state.scalars[0].fcfs == 1 else tag
    s, i = tag // count - 1, tag % count
    if fleet.weight[s, i] > 0.0:
        return count + sides + s * count + i
    return count + s


@compiled
def _join(fleet: Fleet, state: State, tag: int, prompt: float, output: float, patience: float, now: float) -> None:
    scalars = state.scalars[0]
    c = scalars.pool_free
    if c >= 0:
        scalars.pool_free = state.pool[c].next
    else:
        c = scalars.pool_used
        scalars.pool_used = c + 1
    request = state.pool[c]
    line = state.lines[_line(fleet, state, tag)]
    request.prompt, request.output, request.tag = prompt, output, tag
    request.previous, request.next = line.tail, NOBODY
    if line.tail >= 0:
        state.pool[line.tail].next = c
    else:
        line.head = c
    line.tail = c
    scalars.queued += tag < fleet.classes.size
    state.waiting[tag].count += 1
    state.waiting[tag].moment += now - scalars.origin
    state.deadline[c] = now + patience
    state.deadline_order[scalars.waiting] = c
    scalars.waiting += 1
    _sift(state.deadline, state.deadline_order, state.deadline_place, scalars.waiting, scalars.waiting - 1)


@compiled
def _leave(fleet: Fleet, state: State, c: int, now: float) -> int:
    """The request in record c stops waiting; returns its tag. The record can be read until the next one joins."""
    scalars = state.scalars[0]
    request = state.pool[c]
    tag: int = request.tag
    line = state.lines[_line(fleet, state, tag)]
    if request.previous >= 0:
        state.pool[request.previous].next = request.next
    else:
        line.head = request.next
    if request.next >= 0:
        state.pool[request.next].previous = request.previous
    else:
        line.tail = request.previous
    scalars.queued -= tag < fleet.classes.size
    state.waiting[tag].count -= 1
    state.waiting[tag].moment -= now - scalars.origin
    scalars.waiting -= 1
    at = state.deadline_place[c]
    if at < scalars.waiting:
        state.deadline_order[at] = state.deadline_order[scalars.waiting]
        _sift(state.deadline, state.deadline_order, state.deadline_place, scalars.waiting, at)
    request.next = scalars.pool_free
    scalars.pool_free = c
    return tag


# GPUs ------------------------------------------------------------------------------------------------------------


@compiled
def _advance_gpu(fleet: Fleet, state: State, g: int, now: float) -> None:
    """Bring the clock of GPU g to the present."""
    gpu, scalars = state.gpus[g], state.scalars[0]
    role = fleet.roles[gpu.role]
    time = now - gpu.since
    gpu.since = now
    if gpu.prefilling == 1:
        scalars.earned += time * role.prefill_speed * fleet.classes[gpu.kind].token_reward
    if gpu.decodes > 0:
        steps = time * (role.mixed_speed if gpu.prefilling == 1 else role.rest_speed)
        gpu.clock += steps
        scalars.tokens += steps * gpu.decodes
        scalars.earned += steps * gpu.earning
    else:
        gpu.clock = gpu.earning = 0.0  # no rounding is carried on


@compiled
def _touch(fleet: Fleet, state: State, g: int, now: float) -> None:
    """GPU g is about to change: bring its clock to the present, and note that its next event must be found anew."""
    gpu, scalars = state.gpus[g], state.scalars[0]
    if gpu.changed == 0:
        _advance_gpu(fleet, state, g, now)
        gpu.changed = 1
        state.changed[scalars.changes] = g
        scalars.changes += 1


@compiled
def _schedule(fleet: Fleet, state: State, g: int) -> None:
    """Find the next event of GPU g."""
    gpu = state.gpus[g]
    role = fleet.roles[gpu.role]
    due = gpu.prefill_end if gpu.prefilling == 1 else np.inf
    if gpu.decodes > 0:
        left = max(state.ticks[g, gpu.decodes - 1] - gpu.clock, 0.0)
        due = min(due, gpu.since + left / (role.mixed_speed if gpu.prefilling == 1 else role.rest_speed))
    state.due[g] = due
    gpu.changed = 0
    _sift(state.due, state.due_order, state.due_place, state.due.size, state.due_place[g])


@compiled
def list_gpu(fleet: Fleet, state: State, g: int) -> None:
    """Bring the lists of free and of idle GPUs up to date after a change of GPU g."""
    gpu = state.gpus[g]
    role = fleet.roles[gpu.role]
    load = gpu.decodes + gpu.prefilling
    free = gpu.decodes < role.decode_slots and load < role.slots
    if free != (gpu.free_position >= 0):
        members, size = state.free_members, state.free_size[gpu.role]
        if free:
            members[role.first_gpu + size] = g
            gpu.free_position = size
            state.free_size[gpu.role] = size + 1
        else:
            last = members[role.first_gpu + size - 1]
            members[role.first_gpu + gpu.free_position] = last
            state.gpus[last].free_position = gpu.free_position
            gpu.free_position = NOBODY
            state.free_size[gpu.role] = size - 1
    level = NOBODY
    if role.prefills == 1 and gpu.prefilling == 0 and load < role.slots:
        level = gpu.decodes if state.idle_size.size > 1 else 0
    old = gpu.idle_level
    if level == old:
        return
    if old >= 0:
        size = state.idle_size[old] - 1
        last = state.idle_members[old, size]
        state.idle_members[old, gpu.idle_position] = last
        state.gpus[last].idle_position = gpu.idle_position
        state.idle_size[old] = size
    if level >= 0:
        size = state.idle_size[level]
        state.idle_members[level, size] = g
        gpu.idle_position = size
        state.idle_size[level] = size + 1
    state.scalars[0].idle += (level >= 0) - (old >= 0)
    gpu.idle_level = level


@compiled
def _start_prefill(
    fleet: Fleet, state: State, g: int, i: int, prompt: float, output: float, patience: float, now: float
) -> None:
    _touch(fleet, state, g, now)
    gpu = state.gpus[g]
    role = fleet.roles[gpu.role]
    gpu.prefilling = 1
    gpu.kind = i
    gpu.prefill_end = now + prompt / role.prefill_speed
    gpu.output, gpu.patience = output, patience
    state.scalars[0].slack -= role.takes
    state.tallies[i].prefilling += 1
    service = state.service[gpu.role * fleet.classes.size + i]
    service.prefill += 1
    service.prefill_starts += 1
    service.prefill_moment += now - state.scalars[0].origin
    state.most[gpu.role, 1] = max(state.most[gpu.role, 1], gpu.decodes + 1)
    list_gpu(fleet, state, g)


@compiled
def _start_decode(fleet: Fleet, state: State, g: int, i: int, output: float, now: float) -> None:
    """The caller lists the GPU again."""
    _touch(fleet, state, g, now)
    gpu = state.gpus[g]
    tick = gpu.clock + output
    k = gpu.decodes
    while k > 0 and state.ticks[g, k - 1] < tick:
        state.ticks[g, k], state.kinds[g, k] = state.ticks[g, k - 1], state.kinds[g, k - 1]
        k -= 1
    state.ticks[g, k], state.kinds[g, k] = tick, i
    gpu.decodes += 1
    gpu.earning += fleet.classes[i].iteration_reward
    service = state.service[gpu.role * fleet.classes.size + i]
    service.decode += 1
    service.decode_starts += 1
    service.decode_moment += now - state.scalars[0].origin
    most = state.most[gpu.role]
    most[0] = max(most[0], gpu.decodes)
    most[1] = max(most[1], gpu.decodes + gpu.prefilling)


# The policy ------------------------------------------------------------------------------------------------------


@compiled
def _best(fleet: Fleet, state: State) -> int:
    """The line whose head is admitted next, -1 if nobody waits who is not held back."""
    scalars = state.scalars[0]
    if scalars.queued == 0:
        return NOBODY
    if scalars.fcfs == 1:
        return 0
    best, least, most = NOBODY, np.inf, -np.inf
    for i in range(fleet.classes.size):
        entry = fleet.classes[i]
        waiting = state.waiting[i].count
        if waiting > 0 and entry.hold < scalars.slack:
            key = entry.base + entry.slope * state.tallies[i].prefilling
            excess = waiting - entry.queue_target
            if key < least or (key == least and excess > most):
                best, least, most = i, key, excess
    return best


@compiled
def _gate(fleet: Fleet, state: State, rng: np.random.Generator, now: float) -> None:
    """Admit while a GPU is idle and a prefill waits that is not held back."""
    while state.scalars[0].idle > 0:
        line = _best(fleet, state)
        if line < 0:
            break
        level = 0
        while state.idle_size[level] == 0:
            level += 1
        g = state.idle_members[level, np.int64(rng.random() * state.idle_size[level])]
        c = state.lines[line].head
        i = _leave(fleet, state, c, now)
        request = state.pool[c]
        _start_prefill(fleet, state, g, i, request.prompt, request.output, state.deadline[c] - now, now)


@compiled
def _route(fleet: Fleet, state: State, rng: np.random.Generator, s: int) -> int:
    """A GPU for a decode, or -1: uniform over the GPUs with a free slot of the first role of side s that has one."""
    for k in range(fleet.first_role[s], fleet.first_role[s + 1]):
        r = fleet.router_order[k]
        if state.free_size[r] > 0:
            pick = np.int64(rng.random() * state.free_size[r])
            g: int = state.free_members[fleet.roles[r].first_gpu + pick]
            return g
    return NOBODY


@compiled
def _next_decode(fleet: Fleet, state: State, rng: np.random.Generator, s: int) -> int:
    """Who of side s gets a free slot, -1 if nobody waits: by weight, else the first who came."""
    sides, count = fleet.weight.shape
    first = count + sides + s * count
    total = 0.0
    for i in range(count):
        if state.lines[first + i].head >= 0:
            total += fleet.weight[s, i]
    chosen: int = state.lines[count + s].head
    u = rng.random() * total
    for i in range(count):
        if state.lines[first + i].head >= 0:
            chosen = state.lines[first + i].head
            u -= fleet.weight[s, i]
            if u < 0.0:
                break
    return chosen


@compiled
def _fill_slots(fleet: Fleet, state: State, rng: np.random.Generator, g: int, now: float) -> None:
    """Seat waiting decodes on GPU g while it has a free slot, and list it."""
    gpu = state.gpus[g]
    role = fleet.roles[gpu.role]
    while gpu.decodes < role.decode_slots and gpu.decodes + gpu.prefilling < role.slots:
        c = _next_decode(fleet, state, rng, role.side)
        if c < 0:
            break
        i = _leave(fleet, state, c, now) % fleet.classes.size
        _start_decode(fleet, state, g, i, state.pool[c].output, now)
    list_gpu(fleet, state, g)


@compiled
def _seat_finished(
    fleet: Fleet, state: State, rng: np.random.Generator, g: int, i: int, output: float, patience: float, now: float
) -> None:
    """Find a place for the request whose prefill ended on GPU g."""
    s = 0
    sides = fleet.cumulative.shape[0]
    if sides > 1:
        u = rng.random()
        while s < sides - 1 and u >= fleet.cumulative[s, i]:
            s += 1
    target = g if fleet.roles[state.gpus[g].role].stays == 1 else _route(fleet, state, rng, s)
    if target >= 0:
        _start_decode(fleet, state, target, i, output, now)
        list_gpu(fleet, state, target)
    else:
        _join(fleet, state, (1 + s) * fleet.classes.size + i, 0.0, output, patience, now)


# Events ----------------------------------------------------------------------------------------------------------


@compiled
def _finish_prefill(fleet: Fleet, state: State, g: int, now: float) -> int:
    gpu = state.gpus[g]
    i: int = gpu.kind
    gpu.prefilling = 0
    state.scalars[0].slack += fleet.roles[gpu.role].takes - 1  # the decode that it now is takes or lacks a slot
    service = state.service[gpu.role * fleet.classes.size + i]
    service.prefill -= 1
    service.prefill_moment -= now - state.scalars[0].origin
    state.tallies[i].prefilling -= 1
    state.tallies[i].prefill_completions += 1
    return i


@compiled
def _finish_decode(fleet: Fleet, state: State, g: int, now: float) -> None:
    gpu = state.gpus[g]
    gpu.decodes -= 1
    i = state.kinds[g, gpu.decodes]
    gpu.earning -= fleet.classes[i].iteration_reward
    state.scalars[0].slack += 1
    service = state.service[gpu.role * fleet.classes.size + i]
    service.decode -= 1
    service.decode_moment -= now - state.scalars[0].origin
    state.tallies[i].decode_completions += 1


@compiled
def _end_on_gpu(fleet: Fleet, state: State, rng: np.random.Generator, g: int, now: float) -> None:
    """The next event of GPU g: place what it ends, and offer what it frees."""
    _touch(fleet, state, g, now)
    gpu = state.gpus[g]
    finished = NOBODY
    output, patience = gpu.output, gpu.patience
    if gpu.prefilling == 1 and gpu.prefill_end <= now:
        finished = _finish_prefill(fleet, state, g, now)
    else:
        _finish_decode(fleet, state, g, now)
    if state.scalars[0].gate_first == 1:
        list_gpu(fleet, state, g)
        _gate(fleet, state, rng, now)
    if finished >= 0:
        list_gpu(fleet, state, g)
        _seat_finished(fleet, state, rng, g, finished, output, patience, now)
    _fill_slots(fleet, state, rng, g, now)


@compiled
def advance(fleet: Fleet, state: State, requests: Requests, rng: np.random.Generator, until: float) -> int:
    """Run to time `until`, or until arrivals or room for waiting requests run out."""
    scalars = state.scalars[0]
    while True:
        if scalars.arrival >= requests.times.size:
            return NO_ARRIVALS
        arrival, ends = requests.times[scalars.arrival], state.due[state.due_order[0]]
        gives_up = state.deadline[state.deadline_order[0]] if scalars.waiting > 0 else np.inf
        now = min(arrival, ends, gives_up)
        if now >= until:
            return REACHED
        if scalars.waiting + 2 > state.pool.size:
            return FULL
        if arrival <= now:
            k = scalars.arrival
            i = requests.classes[k]
            scalars.arrival = k + 1
            state.tallies[i].arrivals += 1
            _join(fleet, state, i, requests.prompt[k], requests.output[k], requests.patience[k], now)
        elif ends <= now:
            _end_on_gpu(fleet, state, rng, state.due_order[0], now)
        else:
            tag = _leave(fleet, state, state.deadline_order[0], now)
            state.waiting[tag].abandoned += 1
            scalars.slack += tag >= fleet.classes.size
        _gate(fleet, state, rng, now)
        scalars.events += 1
        for k in range(scalars.changes):
            _schedule(fleet, state, state.changed[k])
        scalars.changes = 0


@compiled
def settle(fleet: Fleet, state: State, now: float) -> None:
    """Bring all clocks to the present."""
    for g in range(state.gpus.size):
        _advance_gpu(fleet, state, g, now)
