"""Methods that run with lazy logits: what patching a trainer comes to when it reads ``model(...).logits``."""

from __future__ import annotations

import functools
import importlib
import inspect

from torch import nn

from ..models.lazy import lazy_aware
from ..models.lazy_head import check_options, lazy_logits

ORIGINAL = "fastdpo_original"
MODELS = ("model", "ref_model", "policy", "reference_model")


def lazily(method):
    """`method` of a trainer, or a function, with lazy logits from its model arguments and from what its trainer
    holds under one of the names `MODELS`. Options of `lazy_logits` are read from its attribute `options`."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        owner = given.get("self")
        if given.get("return_outputs") and not owner.model.training:
            return method(*args, **kwargs)  # evaluation hands the logits to the user's metrics
        models = [getattr(owner, name, None) for name in MODELS] + [x for x in given.values() if x is not owner]
        models = dict.fromkeys(model for model in models if isinstance(model, nn.Module))
        with lazy_logits(*models, **wrapper.options):
            return method(*args, **kwargs)

    wrapper.options = {}
    setattr(wrapper, ORIGINAL, method)
    return wrapper


def wrap(owner, name: str, options: dict, make=lazily) -> None:
    """Replace ``owner.name`` by its `lazily`, or give the one that is there new options."""
    if not hasattr(vars(owner)[name], ORIGINAL):
        setattr(owner, name, make(vars(owner)[name]))
    vars(owner)[name].options = options


def unwrap(owner) -> None:
    for name, member in list(vars(owner).items()):
        if inspect.isfunction(member) and hasattr(member, ORIGINAL):
            setattr(owner, name, getattr(member, ORIGINAL))


class Adapter:
    """`patch` and `unpatch` of one package: ``{module: {class: (method, ...)}}``, with None in the class's place for
    functions of the module, and ``{module: {function: ours}}`` for functions of logits, with `ours` as in `lazy_aware`.
    `make` gives what replaces the former, and raises RuntimeError for an original that it does not know.
    """

    def __init__(
        self,
        package: str,
        seams: dict[str, dict[str | None, tuple[str, ...]]],
        functions: dict | None = None,
        make=lazily,
    ):
        self.package = package
        self.seams = seams
        self.functions = functions or {}
        self.make = make

    def patch(self, **options) -> None:
        """Let the package's preference trainers compute their log-probs with fastdpo, from the next step on.

        Works before and after trainers are constructed. Calling it again replaces the options.

        Args:
            backward, tau, seed: as in `fastdpo.linear_logps`.

        Raises:
            TypeError, ValueError: naming the option.
            ImportError: the package cannot be imported.
            RuntimeError: a release whose classes or methods are others than are known; nothing is replaced.
        """
        check_options(f"{self.package}.patch", options)
        found = [(owner, name) for owner, names in self._owners() for name in names]
        for owner, name in found:
            if not inspect.isfunction(vars(owner).get(name)):
                raise RuntimeError(f"{owner} has no {name!r} of its own")
        functions = list(self._functions())
        for module, name, _ in functions:
            if not hasattr(module, name):
                raise RuntimeError(f"{module.__name__} has no function {name!r}")
        for owner, name in found:
            wrap(owner, name, options, self.make)
        for module, name, ours in functions:
            original = getattr(module, name)
            if not hasattr(original, ORIGINAL):
                setattr(module, name, lazy_aware(original, ours))

    def unpatch(self) -> None:
        """Put the package's own methods back; does nothing where `patch` has not been called."""
        for owner, _ in self._owners():
            unwrap(owner)
        for module, name, _ in self._functions():
            function = getattr(module, name, None)
            setattr(module, name, getattr(function, ORIGINAL, function))

    def _functions(self):
        for module, functions in self.functions.items():
            for name, ours in functions.items():
                yield importlib.import_module(module), name, ours

    def _owners(self):
        for module, classes in self.seams.items():
            loaded = importlib.import_module(module)
            for name, methods in classes.items():
                owner = loaded if name is None else getattr(loaded, name, None)
                if owner is None:
                    raise RuntimeError(f"{module} has no class {name!r}")
                yield owner, methods
