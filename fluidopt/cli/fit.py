"""The command that fits an iteration-time curve to a table of measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluidopt.cli.options import FORMS, UNITS, Figure, Json, among, columns_of
from fluidopt.cli.output import check_figure, print_json, print_sentence, print_table, prose, terminal, writing

if TYPE_CHECKING:
    from rich.console import Console

    from fluidopt.calibration import IterationTimeFit


def fit(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Measured iteration times: a CSV file with a header.")],
    form: Annotated[
        str, typer.Option(help="auto, affine, linear, piecewise or table.", autocompletion=among(FORMS))
    ] = "auto",
    model: Annotated[str | None, typer.Option(help="The language model, where the table has several.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The GPU, where the table has several.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="The tensor-parallel size, likewise.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COLUMN",
            help="Of a plain table: what it calls chunk, decodes, kv_tokens or seconds; may be repeated.",
        ),
    ] = None,
    unit: Annotated[
        str, typer.Option(help="Of a plain table's times: s, ms or us.", autocompletion=among(UNITS))
    ] = "s",
    longest_kv: Annotated[
        float | None, typer.Option(help="Leave out measurements with more KV tokens per decode than this.")
    ] = None,
    figure: Figure = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the lines for a scenario file there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit an iteration-time curve to measurements, say how good it is, and give the lines for a scenario file.

    Example: fluidopt fit iteration_times.csv --column seconds=milliseconds --unit ms -o curve.toml
    """
    from fluidopt.calibration import fit_iteration_time, plot_fit, read_iteration_times

    # What may be written is checked before what takes time.
    check_figure(figure)
    frame = read_iteration_times(
        table,
        model=model,
        gpu=gpu,
        tensor_parallel=tensor_parallel,
        columns=columns_of(column),
        unit=unit,  # type: ignore[arg-type]
    )
    if longest_kv is not None:
        frame = frame[frame["kv_tokens"] <= longest_kv]
    found = fit_iteration_time(frame, form=form)  # type: ignore[arg-type]
    if figure is not None:
        with writing(figure):
            plot_fit(found).savefig(figure)
    if output is not None:
        with writing(output):
            output.write_text(found.to_toml(), encoding="utf-8")
    if as_json:
        print_json(found.to_dict())
        return
    console = terminal()
    _show(console, found)
    if output is not None:
        console.print(f"Lines for a scenario file: {output}", markup=False)
    elif found.form == "table":
        console.print("The table is long: write its lines for a scenario file with --output.", width=prose())
    else:
        console.print("[bold]Lines for a scenario file[/]")
        print(found.to_toml(), end="")


def _show(console: Console, found: IterationTimeFit) -> None:
    """Print the choice, the coefficients, and how far to trust them."""
    print_sentence(console, "", found.headline)
    console.print()
    if len(found.cross_validation) > 1:
        shown = (100 * found.cross_validation[["error", "standard_error"]]).round(2)
        shown.columns = ["error %", "± of its distance to the best"]
        shown["choice"] = ["chosen" if each else "" for each in found.cross_validation["chosen"]]
        print_table(console, "Each form at levels left out", shown, first="form")
    if len(found.coefficients):
        shown = found.coefficients_text
        shown.columns = ["value", "± one standard error", "unit"]
        print_table(console, "Coefficients", shown, first="coefficient")
    for note in found.notes:
        print_sentence(console, "Note: ", note)
    if found.notes:
        console.print()
