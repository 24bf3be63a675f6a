"""The compiled events of the exact chain: from a state to its successors and their rates.

The rules are those of the simulator (`fluidopt.simulation.kernel`): route the finished request, fill freed slots from
the buffer of their side, then the gate; or the gate first of all. What an event sets off is a sequence of steps, and a
step that ends in a draw (which GPU, which side, which class comes next) branches; branches are walked depth first on an
explicit stack.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fluidopt.chain.packing import AnyArray, Found, Tables, compiled, find, integer, pack, unpack
from fluidopt.chain.states import Layout

DONE, GROW, GROW_ROW = 0, 1, 2  # why explore returned
NONE = -1
ARRIVAL_CUT, DECODE_CUT = 1, 2  # flags of a state in which a cap turns somebody away

_GATE_FIRST, _ROUTE, _FILL, _GATE = 0, 1, 2, 3
"""Steps, of which a branch holds the next: admit before the decodes that wait; place the request whose prefill ended on
a GPU; seat waiting decodes on that GPU; admit."""


class Work(NamedTuple):
    """Scratch of one walk: a stack of branches, and the row that is being built."""

    stack: AnyArray  # (depth, width) states
    probability: AnyArray  # (depth,)
    step: AnyArray  # (depth, 3) the next step, its GPU, the class whose prefill ended there (-1 for none)
    chance: AnyArray  # (I,) law of the class that a line or the gate lets go next
    columns: AnyArray  # successors of the row
    rates: AnyArray
    used: AnyArray  # (4,) size of the stack, of the row, flags of the row, whether the row ran out of room


def work(layout: Layout, row: int = 256) -> Work:
    """Scratch for a layout, with room for `row` successors of a state."""
    s = layout.system
    width = len(layout.radices())
    branching = s.gpus * (s.classes + s.sides) + s.classes
    steps = int(s.role_slots.max()) + 2 * s.gpus + 8  # of one event, at most
    depth = branching * steps
    return Work(
        stack=np.zeros((depth, width), dtype=np.int64),
        probability=np.zeros(depth),
        step=np.zeros((depth, 3), dtype=np.int64),
        chance=np.zeros(s.classes),
        columns=np.zeros(row, dtype=np.int64),
        rates=np.zeros(row),
        used=np.zeros(4, dtype=np.int64),
    )


# Branches and lines -----------------------------------------------------------------------------------------------


@compiled
def _push(w: Work, z: AnyArray, probability: float, step: int, g: int, ended: int) -> int:
    """A copy of z on the stack; returns its row there."""
    top = integer(w.used[0])
    for j in range(z.size):
        w.stack[top, j] = z[j]
    w.probability[top] = probability
    w.step[top, 0] = step
    w.step[top, 1] = g
    w.step[top, 2] = ended
    w.used[0] = top + 1
    return top


@compiled
def _length(t: Tables, z: AnyArray, line: int) -> int:
    """Requests in a line."""
    total = 0
    for j in range(t.word[line], t.counts[line]):
        total += z[j] > 0
    for j in range(t.counts[line], t.counts[line] + t.sizes[1]):
        total += z[j]
    return total


@compiled
def _waiting_decodes(t: Tables, z: AnyArray) -> int:
    total = 0
    for line in range(1, t.word.size):
        total += _length(t, z, line)
    return total


@compiled
def _join(t: Tables, z: AnyArray, line: int, i: int) -> None:
    """Class i joins the end of a line: the word if it has a place, else the counts."""
    if t.ordered[line, i]:
        for j in range(t.word[line], t.counts[line]):
            if z[j] == 0:
                z[j] = i + 1
                return
    z[t.counts[line] + i] += 1


@compiled
def _next(t: Tables, w: Work, z: AnyArray, line: int) -> bool:
    """The law of the class that leaves a line next, into w.chance; False if nobody waits in it."""
    count, classes = t.counts[line], t.sizes[1]
    total = 0.0
    for i in range(classes):
        w.chance[i] = t.weight[line, i] if z[count + i] > 0 else 0.0
        total += w.chance[i]
    if total == 0.0 and t.word[line] < count and z[t.word[line]] > 0:
        w.chance[z[t.word[line]] - 1] = total = 1.0
    elif total == 0.0:
        for i in range(classes):
            w.chance[i] = z[count + i]
            total += w.chance[i]
    for i in range(classes):
        w.chance[i] /= total if total > 0.0 else 1.0
    return total > 0.0


@compiled
def _leave(
    t: Tables, w: Work, z: AnyArray, line: int, place: int, probability: float, step: int, g: int, ended: int
) -> None:
    """The request at a place of the word is gone: close up, and draw who moves up into the word from the counts."""
    word, count = t.word[line], t.counts[line]
    behind = 0
    for i in range(t.sizes[1]):
        behind += z[count + i] if t.ordered[line, i] else 0
    for i in range(t.sizes[1]):
        if behind == 0 or (t.ordered[line, i] and z[count + i] > 0):
            y = w.stack[_push(w, z, probability * z[count + i] / behind if behind > 0 else probability, step, g, ended)]
            for j in range(word + place, count - 1):
                y[j] = y[j + 1]
            y[count - 1] = 0
            if behind == 0:
                return
            y[count + i] -= 1
            y[count - 1] = i + 1


@compiled
def _take(
    t: Tables, w: Work, z: AnyArray, line: int, i: int, probability: float, step: int, g: int, ended: int
) -> None:
    """Class i leaves a line as its next."""
    if t.ordered[line, i] and t.word[line] < t.counts[line]:
        _leave(t, w, z, line, 0, probability, step, g, ended)
    else:
        y = w.stack[_push(w, z, probability, step, g, ended)]
        y[t.counts[line] + i] -= 1


# The rules --------------------------------------------------------------------------------------------------------


@compiled
def _gate(t: Tables, w: Work, z: AnyArray, ended: int) -> bool:
    """The law of the class that the gate admits, into w.chance; False if none waits that is not held back.

    A request whose prefill ended (its class `ended`, -1 for none) and that has no place yet counts as waiting.
    """
    if t.sizes[4] == 1:
        return _next(t, w, z, 0)
    gpus = t.sizes[0]
    slack = -_waiting_decodes(t, z) - (ended >= 0)
    for g in range(gpus):
        slack += t.room[z[g]]
    best = NONE
    best_key = best_excess = 0.0
    for i in range(t.sizes[1]):
        w.chance[i] = 0.0
        queue = z[t.counts[0] + i]
        if queue > 0 and t.gate[3, i] < slack:
            running = 0
            for g in range(gpus):
                running += t.prefill[z[g]] == i
            key = t.gate[0, i] + t.gate[1, i] * running
            excess = queue - t.gate[2, i]
            if best < 0 or key < best_key or (key == best_key and excess > best_excess):
                best, best_key, best_excess = i, key, excess
    if best < 0:
        return False
    w.chance[best] = 1.0
    return True


@compiled
def _admit(t: Tables, w: Work, z: AnyArray, probability: float, step: int, g: int, ended: int) -> bool:
    """Start one prefill and return to the same step; False if there is none to start."""
    gpus = t.sizes[0]
    fewest, idle = np.int64(1) << np.int64(40), 0
    for h in range(gpus):
        if t.idle[z[h]] and t.load[z[h]] <= fewest:
            idle = idle + 1 if t.load[z[h]] == fewest else 1
            fewest = t.load[z[h]]
    if idle == 0 or not _gate(t, w, z, ended):
        return False
    for h in range(gpus):
        before = z[h]
        if t.idle[before] and t.load[before] == fewest:
            for i in range(t.sizes[1]):
                if w.chance[i] > 0.0:
                    z[h] = t.started[before, i]
                    _take(t, w, z, 0, i, probability * w.chance[i] / idle, step, g, ended)
            z[h] = before
    return True


@compiled
def _route(t: Tables, w: Work, z: AnyArray, probability: float, g: int, i: int) -> None:
    """Class i's prefill on GPU g has ended: seat it, let it wait, or turn it away where the buffers are full."""
    if t.role_stays[t.role_of[g]] == 1:
        y = w.stack[_push(w, z, probability, _FILL, g, NONE)]
        y[g] = t.added[y[g], i]
        return
    for s in range(t.share.shape[0]):
        share = probability * t.share[s, i]
        if share == 0.0:
            continue
        open_gpus, role = 0, NONE
        for r in t.router_order:
            if t.role_side[r] == s and open_gpus == 0:
                role = r
                for h in range(t.sizes[0]):
                    open_gpus += t.role_of[h] == r and t.room[z[h]] > 0
        if open_gpus > 0:
            for h in range(t.sizes[0]):
                if t.role_of[h] == role and t.room[z[h]] > 0:
                    y = w.stack[_push(w, z, share / open_gpus, _FILL, g, NONE)]
                    y[h] = t.added[y[h], i]
        else:
            y = w.stack[_push(w, z, share, _FILL, g, NONE)]
            if _waiting_decodes(t, z) < t.sizes[3]:
                _join(t, y, 1 + s, i)
            else:
                w.used[2] |= DECODE_CUT


@compiled
def _fill(t: Tables, w: Work, z: AnyArray, probability: float, g: int) -> None:
    """Seat one waiting decode of its side on GPU g if it has a free slot, else go on to the gate."""
    line = 1 + t.role_side[t.role_of[g]]
    before = z[g]
    if t.room[before] == 0 or not _next(t, w, z, line):
        _push(w, z, probability, _GATE, 0, NONE)
        return
    for i in range(t.sizes[1]):
        if w.chance[i] > 0.0:
            z[g] = t.added[before, i]
            _take(t, w, z, line, i, probability * w.chance[i], _FILL, g, NONE)


@compiled
def _enter(t: Tables, w: Work, z: AnyArray, flow: float, found: Found) -> None:
    """A branch has come to its end: count its flow to the successor."""
    if _length(t, z, 0) > t.sizes[2]:  # an arrival that a full queue turns away: nothing happens
        w.used[2] |= ARRIVAL_CUT
        return
    if w.used[3] == 1:
        return
    number, used = find(found, pack(t, z), True), w.used[1]
    for k in range(used):
        if w.columns[k] == number:
            w.rates[k] += flow
            return
    if used == w.columns.size:
        w.used[3] = 1
        return
    w.columns[used] = number
    w.rates[used] = flow
    w.used[1] = used + 1


@compiled
def _walk(t: Tables, w: Work, rate: float, found: Found, z: AnyArray) -> None:
    """Follow every branch on the stack to its successor; z is scratch."""
    while w.used[0] > 0:
        top = w.used[0] - 1
        w.used[0] = top
        for j in range(z.size):
            z[j] = w.stack[top, j]
        probability, step, g, ended = w.probability[top], w.step[top, 0], w.step[top, 1], w.step[top, 2]
        if step == _GATE_FIRST:
            if not _admit(t, w, z, probability, step, g, ended):
                _push(w, z, probability, _ROUTE if ended >= 0 else _FILL, g, ended)
        elif step == _ROUTE:
            _route(t, w, z, probability, g, ended)
        elif step == _FILL:
            _fill(t, w, z, probability, g)
        elif not _admit(t, w, z, probability, step, g, ended):
            _enter(t, w, z, rate * probability, found)


@compiled
def _abandonments(t: Tables, w: Work, x: AnyArray, line: int, found: Found, z: AnyArray) -> None:
    word, count = t.word[line], t.counts[line]
    for i in range(t.sizes[1]):
        rate = t.abandonment_rate[i] * x[count + i]
        if rate > 0:
            y = w.stack[_push(w, x, 1.0, _GATE, 0, NONE)]
            y[count + i] -= 1
            _walk(t, w, rate, found, z)
    for j in range(word, count):
        if x[j] == 0:
            break
        rate = t.abandonment_rate[x[j] - 1]
        if rate > 0:
            _leave(t, w, x, line, j - word, 1.0, _GATE, 0, NONE)
            _walk(t, w, rate, found, z)


@compiled
def successors(t: Tables, w: Work, x: AnyArray, found: Found, z: AnyArray) -> None:
    """Successors of state x, into w.columns and w.rates, and what a cap turned away, into w.used[2]; z is scratch.

    w.used[1] is the number of successors afterwards; states not yet found are entered. If w.used[3] is 1, the row had
    no room for all of them.
    """
    gpus, classes = t.sizes[0], t.sizes[1]
    for k in range(w.used.size):
        w.used[k] = 0
    for i in range(classes):
        if t.arrival_rate[i] > 0:
            y = w.stack[_push(w, x, 1.0, _GATE, 0, NONE)]
            _join(t, y, 0, i)
            _walk(t, w, t.arrival_rate[i], found, z)
    for line in range(t.word.size):
        _abandonments(t, w, x, line, found, z)
    gate_first = t.sizes[5] == 1
    g = 0
    while g < gpus:
        configuration = x[g]
        same = 1  # GPUs of the role in the same configuration
        while g + same < gpus and t.role_of[g + same] == t.role_of[g] and x[g + same] == configuration:
            same += 1
        i = t.prefill[configuration]
        if i >= 0:
            y = w.stack[_push(w, x, 1.0, _GATE_FIRST if gate_first else _ROUTE, g, i)]
            y[g] = t.finished[configuration]
            _walk(t, w, same * t.prefill_rate[configuration], found, z)
        for i in range(classes):
            count = t.decodes[configuration, i]
            if count > 0 and t.decode_rate[configuration, i] > 0:
                y = w.stack[_push(w, x, 1.0, _GATE_FIRST if gate_first else _FILL, g, NONE)]
                y[g] = t.removed[configuration, i]
                _walk(t, w, same * count * t.decode_rate[configuration, i], found, z)
        g += same


@compiled
def write_row(w: Work, row: int, columns: AnyArray, rates: AnyArray) -> int:
    """A row of the generator from its successors: sorted by column, with its diagonal; returns its length."""
    size = 1
    columns[0] = row
    rates[0] = 0.0
    leaving = 0.0
    for k in range(w.used[1]):
        column, rate = w.columns[k], w.rates[k]
        if column == row:
            continue
        leaving += rate
        at = size
        while at > 0 and columns[at - 1] > column:
            columns[at] = columns[at - 1]
            rates[at] = rates[at - 1]
            at -= 1
        columns[at] = column
        rates[at] = rate
        size += 1
    for k in range(size):
        if columns[k] == row:
            rates[k] = -leaving
    return size


@compiled
def explore(
    t: Tables,
    w: Work,
    found: Found,
    first_row: int,
    starts: AnyArray,
    columns: AnyArray,
    rates: AnyArray,
    flags: AnyArray,
    scratch: AnyArray,
) -> tuple[int, int]:
    """Breadth first from the states known, writing the rows of the generator as CSR.

    Returns why it stopped and the next row: done, a table to grow, or a row that has more successors than w holds.
    """
    row = first_row
    x, z = scratch[0], scratch[1]
    room = w.columns.size + 1
    while row < found.size[0]:
        if (
            found.size[0] + room > found.keys.size
            or 2 * (found.size[0] + room) > found.slots.size
            or starts[row] + room > columns.size
        ):
            return GROW, row
        unpack(t, found.keys[row], x)
        successors(t, w, x, found, z)
        if w.used[3] == 1:
            return GROW_ROW, row
        flags[row] = w.used[2]
        starts[row + 1] = starts[row] + write_row(w, row, columns[starts[row] :], rates[starts[row] :])
        row += 1
    return DONE, row


@compiled
def count_waiting(t: Tables, keys: AnyArray, x: AnyArray, lengths: AnyArray) -> None:
    """Lengths (S, 2) of the prefill queue and of all buffers together; x is scratch."""
    for k in range(keys.size):
        unpack(t, keys[k], x)
        lengths[k, 0] = _length(t, x, 0)
        lengths[k, 1] = _waiting_decodes(t, x)


@compiled
def accumulate(
    t: Tables,
    keys: AnyArray,
    law: AnyArray,
    x: AnyArray,
    out: AnyArray,
    flow: AnyArray,
    prefill_marginal: AnyArray,
    decode_marginal: AnyArray,
) -> None:
    """Means under a law: out (I, 2 + 2 R) queues then prefills and decodes by role.

    flow holds the rates of prefill ends and of decode ends; the marginals are those of the two queues' total lengths.
    """
    gpus, classes = t.sizes[0], t.sizes[1]
    roles = (out.shape[1] - 2) // 2
    for k in range(keys.size):
        p = law[k]
        unpack(t, keys[k], x)
        prefill_marginal[_length(t, x, 0)] += p
        decode_marginal[_waiting_decodes(t, x)] += p
        for line in range(t.word.size):
            stage = min(line, 1)
            for i in range(classes):
                out[i, stage] += p * x[t.counts[line] + i]
            for j in range(t.word[line], t.counts[line]):
                if x[j] > 0:
                    out[x[j] - 1, stage] += p
        for g in range(gpus):
            configuration, r = x[g], t.role_of[g]
            i = t.prefill[configuration]
            if i >= 0:
                out[i, 2 + r] += p
                flow[i, 0] += p * t.prefill_rate[configuration]
            for i in range(classes):
                count = t.decodes[configuration, i]
                out[i, 2 + roles + r] += p * count
                flow[i, 1] += p * count * t.decode_rate[configuration, i]
