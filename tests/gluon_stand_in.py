"""Runs a Gluon kernel's own source without a GPU, one program after the other.

Tensors of torch stand for registers and shared memory, a thread for each partition. One of them runs at a time: before
every step that others could see, chance (a seed) says which goes on and which copy lands; one is the fastest for a
while. So a run repeats, and where nothing can go on there is a deadlock. What the hardware would leave to luck is a
Fault or NaN: a copy spoils its target until it lands, and a product reads its operands only when it is waited for.
"""

from __future__ import annotations
import __future__

import ast
import random
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
import triton.language as tl

SECONDS = 120  # of one program: far more than it takes


class Fault(Exception):
    """What the kernel must not do."""


class Registers(torch.Tensor):
    """A tensor of the kernel."""

    @property
    def type(self):
        return SimpleNamespace(layout=None)

    def __floordiv__(self, other):  # as in C
        return torch.div(self, other, rounding_mode="trunc")


def registers(x) -> Registers:
    return torch.as_tensor(x).as_subclass(Registers)


class Pointer:
    def __init__(self, memory: torch.Tensor, offset=0):
        self.memory, self.offset = memory, offset

    def __add__(self, offset) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    def at(self, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """(elements, mask), which lie in the tensor."""
        where, mask = torch.broadcast_tensors(torch.as_tensor(self.offset), torch.as_tensor(mask))
        if ((where < 0) | (where >= self.memory.numel()))[mask].any():
            raise Fault("an address outside of its tensor")
        return where.long(), mask


def load(pointer: Pointer, mask=True, other=0):
    where, mask = pointer.at(mask)
    found = torch.where(mask, pointer.memory.view(-1)[where.where(mask, 0)], other)
    return registers(found) if found.ndim else found.item()


def store(pointer: Pointer, value, mask=True) -> None:
    where, mask = pointer.at(mask)
    pointer.memory.view(-1)[where[mask]] = torch.as_tensor(value).broadcast_to(mask.shape)[mask]


class Shared:
    """A part of shared memory, or a barrier in it."""

    def __init__(self, data: torch.Tensor):
        self.data, self.parts, self.writes = data, {}, 0
        self.shape = data.shape
        self.phase = self.count = self.missing = self.bytes = 0  # of a barrier

    def index(self, i: int) -> Shared:
        if not 0 <= i < len(self.data):
            raise Fault(f"stage {i} of {len(self.data)}")
        return self.parts.setdefault(i, Shared(self.data[i]))

    def permute(self, order) -> tuple[Shared, tuple]:
        return self, order

    def write(self, data) -> None:
        self.data.copy_(torch.as_tensor(data))
        self.writes += 1

    def arrive(self, count: int, landed: int = 0) -> None:
        self.missing -= count
        self.bytes -= landed
        if self.missing < 0 or (self.missing == 0 and self.bytes < 0):
            raise Fault("a barrier takes more arrivals or bytes than it waits for")
        if self.missing == self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Product:
    """An accumulator that is not there before its wait."""

    def __init__(self, a: Shared, b: Shared, acc):
        self.a, self.b, self.acc, self.value = a, b, acc, None
        self.writes = a.writes, b.writes

    def finish(self) -> None:
        if self.writes != (self.a.writes, self.b.writes):
            raise Fault("an operand was written while a product read it")
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        self.value = registers(acc + self.a.data.float() @ self.b.data.float().T)


class Machine:
    """The primitives, for one program."""

    def __init__(self, program: int, programs: int, seed: int):
        self.program, self.programs = program, programs
        self.random = random.Random(seed)
        self.turn = threading.Condition()
        self.current: threading.Thread | None = None
        self.paused: dict = {}  # partition -> what it waits for
        self.copies: list = []  # in flight
        self.products: dict[threading.Thread, list[Product]] = {}
        self.fastest = None
        self.fault: Exception | None = None

    # Turns

    def pause(self, until=lambda: True) -> None:
        me = threading.current_thread()
        with self.turn:
            self.paused[me] = until
            self.pass_on()
            self.turn.wait_for(lambda: self.fault or self.current is me)
            if self.fault:
                raise self.fault

    def pass_on(self) -> None:
        while self.paused and not self.fault:
            ready = [one for one, until in self.paused.items() if until()]
            able = [*ready, *self.copies]
            if not able:
                self.fault = Fault("a deadlock")
                break
            if self.random.random() < 0.05:
                self.fastest = self.random.choice(list(self.paused))
            chosen = self.fastest if self.fastest in ready else self.random.choice(able)
            if chosen in ready:
                self.current = chosen
                del self.paused[chosen]
                break
            self.copies.remove(chosen)
            chosen()
        self.turn.notify_all()

    def warp_specialize(self, partitions, warps, registers) -> None:
        def run(function, arguments):
            try:
                with self.turn:
                    self.turn.wait_for(lambda: self.fault or self.current is threading.current_thread())
                if not self.fault:
                    function(*arguments)
            except Exception as error:
                self.fault = self.fault or error
            with self.turn:
                self.pass_on()

        threads = [threading.Thread(target=run, args=one, daemon=True) for one in partitions]
        self.paused = dict.fromkeys(threads, lambda: True)
        for one in threads:
            one.start()
        with self.turn:
            self.pass_on()
        for one in threads:
            one.join(SECONDS)
            if one.is_alive():
                raise Fault("no end")
        if self.fault:
            raise self.fault
        if self.copies or any(self.products.values()):
            raise Fault("copies or products are in flight at the end")

    # What partitions see of each other

    def allocate(self, dtype, shape, layout) -> Shared:
        dtype = TYPES[dtype]
        return Shared(torch.full(shape, torch.nan if dtype.is_floating_point else 0, dtype=dtype))

    def init(self, barrier: Shared, count: int) -> None:
        barrier.count = barrier.missing = count

    def expect(self, barrier: Shared, bytes: int) -> None:
        self.pause()
        barrier.bytes += bytes
        barrier.arrive(1)

    def arrive(self, barrier: Shared, count: int = 1, pred=True) -> None:
        self.pause()
        if pred:
            barrier.arrive(count)

    def wait(self, barrier: Shared, phase: int) -> None:
        self.pause(lambda: barrier.phase & 1 != phase)

    def load_box(self, source, corner, barrier: Shared, target: Shared) -> None:
        self.pause()
        box, base = source.block_shape, source.base
        if target.shape != torch.Size(box) or target.data.dtype != base.dtype:
            raise Fault("a box of another shape or type than its target")
        target.write(torch.full(box, torch.nan))

        def land():
            found = base[corner[0] : corner[0] + box[0], corner[1] : corner[1] + box[1]]
            pad = (0, box[1] - found.shape[1], 0, box[0] - found.shape[0])
            target.write(torch.nn.functional.pad(found, pad))
            barrier.arrive(0, source.block_type.nbytes)

        self.copies.append(land)

    def mma(self, a: Shared, b, acc, is_async=False) -> Product:
        self.pause()
        b, order = b
        if order != (1, 0) or not is_async or a.shape[1] != b.shape[1]:
            raise Fault("a product of other operands than this stand-in knows")
        one = Product(a, b, acc)
        self.products.setdefault(threading.current_thread(), []).append(one)
        return one

    def mma_wait(self, num_outstanding=0, deps=()):
        self.pause()
        running = self.products.setdefault(threading.current_thread(), [])
        while len(running) > num_outstanding:
            running.pop(0).finish()
        (one,) = deps
        return one if one.value is None else one.value


# Arithmetic


def largest(x, axis):
    """Without regard to NaN, as the hardware's."""
    return x.where(x == x, -torch.inf).amax(axis)


def limit(of_tensors, of_numbers):
    def function(x, y):
        if not isinstance(x, torch.Tensor) and not isinstance(y, torch.Tensor):
            return of_numbers(x, y)
        x, y = torch.as_tensor(x), torch.as_tensor(y)
        return registers(of_tensors(x, y.to(x.dtype)))

    return function


def reduce_or(x, axis) -> int:
    found = 0
    for one in x.tolist():
        found |= one
    return found


TYPES = {tl.float16: torch.float16, tl.bfloat16: torch.bfloat16, tl.int64: torch.int64}


def language(machine: Machine) -> SimpleNamespace:
    return SimpleNamespace(
        **{"float32": torch.float32, "int64": tl.int64, "int32": torch.int32},
        abs=torch.abs,
        allocate_shared_memory=machine.allocate,
        arange=lambda first, end, layout: registers(torch.arange(first, end, dtype=torch.int32)),
        cdiv=lambda x, y: -(-x // y),
        convert_layout=lambda x, layout: x,
        exp2=torch.exp2,
        fma=lambda x, y, z: (x.double() * y + z).float(),
        load=load,
        max=largest,
        maximum=limit(torch.fmax, max),
        minimum=limit(torch.fmin, min),
        num_programs=lambda axis: machine.programs,
        permute=lambda x, order: x.permute(order),
        program_id=lambda axis: machine.program,
        reduce_or=reduce_or,
        reshape=lambda x, shape: x.reshape(shape),
        split=lambda x: x.unbind(-1),
        static_range=range,
        store=store,
        sum=lambda x, axis: x.sum(axis),
        warp_specialize=machine.warp_specialize,
        where=lambda condition, x, y: registers(torch.where(condition, x, y)),
        zeros=lambda shape, dtype, layout: registers(torch.zeros(shape, dtype=dtype)),
        NVMMADistributedLayout=lambda *_, **__: None,
        SliceLayout=lambda *_: None,
    )


def functions(module, machine: Machine, changes: dict[str, str]) -> dict:
    """The module's kernels as functions of Python over the machine's primitives; `changes`: of its text."""
    text = Path(module.__file__).read_text()
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"{module.__name__} has no {old!r}")
        text = text.replace(old, new)
    tree = ast.parse(text)
    tree.body = [x for x in tree.body if isinstance(x, ast.FunctionDef) and "jit" in attributes(x.decorator_list)]
    names = {}
    for name, x in vars(module).items():
        if isinstance(x, tl.constexpr):
            x = x.value
        elif hasattr(x, "fn") and x.fn.__module__ not in (module.__name__, "triton.language.standard"):
            x = functions(sys.modules[x.fn.__module__], machine, {})[name]
        names[name] = x
    names |= {
        "gl": language(machine),
        "tl": language(machine),
        "fence_async_shared": lambda: None,  # nothing here has two ways to see memory
        "libdevice": SimpleNamespace(fast_log2f=torch.log2),
        "load_box": machine.load_box,
        "mbarrier": SimpleNamespace(
            **{"init": machine.init, "expect": machine.expect, "arrive": machine.arrive, "wait": machine.wait},
            MBarrierLayout=lambda: None,
        ),
        "warpgroup_mma": machine.mma,
        "warpgroup_mma_wait": machine.mma_wait,
    }
    for function in tree.body:
        function.decorator_list = []
    exec(compile(tree, module.__file__, "exec", __future__.annotations.compiler_flag), names)
    return names


def attributes(decorators: list) -> set[str]:
    return {x.attr for one in decorators for x in ast.walk(one) if isinstance(x, ast.Attribute)}


def run(kernel, grid: tuple[int], arguments: dict, *, seed: int = 0, changes: dict[str, str] | None = None) -> None:
    """kernel[grid](**arguments)."""

    def argument(x):
        if isinstance(x, torch.Tensor):
            return Pointer(x)
        if isinstance(x, tuple):
            return type(x)(*map(argument, x))
        if hasattr(x, "block_shape"):
            size = x.base.element_size() * torch.Size(x.block_shape).numel()
            return SimpleNamespace(**vars(x), block_type=SimpleNamespace(nbytes=size))
        return x

    for program in range(grid[0]):
        machine = Machine(program, grid[0], seed + program)
        function = functions(sys.modules[kernel.fn.__module__], machine, changes or {})[kernel.fn.__name__]
        function(**{name: argument(x) for name, x in arguments.items()})
