"""A tiny Llama and four preference pairs, the same on every rank: what the scripts of this folder train."""

import os

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

PAIRS, LENGTH = 4, 24


def start() -> tuple[int, int, torch.device]:
    """(rank, ranks, device) of a process that torchrun started, in a group of all."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    return dist.get_rank(), dist.get_world_size(), device


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            initializer_range=0.2,
        )
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) [2 * PAIRS, LENGTH]: the chosen completions first, the rejected after them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1000, (2 * PAIRS, LENGTH), generator=generator)
    labels = ids.clone()
    for row, length in enumerate(torch.randint(4, 12, (2 * PAIRS,), generator=generator).tolist()):
        labels[row, :length] = -100  # the prompt
    return ids, labels
