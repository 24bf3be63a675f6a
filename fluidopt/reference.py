"""The reference instance of arXiv:2602.02987 ([L26], sections 6.1 and 6.2), and its measured GPU curves."""

from __future__ import annotations

from fluidopt.contention import GPU, IterationTime
from fluidopt.model import FluidModel
from fluidopt.scenario import Charging
from fluidopt.workload import TokenPrices, Workload, WorkloadClass

QWEN_8B_A100 = IterationTime(alpha=0.0174, beta=6.2e-5, solo=0.022)
"""Qwen-8B on an A100-SXM4-40GB under vLLM 0.11.0 (R^2 0.998; gamma = 45.45/s)."""

QWEN_4B_A100 = IterationTime(alpha=0.0152, beta=3.6e-5, solo=0.019)
"""Qwen-4B on an A100-SXM4-40GB under vLLM 0.11.0 (R^2 0.997; gamma = 52.63/s)."""


def reference_workload() -> Workload:
    """The two classes: short prompts with long answers, long prompts with short answers; rates per GPU."""
    return Workload(
        (
            WorkloadClass(
                "decode-heavy", arrival_rate=0.5, prompt_tokens=300, output_tokens=1000, abandonment_rate=0.1
            ),
            WorkloadClass(
                "prefill-heavy", arrival_rate=0.5, prompt_tokens=3000, output_tokens=400, abandonment_rate=0.1
            ),
        ),
        source="arXiv:2602.02987, section 6.2",
    )


def reference_model(charging: Charging = "bundled") -> FluidModel:
    """The reference instance: optimum 297.716 (bundled) or 298.598 (separate) money/s per GPU."""
    return FluidModel(
        reference_workload(),
        GPU(QWEN_8B_A100, batch_size=16, chunk_size=256, name="A100/Qwen-8B"),
        prices=TokenPrices(prompt=0.1, output=0.2),
        charging=charging,
    )
