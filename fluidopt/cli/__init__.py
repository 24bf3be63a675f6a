"""The terminal: ``fluidopt demo | plan | simulate | engines | fit | size | replay | sensitivity | schema``.

Exit codes: 0 done; 2 bad input (arguments, scenario or trace file); 3 no plan satisfies the rows; 4 no certified
answer. With ``--json`` standard output holds JSON and nothing else.
"""

from __future__ import annotations

import sys
import warnings

import typer

from fluidopt.cli import engines, fit, planning, replay, sensitivity, size
from fluidopt.errors import FluidoptError, InfeasibleModel, SolverFailure

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Plan how a fleet of GPUs splits between prefill and decode, whom it admits, and what that earns.",
)

for command in (
    planning.demo,
    planning.plan,
    planning.simulate,
    engines.engines,
    fit.fit,
    size.size,
    replay.replay,
    sensitivity.sensitivity,
    planning.schema,
):
    app.command()(command)


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
