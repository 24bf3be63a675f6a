"""What no policy can beat: the revenue bound of a fleet, the conditions it rests on, and which of them hold."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from fluidopt.contention import GPU
from fluidopt.errors import ContentionWarning, InvalidInput
from fluidopt.inputs import is_number
from fluidopt.model import FluidModel
from fluidopt.plan import Plan
from fluidopt.policy.rules import Policy, Role
from fluidopt.program import Array
from fluidopt.scenario import Scenario
from fluidopt.tables import shorten
from fluidopt.views import card, cautions, figures, html, paragraph

if TYPE_CHECKING:
    import pandas as pd

    from fluidopt.simulation.system import Start


class Condition(NamedTuple):
    """One thing that the bound rests on."""

    condition: str
    """What is required, in words."""
    holds: bool
    """Whether it does."""
    why: str
    """What was found, and what was done about it where the plan's own revenue is no bound."""


@dataclass(frozen=True, eq=False)
class Bound:
    """The most that any policy earns, money/s per GPU: from an empty fleet over any horizon, and in the long run.

    It holds for every policy that does not know lengths and patience in advance (it may idle, reject, preempt and
    migrate) and needs no Poisson arrivals, only that no more than lambda_i t of a class come in t seconds on average.
    With lengths that are not exponential it holds in the long run, for policies that finish what they start.
    """

    plan: Plan
    """The plan it is read off: the fleet's model without promises, added rows or another objective, all classes free
    to abandon."""
    conditions: tuple[Condition, ...]
    """What it rests on, and what was found."""

    @property
    def rate(self) -> float:
        """Money/s per GPU, certified: the plan's dual bound, which is R* plus the certificate's gap."""
        return max(self.plan.certificate.bound, self.plan.revenue_rate)

    @property
    def holds(self) -> bool:
        """Whether every condition is met; where not, ``rate`` bounds the model and not this policy."""
        return all(condition.holds for condition in self.conditions)

    @cached_property
    def prefill_value(self) -> Array:
        """phi_i, shape (I,): what one more request of a class before the end of its prefill is worth at most, money."""
        return np.maximum(self.plan.program.row_grids(self.plan.solution.duals)["prefill_balance"], 0.0)

    @cached_property
    def decode_value(self) -> Array:
        """eta_i, shape (I,): what one more request of a class whose prefill is done is worth at most, money."""
        return np.maximum(self.plan.program.row_grids(self.plan.solution.duals)["decode_balance"], 0.0)

    def over(self, horizon: float, *, start: Start, gpus: int) -> float:
        """The bound of a window of time that opens with requests in the fleet, money/s per GPU.

        R* + sum_i (phi_i Z_p,i + eta_i Z_d,i)/(n T), with Z_p and Z_d the requests up to and after the end of their
        prefill when the window opens. A window after a discarded warm-up opens in such a state, and the plain bound
        does not hold for it.

        Args:
            horizon: T, length of the window, s.
            start: the state in which it opens (of several, a replication's own).
            gpus: n.

        Raises:
            InvalidInput: an argument is out of range.
        """
        if not (is_number(horizon) and horizon > 0):
            raise InvalidInput(f"Bound.over: horizon must be a finite number of seconds above 0; got {horizon!r}")
        before = start.prefill_queue + start.prefill.sum(axis=0)
        after = start.decode_queue + start.decode.sum(axis=0)
        worth = float(self.prefill_value @ before + self.decode_value @ after)
        return self.rate + worth / (gpus * horizon)

    def against(self, revenue: float) -> str:
        """How far a revenue rate, money/s per GPU, is from the bound, in words; empty where the bound is 0."""
        if self.rate <= 0:
            return ""
        gap = 1.0 - revenue / self.rate
        rest = ", which no policy beats" if self.holds else " (no bound for this policy)"
        return f"{abs(gap):.1%} {'below' if gap >= 0 else 'above'} the fluid optimum {self.rate:.6g}{rest}"

    def to_frame(self) -> pd.DataFrame:
        """A row per condition: whether it holds, and what was found."""
        import pandas as pd

        return pd.DataFrame(self.conditions).set_index("condition")

    @property
    def statement(self) -> str:
        """The bound in words."""
        if self.holds:
            return f"No policy earns more than {self.rate:.6g} money/s per GPU."
        broken = [condition.condition for condition in self.conditions if not condition.holds]
        return f"{self.rate:.6g} money/s per GPU is NOT a bound for this policy: it is not so that {shorten(broken)}."

    def __str__(self) -> str:
        lines = [self.statement]
        lines += [f"  {'yes' if each.holds else 'NO '} {each.condition}: {each.why}" for each in self.conditions]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return card(
            "Revenue bound",
            figures(("At most" if self.holds else "Fluid optimum", self.rate, "money/s per GPU")),
            paragraph(self.statement) if self.holds else cautions([self.statement]),
            html(self.to_frame(), title="What it rests on"),
        )


def revenue_bound(policy_or_plan: Policy | Plan) -> Bound:
    """Bound the revenue of a policy, or of every policy for a plan's model.

    The bound is the optimum of the fluid LP over the fleet as it is, without whatever lowers it: promises, rows of
    one's own, another objective, classes that never abandon (which the LP must serve; here it may leave them) and, of a
    policy, GPU types in other proportions than the model's. Where the plan already is that, it is used as it is.

    Raises:
        InvalidInput: neither a policy nor a plan.
        SolverFailure: the LP cannot be solved and certified.
    """
    if isinstance(policy_or_plan, Policy):
        policy, scenario = policy_or_plan, policy_or_plan.scenario
    elif isinstance(policy_or_plan, Plan):
        policy, scenario = None, policy_or_plan.model.scenario
    else:
        raise InvalidInput(f"revenue_bound: takes a Policy or a Plan; got {type(policy_or_plan).__name__}")
    conditions = [_promises(scenario, policy_or_plan), _patience(scenario)]
    relaxed = _relaxed(scenario, policy)
    if policy is not None:
        conditions += [_shares(policy, relaxed), _modes(policy)]
    given = policy_or_plan if isinstance(policy_or_plan, Plan) else None
    same = given is not None and given.model.is_standard and given.model.scenario == relaxed
    if same:
        plan = cast(Plan, given)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ContentionWarning)  # the model itself has warned already
            plan = FluidModel.from_scenario(relaxed).solve()
    tolerance = plan.solution.tolerance
    conditions.append(
        Condition(
            "the optimum is certified",
            plan.certificate.holds(tolerance),
            f"R* {plan.revenue_rate:.6g}, {plan.certificate}; the bound is the dual one",
        )
    )
    return Bound(plan, tuple(conditions))


def _relaxed(scenario: Scenario, policy: Policy | None) -> Scenario:
    """The scenario without what lowers the optimum below what some policy may earn."""
    # R* does not depend on how fast a class abandons, only on whether it may.
    classes = tuple(replace(each, abandonment_rate=each.abandonment_rate or 1.0) for each in scenario.classes)
    changes: dict[str, Any] = {"classes": classes, "service_levels": (), "rows": (), "objective": None}
    if policy is not None:
        count = {gpu.name: 0 for gpu in scenario.gpu_types}
        for role in policy.roles:
            count[role.gpu] = count.get(role.gpu, 0) + role.gpus
        present = [gpu for gpu in scenario.gpu_types if count[gpu.name]]
        if len(scenario.gpu_types) > 1 and present:
            total = sum(count[gpu.name] for gpu in present)
            changes["gpu"] = tuple(replace(gpu, share=count[gpu.name] / total) for gpu in present)
    return replace(scenario, **changes)


def _promises(scenario: Scenario, of: Policy | Plan) -> Condition:
    """Added rows only lower the optimum, so they are left out; that always helps."""
    added: list[str] = [level.kind for level in scenario.service_levels]
    added += [f"row {row.name!r}" for row in scenario.rows]
    added += ["another objective"] if scenario.objective is not None else []
    if isinstance(of, Plan) and not of.model.is_standard and not added:
        added = ["rows that have no text"]
    why = "there are none"
    if added:
        why = f"left out here: {shorten(added)}; a policy need not keep them, so the plan's own revenue is no bound"
    return Condition("no promise, row or other objective lowers the optimum", True, why)


def _patience(scenario: Scenario) -> Condition:
    patient = [each.name for each in scenario.classes if each.abandonment_rate == 0]
    why = "they do"
    if patient:
        why = (
            f"{shorten(patient)} never abandon; the LP must serve them, a policy may let them wait: here they are free "
            "to abandon, which only raises the optimum"
        )
    return Condition("every class may abandon", True, why)


def _shares(policy: Policy, relaxed: Scenario) -> Condition:
    why = "there is one GPU type"
    if len(policy.scenario.gpu_types) > 1:
        parts = [f"{gpu.name} {gpu.share:.4g}" for gpu in relaxed.gpu_types]
        why = f"the shares are those of the policy's whole GPUs: {shorten(parts)}"
    return Condition("GPU types in the proportions of the fleet", True, why)


def _modes(policy: Policy) -> Condition:
    types = {gpu.name: gpu for gpu in policy.scenario.gpu_types}
    faults = [fault for role in policy.roles if role.gpus for fault in _faults(role, types)]
    why = "they do: every role's modes are in the model, with at least its slots"
    return Condition("every GPU runs in modes of the model", not faults, shorten(faults, between="; ") or why)


def _faults(role: Role, types: dict[str, GPU]) -> list[str]:
    """What a role can do that no mode of the model does."""
    if role.gpu not in types:
        return [f"role {role.name!r} is of GPU type {role.gpu!r}, which the model does not have"]
    modes = types[role.gpu].modes()
    states = [(role.rest, min(role.decode_slots, role.slots))]
    if role.prefill is not None:
        states.append((role.prefill, min(role.decode_slots, role.slots - 1)))
    faults = []
    for used, decodes in states:
        alike = [mode for mode in modes if (mode.chunk, mode.iteration_time) == (used.chunk, used.iteration_time)]
        most = max((mode.decode_slots for mode in alike), default=None)
        if most is None:
            faults.append(f"role {role.name!r} runs in mode {used.name!r}, which the model does not have")
        elif decodes > most:
            faults.append(
                f"role {role.name!r} runs up to {decodes} decodes in mode {used.name!r}, which has slots for {most}"
            )
    return faults
