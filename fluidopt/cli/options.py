"""Arguments and options that several commands share, and what is read from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluidopt.errors import InvalidInput

if TYPE_CHECKING:
    from fluidopt.contention import GPU
    from fluidopt.model import FluidModel
    from fluidopt.scenario import Scenario
    from fluidopt.workload import TokenPrices

# Said here once more, because a shell that completes a word cannot wait for the modules that define them.
SOLVERS = ("auto", "knapsack", "highs", "cvxpy")
FORMS = ("auto", "affine", "linear", "piecewise", "table")
UNITS = ("s", "ms", "us")
STARTS = ("empty", "fluid")
KINDS = (
    "gate-and-route",
    "prioritize-and-route",
    "sli-aware",
    "sli-aware-general",
    "FI-WSP",
    "GI-WSP",
    "GF-WSP",
    "FG-SP",
    "GG-SP",
    "refined",
)
PROMISES = (
    "slot_tpot",
    "mean_ttft",
    "mean_tpot",
    "mean_wait",
    "abandonment_share",
    "completion_floor",
    "prefill_fairness",
    "decode_fairness",
)


def among(words: Sequence[str]) -> Callable[[str], list[str]]:
    """What a shell offers in place of a word that is not finished: those of ``words`` that begin like it."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def gpu_names(incomplete: str) -> list[str]:
    """The GPUs that ship with the package and begin like this; their names alone, without their curves."""
    text = files("fluidopt").joinpath("data", "gpus.json").read_text(encoding="utf-8")
    return among([*json.loads(text)])(incomplete)


Inputs = Annotated[
    list[Path],
    typer.Argument(metavar="SCENARIO|TRACE...", help="A scenario file (.toml, .json), or one or more trace files."),
]
Traces = Annotated[list[Path], typer.Argument(metavar="TRACE...", help="One or more trace files.")]
Gpus = Annotated[int | None, typer.Option(help="Number of GPUs in the fleet; a trace needs it.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="NAME=COLUMN",
        help="With a trace: what it calls arrival_time, prompt_tokens or output_tokens; may be repeated.",
    ),
]
Template = Annotated[
    Path | None,
    typer.Option("--with", metavar="SCENARIO", help="With a trace: take all but the classes from this scenario."),
]
Classes = Annotated[int | None, typer.Option(help="With a trace: how many classes to form (default: chosen).")]
Patience = Annotated[
    float, typer.Option("--abandonment-rate", help="With a trace: 1/s, 0 for requests that never give up.")
]
Solver = Annotated[str, typer.Option(help="auto, knapsack, highs or cvxpy.", autocompletion=among(SOLVERS))]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Seed = Annotated[int, typer.Option(help="Seed of the random streams.")]
Horizon = Annotated[float, typer.Option(help="Simulated seconds per replication, warm-up included.")]
Precision = Annotated[
    float | None,
    typer.Option(help="Instead of a horizon: run until revenue is known to this part of it (0.001: 0.1 %)."),
]
Warmup = Annotated[float | None, typer.Option(help="Seconds not measured (default: chosen by MSER).")]
Kind = Annotated[
    str | None,
    typer.Option("--policy", help="Kind of policy (default: the plan's own).", autocompletion=among(KINDS)),
]
Kinds = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="Kind of policy; several of them are compared on the same arrivals.",
        autocompletion=among(KINDS),
    ),
]
Replications = Annotated[int, typer.Option(help="Independent replications, at least 2.")]
Start = Annotated[str, typer.Option(help="empty, or fluid: the plan's equilibrium.", autocompletion=among(STARTS))]
Figure = Annotated[Path | None, typer.Option(help="Write a figure there (.png, .svg or .pdf).")]
BatchSize = Annotated[int | None, typer.Option(help="Requests that a GPU batches at most.")]
ChunkSize = Annotated[int | None, typer.Option(help="Prompt tokens of an iteration.")]
KvTokens = Annotated[int | None, typer.Option(help="Tokens that the KV cache of a GPU holds (default: any).")]
Percentile = Annotated[
    float | None, typer.Option(help="Of a trace's requests, the per cent that must meet both (default: 90).")
]
Mean = Annotated[bool, typer.Option("--mean", help="Instead: the means over the requests must meet them.")]

# Of a GPU named on the command line, where nothing else is said: common settings of engines.
BATCH, CHUNK = 64, 512


def read_model(
    inputs: list[Path],
    column: list[str] | None,
    gpus: int | None,
    template: Path | None,
    classes: int | None,
    abandonment_rate: float,
) -> FluidModel:
    """The model of a scenario file, or of trace files on that many GPUs."""

    stated = scenario_model(inputs, column, gpus, template, classes, abandonment_rate)
    if stated is not None:
        return stated
    if gpus is None:
        raise InvalidInput("--gpus is required with a trace: the number of GPUs that share its requests")
    from fluidopt.model import FluidModel
    from fluidopt.reference import reference_model
    from fluidopt.scenario import read_scenario
    from fluidopt.traces import read_trace

    base = read_scenario(template) if template is not None else reference_model().scenario
    trace = read_trace(inputs, columns=columns_of(column))
    workload = trace.classify(classes, abandonment_rate=abandonment_rate).per_gpu(gpus)
    return FluidModel.from_scenario(base.with_workload(workload, gpus=gpus))


def scenario_model(
    inputs: list[Path],
    column: list[str] | None,
    gpus: int | None,
    template: Path | None,
    classes: int | None,
    abandonment_rate: float,
) -> FluidModel | None:
    """The model of a scenario file, beside which options of a trace are refused; None where the inputs are a trace."""
    if len(inputs) != 1 or not _is_scenario(inputs[0]):
        return None
    if template is not None or classes is not None or abandonment_rate or column:
        raise InvalidInput(
            "--column, --with, --classes and --abandonment-rate go with a trace; the scenario says these itself"
        )
    from fluidopt.model import FluidModel
    from fluidopt.scenario import read_scenario

    return FluidModel.from_scenario(_resized(read_scenario(inputs[0]), gpus))


def share_of_requests(percentile: float | None, mean: bool) -> float | None:
    """The per cent of the requests that must meet the limits; None where their means must."""
    if mean and percentile is not None:
        raise InvalidInput("--percentile and --mean both say what must meet the limits; give one of them")
    return None if mean else 90.0 if percentile is None else percentile


def columns_of(given: list[str] | None) -> dict[str, str] | None:
    """What a file calls its columns, by the name of each here."""
    pairs = [each.partition("=") for each in given or ()]
    for name, _, column in pairs:
        if not (name and column):
            raise InvalidInput(f"--column must be NAME=COLUMN, the name here and the file's; got {name + _ + column!r}")
    return {name: column for name, _, column in pairs} or None


def _resized(scenario: Scenario, gpus: int | None) -> Scenario:
    """The scenario with another number of GPUs, which its total rates (if it gives totals) are divided by."""
    from dataclasses import replace

    return scenario if gpus is None else replace(scenario, gpus=gpus)


def _is_scenario(path: Path) -> bool:
    """A .toml is a scenario; a .json is one if its top level has classes (a trace may be JSON too)."""
    if path.suffix.lower() == ".toml":
        return True
    if path.suffix.lower() != ".json":
        return False
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # read_scenario says what is wrong with it
    return isinstance(data, dict) and not {"classes", "gpu", "prices"}.isdisjoint(data)


def gpu_types(
    named: list[str] | None, template: Path | None, batch_size: int | None, chunk_size: int | None
) -> tuple[list[GPU], TokenPrices | None]:
    """The GPU types of --gpu or --with, and what a token earns where a scenario says so."""
    from dataclasses import replace

    from fluidopt.reference import reference_model
    from fluidopt.scenario import read_scenario

    if named:
        if template is not None:
            raise InvalidInput("--gpu and --with both name the GPU types; give one of them")
        return [_known(each, batch_size or BATCH, chunk_size or CHUNK) for each in named], None
    scenario = read_scenario(template) if template is not None else reference_model().scenario
    sizes = {"batch_size": batch_size, "chunk_size": chunk_size}
    given = {name: value for name, value in sizes.items() if value is not None}
    types = [replace(each, operating_modes=None, share=1.0, **given) for each in scenario.gpu_types]  # type: ignore[arg-type]
    return types, scenario.prices


def _known(named: str, batch_size: int, chunk_size: int) -> GPU:
    """A GPU by its name, with the price behind the equals sign."""
    from fluidopt.data.gpus import known_gpu

    name, separator, price = named.partition("=")
    try:
        hourly = float(price) if separator else None
    except ValueError:
        raise InvalidInput(f"--gpu must be a name, or name=price per hour; got {named!r}") from None
    return known_gpu(name, batch_size=batch_size, chunk_size=chunk_size, hourly_price=hourly)
