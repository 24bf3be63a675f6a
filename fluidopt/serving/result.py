"""What a replay measured: when each request started, got its first token and ended, and what the GPUs did meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput
from fluidopt.inputs import is_number
from fluidopt.policy.rules import Policy
from fluidopt.serving.engine import EngineFleet
from fluidopt.traces.trace import Trace
from fluidopt.views import card, figures, html, paragraph
from fluidopt.workload import TokenPrices

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]
QUANTILES = (50, 90, 95, 99)


@dataclass(frozen=True, eq=False)
class Latencies:
    """How long requests took, s, (N,) each; NaN where a request did not get so far."""

    ttft: Array
    """Time to first token."""
    tpot: Array
    """Time per output token after the first; NaN for answers of one token."""
    e2e: Array
    """Time from arrival to the last token."""

    @classmethod
    def of(cls, trace: Trace, first_token: Array, finished: Array) -> Latencies:
        """From the times of first and last tokens, on the clock of the arrivals."""
        after = trace.output_tokens - 1.0
        tpot = np.full(len(trace), np.nan)
        np.divide(finished - first_token, after, out=tpot, where=after > 0)
        return cls(first_token - trace.arrival_time, tpot, finished - trace.arrival_time)


@dataclass(frozen=True, eq=False, repr=False)
class Replay:
    """One passage of a trace through a fleet. Arrays have one entry per request, in order of arrival."""

    trace: Trace
    """The requests."""
    fleet: Policy | EngineFleet
    """Who served them."""
    started: Array
    """When the first chunk of the prompt began, s, (N,); NaN where it never did."""
    first_token: Array
    """When the prompt was done and the first token came out, s, (N,); NaN where it never did."""
    finished: Array
    """When the last token came out, s, (N,); NaN where it never did."""
    refused: NDArray[np.bool_]
    """Requests too long for the memory of a GPU that they might have been sent to, (N,)."""
    abandoned: NDArray[np.bool_]
    """Requests that gave up waiting, (N,)."""
    preemptions: NDArray[np.int64]
    """How often each request was preempted for memory, (N,)."""
    recomputed_tokens: NDArray[np.int64]
    """Tokens that were computed again for it, (N,)."""
    gpu: NDArray[np.int64]
    """The GPU that served it last, (N,); -1 for none."""
    gpu_columns: dict[str, NDArray[Any]] = field(repr=False)
    """What `gpus` shows, by column."""
    kind: NDArray[np.int64]
    """Class of each request under the policy, (N,)."""
    prices: TokenPrices | None
    """What a token earns, where it is known."""
    seed: int
    """Of the policy's draws and of the requests' patience."""
    events: int
    """Arrivals, abandonments, and boundaries between iterations at which something changed."""

    @cached_property
    def latencies(self) -> Latencies:
        """TTFT, TPOT and end-to-end time of each request."""
        return Latencies.of(self.trace, self.first_token, self.finished)

    @property
    def ttft(self) -> Array:
        """Time to first token, s, (N,)."""
        return self.latencies.ttft

    @property
    def tpot(self) -> Array:
        """Time per output token after the first, s, (N,); NaN for answers of one token."""
        return self.latencies.tpot

    @property
    def e2e(self) -> Array:
        """Time from arrival to the last token, s, (N,)."""
        return self.latencies.e2e

    @property
    def completed(self) -> NDArray[np.bool_]:
        """Requests that got all their tokens, (N,)."""
        return np.isfinite(self.finished)

    @property
    def unserved(self) -> NDArray[np.bool_]:
        """Requests that nobody ever took up and that did not give up, (N,): a policy may hold a class back for ever."""
        unserved: NDArray[np.bool_] = ~(self.completed | self.abandoned | self.refused)
        return unserved

    @property
    def gpu_count(self) -> int:
        """GPUs in the fleet."""
        return self.fleet.gpus

    @property
    def makespan(self) -> float:
        """When the last request ended, s after the first arrival; NaN where none did."""
        ended = self.finished[self.completed]
        return float(ended.max()) if ended.size else float("nan")

    def attainment(self, *, ttft: float | None = None, tpot: float | None = None) -> float:
        """Share of all requests that were completed and met the limits.

        Args:
            ttft: time to first token at most, s.
            tpot: time per output token at most, s; an answer of one token meets it.

        Raises:
            InvalidInput: no limit is given, or one is not a positive number.
        """
        if ttft is None and tpot is None:
            raise InvalidInput("attainment: give ttft, tpot or both, in seconds")
        met = self.completed.copy()
        for name, limit, value in (("ttft", ttft, self.ttft), ("tpot", tpot, self.tpot)):
            if limit is None:
                continue
            if not (is_number(limit) and limit > 0):
                raise InvalidInput(f"attainment: {name} must be a positive number of seconds; got {limit!r}")
            met &= ~(value > limit)
        return float(met.mean())

    # ---- the fleet --------------------------------------------------------------------------------------------

    def earned(self, until: float = np.inf) -> Array:
        """What each request has earned by a time, money, (N,): prompts and decode iterations; NaN without prices.

        Bundled charging, and engines, are paid when a request ends; separate charging also when its prompt is done.
        """
        if self.prices is None:
            return np.full(len(self.trace), np.nan)
        separate = isinstance(self.fleet, Policy) and self.fleet.scenario.charging == "separate"
        prompt_paid = (self.first_token if separate else self.finished) <= until
        prompt = self.prices.prompt * self.trace.prompt_tokens * prompt_paid
        return prompt + self.prices.output * (self.trace.output_tokens - 1) * (self.finished <= until)

    @property
    def revenue(self) -> float:
        """Money earned by all that was served, NaN without prices; decode iterations count, as in the model."""
        return float(self.earned().sum())

    @property
    def revenue_rate(self) -> float:
        """Money/s per GPU that was earned within the trace's duration; NaN without prices or a duration."""
        try:
            duration = self.trace.duration
        except InvalidInput:  # all requests came at one instant
            return float("nan")
        return float(self.earned(duration).sum() / (duration * self.gpu_count))

    @property
    def throughput(self) -> float:
        """Requests/s that the whole fleet completed, over the makespan."""
        return float(self.completed.sum() / self.makespan)

    @property
    def utilisation(self) -> float:
        """Share of the makespan in which a GPU was iterating, mean over GPUs."""
        return float(self.gpu_columns["busy"].mean() / self.makespan)

    def gpus(self) -> pd.DataFrame:
        """A row per GPU.

        Columns: ``role``; ``busy`` (s); ``iterations``; ``prefill_tokens``, ``decode_tokens`` (computed, also where
        computed again); ``most_kv_tokens`` (in its cache, as seen at boundaries), ``most_kv_blocks`` (taken, where
        memory is limited); ``preemptions``.
        """
        import pandas as pd

        return pd.DataFrame(self.gpu_columns, index=pd.RangeIndex(self.gpu_count, name="gpu"))

    # ---- tables -----------------------------------------------------------------------------------------------

    def _groups(self) -> dict[str, NDArray[np.bool_]]:
        groups = {"all": np.ones(len(self.trace), dtype=bool)}
        if isinstance(self.fleet, Policy) and len(self.fleet.scenario.classes) > 1:
            for i, each in enumerate(self.fleet.scenario.classes):
                groups[each.name] = self.kind == i
        return groups

    def percentiles(self) -> pd.DataFrame:
        """Mean and percentiles of TTFT, TPOT and end-to-end time of the completed requests, s; rows by class too."""
        import pandas as pd

        rows: dict[tuple[str, str], list[float]] = {}
        for quantity in ("ttft", "tpot", "e2e"):
            for name, where in self._groups().items():
                values = getattr(self, quantity)[where & self.completed]
                values = values[np.isfinite(values)]
                if values.size:
                    rows[quantity, name] = [float(values.mean()), *np.percentile(values, QUANTILES).tolist()]
                else:
                    rows[quantity, name] = [float("nan")] * (1 + len(QUANTILES))
        index = pd.MultiIndex.from_tuples(list(rows), names=["quantity", "of"])
        return pd.DataFrame(list(rows.values()), index=index, columns=["mean", *(f"p{q}" for q in QUANTILES)])

    def against_measured(self, which: NDArray[np.bool_] | None = None) -> pd.DataFrame:
        """The replay beside the times that the trace's requests really had.

        Args:
            which: requests to compare, (N,); by default all that were measured and replayed to their end.

        Returns:
            A row per quantity and statistic: ``measured`` and ``replayed``, s, and ``error``, relative. The makespan is
            that of all requests compared; ``each e2e`` is the median over requests of the relative error of their own
            end-to-end time.

        Raises:
            InvalidInput: the trace has no measured times, or ``which`` selects no request.
        """
        import pandas as pd

        first, finish = self.trace.first_token_time, self.trace.finish_time
        if first is None or finish is None:
            raise InvalidInput(
                "against_measured: the trace has no measured times; read one that has them, such as a log of requests "
                "with their first- and last-token times"
            )
        chosen = np.isfinite(finish) & np.isfinite(first) & self.completed
        chosen = chosen if which is None else chosen & which
        if not chosen.any():
            raise InvalidInput("against_measured: no request is left to compare; give which= another selection")
        measured = Latencies.of(self.trace, first, finish)
        rows = {}
        for name in ("ttft", "tpot", "e2e"):
            pair = [getattr(each, name)[chosen] for each in (measured, self.latencies)]
            pair = [values[np.isfinite(values)] for values in pair]
            rows[name, "mean"] = [float(values.mean()) for values in pair]
            for q in (50, 90, 99):
                rows[name, f"p{q}"] = [float(np.percentile(values, q)) for values in pair]
        rows["makespan", "last"] = [float(finish[chosen].max()), float(self.finished[chosen].max())]
        index = pd.MultiIndex.from_tuples(list(rows), names=["quantity", "statistic"])
        frame = pd.DataFrame(list(rows.values()), index=index, columns=["measured", "replayed"])
        frame["error"] = frame["replayed"] / frame["measured"] - 1.0
        each = np.abs(self.e2e[chosen] / measured.e2e[chosen] - 1.0)
        frame.loc[("each e2e", "median"), "error"] = float(np.median(each))
        return frame

    def summary(self) -> pd.Series[float]:
        """The fleet's figures: requests by outcome, rates, revenue, utilisation, preemptions."""
        import pandas as pd

        values = {
            "requests": len(self.trace),
            "completed": int(self.completed.sum()),
            "abandoned": int(self.abandoned.sum()),
            "refused": int(self.refused.sum()),
            "unserved": int(self.unserved.sum()),
            "makespan_s": self.makespan,
            "throughput_requests_per_s": self.throughput,
            "output_tokens_per_s": float(self.trace.output_tokens[self.completed].sum() / self.makespan),
            "revenue_rate": self.revenue_rate,
            "utilisation": self.utilisation,
            "preemptions": int(self.preemptions.sum()),
            "recomputed_tokens": int(self.recomputed_tokens.sum()),
        }
        return pd.Series(values, name="value")

    def to_frame(self) -> pd.DataFrame:
        """A row per request: what the trace says, its class, its times and where it was served."""
        frame = self.trace.to_frame()
        if isinstance(self.fleet, Policy):
            frame["class"] = np.array([each.name for each in self.fleet.scenario.classes])[self.kind]
        columns = ("started", "first_token", "finished", "ttft", "tpot", "e2e", "gpu", "preemptions")
        for name in columns:
            frame[name] = getattr(self, name)
        return frame

    @property
    def caption(self) -> str:
        """What was replayed, in one sentence."""
        fleet = self.fleet
        who = f"{fleet.gpus} engines" if isinstance(fleet, EngineFleet) else f"{fleet.title}"
        text = f"{len(self.trace):,} requests on {who}: {int(self.completed.sum()):,} completed"
        if self.abandoned.any():
            text += f", {int(self.abandoned.sum()):,} gave up"
        if self.refused.any():
            text += f", {int(self.refused.sum()):,} refused for memory"
        if self.unserved.any():
            text += f", {int(self.unserved.sum()):,} never taken up"
        if np.isfinite(self.makespan):
            text += f" in {self.makespan:,.5g} s, GPUs busy {self.utilisation:.0%} of it"
        return text

    def __repr__(self) -> str:
        return f"<Replay: {self.caption}>"

    def _repr_html_(self) -> str:
        return card(
            "Replay",
            figures(
                ("Revenue", self.revenue_rate, "money/s per GPU"),
                ("Completed", 100.0 * self.completed.mean(), "% of requests"),
                ("GPUs busy", 100.0 * self.utilisation, "% of the time"),
            ),
            paragraph(f"{self.caption}."),
            html(self.percentiles(), title="Times of completed requests, s"),
        )
