"""How fast a GPU works: the operating modes built from an iteration-time curve, and the GPU that has them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fluidopt.curves import ContentionCurve, Curve, IterationTime, Tokens, curve_sketch
from fluidopt.errors import ContentionWarning, InvalidInput
from fluidopt.inputs import MOST, Name, NonNegative, NonNegativeInt, Positive, PositiveInt, input_type, is_whole
from fluidopt.views import card, facts, figures, html

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["GPU", "ContentionCurve", "IterationTime", "Mode", "warn_if_unphysical"]


@input_type
class Mode:
    """One way a GPU can run: a prefill chunk beside some decodes, decodes alone, or idle.

    The mode with ``chunk > 0`` exists while its prefill runs. ``chunk = decode_slots = 0`` is idle and has no
    iteration time.
    """

    name: Name
    """Label of the mode; unique within its GPU."""
    _: KW_ONLY
    chunk: NonNegativeInt = 0
    """C_k, prefill tokens per iteration; 0 where the mode only decodes."""
    decode_slots: NonNegativeInt = 0
    """b_k, decodes that run at most."""
    iteration_time: Positive | None = None
    """tau_k, s; none for the idle mode."""
    after_prefill: str | None = None
    """Name of the mode that the GPU falls into when the prefill ends; by default the decode-only mode with the
    fewest slots that still holds ``decode_slots``, or the largest."""

    def __post_init__(self) -> None:
        idle = self.chunk == 0 and self.decode_slots == 0
        if idle and self.iteration_time is not None:
            raise InvalidInput("iteration_time must be left out of an idle mode (chunk = decode_slots = 0)")
        if not idle and self.iteration_time is None:
            raise InvalidInput("iteration_time is required unless the mode is idle (chunk = decode_slots = 0)")
        if self.chunk == 0 and self.after_prefill is not None:
            raise InvalidInput("after_prefill has no meaning in a mode without a prefill (chunk = 0); leave it out")

    @property
    def prefills(self) -> bool:
        """Whether a prefill runs in this mode."""
        return self.chunk > 0

    @property
    def prefill_speed(self) -> float:
        """C_k/tau_k, prefill tokens/s of a GPU in this mode (0 without a prefill)."""
        return self.chunk / self.iteration_time if self.iteration_time else 0.0

    @property
    def decode_speed(self) -> float:
        """1/tau_k, tokens/s of one decode in this mode (0 in the idle mode)."""
        return 1.0 / self.iteration_time if self.iteration_time else 0.0

    def _repr_html_(self) -> str:
        return card(
            f"Mode {self.name}",
            facts(
                ("chunk", self.chunk, "prefill tokens per iteration"),
                ("decode_slots", self.decode_slots, "requests"),
                ("iteration_time", self.iteration_time, "s"),
                ("prefill speed", self.prefill_speed, "tokens/s"),
                ("decode speed", self.decode_speed, "tokens/s per request"),
                *([("after_prefill", self.after_prefill, "")] if self.after_prefill else []),
            ),
        )


@input_type
class GPU:
    """A GPU type: its iteration-time curve, its batch and chunk size, and the modes it can run in.

    By default the modes are the pair of [L26]: *mixed* (chunk C beside B - 1 decodes) and *solo* (B decodes).
    ``batch_size=1`` is allowed and means that a GPU prefills or decodes, never both at once.
    """

    curve: Curve
    """Iteration time of this model on this GPU: affine, linear or a table."""
    _: KW_ONLY
    batch_size: PositiveInt
    """B, requests that one GPU batches at most (vLLM: max_num_seqs)."""
    chunk_size: PositiveInt
    """C, prefill tokens per iteration (vLLM: max_num_batched_tokens - (B - 1))."""
    name: Name = "gpu"
    """Label of the type; unique within a model."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the fleet that is of this type; the shares of a model add up to 1."""
    operating_modes: tuple[Mode, ...] | None = None
    """Modes to use in place of the pair; see `modes` and `with_modes`."""
    kv_tokens: Tokens | None = None
    """Mean tokens in the KV cache per decode, at which the modes read the curve; required where it depends on them."""
    hourly_price: NonNegative | None = None
    """What one GPU of this type costs, money/hour; used where a fleet is sized."""

    def __post_init__(self) -> None:
        if self.curve.depends_on_kv and self.kv_tokens is None:
            raise InvalidInput(
                "kv_tokens is required: this curve depends on the KV cache; give the mean tokens per decode, "
                "P + D (1 + cv^2)/2 for prompts of P tokens and D decode iterations of coefficient of variation cv"
            )
        modes = self.modes()
        twice = [name for name, count in Counter(mode.name for mode in modes).items() if count > 1]
        if twice:
            raise InvalidInput(f"operating_modes: mode names must be unique; {twice[0]!r} occurs more than once")
        if not any(mode.prefills for mode in modes) and not any(mode.decode_slots for mode in modes):
            raise InvalidInput("operating_modes has only idle modes; give one that prefills or decodes")
        for mode in modes:
            if mode.decode_slots + mode.prefills > self.batch_size:
                raise InvalidInput(
                    f"operating_modes: mode {mode.name!r} has decode_slots {mode.decode_slots}"
                    f"{' beside its prefill' if mode.prefills else ''}, more than batch_size {self.batch_size}"
                )
            if mode.prefills:
                self.rest_mode(mode)

    def modes(
        self,
        *,
        chunks: Sequence[int] | None = None,
        batches: Sequence[int] | None = None,
        disaggregated: bool = False,
    ) -> tuple[Mode, ...]:
        """The modes of this type: ``operating_modes``, or else the pair of [L26]; with arguments, others of its curve.

        Names carry what tells the modes apart: ``"mixed C=256"`` among several chunks, ``"solo B=16"`` among several
        batches, plain ``"mixed"`` and ``"solo"`` where there is one of each. Where a decode's speed depends on the
        batch, revenue bounds every policy only if ``batches`` lists 1 (a prefill alone), ``batch_size`` and the
        batches at which the curve bends; a policy that never runs these batches is bounded without them.

        Args:
            chunks: prefill chunks, tokens (default: ``chunk_size``).
            batches: batch sizes b, 1 to ``batch_size`` (default: ``batch_size``), each with b - 1 decodes beside a
                prefill and b decodes alone.
            disaggregated: prefill-only modes, the idle mode that they end in, and decode-only modes; no mixed one.

        Raises:
            InvalidInput: a list that is empty, repeats an entry, or holds what is no whole number in its range.
        """
        if not isinstance(disaggregated, bool):
            raise self._refused(f"disaggregated must be True or False; got {disaggregated!r}")
        if chunks is None and batches is None and not disaggregated:
            return self.operating_modes if self.operating_modes is not None else self._made((self.chunk_size,))
        return self._made(
            self._sizes("chunks", chunks, "chunk_size", self.chunk_size, most=MOST),
            self._sizes("batches", batches, "batch_size", self.batch_size, most=self.batch_size),
            disaggregated,
        )

    def with_modes(
        self,
        *,
        chunks: Sequence[int] | None = None,
        batches: Sequence[int] | None = None,
        disaggregated: bool = False,
    ) -> GPU:
        """This type with ``operating_modes`` from `modes`, which says what the arguments mean."""
        return replace(self, operating_modes=self.modes(chunks=chunks, batches=batches, disaggregated=disaggregated))

    def _made(
        self, chunks: tuple[int, ...], batches: tuple[int, ...] = (), disaggregated: bool = False
    ) -> tuple[Mode, ...]:
        """Modes of the curve at these chunks and batches (none: ``batch_size``); those that prefill come first."""
        batches = batches or (self.batch_size,)
        at_chunk = {C: f" C={C}" if len(chunks) > 1 else "" for C in chunks}
        at_batch = {b: f" B={b}" if len(batches) > 1 else "" for b in batches}
        decode_only = tuple(
            Mode(
                f"{'decode' if disaggregated else 'solo'}{at_batch[b]}",
                decode_slots=b,
                iteration_time=self._time(0, b),
            )
            for b in batches
        )
        if disaggregated:
            prefills = tuple(
                Mode(f"prefill{at_chunk[C]}", chunk=C, iteration_time=self._time(C, 0), after_prefill="idle")
                for C in chunks
            )
            return (*prefills, Mode("idle"), *decode_only)
        mixed = tuple(
            Mode(
                f"mixed{at_chunk[C]}{at_batch[b]}",
                chunk=C,
                decode_slots=b - 1,
                iteration_time=self._time(C, b - 1),
                after_prefill=f"solo{at_batch[b]}",
            )
            for C in chunks
            for b in batches
        )
        return (*mixed, *decode_only)

    def _time(self, chunk: int, decodes: int) -> float:
        """Iteration time, s, at the KV length of this type; ``chunk`` 0 means that no prefill runs."""
        cached = () if self.kv_tokens is None else (self.kv_tokens,)
        return self.curve.mixed(chunk, decodes, *cached) if chunk else self.curve.decode_only(decodes, *cached)

    def _sizes(self, field: str, values: Sequence[int] | None, default: str, own: int, *, most: int) -> tuple[int, ...]:
        """The whole numbers in ``values``, or ``own`` where it is None."""
        if values is None:
            return (own,)
        try:
            given = list(values)
        except TypeError:
            raise self._refused(
                f"{field} must be a list of whole numbers; got {values!r}; write [{values!r}]"
            ) from None
        if not given:
            raise self._refused(f"{field} is empty; give at least one, or leave it out for {default} = {own}")
        for value in given:
            if not is_whole(value, least=1, most=most):
                limit = f", the GPU's {default}" if most < MOST else ""
                raise self._refused(f"{field} must hold whole numbers from 1 to {most}{limit}; got {value!r}")
        twice = [value for value, count in Counter(given).items() if count > 1]
        if twice:
            raise self._refused(f"{field} must not repeat an entry; {twice[0]!r} occurs more than once; list it once")
        return tuple(int(value) for value in given)

    def _refused(self, message: str) -> InvalidInput:
        return InvalidInput(f"GPU {self.name!r}: modes: {message}")

    def rest_mode(self, mode: Mode) -> Mode:
        """The mode that a GPU running ``mode`` falls into when its prefill ends.

        Raises:
            InvalidInput: where the type lists no such mode.
        """
        rests = [other for other in self.modes() if not other.prefills]
        if mode.after_prefill is not None:
            named = [other for other in rests if other.name == mode.after_prefill]
            if not named:
                raise InvalidInput(
                    f"operating_modes: mode {mode.name!r} has after_prefill {mode.after_prefill!r}, which is not a "
                    f"mode without prefill of this GPU; it has {[other.name for other in rests]}"
                )
            return named[0]
        if mode.decode_slots == 0 and (idle := [other for other in rests if other.decode_slots == 0]):
            return idle[0]
        rests = sorted((other for other in rests if other.decode_slots), key=lambda other: other.decode_slots)
        if not rests:
            kind = "a decode-only mode" if mode.decode_slots else "an idle mode (chunk = decode_slots = 0)"
            raise InvalidInput(
                f"operating_modes: mode {mode.name!r} prefills, so the GPU needs {kind} to fall into when the "
                "prefill ends; add one"
            )
        return next((other for other in rests if other.decode_slots >= mode.decode_slots), rests[-1])

    @property
    def kappa(self) -> float:
        """Speed of solo decode relative to mixed decode, gamma tau, at this batch and chunk size."""
        return self._time(self.chunk_size, self.batch_size - 1) / self._time(0, self.batch_size)

    def _repr_html_(self) -> str:
        cached = self.kv_tokens or 0.0
        return card(
            f"GPU {self.name}",
            figures(
                ("Batch", self.batch_size, "requests"),
                ("Chunk", self.chunk_size, "tokens"),
                *([("Share of the fleet", 100.0 * self.share, "%")] if self.share < 1 else []),
                *([("Price", self.hourly_price, "money/hour")] if self.hourly_price is not None else []),
            ),
            html(mode_table(self.modes()), title="Modes", units=MODE_UNITS),
            curve_sketch(self.curve, largest=4.0 * self.chunk_size, decodes=self.batch_size - 1.0, kv_tokens=cached),
        )


MODE_UNITS = {
    "chunk": "tokens",
    "decode_slots": "requests",
    "iteration_time": "s",
    "prefill_speed": "tokens/s",
    "decode_speed": "tokens/s each",
}


def mode_table(modes: Sequence[Mode], names: Sequence[str] | None = None) -> pd.DataFrame:
    """A row per mode, under its own name or the one given."""
    import pandas as pd

    columns = {name: [getattr(mode, name) for mode in modes] for name in MODE_UNITS}
    return pd.DataFrame(columns, index=pd.Index(names or [mode.name for mode in modes], name="mode"))


def warn_if_unphysical(gpu: GPU) -> None:
    """Warn where a prefill would speed decodes up (kappa < 1), naming C, b0 and the guarantees that lapse."""
    kappa, batch = gpu.kappa, gpu.batch_size
    if gpu.operating_modes is not None or kappa >= 1:
        return
    lapsed = "the slot-average TPOT penalty is no longer convex"
    if kappa < (batch - 1) / batch:
        lapsed += (
            f", and kappa < (B-1)/B = {(batch - 1) / batch:.4g}, so an optimal plan may need a decode queue "
            "(Proposition 3.2 of [L26] does not apply)"
        )
    solo = gpu.curve.decode_only(batch, gpu.kv_tokens or 0.0)
    meet = gpu.curve.grid().crossover_chunk(batch - 1, gpu.kv_tokens or 0.0, alone=solo)
    if gpu.curve.physical:  # the curve keeps mixed >= decode-only at equal decodes; the pair has one decode less
        speedup, remedy = "a prefill in place of one decode", "Use a larger chunk"
    else:
        speedup, remedy = "a prefill", "Use physical=True or a larger chunk"
    warnings.warn(
        f"GPU {gpu.name!r}: at chunk_size {gpu.chunk_size} the mixed line is below the decode-only time "
        f"(kappa = {kappa:.4g} < 1; the lines meet at b0 = {meet:.4g} tokens), so {speedup} "
        f"would speed decodes up; {lapsed}. {remedy}.",
        ContentionWarning,
        stacklevel=3,
    )
