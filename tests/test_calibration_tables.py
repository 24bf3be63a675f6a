"""Reading tables of measured iteration times: each layout against pandas, and broken cells named by file and line."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from recorded import DATA, recorded

import fluidopt as fo
from fluidopt.calibration import read_curves, read_iteration_times

ESTIMATES = DATA / "aiconfigurator" / "iteration_times_llama3.1.csv"
SPLITWISE = DATA / "splitwise" / "perf_model.csv"
RTX = DATA / "vllm-rtxpro6000" / "iteration_times.csv"
INFERNO = DATA / "llm-inferno" / "model-data.json"


@recorded
def test_the_estimates_against_pandas():
    raw, frame = pd.read_csv(ESTIMATES), read_iteration_times(ESTIMATES)
    mixed, alone = frame[frame.chunk > 0], frame[frame.chunk == 0]
    assert (len(mixed), len(alone)) == (len(raw), 20), "one decode-only time per series and batch"
    assert mixed.seconds.sum() == pytest.approx(raw.mix_step_ms.sum() / 1e3)
    once = raw.drop_duplicates(["model", "system", "decode_batch"])
    assert alone.seconds.sum() == pytest.approx(once.genonly_step_ms.sum() / 1e3)
    assert set(frame.kv_tokens) == {1024 + 256 / 2}
    assert set(frame.gpu) == {"a100_sxm", "h100_sxm"}
    assert set(frame.tensor_parallel) == {1, 4}


@recorded
def test_splitwise_against_pandas():
    raw, frame = pd.read_csv(SPLITWISE), read_iteration_times(SPLITWISE)
    capped = raw[raw.hardware.str.endswith("pcap")]
    full = raw[raw.hardware == "h100-80gb"]
    assert capped.prompt_time.to_numpy() == pytest.approx(1.3 * full.prompt_time.to_numpy()), "derived, so left out"
    raw = raw[~raw.hardware.str.endswith("pcap")]
    mixed, alone = frame[frame.chunk > 0], frame[frame.chunk == 0]
    assert len(mixed) == len(alone) == len(raw)
    assert mixed.seconds.to_numpy() == pytest.approx(raw.prompt_time.to_numpy() / 1e3)
    assert (mixed.chunk.to_numpy() == (raw.prompt_size * raw.batch_size).to_numpy()).all()
    assert (mixed.decodes == 0).all()
    assert alone.seconds.to_numpy() == pytest.approx(raw.token_time.to_numpy() / 1e3)
    assert (alone.kv_tokens.to_numpy() == (raw.prompt_size + raw.token_size / 2).to_numpy()).all()
    with pytest.raises(
        fo.InvalidInput, match=r"gpu='h100-80gb-pcap' is not in the table.*power-capped rows are derived"
    ):
        read_iteration_times(SPLITWISE, gpu="h100-80gb-pcap")


@recorded
def test_the_profile_against_pandas():
    raw, frame = pd.read_csv(RTX), read_iteration_times(RTX)
    assert list(frame) == ["chunk", "decodes", "kv_tokens", "seconds"]
    assert frame.seconds.to_numpy() == pytest.approx(raw.iteration_ms.to_numpy() / 1e3)
    assert (frame.chunk.to_numpy() == raw.prefill_chunk_tokens.to_numpy()).all()


@recorded
def test_published_coefficients_are_curves():
    curves = read_curves(INFERNO)
    raw = json.loads(INFERNO.read_text())["models"]
    assert len(curves) == len(raw) == 189
    entry = curves[(curves.model == "llama_70b") & (curves.gpu == "H100")].iloc[0]
    assert (entry.gpus, entry.max_batch_size, entry.at_tokens) == (4, 10, 512)
    # alpha 16.32, beta 0.421, gamma 0.01315625: base, per computed token, per cached token read, ms
    assert 1e3 * entry.curve.decode_only(8, 700) == pytest.approx(16.32 + 0.421 * 8 + 0.01315625 * 8 * 700)
    assert 1e3 * entry.curve.mixed(512, 8, 700) == pytest.approx(
        16.32 + 0.421 * (512 + 8) + 0.01315625 * (512 + 8 * 700)
    )


@pytest.fixture
def write(tmp_path):
    def write(text, name="times.csv"):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path / name

    return write


def test_a_plain_table_with_its_own_names_and_unit(write):
    path = write("\ufeffstep,n,tokens,card\n 12.5 ,8,0,a\n\n14,8,256,a\r\n30,0,512,a\n")
    columns = {"seconds": "step", "decodes": "n", "chunk": "tokens", "gpu": "card"}
    frame = read_iteration_times(path, columns=columns, unit="ms")
    assert frame.to_dict("list") == {
        "chunk": [0, 256, 512],
        "decodes": [8, 8, 0],
        "kv_tokens": [0, 0, 0],
        "seconds": pytest.approx([0.0125, 0.014, 0.03]),
        "gpu": ["a", "a", "a"],
    }
    path = write("chunk,decodes,kv_tokens,seconds,model,tensor_parallel\n0,4,900,0.01,m,2\n64,4,900,0.02,m,2\n")
    frame = read_iteration_times(path, model="m", tensor_parallel=2)
    assert frame.kv_tokens.tolist() == [900, 900]


def test_a_frame_survives_a_file(write):
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"chunk": rng.integers(1, 9, 50), "decodes": rng.integers(0, 9, 50), "kv_tokens": 7.5})
    frame = frame.assign(seconds=rng.random(50), gpu="a").astype({"chunk": float, "decodes": float})
    frame.loc[frame.decodes == 0, "kv_tokens"] = 0.0
    pd.testing.assert_frame_equal(read_iteration_times(write(frame.to_csv(index=False))), frame, check_dtype=False)


HEAD = "chunk,decodes,kv_tokens,seconds\n"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (HEAD + "0,1,9,0.01\n64,many,9,0.02\n", {}, "line 3: expected a number.*column decodes, found 'many'"),
        (HEAD + "0,1,9,0\n", {}, "line 2: expected a time above 0 in column seconds, found '0'"),
        (HEAD + "0,1,9,nan\n", {}, "line 2: expected a number of at least 0 in column seconds, found 'nan'"),
        (HEAD + "-1,1,9,0.1\n", {}, "line 2: expected a number of at least 0 in column chunk"),
        (HEAD + "0,0,9,0.1\n", {}, "line 2: chunk and decodes are both 0, so that nothing runs"),
        (HEAD + "0,1,9\n", {}, r"line 2: expected 4 cells \(chunk, decodes, kv_tokens, seconds\), found 3"),
        (HEAD + '0,1,"9,0.1\n', {}, "line 2: not comma-separated text"),
        (HEAD, {}, "no measurements below the header"),
        ("", {}, "the file is empty"),
        ("chunk,chunk\n1,2\n", {}, "line 1: a column name occurs twice"),
        ("batch,ms\n1,2\n", {}, "line 1: the table is not known: chunk, decodes, seconds missing.*columns={'chunk': "),
        (HEAD + "0,1,9,0.1\n", {"columns": {"chunks": "chunk"}}, r"columns has \['chunks'\]; its keys must be among"),
        (HEAD + "0,1,9,0.1\n", {"columns": {"chunk": "tokens"}}, "line 1: column 'tokens' is missing"),
        (HEAD + "0,1,9,0.1\n", {"unit": "min"}, "unit must be 's', 'ms' or 'us'; got 'min'"),
        (HEAD + "0,1,9,0.1\n", {"gpu": "h100"}, "gpu='h100' cannot be chosen: the table does not say the gpu"),
        (HEAD[:-1] + ",gpu\n0,1,9,0.1,\n", {}, "line 2: expected a name in column gpu, found nothing"),
        (HEAD[:-1] + ",gpu\n0,1,9,1,a1\n0,1,9,1,a2\n", {"gpu": "A"}, r"gpu='A' fits several: choose one"),
        (
            "prefill_chunk_tokens,decodes,kv_tokens_per_decode,iteration_ms\n0,1,16,fast\n",
            {},
            "line 2: expected a number of at least 0 in column iteration_ms, found 'fast'",
        ),
        ('{"models": []}', {}, "expected a CSV file, found JSON; published coefficients are read with read_curves"),
        (b"\xff\xfe\x00", {}, "cannot be read"),
    ],
)  # fmt: skip
def test_a_broken_table_is_named_by_file_and_line(write, text, options, message):
    with pytest.raises(fo.InvalidInput, match=f"times.csv.*{message}" if "unit" not in options else message):
        read_iteration_times(write(text), **options)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(fo.InvalidInput, match=r"read_iteration_times: .*cannot be read"):
        read_iteration_times(tmp_path / "none.csv")
    with pytest.raises(fo.InvalidInput, match="read_curves: path must be a file name; got 3"):
        read_curves(3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON with a list 'models'"),
        ('{"models": []}', "models must be a list of entries"),
        ('{"models": [{"name": "m"}]}', r"models\[0\]: expected name, acc, accCount.*KeyError"),
        (
            '{"models": [{"name": "m", "acc": "a", "accCount": 1, "maxBatchSize": 2, "atTokens": 3, '
            '"perfParms": {"alpha": -1, "beta": 1, "gamma": 1}}]}',
            r"models\[0\]: LinearTime: alpha must be at least 0",
        ),
    ],
)
def test_broken_coefficients_are_named(write, text, message):
    with pytest.raises(fo.InvalidInput, match=message):
        read_curves(write(text, "models.json"))
