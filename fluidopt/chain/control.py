"""The controlled chain of a small fleet: its states, the events in them, and what a controller can do about them.

The controller sees the state after every event and acts at once, as often as it likes: it starts the prefill of a
waiting request on an idle GPU, or seats a waiting decode on a GPU with a free slot. It may also leave anybody waiting
beside anything free. A request whose prefill has ended waits for its decode like the others, so to keep it on its GPU,
to send it elsewhere and to let it wait are three decisions. The roles of the GPUs are given; nothing is preempted and
nothing moves. Patience and service are exponential and unknown beforehand, so requests of a class that wait at the same
stage are exchangeable, and as the decision may pick any class, the order among them means nothing to what follows:
counts are a state, of the prefill queue and of one decode buffer for the fleet. All policies of the simulator decide
on more than that (who came first, coins, sides), and none can do better than the best that decides on counts.

A queue holds one more than its cap for no time at all: then somebody must start, or the controller turns one away, of
whichever class. Every action shortens a queue, so with the states sorted by the number who wait, actions lead to states
with lower numbers, and the best sequence of actions from every state is found in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import comb
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy import sparse

from fluidopt.chain.generator import StateSpace, longer
from fluidopt.chain.moves import DONE, GROW
from fluidopt.chain.packing import AnyArray, Found, Tables, compiled, find, pack, rehash, table_size, tables, unpack
from fluidopt.chain.states import GIB, KEY_BITS, Configurations, Layout, up_to
from fluidopt.errors import InvalidInput
from fluidopt.simulation.system import FloatArray, IntArray, System

PREFILL, DECODE, TURN_AWAY = 0, 1, 2
"""Kinds of an action: start a prefill, seat a decode, turn a request away from a queue above its cap."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ControlledChain:
    """States, events and actions; states are numbered by the number of requests that wait, 0 is the empty fleet.

    Attributes:
        space: the states. Its layout's caps are one above those of the chain.
        waiting: (S, 2) requests that wait for a prefill and for a decode.
        events: (S, S) CSR of rates, 1/s, diagonal left out; no events in a state above a cap.
        actions: (S, S) CSR of what each action leads to, all to lower numbers; the entries are codes (`unravel`).
        reward: (S,) money/s while in the state.
        above: (S,) whether a queue is above its cap.
    """

    space: StateSpace
    waiting: IntArray
    events: sparse.csr_array
    actions: sparse.csr_array
    reward: FloatArray
    above: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return int(self.reward.size)

    @cached_property
    def leaving(self) -> FloatArray:
        """(S,) rate of all events, 1/s."""
        return cast(FloatArray, np.asarray(self.events.sum(axis=1)).ravel())

    def unravel(self, code: AnyArray) -> tuple[IntArray, IntArray, IntArray]:
        """Kind, class and GPU configuration of actions, from their codes."""
        shape = (3, self.space.layout.system.classes, self.space.configurations.prefill.size)
        kind, label, configuration = (each.astype(np.int64) for each in np.unravel_index(code, shape))
        return kind, label, configuration


def common_buffer(system: System) -> System:
    """The fleet without its policy: one decode buffer for all, in which only counts matter."""
    classes, roles = system.classes, system.roles
    return replace(
        system,
        gate_fcfs=False,
        gate_first=False,
        gate_hold=np.full(classes, -np.inf),
        role_stays=np.zeros(roles, dtype=np.int64),
        role_side=np.zeros(roles, dtype=np.int64),
        side_share=np.ones((1, classes)),
        side_weight=np.ones((1, classes)),
    )


def control_layout(system: System, prefill_queue_cap: int, decode_queue_cap: int) -> Layout:
    """The layout of the controlled chain, with room for one above each cap."""
    return Layout(
        system=common_buffer(system),
        prefill_queue_cap=prefill_queue_cap + 1,
        decode_queue_cap=decode_queue_cap + 1,
        ordered_places=0,
    )


def state_count(layout: Layout) -> int:
    """Number of states of the controlled chain, those included that no action or event leads to."""
    s = layout.system
    gpus = 1
    for r in range(s.roles):
        kinds, number = layout.configurations(r)["any"], int(s.role_gpus[r])
        gpus *= comb(kinds + number - 1, number)
    prefill, decode = (up_to(s.classes, cap - 1) for cap in (layout.prefill_queue_cap, layout.decode_queue_cap))
    above = [up_to(s.classes, cap) for cap in (layout.prefill_queue_cap, layout.decode_queue_cap)]
    return gpus * (above[0] * decode + prefill * (above[1] - decode))


def memory(layout: Layout) -> int:
    """Estimated bytes of chain and solution together, at their peak."""
    s = layout.system
    different = sum(min(int(s.role_gpus[r]), layout.configurations(r)["any"]) for r in range(s.roles))
    events = 3 * s.classes + different * (1 + s.classes)
    # of an event or action: rows while they grow, rows in order of waiting; a part of them again in the equations of a
    # policy, with their factors. Of a state: key, hash table while it doubles, some twenty vectors.
    return state_count(layout) * (8 + 4 * 12 + 8 * 20 + 36 * (events + different * s.classes))


def refuse(layout: Layout, *, max_states: int, memory_limit: float, why: str = "") -> None:
    """Raise unless the chain fits.

    Raises:
        InvalidInput: naming estimate, limit and what to do instead.
    """
    states, needed = state_count(layout), memory(layout)
    caps = f"prefill_queue_cap={layout.prefill_queue_cap - 1}, decode_queue_cap={layout.decode_queue_cap - 1}"
    instead = (
        "Give lower caps, or fewer GPUs, slots or classes; the plan (Plan.revenue_rate) bounds what any policy earns, "
        "whatever the size of the fleet"
    )
    if states > max_states:
        raise InvalidInput(
            f"optimal_policy: the chain has {states:,} states with {caps}, more than max_states={max_states:,}{why}. "
            f"{instead}."
        )
    if needed > memory_limit:
        raise InvalidInput(
            f"optimal_policy: the chain ({states:,} states with {caps}) needs about {needed / GIB:.2f} GiB, more than "
            f"memory_limit={memory_limit / GIB:.2f} GiB{why}. {instead}."
        )
    if layout.bits() > KEY_BITS:
        raise InvalidInput(f"optimal_policy: a state with {caps} does not fit into 62 bits{why}. {instead}.")


def controlled_chain(layout: Layout) -> ControlledChain:
    """Enumerate the states that events and actions lead to from the empty fleet; about 0.3 us per event or action."""
    s, configurations = layout.system, Configurations.of(layout.system)
    t = tables(layout, configurations)
    most_events, most_actions = 3 * s.classes + s.gpus * (1 + s.classes), 2 * s.classes * (s.gpus + 1)
    room = most_events + most_actions
    keys = np.empty(2 * room + 1024, dtype=np.int64)
    found = Found(
        keys=keys,
        slots=np.full(table_size(keys.size), -1, dtype=np.int32),
        size=np.zeros(1, dtype=np.int64),
    )
    starts, reward = np.zeros((keys.size + 1, 2), dtype=np.int64), np.zeros(keys.size)
    targets, rates = np.empty(16 * keys.size, dtype=np.int32), np.empty(16 * keys.size)
    chosen, codes = (np.empty(16 * keys.size, dtype=np.int32) for _ in range(2))
    scratch = np.zeros((2, len(layout.radices())), dtype=np.int64)
    scratch[0, : s.gpus] = configurations.first[t.role_of]
    find(found, pack(t, scratch[0]), True)
    money = np.stack([s.prefill_reward, s.decode_reward])
    row = 0
    while True:
        status, row = _explore(t, found, row, starts, targets, rates, chosen, codes, reward, money, room, scratch)
        if status == DONE:
            break
        count = int(found.size[0])
        if count + room > found.keys.size:
            size = int(1.5 * found.keys.size) + room
            starts, reward = longer(starts, size + 1), longer(reward, size)
            found = found._replace(keys=longer(found.keys, size))
        if 2 * (count + room) > found.slots.size:
            found = found._replace(slots=np.full(2 * found.slots.size, -1, dtype=np.int32))
            rehash(found)
        if starts[row, 0] + room > targets.size:
            targets, rates = (longer(array, int(1.5 * targets.size) + room) for array in (targets, rates))
        if starts[row, 1] + room > chosen.size:
            chosen, codes = (longer(array, int(1.5 * chosen.size) + room) for array in (chosen, codes))
    count = int(found.size[0])
    space = StateSpace(
        layout=layout,
        configurations=configurations,
        keys=found.keys[:count].copy(),
        flags=np.zeros(count, dtype=np.uint8),
    )
    waiting = space.waiting()
    order = np.argsort(waiting.sum(axis=1), kind="stable")
    rank = np.empty(count, dtype=np.int32)
    rank[order] = np.arange(count)
    events, actions = (
        sparse.csr_array((data[:used], rank[to[:used]], first.astype(np.int32)), shape=(count, count))[order]
        for data, to, first, used in (
            (rates, targets, starts[: count + 1, 0], int(starts[count, 0])),
            (codes, chosen, starts[: count + 1, 1], int(starts[count, 1])),
        )
    )
    waiting = waiting[order]
    return ControlledChain(
        space=replace(space, keys=space.keys[order]),
        waiting=waiting,
        events=events,
        actions=actions,
        reward=reward[order],
        above=np.any(waiting >= [layout.prefill_queue_cap, layout.decode_queue_cap], axis=1),
    )


@compiled
def _explore(
    t: Tables,
    found: Found,
    first_row: int,
    starts: AnyArray,
    targets: AnyArray,
    rates: AnyArray,
    chosen: AnyArray,
    codes: AnyArray,
    reward: AnyArray,
    money: AnyArray,
    room: int,
    scratch: AnyArray,
) -> tuple[int, int]:
    """Breadth first from the states known, writing the rows of events and actions; why it stopped, and the next row."""
    gpus, classes = t.sizes[0], t.sizes[1]
    queue, buffer = t.counts[0], t.counts[1]
    kinds = t.prefill.size
    row = first_row
    x, y = scratch[0], scratch[1]
    while row < found.size[0]:
        event, action = starts[row, 0], starts[row, 1]
        if (
            found.size[0] + room > found.keys.size
            or 2 * (found.size[0] + room) > found.slots.size
            or event + room > targets.size
            or action + room > chosen.size
        ):
            return GROW, row
        unpack(t, found.keys[row], x)
        queued = buffered = 0
        for i in range(classes):
            queued += x[queue + i]
            buffered += x[buffer + i]
        queue_above, buffer_above = queued >= t.sizes[2], buffered >= t.sizes[3]
        above = queue_above or buffer_above
        earning = 0.0
        for i in range(classes):
            if t.arrival_rate[i] > 0.0 and not above:
                targets[event] = _target(t, found, x, y, 0, x[0], queue + i, 1)
                rates[event] = t.arrival_rate[i]
                event += 1
            for place, excess, kind in ((queue + i, queue_above, 0), (buffer + i, buffer_above, 1)):
                if x[place] > 0 and t.abandonment_rate[i] > 0.0 and not above:
                    targets[event] = _target(t, found, x, y, 0, x[0], place, -1)
                    rates[event] = x[place] * t.abandonment_rate[i]
                    event += 1
                if x[place] > 0 and excess:
                    chosen[action] = _target(t, found, x, y, 0, x[0], place, -1)
                    codes[action] = (TURN_AWAY * classes + i) * kinds + kind
                    action += 1
        g = 0
        while g < gpus:
            c = x[g]
            same = 1  # GPUs of the role in the same configuration
            while g + same < gpus and t.role_of[g + same] == t.role_of[g] and x[g + same] == c:
                same += 1
            running = t.prefill[c]
            if running >= 0 and not above:
                targets[event] = _target(t, found, x, y, g, t.finished[c], buffer + running, 1)
                rates[event] = same * t.prefill_rate[c]
                earning += rates[event] * money[0, running]
                event += 1
            for i in range(classes):
                if t.decodes[c, i] > 0 and t.decode_rate[c, i] > 0.0 and not above:
                    targets[event] = _target(t, found, x, y, g, t.removed[c, i], queue, 0)
                    rates[event] = same * t.decodes[c, i] * t.decode_rate[c, i]
                    earning += rates[event] * money[1, i]
                    event += 1
                if t.idle[c] and x[queue + i] > 0:
                    chosen[action] = _target(t, found, x, y, g, t.started[c, i], queue + i, -1)
                    codes[action] = (PREFILL * classes + i) * kinds + c
                    action += 1
                if t.room[c] > 0 and x[buffer + i] > 0:
                    chosen[action] = _target(t, found, x, y, g, t.added[c, i], buffer + i, -1)
                    codes[action] = (DECODE * classes + i) * kinds + c
                    action += 1
            g += same
        reward[row] = earning
        starts[row + 1, 0], starts[row + 1, 1] = event, action
        row += 1
    return DONE, row


@compiled
def _target(t: Tables, found: Found, x: AnyArray, y: AnyArray, g: int, c: int, place: int, change: int) -> int:
    """Number of the state x with GPU g in configuration c and a count changed; y is scratch."""
    for j in range(x.size):
        y[j] = x[j]
    y[g] = c
    y[place] += change
    return find(found, pack(t, y), True)
