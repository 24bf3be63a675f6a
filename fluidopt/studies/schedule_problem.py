"""What a schedule is made for, and the program that makes it: the fluid LP with the interval t as one more index.

Three things tie the intervals together: requests that still wait are there in the next interval; a GPU keeps its role
or is switched; and switching costs money.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from sympy import Expr, Indexed, IndexedBase, Symbol

from fluidopt.algebra import IndexSet, Parameter, RowFamily, SymbolicProgram, Variable
from fluidopt.formulation import CLASSES, MODES, TYPES, formulation
from fluidopt.model import FluidModel
from fluidopt.program import Array, LinearProgram, Numbers, lower
from fluidopt.solvers import Solution, SolverOptions, solve_program

# ---- the program in symbols ----------------------------------------------------------------------------------------

TIMES = IndexSet("interval", Symbol("t", integer=True), Symbol("T", integer=True))
BEFORE = IndexSet("before", Symbol("s", integer=True), Symbol("S", integer=True))
_i, _k, _g, _t, _s = (index.symbol for index in (CLASSES, MODES, TYPES, TIMES, BEFORE))
_lambda, _member, _share, _phi = (IndexedBase(name) for name in ("lambda", "member", "share", "phi"))
_Delta, _follows, _first, _tied, _free = (IndexedBase(name) for name in ("Delta", "F", "f", "e", "s"))
_waits, _prefills, _apart, _r_0, _q_p0, _q_d0 = (IndexedBase(name) for name in ("h", "p", "a", "r_0", "q_p0", "q_d0"))
_carry, _c_s, _c_w = Symbol("chi"), Symbol("c_s"), Symbol("c_w")
_q_p, _q_d, _r, _up, _down = (IndexedBase(name) for name in ("q_p", "q_d", "r", "u", "v"))

_PARAMETERS = (
    Parameter(_Delta, (TIMES,), "s", "length of the interval"),
    Parameter(_follows, (TIMES, BEFORE), "1", "1 where interval t follows interval s"),
    Parameter(_first, (TIMES,), "1", "1 for the first interval"),
    Parameter(_tied, (TIMES,), "1", "1 where roles before the interval are given or chosen"),
    Parameter(_free, (TIMES,), "1", "1 where roles may be switched"),
    Parameter(_waits, (CLASSES,), "1", "1 where the queue of the class is determined"),
    Parameter(_prefills, (MODES,), "1", "1 where the mode runs a prefill"),
    Parameter(_apart, (MODES,), "1", "1 where the mode decodes and no prefill ends in it"),
    Parameter(_r_0, (TYPES,), "1", "may prefill before the first interval"),
    Parameter(_q_p0, (CLASSES,), "requests/GPU", "waiting for prefill before the first interval"),
    Parameter(_q_d0, (CLASSES,), "requests/GPU", "waiting for decode before the first interval"),
    Parameter(_carry, (), "1", "1 where waiting requests are carried over"),
    Parameter(_c_s, (), "money/GPU", "cost of switching a GPU"),
    Parameter(_c_w, (), "money/(request s)", "cost of a request that waits for a second"),
)
_ROLES = (
    Variable(_r, (TYPES, TIMES), "1", "fraction of the fleet that may prefill"),
    Variable(_up, (TYPES, TIMES), "1", "switched to prefill", exists=_tied[_t] * _free[_t] > 0),
    Variable(_down, (TYPES, TIMES), "1", "switched to decode", exists=_tied[_t] * _free[_t] > 0),
)


def _over_time(expression: Expr, families: frozenset[Any]) -> Expr:
    """Every member of ``families`` with the interval as its last index."""
    members = {each for each in expression.atoms(Indexed) if each.base in families}
    return expression.xreplace({each: each.base[(*each.indices, _t)] for each in members})


def _change(quantity: IndexedBase, initial: IndexedBase, at: Symbol) -> Expr:
    """The quantity less what it was in the interval before, or before the first one."""
    earlier = BEFORE.sum(_follows[_t, _s] * quantity[at, _s])
    return quantity[at, _t] - earlier - _first[_t] * initial[at]


_ROLE_ROWS = (
    RowFamily(
        "prefill_role",
        MODES.sum(_member[_g, _k] * _prefills[_k] * _phi[_k, _t]),
        "<=",
        _r[_g, _t],
        (TYPES, TIMES),
        meaning="only so many GPUs of type {gpu} may prefill in {interval}",
        dual="pi",
        dual_unit="money per GPU",
    ),
    RowFamily(
        "decode_role",
        MODES.sum(_member[_g, _k] * _apart[_k] * _phi[_k, _t]),
        "<=",
        _share[_g] - _r[_g, _t],
        (TYPES, TIMES),
        meaning="only so many GPUs of type {gpu} decode alone in {interval}",
        dual="rho",
        dual_unit="money per GPU",
    ),
    RowFamily(
        "roles",
        _change(_r, _r_0, _g),
        "==",
        _up[_g, _t] - _down[_g, _t],
        (TYPES, TIMES),
        where=_tied[_t] > 0,
        meaning="GPUs of type {gpu} are switched in {interval}",
        dual="zeta",
        dual_unit="money per GPU",
    ),
)


@cache
def schedule_program(charging: str) -> SymbolicProgram:
    """The fluid LP over a horizon, in symbols, per GPU.

    ``max sum_t (Delta_t (revenue(t) - c_w sum_i (q_p,i(t) + q_d,i(t))) - c_s sum_g |r_g(t) - r_g(t-1)|)``.

    Variables and arrival rates of `formulation` get the index t, and its rows hold in each interval; besides

    - lambda_i(t) - theta_i q_p,i(t) - prefilled = (q_p,i(t) - q_p,i(t-1))/Delta_t, and q_d likewise: Euler's implicit
      step, exact for patient classes and close to the steady state of the interval where theta Delta is large;
    - a share r_g(t) of the fleet, of type g, may prefill, at least as many as do. GPUs without that role share what is
      left, and modes that decode and in which no prefill ends are theirs alone.
    """
    paper = formulation(charging)
    families = frozenset({*paper.bases, _lambda})
    queues = {"prefill_balance": (_q_p, _q_p0), "decode_balance": (_q_d, _q_d0)}

    def timed(row: RowFamily) -> RowFamily:
        left, right = _over_time(row.left, families), _over_time(row.right, families)
        if row.name in queues:
            left += _carry * _change(*queues[row.name], _i) / _Delta[_t]
        return replace(row, left=left, right=right, over=(*row.over, TIMES))

    return replace(
        paper,
        index_sets=(*paper.index_sets, TIMES, BEFORE),
        parameters=(
            *(replace(each, over=(CLASSES, TIMES)) if each.symbol == _lambda else each for each in paper.parameters),
            *_PARAMETERS,
        ),
        variables=(
            *(
                replace(each, over=(*each.over, TIMES), exists=_waits[_i] > 0 if each.name[0] == "q" else each.exists)
                for each in paper.variables
            ),
            *_ROLES,
        ),
        objective=TIMES.sum(_Delta[_t] * _over_time(paper.objective, families))
        - TIMES.sum(CLASSES.sum(_c_w * _Delta[_t] * (_q_p[_i, _t] + _q_d[_i, _t])))
        - TIMES.sum(TYPES.sum(_c_s * (_up[_g, _t] + _down[_g, _t]))),
        constraints=(*(timed(row) for row in paper.constraints), *_ROLE_ROWS),
        title=f"Fluid LP over a horizon, {charging} charging",
    )


# ---- with numbers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScheduleProblem:
    """What is scheduled. Rates and queues are per GPU."""

    model: FluidModel
    """Classes (with their mean rates), GPU types, prices, charging."""
    gpus: int
    """n."""
    rates: Array
    """lambda_i(t), requests/s per GPU, (I, T)."""
    seconds: Array
    """Delta_t, s, (T,)."""
    switching_cost: float
    """Money per GPU that changes its role; infinite where none may."""
    waiting_cost: float
    """Money per request and second of waiting."""
    carry_over: bool
    """Whether who waits at the end of an interval is there in the next one."""

    @cached_property
    def prefills(self) -> Array:
        """1 for the modes that run a prefill, (K,)."""
        return np.array([float(mode.prefills) for _, mode in self.model.modes])

    @cached_property
    def apart(self) -> Array:
        """1 for the modes that decode and in which no prefill ends, (K,): GPUs that may prefill never run these."""
        modes = self.model.modes
        rests = {(gpu.name, gpu.rest_mode(mode).name) for gpu, mode in modes if mode.prefills}
        return np.array(
            [
                float(mode.decode_slots > 0 and not mode.prefills and (gpu.name, mode.name) not in rests)
                for gpu, mode in modes
            ]
        )

    def idle_roles(self, least: Array, most: Array) -> Array:
        """Shares that may prefill, (G,), where an optimum leaves a range: the middle, or all where GPUs do both."""
        split = self.model.numbers().values["member"] @ self.apart > 0
        return np.where(split, (least + most) / 2, most)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the intervals: from second to second."""
        ends = np.concatenate([[0.0], np.cumsum(self.seconds)])
        return tuple(f"{start:g}-{stop:g} s" for start, stop in pairwise(ends))

    def program(
        self, at: slice = slice(None), state: State | None = None, *, switching: float | None = None
    ) -> LinearProgram:
        """The program of some intervals as arrays.

        Args:
            at: which intervals.
            state: what was before the first of them; None: nobody waited, and roles are set up for nothing.
            switching: money per switched GPU (default: the problem's); infinite where none may be.
        """
        price = self.switching_cost if switching is None else switching
        seconds, T = self.seconds[at], len(self.seconds[at])
        nobody, nothing = np.zeros(len(self.model.workload)), np.zeros(len(self.model.gpu_types))
        first = np.arange(T) == 0
        base = self.model.numbers()
        intervals = self.labels[at]
        values: dict[str, Any] = {
            "lambda": self.rates[:, at],
            "Delta": seconds,
            "F": np.eye(T, k=-1),
            "f": first.astype(float),
            "e": (~first | (state is not None and state.roles is not None)).astype(float),
            "s": np.full(T, float(np.isfinite(price))),
            "h": ((self.model.workload.abandonment_rate > 0) | self.carry_over).astype(float),
            "p": self.prefills,
            "a": self.apart,
            "r_0": nothing if state is None or state.roles is None else state.roles,
            "q_p0": nobody if state is None else state.prefill_queue,
            "q_d0": nobody if state is None else state.decode_queue,
            "chi": np.float64(self.carry_over),
            "c_s": np.float64(price if np.isfinite(price) else 0.0),
            "c_w": np.float64(self.waiting_cost),
        }
        labels = {**base.labels, TIMES.name: intervals, BEFORE.name: intervals}
        return lower(schedule_program(self.model.scenario.charging), Numbers(labels, {**base.values, **values}))


@dataclass(frozen=True, eq=False)
class State:
    """What an interval leaves to the next."""

    roles: Array | None
    """r, (G,); None where roles are chosen for nothing."""
    prefill_queue: Array
    """(I,)"""
    decode_queue: Array
    """(I,)"""


@dataclass(frozen=True, eq=False)
class Path:
    """One way through the horizon; all are priced alike."""

    fleet: Array
    """phi_k(t), shares of the fleet, (K, T)."""
    roles: Array
    """r_g(t): may prefill, shares of the fleet, (G, T)."""
    prefill_queue: Array
    """q_p,i(t), requests/GPU at the end of the interval, (I, T)."""
    decode_queue: Array
    """(I, T)."""
    revenue: Array
    """Earned in the interval, money/GPU, (T,)."""
    waited: Array
    """Request-seconds of waiting in the interval, per GPU, (T,)."""

    @property
    def switched(self) -> Array:
        """Share of the fleet whose role changes at the start of the interval, (T,); the first set-up is free."""
        return np.concatenate([[0.0], np.abs(np.diff(self.roles, axis=1)).sum(axis=0)])

    def state(self) -> State:
        """What its last interval leaves."""
        return State(self.roles[:, -1], self.prefill_queue[:, -1], self.decode_queue[:, -1])


def path_of(program: LinearProgram, solution: Solution, seconds: Array) -> Path:
    """What a solution of a program of these intervals, s, (T,), does."""
    grids, gain = program.column_grids(solution.values), program.column_grids(program.objective)
    of_fleet, of_decodes = (np.nan_to_num(gain[name] * grids[name]) for name in ("phi", "y"))
    queues = [np.nan_to_num(grids[name]) for name in ("q_p", "q_d")]
    return Path(
        fleet=grids["phi"],
        roles=grids["r"],
        prefill_queue=queues[0],
        decode_queue=queues[1],
        revenue=of_fleet.sum(axis=0) + of_decodes.sum(axis=(0, 1)),
        waited=seconds * (queues[0] + queues[1]).sum(axis=0),
    )


def step_by_step(problem: ScheduleProblem, *, foresees_cost: bool, options: SolverOptions | None) -> Path:
    """Each interval planned when it comes, for itself alone, from what the one before left.

    With ``foresees_cost`` the plan weighs what its own switches cost; without, it is the optimum of the interval, and
    GPUs that this leaves idle stay in the role they had (in the first interval, `ScheduleProblem.idle_roles`).
    """
    parts: list[Path] = []
    held: Array | None = None
    for t in range(len(problem.seconds)):
        before = parts[-1].state() if parts else None
        known = before if before is None or foresees_cost else replace(before, roles=None)
        program = problem.program(slice(t, t + 1), known)
        solution = solve_program(program, options=options)
        part = path_of(program, solution, problem.seconds[t : t + 1])
        if held is None or not foresees_cost:
            least, most = _needed(problem, program, solution)
            roles = problem.idle_roles(least, most) if held is None else np.clip(held, least, most)
            part = replace(part, roles=roles[:, None])
        held = part.roles[:, -1]
        parts.append(part)
    joined = {each.name: np.concatenate([getattr(part, each.name) for part in parts], axis=-1) for each in fields(Path)}
    return Path(**joined)


def _needed(problem: ScheduleProblem, program: LinearProgram, solution: Solution) -> tuple[Array, Array]:
    """Least and largest share of each type that may prefill, (G,), while an interval's work is done as it is."""
    grids, given = program.column_grids(solution.values), problem.model.numbers().values
    decodes = np.nansum(grids["y"][:, :, 0], axis=0)
    busy = np.divide(decodes, given["b"], out=np.zeros_like(decodes), where=problem.apart > 0)
    least: Array = given["member"] @ (problem.prefills * grids["phi"][:, 0])
    most: Array = given["share"] - given["member"] @ busy
    return least, np.maximum(least, most)
