"""A policy as data: the roles of the GPUs, the gate that admits prefills, the router that places decodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fluidopt.contention import Mode
from fluidopt.errors import InvalidInput
from fluidopt.inputs import Finite, Name, NonNegative, NonNegativeInt, PositiveInt, dump, input_type, parse
from fluidopt.model import FluidModel
from fluidopt.program import Array
from fluidopt.scenario import Scenario
from fluidopt.tables import shorten
from fluidopt.views import bullets, card, figures

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from fluidopt.simulation.result import SimulationResult

Kind = Literal[
    "gate-and-route",
    "prioritize-and-route",
    "sli-aware",
    "sli-aware-general",
    "FI-WSP",
    "GI-WSP",
    "GF-WSP",
    "FG-SP",
    "GG-SP",
    "refined",
    "thresholds",
]


@input_type
class Role:
    """What some of the GPUs do: a cap on decode slots, and the prefill chunk if they prefill at all."""

    name: Name
    """Label of the role; unique within a policy."""
    _: KW_ONLY
    gpu: Name
    """GPU type."""
    gpus: NonNegativeInt
    """Number of GPUs in the role."""
    prefill: Mode | None = None
    """Mode while a prefill runs; none where the role never prefills."""
    rest: Mode
    """Mode while no prefill runs."""
    decode_slots: NonNegativeInt
    """Decodes per GPU at most, whether or not a prefill runs."""
    slots: NonNegativeInt
    """Decodes and prefill per GPU at most; a prefill starts only where one is free."""


@input_type
class Targets:
    """What the plan expects in equilibrium, per GPU of the fleet. Tuples have one entry per class."""

    _: KW_ONLY
    prefill: tuple[NonNegative, ...]
    """x_i: prefills in service, requests/GPU."""
    decode: tuple[NonNegative, ...]
    """y_i: decodes in service, requests/GPU."""
    prefill_queue: tuple[NonNegative | None, ...]
    """q_p,i: waiting for prefill, requests/GPU; none where the plan does not determine it."""
    decode_queue: tuple[NonNegative | None, ...]
    """q_d,i: waiting for decode, requests/GPU; none where the plan does not determine it."""
    admitted: tuple[NonNegative, ...]
    """Prefills completed, requests/s per GPU."""
    throughput: tuple[NonNegative, ...]
    """Requests completed, requests/s per GPU."""
    role_prefill: dict[str, NonNegative]
    """Prefills in service in each role, all classes, requests/GPU."""
    role_decode: dict[str, NonNegative]
    """Decodes in service in each role, all classes, requests/GPU."""
    decode_by_role: dict[str, tuple[NonNegative, ...]]
    """y_ik: decodes in service in each role by class, requests/GPU."""


@input_type
class Gate:
    """Which waiting request starts when a GPU that may prefill is idle. Without ``hold`` no such GPU stays idle while a
    request waits.

    ``"occupancy"`` ([L26] section 4.1) admits the class with the least ``(X_i - n x_i)/x_i``, X_i being its prefills
    in service and x_i their target; ties go to the largest ``Q_p,i - n q_p,i`` (q_p,i = 0 where the plan does not
    determine it); classes with x_i = 0 only when no other waits. ``"queue-deviation"`` (section 6.3) admits the class
    with the largest ``Q_p,i - n q_p,i``. ``"priority"`` admits the first waiting class of ``order``, by default the one
    with the largest D_i/P_i (section 4.2.1). ``"first-come"`` admits whoever came first, of whatever class.
    """

    _: KW_ONLY
    rule: Literal["occupancy", "queue-deviation", "priority", "first-come"]
    """How classes are compared."""
    placement: Literal["uniform", "fewest-decodes"] = "uniform"
    """Which idle GPU starts the prefill."""
    order: tuple[str, ...] = ()
    """With ``"priority"``: names of the classes, most urgent first, all or (for decreasing D_i/P_i) none."""
    hold: dict[str, Finite] = field(default_factory=dict)
    """By class, h_i: it is admitted only while the decodes that wait less the free decode slots of the whole fleet are
    below -h_i. Classes that are not named are always admitted."""
    before_decodes: bool = False
    """Whether a slot that gets free goes to a new prefill rather than to a decode that waits."""


@input_type
class Router:
    """Where a decode goes.

    ``"preference"``: to a GPU with a free slot, drawn uniformly within the first role of ``order`` that has one; else
    into one first-come first-served buffer over all classes. A freed slot takes the head of the buffer.
    ``"shares"`` ([L26] section 5.1): to a role drawn with the class's share of decode completions there in the plan;
    each role has its own buffer and serves only it. ``"weighted-shares"`` (section 13): likewise, and a freed slot
    picks a waiting class with probability in proportion to its decode completions in that role in the plan; classes
    without any only when no other waits. ``"stay"``: it stays on the GPU that prefilled it, in the same slot.
    """

    _: KW_ONLY
    order: tuple[str, ...]
    """Names of the roles that decode, most preferred first."""
    rule: Literal["preference", "shares", "weighted-shares", "stay"] = "preference"
    """How the place is chosen."""


@input_type
class Policy:
    """A complete rule for a fleet of ``gpus`` GPUs: static roles, dynamic gate and router.

    ``kind`` is a name only: what the policy does is in its other fields, which may be changed by hand
    (``dataclasses.replace(policy, kind="thresholds", gate=...)``).
    """

    _: KW_ONLY
    kind: Kind
    """Name of the policy."""
    gpus: PositiveInt
    """n, number of GPUs."""
    scenario: Scenario
    """The workload, GPUs and prices it was made for."""
    roles: tuple[Role, ...]
    """Every GPU has one role."""
    targets: Targets
    """The plan's equilibrium, which the gate steers to."""
    gate: Gate
    """Which waiting request starts."""
    router: Router
    """Where a decode goes."""
    revenue_bound: Finite
    """Fluid optimum R*, money/s per GPU."""

    def __post_init__(self) -> None:
        names = [role.name for role in self.roles]
        if len(set(names)) < len(names):
            raise InvalidInput(f"roles: names must be unique; got {names}")
        if sum(role.gpus for role in self.roles) != self.gpus:
            raise InvalidInput(f"roles: the GPUs of the roles must add up to gpus = {self.gpus}")
        unknown = [name for name in self.router.order if name not in names]
        if unknown:
            raise InvalidInput(f"router.order: there is no role {unknown[0]!r}; there are {names}")
        if len(set(self.router.order)) < len(self.router.order):
            raise InvalidInput(f"router.order: every role stands once; got {list(self.router.order)}")
        self._check_targets(names)
        self._check_gate()
        self._check_router()

    def _check_targets(self, names: list[str]) -> None:
        for target in ("role_prefill", "role_decode", "decode_by_role"):
            if set(getattr(self.targets, target)) != set(names):
                raise InvalidInput(f"targets.{target} must have one entry per role ({names})")
        classes = len(self.scenario.classes)
        for target in ("prefill", "decode", "prefill_queue", "decode_queue", "admitted", "throughput"):
            if len(getattr(self.targets, target)) != classes:
                raise InvalidInput(f"targets.{target} must have one entry per class ({classes})")
        for name, values in self.targets.decode_by_role.items():
            if len(values) != classes:
                raise InvalidInput(f"targets.decode_by_role.{name} must have one entry per class ({classes})")

    def _check_gate(self) -> None:
        gate, known = self.gate, [each.name for each in self.scenario.classes]
        if gate.order and gate.rule != "priority":
            raise InvalidInput(f"gate.order goes with gate.rule 'priority'; got {gate.rule!r}")
        if gate.order and sorted(gate.order) != sorted(known):
            raise InvalidInput(
                f"gate.order must name every class once ({shorten(known)}); got {shorten(list(gate.order))}"
            )
        unknown = [name for name in gate.hold if name not in set(known)]
        if unknown:
            raise InvalidInput(f"gate.hold: there is no class {unknown[0]!r}; there are {shorten(known)}")
        if gate.hold and gate.rule == "first-come":
            raise InvalidInput("gate.hold needs a gate that tells classes apart; gate.rule is 'first-come'")

    def _check_router(self) -> None:
        slots = {role.name: role.decode_slots for role in self.roles}
        none = [name for name in self.router.order if not slots[name]]
        if none and self.router.rule in ("shares", "weighted-shares"):
            raise InvalidInput(f"router.order: role {none[0]!r} has no decode slot")
        if self.router.rule == "stay":
            if self.gate.before_decodes:
                raise InvalidInput("gate.before_decodes must be false where router.rule is 'stay'")
            for role in self.roles:
                if role.prefill is None or role.slots > role.decode_slots:
                    raise InvalidInput(
                        f"router.rule 'stay' needs roles that prefill and decode in the same slots; role {role.name!r} "
                        f"has {role.slots} slots, of them {role.decode_slots} for decodes, and "
                        f"{'prefills' if role.prefill else 'never prefills'}"
                    )

    @cached_property
    def model(self) -> FluidModel:
        """The model it was made for."""
        return FluidModel.from_scenario(self.scenario)

    def simulate(
        self,
        *,
        horizon: float | None = None,
        precision: float | None = None,
        warmup: float | None = None,
        replications: int = 8,
        seed: int | None = None,
        start: Literal["empty", "fluid"] = "empty",
        path: int = 0,
        executor: Executor | None = None,
    ) -> SimulationResult:
        """Simulate the fleet as a continuous-time Markov chain under this policy.

        Args:
            horizon: simulated seconds per replication, warm-up included; with ``precision``, at most.
            precision: run until the 95 % confidence interval of the revenue rate is at most this part of it to either
                side (0.001: 0.1 %).
            warmup: seconds at the beginning that are not measured. None chooses them by MSER from the replications
                (`fluidopt.simulation.statistics.warmup_cut`).
            replications: independent replications, at least 2.
            seed: for the random streams; the same seed gives the same numbers in any executor, and the same arrivals to
                any policy. None draws one, which the result keeps.
            start: ``"empty"``, or ``"fluid"``: the plan's equilibrium rounded to whole requests.
            path: keep the state at this many equally spaced times of each replication (`SimulationResult.path`).
            executor: where replications run; default threads of this process (the simulator runs outside the
                interpreter's lock).

        Returns:
            Means and percentiles with 95 % confidence intervals, and the comparison with the plan.

        Raises:
            InvalidInput: an argument is out of range, or the queues outgrow the memory (the fleet is overloaded and
                nobody abandons).
            SolverFailure: a replication needs more than 1e11 events.
        """
        from fluidopt.simulation.experiment import simulate_policy

        return simulate_policy(
            self,
            horizon=horizon,
            precision=precision,
            warmup=warmup,
            replications=replications,
            seed=seed,
            start=start,
            path=path,
            executor=executor,
        )

    def rules(self) -> tuple[str, ...]:
        """The policy as sentences a person can follow."""
        return (*map(_role_sentence, self.roles), self._gate_sentence(), self._router_sentence())

    def _gate_sentence(self) -> str:
        where = "on a random idle one" if self.gate.placement == "uniform" else "on the idle one with fewest decodes"
        sentence = (
            f"When a GPU that may prefill has no prefill running and requests wait, start one ({where}): "
            + self._gate_choice()
        )
        held = [f"{name}: {-h:g}" for name, h in self.gate.hold.items()]
        if held:
            sentence += (
                " But a class starts only while the decodes that wait less the free decode slots of the fleet are "
                f"below its limit ({shorten(held, between='; ')}; none for the others)."
            )
        if self.gate.before_decodes:
            sentence += " A slot that gets free goes to a new prefill before it goes to a decode that waits."
        return sentence

    def _gate_choice(self) -> str:
        names = [each.name for each in self.scenario.classes]
        n, targets = self.gpus, self.targets
        if self.gate.rule == "first-come":
            return "the request that came first, of whatever class."
        if self.gate.rule == "priority":
            by_ratio = sorted(self.scenario.classes, key=lambda each: -each.output_tokens / each.prompt_tokens)
            order = list(self.gate.order) or [each.name for each in by_ratio]
            return "the first waiting class in the order " + shorten(order, between=" > ") + "."
        queues = [f"{name}: {n * q:.3g}" for name, q in zip(names, targets.prefill_queue, strict=True) if q]
        others = [] if len(queues) == len(names) else ["0 for the others" if queues else "0 for all"]
        queue_targets = f"({'; '.join([shorten(queues, between='; '), *others] if queues else others)})"
        if self.gate.rule == "queue-deviation":
            return f"of the waiting classes the one whose queue is furthest above its target {queue_targets}."
        wanted = [f"{name}: {n * x:.3g}" for name, x in zip(names, targets.prefill, strict=True) if x > 0]
        last = [name for name, x in zip(names, targets.prefill, strict=True) if x == 0]
        if not wanted:
            return f"of the waiting classes the one whose queue is furthest above its target {queue_targets}."
        sentence = (
            "of the waiting classes the one whose prefills in service are the smallest multiple of their target "
            f"({shorten(wanted, between='; ')}); on a tie, the class whose queue is furthest above its target "
            f"{queue_targets}."
        )
        return sentence + (f" Only when none of these waits: {shorten(last)}." if last else "")

    def _router_sentence(self) -> str:
        order = self.router.order
        if self.router.rule == "stay":
            return "A request whose prefill is done is decoded on the same GPU, in the same slot."
        if self.router.rule == "preference":
            return (
                f"A request whose prefill is done goes to a random {', else '.join(order)} GPU with a free decode "
                "slot; else it waits in one first-come first-served buffer. A freed decode slot takes the head of that "
                "buffer at once."
            )
        shares = decode_shares(self)
        by_role = [
            f"{name} "
            + shorten([f"{100 * p:.3g} % of {each.name}" for each, p in zip(self.scenario.classes, row, strict=True)])
            for name, row in zip(order, shares.tolist(), strict=True)
        ]
        sentence = (
            f"A request whose prefill is done is sent to a role at random ({'; '.join(by_role)}): to a random GPU of "
            "it with a free decode slot, else into the buffer of that role, which no other role serves. "
        )
        if self.router.rule == "shares":
            return sentence + "A freed decode slot takes the head of its role's buffer at once."
        weights = [
            f"{name} "
            + shorten([f"{each.name}: {w:.3g}" for each, w in zip(self.scenario.classes, row, strict=True) if w > 0])
            for name, row in zip(order, decode_weights(self).tolist(), strict=True)
        ]
        return (
            sentence + "A freed decode slot takes the first of one of the classes that wait there, drawn at random by "
            f"weight ({'; '.join(weights)}); classes without a weight come last, first come first served."
        )

    def to_dict(self) -> dict[str, Any]:
        """The policy as JSON-able data; `from_dict` reads it back."""
        data: dict[str, Any] = dump(self)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """Read a policy back.

        Raises:
            InvalidInput: where an entry is missing or breaks a rule, named by its path.
        """
        return parse(cls, data)

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Read a policy back from `to_json`'s text."""
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"not a saved policy: {error}") from None
        return cls.from_dict(data)

    @property
    def title(self) -> str:
        """Kind and roles in one line."""
        counts = ", ".join(f"{role.gpus} {role.name}" for role in self.roles)
        return f"{self.kind} for {self.gpus} GPU{'s' if self.gpus != 1 else ''} ({counts})"

    def __str__(self) -> str:
        lines = [f"Policy {self.title}"]
        return "\n".join(lines + [f"  {at}. {rule}" for at, rule in enumerate(self.rules(), start=1)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        roles = ", ".join(f"{role.gpus} {role.name}" for role in self.roles)
        return card(
            f"Policy {self.kind}",
            figures(("GPUs", self.gpus, roles), ("Fluid optimum", self.revenue_bound, "money/s per GPU")),
            bullets("Rules", self.rules(), numbered=True),
        )


def decode_shares(policy: Policy) -> Array:
    """Probability that a decode of a class goes to a role, (roles of ``router.order``, I), [L26] section 5.1.

    p_ki = mu_ki y_ki / sum_j mu_ji y_ji over the roles that have GPUs; a class that the plan does not decode in any of
    them goes to the first role.
    """
    rate = _completions(policy)
    total = rate.sum(axis=0)
    shares: Array = np.divide(rate, total, out=np.zeros_like(rate), where=total > 0)
    shares[0, total == 0] = 1.0
    return shares


def decode_weights(policy: Policy) -> Array:
    """Weights by which a freed slot of a role picks a waiting class, (roles of ``router.order``, I), [L26] section 13.

    varpi_ki = mu_ki y_ki / sum_j mu_kj y_kj.
    """
    rate = _completions(policy)
    total = rate.sum(axis=1, keepdims=True)
    weights: Array = np.divide(rate, total, out=np.zeros_like(rate), where=total > 0)
    return weights


def _completions(policy: Policy) -> Array:
    """Decode completions of the plan, requests/s per GPU, (roles of ``router.order``, I)."""
    roles = {role.name: role for role in policy.roles}
    output = policy.scenario.workload.output_tokens
    rows = []
    for name in policy.router.order:
        role = roles[name]
        speed = (role.prefill or role.rest).decode_speed if role.gpus else 0.0
        rows.append(np.array(policy.targets.decode_by_role[name]) * speed / output)
    return np.array(rows).reshape(len(rows), len(policy.scenario.classes))


def _role_sentence(role: Role) -> str:
    decodes = f"at most {role.decode_slots} decodes" if role.decode_slots else "no decodes"
    who = f"{role.gpus} GPU{'s' if role.gpus != 1 else ''} ({role.name})"
    if role.prefill is None:
        return f"{who}: {decodes}, never a prefill."
    prefill = f"one prefill at a time in chunks of {role.prefill.chunk} tokens"
    if role.slots > role.decode_slots:
        return f"{who}: {prefill}, beside {decodes}."
    return f"{who}: at most {role.slots} requests, of them {prefill} and the others decodes."
