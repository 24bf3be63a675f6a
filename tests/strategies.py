"""Hypothesis strategies for random valid inputs and models, shared by the test files."""

import math
import warnings

import numpy as np
from hypothesis import strategies as st

import fluidopt as fo


def log_floats(low, high):
    """Floats spread evenly over the orders of magnitude between ``low`` and ``high``."""
    return st.floats(math.log(low), math.log(high)).map(lambda exponent: min(max(math.exp(exponent), low), high))


def log_integers(low, high):
    """Whole numbers spread evenly over the orders of magnitude between ``low`` and ``high``."""
    return log_floats(low, high).map(round)


def build(classes, gpus, *, prices=None, charging="bundled"):
    """A `FluidModel`; the warning about unphysical curves, which random curves earn, is not the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ContentionWarning)
        return fo.FluidModel(classes, gpus, prices=prices or fo.TokenPrices(prompt=0.1, output=0.2), charging=charging)


CHARGING = st.sampled_from(["bundled", "separate"])
EITHER = st.booleans()


def curves(physical=EITHER):
    return st.builds(
        fo.IterationTime,
        alpha=log_floats(1e-3, 5e-2),
        beta=log_floats(1e-6, 1e-3),
        solo=log_floats(5e-3, 1e-1),
        physical=physical,
    )


def gpus(physical=EITHER, min_batch=1):
    """GPUs with the mixed/solo pair."""
    return st.builds(fo.GPU, curves(physical), batch_size=log_integers(min_batch, 64), chunk_size=log_integers(1, 2048))


def prices():
    """Prices of which at least one is positive."""
    free = st.sampled_from([(1.0, 0.0), (0.0, 1.0)])
    paid = st.tuples(log_floats(1e-3, 1.0), log_floats(1e-3, 1.0))
    return st.one_of(paid, paid, paid, free).map(lambda pair: fo.TokenPrices(prompt=pair[0], output=pair[1]))


def impatient(name):
    """A class whose waiting requests give up sooner or later; it may have no arrivals."""
    return st.builds(
        fo.WorkloadClass,
        st.just(name),
        arrival_rate=st.one_of(st.just(0.0), log_floats(1e-2, 5.0), log_floats(1e-2, 5.0), log_floats(1e-2, 5.0)),
        prompt_tokens=log_floats(10, 5000),
        output_tokens=log_floats(10, 5000),
        abandonment_rate=log_floats(1e-3, 2.0),
    )


def impatient_workloads(min_classes=1, max_classes=5):
    return st.integers(min_classes, max_classes).flatmap(
        lambda count: st.tuples(*(impatient(f"class {at}") for at in range(count))).map(fo.Workload)
    )


@st.composite
def patient_classes(draw, gpu, fraction=0.9):
    """Up to two classes that never abandon, together at most ``fraction`` of what a mixed/solo GPU can serve."""
    count = draw(st.integers(0, 2))
    shapes = [(draw(log_floats(10, 5000)), draw(log_floats(10, 5000)), draw(st.floats(0.1, 1))) for _ in range(count)]
    mixed, solo = gpu.modes()
    prefill = sum(weight * prompt / mixed.prefill_speed for prompt, _, weight in shapes)
    tokens = sum(weight * output for _, output, weight in shapes)
    # Decode tokens/s left when `prefill` of the GPU is mixed fall linearly from solo to mixed.
    full, beside = solo.decode_slots * solo.decode_speed, mixed.decode_slots * mixed.decode_speed
    drain = tokens + prefill * max(0.0, full - beside)
    scale = draw(st.floats(0.05, fraction)) * min(1 / prefill, full / drain) if count else 0.0
    return tuple(
        fo.WorkloadClass(f"patient {at}", arrival_rate=scale * weight, prompt_tokens=prompt, output_tokens=output)
        for at, (prompt, output, weight) in enumerate(shapes)
    )


@st.composite
def pair_models(draw, *, charging=CHARGING, physical=EITHER, patient=True):
    """Feasible models of one GPU type with the mixed/solo pair of [L26]."""
    gpu = draw(gpus(physical))
    classes = draw(impatient_workloads()).classes
    if patient:
        classes += draw(patient_classes(gpu))
    return build(classes, gpu, prices=draw(prices()), charging=draw(charging))


@st.composite
def operating_modes(draw, batch):
    """Prefill modes of several chunks and decode caps, with the decode-only and idle modes that they need."""
    times = log_floats(5e-3, 1e-1)
    modes = [
        fo.Mode(
            f"prefill {at}",
            chunk=draw(log_integers(1, 2048)),
            decode_slots=draw(st.one_of(st.just(0), st.integers(0, batch - 1))),
            iteration_time=draw(times),
        )
        for at in range(draw(st.integers(0, 3)))
    ]
    least = 0 if modes and all(mode.decode_slots == 0 for mode in modes) else 1
    modes += [
        fo.Mode(f"decode {at}", decode_slots=draw(st.integers(1, batch)), iteration_time=draw(times))
        for at in range(draw(st.integers(least, 2)))
    ]
    if any(mode.prefills and mode.decode_slots == 0 for mode in modes) or draw(st.booleans()):
        modes.append(fo.Mode("idle"))
    return tuple(draw(st.permutations(modes)))


@st.composite
def mode_models(draw, *, charging=CHARGING):
    """Models of one to three GPU types with operating modes of their own; all classes abandon, so all are feasible."""
    count = draw(st.integers(1, 3))
    weights = np.array([draw(st.floats(0.1, 1)) for _ in range(count)])
    types = []
    for at, share in enumerate(weights / weights.sum()):
        batch = draw(log_integers(2, 64))
        types.append(
            fo.GPU(
                fo.IterationTime(alpha=0.02, beta=1e-5, solo=0.02),
                batch_size=batch,
                chunk_size=256,
                name=f"type {at}",
                share=float(share),
                operating_modes=draw(operating_modes(batch)),
            )
        )
    return build(draw(impatient_workloads()), types, prices=draw(prices()), charging=draw(charging))


def decode_bound_margin(model):
    """kappa - (B-1)/B of a mixed/solo model: Proposition 3.2 of [L26] needs it to be at least 0."""
    (gpu,) = model.gpu_types
    return gpu.kappa - (gpu.batch_size - 1) / gpu.batch_size


def random_models(seed, count, *, charging="bundled", below_bound=False, patient=False):
    """``count`` feasible mixed/solo models; ``below_bound``: all with kappa < (B-1)/B; ``patient``: class 0 never
    abandons."""
    rng = np.random.default_rng(seed)
    made = []
    while len(made) < count:
        batch, chunk = int(rng.integers(2, 65)), int(np.exp(rng.uniform(np.log(16), np.log(2048))))
        solo = np.exp(rng.uniform(np.log(0.01), np.log(0.1)))
        if below_bound:
            tau = solo * (batch - 1) / batch * rng.uniform(0.2, 0.98)
            curve = fo.IterationTime(alpha=tau / 2, beta=tau / 2 / chunk, solo=solo, physical=False)
        else:
            curve = fo.IterationTime(alpha=solo * rng.uniform(0.3, 1.2), beta=10 ** rng.uniform(-5, -3), solo=solo)
        gpu = fo.GPU(curve, batch_size=batch, chunk_size=chunk)
        size = int(rng.integers(1, 6))
        classes = [
            fo.WorkloadClass(
                f"class {at}",
                arrival_rate=10 ** rng.uniform(-2, 0.5),
                prompt_tokens=rng.uniform(50, 3000),
                output_tokens=rng.uniform(50, 3000),
                abandonment_rate=10 ** rng.uniform(-2, 0),
            )
            for at in range(size)
        ]
        if patient:
            mixed, solo_mode = gpu.modes()
            prefill = classes[0].prompt_tokens / mixed.prefill_speed
            slot_speed = min(mixed.decode_speed * mixed.decode_slots, solo_mode.decode_speed * batch)
            rate = 0.8 * min(1 / prefill, slot_speed / classes[0].output_tokens)
            classes[0] = fo.WorkloadClass(
                "patient",
                arrival_rate=rate * rng.uniform(0.1, 1),
                prompt_tokens=classes[0].prompt_tokens,
                output_tokens=classes[0].output_tokens,
            )
        prices = fo.TokenPrices(prompt=rng.uniform(0.01, 1), output=rng.uniform(0.01, 1))
        made.append(build(classes, gpu, prices=prices, charging=charging))
    return made
