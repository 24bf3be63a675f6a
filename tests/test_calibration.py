"""Fitting curves to measured iteration times: on data with known coefficients, and on real tables by other routes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tomllib
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import DATA, recorded

import fluidopt as fo
from fluidopt.calibration import fit_iteration_time, plot_fit, read_iteration_times
from fluidopt.curves import Kink, LinearTime, TabulatedTime
from fluidopt.data import known_gpu, known_gpus
from fluidopt.data.gpus import derive_known_gpus

ESTIMATES = DATA / "aiconfigurator" / "iteration_times_llama3.1.csv"
SPLITWISE = DATA / "splitwise" / "perf_model.csv"
RTX = DATA / "vllm-rtxpro6000" / "iteration_times.csv"

TRUE = LinearTime(
    alpha=0.010,
    beta=3e-5,
    per_decode=8e-5,
    per_kv_token=1.5e-7,
    solo=0.0105,
    solo_per_decode=4e-5,
    solo_per_kv_token=9e-8,
    physical=False,
)


def lattice(curve=TRUE, *, chunks=(64, 128, 256, 512, 1024), decodes=(1, 8, 32, 64), cached=(256, 1024, 2048)):
    """Exact times on a lattice, decode-only ones included."""
    axes = np.meshgrid([0, *chunks], decodes, cached, indexing="ij")
    frame = pd.DataFrame(dict(zip(("chunk", "decodes", "kv_tokens"), map(np.ravel, axes), strict=True)))
    return frame.assign(seconds=curve.grid().times(frame.chunk, frame.decodes, frame.kv_tokens))


def noisy(frame, spread, rng):
    return frame.assign(seconds=frame.seconds * (1 + spread * rng.standard_normal(len(frame))))


@cache
def table(path, query=""):
    frame = read_iteration_times(path)
    return frame.query(query) if query else frame


@pytest.fixture
def write(tmp_path):
    def write(text, name="times.csv"):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path / name

    return write


# ---- known coefficients -------------------------------------------------------------------------------------------


def test_standard_errors_cover_the_truth_as_often_as_they_should():
    """Of 300 draws with 2 % noise, the 95 % interval of Student's t holds the truth in 95 %, give or take 3 sigma."""
    rng, exact = np.random.default_rng(7), lattice()
    wide, narrow = (scipy.stats.t.ppf(0.975, freedom) for freedom in (12 - 3, 60 - 4))
    inside = []
    for _ in range(300):
        fit = fit_iteration_time(noisy(exact, 0.02, rng), form="linear", physical=False)
        true = [getattr(TRUE, name) for name in fit.coefficients.index]
        quantile = [wide if name.startswith("solo") else narrow for name in fit.coefficients.index]
        inside.append((fit.coefficients["value"] - true).abs() <= quantile * fit.coefficients["standard_error"])
    shares = pd.DataFrame(inside).mean()
    assert list(shares.index) == [name for name in TRUE.__dataclass_fields__ if isinstance(getattr(TRUE, name), float)]
    assert shares.between(0.95 - 0.038, 0.95 + 0.038).all(), shares


@pytest.mark.parametrize("errors", ["relative", "absolute"])
def test_without_noise_the_coefficients_come_back(errors):
    fit = fit_iteration_time(lattice(), form="linear", errors=errors, physical=False)
    for name, row in fit.coefficients.iterrows():
        assert row["value"] == pytest.approx(getattr(TRUE, name), rel=1e-6)
    assert fit.curve.per_kv_token == pytest.approx(TRUE.per_kv_token)
    assert abs(fit.worst["error"]) < 1e-9
    assert fit.r_squared.min() == pytest.approx(1)


def test_kinks_are_found_where_they_are():
    bent = LinearTime(
        alpha=0.010,
        beta=1e-5,
        per_decode=8e-5,
        solo=0.009,
        solo_per_decode=2e-5,
        chunk_kinks=(Kink(at=256, slope=4e-5),),
        solo_decode_kinks=(Kink(at=32, slope=7e-5),),
    )
    frame = noisy(lattice(bent, decodes=(1, 8, 16, 32, 64, 128)), 0.002, np.random.default_rng(3))
    fit = fit_iteration_time(frame, form="piecewise")
    assert [kink.at for kink in fit.curve.chunk_kinks] == [256]
    assert [kink.at for kink in fit.curve.solo_decode_kinks] == [32]
    assert fit.curve.decode_kinks == ()
    assert fit.curve.chunk_kinks[0].slope == pytest.approx(4e-5, rel=0.02)
    slope, error = fit.coefficients.loc["beta above 256", ["value", "standard_error"]]
    assert abs(slope - 4e-5) < 4 * error
    assert (
        fit_iteration_time(noisy(lattice(), 0.02, np.random.default_rng(3)), form="piecewise").curve.chunk_kinks == ()
    )
    # Without noise too, where nothing is left to explain.
    assert [kink.at for kink in fit_iteration_time(lattice(bent), form="piecewise").curve.chunk_kinks] == [256]


class Steps:
    """Times in tiles of 192 tokens, which no line with a few kinks follows."""

    def grid(self):
        return self

    @staticmethod
    def times(chunk, decodes, kv_tokens):
        tiles = 0.004 * np.ceil(np.asarray(chunk) / 192) + 0.0015 * np.sqrt(decodes)
        return 0.01 + tiles + 2e-8 * np.asarray(decodes * kv_tokens) ** 1.1 + 0.002 * (np.asarray(chunk) > 0)


@pytest.mark.parametrize(
    ("curve", "noise", "form"),
    [
        (fo.IterationTime(alpha=0.03, beta=6.2e-5, solo=0.022), 0.02, "affine"),
        (TRUE, 0.01, "linear"),
        (
            LinearTime(alpha=0.01, beta=1e-6, per_decode=5e-5, solo=0.009, chunk_kinks=(Kink(at=256, slope=9e-5),)),
            0.01,
            "piecewise",
        ),
        (Steps(), 0.001, "table"),
    ],
    ids=["affine", "linear", "piecewise", "table"],
)
def test_the_form_is_that_of_the_data(curve, noise, form):
    frame = lattice(
        curve,
        chunks=(32, 64, 96, 128, 192, 256, 320, 384, 512, 700, 1024),
        decodes=(1, 2, 4, 8, 16, 32, 64, 128),
        cached=(128, 256, 512, 1024, 1500, 2048),
    )
    fit = fit_iteration_time(noisy(frame, noise, np.random.default_rng(5)))
    assert fit.form == form
    assert list(fit.cross_validation.index[fit.cross_validation["chosen"]]) == [form]
    assert set(fit.cross_validation["levels"]) == {9 + 6 + 4}
    assert fit.notes[-1].startswith("of the forms, ")


def test_a_log_of_iterations_has_no_levels_and_is_fitted_all_the_same():
    rng, count = np.random.default_rng(0), 2000
    log = pd.DataFrame(
        {
            "chunk": rng.choice([0, 1], count) * rng.integers(1, 2048, count),
            "decodes": rng.integers(1, 65, count),
            "kv_tokens": rng.uniform(100, 4000, count),
        }
    )
    log["seconds"] = TRUE.grid().times(log.chunk, log.decodes, log.kv_tokens)
    log = noisy(log, 0.02, rng)
    fit = fit_iteration_time(log)
    assert fit.form == "linear"
    assert set(fit.cross_validation["levels"]) == {3 * 24}, "stretches of neighbours in place of levels"
    assert fit.cross_validation.loc["linear", "error"] == pytest.approx(0.02, rel=0.05), "the noise, and no more"
    assert "table" not in fit.cross_validation.index
    with pytest.raises(fo.InvalidInput, match=r"decodes and 2000 KV lengths has .* entries, more than 100,000"):
        fit_iteration_time(log, form="table")


@recorded
def test_cross_validation_by_hand():
    """The affine error of one real series, recomputed with polyfit for every level left out."""
    frame = table(ESTIMATES, "model.str.contains('-8B') and gpu == 'h100_sxm'")
    mixed, alone = frame[frame.chunk > 0], frame[frame.chunk == 0]
    missed = []
    for axis, levels in (("chunk", (256, 512, 1024, 2048)), ("decodes", (16, 32, 64))):
        for level in levels:
            kept = mixed[mixed[axis] != level]
            line = np.polyfit(kept.chunk, kept.seconds, 1, w=1 / kept.seconds)
            rest = alone[(alone[axis] != level)].seconds
            solo = np.average(rest, weights=1 / rest**2)
            held = frame[(frame[axis] == level)]
            there = np.where(held.chunk > 0, np.maximum(solo, np.polyval(line, held.chunk)), solo)
            missed.append(np.sqrt(np.mean((there / held.seconds - 1) ** 2)))
    fit = fit_iteration_time(frame)
    assert fit.cross_validation.loc["affine", "error"] == pytest.approx(np.mean(missed), rel=1e-9)
    assert fit.form == "piecewise"
    assert fit.cross_validation["chosen"].sum() == 1


# ---- real tables by another route ---------------------------------------------------------------------------------

SERIES = [(model, gpu) for model in ("8B", "70B") for gpu in ("a100_sxm", "h100_sxm")]


def affine(frame, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ContentionWarning)
        return fit_iteration_time(frame, form="affine", **options)


@recorded
@pytest.mark.parametrize(("model", "gpu"), SERIES)
def test_each_series_is_a_line_in_the_chunk(model, gpu):
    """At each number of decodes: numpy's line and its errors, R^2 above 0.99, and an intercept below decode-only."""
    frame = read_iteration_times(ESTIMATES, model=model, gpu=gpu)
    for decodes in (8, 16, 32, 64, 128):
        series = frame[frame.decodes == decodes]
        fit = affine(series, errors="absolute")
        mixed = series[series.chunk > 0]
        (slope, intercept), covariance = np.polyfit(mixed.chunk, mixed.seconds, 1, cov=True)
        assert fit.curve.beta == pytest.approx(slope, rel=1e-9)
        assert fit.curve.alpha == pytest.approx(intercept, rel=1e-9)
        errors = fit.coefficients["standard_error"]
        assert errors[["beta", "alpha"]].tolist() == pytest.approx(np.sqrt(np.diag(covariance)).tolist())
        assert fit.curve.solo == pytest.approx(series.seconds[series.chunk == 0].item())
        assert fit.r_squared["mixed"] > 0.99
        assert np.isnan(fit.r_squared["decode_only"]), "one time has no variance"
        if decodes < 128 or gpu == "h100_sxm":
            assert fit.curve.alpha < fit.curve.solo or (model, gpu) == ("70B", "a100_sxm")


@recorded
def test_what_was_found_on_the_estimates():
    frame = read_iteration_times(ESTIMATES, model="70B", gpu="h100")
    fit = affine(frame[frame.decodes == 32], errors="absolute")
    assert (1e3 * fit.curve.alpha, 1e3 * fit.curve.solo) == pytest.approx((9.3, 17.1), abs=0.05)
    raw = affine(
        read_iteration_times(ESTIMATES, model="8B", gpu="h100").query("decodes == 8"), errors="absolute", physical=False
    )
    assert raw.worst["error"] == pytest.approx(-0.20, abs=0.01)
    assert raw.worst["chunk"] == 128, "lines are off at small chunks"


@recorded
@pytest.mark.parametrize(("decodes", "measured"), [(8, 11.9), (32, 15.1), (128, 25.3)])
def test_the_decode_only_time_grows_with_the_batch(decodes, measured):
    followed = fit_iteration_time(table(RTX, "kv_tokens <= 2048"), form="table").curve
    assert 1e3 * followed.decode_only(decodes, 1024) == pytest.approx(measured, abs=0.05)
    line = fit_iteration_time(table(RTX, "kv_tokens <= 2048"), form="linear").curve
    assert 1e3 * line.decode_only(decodes, 1024) == pytest.approx(measured, rel=0.05)


@recorded
def test_a_flat_decode_only_time_is_warned_about_with_where():
    cached = table(RTX, "kv_tokens == 1024 or decodes == 0")
    with pytest.warns(
        fo.ContentionWarning,
        match=r"flat decode-only time 13.36 ms is off by up to 66 %.*11.35 ms at 1 decode, 1024 KV tokens and 39.04 ms "
        r"at 256 decodes, 1024 KV tokens were measured\. Fit form='linear'",
    ):
        fit_iteration_time(cached, form="affine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_iteration_time(cached, form="linear")
        fit_iteration_time(cached.query("decodes <= 8"), form="affine")


@recorded
@pytest.mark.parametrize(
    ("model", "gpu", "parallel"), [("llama2", "a100", 4), ("llama2", "h100", 8), ("bloom", "h100", 8)]
)
def test_measured_lines_against_plain_least_squares(model, gpu, parallel):
    frame = read_iteration_times(SPLITWISE, model=model, gpu=gpu, tensor_parallel=parallel)
    fit = fit_iteration_time(frame, form="linear", physical=False)
    alone, mixed = frame[frame.chunk == 0], frame[frame.chunk > 0]
    design = np.column_stack([np.ones(len(alone)), alone.decodes, alone.decodes * alone.kv_tokens])
    found, residual, *_ = np.linalg.lstsq(design / alone.seconds.to_numpy()[:, None], np.ones(len(alone)))
    spread = np.linalg.inv(
        (design / alone.seconds.to_numpy()[:, None]).T @ (design / alone.seconds.to_numpy()[:, None])
    )
    solo = fit.coefficients.loc[["solo", "solo_per_decode", "solo_per_kv_token"]]
    assert solo["value"].to_numpy() == pytest.approx(found, rel=1e-6)
    assert solo["standard_error"].to_numpy() == pytest.approx(
        np.sqrt(residual / (len(alone) - 3) * np.diag(spread)), rel=1e-6
    )
    assert [fit.curve.beta, fit.curve.alpha] == pytest.approx(
        np.polyfit(mixed.chunk, mixed.seconds, 1, w=1 / mixed.seconds)
    )
    # Prefills were measured without decodes, so what decodes add to them is that of decodes alone.
    assert fit.curve.per_decode == fit.curve.solo_per_decode > 0
    assert fit.curve.per_kv_token == fit.curve.solo_per_kv_token > 0
    assert "the mixed times do not tell what a decode adds: taken from the decode-only times" in fit.notes


@recorded
def test_the_table_holds_what_was_measured():
    frame = table(RTX)
    fit = fit_iteration_time(frame, form="table", physical=False)
    assert abs(fit.worst["error"]) < 1e-12
    kept = fit_iteration_time(frame, form="table")
    faster = kept.measurements[kept.measurements["error"].abs() > 1e-12]
    assert len(faster) < 0.01 * len(frame)
    assert (faster["error"] > 0).all(), "only where a prefill was measured as faster than decodes alone"


# ---- tables with holes, and what they do not tell -----------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_a_table_with_holes_is_filled_by_what_surrounds_them(seed):
    """Times that are linear in everything are found again, whatever a third of the inner entries is left out."""
    exact, rng = lattice(), np.random.default_rng(seed)
    inner = exact.kv_tokens.eq(1024) & exact.decodes.gt(1) | exact.chunk.between(128, 512) & exact.decodes.eq(8)
    left = exact[~(inner & (rng.random(len(exact)) < 0.4))]
    curve = fit_iteration_time(left, form="table").curve
    assert isinstance(curve, TabulatedTime)
    assert curve.grid().times(exact.chunk, exact.decodes, exact.kv_tokens) == pytest.approx(
        exact.seconds.to_numpy(), rel=1e-9
    )


def test_what_the_measurements_do_not_tell_is_said():
    one = fit_iteration_time(lattice(cached=(1024,)), form="linear")
    assert one.curve.depends_on_kv is False
    assert one.curve.per_decode == pytest.approx(TRUE.per_decode + 1024 * TRUE.per_kv_token)
    assert "decode-only times are at one KV length only: what it adds is part of solo_per_decode" in one.notes
    single = fit_iteration_time(lattice(decodes=(8,)), form="linear")
    assert single.curve.decode_only(8, 1024) == pytest.approx(TRUE.decode_only(8, 1024))
    assert single.curve.mixed(256, 8, 1024) == pytest.approx(TRUE.mixed(256, 8, 1024))
    few = lattice(chunks=(64, 256), decodes=(1, 8), cached=(0,))
    fit = fit_iteration_time(few)
    assert fit.form == "linear"
    assert fit.notes[-1] == "too few levels to leave one out and compare forms: linear taken"
    # Times that fall to 0 with the decodes are no line's; the other forms still compete.
    steep = lattice(cached=(0,)).assign(seconds=lambda frame: 1e-3 * (frame.decodes + frame.chunk))
    assert fit_iteration_time(steep).form == "table"
    # Prefills beside 8 decodes only: those decodes are not counted twice.
    both = lattice()
    fit = fit_iteration_time(both[(both.chunk == 0) | (both.decodes == 8)], form="linear", physical=False)
    assert fit.curve.mixed(256, 8, 1024) == pytest.approx(TRUE.mixed(256, 8, 1024))
    assert fit.curve.per_decode == pytest.approx(TRUE.solo_per_decode)


def test_a_fit_prints_and_becomes_a_gpu_and_a_scenario():
    rng = np.random.default_rng(1)
    fit = fit_iteration_time(noisy(lattice(), 0.01, rng), form="linear")
    assert "linear curve through 72 measurements: R² 0.99" in fit.headline
    assert "solo_per_kv_token" in repr(fit)
    assert "<strong>Coefficients</strong>" in fit._repr_html_()
    assert "chosen" in repr(fit_iteration_time(noisy(lattice(), 0.01, rng)))
    gpu = fit.gpu(batch_size=32, chunk_size=256, kv_tokens=900, name="mine")
    assert gpu.modes()[0].iteration_time == fit.curve.mixed(256, 31, 900)
    data = fo.reference_model().scenario.to_dict()
    data["gpu"] |= tomllib.loads(fit.to_toml())["gpu"] | {"kv_tokens": 900}
    read = fo.Scenario.from_dict(data).gpu_types[0].curve
    assert read.mixed(256, 31, 900) == pytest.approx(fit.curve.mixed(256, 31, 900), rel=1e-5)
    assert "[gpu] must have kv_tokens" in fit.to_toml()
    assert json.loads(json.dumps(fit.to_dict()))["r_squared"]["mixed"] == fit.r_squared["mixed"]


@pytest.mark.parametrize("form", ["affine", "piecewise", "table"])
def test_the_lines_for_a_scenario_give_the_curve_back(form):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ContentionWarning)
        fit = fit_iteration_time(noisy(lattice(), 0.05, np.random.default_rng(2)), form=form)
    read = fo.GPU(tomllib.loads(fit.to_toml())["gpu"]["curve"], batch_size=16, chunk_size=256, kv_tokens=9).curve
    assert type(read) is type(fit.curve)
    for at in ((64, 1, 256), (512, 30, 900), (2000, 90, 4000)):
        assert read.mixed(*at) == pytest.approx(fit.curve.mixed(*at), rel=1e-4)
        assert read.decode_only(*at[1:]) == pytest.approx(fit.curve.decode_only(*at[1:]), rel=1e-4)


def test_the_figure_shows_measured_and_fitted_times():
    fit = fit_iteration_time(noisy(lattice(), 0.01, np.random.default_rng(1)), form="linear")
    figure = plot_fit(fit)
    times, alone, errors, _ = figure.axes
    line, points, *_ = times.lines
    at, shown = line.get_data()
    assert shown == pytest.approx([1e3 * fit.curve.mixed(chunk, 1, 1024) for chunk in at])
    measured = fit.measurements.query("decodes == 1 and kv_tokens == 1024 and chunk > 0")
    assert points.get_ydata() == pytest.approx(1e3 * measured["seconds"].to_numpy())
    assert len(errors.lines[1].get_xdata()) == (fit.measurements["chunk"] > 0).sum()
    assert [text.get_text() for text in alone.get_legend().get_texts()] == [
        f"{cached} KV tokens per decode" for cached in (256, 1024, 2048)
    ]
    picture = io.BytesIO()
    figure.savefig(picture)
    assert picture.tell() > 20_000
    with pytest.raises(fo.InvalidInput, match="fit must be what fit_iteration_time returns; got IterationTime"):
        plot_fit(fo.IterationTime(alpha=1, beta=1, solo=1))


# ---- fits that cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (lattice(), {"form": "cubic"}, r"form must be 'auto' or one of \['affine', 'linear', .*got 'cubic'"),
        (lattice(), {"errors": "log"}, "errors must be 'relative' or 'absolute'; got 'log'"),
        ([1, 2], {}, "frame must be a DataFrame, as from read_iteration_times; got list"),
        (lattice().drop(columns="decodes"), {}, "column 'decodes' is missing"),
        (lattice().query("chunk > 0"), {}, r"there is no decode-only measurement \(chunk 0\).*measure some"),
        (lattice(chunks=(64,)), {}, r"mixed times are measured at 1 chunk size\(s\)"),
        (lattice().query("chunk < 0"), {}, "the frame has no measurement"),
        (lattice().assign(seconds=0.0), {}, "seconds must be above 0; row 0 has"),
        (lattice().assign(decodes=-1), {}, "decodes must be a number of at least 0; row 0 has -1"),
        (lattice().assign(chunk="many"), {}, "chunk must be a number of at least 0; row 0 has many"),
        (
            lattice(cached=(0,)).assign(seconds=lambda frame: 1e-3 * (frame.decodes + frame.chunk)),
            {"form": "linear"},
            "form 'linear' does not fit these measurements: LinearTime: solo must be greater than 0.*form='table'",
        ),
        (lattice(), {"model": "8B"}, "model='8B' cannot be chosen: the table does not say the model"),
        (
            pd.concat([lattice().assign(gpu="a"), lattice().assign(gpu="b")]),
            {},
            "the frame holds 2 series; choose one of: gpu='a'; gpu='b'",
        ),
    ],
)  # fmt: skip
def test_a_fit_that_cannot_be(frame, options, message):
    with pytest.raises(fo.InvalidInput, match=f"fit_iteration_time: .*{message}"):
        fit_iteration_time(frame, **options)


# ---- what ships with the package ----------------------------------------------------------------------------------


@recorded
def test_the_embedded_curves_are_what_the_tables_give():
    """To the digits that the arithmetic of another machine leaves alone."""
    derived, embedded = derive_known_gpus(DATA), known_gpus()
    assert list(derived) == list(embedded.index)
    for name, entry in derived.items():
        assert {key: entry[key] for key in ("source", "licence", "kind", "form", "tensor_parallel")} == {
            key: embedded.loc[name, key] for key in ("source", "licence", "kind", "form", "tensor_parallel")
        }
        fresh = fo.GPU(entry["curve"], batch_size=1, chunk_size=1, kv_tokens=0).curve
        for at in ((128, 8, 500), (1024, 32, 2000)):
            assert embedded.loc[name, "curve"].mixed(*at) == pytest.approx(fresh.mixed(*at), rel=1e-4)


def test_known_gpus_say_what_they_are_worth():
    frame = known_gpus()
    assert len(frame) == 15
    assert frame[["source", "licence", "kind", "engine"]].notna().all().all()
    fitted = frame[frame["kind"] != "published fit"]
    assert fitted["worst_error"].abs().max() < 0.27
    assert frame["curve"].map(lambda curve: curve.depends_on_kv).tolist() == frame["read_at"].notna().tolist()
    assert frame.loc["qwen-8b/a100-sxm-40gb", "curve"] == fo.reference_model().scenario.gpu.curve


def test_a_known_gpu_plans_and_says_when_it_is_asked_too_much():
    gpu = known_gpu("llama-3.1-8b/rtx-pro-6000", batch_size=32, chunk_size=512, hourly_price=1.9)
    assert gpu.name == "llama-3.1-8b/rtx-pro-6000"
    assert gpu.kv_tokens == known_gpus().loc[gpu.name, "read_at"]
    classes = fo.azure_2023(abandonment_rate=0.05).scaled(0.2).classes
    plan = fo.FluidModel(classes, gpu, prices=fo.TokenPrices(prompt=0.1, output=0.2)).solve()
    assert plan.revenue_rate > 0
    with pytest.warns(
        fo.ContentionWarning,
        match=r"outside what was measured.*decodes 512 \(measured: 1 to 256\); kv_tokens 9000 \(measured: 16 to 2048\)",
    ):
        known_gpu("llama-3.1-8b/rtx-pro-6000", batch_size=512, chunk_size=512, kv_tokens=9000)
    with pytest.raises(fo.InvalidInput, match=r"known_gpu: name must be one of \['llama-3.1-8b/a100-sxm', "):
        known_gpu("gpt", batch_size=16, chunk_size=256)


# ---- the command --------------------------------------------------------------------------------------------------


def run(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "fluidopt", *words], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_the_command_fits_and_gives_the_lines_of_a_scenario(write, tmp_path):
    write(noisy(lattice(), 0.01, np.random.default_rng(4)).to_csv(index=False))
    done = run("fit", "times.csv", "--figure", "fit.png", "-o", "curve.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "linear       " in done.stdout
    assert "chosen" in done.stdout
    assert (tmp_path / "fit.png").stat().st_size > 20_000
    curve = tomllib.loads((tmp_path / "curve.toml").read_text())["gpu"]["curve"]
    data = json.loads(run("fit", "times.csv", "--form", "linear", "--json", cwd=tmp_path).stdout)
    assert data["curve"]["beta"] == pytest.approx(curve["beta"], rel=1e-5)
    shown = run("fit", "times.csv", "--form", "affine", "--longest-kv", "1024", cwd=tmp_path)
    assert 'form = "affine"' in shown.stdout
    assert "through 48 measurements" in shown.stdout
    assert "flat decode-only time" in shown.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none.csv",), "cannot be read"),
        (("times.csv", "--form", "cubic"), "form must be 'auto' or one of"),
        (("times.csv", "--figure", "fit.txt"), "--figure must end in .png, .svg or .pdf"),
        (("times.csv", "-o", "no/such/place.toml"), "cannot write"),
    ],
)
def test_the_command_refuses_in_one_line(write, tmp_path, words, message):
    write(lattice().to_csv(index=False))
    done = run("fit", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
