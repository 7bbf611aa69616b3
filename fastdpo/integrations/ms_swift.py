"""ms-swift: DPO, CPO, SimPO, ORPO and KTO trainers read ``model(...).logits``; they get lazy ones.

Their class order puts their own methods before TRL's, and they import TRL's function of logits by name.
"""

from .adapter import Adapter
from .trl_methods import FUNCTIONS

_function = {"selective_log_softmax": FUNCTIONS["selective_log_softmax"]}
_adapter = Adapter(
    "ms_swift",
    {
        "swift.rlhf_trainers.rlhf_mixin": ("RLHFTrainerMixin.concatenated_forward",),
        "swift.rlhf_trainers.dpo_trainer": ("DPOTrainer.concatenated_forward",),
        "swift.rlhf_trainers.kto_trainer": ("KTOTrainer.forward", "KTOTrainer._compute_kl_logps"),
    },
    {
        "swift.rlhf_trainers.rlhf_mixin": _function,
        "trl.experimental.cpo.cpo_trainer": _function,
        "trl.experimental.orpo.orpo_trainer": _function,
    },
)
patch, unpatch = _adapter.patch, _adapter.unpatch
