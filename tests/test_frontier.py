"""examples/frontier: the task's reward, the RL baseline's gradient, what is measured, a small run of the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.frontier import evaluate, methods
from examples.frontier.model import LanguageModel
from examples.frontier.settings import DPO, METHODS, RL, RL_TRUE, SFT
from examples.frontier.task import LENGTH, PROMPT, VOCAB, Task, preferences

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_reward_adds_valences_turns_them_round_and_counts_a_word_once():
    task = Task()
    task.valence.zero_(), task.negates.zero_()
    task.valence[7], task.valence[8], task.negates[9] = 2.0, 0.5, True
    texts = torch.zeros(4, PROMPT + LENGTH, dtype=torch.int64)
    texts[0, PROMPT : PROMPT + 3] = torch.tensor([7, 8, 7])  # the second 7 does not count
    texts[1, PROMPT - 1 : PROMPT + 1] = torch.tensor([9, 7])  # the prompt ends in a negation
    texts[2, PROMPT : PROMPT + 3] = torch.tensor([8, 9, 8])  # nor does a negated one
    texts[3, :PROMPT] = 7  # nor do prompts
    assert task.reward(texts).tolist() == [2.5, -2.0, 0.5, 0.0]


def test_a_reader_prefers_as_bradley_and_terry_say(generator):
    task = Task()
    first, second = (task.text(1, generator).expand(20_000, -1) for _ in range(2))
    wanted = (task.reward(first[:1]) - task.reward(second[:1])).sigmoid().item()
    pairs = preferences(task, first, second, generator)
    assert 0.05 < wanted < 0.95 and abs((pairs.chosen == first).all(1).float().mean() - wanted) < 0.015


def test_sampling_with_kept_keys_is_the_whole_models(generator):
    """The words' frequencies are the probabilities that hidden states of whole texts give."""
    torch.manual_seed(0)
    model = LanguageModel(VOCAB, PROMPT + LENGTH)
    words = torch.randint(VOCAB, (2, PROMPT + LENGTH), generator=generator)
    whole, past, new = model.hidden(words), None, words[:, :PROMPT]
    for t in range(PROMPT, words.shape[1]):
        hidden, past = model._step(new, past, t - new.shape[1])
        assert torch.allclose(hidden[:, -1], whole[:, t - 1], atol=1e-5)
        new = words[:, t : t + 1]
    model.head.weight.data *= 4
    texts = model.sample(words[:1, :PROMPT].expand(10_000, -1), 1, generator)
    found = torch.bincount(texts[:, -1], minlength=VOCAB) / len(texts)
    wanted = (whole[0, PROMPT - 1] @ model.head.weight.T).softmax(0)
    assert (found - wanted).abs().max() < 5 * (wanted.max() / len(texts)).sqrt()


def test_rl_loss_has_the_gradient_of_its_objective():
    """All 27 texts of three words over a vocabulary of three, each with its probability: E[reward] - beta * KL."""
    torch.manual_seed(0)
    beta, rewards = 0.7, torch.randn(27, dtype=torch.float64)
    policy = [torch.randn(3**t, 3, dtype=torch.float64, requires_grad=True) for t in range(3)]  # logits by prefix
    reference = [torch.randn(3**t, 3, dtype=torch.float64).log_softmax(-1) for t in range(3)]
    texts = torch.cartesian_prod(*[torch.arange(3)] * 3)
    prefixes = [torch.zeros(27, dtype=torch.int64), texts[:, 0], 3 * texts[:, 0] + texts[:, 1]]
    every = [p.log_softmax(-1)[prefix] for p, prefix in zip(policy, prefixes)]  # [27, 3] each
    kl = torch.stack([(p.exp() * (p - r[prefix])).sum(-1) for p, r, prefix in zip(every, reference, prefixes)], 1)
    logps = torch.stack([p.gather(1, texts[:, t, None])[:, 0] for t, p in enumerate(every)], 1)
    ref_logps = torch.stack([r[prefix].gather(1, texts[:, t, None])[:, 0] for t, (r, prefix) in enumerate(zip(reference, prefixes))], 1)  # fmt: skip  # noqa: E501
    probability = logps.sum(1).exp()
    objective = (probability * (rewards - beta * (logps - ref_logps).sum(1))).sum()
    advantage = methods.what_follows(rewards, kl.detach(), beta)
    losses = methods.clipped_loss(logps, logps.detach(), kl, advantage, beta)
    wanted = torch.autograd.grad(objective, policy, retain_graph=True)
    found = torch.autograd.grad((probability.detach() * losses).sum(), policy)
    for x, y in zip(wanted, found):
        assert x.abs().max() > 1e-3 and torch.allclose(x, -y, atol=1e-12)


def test_a_baseline_is_the_mean_of_the_others():
    value = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 0.0], [5.0, 5.0], [5.0, 5.0], [5.0, 8.0]])
    found = methods.against_others(value, 3)
    assert found[:3, 0].tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    assert found[3:, 1].tolist() == pytest.approx([5 - 6.5, 5 - 6.5, 8 - 5])


def test_clipping_stops_a_word_that_went_far():
    logps = torch.tensor([[0.5, 0.5, -0.5, -0.5]], requires_grad=True)
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    zeros = torch.zeros(1, 4)
    (gradient,) = torch.autograd.grad(methods.clipped_loss(logps, zeros, zeros, advantage, 0.1).sum(), logps)
    assert (gradient == 0).tolist() == [[True, False, False, True]]


def test_the_ceiling_is_the_tilted_reference(monkeypatch, generator):
    """Completions of one word, whose optimum is a sum over the vocabulary."""
    monkeypatch.setattr(evaluate, "LENGTH", 1)
    torch.manual_seed(0)
    task, reference = Task(), LanguageModel(VOCAB, PROMPT + LENGTH)
    reference.head.weight.data *= 4
    prompts = task.prompts(3, generator)
    logps = (reference.hidden(prompts)[:, -1] @ reference.head.weight.T).log_softmax(-1).detach()
    texts = torch.cat([prompts.repeat_interleave(VOCAB, 0), torch.arange(VOCAB).repeat(3)[:, None]], 1)
    rewards = task.reward(texts).view(3, VOCAB)
    tilted = (logps + rewards / 0.8).log_softmax(-1)
    (found,) = evaluate.ceiling(
        reference, task, prompts, 20_000, [0.8, 1e-3], 0
    )  # a last one that samples do not reach
    gain = ((tilted.exp() - logps.exp()) * rewards).sum(1).mean().item()
    assert found["gain"] == pytest.approx(gain, abs=0.05)
    assert found["kl"] == pytest.approx((tilted.exp() * (tilted - logps)).sum(1).mean().item(), rel=0.05)


def test_between_points_reward_is_straight_in_the_root_of_kl():
    points = [{"kl": 4.0, "reward": 4.0}, {"kl": 0.0, "reward": 1.0}, {"kl": 1.0, "reward": 3.0}]
    assert evaluate.at_equal_kl(points, [0.0, 0.25, 1.0, 2.25, 4.0, 4.1]) == [1.0, 2.0, 3.0, 3.5, 4.0, None]


def test_kl_and_reward_of_a_policy_are_those_of_plain_torch(generator):
    torch.manual_seed(0)
    task, reference, policy = Task(), *(LanguageModel(VOCAB, PROMPT + LENGTH) for _ in range(2))
    prompts = task.prompts(32, generator)
    found = evaluate.stand(policy, reference, task, prompts, 5)
    words = policy.sample(prompts, LENGTH, torch.Generator().manual_seed(5))
    p, r = (m.head(m.hidden(words))[:, PROMPT - 1 : -1].log_softmax(-1) for m in (policy, reference))
    assert found["kl"] == pytest.approx((p.exp() * (p - r)).sum((1, 2)).mean().item(), rel=1e-4)
    assert found["reward"] == pytest.approx(task.reward(words).mean().item(), rel=1e-5)


def test_the_settings_are_the_best_of_the_committed_sweep():
    from examples.frontier.__main__ import CANDIDATES
    from examples.frontier.settings import FULL

    record = json.loads((RESULTS / "2026-11-cpu-frontier-sweep.json").read_text())
    assert len({len(candidates) for candidates in CANDIDATES.values()}) == 1
    for method, candidates in CANDIDATES.items():
        runs = [run for run in record["runs"] if run["method"] == method]
        reached = [sum(run["objective"] for run in runs if run["changes"] == candidate) for candidate in candidates]
        best = candidates[reached.index(max(reached))]
        assert len(runs) == 2 * len(candidates) and best.items() <= FULL.of(method).items()
    least = min((model for model in record["reward models"] if "changes" in model), key=lambda model: model["loss"])
    assert least["changes"].items() <= FULL.reward_model.items()


def test_the_committed_figure_was_made_with_the_settings():
    from dataclasses import asdict

    from examples.frontier.__main__ import at_levels
    from examples.frontier.settings import FULL

    record = json.loads((RESULTS / "2026-11-cpu-frontier.json").read_text())
    assert json.loads(json.dumps(asdict(FULL))).items() <= record["notes"].items()
    assert record["notes"]["cpu seconds"] < 600  # of one core
    assert record["at equal KL"] == at_levels(record["reference"], record["ceiling"], record["runs"])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    output = tmp_path_factory.mktemp("frontier")
    command = [sys.executable, "-m", "examples.frontier", "--quick", "--workers", "1", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return output, json.loads((output / "frontier.json").read_text()), done.stdout


@pytest.mark.slow
def test_a_quick_run_shows_every_method(quick):
    output, record, said = quick
    assert (output / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert all(method in said for method in METHODS)
    start = record["reference"]["reward"]
    for method in METHODS:
        runs = [run for run in record["runs"] if run["method"] == method]
        assert len(runs) == (1 if method == SFT else 2)
        for run in runs:
            end = run["points"][-1]
            assert end["kl"] > 0 and end["reward"] > start
    for method in (DPO, RL, RL_TRUE):
        high, low = sorted((run for run in record["runs"] if run["method"] == method), key=lambda run: -run["beta"])
        assert low["points"][-1]["kl"] > high["points"][-1]["kl"]


@pytest.mark.slow
def test_a_policy_repeats_bit_for_bit(quick, tmp_path):
    from examples.frontier import stages
    from examples.frontier.settings import QUICK

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert stages.train_reference(QUICK, tmp_path)["reward"] == quick[1]["reference"]["reward"]
        stages.compare(QUICK, tmp_path, 0)
        for method in (DPO, RL):
            again = stages.train(QUICK, tmp_path, stages.Run(method, 0.25, 0))["points"]
            runs = [run for run in quick[1]["runs"] if run["method"] == method and run["beta"] == 0.25]
            assert runs[0]["points"] == again
    finally:
        torch.set_num_threads(threads)


def test_no_workers_is_refused(capsys, tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from examples.frontier.__main__ import main

    assert main(["--workers", "0", "--output", str(tmp_path)]) == 2
    assert "--workers must be at least 1, not 0" in capsys.readouterr().err
