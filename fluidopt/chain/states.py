"""What a state of the exact chain is: its layout, its packing into one integer, and their number before they exist.

A state lists, role by role and sorted within a role (its GPUs are exchangeable), the *configuration* of every GPU: the
class of its prefill, if one runs, and its decodes by class. Then the lines of those who wait: one before the prefill,
and one before the decode for every side of the fleet.

Of most classes in a line the number suffices: before the prefill a queue is FCFS inside a class, and so is a buffer
inside a class with a weight. The others of a line stand in one FCFS queue: all classes if admission is first come first
served, and in a buffer those without a weight. Which of them stands at the head depends on the order in which they
came. That order is correlated with the rest of the state, so no draw of the head from counts alone gives the same law:
the exact state holds the queue as a word. A word over k classes costs k^length states. `Layout.ordered_places` bounds
the price: so many places at the head are a word, the requests behind it are counts by class, of which one is drawn in
proportion when a place in the word comes free. That is exact if the word holds the whole queue or it has one class;
else an approximation, which converges as places are added and whose totals over classes are still exact where the
classes have equal theta_i and, of a buffer, equal D_i.
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

KEY_BITS = 62
"""A packed state is one integer of so many bits."""

GIB = 2**30


def _orders(classes: int, size: int) -> int:
    """Ways to split `size` requests over the classes."""
    return comb(size + classes - 1, size) if classes > 0 else int(size == 0)


def up_to(classes: int, size: int) -> int:
    """Ways to hold at most `size` requests."""
    return comb(size + classes, classes) if size >= 0 else 0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of those who wait: a word of the classes at its head, then a count per class.

    Attributes:
        cap: most requests in it.
        places: length of the word.
        ordered: classes that stand in one FCFS queue, of which the word is the head.
        unordered: classes of which the number is all that matters. A class in neither never comes here.
    """

    cap: int
    places: int
    ordered: tuple[int, ...]
    unordered: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether the order is kept in full, or there is none to keep."""
        return len(self.ordered) <= 1 or self.places >= self.cap

    def contents(self, length: int) -> int:
        """Number of contents with so many requests."""
        return sum(
            self._queues(queued) * _orders(len(self.unordered), length - queued)
            for queued in (range(length + 1) if self.ordered else (0,))
        )

    def _queues(self, length: int) -> int:
        classes = len(self.ordered)
        word = min(length, self.places)
        return int(classes**word * _orders(classes, length - word))

    def radices(self, classes: int) -> list[int]:
        """Number of values of each entry: the word (0 is an empty place), then the counts."""
        behind = self.cap - self.places
        counts = [
            behind + 1 if i in self.ordered else self.cap + 1 if i in self.unordered else 1 for i in range(classes)
        ]
        return [classes + 1] * self.places + counts


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The state space of `system` with its queues cut off, before anything is allocated.

    Attributes:
        system: the dynamics.
        prefill_queue_cap: most requests waiting for prefill, all classes together; more are turned away.
        decode_queue_cap: most requests waiting for decode, in all buffers together; a finished prefill that finds them
            full and no free slot is turned away.
        ordered_places: places at the head of each FCFS queue over several classes that are kept in order (module
            docstring); more than its cap are its cap.
    """

    system: System
    prefill_queue_cap: int
    decode_queue_cap: int
    ordered_places: int

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """The line before the prefill, then that of each side."""
        s = self.system
        everyone = tuple(range(s.classes))
        prefilling = (s.role_prefill_mode >= 0) & (s.role_gpus > 0)
        leaves = bool(np.any(prefilling & (s.role_stays == 0)))  # else nobody ever waits for a decode
        lines = [self._line(self.prefill_queue_cap, *((everyone, ()) if s.gate_fcfs else ((), everyone)))]
        for share, weight in zip(s.side_share, s.side_weight, strict=True):
            comes = [i for i in everyone if share[i] > 0 and leaves]
            ordered, unordered = (tuple(i for i in comes if (weight[i] > 0) == weighted) for weighted in (False, True))
            lines.append(self._line(self.decode_queue_cap if comes else 0, ordered, unordered))
        return tuple(lines)

    def _line(self, cap: int, ordered: tuple[int, ...], unordered: tuple[int, ...]) -> Line:
        places = min(self.ordered_places, cap) if len(ordered) > 1 else 0
        return Line(cap=cap, places=places, ordered=ordered, unordered=unordered)

    @property
    def exact(self) -> bool:
        """Whether the order of every line is kept in full, or there is none to keep."""
        return all(line.exact for line in self.lines)

    @cached_property
    def holding(self) -> bool:
        """Whether the gate may leave a request waiting beside an idle GPU."""
        return bool(np.any(self.system.gate_hold > -np.inf))

    def states(self) -> int:
        """Upper bound of the number of states, exact but for what the dynamics never reach.

        Counts sorted configurations: a decode waits only where no GPU of its side has a free decode slot, a prefill
        (unless `holding`) only where none that may prefill is idle.
        """
        s, (queue, *buffers) = self.system, self.lines
        queues = sum(queue.contents(length) for length in range(1, queue.cap + 1))
        total = 0
        for waits in product((False, True), repeat=len(buffers)):
            some_wait, none_waits = 1, 1
            for r in range(s.roles):
                kinds, gpus = self.configurations(r), int(s.role_gpus[r])
                full = waits[s.role_side[r]]
                none_waits *= comb(kinds["full" if full else "any"] + gpus - 1, gpus)
                some_wait *= comb(kinds["both" if full else "busy"] + gpus - 1, gpus)
            contents = self._contents([line for line, some in zip(buffers, waits, strict=True) if some])
            total += contents * (none_waits + queues * (none_waits if self.holding else some_wait))
        return total

    def _contents(self, lines: list[Line]) -> int:
        """Contents of buffers of which none is empty."""
        by_length = [1] + [0] * self.decode_queue_cap
        for line in lines:
            own = [line.contents(length) if 0 < length <= line.cap else 0 for length in range(len(by_length))]
            by_length = [
                sum(own[k] * by_length[length - k] for k in range(1, length + 1)) for length in range(len(by_length))
            ]
        return sum(by_length)

    def configurations(self, r: int) -> dict[str, int]:
        """Configurations of a GPU of role r: any; without a free decode slot; unable to start a prefill; both."""
        s, classes = self.system, self.system.classes
        decodes, slots = int(s.role_decode_slots[r]), int(s.role_slots[r])
        if s.role_prefill_mode[r] < 0:
            full = _orders(classes, decodes)
            total = up_to(classes, decodes)
            return {"any": total, "full": full, "busy": total, "both": full}
        beside = min(decodes, slots - 1)
        running, running_full = classes * up_to(classes, beside), classes * _orders(classes, beside)
        blocked = _orders(classes, decodes) if decodes >= slots else 0
        return {
            "any": running + up_to(classes, decodes),
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
        waiting = sum(len(line.ordered) + len(line.unordered) + line.places // 2 for line in self.lines)
        spread = 1 if gpus <= 2 else 2
        return classes + waiting + spread * (prefilling * s.sides + decoding * classes)

    def memory(self) -> int:
        """Estimated bytes of enumeration, generator and iterative solution together, at their peak."""
        states, nnz = self.states(), self.states() * (1 + self.transitions_per_state())
        # keys, hash table while it doubles, flags, diagonal; a dozen vectors of the Krylov iteration
        per_state = 8 + 4 * 12 + 1 + 8 + 14 * 8
        # rows while they grow; the generator, its transpose and the incomplete factors
        per_entry = 40
        tables = (
            sum(self.configurations(r)["any"] for r in range(self.system.roles)) * (8 + 4 * self.system.classes) * 8
        )
        return states * per_state + nnz * per_entry + tables

    def refuse(self, *, max_states: int, memory_limit: float, why: str = "") -> None:
        """Raise unless the chain fits.

        Raises:
            InvalidInput: naming estimate, limit and what to do instead.
        """
        states, memory = self.states(), self.memory()
        caps = f"prefill_queue_cap={self.prefill_queue_cap}, decode_queue_cap={self.decode_queue_cap}"
        ordered = max(line.places for line in self.lines)
        words = f", ordered_places={ordered}" if any(len(line.ordered) > 1 for line in self.lines) else ""
        instead = "Simulate instead (Policy.simulate), or use fewer GPUs, slots or classes, or lower caps"
        if ordered > 0:
            instead += ", or keep fewer places of the first-come lines in order (ordered_places, approximate)"
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
        if self.bits() > KEY_BITS:
            raise InvalidInput(f"exact_chain: a state with {caps}{words} does not fit into 62 bits. {instead}.")

    def radices(self) -> list[int]:
        """Number of values of each entry of a state, in the order of the layout."""
        s = self.system
        gpus = [self.configurations(r)["any"] for r in range(s.roles) for _ in range(s.role_gpus[r])]
        return gpus + [radix for line in self.lines for radix in line.radices(s.classes)]

    def bits(self) -> int:
        """Bits of a packed state."""
        return (prod(self.radices()) - 1).bit_length()

    @cached_property
    def starts(self) -> IntArray:
        """(1 + sides, 2) where the word and the counts of each line begin in a state."""
        lengths = [length for line in self.lines for length in (line.places, self.system.classes)]
        return (self.system.gpus + np.cumsum([0, *lengths[:-1]])).reshape(-1, 2)

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

    def roles(self) -> IntArray:
        """(K,) role of each configuration."""
        return np.repeat(np.arange(self.first.size - 1), np.diff(self.first))

    def rates(self, system: System) -> tuple[FloatArray, FloatArray]:
        """Rate of the prefill's end, (K,), and of each decode's, (K, I), 1/s ([L26] eq. (4), at the GPU's present
        mode)."""
        role = self.roles()
        running = self.prefill >= 0
        prefill = np.where(running, system.prefill_rates()[role, self.prefill], 0.0)
        speed = system.decode_speeds()[role, running.astype(int)]
        return prefill, speed[:, None] / system.output_tokens


def _vectors(classes: int, most: int) -> list[tuple[int, ...]]:
    """Nonnegative integer vectors with sum at most `most`, the zero vector first."""
    if classes == 0:
        return [()]
    return [(k, *rest) for k in range(most + 1) for rest in _vectors(classes - 1, most - k)]
