"""Liger: its chunked losses as `linear_dpo_loss`, `preference_loss` and `linear_divergence`."""

from __future__ import annotations

import inspect

import torch

import fastdpo

SHAPES: dict[str, str] = {}
COMPARISONS = ("test.utils:assert_verbose_allclose",)


def patch(options: dict) -> None:
    from liger_kernel import chunked_loss
    from liger_kernel.chunked_loss import cpo_loss, dpo_loss, functional, jsd_loss, kto_loss, orpo_loss, simpo_loss

    def stand_in(function, theirs, name: str) -> None:
        """`apply` of theirs; the arguments that are tensors and numbers in the order of its forward."""
        signature = inspect.signature(theirs.forward)

        def apply(*args, **kwargs):
            # A classmethod's signature without cls, and without the context
            given = signature.bind(None, *args, **kwargs)
            given.apply_defaults()
            return function(options=options, **dict(list(given.arguments.items())[1:]))

        theirs.apply = staticmethod(apply)
        setattr(functional, f"liger_fused_linear_{name}", apply)

    stand_in(dpo, dpo_loss.LigerFusedLinearDPOFunction, "dpo")
    stand_in(cpo, cpo_loss.LigerFusedLinearCPOFunction, "cpo")
    stand_in(simpo, simpo_loss.LigerFusedLinearSimPOFunction, "simpo")
    stand_in(orpo, orpo_loss.LigerFusedLinearORPOFunction, "orpo")
    stand_in(kto, kto_loss.LigerFusedLinearKTOFunction, "kto")
    stand_in(jsd, jsd_loss.LigerFusedLinearJSDFunction, "jsd")
    assert chunked_loss.LigerFusedLinearDPOLoss.__module__ == dpo_loss.__name__  # its modules call what was replaced


def dpo(
    options, _input, weight, target, bias, ref_input, ref_weight, ref_bias, ignore_index, beta, compute_nll_loss,
    use_ref_model, average_log_prob, loss_type, label_smoothing, discopop_tau, alpha, **_,
):  # fmt: skip
    loss = {"beta": beta, "loss_type": loss_type, "average_log_prob": average_log_prob}
    if loss_type in ("exo_pair", "robust"):
        loss["label_smoothing"] = label_smoothing
    if loss_type == "discopop":
        loss["discopop_tau"] = discopop_tau
    reference = {}
    if use_ref_model:
        reference = {
            "ref_hidden": ref_input,
            "ref_weight": ref_weight,
            "ref_bias": False if ref_bias is None else ref_bias,
        }
    nll = alpha if compute_nll_loss else None
    return _preference(options, _input, weight, target, bias, ignore_index, nll, loss | reference)


def cpo(
    options, _input, weight, target, bias, ignore_index, beta, alpha, label_smoothing, compute_nll_loss,
    average_log_prob, **_,
):  # fmt: skip
    loss = {"beta": beta, "loss_type": "cpo", "label_smoothing": label_smoothing, "average_log_prob": average_log_prob}
    return _preference(options, _input, weight, target, bias, ignore_index, alpha if compute_nll_loss else None, loss)


def simpo(
    options, _input, weight, target, bias, ignore_index, beta, alpha, label_smoothing, compute_nll_loss, gamma, **_
):
    loss = {"beta": beta, "loss_type": "simpo", "label_smoothing": label_smoothing, "simpo_gamma": gamma}
    return _preference(options, _input, weight, target, bias, ignore_index, alpha if compute_nll_loss else None, loss)


def orpo(options, _input, weight, target, bias, ignore_index, beta, compute_nll_loss, nll_target, **_):
    loss = {"beta": beta, "loss_type": "orpo"}
    nll = 1.0 if compute_nll_loss and nll_target is None else None
    total, outputs = _preference(options, _input, weight, target, bias, ignore_index, nll, loss)
    if compute_nll_loss and nll_target is not None:
        half = len(target) // 2
        labels = nll_target[:half]
        logps = fastdpo.linear_logps(_input[:half], weight, labels, bias, ignore_index=ignore_index, **options)
        nll_loss = -logps.sum() / (labels != ignore_index).sum()
        total, outputs = total + nll_loss, (*outputs[:4], nll_loss.detach(), *outputs[5:])
    log_odds = [x - torch.log1p(-torch.exp(x)) for x in outputs[:2]]
    log_odds = log_odds[0] - log_odds[1]
    return total, (*outputs, torch.nn.functional.logsigmoid(log_odds).mean(), log_odds.mean())


def _preference(options, hidden, weight, labels, bias, ignore_index, nll: float | None, loss: dict):
    """Liger's order of results; `nll` is the weight of the chosen sequences' likelihood beside the loss."""
    half = len(labels) // 2
    lengths = (labels != ignore_index).sum(1)
    per_token = loss["loss_type"] in ("simpo", "orpo")
    if nll is not None:
        loss = loss | {"loss_type": [loss["loss_type"], "sft"], "loss_weights": [1.0, nll]}
    out = fastdpo.linear_dpo_loss(hidden, weight, labels, bias=bias, ignore_index=ignore_index, **loss, **options)
    logps = torch.cat([out.chosen_logps, out.rejected_logps]).detach()
    averaged = loss.get("average_log_prob", False)
    nll_loss = torch.zeros(())
    if nll is not None:
        sums = logps[:half] * lengths[:half] if averaged else logps[:half]
        nll_loss = -sums.sum() / lengths[:half].sum()
    if per_token:
        logps = logps / lengths
    with torch.no_grad():  # Liger's mean is over all rows, ignored ones too
        means = fastdpo.linear_token_stats(hidden, weight, torch.zeros_like(labels), bias, stats=("mean_logit",))
    means = means.mean_logit
    metrics = (logps[:half], logps[half:], means[:half].mean(), means[half:].mean(), nll_loss)
    return out.loss, (*metrics, out.chosen_rewards, out.rejected_rewards)


def kto(
    options, _input, weight, target, preference_labels, bias, ref_input, ref_weight, ref_bias, kl, ignore_index, beta,
    use_ref_model, average_log_prob, **_,
):  # fmt: skip
    lengths = (target != ignore_index).sum(1)

    def sequences(hidden, weight, bias):
        logps = fastdpo.linear_logps(hidden, weight, target, bias, ignore_index=ignore_index, **options).sum(1)
        return logps / lengths if average_log_prob else logps

    logps, ref = sequences(_input, weight, bias), torch.zeros(len(target))
    if use_ref_model:
        with torch.no_grad():
            ref = sequences(ref_input, ref_weight, ref_bias)
    if kl is not None:  # Liger's may be negative, where ours, as TRL's, is not: it moves the reference instead
        ref = ref + kl.detach().float()
    nothing = torch.zeros_like(logps)
    loss = {"beta": beta, "loss_type": "kto"}
    # Unpaired: each row's other side is nothing, of weight zero
    chosen = fastdpo.preference_loss(logps, nothing, ref, nothing, undesirable_weight=0.0, **loss)
    rejected = fastdpo.preference_loss(nothing, logps, nothing, ref, desirable_weight=0.0, **loss)
    total = 2 * torch.where(preference_labels, chosen.losses, rejected.losses).mean()
    with torch.no_grad():
        means = fastdpo.linear_token_stats(_input, weight, torch.zeros_like(target), bias, stats=("mean_logit",))
        logits = means.mean_logit.sum(1) * weight.shape[0]

    def both(x):
        return (x * preference_labels).sum(), (x * ~preference_labels).sum()

    rewards = chosen.chosen_rewards + (0.0 if kl is None else beta * kl.detach().float())
    return total, (*both(logps.detach()), *both(logits), *both(rewards))


def jsd(
    options, student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias,
    weight_hard_loss, weight_soft_loss, beta, ignore_index, temperature, return_soft_hard_loss, **_,
):  # fmt: skip
    count = (true_labels != ignore_index).sum().clamp(min=1)
    soft = fastdpo.linear_divergence(
        student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias,
        kind="jsd", jsd_beta=beta, temperature=temperature, ignore_index=ignore_index, **options,
    ).divergence.sum() / count  # fmt: skip
    hard = torch.zeros(())
    if weight_hard_loss or return_soft_hard_loss:
        logps = fastdpo.linear_logps(
            student_input, student_weight, true_labels, student_bias, ignore_index=ignore_index, **options
        )
        hard = -logps.sum() / count
    loss = weight_hard_loss * hard + weight_soft_loss * soft
    return (loss, soft.detach(), hard.detach()) if return_soft_hard_loss else loss
