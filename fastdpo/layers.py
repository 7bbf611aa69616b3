"""The head and its loss as modules without state, for `kernels`, Hugging Face's package, which gives a module of yours
the `forward` of one of these: `use_kernel_forward_from_hub`, `kernelize`. docs/hub.md has an example.

    loss = -sum of log p(label) / number of labels        of each position's next label, without the logits
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad

from .logps import linear_logps
from .validation import check_number


class LinearLogps(nn.Module):
    """`linear_logps` with its defaults: shaped like `labels`, which are shifted already; 0 where they are -100."""

    can_torch_compile: bool = True

    def forward(
        self,
        hidden_states: Tensor,  # [..., H]
        weight: Tensor,  # [V, H]
        labels: Tensor,  # [...]
        bias: Tensor | None = None,  # [V]
    ) -> Tensor:
        return linear_logps(hidden_states, weight, labels, bias)


class LinearCausalLMLoss(nn.Module):
    """The loss of a causal language model from its last hidden states, without the logits.

    Equivalent to transformers' ``ForCausalLMLoss(linear(hidden_states, weight, bias), labels, vocab_size, ...)``: the
    mean over the labels that are not `ignore_index`, or their sum over `num_items_in_batch`. A batch without any has
    loss 0 and no gradient, where torch's mean is NaN.

    Args of `forward`:
        labels: ``[B, T]``, those of the same positions: they are shifted here. None where `shift_labels` is given.
        num_items_in_batch: labels in the whole batch of which this is a part, a number or a tensor of one.
        shift_labels: ``[B, T]``, shifted already, in the place of `labels`.
    """

    can_torch_compile: bool = True

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, H]
        weight: Tensor,  # [V, H]
        labels: Tensor | None = None,  # [B, T]
        bias: Tensor | None = None,  # [V]
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,  # [B, T]
    ) -> Tensor:
        if shift_labels is None:
            if labels is None:
                raise ValueError("labels or shift_labels must be given; got neither")
            shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
        logps = linear_logps(hidden_states, weight, shift_labels, bias, ignore_index=ignore_index)
        if num_items_in_batch is None:
            return -logps.sum() / (shift_labels != ignore_index).sum().clamp(min=1)
        if not isinstance(num_items_in_batch, Tensor):
            check_number("num_items_in_batch", num_items_in_batch, 0.0, above=True)
        elif num_items_in_batch.numel() != 1:
            raise ValueError(f"num_items_in_batch must have one element; got shape {tuple(num_items_in_batch.shape)}")
        else:
            num_items_in_batch = num_items_in_batch.to(logps.device).view(())
        return -logps.sum() / num_items_in_batch
