"""A report as one HTML document: markup from the template, style and script inline, and nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING

import fluidopt
from fluidopt.reports.blocks import Block, Picture
from fluidopt.reports.svg import printable

if TYPE_CHECKING:
    from jinja2 import Template

    from fluidopt.reports.making import Report


def page(report: Report) -> str:
    """The document. Names and sentences are escaped by the template; of the figures, where they are written."""
    style, script = _text("page.css"), _text("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    text = _template().render(
        report=report,
        version=fluidopt.__version__,
        policy=policy,
        style=style,
        script=script,
        grouped=grouped,
    )
    return printable(text)


def grouped(blocks: Sequence[Block]) -> Iterator[tuple[str, list[Block]]]:
    """Blocks in order, figures that follow each other together: (kind, blocks)."""
    for drawn, group in groupby(blocks, key=lambda block: isinstance(block, Picture)):
        if drawn:
            yield "pictures", list(group)
        else:
            yield from ((block.kind, [block]) for block in group)


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fluidopt.reports", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html.jinja")


@cache
def _text(name: str) -> str:
    return files("fluidopt.reports").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline element of this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
