"""The compiled events of the exact chain: from a state to its successors and their rates.

The rules are those of the simulator (`fluidopt.simulation.kernel`): route the finished request, fill freed slots from
the buffer, then the gate. An event that ends in a draw (which GPU, which class moves up) branches; branches are walked
depth first on an explicit stack. The gate is the only decision: `action` follows the system's gate, admits one given
class, or holds, so that a dynamic program can ask for the successors under each of its decisions.
"""

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

FOLLOW_GATE = -1
"""Action: admit as the system's gate does. An action i >= 0 admits one request of class i; i = I holds."""

_integer = cast(Callable[[Any], int], np.int64)  # what numba makes of an index; to a type checker, an int
DONE, GROW = 0, 1  # why explore returned
_FILL, _GATE = 0, 1  # what is still to do on a branch
ARRIVAL_CUT, DECODE_CUT = 1, 2  # flags of a state in which a cap turns somebody away


def _compiled(function: Function) -> Function:
    return cast(Function, njit(cache=True, nogil=True, error_model="numpy")(function))


class Tables(NamedTuple):
    """The system and its layout, for the compiled code."""

    sizes: AnyArray  # gpus, classes, ordered places, prefill cap, decode cap, by fewest decodes
    role_of: AnyArray  # (n,)
    multipliers: AnyArray
    router_order: AnyArray
    arrival_rate: AnyArray
    abandonment_rate: AnyArray
    gate: AnyArray  # (4, I) base, slope, queue target, hold
    first: AnyArray  # the rest are Configurations and their rates
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


def tables(layout: Layout, configurations: Configurations) -> Tables:
    """Collect what the compiled code reads."""
    s, c = layout.system, configurations
    prefill_rate, decode_rate = c.rates(s)
    sizes = [
        s.gpus,
        s.classes,
        layout.ordered_places,
        layout.prefill_queue_cap,
        layout.decode_queue_cap,
        s.placement == FEWEST_DECODES,
    ]
    return Tables(
        sizes=np.array(sizes, dtype=np.int64),
        role_of=np.repeat(np.arange(s.roles), s.role_gpus),
        multipliers=layout.multipliers,
        router_order=s.router_order.copy(),
        arrival_rate=s.arrival_rate.copy(),
        abandonment_rate=s.abandonment_rate.copy(),
        gate=np.stack([s.gate_base, s.gate_slope, s.gate_queue_target, s.gate_hold]),
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
    )


class Work(NamedTuple):
    """Scratch of one walk: a stack of branches, and the row that is being built."""

    stack: AnyArray  # (depth, width) states
    probability: AnyArray  # (depth,)
    stage: AnyArray  # (depth, 2) what to do, GPU to fill
    columns: AnyArray  # successors of the row
    rates: AnyArray
    used: AnyArray  # (3,) size of the stack, of the row, whether an arrival was turned away


def work(layout: Layout) -> Work:
    """Scratch large enough for any event of the layout."""
    s = layout.system
    width = len(layout.radices())
    branching = max(s.gpus, s.classes) + 1
    levels = int(s.role_slots.max()) + 2 * s.gpus + 8
    depth = branching * levels
    row = 64 + 4 * layout.ordered_places * s.classes + (s.gpus + 1) * (s.classes + 1) * branching**2 * 2
    return Work(
        stack=np.zeros((depth, width), dtype=np.int64),
        probability=np.zeros(depth),
        stage=np.zeros((depth, 2), dtype=np.int64),
        columns=np.zeros(row, dtype=np.int64),
        rates=np.zeros(row),
        used=np.zeros(3, dtype=np.int64),
    )


class Found(NamedTuple):
    """The states found so far and a hash table over them; a slot of the table is -1 where empty."""

    keys: AnyArray
    slots: AnyArray
    size: AnyArray  # (1,)


# Packing and looking up -------------------------------------------------------------------------------------------


@_compiled
def unpack(t: Tables, key: int, z: AnyArray) -> None:
    """Write the state behind a key into z; configurations are numbered within all roles."""
    for j in range(z.size):
        value = key // t.multipliers[j]
        key -= value * t.multipliers[j]
        z[j] = value
    for g in range(t.sizes[0]):
        z[g] += t.first[t.role_of[g]]


@_compiled
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
    return _integer(key)


@_compiled
def _slot(key: int, size: int) -> int:
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    return _integer(mixed & np.uint64(size - 1))


@_compiled
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
            return _integer(number)
        if found.keys[number] == key:
            return _integer(number)
        at = (at + 1) & (size - 1)


@_compiled
def rehash(found: Found) -> None:
    """Enter every known state into an empty table."""
    size = found.slots.size
    for number in range(found.size[0]):
        at = _slot(found.keys[number], size)
        while found.slots[at] >= 0:
            at = (at + 1) & (size - 1)
        found.slots[at] = number


# The rules --------------------------------------------------------------------------------------------------------


@_compiled
def _push(w: Work, z: AnyArray, probability: float, stage: int, g: int) -> AnyArray:
    """A copy of z on the stack; returns it."""
    top = w.used[0]
    w.stack[top, :] = z
    w.probability[top] = probability
    w.stage[top, 0] = stage
    w.stage[top, 1] = g
    w.used[0] = top + 1
    copy: AnyArray = w.stack[top]
    return copy


@_compiled
def _waiting_decodes(t: Tables, z: AnyArray) -> int:
    gpus, classes, places = t.sizes[0], t.sizes[1], t.sizes[2]
    total = 0
    for j in range(gpus + classes, gpus + classes + places):
        total += z[j] > 0
    for j in range(gpus + classes + places, z.size):
        total += z[j]
    return total


@_compiled
def _buffer_join(t: Tables, z: AnyArray, i: int) -> None:
    """Class i joins the end of the buffer: the word if it has a place, else the counts behind it."""
    word, places = t.sizes[0] + t.sizes[1], t.sizes[2]
    for j in range(word, word + places):
        if z[j] == 0:
            z[j] = i + 1
            return
    z[word + places + i] += 1


@_compiled
def _buffer_leave(t: Tables, w: Work, z: AnyArray, place: int, probability: float, stage: int, g: int) -> None:
    """The request at a place of the word is gone: close up, and draw who moves up into the word from the counts."""
    word, places, classes = t.sizes[0] + t.sizes[1], t.sizes[2], t.sizes[1]
    for j in range(word + place, word + places - 1):
        z[j] = z[j + 1]
    z[word + places - 1] = 0
    tail = 0
    for i in range(classes):
        tail += z[word + places + i]
    if tail == 0:
        _push(w, z, probability, stage, g)
        return
    for i in range(classes):
        behind = z[word + places + i]
        if behind > 0:
            y = _push(w, z, probability * behind / tail, stage, g)
            y[word + places + i] -= 1
            y[word + places - 1] = i + 1


@_compiled
def _fill(t: Tables, w: Work, z: AnyArray, probability: float, g: int) -> None:
    """Seat one head of the buffer on GPU g if it has a free slot, else go on to the gate."""
    gpus, classes, places = t.sizes[0], t.sizes[1], t.sizes[2]
    waiting = _waiting_decodes(t, z)
    if waiting == 0 or t.room[z[g]] == 0:
        _push(w, z, probability, _GATE, 0)
    elif places > 0:
        i = z[gpus + classes] - 1
        z[g] = t.added[z[g], i]
        _buffer_leave(t, w, z, 0, probability, _FILL, g)
    else:
        for i in range(classes):
            count = z[gpus + classes + i]
            if count > 0:
                y = _push(w, z, probability * count / waiting, _FILL, g)
                y[gpus + classes + i] -= 1
                y[g] = t.added[y[g], i]


@_compiled
def _chosen(t: Tables, z: AnyArray) -> int:
    """The class that the system's gate admits; -1 if none waits that is not held back."""
    gpus = t.sizes[0]
    slack = -_waiting_decodes(t, z)
    for g in range(gpus):
        slack += t.room[z[g]]
    best = -1
    best_key = best_excess = 0.0
    for i in range(t.sizes[1]):
        if z[gpus + i] > 0 and t.gate[3, i] < slack:
            running = 0
            for g in range(gpus):
                running += t.prefill[z[g]] == i
            key = t.gate[0, i] + t.gate[1, i] * running
            excess = z[gpus + i] - t.gate[2, i]
            if best < 0 or key < best_key or (key == best_key and excess > best_excess):
                best, best_key, best_excess = i, key, excess
    return best


@_compiled
def _admit(
    t: Tables, w: Work, z: AnyArray, probability: float, action: int, rate: float, found: Found, insert: bool
) -> None:
    """The gate: start one prefill and return to the gate, or record the successor."""
    gpus = t.sizes[0]
    i = action
    if action == FOLLOW_GATE:
        i = _chosen(t, z)
    elif action >= t.sizes[1] or z[gpus + action] == 0:
        i = -1
    idle = 0
    fewest = np.int64(1) << np.int64(40)
    if i >= 0:
        for g in range(gpus):
            if t.idle[z[g]]:
                load = np.int64(0)
                if t.sizes[5] == 1:
                    for j in range(t.sizes[1]):
                        load += t.decodes[z[g], j]
                if load < fewest:
                    fewest = load
                    idle = 0
                if load == fewest:
                    idle += 1
    if idle > 0:
        for g in range(gpus):
            if t.idle[z[g]]:
                load = np.int64(0)
                if t.sizes[5] == 1:
                    for j in range(t.sizes[1]):
                        load += t.decodes[z[g], j]
                if load == fewest:
                    # an action admits once: what follows is to hold
                    y = _push(w, z, probability / idle, _GATE, 0 if action == FOLLOW_GATE else 1)
                    y[gpus + i] -= 1
                    y[g] = t.started[y[g], i]
        return
    total = 0
    for j in range(t.sizes[1]):
        total += z[gpus + j]
    if total > t.sizes[3]:  # an arrival that a full queue turns away: nothing happens
        w.used[2] = 1
        return
    number = find(found, pack(t, z), insert)
    used = w.used[1]
    for k in range(used):
        if w.columns[k] == number:
            w.rates[k] += rate * probability
            return
    w.columns[used] = number
    w.rates[used] = rate * probability
    w.used[1] = used + 1


@_compiled
def _walk(t: Tables, w: Work, rate: float, action: int, found: Found, insert: bool, z: AnyArray) -> None:
    """Follow every branch on the stack to its successor; z is scratch."""
    while w.used[0] > 0:
        top = w.used[0] - 1
        w.used[0] = top
        z[:] = w.stack[top]
        probability = w.probability[top]
        if w.stage[top, 0] == _FILL:
            _fill(t, w, z, probability, w.stage[top, 1])
        else:
            now = action if w.stage[top, 1] == 0 else t.sizes[1]
            _admit(t, w, z, probability, now, rate, found, insert)


@_compiled
def _route(t: Tables, w: Work, z: AnyArray, i: int, g: int) -> bool:
    """Class i's prefill on GPU g has ended: seat it or let it wait; False if the buffer is full."""
    gpus = t.sizes[0]
    for r in t.router_order:
        open_gpus = 0
        for h in range(gpus):
            open_gpus += t.role_of[h] == r and t.room[z[h]] > 0
        if open_gpus > 0:
            for h in range(gpus):
                if t.role_of[h] == r and t.room[z[h]] > 0:
                    y = _push(w, z, 1.0 / open_gpus, _FILL, g)
                    y[h] = t.added[y[h], i]
            return True
    if _waiting_decodes(t, z) >= t.sizes[4]:
        _push(w, z, 1.0, _FILL, g)
        return False
    y = _push(w, z, 1.0, _FILL, g)
    _buffer_join(t, y, i)
    return True


@_compiled
def successors(
    t: Tables, w: Work, x: AnyArray, action: int, found: Found, insert: bool, z: AnyArray, y: AnyArray
) -> int:
    """Successors of state x under an action, into w.columns and w.rates; returns the flags of what a cap turned away.

    w.used[1] is the number of successors afterwards; y and z are scratch. A successor not among the states found is
    entered there, or is -1 unless `insert`.
    """
    gpus, classes, places = t.sizes[0], t.sizes[1], t.sizes[2]
    word = gpus + classes
    flags = 0
    w.used[:] = 0
    for i in range(classes):
        if t.arrival_rate[i] > 0:
            y[:] = x
            y[gpus + i] += 1
            _push(w, y, 1.0, _GATE, 0)
            _walk(t, w, t.arrival_rate[i], action, found, insert, z)
        rate = t.abandonment_rate[i]
        if rate > 0 and x[gpus + i] > 0:
            y[:] = x
            y[gpus + i] -= 1
            _push(w, y, 1.0, _GATE, 0)
            _walk(t, w, rate * x[gpus + i], action, found, insert, z)
        if rate > 0 and x[word + places + i] > 0:
            y[:] = x
            y[word + places + i] -= 1
            _push(w, y, 1.0, _GATE, 0)
            _walk(t, w, rate * x[word + places + i], action, found, insert, z)
    for j in range(places):
        if x[word + j] == 0:
            break
        rate = t.abandonment_rate[x[word + j] - 1]
        if rate > 0:
            y[:] = x
            _buffer_leave(t, w, y, j, 1.0, _GATE, 0)
            _walk(t, w, rate, action, found, insert, z)
    g = 0
    while g < gpus:
        configuration = x[g]
        same = 1
        while g + same < gpus and t.role_of[g + same] == t.role_of[g] and x[g + same] == configuration:
            same += 1
        i = t.prefill[configuration]
        if i >= 0:
            y[:] = x
            y[g] = t.finished[configuration]
            if not _route(t, w, y, i, g):
                flags |= DECODE_CUT
            _walk(t, w, same * t.prefill_rate[configuration], action, found, insert, z)
        for i in range(classes):
            count = t.decodes[configuration, i]
            if count > 0 and t.decode_rate[configuration, i] > 0:
                y[:] = x
                y[g] = t.removed[configuration, i]
                _push(w, y, 1.0, _FILL, g)
                _walk(t, w, same * count * t.decode_rate[configuration, i], action, found, insert, z)
        g += same
    if w.used[2] > 0:
        flags |= ARRIVAL_CUT
    return flags


@_compiled
def write_row(w: Work, row: int, columns: AnyArray, rates: AnyArray) -> int:
    """A row of the generator from its successors: sorted by column, with its diagonal; returns its length."""
    size = 1
    columns[0] = row
    rates[0] = 0.0
    leaving = 0.0
    for k in range(w.used[1]):
        column, rate = w.columns[k], w.rates[k]
        if column == row:
            continue
        leaving += rate
        at = size
        while at > 0 and columns[at - 1] > column:
            columns[at] = columns[at - 1]
            rates[at] = rates[at - 1]
            at -= 1
        columns[at] = column
        rates[at] = rate
        size += 1
    for k in range(size):
        if columns[k] == row:
            rates[k] = -leaving
    return size


@_compiled
def explore(
    t: Tables,
    w: Work,
    found: Found,
    actions: AnyArray,
    first_row: int,
    starts: AnyArray,
    columns: AnyArray,
    rates: AnyArray,
    flags: AnyArray,
    scratch: AnyArray,
) -> tuple[int, int]:
    """Breadth first from the states known; returns why it stopped and the next row.

    With one action, the rows of the generator are written as CSR; with several, nothing but the states.
    """
    row = first_row
    record = actions.size == 1
    x, y, z = scratch[0], scratch[1], scratch[2]
    while row < found.size[0]:
        room = w.columns.size
        if (
            found.size[0] + room * actions.size > found.keys.size
            or 2 * (found.size[0] + room * actions.size) > found.slots.size
            or (record and starts[row] + room > columns.size)
        ):
            return GROW, row
        unpack(t, found.keys[row], x)
        for action in actions:
            flags[row] |= successors(t, w, x, action, found, True, z, y)
        if record:
            starts[row + 1] = starts[row] + write_row(w, row, columns[starts[row] :], rates[starts[row] :])
        row += 1
    return DONE, row


@_compiled
def accumulate(
    t: Tables,
    keys: AnyArray,
    law: AnyArray,
    x: AnyArray,
    out: AnyArray,
    flow: AnyArray,
    prefill_marginal: AnyArray,
    decode_marginal: AnyArray,
) -> None:
    """Means under a law: out (I, 2 + 2 R) queues then prefills and decodes by role.

    flow holds the rates of prefill ends and of decode ends; the marginals are those of the two queues' total lengths.
    """
    gpus, classes, places = t.sizes[0], t.sizes[1], t.sizes[2]
    word = gpus + classes
    roles = (out.shape[1] - 2) // 2
    for k in range(keys.size):
        p = law[k]
        unpack(t, keys[k], x)
        waiting = 0
        for i in range(classes):
            out[i, 0] += p * x[gpus + i]
            waiting += x[gpus + i]
            out[i, 1] += p * x[word + places + i]
        prefill_marginal[waiting] += p
        for j in range(word, word + places):
            if x[j] == 0:
                break
            out[x[j] - 1, 1] += p
        decode_marginal[_waiting_decodes(t, x)] += p
        for g in range(gpus):
            configuration, r = x[g], t.role_of[g]
            i = t.prefill[configuration]
            if i >= 0:
                out[i, 2 + r] += p
                flow[i, 0] += p * t.prefill_rate[configuration]
            for i in range(classes):
                count = t.decodes[configuration, i]
                out[i, 2 + roles + r] += p * count
                flow[i, 1] += p * count * t.decode_rate[configuration, i]
