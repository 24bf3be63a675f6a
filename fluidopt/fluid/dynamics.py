"""The fluid dynamics of a fleet: flows given the state and its regime, and where a regime ends.

The fluid limit has a discontinuous right-hand side: a queue is empty or not, slots are full or not, two classes are
tied at the gate or not. A *regime* says which. Inside one the flows are continuous functions of the state, with what
slides along a boundary held there by equivalent control: an empty queue passes on what arrives, full slots take what
gets free, tied classes share the freed slots such that they stay tied.

The fleet's rules come from `System`; the state is per GPU. Closures replace what the state of the fluid does not
contain:

- decodes are spread evenly over the decode slots that the prefills of their role leave. Then a share of them, the one
  of the slots, runs beside a prefill. Exact if all prefill slots of the role are busy (as [L26] assumes of the mixed
  group) or all idle;
- a free slot of a role is within reach of any prefill or decode of the role, and a GPU for a prefill is drawn uniformly
  among the idle ones, also where the policy prefers those with few decodes;
- classes mixed in one first-come first-served line leave it as in `first_come`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fluidopt.errors import InvalidInput
from fluidopt.fluid.allocation import fill, first_come
from fluidopt.simulation.system import FloatArray, IntArray, System

BoolArray = npt.NDArray[np.bool_]
Rate = Callable[[float], FloatArray]

# Requests per GPU below which a queue is empty and slots are full.
NEAR = 1e-7
# 1/s: how fast rounding and truncation errors off a boundary are brought back to it.
RETURN = 1.0
# A margin counts as passed when it is below -PASSED, so that one that starts at 0 is not.
PASSED = 1e-11


@dataclass(frozen=True, eq=False, kw_only=True)
class FluidState:
    """Requests per GPU of the fleet: waiting for a prefill (I,), for a decode by side (S, I), in service (R, I)."""

    prefill_queue: FloatArray
    decode_queue: FloatArray
    prefill: FloatArray
    decode: FloatArray


@dataclass(frozen=True, eq=False, kw_only=True)
class Regime:
    """What holds at once of queues, slots and the gate.

    Attributes:
        waits: (I,) classes with a prefill queue.
        held: (I,) classes whose starts the backlog limits: it is at or above their threshold.
        prefill_full: (R,) roles with a prefill on every GPU.
        slots_full: (R,) roles without a free decode slot.
        decode_waits: (S, I) classes with a decode queue.
        ahead: classes without a queue that the gate prefers to all that wait, in its order.
        tied: (I,) classes between which the gate is indifferent, none preferred among those that wait.
    """

    waits: BoolArray
    held: BoolArray
    prefill_full: BoolArray
    slots_full: BoolArray
    decode_waits: BoolArray
    ahead: IntArray
    tied: BoolArray


@dataclass(frozen=True, eq=False, kw_only=True)
class Flows:
    """Rates per GPU, requests/s; what goes by side is (S, I), by role (R, I)."""

    arrived: FloatArray
    gave_up: FloatArray
    started: FloatArray
    prefilled: FloatArray
    joined: FloatArray
    decode_gave_up: FloatArray
    seated: FloatArray
    decoded: FloatArray


class Dynamics:
    """The fluid of a fleet, per GPU.

    Args:
        system: the fleet.
        slide: of classes that the gate holds back, whether to slide along the threshold or to cycle around it.

    Raises:
        InvalidInput: where a rule has no fluid here.
    """

    def __init__(self, system: System, *, slide: bool = True) -> None:
        self.system, self.slide = system, slide
        n = system.gpus
        self.gpus = system.role_gpus / n
        self.able = (system.role_prefill_mode >= 0) & (system.role_gpus > 0)
        self.shared = self.able & (system.role_slots <= system.role_decode_slots)
        self.stays = system.role_stays == 1
        self.holds = bool(np.any(system.gate_hold > -np.inf))
        if self.holds and np.any(self.shared):
            raise InvalidInput(
                "gate.hold has no fluid trajectory where a prefill takes a decode slot (roles with slots = "
                "decode_slots); simulate the policy instead, or give it a partition"
            )
        if self.holds and (np.any(system.gate_slope > 0) or np.unique(system.gate_base).size < system.classes):
            raise InvalidInput(
                "gate.hold has a fluid trajectory only with gate.rule 'priority' and no two classes of equal priority; "
                "give gate.order, or simulate the policy instead"
            )
        self.prefill_rate = np.where(self.able[:, None], system.prefill_rates(), 0.0)
        self.rest_speed, self.mixed_speed = system.decode_speeds().T
        self.slope, self.base = system.gate_slope * n, system.gate_base
        self.flat = self.slope == 0
        self.target = system.gate_queue_target / n
        self.threshold = -system.gate_hold / n
        self.roles_of = [
            np.array([r for r in system.router_order if system.role_side[r] == s], dtype=np.int64)
            for s in range(system.sides)
        ]
        classes, roles, sides = system.classes, system.roles, system.sides
        self.shapes = ((classes,), (sides, classes), (roles, classes), (roles, classes))
        self.ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        decodes = (system.role_decode_slots > 0) & (system.role_gpus > 0)
        ever = [np.ones((1 + sides) * classes, dtype=bool), np.repeat(self.able, classes), np.repeat(decodes, classes)]
        self.kept = np.flatnonzero(np.concatenate(ever))

    # ---- the state as a vector ------------------------------------------------------------------------------------

    def pack(self, state: FluidState) -> FloatArray:
        """The state as one vector, without what is always 0."""
        parts = (state.prefill_queue, state.decode_queue, state.prefill, state.decode)
        vector: FloatArray = np.concatenate([part.ravel() for part in parts])[self.kept]
        return vector

    def unpack(self, z: FloatArray) -> FluidState:
        """The vector as a state."""
        full = np.zeros(self.ends[-1])
        full[self.kept] = z
        a, b, c = self.ends[:-1]
        of_queue, of_line, of_prefill, of_decode = self.shapes
        return FluidState(
            prefill_queue=full[:a].reshape(of_queue),
            decode_queue=full[a:b].reshape(of_line),
            prefill=full[b:c].reshape(of_prefill),
            decode=full[c:].reshape(of_decode),
        )

    # ---- what the state implies -----------------------------------------------------------------------------------

    def decode_room(self, state: FluidState) -> FloatArray:
        """Free decode slots by role, (R,)."""
        s, running = self.system, state.prefill.sum(axis=1)
        most = np.minimum(s.role_decode_slots * self.gpus, s.role_slots * self.gpus - running)
        room: FloatArray = most - state.decode.sum(axis=1)
        return room

    def prefill_room(self, state: FluidState) -> FloatArray:
        """GPUs on which a prefill can start, by role, (R,); a free slot of a role counts as within reach of all."""
        running = state.prefill.sum(axis=1)
        room = np.where(self.able, self.gpus - running, 0.0)
        return np.where(self.shared, np.minimum(room, self.decode_room(state)), room)

    def backlog(self, state: FluidState) -> float:
        """Decodes waiting less free decode slots."""
        return float(state.decode_queue.sum() - self.decode_room(state).sum())

    def decode_speed(self, state: FluidState) -> FloatArray:
        """Iterations/s of the average decode of each role, (R,)."""
        s, running = self.system, state.prefill.sum(axis=1)
        beside = running * np.minimum(s.role_decode_slots, s.role_slots - 1)
        apart = (self.gpus - running) * s.role_decode_slots
        share = np.divide(beside, beside + apart, out=np.zeros_like(beside), where=beside + apart > 0)
        speed: FloatArray = self.rest_speed + share * np.where(self.able, self.mixed_speed - self.rest_speed, 0.0)
        return speed

    def reward_rate(self, state: FluidState) -> float:
        """Money/s per GPU, given the state."""
        s = self.system
        decoded = self.decode_speed(state) @ state.decode / s.output_tokens
        return float(np.sum(self.prefill_rate * state.prefill, axis=0) @ s.prefill_reward + decoded @ s.decode_reward)

    # ---- flows ----------------------------------------------------------------------------------------------------

    def flows(self, z: FloatArray, regime: Regime, arrived: FloatArray) -> Flows:
        """Every flow, given the state, its regime and the arrival rates (I,)."""
        allowed = self._allowed(z, regime, arrived) if self.slide and np.any(regime.held) else 0.0
        return self._flows(z, regime, arrived, allowed)

    def _flows(self, z: FloatArray, regime: Regime, arrived: FloatArray, allowed: float) -> Flows:
        """Every flow, where the classes held back start at most at rate ``allowed``, requests/s per GPU."""
        s, state = self.system, self.unpack(z)
        prefilled = self.prefill_rate * state.prefill
        decoded = self.decode_speed(state)[:, None] * state.decode / s.output_tokens
        stay = np.where(self.stays[:, None], prefilled, 0.0)
        joined = s.side_share * (prefilled - stay).sum(axis=0)
        ended, room = prefilled.sum(axis=1), self.decode_room(state)
        freed = decoded.sum(axis=1) + np.where(self.shared & ~self.stays, ended, 0.0)
        freed = np.maximum(freed + RETURN * np.where(regime.slots_full, room, 0.0), 0.0)
        idle = np.where(regime.prefill_full, ended + RETURN * (self.gpus - state.prefill.sum(axis=1)), np.inf)
        idle = np.where(self.able, np.maximum(idle, 0.0), 0.0)
        tight = self.shared & regime.slots_full
        if s.gate_first:
            started = self._started(state, regime, arrived, np.where(tight, np.minimum(idle, freed), idle), allowed)
            left = np.where(tight, np.maximum(freed - started.sum(axis=1), 0.0), freed)
            seated = self._seated(state, regime, joined, left)
        else:
            seated = self._seated(state, regime, joined, freed)
            left = np.maximum(freed - seated.sum(axis=1), 0.0)
            started = self._started(state, regime, arrived, np.where(tight, np.minimum(idle, left), idle), allowed)
        return Flows(
            arrived=arrived,
            gave_up=s.abandonment_rate * state.prefill_queue,
            started=started,
            prefilled=prefilled,
            joined=joined,
            decode_gave_up=s.abandonment_rate * state.decode_queue,
            seated=seated + stay,
            decoded=decoded,
        )

    def velocity(self, z: FloatArray, regime: Regime, arrived: FloatArray) -> FloatArray:
        """Derivative of the state vector, 1/s."""
        return self._derivative(self.flows(z, regime, arrived))

    def _derivative(self, f: Flows) -> FloatArray:
        seated = np.zeros_like(f.joined)
        stay = np.where(self.stays[:, None], f.prefilled, 0.0)
        np.add.at(seated, self.system.role_side, f.seated - stay)
        return self.pack(
            FluidState(
                prefill_queue=f.arrived - f.gave_up - f.started.sum(axis=0),
                decode_queue=f.joined - f.decode_gave_up - seated,
                prefill=f.started - f.prefilled,
                decode=f.seated - f.decoded,
            )
        )

    def _allowed(self, z: FloatArray, regime: Regime, arrived: FloatArray) -> float:
        """Rate at which the classes held back start so that the backlog comes to their threshold and stays there.

        A start acts on the backlog b only once the prefill ends: through b'', not b'. It is chosen such that
        b'' = -2 RETURN b' - RETURN^2 (b - threshold), or 0 where that asks for less.
        """
        state = self.unpack(z)
        threshold = float(np.max(self.threshold[regime.held]))
        wanted = -2 * RETURN * self._growth(z) - RETURN**2 * (self.backlog(state) - threshold)

        def bend(allowed: float) -> float:
            v = 0.01 * self._derivative(self._flows(z, regime, arrived, allowed))
            return (self._growth(z + v) - self._growth(z - v)) / 0.02  # exact: the growth is quadratic in the state

        held = regime.held & (self.threshold == threshold)
        idle = bend(0.0)
        trial = (wanted - idle) / float(self.prefill_rate[self.able][:, held].max())
        if trial <= 0:
            return 0.0
        gain = bend(trial) - idle
        return trial * (wanted - idle) / gain if gain > 0 else trial

    def _growth(self, z: FloatArray) -> float:
        """Derivative of the backlog, 1/s, where no prefill takes a decode slot."""
        s, state = self.system, self.unpack(z)
        finished = np.sum(self.prefill_rate * state.prefill)
        decoded = self.decode_speed(state) @ state.decode @ (1.0 / s.output_tokens)
        return float(finished - decoded - np.sum(s.abandonment_rate * state.decode_queue))

    def _started(
        self, state: FluidState, regime: Regime, arrived: FloatArray, capacity: FloatArray, allowed: float
    ) -> FloatArray:
        """Prefill starts (R, I), where the roles can start ``capacity`` (R,): inf where a GPU is idle."""
        total = float(capacity.sum())
        if total == 0:
            return np.zeros_like(state.prefill)
        if np.isfinite(total):
            part = capacity / total
        else:  # the GPU is drawn among the idle ones
            room = np.maximum(self.prefill_room(state), 0.0)
            room = room if room.sum() > 0 else np.isinf(capacity).astype(float)
            part = room / room.sum()
        if self.holds:
            admitted = self._by_priority(regime, arrived, total, allowed)
        else:
            admitted = self._admitted(state, regime, arrived, total) if np.isfinite(total) else arrived
        return np.outer(part, admitted)

    def _by_priority(self, regime: Regime, arrived: FloatArray, total: float, allowed: float) -> FloatArray:
        """Classes (I,) of the prefills that start, where those held back start at most at rate ``allowed`` together."""
        start = np.zeros_like(arrived)
        active = np.max(self.threshold[regime.held], initial=-np.inf)
        for i in np.argsort(self.base):
            wanted = total if regime.waits[i] else min(total, arrived[i])
            if regime.held[i]:
                wanted = min(wanted, allowed if self.threshold[i] == active else 0.0)
                allowed -= wanted
            elif not np.isfinite(wanted):  # only for an instant: the queue has just been settled
                wanted = arrived[i]
            start[i] = wanted
            total -= wanted
        return start

    def _admitted(self, state: FluidState, regime: Regime, arrived: FloatArray, total: float) -> FloatArray:
        """Classes (I,) of the prefills that start at rate ``total``, by the gate's rule."""
        s, queue = self.system, state.prefill_queue
        if s.gate_fcfs:
            if np.any(regime.waits):
                return first_come(total, np.maximum(queue, 0.0) + 1e-3 * NEAR * arrived, s.abandonment_rate)
            return arrived * min(1.0, total / max(float(arrived.sum()), 1e-300))
        start = np.zeros(s.classes)
        if regime.ahead.size:
            wanted = arrived[regime.ahead]
            before = np.cumsum(wanted) - wanted
            start[regime.ahead] = np.clip(total - before, 0.0, wanted)
            total = max(total - start.sum(), 0.0)
        most = np.where(regime.waits, np.inf, arrived)
        level, even = np.flatnonzero(regime.tied & ~self.flat), np.flatnonzero(regime.tied & self.flat)
        if level.size:
            # Keys base + slope X stay equal: X' is proportional to 1/slope, but for the return to equality.
            weight = 1.0 / self.slope[level]
            ended = (self.prefill_rate * state.prefill).sum(axis=0)[level]
            offset = ended - RETURN * (state.prefill.sum(axis=0)[level] + self.base[level] * weight)
            if even.size:  # the keys of these do not move, hence none does
                start[level] = np.clip(offset + RETURN * self.base[even[0]] * weight, 0.0, most[level])
                start[level] *= min(1.0, total / max(start[level].sum(), 1e-300))
            else:
                start[level] = fill(total, weight, offset, most[level])
            total = max(total - start[level].sum(), 0.0)
        if even.size:  # the queues' distances to their targets stay equal
            offset = (arrived - s.abandonment_rate * queue + RETURN * (queue - self.target))[even]
            start[even] = fill(total, np.ones(even.size), offset, most[even])
        return start

    def _seated(self, state: FluidState, regime: Regime, joined: FloatArray, freed: FloatArray) -> FloatArray:
        """Decode starts (R, I) of finished prefills ``joined`` (S, I), where slots get free at rate ``freed`` (R,)."""
        seated = np.zeros_like(state.decode)
        for side, roles in enumerate(self.roles_of):
            total, full = float(joined[side].sum()), regime.slots_full[roles]
            capacity = float(freed[roles].sum())
            if np.all(full) and (capacity < total or np.any(regime.decode_waits[side])):
                if capacity > 0:
                    mix = self._line(state, regime, joined[side], capacity, side)
                    seated[roles] = np.outer(freed[roles] / capacity, mix)
                continue
            if total == 0:
                continue
            left = total
            for role, closed in zip(roles, full, strict=True):
                part = min(left, freed[role]) if closed else left
                seated[role] = part / total * joined[side]
                left -= part
        return seated

    def _line(self, state: FluidState, regime: Regime, joined: FloatArray, capacity: float, side: int) -> FloatArray:
        """Classes (I,) of the waiting decodes of a side that freed slots take at rate ``capacity``."""
        s, queue, waits = self.system, state.decode_queue[side], regime.decode_waits[side]
        weight, taken = s.side_weight[side], np.zeros(s.classes)
        drawn = weight > 0
        if np.any(drawn):
            most = np.where(waits, np.inf, joined)[drawn]
            taken[drawn] = fill(capacity, weight[drawn], np.zeros(most.size), most)
            capacity = max(capacity - float(taken.sum()), 0.0)
        common = np.flatnonzero(~drawn)
        arriving = float(joined[common].sum())
        if capacity > 0 and np.any(waits[common]):
            line = np.maximum(queue[common], 0.0) + 1e-3 * NEAR * joined[common]
            taken[common] = first_come(capacity, line, s.abandonment_rate[common])
        elif arriving > 0:
            taken[common] = joined[common] * min(1.0, capacity / arriving)
        return taken

    # ---- regimes --------------------------------------------------------------------------------------------------

    def regime(self, z: FloatArray, before: Regime | None = None) -> Regime:
        """The regime that starts in a settled state; ``before``, the one that ended, decides who is still held."""
        s, state = self.system, self.unpack(z)
        waits = state.prefill_queue > NEAR
        decode_waits = state.decode_queue > NEAR
        for side, weight in enumerate(s.side_weight):
            common = weight == 0
            decode_waits[side, common] = state.decode_queue[side, common].sum() > NEAR
        if s.gate_fcfs:
            waits = np.full(s.classes, state.prefill_queue.sum() > NEAR)
        held = self.held(state, before)
        ahead, tied = self._ranking(state, waits & ~held, ~held)
        return Regime(
            waits=waits,
            held=held,
            prefill_full=self.able & (self.gpus - state.prefill.sum(axis=1) <= NEAR),
            slots_full=self.decode_room(state) <= NEAR,
            decode_waits=decode_waits,
            ahead=ahead,
            tied=tied,
        )

    def held(self, state: FluidState, before: Regime | None) -> BoolArray:
        """Classes (I,) that the backlog limits: from their threshold on, until it is below and none of them waits.

        Cycling, until it is one request of the fleet below, the least step of the chain.
        """
        above = self.backlog(state) - self.threshold
        held: BoolArray = above >= -PASSED
        if before is not None and self.slide:
            held |= before.held & ((above >= -2 * NEAR) | (state.prefill_queue > NEAR))
        elif before is not None:
            held |= before.held & (above >= -1.0 / self.system.gpus)
        return held & np.isfinite(self.threshold)

    def _ranking(self, state: FluidState, waiting: BoolArray, admitted: BoolArray) -> tuple[IntArray, BoolArray]:
        key = self.base + self.slope * state.prefill.sum(axis=0)
        distance = self._distance(state, waiting)
        tied = admitted & (np.abs(distance) <= NEAR)
        ahead = np.flatnonzero(admitted & (distance < -NEAR))
        order = np.lexsort((-(state.prefill_queue - self.target)[ahead], key[ahead]))
        return ahead[order], tied

    def _distance(self, state: FluidState, front: BoolArray) -> FloatArray:
        """How far each class is behind the best of ``front`` at the gate, (I,); negative if it is ahead.

        In requests per GPU: prefills in service above those that make the keys equal, or, where keys do not move,
        requests in the queue short of the largest excess over the target.
        """
        if not np.any(front):
            return np.full(front.size, -np.inf)
        key = self.base + self.slope * state.prefill.sum(axis=0)
        at = int(np.flatnonzero(front)[np.argmin(key[front])])
        best = key[at]
        excess = state.prefill_queue - self.target
        same = self.flat & (self.base == best)
        top = np.max(excess[front & same]) if np.any(front & same) else np.max(excess[same], initial=-np.inf)
        unit = np.where(self.flat, self.slope[at] if self.slope[at] > 0 else 0.0, self.slope)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            distance = (key - best) / unit
        distance = np.where(np.isnan(distance), 0.0, distance)
        if not np.any(same):
            return distance
        return np.where(same, top - excess, distance)

    def margins(self, z: FloatArray, regime: Regime) -> FloatArray:
        """What is left of the regime: it ends when one of these becomes negative."""
        s, state = self.system, self.unpack(z)
        queue = state.prefill_queue
        total_queue = np.full(s.classes, queue.sum()) if s.gate_fcfs else queue
        decode_queue = state.decode_queue.copy()
        for side, weight in enumerate(s.side_weight):
            common = weight == 0
            decode_queue[side, common] = decode_queue[side, common].sum()
        idle, room = (self.gpus - state.prefill.sum(axis=1))[self.able], self.decode_room(state)
        parts = [
            np.where(regime.waits, total_queue, 2 * NEAR - total_queue),
            np.where(regime.decode_waits, decode_queue, 2 * NEAR - decode_queue).ravel(),
            np.where(regime.prefill_full[self.able], 2 * NEAR - idle, idle - 0.5 * NEAR),  # at 0 the draw is singular
            np.where(regime.slots_full, 2 * NEAR - room, room),
        ]
        if self.holds:
            above = self.backlog(state) - self.threshold
            leaves = np.maximum(above + 2 * NEAR, queue - NEAR) if self.slide else above + 1.0 / s.gpus
            parts.append(np.where(regime.held, leaves, -above)[np.isfinite(self.threshold)])
            return np.concatenate(parts)
        waiting = regime.waits & ~regime.held
        if np.any(waiting) and not s.gate_fcfs:
            distance = self._distance(state, waiting & regime.tied)
            ahead = np.zeros(s.classes, dtype=bool)
            ahead[regime.ahead] = True
            margin = np.where(regime.tied, 2 * NEAR - np.abs(distance), np.where(ahead, -distance, distance))
            parts.append(margin[~regime.held])
        return np.concatenate(parts)

    # ---- jumps ----------------------------------------------------------------------------------------------------

    def settle(self, z: FloatArray, before: Regime | None = None) -> FloatArray:
        """The state once every free slot has taken who waits for it, which takes no time."""
        state = self.unpack(np.maximum(z, 0.0))
        if self.system.gate_first:
            self._settle_prefills(state, before)
        for side, roles in enumerate(self.roles_of):
            self._settle_decodes(state, side, roles)
        self._settle_prefills(state, before)
        return self.pack(state)

    def _settle_decodes(self, state: FluidState, side: int, roles: IntArray) -> None:
        weight = self.system.side_weight[side]
        for role in roles:
            queue = state.decode_queue[side]
            total = min(float(self.decode_room(state)[role]), float(queue.sum()))
            if total <= NEAR:
                continue
            taken, drawn = np.zeros_like(queue), weight > 0
            if np.any(drawn):
                taken[drawn] = fill(total, weight[drawn], np.zeros(int(drawn.sum())), queue[drawn])
            rest, common = total - taken.sum(), queue[~drawn]
            if rest > 0 and common.sum() > 0:
                taken[~drawn] = common * min(1.0, rest / common.sum())
            queue -= taken
            state.decode[role] += taken

    def _settle_prefills(self, state: FluidState, before: Regime | None) -> None:
        queue = np.where(self.held(state, before), 0.0, state.prefill_queue)
        room = np.maximum(self.prefill_room(state), 0.0)
        total = min(float(room.sum()), float(queue.sum()))
        if total <= NEAR:
            return
        taken = queue * (total / queue.sum())
        if total < queue.sum() and not self.system.gate_fcfs:
            taken = self._jump(state, queue, total)
        state.prefill_queue[:] -= taken
        state.prefill[:] += np.outer(room / room.sum(), taken)

    def _jump(self, state: FluidState, queue: FloatArray, total: float) -> FloatArray:
        """Which ``total`` of the waiting requests (I,) the gate starts at once: level by level of the keys."""
        taken = np.zeros_like(queue)
        level, weight = ~self.flat, 1.0 / np.where(self.flat, 1.0, self.slope)
        running = state.prefill.sum(axis=0)
        offset = -(running + np.where(level, self.base, 0.0) * weight)
        for base in np.unique(self.base[self.flat & (queue > 0)]):
            with np.errstate(over="ignore"):
                below = np.where(level, np.clip(base * weight + offset, 0.0, queue), 0.0)
            even = self.flat & (self.base == base)
            left = total - taken.sum() - below.sum()
            if left <= 0:
                break
            if left <= queue[even].sum():
                excess = (queue - self.target)[even]
                taken[even] = fill(left, np.ones(excess.size), excess, queue[even])
                return taken + below
            taken[even] = queue[even]
        if np.any(level):
            taken[level] = fill(total - float(taken.sum()), weight[level], offset[level], queue[level])
        return taken
