"""Service levels: promises about waiting, speed, fairness and memory, each a few lines of symbols on the fluid LP.

A level is a hard bound, or with ``penalty`` a soft one: each unit above the bound costs ``penalty`` money (so
``at_most=0`` with a penalty is a pure penalty). All are promises about the fluid limit; in a finite fleet waits are
longer, so simulate. Prefill fairness, decode fairness, wait and time-to-first-token levels forbid a decode queue
(``q_d = 0``): the plan could otherwise meet them by prefilling everyone at once and letting them queue for decode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import sympy
from pydantic import Field
from sympy import Add, Expr, IndexedBase, Integer, Symbol

from fluidopt.additions import Addition, Context, PerClass, Soft, spread_rows
from fluidopt.algebra import Parameter, RowFamily, SymbolicProgram, Variable
from fluidopt.errors import InvalidInput
from fluidopt.formulation import CLASSES, MODES, Symbols
from fluidopt.inputs import NonNegative, Positive, input_type
from fluidopt.program import Array

if TYPE_CHECKING:
    pass

Share = Annotated[float, Field(ge=0, le=1)]
Whom = Literal["arrivals", "served"]


@input_type
class PrefillFairness:
    """Prefills in service differ by at most so much between any two classes, [L26] eqs. (43), (44)."""

    _: KW_ONLY
    kind: Literal["prefill_fairness"] = "prefill_fairness"
    at_most: NonNegative
    """Largest difference, prefills in service per GPU."""
    penalty: Positive | None = None
    """Money/s per unit of difference above ``at_most``; none for a hard bound."""
    classes: tuple[str, ...] | None = None
    """The classes compared; all by default."""

    def add(self, name: str, context: Context) -> Addition:
        """The rows of this level."""
        s = context.symbols
        return spread_rows(self, name, context, s.sum(s.x[s.i, s.k], over=s.k), "prefills in service")


@input_type
class DecodeFairness:
    """Decodes in service on decode-only GPUs differ by at most so much between classes, [L26] eqs. (45), (46)."""

    _: KW_ONLY
    kind: Literal["decode_fairness"] = "decode_fairness"
    at_most: NonNegative
    """Largest difference, decodes in service in modes without prefill, per GPU."""
    penalty: Positive | None = None
    """Money/s per unit of difference above ``at_most``; none for a hard bound."""
    classes: tuple[str, ...] | None = None
    """The classes compared; all by default."""

    def add(self, name: str, context: Context) -> Addition:
        """The rows of this level."""
        s = context.symbols
        alone = Parameter(IndexedBase(f"decode_only_{name}"), (MODES,), "1", "1 where the mode runs no prefill")
        metric = s.sum(alone.symbol[s.k] * s.y[s.i, s.k], over=s.k)
        values = {alone.name: np.array([float(not mode.prefills) for _, mode in context.modes])}
        added = spread_rows(self, name, context, metric, "decodes in service on decode-only GPUs")
        return replace(added, parameters=(*added.parameters, alone), values={**added.values, **values})


@input_type
class SlotTPOT:
    """Time per output token averaged over decode slots, all counted full ([L26] eqs. (47), (48)).

    Not what a user sees (empty slots count); see `MeanTPOT` for that. The hard bound is linear. The penalty is convex
    for the mixed/solo pair with kappa >= 1 and refused otherwise.
    """

    _: KW_ONLY
    kind: Literal["slot_tpot"] = "slot_tpot"
    at_most: NonNegative
    """Seconds per token."""
    penalty: Positive | None = None
    """Money/s per second above ``at_most``; none for a hard bound."""

    def add(self, name: str, context: Context) -> Addition:
        """The row of this level."""
        s = context.symbols
        bound = Parameter(Symbol(f"bound_{name}"), (), "s/token", "slot-average TPOT at most")
        if self.penalty is not None:
            return self._convex(name, context, self.penalty)
        row = RowFamily(
            name,
            s.sum(s.b[s.k] * s.tau[s.k] * s.phi[s.k], over=s.k),
            "<=",
            bound.symbol * s.sum(s.b[s.k] * s.phi[s.k], over=s.k),
            (),
            meaning=f"slot-average time per output token is at most {self.at_most:g} s",
            dual=f"dual_{name}",
            dual_unit="money/s per slot-second/token",
        )
        return Addition((row,), parameters=(bound,), values={bound.name: np.float64(self.at_most)})

    def _convex(self, name: str, context: Context, penalty: float) -> Addition:
        """With S the share of mixed GPUs, TPOT = c0 + c1/(B - S), convex as c1 = B(B-1)(tau - tau_solo) >= 0."""
        pair = [mode for _, mode in context.modes]
        usual = (
            len(pair) == 2
            and pair[0].prefills
            and not pair[1].prefills
            and pair[1].decode_slots == pair[0].decode_slots + 1
        )
        if not usual or pair[0].iteration_time is None or pair[1].iteration_time is None:
            raise InvalidInput(
                f"{name}: a penalty on the slot-average TPOT is a ratio that is convex only for one GPU type with the "
                "mixed/solo pair of modes; give a hard bound (leave penalty out)"
            )
        mixed, solo, B = pair[0].iteration_time, pair[1].iteration_time, pair[1].decode_slots
        if mixed < solo:
            raise InvalidInput(
                f"{name}: a penalty on the slot-average TPOT is not convex where a mixed iteration ({mixed:g} s) is "
                f"faster than a decode-only one ({solo:g} s); give a hard bound (leave penalty out)"
            )
        curve = B * (B - 1) * (mixed - solo)
        excess = Variable(Symbol(f"excess_{name}"), (), "s/token", "slot-average TPOT above the bound")
        share = context.symbols.phi[context.symbols.k].base[Integer(0)]

        def tpot(S: float) -> float:
            # c0 + c1/(B - S) without the difference of two numbers that grow with B.
            return solo + ((B - 1) * (mixed - solo) * S / (B - S) if curve else 0.0)

        def tangent(S: float, at: str) -> RowFamily:
            slope = curve / (B - S) ** 2 if curve else 0.0
            right = tpot(S) - self.at_most + slope * (share - S)
            return RowFamily(f"{name}{at}", excess.symbol, ">=", right, (), dual=f"dual_{name}{at}")

        def cut(values: Mapping[str, Array]) -> tuple[RowFamily, float, float]:
            S, present = float(values["phi"][0]), float(values[excess.name])
            exact = max(0.0, tpot(S) - self.at_most)
            return tangent(S, f"_at_{S!r}"), exact, present

        return Addition(
            (tangent(0.0, "_at_0"), tangent(1.0, "_at_1")),
            variables=(excess,),
            cost=sympy.Float(penalty) * excess.symbol,
            cut=cut,
        )


@input_type
class MeanWait:
    """Mean wait before prefill, by Little's law: q_p,i <= W lambda_i over all arrivals (exact in the fluid).

    With ``of="served"``, over those who are served and fluid first-come first-served: q_p,i <= lambda_i
    (1 - exp(-theta_i W))/theta_i. The penalty is money per request and second of mean wait above the bound.
    """

    _: KW_ONLY
    kind: Literal["mean_wait"] = "mean_wait"
    at_most: NonNegative
    """W, s."""
    of: Whom = "arrivals"
    """Whose wait: all arrivals', or that of those who are served in the end."""
    penalty: Positive | None = None
    """Money per request and second; none for a hard bound."""
    classes: tuple[str, ...] | None = None
    """The classes it holds for; all by default."""

    def add(self, name: str, context: Context) -> Addition:
        """The rows of this level."""
        s = context.symbols
        level = PerClass(self, name, context, "s", f"mean wait of {{class}} is at most {self.at_most:g} s")
        _refuse_patient(name, context, level.chosen)
        right = s.lambda_[s.i] * (level.bound if self.of == "arrivals" else _served_wait(s, level.bound))
        return level.row(s.q_p[s.i], right, self.at_most, empties_decode_queue=True)


@input_type
class MeanTTFT:
    """Mean time to first token, the end of the prefill: q_p,i + x_i <= T lambda_i over all arrivals.

    With ``of="served"``, those who are served wait at most T less the prefill time P_i tau/C of the slowest prefill
    mode. A decode queue, which this level forbids, would delay the second token, not the first.
    """

    _: KW_ONLY
    kind: Literal["mean_ttft"] = "mean_ttft"
    at_most: Positive
    """T, s."""
    of: Whom = "arrivals"
    """Whose time: all arrivals', or that of those who are served in the end."""
    penalty: Positive | None = None
    """Money per request and second above the bound; none for a hard bound."""
    classes: tuple[str, ...] | None = None
    """The classes it holds for; all by default."""

    def add(self, name: str, context: Context) -> Addition:
        """The rows of this level."""
        s = context.symbols
        meaning = f"mean time to first token of {{class}} is at most {self.at_most:g} s"
        level = PerClass(self, name, context, "s", meaning)
        _refuse_patient(name, context, level.chosen)
        if self.of == "arrivals":
            metric = s.q_p[s.i] + s.sum(s.x[s.i, s.k], over=s.k)
            return level.row(metric, s.lambda_[s.i] * level.bound, self.at_most, empties_decode_queue=True)
        slowest = min(mode.prefill_speed for _, mode in context.modes if mode.prefills)
        wait = self.at_most - context.workload.prompt_tokens / slowest
        late = (wait < 0) & (level.chosen > 0)
        if late.any():
            who = int(np.argmax(late))
            raise InvalidInput(
                f"{name}: at_most {self.at_most:g} s is below the prefill time of {context.workload.names[who]!r}, "
                f"{context.workload.prompt_tokens[who] / slowest:.4g} s; no plan can promise it"
            )
        right = s.lambda_[s.i] * _served_wait(s, level.bound)
        return level.row(s.q_p[s.i], right, wait, empties_decode_queue=True)


@input_type
class MeanTPOT:
    """Mean time per output token as a user of the class sees it: time in decode and its queue over tokens.

    y_i + q_d,i <= eta sum_k y_ik/tau_k. It fixes decodes class by class: where classes are promised different times, a
    fleet needs the SLI-aware router for that. The decode queue of a class that never abandons is not determined and not
    counted.
    """

    _: KW_ONLY
    kind: Literal["mean_tpot"] = "mean_tpot"
    at_most: Positive
    """Seconds per token."""
    penalty: Positive | None = None
    """Money per token and second above the bound; none for a hard bound."""
    classes: tuple[str, ...] | None = None
    """The classes it holds for; all by default."""

    def add(self, name: str, context: Context) -> Addition:
        """The rows of this level."""
        s = context.symbols
        meaning = f"mean time per output token of {{class}} is at most {self.at_most:g} s"
        level = PerClass(self, name, context, "s/token", meaning)
        queues = Parameter(IndexedBase(f"queues_{name}"), (CLASSES,), "1", "1 where the decode queue is determined")
        metric = s.sum(s.y[s.i, s.k], over=s.k) + queues.symbol[s.i] * s.q_d[s.i]
        right = level.bound * s.sum(s.y[s.i, s.k] / s.tau[s.k], over=s.k)
        added = level.row(metric, right, self.at_most)
        impatient = (context.workload.abandonment_rate > 0).astype(float)
        return replace(added, parameters=(*added.parameters, queues), values={**added.values, queues.name: impatient})


@input_type
class AbandonmentShare:
    """Share of a class's arrivals that give up in either queue: theta_i (q_p,i + q_d,i) <= eps lambda_i."""

    _: KW_ONLY
    kind: Literal["abandonment_share"] = "abandonment_share"
    at_most: Share
    """eps, between 0 and 1."""
    penalty: Positive | None = None
    """Money per request above the bound; none for a hard bound."""
    classes: tuple[str, ...] | None = None
    """The classes it holds for; all by default."""

    def add(self, name: str, context: Context) -> Addition:
        """The rows of this level."""
        s = context.symbols
        meaning = f"at most {self.at_most:.3g} of {{class}} abandon"
        level = PerClass(self, name, context, "1", meaning)
        metric = s.theta[s.i] * s.q_p[s.i] + s.theta[s.i] * s.q_d[s.i]
        return level.row(metric, level.bound * s.lambda_[s.i], self.at_most)


@input_type
class CompletionFloor:
    """At least so many requests of a class are completed: a rate, or a share of its arrivals."""

    _: KW_ONLY
    kind: Literal["completion_floor"] = "completion_floor"
    share: Share | None = None
    """Of the arrivals; give this or ``rate``."""
    rate: NonNegative | None = None
    """Requests/s per GPU; give this or ``share``."""
    penalty: Positive | None = None
    """Money per request that is missing; none for a hard bound."""
    classes: tuple[str, ...] | None = None
    """The classes it holds for; all by default."""

    def __post_init__(self) -> None:
        if (self.share is None) == (self.rate is None):
            raise InvalidInput("give exactly one of share and rate")

    def add(self, name: str, context: Context) -> Addition:
        """The rows of this level."""
        s = context.symbols
        of = f"{self.share:.3g} of" if self.share is not None else f"{self.rate:g}/s per GPU of"
        level = PerClass(self, name, context, "requests/s/GPU", f"at least {of} {{class}} are completed")
        floor = level.bound * s.lambda_[s.i] if self.share is not None else level.bound
        done = s.sum(s.mu_d[s.i, s.k] * s.y[s.i, s.k], over=s.k)
        return level.row(-done, -floor, self.share if self.share is not None else self.rate)


@input_type
class KVMemory:
    """KV-cache tokens that fit on a GPU, per mode and over the fleet.

    In each mode sum_i [(P_i + D_i (1 + cv_D^2)/2) y_ik + P_i (1 + cv_P^2)/2 x_ik] <= K phi_k; over the fleet the
    prompts that wait for decode count too, P_i q_d,i. ``cv = 1`` is the model's exponential law.
    """

    _: KW_ONLY
    kind: Literal["kv_memory"] = "kv_memory"
    tokens: Positive
    """K, tokens per GPU."""
    prompt_cv: NonNegative = 1.0
    """Coefficient of variation of prompt lengths."""
    output_cv: NonNegative = 1.0
    """Coefficient of variation of output lengths."""
    penalty: Positive | None = None
    """Money/s per token above a limit; none for a hard bound. A token too many in a mode and over the fleet breaks both
    limits, and both are charged."""

    def add(self, name: str, context: Context) -> Addition:
        """The rows of this level."""
        s = context.symbols
        limit, prompt, output = (
            Parameter(Symbol(f"{what}_{name}"), (), "tokens", what) for what in ("limit", "prompt", "output")
        )
        queues = Parameter(IndexedBase(f"queues_{name}"), (CLASSES,), "1", "1 where the decode queue is determined")
        held = (s.P[s.i] + s.D[s.i] * output.symbol) * s.y[s.i, s.k]
        filling = s.P[s.i] * prompt.symbol * s.x[s.i, s.k]
        used = s.sum(held, over=s.i) + s.sum(filling, over=s.i)
        waiting = s.sum(queues.symbol[s.i] * s.P[s.i] * s.q_d[s.i], over=s.i)
        meaning = f"{self.tokens:g} KV-cache tokens fit on a GPU"
        room = limit.symbol * s.phi[s.k]
        per_mode = Soft(self.penalty, name, (MODES,), "tokens/GPU").row(
            used, room, f"{meaning} in mode {{mode}}", where=s.C[s.k] + s.b[s.k] > 0
        )
        fleet = Soft(self.penalty, f"{name}_fleet", (), "tokens/GPU").row(
            s.sum(used, over=s.k) + waiting, s.sum(room, over=s.k), meaning
        )
        return Addition(
            rows=(*per_mode.rows, *fleet.rows),
            variables=(*per_mode.variables, *fleet.variables),
            parameters=(limit, prompt, output, queues),
            values={
                limit.name: np.float64(self.tokens),
                prompt.name: np.float64((1 + self.prompt_cv**2) / 2),
                output.name: np.float64((1 + self.output_cv**2) / 2),
                queues.name: (context.workload.abandonment_rate > 0).astype(float),
            },
            cost=per_mode.cost + fleet.cost,
        )


@input_type
class KVTransfer:
    """Rate at which prompts move from GPUs that only prefill to those that decode: sum_i P_i a_i over such prefills."""

    _: KW_ONLY
    kind: Literal["kv_transfer"] = "kv_transfer"
    at_most: NonNegative
    """Prompt tokens/s per GPU of the fleet."""
    penalty: Positive | None = None
    """Money per token above the limit; none for a hard bound."""

    def add(self, name: str, context: Context) -> Addition:
        """The row of this level."""
        s = context.symbols
        limit = Parameter(Symbol(f"limit_{name}"), (), "tokens/s", "transfer rate at most")
        moves = Parameter(IndexedBase(f"moves_{name}"), (MODES,), "1", "1 where the mode prefills without decoding")
        rate = s.sum(s.sum(moves.symbol[s.k] * s.C[s.k] / s.tau[s.k] * s.x[s.i, s.k], over=s.i), over=s.k)
        meaning = f"at most {self.at_most:g} prompt tokens/s per GPU move from prefill to decode"
        added = Soft(self.penalty, name, (), "tokens/s").row(rate, limit.symbol, meaning)
        alone = np.array([float(mode.prefills and mode.decode_slots == 0) for _, mode in context.modes])
        return replace(
            added, parameters=(limit, moves), values={limit.name: np.float64(self.at_most), moves.name: alone}
        )


ServiceLevel = Annotated[
    PrefillFairness
    | DecodeFairness
    | SlotTPOT
    | MeanWait
    | MeanTTFT
    | MeanTPOT
    | AbandonmentShare
    | CompletionFloor
    | KVMemory
    | KVTransfer,
    Field(discriminator="kind"),
]
"""Any of the service levels; in a scenario file told apart by ``kind``."""


def names_of(levels: Sequence[Any]) -> list[str]:
    """The names of the rows of each level: its kind, numbered from the second of a kind on."""
    seen: dict[str, int] = {}
    names = []
    for level in levels:
        seen[level.kind] = seen.get(level.kind, 0) + 1
        names.append(level.kind if seen[level.kind] == 1 else f"{level.kind}_{seen[level.kind]}")
    return names


def extend(
    program: SymbolicProgram, levels: Sequence[Any], context: Context
) -> tuple[SymbolicProgram, dict[str, Any], tuple[Addition, ...]]:
    """Add service levels to ``program``; returns it with the values of its new parameters and the additions.

    Names are the kinds, numbered from the second of a kind on (``mean_wait``, ``mean_wait_2``).
    """
    named = zip(names_of(levels), levels, strict=True)
    additions: tuple[Addition, ...] = tuple(level.add(name, context) for name, level in named)
    values = {symbol: value for added in additions for symbol, value in added.values.items()}
    program = replace(
        program,
        parameters=(*program.parameters, *(each for added in additions for each in added.parameters)),
        variables=(*program.variables, *(each for added in additions for each in added.variables)),
        objective=Add(program.objective, *(-added.cost for added in additions)),
        constraints=(*program.constraints, *(each for added in additions for each in added.rows)),
    )
    if any(added.empties_decode_queue for added in additions):
        s = context.symbols
        program = program.with_row(
            RowFamily(
                "no_decode_queue",
                s.q_d[s.i],
                "<=",
                Integer(0),
                (CLASSES,),
                where=s.theta[s.i] > 0,
                meaning="no request of {class} may wait for decode",
                dual="omega",
                dual_unit="money/s per request waiting",
            )
        )
    return program, values, additions


def _served_wait(s: Symbols, wait: Expr) -> Expr:
    """q_p,i/lambda_i at which those who are served have waited ``wait`` (fluid, first-come first-served)."""
    return (1 - sympy.exp(-s.theta[s.i] * wait)) / s.theta[s.i]


def _refuse_patient(name: str, context: Context, chosen: Array) -> None:
    patient = (context.workload.abandonment_rate == 0) & (chosen > 0)
    if patient.any():
        who = context.workload.names[int(np.argmax(patient))]
        raise InvalidInput(
            f"{name}: class {who!r} has abandonment rate 0, and then the fluid model leaves the length of its queue "
            "open, so it cannot promise a wait; give it an abandonment rate or leave it out with classes=..."
        )


__all__ = [
    "AbandonmentShare",
    "CompletionFloor",
    "DecodeFairness",
    "KVMemory",
    "KVTransfer",
    "MeanTPOT",
    "MeanTTFT",
    "MeanWait",
    "PrefillFairness",
    "ServiceLevel",
    "SlotTPOT",
]
