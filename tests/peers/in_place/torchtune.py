"""torchtune: its losses of log-probs as `preference_loss`, those of logits as `selective_log_softmax` and, with the
logits as hidden states of a head that is the identity, `linear_divergence`.
"""

from __future__ import annotations

import torch

import fastdpo

SHAPES: dict[str, str] = {}
COMPARISONS = ("tests.test_utils:assert_expected",)


def patch(options: dict) -> None:
    from torchtune.modules import loss
    from torchtune.rlhf import loss as of_preferences

    def preference(self, *logps, **more):
        out = fastdpo.preference_loss(*logps, **more)
        return out.losses, out.chosen_rewards, out.rejected_rewards

    def dpo(self, *logps):
        return preference(self, *logps, beta=self.beta, label_smoothing=self.label_smoothing)

    def rso(self, *logps):
        return preference(self, *logps, beta=self.gamma, loss_type="hinge")

    def cross_entropy(self, logits, labels, normalize=True):
        labels = torch.where(labels == self.ignore_index, -100, labels)
        return -fastdpo.selective_log_softmax(logits, labels).sum()

    def divergence(kind: str):
        def forward(self, student_logits, teacher_logits, labels, normalize=True):
            vocab_size, labels = student_logits.shape[-1], labels.reshape(-1)
            head = torch.eye(vocab_size, dtype=student_logits.dtype)
            student, teacher = student_logits.reshape(-1, vocab_size), teacher_logits.reshape(-1, vocab_size)
            total = fastdpo.linear_divergence(
                student, head, teacher, head, labels, kind=kind, ignore_index=self.ignore_index, **options
            ).divergence.sum()
            if kind == "forward_kl":  # torchtune's is the cross entropy: without the teacher's entropy
                picked = torch.where(labels == self.ignore_index, -100, 0)
                entropy = fastdpo.selective_log_softmax(teacher, picked, return_entropy=True)[1]
                total = total + entropy[picked == 0].sum()
            return total / (labels != self.ignore_index).sum().clamp(min=1) if normalize else total

        return forward

    of_preferences.DPOLoss.forward = dpo
    of_preferences.RSOLoss.forward = rso
    loss.CEWithChunkedOutputLoss.compute_cross_entropy = cross_entropy
    loss.ForwardKLLoss.forward = divergence("forward_kl")
    loss.ReverseKLLoss.forward = divergence("reverse_kl")
