"""A policy as settings of vLLM engines: what each role is started with, and what of the policy no setting says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fluidopt.contention import GPU
from fluidopt.errors import InvalidInput
from fluidopt.inputs import Name, NonNegativeInt, PositiveInt, dump, input_type, parse
from fluidopt.policy.rules import Policy, Role
from fluidopt.tables import shorten, text
from fluidopt.views import bullets, card, html

if TYPE_CHECKING:
    import pandas as pd

VERSIONS = "0.11 to 0.19"
"""Versions of vLLM (V1 engine) whose settings and scheduler these are."""


@input_type
class EngineRole:
    """How the engines of one role are started, one engine per GPU of the model."""

    name: Name
    """The role."""
    _: KW_ONLY
    gpu: Name
    """GPU type."""
    replicas: PositiveInt
    """How many engines."""
    max_num_seqs: PositiveInt
    """Requests that one engine runs at most: its decodes, and one prefill if it prefills."""
    max_num_batched_tokens: PositiveInt
    """Tokens of one iteration at most: the chunk, and a token for each decode beside it."""
    long_prefill_token_threshold: NonNegativeInt
    """Prompt tokens that one request gets per iteration at most: the chunk C, so that it does not grow where decode
    slots are free; 0 (no limit) where the role never prefills."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """Order of the requests that wait inside the engine."""
    kv_role: Literal["kv_producer", "kv_consumer", "kv_both"] | None = None
    """Whether KV caches leave the engine (prefills), come in (decodes), or both; none where requests never move."""
    kv_connector: Name = "NixlConnector"
    """What moves them."""
    decode_slots: NonNegativeInt
    """Decodes at most, which the router has to keep to: the engine itself stops at ``max_num_seqs`` requests of any
    kind."""

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidInput(
                f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}), or vLLM does not start; "
                f"got {self.max_num_batched_tokens}"
            )

    @property
    def chunk(self) -> int:
        """C, prompt tokens per iteration beside a full batch of decodes; 0 where the role never prefills.

        The budget less a token for each other request: ``max_num_batched_tokens - (max_num_seqs - 1)``.
        """
        return self.max_num_batched_tokens - (self.max_num_seqs - 1) if self.long_prefill_token_threshold else 0

    def gpu_type(self, gpu: GPU) -> GPU:
        """``gpu`` (for its curve) with the batch, chunk and modes that an engine with these settings has."""
        made = replace(gpu, batch_size=self.max_num_seqs, chunk_size=max(self.chunk, 1), operating_modes=None)
        if not self.chunk:
            return replace(made, operating_modes=tuple(mode for mode in made.modes() if not mode.prefills))
        if not self.decode_slots:
            modes = made.modes(disaggregated=True)
            return replace(made, operating_modes=tuple(mode for mode in modes if not mode.decode_slots))
        return made

    def settings(self) -> dict[str, Any]:
        """vLLM's names and values, as in the keyword arguments of its engine."""
        values: dict[str, Any] = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "enable_chunked_prefill": True,
            "scheduling_policy": self.scheduling_policy,
        }
        if self.long_prefill_token_threshold:
            values["long_prefill_token_threshold"] = self.long_prefill_token_threshold
        if self.kv_role is not None:
            values["kv_transfer_config"] = {"kv_connector": self.kv_connector, "kv_role": self.kv_role}
        return values

    def command(self, model: str) -> tuple[str, ...]:
        """The words of the command that starts one engine; ports, hosts and parallelism are the deployment's."""
        words = ["vllm", "serve", model]
        for name, value in self.settings().items():
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words.append(json.dumps(value) if isinstance(value, dict) else str(value))
        return tuple(words)

    def command_line(self, model: str) -> str:
        """The command as one line for a shell."""
        return shlex.join(self.command(model))

    def config_file(self, model: str) -> str:
        """The same as a YAML file, for ``vllm serve --config``."""
        lines = [f"# role {self.name}: {self.replicas} engine{'s' if self.replicas > 1 else ''}"]
        for name, value in {"model": model, **self.settings()}.items():
            # a number, a truth value or a text in double quotes is the same in JSON and in YAML
            shown = json.dumps(json.dumps(value) if isinstance(value, dict) else value)
            lines.append(f"{name.replace('_', '-')}: {shown}")
        return "\n".join(lines) + "\n"


@input_type
class Gap:
    """Something the policy asks that no engine setting says."""

    _: KW_ONLY
    rule: Name
    """What the policy asks."""
    engine: str
    """What an engine does by itself."""
    remedy: str
    """What to do."""

    def __str__(self) -> str:
        return f"{self.rule} {self.engine} {self.remedy}"


@input_type
class EngineSettings:
    """The engines of a fleet, role by role, and what has to be done in front of them."""

    _: KW_ONLY
    title: str
    """Policy and fleet."""
    versions: str = VERSIONS
    """Versions of vLLM that the settings are for."""
    roles: tuple[EngineRole, ...]
    """In the order of the policy's roles, those that have GPUs."""
    priorities: dict[str, int] | None = None
    """By class, the ``priority`` that a request carries (lower is served first); none where the gate's order is not a
    static one."""
    gaps: tuple[Gap, ...]
    """What the settings do not say, the most important first."""

    def command_lines(self, model: str) -> tuple[str, ...]:
        """What starts one engine of each role."""
        return tuple(role.command_line(model) for role in self.roles)

    def config_files(self, model: str) -> dict[str, str]:
        """By role, the YAML file for ``vllm serve --config``."""
        return {role.name: role.config_file(model) for role in self.roles}

    def to_frame(self) -> pd.DataFrame:
        """A row per role: engines, settings, and what the router keeps to."""
        import pandas as pd

        rows = [
            {
                "engines": role.replicas,
                "max_num_seqs": role.max_num_seqs,
                "max_num_batched_tokens": role.max_num_batched_tokens,
                "long_prefill_token_threshold": role.long_prefill_token_threshold,
                "scheduling_policy": role.scheduling_policy,
                "kv_role": role.kv_role,
                "decode_slots": role.decode_slots,
            }
            for role in self.roles
        ]
        return pd.DataFrame(rows, index=pd.Index([role.name for role in self.roles], name="role"))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-able data; `from_dict` reads it back."""
        data: dict[str, Any] = dump(self)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EngineSettings:
        """Read settings back.

        Raises:
            InvalidInput: where an entry is missing or breaks a rule, named by its path.
        """
        return parse(cls, data)

    def __str__(self) -> str:
        lines = [f"vLLM {self.versions}: {self.title}", "", text(self.to_frame().T)]
        if self.priorities:
            lines += ["", f"Priority of a request: {_priority_words(self.priorities)}"]
        if self.gaps:
            lines += ["", "Not said by these settings"]
            lines += [f"  {at}. {gap}" for at, gap in enumerate(self.gaps, start=1)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        note = f"Priority of a request: {_priority_words(self.priorities)}" if self.priorities else None
        units = {"max_num_batched_tokens": "tokens", "long_prefill_token_threshold": "tokens"}
        return card(
            f"vLLM {self.versions}: {self.title}",
            html(self.to_frame(), title="Settings of an engine, by role", note=note, units=units),
            bullets("Not said by these settings", [str(gap) for gap in self.gaps], numbered=True),
        )


def engine_settings(policy: Policy, *, kv_connector: str = "NixlConnector") -> EngineSettings:
    """Translate a policy into settings of vLLM engines, one engine per GPU of the model.

    A role with chunk C and at most b decodes beside its prefill becomes ``max_num_seqs = b + 1``,
    ``max_num_batched_tokens = C + b`` and ``long_prefill_token_threshold = C``; a decode-only role with B slots
    ``max_num_seqs = max_num_batched_tokens = B``. (vLLM gives running decodes their tokens first and the rest of the
    budget to prompts; the threshold keeps the chunk at C where decode slots are free.)

    The settings shape the iterations. Whom to admit and where a decode goes is decided in front of the engines, by a
    router that runs a `Controller`; `EngineSettings.gaps` lists all of it. ``max_num_partial_prefills`` and
    ``max_long_partial_prefills`` are left alone: the V1 engine refuses other values than 1 and enforces none.

    Args:
        policy: of any kind.
        kv_connector: what moves KV caches, where decodes move between GPUs. With NixlConnector ``kv_role`` has no
            effect and the router alone decides who prefills and who decodes; other connectors go by it.

    Raises:
        InvalidInput: ``policy`` is no policy.
    """
    if not isinstance(policy, Policy):
        raise InvalidInput(f"engine_settings: policy must be a Policy, from plan.policy(gpus=...); got {policy!r:.60}")
    ordered = policy.gate.rule == "priority"
    return EngineSettings(
        title=policy.title,
        roles=tuple(_engine_role(policy, role, kv_connector) for role in policy.roles if role.gpus),
        priorities=_priorities(policy) if ordered else None,
        gaps=_Gaps(policy).found(),
    )


def _engine_role(policy: Policy, role: Role, kv_connector: str) -> EngineRole:
    chunk = role.prefill.chunk if role.prefill is not None else 0
    # A prefill takes a slot, and a GPU runs one at a time.
    requests = min(role.slots, role.decode_slots + (1 if chunk else 0))
    return EngineRole(
        role.name,
        gpu=role.gpu,
        replicas=role.gpus,
        max_num_seqs=requests,
        max_num_batched_tokens=chunk + requests - 1 if chunk else requests,
        long_prefill_token_threshold=chunk,
        scheduling_policy="priority" if chunk and policy.gate.rule == "priority" else "fcfs",
        kv_role=_kv_role(policy, role),
        kv_connector=kv_connector,
        decode_slots=min(role.decode_slots, role.slots),
    )


def _moves(policy: Policy) -> bool:
    """Whether a request may be decoded on another GPU than the one that prefilled it."""
    return policy.router.rule != "stay" and policy.gpus > 1


def _kv_role(policy: Policy, role: Role) -> Literal["kv_producer", "kv_consumer", "kv_both"] | None:
    if not _moves(policy):
        return None
    sends, receives = role.prefill is not None, role.decode_slots > 0 and role.name in policy.router.order
    if sends:
        return "kv_both" if receives else "kv_producer"
    return "kv_consumer"


def _priorities(policy: Policy) -> dict[str, int]:
    """Place of each class in the order of a priority gate; classes with equal D/P stand in the workload's order."""
    classes = policy.scenario.classes
    by_ratio = sorted(classes, key=lambda each: -each.output_tokens / each.prompt_tokens)
    order = policy.gate.order or tuple(each.name for each in by_ratio)
    return {name: at for at, name in enumerate(order)}


def _priority_words(priorities: Mapping[str, int]) -> str:
    return shorten([f"{name} {place}" for name, place in priorities.items()])


@dataclass(frozen=True)
class _Gaps:
    """What a policy asks that no setting says."""

    policy: Policy

    def found(self) -> tuple[Gap, ...]:
        policy = self.policy
        prefills = [role for role in policy.roles if role.gpus and role.prefill is not None]
        gaps = [self._gate(), self._one_prefill()] if prefills else []
        if policy.gate.hold:
            gaps.append(self._hold())
        if _moves(policy):
            gaps += [self._migration(), self._router()]
        if any(role.slots > role.decode_slots for role in prefills):
            gaps.append(self._reserved_slot(prefills))
        if policy.gate.before_decodes:
            gaps.append(
                Gap(
                    rule="A slot that gets free goes to a new prefill before a decode that waits.",
                    engine="An engine takes what it is sent in the order in which it waits there.",
                    remedy="Send decodes to an engine only when no prompt waits, as a Controller decides.",
                )
            )
        if not any(level.kind == "kv_memory" for level in policy.scenario.service_levels):
            gaps.append(
                Gap(
                    rule="Nothing is preempted.",
                    engine="An engine whose KV memory runs out preempts a request and computes it anew.",
                    remedy="Put a KVMemory limit into the model, or check that max_num_seqs requests fit.",
                )
            )
        return tuple(gaps)

    def _gate(self) -> Gap:
        rule = {
            "occupancy": "Of the classes that wait anywhere, the one whose prefills in service are the smallest "
            "multiple of their target starts first.",
            "queue-deviation": "Of the classes that wait anywhere, the one whose queue is furthest above its target "
            "starts first.",
            "priority": "One order of classes for all that wait, on whichever GPU gets free.",
            "first-come": "One queue for all GPUs, first come first served.",
        }[self.policy.gate.rule]
        engine = "Each engine orders only what already waits inside it, by arrival or by a fixed priority."
        remedy = "Keep the queue in a router in front, which runs a Controller."
        if self.policy.gate.rule == "priority":
            remedy += (
                " Without one, requests that carry these priorities are served in this order inside each engine, "
                "which also preempts by it where KV memory runs out."
            )
        if self.policy.gate.rule == "first-come":
            remedy += " Without one, a balancer that sends to the engine with fewest requests comes near it."
        return Gap(rule=rule, engine=engine, remedy=remedy)

    def _one_prefill(self) -> Gap:
        return Gap(
            rule="One prefill at a time on a GPU.",
            engine="An engine starts the next prompt with what is left of its token budget; no setting limits how many "
            "are under way.",
            remedy="Send an engine its next prompt when the first token of the one before is out.",
        )

    def _hold(self) -> Gap:
        names = shorten(list(self.policy.gate.hold))
        return Gap(
            rule=f"Some classes are held back while too few decode slots of the fleet are free ({names}).",
            engine="An engine never idles while a request waits inside it, and knows no other engine.",
            remedy="Keep them in a router in front, which runs a Controller.",
        )

    def _migration(self) -> Gap:
        return Gap(
            rule="A request may be decoded on another GPU than the one that prefilled it.",
            engine="An engine finishes what it was sent. A move is two requests: one for a single token at the first "
            "engine, then one at the second with the transfer parameters that the first returned.",
            remedy="Let the router make both. The transfer takes time that the model does not count: bound its rate "
            "with a KVTransfer limit.",
        )

    def _router(self) -> Gap:
        rule = {
            "preference": "A decode goes to the first role with a free slot, in the order "
            + " > ".join(self.policy.router.order)
            + ", and else waits in one buffer for all.",
            "shares": "A decode goes to a role drawn by the plan's shares, class by class, and waits there if need be.",
            "weighted-shares": "A decode goes to a role drawn by the plan's shares, and a freed slot draws a class by "
            "the plan's weights.",
            "stay": "",
        }[self.policy.router.rule]
        return Gap(
            rule=rule,
            engine="An engine queues whatever it is sent.",
            remedy="Send a decode only to an engine with a free slot; a Controller names it.",
        )

    def _reserved_slot(self, prefills: list[Role]) -> Gap:
        caps = shorten([f"{role.name} {role.decode_slots}" for role in prefills if role.slots > role.decode_slots])
        return Gap(
            rule=f"The place of the prefill stays free for it ({caps} decodes at most).",
            engine="An engine fills all max_num_seqs places with decodes where it is sent so many.",
            remedy="The router keeps to `decode_slots`, as a Controller does.",
        )
