"""From a policy to the arrays of the chain: totals of the whole fleet, and the plan's equilibrium in whole requests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluidopt.contention import Mode
from fluidopt.policy.extract import largest_remainder
from fluidopt.policy.rules import Policy, decode_shares, decode_weights
from fluidopt.program import Array
from fluidopt.simulation.system import FEWEST_DECODES, UNIFORM, Start, System

Counts = NDArray[np.int64]


def fleet_system(policy: Policy) -> System:
    """The chain of ``policy``'s fleet."""
    workload, prices = policy.scenario.workload, policy.scenario.prices
    modes: list[Mode] = []
    for role in policy.roles:
        modes += [mode for mode in (role.prefill, role.rest) if mode is not None and mode not in modes]
    names = [role.name for role in policy.roles]
    unrouted = [name for name in names if name not in policy.router.order]
    slope, base = _gate_keys(policy)
    side, share, weight = _sides(policy)
    value = prices.prompt * workload.prompt_tokens + prices.output * workload.output_tokens
    bundled = policy.scenario.charging == "bundled"
    return System(
        arrival_rate=workload.arrival_rate * policy.gpus,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        abandonment_rate=workload.abandonment_rate,
        mode_chunk=np.array([mode.chunk for mode in modes], dtype=float),
        mode_time=np.array([mode.iteration_time or np.nan for mode in modes]),
        role_gpus=np.array([role.gpus for role in policy.roles]),
        role_prefill_mode=np.array(
            [-1 if role.prefill is None else modes.index(role.prefill) for role in policy.roles]
        ),
        role_rest_mode=np.array([modes.index(role.rest) for role in policy.roles]),
        role_decode_slots=np.array([role.decode_slots for role in policy.roles]),
        role_slots=np.array([role.slots for role in policy.roles]),
        gate_slope=slope,
        gate_base=base,
        gate_queue_target=policy.gpus * _known(policy.targets.prefill_queue),
        gate_hold=np.array([policy.gate.hold.get(each.name, -np.inf) for each in policy.scenario.classes]),
        gate_fcfs=policy.gate.rule == "first-come",
        gate_first=policy.gate.before_decodes,
        role_stays=np.full(len(policy.roles), int(policy.router.rule == "stay")),
        role_side=side,
        side_share=share,
        side_weight=weight,
        router_order=np.array([names.index(name) for name in (*policy.router.order, *unrouted)]),
        placement=UNIFORM if policy.gate.placement == "uniform" else FEWEST_DECODES,
        prefill_reward=np.zeros(len(workload)) if bundled else prices.prompt * workload.prompt_tokens,
        decode_reward=value if bundled else prices.output * workload.output_tokens,
    )


def _gate_keys(policy: Policy) -> tuple[Array, Array]:
    """Slope and base of each class's gate key ``base + slope X_i``; the least key is admitted."""
    target = np.array(policy.targets.prefill)
    if policy.gate.rule in ("queue-deviation", "first-come"):
        return np.zeros_like(target), np.zeros_like(target)
    if policy.gate.order:
        rank = {name: float(at) for at, name in enumerate(policy.gate.order)}
        return np.zeros_like(target), np.array([rank[each.name] for each in policy.scenario.classes])
    if policy.gate.rule == "priority":
        workload = policy.scenario.workload
        return np.zeros_like(target), -workload.output_tokens / workload.prompt_tokens
    # (X_i - n x_i)/x_i = X_i/x_i - n, and n is the same for all. No X_i/x_i reaches the largest float.
    with np.errstate(divide="ignore"):
        return np.where(target > 0, 1.0 / target, 0.0), np.where(target > 0, 0.0, np.finfo(float).max)


def _sides(policy: Policy) -> tuple[Counts, Array, Array]:
    """Side of each role, shares and weights: one side, or one per role that decodes."""
    classes = len(policy.scenario.classes)
    shares = np.ones((1, classes))
    if policy.router.rule in ("preference", "stay"):
        return np.zeros(len(policy.roles), dtype=int), shares, np.zeros_like(shares)
    side = np.array(
        [policy.router.order.index(role.name) if role.name in policy.router.order else 0 for role in policy.roles]
    )
    shares = decode_shares(policy)
    weighted = policy.router.rule == "weighted-shares"
    return side, shares, decode_weights(policy) if weighted else np.zeros_like(shares)


def fluid_start(policy: Policy, system: System) -> Start:
    """The plan's equilibrium for the fleet, rounded to whole requests that fit into its slots.

    Prefills and decodes fill the roles as the plan does; what rounding leaves without a slot waits in the queue.
    """
    n, targets = policy.gpus, policy.targets
    prefill_room = np.where(system.role_prefill_mode >= 0, system.role_gpus, 0)
    in_order = np.argsort(system.router_order)
    prefill, prefill_left = _seat(
        n * np.array(targets.prefill),
        n * np.array([targets.role_prefill[role.name] for role in policy.roles]),
        prefill_room,
        in_order,
    )
    decode_room = system.role_gpus * np.minimum(system.role_decode_slots, system.role_slots)
    decode_room = np.minimum(decode_room, system.role_gpus * system.role_slots - prefill.sum(axis=1))
    if system.sides == 1:
        decode, decode_left = _seat(
            n * np.array(targets.decode),
            n * np.array([targets.role_decode[role.name] for role in policy.roles]),
            decode_room,
            in_order,
        )
    else:
        decode, decode_left = _seat_by_class(
            n * np.array([targets.decode_by_role[role.name] for role in policy.roles]), decode_room
        )
    return Start(
        prefill_queue=np.rint(n * _known(targets.prefill_queue)).astype(int) + prefill_left,
        decode_queue=np.rint(n * _known(targets.decode_queue)).astype(int) + decode_left,
        prefill=prefill,
        decode=decode,
    )


def _known(targets: tuple[float | None, ...]) -> Array:
    return np.array([target or 0.0 for target in targets])


def _seat_by_class(wanted: Array, room: Counts) -> tuple[Counts, Counts]:
    """Whole numbers of shape (R, I) with about these values, no role above its room; and what is left, shape (I,)."""
    whole = np.rint(wanted).astype(int)
    seated = np.zeros_like(whole)
    for role, (counts, most) in enumerate(zip(whole, room, strict=True)):
        number = min(int(most), int(counts.sum()))
        if number:
            seated[role] = np.minimum(largest_remainder(counts / counts.sum(), number), counts)
    return seated, (whole - seated).sum(axis=0)


def _seat(classes: Array, roles: Array, room: Counts, preference: Counts) -> tuple[Counts, Counts]:
    """Whole numbers of shape (R, I) with about these totals, no role above its room; and what is left, shape (I,).

    Roles get what the plan gives them; what that leaves is seated wherever there is room, by ``preference`` (lowest
    first), since no request waits while a slot is free.
    """
    left = np.rint(classes).astype(int)
    seated = np.zeros((len(roles), len(classes)), dtype=int)
    for wanted in (np.minimum(np.rint(roles).astype(int), room), room):
        for role in np.argsort(preference):
            number = min(int(wanted[role] - seated[role].sum()), int(left.sum()))
            if number > 0:
                part = np.minimum(largest_remainder(left / left.sum(), number), left)
                seated[role] += part
                left = left - part
    return seated, left


def fluid_values(policy: Policy) -> dict[str, Array]:
    """What the plan expects of each quantity that chain and simulation report, (), (I,) or (R,); NaN where it is
    silent. Per GPU, units as in `SimulationResult`."""
    targets, workload = policy.targets, policy.scenario.workload
    known = {
        name: np.array([np.nan if value is None else value for value in getattr(targets, name)], dtype=float)
        for name in ("admitted", "throughput", "prefill", "decode", "prefill_queue", "decode_queue")
    }
    arrival = workload.arrival_rate
    gone = workload.abandonment_rate * np.nan_to_num(known["prefill_queue"] + known["decode_queue"])
    with np.errstate(divide="ignore", invalid="ignore"):
        per_arrival = {
            "prefill_wait": known["prefill_queue"],
            "time_to_first_token": known["prefill_queue"] + known["prefill"],
            "abandonment_share": gone,
        }
        waits = {name: np.where(arrival > 0, value / arrival, np.nan) for name, value in per_arrival.items()}
        decode_wait = np.where(known["admitted"] > 0, known["decode_queue"] / known["admitted"], np.nan)
    roles = [role.name for role in policy.roles]
    return {
        "revenue_rate": np.array(policy.revenue_bound),
        **known,
        "prefill_wait": waits["prefill_wait"],
        "decode_wait": decode_wait,
        "time_to_first_token": waits["time_to_first_token"],
        "abandonment_share": waits["abandonment_share"],
        "role_prefill": np.array([targets.role_prefill[name] for name in roles]),
        "role_decode": np.array([targets.role_decode[name] for name in roles]),
    }
