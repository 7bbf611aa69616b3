"""One file per trainer. Importing these imports no trainer: the function that patches one loads it."""

from ..models.huggingface import ModelTokenStats, patch_model, unpatch_model
from ..models.lazy.head import lazy_logits
from .trl import patch_trl, unpatch_trl

__all__ = ["ModelTokenStats", "lazy_logits", "patch_model", "patch_trl", "unpatch_model", "unpatch_trl"]
