"""The demo's meters."""

import time

import pytest
import torch

from fastdpo.demo import meters


class SlowIdentity(torch.autograd.Function):
    """Identity whose backward takes 50 ms."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        time.sleep(0.05)
        return dx


class TestMeasuring:
    def test_head_timer_counts_every_node_inside_and_none_outside(self):
        class Head:
            @staticmethod
            def apply(hidden, weight, bias):
                time.sleep(0.05)
                return SlowIdentity.apply(SlowIdentity.apply(hidden) * weight.sum()), None

        timer = meters.HeadTimer(Head)
        hidden, weight = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
        before = SlowIdentity.apply(hidden)
        SlowIdentity.apply(timer.apply(before, weight, None)[0]).sum().backward()
        assert timer.calls == 1
        assert 0.15 <= timer.seconds < 0.2
        assert hidden.grad.tolist() == [2, 2, 2] and weight.grad.tolist() == [3, 3]

    def test_head_timer_without_gradients(self):
        timer = meters.HeadTimer(SlowIdentity)
        with torch.no_grad():
            timer.apply(torch.ones(3, requires_grad=True))
        assert timer.calls == 1 and timer.seconds < 0.05

    @pytest.mark.skipif(torch.cuda.is_available(), reason="measures GPU memory there")
    def test_memory_peak_sees_what_is_freed_again(self):
        pytest.importorskip("psutil")
        with meters.MemoryPeak() as memory:
            block = torch.ones(256 * 2**20, dtype=torch.uint8)
            time.sleep(0.2)  # as long as something that holds memory runs: the peak is sampled
            del block
        assert 240 * 2**20 < memory.bytes < 320 * 2**20

    def test_memory_peak_on_a_gpu_is_the_allocators(self, monkeypatch):
        state = {"now": 100, "peak": 900}  # of what ran before

        def reset():
            state["peak"] = state["now"]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state["now"])
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state["peak"])
        with meters.MemoryPeak() as memory:
            state["peak"] = 350
        assert memory.bytes == 250

    def test_a_gpu_has_done_its_work_when_the_clock_is_read(self, monkeypatch):
        waited = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(time.sleep(0.05)))
        begin = time.perf_counter()
        assert meters.HeadTimer.now() >= begin + 0.05 and len(waited) == 1
