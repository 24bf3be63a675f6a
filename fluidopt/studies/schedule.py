"""Plans for a load that changes: how many GPUs have which role in each interval, where a change of roles costs money.

One linear program over the whole horizon, and what plans that look less far are worth beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.algebra import SymbolicProgram
from fluidopt.contention import GPU
from fluidopt.errors import InvalidInput
from fluidopt.formulation import MODES, TYPES
from fluidopt.inputs import is_number, is_whole
from fluidopt.model import FluidModel
from fluidopt.program import Array, LinearProgram
from fluidopt.scenario import Charging
from fluidopt.solvers import Certificate, Solution, SolverOptions, solve_program
from fluidopt.studies.schedule_problem import Path, ScheduleProblem, path_of, schedule_program, step_by_step
from fluidopt.tables import number, text
from fluidopt.views import amount_bar, bullets, card, figures, html, paragraph, signed_bar
from fluidopt.workload import TokenPrices, Workload

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fluidopt.traces.trace import Trace

# Differences of money and roles below this, relative, are rounding.
NOISE = 1e-9


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """A plan for every interval of a horizon, beside the plans that look less far.

    Quantities are of the whole fleet, in GPUs and money.
    """

    problem: ScheduleProblem
    program: LinearProgram
    """The horizon as arrays, per GPU."""
    solution: Solution
    paths: Mapping[str, Path]
    """By name: ``"horizon"`` (this plan), ``"greedy"`` (each interval for itself, weighing its own switches),
    ``"re-planned"`` (each interval for itself, paying the switches that this makes), ``"static"`` (roles stay)."""

    @property
    def certificate(self) -> Certificate:
        """Residuals and gap, from the arrays; its objective is money per GPU over the horizon, switches paid."""
        return self.solution.certificate

    @property
    def symbolic(self) -> SymbolicProgram:
        """The program in symbols; renders as LaTeX."""
        return replace(schedule_program(self.problem.model.scenario.charging), labels=self.problem.model.labels)

    @property
    def value(self) -> float:
        """Money earned over the horizon, switches paid."""
        return self.problem.gpus * self.certificate.objective

    @cached_property
    def roles(self) -> pd.DataFrame:
        """A row per interval: GPUs that may prefill, by type, not rounded."""
        return self._by_time(self.problem.gpus * self.paths["horizon"].roles, self._types)

    @cached_property
    def fleet(self) -> pd.DataFrame:
        """A row per interval: GPUs in each mode."""
        return self._by_time(self.problem.gpus * self.paths["horizon"].fleet, self.problem.model.labels[MODES.name])

    @cached_property
    def intervals(self) -> pd.DataFrame:
        """A row per interval.

        Columns: ``request_rate`` (requests/s); ``prefill_gpus``, GPUs that may prefill; ``switched``, GPUs that change
        roles at its start; ``revenue`` (money); ``waiting``, requests that wait at its end for prefill or decode;
        ``gpu_value`` (money/s), what one more GPU would earn then (of the type for which that is most).
        """
        n, path = self.problem.gpus, self.paths["horizon"]
        columns = {
            "request_rate": n * self.problem.rates.sum(axis=0),
            "prefill_gpus": n * path.roles.sum(axis=0),
            "switched": n * path.switched,
            "revenue": n * path.revenue,
            "waiting": n * (path.prefill_queue + path.decode_queue).sum(axis=0),
            "gpu_value": self.gpu_values.max(axis=1).to_numpy(),
        }
        return self._by_time(np.array(list(columns.values())), tuple(columns))

    @cached_property
    def gpu_values(self) -> pd.DataFrame:
        """A row per interval: money/s that one more GPU of each type would earn then; see `shadow_prices`.

        A switch that keeps a GPU from working for s seconds costs about s times this.
        """
        duals = self.program.row_grids(self.solution.duals)
        return self._by_time((duals["fleet"] + np.nan_to_num(duals["decode_role"])) / self.problem.seconds, self._types)

    @cached_property
    def shadow_prices(self) -> pd.Series[float]:
        """d(value)/d(right side) of every row by name; the right sides are per GPU, the value is that per GPU too."""
        import pandas as pd

        return pd.Series(
            self.solution.duals + 0.0, index=pd.Index(self.program.row_names, name="row"), name="shadow_price"
        )

    def to_frame(self) -> pd.DataFrame:
        """A row per way of planning: what it earns, switches, pays for that and for waiting, and is worth.

        All are priced alike: ``value`` = ``revenue`` - ``switching_cost`` - ``waiting_cost`` (money over the horizon);
        ``saved`` is what this plan is worth more.
        """
        import pandas as pd

        n, rows = self.problem.gpus, {}
        for name, path in self.paths.items():
            revenue, switched = n * float(path.revenue.sum()), n * float(path.switched.sum())
            switched = switched if switched > NOISE * n else 0.0
            cost = self.problem.switching_cost * switched if switched else 0.0
            waiting = self.problem.waiting_cost * n * float(path.waited.sum())
            saved = self.value - (revenue - cost - waiting)
            rows[name] = {
                "revenue": revenue,
                "switched": switched,
                "switching_cost": cost,
                "waiting_cost": waiting,
                "value": revenue - cost - waiting,
                "saved": 0.0 if abs(saved) <= NOISE * abs(revenue) else saved,
            }
        frame = pd.DataFrame.from_dict(rows, orient="index")
        frame.index.name = "plan"
        return frame

    @property
    def statement(self) -> str:
        """The outcome in words."""
        table = self.to_frame()
        sentence = (
            f"The plan over the horizon is worth {number(self.value)} and switches "
            f"{number(table.loc['horizon', 'switched'])} GPUs. Re-planning every interval switches "
            f"{number(table.loc['re-planned', 'switched'])}, worth {number(table.loc['re-planned', 'saved'])} less; "
            f"one static split {number(table.loc['static', 'saved'])} less, and weighing each switch when it comes "
            f"{number(table.loc['greedy', 'saved'])} less"
        )
        return sentence + "."

    @property
    def notes(self) -> tuple[str, ...]:
        """What the numbers do not show."""
        found = ["rates are taken as known: a forecast that fails costs extra", "GPUs are not rounded to whole ones"]
        if self.problem.carry_over and not self.problem.waiting_cost:
            found.append("waiting costs nothing, so patient requests may be served in any interval (waiting_cost)")
        if not self.problem.apart.any():
            found.insert(
                0,
                "every GPU may prefill and decodes in between, so roles never bind and nothing is ever switched; roles "
                "matter where modes are apart, as in GPU.with_modes(disaggregated=True)",
            )
        if not self.problem.carry_over:
            found.append("each interval is in its own steady state: what waits at its end is not carried over")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data: the tables."""
        tables = {"plans": self.to_frame(), "intervals": self.intervals, "fleet": self.fleet, "roles": self.roles}
        return {
            "gpus": self.problem.gpus,
            "switching_cost": self.problem.switching_cost,
            "value": self.value,
            **{name: table.to_dict(orient="index") for name, table in tables.items()},
        }

    def plot(self) -> Figure:
        """GPUs that may prefill in each interval under every way of planning, and the arrivals."""
        return plot_schedule(self)

    @property
    def _types(self) -> tuple[str, ...]:
        return self.problem.model.labels[TYPES.name]

    def _by_time(self, values: Array, columns: Sequence[str]) -> pd.DataFrame:
        import pandas as pd

        index = pd.Index(self.problem.labels, name="interval")
        return pd.DataFrame(values.T + 0.0, index=index, columns=list(columns))

    def __str__(self) -> str:
        notes = [f"Note: {note}" for note in self.notes]
        tables = [text(self.to_frame()), text(self.intervals)]
        return "\n\n".join([f"Schedule\n{self.statement}\n{self.certificate}", *tables, "\n".join(notes)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        money = ("revenue", "switching_cost", "waiting_cost", "value", "saved")
        units = {"request_rate": "requests/s", "prefill_gpus": "GPUs", "switched": "GPUs", "revenue": "money"}
        units |= {"waiting": "requests", "gpu_value": "money/s per GPU"}
        return card(
            "Schedule",
            figures(("Worth", self.value, "money over the horizon"), ("GPUs", self.problem.gpus, "")),
            paragraph(self.statement),
            html(
                self.to_frame(),
                title="Ways of planning",
                units=dict.fromkeys(money, "money") | {"switched": "GPUs"},
                bars={"saved": signed_bar},
            ),
            html(
                self.intervals,
                title="Intervals",
                units=units,
                bars={"request_rate": amount_bar, "prefill_gpus": amount_bar},
            ),
            bullets("Notes", self.notes),
            paragraph(f"{self.certificate}", muted=True),
        )


def plan_schedule(
    load: Trace | Sequence[Workload],
    gpu: GPU | Sequence[GPU],
    *,
    gpus: int,
    interval: float = 300.0,
    switching_cost: float,
    prices: TokenPrices,
    charging: Charging = "bundled",
    classes: int | None = None,
    abandonment_rate: float = 0.0,
    waiting_cost: float = 0.0,
    carry_over: bool = True,
    options: SolverOptions | None = None,
) -> Schedule:
    """Plan a fleet's roles over a horizon in one linear program.

    A GPU may prefill or not; its modes say what follows. Where GPUs that prefill do nothing else
    (``gpu.with_modes(disaggregated=True)``) the split has to follow the load, at ``switching_cost`` for each GPU that
    changes sides. Where every GPU may do both the contention model needs no roles, and none are ever switched.

    Args:
        load: a trace, cut into intervals; or a workload per interval, the same classes (name, tokens, patience) with
            the rates of the whole stream.
        gpu: the type, or several with shares that add up to 1.
        gpus: n, the number of GPUs in the fleet.
        interval: length of each interval, s.
        switching_cost: money for each GPU that changes its role (infinite: never). If switching keeps a GPU from
            working for s seconds, this is about s times what a GPU earns in a second (`Schedule.gpu_values`).
        prices: what a token earns.
        charging: ``"bundled"`` or ``"separate"``.
        classes: with a trace: how many classes to form (default: chosen).
        abandonment_rate: with a trace: 1/s, 0 for requests that never give up.
        waiting_cost: money per request and second of waiting. Without it, when patient requests are served does not
            matter as long as they are.
        carry_over: whether requests that wait at the end of an interval are there in the next one. Without, every
            interval is in its own steady state, a good approximation while waits are short against the interval; and
            a patient class that does not fit is infeasible.
        options: limits and tolerance of the solver (HiGHS).

    Raises:
        InvalidInput: an argument breaks a rule.
        InfeasibleModel: without ``carry_over``, where patient classes do not fit.

    Decodes in service are in steady state within an interval; what waits when the horizon ends earns nothing.
    """
    seconds, workloads = _cut(load, interval, classes, abandonment_rate)
    if not is_whole(gpus, least=1):
        raise InvalidInput(f"plan_schedule: gpus must be a whole number of at least 1; got {gpus!r}")
    if not (switching_cost == np.inf or (is_number(switching_cost) and switching_cost >= 0)):
        raise InvalidInput(
            "plan_schedule: switching_cost must be money per GPU of at least 0, or infinite where roles never change; "
            f"got {switching_cost!r}"
        )
    if not (is_number(waiting_cost) and waiting_cost >= 0):
        raise InvalidInput(
            f"plan_schedule: waiting_cost must be money per request and second of at least 0; got {waiting_cost!r}"
        )
    problem = ScheduleProblem(
        model=FluidModel(workloads[0], gpu, prices=prices, charging=charging),
        gpus=int(gpus),
        rates=np.array([each.arrival_rate for each in workloads]).T / gpus,
        seconds=seconds,
        switching_cost=float(switching_cost),
        waiting_cost=float(waiting_cost),
        carry_over=bool(carry_over),
    )
    program = problem.program()
    solution = solve_program(program, options=options)
    fixed = problem.program(switching=np.inf)
    paths = {
        "horizon": path_of(program, solution, seconds),
        "greedy": step_by_step(problem, foresees_cost=True, options=options),
        "re-planned": step_by_step(problem, foresees_cost=False, options=options),
        "static": path_of(fixed, solve_program(fixed, options=options), seconds),
    }
    return Schedule(problem, program, solution, paths)


def _cut(
    load: Trace | Sequence[Workload], interval: float, classes: int | None, patience: float
) -> tuple[Array, list[Workload]]:
    """Lengths of the intervals, s, (T,), and the workload of each."""
    from fluidopt.traces.classify import classify
    from fluidopt.traces.trace import Trace

    if not (is_number(interval) and interval > 0):
        raise InvalidInput(f"plan_schedule: interval must be a number of seconds above 0; got {interval!r}")
    if not isinstance(load, Trace):
        workloads = list(load)
        if not workloads or not all(isinstance(each, Workload) for each in workloads):
            raise InvalidInput("plan_schedule: load must be a Trace or a list of Workload, one per interval")
        kinds = [[replace(one, arrival_rate=0.0) for one in each] for each in workloads]
        if any(kind != kinds[0] for kind in kinds):
            raise InvalidInput(
                "plan_schedule: every interval must have the same classes (names, tokens, abandonment rates); only "
                "arrival rates may differ, 0 for a class that is absent"
            )
        return np.full(len(workloads), float(interval)), workloads
    found = classify(load, classes, abandonment_rate=patience)
    count = int(np.ceil(load.duration / interval))
    seconds = np.minimum(interval, load.duration - interval * np.arange(count))
    place = np.minimum((load.arrival_time / interval).astype(np.int64), count - 1)
    rates = np.zeros((count, len(found.workload)))
    np.add.at(rates, (place, found.assignment), 1.0)
    rates /= seconds[:, None]
    base = found.workload
    return seconds, [
        replace(base, classes=tuple(replace(one, arrival_rate=rate) for one, rate in zip(base, row, strict=True)))
        for row in rates.tolist()
    ]


def plot_schedule(schedule: Schedule) -> Figure:
    """GPUs that may prefill in each interval under every way of planning, above the arrivals."""
    from fluidopt.plots import DARK, INK, LIGHT, LINES, MIDDLE, _shown_figure

    problem = schedule.problem
    edges = np.concatenate([[0.0], np.cumsum(problem.seconds)]) / 60.0
    figure = _shown_figure()(figsize=(9.0, 5.0), layout="constrained", dpi=130)
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
    looks = {
        "static": (LINES[2], ":", 1.5),
        "re-planned": (LIGHT, "-", 4.0),
        "greedy": (MIDDLE, "--", 1.8),
        "horizon": (DARK, "-", 1.8),
    }
    for name, (colour, style, width) in looks.items():
        share = schedule.paths[name].roles.sum(axis=0)
        axes[0].stairs(
            problem.gpus * share, edges, baseline=None, color=colour, linestyle=style, linewidth=width, label=name
        )
    axes[0].set_ylabel("GPUs that may prefill", fontsize=8, color=INK)
    axes[0].legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=8)
    axes[1].stairs(problem.gpus * problem.rates.sum(axis=0), edges, fill=True, color=LIGHT)
    axes[1].set_ylabel("requests/s", fontsize=8, color=INK)
    axes[1].set_xlabel("minutes from the start", fontsize=8, color=INK)
    cost = f"{problem.switching_cost:g} for each GPU switched"
    figure.suptitle(f"{problem.gpus} GPUs, {cost}", x=0.01, ha="left", fontsize=11, color=INK)
    return figure
