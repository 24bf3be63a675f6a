"""Rows and objectives as text in the model's symbols: ``q_p[i] <= 2*lambda[i]``, ``sum(log(sum(mu_d[i, k]*y[i, k],
k)), i)``.

Text comes from files, so it is never evaluated: it is read by a whitelist. What is written is text only where reading
it gives the same expression.
"""

from fluidopt.expressions.reading import parse_condition, parse_expression, parse_relation
from fluidopt.expressions.vocabulary import MOST_DEPTH, MOST_TOKENS
from fluidopt.expressions.writing import write_condition, write_expression, write_relation

__all__ = [
    "MOST_DEPTH",
    "MOST_TOKENS",
    "parse_condition",
    "parse_expression",
    "parse_relation",
    "write_condition",
    "write_expression",
    "write_relation",
]
