"""Iteration-time curves: each against its formula, its grid, the physical rule, and as part of a GPU and a scenario."""

from __future__ import annotations

import json
import math
import tomllib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator
from scipy.optimize import brentq

import fluidopt as fo
from fluidopt.curves import Kink, LinearTime, TabulatedTime
from fluidopt.inputs import dump, parse
from fluidopt.reference import QWEN_8B_A100, reference_workload
from fluidopt.scenario import scenario_schema

PRICES = fo.TokenPrices(prompt=0.1, output=0.2)
BENT = LinearTime(
    alpha=0.010,
    beta=1e-5,
    per_decode=4e-5,
    per_kv_token=1.5e-7,
    solo=0.0115,
    solo_per_decode=2e-5,
    solo_per_kv_token=9e-8,
    chunk_kinks=(Kink(at=256, slope=4e-5), Kink(at=1024, slope=3e-5)),
    decode_kinks=(Kink(at=64, slope=1e-5),),
    solo_decode_kinks=(Kink(at=32, slope=3e-5),),
)


def positive(low, high):
    return st.floats(low, high, allow_nan=False)


@st.composite
def kinks(draw):
    places = sorted(draw(st.sets(st.integers(1, 2000), max_size=3)))
    return tuple(Kink(at=at, slope=draw(positive(0, 1e-4))) for at in places)


affine = st.builds(
    fo.IterationTime,
    alpha=positive(0.001, 0.03),
    beta=positive(0, 1e-4),
    solo=positive(0.001, 0.03),
    physical=st.booleans(),
)
linear = st.builds(
    LinearTime,
    alpha=positive(0.001, 0.03),
    beta=positive(0, 1e-4),
    per_decode=positive(0, 1e-4),
    per_kv_token=positive(0, 1e-6) | st.just(0.0),
    solo=positive(0.001, 0.03),
    solo_per_decode=positive(0, 1e-4),
    solo_per_kv_token=positive(0, 1e-6) | st.just(0.0),
    chunk_kinks=kinks(),
    decode_kinks=kinks(),
    solo_decode_kinks=kinks(),
    physical=st.booleans(),
)


@st.composite
def tables(draw, physical=None):
    """A table of any times: longer chunks may be faster, more decodes too."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    C, D, K = draw(st.integers(2, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    chunk, decodes, kv_tokens = (np.sort(rng.choice(np.arange(1, 4000), size, replace=False)) for size in (C, D, K))
    return TabulatedTime(
        chunk=chunk.tolist(),
        decodes=decodes.tolist(),
        kv_tokens=kv_tokens.tolist(),
        mixed_seconds=rng.uniform(0.005, 0.05, (C, D, K)).tolist(),
        decode_only_seconds=rng.uniform(0.005, 0.05, (D, K)).tolist(),
        physical=draw(st.booleans()) if physical is None else physical,
    )


curves = affine | linear | tables()
chunks, batches, caches = positive(0, 20_000), positive(0, 6000), positive(0, 50_000)


# ---- what a curve says --------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(curves, chunks, batches, caches)
def test_the_grid_says_what_the_curve_says(curve, chunk, decodes, kv_tokens):
    grid = curve.grid()
    assert grid.chunk[0] == 0
    assert grid.mixed.shape == (grid.chunk.size, grid.decodes.size, grid.kv_tokens.size)
    assert grid.decode_only.shape == grid.mixed.shape[1:]
    mixed, alone = curve.mixed(chunk, decodes, kv_tokens), curve.decode_only(decodes, kv_tokens)
    assert grid.times(max(chunk, 1e-9), decodes, kv_tokens) == pytest.approx(
        curve.mixed(max(chunk, 1e-9), decodes, kv_tokens), rel=1e-9
    )
    assert grid.times(0, decodes, kv_tokens) == pytest.approx(alone, rel=1e-9)
    if not curve.depends_on_kv:
        assert (mixed, alone) == (curve.mixed(chunk, decodes), curve.decode_only(decodes))


def summed(slope, bends, upto):
    """The integral of a slope that bends, in steps of 1/8."""
    at = np.arange(0, upto, 0.125) + 0.0625
    return sum(0.125 * next((k.slope for k in reversed(bends) if k.at < x), slope) for x in at)


@pytest.mark.parametrize("physical", [True, False])
@pytest.mark.parametrize(("chunk", "decodes", "kv_tokens"), [(16, 3, 0), (100, 40, 900), (700, 80, 4000), (2100, 9, 1)])
def test_the_linear_curve_is_the_sum_of_its_terms(physical, chunk, decodes, kv_tokens):
    curve = LinearTime(**{name: getattr(BENT, name) for name in BENT.__dataclass_fields__} | {"physical": physical})
    prefill = 0.010 + summed(1e-5, BENT.chunk_kinks, chunk)
    # From 64 decodes on a decode alone adds more (3e-5) than one beside a prefill would (1e-5).
    beside = 4e-5 * min(decodes, 64) + (3e-5 if physical else 1e-5) * max(0, decodes - 64)
    alone = 2e-5 * min(decodes, 32) + 3e-5 * max(0, decodes - 32)
    assert curve.mixed(chunk, decodes, kv_tokens) == pytest.approx(
        (max(0.0115, prefill) if physical else prefill) + beside + 1.5e-7 * decodes * kv_tokens
    )
    assert curve.decode_only(decodes, kv_tokens) == pytest.approx(0.0115 + alone + 9e-8 * decodes * kv_tokens)


def test_a_line_that_starts_a_rounding_below_the_decode_only_time_keeps_its_slope():
    for curve in (fo.IterationTime, LinearTime):
        line = curve(alpha=np.nextafter(0.01, 0), beta=1e-5, solo=0.01)
        assert line.grid().times(1000, 0, 0) == pytest.approx(0.02) == line.mixed(1000)


def test_the_linear_curve_without_decode_terms_is_the_affine_one():
    flat = LinearTime(alpha=0.0174, beta=6.2e-5, solo=0.022)
    for chunk in (0, 10, 74, 75, 256, 9000):
        assert flat.mixed(chunk, 15) == pytest.approx(QWEN_8B_A100.mixed(chunk, 15), rel=1e-12)
        assert flat.decode_only(16) == QWEN_8B_A100.decode_only(16)


@settings(max_examples=60)
@given(tables(physical=False), st.tuples(*[positive(0, 1)] * 3))
def test_a_table_between_its_entries_against_scipy(curve, where):
    axes = [np.array(each) for each in (curve.chunk, curve.decodes, curve.kv_tokens)]
    point = [axis[0] + share * (axis[-1] - axis[0]) for axis, share in zip(axes, where, strict=True)]
    wide = [axis if axis.size > 1 else np.append(axis, axis[0] + 1) for axis in axes]
    mixed, alone = np.array(curve.mixed_seconds), np.array(curve.decode_only_seconds)
    for at, axis in enumerate(axes):
        if axis.size == 1:
            mixed = np.repeat(mixed, 2, axis=at)
            alone = np.repeat(alone, 2, axis=at - 1) if at else alone
    assert curve.mixed(*point) == pytest.approx(RegularGridInterpolator(wide, mixed)(point).item())
    assert curve.decode_only(*point[1:]) == pytest.approx(RegularGridInterpolator(wide[1:], alone)(point[1:]).item())


@settings(max_examples=200)
@given(tables(physical=True) | linear.filter(lambda curve: curve.physical), chunks, batches, caches)
def test_a_prefill_never_speeds_decodes_up(curve, chunk, decodes, kv_tokens):
    assert curve.mixed(chunk, decodes, kv_tokens) >= curve.decode_only(decodes, kv_tokens) * (1 - 1e-12)


@settings(max_examples=200)
@given(tables(), st.tuples(*[positive(0, 9)] * 3), st.tuples(*[positive(0, 9)] * 3))
def test_beyond_its_last_entries_a_table_never_falls(curve, start, step):
    ends = [axis[-1] for axis in (curve.chunk, curve.decodes, curve.kv_tokens)]
    near = [end * (1 + more) for end, more in zip(ends, start, strict=True)]
    far = [each * (1 + more) for each, more in zip(near, step, strict=True)]
    # Far out the corners of the last cell, each exact to a part in 2**52, weigh as many as there are pieces to there.
    weights = [
        1 + 2 * value / (axis[-1] - axis[-2]) if len(axis) > 1 else 1.0
        for axis, value in zip((curve.chunk, curve.decodes, curve.kv_tokens), far, strict=True)
    ]
    rounding = 2.0**-50 * math.prod(weights) * np.max(curve.mixed_seconds)
    assert curve.mixed(*far) >= curve.mixed(*near) - rounding
    rounding = 2.0**-50 * math.prod(weights[1:]) * np.max(curve.decode_only_seconds)
    assert curve.decode_only(*far[1:]) >= curve.decode_only(*near[1:]) - rounding


@pytest.mark.parametrize("curve", [QWEN_8B_A100, BENT], ids=["affine", "linear"])
@pytest.mark.parametrize("decodes", [0, 15, 100])
def test_the_crossover_is_where_the_mixed_time_leaves_the_other(curve, decodes):
    alone = 1.3 * curve.decode_only(decodes, 500)
    meet = brentq(lambda chunk: curve.mixed(chunk, decodes, 500) - alone, 0, 50_000)
    assert curve.grid().crossover_chunk(decodes, 500, alone=alone) == pytest.approx(meet)


def test_the_crossover_of_a_raw_line_is_b0_and_may_be_missing():
    raw = fo.IterationTime(alpha=0.0174, beta=6.2e-5, solo=0.022, physical=False)
    assert raw.grid().crossover_chunk(15) == pytest.approx(raw.crossover_chunk)
    assert fo.IterationTime(alpha=0.03, beta=0, solo=0.022).grid().crossover_chunk(15) == 0
    assert fo.IterationTime(alpha=0.01, beta=0, solo=0.022, physical=False).grid().crossover_chunk(15) == math.inf


# ---- curves that are none -----------------------------------------------------------------------------------------

LINE = {"alpha": 0.01, "beta": 1e-5, "solo": 0.01}
TABLE = {"chunk": [64, 128], "decodes": [1, 2], "mixed_seconds": [[[1], [2]], [[3], [4]]]}
TABLE |= {"decode_only_seconds": [[1], [2]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_decode": -1e-5}, "per_decode must be at least 0"),
        ({"solo": 0}, "solo must be greater than 0"),
        ({"alpha": 0, "beta": 0}, "alpha and beta are both 0"),
        ({"chunk_kinks": [{"at": 0, "slope": 1e-5}]}, r"chunk_kinks\[0\].at must be greater than 0"),
        ({"chunk_kinks": [{"at": 9, "slope": -1e-5}]}, r"chunk_kinks\[0\].slope must be at least 0"),
        ({"decode_kinks": [{"at": 9, "slop": 1e-5}]}, r"decode_kinks\[0\].slope is required"),
        (
            {"solo_decode_kinks": [{"at": 9, "slope": 1}, {"at": 9, "slope": 2}]},
            r"solo_decode_kinks must be by increasing at, none twice; got at = \[9.0, 9.0\]",
        ),
    ],
)
def test_a_bad_linear_curve(change, message):
    with pytest.raises(fo.InvalidInput, match=message):
        LinearTime(**LINE | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": [64]}, "chunk must have at least 2 entr"),
        ({"chunk": [128, 64]}, r"chunk must increase from entry to entry; got \[128.0, 64.0\]"),
        ({"decodes": [1, 1]}, "decodes must increase from entry to entry"),
        ({"mixed_seconds": [[[1], [2]]]}, r"mixed_seconds must have shape \(2, 2, 1\).*found 1 in place of 2.*level 1"),
        ({"mixed_seconds": [[[1], [2]], [[3]]]}, "found 1 in place of 2 entries at level 2"),
        (
            {"decode_only_seconds": [[1], [2, 3]]},
            r"decode_only_seconds must have shape \(2, 1\) \(dec",
        ),
        ({"decode_only_seconds": [[1], [0]]}, r"decode_only_seconds\[1\]\[0\] must be greater than 0"),
    ],
)
def test_a_bad_table(change, message):
    with pytest.raises(fo.InvalidInput, match=message):
        TabulatedTime(**TABLE | change)


# ---- in a GPU and a scenario --------------------------------------------------------------------------------------

CURVES = {"affine": QWEN_8B_A100, "linear": BENT, "table": TabulatedTime(**TABLE, kv_tokens=[5])}


def test_modes_are_read_off_the_curve_at_chunk_decodes_and_cache():
    mixed, solo = fo.GPU(BENT, batch_size=48, chunk_size=512, kv_tokens=900).modes()
    assert mixed.iteration_time == BENT.mixed(512, 47, 900)
    assert solo.iteration_time == BENT.decode_only(48, 900)
    gpu = fo.GPU(BENT, batch_size=48, chunk_size=512, kv_tokens=900)
    assert gpu.kappa == BENT.mixed(512, 47, 900) / BENT.decode_only(48, 900)
    prefill, _, decode = gpu.modes(disaggregated=True)
    assert prefill.iteration_time == BENT.mixed(512, 0)
    assert decode.iteration_time == BENT.decode_only(48, 900)
    # Batches on whose sizes the speed depends are modes of their own.
    times = [mode.iteration_time for mode in gpu.modes(batches=[1, 16, 48])]
    assert times == [
        *(BENT.mixed(512, b - 1, 900) for b in (1, 16, 48)),
        *(BENT.decode_only(b, 900) for b in (1, 16, 48)),
    ]


def test_a_curve_that_knows_the_cache_needs_its_length():
    with pytest.raises(fo.InvalidInput, match=r"kv_tokens is required: this curve dep.*P \+ D \(1 \+ cv\^2\)/2"):
        fo.GPU(BENT, batch_size=16, chunk_size=256)
    assert fo.GPU(CURVES["table"], batch_size=16, chunk_size=256).kv_tokens is None
    with pytest.raises(fo.InvalidInput, match="kv_tokens must be at least 0"):
        fo.GPU(BENT, batch_size=16, chunk_size=256, kv_tokens=-1)


@pytest.mark.parametrize("form", CURVES)
def test_a_scenario_keeps_its_curve(form):
    gpu = fo.GPU(CURVES[form], batch_size=16, chunk_size=256, kv_tokens=700)
    scenario = fo.Scenario(classes=reference_workload().classes, gpu=gpu, prices=PRICES)
    data = json.loads(json.dumps(scenario.to_dict()))
    assert data["gpu"]["curve"]["form"] == form
    assert fo.Scenario.from_dict(data) == scenario
    del data["gpu"]["curve"]["form"]  # told by its fields
    assert fo.Scenario.from_dict(data) == scenario


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        ({"form": "cubic"}, "gpu.curve must have form 'affine', 'linear' or 'table'; got {'form': 'cubic'}"),
        ({"form": ["linear"]}, "gpu.curve must have form"),
        ({"form": "linear", "alpha": 0.01}, r"gpu.curve.beta is required; gpu.curve.solo is required"),
        ({"form": "table"} | TABLE | {"decodes": [1]}, r"gpu.curve: mixed_seconds must have shape \(2, 1, 1\)"),
        ({"form": "linear", "slo": 1} | LINE, r"gpu.curve.slo is not a field; did you mean 'solo'\?"),
        (LINE | {"alpha": "slow"}, "gpu.curve.alpha must be a number; got 'slow'"),
    ],
    ids=["unknown", "a list", "half", "shape", "misspelt", "affine"],
)
def test_a_file_with_a_bad_curve(curve, message):
    data = fo.reference_model().scenario.to_dict()
    data["gpu"]["curve"] = curve
    with pytest.raises(fo.InvalidInput, match=message):
        fo.Scenario.from_dict(data)


def test_the_schema_knows_every_curve():
    curve = scenario_schema()["$defs"]["GPU"]["properties"]["curve"]
    names = {each["$ref"].rsplit("/")[-1] for each in curve["oneOf"]}
    assert names == {"IterationTime", "LinearTime", "TabulatedTime"}


def test_a_plan_on_a_linear_curve_is_that_of_its_modes():
    text = """
    batch_size = 16
    chunk_size = 256
    kv_tokens = 1500
    [curve]
    alpha = 0.01
    beta = 4e-5
    per_decode = 1e-4
    solo = 0.012
    solo_per_kv_token = 1e-7
    chunk_kinks = [{ at = 512, slope = 3e-5 }]
    """
    data = fo.reference_model().scenario.to_dict() | {"gpu": tomllib.loads(text)}
    plan = fo.FluidModel.from_scenario(fo.Scenario.from_dict(data)).solve()
    # The cache slows a mixed iteration no less than a decode-only one.
    modes = (
        fo.Mode("mixed", chunk=256, decode_slots=15, iteration_time=0.01 + 256 * 4e-5 + 15e-4 + 15 * 1500 * 1e-7),
        fo.Mode("solo", decode_slots=16, iteration_time=0.012 + 16 * 1500 * 1e-7),
    )
    by_hand = fo.GPU(QWEN_8B_A100, batch_size=16, chunk_size=256, operating_modes=modes)
    assert plan.revenue_rate == pytest.approx(
        fo.FluidModel(reference_workload(), by_hand, prices=PRICES).solve().revenue_rate, rel=1e-9
    )


def test_a_raw_linear_curve_below_the_decode_only_time_warns_with_its_crossover():
    raw = LinearTime(alpha=0.0174, beta=6.2e-5, per_decode=1e-4, solo=0.022, solo_per_decode=1e-4, physical=False)
    gpu = fo.GPU(raw, batch_size=16, chunk_size=50)
    # 0.0174 + 6.2e-5 b0 + 15e-4 = 0.022 + 16e-4
    with pytest.warns(fo.ContentionWarning, match=rf"b0 = {(0.0046 + 1e-4) / 6.2e-5:.4g} tokens.*Use physical=True"):
        fo.FluidModel(reference_workload(), gpu, prices=PRICES)


def test_a_physical_curve_whose_decodes_weigh_more_than_a_short_chunk_says_so():
    heavy = LinearTime(alpha=0.01, beta=1e-6, solo=0.01, solo_per_decode=1e-3, per_decode=1e-3)
    with pytest.warns(fo.ContentionWarning, match="a prefill in place of one decode would speed.*larger chunk"):
        fo.FluidModel(reference_workload(), fo.GPU(heavy, batch_size=16, chunk_size=64), prices=PRICES)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**320) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["at", "slope", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = sorted({*LinearTime.__dataclass_fields__, *TabulatedTime.__dataclass_fields__})


@settings(max_examples=300)
@given(
    st.sampled_from([LINE | {"form": "linear"}, TABLE | {"form": "table"}]),
    st.dictionaries(st.sampled_from(FIELDS), JSON | st.floats(0, 1e308), max_size=3),
    st.sampled_from([1, 10**9]),
)
def test_any_json_is_a_curve_or_invalid_input(sound, change, batch_size):
    data = {"curve": sound | change, "batch_size": batch_size, "chunk_size": 512, "kv_tokens": 1e5}
    try:
        gpu = parse(fo.GPU, data)
    except fo.InvalidInput:
        return
    assert parse(fo.GPU, dump(gpu)) == gpu
    assert all(mode.iteration_time > 0 for mode in gpu.modes())
