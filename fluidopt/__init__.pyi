from .contention import GPU, ContentionCurve, IterationTime, Mode
from .errors import (
    ContentionWarning,
    FluidoptError,
    InfeasibleModel,
    InvalidInput,
    SolverFailure,
    TraceFormatError,
)
from .model import FluidModel
from .plan import Plan
from .policy import Policy
from .scenario import Scenario, read_scenario
from .simulation.result import Estimate, SimulationResult
from .solvers import Certificate, SolverOptions
from .traces import Trace, read_trace
from .workload import TokenPrices, Workload, WorkloadClass

__all__ = [
    "GPU",
    "Certificate",
    "ContentionCurve",
    "ContentionWarning",
    "Estimate",
    "FluidModel",
    "FluidoptError",
    "InfeasibleModel",
    "InvalidInput",
    "IterationTime",
    "Mode",
    "Plan",
    "Policy",
    "Scenario",
    "SimulationResult",
    "SolverFailure",
    "SolverOptions",
    "TokenPrices",
    "Trace",
    "TraceFormatError",
    "Workload",
    "WorkloadClass",
    "__version__",
    "read_scenario",
    "read_trace",
]

__version__: str
