"""The peers' wheels in one folder, for a machine without network: `python -m benchmarks.gpu.suite --wheels DIR`.

python -m benchmarks.gpu.wheels [--output wheels] [--python 3.12] [--most 64] [NAME==VERSION ...]

What pip can install of benchmarks/peers.py, with what it needs beside torch, triton and transformers. Prints the size
of each; exit status 1 where one was not found or all together are more than `--most` MiB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.peers import WHEELS

PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
MIB = 1 << 20


def download(wheel: str, python: str, folder: Path) -> str | None:
    """Why it was not found; None where it is in the folder."""
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms, "-d", folder, wheel,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="*", default=WHEELS, help=f"default: {' '.join(WHEELS)}")
    parser.add_argument("--output", type=Path, default=Path("wheels"))
    parser.add_argument("--python", default="3.12", help="of the machine that they are for")
    parser.add_argument("--most", type=float, default=64, help="MiB of all together")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    missing = {}
    for wheel in args.wheels:
        why = download(wheel, args.python, args.output)
        if why is not None:
            missing[wheel] = why
    sizes = {file.name: file.stat().st_size / MIB for file in sorted(args.output.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size:8.1f} MiB  {name}")
    for wheel, why in missing.items():
        print(f"not found    {wheel}: {why}")
    whole = sum(sizes.values())
    print(f"{whole:8.1f} MiB  {args.output}{'' if whole <= args.most else f': more than {args.most:g}'}")
    return 1 if missing or whole > args.most else 0


if __name__ == "__main__":
    sys.exit(main())
