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

Where the state lives. A request in service is nothing but a bucket entry (GPU, role and class): nobody points at it,
and removing it moves the bucket's last entry into its place. A waiting request has a record in a pool besides, linked
into its FCFS queue, because it can leave from the middle. A GPU is one record of 32 bytes. Time integrals of counts are
kept as moments: with jumps d_j at ages t_j in a window of length T, int N dt = N(T) T - sum d_j t_j, so that a jump
costs one addition.

What happened can be recorded: with a `State.log`, every arrival, completion, abandonment and start, and every place
taken or left in a queue, is a row of it. Without one nothing of that is compiled.

Invariants between events: a decode waits only if no GPU of its side has a free decode slot; a prefill waits only if no
GPU that may prefill is idle or its class is held back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

AnyArray = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
Function = TypeVar("Function", bound=Callable[..., Any])

# ---------------------------------------------------------------------------------------------------------------
# The compiled state. Tables do not change during a replication, State does. Both are tuples of record arrays, so that
# one event touches few cache lines, a new policy is new columns, and no shape or policy needs a new compilation.

NONE = -1
_integer = cast(Callable[[Any], int], np.int64)  # what numba makes of an index; to a type checker, an int
MARGIN = 8  # more entries than one event can add to a bucket (prefills aside: these have room for all) or to the pool
REACHED, FULL, EXHAUSTED, NO_ARRIVALS = 0, 1, 2, 3  # why advance returned

# Waits are counted in bins, 2**FRACTION_BITS of equal width to an octave, the first at FIRST_OCTAVE: bin k of them is
# the float's leading bits, bin 0 what is below. A wait of exactly 0 is not counted: it is a start without a wait.
FRACTION_BITS, FIRST_OCTAVE, OCTAVES = 3, -13, 33
BINS = (OCTAVES << FRACTION_BITS) + 1
_SHIFT = 52 - FRACTION_BITS
_BASE = ((1023 + FIRST_OCTAVE) << FRACTION_BITS) - 1


def _record(**columns: str) -> np.dtype[np.void]:
    """A record type from column names by format, padded as in C."""
    return np.dtype([(name, kind) for kind, names in columns.items() for name in names.split()], align=True)


# Tables. Of the fleet: buckets come in the order decodes, prefills, waiting requests; by_level is 1 if idle GPUs are
# listed by their number of decodes, idle_stride the capacity of one such list; holds is 1 if any class can be held
# back, fcfs 1 if all wait in line 0 for a prefill, gate_first 1 if the gate comes before waiting decodes, timed 1 if
# waits are counted by length.
FLEET = _record(i8="first_prefill_bucket first_waiting_bucket by_level idle_stride holds fcfs gate_first timed")
# Of a class: 1/P_i, 1/D_i, the gate (leaf is the class's place in the tournament), decode_reward_i/D_i in quanta, its
# buckets.
CLASS = _record(
    f8="per_prompt per_output gate_base gate_slope gate_queue_target gate_hold",
    i8="earning",
    i4="prefill_bucket decode_bucket leaf unused",
)
# Of a role: prefill tokens/s, decode iterations/s while no prefill runs and while one does, caps, 1 if a prefill takes
# a decode slot.
ROLE = _record(
    f8="prefill_speed rest_speed mixed_speed", i4="first_gpu decode_slots slots prefills takes stays side unused"
)
# Of a side: its roles in router_order, its choices.
SIDE = _record(i4="first_role last_role first_choice last_choice")
# Of a tag of a waiting request, (0 before prefill, 1 + side before decode) * I + class: theta_i, its line and bucket
# (-1 if theta_i = 0), and the probability that a decode of the class goes to this side or one before.
PLACE = _record(f8="abandonment cumulative", i4="line bucket")

# State. Of a GPU: prefilling is 0 or 1; free_position is its place in its role's list of GPUs with a free decode
# slot, idle_level and idle_position that in the lists of GPUs on which a prefill may start, -1 in none; earning is the
# money per iteration of its decodes, in quanta.
GPU = _record(i4="decodes prefilling role free_position idle_level idle_position", i8="earning")
# Of a class: X_i over all roles, and the counters of the window.
COUNTERS = "arrivals prefill_completions decode_completions"
TALLY = _record(i8="prefilling " + COUNTERS)
# Of a role: decodes, and earning, summed over its GPUs with a prefill running.
ROLE_TALLY = _record(
    i8="mixed_decodes mixed_earning", f8="mixed_decodes_moment mixed_earning_moment", i4="most_decodes most_requests"
)
# Of a role and a class, at index role * I + class: requests in service, and how many started.
STARTS = "prefill_starts decode_starts"
SERVICE = _record(i8="prefill decode " + STARTS, f8="prefill_moment decode_moment")
# Of a tag: requests waiting.
WAITING = _record(i8="count abandoned", f8="moment")
# A line is a doubly linked list through the pool. Of a line with a weight: its choice (-1 without), its position in it
# while somebody waits, and the common line of its side, which counts those of them that are not empty.
LINE = _record(f8="weight", i4="head tail choice position common open_lines")
# A choice holds the lines of a side that are not empty and whose weights differ by less than a factor 2.
CHOICE = _record(f8="weight bound", i4="size start")
REQUEST = _record(f8="since", i4="previous next position tag")  # time it joined, position in its bucket
BUCKET = _record(i8="size start capacity", f8="bound per_bound")
MEMBER = _record(i4="where tag")  # in service: GPU, role * I + class; waiting: pool index, tag
ENTRANT = _record(f8="key excess")
# A row of the log: what happened, to a class and where: an arrival (class, -1); in service (role * I + class, GPU);
# waiting (tag, record in the pool).
LOG = _record(f8="time", i4="what tag where unused")
ARRIVES, PREFILL_ENDS, DECODE_ENDS, ABANDONS, JOINS, LEAVES, PREFILL_STARTS, DECODE_STARTS = range(8)
# origin: time at which the ages of the moments start; next_time: of the pending draw, nan before the first; arrival:
# index of the next arrival; idle: GPUs on which a prefill may start; slack: free decode slots less decodes without one;
# full: 1 when the pool, a bucket or the log is about to run out of room; pool_free: head of the chain of freed records;
# logged: rows in the log.
SCALARS = _record(f8="origin next_time", i8="arrival events null_draws idle slack full pool_used pool_free logged")


class Tables(NamedTuple):
    """What does not change during a replication."""

    fleet: AnyArray  # (1,) FLEET
    classes: AnyArray  # (I,) CLASS
    roles: AnyArray  # (R,) ROLE
    router_order: AnyArray  # (R,) by side
    sides: AnyArray  # (S,) SIDE
    places: AnyArray  # ((1 + S) * I,) PLACE
    holds: AnyArray  # (I,) gate_hold in increasing order


class State(NamedTuple):
    """What does."""

    scalars: AnyArray  # (1,) SCALARS
    arrival_times: AnyArray
    arrival_classes: AnyArray
    gpus: AnyArray  # (n,) GPU
    free_members: AnyArray  # (n,) GPUs with a free decode slot, a segment per role
    free_size: AnyArray  # (R,)
    idle_members: AnyArray  # (levels * stride,) GPUs on which a prefill may start
    idle_size: AnyArray  # (levels,)
    idle_words: AnyArray  # a bit per level: which of these lists are not empty
    tallies: AnyArray  # (I,) TALLY
    roles: AnyArray  # (R,) ROLE_TALLY
    service: AnyArray  # (R * I,) SERVICE
    waiting: AnyArray  # ((1 + S) * I,) WAITING
    lines: AnyArray  # LINE: I before prefill, the common ones of the S sides, those with a weight
    choices: AnyArray  # CHOICE, by side
    choice_members: AnyArray  # lines, a segment per choice
    pool: AnyArray  # REQUEST
    weights: AnyArray  # (buckets,) size * bound
    buckets: AnyArray  # (buckets,) BUCKET
    members: AnyArray  # MEMBER, a segment per bucket
    entrants: AnyArray  # (I + 1,) ENTRANT, the last stands for nobody
    winners: AnyArray  # (2 * leaves,) tournament over the lines that wait for a prefill, root at 1, I is nobody
    waits: AnyArray  # (2 * R * I * BINS,) waits that ended in a start, before prefill and before decode; or empty
    number: AnyArray  # (1,) a float
    bits: AnyArray  # (1,) the same memory, as an integer
    log: AnyArray | None  # LOG, with as much room again as the rows of one event may need


APART = ("advance", "load", "_open_line", "_close_line", "_draw_line", "_best_admitted", "_gate_at_once", "_fill")


def compiled(function: Function) -> Function:
    """Compile without reference counts: nothing compiled here allocates, and atomic counts cost 90 % of the speed.

    Callees are forced inline, since a call would pass some 150 words of array descriptors through memory; not those
    that only some policies need, which would slow the others down by their mere presence.
    """
    inline = function.__name__ not in APART
    options: dict[str, Any] = {
        "cache": True,
        "nogil": True,
        "error_model": "numpy",
        "forceinline": inline,
        "_nrt": False,
    }
    return cast(Function, njit(**options)(function))


@compiled
def _note(log: AnyArray | None, scalars: AnyArray, what: int, tag: int, where: int, age: float) -> None:
    """Write a row of the log, if there is one."""
    if log is not None:
        row = log[scalars[0].logged]
        row.time = scalars[0].origin + age
        row.what = what
        row.tag = tag
        row.where = where
        scalars[0].logged += 1
        if 2 * scalars[0].logged >= log.size:
            scalars[0].full = 1


# Buckets ---------------------------------------------------------------------------------------------------------


@compiled
def _add_member(state: State, index: int, where: int, tag: int) -> int:
    """Returns the position of the new member."""
    bucket = state.buckets[index]
    position: int = bucket.size
    member = state.members[bucket.start + position]
    member.where = where
    member.tag = tag
    bucket.size = position + 1
    state.weights[index] = (position + 1) * bucket.bound
    if position + MARGIN >= bucket.capacity:
        state.scalars[0].full = 1
    return position


@compiled
def _remove_member(state: State, index: int, position: int) -> int:
    """Move the last member to `position`; returns where that member is."""
    bucket = state.buckets[index]
    last = bucket.size - 1
    moved = state.members[bucket.start + last]
    where: int = moved.where
    member = state.members[bucket.start + position]
    member.where = where
    member.tag = moved.tag
    bucket.size = last
    state.weights[index] = last * bucket.bound
    return where


# Queues ----------------------------------------------------------------------------------------------------------


@compiled
def _open_line(lines: AnyArray, choices: AnyArray, members: AnyArray, index: int) -> None:
    """A line with a weight is no longer empty."""
    line = lines[index]
    choice = choices[line.choice]
    members[choice.start + choice.size] = index
    line.position = choice.size
    choice.size += 1
    choice.weight = choice.size * choice.bound
    lines[line.common].open_lines += 1


@compiled
def _close_line(lines: AnyArray, choices: AnyArray, members: AnyArray, index: int) -> None:
    """A line with a weight has become empty."""
    line = lines[index]
    choice = choices[line.choice]
    choice.size -= 1
    last = members[choice.start + choice.size]
    members[choice.start + line.position] = last
    lines[last].position = line.position
    choice.weight = choice.size * choice.bound
    lines[line.common].open_lines -= 1


@compiled
def _draw_line(
    lines: AnyArray, choices: AnyArray, members: AnyArray, rng: np.random.Generator, first: int, last: int
) -> int:
    """One of the lines in choices first to last - 1, of which some are not empty, in proportion to their weights."""
    total = 0.0
    for k in range(first, last):
        total += choices[k].weight
    while True:
        u = rng.random() * total
        k = first
        while k < last - 1 and u >= choices[k].weight:
            u -= choices[k].weight
            k += 1
        choice = choices[k]
        if choice.size > 0:  # else rounding took u past the last weight
            position = min(_integer(u / choice.bound), choice.size - 1)
            index = _integer(members[choice.start + position])
            if u - position * choice.bound < lines[index].weight:
                return index


@compiled
def _next_line(tables: Tables, state: State, rng: np.random.Generator, s: int) -> int:
    """The line of side s, on which a decode waits, whose head gets a free slot."""
    common = state.tallies.size + s
    if state.lines[common].open_lines == 0:
        return _integer(common)
    side = tables.sides[s]
    first, last = _integer(side.first_choice), _integer(side.last_choice)
    return _draw_line(state.lines, state.choices, state.choice_members, rng, first, last)


@compiled
def _join(tables: Tables, state: State, tag: int, age: float) -> None:
    """A request starts to wait at the tail of its line."""
    scalars = state.scalars[0]
    c = scalars.pool_free
    if c >= 0:
        scalars.pool_free = state.pool[c].next
    else:
        c = scalars.pool_used
        scalars.pool_used = c + 1
        if c + MARGIN >= state.pool.size:
            scalars.full = 1
    request = state.pool[c]
    place = tables.places[tag]
    line = state.lines[place.line]
    request.since = scalars.origin + age
    request.tag = tag
    request.next = NONE
    request.previous = line.tail
    if line.tail >= 0:
        state.pool[line.tail].next = c
    else:
        line.head = c
        if line.choice >= 0:
            _open_line(state.lines, state.choices, state.choice_members, _integer(place.line))
    line.tail = c
    waiting = state.waiting[tag]
    waiting.count += 1
    waiting.moment += age
    _note(state.log, state.scalars, JOINS, tag, c, age)
    if place.bucket >= 0:
        request.position = _add_member(state, place.bucket, c, tag)


@compiled
def _leave(tables: Tables, state: State, c: int, age: float) -> int:
    """The request in record c stops waiting, wherever in its line it is; returns its tag."""
    scalars = state.scalars[0]
    request = state.pool[c]
    tag = _integer(request.tag)
    place = tables.places[tag]
    line = state.lines[place.line]
    if request.previous >= 0:
        state.pool[request.previous].next = request.next
    else:
        line.head = request.next
    if request.next >= 0:
        state.pool[request.next].previous = request.previous
    else:
        line.tail = request.previous
    if line.choice >= 0 and line.head < 0:
        _close_line(state.lines, state.choices, state.choice_members, _integer(place.line))
    waiting = state.waiting[tag]
    waiting.count -= 1
    waiting.moment -= age
    _note(state.log, state.scalars, LEAVES, tag, c, age)
    if place.bucket >= 0:
        moved = _remove_member(state, place.bucket, request.position)
        state.pool[moved].position = request.position
    request.next = scalars.pool_free
    scalars.pool_free = c
    return tag


@compiled
def _time_wait(state: State, wait: float, index: int) -> None:
    """Count a wait under `index`, role * I + class before prefill, R * I more before decode."""
    if wait > 0.0:
        state.number[0] = wait
        k = min(max((state.bits[0] >> _SHIFT) - _BASE, 0), BINS - 1)
        state.waits[index * BINS + k] += 1


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
    level = _integer(NONE)
    if gpu.prefilling == 0 and load < role.slots:
        level = gpu.decodes * fleet.by_level
    old = _integer(gpu.idle_level)
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
    _add_member(state, tables.classes[i].prefill_bucket, g, tag)
    _note(state.log, state.scalars, PREFILL_STARTS, tag, g, age)
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
    _add_member(state, entry.decode_bucket, g, tag)
    _note(state.log, state.scalars, DECODE_STARTS, tag, g, age)


# The policy ------------------------------------------------------------------------------------------------------


@compiled
def _compete(tables: Tables, state: State, i: int) -> None:
    """Replay the matches of class i's line in the tournament after a change of X_i or of Q_p,i."""
    fleet = tables.fleet[0]
    if fleet.fcfs == 1:
        i = _integer(0)
    waiting = state.waiting[i].count
    waits = waiting > 0 if fleet.fcfs == 0 else state.lines[i].head >= 0
    nobody = state.tallies.size
    leaf = i if fleet.holds == 0 else _integer(tables.classes[i].leaf)
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
        rival = _integer(state.winners[node ^ 1])
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
    pick = _integer(rng.random() * state.idle_size[level])
    return _integer(state.idle_members[level * tables.fleet[0].idle_stride + pick])


@compiled
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
            rival = _integer(winners[right])
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
    best = _integer(state.winners[1])
    if tables.fleet[0].holds == 0 or best == state.tallies.size:
        return best
    slack = _integer(state.scalars[0].slack)
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
            i = _leave(tables, state, head, age)
        newcomer = _integer(NONE)
        g = _place(tables, state, rng)
        if tables.fleet[0].timed == 1:
            _time_wait(state, wait, state.gpus[g].role * nobody + i)
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
            pick = _integer(rng.random() * size)
            return _integer(state.free_members[tables.roles[r].first_gpu + pick])
    return _integer(NONE)


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
    head = state.lines[_next_line(tables, state, rng, s)].head
    wait = state.scalars[0].origin + age - state.pool[head].since
    i = _leave(tables, state, head, age) - (1 + s) * count
    if tables.fleet[0].timed == 1:
        _time_wait(state, wait, (state.roles.size + state.gpus[g].role) * count + i)
    _start_decode(tables, state, g, i, age)


@compiled
def _gate_at_once(tables: Tables, state: State, rng: np.random.Generator, g: int, age: float) -> None:
    """List GPU g, then admit; apart, for where the gate comes before the decodes and where speed does not matter."""
    _list_gpu(tables, state, g)
    _gate(tables, state, rng, _integer(NONE), age)


@compiled
def _fill_slots(tables: Tables, state: State, rng: np.random.Generator, g: int, age: float) -> None:
    """Seat waiting decodes on GPU g while it has a free slot, and list it."""
    gpu = state.gpus[g]
    role = tables.roles[gpu.role]
    s = _integer(role.side)
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
        _join(tables, state, (1 + s) * count + i, age)
    fills: bool = gpu.free_position >= 0 and _waits(state, _integer(role.side))
    return fills


# Events: each takes the member drawn and a residual uniform on [0, bound), and tells whether it is accepted.


@compiled
def _arrive(tables: Tables, state: State, age: float) -> int:
    """The next arrival; returns its class if it can start at once, else -1."""
    scalars = state.scalars[0]
    i = _integer(state.arrival_classes[scalars.arrival])
    scalars.arrival += 1
    state.tallies[i].arrivals += 1
    _note(state.log, state.scalars, ARRIVES, i, _integer(NONE), age)
    if scalars.idle > 0 and state.winners[1] == state.tallies.size and tables.classes[i].gate_hold < scalars.slack:
        return i
    _join(tables, state, i, age)
    _compete(tables, state, i)
    return _integer(NONE)


@compiled
def _finish_prefill(
    tables: Tables, state: State, index: int, position: int, residual: float, age: float
) -> tuple[int, int]:
    """Returns the GPU and the class, -1 and -1 if rejected."""
    member = state.members[state.buckets[index].start + position]
    g = _integer(member.where)
    tag = _integer(member.tag)
    gpu = state.gpus[g]
    i = tag - gpu.role * state.tallies.size
    fixed = tables.roles[gpu.role]
    if residual >= fixed.prefill_speed * tables.classes[i].per_prompt:
        return _integer(NONE), _integer(NONE)
    _remove_member(state, index, position)
    _note(state.log, state.scalars, PREFILL_ENDS, tag, g, age)
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
    g = _integer(member.where)
    tag = _integer(member.tag)
    gpu = state.gpus[g]
    i = tag - gpu.role * state.tallies.size
    entry = tables.classes[i]
    role = tables.roles[gpu.role]
    speed = role.rest_speed if gpu.prefilling == 0 else role.mixed_speed
    if residual >= speed * entry.per_output:
        return _integer(NONE)
    _remove_member(state, index, position)
    _note(state.log, state.scalars, DECODE_ENDS, tag, g, age)
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
    tag = _integer(member.tag)
    count = state.tallies.size
    if residual >= tables.places[tag].abandonment:
        return False
    state.waiting[tag].abandoned += 1
    _note(state.log, state.scalars, ABANDONS, tag, _integer(member.where), age)
    state.scalars[0].slack += tag >= count
    _leave(tables, state, member.where, age)
    if tag < count:
        _compete(tables, state, tag)
    return True


@compiled
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
        newcomer = freed = finished = _integer(NONE)
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
                position = min(_integer(u * bucket.per_bound), bucket.size - 1)
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


@compiled
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
        _join(tables, state, tag, 0.0)
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
