"""LLaMA-Factory: DPO, ORPO, SimPO and KTO trainers read ``model(...).logits``; they get lazy ones.

Their class order puts their own methods before TRL's, so `patch_trl` does not reach them.
"""

from .adapter import Adapter

_adapter = Adapter(
    "llamafactory",
    {
        "llamafactory.train.dpo.trainer": ("CustomDPOTrainer.concatenated_forward",),
        "llamafactory.train.kto.trainer": ("CustomKTOTrainer.forward",),
    },
)
patch, unpatch = _adapter.patch, _adapter.unpatch
