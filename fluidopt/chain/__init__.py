"""The exact Markov chain of a small fleet: state space, generator, stationary and transient law, optimal policy."""

from fluidopt.chain.exact import ChainResult, exact_chain
from fluidopt.chain.generator import StateSpace, enumerate_chain
from fluidopt.chain.optimal import OptimalPolicy, optimal_policy
from fluidopt.chain.stationary import stationary_law
from fluidopt.chain.transient import TransientLaw, transient_law

__all__ = [
    "ChainResult",
    "OptimalPolicy",
    "StateSpace",
    "TransientLaw",
    "enumerate_chain",
    "exact_chain",
    "optimal_policy",
    "stationary_law",
    "transient_law",
]
