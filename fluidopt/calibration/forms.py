"""This module owns the forms that a fit may take: from measurements to the curve of each form, and its coefficients.

Decode-only times are fitted apart from mixed ones, because the intercept of the mixed line is not the decode-only
time. Slopes are at least 0: more work never takes less time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fluidopt.calibration.regression import (
    NO_KINKS,
    Coefficient,
    Column,
    Kinks,
    Measurements,
    chosen_kinks,
    determined,
    piece,
    pieces,
    regress,
)
from fluidopt.curves import Array, IterationTime, Kink, LinearTime, TabulatedTime
from fluidopt.errors import InvalidInput

Form = Literal["affine", "linear", "piecewise", "table"]
FORMS: tuple[Form, ...] = ("affine", "linear", "piecewise", "table")
"""From the simplest to the one that follows the measurements most closely."""
MOST_ENTRIES = 100_000
"""Entries of a table at most."""
Fitted = IterationTime | LinearTime | TabulatedTime


@dataclass(frozen=True)
class Outcome:
    """A curve of one form, with the coefficients behind it (none of a table) and what had to be assumed."""

    curve: Fitted
    coefficients: tuple[Coefficient, ...] = ()
    notes: tuple[str, ...] = ()


def fit_form(form: Form, measured: Measurements, *, physical: bool) -> Outcome:
    """Fit one form.

    Raises:
        InvalidInput: the measurements do not determine it.
    """
    alone, beside = measured.alone, measured.beside
    if not len(alone):
        raise InvalidInput(
            "there is no decode-only measurement (chunk 0), and the mixed line at chunk 0 is none; measure some"
        )
    if (sizes := np.unique(beside.chunk).size) < 2:
        raise InvalidInput(f"mixed times are measured at {sizes} chunk size(s); a slope needs at least 2")
    try:
        return _fitted(form, alone, beside, physical)
    except InvalidInput as error:  # a rule of the curve's, broken by what was measured
        hint = "" if form == "table" else "; take form='table'"
        raise InvalidInput(f"form {form!r} does not fit these measurements: {error}{hint}") from None


def _fitted(form: Form, alone: Measurements, beside: Measurements, physical: bool) -> Outcome:
    if form == "affine":
        return _affine(alone, beside, physical)
    if form == "table":
        return Outcome(_table(alone, beside, physical))
    return _linear(alone, beside, physical, bent=form == "piecewise")


# ---- lines --------------------------------------------------------------------------------------------------------


def _intercept(name: str, measured: Measurements) -> Column:
    return Column(name, np.ones(len(measured)), "s")


def _affine(alone: Measurements, beside: Measurements, physical: bool) -> Outcome:
    alpha, beta = regress([_intercept("alpha", beside), *pieces("beta", beside.chunk, (), "s/token")], beside)
    (solo,) = regress([_intercept("solo", alone)], alone)
    curve = IterationTime(alpha=alpha.value, beta=beta.value, solo=solo.value, physical=physical)
    return Outcome(curve, (alpha, beta, solo))


def _decode_terms(measured: Measurements, kinks: Sequence[float], prefix: str) -> list[Column]:
    """What decodes add: a piecewise linear term in their number, and one in their KV tokens."""
    cached = Column(f"{prefix}per_kv_token", measured.decodes * measured.kv_tokens, "s/KV token")
    return [*pieces(f"{prefix}per_decode", measured.decodes, kinks, "s/decode"), cached]


def _line(
    measured: Measurements, columns: Callable[[Kinks], list[Column]], axes: Mapping[str, str]
) -> tuple[dict[str, Coefficient], Kinks]:
    """The coefficients of those terms that the measurements determine, and the kinks along ``axes`` (axis by term)."""
    told = {column.name for column in determined(columns(NO_KINKS), measured.weight)}

    def of(at: Kinks) -> list[Column]:
        return [column for column in columns(at) if column.term in told]

    kinks = chosen_kinks(of, measured, [axis for term, axis in axes.items() if term in told])
    return {each.name: each for each in regress(of(kinks), measured)}, kinks


def _linear(alone: Measurements, beside: Measurements, physical: bool, *, bent: bool) -> Outcome:
    """The linear form; with kinks (``bent``), where they are worth it."""
    notes = []
    solo, solo_kinks = _line(
        alone,
        lambda at: [_intercept("solo", alone), *_decode_terms(alone, at["decodes"], "solo_")],
        {"solo_per_decode": "decodes"} if bent else {},
    )
    if "solo_per_decode" not in solo:
        notes.append(f"decode-only times are at {alone.decodes[0]:g} decodes only: what a decode adds is part of solo")
    elif "solo_per_kv_token" not in solo:
        notes.append("decode-only times are at one KV length only: what it adds is part of solo_per_decode")

    def columns(at: Kinks) -> list[Column]:
        chunk = pieces("beta", beside.chunk, at["chunk"], "s/token")
        return [_intercept("alpha", beside), *chunk, *_decode_terms(beside, at["decodes"], "")]

    told = {column.name for column in determined(columns(NO_KINKS), beside.weight)}
    borrowed = {f"solo_{name}" for name in ("per_decode", "per_kv_token") if name not in told} & set(solo)
    taken = np.zeros(len(beside))
    if borrowed:
        notes.append(
            f"the mixed times do not tell what a {'decode' if 'solo_per_decode' in borrowed else 'KV token'} adds: "
            "taken from the decode-only times"
        )
        for column in _decode_terms(beside, solo_kinks["decodes"], "solo_"):
            if column.term in borrowed:
                taken += solo[column.name].value * column.values
    axes = {"beta": "chunk", "per_decode": "decodes"} if bent else {}
    mixed, kinks = _line(replace(beside, seconds=beside.seconds - taken), columns, axes)
    if "solo_per_decode" in borrowed:
        kinks = {"chunk": kinks["chunk"], "decodes": solo_kinks["decodes"]}

    def slope(name: str) -> float:
        found = mixed.get(name) or solo.get(name) or solo.get(f"solo_{name}")
        return found.value if found else 0.0

    def bends(term: str, places: Sequence[float]) -> tuple[Kink, ...]:
        return tuple(Kink(at=at, slope=slope(piece(term, at))) for at in places)

    curve = LinearTime(
        alpha=slope("alpha"),
        beta=slope("beta"),
        per_decode=slope("per_decode"),
        per_kv_token=slope("per_kv_token"),
        solo=slope("solo"),
        solo_per_decode=slope("solo_per_decode"),
        solo_per_kv_token=slope("solo_per_kv_token"),
        chunk_kinks=bends("beta", kinks["chunk"]),
        decode_kinks=bends("per_decode", kinks["decodes"]),
        solo_decode_kinks=bends("solo_per_decode", solo_kinks["decodes"]),
        physical=physical,
    )
    return Outcome(curve, (*mixed.values(), *solo.values()), tuple(notes))


# ---- the table ----------------------------------------------------------------------------------------------------


def _table(alone: Measurements, beside: Measurements, physical: bool) -> TabulatedTime:
    """The measurements on a rectangular table; what was not measured is filled in, first along the KV length.

    Decode-only times are filled along the KV length and then the decodes. Of mixed ones only what the prefill adds
    to them is filled, which changes less: along the KV length, then the chunk, then the decodes.
    """
    chunk = np.unique(beside.chunk)
    decodes = np.union1d(alone.decodes, beside.decodes)
    kv_tokens = np.unique(np.concatenate([each.kv_tokens[each.decodes > 0] for each in (alone, beside)]))
    if kv_tokens.size == 0:
        kv_tokens = np.zeros(1)
    if (entries := chunk.size * decodes.size * kv_tokens.size) > MOST_ENTRIES:
        raise InvalidInput(
            f"a table of {chunk.size} chunks, {decodes.size} numbers of decodes and {kv_tokens.size} KV lengths has "
            f"{entries:,} entries, more than {MOST_ENTRIES:,}; round them, or take form='piecewise'"
        )
    slope = _kv_slope(alone)
    columns = {
        n: _along(*_means(alone.where(alone.decodes == n)), kv_tokens, slope=slope * n)
        for n in np.unique(alone.decodes)
    }
    known = np.array(list(columns))
    solo = np.stack([_along(known, times, decodes) for times in np.array(list(columns.values())).T], axis=1)
    solo = np.maximum(solo, 0.5 * alone.seconds.min())  # a line back to fewer decodes than measured may not vanish

    extra = np.full((chunk.size, decodes.size, kv_tokens.size), np.nan)
    alone_at: list[tuple[int, int, float, float]] = []  # measured at one KV length only: a level, no shape
    for d, n in enumerate(decodes):
        those = beside.where(beside.decodes == n)
        for c in np.flatnonzero(np.isin(chunk, those.chunk)):
            at, seconds = _means(those.where(those.chunk == chunk[c]))
            if n == 0:  # no decode, no KV cache
                extra[c, d] = seconds[0] - solo[d]
                continue
            added = seconds - np.interp(at, kv_tokens, solo[d])
            if at.size == 1 < kv_tokens.size:
                alone_at.append((int(c), d, float(at[0]), float(added[0])))
            else:
                extra[c, d] = _along(at, added, kv_tokens)
    if np.isnan(extra).all():  # no column has a shape: all are flat
        for row, column, _, level in alone_at:
            extra[row, column] = level
    extra = _filled(extra, chunk, decodes)
    for row, column, place, level in alone_at:
        extra[row, column] += level - np.interp(place, kv_tokens, extra[row, column])
    mixed = np.maximum(solo + extra, 1e-3 * solo)
    return TabulatedTime(
        chunk=tuple(chunk.tolist()),
        decodes=tuple(decodes.tolist()),
        kv_tokens=tuple(kv_tokens.tolist()),
        mixed_seconds=_nested(mixed),
        decode_only_seconds=_nested(solo),
        physical=physical,
    )


def _filled(extra: Array, chunk: Array, decodes: Array) -> Array:
    """Columns (C, D) that are nan, filled along the chunk and then the decodes.

    What is filled along the chunk is the difference to the decodes measured at most chunks, for it changes least.
    """
    measured = ~np.isnan(extra[:, :, 0])
    full, some = int(np.argmax(measured.sum(axis=0))), measured.any(axis=0)
    filled = np.empty_like(extra)
    for k in range(extra.shape[2]):
        lead = _along(chunk[measured[:, full]], extra[measured[:, full], full, k], chunk)
        shift = np.stack(
            [
                np.interp(chunk, chunk[there], column[there] - lead[there])
                for column, there in zip(extra[:, some, k].T, measured[:, some].T, strict=True)
            ]
        )
        filled[:, :, k] = lead[:, None] + np.stack([np.interp(decodes, decodes[some], row) for row in shift.T])
    return filled


def _nested(values: Array) -> Any:
    """An array as nested tuples."""
    return tuple(_nested(each) for each in values) if values.ndim else float(values)


def _means(measured: Measurements) -> tuple[Array, Array]:
    """KV lengths, increasing, and the mean time at each."""
    at, place = np.unique(measured.kv_tokens, return_inverse=True)
    return at, np.bincount(place, measured.seconds) / np.bincount(place)


def _kv_slope(alone: Measurements) -> float:
    """What one KV token adds to a decode-only iteration, s, by the linear form; 0 where that is not told."""
    columns = [_intercept("solo", alone), *_decode_terms(alone, (), "")]
    found = regress(determined(columns, alone.weight), alone)
    return next((each.value for each in found if each.name == "per_kv_token"), 0.0)


def _along(at: Array, values: Array, knots: Array, *, slope: float = 0.0) -> Array:
    """Values at the knots: linear between the places ``at``, and beyond them with the first and last slope, if rising.

    ``slope`` is what one place alone is continued with.
    """
    if at.size == 1:
        return np.asarray(values[0] + slope * (knots - at[0]))
    first, last = (max(0.0, float(each)) for each in (np.diff(values) / np.diff(at))[[0, -1]])
    beyond = last * np.maximum(0.0, knots - at[-1]) - first * np.maximum(0.0, at[0] - knots)
    return np.asarray(np.interp(knots, at, values) + beyond)
