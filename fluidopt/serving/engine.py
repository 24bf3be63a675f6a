"""Engines as a replay runs them: one scheduler's settings, where they are read from, and a fleet of equal engines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fluidopt.contention import GPU
from fluidopt.curves import Curve
from fluidopt.errors import InvalidInput
from fluidopt.inputs import NonNegative, PositiveInt, input_type, is_whole


@input_type
class Engine:
    """The scheduler of one engine, by the names of vLLM's settings where it has them.

    In each iteration every running decode gets a token, then the prompt under way and after it waiting prompts, first
    come first served, share what is left of ``max_num_batched_tokens``, up to ``max_num_seqs`` running requests.
    """

    _: KW_ONLY
    max_num_seqs: PositiveInt
    """Requests in one iteration at most."""
    max_num_batched_tokens: PositiveInt
    """Tokens in one iteration at most, one for each decode and the rest for prompts; at least ``max_num_seqs``."""
    kv_blocks: PositiveInt | None = None
    """Blocks of the KV cache (vLLM: num_gpu_blocks, of which it uses all but one); none where memory never binds."""
    block_size: PositiveInt = 16
    """Tokens in one block."""
    enable_prefix_caching: bool = True
    """Whether a preempted request finds those of its blocks again that nobody has taken meanwhile."""
    reserve_full_prompt: bool = True
    """Whether a prompt starts only if all of it fits into free blocks (vLLM: scheduler_reserve_full_isl), not just its
    first chunk."""
    async_scheduling: bool = True
    """Whether an iteration is composed while the one before it runs, so that arrivals are seen, and the places of
    finished requests free, one iteration later."""
    cuda_graph_sizes: tuple[PositiveInt, ...] | None = None
    """Batch sizes that decode-only iterations are rounded up to; none for vLLM's own (1, 2, 4, multiples of 8 to 256,
    of 16 to 512, as far as twice ``max_num_seqs`` and ``max_num_batched_tokens``), empty for no rounding."""
    step_overhead: NonNegative = 0.0
    """Time that every iteration takes on top of its curve, s: scheduling, sampling, and what else a table of kernels
    leaves out."""

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidInput(
                f"max_num_batched_tokens must be at least max_num_seqs, a token for each decode; got "
                f"{self.max_num_batched_tokens} and {self.max_num_seqs}"
            )
        if self.kv_blocks == 1:
            raise InvalidInput("kv_blocks must be at least 2: one block is kept empty; got 1")

    @property
    def usable_blocks(self) -> int:
        """Blocks that requests can have; 0 for no limit."""
        return 0 if self.kv_blocks is None else self.kv_blocks - 1

    def padded(self) -> NDArray[np.int64]:
        """Decodes that a decode-only iteration computes for 0, 1, ..., ``max_num_seqs`` decodes."""
        sizes = self.cuda_graph_sizes
        if sizes is None:
            most = min(2 * self.max_num_seqs, 512)
            most = min(most, self.max_num_batched_tokens)
            sizes = tuple(each for each in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)) if each <= most)
        batch = np.arange(self.max_num_seqs + 1)
        captured = np.array(sorted(sizes), dtype=np.int64)
        place = np.searchsorted(captured, batch)
        rounded = captured[np.minimum(place, captured.size - 1)] if captured.size else batch
        return np.where((batch > 0) & (place < captured.size), rounded, batch)


def read_engine(path: str | os.PathLike[str]) -> Engine:
    """Read an engine's settings from a JSON file: vLLM's arguments, at the top level or under ``engine_kwargs``.

    ``num_gpu_blocks`` (or ``num_gpu_blocks_override``) and ``block_size`` are also found under ``kv_cache``. What says
    nothing about scheduling is not read.

    Raises:
        InvalidInput: the file cannot be read, lacks max_num_seqs or max_num_batched_tokens, or a setting breaks a rule.
    """
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"read_engine: cannot read {name!r}: {error}") from None
    if not isinstance(data, dict):
        raise InvalidInput(f"read_engine: {name!r} must hold a JSON object with the engine's settings")
    settings: dict[str, Any] = {}
    for part in (data.get("kv_cache"), data, data.get("engine_kwargs")):
        if isinstance(part, dict):
            settings |= {key: part[key] for key in _SETTINGS if part.get(key) is not None}
    for key in ("max_num_seqs", "max_num_batched_tokens"):
        if key not in settings:
            raise InvalidInput(f"read_engine: {name!r} has no {key}; add it, or write Engine({key}=...)")
    return Engine(**{_SETTINGS[key]: value for key, value in settings.items()})


_SETTINGS = {
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "num_gpu_blocks": "kv_blocks",
    "num_gpu_blocks_override": "kv_blocks",
    "block_size": "block_size",
    "enable_prefix_caching": "enable_prefix_caching",
    "async_scheduling": "async_scheduling",
    "scheduler_reserve_full_isl": "reserve_full_prompt",
}

Dispatch = Literal["least-requests", "round-robin"]


@input_type
class EngineFleet:
    """Equal engines behind a dispatcher that sends every request to one of them when it arrives."""

    engine: Engine
    """The scheduler on each GPU."""
    curve: Curve
    """What an iteration takes."""
    _: KW_ONLY
    gpus: PositiveInt = 1
    """Number of GPUs."""
    dispatch: Dispatch = "least-requests"
    """``"least-requests"``: to the GPU with the fewest requests that wait or run there; ``"round-robin"``: in turn."""

    @classmethod
    def like(cls, gpu: GPU, *, gpus: int = 1, dispatch: Dispatch = "least-requests", **settings: Any) -> EngineFleet:
        """Engines with the batch and chunk of a GPU type: B requests, C + B - 1 tokens; ``settings`` are `Engine`'s."""
        given = {
            "max_num_seqs": gpu.batch_size,
            "max_num_batched_tokens": gpu.chunk_size + gpu.batch_size - 1,
        } | settings
        return cls(Engine(**given), gpu.curve, gpus=gpus, dispatch=dispatch)


Memory = int | Mapping[str, int] | None
BLOCK = 16
"""Tokens of a KV block in a policy's fleet."""


def checked_tokens(value: Memory, types: list[str]) -> dict[str, int]:
    """KV-cache tokens of a GPU by type; 0 for no limit."""
    given = dict(value) if isinstance(value, Mapping) else dict.fromkeys(types, value)
    for name, tokens in given.items():
        if name not in types:
            raise InvalidInput(f"replay: kv_tokens names {name!r}, which is not a GPU type; there are {types}")
        if tokens is not None and not is_whole(tokens, least=BLOCK):
            raise InvalidInput(
                f"replay: kv_tokens must be a whole number of at least {BLOCK}, one block of the KV cache, or one by "
                f"GPU type; got {tokens!r}"
            )
    return {name: int(given.get(name) or 0) for name in types}
