"""The rules of a policy in plain Python: what starts where after an event, with every request by its name.

Rules and their order inside one event are those of the compiled simulator (`fluidopt.simulation.kernel`): the request
whose prefill is done finds its place, freed slots take decodes that wait, the gate admits; with
`System.gate_first` the gate comes before these too. One event costs O(log I) in the number of classes and nothing that
grows with the number of GPUs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import Literal

import numpy as np

from fluidopt.errors import InvalidInput
from fluidopt.inputs import is_whole
from fluidopt.policy.selection import NOBODY, Pool, Tournament, WeightTree
from fluidopt.simulation.system import FEWEST_DECODES, System

RequestId = str | int
Choice = Literal["prefill-gpu", "decode-gpu", "side", "class"]
Choose = Callable[[Choice, Sequence[int], Sequence[float] | None], int]


@dataclass(frozen=True, slots=True)
class StartPrefill:
    """Start the prefill of a request on a GPU."""

    request: RequestId
    """The request."""
    gpu: int
    """Number of the GPU."""


@dataclass(frozen=True, slots=True)
class StartDecode:
    """Start the decode of a request on a GPU."""

    request: RequestId
    """The request."""
    gpu: int
    """Number of the GPU."""


Decision = StartPrefill | StartDecode


class Stage(StrEnum):
    """Where a request is on its way."""

    PREFILL_QUEUE = "waiting for its prefill"
    PREFILL = "in prefill"
    DECODE_QUEUE = "waiting for its decode"
    DECODE = "in decode"


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way; `place` is its GPU in service, its side while it waits for a decode, -1 before."""

    name: RequestId
    label: int
    stage: Stage = Stage.PREFILL_QUEUE
    place: int = -1


@dataclass(slots=True, eq=False)
class Gpu:
    """A GPU, the requests on it, and as what it is listed: `free` decode slots, `level` among the idle (-1: not)."""

    number: int
    role: int
    prefill: Request | None = None
    decodes: dict[RequestId, Request] = field(default_factory=dict)
    open: bool = True
    free: int = 0
    level: int = -1


Line = OrderedDict[RequestId, Request]
"""Requests first come, first served; any of them can leave in O(1)."""


class Dispatcher:
    """A fleet of GPUs and the requests in it under the rules of a `System`; takes valid events only.

    Args:
        system: the rules; its rates have no meaning here.
        rng: source of the random choices.
        choose: makes them instead (see `fluidopt.policy.controller.Controller`).
    """

    def __init__(self, system: System, *, rng: np.random.Generator, choose: Choose | None = None) -> None:
        self.system, self.rng, self.choose = system, rng, choose
        self.decisions: list[Decision] = []
        self._prefills: list[bool] = (system.role_prefill_mode >= 0).tolist()
        self._decode_slots: list[int] = system.role_decode_slots.tolist()
        self._slots: list[int] = system.role_slots.tolist()
        self._stays: list[bool] = (system.role_stays == 1).tolist()
        self._side: list[int] = system.role_side.tolist()
        self._keys = list(
            zip(system.gate_base.tolist(), system.gate_slope.tolist(), system.gate_queue_target.tolist(), strict=True)
        )
        self._roles_of_side: list[list[int]] = [[] for _ in range(system.sides)]
        for r in system.router_order.tolist():
            self._roles_of_side[self._side[r]].append(r)
        self._sides_of_class = [_open_shares(shares) for shares in system.side_share.T.tolist()]

        classes = range(system.classes)
        self.prefilling = [0] * system.classes  # X_i
        self.prefill_lines: list[Line] = [Line() for _ in (range(1) if system.gate_fcfs else classes)]
        self._tournament = Tournament([-np.inf] if system.gate_fcfs else system.gate_hold.tolist())
        self.decode_lines: list[Line] = [Line() for _ in range(system.sides)]  # of the classes without a weight
        self.weighted_lines = [{i: Line() for i in classes if row[i] > 0} for row in system.side_weight.tolist()]
        self._weights = [WeightTree(row) for row in system.side_weight.tolist()]
        self._waiting_classes: list[set[int]] = [set() for _ in range(system.sides)]  # of those with a weight

        levels = max(self._decode_slots) + 1 if system.placement == FEWEST_DECODES else 1
        self.free = [Pool() for _ in range(system.roles)]  # GPUs with a free decode slot
        self.idle = [Pool() for _ in range(levels)]  # GPUs on which a prefill may start, by level
        self._idle_levels = 0  # a bit for each level that has any
        self._free_slots = 0
        self._unplaced = 0  # decodes without a slot
        self.gpus: dict[int, Gpu] = {}
        self.next_gpu = 0
        for r, count in enumerate(system.role_gpus.tolist()):
            for _ in range(count):
                self._list(self.new_gpu(r))

    # Events -------------------------------------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        """A new request."""
        self.join(request)
        self._gate()

    def finish_prefill(self, request: Request) -> None:
        """The prefill of a request is done."""
        gpu = self.gpus[request.place]
        self._end_prefill(gpu, request)
        self._unplaced += 1
        self._settle(gpu, request)

    def finish_decode(self, request: Request) -> None:
        """The decode of a request is done, and the request leaves."""
        gpu = self.gpus[request.place]
        del gpu.decodes[request.name]
        self._settle(gpu)

    def abandon(self, request: Request) -> None:
        """A request leaves from wherever it is."""
        if request.stage is Stage.DECODE:
            self.finish_decode(request)
        elif request.stage is Stage.PREFILL:
            gpu = self.gpus[request.place]
            self._end_prefill(gpu, request)
            self._settle(gpu)
        else:
            self._leave(request)
            self._unplaced -= request.stage is Stage.DECODE_QUEUE
            self._gate()

    def add_gpu(self, role: int) -> Gpu:
        """A new GPU opens."""
        gpu = self.new_gpu(role)
        self._settle(gpu)
        return gpu

    def drain_gpu(self, gpu: Gpu) -> None:
        """Nothing more starts on a GPU, save the decode of a prefill whose role decodes where it prefills.

        No decision follows: the slack does not rise, and no GPU gets idle or free.
        """
        gpu.open = False
        self._list(gpu)

    def remove_gpu(self, gpu: Gpu) -> list[Request]:
        """A GPU is gone, and the requests on it are lost; returns them. No decision follows."""
        self.drain_gpu(gpu)
        lost = list(gpu.decodes.values())
        if gpu.prefill is not None:
            lost.insert(0, gpu.prefill)
            self._end_prefill(gpu, gpu.prefill)
        del self.gpus[gpu.number]
        return lost

    def _settle(self, gpu: Gpu, finished: Request | None = None) -> None:
        """What follows when slots of a GPU got free; `finished` is the request whose prefill is done."""
        self._list(gpu)
        if self.system.gate_first:
            self._gate()
        if finished is not None:
            self._seat(finished, gpu)
        self._fill(gpu)
        self._gate()

    # The gate -----------------------------------------------------------------------------------------------------

    def _gate(self) -> None:
        """Admit while a GPU is idle and a request waits that is not held back."""
        while self._idle_levels:
            line = self._tournament.best(self._free_slots - self._unplaced)
            if line < 0:
                return
            request = next(iter(self.prefill_lines[line].values()))
            level = (self._idle_levels & -self._idle_levels).bit_length() - 1
            gpu = self.gpus[self._draw("prefill-gpu", self.idle[level])]
            self._leave(request)
            self.put_prefill(gpu, request)
            self._list(gpu)
            self.decisions.append(StartPrefill(request.name, gpu.number))

    def _compete(self, i: int) -> None:
        """Rank class i anew after a change of X_i or of its queue."""
        if self.system.gate_fcfs:
            self._tournament.enter(0, (0.0, 0.0, 0) if self.prefill_lines[0] else NOBODY)
            return
        waiting = len(self.prefill_lines[i])
        base, slope, target = self._keys[i]
        rank = (base + slope * self.prefilling[i], target - waiting, i) if waiting else NOBODY
        self._tournament.enter(i, rank)

    # The router ---------------------------------------------------------------------------------------------------

    def _seat(self, request: Request, gpu: Gpu) -> None:
        """Find a place for the decode of a request whose prefill ended on a GPU."""
        if self._stays[gpu.role]:
            self._start_decode(gpu, request)
            return
        side = self._draw_side(request.label)
        for r in self._roles_of_side[side]:
            if self.free[r]:
                self._start_decode(self.gpus[self._draw("decode-gpu", self.free[r])], request)
                return
        request.stage, request.place = Stage.DECODE_QUEUE, side
        self.join(request)

    def _fill(self, gpu: Gpu) -> None:
        """Seat waiting decodes on a GPU while it has a free slot."""
        side = self._side[gpu.role]
        while gpu.free > 0:
            request = self._next_decode(side)
            if request is None:
                return
            self._leave(request)
            self._start_decode(gpu, request)

    def _next_decode(self, side: int) -> Request | None:
        """Who gets a free slot of a side."""
        line = self.decode_lines[side]
        if self._waiting_classes[side]:
            line = self.weighted_lines[side][self._draw_class(side)]
        return next(iter(line.values()), None)

    def _start_decode(self, gpu: Gpu, request: Request) -> None:
        self.put_decode(gpu, request)
        self._unplaced -= 1
        self._list(gpu)
        self.decisions.append(StartDecode(request.name, gpu.number))

    # Choices ------------------------------------------------------------------------------------------------------

    def _draw(self, kind: Choice, pool: Pool) -> int:
        """A GPU, uniform over the pool."""
        if len(pool) == 1:
            return pool.items[0]
        if self.choose is not None:
            return _ask(self.choose, kind, sorted(pool.items))
        return pool.items[int(self.rng.random() * len(pool))]

    def _draw_side(self, i: int) -> int:
        """A side for a decode of class i, by its shares."""
        sides, shares, cumulative = self._sides_of_class[i]
        if len(sides) == 1:
            return sides[0]
        if self.choose is not None:
            return _ask(self.choose, "side", sides, shares)
        return sides[min(bisect_right(cumulative, self.rng.random() * cumulative[-1]), len(sides) - 1)]

    def _draw_class(self, side: int) -> int:
        """One of the classes that wait on a side and have a weight there, by weight."""
        classes = self._waiting_classes[side]
        if len(classes) == 1:
            return next(iter(classes))
        if self.choose is not None:
            candidates = sorted(classes)
            return _ask(self.choose, "class", candidates, self.system.side_weight[side, candidates].tolist())
        tree = self._weights[side]
        return tree.find(self.rng.random() * tree.total)

    # State --------------------------------------------------------------------------------------------------------

    def join(self, request: Request) -> None:
        """A request comes last in its line."""
        line = self._line_of(request)
        line[request.name] = request
        self._follow(request, line)

    def _leave(self, request: Request) -> None:
        """A request leaves its line, from wherever in it it is."""
        line = self._line_of(request)
        del line[request.name]
        self._follow(request, line)

    def _line_of(self, request: Request) -> Line:
        """The line in which a waiting request stands."""
        if request.stage is Stage.PREFILL_QUEUE:
            return self.prefill_lines[0 if self.system.gate_fcfs else request.label]
        return self.weighted_lines[request.place].get(request.label, self.decode_lines[request.place])

    def _follow(self, request: Request, line: Line) -> None:
        """Bring what is known of a line up to date after a request joined or left it."""
        side, i = request.place, request.label
        if request.stage is Stage.PREFILL_QUEUE:
            self._compete(i)
        elif line is not self.decode_lines[side] and bool(line) != (i in self._waiting_classes[side]):
            self._waiting_classes[side] ^= {i}
            self._weights[side].switch(i, bool(line))

    def lines(self) -> list[Line]:
        """All lines, before the prefill and before the decode."""
        weighted = [line for lines in self.weighted_lines for line in lines.values()]
        return [*self.prefill_lines, *self.decode_lines, *weighted]

    def restore(self, request: Request) -> bool:
        """Put a request where it says it is, last in its line; `refresh` follows. False if it cannot be there."""
        if request.stage is Stage.PREFILL_QUEUE:
            self.join(request)
            return request.place == -1
        if request.stage is Stage.DECODE_QUEUE:
            if not 0 <= request.place < self.system.sides:
                return False
            self._unplaced += 1
            self.join(request)
            return True
        gpu = self.gpus.get(request.place)
        if gpu is None or len(gpu.decodes) + (gpu.prefill is not None) >= self._slots[gpu.role]:
            return False
        if request.stage is Stage.DECODE:
            self.put_decode(gpu, request)
            return len(gpu.decodes) <= self._decode_slots[gpu.role]
        fits = gpu.prefill is None and self._prefills[gpu.role]
        self.put_prefill(gpu, request)
        return fits

    def refresh(self) -> None:
        """List all GPUs anew after their number or their requests changed outside an event."""
        for pool in (*self.free, *self.idle):
            pool.arrange([])
        self._free_slots = self._idle_levels = 0
        for gpu in self.gpus.values():
            gpu.free, gpu.level = 0, -1
            self._list(gpu)

    def is_settled(self) -> bool:
        """Whether nobody waits beside a slot that the rules would give, as after every event."""
        if self._idle_levels and self._tournament.best(self._free_slots - self._unplaced) >= 0:
            return False
        waits = [bool(line or classes) for line, classes in zip(self.decode_lines, self._waiting_classes, strict=True)]
        return not any(pool and waits[self._side[r]] for r, pool in enumerate(self.free))

    def new_gpu(self, role: int) -> Gpu:
        """A GPU that is not listed yet."""
        gpu = self.gpus[self.next_gpu] = Gpu(self.next_gpu, role)
        self.next_gpu += 1
        return gpu

    def put_prefill(self, gpu: Gpu, request: Request) -> None:
        """Put a request in prefill; the caller lists the GPU again."""
        gpu.prefill = request
        request.stage, request.place = Stage.PREFILL, gpu.number
        self.prefilling[request.label] += 1
        self._compete(request.label)

    def put_decode(self, gpu: Gpu, request: Request) -> None:
        """Put a request in decode; the caller lists the GPU again."""
        gpu.decodes[request.name] = request
        request.stage, request.place = Stage.DECODE, gpu.number

    def _end_prefill(self, gpu: Gpu, request: Request) -> None:
        gpu.prefill = None
        self.prefilling[request.label] -= 1
        self._compete(request.label)

    def _list(self, gpu: Gpu) -> None:
        """Bring the pools and the number of free decode slots up to date after a change of a GPU."""
        r, decodes, running = gpu.role, len(gpu.decodes), gpu.prefill is not None
        free = min(self._decode_slots[r], self._slots[r] - running) - decodes if gpu.open else 0
        if (free > 0) != (gpu.free > 0):
            if free > 0:
                self.free[r].add(gpu.number)
            else:
                self.free[r].remove(gpu.number)
        self._free_slots += free - gpu.free
        gpu.free = free
        level = -1
        if self._prefills[r] and gpu.open and not running and decodes < self._slots[r]:
            level = min(decodes, len(self.idle) - 1)
        if level == gpu.level:
            return
        if gpu.level >= 0:
            pool = self.idle[gpu.level]
            pool.remove(gpu.number)
            if not pool:
                self._idle_levels ^= 1 << gpu.level
        if level >= 0:
            self.idle[level].add(gpu.number)
            self._idle_levels |= 1 << level
        gpu.level = level


def _open_shares(shares: list[float]) -> tuple[list[int], list[float], list[float]]:
    """The sides that a class goes to, their shares, and the running sums of these."""
    sides = [s for s, share in enumerate(shares) if share > 0]
    open_shares = [shares[s] for s in sides]
    return sides, open_shares, list(accumulate(open_shares))


def _ask(choose: Choose, kind: Choice, candidates: list[int], weights: list[float] | None = None) -> int:
    """The candidate chosen."""
    index = choose(kind, tuple(candidates), None if weights is None else tuple(weights))
    if not is_whole(index, least=0, most=len(candidates) - 1):
        raise InvalidInput(
            f"choose({kind!r}): must return an index into the {len(candidates)} candidates; got {index!r}"
        )
    return candidates[int(index)]
