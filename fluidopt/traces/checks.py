"""This module owns what the columns and the arguments of a trace may be, with the messages for what they may not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidopt.errors import InvalidInput

MOST_TOKENS = 1_000_000_000
"""Token counts above this are taken for faults of the file."""
INSTANT = 1e-9
"""Seconds; requests within less arrive at a single instant, from which no rate can be told."""


def one_dimensional(name: str, values: ArrayLike, dtype: Any) -> NDArray[Any]:
    """Return a column as an array of this type.

    Raises:
        InvalidInput: it cannot be one, or has another number of dimensions.
    """
    try:
        column = np.asarray(values, dtype=dtype)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(f"Trace: {name} must be an array of {_KINDS[dtype]}; got {values!r:.80}") from None
    if column.ndim != 1:
        raise InvalidInput(f"Trace: {name} must have one dimension; got shape {column.shape}")
    return column


_KINDS: dict[Any, str] = {np.float64: "numbers (seconds)", np.str_: "texts"}


def token_counts(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """Return a column of token counts.

    Raises:
        InvalidInput: one is not a whole number from 1 to `MOST_TOKENS`.
    """
    try:
        given = np.asarray(values)
        tokens = given if given.dtype.kind in "iu" else given.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(f"Trace: {name} must be an array of token counts; got {values!r:.80}") from None
    if tokens.ndim != 1:
        raise InvalidInput(f"Trace: {name} must have one dimension; got shape {tokens.shape}")
    good = (tokens >= 1) & (tokens <= MOST_TOKENS)
    if tokens.dtype.kind == "f":
        good &= tokens == np.floor(tokens)
    if not good.all():
        raise InvalidInput(
            f"Trace: {name} must be whole numbers from 1 to {MOST_TOKENS:,}; got {first_bad(tokens, ~good)} "
            "(a request that generated nothing failed or was cancelled: leave it out)"
        )
    return tokens.astype(np.int64, copy=False)


def read_only(column: NDArray[Any]) -> NDArray[Any]:
    """The column itself where nobody can write to it, else a copy: read-only either way."""
    own = column if column.flags.owndata and not column.flags.writeable else column.copy()
    own.setflags(write=False)
    return own


def measured_times(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Return a column of times of which some may be unknown.

    Raises:
        InvalidInput: one is infinite.
    """
    time: NDArray[np.float64] = one_dimensional(name, values, np.float64)
    if np.isinf(time).any():
        raise InvalidInput(f"Trace: {name} must be finite, or NaN where unknown; got {first_bad(time, np.isinf(time))}")
    return time


def first_bad(values: NDArray[Any], bad: NDArray[np.bool_]) -> str:
    """Say which value is the first bad one, and where."""
    index = int(np.argmax(bad))
    return f"{values[index].item()!r} at index {index}"


def is_number(value: object) -> bool:
    """Whether ``value`` is a number, which True and False are not."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def finite_seconds(caller: str, name: str, value: float, *, positive: bool = False) -> float:
    """Return a time, or a length of time where it has to be positive.

    Raises:
        InvalidInput: it is not a finite number, or not above 0 where it has to be.
    """
    if not (is_number(value) and math.isfinite(value) and (value > 0.0 or not positive)):
        rule = "a finite number of seconds" + (" above 0" if positive else "")
        raise InvalidInput(f"Trace.{caller}: {name} must be {rule}; got {value!r}")
    return float(value)


def generator_of(seed: Any, caller: str) -> np.random.Generator:
    """Return the random generator that ``seed`` means.

    Raises:
        InvalidInput: ``seed`` is neither a whole number of at least 0 nor a SeedSequence nor a Generator.
    """
    if seed is not None and not isinstance(seed, bool):
        try:
            generator: np.random.Generator = np.random.default_rng(seed)
        except (TypeError, ValueError):
            pass
        else:
            return generator
    raise InvalidInput(
        f"{caller}: seed must be a whole number of at least 0, a SeedSequence or a Generator; got {seed!r}"
    )


def observation_period(value: float, span: float) -> float:
    """Return the length of the observed period, s.

    Raises:
        InvalidInput: it is no length, or shorter than the span of the requests.
    """
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0.0):
        raise InvalidInput(f"Trace: observation_time must be a finite number of seconds above 0; got {value!r}")
    if seconds < INSTANT:
        raise InvalidInput(
            f"Trace: observation_time is {seconds:g} s, from which no rate can be told; give at least {INSTANT:g} "
            "s, or leave it out"
        )
    if seconds < span:
        raise InvalidInput(
            f"Trace: observation_time is {seconds:g} s, but the requests span {span:g} s; give at least "
            "that, or leave it out"
        )
    return seconds
