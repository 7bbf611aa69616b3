"""Preference training without logits; see README.md. The public names, nothing else."""

from ._version import __version__
from .divergence import DivergenceOutput, linear_divergence
from .explanations import explain
from .integrations import ModelTokenStats, patch_model, patch_trl, unpatch_model, unpatch_trl
from .linear_dpo import DPOOutput, LinearDPOLoss, linear_dpo_loss
from .logps import linear_logps, linear_token_stats
from .ops.engines import backends
from .ops.operators import LinearLogpsFunction
from .ops.preference.templates import PreferenceLossFunction
from .ops.problem import TokenStats
from .preference import PreferenceOutput, preference_loss
from .selective import selective_log_softmax
from .topk import topk_divergence

__all__ = [
    "DPOOutput",
    "DivergenceOutput",
    "LinearDPOLoss",
    "LinearLogpsFunction",
    "ModelTokenStats",
    "PreferenceLossFunction",
    "PreferenceOutput",
    "TokenStats",
    "__version__",
    "backends",
    "explain",
    "linear_divergence",
    "linear_dpo_loss",
    "linear_logps",
    "linear_token_stats",
    "patch_model",
    "patch_trl",
    "preference_loss",
    "selective_log_softmax",
    "topk_divergence",
    "unpatch_model",
    "unpatch_trl",
]
