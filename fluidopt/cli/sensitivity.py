"""The command that says what a plan depends on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluidopt.cli.options import Classes, Columns, Figure, Gpus, Inputs, Json, Patience, Template, read_model
from fluidopt.cli.output import check_figure, print_json, print_table, prose, terminal, writing
from fluidopt.errors import InvalidInput

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from fluidopt.studies.sensitivity.curve import SensitivityCurve
    from fluidopt.studies.sensitivity.local import Sensitivity

Names = Annotated[
    list[str] | None,
    typer.Option("--parameter", metavar="NAME", help="A parameter; may be repeated (default: all)."),
]


def sensitivity(
    inputs: Inputs,
    column: Columns = None,
    parameter: Names = None,
    lower: Annotated[float | None, typer.Option(help="With one --parameter: its exact curve from here ...")] = None,
    upper: Annotated[float | None, typer.Option(help="... to here.")] = None,
    change: Annotated[float, typer.Option(help="Share by which the figure moves each parameter.")] = 0.1,
    gpus: Gpus = None,
    template: Template = None,
    classes: Classes = None,
    abandonment_rate: Patience = 0.0,
    figure: Figure = None,
    as_json: Json = False,
) -> None:
    """Say what the optimal revenue depends on: derivatives, kinks, and the exact curve over a range.

    Example: fluidopt sensitivity scenario.toml --parameter alpha --parameter batch_size

    The optimum as a function of one parameter: fluidopt sensitivity scenario.toml --parameter chunk_size --lower 16
    --upper 1024
    """
    from fluidopt.studies.sensitivity.curve import sensitivity_curve
    from fluidopt.studies.sensitivity.local import sensitivity as local

    check_figure(figure)
    model = read_model(inputs, column, gpus, template, classes, abandonment_rate)
    if lower is not None or upper is not None:
        if lower is None or upper is None or parameter is None or len(parameter) != 1:
            raise InvalidInput("--lower and --upper go together, with one --parameter")
        curve = sensitivity_curve(model, parameter[0], lower=lower, upper=upper)
        _write(figure, curve.plot)
        if as_json:
            print_json(curve.to_dict() | {"kinks": [vars(kink) for kink in curve.kinks]})
        else:
            _show_curve(terminal(), curve)
        return
    found = local(model, parameter)
    _write(figure, lambda: found.tornado(change))
    if as_json:
        print_json(found.to_dict())
    else:
        _show(terminal(), found)


def _write(path: Path | None, draw: Any) -> None:
    if path is None:
        return
    drawn = draw()
    with writing(path):
        drawn.savefig(path)


def _show(console: Console, found: Sensitivity) -> None:
    import pandas as pd

    frame = found.to_frame()
    bent = [each.kink for each in found.entries]
    columns: dict[str, pd.Series[Any]] = {"value": frame["value"], "unit": frame["unit"].str.replace("requests", "req")}
    if any(bent):
        columns |= {"dR*/d left": frame["left"], "dR*/d right": frame["right"]}
    else:
        columns |= {"dR*/d": frame["derivative"]}
    columns |= {"% per %": frame["elasticity"], "1 % more": frame["per_percent"]}
    table = pd.DataFrame(columns)
    print_table(console, "Optimal revenue R*, money/s per GPU, by parameter", table, first="parameter")
    whole = frame[frame["step_up"].notna()]
    if len(whole):
        steps = whole[["value", "step_down", "step_up"]].rename(
            columns={"step_down": "the last one brought", "step_up": "one more brings"}
        )
        print_table(console, "Whole numbers: exact steps, money/s per GPU", steps, first="parameter")
    console.print(found.statement, width=prose(), markup=False)
    for each in found.entries:
        if each.note and not each.note.startswith("derivative of the relaxation"):
            console.print(f"{each.parameter}: {each.note}", width=prose(), markup=False)


def _show_curve(console: Console, curve: SensitivityCurve) -> None:
    import pandas as pd

    rows = [vars(kink) for kink in curve.kinks]
    if rows:
        frame = pd.DataFrame(rows).rename(columns={"value": "R*", "left": "dR*/d left", "right": "dR*/d right"})
        frame.index = pd.Index([f"{each:.6g}" for each in frame.pop("at")])
        print_table(console, "Kinks", frame, first=f"{curve.parameter}, {curve.unit}")
    console.print(curve.statement, width=prose(), markup=False)
    console.print(curve.caption, width=prose(), markup=False)
