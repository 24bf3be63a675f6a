"""This module owns the regression under a fit: weighted least squares with slopes of at least 0, and its kinks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fluidopt.curves import Array

MOST_KINKS = 4
"""Kinks of one line at most, over chunk and decodes together."""
MOST_LEVELS = 24
"""Levels of one axis at most that kinks are tried at, and that are left out to compare forms."""
Kinks = Mapping[str, tuple[float, ...]]
"""Where a line bends, by axis ("chunk", "decodes")."""
NO_KINKS: Kinks = {"chunk": (), "decodes": ()}


@dataclass(frozen=True, eq=False)
class Measurements:
    """Measured iteration times as arrays, (N,), and the weight of each residual."""

    chunk: Array
    decodes: Array
    kv_tokens: Array
    seconds: Array
    weight: Array

    def where(self, mask: NDArray[np.bool_]) -> Measurements:
        """Those measurements of which ``mask`` (N,) is true."""
        return Measurements(
            self.chunk[mask], self.decodes[mask], self.kv_tokens[mask], self.seconds[mask], self.weight[mask]
        )

    @property
    def alone(self) -> Measurements:
        """The decode-only ones."""
        return self.where(self.chunk == 0)

    @property
    def beside(self) -> Measurements:
        """Those with a prefill chunk."""
        return self.where(self.chunk > 0)

    def __len__(self) -> int:
        return self.seconds.size


@dataclass(frozen=True)
class Coefficient:
    """One fitted number."""

    name: str
    value: float
    standard_error: float | None
    """As if residuals were independent; none where the number lies at its bound 0, or nothing is left to tell."""
    unit: str


@dataclass(frozen=True, eq=False)
class Column:
    """One column of a regression, whose coefficient is named after it."""

    name: str
    values: Array
    unit: str

    @property
    def term(self) -> str:
        """The term that a piece of a piecewise linear one belongs to."""
        return self.name.split(" above ")[0]


def piece(term: str, above: float) -> str:
    """The name of a term's slope from a kink on."""
    return f"{term} above {above:g}"


def pieces(term: str, values: Array, kinks: Sequence[float], unit: str) -> list[Column]:
    """A piecewise linear term: one column per piece, whose coefficient is the slope there."""
    return [
        Column(piece(term, low) if low else term, np.clip(values - low, 0.0, high - low), unit)
        for low, high in pairwise([0.0, *kinks, np.inf])
    ]


def regress(columns: Sequence[Column], measured: Measurements) -> tuple[Coefficient, ...]:
    """Weighted least squares with coefficients of at least 0, and the standard errors of those above it.

    The errors are those of ordinary least squares on the coefficients above 0: s^2 (X' W^2 X)^-1.
    """
    from scipy.optimize import nnls

    design = np.column_stack([column.values for column in columns]) * measured.weight[:, None]
    scale = np.linalg.norm(design, axis=0)
    target = measured.seconds * measured.weight
    scaled, residual = nnls(design / scale, target)
    scaled[scaled < 1e-12 * np.linalg.norm(target)] = 0.0  # rounding
    free = scaled > 0
    errors: list[float | None] = [None] * len(columns)
    if (spare := len(measured) - int(free.sum())) > 0:
        part = (design / scale)[:, free]
        spread = np.sqrt(np.diag(np.linalg.inv(part.T @ part)) * residual**2 / spare) / scale[free]
        for at, error in zip(np.flatnonzero(free), spread, strict=True):
            errors[at] = float(error)
    return tuple(
        Coefficient(column.name, float(value), error, column.unit)
        for column, value, error in zip(columns, scaled / scale, errors, strict=True)
    )


def determined(columns: Iterable[Column], weight: Array) -> list[Column]:
    """The columns, in their order, that are no combination of those before them."""
    kept: list[Column] = []
    basis = np.empty((weight.size, 0))
    for column in columns:
        part = column.values * weight
        size = float(np.linalg.norm(part))
        for _ in range(2):  # twice, so that rounding leaves nothing of the earlier columns
            part = part - basis @ (basis.T @ part)
        rest = float(np.linalg.norm(part))
        if rest > 1e-8 * size:
            kept.append(column)
            basis = np.column_stack([basis, part / rest])
    return kept


def chosen_kinks(columns: Callable[[Kinks], list[Column]], measured: Measurements, axes: Sequence[str]) -> Kinks:
    """Where a line bends, by forward selection among the measured levels while that lowers BIC.

    BIC is N log(RSS/N) + p log N with the weighted residuals. A level can carry a kink if there are measured levels on
    both sides of it.
    """
    chosen, best = NO_KINKS, _bic(columns(NO_KINKS), measured)
    for _ in range(MOST_KINKS):
        tried = [
            chosen | {axis: tuple(sorted((*chosen[axis], float(level))))}  # type: ignore[operator]
            for axis in axes
            for level in inner_levels(getattr(measured, axis))
            if level not in chosen[axis]
        ]
        scores = [_bic(columns(at), measured) for at in tried]
        if not tried or min(scores) >= best:
            break
        best = min(scores)
        chosen = tried[scores.index(best)]
    return chosen


def inner_levels(values: Array) -> Array:
    """The distinct values above 0 that lie between others; of very many, as in a log of iterations, some among them."""
    levels = np.asarray(np.unique(values[values > 0])[1:-1])
    if levels.size > MOST_LEVELS:
        levels = np.asarray(levels[np.linspace(0, levels.size - 1, MOST_LEVELS).round().astype(int)])
    return levels


def _bic(columns: Sequence[Column], measured: Measurements) -> float:
    """BIC of least squares with coefficients of at least 0; inf where the columns are not determined."""
    from scipy.optimize import nnls

    count = len(measured)
    if count <= len(columns) + 1:
        return np.inf
    design = np.column_stack([*(column.values for column in columns), measured.seconds]) * measured.weight[:, None]
    scale = np.linalg.norm(design, axis=0)
    if not scale.all():
        return np.inf
    design /= scale
    products = design.T @ design
    products[-1, -1] += 1e-14  # below rounding nothing is left to explain
    try:  # the triangle of a Cholesky decomposition says all about the misfit, and is small
        triangle = np.linalg.cholesky(products, upper=True)
    except np.linalg.LinAlgError:
        return np.inf
    if np.diag(triangle)[:-1].min() < 1e-6:
        return np.inf
    _, residual = nnls(triangle[:, :-1], triangle[:, -1])
    return count * float(np.log((residual * scale[-1]) ** 2 / count)) + len(columns) * float(np.log(count))
