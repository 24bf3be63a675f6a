"""The events of a replication of the chain one by one, every request by its number, and what was decided after each."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from fluidopt.policy.dispatch import Decision, StartDecode, StartPrefill
from fluidopt.simulation.run import Run
from fluidopt.simulation.state import (
    ABANDONS,
    ARRIVES,
    DECODE_ENDS,
    DECODE_STARTS,
    JOINS,
    LEAVES,
    PREFILL_ENDS,
    PREFILL_STARTS,
)
from fluidopt.simulation.system import Start, System

_EVENTS: dict[int, Literal["arrive", "prefill_done", "decode_done", "abandon"]] = {
    ARRIVES: "arrive",
    PREFILL_ENDS: "prefill_done",
    DECODE_ENDS: "decode_done",
    ABANDONS: "abandon",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedEvent:
    """One event and what followed at once.

    Attributes:
        time: when, s.
        kind: what happened: the name of the method by which a controller is told of it.
        request: number of the request to which it happened, in the order of arrival.
        label: index of its class.
        side: side whose buffer it joined, -1 if it joined none; of a prefill that is done.
        decisions: what was started on which GPU, in the order in which it was.
    """

    time: float
    kind: Literal["arrive", "prefill_done", "decode_done", "abandon"]
    request: int
    label: int
    side: int
    decisions: tuple[Decision, ...]


def record(system: System, *, horizon: float, rng: np.random.Generator) -> list[RecordedEvent]:
    """Run the compiled simulator from the empty fleet to `horizon` (s) and tell its events, about 4 us each.

    The path is that of `fluidopt.simulation.run.simulate` from an equal generator. Decodes of one class on one GPU
    cannot be told apart: the one that started first counts as the first to end.
    """
    run = Run(system, Start.empty(system), rng, log=True)
    run.advance(horizon)
    return list(_told(run.logged(), system.classes))


def _told(log: np.ndarray[tuple[int], np.dtype[np.void]], classes: int) -> Iterator[RecordedEvent]:
    """The rows as events. Each begins with the row of what happened."""
    what, tags, places = (log[name].tolist() for name in ("what", "tag", "where"))
    begins = np.flatnonzero(np.isin(log["what"], list(_EVENTS))).tolist()
    prefilling: dict[int, int] = {}  # by GPU
    decoding: defaultdict[tuple[int, int], deque[int]] = defaultdict(deque)  # by GPU and class
    waiting: dict[int, int] = {}  # by record in the pool
    arrived = 0
    for begin, end in pairwise([*begins, len(log)]):
        kind, label, place = what[begin], tags[begin] % classes, places[begin]
        if kind == ARRIVES:
            request = arrived
            arrived += 1
        elif kind == PREFILL_ENDS:
            request = prefilling.pop(place)
        elif kind == DECODE_ENDS:
            request = decoding[place, label].popleft()
        else:
            request = waiting[place]
        moving, side = request, -1  # who starts, unless somebody leaves a queue for it
        decisions: list[Decision] = []
        for row in range(begin + 1, end):
            place = places[row]
            if what[row] == JOINS:
                waiting[place] = request
                side = tags[row] // classes - 1
            elif what[row] == LEAVES:
                moving = waiting.pop(place)
            elif what[row] == PREFILL_STARTS:
                prefilling[place] = moving
                decisions.append(StartPrefill(moving, place))
            elif what[row] == DECODE_STARTS:
                decoding[place, tags[row] % classes].append(moving)
                decisions.append(StartDecode(moving, place))
            if what[row] in (PREFILL_STARTS, DECODE_STARTS):
                moving = request
        yield RecordedEvent(
            time=float(log["time"][begin]),
            kind=_EVENTS[kind],
            request=request,
            label=label,
            side=side,
            decisions=tuple(decisions),
        )
