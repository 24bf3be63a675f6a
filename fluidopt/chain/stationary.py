"""Stationary laws of a finite irreducible chain by two independent methods, each checked before it is returned.

Direct: sparse LU with minimum-degree ordering of the balance equations, one state's probability pinned. The state must
be a likely one: pinned at an unlikely one (state 0 of a birth-death chain that lives at 10,000) the solution overflows.
It is found by walking the chain and confirmed by the solution. Fill grows fast with the dimension of the state space.

Iterative: BiCGStab on the singular balance equations, preconditioned by an incomplete LU factorisation with no fill,
restarted on its own residual, then Gauss-Seidel sweeps, which keep a law nonnegative. Memory is a fixed multiple of the
generator's.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import splu

from fluidopt.chain.incomplete import bicgstab, diagonal_places, incomplete_lu
from fluidopt.chain.packing import compiled
from fluidopt.errors import InvalidInput, SolverFailure
from fluidopt.simulation.system import FloatArray

Method = Literal["auto", "direct", "iterative"]

DIRECT_STATES = 500
"""Largest chain that "auto" solves directly whatever its structure: above, fill makes the iterative method faster."""

PLANAR_ENTRIES = 7
"""Entries per state below which "auto" takes a chain for one in the plane (one class), where LU has little fill and
the iterative method needs many steps."""

DIRECT_LIMIT = 300_000
"""Largest chain that is solved directly at all: fill can pass any memory."""

RESIDUAL = 1e-12
"""Largest sum of |pi Q| relative to the flow sum of pi |diag Q| with which a law is returned."""

LIKELY = 1e-6
"""A pinned state is at least this likely, relative to the likeliest."""


def stationary_law(generator: sparse.csr_array, *, method: Method = "auto") -> FloatArray:
    """The law pi with pi Q = 0 and sum 1, (S,), of an irreducible generator Q, (S, S) in CSR.

    Raises:
        InvalidInput: unknown method, or the chain is reducible.
        SolverFailure: the law does not pass its check.
    """
    if method not in get_args(Method):
        raise InvalidInput(f"stationary_law: method must be one of {', '.join(get_args(Method))}; got {method!r}")
    size = generator.shape[0]
    if size == 1:
        return np.ones(1)
    parts, _ = csgraph.connected_components(generator, directed=True, connection="strong")
    if parts != 1:
        raise InvalidInput(
            f"stationary_law: the chain must be irreducible; it falls into {parts} parts (a class that arrives but "
            "can neither be served nor give up?)"
        )
    planar = size <= DIRECT_LIMIT and generator.nnz < PLANAR_ENTRIES * size
    direct = method == "direct" or (method == "auto" and (size <= DIRECT_STATES or planar))
    law = _direct(generator) if direct else _iterative(generator)
    return certified(generator, law)


def relative_residual(generator: sparse.csr_array, law: FloatArray) -> float:
    """Sum of |pi Q| over the flow sum of pi |diag Q|; 0 for a chain that never moves."""
    flow = float(law @ -generator.diagonal())
    return float(np.abs(generator.T @ law).sum()) / flow if flow > 0 else 0.0


def certified(generator: sparse.csr_array, law: FloatArray) -> FloatArray:
    """The law, if it is one.

    Raises:
        SolverFailure: it has negative or missing entries, does not sum to 1, or leaves a residual above `RESIDUAL`.
    """
    if not np.all(np.isfinite(law)) or law.min() < 0 or abs(law.sum() - 1) > 1e-12:
        raise SolverFailure("stationary_law: the solution is not a probability law; try the other method")
    residual = relative_residual(generator, law)
    if not residual <= RESIDUAL:
        raise SolverFailure(
            f"stationary_law: the relative residual must be at most {RESIDUAL:g}. Got {residual:.2g}; try the other "
            "method"
        )
    return law


# Direct ----------------------------------------------------------------------------------------------------------


def _direct(generator: sparse.csr_array) -> FloatArray:
    pinned = likely_state(generator)
    for _ in range(4):
        law = pinned_law(generator, pinned)
        if np.all(np.isfinite(law)):
            likeliest = int(np.argmax(law))
            if law[pinned] >= LIKELY * law[likeliest]:
                law = np.maximum(law, 0.0)
                return cast(FloatArray, law / law.sum())
            pinned = likeliest
        else:
            pinned = likely_state(generator, steps=20 * generator.shape[0])
    raise SolverFailure("stationary_law: no likely state to pin was found; use method='iterative'")


def pinned_law(generator: sparse.csr_array, pinned: int) -> FloatArray:
    """The law by sparse LU, one state's weight fixed in place of its balance equation.

    Not finite where that state is too unlikely. No pivoting: the rest is a column diagonally dominant M-matrix.
    """
    size = generator.shape[0]
    keep = np.delete(np.arange(size), pinned)
    balance = generator.T.tocsc()
    try:
        lu = splu(
            balance[keep][:, keep].tocsc(),
            permc_spec="MMD_AT_PLUS_A",
            diag_pivot_thresh=0.0,
            options={"SymmetricMode": True},
        )
    except RuntimeError:  # singular to working precision
        return np.full(size, np.nan)
    law = np.ones(size)
    with np.errstate(over="ignore", invalid="ignore"):
        law[keep] = lu.solve(-balance[keep][:, [pinned]].toarray().ravel())
        return cast(FloatArray, law / law.sum())


def likely_state(generator: sparse.csr_array, *, steps: int = 200_000) -> int:
    """The state in which a walk of the chain from state 0 spends most time in its second half.

    The draws only choose where to pin, and the solution says whether the choice was good, so their seed is fixed.
    """
    draws = np.random.default_rng(0).random(steps)
    spent = np.zeros(generator.shape[0])
    _wander(generator.indptr, generator.indices, generator.data, generator.diagonal(), draws, spent)
    return int(np.argmax(spent))


@compiled
def _wander(
    starts: npt.NDArray[Any],
    columns: npt.NDArray[Any],
    rates: FloatArray,
    diagonal: FloatArray,
    draws: FloatArray,
    spent: FloatArray,
) -> None:
    row = 0
    for step in range(draws.size):
        if 2 * step >= draws.size:
            spent[row] += 1.0 / -diagonal[row]
        u = draws[step] * -diagonal[row]
        to = row
        for k in range(starts[row], starts[row + 1]):
            if columns[k] != row:
                to = columns[k]
                u -= rates[k]
                if u < 0.0:
                    break
        row = to


# Iterative -------------------------------------------------------------------------------------------------------


def _iterative(generator: sparse.csr_array, *, rounds: int = 30, inner: int = 200) -> FloatArray:
    size = generator.shape[0]
    # A likely state comes last: the incomplete factors are singular in their last pivot only, and solving with them
    # amounts to pinning that state.
    order = np.arange(size)
    likely = likely_state(generator)
    order[likely:-1] = order[likely + 1 :].copy()
    order[-1] = likely
    balance = generator.T.tocsr()[order]
    balance = balance[:, order]
    balance.sort_indices()
    starts, columns = balance.indptr, balance.indices
    where = np.empty(size, dtype=starts.dtype)
    diagonal_places(starts, columns, where)
    factors = balance.data.copy()
    incomplete_lu(starts, columns, where, factors, np.full(size, -1, dtype=np.int64))
    law = np.full(size, 1.0 / size)
    _sweep(starts, columns, where, balance.data, law, 3)
    law /= law.sum()
    best, reached = law, np.inf
    diagonal = balance.data[where]
    for _ in range(rounds):
        residual = balance @ law
        step = bicgstab(balance, where, factors, -residual, relative=1e-8, most=inner)
        if np.all(np.isfinite(step)) and abs(total := float((law + step).sum())) > 1e-3:
            law = np.maximum((law + step) / total, 0.0)
        _sweep(starts, columns, where, balance.data, law, 2)
        law = law / law.sum()
        now = float(np.abs(balance @ law).sum() / (law @ -diagonal))
        stalled = now > 0.5 * reached
        if now < reached:
            best, reached = law, now
        if reached < 1e-2 * RESIDUAL or (reached < RESIDUAL and stalled):
            break
    ordered = np.empty(size)
    ordered[order] = best / best.sum()
    return ordered


@compiled
def _sweep(
    starts: npt.NDArray[Any],
    columns: npt.NDArray[Any],
    where: npt.NDArray[Any],
    entries: FloatArray,
    law: FloatArray,
    sweeps: int,
) -> None:
    """Gauss-Seidel on the balance equations, up and down in turn; a nonnegative law stays one."""
    size = law.size
    for sweep in range(sweeps):
        for step in range(size):
            row = step if sweep % 2 == 0 else size - 1 - step
            inflow = 0.0
            for k in range(starts[row], starts[row + 1]):
                if k != where[row]:
                    inflow += entries[k] * law[columns[k]]
            law[row] = inflow / -entries[where[row]]
