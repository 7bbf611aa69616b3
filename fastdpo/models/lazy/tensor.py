"""A stand-in for a tensor that is computed only if somebody needs it, and from then on is that tensor.

Cell    one tensor to be, with all its views, as torch's storage
Lazy    the tensor or a view of it: `step`, applied by torch itself to the real `parent`, makes the real view, so that
        shared memory, gradients, hooks and errors are torch's own
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_map_only

# Read from shape, strides and dtype, without values
METADATA = (
    "dim", "dtype", "element_size", "is_complex", "is_contiguous", "is_floating_point", "is_signed", "itemsize",
    "layout", "nbytes", "ndim", "ndimension", "nelement", "numel", "shape", "size", "stride",
)  # fmt: skip
# What sees the gradient that arrives at this very tensor
WATCHES = ("register_hook", "retain_grad", "grad_fn")
_signature = functools.cache(inspect.signature)
QUIET = tuple(os.path.dirname(sys.modules[name].__file__) + os.sep for name in ("fastdpo", "torch"))


class Unserved(Exception):
    """What is asked for is in the values alone."""


def serve_if(served) -> None:
    if not served:
        raise Unserved


@dataclass(eq=False, repr=False)
class Cell:
    """What becomes one tensor. Dataclasses with their tensors in the open: DDP searches a model's outputs for them."""

    tensor: Tensor | None = field(default=None, init=False)
    views: list[weakref.ref] = field(default_factory=list, init=False)

    def compute(self) -> Tensor:
        raise NotImplementedError

    def make(self, operation: str) -> None:
        """The tensor, and of it every view that is still held: all of them share its memory from here on."""
        message = (
            f"{operation} needs {self.what}: computed, and real from here on. To save memory, leave out what reads "
            "them here; log_softmax(-1).gather(...), cross_entropy and the usual metrics do without"
        )
        warnings.warn(message, stacklevel=_users_frame())
        self.tensor = self.compute()
        for view in [view() for view in self.views]:
            if view is not None:
                view.build()
        self.views.clear()


@dataclass(eq=False, repr=False)
class Lazy:
    cell: Cell
    parent: Lazy | None = field(default=None, kw_only=True)
    step: Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)
    grad_mode: bool = field(default_factory=torch.is_grad_enabled, init=False)
    made: Tensor | None = field(default=None, init=False)

    def __post_init__(self):
        self.cell.views.append(weakref.ref(self))

    @torch._disable_dynamo
    def tensor(self, operation: str) -> Tensor:
        """The real one, made with a warning that `operation` needs it where it does not exist yet."""
        _refuse_function(self)
        if operation in WATCHES:
            self.watch(operation)
        if self.made is None:
            self.cell.make(operation)
        return self.made

    def build(self) -> None:
        if self.made is None and self.parent is None:
            self.made = self.cell.tensor
        elif self.made is None:
            self.parent.build()
            with torch.set_grad_enabled(self.grad_mode):
                self.made = self.step(self.parent.made)

    def watch(self, operation: str) -> None:
        """Raises where gradients are already on their way past the real tensor."""

    def meta(self) -> Tensor:
        """Of the real one's shape, strides and dtype."""
        raise NotImplementedError

    @torch._disable_dynamo
    def call(self, method, function, args, kwargs):
        """`method` while nothing is computed; where it does not serve these arguments, torch's `function`."""
        _refuse_function(self)
        if self.made is None:
            try:
                given = _signature(method).bind(self, *args, **kwargs)
            except TypeError:
                pass  # torch's to say, or an option that is not known here
            else:
                with suppress(Unserved):
                    return method(*given.args, **given.kwargs)
        name = getattr(function, "__name__", "")
        return function(self.tensor(name), *real(args, name), **real(kwargs, name))

    def __getattr__(self, name: str):
        if name in METADATA:
            return getattr(self.meta() if self.made is None else self.made, name)
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return _bound(self, name) if callable(getattr(Tensor, name)) else getattr(self.tensor(name), name)

    def __setattr__(self, name: str, value) -> None:
        if hasattr(Tensor, name):
            setattr(self.tensor(name), name, real(value, name))
        else:
            object.__setattr__(self, name, value)

    @classmethod
    @torch._disable_dynamo
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tuple(args), dict(kwargs or {})
        if not args and isinstance(kwargs.get("input"), Lazy):
            args = (kwargs.pop("input"),)
        method = _served(args[0], func) if args else None
        if method is not None:
            return args[0].call(method, func, args[1:], kwargs)
        if func is torch.autograd.grad:
            wanted = kwargs["inputs"] if "inputs" in kwargs else args[1]
            tree_map_only(Lazy, lambda x: x.watch("autograd.grad"), wanted)
        name = getattr(func, "__name__", "")
        return func(*real(args, name), **real(kwargs, name))

    __hash__ = object.__hash__


def _refuse_function(value: Lazy) -> None:
    """torch.autograd.Function takes what is no Tensor for a constant, and would drop its gradient without a word."""
    frame = None if torch.is_grad_enabled() or not value.requires_grad else sys._getframe(2)
    while frame is not None:
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        if len(names) > 1 and issubclass(type(frame.f_locals.get(names[0])), FunctionCtx):
            if any(frame.f_locals.get(name) is value for name in names[1:]):
                raise TypeError("a torch.autograd.Function of lazy logits has no gradient: give it logits + 0")
        frame = frame.f_back


def _served(value, function) -> Callable | None:
    return value.SERVED.get(function) if isinstance(value, Lazy) else None


def real(value, operation: str):
    """`value`, a tensor or a structure of them, with tensors in the place of stand-ins."""
    return tree_map_only(Lazy, lambda x: x.tensor(operation), value)


def serves(cls: type[Lazy], **names: str) -> type[Lazy]:
    """Let each function and method of torch called `name` be ``cls.names[name]`` while nothing is computed."""
    cls.SERVED = {}
    for name, ours in names.items():
        method = getattr(cls, ours)
        for home in (torch, torch.nn.functional, Tensor):
            if hasattr(home, name):
                cls.SERVED[getattr(home, name)] = method
        if hasattr(Tensor, name):
            setattr(cls, name, _method(method, getattr(Tensor, name)))
    return cls


def _method(method, function):
    return lambda self, *args, **kwargs: self.call(method, function, args, kwargs)


def _bound(value: Lazy, name: str):
    """Not the real one's method yet: who only asks whether there is one needs no values."""
    return lambda *args, **kwargs: getattr(value.tensor(name), name)(*real(args, name), **real(kwargs, name))


def _special(name: str):
    return lambda self, *args, **kwargs: _bound(self, name)(*args, **kwargs)


# Python looks special methods up in the type. Not these: an object's own, and what would let C take it for a Tensor
FORWARDED = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
FORWARDED |= {"__repr__", "__str__", "__format__", "__reduce_ex__", "__delattr__"}
OWN = set(dir(Lazy)) - FORWARDED | {"__torch_dispatch__", "__dlpack_c_exchange_api__", "__weakref__", "__setstate__"}
for _name in dir(Tensor):
    if _name.startswith("__") and _name not in OWN:
        _value = getattr(Tensor, _name)
        if callable(_value):
            setattr(Lazy, _name, _special(_name))
        elif inspect.isdatadescriptor(_value):
            setattr(Lazy, _name, property(lambda self, name=_name: getattr(self.tensor(name), name)))
        else:
            setattr(Lazy, _name, _value)


def _users_frame() -> int:
    """The stacklevel, for who calls this, of the nearest line that is neither fastdpo's nor torch's."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(QUIET):
        frame, level = frame.f_back, level + 1
    return level
