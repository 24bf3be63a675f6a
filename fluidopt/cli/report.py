"""The command that writes everything about one instance on a page."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluidopt.cli.effort import check_effort
from fluidopt.cli.options import (
    PROMISES,
    Classes,
    Columns,
    Horizon,
    Inputs,
    Json,
    Kind,
    Mean,
    Patience,
    Percentile,
    Precision,
    Replications,
    Seed,
    Start,
    Template,
    Warmup,
    among,
    columns_of,
    scenario_model,
    share_of_requests,
)
from fluidopt.cli.output import print_json, print_sentence, prose, terminal
from fluidopt.errors import InvalidInput

if TYPE_CHECKING:
    from fluidopt.model import FluidModel
    from fluidopt.traces import Trace

PAGE = Path("fluidopt-report.html")
# What does not change the page is not on it.
UNSAID = ("output", "as_json")


def report(
    context: typer.Context,
    inputs: Inputs,
    column: Columns = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"Where the page goes (default: {PAGE}; with --json, nowhere)."),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="Number of GPUs in the fleet; a trace needs it, or --ttft and --tpot, by which it is sized."),
    ] = None,
    template: Template = None,
    classes: Classes = None,
    abandonment_rate: Patience = 0.0,
    ttft: Annotated[float | None, typer.Option(help="Sizing: time to first token at most, s.")] = None,
    tpot: Annotated[float | None, typer.Option(help="Sizing: time per output token at most, s.")] = None,
    percentile: Percentile = None,
    mean: Mean = False,
    promise: Annotated[
        str | None,
        typer.Option(
            help="Frontier: service level whose bound is varied (default: the scenario's first that is no penalty, "
            "else slot_tpot, or of many classes completion_floor).",
            autocompletion=among(PROMISES),
        ),
    ] = None,
    policy: Kind = None,
    horizon: Horizon = 2000.0,
    precision: Precision = None,
    warmup: Warmup = None,
    replications: Replications = 8,
    start: Start = "empty",
    seed: Seed = 1,
    as_json: Json = False,
) -> None:
    """Write one page for the person who decides: inputs, plan, policy, prices, simulated check, frontier, sizing.

    The page is one HTML file that needs nothing else, for wide and narrow screens and for paper. A section that cannot
    be made says why.

    Example: fluidopt report scenario.toml -o report.html

    Recorded requests, with the fleet sized for a promise: fluidopt report requests.csv --ttft 2 --tpot 0.05
    """
    from fluidopt.reports import Unmade
    from fluidopt.reports import report as make
    from fluidopt.scenario import read_scenario
    from fluidopt.traces import read_trace

    # Where the page goes is checked before what takes time.
    page = PAGE if output is None and not as_json else output
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise InvalidInput(f"--output must be a file in a directory that exists; got {str(page)!r}")
    share = share_of_requests(percentile, mean)
    stated = scenario_model(inputs, column, gpus, template, classes, abandonment_rate)
    if (percentile is not None or mean) and (stated is not None or ttft is None):
        raise InvalidInput(
            "--percentile and --mean go with a trace and its --ttft and --tpot; of a scenario these limit the means"
        )
    subject = stated if stated is not None else read_trace(inputs, columns=columns_of(column))
    _check_effort(subject, gpus, horizon if precision is None else 0.0, replications)
    made = make(
        subject,
        gpus=gpus,
        scenario=read_scenario(template) if template is not None else None,
        classes=classes,
        abandonment_rate=abandonment_rate,
        policy=policy,
        horizon=horizon,
        precision=precision,
        warmup=warmup,
        replications=replications,
        start=start,  # type: ignore[arg-type]
        seed=seed,
        promise=promise,
        ttft=ttft,
        tpot=tpot,
        percentile=share,
        command=command_line(context),
    )
    if as_json:
        print_json(made.to_dict())
    if page is not None:
        made.save(page)
    if not as_json:
        console = terminal()
        console.print(f"[bold]{made.title}[/]", width=prose())
        for figure in made.figures:
            print_sentence(console, "  - ", figure.sentence)
        print(f"\nPage: {page}")
    print(_spent(made.seconds), file=sys.stderr)
    if isinstance(made.plan, Unmade):  # the page is there and says so, but it has no plan
        raise made.plan.error
    for name, part in made.unmade.items():
        print(f"warning: {name}: {part.why}", file=sys.stderr)


def _check_effort(subject: FluidModel | Trace, gpus: int | None, horizon: float, replications: int) -> None:
    """Refuse a simulation that would take days, as far as its fleet is known before the page is made."""
    from fluidopt.traces import Trace

    if isinstance(subject, Trace):
        check_effort(gpus or 1, subject.request_rate, horizon, replications)
    elif subject.scenario.gpus is not None:
        size = subject.scenario.gpus
        check_effort(size, size * subject.workload.arrival_rate.sum(), horizon, replications)


def command_line(context: Any) -> str:
    """The command with the options that were given, in one order, whatever the order on the command line."""
    words = ["fluidopt", "report"]
    for parameter in context.command.params:
        name, value = parameter.name, context.params.get(parameter.name)
        source = context.get_parameter_source(name)
        if name in UNSAID or source is None or source.name != "COMMANDLINE":
            continue
        if parameter.param_type_name == "argument":
            words += [str(each) for each in value]
        elif parameter.is_flag:
            words.append(parameter.opts[0])
        else:
            words += [word for each in _each(value) for word in (parameter.opts[0], str(each))]
    return shlex.join(words)


def _each(value: Any) -> Any:
    """The values of an option that may be repeated, or its one."""
    return value if isinstance(value, list | tuple) else (value,)


def _spent(seconds: dict[str, float]) -> str:
    """Where the time went, largest first; what took next to none left out."""
    parts = [
        f"{name} {value:.1f}" for name, value in sorted(seconds.items(), key=lambda each: -each[1]) if value >= 0.05
    ]
    return f"{sum(seconds.values()):.1f} s" + (f" ({', '.join(parts)})" if parts else "")
