"""OpenRLHF: its `Actor` makes log-probs and entropies from lazy logits, for DPO, SFT, PPO and the like.

`log_probs_from_logits` divides its logits in place by a temperature; lazy ones are divided in place, too. PPO's actors
live in processes of Ray's: `patch` is for them, and not for the driver.
"""

from .adapter import Adapter, lazy_aware


def _log_probs(logits, arguments):
    if arguments["temperature"] != 1.0:
        logits.div_(arguments["temperature"])
    return logits.logps(arguments["labels"])


_functions = {
    "log_probs_from_logits": lazy_aware(_log_probs),
    "compute_entropy": lazy_aware(lambda logits, arguments: logits.entropy()),
}
_adapter = Adapter("openrlhf", {"openrlhf.models.actor": ("Actor.forward",)}, {"openrlhf.models.actor": _functions})
patch, unpatch = _adapter.patch, _adapter.unpatch
