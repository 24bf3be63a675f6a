"""Reports: every number on a page is its object's, nothing breaks out of it, and what cannot be made is said."""

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html import escape, unescape
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from recorded import DATA, recorded
from report_page import SHORT, Page, assert_same

import fluidopt as fo
from fluidopt.errors import InfeasibleModel, InvalidInput
from fluidopt.reports import Unmade, report
from fluidopt.reports.svg import Spot, inline_svg
from fluidopt.studies.sizing.trace import TraceSize
from fluidopt.tables import number

GPUS = 12
HOSTILE = "<script>alert('x')</script>&\"' ]]> {{ 7*7 }} $\\frac{$ \x1b"


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


def test_a_precision_stands_in_for_the_horizon():
    made = report(fo.reference_model(), precision=0.5, warmup=2500.0, horizon=2000.0)
    assert made.settings.horizon is None


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
