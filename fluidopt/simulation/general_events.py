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
from fluidopt.simulation.choices import (
    NOBODY,
    best_line,
    line_of,
    link,
    list_gpu,
    next_decode,
    route,
    sift,
    unlink,
)
from fluidopt.simulation.compilation import AnyArray, compiled, compiled_apart, record
from fluidopt.simulation.system import FloatArray, IntArray

REACHED, NO_ARRIVALS, FULL = 0, 1, 2  # why advance returned


CLASS = record(f8="slope base queue_target hold token_reward iteration_reward")
# prefill_speed in tokens/s, the others in iterations/s; takes is 1 where a prefill takes a decode slot
ROLE = record(f8="prefill_speed rest_speed mixed_speed", i4="first_gpu decode_slots slots prefills takes stays side")
# clock: iterations done at time `since`; earning: money per iteration of the decodes; the request in prefill: class,
# end, decode iterations and patience left; positions in the lists of free and of idle GPUs, -1 in none
GPU = record(
    f8="clock since earning prefill_end output patience",
    i4="role decodes prefilling kind free_position idle_level idle_position changed",
)
REQUEST = record(f8="prompt output", i4="previous next tag")
LINE = record(i4="head tail")
COUNTERS = "arrivals prefill_completions decode_completions"
TALLY = record(i8="prefilling " + COUNTERS)
STARTS = "prefill_starts decode_starts"
SERVICE = record(i8="prefill decode " + STARTS, f8="prefill_moment decode_moment")
WAITING = record(i8="count abandoned", f8="moment")
# origin: when the window began; slack: free decode slots less waiting decodes; queued: requests waiting for a prefill
SCALARS = record(
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


# Queues ----------------------------------------------------------------------------------------------------------


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
    request.prompt, request.output, request.tag = prompt, output, tag
    link(state.lines[line_of(fleet, state, tag)], state.pool, c)
    scalars.queued += tag < fleet.classes.size
    state.waiting[tag].count += 1
    state.waiting[tag].moment += now - scalars.origin
    state.deadline[c] = now + patience
    state.deadline_order[scalars.waiting] = c
    scalars.waiting += 1
    sift(state.deadline, state.deadline_order, state.deadline_place, scalars.waiting, scalars.waiting - 1)


@compiled
def _leave(fleet: Fleet, state: State, c: int, now: float) -> int:
    """The request in record c stops waiting; returns its tag. The record can be read until the next one joins."""
    scalars = state.scalars[0]
    request = state.pool[c]
    tag: int = request.tag
    unlink(state.lines[line_of(fleet, state, tag)], state.pool, c)
    scalars.queued -= tag < fleet.classes.size
    state.waiting[tag].count -= 1
    state.waiting[tag].moment -= now - scalars.origin
    scalars.waiting -= 1
    at = state.deadline_place[c]
    if at < scalars.waiting:
        state.deadline_order[at] = state.deadline_order[scalars.waiting]
        sift(state.deadline, state.deadline_order, state.deadline_place, scalars.waiting, at)
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
    sift(state.due, state.due_order, state.due_place, state.due.size, state.due_place[g])


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
def _gate(fleet: Fleet, state: State, rng: np.random.Generator, now: float) -> None:
    """Admit while a GPU is idle and a prefill waits that is not held back."""
    while state.scalars[0].idle > 0:
        line = best_line(fleet, state)
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
def _fill_slots(fleet: Fleet, state: State, rng: np.random.Generator, g: int, now: float) -> None:
    """Seat waiting decodes on GPU g while it has a free slot, and list it."""
    gpu = state.gpus[g]
    role = fleet.roles[gpu.role]
    while gpu.decodes < role.decode_slots and gpu.decodes + gpu.prefilling < role.slots:
        c = next_decode(fleet, state, rng, role.side)
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
    target = g if fleet.roles[state.gpus[g].role].stays == 1 else route(fleet, state, rng, s)
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


@compiled_apart
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
