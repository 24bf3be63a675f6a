"""What can be said from a simulation: warm-up, batches, control variates, confidence intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from fluidopt.program import Array
from fluidopt.simulation.system import Totals
from fluidopt.views import card, figures, paragraph

LEVEL = 0.95
BATCHES_PER_CONTROL = 3
ENOUGH_BATCHES = 20


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval (Student t)."""

    mean: float
    half_width: float
    standard_error: float
    effective_size: float
    """Effective sample size: how many independent batches without variance reduction would give this standard error."""

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % confidence interval."""
        return self.mean - self.half_width, self.mean + self.half_width

    def __str__(self) -> str:
        return f"{self.mean:.6g} ± {self.half_width:.2g} (95 %, effective sample size {self.effective_size:.3g})"

    def _repr_html_(self) -> str:
        low, high = self.interval
        words = f"95 % interval {low:.6g} to {high:.6g}, effective sample size {self.effective_size:.3g}"
        return card("Estimate", figures(("Mean", self, "")), paragraph(words, muted=True))


@dataclass(frozen=True, eq=False)
class Batches:
    """Segments of time of equal length, gathered into independent batches, and how estimates are made of them.

    Control variates are quantities whose mean is known to be 0. The estimate of a mean is the intercept of its
    regression on them over the segments, which is one and the same weighted average for every quantity (the weights add
    up to 1 and balance the controls to 0). The jackknife, leaving out one batch at a time, takes off the bias of
    fitting the regression and gives the standard error, which therefore counts the correlation inside a batch and what
    fitting costs.
    """

    controls: Array
    """(N, C) of each segment, replication after replication; C = 0 for plain averages."""
    size: int
    """Segments per batch; batches are N/size."""
    rarest: float = 0.0
    """Least standard error relative to the mean: what never happened in the simulation may still happen."""

    @cached_property
    def _regression(self) -> tuple[Array, Array]:
        """Orthonormal basis of the centred controls, (N, rank), and the weights of the intercept, (N,)."""
        count = len(self.controls)
        mean = self.controls.mean(axis=0)
        centred = self.controls - mean
        scale = np.sqrt((centred**2).sum(axis=0))
        varies = scale > 1e-9 * np.sqrt(count) * np.abs(self.controls).max(axis=0, initial=0.0)
        left, size, right = np.linalg.svd(centred[:, varies] / scale[varies], full_matrices=False)
        rank = int((size > 1e-6 * size.max(initial=0.0)).sum())
        left, size, right = left[:, :rank], size[:rank], right[:rank]
        return left, 1 / count - left @ (right @ (mean[varies] / scale[varies]) / size)

    def __len__(self) -> int:
        return len(self.controls) // self.size

    @cached_property
    def _outside(self) -> Array:
        """By batch and segment: by what to multiply a batch's residuals to get the change of the estimate without it.

        That is g (1 - H)^-1, with g the batch's weights and H its block of the regression's projection (what Bell and
        McCaffrey, Survey Methodology 28, 2002, call the jackknife estimator of clusters).
        """
        basis, weights = self._regression
        count = len(weights)
        whole = np.column_stack([np.full(count, 1 / np.sqrt(count)), basis]).reshape(len(self), self.size, -1)
        block = np.eye(self.size) - whole @ whole.swapaxes(1, 2)
        # singular where a control varies in one batch only: without that batch it is no control
        inverse = np.linalg.pinv(block, rcond=1e-9, hermitian=True)
        outside: Array = (inverse @ weights.reshape(len(self), self.size, 1))[..., 0]
        return outside

    @property
    def weights(self) -> Array:
        """Weight of each segment, (N,)."""
        return self._regression[1]

    @property
    def quantile(self) -> float:
        """Half-widths over standard errors."""
        freedom = len(self) - 1 - self._regression[0].shape[1]
        return float(stats.t.ppf(0.5 + LEVEL / 2, max(freedom, 1)))

    def residuals(self, values: Array) -> Array:
        """What the controls leave of ``values``, (N, ...), about the mean."""
        basis, _ = self._regression
        centred = values - values.mean(axis=0)
        left: Array = centred - np.tensordot(basis, np.tensordot(basis.T, centred, axes=1), axes=1)
        return left

    def jackknife(self, values: Array) -> tuple[Array, Array]:
        """Means of ``values``, (N, ...), and by how much leaving out each batch changes them, (batches, ...)."""
        batches, rest = len(self), values.shape[1:]
        residuals = self.residuals(values).reshape(batches, self.size, -1)
        changes = np.einsum("bs,bsq->bq", self._outside, residuals).reshape(batches, *rest)
        bias = (batches - 1) * changes.mean(axis=0)
        return np.tensordot(self.weights, values, axes=1) + bias, changes

    def estimates(self, values: Array) -> tuple[Array, Array, Array]:
        """Means, standard errors and effective sample sizes of ``values``, (N, ...)."""
        means, changes = self.jackknife(values)
        errors = np.maximum(_jackknife_error(changes), self.rarest * np.abs(means))
        spread = values.reshape(len(self), self.size, *values.shape[1:]).mean(axis=1).var(axis=0, ddof=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return means, errors, np.where(spread > 0, spread / errors**2, len(self))

    def estimate(self, values: Array) -> Estimate:
        """The mean of ``values``, (N,)."""
        mean, error, size = (float(each) for each in self.estimates(values))
        return Estimate(mean, self.quantile * error, error, size)


def _jackknife_error(changes: Array) -> Array:
    count = len(changes)
    errors: Array = np.sqrt((count - 1) / count * (changes**2).sum(axis=0))
    return errors


def difference(one: Batches, values: Array, other: Batches, others: Array) -> Estimate:
    """The mean of ``values`` less that of ``others``, (N,) each, of the same segments.

    Each is estimated by its own control variates; the standard error is from leaving out the same batch of both.
    """
    means, changes = one.jackknife(values)
    other_means, other_changes = other.jackknife(others)
    mean = float(means - other_means)
    error = max(float(_jackknife_error(changes - other_changes)), max(one.rarest, other.rarest) * abs(mean))
    gaps = (values - others).reshape(len(one), one.size).mean(axis=1)
    size = float(gaps.var(ddof=1) / error**2) if error > 0 else np.inf
    return Estimate(mean, max(one.quantile, other.quantile) * error, error, size)


def warmup_cut(series: Array) -> tuple[int, bool]:
    """How many segments to cut at the beginning, and whether what is left looks stationary.

    The rule is MSER (White, Simulation 69, 1997): the cut, at most half, that minimises the squared standard error of
    the mean of the rest; here of the series averaged over the replications, summed in units of what it is for their
    second half. Of the cuts within a tenth of the least the first is taken, as between these only noise chooses.

    Args:
        series: (replications, segments, quantities), whose averages should not depend on time.
    """
    mean = series.mean(axis=0)
    count = len(mean)
    half = count // 2
    scores = np.stack([mean[cut:].var(axis=0) / (count - cut) for cut in range(half + 1)])
    settled = mean[half:].var(axis=0) + 1e-12 * (1.0 + mean**2).mean(axis=0)
    score = (scores / settled).sum(axis=1)
    cut = int(np.argmax(score <= 1.1 * score.min()))
    return cut, cut < half - half // 8


def batching(series: Array, controls: Array) -> tuple[int, bool]:
    """How many consecutive segments make a batch as good as independent, and whether to use the control variates.

    Batches are doubled until the lag-1 autocorrelation of none of the quantities, pooled over the replications, is
    significantly above 0 (von Neumann's test at 5 %), and once more where enough of them are left; at the end whole
    replications are batches. The quantities are tested as the control variates leave them, if they leave at least three
    batches to each control, else as they are, and no controls are used.

    Args:
        series: (replications, segments, quantities).
        controls: (replications, segments, C).
    """
    replications, count = series.shape[:2]
    flat = (replications * count, -1)
    wanted = BATCHES_PER_CONTROL * controls.shape[2]
    if replications * count >= wanted:
        residuals = Batches(controls.reshape(flat), 1).residuals(series.reshape(flat)).reshape(series.shape)
        size = _independent(residuals)
        if replications * (count // size) >= wanted:
            return _doubled(size, replications, count), True
    return _doubled(_independent(series), replications, count), False


def _independent(series: Array) -> int:
    replications, count = series.shape[:2]
    size = 1
    while 2 * size <= count:
        batches = merge(series, size, np.mean)
        if _serial_correlation(batches) <= 1.645 / np.sqrt(replications * (batches.shape[1] - 1)):
            return size
        size *= 2
    return int(count)


def _doubled(size: int, replications: int, count: int) -> int:
    return 2 * size if replications * (count // (2 * size)) >= ENOUGH_BATCHES else size


def drifts(batches: Array) -> bool:
    """Whether any quantity, (replications, batches, quantities), grows or falls linearly in time, by the t-test of the
    slope at 0.1 % in all; a fleet whose queue grows without end does."""
    replications, count, quantities = batches.shape
    free = replications * count - 2
    if count < 3:
        return False
    time = np.linspace(-1, 1, count)[None, :, None]
    centred = batches - batches.mean(axis=(0, 1))
    slope = (centred * time).sum(axis=(0, 1)) / (replications * (time**2).sum())
    left = ((centred - slope * time) ** 2).sum(axis=(0, 1)) / free
    moving = left > 1e-18 * (1.0 + np.abs(batches)).max(axis=(0, 1)) ** 2
    score = np.abs(slope[moving]) * np.sqrt(replications * (time**2).sum() / left[moving])
    return bool(np.any(2 * stats.t.sf(score, free) < 0.001 / quantities))


def _serial_correlation(batches: Array) -> float:
    """The largest lag-1 autocorrelation of the quantities, (replications, batches, quantities), that vary at all."""
    count = batches.shape[1]
    centred = batches - batches.mean(axis=(0, 1))
    spread = (centred**2).sum(axis=(0, 1))
    moving = spread > 1e-18 * (1.0 + np.abs(batches)).max(axis=(0, 1)) ** 2
    together = (centred[:, 1:] * centred[:, :-1]).sum(axis=(0, 1))
    return float((together[moving] / spread[moving] * count / (count - 1)).max(initial=0.0))


def merge(values: Array, size: int, function: Callable[..., Array] = np.sum) -> Array:
    """Sum (or average) every ``size`` consecutive segments, (replications, segments, ...); the first few that are too
    many for a whole batch are left out."""
    replications, count = values.shape[:2]
    batches = count // size
    kept = values[:, count - batches * size :]
    merged: Array = function(kept.reshape(replications, batches, size, *values.shape[2:]), axis=2)
    return merged


def jackknife(function: Callable[[Totals], dict[str, Array]], batches: Totals) -> dict[str, Array]:
    """Pseudo-values of what ``function`` makes of totals: one per batch, (N, ...), whose mean is the estimate.

    Of a mean they are the batches' own means. Of a ratio or a quantile they carry its bias of order 1/N away and vary
    as its influence function does, so that they can be treated as means are.
    """
    total = batches.map(lambda values: values.sum(axis=0))
    whole = function(total)
    count = len(batches.window)
    at_once = count if batches.waits is None else max(1, 2**21 // batches.waits[0].size)
    parts = []
    for first in range(0, count, at_once):
        rest = batches.map(lambda values, first=first: values.sum(axis=0) - values[first : first + at_once])  # type: ignore[misc]
        parts.append(function(rest))
    return {
        name: count * value - (count - 1) * np.concatenate([part[name] for part in parts])
        for name, value in whole.items()
    }
