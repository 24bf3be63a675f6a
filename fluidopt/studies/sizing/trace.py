"""How large a fleet recorded requests need: what no policy can do without, and what a real one does with, replayed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.contention import GPU
from fluidopt.errors import InfeasibleModel, InvalidInput
from fluidopt.inputs import is_number, is_whole
from fluidopt.service_levels import CompletionFloor, MeanTPOT
from fluidopt.studies.sizing.fleet import FleetSize, size_fleet
from fluidopt.studies.sizing.least import Outcome, least_fleet
from fluidopt.studies.sizing.trace_bound import Promise, TraceBound, price_of, trace_bound
from fluidopt.tables import jsonable, number, text
from fluidopt.traces.trace import Trace
from fluidopt.views import amount_bar, card, figures, html, paragraph, share_bar
from fluidopt.workload import TokenPrices, Workload, WorkloadClass

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fluidopt.serving import Replay
    from fluidopt.traces.classify import Classification

ENGINE = "engine"
"""The policy that is the engines' own: requests go to the GPU with the fewest, each serves first come first served."""
# Fleets beyond so many times the bound are not tried, unless max_gpus says otherwise.
MOST_TIMES = 64
MOST_INTERVALS = 1_000
# Numbers of GPUs that may prefill, from the plan's own to all, of which a policy that parts the fleet takes the best.
PARTITIONS = 6


@dataclass(frozen=True, eq=False)
class TypeSize:
    """A fleet of one GPU type."""

    gpu: GPU
    bound: TraceBound
    """What no policy can do without on this type alone."""
    fluid: FleetSize
    """A perfect system at the mean rates."""
    gpus: int
    """The least number of GPUs on which the policy keeps the promise."""
    outcomes: tuple[Outcome, ...]
    """Every fleet that was replayed, by number of GPUs."""

    @property
    def price(self) -> float:
        """Money/hour, or 1 where GPUs are counted."""
        return price_of(self.gpu)

    @property
    def cost(self) -> float:
        """Money/hour of the replayed answer, or its GPUs."""
        return self.price * self.gpus

    @property
    def answer(self) -> Outcome:
        """What the answer did."""
        return next(each for each in self.outcomes if each.gpus == self.gpus)


@dataclass(frozen=True, eq=False, repr=False)
class TraceSize:
    """The size of a fleet for recorded requests: in each interval, at least, and as replayed."""

    promise: Promise
    policy: str
    """Kind of the policy replayed."""
    interval: float
    """s."""
    intervals: pd.DataFrame
    """A row per interval; see `size_trace`."""
    types: tuple[TypeSize, ...]
    """Each GPU type by itself, in the order given."""
    mixture: TraceBound
    """What no policy can do without, whatever types it mixes."""
    requests: int
    source: str

    @property
    def best(self) -> TypeSize:
        """The type whose replayed fleet is cheapest."""
        return min(self.types, key=lambda each: each.cost)

    @property
    def gpus(self) -> int:
        """GPUs of the cheapest replayed fleet of one type."""
        return self.best.gpus

    @property
    def cost(self) -> float:
        """What that fleet costs, in `unit`."""
        return self.best.cost

    @property
    def unit(self) -> str:
        """Of costs: money/hour, or GPUs where there are no hourly prices."""
        return "money/hour" if self.best.gpu.hourly_price else "GPUs"

    @property
    def least_cost(self) -> float:
        """What no fleet of whatever types costs less than, in `unit`: the bound, and a GPU at least."""
        if len(self.types) == 1:
            return self.best.price * self.best.bound.least
        return max(self.mixture.cost, min(each.price for each in self.types))

    @property
    def gap(self) -> float:
        """Replayed cost over `least_cost`, less 1: a better policy, or a mixture of types, saves no more than that."""
        return self.cost / self.least_cost - 1.0

    def to_frame(self) -> pd.DataFrame:
        """A row per GPU type: fluid GPUs at the mean rates, the bound, the answer, costs, and what the answer did.

        ``cost`` and ``least_cost`` are in `unit`; ``mean_ttft`` and ``mean_tpot`` in s.
        """
        import pandas as pd

        rows = {
            each.gpu.name: {
                "fluid_gpus": float(each.fluid.gpus.sum()),
                "bound_gpus": each.bound.cost / each.price,
                "least_gpus": each.bound.least,
                "gpus": each.gpus,
                "least_cost": each.price * each.bound.least,
                "cost": each.cost,
                "prefill_gpus": math.nan if each.answer.prefill_gpus is None else each.answer.prefill_gpus,
                "share": each.answer.share,
                "mean_ttft": each.answer.mean_ttft,
                "mean_tpot": each.answer.mean_tpot,
            }
            for each in self.types
        }
        frame = pd.DataFrame.from_dict(rows, orient="index")
        frame.index.name = "gpu"
        return frame

    @cached_property
    def tried(self) -> pd.DataFrame:
        """A row per fleet that was replayed."""
        import pandas as pd

        rows = {
            (each.gpu.name, seen.gpus): {
                "kept": seen.kept,
                "prefill_gpus": math.nan if seen.prefill_gpus is None else seen.prefill_gpus,
                "share": seen.share,
                "mean_ttft": seen.mean_ttft,
                "mean_tpot": seen.mean_tpot,
            }
            for each in self.types
            for seen in each.outcomes
        }
        frame = pd.DataFrame.from_dict(rows, orient="index")
        frame.index = pd.MultiIndex.from_tuples(list(rows), names=["gpu", "gpus"])
        return frame

    @property
    def statement(self) -> str:
        """The outcome in words."""
        best, name = self.best, f" of type {self.best.gpu.name!r}" if len(self.types) > 1 else ""
        peak = self.intervals.iloc[int(self.intervals["gpus"].argmax())]
        sentences = [
            f"{self.promise} takes {_counted(best.bound.least)}{name} at least, whatever the policy (bound "
            f"{number(best.bound.cost / best.price)}); {_named(self.policy)} needs {best.gpus}",
            f"At its mean rates the load fills {number(float(best.fluid.gpus.sum()))} GPUs of a perfect system, "
            f"and {number(float(peak['gpus']))} in the busiest interval, from {peak['start']:g} s on",
        ]
        if self.unit != "GPUs":
            sentences.append(
                f"The cheapest replayed fleet costs {number(self.cost)} money/hour, and no fleet costs less than "
                f"{number(self.least_cost)}"
            )
        return ". ".join(sentences) + "."

    @property
    def caption(self) -> str:
        """How the numbers were made."""
        return (
            f"{self.requests:,} requests of {self.source}. Fluid: a perfect system as if the rates lasted, a rule of "
            "thumb; bound: work and deadlines of the recorded requests, for every policy; replayed: the least fleet "
            "that keeps the promise, as does the next larger one."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        frame = self.to_frame()
        return {
            "promise": {"ttft": self.promise.ttft, "tpot": self.promise.tpot, "percentile": self.promise.percentile},
            "policy": self.policy,
            "interval": self.interval,
            "unit": self.unit,
            "gpu": self.best.gpu.name,
            "gpus": self.gpus,
            "cost": self.cost,
            "least_cost": self.least_cost,
            "gap": self.gap,
            "types": _records(frame.reset_index()),
            "intervals": _records(self.intervals.reset_index()),
            "tried": _records(self.tried.reset_index()),
            "requests": self.requests,
            "source": self.source,
        }

    def plot(self) -> Figure:
        """GPUs per interval, with the bound and the replayed answer as lines."""
        return plot_trace_size(self)

    def __str__(self) -> str:
        tables = [text(self.intervals), text(self.to_frame()), text(self.tried)]
        return "\n\n".join(["\n".join(["Fleet for a trace", self.statement]), *tables, self.caption])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        per_type = dict.fromkeys(("fluid_gpus", "bound_gpus", "least_gpus", "gpus", "prefill_gpus"), "GPUs")
        per_type |= dict.fromkeys(("cost", "least_cost"), self.unit) | {"share": "in time"}
        per_type |= dict.fromkeys(("mean_ttft", "mean_tpot"), "s")
        rates = {"start": "s", "seconds": "s", "request_rate": "requests/s", "gpus": "GPUs"}
        rates |= dict.fromkeys(("prompt_rate", "output_rate"), "tokens/s")
        return card(
            "Fleet for a trace",
            figures(
                ("Replayed", self.best.gpus, f"GPUs {self.best.gpu.name}"),
                ("At least", self.best.bound.least, "GPUs, whatever the policy"),
                ("Cost", self.cost, self.unit),
            ),
            paragraph(self.statement),
            html(self.to_frame(), title="By GPU type", units=per_type, bars={"share": share_bar}),
            html(self.intervals, title="Intervals, perfect system", units=rates, bars={"gpus": amount_bar}),
            html(self.tried, title="Fleets replayed", units=per_type, bars={"share": share_bar}),
            paragraph(self.caption, muted=True),
        )


def _counted(gpus: int) -> str:
    return f"{gpus} GPU{'s' if gpus != 1 else ''}"


def _named(policy: str) -> str:
    return "the engines' own scheduling" if policy == ENGINE else policy


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON-able data; a missing number is None."""

    return [{str(name): jsonable(cell) for name, cell in row.items()} for row in frame.to_dict(orient="records")]


def size_trace(
    trace: Trace,
    gpus: GPU | Sequence[GPU],
    *,
    ttft: float,
    tpot: float,
    percentile: float | None = 90.0,
    policy: str = ENGINE,
    classes: int | None = None,
    interval: float = 300.0,
    prices: TokenPrices | None = None,
    kv_tokens: int | None = None,
    max_gpus: int | None = None,
    seed: int = 0,
) -> TraceSize:
    """Size a fleet for recorded requests: what no policy can do without, and what a real one needs.

    Three numbers of GPUs for every type:

    - *fluid*: a perfect system that gets the mean rates for ever (`size_fleet` with every request completed and the
      TPOT as a mean promise, with smaller chunks and batches to choose from); in each interval and for the whole trace.
      A rule of thumb: work can be put off, and a queue needs room.
    - *bound*: `trace_bound`. No policy keeps the promise on fewer.
    - *replayed*: the least number with which ``policy`` keeps it on these very requests (`replay`), as it does with one
      more.

    Args:
        trace: the requests.
        gpus: the type, or types to choose from, each with an ``hourly_price``. Fleets are replayed on one type each.
        ttft: time to first token at most, s.
        tpot: time per output token after the first at most, s.
        percentile: per cent of the requests that must meet both; None: the means over the requests must meet them.
        policy: ``"engine"``: engines with the type's batch and C + B - 1 tokens, each arrival sent to the one with the
            fewest requests; or a kind of policy that is planned anew for each number of GPUs (``"gate-and-route"``,
            ...), with the best of several numbers of GPUs that may prefill.
        classes: workload classes of the fluid number and the plans (default: chosen).
        interval: length of the intervals, s.
        prices: what a token earns, for the plans of a policy (default: 0.1 in the prompt and 0.2 in the output).
        kv_tokens: tokens that the KV cache of a GPU holds in the replays; None for no limit. The bound knows of none.
        max_gpus: the most that is tried (default: 64 times the bound).
        seed: for a policy's draws.

    Raises:
        InvalidInput: an argument breaks a rule.
        InfeasibleModel: no number of GPUs keeps the promise.
    """
    promise = Promise(ttft=ttft, tpot=tpot, percentile=percentile)
    types = (gpus,) if isinstance(gpus, GPU) else tuple(gpus)
    _check(trace, types, policy, interval, kv_tokens, max_gpus)
    from fluidopt.traces.classify import classify

    found = classify(trace, classes)
    mixture = trace_bound(trace, types, promise=promise)
    prices = prices or TokenPrices(prompt=0.1, output=0.2)
    sizes = []
    for gpu in types:
        bound = mixture if len(types) == 1 else trace_bound(trace, gpu, promise=promise)
        most = max_gpus if max_gpus is not None else MOST_TIMES * bound.least

        fleets = _Fleets(trace, gpu, promise, policy, found, prices, kv_tokens, seed)
        with _progress(fleets.best, f"replays on {gpu.name}") as shown:
            least, outcomes = least_fleet(shown, start=min(bound.least, most), most=most)
        sizes.append(TypeSize(gpu, bound, _fluid(found.workload, gpu, promise), least, outcomes))
    cheapest = min(sizes, key=lambda each: each.cost).gpu
    return TraceSize(
        promise=promise,
        policy=policy,
        interval=float(interval),
        intervals=_intervals(trace, found, cheapest, promise, interval),
        types=tuple(sizes),
        mixture=mixture,
        requests=len(trace),
        source=", ".join(trace.sources) or "a trace",
    )


def _check(
    trace: Trace,
    types: tuple[GPU, ...],
    policy: str,
    interval: float,
    kv_tokens: int | None,
    max_gpus: int | None,
) -> None:
    from fluidopt.policy.extract import RULES

    if not isinstance(trace, Trace):
        raise InvalidInput(f"size_trace: trace must be a Trace; got {type(trace).__name__} (read one with read_trace)")
    for gpu in types:
        if not isinstance(gpu, GPU):
            raise InvalidInput(f"size_trace: gpus must be GPU types; got {type(gpu).__name__}")
    if not types or len({gpu.name for gpu in types}) < len(types):
        raise InvalidInput(f"size_trace: gpus must be types of different names; got {[gpu.name for gpu in types]}")
    free = [gpu.name for gpu in types if not gpu.hourly_price]
    if free and len(types) > 1:
        raise InvalidInput(f"size_trace: gpus: several types are compared by hourly_price, and {free[0]!r} has none")
    if policy != ENGINE and policy not in RULES:
        raise InvalidInput(
            f"size_trace: policy must be one of {', '.join(map(repr, (ENGINE, *RULES)))}; got {policy!r}"
        )
    if not (is_number(interval) and interval > 0) or trace.duration / interval > MOST_INTERVALS:
        raise InvalidInput(
            f"size_trace: interval must be a number of seconds, and make at most {MOST_INTERVALS:,} intervals of the "
            f"trace's {trace.duration:.4g} s; got {interval!r}"
        )
    if kv_tokens is not None and not is_whole(kv_tokens, least=16):
        raise InvalidInput(f"size_trace: kv_tokens must be a whole number of at least 16, or None; got {kv_tokens!r}")
    if max_gpus is not None and not is_whole(max_gpus, least=1):
        raise InvalidInput(f"size_trace: max_gpus must be a whole number of at least 1; got {max_gpus!r}")


@contextmanager
def _progress(serve: Callable[[int], Outcome], label: str) -> Iterator[Callable[[int], Outcome]]:
    """``serve`` that counts its calls on a terminal."""
    from tqdm import tqdm

    with tqdm(desc=label, file=sys.stderr, disable=None, leave=False, delay=1.0, unit="fleet") as bar:

        def counted(gpus: int) -> Outcome:
            bar.set_postfix_str(f"{gpus} GPUs")
            outcome = serve(gpus)
            bar.update()
            return outcome

        yield counted


@dataclass(frozen=True)
class _Fleets:
    """The fleets of a type under a policy, and what they make of the requests."""

    trace: Trace
    gpu: GPU
    promise: Promise
    policy: str
    classes: Classification
    prices: TokenPrices
    kv_tokens: int | None
    seed: int

    def best(self, gpus: int) -> Outcome:
        """What so many GPUs do; of several partitions, the one that does best."""
        outcomes = list(self._outcomes(gpus))
        if not outcomes:
            return Outcome(gpus, False, math.nan, math.nan, math.nan)
        if self.promise.percentile is not None:
            return max(outcomes, key=lambda each: each.share)
        return min(
            outcomes, key=lambda each: max(each.mean_ttft / self.promise.ttft, each.mean_tpot / self.promise.tpot)
        )

    def _outcomes(self, gpus: int) -> Iterator[Outcome]:
        from fluidopt.model import FluidModel
        from fluidopt.policy.extract import UNPARTITIONED
        from fluidopt.serving import EngineFleet, replay

        if self.policy == ENGINE:
            # An engine keeps one of its blocks of 16 tokens empty.
            blocks = None if self.kv_tokens is None else self.kv_tokens // 16 + 1
            fleet = EngineFleet.like(self.gpu, gpus=gpus, kv_blocks=blocks)
            yield self._outcome(replay(self.trace, fleet, seed=self.seed), None)
            return
        try:
            plan = FluidModel(self.classes.workload.per_gpu(gpus), self.gpu, prices=self.prices).solve()
        except InfeasibleModel:  # fewer GPUs than the mean load fills
            return
        planned = plan.policy(gpus=gpus, kind=self.policy)
        parts: list[int | None] = [None]
        if self.policy not in UNPARTITIONED:
            # The plan's share is full at the mean rates, so that a queue of patient requests would never end.
            least = sum(role.gpus for role in planned.roles if role.prefill)
            parts = [*np.unique(np.round(np.linspace(least, gpus, PARTITIONS))).astype(int).tolist()]
        for part in parts:
            policy = planned if part is None else plan.policy(gpus=gpus, kind=self.policy, prefill_gpus=part)
            served = replay(self.trace, policy, classes=self.classes, kv_tokens=self.kv_tokens, seed=self.seed)
            yield self._outcome(served, part)

    def _outcome(self, replayed: Replay, prefill_gpus: int | None) -> Outcome:
        """Whether the promise was kept; a request that was never completed is late."""
        promise = self.promise
        share = replayed.attainment(ttft=promise.ttft, tpot=promise.tpot)
        several = self.trace.output_tokens > 1
        ttft = float(replayed.ttft.mean())
        tpot = float(replayed.tpot[several].mean()) if several.any() else 0.0
        if promise.percentile is None:
            kept = ttft <= promise.ttft and tpot <= promise.tpot
        else:
            kept = share >= promise.percentile / 100.0 - 1e-12
        return Outcome(replayed.gpu_count, kept, share, ttft, tpot, prefill_gpus)


def _fluid(workload: Workload, gpu: GPU, promise: Promise) -> FleetSize:
    """The fleet of a perfect system at these rates, with smaller chunks and batches to choose from."""
    chunks = sorted({max(1, gpu.chunk_size >> shift) for shift in range(4)})
    batches = sorted({1, *(max(1, gpu.batch_size >> shift) for shift in range(4))})
    levels = (CompletionFloor(share=1.0), MeanTPOT(at_most=promise.tpot))
    return size_fleet(
        workload, replace(gpu, share=1.0).with_modes(chunks=chunks, batches=batches), service_levels=levels
    )


def _intervals(trace: Trace, found: Classification, gpu: GPU, promise: Promise, interval: float) -> pd.DataFrame:
    """A row per interval: start and length, s, rates, and the GPUs of a perfect system that has these for ever."""
    frame = trace.rates(interval=interval)
    frame = frame[frame["label"] == "all"].drop(columns="label").reset_index(drop=True)
    place = np.minimum((trace.arrival_time / interval).astype(np.int64), len(frame) - 1)
    needed = []
    for at, seconds in enumerate(frame["seconds"]):
        classes = _classes(trace, found, place == at, float(seconds))
        needed.append(float(_fluid(Workload(classes), gpu, promise).gpus.sum()) if classes else 0.0)
    return frame.assign(gpus=needed).rename_axis("interval")


def _classes(trace: Trace, found: Classification, here: np.ndarray, seconds: float) -> tuple[WorkloadClass, ...]:
    """The classes as they are in an interval, with their mean tokens there; those that are absent left out."""
    classes = []
    for i, each in enumerate(found.workload):
        members = here & (found.assignment == i)
        if members.any():
            decode = float(trace.output_tokens[members].mean()) - 1.0
            classes.append(
                replace(
                    each,
                    arrival_rate=float(members.sum()) / seconds,
                    prompt_tokens=float(trace.prompt_tokens[members].mean()),
                    # A class needs some decoding; that of the whole trace where nothing here has any.
                    output_tokens=decode if decode > 0 else each.output_tokens,
                )
            )
    return tuple(classes)


def plot_trace_size(size: TraceSize) -> Figure:
    """GPUs per interval, with the bound and the replayed answer as lines."""
    from fluidopt.plots import DARK, INK, LIGHT, MIDDLE, _shown_figure

    figure = _shown_figure()(figsize=(9.0, 4.2), layout="constrained", dpi=130)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=INK)
    table, best = size.intervals, size.best
    left, width = table["start"] / 60.0, table["seconds"] / 60.0
    axis.bar(
        left,
        table["gpus"],
        width=width,
        align="edge",
        color=LIGHT,
        edgecolor="white",
        label="perfect system, each interval",
    )
    end = float((left + width).max())
    lines = (
        (float(best.fluid.gpus.sum()), "perfect system, mean rates", "#6b7280", ":"),
        (best.bound.cost / best.price, "no policy below", DARK, "--"),
        (best.gpus, f"{_named(size.policy)}, replayed", MIDDLE, "-"),
    )
    for level, label, colour, style in lines:
        axis.plot([0.0, end], [level, level], color=colour, linestyle=style, linewidth=1.8, label=label)
        axis.annotate(
            number(level),
            (end, level),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
        )
    axis.set_xlim(0.0, end)
    axis.set_ylim(0.0, 1.15 * max(float(table["gpus"].max()), *(level for level, *_ in lines)))
    axis.set_xlabel("minutes from the first request", fontsize=8, color=INK)
    axis.set_ylabel("GPUs", fontsize=8, color=INK)
    axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=8)
    figure.suptitle(f"{size.promise}", x=0.01, ha="left", fontsize=11, color=INK)
    return figure
