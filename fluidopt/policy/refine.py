"""The threshold rule that earns most in a finite fleet: a search by simulation, begun at the plan's prices.

The rules of a plan are optimal as the fleet grows without end. In a finite one the gate that never idles gives the
slots that a fully served class leaves unused for a moment to classes that overflow the decode buffer later. So the
search goes through rules that hold classes back (`fluidopt.policy.family`): successive halving over a grid (Karnin,
Koren and Somekh, ICML 2013) with common arrivals, then a descent from the best, then a paired test on a fresh seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.errors import InvalidInput
from fluidopt.inputs import is_whole
from fluidopt.policy.extract import extract
from fluidopt.policy.family import Family, Rule
from fluidopt.policy.promises import Promise, makes_promises, promises
from fluidopt.policy.rules import Policy
from fluidopt.simulation.compare import PolicyComparison, compare_policies
from fluidopt.simulation.experiment import Cut, Replications, Serial, checked_seed, slowest, summary
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.result import SimulationResult
from fluidopt.simulation.statistics import Estimate
from fluidopt.views import bullets, card, cautions, figures, html, more, whisker

if TYPE_CHECKING:
    import pandas as pd

    from fluidopt.plan import Plan

REPLICATIONS, SEGMENTS = 4, 40
FIRST_EVENTS, GROWTH, KEPT = 1e5, 4, 4
LOCAL_EVENTS = 2e6
CHECK_EVENTS = 8e6


@dataclass(frozen=True)
class Trial:
    """One simulation of the search."""

    rule: Rule
    phase: str
    horizon: float
    mean: float
    half_width: float
    excess: float
    """By how much the worst promise of the plan may be broken, as a part of what is allowed; 0 where all are kept at
    95 % confidence, or there are none."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Refinement:
    """What the search found for one number of GPUs.

    Attributes:
        policy: the best threshold rule found if it is at least as good as gate-and-route at 95 % confidence on a fresh
            seed, else gate-and-route itself. Where the plan makes promises (service levels, rows of its own), the
            better is the one that keeps them, or breaks them less, and of two that do the one that earns more.
        rule: its parameters.
        comparison: the fresh test, ``"refined"`` against ``"gate-and-route"``.
        promises: what the policy returned makes of the plan's promises, on the fresh seed.
        trials: every simulation of the search.
        seed: of the search; the test used the next one.
    """

    policy: Policy
    rule: Rule
    comparison: PolicyComparison
    promises: tuple[Promise, ...]
    trials: tuple[Trial, ...]
    seed: int

    @property
    def improved(self) -> bool:
        """Whether the rule found beat gate-and-route."""
        return self.policy.kind == "refined"

    @property
    def revenue_rate(self) -> Estimate:
        """Revenue rate of the policy returned, money/s per GPU, on the fresh seed."""
        return self.comparison.results["refined" if self.improved else "gate-and-route"].revenue_rate

    @property
    def improvement(self) -> Estimate:
        """Of the best rule found over gate-and-route, money/s per GPU, paired, on the fresh seed."""
        return self.comparison.difference("refined", "gate-and-route")

    @property
    def gap_closed(self) -> float:
        """Part of gate-and-route's distance to the plan's revenue rate that the policy returned makes up."""
        base = self.comparison.results["gate-and-route"].revenue_rate.mean
        gap = self.policy.revenue_bound - base
        return (self.revenue_rate.mean - base) / gap if gap > 0 else 0.0

    def to_frame(self) -> pd.DataFrame:
        """The simulations of the search, a row each."""
        import pandas as pd

        names = [each.name for each in self.policy.scenario.classes]
        rows = [
            {
                "phase": trial.phase,
                "gate": "no partition" if trial.rule.stays else trial.rule.gate,
                "order": " > ".join(names[i] for i in trial.rule.order),
                "prefill_gpus": trial.rule.prefill_gpus,
                "placement": trial.rule.placement,
                "mixed_first": trial.rule.mixed_first,
                **{f"hold {name}": h for name, h in zip(names, trial.rule.hold, strict=True)},
                "revenue_rate": trial.mean,
                "half_width": trial.half_width,
                "excess": trial.excess,
                "horizon": trial.horizon,
            }
            for trial in self.trials
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        found = f"{self.improvement.mean:+.4g} ± {self.improvement.half_width:.2g} over gate-and-route"
        verdict = found if self.improved else f"no rule found is surely better than gate-and-route (best: {found})"
        return "\n".join(
            [
                f"Refined policy for {self.policy.gpus} GPUs after {len(self.trials)} simulations, seed {self.seed}",
                f"Revenue rate {self.revenue_rate} per GPU: {verdict}, {self.gap_closed:.0%} of its distance to the "
                f"plan's {self.policy.revenue_bound:.6g}",
                *(_promise_sentence(promise) for promise in self.promises),
                str(self.policy),
            ]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        no_better = "No rule found is surely better than gate-and-route, which is returned."
        units = {"revenue_rate": "money/s per GPU", "half_width": "95 %", "horizon": "s"}
        return card(
            f"Refined policy for {self.policy.gpus} GPUs",
            figures(
                ("Revenue", self.revenue_rate, "money/s per GPU"),
                ("Over gate-and-route", self.improvement, "money/s per GPU"),
                ("Distance to the plan closed", 100.0 * self.gap_closed, "%"),
            ),
            cautions([] if self.improved else [no_better]),
            bullets("Promises, of what is allowed", [_promise_sentence(promise).strip() for promise in self.promises]),
            bullets("Rules", self.policy.rules(), numbered=True),
            more(
                f"{len(self.trials)} simulations of the search, seed {self.seed}",
                html(self.to_frame(), title="", units=units, bars={"revenue_rate": whisker()}),
            ),
        )


def _promise_sentence(promise: Promise) -> str:
    verdict = {True: "kept", False: "NOT KEPT", None: "undecided at this precision"}[promise.kept]
    return f"  {promise.name}: {promise.measured:.3g} ± {promise.half_width:.2g} of what is allowed, {verdict}"


def evaluate(policy: Policy, horizon: float, seed: int, plan: Plan | None = None) -> tuple[float, float, float]:
    """Mean and half-width of the revenue rate, and by how much the worst promise of the plan, if one is given, may be
    broken; depends on its arguments alone, so it may run anywhere."""
    going = Replications(policy, replications=REPLICATIONS, seed=seed, start="fluid", percentiles=False)
    going.extend(np.linspace(0.0, horizon, min(going.most_segments, SEGMENTS) + 1)[1:], executor=Serial())
    cut = Cut.choose([going], warmup=True)
    revenue = summary(going, cut, seed=seed, start="fluid").revenue_rate
    made = promises(plan, policy, *going.kept(cut)) if plan is not None else ()
    return revenue.mean, revenue.half_width, _excess(made)


def _excess(made: Sequence[Promise]) -> float:
    return max((max(0.0, promise.measured + promise.half_width - 1) for promise in made), default=0.0)


class _Search:
    """Simulations made so far, remembered by what they depend on, here and in the checkpoint."""

    def __init__(self, family: Family, seed: int, executor: Executor, checkpoint: Path | None) -> None:
        self.family, self.seed, self.executor, self.checkpoint = family, seed, executor, checkpoint
        self.trials: list[Trial] = []
        self.known: dict[str, tuple[float, float, float]] = {}
        self.promising = family.plan if makes_promises(family.plan) else None
        system = fleet_system(family.baseline.policy(family.plan, family.gpus))
        self.events_rate = 3.5 * float(system.arrival_rate.sum())
        self.shortest = 16 * slowest(system)
        if checkpoint is not None and checkpoint.exists():
            self.known = _read(checkpoint)

    def run(self, rules: Sequence[Rule], events: float, phase: str) -> list[Trial]:
        """Simulate each rule for about so many events; those that the fleet can follow, best first."""
        horizon = max(events / REPLICATIONS / self.events_rate, self.shortest)
        made = self.family.possible(list(rules))
        keys = [self._key(policy, horizon) for _, policy in made]
        jobs = {
            key: self.executor.submit(evaluate, policy, horizon, self.seed, self.promising)
            for key, (_, policy) in zip(keys, made, strict=True)
            if key not in self.known
        }
        try:
            for key in _progress(list(jobs), phase):
                self._remember(key, *jobs[key].result())
        finally:
            for job in jobs.values():
                job.cancel()
        trials = [Trial(rule, phase, horizon, *self.known[key]) for (rule, _), key in zip(made, keys, strict=True)]
        self.trials += trials
        return sorted(trials, key=lambda trial: (trial.excess, -trial.mean))

    def _key(self, policy: Policy, horizon: float) -> str:
        promised = self.promising and self.promising.to_dict()
        what = json.dumps([policy.to_dict(), horizon, self.seed, REPLICATIONS, SEGMENTS, promised], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()

    def _remember(self, key: str, mean: float, half_width: float, excess: float) -> None:
        self.known[key] = (mean, half_width, excess)
        if self.checkpoint is not None:
            with self.checkpoint.open("a") as file:
                file.write(json.dumps({"key": key, "found": self.known[key]}) + "\n")

    def halve(self, rules: list[Rule]) -> Trial:
        """Successive halving: each round keeps the best quarter and simulates it four times as long."""
        events = FIRST_EVENTS
        while True:
            trials = self.run(rules, events, "halving")
            if len(trials) <= KEPT:
                return trials[0]
            rules = [trial.rule for trial in trials[: max(KEPT, len(trials) // KEPT)]]
            if len(rules) == len(trials):
                return trials[0]
            events *= GROWTH

    def descend(self, rule: Rule) -> Trial:
        """From neighbour to better neighbour, by smaller and smaller steps."""
        (best,) = self.run([rule], LOCAL_EVENTS, "descent")
        for step in (4, 2, 1):
            for _ in range(12):
                trials = self.run(self.family.neighbours(best.rule, step), LOCAL_EVENTS, "descent")
                if not trials or not _surely_better(trials[0], best):
                    break
                best = trials[0]
        return best


def _surely_better(new: Trial, old: Trial) -> bool:
    if new.excess != old.excess:
        return new.excess < old.excess
    return new.mean - old.mean > (new.half_width + old.half_width) / 4


def refine_policy(
    plan: Plan,
    *,
    gpus: int,
    seed: int = 0,
    start: Refinement | None = None,
    checkpoint: str | Path | None = None,
    executor: Executor | None = None,
) -> Refinement:
    """Search the threshold rules for the one that earns most on ``gpus`` GPUs.

    Args:
        plan: whose prices order the classes.
        gpus: n.
        seed: of the search; the same seed finds the same rule, wherever it runs.
        start: what was found for another number of GPUs; its rule, scaled, takes the place of most of the grid.
        checkpoint: a file to which every simulation is written and from which none is repeated.
        executor: where the simulations run; default threads of this process.

    Raises:
        InvalidInput: an argument is out of range, or the fleet is too small for the plan.
    """
    if not is_whole(gpus, least=1):
        raise InvalidInput(f"refine_policy: gpus must be a whole number of at least 1; got {gpus!r}")
    seed = checked_seed(seed)
    family = Family(plan, int(gpus))
    baseline = extract(plan, gpus=int(gpus), kind="gate-and-route")
    pool = ThreadPoolExecutor(os.cpu_count() or 1) if executor is None else None
    with pool or nullcontext():
        search = _Search(family, seed, executor or pool, None if checkpoint is None else Path(checkpoint))  # type: ignore[arg-type]
        rules = family.start() if start is None else family.around(start.rule.scaled(gpus / start.policy.gpus))
        found = search.descend(search.halve(rules).rule)
        comparison = _test(found.rule.policy(plan, int(gpus)), baseline, search, seed + 1)
    made = {name: measured_promises(plan, result, seed + 1) for name, result in comparison.results.items()}
    excess = {name: _excess(each) for name, each in made.items()}
    improvement = comparison.difference("refined", "gate-and-route")
    better = improvement.mean - improvement.half_width >= 0
    if excess["refined"] != excess["gate-and-route"]:
        better = excess["refined"] < excess["gate-and-route"]
    return Refinement(
        policy=comparison.results["refined"].policy if better else baseline,
        rule=found.rule if better else family.baseline,
        comparison=comparison,
        promises=made["refined" if better else "gate-and-route"],
        trials=tuple(search.trials),
        seed=seed,
    )


def _test(refined: Policy, baseline: Policy, search: _Search, seed: int) -> PolicyComparison:
    """Both on a fresh seed, longer until one is surely better or the difference is below a ten-thousandth."""
    horizon = max(CHECK_EVENTS / 8 / search.events_rate, search.shortest)
    for _ in range(4):
        comparison = compare_policies(
            {"refined": refined, "gate-and-route": baseline}, horizon=horizon, seed=seed, start="fluid"
        )
        gap = comparison.difference("refined", "gate-and-route")
        if gap.half_width < max(abs(gap.mean), 1e-4 * abs(comparison.results["refined"].revenue_rate.mean)):
            break
        horizon *= 2
    return comparison


def measured_promises(plan: Plan, result: SimulationResult, seed: int) -> tuple[Promise, ...]:
    """The plan's promises in the simulation that ``result`` is of, run again as far as it is needed for them."""
    if not makes_promises(plan):
        return ()
    going = Replications(result.policy, replications=result.replications, seed=seed, start="fluid", percentiles=False)
    going.extend(np.linspace(0.0, result.horizon, going.most_segments + 1)[1:])
    return promises(plan, result.policy, *going.kept(Cut.choose([going], warmup=True)))


def _read(checkpoint: Path) -> dict[str, tuple[float, float, float]]:
    """Simulations of an earlier search; a last line that was cut off while it was written is left out."""
    known = {}
    lines = checkpoint.read_text().split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            mean, half_width, excess = (float(each) for each in entry["found"])
            known[str(entry["key"])] = (mean, half_width, excess)
        except (ValueError, KeyError, TypeError):
            raise InvalidInput(
                f"refine_policy: {checkpoint}, line {number}: {line[:60]!r} is not a line of a search; remove the line "
                "or the file"
            ) from None
    if lines[-1]:
        checkpoint.write_text("".join(f"{line}\n" for line in lines[:-1]))
    return known


def _progress(keys: list[str], phase: str) -> Any:
    from tqdm import tqdm

    return tqdm(keys, desc=phase, file=sys.stderr, disable=None, leave=False, delay=1.0)
