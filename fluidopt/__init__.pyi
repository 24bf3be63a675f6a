from .chain import ChainResult, OptimalPolicy, exact_chain, optimal_policy
from .contention import GPU, ContentionCurve, IterationTime, Mode
from .data import azure_2023
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
from .policy.controller import Controller, StartDecode, StartPrefill
from .policy.refine import Refinement, refine_policy
from .reference import reference_model
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
from .simulation.compare import PolicyComparison, compare_policies
from .simulation.result import SimulationResult
from .simulation.statistics import Estimate
from .solvers import Certificate, SolverOptions
from .solvers.warm import Resolved, ResolvedMany, Solver
from .studies.convergence import ConvergenceStudy, FleetPoint, convergence_study
from .studies.policy_study import InstanceOutcome, InstanceRanges, PolicyStudy, policy_study
from .studies.sizing import FleetSize, size_fleet
from .traces import Classification, Trace, classify, read_trace
from .workload import TokenPrices, Workload, WorkloadClass

__all__ = [
    "GPU",
    "AbandonmentShare",
    "Certificate",
    "ChainResult",
    "Classification",
    "CompletionFloor",
    "ContentionCurve",
    "ContentionWarning",
    "Controller",
    "ConvergenceStudy",
    "DecodeFairness",
    "Estimate",
    "FleetPoint",
    "FleetSize",
    "FluidModel",
    "FluidState",
    "FluidTrajectory",
    "FluidoptError",
    "InfeasibleModel",
    "InstanceOutcome",
    "InstanceRanges",
    "InvalidInput",
    "IterationTime",
    "KVMemory",
    "KVTransfer",
    "MeanTPOT",
    "MeanTTFT",
    "MeanWait",
    "Mode",
    "OptimalPolicy",
    "Plan",
    "Policy",
    "PolicyComparison",
    "PolicyStudy",
    "PrefillFairness",
    "Refinement",
    "Resolved",
    "ResolvedMany",
    "Scenario",
    "SimulationResult",
    "SlotTPOT",
    "Solver",
    "SolverFailure",
    "SolverOptions",
    "StartDecode",
    "StartPrefill",
    "TokenPrices",
    "Trace",
    "TraceFormatError",
    "Workload",
    "WorkloadClass",
    "__version__",
    "azure_2023",
    "classify",
    "compare_policies",
    "convergence_study",
    "exact_chain",
    "fluid_trajectory",
    "optimal_policy",
    "plot_convergence",
    "plot_plan",
    "plot_policy_study",
    "plot_result",
    "plot_summary",
    "plot_trajectory",
    "policy_study",
    "read_scenario",
    "read_trace",
    "reference_model",
    "refine_policy",
    "size_fleet",
]

__version__: str
