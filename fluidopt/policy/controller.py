"""A policy at work: told what happens in a fleet, it answers what to start where."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, cast

import numpy as np
from pydantic import Field, StrictInt, StrictStr

from fluidopt.errors import InvalidInput
from fluidopt.inputs import NonNegativeInt, dump, input_type, is_whole, parse
from fluidopt.policy.dispatch import (
    Choose,
    Decision,
    Dispatcher,
    Gpu,
    Request,
    RequestId,
    Stage,
    StartDecode,
    StartPrefill,
)
from fluidopt.policy.rules import Policy
from fluidopt.policy.selection import Pool
from fluidopt.simulation.fleet import fleet_system
from fluidopt.tables import shorten

__all__ = ["Controller", "Decision", "FleetGPU", "RequestId", "StartDecode", "StartPrefill"]

_NEXT: Mapping[Stage, str] = {
    Stage.PREFILL_QUEUE: "abandon",
    Stage.PREFILL: "prefill_done or abandon",
    Stage.DECODE_QUEUE: "abandon",
    Stage.DECODE: "decode_done or abandon",
}
"""The events that a request at a stage can meet."""


@dataclass(frozen=True, slots=True)
class FleetGPU:
    """A GPU of the fleet and the requests on it."""

    gpu: int
    """Its number."""
    role: str
    """Name of its role."""
    prefill: RequestId | None
    """The request in prefill, none if there is none."""
    decodes: tuple[RequestId, ...]
    """The requests in decode, in the order in which they started."""
    draining: bool
    """Whether it takes no more requests."""


@input_type
class SavedGPU:
    """A GPU of a saved controller."""

    number: NonNegativeInt
    _: KW_ONLY
    role: str
    draining: bool


@input_type
class SavedRequest:
    """A request of a saved controller; `place` as in `fluidopt.policy.dispatch.Request`."""

    name: StrictStr | StrictInt
    _: KW_ONLY
    class_name: str
    stage: Stage
    place: Annotated[int, Field(ge=-1)]


@input_type
class SavedController:
    """A controller as data; the requests in the order of their lines, the pools in theirs."""

    _: KW_ONLY
    policy: Policy
    next_gpu: NonNegativeInt
    gpus: tuple[SavedGPU, ...]
    requests: tuple[SavedRequest, ...]
    pools: tuple[tuple[NonNegativeInt, ...], ...]
    random: dict[str, Any]


class Controller:
    """A policy at work in a router: it is told of events and answers with what to start, and on which GPU.

    A request arrives, waits, is prefilled on a GPU, waits, is decoded on a GPU and leaves; first come, first served
    inside a class. Each event returns the decisions that follow, in the order in which they are made; the caller
    carries them out. GPUs are numbered from 0, role by role in the order of ``policy.roles``.
    The rules are those of the simulator, decision for decision, and one event costs a few microseconds, O(log I) in the
    number of classes and nothing that grows with the fleet. It needs no compiler, keeps no clock, and is not safe to
    call from two threads at once.

    Args:
        policy: the rules. Its targets are for ``policy.gpus`` GPUs, and stay when GPUs come and go.
        seed: for the random choices: which of several GPUs, which role's buffer, which class by weight. Of a
            `numpy.random.Generator` one number is taken. None draws a seed.
        choose: makes these choices instead: ``choose(kind, candidates, weights)`` returns an index into
            ``candidates``, at least two whole numbers in increasing order. Kinds are ``"prefill-gpu"`` and
            ``"decode-gpu"`` (the GPUs that the rules leave; ``weights`` is None: all alike), ``"side"`` (positions in
            ``policy.router.order`` with a share of the class) and ``"class"`` (positions in ``policy.scenario.classes``
            of the classes that wait and have a weight), with their weights. It is called in the middle of
            an event: after an error in it, go on from a saved state.

    Raises:
        InvalidInput: by every method, where the event cannot have happened; nothing has changed then.
    """

    def __init__(
        self, policy: Policy, *, seed: int | np.random.Generator | None = None, choose: Choose | None = None
    ) -> None:
        if not isinstance(policy, Policy):
            raise InvalidInput(f"Controller: policy must be a Policy (plan.policy(gpus=...)); got {policy!r}")
        if choose is not None and not callable(choose):
            raise InvalidInput(f"Controller: choose must be a function (kind, candidates, weights); got {choose!r}")
        self.policy = policy
        self._random = np.random.PCG64(_entropy(seed))
        self._fleet = Dispatcher(fleet_system(policy), rng=np.random.Generator(self._random), choose=choose)
        self._names = [each.name for each in policy.scenario.classes]
        self._label = {name: i for i, name in enumerate(self._names)}
        self._roles = [role.name for role in policy.roles]
        self._requests: dict[RequestId, Request] = {}

    # Events -------------------------------------------------------------------------------------------------------

    def arrive(self, request_id: RequestId, class_name: str) -> tuple[Decision, ...]:
        """A request of a class arrives.

        Args:
            request_id: a str or an int by which later events name it, unique among the requests present.
            class_name: one of the policy's classes.
        """
        if not _is_id(request_id):
            raise InvalidInput(f"Controller.arrive: request_id must be a str or an int; got {request_id!r}")
        present = self._requests.get(request_id)
        if present is not None:
            raise InvalidInput(
                f"Controller.arrive: request {request_id!r} is here already, {_whereabouts(present)}; use another "
                "request_id, or report first that it left"
            )
        label = self._label.get(class_name) if isinstance(class_name, str) else None
        if label is None:
            near = difflib.get_close_matches(str(class_name), self._names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {shorten(self._names)}"
            raise InvalidInput(f"Controller.arrive: class_name must be a class of the policy; got {class_name!r}{hint}")
        request = self._requests[request_id] = Request(request_id, label)
        self._fleet.arrive(request)
        return self._decided()

    def prefill_done(self, request_id: RequestId) -> tuple[Decision, ...]:
        """The prefill of a request is done, and its first token out."""
        self._fleet.finish_prefill(self._expect("prefill_done", request_id, Stage.PREFILL))
        return self._decided()

    def decode_done(self, request_id: RequestId) -> tuple[Decision, ...]:
        """The decode of a request is done, and the request leaves."""
        request = self._expect("decode_done", request_id, Stage.DECODE)
        del self._requests[request_id]
        self._fleet.finish_decode(request)
        return self._decided()

    def abandon(self, request_id: RequestId) -> tuple[Decision, ...]:
        """A request gives up and leaves. In the model only waiting ones do; one in service frees its slot at once."""
        request = self._expect("abandon", request_id, *Stage)
        del self._requests[request_id]
        self._fleet.abandon(request)
        return self._decided()

    # The fleet ----------------------------------------------------------------------------------------------------

    def add_gpu(self, role: str) -> tuple[int, tuple[Decision, ...]]:
        """A GPU joins in a role of the policy; returns its number, which nobody had before, and the decisions."""
        if role not in self._roles:
            raise InvalidInput(f"Controller.add_gpu: role must be one of {', '.join(self._roles)}; got {role!r}")
        gpu = self._fleet.add_gpu(self._roles.index(role))
        return gpu.number, self._decided()

    def drain_gpu(self, gpu: int) -> None:
        """A GPU takes no more requests and finishes those it has; where decodes stay on their GPU, a prefill's too."""
        self._fleet.drain_gpu(self._gpu("drain_gpu", gpu))

    def remove_gpu(self, gpu: int) -> tuple[RequestId, ...]:
        """A GPU is gone, drained or not; returns the requests lost with it, which are forgotten and may arrive again.

        Decodes that wait for a role of their own wait on when its last GPU goes; they can abandon and arrive again.
        """
        lost = self._fleet.remove_gpu(self._gpu("remove_gpu", gpu))
        for request in lost:
            del self._requests[request.name]
        return tuple(request.name for request in lost)

    # What is there ------------------------------------------------------------------------------------------------

    @property
    def gpus(self) -> tuple[FleetGPU, ...]:
        """Every GPU and the requests on it."""
        return tuple(
            FleetGPU(
                gpu.number,
                self._roles[gpu.role],
                None if gpu.prefill is None else gpu.prefill.name,
                tuple(gpu.decodes),
                not gpu.open,
            )
            for gpu in self._fleet.gpus.values()
        )

    @property
    def queues(self) -> dict[str, dict[str, tuple[RequestId, ...]]]:
        """The requests that wait, for ``"prefill"`` and for ``"decode"``, by class, first come first."""
        waiting = [request for line in self._fleet.lines() for request in line.values()]
        return self._by_class(waiting, prefill=Stage.PREFILL_QUEUE, decode=Stage.DECODE_QUEUE)

    @property
    def running(self) -> dict[str, dict[str, tuple[RequestId, ...]]]:
        """The requests in service, in ``"prefill"`` and in ``"decode"``, by class."""
        return self._by_class(list(self._in_service()), prefill=Stage.PREFILL, decode=Stage.DECODE)

    def _by_class(self, requests: list[Request], **stages: Stage) -> dict[str, dict[str, tuple[RequestId, ...]]]:
        found: dict[Stage, list[list[RequestId]]] = {stage: [[] for _ in self._names] for stage in stages.values()}
        for request in requests:
            found[request.stage][request.label].append(request.name)
        return {key: dict(zip(self._names, map(tuple, found[stage]), strict=True)) for key, stage in stages.items()}

    def __repr__(self) -> str:
        counts = dict.fromkeys(Stage, 0)
        for request in self._requests.values():
            counts[request.stage] += 1
        state = ", ".join(f"{count} {stage}" for stage, count in counts.items())
        return f"<Controller of {self.policy.title}: {len(self._fleet.gpus)} GPUs; {state}>"

    # Saving -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The whole state as JSON-able data, that of the random choices too; what `from_dict` makes goes on alike."""
        waiting = [request for line in self._fleet.lines() for request in line.values()]
        saved = SavedController(
            policy=self.policy,
            next_gpu=self._fleet.next_gpu,
            gpus=tuple(
                SavedGPU(gpu.number, role=self._roles[gpu.role], draining=not gpu.open)
                for gpu in self._fleet.gpus.values()
            ),
            requests=tuple(
                SavedRequest(
                    request.name,
                    class_name=self._names[request.label],
                    stage=request.stage,
                    place=request.place,
                )
                for request in (*waiting, *self._in_service())
            ),
            pools=tuple(tuple(pool.items) for pool in self._pools()),
            random=dict(self._random.state),
        )
        data: dict[str, Any] = dump(saved)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, choose: Choose | None = None) -> Controller:
        """Go on from a saved state.

        Args:
            data: what `to_dict` returned, also by way of JSON.
            choose: makes the random choices, as in `Controller`; it is not saved.

        Raises:
            InvalidInput: an entry is missing, breaks a rule or contradicts another.
        """
        saved = parse(SavedController, data)
        made = cls(saved.policy, seed=0, choose=choose)
        try:
            made._random.state = cast(Any, saved.random)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise _unsaved(f"random is not the state of a PCG64 generator ({error!r})") from None
        made._restore_gpus(saved)
        for each in saved.requests:
            made._restore(each)
        made._fleet.refresh()
        if not made._fleet.is_settled():
            raise _unsaved("requests: one waits although a GPU has a slot for it")
        pools = made._pools()
        if [sorted(items) for items in saved.pools] != [sorted(pool.items) for pool in pools]:
            raise _unsaved("pools must list the GPUs with a free decode slot by role, then the idle ones")
        for pool, items in zip(pools, saved.pools, strict=True):
            pool.arrange(list(items))
        return made

    def _restore_gpus(self, saved: SavedController) -> None:
        self._fleet.gpus.clear()
        for gpu in saved.gpus:
            if gpu.role not in self._roles:
                raise _unsaved(f"gpus: GPU {gpu.number} has the role {gpu.role!r}; there are {', '.join(self._roles)}")
            if gpu.number in self._fleet.gpus or gpu.number >= saved.next_gpu:
                raise _unsaved(f"gpus: numbers must differ and be below next_gpu = {saved.next_gpu}; got {gpu.number}")
            self._fleet.gpus[gpu.number] = Gpu(gpu.number, self._roles.index(gpu.role), open=not gpu.draining)
        self._fleet.next_gpu = saved.next_gpu

    def _restore(self, saved: SavedRequest) -> None:
        who = f"requests: {saved.name!r}"
        if saved.name in self._requests:
            raise _unsaved(f"{who} stands there twice")
        if saved.class_name not in self._label:
            raise _unsaved(f"{who} is of class {saved.class_name!r}; there are {shorten(self._names)}")
        request = Request(saved.name, self._label[saved.class_name], saved.stage, saved.place)
        if not self._fleet.restore(request):
            raise _unsaved(f"{who} cannot be {saved.stage} at place {saved.place}")
        self._requests[request.name] = request

    # ----------------------------------------------------------------------------------------------------------------

    def _pools(self) -> list[Pool]:
        return [*self._fleet.free, *self._fleet.idle]

    def _in_service(self) -> Iterator[Request]:
        for gpu in self._fleet.gpus.values():
            if gpu.prefill is not None:
                yield gpu.prefill
            yield from gpu.decodes.values()

    def _decided(self) -> tuple[Decision, ...]:
        """The decisions since the last call."""
        decisions = self._fleet.decisions
        if not decisions:
            return ()
        self._fleet.decisions = []
        return tuple(decisions)

    def _expect(self, event: str, request_id: RequestId, *stages: Stage) -> Request:
        """The request named, which must be at one of the stages."""
        request = self._requests.get(request_id) if _is_id(request_id) else None
        if request is None:
            raise InvalidInput(
                f"Controller.{event}: request_id must be of a request present; got {request_id!r}, which never arrived "
                "or has left; report its arrival first"
            )
        if request.stage not in stages:
            raise InvalidInput(
                f"Controller.{event}: request {request_id!r} is {_whereabouts(request)}; what can happen to it "
                f"now is {_NEXT[request.stage]}"
            )
        return request

    def _gpu(self, event: str, gpu: int) -> Gpu:
        found = self._fleet.gpus.get(gpu) if is_whole(gpu, least=0) else None
        if found is None:
            raise InvalidInput(
                f"Controller.{event}: gpu must be the number of a GPU of the fleet, of {len(self._fleet.gpus)} below "
                f"{self._fleet.next_gpu}; got {gpu!r}"
            )
        return found


def _is_id(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _whereabouts(request: Request) -> str:
    served = request.stage in (Stage.PREFILL, Stage.DECODE)
    return f"{request.stage} on GPU {request.place}" if served else str(request.stage)


def _entropy(seed: int | np.random.Generator | None) -> int | None:
    """The seed of a generator of the controller's own."""
    if seed is None:
        return None
    if isinstance(seed, np.random.Generator):
        return int(seed.integers(2**63))
    if is_whole(seed, least=0, most=2**128):
        return int(seed)
    raise InvalidInput(
        f"Controller: seed must be None, a whole number of at least 0 or a numpy Generator; got {seed!r}"
    )


def _unsaved(rule: str) -> InvalidInput:
    return InvalidInput(f"Controller.from_dict: {rule}; pass what to_dict returned")
