"""How policies fare on recorded requests: one trace, fleets of several sizes, and what makes the difference."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidopt.contention import GPU
from fluidopt.errors import InvalidInput
from fluidopt.inputs import dump, is_number, is_whole, parse
from fluidopt.model import FluidModel
from fluidopt.plan import Plan
from fluidopt.policy.refine import refine_policy
from fluidopt.policy.rules import Policy
from fluidopt.scenario import Charging
from fluidopt.serving.engine import Engine, EngineFleet
from fluidopt.serving.replay import replay
from fluidopt.simulation.experiment import checked_seed, slowest
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.statistics import Estimate
from fluidopt.studies.windows import Measured, measure
from fluidopt.studies.work import Checkpoint, progress, run_jobs
from fluidopt.tables import text
from fluidopt.traces.classify import Classification, classify
from fluidopt.traces.trace import Trace
from fluidopt.views import card, html, paragraph, share_bar, whisker
from fluidopt.workload import TokenPrices

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("gate-and-route", "refined", "FI-WSP", "engine")
ENGINE, REFINED = "engine", "refined"
SHARES = ("value_served", "value_in_time", "completed", "abandoned", "in_time")
DIFFERENCES = ("revenue_rate", "value_in_time", "in_time", "ttft_mean", "ttft_p99", "tpot_mean", "tpot_p99")
MODEL_EVENTS = 2e6
"""Events of the Markov chain simulated beside each policy; on the reference GPU a half-width of about 0.3 %."""
REPLICATIONS = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplayPoint:
    """One policy, or plain engines, on a fleet of one size."""

    gpus: int
    kind: str
    """Name of the policy as in `Plan.policy`, or ``"engine"``."""
    fleet: Policy | EngineFleet
    """Who served."""
    bound: float
    """R* of the plan for so many GPUs, money/s per GPU: of its model, with exponential laws and full batches."""
    recorded: Measured
    """The trace as it is."""
    steady: Measured
    """The same requests, each at a random time: no bursts, the same lengths."""
    model: Estimate | None
    """Revenue rate of the Markov chain, money/s per GPU: no bursts, exponential lengths; None for engines."""

    def to_dict(self) -> dict[str, Any]:
        """The point as JSON-able data; `from_dict` reads it back."""
        return {
            "gpus": self.gpus,
            "kind": self.kind,
            **({"policy": self.fleet.to_dict()} if isinstance(self.fleet, Policy) else {"engines": dump(self.fleet)}),
            "bound": self.bound,
            "recorded": self.recorded.to_dict(),
            "steady": self.steady.to_dict(),
            "model": None if self.model is None else asdict(self.model),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReplayPoint:
        """Read a point back.

        Raises:
            InvalidInput: it is none.
        """
        try:
            return cls(
                gpus=int(data["gpus"]),
                kind=str(data["kind"]),
                fleet=Policy.from_dict(data["policy"]) if "policy" in data else parse(EngineFleet, data["engines"]),
                bound=float(data["bound"]),
                recorded=Measured.from_dict(data["recorded"]),
                steady=Measured.from_dict(data["steady"]),
                model=None if data["model"] is None else Estimate(**data["model"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InvalidInput(f"not a saved point of a replay study: {error!r}") from None


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplayStudy:
    """Policies on the same recorded requests, for fleets of several sizes; rates in money/s per GPU, times in s."""

    points: tuple[ReplayPoint, ...]
    """By number of GPUs, then by kind, in the order asked for."""
    settings: dict[str, Any]
    """What the points depend on besides their fleet, JSON-able."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The policies, in the order asked for."""
        return tuple(dict.fromkeys(point.kind for point in self.points))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of GPUs, increasing."""
        return tuple(dict.fromkeys(point.gpus for point in self.points))

    def of(self, gpus: int, kind: str) -> ReplayPoint:
        """One point.

        Raises:
            InvalidInput: it is not in the study.
        """
        for point in self.points:
            if (point.gpus, point.kind) == (gpus, kind):
                return point
        raise InvalidInput(
            f"of: the study has no {kind!r} on {gpus!r} GPUs; it has {', '.join(map(repr, self.kinds))} on "
            f"{', '.join(map(str, self.sizes))}"
        )

    def to_frame(self) -> pd.DataFrame:
        """A row per number of GPUs and policy.

        Columns: ``revenue_rate`` with ``half_width`` (95 %), ``of_bound`` (share of the plan's revenue rate), and the
        same share in the two simpler worlds, ``steady_of_bound`` and ``model_of_bound``; of the value of all requests
        the share earned, ``value_served``, and earned from requests within the limits, ``value_in_time``; shares of
        all requests, ``completed``, ``abandoned``, ``in_time`` (completed within the limits); of the completed
        requests ``ttft_mean``, ``ttft_p50``, ``ttft_p90``, ``ttft_p99`` and likewise ``tpot_...``; ``utilisation``;
        ``preemptions``.
        """
        import pandas as pd

        rows = {}
        for point in self.points:
            values = point.recorded.values
            rows[point.gpus, point.kind] = {
                "revenue_rate": values["revenue_rate"],
                "half_width": point.recorded.estimate("revenue_rate").half_width,
                "of_bound": values["revenue_rate"] / point.bound,
                "steady_of_bound": point.steady.values["revenue_rate"] / point.bound,
                "model_of_bound": np.nan if point.model is None else point.model.mean / point.bound,
                **{name: values[name] for name in SHARES},
                **{name: each for name, each in values.items() if name.startswith(("ttft", "tpot"))},
                "utilisation": point.recorded.utilisation,
                "preemptions": point.recorded.preemptions,
            }
        return pd.DataFrame(list(rows.values()), index=pd.MultiIndex.from_tuples(list(rows), names=["gpus", "policy"]))

    def difference(self, gpus: int, kind: str, other: str, *, of: str = "revenue_rate") -> Estimate:
        """One figure of one policy less that of another on the same requests, with its 95 % interval.

        Args:
            gpus: of both.
            kind, other: the policies.
            of: a column of `to_frame` from ``revenue_rate`` to ``tpot_p99`` that is not relative to the bound.

        Raises:
            InvalidInput: no such point or figure.
        """
        mine, theirs = self.of(gpus, kind).recorded, self.of(gpus, other).recorded
        if of not in mine.values:
            raise InvalidInput(f"difference: of must be one of {', '.join(map(repr, mine.values))}; got {of!r}")
        return mine.less(theirs, of)

    def differences(self, to: str | None = None) -> pd.DataFrame:
        """Every other policy less ``to`` (by default the first one), paired window by window.

        Columns: ``revenue_rate``, ``value_in_time``, ``in_time``, ``ttft_mean``, ``ttft_p99``, ``tpot_mean``,
        ``tpot_p99``, each with the half-width of its 95 % interval, and ``lag_correlation`` of the differences in
        revenue from window to window: where it is well above 0 (beyond about 0.4 with 20 windows), the intervals are
        too narrow.
        """
        import pandas as pd

        to = self.kinds[0] if to is None else to
        rows: dict[tuple[int, str], dict[str, float]] = {}
        for point in self.points:
            if point.kind == to:
                continue
            base = self.of(point.gpus, to).recorded
            row: dict[str, float] = {}
            for name in DIFFERENCES:
                gap = point.recorded.less(base, name)
                row |= {name: gap.mean, f"{name}_half_width": gap.half_width}
            row["lag_correlation"] = point.recorded.lag_correlation(base, "revenue_rate")
            rows[point.gpus, point.kind] = row
        index = pd.MultiIndex.from_tuples(list(rows), names=["gpus", f"policy, less {to}"])
        return pd.DataFrame(list(rows.values()), index=index)

    @property
    def statement(self) -> str:
        """Who serves most value in time at each size, and how far the first policy is behind, in words."""
        first, sentences = self.kinds[0], []
        for gpus in self.sizes:
            here = [point for point in self.points if point.gpus == gpus]
            best = max(here, key=lambda point: point.recorded.values["value_in_time"])
            sentence = (
                f"{gpus} GPUs: {best.kind} serves {best.recorded.values['value_in_time']:.1%} of the value in time"
            )
            if best.kind != first:
                lead = self.difference(gpus, best.kind, first, of="value_in_time")
                sentence += f", {lead.mean:.1%} ± {lead.half_width:.1%} of it more than {first}"
            sentences.append(sentence + ".")
        return " ".join(sentences)

    @cached_property
    def caption(self) -> str:
        """How the numbers were made, and what they do not say, in words."""
        made = self.settings
        limits = [f"{name.upper()} {made[name]:g} s" for name in ("ttft", "tpot") if made[name] is not None]
        lines = (
            f"{made['requests']:,} requests in {made['duration']:,.5g} s, seed {made['seed']}"
            + (f"; in time: completed within {' and '.join(limits)}" if limits else "; in time: completed")
            + f". Intervals are 95 %, from {made['windows']} windows of the one trace: what another stretch of the "
            "same stream may show, not another day."
        )
        if ENGINE in self.kinds and made["abandonment_rate"]:
            lines += " Nobody gives up waiting at plain engines: compare them by what is served in time."
        return lines

    def plot(self) -> Figure:
        """Value served in time, revenue from world to world, TTFT and TPOT against the number of GPUs."""
        return plot_replays(self)

    def to_dict(self) -> dict[str, Any]:
        """The study as JSON-able data; `from_dict` reads it back."""
        return {"settings": self.settings, "points": [point.to_dict() for point in self.points]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReplayStudy:
        """Read a study back."""
        try:
            return cls(settings=dict(data["settings"]), points=tuple(map(ReplayPoint.from_dict, data["points"])))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"not a saved replay study: {error!r}") from None

    def __str__(self) -> str:
        return "\n".join([self.statement, "", text(self.to_frame()), "", self.caption])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        shares = ("of_bound", "steady_of_bound", "model_of_bound")
        units = dict.fromkeys(shares, "of the plan") | dict.fromkeys(("value_served", "value_in_time"), "of the value")
        units |= dict.fromkeys(("completed", "abandoned", "in_time"), "of requests") | {"utilisation": "of the time"}
        units |= {name: "s" for name in frame.columns if str(name).startswith(("ttft", "tpot"))}
        return card(
            "Replayed policies",
            paragraph(self.statement),
            html(
                frame,
                title="By number of GPUs",
                units=units | {"revenue_rate": "money/s per GPU", "half_width": "95 %"},
                bars={"revenue_rate": whisker(), "value_in_time": share_bar, "utilisation": share_bar},
            ),
            paragraph(self.caption, muted=True),
        )


def replay_study(
    trace: Trace,
    gpu: GPU,
    *,
    gpus: Sequence[int],
    prices: TokenPrices,
    kinds: Sequence[str] = KINDS,
    classes: Classification | int = 3,
    charging: Charging = "bundled",
    abandonment_rate: float = 0.1,
    kv_tokens: int | None = None,
    engine: Engine | None = None,
    ttft: float | None = None,
    tpot: float | None = None,
    windows: int = 20,
    seed: int = 0,
    executor: Executor | None = None,
    checkpoint: str | Path | None = None,
) -> ReplayStudy:
    """Plan for the classes of a trace, read policies off the plan, and replay the trace under each of them.

    For every number of GPUs the stream's rates are divided by it, the plan is made, and each policy serves the same
    requests with the same patience. Beside it stand two simpler worlds, which tell the causes of a shortfall apart: the
    same requests at random times (no bursts), and the Markov chain of the policy (no bursts, exponential lengths, no
    iterations).

    Args:
        trace: the requests.
        gpu: the GPU type.
        gpus: numbers of GPUs.
        prices: what a token earns.
        kinds: policies by the names of `Plan.policy`, ``"refined"`` (searched for once per size), and ``"engine"``:
            plain engines, each with its own queue, behind a balancer.
        classes: the `Classification` of this trace, or how many classes by prompt tokens, which are known on arrival.
        charging: ``"bundled"`` or ``"separate"`` (engines are paid for completed requests in any case).
        abandonment_rate: theta of all requests while they wait, 1/s, whatever the classification says; 0: nobody gives
            up, which is the fair comparison with engines, where nobody does.
        kv_tokens: that the KV cache of a GPU holds; none for no limit.
        engine: settings of the plain engines; by default the batch and chunk of ``gpu``, and ``kv_tokens``.
        ttft, tpot: limits, s, for what is served in time.
        windows: parts of the trace for intervals, at least 5.
        seed: of the replays, the random times, the search and the simulations.
        executor: where points run, one job each; default here, one after the other.
        checkpoint: a file to which each finished point is added as a line of JSON, and from which a study that was
            interrupted, or is wanted for more sizes or policies, goes on.

    Raises:
        InvalidInput: an argument is out of range, a fleet is too small for a policy's roles, or the checkpoint is of
            another study.
        InfeasibleModel: ``abandonment_rate=0`` and more requests than a fleet can serve.

    A point costs two replays (0.01 s each on 30,000 requests) and about 1 s of simulation; a search 5 to 30 s.
    """
    sizes, kinds = _checked(trace, gpu, gpus, kinds, windows, (ttft, tpot), kv_tokens)
    seed = checked_seed(seed)
    if not isinstance(classes, Classification):
        classes = classify(trace, classes, by="prompt", seed=seed)
    elif classes.assignment.shape != (len(trace),):
        raise InvalidInput(
            f"replay_study: classes must be a Classification of this trace of {len(trace):,} requests; it is of "
            f"{classes.assignment.size:,}"
        )
    workload = classes.workload.with_abandonment(abandonment_rate)
    engines = engine or EngineFleet.like(gpu, kv_blocks=kv_tokens and 1 + kv_tokens // 16).engine
    settings = {
        "requests": len(trace),
        "duration": trace.duration,
        "trace": _digest(trace.arrival_time, trace.prompt_tokens, trace.output_tokens, classes.assignment),
        "classes": dump(workload),
        "gpu": dump(gpu),
        "prices": dump(prices),
        "charging": charging,
        "abandonment_rate": float(abandonment_rate),
        "kv_tokens": kv_tokens,
        "engine": dump(engines),
        "ttft": ttft,
        "tpot": tpot,
        "windows": int(windows),
        "seed": seed,
    }
    kept = Checkpoint(None if checkpoint is None else Path(checkpoint), settings)
    done = {(point.gpus, point.kind): point for point in map(ReplayPoint.from_dict, kept.read())}
    shared = {"trace": trace, "assignment": classes.assignment, "settings": settings}
    jobs: list[dict[str, Any]] = []
    for n in sizes:
        missing = [kind for kind in kinds if (n, kind) not in done]
        if missing:
            plan = FluidModel(workload.per_gpu(n), gpu, prices=prices, charging=charging).solve()
            jobs += [shared | {"plan": plan, "fleet": _fleet(plan, n, kind, engines), "kind": kind} for kind in missing]
    for point in progress(run_jobs(replay_point, jobs, executor), total=len(jobs), what="replays"):
        kept.add(point.to_dict())
        done[point.gpus, point.kind] = point
    return ReplayStudy(settings=settings, points=tuple(done[n, kind] for n in sizes for kind in kinds))


def _checked(
    trace: Trace,
    gpu: GPU,
    gpus: Sequence[int],
    kinds: Sequence[str],
    windows: int,
    limits: tuple[float | None, float | None],
    kv_tokens: int | None,
) -> tuple[list[int], tuple[str, ...]]:
    """Sizes and policies, with the arguments that no other function checks."""
    if not isinstance(trace, Trace):
        raise InvalidInput(f"replay_study: trace must be a Trace; got {type(trace).__name__} (see read_trace)")
    if not isinstance(gpu, GPU):
        raise InvalidInput(f"replay_study: gpu must be a GPU; got {type(gpu).__name__}")
    sizes = list(gpus) if isinstance(gpus, Sequence) else []
    if not sizes or not all(is_whole(n, least=1) for n in sizes):
        raise InvalidInput(f"replay_study: gpus must be whole numbers of at least 1; got {gpus!r}")
    named = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not named or len(set(named)) < len(named):
        raise InvalidInput(f"replay_study: kinds must be at least one policy, each once; got {list(named)}")
    if not is_whole(windows, least=5):
        raise InvalidInput(f"replay_study: windows must be a whole number of at least 5; got {windows!r}")
    for name, limit in zip(("ttft", "tpot"), limits, strict=True):
        if limit is not None and not (is_number(limit) and limit > 0):
            raise InvalidInput(f"replay_study: {name} must be a positive number of seconds; got {limit!r}")
    if kv_tokens is not None and not is_whole(kv_tokens, least=16):
        raise InvalidInput(f"replay_study: kv_tokens must be a whole number of at least 16; got {kv_tokens!r}")
    return sorted({int(n) for n in sizes}), named


def _digest(*columns: NDArray[Any]) -> str:
    found = hashlib.sha256()
    for column in columns:
        found.update(np.ascontiguousarray(column).tobytes())
    return found.hexdigest()


def _fleet(plan: Plan, gpus: int, kind: str, engine: Engine) -> Policy | EngineFleet:
    """Who serves; for a refined policy the one that its search begins with."""
    if kind == ENGINE:
        return EngineFleet(engine, plan.model.gpu_types[0].curve, gpus=gpus)
    return plan.policy(gpus=gpus, kind="gate-and-route" if kind == REFINED else kind)


def replay_point(
    *,
    trace: Trace,
    assignment: NDArray[np.int64],
    settings: Mapping[str, Any],
    plan: Plan,
    fleet: Policy | EngineFleet,
    kind: str,
) -> ReplayPoint:
    """Replay the trace, and the same requests at random times, and simulate the chain; depends on nothing else."""
    seed = settings["seed"]
    made = refine_policy(plan, gpus=fleet.gpus, seed=seed).policy if kind == REFINED else fleet

    def served(requests: Trace, of: NDArray[np.int64]) -> Measured:
        options = {"classes": of, "kv_tokens": settings["kv_tokens"]} if isinstance(made, Policy) else {}
        result = replay(requests, made, prices=plan.model.scenario.prices, seed=seed, **options)
        return measure(result, windows=settings["windows"], ttft=settings["ttft"], tpot=settings["tpot"])

    return ReplayPoint(
        gpus=made.gpus,
        kind=kind,
        fleet=made,
        bound=plan.revenue_rate,
        recorded=served(trace, assignment),
        steady=served(*at_random_times(trace, assignment, seed=seed)),
        model=_simulated(made, seed) if isinstance(made, Policy) else None,
    )


def _simulated(policy: Policy, seed: int) -> Estimate:
    """Revenue rate of the policy's Markov chain, money/s per GPU."""
    system = fleet_system(policy)
    horizon = MODEL_EVENTS / REPLICATIONS / (3.5 * float(system.arrival_rate.sum()))
    horizon = max(horizon, 16 * slowest(system))
    return policy.simulate(horizon=horizon, replications=REPLICATIONS, seed=seed, start="fluid").revenue_rate


def at_random_times(trace: Trace, assignment: NDArray[np.int64], *, seed: int) -> tuple[Trace, NDArray[np.int64]]:
    """The requests of a trace, each at a uniform time within its duration: a Poisson stream given their number.

    Returns:
        The trace and the class of each of its requests, (N,).
    """
    times = np.random.default_rng(seed).uniform(0.0, trace.duration, len(trace))
    order = np.argsort(times)
    steady = Trace(
        times[order],
        trace.prompt_tokens[order],
        trace.output_tokens[order],
        observation_time=trace.duration,
        sources=trace.sources,
    )
    return steady, assignment[order]


def plot_replays(study: ReplayStudy) -> Figure:
    """Value served in time, revenue from world to world, TTFT and TPOT against the number of GPUs: four panels.

    Error bars are 95 % intervals from the windows of the trace.
    """
    from fluidopt.plots import DARK, INK, LIGHT, LINES, MIDDLE, _figure, _panel, _title

    figure, grid = _figure(2, 2, rows=6)
    looks: dict[str, dict[str, Any]] = {
        kind: {
            "color": (*LINES[:3], INK)[at % 4],
            "marker": "osd^vP"[at % 6],
            "markersize": 4,
            "capsize": 2,
            "linewidth": 1.2,
        }
        for at, kind in enumerate(study.kinds)
    }

    def line(axis: Axes, kind: str, name: str, **change: Any) -> None:
        own = [study.of(n, kind) for n in study.sizes]
        scale = 100.0 if name == "value_in_time" else 1.0
        found = [point.recorded.estimate(name) for point in own]
        axis.errorbar(
            range(len(own)),
            [scale * each.mean for each in found],
            [scale * each.half_width for each in found],
            **looks[kind] | change,
        )

    for kind in study.kinds:
        line(grid[0, 0], kind, "value_in_time", label=kind)
        for axis, name in zip(grid[1], ("ttft", "tpot"), strict=True):
            line(axis, kind, f"{name}_p50", label=kind)
            line(axis, kind, f"{name}_p99", linestyle=":", fillstyle="none")
    for axis in (grid[0, 0], *grid[1]):
        axis.set_xticks(range(len(study.sizes)), [str(n) for n in study.sizes])
        axis.set_xlabel("GPUs", fontsize=8)
    for axis, title in zip(grid[1], ("Time to first token, s", "Time per output token, s"), strict=True):
        axis.set_yscale("log")
        axis.tick_params(which="both", labelsize=8)
        _panel(axis, f"{title}: median (full) and 99th percentile (dotted)", legend=False)
    _panel(grid[0, 0], "Served in time, % of the value of all requests", rows=(len(study.kinds) + 1) // 2)

    axis, kinds = grid[0, 1], [kind for kind in study.kinds if kind != ENGINE]
    rows = [(n, kind) for n in study.sizes for kind in kinds]
    for at, row in enumerate(rows):
        point = study.of(*row)
        model = None if point.model is None else point.model.mean
        worlds = (model, point.steady.values["revenue_rate"], point.recorded.values["revenue_rate"])
        shares = [100 * each / point.bound for each in worlds if each is not None]
        axis.plot([min(shares), max(shares)], [at, at], color=LIGHT, linewidth=2, zorder=1)
        for share, marker, colour, label in zip(
            shares,
            "|so",
            (DARK, MIDDLE, DARK),
            ("Markov chain", "at random times", "as recorded"),
            strict=True,
        ):
            axis.plot(share, at, marker=marker, color=colour, linestyle="", label=None if at else label, zorder=2)
    axis.set_yticks(range(len(rows)), [f"{n}  {kind}" for n, kind in rows], fontsize=6 if len(rows) > 9 else 8)
    axis.invert_yaxis()
    _panel(axis, "Revenue by world, % of the plan", rows=2)
    _title(figure, f"{study.settings['requests']:,} requests on {', '.join(map(str, study.sizes))} GPUs")
    return figure
