"""The generator of the exact chain: states enumerated breadth first from the empty fleet, and their rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from fluidopt.chain.moves import (
    DONE,
    FOLLOW_GATE,
    Found,
    Tables,
    accumulate,
    explore,
    find,
    pack,
    rehash,
    successors,
    tables,
    unpack,
    work,
    write_row,
)
from fluidopt.chain.states import Configurations, Layout
from fluidopt.errors import InvalidInput
from fluidopt.simulation.system import FloatArray, IntArray, System

KNOWN = {
    "arrival_rate",
    "prompt_tokens",
    "output_tokens",
    "abandonment_rate",
    "mode_chunk",
    "mode_time",
    "role_gpus",
    "role_prefill_mode",
    "role_rest_mode",
    "role_decode_slots",
    "role_slots",
    "gate_slope",
    "gate_base",
    "gate_queue_target",
    "gate_hold",
    "router_order",
    "placement",
    "prefill_reward",
    "decode_reward",
}
"""Fields of a `System` whose meaning the chain implements."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """Stationary or transient means of a law over the states, totals of the fleet.

    Attributes:
        prefill_queue, decode_queue: (I,) requests waiting.
        prefill, decode: (R, I) requests in service.
        admitted, throughput: (I,) prefills and decodes completed, 1/s.
        prefill_marginal, decode_marginal: law of the two queues' total lengths.
    """

    prefill_queue: FloatArray
    decode_queue: FloatArray
    prefill: FloatArray
    decode: FloatArray
    admitted: FloatArray
    throughput: FloatArray
    prefill_marginal: FloatArray
    decode_marginal: FloatArray


@dataclass(frozen=True, eq=False, kw_only=True)
class StateSpace:
    """The reachable states of a layout, numbered; state 0 is the empty fleet.

    Attributes:
        layout: what a state is.
        configurations: of one GPU.
        keys: (S,) the states, packed.
        flags: (S,) 0, or 1 where the prefill queue's cap turns an arrival away, 2 where the decode queue's cap turns a
            finished prefill away, 3 where both do.
    """

    layout: Layout
    configurations: Configurations
    keys: IntArray
    flags: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return int(self.keys.size)

    @cached_property
    def _tables(self) -> Tables:
        return tables(self.layout, self.configurations)

    def describe(self, number: int) -> str:
        """One state in words."""
        s, c = self.layout.system, self.configurations
        x = np.zeros(len(self.layout.radices()), dtype=np.int64)
        unpack(self._tables, int(self.keys[number]), x)
        gpus = [
            f"role {r}: prefill {'-' if c.prefill[k] < 0 else c.prefill[k]}, decodes {c.decodes[k].tolist()}"
            for r, k in zip(np.repeat(np.arange(s.roles), s.role_gpus), x[: s.gpus], strict=True)
        ]
        queue, rest = x[s.gpus : s.gpus + s.classes].tolist(), x[s.gpus + s.classes :]
        word = [int(i) - 1 for i in rest[: self.layout.ordered_places] if i > 0]
        tail = rest[self.layout.ordered_places :].tolist()
        return f"{'; '.join(gpus)}; prefill queue {queue}; decode queue {word} then {tail}"

    def means(self, law: FloatArray) -> Means:
        """Means under `law`, (S,)."""
        s = self.layout.system
        out, flow = np.zeros((s.classes, 2 + 2 * s.roles)), np.zeros((s.classes, 2))
        prefill_marginal = np.zeros(self.layout.prefill_queue_cap + 1)
        decode_marginal = np.zeros(self.layout.decode_queue_cap + 1)
        x = np.zeros(len(self.layout.radices()), dtype=np.int64)
        accumulate(self._tables, self.keys, law, x, out, flow, prefill_marginal, decode_marginal)
        return Means(
            prefill_queue=out[:, 0],
            decode_queue=out[:, 1],
            prefill=out[:, 2 : 2 + s.roles].T,
            decode=out[:, 2 + s.roles :].T,
            admitted=flow[:, 0],
            throughput=flow[:, 1],
            prefill_marginal=prefill_marginal,
            decode_marginal=decode_marginal,
        )

    def rows(self, action: int) -> sparse.csr_array:
        """The generator's rows under one action in every state (`moves.FOLLOW_GATE`, a class, or I to hold).

        For a dynamic program over a space enumerated with all its actions; (S, S), diagonal included.
        """
        slots = np.full(_table_size(len(self)), -1, dtype=np.int32)
        found = Found(keys=self.keys, slots=slots, size=np.array([len(self)]))
        rehash(found)
        w = work(self.layout)
        scratch = np.zeros((3, w.stack.shape[1]), dtype=np.int64)
        starts, columns, rates = [0], [], []
        for row in range(len(self)):
            unpack(self._tables, int(self.keys[row]), scratch[0])
            successors(self._tables, w, scratch[0], action, found, False, scratch[2], scratch[1])
            used = int(w.used[1])
            if np.any(w.columns[:used] < 0):
                raise InvalidInput(f"rows: action {action} leads out of these states; enumerate with it")
            column, rate = np.empty(used + 1, dtype=np.int32), np.empty(used + 1)
            size = write_row(w, row, column, rate)
            columns.append(column[:size])
            rates.append(rate[:size])
            starts.append(starts[-1] + size)
        return _as_matrix(np.array(starts), np.concatenate(columns), np.concatenate(rates))


def check_known(system: System) -> None:
    """Raise if the system uses a rule that the chain does not implement.

    Raises:
        InvalidInput: naming the field.
    """
    implemented: dict[str, Any] = {name: getattr(system, name) for name in KNOWN}
    plain = System(**implemented)
    for field in fields(system):
        if not np.array_equal(getattr(system, field.name), getattr(plain, field.name), equal_nan=True):
            raise InvalidInput(
                f"exact_chain: the chain does not implement System.{field.name}; got "
                f"{getattr(system, field.name)!r}. Simulate instead (Policy.simulate)."
            )


def enumerate_chain(
    layout: Layout, *, actions: Sequence[int] = (FOLLOW_GATE,)
) -> tuple[StateSpace, sparse.csr_array | None]:
    """The reachable states under any of the actions and, with one action, the generator.

    The generator is (S, S) in CSR with sorted columns, 1/s, rows summing to zero. Costs about
    1 us per transition. The caller has had the layout refuse what does not fit; with an action that holds, the layout
    must be `holding`.
    """
    configurations = Configurations.of(layout.system)
    t, w = tables(layout, configurations), work(layout)
    room, single = int(w.columns.size), len(actions) == 1
    keys = np.empty(room * len(actions) + 1024, dtype=np.int64)
    slots = np.full(_table_size(keys.size), -1, dtype=np.int32)
    found = Found(keys=keys, slots=slots, size=np.zeros(1, dtype=np.int64))
    starts = np.zeros(keys.size + 1, dtype=np.int64)
    flags = np.zeros(keys.size, dtype=np.uint8)
    columns = np.empty(16 * keys.size if single else 0, dtype=np.int32)
    rates = np.empty(columns.size)
    scratch = np.zeros((3, w.stack.shape[1]), dtype=np.int64)
    empty = np.zeros(w.stack.shape[1], dtype=np.int64)
    empty[: layout.system.gpus] = configurations.first[t.role_of]
    find(found, pack(t, empty), True)
    chosen = np.array(actions, dtype=np.int64)
    row = 0
    while True:
        status, row = explore(t, w, found, chosen, row, starts, columns, rates, flags, scratch)
        if status == DONE:
            break
        count = int(found.size[0])
        if count + room * len(actions) > found.keys.size:
            size = int(1.5 * found.keys.size) + room * len(actions)
            starts, flags = _longer(starts, size + 1), _longer(flags, size)
            found = found._replace(keys=_longer(found.keys, size))
        if 2 * (count + room * len(actions)) > found.slots.size:
            found = found._replace(slots=np.full(2 * found.slots.size, -1, dtype=np.int32))
            rehash(found)
        if single and starts[row] + room > columns.size:
            columns = _longer(columns, int(1.5 * columns.size) + room)
            rates = _longer(rates, columns.size)
    count = int(found.size[0])
    space = StateSpace(
        layout=layout, configurations=configurations, keys=found.keys[:count].copy(), flags=flags[:count].copy()
    )
    del found, slots, keys
    if not single:
        return space, None
    used = int(starts[count])
    return space, _as_matrix(starts[: count + 1], columns[:used], rates[:used])


def _as_matrix(starts: IntArray, columns: npt.NDArray[np.int32], rates: FloatArray) -> sparse.csr_array:
    index = np.int32 if columns.size < 2**31 else np.int64
    parts = (rates, columns.astype(index, copy=False), starts.astype(index))
    return sparse.csr_array(parts, shape=(starts.size - 1, starts.size - 1))


def _longer(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    longer = np.zeros(size, dtype=array.dtype)
    longer[: array.size] = array
    return longer


def _table_size(entries: int) -> int:
    return 1 << (2 * entries + 2).bit_length()
