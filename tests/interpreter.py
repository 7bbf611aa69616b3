"""Whether Triton's interpreter runs here, which is what serves its engine where there is no GPU."""

from __future__ import annotations

import importlib.util
import os


def interpreter_problem() -> str | None:
    """Why not. Older ones take arrays of one element for numbers, which NumPy 2.4 refuses."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return None
    import numpy
    import triton

    old, new = (tuple(map(int, x.__version__.split(".")[:2])) for x in (triton, numpy))
    if old < (3, 9) and new >= (2, 4):
        return f"the interpreter of Triton {triton.__version__} needs numpy<2.4, this is {numpy.__version__}"
    return None
