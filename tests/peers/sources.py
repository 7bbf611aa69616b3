"""A peer's tests, in a folder of the environment that runs this: from its source distribution, or its repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from .table import Edit, Repository, Sdist

CACHE = Path(sys.prefix) / "peers"


def obtained(source: Sdist | Repository) -> Path:
    """The folder with `source` as its authors made it."""
    if isinstance(source, Sdist):
        home = CACHE / f"{source.package}-{source.version}"
    else:
        home = CACHE / f"{source.url.rpartition('/')[2]}-{source.revision}"
    if home.exists():
        return home
    making = home.with_name(home.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    if isinstance(source, Sdist):
        _unpack(source, making)
    else:
        for command in (
            ["init", "-q"],
            ["fetch", "-q", "--depth", "1", source.url, source.revision],
            ["checkout", "-q", "FETCH_HEAD"],
        ):
            subprocess.run(["git", "-C", making, *command], check=True)
    making.rename(home)
    return home


def _unpack(source: Sdist, folder: Path) -> None:
    pinned = f"{source.package}=={source.version}"
    # Its own build requirements are not installed: nothing of it is built but the metadata that pip asks for
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder, pinned]
    subprocess.run(pip, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()
    (inner,) = folder.iterdir()
    for path in list(inner.iterdir()):
        path.rename(folder / path.name)
    inner.rmdir()


def edited(home: Path, edits: Sequence[Edit], name: str) -> Path:
    """A copy of `home` with `edits`. ValueError where a file does not say what an edit replaces."""
    copy = home.with_name(f"{home.name}.{name}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"), symlinks=True)
    for edit in edits:
        path = copy / edit.file
        text = path.read_text()
        if text.count(edit.old) != edit.times:
            raise ValueError(f"{path} says {edit.old!r} {text.count(edit.old)} times, not {edit.times}")
        path.write_text(text.replace(edit.old, edit.new))
    return copy
