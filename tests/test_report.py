"""Reports: every number on a page is its object's, nothing breaks out of it, and browsers show it as it is meant."""

import base64
import contextlib
import functools
import hashlib
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from recorded import DATA, recorded

import fluidopt as fo
from fluidopt import cli
from fluidopt.errors import InfeasibleModel, InvalidInput
from fluidopt.reports import Unmade, report
from fluidopt.reports.page import page
from fluidopt.reports.svg import Spot, inline_svg
from fluidopt.studies.sizing.trace import TraceSize
from fluidopt.tables import number

GPUS = 12
SHORT = {"horizon": 300.0, "replications": 4}
BRIEF = ("--horizon", "300", "--replications", "4")
HOSTILE = "<script>alert('x')</script>&\"' ]]> {{ 7*7 }} $\\frac{$ \x1b"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
in_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs Chromium (a CI without one fails)"
)


class Page(HTMLParser):
    """What a page holds: tables by id, as (label, text and values of the cells), and the tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[tuple[str, list[tuple[str, float | None]]]]] = {}
        self.figures: list[float] = []
        self._row: tuple[list[str], list[list[str]], list[float | None]] | None = None
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag == "table":
            self._rows = self.tables.setdefault(given["id"] or "", [])
        elif tag == "tr":
            self._row = ([], [], [])
        elif tag == "td" and self._row:
            self._row[1].append([])
            self._row[2].append(None)
        elif tag == "data":
            if self._row:
                self._row[2][-1] = float(given["value"] or "nan")
            else:
                self.figures.append(float(given["value"] or "nan"))
        if tag in ("th", "td"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self._inside.pop()
        elif tag == "tr" and self._row:
            label, texts, values = self._row
            if texts:
                shown = ["".join(each).strip() for each in texts]
                self._rows.append(("".join(label), list(zip(shown, values, strict=True))))
            self._row = None

    def handle_data(self, data):
        if self._row and self._inside:
            (self._row[0] if self._inside[-1] == "th" else self._row[1][-1]).append(data)


def values_of(frame) -> list[list[float]]:
    """The numbers of a frame, a list per row; words and truth values left out."""
    return [
        [float(cell) for cell in row if isinstance(cell, (int, float, np.number)) and not isinstance(cell, bool)]
        for row in frame.itertuples(index=False, name=None)
    ]


def assert_same(shown, frame, *, exactly=True) -> None:
    """A table of a page holds the frame, row by row: to the last bit with texts that round it, or to rounding."""
    rows = values_of(frame)
    assert len(shown) == len(rows)
    for (label, cells), values in zip(shown, rows, strict=True):
        texts = [text for text, value in cells if value is not None or text in ("–", "no limit")]
        found = [value for _, value in cells if value is not None]
        finite = [value for value in values if math.isfinite(value)]
        assert found == (finite if exactly else pytest.approx(finite, rel=1e-6, abs=1e-7)), label
        if exactly:
            assert texts == [number(value) if not math.isinf(value) else "no limit" for value in values], label


@pytest.fixture(scope="module")
def made():
    return report(fo.reference_model(), gpus=GPUS, ttft=5.0, **SHORT)


@pytest.fixture(scope="module")
def text(made):
    return made.to_html()


@pytest.fixture(scope="module")
def shown(text):
    return Page(text)


def some_trace(count=240, rate=2.0, seed=3):
    rng = np.random.default_rng(seed)
    return fo.Trace(
        np.cumsum(rng.exponential(1 / rate, count)),
        np.ceil(rng.lognormal(6.3, 0.8, count)).astype(int),
        np.ceil(rng.lognormal(4.2, 1.0, count)).astype(int),
        sources=("some.csv",),
    )


def blocks_of(made, kind):
    return [block for section in made.sections for block in section.blocks if block.kind == kind]


# ---- the numbers --------------------------------------------------------------------------------------------------


def test_every_table_holds_its_objects_numbers(made, shown):
    """Each object is made anew, by another call where there is one, from nothing that the report holds."""
    model = fo.reference_model()
    plan = model.solve("highs")
    result = plan.policy(gpus=GPUS).simulate(seed=1, **SHORT)
    curve = fo.frontier(model, fo.SlotTPOT(at_most=1.0))
    size = fo.size_fleet(
        model.workload.scaled(GPUS),
        model.gpu_types,
        prices=model.scenario.prices,
        service_levels=(fo.CompletionFloor(share=1.0), fo.MeanTTFT(at_most=5.0)),
    )
    prices, ranges = plan.shadow_prices, plan.price_ranges()
    tables = {block.name: block.frame for block in blocks_of(made, "table")}
    limits = tables["shadow-prices"].index
    assert set(limits) == {name for name in prices.index if abs(prices[name]) > 1e-9 and "prefill_slots" not in name}
    quantities = tables["simulated"].index.get_level_values("quantity").unique()
    frames = {
        "split": plan.modes,
        "allocation": plan.allocation,
        "thresholds": plan.thresholds,
        "shadow-prices": ranges.loc[limits],
        "simulated": result.to_frame().loc[list(quantities)],
        "percentiles": result.percentiles(),
        "kinks": curve.breakpoints.drop(columns="bound"),
        "fleet": size.to_frame(),
        "fleet-classes": size.classes,
        "fleet-promises": size.promises,
    }
    for name, frame in frames.items():  # by another solver: to rounding
        assert_same(shown.tables[name], frame, exactly=False)


def test_every_table_holds_its_frame(made, shown):
    """All tables, to the last bit, on the page and in the JSON."""
    data = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    saved = {
        block["name"]: block["rows"]
        for section in data["sections"]
        for block in section["blocks"]
        if block["kind"] == "table"
    }
    tables = {block.name: block for block in blocks_of(made, "table")}
    assert set(tables) == set(shown.tables) == set(saved)
    for name, table in tables.items():
        assert_same(shown.tables[name], table.frame)
        records = [[row[str(column)] for column in table.frame.columns] for row in saved[name]]
        wanted = [[None if cell != cell or cell in (math.inf, -math.inf) else cell for cell in row]
                  for row in table.frame.itertuples(index=False, name=None)]  # fmt: skip
        assert records == wanted


def test_the_head_says_what_the_objects_say(made, shown):
    optimum, simulated, completed, fleet, price = made.figures
    assert shown.figures == [each.value for each in made.figures]
    assert optimum.value == made.plan.revenue_rate == pytest.approx(297.71619)
    assert number(optimum.value * GPUS) in optimum.sentence
    assert "no policy earns more" in optimum.sentence
    revenue = made.result.revenue_rate
    assert simulated.value == revenue.mean
    assert f"{revenue.mean:.5g} ± {revenue.half_width:.2g}" in simulated.sentence
    assert f"{1 - revenue.mean / made.plan.revenue_rate:.1%} below" in simulated.sentence
    rates = made.model.workload.arrival_rate
    assert completed.value == pytest.approx(100 * made.plan.throughput.sum() / rates.sum())
    assert "“prefill-heavy” in full; “decode-heavy” in part" in completed.sentence
    assert fleet.value == int(made.size.whole_gpus.sum()) >= float(made.size.gpus.sum())
    assert price.unit == "money/s per ms"


def test_the_price_of_a_promise_is_what_tightening_it_costs(made):
    """The frontier's kink against two plans of their own, a hundredth of a millisecond apart."""
    model = fo.reference_model()
    free = made.frontier.free_from
    bounds = (free - 1e-5, free - 2e-5)
    near, far = (
        fo.FluidModel(
            model.workload, model.gpu_types, prices=model.scenario.prices, service_levels=[fo.SlotTPOT(at_most=bound)]
        ).solve("highs").revenue_rate
        for bound in bounds
    )  # fmt: skip
    assert near < made.plan.revenue_rate
    assert made.figures[-1].value == pytest.approx((near - far) / 0.01, rel=1e-3)
    assert number(1e3 * free) in made.figures[-1].sentence


def test_the_policy_and_the_conditions_are_there_word_for_word(made, text):
    plain = unescape(text)
    for sentence in (*made.policy.rules(), *made.plan.binding, *made.plan.notes, *made.size.notes):
        assert sentence in plain
    for condition in made.result.bound.conditions:
        assert condition.condition in plain
        assert condition.why in plain
    assert made.result.caption in plain


def test_figures_say_their_numbers_where_they_are_pointed_at(made, shown):
    spots = [given for tag, given in shown.tags if tag == "rect" and given.get("class") == "spot"]
    tips = [given["data-tip"] for given in spots]
    names = made.model.workload.names
    for name, arrives, done in zip(names, made.model.workload.arrival_rate, made.plan.throughput, strict=True):
        assert f"{name}: {number(arrives)} requests/s per GPU arrive, {number(done)} are completed" in tips
    frame = made.result.to_frame().loc["throughput"]
    for name, row in frame.iterrows():
        assert any(f"{name}: plan {number(row.fluid)}, simulated {number(row.simulated)}" in tip for tip in tips)
    for given in spots:
        assert given["aria-label"] == given["data-tip"]
        assert min(float(given[side]) for side in ("x", "y", "width", "height")) >= 0


def test_what_is_prefilled_is_not_what_is_completed():
    """Separate charging pays for prefills whose decode never runs."""
    made = report(fo.reference_model("separate"))
    plan = fo.reference_model("separate").solve()
    assert (plan.throughput < 0.99 * plan.admitted).all()
    assert "every class in part" in made.figures[1].sentence
    text = made.to_html()
    for name, done in zip(made.model.workload.names, plan.throughput, strict=True):
        assert f"{name}: 0.5 requests/s per GPU arrive, {number(done)} are completed" in text


def test_spots_lie_where_the_data_are():
    """Against the bars that matplotlib itself drew."""
    from fluidopt.reports.pictures import _drawn

    figure, axis = _drawn(2.0)
    for at, bar in enumerate(axis.bar([1.0, 2.0, 4.0], [3.0, 5.0, 1.0], width=0.5)):
        bar.set_gid(f"bar{at}")
    spots = [Spot(f"{at}", (at - 0.25, at + 0.25), (0.0, up)) for at, up in ((1, 3), (2, 5), (4, 1))]
    drawn = inline_svg(figure, axis, spots, name="bars", label="three bars")
    bars = re.findall(r'<path d="M ([\d.]+) ([\d.]+) L ([\d.]+) [\d.]+ L [\d.]+ ([\d.]+) [^"]*" clip-path', drawn)
    found = re.findall(r'class="spot" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn)
    assert len(bars) == len(found) == 3
    for (left, bottom, right, top), (x, y, width, height) in zip(
        (map(float, each) for each in bars), (map(float, each) for each in found), strict=True
    ):
        assert (x, y, x + width, y + height) == pytest.approx((left, top, right, bottom), abs=0.11)


# ---- parts that cannot be made, or trusted ------------------------------------------------------------------------


def test_a_sizing_that_cannot_be_loses_nothing_else():
    made = report(fo.reference_model(), gpus=GPUS, ttft=1e-3, **SHORT)
    assert list(made.unmade) == ["size"]
    assert isinstance(made.size.error, InfeasibleModel)
    text = made.to_html()
    assert escape(made.size.why, quote=False) in text.replace("&#39;", "'").replace("&#34;", '"')
    tables = Page(text).tables
    assert {"thresholds", "simulated", "kinks", "conditions"} <= set(tables)
    assert "fleet" not in tables


def test_without_a_plan_the_page_says_why_and_what_would_do():
    patient = fo.reference_model().workload.with_abandonment(0.0)
    model = fo.FluidModel(patient, fo.reference_model().gpu_types, prices=fo.TokenPrices(prompt=0.1, output=0.2))
    made = report(model, gpus=4, **SHORT)
    assert {"plan", "policy", "result"} <= set(made.unmade)
    text = unescape(made.to_html())
    assert made.plan.why in text
    assert "There is no plan: no plan satisfies all rows" in text
    assert text.count("it needs the plan, which could not be made") == 3  # policy, prices, simulation
    assert "those that never give up, which it must serve: decode-heavy, prefill-heavy" in text
    assert made.size.whole_gpus.sum() == 5
    assert [each.label for each in made.figures] == ["GPUs needed at least"]


def test_without_a_number_of_gpus_there_is_a_plan():
    made = report(fo.reference_model(), **SHORT)
    assert set(made.unmade) == {"policy", "result", "promises", "size"}
    assert "give gpus, or --gpus" in made.to_html()
    assert "thresholds" in Page(made.to_html()).tables


def test_what_cannot_be_trusted_is_said(made):
    assert "Do not rely" not in made.to_html()
    shaky = replace(made, result=replace(made.result, stationary=False, precision=1e-9))
    text = shaky.to_html()
    assert text.count("Do not rely on") == 2  # in the head and in its section
    assert "The precision of 1e-09 was not reached" in text


def test_promises_are_held_against_the_simulation():
    """A mean TTFT of the fluid limit; the ratio on the page against Little's law in a simulation of its own."""
    reference, at_most = fo.reference_model(), 0.6
    model = fo.FluidModel(
        reference.workload,
        reference.gpu_types,
        prices=reference.scenario.prices,
        service_levels=[fo.MeanTTFT(at_most=at_most)],
    )
    made = report(model, gpus=4, horizon=1500.0, replications=4)
    assert made.settings.promise is None
    assert made.frontier.promises[0].name == "mean_ttft"
    rows = dict(Page(made.to_html()).tables["promises"])
    tighter = replace(model.scenario, service_levels=(fo.MeanTTFT(at_most=at_most - 1e-5),))
    lost = made.plan.revenue_rate - fo.FluidModel.from_scenario(tighter).solve("highs").revenue_rate
    price = made.figures[-1]
    assert price.unit == "money/s per 0.01 s"
    assert price.value == pytest.approx(lost / 1e-5 * 0.01, rel=1e-3)
    assert f"as promised, costs {number(reference.solve().revenue_rate - made.plan.revenue_rate)} " in price.sentence
    broken = 0
    for name in model.workload.names:
        (measured, half_width, verdict) = rows[f"mean_ttft[{name}]"]
        seen = made.result.estimate("time_to_first_token", name)
        assert measured[1] == pytest.approx(
            seen.mean / at_most, abs=3 * (half_width[1] + seen.half_width / at_most)
        )  # fmt: skip
        broken += verdict[0] == "NOT KEPT"
    assert broken
    assert "this fleet does not keep" in made.to_html()


# ---- traces -------------------------------------------------------------------------------------------------------


def test_a_trace_is_described_classified_planned_and_sized():
    trace = some_trace()
    made = report(trace, ttft=3.0, tpot=0.05, classes=2, abandonment_rate=0.05, **SHORT)
    sized = fo.size_trace(
        trace, fo.reference_model().gpu_types[0], ttft=3.0, tpot=0.05, classes=2, seed=1,
        prices=fo.reference_model().scenario.prices,
    )  # fmt: skip
    assert isinstance(made.size, TraceSize)
    assert made.settings.gpus == made.size.gpus == sized.gpus
    tables = Page(made.to_html()).tables
    described = trace.describe()
    assert (
        tables["streams"][0][1][1][1]
        == described.loc["all", "request_rate"]
        == pytest.approx(len(trace) / trace.duration)
    )
    found = fo.classify(trace, 2, abandonment_rate=0.05)
    assert_same(tables["classification"], found.to_frame().drop(columns="abandonment_rate"))
    assert [cells[1][1] for _, cells in tables["classes"]] == pytest.approx(found.workload.arrival_rate / sized.gpus)
    assert [cells[-1][1] for _, cells in tables["intervals"]] == sized.intervals["gpus"].tolist()
    assert [cells[2][1] for _, cells in tables["tried"]] == [each.share for each in sized.best.outcomes]
    assert sized.statement in unescape(made.to_html())


def test_a_trace_without_limits_is_sized_by_its_mean_rates():
    trace = some_trace()
    made = report(trace, gpus=2, abandonment_rate=0.05, **SHORT)
    fleet = fo.size_fleet(fo.classify(trace).workload, fo.reference_model().gpu_types[0])
    assert made.size.gpus.sum() == pytest.approx(fleet.gpus.sum())


@recorded
def test_an_hour_of_recorded_requests():
    trace = fo.read_trace(DATA / "azure" / "AzureLLMInferenceTrace_conv.csv")
    made = report(trace, ttft=2.0, tpot=0.05, **SHORT)
    assert not made.unmade
    tables = Page(made.to_html()).tables
    assert tables["streams"][0][1][0][1] == len(trace) == 19_366
    assert "burstier than" in made.to_html()


# ---- the document -------------------------------------------------------------------------------------------------


def test_names_cannot_break_out():
    classes = [replace(each, name=f"{each.name} {HOSTILE}") for each in fo.reference_model().workload.classes]
    gpu = replace(fo.reference_model().gpu_types[0], name=HOSTILE)
    model = fo.FluidModel(
        fo.Workload(tuple(classes), source=HOSTILE), gpu, prices=fo.TokenPrices(prompt=0.1, output=0.2)
    )
    made = report(model, gpus=GPUS, command=f"fluidopt report '{HOSTILE}'", **SHORT)
    text = made.to_html()
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "alert('x')</script>" not in text
    assert "{{ 7*7 }}" in unescape(text)
    assert [label for label, _ in page.tables["thresholds"]] == [
        each.name.replace("\x1b", "\ufffd") for each in classes
    ]
    tips = [given["data-tip"] for tag, given in page.tags if given.get("class") == "spot"]
    assert any(tip.startswith(classes[0].name.replace("\x1b", "\ufffd")) for tip in tips)
    assert "\x1b" not in text


def test_nothing_is_loaded_and_nothing_else_runs(text, shown):
    """No reference leaves the page; the policy allows the one style and the one script, by their hashes."""
    meta = next(given["content"] for tag, given in shown.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert meta.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in meta
        assert "unsafe" not in meta
    for _, given in shown.tags:
        for key, value in given.items():
            assert key != "style"
            assert not key.startswith("on")
            if key in ("href", "src", "action", "srcset", "xlink:href"):
                assert value.startswith("#"), (key, value)
    assert not re.search(r"@import|url\((?!#)", text)


def test_it_is_put_together_as_a_document_should_be(shown):
    ids = [given["id"] for _, given in shown.tags if "id" in given]
    assert len(ids) == len(set(ids))
    anchors = {given["href"][1:] for tag, given in shown.tags if tag == "a"}
    used = {given["href"][1:] for tag, given in shown.tags if tag == "use"}
    clips = {given["clip-path"][5:-1] for _, given in shown.tags if "clip-path" in given}
    assert anchors
    assert anchors | used | clips <= set(ids)
    levels = [int(tag[1]) for tag, _ in shown.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    tags = [tag for tag, _ in shown.tags]
    assert tags.count("caption") == tags.count("table")
    assert all("scope" in given for tag, given in shown.tags if tag == "th")
    assert all(given["aria-label"] for tag, given in shown.tags if given.get("class") == "chart")


def test_contrast_is_enough_on_light_and_dark():
    """WCAG 2: 4.5 for text, 3 for what is drawn, of the colours in the style sheet."""
    from fluidopt.reports.page import _text

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", body))
        for body in re.findall(r":root \{(.*?)\}", _text("page.css"), re.DOTALL)
    ]
    assert len(schemes) == 3
    for colours in schemes:
        for name in ("ink", "quiet", "deep"):
            for ground in ("paper", "soft"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        assert contrast(colours["alarm"], colours["alarm-soft"]) >= 4.5
        assert contrast(colours["warm"], colours["paper"]) >= 3


def test_a_long_table_is_cut_on_the_page_and_whole_in_the_json():
    rng = np.random.default_rng(5)
    classes = [
        fo.WorkloadClass(
            f"c{at}",
            arrival_rate=float(rng.uniform(0.001, 0.02)),
            prompt_tokens=300.0 + at,
            output_tokens=float(rng.uniform(100, 900)),
            abandonment_rate=0.1,
        )
        for at in range(60)
    ]
    made = report(fo.FluidModel(classes, fo.reference_model().gpu_types, prices=fo.TokenPrices(prompt=0.1, output=0.2)))
    assert made.frontier.promises[0].name == "completion_floor"  # slot TPOT would take a while
    assert len(Page(made.to_html()).tables["thresholds"]) == 40
    assert "20 more rows." in made.to_html()
    (table,) = [block.to_dict() for block in blocks_of(made, "table") if block.name == "thresholds"]
    assert len(table["rows"]) == 60


def test_no_frontier_is_drawn_unasked_where_it_would_take_minutes():
    classes = [
        replace(fo.reference_model().workload.classes[0], name=f"c{at}", arrival_rate=0.001) for at in range(101)
    ]
    made = report(fo.FluidModel(classes, fo.reference_model().gpu_types, prices=fo.TokenPrices(prompt=0.1, output=0.2)))
    assert "name a promise" in made.frontier.why


@pytest.mark.filterwarnings("ignore::fluidopt.ContentionWarning")
def test_several_gpu_types_with_modes_of_their_own():
    path = Path(__file__).parents[1] / "docs" / "examples" / "modes.toml"
    made = report(fo.FluidModel.from_scenario(path), gpus=GPUS, **SHORT)
    tables = Page(made.to_html()).tables
    assert [label for label, _ in tables["modes"]] == list(made.plan.modes.index)
    assert isinstance(made.size, Unmade)  # which types to take needs their prices
    assert "hourly_price" in made.size.why


def test_names_of_all_kinds_are_drawn():
    """Without a warning, which would fail the test: of letters that matplotlib lacks, or of no room."""
    names = ["中文 🙂", "שלום", "x" * 200, "two\nlines", r"$\bad$", "many words, and then some more of them, in a name"]
    classes = [replace(fo.reference_model().workload.classes[0], name=name) for name in names]
    gpu = replace(fo.reference_model().gpu_types[0], name="y" * 200)
    made = report(fo.FluidModel(classes, gpu, prices=fo.TokenPrices(prompt=0.1, output=0.2)))
    tips = [given["data-tip"] for _, given in Page(made.to_html()).tags if given.get("class") == "spot"]
    assert all(any(tip.startswith(f"{name}: ") for tip in tips) for name in names)


def test_a_trace_of_next_to_nothing():
    made = report(some_trace(2), gpus=1, abandonment_rate=0.1, horizon=50.0, replications=2)
    assert Page(made.to_html()).tables["streams"][0][1][0][1] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpus": 0}, "gpus must be a whole number of at least 1; got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0; got -1"),
        ({"ttft": 0.0}, "ttft must be a number of seconds above 0"),
        ({"tpot": math.nan}, "tpot must be a number of seconds above 0"),
        ({"policy": "magic"}, "policy must be one of gate-and-route, .*; got 'magic'"),
        ({"promise": "magic"}, "promise must be one of slot_tpot, .*; got 'magic'"),
        ({"precision": 2.0}, "precision must be between 0 and 1; got 2.0"),
        ({"horizon": -1.0}, "horizon must be a finite number of seconds above 0"),
        ({"classes": 3}, "go with a trace"),
        ({"scenario": 3}, "scenario must be a Scenario .*; got int"),
    ],
)
def test_mistakes_are_refused_before_anything_is_made(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        report(fo.reference_model(), **arguments)


def test_mistakes_with_traces():
    with pytest.raises(InvalidInput, match="subject must be a FluidModel or a Trace; got str"):
        report("scenario.toml")
    with pytest.raises(InvalidInput, match="gpus is required with a trace"):
        report(some_trace())
    with pytest.raises(InvalidInput, match="ttft and tpot go together"):
        report(some_trace(), gpus=2, ttft=1.0)
    with pytest.raises(InfeasibleModel, match="keeps TTFT 1e-06 s"):  # no number of GPUs to plan for
        report(some_trace(), ttft=1e-6, tpot=1e-6)


def test_a_file_that_cannot_be_written(made, tmp_path):
    with pytest.raises(InvalidInput, match="cannot be written"):
        made.save(tmp_path / "nowhere" / "page.html")
    with pytest.raises(InvalidInput, match="path must be a file name; got 3"):
        made.save(3)


def test_it_shows_in_a_notebook(made):
    for each in made.figures:
        assert each.sentence in str(made)
        assert each.sentence in unescape(made._repr_html_())


# ---- the command --------------------------------------------------------------------------------------------------


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fluidopt", "report", *words], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a scenario and its page, and what the command said."""
    folder = tmp_path_factory.mktemp("report")
    scenario = Path(__file__).parents[1] / "docs" / "examples" / "scenario.toml"
    shutil.copy(scenario, folder / "scenario.toml")
    done = run("scenario.toml", "--seed", "7", "-o", "first.html", *BRIEF, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_same_inputs_and_seed_give_the_same_page(written):
    """Another process, another file, other order of options; and the JSON of a third is that of the objects."""
    folder, done = written
    again = run(*BRIEF, "-o", "second.html", "--json", "--seed", "7", "scenario.toml", cwd=folder)
    assert again.returncode == 0, again.stderr
    first = (folder / "first.html").read_bytes()
    command = "fluidopt report scenario.toml --horizon 300.0 --replications 4 --seed 7"
    assert first == (folder / "second.html").read_bytes()
    assert command.encode() in first
    assert done.stdout.endswith("Page: first.html\n")
    assert re.fullmatch(r"[\d.]+ s( \(.*\))?\n", done.stderr)
    model = fo.FluidModel.from_scenario(folder / "scenario.toml")
    made = report(model, seed=7, command=command, **SHORT)
    assert json.loads(again.stdout) == json.loads(json.dumps(made.to_dict()))
    assert page(made).encode() == first
    assert made.figures[0].sentence in " ".join(done.stdout.split())


def test_the_scenario_on_the_page_makes_the_plan_again(written):
    folder, _ = written
    text = (folder / "first.html").read_text()
    (saved,) = [
        unescape(each) for each in re.findall(r"<code>(.*?)</code>", text, re.DOTALL) if each.startswith("{")
    ]  # fmt: skip
    again = fo.FluidModel.from_scenario(fo.Scenario.from_dict(json.loads(saved)))
    assert again.solve() == fo.FluidModel.from_scenario(folder / "scenario.toml").solve()


def main(monkeypatch, *words: str) -> int | str | None:
    """The command in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["fluidopt", "report", *words])
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        cli.main()
    return ended.value.code


def test_shells_complete_what_there_is():
    from fluidopt.cli.report import PROMISES
    from fluidopt.reports.making import LEVELS

    assert tuple(level.kind for level in LEVELS) == PROMISES


def test_the_command_says_what_it_could_not_make(tmp_path, monkeypatch, capsys):
    patient = fo.reference_model().workload.with_abandonment(0.0)
    model = fo.FluidModel(patient, fo.reference_model().gpu_types, prices=fo.TokenPrices(prompt=0.1, output=0.2))
    (tmp_path / "busy.json").write_text(json.dumps(model.scenario.to_dict()))
    page = tmp_path / "page.html"
    assert main(monkeypatch, str(tmp_path / "busy.json"), "--gpus", "4", "-o", str(page)) == 3
    assert "no plan satisfies all rows" in capsys.readouterr().err
    assert "There is no plan" in page.read_text()


def test_the_command_refuses_what_does_not_fit(written, monkeypatch, capsys):
    folder, _ = written
    scenario = str(folder / "scenario.toml")
    for words, message in (
        (["--with", scenario], "--column and --with go with a trace"),
        (["--start", "full"], "--start must be empty or fluid; got 'full'"),
        (["--promise", "magic"], "promise must be one of slot_tpot"),
        (["-o", str(folder)], "--output must be a file in a directory that exists"),
        (["-o", str(folder / "nowhere" / "page.html")], "--output must be a file in a directory that exists"),
    ):
        assert main(monkeypatch, scenario, "--horizon", "100", *words) == 2
        said = capsys.readouterr()
        assert (said.out, message in said.err) == ("", True)


# ---- browsers -----------------------------------------------------------------------------------------------------

# A page that frames the report from the same server, so that a script may look into it at two widths.
LOOK = """<!DOCTYPE html><title>look</title><pre id="found"></pre><script>
addEventListener("load", async () => {
  const found = {};
  for (const width of [390, 1280]) {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width:${width}px;height:900px;border:0`;
    frame.src = "first.html";
    document.body.append(frame);
    await new Promise((done) => { frame.onload = done; });
    const page = frame.contentDocument, tip = page.getElementById("tip");
    const spot = page.querySelector("#figure-served .spot"), box = spot.getBoundingClientRect();
    const at = { bubbles: true, clientX: box.left + 5, clientY: box.top + 5, pointerType: "mouse" };
    spot.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
    const pointed = { hidden: tip.hidden, text: tip.textContent, said: spot.dataset.tip };
    page.body.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
    const chart = page.querySelector("#figure-served .chart");
    chart.focus();
    const key = (name) => new frame.contentWindow.KeyboardEvent("keydown", { bubbles: true, key: name });
    chart.dispatchEvent(key("ArrowDown"));
    page.activeElement.dispatchEvent(key("ArrowDown"));
    const spots = [...chart.querySelectorAll(".spot")];
    const walked = spots.indexOf(page.activeElement);
    page.activeElement.dispatchEvent(key("Escape"));
    const right = tip.getBoundingClientRect().right;
    found[width] = {
      wide: page.scrollingElement.scrollWidth, inner: frame.contentWindow.innerWidth, pointed, walked,
      escaped: tip.hidden && page.activeElement === chart, right,
      titles: page.querySelectorAll(".spot > title").length, scripts: page.scripts.length,
    };
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


QUIET = """<!DOCTYPE html><title>quiet</title><pre id="found"></pre>
<iframe src="first.html" sandbox="allow-same-origin"></iframe><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  document.getElementById("found").textContent = page.documentElement.outerHTML;
});
</script>"""


@contextlib.contextmanager
def served(folder: Path):
    """The folder on a server of this machine: its address, and what it was asked for."""
    asked: list[str] = []

    class Remembers(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_parts):
            asked.append(self.path)

    handler = functools.partial(Remembers, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def browse(address: str, *options: str) -> subprocess.CompletedProcess[str]:
    quiet = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    return subprocess.run(
        [str(CHROMIUM), *quiet, "--enable-logging=stderr", "--log-level=0", *options, address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@in_browser
def test_a_browser_shows_it_without_errors_and_asks_for_nothing_else(written):
    """Served by a server that remembers what it is asked for; in two widths, pointed at, and walked by keyboard."""
    folder, _ = written
    (folder / "look.html").write_text(LOOK)
    with served(folder) as (address, asked):
        done = browse(f"{address}/look.html", "--dump-dom", "--virtual-time-budget=10000")
    assert set(asked) <= {"/look.html", "/first.html", "/favicon.ico"}
    assert "CONSOLE" not in done.stderr, done.stderr
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    seen = json.loads(unescape(found))
    for width in ("390", "1280"):
        looked = seen[width]
        assert looked["wide"] <= looked["inner"] <= int(width)
        assert looked["pointed"]["hidden"] is False
        assert looked["pointed"]["text"] == looked["pointed"]["said"] != ""
        assert looked["walked"] == 1
        assert looked["escaped"]
        assert (looked["titles"], looked["scripts"]) == (0, 1)


@in_browser
def test_a_browser_without_scripts_shows_the_same_numbers(written):
    """Framed by a page that forbids the report its script, and copies what is there."""
    folder, _ = written
    (folder / "quiet.html").write_text(QUIET)
    with served(folder) as (address, _):
        done = browse(f"{address}/quiet.html", "--dump-dom", "--virtual-time-budget=10000")
    (copied,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    seen, whole = Page(unescape(copied)), Page((folder / "first.html").read_text())
    assert seen.tables == whole.tables
    assert seen.figures == whole.figures
    spots = sum(given.get("class") == "spot" for _, given in whole.tags)
    assert [tag for tag, _ in seen.tags].count("title") == spots + 1  # its own, and one to each spot


@in_browser
def test_it_prints(written, tmp_path):
    folder, _ = written
    paper = tmp_path / "page.pdf"
    browse((folder / "first.html").as_uri(), f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    printed = paper.read_bytes()
    assert printed.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 20
