"""Linear programs as sparse arrays, and how templates are lowered to them.

``max objective @ x`` subject to ``row_lower <= matrix @ x <= row_upper`` and ``x >= 0``. Each step keeps the map back
to the user's names. Nothing here knows about LLMs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray
from scipy import sparse
from sympy import Expr, Indexed, Integer, Symbol

from fluidopt.algebra import IndexSet, Parameter, RowFamily, SymbolicProgram, base_of, indices_of, primed, unprimed
from fluidopt.errors import InvalidInput

Array = NDArray[np.float64]
LARGEST = 1e100
"""Coefficients, costs and right sides of a model beyond this are refused."""
_SIZES = f"keep sizes below {LARGEST:g}: check divisions by 0, powers and units"


@dataclass(frozen=True)
class Block:
    """A family of rows or columns inside a program: the numbers of its members on the full grid of its sets."""

    name: str
    labels: tuple[tuple[str, ...], ...]
    numbers: NDArray[np.int64]
    """Row or column number of each member, shape of the grid; -1 where the member does not exist."""

    def names(self) -> list[str]:
        """``name[label, ...]`` of the members that exist, in order of their numbers."""
        if not self.labels:
            return [self.name] if self.numbers >= 0 else []
        return [
            f"{self.name}[{', '.join(labels[at] for labels, at in zip(self.labels, place, strict=True))}]"
            for place in np.argwhere(self.numbers >= 0)
        ]

    def labels_at(self, over: Sequence[IndexSet], place: Iterable[int]) -> dict[str, str]:
        """The label of one member in each of its index sets, by the set's name."""
        return {index.name: labels[at] for index, labels, at in zip(over, self.labels, place, strict=True)}

    def grid(self, values: Array) -> Array:
        """Spread a vector over all rows or columns back onto the grid; NaN where the member does not exist."""
        return np.where(self.numbers >= 0, values[self.numbers] + 0.0, np.nan)


@dataclass(frozen=True)
class LinearProgram:
    """A linear program to be maximised, over nonnegative columns, with the names of its rows and columns."""

    objective: Array
    """Shape (columns,)."""
    matrix: sparse.csc_array
    """Shape (rows, columns)."""
    row_lower: Array
    """Shape (rows,); -inf where there is none."""
    row_upper: Array
    """Shape (rows,); inf where there is none."""
    rows: tuple[Block, ...]
    columns: tuple[Block, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return len(self.row_lower), len(self.objective)

    @cached_property
    def column_bounds(self) -> Array:
        """An upper bound on every column that the rows imply, shape (columns,); inf where none was found."""
        return self._propagated(np.full(self.shape[1], np.inf))

    def bounds_above(self, objective: float) -> Array:
        """Upper bounds on the columns of every point that is worth at least ``objective``, shape (columns,).

        A column that costs c < 0 per unit is at most what all others can earn beyond ``objective``, over -c.
        """
        bounds = self.column_bounds
        costly = self.objective < 0
        gain = float(np.where(self.objective > 0, self.objective * bounds, 0.0).sum())
        if not (np.isinf(bounds).any() and costly.any() and np.isfinite(gain)):
            return bounds
        most = np.full_like(bounds, np.inf)
        most[costly] = max(gain - objective, 0.0) / -self.objective[costly]
        return self._propagated(np.minimum(bounds, most))

    def _propagated(self, bounds: Array) -> Array:
        """Three rounds: a row ``sum a x <= b`` bounds each x with a > 0, given bounds on those with a < 0."""
        entries = sparse.coo_array(self.matrix)
        row, column = entries.coords
        sides = [(entries.data, self.row_upper), (-entries.data, -self.row_lower)]
        for _ in range(3):
            for value, side in sides:
                against = np.zeros(len(value))
                against[value < 0] = -value[value < 0] * bounds[column[value < 0]]
                room = side + np.bincount(row, weights=against, minlength=self.shape[0])
                limits = value > 0
                np.minimum.at(bounds, column[limits], np.maximum(room[row[limits]], 0.0) / value[limits])
        return bounds

    @cached_property
    def row_names(self) -> list[str]:
        """``family[label, ...]`` of every row."""
        return [name for block in self.rows for name in block.names()]

    @cached_property
    def column_names(self) -> list[str]:
        """``variable[label, ...]`` of every column."""
        return [name for block in self.columns for name in block.names()]

    def row_grids(self, values: Array) -> dict[str, Array]:
        """A vector over rows as one array per family, on the grid of its index sets."""
        return {block.name: block.grid(values) for block in self.rows}

    def column_grids(self, values: Array) -> dict[str, Array]:
        """A vector over columns as one array per variable, on the grid of its index sets."""
        return {block.name: block.grid(values) for block in self.columns}


@dataclass(frozen=True)
class Numbers:
    """What a symbolic program needs to become arrays: labels of the sets, values of the given parameters."""

    labels: Mapping[str, tuple[str, ...]]
    values: Mapping[str, Array]


def lower(program: SymbolicProgram, numbers: Numbers) -> LinearProgram:
    """Lower templates to sparse rows: each coefficient is compiled once and evaluated on whole arrays.

    Raises:
        InvalidInput: where a row is not linear, uses a variable that the model does not determine, or holds a number
            that is not finite or beyond 1e100 in size.
    """
    made = Lowering(program, numbers).run()
    _check_sizes(made)
    return made


class Lowering:
    """A symbolic program on its way to arrays; kept where parameters change and only some arrays must follow."""

    def __init__(self, program: SymbolicProgram, numbers: Numbers) -> None:
        self.program = program
        self.numbers = numbers
        self.parameters: dict[Expr, Parameter] = {each.symbol: each for each in program.parameters}
        self.arrays: dict[Expr, Array] = {}
        self.columns: dict[Expr, Block] = {}

    def run(self) -> LinearProgram:
        """All arrays, from the present numbers."""
        start = 0
        for variable in self.program.variables:
            block = self.block(variable.name, variable.over, variable.exists, start)
            self.columns[variable.symbol] = block
            start += int((block.numbers >= 0).sum())
        entries: list[tuple[NDArray[np.int64], NDArray[np.int64], Array]] = []
        rows: list[Block] = []
        lower, upper = [], []
        count = 0
        for family in self.program.constraints:
            block = self.block(family.name, family.over, family.where, count)
            size = int((block.numbers >= 0).sum())
            self.family(family, block, entries)
            right = self.right_side(family, block)
            lower.append(np.full(size, -np.inf) if family.sense == "<=" else right)
            upper.append(np.full(size, np.inf) if family.sense == ">=" else right)
            rows.append(block)
            count += size
        row, column, value = (np.concatenate(parts) for parts in zip(*entries, strict=True))
        matrix = sparse.coo_array((value, (row, column)), shape=(count, start)).tocsc()
        matrix.eliminate_zeros()
        return LinearProgram(
            objective=self.objective(start),
            matrix=matrix,
            row_lower=np.concatenate(lower),
            row_upper=np.concatenate(upper),
            rows=tuple(rows),
            columns=tuple(self.columns.values()),
        )

    def change(self, values: Mapping[str, Array]) -> None:
        """Put new numbers in place of given parameters."""
        self.numbers = Numbers(self.numbers.labels, {**self.numbers.values, **values})
        for name in values:
            for base in self.dependents[name]:
                self.arrays.pop(base, None)

    @cached_property
    def dependents(self) -> dict[str, list[Expr]]:
        """The parameters that follow from each given one, itself among them."""
        behind = {symbol: self.given(symbol) for symbol in self.parameters}
        return {name: [symbol for symbol, names in behind.items() if name in names] for name in self.numbers.values}

    def given(self, *expressions: Expr) -> frozenset[str]:
        """Names of the given parameters that expressions depend on, through definitions."""
        found: set[str] = set()
        for expression in expressions:
            for symbol, parameter in self.parameters.items():
                if expression.has(symbol):
                    inner = parameter.definition
                    found |= {parameter.name} if inner is None else self.given(inner)
        return frozenset(found)

    def size(self, index: IndexSet) -> int:
        """Number of members of a set."""
        return len(self.numbers.labels[index.name])

    def index_of(self, symbol: Symbol) -> IndexSet:
        """The set that an index symbol runs over."""
        return self.program.index_of[unprimed(symbol)]

    def block(self, name: str, over: tuple[IndexSet, ...], where: sympy.Basic, start: int) -> Block:
        """Number the members of a family consecutively from ``start``."""
        shape = tuple(self.size(index) for index in over)
        mask = np.broadcast_to(self.evaluate(where, tuple(index.symbol for index in over)), shape).astype(bool)
        numbers = np.where(mask, start - 1 + np.cumsum(mask).reshape(shape), -1)
        return Block(name, tuple(self.numbers.labels[index.name] for index in over), numbers)

    def family(self, family: RowFamily, block: Block, entries: list[Any]) -> None:
        """Append the entries of one family: row numbers, column numbers, coefficients."""
        over = tuple(index.symbol for index in family.over)
        for term in self.program.terms(family.difference):
            if term.variable is None:
                continue
            axes = over + term.bound
            shape = tuple(self.size(self.index_of(symbol)) for symbol in axes)
            value = np.broadcast_to(self.evaluate(term.coefficient, axes), shape)
            row = np.broadcast_to(block.numbers.reshape(block.numbers.shape + (1,) * len(term.bound)), shape)
            column = np.broadcast_to(self.column(term.variable, axes), shape)
            used = (value != 0) & (row >= 0)
            self.refuse_undetermined(f"row {family.name!r}", term.variable, axes, used & (column < 0))
            used &= column >= 0
            entries.append((row[used], column[used], value[used]))

    def right_side(self, family: RowFamily, block: Block) -> Array:
        """What is left on the right side of each member with all variables on the left, in order of row numbers.

        Where parameters have a leading axis of many values, so has the result.
        """
        over = tuple(index.symbol for index in family.over)
        total = np.zeros(block.numbers.shape)
        for term in self.program.terms(family.difference):
            if term.variable is None:
                value = self.evaluate(term.coefficient, over + term.bound)
                if term.bound:
                    shape = tuple(self.size(self.index_of(symbol)) for symbol in over + term.bound)
                    value = _at_least(value, shape).sum(axis=tuple(range(-len(term.bound), 0)))
                total = total - value
        right: Array = total[..., block.numbers >= 0]
        return right

    def objective(self, columns: int) -> Array:
        """Coefficients of the objective, shape (columns,), with a leading axis where parameters have one."""
        total = np.zeros(columns)
        for term in self.program.terms(self.program.objective):
            if term.variable is None:
                raise InvalidInput(f"maximize: the constant {term.coefficient} changes no decision; leave it out")
            shape = tuple(self.size(self.index_of(symbol)) for symbol in term.bound)
            value = _at_least(self.evaluate(term.coefficient, term.bound), shape)
            column = np.broadcast_to(self.column(term.variable, term.bound), shape)
            lead = tuple(range(value.ndim - len(shape)))
            missing = (value != 0).any(axis=lead) & (column < 0)
            self.refuse_undetermined("the objective", term.variable, term.bound, missing)
            used = column >= 0
            part = np.zeros((*value.shape[: len(lead)], columns))
            np.add.at(part, (..., column[used]), value[..., used])  # type: ignore[arg-type]
            total = total + part
        return total

    def column(self, member: Expr, axes: tuple[Symbol, ...]) -> NDArray[np.int64]:
        """Column numbers of a variable, as an array that broadcasts over ``axes``."""
        return _spread(self.columns[base_of(member)].numbers, indices_of(member), axes)

    def refuse_undetermined(
        self, user: str, member: Expr, axes: tuple[Symbol, ...], missing: NDArray[np.bool_]
    ) -> None:
        """Raise where a term with a non-zero coefficient uses a member that has no value in the model."""
        variable = self.program.variable_of(member)
        if variable.absent is None or not missing.any():
            return
        place = np.argwhere(missing)[0]
        labels = [
            self.numbers.labels[each.name][int(index) if isinstance(index, Integer) else place[axes.index(index)]]
            for each, index in zip(variable.over, indices_of(member), strict=True)
        ]
        raise InvalidInput(
            f"{user} uses {variable.name}[{', '.join(labels)}], which the model does not determine: {variable.absent}"
        )

    def values(self, base: Expr) -> Array:
        """The numbers of a parameter, from the caller or from its definition."""
        if base not in self.arrays:
            parameter = self.parameters.get(base)
            if parameter is None:
                raise InvalidInput(f"{base} is not a symbol of this model; it has {self.known()}")
            if parameter.definition is None:
                self.arrays[base] = np.asarray(self.numbers.values[parameter.name], dtype=float)
            else:
                axes = tuple(index.symbol for index in parameter.over)
                shape = tuple(self.size(index) for index in parameter.over)
                self.arrays[base] = _at_least(self.evaluate(parameter.definition, axes), shape)
        return self.arrays[base]

    def known(self) -> str:
        """The names a row may use."""
        names = [variable.name for variable in self.program.variables]
        return ", ".join(names + [parameter.name for parameter in self.program.parameters])

    def evaluate(self, expression: sympy.Basic, axes: tuple[Symbol, ...]) -> Any:
        """Evaluate a coefficient or condition in parameters, as an array that broadcasts over ``axes``."""
        function, arguments = compiled(expression)
        # A template is evaluated for all members at once, also for those whose row or column does not exist.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return function(*(self.argument(argument, axes) for argument in arguments))

    def argument(self, argument: Expr, axes: tuple[Symbol, ...]) -> Any:
        """The numbers of one argument of a compiled expression, as an array that broadcasts over ``axes``."""
        if isinstance(argument, Indexed):
            if argument.base in self.columns:
                raise InvalidInput(f"{argument} is a variable where a number is needed")
            return _spread(self.values(argument.base), argument.indices, axes)
        if isinstance(argument, sympy.Sum):
            function, inner = argument.function, tuple[Symbol, ...]()
            for symbol, *_ in argument.limits:
                fresh = primed(symbol, axes + inner)
                function, inner = function.xreplace({symbol: fresh}), (*inner, fresh)
            shape = tuple(self.size(self.index_of(symbol)) for symbol in axes + inner)
            value = _at_least(self.evaluate(function, axes + inner), shape)
            return value.sum(axis=tuple(range(-len(inner), 0)))
        size = next((index for index in self.program.index_sets if index.size == argument), None)
        return float(self.size(size)) if size is not None else _spread(self.values(argument), (), axes)


def _check_sizes(program: LinearProgram) -> None:
    """Refuse a number that is not finite, or so large that no solver can bring it near 1.

    Raises:
        InvalidInput: naming the row, or the variable in the objective.
    """
    sides = np.where(np.isfinite(program.row_lower), program.row_lower, program.row_upper)
    for values, rows in ((program.matrix.data, program.matrix.indices), (sides, np.arange(sides.size))):
        bad = ~(np.abs(values) <= LARGEST)  # so that NaN is bad too
        if bad.any():
            at = int(np.argmax(bad))
            raise InvalidInput(f"row {program.row_names[rows[at]]} holds the number {values[at]:g}; {_SIZES}")
    bad = ~(np.abs(program.objective) <= LARGEST)
    if bad.any():
        at = int(np.argmax(bad))
        name, value = program.column_names[at], program.objective[at]
        raise InvalidInput(f"the objective multiplies {name} by {value:g}; {_SIZES}")


def _spread(values: NDArray[Any], indices: tuple[Expr, ...], axes: tuple[Symbol, ...]) -> NDArray[Any]:
    """Arrange an array's last dimensions, named by ``indices``, along ``axes`` (a fixed member is picked out)."""
    if indices == axes:
        return values
    picked = values[(..., *(int(index) if isinstance(index, Integer) else slice(None) for index in indices))]
    names = [index for index in indices if not isinstance(index, Integer)]
    if len(set(names)) < len(names):
        raise InvalidInput(f"the same index stands twice in {list(map(str, indices))}; use two different ones")
    unknown = [str(name) for name in names if name not in axes]
    if unknown:
        raise InvalidInput(f"index {unknown[0]} is neither an index of the row nor summed over")
    lead = picked.ndim - len(names)
    order = sorted(range(len(names)), key=lambda at: axes.index(names[at]))
    shape = [1] * len(axes)
    for at, name in enumerate(names):
        shape[axes.index(name)] = picked.shape[lead + at]
    return picked.transpose((*range(lead), *(lead + at for at in order))).reshape((*picked.shape[:lead], *shape))


def _at_least(value: Any, shape: tuple[int, ...]) -> Array:
    """Broadcast to ``shape``, keeping leading axes beyond it."""
    value = np.asarray(value, dtype=float)
    return np.broadcast_to(value, np.broadcast_shapes(value.shape, shape))


@lru_cache(maxsize=1024)
def compiled(expression: sympy.Basic) -> tuple[Callable[..., Any], tuple[Expr, ...]]:
    """Compile an expression to a numpy function of its parameters (members of families, sums, scalars)."""
    expression = sympy.sympify(expression)
    sums = expression.atoms(sympy.Sum)
    outer = {each for each in sums if not any(each in other.atoms(sympy.Sum) - {other} for other in sums)}
    swap: dict[Expr, Symbol] = {each: Symbol(f"_s{at}") for at, each in enumerate(sorted(outer, key=str))}
    rest = expression.xreplace(swap)
    members = sorted(rest.atoms(Indexed), key=str)
    swap |= {each: Symbol(f"_m{at}") for at, each in enumerate(members)}
    rest = rest.xreplace(swap)
    scalars = sorted(rest.free_symbols - set(swap.values()), key=str)
    swap |= {each: Symbol(f"_c{at}") for at, each in enumerate(scalars)}
    arguments = tuple(swap)
    return sympy.lambdify([swap[each] for each in arguments], rest.xreplace(swap), "numpy"), arguments
