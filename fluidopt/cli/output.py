"""What commands print and write: tables that fit a terminal, JSON, figures."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluidopt.errors import InvalidInput
from fluidopt.tables import MISSING, jsonable, number

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from fluidopt.plan import Plan
    from fluidopt.policy import Policy
    from fluidopt.simulation.result import SimulationResult
    from fluidopt.workload import Workload

# Tables fit 80 columns; a narrower terminal gets shorter labels, down to where numbers would break.
WIDTH, NARROWEST = 80, 70
LABEL = 26
MOST_MODE_COLUMNS = 3


def terminal() -> Console:
    """A console as wide as tables may be."""
    from rich.console import Console

    return Console(highlight=False, width=min(max(Console().width, NARROWEST), WIDTH))


def print_json(data: Any) -> None:
    """Print data as JSON, the only thing on standard output; JSON has no NaN and no infinity, so they become null."""
    ascii_only = not (sys.stdout.encoding or "ascii").lower().startswith("utf")
    print(json.dumps(jsonable(data), indent=2, ensure_ascii=ascii_only, allow_nan=False))


def frame_data(frame: pd.DataFrame | pd.Series[Any]) -> Any:
    """A table as JSON-able data, by row label."""
    return json.loads(frame.to_json(orient="index", double_precision=15))


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan as JSON-able data: its numbers, and what reads it back."""
    return {
        "revenue_rate": plan.revenue_rate,
        "objective": plan.objective,
        "modes": frame_data(plan.modes),
        "allocation": frame_data(plan.allocation),
        "thresholds": frame_data(plan.thresholds),
        "shadow_prices": frame_data(plan.shadow_prices),
        "binding": list(plan.binding),
        "notes": list(plan.notes),
        "certificate": {
            "primal_residual": plan.certificate.primal_residual,
            "dual_residual": plan.certificate.dual_residual,
            "gap": plan.certificate.gap,
        },
        **plan.to_dict(),
    }


def result_data(result: SimulationResult) -> dict[str, Any]:
    """A simulation as JSON-able data."""
    frame = result.to_frame()
    rows = [
        {"quantity": quantity, "of": of or None, **frame_data(row)}
        for (quantity, of), row in zip(frame.index, (frame.iloc[at] for at in range(len(frame))), strict=True)
    ]
    data = result.to_dict()
    del data["policy"]
    return {"comparison": rows, **data}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where a file is written: what the system refuses becomes one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InvalidInput(f"cannot write {path}: {reason}; name a file in a directory that you may write to") from None


def check_figure(path: Path | None) -> None:
    """Refuse a figure of a kind that is not drawn; asked before what takes time."""
    if path is not None and path.suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise InvalidInput(f"--figure must end in .png, .svg or .pdf; got {str(path)!r}")


def write_figure(path: Path, plan: Plan, result: SimulationResult | None) -> None:
    """Draw the plan, or the plan beside its simulated check, into a file."""
    from fluidopt.plots import plot_plan, plot_summary

    check_figure(path)
    figure = plot_plan(plan) if result is None else plot_summary(plan, result)
    with writing(path):
        figure.savefig(path)


def print_table(console: Console, title: str, frame: pd.DataFrame, *, first: str) -> None:
    """Print a frame as a table that fits the console; long labels are shortened."""
    from rich.table import Table
    from rich.text import Text

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


def print_sentence(console: Console, lead: str, sentence: str) -> None:
    """Print a sentence behind its number, later lines indented below its first word."""
    from textwrap import fill

    console.print(fill(sentence, width=prose(), initial_indent=lead, subsequent_indent=" " * len(lead)), markup=False)


def prose() -> int:
    """Columns for text: those of the terminal, where tables may need more."""
    from rich.console import Console

    return min(Console().width, WIDTH)


def show_classes(console: Console, workload: Workload) -> None:
    """Print the classes."""
    frame = workload.to_frame()
    frame.columns = ["requests/s", "prompt tokens", "output tokens", "gives up 1/s"]
    print_table(console, "Classes (arrival rate per GPU)", frame, first="class")


def show_plan(console: Console, plan: Plan) -> None:
    """Print headline, modes, allocation, thresholds, limits and notes of a plan."""
    console.print(
        f"[bold]Plan[/]: {plan.headline.replace('[', chr(92) + '[')} ({plan.solution.method}; {plan.certificate})\n",
        width=prose(),
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
    print_table(console, "How the fleet is split", modes, first="mode")
    allocation = plan.allocation.rename(columns={"throughput": "done/s"})
    by_mode = [name for name in allocation if "[" in str(name)]
    if len(by_mode) > MOST_MODE_COLUMNS:  # class totals here; the modes' own totals are above
        decodes = [name for name in by_mode if str(name).startswith("decode[")]
        allocation.insert(1, "decode", allocation[decodes].sum(axis=1, min_count=1))
        allocation = allocation.drop(columns=by_mode)
    allocation.columns = [str(name).replace("_queue", " queue").replace("[", " ").rstrip("]") for name in allocation]
    print_table(
        console, "Allocation (requests/GPU; done/s: requests completed per second and GPU)", allocation, first="class"
    )
    print_table(console, "Price thresholds (money per request)", plan.thresholds, first="class")
    if plan.binding:
        console.print("[bold]Held back by[/] (worth of one unit more)")
        for sentence in plan.binding[:8]:
            print_sentence(console, "  - ", sentence)
        if len(plan.binding) > 8:
            console.print(f"  ... {len(plan.binding) - 8} more (use --json for all)")
        console.print()
    for note in plan.notes:
        print_sentence(console, "Note: ", note)
        console.print()


def show_policy(console: Console, policy: Policy) -> None:
    """Print a policy as sentences."""
    console.print(f"[bold]Policy[/] {policy.title}")
    for at, rule in enumerate(policy.rules(), start=1):
        print_sentence(console, f"  {at}. ", rule)
    console.print()


def show_result(console: Console, result: SimulationResult) -> None:
    """Print a simulation beside the plan."""
    from rich.table import Table
    from rich.text import Text

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
        width=prose(),
    )
    console.print(table)
    _show_percentiles(console, result)
    console.print(
        f"\nThe fleet earns {result.revenue_rate.mean:.5g} ± {result.revenue_rate.half_width:.2g} per GPU"
        f"{result.against_plan}. The plan is a limit for large fleets: |z| above 2 is what the finite fleet does, not "
        "noise.",
        width=prose(),
    )


def _show_percentiles(console: Console, result: SimulationResult) -> None:
    from rich.table import Table
    from rich.text import Text

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
