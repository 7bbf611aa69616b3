"""Methods that run with lazy logits: what patching a trainer comes to when it reads ``model(...).logits``."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from ..models.lazy.head import lazy_logits
from ..models.lazy.logits import LazyLogits
from ..models.options import TRAINER_OPTIONS, head_options

if TYPE_CHECKING:
    from ..typed import TrainerOptions, Unpack

MODELS = ("model", "ref_model", "policy", "reference_model")


class Replacements:
    """What stands in the place of other packages' objects, and the options of all of it.

    Remembered here, so that nothing found in a package is asked whether it is ours: to be asked for an attribute is to
    import for some objects, and to raise for others, as transformers' in the place of classes that need Pillow.
    """

    def __init__(self):
        self.options: dict = {}  # read in every call
        self.pairs: list[tuple] = []  # (ours, theirs)
        self.places: dict[tuple[int, str], object] = {}  # (id(owner), name) -> owner

    def replace(self, owner, name: str, make: Callable) -> None:
        """``owner.name`` by ``make(it, self)``, unless that is done."""
        theirs = vars(owner)[name]
        if any(theirs is ours for ours, _ in self.pairs):
            return
        ours = next((ours for ours, known in self.pairs if known is theirs), None)
        if ours is None:
            ours = make(theirs, self)
            self.pairs.append((ours, theirs))
        self.places[id(owner), name] = owner
        setattr(owner, name, ours)

    def replace_everywhere(self, modules: Iterable[ModuleType], theirs, make: Callable) -> None:
        for module in modules:
            for name in [name for name, value in vars(module).items() if value is theirs]:
                self.replace(module, name, make)

    def replace_all(self, places: Iterable[tuple]) -> None:
        """`places`: what `replace` takes, each."""
        for place in places:
            self.replace(*place)

    def restore(self, modules: Iterable[ModuleType] = ()) -> None:
        """Puts back what is in its place now; in `modules` also what they have imported of it since."""
        places = [(owner, name) for (_, name), owner in self.places.items()]
        for owner, name in places + [(module, name) for module in modules for name in vars(module)]:
            value = vars(owner).get(name)
            for ours, theirs in self.pairs:
                if value is ours:
                    setattr(owner, name, theirs)


def lazily(method, replacements: Replacements, held: tuple[str, ...] = MODELS):
    """`method` of a trainer, or a function, with lazy logits from its model arguments and from what its trainer
    holds under one of the names `held`."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        owner = given.get("self")
        if given.get("return_outputs") and not owner.model.training:
            return method(*args, **kwargs)  # evaluation hands the logits to the user's metrics
        models = [getattr(owner, name, None) for name in held] + [x for x in given.values() if x is not owner]
        models = dict.fromkeys(model for model in models if isinstance(model, nn.Module))
        with lazy_logits(*models, **replacements.options):
            return method(*args, **kwargs)

    return wrapper


def lazy_aware(ours):
    """Makes of a function of logits and more one that is ``ours(logits, arguments)`` for `LazyLogits`."""

    def make(original, _):
        signature = inspect.signature(original)

        @functools.wraps(original)
        def function(*args, **kwargs):
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            logits = next(iter(given.arguments.values()))
            lazy = isinstance(logits, LazyLogits) and logits.lazy
            return ours(logits, given.arguments) if lazy else original(*args, **kwargs)

        return function

    return make


def load(module: str, needs: str) -> ModuleType:
    """`module`; or an ImportError that begins with `needs`, whatever importing it raises."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ImportError(f"{needs}; importing {module} raised {type(error).__name__}: {error}") from error


class Adapter(Replacements):
    """`patch` and `unpatch` of one package: ``{module: names}``, with methods as ``"Class.method"``, for what runs with
    lazy logits; and ``{module: {name: make}}``, with `make` as in `replace`, which raises RuntimeError for an original
    that it does not know.
    """

    def __init__(self, package: str, lazy: dict[str, tuple[str, ...]], others: dict[str, dict] | None = None):
        super().__init__()
        self.package = package
        self.seams = [(module, dict.fromkeys(names, lazily)) for module, names in lazy.items()]
        self.seams += (others or {}).items()

    def patch(self, **options: Unpack[TrainerOptions]) -> None:
        """Let the package's preference trainers compute their log-probs with fastdpo, from the next step on.

        Works before and after trainers are constructed. Calling it again replaces the options.

        Args:
            backward, tau, seed: as in `fastdpo.linear_logps`.

        Raises:
            TypeError, ValueError: naming the option.
            ImportError: the package cannot be imported.
            RuntimeError: a release whose classes or methods are others than are known; nothing is replaced.
        """
        head_options(f"{self.package}.patch", options, TRAINER_OPTIONS)
        found = []
        for module, names in self.seams:
            loaded = load(module, f"{self.package}.patch needs {self.package}")
            for path, make in names.items():
                kind, _, name = path.rpartition(".")
                owner = vars(loaded).get(kind) if kind else loaded
                if not inspect.isfunction(getattr(owner, "__dict__", {}).get(name)):
                    raise RuntimeError(f"{'.'.join(filter(None, (module, kind)))} has no {name!r} of its own")
                found.append((owner, name, make))
        self.options = options
        self.replace_all(found)

    def unpatch(self) -> None:
        """Put the package's own methods back; does nothing where `patch` has not been called."""
        self.restore()
