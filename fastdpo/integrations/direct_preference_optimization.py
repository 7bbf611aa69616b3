"""eric-mitchell/direct-preference-optimization: DPO and SFT read ``policy(...).logits``; they get lazy ones.

A repository to clone: its `trainers.py` must be importable, as it is where its `train.py` runs.
"""

from .adapter import Adapter

_adapter = Adapter("direct_preference_optimization", {"trainers": ("BasicTrainer.get_batch_metrics",)})
patch, unpatch = _adapter.patch, _adapter.unpatch
