"""How a policy is read off a plan: whole numbers of GPUs per role, gate targets, router order ([L26] section 4)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.contention import GPU, Mode
from fluidopt.errors import InvalidInput
from fluidopt.inputs import is_whole
from fluidopt.policy.rules import Gate, Policy, Role, Router, Targets
from fluidopt.program import Array

if TYPE_CHECKING:
    from fluidopt.plan import Plan

# Gate rule and router rule of each kind; [L26] sections 4 to 6.3 and 13.
RULES: dict[str, tuple[str, str]] = {
    "gate-and-route": ("occupancy", "preference"),
    "prioritize-and-route": ("priority", "preference"),
    "sli-aware": ("occupancy", "shares"),
    "sli-aware-general": ("occupancy", "weighted-shares"),
    "FI-WSP": ("first-come", "stay"),
    "GI-WSP": ("occupancy", "stay"),
    "GF-WSP": ("occupancy", "preference"),
    "FG-SP": ("first-come", "preference"),
    "GG-SP": ("occupancy", "preference"),
}
UNPARTITIONED = ("FI-WSP", "GI-WSP", "GF-WSP")

# Fleet fractions and occupancies below this are solver noise, not a wish for a GPU.
NOISE = 1e-9


def extract(plan: Plan, *, gpus: int, kind: str | None = None, prefill_gpus: int | None = None) -> Policy:
    """Read the policy for ``gpus`` GPUs off ``plan`` (see `fluidopt.plan.Plan.policy`)."""
    charging = plan.model.scenario.charging
    if kind is None:
        kind = "gate-and-route" if charging == "bundled" else "prioritize-and-route"
    if kind not in RULES:
        raise InvalidInput(f"policy: kind must be one of {', '.join(map(repr, [*RULES, 'refined']))}; got {kind!r}")
    if not is_whole(gpus, least=1):
        raise InvalidInput(f"policy: gpus must be a whole number of at least 1; got {gpus!r}")
    types = plan.model.gpu_types
    if prefill_gpus is not None and (len(types) > 1 or prefill_gpus not in range(int(gpus) + 1)):
        raise InvalidInput(
            f"policy: prefill_gpus must be a whole number from 0 to gpus = {gpus}, and goes with one GPU type "
            f"(this model has {len(types)}); got {prefill_gpus!r}"
        )
    partition = kind not in UNPARTITIONED
    if prefill_gpus is not None and not partition:
        raise InvalidInput(f"policy: prefill_gpus goes with a partition, and {kind!r} has none: all its GPUs prefill")
    roles = assign_roles(plan, int(gpus), prefill_gpus) if partition else common_roles(plan, int(gpus), kind)
    gate, router = RULES[kind]
    return Policy(
        kind=kind,  # type: ignore[arg-type]
        gpus=int(gpus),
        scenario=plan.model.scenario,
        roles=roles,
        targets=_targets(plan, roles),
        gate=Gate(rule=gate, before_decodes=kind == "GF-WSP"),  # type: ignore[arg-type]
        router=Router(
            order=tuple(role.name for role in sorted(roles, key=_preference) if role.decode_slots),
            rule=router,  # type: ignore[arg-type]
        ),
        revenue_bound=plan.revenue_rate,
    )


def _targets(plan: Plan, roles: tuple[Role, ...]) -> Targets:
    prefill, decode = (_by_role(plan, roles, values) for values in (plan.prefill, plan.decode))
    return Targets(
        prefill=_clean(np.nansum(plan.prefill, axis=1)),
        decode=_clean(np.nansum(plan.decode, axis=1)),
        prefill_queue=_clean(plan.prefill_queue),
        decode_queue=_clean(plan.decode_queue),
        admitted=_clean(plan.admitted),
        throughput=_clean(plan.throughput),
        role_prefill={role.name: float(prefill[:, r].sum()) for r, role in enumerate(roles)},
        role_decode={role.name: float(decode[:, r].sum()) for r, role in enumerate(roles)},
        decode_by_role={role.name: _clean(decode[:, r]) for r, role in enumerate(roles)},
    )


def _by_role(plan: Plan, roles: tuple[Role, ...], values: Array) -> Array:
    """Values by class and mode as values by class and role, (I, R).

    A role with a mode of its own takes that. Where the roles of a GPU type share all its slots between prefills and
    decodes, each takes its part, by number of GPUs, of all modes of the type.
    """
    columns = []
    first = {}
    k = 0
    for gpu in plan.model.gpu_types:
        first[gpu.name] = k
        k += len(gpu.modes())
    for role in roles:
        gpu = next(gpu for gpu in plan.model.gpu_types if gpu.name == role.gpu)
        modes = [mode.name for mode in gpu.modes()]
        own = values[:, first[gpu.name] : first[gpu.name] + len(modes)]
        if role.prefill is not None and role.slots == role.decode_slots:
            of_type = sum(other.gpus for other in roles if other.gpu == gpu.name)
            columns.append(np.nansum(own, axis=1) * role.gpus / of_type)
        else:
            columns.append(np.nan_to_num(own[:, modes.index((role.prefill or role.rest).name)]))
    return np.stack(columns, axis=1)


def _clean(values: Array) -> tuple[Any, ...]:
    """Solver noise to 0, what is not determined to None."""
    return tuple(None if math.isnan(value) else value if value > NOISE else 0.0 for value in values.tolist())


def assign_roles(plan: Plan, gpus: int, prefill_gpus: int | None = None) -> tuple[Role, ...]:
    """Give every GPU a role.

    Of each type, ``ceil(n phi)`` GPUs (or ``prefill_gpus``) may prefill, split over its prefill modes by largest
    remainder; the rest decode only, split likewise over its decode-only modes. A type without a decode-only mode
    prefills with all its GPUs.

    Raises:
        InvalidInput: where ``gpus`` is too small for every type to get a GPU, or for the plan's prefills and decodes
            to have one each.
    """
    types = plan.model.gpu_types
    counts = _type_counts(types, gpus)
    roles: list[Role] = []
    first = 0
    for gpu, count in zip(types, counts, strict=True):
        share = plan.mode_share[first : first + len(gpu.modes())]
        prefix = "" if len(types) == 1 else f"{gpu.name}/"
        wanted = prefill_gpus if prefill_gpus is not None else _prefill_count(gpu, share, gpus)
        roles += _roles_of(gpu, share, int(count), min(int(count), wanted), prefix)
        first += len(gpu.modes())
    if plan.admitted.sum() > NOISE and not any(role.prefill and role.gpus for role in roles):
        raise InvalidInput(f"policy: no GPU of {gpus} is left to prefill; use a larger fleet")
    if plan.throughput.sum() > NOISE and not any(role.decode_slots * role.gpus for role in roles):
        raise InvalidInput(
            f"policy: with {gpus} GPU(s) every GPU prefills and none has a decode slot; use a larger fleet"
        )
    return tuple(role for role in roles if role.gpus)


def _type_counts(types: tuple[GPU, ...], gpus: int) -> Array:
    counts = largest_remainder(np.array([gpu.share for gpu in types]), gpus)
    missing = [gpu.name for gpu, count in zip(types, counts, strict=True) if count == 0]
    if missing:
        raise InvalidInput(
            f"policy: {gpus} GPU(s) are too few for {len(types)} GPU types with these shares "
            f"(type {missing[0]!r} gets none); use a larger fleet"
        )
    return counts


def common_roles(plan: Plan, gpus: int, kind: str) -> tuple[Role, ...]:
    """Roles without a partition: every GPU prefills and decodes in the same slots.

    The chunk is that of the modes that prefill, by largest remainder where a type has several. A GPU of batch size B
    has B slots, of which a prefill takes one; in general as many as its decode-only mode has, but no more than the
    prefill mode has for decodes, and one.

    Raises:
        InvalidInput: where a GPU type cannot prefill and then decode on the same GPU, or ``gpus`` is too small.
    """
    types = plan.model.gpu_types
    counts = _type_counts(types, gpus)
    roles: list[Role] = []
    first = 0
    for gpu, count in zip(types, counts, strict=True):
        modes = gpu.modes()
        able = [k for k, mode in enumerate(modes) if mode.prefills and gpu.rest_mode(mode).decode_slots]
        if not able:
            raise InvalidInput(
                f"policy: {kind!r} has no partition, so every GPU prefills and decodes; GPU type {gpu.name!r} has no "
                f"mode that does both ({', '.join(mode.name for mode in modes)}). Use a kind with a partition"
            )
        split = _spread(plan.mode_share[first : first + len(modes)], able, int(count))
        prefix = "" if len(types) == 1 else f"{gpu.name}/"
        for k, number in zip(able, split, strict=True):
            slots = min(modes[k].decode_slots + 1, gpu.rest_mode(modes[k]).decode_slots)
            roles.append(replace(_role(gpu, modes[k], number, prefix), decode_slots=slots, slots=slots))
        first += len(modes)
    return tuple(role for role in roles if role.gpus)


def _prefill_count(gpu: GPU, share: Array, fleet: int) -> int:
    """M = ceil(n phi) over the type's prefill modes."""
    prefills = [k for k, mode in enumerate(gpu.modes()) if mode.prefills]
    return math.ceil(fleet * float(share[prefills].sum()) - NOISE)


def _roles_of(gpu: GPU, share: Array, count: int, wanted: int, prefix: str) -> list[Role]:
    modes = gpu.modes()
    prefills = [k for k, mode in enumerate(modes) if mode.prefills]
    decodes = [k for k, mode in enumerate(modes) if not mode.prefills and mode.decode_slots]
    if not prefills or not decodes:
        able = prefills or decodes
        split = _spread(share, able, count)
        return [_role(gpu, modes[k], number, prefix) for k, number in zip(able, split, strict=True)]
    return [
        _role(gpu, modes[k], number, prefix)
        for able, total in ((prefills, wanted), (decodes, count - wanted))
        for k, number in zip(able, _spread(share, able, total), strict=True)
    ]


def _spread(share: Array, able: list[int], total: int) -> list[int]:
    weight = np.where(share[able] > NOISE, share[able], 0.0)
    if weight.sum() == 0:
        weight = np.zeros(len(able))
        weight[-1] = 1.0
    return [int(number) for number in largest_remainder(weight / weight.sum(), total)]


def _role(gpu: GPU, mode: Mode, count: int, prefix: str) -> Role:
    return Role(
        prefix + mode.name,
        gpu=gpu.name,
        gpus=count,
        prefill=mode if mode.prefills else None,
        rest=gpu.rest_mode(mode) if mode.prefills else mode,
        decode_slots=mode.decode_slots,
        slots=mode.decode_slots + (1 if mode.prefills else 0),
    )


def _preference(role: Role) -> tuple[bool, float]:
    """Decode-only roles first, then by how fast a decode runs there."""
    running = role.prefill or role.rest
    return role.prefill is not None, running.iteration_time or math.inf


def largest_remainder(weights: Array, total: int) -> Array:
    """Split ``total`` into whole numbers in proportion to ``weights`` (shape (k,), sum 1), shape (k,)."""
    exact = weights * total
    counts = np.floor(exact + NOISE).astype(int)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts
