"""NeMo-RL: the log-probs of Megatron policies with `use_linear_ce_fusion_loss`, for DPO and its like.

hidden [S / ranks, B, H]     gathered over the tensor-parallel group, in whose rank order the lm_head's rows are split
logps [B, S - 1]             `linear_logps` with that group as `vocab_group`; each rank gets all of dhidden

Policies live in processes of Ray's: `patch` is for them, and not for the driver. Without the option above, and with
DTensor policies, NeMo-RL makes logits, and nothing is replaced.
"""

import functools
import inspect

import torch
import torch.distributed as dist

from ..autograd import Function
from ..logps import linear_logps
from ..models.lazy.logits import IGNORED
from .adapter import Adapter, Replacements

PARAMETERS = (
    "tensor_parallel_hidden_states",
    "output_weight_layer",
    "runtime_gather_output",  # NeMo-RL's own function does not read it, either
    "target",
    "vocab_start_index",
    "vocab_end_index",
    "tp_group",
    "inference_only",
    "cp_group",
    "chunk_size",  # bounds the logits that exist at a time: here none do
)


class _Gathered(Function):
    """Hidden states of all ranks, whose gradient is already the same and complete on each."""

    of = "fastdpo's log-probs for NeMo-RL"

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        parts = [torch.empty_like(hidden) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, hidden.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, dhidden):
        return dhidden.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def _sharded_logps(original, replacements: Replacements):
    signature = inspect.signature(original)
    if tuple(signature.parameters) != PARAMETERS:
        raise RuntimeError(f"{original.__name__} takes {', '.join(signature.parameters)}: another release of NeMo-RL")

    @functools.wraps(original)
    def logps(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        hidden, weight, _, target, start, end, group, inference_only, cp_group, _ = given.arguments.values()
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if cp_group is not None and dist.get_world_size(cp_group) > 1:
            raise NotImplementedError("context parallelism with use_linear_ce_fusion_loss")
        if (start, end) != (rank * len(weight), (rank + 1) * len(weight)):
            raise NotImplementedError(f"an lm_head of {len(weight)} rows for the ids {start} to {end} of rank {rank}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
            if ranks > 1:
                hidden = _Gathered.apply(hidden, group)
            labels = target.roll(-1, dims=-1)
            labels[:, -1] = IGNORED
            sharded = {"vocab_group": group} if ranks > 1 else {}
            return linear_logps(hidden, weight, labels.T, **sharded, **replacements.options).T[:, :-1]

    return logps


_function = {"from_parallel_hidden_states_to_logprobs": _sharded_logps}
_adapter = Adapter("nemo_rl", {}, {"nemo_rl.distributed.model_utils": _function})
patch, unpatch = _adapter.patch, _adapter.unpatch
