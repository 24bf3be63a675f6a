"""The pictures of the pages on the model: drawn from the package's own numbers, in the colours of the page around them.

Each function returns an inline SVG. Its ink is the page's text colour, so that it reads on a light page and on a dark
one; the two accents stand out on both.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from IPython.display import HTML
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import fluidopt as fo

INK = "#123456"
"""Stands for the text colour of the page, which replaces it in the SVG."""
BLUE, ORANGE, GREY = "#2a9fb5", "#e07a1f", "#8a8f98"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fluidopt",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.6,
}


def contention(gpu: fo.GPU, *, longest: int = 768) -> HTML:
    """What a chunk does to an iteration, and what the choice of the chunk trades."""
    with rc_context(STYLE):
        figure, (left, right) = _panels(2)
        curve, chunk, alone = gpu.curve, gpu.chunk_size, 1e3 * gpu.curve.solo
        chunks = np.linspace(1, longest, 385)
        mixed = np.array([1e3 * curve.mixed(each) for each in chunks])
        at = 1e3 * curve.mixed(chunk)
        left.plot(chunks, mixed, color=ORANGE)
        left.axhline(alone, color=BLUE)
        left.annotate("", (chunk, at), (chunk, alone), arrowprops={"arrowstyle": "<->", "color": INK})
        left.text(chunk + 12, (at + alone) / 2, f"κ = {gpu.kappa:.2f}", va="center")
        left.text(longest * 0.62, mixed[-1] * 0.93, "with a prefill, τ(C)", color=ORANGE, ha="right")
        left.text(longest, alone * 0.93, "decodes only", color=BLUE, va="top", ha="right")
        left.set(title="Iteration time, ms", xlabel="chunk C, prompt tokens", ylim=(0, None), xlim=(0, longest))

        slots = gpu.batch_size - 1
        right.plot(chunks / mixed, 1e3 * slots / mixed, color=ORANGE)
        right.plot([0], [1e3 * gpu.batch_size / alone], "o", color=BLUE, clip_on=False)
        for each in (64, 128, chunk, 512):
            x, y = each / (1e3 * curve.mixed(each)), slots / curve.mixed(each)
            right.plot([x], [y], "o", color=ORANGE, markersize=4)
            right.text(x + 0.2, y + 8, f"C = {each}", fontsize=8)
        right.text(0.25, 1e3 * gpu.batch_size / alone + 6, "solo", color=BLUE)
        right.set(
            title="What a full GPU does in a second",
            xlabel="thousand prompt tokens read",
            ylabel="output tokens written",
            xlim=(0, None),
            ylim=(0, None),
        )
        return _inline(figure, "Iteration time against the chunk, and prompt against output tokens per second")


def threshold(plan: fo.Plan) -> HTML:
    """Classes as points: what a prefill in service earns against what it costs at the plan's two prices."""
    workload, gpu = plan.model.workload, plan.model.gpu_types[0]
    mixed, solo = (mode for _, mode in plan.model.modes)
    v = plan.shadow_prices[f"decode_slots[{mixed.name}]"]
    u = plan.shadow_prices[f"fleet[{gpu.name}]"] - solo.decode_slots * plan.shadow_prices[f"decode_slots[{solo.name}]"]
    needs = mixed.chunk * workload.output_tokens / workload.prompt_tokens
    needs += gpu.kappa * solo.decode_slots - mixed.decode_slots
    earns = plan.thresholds["value"].to_numpy() * mixed.prefill_speed / workload.prompt_tokens
    decisions = {"serve all": (BLUE, "o"), "serve part": (ORANGE, "D"), "turn away": (GREY, "X")}
    with rc_context(STYLE):
        figure, (axis,) = _panels(1, width=6.6, height=3.4)
        ends = np.array([0.0, 1.2 * needs.max()])
        axis.plot(ends, u + v * ends, color=INK)
        axis.text(0.55 * ends[1], u + v * 0.46 * ends[1], "costs u + v a")
        order = np.argsort(needs)
        axis.plot(needs[order], earns[order], color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        for decision, (colour, mark) in decisions.items():
            of = (plan.thresholds["decision"] == decision).to_numpy()
            axis.plot(needs[of], earns[of], mark, color=colour, markersize=7, label=decision)
        for at, i in enumerate(order):
            label, colour = f"{at + 1}", decisions[plan.thresholds["decision"].iloc[i]][0]
            axis.annotate(label, (needs[i], earns[i]), (0, 6), textcoords="offset points", ha="center", fontsize=8)
            line = f"{label}  {workload.names[i]}"
            axis.text(0.02, 0.97 - 0.075 * at, line, color=colour, va="top", fontsize=8.5, transform=axis.transAxes)
        axis.legend(frameon=False, loc="lower right")
        axis.set(
            title="A prefill in service earns w μᵖ, money/s",
            xlabel="it takes a decode slots",
            xlim=ends,
            ylim=(0, None),
        )
        return _inline(figure, "What a prefill in service earns against the decode slots that it takes, by class")


def fluid_and_random(plan: fo.Plan, *, gpus: Sequence[int] = (20, 500), horizon: float = 300.0, seed: int = 1) -> HTML:
    """One path each of fleets that start empty, beside the fluid and the plan."""
    import fluidopt as fo

    drawn = dict(zip(gpus, ((GREY, 0.9), (ORANGE, 1.4)), strict=True))
    titles = {"decode": "Decodes in service, per GPU", "decode_queue": "Waiting for decode, per GPU"}
    planned = {"decode": float(np.nansum(plan.decode)), "decode_queue": float(np.nansum(plan.decode_queue))}
    with rc_context(STYLE):
        figure, axes = _panels(2)
        for n, (colour, width) in drawn.items():
            policy = plan.policy(gpus=n)
            path = policy.simulate(horizon=horizon, warmup=0.0, replications=2, seed=seed, path=600).path()
            for axis, quantity in zip(axes, titles, strict=True):
                total = path[quantity].sum(axis=1)
                axis.plot(total.index, total, color=colour, linewidth=width, label=f"{n} GPUs")
        fluid = fo.fluid_trajectory(policy, horizon=horizon)
        for axis, (quantity, title) in zip(axes, titles.items(), strict=True):
            values = getattr(fluid, quantity)
            axis.plot(fluid.time, values.reshape(len(fluid.time), -1).sum(axis=1), color=BLUE, label="fluid")
            axis.axhline(planned[quantity], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="plan")
            axis.set(title=title, xlabel="s", xlim=(0, horizon), ylim=(0, None))
        axes[1].legend(frameon=False, loc="upper left", fontsize=8)
        return _inline(figure, "Decodes in service and waiting over time: 20 GPUs, 500 GPUs, the fluid and the plan")


def shortfall(found: dict[int, tuple[float, float]]) -> HTML:
    """By how much fleets fall short of the bound, per cent with half-widths, by number of GPUs."""
    with rc_context(STYLE):
        figure, (axis,) = _panels(1, width=5.2, height=2.7)
        gpus = np.array(list(found))
        short, half = (np.array([each[at] for each in found.values()]) for at in (0, 1))
        axis.errorbar(gpus, short, half, fmt="o-", color=ORANGE, ecolor=INK, elinewidth=0.8)
        axis.plot(gpus, short[0] * np.sqrt(gpus[0] / gpus), color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axis.text(gpus[-1], short[0] * np.sqrt(gpus[0] / gpus[-1]) * 1.15, "1/√n", ha="center", va="bottom")
        for n, value in zip(gpus, short, strict=True):
            axis.annotate(f"{value:.1f}", (n, value), (0, 6), textcoords="offset points", color=ORANGE, ha="center")
        axis.set(xscale="log", yscale="log", xlabel="GPUs", title="Short of the bound, %")
        axis.set_xticks(gpus, [f"{n:,}" for n in gpus])
        axis.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
        axis.minorticks_off()
        return _inline(figure, "Revenue short of the bound by number of GPUs")


def _panels(number: int, *, width: float = 7.4, height: float = 2.8) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    return figure, figure.subplots(1, number, squeeze=False)[0]


def _inline(figure: Figure, label: str) -> HTML:
    """The figure as SVG in the page, as wide as it was drawn or as the page allows."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].replace(INK, "currentColor")
    width, height = (72 * each for each in figure.get_size_inches())
    head = (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" style="width:100%;max-width:{1.35 * width:.0f}px;height:auto">'
    )
    return HTML(head + body)
