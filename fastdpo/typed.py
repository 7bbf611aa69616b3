"""The options that functions take by `**options`, for type checkers and editors; tests/test_typed.py holds them to the
tables that are read. Nothing here is imported where the library runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack as Unpack  # typing's from Python 3.11 on

    Group = ProcessGroup | DeviceMesh
    LoRATensors = tuple[Tensor, Tensor, float]  # A [r, H], B [V, r], s


class TrainerOptions(TypedDict, total=False):
    """Of `patch_trl`, every trainer's `patch` and `lazy_logits`."""

    backward: str
    tau: float | tuple[float, float] | None
    seed: int | None


class ModelOptions(TrainerOptions, total=False):
    """Of `patch_model`."""

    temperature: float
    ignore_index: int
    check_labels: bool
    accumulate_into: str | None


class OtherLossOptions(TypedDict, total=False):
    """Of `preference_loss` beside `beta` and `loss_type`."""

    loss_weights: list[float] | None
    label_smoothing: float
    f_divergence_type: str
    f_alpha_divergence_coef: float
    discopop_tau: float
    simpo_gamma: float
    dpop_lambda: float
    slic_delta: float
    kto_kl: float | Tensor
    desirable_weight: float
    undesirable_weight: float
    tdpo_alpha: float


class LossOptions(OtherLossOptions, total=False):
    """Of `preference_loss`."""

    beta: float
    loss_type: str | list[str]


class OtherDPOOptions(ModelOptions, OtherLossOptions, total=False):
    """Of `LinearDPOLoss` beside `beta` and `loss_type`."""

    logit_scale: float
    softcap: float | None
    vocab_group: Group | None
    ld_alpha: float | None
    use_weighting: bool
    average_log_prob: bool
    seq_group: Group | None
    seq_grads: str


class DPOOptions(OtherDPOOptions, LossOptions, total=False):
    """Of `linear_dpo_loss`."""
