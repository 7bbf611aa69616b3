"""princeton-nlp/SimPO: its trainer reads ``model(...).logits``, and cross entropy of them; it gets lazy ones.

A repository to clone: its `scripts/simpo_trainer.py` must be importable, as it is where `run_simpo.py` runs.
"""

from .adapter import Adapter

_adapter = Adapter("simpo", {"simpo_trainer": ("SimPOTrainer.concatenated_forward",)})
patch, unpatch = _adapter.patch, _adapter.unpatch
