"""Calls as users write them, and what a type checker must say of them. `make types` reads it; nothing runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from typing_extensions import assert_type

    import fastdpo
    from fastdpo import integrations, layers
    from fastdpo.integrations import openrlhf

    def tokens(h: Tensor, w: Tensor, y: Tensor, group: ProcessGroup) -> None:
        assert_type(fastdpo.linear_logps(h, w, y, tau=(2**-10, 0.0), vocab_group=group), Tensor)
        assert_type(fastdpo.linear_token_stats(h, w, y).entropy, Tensor | None)
        assert_type(fastdpo.selective_log_softmax(h, y), Tensor)
        assert_type(fastdpo.selective_log_softmax(h, y, return_entropy=True), tuple[Tensor, Tensor])
        assert_type(fastdpo.linear_divergence(h, w, h, w, y, kind="jsd"), fastdpo.DivergenceOutput)
        assert_type(fastdpo.topk_divergence(h, w, y, h), Tensor)
        assert_type(layers.LinearCausalLMLoss().forward(h, w, y, num_items_in_batch=3), Tensor)
        fastdpo.linear_logps(h, w)  # type: ignore[call-arg]
        fastdpo.linear_logps(h, w, y, tau="small")  # type: ignore[arg-type]

    def losses(h: Tensor, w: Tensor, y: Tensor) -> None:
        out = fastdpo.linear_dpo_loss(h, w, y, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1], softcap=30.0)
        assert_type(out.loss, Tensor)
        assert_type(fastdpo.LinearDPOLoss(beta=0.2, ld_alpha=0.5).forward(h, w, y), fastdpo.DPOOutput)
        assert_type(fastdpo.preference_loss(h, h, label_smoothing=0.1).losses, Tensor)
        fastdpo.linear_dpo_loss(h, w, y, bta=0.1)  # type: ignore[call-arg]
        fastdpo.preference_loss(h, h, label_smoothing="0.1")  # type: ignore[arg-type]
        fastdpo.LinearDPOLoss(loss_type=3)  # type: ignore[arg-type]

    def models(model: nn.Linear) -> None:
        assert_type(fastdpo.patch_model(model, temperature=0.5), nn.Linear)
        assert_type(fastdpo.patch_trl(backward="exact"), bool)
        openrlhf.patch(seed=1)
        with integrations.lazy_logits(model, tau=0.01):
            pass
        fastdpo.patch_model(model, softcap=30.0)  # type: ignore[call-arg]
        assert_type(fastdpo.__version__, str)
