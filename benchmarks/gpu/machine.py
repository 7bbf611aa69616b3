"""What is measured, and on what."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]


def has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def device() -> dict:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": properties.major * 10 + properties.minor,
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def commit(given: str | None) -> dict:
    """The commit that is measured, and whether files differ from it: unknown where there is no git to ask."""
    head, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {"commit": given or head or "unknown", "changed files": changed.splitlines() if head else "unknown"}


def _git(*arguments: str) -> str:
    git = shutil.which("git")
    if git is None:
        return ""
    done = subprocess.run([git, *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict:
    found = {"python": sys.version.split()[0]}
    for package in ("torch", "triton", "numpy", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peers() -> dict:
    from benchmarks.peers import PACKAGES

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment(dry_run: bool) -> dict[str, str]:
    """Of every child: this checkout first; in a dry run the Triton engine, in its interpreter."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    found.pop("TRITON_INTERPRET", None)
    return found | ({"TRITON_INTERPRET": "1", "FASTDPO_ENGINE": "triton"} if dry_run else {})
