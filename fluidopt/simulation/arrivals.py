"""Streams of arrivals: who comes to the fleet and when, block after block, and what each request brings along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Annotated, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from fluidopt.errors import InvalidInput
from fluidopt.inputs import NonNegative, Positive, input_type
from fluidopt.simulation.compilation import compiled_apart
from fluidopt.simulation.system import FloatArray, IntArray, System

BLOCK = 8192

Arrivals = Iterator[tuple[FloatArray, IntArray]]
"""Blocks of arrivals: increasing times, s, and classes, equally long; an arrival at infinity ends the stream."""


class Poisson:
    """Independent Poisson processes.

    Args:
        rate: (I,) arrival rates, 1/s.
        rng: source of randomness; its state alone determines the stream.
    """

    def __init__(self, rate: FloatArray, rng: np.random.Generator) -> None:
        self.total, self.rng, self.time = float(rate.sum()), rng, 0.0
        self.threshold, self.alias = alias_table(rate)

    def __iter__(self) -> Poisson:
        return self

    def __next__(self) -> tuple[FloatArray, IntArray]:
        if self.total == 0:
            return np.array([np.inf]), np.zeros(1, dtype=np.int64)
        times, classes = np.empty(BLOCK), np.empty(BLOCK, dtype=np.int64)
        self.time = _fill(times, classes, self.rng, self.time, self.total, self.threshold, self.alias)
        return times, classes


@compiled_apart
def _fill(
    times: FloatArray,
    classes: IntArray,
    rng: np.random.Generator,
    time: float,
    total: float,
    threshold: FloatArray,
    alias: IntArray,
) -> float:
    """A block of arrivals after `time`; returns the time of the last."""
    for k in range(times.size):
        time += rng.standard_exponential() / total
        scaled = rng.random() * alias.size
        i = min(int(scaled), alias.size - 1)
        times[k] = time
        classes[k] = i if scaled - i < threshold[i] else alias[i]
    return time


def alias_table(rates: FloatArray) -> tuple[FloatArray, IntArray]:
    """Walker's alias table, built as by Vose (1991): cell i stands for class i below its threshold, else its alias."""
    threshold = np.ones(rates.size)
    alias = np.arange(rates.size)
    if rates.sum() > 0:
        share = rates / rates.sum() * rates.size
        small = list(np.flatnonzero(share < 1))
        large = list(np.flatnonzero(share >= 1))
        while small and large:
            i, j = small.pop(), large[-1]
            threshold[i], alias[i] = share[i], j
            share[j] -= 1 - share[i]
            if share[j] < 1:
                small.append(large.pop())
    return threshold, alias


# ---- rates that change ----------------------------------------------------------------------------------------------


class ArrivalProcess(Protocol):
    """How arrivals fall in time, given their mean rates; the factor on all rates has time average 1."""

    def stream(self, rate: FloatArray, rng: np.random.Generator) -> Arrivals:
        """Arrivals with mean rates ``rate``, (I,), 1/s; the state of ``rng`` alone determines them."""
        ...


class Factor(Protocol):
    """By what the mean rates are multiplied at given times."""

    def __call__(self, times: FloatArray) -> FloatArray:
        """The factor at increasing times, s; later calls only ask about later times."""
        ...


class Thinned:
    """Poisson processes whose rates are ``rate`` times a common factor that changes in time.

    Candidates arrive at the peak rate; one at time t is kept with probability factor(t)/peak (Lewis and Shedler, Naval
    Research Logistics 26, 1979).
    """

    def __init__(self, rate: FloatArray, factor: Factor, peak: float, rng: np.random.Generator) -> None:
        candidates, self.coins = rng.spawn(2)
        self.factor, self.peak = factor, peak
        self.candidates = Poisson(rate * peak, candidates)

    def __iter__(self) -> Thinned:
        return self

    def __next__(self) -> tuple[FloatArray, IntArray]:
        while True:
            times, classes = next(self.candidates)
            if times[-1] == np.inf:
                return times, classes
            kept = self.coins.random(times.size) * self.peak < self.factor(times)
            if kept.any():
                return times[kept], classes[kept]


@input_type
class Steady:
    """Poisson arrivals at constant rates, as in the model."""

    _: KW_ONLY
    kind: Literal["steady"] = "steady"
    """Which process it is, in a file."""

    def stream(self, rate: FloatArray, rng: np.random.Generator) -> Arrivals:
        """Arrivals with mean rates ``rate``, (I,), 1/s."""
        return Poisson(rate, rng)


@input_type
class Bursty:
    """Markov-modulated Poisson arrivals: calm and bursts alternate, all classes together, each for an exponential time.

    The process starts in its stationary law, so the mean rates are the given ones at every time.
    """

    _: KW_ONLY
    kind: Literal["bursty"] = "bursty"
    """Which process it is, in a file."""
    ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0
    """Rates during a burst over those in the calm."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of time that is burst."""
    burst: Positive = 30.0
    """Mean length of a burst, s."""

    @property
    def calm_factor(self) -> float:
        """Rates in the calm over the mean rates."""
        return 1.0 / (1.0 + self.share * (self.ratio - 1.0))

    def stream(self, rate: FloatArray, rng: np.random.Generator) -> Arrivals:
        """Arrivals with mean rates ``rate``, (I,), 1/s."""
        ours, theirs = rng.spawn(2)
        return Thinned(rate, _Bursts(self, ours), self.ratio * self.calm_factor, theirs)


class _Bursts:
    """The factor of `Bursty` on one path, drawn as far as it is asked for."""

    def __init__(self, law: Bursty, rng: np.random.Generator) -> None:
        self.law, self.rng = law, rng
        self.bursting = bool(rng.random() < law.share)  # in the first period that is kept
        self.ends = np.zeros(0)
        self.last = 0.0

    def __call__(self, times: FloatArray) -> FloatArray:
        past = np.searchsorted(self.ends, times[0], side="right") // 2 * 2  # whole pairs, so that the parity stays
        self.ends = self.ends[past:]
        while self.last <= times[-1]:
            self._extend()
        odd = np.searchsorted(self.ends, times, side="right") % 2 == 1
        calm = self.law.calm_factor
        return np.where(odd != self.bursting, self.law.ratio * calm, calm)

    def _extend(self) -> None:
        burst, calm = self.law.burst, self.law.burst * (1.0 - self.law.share) / self.law.share
        first, second = (burst, calm) if self.bursting else (calm, burst)
        lengths = self.rng.standard_exponential((256, 2)) * np.array([first, second])
        self.ends = np.concatenate([self.ends, self.last + np.cumsum(lengths)])
        self.last = float(self.ends[-1])


@input_type
class Sinusoidal:
    """Poisson arrivals whose rates swing about the mean: factor 1 + amplitude sin(2 pi t/period), as over a day."""

    _: KW_ONLY
    kind: Literal["sinusoidal"] = "sinusoidal"
    """Which process it is, in a file."""
    amplitude: Annotated[float, Field(ge=0, le=1)]
    """Largest deviation from the mean rates, as a part of them."""
    period: Positive
    """Length of a cycle, s."""

    def __call__(self, times: FloatArray) -> FloatArray:
        """The factor at the times."""
        return 1.0 + self.amplitude * np.sin(2.0 * np.pi * times / self.period)

    def stream(self, rate: FloatArray, rng: np.random.Generator) -> Arrivals:
        """Arrivals with mean rates ``rate``, (I,), 1/s, over whole periods."""
        return Thinned(rate, self, 1.0 + self.amplitude, rng)


@input_type
class Stepwise:
    """Poisson arrivals whose rates are constant in each of several equally long parts of a period, over and over."""

    _: KW_ONLY
    kind: Literal["stepwise"] = "stepwise"
    """Which process it is, in a file."""
    levels: Annotated[tuple[NonNegative, ...], Field(min_length=1)]
    """Rates in each part, in any common unit: they are divided by their mean."""
    period: Positive
    """Length of a cycle, s."""

    def __post_init__(self) -> None:
        if sum(self.levels) == 0:
            raise InvalidInput("levels must not all be 0; make one of them positive")

    def __call__(self, times: FloatArray) -> FloatArray:
        """The factor at the times."""
        levels = np.array(self.levels)
        part = (times % self.period / self.period * levels.size).astype(np.int64)
        factor: FloatArray = (levels / levels.mean())[np.minimum(part, levels.size - 1)]
        return factor

    def stream(self, rate: FloatArray, rng: np.random.Generator) -> Arrivals:
        """Arrivals with mean rates ``rate``, (I,), 1/s, over whole periods."""
        return Thinned(rate, self, len(self.levels) * max(self.levels) / sum(self.levels), rng)


# ---- what a request brings along ------------------------------------------------------------------------------------


@input_type
class Law:
    """The law of a positive quantity whose mean is given elsewhere."""

    kind: Literal["exponential", "deterministic", "lognormal", "gamma"] = "exponential"
    """Its shape. Erlang-k is gamma with cv 1/sqrt(k)."""
    _: KW_ONLY
    cv: Positive | None = None
    """Coefficient of variation, standard deviation over mean; goes with lognormal and gamma, and only these."""

    def __post_init__(self) -> None:
        if (self.cv is not None) != (self.kind in ("lognormal", "gamma")):
            needs = "needs" if self.cv is None else "has none of its own to set:"
            raise InvalidInput(f"cv: the {self.kind} law {needs} a coefficient of variation; got {self.cv!r}")

    @property
    def variation(self) -> float:
        """Coefficient of variation."""
        return self.cv if self.cv is not None else float(self.kind == "exponential")

    def draw(self, rng: np.random.Generator, size: int) -> FloatArray:
        """Independent draws of mean 1, (size,)."""
        if self.kind == "deterministic":
            return np.ones(size)
        if self.kind == "exponential":
            return rng.standard_exponential(size)
        if self.kind == "gamma":
            shape = self.variation**-2
            return rng.standard_gamma(shape, size) / shape
        spread = np.log1p(self.variation**2)  # variance of the logarithm
        drawn: FloatArray = np.exp(np.sqrt(spread) * rng.standard_normal(size) - spread / 2)
        return drawn

    def __str__(self) -> str:
        return self.kind if self.cv is None else f"{self.kind} (cv {self.cv:g})"


@input_type
class Laws:
    """The laws of what differs from request to request, by default those of the model; means come from the classes.

    Each is one law for all classes, or one per class in their order.
    """

    _: KW_ONLY
    prompt: Law | tuple[Law, ...] = Law()
    """Prompt tokens, mean P_i."""
    output: Law | tuple[Law, ...] = Law()
    """Decode iterations, mean D_i."""
    patience: Law | tuple[Law, ...] = Law()
    """Seconds that a request waits in all, before prefill and before decode, until it gives up; mean 1/theta_i."""


def _by_class(laws: Laws, name: str, classes: int) -> tuple[Law, ...]:
    """One law for all classes, or one for each."""
    given: Law | tuple[Law, ...] = getattr(laws, name)
    alike = (given,) if isinstance(given, Law) else given
    if len(alike) not in (1, classes):
        raise InvalidInput(f"Laws.{name}: give one law, or one per class ({classes}); got {len(alike)}")
    return alike


def _draw(laws: tuple[Law, ...], rng: np.random.Generator, classes: IntArray) -> FloatArray:
    """Draws of mean 1 for requests of these classes."""
    drawn = [law.draw(rng, classes.size) for law in laws]
    return drawn[0] if len(drawn) == 1 else np.stack(drawn)[classes, np.arange(classes.size)]


class Requests(NamedTuple):
    """A block of arriving requests: arrays of one length."""

    times: FloatArray  # s, increasing; one at infinity ends the stream
    classes: IntArray
    prompt: FloatArray  # prompt tokens
    output: FloatArray  # decode iterations
    patience: FloatArray  # s, inf where the class never abandons


class RequestStream:
    """The requests that meet a fleet: when they come, and what each will turn out to need.

    Times, prompts, outputs and patience are drawn from four streams of their own, so another law of one of them leaves
    the others as they are, and a policy changes none: request k is the same request whatever was done before it came.
    """

    def __init__(
        self,
        system: System,
        rng: np.random.Generator,
        *,
        laws: Laws | None = None,
        process: ArrivalProcess | None = None,
    ) -> None:
        """Raises `InvalidInput` where there are neither one law nor as many as classes."""
        times, *self.rngs = rng.spawn(4)
        self.arrivals = (process or Steady()).stream(system.arrival_rate, times)
        laws = laws or Laws()
        self.laws = [_by_class(laws, name, system.classes) for name in ("prompt", "output", "patience")]
        with np.errstate(divide="ignore"):
            self.means = (system.prompt_tokens, system.output_tokens, 1.0 / system.abandonment_rate)

    def __iter__(self) -> RequestStream:
        return self

    def __next__(self) -> Requests:
        times, classes = next(self.arrivals)
        drawn = (_draw(each, rng, classes) for each, rng in zip(self.laws, self.rngs, strict=True))
        prompt, output, patience = (mean[classes] * each for mean, each in zip(self.means, drawn, strict=True))
        return Requests(times, classes, prompt, output, patience)
