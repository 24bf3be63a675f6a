"""Policies side by side on common random numbers, with paired confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.errors import InvalidInput
from fluidopt.policy.rules import Policy
from fluidopt.simulation.experiment import Cut, Replications, StartName, checked_seed, checked_window, summary
from fluidopt.simulation.result import SimulationResult
from fluidopt.simulation.statistics import Estimate, difference
from fluidopt.tables import shorten, text
from fluidopt.views import card, figures, html, paragraph, share_bar, whisker

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PolicyComparison:
    """Results of several policies that met the same arrivals, in the same batches of time."""

    results: dict[str, SimulationResult]
    """By the policy's name, in the order given."""

    def difference(self, of: str, to: str, quantity: str = "revenue_rate", label: str | None = None) -> Estimate:
        """Mean of one quantity under policy ``of`` less that under policy ``to``, from the paired batches.

        Args:
            of, to: names of policies.
            quantity, label: as in `SimulationResult.estimate`.

        Raises:
            InvalidInput: there is no such policy or quantity.
        """
        for argument, name in (("of", of), ("to", to)):
            if name not in self.results:
                known = shorten([repr(each) for each in self.results])
                raise InvalidInput(f"difference: {argument} must be one of {known}; got {name!r}")
        one, other = self.results[of], self.results[to]
        values, others = (result.segment_values(quantity, label) for result in (one, other))
        return difference(one.batches, values, other.batches, others)

    @property
    def best(self) -> str:
        """Name of the policy with the largest mean revenue rate."""
        return max(self.results, key=lambda name: self.results[name].revenue_rate.mean)

    def to_frame(self, baseline: str | None = None) -> pd.DataFrame:
        """A row per policy, by decreasing revenue rate.

        Columns: ``revenue_rate`` and ``half_width`` (money/s per GPU, 95 %), ``of_bound`` (share of what no policy
        beats, missing where a condition of the bound fails), ``difference`` to the baseline (default: the best) with
        its paired ``difference_half_width``, and ``unpaired_half_width``, what that would be had the two been
        simulated independently.
        """
        import pandas as pd

        baseline = self.best if baseline is None else baseline
        rows = {}
        for name, result in self.results.items():
            revenue = result.revenue_rate
            apart = (
                np.hypot(revenue.half_width, self.results[baseline].revenue_rate.half_width)
                if baseline in self.results
                else np.nan
            )
            gap = self.difference(name, baseline) if name != baseline else Estimate(0.0, 0.0, 0.0, np.inf)
            bound = result.bound.rate if result.bound.holds else np.nan
            rows[name] = {
                "revenue_rate": revenue.mean,
                "half_width": revenue.half_width,
                "of_bound": revenue.mean / bound if bound > 0 else np.nan,
                "difference": gap.mean,
                "difference_half_width": gap.half_width,
                "unpaired_half_width": apart if name != baseline else 0.0,
            }
        frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis(index="policy")
        return frame.sort_values("revenue_rate", ascending=False, kind="stable")

    @property
    def caption(self) -> str:
        """How the numbers were made, in words."""
        return f"Common arrivals; differences to {self.best} from paired batches. {self.results[self.best].caption}"

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-able data; `from_dict` reads it back."""
        return {"results": {name: result.to_dict() for name, result in self.results.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PolicyComparison:
        """Read a comparison back."""
        if not isinstance(data, Mapping) or not isinstance(data.get("results"), Mapping):
            raise InvalidInput("not a saved comparison of policies: it has no 'results'")
        return cls({str(name): SimulationResult.from_dict(each) for name, each in data["results"].items()})

    def __str__(self) -> str:
        return "\n".join([self.caption, "", text(self.to_frame(), max_rows=80)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        best = self.results[self.best]
        money = ("revenue_rate", "half_width", "difference", "difference_half_width", "unpaired_half_width")
        return card(
            "Comparison of policies",
            figures((f"Best: {self.best}", best.revenue_rate, "money/s per GPU")),
            html(
                self.to_frame(),
                title="By revenue",
                units=dict.fromkeys(money, "money/s per GPU") | {"of_bound": "of what no policy beats"},
                bars={"revenue_rate": whisker(), "of_bound": share_bar, "difference": whisker("difference_half_width")},
                max_rows=80,
            ),
            paragraph(self.caption, muted=True),
        )


def compare_policies(
    policies: Mapping[str, Policy] | Sequence[Policy],
    *,
    horizon: float,
    warmup: float | None = None,
    replications: int = 8,
    seed: int | None = None,
    start: StartName = "empty",
    executor: Executor | None = None,
) -> PolicyComparison:
    """Simulate several policies of one fleet on common random numbers.

    Replication k of every policy meets the same requests at the same times, warm-up and batches are common, and what is
    left of the noise is taken out by control variates, so a difference has a much smaller half-width than the two
    numbers it is of.

    Args:
        policies: by name, or a sequence named by their kinds. All for one workload and number of GPUs.
        horizon, warmup, replications, seed, start, executor: as in `Policy.simulate`.

    Raises:
        InvalidInput: fewer than two policies, two of one name, policies of different fleets or workloads, or an
            argument out of range.
    """
    named = dict(policies) if isinstance(policies, Mapping) else _named(policies)
    if len(named) < 2:
        raise InvalidInput(f"compare_policies: takes at least two policies; got {len(named)}")
    for name, policy in named.items():
        if not isinstance(policy, Policy):
            raise InvalidInput(f"compare_policies: {name!r} must be a Policy; got {type(policy).__name__}")
    first = next(iter(named.values()))
    for name, policy in named.items():
        if policy.gpus != first.gpus or policy.scenario.classes != first.scenario.classes:
            raise InvalidInput(
                f"compare_policies: all policies must be for the same GPUs and classes, to meet the same arrivals; "
                f"{name!r} is for {policy.gpus} GPUs, {next(iter(named))!r} for {first.gpus}"
                + (", and their classes differ" if policy.scenario.classes != first.scenario.classes else "")
            )
    checked_window(horizon, warmup, replications, start)
    seed = checked_seed(seed)
    going = []
    for policy in named.values():
        one = Replications(policy, replications=replications, seed=seed, start=start)
        one.skip(warmup or 0.0, executor)
        one.extend(np.linspace(one.now, horizon, one.most_segments + 1)[1:], executor=executor)
        going.append(one)
    cut = Cut.choose(going, warmup=warmup is None)
    return PolicyComparison(
        {name: summary(one, cut, seed=seed, start=start) for name, one in zip(named, going, strict=True)}
    )


def _named(policies: Sequence[Policy]) -> dict[str, Policy]:
    kinds = Counter(policy.kind for policy in policies)
    twice = [kind for kind, count in kinds.items() if count > 1]
    if twice:
        raise InvalidInput(
            f"compare_policies: there are {kinds[twice[0]]} policies of the kind {twice[0]!r}; name them: "
            "compare_policies({'name': policy, ...})"
        )
    return {policy.kind: policy for policy in policies}
