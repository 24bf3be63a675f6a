"""The compiled clock of one GPU: how long many equal iterations take, how many fit into a time, and the KV they need.

While a GPU's batch stays as it is, an iteration differs from the one before only in that each decode has one token
more in the KV cache. Iteration times are linear between the knots of their grid (`fluidopt.curves.CurveGrid`), so the
time of any number of iterations is a sum of arithmetic series, one per piece, and a stretch of a thousand of them costs
as much as a stretch of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fluidopt.curves import CurveGrid
from fluidopt.simulation.compilation import compiled, record
from fluidopt.simulation.system import FloatArray

FOREVER = 1 << 40
"""Iterations of a stretch that nothing ends."""

# where the axes and the tables of a curve begin in the flat arrays, and how long the axes are
LAYOUT = record(i8="chunk decodes kv chunks levels points mixed alone")


class Curves(NamedTuple):
    """The grids of several GPU types in flat arrays."""

    knots: FloatArray
    times: FloatArray
    layout: Any  # (curves,) LAYOUT


def flatten(grids: Sequence[CurveGrid]) -> Curves:
    """Put the grids of several GPU types into flat arrays."""
    knots: list[FloatArray] = []
    times: list[FloatArray] = []
    layout = np.zeros(len(grids), dtype=LAYOUT)
    knot, entry = 0, 0
    for row, grid in zip(layout, grids, strict=True):
        for name, axis in (("chunk", grid.chunk), ("decodes", grid.decodes), ("kv", grid.kv_tokens)):
            row[name] = knot
            knots.append(axis)
            knot += axis.size
        row["chunks"], row["levels"], row["points"] = grid.mixed.shape
        for name, table in (("mixed", grid.mixed), ("alone", grid.decode_only)):
            row[name] = entry
            times.append(table.ravel())
            entry += table.size
    return Curves(np.concatenate(knots), np.concatenate(times), layout)


@compiled
def _below(knots: FloatArray, first: int, size: int, at: float) -> int:
    """The knot at or before ``at``, of the first one at least and the last but one at most."""
    low, high = 0, size - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if knots[first + middle] <= at:
            low = middle
        else:
            high = middle
    return low


@compiled
def _share(knots: FloatArray, first: int, size: int, low: int, at: float) -> float:
    """Weight of the knot after ``low``."""
    if size == 1:
        return 0.0
    left, right = knots[first + low], knots[first + low + 1]
    share: float = (at - left) / (right - left)
    return max(share, 0.0)


@compiled
def walk(
    curves: Curves, which: int, chunk: float, decodes: float, kv: float, overhead: float, most: int, until: float
) -> tuple[int, float]:
    """Iterations until the first one that ends at or after ``until`` seconds, ``most`` at most, and what they take.

    Each has the same chunk and the same decodes, whose mean KV is ``kv`` tokens in the first one and one more in each
    next; without decodes ``kv`` is 0. ``overhead`` seconds are added to each.
    """
    form = curves.layout[which]
    knots, times = curves.knots, curves.times
    d = _below(knots, form.decodes, form.levels, decodes)
    v = _share(knots, form.decodes, form.levels, d, decodes)
    d_next = min(d + 1, form.levels - 1)
    if chunk > 0.0:
        c = _below(knots, form.chunk, form.chunks, chunk)
        u = _share(knots, form.chunk, form.chunks, c, chunk)
        low = form.mixed + c * form.levels * form.points
        high = form.mixed + min(c + 1, form.chunks - 1) * form.levels * form.points
    else:
        u = 0.0
        low = high = form.alone
    s = _below(knots, form.kv, form.points, kv)
    grows = decodes > 0.0 and form.points > 1
    done, spent, x = 0, 0.0, kv
    while True:
        s_next = min(s + 1, form.points - 1)
        # times at the two knots of the piece, for this chunk and these decodes
        a, b = d * form.points, d_next * form.points
        left = (1.0 - u) * ((1.0 - v) * times[low + a + s] + v * times[low + b + s])
        left += u * ((1.0 - v) * times[high + a + s] + v * times[high + b + s])
        first, slope, n = left, 0.0, most - done
        if grows:
            right = (1.0 - u) * ((1.0 - v) * times[low + a + s_next] + v * times[low + b + s_next])
            right += u * ((1.0 - v) * times[high + a + s_next] + v * times[high + b + s_next])
            start, end = knots[form.kv + s], knots[form.kv + s_next]
            if x >= start:
                slope = (right - left) / (end - start)
                first = left + slope * (x - start)
                if s < form.points - 2:
                    n = min(n, int(np.ceil(end - x)))
            else:
                n = min(n, int(np.ceil(start - x)))  # below the first knot times stay
        first += overhead
        whole = n * first + 0.5 * slope * n * (n - 1.0)
        if spent + whole >= until:
            rest = until - spent
            half = first - 0.5 * slope
            root = half + np.sqrt(max(half * half + 2.0 * slope * rest, 0.0))
            j = min(max(int(2.0 * rest / root), 1), n) if root > 0.0 else n
            while j > 1 and (j - 1) * first + 0.5 * slope * (j - 1.0) * (j - 2.0) >= rest:
                j -= 1
            while j < n and j * first + 0.5 * slope * j * (j - 1.0) < rest:
                j += 1
            return done + j, spent + j * first + 0.5 * slope * j * (j - 1.0)
        spent += whole
        done += n
        x += n
        if done >= most:
            return done, spent
        if x >= knots[form.kv + s_next] and s < form.points - 2:
            s += 1


@compiled
def growth(residues: Any, block: int, batch: int, steps: int, count: int) -> int:
    """Blocks of KV that ``batch`` decodes take in ``count`` iterations from iteration ``steps`` of the GPU on.

    ``residues[r]``: decodes whose tokens in the KV cache are r more than the iterations of the GPU, modulo the block
    size. A decode takes a block where its tokens fill the last one.
    """
    whole = count // block
    total = whole * batch
    for i in range(count - whole * block):
        total += residues[(-steps - i) % block]
    return total


@compiled
def endurance(residues: Any, block: int, batch: int, steps: int, free: int) -> int:
    """The most iterations, from iteration ``steps`` on, for which ``free`` blocks suffice; a huge number if all do."""
    if batch == 0:
        return FOREVER
    whole = free // batch
    left = free - whole * batch
    count = whole * block
    for i in range(block):
        left -= residues[(-steps - i) % block]
        if left < 0:
            break
        count += 1
    return count
