"""The law at a time, by uniformisation, with a bound on what was left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

from fluidopt.errors import InvalidInput
from fluidopt.simulation.system import FloatArray

LIMIT = 10**7
"""Most products of a vector with the generator before a transient law is refused."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TransientLaw:
    """The law of the chain at a time.

    Attributes:
        time: s.
        law: (S,), sum 1 - `truncation_error` at least.
        truncation_error: bound on the sum of |law - exact law|, rounding aside: the weight of the terms left out.
        products: products of a vector with the generator that it took.
    """

    time: float
    law: FloatArray
    truncation_error: float
    products: int


def transient_law(
    generator: sparse.csr_array, start: FloatArray, time: float, *, tolerance: float = 1e-12
) -> TransientLaw:
    """The law at `time` (s) of the chain that starts from the law `start`, (S,).

    p(t) = sum_k Poisson(k; rate t) start P^k with P = 1 + Q/rate; the terms left out on both sides weigh at most
    `tolerance`, and what they do weigh is reported. Costs about rate times `time` products, rate the largest rate of
    leaving a state; every term is nonnegative, so nothing cancels.

    Raises:
        InvalidInput: an argument is out of range, or the products needed pass `LIMIT`.
    """
    start = np.asarray(start, dtype=float)
    if start.shape != (generator.shape[0],) or not start.min() >= 0 or not abs(start.sum() - 1) <= 1e-9:
        raise InvalidInput(f"transient: start must be a law over the {generator.shape[0]} states")
    if not (np.isfinite(time) and time >= 0):
        raise InvalidInput(f"transient: time must be finite and at least 0 s; got {time!r}")
    if not 0 < tolerance < 1:
        raise InvalidInput(f"transient: tolerance must be between 0 and 1; got {tolerance!r}")
    rate = float(-generator.diagonal().min())
    mean = rate * time
    if mean == 0.0:
        return TransientLaw(time=float(time), law=start.copy(), truncation_error=0.0, products=0)
    if mean > LIMIT:
        raise InvalidInput(
            f"transient: {time:g} s need about {mean:.2g} products, more than {LIMIT:g}; use the stationary law"
        )
    poisson = stats.poisson(mean)
    first, last = int(poisson.ppf(tolerance / 2)), int(poisson.isf(tolerance / 2)) + 1
    weights = poisson.pmf(np.arange(first, last + 1))
    step = (generator.T / rate).tocsr()
    current, law = start.copy(), np.zeros(start.size)
    for k in range(last + 1):
        if k >= first:
            law += weights[k - first] * current
        if k < last:
            current = np.maximum(current + step @ current, 0.0)
    left_out = float(poisson.cdf(first - 1) + poisson.sf(last)) if first > 0 else float(poisson.sf(last))
    return TransientLaw(time=float(time), law=law, truncation_error=left_out, products=last)
