"""How a fleet approaches its fluid plan as it grows: [L26] section 6.2, figures 4 to 6."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fluidopt.errors import InvalidInput
from fluidopt.inputs import is_whole
from fluidopt.model import FluidModel
from fluidopt.plan import Plan
from fluidopt.policy.rules import Policy
from fluidopt.program import Array
from fluidopt.simulation.experiment import Cut, Replications, checked_seed, checked_window, summary
from fluidopt.simulation.fleet import fluid_values
from fluidopt.simulation.result import SimulationResult
from fluidopt.simulation.statistics import merge
from fluidopt.tables import text
from fluidopt.views import amount_bar, card, figures, html, paragraph, whisker

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

QUANTITIES = ("revenue_rate", "throughput", "prefill", "decode", "prefill_queue", "decode_queue", "role_decode")


@dataclass(frozen=True, eq=False, kw_only=True)
class FleetPoint:
    """One policy on a fleet of one size."""

    policy: Policy
    result: SimulationResult
    decode_by_role: Array
    """y_ri simulated: decodes in service by role and class, (R, I) requests/GPU."""
    decode_by_role_half_width: Array
    """Of their 95 % intervals, (R, I)."""

    @property
    def decode_targets(self) -> Array:
        """y_ri of the plan, (R, I) requests/GPU; of the classes' split only the totals of roles and classes are
        determined, and each class is split in the same proportion."""
        return np.array([self.policy.targets.decode_by_role[role.name] for role in self.policy.roles])

    @property
    def shortfall(self) -> float:
        """How far the revenue rate is below the fluid bound, as a share of it; NaN where the plan earns nothing."""
        bound = self.policy.revenue_bound
        return 1 - self.result.revenue_rate.mean / bound if bound > 0 else np.nan

    @property
    def misplaced_by_class(self) -> float:
        """Largest difference between simulation and plan of a class's decodes in a role, requests/GPU."""
        return float(np.abs(self.decode_by_role - self.decode_targets).max())

    @property
    def misplaced_in_total(self) -> float:
        """Largest difference between simulation and plan of all decodes in a role, requests/GPU."""
        return float(np.abs((self.decode_by_role - self.decode_targets).sum(axis=1)).max())

    def rows(self) -> Iterator[tuple[str, str, float, float, float]]:
        """Quantity, class or role, plan (NaN where it is silent), simulated, half-width."""
        fluid, result = fluid_values(self.policy), self.result
        classes, roles = [each.name for each in self.policy.scenario.classes], [r.name for r in self.policy.roles]
        for quantity in QUANTITIES:
            mean, error, _ = result.batches.estimates(result.values[quantity])
            labels = [""] if fluid[quantity].ndim == 0 else roles if quantity.startswith("role_") else classes
            columns = (fluid[quantity], mean, result.batches.quantile * error)
            for label, *numbers in zip(labels, *map(np.atleast_1d, columns), strict=True):
                yield quantity, label, *map(float, numbers)
        labels = [f"{role}/{each}" for role in roles for each in classes]
        columns = (self.decode_targets, self.decode_by_role, self.decode_by_role_half_width)
        for label, *numbers in zip(labels, *map(np.ravel, columns), strict=True):
            yield "decode_by_role", label, *map(float, numbers)

    def _repr_html_(self) -> str:
        return card(
            f"{self.policy.kind} on {self.policy.gpus} GPUs",
            figures(
                ("Revenue", self.result.revenue_rate, "money/s per GPU"),
                ("Shortfall", 100.0 * self.shortfall, "% of the fluid bound"),
                ("Decodes off the plan, in total", self.misplaced_in_total, "requests/GPU"),
                ("By class", self.misplaced_by_class, "requests/GPU"),
            ),
            paragraph(self.result.caption, muted=True),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ConvergenceStudy:
    """Policies of one plan on fleets of increasing size, beside what the plan says."""

    plan: Plan
    points: tuple[FleetPoint, ...]
    """By kind, then by number of GPUs."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The policies, in the order given."""
        return tuple(dict.fromkeys(point.policy.kind for point in self.points))

    def of(self, kind: str) -> tuple[FleetPoint, ...]:
        """The fleets under one policy, by number of GPUs.

        Raises:
            InvalidInput: the policy is not in the study.
        """
        if kind not in self.kinds:
            raise InvalidInput(f"of: kind must be one of {', '.join(map(repr, self.kinds))}; got {kind!r}")
        return tuple(point for point in self.points if point.policy.kind == kind)

    def to_frame(self) -> pd.DataFrame:
        """Tidy: a row per policy, fleet, quantity and class or role.

        Columns: ``kind``, ``gpus``, ``quantity`` (as in `SimulationResult.values`, and ``decode_by_role``, decodes in
        service of a class in a role), ``of`` (class, role, or role/class), ``fluid`` (the plan; NaN where it is
        silent), ``simulated``, ``half_width`` (95 %), ``gap`` (simulated - fluid).
        """
        import pandas as pd

        rows = [(point.policy.kind, point.policy.gpus, *row) for point in self.points for row in point.rows()]
        frame = pd.DataFrame(rows, columns=["kind", "gpus", "quantity", "of", "fluid", "simulated", "half_width"])
        return frame.assign(gap=frame["simulated"] - frame["fluid"])

    @cached_property
    def fleets(self) -> pd.DataFrame:
        """A row per policy and fleet.

        Columns: ``revenue_rate`` with ``half_width`` (money/s per GPU, 95 %), ``shortfall`` (share of the bound), and
        the largest differences from the plan (requests/GPU) of decodes by role, ``decodes_in_total``, and by role and
        class, ``decodes_by_class``.
        """
        import pandas as pd

        rows = {
            (point.policy.kind, point.policy.gpus): {
                "revenue_rate": point.result.revenue_rate.mean,
                "half_width": point.result.revenue_rate.half_width,
                "shortfall": point.shortfall,
                "decodes_in_total": point.misplaced_in_total,
                "decodes_by_class": point.misplaced_by_class,
            }
            for point in self.points
        }
        return pd.DataFrame(list(rows.values()), index=pd.MultiIndex.from_tuples(list(rows), names=["kind", "gpus"]))

    def order(self, kind: str) -> float:
        """a of the line shortfall = const n^-a through the fleets under one policy, by least squares in logarithms.

        1/2 is the pace of the central limit theorem; NaN with one fleet, or where one does not fall short.
        """
        n, gap = np.array([(point.policy.gpus, point.shortfall) for point in self.of(kind)]).T
        if len(n) < 2 or not np.all(gap > 0):
            return float("nan")
        return float(-np.polyfit(np.log(n), np.log(gap), 1)[0])

    @property
    def statement(self) -> str:
        """What converges and what does not, in words."""
        sentences = []
        for kind in self.kinds:
            first, last = self.of(kind)[0], self.of(kind)[-1]
            pace = f", as n^-{self.order(kind):.2f}" if np.isfinite(self.order(kind)) else ""
            sentences.append(
                f"{kind}: from {first.policy.gpus} to {last.policy.gpus} GPUs the shortfall of revenue from the fluid "
                f"bound goes from {first.shortfall:.2%} to {last.shortfall:.2%}{pace}; decodes by role differ from the "
                f"plan by {first.misplaced_in_total:.2f} and then {last.misplaced_in_total:.2f} requests per GPU in "
                f"total, by {first.misplaced_by_class:.2f} and then {last.misplaced_by_class:.2f} class by class."
            )
        return " ".join(sentences)

    def plot(self) -> Figure:
        """Revenue, queues and decodes by role and class against the number of GPUs ([L26] figures 4 to 6)."""
        from fluidopt.plots import plot_convergence

        return plot_convergence(self)

    def __str__(self) -> str:
        return "\n".join([self.statement, "", text(self.fleets)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        units = dict.fromkeys(("decodes_in_total", "decodes_by_class"), "requests/GPU off the plan")
        units |= {"revenue_rate": "money/s per GPU", "half_width": "95 %", "shortfall": "of the fluid bound"}
        return card(
            "Approach to the fluid plan",
            figures(("Fluid bound", self.plan.revenue_rate, "money/s per GPU")),
            html(self.fleets, title="Fleets", units=units, bars={"revenue_rate": whisker(), "shortfall": amount_bar}),
            paragraph(self.statement),
        )


def convergence_study(
    model_or_plan: FluidModel | Plan,
    *,
    gpus: Sequence[int] = (5, 20, 50, 200, 500),
    kinds: Sequence[str] = ("gate-and-route", "sli-aware"),
    horizon: float = 1000.0,
    replications: int = 4,
    seed: int = 0,
    executor: Executor | None = None,
) -> ConvergenceStudy:
    """Simulate the policies of one plan on fleets of several sizes ([L26] section 6.2).

    Under ``"gate-and-route"`` decodes converge in total, under ``"sli-aware"`` class by class ([L26] Theorem 5.1).

    Args:
        model_or_plan: a model, which is solved, or a plan.
        gpus: numbers of GPUs.
        kinds: policies, as in `Plan.policy`.
        horizon: simulated seconds per replication of the largest fleet. A smaller one runs for longer, to as many
            GPU-seconds, so that all cost the same and are about equally precise: the defaults, on the reference
            instance, 2 s each on two cores, for a half-width of 0.03 to 0.1 % of the revenue.
        replications: independent replications, at least 2; they start from the plan's equilibrium.
        seed: the same seed gives the same numbers in any executor.
        executor: where replications run; default threads of this process.

    Raises:
        InvalidInput: an argument is out of range, or a fleet is too small for the plan's roles.
    """
    if not isinstance(model_or_plan, FluidModel | Plan):
        raise InvalidInput(f"convergence_study: takes a FluidModel or a Plan; got {type(model_or_plan).__name__}")
    sizes = sorted({int(n) if is_whole(n, least=1) else _refused_size(n) for n in gpus})
    if not sizes or not kinds or len(set(kinds)) < len(kinds):
        raise InvalidInput(
            "convergence_study: gpus needs at least one number and kinds at least one policy, each once; got "
            f"gpus={list(gpus)}, kinds={list(kinds)}"
        )
    checked_window(horizon, None, replications, "fluid")
    seed = checked_seed(seed)
    plan = model_or_plan if isinstance(model_or_plan, Plan) else model_or_plan.solve()
    policies = [plan.policy(gpus=n, kind=kind) for kind in kinds for n in sizes]
    points = [_point(policy, horizon * sizes[-1] / policy.gpus, replications, seed, executor) for policy in policies]
    return ConvergenceStudy(plan=plan, points=tuple(points))


def _refused_size(value: object) -> int:
    raise InvalidInput(f"convergence_study: gpus must be whole numbers of at least 1; got {value!r}")


def _point(policy: Policy, horizon: float, replications: int, seed: int, executor: Executor | None) -> FleetPoint:
    going = Replications(policy, replications=replications, seed=seed, start="fluid")
    going.extend(np.linspace(0, horizon, going.most_segments + 1)[1:], executor=executor)
    cut = Cut.choose([going], warmup=True)
    result = summary(going, cut, seed=seed, start="fluid")
    assert going.totals is not None
    # the segments of the result, replication after replication
    kept = going.totals.map(lambda values: np.concatenate(list(merge(values[:, cut.segments :], cut.merged))))
    occupancy = kept.decode_time / (policy.gpus * kept.window[:, None, None])
    mean, error, _ = result.batches.estimates(occupancy)
    return FleetPoint(
        policy=policy,
        result=result,
        decode_by_role=mean,
        decode_by_role_half_width=result.batches.quantile * error,
    )
