"""The family of threshold rules that a search for a finite fleet goes through: where it starts, where it can go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from fluidopt.errors import InvalidInput
from fluidopt.policy.extract import extract
from fluidopt.policy.rules import Gate, Policy, Router
from fluidopt.program import Array
from fluidopt.simulation.system import IntArray

if TYPE_CHECKING:
    from fluidopt.plan import Plan

NEVER_HELD = -np.inf
SERVED = 1 - 1e-6
FEW_CLASSES = 6
"""With more classes than this, classes that the plan treats alike (serve all, part, none) share one threshold."""


@dataclass(frozen=True)
class Rule:
    """A threshold rule by its few parameters.

    Attributes:
        gate: rule of the gate, as in `Gate.rule`.
        order: classes by priority, for the gate ``"priority"``; empty for the others.
        hold: (I,) a class is admitted while free decode slots less waiting decodes are above its hold; -inf: always.
        prefill_gpus: how many GPUs may prefill; None: as the plan says.
        stays: no partition; a request is decoded where it was prefilled.
        mixed_first: decodes prefer the GPUs that prefill.
        shares: decodes go to roles by the plan's shares, class by class (the SLI-aware router).
        placement: of prefills, as in `Gate.placement`.
    """

    gate: Literal["occupancy", "queue-deviation", "priority"]
    order: tuple[int, ...]
    hold: tuple[float, ...]
    prefill_gpus: int | None
    stays: bool = False
    mixed_first: bool = False
    shares: bool = False
    placement: Literal["uniform", "fewest-decodes"] = "uniform"

    def policy(self, plan: Plan, gpus: int) -> Policy:
        """The policy for ``gpus`` GPUs.

        Raises:
            InvalidInput: the fleet cannot be split so.
        """
        names = plan.model.workload.names
        kind = "GI-WSP" if self.stays else "sli-aware" if self.shares else "gate-and-route"
        base = extract(plan, gpus=gpus, kind=kind, prefill_gpus=None if self.stays else self.prefill_gpus)
        gate = Gate(
            rule=self.gate,
            order=tuple(names[i] for i in self.order),
            hold={name: float(h) for name, h in zip(names, self.hold, strict=True) if np.isfinite(h)},
            placement=self.placement,
        )
        router = base.router
        if self.mixed_first and not self.stays and not self.shares:
            router = Router(order=router.order[::-1], rule=router.rule)
        return replace(base, kind="refined", gate=gate, router=router)

    def scaled(self, ratio: float) -> Rule:
        """The rule for a fleet ``ratio`` times as large: as large a part of it prefills, and the holds grow like the
        fluctuations, with the square root."""
        held = tuple(h if not np.isfinite(h) else float(round(h * np.sqrt(ratio))) for h in self.hold)
        prefill = None if self.prefill_gpus is None else max(1, round(self.prefill_gpus * ratio))
        return replace(self, hold=held, prefill_gpus=prefill)


@dataclass(frozen=True)
class Family:
    """The threshold rules for one plan and number of GPUs."""

    plan: Plan
    gpus: int

    @property
    def baseline(self) -> Rule:
        """Gate-and-route ([L26] section 4.1)."""
        return Rule("occupancy", (), (NEVER_HELD,) * self._classes, None)

    @property
    def _classes(self) -> int:
        return len(self.plan.model.workload)

    @property
    def slots(self) -> int:
        """Decode slots of the fleet under the baseline."""
        policy = self.baseline.policy(self.plan, self.gpus)
        return sum(role.gpus * role.decode_slots for role in policy.roles)

    @property
    def unit(self) -> float:
        """A natural step of the thresholds: a twentieth of the root of the decode slots, at least one request."""
        return max(1.0, 0.05 * float(np.sqrt(self.slots)))

    def _served(self) -> Array:
        rate = self.plan.model.workload.arrival_rate
        return np.divide(self.plan.admitted, rate, out=np.ones_like(rate), where=rate > 0)

    def groups(self) -> list[IntArray]:
        """Classes that share a threshold, as arrays of their numbers."""
        if self._classes <= FEW_CLASSES:
            return [np.array([i]) for i in range(self._classes)]
        served = self._served()
        full, none = served >= SERVED, served <= 1 - SERVED
        parts = [np.flatnonzero(mask) for mask in (full, ~full & ~none, none)]
        return [part for part in parts if part.size]

    def orders(self) -> list[tuple[int, ...]]:
        """Orders of priority to begin with, each once.

        Where both prefill and decode are scarce, every margin is 0 (w_i is c_p P_i + c_d D_i, so that the prices of
        the tokens are those of the capacities) and the plan does not order the classes: hence the other indices.
        """
        plan, workload = self.plan, self.plan.model.workload
        prices = plan.model.scenario.prices
        worth = prices.prompt * workload.prompt_tokens + prices.output * workload.output_tokens
        decodes = workload.output_tokens / workload.prompt_tokens
        margin = plan.class_margin
        indices = [
            (margin, self._served(), worth / workload.output_tokens),
            (self._served(), margin, worth / workload.prompt_tokens),
            (worth / workload.prompt_tokens,),
            (worth / workload.output_tokens,),
            (worth * workload.abandonment_rate,),
            (worth,),
            (decodes,),
        ]
        found = [tuple(int(i) for i in np.lexsort([-np.round(key, 9) for key in reversed(keys)])) for keys in indices]
        return list(dict.fromkeys(found))

    def prefill_counts(self) -> list[int | None]:
        """Numbers of prefill GPUs to begin with; only the plan's own where there are several GPU types."""
        if len(self.plan.model.gpu_types) > 1:
            return [None]
        policy = self.baseline.policy(self.plan, self.gpus)
        least = sum(role.gpus for role in policy.roles if role.prefill is not None)
        counts = {least + extra for extra in (-1, 0, 1)} | {round(least * factor) for factor in (1.15, 1.3, 1.6, 2.2)}
        return [*sorted(count for count in counts | {self.gpus} if 1 <= count <= self.gpus)]

    def start(self) -> list[Rule]:
        """Rules to begin with: the baseline and its gate held back, and priorities with thresholds on the classes that
        the plan does not serve in full, over all prefill counts; and the same without a partition."""
        served = self._served()
        size = np.sqrt(self.slots)
        never = float(self.slots)
        rules = [self.baseline]
        for count in self.prefill_counts():
            rules.append(replace(self.baseline, prefill_gpus=count))
            for order in self.orders():
                for hold in self._holds(order, served, size, never):
                    rules.append(Rule("priority", order, hold, count))
        common = [replace(rule, stays=True, prefill_gpus=None) for rule in rules]
        shared = [replace(rule, shares=True) for rule in rules] if self.plan.model.scenario.service_levels else []
        rules += common + shared
        return list(dict.fromkeys(rules))

    def around(self, rule: Rule) -> list[Rule]:
        """Rules to begin with where one is known for another number of GPUs."""
        rules = [self.baseline, rule]
        for factor in (0.5, 1.0, 2.0):
            held = tuple(float(round(h * factor)) if np.isfinite(h) else h for h in rule.hold)
            counts = [None] if rule.prefill_gpus is None else [round(rule.prefill_gpus * f) for f in (0.9, 1.0, 1.1)]
            rules += [replace(rule, hold=held, prefill_gpus=count) for count in counts]
        return list(dict.fromkeys(rules))

    def _holds(self, order: tuple[int, ...], served: Array, size: float, never: float) -> Iterator[tuple[float, ...]]:
        yield (NEVER_HELD,) * self._classes
        first = np.zeros(self._classes, dtype=bool)
        first[order[0]] = True
        free = [(served >= SERVED)] if np.any(served >= SERVED) and np.any(served < SERVED) else []
        for unheld in [*free, first, np.zeros_like(first)]:
            for part in (-0.15, 0.0, 0.07, 0.2, 0.4):
                height = float(round(part * size))
                hold = np.where(unheld, NEVER_HELD, height)
                yield tuple(hold.tolist())
            refused = np.where(served <= 1 - SERVED, never, np.where(unheld, NEVER_HELD, round(0.07 * size)))
            if np.any(served <= 1 - SERVED):
                yield tuple(refused.tolist())

    def neighbours(self, rule: Rule, step: int) -> list[Rule]:
        """Rules that differ in one parameter, numbers by ``step`` units."""
        found = []
        if rule.prefill_gpus is not None and not rule.stays:
            move = max(1, round(step * 0.01 * self.gpus))
            found += [replace(rule, prefill_gpus=rule.prefill_gpus + d) for d in (-move, move)]
        height = max(1.0, float(round(step * self.unit)))
        for group in self.groups():
            now = rule.hold[int(group[0])]
            for value in (now - height, now + height) if np.isfinite(now) else (-height, 0.0):
                hold = list(rule.hold)
                for i in group:
                    hold[int(i)] = value if value > -2 * self.slots else NEVER_HELD
                found.append(replace(rule, hold=tuple(hold)))
            if np.isfinite(now):
                hold = list(rule.hold)
                for i in group:
                    hold[int(i)] = NEVER_HELD
                found.append(replace(rule, hold=tuple(hold)))
        if rule.gate == "priority" and self._classes <= FEW_CLASSES:
            for k in range(self._classes - 1):
                order = list(rule.order)
                order[k], order[k + 1] = order[k + 1], order[k]
                found.append(replace(rule, order=tuple(order)))
        placement: Literal["uniform", "fewest-decodes"] = "uniform" if rule.placement != "uniform" else "fewest-decodes"
        found.append(replace(rule, placement=placement))
        if not rule.stays:
            found.append(replace(rule, mixed_first=not rule.mixed_first, shares=False))
            found.append(replace(rule, shares=not rule.shares, mixed_first=False))
        return found

    def possible(self, rules: list[Rule]) -> list[tuple[Rule, Policy]]:
        """Those of the rules that the fleet can follow, with their policies."""
        made = []
        for rule in dict.fromkeys(rules):
            try:
                made.append((rule, rule.policy(self.plan, self.gpus)))
            except InvalidInput:
                continue
        return made
