"""One random step after the other: every public function, forward and backward, with shapes, types, layouts and options
drawn; small patched and lazy models; and calls that are refused, whose tracebacks hold tensors too.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import random
import threading
import warnings

import torch
from preference_cases import CASES, inputs_of, named
from torch import Tensor, nn

import fastdpo
from fastdpo.divergence import KINDS
from fastdpo.integrations import lazy_logits
from fastdpo.microbatches import interleave, restore

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOSSES = ("sigmoid", "ipo", "hinge", "apo_zero", "sigmoid_norm", ["sigmoid", "sft"], "aot", "discopop", "simpo", "orpo")


class Steps:
    """`step()` takes one, and says which. Of one seed always the same ones."""

    def __init__(self, seed: int, engines: tuple[str | None, ...] = (None, "reference"), largest: int = 160):
        self.random = random.Random(seed)
        self.engines, self.largest = engines, largest
        torch.manual_seed(seed)
        self.kinds = {
            self.logps: 6,
            self.stats: 3,
            self.several: 2,
            self.accumulated: 2,
            self.dpo: 4,
            self.packed_dpo: 2,
            self.tdpo: 1,
            self.divergence: 3,
            self.topk: 2,
            self.selective: 3,
            self.preference: 4,
            self.refused: 3,
            self.of_another_thread: 1,
            self.microbatches: 1,
        }
        self.model = None

    def with_models(self, build) -> Steps:
        """`build()` gives a small causal language model of transformers."""
        self.build, self.model = build, build()
        self.kinds |= {self.patched: 3, self.patched_anew: 1, self.copied: 1, self.lazy: 2}
        return self

    def step(self) -> str:
        (kind,) = self.random.choices(list(self.kinds), list(self.kinds.values()))
        engine = self.random.choice(self.engines)
        before = os.environ.get("FASTDPO_ENGINE")
        if engine is not None:
            os.environ["FASTDPO_ENGINE"] = engine
        try:
            kind()
        finally:
            os.environ.pop("FASTDPO_ENGINE", None)
            if before is not None:
                os.environ["FASTDPO_ENGINE"] = before
        return kind.__name__

    def size(self, most: int | None = None) -> int:
        """Small ones as often as large ones."""
        most = most or self.largest
        return max(1, min(most, round(math.exp(self.random.uniform(0, math.log(most + 1))))))

    def sometimes(self) -> bool:
        return self.random.random() < 0.5

    def tensor(self, *shape: int, dtype=torch.float32, grad=True) -> Tensor:
        """A leaf in one of several layouts."""
        how = self.random.choice(("plain", "plain", "turned", "apart", "late"))
        if how == "turned" and len(shape) > 1:
            x = torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
        elif how == "apart":
            x = torch.randn(*shape[:-1], shape[-1] * 2).to(dtype)[..., ::2]
        elif how == "late":
            x = torch.randn(shape[0] + 1, *shape[1:]).to(dtype)[1:]
        else:
            x = torch.randn(*shape).to(dtype)
        return x.detach().requires_grad_(grad)

    def head(self, rows: tuple[int, ...], dtype=None) -> tuple[Tensor, Tensor, Tensor, dict]:
        """hidden, weight, labels, and what else linear_logps takes."""
        dtype = dtype or self.random.choice(DTYPES)
        V, H = 2 + self.size(9 * self.largest), self.size(96)
        wide = dtype if dtype == torch.float64 or self.sometimes() else torch.float32
        weight = self.tensor(V, H, dtype=wide, grad=self.sometimes())
        labels = torch.randint(V, rows)
        labels[torch.rand(rows) < self.random.choice((0.0, 0.0, 0.4, 1.0))] = -100
        given = {
            "logit_scale": self.random.choice((1.0, 0.25)),
            "softcap": self.random.choice((None, None, 30.0)),
            "temperature": self.random.choice((1.0, 0.7)),
            "backward": self.random.choice(("routed", "routed", "exact")),
            "tau": self.random.choice((None, 0.0, 0.05, (2**-8, 2**-10), 1.0)),
            "seed": self.random.choice((None, 7)),
            "bias": self.tensor(V, dtype=wide, grad=self.sometimes()) if self.sometimes() else None,
        }
        if given["backward"] == "exact":
            given["tau"] = given["seed"] = None
        if self.random.random() < 0.3:
            r = self.size(12)
            given["lora"] = (self.tensor(r, H, dtype=wide), self.tensor(V, r, dtype=wide), 0.5)
        return self.tensor(*rows, H, dtype=dtype, grad=self.sometimes()), weight, labels, given

    @staticmethod
    def differentiate(*outputs: Tensor | None) -> None:
        wanted = [x for x in outputs if x is not None and x.requires_grad]
        if wanted:
            sum((x * torch.rand(x.shape)).sum() for x in wanted).backward()

    def rows(self) -> tuple[int, ...]:
        return self.random.choice(((self.size(),), (self.size(8), self.size(24)), (0,)))

    def logps(self) -> None:
        hidden, weight, labels, given = self.head(self.rows())
        self.differentiate(fastdpo.linear_logps(hidden, weight, labels, **given))

    def stats(self) -> None:
        hidden, weight, labels, given = self.head(self.rows())
        stats = [name for name in ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs", "lse") if self.sometimes()]
        found = fastdpo.linear_token_stats(hidden, weight, labels, stats=tuple(stats), **given)
        self.differentiate(found.logps, found.entropy, found.lse)

    def several(self) -> None:
        hidden, weight, labels, given = self.head((self.size(40), self.size(5)))
        hidden = hidden[:, 0].detach().requires_grad_()
        self.differentiate(fastdpo.linear_logps(hidden, weight, labels, **given))

    def accumulated(self) -> None:
        hidden, weight, labels, given = self.head((self.size(),), dtype=torch.float32)
        weight = (
            weight.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        )  # as its gradient must be
        into = self.random.choice(("grad", "main_grad"))
        if into == "main_grad":
            weight.main_grad = torch.zeros(weight.shape)
        for _ in range(2):
            self.differentiate(fastdpo.linear_logps(hidden, weight, labels, accumulate_into=into, **given))

    def dpo(self) -> None:
        pairs, tokens = self.size(4), self.size(16)
        hidden, weight, labels, given = self.head((2 * pairs, tokens))
        given |= {"loss_type": self.random.choice(LOSSES), "beta": self.random.uniform(0.05, 0.5)}
        if given["loss_type"] not in ("simpo", "orpo"):
            given |= self.random.choice(
                (
                    {},
                    {"ref_hidden": self.tensor(*hidden.shape, dtype=hidden.dtype)},
                    {"ref_logps": torch.randn(2 * pairs)},
                )
            )
        given["average_log_prob"] = given["loss_type"] in ("sigmoid", "hinge") and self.sometimes()
        self.differentiate(fastdpo.linear_dpo_loss(hidden, weight, labels, **given).loss)

    def packed_dpo(self) -> None:
        lengths = [self.size(20) for _ in range(2 * self.size(4))]
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        hidden, weight, labels, given = self.head((int(offsets[-1]),))
        given.pop("lora", None)
        bias = given.pop("bias")
        loss_fn = fastdpo.LinearDPOLoss(beta=0.2, **given)
        self.differentiate(loss_fn(hidden, weight, labels, bias=bias, cu_seqlens=offsets).loss)

    def tdpo(self) -> None:
        hidden, weight, labels, given = self.head((2 * self.size(3), self.size(12)))
        given |= {"loss_type": self.random.choice(("tdpo1", "tdpo2"))}
        reference = self.tensor(*hidden.shape, dtype=hidden.dtype)
        self.differentiate(fastdpo.linear_dpo_loss(hidden, weight, labels, ref_hidden=reference, **given).loss)

    def divergence(self) -> None:
        hidden, weight, labels, given = self.head(self.rows())
        reference = (
            self.tensor(*hidden.shape[:-1], 8, dtype=hidden.dtype),
            self.tensor(len(weight), 8, dtype=weight.dtype),
        )
        kind = self.random.choice(list(KINDS))
        self.differentiate(*fastdpo.linear_divergence(hidden, weight, *reference, labels, kind=kind, **given)[:2])

    def topk(self) -> None:
        hidden, weight, labels, given = self.head(self.rows())
        count = min(len(weight), self.size(6))
        ids = torch.rand(*labels.shape, len(weight)).topk(count).indices
        logps = torch.randn(*labels.shape, len(weight)).log_softmax(-1).gather(-1, ids)
        options = {"tail": self.random.choice(("bucket", "renormalize")), "kind": self.random.choice(list(KINDS))}
        self.differentiate(fastdpo.topk_divergence(hidden, weight, ids, logps, **options, **given))

    def selective(self) -> None:
        V, rows = 1 + self.size(2000), self.rows()
        logits = self.tensor(*rows, V, dtype=self.random.choice(DTYPES))
        index = torch.randint(V, rows if self.sometimes() else (*rows, 3))
        found = fastdpo.selective_log_softmax(logits, index, temperature=0.8, return_entropy=True)
        self.differentiate(*found)

    def preference(self) -> None:
        case = CASES[self.random.choice(list(CASES))]
        dtype = self.random.choice((torch.float64, torch.float32, torch.bfloat16))
        tensors, lengths = inputs_of(case, dtype, seed=self.random.randrange(1000))
        found = fastdpo.preference_loss(**named(tensors), **lengths, **case)
        self.differentiate(found.loss)

    def refused(self) -> None:
        hidden, weight, labels, _ = self.head((self.size(20) + 1,), dtype=torch.float32)
        labels[0] = len(weight)
        calls = (
            lambda: fastdpo.linear_logps(hidden, weight, labels, check_labels=True),
            lambda: fastdpo.linear_logps(hidden, weight, labels[1:]),
            lambda: fastdpo.linear_logps(hidden, weight.to_sparse(), labels),
            lambda: fastdpo.linear_dpo_loss(hidden, weight, labels, beta=-1.0),
            lambda: fastdpo.linear_logps(hidden, weight, labels, softcap=-1.0),
            lambda: self._changed(hidden, weight, labels),
        )
        try:
            self.random.choice(calls)()
        except (ValueError, TypeError, RuntimeError):
            return
        raise AssertionError("a call that is wrong was not refused")

    @staticmethod
    def _changed(hidden, weight, labels) -> None:
        """A saved tensor that is changed before the backward."""
        hidden = hidden.detach().requires_grad_()
        logps = fastdpo.linear_logps(hidden, weight, labels)
        with torch.no_grad():
            hidden += 1
        logps.sum().backward()

    def of_another_thread(self) -> None:
        failures = []

        def work() -> None:
            try:
                self.logps()
            except Exception as error:
                failures.append(repr(error))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if failures:
            raise AssertionError(failures[0])

    def microbatches(self) -> None:
        x = self.tensor(12, self.size(5))
        self.differentiate(restore(interleave({"x": x}, 3), 3)["x"])

    # Models

    def batch(self) -> dict[str, Tensor]:
        shape = self.size(3), 2 + self.size(8)
        ids = torch.randint(3, self.model.config.vocab_size, shape)
        return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(shape) < 0.3, -100)}

    def _train(self, model: nn.Module) -> None:
        self.differentiate(model(**self.batch(), fastdpo=True).logps)
        model.zero_grad()

    def patched(self) -> None:
        fastdpo.patch_model(self.model, backward=self.random.choice(("routed", "exact")))
        self._train(self.model)
        if self.sometimes():
            fastdpo.unpatch_model(self.model)

    def patched_anew(self) -> None:
        model = fastdpo.patch_model(self.build())
        self._train(model)
        fastdpo.unpatch_model(model)

    def copied(self) -> None:
        fastdpo.patch_model(self.model)
        if self.sometimes():
            self._train(copy.deepcopy(self.model))
        else:
            self._train(pickle.loads(pickle.dumps(self.model)))
        saved = io.BytesIO()
        torch.save(self.model.state_dict(), saved)
        saved.seek(0)
        self.model.load_state_dict(torch.load(saved))

    def lazy(self) -> None:
        fastdpo.unpatch_model(self.model)
        given = self.batch()
        ids, labels = given["input_ids"], given["labels"].clamp(min=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with lazy_logits(self.model):
                logits = self.model(ids).logits
            if self.sometimes():
                self.differentiate(logits.log_softmax(-1).gather(-1, labels[..., None]))
            else:
                self.differentiate((logits + 0).square().mean())
        self.model.zero_grad()
