"""open-instruct: its DPO forwards of Hugging Face models make log-probs of lazy logits, completion rows only.

Those of OLMo-core models take log-probs from the model itself and stay theirs. Patch before `main` takes the forward
function from its arguments.
"""

import torch

from ..models.lazy.logits import IGNORED
from .adapter import Adapter, lazy_aware


def _per_token_logps(logits, arguments):
    labels = arguments["labels"]
    return logits.logps(torch.cat((labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)), dim=1))


_adapter = Adapter(
    "open_instruct",
    {"open_instruct.dpo_utils": ("concatenated_forward", "separate_forward")},
    {"open_instruct.dpo_utils": {"calculate_per_token_logps": lazy_aware(_per_token_logps)}},
)
patch, unpatch = _adapter.patch, _adapter.unpatch
