"""What the demo measures of a training run from outside: time in the head and loss, and peak memory."""

import sys
import threading
import time

import torch


class HeadTimer:
    """Takes the place of the autograd Function that TRL scores tokens with, and times it from outside.

    The forward is the time of `apply`; the backward is the sum over the graph nodes between its outputs and
    inputs, so that a replacement may consist of any number of them.
    """

    def __init__(self, function):
        self.function = function
        self.calls = 0
        self.rows = 0
        self.seconds = 0.0
        self._started = 0.0

    @staticmethod
    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def apply(self, *arguments):
        start = self.now()
        outputs = self.function.apply(*arguments)
        self.seconds += self.now() - start
        self.calls += 1
        self.rows += arguments[0].shape[0]
        if torch.is_grad_enabled():
            self._watch_backward(outputs, [x for x in arguments if getattr(x, "requires_grad", False)])
        return outputs

    def _watch_backward(self, outputs, inputs):
        ends = {torch.autograd.graph.get_gradient_edge(tensor).node for tensor in inputs}
        found, pending = set(), [output.grad_fn for output in outputs if output is not None]
        while pending:
            node = pending.pop()
            if node is not None and node not in ends and node not in found:
                found.add(node)
                pending += [following for following, _ in node.next_functions]
        for node in found:
            node.register_prehook(self._start)
            node.register_hook(self._stop)

    def _start(self, grad_outputs):
        self._started = self.now()

    def _stop(self, grad_inputs, grad_outputs):
        self.seconds += self.now() - self._started


class MemoryPeak:
    """Highest memory above the value on entry: bytes allocated on the GPU, or else resident memory.

    That is sampled every 2 ms; where the system's own high-water mark rose, this exact value counts.
    """

    def __enter__(self):
        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        import psutil

        self._resident = lambda: psutil.Process().memory_info().rss
        self._mark_before = self._high_water_mark()
        self.before = self._sampled = self._resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        if self.on_gpu:
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self._done.set()
        self._thread.join()
        mark = self._high_water_mark()
        self.bytes = max(self._sampled, mark if mark > self._mark_before else 0) - self.before

    def _sample(self):
        while not self._done.wait(0.002):
            self._sampled = max(self._sampled, self._resident())

    @staticmethod
    def _high_water_mark():
        try:
            import resource
        except ImportError:  # Windows
            return 0
        mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return mark if sys.platform == "darwin" else mark * 1024  # Linux counts KiB
