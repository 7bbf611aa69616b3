"""Shared by every test: the engines under test, and the seed printed when a test fails."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # Triton's kernels then run in its interpreter, which it decides when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from interpreter import interpreter_problem

import fastdpo

ENGINES = ("reference", "cpu", "triton")  # a new engine joins the whole suite by its name here


SEED = pytest.StashKey[int]()


def pytest_configure(config) -> None:
    """One seed for all of a run's processes."""
    run = getattr(config, "workerinput", {}).get("testrunuid") or os.urandom(8).hex()
    config.stash[SEED] = int(os.environ.get("FASTDPO_TEST_SEED", random.Random(run).randrange(2**31)))


def pytest_collection_modifyitems(config, items) -> None:
    """Files in an order of the run's own, and in each the tests: none may need what another left behind."""
    interpreted = not torch.cuda.is_available()
    for item in items:
        engine = getattr(item, "callspec", None) and item.callspec.params.get("engine")
        if interpreted and engine == "triton" and item.get_closest_marker("slow_in_the_interpreter"):
            item.add_marker(pytest.mark.slow)
    order = random.Random(config.stash[SEED])
    files = {item.path: order.random() for item in items}
    items.sort(key=lambda item: (files[item.path], order.random()))


def pytest_terminal_summary(terminalreporter) -> None:
    if interpreter_problem():
        terminalreporter.write_line(f"not run: tests of the Triton engine: {interpreter_problem()}")
    if importlib.util.find_spec("hypothesis") is None:
        terminalreporter.write_line("not run: tests/properties, which need hypothesis")


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch) -> Iterator[str]:
    """Each engine in turn; the triton engine's inputs are made on the GPU where there is one."""
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    reason = fastdpo.backends()["engines"][request.param]["reason"]
    reason = reason or (interpreter_problem() if request.param == "triton" else None)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("FASTDPO_ENGINE", request.param)
    torch.set_default_device("cuda" if on_gpu else None)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(params=["native", "reference"])
def loss_engine(request, monkeypatch) -> str:
    """Each engine of the preference losses in turn, and no other but for the losses that only the reference has."""
    from fastdpo.losses import LOSSES
    from fastdpo.ops.preference import templates

    def only_ranked(options, given):
        assert any(LOSSES[name].ranked for name in options.loss_type), "templates have these losses"
        return reference(options, given)

    if request.param == "reference":
        monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    elif not templates.AVAILABLE:
        pytest.skip("this installation has no native extension")
    else:
        monkeypatch.delenv("FASTDPO_ENGINE", raising=False)
        reference = templates.batch_losses_ref
        monkeypatch.setattr(templates, "batch_losses_ref", only_ranked)
    return request.param


@pytest.fixture(scope="module")
def ranks() -> Iterator:
    """`ranks(n)`: n processes of one group, those of the file's other tests; ranks.py."""
    from ranks import Ranks

    started: dict[int, Ranks] = {}
    yield lambda size: started.setdefault(size, Ranks(size))
    for group in started.values():
        group.stop()


@pytest.fixture(autouse=True)
def seeded(request):
    """The run's seed, fresh unless FASTDPO_TEST_SEED is set; shown with a failing test's captured output."""
    seed = request.config.stash[SEED]
    print(f"FASTDPO_TEST_SEED={seed}")
    torch.manual_seed(seed)
    random.seed(seed)
    return seed


@pytest.fixture
def tiny_llama():
    """Builds the same model for the same seed; V = 512 is four blocks."""
    transformers = pytest.importorskip("transformers")

    def build(seed: int = 0):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,  # logits of order 1, so that a wrong transform of them shows
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return transformers.LlamaForCausalLM(config)

    return build
