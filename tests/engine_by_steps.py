"""An engine in plain Python that walks through every iteration and holds every block of KV by name: a second route."""

from __future__ import annotations

from collections import deque

import numpy as np


class BlockPool:
    """Free blocks in the order in which they were freed; a block remembers what it held until it is taken."""

    def __init__(self, blocks: int) -> None:
        self.free = deque(range(blocks))
        self.holds: dict[int, tuple[int, int]] = {}

    def take(self) -> int:
        block = self.free.popleft()
        self.holds.pop(block, None)
        return block

    def put(self, blocks: list[int]) -> None:
        self.free.extend(reversed(blocks))

    def find(self, request: int, place: int) -> int | None:
        return next((block for block, held in self.holds.items() if held == (request, place)), None)


def serve(trace, engine, grid):
    """First-token and finish times of each request, and how often each was preempted, on one engine."""
    arrival, prompt, output = trace.arrival_time, trace.prompt_tokens, trace.output_tokens
    count, size = len(trace), engine.block_size
    limited = engine.kv_blocks is not None
    pool = BlockPool(engine.usable_blocks)
    padded = engine.padded()
    owned: dict[int, list[int]] = {r: [] for r in range(count)}
    computed, generated, preempted = (np.zeros(count, dtype=int) for _ in range(3))
    first, finished = np.full(count, np.nan), np.full(count, np.nan)
    waiting: deque[int] = deque()
    running: list[int] = []
    reading: set[int] = set()
    upcoming, now, seen, late = 0, 0.0, 0.0, 0
    owed: list[list[int]] = []

    def give(r, tokens):
        """Blocks for that many tokens of request r; whether there were enough."""
        need = -(-tokens // size) - len(owned[r]) if limited else 0
        if need > len(pool.free):
            return False
        owned[r] += [pool.take() for _ in range(need)]
        return True

    def release(r):
        for place in range(computed[r] // size if limited else 0):
            pool.holds[owned[r][place]] = (r, place)
        pool.put(owned[r])
        owned[r] = []

    def preempt():
        r = running.pop()
        release(r)
        computed[r] = 0
        preempted[r] += 1
        waiting.appendleft(r)
        return r

    while np.isnan(finished).any():
        while upcoming < count and arrival[upcoming] <= (seen if engine.async_scheduling else now):
            waiting.append(upcoming)
            upcoming += 1
        if not waiting and not running:
            now = seen = max(now, arrival[upcoming])
            for blocks in owed:
                pool.put(blocks)
            owed, late = [], 0
            continue
        left, work, stopped = engine.max_num_batched_tokens, [], False
        for r in list(running):
            if r not in running:
                continue
            take = min(prompt[r] + generated[r] - computed[r], left)
            if take == 0:
                continue
            while not give(r, computed[r] + take):
                stopped = True
                gone = preempt()
                if any(gone == other for other, _ in work):
                    raise AssertionError("a request that had its token was preempted")
                if gone == r:
                    break
            if r in running:
                work.append((r, take))
                left -= take
        while waiting and not stopped and left > 0 and len(running) + late < engine.max_num_seqs:
            r = waiting[0]
            target = prompt[r] + generated[r]
            kept: list[int] = []
            if limited and engine.enable_prefix_caching:
                while (len(kept) + 1) * size < target and (block := pool.find(r, len(kept))) is not None:
                    kept.append(block)
            known = len(kept) * size
            take = min(target - known, left)
            room = len(pool.free)
            if limited and engine.reserve_full_prompt and -(-target // size) > room:
                break
            if limited and -(-(known + take) // size) > room:
                break
            for block in kept:
                pool.free.remove(block)
                pool.holds.pop(block)
            owned[r] = kept
            assert give(r, known + take)
            waiting.popleft()
            running.append(r)
            reading.add(r)
            computed[r] = known
            work.append((r, take))
            left -= take
        decodes = [r for r, _ in work if r not in reading]
        prompts = [(r, take) for r, take in work if r in reading]
        chunk = sum(take for _, take in prompts)
        for blocks in owed:
            pool.put(blocks)
        owed, late = [], 0
        if not work:  # nothing runs, so what the last iteration freed is there at once
            assert not running
            seen = now
            continue
        batch = len(decodes) if chunk else int(padded[len(decodes)])
        kv = float(np.mean([computed[r] for r in decodes])) if decodes else 0.0
        seen = now
        now += float(grid.times(chunk, batch, kv)) + engine.step_overhead
        for r, take in work:
            computed[r] += take
            if computed[r] < prompt[r] + generated[r]:
                continue
            generated[r] += 1
            reading.discard(r)
            if np.isnan(first[r]):
                first[r] = now
            if generated[r] == output[r]:
                finished[r] = now
                running.remove(r)
                if engine.async_scheduling:
                    late += 1
                    owed.append(owned[r])
                    owned[r] = []
                else:
                    release(r)
    return first, finished, preempted
