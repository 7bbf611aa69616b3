"""The folder of one run of the GPU suite: result.json, replaced whole after every figure, summary.txt and log.txt.

A second run with the same folder goes on where the first one stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

from benchmarks.gpu.summary import summary

SAME = ("title", "kernels", "device", "versions", "commit")  # of both runs, or their figures do not belong together


class OtherState(Exception):
    """The folder holds figures of something else."""


class Results:
    def __init__(self, folder: Path, record: dict):
        self.folder, self.file = folder, folder / "result.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.begin = time.monotonic()
        self.record = {**record, "stages": {}, "shapes": [], "runs": 0}
        if self.file.exists():
            before = json.loads(self.file.read_text())
            different = [key for key in SAME if before.get(key) != record.get(key)]
            if different:
                raise OtherState(f"{self.file} is of another {', '.join(different)}: name another folder")
            self.record = {**before, **record, "date": before["date"]}
        self.record["runs"] += 1
        self.save()

    def save(self) -> None:
        _replace(self.file, json.dumps(self.record, indent=1) + "\n")
        _replace(self.folder / "summary.txt", self.summary() + "\n")

    def summary(self) -> str:
        try:
            return summary(self.record)
        except Exception:  # figures are worth more than their table
            return traceback.format_exc()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        with open(self.folder / "log.txt", "a") as log:
            log.write(f"{time.monotonic() - self.begin:7.1f} {text}\n")

    def is_done(self, stage: str) -> bool:
        return self.record["stages"].get(stage, {}).get("state") == "done"

    def mark(self, stage: str, state: str, **more) -> None:
        """`state`: running, done, failed, not reached, left out."""
        self.record["stages"][stage] = {"state": state, **more}
        self.save()

    def shape(self, shape: tuple[int, int, int], dtype: str) -> dict:
        """What is known of a shape, to be added to."""
        key = dict(zip("NVH", shape), dtype=dtype)
        for known in self.record["shapes"]:
            if all(known[name] == value for name, value in key.items()):
                return known
        self.record["shapes"].append({**key, "groups": {}, "first figures": {}, "left out": {}, "failed": {}})
        return self.record["shapes"][-1]

    def copy(self, table: Path) -> None:
        if table.exists():
            shutil.copyfile(table, self.folder / table.name)

    def restore(self, table: Path) -> None:
        """As an earlier run left it: the second one may be on a fresh machine."""
        earlier = self.folder / table.name
        if earlier.exists() and earlier.read_text() != table.read_text():
            shutil.copyfile(earlier, table)
            self.say(f"{table.name}: that of the earlier run")


def _replace(file: Path, text: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(text)
    os.replace(new, file)
