"""The best prefill chunk: every whole number of tokens solved, and what decides among them.

A chunk C gives the fleet the point (C/tau, (B-1)/tau) of prompt and decode tokens/s beside (0, B gamma). Up to b0,
where the mixed time leaves the decode-only time, a larger chunk prefills more in the same time. From there on, with
affine tau, all chunks lie on one line: where that line passes above (0, B gamma) (alpha < (B-1)/(B gamma)) the best
chunk is b0 as long as it prefills enough, then the least one that does; where it passes below, a larger chunk is always
better. Both are changed by promises, and by curves that bend; so none of it is assumed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fluidopt.contention import GPU
from fluidopt.errors import InfeasibleModel, InvalidInput
from fluidopt.inputs import MOST, is_whole
from fluidopt.model import FluidModel
from fluidopt.plan import Plan
from fluidopt.program import Array
from fluidopt.solvers.knapsack import CapacityProblem, applies, solve_capacity
from fluidopt.solvers.structured import capacity_problem
from fluidopt.studies.hardware.values import Performance, gpu_number, paired, performance, price_bound, with_gpu
from fluidopt.tables import number, text
from fluidopt.views import amount_bar, card, figures, html, paragraph, share_bar

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LARGEST = 4096
# Revenues this close, relative, are equal.
TIE = 1e-9
# A fleet that prefills with all but this share has no more to give.
FULL = 1e-6
# Chunks that are solved together, where promises make it worth stopping early.
TOGETHER = 64


def optimal_chunk(
    model: FluidModel,
    *,
    largest: int = LARGEST,
    chunks: Sequence[int] | None = None,
    gpu: str | None = None,
) -> ChunkChoice:
    """Find the prefill chunk with which the best plan earns most, under the model's promises.

    Every whole chunk is looked at: without service levels each is solved (0.5 ms); with them, in the order of what it
    would earn without, until none that is left could earn more. Of chunks that earn the same the one with the least
    time per token is taken, then the largest. Chunks with which a prefill would speed decodes up (kappa < 1 for [L26]'s
    line below b0) are no candidates, whatever the curve says.

    Args:
        model: the model; ``chunk_size`` of its GPU type is what is chosen.
        largest: C at most, tokens.
        chunks: the candidates, in place of 1 to ``largest``.
        gpu: the GPU type, where there are several.

    Raises:
        InvalidInput: an argument breaks a rule, no candidate keeps decodes from being sped up, or the model has an
            objective of its own.
        InfeasibleModel: no candidate keeps the promises.
    """
    at = gpu_number(model, gpu, "optimal_chunk")
    present = paired(model, at, "optimal_chunk")
    candidates = _candidates(present, largest, chunks)
    gpus = [replace(present, chunk_size=chunk) for chunk in candidates.tolist()]
    free = model if model.is_standard else _without_promises(model)
    if (reason := applies(capacity_problem(free))) is not None:
        raise InvalidInput(f"optimal_chunk: {reason}")
    unbounded = performance(free, gpus, at=at)
    found = unbounded if model.is_standard else _searched(model, gpus, at, unbounded)
    if np.isnan(found.revenue_rate).all():
        raise InfeasibleModel(
            f"optimal_chunk: with no chunk of {candidates[0]} to {candidates[-1]} tokens does a plan keep all "
            "promises; loosen one, or solve the model at one chunk to see which"
        )
    best = np.nanmax(found.revenue_rate)
    tied = np.flatnonzero(found.revenue_rate >= best - TIE * abs(best))
    tpot = np.nan_to_num(found.user_tpot[tied], nan=np.inf)
    chosen = int(tied[np.flatnonzero(tpot <= tpot.min() * (1 + TIE))[-1]])
    return ChunkChoice(
        plan=with_gpu(model, gpus[chosen], at=at).solve(),
        at=at,
        chunks=candidates,
        performance=found,
        without_promises=unbounded.revenue_rate,
        chosen=chosen,
        mixture=_mixture(free, present, at, candidates),
    )


def _candidates(gpu: GPU, largest: object, chunks: object) -> NDArray[np.int64]:
    if chunks is None:
        if not is_whole(largest, least=1, most=MOST):
            raise InvalidInput(f"optimal_chunk: largest must be a whole number of at least 1; got {largest!r}")
        wanted = np.arange(1, int(largest) + 1)  # type: ignore[call-overload]
    else:
        given = list(chunks) if isinstance(chunks, Sequence | range | np.ndarray) else []
        if not given or not all(is_whole(each, least=1) for each in given):
            raise InvalidInput(f"optimal_chunk: chunks must be a list of whole numbers of at least 1; got {chunks!r}")
        wanted = np.unique(np.array(given, dtype=np.int64))
    # At equal decodes, so that the slot that a prefill takes from a decode does not count as a gain.
    slots, cached = gpu.batch_size - 1, gpu.kv_tokens or 0.0
    alone = gpu.curve.decode_only(slots, cached)
    physical: NDArray[np.bool_] = np.array(
        [gpu.curve.mixed(chunk, slots, cached) >= alone * (1 - 1e-12) for chunk in wanted.tolist()]
    )
    if not physical.any():
        raise InvalidInput(
            f"optimal_chunk: up to {wanted[-1]} tokens a prefill would speed decodes up on GPU {gpu.name!r} (mixed "
            f"time below the decode-only {alone:g} s); raise largest, or give the curve physical=True"
        )
    kept: NDArray[np.int64] = wanted[physical]
    return kept


def _without_promises(model: FluidModel) -> FluidModel:
    """The model with its built-in rows only: what it earns bounds what it earns with more rows, or with penalties."""
    return FluidModel.from_scenario(replace(model.scenario, service_levels=(), rows=()))


def _searched(model: FluidModel, gpus: Sequence[GPU], at: int, free: Performance) -> Performance:
    """Solve with all promises, by falling revenue without them, until no chunk that is left could earn more."""
    values = {name: np.full(len(gpus), np.nan) for name in free.__dataclass_fields__}
    values["bound"], values["kappa"] = free.bound.copy(), free.kappa
    ceiling = np.nan_to_num(free.revenue_rate, nan=-np.inf)
    level = np.round(ceiling / (TIE * max(1e-300, np.abs(ceiling[np.isfinite(ceiling)]).max(initial=0.0))))
    order = np.lexsort((-np.arange(len(gpus)), np.nan_to_num(free.user_tpot, nan=np.inf), -level))
    best = -np.inf
    for start in range(0, len(gpus), TOGETHER):
        batch = order[start : start + TOGETHER]
        if not ceiling[batch[0]] > best:
            break
        solved = performance(model, [gpus[place] for place in batch], at=at)
        for name, array in values.items():
            array[batch] = getattr(solved, name)
        best = max(best, np.nanmax(solved.revenue_rate, initial=-np.inf))
    return Performance(**values)


def _mixture(free: FluidModel, gpu: GPU, at: int, chunks: NDArray[np.int64]) -> float:
    """What is earned where every iteration may have another of the chunks: all of them as modes of one program."""
    base = capacity_problem(free)
    slots, cached = gpu.batch_size - 1, gpu.kv_tokens or 0.0
    times = [gpu.curve.mixed(chunk, slots, cached) for chunk in chunks.tolist()]
    return _solved_with(base, at, chunks.astype(float), np.full(chunks.size, float(slots)), np.array(times))


def _solved_with(base: CapacityProblem, at: int, chunk: Array, slots: Array, time: Array) -> float:
    """The dual bound of ``base`` with these prefill modes in place of type ``at``'s own."""
    kept = ~((base.gpu_type == at) & (base.chunk > 0))
    problem = replace(
        base,
        chunk=np.concatenate([chunk, base.chunk[kept]]),
        decode_slots=np.concatenate([slots, base.decode_slots[kept]]),
        iteration_time=np.concatenate([time, base.iteration_time[kept]]),
        gpu_type=np.concatenate([np.full(chunk.size, at), base.gpu_type[kept]]),
    )
    return price_bound(problem, solve_capacity(problem).prices)


@dataclass(frozen=True, eq=False, kw_only=True)
class ChunkChoice:
    """The best prefill chunk of a GPU type, with the evidence."""

    plan: Plan
    """The optimal plan at the chosen chunk."""
    at: int
    """Number of the GPU type."""
    chunks: NDArray[np.int64]
    """The candidates, tokens, increasing."""
    performance: Performance
    """What the best plan does at each; NaN where no plan keeps the promises, or where ``without_promises`` is below
    what is earned elsewhere, so that it was not solved."""
    without_promises: Array
    """Money/s per GPU at each candidate without service levels and added rows, which no plan with them exceeds."""
    chosen: int
    """Place of the chosen one among the candidates."""
    mixture: float
    """Money/s per GPU that no plan exceeds which chooses the chunk of each iteration, among the candidates and without
    promises: what choosing one for all can lose at most, above ``revenue_rate``."""

    @property
    def chunk_size(self) -> int:
        """The best chunk, tokens."""
        return int(self.chunks[self.chosen])

    @property
    def revenue_rate(self) -> float:
        """Money/s per GPU with it."""
        return float(self.performance.revenue_rate[self.chosen])

    @cached_property
    def as_good(self) -> NDArray[np.int64]:
        """Chunks known to earn the same (to 1e-9), tokens."""
        return self.chunks[self.performance.revenue_rate >= self.revenue_rate - TIE * abs(self.revenue_rate)]

    @property
    def proven(self) -> bool:
        """Whether every other candidate is known to earn no more: solved, or bounded by what it earns free."""
        known = np.where(np.isnan(self.performance.revenue_rate), self.without_promises, self.performance.revenue_rate)
        open_ones = np.isnan(self.performance.revenue_rate) & np.isfinite(self.performance.bound)
        return bool((known[open_ones] <= self.revenue_rate * (1 + TIE)).all())

    @cached_property
    def larger_bound(self) -> float:
        """Money/s per GPU that no larger chunk than the candidates exceeds; inf where nothing is known.

        Beyond the last candidate L the mixed time rises at least as the flattest piece s of the curve, so that (C/tau,
        (B-1)/tau) is at most a mixture of L's point and (1/s, 0).
        """
        gpu, last = self.plan.model.gpu_types[self.at], int(self.chunks[-1])
        slots, cached = gpu.batch_size - 1, gpu.kv_tokens or 0.0
        free = _without_promises(with_gpu(self.plan.model, replace(gpu, chunk_size=last), at=self.at))
        if not free.solve().decode_buffer_vanishes:
            return float("inf")
        knots = gpu.curve.grid().chunk
        ends = np.array([last, *knots[knots > last]])
        ends = np.append(ends, ends[-1] + 1024.0)
        times = np.array([gpu.curve.mixed(float(end), slots, cached) for end in ends])
        flattest = max(1e-12, float((np.diff(times) / np.diff(ends)).min()))
        return _solved_with(
            capacity_problem(free),
            self.at,
            np.array([float(last), 1.0]),
            np.array([float(slots), 0.0]),
            np.array([times[0], flattest]),
        )

    @cached_property
    def statement(self) -> str:
        """The choice and what decides it, in words."""
        gpu = self.plan.model.gpu_types[self.at]
        head = (
            f"Chunk {self.chunk_size} earns most of {self.chunks[0]} to {self.chunks[-1]} tokens: "
            f"{number(self.revenue_rate)} money/s per GPU"
        )
        return f"{head}. {' '.join(self._reasons(gpu))}"

    def _reasons(self, gpu: GPU) -> Iterator[str]:
        others, tau = self.as_good, gpu.curve.mixed(self.chunk_size, gpu.batch_size - 1, gpu.kv_tokens or 0.0)
        if others.size > 1:
            yield (
                f"{others.size} chunks from {others[0]} to {others[-1]} earn the same; of these it has the least time "
                "per token, then the shortest prefill."
            )
        last = self.chosen == self.chunks.size - 1
        held = not last and self.without_promises[self.chosen + 1] > self.revenue_rate * (1 + TIE)
        slots, cached = gpu.batch_size - 1, gpu.kv_tokens or 0.0
        alone = gpu.curve.decode_only(slots, cached) * (1 + 1e-12)
        if last:
            yield f"It is the largest that was tried; none beyond it earns more than {number(self.larger_bound)}."
        elif held:
            yield "A promise keeps it from being larger."
        elif tau <= alone < gpu.curve.mixed(int(self.chunks[self.chosen + 1]), slots, cached):
            yield "Up to it an iteration takes no longer than decodes alone; a larger chunk slows them."
        elif np.nanmax(self.performance.prefill_share[max(0, self.chosen - 1) : self.chosen + 1]) > 1 - FULL:
            yield "The whole fleet prefills: a smaller chunk would prefill too little, a larger one slow the decodes."
        yield f"An iteration with it takes {number(1e3 * tau)} ms beside {gpu.batch_size - 1} decodes."
        if self.plan.model.is_standard:
            lost = self.mixture / self.revenue_rate - 1 if self.revenue_rate else 0.0
            yield (
                "No fleet that mixes chunks earns more."
                if lost <= 10 * TIE
                else f"Mixing chunks could earn {lost:.2%} more at most."
            )

    def to_frame(self) -> pd.DataFrame:
        """A row per candidate.

        Columns: ``revenue_rate`` and ``without_promises`` (money/s per GPU), ``slot_average_tpot`` and ``user_tpot``
        (s/token), ``prefill_share``, ``kappa``.
        """
        import pandas as pd

        columns = {
            "revenue_rate": self.performance.revenue_rate,
            "without_promises": self.without_promises,
            "slot_average_tpot": self.performance.slot_average_tpot,
            "user_tpot": self.performance.user_tpot,
            "prefill_share": self.performance.prefill_share,
            "kappa": self.performance.kappa,
        }
        return pd.DataFrame(columns, index=pd.Index(self.chunks, name="chunk_size"))

    def plot(self) -> Figure:
        """Revenue and time per token over the chunk."""
        from fluidopt.studies.hardware.figures import plot_chunks

        return plot_chunks(self)

    def __repr__(self) -> str:
        return f"ChunkChoice: {self.statement}\n\n{text(self._around())}"

    def _repr_html_(self) -> str:
        units = dict.fromkeys(("revenue_rate", "without_promises"), "money/s per GPU")
        units |= dict.fromkeys(("slot_average_tpot", "user_tpot"), "s/token") | {"prefill_share": "of the fleet"}
        return card(
            "Best prefill chunk",
            figures(("Chunk", self.chunk_size, "tokens"), ("Revenue", self.revenue_rate, "money/s per GPU")),
            paragraph(self.statement),
            html(
                self._around(),
                title="Chunks",
                units=units,
                bars={"revenue_rate": amount_bar, "prefill_share": share_bar},
            ),
        )

    def _around(self) -> pd.DataFrame:
        """Rows of doubling chunks, and the chosen one."""
        wanted = {self.chunks.size - 1, self.chosen}
        wanted |= {int(np.searchsorted(self.chunks, 2**power)) for power in range(int(np.log2(self.chunks[-1])) + 1)}
        return self.to_frame().iloc[sorted(place for place in wanted if place < self.chunks.size)]
