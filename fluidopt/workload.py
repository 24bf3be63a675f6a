"""Who asks: workload classes, their rates and token counts, and the prices they pay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput
from fluidopt.inputs import Name, NonNegative, Positive, input_type, is_number, parse
from fluidopt.views import amount_bar, card, facts, figures, html, paragraph

if TYPE_CHECKING:
    import pandas as pd


@input_type
class WorkloadClass:
    """One class of requests: same prompt and output lengths on average, same patience.

    The model takes lengths and patience as exponential with these means ([L26] section 2).
    """

    name: Name
    """Label of the class; unique within a workload."""
    _: KW_ONLY
    arrival_rate: NonNegative
    """lambda_i, requests/s. Per GPU in a `FluidModel`; of the whole stream when it comes from a trace."""
    prompt_tokens: Positive
    """P_i, mean prompt (prefill) length in tokens."""
    output_tokens: Positive
    """D_i, mean number of decode iterations: output tokens less the first, which comes from the prefill."""
    abandonment_rate: NonNegative = 0.0
    """theta_i, 1/s: rate at which a waiting request gives up, in either queue; 0 = infinitely patient."""

    def _repr_html_(self) -> str:
        return card(
            f"Class {self.name}",
            facts(
                ("arrival_rate", self.arrival_rate, "requests/s"),
                ("prompt_tokens", self.prompt_tokens, "tokens, mean"),
                ("output_tokens", self.output_tokens, "decode iterations, mean"),
                ("abandonment_rate", self.abandonment_rate, "1/s while waiting"),
            ),
        )


@input_type
class Workload:
    """The classes that arrive together."""

    classes: tuple[WorkloadClass, ...]
    """At least one class, names unique."""
    _: KW_ONLY
    source: str | None = None
    """Where the numbers come from, for reports."""

    def __post_init__(self) -> None:
        if not self.classes:
            raise InvalidInput("classes is empty; give at least one WorkloadClass")
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise InvalidInput(f"class names must be unique; {twice[0]!r} occurs more than once")

    @classmethod
    def from_frame(cls, frame: pd.DataFrame | Mapping[str, Any], *, source: str | None = None) -> Workload:
        """Build a workload from a table with the fields of `WorkloadClass` as columns, a row per class."""
        try:
            columns = {str(name): np.asarray(column).tolist() for name, column in frame.items()}
            lengths = {name: len(column) for name, column in columns.items()}
        except (AttributeError, TypeError, ValueError):
            raise InvalidInput(
                f"Workload.from_frame: expected a table of columns; got {type(frame).__name__}"
            ) from None
        if len(set(lengths.values())) > 1:
            raise InvalidInput(f"Workload.from_frame: columns must have the same length; got {lengths}")
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return cls(tuple(parse(tuple[WorkloadClass, ...], rows)), source=source)

    def to_frame(self) -> pd.DataFrame:
        """Return the classes as a table, a row per class, indexed by name."""
        import pandas as pd

        columns = {
            "arrival_rate": self.arrival_rate,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "abandonment_rate": self.abandonment_rate,
        }
        return pd.DataFrame(columns, index=pd.Index(self.names, name="class"))

    def per_gpu(self, gpus: float) -> Workload:
        """Divide the arrival rates of a whole stream by the number of GPUs that will serve it."""
        if not (is_number(gpus) and gpus > 0):
            raise InvalidInput(f"Workload.per_gpu: gpus must be a finite number greater than 0; got {gpus!r}")
        return self.scaled(1.0 / gpus)

    def scaled(self, factor: float) -> Workload:
        """Multiply every arrival rate by ``factor`` (at least 0)."""
        if not (is_number(factor) and factor >= 0):
            raise InvalidInput(f"Workload.scaled: factor must be a finite number of at least 0; got {factor!r}")
        classes = tuple(replace(each, arrival_rate=each.arrival_rate * factor) for each in self.classes)
        return Workload(classes, source=self.source)

    def with_abandonment(self, rate: float) -> Workload:
        """Give every class the abandonment rate ``rate`` (1/s)."""
        classes = tuple(replace(each, abandonment_rate=rate) for each in self.classes)
        return Workload(classes, source=self.source)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Class names, in order."""
        return tuple(each.name for each in self.classes)

    @cached_property
    def arrival_rate(self) -> NDArray[np.float64]:
        """lambda, shape (I,), requests/s."""
        return np.array([each.arrival_rate for each in self.classes])

    @cached_property
    def prompt_tokens(self) -> NDArray[np.float64]:
        """P, shape (I,), tokens."""
        return np.array([each.prompt_tokens for each in self.classes])

    @cached_property
    def output_tokens(self) -> NDArray[np.float64]:
        """D, shape (I,), decode iterations."""
        return np.array([each.output_tokens for each in self.classes])

    @cached_property
    def abandonment_rate(self) -> NDArray[np.float64]:
        """theta, shape (I,), 1/s."""
        return np.array([each.abandonment_rate for each in self.classes])

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[WorkloadClass]:
        return iter(self.classes)

    def __getitem__(self, key: str | int) -> WorkloadClass:
        if isinstance(key, str):
            if key not in self.names:
                raise InvalidInput(f"Workload has no class {key!r}; it has {', '.join(map(repr, self.names[:8]))}")
            return self.classes[self.names.index(key)]
        return self.classes[key]

    def __repr__(self) -> str:
        from fluidopt.tables import text

        return f"Workload of {len(self)} classes\n{text(self.to_frame())}"

    def _repr_html_(self) -> str:
        total = self.arrival_rate.sum()
        units = {
            "arrival_rate": "requests/s",
            "prompt_tokens": "tokens, mean",
            "output_tokens": "tokens, mean",
            "abandonment_rate": "1/s",
        }
        return card(
            "Workload",
            figures(
                ("Classes", len(self), ""),
                ("Arrivals", total, "requests/s"),
                ("Prompts", self.arrival_rate @ self.prompt_tokens, "tokens/s"),
                ("Outputs", self.arrival_rate @ self.output_tokens, "tokens/s"),
            ),
            html(self.to_frame(), title="", units=units, bars={"arrival_rate": amount_bar}),
            paragraph(self.source, muted=True),
        )


@input_type
class TokenPrices:
    """What a customer pays per token."""

    _: KW_ONLY
    prompt: NonNegative
    """c_p, money per prefill token."""
    output: NonNegative
    """c_d, money per decode token."""

    def __post_init__(self) -> None:
        if self.prompt == 0 and self.output == 0:
            raise InvalidInput("prompt and output are both 0, so every plan earns nothing; make one of them positive")

    def _repr_html_(self) -> str:
        return card(
            "Token prices", facts(("prompt", self.prompt, "money/token"), ("output", self.output, "money/token"))
        )


def as_workload(classes: Workload | Sequence[WorkloadClass]) -> Workload:
    """Return ``classes`` as a `Workload`."""
    if isinstance(classes, Workload):
        return classes
    if isinstance(classes, WorkloadClass):
        return Workload((classes,))
    try:
        return Workload(tuple(classes))
    except TypeError:
        raise InvalidInput(
            f"classes must be a Workload or a sequence of WorkloadClass; got {type(classes).__name__}"
        ) from None
