"""The examples of several ranks, run by torchrun as users run them, train as plain torch does in one process."""

from __future__ import annotations

import itertools
import os
import re
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "distributed"
SCRIPTS = ["data_parallel.py", "data_parallel.py --ddp", "tensor_parallel.py", "context_parallel.py", "pipeline.py"]


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """Losses of the same steps with logits, in fp64."""
    tiny = runpy.run_path(str(FOLDER / "tiny.py"))
    model, (ids, labels) = tiny["model"]().double(), tiny["batch"]()
    labels = labels[:, 1:]

    def logps():
        found = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return (found * (labels != -100)).sum(-1)

    with torch.no_grad():
        reference = logps()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-2), []
    for _ in range(4):
        chosen, rejected = (logps() - reference).chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_train_as_one_process_with_logits(script, expected):
    script, *options = script.split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+") as errors:
        run = subprocess.Popen(
            [*command, str(FOLDER / script), *options],
            env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        watchdog = threading.Timer(200, run.terminate)
        watchdog.start()
        printed = list(itertools.islice(run.stdout, len(expected)))
        watchdog.cancel()
        try:  # at its end DDP over gloo waits for itself now and then, without us too: what was printed counts
            run.wait(15)
        except subprocess.TimeoutExpired:
            run.terminate()  # and torchrun its ranks
            run.wait(60)
        run.stdout.close()
        errors.seek(0)
        said = errors.read()
    if "--ddp" not in options or len(printed) < len(expected):
        assert run.returncode == 0, said
    losses = [float(x) for x in re.findall(r"^step \d: loss (\S+)$", "".join(printed), re.MULTILINE)]
    assert expected[-1] < 0.5 < expected[0]
    assert losses == pytest.approx(expected, abs=5e-6), said
