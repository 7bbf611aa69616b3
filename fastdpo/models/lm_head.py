"""What an lm_head would apply to hidden now: z = hidden @ weight.T + bias + s * (hidden @ A.T) @ B.T.

Linear modules, PEFT's LoRA (factors stay factors), DoRA, modules_to_save and trainable tokens. Whatever is
none of these, or has a forward or hooks of its own that this arithmetic would leave out, is refused by name.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules import module as every_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..head import HeadOptions, LogitTransform, LoRA
from ..logps import token_stats
from ..ops.problem import TokenStats
from ..validation import FLOATS
from .wrappers import (
    inside_of_tensor_parallel,
    is_dtensor,
    name_of,
    origin,
    refuse_sharded,
    refuse_wrapped_alone,
)

# Columns of hidden that dropout's side path takes are rounded up to this: TMA wants rows of 16 bytes
COLUMNS = 16


class AppliedHead(NamedTuple):
    """The tensors of one call of the door."""

    hidden: Tensor  # [..., H], or [..., H + r] where dropout gives LoRA's A another input than the head's
    weight: Tensor  # [V, H] or [V, H + r]
    bias: Tensor | None  # [V]
    lora: LoRA | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return *self[:3], *((None, None) if self.lora is None else self.lora[:2])

    def map(self, function) -> AppliedHead:
        """`function` of each tensor."""
        hidden, weight, bias, a, b = (None if x is None else function(x) for x in self.tensors)
        return AppliedHead(hidden, weight, bias, None if a is None else LoRA(a, b, self.lora.scale))

    def token_stats(
        self, labels: Tensor, transform: LogitTransform, options: HeadOptions, stats: tuple[str, ...]
    ) -> TokenStats:
        """Shaped like `labels`; `transform` in the place of what `options` say of it."""
        scale, softcap, temperature = transform
        options = replace(options, logit_scale=scale, softcap=softcap or None, temperature=temperature)
        hidden, weight, bias, lora = self
        # device_map may put inputs, hidden and head on three devices
        hidden, labels = hidden.to(weight.device), labels.to(weight.device)
        return token_stats(hidden, weight, labels, bias=bias, lora=lora, options=options, stats=stats)


def autocast_type(x: Tensor) -> torch.dtype | None:
    """On the device of `x`; None without autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast(x: Tensor, dtype: torch.dtype | None):
    return torch.autocast(x.device.type, dtype, enabled=dtype is not None)


def applied_head(module: nn.Module, hidden: Tensor) -> AppliedHead:
    """Takes the output embeddings and the hidden states [..., H] they are given.

    Raises:
        NotImplementedError: naming the module's type, or the adapter and the option, that is not supported; or the
            hook or the forward that would be left out. The caller runs the forward hooks of `module` itself.

    Guarantees:
        Plain and LoRA heads are never copied. DoRA, trainable tokens and LoRA with an active dropout cost one
        copy of `weight` per call; PEFT's own forward makes one for the first two, besides the logits.
    """
    _refuse_hooks_of_every_module()
    _refuse_backward_hooks(module)
    if "_orig_mod" in module._modules:  # torch.compile
        module = _inner(module._modules["_orig_mod"])
    auxiliary = _of_peft("utils.other", "AuxiliaryTrainingWrapper")
    saved = _of_peft("utils.other", "ModulesToSaveWrapper")
    tokens = _of_peft("utils.other", "TrainableTokensWrapper")
    if isinstance(module, auxiliary):
        _refuse_mixed_batches(module)
    if isinstance(module, saved):
        refuse_forward(module, saved)
        return AppliedHead(hidden, *_linear(_saved(module)), None)
    if isinstance(module, tokens):
        refuse_forward(module, tokens)
        module = _inner(module.token_adapter)
    lora, trainable = _of_peft("tuners.lora", "Linear"), _of_peft("tuners.trainable_tokens", "TrainableTokensLayer")
    for layer, applied in ((lora, _lora), (trainable, _trainable_tokens)):
        if isinstance(module, layer):
            refuse_forward(module, layer)
            return applied(module, hidden)
    if isinstance(module, (_of_peft("tuners.tuners_utils", "BaseTunerLayer"), auxiliary)):
        computed = "plain heads, heads in modules_to_save, trainable tokens, LoRA and DoRA"
        raise _refusal(module, f": fastdpo computes {computed}")
    return AppliedHead(hidden, *_plain(module), None)


class _NotLoaded:
    """In the place of a class that no module can be of."""


def _of_peft(where: str, name: str) -> type:
    """Looked up where PEFT has loaded it, and never imported: PEFT may be missing, broken or another release."""
    return getattr(sys.modules.get(f"peft.{where}"), name, _NotLoaded)


def _plain(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor):
        raise _refusal(module, ", which holds no weight")
    refuse_sharded(module, weight)
    if weight.is_meta:
        raise _refusal(module, " whose weight is offloaded (device meta)")
    subclass = is_traceable_wrapper_subclass(weight) and not is_dtensor(weight)
    if subclass or weight.dtype not in FLOATS or weight.ndim != 2:
        kind = type(weight.data).__name__ if subclass else weight.dtype
        instead = "leave the lm_head out of the quantisation (llm_int8_skip_modules, modules_to_not_convert)"
        raise _refusal(module, f" with a weight of {kind}: fastdpo does not compute quantised heads; {instead}")
    refuse_forward(module, nn.Linear)
    return weight, bias


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """`_plain`, of a module that another one calls."""
    return _plain(_inner(module))


def _saved(wrapper: nn.Module) -> nn.Module:
    """Which of its modules PEFT's modules_to_save would call now."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(name not in wrapper._adapters for name in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def refuse_forward(module: nn.Module, known: type) -> None:
    """Raises unless calling `module` runs the forward of `known`."""
    own = inside_of_tensor_parallel(module.__dict__.get("forward"))
    if type(module).forward is not known.forward or type(module).__call__ is not nn.Module.__call__:
        raise _refusal(module, ", which has a forward of its own")
    bound = getattr(own, "__func__", None) is known.forward and own.__self__ is module
    if own is None or bound or type(own).__module__.split(".")[0] == "fastdpo":  # lazy logits: the same of hidden
        return
    hook = module.__dict__.get("_hf_hook")  # accelerate's: the devices of a device_map
    hooks = getattr(hook, "hooks", (hook,))
    inner = getattr(module.__dict__.get("_old_forward"), "__func__", None)
    if inner is not known.forward or any(name_of(x) != "accelerate.hooks.AlignDevicesHook" for x in hooks):
        raise _refusal(module, f" whose forward was replaced by {getattr(own, '__qualname__', None) or name_of(own)}")


def _inner(module: nn.Module) -> nn.Module:
    """A module that is not run as it is: raises for a hook of it that is neither torch's nor of a call's own."""
    refuse_wrapped_alone(module)
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if not _is_known(hook):
            raise NotImplementedError(f"a forward hook, {origin(hook)}, on the {name_of(module)} inside of an lm_head")
    _refuse_backward_hooks(module)
    return module


def _refuse_backward_hooks(module: nn.Module) -> None:
    for hook in (*module._backward_pre_hooks.values(), *module._backward_hooks.values()):
        raise NotImplementedError(f"a backward hook, {origin(hook)}, on the lm_head: it would not run")


def _refuse_hooks_of_every_module() -> None:
    """A global pre-hook runs before what is given is looked at; another hook's work on the logits would be lost."""
    for when in ("forward_hooks", "backward_hooks", "backward_pre_hooks"):
        for hook in getattr(every_module, f"_global_{when}").values():
            if not _is_known(hook):
                raise NotImplementedError(f"a hook of every module, {origin(hook)}: its work on the head would be lost")


def _is_known(hook) -> bool:
    """torch's make the weight (weight_norm, prune), gather it (FSDP) or count; ours do nothing there."""
    return origin(hook).split(".")[0] in ("torch", "fastdpo")


def _lora(layer: nn.Module, hidden: Tensor) -> AppliedHead:
    """What PEFT's own forward would compute now."""
    _refuse_mixed_batches(layer)
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as PEFT's forward does
    weight, bias = _linear(layer.get_base_layer())
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return AppliedHead(hidden, weight, bias, None)

    for name in names:
        for factor in (layer.lora_A[name], layer.lora_B[name]):
            refuse_forward(_inner(factor), nn.Linear)
    factors = [(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])) for name in names]
    if not hasattr(layer, "lora_variant"):
        raise NotImplementedError("LoRA on the lm_head by a PEFT that does not say whether it is DoRA: before 0.16")
    dropped = [name for name in names if _drops(layer.lora_dropout[name])]
    variants = [name for name in names if name in layer.lora_variant]
    for name in variants:
        variant = type(layer.lora_variant[name]).__name__
        if variant != "DoraLinearVariant" or len(names) > 1 or dropped:
            raise NotImplementedError(
                f"{variant} on the lm_head (adapter {name!r}); fastdpo computes LoRA, and DoRA alone without dropout"
            )
    for name, (_, _, scale) in zip(names, factors):
        extra = layer.lora_B[name].bias  # of lora_bias=True
        if extra is not None:
            bias = extra * scale if bias is None else bias + extra * scale
    if variants:
        a, b, scale = factors[0]
        vector = layer.lora_magnitude_vector[names[0]]
        norm = vector.get_weight_norm(weight, (b @ a).detach().to(weight.dtype), scale).detach()
        ratio = (vector.weight / norm)[:, None]
        return AppliedHead(hidden, ratio * weight, bias, LoRA(a, ratio * b, scale))
    if dropped:
        return _with_dropout(layer, names, hidden, weight, bias)
    if len(factors) == 1:
        return AppliedHead(hidden, weight, bias, LoRA(*factors[0]))
    a = torch.cat([a for a, _, _ in factors])
    b = torch.cat([b * scale for _, b, scale in factors], dim=1)
    return AppliedHead(hidden, weight, bias, LoRA(a, b, 1.0))


def _with_dropout(layer: nn.Module, names: list[str], hidden: Tensor, weight: Tensor, bias) -> AppliedHead:
    """A sees dropout(hidden), the head hidden: A's products become columns of hidden, and A picks them."""
    products = []
    for name in names:
        a = layer.lora_A[name].weight
        products.append(layer.lora_A[name](layer.lora_dropout[name](hidden.to(a.dtype))) * layer.scaling[name])
    product = torch.cat(products, dim=-1)
    lora_rank = product.shape[-1]
    width = -(-lora_rank // COLUMNS) * COLUMNS
    wide = torch.cat((hidden, pad(product, (0, width - lora_rank)).to(hidden.dtype)), dim=-1)
    pick = torch.eye(lora_rank, width, dtype=hidden.dtype, device=hidden.device)
    a = torch.cat((pick.new_zeros(lora_rank, hidden.shape[-1]), pick), dim=1)
    b = torch.cat([layer.lora_B[name].weight for name in names], dim=1)
    return AppliedHead(wide, pad(weight, (0, width)), bias, LoRA(a, b, 1.0))


def _trainable_tokens(layer: nn.Module, hidden: Tensor) -> AppliedHead:
    if (layer.disable_adapters or not layer.active_adapters) and layer.merged:
        layer.unmerge()
    weight, bias = _linear(layer.base_layer)
    if not layer.disable_adapters and not layer.merged and layer.active_adapters:
        weight, bias = layer.get_merged_weights(layer.active_adapters), None  # PEFT leaves the bias out, too
    return AppliedHead(hidden, weight, bias, None)


def _drops(dropout: nn.Module) -> bool:
    if type(dropout) is nn.Dropout:
        return dropout.training and dropout.p > 0.0
    return type(dropout) is not nn.Identity


def _refuse_mixed_batches(module: nn.Module) -> None:
    if any("adapter_names" in getattr(hook, "keywords", {}) for hook in module._forward_pre_hooks.values()):
        raise NotImplementedError("several adapters in one batch (adapter_names) on the lm_head")


def _refusal(module: nn.Module, what: str) -> NotImplementedError:
    return NotImplementedError(f"an lm_head of type {name_of(module)}{what}")
