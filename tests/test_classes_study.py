"""Class studies: losses are those of the plan that treats a class alike, and cuts are the best ones."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import DATA, recorded
from scipy import sparse
from strategies import CHARGING, gpus, operating_modes, prices

import fluidopt as fo
from fluidopt.solvers import solve_program
from fluidopt.studies.classes import ClassStudy, class_study, plot_class_study
from fluidopt.traces import Trace, classify, read_trace
from fluidopt.traces.classify import between, length_cuts, log_lengths

AZURE = DATA / "azure"
GPU, PRICES = fo.reference_model().scenario.gpu, fo.reference_model().scenario.prices


def made(requests, *, seed=0, labels=True):
    """A trace of two services: short prompts with long answers, and long prompts with short ones."""
    random = np.random.default_rng(seed)
    chat = random.random(requests) < 0.6
    prompt = np.where(chat, random.lognormal(5, 0.8, requests), random.lognormal(7.5, 0.5, requests))
    output = np.where(chat, random.lognormal(5.5, 0.7, requests), random.lognormal(3, 1.0, requests))
    return Trace(
        np.cumsum(random.exponential(0.1, requests)),
        np.maximum(1, prompt.astype(int)),
        np.maximum(1, output.astype(int)),
        label=np.where(chat, "chat", "summary") if labels else None,
    )


@pytest.fixture(scope="module")
def study():
    """A thousand requests on so few GPUs that some are turned away."""
    return class_study(made(1000), GPU, gpus=2, prices=PRICES, counts=range(1, 6))


@st.composite
def traces(draw):
    count = draw(st.integers(3, 40))
    tokens = st.lists(st.integers(1, 4000), min_size=count, max_size=count)
    output = np.array(draw(tokens))
    output[0] = max(output[0], 2)
    label = draw(st.one_of(st.none(), st.lists(st.sampled_from(["a", "b"]), min_size=count, max_size=count)))
    return Trace(np.arange(count) * 0.5, np.array(draw(tokens)), output, label=label)


def treated_alike(study, grouping):
    """The best revenue in the finest model of plans that admit and complete the same share of all cells of a class.

    The finest program with a row more for each cell but the first of its class, by HiGHS.
    """
    program, model = study.finest.program, study.finest.model
    workload, modes = model.workload, [mode for _, mode in model.modes]
    of = cell_classes(study, grouping)
    rows, count = [], 0
    for name, tokens in (("x", workload.prompt_tokens), ("y", workload.output_tokens)):
        block = next(block for block in program.columns if block.name == name)
        speed = np.array([mode.prefill_speed if name == "x" else mode.decode_speed for mode in modes])
        for own in range(of.max() + 1):
            first, *others = np.flatnonzero(of == own)
            for other in others:
                for cell, sign in ((other, 1.0), (first, -1.0)):
                    at = block.numbers[cell] >= 0
                    scale = sign / (tokens[cell] * workload.arrival_rate[cell])
                    rows += [(count, k, scale * v) for k, v in zip(block.numbers[cell][at], speed[at], strict=True)]
                count += 1
    if not count:
        return study.revenue_rate
    row, column, value = (np.array(part) for part in zip(*rows, strict=True))
    # a residual of these rows counts by its own terms, whatever their unit
    added = sparse.coo_array((value, (row, column)), shape=(count, program.shape[1]))
    tied = replace(
        program,
        matrix=sparse.vstack([program.matrix, added]).tocsc(),
        row_lower=np.concatenate([program.row_lower, np.zeros(count)]),
        row_upper=np.concatenate([program.row_upper, np.zeros(count)]),
    )
    return solve_program(tied, "highs").certificate.objective


def cell_classes(study, grouping):
    """The class of each cell of the finest model: cells are the distinct rows of all assignments, in their order."""
    rows = np.unique(np.stack([each.classification.assignment for each in study.groupings], axis=1), axis=0)
    return rows[:, study.groupings.index(grouping)]


@pytest.mark.filterwarnings("ignore::fluidopt.ContentionWarning")
@given(traces(), gpus(min_batch=2), prices(), CHARGING, st.data())
@settings(max_examples=40)
def test_a_plan_of_merged_classes_is_the_best_that_treats_them_alike(trace, gpu, money, charging, data):
    if data.draw(st.booleans()):
        gpu = replace(gpu, operating_modes=data.draw(operating_modes(gpu.batch_size)))
    n = data.draw(st.sampled_from([0.01, 0.1, 1.0, 10.0]))
    study = class_study(trace, gpu, gpus=n, prices=money, charging=charging, counts=(1, 2, 4))
    chosen = data.draw(st.sampled_from(study.groupings))
    assert treated_alike(study, chosen) == pytest.approx(chosen.revenue_rate, rel=1e-6, abs=1e-9)
    for each in study.groupings:
        assert each.certificate.primal_residual <= 1e-7
        assert each.revenue_rate == pytest.approx(each.planned, rel=1e-7, abs=1e-12)
        assert each.revenue_rate <= study.revenue_rate * (1 + 1e-7)
        assert 0.0 <= each.loss <= 1.0


@given(traces())
@settings(max_examples=40)
def test_cuts_are_nested_and_each_the_best_one(trace):
    points = log_lengths(trace)
    total = ((points - points.mean(axis=0)) ** 2).sum()
    groups, found = np.zeros(len(trace), dtype=int), 0.0
    for cut in length_cuts(trace, 4):
        best = 0.0
        for own in range(groups.max() + 1):
            for tokens in (trace.prompt_tokens, trace.output_tokens):
                for at in np.unique(tokens):
                    tried = np.where((groups == own) & (tokens >= at), groups.max() + 1, groups)
                    sizes = np.bincount(tried)
                    decodes = np.bincount(tried, weights=trace.output_tokens - 1)
                    if (sizes == 0).any() or (decodes == 0).any():
                        continue
                    best = max(best, between(points, tried) - found if total > 0 else 0.0)
        assert cut.explained == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert len(np.unique(np.stack([groups, cut.groups]), axis=1).T) == cut.groups.max() + 1
        groups, found = cut.groups, found + cut.explained
        assert found == pytest.approx(between(points, groups), rel=1e-9, abs=1e-12)


def test_more_cuts_lose_no_more(study):
    losses = [each.loss for each in study.groupings if each.by == "cuts"]
    assert len(losses) == 5
    assert losses[0] > 0.02
    assert all(after <= before + 1e-9 for before, after in pairwise(losses))


def test_labels_and_prompts_are_told_at_arrival_and_lengths_are_not(study):
    frame = study.to_frame()
    told = frame["at_arrival"].groupby("by").first()
    assert told.to_dict() == {
        "label": True,
        "prompt": True,
        "label, prompt": True,
        "output": False,
        "lengths": False,
        "cuts": False,
    }
    assert [each.classes for each in study.groupings if each.by == "label, prompt"] == [2, 4, 6, 8, 10]
    assert study.groupings[0].classification.workload.names == ("chat", "summary")


def test_one_class_keeps_nothing_and_every_request_its_own_keeps_all():
    trace = Trace(np.arange(6.0), [10, 20, 40, 80, 160, 320], [400, 50, 300, 20, 700, 9])
    study = class_study(trace, GPU, gpus=0.05, prices=PRICES, counts=(1, 6), by="lengths")
    one, all_apart = study.groupings
    assert (one.prompt_explained, one.output_explained, one.ratio_explained) == (0, 0, 0)
    assert (all_apart.classes, all_apart.loss) == (6, pytest.approx(0, abs=1e-9))
    assert all_apart.ratio_explained == pytest.approx(1)
    assert all_apart.kv_error == pytest.approx(0, abs=1e-12)
    # what one class misses of the KV tokens that a decode holds is the covariance of the lengths, per decode
    decode = trace.output_tokens - 1
    covariance = np.cov(trace.prompt_tokens, decode, bias=True)[0, 1]
    held = (decode * (trace.prompt_tokens + decode / 2)).mean() / decode.mean()
    assert one.kv_error == pytest.approx(-covariance / decode.mean() / held)


def test_explained_is_the_share_of_variance_between_classes(study):
    trace = made(1000)
    each = next(each for each in study.groupings if each.by == "label")
    prompt = trace.prompt_tokens.astype(float)
    means = np.array([prompt[trace.label == name].mean() for name in ("chat", "summary")])
    within = ((prompt - means[(trace.label == "summary").astype(int)]) ** 2).sum()
    assert each.prompt_explained == pytest.approx(1 - within / ((prompt - prompt.mean()) ** 2).sum())


def test_recommends_the_fewest_classes_within_tolerance(study):
    for foresight in (False, True):
        chosen = study.recommended(foresight=foresight)
        able = [each for each in study.groupings if each.foresight == foresight]
        allowed = min(each.loss for each in able) + study.tolerance
        assert chosen.loss <= allowed
        assert all(each.loss > allowed for each in able if each.classes < chosen.classes)
    assert f"{study.recommended().classes} classes by {study.recommended().by} lose" in study.statement
    only = class_study(made(300), GPU, gpus=1, prices=PRICES, counts=[2], by="lengths")
    assert only.recommended() is None
    assert "Told at arrival" not in only.statement


def test_says_where_classes_do_not_matter():
    study = class_study(made(200), GPU, gpus=100, prices=PRICES, counts=[1, 2])
    assert study.served == pytest.approx(1)
    assert "every request is served, whatever the classes" in study.statement


def test_prints_and_saves(study):
    data = json.loads(json.dumps(study.to_dict()))
    assert [row["loss"] for row in data["groupings"]] == [each.loss for each in study.groupings]
    assert data["cuts"][0]["by"] == study.cut_tree[0].by
    assert study.cuts["loss"].iloc[-1] == study.groupings[-1].loss
    assert study.statement in str(study)
    assert "nobody knows when a request arrives" in study._repr_html_()
    assert isinstance(study, ClassStudy)
    axes = study.plot().axes
    assert axes[0].get_title(loc="left") == "Revenue lost, %"
    drawn = {line.get_label(): line.get_ydata() for line in axes[0].lines}
    np.testing.assert_allclose(drawn["prompt"], [100 * each.loss for each in study.groupings if each.by == "prompt"])
    assert sum(bar.get_width() for bar in axes[2].patches) == pytest.approx(100 * study.cuts["explained"].sum())
    plain = class_study(made(100, labels=False), GPU, gpus=1, prices=PRICES, counts=[2], by=["prompt"])
    assert not plot_class_study(plain).axes[2].get_visible()


def test_requests_that_do_not_decode_stay_in_the_study():
    trace = made(300, labels=False)
    output = trace.output_tokens.copy()
    output[:60] = 1
    study = class_study(replace(trace, output_tokens=output), GPU, gpus=0.6, prices=PRICES, counts=(1, 3))
    total = study.finest.model.workload.arrival_rate.sum()
    assert total == pytest.approx(trace.request_rate / 0.6)
    assert all(each.revenue_rate == pytest.approx(each.planned, rel=1e-9) for each in study.groupings)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gpus": 0}, "gpus must be a finite number above 0; got 0"),
        ({"abandonment_rate": -1}, "abandonment_rate must be a finite number of at least 0; got -1"),
        ({"counts": []}, r"counts must be whole numbers of at least 1; got \[\]"),
        ({"counts": [0]}, r"counts must be whole numbers of at least 1; got \[0\]"),
        ({"by": "size"}, "by must be one or several of 'label', 'prompt'.*got 'size'"),
        ({"by": ["prompt", "prompt"]}, "each once"),
        ({"by": 3}, "by must be one or several of.*got 3"),
        ({"by": "label"}, "needs labels and this trace has none"),
        ({"tolerance": 1}, "tolerance must be at least 0 and below 1; got 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0; got -1"),
    ],
)
def test_refuses(options, match):
    with pytest.raises(fo.InvalidInput, match=match):
        class_study(made(100, labels=False), GPU, **({"gpus": 1, "prices": PRICES} | options))


def test_refuses_what_is_no_trace_and_traces_it_cannot_use():
    with pytest.raises(fo.InvalidInput, match="trace must be a Trace; got str"):
        class_study("trace.csv", GPU, gpus=1, prices=PRICES)
    with pytest.raises(fo.InvalidInput, match="at a single instant tell no duration"):
        class_study(Trace([0.0], [5], [5]), GPU, gpus=1, prices=PRICES, counts=[1])
    with pytest.raises(fo.InvalidInput, match=r"none of counts=\[1\] gives classes"):
        class_study(Trace([0.0, 1.0], [5, 6], [1, 1]), GPU, gpus=1, prices=PRICES, counts=[1])
    with pytest.raises(fo.InfeasibleModel):
        class_study(made(100), GPU, gpus=0.1, prices=PRICES, counts=[1], abandonment_rate=0)


@pytest.mark.parametrize("by", ["prompt", "output"])
def test_classes_by_one_length_are_intervals_of_it(by):
    trace = made(400)
    found = classify(trace, 3, by=by)
    tokens = getattr(trace, f"{by}_tokens")
    ranges = sorted((tokens[found.assignment == i].min(), tokens[found.assignment == i].max()) for i in range(3))
    assert all(below[1] < above[0] for below, above in pairwise(ranges))
    chosen = classify(trace, by=by)
    column = log_lengths(trace)[:, [int(by == "output")]]
    assert between(column, chosen.assignment) >= 0.8
    with pytest.raises(fo.InvalidInput, match=f"cuts and by='{by}' exclude each other"):
        classify(trace, by=by, prompt_cuts=[10])
    few = Trace([0.0, 1.0, 2.0], [5, 5, 5], [7, 7, 7])
    with pytest.raises(fo.InvalidInput, match=rf"only 1 distinct count\(s\) of {by} tokens; ask for at most 1"):
        classify(few, 2, by=by)


@recorded
def test_azure_needs_the_prompt_length_more_than_the_service():
    """On the two services of Azure the prompt's length, which is known at arrival, does as well as foresight."""
    files = [AZURE / f"AzureLLMInferenceTrace_{name}.csv" for name in ("code", "conv")]
    study = class_study(read_trace(files, label=["code", "conv"]), GPU, gpus=2, prices=PRICES)
    loss = study.to_frame()["loss"]
    assert loss["label", 2] > 0.03
    assert loss["prompt", 5] < 0.015
    assert loss["prompt", 5] < loss["label", 2] < loss["prompt", 1]
    assert study.cut_tree[0].by == "output"
