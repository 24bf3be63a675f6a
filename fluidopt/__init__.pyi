from .calibration import IterationTimeFit, fit_iteration_time, plot_fit, read_curves, read_iteration_times
from .chain import ChainResult, OptimalPolicy, exact_chain, optimal_policy
from .contention import GPU, ContentionCurve, IterationTime, Mode
from .curves import CurveGrid, Kink, LinearTime, TabulatedTime
from .data import azure_2023, known_gpu, known_gpus
from .data.example import write_example
from .errors import (
    ContentionWarning,
    FluidoptError,
    InfeasibleModel,
    InvalidInput,
    SolverFailure,
    TraceFormatError,
)
from .fluid import FluidState, FluidTrajectory, fluid_trajectory
from .model import FluidModel
from .plan import Plan
from .plots import plot_convergence, plot_plan, plot_policy_study, plot_result, plot_summary, plot_trajectory
from .policy import Policy
from .policy.bound import Bound, revenue_bound
from .policy.controller import Controller, StartDecode, StartPrefill
from .policy.engines import EngineSettings, engine_settings
from .policy.refine import Refinement, refine_policy
from .reference import reference_model
from .reports import Report, report
from .scenario import Scenario, read_scenario
from .service_levels import (
    AbandonmentShare,
    CompletionFloor,
    DecodeFairness,
    KVMemory,
    KVTransfer,
    MeanTPOT,
    MeanTTFT,
    MeanWait,
    PrefillFairness,
    SlotTPOT,
)
from .serving import Engine, EngineFleet, Replay, fit_step_overhead, read_engine, replay
from .simulation.arrivals import Bursty, Law, Laws, Sinusoidal, Steady, Stepwise
from .simulation.compare import PolicyComparison, compare_policies
from .simulation.result import SimulationResult
from .simulation.statistics import Estimate
from .solvers import Certificate, SolverOptions
from .solvers.warm import Resolved, ResolvedMany, Solver
from .studies.classes import ClassStudy, class_study
from .studies.convergence import ConvergenceStudy, FleetPoint, convergence_study
from .studies.frontier import Frontier, frontier
from .studies.frontier_figure import plot_frontiers
from .studies.hardware.chunk_size import ChunkChoice, optimal_chunk
from .studies.hardware.figures import plot_hardware, plot_landscape
from .studies.hardware.study import (
    GPUComparison,
    HardwareStudy,
    HardwareUpgrades,
    compare_gpus,
    hardware_study,
    hardware_upgrades,
)
from .studies.optimum import OptimumStudy, optimum_study
from .studies.policy_study import InstanceOutcome, InstanceRanges, PolicyStudy, policy_study
from .studies.prices.curves import PriceCurve, PriceStudy, price_curve, price_study
from .studies.prices.search import ElasticDemand, OptimalPrices, elastic_demand, optimal_prices
from .studies.replays import ReplayStudy, plot_replays, replay_study
from .studies.robustness import (
    Disturbance,
    RobustnessStudy,
    robustness_study,
    standard_disturbances,
    threshold_policy,
)
from .studies.schedule import Schedule, plan_schedule
from .studies.sensitivity.curve import SensitivityCurve, sensitivity_curve
from .studies.sensitivity.local import ParameterSensitivity, Sensitivity, sensitivity
from .studies.sensitivity.variance import GlobalSensitivity, global_sensitivity
from .studies.sizing.fleet import FleetSize, size_fleet
from .studies.sizing.trace import TraceSize, size_trace
from .studies.sizing.trace_bound import Promise, TraceBound, trace_bound
from .studies.sweep import sweep
from .traces import Classification, Trace, classify, read_trace
from .traces.figure import plot_trace
from .workload import TokenPrices, Workload, WorkloadClass

__all__ = [
    "GPU",
    "AbandonmentShare",
    "Bound",
    "Bursty",
    "Certificate",
    "ChainResult",
    "ChunkChoice",
    "ClassStudy",
    "Classification",
    "CompletionFloor",
    "ContentionCurve",
    "ContentionWarning",
    "Controller",
    "ConvergenceStudy",
    "CurveGrid",
    "DecodeFairness",
    "Disturbance",
    "ElasticDemand",
    "Engine",
    "EngineFleet",
    "EngineSettings",
    "Estimate",
    "FleetPoint",
    "FleetSize",
    "FluidModel",
    "FluidState",
    "FluidTrajectory",
    "FluidoptError",
    "Frontier",
    "GPUComparison",
    "GlobalSensitivity",
    "HardwareStudy",
    "HardwareUpgrades",
    "InfeasibleModel",
    "InstanceOutcome",
    "InstanceRanges",
    "InvalidInput",
    "IterationTime",
    "IterationTimeFit",
    "KVMemory",
    "KVTransfer",
    "Kink",
    "Law",
    "Laws",
    "LinearTime",
    "MeanTPOT",
    "MeanTTFT",
    "MeanWait",
    "Mode",
    "OptimalPolicy",
    "OptimalPrices",
    "OptimumStudy",
    "ParameterSensitivity",
    "Plan",
    "Policy",
    "PolicyComparison",
    "PolicyStudy",
    "PrefillFairness",
    "PriceCurve",
    "PriceStudy",
    "Promise",
    "Refinement",
    "Replay",
    "ReplayStudy",
    "Report",
    "Resolved",
    "ResolvedMany",
    "RobustnessStudy",
    "Scenario",
    "Schedule",
    "Sensitivity",
    "SensitivityCurve",
    "SimulationResult",
    "Sinusoidal",
    "SlotTPOT",
    "Solver",
    "SolverFailure",
    "SolverOptions",
    "StartDecode",
    "StartPrefill",
    "Steady",
    "Stepwise",
    "TabulatedTime",
    "TokenPrices",
    "Trace",
    "TraceBound",
    "TraceFormatError",
    "TraceSize",
    "Workload",
    "WorkloadClass",
    "__version__",
    "azure_2023",
    "class_study",
    "classify",
    "compare_gpus",
    "compare_policies",
    "convergence_study",
    "elastic_demand",
    "engine_settings",
    "exact_chain",
    "fit_iteration_time",
    "fit_step_overhead",
    "fluid_trajectory",
    "frontier",
    "global_sensitivity",
    "hardware_study",
    "hardware_upgrades",
    "known_gpu",
    "known_gpus",
    "optimal_chunk",
    "optimal_policy",
    "optimal_prices",
    "optimum_study",
    "plan_schedule",
    "plot_convergence",
    "plot_fit",
    "plot_frontiers",
    "plot_hardware",
    "plot_landscape",
    "plot_plan",
    "plot_policy_study",
    "plot_replays",
    "plot_result",
    "plot_summary",
    "plot_trace",
    "plot_trajectory",
    "policy_study",
    "price_curve",
    "price_study",
    "read_curves",
    "read_engine",
    "read_iteration_times",
    "read_scenario",
    "read_trace",
    "reference_model",
    "refine_policy",
    "replay",
    "replay_study",
    "report",
    "revenue_bound",
    "robustness_study",
    "sensitivity",
    "sensitivity_curve",
    "size_fleet",
    "size_trace",
    "standard_disturbances",
    "sweep",
    "threshold_policy",
    "trace_bound",
    "write_example",
]

__version__: str
