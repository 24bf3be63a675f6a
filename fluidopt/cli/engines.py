"""The command that turns a plan into settings of inference engines."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from fluidopt.cli.options import Classes, Columns, Gpus, Inputs, Json, Kind, Patience, Template, read_model
from fluidopt.cli.output import print_json, print_sentence, print_table, prose, terminal
from fluidopt.errors import InvalidInput

if TYPE_CHECKING:
    from fluidopt.policy.engines import EngineRole


def engines(
    inputs: Inputs,
    column: Columns = None,
    gpus: Gpus = None,
    template: Template = None,
    classes: Classes = None,
    abandonment_rate: Patience = 0.0,
    policy: Kind = None,
    model: Annotated[str, typer.Option(help="Name of the language model in the commands.")] = "MODEL",
    as_json: Json = False,
) -> None:
    """Print the vLLM settings of the plan's policy, role by role, and what of it no setting says.

    Example: fluidopt engines scenario.toml --gpus 20 --model Qwen/Qwen3-8B
    """
    from fluidopt.policy.engines import engine_settings

    fluid = read_model(inputs, column, gpus, template, classes, abandonment_rate)
    size = gpus if gpus is not None else fluid.scenario.gpus
    if size is None:
        raise InvalidInput("--gpus is required: the scenario does not say how many GPUs the fleet has")
    chosen = fluid.solve().policy(gpus=size, kind=policy)
    found = engine_settings(chosen)
    if as_json:
        commands = {role.name: role.command_line(model) for role in found.roles}
        print_json({**found.to_dict(), "commands": commands})
        return
    console = terminal()
    frame = found.to_frame()
    frame.columns = ["engines", "requests", "tokens", "chunk", "order", "KV caches", "decodes"]
    console.print(found.title, markup=False, width=prose())
    print_table(console, f"One engine at most (vLLM {found.versions})", frame, first="role")
    for role in found.roles:
        console.print(f"[bold]{role.replicas} x {role.name}[/]", width=prose())
        print(_command(role, model), end="\n\n")
    if found.priorities:
        places = ", ".join(f"{name} {place}" for name, place in found.priorities.items())
        print_sentence(console, "Priority of a request: ", places)
        console.print()
    console.print("[bold]Not said by these settings[/]")
    for at, gap in enumerate(found.gaps, start=1):
        print_sentence(console, f"  {at}. ", str(gap))


def _command(role: EngineRole, model: str) -> str:
    """The command over several lines, an option on each."""
    lines: list[list[str]] = [[]]
    for word in role.command(model):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(map(shlex.join, lines))
