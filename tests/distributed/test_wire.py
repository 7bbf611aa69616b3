"""The model of bytes on the wire against what a call with `vocab_group` sends, and against itself."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from heads import small_head

import fastdpo
from tools import wire
from tools.wire import DHIDDEN, LAYOUTS, Cluster, Step, sent_per_token

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
FLAT = Cluster(node=10**6, efficiency=1.0, latency=0.0)  # one node: seconds are bytes over a rate
H, V = 32, 512


class _Received:
    """Bytes that this rank receives of others in the collectives inside of `with`, whatever they are."""

    def __enter__(self):
        self.bytes, self.kinds, self.kept = 0, set(), {}

        def size_of(x):
            return x.numel() * x.element_size()

        def counted(name, received):
            function = getattr(dist, name)
            self.kept[name] = function

            def call(*args, **kwargs):
                self.bytes += received(*args)
                self.kinds.add(name)
                return function(*args, **kwargs)

            setattr(dist, name, call)

        size = dist.get_world_size()
        counted("all_gather", lambda parts, x, *_: (size - 1) * size_of(x))
        counted("all_gather_into_tensor", lambda out, x, *_: (size - 1) * size_of(x))
        counted("all_to_all", lambda outs, *_: sum(map(size_of, outs)) - size_of(outs[dist.get_rank()]))
        counted("all_to_all_single", lambda out, *_: size_of(out) * (size - 1) // size)
        counted("reduce_scatter", lambda out, *_: (size - 1) * size_of(out))
        counted("reduce_scatter_tensor", lambda out, *_: (size - 1) * size_of(out))
        counted("all_reduce", lambda x, *_: 2 * size_of(x) * (size - 1) // size)
        return self

    def __exit__(self, *_):
        for name, function in self.kept.items():
            setattr(dist, name, function)


def _received(rank, size, engine, head, options, stats):
    os.environ["FASTDPO_ENGINE"] = engine
    head = head.leaves(torch.bfloat16)
    weight = head.weight.detach().chunk(size)[rank].clone().requires_grad_("tau" in options)
    with _Received() as forward:
        found = fastdpo.linear_token_stats(
            head.hidden, weight, head.labels, stats=stats, vocab_group=dist.group.WORLD, **options
        )
    with _Received() as backward:
        found.logps.sum().backward()
    del os.environ["FASTDPO_ENGINE"]
    return forward.bytes, backward.bytes


TICKET = 1280  # bytes of a handshake, at most
CALLS = {
    "exact": ({"backward": "exact"}, 0, ()),
    "routed, two sets": ({"tau": (0.3, 0.1), "seed": 1}, 2, ()),
    "routed, statistics": ({"tau": 0.1, "seed": 1}, 1, ("entropy", "log_sum_sq_probs")),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("engine", ["cpu", "triton"])
def test_what_a_call_sends_is_what_the_model_says(engine, call, ranks):
    if fastdpo.backends()["engines"][engine]["reason"] is not None:
        pytest.skip("the engine does not run here")
    options, sets, stats = CALLS[call]
    size, prompt, completions = 2, 32, (128, 256)
    received = []
    for completion in completions:
        head = small_head(N=completion + prompt, V=V, H=H)
        head.labels[:prompt] = -100
        received.append(ranks(size)(_received, engine, head, options, stats))
    per_token = sent_per_token(size, sets=sets, stats=bool(stats), engine=engine)
    for completion, of_ranks in zip(completions, received):
        rows = completion + prompt
        counted = completion if engine == "cpu" else rows  # a GPU does not tell the host how many tokens count
        for forward, backward in of_ranks:
            assert 0 <= forward - counted * per_token <= TICKET
            assert 0 <= backward - DHIDDEN["by rows"](size)[0] * rows * H <= TICKET  # zeros of prompts as well


def test_layouts_that_send_the_same_are_told_the_same():
    step = Step(gpus=8, tokens=16032, vocab=128256, hidden=4096)
    head = 128256 * 4096
    gather, ring, tokens, _ = (layout(step, FLAT) for layout in LAYOUTS.values())
    assert gather.bytes == ring.bytes == 7 / 8 * head * (3 * 2 + 4)
    assert gather.seconds == pytest.approx(gather.bytes / FLAT.nvlink)
    # at as many tokens of all ranks as ids, rows of hidden weigh as much as rows of the head
    assert tokens.bytes == pytest.approx(gather.bytes, rel=1e-3)
    assert gather.memory == head * 8 and ring.memory == head * 12 / 8
    for layout in LAYOUTS.values():
        alone = layout(replace(step, gpus=1), FLAT)
        assert alone.bytes == alone.seconds == 0


def test_between_nodes_one_ring_waits_for_one_adapter():
    step, cluster = Step(64, 8192, 128256, 8192), Cluster(latency=0.0)
    one, all_of_them = wire.ring(step, cluster, adapters=1), wire.ring(step, cluster)
    assert one.seconds > 7.9 * all_of_them.seconds and one.bytes == all_of_them.bytes
    assert wire.ring(step, Cluster()).seconds > all_of_them.seconds  # 189 transfers that wait for each other
    node = wire.ring(replace(step, gpus=8), cluster)  # 8 GPUs: no adapter at all
    assert node.seconds == pytest.approx(node.bytes / cluster.nvlink / cluster.efficiency)


def test_who_wins_turns_with_the_tokens():
    few, many = Step(8, 2048, 128256, 8192), Step(8, 32768, 128256, 8192)
    assert wire.wins(few, Cluster()) == "tokens" and wire.wins(many, Cluster()) == "ring"
    assert wire.wins(replace(many, gpus=1024), Cluster()) == "gather"  # so many transfers


def test_transfers_hide_behind_products_from_as_many_tokens_as_the_model_says():
    cluster = Cluster(latency=0.0)
    for gpus in (8, 64):
        count = wire.hiding_tokens(cluster, gpus, "forward")
        step = Step(gpus, count, 128256, 8192)
        one_pass = step.products(cluster) / (2 + step.backward)
        assert one_pass == pytest.approx(cluster.seconds(2 * step.head, gpus, 0))
        assert wire.hiding_tokens(cluster, gpus, "routed backward") == pytest.approx(6 * count)  # 6 bytes, half a pass
        assert wire.hiding_tokens(cluster, gpus, "exact backward") == pytest.approx(count)


def test_the_sum_of_dhidden_by_rows_sends_and_holds_less_than_gathering_it():
    for size in (2, 4, 8):
        (sent, held), (less, held_less) = DHIDDEN["gather"](size), DHIDDEN["by rows"](size)
        assert less < sent and held_less < held
    assert DHIDDEN["gather"](8)[0] / DHIDDEN["by rows"](8)[0] == pytest.approx(16 / 3)


def test_the_page_has_the_tables_of_the_tool():
    page = PAGE.read_text()
    for name, lines in wire.tables(Cluster()).items():
        inside = page.partition(f"<!-- {name} -->\n")[2].partition("\n<!-- end -->")[0]
        assert inside == "\n".join(lines), f"{name}: run python -m tools.wire --docs docs/distributed.md"
