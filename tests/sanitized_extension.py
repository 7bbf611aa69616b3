"""Another extension in the place of fastdpo._C, if the environment names one; imported before fastdpo is."""

from __future__ import annotations

import importlib.util
import os
import sys

VARIABLE = "FASTDPO_SANITIZED_EXTENSION"  # its path


def load(path: str) -> None:
    spec = importlib.util.spec_from_file_location("fastdpo._C", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastdpo._C"] = module
    spec.loader.exec_module(module)


if VARIABLE in os.environ and "fastdpo._C" not in sys.modules:
    load(os.environ[VARIABLE])
