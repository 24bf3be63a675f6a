"""What the compiled code of the chain reads, and states as integers: packing them, and finding them in a hash table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from fluidopt.chain.states import Configurations, Layout
from fluidopt.simulation.system import FEWEST_DECODES

AnyArray = npt.NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])

integer = cast(Callable[[Any], int], np.int64)  # what numba makes of an index; to a type checker, an int


def compiled(function: Function) -> Function:
    """Compile without reference counts: nothing compiled here allocates, and counting took 4/5 of the time."""
    options: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "_nrt": False}
    return cast(Function, njit(**options)(function))


class Tables(NamedTuple):
    """The system and its layout, for the compiled code."""

    sizes: AnyArray  # gpus, classes, prefill cap, decode cap, FCFS admission, gate first
    role_of: AnyArray  # (n,)
    role_side: AnyArray  # (R,)
    role_stays: AnyArray  # (R,)
    multipliers: AnyArray
    router_order: AnyArray
    arrival_rate: AnyArray
    abandonment_rate: AnyArray
    gate: AnyArray  # (4, I) base, slope, queue target, hold
    share: AnyArray  # (S, I)
    word: AnyArray  # (1 + S,) where the word of each line begins in a state, prefill first
    counts: AnyArray  # (1 + S,) and where its counts do, at the end of the word
    ordered: AnyArray  # (1 + S, I) whether a class stands in the line's FCFS queue
    weight: AnyArray  # (1 + S, I)
    first: AnyArray  # the rest are Configurations, their rates, and what placement compares
    prefill: AnyArray
    decodes: AnyArray
    room: AnyArray
    idle: AnyArray
    added: AnyArray
    removed: AnyArray
    started: AnyArray
    finished: AnyArray
    prefill_rate: AnyArray
    decode_rate: AnyArray
    load: AnyArray  # (K,) decodes where a prefill goes to the idle GPU with fewest, else 0


def tables(layout: Layout, configurations: Configurations) -> Tables:
    """Collect what the compiled code reads."""
    s, c = layout.system, configurations
    prefill_rate, decode_rate = c.rates(s)
    sizes = [s.gpus, s.classes, layout.prefill_queue_cap, layout.decode_queue_cap, s.gate_fcfs, s.gate_first]
    ordered = np.zeros((1 + s.sides, s.classes), dtype=np.bool_)
    for line, row in zip(layout.lines, ordered, strict=True):
        row[list(line.ordered)] = True
    return Tables(
        sizes=np.array(sizes, dtype=np.int64),
        role_of=np.repeat(np.arange(s.roles), s.role_gpus),
        role_side=s.role_side.copy(),
        role_stays=s.role_stays.copy(),
        multipliers=layout.multipliers,
        router_order=s.router_order.copy(),
        arrival_rate=s.arrival_rate.copy(),
        abandonment_rate=s.abandonment_rate.copy(),
        gate=np.stack([s.gate_base, s.gate_slope, s.gate_queue_target, s.gate_hold]),
        share=s.side_share.copy(),
        word=layout.starts[:, 0].copy(),
        counts=layout.starts[:, 1].copy(),
        ordered=ordered,
        weight=np.concatenate([np.zeros((1, s.classes)), s.side_weight]),
        first=c.first,
        prefill=c.prefill,
        decodes=c.decodes,
        room=c.room,
        idle=c.idle,
        added=c.added,
        removed=c.removed,
        started=c.started,
        finished=c.finished,
        prefill_rate=prefill_rate,
        decode_rate=decode_rate,
        load=c.decodes.sum(axis=1) * (s.placement == FEWEST_DECODES),
    )


class Found(NamedTuple):
    """The states found so far and a hash table over them; a slot of the table is -1 where empty."""

    keys: AnyArray
    slots: AnyArray
    size: AnyArray  # (1,)


@compiled
def unpack(t: Tables, key: int, z: AnyArray) -> None:
    """Write the state behind a key into z; configurations are numbered within all roles."""
    for j in range(z.size):
        value = key // t.multipliers[j]
        key -= value * t.multipliers[j]
        z[j] = value
    for g in range(t.sizes[0]):
        z[g] += t.first[t.role_of[g]]


@compiled
def pack(t: Tables, z: AnyArray) -> int:
    """Sort the GPUs of each role and return the key."""
    gpus = t.sizes[0]
    for g in range(1, gpus):
        value = z[g]
        h = g - 1
        while h >= 0 and t.role_of[h] == t.role_of[g] and z[h] > value:
            z[h + 1] = z[h]
            h -= 1
        z[h + 1] = value
    key = np.int64(0)
    for j in range(z.size):
        value = z[j]
        if j < gpus:
            value -= t.first[t.role_of[j]]
        key += value * t.multipliers[j]
    return integer(key)


@compiled
def _slot(key: int, size: int) -> int:
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    return integer(mixed & np.uint64(size - 1))


@compiled
def find(found: Found, key: int, insert: bool) -> int:
    """Number of the state with this key; a new one if `insert`, else -1."""
    size = found.slots.size
    at = _slot(key, size)
    while True:
        number = found.slots[at]
        if number < 0:
            if not insert:
                return -1
            number = found.size[0]
            found.keys[number] = key
            found.slots[at] = number
            found.size[0] = number + 1
            return integer(number)
        if found.keys[number] == key:
            return integer(number)
        at = (at + 1) & (size - 1)


@compiled
def rehash(found: Found) -> None:
    """Enter every known state into an empty table."""
    size = found.slots.size
    for number in range(found.size[0]):
        at = _slot(found.keys[number], size)
        while found.slots[at] >= 0:
            at = (at + 1) & (size - 1)
        found.slots[at] = number


def table_size(entries: int) -> int:
    """Slots of a hash table, a power of 2, that so many entries fill to less than a half."""
    return 1 << (2 * entries + 2).bit_length()
