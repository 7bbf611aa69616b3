"""Runs the tests of patch_trl with several releases of TRL: `make test-trl`, or `make test-trl TRL="1.8.0 0.28.0"`.

Each release gets an environment with what differs from the one that runs this; torch and the rest are shared.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

# TRL -> what else it needs that is older. transformers 5 came after 0.28; the newest is the running environment's.
RELEASES = {
    "1.15.0": [],
    "1.14.2": [],
    "1.8.0": ["requests"],  # GRPO and RLOO import requests without requiring it
    "1.0.0": ["requests"],
    "0.29.1": ["transformers==4.57.6"],
    "0.28.0": ["transformers==4.57.6"],
    "0.24.0": ["transformers==4.57.6"],
}
TESTS = ["tests/integrations/test_trl_releases.py", "tests/integrations/test_lazy.py"]


def environment(release: str) -> Path:
    """The Python of the environment of `release`, made if it is not there."""
    home = Path(sys.prefix) / "trl" / release
    python = home / "bin" / "python"
    if not (home / "installed").exists():
        venv.create(home, with_pip=True, clear=True)
        (site,) = home.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(sysconfig.get_path("purelib"))
        pins = [f"trl=={release}", *RELEASES[release]]
        subprocess.run([python, "-m", "pip", "install", "-q", *pins], check=True)
        (home / "installed").write_text("\n".join(pins))
    return python


def main(releases: list[str]) -> int:
    failed = []
    for release in releases or RELEASES:
        if release not in RELEASES:
            sys.exit(f"no TRL {release} in the table of {__file__}; there are {', '.join(RELEASES)}")
        python = environment(release)
        print(f"TRL {release}", flush=True)
        paths = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
        tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        if subprocess.run(tests, env=os.environ | {"PYTHONPATH": paths}).returncode:
            failed.append(release)
    print(f"failed: {', '.join(failed)}" if failed else "every release passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
