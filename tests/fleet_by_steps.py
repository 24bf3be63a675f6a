"""A policy's fleet in plain Python that walks through every iteration of every GPU: a second route.

It makes its choices as the rules say them, with a draw from the generator it is given wherever one is drawn. How many
draws it takes is its own affair, so runs are compared under a generator whose draws are all alike.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from engine_by_steps import BlockPool

from fluidopt.simulation.fleet import fleet_system

BLOCK = 16
SAME_TIME = 1e-9  # s: rounding decides which of two GPUs comes first


class Drawn(list):
    """GPUs to draw from; the last one takes the place of one that goes."""

    def draw(self, rng):
        return self[int(rng.random() * len(self))]

    def drop(self, g):
        at, last = self.index(g), self.pop()
        if at < len(self):
            self[at] = last


@dataclass
class Gpu:
    """An engine, its slots as the policy counts them, and what it did."""

    role: int
    curve: object
    chunk: int
    pool: BlockPool | None
    slots_taken: int = 0
    prefilling: bool = False
    decodes: list[int] = field(default_factory=list)  # in the order in which they were seated
    prompt: int | None = None
    take: int = 0
    queue: deque[int] = field(default_factory=deque)
    joining: list[int] = field(default_factory=list)
    ends: float = np.inf
    runs: bool = False
    free: bool = False
    level: int | None = None
    iterations: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    busy: float = 0.0


class FleetBySteps:
    """One passage of a trace through the fleet of a policy; its arrays have one entry per request."""

    def __init__(self, trace, policy, kind, *, kv_tokens, patience, refused, rng):
        self.system = fleet_system(policy)
        self.trace, self.kind, self.rng, self.patience = trace, kind, rng, patience.copy()
        types = {gpu.name: gpu for gpu in policy.scenario.gpu_types}
        self.gpus = []
        for number, role in enumerate(policy.roles):
            gpu, blocks = types[role.gpu], kv_tokens[role.gpu] // BLOCK
            chunk = role.prefill.chunk if role.prefill else gpu.chunk_size
            self.gpus += [
                Gpu(number, gpu.curve, chunk, BlockPool(blocks) if blocks else None) for _ in range(role.gpus)
            ]
        count, sides = len(trace), self.system.sides
        self.free = [Drawn() for _ in policy.roles]
        self.idle = [Drawn() for _ in range(2 + int(self.system.role_slots.max()))]
        self.waiting: list[int] = []
        self.buffers: list[list[int]] = [[] for _ in range(sides)]
        self.deadline: dict[int, float] = {}
        self.homeless = 0
        self.owned: list[list[int]] = [[] for _ in range(count)]
        self.computed, self.generated, self.preemptions, self.worked = (np.zeros(count, dtype=int) for _ in range(4))
        self.started, self.first_token, self.finished = (np.full(count, np.nan) for _ in range(3))
        self.refused = refused
        self.abandoned, self.gpu = np.zeros(count, dtype=bool), np.full(count, -1)
        self.tied, self.last = False, (-1, -np.inf, False)
        self.open: int | None = None
        for g in range(len(self.gpus)):
            self.relist(g)
        self.run(np.flatnonzero(~refused).tolist())

    def run(self, arrivals):
        upcoming = deque(arrivals)
        while True:
            arrival = self.trace.arrival_time[upcoming[0]] if upcoming else np.inf
            g = min(range(len(self.gpus)), key=lambda at: self.gpus[at].ends)
            impatient = min(self.deadline, key=self.deadline.__getitem__, default=None)
            gives_up = np.inf if impatient is None else self.deadline[impatient]
            self.now = min(arrival, self.gpus[g].ends, gives_up)
            if self.now == np.inf:
                return
            if arrival == self.now:
                r = upcoming.popleft()
                self.waiting.append(r)
                self.deadline[r] = self.now + self.patience[r]
                self.gate()
            elif self.gpus[g].ends == self.now:
                self.boundary(g)
            else:
                self.stop_waiting(impatient)
                self.abandoned[impatient] = True
                self.gate()

    # What the policy decides ------------------------------------------------------------------------------------

    def relist(self, g):
        """Bring the lists of GPUs with a free decode slot, and of those that may start a prefill, up to date."""
        gpu, system = self.gpus[g], self.system
        load = gpu.slots_taken + gpu.prefilling
        free = gpu.slots_taken < system.role_decode_slots[gpu.role] and load < system.role_slots[gpu.role]
        if free != gpu.free:
            gpu.free = free
            (self.free[gpu.role].append if free else self.free[gpu.role].drop)(g)
        may_start = (
            system.role_prefill_mode[gpu.role] >= 0 and not gpu.prefilling and load < system.role_slots[gpu.role]
        )
        level = (gpu.slots_taken if system.placement else 0) if may_start else None
        if level != gpu.level:
            if gpu.level is not None:
                self.idle[gpu.level].drop(g)
            if level is not None:
                self.idle[level].append(g)
            gpu.level = level

    def free_slots(self):
        """Free decode slots of the fleet, less the decodes that have none."""
        system = self.system
        slots = sum(
            system.role_decode_slots[gpu.role]
            - gpu.slots_taken
            - (gpu.prefilling and system.role_slots[gpu.role] == system.role_decode_slots[gpu.role])
            for gpu in self.gpus
        )
        return slots - sum(map(len, self.buffers)) - self.homeless

    def next_prefill(self):
        system, of = self.system, self.kind
        if system.gate_fcfs or not self.waiting:
            return self.waiting[0] if self.waiting else None
        running = np.bincount([of[r] for gpu in self.gpus for r in self.prefills(gpu)], minlength=system.classes)
        free, queues = self.free_slots(), np.bincount(of[self.waiting], minlength=system.classes)
        open_to = [i for i in range(system.classes) if queues[i] and system.gate_hold[i] < free]
        if not open_to:
            return None
        chosen = min(
            open_to,
            key=lambda i: (
                system.gate_base[i] + system.gate_slope[i] * running[i],
                system.gate_queue_target[i] - queues[i],
            ),
        )
        return next(r for r in self.waiting if of[r] == chosen)

    def prefills(self, gpu):
        """Requests that have no token yet."""
        here = [*gpu.queue, *([] if gpu.prompt is None else [gpu.prompt])]
        return [r for r in here if self.generated[r] == 0]

    def gate(self):
        while any(self.idle) and (r := self.next_prefill()) is not None:
            g = next(level for level in self.idle if level).draw(self.rng)
            self.stop_waiting(r)
            gpu = self.gpus[g]
            gpu.prefilling = True
            gpu.queue.append(r)
            self.gpu[r] = g
            self.wake(g)
            self.relist(g)

    def stop_waiting(self, r):
        self.patience[r] = self.deadline.pop(r) - self.now
        for line in (self.waiting, *self.buffers):
            if r in line:
                line.remove(r)

    def next_decode(self, side):
        weight, waiting = self.system.side_weight[side], self.buffers[side]
        classes = [i for i in range(weight.size) if weight[i] > 0 and any(self.kind[r] == i for r in waiting)]
        if not classes:
            return waiting[0] if waiting else None
        u = self.rng.random() * sum(weight[classes])
        chosen = classes[min(int(np.searchsorted(np.cumsum(weight[classes]), u, side="right")), len(classes) - 1)]
        return next(r for r in waiting if self.kind[r] == chosen)

    def place(self, g, r):
        """Find a place for request r, whose prefill ended on GPU g."""
        system, side = self.system, 0
        if system.sides > 1:
            side = int(np.searchsorted(np.cumsum(system.side_share[:, self.kind[r]]), self.rng.random(), side="right"))
        if system.role_stays[self.gpus[g].role]:
            target = g
        else:
            roles = [each for each in system.router_order if system.role_side[each] == side and self.free[each]]
            target = self.free[roles[0]].draw(self.rng) if roles else None
        if target != g:
            self.release(g, r)
        if target is None:
            self.buffers[side].append(r)
            self.deadline[r] = self.now + self.patience[r]
        else:
            self.send(target, r)
            self.relist(target)

    def send(self, g, r):
        gpu = self.gpus[g]
        gpu.slots_taken += 1
        gpu.joining.append(r)
        self.gpu[r] = g
        self.wake(g)

    def wake(self, g):
        if not self.gpus[g].runs and g != self.open:
            self.gpus[g].ends = self.now

    def fill_slots(self, g):
        gpu, system = self.gpus[g], self.system
        while (
            gpu.slots_taken < system.role_decode_slots[gpu.role]
            and gpu.slots_taken + gpu.prefilling < system.role_slots[gpu.role]
            and (r := self.next_decode(system.role_side[gpu.role])) is not None
        ):
            self.stop_waiting(r)
            self.send(g, r)
        self.relist(g)

    # What an engine does ----------------------------------------------------------------------------------------

    def boundary(self, g):
        gpu, self.open = self.gpus[g], g
        ran, ended = gpu.runs, []
        if ran:
            gpu.iterations += 1
            gpu.prefill_tokens += gpu.take
            gpu.decode_tokens += len(gpu.decodes)
            for r in gpu.decodes:
                self.computed[r] += 1
                self.generated[r] += 1
                self.worked[r] += 1
            ended = [r for r in gpu.decodes if self.generated[r] == self.trace.output_tokens[r]]
            for r in ended:
                gpu.decodes.remove(r)
                gpu.slots_taken -= 1
                self.finish(g, r)
        freed = None
        r = gpu.prompt
        if r is not None:
            self.computed[r] += gpu.take
            self.worked[r] += gpu.take
            if self.computed[r] == self.trace.prompt_tokens[r] + self.generated[r]:
                ended.append(r)
                gpu.prompt = None
                freed = self.end_prompt(g, r)
        self.watch_for_ties(g, ran, bool(ended))
        if self.system.gate_first:
            self.homeless = int(freed is not None)
            self.relist(g)
            self.gate()
            self.homeless = 0
        if freed is not None:
            self.relist(g)
            self.place(g, freed)
        self.fill_slots(g)
        self.gate()
        self.compose(g)
        self.open = None

    def end_prompt(self, g, r):
        """A token comes out; returns the request if it now looks for a place to decode."""
        gpu = self.gpus[g]
        self.generated[r] += 1
        if np.isnan(self.first_token[r]):
            self.first_token[r] = self.now
        was_decode = self.generated[r] > 1
        if not was_decode:
            gpu.prefilling = False
        if self.generated[r] == self.trace.output_tokens[r]:
            gpu.slots_taken -= was_decode
            self.finish(g, r)
            return None
        if was_decode:
            gpu.joining.append(r)
            return None
        return r

    def finish(self, g, r):
        self.finished[r] = self.now
        self.release(g, r)

    def give(self, g, r, tokens):
        """Blocks for that many tokens of request r; whether there were enough."""
        pool = self.gpus[g].pool
        need = -(-tokens // BLOCK) - len(self.owned[r]) if pool else 0
        if pool and need > len(pool.free):
            return False
        self.owned[r] += [pool.take() for _ in range(need)]
        return True

    def release(self, g, r):
        pool = self.gpus[g].pool
        for place in range(self.computed[r] // BLOCK if pool else 0):
            pool.holds[self.owned[r][place]] = (r, place)
        if pool:
            pool.put(self.owned[r])
        self.owned[r] = []

    def preempt(self, g, r):
        self.release(g, r)
        self.computed[r] = 0
        self.preemptions[r] += 1
        self.gpus[g].queue.appendleft(r)

    def compose(self, g):
        gpu = self.gpus[g]
        full = False
        for r in list(gpu.joining):
            if not self.owned[r] and full:
                continue
            if not self.owned[r] and gpu.pool:
                now = sum(self.computed[other] % BLOCK == 0 for other in gpu.decodes)
                full = -(-(self.computed[r] + 1) // BLOCK) > len(gpu.pool.free) - now
            if not full or self.owned[r]:
                assert self.owned[r] or self.give(g, r, self.computed[r])
                gpu.joining.remove(r)
                gpu.decodes.append(r)
        stopped, left = False, gpu.chunk
        gpu.take = 0
        short = [r for r in gpu.decodes if self.computed[r] % BLOCK == 0] if gpu.pool else []
        while gpu.pool and len(short) > len(gpu.pool.free):
            stopped = True
            if gpu.prompt is not None:
                self.preempt(g, gpu.prompt)
                gpu.prompt = None
            else:
                r = gpu.decodes.pop()
                self.preempt(g, r)
                short = [each for each in short if each != r]
        for r in short:
            assert self.give(g, r, self.computed[r] + 1)
        if gpu.prompt is not None:
            r = gpu.prompt
            gpu.take = min(self.trace.prompt_tokens[r] + self.generated[r] - self.computed[r], left)
            if not self.give(g, r, self.computed[r] + gpu.take):
                gpu.prompt, gpu.take, stopped = None, 0, True
                self.preempt(g, r)
        slots = max(self.system.role_slots[gpu.role], 1)
        if gpu.prompt is None and gpu.queue and not stopped and len(gpu.decodes) < slots:
            self.start(g, gpu.queue[0])
        gpu.runs = bool(gpu.decodes) or gpu.take > 0
        if not gpu.runs:
            gpu.ends = self.now if gpu.queue or gpu.joining else np.inf
            return
        kv = float(np.mean(self.computed[gpu.decodes])) if gpu.decodes else 0.0
        if gpu.take:
            time = gpu.curve.mixed(gpu.take, len(gpu.decodes), kv)
        else:
            time = gpu.curve.decode_only(len(gpu.decodes), kv)
        gpu.busy += time
        gpu.ends = self.now + time

    def start(self, g, r):
        """The first chunk of request r begins, if all its tokens fit, beside those of its blocks that are left."""
        gpu = self.gpus[g]
        target, kept = self.trace.prompt_tokens[r] + self.generated[r], []
        if gpu.pool:
            if -(-target // BLOCK) > len(gpu.pool.free):
                return
            while (len(kept) + 1) * BLOCK < target and (block := gpu.pool.find(r, len(kept))) is not None:
                kept.append(block)
            for block in kept:
                gpu.pool.free.remove(block)
                gpu.pool.holds.pop(block)
        self.owned[r], self.computed[r] = kept, len(kept) * BLOCK
        gpu.take = min(target - self.computed[r], gpu.chunk)
        assert self.give(g, r, self.computed[r] + gpu.take)
        gpu.queue.popleft()
        gpu.prompt = r
        if np.isnan(self.started[r]):
            self.started[r] = self.now

    def watch_for_ties(self, g, ran, decides):
        """Whether rounding alone may decide which of two GPUs comes first, where that makes a difference."""
        if not ran:
            return
        other, time, decided = self.last
        if other != g and self.now - time < SAME_TIME and (decides or decided):
            self.tied = True
        self.last = (g, self.now, decides or (decided and self.now - time < SAME_TIME))
