"""The terminal: ``fluidopt demo | example | plan | simulate | engines | fit | size | replay | sensitivity | report |
schema``.

Exit codes: 0 done; 2 bad input (arguments, scenario or trace file); 3 no plan satisfies the rows; 4 no certified
answer; 130 interrupted. With ``--json`` standard output holds JSON and nothing else.
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer

from fluidopt.cli import engines, example, fit, planning, replay, report, sensitivity, size
from fluidopt.errors import FluidoptError, InfeasibleModel, SolverFailure

HELP = """Plan how a fleet of GPUs splits between prefill and decode, whom it admits, and what that earns.

Start with fluidopt demo, or with fluidopt example for files to try the commands on."""
EXIT_CODES = """Exit codes: 0 done; 2 bad input (an argument, a scenario or a trace file); 3 no plan satisfies all rows;
4 no certified answer; 130 interrupted."""
_EXAMPLE = re.compile(r"(.*?):\s+(fluidopt .*)", re.DOTALL)
# What a message that speaks of Python is called here.
HINTS = {
    "give a class an abandonment rate": "--abandonment-rate",
    "columns are called with columns=": "--column arrival_time=COLUMN, likewise prompt_tokens and output_tokens",
}
# What typer raises for a misused command line; it exports no more than this subclass.
_Misuse: Any = typer.BadParameter.__mro__[1]


def told(docstring: str) -> dict[str, Any]:
    """What typer is told of a command: its text, the first clause of it, and below the options its examples.

    An example, "Its lead: fluidopt ...", gets a line of its own that click leaves whole, so that it can be pasted.
    """
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    examples = [found for each in paragraphs if (found := _EXAMPLE.fullmatch(each))]
    return {
        "help": "\n\n".join(each for each in paragraphs if not _EXAMPLE.fullmatch(each)),
        "short_help": re.split(r"[.:]\s|\.$", paragraphs[0])[0],
        "epilog": "\n\n".join(f"{each[1]}:\n\n\b\n  {' '.join(each[2].split())}" for each in examples),
    }


app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, help=HELP, epilog=EXIT_CODES)


@app.callback(invoke_without_command=True)
def fluidopt(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Print the version, or the help where no command is given."""
    if version:
        from fluidopt import __version__

        print(f"fluidopt {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


commands: tuple[Callable[..., None], ...] = (
    planning.demo,
    example.example,
    planning.plan,
    planning.simulate,
    engines.engines,
    fit.fit,
    size.size,
    replay.replay,
    sensitivity.sensitivity,
    report.report,
    planning.schema,
)
for command in commands:
    app.command(**told(command.__doc__ or ""))(command)


def main() -> None:
    """Entry point of the ``fluidopt`` command: errors become one line on standard error and an exit code."""
    with _ending_with_the_pipe():
        _run()


@contextmanager
def _ending_with_the_pipe() -> Iterator[None]:
    """Where the reader of a pipe has seen enough (``| head``), end as other programs do, without a traceback."""
    if not hasattr(signal, "SIGPIPE"):
        yield
        return
    earlier = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGPIPE, earlier)


def _run() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack "±"
    warnings.showwarning = lambda message, *_args, **_kwargs: print(f"warning: {message}", file=sys.stderr)
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except _Misuse as error:
        command = error.ctx.command_path if error.ctx else "fluidopt"
        _fail(2, f"{error.format_message().rstrip('.')}; {command} --help says more")
    except FluidoptError as error:
        hints = [option for words, option in HINTS.items() if words in str(error)]
        hint = f" ({'; '.join(hints)})" if hints else ""
        _fail({InfeasibleModel: 3, SolverFailure: 4}.get(type(error), 2), f"{error}{hint}")
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left has nowhere to go
        _fail(2, f"cannot write to standard output: {error.strerror}")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        print("interrupted", file=sys.stderr)
    raise SystemExit(code or 0)


def _fail(code: int, message: str) -> NoReturn:
    """End with one line on standard error."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)
