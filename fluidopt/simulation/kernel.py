"""The compiled events of the fleet's continuous-time Markov chain.

The chain is the n-GPU system of [L26], sections 2 and 4.1, with any number of roles in place of the mixed and the
solo group. Nothing here depends on the policy, on the number of classes I or on the number of GPUs n except
through data, so one compilation serves every system. All policies are special cases of these rules:

- Waiting requests stand in FCFS *lines*: before the prefill one per class, or one for all (FCFS admission); before the
  decode one per *side*, a group of roles with a buffer of its own, and one more for each of its classes with a weight.
- When the gate may start a prefill it takes the head of the line with the least key. The lines are the leaves of a
  tournament, in order of their hold; as a class is admitted while its hold is below the free decode slots less the
  waiting decodes, those admitted are the first leaves, and their best is found in O(log I) without any update when the
  backlog changes.
- A finished prefill stays on its GPU, or draws a side and goes to the first of its roles with a free slot, or waits.
- A freed decode slot picks a line of its side, by weight (composition-rejection again, hence independent of I), and if
  only classes without weight wait, the side's common line.
- What got free is offered first to the decodes and then to the gate, or the other way round.

How one event is drawn. Arrivals come from outside, as arrays of times and classes, so that policies can be compared on
the same ones and any arrival process will do. Between them the chain is drawn event by event (composition-rejection,
after Slepoy, Thompson and Plimpton, J. Chem. Phys. 128, 2008); its clock is memoryless, so an arrival only rescales the
time that is left to the pending draw. Every request that can leave its place by itself is a member of one *bucket*:
decodes in service, prefills in service and waiting requests, split further by class so that the largest rates of the
members differ by less than a factor 2. A bucket's weight is its size times the largest of these rates, its *bound*. An
event takes a bucket with probability proportional to its weight (a scan over a handful), a uniform member of it, and
accepts with probability rate/bound. A GPU whose prefill starts or ends changes the speed of its decodes, hence their
acceptance, and moves none of them: that costs O(1). All other updates are O(1) too, but the gate's, which is O(log I)
with an early exit. A weight is computed from its integer size whenever that changes, so no rate drifts.

Invariants between events: a decode waits only if no GPU of its side has a free decode slot; a prefill waits only if no
GPU that may prefill is idle or its class is held back.
"""

from __future__ import annotations

import numpy as np

from fluidopt.simulation.compilation import AnyArray, compiled, compiled_apart, integer
from fluidopt.simulation.lines import join, leave, next_line
from fluidopt.simulation.state import (
    ABANDONS,
    ARRIVES,
    DECODE_ENDS,
    DECODE_STARTS,
    NONE,
    PREFILL_ENDS,
    PREFILL_STARTS,
    State,
    Tables,
    add_member,
    note,
    remove_member,
)
from fluidopt.simulation.system import IntArray
from fluidopt.simulation.waits import time_wait

REACHED, FULL, EXHAUSTED, NO_ARRIVALS = 0, 1, 2, 3  # why advance returned


# GPUs ------------------------------------------------------------------------------------------------------------


@compiled
def _list_gpu(tables: Tables, state: State, g: int) -> None:
    """Bring the lists of free and of idle GPUs up to date after a change of GPU g."""
    gpu = state.gpus[g]
    role = tables.roles[gpu.role]
    load = gpu.decodes + gpu.prefilling
    free = gpu.decodes < role.decode_slots and load < role.slots
    if free != (gpu.free_position >= 0):
        size = state.free_size[gpu.role]
        if free:
            state.free_members[role.first_gpu + size] = g
            gpu.free_position = size
            state.free_size[gpu.role] = size + 1
        else:
            last = state.free_members[role.first_gpu + size - 1]
            state.free_members[role.first_gpu + gpu.free_position] = last
            state.gpus[last].free_position = gpu.free_position
            gpu.free_position = NONE
            state.free_size[gpu.role] = size - 1
    if role.prefills == 0:
        return
    fleet = tables.fleet[0]
    level = integer(NONE)
    if gpu.prefilling == 0 and load < role.slots:
        level = gpu.decodes * fleet.by_level
    old = integer(gpu.idle_level)
    if level == old:
        return
    if old >= 0:
        size = state.idle_size[old] - 1
        base = old * fleet.idle_stride
        last = state.idle_members[base + size]
        state.idle_members[base + gpu.idle_position] = last
        state.gpus[last].idle_position = gpu.idle_position
        state.idle_size[old] = size
        state.scalars[0].idle -= 1
        if size == 0:
            state.idle_words[old >> 6] &= ~(np.uint64(1) << np.uint64(old & 63))
    if level >= 0:
        size = state.idle_size[level]
        state.idle_members[level * fleet.idle_stride + size] = g
        gpu.idle_position = size
        state.idle_size[level] = size + 1
        state.scalars[0].idle += 1
        state.idle_words[level >> 6] |= np.uint64(1) << np.uint64(level & 63)
    gpu.idle_level = level


@compiled
def _start_prefill(tables: Tables, state: State, g: int, i: int, age: float) -> None:
    gpu = state.gpus[g]
    tag = gpu.role * state.tallies.size + i
    gpu.prefilling = 1
    state.scalars[0].slack -= tables.roles[gpu.role].takes
    service = state.service[tag]
    service.prefill += 1
    service.prefill_starts += 1
    service.prefill_moment += age
    state.tallies[i].prefilling += 1
    role = state.roles[gpu.role]
    role.mixed_decodes += gpu.decodes
    role.mixed_decodes_moment += gpu.decodes * age
    role.mixed_earning += gpu.earning
    role.mixed_earning_moment += gpu.earning * age
    role.most_requests = max(role.most_requests, gpu.decodes + 1)
    add_member(state, tables.classes[i].prefill_bucket, g, tag)
    note(state.log, state.scalars, PREFILL_STARTS, tag, g, age)
    _list_gpu(tables, state, g)


@compiled
def _start_decode(tables: Tables, state: State, g: int, i: int, age: float) -> None:
    """The caller lists the GPU again."""
    gpu = state.gpus[g]
    entry = tables.classes[i]
    tag = gpu.role * state.tallies.size + i
    gpu.decodes += 1
    gpu.earning += entry.earning
    service = state.service[tag]
    service.decode += 1
    service.decode_starts += 1
    service.decode_moment += age
    role = state.roles[gpu.role]
    if gpu.prefilling == 1:
        role.mixed_decodes += 1
        role.mixed_decodes_moment += age
        role.mixed_earning += entry.earning
        role.mixed_earning_moment += entry.earning * age
    role.most_decodes = max(role.most_decodes, gpu.decodes)
    role.most_requests = max(role.most_requests, gpu.decodes + gpu.prefilling)
    add_member(state, entry.decode_bucket, g, tag)
    note(state.log, state.scalars, DECODE_STARTS, tag, g, age)


# The policy ------------------------------------------------------------------------------------------------------


@compiled
def _compete(tables: Tables, state: State, i: int) -> None:
    """Replay the matches of class i's line in the tournament after a change of X_i or of Q_p,i."""
    fleet = tables.fleet[0]
    if fleet.fcfs == 1:
        i = integer(0)
    waiting = state.waiting[i].count
    waits = waiting > 0 if fleet.fcfs == 0 else state.lines[i].head >= 0
    nobody = state.tallies.size
    leaf = i if fleet.holds == 0 else integer(tables.classes[i].leaf)
    node = (state.winners.size >> 1) + leaf
    if not waits and state.winners[node] == nobody:
        return
    key, excess, best = np.inf, -np.inf, nobody
    if waits:
        entry = tables.classes[i]
        key = entry.gate_base + entry.gate_slope * state.tallies[i].prefilling
        excess = waiting - entry.gate_queue_target
        best = i
    own = state.entrants[i]
    own.key = key
    own.excess = excess
    state.winners[node] = best
    while node > 1:
        rival = integer(state.winners[node ^ 1])
        node >>= 1
        other = state.entrants[rival]
        # without branches: the outcome of a match is hard to predict
        tied = (other.key == key) & ((other.excess > excess) | ((other.excess == excess) & (rival < best)))
        if (other.key < key) | tied:
            key, excess, best = other.key, other.excess, rival
        if best != i and best == state.winners[node]:
            return
        state.winners[node] = best


@compiled
def _place(tables: Tables, state: State, rng: np.random.Generator) -> int:
    """An idle GPU for a prefill, uniform over the lowest list that is not empty; there must be one."""
    w = 0
    while state.idle_words[w] == 0:
        w += 1
    word = state.idle_words[w]
    level = 64 * w
    if word != 1:
        for shift in (32, 16, 8, 4, 2, 1):  # index of the lowest bit
            if word & ((np.uint64(1) << np.uint64(shift)) - np.uint64(1)) == 0:
                word >>= np.uint64(shift)
                level += shift
    pick = integer(rng.random() * state.idle_size[level])
    return integer(state.idle_members[level * tables.fleet[0].idle_stride + pick])


@compiled_apart
def _best_admitted(winners: AnyArray, entrants: AnyArray, holds: AnyArray, slack: int) -> int:
    """The winner among the classes whose hold is below the slack, which are not all; I if none of them waits."""
    low, high = 0, holds.size  # the leaves below `high` are admitted
    while low < high:
        middle = (low + high) >> 1
        if holds[middle] < slack:
            low = middle + 1
        else:
            high = middle
    best = holds.size
    key, excess = np.inf, -np.inf
    left = winners.size >> 1
    right = left + high
    while left < right:  # [left, right) as a union of subtrees; left stays the first node of its level
        if right & 1:
            right -= 1
            rival = integer(winners[right])
            other = entrants[rival]
            tied = other.key == key and (other.excess > excess or (other.excess == excess and rival < best))
            if other.key < key or tied:
                key, excess, best = other.key, other.excess, rival
        left >>= 1
        right >>= 1
    return best


@compiled
def _best(tables: Tables, state: State) -> int:
    """The line to admit next: the winner among those not held back, I if none waits."""
    best = integer(state.winners[1])
    if tables.fleet[0].holds == 0 or best == state.tallies.size:
        return best
    slack = integer(state.scalars[0].slack)
    if tables.classes[best].gate_hold < slack:
        return best
    return _best_admitted(state.winners, state.entrants, tables.holds, slack)


@compiled
def _gate(tables: Tables, state: State, rng: np.random.Generator, newcomer: int, age: float) -> None:
    """Admit while a GPU is idle and a prefill waits that is not held back.

    A newcomer is the class of an arrival that found nobody waiting and a GPU idle (else -1): it need not queue.
    """
    nobody = state.tallies.size
    scalars = state.scalars[0]
    while scalars.idle > 0:
        i = newcomer
        wait = 0.0
        if newcomer < 0:
            line = _best(tables, state)
            if line == nobody:
                break
            head = state.lines[line].head
            wait = scalars.origin + age - state.pool[head].since
            i = leave(tables, state, head, age)
        newcomer = integer(NONE)
        g = _place(tables, state, rng)
        if tables.fleet[0].timed == 1:
            time_wait(state, wait, state.gpus[g].role * nobody + i)
        _start_prefill(tables, state, g, i, age)
        _compete(tables, state, i)


@compiled
def _route(tables: Tables, state: State, rng: np.random.Generator, s: int) -> int:
    """A GPU for a decode, or -1: uniform over the GPUs with a free slot of the first role of side s that has one."""
    side = tables.sides[s]
    for k in range(side.first_role, side.last_role):
        r = tables.router_order[k]
        size = state.free_size[r]
        if size > 0:
            pick = integer(rng.random() * size)
            return integer(state.free_members[tables.roles[r].first_gpu + pick])
    return integer(NONE)


@compiled
def _waits(state: State, s: int) -> bool:
    """Whether a decode waits on side s."""
    common = state.lines[state.tallies.size + s]
    waits: bool = common.head >= 0 or common.open_lines > 0
    return waits


@compiled
def _seat_next(tables: Tables, state: State, rng: np.random.Generator, s: int, g: int, age: float) -> None:
    """Seat the next waiting decode of side s on GPU g."""
    count = state.tallies.size
    head = state.lines[next_line(tables, state, rng, s)].head
    wait = state.scalars[0].origin + age - state.pool[head].since
    i = leave(tables, state, head, age) - (1 + s) * count
    if tables.fleet[0].timed == 1:
        time_wait(state, wait, (state.roles.size + state.gpus[g].role) * count + i)
    _start_decode(tables, state, g, i, age)


@compiled_apart
def _gate_at_once(tables: Tables, state: State, rng: np.random.Generator, g: int, age: float) -> None:
    """List GPU g, then admit; apart, for where the gate comes before the decodes and where speed does not matter."""
    _list_gpu(tables, state, g)
    _gate(tables, state, rng, integer(NONE), age)


@compiled
def _fill_slots(tables: Tables, state: State, rng: np.random.Generator, g: int, age: float) -> None:
    """Seat waiting decodes on GPU g while it has a free slot, and list it."""
    gpu = state.gpus[g]
    role = tables.roles[gpu.role]
    s = integer(role.side)
    while _waits(state, s) and gpu.decodes < role.decode_slots and gpu.decodes + gpu.prefilling < role.slots:
        _seat_next(tables, state, rng, s, g, age)
    _list_gpu(tables, state, g)


@compiled
def _seat_finished(tables: Tables, state: State, rng: np.random.Generator, g: int, i: int, age: float) -> bool:
    """Find a place for the class-i request whose prefill ended on GPU g; returns whether others can take g's slots."""
    gpu = state.gpus[g]
    role = tables.roles[gpu.role]
    count = state.tallies.size
    s = 0
    if tables.sides.size > 1:
        u = rng.random()
        while s < tables.sides.size - 1 and u >= tables.places[(1 + s) * count + i].cumulative:
            s += 1
    target = g if role.stays == 1 else _route(tables, state, rng, s)
    if target >= 0:
        _start_decode(tables, state, target, i, age)
        _list_gpu(tables, state, target)
    else:
        join(tables, state, (1 + s) * count + i, age)
    fills: bool = gpu.free_position >= 0 and _waits(state, integer(role.side))
    return fills


# Events: each takes the member drawn and a residual uniform on [0, bound), and tells whether it is accepted.


@compiled
def _arrive(tables: Tables, state: State, age: float) -> int:
    """The next arrival; returns its class if it can start at once, else -1."""
    scalars = state.scalars[0]
    i = integer(state.arrival_classes[scalars.arrival])
    scalars.arrival += 1
    state.tallies[i].arrivals += 1
    note(state.log, state.scalars, ARRIVES, i, integer(NONE), age)
    if scalars.idle > 0 and state.winners[1] == state.tallies.size and tables.classes[i].gate_hold < scalars.slack:
        return i
    join(tables, state, i, age)
    _compete(tables, state, i)
    return integer(NONE)


@compiled
def _finish_prefill(
    tables: Tables, state: State, index: int, position: int, residual: float, age: float
) -> tuple[int, int]:
    """Returns the GPU and the class, -1 and -1 if rejected."""
    member = state.members[state.buckets[index].start + position]
    g = integer(member.where)
    tag = integer(member.tag)
    gpu = state.gpus[g]
    i = tag - gpu.role * state.tallies.size
    fixed = tables.roles[gpu.role]
    if residual >= fixed.prefill_speed * tables.classes[i].per_prompt:
        return integer(NONE), integer(NONE)
    remove_member(state, index, position)
    note(state.log, state.scalars, PREFILL_ENDS, tag, g, age)
    gpu.prefilling = 0
    state.scalars[0].slack += fixed.takes - 1
    service = state.service[tag]
    service.prefill -= 1
    service.prefill_moment -= age
    role = state.roles[gpu.role]
    role.mixed_decodes -= gpu.decodes
    role.mixed_decodes_moment -= gpu.decodes * age
    role.mixed_earning -= gpu.earning
    role.mixed_earning_moment -= gpu.earning * age
    tally = state.tallies[i]
    tally.prefill_completions += 1
    tally.prefilling -= 1
    _compete(tables, state, i)
    return g, i


@compiled
def _finish_decode(tables: Tables, state: State, index: int, position: int, residual: float, age: float) -> int:
    """Returns the GPU, -1 if rejected."""
    member = state.members[state.buckets[index].start + position]
    g = integer(member.where)
    tag = integer(member.tag)
    gpu = state.gpus[g]
    i = tag - gpu.role * state.tallies.size
    entry = tables.classes[i]
    role = tables.roles[gpu.role]
    speed = role.rest_speed if gpu.prefilling == 0 else role.mixed_speed
    if residual >= speed * entry.per_output:
        return integer(NONE)
    remove_member(state, index, position)
    note(state.log, state.scalars, DECODE_ENDS, tag, g, age)
    gpu.decodes -= 1
    state.scalars[0].slack += 1
    gpu.earning -= entry.earning
    service = state.service[tag]
    service.decode -= 1
    service.decode_moment -= age
    if gpu.prefilling == 1:
        mixed = state.roles[gpu.role]
        mixed.mixed_decodes -= 1
        mixed.mixed_decodes_moment -= age
        mixed.mixed_earning -= entry.earning
        mixed.mixed_earning_moment -= entry.earning * age
    state.tallies[i].decode_completions += 1
    return g


@compiled
def _abandon(tables: Tables, state: State, index: int, position: int, residual: float, age: float) -> bool:
    member = state.members[state.buckets[index].start + position]
    tag = integer(member.tag)
    count = state.tallies.size
    if residual >= tables.places[tag].abandonment:
        return False
    state.waiting[tag].abandoned += 1
    note(state.log, state.scalars, ABANDONS, tag, integer(member.where), age)
    state.scalars[0].slack += tag >= count
    leave(tables, state, member.where, age)
    if tag < count:
        _compete(tables, state, tag)
    return True


@compiled_apart
def advance(tables: Tables, state: State, rng: np.random.Generator, until: float, max_events: int) -> int:
    """Run to time `until`, or until room, events or arrivals run out.

    The pending draw is kept: where one stops changes nothing. Random numbers come from numba's support of numpy's
    Generator. Measured for an exponential and two uniforms: 4.8 ns; xoshiro256++ written out here, with a logarithm,
    5.0 ns; blocks filled by numpy outside 7 ns.
    """
    fleet = tables.fleet[0]
    scalars = state.scalars[0]
    count = state.weights.size
    events = scalars.events
    nulls = scalars.null_draws
    total = 0.0
    for index in range(count):
        total += state.weights[index]
    drawn = scalars.next_time
    if np.isnan(drawn):
        drawn = rng.standard_exponential() / total
    while True:
        if scalars.arrival >= state.arrival_times.size:
            status = NO_ARRIVALS
            break
        arrival = state.arrival_times[scalars.arrival]
        time = min(arrival, drawn)
        if time >= until:
            status = REACHED
            break
        if scalars.full != 0:
            status = FULL
            break
        if events >= max_events:
            status = EXHAUSTED
            break
        age = time - scalars.origin
        accepted = False
        newcomer = freed = finished = integer(NONE)
        left = 0.0  # of the exponential that the pending draw waits for
        if arrival <= drawn:
            newcomer = _arrive(tables, state, age)
            accepted = True
            left = (drawn - time) * total if total > 0.0 else rng.standard_exponential()
        else:
            u = rng.random() * total
            index = 0
            while index < count and u >= state.weights[index]:
                u -= state.weights[index]
                index += 1
            if index < count:  # else rounding took u past the last weight: a null draw
                bucket = state.buckets[index]
                position = min(integer(u * bucket.per_bound), bucket.size - 1)
                residual = u - position * bucket.bound
                if index < fleet.first_prefill_bucket:
                    freed = _finish_decode(tables, state, index, position, residual, age)
                    accepted = freed >= 0
                elif index < fleet.first_waiting_bucket:
                    freed, finished = _finish_prefill(tables, state, index, position, residual, age)
                    accepted = freed >= 0
                else:
                    accepted = _abandon(tables, state, index, position, residual, age)
            left = rng.standard_exponential()
        if accepted:
            if freed >= 0:
                if fleet.gate_first == 1:
                    _gate_at_once(tables, state, rng, freed, age)
                fills = True
                if finished >= 0:
                    _list_gpu(tables, state, freed)
                    fills = _seat_finished(tables, state, rng, freed, finished, age)
                if fills:
                    _fill_slots(tables, state, rng, freed, age)
            _gate(tables, state, rng, newcomer, age)
            events += 1
            total = 0.0
            for index in range(count):
                total += state.weights[index]
        else:
            nulls += 1
        drawn = time + left / total
    scalars.next_time = drawn
    scalars.events = events
    scalars.null_draws = nulls
    return status


@compiled_apart
def load(
    tables: Tables,
    state: State,
    rng: np.random.Generator,
    prefills: IntArray,
    decodes: IntArray,
    waiting: IntArray,
) -> None:
    """Seat the requests of a start and settle it by the policy's rules.

    Rows (GPU, class) for the requests in service; tags, in the order of the queues, for the waiting ones.
    """
    count = state.tallies.size
    for g in range(state.gpus.size):
        _list_gpu(tables, state, g)
    for k in range(decodes.shape[0]):
        _start_decode(tables, state, decodes[k, 0], decodes[k, 1], 0.0)
        _list_gpu(tables, state, decodes[k, 0])
    for k in range(prefills.shape[0]):
        _start_prefill(tables, state, prefills[k, 0], prefills[k, 1], 0.0)
    state.scalars[0].slack -= decodes.shape[0]
    for tag in waiting:
        state.scalars[0].slack -= tag >= count
        join(tables, state, tag, 0.0)
        if tag < count:
            _compete(tables, state, tag)
    if tables.fleet[0].gate_first == 1:
        _gate_at_once(tables, state, rng, 0, 0.0)
    for s in range(tables.sides.size):
        while _waits(state, s):
            g = _route(tables, state, rng, s)
            if g < 0:
                break
            _seat_next(tables, state, rng, s, g, 0.0)
            _list_gpu(tables, state, g)
    _gate_at_once(tables, state, rng, 0, 0.0)
