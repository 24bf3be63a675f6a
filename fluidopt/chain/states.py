"""What a state of the exact chain is: its layout, its packing into one integer, and their number before they exist.

A state lists, role by role and sorted within a role (its GPUs are exchangeable), the *configuration* of every GPU: the
class of its prefill, if one runs, and its decodes by class. Then the prefill queue's length of each class (a queue is
FCFS inside a class, so lengths suffice), then the decode buffer. The buffer is one FCFS queue over all classes, and
which class stands at its head depends on the order in which prefills ended. That order is correlated with the rest of
the state, so no draw of the head from counts alone gives the same law: the exact state holds the buffer as a word. A
word over I classes costs I^length states. `Layout.ordered_places` bounds the price: so many places at the head are a
word, the requests behind it are counts by class, of which one is drawn in proportion when a place in the word comes
free. That is exact if the word holds the whole buffer or there is one class; else an approximation, whose totals over
classes are still exact where the classes have equal D_i and theta_i, and which converges as places are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import comb, prod

import numpy as np
import numpy.typing as npt

from fluidopt.errors import InvalidInput
from fluidopt.simulation.system import FloatArray, IntArray, System

KEY_LIMIT = 2**62
"""A packed state is one integer below this."""

GIB = 2**30


def _orders(classes: int, size: int) -> int:
    """Ways to split `size` requests over the classes."""
    return comb(size + classes - 1, classes - 1)


def _up_to(classes: int, size: int) -> int:
    """Ways to hold at most `size` requests."""
    return comb(size + classes, classes) if size >= 0 else 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The state space of `system` with its queues cut off, before anything is allocated.

    Attributes:
        system: the dynamics.
        prefill_queue_cap: most requests waiting for prefill, all classes together; more are turned away.
        decode_queue_cap: most requests in the decode buffer; a finished prefill that finds it full is turned away.
        ordered_places: places at the head of the buffer whose class is kept in order (module docstring).
        holding: whether a decision rule may leave a request waiting beside an idle GPU.
    """

    system: System
    prefill_queue_cap: int
    decode_queue_cap: int
    ordered_places: int
    holding: bool = False

    @property
    def exact(self) -> bool:
        """Whether the buffer's order is kept in full, or there is none to keep."""
        return self.system.classes == 1 or self.ordered_places >= self.decode_queue_cap

    @property
    def tail_cap(self) -> int:
        """Most requests of the buffer behind the word."""
        return self.decode_queue_cap - self.ordered_places

    def buffer_states(self) -> int:
        """Contents of the decode buffer, the empty one included."""
        classes, places = self.system.classes, self.ordered_places
        shorter = sum(classes**length for length in range(places))
        return int(shorter + classes**places * _up_to(classes, self.tail_cap))

    def states(self) -> int:
        """Upper bound of the number of states, exact but for what the dynamics never reach.

        Counts sorted configurations: a decode waits only where no GPU has a free decode slot, a prefill (unless
        `holding`) only where none that may prefill is idle.
        """
        everywhere = {"any": 1, "full": 1, "busy": 1, "both": 1}
        for r in range(self.system.roles):
            for kind, count in self._configurations(r).items():
                everywhere[kind] *= comb(count + int(self.system.role_gpus[r]) - 1, int(self.system.role_gpus[r]))
        if self.holding:
            everywhere["busy"], everywhere["both"] = everywhere["any"], everywhere["full"]
        queues = _up_to(self.system.classes, self.prefill_queue_cap) - 1
        buffers = self.buffer_states() - 1
        return (
            everywhere["any"]
            + queues * everywhere["busy"]
            + buffers * everywhere["full"]
            + queues * buffers * everywhere["both"]
        )

    def _configurations(self, r: int) -> dict[str, int]:
        """Configurations of a GPU of role r: any; without a free decode slot; unable to start a prefill; both."""
        s, classes = self.system, self.system.classes
        decodes, slots = int(s.role_decode_slots[r]), int(s.role_slots[r])
        if s.role_prefill_mode[r] < 0:
            full = _orders(classes, decodes)
            total = _up_to(classes, decodes)
            return {"any": total, "full": full, "busy": total, "both": full}
        beside = min(decodes, slots - 1)
        running, running_full = classes * _up_to(classes, beside), classes * _orders(classes, beside)
        blocked = _orders(classes, decodes) if decodes >= slots else 0
        return {
            "any": running + _up_to(classes, decodes),
            "full": running_full + _orders(classes, decodes),
            "busy": running + blocked,
            "both": running_full + blocked,
        }

    def transitions_per_state(self) -> int:
        """Rough upper bound of the mean number of distinct successors."""
        s = self.system
        gpus, classes = int(s.gpus), s.classes
        prefilling = int(s.role_gpus[s.role_prefill_mode >= 0].sum())
        decoding = int(s.role_gpus[s.role_decode_slots > 0].sum())
        waiting = 2 * classes + self.ordered_places // 2
        spread = 1 if gpus <= 2 else 2
        return classes + waiting + spread * (prefilling + decoding * classes)

    def memory(self) -> int:
        """Estimated bytes of enumeration, generator and iterative solution together, at their peak."""
        states, nnz = self.states(), self.states() * (1 + self.transitions_per_state())
        # keys, hash table while it doubles, flags, diagonal; a dozen vectors of the Krylov iteration
        per_state = 8 + 4 * 12 + 1 + 8 + 14 * 8
        # rows while they grow; the generator, its transpose and the incomplete factors
        per_entry = 40
        tables = (
            sum(self._configurations(r)["any"] for r in range(self.system.roles)) * (8 + 4 * self.system.classes) * 8
        )
        return states * per_state + nnz * per_entry + tables

    def refuse(self, *, max_states: int, memory_limit: float, why: str = "") -> None:
        """Raise unless the chain fits.

        Raises:
            InvalidInput: naming estimate, limit and what to do instead.
        """
        states, memory = self.states(), self.memory()
        caps = f"prefill_queue_cap={self.prefill_queue_cap}, decode_queue_cap={self.decode_queue_cap}"
        words = "" if self.exact and self.system.classes == 1 else f", ordered_places={self.ordered_places}"
        instead = "Simulate instead (Policy.simulate), or use fewer GPUs, slots or classes, or lower caps"
        if self.system.classes != 1 and self.ordered_places > 0:
            instead += ", or keep fewer places of the decode buffer in order (ordered_places, approximate)"
        if states > max_states:
            raise InvalidInput(
                f"exact_chain: the chain has up to {states:,} states with {caps}{words}, more than "
                f"max_states={max_states:,}{why}. {instead}."
            )
        if memory > memory_limit:
            raise InvalidInput(
                f"exact_chain: the chain ({states:,} states with {caps}{words}) needs about {memory / GIB:.2f} GiB, "
                f"more than memory_limit={memory_limit / GIB:.2f} GiB{why}. {instead}."
            )
        if prod(self.radices()) > KEY_LIMIT:
            raise InvalidInput(f"exact_chain: a state with {caps}{words} does not fit into 62 bits. {instead}.")

    def radices(self) -> list[int]:
        """Number of values of each entry of a state, in the order of the layout."""
        s = self.system
        gpus = [self._configurations(r)["any"] for r in range(s.roles) for _ in range(s.role_gpus[r])]
        queues = [self.prefill_queue_cap + 1] * s.classes
        word = [s.classes + 1] * self.ordered_places
        return gpus + queues + word + [self.tail_cap + 1] * s.classes

    @cached_property
    def multipliers(self) -> IntArray:
        """Weights that pack a state into an integer."""
        radices = self.radices()
        return np.array([prod(radices[k + 1 :]) for k in range(len(radices))], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Configurations:
    """Every configuration of one GPU, role after role.

    Attributes:
        first: (R + 1,) where a role's configurations begin.
        prefill: (K,) class of the running prefill, -1 for none.
        decodes: (K, I) decodes by class.
        room: (K,) decodes that can be added.
        idle: (K,) whether a prefill can start.
        added, removed, started: (K, I) the configuration after a decode more, a decode less, a prefill started; -1
            where impossible.
        finished: (K,) the configuration after its prefill ended, -1 if none runs.
    """

    first: IntArray
    prefill: IntArray
    decodes: IntArray
    room: IntArray
    idle: npt.NDArray[np.bool_]
    added: IntArray
    removed: IntArray
    started: IntArray
    finished: IntArray

    @classmethod
    def of(cls, system: System) -> Configurations:
        """Enumerate them; the first of each role is the empty GPU."""
        classes = system.classes
        listed: list[tuple[int, int, tuple[int, ...]]] = []
        first = [0]
        for r in range(system.roles):
            prefills = range(-1, classes) if system.role_prefill_mode[r] >= 0 else (-1,)
            vectors = _vectors(classes, int(system.role_decode_slots[r]))
            listed += [(r, p, d) for p, d in product(prefills, vectors) if sum(d) + (p >= 0) <= system.role_slots[r]]
            first.append(len(listed))
        index = {configuration: k for k, configuration in enumerate(listed)}
        shape = (len(listed), classes)
        added, removed, started = (np.full(shape, -1, dtype=np.int64) for _ in range(3))
        finished = np.full(len(listed), -1, dtype=np.int64)
        for k, (r, p, d) in enumerate(listed):
            for i in range(classes):
                more = (*d[:i], d[i] + 1, *d[i + 1 :])
                fewer = (*d[:i], d[i] - 1, *d[i + 1 :])
                added[k, i] = index.get((r, p, more), -1)
                removed[k, i] = index.get((r, p, fewer), -1)
                if p < 0:
                    started[k, i] = index.get((r, i, d), -1)
            if p >= 0:
                finished[k] = index[(r, -1, d)]
        return cls(
            first=np.array(first, dtype=np.int64),
            prefill=np.array([p for _, p, _ in listed], dtype=np.int64),
            decodes=np.array([d for _, _, d in listed], dtype=np.int64).reshape(shape),
            room=np.array(
                [
                    min(system.role_decode_slots[r] - sum(d), system.role_slots[r] - sum(d) - (p >= 0))
                    for r, p, d in listed
                ],
                dtype=np.int64,
            ),
            idle=started[:, 0] >= 0,
            added=added,
            removed=removed,
            started=started,
            finished=finished,
        )

    def rates(self, system: System) -> tuple[FloatArray, FloatArray]:
        """Rate of the prefill's end, (K,), and of each decode's, (K, I), 1/s ([L26] eq. (4), at the GPU's present
        mode)."""
        role = np.repeat(np.arange(system.roles), np.diff(self.first))
        running = self.prefill >= 0
        prefill = np.where(running, system.prefill_rates()[role, self.prefill], 0.0)
        speed = system.decode_speeds()[role, running.astype(int)]
        return prefill, speed[:, None] / system.output_tokens


def _vectors(classes: int, most: int) -> list[tuple[int, ...]]:
    """Nonnegative integer vectors with sum at most `most`, the zero vector first."""
    if classes == 0:
        return [()]
    return [(k, *rest) for k in range(most + 1) for rest in _vectors(classes - 1, most - k)]
