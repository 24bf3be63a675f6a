"""What a replication of the chain takes and gives: the fleet, its state and what was counted, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

UNIFORM, FEWEST_DECODES = 0, 1
"""Values of `System.placement`: which idle GPU starts a prefill."""


_DEFAULT: Any = None  # of an array whose shape the others give


def reject(parameter: str, caller: str, rule: str, value: object) -> ValueError:
    """The error for an argument that breaks a rule."""
    return ValueError(f"The {parameter!r} parameter of {caller} must be {rule}. Got {value!r} instead.")


@dataclass(frozen=True, eq=False, kw_only=True)
class System:
    """Everything the chain of the n-GPU system needs, as arrays; rates are totals of the fleet, not per GPU.

    I classes, K modes, R roles. A role is a group of GPUs with the same two modes and the same caps. The partition of
    [L26], section 4.1, is the roles mixed (`decode_slots` B-1, `slots` B) and solo (B and B, no prefill mode).

    Attributes:
        arrival_rate: (I,) requests/s.
        prompt_tokens, output_tokens: (I,) mean prompt tokens P_i and mean decode iterations D_i, > 0.
        abandonment_rate: (I,) theta_i, 1/s, in either queue; 0 means infinitely patient.
        mode_chunk: (K,) prefill tokens per iteration, 0 for a mode without prefill.
        mode_time: (K,) iteration time, s; nan for an idle mode, which has no iteration.
        role_gpus: (R,) GPUs of the role.
        role_prefill_mode: (R,) mode while a prefill runs, -1 where the role never prefills.
        role_rest_mode: (R,) mode while none runs: decode only, or idle.
        role_decode_slots: (R,) cap on the decodes of one GPU.
        role_slots: (R,) cap on decodes plus prefill of one GPU.
        gate_slope, gate_base, gate_queue_target: (I,) the gate admits the waiting class with the least
            gate_base + gate_slope X_i, X_i the class's prefills in service; ties by the largest
            Q_p,i - gate_queue_target_i, then by the lowest index. The occupancy gate of [L26], section 4.1, is slope
            1/x_i, base 0 (x_i = 0: slope 0 and a base above every other key); prioritize-and-route, section 4.2.1, is
            slope 0, base -D_i/P_i.
        gate_hold: (I,) class i is admitted only while the decode backlog of the fleet (decodes waiting less free decode
            slots) is below -gate_hold_i; -inf, the default, admits it always. Needs class queues.
        gate_fcfs: the gate admits whoever came first, of whatever class; the keys above then have no meaning.
        gate_first: of a slot that gets free, the gate decides before the decodes that wait do.
        role_stays: (R,) 1 where a request is decoded in the slot that prefilled it, which then is both (`role_slots` at
            most `role_decode_slots`); default 0.
        role_side: (R,) side of the role, default 0. Each of the S sides has its own decode buffer and serves only it.
        side_share: (S, I) probability that a decode of class i goes to the side; one side by default.
        side_weight: (S, I) a free slot picks among the waiting classes of its side with probabilities in proportion;
            classes of weight 0 wait in one FCFS line that comes after these. Default 0: plain FCFS.
        router_order: (R,) roles in order of preference for a decode within its side, each once.
        placement: 0 puts a prefill on a uniformly chosen idle GPU, 1 on one with the fewest decodes, uniform among
            these.
        prefill_reward, decode_reward: (I,) money for a completed prefill and for a completed decode: (0, w_i) if
            charging is bundled, (c_p P_i, c_d D_i) if separate.

    Raises:
        ValueError: naming the field, the rule and the value.
    """

    arrival_rate: FloatArray
    prompt_tokens: FloatArray
    output_tokens: FloatArray
    abandonment_rate: FloatArray
    mode_chunk: FloatArray
    mode_time: FloatArray
    role_gpus: IntArray
    role_prefill_mode: IntArray
    role_rest_mode: IntArray
    role_decode_slots: IntArray
    role_slots: IntArray
    gate_slope: FloatArray
    gate_base: FloatArray
    gate_queue_target: FloatArray
    router_order: IntArray
    placement: int
    prefill_reward: FloatArray
    decode_reward: FloatArray
    gate_hold: FloatArray = field(default=_DEFAULT)
    gate_fcfs: bool = False
    gate_first: bool = False
    role_stays: IntArray = field(default=_DEFAULT)
    role_side: IntArray = field(default=_DEFAULT)
    side_share: FloatArray = field(default=_DEFAULT)
    side_weight: FloatArray = field(default=_DEFAULT)

    def __post_init__(self) -> None:
        self._fill_defaults()
        sizes = {
            "mode": np.size(self.mode_chunk),
            "role": np.size(self.role_gpus),
            "class": np.size(self.arrival_rate),
        }
        for each in fields(self):
            if each.name in ("placement", "gate_fcfs", "gate_first"):
                continue
            kind = each.name.partition("_")[0]
            size = sizes["role" if kind == "router" else kind if kind in sizes else "class"]
            shape = (self.side_share.shape[0], size) if kind == "side" else (size,)
            array = _checked_array(each.name, getattr(self, each.name), shape, integral=kind in ("role", "router"))
            object.__setattr__(self, each.name, array)
        for label, size in sizes.items():
            if size == 0:
                raise ValueError(f"System needs at least one {label}. Got none.")
        if self.placement not in (UNIFORM, FEWEST_DECODES):
            raise reject("placement", "System", "0 (uniform) or 1 (fewest decodes)", self.placement)
        self._check_rates()
        self._check_roles()
        self._check_policy()

    def _fill_defaults(self) -> None:
        classes, roles = np.size(self.arrival_rate), np.size(self.role_gpus)
        defaults = {
            "gate_hold": np.full(classes, -np.inf),
            "role_stays": np.zeros(roles, dtype=np.int64),
            "role_side": np.zeros(roles, dtype=np.int64),
            "side_share": np.ones((1, classes)),
        }
        for name, value in defaults.items():
            if getattr(self, name) is _DEFAULT:
                object.__setattr__(self, name, value)
        if np.ndim(self.side_share) != 2:
            raise reject("side_share", "System", "an array of shape (sides, classes)", self.side_share)
        if self.side_weight is _DEFAULT:
            object.__setattr__(self, "side_weight", np.zeros(np.shape(self.side_share)))

    def _check_rates(self) -> None:
        for name in ("arrival_rate", "abandonment_rate", "mode_chunk"):
            _check_each(name, getattr(self, name), lambda a: a >= 0, ">= 0")
        for name in ("prompt_tokens", "output_tokens"):
            _check_each(name, getattr(self, name), lambda a: a > 0, "> 0")
        _check_each("mode_time", self.mode_time, lambda a: np.isnan(a) | (a > 0), "> 0, or nan for an idle mode")

    def _check_roles(self) -> None:
        modes = self.mode_chunk.size
        iterates = np.isfinite(self.mode_time)
        _check_each("role_gpus", self.role_gpus, lambda a: a >= 0, ">= 0")
        if not 0 < self.role_gpus.sum() < 2**31:
            raise reject("role_gpus", "System", "between 1 and 2**31 - 1 GPUs in total", self.role_gpus.sum())
        if self.role_gpus.size * self.arrival_rate.size >= 2**30:
            raise ValueError("System allows fewer than 2**30 pairs of a role and a class.")
        _check_each("role_decode_slots", self.role_decode_slots, lambda a: (a >= 0) & (a < 2**31), ">= 0")
        _check_each("role_prefill_mode", self.role_prefill_mode, lambda a: (a >= -1) & (a < modes), "a mode or -1")
        _check_each("role_rest_mode", self.role_rest_mode, lambda a: (a >= 0) & (a < modes), "a mode")
        prefills = self.role_prefill_mode >= 0
        lowest = np.maximum(self.role_decode_slots, prefills)
        _check_each(
            "role_slots",
            self.role_slots,
            lambda a: (a >= lowest) & (a < 2**31),
            "at least role_decode_slots, and at least 1 where the role prefills",
        )
        chosen = self.role_prefill_mode[prefills]
        if not np.all(iterates[chosen] & (self.mode_chunk[chosen] > 0)):
            raise reject("role_prefill_mode", "System", "a mode with a chunk and an iteration time", chosen)
        if np.any(self.mode_chunk[self.role_rest_mode] > 0):
            raise reject("role_rest_mode", "System", "a mode without a prefill chunk", self.role_rest_mode)
        if np.any((self.role_decode_slots > 0) & ~iterates[self.role_rest_mode]):
            rule = "a mode with an iteration time where role_decode_slots > 0"
            raise reject("role_rest_mode", "System", rule, self.role_rest_mode)
        if not np.array_equal(np.sort(self.router_order), np.arange(self.role_gpus.size)):
            raise reject("router_order", "System", "each role once", self.router_order)

    def _check_policy(self) -> None:
        for name in ("gate_fcfs", "gate_first"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise reject(name, "System", "true or false", getattr(self, name))
        if self.gate_fcfs and np.any(self.gate_hold > -np.inf):
            raise reject("gate_hold", "System", "-inf where gate_fcfs is true", self.gate_hold)
        _check_each("role_stays", self.role_stays, lambda a: (a == 0) | (a == 1), "0 or 1")
        stays = self.role_stays == 1
        if np.any(self.role_slots[stays] > self.role_decode_slots[stays]):
            raise reject("role_slots", "System", "at most role_decode_slots where role_stays is 1", self.role_slots)
        if self.gate_first and np.any(stays):
            raise reject("gate_first", "System", "false where role_stays is 1", self.gate_first)
        sides = self.sides
        _check_each("role_side", self.role_side, lambda a: (a >= 0) & (a < sides), f"a side, 0 to {sides - 1}")
        for name in ("side_share", "side_weight"):
            _check_each(name, getattr(self, name), lambda a: a >= 0, ">= 0")
        total = self.side_share.sum(axis=0)
        if not np.all(np.abs(total - 1) < 1e-9):
            raise reject("side_share", "System", "shares that add up to 1 for each class", total)
        if sides > 1:
            slots = np.bincount(self.role_side, self.role_gpus * self.role_decode_slots, minlength=sides)
            closed = np.flatnonzero((slots == 0) & np.any(self.side_share > 0, axis=1))
            if closed.size:
                rule = f"0 for side {closed[0]}, which has no decode slot"
                raise reject("side_share", "System", rule, self.side_share[closed[0]])

    @property
    def sides(self) -> int:
        """Number of sides S, groups of roles with a decode buffer of their own."""
        return len(self.side_share)

    @property
    def classes(self) -> int:
        """Number of classes I."""
        return self.arrival_rate.size

    @property
    def roles(self) -> int:
        """Number of roles R."""
        return self.role_gpus.size

    @property
    def gpus(self) -> int:
        """Number of GPUs n."""
        return int(self.role_gpus.sum())

    def routing(self) -> tuple[IntArray, IntArray, FloatArray]:
        """How a decode finds its role: roles by side and preference, (R,), where each side begins, (S + 1,), and the
        probability that a class's decode goes to a side or one before it, (S, I)."""
        cumulative = np.cumsum(self.side_share, axis=0)
        last = self.sides - 1 - np.argmax(self.side_share[::-1] > 0, axis=0)
        cumulative[np.arange(self.sides)[:, None] >= last] = 2.0  # rounding must not reach beyond the last share
        order = self.router_order[np.argsort(self.role_side[self.router_order], kind="stable")]
        first = np.concatenate([[0], np.cumsum(np.bincount(self.role_side, minlength=self.sides))])
        return order, first.astype(np.int64), cumulative

    def prefill_rates(self) -> FloatArray:
        """Completion rates mu_p of a prefill, (R, I), 1/s, [L26] eq. (4); 0 where the role never prefills."""
        mode = self.role_prefill_mode
        speed = np.where(mode >= 0, self.mode_chunk[mode] / self.mode_time[mode], 0.0)
        return speed[:, None] / self.prompt_tokens

    def decode_speeds(self) -> FloatArray:
        """Iterations/s of each role, (R, 2): while no prefill runs and while one does; 0 where there is none."""
        rest = np.nan_to_num(1.0 / self.mode_time[self.role_rest_mode])
        mode = self.role_prefill_mode
        return np.stack([rest, np.where(mode >= 0, np.nan_to_num(1.0 / self.mode_time[mode]), 0.0)], axis=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Start:
    """A state of the fleet as counts of requests: (I,) in the two queues, (R, I) in service in each role.

    A replication starts from one, spreading the requests of a role over its GPUs as evenly as the caps allow, mixing
    the classes evenly along the queues and dividing the decode queue over the sides by `System.side_share`; it reports
    the states its window opened and closed in as the same type.
    """

    prefill_queue: IntArray
    decode_queue: IntArray
    prefill: IntArray
    decode: IntArray

    @classmethod
    def empty(cls, system: System) -> Start:
        """The empty fleet."""
        queue = np.zeros(system.classes, dtype=np.int64)
        service = np.zeros((system.roles, system.classes), dtype=np.int64)
        return cls(prefill_queue=queue, decode_queue=queue, prefill=service, decode=service)

    def __post_init__(self) -> None:
        shape = np.shape(self.prefill)
        if len(shape) != 2:
            raise reject("prefill", "Start", "an array of shape (roles, classes)", self.prefill)
        for each in fields(self):
            expected = shape[1:] if each.name.endswith("queue") else shape
            counts = _checked_array(each.name, getattr(self, each.name), expected, integral=True, caller="Start")
            _check_each(each.name, counts, lambda a: a >= 0, ">= 0", caller="Start")
            object.__setattr__(self, each.name, counts)


@dataclass(frozen=True, eq=False, kw_only=True)
class Trajectory:
    """The state at equally spaced times: `time` (m,), queues (m, I), requests in service (m, R, I)."""

    time: FloatArray
    prefill_queue: IntArray
    decode_queue: IntArray
    prefill: IntArray
    decode: IntArray

    @classmethod
    def of(cls, time: FloatArray, states: Sequence[Start]) -> Trajectory:
        """From the states at the times."""
        columns = {each.name: np.stack([getattr(state, each.name) for state in states]) for each in fields(Start)}
        return cls(time=time[: len(states)], **columns)


@dataclass(frozen=True, eq=False, kw_only=True)
class Totals:
    """What was seen in a window of time, as sums over the fleet; with leading axes, in each of several windows.

    Attributes:
        window: length of the window, s.
        arrivals, prefill_completions, decode_completions, abandoned_prefill, abandoned_decode: (I,) counts.
        prefill_starts, decode_starts: (R, I) counts.
        prefill_queue_time, decode_queue_time: (I,) request-seconds spent waiting.
        prefill_time, decode_time: (R, I) request-seconds spent in service.
        expected_tokens: integral of the decode iterations per second over all requests, given the state.
        reward: money earned by the completions counted.
        expected_reward: integral of the reward rate given the state (prefills in service at their rate times their
            reward, decodes likewise at the speed of their GPU's present mode). Its difference from `reward` has mean 0
            over any window. Neither always varies less: with scarce slots the expected one is nearly constant, with
            ample ones it has up to twice the variance (it measures service times).
        events: arrivals, completions and abandonments, the transitions of the chain.
        null_draws: draws rejected by the thinning, the overhead of the method.
        waits: (2, R, I, bins) waits above 0 that ended in the start of a prefill or of a decode, by length (see
            `fluidopt.simulation.waits`); None unless asked for.
    """

    window: FloatArray
    arrivals: IntArray
    prefill_starts: IntArray
    prefill_completions: IntArray
    decode_starts: IntArray
    decode_completions: IntArray
    abandoned_prefill: IntArray
    abandoned_decode: IntArray
    prefill_queue_time: FloatArray
    decode_queue_time: FloatArray
    prefill_time: FloatArray
    decode_time: FloatArray
    expected_tokens: FloatArray
    reward: FloatArray
    expected_reward: FloatArray
    events: IntArray
    null_draws: IntArray
    waits: IntArray | None

    def map(self, function: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Totals:
        """Each of the arrays through `function`, which works on the leading axes."""
        present: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(Totals)}
        mapped: dict[str, Any] = {name: None if array is None else function(array) for name, array in present.items()}
        return Totals(**mapped)

    @classmethod
    def stack(cls, windows: Sequence[Totals]) -> Totals:
        """Several windows as one, along a new first axis."""
        return cls._combine(np.stack, windows)

    @classmethod
    def join(cls, first: Totals, second: Totals) -> Totals:
        """The segments (second axis) of both."""
        return cls._combine(partial(np.concatenate, axis=1), (first, second))

    @classmethod
    def _combine(cls, function: Callable[..., npt.NDArray[Any]], windows: Sequence[Totals]) -> Totals:
        columns = {each.name: [getattr(window, each.name) for window in windows] for each in fields(Totals)}
        combined: dict[str, Any] = {
            name: None if column[0] is None else function(column) for name, column in columns.items()
        }
        return Totals(**combined)


@dataclass(frozen=True, eq=False, kw_only=True)
class Replication(Totals):
    """What one replication saw in its window [warmup, horizon].

    Per class and per stage the flows balance exactly, for example
    arrivals = prefill_starts + abandoned_prefill + at_end.prefill_queue - at_start.prefill_queue.

    Attributes:
        at_start, at_end: the states in which the window opened and closed.
        most_decodes, most_requests: (R,) most decodes, and most decodes plus prefill, ever on one GPU of the
            role, warm-up included.
        trajectory: the state at `samples` times, None unless asked for.
    """

    at_start: Start
    at_end: Start
    most_decodes: IntArray
    most_requests: IntArray
    trajectory: Trajectory | None

    @property
    def prefilling_gpu_time(self) -> FloatArray:
        """GPU-seconds with a prefill running, (R,); a GPU runs at most one, so this is `prefill_time` over classes."""
        return cast(FloatArray, self.prefill_time.sum(axis=1))


def _checked_array(
    name: str, value: object, shape: tuple[int, ...], *, integral: bool, caller: str = "System"
) -> npt.NDArray[Any]:
    array = np.array(value)
    if array.shape != shape:
        raise reject(name, caller, f"an array of shape {shape}", array.shape)
    if array.dtype.kind not in ("iu" if integral else "iuf"):
        raise reject(name, caller, "an array of integers" if integral else "an array of numbers", array.dtype.name)
    array = array.astype(np.int64 if integral else np.float64)
    if name == "gate_hold":
        if np.any(np.isnan(array)):
            raise reject(name, caller, "numbers or -inf", array)
    elif not integral and name != "mode_time" and not np.all(np.isfinite(array)):
        raise reject(name, caller, "finite", array)
    array.flags.writeable = False
    return array


def _check_each(
    name: str,
    array: npt.NDArray[Any],
    allowed: Callable[[npt.NDArray[Any]], npt.NDArray[np.bool_]],
    rule: str,
    caller: str = "System",
) -> None:
    good = allowed(array)
    if not np.all(good):
        place = tuple(int(k) for k in np.argwhere(~good)[0])
        place_text = place[0] if len(place) == 1 else place
        raise reject(f"{name}[{place_text}]", caller, rule, array[place].item())
