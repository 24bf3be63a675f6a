"""Which of the optimal allocations a plan reports, where the model leaves the split over classes and modes open.

Only totals are unique in the model as [L26] poses it. The canonical split gives every class the same share of each
mode's work; Proposition 3.2 of [L26] takes the decode queue away. Whatever is moved is certified anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput
from fluidopt.program import Array
from fluidopt.solvers import certify, held
from fluidopt.solvers.knapsack import in_router_order, split

if TYPE_CHECKING:
    from fluidopt.plan import Plan


def canonical(plan: Plan) -> Plan:
    """The same totals, every class with the same share of each mode's work.

    Raises:
        SolverFailure: the split fails the certificate.
    """
    workload = plan.model.workload
    theta = workload.abandonment_rate
    rate = float(np.nansum(plan.decode * [mode.decode_speed for _, mode in plan.model.modes]))
    throughput = _even_throughput(plan) if plan.model.scenario.charging == "separate" else plan.throughput
    return _moved(
        plan,
        {
            "x": _prefills(plan, plan.mode_share, workload.prompt_tokens * plan.admitted),
            "y": _decodes(plan, plan.mode_share, rate, workload.output_tokens * throughput),
            "q_d": (plan.admitted - throughput) / np.where(theta > 0, theta, 1.0),
        },
    )


def without_decode_queue(plan: Plan) -> Plan:
    """The construction of Proposition 3.2 of [L26]; see `Plan.without_decode_queue`.

    Raises:
        InvalidInput: where its condition fails.
        SolverFailure: the result fails the certificate.
    """
    model, workload = plan.model, plan.model.workload
    if not model.is_standard or model.scenario.charging != "bundled":
        raise InvalidInput(
            "without_decode_queue: needs bundled charging and no added rows; separate charging pays for the "
            "prefills that it would take away"
        )
    if not plan.decode_buffer_vanishes:
        raise InvalidInput(
            "without_decode_queue: the condition of Proposition 3.2 does not hold: in some GPU type a mode with "
            "prefill has the largest decode throughput (kappa < (B-1)/B for the mixed/solo pair)"
        )
    from fluidopt.solvers.structured import mode_shares

    share = mode_shares(model, float(workload.prompt_tokens @ plan.throughput))
    work = workload.output_tokens * plan.throughput
    theta = np.where(workload.abandonment_rate > 0, workload.abandonment_rate, 1.0)
    return _moved(
        plan,
        {
            "phi": share,
            "x": _prefills(plan, share, workload.prompt_tokens * plan.throughput),
            "y": _decodes(plan, share, float(work.sum()), work),
            "q_p": (workload.arrival_rate - plan.throughput) / theta,
            "q_d": np.zeros(len(workload)),
        },
    )


def exists_in(plan: Plan, name: str) -> NDArray[np.bool_]:
    """Whether the variable of that name exists in each mode, shape (K,)."""
    grid = plan.program.column_grids(plan.solution.values)[name]
    there: NDArray[np.bool_] = np.any(~np.isnan(grid), axis=0)
    return there


def _moved(plan: Plan, grids: Mapping[str, Array]) -> Plan:
    """The plan with these variables at other values, if they are as good."""
    values = plan.solution.values.copy()
    for block in plan.program.columns:
        if block.name in grids:
            exists = block.numbers >= 0
            values[block.numbers[exists]] = np.maximum(grids[block.name][exists], 0.0)
    certificate = certify(plan.program, values, plan.solution.duals)
    solution = replace(plan.solution, values=values, certificate=certificate)
    return replace(plan, solution=held(solution, plan.solution.tolerance))


def _decodes(plan: Plan, mode_share: Array, rate: float, work: Array) -> Array:
    """Decodes, shape (I, K), at ``rate`` output tokens/s in the router's order, shared in proportion to ``work``."""
    modes = [mode for _, mode in plan.model.modes]
    slots = np.array([mode.decode_slots for mode in modes]) * mode_share
    speed = np.array([mode.decode_speed for mode in modes])
    return split(in_router_order(slots, speed, np.array([mode.prefills for mode in modes]), rate), work)


def _prefills(plan: Plan, mode_share: Array, work: Array) -> Array:
    """Prefills, shape (I, K), in all modes that have one, shared in proportion to ``work``."""
    return split(np.where(exists_in(plan, "x"), mode_share, 0.0), work)


def _even_throughput(plan: Plan) -> Array:
    """Completions per class when all impatient classes complete the same share of what is prefilled.

    Separate charging pays decode tokens of all classes alike, so it leaves open whose decodes run; a first-come
    first-served decode buffer with equal abandonment rates shares them evenly.
    """
    workload = plan.model.workload
    work = workload.output_tokens * plan.admitted
    patient = workload.abandonment_rate == 0
    decoded = workload.output_tokens @ plan.throughput - work[patient].sum()
    offered = work[~patient].sum()
    share = min(1.0, max(0.0, decoded / offered)) if offered > 0 else 1.0
    return np.where(patient, plan.admitted, share * plan.admitted)
