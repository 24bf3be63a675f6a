"""The least fleet that keeps a promise, found by asking what fleets of so many GPUs do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fluidopt.errors import InfeasibleModel


@dataclass(frozen=True)
class Outcome:
    """What a fleet of so many GPUs made of the requests."""

    gpus: int
    kept: bool
    """Whether the promise was kept."""
    share: float
    """Share of the requests that met both limits, 0 to 1; NaN where nothing was replayed."""
    mean_ttft: float
    """s, over all requests."""
    mean_tpot: float
    """s, over the requests of more than one output token."""
    prefill_gpus: int | None = None
    """GPUs that may prefill, where the policy parts the fleet: the number that did best."""


def least_fleet(serve: Callable[[int], Outcome], *, start: int, most: int) -> tuple[int, tuple[Outcome, ...]]:
    """Find the least number of GPUs that keeps a promise, and whose neighbour above keeps it too.

    Args:
        serve: what a fleet of so many GPUs does; the same answer whenever asked.
        start: no fleet below it keeps the promise, which is not tried.
        most: GPUs at most.

    Returns:
        The number, and every outcome seen, by number of GPUs. The next smaller fleet breaks the promise (or is below
        ``start``).

    Raises:
        InfeasibleModel: no fleet up to ``most`` does.

    More GPUs need not serve better, because each has a queue of its own: where the next larger fleet breaks the promise
    again, the search goes on above it. Tries about 2 log2(answer - start) fleets.
    """
    seen: dict[int, Outcome] = {}

    def kept(gpus: int) -> bool:
        if gpus not in seen:
            seen[gpus] = serve(gpus)
        return seen[gpus].kept

    broken, step = start - 1, 1
    while True:
        while not kept(high := min(broken + step, most)):
            if high == most:
                raise InfeasibleModel(_too_few(max(seen.values(), key=lambda each: each.gpus)))
            broken, step = high, 2 * step
        while high - broken > 1:
            middle = (broken + high) // 2
            if kept(middle):
                high = middle
            else:
                broken = middle
        if high == most or kept(high + 1):
            return high, tuple(seen[gpus] for gpus in sorted(seen))
        broken, step = high + 1, 1


def _too_few(best: Outcome) -> str:
    found = "no plan serves the mean load"
    if math.isfinite(best.share):
        found = f"{best.share:.2%} of the requests meet both limits, the means are {best.mean_ttft:.4g} s and "
        found += f"{1000 * best.mean_tpot:.4g} ms"
    return (
        f"size_trace: no fleet of up to {best.gpus} GPUs keeps the promise: with {best.gpus}, {found}. Promise more "
        "time or a smaller percentile, give a smaller chunk_size (TPOT) or a larger one (TTFT), or raise max_gpus"
    )
