"""A model's inputs as one validated value: what a scenario file (TOML or JSON) says."""

from __future__ import annotations

import json
import tomllib
from dataclasses import KW_ONLY, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from fluidopt.contention import GPU
from fluidopt.errors import InvalidInput
from fluidopt.inputs import Name, PositiveInt, dump, input_type, parse, read_text
from fluidopt.service_levels import ServiceLevel
from fluidopt.tables import number
from fluidopt.views import bullets, card, figures, paragraph
from fluidopt.workload import TokenPrices, Workload, WorkloadClass

Charging = Literal["bundled", "separate"]


@input_type
class Row:
    """A row, or a family of rows, of one's own, in the model's symbols."""

    _: KW_ONLY
    name: Name
    """Name of the family; new."""
    row: Annotated[str, Field(min_length=1)]
    """A linear relation such as ``q_p[i] <= 2*lambda[i]`` or ``sum(x["code", k], k) <= 0.1``."""
    where: str | None = None
    """A condition on parameters that selects the members, such as ``theta[i] > 0``."""
    meaning: str = ""
    """The row in words, for reports; ``{class}``, ``{mode}``, ``{gpu}`` stand for the labels."""


@input_type
class Scenario:
    """Workload classes, GPU types, prices and charging scheme: everything a `FluidModel` is built from."""

    _: KW_ONLY
    classes: tuple[WorkloadClass, ...]
    """The workload classes."""
    gpu: GPU | tuple[GPU, ...]
    """The GPU type, or several types whose shares add up to 1."""
    prices: TokenPrices
    """Price per prompt and per output token."""
    charging: Charging = "bundled"
    """``"bundled"``: paid when a request completes ([L26] eq. (40)); ``"separate"``: phase by phase (eq. (42))."""
    rates: Literal["per_gpu", "total"] = "per_gpu"
    """Whether arrival rates are per GPU, or of the whole stream (then ``gpus`` is needed to divide them by)."""
    gpus: PositiveInt | None = None
    """Number of GPUs in the fleet, n; the fluid model itself needs none."""
    service_levels: tuple[ServiceLevel, ...] = ()
    """Promises the plan must keep, or pays for breaking."""
    rows: tuple[Row, ...] = ()
    """Rows of one's own."""
    objective: str | None = None
    """What to maximise in place of the revenue rate, in the model's symbols."""
    source: str | None = None
    """Where the numbers come from, for reports."""

    def __post_init__(self) -> None:
        Workload(self.classes)
        if self.rates == "total" and self.gpus is None:
            raise InvalidInput("gpus is required where rates = 'total', to divide the arrival rates by")
        names = [gpu.name for gpu in self.gpu_types]
        if not names:
            raise InvalidInput("gpu is empty; give at least one GPU")
        if len(set(names)) < len(names):
            raise InvalidInput(f"gpu: type names must be unique; got {names}")
        total = sum(gpu.share for gpu in self.gpu_types)
        if abs(total - 1.0) > 1e-9:
            raise InvalidInput(f"gpu: the shares of the types must add up to 1; got {total:g}")

    @cached_property
    def gpu_types(self) -> tuple[GPU, ...]:
        """The GPU types, one or several."""
        return (self.gpu,) if isinstance(self.gpu, GPU) else self.gpu

    @cached_property
    def workload(self) -> Workload:
        """The classes with arrival rates per GPU."""
        workload = Workload(self.classes, source=self.source)
        return workload if self.rates == "per_gpu" or self.gpus is None else workload.per_gpu(self.gpus)

    def with_workload(self, workload: Workload, *, gpus: int | None = None) -> Scenario:
        """The same GPU types, prices and promises for other classes, whose rates are per GPU."""
        return replace(self, classes=workload.classes, rates="per_gpu", gpus=gpus, source=workload.source)

    def to_dict(self) -> dict[str, Any]:
        """The scenario as JSON-able data; `Scenario.from_dict` reads it back."""
        data: dict[str, Any] = dump(self)
        return data

    @classmethod
    def from_dict(cls, data: object, *, source: str | None = None) -> Scenario:
        """Validate JSON-able data; ``source`` names it in error messages."""
        return parse(cls, data, source=source)

    def _repr_html_(self) -> str:
        prices = f"{number(self.prices.prompt)} : {number(self.prices.output)}"
        gpus = [("GPUs", self.gpus, "")] if self.gpus is not None else []
        return card(
            f"Scenario, {self.charging} charging",
            figures(
                ("Classes", len(self.classes), ""),
                ("GPU types", len(self.gpu_types), ""),
                *gpus,
                ("Prompt : output", prices, "money/token"),
            ),
            self.workload._repr_html_(),
            *(gpu._repr_html_() for gpu in self.gpu_types),
            bullets("Service levels", list(map(_in_words, self.service_levels))),
            bullets("Rows of one's own", [f"{row.name}: {row.row}" for row in self.rows]),
            bullets("Objective", [self.objective] if self.objective else []),
            paragraph(self.source, muted=True),
        )


def _in_words(level: ServiceLevel) -> str:
    """A service level with what was given of it: ``slot_tpot: at_most 0.03``."""
    given = ((each.name, getattr(level, each.name)) for each in fields(level))
    return f"{level.kind}: " + ", ".join(
        f"{name} {value}" for name, value in given if name != "kind" and value is not None
    )


def read_scenario(path: str | Path) -> Scenario:
    """Read a scenario file, TOML or JSON by its ending.

    Raises:
        InvalidInput: where the file is missing, not TOML/JSON, or an entry breaks a rule (named by its path).
    """
    if not isinstance(path, str | Path):
        raise InvalidInput(f"read_scenario: path must be a file name; got {path!r}")
    path = Path(path)
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"{path}: cannot read the scenario file ({reason}); check the path") from None
    try:
        if path.suffix.lower() == ".toml":
            data = tomllib.loads(text)
        elif path.suffix.lower() == ".json":
            data = json.loads(text)
        else:
            raise InvalidInput(f"{path}: a scenario file ends in .toml or .json; got {path.suffix or 'no ending'!r}")
    except InvalidInput:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from None
    return Scenario.from_dict(data, source=str(path))


def scenario_schema() -> dict[str, Any]:
    """The JSON schema of a scenario file."""
    schema = TypeAdapter(Scenario).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fluidopt scenario"}
