"""Every object that a notebook shows: its HTML is well formed, self-contained, escaped, and says every number."""

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

import fluidopt as fo
from fluidopt import views
from fluidopt.algebra import Printer
from fluidopt.mathml import Presentation
from fluidopt.policy.family import Rule
from fluidopt.policy.refine import Trial
from fluidopt.studies.optimum import SmallFleetRanges
from fluidopt.tables import number

ODD = "<b>&\"x'"
PRICES = fo.TokenPrices(prompt=0.1, output=0.2)
CURVE = fo.IterationTime(alpha=0.0174, beta=6.2e-5, solo=0.022)
GPU = fo.GPU(CURVE, batch_size=16, chunk_size=256, name=ODD, hourly_price=2.0)
CLASSES = (
    fo.WorkloadClass(ODD, arrival_rate=0.5, prompt_tokens=300, output_tokens=1000, abandonment_rate=0.1),
    fo.WorkloadClass("summarise", arrival_rate=0.5, prompt_tokens=3000, output_tokens=400, abandonment_rate=0.1),
)


@cache
def model():
    return fo.FluidModel(CLASSES, GPU, prices=PRICES)


@cache
def plan():
    return model().solve()


@cache
def policy(gpus=5):
    return plan().policy(gpus=gpus)


@cache
def result():
    return policy().simulate(horizon=200, replications=2, seed=1)


@cache
def trace():
    rng, size = np.random.default_rng(1), 300
    labels = np.array([ODD, "plain"])[rng.integers(0, 2, size)]
    arrivals = np.sort(rng.uniform(0, 600, size))
    return fo.Trace(arrivals, rng.integers(100, 3000, size), rng.integers(20, 600, size), label=labels)


@cache
def classes():
    return fo.classify(trace(), by="label", abandonment_rate=0.1)


@cache
def measured():
    chunk, decodes = (grid.ravel() for grid in np.meshgrid([0, 128, 256, 512, 1024], [1, 4, 8, 16, 32]))
    seconds = np.where(chunk > 0, 0.0174 + 6.2e-5 * chunk, 0.02) + 1e-4 * decodes
    noise = np.random.default_rng(0).normal(1, 0.02, seconds.size)
    return pd.DataFrame({"chunk": chunk, "decodes": decodes, "kv_tokens": 0, "seconds": seconds * noise})


def replayed():
    fleet = fo.FluidModel(classes().workload.per_gpu(3), GPU, prices=PRICES).solve().policy(gpus=3)
    return fo.replay(trace(), fleet, classes=classes())


@cache
def convergence():
    return fo.convergence_study(plan(), gpus=(5, 10), horizon=100, replications=2)


@cache
def random_instances():
    return fo.policy_study(instances=2, gpus=10, horizon=100, replications=2, kinds=("FI-WSP", "GG-SP"))


def refined():
    found = fo.compare_policies({"refined": policy(), "gate-and-route": policy()}, horizon=200, replications=2, seed=1)
    rule = Rule(gate="priority", order=(0, 1), hold=(np.inf, 1.0), prefill_gpus=2)
    trials = (Trial(rule=rule, phase="orders", horizon=100.0, mean=270.25, half_width=3.5, excess=0.0),)
    return fo.Refinement(policy=policy(), rule=rule, comparison=found, promises=(), trials=trials, seed=0)


# One of each type that has a view, as small as it can be.
SHOWN = {
    "WorkloadClass": lambda: CLASSES[0],
    "Workload": lambda: model().workload,
    "TokenPrices": lambda: PRICES,
    "IterationTime": lambda: CURVE,
    "LinearTime": lambda: fo.LinearTime(
        alpha=0.0174, beta=6.2e-5, per_decode=1e-4, solo=0.02, chunk_kinks=(fo.Kink(at=512, slope=3e-5),)
    ),
    "TabulatedTime": lambda: fo.fit_iteration_time(measured(), form="table").curve,
    "IterationTimeFit": lambda: fo.fit_iteration_time(measured()),
    "Mode": lambda: GPU.modes()[0],
    "GPU": lambda: GPU,
    "Scenario": lambda: fo.Scenario(
        classes=CLASSES, gpu=GPU, prices=PRICES, service_levels=(fo.SlotTPOT(at_most=0.03),), objective="phi[0]"
    ),
    "FluidModel": model,
    "Plan": plan,
    "Certificate": lambda: plan().certificate,
    "Policy": policy,
    "Bound": lambda: fo.revenue_bound(policy()),
    "Refinement": refined,
    "EngineSettings": lambda: fo.engine_settings(policy()),
    "FluidTrajectory": lambda: fo.fluid_trajectory(policy(), horizon=30),
    "SimulationResult": result,
    "Estimate": lambda: result().revenue_rate,
    "PolicyComparison": lambda: fo.compare_policies(
        {ODD: policy(), "other": policy()}, horizon=200, replications=2, seed=1
    ),
    "ChainResult": lambda: fo.exact_chain(
        policy(1), prefill_queue_cap=1, decode_queue_cap=1, ordered_places=0, tolerance=1.0
    ),
    "OptimalPolicy": lambda: fo.optimal_policy(policy(1), prefill_queue_cap=1, decode_queue_cap=1),
    "Frontier": lambda: fo.frontier(model(), fo.PrefillFairness(at_most=0.1), points=11),
    "Sensitivity": lambda: fo.sensitivity(model()),
    "ParameterSensitivity": lambda: fo.sensitivity(model(), ["beta"]).entries[0],
    "SensitivityCurve": lambda: fo.sensitivity_curve(model(), f"arrival_rate[{ODD}]", lower=0.1, upper=1.0),
    "GlobalSensitivity": lambda: fo.global_sensitivity(
        model(), {"alpha": (0.015, 0.02), "beta": (1e-5, 1e-4)}, samples=8
    ),
    "HardwareStudy": lambda: fo.hardware_study(model(), batch_size=[8, 16], beta=[1e-5, 6.2e-5]),
    "HardwareUpgrades": lambda: fo.hardware_upgrades(model()),
    "GPUComparison": lambda: fo.compare_gpus(
        model(), [fo.GPU(CURVE, batch_size=32, chunk_size=512, name="larger", hourly_price=4.0)]
    ),
    "ChunkChoice": lambda: fo.optimal_chunk(model(), largest=128),
    "PriceCurve": lambda: fo.price_curve(model()),
    "PriceStudy": lambda: fo.price_study(model()),
    "OptimalPrices": lambda: fo.optimal_prices(model(), demand=fo.elastic_demand(model(), 1.5), tolerance=0.05),
    "FleetSize": lambda: fo.size_fleet(CLASSES, GPU, prices=PRICES),
    "TraceSize": lambda: fo.size_trace(trace(), GPU, ttft=5, tpot=0.1, prices=PRICES),
    "TraceBound": lambda: fo.trace_bound(trace(), GPU, promise=fo.Promise(ttft=5, tpot=0.1)),
    "Schedule": lambda: fo.plan_schedule(trace(), GPU, gpus=3, interval=200, switching_cost=1.0, prices=PRICES),
    "Trace": trace,
    "Classification": classes,
    "ClassStudy": lambda: fo.class_study(trace(), GPU, gpus=1, prices=PRICES, counts=(1, 2)),
    "Replay": replayed,
    "ReplayStudy": lambda: fo.replay_study(
        trace(), GPU, gpus=[2], prices=PRICES, kinds=("gate-and-route", "engine"), classes=classes(), windows=5
    ),
    "RobustnessStudy": lambda: fo.robustness_study(
        {ODD: policy(), "other": policy()}, disturbances=fo.standard_disturbances()[:2], horizon=100, replications=2
    ),
    "ConvergenceStudy": convergence,
    "FleetPoint": lambda: convergence().points[0],
    "PolicyStudy": random_instances,
    "InstanceOutcome": lambda: random_instances().instances[0],
    "OptimumStudy": lambda: fo.optimum_study(instances=1, starts=1, ranges=SmallFleetRanges(gpus=1, batch_size=2)),
    "Report": lambda: fo.report(model(), gpus=2, horizon=100, replications=2),
    "Resolved": lambda: fo.Solver(model()).solve(),
    "ResolvedMany": lambda: fo.Solver(model()).solve_many({"c_p": np.array([0.1, 0.2])}),
}

# Types whose plain text says it best, or that nobody shows: protocols, errors, engines of loops.
PLAIN = {
    "AbandonmentShare", "Bursty", "CompletionFloor", "ContentionCurve", "ContentionWarning", "Controller", "CurveGrid",
    "DecodeFairness", "Disturbance", "ElasticDemand", "Engine", "EngineFleet", "FluidState", "FluidoptError",
    "InfeasibleModel", "InstanceRanges", "InvalidInput", "KVMemory", "KVTransfer", "Kink", "Law", "Laws", "MeanTPOT",
    "MeanTTFT", "MeanWait", "PrefillFairness", "Promise", "Sinusoidal", "SlotTPOT", "Solver", "SolverFailure",
    "SolverOptions", "StartDecode", "StartPrefill", "Steady", "Stepwise", "TraceFormatError",
}  # fmt: skip

# The tables that a view shows, where it is not `to_frame`.
TABLES = {
    "Plan": lambda each: [each.modes, each.allocation, each.thresholds],
    "FleetSize": lambda each: [each.to_frame(), each.modes, each.classes, each.promises],
    "TraceSize": lambda each: [each.to_frame(), each.intervals, each.tried],
    "Schedule": lambda each: [each.to_frame(), each.intervals],
    "Frontier": lambda each: [each.breakpoints],
    "FluidTrajectory": lambda each: [each._summary()],
    "ConvergenceStudy": lambda each: [each.fleets],
    "PolicyStudy": lambda each: [each.policies],
    "IterationTimeFit": lambda each: [each.coefficients_text, each.cross_validation],
    "SimulationResult": lambda each: [each.to_frame(), each.percentiles()],
    "Replay": lambda each: [each.percentiles()],
    "Trace": lambda each: [each.describe()],
    "Sensitivity": lambda each: [each._shown],
    "ChunkChoice": lambda each: [each._around()],
}
# Views in which the first class, or the GPU type, is named.
NAMED = set(SHOWN) - {
    "TokenPrices", "IterationTime", "LinearTime", "TabulatedTime", "IterationTimeFit", "Mode", "Certificate", "Bound",
    "Estimate", "EngineSettings", "GlobalSensitivity", "ParameterSensitivity", "ChunkChoice", "PriceCurve",
    "PriceStudy", "OptimalPrices", "Schedule", "ClassStudy", "ReplayStudy", "ConvergenceStudy", "FleetPoint",
    "PolicyStudy", "InstanceOutcome", "OptimumStudy", "Resolved", "ResolvedMany", "Frontier", "HardwareUpgrades",
}  # fmt: skip
BLANKS = " \u2007\u2008"  # what stands for missing digits and points
EMPTY = {"br", "wbr"}
DRAWN = {"rect", "path", "polyline", "circle"}


class Page(HTMLParser):
    """Reads a view strictly: every tag closed in order, nothing that runs or loads; keeps its text and cells."""

    def __init__(self, view):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.cells = [], [], [], []
        self.feed(view)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert tag not in DRAWN, f"<{tag}> must close itself"
        self._check(tag, attrs)
        if tag not in EMPTY:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self._check(tag, attrs)
        assert tag in DRAWN

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data

    def _check(self, tag, attrs):
        self.tags.append(tag)
        assert tag not in ("script", "style", "link", "img", "iframe", "object", "b", "a"), tag
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert name not in ("src", "href", "id"), name
            assert not re.search(r"url\(|http", value or ""), value


@cache
def shown(name):
    return SHOWN[name]()


@pytest.fixture(params=SHOWN)
def name(request):
    return request.param


def test_every_public_type_has_a_view_or_a_reason_not_to():
    types = {each for each in fo.__all__ if inspect.isclass(getattr(fo, each))}
    assert types <= set(SHOWN) | PLAIN
    assert not set(SHOWN) & PLAIN
    assert not [each for each in PLAIN if hasattr(getattr(fo, each), "_repr_html_")]


@pytest.mark.filterwarnings("ignore::fluidopt.ContentionWarning")
def test_a_view_is_well_formed_and_self_contained(name):
    assert type(shown(name)).__name__ == name
    Page(shown(name)._repr_html_())


def test_a_view_says_every_number_of_its_tables(name):
    each = shown(name)
    tables = TABLES[name](each) if name in TABLES else [each.to_frame()] if hasattr(each, "to_frame") else []
    cells = {cell.strip(BLANKS) for cell in Page(each._repr_html_()).cells}
    for table in tables:
        missing = [number(value) for value in table.to_numpy().ravel() if number(value) not in cells]
        assert len(table)
        assert not missing


def test_a_label_is_escaped(name):
    view = shown(name)._repr_html_()
    assert ODD not in view
    if name in NAMED:
        assert ODD in "".join(Page(view).text)


def test_a_view_draws_with_nothing_heavy():
    code = (
        "import sys, fluidopt as fo, pandas\n"
        "model = fo.reference_model(); plan = model.solve(); before = set(sys.modules)\n"
        "plan._repr_html_(); model._repr_html_()\n"
        "print({name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"matplotlib", "numba", "cvxpy", "xarray", "jinja2"} & ast.literal_eval(done.stdout)


# ---- the parts ----------------------------------------------------------------------------------------------------


def test_a_table_has_units_and_points_in_line():
    frame = pd.DataFrame(
        {"rate": [0.25, 12.0, 3.125], "who": ["a", "b", ODD]}, index=pd.Index(["x", "y", "z"], name="row")
    )
    page = Page(views.html(frame, title="Rates", units={"rate": "requests/s"}, note="as measured"))
    assert page.cells[:3] == ["row", "raterequests/s", "who"]
    # a point is as wide as U+2008, a digit as U+2007
    assert [page.cells[at] for at in (4, 7, 10)] == ["0.25\u2007", "12\u2008\u2007\u2007\u2007", "3.125"]
    assert (page.text[0], page.text[-1]) == ("Rates", "as measured")


def test_a_long_table_is_cut_and_counted():
    page = Page(views.html(pd.Series(range(1000, 1100), name="value"), title="Many", max_rows=7))
    assert page.cells[2:] == [cell for at in range(7) for cell in (f"{at}", f"{1000 + at}")]
    assert page.text[-1] == "The first 7 of 100 rows; 93 more rows are left out."


def test_levels_of_an_index_are_said_once():
    index = pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 2), ("b", 1)], names=["of", None])
    page = Page(views.html(pd.DataFrame({"x": [5, 6, 7, 8]}, index=index), title=""))
    assert page.cells == ["of", "", "x", "a", "1", "5", "", "2", "6", "b", "2", "7", "", "1", "8"]


def test_what_is_no_number_is_a_dash_and_no_picture():
    frame = pd.DataFrame({"x": [np.nan, np.inf, -np.inf, 0.5]})
    view = views.html(frame, title="", bars={"x": views.share_bar})
    assert [cell.strip(BLANKS) for cell in Page(view).cells[3::2]] == ["–", "∞", "-∞", "0.5"]
    assert view.count("<svg") == 1
    assert views.html(frame.head(0), title="none")
    assert views.sketch({"x": ([1.0, 2.0], [np.nan, np.nan])}, across="", up="") == ""


def drawn(bar, columns, column="x"):
    """By row, the numbers of each drawn element's attributes, as fractions of a cell's width."""
    found = []
    for picture in bar(pd.DataFrame(columns), column):
        rects = re.findall(r"<rect (?:x='([\d.]+)' )?width='([\d.]+)'[^>]*fill='(#\w+)'", picture)
        found.append([(float(x) / views.BAR_WIDTH, float(width) / views.BAR_WIDTH, c) for x, width, c in rects])
    return found


def test_bars_are_as_long_as_their_numbers():
    assert drawn(views.share_bar, {"x": [0.25, 1.0, 0.0]}) == [
        [(0.0, 0.25, views.ACCENT)],
        [(0.0, 1.0, views.ACCENT)],
        [(0.0, 0.0, views.ACCENT)],
    ]
    assert drawn(views.amount_bar, {"x": [10.0, 40.0]}) == [[(0.0, 0.25, views.ACCENT)], [(0.0, 1.0, views.ACCENT)]]
    # from -1 to 3: zero lies a quarter of the way in, and what is below it is drawn the other way
    assert drawn(views.signed_bar, {"x": [-1.0, 3.0, 1.0]}) == [
        [(0.0, 0.25, views.AGAINST)],
        [(0.25, 0.75, views.ACCENT)],
        [(0.25, 0.25, views.ACCENT)],
    ]


def test_whiskers_share_one_scale():
    frame = pd.DataFrame({"mean": [1.0, 3.0], "half_width": [1.0, 1.0]})
    first, second = (
        [float(x) for x in re.search(r"M([\d.]+) [\d.]+H([\d.]+)M.*cx='([\d.]+)'", picture).groups()]
        for picture in views.whisker()(frame, "mean")
    )
    inside = views.BAR_WIDTH - 6  # three pixels at each end for the caps
    assert first == pytest.approx([3.0, 3 + inside / 2, 3 + inside / 4])
    assert second == pytest.approx([3 + inside / 2, 3 + inside, 3 + 3 * inside / 4])


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [
        (276.1832, 6.849, ["276.2", "± 6.8 s"]),
        (1234.5, 120.0, ["1234", "± 120 s"]),
        (0.01234, 0.000456, ["0.01234", "± 0.00046 s"]),
    ],
)
def test_an_estimate_never_goes_without_its_half_width(mean, half, said):
    page = Page(views.figures(("Mean", fo.Estimate(mean, half, half / 2, 10.0), "s")))
    assert [text.strip() for text in page.text if text.strip()] == ["Mean", *said]


def test_sentences_are_lists_and_long_lists_are_cut():
    page = Page(
        views.card(ODD, views.bullets("Why", [ODD, "b", "c"], most=2), views.cautions(["mind"]), views.bullets("", []))
    )
    assert page.text == [ODD, "Why", ODD, "b", "and 1 more", "Caution", "mind"]
    assert page.tags.count("li") == 4


def test_a_sketch_keeps_the_shape_of_its_curve():
    across = np.linspace(0.0, 10.0, 5001)
    view = views.sketch({"square": (across, across**2)}, across="x, s", up="y, 1")
    points = np.array([[float(x) for x in pair.split(",")] for pair in re.search(r"points='([^']*)'", view)[1].split()])
    assert len(points) <= 210
    x, y = (points[:, 0] - 3) / 214 * 10, (77 - points[:, 1]) / 74 * 100
    np.testing.assert_allclose(y, x**2, atol=0.2)
    assert Page(view).text[-1] == "y, 1: 0 to 100; x, s: 0 to 10"


def test_formulas_name_every_row_of_the_model():
    page = Page(model()._repr_html_())
    said = "".join(page.text)
    assert page.tags.count("math") > len(model().symbolic.constraints)
    for row in model().symbolic.constraints:
        assert row.name.replace("_", " ") in said
    for quantity in (*model().symbolic.variables, *model().symbolic.parameters):
        assert quantity.meaning in said


COMMANDS = {
    "mu": "μ", "phi": "ϕ", "varphi": "φ", "lambda": "λ", "theta": "θ", "tau": "τ", "sigma": "σ", "xi": "ξ", "nu": "ν",
    "eta": "η", "sum": "∑", "in": "∈", "ni": "∋", "log": "log", "frac": "", "left": "", "right": "", "text": "",
    "mathrm": "",
}  # fmt: skip


def signs(latex):
    """What LaTeX shows, sign by sign."""
    shown = re.sub(r"\\([A-Za-z]+)", lambda command: COMMANDS[command[1]], re.sub(r"\\([_&])", r"\1", latex))
    return re.sub(r"[\s{}_\\]", "", shown)


@pytest.mark.parametrize("charging", ["bundled", "separate"])
def test_formulas_say_what_the_latex_says(charging):
    levels = (
        fo.MeanTTFT(at_most=5),
        fo.SlotTPOT(at_most=0.03),
        fo.PrefillFairness(at_most=0.1),
        fo.KVMemory(tokens=1e5),
    )
    two = [replace(GPU, name=name, share=0.5) for name in ("a", "b & c")]
    model = fo.FluidModel(CLASSES[1:], two, prices=PRICES, charging=charging, service_levels=levels)
    model.subject_to('x["summarise", k] <= 0.1*phi[k] + phi["b & c/solo"]', name="own")
    program = model.symbolic
    mathml, latex = Presentation(program).inline, Printer(program).doprint
    for side in (program.objective, *(side for row in program.constraints for side in (row.left, row.right))):
        assert re.sub(r"[\s_\u2062]", "", "".join(Page(mathml(side)).text)) == signs(latex(side))
