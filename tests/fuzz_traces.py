"""Trace files of every format and tables of measurements, bent and broken, with options of their readers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from fuzz_inputs import NUMBERS, TEXTS, Case, mangled
from fuzz_scenarios import EXPRESSIONS, bent


def _rows(rng: Random) -> list[tuple[float, int, int]]:
    time, rows = 0.0, []
    for _ in range(rng.choice([1, 2, 5, 20])):
        time += rng.choice([0.0, 0.1, rng.expovariate(1.0)])
        rows.append((round(time, 6), rng.randint(1, 4000), rng.randint(1, 500)))
    return rows


def _csv(header: str, *lines: str) -> bytes:
    return "\n".join([header, *lines, ""]).encode()


def _json_lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _azure(rng: Random) -> bytes:
    zone = rng.choice(["", "", "+00:00", "Z"])
    lines = (f"2023-11-16 18:{int(at) // 60:02d}:{at % 60:010.7f}{zone},{p},{d}" for at, p, d in _rows(rng))
    return _csv("TIMESTAMP,ContextTokens,GeneratedTokens", *lines)


def _burstgpt(rng: Random) -> bytes:
    lines = (f"{at},{rng.choice(['ChatGPT', 'GPT-4'])},{p},{d},{p + d},API log" for at, p, d in _rows(rng))
    return _csv("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", *lines)


def _mooncake(rng: Random) -> bytes:
    return _json_lines(
        [
            {"timestamp": int(1000 * at), "input_length": p, "output_length": d, "hash_ids": [0, 1]}
            for at, p, d in _rows(rng)
        ]
    )


def _vllm_requests(rng: Random) -> bytes:
    return _json_lines(
        [
            {
                "arrival_time": at,
                "input_toks": p,
                "output_toks": d,
                "queued_ts": at + 100.001,
                "first_token_ts": at + 100.2,
                "last_token_ts": at + 101.5,
            }
            for at, p, d in _rows(rng)
        ]
    )


def _vllm_benchmark(rng: Random) -> bytes:
    rows = _rows(rng)
    result = {
        "request_throughput": 1.0,
        "input_lens": [p for _, p, _ in rows],
        "output_lens": [d for *_, d in rows],
        "start_times": [at for at, *_ in rows],
        "ttfts": [0.2] * len(rows),
        "itls": [[0.01, 0.02]] * len(rows),
        "errors": [""] * len(rows),
    }
    if rng.random() < 0.3:
        result = bent(result, rng, 1)
    return json.dumps(result).encode()


def _plain_csv(rng: Random) -> bytes:
    lines = (f"{at},{p},{d},{rng.choice('ab')},{at + 0.2:g},{at + 1:g}" for at, p, d in _rows(rng))
    return _csv("arrival_time,prompt_tokens,output_tokens,label,first_token_time,finish_time", *lines)


def _plain_json(rng: Random) -> bytes:
    records = [{"arrival_time": at, "prompt_tokens": p, "output_tokens": d, "label": "a"} for at, p, d in _rows(rng)]
    return _json_lines([bent(record, rng, 1) if rng.random() < 0.1 else record for record in records])


def _servegen(rng: Random) -> bytes:
    family = rng.choice(["Gamma", "Weibull", "Exponential"])
    return _csv(
        f"0,{rng.choice([0.0, 0.02, 1.0])},1.2,{family},0.7,2.0", "600,0.1,1.0,Exponential,1,1", "1200,0,0,,0,0"
    )


def _servegen_lengths(rng: Random) -> bytes:
    data = {"0": {"input_tokens": "{34: 0.25, 350: 0.75}", "output_tokens": "{1: 0.5, 70: 0.5}"}}
    if rng.random() < 0.3:
        data["0"]["input_tokens"] = rng.choice([*EXPRESSIONS[:7], "{0: 1}", "{1: -1}", "{" * 500, "{10**9: 1e9}", "[]"])
    return json.dumps(data if rng.random() < 0.8 else bent(data, rng, 1)).encode()


TRACES: dict[str, Callable[[Random], bytes]] = {
    "azure": _azure,
    "burstgpt": _burstgpt,
    "mooncake": _mooncake,
    "vllm-requests": _vllm_requests,
    "vllm-benchmark": _vllm_benchmark,
    "servegen": _servegen,
    "csv": _plain_csv,
    "jsonl": _plain_json,
}
TABLES: dict[str, Callable[[Random], bytes]] = {
    "plain": lambda rng: _csv(
        "chunk,decodes,kv_tokens,seconds",
        *(
            f"{chunk},{decodes},{kv},{0.01 + 5e-5 * chunk + 1e-4 * decodes * rng.uniform(0.9, 1.1):.6g}"
            for chunk in (0, 128, 512, 1024)[: rng.randint(1, 4)]
            for decodes, kv in ((1, 100), (8, 100), (16, 900))[: rng.randint(1, 3)]
        ),
    ),
    "aiconfigurator": lambda _: _csv(
        "model,system,tp,decode_batch,isl,osl,ctx_tokens_C,mix_step_ms,genonly_step_ms",
        *(
            f"q/m,h100,1,{b},{1000},{200},{c},{9 + c / 100 + b / 10},{8 + b / 10}"
            for b in (1, 8, 32)
            for c in (64, 512)
        ),
    ),
    "splitwise": lambda rng: _csv(
        "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel",
        *(
            f"m,{rng.choice(['a100', 'h100'])},{p},{b},128,{20 + p * b / 50},{30 + b},8"
            for p in (128, 512)
            for b in (1, 8)
        ),
    ),
    "profile": lambda rng: _csv(
        "prefill_chunk_tokens,decodes,kv_tokens_per_decode,iteration_ms",
        *(
            f"{c},{b},{k},{9 + c / 100 + b / 10}"
            for c in (0, 256)
            for b in (1, 8)
            for k in (10, 500)[: rng.randint(1, 2)]
        ),
    ),
    "curves": lambda rng: json.dumps(
        {
            "models": [
                {
                    "name": "m",
                    "acc": "A100",
                    "accCount": 1,
                    "maxBatchSize": 8,
                    "atTokens": 64,
                    "perfParms": {"alpha": 7.0, "beta": rng.choice([0.02, *NUMBERS]), "gamma": 1e-5},
                }
            ]
        }
    ).encode(),
}


def trace_case(rng: Random, seed: Case | None = None) -> Case:
    """A trace file of any format, or a table of measurements, with options."""
    if seed is not None:
        files = {
            name: mangled(content, rng, rng.choice(list(TRACES.values()))(rng)) if rng.random() < 0.8 else content
            for name, content in seed.files.items()
        }
        return replace(seed, files=files)
    if rng.random() < 0.25:
        name = rng.choice(list(TABLES))
        content = TABLES[name](rng)
        options = _options(rng, _TABLE_OPTIONS)
        return Case({"table.csv": mangled(content, rng) if rng.random() < 0.7 else content}, options)
    name = rng.choice(list(TRACES))
    content = TRACES[name](rng)
    if rng.random() < 0.7:
        content = mangled(content, rng, rng.choice(list(TRACES.values()))(rng))
    files = {"a-trace.csv": content}
    if name == "servegen":
        lengths = _servegen_lengths(rng)
        files["a-dataset.json"] = mangled(lengths, rng) if rng.random() < 0.3 else lengths
    return Case(files, _options(rng, _TRACE_OPTIONS))


def _options(rng: Random, options: dict[str, list[Any]]) -> tuple[tuple[str, Any], ...]:
    chosen = rng.sample(list(options), rng.choice([0, 0, 1, 2]))
    return tuple((name, rng.choice([*options[name], *options[name], *NUMBERS, *TEXTS])) for name in chosen)


_TRACE_OPTIONS: dict[str, list[Any]] = {
    "format": [*TRACES],
    "columns": [{"arrival_time": "Timestamp"}, {"prompt_tokens": "TIMESTAMP"}, {"label": "Log Type"}, {"x": "y"}, {}],
    "time_unit": ["s", "ms", "us", "ns"],
    "on_bad_line": ["skip", "skip", "skip", "error"],
    "label": ["a", ["a"], ["a", "b"]],
    "observation_time": [1.0, 1e4],
    "period": [(0, 600), (0.0, 1e-9), (600, 0), (0, math.inf)],
    "seed": [0, 1],
}
_TABLE_OPTIONS: dict[str, list[Any]] = {
    "model": ["m", "q/m"],
    "gpu": ["a100", "h100"],
    "tensor_parallel": [1, 8],
    "unit": ["s", "ms", "us"],
    "columns": [{"seconds": "iteration_ms"}, {"chunk": "decodes"}],
    "form": ["auto", "affine", "linear", "piecewise", "table"],
}
