"""This module owns the seam between iteration-time curves and what reads them fast: times on a grid, linear between."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


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


Place = tuple[NDArray[np.int64], Array]


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
        index, weight = [], 1.0
        for axis, (step, (low, share)) in enumerate(zip(corner, places, strict=True)):
            index.append(np.minimum(low + step, values.shape[axis] - 1))
            weight = weight * (share if step else 1.0 - share)
        total = total + weight * values[tuple(index)]
    return np.asarray(total)
