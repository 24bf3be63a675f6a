"""What a fleet is sized for, and the program that sizes it: the fluid LP with the numbers of GPUs as variables.

phi, x, y, q and lambda are totals of the fleet, the modes of a type add up to its number of GPUs N_g, and cost is
minimised (``max -cost``, as every program here is maximised).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from sympy import IndexedBase, Integer, Symbol

from fluidopt.additions import Addition, Context
from fluidopt.algebra import Parameter, RowFamily, SymbolicProgram, Variable
from fluidopt.contention import GPU
from fluidopt.errors import InvalidInput
from fluidopt.formulation import CLASSES, TYPES, formulation
from fluidopt.inputs import NonNegative, NonNegativeInt, input_type
from fluidopt.model import FluidModel
from fluidopt.program import Array, LinearProgram, Numbers, lower
from fluidopt.scenario import Charging
from fluidopt.service_levels import CompletionFloor, ServiceLevel, SlotTPOT, extend
from fluidopt.solvers import Solution
from fluidopt.tables import shorten
from fluidopt.workload import TokenPrices, Workload, WorkloadClass

SECONDS_PER_HOUR = 3600.0

_i, _g = CLASSES.symbol, TYPES.symbol
_N, _cost, _most, _limited = (IndexedBase(name) for name in ("N", "cost", "most", "limited"))
_most_in_all, _least_revenue = Symbol("most_in_all"), Symbol("least_revenue")
ARRIVALS = IndexedBase("lambda")

_PARAMETERS = (
    Parameter(_cost, (TYPES,), "money/s or GPUs, per GPU", "what a GPU of the type costs"),
    Parameter(_most, (TYPES,), "GPUs", "GPUs of the type at most"),
    Parameter(_limited, (TYPES,), "1", "1 where the number of GPUs of the type is limited"),
    Parameter(_most_in_all, (), "GPUs", "GPUs at most"),
    Parameter(_least_revenue, (), "money/s", "revenue at least"),
)
FLEET = Variable(_N, (TYPES,), "GPUs", "GPUs of the type")
_LIMITS = {
    "max_gpus": RowFamily(
        "max_gpus",
        _N[_g],
        "<=",
        _most[_g],
        (TYPES,),
        where=_limited[_g] > 0,
        meaning="there are only so many GPUs of type {gpu}",
        dual="chi",
        dual_unit="cost per GPU",
    ),
    "max_gpus_in_all": RowFamily(
        "max_gpus_in_all",
        TYPES.sum(_N[_g]),
        "<=",
        _most_in_all,
        (),
        meaning="there are only so many GPUs",
        dual="chi",
        dual_unit="cost per GPU",
    ),
}


@input_type
class FleetProblem:
    """What a fleet is sized for: the stream, the GPU types with their prices, and the promises to keep."""

    _: KW_ONLY
    classes: tuple[WorkloadClass, ...]
    """The workload classes; arrival rates of the whole stream, requests/s."""
    gpus: tuple[GPU, ...]
    """The GPU types to choose from; their ``share`` is not used."""
    service_levels: tuple[ServiceLevel, ...] = (CompletionFloor(share=1.0),)
    """Promises the fleet must keep, or pays for breaking. Amounts per GPU are meant per GPU of the fleet found."""
    prices: TokenPrices | None = None
    """Price per prompt and per output token; needed for a revenue floor and to report revenue."""
    charging: Charging = "bundled"
    """What revenue counts: completed requests, or prompt and output tokens phase by phase."""
    max_gpus: NonNegativeInt | dict[str, NonNegativeInt] | None = None
    """GPUs that can be had at most, in all or by type."""
    revenue_floor: NonNegative | None = None
    """Money/s that the fleet must earn at least."""
    source: str | None = None
    """Where the numbers come from, for reports."""

    def __post_init__(self) -> None:
        Workload(self.classes)
        if not self.gpus:
            raise InvalidInput("gpus is empty; give at least one GPU")
        names = [gpu.name for gpu in self.gpus]
        if len(set(names)) < len(names):
            raise InvalidInput(f"gpus: type names must be unique; got {names}")
        free = [gpu.name for gpu in self.gpus if gpu.hourly_price is None]
        if free and len(names) > 1:
            raise InvalidInput(
                f"gpus: type {free[0]!r} has no hourly_price, and several types are compared by cost; give every type "
                "one (GPU(..., hourly_price=...))"
            )
        unknown = [name for name in self.limits if name not in names]
        if unknown:
            raise InvalidInput(f"max_gpus: there is no GPU type {unknown[0]!r}; types are {shorten(names)}")
        for gpu in self.gpus:
            if gpu.hourly_price == 0 and isinstance(self.max_gpus, dict | None) and gpu.name not in self.limits:
                raise InvalidInput(
                    f"gpus: type {gpu.name!r} has hourly_price 0, so any number of them would cost nothing; give a "
                    f"price, or say how many there are with max_gpus={{{gpu.name!r}: ...}}"
                )
        if self.revenue_floor is not None and self.prices is None:
            raise InvalidInput("prices (TokenPrices) is required where revenue_floor is given, to count what is earned")
        for level in self.service_levels:
            self._check(level, priced=not free)

    @staticmethod
    def _check(level: Any, *, priced: bool) -> None:
        """Refuse a service level whose meaning depends on a number of GPUs that is not known yet."""
        if isinstance(level, CompletionFloor) and level.rate is not None:
            raise InvalidInput(
                f"service_levels: completion_floor has rate {level.rate:g} requests/s per GPU, and the number of GPUs "
                "is what is sought; give the share of the arrivals instead (share=...)"
            )
        if isinstance(level, SlotTPOT) and level.penalty is not None:
            raise InvalidInput(
                "service_levels: a penalty on slot_tpot is convex only for a given number of GPUs; give a hard bound "
                "(leave penalty out)"
            )
        if level.penalty is not None and not priced:
            raise InvalidInput(
                f"service_levels: {level.kind} has a penalty in money, but the GPU has no hourly_price to weigh it "
                "against; give the GPU a price or leave the penalty out"
            )

    @cached_property
    def workload(self) -> Workload:
        """The classes, rates of the whole stream."""
        return Workload(self.classes, source=self.source)

    @property
    def priced(self) -> bool:
        """Whether GPUs have hourly prices; otherwise their number is minimised."""
        return all(gpu.hourly_price is not None for gpu in self.gpus)

    @property
    def limits(self) -> dict[str, int]:
        """GPUs at most by type, where that is how ``max_gpus`` is given."""
        return self.max_gpus if isinstance(self.max_gpus, dict) else {}


@dataclass(frozen=True)
class Formulated:
    """A sizing problem in symbols and as arrays."""

    problem: FleetProblem
    base: FluidModel
    """The classes and types as a model, for its labels, modes and numbers."""
    symbolic: SymbolicProgram
    additions: tuple[Addition, ...]
    numbers: Numbers

    @cached_property
    def program(self) -> LinearProgram:
        """The program as sparse arrays."""
        return lower(self.symbolic, self.numbers)

    def marginal(self, parameter: Parameter, solution: Solution) -> Array:
        """d(objective)/d(parameter), split over the rows that it enters, shape (rows,).

        Envelope theorem: dual times d(right side - left side)/d(parameter) at the optimum. A parameter over classes
        is taken at the class of the row.
        """
        at = parameter.symbol[_i] if parameter.over else parameter.symbol
        rows = tuple(
            replace(row, left=row.left.diff(at), right=row.right.diff(at))
            if (row.left - row.right).has(parameter.symbol)
            else replace(row, left=Integer(0), right=Integer(0))
            for row in self.symbolic.constraints
        )
        # The last family is there so that the derivative has an entry where all others are constant.
        last = RowFamily("last", _N[_g], ">=", Integer(0), (TYPES,))
        slope = lower(replace(self.symbolic, constraints=(*rows, last)), self.numbers)
        right = np.where(np.isinf(slope.row_lower), slope.row_upper, slope.row_lower)
        change: Array = (right - slope.matrix @ solution.values)[: len(solution.duals)]
        return change * solution.duals


def formulate(problem: FleetProblem, *, limited: bool = True) -> Formulated:
    """Write the sizing problem down; without its ``max_gpus`` where ``limited`` is False."""
    even = 1.0 / len(problem.gpus)
    base = FluidModel(
        problem.workload,
        [replace(gpu, share=even) for gpu in problem.gpus],
        prices=problem.prices or TokenPrices(prompt=1.0, output=1.0),
        charging=problem.charging,
    )
    paper = formulation(problem.charging)
    rows = [replace(row, right=_N[_g]) if row.name == "fleet" else row for row in paper.constraints]
    if limited and problem.max_gpus is not None:
        rows.append(_LIMITS["max_gpus" if isinstance(problem.max_gpus, dict) else "max_gpus_in_all"])
    if problem.revenue_floor is not None:
        meaning = f"revenue is at least {problem.revenue_floor:g} money/s"
        rows.append(
            RowFamily(
                "revenue_floor",
                paper.objective,
                ">=",
                _least_revenue,
                (),
                meaning=meaning,
                dual="rho",
                dual_unit="cost per money/s",
            )
        )
    template = replace(
        paper,
        parameters=(*(each for each in paper.parameters if each.name != "share"), *_PARAMETERS),
        variables=(FLEET, *(replace(each, unit=each.unit.removesuffix("/GPU")) for each in paper.variables)),
        objective=-TYPES.sum(_cost[_g] * _N[_g]),
        constraints=tuple(rows),
        title="Fleet of least cost",
        labels=base.labels,
    )
    extended, values, additions = extend(
        template, problem.service_levels, Context(problem.workload, base.modes, base.symbols)
    )
    given = len(template.constraints)
    constraints = (
        *extended.constraints[:given],
        *(_of_the_fleet(extended, row) for row in extended.constraints[given:]),
    )
    names = [gpu.name for gpu in problem.gpus]
    in_all = problem.max_gpus if isinstance(problem.max_gpus, int) else 0
    values |= {
        "cost": np.array([1.0 if gpu.hourly_price is None else gpu.hourly_price for gpu in problem.gpus])
        / (SECONDS_PER_HOUR if problem.priced else 1.0),
        "most": np.array([float(problem.limits.get(name, 0)) for name in names]),
        "limited": np.array([float(name in problem.limits) for name in names]),
        "most_in_all": np.float64(in_all),
        "least_revenue": np.float64(problem.revenue_floor or 0.0),
    }
    numbers = base.numbers()
    return Formulated(
        problem,
        base,
        replace(extended, constraints=constraints),
        additions,
        Numbers(numbers.labels, {**numbers.values, **values}),
    )


def _of_the_fleet(program: SymbolicProgram, row: RowFamily) -> RowFamily:
    """A promise whose bound is an amount per GPU, written for totals: the bound times the number of GPUs.

    A bound in proportion to an arrival rate or to variables is one for totals already.
    """
    per_gpu = all(term.variable is None for term in program.terms(row.right)) and not row.right.has(ARRIVALS)
    return replace(row, right=row.right * TYPES.sum(_N[_g])) if per_gpu and row.right != 0 else row
