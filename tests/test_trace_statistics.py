import io
import math
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import DATA, recorded
from scipy import stats

from fluidopt.errors import InvalidInput
from fluidopt.traces import Trace, read_trace
from fluidopt.traces.lengths import exponential_bins

AZURE = DATA / "azure"


def poisson(rate=5.0, duration=2000.0, seed=1, **changes):
    """A Poisson stream with exponential lengths, observed for its whole period."""
    rng = np.random.default_rng(seed)
    count = rng.poisson(rate * duration)
    columns = {
        "arrival_time": rng.uniform(0, duration, count),
        "prompt_tokens": np.ceil(rng.exponential(800, count)).astype(int),
        "output_tokens": np.ceil(rng.exponential(150, count)).astype(int),
    }
    return Trace(**{**columns, "observation_time": duration, **changes})


def served(count=50, seed=2, **changes):
    rng = np.random.default_rng(seed)
    arrival = np.append(0.0, np.cumsum(rng.exponential(1, count - 1)))
    first = arrival + rng.exponential(0.3, count)
    columns = {
        "arrival_time": arrival,
        "prompt_tokens": rng.integers(1, 500, count),
        "output_tokens": rng.integers(1, 50, count),
        "label": rng.choice(["a", "b"], count),
        "first_token_time": np.where(rng.random(count) < 0.2, math.nan, first),
        "finish_time": first + rng.exponential(3, count),
        "start": datetime(2024, 1, 2, 23, 59, 30),
    }
    return Trace(**{**columns, **changes})


# Measured times.


def test_measured_times_follow_the_arrivals():
    trace = Trace([13, 10], [1, 1], [1, 1], first_token_time=[13.5, math.nan], finish_time=[14, 12])
    np.testing.assert_array_equal(trace.first_token_time, [math.nan, 3.5])
    assert trace.finish_time.tolist() == [2, 4]
    assert not trace.finish_time.flags.writeable
    assert list(trace.to_frame().columns) == [
        "arrival_time",
        "prompt_tokens",
        "output_tokens",
        "first_token_time",
        "finish_time",
    ]
    assert trace == replace(trace)
    assert trace != replace(trace, finish_time=None)
    assert trace != replace(trace, first_token_time=[0.5, 3.5])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"first_token_time": [1, 0.5]}, r"first_token_time must not lie before arrival_time; got 0.5 at index 1"),
        ({"finish_time": [1, 0.5]}, r"finish_time must not lie before arrival_time; got 0.5 at index 1"),
        ({"first_token_time": [2, 2], "finish_time": [1, 2]}, "finish_time must not lie before first_token_time; got"),
        ({"first_token_time": [2, math.nan], "finish_time": [3, 0]}, "finish_time must not lie before arrival_time"),
        ({"first_token_time": [1, math.inf]}, "first_token_time must be finite, or NaN where unknown; got inf"),
        ({"finish_time": [1]}, "finish_time has 1 entries and arrival_time 2"),
        ({"finish_time": ["a", "b"]}, "finish_time must be an array of numbers"),
    ],
)
def test_measured_times_that_cannot_be(columns, message):
    with pytest.raises(InvalidInput, match=f"Trace: {message}"):
        Trace([0, 1], [1, 1], [1, 1], **columns)


def test_merge_keeps_measured_times():
    one = Trace([5, 6], [1, 1], [1, 1], first_token_time=[5.5, 7], label=["a", "a"])
    other = Trace([4], [1], [1], finish_time=[9], label=["b"])
    merged = Trace.merge(one, other)
    np.testing.assert_array_equal(merged.first_token_time, [math.nan, 1.5, 3])
    np.testing.assert_array_equal(merged.finish_time, [5, math.nan, math.nan])


# Parts of a trace.


@settings(max_examples=200, deadline=None)
@given(
    times=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    start=st.integers(-5, 45),
    length=st.integers(1, 50),
)
def test_window_against_a_mask(times, start, length):
    trace = Trace(times, np.arange(len(times)) + 1, np.ones(len(times)), observation_time=60)
    inside = (trace.arrival_time >= start) & (trace.arrival_time < start + length)
    if not inside.any():
        with pytest.raises(InvalidInput, match=r"no request arrives in \["):
            trace.window(start, start + length)
        return
    part = trace.window(start, start + length)
    expected = trace.arrival_time[inside]
    assert np.array_equal(part.arrival_time, expected - expected[0])
    assert np.array_equal(part.prompt_tokens, trace.prompt_tokens[inside])
    assert part.duration == length
    assert part.offset == min(times) + expected[0]


def test_window_keeps_columns_and_calendar():
    trace = served(sources=("x.csv",), skipped_lines=2, skipped_reasons=("x.csv, line 2: odd",))
    part = trace.window(10, 30)
    frame = trace.to_frame()
    frame = frame[frame["arrival_time"].between(10, 30, inclusive="left")]
    first = frame["arrival_time"].iloc[0]
    np.testing.assert_allclose(part.first_token_time, frame["first_token_time"] - first, rtol=1e-12)
    np.testing.assert_allclose(part.finish_time, frame["finish_time"] - first, rtol=1e-12)
    assert part.label.tolist() == frame["label"].tolist()
    assert part.start == trace.start + timedelta(seconds=first)
    assert (part.sources, part.skipped_lines, part.skipped_reasons) == (
        ("x.csv",),
        2,
        ("x.csv, line 2: odd",),
    )


def test_windows_of_a_trace_put_it_together_again():
    trace = served(label=None, first_token_time=None, finish_time=None, start=None)
    parts = [trace.window(0, 20), trace.window(20, 1000)]
    again = Trace.merge(*(replace(part, label=None, observation_time=None) for part in parts))
    np.testing.assert_allclose(again.arrival_time, trace.arrival_time, atol=1e-12)
    assert np.array_equal(again.prompt_tokens, trace.prompt_tokens)


def test_thinning_keeps_a_share_of_the_requests():
    trace = poisson()
    part = trace.thinned(0.25, seed=4)
    assert part == trace.thinned(0.25, seed=4) != trace.thinned(0.25, seed=5)
    # Binomial(N, 0.25), with four standard deviations.
    assert abs(len(part) - 0.25 * len(trace)) < 4 * math.sqrt(len(trace) * 0.25 * 0.75)
    assert part.duration == trace.duration == 2000
    assert set(part.prompt_tokens.tolist()) <= set(trace.prompt_tokens.tolist())
    whole = trace.thinned(1.0)
    assert whole == trace
    unknown = replace(trace, observation_time=None)
    assert unknown.thinned(0.5).duration == unknown.duration


def test_thinning_brings_bursts_nearer_to_poisson_and_speeding_up_keeps_them():
    rng = np.random.default_rng(6)
    bursts = np.repeat(np.sort(rng.uniform(0, 5000, 2000)), 10)
    trace = Trace(bursts, np.ones(20_000), np.ones(20_000), observation_time=5000)

    def index(each, window):
        return each.dispersion(windows=[window])["dispersion"].iloc[0]

    # Batches of 10: variance over mean is 10 (E[N^2]/E[N]), and 1 + 9 share when thinned (binomial batches).
    assert index(trace, 1.0) == pytest.approx(10, rel=0.15)
    assert index(trace.thinned(0.2), 1.0) == pytest.approx(1 + 9 * 0.2, rel=0.15)
    fast = trace.sped_up(4)
    assert fast.request_rate == 4 * trace.request_rate
    assert index(fast, 0.25) == pytest.approx(index(trace, 1.0), rel=1e-3)


def test_speeding_up_divides_times():
    trace = served()
    fast = trace.sped_up(2)
    assert np.array_equal(fast.arrival_time, trace.arrival_time / 2)
    assert (fast.first_token_time, fast.finish_time) == (None, None)
    assert (fast.start, fast.observation_time) == (trace.start, None)
    assert poisson().sped_up(0.5).observation_time == 4000


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda t: t.window(0, math.nan), "Trace.window: stop must be a finite number of seconds; got nan"),
        (lambda t: t.window("0", 1), "Trace.window: start must be a finite number of seconds; got '0'"),
        (lambda t: t.window(5, 5), "Trace.window: start must be below stop; got start=5 and stop=5"),
        (
            lambda t: t.window(1e6, 2e6),
            r"Trace.window: no request arrives in \[1e\+06, 2e\+06\) s; the trace spans 0 to",
        ),
        (lambda t: t.thinned(0), "Trace.thinned: share must be above 0 and at most 1; got 0"),
        (lambda t: t.thinned(True), "Trace.thinned: share must be above 0 and at most 1; got True"),
        (lambda t: t.thinned(1e-12), "share=1e-12 left none of 50 requests; take a larger share, or another seed"),
        (lambda t: t.thinned(0.5, seed=-1), "Trace.thinned: seed must be a whole number of at least 0"),
        (lambda t: t.sped_up(0), "Trace.sped_up: factor must be a finite number above 0; got 0"),
        (lambda t: t.sped_up(math.inf), "Trace.sped_up: factor must be a finite number above 0; got inf"),
        (lambda t: t.rates(interval=0), "Trace.rates: interval must be a finite number of seconds above 0; got 0"),
        (lambda t: t.rates(interval=1e-6), r"interval=1e-06 s makes .* more than 5,000,000 rows; take at least"),
        (lambda t: t.dispersion(windows=[1, 40]), "windows must fit into the .* s of the trace from 2 to .*got 40 s"),
        (lambda t: t.dispersion(windows=["a"]), "Trace.dispersion: windows must be a finite number of seconds above 0"),
        (lambda t: t.lengths(quantiles=[2]), "Trace.lengths: quantiles must be numbers from 0 to 1; got 2"),
        (lambda t: t.exponential_fit(bins=1), "bins must be whole numbers from 2 to 100,000; got 1"),
        (lambda t: t.exponential_fit(bins=[5, "x"]), r"bins must be whole numbers .*; got \[5, 'x'\]"),
        (lambda t: replace(t, start=None).by_hour(), r"Trace.by_hour: the trace has no start .*replace\(trace, start="),
        (lambda t: replace(t, label=["all"] * 50).rates(interval=1), "a label is 'all', which names the whole stream"),
        (lambda t: replace(t, observation_time=1e11).by_hour(), "lasts for more than 5,000,000 hours"),
    ],
)
def test_arguments(ask, message):
    with pytest.raises(InvalidInput, match=message):
        ask(served())


# Rates over time.


@settings(max_examples=100, deadline=None)
@given(
    times=st.lists(st.floats(0, 100), min_size=2, max_size=40),
    interval=st.floats(0.5, 200),
    extra=st.floats(0.01, 20),
)
def test_rates_add_up(times, interval, extra):
    span = max(times) - min(times)
    labels = np.where(np.arange(len(times)) % 2, "x", "y")
    tokens = np.arange(len(times)) + 1
    trace = Trace(times, tokens, 2 * tokens, label=labels, observation_time=span + extra)
    table = trace.rates(interval=interval)
    for name, where in (("x", trace.label == "x"), ("y", trace.label == "y"), ("all", slice(None))):
        part = table[table["label"] == name]
        assert part["requests"].sum() == trace.arrival_time[where].size
        assert part["seconds"].sum() == pytest.approx(trace.duration)
        assert (part["prompt_rate"] * part["seconds"]).sum() == pytest.approx(trace.prompt_tokens[where].sum())
        assert (part["output_rate"] * part["seconds"]).sum() == pytest.approx(trace.output_tokens[where].sum())


def test_rates_against_pandas():
    trace = served(400)
    table = trace.rates(interval=7)
    frame = trace.to_frame()
    grouped = frame.groupby(["label", (frame["arrival_time"] // 7).astype(int)])["prompt_tokens"]
    for (label, place), tokens in grouped.sum().items():
        row = table[(table["label"] == label) & (table["start"] == 7 * place)].iloc[0]
        assert row["prompt_rate"] * row["seconds"] == pytest.approx(tokens)
        assert row["requests"] == grouped.count()[label, place]


def test_rates_of_a_window_are_those_of_its_interval():
    trace = poisson()
    table = trace.rates(interval=500)
    part = trace.window(500, 1000)
    assert table["request_rate"].iloc[1] == pytest.approx(part.request_rate)
    assert table["output_rate"].iloc[1] == pytest.approx(part.output_tokens.sum() / 500)


# Burstiness.


def test_poisson_streams_have_dispersion_one():
    inside, values = 0, []
    for seed in range(60):
        table = poisson(rate=10, duration=400, seed=seed).dispersion(windows=[1, 8])
        inside += int(table["dispersion"].between(table["poisson_low"], table["poisson_high"]).sum())
        values.append(table["dispersion"].to_numpy())
    assert np.mean(values) == pytest.approx(1, abs=0.03)
    # 120 intervals at 95 %: 114 expected, 104 is four standard deviations below.
    assert inside >= 104


def test_dispersion_by_hand():
    trace = Trace([0, 1, 1.5, 6], [1] * 4, [1] * 4, observation_time=9, label=["a", "a", "b", "b"])
    table = trace.dispersion(windows=[2, 3]).set_index(["label", "window"])
    # Windows of 3 s: 3, 0 and 1 requests; of 2 s: 3, 0, 0, 1, with the ninth second left over.
    assert table.loc[("all", 3.0), "mean"] == pytest.approx(4 / 3)
    assert table.loc[("all", 3.0), "dispersion"] == pytest.approx(np.var([3, 0, 1], ddof=1) / (4 / 3))
    assert table.loc[("all", 2.0), "windows"] == 4
    assert table.loc[("a", 2.0), "dispersion"] == pytest.approx(np.var([2, 0, 0, 0], ddof=1) / 0.5)
    even = Trace(np.arange(1000), np.ones(1000), np.ones(1000)).dispersion()
    assert even["window"].tolist() == [1, 10, 60]
    assert even["dispersion"].max() < 0.01
    assert Trace([0, 1], [1, 1], [1, 1]).dispersion()["window"].tolist() == [0.2]


def test_renewal_streams_level_out_at_the_squared_variation_of_their_gaps():
    gaps = np.random.default_rng(3).gamma(0.25, size=200_000)
    trace = Trace(np.cumsum(gaps), np.ones(gaps.size), np.ones(gaps.size))
    assert trace.describe().loc["all", "interarrival_cv"] ** 2 == pytest.approx(4, rel=0.05)
    assert trace.dispersion(windows=[50])["dispersion"].iloc[0] == pytest.approx(4, rel=0.1)


@recorded
def test_azure_conversations_are_not_poisson_over_minutes():
    table = read_trace(AZURE / "AzureLLMInferenceTrace_conv.csv").dispersion()
    index = table.set_index("window")["dispersion"]
    assert index[1.0] == pytest.approx(1.4, abs=0.05)
    assert index[60.0] > 10


# Time of day.


def test_hours_of_the_day_by_hand():
    # From 23:30 on the first day to 00:30 on the third: 25 hours, of which 23:30-24 and 0-0:30 come twice.
    start = datetime(2024, 1, 1, 23, 30)
    moments = [0, 1800, 3600, 3600 * 24, 3600 * 24 + 1800]
    trace = Trace(moments, [10] * 5, [1] * 5, start=start, observation_time=25 * 3600, label=list("aabbb"))
    table = trace.by_hour()
    whole = table[table["label"] == "all"].set_index("hour")
    assert whole["days"].tolist() == pytest.approx([1.5, *[1] * 22, 1.5])
    assert whole.loc[[23, 0], "requests"].tolist() == [2, 3]
    assert whole.loc[0, "request_rate"] == pytest.approx(3 / (1.5 * 3600))
    assert whole.loc[0, "prompt_rate"] == pytest.approx(30 / (1.5 * 3600))
    assert whole["days"].sum() == pytest.approx(25)
    parts = table[table["label"] != "all"].groupby("hour")["requests"].sum()
    assert parts.equals(whole["requests"])


def test_hours_that_were_not_observed_are_left_out():
    table = served().by_hour()
    assert table["hour"].unique().tolist() == [0, 23]
    assert table["requests"].sum() == 2 * 50


# Lengths.


def test_lengths_against_pandas():
    trace = poisson(label=None)
    table = trace.lengths(quantiles=[0.1, 0.5]).set_index("tokens")
    for name, column in (("prompt", trace.prompt_tokens), ("output", trace.output_tokens)):
        series = pd.Series(column)
        row = table.loc[name]
        assert row["cv"] == pytest.approx(series.std(ddof=0) / series.mean())
        assert row[["least", "q0.1", "q0.5", "most"]].tolist() == [
            series.min(),
            series.quantile(0.1),
            series.median(),
            series.max(),
        ]


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.one_of(st.integers(1, 40), st.integers(1, 10**9)), min_size=1, max_size=60),
    bins=st.integers(2, 40),
)
def test_exponential_fit_against_scipy(tokens, bins):
    trace = Trace(np.arange(len(tokens)), tokens, tokens, observation_time=len(tokens))
    row = trace.exponential_fit(bins=bins).iloc[0]
    edges, shares, law = exponential_bins(trace.prompt_tokens, bins=bins)
    assert (row["bins"], row["width"]) == (bins, edges[1])
    assert shares.sum() == pytest.approx(1)
    assert np.exp(law).sum() == pytest.approx(1)
    mean = np.mean(tokens)
    if mean == 1:
        assert (row["kl"], row["ks"]) == (0, 0)
        return
    # The geometric law of scipy, its bins by its distribution function, and the lengths counted one by one.
    geometric = stats.geom(1 / mean)
    counted = [sum(low < each <= high for each in tokens) for low, high in pairwise(edges)]
    counted.append(len(tokens) - sum(counted))
    probability = np.append(geometric.cdf(edges[1:]) - geometric.cdf(edges[:-1]), geometric.sf(edges[-1]))
    if (probability > 1e-9).all():
        assert row["kl"] == pytest.approx(stats.entropy(counted, probability), rel=1e-4, abs=1e-6)
    places = np.unique(np.concatenate([tokens, np.array(tokens) - 1]))
    share = np.searchsorted(np.sort(tokens), places, side="right") / len(tokens)
    assert row["ks"] == pytest.approx(np.abs(share - geometric.cdf(places)).max(), abs=1e-9)


def test_exponential_lengths_are_found_to_be_near():
    trace = poisson(rate=20)
    table = trace.exponential_fit(bins=(10, 50, 250))
    # 2 N KL is close to chi-square with as many degrees of freedom as there are bins: mean kl_noise, within a third.
    assert (table["kl"] < 2 * table["kl_noise"]).all()
    assert table["ks"].max() < 1.7 / math.sqrt(len(trace))
    fixed = replace(trace, output_tokens=np.full(len(trace), 200)).exponential_fit().set_index("tokens")
    assert fixed.loc["output", "ks"] == pytest.approx(1 - (1 - 1 / 200) ** 199)


def test_finer_bins_see_more():
    rng = np.random.default_rng(8)
    trace = Trace(np.arange(5000), rng.choice([100, 400, 1000], 5000), np.ones(5000))
    table = trace.exponential_fit(bins=[5, 25, 125])
    divergence = table[table["tokens"] == "prompt"]["kl"].to_numpy()
    assert (np.diff(divergence) > 0.5).all()


@recorded
def test_published_lengths_are_not_exponential():
    trace = read_trace([AZURE / f"AzureLLMInferenceTrace_{name}.csv" for name in ("code", "conv")])
    table = trace.exponential_fit().set_index(["label", "tokens"])
    assert list(table.index) == list(product(("code", "conv", "all"), ("prompt", "output")))
    assert (table["kl"] > 20 * table["kl_noise"]).all()


# The figure.


@pytest.mark.parametrize(
    "trace",
    [
        poisson(duration=100),
        served(),
        served(label=None),
        poisson(duration=100, label=None, start=datetime(2024, 1, 1)),
        replace(poisson(duration=4 * 3600.0, rate=0.05)),
        Trace([0, 1], [1, 1], [1, 1]),
        Trace([0], [1], [1], observation_time=5),
        Trace([0, 0, 0, 2], [1, 2, 3, 10**9], [1, 1, 1, 1], label=list("abcd")),
    ],
    ids=["poisson", "labels", "unlabelled", "dated", "hours", "two", "one", "odd"],
)
def test_figure_draws(trace):
    figure = trace.plot()
    figure.savefig(io.BytesIO(), format="png")
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[0].startswith("Requests/s, in intervals of")
    assert all(axis.get_xlabel() for axis in figure.axes)
    drawn = [line.get_label() for line in figure.axes[0].get_lines()]
    assert drawn[0] == "all"
    assert set(drawn[1:]) <= set(trace.labels)
    assert len(drawn) == 1 + min(3, len(trace.labels))


def test_figure_shows_the_numbers_of_the_tables():
    trace = poisson(duration=500)
    figure = trace.plot()
    table = trace.rates(interval=5)
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_ydata(), table["request_rate"])
    fit = trace.exponential_fit().set_index("tokens")
    assert f"KL {fit.loc['prompt', 'kl']:.3f} nats" in figure.axes[4].texts[0].get_text()
