"""Simulation experiments: replications side by side, as long as asked or until precise enough, and what they say."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput, SolverFailure
from fluidopt.inputs import is_number, is_whole
from fluidopt.policy.rules import Policy
from fluidopt.program import Array
from fluidopt.simulation.fleet import fleet_system, fluid_start
from fluidopt.simulation.result import PERCENTILES, SimulationResult
from fluidopt.simulation.run import EventLimitExceeded, Run, WaitingLimitExceeded
from fluidopt.simulation.statistics import Batches, batching, drifts, jackknife, merge, warmup_cut
from fluidopt.simulation.system import Start, System, Totals, Trajectory
from fluidopt.simulation.waits import first_token_quantiles, wait_quantiles

SEGMENTS = 64
"""Segments of a replication, from which warm-up and batches are made; fewer where they would fill the memory."""
MOST_TIMED = 1000
"""Percentiles are collected with up to this many classes."""
MOST_SEGMENTS = 256
"""More segments than this, over all replications, are not kept in a result where batches are longer anyway."""

StartName = Literal["empty", "fluid"]


def quantities(system: System, totals: Totals) -> dict[str, Array]:
    """Averages per GPU from totals, with the leading axes of these (see `SimulationResult`)."""
    gpus = system.gpus
    window = totals.window

    def per_gpu(values: NDArray[Any]) -> Array:
        return values / (gpus * window.reshape(window.shape + (1,) * (values.ndim - window.ndim)))

    prefill, decode = per_gpu(totals.prefill_time), per_gpu(totals.decode_time)
    prefill_queue, decode_queue = per_gpu(totals.prefill_queue_time), per_gpu(totals.decode_queue_time)
    admitted = per_gpu(totals.prefill_completions)
    # Little's law with the known arrival rate; the decode queue's own arrival rate is only known by counting.
    rate = np.where(system.arrival_rate > 0, system.arrival_rate / gpus, np.nan)
    gone = totals.abandoned_prefill + totals.abandoned_decode
    values = {
        "revenue_rate": per_gpu(totals.expected_reward),
        "admitted": admitted,
        "throughput": per_gpu(totals.decode_completions),
        "prefill": prefill.sum(axis=-2),
        "decode": decode.sum(axis=-2),
        "prefill_queue": prefill_queue,
        "decode_queue": decode_queue,
        "prefill_wait": prefill_queue / rate,
        "decode_wait": decode_queue / np.where(admitted > 0, admitted, np.nan),
        "time_to_first_token": (prefill_queue + prefill.sum(axis=-2)) / rate,
        "abandonment_share": gone / np.where(totals.arrivals > 0, totals.arrivals, np.nan),
        "role_prefill": prefill.sum(axis=-1),
        "role_decode": decode.sum(axis=-1),
    }
    return values | _percentiles(system, totals)


def _percentiles(system: System, totals: Totals) -> dict[str, Array]:
    if totals.waits is None:
        return {}
    levels = tuple(PERCENTILES.values())
    # (..., R, I, bins) to (..., I, R, bins)
    before_prefill, before_decode = (np.swapaxes(totals.waits[..., k, :, :, :], -3, -2) for k in range(2))
    starts, seated = (np.swapaxes(each, -2, -1) for each in (totals.prefill_starts, totals.decode_starts))
    at_once = starts - before_prefill.sum(axis=-1)
    rate = np.broadcast_to(system.prefill_rates().T, at_once.shape)
    found = {
        "prefill_wait": wait_quantiles(before_prefill.sum(axis=-2), at_once.sum(axis=-1), levels),
        "decode_wait": wait_quantiles(
            before_decode.sum(axis=-2), (seated.sum(-1) - before_decode.sum((-2, -1))), levels
        ),
        "time_to_first_token": first_token_quantiles(before_prefill, at_once, rate, levels),
    }
    return {
        f"{quantity}_{name}": values[..., k] for quantity, values in found.items() for k, name in enumerate(PERCENTILES)
    }


def control_variates(system: System, totals: Totals) -> Array:
    """Quantities of mean 0 that explain most of the noise, (..., 18), per second and GPU.

    What happened less what the rates in force let expect (arrivals, ends of prefills, abandonments before prefill and
    before decode, decode tokens and money of the requests completed), and the change of the four counts of requests
    (queues and services), which in equilibrium has mean 0 and is what a batch hands over to the next. All but tokens
    and money are summed over the classes twice, with weights w_i (a request's worth) and D_i (its decode work). If the
    value of a state were linear in its counts, as it is in the fluid model, whose duals are linear in w_i and D_i where
    a class is served, they would explain all the noise of the revenue; on the reference instance they explain 80 to
    95 % of its variance.
    """
    starts, seated = totals.prefill_starts.sum(axis=-2), totals.decode_starts.sum(axis=-2)
    by_class = [
        totals.arrivals - system.arrival_rate * totals.window[..., None],
        totals.prefill_completions - (totals.prefill_time * system.prefill_rates()).sum(axis=-2),
        totals.abandoned_prefill - system.abandonment_rate * totals.prefill_queue_time,
        totals.abandoned_decode - system.abandonment_rate * totals.decode_queue_time,
        totals.arrivals - starts - totals.abandoned_prefill,
        starts - totals.prefill_completions,
        totals.prefill_completions - seated - totals.abandoned_decode,
        seated - totals.decode_completions,
    ]
    weights = np.stack([system.prefill_reward + system.decode_reward, system.output_tokens], axis=-1)
    tokens = totals.decode_completions @ system.output_tokens - totals.expected_tokens
    earned = totals.reward - totals.expected_reward
    columns = [*(values @ weights for values in by_class), tokens[..., None], earned[..., None]]
    controls: Array = np.concatenate(columns, axis=-1) / (system.gpus * totals.window[..., None])
    return controls


def extend(
    run: Run, ends: Array, samples: Array | None = None, stop: threading.Event | None = None
) -> tuple[Run, Totals, Trajectory | None]:
    """Advance a replication over the segments that end at ``ends``, noting its state at the times ``samples``.

    The segments begin where the run is; times increase. Apart from ``stop``, which cuts it short, it depends on its
    arguments alone, which can be pickled: it may run in any executor.
    """
    windows: list[Totals] = []
    seen: list[Start] = []
    times = np.zeros(0) if samples is None else samples
    for end in ends:
        seen += run.visit(times[len(seen) : np.searchsorted(times, end, side="right")])
        run.advance(end)
        windows.append(run.collect(end))
        if stop is not None and stop.is_set():
            break
    return run, Totals.stack(windows), Trajectory.of(times, seen) if len(times) else None


class Serial(Executor):
    """Runs each job at once, in the thread that submits it."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The finished job; what it raises is in it."""
        job: Future[Any] = Future()
        try:
            job.set_result(function(*args, **kwargs))
        except BaseException as error:
            job.set_exception(error)
        return job


class Replications:
    """Independent replications of one policy under way, recorded in segments of one length.

    Replication k draws from the k-th stream spawned from the seed, whatever executor it runs in, and its arrivals
    from a stream of their own: two policies with equal seeds and workloads meet the same requests at the same times.
    """

    def __init__(
        self, policy: Policy, *, replications: int, seed: int, start: StartName, percentiles: bool = True
    ) -> None:
        self.policy, self.system = policy, fleet_system(policy)
        origin = fluid_start(policy, self.system) if start == "fluid" else Start.empty(self.system)
        timed = percentiles and self.system.classes <= MOST_TIMED
        streams = np.random.SeedSequence(seed).spawn(replications)
        self.runs = [Run(self.system, origin, np.random.default_rng(each), waits=timed) for each in streams]
        self.now = self.skipped = self.segment = 0.0
        self.totals: Totals | None = None
        self.events = 0
        self.paths: tuple[Trajectory, ...] = ()

    @property
    def most_segments(self) -> int:
        """As many segments as a replication is divided in, given their size in memory."""
        cells = self.system.classes * self.system.roles * (270 if self.runs[0].timed else 8)
        return int(np.clip(2**23 // cells, 8, SEGMENTS))

    def skip(self, time: float, executor: Executor | None = None) -> None:
        """Run to ``time`` without recording."""
        if time > 0:
            skipped = self._extend(np.array([time]), None, executor)
            self.events += int(skipped.events.sum())
            self.now = self.skipped = time

    def extend(self, ends: Array, *, path: int = 0, executor: Executor | None = None) -> None:
        """Record segments that end at ``ends``; ``path`` states at equally spaced times until the last are noted."""
        samples = np.linspace(self.now, ends[-1], path) if path else None
        seen = self._extend(ends, samples, executor)
        self.events += int(seen.events.sum())
        self.totals = seen if self.totals is None else Totals.join(self.totals, seen)
        self.segment = float(ends[0] - self.now)
        self.now = float(ends[-1])

    def coarsen(self) -> None:
        """Merge segments in pairs."""
        assert self.totals is not None
        self.totals = self.totals.map(lambda values: merge(values, 2))
        self.segment *= 2

    def _extend(self, ends: Array, samples: Array | None, executor: Executor | None) -> Totals:
        stop = threading.Event() if executor is None else None
        own = ThreadPoolExecutor(max_workers=min(len(self.runs), os.cpu_count() or 1)) if executor is None else None
        try:
            jobs = [(executor or own).submit(extend, run, ends, samples, stop) for run in self.runs]  # type: ignore[union-attr]
            done = [job.result() for job in _progress(jobs)]
        except WaitingLimitExceeded as error:
            raise InvalidInput(
                f"simulate: the queues grow without end ({error}); the fleet is too small for classes that never "
                "abandon. Use more GPUs or give them an abandonment rate."
            ) from None
        except EventLimitExceeded as error:
            raise SolverFailure(f"simulate: {error}; use a shorter horizon") from None
        finally:
            if stop is not None:
                stop.set()
            if own is not None:
                own.shutdown(cancel_futures=True)
        self.runs = [run for run, _, _ in done]
        self.paths = tuple(path for _, _, path in done if path is not None)
        return Totals.stack([totals for _, totals, _ in done])

    def series(self) -> Array:
        """What should not depend on time in equilibrium, (replications, segments, 4): revenue, and total requests
        before prefill, before decode and in decode."""
        t = self.totals
        assert t is not None
        columns = [
            t.expected_reward,
            t.prefill_queue_time.sum(axis=-1),
            t.decode_queue_time.sum(axis=-1),
            t.decode_time.sum(axis=(-2, -1)),
        ]
        return np.stack(columns, axis=-1)

    def kept(self, cut: Cut) -> tuple[Totals, Batches]:
        """The segments that are left by ``cut``, replication after replication, and how to make estimates of them."""
        assert self.totals is not None
        kept = self.totals.map(lambda values: np.concatenate(list(merge(values[:, cut.segments :], cut.merged))))
        controls = control_variates(self.system, kept)
        return kept, Batches(controls if cut.controlled else controls[:, :0], cut.batch, 1.5 / max(self.events, 1))

    def controls(self) -> Array:
        """Control variates of the segments, (replications, segments, C)."""
        assert self.totals is not None
        return control_variates(self.system, self.totals)


def _progress(jobs: list[Future[Any]]) -> Iterator[Future[Any]]:
    """A bar on stderr, only where a person watches."""
    from tqdm import tqdm

    yield from tqdm(jobs, desc="replications", file=sys.stderr, disable=None, leave=False, delay=1.0)


@dataclass(frozen=True)
class Cut:
    """Where to cut the segments of some replications, and how to gather the rest into batches."""

    segments: int
    """Segments at the beginning that are left out."""
    merged: int
    """Consecutive segments that are made one, since there are more than needed."""
    batch: int
    """Merged segments per batch."""
    controlled: bool
    """Whether control variates are used."""
    stationary: bool
    rule: str

    @classmethod
    def choose(cls, going: Sequence[Replications], *, warmup: bool) -> Cut:
        """By the rules of `fluidopt.simulation.statistics`, common to the replications of several policies."""
        series = [one.series() for one in going]
        cut, stationary, rule = 0, True, "as given"
        if warmup:
            cuts = [warmup_cut(each) for each in series]
            cut, stationary = max(found for found, _ in cuts), all(settled for _, settled in cuts)
            rule = f"MSER on {series[0].shape[1]} segments"
        controls = [one.controls()[:, cut:] for one in going]
        batchings = [batching(each[:, cut:], those) for each, those in zip(series, controls, strict=True)]
        controlled = all(use for _, use in batchings)
        if not controlled:
            batchings = [batching(each[:, cut:], those[..., :0]) for each, those in zip(series, controls, strict=True)]
        size = max(found for found, _ in batchings)
        stationary = stationary and not any(drifts(merge(each[:, cut:], size)) for each in series)
        replications, count = len(series[0]), series[0].shape[1] - cut
        merged = 1
        while merged < size and replications * (count // (2 * merged)) >= MOST_SEGMENTS // 2:
            merged *= 2
        size = max(merged, size // merged * merged)
        # the first segments that do not fill a batch go with the warm-up
        return cls(cut + count % size, merged, size // merged, controlled, stationary, rule)


def simulate_policy(
    policy: Policy,
    *,
    horizon: float | None,
    precision: float | None,
    warmup: float | None,
    replications: int,
    seed: int | None,
    start: StartName,
    path: int,
    executor: Executor | None,
) -> SimulationResult:
    """Run independent replications and collect what they say (see `Policy.simulate`)."""
    checked_window(horizon, warmup, replications, start)
    if horizon is None and precision is None:
        raise InvalidInput("simulate: give horizon (seconds per replication), or precision to run until it is met")
    if precision is not None and not (is_number(precision) and 0 < precision < 1):
        raise InvalidInput(
            f"simulate: precision must be between 0 and 1, the half-width of the revenue rate over its mean; got "
            f"{precision!r}"
        )
    if path != 0 and not is_whole(path, least=2):
        raise InvalidInput(f"simulate: path must be 0, or the number of states to keep, at least 2; got {path!r}")
    if path and precision is not None:
        raise InvalidInput("simulate: path goes with a fixed horizon, not with precision")
    seed = checked_seed(seed)
    going = Replications(policy, replications=replications, seed=seed, start=start)
    going.skip(warmup or 0.0, executor)
    if precision is None:
        assert horizon is not None
        ends = np.linspace(going.now, horizon, going.most_segments + 1)[1:]
        going.extend(ends, path=path, executor=executor)
        return summary(going, Cut.choose([going], warmup=warmup is None), seed=seed, start=start)
    return _until_precise(going, precision, horizon, warmup is None, seed, start, executor)


def _until_precise(
    going: Replications,
    precision: float,
    horizon: float | None,
    cuts: bool,
    seed: int,
    start: str,
    executor: Executor | None,
) -> SimulationResult:
    """Extend until the half-width of the revenue rate is at most ``precision`` of it.

    The first segments last as long as the slowest of the mean times in the fleet. Each round runs on to where the
    half-width, falling with the root of time, should do, but at most to double the time.
    """
    segment = slowest(going.system)
    longest = np.inf if horizon is None else horizon - going.now
    count = min(going.most_segments, 48)
    segment = min(segment, longest / count)
    while True:
        going.extend(going.now + segment * np.arange(1.0, count + 1), executor=executor)
        assert going.totals is not None
        found = summary(going, Cut.choose([going], warmup=cuts), seed=seed, start=start, precision=precision)
        revenue = found.revenue_rate
        ratio = revenue.half_width / (precision * abs(revenue.mean)) if revenue.mean else np.inf
        recorded = going.totals.window.shape[1]
        left = int((longest - recorded * segment) / segment * (1 + 1e-9)) if np.isfinite(longest) else sys.maxsize
        if (ratio <= 1 and found.stationary) or left == 0:
            return found
        while recorded >= going.most_segments and recorded % 2 == 0:
            going.coarsen()
            segment, recorded, left = going.segment, recorded // 2, left // 2
        wanted = np.ceil(recorded * min(max(1.05 * ratio**2, 1.1), 2.0)) - recorded
        count = min(int(wanted) + (recorded + int(wanted)) % 2, left)
        if count == 0:
            return found


def slowest(system: System) -> float:
    """The longest of the mean times of the fleet's prefills, decodes and waits until abandonment, s."""
    prefill = system.prefill_rates()
    decode = system.decode_speeds()[..., None] / system.output_tokens
    rates = [prefill[prefill > 0], decode[decode > 0], system.abandonment_rate[system.abandonment_rate > 0]]
    return float(1 / min(each.min() for each in rates if each.size))


def summary(
    going: Replications, cut: Cut, *, seed: int, start: str, precision: float | None = None
) -> SimulationResult:
    """The result of replications, cut and batched as said."""
    kept, batches = going.kept(cut)
    return SimulationResult(
        policy=going.policy,
        horizon=going.now,
        warmup=going.skipped + cut.segments * going.segment,
        warmup_rule=cut.rule,
        stationary=cut.stationary,
        segment=cut.merged * going.segment,
        batch_size=cut.batch,
        replications=len(going.runs),
        seed=seed,
        start=start,
        precision=precision,
        values=jackknife(partial(quantities, going.system), kept),
        controls=batches.controls,
        events=going.events,
        paths=going.paths,
    )


def checked_seed(seed: int | None) -> int:
    """The seed, or a fresh one.

    Raises:
        InvalidInput: it is no whole number of at least 0.
    """
    if seed is None:
        return int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    if not is_whole(seed, least=0):
        raise InvalidInput(f"simulate: seed must be a whole number of at least 0; got {seed!r}")
    return int(seed)


def checked_window(horizon: float | None, warmup: float | None, replications: int, start: str) -> None:
    """Refuse what cannot be simulated.

    Raises:
        InvalidInput: naming argument, rule and value.
    """
    if horizon is not None and not (is_number(horizon) and np.isfinite(horizon) and horizon > 0):
        raise InvalidInput(f"simulate: horizon must be a finite number of seconds above 0; got {horizon!r}")
    longest = np.inf if horizon is None else horizon
    if warmup is not None and not (is_number(warmup) and 0 <= warmup < longest):
        raise InvalidInput(f"simulate: warmup must be at least 0 and below horizon ({longest:g} s); got {warmup!r}")
    if not is_whole(replications, least=2):
        raise InvalidInput(
            "simulate: replications must be a whole number of at least 2, for a confidence interval; "
            f"got {replications!r}"
        )
    if start not in {"empty", "fluid"}:
        raise InvalidInput(f"simulate: start must be 'empty' or 'fluid'; got {start!r}")
