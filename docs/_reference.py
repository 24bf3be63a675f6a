"""The tables of the scenario and command-line pages, made from the package itself so that they cannot fall behind."""

from __future__ import annotations

import os
import subprocess
import sys
from tempfile import TemporaryDirectory
from textwrap import fill
from typing import Any

from IPython.display import Markdown

SCRATCH = TemporaryDirectory()
LEVELS = (
    "PrefillFairness",
    "DecodeFairness",
    "SlotTPOT",
    "MeanWait",
    "MeanTTFT",
    "MeanTPOT",
    "AbandonmentShare",
    "CompletionFloor",
    "KVMemory",
    "KVTransfer",
)
CURVES = ("IterationTime", "LinearTime", "Kink", "TabulatedTime")
ORDER = ("Scenario", "WorkloadClass", "GPU", *CURVES, "Mode", "TokenPrices", "Row", *LEVELS)
LEVEL = "service level (below)"
TYPES = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true/false"}


def scenario_fields() -> Markdown:
    """A table of fields for each type in the schema of scenario files."""
    from fluidopt.scenario import scenario_schema

    schema = scenario_schema()
    types = {**schema["$defs"], "Scenario": schema}
    missing = set(types) - set(ORDER)
    assert not missing, f"the scenario page has no place for {missing}"
    return Markdown("\n".join(_fields(name, types[name]) for name in ORDER))


def _fields(name: str, of: dict[str, Any]) -> str:
    heading = "Top level" if name == "Scenario" else name
    lines = [f"**{heading}**", "", "| field | value | default | meaning |", "|---|---|---|---|"]
    for field, says in of["properties"].items():
        if field in of.get("required", ()):
            default = "required"
        else:
            default = "–" if says.get("default") is None else f"`{str(says['default']).lower()}`"
        lines.append(f"| `{field}` | {_value(says)} | {default} | {_cell(says.get('description', ''))} |")
    return "\n".join(lines) + "\n"


def _value(says: dict[str, Any]) -> str:
    if "anyOf" in says:
        return " or ".join(_value(each) for each in says["anyOf"] if each.get("type") != "null")
    if "oneOf" in says:
        return " or ".join(_value(each) for each in says["oneOf"]) if len(says["oneOf"]) < len(LEVELS) else LEVEL
    if "const" in says:
        return f'`"{says["const"]}"`'
    if "$ref" in says:
        return says["$ref"].rsplit("/", 1)[-1]
    if "enum" in says:
        return ", ".join(f'`"{each}"`' for each in says["enum"])
    if says["type"] == "array":
        return f"list of {_value(says['items'])}"
    limits = [
        f"{sign} {says[key]:g}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("maximum", "≤"))
        if key in says
    ]
    return " ".join([TYPES[says["type"]], ", ".join(limits)]).strip()


def command_options() -> Markdown:
    """A section per command: what it does, its arguments and options."""
    import typer

    from fluidopt.cli import app

    commands: Any = typer.main.get_command(app)
    parts = []
    for name, command in commands.commands.items():
        parts += [f"**fluidopt {name}**", ""]
        for paragraph in f"{command.help}\n\n{command.epilog}".split("\n\n"):
            # Examples stand in paragraphs that click does not wrap, which a backspace marks.
            unbroken = paragraph.startswith("\b\n")
            parts += ["```bash", paragraph[1:].strip(), "```", ""] if unbroken else [paragraph, ""]
        rows = [_option(each) for each in command.params if each.name != "help"]
        if rows:
            parts += ["| | default | |", "|---|---|---|", *rows, ""]
    return Markdown("\n".join(parts))


def _option(option: Any) -> str:
    names = ", ".join(f"`{each}`" for each in option.opts) if option.param_type_name == "option" else ""
    label = _cell(names or f"`{option.metavar or option.name.upper()}`")
    if option.required:
        default = "required"
    elif option.default is None or option.default is False:
        default = "–"
    else:
        default = f"`{option.default}`"
    return f"| {label} | {default} | {_cell(option.help or '')} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def run(command: str) -> None:
    """Run a command line of fluidopt's and print what it prints, and its exit code where that is not 0.

    All commands of a page run in one directory, which goes when the page is done.
    """
    words = command.split()
    assert words[0] == "fluidopt"
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False, cwd=SCRATCH.name)
    print(f"$ {command}")
    print((done.stdout + fill(done.stderr.strip(), width=88)).rstrip())
    if done.returncode:
        print(f"$ echo $?\n{done.returncode}")


def complete(line: str) -> None:
    """Print what bash would offer at the end of a line."""
    asked = {"_FLUIDOPT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    words = [sys.executable, "-c", "from fluidopt.cli import app; app(prog_name='fluidopt')"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **asked})
    print("  ".join(done.stdout.split()))
