"""A policy as data: the roles of the GPUs, the gate that admits prefills, the router that places decodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import KW_ONLY
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from fluidopt.contention import Mode
from fluidopt.errors import InvalidInput
from fluidopt.inputs import Finite, Name, NonNegative, NonNegativeInt, PositiveInt, dump, input_type, parse
from fluidopt.model import FluidModel
from fluidopt.scenario import Scenario
from fluidopt.tables import shorten

if TYPE_CHECKING:
    from fluidopt.simulation.result import SimulationResult

Kind = Literal["gate-and-route", "prioritize-and-route"]


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


@input_type
class Gate:
    """Which waiting request starts when a prefill slot is idle. It never idles a slot while a request waits.

    ``"occupancy"`` ([L26] section 4.1) admits the class with the least ``(X_i - n x_i)/x_i``, X_i being its prefills
    in service and x_i their target; ties go to the largest ``Q_p,i - n q_p,i`` (q_p,i = 0 where the plan does not
    determine it); classes with x_i = 0 only when no other waits. ``"priority"`` (section 4.2.1) admits the class
    with the largest D_i/P_i.
    """

    _: KW_ONLY
    rule: Literal["occupancy", "priority"]
    """How classes are compared."""
    placement: Literal["uniform", "fewest-decodes"] = "uniform"
    """Which idle GPU starts the prefill."""


@input_type
class Router:
    """Where a decode goes: to a GPU with a free slot, drawn uniformly within the first role of ``order`` that has
    one; else into one first-come first-served buffer over all classes. A freed slot takes the head of the buffer."""

    _: KW_ONLY
    order: tuple[str, ...]
    """Names of the roles that decode, most preferred first."""


@input_type
class Policy:
    """A complete rule for a fleet of ``gpus`` GPUs: static roles, dynamic gate and router."""

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
        for field in ("role_prefill", "role_decode"):
            if set(getattr(self.targets, field)) != set(names):
                raise InvalidInput(f"targets.{field} must have one entry per role ({names})")
        classes = len(self.scenario.classes)
        for field in ("prefill", "decode", "prefill_queue", "decode_queue", "admitted", "throughput"):
            if len(getattr(self.targets, field)) != classes:
                raise InvalidInput(f"targets.{field} must have one entry per class ({classes})")

    @cached_property
    def model(self) -> FluidModel:
        """The model it was made for."""
        return FluidModel.from_scenario(self.scenario)

    def simulate(
        self,
        *,
        horizon: float,
        warmup: float | None = None,
        replications: int = 8,
        seed: int | None = None,
        start: Literal["empty", "fluid"] = "empty",
    ) -> SimulationResult:
        """Simulate the fleet as a continuous-time Markov chain under this policy.

        Args:
            horizon: simulated seconds per replication, warm-up included.
            warmup: seconds at the beginning that are not measured (default: a tenth of ``horizon``).
            replications: independent replications, at least 2.
            seed: for the random streams; the same seed gives the same numbers. None draws one, which the result keeps.
            start: ``"empty"``, or ``"fluid"``: the plan's equilibrium rounded to whole requests.

        Returns:
            Means with 95 % confidence intervals, and the comparison with the plan.
        """
        from fluidopt.simulation.result import simulate_policy

        return simulate_policy(self, horizon=horizon, warmup=warmup, replications=replications, seed=seed, start=start)

    def rules(self) -> tuple[str, ...]:
        """The policy as sentences a person can follow."""
        return (*map(_role_sentence, self.roles), self._gate_sentence(), self._router_sentence())

    def _gate_sentence(self) -> str:
        names = [each.name for each in self.scenario.classes]
        where = "on a random idle one" if self.gate.placement == "uniform" else "on the idle one with fewest decodes"
        lead = f"When a GPU that may prefill has no prefill running and requests wait, start one ({where}): "
        if self.gate.rule == "priority":
            order = sorted(self.scenario.classes, key=lambda each: -each.output_tokens / each.prompt_tokens)
            return (
                lead
                + "the first waiting class in the order "
                + shorten([each.name for each in order], between=" > ")
                + "."
            )
        n, targets = self.gpus, self.targets
        wanted = [f"{name}: {n * x:.3g}" for name, x in zip(names, targets.prefill, strict=True) if x > 0]
        last = [name for name, x in zip(names, targets.prefill, strict=True) if x == 0]
        queues = [f"{name}: {n * q:.3g}" for name, q in zip(names, targets.prefill_queue, strict=True) if q]
        sentence = (
            lead + "of the waiting classes the one whose prefills in service are the smallest multiple of their target "
            f"({shorten(wanted, between='; ')}); on a tie, the class whose queue is furthest above its target "
            f"({shorten(queues, between='; ') + '; ' if queues else ''}0 for the others)."
        )
        return sentence + (f" Only when none of these waits: {shorten(last)}." if last else "")

    def _router_sentence(self) -> str:
        order = ", else ".join(f"a {name} GPU" for name in self.router.order)
        return (
            f"A request whose prefill is done goes to a random GPU with a free decode slot: {order}; else it waits in "
            "one first-come first-served buffer. A freed decode slot takes the head of that buffer at once."
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
        from html import escape

        items = "".join(f"<li>{escape(rule)}</li>" for rule in self.rules())
        return f"<div><b>Policy {escape(self.title)}</b><ol>{items}</ol></div>"


def _role_sentence(role: Role) -> str:
    decodes = f"at most {role.decode_slots} decodes" if role.decode_slots else "no decodes"
    who = f"{role.gpus} GPU{'s' if role.gpus != 1 else ''} ({role.name})"
    if role.prefill is None:
        return f"{who}: {decodes}, never a prefill."
    return f"{who}: one prefill at a time in chunks of {role.prefill.chunk} tokens, beside {decodes}."
