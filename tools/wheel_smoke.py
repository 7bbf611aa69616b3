"""A wheel in an environment that has nothing but pip: installs it there with a torch, and compares with fp64.

python -m tools.wheel_smoke [--wheels dist] [--python python3.10 --torch 2.6.0] [--pip "--no-index --find-links DIR"]

Without `--python` the oldest and the newest Python of the wheels that are here, with the oldest torch that fastdpo
supports and the newest that pip finds.
"""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.wheel import ROOT, Python, pythons

OLDEST_TORCH = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
CHECK = """
import importlib.metadata, pathlib, subprocess, sys
import torch, fastdpo

torch.manual_seed(0)
found, here = fastdpo.backends(), pathlib.Path(fastdpo.__file__).parent
assert pathlib.Path(sys.prefix) in here.parents and (here / "py.typed").exists(), here
assert found["native"]["available"], found["native"]["reason"]
assert importlib.metadata.version("fastdpo") == fastdpo.__version__
hidden, weight = torch.randn(2, 40, 64, dtype=torch.float64), 0.3 * torch.randn(1000, 64, dtype=torch.float64)
labels = torch.randint(0, 1000, (2, 40))
results = {}
for name in ("eager", "exact", "routed"):
    dtype = torch.float64 if name == "eager" else torch.float32
    h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    if name == "eager":
        logps = (h @ w.T).log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2))
        loss = -torch.nn.functional.logsigmoid(0.1 * (logps[0] - logps[1]))
    else:
        loss = fastdpo.linear_dpo_loss(h, w, labels, backward=name).loss
    results[name] = [loss, *torch.autograd.grad(loss, (h, w))]
for name, bound in (("exact", 1e-5), ("routed", 0.05)):
    errors = [((x - y).norm() / y.norm()).item() for x, y in zip(results[name], results["eager"])]
    assert max(errors) < bound, (name, errors)
logits = torch.randn(5, 300)
picked = fastdpo.selective_log_softmax(logits, labels[0, :5] % 300)
assert (picked - logits.log_softmax(-1).gather(1, labels[0, :5, None] % 300)[:, 0]).abs().max() < 1e-5
subprocess.run([sys.executable, "-m", "fastdpo"], check=True, stdout=subprocess.DEVNULL)
print(f"python {found['versions']['python']}, torch {torch.__version__}: {found['native']['isa']}, "
      f"CUDA kernels for {found['native']['cuda_archs'] or 'nothing'}; "
      f"{found['operations']['linear_logps']['cpu']}")
"""


def wheel_of(python: Python, wheels: Path) -> Path | None:
    tag = f"cp{python.version[0]}{python.version[1]}"
    abi = f"{tag}t" if python.free_threaded else tag
    found = sorted(wheels.glob(f"fastdpo-*-{tag}-{abi}-*{platform.machine()}.whl"))
    return found[-1] if found else None


def tried(python: Python, wheel: Path, torch: str, pip: list[str]) -> None:
    """Raises CalledProcessError where anything fails."""
    with tempfile.TemporaryDirectory(prefix="fastdpo-smoke-") as folder:
        subprocess.run([python.command, "-m", "venv", folder], check=True)
        inside = str(Path(folder) / "bin" / "python")
        install = [inside, "-m", "pip", "install", "-q", "--disable-pip-version-check", *pip, torch, str(wheel)]
        subprocess.run(install, check=True)
        subprocess.run([inside, "-I", "-c", CHECK], cwd=folder, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist")
    parser.add_argument("--python", help="a command")
    parser.add_argument("--torch", help="its version; the newest without")
    parser.add_argument("--pip", default="", help="more options of pip install")
    args = parser.parse_args()
    here = [(python, wheel_of(python, args.wheels)) for python in pythons([args.python] if args.python else None)]
    here = [(python, wheel) for python, wheel in here if wheel is not None]
    if not here:
        sys.exit(f"no wheel in {args.wheels} for a Python that is here: make wheel")
    for python, wheel in here[:1] if args.python else dict.fromkeys((here[0], here[-1])):
        version = args.torch or (OLDEST_TORCH if python == here[0][0] and not args.python else None)
        print(f"{wheel.name}, {wheel.stat().st_size / 2**20:.2f} MiB", flush=True)
        tried(python, wheel.resolve(), f"torch=={version}" if version else "torch", shlex.split(args.pip))


if __name__ == "__main__":
    main()
