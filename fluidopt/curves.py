"""This module owns iteration-time curves: what an iteration takes, given its prefill chunk, decodes and KV cache.

Every curve is piecewise linear along each axis, so that a `CurveGrid` says all about it; the replay reads that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Discriminator, Field, Tag

from fluidopt.errors import InvalidInput
from fluidopt.inputs import MOST, NonNegative, Positive, input_type
from fluidopt.tables import number
from fluidopt.views import Numbers, bullets, card, facts, sketch

Array = NDArray[np.float64]
# Beyond these nothing is an iteration of a GPU, and within them no arithmetic overflows.
Slope = Annotated[NonNegative, Field(le=1e6)]
Seconds = Annotated[Positive, Field(le=1e6)]
Tokens = Annotated[NonNegative, Field(le=MOST)]
Chunk = Annotated[Positive, Field(ge=1, le=MOST)]


class ContentionCurve(Protocol):
    """What an iteration takes, in seconds; every curve (affine, linear, tabulated) answers these."""

    def mixed(self, chunk: float, decodes: float, kv_tokens: float = 0.0) -> float:
        """Iteration time (s) with a prefill chunk of ``chunk`` tokens beside ``decodes`` decodes.

        ``kv_tokens`` is the mean number of tokens that a decode has in the KV cache.
        """
        ...

    def decode_only(self, decodes: float, kv_tokens: float = 0.0) -> float:
        """Iteration time (s) with ``decodes`` decodes of ``kv_tokens`` cached tokens each, and no prefill."""
        ...

    def grid(self) -> CurveGrid:
        """The same times on a grid, exact."""
        ...

    @property
    def depends_on_kv(self) -> bool:
        """Whether times depend on ``kv_tokens``."""
        ...


@dataclass(frozen=True, eq=False)
class CurveGrid:
    """Iteration times on a rectangular grid of knots, which says all about a piecewise multilinear curve.

    Between knots times are linear along each axis; beyond the last knot they go on with the slope of the last piece,
    and below the first one they stay. An axis may have a single knot: the time then does not depend on it.
    """

    chunk: Array
    """Prefill tokens of an iteration, (C,), increasing."""
    decodes: Array
    """Decodes of an iteration, (D,), increasing."""
    kv_tokens: Array
    """Mean tokens in the KV cache per decode, (K,), increasing."""
    mixed: Array
    """Iteration time, s, with a prefill chunk, (C, D, K)."""
    decode_only: Array
    """Iteration time, s, without one, (D, K)."""

    def times(self, chunk: ArrayLike, decodes: ArrayLike, kv_tokens: ArrayLike) -> Array:
        """Iteration times, s, of arrays that broadcast; ``chunk`` 0 means that no prefill runs."""
        chunk, decodes, kv_tokens = (np.asarray(each, dtype=float) for each in (chunk, decodes, kv_tokens))
        d, k = _place(self.decodes, decodes), _place(self.kv_tokens, kv_tokens)
        alone = _blend(self.decode_only[None], (_place(np.zeros(1), np.zeros_like(chunk)), d, k))
        beside = _blend(self.mixed, (_place(self.chunk, chunk), d, k))
        return np.where(chunk > 0, beside, alone)

    def crossover_chunk(self, decodes: float, kv_tokens: float = 0.0, *, alone: float | None = None) -> float:
        """The chunk, tokens, from which a mixed iteration takes at least ``alone`` s (inf where none does).

        ``alone`` is by default the decode-only time of the same decodes. For an affine curve this is its b0.
        """
        if alone is None:
            alone = float(self.times(0, decodes, kv_tokens))
        places = (_place(self.decodes, np.asarray(decodes)), _place(self.kv_tokens, np.asarray(kv_tokens)))
        gap = np.array([_blend(layer[None], (_NOWHERE, *places)) for layer in self.mixed]) - alone
        if gap[0] >= 0:
            return 0.0
        later = np.flatnonzero(gap >= 0)
        if later.size == 0:  # beyond the last knot, if the last piece rises
            rise = gap[-1] - gap[-2] if gap.size > 1 else 0.0
            return math.inf if rise <= 0 else self._cross(gap, gap.size - 1)
        return self._cross(gap, int(later[0]))

    def _cross(self, gap: Array, at: int) -> float:
        """Where the line through knots ``at`` - 1 and ``at`` is 0."""
        low, high = self.chunk[at - 1], self.chunk[at]
        return float(low + (high - low) * gap[at - 1] / (gap[at - 1] - gap[at]))


Place = tuple[NDArray[np.int64], Array]
_NOWHERE: Place = (np.zeros((), dtype=np.int64), np.zeros(()))


def _place(knots: Array, at: Array) -> Place:
    """The knot before each value, and the weight of the one after it (above 1 beyond the last knot)."""
    if knots.size == 1:
        return np.zeros(at.shape, dtype=np.int64), np.zeros(at.shape)
    low = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, knots.size - 2)
    return low, np.maximum((at - knots[low]) / (knots[low + 1] - knots[low]), 0.0)


def _blend(values: Array, places: tuple[Place, Place, Place]) -> Array:
    """Multilinear interpolation of ``values`` (C, D, K) at the three places."""
    total: Array = np.zeros(())
    for corner in np.ndindex(2, 2, 2):
        index: list[NDArray[np.int64]] = []
        weight: Array = np.ones(())
        for axis, (step, (low, share)) in enumerate(zip(corner, places, strict=True)):
            index.append(np.minimum(low + step, values.shape[axis] - 1))
            weight = weight * (share if step else 1.0 - share)
        total = total + weight * values[tuple(index)]
    return np.asarray(total)


@input_type
class IterationTime:
    """The affine curve of [L26]: ``alpha + beta C`` with a prefill chunk (eq. (3)), ``solo`` without (eq. (2)).

    Published fits have ``alpha < solo``, so that below ``C = b0 = (solo - alpha)/beta`` the line falls under the
    decode-only time and a prefill would speed decodes up. The curve is therefore ``max(solo, alpha + beta C)``
    unless ``physical=False`` asks for the raw line.
    """

    _: KW_ONLY
    form: Literal["affine"] = field(default="affine", repr=False)
    """Which form of curve this is; may be left out."""
    alpha: NonNegative
    """Intercept of the mixed iteration time, s."""
    beta: NonNegative
    """Slope of the mixed iteration time, s/token of prefill chunk."""
    solo: Positive
    """Decode-only iteration time 1/gamma, s."""
    physical: bool = True
    """Whether a prefill can only slow an iteration down (``max(solo, ...)``); False takes the line as it is."""

    def __post_init__(self) -> None:
        if self.alpha == 0 and self.beta == 0:
            raise InvalidInput("alpha and beta are both 0, so a prefill would take no time; make one positive")

    @property
    def crossover_chunk(self) -> float:
        """b0, tokens: the chunk at which the mixed line meets the decode-only time (inf where ``beta`` is 0)."""
        if self.beta == 0:
            return 0.0 if self.alpha >= self.solo else math.inf
        return max(0.0, (self.solo - self.alpha) / self.beta)

    @property
    def depends_on_kv(self) -> bool:
        """False: the affine curve does not know the KV cache."""
        return False

    def mixed(self, chunk: float, decodes: float = 0, kv_tokens: float = 0.0) -> float:  # noqa: ARG002 - flat in both
        """Iteration time tau (s) with a prefill chunk of ``chunk`` tokens, [L26] eq. (3)."""
        line = self.alpha + self.beta * chunk
        return max(self.solo, line) if self.physical else line

    def decode_only(self, decodes: float = 0, kv_tokens: float = 0.0) -> float:  # noqa: ARG002
        """Iteration time 1/gamma (s) without a prefill, [L26] eq. (2)."""
        return self.solo

    def grid(self) -> CurveGrid:
        """The same times on a grid of chunks: 0, b0 where the curve bends, and one more; exact."""
        bend = self.crossover_chunk if self.physical and math.isfinite(self.crossover_chunk) else 0.0
        chunk = _knots([bend])
        mixed = np.array([self.mixed(float(each)) for each in chunk])
        return CurveGrid(chunk, np.zeros(1), np.zeros(1), mixed[:, None, None], np.full((1, 1), self.solo))

    def _repr_html_(self) -> str:
        return card(
            "Iteration time, affine",
            facts(
                ("alpha", self.alpha, "s"),
                ("beta", self.beta, "s/token of prefill chunk"),
                ("solo", self.solo, "s without a prefill"),
                ("crossover chunk", self.crossover_chunk, "tokens"),
            ),
            curve_sketch(self, largest=1024.0),
        )


@input_type
class Kink:
    """Where a line bends."""

    _: KW_ONLY
    at: Chunk
    """Tokens of chunk, or decodes, from which on the slope is another."""
    slope: Slope
    """The slope from there on, s/token or s/decode."""


@input_type
class LinearTime:
    """A curve that is linear in the chunk C, the decodes n and their KV tokens n k, with kinks where it bends.

    With a prefill chunk an iteration takes ``alpha + beta C + per_decode n + per_kv_token n k``; without one,
    ``solo + solo_per_decode n + solo_per_kv_token n k``. From a kink on the slope in C or n is another, so that these
    terms may be piecewise linear.

    That a prefill never speeds decodes up is kept term by term: the part in C is at least ``solo``, the slope in n
    and that in n k at least those of decodes alone. ``physical=False`` takes the numbers as they are.
    """

    _: KW_ONLY
    form: Literal["linear"] = "linear"
    """Which form of curve this is."""
    alpha: Slope
    """Intercept of the mixed iteration time, s."""
    beta: Slope
    """Slope of the mixed iteration time in the chunk, s/token."""
    per_decode: Slope = 0.0
    """What a decode adds to a mixed iteration, s."""
    per_kv_token: Slope = 0.0
    """What a token in a decode's KV cache adds to a mixed iteration, s."""
    solo: Seconds
    """Intercept of the decode-only iteration time, s."""
    solo_per_decode: Slope = 0.0
    """What a decode adds to a decode-only iteration, s."""
    solo_per_kv_token: Slope = 0.0
    """What a token in a decode's KV cache adds to a decode-only iteration, s."""
    chunk_kinks: tuple[Kink, ...] = ()
    """Where the slope in the chunk becomes another, by increasing chunk."""
    decode_kinks: tuple[Kink, ...] = ()
    """Where the slope of the mixed time in the decodes becomes another."""
    solo_decode_kinks: tuple[Kink, ...] = ()
    """Where the slope of the decode-only time in the decodes becomes another."""
    physical: bool = True
    """Whether a prefill can only slow an iteration down; False takes the lines as they are."""

    def __post_init__(self) -> None:
        if self.alpha == 0 and self.beta == 0:
            raise InvalidInput("alpha and beta are both 0, so a prefill would take no time; make one positive")
        for line in ("chunk_kinks", "decode_kinks", "solo_decode_kinks"):
            places = [kink.at for kink in getattr(self, line)]
            if sorted(set(places)) != places:
                raise InvalidInput(f"{line} must be by increasing at, none twice; got at = {places}")

    @property
    def depends_on_kv(self) -> bool:
        """Whether a decode's KV cache adds to an iteration."""
        return self.per_kv_token > 0 or self.solo_per_kv_token > 0

    def mixed(self, chunk: float, decodes: float = 0, kv_tokens: float = 0.0) -> float:
        """Iteration time (s) with a prefill chunk of ``chunk`` tokens beside ``decodes`` decodes."""
        knots, _, beside = self._decode_terms
        cached = self._mixed_kv_slope * decodes * kv_tokens
        return float(self._prefill(chunk) + _line(knots, beside, decodes) + cached)

    def decode_only(self, decodes: float = 0, kv_tokens: float = 0.0) -> float:
        """Iteration time (s) with ``decodes`` decodes and no prefill."""
        knots, alone, _ = self._decode_terms
        return float(self.solo + _line(knots, alone, decodes) + self.solo_per_kv_token * decodes * kv_tokens)

    def grid(self) -> CurveGrid:
        """The same times on a grid whose knots are the kinks, exact."""
        decodes, alone, beside = self._decode_terms
        bends = [kink.at for kink in self.chunk_kinks]
        chunk = _knots([*bends, *self._crossing(_knots(bends))])
        kv_tokens = np.array([0.0, _KV_STEP]) if self.depends_on_kv else np.zeros(1)
        cached = decodes[:, None] * kv_tokens
        return CurveGrid(
            chunk,
            decodes,
            kv_tokens,
            np.array([self._prefill(float(each)) for each in chunk])[:, None, None]
            + beside[:, None]
            + self._mixed_kv_slope * cached,
            self.solo + alone[:, None] + self.solo_per_kv_token * cached,
        )

    def _prefill(self, chunk: float) -> float:
        """The part of a mixed iteration time that depends on the chunk, s."""
        line = self.alpha + _bent(self.beta, self.chunk_kinks, chunk)
        return max(self.solo, line) if self.physical else line

    def _crossing(self, knots: Array) -> list[float]:
        """The chunk at which the physical curve leaves ``solo``, where there is one."""
        line = np.array([self.alpha + _bent(self.beta, self.chunk_kinks, float(each)) for each in knots]) - self.solo
        if not self.physical or line[0] >= 0 or (line[-1] < 0 and line[-1] <= line[-2]):
            return []
        at = int(np.argmax(line >= 0)) if (line >= 0).any() else line.size - 1
        return [float(knots[at - 1] - line[at - 1] * (knots[at] - knots[at - 1]) / (line[at] - line[at - 1]))]

    @property
    def _mixed_kv_slope(self) -> float:
        return max(self.per_kv_token, self.solo_per_kv_token) if self.physical else self.per_kv_token

    @cached_property
    def _decode_terms(self) -> tuple[Array, Array, Array]:
        """Knots in the decodes, and what that many decodes add to decode-only and to mixed iterations, s."""
        knots = _knots(kink.at for kink in (*self.decode_kinks, *self.solo_decode_kinks))
        alone, beside = (
            np.diff([_bent(slope, kinks, float(each)) for each in knots])
            for slope, kinks in (
                (self.solo_per_decode, self.solo_decode_kinks),
                (self.per_decode, self.decode_kinks),
            )
        )
        if self.physical:
            beside = np.maximum(alone, beside)
        return knots, np.concatenate([[0.0], np.cumsum(alone)]), np.concatenate([[0.0], np.cumsum(beside)])

    def _repr_html_(self) -> str:
        per = {"per_decode": "s/decode", "per_kv_token": "s/token in the cache"}
        units = {"alpha": "s", "beta": "s/token of prefill chunk", "solo": "s without a prefill"} | per
        units |= {f"solo_{name}": unit for name, unit in per.items()}
        lines = {"chunk": self.chunk_kinks, "decodes": self.decode_kinks, "decodes alone": self.solo_decode_kinks}
        bends = [f"{line}: by {number(kink.slope)} from {kink.at:g} on" for line in lines for kink in lines[line]]
        return card(
            "Iteration time, linear",
            facts(*((name, getattr(self, name), unit) for name, unit in units.items())),
            bullets("Slopes that grow", bends),
            curve_sketch(self, largest=1024.0, decodes=16.0),
        )


_KV_STEP = 4096.0
"""Where the second knot of a line in the KV tokens lies; any place says the same."""


def curve_sketch(curve: ContentionCurve, *, largest: float, decodes: float = 0.0, kv_tokens: float = 0.0) -> str:
    """The curve over chunks up to ``largest`` tokens beside ``decodes`` decodes, drawn for a view."""
    chunks: Array = np.linspace(1.0, largest, 65)
    mixed = [1e3 * curve.mixed(float(chunk), decodes, kv_tokens) for chunk in chunks]
    alone = 1e3 * curve.decode_only(max(decodes, 1.0), kv_tokens)
    lines: dict[str, tuple[Numbers, Numbers]] = {
        "with a prefill chunk": (chunks, mixed),
        "decodes alone": ([1.0, largest], [alone, alone]),
    }
    beside = f" beside {decodes:g} decodes" if decodes else ""
    return sketch(lines, across="chunk, tokens", up=f"iteration{beside}, ms")


def _knots(bends: Iterable[float]) -> Array:
    """0, the bends in order, and one more knot that carries the slope of the last piece, far enough for its digits."""
    inner = sorted({0.0, *bends})
    return np.array([*inner, inner[-1] + max(inner[-1], 1024.0)])


def _bent(slope: float, kinks: tuple[Kink, ...], at: float) -> float:
    """A line through 0 with kinks."""
    ends = [0.0, *(kink.at for kink in kinks), math.inf]
    slopes = [slope, *(kink.slope for kink in kinks)]
    return sum(
        each * (min(at, high) - low) for each, (low, high) in zip(slopes, pairwise(ends), strict=True) if at > low
    )


def _line(knots: Array, values: Array, at: float) -> float:
    """Linear interpolation, going on with the last piece beyond the last knot."""
    low, share = _place(knots, np.asarray(float(at)))
    return float(values[low] * (1.0 - share) + values[low + 1] * share)


@input_type
class TabulatedTime:
    """A curve given by times on a rectangular table of chunks, decodes and KV tokens, linear between its entries.

    Beyond the last entry of an axis times go on along the last piece, or stay where that falls; below the first they
    stay, but for the chunk, along which the first piece goes on to 0. That a prefill never speeds decodes up
    (``physical``) is kept at every entry, and so everywhere between and beyond them.
    """

    _: KW_ONLY
    form: Literal["table"] = "table"
    """Which form of curve this is."""
    chunk: tuple[Chunk, ...]
    """Prefill chunks, tokens, (C,), increasing; at least two."""
    decodes: tuple[Tokens, ...]
    """Decodes, (D,), increasing."""
    kv_tokens: tuple[Tokens, ...] = (0.0,)
    """Mean tokens in the KV cache per decode, (K,), increasing; a single entry where times were measured at one."""
    mixed_seconds: tuple[tuple[tuple[Seconds, ...], ...], ...]
    """Iteration times with a prefill chunk, s, (C, D, K)."""
    decode_only_seconds: tuple[tuple[Seconds, ...], ...]
    """Iteration times without one, s, (D, K)."""
    physical: bool = True
    """Whether a prefill can only slow an iteration down; False takes the table as it is."""

    def __post_init__(self) -> None:
        axes = {"chunk": self.chunk, "decodes": self.decodes, "kv_tokens": self.kv_tokens}
        for axis, knots in axes.items():
            if len(knots) < (least := 2 if axis == "chunk" else 1):
                raise InvalidInput(f"{axis} must have at least {least} entries; got {list(knots)}")
            if any(after - before < 1e-3 for before, after in pairwise(knots)):
                raise InvalidInput(f"{axis} must increase from entry to entry; got {list(knots)}")
        columns = (len(self.decodes), len(self.kv_tokens))
        _check_shape("mixed_seconds", self.mixed_seconds, (len(self.chunk), *columns), "chunk, decodes, kv_tokens")
        _check_shape("decode_only_seconds", self.decode_only_seconds, columns, "decodes, kv_tokens")

    @property
    def depends_on_kv(self) -> bool:
        """Whether the table has several KV lengths."""
        return len(self.kv_tokens) > 1

    def mixed(self, chunk: float, decodes: float = 0, kv_tokens: float = 0.0) -> float:
        """Iteration time (s) with a prefill chunk of ``chunk`` tokens beside ``decodes`` decodes."""
        grid = self._grid
        places = (_place(grid.chunk, np.asarray(float(chunk))), *self._columns(decodes, kv_tokens))
        return float(_blend(grid.mixed, places))

    def decode_only(self, decodes: float = 0, kv_tokens: float = 0.0) -> float:
        """Iteration time (s) with ``decodes`` decodes and no prefill."""
        return float(_blend(self._grid.decode_only[None], (_NOWHERE, *self._columns(decodes, kv_tokens))))

    def _columns(self, decodes: float, kv_tokens: float) -> tuple[Place, Place]:
        grid = self._grid
        return _place(grid.decodes, np.asarray(float(decodes))), _place(grid.kv_tokens, np.asarray(float(kv_tokens)))

    def grid(self) -> CurveGrid:
        """The same times on a grid: the table's entries, chunk 0, and a knot beyond each axis."""
        return self._grid

    @cached_property
    def _grid(self) -> CurveGrid:
        chunk, decodes, kv_tokens = (
            np.asarray(each, dtype=float) for each in (self.chunk, self.decodes, self.kv_tokens)
        )
        alone, beside = np.asarray(self.decode_only_seconds), np.asarray(self.mixed_seconds)
        slope = np.maximum(beside[1] - beside[0], 0.0) / (chunk[1] - chunk[0])
        beside = np.concatenate([np.maximum(beside[:1] - slope * chunk[0], 0.0), beside])
        # Decode-only time, what a prefill adds and what a longer chunk adds go on separately, so that none ever falls.
        extra = np.maximum(beside - alone, 0.0) if self.physical else beside - alone
        rise = np.maximum(extra[-1] - extra[-2], 0.0)
        alone, extra, rise = _beyond(alone), _beyond(extra), _beyond(rise)
        return CurveGrid(
            _one_more(np.concatenate([[0.0], chunk])),
            _one_more(decodes),
            _one_more(kv_tokens),
            alone + np.concatenate([extra, (extra[-1] + rise)[None]]),
            alone,
        )

    def _repr_html_(self) -> str:
        axes = {"chunk": "tokens", "decodes": "requests", "kv_tokens": "tokens in the cache per decode"}
        return card(
            "Iteration time, tabulated",
            facts(*((name, ", ".join(map(number, getattr(self, name))), unit) for name, unit in axes.items())),
            curve_sketch(self, largest=self.chunk[-1], decodes=self.decodes[-1], kv_tokens=self.kv_tokens[0]),
        )


def _one_more(knots: Array) -> Array:
    """The knots and one beyond them, as far again as the last two are apart."""
    return np.append(knots, 2.0 * knots[-1] - knots[-2]) if knots.size > 1 else knots


def _beyond(values: Array) -> Array:
    """``values`` (..., D, K) at one more knot of both axes: the last piece goes on, unless it falls."""
    for axis in (-1, -2):
        if values.shape[axis] > 1:
            end, before = (np.take(values, [at], axis) for at in (-1, -2))
            values = np.concatenate([values, end + np.maximum(end - before, 0.0)], axis)
    if min(values.shape[-2:]) > 1:  # so that no slope along one axis falls along the other
        corner = values[..., -1, -2] + values[..., -2, -1] - values[..., -2, -2]
        values[..., -1, -1] = np.maximum(values[..., -1, -1], corner)
    return values


def _check_shape(field: str, table: Any, shape: tuple[int, ...], axes: str) -> None:
    """Refuse a nested tuple that is no rectangular table of this shape."""
    level = [table]
    for depth, size in enumerate(shape):
        for each in level:
            if len(each) != size:
                raise InvalidInput(
                    f"{field} must have shape {shape} ({axes}); found {len(each)} in place of {size} entries at "
                    f"level {depth + 1}"
                )
        level = [inner for each in level for inner in each]


_FORMS: Mapping[str, str] = {"affine": "IterationTime", "linear": "LinearTime", "table": "TabulatedTime"}
_AFFINE, _LINEAR, _TABLE = ({each.name for each in fields(cls)} for cls in (IterationTime, LinearTime, TabulatedTime))


def _form_of(value: Any) -> str | None:
    """The curve type that a value is or, by its ``form`` or what it holds, is meant to be."""
    for cls in (LinearTime, TabulatedTime):
        if isinstance(value, cls):
            return cls.__name__
    if not isinstance(value, Mapping):
        return "IterationTime"
    form = value.get("form")
    if form is None:
        given = set(value)
        form = "table" if given & (_TABLE - _AFFINE) else "linear" if given & (_LINEAR - _AFFINE) else "affine"
    return _FORMS.get(form) if isinstance(form, str) else None


Curve = Annotated[
    Annotated[IterationTime, Tag("IterationTime")]
    | Annotated[LinearTime, Tag("LinearTime")]
    | Annotated[TabulatedTime, Tag("TabulatedTime")],
    Discriminator(
        _form_of,
        custom_error_type="curve_form",
        custom_error_message="must have form 'affine', 'linear' or 'table'",
    ),
]
"""Any of the curves; a file says which by ``form``, and means the affine one where it does not."""
