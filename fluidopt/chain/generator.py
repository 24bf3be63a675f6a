"""The generator of the exact chain: states enumerated breadth first from the empty fleet, and their rates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from fluidopt.chain.means import Means
from fluidopt.chain.moves import DONE, GROW_ROW, accumulate, count_waiting, explore, work
from fluidopt.chain.packing import Found, Tables, find, pack, rehash, table_size, tables, unpack
from fluidopt.chain.states import Configurations, Layout
from fluidopt.simulation.system import FloatArray, IntArray


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
        queue, *buffers = [self._line(x, word, count) for word, count in self.layout.starts]
        return f"{'; '.join(gpus)}; prefill queue {queue}; decode queue {', '.join(buffers)}"

    def _line(self, x: IntArray, word: int, count: int) -> str:
        counts = str(x[count : count + self.layout.system.classes].tolist())
        return f"{[int(i) - 1 for i in x[word:count] if i > 0]} then {counts}" if word < count else counts

    def waiting(self) -> IntArray:
        """(S, 2) requests that wait for a prefill and for a decode."""
        lengths = np.empty((len(self), 2), dtype=np.int64)
        count_waiting(self._tables, self.keys, np.zeros(len(self.layout.radices()), dtype=np.int64), lengths)
        return lengths

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


def enumerate_chain(layout: Layout) -> tuple[StateSpace, sparse.csr_array]:
    """The reachable states and the generator.

    The generator is (S, S) in CSR with sorted columns, 1/s, rows summing to zero. Costs about 0.5 us per transition.
    The caller has had the layout refuse what does not fit.
    """
    configurations = Configurations.of(layout.system)
    t, w = tables(layout, configurations), work(layout)
    keys = np.empty(2048, dtype=np.int64)
    slots = np.full(table_size(keys.size), -1, dtype=np.int32)
    found = Found(keys=keys, slots=slots, size=np.zeros(1, dtype=np.int64))
    starts = np.zeros(keys.size + 1, dtype=np.int64)
    flags = np.zeros(keys.size, dtype=np.uint8)
    columns = np.empty(16 * keys.size, dtype=np.int32)
    rates = np.empty(columns.size)
    scratch = np.zeros((2, w.stack.shape[1]), dtype=np.int64)
    empty = np.zeros(w.stack.shape[1], dtype=np.int64)
    empty[: layout.system.gpus] = configurations.first[t.role_of]
    find(found, pack(t, empty), True)
    row = 0
    while True:
        status, row = explore(t, w, found, row, starts, columns, rates, flags, scratch)
        if status == DONE:
            break
        if status == GROW_ROW:
            w = work(layout, 2 * w.columns.size)
        count, room = int(found.size[0]), w.columns.size + 1
        if count + room > found.keys.size:
            size = int(1.5 * found.keys.size) + room
            starts, flags = longer(starts, size + 1), longer(flags, size)
            found = found._replace(keys=longer(found.keys, size))
        while 2 * (count + room) > found.slots.size:
            found = found._replace(slots=np.full(2 * found.slots.size, -1, dtype=np.int32))
            rehash(found)
        if starts[row] + room > columns.size:
            columns = longer(columns, int(1.5 * columns.size) + room)
            rates = longer(rates, columns.size)
    count = int(found.size[0])
    space = StateSpace(
        layout=layout, configurations=configurations, keys=found.keys[:count].copy(), flags=flags[:count].copy()
    )
    del found, slots, keys
    used = int(starts[count])
    return space, _as_matrix(starts[: count + 1], columns[:used], rates[:used])


def _as_matrix(starts: IntArray, columns: npt.NDArray[np.int32], rates: FloatArray) -> sparse.csr_array:
    index = np.int32 if columns.size < 2**31 else np.int64
    parts = (rates, columns.astype(index, copy=False), starts.astype(index))
    return sparse.csr_array(parts, shape=(starts.size - 1, starts.size - 1))


def longer(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """A copy with so many rows, the new ones 0."""
    copy = np.zeros((size, *array.shape[1:]), dtype=array.dtype)
    copy[: len(array)] = array
    return copy
