"""What FSDP, ZeRO-3 and tensor parallelism look like from an lm_head. Told by name: none of them need be installed.

FSDP, ZeRO-3        hooks gather parameters before a module's forward and drop them after it; on what it returns they
                    hang the gathering before the backward. Right for what is computed in that module's own forward
tensor parallel     parameters stay DTensors, split along the vocabulary
"""

from __future__ import annotations

from torch import Tensor, nn

FSDP = ("torch.distributed.fsdp", "torch.distributed._composable")
FSDP1 = "_fsdp_wrapped_module"


def origin(hook) -> str:
    """The qualified name of a function, or of an object's class."""
    hook = getattr(hook, "func", hook)  # functools.partial
    name = getattr(hook, "__qualname__", None)
    return name_of(hook) if name is None else f"{hook.__module__}.{name}"


def name_of(x) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


def gathers(hook) -> bool:
    """Whether it gathers or drops parameters, or sees to that in the backward."""
    return origin(hook).startswith((*FSDP, "deepspeed"))


def scored_module(head: nn.Module) -> nn.Module:
    """In whose forward parameters are gathered: FSDP1 does that in the forward of a module around it."""
    while FSDP1 in head._modules:
        head = head._modules[FSDP1]
    return head


def is_dtensor(x: Tensor) -> bool:
    return hasattr(x, "full_tensor")


def local(x: Tensor) -> Tensor:
    return x.to_local() if is_dtensor(x) else x


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if is_dtensor(x) else x


def placed_like(like: Tensor, x: Tensor) -> Tensor:
    """`x`, which is the same on every rank, split as `like` is."""
    if not is_dtensor(like):
        return x
    from torch.distributed.tensor import Replicate

    mesh = like.device_mesh
    whole = type(like).from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements)


def inside_of_tensor_parallel(forward):
    """The forward that transformers' own tensor parallelism has put another around, which places hidden and logits as
    the weight is split."""
    layer = "transformers.distributed.tensor_parallel.TensorParallelLayer"
    while origin(forward) == f"{layer}.install_forward.<locals>.tp_forward":
        inside = dict(zip(forward.__code__.co_freevars, forward.__closure__))
        forward = inside["original_forward"].cell_contents
    return forward


def refuse_before_gathering(model: nn.Module) -> None:
    """Raises where the parameters of `model` are split and its forward alone would not gather them."""
    if any(map(_has_fsdp, model.modules())):
        raise NotImplementedError("patch_model of a model that FSDP has been applied to: call patch_model before")
    parameter = next(model.parameters(), None)
    if _is_partitioned(parameter) and not any(map(gathers, model._forward_pre_hooks.values())):
        raise NotImplementedError(
            "patch_model of a model that deepspeed.zero.Init has split: call patch_model after deepspeed.initialize"
        )


def refuse_wrapped_alone(module: nn.Module) -> None:
    """Raises where parameters of `module`, which is inside of an lm_head and not called, are gathered in its own
    forward: by FSDP where that is applied to it, by ZeRO-3 always."""
    instead = None
    if _has_fsdp(module):
        instead = "apply FSDP to the whole lm_head, or to what it is in"
    elif any(_is_partitioned(x) for x in module.parameters(recurse=False)):
        instead = "under DeepSpeed ZeRO-3 leave the lm_head out of the adapters and of modules_to_save, or use FSDP"
    if instead is not None:
        raise NotImplementedError(
            f"a {name_of(module)} inside of an lm_head, with parameters gathered in its own forward alone: {instead}"
        )


def refuse_wrapped_between(model: nn.Module, head: nn.Module) -> None:
    """Raises where FSDP is applied to a module inside of `model` that the head is a part of: what that one returns has
    no gradient for its hooks to hang on."""
    if any(module is head for module in model._modules.values()):
        return
    for module in model.modules():
        between = module is not model and module is not head and any(x is head for x in module.modules())
        if between and _has_fsdp(module):
            raise NotImplementedError(
                f"FSDP applied to a {name_of(module)} that the lm_head is a part of: apply it to the head or the model"
            )


def refuse_sharded(module: nn.Module, weight: Tensor) -> None:
    """Raises for a part of a weight that a wrapper has not gathered."""
    if _is_partitioned(weight) and weight.numel() == 0:
        raise _ungathered(module, "DeepSpeed ZeRO-3")
    for hook in module._load_state_dict_post_hooks.values() if is_dtensor(weight) else ():
        for cell in getattr(hook, "__closure__", None) or ():  # FSDP2's record of a parameter is known to its module so
            if getattr(cell.cell_contents, "sharded_param", None) is weight:
                raise _ungathered(module, "FSDP")


def _has_fsdp(module: nn.Module) -> bool:
    return FSDP1 in module._modules or any(origin(hook).startswith(FSDP) for hook in module._forward_hooks.values())


def _is_partitioned(x: Tensor | None) -> bool:
    return hasattr(x, "ds_id")


def _ungathered(module: nn.Module, who: str) -> NotImplementedError:
    return NotImplementedError(
        f"an lm_head of type {name_of(module)} whose weight {who} has split and not gathered: call the model that was "
        "wrapped, and not a module inside of it"
    )
