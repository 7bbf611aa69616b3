"""ContextualAI/HALOs: SFT, DPO, KTO and the losses that inherit their `forward` get lazy logits; offline PPO does not.

A repository to clone: its `train/trainers.py` must be importable, as it is where its `launch.py` runs.
"""

from .adapter import Adapter

_adapter = Adapter(
    "halos",
    {
        "train.trainers": (
            "SFTTrainer.get_batch_metrics",
            "PairedPreferenceTrainer.forward",
            "UnpairedPreferenceTrainer.forward",
            "KTOTrainer.forward",
        )
    },
)
patch, unpatch = _adapter.patch, _adapter.unpatch
