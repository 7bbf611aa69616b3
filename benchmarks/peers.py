"""Every way to do one DPO step on the head, behind one signature: `step(problem)` -> (loss, dhidden, dweight).

A step is the policy's and the reference's log-probabilities, the sigmoid DPO loss and the backward into `hidden` and
`weight`. A peer that cannot run here raises `Unavailable` with the reason. pyproject.toml pins those that pip can
install: `bench` what runs on a CPU, `peers-gpu` the others. Left out of both: Unsloth and verl, which want older
transformers than the benchmarks run with (parts of unsloth_zoo are AGPL besides), Megatron's fused function, which no
release holds, and flash-attn, which is compiled on the spot for hours.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

BETA = 0.1
PACKAGES = (
    "trl", "liger-kernel", "cut-cross-entropy", "unsloth_zoo", "verl", "megatron-core", "quack-kernels", "fla-core",
    "flash-attn",
)  # fmt: skip

# What benchmarks.gpu.wheels takes along, pinned as in pyproject.toml and constraints.txt, with what they need beside
# torch, triton and transformers. Left out for its size: CuTe DSL, without which QuACK and Liger's scaled loss say so.
WHEELS = (
    "trl==1.16.0", "accelerate==1.15.0", "psutil==7.2.2", "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1",
    "fla-core==0.6.0", "einops==0.8.2",
)  # fmt: skip


class Unavailable(RuntimeError):
    pass


@dataclass
class Problem:
    hidden: Tensor  # [2B, T, H], requires grad; chosen sequences first
    weight: Tensor  # [V, H], requires grad (unless frozen)
    labels: Tensor  # [2B, T], -100 on the prompt
    ref_hidden: Tensor
    ref_weight: Tensor

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        self.hidden.grad = self.weight.grad = None
        loss.backward()
        return loss.detach(), self.hidden.grad, self.weight.grad


def _dpo(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """[2B] sequence log-probs of policy and reference -> the mean sigmoid loss."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -logsigmoid(BETA * (chosen - rejected)).mean()


def imported(module: str, name: str, package: str):
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{package} is not installed ({error})") from error


def _needs_gpu(x: Tensor, who: str, architecture: str = "", majors: tuple[int, ...] = ()) -> None:
    """`majors`: of the compute capabilities that are served, called `architecture`; any if there are none."""
    if x.device.type != "cuda":
        raise Unavailable(f"{who} need a GPU")
    if majors and torch.cuda.get_device_capability(x.device)[0] not in majors:
        raise Unavailable(f"{who} are for {architecture} only")


# Token level: (hidden [N, H], weight [V, H], labels [N], none of them ignored) -> log-probabilities [N]


def eager_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The model's own way: all logits, log_softmax, gather."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def trl_logps(hidden: Tensor, weight: Tensor, labels: Tensor, outputs: tuple[str, ...] = ()) -> Tensor:
    chunked = imported("trl.kernels", "ChunkedLogProbFunction", "trl >= 1.15")
    return chunked.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, outputs)[0]


def cce_logps(hidden: Tensor, weight: Tensor, labels: Tensor, impl: str = "cce", **options) -> Tensor:
    if impl != "torch_compile":
        _needs_gpu(hidden, "cut-cross-entropy's kernels")
    linear_cross_entropy = imported("cut_cross_entropy", "linear_cross_entropy", "cut-cross-entropy")
    if impl.upper() not in imported("cut_cross_entropy", "LinearCrossEntropyImpl", "cut-cross-entropy").__members__:
        raise Unavailable(f"this cut-cross-entropy has no {impl}: releases up to 25.1.1 lack it, its repository has it")
    try:
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl=impl, **options)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise Unavailable(f"torch.compile failed ({str(error).splitlines()[0]})") from error


def liger_scaled_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    _needs_gpu(hidden, "the kernels of Liger's scaled cross entropy", "Hopper", (9,))
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)
    except ImportError as error:  # CuTe DSL is imported at the first call
        raise Unavailable(f"liger-kernel >= 0.8.5 and nvidia-cutlass-dsl are not installed ({error})") from error


def unsloth_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """unsloth_zoo alone, which wants `unsloth` installed: importing that would replace TRL's functions too."""
    _needs_gpu(hidden, "Unsloth's kernels")
    os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")
    module = "unsloth_zoo.fused_losses.fused_linear"
    return imported(module, "fused_linear_logprobs", "unsloth")(hidden, weight, labels)


def verl_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    _needs_gpu(hidden, "verl's kernels")
    fused = imported("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", "verl")
    return fused(hidden, weight, labels, 1.0, "none")[0]  # and the entropies


def megatron_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    _needs_gpu(hidden, "Megatron's kernels", "Blackwell", (10,))
    module = "megatron.core.fusions.fused_linear_cross_entropy"
    fused = imported(module, "linear_cross_entropy", "a megatron-core with it (0.19.2 has none)")
    return -fused(hidden, weight, labels, reduction="none")


def no_token_logps(hidden: Tensor, weight: Tensor, labels: Tensor, why: str) -> Tensor:
    """Of a peer that cannot do DPO anywhere."""
    raise Unavailable(f"no loss per token: {why}")


def torch_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if fused is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    return -fused(hidden, weight, labels, reduction="none")


def fastdpo_logps(hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> Tensor:
    import fastdpo

    return fastdpo.linear_logps(hidden, weight, labels, **options)


# From logits [N, V] and labels [N] to log-probabilities [N]


def torch_selective(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def trl_selective(logits: Tensor, labels: Tensor) -> Tensor:
    return imported("trl.trainer.utils", "selective_log_softmax", "trl")(logits, labels)


def liger_selective(logits: Tensor, labels: Tensor) -> Tensor:
    """Writes the gradient over a copy of the logits in the forward: over the caller's own otherwise."""
    _needs_gpu(logits, "Liger's kernels")
    loss = imported("liger_kernel.transformers", "LigerCrossEntropyLoss", "liger-kernel")
    return -loss(reduction="none")(logits.clone(), labels)


def quack_selective(logits: Tensor, labels: Tensor) -> Tensor:
    _needs_gpu(logits, "QuACK's kernels", "Hopper and newer", (9, 10, 11, 12))
    return -imported("quack.cross_entropy", "cross_entropy", "quack-kernels")(logits, labels, reduction="none")


def fla_selective(logits: Tensor, labels: Tensor) -> Tensor:
    _needs_gpu(logits, "flash-linear-attention's kernels")
    loss = imported("fla.modules", "FusedCrossEntropyLoss", "fla-core")
    return -loss(reduction="none")(logits, labels)


def flash_attention_selective(logits: Tensor, labels: Tensor) -> Tensor:
    _needs_gpu(logits, "flash-attention's kernels")
    loss = imported("flash_attn.losses.cross_entropy", "CrossEntropyLoss", "flash-attn")
    return -loss(reduction="none")(logits, labels)


# One DPO step


def _step(p: Problem, token_logps: Callable, ref_logps: Callable | None = None, compact: bool = True):
    """`compact`: completion rows only."""
    mask = p.labels != -100
    everything = bool(mask.all())

    def sequence_logps(hidden, weight, token_logps):
        if compact and not everything:
            logps = token_logps(hidden[mask], weight, p.labels[mask])
            logps = logps.new_zeros(mask.shape).masked_scatter(mask, logps)
        else:
            logps = token_logps(hidden.flatten(0, 1), weight, p.labels.clamp(min=0).flatten()).view(mask.shape)
        return (logps * mask).sum(-1)

    with torch.no_grad():
        ref = sequence_logps(p.ref_hidden, p.ref_weight, ref_logps or token_logps)
    return p.gradients(_dpo(sequence_logps(p.hidden, p.weight, token_logps), ref))


def eager(p: Problem):
    return _step(p, eager_logps, compact=False)


def trl_compacted(p: Problem):
    """TRL's chunked function at its best: completion rows only, no statistics."""
    return _step(p, trl_logps)


def trl_trainer(p: Problem):
    """As TRL's DPOTrainer calls it on a CPU: every row, and the statistics it logs."""
    statistics = ("entropy", "mean_logits", "is_top1")
    return _step(p, partial(trl_logps, outputs=statistics), trl_logps, compact=False)


def liger(p: Problem):
    fused = imported("liger_kernel.chunked_loss", "LigerFusedLinearDPOLoss", "liger-kernel")
    loss_fn = fused(beta=BETA, compiled=False, use_ref_model=True, average_log_prob=False)
    loss, *_ = loss_fn(p.weight, p.hidden, p.labels, ref_input=p.ref_hidden, ref_weight=p.ref_weight)
    return p.gradients(loss)


def _fastdpo(p: Problem, **options):
    import fastdpo

    out = fastdpo.linear_dpo_loss(
        p.hidden, p.weight, p.labels, ref_hidden=p.ref_hidden, ref_weight=p.ref_weight, beta=BETA, **options
    )
    return p.gradients(out.loss)


def fastdpo_routed(p: Problem):
    return _fastdpo(p)


def fastdpo_exact(p: Problem):
    return _fastdpo(p, backward="exact")


FUSED: dict[str, Callable] = {
    "liger scaled ce": liger_scaled_logps,
    "cce": cce_logps,
    "cce unfiltered": partial(cce_logps, filter_eps=None),
    "cce_exact": partial(cce_logps, impl="cce_exact"),
    "cce_kahan_full_c": partial(cce_logps, impl="cce_kahan_full_c"),
    "cce torch_compile": partial(cce_logps, impl="torch_compile"),
    "unsloth": unsloth_logps,
    "verl": verl_logps,
    "megatron": megatron_logps,
    "quack": partial(no_token_logps, why="quack-kernels 0.6.5 fuses the head with a mean or a sum only"),
    "fla": partial(no_token_logps, why="flash-linear-attention 0.6.0 fuses the head with a mean or a sum only"),
    "torchtune": partial(no_token_logps, why="torchtune 0.6.1 has chunks of given logits, summed"),
    "torch linear_cross_entropy": torch_logps,
}
TOKEN_LOGPS: dict[str, Callable] = {"eager": eager_logps, "trl": trl_logps, **FUSED, "fastdpo": fastdpo_logps}
SELECTIVE_LOGPS: dict[str, Callable] = {
    "torch": torch_selective,
    "trl": trl_selective,
    "liger": liger_selective,
    "quack": quack_selective,
    "fla": fla_selective,
    "flash-attn": flash_attention_selective,
}
PEERS: dict[str, Callable] = {
    "eager": eager,
    "trl compacted": trl_compacted,
    "trl as its trainer": trl_trainer,
    "liger": liger,
    **{name: partial(_step, token_logps=run) for name, run in FUSED.items()},
    "fastdpo exact": fastdpo_exact,
    "fastdpo routed": fastdpo_routed,
}
OURS = ("fastdpo exact", "fastdpo routed")
