"""This module owns the compiled simulator of the fleet's continuous-time Markov chain: arrays in, one replication out.

The chain is the n-GPU system of [L26], sections 2 and 4.1, with any number of roles in place of the mixed and the
solo group. Nothing here depends on the policy, on the number of classes I or on the number of GPUs n except
through data, so one compilation serves every system.

How one event is drawn (composition-rejection, after Slepoy, Thompson and Plimpton, J. Chem. Phys. 128, 2008). Every
request that can leave its place by itself is a member of one *bucket*: prefills in service, decodes in service and
waiting requests, split further by class so that the rates of the members differ by less than a factor 2. A bucket's
weight is its size times its largest rate, its *bound*. An event takes a bucket with probability proportional to its weight
(a scan over a handful of weights), a uniform member of it, and accepts with probability rate/bound. A GPU whose
prefill starts or ends changes the speed of its decodes, hence their acceptance, and moves none of them: that costs
O(1). All other updates are O(1) too, but the gate's, which is O(log I) with an early exit. Weights
are recomputed from integers whenever a size changes, so no rate drifts.

Where the state lives. A request in service is nothing but a bucket entry (GPU, role and class): nobody points at it, and
removing it moves the bucket's last entry into its place. A waiting request has a record in a pool besides, linked into its
FCFS queue, because it can leave from the middle. A GPU is one record of 32 bytes. Time integrals of counts are kept as
moments: with jumps d_j at ages t_j in a window of length T, int N dt = N(T) T - sum d_j t_j, one multiply-add per jump.

Invariants between events: a decode waits only if no GPU has a free decode slot; a prefill waits only if no GPU
that may prefill is idle (the gates here never idle).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
AnyArray = npt.NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])

UNIFORM, FEWEST_DECODES = 0, 1
"""Values of `System.placement`: which idle GPU starts a prefill."""

WAITING_LIMIT = 20_000_000
"""Default cap on requests waiting at once; a waiting request takes 24 bytes, so the default is 0.5 GB."""


class WaitingLimitExceeded(RuntimeError):
    """More requests were waiting at once than `max_waiting` allows."""


class EventLimitExceeded(RuntimeError):
    """A replication needed more events than `max_events` allows."""


def _reject(parameter: str, caller: str, rule: str, value: object) -> ValueError:
    return ValueError(f"The {parameter!r} parameter of {caller} must be {rule}. Got {value!r} instead.")


# ---------------------------------------------------------------------------------------------------------------
# What goes in and what comes out


@dataclass(frozen=True, eq=False, kw_only=True)
class System:
    """Everything the chain of the n-GPU system needs, as arrays; rates are totals of the fleet, not per GPU.

    I classes, K modes, R roles. A role is a group of GPUs with the same two modes and the same caps. The partition of
    [L26], section 4.1, is the roles mixed (`decode_slots` B-1, `slots` B) and solo (B and B, no prefill mode).

    Attributes:
        arrival_rate: (I,) requests/s.
        prompt_tokens, output_tokens: (I,) mean prompt tokens P_i and mean decode iterations D_i, > 0.
        abandonment_rate: (I,) theta_i, 1/s, in either queue; 0 means infinitely patient.
        mode_chunk: (K,) prefill tokens per iteration, 0 for a mode without prefill.
        mode_time: (K,) iteration time, s; nan for an idle mode, which has no iteration.
        role_gpus: (R,) GPUs of the role.
        role_prefill_mode: (R,) mode while a prefill runs, -1 where the role never prefills.
        role_rest_mode: (R,) mode while none runs: decode only, or idle.
        role_decode_slots: (R,) cap on the decodes of one GPU.
        role_slots: (R,) cap on decodes plus prefill of one GPU.
        gate_slope, gate_base, gate_queue_target: (I,) the gate admits the waiting class with the least
            gate_base + gate_slope X_i, X_i the class's prefills in service; ties by the largest
            Q_p,i - gate_queue_target_i, then by the lowest index. The occupancy gate of [L26], section 4.1, is slope
            1/x_i, base 0 (x_i = 0: slope 0 and a base above every other key); prioritize-and-route is slope 0, base -D_i/P_i.
        router_order: (R,) roles in order of preference for a decode, each once.
        placement: 0 puts a prefill on a uniformly chosen idle GPU, 1 on one with the fewest decodes (uniform among these).
        prefill_reward, decode_reward: (I,) money for a completed prefill and for a completed decode: (0, w_i) if
            charging is bundled, (c_p P_i, c_d D_i) if separate.

    Raises:
        ValueError: naming the field, the rule and the value.
    """

    arrival_rate: FloatArray
    prompt_tokens: FloatArray
    output_tokens: FloatArray
    abandonment_rate: FloatArray
    mode_chunk: FloatArray
    mode_time: FloatArray
    role_gpus: IntArray
    role_prefill_mode: IntArray
    role_rest_mode: IntArray
    role_decode_slots: IntArray
    role_slots: IntArray
    gate_slope: FloatArray
    gate_base: FloatArray
    gate_queue_target: FloatArray
    router_order: IntArray
    placement: int
    prefill_reward: FloatArray
    decode_reward: FloatArray

    def __post_init__(self) -> None:
        sizes = {
            "mode": np.size(self.mode_chunk),
            "role": np.size(self.role_gpus),
            "class": np.size(self.arrival_rate),
        }
        for field in fields(self):
            if field.name == "placement":
                continue
            kind = field.name.partition("_")[0]
            size = sizes["role" if kind == "router" else kind if kind in sizes else "class"]
            integral = kind in ("role", "router")
            array = _checked_array(field.name, getattr(self, field.name), (size,), integral=integral)
            object.__setattr__(self, field.name, array)
        for label, size in sizes.items():
            if size == 0:
                raise ValueError(f"System needs at least one {label}. Got none.")
        if self.placement not in (UNIFORM, FEWEST_DECODES):
            raise _reject("placement", "System", "0 (uniform) or 1 (fewest decodes)", self.placement)
        self._check_rates()
        self._check_roles()

    def _check_rates(self) -> None:
        for name in ("arrival_rate", "abandonment_rate", "mode_chunk"):
            _check_each(name, getattr(self, name), lambda a: a >= 0, ">= 0")
        for name in ("prompt_tokens", "output_tokens"):
            _check_each(name, getattr(self, name), lambda a: a > 0, "> 0")
        _check_each("mode_time", self.mode_time, lambda a: np.isnan(a) | (a > 0), "> 0, or nan for an idle mode")

    def _check_roles(self) -> None:
        modes = self.mode_chunk.size
        iterates = np.isfinite(self.mode_time)
        _check_each("role_gpus", self.role_gpus, lambda a: a >= 0, ">= 0")
        if not 0 < self.role_gpus.sum() < 2**31:
            raise _reject("role_gpus", "System", "between 1 and 2**31 - 1 GPUs in total", self.role_gpus.sum())
        if self.role_gpus.size * self.arrival_rate.size >= 2**30:
            raise ValueError("System allows fewer than 2**30 pairs of a role and a class.")
        _check_each("role_decode_slots", self.role_decode_slots, lambda a: (a >= 0) & (a < 2**31), ">= 0")
        _check_each("role_prefill_mode", self.role_prefill_mode, lambda a: (a >= -1) & (a < modes), "a mode or -1")
        _check_each("role_rest_mode", self.role_rest_mode, lambda a: (a >= 0) & (a < modes), "a mode")
        prefills = self.role_prefill_mode >= 0
        lowest = np.maximum(self.role_decode_slots, prefills)
        _check_each(
            "role_slots",
            self.role_slots,
            lambda a: (a >= lowest) & (a < 2**31),
            "at least role_decode_slots, and at least 1 where the role prefills",
        )
        chosen = self.role_prefill_mode[prefills]
        if not np.all(iterates[chosen] & (self.mode_chunk[chosen] > 0)):
            raise _reject("role_prefill_mode", "System", "a mode with a chunk and an iteration time", chosen)
        if np.any(self.mode_chunk[self.role_rest_mode] > 0):
            raise _reject("role_rest_mode", "System", "a mode without a prefill chunk", self.role_rest_mode)
        if np.any((self.role_decode_slots > 0) & ~iterates[self.role_rest_mode]):
            rule = "a mode with an iteration time where role_decode_slots > 0"
            raise _reject("role_rest_mode", "System", rule, self.role_rest_mode)
        if not np.array_equal(np.sort(self.router_order), np.arange(self.role_gpus.size)):
            raise _reject("router_order", "System", "each role once", self.router_order)

    @property
    def classes(self) -> int:
        """Number of classes I."""
        return self.arrival_rate.size

    @property
    def roles(self) -> int:
        """Number of roles R."""
        return self.role_gpus.size

    @property
    def gpus(self) -> int:
        """Number of GPUs n."""
        return int(self.role_gpus.sum())

    def prefill_rates(self) -> FloatArray:
        """Completion rates mu_p of a prefill, (R, I), 1/s, [L26] eq. (4); 0 where the role never prefills."""
        mode = self.role_prefill_mode
        speed = np.where(mode >= 0, self.mode_chunk[mode] / self.mode_time[mode], 0.0)
        return speed[:, None] / self.prompt_tokens

    def decode_speeds(self) -> FloatArray:
        """Iterations/s of each role, (R, 2): while no prefill runs and while one does; 0 where there is none."""
        rest = np.nan_to_num(1.0 / self.mode_time[self.role_rest_mode])
        mode = self.role_prefill_mode
        return np.stack([rest, np.where(mode >= 0, np.nan_to_num(1.0 / self.mode_time[mode]), 0.0)], axis=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Start:
    """A state of the fleet as counts of requests: (I,) in the two queues, (R, I) in service in each role.

    A replication starts from one, spreading the requests of a role over its GPUs as evenly as the caps allow and mixing
    the classes evenly along the decode buffer; it reports the states its window opened and closed in as the same type.
    """

    prefill_queue: IntArray
    decode_queue: IntArray
    prefill: IntArray
    decode: IntArray

    @classmethod
    def empty(cls, system: System) -> Start:
        """The empty fleet."""
        queue = np.zeros(system.classes, dtype=np.int64)
        service = np.zeros((system.roles, system.classes), dtype=np.int64)
        return cls(prefill_queue=queue, decode_queue=queue, prefill=service, decode=service)

    def __post_init__(self) -> None:
        shape = np.shape(self.prefill)
        if len(shape) != 2:
            raise _reject("prefill", "Start", "an array of shape (roles, classes)", self.prefill)
        for field in fields(self):
            expected = shape[1:] if field.name.endswith("queue") else shape
            counts = _checked_array(field.name, getattr(self, field.name), expected, integral=True, caller="Start")
            _check_each(field.name, counts, lambda a: a >= 0, ">= 0", caller="Start")
            object.__setattr__(self, field.name, counts)


@dataclass(frozen=True, eq=False, kw_only=True)
class Trajectory:
    """The state at equally spaced times: `time` (m,), queues (m, I), requests in service (m, R, I)."""

    time: FloatArray
    prefill_queue: IntArray
    decode_queue: IntArray
    prefill: IntArray
    decode: IntArray


@dataclass(frozen=True, eq=False, kw_only=True)
class Replication:
    """What one replication saw in its window [warmup, horizon].

    Per class and per stage the flows balance exactly, for example
    arrivals = prefill_starts + abandoned_prefill + at_end.prefill_queue - at_start.prefill_queue.

    Attributes:
        window: length of the window, s.
        arrivals, prefill_starts, prefill_completions, decode_starts, decode_completions, abandoned_prefill,
            abandoned_decode: (I,) counts.
        at_start, at_end: the states in which the window opened and closed.
        prefill_queue_time, decode_queue_time: (I,) request-seconds spent waiting.
        prefill_time, decode_time: (R, I) request-seconds spent in service.
        reward: money earned by the completions counted.
        expected_reward: integral of the reward rate given the state (prefills in service at their rate times their
            reward, decodes likewise at the speed of their GPU's present mode). Same mean as `reward`, less variance.
        events: arrivals, completions and abandonments, the transitions of the chain.
        null_draws: draws rejected by the thinning, the overhead of the method.
        most_decodes, most_requests: (R,) most decodes, and most decodes plus prefill, ever on one GPU of the
            role, warm-up included.
        trajectory: the state at `samples` times, None unless asked for.
    """

    window: float
    arrivals: IntArray
    prefill_starts: IntArray
    prefill_completions: IntArray
    decode_starts: IntArray
    decode_completions: IntArray
    abandoned_prefill: IntArray
    abandoned_decode: IntArray
    at_start: Start
    at_end: Start
    prefill_queue_time: FloatArray
    decode_queue_time: FloatArray
    prefill_time: FloatArray
    decode_time: FloatArray
    reward: float
    expected_reward: float
    events: int
    null_draws: int
    most_decodes: IntArray
    most_requests: IntArray
    trajectory: Trajectory | None

    @property
    def prefilling_gpu_time(self) -> FloatArray:
        """GPU-seconds with a prefill running, (R,); a GPU runs at most one, so this is `prefill_time` over classes."""
        return cast(FloatArray, self.prefill_time.sum(axis=1))


def _checked_array(
    name: str, value: object, shape: tuple[int, ...], *, integral: bool, caller: str = "System"
) -> npt.NDArray[Any]:
    array = np.array(value)
    if array.shape != shape:
        raise _reject(name, caller, f"an array of shape {shape}", array.shape)
    if array.dtype.kind not in ("iu" if integral else "iuf"):
        raise _reject(name, caller, "an array of integers" if integral else "an array of numbers", array.dtype.name)
    array = array.astype(np.int64 if integral else np.float64)
    if not integral and name != "mode_time" and not np.all(np.isfinite(array)):
        raise _reject(name, caller, "finite", array)
    array.flags.writeable = False
    return array


def _check_each(
    name: str,
    array: npt.NDArray[Any],
    allowed: Callable[[npt.NDArray[Any]], npt.NDArray[np.bool_]],
    rule: str,
    caller: str = "System",
) -> None:
    good = allowed(array)
    if not np.all(good):
        place = tuple(int(k) for k in np.argwhere(~good)[0])
        place_text = place[0] if len(place) == 1 else place
        raise _reject(f"{name}[{place_text}]", caller, rule, array[place].item())


# ---------------------------------------------------------------------------------------------------------------
# The compiled state. Tables do not change during a replication, State does. Both are tuples of record arrays, so that
# one event touches few cache lines, a new policy is new columns, and no shape or policy needs a new compilation.

_NONE = -1
_MARGIN = 8  # more entries than one event can add to a bucket or to the pool
_REACHED, _FULL, _EXHAUSTED = 0, 1, 2  # why _advance returned


def _record(**columns: str) -> np.dtype[np.void]:
    """A record type from column names by format, padded as in C."""
    return np.dtype([(name, kind) for kind, names in columns.items() for name in names.split()], align=True)


# Tables. Of the fleet: buckets come in the order decodes, prefills, waiting requests; by_level is 1 if idle GPUs are
# listed by their number of decodes, idle_stride the capacity of one such list.
_FLEET = _record(f8="arrival_rate", i8="first_prefill_bucket first_waiting_bucket by_level idle_stride")
# Of a class: 1/P_i, 1/D_i, theta_i, the gate, the alias table of arrivals, decode_reward_i/D_i in quanta, its buckets
# (waiting_bucket is -1 if theta_i = 0).
_CLASS = _record(
    f8="per_prompt per_output abandonment gate_base gate_slope gate_queue_target alias_threshold",
    i8="earning",
    i4="alias prefill_bucket decode_bucket waiting_bucket",
)
# Of a role: prefill tokens/s, decode iterations/s while no prefill runs and while one does, caps.
_ROLE = _record(f8="prefill_speed rest_speed mixed_speed", i4="first_gpu decode_slots slots prefills")

# State. Of a GPU: prefilling is 0 or 1; free_position is its place in its role's list of GPUs with a free decode
# slot, idle_level and idle_position that in the lists of GPUs on which a prefill may start, -1 in none; earning is the
# money per iteration of its decodes, in quanta.
_GPU = _record(i4="decodes prefilling role free_position idle_level idle_position", i8="earning")
# Of a class: X_i over all roles, and the counters of the window.
_COUNTERS = "arrivals prefill_starts prefill_completions decode_starts decode_completions"
_TALLY = _record(i8="prefilling " + _COUNTERS)
# Of a role: earning summed over its GPUs with a prefill running.
_ROLE_TALLY = _record(i8="mixed_earning", f8="mixed_earning_moment", i4="most_decodes most_requests")
# Of a role and a class, at index role * I + class: requests in service.
_SERVICE = _record(i8="prefill decode", f8="prefill_moment decode_moment")
# Of a stage (0 before prefill, 1 before decode) and a class, at index stage * I + class: requests waiting.
_WAITING = _record(i8="count abandoned", f8="moment")
# A queue is a doubly linked list through the pool: queue i < I holds class i before its prefill, queue I is the buffer.
_QUEUE = _record(i4="head tail")
_REQUEST = _record(i4="previous next position tag")  # position in its bucket; tag is stage * I + class
_BUCKET = _record(i8="size start capacity", f8="bound per_bound")
_MEMBER = _record(i4="where tag")  # in service: GPU, role * I + class; waiting: pool index, stage * I + class
_ENTRANT = _record(f8="key excess")
# origin: time at which the ages of the moments start; next_time: of the pending draw, nan before the first; idle: GPUs
# on which a prefill may start; full: 1 when the pool or a bucket is about to run out of room; pool_free: head of the
# chain of freed records.
_SCALARS = _record(f8="origin next_time", i8="events null_draws idle full pool_used pool_free")


class _Tables(NamedTuple):
    fleet: AnyArray  # (1,) _FLEET
    classes: AnyArray  # (I,) _CLASS
    roles: AnyArray  # (R,) _ROLE
    router_order: AnyArray  # (R,)


class _State(NamedTuple):
    scalars: AnyArray  # (1,) _SCALARS
    gpus: AnyArray  # (n,) _GPU
    free_members: AnyArray  # (n,) GPUs with a free decode slot, a segment per role
    free_size: AnyArray  # (R,)
    idle_members: AnyArray  # (levels * stride,) GPUs on which a prefill may start
    idle_size: AnyArray  # (levels,)
    idle_words: AnyArray  # a bit per level: which of these lists are not empty
    tallies: AnyArray  # (I,) _TALLY
    roles: AnyArray  # (R,) _ROLE_TALLY
    service: AnyArray  # (R * I,) _SERVICE
    waiting: AnyArray  # (2 * I,) _WAITING
    queues: AnyArray  # (I + 1,) _QUEUE
    pool: AnyArray  # _REQUEST
    weights: AnyArray  # (buckets,) size * bound
    buckets: AnyArray  # (buckets,) _BUCKET
    members: AnyArray  # _MEMBER, a segment per bucket
    entrants: AnyArray  # (I + 1,) _ENTRANT, the last stands for nobody
    winners: AnyArray  # (2 * leaves,) tournament over the classes that wait for a prefill, root at 1, I is nobody


def _compiled(function: Function) -> Function:
    """Compile without reference counts: nothing compiled here allocates, and atomic counts cost 90 % of the speed.

    Callees are forced inline, since a call would pass some 150 words of array descriptors through memory.
    """
    inline = function.__name__ not in ("_advance", "_load")
    compiler = njit(cache=True, nogil=True, error_model="numpy", forceinline=inline, _nrt=False)
    return cast(Function, compiler(function))


# Buckets ---------------------------------------------------------------------------------------------------------


@_compiled
def _add_member(state: _State, index: int, where: int, tag: int) -> int:
    """Returns the position of the new member."""
    bucket = state.buckets[index]
    position: int = bucket.size
    member = state.members[bucket.start + position]
    member.where = where
    member.tag = tag
    bucket.size = position + 1
    state.weights[index] = (position + 1) * bucket.bound
    if position + _MARGIN >= bucket.capacity:
        state.scalars[0].full = 1
    return position


@_compiled
def _remove_member(state: _State, index: int, position: int) -> int:
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


@_compiled
def _join(tables: _Tables, state: _State, tag: int, age: float) -> None:
    """A request starts to wait at the tail of its queue; tag is stage * I + class."""
    scalars = state.scalars[0]
    count = state.tallies.size
    c = scalars.pool_free
    if c >= 0:
        scalars.pool_free = state.pool[c].next
    else:
        c = scalars.pool_used
        scalars.pool_used = c + 1
        if c + _MARGIN >= state.pool.size:
            scalars.full = 1
    request = state.pool[c]
    queue = state.queues[min(tag, count)]
    request.tag = tag
    request.next = _NONE
    request.previous = queue.tail
    if queue.tail >= 0:
        state.pool[queue.tail].next = c
    else:
        queue.head = c
    queue.tail = c
    waiting = state.waiting[tag]
    waiting.count += 1
    waiting.moment += age
    bucket = tables.classes[tag if tag < count else tag - count].waiting_bucket
    if bucket >= 0:
        request.position = _add_member(state, bucket, c, tag)


@_compiled
def _leave(tables: _Tables, state: _State, c: int, age: float) -> int:
    """The request in record c stops waiting, wherever in its queue it is; returns its tag."""
    scalars = state.scalars[0]
    count = state.tallies.size
    request = state.pool[c]
    tag = np.int64(request.tag)
    queue = state.queues[min(tag, count)]
    if request.previous >= 0:
        state.pool[request.previous].next = request.next
    else:
        queue.head = request.next
    if request.next >= 0:
        state.pool[request.next].previous = request.previous
    else:
        queue.tail = request.previous
    waiting = state.waiting[tag]
    waiting.count -= 1
    waiting.moment -= age
    bucket = tables.classes[tag if tag < count else tag - count].waiting_bucket
    if bucket >= 0:
        moved = _remove_member(state, bucket, request.position)
        state.pool[moved].position = request.position
    request.next = scalars.pool_free
    scalars.pool_free = c
    return tag


# GPUs ------------------------------------------------------------------------------------------------------------


@_compiled
def _list_gpu(tables: _Tables, state: _State, g: int) -> None:
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
            gpu.free_position = _NONE
            state.free_size[gpu.role] = size - 1
    if role.prefills == 0:
        return
    fleet = tables.fleet[0]
    level = np.int64(_NONE)
    if gpu.prefilling == 0 and load < role.slots:
        level = gpu.decodes * fleet.by_level
    old = np.int64(gpu.idle_level)
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


@_compiled
def _start_prefill(tables: _Tables, state: _State, g: int, i: int, age: float) -> None:
    gpu = state.gpus[g]
    tag = gpu.role * state.tallies.size + i
    gpu.prefilling = 1
    service = state.service[tag]
    service.prefill += 1
    service.prefill_moment += age
    tally = state.tallies[i]
    tally.prefill_starts += 1
    tally.prefilling += 1
    role = state.roles[gpu.role]
    role.mixed_earning += gpu.earning
    role.mixed_earning_moment += gpu.earning * age
    role.most_requests = max(role.most_requests, gpu.decodes + 1)
    _add_member(state, tables.classes[i].prefill_bucket, g, tag)
    _list_gpu(tables, state, g)


@_compiled
def _start_decode(tables: _Tables, state: _State, g: int, i: int, age: float) -> None:
    """The caller lists the GPU again."""
    gpu = state.gpus[g]
    entry = tables.classes[i]
    tag = gpu.role * state.tallies.size + i
    gpu.decodes += 1
    gpu.earning += entry.earning
    service = state.service[tag]
    service.decode += 1
    service.decode_moment += age
    state.tallies[i].decode_starts += 1
    role = state.roles[gpu.role]
    if gpu.prefilling == 1:
        role.mixed_earning += entry.earning
        role.mixed_earning_moment += entry.earning * age
    role.most_decodes = max(role.most_decodes, gpu.decodes)
    role.most_requests = max(role.most_requests, gpu.decodes + gpu.prefilling)
    _add_member(state, entry.decode_bucket, g, tag)


# The policy ------------------------------------------------------------------------------------------------------


@_compiled
def _compete(tables: _Tables, state: _State, i: int) -> None:
    """Replay class i's matches in the tournament after a change of X_i or of Q_p,i."""
    waiting = state.waiting[i].count
    nobody = state.tallies.size
    node = (state.winners.size >> 1) + i
    if waiting == 0 and state.winners[node] == nobody:
        return
    key, excess, best = np.inf, -np.inf, nobody
    if waiting > 0:
        entry = tables.classes[i]
        key = entry.gate_base + entry.gate_slope * state.tallies[i].prefilling
        excess = waiting - entry.gate_queue_target
        best = i
    own = state.entrants[i]
    own.key = key
    own.excess = excess
    state.winners[node] = best
    while node > 1:
        rival = np.int64(state.winners[node ^ 1])
        node >>= 1
        other = state.entrants[rival]
        # without branches: the outcome of a match is hard to predict
        tied = (other.key == key) & ((other.excess > excess) | ((other.excess == excess) & (rival < best)))
        if (other.key < key) | tied:
            key, excess, best = other.key, other.excess, rival
        if best != i and best == state.winners[node]:
            return
        state.winners[node] = best


@_compiled
def _place(tables: _Tables, state: _State, rng: np.random.Generator) -> int:
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
    pick = np.int64(rng.random() * state.idle_size[level])
    return np.int64(state.idle_members[level * tables.fleet[0].idle_stride + pick])


@_compiled
def _gate(tables: _Tables, state: _State, rng: np.random.Generator, newcomer: int, age: float) -> None:
    """Admit while a GPU is idle and a prefill waits.

    A newcomer is the class of an arrival that found nobody waiting and a GPU idle (else -1): it need not queue.
    """
    nobody = state.tallies.size
    while state.scalars[0].idle > 0 and (newcomer >= 0 or state.winners[1] != nobody):
        i = newcomer
        if newcomer < 0:
            i = np.int64(state.winners[1])
            _leave(tables, state, state.queues[i].head, age)
        newcomer = np.int64(_NONE)
        _start_prefill(tables, state, _place(tables, state, rng), i, age)
        _compete(tables, state, i)


@_compiled
def _route(tables: _Tables, state: _State, rng: np.random.Generator) -> int:
    """A GPU for a decode, or -1: uniform over the GPUs with a free slot of the first role that has one."""
    for r in tables.router_order:
        size = state.free_size[r]
        if size > 0:
            pick = np.int64(rng.random() * size)
            return np.int64(state.free_members[tables.roles[r].first_gpu + pick])
    return np.int64(_NONE)


@_compiled
def _seat_head(tables: _Tables, state: _State, g: int, age: float) -> None:
    """Seat the head of the decode buffer on GPU g."""
    count = state.tallies.size
    tag = _leave(tables, state, state.queues[count].head, age)
    _start_decode(tables, state, g, tag - count, age)


@_compiled
def _fill_slots(tables: _Tables, state: _State, g: int, age: float) -> None:
    """Seat heads of the decode buffer on GPU g while it has a free slot, and list it."""
    gpu = state.gpus[g]
    role = tables.roles[gpu.role]
    buffer = state.queues[state.tallies.size]
    while buffer.head >= 0 and gpu.decodes < role.decode_slots and gpu.decodes + gpu.prefilling < role.slots:
        _seat_head(tables, state, g, age)
    _list_gpu(tables, state, g)


# Events: each takes the member drawn and a residual uniform on [0, bound), and returns False if it is rejected.


@_compiled
def _arrive(tables: _Tables, state: _State, u: float, age: float) -> int:
    """An arrival, u uniform on [0, 1); returns its class if it can start at once, else -1."""
    scaled = u * state.tallies.size
    i = min(np.int64(scaled), state.tallies.size - 1)
    entry = tables.classes[i]
    if scaled - i >= entry.alias_threshold:
        i = np.int64(entry.alias)
    state.tallies[i].arrivals += 1
    if state.scalars[0].idle > 0 and state.winners[1] == state.tallies.size:
        return i
    _join(tables, state, i, age)
    _compete(tables, state, i)
    return np.int64(_NONE)


@_compiled
def _finish_prefill(
    tables: _Tables,
    state: _State,
    rng: np.random.Generator,
    index: int,
    position: int,
    residual: float,
    age: float,
) -> bool:
    member = state.members[state.buckets[index].start + position]
    g = np.int64(member.where)
    tag = np.int64(member.tag)
    gpu = state.gpus[g]
    count = state.tallies.size
    i = tag - gpu.role * count
    if residual >= tables.roles[gpu.role].prefill_speed * tables.classes[i].per_prompt:
        return False
    _remove_member(state, index, position)
    gpu.prefilling = 0
    service = state.service[tag]
    service.prefill -= 1
    service.prefill_moment -= age
    role = state.roles[gpu.role]
    role.mixed_earning -= gpu.earning
    role.mixed_earning_moment -= gpu.earning * age
    tally = state.tallies[i]
    tally.prefill_completions += 1
    tally.prefilling -= 1
    _compete(tables, state, i)
    _list_gpu(tables, state, g)
    target = _route(tables, state, rng)
    if target >= 0:
        _start_decode(tables, state, target, i, age)
        _list_gpu(tables, state, target)
    else:
        _join(tables, state, count + i, age)
    if gpu.free_position >= 0 and state.queues[count].head >= 0:
        _fill_slots(tables, state, g, age)
    return True


@_compiled
def _finish_decode(tables: _Tables, state: _State, index: int, position: int, residual: float, age: float) -> bool:
    member = state.members[state.buckets[index].start + position]
    g = np.int64(member.where)
    tag = np.int64(member.tag)
    gpu = state.gpus[g]
    i = tag - gpu.role * state.tallies.size
    entry = tables.classes[i]
    role = tables.roles[gpu.role]
    speed = role.rest_speed if gpu.prefilling == 0 else role.mixed_speed
    if residual >= speed * entry.per_output:
        return False
    _remove_member(state, index, position)
    gpu.decodes -= 1
    gpu.earning -= entry.earning
    service = state.service[tag]
    service.decode -= 1
    service.decode_moment -= age
    if gpu.prefilling == 1:
        state.roles[gpu.role].mixed_earning -= entry.earning
        state.roles[gpu.role].mixed_earning_moment -= entry.earning * age
    state.tallies[i].decode_completions += 1
    _fill_slots(tables, state, g, age)
    return True


@_compiled
def _abandon(tables: _Tables, state: _State, index: int, position: int, residual: float, age: float) -> bool:
    member = state.members[state.buckets[index].start + position]
    tag = np.int64(member.tag)
    count = state.tallies.size
    if residual >= tables.classes[tag if tag < count else tag - count].abandonment:
        return False
    state.waiting[tag].abandoned += 1
    _leave(tables, state, member.where, age)
    if tag < count:
        _compete(tables, state, tag)
    return True


@_compiled
def _advance(tables: _Tables, state: _State, rng: np.random.Generator, until: float, max_events: int) -> int:
    """Run to time `until`, or until room or events run out. The pending draw is kept: where one stops changes nothing.

    Random numbers come from numba's support of numpy's Generator. Measured for an exponential and two uniforms: 4.8 ns;
    xoshiro256++ written out here, with a logarithm, 5.0 ns; blocks filled by numpy outside 7 ns.
    """
    fleet = tables.fleet[0]
    scalars = state.scalars[0]
    count = state.weights.size
    status = _REACHED
    time = scalars.next_time
    events = scalars.events
    nulls = scalars.null_draws
    total = fleet.arrival_rate
    for index in range(count):
        total += state.weights[index]
    if np.isnan(time):
        time = rng.standard_exponential() / total
    while time < until:
        if scalars.full != 0:
            status = _FULL
            break
        if events >= max_events:
            status = _EXHAUSTED
            break
        age = time - scalars.origin
        u = rng.random() * total - fleet.arrival_rate
        accepted = False
        newcomer = np.int64(_NONE)
        if u < 0.0:
            newcomer = _arrive(tables, state, 1.0 + u / fleet.arrival_rate, age)
            accepted = True
        else:
            index = 0
            while index < count and u >= state.weights[index]:
                u -= state.weights[index]
                index += 1
            if index < count:  # else rounding took u past the last weight: a null draw
                bucket = state.buckets[index]
                position = min(np.int64(u * bucket.per_bound), bucket.size - 1)
                residual = u - position * bucket.bound
                if index < fleet.first_prefill_bucket:
                    accepted = _finish_decode(tables, state, index, position, residual, age)
                elif index < fleet.first_waiting_bucket:
                    accepted = _finish_prefill(tables, state, rng, index, position, residual, age)
                else:
                    accepted = _abandon(tables, state, index, position, residual, age)
        if accepted:
            _gate(tables, state, rng, newcomer, age)
            events += 1
            total = fleet.arrival_rate
            for index in range(count):
                total += state.weights[index]
        else:
            nulls += 1
        time += rng.standard_exponential() / total
    scalars.next_time = time
    scalars.events = events
    scalars.null_draws = nulls
    return status


@_compiled
def _load(
    tables: _Tables,
    state: _State,
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
    for tag in waiting:
        _join(tables, state, tag, 0.0)
        if tag < count:
            _compete(tables, state, tag)
    while state.queues[count].head >= 0:
        g = _route(tables, state, rng)
        if g < 0:
            break
        _seat_head(tables, state, g, 0.0)
        _list_gpu(tables, state, g)
    _gate(tables, state, rng, np.int64(_NONE), 0.0)


# ---------------------------------------------------------------------------------------------------------------
# Building the compiled state, and running it


def _group(rates: FloatArray) -> tuple[IntArray, FloatArray]:
    """Fewest groups of classes whose positive rates differ by less than a factor 2: group of each class, bounds."""
    group = np.full(rates.size, _NONE, dtype=np.int64)
    bounds: list[float] = []
    for i in np.argsort(-rates, kind="stable"):
        if rates[i] <= 0:
            break
        if not bounds or rates[i] <= bounds[-1] / 2:
            bounds.append(float(rates[i]))
        group[i] = len(bounds) - 1
    return group, np.array(bounds)


def _alias_table(rates: FloatArray) -> tuple[FloatArray, IntArray]:
    """Walker's alias table, built as by Vose (1991): cell i stands for class i below its threshold, else its alias."""
    threshold = np.ones(rates.size)
    alias = np.arange(rates.size)
    if rates.sum() > 0:
        share = rates / rates.sum() * rates.size
        small = list(np.flatnonzero(share < 1))
        large = list(np.flatnonzero(share >= 1))
        while small and large:
            i, j = small.pop(), large[-1]
            threshold[i], alias[i] = share[i], j
            share[j] -= 1 - share[i]
            if share[j] < 1:
                small.append(large.pop())
    return threshold, alias


def _quantum(system: System) -> float:
    """Unit in which the earnings of decodes are kept as integers, so that their sum over the fleet is exact."""
    largest = float(np.max(np.abs(system.decode_reward / system.output_tokens)))
    seats = float(np.dot(system.role_gpus, system.role_decode_slots))
    bits = min(40, 61 - int(np.ceil(np.log2(seats + 2))))
    return largest / 2.0**bits if largest > 0 else 1.0


def _build_tables(system: System) -> tuple[_Tables, FloatArray]:
    """The tables, and the bounds of the buckets."""
    speeds = system.decode_speeds()
    prefills = system.role_prefill_mode >= 0
    present = system.role_gpus > 0
    fastest = speeds[present & (system.role_decode_slots > 0)].max(initial=0.0)
    decode_group, decode_bounds = _group(fastest / system.output_tokens)
    prefill_group, prefill_bounds = _group(system.prefill_rates()[present].max(axis=0))
    waiting_group, waiting_bounds = _group(system.abandonment_rate)

    fleet = np.zeros(1, dtype=_FLEET)
    fleet["arrival_rate"] = system.arrival_rate.sum()
    fleet["first_prefill_bucket"] = first_prefill = decode_bounds.size
    fleet["first_waiting_bucket"] = first_waiting = first_prefill + prefill_bounds.size
    fleet["by_level"] = system.placement == FEWEST_DECODES
    fleet["idle_stride"] = system.role_gpus[prefills].sum()

    classes = np.zeros(system.classes, dtype=_CLASS)
    classes["per_prompt"] = 1.0 / system.prompt_tokens
    classes["per_output"] = 1.0 / system.output_tokens
    classes["abandonment"] = system.abandonment_rate
    classes["earning"] = np.rint(system.decode_reward / system.output_tokens / _quantum(system))
    for name in ("gate_base", "gate_slope", "gate_queue_target"):
        classes[name] = getattr(system, name)
    classes["alias_threshold"], classes["alias"] = _alias_table(system.arrival_rate)
    classes["decode_bucket"] = decode_group
    classes["prefill_bucket"] = first_prefill + prefill_group
    classes["waiting_bucket"] = np.where(waiting_group >= 0, first_waiting + waiting_group, _NONE)

    roles = np.zeros(system.roles, dtype=_ROLE)
    mode = system.role_prefill_mode
    roles["prefill_speed"] = np.where(prefills, system.mode_chunk[mode] / system.mode_time[mode], 0.0)
    roles["rest_speed"], roles["mixed_speed"] = speeds.T
    roles["first_gpu"] = np.cumsum(system.role_gpus) - system.role_gpus
    roles["decode_slots"] = system.role_decode_slots
    roles["slots"] = system.role_slots
    roles["prefills"] = prefills
    bounds = np.concatenate([decode_bounds, prefill_bounds, waiting_bounds])
    return _Tables(fleet, classes, roles, system.router_order.copy()), bounds


def _build_state(system: System, tables: _Tables, bounds: FloatArray) -> _State:
    """The empty fleet, without room for a request."""
    count = system.classes
    gpus = np.zeros(system.gpus, dtype=_GPU)
    gpus["role"] = np.repeat(np.arange(system.roles), system.role_gpus)
    gpus["free_position"] = gpus["idle_position"] = gpus["idle_level"] = _NONE
    buckets = np.zeros(bounds.size, dtype=_BUCKET)
    buckets["bound"] = bounds
    buckets["per_bound"] = 1.0 / bounds
    scalars = np.zeros(1, dtype=_SCALARS)
    scalars["next_time"] = np.nan
    scalars["pool_free"] = _NONE
    levels = int(system.role_decode_slots.max()) + 1 if system.placement == FEWEST_DECODES else 1
    leaves = max(2, 1 << (count - 1).bit_length())
    return _State(
        scalars=scalars,
        gpus=gpus,
        free_members=np.zeros(system.gpus, dtype=np.int32),
        free_size=np.zeros(system.roles, dtype=np.int64),
        idle_members=np.empty(levels * int(tables.fleet["idle_stride"][0]), dtype=np.int32),
        idle_size=np.zeros(levels, dtype=np.int64),
        idle_words=np.zeros((levels + 63) // 64, dtype=np.uint64),
        tallies=np.zeros(count, dtype=_TALLY),
        roles=np.zeros(system.roles, dtype=_ROLE_TALLY),
        service=np.zeros(system.roles * count, dtype=_SERVICE),
        waiting=np.zeros(2 * count, dtype=_WAITING),
        queues=np.full(count + 1, _NONE, dtype=_QUEUE),
        pool=np.empty(0, dtype=_REQUEST),
        weights=np.zeros(bounds.size),
        buckets=buckets,
        members=np.empty(0, dtype=_MEMBER),
        entrants=np.array([(np.inf, -np.inf)] * (count + 1), dtype=_ENTRANT),
        winners=np.full(2 * leaves, count, dtype=np.int32),
    )


def _make_room(state: _State, members: IntArray | int, waiting: int, max_waiting: int) -> _State:
    """Room for so many more members per bucket and records in the pool; what is short of room is at least doubled."""
    old = state.buckets.copy()
    short = old["size"] + members + 2 * _MARGIN > old["capacity"]
    capacity = np.where(short, 2 * old["capacity"] + members + 64, old["capacity"])
    state.buckets["capacity"] = capacity
    state.buckets["start"] = np.cumsum(capacity) - capacity
    entries = np.empty(capacity.sum(), dtype=_MEMBER)
    for before, after in zip(old, state.buckets, strict=True):
        kept = state.members[before["start"] : before["start"] + before["size"]]
        entries[after["start"] : after["start"] + before["size"]] = kept
    pool = state.pool
    if int(state.scalars["pool_used"][0]) + waiting + 2 * _MARGIN > pool.size:
        pool = np.empty(min(2 * pool.size + waiting + 64, max_waiting + 4 * _MARGIN), dtype=_REQUEST)
        pool[: state.pool.size] = state.pool
    state.scalars["full"] = 0
    return state._replace(members=entries, pool=pool)


def _spread(system: System, start: Start) -> tuple[IntArray, IntArray]:
    """Seats for a start: (GPU, class) per prefill and per decode, level over the GPUs of a role as far as caps allow."""
    prefills, decodes = [], []
    first = np.cumsum(system.role_gpus) - system.role_gpus
    labels = np.arange(system.classes)
    for r in range(system.roles):
        count, slots = int(system.role_gpus[r]), int(system.role_slots[r])
        running, seated = int(start.prefill[r].sum()), int(start.decode[r].sum())
        most = count if system.role_prefill_mode[r] >= 0 else 0
        if running > most:
            raise _reject("prefill", "Start", f"at most {most} prefills in service in role {r}", running)
        cap = np.full(count, system.role_decode_slots[r])
        cap[count - running :] = min(int(system.role_decode_slots[r]), slots - 1)
        if seated > cap.sum():
            rule = f"at most {cap.sum()} decodes in service in role {r}, where {running} prefills run"
            raise _reject("decode", "Start", rule, seated)
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


def _interleave(counts: IntArray) -> IntArray:
    """Class of each place in a queue of `counts` requests, the classes evenly mixed."""
    labels = np.repeat(np.arange(counts.size), counts)
    rank = np.arange(labels.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return cast(IntArray, labels[np.argsort((rank + 0.5) / counts[labels], kind="stable")])


class _Run:
    """A replication under way: the compiled state, and stopping it at given times."""

    def __init__(
        self, system: System, start: Start, rng: np.random.Generator, max_events: int, max_waiting: int
    ) -> None:
        self.system, self.rng, self.max_waiting = system, rng, max_waiting
        self.events_left = max_events
        prefills, decodes = _spread(system, start)
        queue = np.repeat(np.arange(system.classes), start.prefill_queue)
        waiting = np.concatenate([queue, system.classes + _interleave(start.decode_queue)])
        if waiting.size > max_waiting:
            rule = f"at least the {waiting.size} requests waiting at the start"
            raise _reject("max_waiting", "simulate", rule, max_waiting)
        self.tables, bounds = _build_tables(system)
        classes = self.tables.classes
        label = waiting % system.classes  # a waiting request may be seated at once: room for it there too
        needed = [
            classes["decode_bucket"][np.concatenate([decodes[:, 1], label])],
            classes["prefill_bucket"][np.concatenate([prefills[:, 1], label])],
            classes["waiting_bucket"][label],
        ]
        used = np.concatenate(needed)
        members = np.bincount(used[used >= 0], minlength=bounds.size)
        empty = _build_state(system, self.tables, bounds)
        self.state = _make_room(empty, members, waiting.size, max_waiting)
        _load(self.tables, self.state, rng, prefills, decodes, waiting)

    def advance(self, until: float) -> None:
        """Run to time `until`."""
        while True:
            status = _advance(self.tables, self.state, self.rng, until, self.events_left)
            if status == _REACHED:
                return
            time = float(self.state.scalars["next_time"][0])
            if status == _EXHAUSTED:
                raise EventLimitExceeded(
                    f"The replication reached max_events at time {time:.6g} s, before {until:.6g} s. "
                    "Raise max_events or shorten the horizon."
                )
            self._check_waiting(time)
            self.state = _make_room(self.state, 0, 0, self.max_waiting)

    def _check_waiting(self, time: float) -> None:
        count = self.system.classes
        queued, buffered = self.state.waiting["count"][:count], self.state.waiting["count"][count:]
        if int(queued.sum() + buffered.sum()) <= self.max_waiting:
            return
        i = int(np.argmax(queued + buffered))
        raise WaitingLimitExceeded(
            f"More than max_waiting={self.max_waiting} requests were waiting at time {time:.6g} s, of class {i} "
            f"{queued[i]} for prefill and {buffered[i]} for decode (abandonment_rate {self.system.abandonment_rate[i]}"
            "). The fleet cannot keep up and its queues grow: add GPUs, give the class an abandonment_rate, or raise "
            "max_waiting."
        )

    def open_window(self, time: float) -> Start:
        """Forget the counters and moments of the past; returns the state."""
        state = self.state
        for table in (state.tallies, state.roles, state.service, state.waiting):
            for name in table.dtype.names:
                if name.endswith("moment") or name in _COUNTERS.split() or name == "abandoned":
                    table[name] = 0
        scalars = state.scalars
        self.events_left -= int(scalars["events"][0])
        scalars["events"] = scalars["null_draws"] = 0
        scalars["origin"] = time
        return self.counts()

    def counts(self) -> Start:
        """The present state."""
        shape = (self.system.roles, self.system.classes)
        prefill_queue, decode_queue = self.state.waiting["count"].reshape(2, -1)
        return Start(
            prefill_queue=prefill_queue,
            decode_queue=decode_queue,
            prefill=self.state.service["prefill"].reshape(shape),
            decode=self.state.service["decode"].reshape(shape),
        )

    def close_window(self, window: float, at_start: Start, trajectory: Trajectory | None) -> Replication:
        """What was seen since the window opened, `window` seconds ago."""
        system, state = self.system, self.state
        shape = (system.roles, system.classes)
        counters = {name: state.tallies[name].copy() for name in _COUNTERS.split()}
        abandoned_prefill, abandoned_decode = state.waiting["abandoned"].reshape(2, -1).copy()
        queue_time = (state.waiting["count"] * window - state.waiting["moment"]).reshape(2, -1)
        service = state.service
        prefill_time = (service["prefill"] * window - service["prefill_moment"]).reshape(shape)
        decode_time = (service["decode"] * window - service["decode_moment"]).reshape(shape)

        rest_speed, mixed_speed = system.decode_speeds().T
        gain = np.where(system.role_prefill_mode >= 0, mixed_speed - rest_speed, 0.0)
        mixed_earning = state.roles["mixed_earning"] * window - state.roles["mixed_earning_moment"]
        earning = decode_time @ (system.decode_reward / system.output_tokens)
        expected = (
            np.sum(prefill_time * system.prefill_rates() * system.prefill_reward)
            + np.dot(rest_speed, earning)
            + np.dot(gain, mixed_earning) * _quantum(system)
        )
        reward = counters["prefill_completions"] @ system.prefill_reward
        reward += counters["decode_completions"] @ system.decode_reward
        return Replication(
            window=window,
            **counters,
            abandoned_prefill=abandoned_prefill,
            abandoned_decode=abandoned_decode,
            at_start=at_start,
            at_end=self.counts(),
            prefill_queue_time=queue_time[0],
            decode_queue_time=queue_time[1],
            prefill_time=prefill_time,
            decode_time=decode_time,
            reward=float(reward),
            expected_reward=float(expected),
            events=int(state.scalars["events"][0]),
            null_draws=int(state.scalars["null_draws"][0]),
            most_decodes=state.roles["most_decodes"].astype(np.int64),
            most_requests=state.roles["most_requests"].astype(np.int64),
            trajectory=trajectory,
        )


def simulate(
    system: System,
    start: Start,
    *,
    horizon: float,
    warmup: float,
    rng: np.random.Generator,
    max_events: int = 10**11,
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
        rng: source of randomness, advanced by the call. A thread needs its own.
        max_events: stop with an error after this many events.
        max_waiting: stop with an error when more requests than this wait at once.
        samples: report the state at this many equally spaced times, 0 and horizon included.

    Raises:
        ValueError: an argument is out of range, or the start does not fit the system's caps.
        WaitingLimitExceeded: the queues outgrew `max_waiting`; without abandonment, the fleet is overloaded.
        EventLimitExceeded: `max_events` was reached before `horizon`.
    """
    if not (np.isfinite(horizon) and horizon > 0):
        raise _reject("horizon", "simulate", "finite and > 0", horizon)
    if not 0 <= warmup < horizon:
        raise _reject("warmup", "simulate", f"in [0, horizon={horizon})", warmup)
    if not isinstance(rng, np.random.Generator):
        raise _reject("rng", "simulate", "a numpy Generator, for instance numpy.random.default_rng(seed)", rng)
    if max_events < 1:
        raise _reject("max_events", "simulate", ">= 1", max_events)
    if not 1 <= max_waiting <= 2**30:
        raise _reject("max_waiting", "simulate", "between 1 and 2**30", max_waiting)
    if samples < 0 or samples == 1:
        raise _reject("samples", "simulate", "0, or at least 2", samples)
    if start.prefill.shape != (system.roles, system.classes):
        rule = f"of shape (roles, classes) = {(system.roles, system.classes)}"
        raise _reject("start.prefill", "simulate", rule, start.prefill.shape)

    run = _Run(system, start, rng, int(max_events), int(max_waiting))
    times = np.linspace(0.0, horizon, samples)
    seen: list[Start] = []
    for time in times[times < warmup]:
        run.advance(time)
        seen.append(run.counts())
    run.advance(warmup)
    at_start = run.open_window(warmup)
    for time in times[times >= warmup]:
        run.advance(time)
        seen.append(run.counts())
    run.advance(horizon)
    trajectory = None
    if samples:
        columns = {field.name: np.stack([getattr(s, field.name) for s in seen]) for field in fields(Start)}
        trajectory = Trajectory(time=times, **columns)
    return run.close_window(horizon - warmup, at_start, trajectory)
