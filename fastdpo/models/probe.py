"""Which scale and softcap a model applies to its lm_head's output: candidates from its configuration, chosen by the
model's own logits of a few random tokens and by what it makes of known numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..head import HeadOptions, LogitTransform
from ..ops.problem import TokenStats
from .head_call import ANSWER
from .lm_head import AppliedHead
from .wrappers import whole

# Under these names configurations hold the factor of the logits: Cohere, Muse and Falcon-H1 multiply by it,
# Granite divides by logits_scaling, MiniCPM3 and Inkling divide hidden by theirs, and HyperCLOVA X
# multiplies by logits_scaling. Both ways are tried; the model's own logits decide.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Largest disagreement, relative to the largest logit, by the type the model computes its logits in. A wrong
# scale or softcap is off by a good part of the logit itself; fp32 products may run in TF32.
PROBE_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def declared_transforms(config) -> list[LogitTransform]:
    """What the configuration may mean, the likeliest first."""
    text = config.get_text_config()

    def declared(names: tuple[str, ...]) -> list[float]:
        values = [getattr(text, name, None) for name in names]
        return [float(x) for x in values if isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0]

    factors, divisors = declared(FACTORS), declared(DIVISORS)
    scales = [*factors, *(1 / x for x in divisors), *divisors, *(1 / x for x in factors), 1.0]
    return [LogitTransform(s, c) for c in (*declared(SOFTCAPS), 0.0) for s in dict.fromkeys(scales)]


def logits_of(output) -> Tensor:
    return output["logits"] if hasattr(output, "keys") else output[0]


def probe(causal: nn.Module, forward: Callable, run: Callable) -> tuple[list[LogitTransform], LogitTransform]:
    """(what the configuration declares, which of it the model does), of a model with this `forward`.

    ``run(transform, score, **arguments)`` gives the HeadCall, and the output. Raises ValueError where no
    transform gives the model's own log-probs.
    """
    name, head = type(causal).__name__, causal.get_output_embeddings()
    gain = 1.0

    def amplify(module, args):
        return (args[0] * gain, *args[1:])

    with _undisturbed(causal), torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(0)
        try:
            head.register_forward_pre_hook(amplify)
            ids, logits = _first_logits(causal, forward, generator)
            gain = max(1.0, ANSWER / max(float(logits.abs().max()), 1e-6))
            logits = whole(logits_of(forward(input_ids=ids)))[:, :8]
            shape = (16, logits.shape[1])
            labels = torch.randint(logits.shape[-1], shape, generator=generator, device="cpu").to(logits.device)
            labels[0] = logits.argmax(-1)[0]
            declared = declared_transforms(causal.config)

            def score(applied: AppliedHead, _) -> TokenStats:
                """[declared, 16, T] log-probs."""
                hidden = applied.hidden[:, :8]
                if logits.shape[:-1] != hidden.shape[:-1]:
                    raise ValueError(
                        f"the lm_head of {name} is given hidden states of shape {tuple(hidden.shape)} for logits of "
                        f"shape {tuple(logits.shape)}"
                    )
                if len(applied.weight) != logits.shape[-1]:
                    raise ValueError(
                        f"{name} returns {logits.shape[-1]} of the {len(applied.weight)} logits of its lm_head: call "
                        "patch_model before the head is split, or let each rank have all (output_layouts=Replicate())"
                    )
                applied = applied._replace(hidden=hidden.expand(len(labels), -1, -1))
                each = [applied.token_stats(labels, transform, HeadOptions(), ()).logps for transform in declared]
                return TokenStats(torch.stack(each), *(None,) * 4)

            call, _ = run(LogitTransform(), score, input_ids=ids)
        finally:  # also where registering it was interrupted
            for key in [key for key, hook in head._forward_pre_hooks.items() if hook is amplify]:
                del head._forward_pre_hooks[key]
        expected = logits[0].double().log_softmax(-1).gather(1, labels.T).T
        allowed = call.tolerance(logits, PROBE_TOLERANCE) * max(1.0, float(logits.abs().max()))
        smallest, like = math.inf, None
        for transform, logps in zip(declared, call.stats.logps):
            difference = (logps.to(expected) - expected).abs().max().nan_to_num(nan=math.inf).item()
            if difference <= allowed:
                like = transform
                with torch.enable_grad():  # which shows parameters behind the lm_head
                    shown, output = run(transform, None, input_ids=ids)
                if shown.shows(logits_of(output), transform):
                    return declared, transform
            smallest = min(smallest, difference)
    known = "with any scale and softcap that its configuration names"
    if like is None:
        raise ValueError(
            f"the log-probs of {name} do not follow from its hidden states and lm_head: {known}, they differ from its "
            f"own by {smallest:.3g} nats or more (allowed: {allowed:.2g})"
        )
    raise ValueError(
        f"the logits of {name} do not follow from its lm_head's output: {known}, known numbers come out otherwise, "
        f"though log-probs of a few tokens differ from its own by no more than {allowed:.2g} nats"
    )


def _first_logits(causal: nn.Module, forward: Callable, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids [1, T], the model's logits), for the first T that the model takes: some compute in chunks of 64."""
    ordinary = _ordinary_tokens(causal)
    failure = None
    for length in (8, 64):
        ids = ordinary[torch.randint(len(ordinary), (1, length), generator=generator, device="cpu")]
        try:
            return ids, whole(logits_of(forward(input_ids=ids)))
        except Exception as error:
            failure = failure or error
    name = type(causal).__name__
    raise ValueError(f"patch_model probes a model with input_ids alone, which {name} refuses: {failure}") from failure


def _ordinary_tokens(causal: nn.Module) -> Tensor:
    """Ids without those the configuration names: an image's placeholder needs more than its id."""
    embeddings = causal.get_input_embeddings().weight
    special = set()
    configs = [causal.config]
    for config in configs:
        for name, value in vars(config).items():
            if hasattr(value, "to_diff_dict"):
                configs.append(value)
            elif name.endswith(("_id", "_ids", "_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    # Below 1000: placeholders that no configuration names come late in vocabularies
    size = getattr(embeddings, "ds_shape", embeddings.shape)[0]  # ZeRO-3 has emptied it
    ordinary = [i for i in range(min(size, 1000)) if i not in special]
    return torch.tensor(ordinary, device=embeddings.device)


@contextmanager
def _undisturbed(model: nn.Module):
    """Evaluation mode without autocast; training modes and random generators are put back."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.autocast(device.type, enabled=False):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
