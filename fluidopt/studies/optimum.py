"""How near threshold rules come to the best that any policy can do, in fleets small enough for dynamic programming.

Rules and optimum are those of one exact chain with the same caps on its queues. The optimum is that of the fleet
without a partition, in which any GPU may prefill: it can do whatever a rule can, with or without a partition.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from fluidopt.chain.control import DECODE, PREFILL, ControlledChain
from fluidopt.chain.decisions import coordinates, decision_map, steps
from fluidopt.chain.dynamic import Solution
from fluidopt.chain.exact import exact_chain
from fluidopt.chain.means import class_names, role_names
from fluidopt.chain.optimal import OptimalPolicy, optimal_policy
from fluidopt.contention import GPU, IterationTime
from fluidopt.errors import InvalidInput
from fluidopt.inputs import Positive, PositiveInt, input_type, is_whole
from fluidopt.model import FluidModel
from fluidopt.policy.extract import extract
from fluidopt.policy.family import Family, Rule
from fluidopt.policy.rules import Policy
from fluidopt.program import Array
from fluidopt.scenario import Scenario
from fluidopt.simulation.experiment import checked_seed
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.system import IntArray
from fluidopt.studies.work import in_order, progress
from fluidopt.tables import text
from fluidopt.views import amount_bar, card, figures, html, paragraph
from fluidopt.workload import TokenPrices, WorkloadClass

if TYPE_CHECKING:
    import pandas as pd

    from fluidopt.plan import Plan

Range = tuple[Positive, Positive]
STEPS = (1, 2)
"""Sizes of the steps of the descent; holds are whole requests in fleets this small."""

TIE = 1e-9
"""Rules whose revenue differs by less, relatively, decide alike wherever the fleet comes."""


@input_type
class SmallFleetRanges:
    """Where random small fleets come from: numbers uniform between two ends, ``beta`` in its logarithm.

    Two classes share the load: 1 is the most that the fluid plan can serve in full, of requests mixed like these.
    """

    _: KW_ONLY
    gpus: PositiveInt | None = None
    """n; if none is given, one to three."""
    batch_size: PositiveInt | None = None
    """B; if none is given, 2 to 5 - n (2 at least), so that the chain stays small."""
    alpha: Range = (0.015, 0.02)
    """Intercept of the mixed iteration time, s."""
    beta: Range = (2e-5, 2e-4)
    """Slope of the mixed iteration time, s/token."""
    solo: Range = (0.02, 0.03)
    """Decode-only iteration time, s."""
    chunk_size: Range = (128.0, 512.0)
    """C, tokens, rounded to whole ones."""
    prompt_tokens: Range = (200.0, 3000.0)
    """P_i, tokens."""
    output_tokens: Range = (200.0, 3000.0)
    """D_i, tokens."""
    share: Range = (0.3, 0.7)
    """The first class's part of the arrivals."""
    load: Range = (0.8, 1.3)
    """Offered load."""
    abandonment_rate: Range = (0.05, 0.2)
    """theta, 1/s, the same for both classes."""
    prices: TokenPrices = TokenPrices(prompt=0.1, output=0.2)
    """Money/token."""

    def draw(self, stream: np.random.SeedSequence) -> tuple[Scenario, int]:
        """A scenario, charging bundled, and a number of GPUs, from a random stream of its own."""
        rng = np.random.default_rng(stream)
        gpus = int(rng.integers(1, 4)) if self.gpus is None else self.gpus
        batch = int(rng.integers(2, max(3, 6 - gpus))) if self.batch_size is None else self.batch_size
        alpha, solo, chunk, share, load, theta = (
            float(rng.uniform(*ends))
            for ends in (self.alpha, self.solo, self.chunk_size, self.share, self.load, self.abandonment_rate)
        )
        beta = float(np.exp(rng.uniform(*np.log(self.beta))))
        gpu = GPU(IterationTime(alpha=alpha, beta=beta, solo=solo), batch_size=batch, chunk_size=round(chunk))
        prompt, output = rng.uniform(*self.prompt_tokens, 2), rng.uniform(*self.output_tokens, 2)
        mix = np.array([share, 1 - share])
        rate = load * capacity(gpu, prompt, output, mix) * mix
        classes = tuple(
            WorkloadClass(
                name,
                arrival_rate=float(rate[i]),
                prompt_tokens=float(prompt[i]),
                output_tokens=float(output[i]),
                abandonment_rate=theta,
            )
            for i, name in enumerate(("a", "b"))
        )
        return Scenario(classes=classes, gpu=gpu, prices=self.prices), gpus


def capacity(gpu: GPU, prompt_tokens: Array, output_tokens: Array, mix: Array) -> float:
    """Most requests/s per GPU, in the proportions ``mix`` (I,), that the fluid plan serves in full.

    The rows of the bundled program ([L26] eq. (40)) without decode queues: prefills take at most one GPU, and
    sum_i (C D_i/P_i + kappa B - (B-1)) x_i <= kappa B.
    """
    mixed, _ = gpu.modes()
    prefill = mix * prompt_tokens / mixed.prefill_speed
    slots = gpu.kappa * gpu.batch_size
    decodes = gpu.chunk_size * output_tokens / prompt_tokens + slots - (gpu.batch_size - 1)
    return float(1 / max(prefill.sum(), prefill @ decodes / slots))


@dataclass(frozen=True, eq=False, kw_only=True)
class OptimumGap:
    """The optimum of one small fleet, the best threshold rule and gate-and-route; money/s per GPU, equal caps."""

    policy: Policy
    """The best threshold rule found."""
    rule: Rule
    """Its parameters."""
    revenue_rate: float
    """What it earns, from the stationary law of its exact chain."""
    baseline: Policy
    """Gate-and-route."""
    baseline_revenue_rate: float
    """What that earns, likewise."""
    lower: float
    """What the best of all policies earns at least, any GPU prefilling."""
    upper: float
    """What no policy exceeds."""
    roles_upper: float
    """What no policy with gate-and-route's partition exceeds."""
    states: int
    """Of the controlled chain."""
    prefill_queue_cap: int
    """Most requests waiting for a prefill."""
    decode_queue_cap: int
    """Most requests waiting for a decode."""
    cap_rise: float
    """By what part of itself the optimum rose when the caps grew for the last time; NaN for given caps."""
    rules: int
    """Threshold rules evaluated."""

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.policy.gpus

    @property
    def loss(self) -> float:
        """Part of the upper bound that the best rule found does not earn."""
        return 1 - self.revenue_rate / self.upper

    @property
    def baseline_loss(self) -> float:
        """Part of the upper bound that gate-and-route does not earn."""
        return 1 - self.baseline_revenue_rate / self.upper

    @property
    def partition_loss(self) -> float:
        """Part of the upper bound that no policy with gate-and-route's partition can earn."""
        return 1 - self.roles_upper / self.upper

    @property
    def statement(self) -> str:
        """The outcome in words."""
        kind = "without a partition" if self.rule.stays else "with a partition"
        return (
            f"{self.gpus} GPU(s): no policy earns more than {self.upper:.6g}. The best of {self.rules} threshold rules "
            f"({kind}) earns {self.revenue_rate:.6g}, {self.loss:.2%} less; gate-and-route {self.baseline_loss:.1%} "
            f"less, of which its partition costs {self.partition_loss:.1%} under any rule."
        )

    def __str__(self) -> str:
        return self.statement

    __repr__ = __str__


@dataclass(frozen=True, eq=False, kw_only=True)
class OptimumStudy:
    """How near the best threshold rules come to the optimum, over small fleets."""

    fleets: tuple[OptimumGap, ...]
    seed: int
    ranges: SmallFleetRanges

    @cached_property
    def losses(self) -> pd.DataFrame:
        """Parts of the upper bound not earned, a row per instance: ``rule``, ``gate-and-route``, and ``partition``,
        what the best policy with gate-and-route's partition does not earn."""
        import pandas as pd

        rows = [(each.loss, each.baseline_loss, each.partition_loss) for each in self.fleets]
        names = ["rule", "gate-and-route", "partition"]
        return pd.DataFrame(rows, columns=names).rename_axis(index="instance")

    def to_frame(self) -> pd.DataFrame:
        """A row per instance.

        Columns: ``gpus``, ``batch``, ``states``, ``optimum_lower`` and ``optimum_upper`` (money/s per GPU, any GPU
        prefilling), ``bound`` (fluid optimum), ``rule`` (the best found, in short), ``rule_revenue``,
        ``gate_and_route_revenue``; in % of ``optimum_upper`` not earned ``rule_loss``, ``gate_and_route_loss`` and
        ``partition_loss`` (the best policy with gate-and-route's partition); ``cap_rise`` in %.
        """
        import pandas as pd

        rows = [
            {
                "gpus": each.gpus,
                "batch": each.policy.scenario.gpu_types[0].batch_size,
                "states": each.states,
                "optimum_lower": each.lower,
                "optimum_upper": each.upper,
                "bound": each.policy.revenue_bound,
                "rule": _in_short(each.rule, [one.name for one in each.policy.scenario.classes]),
                "rule_revenue": each.revenue_rate,
                "gate_and_route_revenue": each.baseline_revenue_rate,
                "rule_loss": 100 * each.loss,
                "gate_and_route_loss": 100 * each.baseline_loss,
                "partition_loss": 100 * each.partition_loss,
                "cap_rise": 100 * each.cap_rise,
            }
            for each in self.fleets
        ]
        return pd.DataFrame(rows).rename_axis(index="instance")

    @property
    def statement(self) -> str:
        """The outcome in words."""
        median, worst = self.losses.median(), self.losses.max()
        stays = sum(each.rule.stays for each in self.fleets)
        return (
            f"The best threshold rule is within {median['rule']:.2%} of the optimum in the median of "
            f"{len(self.fleets)} small fleets and within {worst['rule']:.2%} in the worst (instance "
            f"{self.losses['rule'].idxmax()}); gate-and-route loses {median['gate-and-route']:.1%} and "
            f"{worst['gate-and-route']:.1%}, the best policy with its partition {median['partition']:.1%} and "
            f"{worst['partition']:.1%}. In {stays} of the fleets the best rule has no partition."
        )

    @property
    def caption(self) -> str:
        """How the numbers were made, in words."""
        return (
            f"Seed {self.seed}; the optimum by dynamic programming, every rule by its exact chain with the same caps; "
            "losses against the certified upper bound, any GPU prefilling."
        )

    def __str__(self) -> str:
        return "\n".join(["Optimum study", self.caption, self.statement, "", text(self.to_frame(), max_rows=80)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        median = 100.0 * self.losses.median()
        money = ("optimum_lower", "optimum_upper", "bound", "rule_revenue", "gate_and_route_revenue")
        losses = ("rule_loss", "gate_and_route_loss", "partition_loss")
        return card(
            "Threshold rules against the optimum",
            figures(
                ("Best rule, median loss", median["rule"], "%"),
                ("Gate-and-route", median["gate-and-route"], "%"),
                ("Partition alone", median["partition"], "%"),
            ),
            paragraph(self.statement),
            html(
                self.to_frame(),
                title=f"{len(self.fleets)} small fleets",
                units=dict.fromkeys(money, "money/s per GPU") | dict.fromkeys(losses, "% of upper") | {"cap_rise": "%"},
                bars=dict.fromkeys(losses, amount_bar),
                max_rows=80,
            ),
            paragraph(self.caption, muted=True),
        )


def _in_short(rule: Rule, names: Sequence[str]) -> str:
    """A rule in a few signs: ``b > a, hold a: 1, any GPU``."""
    order = " > ".join(names[i] for i in rule.order) if rule.order else rule.gate
    held = [f"{name}: {h:g}" for name, h in zip(names, rule.hold, strict=True) if np.isfinite(h)]
    roles = "any GPU" if rule.stays else "the plan's GPUs" if rule.prefill_gpus is None else f"{rule.prefill_gpus} GPUs"
    extra = ["fewest decodes first"] if rule.placement == "fewest-decodes" else []
    extra += ["decodes beside prefills first"] if rule.mixed_first and not rule.stays else []
    extra += ["decodes by the plan's shares"] if rule.shares and not rule.stays else []
    return ", ".join([order, *(["hold " + " ".join(held)] if held else []), roles, *extra])


def optimum_gap(
    plan: Plan,
    *,
    gpus: int,
    prefill_queue_cap: int | None = None,
    decode_queue_cap: int | None = None,
    starts: int = 3,
    tolerance: float = 1e-6,
    cap_tolerance: float = 1e-3,
    max_states: int = 500_000,
) -> OptimumGap:
    """Compare the best threshold rule of a small fleet with the optimum.

    The rules are those of `refine_policy`: every rule that its search begins with, then a descent through neighbours
    from the best few, each rule evaluated exactly. A minute or so at the largest sizes.

    Args:
        plan: whose prices order the classes.
        gpus: n, a few.
        prefill_queue_cap, decode_queue_cap, tolerance, cap_tolerance, max_states: as in `optimal_policy`; the rules
            are evaluated with the caps that it ends with.
        starts: rules to descend from, the best that differ in revenue.

    Raises:
        InvalidInput: the chain is too large, or an argument is out of range.
        SolverFailure: bounds or law do not come within the tolerance.
    """
    if not is_whole(starts, least=1):
        raise InvalidInput(f"optimum_gap: starts must be a whole number of at least 1; got {starts!r}")
    baseline = extract(plan, gpus=gpus, kind="gate-and-route")
    best = optimal_policy(
        extract(plan, gpus=gpus, kind="GF-WSP"),
        prefill_queue_cap=prefill_queue_cap,
        decode_queue_cap=decode_queue_cap,
        tolerance=tolerance,
        cap_tolerance=cap_tolerance,
        max_states=max_states,
    )
    within = optimal_policy(
        baseline,
        prefill_queue_cap=best.prefill_queue_cap,
        decode_queue_cap=best.decode_queue_cap,
        tolerance=tolerance,
        max_states=max_states,
    )
    search = _Search(Family(plan, int(gpus)), (best.prefill_queue_cap, best.decode_queue_cap))
    rule = search.best(starts)
    return OptimumGap(
        policy=rule.policy(plan, int(gpus)),
        rule=rule,
        revenue_rate=search.known[rule],
        baseline=baseline,
        baseline_revenue_rate=search.known[search.family.baseline],
        lower=best.lower_bound,
        upper=best.upper_bound,
        roles_upper=within.upper_bound,
        states=len(best.chain),
        prefill_queue_cap=best.prefill_queue_cap,
        decode_queue_cap=best.decode_queue_cap,
        cap_rise=best.cap_rise,
        rules=len(search.known),
    )


class _Search:
    """Rules evaluated so far, and what they earn, money/s per GPU."""

    def __init__(self, family: Family, caps: tuple[int, int]) -> None:
        self.family, self.caps = family, caps
        self.known: dict[Rule, float] = {}

    def evaluate(self, rules: Sequence[Rule]) -> list[Rule]:
        """Those of the rules that the fleet can follow, best first."""
        made = self.family.possible(list(rules))
        for rule, policy in made:
            if rule not in self.known:
                prefill, decode = self.caps
                chain = exact_chain(policy, prefill_queue_cap=prefill, decode_queue_cap=decode, tolerance=1.0)
                self.known[rule] = chain.revenue_rate
        return sorted((rule for rule, _ in made), key=lambda rule: -self.known[rule])

    def best(self, starts: int) -> Rule:
        """The best rule within reach of the best `starts` of the family's first rules."""
        first: list[Rule] = []
        for rule in self.evaluate(self.family.start()):
            if not first or self.known[rule] < self.known[first[-1]] * (1 - TIE):
                first.append(rule)
        return max((self.descend(rule) for rule in first[:starts]), key=self.known.__getitem__)

    def descend(self, rule: Rule) -> Rule:
        """From neighbour to best neighbour while that earns more."""
        while True:
            near = [neighbour for step in STEPS for neighbour in self.family.neighbours(rule, step)]
            nearest = self.evaluate(near)[0]
            if self.known[nearest] <= self.known[rule] * (1 + TIE):
                return rule
            rule = nearest


def optimum_study(
    *,
    instances: int = 20,
    seed: int = 0,
    ranges: SmallFleetRanges | None = None,
    executor: Executor | None = None,
    decode_queue_cap: int | None = 2,
    starts: int = 3,
    cap_tolerance: float = 1e-3,
    max_states: int = 500_000,
) -> OptimumStudy:
    """Compare the best threshold rules of random small fleets with the optimum (`optimum_gap`).

    Args:
        instances: how many fleets; the first ones do not depend on how many follow.
        seed: of the fleets.
        ranges: where they come from.
        executor: where they run, one job each; default here, one after the other.
        decode_queue_cap: given, as the optimum hardly ever lets a decode wait; the cap of the prefill queue grows.
        starts, cap_tolerance, max_states: as in `optimum_gap`.

    Raises:
        InvalidInput: an argument is out of range, or a chain is too large.
    """
    if not is_whole(instances, least=1):
        raise InvalidInput(f"optimum_study: instances must be a whole number of at least 1; got {instances!r}")
    seed, ranges = checked_seed(seed), SmallFleetRanges() if ranges is None else ranges
    solve = partial(
        _instance, decode_queue_cap=decode_queue_cap, starts=starts, cap_tolerance=cap_tolerance, max_states=max_states
    )
    drawn = [ranges.draw(stream) for stream in np.random.SeedSequence(seed).spawn(int(instances))]
    found = in_order(solve, *zip(*drawn, strict=True), executor=executor)
    fleets = tuple(progress(found, total=len(drawn), what="instances"))
    return OptimumStudy(fleets=fleets, seed=seed, ranges=ranges)


def _instance(
    scenario: Scenario, gpus: int, *, decode_queue_cap: int | None, starts: int, cap_tolerance: float, max_states: int
) -> OptimumGap:
    """One fleet of a study; a function of its arguments alone, for any executor."""
    return optimum_gap(
        FluidModel.from_scenario(scenario).solve(),
        gpus=gpus,
        decode_queue_cap=decode_queue_cap,
        starts=starts,
        cap_tolerance=cap_tolerance,
        max_states=max_states,
    )


def gate_map(
    optimum: OptimalPolicy,
    policy: Policy,
    rows: str = "free_decode_slots",
    columns: str | None = None,
    *,
    where: dict[str, int] | None = None,
) -> pd.DataFrame:
    """What a threshold rule would admit in the states that the optimal policy meets.

    Cell for cell the same states as in `OptimalPolicy.decision_map`, with the same weights, so that the two maps differ
    where the decisions do. A prefill that has just ended takes its slot before the gate decides.

    Args:
        optimum: of a fleet of one GPU, which may prefill.
        policy: a rule for that GPU, with a gate by priority, whose requests are decoded where they were prefilled.
        rows, columns, where: as in `OptimalPolicy.decision_map`.

    Raises:
        InvalidInput: another kind of rule or fleet, or an unknown coordinate.
    """
    classes, roles = class_names(optimum.system, optimum.policy), role_names(optimum.system, optimum.policy)
    return decision_map(
        optimum.chain,
        _gate_solution(optimum, policy),
        optimum.chain.events.T @ optimum.law,
        rows=rows,
        columns=f"prefill_queue[{classes[0]}]" if columns is None else columns,
        of="admit",
        where={} if where is None else where,
        classes=classes,
        roles=roles,
    )


def gate_differences(optimum: OptimalPolicy, policy: Policy) -> pd.DataFrame:
    """How often a threshold rule and the optimal policy decide what, where one request waits at least and the GPU is
    free to prefill.

    Arguments and errors are those of `gate_map`.

    Returns:
        A row per optimal decision, a column per decision of the rule: shares of the decisions that the optimal policy
        meets, all together 1.
    """
    import pandas as pd

    chain, names = optimum.chain, [*class_names(optimum.system, optimum.policy), "hold"]
    state = np.repeat(np.arange(len(chain)), np.diff(chain.actions.indptr))
    kind, _, _ = chain.unravel(chain.actions.data)
    numbers = np.unique(state[kind == PREFILL])
    weight = (chain.events.T @ optimum.law)[numbers]
    joint = np.zeros((len(names), len(names)))
    decided = [_admitted(chain, each, numbers) for each in (optimum.solution, _gate_solution(optimum, policy))]
    np.add.at(joint, tuple(decided), weight / weight.sum())
    return pd.DataFrame(joint, index=pd.Index(names, name="optimum"), columns=pd.Index(names, name="rule"))


def _admitted(chain: ControlledChain, solution: Solution, numbers: IntArray) -> IntArray:
    """The class whose prefill starts in each state; I for none."""
    admitted = np.full(numbers.size, chain.space.layout.system.classes)
    for at, kind, label, _ in steps(chain, solution, numbers):
        starts = kind == PREFILL
        admitted[at[starts]] = label[starts]
    return admitted


def _gate_solution(optimum: OptimalPolicy, policy: Policy) -> Solution:
    """The optimum's solution with the rule's choices: in every state the most urgent of what the rule may do next."""
    if policy.gpus != 1 or policy.gate.rule != "priority" or policy.router.rule != "stay":
        raise InvalidInput(
            "gate_map: policy must be for 1 GPU, with gate.rule 'priority' and router.rule 'stay'; got "
            f"{policy.gpus} GPU(s), {policy.gate.rule!r} and {policy.router.rule!r}"
        )
    mine, whole = ([*s.role_slots.tolist(), *s.arrival_rate.tolist()] for s in (fleet_system(policy), optimum.system))
    if mine != whole:
        raise InvalidInput(
            "gate_map: policy must be for the fleet of the optimum, with the same slots and arrival rates; its are "
            f"{mine}, not {whole}. Give both from one plan."
        )
    chain, names = optimum.chain, class_names(optimum.system, optimum.policy)
    order = policy.gate.order or tuple(
        each.name for each in sorted(policy.scenario.classes, key=lambda each: -each.output_tokens / each.prompt_tokens)
    )
    rank = np.array([order.index(name) for name in names])
    hold = np.array([policy.gate.hold.get(name, -np.inf) for name in names])
    found = coordinates(chain, np.arange(len(chain)), names)
    slack = found["free_decode_slots"] - found["decode_queue"]
    state = np.repeat(np.arange(len(chain)), np.diff(chain.actions.indptr))
    kind, label, _ = chain.unravel(chain.actions.data)
    allowed = np.flatnonzero((kind == DECODE) | ((kind == PREFILL) & (hold[label] < slack[state])))
    urgency = np.where(kind == DECODE, -1, rank[label])[allowed]
    ordered = allowed[np.lexsort((urgency, state[allowed]))]
    states, first = np.unique(state[ordered], return_index=True)
    choice = np.full(len(chain), -1, dtype=np.int64)
    choice[states] = ordered[first] - chain.actions.indptr[states]
    return replace(optimum.solution, choice=choice)
