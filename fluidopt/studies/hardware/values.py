"""What a GPU's numbers are worth: revenue and time per token of a model's best plan, for many GPUs at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from fluidopt.contention import GPU
from fluidopt.errors import InfeasibleModel, InvalidInput, SolverFailure
from fluidopt.model import FluidModel
from fluidopt.program import Array
from fluidopt.solvers.knapsack import CapacityProblem, StructuredSolution, applies, solve_capacity
from fluidopt.solvers.structured import capacity_problem
from fluidopt.solvers.warm import Resolved, Solver
from fluidopt.studies.quiet import built_quietly

# Relative gap between what a plan earns and what its prices say that none can exceed.
GAP = 1e-7


@dataclass(frozen=True, eq=False, kw_only=True)
class Performance:
    """What the best plan does, an entry per GPU that was tried; NaN where no plan keeps the model's promises."""

    revenue_rate: Array
    """R*, money/s per GPU, less penalties for broken promises."""
    bound: Array
    """What no plan exceeds at the prices of capacity found, money/s per GPU; equal to ``revenue_rate`` to rounding."""
    prefill_share: Array
    """S, share of the fleet in modes with a prefill."""
    slot_average_tpot: Array
    """s/token over decode slots, all counted full ([L26] eq. (47))."""
    user_tpot: Array
    """s/token as users see it: time in decode and in its queue, over tokens. Decode-only slots fill first."""
    kappa: Array
    """Speed of solo decode relative to mixed decode; below 1 a prefill would speed decodes up."""

    def reshaped(self, shape: tuple[int, ...]) -> Performance:
        """The same entries on a grid."""
        return Performance(**{each.name: getattr(self, each.name).reshape(shape) for each in fields(self)})


def performance(model: FluidModel, gpus: Sequence[GPU], *, at: int = 0) -> Performance:
    """Solve ``model`` with each of ``gpus`` in place of its type number ``at``.

    Without service levels each takes 0.5 ms, by the structured solver; with them 5 ms, by simplex from the last basis.

    Raises:
        InvalidInput: the model has a convex penalty or a concave objective.
        SolverFailure: an answer that fails its certificate.
    """
    plain = model.is_standard and applies(capacity_problem(model)) is None
    rows = (_structured if plain else _by_simplex)(model, gpus, at)
    table = np.array(list(rows), dtype=float).reshape(len(gpus), 5).T
    kappa = np.array([gpu.kappa for gpu in gpus])
    return Performance(
        revenue_rate=table[0],
        bound=table[1],
        prefill_share=table[2],
        slot_average_tpot=table[3],
        user_tpot=table[4],
        kappa=kappa,
    )


def with_gpu(model: FluidModel, gpu: GPU, *, at: int = 0) -> FluidModel:
    """``model`` with ``gpu`` in place of its type number ``at``; no warning about curves, which studies report."""
    types = list(model.gpu_types)
    types[at] = replace(gpu, share=types[at].share)
    return built_quietly(replace(model.scenario, gpu=tuple(types)))


def gpu_number(model: FluidModel, name: str | None, caller: str) -> int:
    """Number of the GPU type called ``name``, or of the only one, of a model that maximises revenue.

    Raises:
        InvalidInput: ``model`` is no `FluidModel`, has another objective, or something added to it that has no text and
            would be lost; it has no such type, or several and no name is given.
    """
    check_revenue(model, caller)
    names = [gpu.name for gpu in model.gpu_types]
    if name is None and len(names) == 1:
        return 0
    if name not in names:
        raise InvalidInput(f"{caller}: gpu must be one of the model's types {names}; got {name!r}")
    return names.index(name)


def check_revenue(model: FluidModel, caller: str) -> None:
    """That ``model`` maximises revenue and can be built anew.

    Raises:
        InvalidInput: it does not, or cannot.
    """
    if not hasattr(model, "scenario"):
        raise InvalidInput(f"{caller}: model must be a FluidModel; got {model!r}")
    if model.scenario.objective is not None:
        raise InvalidInput(f"{caller}: the model has an objective of its own; revenue is what is compared here")
    model.to_dict()  # refuses what was added and has no text


def paired(model: FluidModel, at: int, caller: str) -> GPU:
    """The type number ``at``, whose modes follow from its curve.

    Raises:
        InvalidInput: it has modes of its own, which do not move with B, C and the curve.
    """
    gpu = model.gpu_types[at]
    if gpu.operating_modes is not None:
        raise InvalidInput(
            f"{caller}: GPU {gpu.name!r} has operating_modes of its own, which do not follow from its curve, batch "
            "and chunk; leave them out"
        )
    return gpu


Row = tuple[float, float, float, float, float]
NOTHING: Row = (np.nan,) * 5


def _structured(model: FluidModel, gpus: Sequence[GPU], at: int) -> Iterator[Row]:
    base = capacity_problem(model)
    first = sum(len(gpu.modes()) for gpu in model.gpu_types[:at])
    for gpu in gpus:
        modes = gpu.modes()
        arrays = [base.chunk.copy(), base.decode_slots.copy(), base.iteration_time.copy()]
        for k, mode in enumerate(modes, first):
            assert mode.iteration_time is not None, "the pair has no idle mode"
            arrays[0][k], arrays[1][k], arrays[2][k] = mode.chunk, mode.decode_slots, mode.iteration_time
        problem = replace(base, chunk=arrays[0], decode_slots=arrays[1], iteration_time=arrays[2])
        try:
            answer = solve_capacity(problem)
        except InfeasibleModel:
            yield NOTHING
            continue
        bound = price_bound(problem, answer.prices)
        if abs(bound - answer.objective) > GAP * (1e-12 + abs(answer.objective)):
            raise SolverFailure(
                f"GPU {gpu!r}: a plan earns {answer.objective:.9g} but its prices only bound all plans by {bound:.9g}"
            )
        yield (answer.objective, bound, *_times(problem, answer))


def price_bound(problem: CapacityProblem, prices: tuple[float, float]) -> float:
    """What no plan without service levels exceeds, by weak duality; for any price pi and any v >= 0.

    A GPU of type g can be let at max_k (pi C_k + v b_k)/tau_k, and a request that is prefilled pays pi P for it, one
    that is decoded v D more; arrivals take the best of staying away, prefill alone, and both. Classes that never
    abandon have no choice.
    """
    pi, v = prices
    worth = (pi * problem.chunk + v * problem.decode_slots) * problem.speed
    rent = np.full(problem.share.size, -np.inf)
    np.maximum.at(rent, problem.gpu_type, worth)
    prompt, output = problem.prompt_tokens, problem.output_tokens
    separate = problem.charging == "separate"
    of_prefill = (problem.prompt_price * separate - pi) * prompt
    of_decode = (problem.output_price - v) * output + problem.prompt_price * (not separate) * prompt
    both = of_prefill + of_decode
    gain = np.where(problem.patient, both, np.maximum(0.0, np.maximum(of_prefill, both)))
    return float(problem.share @ rent + problem.arrival_rate @ gain)


def _times(problem: CapacityProblem, answer: StructuredSolution) -> tuple[float, float, float]:
    """Share of the fleet that prefills, slot-average TPOT and TPOT as users see it."""
    slots = problem.decode_slots * answer.mode_share
    time = np.where(problem.decode_slots > 0, problem.iteration_time, 0.0)
    decodes = answer.decode.sum(axis=0)
    return _summary(
        answer.mode_share[problem.chunk > 0].sum(),
        slots,
        time,
        decodes,
        decodes @ problem.speed,
        np.nansum(answer.decode_queue),
    )


def _summary(
    prefill: float, slots: Array, time: Array, decodes: Array, tokens: float, waiting: float
) -> tuple[float, float, float]:
    return (
        float(prefill),
        float(slots @ time / slots.sum()) if slots.sum() > 0 else np.nan,
        float((decodes.sum() + waiting) / tokens) if tokens > 0 else np.nan,
    )


def _by_simplex(model: FluidModel, gpus: Sequence[GPU], at: int) -> Iterator[Row]:
    solver = Solver(model)
    for gpu in gpus:
        try:
            numbers = with_gpu(model, gpu, at=at).numbers().values
            found = solver.solve({name: numbers[name] for name in solver.parameters})
        except (InfeasibleModel, InvalidInput):
            # The GPU is valid by itself; a model that refuses it has a promise that this GPU cannot keep (a time to
            # first token below its prefill time).
            yield NOTHING
            continue
        yield (found.objective, found.certificate.bound, *_times_of(numbers, found))


def _times_of(numbers: Mapping[str, Array], found: Resolved) -> tuple[float, float, float]:
    phi, decodes = found.values["phi"], np.nansum(found.values["y"], axis=0)
    patient = numbers["theta"] == 0
    return _summary(
        phi[numbers["C"] > 0].sum(),
        numbers["b"] * phi,
        numbers["tau"],
        decodes,
        float((decodes / numbers["tau"]).sum()),
        float(np.nan_to_num(found.values["q_d"])[~patient].sum()),
    )
