"""Preference training without logits; see README.md. The public names, nothing else."""

from ._version import __version__
from .logps import LinearLogpsFunction, TokenStats, linear_logps, linear_token_stats
from .ops import backends
from .selective import selective_log_softmax

__all__ = [
    "LinearLogpsFunction",
    "TokenStats",
    "__version__",
    "backends",
    "linear_logps",
    "linear_token_stats",
    "selective_log_softmax",
]
