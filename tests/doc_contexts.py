"""What the blocks of the documents find there: tiny models and tensors, made here; and stand-ins of what is not here.

A document's blocks run in order in one namespace, which begins as `given()`. Where a block needs more, a `Setting`
names it by a piece of its text, and says what was put in the place of what: docs/blocks.md has the table, which a test
holds to SETTINGS.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

PAIRS, LENGTH, H, V = 2, 8, 32, 512


def tiny_model(seed: int = 0, **changed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(vocab_size=V, hidden_size=H, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlamaConfig(**(sizes | ids | changed), max_position_embeddings=128, initializer_range=0.2)
    return LlamaForCausalLM(config)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, mask, labels) [2 * PAIRS, LENGTH]: the chosen completions first; the first three tokens are a prompt."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (2 * PAIRS, LENGTH), generator=generator)
    return ids, torch.ones_like(ids), ids.masked_fill(torch.arange(LENGTH) < 3, -100)


def get_batch_logps(logits, labels):
    """As trainers have it: log_softmax of the logits but the last, gathered at the labels but the first."""
    labels, logits = labels[:, 1:].clone(), logits[:, :-1, :]
    mask = labels != -100
    labels[~mask] = 0
    return (logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0] * mask).sum(-1)


def given() -> dict:
    """The names that a reader takes for granted."""
    import fastdpo

    model = tiny_model()
    ids, mask, labels = batch()
    ref_lm_head = nn.Linear(48, V, bias=False)
    topk = torch.randn(2 * PAIRS, LENGTH, V).log_softmax(-1).topk(4)
    chosen, rejected, ref_chosen, ref_rejected = -10 * torch.rand(4, PAIRS)
    return {
        "__name__": "__main__",
        "torch": torch,
        "fastdpo": fastdpo,
        "model": model,
        "lm_head": model.lm_head,
        "input_ids": ids,
        "ids": ids,
        "mask": mask,
        "labels": labels,
        "loader": [(ids, mask, labels)],
        "hidden": torch.randn(2 * PAIRS, LENGTH, H, requires_grad=True),
        "weight": model.lm_head.weight,
        "ref_hidden": torch.randn(2 * PAIRS, LENGTH, 48),
        "ref_lm_head": ref_lm_head,
        "ref_weight": ref_lm_head.weight.detach(),
        "ref_logps": -10 * torch.rand(2 * PAIRS),
        "logits": torch.randn(2 * PAIRS, LENGTH, V, requires_grad=True),
        "topk_ids": topk.indices,
        "topk_logps": topk.values,
        "chosen": chosen.requires_grad_(),
        "rejected": rejected.requires_grad_(),
        "ref_chosen": ref_chosen,
        "ref_rejected": ref_rejected,
        "chosen_lengths": torch.tensor([5, 4]),
        "rejected_lengths": torch.tensor([3, 5]),
        "get_batch_logps": get_batch_logps,
    }


def hub(space: dict, monkeypatch, folder: Path) -> None:
    """Names of the Hub lead to a tiny model, its tokenizer and twenty pairs; TRL's runs are two steps on the CPU."""
    import datasets
    import transformers
    import trl
    from trl_runs import build_tokenizer, preferences

    tiny_model().save_pretrained(folder / "model")
    load = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: load(folder / "model"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: build_tokenizer())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: preferences())
    short = dict(max_steps=2, logging_steps=1, use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True)
    real = trl.DPOConfig
    monkeypatch.setattr(trl, "DPOConfig", lambda **given: real(**(given | short)))


def trl_names(space: dict, monkeypatch, folder: Path) -> None:
    """`DPOTrainer` and `DPOConfig`, as TRL has them; `...` in a call is what a reader would write there."""
    from trl import DPOConfig, DPOTrainer
    from trl_runs import build_tokenizer, preferences

    def config(*elided, **given):
        short = dict(max_steps=2, use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, report_to="none")
        return DPOConfig(output_dir=str(folder), logging_steps=1, **short, **given)

    def trainer(model, args, train_dataset):
        assert train_dataset is ...
        tokenizer = build_tokenizer()
        made = DPOTrainer(
            model, args=args, train_dataset=preferences(), processing_class=tokenizer, ref_model=tiny_model()
        )
        space["trainer"] = made
        return made

    space.update(DPOConfig=config, DPOTrainer=trainer)


def trained(space: dict) -> None:
    """A trainer of TRL's has taken two steps, and what it logged is DPO's."""
    logged = [entry for entry in space["trainer"].state.log_history if "rewards/margins" in entry]
    assert len(logged) == 2 and abs(logged[0]["loss"] - 0.6931) < 0.02, logged


def _module(monkeypatch, name: str, **members) -> types.ModuleType:
    """Module `name`, and the packages that it is in."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        if path not in sys.modules:
            made = types.ModuleType(path)
            made.__path__ = []
            monkeypatch.setitem(sys.modules, path, made)
    for member, value in members.items():
        monkeypatch.setattr(sys.modules[name], member, value, raising=False)
    return sys.modules[name]


def adapter_of(package: str):
    """A stand-in of a package: each module, class and method that the adapter replaces, by its name. `checked` sees
    that all were replaced, and puts them back."""

    def provide(space: dict, monkeypatch, folder: Path) -> None:
        import importlib

        adapter = importlib.import_module(f"fastdpo.integrations.{package}")._adapter
        places = []
        for module, names in adapter.seams:
            for path in names:
                kind, _, name = path.rpartition(".")
                source = f"def {name}(self, model, batch): return model(**batch).logits"
                if not kind:
                    source = f"def {name}(logits, labels=None, temperature=1.0): return logits"
                methods: dict = {}
                exec(source, methods)
                method = methods[name]
                if kind:
                    owner = vars(sys.modules.get(module, types.ModuleType(""))).get(kind) or type(kind, (), {})
                    setattr(owner, name, method)
                    _module(monkeypatch, module, **{kind: owner})
                else:
                    owner = _module(monkeypatch, module, **{name: method})
                places.append((owner, name, method))
        space["__replaced__"] = (adapter, places)

    return provide


def replaced(space: dict) -> None:
    adapter, places = space.pop("__replaced__")
    assert places
    for owner, name, method in places:
        assert vars(owner)[name] is not method, f"{name} was not replaced"
    adapter.unpatch()
    for owner, name, method in places:
        assert vars(owner)[name] is method


def llamafactory(space: dict, monkeypatch, folder: Path) -> None:
    adapter_of("llamafactory")(space, monkeypatch, folder)
    space["__ran__"] = []
    _module(monkeypatch, "llamafactory.train.tuner", run_exp=lambda: space["__ran__"].append(True))


def llamafactory_ran(space: dict) -> None:
    assert space["__ran__"] == [True]
    replaced(space)


def openrlhf(space: dict, monkeypatch, folder: Path) -> None:
    adapter_of("openrlhf")(space, monkeypatch, folder)
    import runpy

    space["__ran__"] = []
    monkeypatch.setattr(runpy, "run_module", lambda name, run_name: space["__ran__"].append((name, run_name)))


def openrlhf_ran(space: dict) -> None:
    assert space["__ran__"] == [("openrlhf.cli.train_dpo", "__main__")]
    replaced(space)


def axolotl(space: dict, monkeypatch, folder: Path) -> None:
    _module(monkeypatch, "axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {"pre_model_load": None}))


def axolotl_patches(space: dict) -> None:
    import trl.trainer.utils

    before = trl.trainer.utils._ChunkedLogProbFunction
    space["FastDPO"]().pre_model_load(None)
    assert trl.trainer.utils._ChunkedLogProbFunction is not before


def hub_kernel(space: dict, monkeypatch, folder: Path) -> None:
    """The package that is here in the place of what `get_kernel` loads."""
    _module(monkeypatch, "kernels", get_kernel=lambda name, **options: space["fastdpo"])


def hub_layer(space: dict, monkeypatch, folder: Path) -> None:
    """`kernelize` gives each module whose class is mapped the forward of the layer of that name."""
    from contextlib import contextmanager

    from transformers.loss.loss_utils import ForCausalLMLoss

    from fastdpo import layers

    mapped: dict = {}

    def named(name):
        return lambda cls: setattr(cls, "kernel_layer_name", name) or cls

    @contextmanager
    def use_kernel_mapping(mapping):
        mapped.update(mapping)
        yield

    def kernelize(model, mode):
        for module in model.modules():
            name = getattr(type(module), "kernel_layer_name", None)
            if name is not None:
                module.forward = getattr(layers, mapped[name]["cpu"])().forward

    model = nn.Module()
    model.__class__ = type(
        "Model", (nn.Module,), {"modules": lambda self: space.setdefault("of_model", [space["CausalLMLoss"]()])}
    )
    members = {"Mode": types.SimpleNamespace(TRAINING=1, TORCH_COMPILE=2), "kernelize": kernelize}
    members |= {"use_kernel_forward_from_hub": named, "use_kernel_mapping": use_kernel_mapping}
    _module(monkeypatch, "kernels", LayerRepository=lambda name, layer_name, **options: layer_name, **members)
    space.update(nn=nn, ForCausalLMLoss=ForCausalLMLoss, model=model)


def hub_layer_is_the_loss(space: dict) -> None:
    """What the layer computes is what the module computed."""
    (kernelized,) = space["of_model"]
    tensors = (space["hidden"].detach(), space["weight"].detach(), space["labels"])
    assert "forward" in vars(kernelized)
    torch.testing.assert_close(kernelized(*tensors), space["CausalLMLoss"]()(*tensors), rtol=1e-4, atol=1e-4)


class _Decoder(nn.Module):
    """A decoder of torchtune's, by its name and its `output`."""

    def __init__(self):
        super().__init__()
        self.embedding, self.output = nn.Embedding(V, H), nn.Linear(H, V, bias=False)

    def forward(self, tokens):
        return self.output(self.embedding(tokens).cumsum(1)).float()


def torchtune(space: dict, monkeypatch, folder: Path) -> None:
    _Decoder.__module__, _Decoder.__qualname__ = "torchtune.modules.transformer", "TransformerDecoder"
    space["model"], space["concatenated_input_ids"] = _Decoder(), space["ids"]
    space["self"] = types.SimpleNamespace(activations_handling_ctx=nullcontext())


def torchtune_is_lazy(space: dict) -> None:
    from fastdpo.models.lazy.logits import LazyLogits

    lazy = space["all_logits"]
    assert isinstance(lazy, LazyLogits) and lazy.lazy
    found = get_batch_logps(lazy, space["labels"])
    assert lazy.lazy
    expected = get_batch_logps(space["model"](space["ids"]), space["labels"])
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Setting:
    document: str
    contains: str  # a piece of the block's text, of no other block of the document
    what: str  # what stands in whose place, as docs/blocks.md says it
    provide: Callable | None = None  # (namespace, monkeypatch, folder): before the block runs
    check: Callable | None = None  # (namespace): after it
    ranks: str = ""  # the function of doc_ranks.py that prepares the block on each of two processes


TWO = "two processes over gloo, on a CPU"
NAMES = "a stand-in with the classes and functions that are replaced, and nothing in them; {} is not installed here. {}"
SETTINGS = [
    Setting("README.md", "DPOTrainer(", "TRL itself; `...` is a tiny model's data, two steps", trl_names, trained),
    Setting(
        "docs/start/trl.md", "DPOTrainer(", "TRL itself; the Hub's names lead to a tiny model, two steps", hub, trained
    ),
    Setting("docs/start/plain_loop.md", "optimizer.step()", "the Hub's name leads to a tiny model; one batch", hub),
    Setting(
        "docs/start/llamafactory.md",
        "run_exp()",
        NAMES.format("LLaMA-Factory", "Itself: `make test-trainers`"),
        llamafactory,
        llamafactory_ran,
    ),
    Setting(
        "docs/start/openrlhf.md",
        "run_module",
        NAMES.format("OpenRLHF", "Itself: `make test-trainers`"),
        openrlhf,
        openrlhf_ran,
    ),
    Setting(
        "docs/start/axolotl.md",
        "BasePlugin",
        "a stand-in of its base class for plugins; Axolotl is not installed here. Itself, without the plugin: "
        "`make test-trainers`",
        axolotl,
        axolotl_patches,
    ),
    Setting("docs/trainers.md", "halos.patch()", NAMES.format("HALOs", ""), adapter_of("halos"), replaced),
    Setting("docs/trainers.md", "simpo.patch()", NAMES.format("SimPO", ""), adapter_of("simpo"), replaced),
    Setting(
        "docs/trainers.md",
        "direct_preference_optimization.patch()",
        NAMES.format("the original DPO", ""),
        adapter_of("direct_preference_optimization"),
        replaced,
    ),
    Setting(
        "docs/trainers.md",
        "activations_handling_ctx",
        "a decoder with torchtune's name; torchtune is not installed here. Itself: `make test-trainers`",
        torchtune,
        torchtune_is_lazy,
    ),
    Setting("docs/hub.md", "get_kernel(", "a stand-in of `get_kernel`, which loads from the Hub", hub_kernel),
    Setting("docs/hub.md", "kernelize(", "a stand-in of `kernelize`", hub_layer, hub_layer_is_the_loss),
    Setting("docs/distributed.md", "DistributedDataParallel(", TWO, ranks="data_parallel"),
    Setting("docs/distributed.md", "fully_shard(model.lm_head)", TWO, ranks="fsdp"),
    Setting("docs/distributed.md", "distribute_tensor(", TWO, ranks="never_gathered"),
    Setting("docs/distributed.md", "vocab_group=group", TWO, ranks="tensor_parallel"),
    Setting("docs/distributed.md", "seq_group=", TWO, ranks="context_parallel"),
    Setting(
        "docs/distributed.md", "schedule.step(", TWO + "; each takes the line that its comment names", ranks="pipeline"
    ),
]


def setting_of(block) -> Setting | None:
    found = [x for x in SETTINGS if x.document == block.document and x.contains in block.code]
    assert len(found) < 2, f"{block}: {found}"
    return found[0] if found else None


def table() -> str:
    """As docs/blocks.md has it."""
    lines = ["| page | block with | runs with |", "| --- | --- | --- |"]
    lines += [f"| {x.document} | `{x.contains}` | {x.what.strip()} |" for x in SETTINGS]
    return "\n".join(lines)
