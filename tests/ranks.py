"""Processes of a torch.distributed group over gloo, kept for all tests of a file: starting one takes seconds.

    def scored(rank, size, x): ...              # a function of the test's module; runs on every rank
    results = ranks(2)(scored, x)               # [what it returned on each], or AssertionError with all tracebacks
    errors = ranks(2).errors(scored, x)         # [the exception of each rank, None where it returned]

What a function is given and returns crosses by torch.save, so that no rank sees another's tensors. A rank that neither
returns nor raises within the time-out fails the test, and its group is started anew.
"""

from __future__ import annotations

import datetime
import io
import multiprocessing
import os
import tempfile
import time
import traceback

import torch

TIMEOUT = 60.0  # seconds, of the group and of a function
PATIENCE = 60.0  # beyond it: machines may be busy


class RankError(Exception):
    """An exception of a rank, as text: its class may not be picklable."""

    def __init__(self, kind: str, text: str, trace: str):
        super().__init__(text)
        self.kind, self.trace = kind, trace


def _dumps(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _loads(data: bytes):
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(rank: int, size: int, store: str, timeout: float, connection) -> None:
    """A rank's process: functions and their arguments come in by `connection`, what they return goes out."""
    torch.set_num_threads(1)
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    while True:
        job = connection.recv_bytes()
        if not job:
            break
        function, args, kwargs = _loads(job)
        torch.manual_seed(1000 + rank)  # different on every rank, as in training
        try:
            answer = _dumps((True, function(rank, size, *args, **kwargs)))
        except (Exception, KeyboardInterrupt) as error:
            what = RankError(type(error).__name__, str(error), traceback.format_exc())
            answer = _dumps((False, what.kind, str(error), what.trace))
        connection.send_bytes(answer)
    dist.destroy_process_group()


class Ranks:
    def __init__(self, size: int, timeout: float = TIMEOUT):
        self.size, self.timeout = size, timeout
        self.processes, self.connections = [], []

    def __call__(self, function, *args, **kwargs) -> list:
        results = self._run(function, args, kwargs)
        failed = [(rank, x) for rank, x in enumerate(results) if isinstance(x, RankError)]
        if failed:
            raise AssertionError("\n".join(f"rank {rank}: {x.trace}" for rank, x in failed))
        return results

    def errors(self, function, *args, **kwargs) -> list[RankError | None]:
        found = self._run(function, args, kwargs)
        return [x if isinstance(x, RankError) else None for x in found]

    def _run(self, function, args, kwargs) -> list:
        self._start()
        job = _dumps((function, args, kwargs))
        for connection in self.connections:
            connection.send_bytes(job)
        results, stop, whole = [], time.monotonic() + self.timeout + PATIENCE, True
        for rank, connection in enumerate(self.connections):
            try:
                if not connection.poll(max(0.0, stop - time.monotonic())):
                    raise TimeoutError(f"neither returned nor raised within {self.timeout + PATIENCE:g} s")
                fine, *answer = _loads(connection.recv_bytes())
                results.append(answer[0] if fine else RankError(*answer))
            except (EOFError, ConnectionError, TimeoutError) as error:
                fine = False
                self.processes[rank].join(1.0)
                exit_code = self.processes[rank].exitcode
                results.append(RankError("RankLost", f"{error!r}, exit code {exit_code}", f"lost: {error!r}"))
            whole = whole and fine
        if not whole:  # ranks may be out of step with each other
            self.stop()
        return results

    def _start(self) -> None:
        if self.processes:
            return
        context = multiprocessing.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(prefix="ranks-"), "store")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, store, self.timeout, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def stop(self) -> None:
        for connection in self.connections:
            try:
                connection.send_bytes(b"")
            except (OSError, ValueError):
                pass
        for process in self.processes:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []
