"""From a model to the structured solver and back: when the reduction applies, and its answer as columns and rows.

Some service levels only bound what a class may be admitted at, or the prefills in service; with ``q_d = 0`` they change
the corners of the reduction and nothing else. Their duals are those of the bounds in the rows' own units:

- mean wait over all arrivals, q_p <= W lambda, means a >= lambda - theta W lambda; with ell <= 0 the bound's dual, the
  row's is -theta ell and varphi falls by -ell (both rows price the same request);
- abandonment share, theta (q_p + q_d) <= eps lambda, means a >= (1 - eps) lambda; the row's dual is -ell;
- completion floor, z >= f, means a >= f; the row's dual is -ell, which a prefilled request is worth more (eta);
- slot-average TPOT of the pair, (B-1)(tau - h) S <= B (h - tau_solo)(1 - S), is a cap on S; with u >= 0 the cap's dual
  and m = (B-1)(tau - h) + B (h - tau_solo), the row's is u/m, xi rises by u, sigma by B (h - tau_solo) u/m.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fluidopt.additions import Context
from fluidopt.program import LinearProgram
from fluidopt.service_levels import AbandonmentShare, CompletionFloor, MeanWait, SlotTPOT, names_of
from fluidopt.solvers.certificate import Solution, certify
from fluidopt.solvers.knapsack import CapacityProblem, StructuredSolution, applies, frontier, solve_capacity

if TYPE_CHECKING:
    from fluidopt.model import FluidModel

Array = NDArray[np.float64]

# The reduction's arrays by the names that the program's blocks have.
_NAMES = {"phi": "mode_share", "x": "prefill", "y": "decode", "q_p": "prefill_queue", "q_d": "decode_queue"}


@dataclass(frozen=True)
class Bound:
    """A service level as a bound on admissions (``least``, shape (I,)) or on the prefills in service (``cap``)."""

    row: str
    level: MeanWait | AbandonmentShare | CompletionFloor | SlotTPOT
    least: Array | None = None
    cap: float = float("inf")


@dataclass(frozen=True)
class Reduction:
    """A model as the structured solver takes it, with the service levels that became bounds."""

    problem: CapacityProblem
    bounds: tuple[Bound, ...] = field(default=())


def why_not(model: FluidModel) -> str | None:
    """Why the structured solver does not solve ``model`` exactly; None where it does."""
    if not model.is_built_in:
        return "rows or another objective were added"
    found = reduction(model)
    return found if isinstance(found, str) else applies(found.problem)


def reduction(model: FluidModel) -> Reduction | str:
    """The model's numbers as the structured solver takes them, or why a service level does not fit into them."""
    problem = capacity_problem(model)
    levels = model.scenario.service_levels
    if not levels:
        return Reduction(problem)
    modes = [mode for _, mode in model.modes]
    pair = len(modes) == 2 and modes[0].prefills and not modes[1].prefills and modes[1].decode_slots > 0
    if not pair or (modes[0].iteration_time or 0.0) < (modes[1].iteration_time or 0.0):
        return "service levels are bounds only for the mixed/solo pair with kappa >= 1"
    context = Context(model.workload, model.modes, model.symbols)
    bounds = []
    for name, level in zip(names_of(levels), levels, strict=True):
        bound = _bound(name, level, context)
        if bound is None:
            return f"service level {name} is no bound on admissions or on the prefills in service"
        bounds.append(bound)
    least = np.max([np.zeros(len(model.workload)), *(each.least for each in bounds if each.least is not None)], axis=0)
    if np.any(least > model.workload.arrival_rate * (1 + 1e-12)):
        return "a completion floor asks for more than arrives"
    reduced = replace(
        problem,
        admitted_lower=np.minimum(least, model.workload.arrival_rate),
        prefill_cap=min((each.cap for each in bounds), default=float("inf")),
        decode_queue_allowed=False,
    )
    return Reduction(reduced, tuple(bounds))


def _bound(row: str, level: object, context: Context) -> Bound | None:
    """The level as a bound; None where it is none, or has a penalty."""
    workload = context.workload
    rates, theta = workload.arrival_rate, workload.abandonment_rate
    match level:
        case MeanWait(penalty=None):
            chosen = context.chosen(level.classes, row)
            longest = (
                level.at_most
                if level.of == "arrivals"
                else -np.expm1(-theta * level.at_most) / np.maximum(theta, 1e-300)
            )
            return Bound(row, level, np.where(chosen > 0, np.maximum(rates * (1 - theta * longest), 0.0), 0.0))
        case AbandonmentShare(penalty=None):
            chosen = context.chosen(level.classes, row)
            return Bound(row, level, np.where((chosen > 0) & (theta > 0), (1 - level.at_most) * rates, 0.0))
        case CompletionFloor(penalty=None):
            floor = level.share * rates if level.share is not None else np.full(len(workload), float(level.rate or 0.0))
            return Bound(row, level, np.where(context.chosen(level.classes, row) > 0, floor, 0.0))
        case SlotTPOT(penalty=None):
            room, span = _slot_tpot(level, context)
            return Bound(row, level, cap=room / span) if room >= 0 and span > 0 else None
    return None


def _slot_tpot(level: SlotTPOT, context: Context) -> tuple[float, float]:
    """B (h - tau_solo), and that plus (B-1)(tau - h): the cap on S is the first over the second."""
    mixed, solo = (mode for _, mode in context.modes)
    room = solo.decode_slots * (level.at_most - float(solo.iteration_time or np.nan))
    return room, room + mixed.decode_slots * (float(mixed.iteration_time or np.nan) - level.at_most)


def capacity_problem(model: FluidModel) -> CapacityProblem:
    """Workload, prices and modes as the structured solver takes them, without service levels."""
    workload, prices = model.workload, model.scenario.prices
    modes, types = model.modes, [gpu.name for gpu in model.gpu_types]
    return CapacityProblem(
        arrival_rate=workload.arrival_rate,
        abandonment_rate=workload.abandonment_rate,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        prompt_price=prices.prompt,
        output_price=prices.output,
        charging=model.scenario.charging,
        chunk=np.array([mode.chunk for _, mode in modes], dtype=float),
        decode_slots=np.array([mode.decode_slots for _, mode in modes], dtype=float),
        iteration_time=np.array([mode.iteration_time or np.inf for _, mode in modes]),
        gpu_type=np.array([types.index(gpu.name) for gpu, _ in modes]),
        share=np.array([gpu.share for gpu in model.gpu_types]),
    )


def mode_shares(model: FluidModel, prefill: float) -> Array:
    """Fractions of the fleet per mode, shape (K,), that prefill ``prefill`` tokens/s and can decode most beside it."""
    shares: Array = frontier(capacity_problem(model)).mode_share(prefill)
    return shares


def solve_structured(model: FluidModel, program: LinearProgram) -> Solution:
    """Solve by the reduction to the plane; the certificate is of the full program.

    Raises:
        InfeasibleModel: what must be served is more than the fleet can do.
    """
    reduced = reduction(model)
    assert isinstance(reduced, Reduction), "why_not() says where the reduction does not apply"
    answer = solve_capacity(reduced.problem)
    grids = {block.name: _grid(answer, block.name) for block in program.columns}
    grids |= dict(_duals(model, reduced, answer))
    values, duals = np.zeros(program.shape[1]), np.zeros(program.shape[0])
    for blocks, vector in ((program.columns, values), (program.rows, duals)):
        for block in blocks:
            exists = block.numbers >= 0
            vector[block.numbers[exists]] = np.asarray(grids[block.name])[exists]
    return Solution(values, duals, certify(program, values, duals), "knapsack")


def _grid(answer: StructuredSolution, name: str) -> Array:
    return np.asarray(getattr(answer, _NAMES.get(name, name)), dtype=float)


def _duals(model: FluidModel, reduced: Reduction, answer: StructuredSolution) -> Iterator[tuple[str, Array]]:
    """Every row family's duals: those of the reduction, with the bounds' put where the service levels' rows are."""
    workload, theta = model.workload, model.workload.abandonment_rate
    names = ("fleet", "prefill_slots", "decode_slots", "prefill_balance", "decode_balance")
    duals = {name: _grid(answer, name).copy() for name in names}
    left = answer.admitted_lower_dual.copy()
    cap_left = answer.prefill_cap_dual
    for bound in reduced.bounds:
        if bound.least is None:
            room, span = _slot_tpot_of(bound, model)
            of_cap = cap_left if bound.cap <= reduced.problem.prefill_cap else 0.0
            cap_left -= of_cap
            yield bound.row, np.array(of_cap / span)
            duals["prefill_slots"][0] += of_cap
            duals["fleet"][0] += room * of_cap / span
            continue
        # Of several bounds on one class the tightest has the price; equal ones share nothing, the first takes it.
        tightest = bound.least >= np.asarray(reduced.problem.admitted_lower) * (1 - 1e-15)
        price: Array = np.where(tightest & (bound.least > 0), left, 0.0)
        left = left - price
        if isinstance(bound.level, CompletionFloor):
            duals["decode_balance"] -= price
            yield bound.row, -price
        else:
            duals["prefill_balance"] += price
            yield bound.row, -price * (theta if isinstance(bound.level, MeanWait) else 1.0)
    yield from duals.items()
    yield "no_decode_queue", np.maximum(0.0, -theta * duals["decode_balance"]) * np.ones(len(workload))


def _slot_tpot_of(bound: Bound, model: FluidModel) -> tuple[float, float]:
    assert isinstance(bound.level, SlotTPOT)
    return _slot_tpot(bound.level, Context(model.workload, model.modes, model.symbols))
