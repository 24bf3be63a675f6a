"""Why a model has no plan, in the words of the model: rows that conflict, and how little would have to give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.additions import Context
from fluidopt.algebra import SymbolicProgram
from fluidopt.errors import InfeasibleModel, InvalidInput, SolverFailure
from fluidopt.program import LinearProgram, Numbers, lower
from fluidopt.service_levels import names_of
from fluidopt.solvers import solve_program
from fluidopt.solvers.infeasible import Conflict, conflict
from fluidopt.tables import shorten

if TYPE_CHECKING:
    from fluidopt.model import FluidModel

# A service level is relaxed by bisection, some 60 small programs; for larger ones, and for more levels, the conflict is
# all that is said.
RELAXED_ROWS, RELAXED_LEVELS = 2_000, 20


def explain(model: FluidModel, error: InfeasibleModel, program: LinearProgram) -> InfeasibleModel:
    """The error to raise for an infeasible or unbounded ``program`` of ``model``."""
    if error.kind == "unbounded":
        return InfeasibleModel("the objective grows without limit; bound it with subject_to", kind="unbounded")
    found = conflict(program)
    parts = [
        "no plan satisfies all rows",
        _patient_load(model, found.rows),
        *_relaxations(model, found),
        in_words(model.symbolic, program, found),
    ]
    return InfeasibleModel(". ".join(part for part in parts if part) + ".", rows=found.rows)


def in_words(symbolic: SymbolicProgram, program: LinearProgram, found: Conflict) -> str:
    """The conflicting rows: those that say something about this model as sentences, all by name."""
    structural = {"fleet", "prefill_slots", "decode_balance"}
    sentences = []
    rows = {row.name: row for row in symbolic.constraints}
    for block in program.rows:
        names = block.names()
        places = np.argwhere(block.numbers >= 0)
        for name, place in zip(names, places, strict=True):
            if name in found.rows and block.name not in structural:
                sentences.append(rows[block.name].sentence(block.labels_at(rows[block.name].over, place)))
    kind = "Each of these can hold without one of the others, but not all" if found.irreducible else "Not all of these"
    text = f"{kind}: {shorten(sentences, most=6, between='; ')}" if sentences else ""
    names_text = f" (rows {shorten(found.rows, most=10)})"
    if found.violated:
        misses = [
            f"{name} by {abs(amount):.4g} ({'too low' if amount > 0 else 'too high'} on the left)"
            for name, amount in found.violated.items()
        ]
        return f"{text or 'These rows conflict'}{names_text}. The nearest point misses {shorten(misses)}"
    return (text or "These rows conflict") + names_text


def _patient_load(model: FluidModel, rows: Sequence[str]) -> str:
    """What classes that never abandon ask of a mixed/solo fleet, against what it has, where that is in ``rows``."""
    workload, pair = model.workload, [mode for _, mode in model.modes]
    patient = np.array([each.abandonment_rate == 0 and f"prefill_balance[{each.name}]" in rows for each in workload])
    if not patient.any() or len(pair) != 2 or not pair[0].prefills or pair[1].prefills:
        return ""
    mixed, solo = pair
    kappa = mixed.iteration_time / solo.iteration_time if mixed.iteration_time and solo.iteration_time else np.nan
    work = np.where(patient, workload.arrival_rate * workload.prompt_tokens / mixed.prefill_speed, 0.0)
    decode = work * mixed.chunk * workload.output_tokens / workload.prompt_tokens
    load = float(work.sum())
    room = kappa * solo.decode_slots - (kappa * solo.decode_slots - mixed.decode_slots) * load
    shares = [
        f"{name} {p:.3g} + {d:.3g}"
        for name, p, d, each in zip(workload.names, work, decode, patient, strict=True)
        if each
    ]
    slots = f"{decode.sum():.4g} of {room:.4g} decode slots" if load <= 1 else f"{decode.sum():.4g} decode slots"
    advice = "Add GPUs (lower the arrival rates per GPU) or give a class an abandonment rate"
    if load > 2:
        advice += "; arrival rates here are per GPU: Workload.per_gpu(n) divides those of a whole stream"
    return (
        f"Classes that never abandon must be served in full: they need {load:.4g} of 1 prefill slot and {slots} "
        f"per GPU (prefill + decode by class: {shorten(shares, between='; ')}). {advice}"
    )


def _relaxations(model: FluidModel, between: Conflict) -> list[str]:
    """For each hard service level in a conflict, the least it would have to give for a plan to exist, all else equal.

    Whatever one outside gives, the rows of the conflict cannot hold together.
    """
    if not model.scenario.service_levels or model.program().shape[0] > RELAXED_ROWS:
        return []
    found: list[str] = []
    families = {row.partition("[")[0] for row in between.rows}
    named = zip(names_of(model.scenario.service_levels), model.scenario.service_levels, strict=True)
    for name, level in [(name, level) for name, level in named if name in families][:RELAXED_LEVELS]:
        for field, loosen in BOUNDS.items():
            bound = getattr(level, field, None)
            if level.penalty is None and isinstance(bound, int | float):
                needed = least(partial(_feasible, model, name, level, field), bound, loosen)
                if needed is not None:
                    found.append(f"A plan exists if {name} has {field} {needed} in place of {bound:.6g}")
    return found


BOUNDS: dict[str, Callable[[float, float], float]] = {
    "at_most": lambda bound, by: bound + by,
    "tokens": lambda bound, by: bound + by,
    "share": lambda bound, by: max(0.0, bound - by),
    "rate": lambda bound, by: max(0.0, bound - by),
}


def least(feasible: Callable[[float], bool], bound: float, loosen: Callable[[float, float], float]) -> str | None:
    """The bound nearest ``bound`` that is feasible, to six digits, rounded so that it stays so; None if none is."""
    low, high = 0.0, 1e-3 * (abs(bound) or 1.0)
    while not feasible(loosen(bound, high)):
        low, high = high, 4.0 * high
        if high > 1e9 * (abs(bound) or 1.0):
            return None
    while high - low > 1e-7 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if feasible(loosen(bound, middle)) else (middle, high)
    exact = loosen(bound, high)
    nearest = f"{exact:.6g}"
    if feasible(float(nearest)):
        return nearest
    unit = 10.0 ** (math.floor(math.log10(abs(exact))) - 5) if exact else 0.0
    return f"{loosen(float(nearest), unit):.6g}"


def _feasible(model: FluidModel, name: str, level: Any, field: str, value: float) -> bool:
    """Whether the model has a plan with another bound in one service level; its other rows stay as they are."""
    try:
        relaxed = replace(level, **{field: value})
    except InvalidInput:
        return False
    numbers = model.numbers()
    values = relaxed.add(name, Context(model.workload, model.modes, model.symbols)).values
    try:
        solve_program(lower(model.symbolic, Numbers(numbers.labels, {**numbers.values, **values})))
    except (InfeasibleModel, SolverFailure):
        return False
    return True
