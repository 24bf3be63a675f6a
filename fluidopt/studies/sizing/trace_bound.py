"""What no policy can do with fewer GPUs: a lower bound for recorded requests, from their work and their deadlines.

The program is written in sums over requests that hold on every path of every policy, one that knows all requests
in advance included. A fleet of N GPUs does no more in a stretch of time than some mixture of iterations, each with so
many prompt tokens beside so many decodes, and

- where a share of the requests has to meet both promises, such a request is prefilled between its arrival and
  arrival + TTFT, and decoded until arrival + TTFT + TPOT times its D decode iterations; its iterations take TPOT on
  average at most. Which requests break the promises is left to the program, which finds the best ones to give up;
- where the means over the requests have to meet them, no request has a deadline. What is unfinished when the last
  request arrives has been delayed since its own arrival, though, and all delays together are no more than N times the
  mean.

Each relaxes what a policy must do and nothing else, so the least N of the program is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from fluidopt.contention import GPU
from fluidopt.curves import CurveGrid
from fluidopt.errors import InfeasibleModel, InvalidInput
from fluidopt.inputs import Positive, input_type, is_number
from fluidopt.program import Array, Block, LinearProgram
from fluidopt.solvers import Certificate, Solution, SolverOptions, solve_program
from fluidopt.tables import shorten
from fluidopt.traces.trace import Trace
from fluidopt.views import card, facts, figures, paragraph

Index = NDArray[np.int64]

# Intervals of the program: more of them make the bound tighter and the program larger, to no more than so many
# combinations of an interval of arrival, one of work, and a pace of decoding.
MOST_INTERVALS = 240
SHORTEST_INTERVAL = 0.5
MOST_COLUMNS = 60_000
TOLERANCE = 1e-5
# A bound this share above a whole number counts as that number.
ROUNDING = 1e-6
# Batches of which a GPU's iterations are read off its curve; up to this many, every one.
MOST_BATCHES = 48
# Requests of like length are taken together for their mean TPOT, and iterations of like time for their pace: those a
# factor of this apart at most.
BAND = 1.15
PACE_BAND = 1.05
# Where means are promised: ends of the time looked at, in TTFTs after the last arrival.
LATER = (0.0, 4.0, 16.0)
# Caps on the weight 1/D of a request's delay, in units of TPOT/TTFT.
WEIGHTS = 2.0 ** np.arange(-4, 1)


@input_type
class Promise:
    """What a customer is promised: a time to first token, and a time per further output token.

    TTFT runs from arrival to the end of the prefill; TPOT is the time from the first to the last token over the
    D = output tokens - 1 iterations in between (a request with a single output token meets any).
    """

    _: KW_ONLY
    ttft: Positive
    """Time to first token at most, s."""
    tpot: Positive
    """Time per output token at most, s."""
    percentile: Annotated[float, Field(gt=0, le=100)] | None = 90.0
    """Per cent of the requests that must meet both; None: the means over the requests must meet them."""

    def __str__(self) -> str:
        what = f"TTFT {self.ttft:g} s and TPOT {self.tpot * 1000:g} ms"
        return f"mean {what}" if self.percentile is None else f"{what} for {self.percentile:g} % of the requests"


def price_of(gpu: GPU) -> float:
    """Money/hour; 1 where a type has no price (or none to speak of), so that its GPUs are counted."""
    return gpu.hourly_price or 1.0


@dataclass(frozen=True)
class Iterations:
    """The iterations of a GPU type that matter, shape (K,): every other one is a mixture of these, or worse."""

    chunk: Array
    """Prompt tokens."""
    decodes: Array
    time: Array
    """s, with an empty KV cache."""
    kv_time: float
    """What each token in a decode's KV cache adds to an iteration at least, s."""


def iterations(gpu: GPU, *, longest: float) -> Iterations:
    """Iterations of an engine with this type's batch and token budget (chunk + batch - 1), bounded below.

    Args:
        gpu: the type; its ``operating_modes`` are not used, as an engine may run anything its budget allows.
        longest: the most KV tokens of a decode.

    Any number of prompts may share an iteration. For each batch the prompt tokens are those at the corners of the lower
    convex hull of the iteration time, beside which no other number of tokens is worth while. Where not every batch is
    listed, a listed one takes what the smallest between it and the one before takes. The KV cache adds the least that
    it does anywhere on the curve's grid, where f(n, k) - f(n, 0) - kv_time n k is least at a corner.
    """
    grid = _never_falling(gpu.curve.grid())
    budget = gpu.chunk_size + gpu.batch_size - 1
    batches = np.unique(np.round(np.geomspace(1, gpu.batch_size, MOST_BATCHES)).astype(np.int64))
    if gpu.batch_size <= MOST_BATCHES:
        batches = np.arange(1, gpu.batch_size + 1)
    smallest = np.concatenate([[1], batches[:-1] + 1])
    bends = np.concatenate([np.floor(grid.chunk), np.ceil(grid.chunk)])
    corners: list[tuple[float, float, float]] = []
    for most, least in zip([0, *batches.tolist()], [0, *smallest.tolist()], strict=True):
        tokens = np.unique(np.clip(np.concatenate([bends, [1, budget - least]]), 1, budget - least))
        if (most == gpu.batch_size and least == most) or budget <= least:
            tokens = tokens[:0]  # a prompt would be one request more than the batch holds
        times = grid.times(tokens, least, 0.0)
        if most:
            tokens, times = np.append(0, tokens), np.append(grid.times(0, least, 0.0), times)
        corners += [(tokens[at], most, times[at]) for at in _lower_hull(tokens, times)]
    chunk, decodes, time = np.array(corners).T
    kept = _undominated(chunk / time, decodes / time, time)
    levels = _within(grid.decodes, 1.0, float(gpu.batch_size))
    lengths = _within(grid.kv_tokens, 0.0, longest)[1:]
    added = [
        (grid.times(c, levels[:, None], lengths) - grid.times(c, levels[:, None], 0.0)) / (levels[:, None] * lengths)
        for c in (0.0, *_within(grid.chunk, 1.0, float(budget)))
    ]
    return Iterations(chunk[kept], decodes[kept], time[kept], max(0.0, float(np.min(added))))


def _never_falling(grid: CurveGrid) -> CurveGrid:
    """The largest grid below this one on which more tokens or decodes never take less time (measured tables may)."""
    mixed, alone = grid.mixed, grid.decode_only
    for axis in range(3):
        mixed = np.flip(np.minimum.accumulate(np.flip(mixed, axis), axis), axis)
    for axis in range(2):
        alone = np.flip(np.minimum.accumulate(np.flip(alone, axis), axis), axis)
    return replace(grid, mixed=mixed, decode_only=alone)


def _within(knots: Array, low: float, high: float) -> Array:
    """The knots between ``low`` and ``high``, and these."""
    return np.unique(np.concatenate([[low, high], knots[(knots > low) & (knots < high)]]))


def _lower_hull(x: Array, y: Array) -> list[int]:
    """Corners of the lower convex hull of points sorted by ``x``, all with different ``x``."""
    hull: list[int] = []
    for at in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[at] - x[a]) < (y[at] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(at)
    return hull


def _undominated(prefill: Array, decode: Array, time: Array) -> NDArray[np.bool_]:
    """Those that no other beats in prompt tokens/s and decode tokens/s while it is no slower (the first of equals)."""
    time = np.where(decode > 0, time, np.inf)  # what it takes only matters to decodes
    order = np.arange(len(time))
    as_good = (prefill >= prefill[:, None]) & (decode >= decode[:, None]) & (time <= time[:, None])
    strictly = (prefill > prefill[:, None]) | (decode > decode[:, None]) | (time < time[:, None])
    beaten = as_good & (strictly | (order < order[:, None]))
    return np.array([not row.any() for row in beaten])


@dataclass(frozen=True, eq=False)
class TraceBound:
    """The least fleet that the program allows, with its certificate."""

    gpus: tuple[GPU, ...]
    promise: Promise
    amounts: Array
    """N, shape (G,): GPUs of each type in the cheapest mixture, not rounded."""
    interval: float
    """Length of the program's intervals, s."""
    solution: Solution = field(repr=False)
    """Values and duals of the program."""

    @property
    def certificate(self) -> Certificate:
        """Residuals and gap; its objective and bound are minus the cost (money/hour, or GPUs)."""
        return self.solution.certificate

    @property
    def cost(self) -> float:
        """No fleet keeps the promise at less (money/hour, or GPUs without prices): the dual bound."""
        return max(0.0, -self.certificate.bound)

    @property
    def least(self) -> int:
        """No fleet of fewer GPUs keeps the promise: `cost` over the largest price, rounded up."""
        return max(1, math.ceil(self.cost / max(map(price_of, self.gpus)) * (1.0 - ROUNDING)))

    def _repr_html_(self) -> str:
        unit = "GPUs" if any(gpu.hourly_price is None for gpu in self.gpus) else "money/hour"
        return card(
            f"Least fleet for {self.promise}",
            figures(("At least", self.least, "GPUs, whatever the policy"), ("Cost at least", self.cost, unit)),
            facts(*((gpu.name, amount, "GPUs") for gpu, amount in zip(self.gpus, self.amounts.tolist(), strict=True))),
            paragraph(f"Intervals of {self.interval:.4g} s; {self.certificate}.", muted=True),
        )


def trace_bound(
    trace: Trace,
    gpus: GPU | Sequence[GPU],
    *,
    promise: Promise,
    interval: float | None = None,
    options: SolverOptions | None = None,
) -> TraceBound:
    """Find the cheapest fleet that the work and the deadlines of recorded requests allow: a bound for every policy.

    Args:
        trace: the requests.
        gpus: the type, or the types to mix, compared by ``hourly_price`` (a single type may have none).
        promise: what is kept; see `Promise`.
        interval: length, s, of the intervals within which work may be moved freely; shorter ones make the bound tighter
            and the program larger (default: chosen; for means there is one, from the first arrival on).
        options: limits and tolerance of the solver (HiGHS); by default a tolerance of 1e-5, as the dual bound that is
            reported allows for what is missing.

    Raises:
        InvalidInput: several types, and not all have a price.
        InfeasibleModel: too many requests cannot be served within the promise even by a GPU of their own.
        SolverFailure: no certified answer.

    The GPUs work as engines with the types' batch size and token budget, from the first arrival on. Costs a second or
    two for 20,000 requests.
    """
    types = (gpus,) if isinstance(gpus, GPU) else tuple(gpus)
    free = [gpu.name for gpu in types if not gpu.hourly_price]
    if not types or (free and len(types) > 1):
        raise InvalidInput(
            "trace_bound: gpus must be a type, or several with an hourly_price each, by which they are compared; got "
            + (f"none for {shorten([repr(name) for name in free])}" if free else "no type")
        )
    work = _Work(trace)
    kinds = [iterations(gpu, longest=float((work.prompt + work.decode).max())) for gpu in types]
    options = options or SolverOptions(tolerance=TOLERANCE)
    if promise.percentile is None:
        last = float(trace.arrival_time[-1])
        ends = [last + promise.ttft * later for later in LATER if last + later > 0]
        found = [_solved(_of_means(work, types, kinds, promise, end), types, promise, end, options) for end in ends]
        return max(found, key=lambda each: each.cost)
    if interval is None:
        interval = _interval(work, kinds, promise)
    elif not (is_number(interval) and interval > 0):
        raise InvalidInput(f"trace_bound: interval must be a number of seconds above 0; got {interval!r}")
    return _solved(_of_a_share(work, types, kinds, promise, interval), types, promise, interval, options)


def _solved(
    program: LinearProgram, gpus: tuple[GPU, ...], promise: Promise, interval: float, options: SolverOptions
) -> TraceBound:
    solution = solve_program(program, options=options)
    return TraceBound(gpus, promise, program.column_grids(solution.values)["gpus"], interval, solution)


def _interval(work: _Work, kinds: Sequence[Iterations], promise: Promise) -> float:
    """The shortest length, s, that keeps the program to its size."""
    longest = promise.ttft + promise.tpot * float(work.decode.max())
    span = float(work.arrival[-1]) + longest
    decodes, time = (np.concatenate([getattr(each, name) for each in kinds]) for name in ("decodes", "time"))
    paces = len(_paces(decodes, time, promise.tpot)[0])
    interval = max(SHORTEST_INTERVAL, span / MOST_INTERVALS)
    while (span / interval + 1) * (longest / interval + 1) * paces > MOST_COLUMNS:
        interval *= 1.25
    return interval


class _Work:
    """The requests as work: prompt tokens, decode iterations, and KV tokens read by these, each shape (N,)."""

    def __init__(self, trace: Trace) -> None:
        self.arrival: Array = trace.arrival_time
        self.prompt: Array = trace.prompt_tokens.astype(np.float64)
        self.decode: Array = trace.output_tokens.astype(np.float64) - 1.0
        # Iteration i = 1..D reads the prompt and the i - 1 tokens made by those before it.
        self.kv: Array = self.decode * self.prompt + self.decode * (self.decode - 1.0) / 2.0


class _Assembly:
    """A linear program in the making: blocks of columns and rows, and triplets of coefficients."""

    def __init__(self) -> None:
        self.columns: list[Block] = []
        self.rows: list[Block] = []
        self.entries: list[tuple[Index, Index, Array]] = []
        self.lower: list[Array] = []
        self.upper: list[Array] = []

    def block(self, of: list[Block], name: str, *shape: int) -> Index:
        """A new block, numbered on."""
        start = sum(each.numbers.size for each in of)
        numbers = start + np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
        of.append(Block(name, tuple(tuple(map(str, range(size))) for size in shape), numbers))
        return numbers

    def variables(self, name: str, *shape: int) -> Index:
        """Columns, nonnegative."""
        return self.block(self.columns, name, *shape)

    def constraints(self, name: str, lower: Any, upper: Any, *shape: int) -> Index:
        """Rows between ``lower`` and ``upper``, which broadcast over ``shape``."""
        self.lower.append(np.broadcast_to(np.asarray(lower, dtype=float), shape).ravel())
        self.upper.append(np.broadcast_to(np.asarray(upper, dtype=float), shape).ravel())
        return self.block(self.rows, name, *shape)

    def add(self, row: Any, column: Any, coefficient: Any) -> None:
        """Coefficients; the three broadcast, and those of one place add up."""
        row, column, coefficient = np.broadcast_arrays(row, column, coefficient)
        self.entries.append((row.ravel(), column.ravel(), coefficient.ravel().astype(float)))

    def program(self, objective: Array) -> LinearProgram:
        """The arrays; ``objective`` is that of the first columns."""
        row, column, value = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        lower, upper = np.concatenate(self.lower), np.concatenate(self.upper)
        size = sum(each.numbers.size for each in self.columns)
        matrix = sparse.coo_array((value, (row, column)), shape=(len(lower), size)).tocsc()
        matrix.eliminate_zeros()
        full = np.concatenate([objective, np.zeros(size - len(objective))])
        return LinearProgram(full, matrix, lower, upper, tuple(self.rows), tuple(self.columns))


class _Capacity:
    """N GPUs of each type over M intervals of equal length, and the rows through which work uses them."""

    def __init__(
        self, made: _Assembly, gpus: Sequence[GPU], kinds: Sequence[Iterations], tpot: float, seconds: float, M: int
    ) -> None:
        self.made = made
        self.price = np.array([price_of(gpu) for gpu in gpus])
        owner = np.repeat(np.arange(len(kinds)), [len(each.time) for each in kinds])
        chunk, decodes, time = (
            np.concatenate([getattr(each, name) for each in kinds]) for name in ("chunk", "decodes", "time")
        )
        self.pace, pace_of = _paces(decodes, time, tpot)
        numbers = made.variables("gpus", len(gpus))
        phi = made.variables("phi", len(time), M)
        self.fleet = made.constraints("fleet", -np.inf, 0.0, len(gpus), M)
        self.prefill = made.constraints("prefill", -np.inf, 0.0, M)
        self.decode = made.constraints("decode", -np.inf, 0.0, len(self.pace), M)
        made.add(self.fleet, numbers[:, None], -1.0)
        made.add(self.fleet[owner], phi, 1.0)
        made.add(self.prefill, phi, -seconds * (chunk / time)[:, None])
        made.add(self.decode[pace_of], phi, -seconds * (decodes / time)[:, None])
        self.kv_time = np.array([each.kv_time for each in kinds]) / seconds


def _paces(decodes: Array, time: Array, tpot: float) -> tuple[Array, Index]:
    """Times by which decodes are told apart where some iterations are too slow, and which one each iteration counts as.

    Times within a band count as its shortest.
    """
    slowest, fastest = float(time[decodes > 0].max()), float(time[decodes > 0].min())
    if slowest <= tpot:
        return np.array([fastest]), np.zeros(len(time), dtype=np.int64)
    band = np.floor(np.log(np.clip(time, fastest, slowest) / fastest) / math.log(PACE_BAND))
    pace, which = np.unique(fastest * PACE_BAND**band, return_inverse=True)
    return pace, which.astype(np.int64)


def _of_a_share(
    work: _Work, gpus: Sequence[GPU], kinds: Sequence[Iterations], promise: Promise, interval: float
) -> LinearProgram:
    """Requests that keep both promises: each with deadlines, in cohorts by the interval of their arrival."""
    assert promise.percentile is not None
    N = len(work.arrival)
    wanted = math.ceil(promise.percentile / 100.0 * N - 1e-9)
    able = _able(work, kinds, promise)
    if able.sum() < wanted:
        raise InfeasibleModel(
            f"no number of GPUs of type {shorten([repr(gpu.name) for gpu in gpus])} keeps {promise}: alone on a GPU "
            f"only {able.mean():.2%} of the requests are fast enough; promise more time or a smaller percentile, or "
            "give a faster GPU or one of another chunk_size"
        )
    cohort = (work.arrival / interval).astype(np.int64)
    due_first = ((work.arrival + promise.ttft) / interval).astype(np.int64)
    due_last = ((work.arrival + promise.ttft + promise.tpot * work.decode) / interval).astype(np.int64)
    M = int(due_last.max()) + 1
    made = _Assembly()
    capacity = _Capacity(made, gpus, kinds, promise.tpot, interval, M)
    kept = made.variables("kept", N)
    made.add(made.constraints("at_most_all", -np.inf, able.astype(float), N), kept, 1.0)
    made.add(made.constraints("promised", wanted, np.inf, 1), kept, 1.0)

    group, at = _spans(cohort, due_first)
    prefill = made.variables("prefill", len(group))
    made.add(capacity.prefill[at], prefill, 1.0)
    _balance(made, "prefill", group, prefill[:, None], cohort, due_first, work.prompt, kept)

    group, at = _spans(cohort, due_last)
    tokens = made.variables("tokens", len(group), len(capacity.pace))
    made.add(capacity.decode[:, at].T, tokens, 1.0)
    _balance(made, "tokens", group, tokens, cohort, due_last, work.decode, kept)
    if len(capacity.pace) > 1:
        tpot = made.constraints("tpot", -np.inf, 0.0, int(cohort.max()) + 1)
        made.add(tpot[group][:, None], tokens, capacity.pace / promise.tpot)
        made.add(tpot[cohort], kept, -work.decode)
    if capacity.kv_time.any():
        kv = made.variables("kv", len(group), len(gpus))
        made.add(capacity.fleet[:, at].T, kv, capacity.kv_time)
        _balance(made, "kv", group, kv, cohort, due_last, work.kv, kept)
    return made.program(-capacity.price)


def _able(work: _Work, kinds: Sequence[Iterations], promise: Promise) -> NDArray[np.bool_]:
    """Requests that a GPU of their own serves within the promise, shape (N,)."""
    fastest = max(float((each.chunk / each.time).max()) for each in kinds)
    shortest = min(float(each.time.min()) for each in kinds)
    first = np.maximum(work.prompt / fastest, shortest) <= promise.ttft
    able: NDArray[np.bool_] = first & ((work.decode == 0) | (shortest <= promise.tpot))
    return able


def _spans(cohort: Index, due: Index) -> tuple[Index, Index]:
    """Every cohort with every interval from its own to its last deadline: two arrays of equal length."""
    last = np.full(int(cohort.max()) + 1, -1)
    np.maximum.at(last, cohort, due)
    used = np.flatnonzero(last >= 0)
    length = last[used] - used + 1
    group = np.repeat(used, length)
    return group, group + np.arange(len(group)) - np.repeat(np.cumsum(length) - length, length)


def _balance(
    made: _Assembly,
    name: str,
    group: Index,
    done: Index,
    cohort: Index,
    due: Index,
    amount: Array,
    kept: Index,
) -> None:
    """Work of a cohort done until the end of each interval, less what was due, is what is ahead: never below 0."""
    ahead = made.variables(f"{name}_ahead", len(group))
    row = made.constraints(f"{name}_due", 0.0, 0.0, len(group))
    made.add(row[:, None], done, 1.0)
    made.add(row, ahead, -1.0)
    follows = np.flatnonzero(group[1:] == group[:-1])
    made.add(row[follows + 1], ahead[follows], 1.0)
    place = np.searchsorted(group, cohort) + due - cohort
    made.add(row[place], kept, -amount)


def _of_means(
    work: _Work, gpus: Sequence[GPU], kinds: Sequence[Iterations], promise: Promise, T: float
) -> LinearProgram:
    """Work until T, at or after the last arrival, of which the delays that the means allow may leave some unfinished.

    With the share f_j of its prefill that request j has behind it at T, TTFT_j >= (1 - f_j)(T - a_j). With the share
    g_j of its decodes, TTFT_j + D_j TPOT_j >= (1 - g_j)(T - a_j), which is summed with weights v_j = min(1/D_j, v),
    for several v: sum v_j (1 - g_j)(T - a_j) <= N' TPOT + N v TTFT, where N' requests have a TPOT. And TPOT_j is at
    least what the iterations of j take over D_j, where lengths within a band count as the largest one.
    """
    N, several = len(work.arrival), int((work.decode > 0).sum())
    age = T - work.arrival
    made = _Assembly()
    capacity = _Capacity(made, gpus, kinds, promise.tpot, T, 1)
    missing = {"prefill": made.variables("unprefilled", N), "decode": made.variables("undecoded", N)}
    for name, columns in missing.items():
        made.add(made.constraints(f"at_most_all_{name}", -np.inf, 1.0, N), columns, 1.0)
    made.add(made.constraints("ttft", -np.inf, promise.ttft * N, 1), missing["prefill"], age)
    most = promise.tpot / promise.ttft * WEIGHTS
    sojourn = made.constraints("sojourn", -np.inf, several * promise.tpot + N * most * promise.ttft, len(most))
    weight = np.minimum(1.0 / np.maximum(work.decode, 1.0), most[:, None])
    made.add(sojourn[:, None], missing["decode"], weight * age)

    prefill = made.variables("prefill", 1)
    row = made.constraints("prefilled", work.prompt.sum(), np.inf, 1)
    made.add(row, prefill, 1.0)
    made.add(row, missing["prefill"], work.prompt)
    made.add(capacity.prefill, prefill, 1.0)

    band = np.where(work.decode > 0, np.log(np.maximum(work.decode, 1.0)) // math.log(BAND), 0.0)
    _, band = np.unique(band, return_inverse=True)
    longest = np.ones(int(band.max()) + 1)
    np.maximum.at(longest, band, work.decode)
    tokens = made.variables("tokens", len(longest), len(capacity.pace))
    row = made.constraints("decoded", np.bincount(band, weights=work.decode), np.inf, len(longest))
    made.add(row[:, None], tokens, 1.0)
    made.add(row[band], missing["decode"], work.decode)
    made.add(capacity.decode[:, 0], tokens, 1.0)
    if len(capacity.pace) > 1:
        tpot = made.constraints("tpot", -np.inf, promise.tpot * several, 1)
        made.add(tpot, tokens, capacity.pace / longest[:, None])
    if capacity.kv_time.any():
        kv = made.variables("kv", len(gpus))
        row = made.constraints("kv_read", work.kv.sum(), np.inf, 1)
        made.add(row, kv, 1.0)
        # The last decodes read most. What is read until a share g is convex in g: above its tangent at g = 1.
        made.add(row, missing["decode"], work.decode * (work.prompt + work.decode - 0.5))
        made.add(capacity.fleet[:, 0], kv, capacity.kv_time)
    return made.program(-capacity.price)
