"""The commands that walk the line from a scenario or a trace to a plan and its simulated check."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluidopt.cli.effort import check_effort
from fluidopt.cli.options import (
    Classes,
    Columns,
    Figure,
    Gpus,
    Horizon,
    Inputs,
    Json,
    Kinds,
    Patience,
    Precision,
    Replications,
    Seed,
    Solver,
    Start,
    Template,
    Warmup,
    read_model,
)
from fluidopt.cli.output import (
    plan_data,
    print_json,
    prose,
    result_data,
    show_classes,
    show_plan,
    show_policy,
    show_result,
    terminal,
    write_figure,
)
from fluidopt.errors import InvalidInput

if TYPE_CHECKING:
    from fluidopt.policy import Policy

DEMO_HORIZON = 2000.0


def demo(
    gpus: Annotated[int, typer.Option(help="Number of GPUs in the fleet.")] = 20,
    load: Annotated[float, typer.Option(help="Multiple of the recorded traffic.")] = 10.0,
    seed: Seed = 1,
    figure: Annotated[Path, typer.Option(help="Where the figure goes.")] = Path("fluidopt-demo.png"),
    as_json: Json = False,
) -> None:
    """Run the whole line on real numbers: classes, plan, prices, policy, simulated check.

    The numbers are a summary of one hour of production requests (Azure, November 2023) and the iteration times of
    Qwen-8B on an A100 measured in arXiv:2602.02987.

    Example: fluidopt demo --gpus 24
    """
    from fluidopt.data import azure_2023
    from fluidopt.model import FluidModel
    from fluidopt.reference import QWEN_8B_A100, reference_model

    if gpus < 1:
        raise InvalidInput(f"--gpus must be at least 1; got {gpus}")
    stream = azure_2023(abandonment_rate=0.05).scaled(load)
    model = FluidModel(
        stream.per_gpu(gpus), reference_model().scenario.gpu_types[0], prices=reference_model().scenario.prices
    )
    plan = model.solve()
    policy = plan.policy(gpus=gpus)
    check_effort(gpus, stream.arrival_rate.sum(), DEMO_HORIZON, 8)
    result = policy.simulate(horizon=DEMO_HORIZON, seed=seed)
    write_figure(figure, plan, result)
    if as_json:
        print_json({"plan": plan_data(plan), "policy": policy.to_dict(), "simulation": result_data(result)})
        return
    console = terminal()
    console.print(
        f"[bold]fluidopt demo[/]: {load:g} times the traffic of one hour of Azure's LLM service "
        f"(28,185 requests, CC-BY-4.0) on {gpus} GPUs running Qwen-8B on an A100 "
        f"(tau = {QWEN_8B_A100.alpha:g} + {QWEN_8B_A100.beta:g} C s, {QWEN_8B_A100.solo:g} s without prefill). "
        "Waiting requests give up after 20 s on average; a token earns 0.1 in the prompt, 0.2 in the output.\n",
        width=prose(),
    )
    show_classes(console, model.workload)
    show_plan(console, plan)
    show_policy(console, policy)
    show_result(console, result)
    console.print(f"\nFigure: {figure}", markup=False)
    console.print(
        "Next: [bold]fluidopt plan YOUR_TRACE.csv --gpus N[/], or files to try every command on: "
        "[bold]fluidopt example[/].",
        width=prose(),
    )


def plan(
    inputs: Inputs,
    column: Columns = None,
    gpus: Gpus = None,
    template: Template = None,
    classes: Classes = None,
    abandonment_rate: Patience = 0.0,
    solver: Solver = "auto",
    figure: Figure = None,
    as_json: Json = False,
) -> None:
    """Compute the optimal plan of a scenario or a trace: who is served, by which GPUs, at what prices.

    Example: fluidopt plan scenario.toml

    Recorded requests: fluidopt plan requests.csv --gpus 4 --abandonment-rate 0.05
    """
    model = read_model(inputs, column, gpus, template, classes, abandonment_rate)
    solved = model.solve(solver)
    size = gpus if gpus is not None else model.scenario.gpus
    policy = solved.policy(gpus=size) if size is not None else None
    if figure is not None:
        write_figure(figure, solved, None)
    if as_json:
        print_json({"plan": plan_data(solved)} | ({"policy": policy.to_dict()} if policy else {}))
        return
    console = terminal()
    show_classes(console, model.workload)
    show_plan(console, solved)
    if policy is not None:
        show_policy(console, policy)


def simulate(
    inputs: Inputs,
    column: Columns = None,
    gpus: Gpus = None,
    template: Template = None,
    classes: Classes = None,
    abandonment_rate: Patience = 0.0,
    policy: Kinds = None,
    horizon: Horizon = 2000.0,
    precision: Precision = None,
    warmup: Warmup = None,
    replications: Replications = 8,
    start: Start = "empty",
    seed: Seed = 1,
    figure: Figure = None,
    as_json: Json = False,
) -> None:
    """Simulate the plan's policy on a fleet of that many GPUs and compare with the plan.

    Example: fluidopt simulate scenario.toml --gpus 50

    Several policies on the same arrivals: fluidopt simulate scenario.toml --gpus 50 --policy GG-SP --policy FI-WSP
    """
    model = read_model(inputs, column, gpus, template, classes, abandonment_rate)
    size = gpus if gpus is not None else model.scenario.gpus
    if size is None:
        raise InvalidInput("--gpus is required: the scenario does not say how many GPUs the fleet has")
    offered = size * model.workload.arrival_rate.sum()
    check_effort(size, offered, horizon if precision is None else 0.0, replications)
    solved = model.solve()
    chosen = [solved.policy(gpus=size, kind=kind) for kind in (policy or [None])]  # type: ignore[list-item]
    if len(chosen) > 1:
        _compare(chosen, horizon, precision, warmup, replications, start, seed, figure, as_json)
        return
    result = chosen[0].simulate(
        horizon=horizon if precision is None else None,
        precision=precision,
        warmup=warmup,
        replications=replications,
        seed=seed,
        start=start,  # type: ignore[arg-type]
    )
    if figure is not None:
        write_figure(figure, solved, result)
    if as_json:
        print_json({"policy": chosen[0].to_dict(), "simulation": result_data(result)})
        return
    console = terminal()
    show_policy(console, chosen[0])
    show_result(console, result)


def _compare(
    policies: list[Policy],
    horizon: float,
    precision: float | None,
    warmup: float | None,
    replications: int,
    start: str,
    seed: int,
    figure: Path | None,
    as_json: bool,
) -> None:
    from rich.table import Table

    from fluidopt.simulation.compare import compare_policies
    from fluidopt.tables import MISSING, number

    for option, value in (("--precision", precision), ("--figure", figure)):
        if value is not None:
            raise InvalidInput(f"{option} goes with one --policy; got {len(policies)}")
    compared = compare_policies(
        policies,
        horizon=horizon,
        warmup=warmup,
        replications=replications,
        seed=seed,
        start=start,  # type: ignore[arg-type]
    )
    frame = compared.to_frame()
    if as_json:
        print_json({"baseline": compared.best, "policies": frame.reset_index().to_dict(orient="records")})
        return
    console = terminal()
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("policy", no_wrap=True, overflow="ellipsis")
    for column in ("revenue rate", "± 95 %", "of bound", f"less {compared.best}", "± 95 %"):
        table.add_column(column, justify="right")
    for row in frame.itertuples():
        share = f"{row.of_bound:.1%}" if math.isfinite(row.of_bound) else MISSING  # type: ignore[arg-type]
        revenue, gap = [row.revenue_rate, row.half_width], [row.difference, row.difference_half_width]
        table.add_row(str(row.Index), *map(number, revenue), share, *map(number, gap))
    console.print(f"[bold]Policies on {policies[0].gpus} GPUs[/], money/s per GPU", width=prose())
    console.print(table)
    console.print("\n" + compared.caption, width=prose())


def schema() -> None:
    """Print the JSON schema of a scenario file.

    Example: fluidopt schema > scenario.schema.json
    """
    from fluidopt.scenario import scenario_schema

    print_json(scenario_schema())
