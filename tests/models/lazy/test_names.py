"""Lazy logits against torch's own list of operations: every name of torch.Tensor, torch and its function modules that
takes real logits takes lazy ones, with the same result, the same logits afterwards and the same gradients."""

import functools
import inspect
import re
import types

import numpy
import pytest
import torch
from torch import Tensor, nn

from fastdpo.integrations import lazy_logits
from fastdpo.models.lazy.tensor import Lazy

B, T, H, V = 2, 3, 4, 6
HOMES = {
    "Tensor": Tensor,
    "torch": torch,
    "functional": torch.nn.functional,
    "linalg": torch.linalg,
    "special": torch.special,
    "fft": torch.fft,
}
# Change torch itself, start or await threads, read or write files, compile
GLOBAL = re.compile("(set|use|init|import)_.*|.*seed|fork|wait|load|save|compile|enable_grad")
OTHERWISE = {
    # addresses, identities and sizes of Python objects
    "data_ptr", "__hash__", "__sizeof__", "__dir__", "__reduce__", "__getstate__", "__init__", "__new__", "storage",
    "untyped_storage", "const_data_ptr", "mutable_data_ptr", "__dlpack__", "to_dlpack", "__reduce_ex__", "reinforce",
    # what is in the memory is not defined
    "empty_like", "new_empty", "new_empty_strided", "new", "resize", "empty", "empty_permuted", "empty_strided",
    # a LazyLogits is no Tensor: these ask for the type, or take nothing else, and raise
    "__class__", "__init_subclass__", "__subclasshook__", "__getattribute__", "__setattr__", "__delattr__", "__dict__",
    "__torch_function__", "__torch_dispatch__", "__annotations__", "__doc__", "__module__", "__weakref__",
    "__slotnames__",  # what copyreg remembers of a class once it was copied
    "__setstate__", "__dlpack_c_exchange_api__", "has_torch_function", "has_torch_function_unary",
    "has_torch_function_variadic", "is_tensor", "is_storage",
    "typename",
    # take what has __dlpack__, which refuses a tensor that requires grad, and has to
    "as_tensor", "asarray", "tensor",
    # ends in bytes that are not defined
    "fbgemm_pack_gemm_matrix_fp16",
    # torch hands its overrides other arguments than it takes itself: einsum(z, [0, 1, 2]), a positional return_inverse
    "einsum(dims)", "unique_consecutive(True)",
}  # fmt: skip


def exact(*shape: int, seed: int) -> Tensor:
    """Multiples of 1/4 below 1: their products and the sums of them have no rounding in any type."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator) / 4


@functools.cache
def heads(dtype: torch.dtype) -> nn.Linear:
    head = nn.Linear(H, V).to(dtype)
    with torch.no_grad():
        head.weight.copy_(exact(V, H, seed=1))
        head.bias.copy_(exact(V, seed=2))
    return head


class Run:
    """One forward, real or lazy, and a view of its logits."""

    def __init__(self, lazy: bool, dtype: torch.dtype, grad: bool):
        self.head = heads(dtype)
        self.head.zero_grad()
        self.hidden = exact(B, T, H, seed=3).to(dtype).requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            if lazy:
                with lazy_logits(self.head, backward="exact"):
                    self.logits = self.head(self.hidden)
                assert isinstance(self.logits, Lazy)
            else:
                self.logits = self.head(self.hidden).float()  # lazy logits are fp32 whatever the model's type
            self.part = self.logits[:, :-1]
        self.error = self.result = None

    def do(self, operation, arguments) -> None:
        torch.manual_seed(0)
        try:
            self.result = plain(operation(self.logits, *arguments()))
        except Exception as error:
            self.error = error

    def outcome(self):
        """(what came out, the logits and their view now, gradients), of plain tensors and values."""
        z, part = plain(self.logits), plain(self.part)
        tensors = [x for x in (*leaves(self.result), z, part) if isinstance(x, Tensor)]
        state = [(x.dtype, x.shape, x.requires_grad, x.detach().resolve_conj().resolve_neg()) for x in tensors]
        others = [x for x in leaves(self.result) if not isinstance(x, Tensor)]
        roots = [x for x in tensors if x.requires_grad and x.grad_fn is not None and x.numel()]
        gradients, failure = [], None
        try:
            if roots:
                sum(
                    (x.abs() if x.is_complex() else x).double().nan_to_num(0, 0, 0).square().sum() for x in roots
                ).backward()
                gradients = [x.grad for x in (self.hidden, *self.head.parameters())]
        except Exception as error:
            failure = type(error)
        return state, others, gradients, failure


def plain(value):
    if isinstance(value, Lazy):
        made = value.tensor("the test")
        assert value.shape == made.shape and value.dtype == made.dtype and value.requires_grad == made.requires_grad
        return made
    if isinstance(value, types.GeneratorType) or type(value).__name__.endswith("iterator"):
        return plain(list(value))
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return [plain(x) for x in value]
    return value


def leaves(value) -> list:
    return [y for x in value for y in leaves(x)] if isinstance(value, list) else [value]


def same(a, b, tolerance: float) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.layout != torch.strided or a.is_quantized:
            return a.layout == b.layout and same(
                *(x.dequantize() if x.is_quantized else x.to_dense() for x in (a, b)), tolerance
            )
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        finite = a[a.isfinite()]
        largest = (finite.abs() if a.is_complex() else finite.double().abs()).max().item() if finite.numel() else 0.0
        return torch.allclose(a, b, tolerance, tolerance * min(largest, 1e6), equal_nan=True)
    if isinstance(a, numpy.ndarray):
        return isinstance(b, numpy.ndarray) and a.dtype == b.dtype and numpy.array_equal(a, b, equal_nan=True)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b))
    if isinstance(a, float):
        return type(b) is float and (a == b or (a != a and b != b) or abs(a - b) < tolerance)
    if callable(a) or type(a).__repr__ is object.__repr__ or type(a).__module__.startswith("torch.utils.hooks"):
        return type(a) is type(b)
    if "grad_fn" in str(a) or "Backward" in str(a):  # a view of what view it is
        return str(a).split("grad_fn")[0] == str(b).split("grad_fn")[0] or type(a).__name__.endswith("Backward0")
    return type(a) is type(b) and bool(a == b)


def full(value):
    return lambda: torch.full((B, T, V), value)


ARGUMENTS = {
    "": lambda: (),
    "-1": lambda: (-1,),
    "0": lambda: (0,),
    "2.0": lambda: (2.0,),
    "0.25": lambda: (0.25,),
    "True": lambda: (True,),
    "0, 1": lambda: (0, 1),
    "1, 2": lambda: (1, 2),
    "-0.5, 0.5": lambda: (-0.5, 0.5),
    "tensor": lambda: (exact(B, T, V, seed=4),),
    "tensor, tensor": lambda: (exact(B, T, V, seed=4), exact(B, T, V, seed=5)),
    "matrix": lambda: (exact(V, V, seed=4),),
    "vector": lambda: (exact(V, seed=4),),
    "0-d": lambda: (torch.tensor(1.5),),
    "labels": lambda: (exact(B, T, V, seed=4) > 0,),
    "mask, 0.5": lambda: (exact(B, T, V, seed=4) > 0, 0.5),
    "mask, tensor": lambda: (exact(B, T, V, seed=4) > 0, exact(B, T, V, seed=5)),
    "row mask": lambda: (exact(B, T, seed=4) > 0,),
    "-1, index": lambda: (-1, torch.tensor([[[1, 0], [2, 3], [0, 0]], [[4, 4], [5, 1], [2, 2]]])),
    "-1, index, 0.5": lambda: (-1, torch.tensor([[[1], [2], [0]], [[4], [5], [2]]]), 0.5),
    "-1, index, tensor": lambda: (-1, torch.tensor([[[1], [2], [0]], [[4], [5], [2]]]), exact(B, T, 1, seed=6)),
    "0, row": lambda: (0, torch.tensor([1])),
    "0, row, 0.5": lambda: (0, torch.tensor([1]), 0.5),
    "0, row, tensor": lambda: (0, torch.tensor([1]), exact(1, T, V, seed=6)),
    "ints": lambda: (torch.tensor([1, 0]),),
    "shape": lambda: ((B * T, V),),
    "2, dim": lambda: (2, 0),
    "2, 0, 1": lambda: (2, 0, 1),
    "dims": lambda: ((2, 0, 1),),
    "pair": lambda: ((1, 1),),
    "dtype": lambda: (torch.float64,),
    "dim, dtype": lambda: (-1, torch.float64),
    "name": lambda: ("cpu",),
    "item": lambda: ((0, 1, 2), 0.5),
    "ban": lambda: ((..., [1, 3]), 0.5),
    "hook": lambda: (lambda gradient: gradient * 2,),
    "weight": lambda: ((V,), exact(V, seed=4), exact(V, seed=5)),
    "targets": lambda: (torch.tensor([[0, 1, 2, 3, 4, 5], [1, 1, 1, 0, 0, 0]]),),
}
TAKEN = 3  # argument lists that a name is compared with, of those that it takes


def operations(home: str):
    module = HOMES[home]
    for name in sorted(dir(module)):
        value = inspect.getattr_static(module, name) if home == "Tensor" else getattr(module, name)
        private = name.startswith("_") and not (home == "Tensor" and name.startswith("__"))
        if private or name in OTHERWISE or inspect.isclass(value) or inspect.ismodule(value):
            continue
        if home != "Tensor":
            if callable(value) and not GLOBAL.fullmatch(name):
                yield name, value
        elif callable(value):
            yield name, lambda z, *arguments, name=name: getattr(z, name)(*arguments)
        else:
            yield name, lambda z, *, name=name: getattr(z, name)


def compare(operation, arguments, dtype, grad) -> str | None:
    """What differs."""
    theirs, ours = Run(False, dtype, grad), Run(True, dtype, grad)
    theirs.do(operation, arguments)
    ours.do(operation, arguments)
    if theirs.error is not None:
        return None if ours.error is not None else f"torch: {theirs.error!r}, lazy: {ours.result!r}"
    if ours.error is not None:
        return f"lazy: {ours.error!r}"
    theirs, ours = theirs.outcome(), ours.outcome()
    for what, a, b in zip(("tensors", "values", "gradients", "backward"), theirs, ours):
        if not same(a, b, 1e-5 if dtype == torch.float32 else 2e-2):  # gradients are rounded to it
            return f"{what}: torch {a!r}, lazy {b!r}"
    return None


@functools.cache
def worth_comparing(home: str) -> list:
    """(name, operation, the names of argument lists that torch takes, or of one that it refuses)."""
    found = []
    for name, operation in operations(home):
        takes = []
        for given, arguments in ARGUMENTS.items():
            run = Run(False, torch.float32, True)
            run.do(operation, arguments)
            if run.error is None and f"{name}({given})" not in OTHERWISE:
                takes.append(given)
            if len(takes) == TAKEN:
                break
        found.append((name, operation, takes))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize(
    ("dtype", "grad", "taken"), [(torch.float32, True, TAKEN), (torch.float32, False, 1), (torch.bfloat16, True, 1)]
)
@pytest.mark.slow
def test_every_name(home, dtype, grad, taken):
    differences = []
    for name, operation, takes in worth_comparing(home):
        for given in [*takes[:taken], *([] if "" in takes else [""])]:
            difference = compare(operation, ARGUMENTS[given], dtype, grad)
            if difference is not None:
                differences.append(f"{name}({given}) {difference[:300]}")
    assert not differences, f"{len(differences)}\n" + "\n".join(differences)
    compared = sum(len(takes) > 0 for *_, takes in worth_comparing(home))
    assert compared > {"Tensor": 400, "torch": 300, "functional": 60}.get(home, 10)
