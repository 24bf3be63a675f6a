"""How large a fleet has to be: the cheapest GPUs on which a perfect system keeps its promises, and what each costs.

The fluid LP with the fleet as a variable: phi, x, y, q and lambda are totals of the fleet, the modes of a type add up
to its number of GPUs N_g, and cost is minimised (``max -cost``, as every program here is maximised).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from sympy import IndexedBase, Integer, Symbol

from fluidopt.algebra import Parameter, RowFamily, SymbolicProgram, Variable
from fluidopt.contention import GPU
from fluidopt.errors import InfeasibleModel, InvalidInput, SolverFailure
from fluidopt.explain import _BOUNDS, RELAXED_ROWS, _in_words, _least
from fluidopt.formulation import CLASSES, MODES, TYPES, formulation
from fluidopt.inputs import NonNegative, NonNegativeInt, dump, input_type, is_whole, parse
from fluidopt.model import FluidModel
from fluidopt.program import Array, LinearProgram, Numbers, lower
from fluidopt.scenario import Charging
from fluidopt.service_levels import Addition, CompletionFloor, Context, ServiceLevel, SlotTPOT, extend
from fluidopt.solvers import Certificate, Solution, SolverOptions, certify, solve_program
from fluidopt.solvers.infeasible import conflict
from fluidopt.tables import bullets, html, number, shorten, text
from fluidopt.workload import TokenPrices, Workload, WorkloadClass, as_workload

if TYPE_CHECKING:
    import pandas as pd

SECONDS_PER_HOUR = 3600.0
# A fleet this share above a whole number is that whole number; the certificate promises no more.
ROUNDING = 1e-7

_i, _g = CLASSES.symbol, TYPES.symbol
_N, _cost, _most, _limited = (IndexedBase(name) for name in ("N", "cost", "most", "limited"))
_most_in_all, _least_revenue = Symbol("most_in_all"), Symbol("least_revenue")
_lam = IndexedBase("lambda")

_PARAMETERS = (
    Parameter(_cost, (TYPES,), "money/s or GPUs, per GPU", "what a GPU of the type costs"),
    Parameter(_most, (TYPES,), "GPUs", "GPUs of the type at most"),
    Parameter(_limited, (TYPES,), "1", "1 where the number of GPUs of the type is limited"),
    Parameter(_most_in_all, (), "GPUs", "GPUs at most"),
    Parameter(_least_revenue, (), "money/s", "revenue at least"),
)
_FLEET = Variable(_N, (TYPES,), "GPUs", "GPUs of the type")
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
        variables=(_FLEET, *(replace(each, unit=each.unit.removesuffix("/GPU")) for each in paper.variables)),
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
    per_gpu = all(term.variable is None for term in program.terms(row.right)) and not row.right.has(_lam)
    return replace(row, right=row.right * TYPES.sum(_N[_g])) if per_gpu and row.right != 0 else row


def size_fleet(
    workload: Workload | Sequence[WorkloadClass],
    gpus: GPU | Sequence[GPU],
    *,
    prices: TokenPrices | None = None,
    charging: Charging = "bundled",
    service_levels: Sequence[ServiceLevel] = (CompletionFloor(share=1.0),),
    max_gpus: int | Mapping[str, int] | None = None,
    revenue_floor: float | None = None,
    solver: str = "auto",
    options: SolverOptions | None = None,
) -> FleetSize:
    """Find the cheapest fleet on which a perfect system keeps every promise: a lower bound for every policy.

    Args:
        workload: the classes; arrival rates of the whole stream, requests/s.
        gpus: the type, or the types to choose from, with their ``hourly_price``. A single type may have none: its
            number of GPUs is minimised then. ``share`` is not used.
        prices: what a token earns; needed for ``revenue_floor`` and to report revenue.
        charging: what revenue counts (see `FluidModel`).
        service_levels: the promises; by default every request is completed. With a penalty (money/s) a promise may be
            broken where that is cheaper. Amounts per GPU (fairness, KV transfer) are per GPU of the fleet found.
        max_gpus: GPUs that can be had at most, in all or by type.
        revenue_floor: money/s that the fleet must earn at least.
        solver: ``"auto"``, ``"highs"`` or ``"cvxpy"``.
        options: limits and tolerance.

    Raises:
        InvalidInput: an argument breaks a rule, or prices that are needed are missing.
        InfeasibleModel: no fleet keeps all promises; the message says which conflict and what would do.
        SolverFailure: no answer that passes its certificate.
    """
    stream = as_workload(workload)
    if max_gpus is not None:
        max_gpus = _checked_limit(max_gpus)
    problem = FleetProblem(
        classes=stream.classes,
        gpus=(gpus,) if isinstance(gpus, GPU) else cast(Any, gpus),
        service_levels=cast(Any, service_levels),
        prices=prices,
        charging=charging,
        max_gpus=max_gpus,
        revenue_floor=revenue_floor,
        source=stream.source,
    )
    try:
        return FleetSize(problem, solve_program(formulate(problem).program, solver, options))
    except InfeasibleModel:
        raise _explained(problem) from None


def _checked_limit(limit: object) -> int | dict[str, int]:
    by_type = dict(limit) if isinstance(limit, Mapping) else None
    for value in by_type.values() if by_type is not None else [limit]:
        if not is_whole(value, least=0):
            raise InvalidInput(
                "size_fleet: max_gpus must be a whole number of at least 0, or one by GPU type "
                f"({{'a100': 8}}); got {limit!r}"
            )
    return int(cast(Any, limit)) if by_type is None else {name: int(value) for name, value in by_type.items()}


def _explained(problem: FleetProblem) -> InfeasibleModel:
    """The error to raise where no fleet keeps all promises: what would do, and which rows conflict."""
    head, limited = "no fleet, however large, keeps all promises", False
    if problem.max_gpus is not None:
        try:
            free = solve_program(formulate(problem, limited=False).program)
        except (InfeasibleModel, SolverFailure):
            pass
        else:
            needed = FleetSize(problem, free).gpus
            head = f"no fleet within max_gpus keeps all promises. {_fleet_in_words(needed, problem)} would do"
            limited = True
    formulated = formulate(problem, limited=limited)
    found = conflict(formulated.program)
    parts = [head]
    if formulated.program.shape[0] <= RELAXED_ROWS:
        for at, level in enumerate(problem.service_levels):
            parts += _relaxation(problem, at, level, limited)
    parts.append(_in_words(cast(Any, formulated), formulated.program, found))
    return InfeasibleModel(". ".join(parts) + ".", rows=found.rows)


def _fleet_in_words(gpus: Array, problem: FleetProblem) -> str:
    by_type = [f"{number(count)} of {gpu.name!r}" for gpu, count in zip(problem.gpus, gpus, strict=True)]
    return f"{number(float(gpus.sum()))} GPUs" + (f" ({shorten(by_type)})" if len(by_type) > 1 else "")


def _relaxation(problem: FleetProblem, at: int, level: Any, limited: bool) -> list[str]:
    """The least that a hard promise would have to give for a fleet to exist, all else equal."""
    for field, loosen in _BOUNDS.items():
        bound = getattr(level, field, None)
        if level.penalty is None and isinstance(bound, int | float):
            needed = _least(partial(_feasible, problem, at, field, limited), bound, loosen)
            if needed is not None:
                return [f"A fleet exists if {level.kind} has {field} {needed:.6g} in place of {bound:.6g}"]
    return []


def _feasible(problem: FleetProblem, at: int, field: str, limited: bool, value: float) -> bool:
    levels: list[Any] = list(problem.service_levels)
    if levels[at].kind == "abandonment_share" and value > 1:
        return False
    levels[at] = replace(levels[at], **{field: value})
    try:
        solve_program(formulate(replace(problem, service_levels=tuple(levels)), limited=limited).program)
    except (InfeasibleModel, SolverFailure):
        return False
    return True


@dataclass(frozen=True, eq=False)
class FleetSize:
    """The cheapest fleet of a perfect system. Quantities are of the whole fleet; costs in money/hour.

    Without hourly prices the cost is the number of GPUs, and so is what the shadow prices count.
    """

    problem: FleetProblem
    solution: Solution

    @cached_property
    def _formulated(self) -> Formulated:
        return formulate(self.problem)

    @property
    def symbolic(self) -> SymbolicProgram:
        """The program in symbols; renders as LaTeX."""
        return self._formulated.symbolic

    @property
    def program(self) -> LinearProgram:
        """The program as sparse arrays: minus the cost (money/s, or GPUs) is maximised."""
        return self._formulated.program

    @property
    def certificate(self) -> Certificate:
        """Primal and dual residuals and gap; its objective and bound are minus the cost in money/s (or GPUs)."""
        return self.solution.certificate

    @cached_property
    def _grids(self) -> dict[str, Array]:
        names = {variable.name for variable in formulation(self.problem.charging).variables} | {_FLEET.name}
        grids = self.program.column_grids(self.solution.values)
        return {name: grids[name] for name in names}

    @property
    def _scale(self) -> float:
        """From the objective's unit to money/hour (or GPUs)."""
        return SECONDS_PER_HOUR if self.problem.priced else 1.0

    @property
    def unit(self) -> str:
        """Of costs: money/hour, or GPUs where there are no hourly prices."""
        return "money/hour" if self.problem.priced else "GPUs"

    # ---- the fleet --------------------------------------------------------------------------------------------

    @property
    def gpus(self) -> Array:
        """N, shape (G,): GPUs of each type, not rounded."""
        return self._grids[_FLEET.name]

    @cached_property
    def whole_gpus(self) -> NDArray[np.int64]:
        """GPUs of each type rounded up, shape (G,)."""
        return np.array([math.ceil(n - ROUNDING * max(1.0, n)) for n in self.gpus.tolist()], dtype=np.int64)

    @property
    def _price(self) -> Array:
        """Shape (G,): money/hour, or 1 where the number of GPUs counts."""
        return np.array([1.0 if gpu.hourly_price is None else gpu.hourly_price for gpu in self.problem.gpus])

    @property
    def cost(self) -> float:
        """What the fleet costs, not rounded, in `unit`; penalties for broken promises are not in it."""
        return float(self._price @ self.gpus)

    @property
    def whole_cost(self) -> float:
        """What the fleet costs with each type rounded up, in `unit`."""
        return float(self._price @ self.whole_gpus)

    @property
    def penalty(self) -> float:
        """What promises that are broken for a penalty cost on top, in `unit`."""
        return max(0.0, -self.certificate.objective * self._scale - self.cost)

    @property
    def lower_bound(self) -> float:
        """No system keeps the promises at less than this (cost and penalty, in `unit`): the dual bound."""
        return max(0.0, -self.certificate.bound * self._scale)

    def to_frame(self) -> pd.DataFrame:
        """A row per GPU type: GPUs, also rounded up, hourly price, and cost in money/hour of both."""
        import pandas as pd

        price = np.array([gpu.hourly_price if gpu.hourly_price is not None else np.nan for gpu in self.problem.gpus])
        columns = {
            "gpus": self.gpus,
            "whole_gpus": self.whole_gpus,
            "hourly_price": price,
            "cost": price * self.gpus,
            "whole_cost": price * self.whole_gpus,
        }
        return pd.DataFrame(columns, index=pd.Index([gpu.name for gpu in self.problem.gpus], name="gpu"))

    @cached_property
    def modes(self) -> pd.DataFrame:
        """A row per mode: GPUs in it, their share of the type, prefills and decodes in service, decode slots."""
        import pandas as pd

        modes = self._formulated.base.modes
        of = np.array([[gpu.name for gpu in self.problem.gpus].index(gpu.name) for gpu, _ in modes])
        phi = self._grids["phi"]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(self.gpus[of] > 0, phi / self.gpus[of], np.nan)
        columns = {
            "gpus": phi,
            "share_of_type": share,
            "prefill": np.nansum(self._grids["x"], axis=0),
            "decode": np.nansum(self._grids["y"], axis=0),
            "decode_slots": np.array([mode.decode_slots for _, mode in modes]) * phi,
        }
        return pd.DataFrame(columns, index=pd.Index(self._formulated.base.labels[MODES.name], name="mode"))

    @cached_property
    def throughput(self) -> Array:
        """z, shape (I,): requests completed, requests/s."""
        speed = np.array([mode.decode_speed for _, mode in self._formulated.base.modes])
        tokens: Array = np.nansum(self._grids["y"] * speed, axis=1)
        return tokens / self.problem.workload.output_tokens

    @cached_property
    def admitted(self) -> Array:
        """a, shape (I,): prefills completed, requests/s."""
        speed = np.array([mode.prefill_speed for _, mode in self._formulated.base.modes])
        tokens: Array = np.nansum(self._grids["x"] * speed, axis=1)
        return tokens / self.problem.workload.prompt_tokens

    @property
    def revenue_rate(self) -> float:
        """Money/s that the fleet earns (not maximised); NaN without token prices."""
        prices, workload = self.problem.prices, self.problem.workload
        if prices is None:
            return float("nan")
        prompts = self.throughput if self.problem.charging == "bundled" else self.admitted
        return float(
            prices.prompt * (workload.prompt_tokens @ prompts)
            + prices.output * workload.output_tokens @ self.throughput
        )

    @cached_property
    def classes(self) -> pd.DataFrame:
        """A row per class: what it asks and gets (requests/s, seconds), and what one more request/s would cost.

        ``mean_wait`` is that before prefill over all arrivals, NaN where not determined (patient classes).
        """
        import pandas as pd

        rate = self.problem.workload.arrival_rate
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = {
                "arrival_rate": rate,
                "completed": self.throughput,
                "completed_share": np.where(rate > 0, self.throughput / rate, np.nan),
                "mean_wait": np.where(rate > 0, self._grids["q_p"] / rate, np.nan),
                "decode_queue": self._grids["q_d"],
                "marginal_cost": self.marginal_cost,
            }
        return pd.DataFrame(columns, index=pd.Index(self.problem.workload.names, name="class"))

    # ---- prices -----------------------------------------------------------------------------------------------

    @cached_property
    def shadow_prices(self) -> pd.Series[float]:
        """d(cost)/d(right side) of every row by name, in `unit` per unit of the row; penalties count as cost."""
        import pandas as pd

        duals = -self._scale * self.solution.duals + 0.0
        return pd.Series(duals, index=pd.Index(self.program.row_names, name="row"), name="shadow_price")

    @cached_property
    def marginal_cost(self) -> Array:
        """d(cost)/d(lambda_i), shape (I,): `unit` per request/s more of the class, its promises kept.

        Without ``max_gpus`` and ``revenue_floor`` the cost is the sum of these times the arrival rates.
        """
        parameter = next(each for each in self.symbolic.parameters if each.symbol == _lam)
        total = np.zeros(len(self.problem.workload))
        effect = self._effect(parameter)
        for block, row in zip(self.program.rows, self.symbolic.constraints, strict=True):
            if row.over == (CLASSES,):
                total += np.nan_to_num(block.grid(effect))
        return total

    @cached_property
    def promises(self) -> pd.DataFrame:
        """A row per promise (and class, where it is one per class): its bound, and d(cost)/d(bound).

        ``marginal_cost`` is in `unit` per unit of the bound: above 0 for a floor that costs more when raised, below 0
        for a limit that saves cost when loosened, 0 where something else decides.
        """
        import pandas as pd

        index, rows = [], []
        for level, added in zip(self.problem.service_levels, self._formulated.additions, strict=True):
            parameter = next(each for each in added.parameters if each.name.startswith(("bound_", "limit_")))
            name = parameter.name.partition("_")[2]
            bound = next(value for field in _BOUNDS if (value := getattr(level, field, None)) is not None)
            effect = self._effect(parameter)
            if parameter.over:
                (block,) = (block for block in self.program.rows if block.name == name)
                for place in np.argwhere(block.numbers >= 0).ravel():
                    index.append((name, block.labels[0][place]))
                    rows.append((bound, effect[block.numbers[place]]))
            else:
                index.append((name, ""))
                rows.append((bound, effect.sum()))
        return pd.DataFrame(
            np.array(rows, dtype=float).reshape(-1, 2) + 0.0,
            columns=["bound", "marginal_cost"],
            index=pd.MultiIndex.from_tuples(index, names=["promise", "class"]),
        )

    def _effect(self, parameter: Parameter) -> Array:
        """d(cost)/d(parameter) by row, in `unit`."""
        return -self._scale * self._formulated.marginal(parameter, self.solution) + 0.0

    # ---- what to know about it --------------------------------------------------------------------------------

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the numbers do not show."""
        whose = "every policy"
        if any(added.empties_decode_queue for added in self._formulated.additions):
            whose += " that keeps no decode queue"
        found = [
            f"a lower bound for {whose} on GPUs that run in these modes: a perfect system in the long run. A real "
            "fleet needs more, because its queues fluctuate; simulate model().solve().policy(...) to see how much"
        ]
        extra = self.whole_cost - self.cost
        if extra > ROUNDING * max(1.0, self.cost):
            several = "; another mix of whole GPUs can be cheaper" if len(self.gpus) > 1 else ""
            found.append(f"rounding each type up adds {number(extra)} {self.unit}{several}")
        if isinstance(self.problem.max_gpus, int) and self.whole_gpus.sum() > self.problem.max_gpus:
            found.append(f"rounded up, the types add up to more than max_gpus = {self.problem.max_gpus}")
        if any(isinstance(level, SlotTPOT) for level in self.problem.service_levels):
            found.append("slot-average TPOT depends on the mix of GPUs, so check it again after rounding")
        found.append("sized for mean arrival rates: size peak hours by themselves")
        if self.gpus.sum() <= ROUNDING:
            found.append("nothing asks for a GPU: give a service level, a revenue floor or arrivals")
        return tuple(found)

    def model(self, *, prices: TokenPrices | None = None) -> FluidModel:
        """The model of the fleet rounded up, with its promises: solve it for a plan and a policy.

        Args:
            prices: what a token earns (default: those the fleet was sized with).

        Raises:
            InvalidInput: without token prices, or where the fleet is empty.
        """
        prices = prices if prices is not None else self.problem.prices
        if prices is None:
            raise InvalidInput("FleetSize.model: prices (TokenPrices) is required, as a plan maximises revenue")
        total = int(self.whole_gpus.sum())
        if total == 0:
            raise InvalidInput("FleetSize.model: the fleet has no GPUs, so there is nothing to plan")
        model = FluidModel(
            self.problem.workload.per_gpu(total),
            [
                replace(gpu, share=int(count) / total)
                for gpu, count in zip(self.problem.gpus, self.whole_gpus, strict=True)
                if count
            ],
            prices=prices,
            charging=self.problem.charging,
            service_levels=self.problem.service_levels,
        )
        model.scenario = replace(model.scenario, gpus=total)
        return model

    # ---- onwards ----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data: the problem, the primal and dual vectors; `from_dict` certifies them anew."""
        return {
            "problem": dump(self.problem),
            "method": self.solution.method,
            "tolerance": self.solution.tolerance,
            "values": self.solution.values.tolist(),
            "duals": self.solution.duals.tolist(),
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FleetSize:
        """Read a fleet back; raises `InvalidInput` where its numbers do not solve its problem."""
        try:
            problem = parse(FleetProblem, data["problem"])
            values, duals = np.array(data["values"], dtype=float), np.array(data["duals"], dtype=float)
            method, tolerance = str(data["method"]), float(data["tolerance"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"not a saved fleet: {error!r}") from None
        program = formulate(problem).program
        if (duals.shape, values.shape) != tuple((size,) for size in program.shape):
            raise InvalidInput(
                f"not a saved fleet of this problem: {values.size} values and {duals.size} duals for "
                f"{program.shape[1]} columns and {program.shape[0]} rows"
            )
        size = cls(problem, Solution(values, duals, certify(program, values, duals), method, tolerance))
        if not size.certificate.holds(tolerance):
            raise InvalidInput(f"the saved fleet does not solve its problem: {size.certificate}")
        return size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FleetSize):
            return NotImplemented
        return (
            self.problem == other.problem
            and np.array_equal(self.solution.values, other.solution.values)
            and np.array_equal(self.solution.duals, other.solution.duals)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def _title(self) -> str:
        cost = f", {number(self.cost)} money/hour" if self.problem.priced else ""
        whole = f"{self.whole_gpus.sum()} rounded up"
        if self.problem.priced:
            whole += f", {number(self.whole_cost)} money/hour"
        paid = f"; penalties {number(self.penalty)} money/hour" if self._has_penalties else ""
        return f"Fleet: {number(float(self.gpus.sum()))} GPUs{cost} ({whole}){paid}"

    @property
    def _has_penalties(self) -> bool:
        return any(level.penalty is not None for level in self.problem.service_levels)

    def __repr__(self) -> str:
        lines = [self._title, f"{self.solution.method}; {self.certificate}", ""]
        for table in (self.to_frame(), self.modes, self.classes, self.promises):
            if len(table):
                lines += [text(table), ""]
        return "\n".join(lines + [f"Note: {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        parts = [
            html(self.to_frame(), title=self._title, note=f"{self.solution.method}; {self.certificate}"),
            html(self.modes, title="Modes (requests of the whole fleet)"),
            html(self.classes, title=f"Classes (requests/s, s; marginal cost in {self.unit} per request/s)"),
        ]
        if len(self.promises):
            parts.append(html(self.promises, title=f"Promises (marginal cost in {self.unit} per unit of the bound)"))
        return "".join([*parts, bullets("Notes", self.notes)])
