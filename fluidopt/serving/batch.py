"""The compiled batch of one GPU and the blocks of KV that its requests own.

Free blocks are taken in the order in which they were freed (a preempted request frees its last one first), so a counter
of blocks freed and one of blocks taken tell which of a preempted request are left.
"""

from __future__ import annotations

from typing import Any

from fluidopt.serving.state import Fleet, State
from fluidopt.simulation.choices import NOBODY
from fluidopt.simulation.compilation import compiled


@compiled
def blocks_of(tokens: int, block: int) -> int:
    """Blocks that so many tokens fill."""
    return (tokens + block - 1) // block


@compiled
def put_back(role: Any, gpu: Any, request: Any) -> None:
    """Free the blocks of a request."""
    if role.blocks > 0:
        request.pushed = gpu.pushed
        request.cached = request.blocks
        gpu.pushed += request.blocks
        request.blocks = 0


@compiled
def _lift(state: State, g: int, at: int) -> None:
    """Restore the heap of the batch of GPU g after the entry at place ``at`` was replaced."""
    heap, requests, size = state.batch[g], state.requests, state.gpus[g].batch
    r = heap[at]
    key = requests[r].ends
    while at > 0 and requests[heap[(at - 1) >> 1]].ends > key:
        heap[at] = heap[(at - 1) >> 1]
        at = (at - 1) >> 1
    while True:
        child = 2 * at + 1
        if child + 1 < size and requests[heap[child + 1]].ends < requests[heap[child]].ends:
            child += 1
        if child >= size or requests[heap[child]].ends >= key:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = r


@compiled
def seat(fleet: Fleet, state: State, g: int, r: int) -> None:
    """Request r, prefilled, decodes on GPU g from this boundary on."""
    gpu, request, scalars = state.gpus[g], state.requests[r], state.scalars[0]
    role = fleet.roles[gpu.role]
    request.ends = gpu.steps + request.output - request.generated
    request.order = scalars.order
    scalars.order += 1
    gpu.kv += request.computed
    state.residues[g, (request.computed - gpu.steps) % role.block] += 1
    state.batch[g, gpu.batch] = r
    gpu.batch += 1
    _lift(state, g, gpu.batch - 1)


@compiled
def unseat(fleet: Fleet, state: State, g: int, at: int) -> int:
    """Take the decode at place ``at`` of the heap out of the batch of GPU g, its tokens and blocks up to date."""
    gpu = state.gpus[g]
    role = fleet.roles[gpu.role]
    r: int = state.batch[g, at]
    request = state.requests[r]
    request.generated = request.output - (request.ends - gpu.steps)
    request.computed = request.prompt + request.generated - 1
    gpu.kv -= request.computed
    state.residues[g, (request.computed - gpu.steps) % role.block] -= 1
    if role.blocks > 0:
        request.blocks = blocks_of(request.computed, role.block)
    gpu.batch -= 1
    if at < gpu.batch:
        state.batch[g, at] = state.batch[g, gpu.batch]
        _lift(state, g, at)
    return r


@compiled
def preempt(fleet: Fleet, state: State, g: int, r: int) -> None:
    """Request r, no more in the batch of GPU g, goes to the front of its queue."""
    gpu, request = state.gpus[g], state.requests[r]
    role = fleet.roles[gpu.role]
    put_back(role, gpu, request)
    request.whole = request.computed // role.block
    request.recomputed += request.computed
    request.computed = 0
    request.target = request.prompt + request.generated
    request.preemptions += 1
    gpu.preemptions += 1
    request.next = gpu.head
    gpu.head = r
    if gpu.tail < 0:
        gpu.tail = r


@compiled
def preempt_newest(fleet: Fleet, state: State, g: int) -> None:
    """Preempt the unfinished prompt of GPU g if it has one, else the newest of its decodes."""
    gpu = state.gpus[g]
    if gpu.partial >= 0:
        r = gpu.partial
        gpu.partial = NOBODY
        preempt(fleet, state, g, r)
        return
    newest = 0
    for at in range(1, gpu.batch):
        if state.requests[state.batch[g, at]].order > state.requests[state.batch[g, newest]].order:
            newest = at
    preempt(fleet, state, g, unseat(fleet, state, g, newest))


@compiled
def left_of(role: Any, popped: int, request: Any) -> int:
    """Full blocks of a preempted request still free when ``popped`` were taken; its last token is computed again."""
    if role.reuse == 0 or request.cached == 0:
        return 0
    left: int = request.cached - max(0, popped - request.pushed)
    full: int = min(request.whole, (request.target - 1) // role.block)
    return max(0, min(left, full))


@compiled
def reclaim(gpu: Any, request: Any, count: int) -> None:
    """Take back ``count`` of the blocks that a preempted request has left, from amid the free ones.

    The last one preempted comes first, so no other preempted request's blocks were freed after these.
    """
    gpu.pushed -= count
    request.blocks = count
    request.cached = 0


@compiled
def seat_joining(fleet: Fleet, state: State, g: int) -> None:
    """Seat the decodes that were sent to GPU g: those whose KV is there, and first come first served those it fits."""
    gpu = state.gpus[g]
    role = fleet.roles[gpu.role]
    r, last, full = gpu.joining_head, NOBODY, False
    while r >= 0:
        request = state.requests[r]
        following = request.next
        if role.blocks > 0 and request.blocks == 0:
            need = blocks_of(request.computed, role.block)
            # beside the blocks that it and the running decodes take in this iteration
            now = state.residues[g, -gpu.steps % role.block] + (request.computed % role.block == 0)
            full = full or need > gpu.pushed - gpu.popped - now
            if not full:
                gpu.popped += need
                request.blocks = need
        if role.blocks > 0 and request.blocks == 0:
            last = r
        else:
            if last >= 0:
                state.requests[last].next = following
            else:
                gpu.joining_head = following
            seat(fleet, state, g, r)
        r = following
    gpu.joining_tail = last
