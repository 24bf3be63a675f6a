"""The compiled state of the fleet's chain: its record types, and the changes that every event is made of.

Tables do not change during a replication, State does. Both are tuples of record arrays, so that one event touches few
cache lines, a new policy is new columns, and no shape or policy needs a new compilation.

A request in service is nothing but a bucket entry (GPU, role and class): nobody points at it, and removing it moves the
bucket's last entry into its place. A waiting request has a record in a pool besides, linked into its FCFS queue,
because it can leave from the middle. A GPU is one record of 32 bytes. Time integrals of counts are kept as moments:
with jumps d_j at ages t_j in a window of length T, int N dt = N(T) T - sum d_j t_j, so that a jump costs one addition.

What happened can be recorded: with a `State.log`, every arrival, completion, abandonment and start, and every place
taken or left in a queue, is a row of it. Without one nothing of that is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

from fluidopt.simulation.compilation import AnyArray, compiled, record

NONE = -1
MARGIN = 8  # more entries than one event can add to a bucket (prefills aside: these have room for all) or to the pool

# Tables. Of the fleet: buckets come in the order decodes, prefills, waiting requests; by_level is 1 if idle GPUs are
# listed by their number of decodes, idle_stride the capacity of one such list; holds is 1 if any class can be held
# back, fcfs 1 if all wait in line 0 for a prefill, gate_first 1 if the gate comes before waiting decodes, timed 1 if
# waits are counted by length.
FLEET = record(i8="first_prefill_bucket first_waiting_bucket by_level idle_stride holds fcfs gate_first timed")
# Of a class: 1/P_i, 1/D_i, the gate (leaf is the class's place in the tournament), decode_reward_i/D_i in quanta, its
# buckets.
CLASS = record(
    f8="per_prompt per_output gate_base gate_slope gate_queue_target gate_hold",
    i8="earning",
    i4="prefill_bucket decode_bucket leaf unused",
)
# Of a role: prefill tokens/s, decode iterations/s while no prefill runs and while one does, caps, 1 if a prefill takes
# a decode slot.
ROLE = record(
    f8="prefill_speed rest_speed mixed_speed", i4="first_gpu decode_slots slots prefills takes stays side unused"
)
# Of a side: its roles in router_order, its choices.
SIDE = record(i4="first_role last_role first_choice last_choice")
# Of a tag of a waiting request, (0 before prefill, 1 + side before decode) * I + class: theta_i, its line and bucket
# (-1 if theta_i = 0), and the probability that a decode of the class goes to this side or one before.
PLACE = record(f8="abandonment cumulative", i4="line bucket")

# State. Of a GPU: prefilling is 0 or 1; free_position is its place in its role's list of GPUs with a free decode
# slot, idle_level and idle_position that in the lists of GPUs on which a prefill may start, -1 in none; earning is the
# money per iteration of its decodes, in quanta.
GPU = record(i4="decodes prefilling role free_position idle_level idle_position", i8="earning")
# Of a class: X_i over all roles, and the counters of the window.
COUNTERS = "arrivals prefill_completions decode_completions"
TALLY = record(i8="prefilling " + COUNTERS)
# Of a role: decodes, and earning, summed over its GPUs with a prefill running.
ROLE_TALLY = record(
    i8="mixed_decodes mixed_earning", f8="mixed_decodes_moment mixed_earning_moment", i4="most_decodes most_requests"
)
# Of a role and a class, at index role * I + class: requests in service, and how many started.
STARTS = "prefill_starts decode_starts"
SERVICE = record(i8="prefill decode " + STARTS, f8="prefill_moment decode_moment")
# Of a tag: requests waiting.
WAITING = record(i8="count abandoned", f8="moment")
# A line is a doubly linked list through the pool. Of a line with a weight: its choice (-1 without), its position in it
# while somebody waits, and the common line of its side, which counts those of them that are not empty.
LINE = record(f8="weight", i4="head tail choice position common open_lines")
# A choice holds the lines of a side that are not empty and whose weights differ by less than a factor 2.
CHOICE = record(f8="weight bound", i4="size start")
REQUEST = record(f8="since", i4="previous next position tag")  # time it joined, position in its bucket
BUCKET = record(i8="size start capacity", f8="bound per_bound")
MEMBER = record(i4="where tag")  # in service: GPU, role * I + class; waiting: pool index, tag
ENTRANT = record(f8="key excess")
# A row of the log: what happened, to a class and where: an arrival (class, -1); in service (role * I + class, GPU);
# waiting (tag, record in the pool).
LOG = record(f8="time", i4="what tag where unused")
ARRIVES, PREFILL_ENDS, DECODE_ENDS, ABANDONS, JOINS, LEAVES, PREFILL_STARTS, DECODE_STARTS = range(8)
# origin: time at which the ages of the moments start; next_time: of the pending draw, nan before the first; arrival:
# index of the next arrival; idle: GPUs on which a prefill may start; slack: free decode slots less decodes without one;
# full: 1 when the pool, a bucket or the log is about to run out of room; pool_free: head of the chain of freed records;
# logged: rows in the log.
SCALARS = record(f8="origin next_time", i8="arrival events null_draws idle slack full pool_used pool_free logged")


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


@compiled
def note(log: AnyArray | None, scalars: AnyArray, what: int, tag: int, where: int, age: float) -> None:
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


@compiled
def add_member(state: State, index: int, where: int, tag: int) -> int:
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
def remove_member(state: State, index: int, position: int) -> int:
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
