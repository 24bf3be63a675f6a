"""The FCFS lines in which requests wait, before the prefill and before the decode.

A line is a linked list of records in the pool, since a request can leave from the middle. The lines of a side that have
a weight are drawn by it, in time independent of their number: those that are not empty are held in choices, whose
weights differ by less than a factor 2 (composition-rejection, see `fluidopt.simulation.kernel`).
"""

from __future__ import annotations

import numpy as np

from fluidopt.simulation.compilation import AnyArray, compiled, compiled_apart, integer
from fluidopt.simulation.state import (
    JOINS,
    LEAVES,
    MARGIN,
    NONE,
    State,
    Tables,
    add_member,
    note,
    remove_member,
)


@compiled_apart
def _open_line(lines: AnyArray, choices: AnyArray, members: AnyArray, index: int) -> None:
    """A line with a weight is no longer empty."""
    line = lines[index]
    choice = choices[line.choice]
    members[choice.start + choice.size] = index
    line.position = choice.size
    choice.size += 1
    choice.weight = choice.size * choice.bound
    lines[line.common].open_lines += 1


@compiled_apart
def _close_line(lines: AnyArray, choices: AnyArray, members: AnyArray, index: int) -> None:
    """A line with a weight has become empty."""
    line = lines[index]
    choice = choices[line.choice]
    choice.size -= 1
    last = members[choice.start + choice.size]
    members[choice.start + line.position] = last
    lines[last].position = line.position
    choice.weight = choice.size * choice.bound
    lines[line.common].open_lines -= 1


@compiled_apart
def _draw_line(
    lines: AnyArray, choices: AnyArray, members: AnyArray, rng: np.random.Generator, first: int, last: int
) -> int:
    """One of the lines in choices first to last - 1, of which some are not empty, in proportion to their weights."""
    total = 0.0
    for k in range(first, last):
        total += choices[k].weight
    while True:
        u = rng.random() * total
        k = first
        while k < last - 1 and u >= choices[k].weight:
            u -= choices[k].weight
            k += 1
        choice = choices[k]
        if choice.size > 0:  # else rounding took u past the last weight
            position = min(integer(u / choice.bound), choice.size - 1)
            index = integer(members[choice.start + position])
            if u - position * choice.bound < lines[index].weight:
                return index


@compiled
def next_line(tables: Tables, state: State, rng: np.random.Generator, s: int) -> int:
    """The line of side s, on which a decode waits, whose head gets a free slot."""
    common = state.tallies.size + s
    if state.lines[common].open_lines == 0:
        return integer(common)
    side = tables.sides[s]
    first, last = integer(side.first_choice), integer(side.last_choice)
    return _draw_line(state.lines, state.choices, state.choice_members, rng, first, last)


@compiled
def join(tables: Tables, state: State, tag: int, age: float) -> None:
    """A request starts to wait at the tail of its line."""
    scalars = state.scalars[0]
    c = scalars.pool_free
    if c >= 0:
        scalars.pool_free = state.pool[c].next
    else:
        c = scalars.pool_used
        scalars.pool_used = c + 1
        if c + MARGIN >= state.pool.size:
            scalars.full = 1
    request = state.pool[c]
    place = tables.places[tag]
    line = state.lines[place.line]
    request.since = scalars.origin + age
    request.tag = tag
    request.next = NONE
    request.previous = line.tail
    if line.tail >= 0:
        state.pool[line.tail].next = c
    else:
        line.head = c
        if line.choice >= 0:
            _open_line(state.lines, state.choices, state.choice_members, integer(place.line))
    line.tail = c
    waiting = state.waiting[tag]
    waiting.count += 1
    waiting.moment += age
    note(state.log, state.scalars, JOINS, tag, c, age)
    if place.bucket >= 0:
        request.position = add_member(state, place.bucket, c, tag)


@compiled
def leave(tables: Tables, state: State, c: int, age: float) -> int:
    """The request in record c stops waiting, wherever in its line it is; returns its tag."""
    scalars = state.scalars[0]
    request = state.pool[c]
    tag = integer(request.tag)
    place = tables.places[tag]
    line = state.lines[place.line]
    if request.previous >= 0:
        state.pool[request.previous].next = request.next
    else:
        line.head = request.next
    if request.next >= 0:
        state.pool[request.next].previous = request.previous
    else:
        line.tail = request.previous
    if line.choice >= 0 and line.head < 0:
        _close_line(state.lines, state.choices, state.choice_members, integer(place.line))
    waiting = state.waiting[tag]
    waiting.count -= 1
    waiting.moment -= age
    note(state.log, state.scalars, LEAVES, tag, c, age)
    if place.bucket >= 0:
        moved = remove_member(state, place.bucket, request.position)
        state.pool[moved].position = request.position
    request.next = scalars.pool_free
    scalars.pool_free = c
    return tag
