"""The compiled events of a replay: requests with known lengths through engines that work in iterations.

Each GPU runs an engine. At the boundary between two iterations it sees who came and who is done, and composes the next
iteration as vLLM's scheduler does: a token for every decode, then the prompt that is under way, then waiting prompts
first come first served, as long as the token budget, the cap on running requests and the KV cache allow; several
prompts can share an iteration, and at most the last of them stays unfinished. Where the running requests need more
blocks of KV than are free, the newest one is preempted: its blocks are freed, it goes back to the front of the engine's
queue, and its tokens are computed again, but for those blocks that nobody has taken meanwhile (see
`fluidopt.serving.batch`).

Between two boundaries at which anything changes an engine repeats one iteration, which `fluidopt.serving.clock` sums in
one go; such a *stretch* is cut short where a request is sent to the GPU. So the cost follows requests, not tokens.

Who is sent where is either a policy's gate and router, with the choices of `fluidopt.simulation.choices`, or a
dispatcher that puts every arrival into the queue of an engine at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fluidopt.serving.batch import blocks_of, left_of, preempt, preempt_newest, put_back, reclaim, seat_joining, unseat
from fluidopt.serving.clock import FOREVER, Curves, endurance, growth, walk
from fluidopt.serving.state import GATE, GAVE_UP, LEAST_REQUESTS, ROUND_ROBIN, Fleet, State
from fluidopt.simulation.choices import NOBODY, best_line, line_of, link, list_gpu, next_decode, route, sift, unlink
from fluidopt.simulation.compilation import compiled, compiled_apart

DONE, PAUSED = 0, 1  # why advance returned


# Lines -----------------------------------------------------------------------------------------------------------


@compiled
def _join(fleet: Fleet, state: State, r: int, tag: int, now: float) -> None:
    """Request r waits in a line of the policy."""
    scalars, request = state.scalars[0], state.requests[r]
    request.tag = tag
    link(state.lines[line_of(fleet, state, tag)], state.requests, r)
    scalars.queued += tag < fleet.classes.size
    state.waiting[tag].count += 1
    if request.patience < np.inf:
        state.deadline[r] = now + request.patience
        state.deadline_order[scalars.patient] = r
        scalars.patient += 1
        sift(state.deadline, state.deadline_order, state.deadline_place, scalars.patient, scalars.patient - 1)


@compiled
def _leave(fleet: Fleet, state: State, r: int, now: float) -> int:
    """Request r waits no more; returns its tag."""
    scalars, request = state.scalars[0], state.requests[r]
    tag: int = request.tag
    unlink(state.lines[line_of(fleet, state, tag)], state.requests, r)
    scalars.queued -= tag < fleet.classes.size
    state.waiting[tag].count -= 1
    if request.patience < np.inf:
        request.patience = state.deadline[r] - now
        scalars.patient -= 1
        at = state.deadline_place[r]
        if at < scalars.patient:
            state.deadline_order[at] = state.deadline_order[scalars.patient]
            sift(state.deadline, state.deadline_order, state.deadline_place, scalars.patient, at)
    return tag


# Sending requests to GPUs ----------------------------------------------------------------------------------------


@compiled
def _set_due(state: State, g: int, time: float) -> None:
    state.due[g] = time
    sift(state.due, state.due_order, state.due_place, state.due.size, state.due_place[g])


@compiled
def _mean_kv(gpu: Any) -> float:
    return gpu.kv / gpu.batch if gpu.batch > 0 else 0.0


@compiled
def _decodes(fleet: Fleet, gpu: Any) -> int:
    """Decodes that an iteration of the present stretch computes."""
    decodes: int = gpu.batch if gpu.chunk > 0 else fleet.padded[gpu.batch]
    return decodes


@compiled
def _interrupt(fleet: Fleet, state: State, curves: Curves, g: int, now: float) -> None:
    """Somebody waits at GPU g: end its stretch at the next boundary at which it looks."""
    gpu = state.gpus[g]
    if gpu.open == 1:
        return
    if gpu.active == 0:
        _set_due(state, g, now)
        return
    if gpu.planned == 1:
        return
    role = fleet.roles[gpu.role]
    steps, time = walk(
        curves, role.curve, gpu.chunk, _decodes(fleet, gpu), _mean_kv(gpu), role.overhead, gpu.planned, now - gpu.since
    )
    if role.lag == 1 and steps < gpu.planned:
        steps += 1
        steps, time = walk(
            curves, role.curve, gpu.chunk, _decodes(fleet, gpu), _mean_kv(gpu), role.overhead, steps, np.inf
        )
    if steps < gpu.planned:
        gpu.planned = steps
        _set_due(state, g, gpu.since + time)


@compiled
def _enqueue(fleet: Fleet, state: State, curves: Curves, g: int, r: int, now: float) -> None:
    """Request r joins the queue of the engine on GPU g."""
    gpu, request = state.gpus[g], state.requests[r]
    request.gpu, request.next = g, NOBODY
    if gpu.tail >= 0:
        state.requests[gpu.tail].next = r
    else:
        gpu.head = r
        _interrupt(fleet, state, curves, g, now)
    gpu.tail = r


@compiled
def _start_prefill(fleet: Fleet, state: State, curves: Curves, g: int, r: int, now: float) -> None:
    gpu = state.gpus[g]
    gpu.prefilling = 1
    state.scalars[0].slack -= fleet.roles[gpu.role].takes
    state.tallies[state.requests[r].kind].prefilling += 1
    _enqueue(fleet, state, curves, g, r, now)
    list_gpu(fleet, state, g)


@compiled
def _start_decode(fleet: Fleet, state: State, curves: Curves, g: int, r: int, now: float) -> None:
    """Send the prefilled request r to GPU g to decode; the caller lists the GPU again."""
    gpu, request = state.gpus[g], state.requests[r]
    gpu.decodes += 1
    request.gpu, request.next = g, NOBODY
    if gpu.joining_tail >= 0:
        state.requests[gpu.joining_tail].next = r
    else:
        gpu.joining_head = r
    gpu.joining_tail = r
    _interrupt(fleet, state, curves, g, now)


@compiled
def _gate(fleet: Fleet, state: State, curves: Curves, rng: np.random.Generator, now: float) -> None:
    """Admit while a GPU is idle and a prefill waits that is not held back."""
    while state.scalars[0].idle > 0:
        line = best_line(fleet, state)
        if line < 0:
            break
        level = 0
        while state.idle_size[level] == 0:
            level += 1
        g = state.idle_members[level, np.int64(rng.random() * state.idle_size[level])]
        r = state.lines[line].head
        _leave(fleet, state, r, now)
        _start_prefill(fleet, state, curves, g, r, now)


@compiled
def _fill_slots(fleet: Fleet, state: State, curves: Curves, rng: np.random.Generator, g: int, now: float) -> None:
    """Send waiting decodes to GPU g while it has a free slot, and list it."""
    gpu = state.gpus[g]
    role = fleet.roles[gpu.role]
    while gpu.decodes < role.decode_slots and gpu.decodes + gpu.prefilling < role.slots:
        r = next_decode(fleet, state, rng, role.side)
        if r < 0:
            break
        _leave(fleet, state, r, now)
        _start_decode(fleet, state, curves, g, r, now)
    list_gpu(fleet, state, g)


@compiled
def _place(fleet: Fleet, state: State, curves: Curves, rng: np.random.Generator, g: int, r: int, now: float) -> None:
    """Find a place for request r, whose prefill ended on GPU g."""
    request = state.requests[r]
    i = request.kind
    s = 0
    sides = fleet.cumulative.shape[0]
    if sides > 1:
        u = rng.random()
        while s < sides - 1 and u >= fleet.cumulative[s, i]:
            s += 1
    gpu = state.gpus[g]
    role = fleet.roles[gpu.role]
    target = g if role.stays == 1 else route(fleet, state, rng, s)
    if target != g:
        put_back(role, gpu, request)  # its KV goes with it
        request.cached = 0
    if target >= 0:
        _start_decode(fleet, state, curves, target, r, now)
        list_gpu(fleet, state, target)
    else:
        _join(fleet, state, r, (1 + s) * fleet.classes.size + i, now)


# Boundaries ------------------------------------------------------------------------------------------------------


@compiled
def _close_stretch(fleet: Fleet, state: State, curves: Curves, g: int, now: float) -> None:
    """Account for the iterations of the stretch that ends."""
    gpu = state.gpus[g]
    role = fleet.roles[gpu.role]
    if gpu.active == 0:
        gpu.seen = now
        return
    k = gpu.planned
    if k == 1:
        gpu.seen = gpu.since
    elif role.lag == 1:
        _, time = walk(curves, role.curve, gpu.chunk, _decodes(fleet, gpu), _mean_kv(gpu), role.overhead, k - 1, np.inf)
        gpu.seen = gpu.since + time
    gpu.busy += now - gpu.since
    gpu.prefill_tokens += k * gpu.chunk
    gpu.decode_tokens += k * gpu.batch
    if role.blocks > 0:
        gpu.popped += growth(state.residues[g], role.block, gpu.batch, gpu.steps, k)
    gpu.steps += k
    gpu.kv += k * gpu.batch
    tokens = gpu.kv
    if gpu.partial >= 0:
        request = state.requests[gpu.partial]
        request.computed += k * gpu.take
        tokens += request.computed
        if role.blocks > 0:
            blocks = blocks_of(request.computed, role.block)
            gpu.popped += blocks - request.blocks
            request.blocks = blocks
    gpu.most_tokens = max(gpu.most_tokens, tokens)
    gpu.pushed += gpu.owed
    gpu.owed = 0
    gpu.late = 0


@compiled
def _finish(fleet: Fleet, state: State, g: int, r: int, now: float) -> None:
    """Request r has all its tokens."""
    gpu, request = state.gpus[g], state.requests[r]
    role = fleet.roles[gpu.role]
    request.finished = now
    request.generated = request.output
    if role.lag == 1:
        gpu.late += 1
        if role.blocks > 0:
            gpu.owed += request.blocks
            request.blocks = 0
    else:
        put_back(role, gpu, request)
    scalars = state.scalars[0]
    scalars.served += 1
    if scalars.mode == LEAST_REQUESTS:
        state.load[g] -= 1
        sift(state.load, state.load_order, state.load_place, state.load.size, state.load_place[g])


@compiled
def _compose(fleet: Fleet, state: State, curves: Curves, g: int, now: float) -> None:
    """Compose the iteration that GPU g begins, and find how often it is repeated."""
    gpu = state.gpus[g]
    role = fleet.roles[gpu.role]
    limited = role.blocks > 0
    seat_joining(fleet, state, g)
    preempted = False
    reserved = 0
    if limited:
        reserved = state.residues[g, -gpu.steps % role.block]
        while gpu.pushed - gpu.popped < reserved:
            preempt_newest(fleet, state, g)
            preempted = True
            reserved = state.residues[g, -gpu.steps % role.block]
    left = role.chunk if role.chunk > 0 else role.budget - gpu.batch
    gpu.chunk = gpu.take = 0
    gpu.done = NOBODY
    prompts = 0
    if gpu.partial >= 0:
        r = gpu.partial
        request = state.requests[r]
        take = min(request.target - request.computed, left)
        if limited:
            need = blocks_of(request.computed + take, role.block) - request.blocks
            if need > gpu.pushed - gpu.popped - reserved:
                gpu.partial = NOBODY
                preempt(fleet, state, g, r)
                preempted = True
                take = 0
            else:
                gpu.popped += need
                request.blocks += need
        left -= take
        gpu.chunk += take
        if gpu.partial >= 0:
            prompts = 1
            if request.computed + take == request.target:
                gpu.partial = NOBODY
                request.computed = request.target
                request.next = NOBODY
                gpu.done = r
            else:
                gpu.take = take
    running = gpu.batch + prompts + gpu.late
    while gpu.head >= 0 and not preempted and left > 0 and running < role.cap and prompts < role.prompts:
        r = gpu.head
        request = state.requests[r]
        if role.lag == 1 and request.arrival > gpu.seen:
            break
        known = 0
        if limited:
            kept = left_of(role, gpu.popped + reserved, request)
            known = kept * role.block
            take = min(request.target - known, left)
            need = blocks_of(known + take, role.block)
            room = gpu.pushed - gpu.popped - reserved
            if need > room or (role.reserve == 1 and blocks_of(request.target, role.block) > room):
                break
            gpu.head = request.next
            if kept > 0:
                reclaim(gpu, request, kept)
            request.cached = 0
            gpu.popped += need - kept
            request.blocks = need
        else:
            take = min(request.target, left)
            gpu.head = request.next
        if gpu.head < 0:
            gpu.tail = NOBODY
        if request.started < 0.0:
            request.started = now
        if request.preemptions > 0:
            request.recomputed -= known
        left -= take
        gpu.chunk += take
        running += 1
        prompts += 1
        if known + take == request.target:
            request.computed = request.target
            request.next = gpu.done
            gpu.done = r
        else:
            request.computed = known
            gpu.partial = r
            gpu.take = take
    if limited:
        gpu.most_blocks = max(gpu.most_blocks, role.blocks - (gpu.pushed - gpu.popped))
    _set_stretch(fleet, state, curves, g, preempted, now)


@compiled
def _set_stretch(fleet: Fleet, state: State, curves: Curves, g: int, preempted: bool, now: float) -> None:
    """Find how often GPU g repeats the iteration it begins; after a preemption it admits again in the next one."""
    gpu = state.gpus[g]
    role = fleet.roles[gpu.role]
    gpu.since = now
    if gpu.batch == 0 and gpu.chunk == 0:
        gpu.active = 0
        gpu.pushed += gpu.owed  # nothing runs, so nothing is late any more, and all are seen
        gpu.owed = gpu.late = 0
        _set_due(state, g, now if gpu.head >= 0 or gpu.joining_head >= 0 else np.inf)
        return
    gpu.active = 1
    k = FOREVER
    unseen = role.lag == 1 and gpu.head >= 0 and state.requests[gpu.head].arrival > gpu.seen
    if gpu.done >= 0 or preempted or unseen or (gpu.head >= 0 and gpu.late > 0):
        k = 1
    elif gpu.partial >= 0:
        request = state.requests[gpu.partial]
        k = (request.target - request.computed - 1) // gpu.take
    if gpu.batch > 0:
        k = min(k, state.requests[state.batch[g, 0]].ends - gpu.steps)
    if role.blocks > 0 and k > 1:
        free = gpu.pushed - gpu.popped
        if gpu.owed > 0:
            k = 1
        elif gpu.partial < 0:
            k = min(k, endurance(state.residues[g], role.block, gpu.batch, gpu.steps, free))
        else:
            # The most iterations whose blocks are there, by halving; a prompt needs one more than its tokens at most.
            none, k = k + 1, 1
            while none - k > 1:
                middle = (k + none) >> 1
                need = growth(state.residues[g], role.block, gpu.batch, gpu.steps, middle)
                if need + blocks_of(middle * gpu.take, role.block) + 1 > free:
                    none = middle
                else:
                    k = middle
    gpu.planned = k
    _, time = walk(curves, role.curve, gpu.chunk, _decodes(fleet, gpu), _mean_kv(gpu), role.overhead, k, np.inf)
    _set_due(state, g, now + time)


@compiled
def _boundary(fleet: Fleet, state: State, curves: Curves, rng: np.random.Generator, g: int, now: float) -> None:
    """The stretch of GPU g ends: tokens come out, requests finish or move on, and the next iteration is composed."""
    gpu, scalars = state.gpus[g], state.scalars[0]
    gated = scalars.mode == GATE
    _close_stretch(fleet, state, curves, g, now)
    gpu.open = 1
    while gpu.batch > 0 and state.requests[state.batch[g, 0]].ends <= gpu.steps:
        r = unseat(fleet, state, g, 0)
        gpu.decodes -= 1
        scalars.slack += 1
        _finish(fleet, state, g, r, now)
    # Requests whose prompt is done, in the order in which they came.
    done = NOBODY
    r = gpu.done
    while r >= 0:
        following = state.requests[r].next
        state.requests[r].next = done
        done = r
        r = following
    gpu.done = NOBODY
    freed = NOBODY
    r = done
    while r >= 0:
        request = state.requests[r]
        following = request.next
        if request.first < 0.0:
            request.first = now
        request.generated += 1
        fresh = request.preemptions == 0 or request.generated == 1
        if gated and fresh:
            gpu.prefilling = 0
            scalars.slack += fleet.roles[gpu.role].takes
            state.tallies[request.kind].prefilling -= 1
        elif gated:
            gpu.decodes -= 1  # a recomputed decode keeps its slot: it is sent to its own GPU again below
        if request.generated >= request.output:
            _finish(fleet, state, g, r, now)
            if gated and not fresh:
                scalars.slack += 1
        elif gated and fresh:
            scalars.slack -= 1
            freed = r
        else:
            _start_decode(fleet, state, curves, g, r, now)
        r = following
    if gated:
        if scalars.gate_first == 1:
            list_gpu(fleet, state, g)
            _gate(fleet, state, curves, rng, now)
        if freed >= 0:
            list_gpu(fleet, state, g)
            _place(fleet, state, curves, rng, g, freed, now)
        _fill_slots(fleet, state, curves, rng, g, now)
        _gate(fleet, state, curves, rng, now)
    _compose(fleet, state, curves, g, now)
    gpu.open = 0


@compiled
def _arrive(fleet: Fleet, state: State, curves: Curves, rng: np.random.Generator, r: int, now: float) -> None:
    scalars = state.scalars[0]
    if scalars.mode == GATE:
        _join(fleet, state, r, state.requests[r].kind, now)
        _gate(fleet, state, curves, rng, now)
        return
    n = state.gpus.size
    if scalars.mode == ROUND_ROBIN:
        g = scalars.turn
        scalars.turn = (g + 1) % n
    else:
        g = state.load_order[0]
        state.load[g] += 1
        sift(state.load, state.load_order, state.load_place, n, 0)
    _enqueue(fleet, state, curves, g, r, now)


@compiled_apart
def advance(fleet: Fleet, state: State, curves: Curves, rng: np.random.Generator, most: int) -> int:
    """Run until nothing happens any more, or for ``most`` events."""
    scalars = state.scalars[0]
    for _ in range(most):
        arrival = state.requests[scalars.arrival].arrival if scalars.arrival < state.requests.size else np.inf
        boundary = state.due[state.due_order[0]]
        gives_up = state.deadline[state.deadline_order[0]] if scalars.patient > 0 else np.inf
        now = min(arrival, boundary, gives_up)
        if now == np.inf:
            return DONE
        if arrival <= now:
            r = scalars.arrival
            scalars.arrival += 1
            if state.requests[r].output > 0:  # those that fit on no GPU have none
                _arrive(fleet, state, curves, rng, r, now)
        elif boundary <= now:
            _boundary(fleet, state, curves, rng, state.due_order[0], now)
        else:
            r = state.deadline_order[0]
            tag = _leave(fleet, state, r, now)
            state.requests[r].finished = GAVE_UP
            if tag >= fleet.classes.size:
                scalars.slack += 1
                _gate(fleet, state, curves, rng, now)
        scalars.events += 1
    return PAUSED
