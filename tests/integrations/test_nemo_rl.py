"""The adapter of NeMo-RL, against its contract: PyPI has only a placeholder (0.0.0), and it needs Megatron and Ray.

NVIDIA-NeMo/RL, nemo_rl/distributed/model_utils.py at 0433dae8dd63000e10a925abf2a26b7972bc23e0:
`from_parallel_hidden_states_to_logprobs`, which that module's own forward of Megatron's GPTModel calls; and
`DPOLossFn`, which gets its result with chosen and rejected sequences interleaved.
"""

import sys
import types

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from fastdpo.integrations import nemo_rl

S, B, H, V = 12, 4, 32, 512


def contract():
    """Theirs for one rank, with autograd's gradients in place of its own, which are the same."""
    module = types.ModuleType("nemo_rl.distributed.model_utils")

    def from_parallel_hidden_states_to_logprobs(
        tensor_parallel_hidden_states, output_weight_layer, runtime_gather_output, target, vocab_start_index,
        vocab_end_index, tp_group, inference_only=False, cp_group=None, chunk_size=None,
    ):  # fmt: skip
        target = target.roll(shifts=-1, dims=-1)
        logits = torch.matmul(tensor_parallel_hidden_states, output_weight_layer.T).float().transpose(0, 1)
        logps = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return (logps.detach() if inference_only else logps)[:, :-1]

    module.from_parallel_hidden_states_to_logprobs = from_parallel_hidden_states_to_logprobs
    for name in ("nemo_rl", "nemo_rl.distributed"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[module.__name__] = module
    return module


@pytest.fixture
def module(tmp_path, monkeypatch):
    for name in ("nemo_rl", "nemo_rl.distributed", "nemo_rl.distributed.model_utils"):
        monkeypatch.setitem(sys.modules, name, None)  # taken away at the end
    module = contract()
    original = module.from_parallel_hidden_states_to_logprobs
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield module
    dist.destroy_process_group()
    nemo_rl.unpatch()
    assert module.from_parallel_hidden_states_to_logprobs is original


def tensors():
    torch.manual_seed(0)
    target = torch.randint(V, (B, S))
    return torch.randn(S, B, H, requires_grad=True), torch.randn(V, H).mul(0.3).requires_grad_(), target


def logps_of(module, hidden, weight, target, **options):
    """As `_gpt_forward_with_linear_ce_fusion` calls it."""
    start = dist.get_rank() * len(weight)
    given = {
        "vocab_start_index": start,
        "vocab_end_index": start + len(weight),
        "tp_group": dist.group.WORLD,
        "inference_only": False,
        "cp_group": None,
        "chunk_size": 4,
    }
    return module.from_parallel_hidden_states_to_logprobs(hidden, weight, None, target, **given | options)


def train(module):
    """Ten steps of DPO on a head and one layer before it, pairs interleaved."""
    hidden, weight, target = tensors()
    layer = torch.eye(H).requires_grad_()
    reference = logps_of(module, hidden.detach().flip(0), weight.detach().clone(), target, inference_only=True)
    mask = (torch.arange(S - 1) > 3).float()
    optimizer = torch.optim.AdamW([layer, weight], lr=3e-3)
    history = []
    for _ in range(10):
        logps = logps_of(module, hidden.detach() @ layer, weight, target)
        rewards = 0.1 * ((logps - reference) * mask).sum(-1)
        losses = -F.logsigmoid(rewards[::2] - rewards[1::2])
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        history.append([x.detach().clone() for x in (logps, losses, rewards, layer.grad, weight.grad)])
    return history


def test_parity(module):
    theirs, matmul, products = train(module), torch.matmul, []
    nemo_rl.patch()
    nemo_rl.patch(backward="exact")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "matmul", lambda *args: (products.append(args), matmul(*args))[1])
        ours = train(module)
    assert not products  # theirs makes its logits so
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    hidden, weight, target = tensors()
    assert logps_of(module, hidden, weight, target).requires_grad
    assert not logps_of(module, hidden, weight, target, inference_only=True).requires_grad


def test_what_is_refused(module, monkeypatch):
    with pytest.raises(TypeError, match="backwards"):
        nemo_rl.patch(backwards="exact")
    with monkeypatch.context() as m:
        m.delattr(module, "from_parallel_hidden_states_to_logprobs")
        with pytest.raises(RuntimeError, match="from_parallel_hidden_states_to_logprobs"):
            nemo_rl.patch()
    with monkeypatch.context() as m:
        m.setattr(module, "from_parallel_hidden_states_to_logprobs", lambda hidden, weight, bias: None)
        with pytest.raises(RuntimeError, match="bias"):
            nemo_rl.patch()
    nemo_rl.patch()
    hidden, weight, target = tensors()
    with pytest.raises(NotImplementedError, match="rows"):
        logps_of(module, hidden, weight, target, vocab_end_index=V - 1)
    with monkeypatch.context() as m:
        m.setattr(dist, "get_world_size", lambda group=None: 1 if group is dist.group.WORLD else 2)
        with pytest.raises(NotImplementedError, match="context parallelism"):
            logps_of(module, hidden, weight, target, cp_group="two ranks")


def rank_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    module = contract()
    nemo_rl.patch(backward="exact")
    hidden, weight, target = tensors()
    hidden, weight = (x.detach().chunk(2)[rank].clone().requires_grad_() for x in (hidden, weight))
    logps = logps_of(module, hidden, weight, target)
    (logps * torch.arange(S - 1.0)).sum().backward()
    torch.save((logps.detach(), hidden.grad, weight.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_tensor_parallel_ranks(module, tmp_path):
    """Sequence and vocabulary in halves: the log-probs and gradients of the whole."""
    hidden, weight, target = tensors()
    logps = logps_of(module, hidden, weight, target)
    (logps * torch.arange(S - 1.0)).sum().backward()
    folder = tmp_path / "ranks"
    folder.mkdir()
    torch.multiprocessing.spawn(rank_of_two, (str(folder),), nprocs=2)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for ours, _, _ in results:
        torch.testing.assert_close(ours, logps.detach(), rtol=1e-4, atol=1e-4)
    for i, grad in enumerate((hidden.grad, weight.grad), 1):
        torch.testing.assert_close(torch.cat([result[i] for result in results]), grad, rtol=1e-4, atol=1e-4)
