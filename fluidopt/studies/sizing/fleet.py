"""How large a fleet has to be: the cheapest GPUs on which a perfect system keeps its promises, and what each costs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from fluidopt.algebra import Parameter, SymbolicProgram
from fluidopt.contention import GPU
from fluidopt.errors import InfeasibleModel, InvalidInput, SolverFailure
from fluidopt.explain import BOUNDS, RELAXED_ROWS, in_words, least
from fluidopt.formulation import CLASSES, MODES, formulation
from fluidopt.inputs import dump, is_whole, parse
from fluidopt.model import FluidModel
from fluidopt.program import Array, LinearProgram
from fluidopt.scenario import Charging
from fluidopt.service_levels import CompletionFloor, ServiceLevel, SlotTPOT
from fluidopt.solvers import Certificate, Solution, SolverOptions, certify, solve_program
from fluidopt.solvers.infeasible import conflict
from fluidopt.studies.sizing.problem import ARRIVALS, FLEET, SECONDS_PER_HOUR, FleetProblem, Formulated, formulate
from fluidopt.tables import number, shorten, text
from fluidopt.views import bullets, card, figures, html, paragraph, share_bar
from fluidopt.workload import TokenPrices, Workload, WorkloadClass, as_workload

if TYPE_CHECKING:
    import pandas as pd

# A fleet this share above a whole number is that whole number; the certificate promises no more.
ROUNDING = 1e-7


def size_fleet(
    workload: Workload | Sequence[WorkloadClass],
    gpus: GPU | Sequence[GPU],
    *,
    prices: TokenPrices | None = None,
    charging: Charging = "bundled",
    service_levels: Sequence[ServiceLevel] = (CompletionFloor(share=1.0),),
    max_gpus: int | Mapping[str, int] | None = None,
    revenue_floor: float | None = None,
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
        options: limits and tolerance of the solver (HiGHS).

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
        return FleetSize(problem, solve_program(formulate(problem).program, options=options))
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
    parts.append(in_words(formulated.symbolic, formulated.program, found))
    return InfeasibleModel(". ".join(parts) + ".", rows=found.rows)


def _fleet_in_words(gpus: Array, problem: FleetProblem) -> str:
    by_type = [f"{number(count)} of {gpu.name!r}" for gpu, count in zip(problem.gpus, gpus, strict=True)]
    return f"{number(float(gpus.sum()))} GPUs" + (f" ({shorten(by_type)})" if len(by_type) > 1 else "")


def _relaxation(problem: FleetProblem, at: int, level: Any, limited: bool) -> list[str]:
    """The least that a hard promise would have to give for a fleet to exist, all else equal."""
    for field, loosen in BOUNDS.items():
        bound = getattr(level, field, None)
        if level.penalty is None and isinstance(bound, int | float):
            needed = least(partial(_feasible, problem, at, field, limited), bound, loosen)
            if needed is not None:
                return [f"A fleet exists if {level.kind} has {field} {needed} in place of {bound:.6g}"]
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
        names = {variable.name for variable in formulation(self.problem.charging).variables} | {FLEET.name}
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
        return self._grids[FLEET.name]

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
        parameter = next(each for each in self.symbolic.parameters if each.symbol == ARRIVALS)
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
            bound = next(value for field in BOUNDS if (value := getattr(level, field, None)) is not None)
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
            "fleet needs more GPUs, and more that may prefill, because its queues fluctuate: simulate "
            "model().solve().policy(...), also with a larger prefill_gpus"
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
        cost = {"cost": "money/hour", "whole_cost": "money/hour", "hourly_price": "money/hour"}
        modes = {"gpus": "GPUs", "share_of_type": "of its type"}
        modes |= dict.fromkeys(("prefill", "decode", "decode_slots"), "requests, whole fleet")
        classes = dict.fromkeys(("arrival_rate", "completed"), "requests/s") | {"completed_share": "of arrivals"}
        classes |= {"mean_wait": "s", "decode_queue": "requests", "marginal_cost": f"{self.unit} per request/s"}
        return card(
            "Fleet",
            figures(
                ("Perfect system", self.gpus.sum(), "GPUs"),
                ("Rounded up", self.whole_gpus.sum(), "GPUs"),
                *([("Cost, rounded up", self.whole_cost, "money/hour")] if self.problem.priced else []),
                *([("Penalties", self.penalty, self.unit)] if self._has_penalties else []),
            ),
            html(self.to_frame(), title="GPU types", units=cost),
            html(self.modes, title="Modes", units=modes, bars={"share_of_type": share_bar}),
            html(self.classes, title="Classes", units=classes, bars={"completed_share": share_bar}),
            html(self.promises, title="Promises", units={"marginal_cost": f"{self.unit} per unit of the bound"})
            if len(self.promises)
            else "",
            bullets("Notes", self.notes),
            paragraph(f"{self.solution.method}; {self.certificate}.", muted=True),
        )
