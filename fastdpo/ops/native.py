"""The native extension built from csrc/, if this installation has one, and why not otherwise."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path


@functools.cache
def _load():
    import torch  # noqa: F401  the extension joins the OpenMP pool that torch has loaded

    try:
        return importlib.import_module("fastdpo._C"), None
    except ImportError as error:
        return None, f"{build_info().get('reason') or error}"


def extension():
    """The extension module; only for callers that have seen `available()`."""
    return _load()[0]


def available() -> bool:
    return _load()[0] is not None


def reason() -> str | None:
    """Why there is no extension, or None."""
    return _load()[1]


@functools.cache
def build_info() -> dict:
    """What setup.py recorded: compiler, instruction sets, CUDA architectures, the reason for what is missing."""
    path = Path(__file__).parent.parent / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {"reason": "not built (running from a source tree?)"}
