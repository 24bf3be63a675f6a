"""A matplotlib figure as SVG that belongs into a page: text as text, the page's colours, numbers to point at."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from fluidopt.plots import DARK, INK, LIGHT, MIDDLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# What the figures draw in, by the name of the page's own colour, which is another one in the dark.
COLOURS = {
    INK: "var(--ink)",
    "#000000": "var(--ink)",
    DARK: "var(--deep)",
    MIDDLE: "var(--warm)",
    LIGHT: "var(--pale)",
    "#ffffff": "var(--paper)",
    "#6b7280": "var(--quiet)",
    "#9aa5b1": "var(--quiet)",
}
# A spot is at least so wide and high, points, that a finger or a mouse can hit it.
LEAST_SPOT = 7.0
_FONT_SIZE = re.compile(r"([\d.]+)px")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
_REFERENCE = re.compile(r"#([\w-]+)")


@dataclass(frozen=True)
class Spot:
    """A part of a panel that says its numbers when it is pointed at, in data coordinates."""

    text: str
    across: tuple[float, float] | None = None
    """From and to on the horizontal axis; None for the whole width."""
    up: tuple[float, float] | None = None
    """From and to on the vertical axis; None for the whole height."""


def inline_svg(figure: Figure, axis: Axes, spots: Sequence[Spot], *, name: str, label: str) -> str:
    """Write a figure as an ``<svg>`` element.

    Styles become attributes, since a page that lets no inline style through would drop them; colours become the
    variables of the page; every id starts with ``name``, which must be unique on the page. Each spot is a transparent
    rectangle with a ``<title>``, which browsers show without a script, and ``data-tip`` for a script that does better.

    Args:
        figure: with ``axis``, drawn at 72 dots per inch.
        axis: whose data coordinates the spots are in.
        spots: what can be pointed at.
        name: letters, digits and hyphens.
        label: what the figure shows, for those who do not see it.

    The same figure gives the same text.
    """
    import matplotlib

    text = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fluidopt"}),
        warnings.catch_warnings(),
    ):
        # Text stays text: the reader's fonts have the letters, whether or not matplotlib's own has.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(text, format="svg", metadata=nothing)
    root = ET.fromstring(printable(text.getvalue()))
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")
    drawn = ET.Element("g", {"aria-hidden": "true"})
    for child in list(root):
        root.remove(child)
        if child.tag == "g":
            drawn.append(child)
        elif child.tag == "defs":
            drawn.extend([child] if child.find("style") is None else [])
    for element in drawn.iter():
        _own_attributes(element, name)
    _drop_unused_names(drawn)
    view = root.attrib["viewBox"]
    svg = ET.Element(
        "svg",
        {
            "class": "chart",
            "viewBox": view,
            "role": "group",
            "aria-label": label,
            "stroke-linejoin": "round",
            "stroke-linecap": "butt",
            **({"tabindex": "0"} if spots else {}),
        },
    )
    svg.append(drawn)
    height = float(view.split()[3])
    svg.extend(_spot(spot, axis, height) for spot in spots)
    return ET.tostring(svg, encoding="unicode")


def printable(text: str) -> str:
    """Text with a replacement character for each control character, which neither XML nor HTML may hold."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _own_attributes(element: ET.Element, name: str) -> None:
    """Styles as attributes, colours as variables, ids and references under the figure's name."""
    styles = element.attrib.pop("style", "")
    pairs = [pair.split(":", 1) for pair in styles.split(";") if ":" in pair]
    attributes = {key.strip(): value.strip() for key, value in pairs}
    font = _FONT_SIZE.search(attributes.pop("font", ""))
    if font:
        attributes["font-size"] = font[1]
    if f"{{{XLINK}}}href" in element.attrib:
        attributes["href"] = element.attrib.pop(f"{{{XLINK}}}href")
    element.attrib.pop("xml:space", None)
    element.attrib.update(attributes)
    for key, value in element.attrib.items():
        if key == "id":
            element.attrib[key] = f"{name}-{value}"
        elif key == "d":
            element.attrib[key] = " ".join(value.split())
        elif _refers(key, value):
            element.attrib[key] = _REFERENCE.sub(rf"#{name}-\1", value)
        elif key in ("fill", "stroke"):
            element.attrib[key] = COLOURS.get(value.lower(), value)


def _refers(key: str, value: str) -> bool:
    return key == "href" or value.startswith("url(#")


def _drop_unused_names(drawn: ET.Element) -> None:
    """Take ids away that nothing refers to."""
    used = {
        found[1]
        for element in drawn.iter()
        for key, value in element.attrib.items()
        if _refers(key, value) and (found := _REFERENCE.search(value))
    }
    for element in drawn.iter():
        if "id" in element.attrib and element.attrib["id"] not in used:
            del element.attrib["id"]


def _spot(spot: Spot, axis: Axes, height: float) -> ET.Element:
    """The rectangle of a spot; y goes down from the top, as SVG's does."""
    left, right = _ends(axis, spot.across, 0)
    low, high = _ends(axis, spot.up, 1)
    found = ET.Element(
        "rect",
        {
            "class": "spot",
            "x": f"{left:.1f}",
            "y": f"{height - high:.1f}",
            "width": f"{right - left:.1f}",
            "height": f"{high - low:.1f}",
            "tabindex": "-1",
            "role": "img",
            "aria-label": spot.text,
            "data-tip": spot.text,
        },
    )
    ET.SubElement(found, "title").text = spot.text
    return found


def _ends(axis: Axes, data: tuple[float, float] | None, along: int) -> tuple[float, float]:
    """From and to in points, inside the panel and wide enough to be hit."""
    limits = (float(axis.bbox.x0), float(axis.bbox.x1)) if along == 0 else (float(axis.bbox.y0), float(axis.bbox.y1))
    if data is None:
        return limits
    inside = axis.get_xlim()[0] if along else axis.get_ylim()[0]
    points = [(inside, value) if along else (value, inside) for value in data]
    low, high = sorted(float(axis.transData.transform(point)[along]) for point in points)
    short = LEAST_SPOT - (high - low)
    if short > 0:
        low, high = low - short / 2, high + short / 2
    return max(low, limits[0]), min(high, limits[1])
