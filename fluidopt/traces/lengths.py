"""This module owns how long prompts and answers are: their quantiles, and how near they come to exponential ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput
from fluidopt.traces.checks import is_number
from fluidopt.traces.statistics import members
from fluidopt.traces.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

MOST_BINS = 100_000
CUT = 0.999
"""Bins of equal width go up to this quantile; what is longer shares the last bin."""


def lengths(trace: Trace, *, quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)) -> pd.DataFrame:
    """Return the distribution of prompt and output tokens: two rows per label, and two named "all".

    Columns: ``label``; ``tokens``, "prompt" or "output"; ``requests``; ``mean``; ``cv``, standard deviation over mean
    (1 for an exponential law); ``least``; a column per quantile, such as ``q0.95``; ``most``.

    Raises:
        InvalidInput: a quantile is not a number from 0 to 1.
    """
    import pandas as pd

    levels = list(quantiles)
    for level in levels:
        if not (is_number(level) and 0.0 <= level <= 1.0):
            raise InvalidInput(f"Trace.lengths: quantiles must be numbers from 0 to 1; got {level!r}")
    rows = []
    for label, name, tokens in _columns(trace):
        row = {"label": label, "tokens": name, "requests": tokens.size, "mean": tokens.mean(), "cv": _cv(tokens)}
        row["least"] = tokens.min()
        row.update(zip((f"q{level:g}" for level in levels), np.quantile(tokens, levels), strict=True))
        rows.append({**row, "most": tokens.max()})
    return pd.DataFrame(rows)


def exponential_fit(trace: Trace, *, bins: int | Sequence[int] = 50) -> pd.DataFrame:
    """Return how far the lengths are from the exponential law that the fluid model and its chain take them for.

    The law fitted is the exponential one of the same mean, rounded up to whole tokens: P(length > k) = (1 - 1/mean)^k,
    the geometric law, which is the maximum-likelihood fit. Two distances from it:

    ``kl``: Kullback-Leibler divergence sum p log(p/q), nats, of the shares p of the lengths in bins from the law's
    probabilities q, as in [L26] Table 2. The paper does not state its bins; here they have equal widths of whole
    tokens (``width``, at least 1), ``bins`` of them up to the 99.9th percentile, and one more for all that is longer.
    The number depends on the binning: finer bins see more, and noise too, of which ``kl_noise`` = bins / (2 requests)
    is the mean if the law held. Compare numbers of one binning only, and ask for several: ``bins=(10, 50, 250)``.

    ``ks``: Kolmogorov-Smirnov distance, the largest difference between the two distribution functions, without bins.

    Two rows per label and number of bins, and two named "all"; the other columns are ``label``, ``tokens`` ("prompt" or
    "output"), ``requests``, ``mean`` and ``cv`` (1 for an exponential law).

    Raises:
        InvalidInput: ``bins`` is not a whole number from 2 to 100,000, or a list or tuple of them.
    """
    import pandas as pd

    counts = _bin_counts(bins)
    rows = []
    for label, name, tokens in _columns(trace):
        values, requests = np.unique(tokens, return_counts=True)
        fit = {"ks": _kolmogorov_smirnov(values, requests), "mean": tokens.mean(), "cv": _cv(tokens)}
        for count in counts:
            edges, shares, law = exponential_bins(tokens, bins=count)
            some = shares > 0.0
            rows.append(
                {
                    "label": label,
                    "tokens": name,
                    "requests": tokens.size,
                    "mean": fit["mean"],
                    "cv": fit["cv"],
                    "bins": count,
                    "width": int(edges[1]),
                    "kl": max(0.0, float((shares[some] * (np.log(shares[some]) - law[some])).sum())),
                    "kl_noise": (edges.size - 1) / (2 * tokens.size),
                    "ks": fit["ks"],
                }
            )
    return pd.DataFrame(rows)


def exponential_bins(
    tokens: NDArray[np.int64], *, bins: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return edges of the bins, the share of the lengths in each, and the log of the fitted law's probability.

    K + 1 edges, from 0 on, and K + 1 shares: bin k has the lengths above edge k up to edge k + 1, the last one all
    above the last edge.
    """
    upto = float(np.quantile(tokens, CUT))
    width = max(1, math.ceil(upto / bins))
    count = max(1, math.ceil(upto / width))
    edges = width * np.arange(count + 1)
    shares = np.bincount(np.minimum((tokens - 1) // width, count), minlength=count + 1) / tokens.size
    decay = _log_decay(tokens.mean())
    # In logs, as probabilities far out would be rounded to 0, where a share above 0 is infinitely far away.
    law = np.append(edges[:-1] * decay + math.log(-math.expm1(width * decay)), edges[-1] * decay)
    return edges, shares, law


def _kolmogorov_smirnov(values: NDArray[np.int64], requests: NDArray[np.int64]) -> float:
    decay = _log_decay(float(values @ requests) / requests.sum())
    after = np.cumsum(requests) / requests.sum()
    before = np.append(0.0, after[:-1])
    # Both functions step at whole numbers: they are farthest apart at a step or just before one.
    at_step = np.abs(after + np.expm1(values * decay))
    before_step = np.abs(before + np.expm1((values - 1) * decay))
    return float(max(at_step.max(), before_step.max()))


def _log_decay(mean: float) -> float:
    """Log of P(length > k + 1) / P(length > k). With a mean of 1 token no length is above 1: as good as -inf."""
    return math.log1p(-1.0 / mean) if mean > 1.0 else -1e3


def _columns(trace: Trace) -> Iterator[tuple[str, str, NDArray[np.int64]]]:
    for label, where in members(trace).items():
        yield label, "prompt", trace.prompt_tokens[where]
        yield label, "output", trace.output_tokens[where]


def _cv(tokens: NDArray[np.int64]) -> float:
    return float(tokens.std() / tokens.mean())


def _bin_counts(bins: int | Sequence[int]) -> list[int]:
    counts: list[Any] = [*bins] if isinstance(bins, (tuple, list)) else [bins]
    for count in counts:
        whole = isinstance(count, (int, np.integer)) and not isinstance(count, bool)
        if not (whole and 2 <= count <= MOST_BINS):
            raise InvalidInput(
                f"Trace.exponential_fit: bins must be whole numbers from 2 to {MOST_BINS:,}; got {bins!r}"
            )
    return [int(count) for count in counts]
