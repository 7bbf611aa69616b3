"""What a call takes for granted about the process around it: memory, threads, forks, repetition, files."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from heads import small_head

import fastdpo

ROUTED = {"tau": 0.3, "seed": 5}


def leaves_of(head):
    return head.leaves(torch.float32)


def log_probs(head):
    x = leaves_of(head)
    given, options = (x.hidden, x.weight, x.labels, x.bias), {"softcap": 5.0, "temperature": 1.3, **ROUTED}
    stats = fastdpo.linear_token_stats(*given, stats=("entropy",), lora=x.lora, **options)
    return x, (stats.logps, stats.entropy)


def divergence(head, **options):
    x = leaves_of(head)
    found = fastdpo.linear_divergence(
        x.hidden, x.weight, x.hidden.detach() + 0.1, x.weight.detach(), x.labels, x.bias, x.bias.detach(), **options
    )
    return x, (found.divergence,)


def topk(head):
    x = leaves_of(head)
    ids = torch.arange(4) * 30 + torch.arange(len(x.labels))[:, None] % 7
    teacher = (torch.ones(ids.shape) / 5).log()
    return x, (fastdpo.topk_divergence(x.hidden, x.weight, ids, teacher, x.bias, **ROUTED),)


def dpo(head):
    x = leaves_of(head)
    count = len(x.labels) // 2 * 2
    hidden, labels = x.hidden[:count].view(2, count // 2, -1), x.labels[:count].view(2, -1)
    found = fastdpo.linear_dpo_loss(hidden, x.weight, labels, bias=x.bias, ref_logps=torch.zeros(2), **ROUTED)
    return x, (found.loss, found.chosen_rewards)


def selective(head):
    logits = torch.linspace(-3, 3, len(head.labels) * 300).view(-1, 300).sin().requires_grad_()
    x = type(head)(logits, logits.detach(), head.labels)
    return x, fastdpo.selective_log_softmax(logits, head.labels % 300, return_entropy=True)


def preference(head):
    x = leaves_of(head)
    chosen, rejected = x.hidden.sum(1), x.hidden.sin().sum(1)
    found = fastdpo.preference_loss(chosen, rejected, chosen.detach() / 2, rejected.detach() / 3)
    return x, (found.loss, found.losses)


CALLS = {
    "log-probs": log_probs,
    "divergence": lambda head: divergence(head, **ROUTED),
    "jsd": lambda head: divergence(head, kind="jsd", backward="exact"),
    "top-k": topk,
    "dpo": dpo,
    "selective": selective,
    "preference": preference,
}
every_call = pytest.mark.parametrize("call", CALLS)


def step(head, call: str = "log-probs"):
    """What a call returns, and every gradient, of fresh leaves."""
    x, outputs = CALLS[call](head)
    sum((i + 1) * y.sum() for i, y in enumerate(outputs) if y.requires_grad).backward()
    return [*(y.detach() for y in outputs), *(leaf.grad for leaf in x.tensors().values() if leaf.grad is not None)]


def same(found, expected) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_gradcheck_of_log_probs_and_statistics():
    head = small_head(N=3, V=131, H=3, bias=True, lora=True)

    def outputs(hidden, weight, bias, a, b, backward):
        options = {"lora": (a, b, head.lora[2]), "backward": backward, "softcap": 3.0, "logit_scale": 0.9}
        options |= {} if backward == "exact" else {"tau": 0.0, "seed": 1}
        found = fastdpo.linear_token_stats(
            hidden, weight, torch.tensor([130, -100, 7]), bias, stats=("entropy",), **options
        )
        return found.logps, found.entropy

    for backward in ("exact", "routed"):
        leaves = head.leaves(torch.float64).tensors().values()
        assert torch.autograd.gradcheck(lambda *x, how=backward: outputs(*x, how), tuple(leaves))


@every_call
@pytest.mark.slow_in_the_interpreter
def test_the_same_bits_again_and_again(engine, call):
    head = small_head(N=9, V=300, H=16, bias=True, lora=True, masked=True)
    first = step(head, call)
    for _ in range({"cpu": 1000 if call == "log-probs" else 100, "reference": 30, "triton": 2}[engine]):
        assert same(step(head, call), first)


@every_call
def test_nothing_is_read_before_it_is_written(engine, call):
    """What torch.empty gives is NaN under deterministic algorithms."""
    head = small_head(N=9, V=300, H=16, bias=True, lora=True, masked=True)
    first = step(head, call)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        second = step(head, call)
    finally:
        torch.use_deterministic_algorithms(before)
    for found, expected in zip(second, first, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@every_call
@pytest.mark.slow_in_the_interpreter
def test_threads_at_once_get_what_each_gets_alone(engine, call):
    heads = [small_head(N=5 + i, V=130 + 64 * i, H=8 + 4 * i, bias=True, masked=i % 2 == 0) for i in range(4)]
    alone = [step(head, call) for head in heads]
    barrier = threading.Barrier(len(heads))

    def work(i: int) -> bool:
        barrier.wait()
        return all(same(step(heads[i], call), alone[i]) for _ in range(1 if engine == "triton" else 20))

    with ThreadPoolExecutor(len(heads)) as pool:
        assert all(pool.map(work, range(len(heads))))


class Scored(torch.utils.data.Dataset):
    """Log-probs that a loader's workers compute: processes that were forked after the parent had computed."""

    def __init__(self, head):
        self.head = head

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.stack([step(self.head)[0], torch.full_like(step(self.head)[0], torch.get_num_threads())])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_loaders_workers_compute_too(monkeypatch, context):
    monkeypatch.setenv("FASTDPO_ENGINE", "cpu")
    head = small_head(N=200, V=300, H=16, masked=True, bias=True)
    expected = step(head)[0]
    loader = torch.utils.data.DataLoader(
        Scored(head), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120
    )
    for logps, threads in loader:
        torch.testing.assert_close(logps, expected)
        assert (threads == 1).all()  # torch's own rule for workers, which the kernels keep
    assert same(step(head)[:1], [expected])


class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(16, 300)

    def forward(self, hidden, labels):
        return fastdpo.linear_logps(hidden, self.head.weight, labels, self.head.bias)


def test_an_exported_program_computes_the_same_after_its_file(monkeypatch):
    monkeypatch.setenv("FASTDPO_ENGINE", "cpu")
    model, labels = Scores(), torch.randint(0, 300, (7,))
    hidden, batch = torch.randn(7, 16), torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(model, (hidden, labels), dynamic_shapes=({0: batch}, {0: batch}))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (7, 40):
        hidden, labels = torch.randn(count, 16), torch.randint(0, 300, (count,))
        torch.testing.assert_close(loaded(hidden, labels), model(hidden, labels))


def test_a_loss_module_is_copied_and_pickled():
    loss = fastdpo.LinearDPOLoss(beta=0.3, loss_type="ipo")
    head = small_head(N=12, V=300, H=16).leaves(torch.float32, False)
    given = head.hidden.view(4, 3, 16), head.weight, head.labels.view(4, 3)
    expected = loss(*given, ref_logps=torch.zeros(4)).loss
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(*given, ref_logps=torch.zeros(4)).loss, expected)
