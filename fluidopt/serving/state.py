"""What the compiled replay moves, as record arrays: the fleet, which does not change, and its state, which does."""

from __future__ import annotations

from typing import Any, NamedTuple

from fluidopt.simulation.compilation import record
from fluidopt.simulation.system import FloatArray, IntArray

GATE, ROUND_ROBIN, LEAST_REQUESTS = 0, 1, 2  # who sends requests to GPUs
NOT_YET, GAVE_UP = -1.0, -2.0  # in place of a time

CLASS = record(f8="slope base queue_target hold")
# takes: a prefill takes a decode slot; chunk: prefill tokens of an iteration, 0 for what the budget leaves beside the
# decodes; cap: requests in an iteration; prompts: of these, prompts; blocks: of KV, 0 without a limit; reuse: preempted
# requests find blocks again; lag: arrivals are seen, and places freed, one iteration late; reserve: a prompt starts
# only if all of it fits
ROLE = record(
    i8="first_gpu decode_slots slots prefills takes stays side curve chunk budget cap prompts blocks block reuse lag "
    "reserve",
    f8="overhead",
)
# since: boundary at which the stretch began; seen: arrivals until then are visible; steps: iterations done before it;
# kv: tokens in the cache of the batch then; planned: iterations of the stretch; chunk: prompt tokens in each, of them
# take of the unfinished prompt, partial; done: prompts that its only iteration completes; popped, pushed: blocks of KV
# ever taken from the free ones, and ever put there; late, owed: requests that ended at the last boundary and their
# blocks, which count as taken until the next
GPU = record(
    f8="since seen busy",
    i8="steps kv planned popped pushed owed prefill_tokens decode_tokens most_blocks most_tokens",
    i4="role decodes prefilling free_position idle_level idle_position batch chunk take partial done head tail "
    "joining_head joining_tail late open active outstanding preemptions",
)
REQUEST = record(
    f8="arrival patience started first finished",
    i8="pushed ends order recomputed",
    i4="prompt output kind computed target generated next previous tag gpu blocks cached whole preemptions",
)
LINE = record(i4="head tail")
TALLY = record(i8="prefilling")
WAITING = record(i8="count")
SCALARS = record(i8="arrival idle slack queued patient fcfs gate_first order mode turn events served")


class Fleet(NamedTuple):
    """What does not change."""

    classes: Any  # (I,) CLASS
    roles: Any  # (R,) ROLE
    router_order: IntArray  # (R,) by side
    first_role: IntArray  # (S + 1,)
    cumulative: FloatArray  # (S, I) probability that a decode goes to this side or one before
    weight: FloatArray  # (S, I)
    padded: IntArray  # (cap + 1,) decodes that an iteration without prompts computes for so many


class State(NamedTuple):
    """What does. Heaps are three arrays: keys by item, items in heap order, and the place of each item in it."""

    scalars: Any  # (1,) SCALARS
    gpus: Any  # (n,) GPU
    requests: Any  # (N,) REQUEST
    batch: IntArray  # (n, cap) running decodes of each GPU, a heap by REQUEST.ends
    residues: IntArray  # (n, block) see `fluidopt.serving.clock.growth`
    due: FloatArray  # (n,) next boundary of each GPU at which something changes
    due_order: IntArray
    due_place: IntArray
    load: FloatArray  # (n,) requests sent to each GPU and not done
    load_order: IntArray
    load_place: IntArray
    deadline: FloatArray  # (N,) at which waiting requests give up
    deadline_order: IntArray
    deadline_place: IntArray
    free_members: IntArray
    free_size: IntArray
    idle_members: IntArray
    idle_size: IntArray
    tallies: Any  # (I,) TALLY
    waiting: Any  # ((1 + S) * I,) WAITING, by tag
    lines: Any  # LINE, see `fluidopt.simulation.choices.line_of`
