"""Hugging Face causal language models: `model(..., labels=labels, fastdpo=True)` returns ModelTokenStats.

hidden = what the model's own forward gives its lm_head; the module itself is run on one position per sequence
logps[t] = log p(labels[t + 1])     from hidden[t] and the lm_head; the logits, [B, T, V], never exist
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..head import HeadOptions, LogitTransform
from ..ops.problem import STATS, TokenStats
from ..validation import check_names
from .head_call import PLAIN, HeadCall, calling, other_hooks, place_hooks, remove_hooks
from .lm_head import AppliedHead
from .options import MODEL_OPTIONS, head_options
from .probe import declared_transforms, logits_of, probe
from .wrappers import origin, refuse_before_gathering, refuse_wrapped_between

if TYPE_CHECKING:
    from ..typed import ModelOptions, Unpack

Model = TypeVar("Model", bound=nn.Module)

# Arguments of a call that can have one meaning only, and the values that mean it
NO_EFFECT = {"use_cache": (False,), "logits_to_keep": (0,), "return_dict": (True,), "num_items_in_batch": ()}
SERVED_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
# Attributes of the model: the patch, whatever has since been put around its `forward`; and accelerate's, while it is
# prepared, of the forward without autocast
STATE, UNPREPARED = "_fastdpo", "_original_forward"


def patch_model(model: Model, **options: Unpack[ModelOptions]) -> Model:
    """Teach `model` to return token log-probs: ``model(input_ids, ..., labels=labels, fastdpo=True)``.

    Such a call runs the model's own forward up to the lm_head and returns `ModelTokenStats` of shape
    ``[B, T - 1]`` for `labels` shifted as in the model's own loss, or ``[B, T]`` for `shift_labels`, taken as
    they are; with several ids of each position, ``[B, T, K]``, as in `linear_token_stats`. Equivalent to::

        logps = (model(input_ids, ...).logits[:, :-1].float() / temperature).log_softmax(-1)
        logps = logps.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
        logps = logps.masked_fill(labels[:, 1:] == ignore_index, 0.0)

    Without ``fastdpo=True`` the model behaves as before. Patching it again replaces the options.

    Args:
        model: a ``PreTrainedModel`` with an lm_head, causal or vision-language, or a ``PeftModel`` or
            ``torch.compile`` around one (the model inside is patched). PEFT, ``torch.compile``, accelerate's
            ``prepare``, tensor parallelism and ``deepspeed.initialize`` may come before or after; DDP and FSDP, after.
            It must be able to run on ``input_ids`` alone.
        backward, tau, seed, temperature, ignore_index, check_labels, accumulate_into: as in `linear_logps`.
            Scale, softcap and bias are the model's own.
        stats: the statistics to return besides `logps`, as in `linear_token_stats`; none by default.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: naming the option, or what `model` lacks; also when the log-probs of a few
            random tokens are not the model's own, naming its class and the difference. The model is then
            as it was. From a call: an argument that would have no effect, and a model that has changed since.
        NotImplementedError: from here or from a call, a head that is quantised, offloaded,
            adapted by something else than LoRA, DoRA, ``modules_to_save`` and trainable tokens, or has a forward
            or a hook of its own that would be left out; naming it. A head of which FSDP is applied to a part alone (an
            adapter, the base layer), adapters on it under ZeRO-3, FSDP before `patch_model`; ``DataParallel``.

    Guarantees:
        Those of `linear_token_stats`. Log-probs are computed in the forward of the lm_head, where FSDP (of any group
        that holds the head, resharded or not), HSDP and ZeRO-3 gather its parameters, and hang on their hooks, which
        gather again before the backward and reduce; a tensor-parallel head is computed on its shards. Patching leaves
        parameters, gradients, training modes and random generators as they were; `deepcopy`, `pickle`,
        `save_pretrained` and `generate` go on working. LoRA on the lm_head stays two factors, also of several active
        adapters; an active ``lora_dropout`` there, DoRA and trainable tokens cost one copy of its weight per call.
        Under prompt tuning PEFT puts virtual
        tokens before the labels, so the result has as many more positions, all 0. Calls in several threads, with
        and without ``fastdpo=True``, do not see each other. What the model makes of its lm_head's output is measured
        in every call: another scale or softcap of its configuration is followed, and anything else raises; on a GPU
        and in a compiled graph, where looking would be to wait, log-probs and gradients are then NaN.
    """
    settings = _Settings.of(options)
    causal = _causal_model(model)
    patched = causal.__dict__.get(STATE)
    if patched is not None and _leads_to_a_patch(causal.__dict__.get("forward")):
        patched.settings = settings
        causal._replicate_for_data_parallel = _refuse_data_parallel
        return model
    refuse_before_gathering(causal)
    patched = _PatchedForward(causal, settings)
    try:
        patched.seen = probe(causal, patched.call_original, patched.run)
    except BaseException:  # an interruption, too
        remove_hooks(causal)
        raise
    # at once: an interruption comes before or after
    causal.__dict__.update({STATE: patched, "forward": patched, "_replicate_for_data_parallel": _refuse_data_parallel})
    return model


def unpatch_model(model: Model) -> Model:
    """Take `patch_model` back; a model that is not patched is left as it is. Returns `model`.

    What accelerate or another has put around the model's `forward` since stays there, and ends in the model's own.
    """
    causal = _causal_model(model)
    patched, own = causal.__dict__.get(STATE), causal.__dict__.get("forward")
    if patched is None:
        return model
    if own is patched or isinstance(getattr(own, "__func__", None), _Unbound):
        own = patched.own
        causal.__dict__.pop("forward") if own is None else causal.__dict__.update(forward=own)
    patched.settings = None
    causal.__dict__.pop("_replicate_for_data_parallel", None)
    remove_hooks(causal)
    if own is patched.own:  # last: until then, whoever was interrupted can call again
        del causal.__dict__[STATE]
    return model


class ModelTokenStats(NamedTuple):
    """`TokenStats` of a model's call, and what the model returned besides logits, None where it did not."""

    logps: Tensor  # [B, T - 1], or [B, T - 1, K] of labels [B, T, K]; these five as in TokenStats
    entropy: Tensor | None
    mean_logit: Tensor | None
    is_top1: Tensor | None
    log_sum_sq_probs: Tensor | None
    aux_loss: Tensor | None = None  # 0-d, the router's load-balancing loss; differentiable, without its coefficient
    hidden_states: tuple[Tensor, ...] | None = None  # of output_hidden_states=True, at all T positions, as the others
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    lse: Tensor | None = None  # [B, T - 1], as in TokenStats


class _Settings(NamedTuple):
    options: HeadOptions
    stats: tuple[str, ...]

    @staticmethod
    def of(options: dict) -> _Settings:
        of_head = {name: value for name, value in options.items() if name != "stats"}
        of_head = head_options("patch_model, besides stats,", of_head, MODEL_OPTIONS)
        return _Settings(of_head, check_names("stats", options.get("stats", ()), STATS))


class _PatchedForward:
    """The instance's `forward`: an object and not a closure, so that the model can be copied and pickled."""

    def __init__(self, model: nn.Module, settings: _Settings):
        self.model = model
        self.previous = model.__dict__.get("forward")  # the instance's own, TRL's for one; None: the class's
        self.unprepared = model.__dict__.get(UNPREPARED)
        self.settings: _Settings | None = settings  # None: unpatched, inside of what else has wrapped the forward
        self.seen = (None, LogitTransform())  # what the configuration declared, and which of it the model does
        self.taken = (None, ())  # a forward, and the names of its positional arguments
        self.forward_then = self.forward_name()

    def __getstate__(self):
        return self.__dict__ | {"taken": (None, ())}

    @property
    def own(self):
        """The instance's own forward, without what accelerate has wrapped and taken back since."""
        unprepared = self.unprepared is not None and UNPREPARED not in self.model.__dict__
        return self.unprepared if unprepared else self.previous

    @property
    def original(self):
        own = self.own
        return own if own is not None else type(self.model).forward.__get__(self.model)

    def call_original(self, *args, **kwargs):
        """Not through `original`: where a graph breaks, dynamo makes the bound method anew, as ``model.forward``."""
        own = self.own
        return type(self.model).forward(self.model, *args, **kwargs) if own is None else own(*args, **kwargs)

    @property
    def transform(self) -> LogitTransform:
        return self.seen[1]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)  # generate, Trainer and PEFT read argument names from it

    # accelerate wraps `__func__` and, to undo that, takes the innermost `__wrapped__`: what it binds to the model
    __func__ = __wrapped__ = property(lambda self: _Unbound(self.__signature__))

    def __call__(self, *args, fastdpo: bool = False, **kwargs):
        if not fastdpo:
            return calling(PLAIN, self.call_original, *args, **kwargs)
        if self.settings is None:
            raise TypeError(f"fastdpo=True, but unpatch_model was called with this {type(self.model).__name__}")
        arguments = self.arguments(args, kwargs)
        labels, shift_labels = arguments.pop("labels", None), arguments.pop("shift_labels", None)
        if (labels is None) == (shift_labels is None):
            given = "neither" if labels is None else "both"
            raise ValueError(f"fastdpo=True takes either labels or shift_labels; got {given}")
        name, targets = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
        options, stats = self.settings

        def score(head: AppliedHead, transform: LogitTransform) -> TokenStats:
            rows = head.hidden.shape[:-1]
            if targets.shape[: len(rows)] != rows or targets.ndim > len(rows) + 1:
                shapes = f"{tuple(rows)}, or that with K labels in the place of one"
                raise ValueError(f"{name} must have shape {shapes}; got {tuple(targets.shape)}")
            of = targets
            if shift_labels is None:
                # The labels move and not hidden, [B, T, H], which a slice would copy
                last = labels.new_full((labels.shape[0], 1, *labels.shape[2:]), options.ignore_index)
                of = torch.cat((labels[:, 1:], last), dim=1)
            return head.token_stats(of, transform._replace(temperature=options.temperature), options, stats)

        call, output = self.run(self.transform, score, **arguments)
        transform, factor = self.followed(call, logits_of(output))
        if transform != call.transform:
            return self(*args, fastdpo=True, **kwargs)
        found = call.stats
        if factor is not None:
            found = [x if x is None or x.dtype == torch.bool else x * factor for x in found]
        if shift_labels is None:
            # copies, of few numbers: FSDP warns of views, whose in-place change its hooks would miss
            found = [None if x is None else x[:, :-1].clone() for x in found]
        return ModelTokenStats(**dict(zip(TokenStats._fields, found)), **_besides_logits(output))

    def arguments(self, args: tuple, kwargs: dict) -> dict:
        """By name, since the backbone takes them in another order; None is every backbone's default."""
        original = self.original
        function = getattr(original, "__func__", original)
        of, names = self.taken
        if of is not function:
            parameters = inspect.signature(original).parameters
            named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            names = tuple(name for name, parameter in parameters.items() if parameter.kind in named)
            self.taken = (function, names)
        positional = dict(zip(names, args))
        twice = [name for name in positional if name in kwargs]
        if twice or len(args) > len(names):
            what = f"{twice[0]} twice" if twice else f"{len(args)} positional arguments"
            raise TypeError(f"{type(self.model).__name__} takes {', '.join(names)}; got {what}")
        arguments = {name: x for name, x in (positional | kwargs).items() if x is not None}
        for name, value in arguments.items():
            if name in (*MODEL_OPTIONS, "stats") and name not in names:
                raise TypeError(f"{name} is an option of patch_model, not of a call; got {value!r}")
            meaningless = name in NO_EFFECT and (isinstance(value, Tensor) or value not in NO_EFFECT[name])
            if meaningless or (name.startswith("output_") and name not in SERVED_OUTPUTS and value):
                raise TypeError(f"{name} has no effect with fastdpo=True; got {value!r}")
        if "use_cache" in names:
            arguments["use_cache"] = False
        if not getattr(self.model.config, "return_dict", True):
            arguments["return_dict"] = True  # what the model returns is told apart by name
        return arguments

    def run(self, transform: LogitTransform, score, /, **arguments) -> tuple[HeadCall, object]:
        """The model's own forward, with known numbers as its logits; `score`: as in HeadCall."""
        head = self.model.get_output_embeddings()  # looked up now: PEFT and FSDP replace modules
        refuse_wrapped_between(self.model, head)
        place_hooks(head)
        call = HeadCall(head, transform, score)
        output = calling(call, self.call_original, **arguments)
        name = type(self.model).__name__
        if call.hidden is None or call.numbers is None:
            raise ValueError(f"{name} does not call its output embeddings")
        if call.grad_mode != torch.is_grad_enabled():
            raise NotImplementedError(
                f"{name} calls its lm_head in another grad mode: under no_grad, or inside of a reentrant checkpoint"
            )
        logits = logits_of(output)
        if logits.shape != call.shape and (call.part is None or logits.shape != call.part.shape):
            raise ValueError(f"{name} makes logits {tuple(logits.shape)} of its lm_head's {tuple(call.shape)}")
        if logits.requires_grad:
            raise NotImplementedError(f"{name} computes its logits with trainable parameters behind its lm_head")
        return call, output

    def followed(self, call: HeadCall, logits: Tensor) -> tuple[LogitTransform, Tensor | None]:
        """What the model makes of its lm_head's output now; and NaN if that is something else after all, 1 if not,
        None where it has been looked at: on a GPU that would be to wait, in a graph it cannot be done."""
        declared_then, transform = self.seen
        declared = declared_transforms(self.model.config)
        shown = call.shows(logits, transform)
        compiling = torch.compiler.is_dynamo_compiling()
        if compiling and declared != declared_then:
            raise RuntimeError("the configuration has changed since the last call outside of torch.compile")
        if declared == declared_then and (compiling or shown.device.type != "cpu" or type(shown) is not Tensor):
            return transform, torch.where(shown, 1.0, math.nan)
        if not shown:
            transform = next((x for x in declared if call.shows(logits, x)), None)
            if transform is None:
                raise ValueError(self._what_changed(call, declared != declared_then))
        self.seen = (declared, transform)
        return transform, None

    def _what_changed(self, call: HeadCall, configured: bool) -> str:
        now, hooks = self.forward_name(), ", ".join(origin(hook) for hook in other_hooks(call.head))
        suspects = {
            "its configuration": configured,
            f"its forward, {now} instead of {self.forward_then}": now != self.forward_then,
            f"a hook of its lm_head, {hooks}": bool(hooks),
            "its training mode": self.model.training,
        }
        found = [what for what, suspected in suspects.items() if suspected]
        return (
            f"{type(self.model).__name__} makes something else of its lm_head's output than when it was patched "
            f"({self.transform}), and no scale or softcap that its configuration names. What may have changed it: "
            f"{'; '.join(found) or 'an attribute, a buffer or a module behind the lm_head'}"
        )

    def forward_name(self) -> str:
        return origin(getattr(self.original, "__func__", self.original))


class _Unbound:
    """`_PatchedForward` as a function of the model: what is made of it for one model serves that one's copies."""

    def __init__(self, bound: inspect.Signature):
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        self.__signature__ = bound.replace(parameters=[this, *bound.parameters.values()])

    @property
    def __name__(self):
        raise AttributeError("a patched model that accelerate has unwrapped is pickled after a call, or unpatched")

    def __call__(self, model: nn.Module, *args, **kwargs):
        patched = model.__dict__[STATE]
        if getattr(model.__dict__["forward"], "__func__", None) is self and not torch.compiler.is_dynamo_compiling():
            model.forward = patched  # a bound method is pickled by a name that the class would have to have
        return patched(*args, **kwargs)


def _leads_to_a_patch(forward) -> bool:
    """Through accelerate's and other decorators that say what they have wrapped."""
    while forward is not None:
        if isinstance(getattr(forward, "__func__", forward), (_PatchedForward, _Unbound)):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _refuse_data_parallel():
    """In the place of the method by which DataParallel copies a module, whose copies would share one `forward`."""
    raise NotImplementedError("a patched model in DataParallel; use DistributedDataParallel, or make one GPU visible")


def _besides_logits(output) -> dict:
    """The fields of ModelTokenStats that are not TokenStats'."""
    if not hasattr(output, "keys"):
        if len(output) > 1:
            raise NotImplementedError(f"fastdpo=True with a model that returns a tuple of {len(output)}, without names")
        return {}
    fields = ("aux_loss", "hidden_states", "attentions", "router_logits")
    for name in output.keys():
        if name.endswith("loss") and name not in fields and output[name] is not None:
            raise NotImplementedError(f"fastdpo=True with a model that returns {name}")
    return {name: output[name] for name in fields if name in output.keys()}


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
