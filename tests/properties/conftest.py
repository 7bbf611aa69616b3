"""How long the properties are looked at: a few examples of each, the same in every run, or for so many minutes.

FASTDPO_TEST_SEED=n                other examples, n's
FASTDPO_PROPERTIES_MINUTES=30      fresh examples until the time is up, shared by the tests; and Triton's interpreter

A failing test prints the example and a line, @reproduce_failure(...), which repeats it where it stands over the test.
"""

from __future__ import annotations

import importlib.util
import os
import random
import time

import pytest

MINUTES = float(os.environ.get("FASTDPO_PROPERTIES_MINUTES", 0))

if importlib.util.find_spec("hypothesis") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import hypothesis

    common = {
        "deadline": None,
        "print_blob": True,
        "database": None,
        "suppress_health_check": list(hypothesis.HealthCheck),
    }
    fixed = "FASTDPO_TEST_SEED" not in os.environ
    hypothesis.settings.register_profile("ci", max_examples=12, derandomize=fixed, **common)
    hypothesis.settings.register_profile("long", max_examples=10, **common)
    hypothesis.settings.load_profile("long" if MINUTES else "ci")

_share: dict[str, float] = {}  # seconds for each test


def pytest_collection_modifyitems(items) -> None:
    ours = [item for item in items if "properties" in item.path.parts]
    _share["seconds"] = 60 * MINUTES / max(1, len(ours)) if ours else 0.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem) -> bool | None:
    function = pyfuncitem.obj
    if not hasattr(function, "hypothesis"):
        return None
    given = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    until = time.monotonic() + _share.get("seconds", 0.0)
    seed = os.environ.get("FASTDPO_TEST_SEED")
    while True:
        if MINUTES or seed is not None:
            hypothesis.seed(int(seed) if seed is not None else random.SystemRandom().randrange(2**31))(function)
        function(**given)
        if seed is not None or time.monotonic() >= until:
            return True
