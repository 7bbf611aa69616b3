"""Peers' own tests with fastdpo in the place of the peers' functions: `python -m tests.peers.run [PEER ...]`.

Each runs without fastdpo and with it: `plain`, as its authors wrote it; `wide`, with vocabularies of several blocks and
the exact backward; `routed`, the same with the routed one. What passes without has to pass with, but for what table.py
knows. The tests stay their authors': they are fetched, and nothing of them is kept here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .sources import CACHE, edited, obtained
from .table import PEERS, Peer, Repository, Sdist

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"plain": {}, "wide": {"backward": "exact"}, "routed": {"backward": "routed"}}
COLUMNS = ("cases", "unpatched", "with fastdpo", "known", "in neither", "never reached fastdpo", "too large")


@dataclass
class Comparison:
    """Of one peer in one mode."""

    counts: dict[str, Counter] = field(default_factory=dict)  # of each test file, by COLUMNS
    failures: list[str] = field(default_factory=list)


def run_tests(peer: Peer, folder: Path, mode: str, patched: bool) -> dict:
    """The outcome of every case: {"cases": {node id: {"outcome", "calls", "why"}}, "left_out": [node ids]}."""
    results = folder / f"{mode}-{'with' if patched else 'without'}.json"
    results.unlink(missing_ok=True)
    (folder / "no.ini").write_text("[pytest]\n")
    told = {
        "module": peer.module,
        "patched": patched,
        "options": OPTIONS[mode],
        "wide": mode != "plain",
        "routed_error": mode == "routed" and patched,
        "results": str(results),
        "hub": str(CACHE / "hub"),
    }
    packages = [str(folder / peer.source.packages)] if isinstance(peer.source, Repository) else []
    paths = [*packages, str(folder), str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"FASTDPO_PEERS": json.dumps(told), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    python = sys.executable
    if peer.environment:
        from ..integrations.environments import python_of

        python = python_of(peer.environment)
    command = [python, "-m", "pytest", "-q", "-c", "no.ini", "--rootdir", ".", "-p", "in_place.plugin"]
    command += ["-p", "no:cacheprovider", "-W", "ignore", "--tb=short", *(["-k", peer.select] if peer.select else [])]
    log = folder / f"{results.stem}.log"
    with log.open("w") as output:
        subprocess.run([*command, *peer.tests], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if not results.exists():
        raise RuntimeError(f"no results; the last lines of {log}:\n{log.read_text()[-2000:]}")
    return json.loads(results.read_text())


def compare(peer: Peer, mode: str, without: dict, patched: dict) -> Comparison:
    """What passes without fastdpo and fails with it, and is not known; and what is known and passes."""
    result = Comparison()
    for case, theirs in without["cases"].items():
        outcome = patched["cases"].get(case, {"outcome": "missing"})
        counts = result.counts.setdefault(case.partition("::")[0], Counter())
        known = next((x for x in peer.known if mode in x.modes and re.fullmatch(x.cases, case)), None)
        passed = outcome["outcome"] == "passed"
        counts["cases"] += 1
        counts["unpatched"] += theirs["outcome"] == "passed"
        counts["with fastdpo"] += passed
        counts["known"] += known is not None and not passed
        counts["in neither"] += known is None and not passed and theirs["outcome"] != "passed"
        counts["never reached fastdpo"] += passed and not outcome.get("calls")
        if known is not None and passed and not known.chance:
            result.failures.append(f"{case}: passes, and is known not to: {known.reason}")
        if known is None and not passed and theirs["outcome"] == "passed":
            result.failures.append(f"{case}: {outcome['outcome']}: {outcome.get('why', '')}")
    for case in without["left_out"]:
        result.counts.setdefault(case.partition("::")[0], Counter())["too large"] += 1
    passes = sum(counts["with fastdpo"] for counts in result.counts.values())
    if mode == "plain" and passes < peer.passes:
        result.failures.append(f"{passes} cases pass with fastdpo, and {peer.passes} should at least")
    return result


def table(comparisons: dict[tuple[str, str], Comparison]) -> str:
    rows = [("peer", "mode", "file", *COLUMNS), ("---",) * (3 + len(COLUMNS))]
    for (name, mode), comparison in comparisons.items():
        for file, counts in comparison.counts.items():
            rows.append((name, mode, file, *(str(counts[column]) for column in COLUMNS)))
        total = sum(comparison.counts.values(), Counter())
        rows.append((name, mode, "all", *(str(total[column]) for column in COLUMNS)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run_peer(peer: Peer, modes: Sequence[str]) -> Iterator[tuple[str, Comparison]]:
    obtained_from = obtained(peer.source)
    for name, of_it in (("plain", ("plain",)), ("wide", ("wide", "routed"))):
        chosen = [mode for mode in of_it if mode in modes]
        if not chosen:
            continue
        folder = edited(obtained_from, (*peer.edits, *(peer.wide_edits if name == "wide" else ())), name)
        without = run_tests(peer, folder, name, patched=False)
        for mode in chosen:
            yield mode, compare(peer, mode, without, run_tests(peer, folder, mode, patched=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers.run", description=__doc__.partition("\n")[0])
    parser.add_argument("peers", nargs="*", metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--mode", action="append", choices=OPTIONS, help="all by default")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.peers if name not in PEERS]
    if unknown:
        parser.error(f"known are {', '.join(PEERS)}; got {' '.join(unknown)}")
    comparisons, failed = {}, 0
    for name in given.peers or PEERS:
        source = PEERS[name].source
        version = source.version if isinstance(source, Sdist) else source.revision
        modes = [mode for mode in PEERS[name].modes if mode in (given.mode or OPTIONS)]
        print(f"{name} {version}: {', '.join(modes)}", flush=True)
        for mode, comparison in run_peer(PEERS[name], modes):
            comparisons[name, mode] = comparison
            print(table({(name, mode): comparison}).splitlines()[-1], flush=True)
            for failure in comparison.failures:
                print(f"FAILED {mode} {failure}", flush=True)
            failed += len(comparison.failures)
    print(table(comparisons))
    print(
        f"{failed} failed; logs and copies are in {CACHE}"
        if failed
        else "all that passes without fastdpo passes with it"
    )
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
