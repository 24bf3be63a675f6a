"""Whether a simulated fleet keeps the promises of its plan: service levels and the user's own rows, as measured.

A row of the plan, ``a v <= b``, is evaluated on the simulated averages in place of the plan's variables. It is reported
as what was measured over what is allowed: with the coefficients parted by sign, ``(a+ v + b-)/(a- v + b+)``, at most 1
where the promise is kept. For a bound on a mean wait, say, that is the wait over its bound.

Simulated prefills and decodes of a role are its modes': a GPU is in its prefill mode while it prefills, and its decodes
are divided over the two modes as its time is (the simulator does not record them apart by class).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fluidopt.policy.rules import Policy
from fluidopt.program import Array, Block
from fluidopt.service_levels import names_of
from fluidopt.simulation.statistics import Batches
from fluidopt.simulation.system import Totals

if TYPE_CHECKING:
    from fluidopt.plan import Plan

BASE = frozenset({"fleet", "prefill_slots", "decode_slots", "prefill_balance", "decode_balance", "no_decode_queue"})
"""Rows that are no promises but what a fleet is, and how the plan keeps from cheating."""


@dataclass(frozen=True)
class Promise:
    """One promise as measured."""

    name: str
    """Row of the plan, with the class where there is one per class."""
    measured: float
    """What was measured over what is allowed."""
    half_width: float
    """95 %."""

    @property
    def kept(self) -> bool | None:
        """True or false at 95 % confidence, none where the simulation is too short to say."""
        if self.measured + self.half_width <= 1:
            return True
        return False if self.measured - self.half_width > 1 else None


def makes_promises(plan: Plan) -> bool:
    """Whether the plan has hard service levels or rows of the user's own."""
    return bool(_hard(plan))


def promises(plan: Plan, policy: Policy, totals: Totals, batches: Batches) -> tuple[Promise, ...]:
    """The plan's hard promises as measured; none where it has none.

    Args:
        plan: whose rows.
        policy: that was simulated.
        totals: of segments of time, leading axis (N,).
        batches: how estimates are made of these.
    """
    blocks = {block.name: block for block in plan.program.rows}
    hard = _hard(plan)
    if not hard:
        return ()
    columns = measured_columns(plan, policy, totals)
    found: list[Promise] = []
    for block in hard:
        stem = block.name.rpartition("_")[0]
        if block.name.endswith(("_most", "_least")) and f"{stem}_most" in blocks and f"{stem}_least" in blocks:
            continue
        if f"{block.name}_most" in blocks:
            found += _spread(plan, block, blocks[f"{block.name}_most"], columns, batches)
        else:
            found += _rows(plan, block, columns, batches)
    return tuple(found)


def _hard(plan: Plan) -> list[Block]:
    """The plan's families of rows that are promises."""
    levels = plan.model.scenario.service_levels
    soft = {name for name, level in zip(names_of(levels), levels, strict=True) if level.penalty is not None}
    return [block for block in plan.program.rows if block.name not in BASE and block.name not in soft]


def measured_columns(plan: Plan, policy: Policy, totals: Totals) -> Array:
    """The plan's variables as simulated, (N, columns); 0 for those that only help to write a promise."""
    blocks = {block.name: block.numbers for block in plan.program.columns}
    time = policy.gpus * totals.window
    columns = np.zeros((len(time), plan.program.shape[1]))
    index = {(gpu.name, mode.name): k for k, (gpu, mode) in enumerate(plan.model.modes)}

    def add(name: str, place: int | tuple[np.ndarray, int], values: Array) -> None:
        numbers = np.atleast_1d(blocks[name][place] if isinstance(place, int) else blocks[name][:, place[1]])
        present = numbers >= 0
        columns[:, numbers[present]] += values.reshape(len(time), -1)[:, present]

    everyone = np.arange(totals.arrivals.shape[-1])
    for r, role in enumerate(policy.roles):
        prefills, decodes = totals.prefill_time[:, r], totals.decode_time[:, r]
        busy = prefills.sum(axis=1) / (role.gpus * totals.window) if role.gpus else np.zeros(len(time))
        parts = [(role.rest, 1 - busy)]
        if role.prefill is not None:
            parts.append((role.prefill, busy))
            add("x", (everyone, index[role.gpu, role.prefill.name]), prefills / time[:, None])
        for mode, share in parts:
            k = index[role.gpu, mode.name]
            add("phi", k, share * role.gpus / policy.gpus)
            add("y", (everyone, k), decodes * (share / time)[:, None])
    for name, queue in (("q_p", totals.prefill_queue_time), ("q_d", totals.decode_queue_time)):
        present = blocks[name] >= 0
        columns[:, blocks[name][present]] = (queue / time[:, None])[:, present]
    return columns


def _rows(plan: Plan, block: Block, columns: Array, batches: Batches) -> list[Promise]:
    found = []
    for name, number in zip(block.names(), block.numbers[block.numbers >= 0], strict=True):
        coefficients = plan.program.matrix[[number]].toarray()[0]
        for sign, bound in ((1, plan.program.row_upper[number]), (-1, -plan.program.row_lower[number])):
            if np.isfinite(bound):
                row = sign * coefficients
                used = columns @ np.maximum(row, 0) + max(-bound, 0)
                allowed = columns @ np.maximum(-row, 0) + max(bound, 0)
                found.append(_promise(name, used, allowed, batches))
    return found


def _spread(plan: Plan, block: Block, most: Block, columns: Array, batches: Batches) -> list[Promise]:
    """Of a bound on the difference between classes: of the two that are furthest apart."""
    numbers = most.numbers[most.numbers >= 0]
    metric = columns @ plan.program.matrix[numbers].toarray().T
    mean = metric.mean(axis=0)
    gap = metric[:, int(np.argmax(mean))] - metric[:, int(np.argmin(mean))]
    bound = plan.program.row_upper[int(block.numbers)]
    return [_promise(block.name, gap, np.full(len(gap), bound), batches)]


def _promise(name: str, used: Array, allowed: Array, batches: Batches) -> Promise:
    scale = float(allowed.mean())
    if scale <= 0:
        return Promise(name, 1.0 if used.mean() <= 0 else np.inf, 0.0)
    excess = batches.estimate((used - allowed) / scale)
    return Promise(name, 1 + excess.mean, excess.half_width)
