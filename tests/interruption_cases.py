"""Small steps to be interrupted: what the caller owns, and what is computed of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from heads import small_head
from torch import Tensor

import fastdpo
from fastdpo.microbatches import interleave, paired, restore


def _gradients(outputs: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    total = sum((x.double() * torch.linspace(0.5, 1.5, x.numel()).view(x.shape)).sum() for x in outputs)
    found = torch.autograd.grad(total, list(leaves.values()))
    return {f"d{name}": x for name, x in zip(leaves, found)}


def _of_head(compute: Callable, dtype=torch.float32, **sizes) -> Callable:
    """`compute(head)` gives outputs by name, of a small head."""

    def case():
        torch.manual_seed(0)
        head = small_head(**({"N": 12, "V": 300, "H": 16, "masked": True} | sizes)).leaves(dtype)
        leaves = head.tensors()

        def run() -> dict[str, Tensor]:
            torch.manual_seed(1)
            outputs = compute(head)
            grads = _gradients([x for x in outputs.values() if x.requires_grad], leaves)
            return {name: x.detach() for name, x in outputs.items()} | grads

        return {**leaves, "labels": head.labels}, run

    return case


def _logps(**options):
    return lambda h: {"logps": fastdpo.linear_logps(h.hidden, h.weight, h.labels, h.bias, lora=h.lora, **options)}


def _stats(h) -> dict[str, Tensor]:
    found = fastdpo.linear_token_stats(h.hidden, h.weight, h.labels, h.bias, lora=h.lora, seed=3)._asdict()
    return {name: x for name, x in found.items() if x is not None}


def _several(h) -> dict[str, Tensor]:
    labels = torch.stack((h.labels, (h.labels + 7).clamp(min=0) % 300), 1)
    return {"logps": fastdpo.linear_logps(h.hidden, h.weight, labels, h.bias, seed=3)}


def _dpo(h, **options) -> dict[str, Tensor]:
    rows = h.hidden.view(4, 3, -1)
    reference = {"ref_hidden": rows.detach() * 0.9, "lora": h.lora, "bias": h.bias, "seed": 3}
    found = fastdpo.linear_dpo_loss(rows, h.weight, h.labels.view(4, 3), **reference, **options)
    return found._asdict() if hasattr(found, "_asdict") else vars(found)


def _divergence(h) -> dict[str, Tensor]:
    given = (h.hidden.detach() * 0.9, h.weight.detach() * 1.1, h.labels, h.bias, h.bias.detach())
    return {"jsd": fastdpo.linear_divergence(h.hidden, h.weight, *given, kind="jsd", lora=h.lora, seed=3).divergence}


def _topk(h) -> dict[str, Tensor]:
    ids = torch.arange(36).view(12, 3) * 8
    logps = -torch.linspace(1.1, 4.0, 36).view(12, 3)
    return {"kl": fastdpo.topk_divergence(h.hidden, h.weight, ids, logps, h.bias, lora=h.lora, seed=3)}


def _selective():
    torch.manual_seed(0)
    logits, index = torch.randn(5, 70, requires_grad=True), torch.randint(70, (5,))

    def run() -> dict[str, Tensor]:
        logps, entropy = fastdpo.selective_log_softmax(logits, index, return_entropy=True)
        return {"logps": logps.detach(), **_gradients([logps, entropy], {"logits": logits})}

    return {"logits": logits, "index": index}, run


def _preference(loss_type):
    def case():
        torch.manual_seed(0)
        leaves = {name: -torch.rand(5, requires_grad=True) * 3 for name in ("chosen_logps", "rejected_logps")}
        leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        rest = {"ref_chosen_logps": -torch.rand(5), "ref_rejected_logps": -torch.rand(5)}
        rest |= {"chosen_lengths": torch.arange(1, 6), "rejected_lengths": torch.arange(2, 7)}

        def run() -> dict[str, Tensor]:
            found = fastdpo.preference_loss(**leaves, **rest, loss_type=loss_type)
            return {"losses": found.losses.detach(), **_gradients([found.loss], leaves)}

        return leaves | rest, run

    return case


def _accumulated():
    """The gradient of a backward that failed is part of `main_grad`: what it was is put back by the caller."""
    owned, _ = _of_head(_logps())()
    weight = owned["weight"]
    weight.main_grad = torch.zeros(weight.shape)
    hidden, labels = owned["hidden"], owned["labels"]

    def run() -> dict[str, Tensor]:
        weight.main_grad.zero_()
        logps = fastdpo.linear_logps(hidden, weight, labels, accumulate_into="main_grad", seed=3)
        try:
            (logps * torch.linspace(0.5, 1.5, 12)).sum().backward()
            return {"main_grad": weight.main_grad.clone(), "dhidden": hidden.grad.clone()}
        finally:
            hidden.grad = None

    return {"hidden": hidden, "weight": weight, "labels": labels}, run


def _microbatches():
    torch.manual_seed(0)
    x, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8)
    loss = paired(lambda output, labels: (output.sum(1) * labels).mean())

    def run() -> dict[str, Tensor]:
        rows, order = interleave(x, 2), interleave(torch.arange(8), 2)
        losses = [loss(rows[i : i + 4], order[i : i + 4], labels=labels) for i in (0, 4)]
        return _gradients([*losses, restore(rows, 2)], {"x": x})

    return {"x": x, "labels": labels}, run


def _model(body: Callable) -> Callable:
    """`body(model, batch)` of a small patched model gives outputs; gradients are of its head and embeddings."""

    def case():
        from causal_models import batch, build

        model, given = fastdpo.patch_model(build(), seed=3), batch()
        leaves = {name: x for name, x in model.named_parameters() if "embed" in name or "head" in name}

        def run() -> dict[str, Tensor]:
            outputs = body(model, given)
            return {name: x.detach() for name, x in outputs.items()} | _gradients(list(outputs.values()), leaves)

        return leaves | given, run

    return case


def _lazily(model, given) -> dict[str, Tensor]:
    from fastdpo.integrations import lazy_logits

    with lazy_logits(model, seed=3):
        logits = model(given["input_ids"]).logits
    return {"logps": logits.log_softmax(-1).gather(-1, given["input_ids"][..., None])}


def _split_head(model, given) -> dict[str, Tensor]:
    from fastdpo.integrations.trl_head import in_forward_of

    class Scores(tuple):
        def __new__(cls, *values):
            return super().__new__(cls, values)

    head = model.lm_head
    hidden = model.model.embed_tokens(given["input_ids"])

    def score(hidden, weight, bias):
        labels = given["input_ids"].reshape(-1)
        return Scores(fastdpo.linear_logps(hidden.reshape(len(labels), -1), weight, labels, bias, seed=3))

    return {"logps": in_forward_of(head, hidden, score)[0]}


def _patching():
    """A model is then as it was or patched, and can be patched again and be as it was."""
    from causal_models import batch, build

    model, given = build().train(), batch()

    def attributes() -> dict:
        found = {}
        for name, module in model.named_modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            found[name] = (module.training, hooks, {key: vars(module)[key] for key in vars(module) if key[0] != "_"})
            found[name, "own"] = [key for key in vars(module) if "fastdpo" in key or "replicate" in key]
        return found

    before = attributes()

    def run() -> dict[str, Tensor]:
        assert [x.training for x in model.modules()] == [True] * len(list(model.modules())), "other training modes"
        fastdpo.patch_model(model, seed=3)
        found = {"logps": model(**given, fastdpo=True).logps.detach()}
        fastdpo.unpatch_model(model)
        assert attributes() == before, "something of the patch stays"
        return found

    return dict(given), run


CASES: dict[str, Callable] = {
    "routed": _of_head(_logps(seed=3, tau=0.05), bias=True, lora=True),
    "routed, bf16": _of_head(_logps(seed=3, tau=(0.05, 0.01)), torch.bfloat16),
    "exact": _of_head(_logps(backward="exact", softcap=20.0), bias=True),
    "fp64": _of_head(_logps(seed=3), torch.float64, lora=True),
    "statistics": _of_head(_stats, bias=True),
    "several labels": _of_head(_several, bias=True),
    "accumulated": _accumulated,
    "DPO": _of_head(_dpo, bias=True, lora=True),
    "TDPO": _of_head(lambda h: _dpo(h, loss_type="tdpo2"), bias=True),
    "divergence": _of_head(_divergence, bias=True, lora=True),
    "top-k": _of_head(_topk, bias=True, lora=True),
    "selective": _selective,
    "preference": _preference("ipo"),
    "preference, ranked": _preference(["aot", "sft"]),
    "microbatches": _microbatches,
    "a patched model": _model(lambda model, given: {"logps": model(**given, fastdpo=True).logps}),
    "lazy logits": _model(_lazily),
    "a split head": _model(_split_head),
    "patching": _patching,
}
