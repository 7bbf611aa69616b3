"""The PyTorch that docstrings call equivalent, run beside the function; and what the site makes of docstrings."""

from __future__ import annotations

import inspect
import math
import re

import doc_blocks
import doc_contexts
import pytest
import torch

import fastdpo
from fastdpo.integrations import lazy_logits
from fastdpo.microbatches import interleave
from tools.site import docstrings

N, K = 12, 3


def run(documented, space: dict, number: int = 0) -> dict:
    exec(compile(doc_blocks.literals(documented)[number], documented.__name__, "exec"), space)
    return space


def inputs(**more) -> dict:
    hidden, weight = torch.randn(N, doc_contexts.H), torch.randn(300, doc_contexts.H)
    labels = torch.randint(300, (N,)).masked_fill(torch.arange(N) % 5 == 2, -100)
    return {"torch": torch, "hidden": hidden, "weight": weight, "labels": labels, "bias": torch.randn(300), **more}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 9.0])
def test_linear_logps(softcap):
    space = run(fastdpo.linear_logps, inputs(softcap=softcap, logit_scale=0.5, temperature=1.5, ignore_index=-100))
    tensors = [space[name] for name in ("hidden", "weight", "labels", "bias")]
    close(fastdpo.linear_logps(*tensors, softcap=softcap, logit_scale=0.5, temperature=1.5), space["logps"])


def test_linear_token_stats():
    space = inputs()
    space["z"] = torch.nn.functional.linear(space["hidden"], space["weight"], space["bias"])
    counts = space["labels"] != -100
    run(fastdpo.linear_token_stats, space)
    found = fastdpo.linear_token_stats(*(space[name] for name in ("hidden", "weight", "labels", "bias")))
    for name in ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs", "lse"):
        close(getattr(found, name)[counts], space[name][counts])


def dpo_inputs() -> dict:
    B, T = 2, 5
    hidden, ref_hidden = torch.randn(2, 2 * B, T, doc_contexts.H)
    labels = torch.randint(300, (2 * B, T)).masked_fill(torch.arange(T) < 2, -100)
    names = {
        "hidden": hidden,
        "ref_hidden": ref_hidden,
        "ref_weight": torch.randn(300, doc_contexts.H),
        "labels": labels,
    }
    return inputs() | names | {"ref_bias": torch.randn(300), "B": B, "fastdpo": fastdpo}


def test_linear_dpo_loss():
    space = dpo_inputs()
    (source,) = doc_blocks.literals(fastdpo.linear_dpo_loss)
    *lines, call = source.splitlines()  # its last line is a call, whose result is the function's
    exec("\n".join(lines), space)
    options = {name: space[name] for name in ("bias", "ref_hidden", "ref_weight", "ref_bias")}
    found = fastdpo.linear_dpo_loss(space["hidden"], space["weight"], space["labels"], **options)
    close(found.losses, eval(call, space).losses)


def test_preference_loss():
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    space = dict(zip(names, torch.randn(4, 6)), torch=torch, beta=0.3)
    run(fastdpo.preference_loss, space)
    found = fastdpo.preference_loss(*(space[name] for name in names), beta=0.3)
    close(found.losses, space["losses"])
    close(found.loss, space["loss"])


def logits(hidden, weight, bias, *elided):
    assert elided == (...,)
    return torch.nn.functional.linear(hidden, weight, bias)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_linear_divergence(kind):
    names = {"ref_hidden": torch.randn(N, 20), "ref_weight": torch.randn(300, 20), "ref_bias": torch.randn(300)}
    space = inputs(**names, logits=logits, log=math.log, jsd_beta=0.3, kind=kind)
    run(fastdpo.linear_divergence, space)
    tensors = [space[name] for name in ("hidden", "weight", "ref_hidden", "ref_weight", "labels", "bias", "ref_bias")]
    options = {"jsd_beta": 0.3} if kind == "jsd" else {}  # refused where it has no meaning
    found = fastdpo.linear_divergence(*tensors, kind=kind, **options).divergence
    close(found, space["divergence"].masked_fill(space["labels"] == -100, 0.0))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_topk_divergence(kind, tail):
    topk = torch.randn(N, 300).log_softmax(-1).topk(K)
    names = {"topk_ids": topk.indices, "topk_logps": topk.values, "tail": tail}
    space = inputs(**names, logits=logits, log=math.log, jsd_beta=0.3, kind=kind)
    run(fastdpo.topk_divergence, space)
    tensors = [space[name] for name in ("hidden", "weight", "topk_ids", "topk_logps", "bias")]
    options = {"jsd_beta": 0.3} if kind == "jsd" else {}
    close(fastdpo.topk_divergence(*tensors, tail=tail, kind=kind, **options), space["divergence"])


def test_selective_log_softmax():
    source = doc_blocks.literals(fastdpo.selective_log_softmax)[0]
    space = {"torch": torch, "logits": torch.randn(N, 300), "temperature": 1.5}
    first, one, several, entropy = source.splitlines()
    for gather, index in ((one, torch.randint(300, (N,))), (several, torch.randint(300, (N, K)))):
        exec(f"{first}\n{entropy}\n{gather}", space | {"index": index}, seen := {})
        found, entropies = fastdpo.selective_log_softmax(space["logits"], index, temperature=1.5, return_entropy=True)
        close(found, seen["logps"])
        close(entropies, seen["entropy"] if index.ndim == 1 else seen["entropy"][:, None].expand(-1, K))


def test_patch_model():
    pytest.importorskip("transformers")
    model = doc_contexts.tiny_model()
    ids, _, labels = doc_contexts.batch()
    space = {"model": lambda ids, *elided: model(ids), "input_ids": ids, "labels": labels}
    space |= {"temperature": 1.5, "ignore_index": -100}
    with torch.no_grad():
        run(fastdpo.patch_model, space)
        found = fastdpo.patch_model(model, temperature=1.5)(ids, labels=labels, fastdpo=True).logps
    close(found, space["logps"])


def test_lazy_logits():
    pytest.importorskip("transformers")
    model = doc_contexts.tiny_model()
    ids, _, labels = doc_contexts.batch()
    space = {"lazy_logits": lazy_logits, "model": model, "input_ids": ids, "labels": labels}
    space["get_batch_logps"] = doc_contexts.get_batch_logps
    with torch.no_grad():
        run(lazy_logits, space)
        close(torch.as_tensor(space["logps"]), doc_contexts.get_batch_logps(model(ids).logits, labels))


def test_interleave():
    x, chunks = torch.arange(12), 3
    source = doc_blocks.literals(interleave)[0]
    first, last = source.splitlines()
    space = {"x": x, "chunks": chunks, "torch": torch}
    exec(first, space)
    assert torch.equal(interleave(x, chunks), eval(last, space))


def documented() -> list:
    """What the site's reference shows, by its pages."""
    found = []
    for path in (doc_blocks.ROOT / "docs" / "reference").glob("*.md"):
        for name in re.findall(r"^::: fastdpo\.([\w.]+)$", path.read_text(), re.MULTILINE):
            value = fastdpo
            for part in name.split("."):
                value = getattr(value, part) if hasattr(value, part) else __import__(f"fastdpo.{part}", fromlist=[part])
            found.append(value)
    return found


def test_every_block_of_a_docstring_has_a_test_here():
    with_blocks = [value.__name__ for value in documented() if doc_blocks.literals(value)]
    assert len(with_blocks) > 8
    missing = [name for name in with_blocks if f"test_{name}" not in globals()]
    assert not missing, missing


def test_the_reference_has_every_public_name():
    shown = {value.__name__ for value in documented()}
    assert set(fastdpo.__all__) - shown == {"__version__"}
    index = (doc_blocks.ROOT / "docs" / "reference" / "index.md").read_text()
    assert not [name for name in fastdpo.__all__ if f"`{name}`" not in index and name != "__version__"]


def test_losses_are_filled_in_as_at_run_time():
    source = inspect.getsource(fastdpo.preference_loss)
    given = source.split('"""')[1]
    assert "{losses}" in given
    assert docstrings.filled(given).split() == fastdpo.preference_loss.__doc__.split()


def test_the_table_of_losses_is_the_librarys():
    from fastdpo.losses import F_DIVERGENCES, LOSSES

    read = docstrings.losses()
    assert {name: tuple(loss) for name, loss in read["LOSSES"].items()} == {x: tuple(y) for x, y in LOSSES.items()}
    assert read["F_DIVERGENCES"] == F_DIVERGENCES
    lines = docstrings.table_of_losses().splitlines()
    assert len(lines) == len(LOSSES) + 2 and all(line.count("|") == 6 for line in lines)


def test_literal_blocks_become_python():
    text = "Sums.\n\nEquivalent to::\n\n    x = 1\n\n    if x:\n        y = 2\n\nArgs:\n    x: a number.\n"
    found = docstrings.fenced(text)
    assert "Equivalent to:\n\n```python\nx = 1\n\nif x:\n    y = 2\n```\n\nArgs:" in found
    assert "::" not in docstrings.fenced(inspect.cleandoc(fastdpo.linear_logps.__doc__))


def test_powers_are_code():
    assert docstrings.fenced("None: 2**-10, in [0, 2**64); ``2**3`` and `a**b`") == (
        "None: `2**-10`, in [0, `2**64`); ``2**3`` and `a**b`"
    )


def test_no_argument_is_lost():
    """Google's style wants `name: text`; a line without its colon would be left out of the page, without a word."""
    for value in documented():
        text = docstrings.fenced(inspect.cleandoc(value.__doc__))
        for section in re.findall(r"^(?:Args|Raises):\n((?: {4}.*\n|\n)*)", text, re.MULTILINE):
            for line in section.splitlines():
                assert not re.match(r" {4}\S", line) or ":" in line, f"{value.__name__}: {line}"
    assert "check_labels, accumulate_into: of" in docstrings.fenced(inspect.cleandoc(fastdpo.linear_dpo_loss.__doc__))
