"""Hugging Face causal language models: `model(..., labels=labels, fastdpo=True)` returns TokenStats.

hidden = what the model's own forward gives its lm_head; the module itself is run on one position per sequence
logps[t] = log p(labels[t + 1])     from hidden[t] and the lm_head; the logits, [B, T, V], never exist
"""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..logps import TokenStats, linear_token_stats
from ..ops.problem import STATS
from ..validation import HeadOptions, check_names
from .lm_head import applied_head

OPTIONS = ("backward", "tau", "seed", "temperature", "ignore_index", "check_labels", "stats")

# Under these names configurations hold the factor of the logits: Cohere, Muse and Falcon-H1 multiply by it,
# Granite divides by logits_scaling, MiniCPM3 and Inkling divide hidden by theirs, and HyperCLOVA X
# multiplies by logits_scaling. Both ways are tried; the model's own logits decide.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# The probe raises the logits to this size: small ones do not show a softcap of 30 (Gemma, xLSTM)
PROBE_LOGIT = 60.0
# Largest disagreement, relative to the largest logit, by the type the model computes its logits in. A wrong
# scale or softcap is off by a good part of the logit itself; fp32 products may run in TF32.
PROBE_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def patch_model(model, **options):
    """Teach `model` to return token log-probs: ``model(input_ids, ..., labels=labels, fastdpo=True)``.

    Such a call runs the model's own forward up to the lm_head and returns a `TokenStats` of shape
    ``[B, T - 1]`` for `labels` shifted as in the model's own loss, or ``[B, T]`` for `shift_labels`, taken as
    they are. Equivalent to::

        logps = (model(input_ids, ...).logits[:, :-1].float() / temperature).log_softmax(-1)
        logps = logps.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
        logps = logps.masked_fill(labels[:, 1:] == ignore_index, 0.0)

    Without ``fastdpo=True`` the model behaves as before. Patching it again replaces the options.

    Args:
        model: a ``PreTrainedModel`` with an lm_head, causal or vision-language, or a ``PeftModel`` or
            ``torch.compile`` around one (the model inside is patched). PEFT and ``torch.compile`` may wrap it
            before or after; DDP, FSDP and the like, after. It must be able to run on ``input_ids`` alone.
        backward, tau, seed, temperature, ignore_index, check_labels: as in `linear_logps`. Scale, softcap
            and bias are the model's own.
        stats: the statistics to return besides `logps`, as in `linear_token_stats`; none by default.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: naming the option, or what `model` lacks; also when the log-probs of a few
            random tokens are not the model's own, naming its class and the difference. The model is then
            as it was.
        NotImplementedError: from here or from a call, a head that is quantised, offloaded or split by ZeRO-3,
            or adapted by something else than LoRA, DoRA, ``modules_to_save`` and trainable tokens; naming it.

    Guarantees:
        Those of `linear_token_stats`. Patching leaves parameters, gradients, training modes and random
        generators as they were; `deepcopy`, `pickle`, `save_pretrained` and `generate` go on working. LoRA
        on the lm_head stays two factors, also of several active adapters; an active ``lora_dropout`` there,
        DoRA and trainable tokens cost one copy of its weight per call. Under prompt tuning PEFT puts virtual
        tokens before the labels, so the result has as many more positions, all 0. The load-balancing loss of
        experts is not part of the result.
    """
    settings = _Settings.of(options)
    causal = _causal_model(model)
    patched = _patched_forward(causal)
    if patched is not None:
        patched.settings = settings
        return model
    patched = _PatchedForward(causal, causal.__dict__.get("forward"), settings)
    try:
        patched.transform = _probe(causal, patched)
    except Exception:
        _take_out_taps(causal)
        raise
    causal.forward = patched
    return model


def unpatch_model(model):
    """Take `patch_model` back; a model that is not patched is left as it is. Returns `model`."""
    causal = _causal_model(model)
    patched = _patched_forward(causal)
    if patched is not None:
        del causal.forward
        if patched.previous is not None:
            causal.forward = patched.previous
        _take_out_taps(causal)
    return model


def _take_out_taps(model: nn.Module) -> None:
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Tap):  # PEFT's modules_to_save has copies
                del module._forward_pre_hooks[key]


class LogitsTransform(NamedTuple):
    """What a model makes of ``z = lm_head(hidden)``: ``softcap * tanh(logit_scale * z / softcap)``."""

    logit_scale: float = 1.0
    softcap: float | None = None


class _Settings(NamedTuple):
    head: HeadOptions
    stats: tuple[str, ...]

    @staticmethod
    def of(options: dict) -> _Settings:
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"patch_model takes {', '.join(OPTIONS)}; got {name}={options[name]!r}")
        stats = check_names("stats", options.get("stats", ()), STATS)
        head = HeadOptions(**{name: value for name, value in options.items() if name != "stats"})
        return _Settings(head, stats)


class _Tap:
    """A forward pre-hook of the lm_head, in place for good: registering one cannot be compiled."""

    head = None  # that of the call in progress; PEFT may have put the one that was patched inside another
    hidden: Tensor | None = None  # what it was given

    def __call__(self, module: nn.Module, args: tuple):
        if module is not self.head:
            return None
        self.hidden = args[0]
        return (args[0][..., :1, :], *args[1:])


class _PatchedForward:
    """The instance's `forward`: an object and not a closure, so that the model can be copied and pickled."""

    def __init__(self, model: nn.Module, previous, settings: _Settings):
        self.model = model
        self.previous = previous  # a forward of the instance's own, TRL's for one; None: the class's
        self.settings = settings
        self.transform = LogitsTransform()
        self.tap = _Tap()

    @property
    def original(self):
        return self.previous if self.previous is not None else type(self.model).forward.__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)  # generate, Trainer and PEFT read argument names from it

    def __call__(self, *args, fastdpo: bool = False, **kwargs):
        if not fastdpo:
            return self.original(*args, **kwargs)
        # By name, since the backbone takes them in another order; None is every backbone's default
        arguments = inspect.signature(self.original).bind_partial(*args).arguments | kwargs
        arguments = {name: value for name, value in arguments.items() if value is not None}
        for name in ("logits_to_keep", "num_items_in_batch"):
            if name in arguments:
                raise TypeError(f"{name} has no effect with fastdpo=True; got {arguments[name]!r}")
        labels, shift_labels = arguments.pop("labels", None), arguments.pop("shift_labels", None)
        if (labels is None) == (shift_labels is None):
            given = "neither" if labels is None else "both"
            raise ValueError(f"fastdpo=True takes either labels or shift_labels; got {given}")
        hidden = self.hidden(**arguments)
        if shift_labels is not None:
            return self.score(hidden, shift_labels)
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(f"labels must have shape {tuple(hidden.shape[:-1])}; got {tuple(labels.shape)}")
        # The labels move and not hidden, [B, T, H], which a slice would copy
        last = labels.new_full((labels.shape[0], 1), self.settings.head.ignore_index)
        stats = self.score(hidden, torch.cat((labels[:, 1:], last), dim=1))
        return TokenStats(*(None if x is None else x[:, :-1] for x in stats))

    def hidden(self, **arguments) -> Tensor:
        """[B, T, H]: what the model's own forward gives the lm_head, which is then run on one position only."""
        head, tap = self.model.get_output_embeddings(), self.tap  # looked up now: PEFT and FSDP replace modules
        if list(head._forward_pre_hooks.values())[-1:] != [tap]:  # the last: FSDP's casts what the head is given
            _take_out_taps(head)
            head.register_forward_pre_hook(tap)
        if "use_cache" in self.__signature__.parameters:
            arguments["use_cache"] = False
        tap.head = head
        try:
            self.original(**arguments)
            hidden = tap.hidden
        finally:
            tap.head = tap.hidden = None
        if hidden is None:
            raise ValueError(f"{type(self.model).__name__} does not call its output embeddings")
        return hidden

    def score(self, hidden: Tensor, labels: Tensor) -> TokenStats:
        head = applied_head(self.model.get_output_embeddings(), hidden)
        options = self.settings.head
        return linear_token_stats(
            head.hidden,
            head.weight,
            labels.to(hidden.device),  # device_map may put inputs and head on two devices
            head.bias,
            stats=self.settings.stats,
            ignore_index=options.ignore_index,
            logit_scale=self.transform.logit_scale,
            softcap=self.transform.softcap,
            temperature=options.temperature,
            backward=options.backward,
            tau=options.tau,
            seed=options.seed,
            lora=head.lora,
            check_labels=options.check_labels,
        )


def _causal_model(model) -> nn.Module:
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(causal).__name__
    if not hasattr(causal, "get_output_embeddings") or not hasattr(causal, "config"):
        raise TypeError(f"model must be a causal language model of transformers, not yet wrapped; got {name}")
    if causal.config.is_encoder_decoder:
        raise TypeError(f"model must be decoder-only; {name} is an encoder-decoder")
    if causal.get_output_embeddings() is None:
        raise TypeError(f"model must have output embeddings (an lm_head); {name} has none")
    return causal


def _patched_forward(causal: nn.Module) -> _PatchedForward | None:
    forward = causal.__dict__.get("forward")
    return forward if isinstance(forward, _PatchedForward) else None


def _transforms(config) -> list[LogitsTransform]:
    """What the configuration may mean, the likeliest first."""

    def declared(names: tuple[str, ...]) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [float(x) for x in values if isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0]

    factors, divisors = declared(FACTORS), declared(DIVISORS)
    scales = [*factors, *(1 / x for x in divisors), *divisors, *(1 / x for x in factors), 1.0]
    return [LogitsTransform(s, c) for c in (*declared(SOFTCAPS), None) for s in dict.fromkeys(scales)]


@torch.no_grad()
def _probe(causal: nn.Module, patched: _PatchedForward) -> LogitsTransform:
    """The transform under which the log-probs of a few random tokens are those of the model's own logits."""
    name, head = type(causal).__name__, causal.get_output_embeddings()
    gain = 1.0

    def amplify(module, args):
        return (args[0] * gain, *args[1:])

    with _undisturbed(causal):
        generator = torch.Generator().manual_seed(0)
        hook = head.register_forward_pre_hook(amplify)
        try:
            ids, logits = _first_logits(patched, generator)
            gain = max(1.0, PROBE_LOGIT / max(float(logits.abs().max()), 1e-6))
            logits = _logits(patched, ids)[:, :8]
            hidden = patched.hidden(input_ids=ids)[:, :8]
        finally:
            hook.remove()
        if logits.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"the lm_head of {name} is given hidden states of shape {tuple(hidden.shape)} for logits of "
                f"shape {tuple(logits.shape)}"
            )
        labels = torch.randint(logits.shape[-1], (16, logits.shape[1]), generator=generator).to(logits.device)
        labels[0] = logits.argmax(-1)[0]
        expected = logits[0].double().log_softmax(-1).gather(1, labels.T).T
        tolerance = max(PROBE_TOLERANCE.get(x.dtype, 0.0) for x in (hidden, logits))
        allowed = tolerance * max(1.0, float(logits.abs().max()))

        trial = _PatchedForward(causal, patched.previous, _Settings(HeadOptions(), ()))
        differences = []
        for transform in _transforms(causal.config.get_text_config()):
            trial.transform = transform
            logps = trial.score(hidden.expand(len(labels), -1, -1), labels).logps
            difference = (logps.to(expected) - expected).abs().max().nan_to_num(nan=math.inf).item()
            if difference <= allowed:
                return transform
            differences.append(difference)
    raise ValueError(
        f"the log-probs of {name} do not follow from its hidden states and lm_head: with any scale and "
        f"softcap that its configuration names, they differ from its own by {min(differences):.3g} nats or "
        f"more (allowed: {allowed:.2g})"
    )


def _first_logits(patched: _PatchedForward, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids [1, T], the model's logits), for the first T that the model takes: some compute in chunks of 64."""
    ordinary = _ordinary_tokens(patched.model)
    failure = None
    for length in (8, 64):
        ids = ordinary[torch.randint(len(ordinary), (1, length), generator=generator)]
        try:
            return ids, _logits(patched, ids)
        except Exception as error:
            failure = failure or error
    name = type(patched.model).__name__
    raise ValueError(f"patch_model probes a model with input_ids alone, which {name} refuses: {failure}") from failure


def _logits(patched: _PatchedForward, ids: Tensor) -> Tensor:
    output = patched.original(input_ids=ids)
    return output["logits"] if hasattr(output, "keys") else output[0]


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
    ordinary = [i for i in range(min(embeddings.shape[0], 1000)) if i not in special]
    return torch.tensor(ordinary, device=embeddings.device)


@contextmanager
def _undisturbed(model: nn.Module):
    """Evaluation mode without autocast; training modes and random generators are put back."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.autocast(device.type, enabled=False):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
