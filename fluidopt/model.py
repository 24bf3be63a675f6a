"""`FluidModel`: workload classes, GPUs and prices joined into the fluid LP, in symbols and as arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
from sympy import Expr
from sympy.logic.boolalg import Boolean, BooleanAtom

from fluidopt.additions import Context
from fluidopt.algebra import PlainPrinter, RowFamily, SymbolicProgram, relation_parts
from fluidopt.contention import GPU, MODE_UNITS, Mode, mode_table, warn_if_unphysical
from fluidopt.errors import InfeasibleModel, InvalidInput, SolverFailure
from fluidopt.explain import explain
from fluidopt.expressions import (
    parse_condition,
    parse_expression,
    parse_relation,
    write_condition,
    write_expression,
    write_relation,
)
from fluidopt.formulation import CLASSES, MODES, TYPES, Symbols, formulation
from fluidopt.program import LinearProgram, Numbers, lower
from fluidopt.scenario import Charging, Row, Scenario, read_scenario
from fluidopt.service_levels import ServiceLevel, extend
from fluidopt.solvers import Solution, SolverOptions, certify, checked, held, solve_program
from fluidopt.solvers.concave import lower_rows, solve_concave
from fluidopt.solvers.graph import is_linear
from fluidopt.solvers.structured import solve_structured, why_not
from fluidopt.views import card, figures, formulas, html, more
from fluidopt.workload import TokenPrices, Workload, WorkloadClass, as_workload

if TYPE_CHECKING:
    from fluidopt.plan import Plan

# Tangents to a convex penalty until it is exact to this share of the objective; the error shrinks quadratically.
CUT_TOLERANCE = 1e-10
MOST_CUTS = 60


class FluidModel:
    """The steady-state fluid LP of a fleet (arXiv:2602.02987, eqs. (40) and (42), over operating modes).

    Args:
        classes: the workload; arrival rates per GPU.
        gpus: the GPU type, or several types whose shares add up to 1.
        prices: what a token earns.
        charging: ``"bundled"`` (paid at completion) or ``"separate"`` (paid phase by phase).
        service_levels: promises, from `fluidopt.service_levels`, as hard bounds or penalties.

    Rows can be added in the model's own symbols with `subject_to` and the objective replaced with `maximize`; both
    change this model and return it.
    """

    def __init__(
        self,
        classes: Workload | Sequence[WorkloadClass],
        gpus: GPU | Sequence[GPU],
        *,
        prices: TokenPrices,
        charging: Charging = "bundled",
        service_levels: Sequence[ServiceLevel] = (),
    ) -> None:
        workload = as_workload(classes)
        self.scenario = Scenario(
            classes=workload.classes,
            gpu=tuple(gpus) if isinstance(gpus, Sequence) else gpus,
            prices=prices,
            charging=charging,
            service_levels=tuple(service_levels) if isinstance(service_levels, Sequence) else service_levels,
            source=workload.source,
        )
        self.symbolic: SymbolicProgram
        self.symbolic, self._level_values, self._additions = extend(
            replace(formulation(charging), labels=self.labels),
            self.scenario.service_levels,
            Context(workload, self.modes, self.symbols),
        )
        self._program: LinearProgram | None = None
        self._unsaved: str | None = None
        for gpu in self.gpu_types:
            warn_if_unphysical(gpu)

    @classmethod
    def from_scenario(cls, scenario: Scenario | str | Path) -> FluidModel:
        """Build the model that a `Scenario`, or a scenario file, describes."""
        if not isinstance(scenario, Scenario):
            scenario = read_scenario(scenario)
        model = cls(
            scenario.workload,
            scenario.gpu,
            prices=scenario.prices,
            charging=scenario.charging,
            service_levels=scenario.service_levels,
        )
        if scenario.gpus is not None:
            model.scenario = replace(model.scenario, gpus=scenario.gpus)
        for at, row in enumerate(scenario.rows):
            try:
                model.subject_to(row.row, name=row.name, where=row.where or True, meaning=row.meaning)
            except InvalidInput as error:
                raise InvalidInput(f"rows[{at}] {row.name!r}: {error}") from None
        if scenario.objective is not None:
            try:
                model.maximize(scenario.objective)
            except InvalidInput as error:
                raise InvalidInput(f"objective: {error}") from None
        return model

    @property
    def workload(self) -> Workload:
        """The classes, arrival rates per GPU."""
        return self.scenario.workload

    @property
    def gpu_types(self) -> tuple[GPU, ...]:
        """The GPU types."""
        return self.scenario.gpu_types

    @property
    def modes(self) -> tuple[tuple[GPU, Mode], ...]:
        """Every mode with the GPU type it belongs to, in the order of index k."""
        return tuple((gpu, mode) for gpu in self.gpu_types for mode in gpu.modes())

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Names of the members of each index set; modes are ``type/mode`` where there are several types."""
        alone = len(self.gpu_types) == 1
        return {
            CLASSES.name: self.workload.names,
            MODES.name: tuple(mode.name if alone else f"{gpu.name}/{mode.name}" for gpu, mode in self.modes),
            TYPES.name: tuple(gpu.name for gpu in self.gpu_types),
        }

    @property
    def symbols(self) -> Symbols:
        """The model's symbols, for `subject_to` and `maximize`."""
        return Symbols(self.labels)

    @property
    def has_convex_penalty(self) -> bool:
        """Whether a penalty is convex (that of slot TPOT): it is met by cuts, round by round, not by one program."""
        return any(added.cut is not None for added in self._additions)

    @property
    def is_standard(self) -> bool:
        """Whether rows and objective are the built-in ones (nothing added by `subject_to` or `maximize`)."""
        return self.symbolic == formulation(self.scenario.charging)

    def subject_to(
        self, relation: object, *, name: str, where: Boolean | bool | str = True, meaning: str = ""
    ) -> FluidModel:
        """Add a linear row, or one per member of the free indices of ``relation``.

        Args:
            relation: ``left <= right``, ``left >= right`` or ``sympy.Eq(left, right)`` in `symbols`, or the same as
                text (``"q_p[i] <= 2*lambda[i]"``).
            name: of the family of rows; its shadow prices are listed under it.
            where: a condition on parameters that selects the members, or its text (default: all).
            meaning: the row in words, with ``{class}``, ``{mode}``, ``{gpu}`` standing for the labels.

        Raises:
            InvalidInput: where the row is not a relation, not linear, or uses what the model does not determine.
        """
        if not isinstance(name, str) or not name:
            raise InvalidInput(f"subject_to: name must be a text that is not empty; got {name!r}")
        if isinstance(relation, str):
            relation = parse_relation(relation, self.symbols)
        if isinstance(where, str):
            where = parse_condition(where, self.symbols)
        if isinstance(relation, bool | BooleanAtom):
            raise InvalidInput(f"subject_to: row {name!r} holds no variable (it is simply {relation})")
        left, sense, right = relation_parts(relation)
        terms = self.symbolic.terms(self.symbolic.check(left - right, "subject_to"))
        if all(term.variable is None for term in terms):
            raise InvalidInput(f"subject_to: row {name!r} holds no variable")
        where = sympy.sympify(where) if isinstance(where, bool) else where
        if not isinstance(where, Boolean):
            raise InvalidInput(
                f"subject_to: where must be a condition on parameters such as theta[i] > 0; got {where!r}"
            )
        show = PlainPrinter(self.symbolic).doprint
        row = RowFamily(
            name,
            left,
            sense,
            right,
            self.symbolic.free_indices(left, right, where),
            where=where,
            meaning=meaning or f"{name}: {show(left)} {sense} {show(right)}",
            dual=f"dual_{name}",
            dual_unit="money/s per unit of the right side",
        )
        self._replace(self.symbolic.with_row(row))
        self._note(lambda: {"rows": (*self.scenario.rows, _row_text(row, meaning, self.symbols))})
        return self

    @property
    def is_built_in(self) -> bool:
        """Whether rows and objective are those of the formulation and the service levels, with nothing added."""
        return self._unsaved is None and not self.scenario.rows and self.scenario.objective is None

    def maximize(self, objective: Expr | str) -> FluidModel:
        """Replace the revenue rate in the objective by an expression in `symbols`, or its text; penalties stay.

        Linear, or concave (``sum(log(...), i)``, ``sqrt``, ...), which is solved through cvxpy.
        """
        if isinstance(objective, str):
            objective = parse_expression(objective, self.symbols)
        checked = self.symbolic.check(objective, "maximize")
        costs = sum((added.cost for added in self._additions), sympy.S.Zero)
        self._replace(replace(self.symbolic, objective=checked - costs))
        self._note(lambda: {"objective": write_expression(checked, self.symbols)})
        return self

    def _note(self, write: Callable[[], dict[str, Any]]) -> None:
        """Keep the scenario in step with what was added, as text; where it has no text, the model cannot be saved."""
        try:
            self.scenario = replace(self.scenario, **write())
        except InvalidInput as error:
            self._unsaved = str(error)

    def _replace(self, symbolic: SymbolicProgram) -> FluidModel:
        program = self._lower(symbolic)
        self.symbolic, self._program = symbolic, program
        return self

    def _lower(self, symbolic: SymbolicProgram) -> LinearProgram:
        """Arrays of the rows, and of the objective where that is linear."""
        return (lower if is_linear(symbolic) else lower_rows)(symbolic, self.numbers())

    def numbers(self) -> Numbers:
        """Labels and parameter values, in the names of `symbolic`."""
        workload, modes = self.workload, self.modes
        values: dict[str, Any] = {
            "lambda": workload.arrival_rate,
            "theta": workload.abandonment_rate,
            "P": workload.prompt_tokens,
            "D": workload.output_tokens,
            "C": np.array([mode.chunk for _, mode in modes], dtype=float),
            "b": np.array([mode.decode_slots for _, mode in modes], dtype=float),
            # An idle mode has no iteration; with chunk and slots 0, any time gives it rates of 0.
            "tau": np.array([mode.iteration_time or 1.0 for _, mode in modes]),
            "share": np.array([gpu.share for gpu in self.gpu_types]),
            "member": np.array([[float(of is gpu) for of, _ in modes] for gpu in self.gpu_types]),
            "c_p": np.float64(self.scenario.prices.prompt),
            "c_d": np.float64(self.scenario.prices.output),
        }
        return Numbers(self.labels, values | self._level_values)

    def program(self) -> LinearProgram:
        """The model as sparse arrays."""
        if self._program is None:
            self._program = self._lower(self.symbolic)
        return self._program

    def solve(self, solver: str = "auto", *, options: SolverOptions | None = None) -> Plan:
        """Compute the optimal plan, with its certificate.

        Args:
            solver: ``"knapsack"`` (the structured solver, exact and fastest, where nothing was added to the model),
                ``"highs"``, ``"cvxpy"``, or ``"auto"``: the structured one where it applies, else HiGHS. The plan says
                which was used.
            options: limits and tolerance.

        Raises:
            InfeasibleModel: no plan satisfies all rows; the message names those that conflict.
            SolverFailure: no answer that passes its certificate.
        """
        from fluidopt.plan import Plan

        work = self.copy()
        for _ in range(MOST_CUTS):
            program = work.program()
            try:
                solution = work._solve(program, solver, options)
            except InfeasibleModel as error:
                raise explain(self, error, program) from None
            cuts, solution = work._cuts(program, solution)
            if not cuts:
                return Plan.from_solution(self.copy(), getattr(solution, "program", program), solution)
            work._replace(replace(work.symbolic, constraints=(*work.symbolic.constraints, *cuts)))
        raise SolverFailure(f"the convex penalties were not met to tolerance in {MOST_CUTS} rounds of tangents")

    def _solve(self, program: LinearProgram, solver: str, options: SolverOptions | None) -> Solution:
        """Pick the solver: the structured one where it is exact, else HiGHS."""
        options = checked(options)
        if not is_linear(self.symbolic):
            if solver not in ("auto", "cvxpy"):
                raise InvalidInput(f"solver {solver!r} needs a linear objective; use 'auto' or 'cvxpy'")
            return solve_concave(self.symbolic, self.numbers(), options)
        if solver == "knapsack" or (solver == "auto" and options.method == "auto"):
            reason = why_not(self)
            tolerance = options.tolerance or 1e-7
            if reason is None:
                solution = solve_structured(self, program)
                # With service levels a plan that prefills only to throw away may be better: then its certificate fails.
                if solver == "knapsack" or self.is_standard or solution.certificate.holds(tolerance):
                    return held(solution, tolerance)
            elif solver == "knapsack":
                raise InvalidInput(f"solver 'knapsack' does not apply: {reason}; use 'auto' or 'highs'")
        return solve_program(program, solver, options)

    def _cuts(self, program: LinearProgram, solution: Solution) -> tuple[list[RowFamily], Solution]:
        """Tangents that cut off the present values, where a convex penalty is still short of its true amount.

        Where every penalty is exact to ``CUT_TOLERANCE`` of the objective there are none, and the solution is returned
        with each penalty at its true amount, certified anew: tangents lie below the penalty, so the dual bound holds.
        """
        values, cuts = solution.values.copy(), []
        there = {family.name for family in self.symbolic.constraints}
        for added in self._additions:
            if added.cut is None:
                continue
            block = next(block for block in program.columns if block.name == added.variables[0].name)
            at = int(block.numbers)
            row, exact, present = added.cut(program.column_grids(values))
            price = -program.objective[at]
            short = price * (exact - present) > CUT_TOLERANCE * (1e-300 + abs(solution.certificate.objective))
            # A tangent that is there already cannot be met any closer: what is short is the solver's rounding.
            if short and row.name not in there:
                cuts.append(row)
            values[at] = max(exact, present)
        if cuts or np.array_equal(values, solution.values):
            return cuts, solution
        if not is_linear(self.symbolic):
            raise InvalidInput("a convex penalty and a concave objective do not go together; use a hard bound")
        return [], replace(solution, values=values, certificate=certify(program, values, solution.duals))

    def with_tangents(self, names: Sequence[str]) -> FluidModel:
        """A copy with the tangents of convex penalties that a solved program had, by the names of their rows."""
        work, rows = self.copy(), []
        for name in names:
            of, _, place = name.rpartition("_at_")
            added = next(
                (each for each in self._additions if each.cut and each.variables[0].name == f"excess_{of}"), None
            )
            if added is None or added.cut is None:
                raise InvalidInput(f"not a saved plan of this model: it has no convex penalty {of!r}")
            at = {"phi": np.array([float(place)]), added.variables[0].name: np.zeros(())}
            rows.append(added.cut(at)[0])
        return work._replace(replace(work.symbolic, constraints=(*work.symbolic.constraints, *rows))) if rows else work

    def copy(self) -> FluidModel:
        """A model with the same rows that later changes to this one do not touch."""
        twin = object.__new__(FluidModel)
        twin.__dict__.update(self.__dict__)
        return twin

    def to_dict(self) -> dict[str, Any]:
        """The model's inputs as JSON-able data; `FluidModel.from_dict` reads it back."""
        if self._unsaved is not None:
            raise InvalidInput(
                f"this model has no JSON form, because something added to it has no text: {self._unsaved}"
            )
        return self.scenario.to_dict()

    @classmethod
    def from_dict(cls, data: object) -> FluidModel:
        """Build a model from what `to_dict` returned."""
        return cls.from_scenario(Scenario.from_dict(data))

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FluidModel):
            return NotImplemented
        return self.scenario == other.scenario and self.symbolic == other.symbolic

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        extra = len(self.symbolic.constraints) - len(formulation(self.scenario.charging).constraints)
        rows = f", {extra} added row families" if extra else ""
        return (
            f"FluidModel({len(self.workload)} classes, {len(self.modes)} modes, "
            f"{self.scenario.charging} charging{rows})"
        )

    def _repr_latex_(self) -> str:
        return self.symbolic._repr_latex_()

    def _repr_html_(self) -> str:
        from fluidopt.mathml import formula_rows, symbol_rows

        units = {"arrival_rate": "requests/s per GPU", "prompt_tokens": "tokens, mean"}
        units |= {"output_tokens": "decode iterations, mean", "abandonment_rate": "1/s"}
        modes = [mode for _, mode in self.modes]
        return card(
            f"Fluid model, {self.scenario.charging} charging",
            figures(
                ("Classes", len(self.workload), ""),
                ("Modes", len(modes), ""),
                ("GPU types", len(self.gpu_types), ""),
                ("Prompt price", self.scenario.prices.prompt, "money/token"),
                ("Output price", self.scenario.prices.output, "money/token"),
            ),
            formulas(formula_rows(self.symbolic)),
            more("Symbols", formulas(symbol_rows(self.symbolic))),
            html(self.workload.to_frame(), title="Classes", units=units),
            html(mode_table(modes, self.labels[MODES.name]), title="Modes", units=MODE_UNITS),
        )


def _row_text(row: RowFamily, meaning: str, symbols: Symbols) -> Row:
    """An added family of rows as a scenario file writes it."""
    relation = {"<=": sympy.Le, ">=": sympy.Ge, "==": sympy.Eq}[row.sense](row.left, row.right, evaluate=False)
    where = None if row.where == sympy.true else write_condition(row.where, symbols)
    return Row(name=row.name, row=write_relation(relation, symbols), where=where, meaning=meaning)
