"""The terminal: ``fluidopt demo | plan | simulate | schema``.

Exit codes: 0 done; 2 bad input (arguments, scenario or trace file); 3 no plan satisfies the rows; 4 no certified
answer. With ``--json`` standard output holds JSON and nothing else.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluidopt.errors import FluidoptError, InfeasibleModel, InvalidInput, SolverFailure

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from fluidopt.model import FluidModel
    from fluidopt.plan import Plan
    from fluidopt.policy import Policy
    from fluidopt.scenario import Scenario
    from fluidopt.simulation.result import SimulationResult
    from fluidopt.workload import Workload

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Plan how a fleet of GPUs splits between prefill and decode, whom it admits, and what that earns.",
)

# Tables fit 80 columns; a narrower terminal gets shorter labels, down to where numbers would break.
WIDTH, NARROWEST = 80, 70
LABEL = 26
MOST_MODE_COLUMNS = 3

Inputs = Annotated[
    list[Path],
    typer.Argument(metavar="SCENARIO|TRACE...", help="A scenario file (.toml, .json), or one or more trace files."),
]
Gpus = Annotated[int | None, typer.Option(help="Number of GPUs in the fleet; a trace needs it.")]
Template = Annotated[
    Path | None,
    typer.Option("--with", metavar="SCENARIO", help="With a trace: take all but the classes from this scenario."),
]
Classes = Annotated[int | None, typer.Option(help="With a trace: how many classes to form (default: chosen).")]
Patience = Annotated[
    float, typer.Option("--abandonment-rate", help="With a trace: 1/s, 0 for requests that never give up.")
]
Solver = Annotated[str, typer.Option(help="auto, knapsack, highs or cvxpy.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Seed = Annotated[int, typer.Option(help="Seed of the random streams.")]
Horizon = Annotated[float, typer.Option(help="Simulated seconds per replication, warm-up included.")]
Precision = Annotated[
    float | None,
    typer.Option(help="Instead of a horizon: run until revenue is known to this part of it (0.001: 0.1 %)."),
]
Warmup = Annotated[float | None, typer.Option(help="Seconds not measured (default: chosen by MSER).")]
Kinds = Annotated[
    list[str] | None,
    typer.Option("--policy", help="Kind of policy; several of them are compared on the same arrivals."),
]
Replications = Annotated[int, typer.Option(help="Independent replications, at least 2.")]
Start = Annotated[str, typer.Option(help="empty, or fluid: the plan's equilibrium.")]
Figure = Annotated[Path | None, typer.Option(help="Write a figure there (.png, .svg or .pdf).")]


@app.command()
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
    result = policy.simulate(horizon=2000.0, seed=seed)
    _write_figure(figure, plan, result)
    if as_json:
        _print_json({"plan": _plan_data(plan), "policy": policy.to_dict(), "simulation": _result_data(result)})
        return
    console = _console()
    console.print(
        f"[bold]fluidopt demo[/]: {load:g} times the traffic of one hour of Azure's LLM service "
        f"(28,185 requests, CC-BY-4.0) on {gpus} GPUs running Qwen-8B on an A100 "
        f"(tau = {QWEN_8B_A100.alpha:g} + {QWEN_8B_A100.beta:g} C s, {QWEN_8B_A100.solo:g} s without prefill). "
        "Waiting requests give up after 20 s on average; a token earns 0.1 in the prompt, 0.2 in the output.\n",
        width=_prose(),
    )
    _show_classes(console, model.workload)
    _show_plan(console, plan)
    _show_policy(console, policy)
    _show_result(console, result)
    console.print(f"\nFigure: {figure}")
    console.print(
        "Next: [bold]fluidopt plan YOUR_TRACE.csv --gpus N[/], or write a scenario ([bold]fluidopt schema[/]).",
        width=_prose(),
    )


@app.command()
def plan(
    inputs: Inputs,
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
    """
    model = _read_model(inputs, gpus, template, classes, abandonment_rate)
    solved = model.solve(solver)
    size = gpus if gpus is not None else model.scenario.gpus
    policy = solved.policy(gpus=size) if size is not None else None
    if figure is not None:
        _write_figure(figure, solved, None)
    if as_json:
        _print_json({"plan": _plan_data(solved)} | ({"policy": policy.to_dict()} if policy else {}))
        return
    console = _console()
    _show_classes(console, model.workload)
    _show_plan(console, solved)
    if policy is not None:
        _show_policy(console, policy)


@app.command()
def simulate(
    inputs: Inputs,
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
    model = _read_model(inputs, gpus, template, classes, abandonment_rate)
    size = gpus if gpus is not None else model.scenario.gpus
    if size is None:
        raise InvalidInput("--gpus is required: the scenario does not say how many GPUs the fleet has")
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
        _write_figure(figure, solved, result)
    if as_json:
        _print_json({"policy": chosen[0].to_dict(), "simulation": _result_data(result)})
        return
    console = _console()
    _show_policy(console, chosen[0])
    _show_result(console, result)


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
        _print_json({"baseline": compared.best, "policies": frame.reset_index().to_dict(orient="records")})
        return
    console = _console()
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("policy", no_wrap=True, overflow="ellipsis")
    for column in ("revenue rate", "± 95 %", "of bound", f"less {compared.best}", "± 95 %"):
        table.add_column(column, justify="right")
    for row in frame.itertuples():
        share = f"{row.of_bound:.1%}" if math.isfinite(row.of_bound) else MISSING  # type: ignore[arg-type]
        revenue, gap = [row.revenue_rate, row.half_width], [row.difference, row.difference_half_width]
        table.add_row(str(row.Index), *map(number, revenue), share, *map(number, gap))
    console.print(f"[bold]Policies on {policies[0].gpus} GPUs[/], money/s per GPU", width=_prose())
    console.print(table)
    console.print("\n" + compared.caption, width=_prose())


@app.command()
def schema() -> None:
    """Print the JSON schema of a scenario file.

    Example: fluidopt schema > scenario.schema.json
    """
    from fluidopt.scenario import scenario_schema

    _print_json(scenario_schema())


def main() -> None:
    """Entry point of the ``fluidopt`` command: errors become one line on standard error and an exit code."""
    warnings.showwarning = lambda message, *_args, **_kwargs: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except FluidoptError as error:
        hint = " (--abandonment-rate)" if "give a class an abandonment rate" in str(error) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        code = {InfeasibleModel: 3, SolverFailure: 4}.get(type(error), 2)
        raise SystemExit(code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


# ---- reading --------------------------------------------------------------------------------------------------


def _read_model(
    inputs: list[Path], gpus: int | None, template: Path | None, classes: int | None, abandonment_rate: float
) -> FluidModel:
    from dataclasses import replace

    from fluidopt.model import FluidModel
    from fluidopt.scenario import read_scenario

    if len(inputs) == 1 and _is_scenario(inputs[0]):
        if template is not None or classes is not None or abandonment_rate:
            raise InvalidInput(
                "--with, --classes and --abandonment-rate go with a trace; the scenario says these itself"
            )
        scenario = read_scenario(inputs[0])
        return FluidModel.from_scenario(_resized(scenario, gpus))
    if gpus is None:
        raise InvalidInput("--gpus is required with a trace: the number of GPUs that share its requests")
    from fluidopt.reference import reference_model
    from fluidopt.traces import read_trace

    base = read_scenario(template) if template is not None else reference_model().scenario
    workload = read_trace(inputs).classify(classes, abandonment_rate=abandonment_rate).per_gpu(gpus)
    return FluidModel.from_scenario(
        replace(base, classes=workload.classes, rates="per_gpu", gpus=gpus, source=workload.source)
    )


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


# ---- writing --------------------------------------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, width=min(max(Console().width, NARROWEST), WIDTH))


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def _frame_data(frame: pd.DataFrame | pd.Series[Any]) -> Any:
    return json.loads(frame.to_json(orient="index", double_precision=15))


def _plan_data(plan: Plan) -> dict[str, Any]:
    return {
        "revenue_rate": plan.revenue_rate,
        "objective": plan.objective,
        "modes": _frame_data(plan.modes),
        "allocation": _frame_data(plan.allocation),
        "thresholds": _frame_data(plan.thresholds),
        "shadow_prices": _frame_data(plan.shadow_prices),
        "binding": list(plan.binding),
        "notes": list(plan.notes),
        "certificate": {
            "primal_residual": plan.certificate.primal_residual,
            "dual_residual": plan.certificate.dual_residual,
            "gap": plan.certificate.gap,
        },
        **plan.to_dict(),
    }


def _result_data(result: SimulationResult) -> dict[str, Any]:
    frame = result.to_frame()
    rows = [
        {"quantity": quantity, "of": of or None, **_frame_data(row)}
        for (quantity, of), row in zip(frame.index, (frame.iloc[at] for at in range(len(frame))), strict=True)
    ]
    data = result.to_dict()
    del data["policy"]
    return {"comparison": rows, **data}


def _write_figure(path: Path, plan: Plan, result: SimulationResult | None) -> None:
    from fluidopt.plots import plot_plan, plot_summary

    if path.suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise InvalidInput(f"--figure must end in .png, .svg or .pdf; got {str(path)!r}")
    figure = plot_plan(plan) if result is None else plot_summary(plan, result)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot write the figure to {path}: {error}") from None


def _table(console: Console, title: str, frame: pd.DataFrame, *, first: str) -> None:
    """Print a frame as a table that fits the console; long labels are shortened."""
    from rich.table import Table
    from rich.text import Text

    from fluidopt.tables import number

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1))
    table.add_column(first, no_wrap=True, overflow="ellipsis", max_width=LABEL - (WIDTH - console.width))
    for column in frame.columns:
        numeric = frame[column].dtype != object and frame[column].dtype.kind in "if"
        table.add_column(str(column), justify="right" if numeric else "left", overflow="fold")
    shown = frame.head(40)
    for label, row in zip(shown.index, shown.itertuples(index=False), strict=True):
        table.add_row(Text(str(label)), *(number(cell) for cell in row))
    console.print(table)
    if len(frame) > len(shown):
        console.print(f"... {len(frame) - len(shown)} more (use --json for all)")
    console.print()


def _sentence(console: Console, lead: str, sentence: str) -> None:
    """Print a sentence behind its number, later lines indented below its first word."""
    from textwrap import fill

    console.print(fill(sentence, width=_prose(), initial_indent=lead, subsequent_indent=" " * len(lead)), markup=False)


def _prose() -> int:
    """Columns for text: those of the terminal, where tables may need more."""
    from rich.console import Console

    return min(Console().width, WIDTH)


def _show_classes(console: Console, workload: Workload) -> None:
    frame = workload.to_frame()
    frame.columns = ["requests/s", "prompt tokens", "output tokens", "gives up 1/s"]
    _table(console, "Classes (arrival rate per GPU)", frame, first="class")


def _show_plan(console: Console, plan: Plan) -> None:
    console.print(
        f"[bold]Plan[/]: {plan.headline.replace('[', chr(92) + '[')} ({plan.solution.method}; {plan.certificate})\n",
        width=_prose(),
    )
    modes = plan.modes.rename(
        columns={
            "fleet_share": "share of fleet",
            "prefill": "prefills/GPU",
            "decode": "decodes/GPU",
            "decode_slots": "slots/GPU",
            "iteration_time": "iteration s",
        }
    )
    _table(console, "How the fleet is split", modes, first="mode")
    allocation = plan.allocation.rename(columns={"throughput": "done/s"})
    by_mode = [name for name in allocation if "[" in str(name)]
    if len(by_mode) > MOST_MODE_COLUMNS:  # class totals here; the modes' own totals are above
        decodes = [name for name in by_mode if str(name).startswith("decode[")]
        allocation.insert(1, "decode", allocation[decodes].sum(axis=1, min_count=1))
        allocation = allocation.drop(columns=by_mode)
    allocation.columns = [str(name).replace("_queue", " queue").replace("[", " ").rstrip("]") for name in allocation]
    _table(
        console, "Allocation (requests/GPU; done/s: requests completed per second and GPU)", allocation, first="class"
    )
    _table(console, "Price thresholds (money per request)", plan.thresholds, first="class")
    if plan.binding:
        console.print("[bold]Held back by[/] (worth of one unit more)")
        for sentence in plan.binding[:8]:
            _sentence(console, "  - ", sentence)
        if len(plan.binding) > 8:
            console.print(f"  ... {len(plan.binding) - 8} more (use --json for all)")
        console.print()
    for note in plan.notes:
        _sentence(console, "Note: ", note)
        console.print()


def _show_policy(console: Console, policy: Policy) -> None:
    console.print(f"[bold]Policy[/] {policy.title}")
    for at, rule in enumerate(policy.rules(), start=1):
        _sentence(console, f"  {at}. ", rule)
    console.print()


def _show_result(console: Console, result: SimulationResult) -> None:
    from rich.table import Table
    from rich.text import Text

    from fluidopt.tables import MISSING, number

    frame = result.to_frame()
    units = {
        "revenue_rate": "revenue rate, money/s per GPU",
        "throughput": "throughput, requests/s per GPU",
        "prefill_queue": "waiting for prefill, requests per GPU",
        "decode_queue": "waiting for decode, requests per GPU",
        "time_to_first_token": "mean time to first token, s",
        "abandonment_share": "abandoned, share of arrivals",
        "role_decode": "decodes in service, requests per GPU",
    }
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("plan against simulation", no_wrap=True, overflow="ellipsis", max_width=38)
    for column in ("fluid", "simulated", "± 95 %", "z"):
        table.add_column(column, justify="right")
    for quantity, unit in units.items():
        rows = frame.loc[[quantity]]
        if len(rows) > 1 or quantity == "role_decode":
            table.add_row(f"[bold]{unit}[/]")
        for (_, of), row in zip(rows.index, rows.itertuples(index=False), strict=True):
            cells = (number(cell) for cell in (row.fluid, row.simulated, row.half_width))
            z = float(row.z)  # type: ignore[arg-type]
            table.add_row(Text(f"  {of}" if of else unit), *cells, f"{z:+.1f}" if math.isfinite(z) else MISSING)
    console.print(
        f"[bold]Simulated check[/]: {result.caption}",
        width=_prose(),
    )
    console.print(table)
    _show_percentiles(console, result)
    console.print(
        f"\nThe fleet earns {result.revenue_rate.mean:.5g} ± {result.revenue_rate.half_width:.2g} per GPU"
        f"{result.against_plan}. The plan is a limit for large fleets: |z| above 2 is what the finite fleet does, not "
        "noise.",
        width=_prose(),
    )


def _show_percentiles(console: Console, result: SimulationResult) -> None:
    from rich.table import Table
    from rich.text import Text

    from fluidopt.tables import number

    frame = result.percentiles()
    if not len(frame):
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("of those served, s", no_wrap=True, overflow="ellipsis", max_width=38)
    for column in ("p50", "p90", "p99", "± 95 %"):
        table.add_column(column, justify="right")
    for quantity, name in (("time_to_first_token", "time to first token"), ("decode_wait", "wait for decode")):
        table.add_row(f"[bold]{name}[/]")
        for of, row in frame.loc[quantity].iterrows():
            table.add_row(Text(f"  {of}"), *(number(row[column]) for column in ("p50", "p90", "p99", "p99_half_width")))
    console.print()
    console.print(table)


if __name__ == "__main__":
    main()
