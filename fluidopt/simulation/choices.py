"""The compiled choices of a policy: which line is admitted, which GPU takes a prefill or a decode.

They read a fleet and its state by the names of their columns, so that every clock that moves such a state makes the
same choices: that of general laws (`fluidopt.simulation.general_events`) and that of iterations
(`fluidopt.serving.events`).

- ``fleet``: records ``classes`` (I,) with slope, base, queue_target and hold; ``roles`` (R,) with first_gpu,
  decode_slots, slots, prefills; ``router_order``, ``first_role``, ``weight`` (see `fluidopt.simulation.system.System`).
- ``state``: records ``scalars``, ``gpus``, ``lines``, ``waiting``, ``tallies``, and the lists ``free_members``,
  ``free_size``, ``idle_members``, ``idle_size``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fluidopt.simulation.compilation import compiled
from fluidopt.simulation.system import FloatArray, IntArray

NOBODY = -1


@compiled
def sift(keys: FloatArray, order: IntArray, place: IntArray, size: int, at: int) -> None:
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


@compiled
def line_of(fleet: Any, state: Any, tag: int) -> int:
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
def link(line: Any, records: Any, c: int) -> None:
    """Put record c at the end of a line."""
    records[c].previous, records[c].next = line.tail, NOBODY
    if line.tail >= 0:
        records[line.tail].next = c
    else:
        line.head = c
    line.tail = c


@compiled
def unlink(line: Any, records: Any, c: int) -> None:
    """Take record c out of a line."""
    before, after = records[c].previous, records[c].next
    if before >= 0:
        records[before].next = after
    else:
        line.head = after
    if after >= 0:
        records[after].previous = before
    else:
        line.tail = before


@compiled
def list_gpu(fleet: Any, state: Any, g: int) -> None:
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
def best_line(fleet: Any, state: Any) -> int:
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
def route(fleet: Any, state: Any, rng: np.random.Generator, s: int) -> int:
    """A GPU for a decode, or -1: uniform over the GPUs with a free slot of the first role of side s that has one."""
    for k in range(fleet.first_role[s], fleet.first_role[s + 1]):
        r = fleet.router_order[k]
        if state.free_size[r] > 0:
            pick = np.int64(rng.random() * state.free_size[r])
            g: int = state.free_members[fleet.roles[r].first_gpu + pick]
            return g
    return NOBODY


@compiled
def next_decode(fleet: Any, state: Any, rng: np.random.Generator, s: int) -> int:
    """Who of side s gets a free slot, -1 if nobody waits: by weight, else the first who came."""
    sides, count = fleet.weight.shape
    first = count + sides + s * count
    total = 0.0
    for i in range(count):
        if state.lines[first + i].head >= 0:
            total += fleet.weight[s, i]
    chosen: int = state.lines[count + s].head
    if total == 0.0:
        return chosen
    u = rng.random() * total
    for i in range(count):
        if state.lines[first + i].head >= 0:
            chosen = state.lines[first + i].head
            u -= fleet.weight[s, i]
            if u < 0.0:
                break
    return chosen
