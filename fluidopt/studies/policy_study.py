"""How good the policies are on random fleets: [L26] section 6.3, figure 7, with an interval for every difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import KW_ONLY, asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import stats

from fluidopt.contention import GPU, IterationTime
from fluidopt.errors import InvalidInput
from fluidopt.inputs import MOST, Positive, PositiveInt, dump, input_type, is_whole, parse
from fluidopt.policy.rules import Policy
from fluidopt.program import Array
from fluidopt.scenario import Scenario
from fluidopt.simulation.compare import compare_policies
from fluidopt.simulation.experiment import checked_seed, checked_window
from fluidopt.simulation.statistics import LEVEL, Estimate
from fluidopt.studies.quiet import built_quietly
from fluidopt.studies.work import Checkpoint, progress, run_jobs
from fluidopt.tables import shorten, text
from fluidopt.views import amount_bar, card, cautions, figures, html, paragraph, whisker
from fluidopt.workload import TokenPrices, WorkloadClass

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

KINDS = ("FI-WSP", "GI-WSP", "GF-WSP", "FG-SP", "GG-SP")
Range = tuple[Positive, Positive]
GateRule = Literal["occupancy", "queue-deviation"]


@input_type
class InstanceRanges:
    """Where random instances come from: each number uniform between two ends, ``beta`` in its logarithm.

    The ranges are those of [L26] section 6.3 (with 0.015 for the printed 0.15 of ``alpha``). The paper prints neither
    batch and chunk size nor patience and prices for its figure 7; they are those of its reference instance (6.2).
    """

    _: KW_ONLY
    alpha: Range = (0.015, 0.02)
    """Intercept of the mixed iteration time, s."""
    beta: Range = (1e-5, 1e-3)
    """Slope of the mixed iteration time, s/token."""
    gamma: Range = (10.0, 50.0)
    """Decode-only iterations, 1/s."""
    prompt_tokens: Range = (200.0, 3000.0)
    """P_i, tokens."""
    output_tokens: Range = (200.0, 3000.0)
    """D_i, tokens."""
    arrival_rate: Range = (0.25, 0.5)
    """lambda_i, requests/s per GPU."""
    classes: PositiveInt = 2
    """I, number of classes."""
    batch_size: PositiveInt = 16
    """B."""
    chunk_size: PositiveInt = 256
    """C, tokens."""
    abandonment_rate: Positive = 0.1
    """theta_i, 1/s, of all classes."""
    prices: TokenPrices = TokenPrices(prompt=0.1, output=0.2)
    """Money/token."""
    physical: bool = False
    """Whether a prefill never speeds decodes up (kappa at least 1); the paper's ranges know no such limit."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "prompt_tokens", "output_tokens", "arrival_rate"):
            low, high = getattr(self, name)
            if low > high:
                raise InvalidInput(f"{name} must be a range (low, high) with low at most high; got {(low, high)}")

    def draw(self, stream: np.random.SeedSequence) -> Scenario:
        """An instance, bundled charging, from a random stream of its own."""
        rng = np.random.default_rng(stream)
        alpha, gamma = (float(rng.uniform(*ends)) for ends in (self.alpha, self.gamma))
        beta = float(np.exp(rng.uniform(*np.log(self.beta))))
        classes = tuple(
            WorkloadClass(
                f"class {at}",
                arrival_rate=float(rng.uniform(*self.arrival_rate)),
                prompt_tokens=float(rng.uniform(*self.prompt_tokens)),
                output_tokens=float(rng.uniform(*self.output_tokens)),
                abandonment_rate=self.abandonment_rate,
            )
            for at in range(self.classes)
        )
        curve = IterationTime(alpha=alpha, beta=beta, solo=1 / gamma, physical=self.physical)
        gpu = GPU(curve, batch_size=self.batch_size, chunk_size=self.chunk_size)
        return Scenario(classes=classes, gpu=gpu, prices=self.prices)


@dataclass(frozen=True, kw_only=True)
class InstanceOutcome:
    """What the policies earned on one instance, all on the same arrivals."""

    number: int
    """Of the instance in its study, from 0."""
    scenario: Scenario
    revenue_bound: float
    """Fluid optimum R*, money/s per GPU."""
    revenue: dict[str, Estimate]
    """Revenue rate of each policy, money/s per GPU."""
    lead: dict[str, Estimate]
    """Revenue rate of each other policy less that of the proposed one, from paired batches, money/s per GPU."""
    stationary: bool
    """Whether every policy's fleet looked settled after the warm-up."""

    @property
    def best(self) -> str:
        """The policy with the largest mean revenue rate."""
        return max(self.revenue, key=lambda kind: self.revenue[kind].mean)

    @property
    def ahead(self) -> dict[str, float]:
        """By how much of R* others earn more than the proposed policy, where the paired 95 % interval is above 0."""
        return {
            kind: lead.mean / self.revenue_bound
            for kind, lead in self.lead.items()
            if lead.interval[0] > 0 and self.revenue_bound > 0
        }

    @property
    def decode_bound_holds(self) -> bool:
        """Whether kappa >= (B-1)/B, which the guarantees of [L26] need (Proposition 3.2)."""
        (gpu,) = self.scenario.gpu_types
        return gpu.kappa >= (gpu.batch_size - 1) / gpu.batch_size

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON-able data; `from_dict` reads it back."""
        estimates = {
            name: {kind: asdict(each) for kind, each in getattr(self, name).items()} for name in ("revenue", "lead")
        }
        return {
            "number": self.number,
            "scenario": self.scenario.to_dict(),
            "revenue_bound": self.revenue_bound,
            "stationary": self.stationary,
            **estimates,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InstanceOutcome:
        """Read an outcome back."""
        try:
            estimates = {
                name: {str(kind): Estimate(**each) for kind, each in data[name].items()} for name in ("revenue", "lead")
            }
            return cls(
                number=int(data["number"]),
                scenario=Scenario.from_dict(data["scenario"]),
                revenue_bound=float(data["revenue_bound"]),
                stationary=bool(data["stationary"]),
                **estimates,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InvalidInput(f"not a saved outcome of a policy study: {error!r}") from None

    def _repr_html_(self) -> str:
        bound = ("Fluid bound", self.revenue_bound, "money/s per GPU")
        earned = ((kind, each, "money/s per GPU") for kind, each in self.revenue.items())
        unsettled = ["Not stationary: the fleet still changes after the warm-up."]
        return card(f"Instance {self.number}", figures(bound, *earned), cautions([] if self.stationary else unsettled))


@dataclass(frozen=True, kw_only=True)
class PolicyStudy:
    """Policies compared on random instances; rates in money/s per GPU, losses as shares of what could be earned."""

    gpus: int
    kinds: tuple[str, ...]
    proposed: str
    """The policy that the others are measured against."""
    gate: GateRule
    """How the gates that tell classes apart do so."""
    horizon: float
    replications: int
    seed: int
    ranges: InstanceRanges
    instances: tuple[InstanceOutcome, ...]

    def losses(self, to: str = "bound") -> pd.DataFrame:
        """1 - revenue/reference, a row per instance and a column per policy.

        Args:
            to: the reference: ``"bound"``, R* of the instance, which no policy reaches; or ``"best"``, the best of the
                policies compared (in which the luckiest of equals has 0).

        Raises:
            InvalidInput: another reference.
        """
        if to not in ("bound", "best"):
            raise InvalidInput(f"losses: to must be 'bound' or 'best'; got {to!r}")
        earned = self._earned
        reference = self._bound[:, None] if to == "bound" else earned.max(axis=1, keepdims=True)
        return self._by_instance(1 - earned / reference)

    @property
    def leads(self) -> pd.DataFrame:
        """Revenue less that of the proposed policy, as a share of R*: a row per instance and a column per policy."""
        earned = self._earned
        own = earned[:, [self.kinds.index(self.proposed)]]
        return self._by_instance((earned - own) / self._bound[:, None])

    @property
    def _earned(self) -> Array:
        return np.array([[each.revenue[kind].mean for kind in self.kinds] for each in self.instances])

    @property
    def _bound(self) -> Array:
        return np.array([each.revenue_bound for each in self.instances])

    def _by_instance(self, values: Array) -> pd.DataFrame:
        import pandas as pd

        rows = pd.Index([each.number for each in self.instances], name="instance")
        return pd.DataFrame(values, index=rows, columns=pd.Index(self.kinds, name="policy"))

    def to_frame(self) -> pd.DataFrame:
        """A row per instance and policy.

        Columns: ``revenue_rate`` and ``half_width`` (95 %), ``loss_to_bound``, ``loss_to_best``; ``lead`` over the
        proposed policy and ``lead_half_width`` (paired; 0 for itself); ``best``, whether it is; and ``kappa``.
        """
        import pandas as pd

        bound, best = self.losses("bound"), self.losses("best")
        rows = {
            (each.number, kind): {
                "revenue_rate": each.revenue[kind].mean,
                "half_width": each.revenue[kind].half_width,
                "loss_to_bound": bound.loc[each.number, kind],
                "loss_to_best": best.loc[each.number, kind],
                "lead": each.lead[kind].mean if kind in each.lead else 0.0,
                "lead_half_width": each.lead[kind].half_width if kind in each.lead else 0.0,
                "best": kind == each.best,
                "kappa": each.scenario.gpu_types[0].kappa,
            }
            for each in self.instances
            for kind in self.kinds
        }
        index = pd.MultiIndex.from_tuples(list(rows), names=["instance", "policy"])
        return pd.DataFrame(list(rows.values()), index=index)

    @cached_property
    def policies(self) -> pd.DataFrame:
        """A row per policy, by increasing loss.

        Columns: ``loss_to_bound`` and ``loss_to_best``, averages over the instances, each with the half-width of its
        95 % interval over instances (Student t); ``lead``, likewise, over the proposed policy as a share of R*;
        ``best_in``, instances in which it is best; ``ahead_in`` and ``behind_in``, instances in which it earns more, or
        less, than the proposed policy with 95 % confidence.
        """
        import pandas as pd

        columns: dict[str, Any] = {}
        tables = {"loss_to_bound": self.losses("bound"), "loss_to_best": self.losses("best"), "lead": self.leads}
        for name, table in tables.items():
            columns[name] = table.mean()
            columns[f"{name}_half_width"] = table.apply(_half_width)
        columns["best_in"] = [sum(each.best == kind for each in self.instances) for kind in self.kinds]
        columns["ahead_in"] = [sum(kind in each.ahead for each in self.instances) for kind in self.kinds]
        columns["behind_in"] = [
            sum(kind in each.lead and each.lead[kind].interval[1] < 0 for each in self.instances) for kind in self.kinds
        ]
        frame = pd.DataFrame(columns, index=pd.Index(self.kinds, name="policy"))
        return frame.sort_values("loss_to_bound", kind="stable")

    @property
    def beaten(self) -> tuple[InstanceOutcome, ...]:
        """The instances in which some policy earns more than the proposed one with 95 % confidence."""
        return tuple(each for each in self.instances if each.ahead)

    @property
    def statement(self) -> str:
        """Whether the proposed policy is best on average, and where it is not, in words."""
        table, mine, count = self.policies, self.proposed, len(self.instances)
        own, leader = table.loc[mine], table.index[0]
        others = table.drop(index=mine)
        rival = others.index[0]
        gap, error = -float(others.loc[rival, "lead"]), float(others.loc[rival, "lead_half_width"])
        verdict = "best on average" if leader == mine else f"not best on average, {leader} is"
        sure = "" if abs(gap) > error else ", which the number of instances does not separate from 0"
        sentences = [
            f"Over {count} random instances of {self.gpus} GPUs {mine} is {verdict}: it falls "
            f"{own['loss_to_bound']:.2%} ± {own['loss_to_bound_half_width']:.2%} short of the fluid bound, and earns "
            f"{abs(gap):.2%} ± {error:.2%} of the bound {'more' if gap >= 0 else 'less'} than {rival}, the "
            f"{'next' if leader == mine else 'best'}{sure}.",
            f"It is best in {own['best_in']:.0f} of {count}.",
        ]
        if not self.beaten:
            return " ".join([*sentences, "In none does another policy earn more with 95 % confidence."])
        worst = max(self.beaten, key=lambda each: max(each.ahead.values()))
        kind = max(worst.ahead, key=lambda name: worst.ahead[name])
        by_kind = [f"{name} in {n}" for name, n in table["ahead_in"].to_dict().items() if n]
        sentences.append(
            f"In {len(self.beaten)} another policy earns more with 95 % confidence ({shorten(by_kind)}), by at most "
            f"{worst.ahead[kind]:.2%} of the bound (instance {worst.number}, {kind})."
        )
        sentences += [self._split(rival, holds) for holds in (True, False)]
        return " ".join(filter(None, sentences))

    def _split(self, rival: str, holds: bool) -> str:
        """The proposed policy against its rival where kappa is at least (B-1)/B, or where it is not."""
        chosen = [at for at, each in enumerate(self.instances) if each.decode_bound_holds == holds]
        if len(chosen) < 2:
            return ""
        gap = -self.leads[rival].iloc[chosen]
        return (
            f"Where kappa is {'at least' if holds else 'below'} (B-1)/B ({len(chosen)} instances), it earns "
            f"{abs(gap.mean()):.2%} ± {_half_width(gap):.2%} of the bound {'more' if gap.mean() >= 0 else 'less'} than "
            f"{rival}."
        )

    @property
    def caption(self) -> str:
        """How the numbers were made, in words."""
        unsettled = sum(not each.stationary for each in self.instances)
        return (
            f"{len(self.instances)} instances, {self.gpus} GPUs, {self.replications} replications of {self.horizon:g} "
            f"s on common arrivals, {self.gate} gate, seed {self.seed}"
            + (f"; NOT STATIONARY in {unsettled} instances: use a longer horizon" if unsettled else "")
            + ". Intervals are 95 %, over instances."
        )

    def plot(self) -> Figure:
        """Distribution over the instances of each policy's loss, and of its lead ([L26] figure 7)."""
        from fluidopt.plots import plot_policy_study

        return plot_policy_study(self)

    def to_dict(self) -> dict[str, Any]:
        """The study as JSON-able data; `from_dict` reads it back."""
        settings = {name: getattr(self, name) for name in _PLAIN}
        return {
            **settings,
            "kinds": list(self.kinds),
            "ranges": dump(self.ranges),
            "instances": [each.to_dict() for each in self.instances],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PolicyStudy:
        """Read a study back."""
        try:
            settings = {name: data[name] for name in _PLAIN}
            return cls(
                **settings,
                kinds=tuple(data["kinds"]),
                ranges=parse(InstanceRanges, data["ranges"]),
                instances=tuple(map(InstanceOutcome.from_dict, data["instances"])),
            )
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"not a saved policy study: {error!r}") from None

    def __str__(self) -> str:
        return "\n".join([self.statement, "", text(self.policies), "", self.caption])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        of = {
            name: "of the best" if name.startswith("loss_to_best") else "of the bound"
            for name in self.policies.columns
            if name.startswith(("loss", "lead"))
        }
        counts = {"best_in": "instances", "ahead_in": "instances", "behind_in": "instances"}
        bars = {
            "loss_to_bound": whisker("loss_to_bound_half_width"),
            "lead": whisker("lead_half_width"),
            "best_in": amount_bar,
        }
        steady = all(each.stationary for each in self.instances)
        return card(
            "Policies on random instances",
            figures(("Instances", len(self.instances), ""), ("GPUs", self.gpus, "each")),
            paragraph(self.statement),
            html(self.policies, title="Policies", units=of | counts, bars=bars),
            paragraph(self.caption, muted=True) if steady else cautions([self.caption]),
        )


_PLAIN = ("gpus", "proposed", "gate", "horizon", "replications", "seed")


def _half_width(values: pd.Series[float]) -> float:
    """Of the 95 % interval of the mean (Student t)."""
    count = len(values)
    return float(stats.t.ppf(0.5 + LEVEL / 2, count - 1) * values.std(ddof=1) / np.sqrt(count))


def policy_study(
    *,
    instances: int = 30,
    gpus: int = 500,
    kinds: Sequence[str] = KINDS,
    proposed: str = "GG-SP",
    gate: GateRule = "occupancy",
    horizon: float = 2000.0,
    replications: int = 4,
    seed: int = 0,
    ranges: InstanceRanges | None = None,
    checkpoint: str | Path | None = None,
    executor: Executor | None = None,
) -> PolicyStudy:
    """Compare policies on random instances, each on common arrivals ([L26] section 6.3, figure 7).

    The paper ran 10,000 s. Paired batches with control variates need less: with the defaults the half-width of a
    difference is about a thousandth of the revenue (median). An instance of 500 GPUs takes about 5 s on two cores.

    Args:
        instances: how many, at least 2; the first ones do not depend on how many follow.
        gpus: n.
        kinds: names of policies, as in `Plan.policy`.
        proposed: which of them the others are measured against.
        gate: how the gates that are not first-come compare classes: by ``"occupancy"``, as [L26] defines its gate in
            section 4.1, or by ``"queue-deviation"``, as section 6.3 describes it (see `Gate`).
        horizon, replications: as in `compare_policies`; fleets start from the plan's equilibrium.
        seed: of the instances and of their simulation; the same seed gives the same numbers in any executor.
        ranges: where instances come from; by default those of the paper.
        checkpoint: a file to which each finished instance is added as a line of JSON, and from which a study that was
            interrupted, or is wanted for more instances, goes on.
        executor: where instances run, one job each; default here, one after the other, replications in threads.

    Raises:
        InvalidInput: an argument is out of range, or the checkpoint is of another study.
    """
    if not is_whole(instances, least=2):
        raise InvalidInput(f"policy_study: instances must be a whole number of at least 2; got {instances!r}")
    kinds = tuple(kinds)
    if len(kinds) < 2 or len(set(kinds)) < len(kinds) or proposed not in kinds:
        raise InvalidInput(
            f"policy_study: kinds must be at least two different policies, the proposed one ({proposed!r}) among them; "
            f"got {list(kinds)}"
        )
    if gate not in ("occupancy", "queue-deviation"):
        raise InvalidInput(f"policy_study: gate must be 'occupancy' or 'queue-deviation'; got {gate!r}")
    checked_window(horizon, None, replications, "fluid")
    study = PolicyStudy(
        gpus=gpus,
        kinds=kinds,
        proposed=proposed,
        gate=gate,
        horizon=float(horizon),
        replications=int(replications),
        seed=checked_seed(seed),
        ranges=ranges if ranges is not None else InstanceRanges(),
        instances=(),
    )
    settings = {name: value for name, value in study.to_dict().items() if name != "instances"}
    kept = Checkpoint(None if checkpoint is None else Path(checkpoint), settings)
    done = {each.number: each for each in map(InstanceOutcome.from_dict, kept.read())}
    streams = np.random.SeedSequence(study.seed).spawn(int(instances))
    missing = [(number, streams[number]) for number in range(int(instances)) if number not in done]
    # every policy is made before the first simulation, so that what cannot be is refused at once
    jobs = [_job(study, number, *stream.spawn(2)) for number, stream in missing]
    for outcome in progress(run_jobs(compare_instance, jobs, executor), total=len(jobs), what="instances"):
        found = InstanceOutcome.from_dict(outcome)
        kept.add(found.to_dict())
        done[found.number] = found
    return replace(study, instances=tuple(done[number] for number in range(int(instances))))


def _job(
    study: PolicyStudy, number: int, instance: np.random.SeedSequence, simulation: np.random.SeedSequence
) -> dict[str, Any]:
    """The arguments of `compare_instance`, JSON-able."""
    scenario = study.ranges.draw(instance)
    # The paper's ranges are what they are; `InstanceOutcome.decode_bound_holds` says what lapses.
    plan = built_quietly(scenario).solve()
    policies = {kind: plan.policy(gpus=study.gpus, kind=kind) for kind in study.kinds}
    return {
        "number": number,
        "policies": {kind: _gated(policy, study.gate).to_dict() for kind, policy in policies.items()},
        "proposed": study.proposed,
        "horizon": study.horizon,
        "replications": study.replications,
        "seed": int(simulation.generate_state(1)[0] % MOST),
    }


def _gated(policy: Policy, rule: GateRule) -> Policy:
    """The policy with its occupancy gate, if it has one, replaced."""
    return replace(policy, gate=replace(policy.gate, rule=rule)) if policy.gate.rule == "occupancy" else policy


def compare_instance(
    *,
    number: int,
    policies: Mapping[str, Mapping[str, Any]],
    proposed: str,
    horizon: float,
    replications: int,
    seed: int,
) -> dict[str, Any]:
    """Simulate the policies of one instance; a pure function of JSON-able arguments, for any executor.

    Args:
        number: of the instance.
        policies: `Policy.to_dict` by name.
        proposed: name of the policy to pair the others with.
        horizon, replications, seed: as in `compare_policies`.

    Returns:
        `InstanceOutcome.to_dict`.
    """
    read = {name: Policy.from_dict(each) for name, each in policies.items()}
    compared = compare_policies(read, horizon=horizon, replications=replications, seed=seed, start="fluid")
    return InstanceOutcome(
        number=number,
        scenario=read[proposed].scenario,
        revenue_bound=read[proposed].revenue_bound,
        revenue={name: result.revenue_rate for name, result in compared.results.items()},
        lead={name: compared.difference(name, proposed) for name in read if name != proposed},
        stationary=all(result.stationary for result in compared.results.values()),
    ).to_dict()
