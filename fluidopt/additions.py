"""What service levels add to the fluid LP: rows, with priced excesses where a promise may be broken.

`fluidopt.service_levels` has the levels; here are the shapes that they share: a bound for all, one for each class, and
one on the spread between classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
from sympy import Expr, IndexedBase, Symbol

from fluidopt.algebra import IndexSet, Parameter, RowFamily, Variable
from fluidopt.errors import InvalidInput
from fluidopt.formulation import CLASSES, Symbols
from fluidopt.program import Array
from fluidopt.tables import shorten

if TYPE_CHECKING:
    from fluidopt.contention import GPU, Mode
    from fluidopt.workload import Workload


@dataclass(frozen=True)
class Context:
    """What a service level may look at: the classes, the modes with their GPU types, and the model's symbols."""

    workload: Workload
    modes: Sequence[tuple[GPU, Mode]]
    symbols: Symbols

    def chosen(self, classes: Sequence[str] | None, level: str) -> Array:
        """Shape (I,): 1 for the classes named (all where None is given).

        Raises:
            InvalidInput: a name that is not a class.
        """
        names = self.workload.names
        if classes is None:
            return np.ones(len(names))
        unknown = [name for name in classes if name not in names]
        if unknown:
            raise InvalidInput(
                f"{level}: there is no class {unknown[0]!r}; classes are {shorten([repr(name) for name in names])}"
            )
        return np.isin(np.array(names, dtype=object), list(classes)).astype(float)


@dataclass(frozen=True)
class Addition:
    """What a service level adds to the program."""

    rows: tuple[RowFamily, ...]
    variables: tuple[Variable, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    cost: Expr = sympy.S.Zero
    """Subtracted from the objective."""
    empties_decode_queue: bool = False
    """Whether the level is only meant with ``q_d = 0``."""
    cut: Callable[[Mapping[str, Array]], tuple[RowFamily, float, float]] | None = None
    """For a convex penalty (its variable the first of ``variables``): from the present values, the tangent there, the
    penalised amount as it should be and as it is."""


@dataclass(frozen=True)
class Soft:
    """One family of rows ``metric <= bound``, with a priced excess where the level has a penalty."""

    penalty: float | None
    name: str
    over: tuple[IndexSet, ...]
    unit: str

    def row(self, metric: Expr, right: Expr, meaning: str, where: Any = sympy.true) -> Addition:
        """The rows, for the members that meet ``where``."""
        row = RowFamily(
            self.name,
            metric,
            "<=",
            right,
            self.over,
            where=where,
            meaning=meaning,
            dual=f"dual_{self.name}",
            dual_unit=f"money/s per {self.unit}",
        )
        if self.penalty is None:
            return Addition((row,))
        label = f"excess_{self.name}"
        symbol = IndexedBase(label) if self.over else Symbol(label)
        excess = Variable(symbol, self.over, self.unit, f"above the bound of {self.name}", exists=where)
        total = excess.indexed
        for index in self.over:
            total = index.sum(total)
        return Addition(
            (replace(row, left=metric - excess.indexed),),
            variables=(excess,),
            cost=sympy.Float(self.penalty) * total,
        )


class PerClass:
    """A level with one bound for the classes it holds for."""

    def __init__(self, level: Any, name: str, context: Context, unit: str, meaning: str) -> None:
        self.level, self.name, self.unit, self.meaning = level, name, unit, meaning
        self.chosen = context.chosen(level.classes, name)
        i = context.symbols.i
        self._bound = Parameter(IndexedBase(f"bound_{name}"), (CLASSES,), unit, f"bound of {name}")
        self._holds = Parameter(IndexedBase(f"holds_{name}"), (CLASSES,), "1", f"1 for the classes of {name}")
        self.bound: Expr = self._bound.symbol[i]
        self.holds: Expr = self._holds.symbol[i]

    def row(self, metric: Expr, right: Expr, bound: Any, *, empties_decode_queue: bool = False) -> Addition:
        """The rows ``metric <= right``; ``bound`` is the number, or numbers by class, of the symbol in ``right``."""
        soft = Soft(self.level.penalty, self.name, (CLASSES,), "unit of the row")
        added = soft.row(metric, right, self.meaning, where=self.holds > 0)
        return replace(
            added,
            parameters=(self._bound, self._holds),
            values={
                self._bound.name: np.broadcast_to(np.asarray(bound, dtype=float), self.chosen.shape),
                self._holds.name: self.chosen,
            },
            empties_decode_queue=empties_decode_queue,
        )


def spread_rows(level: Any, name: str, context: Context, metric: Expr, what: str) -> Addition:
    """max_i metric_i - min_i metric_i <= bound, with the two extremes as variables."""
    i = context.symbols.i
    holds = Parameter(IndexedBase(f"holds_{name}"), (CLASSES,), "1", f"1 for the classes of {name}")
    bound = Parameter(Symbol(f"bound_{name}"), (), "requests/GPU", f"bound of {name}")
    most, least = (
        Variable(Symbol(f"{end}_{name}"), (), "requests/GPU", f"{end} {what} of a class") for end in ("most", "least")
    )
    meaning = f"{what} differ by at most {level.at_most:g} per GPU between classes"
    sides = tuple(
        RowFamily(
            f"{name}_{end}",
            metric,
            sense,  # type: ignore[arg-type]
            variable.symbol,
            (CLASSES,),
            where=holds.symbol[i] > 0,
            meaning=f"{{class}} has the {end} {what}",
            dual=f"dual_{name}_{end}",
            dual_unit="money/s per request in service",
        )
        for end, sense, variable in (("most", "<=", most), ("least", ">=", least))
    )
    spread = Soft(level.penalty, name, (), "requests/GPU").row(most.symbol - least.symbol, bound.symbol, meaning)
    return replace(
        spread,
        rows=(*sides, *spread.rows),
        variables=(most, least, *spread.variables),
        parameters=(holds, bound),
        values={holds.name: context.chosen(level.classes, name), bound.name: np.float64(level.at_most)},
        empties_decode_queue=True,
    )
