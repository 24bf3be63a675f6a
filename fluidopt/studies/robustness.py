"""How a policy fares where the model is wrong: other rates than planned for, bursts, lengths of other laws."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field
from scipy import stats

from fluidopt.errors import InvalidInput
from fluidopt.inputs import Name, Positive, dump, input_type, is_number, is_whole, parse
from fluidopt.plan import Plan
from fluidopt.policy.bound import Bound, revenue_bound
from fluidopt.policy.rules import Gate, Policy
from fluidopt.program import Array
from fluidopt.simulation.arrivals import Bursty, Law, Laws, Sinusoidal, Steady, Stepwise
from fluidopt.simulation.experiment import checked_seed
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.general import simulate_general
from fluidopt.simulation.statistics import LEVEL, Estimate
from fluidopt.simulation.system import System
from fluidopt.tables import shorten, text
from fluidopt.views import amount_bar, card, html, paragraph, share_bar, signed_bar, whisker

if TYPE_CHECKING:
    import pandas as pd

FACTORS = ("arrival_rate", "prompt_tokens", "output_tokens", "abandonment_rate")


@input_type
class Disturbance:
    """How the world differs from the model that the policies were made for."""

    name: Name
    """What it is called in tables."""
    _: KW_ONLY
    arrival_rate: Positive = 1.0
    """By what the arrival rates of all classes are multiplied."""
    prompt_tokens: Positive = 1.0
    """By what the mean prompt tokens are."""
    output_tokens: Positive = 1.0
    """By what the mean decode iterations are."""
    abandonment_rate: Positive = 1.0
    """By what the abandonment rates are."""
    laws: Laws = Laws()
    """The laws of lengths and patience."""
    arrivals: Annotated[Steady | Bursty | Sinusoidal | Stepwise, Field(discriminator="kind")] = Steady()
    """How arrivals fall in time."""

    def changed(self, policy: Policy) -> Policy:
        """The policy, rules and targets as they are, in a scenario with the rates of this world."""
        if all(getattr(self, name) == 1.0 for name in FACTORS):
            return policy
        classes = tuple(
            replace(each, **{name: getattr(each, name) * getattr(self, name) for name in FACTORS})
            for each in policy.scenario.classes
        )
        return replace(policy, scenario=replace(policy.scenario, classes=classes))


NOMINAL = Disturbance("nominal")
"""The model's own world."""


def standard_disturbances(size: float = 0.2) -> tuple[Disturbance, ...]:
    """Each family of rates higher and lower by ``size``, bursty arrivals, fixed and heavy-tailed token counts.

    Raises:
        InvalidInput: ``size`` is not between 0 and 1.
    """
    if not (is_number(size) and 0 < size < 1):
        raise InvalidInput(f"standard_disturbances: size must be between 0 and 1; got {size!r}")
    rates = [
        Disturbance(f"{name.replace('_', ' ')} {sign * size:+.0%}", **{name: 1.0 + sign * size})  # type: ignore[arg-type]
        for name in FACTORS
        for sign in (1, -1)
    ]
    fixed, heavy = Law("deterministic"), Law("lognormal", cv=1.5)
    return (
        *rates,
        Disturbance("bursty arrivals", arrivals=Bursty()),
        Disturbance("fixed token counts", laws=Laws(prompt=fixed, output=fixed)),
        Disturbance("lognormal token counts", laws=Laws(prompt=heavy, output=heavy)),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class RobustnessStudy:
    """What policies earn in worlds they were not made for, all on the same requests, replication by replication."""

    policies: dict[str, Policy]
    """By name."""
    disturbances: tuple[Disturbance, ...]
    """The worlds, the nominal one first."""
    revenue: Array
    """(worlds, policies, replications), money/s per GPU: what was earned in the window."""
    bounds: tuple[tuple[Bound, ...], ...]
    """By world and policy: the revenue bound at the world's own rates."""
    horizon: float
    """Simulated seconds per replication, warm-up included; each starts from the empty fleet."""
    warmup: float
    """Seconds at the beginning that are not measured."""
    seed: int

    @property
    def replications(self) -> int:
        """Number of independent replications."""
        return int(self.revenue.shape[2])

    def _at(self, policy: str, world: str) -> tuple[int, int]:
        names = [each.name for each in self.disturbances]
        for argument, name, known in (("policy", policy, list(self.policies)), ("disturbance", world, names)):
            if name not in known:
                raise InvalidInput(
                    f"{argument} must be one of {shorten(list(map(repr, known)), most=20)}; got {name!r}"
                )
        return names.index(world), list(self.policies).index(policy)

    def revenue_rate(self, policy: str, disturbance: str = NOMINAL.name) -> Estimate:
        """What a policy earns in a world, money/s per GPU.

        Raises:
            InvalidInput: there is no such policy or disturbance.
        """
        return _estimate(self.revenue[self._at(policy, disturbance)])

    def change(self, policy: str, disturbance: str) -> Estimate:
        """What a policy earns in a world less what it earns in the nominal one, from paired replications."""
        world, p = self._at(policy, disturbance)
        return _estimate(self.revenue[world, p] - self.revenue[0, p])

    def behind_best(self, policy: str, disturbance: str) -> Estimate:
        """What the best of the policies in a world earns there more than this one, from paired replications."""
        world, p = self._at(policy, disturbance)
        best = int(self.revenue[world].mean(axis=1).argmax())
        return _estimate(self.revenue[world, best] - self.revenue[world, p])

    @cached_property
    def best(self) -> dict[str, str]:
        """Name of the policy that earns most, by world."""
        names = list(self.policies)
        winners = self.revenue.mean(axis=2).argmax(axis=1)
        return {each.name: names[p] for each, p in zip(self.disturbances, winners, strict=True)}

    def to_frame(self) -> pd.DataFrame:
        """A row per world and policy.

        Columns, money/s per GPU with 95 % half-widths: ``revenue_rate``; ``change`` from the policy's own revenue in
        the nominal world; ``behind_best``, what the best of the policies in that world earns more (both from paired
        replications); ``bound``, what no policy beats at the world's rates (missing where a condition fails); and
        ``of_bound``.
        """
        import pandas as pd

        rows = {}
        for w, world in enumerate(self.disturbances):
            for p, policy in enumerate(self.policies):
                revenue, change = self.revenue_rate(policy, world.name), self.change(policy, world.name)
                behind, bound = self.behind_best(policy, world.name), self.bounds[w][p]
                most = bound.rate if bound.holds else math.nan
                rows[world.name, policy] = {
                    "revenue_rate": revenue.mean,
                    "half_width": revenue.half_width,
                    "change": change.mean,
                    "change_half_width": change.half_width,
                    "behind_best": behind.mean,
                    "behind_best_half_width": behind.half_width,
                    "bound": most,
                    "of_bound": revenue.mean / most if most > 0 else math.nan,
                }
        frame = pd.DataFrame.from_dict(rows, orient="index")
        frame.index = pd.MultiIndex.from_tuples(list(rows), names=["disturbance", "policy"])
        return frame

    @property
    def statement(self) -> str:
        """The outcome in words."""
        sentences = []
        for policy in self.policies:
            nominal = self.revenue_rate(policy).mean
            worst = min(self.disturbances, key=lambda each: self.revenue_rate(policy, each.name).mean)
            change, behind = (
                self.change(policy, worst.name).mean,
                {each.name: self.behind_best(policy, each.name) for each in self.disturbances},
            )
            leads = sum(winner == policy for winner in self.best.values())
            regret = max(behind, key=lambda name: behind[name].mean)
            sentence = f"{policy} earns {nominal:.6g} as planned, and least, {nominal + change:.6g}, under {worst.name}"
            sentence += f"; it is the best of the policies in {leads} of {len(self.disturbances)} worlds"
            if behind[regret].mean > 0:
                sentence += (
                    f", and at most {behind[regret].mean:.3g} ± {behind[regret].half_width:.2g} behind ({regret})"
                )
            sentences.append(sentence + ".")
        return " ".join(sentences)

    @property
    def caption(self) -> str:
        """How the numbers were made, in words."""
        return (
            f"{self.replications} replications of {self.horizon:g} s from the empty fleet, the first {self.warmup:g} s "
            f"cut, seed {self.seed}; common requests, differences from paired replications; policies not planned anew."
        )

    def to_dict(self) -> dict[str, Any]:
        """The study as JSON-able data; `from_dict` reads it back."""
        return {
            "policies": {name: policy.to_dict() for name, policy in self.policies.items()},
            "disturbances": [dump(each) for each in self.disturbances],
            "revenue": self.revenue.tolist(),
            **{name: getattr(self, name) for name in ("horizon", "warmup", "seed")},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RobustnessStudy:
        """Read a study back; the bounds are computed anew.

        Raises:
            InvalidInput: where an entry is missing or breaks a rule.
        """
        try:
            policies = {str(name): Policy.from_dict(each) for name, each in data["policies"].items()}
            worlds = tuple(parse(Disturbance, each) for each in data["disturbances"])
            revenue = np.array(data["revenue"], dtype=float).reshape(len(worlds), len(policies), -1)
            plain = {"horizon": float(data["horizon"]), "warmup": float(data["warmup"]), "seed": int(data["seed"])}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InvalidInput(f"not a saved robustness study: {error!r}") from None
        return cls(
            policies=policies,
            disturbances=worlds,
            revenue=revenue,
            bounds=_bounds(worlds, policies),
            **plain,  # type: ignore[arg-type]
        )

    def __str__(self) -> str:
        return "\n".join(["Robustness study", self.caption, self.statement, "", text(self.to_frame(), max_rows=80)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        bars = {"revenue_rate": whisker(), "change": signed_bar, "behind_best": amount_bar, "of_bound": share_bar}
        return card(
            "Robustness study",
            paragraph(self.statement),
            html(
                frame,
                title="By disturbance",
                units=dict.fromkeys(frame.columns, "money/s per GPU") | {"of_bound": "of the bound"},
                bars=bars,
                max_rows=80,
            ),
            paragraph(self.caption, muted=True),
        )


def _estimate(values: Array) -> Estimate:
    """The mean of independent replications, (N,)."""
    count = len(values)
    error = float(values.std(ddof=1) / math.sqrt(count))
    return Estimate(float(values.mean()), float(stats.t.ppf(0.5 + LEVEL / 2, count - 1)) * error, error, float(count))


def robustness_study(
    plan_or_policies: Plan | Mapping[str, Policy] | Sequence[Policy],
    *,
    gpus: int | None = None,
    kinds: Sequence[str] | None = None,
    disturbances: Sequence[Disturbance] | None = None,
    horizon: float = 2000.0,
    warmup: float | None = None,
    replications: int = 8,
    seed: int | None = None,
    executor: Executor | None = None,
) -> RobustnessStudy:
    """Simulate fixed policies in worlds that differ from their model.

    Every request carries its own lengths and patience, drawn apart from the policies' choices: in replication k all
    policies meet the same requests in a world, and worlds share what they do not change.

    Args:
        plan_or_policies: a plan, from which policies are read off; or policies, by name or named by their kinds, all
            for one scenario and number of GPUs.
        gpus: number of GPUs, with a plan (default: the scenario's own).
        kinds: of the policies, with a plan; by default ``"gate-and-route"`` (or what belongs to the charging scheme),
            ``"FI-WSP"`` where GPUs can do both jobs, and `threshold_policy`.
        disturbances: the worlds besides the nominal one; default `standard_disturbances`.
        horizon: simulated seconds per replication, warm-up included.
        warmup: seconds at the beginning that are not measured (default: a tenth of the horizon).
        replications: at least 2.
        seed: for the random streams; None draws one, which the study keeps.
        executor: where replications run; default threads of this process.

    Raises:
        InvalidInput: an argument out of range, two policies or worlds of one name, policies that do not belong
            together, or a fleet whose queues grow without end.
    """
    policies = _policies(plan_or_policies, gpus, kinds)
    worlds = _worlds(standard_disturbances() if disturbances is None else disturbances)
    if not (is_number(horizon) and horizon > 0):
        raise InvalidInput(f"robustness_study: horizon must be a finite number of seconds above 0; got {horizon!r}")
    warmup = horizon / 10 if warmup is None else warmup
    if not (is_number(warmup) and 0 <= warmup < horizon):
        raise InvalidInput(
            f"robustness_study: warmup must be at least 0 and below horizon ({horizon:g} s); got {warmup!r}"
        )
    if not is_whole(replications, least=2):
        raise InvalidInput(
            "robustness_study: replications must be a whole number of at least 2, for a confidence interval; got "
            f"{replications!r}"
        )
    seed = checked_seed(seed)
    fleets = [[_fleet(policy, world) for policy in policies.values()] for world in worlds]
    bounds = _bounds(worlds, policies)
    replicate = partial(_earned, horizon=float(horizon), warmup=float(warmup), seed=seed)
    jobs = [
        (system, world, k)
        for world, systems in zip(worlds, fleets, strict=True)
        for system in systems
        for k in range(replications)
    ]
    try:
        if executor is None:
            with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as own:
                earned = list(own.map(replicate, *zip(*jobs, strict=True)))
        else:
            earned = list(executor.map(replicate, *zip(*jobs, strict=True)))
    except OverflowError as error:
        raise InvalidInput(f"robustness_study: {error}") from None
    return RobustnessStudy(
        policies=policies,
        disturbances=worlds,
        revenue=np.array(earned).reshape(len(worlds), len(policies), replications),
        bounds=bounds,
        horizon=float(horizon),
        warmup=float(warmup),
        seed=seed,
    )


def _bounds(worlds: Sequence[Disturbance], policies: Mapping[str, Policy]) -> tuple[tuple[Bound, ...], ...]:
    """The revenue bounds by world and policy."""
    return tuple(tuple(revenue_bound(world.changed(policy)) for policy in policies.values()) for world in worlds)


def _fleet(policy: Policy, world: Disturbance) -> System:
    """The fleet in a world: its rates and what it pays are the world's, every rule is the policy's as it was made."""
    planned, actual = fleet_system(policy), fleet_system(world.changed(policy))
    of_the_world = [name for name in (each.name for each in fields(System)) if name in FACTORS or "reward" in name]
    return replace(planned, **{name: getattr(actual, name) for name in of_the_world})


def _earned(system: System, world: Disturbance, k: int, *, horizon: float, warmup: float, seed: int) -> float:
    """Revenue rate of replication k, money/s per GPU."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(k,)))
    seen = simulate_general(system, horizon=horizon, warmup=warmup, rng=rng, laws=world.laws, process=world.arrivals)
    return float(seen.reward / (seen.window * system.gpus))


def threshold_policy(plan: Plan, *, gpus: int, hold: float | None = None, prefill_gpus: int | None = None) -> Policy:
    """Classes by strict priority, those worth most beyond the price of their capacity first; of classes that the plan
    does not serve in full one starts only while enough decode slots are free.

    More GPUs than the plan's share may prefill: the hold keeps decodes from waiting, which the partition need not.

    Args:
        plan: what the priorities, and who is held, are read off.
        gpus: number of GPUs.
        hold: free decode slots, less waiting decodes, above which such a class starts (default: 1 for every 16 GPUs,
            at least 1).
        prefill_gpus: GPUs that may prefill (default: half as many again as the plan's share; with several GPU types the
            plan's share of each).

    Raises:
        InvalidInput: as `Plan.policy`.
    """
    base = plan.policy(gpus=gpus, kind="gate-and-route")
    if prefill_gpus is None and len(plan.model.gpu_types) == 1:
        prefill_gpus = min(gpus, math.ceil(1.5 * sum(role.gpus for role in base.roles if role.prefill)))
    if prefill_gpus is not None:
        base = plan.policy(gpus=gpus, kind="gate-and-route", prefill_gpus=prefill_gpus)
    rule = plan.thresholds.sort_values("margin", ascending=False, kind="stable", na_position="last")
    hold = max(1.0, gpus // 16) if hold is None else hold
    held = {str(name): hold for name in rule.index if not rule.loc[name, "decision"].startswith("serve all")}
    gate = Gate(rule="priority", order=tuple(map(str, rule.index)), hold=held)
    return replace(base, kind="thresholds", gate=gate)


def _policies(
    subject: Plan | Mapping[str, Policy] | Sequence[Policy], gpus: int | None, kinds: Sequence[str] | None
) -> dict[str, Policy]:
    if isinstance(subject, Plan):
        return _read_off(subject, gpus, kinds)
    if gpus is not None or kinds is not None:
        raise InvalidInput("robustness_study: gpus and kinds go with a plan, not with policies that are made already")
    given = list(subject.items()) if isinstance(subject, Mapping) else [(getattr(p, "kind", "?"), p) for p in subject]
    if not given:
        raise InvalidInput("robustness_study: takes a plan or at least one policy; got none")
    for name, policy in given:
        if not isinstance(policy, Policy):
            raise InvalidInput(f"robustness_study: {name!r} must be a Policy; got {type(policy).__name__}")
    named = dict(given)
    if len(named) < len(given):
        raise InvalidInput(
            f"robustness_study: policies must have different names; got {[name for name, _ in given]}. Name them: "
            "robustness_study({'name': policy, ...})"
        )
    first = given[0][1]
    for name, policy in given:
        if policy.gpus != first.gpus or policy.scenario != first.scenario:
            raise InvalidInput(
                f"robustness_study: all policies must be for the same scenario and GPUs, to meet the same requests; "
                f"{name!r} ({policy.gpus} GPUs) differs from {given[0][0]!r} ({first.gpus} GPUs)"
            )
    return named


def _read_off(plan: Plan, gpus: int | None, kinds: Sequence[str] | None) -> dict[str, Policy]:
    if kinds is not None:
        return _policies([plan.policy(gpus=gpus, kind=kind) for kind in kinds], None, None)
    first = plan.policy(gpus=gpus)
    policies = [first]
    if all(
        any(mode.prefills and gpu.rest_mode(mode).decode_slots for mode in gpu.modes()) for gpu in plan.model.gpu_types
    ):
        policies.append(plan.policy(gpus=gpus, kind="FI-WSP"))
    policies.append(threshold_policy(plan, gpus=first.gpus))
    return {policy.kind: policy for policy in policies}


def _worlds(disturbances: Sequence[Disturbance]) -> tuple[Disturbance, ...]:
    for each in disturbances:
        if not isinstance(each, Disturbance):
            raise InvalidInput(f"robustness_study: disturbances must be Disturbance objects; got {type(each).__name__}")
    worlds = (NOMINAL, *(each for each in disturbances if each != NOMINAL))
    names = [each.name for each in worlds]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InvalidInput(f"robustness_study: disturbances must have different names; {twice[0]!r} occurs twice")
    return worlds
